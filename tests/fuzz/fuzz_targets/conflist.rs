//! A network configuration of the node, which our entry is put into and taken out of.
//!
//! What is taken out again leaves every byte as it was; putting it in twice is putting it in once;
//! everybody else's plugins stay, in their order.
#![no_main]

use libfuzzer_sys::fuzz_target;
use picomesh::cni::install::conflist::{from_single, program, programs, with_entry, without_entry};

const ENTRY: &str = r#"{"type":"picomesh-cni","runDir":"/run/picomesh"}"#;

fuzz_target!(|text: &str| {
    // What others had of ours goes in any case.
    let clean = match without_entry(text) {
        Ok(Some(clean)) => clean,
        Ok(None) => text.to_owned(),
        Err(_) => {
            assert!(with_entry(text, ENTRY).is_err());
            single(text);
            return;
        }
    };
    assert_eq!(without_entry(&clean), Ok(None));
    assert_eq!(programs(&clean), programs(text));
    let with = with_entry(&clean, ENTRY)
        .expect("what is understood without is understood with")
        .expect("it was not there");
    assert_eq!(with_entry(&with, ENTRY), Ok(None));
    assert_eq!(programs(&with), programs(text));
    assert_eq!(without_entry(&with), Ok(Some(clean)));
    assert!(with_entry(text, ENTRY).is_ok());
});

fn single(text: &str) {
    if let Ok(list) = from_single(text, ENTRY) {
        assert_eq!(with_entry(&list, ENTRY), Ok(None), "{list}");
        assert_eq!(programs(&list), program(text).map(|only| vec![only]));
    }
}

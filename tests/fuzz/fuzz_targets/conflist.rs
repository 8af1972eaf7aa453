//! A network configuration of the node, which a list of our own is made of.
//!
//! Ours has everybody else's plugins in their order, and is what a list made of it would be.
#![no_main]

use libfuzzer_sys::fuzz_target;
use picomesh::cni::install::conflist::{from_list, from_single, made_of, program, programs};

const ENTRY: &str = r#"{"type":"picomesh-cni","madeOf":"10-a.conf"}"#;

fuzz_target!(|text: &str| {
    let _whatever = made_of(text);
    if let Ok(list) = from_list(text, ENTRY) {
        assert_eq!(programs(&list), programs(text));
        is_ours(&list);
    }
    if let Ok(list) = from_single(text, ENTRY) {
        assert_eq!(programs(&list), program(text).map(|only| vec![only]));
        is_ours(&list);
    }
});

fn is_ours(list: &str) {
    assert_eq!(from_list(list, ENTRY).as_deref(), Ok(list));
    assert_eq!(made_of(list).as_deref(), Some("10-a.conf"), "{list}");
}

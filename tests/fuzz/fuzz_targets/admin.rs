//! One line on the admin socket. Only root may write there, and root mistypes too.
#![no_main]

use libfuzzer_sys::fuzz_target;
use picomesh::admin::{Request, Response};

fuzz_target!(|text: &str| {
    if let Ok(request) = serde_json::from_str::<Request>(text) {
        let line = serde_json::to_string(&request).expect("what was read can be written");
        assert!(!line.contains('\n'), "one line");
        assert_eq!(serde_json::from_str::<Request>(&line).ok(), Some(request));
    }
    if let Ok(response) = serde_json::from_str::<Response>(text) {
        let line = serde_json::to_string(&response).expect("what was read can be written");
        assert!(!line.contains('\n'), "one line");
        // Numbers may come back as others: JSON has more digits than a float.
        assert!(serde_json::from_str::<Response>(&line).is_ok());
    }
});

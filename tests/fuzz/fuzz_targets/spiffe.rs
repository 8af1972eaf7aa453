//! The text of an identity: each accepted one has one spelling, and no character that would mean
//! something in a log, a metric or a path.
#![no_main]

use libfuzzer_sys::fuzz_target;
use picomesh::identity::{parse_spiffe_id, spiffe};

fuzz_target!(|text: &str| {
    if let Ok(identity) = parse_spiffe_id(text) {
        assert_eq!(identity.to_string(), text);
        let plain = |part: &str| {
            !part.is_empty()
                && part
                    .bytes()
                    .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b))
        };
        assert!(plain(&identity.trust_domain));
        assert!(plain(&identity.namespace) && plain(&identity.service_account));
        assert!(!identity.namespace.contains('.'));
        assert!(spiffe::linkerd_name(&identity).len() <= text.len() + 40);
    }
    if let Ok(domain) = spiffe::parse_trust_domain(text) {
        let identity = format!("spiffe://{domain}/ns/a/sa/b");
        assert!(parse_spiffe_id(&identity).is_ok(), "{identity}");
    }
});

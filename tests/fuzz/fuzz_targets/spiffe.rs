//! The text of an identity, as SPIFFE or Linkerd spell it: each accepted one has one spelling, and
//! no character that would mean something in a log, a metric or a path.
#![no_main]

use libfuzzer_sys::fuzz_target;
use picomesh::{identity::parse_spiffe_id, state::Identity};

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
        // Linkerd's spelling is one too, but for a trust domain that looks like half of one.
        if !identity.trust_domain.contains("serviceaccount") {
            let linkerds = identity.linkerd_name();
            assert_eq!(Identity::from_linkerd_name(&linkerds), Some(identity));
        }
    }
    if let Some(identity) = Identity::from_linkerd_name(text) {
        assert!(parse_spiffe_id(&identity.to_string()).is_ok(), "{identity}");
    }
});

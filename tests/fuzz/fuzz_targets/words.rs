//! Labels and annotations that speak to us, on a pod or a namespace.
//!
//! Input: `name: value` lines; a name that begins with `!` is a label's, the others are
//! annotations'. What cannot be read is reported and taken in the safe sense.
#![no_main]

use std::collections::BTreeMap;

use libfuzzer_sys::fuzz_target;
use picomesh::{
    k8s::words::{Place, read},
    state::objects::{DefaultPolicy, OutboundDefault},
};

fuzz_target!(|text: &str| {
    let (mut labels, mut annotations) = (BTreeMap::new(), BTreeMap::new());
    for line in text.lines().take(64) {
        let Some((name, value)) = line.split_once(": ") else {
            continue;
        };
        match name.strip_prefix('!') {
            Some(name) => labels.insert(name.to_owned(), value.to_owned()),
            None => annotations.insert(name.to_owned(), value.to_owned()),
        };
    }
    for place in [Place::Pod, Place::Namespace] {
        let words = read(place, &labels, &annotations);
        let again = read(place, &labels, &annotations);
        assert_eq!(format!("{words:?}"), format!("{again:?}"));
        for ranges in [&words.skip_inbound, &words.skip_outbound]
            .into_iter()
            .flatten()
        {
            assert!(ranges.len() <= 16);
            for range in ranges {
                assert!(range.first <= range.last && range.first > 0, "{range:?}");
            }
        }
        // Somebody wanted it stricter and mistyped: it is not laxer for that.
        if let Some(word) = annotations.get("config.picomesh.io/default-inbound-policy") {
            let known = DefaultPolicy::ALL.into_iter().find(|p| p.as_str() == word);
            let expected = known.unwrap_or(DefaultPolicy::Deny);
            assert_eq!(words.default_inbound_policy, Some(expected));
        }
        if let Some(word) = annotations.get("config.picomesh.io/outbound-default") {
            let expected = match word.as_str() {
                "allow" => OutboundDefault::Allow,
                _other => OutboundDefault::Deny,
            };
            assert_eq!(words.outbound_default, Some(expected));
        }
    }
});

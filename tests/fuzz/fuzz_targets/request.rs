//! A CertificateSigningRequest as whoever may make one can write it: first byte even, the bytes of
//! the request in an object that is otherwise in order; odd, the whole object.
//!
//! What is accepted names one identity of the trust domain, to the letter as it stands in the
//! request, and asks for no longer life than is allowed.
#![no_main]

use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use picomesh::{
    control::ask::Rules,
    identity::{csr::claim, parse_spiffe_id},
};
use serde_json::json;

const EXTRA: &str = "authentication.kubernetes.io/";

fuzz_target!(|data: &[u8]| {
    let Some((kind, data)) = data.split_first() else {
        return;
    };
    let rules = Rules {
        namespace: "picomesh-system".into(),
        trust_domain: "cluster.local".into(),
        longest_life: Duration::from_secs(86_400),
    };
    if kind % 2 == 1 {
        if let Ok(request) = serde_json::from_slice(data)
            && let Ok(ask) = rules.read(&request)
        {
            assert_eq!(*ask.identity().trust_domain, *rules.trust_domain);
            assert!(ask.life <= rules.longest_life);
            assert!(!ask.requester.node.is_empty());
        }
        return;
    }
    let Ok(claimed) = claim(data) else { return };
    assert!(data.len() <= 8192);
    let text = claimed.identity.to_string();
    assert_eq!(parse_spiffe_id(&text).as_ref(), Ok(&claimed.identity));
    assert!(data.windows(text.len()).any(|part| part == text.as_bytes()));
    // Around it everything is in order, so only the trust domain can still be wrong.
    let object = json!({
        "metadata": {"name": "r"},
        "spec": {
            "signerName": "picomesh.io/workload",
            "request": base64(&pem(data)),
            "usages": ["client auth", "digital signature", "server auth"],
            "expirationSeconds": 3600,
            "username": "system:serviceaccount:picomesh-system:picomesh-agent",
            "extra": {
                format!("{EXTRA}node-name"): ["n1"],
                format!("{EXTRA}pod-name"): ["agent-1"],
                format!("{EXTRA}pod-uid"): ["uid"],
            },
        },
    });
    let Ok(object) = serde_json::from_value(object) else {
        unreachable!("the object is one")
    };
    let ours = claimed.identity.trust_domain == rules.trust_domain;
    assert_eq!(rules.read(&object).is_ok(), ours);
});

fn pem(der: &[u8]) -> Vec<u8> {
    let name = "CERTIFICATE REQUEST";
    let text = base64(der);
    format!("-----BEGIN {name}-----\n{text}\n-----END {name}-----\n").into_bytes()
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for three in bytes.chunks(3) {
        let at = |index: usize| u32::from(three.get(index).copied().unwrap_or_default());
        let bits = at(0) << 16 | at(1) << 8 | at(2);
        for digit in 0..4 {
            if digit <= three.len() {
                let digit = bits >> (18 - 6 * digit) & 63;
                text.push(char::from(DIGITS[digit as usize]));
            } else {
                text.push('=');
            }
        }
    }
    text
}

//! From a certificate, or a request for one, to what we believe of it.
//!
//! An accepted identity is one spelling: written out and read again it is the same, and it fits a
//! server name.
#![no_main]

use libfuzzer_sys::fuzz_target;
use picomesh::identity::{csr::believed_key, parse_spiffe_id, peer_identity, server_name};
use rustls::pki_types::CertificateDer;

fuzz_target!(|data: &[u8]| {
    if let Ok(identity) = peer_identity(&CertificateDer::from(data)) {
        let text = identity.to_string();
        assert_eq!(parse_spiffe_id(&text).as_ref(), Ok(&identity));
        // What was read stands in the certificate, to the letter.
        assert!(data.windows(text.len()).any(|part| part == text.as_bytes()));
        assert!(
            server_name(&identity)
                .to_str()
                .ends_with(".id.picomesh.internal")
        );
    }
    if believed_key(data).is_ok() {
        assert!(data.len() <= 8192);
    }
});

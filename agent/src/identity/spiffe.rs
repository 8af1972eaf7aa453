//! SPIFFE IDs and the names made of them.
//!
//! What claims an identity in a certificate comes through [`parse_spiffe_id`]: the verifiers in
//! `tls`, the signer in `ca`. The spelling itself is `state`'s, one per identity, so that two equal
//! identities are always two equal strings. This room must not know certificates.

use std::fmt::Write as _;

use rustls::pki_types::{DnsName, ServerName};

use crate::state::Identity;

/// The text is not the SPIFFE ID of a Kubernetes service account in its only accepted spelling.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error("{uri:?} is not spiffe://<trust-domain>/ns/<namespace>/sa/<service-account>")]
pub struct NotAWorkload {
    /// What was given, cut to a length that fits a log line.
    pub uri: String,
}

/// Reads a workload's SPIFFE ID; the inverse of [`Identity`]'s `Display`.
pub fn parse_spiffe_id(uri: &str) -> Result<Identity, NotAWorkload> {
    Identity::from_spiffe_id(uri).ok_or_else(|| NotAWorkload {
        uri: uri.chars().take(128).collect(),
    })
}

/// `hex(SHA-256(identity))[..32].id.picomesh.internal`: SNI cannot hold a URI.
pub fn server_name(identity: &Identity) -> ServerName<'static> {
    let name = server_name_text(identity);
    match DnsName::try_from(name) {
        Ok(name) => ServerName::DnsName(name),
        Err(error) => unreachable!("hex digits and a fixed suffix are a DNS name: {error}"),
    }
}

/// The text of [`server_name`], as it arrives in a ClientHello.
pub(super) fn server_name_text(identity: &Identity) -> String {
    let digest =
        aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, identity.to_string().as_bytes());
    let mut name = String::with_capacity(32 + ".id.picomesh.internal".len());
    for byte in &digest.as_ref()[..16] {
        let _ = write!(name, "{byte:02x}");
    }
    name.push_str(".id.picomesh.internal");
    name
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_workload_id_is_read() {
        let id = parse_spiffe_id("spiffe://cluster.local/ns/shop/sa/cart.v1-a").unwrap();
        assert_eq!(&*id.trust_domain, "cluster.local");
        assert_eq!(&*id.namespace, "shop");
        assert_eq!(&*id.service_account, "cart.v1-a");
        // Kubernetes bounds an account's name as a whole.
        let long = "a".repeat(253);
        let id = parse_spiffe_id(&format!("spiffe://td/ns/a/sa/{long}")).unwrap();
        assert_eq!(*id.service_account, *long);
    }

    #[test]
    fn every_other_spelling_is_refused() {
        let label64 = "a".repeat(64);
        let long = format!("spiffe://td/ns/a/sa/{}", "a.".repeat(200) + "a");
        for uri in [
            "",
            "spiffe://",
            "spiffe:///ns/a/sa/b",
            "SPIFFE://td/ns/a/sa/b",
            "https://td/ns/a/sa/b",
            "spiffe://TD/ns/a/sa/b",
            "spiffe://td:443/ns/a/sa/b",
            "spiffe://user@td/ns/a/sa/b",
            "spiffe://td/ns/a/sa/b/",
            "spiffe://td/ns/a/sa/b/c",
            "spiffe://td//ns/a/sa/b",
            "spiffe://td/ns/a/sa/",
            "spiffe://td/ns//sa/b",
            "spiffe://td/ns/a/sa",
            "spiffe://td/sa/b/ns/a",
            "spiffe://td/ns/a/SA/b",
            "spiffe://td/ns/A/sa/b",
            "spiffe://td/ns/a/sa/b?x",
            "spiffe://td/ns/a/sa/b#x",
            "spiffe://td/ns/a/sa/%62",
            "spiffe://td/ns/a/sa/b ",
            " spiffe://td/ns/a/sa/b",
            "spiffe://td/ns/a/sa/..",
            "spiffe://td/ns/a/sa/b.",
            "spiffe://td/ns/a.b/sa/b",
            "spiffe://td/ns/-a/sa/b",
            "spiffe://td/ns/a/sa/b\0",
            "spiffe://td/ns/ä/sa/b",
            &format!("spiffe://td/ns/{label64}/sa/b"),
            &format!("spiffe://{label64}/ns/a/sa/b"),
            &format!("spiffe://{}/ns/a/sa/b", "t".repeat(254)),
            &format!("spiffe://td/ns/a/sa/{}", "a".repeat(254)),
            &long,
        ] {
            assert!(parse_spiffe_id(uri).is_err(), "{uri:?} was accepted");
        }
    }

    #[test]
    fn the_server_name_is_the_start_of_the_ids_hash() {
        // printf spiffe://cluster.local/ns/default/sa/default | sha256sum
        let id = parse_spiffe_id("spiffe://cluster.local/ns/default/sa/default").unwrap();
        assert_eq!(
            server_name(&id).to_str(),
            "59e769846c7230fc13a7ce2b5987ae5f.id.picomesh.internal"
        );
    }

    proptest! {
        #[test]
        fn whatever_is_accepted_is_written_back_the_same(uri in "(spiffe://)?[a-zA-Z0-9._/-]{0,40}(/ns/)[a-z0-9.-]{0,9}/sa/[a-z0-9.-]{0,9}") {
            if let Ok(id) = parse_spiffe_id(&uri) {
                prop_assert_eq!(id.to_string(), uri);
            }
        }

        #[test]
        fn whatever_kubernetes_can_name_is_accepted(
            td in "[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?(\\.[a-z0-9]([a-z0-9-]{0,9}[a-z0-9])?){0,3}",
            ns in "[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?",
            sa in "[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?(\\.[a-z0-9]([a-z0-9-]{0,9}[a-z0-9])?){0,3}",
        ) {
            let id = Identity { trust_domain: td.into(), namespace: ns.into(), service_account: sa.into() };
            prop_assert_eq!(parse_spiffe_id(&id.to_string()), Ok(id));
        }

        #[test]
        fn no_text_makes_the_parser_panic(text in ".{0,200}") {
            let _ = parse_spiffe_id(&text);
        }
    }
}

//! Certificate signing requests: how one is made on the node, and what a signer believes of it.
//!
//! [`Request::new`] is called by `manager`, [`believed_key`] by every signer (here `ca`). The two
//! stand side by side because they are a contract: a request carries the identity for people who
//! look at it, but a signer takes nothing from it except the public key.

use rcgen::{CertificateParams, DistinguishedName, KeyPair, SanType, SubjectPublicKeyInfo};
use rustls::{
    crypto::aws_lc_rs::sign::any_ecdsa_type,
    pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
    sign::SigningKey,
};
use std::sync::Arc;
use x509_parser::{certification_request::X509CertificationRequest, prelude::FromDer};

use crate::state::Identity;

/// The longest request a signer reads; ours have about 250 bytes.
const MAX_REQUEST: usize = 8 * 1024;
const EC_PUBLIC_KEY: &str = "1.2.840.10045.2.1";
const P256: &str = "1.2.840.10045.3.1.7";
const ECDSA_WITH_SHA256: &str = "1.2.840.10045.4.3.2";

/// A fresh key and the request for a certificate of it. The key is never shown or sent, hence no
/// `Debug`; it leaves as a signer for handshakes, and for the snapshot of this boot.
pub struct Request {
    pub der: Vec<u8>,
    pub key: Arc<dyn SigningKey>,
    /// The same as PKCS#8.
    pub pkcs8: Arc<[u8]>,
    /// The public key as it must stand in the certificate (an uncompressed point).
    pub public_key: Vec<u8>,
}

#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    #[error("cannot make a key and a request for it: {0}")]
    Make(#[from] rcgen::Error),
    #[error("cannot use a fresh key: {0}")]
    Key(#[from] rustls::Error),
    #[error("the request does not parse: {0}")]
    Malformed(String),
    #[error("the request's {field} is {value}, must be {must}")]
    Unsuitable {
        field: &'static str,
        value: String,
        must: &'static str,
    },
    #[error("the request is not signed by its own key")]
    BadSignature,
}

impl Request {
    /// A P-256 key and a request that names `identity`.
    pub fn new(identity: &Identity) -> Result<Self, RequestError> {
        let pair = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(identity.to_string().try_into()?)];
        let der = params.serialize_request(&pair)?.der().to_vec();
        let pkcs8: Arc<[u8]> = pair.serialize_der().into();
        Ok(Self {
            der,
            key: signing_key(&pkcs8)?,
            pkcs8,
            public_key: pair.public_key_raw().to_vec(),
        })
    }
}

pub(super) fn signing_key(pkcs8: &[u8]) -> Result<Arc<dyn SigningKey>, rustls::Error> {
    any_ecdsa_type(&PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(pkcs8)))
}

/// The public key that belongs to a private one, as it stands in certificates.
pub(super) fn public_key(pkcs8: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
    let pair = KeyPair::try_from(pkcs8)?;
    Ok(pair.public_key_raw().to_vec())
}

/// The public key of a request, after every check that a signer owes: P-256, and whoever asks
/// holds the private key. Subject, names and extensions are ignored, whatever they say.
pub fn believed_key(der: &[u8]) -> Result<SubjectPublicKeyInfo, RequestError> {
    if der.len() > MAX_REQUEST {
        return Err(RequestError::Unsuitable {
            field: "length",
            value: der.len().to_string(),
            must: "at most 8192 bytes",
        });
    }
    let (rest, request) = X509CertificationRequest::from_der(der)
        .map_err(|error| RequestError::Malformed(error.to_string()))?;
    if !rest.is_empty() {
        return Err(RequestError::Malformed(format!(
            "{} bytes follow it",
            rest.len()
        )));
    }

    let info = &request.certification_request_info;
    let key = &info.subject_pki;
    must_be(
        "key type",
        key.algorithm.algorithm.to_id_string(),
        EC_PUBLIC_KEY,
    )?;
    let curve = key
        .algorithm
        .parameters
        .as_ref()
        .and_then(|parameters| parameters.as_oid().ok())
        .map_or_else(|| "not named".to_owned(), |oid| oid.to_id_string());
    must_be("curve", curve, P256)?;
    must_be(
        "signature algorithm",
        request.signature_algorithm.algorithm.to_id_string(),
        ECDSA_WITH_SHA256,
    )?;

    aws_lc_rs::signature::UnparsedPublicKey::new(
        &aws_lc_rs::signature::ECDSA_P256_SHA256_ASN1,
        key.subject_public_key.data.as_ref(),
    )
    .verify(info.raw, &request.signature_value.data)
    .map_err(|_unspecified| RequestError::BadSignature)?;
    Ok(SubjectPublicKeyInfo::from_der(key.raw)?)
}

fn must_be(field: &'static str, value: String, must: &'static str) -> Result<(), RequestError> {
    if value == must {
        Ok(())
    } else {
        Err(RequestError::Unsuitable { field, value, must })
    }
}

#[cfg(test)]
mod tests {

    use proptest::prelude::*;
    use rcgen::PublicKeyData;

    use super::*;
    use crate::identity::parse_spiffe_id;

    fn request() -> Request {
        Request::new(&parse_spiffe_id("spiffe://td/ns/a/sa/b").unwrap()).unwrap()
    }

    #[test]
    fn the_signer_believes_the_key_that_was_made() {
        let request = request();
        let key = believed_key(&request.der).unwrap();
        assert_eq!(key.der_bytes(), request.public_key);
    }

    #[test]
    fn every_request_has_a_key_of_its_own() {
        assert_ne!(request().public_key, request().public_key);
    }

    #[test]
    fn a_request_for_another_curve_is_refused() {
        let pair = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap();
        let csr = CertificateParams::default()
            .serialize_request(&pair)
            .unwrap();
        let error = believed_key(csr.der()).unwrap_err().to_string();
        assert!(error.contains("curve"), "{error}");
    }

    #[test]
    fn a_request_for_another_key_type_is_refused() {
        let pair = KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
        let csr = CertificateParams::default()
            .serialize_request(&pair)
            .unwrap();
        let error = believed_key(csr.der()).unwrap_err().to_string();
        assert!(error.contains("key type"), "{error}");
    }

    #[test]
    fn somebody_elses_public_key_is_refused() {
        // The victim's key spliced into a request that another key signed.
        let (mine, victim) = (request(), request());
        let at = mine
            .der
            .windows(mine.public_key.len())
            .position(|window| window == mine.public_key)
            .unwrap();
        let mut spliced = mine.der.clone();
        spliced[at..at + victim.public_key.len()].copy_from_slice(&victim.public_key);
        assert!(matches!(
            believed_key(&spliced),
            Err(RequestError::BadSignature)
        ));
    }

    #[test]
    fn bytes_after_the_request_and_overlong_requests_are_refused() {
        let mut der = request().der;
        der.push(0);
        assert!(matches!(
            believed_key(&der),
            Err(RequestError::Malformed(_))
        ));
        assert!(matches!(
            believed_key(&vec![0x30; MAX_REQUEST + 1]),
            Err(RequestError::Unsuitable {
                field: "length",
                ..
            })
        ));
    }

    proptest! {
        #[test]
        fn a_request_with_any_byte_changed_never_yields_another_key(at in 0usize..200, with in 1u8..=255) {
            let request = request();
            let mut der = request.der.clone();
            let at = at % der.len();
            der[at] ^= with;
            if let Ok(key) = believed_key(&der) {
                prop_assert_eq!(key.der_bytes(), &request.public_key[..]);
            }
        }
    }
}

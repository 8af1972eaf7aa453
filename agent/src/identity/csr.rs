//! Certificate signing requests: how one is made on the node, and what a signer believes of it.
//!
//! [`Request::new`] is called by `manager`, [`believed_key`] by the signer that is told whom a
//! request is for (`ca`), [`claim`] by those who only have the request (`control`). They stand side
//! by side because they are a contract: a certificate takes from a request the public key, and
//! where nothing else names it the one identity; whoever asks for more than that is refused.

use rcgen::{CertificateParams, DistinguishedName, KeyPair, SanType, SubjectPublicKeyInfo};
use rustls::{
    crypto::aws_lc_rs::sign::any_ecdsa_type,
    pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
    sign::SigningKey,
};
use std::sync::Arc;
use x509_parser::{
    certification_request::X509CertificationRequest,
    cri_attributes::ParsedCriAttribute,
    extensions::{GeneralName, ParsedExtension},
    prelude::FromDer,
};

use super::spiffe::{NotAWorkload, parse_spiffe_id};
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
    #[error("the request asks for {0}; only one subject alternative name, a URI, may be asked for")]
    Names(String),
    #[error("the request asks to be a certificate authority; leave basicConstraints out")]
    Authority,
    #[error(transparent)]
    Identity(#[from] NotAWorkload),
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

/// What a request asks for, when nothing else tells for whom it is.
#[derive(Debug)]
pub struct Claim {
    pub identity: Identity,
    pub key: SubjectPublicKeyInfo,
}

/// Reads a request that must ask for exactly what a workload gets: one URI as its only name, no
/// subject, no authority over others, and a key that passes [`believed_key`].
pub fn claim(der: &[u8]) -> Result<Claim, RequestError> {
    let key = believed_key(der)?;
    let (_, request) = X509CertificationRequest::from_der(der)
        .map_err(|error| RequestError::Malformed(error.to_string()))?;
    let info = &request.certification_request_info;
    if info.subject.iter().next().is_some() {
        let subject: String = info.subject.to_string().chars().take(128).collect();
        return Err(RequestError::Unsuitable {
            field: "subject",
            value: format!("{subject:?}"),
            must: "empty",
        });
    }

    let mut names = Vec::new();
    for attribute in info.iter_attributes() {
        let ParsedCriAttribute::ExtensionRequest(requested) = attribute.parsed_attribute() else {
            return Err(RequestError::Unsuitable {
                field: "attribute",
                value: attribute.oid.to_id_string(),
                must: "left out",
            });
        };
        for extension in &requested.extensions {
            let parsed = extension.parsed_extension();
            // The signer decides these; to say what a workload's certificate has is harmless.
            let harmless = matches!(
                parsed,
                ParsedExtension::BasicConstraints(_)
                    | ParsedExtension::SubjectKeyIdentifier(_)
                    | ParsedExtension::KeyUsage(_)
                    | ParsedExtension::ExtendedKeyUsage(_)
            );
            if let ParsedExtension::SubjectAlternativeName(list) = parsed {
                names.extend(list.general_names.iter().cloned());
            } else if matches!(parsed, ParsedExtension::BasicConstraints(of) if of.ca) {
                return Err(RequestError::Authority);
            } else if !harmless {
                return Err(RequestError::Unsuitable {
                    field: "extension",
                    value: extension.oid.to_id_string(),
                    must: "left out",
                });
            }
        }
    }
    match &names[..] {
        [GeneralName::URI(uri)] => Ok(Claim {
            identity: parse_spiffe_id(uri)?,
            key,
        }),
        [other] => {
            let other: String = other.to_string().chars().take(128).collect();
            Err(RequestError::Names(format!("the name {other}")))
        }
        many => Err(RequestError::Names(format!("{} names", many.len()))),
    }
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

    fn asking(change: impl FnOnce(&mut CertificateParams)) -> Result<Claim, RequestError> {
        let pair = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![uri("spiffe://td/ns/a/sa/b")];
        change(&mut params);
        claim(params.serialize_request(&pair).unwrap().der())
    }

    fn uri(text: &str) -> SanType {
        SanType::URI(text.try_into().unwrap())
    }

    #[test]
    fn what_a_request_claims_is_what_it_was_made_for() {
        let request = request();
        let claim = claim(&request.der).unwrap();
        assert_eq!(claim.identity.to_string(), "spiffe://td/ns/a/sa/b");
        assert_eq!(claim.key.der_bytes(), request.public_key);
    }

    #[test]
    fn who_asks_for_more_than_one_identity_is_refused() {
        type Change = fn(&mut CertificateParams);
        let refused: [(&str, Change); 9] = [
            ("0 names", |p| p.subject_alt_names.clear()),
            ("2 names", |p| {
                p.subject_alt_names.push(uri("spiffe://td/ns/a/sa/c"));
            }),
            ("2 names", |p| {
                let dns = SanType::DnsName("a.b".try_into().unwrap());
                p.subject_alt_names.push(dns);
            }),
            ("the name DNSName", |p| {
                p.subject_alt_names = vec![SanType::DnsName("a.b".try_into().unwrap())];
            }),
            ("the name IPAddress", |p| {
                p.subject_alt_names = vec![SanType::IpAddress([127, 0, 0, 1].into())];
            }),
            ("is not spiffe://", |p| {
                p.subject_alt_names = vec![uri("https://td/ns/a/sa/b")];
            }),
            ("subject", |p| {
                p.distinguished_name
                    .push(rcgen::DnType::CommonName, "system:admin");
            }),
            ("certificate authority", |p| {
                p.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
            }),
            ("extension", |p| {
                p.custom_extensions
                    .push(rcgen::CustomExtension::from_oid_content(
                        &[1, 2, 3, 4],
                        vec![5, 0],
                    ));
            }),
        ];
        for (says, change) in refused {
            let error = asking(change).unwrap_err().to_string();
            assert!(error.contains(says), "{says}: {error}");
        }
        asking(|_| {}).unwrap();
    }

    #[test]
    fn names_in_two_extensions_count_together() {
        let error = asking(|params| {
            // A second subjectAltName, by hand: [6] "spiffe://td/ns/a/sa/c".
            let name = b"spiffe://td/ns/a/sa/c";
            let length = u8::try_from(name.len()).unwrap();
            let mut content = vec![0x30, length + 2, 0x86, length];
            content.extend_from_slice(name);
            let second = rcgen::CustomExtension::from_oid_content(&[2, 5, 29, 17], content);
            params.custom_extensions.push(second);
        });
        error.unwrap_err();
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

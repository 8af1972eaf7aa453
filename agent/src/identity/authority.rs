//! A certificate authority as it is in memory: read, checked and seen to work, signing, made anew.
//!
//! `ca` keeps one in a directory, `control` one in a Secret; both call the three files the same:
//! `tls.crt` (the issuer, and intermediates if any), `tls.key` (its key), `ca.crt` (every anchor to
//! be trusted). Nothing here reads or writes anything, and keys are overwritten when they go.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PublicKeyData, SanType, SerialNumber, SignatureAlgorithm,
    SigningKey,
};
use rustls::pki_types::{CertificateDer, pem::PemObject};
use x509_parser::{certificate::X509Certificate, prelude::FromDer};
use zeroize::{Zeroize, Zeroizing};

use crate::state::Identity;

use super::{
    Bundle, Signed,
    clock::Clock,
    csr::{Request, believed_key},
    tls::{Tls, tls_reason},
};

/// How long a workload's certificate lives from now on, unless the agent is told otherwise.
pub const LIFE: Duration = Duration::from_secs(24 * 3600);
/// How long before now it is valid already: boards have no clock battery.
pub const SKEW: Duration = Duration::from_secs(3600);
/// How long an anchor made here lives.
pub(super) const CA_LIFE: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// How long an issuer below an anchor lives.
const ISSUER_LIFE: Duration = Duration::from_secs(365 * 24 * 3600);

/// Which of the three files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// `tls.crt`
    Chain,
    /// `tls.key`
    Key,
    /// `ca.crt`
    Anchors,
}

impl Part {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Chain => "tls.crt",
            Self::Key => "tls.key",
            Self::Anchors => "ca.crt",
        }
    }
}

/// One of the files cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{} {reason}", part.as_str())]
pub struct Unusable {
    pub part: Part,
    pub reason: String,
}

/// An authority cannot be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot make an authority: {0}")]
pub struct MakeError(#[from] rcgen::Error);

/// The issuer and what peers need to find their way from it to an anchor. Never shown: no `Debug`
/// that tells more than when it ends.
pub struct Authority {
    issuer: Issuer<'static, CaKey>,
    pub not_before: SystemTime,
    pub not_after: SystemTime,
    /// The issuer's chain, without certificates that are anchors.
    intermediates: Vec<CertificateDer<'static>>,
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority")
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

/// Overwritten when it is dropped.
struct CaKey(KeyPair);

impl Drop for CaKey {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl PublicKeyData for CaKey {
    fn der_bytes(&self) -> &[u8] {
        self.0.der_bytes()
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        PublicKeyData::algorithm(&self.0)
    }
}

impl SigningKey for CaKey {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        self.0.sign(message)
    }
}

impl Authority {
    /// Everything read, checked and seen to work: a certificate made the way agents get them is
    /// verified the way agents verify.
    pub fn read(
        chain: &[u8],
        key: &[u8],
        anchors: &[u8],
        trust_domain: &Arc<str>,
        clock: &Arc<dyn Clock>,
    ) -> Result<(Self, Bundle), Unusable> {
        let key = read_key(key)?;
        let chain = certificates(Part::Chain, chain)?;
        let anchors = certificates(Part::Anchors, anchors)?;
        let bundle = Bundle { anchors };
        let unusable = |reason| Unusable {
            part: Part::Chain,
            reason,
        };
        let (_, issuer) = X509Certificate::from_der(&chain[0])
            .map_err(|error| unusable(format!("does not parse: {error}")))?;
        if issuer.public_key().subject_public_key.data.as_ref() != key.0.public_key_raw() {
            return Err(unusable(
                "is not the certificate of tls.key: replace both together".to_owned(),
            ));
        }
        let validity = issuer.validity();
        let (not_before, not_after) = (
            at(validity.not_before.timestamp()),
            at(validity.not_after.timestamp()),
        );
        let issuer = Issuer::from_ca_cert_der(&chain[0], key)
            .map_err(|error| unusable(format!("cannot sign: {error}")))?;
        let intermediates = chain
            .into_iter()
            .filter(|certificate| !bundle.anchors.contains(certificate))
            .collect();
        let authority = Self {
            issuer,
            not_before,
            not_after,
            intermediates,
        };
        authority
            .prove(trust_domain, &bundle, clock)
            .map_err(unusable)?;
        Ok((authority, bundle))
    }

    /// One that has expired cannot prove anything; that is told when it shall sign.
    fn prove(
        &self,
        trust_domain: &Arc<str>,
        bundle: &Bundle,
        clock: &Arc<dyn Clock>,
    ) -> Result<(), String> {
        let now = clock.now();
        if now >= self.not_after {
            return Ok(());
        }
        let probe = Identity {
            trust_domain: trust_domain.clone(),
            namespace: "picomesh-system".into(),
            service_account: "probe".into(),
        };
        let request = Request::new(&probe).map_err(|error| error.to_string())?;
        let key = believed_key(&request.der).map_err(|error| error.to_string())?;
        let signed = self.sign(&probe, &key, now, LIFE)?;
        Tls::new(trust_domain.clone(), bundle, clock.clone())
            .check_own(&probe, &signed.chain)
            .map_err(|error| {
                format!(
                    "signs what is not accepted with the anchors in ca.crt ({}): add its root to \
                     ca.crt, and see that it may sign certificates",
                    tls_reason(&error)
                )
            })
    }

    /// A certificate of `identity` for `key`. It lives `life` from now, and never longer than the
    /// authority.
    pub fn sign(
        &self,
        identity: &Identity,
        key: &impl PublicKeyData,
        now: SystemTime,
        life: Duration,
    ) -> Result<Signed, String> {
        if now >= self.not_after {
            return Err(
                "the authority's own certificate (tls.crt) has expired: rotate it".to_owned(),
            );
        }
        let mut params = params(now - SKEW, (now + life).min(self.not_after));
        params.subject_alt_names = vec![SanType::URI(
            identity
                .to_string()
                .try_into()
                .map_err(|error: rcgen::Error| error.to_string())?,
        )];
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.use_authority_key_identifier_extension = true;
        let leaf = params
            .signed_by(key, &self.issuer)
            .map_err(|error| error.to_string())?;
        let mut chain = vec![leaf.der().clone()];
        chain.extend(self.intermediates.iter().cloned());
        Ok(Signed { chain })
    }
}

/// A certificate and its key, as PEM.
pub struct Made {
    pub certificate: String,
    pub key: Zeroizing<String>,
}

/// An anchor that signs issuers below it.
pub fn make_root(trust_domain: &str, now: SystemTime) -> Result<Made, MakeError> {
    let pair = CaKey(KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?);
    let params = ca_params(trust_domain, "root", 1, now, now + CA_LIFE);
    Ok(Made {
        certificate: params.self_signed(&pair.0)?.pem(),
        key: Zeroizing::new(pair.0.serialize_pem()),
    })
}

/// An issuer below `root`, which must live longer.
pub fn make_issuer(
    root: &str,
    root_key: &str,
    trust_domain: &str,
    now: SystemTime,
) -> Result<Made, MakeError> {
    let root = CertificateDer::from_pem_slice(root.as_bytes())
        .map_err(|_| rcgen::Error::CouldNotParseCertificate)?;
    let root = Issuer::from_ca_cert_der(&root, CaKey(KeyPair::from_pem(root_key)?))?;
    let pair = CaKey(KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?);
    let mut params = ca_params(trust_domain, "issuer", 0, now, now + ISSUER_LIFE);
    params.use_authority_key_identifier_extension = true;
    Ok(Made {
        certificate: params.signed_by(&pair, &root)?.pem(),
        key: Zeroizing::new(pair.0.serialize_pem()),
    })
}

/// May `root` sign an issuer that begins now and lives its whole life?
pub fn outlives_an_issuer(root: &CertificateDer<'_>, now: SystemTime) -> bool {
    ends(root).is_some_and(|end| now + ISSUER_LIFE <= end)
}

/// When a certificate ends; `None`: it does not parse.
pub fn ends(certificate: &CertificateDer<'_>) -> Option<SystemTime> {
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    Some(at(parsed.validity().not_after.timestamp()))
}

/// Anchor and issuer in one, as local mode has it.
pub(super) fn self_signed(
    pair: &KeyPair,
    trust_domain: &str,
    now: SystemTime,
) -> Result<String, rcgen::Error> {
    let params = ca_params(trust_domain, "", 0, now, now + CA_LIFE);
    Ok(params.self_signed(pair)?.pem())
}

/// `below`: how many authorities may stand between it and a workload.
fn ca_params(
    trust_domain: &str,
    role: &str,
    below: u8,
    now: SystemTime,
    not_after: SystemTime,
) -> CertificateParams {
    let mut params = params(now - SKEW, not_after);
    // The serial number is in the name, so that no two authorities ever share one.
    let serial: String = random_serial().to_string().replace(':', "");
    let serial: String = serial.chars().take(12).collect();
    let domain: String = trust_domain.chars().take(32).collect();
    let words = ["picomesh", role, &domain, &serial];
    let words: Vec<_> = words.into_iter().filter(|word| !word.is_empty()).collect();
    params
        .distinguished_name
        .push(DnType::CommonName, words.join(" "));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(below));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

/// No subject, a random serial number, whole seconds.
pub(super) fn params(not_before: SystemTime, not_after: SystemTime) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.not_before = whole_second(not_before).into();
    params.not_after = whole_second(not_after).into();
    params.serial_number = Some(random_serial());
    params
}

/// The X.509 encodings of time end at seconds; GeneralizedTime must not have a fraction.
fn whole_second(at: SystemTime) -> SystemTime {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    UNIX_EPOCH + Duration::from_secs(since.as_secs())
}

/// 126 random bits, positive and never zero.
fn random_serial() -> SerialNumber {
    let mut bytes = [0; 16];
    if aws_lc_rs::rand::fill(&mut bytes).is_err() {
        // Uniqueness is all a serial number owes; the signature does not rest on it.
        fastrand::fill(&mut bytes);
    }
    bytes[0] = bytes[0] & 0x7f | 0x40;
    SerialNumber::from_slice(&bytes)
}

fn read_key(pem: &[u8]) -> Result<CaKey, Unusable> {
    let unusable = |reason: &str| Unusable {
        part: Part::Key,
        reason: reason.to_owned(),
    };
    let pem = str::from_utf8(pem).map_err(|_| unusable("is not PEM"))?;
    // The library's reason is not repeated: it could carry a part of what it read.
    KeyPair::from_pem(pem)
        .map(CaKey)
        .map_err(|_| unusable("is not a private key in PEM form (PKCS#8, SEC1 or PKCS#1)"))
}

fn certificates(part: Part, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, Unusable> {
    let unusable = |reason| Unusable { part, reason };
    let list = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| unusable(format!("is not PEM: {error}")))?;
    if list.is_empty() {
        return Err(unusable("holds no certificate".to_owned()));
    }
    for (index, der) in list.iter().enumerate() {
        X509Certificate::from_der(der).map_err(|error| {
            unusable(format!("certificate {} does not parse: {error}", index + 1))
        })?;
    }
    Ok(list)
}

/// The certificates of `chain` that are their own issuers, as PEM: a chain that nobody gave
/// anchors for may carry its own.
pub fn self_signed_of(chain: &[u8]) -> Option<String> {
    let list = certificates(Part::Chain, chain).ok()?;
    let own: Vec<_> = list.iter().filter(|der| is_self_signed(der)).collect();
    (!own.is_empty()).then(|| own.into_iter().map(|der| to_pem(der)).collect())
}

pub(super) fn is_self_signed(der: &CertificateDer<'_>) -> bool {
    X509Certificate::from_der(der).is_ok_and(|(_, certificate)| {
        certificate.subject() == certificate.issuer() && certificate.verify_signature(None).is_ok()
    })
}

/// One certificate as PEM, with the line ends that everybody reads.
pub fn to_pem(der: &CertificateDer<'_>) -> String {
    let block = pem::Pem::new("CERTIFICATE", der.as_ref());
    let unix = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
    pem::encode_config(&block, unix)
}

/// A name for a certificate: the start of its SHA-256.
pub fn fingerprint(der: &[u8]) -> String {
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, der);
    let bytes = &digest.as_ref()[..16];
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(super) fn at(timestamp: i64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(u64::try_from(timestamp).unwrap_or(0))
}

//! rustls configurations and verifiers: TLS 1.3, SPIFFE IDs instead of host names.
//!
//! `manager` builds its configurations from a [`Tls`]; `proxy` runs handshakes with them and turns
//! a failure into a word with [`handshake_reason`]. This file must not know where certificates
//! come from.
//!
//! **What is verified, in this order:** the chain to any anchor of the bundle, validity and
//! purpose (webpki's work), then exactly one URI name that is a workload's SPIFFE ID, then *who*:
//! a client demands the one identity it called, a server any workload of its own trust domain
//! (policy decides later what that workload may). DNS names in certificates and the SNI are never
//! compared: the SNI only picks which of our certificates is shown.
//!
//! **Anchors are read at each handshake**, not copied into configurations: a configuration that
//! somebody still holds cannot accept an anchor that has been removed, nor miss one that was
//! added. Connections that stand are not looked at again; `proxy` ends a tunnel's use when the peer's
//! certificate is over ([`Peer::until`]).
//!
//! **No resumption.** A resumed session skips both certificates, so it would outlive an identity,
//! an expiry and a bundle. Tunnels are few and live long, so the cost is small: one ECDSA
//! signature and two verifications per side and tunnel, and never per connection of an application.
//!
//! **Ciphers.** AES-GCM first where the CPU has AES instructions, ChaCha20 first where not. A
//! server without them insists on its order, a server with them follows the client's: so the
//! weaker end of each pair decides.

mod reason;

use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use arc_swap::ArcSwap;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, OtherError,
    RootCertStore, ServerConfig, SignatureScheme,
    client::{
        ResolvesClientCert, Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor,
    },
    crypto::{self, CryptoProvider, aws_lc_rs::cipher_suite as suite, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::{
        NoServerSessionStorage, ParsedCertificate, ResolvesServerCert, WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    sign::CertifiedKey,
};
use x509_parser::{certificate::X509Certificate, extensions::GeneralName, prelude::FromDer};

use crate::state::Identity;

use super::{
    Bundle,
    clock::{Clock, RustlsClock, unix_time},
    spiffe::{NotAWorkload, parse_spiffe_id},
};

pub use reason::{handshake_reason, handshake_sentence, tls_reason};

/// The one protocol spoken inside.
const ALPN: &[u8] = b"h2";

/// Why a certificate that may well be genuine is not the one we want.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum PeerError {
    #[error("the peer showed no certificate")]
    NoCertificate,
    #[error("the peer's certificate does not parse: {0}")]
    Malformed(String),
    #[error("the peer's certificate has {0} URI names, must have exactly one")]
    NotOneUri(usize),
    #[error(transparent)]
    NotAWorkload(#[from] NotAWorkload),
    #[error("the peer is {presented}, {expected} was called")]
    WrongIdentity {
        expected: Identity,
        presented: Identity,
    },
    #[error("the peer {presented} is not of our trust domain {expected}")]
    WrongTrustDomain {
        expected: Arc<str>,
        presented: Identity,
    },
}

/// What a room needs to make TLS configurations: anchors, ciphers, clock, trust domain.
#[derive(Clone)]
pub(super) struct Tls {
    provider: Arc<CryptoProvider>,
    trust: Arc<Trust>,
    time: Arc<RustlsClock>,
    /// Whether this CPU computes AES-GCM faster than ChaCha20.
    aes: bool,
}

/// Where the server finds the certificate to show; the choice is made anew at each handshake.
pub(super) trait Certificates: fmt::Debug + Send + Sync {
    /// `None` refuses the handshake.
    fn pick(&self, server_name: Option<&str>) -> Option<Arc<CertifiedKey>>;
}

/// Whom an already verified certificate names, and until when it counts.
#[derive(Clone, Debug)]
pub struct Peer {
    /// The one SPIFFE ID.
    pub identity: Identity,
    pub until: SystemTime,
}

/// The identity alone; see [`peer`].
pub fn peer_identity(leaf: &CertificateDer<'_>) -> Result<Identity, PeerError> {
    peer(leaf).map(|peer| peer.identity)
}

/// Reads an already verified peer certificate.
pub fn peer(leaf: &CertificateDer<'_>) -> Result<Peer, PeerError> {
    let malformed = |what: String| PeerError::Malformed(what);
    let (rest, certificate) =
        X509Certificate::from_der(leaf).map_err(|error| malformed(error.to_string()))?;
    if !rest.is_empty() {
        return Err(malformed(format!("{} bytes follow it", rest.len())));
    }
    let names = certificate
        .subject_alternative_name()
        .map_err(|error| malformed(error.to_string()))?;
    let mut uris = names
        .iter()
        .flat_map(|extension| &extension.value.general_names)
        .filter_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            GeneralName::OtherName(..)
            | GeneralName::RFC822Name(_)
            | GeneralName::DNSName(_)
            | GeneralName::X400Address(_)
            | GeneralName::DirectoryName(_)
            | GeneralName::EDIPartyName(_)
            | GeneralName::IPAddress(_)
            | GeneralName::RegisteredID(_)
            | GeneralName::Invalid(..) => None,
        });
    match (uris.next(), uris.count()) {
        (Some(uri), 0) => {
            let end = certificate.validity().not_after.timestamp();
            Ok(Peer {
                identity: parse_spiffe_id(uri)?,
                until: UNIX_EPOCH + Duration::from_secs(u64::try_from(end).unwrap_or_default()),
            })
        }
        (Some(_), more) => Err(PeerError::NotOneUri(more + 1)),
        (None, _) => Err(PeerError::NotOneUri(0)),
    }
}

impl Tls {
    pub(super) fn new(trust_domain: Arc<str>, bundle: &Bundle, clock: Arc<dyn Clock>) -> Self {
        Self::with_ciphers(cpu_has_aes(), trust_domain, bundle, clock)
    }

    fn with_ciphers(
        aes: bool,
        trust_domain: Arc<str>,
        bundle: &Bundle,
        clock: Arc<dyn Clock>,
    ) -> Self {
        let provider = Arc::new(provider(aes));
        Self {
            trust: Arc::new(Trust {
                trust_domain,
                anchors: ArcSwap::from_pointee(roots(bundle)),
                provider: provider.clone(),
            }),
            provider,
            time: Arc::new(RustlsClock(clock)),
            aes,
        }
    }

    /// From now on handshakes go by `bundle`; standing connections are not touched.
    pub(super) fn set_bundle(&self, bundle: &Bundle) {
        self.trust.anchors.store(Arc::new(roots(bundle)));
    }

    /// Would a peer that trusts what we trust accept this chain as `identity`, in both roles?
    pub(super) fn check_own(
        &self,
        identity: &Identity,
        chain: &[CertificateDer<'static>],
    ) -> Result<(), Error> {
        let (leaf, intermediates) = chain.split_first().ok_or(Error::NoCertificatesPresented)?;
        let now = unix_time(self.time.0.now());
        self.trust.verify_client_chain(leaf, intermediates, now)?;
        self.trust.verify_server_chain(leaf, intermediates, now)?;
        expect(identity, leaf)
    }

    /// For a call as the holder of `own` to exactly `server`.
    pub(super) fn client(
        &self,
        server: Identity,
        own: Arc<CertifiedKey>,
    ) -> Result<ClientConfig, Error> {
        let mut config =
            ClientConfig::builder_with_details(self.provider.clone(), self.time.clone())
                .with_protocol_versions(&[&rustls::version::TLS13])?
                .dangerous()
                .with_custom_certificate_verifier(Arc::new(ServerVerifier {
                    trust: self.trust.clone(),
                    expected: server,
                }))
                .with_client_cert_resolver(Arc::new(Own(own)));
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.resumption = Resumption::disabled();
        Ok(config)
    }

    /// For accepting any workload of the trust domain.
    pub(super) fn server(
        &self,
        certificates: Arc<dyn Certificates>,
    ) -> Result<ServerConfig, Error> {
        let mut config =
            ServerConfig::builder_with_details(self.provider.clone(), self.time.clone())
                .with_protocol_versions(&[&rustls::version::TLS13])?
                .with_client_cert_verifier(Arc::new(ClientVerifier {
                    trust: self.trust.clone(),
                }))
                .with_cert_resolver(Arc::new(Picked(certificates)));
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.ignore_client_order = !self.aes;
        Ok(config)
    }
}

/// The anchors in force and what it takes to judge a certificate by them.
struct Trust {
    trust_domain: Arc<str>,
    anchors: ArcSwap<RootCertStore>,
    provider: Arc<CryptoProvider>,
}

impl Trust {
    fn verify_server_chain(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), Error> {
        verify_server_cert_signed_by_trust_anchor(
            &ParsedCertificate::try_from(leaf)?,
            &self.anchors.load(),
            intermediates,
            now,
            self.provider.signature_verification_algorithms.all,
        )
        .map_err(foreign)
    }

    fn verify_client_chain(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), Error> {
        let anchors = self.anchors.load_full();
        // With no anchors there is nothing to build from, and nobody to believe.
        WebPkiClientVerifier::builder_with_provider(anchors, self.provider.clone())
            .build()
            .map_err(|_no_anchors| Error::from(CertificateError::UnknownIssuer))?
            .verify_client_cert(leaf, intermediates, now)
            .map_err(foreign)
            .map(drop)
    }

    fn verify_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}

impl fmt::Debug for Trust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Trust")
            .field("trust_domain", &self.trust_domain)
            .field("anchors", &self.anchors.load().len())
            .finish()
    }
}

/// A CA that took the name of ours fails at the signature; it is no less foreign.
fn foreign(error: Error) -> Error {
    if error == Error::InvalidCertificate(CertificateError::BadSignature) {
        CertificateError::UnknownIssuer.into()
    } else {
        error
    }
}

fn expect(expected: &Identity, leaf: &CertificateDer<'_>) -> Result<(), Error> {
    let presented = peer_identity(leaf).map_err(refuse)?;
    if presented == *expected {
        Ok(())
    } else {
        Err(refuse(PeerError::WrongIdentity {
            expected: expected.clone(),
            presented,
        }))
    }
}

fn refuse(why: PeerError) -> Error {
    CertificateError::Other(OtherError(Arc::new(why))).into()
}

/// The client's view of a server: exactly the identity that was called.
#[derive(Debug)]
struct ServerVerifier {
    trust: Arc<Trust>,
    expected: Identity,
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.trust.verify_server_chain(leaf, intermediates, now)?;
        expect(&self.expected, leaf)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(rustls::PeerIncompatible::Tls12NotOffered.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.trust.verify_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.trust.schemes()
    }
}

/// The server's view of a client: any workload of our trust domain.
#[derive(Debug)]
struct ClientVerifier {
    trust: Arc<Trust>,
}

impl ClientCertVerifier for ClientVerifier {
    /// None: peers have one certificate to show, and the names of our anchors are nobody's affair.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.trust.verify_client_chain(leaf, intermediates, now)?;
        let presented = peer_identity(leaf).map_err(refuse)?;
        if presented.trust_domain != self.trust.trust_domain {
            return Err(refuse(PeerError::WrongTrustDomain {
                expected: self.trust.trust_domain.clone(),
                presented,
            }));
        }
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(rustls::PeerIncompatible::Tls12NotOffered.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.trust.verify_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.trust.schemes()
    }
}

/// The client's certificate, shown whatever the server hints at.
#[derive(Debug)]
struct Own(Arc<CertifiedKey>);

impl ResolvesClientCert for Own {
    fn resolve(&self, _hints: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.0.clone())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// The server's certificate, picked at each handshake.
#[derive(Debug)]
struct Picked(Arc<dyn Certificates>);

impl ResolvesServerCert for Picked {
    fn resolve(&self, hello: rustls::server::ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.0.pick(hello.server_name())
    }
}

/// Anchors that do not parse are left out: one bad entry must not take the others down.
fn roots(bundle: &Bundle) -> RootCertStore {
    let mut store = RootCertStore::empty();
    let (_good, bad) = store.add_parsable_certificates(bundle.anchors.iter().cloned());
    if bad > 0 {
        tracing::warn!(bad, "trust anchors that do not parse are ignored");
    }
    store
}

fn provider(aes: bool) -> CryptoProvider {
    let (gcm128, gcm256, chacha) = (
        suite::TLS13_AES_128_GCM_SHA256,
        suite::TLS13_AES_256_GCM_SHA384,
        suite::TLS13_CHACHA20_POLY1305_SHA256,
    );
    CryptoProvider {
        cipher_suites: if aes {
            vec![gcm128, gcm256, chacha]
        } else {
            vec![chacha, gcm128, gcm256]
        },
        ..crypto::aws_lc_rs::default_provider()
    }
}

fn cpu_has_aes() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("aes")
        && std::arch::is_x86_feature_detected!("pclmulqdq");
    #[cfg(target_arch = "aarch64")]
    return std::arch::is_aarch64_feature_detected!("aes")
        && std::arch::is_aarch64_feature_detected!("pmull");
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    return false;
}

#[cfg(test)]
mod tests;

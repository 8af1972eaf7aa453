//! What this room's tests share: an authority in memory, a signer that misbehaves on command, and
//! real handshakes over a stream in memory.

use std::{
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::SystemTime,
};

use parking_lot::Mutex;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PublicKeyData, SanType,
};
use rustls::{
    ClientConfig, ServerConfig,
    crypto::aws_lc_rs::sign::any_ecdsa_type,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName},
    sign::CertifiedKey,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream},
    sync::watch,
};
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

use crate::state::Identity;

use super::{
    Bundle, SignError, Signed, Signer,
    ca::{LIFE, SKEW},
    clock::{Clock, TestClock},
    csr::believed_key,
    handshake_reason, parse_spiffe_id, peer_identity,
};

pub(super) const TRUST_DOMAIN: &str = "cluster.local";

/// `spiffe://cluster.local/ns/default/sa/<name>`
pub(super) fn identity(name: &str) -> Identity {
    parse_spiffe_id(&format!("spiffe://{TRUST_DOMAIN}/ns/default/sa/{name}")).unwrap()
}

pub(super) fn bundle(authorities: &[&TestCa]) -> Bundle {
    Bundle {
        anchors: authorities.iter().map(|ca| ca.cert.clone()).collect(),
    }
}

pub(super) struct TestCa {
    issuer: Issuer<'static, KeyPair>,
    pub(super) cert: CertificateDer<'static>,
}

impl TestCa {
    pub(super) fn new(name: &str) -> Self {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let cert = params.self_signed(&key).unwrap().der().clone();
        Self {
            issuer: Issuer::from_ca_cert_der(&cert, key).unwrap(),
            cert,
        }
    }

    /// A certificate with these URI names, as good as any otherwise, unless `edit` spoils it.
    pub(super) fn leaf(
        &self,
        uris: &[&str],
        now: SystemTime,
        edit: impl FnOnce(&mut CertificateParams),
    ) -> Arc<CertifiedKey> {
        let pair = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
        let chain = vec![self.certificate(uris, &pair, now, edit)];
        let private = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(pair.serialize_der()));
        Arc::new(CertifiedKey::new(chain, any_ecdsa_type(&private).unwrap()))
    }

    fn certificate(
        &self,
        uris: &[&str],
        key: &impl PublicKeyData,
        now: SystemTime,
        edit: impl FnOnce(&mut CertificateParams),
    ) -> CertificateDer<'static> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = uris
            .iter()
            .map(|uri| SanType::URI((*uri).try_into().unwrap()))
            .collect();
        params.not_before = (now - SKEW).into();
        params.not_after = (now + LIFE).into();
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        edit(&mut params);
        params.signed_by(key, &self.issuer).unwrap().der().clone()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mood {
    Sign,
    Fail,
    Refuse,
    Hang,
    Panic,
    /// A good certificate, for a key that is not the request's.
    AnotherKey,
    /// A good certificate, for somebody else.
    AnotherIdentity,
    /// A certificate of an authority that nobody trusts.
    AnotherCa,
    /// A certificate that is over already.
    Stale,
}

/// Signs, or fails to, as told; remembers who asked when.
pub(super) struct TestSigner {
    pub(super) ca: Mutex<Arc<TestCa>>,
    pub(super) mood: Mutex<Mood>,
    pub(super) bundle: watch::Sender<Arc<Bundle>>,
    pub(super) asked: Mutex<Vec<(Identity, tokio::time::Instant)>>,
    /// Of each call, in the same order.
    pub(super) requests: Mutex<Vec<Vec<u8>>>,
    pub(super) most_at_once: AtomicUsize,
    at_once: AtomicUsize,
    clock: Arc<TestClock>,
}

impl TestSigner {
    pub(super) fn new(clock: Arc<TestClock>) -> Arc<Self> {
        let ca = Arc::new(TestCa::new("one"));
        Arc::new(Self {
            bundle: watch::Sender::new(Arc::new(bundle(&[&ca]))),
            ca: Mutex::new(ca),
            mood: Mutex::new(Mood::Sign),
            asked: Mutex::default(),
            requests: Mutex::default(),
            most_at_once: AtomicUsize::new(0),
            at_once: AtomicUsize::new(0),
            clock,
        })
    }

    pub(super) fn set(&self, mood: Mood) {
        *self.mood.lock() = mood;
    }

    async fn answer(&self, identity: &Identity, csr: &[u8]) -> Result<Signed, SignError> {
        let (now, mood) = (self.clock.now(), *self.mood.lock());
        let key = believed_key(csr).unwrap();
        let ca = self.ca.lock().clone();
        let uri = identity.to_string();
        let chain = match mood {
            Mood::Sign => vec![ca.certificate(&[&uri], &key, now, |_| {})],
            Mood::Fail => return Err(SignError::Unavailable("out to lunch".to_owned())),
            Mood::Refuse => {
                return Err(SignError::Refused {
                    identity: identity.clone(),
                    reason: "no such pod".to_owned(),
                });
            }
            Mood::Hang => std::future::pending().await,
            Mood::Panic => panic!("the signer has a bug"),
            Mood::AnotherKey => ca.leaf(&[&uri], now, |_| {}).cert.clone(),
            Mood::AnotherIdentity => {
                let other = identity.to_string() + "-other";
                vec![ca.certificate(&[&other], &key, now, |_| {})]
            }
            Mood::AnotherCa => {
                vec![TestCa::new("other").certificate(&[&uri], &key, now, |_| {})]
            }
            Mood::Stale => vec![ca.certificate(&[&uri], &key, now, |params| {
                params.not_after = (now - SKEW / 2).into();
            })],
        };
        Ok(Signed { chain })
    }
}

impl Signer for TestSigner {
    fn sign<'a>(
        &'a self,
        identity: &'a Identity,
        csr: Vec<u8>,
    ) -> Pin<Box<dyn Future<Output = Result<Signed, SignError>> + Send + 'a>> {
        Box::pin(async move {
            let at = (identity.clone(), tokio::time::Instant::now());
            self.asked.lock().push(at);
            self.requests.lock().push(csr.clone());
            let open = self.at_once.fetch_add(1, Ordering::SeqCst) + 1;
            self.most_at_once.fetch_max(open, Ordering::SeqCst);
            tokio::task::yield_now().await;
            let answer = self.answer(identity, &csr).await;
            self.at_once.fetch_sub(1, Ordering::SeqCst);
            answer
        })
    }

    fn bundle(&self) -> watch::Receiver<Arc<Bundle>> {
        self.bundle.subscribe()
    }
}

pub(super) type ClientStream = client::TlsStream<DuplexStream>;
pub(super) type ServerStream = server::TlsStream<DuplexStream>;

/// A handshake and one byte from server to client (in TLS 1.3 a client learns only then whether
/// the server liked its certificate). A side that failed is told by its word.
pub(super) async fn shake(
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
    name: ServerName<'static>,
) -> (
    Result<ClientStream, &'static str>,
    Result<ServerStream, &'static str>,
) {
    let (near, far) = tokio::io::duplex(16 * 1024);
    let call = async {
        let mut stream = TlsConnector::from(client).connect(name, near).await?;
        stream.read_u8().await?;
        Ok(stream)
    };
    let answer = async {
        let mut stream = TlsAcceptor::from(server).accept(far).await?;
        stream.write_u8(b'.').await?;
        stream.flush().await?;
        Ok(stream)
    };
    let (called, answered) = tokio::join!(call, answer);
    let word = |error: std::io::Error| handshake_reason(&error);
    (called.map_err(word), answered.map_err(word))
}

/// Both ends still understand each other.
pub(super) async fn ping(client: &mut ClientStream, server: &mut ServerStream) {
    client.write_all(b"ping").await.unwrap();
    client.flush().await.unwrap();
    let mut got = [0; 4];
    server.read_exact(&mut got).await.unwrap();
    assert_eq!(&got, b"ping");
}

/// Whom a side saw at the other end.
pub(super) fn seen(connection: &rustls::CommonState) -> Identity {
    peer_identity(&connection.peer_certificates().unwrap()[0]).unwrap()
}

//! Somebody who speaks HBONE by hand, with whatever certificate: as a client, and as a node.

use std::{
    fs,
    future::Future,
    io,
    net::SocketAddr,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc,
    },
    thread::JoinHandle,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context, Result, anyhow};
use bytes::Bytes;
use http::{Method, Request, Response};
use picomesh_tests::Netns;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, SanType,
};
use rustls::{
    ClientConfig, DigitallySignedStruct, ServerConfig, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, aws_lc_rs},
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime},
};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};

const HOUR: Duration = Duration::from_secs(3600);
const PATIENCE: Duration = Duration::from_secs(10);

/// Who signs.
pub(super) struct Authority {
    issuer: Issuer<'static, KeyPair>,
}

/// When a certificate counts.
#[derive(Clone, Copy, Debug)]
pub(super) enum Life {
    Now,
    Over,
    NotYet,
}

/// A certificate and its key.
#[derive(Debug)]
pub(super) struct Credentials {
    certificate: CertificateDer<'static>,
    key: Vec<u8>,
}

impl Authority {
    /// The world's own: what a stolen signing key could do.
    pub(super) fn of_world(ca_dir: &Path) -> Result<Self> {
        let read = |name: &str| {
            let file = ca_dir.join(name);
            fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))
        };
        let key = KeyPair::from_pem(&read("tls.key")?)?;
        let issuer = Issuer::from_ca_cert_pem(&read("tls.crt")?, key)?;
        Ok(Self { issuer })
    }

    /// One that nobody trusts; it calls itself as the world's does if `name` is that.
    pub(super) fn foreign(name: DistinguishedName) -> Result<Self> {
        let mut params = CertificateParams::default();
        params.distinguished_name = name;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        Ok(Self {
            issuer: Issuer::new(params, KeyPair::generate()?),
        })
    }

    pub(super) fn certify(&self, names: Vec<SanType>, life: Life) -> Result<Credentials> {
        let now = SystemTime::now();
        let (from, to) = match life {
            Life::Now => (now - HOUR, now + HOUR),
            Life::Over => (now - 3 * HOUR, now - HOUR),
            Life::NotYet => (now + HOUR, now + 3 * HOUR),
        };
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = names;
        params.not_before = from.into();
        params.not_after = to.into();
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        Ok(Credentials {
            certificate: certificate.der().clone(),
            key: key.serialize_der(),
        })
    }

    /// A certificate as good as any, for these identities.
    pub(super) fn identify(&self, uris: &[&str]) -> Result<Credentials> {
        let names = uris
            .iter()
            .map(|uri| Ok(SanType::URI((*uri).try_into()?)))
            .collect::<Result<_>>()?;
        self.certify(names, Life::Now)
    }
}

impl Credentials {
    fn chain(&self) -> Vec<CertificateDer<'static>> {
        vec![self.certificate.clone()]
    }

    fn key(&self) -> PrivateKeyDer<'static> {
        PrivatePkcs8KeyDer::from(self.key.clone()).into()
    }
}

/// One request through a tunnel of its own.
#[derive(Clone, Debug)]
pub(super) struct Call<'a> {
    pub(super) to: SocketAddr,
    pub(super) server_name: Option<String>,
    pub(super) credentials: Option<&'a Credentials>,
    pub(super) method: Method,
    /// What is asked for: `:authority` of a CONNECT.
    pub(super) target: String,
    /// Values of the header `forwarded`.
    pub(super) forwarded: Vec<String>,
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// No request could be answered; the words of TLS, HTTP/2 or TCP.
    NoTunnel(String),
    /// The request was refused.
    Refused { status: u16, reason: String },
    /// The application is there and said this.
    Open { said: String },
}

impl Call<'_> {
    pub(super) fn place(&self, from: &Netns) -> Result<Answer> {
        from.run(|| {
            on_one_thread(async {
                match tokio::time::timeout(PATIENCE, self.talk()).await {
                    Ok(answer) => answer,
                    Err(_) => Err(anyhow!("no answer from {} within {PATIENCE:?}", self.to)),
                }
            })?
        })
    }

    async fn talk(&self) -> Result<Answer> {
        let no_tunnel = |error: &dyn std::fmt::Display| Ok(Answer::NoTunnel(error.to_string()));
        let tcp = TcpStream::connect(self.to)
            .await
            .with_context(|| format!("connect to {}", self.to))?;
        let name = self.server_name.as_deref().unwrap_or("nobody.invalid");
        let connector = TlsConnector::from(Arc::new(self.config()?));
        let tls = match connector
            .connect(ServerName::try_from(name.to_owned())?, tcp)
            .await
        {
            Ok(tls) => tls,
            Err(error) => return no_tunnel(&error),
        };
        let (send, connection) = match h2::client::handshake(tls).await {
            Ok(both) => both,
            Err(error) => return no_tunnel(&error),
        };
        let driver = tokio::spawn(connection);
        let answer = async {
            let mut request = Request::builder()
                .method(self.method.clone())
                .uri(self.target.as_str());
            for value in &self.forwarded {
                request = request.header("forwarded", value);
            }
            let request = request.body(())?;
            let mut send = match send.ready().await {
                Ok(send) => send,
                Err(error) => return no_tunnel(&error),
            };
            let (response, _body) = send.send_request(request, false)?;
            let response = match response.await {
                Ok(response) => response,
                Err(error) => return no_tunnel(&error),
            };
            if !response.status().is_success() {
                let reason = response.headers().get("picomesh-reason");
                return Ok(Answer::Refused {
                    status: response.status().as_u16(),
                    reason: reason
                        .map(|r| String::from_utf8_lossy(r.as_bytes()).into_owned())
                        .unwrap_or_default(),
                });
            }
            let said = match response.into_body().data().await {
                Some(Ok(bytes)) => String::from_utf8_lossy(&bytes).into_owned(),
                Some(Err(error)) => return no_tunnel(&error),
                None => String::new(),
            };
            Ok(Answer::Open { said })
        }
        .await;
        driver.abort();
        answer
    }

    fn config(&self) -> Result<ClientConfig> {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let builder = ClientConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Careless(provider)));
        let mut config = match self.credentials {
            Some(own) => builder.with_client_auth_cert(own.chain(), own.key())?,
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = vec![b"h2".to_vec()];
        config.enable_sni = self.server_name.is_some();
        Ok(config)
    }
}

/// Believes every server: an attacker does not mind who is attacked.
#[derive(Debug)]
struct Careless(Arc<CryptoProvider>);

impl ServerCertVerifier for Careless {
    fn verify_server_cert(
        &self,
        _certificate: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signed, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signed, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// A machine that answers on a node's tunnel port and is not its agent.
pub(super) struct Impostor {
    stop: Arc<AtomicBool>,
    callers: Arc<AtomicUsize>,
    requests: Arc<AtomicUsize>,
    thread: Option<JoinHandle<()>>,
}

/// The impostor before may hold its port for a moment: a child that was between fork and exec when
/// its listener was closed keeps that open until the exec.
async fn listen_in_time(at: SocketAddr) -> io::Result<TcpListener> {
    let started = Instant::now();
    loop {
        match TcpListener::bind(at).await {
            Err(e) if e.kind() == io::ErrorKind::AddrInUse && started.elapsed() < PATIENCE => {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            done => return done,
        }
    }
}

impl Impostor {
    /// Listens at `at` in `netns` and shows `credentials` to everybody.
    pub(super) fn start(netns: &Netns, at: SocketAddr, credentials: &Credentials) -> Result<Self> {
        let mut config =
            ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
                .with_safe_default_protocol_versions()?
                .with_no_client_auth()
                .with_single_cert(credentials.chain(), credentials.key())?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let (stop, callers, requests) =
            <(Arc<AtomicBool>, Arc<AtomicUsize>, Arc<AtomicUsize>)>::default();
        let (stopped, called, asked) = (stop.clone(), callers.clone(), requests.clone());
        let (ready, bound) = mpsc::sync_channel(1);
        let thread = netns.spawn("impostor", move || {
            let served = on_one_thread(async {
                let listener = match listen_in_time(at).await {
                    Ok(listener) => listener,
                    Err(error) => {
                        let _ = ready.send(Err(error));
                        return;
                    }
                };
                let _ = ready.send(Ok(()));
                while !stopped.load(Ordering::Relaxed) {
                    let accepted =
                        tokio::time::timeout(Duration::from_millis(50), listener.accept()).await;
                    if let Ok(Ok((tcp, _))) = accepted {
                        called.fetch_add(1, Ordering::Relaxed);
                        tokio::spawn(answer(acceptor.clone(), tcp, asked.clone()));
                    }
                }
            });
            if let Err(error) = served {
                eprintln!("the impostor: {error:#}");
            }
        })?;
        bound
            .recv()
            .context("the impostor's thread is gone")?
            .with_context(|| format!("listen at {at}"))?;
        Ok(Self {
            stop,
            callers,
            requests,
            thread: Some(thread),
        })
    }

    /// TCP connections so far.
    pub(super) fn callers(&self) -> usize {
        self.callers.load(Ordering::Relaxed)
    }

    /// Requests so far: callers that believed it.
    pub(super) fn requests(&self) -> usize {
        self.requests.load(Ordering::Relaxed)
    }
}

impl Drop for Impostor {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Takes every request and says yes.
async fn answer(acceptor: TlsAcceptor, tcp: TcpStream, requests: Arc<AtomicUsize>) {
    let Ok(tls) = acceptor.accept(tcp).await else {
        return;
    };
    let Ok(mut connection) = h2::server::handshake(tls).await else {
        return;
    };
    while let Some(Ok((_request, mut respond))) = connection.accept().await {
        requests.fetch_add(1, Ordering::Relaxed);
        if let Ok(mut body) = respond.send_response(Response::new(()), false) {
            let _ = body.send_data(Bytes::from_static(IMPOSTOR_SAYS), true);
        }
    }
}

/// What an application hears that was connected to an impostor.
pub(super) const IMPOSTOR_SAYS: &[u8] = b"trust me\n";

/// Network namespaces belong to threads, so no other thread may do the work.
fn on_one_thread<T>(work: impl Future<Output = T>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    Ok(runtime.block_on(work))
}

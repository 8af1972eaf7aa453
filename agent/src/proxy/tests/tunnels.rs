//! When tunnels take streams, and when they no longer do.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use bytes::Bytes;
use h2::client::SendRequest;
use http::{Method, Request};
use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, Issuer, KeyPair, SanType};
use rustls::{
    crypto::aws_lc_rs::sign::any_ecdsa_type,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject},
    sign::CertifiedKey,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream},
    sync::oneshot,
    time::{sleep, timeout},
};
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server::TlsStream};

use super::world::*;
use crate::{
    identity::server_name,
    proxy::{ProxySettings, reason::HEADER},
};

/// Where a callee's node is played by the test.
const PLAYED: u16 = 25008;

/// A connection of the caller that has carried a byte each way.
async fn pair(listener: &TcpListener) -> (TcpStream, TcpStream) {
    let mut client = dial(CALLER, at(SERVICE, 80)).await;
    client.write_all(b"?").await.unwrap();
    let (mut server, _) = listener.accept().await.unwrap();
    let mut byte = [0];
    server.read_exact(&mut byte).await.unwrap();
    server.write_all(b"!").await.unwrap();
    client.read_exact(&mut byte).await.unwrap();
    (client, server)
}

/// Tunnels that node one opened, by the number of their streams.
async fn tunnels(world: &World) -> Vec<usize> {
    // Threads show them once a second.
    sleep(Duration::from_millis(1_200)).await;
    let tunnels = world.one.proxy.tunnels();
    let mut streams: Vec<_> = tunnels
        .iter()
        .filter(|tunnel| tunnel.role == "client")
        .map(|tunnel| tunnel.streams)
        .collect();
    streams.sort_unstable();
    streams
}

/// A certificate of the world's authority that ends soon.
fn short_lived(world: &World, account: &str, life: Duration) -> Arc<CertifiedKey> {
    certificate(world, &[account], SystemTime::now() + life)
}

fn certificate(world: &World, accounts: &[&str], end: SystemTime) -> Arc<CertifiedKey> {
    let file = |name: &str| world.ca.path().join(name);
    let authority = CertificateDer::from_pem_file(file("tls.crt")).unwrap();
    let key = KeyPair::from_pem(&std::fs::read_to_string(file("tls.key")).unwrap()).unwrap();
    let issuer = Issuer::from_ca_cert_der(&authority, key).unwrap();

    let mut params = CertificateParams::default();
    params.subject_alt_names = accounts
        .iter()
        .map(|account| SanType::URI(identity(account).to_string().try_into().unwrap()))
        .collect();
    params.not_before = (end - Duration::from_secs(3_600)).into();
    params.not_after = end.into();
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
    let pair = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
    let leaf = params.signed_by(&pair, &issuer).unwrap().der().clone();
    let private = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(pair.serialize_der()));
    Arc::new(CertifiedKey::new(
        vec![leaf],
        any_ecdsa_type(&private).unwrap(),
    ))
}

fn connect() -> Request<()> {
    Request::builder()
        .method(Method::CONNECT)
        .uri(at(CALLEE, PORT).to_string())
        .header("forwarded", format!("for=\"{}\"", at(CALLER, 4567)))
        .body(())
        .unwrap()
}

/// A handshake of the caller with node two.
async fn shake_hands(world: &World, key: Arc<CertifiedKey>) -> client::TlsStream<TcpStream> {
    let server = identity("callee");
    let usual = world
        .one
        .identities
        .client_config(&identity("caller"), &server);
    let mut config = (*usual.unwrap()).clone();
    config.client_auth_cert_resolver = Arc::new(Shown(key));
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(at(NODE_1, 0)).unwrap();
    let tcp = socket.connect(at(NODE_2, 15008)).await.unwrap();
    let connector = TlsConnector::from(Arc::new(config));
    connector.connect(server_name(&server), tcp).await.unwrap()
}

/// A hand-made tunnel of the caller to node two.
async fn tunnel_with(world: &World, key: Arc<CertifiedKey>) -> SendRequest<Bytes> {
    let tls = shake_hands(world, key).await;
    let (sender, connection) = h2::client::handshake(tls).await.unwrap();
    tokio::spawn(connection);
    sender
}

#[test]
fn a_tunnel_takes_no_new_streams_when_the_clients_certificate_is_over() {
    world(|world| async move {
        world.capture_all().await;
        let listener = world.serve(at(CALLEE, PORT));
        let life = Duration::from_secs(3);
        let mut sender = tunnel_with(&world, short_lived(&world, "caller", life)).await;
        let (response, mut send) = sender.send_request(connect(), false).unwrap();
        assert_eq!(response.await.unwrap().status(), 200, "the control");
        let (mut server, _) = listener.accept().await.unwrap();

        sleep(life).await;
        // Before the goodbye has arrived, the server alone can refuse.
        match sender.clone().ready().await {
            Ok(mut sender) => {
                let refused = match sender.send_request(connect(), false) {
                    Ok((response, _send)) => response.await.map(|response| {
                        let reason = response.headers().get(HEADER).cloned();
                        assert_eq!(response.status(), 403);
                        assert_eq!(reason.unwrap(), "certificate_expired");
                    }),
                    Err(error) => Err(error),
                };
                if let Err(error) = refused {
                    assert!(error.is_go_away() || error.is_reset(), "{error}");
                }
            }
            Err(error) => assert!(error.is_go_away(), "{error}"),
        }
        let goodbye = async {
            while sender.clone().ready().await.is_ok() {
                sleep(Duration::from_millis(50)).await;
            }
        };
        timeout(Duration::from_secs(3), goodbye)
            .await
            .expect("a goodbye");

        // What was open goes on.
        send.send_data(Bytes::from_static(b"still"), false).unwrap();
        let mut said = [0; 5];
        server.read_exact(&mut said).await.unwrap();
        assert_eq!(&said, b"still");
    });
}

#[test]
fn a_refused_certificate_is_told_in_words() {
    world(|world| async move {
        let now = SystemTime::now();
        let past = now - Duration::from_secs(100);
        for (accounts, end, words) in [
            (
                &["caller", "callee"][..],
                now + Duration::from_secs(100),
                "certificate_invalid: the peer's certificate has 2 URI names",
            ),
            (
                &["caller"],
                past,
                "certificate_expired: the peer's certificate ended 10",
            ),
        ] {
            let mut tls = shake_hands(&world, certificate(&world, accounts, end)).await;
            // With TLS 1.3 the client learns of it after its own last word.
            assert!(tls.read_u8().await.is_err());
            world.two.logged(&["inbound", words]).await;
        }
    });
}

#[test]
fn an_agent_leaves_a_tunnel_when_the_servers_certificate_is_over() {
    let settings = |settings: &mut ProxySettings| {
        play_node_two(settings);
        settings.threads = 1;
    };
    world_with(settings, |world| async move {
        world.capture_all().await;
        let node = listen_as_node_two().await;
        let life = Duration::from_secs(3);
        let key = short_lived(&world, "callee", life);
        let usual = world.two.identities.server_config_for(&identity("callee"));
        let mut config = (*usual.unwrap()).clone();
        config.cert_resolver = Arc::new(Shown(key));
        let acceptor = TlsAcceptor::from(Arc::new(config));

        let _first = dial(CALLER, at(SERVICE, 80)).await;
        let first = acceptor
            .accept(node.accept().await.unwrap().0)
            .await
            .unwrap();
        let _first = tokio::spawn(serve_tunnel(first));
        let again = timeout(Duration::from_secs(1), node.accept());
        let _second = dial(CALLER, at(SERVICE, 80)).await;
        assert!(again.await.is_err(), "control: one tunnel carries both");

        sleep(life).await;
        let _third = dial(CALLER, at(SERVICE, 80)).await;
        timeout(Duration::from_secs(3), node.accept())
            .await
            .expect("a new tunnel")
            .unwrap();
    });
}

#[test]
fn bulk_brings_another_tunnel_for_those_who_come_next() {
    let settings = |settings: &mut ProxySettings| {
        settings.threads = 1;
        settings.bulk = 64 * 1024;
    };
    world_with(settings, |world| async move {
        world.capture_all().await;
        let listener = world.serve(at(CALLEE, PORT));
        let (mut bulk, mut sink) = pair(&listener).await;
        let quiet = pair(&listener).await;
        assert_eq!(tunnels(&world).await, [2], "control: one is enough");

        let pump = tokio::spawn(async move {
            let block = [0; 16 * 1024];
            loop {
                bulk.write_all(&block).await.unwrap();
                sleep(Duration::from_millis(20)).await;
            }
        });
        let drain = tokio::spawn(async move {
            let mut block = [0; 64 * 1024];
            while sink.read(&mut block).await.unwrap() > 0 {}
        });
        sleep(Duration::from_secs(2)).await;
        // This one has the second opened, and need not wait for it.
        let asks = pair(&listener).await;
        assert_eq!(tunnels(&world).await, [0, 3]);
        let moves = pair(&listener).await;
        assert_eq!(tunnels(&world).await, [1, 3]);
        drop((quiet, asks, moves));
        pump.abort();
        drain.abort();
    });
}

#[test]
fn bulk_harms_nobody_when_no_other_tunnel_can_be_had() {
    let settings = |settings: &mut ProxySettings| {
        play_node_two(settings);
        settings.threads = 1;
        settings.bulk = 1;
    };
    world_with(settings, |world| async move {
        world.capture_all().await;
        let node = listen_as_node_two().await;
        let mut first = dial(CALLER, at(SERVICE, 80)).await;
        let tunnel = accept_tunnel(&world, &node).await;
        let served = tokio::spawn(serve_tunnel(tunnel));
        // From here on nobody gets another.
        drop(node);
        for _ in 0..30 {
            first.write_all(&[0; 1024]).await.unwrap();
            sleep(Duration::from_millis(50)).await;
        }
        for _ in 0..5 {
            let mut next = dial(CALLER, at(SERVICE, 80)).await;
            let mut byte = [0];
            next.read_exact(&mut byte)
                .await
                .expect("served by the first");
        }
        let failed = ["picomesh_handshakes_total", "client", "tunnel_failed"];
        let text = world.one.metrics.encode().unwrap();
        let tried = |line: &&str| failed.iter().all(|word| line.contains(word));
        assert!(
            text.lines().any(|line| tried(&line)),
            "no bulk was seen: {text}"
        );
        served.abort();
    });
}

#[test]
fn a_node_whose_agent_is_away_is_waited_for() {
    world_with(play_node_two, |world| async move {
        world.capture_all().await;
        let mut client = dial(CALLER, at(SERVICE, 80)).await;
        let mut byte = [0];
        let early = timeout(Duration::from_secs(1), client.read(&mut byte)).await;
        assert!(early.is_err(), "while nobody listens it is told {early:?}");
        let node = listen_as_node_two().await;
        let tunnel = accept_tunnel(&world, &node).await;
        let served = tokio::spawn(serve_tunnel(tunnel));
        client.read_exact(&mut byte).await.expect("served at last");
        served.abort();
    });
}

#[test]
fn a_node_whose_agent_stays_away_is_not_waited_for_without_end() {
    let settings = |settings: &mut ProxySettings| {
        play_node_two(settings);
        settings.timing.away = Duration::from_millis(600);
    };
    world_with(settings, |world| async move {
        world.capture_all().await;
        let begun = Instant::now();
        let mut client = dial(CALLER, at(SERVICE, 80)).await;
        let end = timeout(Duration::from_secs(3), client.read(&mut [0])).await;
        let error = end.expect("it has an end").unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        assert!(begun.elapsed() >= Duration::from_millis(600));
    });
}

#[test]
fn a_caller_whose_certificate_is_on_its_way_waits_for_it() {
    world(|mut world| async move {
        let listener = world.serve(at(CALLEE, PORT));
        world.rename_caller("newcomer").await;
        world.capture_all().await;
        let mut client = dial(CALLER, at(SERVICE, 80)).await;
        let early = timeout(Duration::from_secs(1), client.read(&mut [0])).await;
        assert!(early.is_err(), "without a certificate it is told {early:?}");
        let signed = world.one.identities.clone();
        signed.set_wanted([identity("newcomer")].into());
        let accepted = timeout(PATIENCE, listener.accept()).await;
        accepted.expect("it is carried at last").unwrap();
    });
}

#[test]
fn a_caller_whose_certificate_is_refused_is_told_at_once() {
    world(|mut world| async move {
        // Longer than a name in a certificate may be.
        let name = "n".repeat(300);
        world.rename_caller(&name).await;
        let own = identity(&name);
        world.one.identities.set_wanted([own.clone()].into());
        while !world.one.identities.is_refused(&own) {
            sleep(Duration::from_millis(5)).await;
        }
        world.capture_all().await;
        // RST may overtake the end of connect.
        let refused = async {
            let mut client = try_dial(CALLER, at(SERVICE, 80)).await?;
            client.read(&mut [0]).await
        };
        let end = timeout(Duration::from_secs(5), refused).await;
        let error = end.expect("long before others are given up").unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        world.one.logged(&["outbound", "no_certificate"]).await;
    });
}

#[test]
fn a_tunnel_whose_peer_falls_silent_is_given_up() {
    let settings = |settings: &mut ProxySettings| {
        play_node_two(settings);
        settings.timing.ping = Duration::from_millis(300);
    };
    world_with(settings, |world| async move {
        world.capture_all().await;
        let node = listen_as_node_two().await;
        let mut client = dial(CALLER, at(SERVICE, 80)).await;
        let tunnel = accept_tunnel(&world, &node).await;
        let (silence, silent) = oneshot::channel();
        let _held = tokio::spawn(async move {
            // The socket stays open, and nobody looks at it any more.
            let mut serve = std::pin::pin!(serve_tunnel(tunnel));
            tokio::select! {
                () = &mut serve => {}
                _ = silent => std::future::pending().await,
            }
        });
        let mut byte = [0];
        client.read_exact(&mut byte).await.unwrap();
        let quiet = timeout(Duration::from_millis(1_500), client.read(&mut byte)).await;
        assert!(quiet.is_err(), "control: who answers pings is left alone");

        silence.send(()).unwrap();
        let error = timeout(Duration::from_secs(3), client.read(&mut byte))
            .await
            .expect("in time")
            .unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        world.one.logged(&["outbound", "tunnel_lost"]).await;
    });
}

fn play_node_two(settings: &mut ProxySettings) {
    settings.tunnel_port = PLAYED;
}

async fn listen_as_node_two() -> TcpListener {
    let address: SocketAddr = at(NODE_2, PLAYED);
    TcpListener::bind(address).await.unwrap()
}

async fn accept_tunnel(world: &World, node: &TcpListener) -> TlsStream<TcpStream> {
    let config = world.two.identities.server_config_for(&identity("callee"));
    let (tcp, _) = node.accept().await.unwrap();
    TlsAcceptor::from(config.unwrap())
        .accept(tcp)
        .await
        .unwrap()
}

/// Says yes and one byte to every CONNECT, and answers pings, for as long as it is polled.
async fn serve_tunnel(tls: TlsStream<TcpStream>) {
    let mut connection = h2::server::handshake(tls).await.unwrap();
    let mut open = Vec::new();
    while let Some(Ok((request, mut respond))) = connection.accept().await {
        let mut send = respond
            .send_response(http::Response::new(()), false)
            .unwrap();
        send.send_data(Bytes::from_static(b"!"), false).unwrap();
        open.push((request, respond, send));
    }
}

#[derive(Debug)]
struct Shown(Arc<CertifiedKey>);

impl rustls::client::ResolvesClientCert for Shown {
    fn resolve(
        &self,
        _hints: &[&[u8]],
        _schemes: &[rustls::SignatureScheme],
    ) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0))
    }

    fn has_certs(&self) -> bool {
        true
    }
}

impl rustls::server::ResolvesServerCert for Shown {
    fn resolve(&self, _hello: rustls::server::ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0))
    }
}

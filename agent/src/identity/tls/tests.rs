use std::{
    io,
    time::{Duration, SystemTime},
};

use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, IsCa};
use rustls::{HandshakeKind, ProtocolVersion};
use tokio::io::AsyncWriteExt;

use super::*;
use crate::identity::{
    ca::{LIFE, SKEW},
    clock::TestClock,
    spiffe::server_name,
    testing::*,
};

const ALICE: &str = "spiffe://cluster.local/ns/default/sa/alice";
const BOB: &str = "spiffe://cluster.local/ns/default/sa/bob";

#[tokio::test]
async fn two_workloads_see_each_others_identity() {
    let world = World::new();
    let (client, server) = world.shake_good().await;
    let (client, server) = (client.unwrap(), server.unwrap());
    assert_eq!(seen(client.get_ref().1), identity("bob"));
    assert_eq!(seen(server.get_ref().1), identity("alice"));
    for side in [
        client.get_ref().1 as &rustls::CommonState,
        server.get_ref().1,
    ] {
        assert_eq!(side.protocol_version(), Some(ProtocolVersion::TLSv1_3));
        assert_eq!(side.alpn_protocol(), Some(&b"h2"[..]));
    }
}

#[tokio::test]
async fn a_server_refuses_every_wrong_client_with_its_word() {
    let world = World::new();
    let other = TestCa::new("other");
    let namesake = TestCa::new("one");
    let ca = &world.ca;
    let now = world.now();
    for (word, shown) in [
        ("foreign_ca", other.leaf(&[ALICE], now, |_| {})),
        ("foreign_ca", namesake.leaf(&[ALICE], now, |_| {})),
        ("expired", ca.leaf(&[ALICE], now, expired(now))),
        ("not_yet_valid", ca.leaf(&[ALICE], now, future(now))),
        ("not_one_uri", ca.leaf(&[ALICE, BOB], now, |_| {})),
        ("not_one_uri", ca.leaf(&[ALICE, ALICE], now, |_| {})),
        ("not_one_uri", ca.leaf(&[], now, |_| {})),
        (
            "not_a_workload",
            ca.leaf(&["spiffe://cluster.local/node/n1"], now, |_| {}),
        ),
        (
            "not_a_workload",
            ca.leaf(&["https://cluster.local/ns/default/sa/alice"], now, |_| {}),
        ),
        (
            "wrong_trust_domain",
            ca.leaf(&["spiffe://elsewhere/ns/default/sa/alice"], now, |_| {}),
        ),
        (
            "wrong_purpose",
            ca.leaf(&[ALICE], now, only(ExtendedKeyUsagePurpose::ServerAuth)),
        ),
        ("bad_certificate", ca.leaf(&[ALICE], now, authority)),
    ] {
        let (client, server) = world.shake(shown, world.bob(), "bob").await;
        assert_eq!(server.err(), Some(word));
        let told = client.err().unwrap();
        assert!(told.starts_with("refused_"), "{word}: client saw {told}");
    }
}

#[tokio::test]
async fn a_client_refuses_every_wrong_server_with_its_word() {
    let world = World::new();
    let other = TestCa::new("other");
    let namesake = TestCa::new("one");
    let ca = &world.ca;
    let now = world.now();
    for (word, shown) in [
        ("foreign_ca", other.leaf(&[BOB], now, |_| {})),
        ("foreign_ca", namesake.leaf(&[BOB], now, |_| {})),
        ("expired", ca.leaf(&[BOB], now, expired(now))),
        ("not_yet_valid", ca.leaf(&[BOB], now, future(now))),
        ("not_one_uri", ca.leaf(&[BOB, ALICE], now, |_| {})),
        ("not_one_uri", ca.leaf(&[], now, |_| {})),
        (
            "not_a_workload",
            ca.leaf(&["spiffe://cluster.local/bob"], now, |_| {}),
        ),
        ("wrong_identity", ca.leaf(&[ALICE], now, |_| {})),
        (
            "wrong_identity",
            ca.leaf(&["spiffe://elsewhere/ns/default/sa/bob"], now, |_| {}),
        ),
        (
            "wrong_purpose",
            ca.leaf(&[BOB], now, only(ExtendedKeyUsagePurpose::ClientAuth)),
        ),
        ("bad_certificate", ca.leaf(&[BOB], now, authority)),
    ] {
        let (client, server) = world.shake(world.alice(), shown, "bob").await;
        assert_eq!(client.err(), Some(word));
        let told = server.err().unwrap();
        assert!(told.starts_with("refused_"), "{word}: server saw {told}");
    }
}

#[tokio::test]
async fn a_client_without_certificate_is_refused() {
    let world = World::new();
    let tls = &world.tls;
    let mut client = tls.client(identity("bob"), world.alice()).unwrap();
    client.client_auth_cert_resolver = Arc::new(Nothing);
    let server = tls.server(Arc::new(Fixed(world.bob()))).unwrap();
    let name = server_name(&identity("bob"));
    let (client, server) = shake(Arc::new(client), Arc::new(server), name).await;
    assert_eq!(server.err(), Some("no_certificate"));
    assert_eq!(client.err(), Some("refused_no_certificate"));
}

#[tokio::test]
async fn a_server_name_that_nobody_here_has_is_refused() {
    let world = World::new();
    let (client, server) = world.shake(world.alice(), world.bob(), "carol").await;
    assert_eq!(server.err(), Some("unknown_server_name"));
    assert_eq!(client.err(), Some("refused_access"));
}

#[tokio::test]
async fn another_protocol_inside_is_refused() {
    let world = World::new();
    let mut client = world.tls.client(identity("bob"), world.alice()).unwrap();
    client.alpn_protocols = vec![b"http/1.1".to_vec()];
    let server = world.tls.server(Arc::new(Fixed(world.bob()))).unwrap();
    let name = server_name(&identity("bob"));
    let (_, server) = shake(Arc::new(client), Arc::new(server), name).await;
    assert_eq!(server.err(), Some("incompatible"));
}

#[tokio::test]
async fn what_is_not_tls_and_who_hangs_up_have_words_too() {
    for (sent, word) in [(&b"GET / HTTP/1.1\r\n\r\n"[..], "not_tls"), (b"", "closed")] {
        let world = World::new();
        let server = world.tls.server(Arc::new(Fixed(world.bob()))).unwrap();
        let (mut near, far) = tokio::io::duplex(1024);
        near.write_all(sent).await.unwrap();
        near.shutdown().await.unwrap();
        let error = tokio_rustls::TlsAcceptor::from(Arc::new(server))
            .accept(far)
            .await
            .err()
            .unwrap();
        assert_eq!(handshake_reason(&error), word);
    }
    let reset = io::Error::from(io::ErrorKind::ConnectionReset);
    assert_eq!(handshake_reason(&reset), "reset");
}

#[tokio::test]
async fn a_peer_whose_clock_is_almost_an_hour_behind_accepts_a_fresh_certificate() {
    let world = World::new();
    let minutes = |n: u64| Duration::from_secs(n * 60);
    let made = |ahead: Duration| world.ca.leaf(&[ALICE], world.now() + ahead, |_| {});
    let (client, server) = world.shake(made(minutes(59)), world.bob(), "bob").await;
    assert!(client.is_ok() && server.is_ok());
    let (_, server) = world.shake(made(minutes(61)), world.bob(), "bob").await;
    assert_eq!(server.err(), Some("not_yet_valid"));
}

#[tokio::test]
async fn nothing_is_resumed_so_every_connection_shows_certificates() {
    let world = World::new();
    let server = Arc::new(world.tls.server(Arc::new(Fixed(world.bob()))).unwrap());
    let ours = world.tls.client(identity("bob"), world.alice()).unwrap();
    // Somebody else's client would like to; the server does not play along.
    let mut eager = ours.clone();
    eager.resumption = Resumption::default();
    for client in [Arc::new(ours), Arc::new(eager)] {
        for _ in 0..3 {
            let name = server_name(&identity("bob"));
            let (called, answered) = shake(client.clone(), server.clone(), name).await;
            let called = called.unwrap();
            let kind = called.get_ref().1.handshake_kind();
            assert_eq!(kind, Some(HandshakeKind::Full));
            assert_eq!(called.get_ref().1.tls13_tickets_received(), 0);
            seen(answered.unwrap().get_ref().1);
        }
    }
}

#[tokio::test]
async fn a_configuration_in_hand_follows_the_bundle_and_standing_connections_live_on() {
    let world = World::new();
    let client = Arc::new(world.tls.client(identity("bob"), world.alice()).unwrap());
    let server = Arc::new(world.tls.server(Arc::new(Fixed(world.bob()))).unwrap());
    let again = || {
        shake(
            client.clone(),
            server.clone(),
            server_name(&identity("bob")),
        )
    };
    let (called, answered) = again().await;
    let (mut called, mut answered) = (called.unwrap(), answered.unwrap());

    let next = TestCa::new("two");
    world.tls.set_bundle(&bundle(&[&world.ca, &next]));
    assert!(again().await.1.is_ok());
    world.tls.set_bundle(&bundle(&[&next]));
    assert_eq!(again().await.0.err(), Some("foreign_ca"));
    world.tls.set_bundle(&bundle(&[]));
    assert_eq!(again().await.0.err(), Some("foreign_ca"));
    ping(&mut called, &mut answered).await;
}

#[tokio::test]
async fn an_anchor_that_does_not_parse_leaves_the_others_in_force() {
    let world = World::new();
    let mut broken = bundle(&[&world.ca]);
    broken
        .anchors
        .insert(0, CertificateDer::from(vec![1, 2, 3]));
    world.tls.set_bundle(&broken);
    assert!(world.shake_good().await.1.is_ok());
}

#[tokio::test]
async fn aes_is_used_only_where_both_cpus_have_it() {
    let world = World::new();
    for (client_aes, server_aes, expected) in [
        (true, true, "TLS13_AES_128_GCM_SHA256"),
        (true, false, "TLS13_CHACHA20_POLY1305_SHA256"),
        (false, true, "TLS13_CHACHA20_POLY1305_SHA256"),
        (false, false, "TLS13_CHACHA20_POLY1305_SHA256"),
    ] {
        let tls = |aes| {
            let clock = world.clock.clone();
            Tls::with_ciphers(aes, TRUST_DOMAIN.into(), &bundle(&[&world.ca]), clock)
        };
        let client = tls(client_aes)
            .client(identity("bob"), world.alice())
            .unwrap();
        let server = tls(server_aes)
            .server(Arc::new(Fixed(world.bob())))
            .unwrap();
        let name = server_name(&identity("bob"));
        let (called, _) = shake(Arc::new(client), Arc::new(server), name).await;
        let called = called.unwrap();
        let suite = called
            .get_ref()
            .1
            .negotiated_cipher_suite()
            .unwrap()
            .suite();
        assert_eq!(suite.as_str(), Some(expected));
    }
}

struct World {
    ca: TestCa,
    clock: Arc<TestClock>,
    tls: Tls,
}

impl World {
    fn new() -> Self {
        let (ca, clock) = (TestCa::new("one"), TestClock::new());
        let tls = Tls::new(TRUST_DOMAIN.into(), &bundle(&[&ca]), clock.clone());
        Self { ca, clock, tls }
    }

    fn now(&self) -> SystemTime {
        self.clock.now()
    }

    fn alice(&self) -> Arc<CertifiedKey> {
        self.ca.leaf(&[ALICE], self.now(), |_| {})
    }

    fn bob(&self) -> Arc<CertifiedKey> {
        self.ca.leaf(&[BOB], self.now(), |_| {})
    }

    async fn shake_good(
        &self,
    ) -> (
        Result<ClientStream, &'static str>,
        Result<ServerStream, &'static str>,
    ) {
        self.shake(self.alice(), self.bob(), "bob").await
    }

    /// A client that shows `own` calls `callee` at a server that has `shown` for bob's name.
    async fn shake(
        &self,
        own: Arc<CertifiedKey>,
        shown: Arc<CertifiedKey>,
        callee: &str,
    ) -> (
        Result<ClientStream, &'static str>,
        Result<ServerStream, &'static str>,
    ) {
        let client = self.tls.client(identity(callee), own).unwrap();
        let server = self.tls.server(Arc::new(Fixed(shown))).unwrap();
        let name = server_name(&identity(callee));
        shake(Arc::new(client), Arc::new(server), name).await
    }
}

/// Shows one certificate for bob's name.
#[derive(Debug)]
struct Fixed(Arc<CertifiedKey>);

impl Certificates for Fixed {
    fn pick(&self, name: Option<&str>) -> Option<Arc<CertifiedKey>> {
        let bobs = server_name(&identity("bob"));
        (name == Some(&*bobs.to_str())).then(|| self.0.clone())
    }
}

#[derive(Debug)]
struct Nothing;

impl ResolvesClientCert for Nothing {
    fn resolve(&self, _hints: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        None
    }

    fn has_certs(&self) -> bool {
        false
    }
}

fn expired(now: SystemTime) -> impl FnOnce(&mut CertificateParams) {
    move |params| {
        params.not_before = (now - LIFE).into();
        params.not_after = (now - Duration::from_secs(1)).into();
    }
}

fn future(now: SystemTime) -> impl FnOnce(&mut CertificateParams) {
    move |params| params.not_before = (now + SKEW).into()
}

fn only(usage: ExtendedKeyUsagePurpose) -> impl FnOnce(&mut CertificateParams) {
    move |params| params.extended_key_usages = vec![usage]
}

fn authority(params: &mut CertificateParams) {
    params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
}

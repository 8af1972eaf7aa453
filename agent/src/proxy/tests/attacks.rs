//! The tunnel server believes nobody.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use h2::client::SendRequest;
use http::{Method, Request, Response};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpSocket,
    time::timeout,
};
use tokio_rustls::TlsConnector;

use super::world::*;
use crate::{
    identity::server_name,
    proxy::{ProxySettings, reason::HEADER},
};

/// A hand-made tunnel from `from` to `to` (addresses) as `source` to `server`, with one CONNECT.
#[derive(Clone, Copy)]
pub(super) struct Attack<'a> {
    pub(super) from: &'a str,
    pub(super) to: &'a str,
    pub(super) source: &'a str,
    pub(super) server: &'a str,
    pub(super) target: &'a str,
    pub(super) client: Option<&'a str>,
}

impl Attack<'_> {
    /// Status and reason of the answer; 0 if the tunnel itself was refused.
    pub(super) async fn run(&self, world: &World) -> (u16, String) {
        let Some(mut tunnel) = self.tunnel(world).await else {
            return (0, String::new());
        };
        self.ask(&mut tunnel).await
    }

    async fn tunnel(&self, world: &World) -> Option<SendRequest<Bytes>> {
        let (source, server) = (identity(self.source), identity(self.server));
        let config = world
            .one
            .identities
            .client_config(&source, &server)
            .unwrap();
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(at(self.from, 0)).unwrap();
        let tcp = socket.connect(at(self.to, 15008)).await.unwrap();
        let name = server_name(&server);
        let tls = TlsConnector::from(config).connect(name, tcp).await.ok()?;
        let (sender, connection) = h2::client::handshake(tls).await.unwrap();
        tokio::spawn(connection);
        Some(sender)
    }

    fn request(&self) -> Request<()> {
        let mut request = Request::builder().method(Method::CONNECT).uri(self.target);
        if let Some(client) = self.client {
            request = request.header("forwarded", format!("for=\"{client}\""));
        }
        request.body(()).unwrap()
    }

    async fn ask(&self, tunnel: &mut SendRequest<Bytes>) -> (u16, String) {
        let (response, mut send) = tunnel.send_request(self.request(), false).unwrap();
        send.send_data(Bytes::from_static(b"x"), false).unwrap();
        let Ok(response) = response.await else {
            return (0, String::new());
        };
        let response: Response<_> = response;
        let reason = response
            .headers()
            .get(HEADER)
            .map(|word| word.to_str().unwrap().to_owned());
        (response.status().as_u16(), reason.unwrap_or_default())
    }
}

pub(super) const HONEST: Attack<'static> = Attack {
    from: NODE_1,
    to: NODE_2,
    source: "caller",
    server: "callee",
    target: "10.9.2.1:8080",
    client: Some("10.9.1.1:4567"),
};

/// Who waits for news of its client holds a place that others want.
#[test]
fn a_stream_that_is_reset_while_news_of_its_client_is_awaited_ends_at_once() {
    let patient = |settings: &mut ProxySettings| {
        settings.timing.unknown_source = Duration::from_secs(50);
    };
    world_with(patient, |world| async move {
        world.capture_all().await;
        let unknown = Attack {
            client: Some("10.9.1.3:4567"),
            ..HONEST
        };
        let mut tunnel = unknown.tunnel(&world).await.unwrap();
        let (_response, mut send) = tunnel.send_request(unknown.request(), false).unwrap();
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert!(!world.two.log().contains("inbound"), "it is not awaited");
        send.send_reset(h2::Reason::CANCEL);
        world.two.logged(&["inbound", "client_reset"]).await;
    });
}

#[test]
fn only_honest_requests_are_served() {
    world(|world| async move {
        world.capture_all().await;
        let _listener = world.serve(at(CALLEE, PORT));
        assert_eq!(
            HONEST.run(&world).await,
            (200, String::new()),
            "the control"
        );
        let cases = [
            (
                "source of another identity",
                403,
                "claimed_source",
                Attack {
                    client: Some("10.9.1.2:4567"),
                    ..HONEST
                },
            ),
            (
                "source that is no pod",
                403,
                "claimed_source",
                Attack {
                    client: Some("10.9.7.7:4567"),
                    ..HONEST
                },
            ),
            (
                "source that is a node",
                403,
                "claimed_source",
                Attack {
                    client: Some("10.9.0.1:4567"),
                    ..HONEST
                },
            ),
            (
                "right source, from another node",
                403,
                "claimed_source",
                Attack {
                    from: NODE_2,
                    ..HONEST
                },
            ),
            (
                "right source, from no node",
                403,
                "claimed_source",
                Attack {
                    from: "10.9.5.5",
                    ..HONEST
                },
            ),
            (
                "no source",
                400,
                "bad_request",
                Attack {
                    client: None,
                    ..HONEST
                },
            ),
            (
                "a source that is no address",
                400,
                "bad_request",
                Attack {
                    client: Some("caller"),
                    ..HONEST
                },
            ),
            (
                "SNI of another local pod",
                403,
                "wrong_identity",
                Attack {
                    target: "10.9.2.2:8080",
                    ..HONEST
                },
            ),
            (
                "target behind another SNI",
                403,
                "wrong_identity",
                Attack {
                    server: "stranger",
                    ..HONEST
                },
            ),
            (
                "loopback",
                400,
                "bad_target",
                Attack {
                    target: "127.0.0.1:8080",
                    ..HONEST
                },
            ),
            (
                "mapped loopback",
                400,
                "bad_target",
                Attack {
                    target: "[::ffff:127.0.0.1]:8080",
                    ..HONEST
                },
            ),
            (
                "IPv6 loopback",
                400,
                "bad_target",
                Attack {
                    target: "[::1]:8080",
                    ..HONEST
                },
            ),
            (
                "any address",
                400,
                "bad_target",
                Attack {
                    target: "0.0.0.0:8080",
                    ..HONEST
                },
            ),
            (
                "link-local",
                400,
                "bad_target",
                Attack {
                    target: "169.254.169.254:80",
                    ..HONEST
                },
            ),
            (
                "multicast",
                400,
                "bad_target",
                Attack {
                    target: "224.0.0.1:80",
                    ..HONEST
                },
            ),
            (
                "the node itself",
                400,
                "bad_target",
                Attack {
                    target: "10.9.0.2:4191",
                    ..HONEST
                },
            ),
            (
                "another node",
                400,
                "bad_target",
                Attack {
                    target: "10.9.0.1:4191",
                    ..HONEST
                },
            ),
            (
                "a pod of another node",
                404,
                "not_local",
                Attack {
                    target: "10.9.1.2:8080",
                    ..HONEST
                },
            ),
            (
                "an address outside",
                404,
                "not_local",
                Attack {
                    target: "192.0.2.1:80",
                    ..HONEST
                },
            ),
            (
                "a pod outside the mesh",
                404,
                "not_meshed",
                Attack {
                    target: "10.9.2.9:8080",
                    ..HONEST
                },
            ),
            (
                "a name",
                400,
                "bad_target",
                Attack {
                    target: "localhost:8080",
                    ..HONEST
                },
            ),
            (
                "port zero",
                400,
                "bad_target",
                Attack {
                    target: "10.9.2.1:0",
                    ..HONEST
                },
            ),
        ];
        for (what, status, reason, attack) in &cases {
            assert_eq!(
                attack.run(&world).await,
                (*status, (*reason).to_owned()),
                "{what}"
            );
            world.two.logged(&["inbound", reason]).await;
        }
        world
            .two
            .counted(&["inbound_tcp_errors_total", "claimed_source"], 5.0)
            .await;
        world
            .two
            .counted(&["inbound_tcp_errors_total", "wrong_identity"], 2.0)
            .await;
    });
}

/// Each may be so new that we have not heard of it, but not all of them.
#[test]
fn pods_that_nobody_knows_are_not_waited_for_without_bound() {
    let patient = |settings: &mut ProxySettings| {
        settings.timing.unknown_source = Duration::from_secs(60);
    };
    world_with(patient, |world| async move {
        world.capture_all().await;
        let nobody = Attack {
            client: Some("10.9.1.77:4567"),
            ..HONEST
        };
        let tunnel = nobody.tunnel(&world).await.unwrap();
        let mut streams = tokio::task::JoinSet::new();
        for _ in 0..400 {
            let mut tunnel = tunnel.clone();
            streams.spawn(async move { nobody.ask(&mut tunnel).await });
        }
        for _ in 256..400 {
            let answer = streams.join_next().await.unwrap().unwrap();
            assert_eq!(answer, (403, "claimed_source".to_owned()));
        }
        let more = tokio::time::timeout(Duration::from_millis(300), streams.join_next());
        assert!(more.await.is_err(), "the others are waited for");
    });
}

#[test]
fn a_server_name_that_is_not_ours_gets_no_handshake() {
    world(|world| async move {
        world.capture_all().await;
        let (source, server) = (identity("caller"), identity("callee"));
        let config = world
            .one
            .identities
            .client_config(&source, &server)
            .unwrap();
        let name = server_name(&identity("nobody"));
        let tcp = tokio::net::TcpStream::connect(at(NODE_2, 15008))
            .await
            .unwrap();
        assert!(TlsConnector::from(config).connect(name, tcp).await.is_err());
        world.two.logged(&["unknown_server_name"]).await;
        world
            .two
            .counted(&["unknown_server_name", "handshakes"], 1.0)
            .await;
    });
}

#[test]
fn a_client_without_a_certificate_is_turned_away() {
    world(|world| async move {
        world.capture_all().await;
        let (source, server) = (identity("caller"), identity("callee"));
        let mut config = (*world
            .one
            .identities
            .client_config(&source, &server)
            .unwrap())
        .clone();
        config.client_auth_cert_resolver = Arc::new(NoCertificate);
        let tcp = tokio::net::TcpStream::connect(at(NODE_2, 15008))
            .await
            .unwrap();
        let tls = TlsConnector::from(Arc::new(config))
            .connect(server_name(&server), tcp)
            .await;
        // With TLS 1.3 the client learns of it after its own last word.
        if let Ok(mut tls) = tls {
            let mut byte = [0];
            let heard = timeout(Duration::from_secs(5), tls.read(&mut byte))
                .await
                .unwrap();
            assert!(heard.is_err() || matches!(heard, Ok(0)));
        }
        world.two.logged(&["certificate_missing"]).await;
    });
}

#[test]
fn a_silent_stranger_goes_after_the_deadline() {
    world(|world| async move {
        world.capture_all().await;
        let mut silent = tokio::net::TcpStream::connect(at(NODE_2, 15008))
            .await
            .unwrap();
        let mut noisy = tokio::net::TcpStream::connect(at(NODE_2, 15008))
            .await
            .unwrap();
        noisy.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        let mut rest = Vec::new();
        let both = async {
            let _alert_or_reset = noisy.read_to_end(&mut rest).await;
            let mut byte = [0];
            let _end_or_reset = silent.read(&mut byte).await;
        };
        timeout(Duration::from_secs(3), both)
            .await
            .expect("both are turned away");
        world.two.logged(&["handshake_timeout"]).await;
        world.two.logged(&["handshake_failed"]).await;
    });
}

#[test]
fn strangers_cannot_keep_a_node_from_talking() {
    world(|world| async move {
        world.capture_all().await;
        let _listener = world.serve(at(CALLEE, PORT));
        let mut strangers = Vec::new();
        for n in 0..200_u16 {
            let socket = TcpSocket::new_v4().unwrap();
            let from: SocketAddr = at(&format!("10.9.6.{}", n % 2 + 1), 0);
            socket.bind(from).unwrap();
            strangers.push(socket.connect(at(NODE_2, 15008)).await.unwrap());
        }
        assert_eq!(HONEST.run(&world).await.0, 200);
        world.two.logged(&["handshake_evicted"]).await;
    });
}

#[derive(Debug)]
struct NoCertificate;

impl rustls::client::ResolvesClientCert for NoCertificate {
    fn resolve(
        &self,
        _hints: &[&[u8]],
        _schemes: &[rustls::SignatureScheme],
    ) -> Option<Arc<rustls::sign::CertifiedKey>> {
        None
    }

    fn has_certs(&self) -> bool {
        false
    }
}

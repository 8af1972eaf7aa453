//! How connections and tunnels end: FIN, half-close, RST, death, goodbye.

use std::{io::ErrorKind, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::{sleep, timeout},
};

use super::world::*;
use crate::drain::Drained;

/// A connection that has carried a byte each way.
async fn pair(listener: &TcpListener, dials: std::net::SocketAddr) -> (TcpStream, TcpStream) {
    let mut client = dial(CALLER, dials).await;
    client.write_all(b"?").await.unwrap();
    let (mut server, _) = listener.accept().await.unwrap();
    let mut byte = [0];
    server.read_exact(&mut byte).await.unwrap();
    server.write_all(b"!").await.unwrap();
    client.read_exact(&mut byte).await.unwrap();
    (client, server)
}

/// The carriers with two ends that we hold: through a tunnel, and within the node.
fn ways() -> [(std::net::SocketAddr, std::net::SocketAddr); 2] {
    [
        (at(CALLEE, PORT), at(SERVICE, 80)),
        (at(NEIGHBOUR, PORT), at(NEIGHBOUR, PORT)),
    ]
}

async fn expect_reset(stream: &mut TcpStream) {
    let mut byte = [0];
    let read = timeout(Duration::from_secs(5), stream.read(&mut byte))
        .await
        .expect("in time");
    assert_eq!(read.unwrap_err().kind(), ErrorKind::ConnectionReset);
}

/// The RST may come before or after the client's `connect` returns.
async fn expect_refused(to: std::net::SocketAddr) {
    match try_dial(CALLER, to).await {
        Ok(mut client) => expect_reset(&mut client).await,
        Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
    }
}

#[test]
fn half_close_leaves_the_other_direction_open() {
    world(|world| async move {
        world.capture_all().await;
        for (listens, dials) in ways() {
            let listener = world.serve(listens);
            for client_first in [true, false] {
                let (client, server) = pair(&listener, dials).await;
                let (mut first, mut second) = if client_first {
                    (client, server)
                } else {
                    (server, client)
                };
                first.shutdown().await.unwrap();
                let mut said = Vec::new();
                second.read_to_end(&mut said).await.unwrap();
                // The reader is late.
                sleep(Duration::from_millis(300)).await;
                let answer = vec![7; 300_000];
                let writer = tokio::spawn(async move {
                    second.write_all(&answer).await.unwrap();
                    second.shutdown().await.unwrap();
                });
                sleep(Duration::from_millis(200)).await;
                let mut heard = Vec::new();
                first.read_to_end(&mut heard).await.unwrap();
                assert_eq!(heard.len(), 300_000);
                writer.await.unwrap();
            }
        }
    });
}

#[test]
fn a_reset_of_either_side_arrives_as_a_reset() {
    world(|world| async move {
        world.capture_all().await;
        for (listens, dials) in ways() {
            let listener = world.serve(listens);
            let (client, mut server) = pair(&listener, dials).await;
            reset(client);
            expect_reset(&mut server).await;
            let (mut client, server) = pair(&listener, dials).await;
            reset(server);
            expect_reset(&mut client).await;
        }
        world
            .one
            .counted(
                &["tcp_close_total", "outbound", "peer=\"dst\"", "failure"],
                4.0,
            )
            .await;
        world.one.logged(&["client_reset"]).await;
        world.one.logged(&["server_reset"]).await;
    });
}

#[test]
fn a_reset_after_half_close_is_noticed() {
    world(|world| async move {
        world.capture_all().await;
        for (listens, dials) in ways() {
            let listener = world.serve(listens);
            let (mut client, mut server) = pair(&listener, dials).await;
            client.shutdown().await.unwrap();
            let mut byte = [0];
            assert_eq!(server.read(&mut byte).await.unwrap(), 0);
            reset(client);
            // Nobody reads or writes; a write later must find the connection dead.
            let dead = async {
                while server.write_all(b"x").await.is_ok() {
                    sleep(Duration::from_millis(20)).await;
                }
            };
            timeout(Duration::from_secs(5), dead)
                .await
                .expect("the server learns of it");

            let (mut client, mut server) = pair(&listener, dials).await;
            server.shutdown().await.unwrap();
            assert_eq!(client.read(&mut byte).await.unwrap(), 0);
            reset(server);
            let dead = async {
                while client.write_all(b"x").await.is_ok() {
                    sleep(Duration::from_millis(20)).await;
                }
            };
            timeout(Duration::from_secs(5), dead)
                .await
                .expect("the client learns of it");
        }
        world
            .one
            .counted(&["tcp_open_connections", "peer=\"src\""], 0.0)
            .await;
    });
}

#[test]
fn a_refusal_of_the_application_looks_like_a_reset() {
    world(|world| async move {
        world.capture_all().await;
        expect_refused(at(SERVICE, 80)).await;
        world.two.logged(&["connect_refused"]).await;
        world.one.logged(&["connect_refused"]).await;
        expect_refused(at(NEIGHBOUR, PORT)).await;
        world
            .one
            .counted(&["outbound_tcp_errors_total", "connect_refused"], 1.0)
            .await;
    });
}

#[test]
fn a_tunnel_that_dies_resets_its_streams() {
    world(|world| async move {
        world.capture_all().await;
        let listener = world.serve(at(CALLEE, PORT));
        let mut pairs = Vec::new();
        for _ in 0..8 {
            pairs.push(pair(&listener, at(SERVICE, 80)).await);
        }
        // Kill the connections between the nodes under both agents.
        let killed = std::process::Command::new("ss")
            .args(["-K", "dst", NODE_2, "dport", "=", "15008"])
            .output()
            .unwrap();
        assert!(killed.status.success(), "{killed:?}");
        for (client, server) in &mut pairs {
            expect_reset(client).await;
            expect_reset(server).await;
        }
        world.one.logged(&["tunnel_lost"]).await;
        // The next connection gets a new tunnel.
        drop(pair(&listener, at(SERVICE, 80)).await);
    });
}

#[test]
fn goodbye_lets_open_streams_finish_and_the_deadline_ends_them() {
    world(|world| async move {
        world.capture_all().await;
        let listener = world.serve(at(CALLEE, PORT));
        let (mut client, mut server) = pair(&listener, at(SERVICE, 80)).await;
        let (mut late, late_server) = pair(&listener, at(SERVICE, 80)).await;
        let proxy = std::sync::Arc::clone(&world.two.proxy);
        let drained = tokio::spawn(async move { proxy.drain(Duration::from_secs(2)).await });
        sleep(Duration::from_millis(300)).await;
        // Open streams still carry.
        client.write_all(b"still").await.unwrap();
        let mut said = [0; 5];
        server.read_exact(&mut said).await.unwrap();
        assert_eq!(&said, b"still");
        client.shutdown().await.unwrap();
        server.shutdown().await.unwrap();
        assert_eq!(client.read(&mut said).await.unwrap(), 0);
        expect_reset(&mut late).await;
        drop(late_server);
        assert_eq!(drained.await.unwrap(), Drained::Forced);
        world.two.logged(&["drained"]).await;
    });
}

#[test]
fn one_stalled_stream_does_not_stop_the_others() {
    world_with(
        |settings| settings.threads = 1,
        |world| async move {
            world.capture_all().await;
            let listener = world.serve(at(CALLEE, PORT));
            let (mut stuffed, idle_server) = pair(&listener, at(SERVICE, 80)).await;
            // Nobody reads at the far end: it fills until backpressure reaches the client.
            let mut sent = 0_usize;
            let block = vec![0; 64 * 1024];
            while let Ok(Ok(written)) =
                timeout(Duration::from_millis(500), stuffed.write(&block)).await
            {
                sent += written;
                assert!(sent < 64 << 20, "memory is not bounded");
            }
            let started = std::time::Instant::now();
            for _ in 0..99 {
                drop(pair(&listener, at(SERVICE, 80)).await);
            }
            assert!(started.elapsed() < Duration::from_secs(5));
            drop(idle_server);
        },
    );
}

#[test]
fn a_thousand_idle_connections_cost_little() {
    world(|world| async move {
        world.capture_all().await;
        let listener = world.serve(at(CALLEE, PORT));
        let mut pairs = vec![pair(&listener, at(SERVICE, 80)).await];
        let before = resident();
        for _ in 0..1000 {
            pairs.push(pair(&listener, at(SERVICE, 80)).await);
        }
        let each = (resident() - before) / 1000;
        // Both agents and the test's own two ends of each.
        assert!(each < 24 * 1024, "{each} bytes per connection");
    });
}

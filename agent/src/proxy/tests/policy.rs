//! Policy is the same for every carrier, and reaches connections that stand.

use std::{io::ErrorKind, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use super::world::*;
use crate::state::objects::DefaultPolicy;

pub(super) async fn expect_reset(stream: &mut TcpStream, patience: Duration) {
    let mut byte = [0];
    let read = timeout(patience, stream.read(&mut byte))
        .await
        .expect("in time");
    assert_eq!(read.unwrap_err().kind(), ErrorKind::ConnectionReset);
}

/// (where the application listens, who dials, what is dialled)
fn ways() -> [(std::net::SocketAddr, &'static str, std::net::SocketAddr); 3] {
    [
        (at(CALLEE, PORT), CALLER, at(SERVICE, 80)),
        (at(NEIGHBOUR, PORT), CALLER, at(NEIGHBOUR, PORT)),
        (at(CALLEE, 9090), UNMESHED, at(CALLEE, 9090)),
    ]
}

#[test]
fn a_changed_policy_closes_what_it_forbids() {
    world(|mut world| async move {
        world.capture_all().await;
        let mut open = Vec::new();
        for (listens, from, dials) in ways() {
            let listener = world.serve(listens);
            let mut client = dial(from, dials).await;
            client.write_all(b"?").await.unwrap();
            let (mut server, _) = listener.accept().await.unwrap();
            server.read_exact(&mut [0]).await.unwrap();
            open.push((client, server));
        }
        // Strict: the two authenticated ones go on, the plain one ends.
        world.set_default(DefaultPolicy::AllAuthenticated);
        world.publish().await;
        let (mut plain, _server) = open.pop().unwrap();
        expect_reset(&mut plain, Duration::from_secs(1)).await;
        for (client, server) in &mut open {
            client.write_all(b"?").await.unwrap();
            server.read_exact(&mut [0]).await.unwrap();
        }
        world.set_default(DefaultPolicy::Deny);
        world.publish().await;
        for (client, server) in &mut open {
            expect_reset(client, Duration::from_secs(1)).await;
            expect_reset(server, Duration::from_secs(1)).await;
        }
        world.two.logged(&["policy_changed", "inbound"]).await;
        world.one.logged(&["policy_changed", "outbound"]).await;
    });
}

#[test]
fn a_denied_connection_never_reaches_the_application() {
    world(|mut world| async move {
        world.set_default(DefaultPolicy::Deny);
        world.publish().await;
        world.capture_all().await;
        for (listens, from, dials) in ways() {
            let listener = world.serve(listens);
            // The RST may come before or after the client's `connect` returns.
            match try_dial(from, dials).await {
                Ok(mut client) => expect_reset(&mut client, Duration::from_secs(5)).await,
                Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
            }
            let accepted = timeout(Duration::from_millis(100), listener.accept()).await;
            assert!(accepted.is_err(), "{dials} was reached");
        }
        // The caller's agent can say why, although the callee's decided.
        world
            .one
            .logged(&[
                "outbound",
                "default_deny",
                &format!("dst.hbone_addr={}", at(CALLEE, PORT)),
            ])
            .await;
        world.two.logged(&["inbound", "default_deny"]).await;
        world
            .two
            .counted(&["inbound_tcp_authz_deny_total"], 2.0)
            .await;
        world
            .one
            .counted(&["inbound_tcp_authz_deny_total"], 1.0)
            .await;
    });
}

#[test]
fn a_pod_that_is_gone_takes_its_connections_with_it() {
    world(|mut world| async move {
        world.capture_all().await;
        let listener = world.serve(at(CALLEE, PORT));
        let mut client = dial(CALLER, at(SERVICE, 80)).await;
        client.write_all(b"?").await.unwrap();
        let (_server, _) = listener.accept().await.unwrap();
        world.objects.pods.remove(CALLEE);
        world.publish().await;
        expect_reset(&mut client, Duration::from_secs(1)).await;
        world.two.logged(&["pod_gone"]).await;
    });
}

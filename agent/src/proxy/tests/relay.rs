//! Bytes arrive, by every carrier, and what people see of it.

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::world::*;

/// Serves one connection: reads to the end, says what came and from whom.
async fn echo_once(listener: tokio::net::TcpListener) {
    let (mut stream, peer) = listener.accept().await.unwrap();
    let mut said = Vec::new();
    stream.read_to_end(&mut said).await.unwrap();
    let answer = format!("{} said {}", peer.ip(), String::from_utf8_lossy(&said));
    stream.write_all(answer.as_bytes()).await.unwrap();
}

async fn ask(from: &str, to: std::net::SocketAddr) -> String {
    let mut client = dial(from, to).await;
    client.write_all(b"hello").await.unwrap();
    client.shutdown().await.unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).await.unwrap();
    answer
}

#[test]
fn a_service_on_another_node_is_reached_through_a_tunnel() {
    world(|world| async move {
        world.capture_all().await;
        let server = tokio::spawn(echo_once(world.serve(at(CALLEE, PORT))));
        let answer = ask(CALLER, at(SERVICE, 80)).await;
        assert_eq!(answer, format!("{CALLER} said hello"));
        server.await.unwrap();
        let (caller, callee) = (
            identity("caller").to_string(),
            identity("callee").to_string(),
        );
        world
            .one
            .logged(&[
                &caller,
                &callee,
                "outbound",
                &format!("dst.addr={}", at(NODE_2, 15008)),
                &format!("dst.hbone_addr={}", at(CALLEE, PORT)),
                &format!("bytes_sent=5 bytes_recv={}", answer.len()),
            ])
            .await;
        world
            .two
            .logged(&[
                &caller,
                &callee,
                "inbound",
                &format!("dst.addr={}", at(NODE_2, 15008)),
                &format!("dst.hbone_addr={}", at(CALLEE, PORT)),
                &format!("bytes_sent={} bytes_recv=5", answer.len()),
            ])
            .await;
        world
            .one
            .counted(
                &["tcp_close_total", "outbound", "tls=\"true\"", "success"],
                1.0,
            )
            .await;
        world
            .two
            .counted(
                &["tcp_close_total", "inbound", "tls=\"true\"", "success"],
                1.0,
            )
            .await;
        world
            .two
            .counted(&["inbound_tcp_authz_allow_total"], 1.0)
            .await;
    });
}

#[test]
fn a_pod_of_the_same_node_is_reached_without_a_tunnel() {
    world(|world| async move {
        world.capture_all().await;
        let server = tokio::spawn(echo_once(world.serve(at(NEIGHBOUR, PORT))));
        assert_eq!(
            ask(CALLER, at(NEIGHBOUR, PORT)).await,
            format!("{CALLER} said hello")
        );
        server.await.unwrap();
        world
            .one
            .counted(&["tcp_close_total", "outbound", "same_node"], 1.0)
            .await;
        world
            .one
            .counted(&["tcp_close_total", "inbound", "same_node"], 1.0)
            .await;
        assert!(world.one.proxy.tunnels().is_empty());
        assert_eq!(
            world.one.log().lines().count(),
            1,
            "one record per connection"
        );
    });
}

#[test]
fn a_plain_client_is_served_where_policy_lets_it() {
    world(|world| async move {
        world.capture_all().await;
        let server = tokio::spawn(echo_once(world.serve(at(CALLEE, 9090))));
        assert_eq!(
            ask(UNMESHED, at(CALLEE, 9090)).await,
            format!("{UNMESHED} said hello")
        );
        server.await.unwrap();
        world
            .two
            .counted(&["tcp_close_total", "inbound", "no_tls_from_remote"], 1.0)
            .await;
    });
}

#[test]
fn many_connections_share_few_tunnels() {
    world(|world| async move {
        world.capture_all().await;
        let listener = world.serve(at(CALLEE, PORT));
        let mut clients = Vec::new();
        for n in 0..200_u32 {
            let mut client = dial(CALLER, at(SERVICE, 80)).await;
            client.write_all(&n.to_be_bytes()).await.unwrap();
            let (mut server, _) = listener.accept().await.unwrap();
            let mut seen = [0; 4];
            server.read_exact(&mut seen).await.unwrap();
            assert_eq!(u32::from_be_bytes(seen), n);
            clients.push((client, server));
        }
        tokio::time::sleep(std::time::Duration::from_millis(1100)).await;
        let tunnels = world.one.proxy.tunnels();
        assert!(tunnels.len() <= 2, "one per thread: {tunnels:?}");
        assert_eq!(
            tunnels.iter().map(|tunnel| tunnel.streams).sum::<usize>(),
            200
        );
        assert_eq!(world.one.proxy.connections().get(CALLER), Some(&200));
        assert_eq!(world.two.proxy.connections().get(CALLEE), Some(&200));
    });
}

#[test]
fn bulk_arrives_whole_in_both_directions() {
    world(|world| async move {
        world.capture_all().await;
        for (listens, dials) in [
            (at(CALLEE, PORT), at(SERVICE, 80)),
            (at(NEIGHBOUR, PORT), at(NEIGHBOUR, PORT)),
        ] {
            let listener = world.serve(listens);
            let server = tokio::spawn(async move {
                let (stream, _) = listener.accept().await.unwrap();
                let (mut read, mut write) = stream.into_split();
                tokio::io::copy(&mut read, &mut write).await.unwrap();
            });
            let client = dial(CALLER, dials).await;
            let (mut read, mut write) = client.into_split();
            let sender = tokio::spawn(async move {
                for n in 0..2048_u32 {
                    let block: Vec<u8> = (0..2048).flat_map(|i| (n ^ i).to_be_bytes()).collect();
                    write.write_all(&block).await.unwrap();
                }
            });
            let mut block = vec![0; 8192];
            for n in 0..2048_u32 {
                read.read_exact(&mut block).await.unwrap();
                for (i, word) in block.chunks(4).enumerate() {
                    assert_eq!(word, (n ^ i as u32).to_be_bytes(), "block {n}");
                }
            }
            assert_eq!(read.read(&mut block).await.unwrap(), 0);
            sender.await.unwrap();
            server.await.unwrap();
        }
    });
}

#[test]
fn hbone_to_a_pods_own_address_works_both_ways() {
    world_with(
        |settings| settings.hbone_to_pods = true,
        |world| async move {
            world.capture_all().await;
            let server = tokio::spawn(echo_once(world.serve(at(CALLEE, PORT))));
            // The pod's own tunnel listener stands outside, its sockets inside: lead one to the
            // other, as the kernel half would.
            let inside = world.serve(at(CALLEE, 15008));
            tokio::spawn(async move {
                loop {
                    let (mut from, peer) = inside.accept().await.unwrap();
                    let mut to = dial(&peer.ip().to_string(), at(CALLEE, 15008)).await;
                    tokio::spawn(
                        async move { tokio::io::copy_bidirectional(&mut from, &mut to).await },
                    );
                }
            });
            assert_eq!(
                ask(CALLER, at(SERVICE, 80)).await,
                format!("{CALLER} said hello")
            );
            server.await.unwrap();
            world
                .two
                .logged(&[&identity("caller").to_string(), "inbound"])
                .await;
        },
    );
}

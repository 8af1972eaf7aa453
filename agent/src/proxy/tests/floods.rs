//! Peers with a good certificate that ask too much: HTTP/2 frames written by hand, over real TLS,
//! from a node, as a stolen agent could. Each is cut for its reason, costs no more than its bound,
//! and an honest tunnel beside it goes on.

use std::time::{Duration, Instant};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    time::timeout,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::world::*;
use crate::{identity::server_name, proxy::ProxySettings};

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RESET: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW: u8 = 8;
const CONTINUATION: u8 = 9;
const END_HEADERS: u8 = 0x4;

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    let mut frame = vec![length[1], length[2], length[3], kind, flags];
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// An honest CONNECT's header block: literals, nothing remembered.
fn connect() -> Vec<u8> {
    let mut block = vec![0x02, 7];
    block.extend(b"CONNECT");
    block.extend([0x01, 13]);
    block.extend(b"10.9.2.1:8080");
    block.extend([0x00, 9]);
    block.extend(b"forwarded");
    let client = b"for=\"10.9.1.1:4567\"";
    block.push(client.len() as u8);
    block.extend(client);
    block
}

/// From node 1 to node 2, as `caller` to `callee`.
async fn shake_hands(world: &World) -> TlsStream<TcpStream> {
    let (source, server) = (identity("caller"), identity("callee"));
    let config = world
        .one
        .identities
        .client_config(&source, &server)
        .unwrap();
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(at(NODE_1, 0)).unwrap();
    let tcp = socket.connect(at(NODE_2, 15008)).await.unwrap();
    let name = server_name(&server);
    TlsConnector::from(config).connect(name, tcp).await.unwrap()
}

/// A tunnel whose frames are made by hand; preface and settings are sent.
async fn tunnel(world: &World) -> TlsStream<TcpStream> {
    let mut tls = shake_hands(world).await;
    tls.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        .await
        .unwrap();
    tls.write_all(&frame(SETTINGS, 0, 0, &[])).await.unwrap();
    tls
}

/// Sends and reads until the other side has had enough; how often it answered by which frame.
async fn attack(tls: TlsStream<TcpStream>, bytes: Vec<u8>) -> Seen {
    let (mut read, mut write) = tokio::io::split(tls);
    let send = async {
        // It fails when the tunnel is cut: that is what is waited for.
        let _cut = write.write_all(&bytes).await;
        let _cut = write.flush().await;
        write
    };
    let hear = async {
        let mut all = Vec::new();
        // An error is an end like any other.
        let _end = read.read_to_end(&mut all).await;
        all
    };
    let both = timeout(PATIENCE, async { tokio::join!(send, hear) });
    let (_write, all) = both.await.expect("the tunnel is cut");
    Seen(all)
}

struct Seen(Vec<u8>);

impl Seen {
    fn count(&self, kind: u8) -> usize {
        let mut rest = &self.0[..];
        let mut count = 0;
        while let [a, b, c, this, ..] = rest {
            let length = usize::from(*a) << 16 | usize::from(*b) << 8 | usize::from(*c);
            count += usize::from(*this == kind);
            rest = rest.get(9 + length..).unwrap_or_default();
        }
        count
    }
}

/// Is an honest connection served at this moment?
async fn honest(world: &World) {
    let mut client = dial(CALLER, at(CALLEE, PORT)).await;
    client.write_all(b"hello").await.unwrap();
    let mut back = [0; 5];
    let answered = timeout(PATIENCE, client.read_exact(&mut back));
    answered.await.expect("in time").unwrap();
    assert_eq!(&back, b"hello");
    drop(client);
    world.two.logged(&["inbound", "10.9.2.1:8080"]).await;
}

fn echo(world: &World) {
    let listener = world.serve(at(CALLEE, PORT));
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut read, mut write) = stream.split();
                tokio::io::copy(&mut read, &mut write).await
            });
        }
    });
}

/// The attack is cut for this reason while an honest connection is served. Nobody is in a hurry: where
/// the machine has much else to do, a handshake or half a frame may take long.
fn cut_for(word: &'static str, bytes: Vec<u8>) {
    let slowly = |settings: &mut ProxySettings| {
        settings.timing.handshake = PATIENCE;
        settings.timing.connect = PATIENCE;
    };
    cut_in(slowly, word, bytes);
}

fn cut_in(change: fn(&mut ProxySettings), word: &'static str, bytes: Vec<u8>) {
    world_with(change, move |world| async move {
        world.capture_all().await;
        echo(&world);
        honest(&world).await;
        let before = resident();
        let attacker = tunnel(&world).await;
        let (_seen, ()) = tokio::join!(attack(attacker, bytes), honest(&world));
        world
            .two
            .counted(&["picomesh_tunnels_cut_total", word], 1.0)
            .await;
        let grown = resident().saturating_sub(before);
        assert!(grown < 48 << 20, "{grown} bytes for one attacker");
        honest(&world).await;
    });
}

#[test]
fn a_flood_of_pings_is_cut() {
    cut_for("flood_pings", frame(PING, 0, 0, &[7; 8]).repeat(50_000));
}

#[test]
fn a_flood_of_settings_is_cut() {
    let window = [0, 4, 0, 0, 0xff, 0xff];
    let other = [0, 4, 0, 0, 0x7f, 0xff];
    let both = [
        frame(SETTINGS, 0, 0, &window),
        frame(SETTINGS, 0, 0, &other),
    ];
    cut_for("flood_settings", both.concat().repeat(10_000));
}

#[test]
fn a_flood_of_window_updates_is_cut() {
    let one = frame(WINDOW, 0, 0, &[0, 0, 0, 1]);
    // More than are borne in half a minute: who is slow sends fewer a second.
    cut_for("flood_windows", one.repeat(700_000));
}

#[test]
fn streams_that_are_reset_as_they_open_are_cut() {
    let mut bytes = Vec::new();
    // More than are borne in half a minute: who is slow sends fewer a second.
    for n in 0..170_000_u32 {
        bytes.extend(frame(HEADERS, END_HEADERS, 2 * n + 1, &connect()));
        bytes.extend(frame(RESET, 0, 2 * n + 1, &[0, 0, 0, 8]));
    }
    // Whoever notices first, the library's bound for what it had not handed on, or ours.
    cut_for("flood_", bytes);
}

#[test]
fn a_header_block_in_endless_pieces_is_cut() {
    let mut bytes = frame(HEADERS, 0, 1, &connect());
    for _ in 0..1000 {
        bytes.extend(frame(CONTINUATION, 0, 1, &[]));
    }
    cut_for("flood_continuations", bytes);
}

#[test]
fn a_header_list_without_end_is_cut() {
    let mut block = connect();
    let long = "x".repeat(120);
    for n in 0..2000 {
        block.extend([0x00, 5]);
        block.extend(format!("n{n:04}").into_bytes());
        block.push(long.len() as u8);
        block.extend(long.as_bytes());
    }
    let mut pieces = block.chunks(16_000).enumerate().peekable();
    let mut bytes = Vec::new();
    while let Some((n, piece)) = pieces.next() {
        let kind = if n == 0 { HEADERS } else { CONTINUATION };
        let flags = if pieces.peek().is_none() {
            END_HEADERS
        } else {
            0
        };
        bytes.extend(frame(kind, flags, 1, piece));
    }
    // The library's own bound: 8 KiB.
    cut_for("protocol_error", bytes);
}

#[test]
fn headers_that_never_end_are_cut_in_time() {
    // The world's handshake, and so its patience, is half a second.
    cut_in(|_| {}, "slow_frames", frame(HEADERS, 0, 1, &connect()));
}

#[test]
fn empty_data_without_end_is_cut() {
    let mut bytes = frame(HEADERS, END_HEADERS, 1, &connect());
    bytes.extend(frame(DATA, 0, 1, &[]).repeat(300_000));
    cut_for("flood_other", bytes);
}

#[test]
fn frames_that_are_no_http_are_cut() {
    // Data on a stream that was never opened.
    cut_for("protocol_error", frame(DATA, 0, 9, b"what?"));
}

#[test]
fn streams_beyond_the_limit_are_refused_and_the_others_stay() {
    world(|world| async move {
        world.capture_all().await;
        echo(&world);
        let mut tls = tunnel(&world).await;
        let mut bytes = Vec::new();
        for n in 0..1100_u32 {
            bytes.extend(frame(HEADERS, END_HEADERS, 2 * n + 1, &connect()));
        }
        bytes.extend(frame(DATA, 0, 1, b"still here"));
        tls.write_all(&bytes).await.unwrap();
        let mut seen = Vec::new();
        let deadline = Instant::now() + Duration::from_secs(20);
        let echoed = |all: &[u8]| all.windows(10).any(|window| window == b"still here");
        loop {
            assert!(Instant::now() < deadline, "{} bytes came", seen.len());
            let mut piece = vec![0; 64 * 1024];
            let read = timeout(Duration::from_secs(10), tls.read(&mut piece));
            let read = read.await.expect("the tunnel goes on").unwrap();
            assert_ne!(read, 0, "the tunnel ended");
            seen.extend(&piece[..read]);
            let refused = Seen(seen.clone()).count(RESET);
            if refused >= 76 && echoed(&seen) {
                assert_eq!(refused, 76, "1024 streams are carried");
                break;
            }
        }
        assert_eq!(Seen(seen).count(GOAWAY), 0);
        world.two.counted(&["picomesh_connections"], 1024.0).await;
    });
}

#[test]
fn a_peer_that_does_not_answer_a_goodbye_is_left() {
    world_with(
        |settings| settings.timing.tunnel_idle = Duration::from_millis(500),
        |world| async move {
            world.capture_all().await;
            let tls = tunnel(&world).await;
            // Nothing is read, nothing answered.
            world.two.counted(&["picomesh_tunnels "], 1.0).await;
            let gone = async {
                while world.two.proxy.tunnels().iter().any(|t| t.role == "server") {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            };
            // The status is a second old at most, and may not know of the tunnel yet.
            tokio::time::sleep(Duration::from_secs(2)).await;
            timeout(Duration::from_secs(10), gone).await.expect("left");
            world.two.counted(&["picomesh_tunnels "], 0.0).await;
            drop(tls);
        },
    );
}

/// A stolen agent could open one tunnel after the other, each of them well-behaved.
#[test]
fn a_peer_that_opens_too_many_tunnels_is_refused_until_it_closes_some() {
    let few = |settings: &mut ProxySettings| settings.caps.peer_tunnels = 2;
    world_with(few, |world| async move {
        world.capture_all().await;
        echo(&world);
        let mut held = Vec::new();
        for _ in 0..2 {
            let mut tls = tunnel(&world).await;
            // Its settings: the other side has taken it.
            let taken = timeout(Duration::from_secs(5), tls.read_u8()).await;
            taken.expect("in time").unwrap();
            held.push(tls);
        }
        // Refused when it has shown who it is, before it says anything.
        let mut more = shake_hands(&world).await;
        let ended = timeout(Duration::from_secs(5), more.read_u8()).await;
        assert!(ended.expect("in time").is_err(), "a third was taken");
        world.two.logged(&["peer_tunnels", "--peer-tunnels"]).await;
        world
            .two
            .counted(&["picomesh_handshakes_total", "peer_tunnels"], 1.0)
            .await;
        assert_eq!(world.two.proxy.tunnel_peers().refused, 1);
        drop(held);
        let all_gone = async {
            while !world.two.proxy.tunnel_peers().open.is_empty() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(Duration::from_secs(5), all_gone)
            .await
            .expect("closed ones give their places back");
        honest(&world).await;
    });
}

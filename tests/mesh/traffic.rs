//! Traffic through the mesh is as it is without: every case is played twice, the first time as the
//! control.

use std::{
    fs,
    io::{Read, Write},
    net::{IpAddr, Shutdown, SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use picomesh_tests::{
    Pod,
    client::{self, End},
    program,
    server::{Habit, Server},
    wait,
};

use crate::{
    ground::{Ground, PATIENCE, PORT, as_without_the_mesh, told},
    harness::{Need, Test},
};

pub(crate) const TESTS: &[Test] = &[
    Test {
        name: "traffic::curl_shows_the_server_the_clients_own_address",
        needs: &[Need::Mesh, Need::Program("nginx"), Need::Program("curl")],
        run: || as_without_the_mesh(curl_shows_the_server_the_clients_own_address),
    },
    Test {
        name: "traffic::bulk_flows_both_ways",
        needs: &[Need::Mesh, Need::Program("iperf3")],
        run: || as_without_the_mesh(bulk_flows_both_ways),
    },
    Test {
        name: "traffic::redis_answers",
        needs: &[
            Need::Mesh,
            Need::Program("redis-server"),
            Need::Program("redis-cli"),
        ],
        run: || as_without_the_mesh(redis_answers),
    },
    Test {
        name: "traffic::a_server_may_speak_first",
        needs: &[Need::Mesh],
        run: || as_without_the_mesh(a_server_may_speak_first),
    },
    Test {
        name: "traffic::a_websocket_lives_on_after_its_upgrade",
        needs: &[Need::Mesh],
        run: || as_without_the_mesh(a_websocket_lives_on_after_its_upgrade),
    },
    Test {
        name: "traffic::a_large_download_is_whole",
        needs: &[Need::Mesh, Need::Program("nginx"), Need::Program("curl")],
        run: a_large_download_is_whole,
    },
    Test {
        name: "traffic::a_thousand_idle_connections_stay",
        needs: &[Need::Mesh],
        run: a_thousand_idle_connections_stay,
    },
    Test {
        name: "traffic::a_client_may_close_its_half_and_read_late",
        needs: &[Need::Mesh],
        run: || as_without_the_mesh(a_client_may_close_its_half_and_read_late),
    },
    Test {
        name: "traffic::a_server_may_close_its_half_and_read_late",
        needs: &[Need::Mesh],
        run: || as_without_the_mesh(a_server_may_close_its_half_and_read_late),
    },
    Test {
        name: "traffic::a_clients_reset_reaches_the_server",
        needs: &[Need::Mesh],
        run: || as_without_the_mesh(a_clients_reset_reaches_the_server),
    },
    Test {
        name: "traffic::a_servers_reset_reaches_the_client",
        needs: &[Need::Mesh],
        run: || as_without_the_mesh(a_servers_reset_reaches_the_client),
    },
    Test {
        name: "traffic::a_client_may_reuse_source_ports_without_stalls",
        needs: &[Need::Mesh],
        run: a_client_may_reuse_source_ports_without_stalls,
    },
    Test {
        name: "traffic::a_pod_may_call_its_own_service",
        needs: &[Need::Mesh],
        run: a_pod_may_call_its_own_service,
    },
    Test {
        name: "traffic::a_server_that_reads_nothing_costs_bounded_memory",
        needs: &[Need::Mesh],
        run: a_server_that_reads_nothing_costs_bounded_memory,
    },
    Test {
        name: "traffic::a_closed_port_is_refused",
        needs: &[Need::Mesh],
        run: a_closed_port_is_refused,
    },
];

fn curl_shows_the_server_the_clients_own_address(
    ground: &Ground,
    server: &Pod,
    to: SocketAddr,
) -> Result<()> {
    let _nginx = program::nginx(&ground.world, server, PORT)?;
    let saw = program::curl(&ground.near, &format!("http://{to}/"))?;
    let expected = if to.is_ipv4() {
        ground.near.v4().to_string()
    } else {
        ground.near.v6().to_string()
    };
    ensure!(
        saw.trim() == expected,
        "the server saw {saw}, not {expected}"
    );
    Ok(())
}

fn bulk_flows_both_ways(ground: &Ground, server: &Pod, to: SocketAddr) -> Result<()> {
    let _iperf = program::iperf3_server(server, PORT)?;
    for reverse in [false, true] {
        program::iperf3(&ground.near, &to.ip().to_string(), PORT, 1, reverse)?;
    }
    Ok(())
}

fn redis_answers(ground: &Ground, server: &Pod, to: SocketAddr) -> Result<()> {
    let _redis = program::redis(server, PORT)?;
    let host = to.ip().to_string();
    let port = PORT.to_string();
    let ask = |words: &[&str]| -> Result<String> {
        let args = [&["-h", &host, "-p", &port], words].concat();
        let output = ground.near.output("redis-cli", &args, PATIENCE)?.ok()?;
        Ok(output.stdout.trim().to_owned())
    };
    ensure!(ask(&["set", "key", "value"])? == "OK", "SET was not taken");
    ensure!(ask(&["get", "key"])? == "value", "GET gives another value");
    Ok(())
}

fn a_server_may_speak_first(ground: &Ground, server: &Pod, to: SocketAddr) -> Result<()> {
    let _server = Server::start(server.netns(), PORT, Habit::SpeaksFirst("220 ready\r\n"))?;
    ground.near.run(|| {
        let mut stream = client::connect(to, PATIENCE)?;
        let mut greeting = [0; 11];
        stream.read_exact(&mut greeting)?;
        ensure!(&greeting == b"220 ready\r\n", "greeted with {greeting:?}");
        client::ping(&mut stream, b"HELO\r\n")?;
        Ok(())
    })
}

fn a_websocket_lives_on_after_its_upgrade(
    ground: &Ground,
    server: &Pod,
    to: SocketAddr,
) -> Result<()> {
    let _server = Server::start(server.netns(), PORT, Habit::WebSocket)?;
    ground.near.run(|| {
        let mut stream = client::connect(to, PATIENCE)?;
        // Key and answer of the standard's own example.
        stream.write_all(
            b"GET /chat HTTP/1.1\r\nHost: chat\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
              Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n",
        )?;
        let head = client::read_until(&mut stream, b"\r\n\r\n")?;
        ensure!(
            head.contains(" 101 ") && head.contains("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="),
            "no upgrade: {head}"
        );
        for pause in [0, 300] {
            std::thread::sleep(Duration::from_millis(pause));
            // A masked text frame with the mask zero: FIN, text, masked, 5 bytes.
            stream.write_all(b"\x81\x85\0\0\0\0hello")?;
            let mut back = [0; 7];
            stream.read_exact(&mut back)?;
            ensure!(&back == b"\x81\x05hello", "the frame came back as {back:?}");
        }
        Ok(())
    })
}

fn a_large_download_is_whole() -> Result<()> {
    let mut ground = Ground::new()?;
    let _nginx = program::nginx(&ground.world, &ground.far, PORT)?;
    let file = program::files(&ground.world, &ground.far).join("large");
    write_large(&file)?;
    let sum = |pod: &Pod, command: &str| -> Result<String> {
        let output = pod
            .output("bash", &["-c", command], Duration::from_secs(120))?
            .ok()?;
        Ok(output
            .stdout
            .split_whitespace()
            .next()
            .unwrap_or_default()
            .to_owned())
    };
    let expected = sum(&ground.far, &format!("sha256sum {}", file.display()))?;
    let url = format!("http://{}/files/large", ground.far.at(PORT));
    let download = format!("set -o pipefail; curl -sS --noproxy '*' {url} | sha256sum");
    let control = sum(&ground.near, &download).context("control, without the mesh")?;
    ensure!(control == expected, "control: {control} is not {expected}");
    ground.mesh()?;
    let mutual = [("direction", "outbound"), ("tls", "true")];
    let before = ground.opened(0, &mutual)?;
    let meshed = sum(&ground.near, &download).context("through the mesh")?;
    ensure!(meshed == expected, "{meshed} is not {expected}");
    ensure!(
        ground.opened(0, &mutual)? > before,
        "the download went past the mesh"
    );
    Ok(())
}

fn a_thousand_idle_connections_stay() -> Result<()> {
    let mut ground = Ground::new()?;
    let _server = Server::start(ground.far.netns(), PORT, Habit::Echo)?;
    let open_and_wait = |ground: &Ground| -> Result<()> {
        let to = ground.far.at(PORT);
        ground.near.run(|| {
            let mut streams = (0..1000)
                .map(|_| client::connect(to, PATIENCE))
                .collect::<Result<Vec<TcpStream>, _>>()?;
            std::thread::sleep(Duration::from_secs(3));
            for (i, stream) in streams.iter_mut().enumerate() {
                client::ping(stream, b"still here").with_context(|| format!("connection {i}"))?;
            }
            Ok(())
        })
    };
    open_and_wait(&ground).context("control, without the mesh")?;
    ground.mesh()?;
    open_and_wait(&ground).context("through the mesh")
}

const LATE: Duration = Duration::from_millis(300);
const BYTES: usize = 3_000_000;

fn a_client_may_close_its_half_and_read_late(
    ground: &Ground,
    server: &Pod,
    to: SocketAddr,
) -> Result<()> {
    let habit = Habit::AnswerAfterFin {
        wait: LATE,
        bytes: BYTES,
    };
    let server = Server::start(server.netns(), PORT, habit)?;
    ground.near.run(|| {
        let mut stream = client::connect(to, PATIENCE)?;
        stream.write_all(b"all I have to say")?;
        stream.shutdown(Shutdown::Write)?;
        // Longer than the server waits: the answer lies in buffers meanwhile.
        std::thread::sleep(2 * LATE);
        let end = client::read_to_end(&mut stream, PATIENCE)?;
        ensure!(
            end == End::Closed { read: BYTES },
            "the answer ended as {end:?}"
        );
        Ok(())
    })?;
    ensure!(
        server.bytes() == 17,
        "the server read {} bytes",
        server.bytes()
    );
    Ok(())
}

fn a_server_may_close_its_half_and_read_late(
    ground: &Ground,
    server: &Pod,
    to: SocketAddr,
) -> Result<()> {
    let habit = Habit::FinThenRead {
        bytes: BYTES,
        wait: 2 * LATE,
    };
    let server = Server::start(server.netns(), PORT, habit)?;
    ground.near.run(|| {
        let mut stream = client::connect(to, PATIENCE)?;
        let end = client::read_to_end(&mut stream, PATIENCE)?;
        ensure!(
            end == End::Closed { read: BYTES },
            "the answer ended as {end:?}"
        );
        std::thread::sleep(LATE);
        stream.write_all(&vec![1; BYTES])?;
        stream.shutdown(Shutdown::Write)?;
        Ok(())
    })?;
    wait::until("the server has read everything", PATIENCE, || {
        server.bytes() == BYTES as u64 && server.fins() == 1
    })
}

fn a_clients_reset_reaches_the_server(ground: &Ground, server: &Pod, to: SocketAddr) -> Result<()> {
    let server = Server::start(server.netns(), PORT, Habit::Echo)?;
    ground.near.run(|| -> Result<()> {
        let mut stream = client::connect(to, PATIENCE)?;
        client::ping(&mut stream, b"hello")?;
        client::reset(stream)?;
        Ok(())
    })?;
    wait::until("the server sees a reset", PATIENCE, || {
        server.resets() == 1 || server.fins() > 0
    })?;
    ensure!(server.fins() == 0, "the reset arrived as an orderly end");
    Ok(())
}

fn a_servers_reset_reaches_the_client(ground: &Ground, server: &Pod, to: SocketAddr) -> Result<()> {
    let _server = Server::start(server.netns(), PORT, Habit::Resets)?;
    ground.near.run(|| {
        let mut stream = client::connect(to, PATIENCE)?;
        stream.write_all(b"x")?;
        let end = client::read_to_end(&mut stream, PATIENCE)?;
        ensure!(end == End::Reset { read: 0 }, "the client sees {end:?}");
        Ok(())
    })
}

fn a_client_may_reuse_source_ports_without_stalls() -> Result<()> {
    let mut ground = Ground::new()?;
    let servers = [&ground.far, &ground.beside]
        .map(|pod| Server::start(pod.netns(), PORT, Habit::PongAndClose));
    let round = |ground: &Ground| -> Result<()> {
        for pod in [&ground.far, &ground.beside] {
            let (from, to) = (ground.near.v4().into(), pod.at(PORT));
            let seen = ground
                .near
                .run(|| client::reuse_source_ports(from, 40_000..40_016, to, 2_500))?;
            ensure!(
                seen.failed == 0 && seen.over_200_ms == 0,
                "{}: {seen:?}",
                pod.name()
            );
        }
        Ok(())
    };
    round(&ground).context("control, without the mesh")?;
    ground.mesh()?;
    round(&ground).context("through the mesh")?;
    for server in servers {
        let accepted = server?.accepted();
        ensure!(accepted >= 5_000, "a server accepted {accepted} of 5000");
    }
    Ok(())
}

fn a_pod_may_call_its_own_service() -> Result<()> {
    let mut ground = Ground::new()?;
    let _server = Server::start(ground.near.netns(), PORT, Habit::WhoAmI)?;
    // The control knows the pod's own addresses alone: nothing resolves Services without the mesh.
    let sees_itself = |ground: &Ground| -> Result<()> {
        for ip in ground.addresses(&ground.near) {
            let own: IpAddr = match ip {
                IpAddr::V4(_) => ground.near.v4().into(),
                IpAddr::V6(_) => ground.near.v6().into(),
            };
            let saw = ground
                .near
                .run(|| client::exchange((ip, PORT).into(), b"", PATIENCE))
                .with_context(|| format!("at {ip}"))?;
            ensure!(
                saw == format!("{own}\n").as_bytes(),
                "at {ip} the server saw {:?}, not {own}",
                String::from_utf8_lossy(&saw)
            );
        }
        Ok(())
    };
    sees_itself(&ground).context("control, without the mesh")?;
    ground.mesh()?;
    let outbound = [("direction", "outbound")];
    let before = ground.opened(0, &outbound)?;
    sees_itself(&ground).context("through the mesh")?;
    ensure!(
        ground.opened(0, &outbound)? >= before + 2.0,
        "calls of the Service went past the mesh"
    );
    Ok(())
}

fn a_server_that_reads_nothing_costs_bounded_memory() -> Result<()> {
    const STREAMS: usize = 20;
    let mut ground = Ground::new()?;
    let _servers = [&ground.far, &ground.beside]
        .map(|pod| Server::start(pod.netns(), PORT, Habit::ReadsNothing));
    for server in [&ground.far, &ground.beside] {
        stuff(&ground.near, server.at(PORT), 2).context("control, without the mesh")?;
    }
    ground.mesh()?;
    let resident = |ground: &Ground| -> Result<Vec<u64>> {
        ground
            .agents
            .iter()
            .map(|a| a.process().resident_kib())
            .collect()
    };
    let before = resident(&ground)?;
    let _tunnelled = stuff(&ground.near, ground.far.at(PORT), STREAMS)?;
    let _on_one_node = stuff(&ground.near, ground.beside.at(PORT), STREAMS)?;
    for (agent, before) in ground.agents.iter().zip(before) {
        let now = agent.process().resident_kib()?;
        // Each stream holds at most 256 KiB in each direction, and as much again in TLS and h2.
        ensure!(
            now < before + 24 * 1024,
            "the agent of {} grew from {before} to {now} KiB",
            agent.node().name()
        );
    }
    Ok(())
}

/// Opens connections and writes to each until nobody has taken any more for a while: all buffers
/// on the way are full then.
fn stuff(from: &Pod, to: SocketAddr, count: usize) -> Result<Vec<TcpStream>> {
    const TOO_MUCH: usize = 64 << 20;
    const QUIET: Duration = Duration::from_secs(1);
    let mut streams = from.run(|| {
        (0..count)
            .map(|_| client::connect(to, PATIENCE))
            .collect::<Result<Vec<_>, _>>()
    })?;
    let chunk = vec![7; 1 << 20];
    let mut taken = vec![0_usize; count];
    let mut last = Instant::now();
    while last.elapsed() < QUIET {
        for (stream, taken) in streams.iter_mut().zip(&mut taken) {
            stream.set_nonblocking(true)?;
            match stream.write(&chunk) {
                Ok(n) => {
                    *taken += n;
                    last = Instant::now();
                }
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(e).context("write"),
            }
            ensure!(
                *taken < TOO_MUCH,
                "{to} took {taken} bytes that nobody reads"
            );
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    ensure!(
        taken.iter().all(|taken| *taken > 0),
        "{to} took nothing at all"
    );
    Ok(streams)
}

fn a_closed_port_is_refused() -> Result<()> {
    let mut ground = Ground::new()?;
    let to = ground.far.at(PORT);
    let outcome = |pod: &Pod| pod.run(|| told(to));
    let control = outcome(&ground.near).context("control, without the mesh")?;
    ensure!(control == End::Reset { read: 0 }, "control: {control:?}");
    ground.mesh()?;
    for client in [&ground.near, &ground.plain] {
        let meshed = outcome(client)?;
        ensure!(
            meshed == End::Reset { read: 0 },
            "{} sees {meshed:?}",
            client.name()
        );
    }
    Ok(())
}

/// 1 GiB in which no two blocks are alike.
fn write_large(path: &std::path::Path) -> Result<()> {
    let mut file = std::io::BufWriter::new(fs::File::create(path)?);
    let mut block = vec![0_u8; 1 << 20];
    for (i, byte) in block.iter_mut().enumerate() {
        *byte = (i.wrapping_mul(31) >> 3) as u8;
    }
    for number in 0..1024_u64 {
        block[..8].copy_from_slice(&number.to_le_bytes());
        file.write_all(&block)?;
    }
    file.flush()?;
    Ok(())
}

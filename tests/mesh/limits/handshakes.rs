//! Handshakes that are begun and never finished, by people on the LAN.

use std::{
    io::{ErrorKind, Read, Write},
    net::{Ipv4Addr, SocketAddr},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use picomesh_tests::{
    Pod,
    agent::TUNNEL_PORT,
    client,
    process::allow_files,
    server::{Habit, Server},
    wait,
};

use crate::ground::{Ground, PATIENCE, PORT};

/// The head of a record that a ClientHello could begin with.
const BEGUN: &[u8] = &[0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3];
/// The agent's own deadline of a handshake, and what a busy machine adds.
const ALL_GONE: Duration = Duration::from_secs(5 + 5);

pub(super) fn half_open_handshakes_end_and_a_node_gets_through() -> Result<()> {
    half_open(700, 16)
}

pub(super) fn five_thousand_half_open_handshakes_cost_little_and_a_node_gets_through() -> Result<()>
{
    half_open(5_000, 128)
}

fn half_open(count: usize, sources: u8) -> Result<()> {
    allow_files(count as u64 + 1_000)?;
    let mut ground = Ground::new()?;
    let _server = Server::start(ground.far.netns(), PORT, Habit::Echo)?;
    ground.mesh()?;
    let attacker = with_addresses(&ground, sources)?;
    let node: SocketAddr = (ground.world.node(1)?.v4(), TUNNEL_PORT).into();
    let agent = ground.agent(1)?;
    // What is measured is not the code that runs for the first time.
    let to = ground.far.at(PORT);
    ground
        .near
        .run(|| client::exchange(to, b"warm up", PATIENCE))?;
    let before = agent.process().resident_kib()?;

    let begun = Instant::now();
    let mut streams = Vec::new();
    let mut highest = before;
    for number in 0..count {
        let from = address(number as u8 % sources);
        let stream = attacker
            .run(|| client::connect_from((from, 0).into(), node, PATIENCE))
            .and_then(|mut stream| {
                // Half say nothing, half begin.
                if number % 2 == 0 {
                    stream.write_all(BEGUN)?;
                }
                Ok(stream)
            });
        match stream {
            Ok(stream) => streams.push(stream),
            // The agent had enough of them already.
            Err(e) if matches!(e.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe) => {}
            Err(e) => return Err(e).with_context(|| format!("handshake {number}")),
        }
        if number % 64 == 0 {
            highest = highest.max(agent.process().resident_kib()?);
        }
        if number == count / 2 {
            // This pod has no tunnel yet.
            let asked = Instant::now();
            let answer = ground
                .beside
                .run(|| client::exchange(to, b"let me in", PATIENCE))?;
            ensure!(answer == b"let me in", "{to} answers {answer:?}");
            let took = asked.elapsed();
            ensure!(
                took < Duration::from_secs(1),
                "a node's handshake took {took:?} in the crowd"
            );
        }
    }
    let opened_in = begun.elapsed();
    highest = highest.max(agent.process().resident_kib()?);

    let cost = highest - before;
    eprintln!("{count} half-open handshakes in {opened_in:?}: {cost} KiB");
    ensure!(cost <= 16 * 1024, "they cost {cost} KiB");

    let last = Instant::now();
    let mut open = streams.len();
    for stream in &mut streams {
        stream.set_read_timeout(Some(
            ALL_GONE
                .saturating_sub(last.elapsed())
                .max(Duration::from_millis(1)),
        ))?;
        let mut rest = [0; 64];
        let ended = loop {
            match stream.read(&mut rest) {
                Ok(0) => break true,
                Ok(_) => {}
                Err(e) => break e.kind() != ErrorKind::WouldBlock,
            }
        };
        open -= usize::from(ended);
    }
    ensure!(open == 0, "{open} of {count} still stand");
    let server = [("side", "server")];
    agent.wait_metric("picomesh_handshakes_total", &server, PATIENCE, |n| {
        n >= count as f64
    })?;
    let metrics = agent.metrics()?;
    let words = ["handshake_timeout", "handshake_evicted", "handshake_rate"];
    let told: f64 = words
        .iter()
        .map(|word| metrics.sum("picomesh_handshakes_total", &[("result", word)]))
        .sum();
    ensure!(
        told >= 0.9 * count as f64,
        "{told} of {count} are counted by reason"
    );
    wait::for_value("memory comes back", 3 * PATIENCE, || {
        let now = agent.process().resident_kib()?;
        ensure!(now <= before + 4 * 1024, "{now} KiB, {before} before");
        Ok(Some(()))
    })
}

fn address(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(192, 168, 88, number + 1)
}

/// A machine on the nodes' link with many addresses.
fn with_addresses(ground: &Ground, count: u8) -> Result<Pod> {
    let outsider = ground.world.outsider()?;
    let mut script = String::new();
    for number in 0..count {
        script += &format!("addr add {}/24 dev eth0\n", address(number));
    }
    outsider.netns().ip(&script)?;
    let back = format!("route add 192.168.88.0/24 via {}\n", outsider.v4());
    ground.world.node(1)?.netns().ip(&back)?;
    Ok(outsider)
}

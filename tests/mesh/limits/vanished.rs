//! Peers that are gone without a word. The agents here are those of the testing build, whose
//! keep-alive gives up after four seconds instead of two minutes.

use std::{
    net::{Shutdown, TcpStream},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use picomesh_tests::{
    AgentOptions, Netns, agent, client,
    client::End,
    server::{Habit, Server},
    wait,
};

use crate::ground::{Ground, PATIENCE, PORT};

/// Four seconds, and what a busy machine adds.
const NOTICED: Duration = Duration::from_secs(20);
const CROWD: usize = 20;

fn ground() -> Result<Ground> {
    let mut ground = Ground::new()?;
    let options = AgentOptions {
        binary: Some(agent::testing_binary()?),
        ..AgentOptions::default()
    };
    ground.mesh_with(&options)?;
    Ok(ground)
}

pub(super) fn a_peer_that_dies_silently_is_noticed() -> Result<()> {
    let ground = ground()?;
    let outsider = ground.world.outsider()?;
    let _server = Server::start(outsider.netns(), PORT, Habit::Echo)?;
    let to = outsider.at(PORT);
    let mut stream = ground.near.run(|| client::connect(to, PATIENCE))?;
    client::ping(&mut stream, b"are you there?")?;

    // Longer than keep-alive's patience: silence alone ends nothing.
    std::thread::sleep(Duration::from_secs(6));
    client::ping(&mut stream, b"and now?").context("an idle peer that lives")?;

    outsider.netns().ip("link set eth0 down")?;
    let end = client::read_to_end(&mut stream, NOTICED)?;
    ensure!(end == End::Reset { read: 0 }, "the client hears {end:?}");
    no_connections(&ground, 0)?;
    ground.agent(0)?.wait_log(&["outbound"], PATIENCE).map(drop)
}

pub(super) fn half_closed_connections_of_the_vanished_do_not_pile_up() -> Result<()> {
    let ground = ground()?;
    let outsider = ground.world.outsider()?;
    let _server = Server::start(outsider.netns(), PORT, Habit::ReadsNothing)?;
    let _far = Server::start(ground.far.netns(), PORT, Habit::ReadsNothing)?;
    // An application that has closed waits no longer for its peer's FIN than this.
    ground
        .near
        .netns()
        .sysctl("net/ipv4/tcp_fin_timeout", "2")?;
    let half_closed = |to| -> Result<Vec<TcpStream>> {
        ground.near.run(|| {
            (0..CROWD)
                .map(|_| {
                    let stream = client::connect(to, PATIENCE)?;
                    stream.shutdown(Shutdown::Write)?;
                    Ok(stream)
                })
                .collect()
        })
    };
    let vanishing = half_closed(outsider.at(PORT))?;
    let abandoned = half_closed(ground.far.at(PORT))?;
    wait::for_value("they are half closed", PATIENCE, || {
        let waiting = close_wait(ground.near.netns())?;
        ensure!(waiting == 2 * CROWD, "{waiting} sockets are in CLOSE_WAIT");
        Ok(Some(()))
    })?;
    // Half closed and alive on both sides is no fault: whoever reads late still may.
    std::thread::sleep(Duration::from_secs(6));
    let waiting = close_wait(ground.near.netns())?;
    ensure!(
        waiting == 2 * CROWD,
        "{waiting} of {} half-closed connections were left in peace",
        2 * CROWD
    );

    // A server that dies silently, and applications that close without reading to the end.
    outsider.netns().ip("link set eth0 down")?;
    drop(abandoned);
    for netns in [ground.near.netns(), ground.far.netns()] {
        wait::for_value("no socket is left in CLOSE_WAIT", NOTICED, || {
            let waiting = close_wait(netns)?;
            ensure!(waiting == 0, "{waiting} in {}", netns.name());
            Ok(Some(()))
        })?;
    }
    drop(vanishing);
    no_connections(&ground, 0)?;
    no_connections(&ground, 1)
}

pub(super) fn a_node_that_dies_silently_leaves_no_tunnel() -> Result<()> {
    let ground = ground()?;
    let server = Server::start(ground.far.netns(), PORT, Habit::Echo)?;
    let to = ground.far.at(PORT);
    let mut stream = ground.near.run(|| client::connect(to, PATIENCE))?;
    client::ping(&mut stream, b"are you there?")?;
    for node in [0, 1] {
        let tunnels = |n| n == 1.0;
        ground
            .agent(node)?
            .wait_metric("picomesh_tunnels", &[], PATIENCE, tunnels)?;
    }
    ground.world.node(1)?.netns().ip("link set eth0 down")?;
    let end = client::read_to_end(&mut stream, 2 * NOTICED)?;
    ensure!(end == End::Reset { read: 0 }, "the client hears {end:?}");
    wait::until("the server is told too", 2 * NOTICED, || {
        server.resets() == 1
    })?;
    for node in [0, 1] {
        no_connections(&ground, node)?;
        ground
            .agent(node)?
            .wait_metric("picomesh_tunnels", &[], NOTICED, |n| n == 0.0)?;
    }
    Ok(())
}

fn no_connections(ground: &Ground, node: usize) -> Result<()> {
    ground
        .agent(node)?
        .wait_metric("picomesh_connections", &[], NOTICED, |n| n == 0.0)
        .map(drop)
}

/// Sockets whose peer has closed and whose owner has not.
fn close_wait(netns: &Netns) -> Result<usize> {
    let mut count = 0;
    for file in ["tcp", "tcp6"] {
        let text = netns.proc_net(file)?;
        let states = text
            .lines()
            .skip(1)
            .filter_map(|line| line.split_whitespace().nth(3));
        count += states.filter(|state| *state == "08").count();
    }
    Ok(count)
}

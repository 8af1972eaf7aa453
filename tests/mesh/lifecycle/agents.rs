//! The end of an agent, by SIGKILL, SIGTERM and `cleanup`, and the next one's start.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};
use picomesh_tests::{
    AgentOptions, Netns, Pod, agent,
    calls::Calls,
    client,
    hooks::Hooks,
    load::Load,
    requirements,
    server::{Habit, Server},
    wait::patience,
};

use crate::ground::{Ground, PATIENCE, PORT, served};

/// A SYN is sent again after 1, 3, 7 and 15 seconds.
const RETRANSMISSIONS: Duration = Duration::from_secs(20);

pub(super) fn the_next_agent_adopts_what_a_killed_one_left() -> Result<()> {
    let mut ground = Ground::new()?;
    let _servers =
        [&ground.far, &ground.beside].map(|pod| Server::start(pod.netns(), PORT, Habit::Echo));
    ground.mesh()?;
    let before = (left_in(&ground, 0)?, hooks(&ground)?);
    ensure!(
        before.1.iter().all(Hooks::are_single),
        "before: {:?}",
        before.1
    );
    let load = Load::of_connections(&ground.near, ground.far.at(PORT))?;
    load.wait_rounds(20)?;

    ground.agent(0)?.kill9();
    let _killed_under_it = load.stop()?;
    // Outbound of an enrolled pod, and inbound to one.
    let waiting = [
        Waiting::start(&ground.near, &ground.far)?,
        Waiting::start(&ground.near, &ground.beside)?,
        Waiting::start(&ground.plain, &ground.beside)?,
    ];
    std::thread::sleep(Duration::from_millis(1_500));
    for connection in &waiting {
        ensure!(
            !connection.is_over(),
            "{}: it does not wait for the next agent",
            connection.name
        );
    }
    start_again(&mut ground, 0)?;

    for connection in waiting {
        connection.succeeds()?;
    }
    let after = (left_in(&ground, 0)?, hooks(&ground)?);
    ensure!(
        after == before,
        "the next agent did not take over what was there: {before:?}, then {after:?}"
    );
    Ok(())
}

pub(super) fn sigterm_lets_connections_finish_and_leaves_everything_pinned() -> Result<()> {
    let mut ground = Ground::new()?;
    let _server = Server::start(ground.far.netns(), PORT, Habit::Echo)?;
    let options = AgentOptions::default().arg("--drain-deadline", "2s");
    ground.mesh_with(&options)?;
    let before = (left_in(&ground, 0)?, hooks(&ground)?);
    let connect = || {
        ground
            .near
            .run(|| client::connect(ground.far.at(PORT), PATIENCE))
    };
    let mut finishes = connect()?;
    client::ping(&mut finishes, b"before")?;
    let mut stays = connect()?;
    client::ping(&mut stays, b"before")?;

    let asked = Instant::now();
    ground
        .agent(0)?
        .process()
        .signal(nix::sys::signal::Signal::SIGTERM);
    std::thread::sleep(Duration::from_millis(500));
    client::ping(&mut finishes, b"after").context("an open connection may finish")?;
    drop(finishes);
    let status = ground.agent(0)?.process().wait(PATIENCE)?;
    let took = asked.elapsed();
    ensure!(status.success(), "the agent ended with {status}");
    ensure!(
        took > Duration::from_millis(1_800),
        "it ended after {took:?} although a connection was open"
    );
    let end = client::read_to_end(&mut stays, PATIENCE)?;
    ensure!(
        matches!(end, client::End::Reset { .. }),
        "what outlives the deadline is told {end:?}, not a reset"
    );

    let after = (left_in(&ground, 0)?, hooks(&ground)?);
    ensure!(
        after == before,
        "it did not leave everything: {before:?}, then {after:?}"
    );
    let waiting = Waiting::start(&ground.near, &ground.far)?;
    std::thread::sleep(Duration::from_millis(500));
    ensure!(!waiting.is_over(), "without an agent a connection passes");
    start_again(&mut ground, 0)?;
    waiting.succeeds()
}

pub(super) fn an_end_without_a_successor_cuts_nobody_who_has_just_come() -> Result<()> {
    let mut ground = Ground::new()?;
    let _server = Server::start(ground.far.netns(), PORT, Habit::Echo)?;
    ground.mesh_with(&AgentOptions::default().arg("--drain-deadline", "4s"))?;
    let to = ground.far.at(PORT);
    // The caller's node and the server's.
    for node in [0, 1] {
        let calls = Calls::start(&ground.near, to, Duration::from_millis(20))?;
        // Without somebody who stays an agent ends as soon as nobody is there.
        let mut stays = ground.near.run(|| client::connect(to, PATIENCE))?;
        client::ping(&mut stays, b"before")?;
        let agent = ground.agent(node)?.process();
        agent.signal(nix::sys::signal::Signal::SIGTERM);
        let status = agent.wait(2 * PATIENCE)?;
        ensure!(status.success(), "the agent ended with {status}");
        start_again(&mut ground, node)?;
        std::thread::sleep(Duration::from_secs(1));

        let calls = calls.stop()?;
        let failures: Vec<_> = calls.iter().filter_map(|c| c.failure.as_ref()).collect();
        ensure!(
            failures.is_empty(),
            "node {node}: {} of {} failed: {:?}",
            failures.len(),
            calls.len(),
            &failures[..failures.len().min(5)]
        );
        // The control: for a while nobody was there who could serve.
        let longest = calls.iter().map(|call| call.took).max();
        ensure!(
            longest > Some(Duration::from_millis(500)),
            "node {node}: nobody waited, the longest took {longest:?}"
        );
    }
    Ok(())
}

pub(super) fn out_of_descriptors_an_agent_waits_and_goes_on() -> Result<()> {
    const SHORTAGE: Duration = Duration::from_secs(3);
    let mut ground = Ground::new()?;
    let _server = Server::start(ground.far.netns(), PORT, Habit::Echo)?;
    ground.mesh()?;
    let to = ground.far.at(PORT);
    ensure!(served(&ground.near, to), "control: near is not served");

    let agent = ground.agent(0)?.process();
    // What is open stays open; nothing more can be opened.
    limit_open_files(agent.pid(), 3)?;
    let waiting = Waiting::start(&ground.near, &ground.far)?;
    let before = agent.cpu()?;
    std::thread::sleep(SHORTAGE);
    let spent = agent.cpu()?.saturating_sub(before);
    ensure!(!waiting.is_over(), "it was served without a descriptor");
    ensure!(spent < SHORTAGE / 10, "waiting took {spent:?} of the CPU");

    limit_open_files(agent.pid(), 512)?;
    waiting.succeeds()?;
    ensure!(served(&ground.near, to), "near is not served afterwards");
    let shortage = [("error", "accept_shortage")];
    let metrics = ground.agent(0)?.metrics()?;
    let counted = metrics.sum("outbound_tcp_errors_total", &shortage);
    // From 5 ms on the pause doubles, up to half a second: for each thread some a second.
    ensure!((1.0..200.0).contains(&counted), "{counted} were counted");
    Ok(())
}

fn limit_open_files(pid: i32, soft: u32) -> Result<()> {
    let set = Command::new("prlimit")
        .arg(format!("--pid={pid}"))
        .arg(format!("--nofile={soft}:"))
        .status()
        .context("prlimit")?;
    ensure!(set.success(), "prlimit: {set}");
    Ok(())
}

pub(super) fn cleanup_leaves_no_trace() -> Result<()> {
    const MARKER: &[u8] = b"in-plain-as-before-there-was-a-mesh";
    let mut ground = Ground::new()?;
    let _server = Server::start(ground.far.netns(), PORT, Habit::Echo)?;
    let pods = [&ground.near, &ground.beside, &ground.far].map(Pod::clone);
    let traces = |pods: &[Pod]| pods.iter().map(trace).collect::<Result<Vec<_>>>();
    let before = traces(&pods)?;
    ground.mesh()?;
    ensure!(
        traces(&pods)? != before,
        "control: an enrolled pod looks like any other"
    );
    ensure!(served(&ground.near, ground.far.at(PORT)), "near is refused");

    let node = ground.world.node(0)?;
    let refused = agent::cleanup(&ground.world, &node)?;
    ensure!(
        !refused.success(),
        "cleanup works beside an agent that runs: {refused:?}"
    );
    for agent in &ground.agents {
        agent.kill9();
    }
    for node in ground.world.nodes() {
        agent::cleanup(&ground.world, &node)?.ok()?;
    }

    let after = traces(&pods)?;
    ensure!(after == before, "before {before:?}, afterwards {after:?}");
    for node in ground.world.nodes() {
        for dir in [ground.world.run_dir(&node), ground.world.bpf_dir(&node)] {
            ensure!(!dir.exists(), "{} is left", dir.display());
        }
    }
    let capture = ground.world.capture_wire(&[MARKER])?;
    let to = ground.far.at(PORT);
    ground.near.run(|| client::exchange(to, MARKER, PATIENCE))?;
    capture.wait_found(0, PATIENCE)?;
    // Once more finds nothing to do, and that is no error.
    for node in ground.world.nodes() {
        agent::cleanup(&ground.world, &node)?.ok()?;
    }
    Ok(())
}

/// A connection that cannot stand yet.
struct Waiting {
    name: String,
    thread: std::thread::JoinHandle<std::io::Result<Vec<u8>>>,
}

impl Waiting {
    fn start(from: &Pod, to: &Pod) -> Result<Self> {
        let name = format!("{} to {}", from.name(), to.name());
        let at = to.at(PORT);
        let thread = from.netns().spawn("waiting", move || {
            client::exchange(at, b"patience", patience(RETRANSMISSIONS))
        })?;
        Ok(Self { name, thread })
    }

    fn is_over(&self) -> bool {
        self.thread.is_finished()
    }

    fn succeeds(self) -> Result<()> {
        let answer = self
            .thread
            .join()
            .map_err(|_| anyhow!("{}: the client panicked", self.name))?
            .with_context(|| format!("{}: the connection that waited", self.name))?;
        ensure!(answer == b"patience", "{}: {answer:?}", self.name);
        Ok(())
    }
}

fn start_again(ground: &mut Ground, node: usize) -> Result<()> {
    let place = ground.world.node(node)?;
    ground.agents[node] = ground.world.start_agent(&place)?;
    Ok(())
}

fn hooks(ground: &Ground) -> Result<Vec<Hooks>> {
    [&ground.near, &ground.beside]
        .iter()
        .map(|pod| Hooks::of(pod.netns()))
        .collect()
}

/// Everything pinned by the agent of a node.
fn left_in(ground: &Ground, node: usize) -> Result<BTreeSet<PathBuf>> {
    fn walk(dir: &Path, found: &mut BTreeSet<PathBuf>) -> Result<()> {
        for entry in fs::read_dir(dir).with_context(|| format!("read {}", dir.display()))? {
            let path = entry?.path();
            if path.is_dir() {
                walk(&path, found)?;
            }
            found.insert(path);
        }
        Ok(())
    }
    let mut found = BTreeSet::new();
    walk(&ground.world.bpf_dir(&ground.world.node(node)?), &mut found)?;
    ensure!(!found.is_empty(), "nothing is pinned");
    Ok(found)
}

/// What an agent may have changed in a pod's namespace.
#[derive(Debug, PartialEq, Eq)]
struct Trace {
    devices: String,
    rules: Vec<String>,
    routes: String,
    hooks: Hooks,
}

fn trace(pod: &Pod) -> Result<Trace> {
    let netns: &Netns = pod.netns();
    let ip =
        |args: &[&str]| -> Result<String> { Ok(pod.output("ip", args, PATIENCE)?.ok()?.stdout) };
    let families: &[&str] = if requirements::ipv6() {
        &["-4", "-6"]
    } else {
        &["-4"]
    };
    Ok(Trace {
        devices: ip(&["-brief", "link"])?,
        rules: families
            .iter()
            .map(|family| ip(&[family, "rule"]))
            .collect::<Result<_>>()?,
        routes: ip(&["route", "show", "table", "all"])?,
        hooks: Hooks::of(netns)?,
    })
}

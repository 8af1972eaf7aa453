//! Hand-overs that go well.

use std::{
    fs,
    io::Write,
    net::Ipv4Addr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};
use nix::sys::signal::Signal;
use picomesh_tests::{
    AgentOptions, Node, PodSpec,
    agent::ADMIN_PORT,
    client::{self, End},
    crowd::{Crowd, Fared},
    hooks::Hooks,
    load::Load,
    server::{Habit, Server},
};

use super::{SOON, ends, succeed};
use crate::ground::{Ground, PATIENCE, PORT, served};

/// Where far pods send without end.
const SOURCE_PORT: u16 = 8081;
/// New connections a second that an agent must bear while it changes.
const PACE: f64 = 500.0;
/// … and in the short version, which may share the machine with another test.
const SHORT_PACE: f64 = 200.0;
/// What an agent says that finds a pod without its listeners.
const LISTENERS_REPAIRED: &str = r#"repaired=["listeners"]"#;
/// What the longest of them may take: one lost SYN costs a second.
const LONGEST: Duration = Duration::from_millis(1_200);

pub(super) fn agents_change_places_under_load_and_nobody_notices() -> Result<()> {
    // The long version is for `--full`. In the short one, too, agents that have handed over live on
    // for longer than a turn of their repairs, 20 s.
    let (hand_overs, lasting, pace) = if std::env::var_os(picomesh_tests::FULL).is_some() {
        (5, Duration::from_secs(60), PACE)
    } else {
        (2, Duration::from_secs(27), SHORT_PACE)
    };
    let mut ground = Ground::new()?;
    let _echoes =
        [&ground.far, &ground.beside].map(|pod| Server::start(pod.netns(), PORT, Habit::Echo));
    let _source = Server::start(ground.far.netns(), SOURCE_PORT, Habit::Source)?;
    let options = AgentOptions::default().arg("--drain-deadline", "2m");
    ground.mesh_with(&options)?;
    let pods = [&ground.near, &ground.beside, &ground.far].map(Clone::clone);
    let hooks =
        || -> Result<Vec<Hooks>> { pods.iter().map(|pod| Hooks::of(pod.netns())).collect() };
    let hooks_before = hooks()?;

    let [near, beside, far] = &pods;
    let talk = Load::on_one_connection(near, far.at(PORT))?;
    let download = Load::download(near, far.at(SOURCE_PORT))?;
    let begun = Instant::now();
    let service = ground.service("far")?.at();
    let crowds = [
        Crowd::start(
            near,
            &[far.at(PORT), far.at6(PORT), service, beside.at(PORT)],
            Duration::from_millis(7),
        )?,
        // Past the tunnels, into the pod's inbound listener.
        Crowd::start(&ground.plain, &[beside.at(PORT)], Duration::from_millis(8))?,
    ];
    let ready = [
        AlwaysReady::watch(&ground.world.node(0)?)?,
        AlwaysReady::watch(&ground.world.node(1)?)?,
    ];

    let pause = lasting / (hand_overs + 1);
    let mut before = Vec::new();
    for number in 1..=hand_overs {
        thread::sleep((pause * number).saturating_sub(begun.elapsed()));
        // The node that calls and the node that is called, in turns.
        let node = (number as usize + 1) % 2;
        before.push(succeed(&mut ground, node, &options)?);
    }
    thread::sleep(lasting.saturating_sub(begun.elapsed()));
    let mut fared = Fared::default();
    for crowd in crowds {
        fared.add(crowd.stop()?);
    }
    eprintln!(
        "{hand_overs} hand-overs in {:?}: {} connections, {:.0} a second, longest {:?}, {} failed",
        fared.took,
        fared.opened,
        fared.per_second(),
        fared.longest,
        fared.failures.len()
    );
    ensure!(
        fared.failures.is_empty(),
        "of {} connections failed: {}{}",
        fared.opened,
        fared.failures.join("; "),
        ground.logs()
    );
    // Who has handed over repairs nothing, least of all the listeners that it gave up.
    for log in fs::read_dir(ground.world.logs())? {
        let path = log?.path();
        let said = fs::read_to_string(&path)?;
        let repaired = said.lines().find(|line| line.contains(LISTENERS_REPAIRED));
        ensure!(repaired.is_none(), "{}: {repaired:?}", path.display());
    }
    ensure!(
        fared.longest < LONGEST,
        "the longest connection took {:?}",
        fared.longest
    );
    // Each crowd counts its own time, so the sum is a little less than the truth.
    ensure!(
        fared.per_second() >= pace,
        "only {:.0} connections a second were opened",
        fared.per_second()
    );
    for watch in ready {
        watch.never_missed()?;
    }
    // What stood before the first hand-over still stands.
    talk.wait_rounds(5)?;
    download.wait_rounds(5)?;
    ensure!(
        before[0].process().exited().is_none(),
        "the first agent ended before its connections"
    );
    talk.stop_unharmed().context("a long conversation")?;
    download.stop_unharmed().context("a long download")?;
    for agent in &before {
        ends(agent)?;
    }
    let hooks_after = hooks()?;
    ensure!(
        hooks_before == hooks_after,
        "the programs changed: {hooks_before:?}, then {hooks_after:?}"
    );
    Ok(())
}

pub(super) fn a_pod_that_comes_meanwhile_is_captured_by_one_of_them() -> Result<()> {
    let mut ground = Ground::new()?;
    let _echo = Server::start(ground.far.netns(), PORT, Habit::Echo)?;
    ground.mesh()?;
    let next = ground
        .world
        .start_agent_with(&ground.world.node(0)?, &AgentOptions::default())?;
    let late = ground.world.pod(&PodSpec::new("late"))?;
    let gone = ground.near.clone();
    let manifest = gone.manifest(&PodSpec::new("near"));
    ground.world.manifests().delete(&manifest)?;
    next.wait_serves(SOON)?;
    next.wait_captured(&late, SOON)?;
    next.wait_pod_state(&gone, &["", "released", "leaving"], SOON)?;
    ensure!(Hooks::of(late.netns())?.are_single(), "not one per hook");
    ensure!(
        served(&late, ground.far.at(PORT)),
        "the new pod is not served: {}",
        next.process().last_words(20)
    );
    let before = std::mem::replace(&mut ground.agents[0], next);
    ends(&before)
}

pub(super) fn connections_that_outlive_the_deadline_are_reset() -> Result<()> {
    let mut ground = Ground::new()?;
    let _echo = Server::start(ground.far.netns(), PORT, Habit::Echo)?;
    let options = AgentOptions::default().arg("--drain-deadline", "5s");
    ground.mesh_with(&options)?;
    let mut stays = ground
        .near
        .run(|| client::connect(ground.far.at(PORT), PATIENCE))?;
    client::ping(&mut stays, b"before")?;
    let before = succeed(&mut ground, 0, &options)?;
    let taken = Instant::now();
    client::ping(&mut stays, b"within the deadline")?;
    let end = client::read_to_end(&mut stays, 2 * PATIENCE)?;
    ensure!(end == End::Reset { read: 0 }, "it ended by {end:?}");
    let after = taken.elapsed();
    ensure!(
        after > Duration::from_secs(3) && after < Duration::from_secs(8),
        "it was reset after {after:?}"
    );
    ends(&before)
}

pub(super) fn sigterm_with_a_successor_hands_over_first_and_a_second_one_cuts() -> Result<()> {
    let mut ground = Ground::new()?;
    let _echo = Server::start(ground.far.netns(), PORT, Habit::Echo)?;
    let options = AgentOptions::default().arg("--drain-deadline", "1m");
    ground.mesh_with(&options)?;
    let crowd = Crowd::start(
        &ground.near,
        &[ground.far.at(PORT)],
        Duration::from_millis(10),
    )?;
    let mut stays = ground
        .near
        .run(|| client::connect(ground.far.at(PORT), PATIENCE))?;
    client::ping(&mut stays, b"before")?;

    let next = ground
        .world
        .start_agent_with(&ground.world.node(0)?, &options)?;
    let before = ground.agent(0)?;
    before.wait_log(&["a successor is here"], SOON)?;
    before.process().signal(Signal::SIGTERM);
    next.wait_serves(SOON)?;
    next.wait_ready(SOON)?;
    let fared = crowd.stop()?;
    ensure!(
        fared.failures.is_empty(),
        "of {} connections failed: {}",
        fared.opened,
        fared.failures.join("; ")
    );
    client::ping(&mut stays, b"while it ends")?;
    ensure!(
        before.process().exited().is_none(),
        "it ended with a connection open"
    );
    let asked = Instant::now();
    before.process().signal(Signal::SIGTERM);
    // The first, if it came before the hand-over was through, was waiting for that.
    before.process().signal(Signal::SIGTERM);
    ends(before)?;
    ensure!(
        asked.elapsed() < Duration::from_secs(3),
        "a second SIGTERM took {:?}",
        asked.elapsed()
    );
    let cut = stays
        .write_all(b"after")
        .and_then(|()| client::read_to_end(&mut stays, PATIENCE));
    ensure!(
        !matches!(cut, Ok(End::Closed { .. } | End::Silent { .. })),
        "a connection that was cut ended by {cut:?}"
    );
    ensure!(served(&ground.near, ground.far.at(PORT)), "not served");
    ground.agents[0] = next;
    Ok(())
}

/// Asks a node for `/ready` without a pause.
struct AlwaysReady {
    stop: Arc<AtomicBool>,
    thread: thread::JoinHandle<(u64, Vec<String>)>,
}

impl AlwaysReady {
    fn watch(node: &Node) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = node.netns().spawn("ready", move || {
            let (mut asked, mut missed) = (0, Vec::new());
            while !stopped.load(Ordering::Relaxed) {
                let to = (Ipv4Addr::LOCALHOST, ADMIN_PORT).into();
                match client::http_get(to, "/ready", PATIENCE) {
                    Ok((200, _)) => {}
                    Ok((status, body)) => missed.push(format!("{asked}: {status} {body}")),
                    Err(e) => missed.push(format!("{asked}: {e:#}")),
                }
                asked += 1;
                thread::sleep(Duration::from_millis(20));
            }
            (asked, missed)
        })?;
        Ok(Self { stop, thread })
    }

    fn never_missed(self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        let (asked, missed) = self.thread.join().map_err(|_| anyhow!("it panicked"))?;
        ensure!(
            asked > 50 && missed.is_empty(),
            "/ready was missed {} of {asked} times: {}",
            missed.len(),
            missed.join("; ")
        );
        Ok(())
    }
}

//! Where a node has no room for two agents the old one ends before the new one starts. Whoever calls
//! in between waits, and nobody is refused.

use std::{
    fs,
    path::{Path, PathBuf},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};
use picomesh_tests::{
    calls::{Call, Calls},
    cluster::Cluster,
    crowd::WORD,
    load::{BEGUN, Load},
    wait,
};

use crate::{
    ground::{Need, PATIENCE, Test, ground},
    install::{NAMESPACE, OwnPod, Part, agent_on, agent_process, diagnosis, wait_installed},
    talk::{Scene, both, wire},
};

pub(crate) const TESTS: &[Test] = &[Test {
    name: "one_by_one::agents_of_which_one_ends_before_the_next_starts_refuse_nobody",
    needs: &[Need::Nodes, Need::Image],
    run: agents_of_which_one_ends_before_the_next_starts_refuse_nobody,
}];

/// From the old agent's end, or from the start of the new one's container, to the first that it
/// serves.
const LONGEST: Duration = Duration::from_secs(3);
/// So exactly the first is seen: whoever waits for a lost SYN waits for seconds.
const EXACT: Duration = Duration::from_millis(50);
/// Of the many, on each node: some more than are counted, for what starting them takes.
const PACE: Duration = Duration::from_nanos(1_000_000_000 / 340);
const SECOND: u32 = 300;
/// At any time, on each node; longer than an agent that ends gives them.
const STREAMS: usize = 50;
const STREAM: Duration = Duration::from_secs(15);
/// Agents that carry a stream, each of which ends once.
const CARRIERS: usize = 2;
/// Instead of half a minute, which an agent takes to end under steady load.
const DRAIN: &str = "PICOMESH_DRAIN_DEADLINE=5s";

fn agents_of_which_one_ends_before_the_next_starts_refuse_nobody() -> Result<()> {
    let ground = ground()?;
    let cluster = ground.own()?;
    let nodes = both(cluster)?;
    let scene = Scene::with(&ground, "one-by-one", Part::AllOneByOne)?;
    let daemon_set = ["daemonset/picomesh-agent", "-n", NAMESPACE];
    let kubectl = ground.kubectl();
    kubectl.run(&[&["set", "env"][..], &daemon_set, &[DRAIN]].concat())?;
    wait_installed(&ground).with_context(|| diagnosis(&ground))?;
    let agents = || -> Result<[OwnPod; 2]> {
        Ok([
            agent_on(&ground, nodes[0].name())?,
            agent_on(&ground, nodes[1].name())?,
        ])
    };
    let before = agents()?;
    let ends = [end_of(cluster, &before[0])?, end_of(cluster, &before[1])?];

    let capture = wire(cluster, &[WORD])?;
    let calls = |every: Duration| -> Result<[Calls; 2]> {
        let calls = |from: usize, to: usize| Calls::start(&scene.pods[from], scene.at[to], every);
        Ok([calls(0, 1)?, calls(1, 0)?])
    };
    let begun = Instant::now();
    let (exact, many) = (calls(EXACT)?, calls(PACE)?);
    let mut streams = Vec::new();
    for (from, to) in [(0, 1), (1, 0)] {
        for _ in 0..STREAMS {
            streams.push(Load::of_streams(&scene.pods[from], scene.at[to], STREAM)?);
        }
    }
    kubectl.run(&[&["rollout", "restart"][..], &daemon_set].concat())?;
    wait_installed(&ground).with_context(|| diagnosis(&ground))?;
    let after = agents()?;
    let starts = [start_of(cluster, &after[0])?, start_of(cluster, &after[1])?];
    // Nobody who is waiting still has anything to wait for.
    thread::sleep(LONGEST);
    let stop = |calls: [Calls; 2]| -> Result<[Vec<Call>; 2]> {
        let [one, other] = calls;
        Ok([one.stop()?, other.stop()?])
    };
    let called = begun.elapsed();
    let (exact, many) = (stop(exact)?, stop(many)?);
    streams.iter().for_each(Load::no_more);
    let streams: Result<Vec<_>> = streams.into_iter().map(Load::stop).collect();
    let streams = streams?;
    let seen = capture.stop()?.found[0];

    let all = || exact.iter().chain(&many).flatten();
    let failures: Vec<String> = all().filter_map(|call| call.failure.clone()).collect();
    eprintln!("{} calls, {} failed", all().count(), failures.len());
    ensure!(
        failures.is_empty(),
        "{} of {} calls failed, the first: {}\n{}",
        failures.len(),
        all().count(),
        failures[..failures.len().min(10)].join("; "),
        diagnosis(&ground)
    );
    let cut = streams
        .iter()
        .map(|stream| stream.failures.len())
        .sum::<usize>();
    eprintln!(
        "{} streams, {cut} cut by the end of an agent",
        streams.len()
    );
    for stream in &streams {
        ensure!(
            stream.failures.len() <= CARRIERS
                && stream
                    .failures
                    .iter()
                    .all(|failure| failure.contains(BEGUN)),
            "a stream was refused, or cut by something else: {:?}",
            stream.failures
        );
    }
    for calls in &many {
        // A machine that cannot do what is promised has shown nothing.
        let pace = calls.len() as f64 / called.as_secs_f64();
        eprintln!("{pace:.0} calls a second");
        ensure!(pace >= f64::from(SECOND), "only {pace:.0} calls a second");
    }
    ensure!(seen == 0, "{seen} packets between the nodes can be read");
    for (index, end) in ends.into_iter().enumerate() {
        let (node, start) = (nodes[index].name(), starts[index]);
        let end = end.join().map_err(|_| anyhow!("the look-out panicked"))??;
        // The control: it was without an agent, and others than before serve it now.
        ensure!(
            before[index].uid != after[index].uid && end < start,
            "{node} was never without an agent: {:?}, then {:?}",
            before[index],
            after[index]
        );
        // Calls of its own pod are accepted by its own agent.
        let first = exact[index].iter().find(|call| call.ended() > start);
        let first = first.with_context(|| format!("on {node} nobody was served again"))?;
        let took = first.ended() - start;
        let waited = exact[index]
            .iter()
            .filter(|call| call.begun < start && call.ended() > start)
            .count();
        eprintln!(
            "{node}: {:?} without an agent, {took:?} to the first call, {waited} waited",
            start - end
        );
        ensure!(
            took < LONGEST,
            "{node}: the first call was served {took:?} after the new agent's start"
        );
        ensure!(waited > 0, "{node}: nobody called while there was no agent");
    }
    scene.is_read_outside_of_the_mesh(&ground)
}

/// Looks out for the end of an agent's process.
fn end_of(cluster: &Cluster, agent: &OwnPod) -> Result<JoinHandle<Result<Instant>>> {
    let process = proc_of(cluster, agent)?;
    let started = started(&process)?;
    let look = move || {
        // Two agents that drain, and end, one after the other.
        let patience = 2 * PATIENCE;
        wait::for_value("the agent ends", patience, || {
            // Its number may be another's by then.
            let there = self::started(&process).is_ok_and(|now| now == started);
            Ok((!there).then(Instant::now))
        })
    };
    let builder = thread::Builder::new().name("look-out".into());
    builder.spawn(look).context("start a thread")
}

/// When the agent's process was started.
fn start_of(cluster: &Cluster, agent: &OwnPod) -> Result<Instant> {
    let started = started(&proc_of(cluster, agent)?)?;
    let uptime = fs::read_to_string("/proc/uptime")?;
    let uptime = uptime.split(' ').next().unwrap_or_default();
    let uptime = Duration::from_secs_f64(uptime.parse().context("/proc/uptime")?);
    let age = uptime.saturating_sub(started);
    Instant::now()
        .checked_sub(age)
        .context("older than the clock")
}

fn proc_of(cluster: &Cluster, agent: &OwnPod) -> Result<PathBuf> {
    Ok(format!("/proc/{}", agent_process(cluster, &agent.uid)?).into())
}

/// Since the machine's start, to a hundredth of a second.
fn started(process: &Path) -> Result<Duration> {
    let stat = fs::read_to_string(process.join("stat"))?;
    // After the name, which may hold anything; the 22nd field of all.
    let fields = stat.rsplit_once(')').context("no name")?.1;
    let ticks = fields.split_ascii_whitespace().nth(19);
    let ticks: u64 = ticks.context("no start")?.parse()?;
    Ok(Duration::from_millis(ticks * 10))
}

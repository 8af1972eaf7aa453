//! Agents, kubelets and runtimes go and come, in order and without: connections go on, and nothing
//! is ever said in plain.

use std::{thread, time::Duration};

use anyhow::{Context, Result, ensure};
use picomesh_tests::{
    capture::Capture,
    cluster::{Node, TOOLS},
    crowd::{Crowd, Fared, WORD},
    load::Load,
    wait,
};

use crate::{
    ground::{Ground, Need, PATIENCE, Test, ground, slowly},
    install::{
        NAMESPACE, agent_on, diagnosis, end_processes, log_of, remove_by_force, wait_another,
        wait_captured, wait_installed,
    },
    talk::{Scene, both, wire},
};

pub(crate) const TESTS: &[Test] = &[
    Test {
        name: "lifecycle::agents_are_rolled_under_load_and_nobody_notices",
        needs: &[Need::Nodes, Need::Image],
        run: agents_are_rolled_under_load_and_nobody_notices,
    },
    Test {
        name: "lifecycle::whatever_a_node_loses_nothing_is_said_in_plain",
        needs: &[Need::Nodes, Need::Image],
        run: whatever_a_node_loses_nothing_is_said_in_plain,
    },
];

/// New connections a second, and streams at any time, on each node.
const PACE: u32 = 300;
const STREAMS: usize = 50;
/// What the longest new connection may take: one lost SYN costs a second.
const LONGEST: Duration = Duration::from_millis(1_200);
/// Less than an agent that has handed over gives its connections.
const STREAM: Duration = Duration::from_secs(8);

fn agents_are_rolled_under_load_and_nobody_notices() -> Result<()> {
    let ground = ground()?;
    let [near, far] = both(ground.own()?)?;
    let scene = Scene::new(&ground, "rolled")?;
    let before = [
        agent_on(&ground, near.name())?,
        agent_on(&ground, far.name())?,
    ];

    let capture = wire(ground.own()?, &[WORD])?;
    let crowds = crowds(&scene)?;
    let mut all = Vec::new();
    for (from, to) in [(0, 1), (1, 0)] {
        for _ in 0..STREAMS {
            all.push(Load::of_streams(&scene.pods[from], scene.at[to], STREAM)?);
        }
    }
    let daemon_set = ["daemonset/picomesh-agent", "-n", NAMESPACE];
    let kubectl = ground.kubectl();
    kubectl.run(&[&["rollout", "restart"][..], &daemon_set].concat())?;
    wait_installed(&ground).with_context(|| diagnosis(&ground))?;
    let between = [
        agent_on(&ground, near.name())?,
        agent_on(&ground, far.name())?,
    ];
    let change = ["PICOMESH_LOG=info"];
    kubectl.run(&[&["set", "env"][..], &daemon_set, &change].concat())?;
    wait_installed(&ground).with_context(|| diagnosis(&ground))?;
    let after = [
        agent_on(&ground, near.name())?,
        agent_on(&ground, far.name())?,
    ];
    // Whoever was succeeded is still there, and its last streams have to finish.
    thread::sleep(STREAM);

    let (mut fared, mut slowest) = (Fared::default(), f64::INFINITY);
    for crowd in crowds {
        let one = crowd.stop()?;
        slowest = slowest.min(one.per_second());
        fared.add(one);
    }
    eprintln!(
        "two rolls in {:?}: {} connections, {:.0} a second, longest {:?}, {} failed",
        fared.took,
        fared.opened,
        fared.per_second(),
        fared.longest,
        fared.failures.len()
    );
    ensure!(
        fared.failures.is_empty(),
        "of {} connections failed: {}\n{}",
        fared.opened,
        fared.failures.join("; "),
        diagnosis(&ground)
    );
    ensure!(
        fared.longest < LONGEST,
        "a connection took {:?}",
        fared.longest
    );
    all.iter().for_each(Load::no_more);
    for stream in all {
        stream.stop_unharmed().context("a stream was cut")?;
    }
    let seen = capture.stop()?.found[0];
    ensure!(seen == 0, "{seen} packets between the nodes can be read");

    // The controls: all agents were others, each time; and those of now carry what is said now.
    for node in 0..2 {
        let uids = [&before[node], &between[node], &after[node]].map(|agent| &agent.uid);
        ensure!(
            uids[0] != uids[1] && uids[1] != uids[2],
            "no other agents: {uids:?}"
        );
    }
    // A machine that cannot do what is promised has shown nothing.
    ensure!(
        slowest >= f64::from(PACE),
        "on one node only {slowest:.0} of {PACE} connections a second were opened"
    );
    scene.speak()?;
    carries(&ground, near)?;
    carries(&ground, far)?;
    scene.is_read_outside_of_the_mesh(&ground)
}

/// New connections from each node's pod to the other's, some more than `PACE`: clients lose some
/// of their time.
fn crowds(scene: &Scene) -> Result<Vec<Crowd>> {
    // So many a client can do even where the machine is busy.
    const ONE: u32 = 50;
    let every = Duration::from_secs(1) / ONE;
    let crowd = |from: usize, to: usize| {
        let clients = (PACE * 4 / 3).div_ceil(ONE);
        let targets = vec![scene.at[to]; clients as usize];
        Crowd::start(&scene.pods[from], &targets, every)
    };
    Ok(vec![crowd(0, 1)?, crowd(1, 0)?])
}

/// The node's agent has told of a connection.
fn carries(ground: &Ground, node: &Node) -> Result<()> {
    let name = node.name();
    wait::for_value(&format!("{name}'s agent carries"), PATIENCE, || {
        let log = slowly(log_of(ground, name))?;
        let told = log.contains("connection complete");
        slowly(told.then_some(()).context("it tells of none")).map(Some)
    })
}

fn whatever_a_node_loses_nothing_is_said_in_plain() -> Result<()> {
    let ground = ground()?;
    let cluster = ground.own()?;
    let [near, _] = both(cluster)?;
    let scene = Scene::new(&ground, "lost")?;
    let capture = wire(cluster, &[WORD])?;

    // An agent that nobody lets say goodbye.
    let before = agent_on(&ground, near.name())?;
    let tried = tries(&scene)?;
    remove_by_force(&ground, &before)?;
    wait_another(&ground, near.name(), &before).with_context(|| diagnosis(&ground))?;
    is_whole(&ground, &scene, &capture, "an agent is removed by force")?;
    drop(tried);

    // The node's programs without the agent: its connections go on as if nothing were.
    let before = agent_on(&ground, near.name())?;
    let undisturbed = Load::of_connections(&scene.pods[0], scene.at[1])?;
    near.kubelet().kill();
    near.containerd().kill();
    undisturbed.wait_rounds(100)?;
    near.restart()?;
    newcomer(&ground, &scene, near, "after-runtime")?;
    undisturbed
        .stop_unharmed()
        .context("while kubelet and runtime were away")?;
    let after = agent_on(&ground, near.name())?;
    ensure!(before == after, "the agent was made anew: {after:?}");
    is_whole(&ground, &scene, &capture, "kubelet and runtime are away")?;

    // All of it, as in a reboot; the pods alone go on.
    let tried = tries(&scene)?;
    near.kubelet().kill();
    near.containerd().kill();
    remove_by_force(&ground, &before)?;
    let killed = end_processes(&ground, &before)?;
    ensure!(killed > 0, "the agent had no process to kill");
    thread::sleep(Duration::from_secs(2));
    let alone = capture.found(0);
    ensure!(alone == 0, "without an agent {alone} packets can be read");
    ensure!(
        scene.speak().is_err(),
        "pods of the mesh reach each other without an agent"
    );
    near.restart()?;
    wait_another(&ground, near.name(), &before).with_context(|| diagnosis(&ground))?;
    newcomer(&ground, &scene, near, "after-all")?;
    is_whole(&ground, &scene, &capture, "the node loses everything")?;
    drop(tried);

    let seen = capture.stop()?.found[0];
    ensure!(seen == 0, "{seen} packets between the nodes can be read");
    scene.is_read_outside_of_the_mesh(&ground)
}

/// Connections that are tried all the time in both directions, whatever becomes of them.
fn tries(scene: &Scene) -> Result<Vec<Crowd>> {
    let rarely = Duration::from_millis(200);
    [(0, 1), (1, 0)]
        .map(|(from, to)| Crowd::start(&scene.pods[from], &[scene.at[to]; 4], rarely))
        .into_iter()
        .collect()
}

/// A pod that is new on the node is captured, and speaks.
fn newcomer(ground: &Ground, scene: &Scene, node: &Node, name: &str) -> Result<()> {
    let host = scene.at[1].ip().to_string();
    let port = scene.at[1].port().to_string();
    let script = format!(
        "echo {} | nc -w 5 {host} {port} | grep picomesh",
        String::from_utf8_lossy(WORD)
    );
    let command = ["/bin/sh", "-c", &script];
    scene.space.pod(name, node.name(), TOOLS, &command)?;
    scene.space.wait_succeeded(name)?;
    scene.space.kubectl(&["delete", "pod", name])?;
    wait_captured(ground, 2).with_context(|| diagnosis(ground))
}

/// Every pod is captured and reached, and nothing could be read until now.
fn is_whole(ground: &Ground, scene: &Scene, capture: &Capture, when: &str) -> Result<()> {
    wait_captured(ground, 2)
        .with_context(|| diagnosis(ground))
        .context(when.to_owned())?;
    scene.wait_speaks().context(when.to_owned())?;
    let seen = capture.found(0);
    ensure!(seen == 0, "{when}: {seen} packets can be read");
    Ok(())
}

//! Restarts: an agent that was killed at any moment is followed by one that goes on where it was,
//! of the same build or of another, and in between nothing is plain and nobody is let in.

use std::{
    fs,
    net::SocketAddr,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};
use picomesh_tests::{
    AgentOptions, Pod, PodSpec, World, agent, client,
    hooks::Hooks,
    manifest,
    server::{Habit, Server},
    wait,
};

use crate::{
    ground::{Ground, PATIENCE, PORT, served},
    harness::{Need, Test},
};

pub(crate) const TESTS: &[Test] = &[
    Test {
        name: "restart::twenty_kills_under_load_send_nothing_plain_and_let_nobody_in",
        needs: &[Need::Mesh],
        run: twenty_kills_under_load_send_nothing_plain_and_let_nobody_in,
    },
    Test {
        name: "restart::fifty_pods_are_served_again_within_a_second",
        needs: &[Need::Mesh, Need::Alone],
        run: fifty_pods_are_served_again_within_a_second,
    },
    Test {
        name: "restart::other_builds_and_layouts_take_over_in_both_orders",
        needs: &[Need::Mesh],
        run: other_builds_and_layouts_take_over_in_both_orders,
    },
];

const KILLS: usize = 20;
/// Forbidden to clients without an identity.
const DOOR: u16 = 8081;
/// Forbidden to everybody by a NetworkPolicy.
const VAULT: u16 = 8082;
const MARKER: &[u8] = b"said-under-twenty-kills";
const FORBIDDEN: &[u8] = b"said-by-a-forbidden-client";
/// Each forbidden client is so many threads; one alone would wait for an answer too long.
const TRIERS: u32 = 6;
/// Of one thread: fifty tries a second together.
const BETWEEN_TRIES: Duration = Duration::from_millis(120);

/// When nothing is promised: from a kill until all agents are ready again. Even: quiet.
#[derive(Default)]
struct Times(AtomicU64);

impl Times {
    fn trouble(&self) {
        self.0.fetch_or(1, Ordering::SeqCst);
    }

    fn quiet(&self) {
        if self.now() % 2 == 1 {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn now(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }
}

/// What became of connections to one server.
#[derive(Default)]
struct Load {
    /// Dialled while all agents were ready.
    carried: u64,
    /// Dialled and failed within one quiet time.
    failures: Vec<String>,
}

fn load(to: SocketAddr, times: &Times, stop: &AtomicBool) -> Load {
    let mut load = Load::default();
    while !stop.load(Ordering::Relaxed) {
        let dialled = times.now();
        let answer = client::exchange(to, MARKER, PATIENCE);
        let quiet = dialled.is_multiple_of(2) && times.now() == dialled;
        match answer {
            Ok(answer) if answer == MARKER => load.carried += u64::from(dialled.is_multiple_of(2)),
            Ok(answer) if quiet => load.failures.push(format!(
                "{to}: {} of {} bytes came back",
                answer.len(),
                MARKER.len()
            )),
            Err(error) if quiet => load.failures.push(format!("{to}: {error}")),
            // What stands when an agent is killed ends, and so may what is opened then.
            Ok(_) | Err(_) => {}
        }
        thread::sleep(Duration::from_millis(2));
    }
    load
}

/// How often, and how often something came back.
#[derive(Default)]
struct Tries {
    all: AtomicU64,
    answered: AtomicU64,
}

fn try_often(door: SocketAddr, tries: &Tries, stop: &AtomicBool) {
    let mut next = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        let answer = client::exchange(door, FORBIDDEN, Duration::from_millis(100));
        if answer.is_ok_and(|bytes| !bytes.is_empty()) {
            tries.answered.fetch_add(1, Ordering::Relaxed);
        }
        tries.all.fetch_add(1, Ordering::Relaxed);
        next = (next + BETWEEN_TRIES).max(Instant::now() - BETWEEN_TRIES);
        thread::sleep(next.saturating_duration_since(Instant::now()));
    }
}

fn twenty_kills_under_load_send_nothing_plain_and_let_nobody_in() -> Result<()> {
    let mut ground = Ground::with(|spec| {
        spec.annotation(
            "config.picomesh.io/default-inbound-policy",
            "all-authenticated",
        )
    })?;
    let everybody_but_the_vault = serde_json::json!({
        "podSelector": {
            "matchExpressions": [{"key": "app", "operator": "In", "values": ["far", "beside"]}],
        },
        "policyTypes": ["Ingress"],
        "ingress": [{"ports": [{"port": PORT}, {"port": DOOR}]}],
    });
    let policy = manifest::network_policy("mesh", "vault", everybody_but_the_vault);
    ground.world.manifests().apply(&policy)?;
    let _servers =
        [&ground.far, &ground.beside].map(|pod| Server::start(pod.netns(), PORT, Habit::Echo));
    // Nobody but the forbidden clients calls here.
    let doors = [
        Server::start(ground.far.netns(), DOOR, Habit::Echo)?,
        Server::start(ground.far.netns(), VAULT, Habit::Echo)?,
        Server::start(ground.beside.netns(), VAULT, Habit::Echo)?,
    ];
    let (near, plain) = (ground.near.clone(), ground.plain.clone());
    let outsider = ground.world.outsider()?;
    let forbidden = [
        (&plain, ground.far.at(DOOR)),
        (&outsider, ground.far.at(DOOR)),
        (&near, ground.far.at(VAULT)),
        (&near, ground.beside.at(VAULT)),
    ];
    let targets = [
        ground.far.at(PORT),
        ground.far.at6(PORT),
        ground.beside.at(PORT),
    ];

    // Without the mesh everybody is served, and the search finds it.
    let capture = ground.world.capture_wire(&[MARKER, FORBIDDEN])?;
    let allowed = (&near, ground.far.at(PORT), MARKER);
    let forbidden_ones = forbidden.iter().map(|(from, to)| (*from, *to, FORBIDDEN));
    for (from, to, words) in forbidden_ones.chain([allowed]) {
        from.run(|| client::exchange(to, words, PATIENCE))
            .with_context(|| format!("{} to {to} without the mesh", from.name()))?;
    }
    for marker in [0, 1] {
        capture.wait_found(marker, PATIENCE)?;
    }
    capture.stop()?;

    ground.mesh()?;
    let before = pins(&ground)?;
    let capture = ground.world.capture_wire(&[MARKER])?;
    let (stop, times) = (AtomicBool::new(false), Times::default());
    let tries = forbidden.map(|_| Tries::default());
    let accepted = || doors.iter().map(Server::accepted).collect::<Vec<_>>();
    let accepted_before = accepted();
    let begun = Instant::now();
    let loads = thread::scope(|scope| -> Result<Vec<Load>> {
        let loads = targets.map(|to| {
            let (near, stop, times) = (&near, &stop, &times);
            scope.spawn(move || near.run(|| load(to, times, stop)))
        });
        for ((from, door), tries) in forbidden.iter().zip(&tries) {
            for trier in 0..TRIERS {
                let stop = &stop;
                scope.spawn(move || {
                    thread::sleep(BETWEEN_TRIES * trier / TRIERS);
                    from.run(|| try_often(*door, tries, stop));
                });
            }
        }
        let result = kill_often(&mut ground, &targets, &times);
        stop.store(true, Ordering::Relaxed);
        result?;
        loads
            .into_iter()
            .map(|load| load.join().map_err(|_| anyhow!("a client panicked")))
            .collect()
    })?;
    let lasted = begun.elapsed();

    for (to, load) in targets.iter().zip(&loads) {
        ensure!(
            load.failures.is_empty(),
            "of connections opened while all agents were ready {} failed, {} did not: {}{}",
            load.failures.len(),
            load.carried,
            load.failures.join("; "),
            ground.logs()
        );
        ensure!(
            load.carried > 5 * KILLS as u64,
            "{to}: only {} connections were opened between the kills",
            load.carried
        );
    }
    let seen = capture.stop()?;
    ensure!(
        seen.found[0] == 0,
        "the marker is on the wire in plain, {} times",
        seen.found[0]
    );
    for ((from, door), tries) in forbidden.iter().zip(tries) {
        let (all, answered) = (tries.all.into_inner(), tries.answered.into_inner());
        let name = from.name();
        ensure!(
            answered == 0,
            "of {all} tries of {name} at {door} {answered} got an answer"
        );
        // Meant are fifty; a busy machine may take some of them.
        let a_second = all as f64 / lasted.as_secs_f64();
        ensure!(
            a_second > 25.0,
            "{name} tried {door} only {a_second:.0} times a second"
        );
    }
    let accepted_now = accepted();
    ensure!(
        accepted_now == accepted_before,
        "the applications accepted forbidden clients: {accepted_before:?}, then {accepted_now:?}"
    );
    ensure!(
        pins(&ground)? == before,
        "after {KILLS} kills the pins are others"
    );
    Ok(())
}

/// Kills one agent or both at a moment that nobody chose, starts the next, and asks for service.
fn kill_often(ground: &mut Ground, targets: &[SocketAddr], times: &Times) -> Result<()> {
    for kill in 0..KILLS {
        thread::sleep(Duration::from_millis(100 + any_below(400)));
        let victims: &[usize] = [&[0][..], &[1], &[0, 1]][any_below(3) as usize];
        times.trouble();
        for victim in victims {
            ground.agent(*victim)?.kill9();
        }
        thread::sleep(Duration::from_millis(any_below(150)));
        for victim in victims {
            let node = ground.world.node(*victim)?;
            let next = ground
                .world
                .start_agent_with(&node, &AgentOptions::default())?;
            ground.agents[*victim] = next;
        }
        if kill % 4 == 1 {
            // Some are killed while they start.
            continue;
        }
        for agent in &ground.agents {
            agent.wait_ready(4 * PATIENCE)?;
        }
        times.quiet();
        for to in targets {
            ensure!(
                served(&ground.near, *to),
                "{to} is not served after kill {kill} of {victims:?}{}",
                ground.logs()
            );
        }
        for pod in [&ground.near, &ground.beside, &ground.far] {
            let hooks = Hooks::of(pod.netns())?;
            ensure!(
                hooks.are_single(),
                "{} has {hooks:?} after kill {kill}",
                pod.name()
            );
        }
    }
    Ok(())
}

/// A number that nobody chose.
fn any_below(limit: u64) -> u64 {
    use std::hash::{BuildHasher, Hasher, RandomState};
    RandomState::new().build_hasher().finish() % limit
}

const PODS: usize = 50;

fn fifty_pods_are_served_again_within_a_second() -> Result<()> {
    let world = World::new(1)?;
    world.namespace("mesh", Some("enabled"))?;
    let pods = (0..PODS)
        .map(|number| world.pod(&PodSpec::new(&format!("pod{number}"))))
        .collect::<Result<Vec<_>>>()?;
    let node = world.node(0)?;
    let agent = world.start_agent(&node)?;
    wait::for_value("all pods are captured", 6 * PATIENCE, || {
        let captured = agent.captured_pods()?;
        ensure!(captured == PODS, "{captured} of {PODS} are captured");
        Ok(Some(()))
    })?;
    let slots = slots(&agent, &pods)?;
    // Behind the gateway, or nobody would answer the question for its neighbour.
    let elsewhere: SocketAddr = "10.250.0.9:9".parse()?;
    wait::until(
        "control: with an agent a captured connection stands",
        PATIENCE,
        || is_captured(&pods[0], elsewhere),
    )?;
    agent.kill9();
    ensure!(
        !is_captured(&pods[0], elsewhere),
        "control: without an agent a captured connection stands"
    );

    let start = Instant::now();
    let next = world.start_agent_with(&node, &AgentOptions::default())?;
    for pod in &pods {
        while !is_captured(pod, elsewhere) {
            ensure!(
                start.elapsed() < 4 * PATIENCE,
                "{} is not captured again: {}",
                pod.name(),
                next.process().last_words(20)
            );
        }
    }
    let took = start.elapsed();
    // Without optimisation the start alone takes as long.
    let optimised = agent::binary()?
        .components()
        .any(|c| c.as_os_str() == "release");
    let limit = if optimised { 1_000 } else { 3_000 };
    ensure!(
        took < Duration::from_millis(limit),
        "{PODS} pods were captured again after {took:?}"
    );
    next.wait_ready(4 * PATIENCE)?;
    ensure!(
        self::slots(&next, &pods)? == slots,
        "pods have other slots than before"
    );
    for pod in &pods {
        let hooks = Hooks::of(pod.netns())?;
        ensure!(hooks.are_single(), "{} has {hooks:?}", pod.name());
    }
    Ok(())
}

/// A listener of the agent's answers for every address; without one nobody does.
fn is_captured(pod: &Pod, to: SocketAddr) -> bool {
    pod.run(|| client::connect(to, Duration::from_millis(40)))
        .is_ok()
}

fn slots(agent: &picomesh_tests::Agent, pods: &[Pod]) -> Result<Vec<Option<u64>>> {
    let all = agent.debug_json(&["pods"])?;
    let all = all
        .as_array()
        .or_else(|| all["pods"].as_array())
        .context("no list of pods")?;
    Ok(pods
        .iter()
        .map(|pod| {
            all.iter()
                .find(|shown| shown["uid"] == pod.uid())
                .and_then(|shown| shown["slot"].as_u64())
        })
        .collect())
}

fn other_builds_and_layouts_take_over_in_both_orders() -> Result<()> {
    const PLAIN: &[u8] = b"never-in-plain-between-builds";
    let mut ground = Ground::new()?;
    let _server = Server::start(ground.far.netns(), PORT, Habit::Echo)?;
    let to = ground.far.at(PORT);
    // Stood before there was a mesh, so no build touches it.
    let mut standing = ground.near.run(|| client::connect(to, PATIENCE))?;
    client::ping(&mut standing, b"before the mesh")?;
    let capture = ground.world.capture_wire(&[PLAIN])?;
    ground
        .near
        .run(|| client::exchange(to, PLAIN, PATIENCE))
        .context("control, without the mesh")?;
    capture.wait_found(0, PATIENCE)?;
    capture.stop()?;

    let testing = |generation: &str| -> Result<AgentOptions> {
        Ok(AgentOptions {
            binary: Some(agent::testing_binary()?),
            ..AgentOptions::default().env("PICOMESH_TEST_GENERATION", generation)
        })
    };
    let layout = picomesh_common::config::LAYOUT;
    let own = format!("{layout}/");
    ground.mesh_with(&testing(&own)?)?;
    let capture = ground.world.capture_wire(&[PLAIN])?;
    let (older, newer) = (layout - 1, layout + 1);
    for generation in [
        format!("{layout}/other"),
        own.clone(),
        format!("{newer}/"),
        own.clone(),
        format!("{older}/"),
        own,
    ] {
        let mut taken = ground.near.run(|| client::connect(to, PATIENCE))?;
        client::ping(&mut taken, PLAIN)?;
        for agent in &ground.agents {
            agent.kill9();
        }
        ground.agents.clear();
        // An application that does not know yet that nobody carries it any more.
        let _may_fail = client::ping(&mut taken, PLAIN);
        ground
            .mesh_with(&testing(&generation)?)
            .with_context(|| format!("build {generation}"))?;
        wait::for_value(
            &format!("build {generation} has taken over"),
            4 * PATIENCE,
            || {
                for pod in [&ground.near, &ground.beside, &ground.far] {
                    let hooks = Hooks::of(pod.netns())?;
                    ensure!(hooks.are_single(), "{} has {hooks:?}", pod.name());
                }
                for node in ground.world.nodes() {
                    let dir = ground.world.bpf_dir(&node);
                    let layouts: Vec<_> = fs::read_dir(&dir)?
                        .flatten()
                        .map(|entry| entry.file_name().to_string_lossy().into_owned())
                        .collect();
                    let (number, _name) = generation.split_once('/').unwrap_or_default();
                    ensure!(layouts == [format!("v{number}")], "pins of {layouts:?}");
                }
                Ok(Some(()))
            },
        )
        .with_context(|| ground.logs())?;
        for at in [to, ground.far.at6(PORT)] {
            ensure!(
                served(&ground.near, at),
                "{at} is not served by build {generation}{}",
                ground.logs()
            );
        }
        client::ping(&mut standing, b"still the same").with_context(|| {
            format!(
                "what stood before the mesh, after build {generation}{}",
                ground.logs()
            )
        })?;
    }
    let seen = capture.stop()?;
    ensure!(
        seen.found[0] == 0,
        "the marker is on the wire in plain, {} times",
        seen.found[0]
    );
    Ok(())
}

/// Names of everything pinned, on both nodes.
fn pins(ground: &Ground) -> Result<Vec<String>> {
    fn walk(dir: &std::path::Path, found: &mut Vec<String>) -> Result<()> {
        for entry in fs::read_dir(dir).with_context(|| format!("read {}", dir.display()))? {
            let path = entry?.path();
            if path.is_dir() {
                walk(&path, found)?;
            }
            found.push(path.display().to_string());
        }
        Ok(())
    }
    let mut found = Vec::new();
    for node in ground.world.nodes() {
        walk(&ground.world.bpf_dir(&node), &mut found)?;
    }
    found.sort();
    Ok(found)
}

//! A label comes and goes while pods on two nodes talk: nothing that stands is cut, and what is new
//! is refused for a moment at most, and only where a policy wants proof of who calls.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use picomesh_tests::{
    calls::{Call, Calls},
    cluster::TOOLS,
    crowd::WORD,
    load::Load,
    wait,
};

use crate::{
    ground::{Ground, Need, PATIENCE, Test, ground, slowly},
    install::{Part, diagnosis, log_of, wait_captured},
    talk::{SLEEP, Scene, both, label, wire},
};

pub(crate) const TESTS: &[Test] = &[
    Test {
        name: "labels::no_connection_notices_a_label_that_comes_and_goes",
        needs: &[Need::Nodes, Need::Image],
        run: no_connection_notices_a_label_that_comes_and_goes,
    },
    Test {
        name: "labels::who_must_be_known_is_refused_for_two_seconds_at_most_and_told_why",
        needs: &[Need::Nodes, Need::Image],
        run: who_must_be_known_is_refused_for_two_seconds_at_most_and_told_why,
    },
    Test {
        name: "labels::a_namespace_that_is_made_again_is_captured_again",
        needs: &[Need::Nodes, Need::Image],
        run: a_namespace_that_is_made_again_is_captured_again,
    },
];

/// Between two new connections of a pod.
const PACE: Duration = Duration::from_millis(20);
/// How long new ones may be refused while a label spreads.
const LONGEST: Duration = Duration::from_secs(2);
const ROUNDS: usize = 3;
/// Longer than that: what is wrong after a change shows.
const AFTER: Duration = Duration::from_secs(4);

fn no_connection_notices_a_label_that_comes_and_goes() -> Result<()> {
    let ground = ground()?;
    let mut scene = Scene::without_mesh(&ground, "labels")?;
    scene.install(&ground, Part::All)?;
    let calls = calls(&scene)?;
    let mut standing = streams(&scene)?;
    for _ in 0..ROUNDS {
        label(&scene.space, "enabled")?;
        wait_captured(&ground, 2).with_context(|| diagnosis(&ground))?;
        // The control, here and below: the calls do go another way.
        wait_carried(&ground)?;
        thread::sleep(AFTER);
        standing.extend(streams(&scene)?);
        label(&scene.space, "disabled")?;
        wait_captured(&ground, 0).with_context(|| diagnosis(&ground))?;
        wait_read(&ground)?;
        thread::sleep(AFTER);
        standing.extend(streams(&scene)?);
    }
    let calls = stop(calls)?;
    let failed: Vec<String> = failed(&calls).map(told).collect();
    eprintln!("{} calls, {} failed", calls.len(), failed.len());
    ensure!(
        failed.is_empty(),
        "of {} new connections {} failed, the first: {}\n{}",
        calls.len(),
        failed.len(),
        failed[..failed.len().min(10)].join("; "),
        diagnosis(&ground)
    );
    for (index, stream) in standing.into_iter().enumerate() {
        // Some were plain at first and some were carried, and all have met a change.
        let stood = stream.stop_unharmed();
        stood.with_context(|| format!("stream {index}, in the order in which they began"))?;
    }
    Ok(())
}

fn who_must_be_known_is_refused_for_two_seconds_at_most_and_told_why() -> Result<()> {
    let ground = ground()?;
    let cluster = ground.own()?;
    let [near, _] = both(cluster)?;
    let mut scene = Scene::without_mesh(&ground, "labels-strict")?;
    let outside = ground.namespace("labels-stranger")?;
    outside.pod("stranger", near.name(), TOOLS, SLEEP)?;
    outside.wait_ready("stranger")?;
    let stranger = outside.netns(cluster, "stranger")?;
    scene.install(&ground, Part::All)?;
    let policy = "config.picomesh.io/default-inbound-policy=all-authenticated";
    scene
        .space
        .kubectl(&["annotate", "namespace", scene.space.name(), policy])?;

    for word in ["enabled", "disabled", "enabled", "disabled"] {
        let standing = streams(&scene)?;
        let calls = calls(&scene)?;
        let strangers = Calls::start(&stranger, scene.at[1], PACE)?;
        thread::sleep(Duration::from_secs(1));
        label(&scene.space, word)?;
        let meshed = word == "enabled";
        wait_captured(&ground, if meshed { 2 } else { 0 }).with_context(|| diagnosis(&ground))?;
        thread::sleep(AFTER);
        let calls = stop(calls)?;
        let last = last_second(&calls);
        ensure!(
            last.iter().any(|call| call.failure.is_none()),
            "{word}: nobody calls any more"
        );

        let refused: Vec<&Call> = failed(&calls).collect();
        let span = span(&refused);
        eprintln!(
            "{word}: {} calls, {} refused within {span:?}",
            calls.len(),
            refused.len()
        );
        ensure!(
            span <= LONGEST,
            "{word}: new connections were refused for {span:?}: {}\n{}",
            refused
                .iter()
                .map(|call| told(call))
                .take(10)
                .collect::<Vec<_>>()
                .join("; "),
            diagnosis(&ground)
        );
        told_why(&ground, &refused, "").with_context(|| word.to_owned())?;
        for stream in standing {
            stream
                .stop_unharmed()
                .with_context(|| format!("a stream while the label became {word}"))?;
        }

        // The control: the policy is in force while they are in the mesh, and whoever has no identity
        // is refused by it to the last, with that reason; without the mesh nobody is.
        let strangers = strangers.stop()?;
        let last = last_second(&strangers);
        ensure!(
            !last.is_empty() && last.iter().all(|call| call.failure.is_some() == meshed),
            "{word}: of the stranger's last {} calls {} failed",
            last.len(),
            failed(&last).count()
        );
        if meshed {
            told_why(
                &ground,
                &failed(&last).collect::<Vec<_>>(),
                "unauthenticated",
            )?;
        }
    }
    Ok(())
}

fn a_namespace_that_is_made_again_is_captured_again() -> Result<()> {
    let ground = ground()?;
    let mut scene = Scene::new(&ground, "again")?;
    scene.is_carried(&ground)?;

    // The control: nobody is in the mesh for what a namespace of that name once said.
    scene.make_again(&ground, false)?;
    wait_captured(&ground, 0).with_context(|| diagnosis(&ground))?;
    scene.is_read(&ground)?;
    label(&scene.space, "enabled")?;
    wait_captured(&ground, 2).with_context(|| diagnosis(&ground))?;
    scene.wait_speaks()?;
    scene.is_carried(&ground)?;

    scene.make_again(&ground, true)?;
    wait_captured(&ground, 2).with_context(|| diagnosis(&ground))?;
    scene.wait_speaks()?;
    scene.is_carried(&ground)?;
    scene.is_read_outside_of_the_mesh(&ground)
}

/// New connections from each pod to the other.
fn calls(scene: &Scene) -> Result<[Calls; 2]> {
    let calls = |from: usize, to: usize| Calls::start(&scene.pods[from], scene.at[to], PACE);
    Ok([calls(0, 1)?, calls(1, 0)?])
}

fn stop(calls: [Calls; 2]) -> Result<Vec<Call>> {
    let mut all = Vec::new();
    for one in calls {
        all.extend(one.stop()?);
    }
    all.sort_by_key(Call::ended);
    Ok(all)
}

/// A connection in each direction, with words all the time.
fn streams(scene: &Scene) -> Result<Vec<Load>> {
    [(0, 1), (1, 0)]
        .map(|(from, to)| Load::on_one_connection(&scene.pods[from], scene.at[to]))
        .into_iter()
        .collect()
}

fn failed(calls: &[Call]) -> impl Iterator<Item = &Call> {
    calls.iter().filter(|call| call.failure.is_some())
}

fn told(call: &Call) -> String {
    let why = call.failure.as_deref().unwrap_or("nothing");
    format!("{:?} after {:?}: {why}", call.from, call.took)
}

/// From the first one's first packet to the last one's end.
fn span(calls: &[&Call]) -> Duration {
    let first: Option<Instant> = calls.iter().map(|call| call.begun).min();
    let last = calls.iter().map(|call| call.ended()).max();
    first
        .zip(last)
        .map_or(Duration::ZERO, |(first, last)| last - first)
}

/// Those that began in the last second.
fn last_second(calls: &[Call]) -> Vec<Call> {
    let last = calls.iter().map(|call| call.begun).max();
    let late = |call: &&Call| last.is_some_and(|last| last - call.begun < Duration::from_secs(1));
    calls.iter().filter(late).cloned().collect()
}

/// Each of these has a line in an access log, with its own address and a reason, which begins so.
fn told_why(ground: &Ground, refused: &[&Call], reason: &str) -> Result<()> {
    let reason = format!(" error=\"{reason}");
    wait::for_value("every refusal is told with its reason", PATIENCE, || {
        let mut log = String::new();
        for node in ground.nodes()? {
            log.push_str(&slowly(log_of(ground, &node))?);
        }
        let silent = refused.iter().find(|call| {
            let from = call.from.map(|from| format!(" src.addr={from} "));
            !from.is_some_and(|from| {
                log.lines()
                    .any(|line| line.contains(&from) && line.contains(&reason))
            })
        });
        slowly(match silent {
            None => Ok(Some(())),
            Some(call) => Err(anyhow::anyhow!("nobody says why {} failed", told(call))),
        })
    })
}

/// The calls travel in tunnels.
fn wait_carried(ground: &Ground) -> Result<()> {
    wait::for_value("all calls are carried", PATIENCE, || {
        let capture = wire(ground.own()?, &[WORD])?;
        thread::sleep(Duration::from_millis(500));
        let seen = capture.stop()?.found[0];
        ensure!(seen == 0, "{seen} packets between the nodes can be read");
        Ok(Some(()))
    })
}

/// The calls travel in plain.
fn wait_read(ground: &Ground) -> Result<()> {
    let capture = wire(ground.own()?, &[WORD])?;
    capture.wait_found(0, PATIENCE).map(drop)
}

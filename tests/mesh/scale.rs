//! How much one node holds: pods, connections, memory. Sizes are promises too.

use std::{
    io::Read,
    net::TcpStream,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use picomesh_tests::{
    AgentOptions, PodSpec, World, client,
    process::allow_files,
    server::{Habit, Server},
    wait,
};

use crate::harness::{Need, Test};

pub(crate) const TESTS: &[Test] = &[
    Test {
        name: "scale::a_hundred_pods_are_enrolled_in_ten_seconds_and_twenty_megabytes",
        needs: &[Need::Mesh, Need::Alone],
        run: a_hundred_pods_are_enrolled_in_ten_seconds_and_twenty_megabytes,
    },
    Test {
        name: "scale::a_thousand_idle_connections_stay_and_cost_little",
        needs: &[Need::Mesh],
        run: a_thousand_idle_connections_stay_and_cost_little,
    },
];

const PODS: usize = 100;
const CONNECTIONS: usize = 1_000;
const MEGABYTE: u64 = 1_024;

fn a_hundred_pods_are_enrolled_in_ten_seconds_and_twenty_megabytes() -> Result<()> {
    let world = World::new(1)?;
    world.namespace("mesh", Some("enabled"))?;
    // Each with an identity of its own: as many keys and certificates.
    for number in 0..PODS {
        world.pod(&PodSpec::new(&format!("pod{number}")))?;
    }
    let node = world.node(0)?;
    let start = Instant::now();
    let agent = world.start_agent_with(&node, &AgentOptions::default())?;
    wait::for_value("all pods are captured", Duration::from_secs(60), || {
        let captured = agent.captured_pods()?;
        ensure!(captured >= PODS, "{captured} of {PODS} are captured");
        Ok(Some(()))
    })
    .with_context(|| agent.process().last_words(20))?;
    let took = start.elapsed();
    ensure!(
        took < Duration::from_secs(10),
        "{PODS} pods took {took:?} to enrol"
    );
    agent.wait_ready(Duration::from_secs(20))?;
    resident_below(agent.process(), 20 * MEGABYTE)
}

fn a_thousand_idle_connections_stay_and_cost_little() -> Result<()> {
    allow_files(4 * CONNECTIONS as u64)?;
    let world = World::new(2)?;
    world.namespace("mesh", Some("enabled"))?;
    let near = world.pod(&PodSpec::new("near"))?;
    let far = world.pod(&PodSpec::new("far").on(1))?;
    let server = Server::start(far.netns(), 8080, Habit::Echo)?;
    let agents = world.start_mesh(&[&near, &far])?;
    let mut connections: Vec<TcpStream> = near.run(|| {
        (0..CONNECTIONS)
            .map(|number| -> Result<TcpStream> {
                let open = || {
                    let mut stream = client::connect(far.at(8080), Duration::from_secs(10))?;
                    client::ping(&mut stream, b"first words")?;
                    Ok::<_, std::io::Error>(stream)
                };
                open().with_context(|| format!("connection {number}"))
            })
            .collect::<Result<_>>()
    })?;
    ensure!(
        server.accepted() == CONNECTIONS as u64,
        "{} connections were accepted",
        server.accepted()
    );
    thread::sleep(Duration::from_secs(5));
    for agent in &agents {
        resident_below(agent.process(), 24 * MEGABYTE)
            .with_context(|| format!("the agent of {}", agent.node().name()))?;
        let open = agent.metrics()?.sum("picomesh_connections", &[]);
        ensure!(
            open >= CONNECTIONS as f64,
            "the agent of {} holds {open} connections",
            agent.node().name()
        );
    }
    for (number, stream) in connections.iter_mut().enumerate() {
        client::ping(stream, b"last words").with_context(|| format!("connection {number}"))?;
    }
    // Nobody said more than was asked.
    for stream in &mut connections {
        stream.set_nonblocking(true)?;
        let more = stream.read(&mut [0; 1]);
        ensure!(
            matches!(&more, Err(e) if e.kind() == std::io::ErrorKind::WouldBlock),
            "an idle connection says {more:?}"
        );
    }
    Ok(())
}

/// Waits a while for memory to be given back; then it must be below.
fn resident_below(process: &picomesh_tests::process::Process, limit: u64) -> Result<()> {
    wait::for_value("memory is given back", Duration::from_secs(15), || {
        let resident = process.resident_kib()?;
        ensure!(
            resident < limit,
            "{resident} KiB are resident, more than {limit}"
        );
        Ok(Some(()))
    })
}

//! What one pod, one stranger or one dead peer may take of a node, and that the others do not feel
//! it: caps and their refusals, crowds, memory that comes back, handshakes that never end, peers
//! that vanish.

mod crowd;
mod handshakes;
mod memory;
mod vanished;

use std::{
    io::ErrorKind,
    net::{SocketAddr, TcpStream},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, anyhow, ensure};
use picomesh_tests::{
    AgentOptions, Pod,
    client::{self, End},
    server::{Habit, Server},
    wait,
};

use crate::{
    ground::{Ground, PATIENCE, PORT, served},
    harness::{Need, Test},
};

pub(crate) const TESTS: &[Test] = &[
    Test {
        name: "limits::a_pod_over_its_cap_is_reset_and_its_neighbour_is_served",
        needs: &[Need::Mesh],
        run: a_pod_over_its_cap_is_reset_and_its_neighbour_is_served,
    },
    Test {
        name: "limits::a_called_pod_has_a_cap_too_and_each_caller_hears_why",
        needs: &[Need::Mesh],
        run: a_called_pod_has_a_cap_too_and_each_caller_hears_why,
    },
    Test {
        name: "limits::a_pod_that_dials_too_fast_is_reset_beyond_its_rate",
        needs: &[Need::Mesh],
        run: a_pod_that_dials_too_fast_is_reset_beyond_its_rate,
    },
    Test {
        name: "limits::who_dials_the_dead_does_not_wait_without_bound",
        needs: &[Need::Mesh],
        run: who_dials_the_dead_does_not_wait_without_bound,
    },
    Test {
        name: "limits::all_pods_together_have_a_cap",
        needs: &[Need::Mesh],
        run: all_pods_together_have_a_cap,
    },
    Test {
        name: "limits::a_small_crowd_does_not_slow_another_pod_down",
        needs: &[Need::Mesh, Need::Program("nginx")],
        run: crowd::a_small_crowd_does_not_slow_another_pod_down,
    },
    Test {
        name: "limits::ten_thousand_connections_do_not_triple_another_pods_p99",
        needs: &[Need::Full, Need::Mesh, Need::Program("nginx")],
        run: crowd::ten_thousand_connections_do_not_triple_another_pods_p99,
    },
    Test {
        name: "limits::what_is_over_the_default_cap_is_refused_and_counted",
        needs: &[Need::Full, Need::Mesh],
        run: crowd::what_is_over_the_default_cap_is_refused_and_counted,
    },
    Test {
        name: "limits::slow_readers_share_the_memory_of_their_pod_and_lose_nothing",
        needs: &[Need::Mesh],
        run: memory::slow_readers_share_the_memory_of_their_pod_and_lose_nothing,
    },
    Test {
        name: "limits::memory_comes_back_after_a_small_burst",
        needs: &[Need::Mesh],
        run: memory::memory_comes_back_after_a_small_burst,
    },
    Test {
        name: "limits::memory_comes_back_after_two_thousand_connections_with_64_kib_each",
        needs: &[Need::Full, Need::Mesh],
        run: memory::memory_comes_back_after_two_thousand_connections_with_64_kib_each,
    },
    Test {
        name: "limits::half_open_handshakes_end_and_a_node_gets_through",
        needs: &[Need::Mesh],
        run: handshakes::half_open_handshakes_end_and_a_node_gets_through,
    },
    Test {
        name: "limits::five_thousand_half_open_handshakes_cost_little_and_a_node_gets_through",
        needs: &[Need::Full, Need::Mesh],
        run: handshakes::five_thousand_half_open_handshakes_cost_little_and_a_node_gets_through,
    },
    Test {
        name: "limits::a_peer_that_dies_silently_is_noticed",
        needs: &[Need::Mesh],
        run: vanished::a_peer_that_dies_silently_is_noticed,
    },
    Test {
        name: "limits::half_closed_connections_of_the_vanished_do_not_pile_up",
        needs: &[Need::Mesh],
        run: vanished::half_closed_connections_of_the_vanished_do_not_pile_up,
    },
    Test {
        name: "limits::a_node_that_dies_silently_leaves_no_tunnel",
        needs: &[Need::Mesh],
        run: vanished::a_node_that_dies_silently_leaves_no_tunnel,
    },
];

/// Less than one that comes to a full pod waits for room.
const A_MOMENT: Duration = Duration::from_millis(500);

/// A ground with an echo server in `far` and `beside`.
fn ground_with(options: &AgentOptions) -> Result<(Ground, [Server; 2])> {
    let mut ground = Ground::new()?;
    let servers = [
        Server::start(ground.far.netns(), PORT, Habit::Echo)?,
        Server::start(ground.beside.netns(), PORT, Habit::Echo)?,
    ];
    ground.mesh_with(options)?;
    Ok((ground, servers))
}

fn a_pod_over_its_cap_is_reset_and_its_neighbour_is_served() -> Result<()> {
    const CAP: usize = 50;
    let (ground, _servers) =
        ground_with(&AgentOptions::default().arg("--pod-connections", &CAP.to_string()))?;
    let (near, far) = (&ground.near, ground.far.at(PORT));
    let mut held = open(near, far, CAP)?;
    refused(near, far).context("one more than the cap")?;
    refused(near, ground.beside.at(PORT)).context("to whomever")?;

    ensure!(served(&ground.beside, far), "the neighbour is not served");
    for stream in &mut held {
        client::ping(stream, b"still here").context("a connection that stood before")?;
    }

    let agent = ground.agent(0)?;
    let why = [("error", "pod_connections"), ("pod", "near")];
    agent.wait_metric("outbound_tcp_errors_total", &why, PATIENCE, |n| n == 2.0)?;
    agent.wait_log(
        &["outbound", "pod_connections: 50 connections are open"],
        PATIENCE,
    )?;
    let shown = agent.debug(&["pods"])?.ok()?.stdout;
    ensure!(shown.contains("pod_connections: 2"), "debug pods:\n{shown}");
    let shown = agent.debug_json(&["limits"])?;
    ensure!(
        shown["caps"]["pod_connections"] == CAP && shown["pods"][0]["pod"] == "mesh/beside",
        "debug limits: {shown:#}"
    );
    let cap = [("cap", "pod_connections")];
    let said = agent.metrics()?.sum("picomesh_caps", &cap);
    ensure!(said == CAP as f64, "picomesh_caps says {said}");

    // What ends makes room, and then also for one that has come too early.
    held.truncate(CAP - 1);
    wait::until("there is room again", PATIENCE, || served(near, far))?;
    held.extend(open(near, far, 1)?);
    let late = near
        .netns()
        .spawn("late", move || client::exchange(far, b"late", PATIENCE))?;
    thread::sleep(A_MOMENT);
    ensure!(!late.is_finished(), "nobody waits for room");
    held.truncate(CAP - 1);
    let answer = late.join().map_err(|_| anyhow!("the late one panicked"))?;
    ensure!(answer.context("one that came a moment too early")? == b"late");
    ensure!(served(near, far), "there is no room again");
    Ok(())
}

fn a_called_pod_has_a_cap_too_and_each_caller_hears_why() -> Result<()> {
    const CAP: usize = 10;
    // Only on the callee's node.
    let mut ground = Ground::new()?;
    let _server = Server::start(ground.far.netns(), PORT, Habit::Echo)?;
    let [one, two] = [ground.world.node(0)?, ground.world.node(1)?];
    let options = AgentOptions::default();
    let capped = options
        .clone()
        .arg("--pod-inbound-connections", &CAP.to_string());
    let agents = [
        ground.world.start_agent_with(&one, &options)?,
        ground.world.start_agent_with(&two, &capped)?,
    ];
    for agent in agents {
        agent.wait_ready(Duration::from_secs(20))?;
        ground.agents.push(agent);
    }
    ground.agent(0)?.wait_captured(&ground.near, 4 * PATIENCE)?;
    ground.agent(1)?.wait_captured(&ground.far, 4 * PATIENCE)?;

    let far = ground.far.at(PORT);
    let held = open(&ground.near, far, CAP)?;
    refused(&ground.near, far).context("through a tunnel")?;
    // Who has proven nothing is counted apart, and keeps nobody out who has.
    let plain = open(&ground.plain, far, CAP)?;
    refused(&ground.plain, far).context("from outside the mesh")?;
    let why = [("error", "pod_inbound_connections"), ("pod", "far")];
    ground
        .agent(1)?
        .wait_metric("inbound_tcp_errors_total", &why, PATIENCE, |n| n == 2.0)?;
    // The caller's agent says it in the callee's word.
    ground
        .agent(0)?
        .wait_log(&["outbound", "pod_inbound_connections"], PATIENCE)?;
    drop(held);
    wait::until("there is room for the mesh", PATIENCE, || {
        served(&ground.near, far)
    })?;
    drop(plain);
    wait::until("there is room again", PATIENCE, || {
        served(&ground.near, far) && served(&ground.plain, far)
    })
}

fn a_pod_that_dials_too_fast_is_reset_beyond_its_rate() -> Result<()> {
    const RATE: usize = 20;
    let (ground, _servers) =
        ground_with(&AgentOptions::default().arg("--pod-connection-rate", &RATE.to_string()))?;
    let far = ground.far.at(PORT);
    let begun = std::time::Instant::now();
    let answered = (0..100).filter(|_| tried(&ground.near, far)).count();
    let took = begun.elapsed().as_secs() as usize + 1;
    ensure!(
        (RATE..=RATE + RATE * took).contains(&answered),
        "{answered} of 100 were served in {took} s at {RATE} a second"
    );
    ensure!(served(&ground.beside, far), "the neighbour is not served");
    let why = [("error", "pod_connection_rate"), ("pod", "near")];
    let refused = (100 - answered) as f64;
    ground
        .agent(0)?
        .wait_metric("outbound_tcp_errors_total", &why, PATIENCE, |n| {
            n == refused
        })?;
    std::thread::sleep(Duration::from_millis(1100));
    let answered = (0..RATE).filter(|_| tried(&ground.near, far)).count();
    ensure!(answered == RATE, "{answered} of {RATE} after a pause");
    Ok(())
}

fn who_dials_the_dead_does_not_wait_without_bound() -> Result<()> {
    const CAP: usize = 8;
    let (ground, _servers) =
        ground_with(&AgentOptions::default().arg("--pod-pending", &CAP.to_string()))?;
    // On the link, and nobody answers: not even that there is nobody.
    let outsider = ground.world.outsider()?;
    outsider
        .netns()
        .nft("add table inet deaf\nadd chain inet deaf in { type filter hook input priority 0; policy drop; }\n")?;
    let dead: SocketAddr = outsider.at(PORT);
    // So that the drop is what is met, and not the search for a neighbour.
    let far = ground.far.at(PORT);
    let waiting: Vec<TcpStream> = ground.near.run(|| {
        (0..CAP)
            .map(|_| client::connect(dead, PATIENCE))
            .collect::<Result<_, _>>()
    })?;
    let why = [("error", "pod_pending"), ("pod", "near")];
    let agent = ground.agent(0)?;
    wait::for_value("the next is refused", Duration::from_secs(2), || {
        refused(&ground.near, far)?;
        Ok(Some(()))
    })?;
    ensure!(served(&ground.beside, far), "the neighbour is not served");
    agent.wait_metric("outbound_tcp_errors_total", &why, PATIENCE, |n| n >= 1.0)?;
    drop(waiting);
    wait::until("those that waited are told", 3 * PATIENCE, || {
        served(&ground.near, far)
    })
}

fn all_pods_together_have_a_cap() -> Result<()> {
    let (ground, _servers) = ground_with(
        &AgentOptions::default()
            .arg("--pod-connections", "20")
            .arg("--pod-inbound-connections", "30")
            .arg("--node-connections", "30"),
    )?;
    let far = ground.far.at(PORT);
    let held = [open(&ground.near, far, 20)?, open(&ground.beside, far, 10)?];
    refused(&ground.beside, far).context("the 31st of the node")?;
    ground
        .agent(0)?
        .wait_log(&["node_connections: 30 connections of all pods"], PATIENCE)?;
    drop(held);
    wait::until("there is room again", PATIENCE, || {
        served(&ground.beside, far)
    })
}

/// Connections to an echo server, each of which has answered.
fn open(from: &Pod, to: SocketAddr, count: usize) -> Result<Vec<TcpStream>> {
    from.run(|| {
        (0..count)
            .map(|number| {
                let one = || {
                    let mut stream = client::connect(to, PATIENCE)?;
                    client::ping(&mut stream, b"first words")?;
                    Ok::<_, std::io::Error>(stream)
                };
                one().with_context(|| format!("connection {number} of {count}"))
            })
            .collect()
    })
}

/// Whether one short exchange succeeds; a refusal is the only other way.
fn tried(from: &Pod, to: SocketAddr) -> bool {
    from.run(|| client::exchange(to, b"a word", PATIENCE))
        .is_ok_and(|answer| answer == b"a word")
}

/// A new connection is reset at once.
fn refused(from: &Pod, to: SocketAddr) -> Result<()> {
    let end = from.run(|| match client::connect(to, PATIENCE) {
        Err(e) if e.kind() == ErrorKind::ConnectionReset => Ok(End::Reset { read: 0 }),
        Err(e) => Err(e),
        Ok(mut stream) => client::read_to_end(&mut stream, PATIENCE),
    })?;
    ensure!(end == End::Reset { read: 0 }, "{to}: {end:?}");
    Ok(())
}

//! An agent that dies by SIGKILL in the middle of everything: what it carried must not go on in
//! plain, however long the applications are silent before they speak again.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use picomesh_tests::{
    AgentOptions, Pod,
    capture::Seen,
    client, requirements,
    server::{Habit, Server},
};

use super::{Ground, PATIENCE, PORT};

const LOAD: &[u8] = b"load-that-runs-while-the-agent-dies";
const DIALLER: &[u8] = b"the-dialling-side-speaks-again";
const ACCEPTOR: &[u8] = b"the-accepting-side-speaks-again";

/// Where the connections are accepted that stay silent.
const SILENT_PORT: u16 = 8081;
/// Silent connections of each family.
const EACH: usize = 3;
/// Twice what the kernel waits (below) before it forgets a connection whose owner is gone.
const SILENCE: Duration = Duration::from_secs(10);
const FIN_TIMEOUT: &str = "5";

/// Takes the rule out that this is all about, in agents that are built for tests.
const RULES_OFF: (&str, &str) = ("PICOMESH_TEST_RULES_OFF", "never-plain");

/// Both ends of a connection between applications.
struct Pair {
    dialler: TcpStream,
    acceptor: TcpStream,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Mesh {
    Off,
    WithoutRule,
    On,
}

/// What was seen, and what is left of the world.
struct Outcome {
    ground: Ground,
    pairs: Vec<Pair>,
    seen: Seen,
    bare: usize,
}

pub(super) fn a_killed_agent_leaves_nothing_plain() -> Result<()> {
    let control = play(Mesh::Off, false).context("control, without the mesh")?;
    ensure!(
        control.seen.found.iter().all(|found| *found > 0),
        "the search finds {:?} of load, dialling side and accepting side in plain",
        control.seen.found
    );
    ensure!(control.bare > 0, "no bare packets in plain");
    drop(control);
    let outcome = play(Mesh::On, false).context("with the mesh")?;
    nothing_plain(&outcome)
}

/// A dying agent's sockets say RST, which may be lost. The application then believes that its
/// connection stands, and only the kernel half stands between its next words and the wire.
pub(super) fn lost_resets_after_a_kill_leave_nothing_plain() -> Result<()> {
    let control = play(Mesh::WithoutRule, true).context("control, without the rule never-plain")?;
    ensure!(
        control.seen.found[1] > 0 && control.seen.found[2] > 0,
        "without the rule the search finds {:?} of load, dialling side and accepting side",
        control.seen.found
    );
    drop(control);
    let outcome = play(Mesh::On, true).context("with the mesh")?;
    nothing_plain(&outcome)?;

    // The next agent's listeners answer for the connections nobody has any more.
    let Outcome {
        mut ground, pairs, ..
    } = outcome;
    for pod in [&ground.near, &ground.far] {
        pod.netns().nft("delete table inet attack\n")?;
    }
    ground.agents.clear();
    ground.mesh().context("start the agents again")?;
    for mut pair in pairs {
        for (side, stream) in [
            ("dialling", &mut pair.dialler),
            ("accepting", &mut pair.acceptor),
        ] {
            let end = client::read_to_end(stream, Duration::from_secs(30))?;
            ensure!(
                matches!(end, client::End::Reset { read: 0 }),
                "the {side} side is told {end:?}, not a reset"
            );
        }
    }
    Ok(())
}

fn nothing_plain(outcome: &Outcome) -> Result<()> {
    ensure!(
        outcome.seen.found.iter().all(|found| *found == 0),
        "plain bytes on the wire: {:?} packets of load, dialling side and accepting side",
        outcome.seen.found
    );
    ensure!(
        outcome.bare == 0,
        "{} packets name the pods on the wire",
        outcome.bare
    );
    Ok(())
}

/// Opens connections, kills the agents under load, waits, and lets both sides speak.
fn play(mesh: Mesh, lose_resets: bool) -> Result<Outcome> {
    let mut ground = Ground::new()?;
    for pod in [&ground.near, &ground.far] {
        pod.netns()
            .sysctl("net/ipv4/tcp_fin_timeout", FIN_TIMEOUT)?;
    }
    match mesh {
        Mesh::Off => {}
        Mesh::On => ground.mesh()?,
        Mesh::WithoutRule => {
            let options = AgentOptions {
                binary: Some(picomesh_tests::agent::testing_binary()?),
                ..AgentOptions::default().env(RULES_OFF.0, RULES_OFF.1)
            };
            for node in ground.world.nodes() {
                ground
                    .agents
                    .push(ground.world.start_agent_with(&node, &options)?);
            }
            for (agent, pod) in ground.agents.iter().zip([&ground.near, &ground.far]) {
                agent.wait_ready(Duration::from_secs(20))?;
                agent.wait_captured(pod, Duration::from_secs(20))?;
            }
        }
    }
    let server = Server::start(ground.far.netns(), PORT, Habit::Echo)?;
    let mut pairs = pairs(&ground.near, &ground.far)?;
    let capture = ground.world.capture_wire(&[LOAD, DIALLER, ACCEPTOR])?;

    let stop = AtomicBool::new(false);
    let rounds = AtomicU64::new(0);
    thread::scope(|scope| -> Result<()> {
        let load = scope.spawn(|| run_load(&ground, &stop, &rounds));
        let mut during = || -> Result<()> {
            picomesh_tests::wait::until("the load runs", PATIENCE, || {
                rounds.load(Ordering::Relaxed) > 50
            })?;
            if lose_resets {
                for pod in [&ground.near, &ground.far] {
                    pod.netns().nft(
                        "table inet attack { chain lose { type filter hook input priority 0;\n\
                         tcp flags & rst == rst drop\n}\n}\n",
                    )?;
                }
            }
            if mesh != Mesh::Off {
                for agent in &ground.agents {
                    agent.kill9();
                }
                thread::sleep(SILENCE);
            }
            for pair in &mut pairs {
                // A reset that came already makes these fail: that is one way of being safe.
                let _told = pair.dialler.write_all(DIALLER);
                let _told = pair.acceptor.write_all(ACCEPTOR);
            }
            // Retransmissions are chances too.
            thread::sleep(Duration::from_secs(2));
            Ok(())
        };
        let result = during();
        stop.store(true, Ordering::Relaxed);
        load.join()
            .map_err(|_| anyhow::anyhow!("the load panicked"))?;
        result
    })?;
    drop(server);
    let seen = capture.stop()?;
    let bare = ground.bare_packets(&seen);
    Ok(Outcome {
        ground,
        pairs,
        seen,
        bare,
    })
}

/// Connections of both families that have carried something and are silent now.
fn pairs(near: &Pod, far: &Pod) -> Result<Vec<Pair>> {
    let mut pairs = Vec::new();
    for to in [far.at(SILENT_PORT), far.at6(SILENT_PORT)] {
        if to.is_ipv6() && !requirements::ipv6() {
            continue;
        }
        let any: SocketAddr = if to.is_ipv4() {
            ([0; 4], SILENT_PORT).into()
        } else {
            ([0_u16; 8], SILENT_PORT).into()
        };
        let listener = far
            .run(|| listen(any))
            .with_context(|| format!("listen on {any}"))?;
        for _ in 0..EACH {
            let mut dialler = near
                .run(|| client::connect(to, PATIENCE))
                .with_context(|| format!("connect to {to}"))?;
            dialler.write_all(b"hello")?;
            let (mut acceptor, _) = listener.accept()?;
            acceptor.set_read_timeout(Some(PATIENCE))?;
            let mut hello = [0; 5];
            acceptor.read_exact(&mut hello)?;
            acceptor.write_all(b"hello")?;
            dialler.read_exact(&mut hello)?;
            pairs.push(Pair { dialler, acceptor });
        }
    }
    Ok(pairs)
}

/// A listener of one family alone, so that both can have the port.
fn listen(at: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = socket2::Socket::new(
        socket2::Domain::for_address(at),
        socket2::Type::STREAM,
        Some(socket2::Protocol::TCP),
    )?;
    if at.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_reuse_address(true)?;
    socket.bind(&at.into())?;
    socket.listen(64)?;
    Ok(socket.into())
}

/// Speaks without a pause, on one connection while it stands and on new ones when it does not.
fn run_load(ground: &Ground, stop: &AtomicBool, rounds: &AtomicU64) {
    let to = ground.far.at(PORT);
    ground.near.run(|| {
        while !stop.load(Ordering::Relaxed) {
            let Ok(mut stream) = client::connect(to, Duration::from_millis(500)) else {
                continue;
            };
            while !stop.load(Ordering::Relaxed) && client::ping(&mut stream, LOAD).is_ok() {
                rounds.fetch_add(1, Ordering::Relaxed);
                thread::sleep(Duration::from_millis(1));
            }
        }
    });
}

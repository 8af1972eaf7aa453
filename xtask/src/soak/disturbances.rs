//! What is done to the mesh while it carries: a plain list. Each tells the ledger when it begins,
//! when it is over, and whose connections may suffer meanwhile; most may harm nobody.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::Result;
use nix::sys::signal::Signal;

use super::{
    ledger::Affects,
    stage::{SPREADS, Stage},
    stream::Chance,
};

pub(crate) struct Disturbance {
    pub(crate) name: &'static str,
    /// Whether it ends an agent, whose memory is then that of a new one.
    pub(crate) ends_an_agent: bool,
    pub(crate) play: fn(&mut Stage, &mut Chance, usize) -> Result<()>,
}

pub(crate) const ALL: [Disturbance; 6] = [
    Disturbance {
        name: "an agent was killed",
        ends_an_agent: true,
        play: kill,
    },
    Disturbance {
        name: "an agent was ended and started",
        ends_an_agent: true,
        play: restart,
    },
    Disturbance {
        name: "an agent was succeeded",
        ends_an_agent: true,
        play: succeed,
    },
    Disturbance {
        name: "a policy changed",
        ends_an_agent: false,
        play: close_and_open,
    },
    Disturbance {
        name: "a pod was deleted",
        ends_an_agent: false,
        play: replace_a_pod,
    },
    Disturbance {
        name: "a pod left the mesh and joined it",
        ends_an_agent: false,
        play: leave_and_join,
    },
];

/// SIGKILL; the next agent adopts what is pinned. Open connections end by RST.
fn kill(stage: &mut Stage, chance: &mut Chance, node: usize) -> Result<()> {
    let what = "an agent was killed";
    let ongoing = stage
        .shared
        .ledger
        .begins(what, format!("node{node}"), Affects::Node(node));
    stage.agent(node)?.kill9();
    thread::sleep(Duration::from_millis(chance.between(0, 1_500)));
    stage.start_agent(node)?;
    stage.shared.ledger.over(ongoing);
    Ok(())
}

/// SIGTERM, without a successor, and again: then open connections are cut.
fn restart(stage: &mut Stage, chance: &mut Chance, node: usize) -> Result<()> {
    let what = "an agent was ended and started";
    let ongoing = stage
        .shared
        .ledger
        .begins(what, format!("node{node}"), Affects::Node(node));
    let agent = stage.agent(node)?;
    agent.process().signal(Signal::SIGTERM);
    thread::sleep(Duration::from_millis(chance.between(200, 3_000)));
    agent.sigterm(Duration::from_secs(20))?;
    thread::sleep(Duration::from_millis(chance.between(0, 500)));
    stage.start_agent(node)?;
    stage.shared.ledger.over(ongoing);
    Ok(())
}

/// Another agent takes the place of one that serves. No connection fails, new or open.
fn succeed(stage: &mut Stage, _: &mut Chance, node: usize) -> Result<()> {
    let what = "an agent was succeeded";
    let ongoing = stage
        .shared
        .ledger
        .begins(what, format!("node{node}"), Affects::Nobody);
    stage.succeed_agent(node)?;
    stage.shared.ledger.over(ongoing);
    Ok(())
}

/// The gate lets nobody in for a while.
fn close_and_open(stage: &mut Stage, chance: &mut Chance, _: usize) -> Result<()> {
    let affects = Affects::Pod(stage.gate.pod.name().to_owned());
    let ongoing = stage
        .shared
        .ledger
        .begins("a policy changed", "gate".into(), affects);
    stage.write_gate(false)?;
    *stage.shared.closed() = Some(Instant::now());
    thread::sleep(SPREADS + Duration::from_millis(chance.between(500, 4_000)));
    *stage.shared.closed() = None;
    stage.write_gate(true)?;
    thread::sleep(SPREADS);
    stage.shared.ledger.over(ongoing);
    Ok(())
}

fn replace_a_pod(stage: &mut Stage, _: &mut Chance, _: usize) -> Result<()> {
    stage.bear()?;
    stage.bury()
}

/// Connections that stand are carried to their end, and new ones go in plain and are served.
fn leave_and_join(stage: &mut Stage, chance: &mut Chance, _: usize) -> Result<()> {
    let what = "a pod left the mesh and joined it";
    let ongoing = stage
        .shared
        .ledger
        .begins(what, "drifter".into(), Affects::Nobody);
    let deadline = Duration::from_secs(20);
    let pod = &stage.drifter.pod;
    stage.set_meshed(&stage.drifter, false)?;
    // It is let go when its last connection has ended, which may be after it is back.
    stage
        .agent(1)?
        .wait_pod_state(pod, &["", "released", "leaving"], deadline)?;
    thread::sleep(Duration::from_millis(chance.between(500, 4_000)));
    stage.set_meshed(&stage.drifter, true)?;
    stage.agent(1)?.wait_captured(pod, deadline)?;
    stage.shared.ledger.over(ongoing);
    Ok(())
}

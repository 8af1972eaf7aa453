//! Hand-overs in which one side dies, hangs, or comes second.

use std::{
    fs,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use picomesh_tests::{
    AgentOptions,
    agent::testing_binary,
    crowd::Crowd,
    load::Load,
    server::{Habit, Server},
};

use super::{SOON, ends, succeed};
use crate::ground::{Ground, PORT, served};

/// Names the message after which an agent for tests kills itself.
const DIES_AFTER: &str = "PICOMESH_TEST_DIES_AFTER";

pub(super) fn a_successor_killed_after_each_message_costs_nothing() -> Result<()> {
    let mut ground = Ground::new()?;
    let _echoes =
        [&ground.far, &ground.beside].map(|pod| Server::start(pod.netns(), PORT, Habit::Echo));
    ground.mesh()?;
    let node = ground.world.node(0)?;
    let talk = Load::on_one_connection(&ground.near, ground.far.at(PORT))?;
    let targets = [ground.far.at(PORT), ground.beside.at(PORT)];
    let crowd = Crowd::start(&ground.near, &targets, Duration::from_millis(20))?;
    let dying = |message: &str| AgentOptions {
        binary: Some(testing_binary().unwrap_or_default()),
        ..AgentOptions::default().env(DIES_AFTER, message)
    };
    testing_binary()?;
    let died_after = |ground: &Ground, message: &str| -> Result<()> {
        let next = ground.world.start_agent_with(&node, &dying(message))?;
        let status = next.process().wait(SOON)?;
        ensure!(!status.success(), "after {message}: it ended well");
        let before = ground.agent(0)?;
        before
            .wait_serves(SOON)
            .with_context(|| format!("after {message}"))?;
        let (ready, _) = before.get("/ready")?;
        ensure!(ready == 200, "after {message}: /ready answers {ready}");
        for pod in [&ground.near, &ground.beside] {
            before.wait_captured(pod, SOON)?;
        }
        let named = fs::read_to_string(before.run_dir().join("agent.lock"))?;
        ensure!(
            named.trim() == before.process().pid().to_string(),
            "after {message}: the lock names process {named}"
        );
        Ok(())
    };
    // Of the successor's way these are all the messages before it has taken over, from either side.
    for message in ["hello", "offer", "ready", "commit"] {
        died_after(&ground, message)?;
    }
    let fared = crowd.stop()?;
    ensure!(
        fared.failures.is_empty(),
        "of {} connections failed: {}{}",
        fared.opened,
        fared.failures.join("; "),
        ground.logs()
    );
    // Where its listeners stand in every pod already, what it has accepted dies with it; nothing
    // else does.
    died_after(&ground, "swap")?;
    for target in targets {
        ensure!(served(&ground.near, target), "{target} is not served");
    }
    talk.stop_unharmed().context("a long conversation")?;

    // After the last one it is the agent, and its death is any agent's: the next adopts.
    let options = AgentOptions {
        binary: Some(testing_binary()?),
        ..AgentOptions::default().env(DIES_AFTER, "taken")
    };
    let next = ground.world.start_agent_with(&node, &options)?;
    next.process().wait(SOON)?;
    ends(ground.agent(0)?)?;
    let third = ground
        .world
        .start_agent_with(&node, &AgentOptions::default())?;
    third.wait_serves(SOON)?;
    third.wait_ready(SOON)?;
    ensure!(served(&ground.near, ground.far.at(PORT)), "not served");
    ground.agents[0] = third;
    // And hands over like any other.
    let before = succeed(&mut ground, 0, &AgentOptions::default())?;
    ends(&before)?;
    ensure!(served(&ground.near, ground.far.at(PORT)), "not served");
    Ok(())
}

pub(super) fn an_agent_that_is_stopped_is_ended_and_adopted() -> Result<()> {
    let mut ground = Ground::new()?;
    let _echo = Server::start(ground.far.netns(), PORT, Habit::Echo)?;
    ground.mesh()?;
    ground.agent(0)?.process().signal(Signal::SIGSTOP);
    let asked = Instant::now();
    let next = ground
        .world
        .start_agent_with(&ground.world.node(0)?, &AgentOptions::default())?;
    next.wait_serves(SOON)?;
    next.wait_ready(SOON)?;
    ensure!(
        asked.elapsed() < Duration::from_secs(25),
        "a stopped agent was waited for {:?}",
        asked.elapsed()
    );
    let status = ground.agent(0)?.process().wait(SOON)?;
    ensure!(!status.success(), "the stopped agent ended by itself");
    ensure!(served(&ground.near, ground.far.at(PORT)), "not served");
    ground.agents[0] = next;
    Ok(())
}

pub(super) fn of_two_successors_at_once_one_is_sent_away() -> Result<()> {
    let mut ground = Ground::new()?;
    let _echo = Server::start(ground.far.netns(), PORT, Habit::Echo)?;
    ground.mesh()?;
    let node = ground.world.node(0)?;
    let start = || {
        ground
            .world
            .start_agent_with(&node, &AgentOptions::default())
    };
    let (one, other) = (start()?, start()?);
    // Whoever is second is refused, or comes so late that it succeeds the first: never do two serve.
    let stays = picomesh_tests::wait::for_value("one of them serves", SOON, || {
        ends(ground.agent(0)?)?;
        for (agent, rival) in [(&one, &other), (&other, &one)] {
            if rival.process().exited().is_some() {
                agent.wait_serves(SOON)?;
                return Ok(Some(std::ptr::eq(agent, &one)));
            }
        }
        Ok(None)
    })?;
    let (stays, gone) = if stays { (one, other) } else { (other, one) };
    stays.wait_ready(SOON)?;
    let status = gone.process().wait(SOON)?;
    ensure!(
        status.success() || gone.log().contains("taking over already"),
        "the other ended with {status}: {}",
        gone.process().last_words(10)
    );
    ensure!(served(&ground.near, ground.far.at(PORT)), "not served");
    ground.agents[0] = stays;
    Ok(())
}

//! One agent leaves its place to the next: under load, and whatever either does wrong.

mod changes;
mod failures;
mod older;
mod snapshot;
mod strangers;

use std::time::Duration;

use anyhow::{Result, ensure};
use picomesh_tests::{Agent, AgentOptions};

use crate::{
    ground::Ground,
    harness::{Need, Test},
};

pub(crate) const TESTS: &[Test] = &[
    Test {
        name: "handover::agents_change_places_under_load_and_nobody_notices",
        needs: &[Need::Mesh],
        run: changes::agents_change_places_under_load_and_nobody_notices,
    },
    Test {
        name: "handover::a_pod_that_comes_meanwhile_is_captured_by_one_of_them",
        needs: &[Need::Mesh],
        run: changes::a_pod_that_comes_meanwhile_is_captured_by_one_of_them,
    },
    Test {
        name: "handover::connections_that_outlive_the_deadline_are_reset",
        needs: &[Need::Mesh],
        run: changes::connections_that_outlive_the_deadline_are_reset,
    },
    Test {
        name: "handover::sigterm_with_a_successor_hands_over_first_and_a_second_one_cuts",
        needs: &[Need::Mesh],
        run: changes::sigterm_with_a_successor_hands_over_first_and_a_second_one_cuts,
    },
    Test {
        name: "handover::a_successor_killed_after_each_message_costs_nothing",
        needs: &[Need::Mesh],
        run: failures::a_successor_killed_after_each_message_costs_nothing,
    },
    Test {
        name: "handover::an_agent_that_is_stopped_is_ended_and_adopted",
        needs: &[Need::Mesh],
        run: failures::an_agent_that_is_stopped_is_ended_and_adopted,
    },
    Test {
        name: "handover::of_two_successors_at_once_one_is_sent_away",
        needs: &[Need::Mesh],
        run: failures::of_two_successors_at_once_one_is_sent_away,
    },
    Test {
        name: "handover::one_that_knows_nothing_of_the_bpf_directorys_lock_may_come_between",
        needs: &[Need::Mesh],
        run: older::one_that_knows_nothing_of_the_bpf_directorys_lock_may_come_between,
    },
    Test {
        name: "handover::strangers_at_the_socket_get_nothing_and_keep_nobody_out",
        needs: &[Need::Mesh],
        run: strangers::strangers_at_the_socket_get_nothing_and_keep_nobody_out,
    },
    Test {
        name: "handover::a_restarted_agent_serves_from_its_snapshot_and_the_sources_win",
        needs: &[Need::Mesh],
        run: snapshot::a_restarted_agent_serves_from_its_snapshot_and_the_sources_win,
    },
    Test {
        name: "handover::a_snapshot_that_does_not_count_is_ignored_with_a_line",
        needs: &[Need::Mesh],
        run: snapshot::a_snapshot_that_does_not_count_is_ignored_with_a_line,
    },
];

/// For an agent to be ready, and for one to be gone that has nothing left to do.
const SOON: Duration = Duration::from_secs(30);

/// Starts the next agent of a node, beside the one that runs, and waits until it serves. Returns
/// the one before.
fn succeed(ground: &mut Ground, node: usize, options: &AgentOptions) -> Result<Agent> {
    let next = ground
        .world
        .start_agent_with(&ground.world.node(node)?, options)?;
    next.wait_serves(SOON)?;
    next.wait_ready(SOON)?;
    Ok(std::mem::replace(&mut ground.agents[node], next))
}

/// The agent ends by itself, and well.
fn ends(agent: &Agent) -> Result<()> {
    let status = agent.process().wait(SOON)?;
    ensure!(
        status.success(),
        "process {} ended with {status}: {}",
        agent.process().pid(),
        agent.process().last_words(20)
    );
    Ok(())
}

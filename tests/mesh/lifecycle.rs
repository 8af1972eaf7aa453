//! Agents come and go, pods join and leave, files break, containers undo what was done to them:
//! none of it may cost a connection that had nothing to do with it, or leave anything behind.

mod agents;
mod authority;
mod manifests;
mod repairs;

use crate::harness::{Need, Test};

pub(crate) const TESTS: &[Test] = &[
    Test {
        name: "lifecycle::a_namespace_leaves_and_joins_and_no_standing_connection_is_harmed",
        needs: &[Need::Mesh],
        run: manifests::a_namespace_leaves_and_joins_and_no_standing_connection_is_harmed,
    },
    Test {
        name: "lifecycle::linkerds_and_istios_words_opt_in_and_out_too",
        needs: &[Need::Mesh],
        run: manifests::linkerds_and_istios_words_opt_in_and_out_too,
    },
    Test {
        name: "lifecycle::skipped_ports_are_not_captured",
        needs: &[Need::Mesh],
        run: manifests::skipped_ports_are_not_captured,
    },
    Test {
        name: "lifecycle::a_broken_manifest_keeps_the_last_good_state_and_is_named",
        needs: &[Need::Mesh],
        run: manifests::a_broken_manifest_keeps_the_last_good_state_and_is_named,
    },
    Test {
        name: "lifecycle::the_next_agent_adopts_what_a_killed_one_left",
        needs: &[Need::Mesh],
        run: agents::the_next_agent_adopts_what_a_killed_one_left,
    },
    Test {
        name: "lifecycle::sigterm_lets_connections_finish_and_leaves_everything_pinned",
        needs: &[Need::Mesh],
        run: agents::sigterm_lets_connections_finish_and_leaves_everything_pinned,
    },
    Test {
        name: "lifecycle::an_end_without_a_successor_cuts_nobody_who_has_just_come",
        needs: &[Need::Mesh],
        run: agents::an_end_without_a_successor_cuts_nobody_who_has_just_come,
    },
    Test {
        name: "lifecycle::cleanup_leaves_no_trace",
        needs: &[Need::Mesh],
        run: agents::cleanup_leaves_no_trace,
    },
    Test {
        name: "lifecycle::out_of_descriptors_an_agent_waits_and_goes_on",
        needs: &[Need::Mesh],
        run: agents::out_of_descriptors_an_agent_waits_and_goes_on,
    },
    Test {
        name: "lifecycle::what_a_container_undoes_is_put_back",
        needs: &[Need::Mesh],
        run: repairs::what_a_container_undoes_is_put_back,
    },
    Test {
        name: "lifecycle::the_authority_is_rotated_under_load",
        needs: &[Need::Mesh],
        run: authority::the_authority_is_rotated_under_load,
    },
];

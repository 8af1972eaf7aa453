//! The tier `mesh`: whole agents, real programs, a world of network namespaces.
//!
//! One file per subject. Adding a test is adding a function and its row in that file's table.
//! Every test states a promise to a user, and every comparison has a control: the same steps with
//! the mesh off. `cargo xtask test --tier mesh` builds the agent and says where it lies.
mod failclosed;
mod ground;
mod handover;
mod harness;
mod identity_attacks;
mod lifecycle;
mod limits;
mod network_policy;
mod policy;
mod restart;
mod scale;
mod services;
mod settings;
mod shown;
mod traffic;
mod world;

use std::process::ExitCode;

fn main() -> ExitCode {
    harness::run(
        [
            world::TESTS,
            traffic::TESTS,
            policy::TESTS,
            network_policy::TESTS,
            failclosed::TESTS,
            identity_attacks::TESTS,
            lifecycle::TESTS,
            restart::TESTS,
            handover::TESTS,
            services::TESTS,
            settings::TESTS,
            shown::TESTS,
            scale::TESTS,
            limits::TESTS,
        ]
        .concat(),
    )
}

//! The tier `k8s`: a real API server, real kubelets, real containers.
//!
//! One file per subject. Adding a test is adding a function and its row in that file's table. The
//! tests share one cluster, which the first of them makes and the last of them leaves to be
//! removed; each has a Kubernetes namespace of its own. With KUBECONFIG set they use that cluster
//! instead, and those that reach into nodes are ignored. `cargo xtask test --tier k8s` gets what is
//! missing and says where it lies.
mod api;
mod askers;
mod authority;
mod bpffs;
mod crowded;
mod ground;
mod install;
mod kinds;
mod labels;
mod leaders;
mod leftovers;
mod lifecycle;
mod mesh;
mod netns;
mod one_by_one;
mod optin;
mod outage;
mod pods;
mod policies;
mod reborn;
mod refusals;
mod removal;
mod requests;
mod rights;
mod start;
mod strict;
mod talk;

use std::{env, process::ExitCode, time::Instant};

use ground::{Need, Test};
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use picomesh_tests::{FULL, reaper};

fn main() -> ExitCode {
    if let Err(e) = reaper::install() {
        eprintln!("{e:#}");
        return ExitCode::FAILURE;
    }
    let mut arguments = Arguments::from_args();
    // Two cores and one cluster.
    arguments.test_threads = Some(1);
    let tables = [
        pods::TESTS,
        rights::TESTS,
        mesh::TESTS,
        refusals::TESTS,
        leaders::TESTS,
        labels::TESTS,
        authority::TESTS,
        optin::TESTS,
        policies::TESTS,
        reborn::TESTS,
        bpffs::TESTS,
        start::TESTS,
        kinds::TESTS,
        strict::TESTS,
        netns::TESTS,
        lifecycle::TESTS,
        one_by_one::TESTS,
        outage::TESTS,
        removal::TESTS,
        leftovers::TESTS,
        // Last: the namespaces it leaves take a cluster minutes to tidy up.
        crowded::TESTS,
    ];
    let full = env::var_os(FULL).is_some();
    let played = |test: &Test| full || !test.needs.contains(&Need::Full);
    let tests = tables.concat().into_iter().filter(played);
    let trials = tests.map(trial).collect();
    let conclusion = libtest_mimic::run(&arguments, trials);
    ground::remove();
    conclusion.exit_code()
}

fn trial(test: Test) -> Trial {
    Trial::ignorable_test(test.name, move || {
        if let Some(reason) = test.needs.iter().find_map(|need: &Need| need.lacks()) {
            return Ok(Completion::ignored_with(reason));
        }
        let begun = Instant::now();
        let done = (test.run)();
        eprintln!("{}: {:.0} s", test.name, begun.elapsed().as_secs_f64());
        done.map(|()| Completion::Completed)
            .map_err(|e| Failed::from(format!("{e:#}")))
    })
}

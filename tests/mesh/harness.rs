//! Runs the tables of tests: at most two at a time, with a reason for every skip.

use std::{
    process::ExitCode,
    sync::{PoisonError, RwLock},
};

use anyhow::Result;
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use picomesh_tests::{agent, reaper, requirements};

/// One row of a table.
#[derive(Clone, Copy)]
pub(crate) struct Test {
    /// `subject::promise`.
    pub(crate) name: &'static str,
    pub(crate) needs: &'static [Need],
    pub(crate) run: fn() -> Result<()>,
}

/// What a test cannot run without.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Need {
    /// Root, network namespaces, Linux 6.1, cgroup v2, a built agent.
    Mesh,
    /// Much of the machine, for long: only with `cargo xtask test --full`, and alone.
    Full,
    /// A program on the PATH.
    Program(&'static str),
    /// No other test beside it: it promises a time.
    Alone,
}

/// Held by every test that runs, and by one that must be alone for writing.
static MACHINE: RwLock<()> = RwLock::new(());

pub(crate) fn run(tests: Vec<Test>) -> ExitCode {
    if let Err(e) = reaper::install() {
        eprintln!("{e:#}");
        return ExitCode::FAILURE;
    }
    let mut arguments = Arguments::from_args();
    // Two cores: more worlds at a time only make timings worse.
    arguments.test_threads = Some(arguments.test_threads.unwrap_or(2).min(2));
    let full = std::env::var_os(picomesh_tests::FULL).is_some();
    let trials = tests
        .into_iter()
        .filter(|test| full || !test.needs.contains(&Need::Full))
        .map(|test| {
            Trial::ignorable_test(test.name, move || match reason_to_skip(test.needs) {
                Some(reason) => Ok(Completion::ignored_with(reason)),
                None => beside_others_or_alone(test)
                    .map(|()| Completion::Completed)
                    .map_err(|e| Failed::from(format!("{e:#}"))),
            })
        })
        .collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn beside_others_or_alone(test: Test) -> Result<()> {
    // What another test left half done when it panicked is not in this lock.
    if [Need::Alone, Need::Full]
        .iter()
        .any(|need| test.needs.contains(need))
    {
        let _alone = MACHINE.write().unwrap_or_else(PoisonError::into_inner);
        (test.run)()
    } else {
        let _beside_others = MACHINE.read().unwrap_or_else(PoisonError::into_inner);
        (test.run)()
    }
}

fn reason_to_skip(needs: &[Need]) -> Option<String> {
    // Every test stands in a world, so the machine's part holds for all.
    if let Some(missing) = requirements::missing().first() {
        return Some(format!("{} is missing: {}", missing.what, missing.remedy));
    }
    needs.iter().find_map(|need| match need {
        Need::Full => None,
        Need::Mesh => agent::binary().err().map(|e| format!("{e:#}")),
        Need::Program(name) => (!requirements::program(name))
            .then(|| format!("{name} is not installed: cargo xtask setup")),
        Need::Alone => None,
    })
}

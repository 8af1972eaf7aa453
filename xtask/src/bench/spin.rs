//! A program per core that is always ready to run and always gives way.
//!
//! Where an idle CPU halts, waking it costs a hundred microseconds and more for every proxied
//! request at a low rate, and that says more about the machine than about the proxy. With a
//! spinner of idle priority on each core no CPU ever halts. Latency is reported without and with.

use std::{fs, thread, time::Duration};

use anyhow::{Context, Result};
use picomesh_tests::{Pod, process::Process, wait};

/// SCHED_IDLE, as field 41 of /proc/PID/stat has it.
const IDLE_POLICY: &str = "5";
const START: Duration = Duration::from_secs(5);

/// Spins until it is dropped.
pub(crate) struct Spinner {
    _processes: Vec<Process>,
}

impl Spinner {
    /// As programs of `pod`: they need none of its network, but they go when its world goes.
    pub(crate) fn start(pod: &Pod) -> Result<Self> {
        let mut processes = Vec::new();
        for core in 0..thread::available_parallelism()?.get() {
            let core = core.to_string();
            let spin = "while :; do :; done";
            let args = ["-c", &core, "chrt", "--idle", "0", "sh", "-c", spin];
            let process = pod
                .spawn(&format!("spinner-{core}"), "taskset", &args)
                .context("taskset and chrt are of the package util-linux")?;
            wait::until("a spinner of idle priority spins", START, || {
                policy(process.pid()).as_deref() == Some(IDLE_POLICY)
            })
            .with_context(|| process.last_words(5))?;
            processes.push(process);
        }
        Ok(Self {
            _processes: processes,
        })
    }
}

/// The scheduling policy of a process.
fn policy(pid: i32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command's name may hold blanks and parentheses: count from the last one.
    let (_, rest) = stat.rsplit_once(") ")?;
    rest.split(' ').nth(38).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn idle_priority_is_told_from_normal() {
        let ours = std::process::id() as i32;
        assert!(policy(ours).is_some_and(|p| p != IDLE_POLICY));
        let args = ["--idle", "0", "sleep", "60"];
        let mut child = Command::new("chrt").args(args).spawn().unwrap();
        let told = wait::until("idle", START, || {
            policy(child.id() as i32).as_deref() == Some(IDLE_POLICY)
        });
        child.kill().unwrap();
        child.wait().unwrap();
        told.unwrap();
    }
}

//! A thread per core that is always ready to run and always gives way.
//!
//! Where an idle CPU halts, waking it costs a hundred microseconds and more for every proxied
//! request at a low rate, and that says more about the machine than about the proxy. With a
//! spinner of idle priority on each core no CPU ever halts. Latency is reported without and with.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
};

use anyhow::{Context, Result};
use nix::{
    errno::Errno,
    libc,
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};

/// Spins until it is dropped.
pub(crate) struct Spinner {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Spinner {
    pub(crate) fn start() -> Result<Self> {
        let mut spinner = Self {
            stop: Arc::new(AtomicBool::new(false)),
            threads: Vec::new(),
        };
        for core in 0..thread::available_parallelism()?.get() {
            let stop = Arc::clone(&spinner.stop);
            let (tell, told) = std::sync::mpsc::sync_channel(1);
            let thread = thread::Builder::new()
                .name("spinner".into())
                .spawn(move || {
                    let ready = become_idle(core);
                    let spins = ready.is_ok();
                    let _ = tell.send(ready);
                    while spins && !stop.load(Ordering::Relaxed) {
                        std::hint::spin_loop();
                    }
                })?;
            spinner.threads.push(thread);
            told.recv()
                .context("a spinner ended")?
                .with_context(|| format!("spin on core {core} at idle priority"))?;
        }
        Ok(spinner)
    }
}

impl Drop for Spinner {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Ties the calling thread to a core and lets every other thread go first.
fn become_idle(core: usize) -> Result<(), Errno> {
    let mut set = CpuSet::new();
    set.set(core)?;
    sched_setaffinity(Pid::from_raw(0), &set)?;
    // SAFETY: sched_param is plain numbers, for which zero is valid and what SCHED_IDLE demands.
    let parameters: libc::sched_param = unsafe { std::mem::zeroed() };
    // SAFETY: 0 is the calling thread; the kernel only reads `parameters`, which outlives the call.
    Errno::result(unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &parameters) })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test that fails here has failed")]

    use super::*;

    #[test]
    fn a_spinner_runs_at_idle_priority_and_ends_when_dropped() {
        let spinner = Spinner::start().unwrap();
        let policies: Vec<String> = std::fs::read_dir("/proc/self/task")
            .unwrap()
            .filter_map(|task| {
                let path = task.unwrap().path();
                let name = std::fs::read_to_string(path.join("comm")).ok()?;
                // Field 41 of stat, the 39th after the name, is the scheduling policy.
                let stat = std::fs::read_to_string(path.join("stat")).ok()?;
                let (_, rest) = stat.rsplit_once(") ")?;
                let policy = rest.split(' ').nth(38)?.to_owned();
                (name.trim() == "spinner").then_some(policy)
            })
            .collect();
        assert_eq!(policies.len(), spinner.threads.len());
        assert!(policies.iter().all(|p| *p == libc::SCHED_IDLE.to_string()));
        drop(spinner);
    }
}

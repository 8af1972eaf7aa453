//! Whoever must be finished before the agent may serve holds a [`Task`] and says when it is done.
//! One that is dropped unsaid has failed, and is awaited for ever: an agent that cannot start never
//! claims to be ready. What is still awaited is logged at each step and shown by `/ready`.
#![forbid(unsafe_code)]

use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tracing::info;

#[derive(Clone)]
pub struct Readiness {
    state: Arc<Mutex<State>>,
}

struct State {
    pending: BTreeSet<&'static str>,
    started: Instant,
    /// From the start until nothing was awaited any more.
    took: Option<Duration>,
}

/// Something that is awaited.
#[must_use = "dropped, it is awaited for ever"]
pub struct Task {
    name: &'static str,
    state: Arc<Mutex<State>>,
}

impl Readiness {
    pub fn new() -> Self {
        Self {
            state: Arc::new(Mutex::new(State {
                pending: BTreeSet::new(),
                started: Instant::now(),
                took: None,
            })),
        }
    }

    /// `name` is a few words for people, once per process: `state`, `data threads`.
    pub fn register(&self, name: &'static str) -> Task {
        self.state.lock().pending.insert(name);
        Task {
            name,
            state: self.state.clone(),
        }
    }

    /// What is awaited; empty: ready.
    pub fn pending(&self) -> Vec<&'static str> {
        self.state.lock().pending.iter().copied().collect()
    }
}

impl Default for Readiness {
    fn default() -> Self {
        Self::new()
    }
}

impl Task {
    pub fn done(self) {
        let mut state = self.state.lock();
        state.pending.remove(self.name);
        let pending: Vec<_> = state.pending.iter().copied().collect();
        let took = state.started.elapsed();
        if pending.is_empty() && state.took.is_none() {
            state.took = Some(took);
        }
        drop(state);
        if pending.is_empty() {
            info!(done = self.name, ?took, "ready");
        } else {
            info!(
                done = self.name,
                ?took,
                awaited = pending.join(", "),
                "not ready yet"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_when_the_last_task_is_done_and_names_what_is_awaited() {
        let readiness = Readiness::new();
        let state = readiness.register("state");
        let threads = readiness.register("data threads");
        assert_eq!(readiness.pending(), ["data threads", "state"]);
        state.done();
        assert_eq!(readiness.pending(), ["data threads"]);
        threads.done();
        assert_eq!(readiness.pending(), Vec::<&str>::new());
    }

    #[test]
    fn a_start_that_fails_is_never_ready() {
        let readiness = Readiness::new();
        drop(readiness.register("certificates"));
        assert_eq!(readiness.pending(), ["certificates"]);
    }
}

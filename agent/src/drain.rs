//! Graceful end: one primitive, used by every loop that serves somebody.
//!
//! [`Drain::new`] makes the trigger and a first [`Guard`]. Every task that should be allowed to
//! finish holds a guard: it learns from it when the end begins and when patience is over, and the
//! drain waits until every guard is dropped. Nothing here knows what is being drained.
#![forbid(unsafe_code)]

use std::time::Duration;

use tokio::{sync::watch, time::timeout};

/// How far the end has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    Serving,
    /// What is open may finish.
    Draining,
    /// What is still open must end now.
    Forced,
}

/// How long a task may take to let go once it was forced.
const LAST_STEPS: Duration = Duration::from_secs(2);

/// Begins the end. There is one.
pub struct Drain {
    phase: watch::Sender<Phase>,
}

/// Held by whoever must be waited for.
#[derive(Clone)]
pub struct Guard {
    phase: watch::Receiver<Phase>,
}

/// How a drain ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drained {
    /// Everybody finished by themselves.
    Finished,
    /// The deadline passed and somebody was cut off.
    Forced,
    /// Somebody did not even let go when forced.
    Stuck,
}

impl Drain {
    pub fn new() -> (Self, Guard) {
        let (sender, receiver) = watch::channel(Phase::Serving);
        (Self { phase: sender }, Guard { phase: receiver })
    }

    /// Tells every guard, waits for them up to `deadline`, then forces them.
    pub async fn drain(self, deadline: Duration) -> Drained {
        self.phase.send_replace(Phase::Draining);
        if timeout(deadline, self.phase.closed()).await.is_ok() {
            return Drained::Finished;
        }
        self.phase.send_replace(Phase::Forced);
        match timeout(LAST_STEPS, self.phase.closed()).await {
            Ok(()) => Drained::Forced,
            Err(_) => Drained::Stuck,
        }
    }
}

impl Guard {
    /// Returns once the end has begun. A trigger that is gone counts as forced.
    pub async fn begun(&mut self) {
        // An error means that the sender is gone, which is an end too.
        let _gone = self.phase.wait_for(|phase| *phase >= Phase::Draining).await;
    }

    /// Returns once patience is over.
    pub async fn forced(&mut self) {
        let _gone = self.phase.wait_for(|phase| *phase >= Phase::Forced).await;
    }

    pub fn is_draining(&self) -> bool {
        *self.phase.borrow() >= Phase::Draining
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn waits_for_every_guard() {
        let (drain, guard) = Drain::new();
        let other = guard.clone();
        let mut first = guard;
        let task = tokio::spawn(async move {
            first.begun().await;
            tokio::time::sleep(Duration::from_secs(3)).await;
            drop(first);
        });
        drop(other);
        let begun = tokio::time::Instant::now();
        assert_eq!(
            drain.drain(Duration::from_secs(10)).await,
            Drained::Finished
        );
        assert_eq!(begun.elapsed(), Duration::from_secs(3));
        assert!(task.await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn forces_who_is_late() {
        let (drain, mut guard) = Drain::new();
        assert!(!guard.is_draining());
        let task = tokio::spawn(async move {
            guard.begun().await;
            assert!(guard.is_draining());
            guard.forced().await;
        });
        assert_eq!(drain.drain(Duration::from_secs(5)).await, Drained::Forced);
        assert!(task.await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn does_not_wait_for_ever() {
        let (drain, guard) = Drain::new();
        assert_eq!(drain.drain(Duration::from_secs(5)).await, Drained::Stuck);
        drop(guard);
    }

    #[tokio::test]
    async fn a_trigger_that_is_gone_ends_everybody() {
        let (drain, mut guard) = Drain::new();
        drop(drain);
        guard.forced().await;
    }
}

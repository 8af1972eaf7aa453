//! The loop: on every change, at every turn, when kicked and when a pod gets an interface, see what
//! is to be done and have it done on a few worker threads.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use picomesh_common::StandingKey;
use tokio::{
    sync::{Notify, mpsc, watch},
    task::{JoinSet, spawn_blocking},
};

use super::{
    super::{Desired, PodEvent, loader::LoaderError},
    captured::Core,
    enrolment,
    error::PodError,
    leaving::{self, Leave},
    pause::Turns,
    table::{Job, Outcome, Table},
};
use crate::state::PodUid;

/// A full turn: the kernel's state of every pod is read and compared. What somebody undid must be
/// mended within 30 seconds.
const FULL_TURN: Duration = Duration::from_secs(20);

/// Enrolments at a time. Loading programs is mostly CPU, so more would only take from the data
/// threads.
const WORKERS: usize = 4;

pub(super) struct Reconciler {
    pub(super) core: Arc<Core>,
    pub(super) table: Arc<Mutex<Table>>,
    pub(super) kick: Arc<Notify>,
    pub(super) turns: Arc<Turns>,
}

impl Reconciler {
    pub(super) async fn run(
        self,
        (first, mut desired): (Desired, watch::Receiver<Desired>),
        announced: Vec<PodEvent>,
        mut to_look_at: mpsc::Receiver<PodUid>,
    ) {
        for event in announced {
            if self.core.events.send(event).await.is_err() {
                return;
            }
        }
        {
            let mut table = self.table.lock();
            table.known = !first.pods.is_empty() || table.pods.is_empty();
            table.want(&first);
        }
        let mut next_full = Instant::now();
        loop {
            let turn = self.turns.take().await;
            // While it stood still another agent may have followed newer wishes.
            if desired.has_changed().is_ok_and(|changed| changed) {
                self.take_in(&mut desired);
            }
            let now = Instant::now();
            let all = now >= next_full;
            if all {
                next_full = now + FULL_TURN;
                self.look_at_host().await;
            }
            let jobs = self.table.lock().jobs(all, now);
            self.work(jobs).await;
            if self.table.lock().is_well() {
                self.tidy().await;
            }
            drop(turn);

            let wake = self.table.lock().next_look(Instant::now());
            let wake = wake.map_or(next_full, |wake| wake.min(next_full));
            tokio::select! {
                changed = desired.changed() => {
                    if changed.is_err() {
                        tracing::debug!("nobody says what is desired any more; all stays pinned");
                        return;
                    }
                    self.take_in(&mut desired);
                }
                () = self.kick.notified() => next_full = Instant::now(),
                Some(uid) = to_look_at.recv() => self.table.lock().look_at(&uid),
                () = tokio::time::sleep_until(wake.into()) => {}
            }
        }
    }

    fn take_in(&self, desired: &mut watch::Receiver<Desired>) {
        let desired = Arc::clone(&desired.borrow_and_update());
        let mut table = self.table.lock();
        table.known = true;
        table.want(&desired);
    }

    async fn work(&self, jobs: Vec<(PodUid, Job)>) {
        let standing = if jobs.iter().any(|(_, job)| matches!(job, Job::Check(..))) {
            let core = Arc::clone(&self.core);
            match spawn_blocking(move || core.loader.standing()).await {
                Ok(Ok(keys)) => keys,
                Ok(Err(error)) => {
                    tracing::warn!(%error, "cannot read the standing connections");
                    Vec::new()
                }
                Err(_ending) => return,
            }
        } else {
            Vec::new()
        };
        let standing: Arc<[StandingKey]> = standing.into();
        let core = Arc::clone(&self.core);
        side_by_side(
            jobs,
            move |job: Job| job.run(&core, &standing),
            || self.turns.is_asked(),
            |uid, result| self.table.lock().apply(uid, result, Instant::now()),
        )
        .await;
    }

    /// Every pod that should be captured is. What is pinned beside them is nobody's.
    async fn tidy(&self) {
        let core = Arc::clone(&self.core);
        let strays = core.claims.strays();
        if strays.is_empty() && !core.loader.has_former() {
            return;
        }
        let tidied = spawn_blocking(move || -> Result<(), PodError> {
            for (slot, netns) in strays {
                if leaving::take_out_stray(&core, slot, netns)? {
                    tracing::warn!(
                        slot,
                        netns,
                        "nobody claims what was pinned here; took it off"
                    );
                    core.claims.forget_stray(slot);
                } else {
                    tracing::debug!(
                        slot,
                        netns,
                        "nobody claims what is pinned here, and nothing \
                        leads to its namespace: it stays closed"
                    );
                }
            }
            Ok(core.loader.forget_former()?)
        });
        if let Ok(Err(error)) = tidied.await {
            tracing::warn!(%error, "cannot remove what an earlier agent left");
        }
    }

    async fn look_at_host(&self) {
        let core = Arc::clone(&self.core);
        match spawn_blocking(move || core.loader.mend_pins()).await {
            Ok(Ok(mended)) if mended.is_empty() => {}
            Ok(Ok(mended)) => {
                tracing::warn!(maps = ?mended, "mended: somebody removed pins of maps");
                self.table.lock().shared_repairs += 1;
            }
            Ok(Err(error)) => tracing::warn!(%error, "cannot mend the pins of maps"),
            Err(_ending) => return,
        }
        let core = Arc::clone(&self.core);
        let result = spawn_blocking(move || core.loader.attach_host_sockets()).await;
        let problem = match result {
            Ok(Ok(())) => None,
            Ok(Err(error)) => {
                let word = if matches!(error, LoaderError::NoCgroup2) {
                    "no_cgroup2"
                } else {
                    "host_sockets"
                };
                Some((word, PodError::from(error).sentence()))
            }
            Err(_ending) => return,
        };
        let mut table = self.table.lock();
        if let Some((reason, error)) = &problem
            && table.host_problem != problem
        {
            tracing::warn!(reason, error, "probes of the host are not recognised");
        }
        table.host_problem = problem;
    }
}

/// Does jobs on a few threads and hands over each result, until all are done or somebody wants the
/// rest to wait. A job that panics has failed like any other: it is tried again, and not at once.
async fn side_by_side<J: Send + 'static, T: Send + 'static>(
    jobs: Vec<(PodUid, J)>,
    run: impl Fn(J) -> Result<T, PodError> + Send + Sync + 'static,
    is_enough: impl Fn() -> bool,
    mut done: impl FnMut(&PodUid, Result<T, PodError>),
) {
    let run = Arc::new(run);
    let mut running = JoinSet::new();
    let mut whose = HashMap::new();
    let mut jobs = jobs.into_iter();
    loop {
        while running.len() < WORKERS
            && !is_enough()
            && let Some((uid, job)) = jobs.next()
        {
            let run = Arc::clone(&run);
            let task = running.spawn_blocking(move || run(job));
            whose.insert(task.id(), uid);
        }
        let (task, result) = match running.join_next_with_id().await {
            Some(Ok((task, result))) => (task, result),
            Some(Err(error)) => (error.id(), Err(PodError::Worker(error))),
            None => return,
        };
        if let Some(uid) = whose.remove(&task) {
            done(&uid, result);
        }
    }
}

impl Job {
    fn run(self, core: &Core, standing: &[StandingKey]) -> Result<Outcome, PodError> {
        match self {
            Self::Enrol(pod) => enrolment::enrol(core, &pod).map(Outcome::Enrolled),
            Self::Check(pod, captured) => {
                enrolment::check(core, &pod, &captured, standing).map(Outcome::Checked)
            }
            Self::Leave(captured, leave) => {
                let now = Instant::now();
                // Held for the whole step; nobody else wants it but the next step.
                let mut leave = leave.lock();
                let leave = match &mut *leave {
                    Some(leave) => leave,
                    none => none.insert(Leave::begin(core, &captured, now)?),
                };
                Ok(if leave.step(core, &captured, now)? {
                    Outcome::Left
                } else {
                    Outcome::StillLeaving
                })
            }
            Self::Gone(captured) => leaving::gone(core, &captured).map(|()| Outcome::Left),
            Self::Forget(uid) => leaving::forget(core, &uid).map(|()| Outcome::Forgotten),
            Self::ForgetGone(uid) => Ok(if leaving::forget_gone(core, &uid)? {
                Outcome::Forgotten
            } else {
                Outcome::Stays
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_job_that_panics_has_failed_and_the_others_are_done() {
        let names: Vec<String> = (0..10).map(|number| format!("pod-{number}")).collect();
        let jobs = names.iter().map(|name| (PodUid::from(&**name), &**name));
        let jobs = jobs.map(|(uid, name)| (uid, name.to_owned())).collect();
        let mut results = Vec::new();
        side_by_side(
            jobs,
            |name: String| {
                assert_ne!(name, "pod-3", "as meant");
                Ok(())
            },
            || false,
            |uid, result| results.push((uid.to_string(), result.err().map(|e| e.reason()))),
        )
        .await;
        results.sort_unstable();
        let expected: Vec<_> = names
            .into_iter()
            .map(|name| {
                let failed = (name == "pod-3").then_some("worker");
                (name, failed)
            })
            .collect();
        assert_eq!(results, expected);
    }
}

//! Holding the loop still while a successor takes over: nothing is enrolled, mended or released
//! until it goes on, if it does.
//!
//! The loop takes the one permit for each turn and starts no more jobs in it once somebody waits
//! for the permit, so a pause begins within one job's time. What was left undone is found by the
//! full turn that follows.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    task::spawn_blocking,
};

use super::{
    Datapath,
    captured::Captured,
    table::{Stage, Table},
};

/// Whose turn it is: the loop's, or nobody's.
pub(super) struct Turns {
    free: Arc<Semaphore>,
    /// Somebody wants it to stand still.
    asked: AtomicBool,
}

/// The loop stands still while this is held.
pub struct Paused {
    _turn: Option<OwnedSemaphorePermit>,
}

impl Turns {
    pub(super) fn new() -> Self {
        Self {
            free: Arc::new(Semaphore::new(1)),
            asked: AtomicBool::new(false),
        }
    }

    /// The loop's, for one turn.
    pub(super) async fn take(&self) -> Option<OwnedSemaphorePermit> {
        // Never closed.
        Arc::clone(&self.free).acquire_owned().await.ok()
    }

    /// The turn should end soon.
    pub(super) fn is_asked(&self) -> bool {
        self.asked.load(Ordering::Relaxed)
    }
}

impl Datapath {
    /// Returns when the loop stands still.
    pub async fn pause(&self) -> Paused {
        self.turns.asked.store(true, Ordering::Relaxed);
        let turn = self.turns.take().await;
        self.turns.asked.store(false, Ordering::Relaxed);
        Paused { _turn: turn }
    }

    /// Goes on, after a successor that died. Its listeners may have stood in the place of ours, so
    /// ours come first; then everything is looked at.
    pub async fn resume(&self, paused: Paused) {
        let (core, pods) = (Arc::clone(&self.core), captured(&self.table.lock()));
        let put_back = spawn_blocking(move || {
            for pod in pods {
                if let Err(error) = pod.put_in_map(&core) {
                    let error = error.sentence();
                    tracing::warn!(pod = pod.name, error, "its listeners are not back yet");
                }
            }
        });
        // What could not be put back is found by the full turn.
        let _ended = put_back.await;
        drop(paused);
        self.kick();
    }

    /// A successor serves. Gives up this room's copies of the listeners, so that those who accept
    /// from them can close them.
    pub fn let_go(&self) {
        for pod in captured(&self.table.lock()) {
            pod.members.lock().clear();
        }
    }
}

fn captured(table: &Table) -> Vec<Arc<Captured>> {
    let pods = table.pods.values().filter_map(|entry| match &entry.stage {
        Stage::Captured(captured) | Stage::Leaving(captured, _) => Some(Arc::clone(captured)),
        Stage::Pending | Stage::Failed => None,
    });
    pods.collect()
}

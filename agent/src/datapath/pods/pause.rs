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

use super::{Datapath, regain};

/// Whose turn it is: the loop's, or nobody's.
pub(super) struct Turns {
    free: Arc<Semaphore>,
    /// Somebody wants it to stand still.
    asked: AtomicBool,
}

/// The loop stands still while this is held.
pub struct Paused {
    turn: Option<OwnedSemaphorePermit>,
}

impl Paused {
    /// The loop has had its last turn, whatever becomes of who held it.
    pub fn for_good(self) {
        if let Some(turn) = self.turn {
            turn.forget();
        }
    }
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
        Paused { turn }
    }

    /// Goes on, after a successor that died. Its listeners may have stood in the place of ours, so
    /// ours come first; then everything is looked at.
    pub async fn resume(&self, paused: Paused) {
        let (core, table) = (Arc::clone(&self.core), Arc::clone(&self.table));
        let regained = spawn_blocking(move || regain::regain(&core, &table));
        if let Err(error) = regained.await {
            tracing::error!(%error, "what the successor left could not be looked through");
        }
        drop(paused);
        self.kick();
    }

    /// Nobody comes after us who could be led here instead: new connections wait from here on, as
    /// without an agent. The loop, which would repair that, has had its last turn.
    pub async fn close(&self) {
        self.pause().await.for_good();
        let (core, pods) = (Arc::clone(&self.core), self.table.lock().captured());
        let closed = spawn_blocking(move || {
            for pod in pods {
                if let Err(error) = pod.take_from_map(&core) {
                    tracing::warn!(pod = pod.name, %error, "new connections come to the last moment");
                }
            }
        });
        if let Err(error) = closed.await {
            tracing::error!(%error, "new connections come to the last moment");
        }
        self.let_go();
    }

    /// A successor serves. Gives up this room's copies of the listeners, so that those who accept
    /// from them can close them.
    pub fn let_go(&self) {
        for pod in self.table.lock().captured() {
            pod.members.lock().clear();
        }
    }
}

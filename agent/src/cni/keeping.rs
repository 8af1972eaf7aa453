//! Keeps the file of [`intent`](super::intent) as the mesh is: written after every change, and put
//! back if somebody removes it.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{sync::watch, task::spawn_blocking, time::timeout};
use tracing::{info, warn};

use super::intent::Intent;
use crate::drain;

/// How often is looked whether the file is still there, and a write that failed tried again.
const TURN: Duration = Duration::from_secs(30);

/// Until the end begins. `None` in `intents`: not known yet, what an agent before wrote stays.
/// `written` is told when the file first stands: before that no plugin may be installed. Nothing is
/// written while `writes` says no: then another agent does.
pub async fn keep(
    path: PathBuf,
    mut intents: watch::Receiver<Option<Intent>>,
    writes: Arc<AtomicBool>,
    written: watch::Sender<bool>,
    mut drain: drain::Guard,
) {
    let mut failed = false;
    loop {
        let now = intents.borrow_and_update().clone();
        if let Some(intent) = now.filter(|_| writes.load(Ordering::Acquire)) {
            let path = path.clone();
            match spawn_blocking(move || intent.write(&path)).await {
                Ok(Ok(())) => {
                    if failed {
                        info!("what the CNI plugin goes by is written again");
                    }
                    failed = false;
                    written.send_if_modified(|written| !std::mem::replace(written, true));
                }
                Ok(Err(error)) => {
                    if !failed {
                        warn!(
                            %error,
                            "cannot write what the CNI plugin goes by while no agent answers; \
                             meshed pods may be taken for others then"
                        );
                    }
                    failed = true;
                }
                // The runtime ends.
                Err(_) => return,
            }
        }
        tokio::select! {
            () = drain.begun() => return,
            changed = timeout(TURN, intents.changed()) => if matches!(changed, Ok(Err(_))) {
                // Nobody knows anything new any more.
                return;
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn yes() -> Arc<AtomicBool> {
        Arc::new(AtomicBool::new(true))
    }

    fn meshed(namespace: &str) -> Option<Intent> {
        Some(Intent::of(
            &Intent::default(),
            [(namespace, true)],
            [],
            false,
        ))
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn the_file_follows_the_mesh_and_is_not_touched_before_that_is_known() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("picomesh/cni.json");
        meshed("before").unwrap().write(&path).unwrap();
        let (told, intents) = watch::channel(None);
        let (written, mut was_written) = watch::channel(false);
        let (drain, guard) = drain::Drain::new();
        let kept = tokio::spawn(keep(path.clone(), intents, yes(), written, guard));
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!(Intent::read(&path).ok(), meshed("before"));
        assert!(!*was_written.borrow());

        told.send_replace(meshed("shop"));
        was_written.changed().await.unwrap();
        assert_eq!(Intent::read(&path).ok(), meshed("shop"));

        told.send_replace(meshed("bank"));
        let mut tries = 0;
        while Intent::read(&path).ok() != meshed("bank") {
            tries += 1;
            assert!(tries < 1000);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        drain.drain(Duration::from_secs(5)).await;
        kept.await.unwrap();
        assert!(
            path.exists(),
            "the plugin needs it most when no agent is there"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_file_that_somebody_removed_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cni.json");
        let (_told, intents) = watch::channel(meshed("shop"));
        let (written, mut was_written) = watch::channel(false);
        let (_drain, guard) = drain::Drain::new();
        tokio::spawn(keep(path.clone(), intents, yes(), written, guard));
        was_written.changed().await.unwrap();
        fs::remove_file(&path).unwrap();
        tokio::time::sleep(TURN * 2).await;
        assert_eq!(Intent::read(&path).ok(), meshed("shop"));
    }
}

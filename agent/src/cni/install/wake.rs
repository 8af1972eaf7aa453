//! Being told when something happens in a directory of the node.

use std::{path::PathBuf, sync::Arc};

use notify::Watcher;
use tokio::sync::Notify;
use tracing::warn;

/// Wakes when something happens in one of the directories. Where that cannot be told, the poll
/// finds it.
pub(super) struct Watch {
    watcher: notify::RecommendedWatcher,
    directories: Vec<PathBuf>,
}

impl Watch {
    pub(super) fn new(changed: &Arc<Notify>) -> Option<Self> {
        let changed = Arc::clone(changed);
        let told = move |event: notify::Result<notify::Event>| {
            // Our own reading is an event too.
            if !event.is_ok_and(|event| event.kind.is_access()) {
                changed.notify_one();
            }
        };
        let watcher = notify::recommended_watcher(told)
            .inspect_err(|error| warn!(%error, "CNI directories are polled, not watched"))
            .ok()?;
        Some(Self {
            watcher,
            directories: Vec::new(),
        })
    }

    pub(super) fn follow(&mut self, now: &[PathBuf]) {
        if now == self.directories {
            return;
        }
        for gone in self.directories.iter().filter(|dir| !now.contains(dir)) {
            // It may be watched no more because it is no more.
            let _gone = self.watcher.unwatch(gone);
        }
        for new in now.iter().filter(|dir| !self.directories.contains(dir)) {
            let mode = notify::RecursiveMode::NonRecursive;
            if let Err(error) = self.watcher.watch(new, mode) {
                warn!(dir = %new.display(), %error, "a CNI directory is polled, not watched");
            }
        }
        self.directories = now.to_vec();
    }
}

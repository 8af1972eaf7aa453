//! Who is told when something in the directory changes, and which files somebody is writing.
//!
//! A file that is written in place is empty or half for a while, and how long that takes is the
//! writer's affair: `kubectl get … > shop.yaml` empties it at once and writes it a second later.
//! The system tells when bytes came and when the writer closed the file. In between nobody reads it.
//! A file system that does not tell (of another machine's writers) leaves that to
//! [`super::directory`], which waits until a text has come to rest.

use std::{
    collections::HashMap,
    ffi::OsString,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use notify::{
    EventKind, Watcher,
    event::{AccessKind, AccessMode, ModifyKind},
};
use parking_lot::Mutex;
use tokio::sync::watch;
use tracing::warn;

/// Whoever keeps a file open for longer after its last bytes has written them all.
const WRITES: Duration = Duration::from_secs(10);
/// Names kept at most.
const MAX_WRITERS: usize = 4096;
const CLOSED: EventKind = EventKind::Access(AccessKind::Close(AccessMode::Write));

/// Files that were written to and not closed since, by name, with the time of their last bytes.
#[derive(Clone, Default)]
pub(super) struct Writers(Arc<Mutex<HashMap<OsString, Instant>>>);

impl Writers {
    pub(super) fn has(&self, path: &Path) -> bool {
        let writers = self.0.lock();
        let last = path.file_name().and_then(|name| writers.get(name));
        last.is_some_and(|last| last.elapsed() < WRITES)
    }

    fn take_in(&self, event: &notify::Event) {
        let wrote = matches!(event.kind, EventKind::Modify(ModifyKind::Data(_)));
        let over = event.kind == CLOSED
            || event.kind.is_remove()
            || matches!(event.kind, EventKind::Modify(ModifyKind::Name(_)));
        if !wrote && !over {
            return;
        }
        let mut writers = self.0.lock();
        for name in event.paths.iter().filter_map(|path| path.file_name()) {
            if over {
                writers.remove(name);
            } else if writers.len() < MAX_WRITERS || writers.contains_key(name) {
                writers.insert(name.to_owned(), Instant::now());
            }
        }
    }
}

/// Tells `changed` of everything that happens in `dir` and `writers` of who writes there, for as
/// long as it is kept. `None`, with a warning, where the system has no more watches to give.
pub(super) fn watch(
    dir: &Path,
    changed: watch::Sender<()>,
    writers: Writers,
) -> Option<notify::RecommendedWatcher> {
    let told = move |event: notify::Result<notify::Event>| {
        if let Ok(event) = &event {
            writers.take_in(event);
        }
        // Our own reading is an event too.
        if !event.is_ok_and(|event| event.kind.is_access() && event.kind != CLOSED) {
            changed.send_replace(());
        }
    };
    notify::recommended_watcher(told)
        .and_then(|mut watcher| {
            watcher.watch(dir, notify::RecursiveMode::NonRecursive)?;
            Ok(watcher)
        })
        .inspect_err(|error| {
            let seconds = super::POLL.as_secs();
            warn!(%error, "cannot watch the manifests, so they are read every {seconds} s");
        })
        .ok()
}

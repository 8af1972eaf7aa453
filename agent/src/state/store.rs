//! Where the current mesh is published. The only file of the room that wakes anybody.

use std::sync::Arc;

use arc_swap::ArcSwap;
use tokio::sync::watch;

use super::Mesh;

/// The one place where the current mesh is published. One writer, any number of readers.
pub struct MeshStore {
    current: ArcSwap<Mesh>,
    /// Version of the published mesh; tells waiting tasks that there is a newer one.
    changed: watch::Sender<u64>,
}

impl MeshStore {
    pub fn new(mesh: Mesh) -> Self {
        let (changed, _) = watch::channel(mesh.version);
        Self {
            current: ArcSwap::from_pointee(mesh),
            changed,
        }
    }

    pub fn load(&self) -> arc_swap::Guard<Arc<Mesh>> {
        self.current.load()
    }

    pub fn publish(&self, mesh: Mesh) {
        let version = mesh.version;
        self.current.store(Arc::new(mesh));
        self.changed.send_replace(version);
    }

    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }
}

//! What this agent leaves to its successor, room by room, and in which order.

use std::{
    io,
    net::SocketAddr,
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use tokio::task::AbortHandle;
use tracing::warn;

use super::{Dirs, sockets::SocketNames};
use crate::{
    datapath::{Datapath, Paused},
    handover::{
        message::{KNOWS_BPF_LOCK, What},
        predecessor,
    },
    proxy::Proxy,
};

/// After a hand-over the pods' listeners are open for so long at least: a handshake whose SYN-ACK
/// was lost once takes a second more.
const RETIRING: Duration = Duration::from_secs(3);

/// The directories, until they are the successor's.
pub(super) type HeldDirs = Arc<Mutex<Option<Dirs>>>;

pub(super) struct Estate {
    pub(super) dirs: HeldDirs,
    pub(super) sockets: SocketNames,
    /// A copy of the socket of metrics and readiness, until the successor has it.
    pub(super) metrics: Mutex<Option<(SocketAddr, OwnedFd)>>,
    pub(super) proxy: Arc<Proxy>,
    pub(super) datapath: Arc<Datapath>,
    /// Held from `commit` to the end, or until the successor died.
    pub(super) paused: Mutex<Option<Paused>>,
    /// The snapshot, the node's own files and its MeshNode are ours to write.
    pub(super) writes: Arc<AtomicBool>,
    /// Those who accept from sockets that the successor shares or has put its own in the place of.
    pub(super) accepting: Vec<AbortHandle>,
}

impl predecessor::Estate for Estate {
    fn files(&self, protocol: u16) -> io::Result<Vec<(What, OwnedFd)>> {
        let mut files = Vec::new();
        if let Some(dirs) = &*self.dirs.lock() {
            files.push((What::Lock, dirs.run.lock()?));
            if protocol >= KNOWS_BPF_LOCK {
                files.push((What::BpfLock, dirs.bpf.lock()?));
            }
        }
        if let Some((address, socket)) = &*self.metrics.lock() {
            let address = *address;
            files.push((What::Metrics { address }, socket.try_clone()?));
        }
        for socket in self.proxy.tunnel_sockets()? {
            let address = socket.local_addr()?;
            files.push((What::Tunnels { address }, socket.into()));
        }
        Ok(files)
    }

    fn pause(&self) -> BoxFuture<'_, ()> {
        Box::pin(async {
            self.writes.store(false, Ordering::Release);
            self.sockets.keep();
            let paused = self.datapath.pause().await;
            *self.paused.lock() = Some(paused);
        })
    }

    fn resume(&self) -> BoxFuture<'_, ()> {
        Box::pin(async {
            // The successor had put its name there.
            let signed = self.dirs.lock().as_ref().map(|dirs| dirs.run.sign());
            if let Some(Err(error)) = signed {
                warn!(%error, "--run-dir: its lock does not name this process");
            }
            self.sockets.put_back();
            let paused = self.paused.lock().take();
            if let Some(paused) = paused {
                self.datapath.resume(paused).await;
            }
            self.writes.store(true, Ordering::Release);
        })
    }

    fn leave(&self) -> BoxFuture<'_, ()> {
        Box::pin(async {
            self.sockets.give_up();
            // With the server of the CNI socket those that wait end, too: what they wait for is not
            // done here any more.
            for task in &self.accepting {
                task.abort();
            }
            self.metrics.lock().take();
            // This value ends with the conversation. The loop would go on, miss the listeners that
            // are given up here, and put new ones in the place of the successor's.
            let paused = self.paused.lock().take();
            if let Some(paused) = paused {
                paused.for_good();
            }
            self.proxy.retire(RETIRING).await;
            self.datapath.let_go();
            self.dirs.lock().take();
        })
    }
}

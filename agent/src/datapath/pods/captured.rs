//! What every enrolment of this agent shares ([`Core`]), and one enrolled pod ([`Captured`]).

use std::{
    collections::{HashMap, HashSet},
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    sync::Arc,
};

use parking_lot::Mutex;
use picomesh_common::config::{INBOUND, OUTBOUND, owner};
use tokio::sync::mpsc;

use super::{
    super::{
        DesiredPod, PodEvent, PodListeners, PodSockets,
        devices::{ALIAS_PREFIX, DeviceOwner},
        diag::{self, Connections},
        loader::Loader,
        netns::{Home, NetNs},
        sockets::{self, PodHandle, SocketOwner},
    },
    DatapathSettings,
    claims::Claims,
    error::PodError,
    link_watch::LinkWatch,
    records::Marks,
};
use crate::state::PodUid;

/// What every enrolment of this agent shares.
pub(super) struct Core {
    pub(super) settings: DatapathSettings,
    pub(super) loader: Loader,
    pub(super) home: Arc<Home>,
    pub(super) marks: Marks,
    pub(super) owner: SocketOwner,
    pub(super) events: mpsc::Sender<PodEvent>,
    pub(super) claims: Claims,
    /// Pods that the loop must look at before its next turn.
    pub(super) looks: mpsc::Sender<PodUid>,
}

/// A pod that is enrolled, or on its way out.
pub(super) struct Captured {
    pub(super) handle: Arc<PodHandle>,
    pub(super) name: String,
    pub(super) netns_path: PathBuf,
    alias: String,
    /// The members that stand in `LISTENERS`, by (direction, family): a second descriptor of each,
    /// so that a repair can put them back.
    pub(super) members: Mutex<HashMap<(u32, u32), TcpListener>>,
    /// `None`: new interfaces are found by the next full turn.
    _links: Option<LinkWatch>,
}

impl Captured {
    pub(super) fn new(core: &Core, handle: Arc<PodHandle>, name: &str, netns_path: &Path) -> Self {
        // Before anybody looks which interfaces there are: none may come in between.
        let links = LinkWatch::start(&handle, core.looks.clone())
            .inspect_err(|error| {
                tracing::warn!(pod = name, %error, "new interfaces of this pod are found late");
            })
            .ok();
        let mut captured = Self {
            _links: links,
            handle,
            name: name.into(),
            netns_path: netns_path.into(),
            alias: String::new(),
            members: Mutex::default(),
        };
        captured.alias = alias(&core.settings.bpf_dir, captured.uid());
        captured
    }

    pub(super) fn uid(&self) -> &PodUid {
        self.handle.uid()
    }

    /// Is its namespace where whoever desires the pod says, by whatever path? If that leads nowhere
    /// or nobody says anything: where it was.
    pub(super) fn is_there(&self, desired: Option<&DesiredPod>) -> bool {
        let netns = self.handle.netns();
        let said = desired.and_then(|pod| netns.is_at(&pod.netns));
        said.unwrap_or_else(|| netns.is_at(&self.netns_path) == Some(true))
    }

    pub(super) fn device_owner(&self, on_record: bool) -> DeviceOwner {
        DeviceOwner {
            alias: self.alias.clone(),
            on_record,
        }
    }

    /// Puts listeners into the map and hands them to the data threads.
    pub(super) fn install(
        &self,
        core: &Core,
        listeners: Vec<PodListeners>,
    ) -> Result<(), PodError> {
        self.keep_members(&listeners)?;
        self.put_in_map(core)?;
        let event = PodEvent::Captured {
            pod: Arc::<PodHandle>::clone(&self.handle),
            listeners,
        };
        core.events
            .blocking_send(event)
            .map_err(|_closed| PodError::NobodyServes)
    }

    pub(super) fn keep_members(&self, listeners: &[PodListeners]) -> Result<(), PodError> {
        let Some(first) = listeners.first() else {
            return Ok(());
        };
        let mut members = HashMap::new();
        for (direction, group) in [(OUTBOUND, &first.outbound), (INBOUND, &first.inbound)] {
            for (family, listener) in sockets::FAMILIES.into_iter().zip(group) {
                let member = listener.try_clone().map_err(|source| PodError::Sockets {
                    doing: "duplicating a listener",
                    source,
                })?;
                members.insert((direction, family), member);
            }
        }
        *self.members.lock() = members;
        Ok(())
    }

    pub(super) fn put_in_map(&self, core: &Core) -> Result<(), PodError> {
        for ((direction, family), member) in self.members.lock().iter() {
            core.loader
                .set_listener(self.handle.slot(), *direction, *family, member)?;
        }
        Ok(())
    }

    /// Leads nobody to our listeners any more; whoever is in their queues stays there.
    pub(super) fn take_from_map(&self, core: &Core) -> Result<(), PodError> {
        for (direction, family) in self.members.lock().keys() {
            core.loader
                .clear_listener(self.handle.slot(), *direction, *family)?;
        }
        Ok(())
    }
}

/// Written into the devices, so that no other agent takes the namespace for free.
pub(super) fn alias(bpf_dir: &Path, uid: &str) -> String {
    let mut alias = format!("{ALIAS_PREFIX}{uid} {}", bpf_dir.display());
    let mut end = alias.len().min(250);
    while !alias.is_char_boundary(end) {
        end -= 1;
    }
    alias.truncate(end);
    alias
}

pub(super) fn list_connections(core: &Core) -> Result<Connections, PodError> {
    diag::connections(core.marks.ours).map_err(|source| PodError::Sockets {
        doing: "listing sockets",
        source,
    })
}

/// Which connections of an application in the calling thread's namespace were taken: (local,
/// remote). Their sockets know, also when our end and whoever made it is gone.
pub(super) fn list_taken(loader: &Loader) -> Result<HashSet<(SocketAddr, SocketAddr)>, PodError> {
    diag::of_owner(loader.storages(), owner::TAKEN).map_err(|source| PodError::Sockets {
        doing: "asking sockets whose they are",
        source,
    })
}

/// Runs `work` inside the pod's namespace.
pub(super) fn inside<T: Send>(
    netns: &NetNs,
    work: impl FnOnce() -> Result<T, PodError> + Send,
) -> Result<T, PodError> {
    netns.run(work).map_err(|source| PodError::Sockets {
        doing: "entering",
        source,
    })?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_alias_fits_into_the_kernels_field() {
        let alias = alias(Path::new("/sys/fs/bpf/picomesh"), &"ü".repeat(300));
        assert!(alias.len() <= 255 && alias.starts_with(ALIAS_PREFIX));
    }
}

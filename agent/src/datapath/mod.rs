//! The kernel is told: programs, devices, listeners, sockets inside pods. The only room that names
//! aya and netlink.
//!
//! [`pods`] compares what should be with what the kernel says, level-triggered, and repairs. For
//! each captured pod it hands a [`PodHandle`] and one set of listeners per data thread to whoever
//! serves connections. It knows nothing of identities, tunnels or policy.

mod bpffs;
pub mod devices;
pub mod diag;
pub mod loader;
mod netlink;
pub mod netns;
pub mod pods;
pub mod sockets;

use std::{collections::HashSet, net::TcpListener, path::PathBuf, sync::Arc};

use picomesh_common::PodConfig;

use crate::state::PodUid;

pub use bpffs::{BpffsError, mount_bpffs};
pub use loader::Generation;
pub use pods::{Capture, Datapath, DatapathSettings, Paused, PodStatus, make_bpf_dir};
pub use sockets::{PodHandle, PodSockets, Source, keep_alive};

/// What the kernel should do for one pod.
#[derive(Clone, Debug, PartialEq)]
pub struct DesiredPod {
    pub uid: PodUid,
    /// namespace/name, for logs.
    pub name: String,
    pub ips: Vec<std::net::IpAddr>,
    /// Skip ranges; flags are the room's own.
    pub config: PodConfig,
    /// The pod's network namespace, found by whoever runs pods here.
    pub netns: PathBuf,
}

/// What should be captured on this node, as one level-triggered word.
pub type Desired = Arc<Wishes>;

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Wishes {
    pub pods: Vec<DesiredPod>,
    pub others: Others,
}

/// What becomes of a captured pod that is not among those.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Others {
    /// It leaves.
    #[default]
    Leave,
    /// It leaves if it is among these, of which is known that they are outside of the mesh. Of
    /// another nothing is known any more, and its containers may run on: it stays as it is until
    /// its namespace is gone.
    Stay { but: HashSet<PodUid> },
}

impl Others {
    pub(crate) fn leaves(&self, uid: &PodUid) -> bool {
        match self {
            Self::Leave => true,
            Self::Stay { but } => but.contains(uid),
        }
    }
}

impl From<Vec<DesiredPod>> for Wishes {
    /// All others leave.
    fn from(pods: Vec<DesiredPod>) -> Self {
        Self {
            pods,
            others: Others::Leave,
        }
    }
}

/// What the data threads must do.
pub enum PodEvent {
    /// Serve these listeners; element `i` belongs to data thread `i`. Sent before the programs let
    /// the first packet through, after an adoption, and again (same handle) when the listeners had
    /// to be made anew: they then take the place of those before.
    Captured {
        pod: Arc<dyn PodSockets>,
        listeners: Vec<PodListeners>,
    },
    /// The pod is gone or left the mesh: stop accepting; open connections finish or die with it.
    Released { uid: PodUid },
}

/// Non-blocking listeners inside the pod's netns, per family; IPv6 is absent where it is disabled.
#[derive(Debug, Default)]
pub struct PodListeners {
    pub outbound: Vec<TcpListener>,
    pub inbound: Vec<TcpListener>,
}

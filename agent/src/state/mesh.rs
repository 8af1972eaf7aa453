//! The index: all objects of one moment, resolved against each other. Immutable once built.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use arc_swap::ArcSwap;
use picomesh_common::PortRange;
use tokio::sync::watch;

use super::{
    Identity, ObjectKey, PodUid,
    objects::{ContainerPort, Labels, MeshSettings, Objects, OutboundDefault, Owner},
    policy::InboundPolicy,
    resolve::Frontend,
};

/// A live pod, with everything that a connection's story needs of it.
#[derive(Debug)]
pub struct Workload {
    pub uid: PodUid,
    pub key: ObjectKey,
    pub identity: Identity,
    pub node: Option<Arc<str>>,
    /// It runs on this agent's node.
    pub local: bool,
    pub ips: Vec<IpAddr>,
    pub host_network: bool,
    /// Meshed by desired state: labels say so and it is not exempt.
    pub meshed: bool,
    pub labels: Labels,
    pub owner: Option<Owner>,
    pub ports: Vec<ContainerPort>,
    pub skip_inbound: Vec<PortRange>,
    pub skip_outbound: Vec<PortRange>,
    pub outbound_default: OutboundDefault,
    /// Who may come in. Built for local pods only; `None` elsewhere.
    pub policy: Option<Arc<InboundPolicy>>,
}

/// Everything we know at one moment, indexed.
#[derive(Debug)]
pub struct Mesh {
    pub settings: Arc<MeshSettings>,
    /// Counts the builds of this process, from 1.
    pub version: u64,
    pub workloads: HashMap<PodUid, Arc<Workload>>,
    /// Live, not terminal, not host-network. Addresses claimed twice are absent (see problems).
    pub by_ip: HashMap<IpAddr, Arc<Workload>>,
    pub frontends: HashMap<SocketAddr, Arc<Frontend>>,
    pub node_addresses: HashMap<Arc<str>, Vec<IpAddr>>,
    pub node_of_address: HashMap<IpAddr, Arc<str>>,
    /// What could not be resolved; shown by `debug state`, counted in a metric.
    pub problems: Vec<Problem>,
}

/// Something in the objects that a person should mend; the rest works on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Kind of the object, e.g. `Server`.
    pub kind: &'static str,
    pub object: ObjectKey,
    /// What is wrong and what to do.
    pub message: String,
}

impl Mesh {
    /// Resolves all objects against each other. Cannot fail: what does not fit is a [`Problem`].
    pub fn build(_settings: Arc<MeshSettings>, _version: u64, _objects: &Objects) -> Self {
        unreachable!("written by the room's owner")
    }
}

/// The one place where the current mesh is published. One writer, any number of readers.
pub struct MeshStore {
    current: ArcSwap<Mesh>,
    /// Version of the published mesh; tells waiting tasks that there is a newer one.
    changed: watch::Sender<u64>,
}

impl MeshStore {
    pub fn new(mesh: Mesh) -> Self {
        let (changed, _) = watch::channel(mesh.version);
        Self { current: ArcSwap::from_pointee(mesh), changed }
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

//! Where does an address lead? From the original destination to a service or workload, and on to
//! its endpoints with the carrier each needs. Pure.

use std::{net::{IpAddr, SocketAddr}, sync::Arc};

use super::{Mesh, ObjectKey, Workload};

/// What stands at a frontend's (address, port).
#[derive(Debug)]
pub enum Frontend {
    Service(Arc<ServiceFrontend>),
    /// A hostPort: exactly this pod and port.
    HostPort { workload: Arc<Workload>, port: u16 },
}

/// One port of a Service at one kind of address.
#[derive(Debug)]
pub struct ServiceFrontend {
    pub service: ObjectKey,
    /// The Service's own port (not the target's).
    pub port: u16,
    pub port_name: Option<Arc<str>>,
    /// Ready ones; or the serving and terminating ones where there is no ready one. All nodes.
    pub endpoints: Vec<Endpoint>,
    /// sessionAffinity ClientIP: seconds.
    pub affinity: Option<u32>,
}

/// One place a connection can end at.
#[derive(Clone, Debug)]
pub struct Endpoint {
    pub addr: SocketAddr,
    /// `None`: an address that belongs to no pod we know.
    pub workload: Option<Arc<Workload>>,
    pub carrier: Carrier,
}

/// How bytes get to an endpoint. Decided by desired state alone, never by trying.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Carrier {
    /// A meshed pod on this node: a socket in its netns.
    Local,
    /// A meshed pod on another node: a tunnel to that node's agent.
    Tunnel { node: Arc<str>, addresses: Vec<IpAddr> },
    /// Outside the mesh: a plain socket from the caller's netns.
    Plain,
}

/// The answer.
#[derive(Debug)]
pub enum Destination {
    Service(Arc<ServiceFrontend>),
    /// A pod's own address, or one reached by a hostPort.
    Endpoint(Endpoint),
    /// Nobody in the mesh has this address; `outbound-default` allows it.
    Passthrough(SocketAddr),
    Refused(RefusedDestination),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefusedDestination {
    /// A Service with that address exists, and has no endpoint to offer.
    NoEndpoints,
    /// A Service has that address, but not that port.
    NoSuchPort,
    /// Two live pods claim the address.
    AmbiguousAddress,
    /// Loopback, unspecified, multicast, or a listener's own address.
    Unroutable,
    /// The node's own tunnel port, from a pod.
    TunnelPort,
    /// `outbound-default: deny`.
    OutboundDefaultDeny,
}

/// Where does `destination`, as dialled by `source`, lead?
pub fn resolve(_mesh: &Mesh, _source: &Workload, _destination: SocketAddr) -> Destination {
    unreachable!("written by the room's owner")
}

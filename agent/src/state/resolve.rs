//! Where does an address lead? From the original destination to a service or workload, and on to
//! its endpoints with the carrier each needs. Pure.
//!
//! Called once per outbound connection. What it can answer was worked out when the mesh was built
//! (`frontends`); here are two look-ups and the order in which they count:
//!
//! 1. addresses that lead nowhere, and the tunnel ports of nodes, are refused whoever claims them;
//!    a node's metrics are whoever's who asks, so that a meshed Prometheus reads them (rule 8);
//! 2. a frontend: the address and port of a Service, or a host port; one that two pods of a node
//!    claim is refused;
//! 3. a pod's own address, whatever the port and whether or not the pod is ready: who dials a pod
//!    means that pod;
//! 4. another port of a Service's cluster address is refused, as kube-proxy does;
//! 5. the rest is nobody's in the mesh: `outbound-default` of the calling pod decides.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
};

use super::{Mesh, ObjectKey, Workload, objects::OutboundDefault};

/// What stands at a frontend's (address, port).
#[derive(Debug)]
pub enum Frontend {
    Service(Arc<ServiceFrontend>),
    /// A hostPort: exactly this pod and port.
    HostPort {
        workload: Arc<Workload>,
        port: u16,
    },
}

/// One port of a Service at one kind of address.
#[derive(Debug)]
pub struct ServiceFrontend {
    pub service: ObjectKey,
    /// The Service's own port (not the target's).
    pub port: u16,
    pub port_name: Option<Arc<str>>,
    /// Ready ones; or the serving and terminating ones where there is no ready one. All nodes,
    /// unless a traffic policy narrows it. Of the family of the address.
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
    /// A meshed pod on another node: a tunnel to that node's agent. No address is known if the
    /// Node object is missing: the connection fails then, it never goes plain.
    Tunnel {
        node: Arc<str>,
        addresses: Vec<IpAddr>,
    },
    /// Outside the mesh, or a port that the pod keeps out of it (`skip-inbound-ports`): a plain
    /// socket from the caller's netns.
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
    /// Why, and what was dialled.
    Refused(RefusedDestination, SocketAddr),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefusedDestination {
    /// A Service with that address exists, and has no endpoint to offer.
    NoEndpoints,
    /// A Service has that address, but not that port.
    NoSuchPort,
    /// Two live pods claim the address, or the host port.
    AmbiguousAddress,
    /// Loopback, unspecified, multicast, or a listener's own address.
    Unroutable,
    /// A node's tunnel port, from a pod.
    TunnelPort,
    /// `outbound-default: deny`.
    OutboundDefaultDeny,
}

impl RefusedDestination {
    /// The fixed word in logs and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NoEndpoints => "no_endpoints",
            Self::NoSuchPort => "no_such_port",
            Self::AmbiguousAddress => "ambiguous_address",
            Self::Unroutable => "unroutable",
            Self::TunnelPort => "tunnel_port",
            Self::OutboundDefaultDeny => "outbound_default_deny",
        }
    }

    /// What was dialled, what is wrong with it, and what to do.
    pub fn sentence(self, dialled: SocketAddr) -> String {
        let (ip, port) = (dialled.ip(), dialled.port());
        match self {
            Self::NoEndpoints => format!(
                "the Service at {dialled} has no endpoint that is ready; look at its selector and \
                 its pods"
            ),
            Self::NoSuchPort => format!(
                "a Service has the address {ip}, but not the port {port}; dial one of its ports, \
                 or add this one to spec.ports"
            ),
            Self::AmbiguousAddress => format!(
                "{dialled} is claimed by several live pods; `debug state` names them, only one may \
                 have it"
            ),
            Self::Unroutable => format!(
                "{dialled} leads nowhere from a pod; dial the address of a Service, a pod or a host"
            ),
            Self::TunnelPort => format!(
                "port {port} of the node {ip} is for tunnels between agents; dial the pod or \
                 Service that is meant"
            ),
            Self::OutboundDefaultDeny => format!(
                "nobody in the mesh has {dialled}, and outbound-default is deny; allow it with the \
                 annotation config.picomesh.io/outbound-default: allow"
            ),
        }
    }
}

/// Where does `destination`, as dialled by `source`, lead?
pub fn resolve(mesh: &Mesh, source: &Workload, destination: SocketAddr) -> Destination {
    // Java dials IPv4 as ::ffff:a.b.c.d.
    let destination = SocketAddr::new(destination.ip().to_canonical(), destination.port());
    let ip = destination.ip();
    let refused = |why| Destination::Refused(why, destination);

    if leads_nowhere(destination) {
        return refused(RefusedDestination::Unroutable);
    }
    if mesh.node_ips.contains(&ip) {
        let port = destination.port();
        if port == mesh.settings.tunnel_port {
            return refused(RefusedDestination::TunnelPort);
        }
        if port == mesh.settings.metrics_port {
            return Destination::Passthrough(destination);
        }
    }
    if let Some(frontend) = mesh.frontends.get(&destination) {
        return match &**frontend {
            Frontend::Service(service) if service.endpoints.is_empty() => {
                refused(RefusedDestination::NoEndpoints)
            }
            Frontend::Service(service) => Destination::Service(Arc::clone(service)),
            Frontend::HostPort { workload, port } => {
                match workload
                    .ips
                    .iter()
                    .find(|own| own.is_ipv4() == ip.is_ipv4())
                {
                    Some(own) => Destination::Endpoint(endpoint_of(
                        workload,
                        SocketAddr::new(*own, *port),
                        &mesh.node_addresses,
                    )),
                    None => refused(RefusedDestination::NoEndpoints),
                }
            }
        };
    }
    if mesh.ambiguous.contains(&ip) || mesh.ambiguous_host_ports.contains(&destination) {
        return refused(RefusedDestination::AmbiguousAddress);
    }
    if let Some(workload) = mesh.by_ip.get(&ip) {
        return Destination::Endpoint(endpoint_of(workload, destination, &mesh.node_addresses));
    }
    if mesh.cluster_ips.contains(&ip) {
        return refused(RefusedDestination::NoSuchPort);
    }
    match source.outbound_default {
        OutboundDefault::Allow => Destination::Passthrough(destination),
        OutboundDefault::Deny => refused(RefusedDestination::OutboundDefaultDeny),
    }
}

/// `addr` is an address of `workload`.
pub(super) fn endpoint_of(
    workload: &Arc<Workload>,
    addr: SocketAddr,
    node_addresses: &HashMap<Arc<str>, Vec<IpAddr>>,
) -> Endpoint {
    Endpoint {
        addr,
        workload: Some(Arc::clone(workload)),
        carrier: carrier(workload, addr.port(), node_addresses),
    }
}

fn carrier(
    workload: &Workload,
    port: u16,
    node_addresses: &HashMap<Arc<str>, Vec<IpAddr>>,
) -> Carrier {
    let skipped = workload
        .skip_inbound
        .iter()
        .any(|range| range.contains(port));
    match &workload.node {
        _ if !workload.meshed || skipped => Carrier::Plain,
        _ if workload.local => Carrier::Local,
        Some(node) => Carrier::Tunnel {
            node: Arc::clone(node),
            addresses: node_addresses.get(node).cloned().unwrap_or_default(),
        },
        // An address without a node: nobody can carry it there yet.
        None => Carrier::Tunnel {
            node: "".into(),
            addresses: Vec::new(),
        },
    }
}

fn leads_nowhere(destination: SocketAddr) -> bool {
    let ip = destination.ip();
    destination.port() == 0
        || ip.is_loopback()
        || ip.is_unspecified()
        || ip.is_multicast()
        || ip == IpAddr::V4(Ipv4Addr::BROADCAST)
}

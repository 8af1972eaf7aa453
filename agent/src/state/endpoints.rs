//! The places that traffic for one port of a Service could go to: from EndpointSlices, or, where
//! there is none, from the pods that the Service selects. Called by `frontends` alone.
//!
//! **Who an endpoint is** comes from the pod's UID in the slice's targetRef, and the pod must have
//! the address itself: a slice cannot send traffic for one pod's identity to another address, nor
//! name an address as a pod's that two pods claim. An endpoint without targetRef (a Service without
//! selector) is taken for the pod that holds its address, exactly as if the client had dialled the
//! address: going plain to a meshed pod because a slice leaves out a reference is not an option.
//! An endpoint whose pod is unknown is left out until the pod is known: nobody could tell whether
//! it may be called plain.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use super::{
    PodUid, Problem, Workload,
    objects::{
        EndpointSlice, MeshSettings, Objects, Pod, Protocol, Service, ServicePort, SliceEndpoint,
        TargetPort,
    },
    resolve::{Carrier, Endpoint, endpoint_of},
};

/// What is known before frontends are built.
#[derive(Clone, Copy)]
pub(super) struct Known<'a> {
    pub(super) settings: &'a MeshSettings,
    pub(super) objects: &'a Objects,
    pub(super) workloads: &'a HashMap<PodUid, Arc<Workload>>,
    pub(super) by_ip: &'a HashMap<IpAddr, Arc<Workload>>,
    pub(super) ambiguous: &'a HashSet<IpAddr>,
    pub(super) node_addresses: &'a HashMap<Arc<str>, Vec<IpAddr>>,
}

/// A place that traffic for one port of a Service could go to.
pub(super) struct Candidate {
    pub(super) endpoint: Endpoint,
    pub(super) node: Option<Arc<str>>,
    pub(super) ready: bool,
    /// Not ready, because it is terminating, and still serving.
    pub(super) last_resort: bool,
}

impl Candidate {
    /// Of two words about one address the better one counts, in whatever order they come.
    const fn rank(&self) -> u8 {
        match (self.ready, self.last_resort) {
            (true, _) => 2,
            (false, true) => 1,
            (false, false) => 0,
        }
    }
}

impl Known<'_> {
    pub(super) fn in_slices(
        &self,
        service: &Service,
        port: &ServicePort,
        slices: &[&EndpointSlice],
        problems: &mut Vec<Problem>,
    ) -> Vec<Candidate> {
        // By address: an endpoint may stand in two slices while the controller moves it.
        let mut found: BTreeMap<SocketAddr, Candidate> = BTreeMap::new();
        for slice in slices {
            for target in slice
                .ports
                .iter()
                .filter_map(|named| target_in_slice(port, named))
            {
                for member in &slice.endpoints {
                    for ip in &member.addresses {
                        let addr = SocketAddr::new(*ip, target);
                        let (endpoint, node) = match self.member(member, addr) {
                            Ok(found) => found,
                            Err(message) => {
                                problems.push(Problem {
                                    kind: "EndpointSlice",
                                    object: slice.key.clone(),
                                    message,
                                });
                                continue;
                            }
                        };
                        let candidate = Candidate {
                            endpoint,
                            node,
                            ready: member.ready || service.publish_not_ready,
                            last_resort: member.serving && member.terminating,
                        };
                        match found.get(&addr) {
                            Some(known) if known.rank() >= candidate.rank() => {}
                            Some(_) | None => {
                                found.insert(addr, candidate);
                            }
                        }
                    }
                }
            }
        }
        found.into_values().collect()
    }

    /// The endpoint that a member of a slice is, and its node; or why it cannot be used.
    fn member(
        &self,
        member: &SliceEndpoint,
        addr: SocketAddr,
    ) -> Result<(Endpoint, Option<Arc<str>>), String> {
        let ip = addr.ip();
        if self.ambiguous.contains(&ip) {
            return Err(format!(
                "endpoint {ip} is left out: two live pods claim the address"
            ));
        }
        let workload = match &member.pod {
            None => self.by_ip.get(&ip),
            Some(uid) => {
                let Some(workload) = self.workloads.get(uid) else {
                    return Err(format!(
                        "endpoint {ip} is left out: its targetRef names pod uid {uid}, which is \
                         unknown or has ended; correct targetRef.uid"
                    ));
                };
                let holds_it = if workload.host_network {
                    workload.ips.contains(&ip)
                } else {
                    self.by_ip.get(&ip).is_some_and(|holder| holder.uid == *uid)
                };
                if !holds_it {
                    return Err(format!(
                        "endpoint {ip} is left out: its targetRef names pod {}, which does not \
                         hold that address; correct the address or targetRef",
                        workload.key
                    ));
                }
                Some(workload)
            }
        };
        Ok(match workload {
            Some(workload) => (
                endpoint_of(workload, addr, self.node_addresses),
                workload.node.clone(),
            ),
            None => {
                let endpoint = Endpoint {
                    addr,
                    workload: None,
                    carrier: Carrier::Plain,
                };
                (endpoint, member.node.clone())
            }
        })
    }

    /// Local mode: nobody writes slices there unless a person does.
    pub(super) fn in_pods<'p>(
        &self,
        service: &Service,
        port: &ServicePort,
        pods: impl Iterator<Item = &'p Pod>,
    ) -> Vec<Candidate> {
        let mut found = Vec::new();
        for pod in pods {
            let Some(workload) = self.workloads.get(&pod.uid) else {
                continue;
            };
            let Some(target) = target_in_pod(port, pod) else {
                continue;
            };
            for ip in &pod.ips {
                let holds_it =
                    pod.host_network || self.by_ip.get(ip).is_some_and(|own| own.uid == pod.uid);
                if holds_it {
                    let addr = SocketAddr::new(*ip, target);
                    found.push(Candidate {
                        endpoint: endpoint_of(workload, addr, self.node_addresses),
                        node: pod.node.clone(),
                        ready: pod.ready && !pod.terminating || service.publish_not_ready,
                        last_resort: pod.ready && pod.terminating,
                    });
                }
            }
        }
        found
    }
}

/// The endpoint's port, if `named` of a slice is the one for this port of the Service.
fn target_in_slice(
    port: &ServicePort,
    (name, number, protocol): &(Option<Arc<str>>, Option<u16>, Protocol),
) -> Option<u16> {
    if *protocol != Protocol::Tcp || name.as_deref() != port.name.as_deref() {
        return None;
    }
    // A slice without number offers every port of its addresses.
    Some(number.unwrap_or(match port.target {
        TargetPort::Number(number) => number,
        TargetPort::Name(_) => port.port,
    }))
}

fn target_in_pod(port: &ServicePort, pod: &Pod) -> Option<u16> {
    match &port.target {
        TargetPort::Number(number) => Some(*number),
        TargetPort::Name(name) => pod
            .ports
            .iter()
            .find(|own| own.protocol == Protocol::Tcp && own.name.as_ref() == Some(name))
            .map(|own| own.port),
    }
}

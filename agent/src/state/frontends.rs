//! From Services, EndpointSlices and host ports to the addresses that clients dial. Called by
//! `Mesh::build` alone.
//!
//! **Who an endpoint is** comes from the pod's UID in the slice's targetRef, and the pod must have
//! the address itself: a slice cannot send traffic for one pod's identity to another address, nor
//! name an address as a pod's that two pods claim. An endpoint without targetRef (a Service without
//! selector) is taken for the pod that holds its address, exactly as if the client had dialled the
//! address: going plain to a meshed pod because a slice leaves out a reference is not an option.
//! An endpoint whose pod is unknown is left out until the pod is known: nobody could tell whether
//! it may be called plain.
//!
//! **Traffic policies** do what kube-proxy does for connections that *pods* make:
//! `internalTrafficPolicy: Local` keeps cluster addresses on this node and refuses where this node
//! has no endpoint. `externalTrafficPolicy: Local` narrows a node port of *another* node to the
//! endpoints there. Load-balancer addresses, externalIPs and this node's own node ports lead to
//! all endpoints: kube-proxy treats a pod's call to them as one that went up to the load balancer
//! and came back, subject to neither policy. The reason for the policy, that the server sees the
//! client's address, holds in the mesh on every way.
//!
//! **Two claims to one address and port**: cluster addresses first, then node ports, load-balancer
//! addresses, externalIPs, host ports; within one kind the first by namespace and name. The loser
//! is reported. An externalIP or load-balancer address that is a pod's address is not served at
//! all: whoever may create Services could otherwise take another pod's traffic.

use std::{
    collections::{BTreeMap, HashMap, HashSet, hash_map::Entry},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use super::{
    ObjectKey, PodUid, Problem, Workload,
    objects::{
        EndpointSlice, MeshSettings, Objects, Pod, Protocol, Service, ServicePort, SliceEndpoint,
        TargetPort, contains_all,
    },
    resolve::{Carrier, Endpoint, Frontend, ServiceFrontend, endpoint_of},
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

pub(super) fn build(
    known: &Known<'_>,
    problems: &mut Vec<Problem>,
) -> HashMap<SocketAddr, Arc<Frontend>> {
    let mut slices: HashMap<(&str, &str), Vec<&EndpointSlice>> = HashMap::new();
    for slice in known.objects.endpoint_slices.values() {
        slices
            .entry((&slice.key.namespace, &slice.service))
            .or_default()
            .push(slice);
    }
    let mut pods: HashMap<&str, Vec<&Pod>> = HashMap::new();
    for pod in known.objects.pods.values().filter(|pod| !pod.terminal) {
        pods.entry(&pod.key.namespace).or_default().push(pod);
    }

    let mut ports = Vec::new();
    for service in known.objects.services.values() {
        if service.external_name.is_some() {
            continue;
        }
        let name = (&*service.key.namespace, &*service.key.name);
        for port in service
            .ports
            .iter()
            .filter(|port| port.protocol == Protocol::Tcp)
        {
            let candidates = match (slices.get(&name), &service.selector) {
                (Some(slices), _) => known.from_slices(service, port, slices, problems),
                (None, Some(selector)) => {
                    let pods = pods.get(&*service.key.namespace).into_iter().flatten();
                    let selected = pods.filter(|pod| contains_all(&pod.labels, selector));
                    known.from_pods(service, port, selected.copied())
                }
                (None, None) => Vec::new(),
            };
            ports.push(PortOfService {
                known,
                service,
                port,
                candidates,
                built: HashMap::new(),
            });
        }
    }

    let mut table = Table {
        known,
        frontends: HashMap::new(),
        problems,
    };
    for port in &mut ports {
        let scope = if port.service.internal_traffic_local {
            Scope::ThisNode
        } else {
            Scope::All
        };
        for ip in &port.service.cluster_ips {
            table.claim(
                SocketAddr::new(*ip, port.port.port),
                Claim::ClusterIp,
                port,
                &scope,
            );
        }
    }
    for port in &mut ports {
        let Some(node_port) = port.port.node_port else {
            continue;
        };
        for node in known.objects.nodes.values() {
            let elsewhere = node.key.name != known.settings.node;
            let scope = if port.service.external_traffic_local && elsewhere {
                Scope::Node(Arc::clone(&node.key.name))
            } else {
                Scope::All
            };
            for ip in &node.addresses {
                if port.has_family_of(ip) {
                    table.claim(
                        SocketAddr::new(*ip, node_port),
                        Claim::NodePort,
                        port,
                        &scope,
                    );
                }
            }
        }
    }
    for port in &mut ports {
        for ip in &port.service.load_balancer_ips {
            let addr = SocketAddr::new(*ip, port.port.port);
            table.claim(addr, Claim::LoadBalancer, port, &Scope::All);
        }
    }
    for port in &mut ports {
        for ip in &port.service.external_ips {
            let addr = SocketAddr::new(*ip, port.port.port);
            table.claim(addr, Claim::ExternalIp, port, &Scope::All);
        }
    }
    table.host_ports();
    table.frontends
}

/// A place that traffic for one port of a Service could go to.
struct Candidate {
    endpoint: Endpoint,
    node: Option<Arc<str>>,
    ready: bool,
    /// Not ready, because it is terminating, and still serving.
    last_resort: bool,
}

impl Known<'_> {
    fn from_slices(
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
                            Some(known) if known.ready || !candidate.ready => {}
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
    fn from_pods<'p>(
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

/// Which endpoints an address may lead to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Scope {
    All,
    ThisNode,
    Node(Arc<str>),
}

/// One TCP port of a Service, with its candidates; frontends that are alike are shared.
struct PortOfService<'a> {
    known: &'a Known<'a>,
    service: &'a Service,
    port: &'a ServicePort,
    candidates: Vec<Candidate>,
    built: HashMap<(Scope, bool), Arc<Frontend>>,
}

impl PortOfService<'_> {
    /// A node port exists in the families that the Service has; manifests may leave them out.
    fn has_family_of(&self, ip: &IpAddr) -> bool {
        let own = &self.service.cluster_ips;
        own.is_empty() || own.iter().any(|own| own.is_ipv4() == ip.is_ipv4())
    }

    fn frontend(&mut self, scope: &Scope, ipv4: bool) -> Arc<Frontend> {
        if let Some(built) = self.built.get(&(scope.clone(), ipv4)) {
            return Arc::clone(built);
        }
        let node = match scope {
            Scope::All => None,
            Scope::ThisNode => Some(&self.known.settings.node),
            Scope::Node(node) => Some(node),
        };
        let in_scope = || {
            self.candidates
                .iter()
                .filter(|candidate| candidate.endpoint.addr.is_ipv4() == ipv4)
                .filter(|candidate| node.is_none() || candidate.node.as_ref() == node)
        };
        let mut endpoints: Vec<_> = in_scope()
            .filter(|c| c.ready)
            .map(|c| c.endpoint.clone())
            .collect();
        if endpoints.is_empty() {
            endpoints = in_scope()
                .filter(|c| c.last_resort)
                .map(|c| c.endpoint.clone())
                .collect();
        }
        let frontend = Arc::new(Frontend::Service(Arc::new(ServiceFrontend {
            service: self.service.key.clone(),
            port: self.port.port,
            port_name: self.port.name.clone(),
            endpoints,
            affinity: self.service.session_affinity,
        })));
        self.built
            .insert((scope.clone(), ipv4), Arc::clone(&frontend));
        frontend
    }
}

/// By which right somebody has an address, the strongest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Claim {
    ClusterIp,
    NodePort,
    LoadBalancer,
    ExternalIp,
}

struct Table<'a> {
    known: &'a Known<'a>,
    frontends: HashMap<SocketAddr, Arc<Frontend>>,
    problems: &'a mut Vec<Problem>,
}

impl Table<'_> {
    fn claim(
        &mut self,
        addr: SocketAddr,
        claim: Claim,
        port: &mut PortOfService<'_>,
        scope: &Scope,
    ) {
        let (what, yields_to_pods) = match claim {
            Claim::ClusterIp => ("cluster address", false),
            Claim::NodePort => ("node port", false),
            Claim::LoadBalancer => ("load-balancer address", true),
            Claim::ExternalIp => ("external address", true),
        };
        let ip = addr.ip();
        let problem = |message| Problem {
            kind: "Service",
            object: port.service.key.clone(),
            message,
        };
        let is_a_pods = self.known.by_ip.contains_key(&ip) || self.known.ambiguous.contains(&ip);
        if yields_to_pods && is_a_pods {
            self.problems.push(problem(format!(
                "{what} {ip} is not served: it is a pod's address; use an address no pod has"
            )));
            return;
        }
        match self.frontends.entry(addr) {
            Entry::Vacant(place) => {
                place.insert(port.frontend(scope, ip.is_ipv4()));
            }
            Entry::Occupied(taken) => {
                if let Some(other) = service_of(taken.get()).filter(|key| *key != &port.service.key)
                {
                    self.problems.push(problem(format!(
                        "{what} {addr} is not served: Service {other} has it already; give one of \
                         them another address or port"
                    )));
                }
            }
        }
    }

    /// Where a Service has the place already the host port yields without a word: that is how a
    /// load balancer made of host-port pods looks.
    fn host_ports(&mut self) {
        let pods = self
            .known
            .objects
            .pods
            .values()
            .filter(|pod| !pod.host_network);
        // A pod on its way out yields to the one that takes its place.
        let (leaving, staying): (Vec<&Arc<Pod>>, Vec<_>) = pods.partition(|pod| pod.terminating);
        for pod in staying.into_iter().chain(leaving) {
            let Some(workload) = self.known.workloads.get(&pod.uid) else {
                continue;
            };
            let Some(addresses) = pod
                .node
                .as_ref()
                .and_then(|node| self.known.node_addresses.get(node))
            else {
                continue;
            };
            for own in pod.ports.iter().filter(|own| own.protocol == Protocol::Tcp) {
                let Some(host_port) = own.host_port else {
                    continue;
                };
                let at = |ip: &&IpAddr| {
                    own.host_ip
                        .is_none_or(|wanted| wanted.is_unspecified() || wanted == **ip)
                        && workload.ips.iter().any(|own| own.is_ipv4() == ip.is_ipv4())
                };
                for ip in addresses.iter().filter(at) {
                    self.frontends
                        .entry(SocketAddr::new(*ip, host_port))
                        .or_insert_with(|| {
                            Arc::new(Frontend::HostPort {
                                workload: Arc::clone(workload),
                                port: own.port,
                            })
                        });
                }
            }
        }
    }
}

fn service_of(frontend: &Frontend) -> Option<&ObjectKey> {
    match frontend {
        Frontend::Service(service) => Some(&service.service),
        Frontend::HostPort { .. } => None,
    }
}

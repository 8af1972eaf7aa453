//! From Services, EndpointSlices and host ports to the addresses that clients dial. Called by
//! `Mesh::build` alone.
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
//! addresses, externalIPs, host ports; of Services the first by namespace and name. The loser is
//! reported. A host port that two pods of a node claim is nobody's, like an address of two pods. An
//! externalIP or load-balancer address that is a pod's address is not served at all: whoever may
//! create Services could otherwise take another pod's traffic.

use std::{
    collections::{BTreeMap, HashMap, HashSet, hash_map::Entry},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use super::{
    ObjectKey, Problem,
    endpoints::{Candidate, Known},
    objects::{EndpointSlice, Pod, Protocol, Service, ServicePort, contains_all},
    resolve::{Frontend, ServiceFrontend},
};

pub(super) fn build(
    known: &Known<'_>,
    problems: &mut Vec<Problem>,
) -> (HashMap<SocketAddr, Arc<Frontend>>, HashSet<SocketAddr>) {
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
                (Some(slices), _) => known.in_slices(service, port, slices, problems),
                (None, Some(selector)) => {
                    let pods = pods.get(&*service.key.namespace).into_iter().flatten();
                    let selected = pods.filter(|pod| contains_all(&pod.labels, selector));
                    known.in_pods(service, port, selected.copied())
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
    let ambiguous = table.host_ports();
    (table.frontends, ambiguous)
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
    /// load balancer made of host-port pods looks. Gives those that several pods claim.
    fn host_ports(&mut self) -> HashSet<SocketAddr> {
        let pods = self
            .known
            .objects
            .pods
            .values()
            .filter(|pod| !pod.host_network);
        let mut claims: BTreeMap<SocketAddr, Vec<(&Pod, Arc<Frontend>)>> = BTreeMap::new();
        for pod in pods {
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
                    let addr = SocketAddr::new(*ip, host_port);
                    let claimants = claims.entry(addr).or_default();
                    if self.frontends.contains_key(&addr)
                        || claimants.iter().any(|(known, _)| known.uid == pod.uid)
                    {
                        continue;
                    }
                    let frontend = Frontend::HostPort {
                        workload: Arc::clone(workload),
                        port: own.port,
                    };
                    claimants.push((&**pod, Arc::new(frontend)));
                }
            }
        }

        let mut ambiguous = HashSet::new();
        for (addr, mut claimants) in claims {
            // A pod on its way out yields to the one that takes its place.
            if claimants.iter().any(|(pod, _)| !pod.terminating) {
                claimants.retain(|(pod, _)| !pod.terminating);
            }
            match claimants.as_slice() {
                [] => {}
                [(_, frontend)] => {
                    self.frontends.insert(addr, Arc::clone(frontend));
                }
                several => {
                    ambiguous.insert(addr);
                    self.problems.extend(several.iter().map(|(pod, _)| Problem {
                        kind: "Pod",
                        object: pod.key.clone(),
                        message: format!(
                            "host port {addr} is claimed by {} live pods, so connections to it are \
                             refused; only one pod of a node may have it",
                            several.len()
                        ),
                    }));
                }
            }
        }
        ambiguous
    }
}

fn service_of(frontend: &Frontend) -> Option<&ObjectKey> {
    match frontend {
        Frontend::Service(service) => Some(&service.service),
        Frontend::HostPort { .. } => None,
    }
}

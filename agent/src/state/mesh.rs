//! The index: all objects of one moment, resolved against each other. Immutable once built.
//!
//! **Meshed or not** is decided here and nowhere else, by desired state: what the pod says, else
//! what its namespace says, else no. Never meshed, also when labelled: pods that share the node's
//! network, and everything in `kube-system` and `picomesh-system`. DNS, the CNI and we ourselves
//! must work while the mesh does not; a label there is reported as a problem. Nor are static pods
//! ever meshed: a kubelet may make their mirrors in every namespace, so they prove no account.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use picomesh_common::PortRange;

use super::{
    Identity, ObjectKey, PodUid,
    endpoints::Known,
    frontends,
    network_policy::{self, NamespaceLabels, NetworkPolicies},
    objects::{ContainerPort, Labels, MeshSettings, Objects, OutboundDefault, Owner, Pod, Words},
    policy::InboundPolicy,
    resolve::Frontend,
    servers::Servers,
};

/// Namespaces whose pods are never meshed.
pub const NEVER_MESHED: [&str; 2] = ["kube-system", "picomesh-system"];

/// A live pod, with everything that a connection's story needs of it.
#[derive(Debug)]
pub struct Workload {
    pub uid: PodUid,
    pub key: ObjectKey,
    pub identity: Identity,
    /// As with the pod: the uid by which its kubelet knows it.
    pub mirror_of: Option<Arc<str>>,
    pub node: Option<Arc<str>>,
    /// It runs on this agent's node.
    pub local: bool,
    pub ips: Vec<IpAddr>,
    pub host_network: bool,
    /// Meshed by desired state: labels say so and it is not exempt.
    pub meshed: bool,
    /// It depends on its namespace, which is not known yet, or not as it was when the pod was made:
    /// pods and namespaces are told apart.
    pub undecided: bool,
    /// Its labels ask for the mesh, and a policy that only the CNI enforces keeps it outside.
    pub refused: Option<Arc<str>>,
    pub labels: Labels,
    /// Of its namespace.
    pub namespace_labels: Arc<NamespaceLabels>,
    pub owner: Option<Owner>,
    pub ports: Vec<ContainerPort>,
    pub skip_inbound: Vec<PortRange>,
    pub skip_outbound: Vec<PortRange>,
    pub outbound_default: OutboundDefault,
    /// Who may come in. Built for local pods only; `None` elsewhere.
    pub policy: Option<Arc<InboundPolicy>>,
    /// The NetworkPolicies that select it. Like `policy`, for local pods only.
    pub network: Option<Arc<NetworkPolicies>>,
}

/// Everything we know at one moment, indexed.
#[derive(Debug)]
pub struct Mesh {
    pub settings: Arc<MeshSettings>,
    /// Counts the builds of this process, from 1.
    pub version: u64,
    pub workloads: HashMap<PodUid, Arc<Workload>>,
    /// Those of this node: what is looked at again and again looks here, however large the cluster.
    pub local: Vec<Arc<Workload>>,
    /// Live, not terminal, not host-network. Addresses claimed twice are absent (see problems).
    pub by_ip: HashMap<IpAddr, Arc<Workload>>,
    pub frontends: HashMap<SocketAddr, Arc<Frontend>>,
    pub node_addresses: HashMap<Arc<str>, Vec<IpAddr>>,
    /// Addresses that two nodes claim are absent.
    pub node_of_address: HashMap<IpAddr, Arc<str>>,
    /// What could not be resolved; shown by `debug state`, counted in a metric. In order, each once.
    pub problems: Vec<Problem>,
    /// Addresses of pods that two live pods claim.
    pub(super) ambiguous: HashSet<IpAddr>,
    /// Host ports that two live pods of a node claim.
    pub(super) ambiguous_host_ports: HashSet<SocketAddr>,
    /// Every address of every node, those claimed twice too.
    pub(super) node_ips: HashSet<IpAddr>,
    /// Cluster addresses of Services, whatever their ports.
    pub(super) cluster_ips: HashSet<IpAddr>,
}

/// Something in the objects that a person should mend; the rest works on.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// Kind of the object, e.g. `Server`.
    pub kind: &'static str,
    pub object: ObjectKey,
    /// What is wrong and what to do.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}: {}", self.kind, self.object, self.message)
    }
}

impl Mesh {
    /// Resolves all objects against each other. Cannot fail: what does not fit is a [`Problem`].
    pub fn build(settings: Arc<MeshSettings>, version: u64, objects: &Objects) -> Self {
        let mut problems = Vec::new();
        let (node_addresses, node_of_address) = nodes(objects, &mut problems);
        let node_ips: HashSet<_> = node_addresses.values().flatten().copied().collect();
        let own_node = node_addresses.get(&settings.node).into_iter().flatten();
        let own_node = own_node
            .filter(|ip| node_of_address.contains_key(*ip))
            .copied();
        let network = network_policy::Candidates::build(objects, own_node.collect());
        let workloads = workloads(&settings, objects, network, &mut problems);
        let local = workloads.values().filter(|workload| workload.local);
        let local = local.cloned().collect();
        report_unreachable(&workloads, &node_addresses, &mut problems);
        let (by_ip, ambiguous) = addresses(objects, &workloads, &node_ips, &mut problems);
        let known = Known {
            settings: &settings,
            objects,
            workloads: &workloads,
            by_ip: &by_ip,
            ambiguous: &ambiguous,
            node_addresses: &node_addresses,
        };
        let (frontends, ambiguous_host_ports) = frontends::build(&known, &mut problems);
        let cluster_ips = objects
            .services
            .values()
            .flat_map(|service| &service.cluster_ips)
            .copied()
            .collect();

        problems.sort_unstable();
        problems.dedup();
        Self {
            settings,
            version,
            workloads,
            local,
            by_ip,
            frontends,
            node_addresses,
            node_of_address,
            problems,
            ambiguous,
            ambiguous_host_ports,
            node_ips,
            cluster_ips,
        }
    }
}

type NodeAddresses = HashMap<Arc<str>, Vec<IpAddr>>;

fn nodes(
    objects: &Objects,
    problems: &mut Vec<Problem>,
) -> (NodeAddresses, HashMap<IpAddr, Arc<str>>) {
    let mut node_addresses = HashMap::new();
    let mut claims: BTreeMap<IpAddr, Vec<&ObjectKey>> = BTreeMap::new();
    for node in objects.nodes.values() {
        for ip in &node.addresses {
            let claimants = claims.entry(*ip).or_default();
            if !claimants.contains(&&node.key) {
                claimants.push(&node.key);
            }
        }
        node_addresses.insert(Arc::clone(&node.key.name), node.addresses.clone());
    }

    let mut node_of_address = HashMap::new();
    for (ip, claimants) in claims {
        match claimants.as_slice() {
            [node] => {
                node_of_address.insert(ip, Arc::clone(&node.name));
            }
            several => problems.extend(several.iter().map(|node| Problem {
                kind: "Node",
                object: (*node).clone(),
                message: format!(
                    "address {ip} is claimed by {} nodes, so tunnels from it are refused; correct \
                     status.addresses",
                    several.len()
                ),
            })),
        }
    }
    (node_addresses, node_of_address)
}

fn workloads<'a>(
    settings: &MeshSettings,
    objects: &'a Objects,
    mut network: network_policy::Candidates<'a>,
    problems: &mut Vec<Problem>,
) -> HashMap<PodUid, Arc<Workload>> {
    for namespace in objects.namespaces.values() {
        problems.extend(namespace.words.problems.iter().map(|message| Problem {
            kind: "Namespace",
            object: namespace.key.clone(),
            message: message.clone(),
        }));
    }

    let mut servers = Servers::build(settings, objects, problems);
    let unsaid = Words::default();
    let opted_in = Words {
        mesh: Some(true),
        ..Words::default()
    };
    let mut workloads = HashMap::new();
    for pod in objects.pods.values().filter(|pod| !pod.terminal) {
        let namespace = ObjectKey {
            cluster: Arc::clone(&pod.key.cluster),
            namespace: "".into(),
            name: Arc::clone(&pod.key.namespace),
        };
        let known = objects.namespaces.get(&namespace);
        let namespace = known.map_or(&unsaid, |n| &n.words);
        // The nearer word wins.
        let said = [&pod.words, namespace];

        problems.extend(pod.words.problems.iter().map(|message| Problem {
            kind: "Pod",
            object: pod.key.clone(),
            message: message.clone(),
        }));
        let asked_for = asked_for(pod, namespace);
        let exempt = exempt(pod, &settings.namespace);
        if let (Some(true), Some(why)) = (pod.words.mesh, exempt) {
            problems.push(Problem {
                kind: "Pod",
                object: pod.key.clone(),
                message: format!("asks to be in the mesh and never is: {why}; remove the word"),
            });
        }
        let refused = pod
            .foreign_policy
            .as_ref()
            .filter(|_| asked_for && exempt.is_none());
        if let Some(why) = refused {
            problems.push(Problem {
                kind: "Pod",
                object: pod.key.clone(),
                message: format!("is kept outside of the mesh: {why}"),
            });
        }

        let meshed = is_meshed(pod, namespace, &settings.namespace);
        let early = known.is_none() || objects.early.contains(&pod.uid);
        let undecided = early && !meshed && is_meshed(pod, &opted_in, &settings.namespace);
        let local = pod.node.as_ref() == Some(&settings.node);
        let served = local && !pod.host_network;
        let policy = served.then(|| {
            let default = said.iter().find_map(|words| words.default_inbound_policy);
            let default = default.unwrap_or(settings.default_inbound_policy);
            Arc::new(servers.of_pod(pod, default, problems))
        });
        let outbound_default = said.iter().find_map(|words| words.outbound_default);
        let skip = |of: fn(&Words) -> &Option<Vec<PortRange>>| {
            said.iter()
                .find_map(|words| of(words).clone())
                .unwrap_or_default()
        };
        let workload = Workload {
            uid: Arc::clone(&pod.uid),
            key: pod.key.clone(),
            identity: Identity {
                trust_domain: Arc::clone(&settings.trust_domain),
                namespace: Arc::clone(&pod.key.namespace),
                service_account: Arc::clone(&pod.service_account),
            },
            mirror_of: pod.mirror_of.clone(),
            node: pod.node.clone(),
            local,
            ips: pod.ips.clone(),
            host_network: pod.host_network,
            meshed,
            undecided,
            refused: refused.cloned(),
            labels: pod.labels.clone(),
            namespace_labels: network.namespace_labels(&pod.key.namespace),
            owner: pod.owner.clone(),
            ports: pod.ports.clone(),
            skip_inbound: skip(|words| &words.skip_inbound),
            skip_outbound: skip(|words| &words.skip_outbound),
            outbound_default: outbound_default.unwrap_or(settings.outbound_default),
            policy,
            network: served.then(|| Arc::new(network.of_pod(pod))),
        };
        workloads.insert(Arc::clone(&pod.uid), Arc::new(workload));
    }
    workloads
}

/// Is a pod in the mesh, by desired state? `namespace`: what its namespace says; `own`: the
/// namespace of the mesh's own objects.
pub fn is_meshed(pod: &Pod, namespace: &Words, own: &str) -> bool {
    let possible = !pod.terminal && exempt(pod, own).is_none() && pod.foreign_policy.is_none();
    possible && asked_for(pod, namespace)
}

/// The nearer word wins.
fn asked_for(pod: &Pod, namespace: &Words) -> bool {
    pod.words.mesh.or(namespace.mesh).unwrap_or(false)
}

/// Why a pod is never in the mesh, whatever its labels say.
fn exempt(pod: &Pod, own: &str) -> Option<&'static str> {
    if pod.host_network {
        Some("it shares the node's network")
    } else if NEVER_MESHED.contains(&&*pod.key.namespace) || *pod.key.namespace == *own {
        Some("the cluster's own pods and ours stay outside")
    } else if pod.mirror_of.is_some() {
        Some("its kubelet runs it from a file of the node")
    } else if pod.service_account.is_empty() {
        Some("it has no service account")
    } else {
        None
    }
}

fn report_unreachable(
    workloads: &HashMap<PodUid, Arc<Workload>>,
    node_addresses: &NodeAddresses,
    problems: &mut Vec<Problem>,
) {
    for workload in workloads
        .values()
        .filter(|workload| workload.meshed && !workload.local)
    {
        let Some(node) = &workload.node else { continue };
        if node_addresses.get(node).is_none_or(Vec::is_empty) {
            problems.push(Problem {
                kind: "Node",
                object: ObjectKey {
                    cluster: Arc::clone(&workload.key.cluster),
                    namespace: "".into(),
                    name: Arc::clone(node),
                },
                message: "runs meshed pods and has no address, so nobody reaches them; give it \
                          status.addresses"
                    .into(),
            });
        }
    }
}

/// Who has which address. A pod that is being deleted keeps its address until another pod of the
/// same node has it: a node hands out its addresses itself and may do so again before the API
/// server has forgotten the old pod. A pod of *another* node that claims the address is a conflict
/// all the same.
fn addresses(
    objects: &Objects,
    workloads: &HashMap<PodUid, Arc<Workload>>,
    node_ips: &HashSet<IpAddr>,
    problems: &mut Vec<Problem>,
) -> (HashMap<IpAddr, Arc<Workload>>, HashSet<IpAddr>) {
    let mut claims: BTreeMap<IpAddr, Vec<(&Pod, &Arc<Workload>)>> = BTreeMap::new();
    for pod in objects.pods.values().filter(|pod| !pod.host_network) {
        let Some(workload) = workloads.get(&pod.uid) else {
            continue;
        };
        for ip in &pod.ips {
            let claimants = claims.entry(*ip).or_default();
            if !claimants.iter().any(|(known, _)| known.uid == pod.uid) {
                claimants.push((&**pod, workload));
            }
        }
    }

    let mut by_ip = HashMap::new();
    let mut ambiguous = HashSet::new();
    for (ip, claimants) in claims {
        let yields = |(pod, _): &&(&Pod, _)| {
            pod.terminating
                && claimants
                    .iter()
                    .any(|(other, _)| !other.terminating && other.node == pod.node)
        };
        let holders: Vec<_> = claimants
            .iter()
            .filter(|claimant| !yields(claimant))
            .collect();
        let mut problem = |pod: &Pod, message: String| {
            problems.push(Problem {
                kind: "Pod",
                object: pod.key.clone(),
                message,
            });
        };
        match holders.as_slice() {
            several if node_ips.contains(&ip) => {
                for (pod, _) in several {
                    problem(
                        pod,
                        format!(
                            "address {ip} is a node's, so it does not count as the pod's; correct \
                         status.podIPs, or set spec.hostNetwork if the pod shares the node's network"
                        ),
                    );
                }
            }
            [(_, workload)] => {
                by_ip.insert(ip, Arc::clone(workload));
            }
            several => {
                ambiguous.insert(ip);
                for (pod, _) in several {
                    problem(
                        pod,
                        format!(
                            "address {ip} is claimed by {} live pods, so connections to it are \
                         refused; only one may have it",
                            several.len()
                        ),
                    );
                }
            }
        }
    }
    (by_ip, ambiguous)
}

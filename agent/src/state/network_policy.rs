//! NetworkPolicy: what Kubernetes lets into a pod of this node and out of it. Pure.
//!
//! Tunnels leave from the node's address, and connections within a node never touch the wire, so
//! the CNI sees neither. [`decide`] answers for both what the CNI would have answered; the proxy
//! asks it beside [`super::policy`], at the beginning of each connection and whenever the mesh has
//! changed, and both must allow. Kubernetes' rules, in this order:
//!
//! 1. A pod is isolated in a direction if any policy of its namespace that speaks of the direction
//!    selects it. If none does, everything is allowed.
//! 2. A pod may always speak with itself, and with the node it runs on.
//! 3. What any rule of any of those policies allows is allowed. The rest is not.
//!
//! Outbound the question is about the endpoint that was picked, never about a Service's address.
//! Rules can only allow, so a peer of whom too little is known is allowed less. By a tunnel it is
//! the pod that its identity and node prove; plainly it is the pod that holds its address, which is
//! all a CNI knows, too; else it is matched by its address alone. Pods on the node's network have
//! the node's address and are never selected. Only TCP is asked about: a rule for UDP or SCTP
//! isolates and allows nothing.
//!
//! Each pod holds the policies that select it, so a decision looks at no other.

use std::{collections::HashMap, net::IpAddr, sync::Arc};

use super::{
    Workload,
    objects::{
        ContainerPort, Labels, NetworkPeer, NetworkPolicy, NetworkPort, NetworkPorts, NetworkRule,
        Objects, Pod, Protocol, Selector,
    },
};

/// API group of NetworkPolicy.
pub const NETWORK_POLICY_GROUP: &str = "networking.k8s.io";

/// The label that every namespace has, whatever its manifest says.
const NAMESPACE_NAME: &str = "kubernetes.io/metadata.name";

/// The policies that select one pod, by direction; in the order of their names.
#[derive(Debug, Default)]
pub struct NetworkPolicies {
    pub(super) ingress: Vec<Arc<NetworkPolicy>>,
    pub(super) egress: Vec<Arc<NetworkPolicy>>,
    /// Addresses of the pod's node that no other node claims.
    pub(super) node: Arc<[IpAddr]>,
}

/// Seen from the pod whose policies decide.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// The pod is called.
    Ingress,
    /// The pod calls.
    Egress,
}

/// The other end of a connection.
#[derive(Clone, Copy, Debug)]
pub struct Peer<'a> {
    pub ip: IpAddr,
    /// The pod that it is, as far as that is known.
    pub pod: Option<&'a Workload>,
}

/// The answer, with who gave it.
#[derive(Clone, Copy, Debug)]
pub enum NetworkVerdict<'a> {
    /// No policy selects the pod for this direction.
    NotIsolated,
    /// A pod with itself.
    Itself,
    /// A pod with its own node.
    OwnNode,
    /// By the rule with this index.
    Allow(&'a NetworkPolicy, usize),
    /// No rule of these allows it.
    Deny(&'a [Arc<NetworkPolicy>]),
    /// The pod is not of this node, so its policies are not known here: allows nothing.
    Unknown,
}

impl NetworkVerdict<'_> {
    pub fn allows(&self) -> bool {
        match self {
            Self::NotIsolated | Self::Itself | Self::OwnNode | Self::Allow(..) => true,
            Self::Deny(_) | Self::Unknown => false,
        }
    }
}

/// May `pod` and `peer` speak? `port` is the one that is called: the pod's own for ingress, the
/// peer's for egress.
pub fn decide<'a>(pod: &'a Workload, way: Way, peer: Peer<'_>, port: u16) -> NetworkVerdict<'a> {
    let Some(known) = &pod.network else {
        return NetworkVerdict::Unknown;
    };
    let policies = known.of(way);
    if policies.is_empty() {
        return NetworkVerdict::NotIsolated;
    }
    let peer = Peer {
        ip: peer.ip.to_canonical(),
        pod: peer.pod.filter(|pod| !pod.host_network),
    };
    if peer.pod.is_some_and(|peer| peer.uid == pod.uid) {
        return NetworkVerdict::Itself;
    }
    if known.node.contains(&peer.ip) {
        return NetworkVerdict::OwnNode;
    }
    let called = match way {
        Way::Ingress => Some(pod),
        Way::Egress => peer.pod,
    };
    let called = Called {
        port,
        ports: called.map_or(&[], |called| &called.ports),
    };
    for policy in policies {
        for (index, rule) in policy.rules(way).iter().enumerate() {
            if rule.allows(policy, peer, called) {
                return NetworkVerdict::Allow(policy, index);
            }
        }
    }
    NetworkVerdict::Deny(policies)
}

impl NetworkPolicies {
    pub(super) fn of(&self, way: Way) -> &[Arc<NetworkPolicy>] {
        match way {
            Way::Ingress => &self.ingress,
            Way::Egress => &self.egress,
        }
    }
}

impl NetworkPolicy {
    pub(super) fn rules(&self, way: Way) -> &[NetworkRule] {
        match way {
            Way::Ingress => self.ingress.as_deref(),
            Way::Egress => self.egress.as_deref(),
        }
        .unwrap_or_default()
    }
}

/// The end that is called.
#[derive(Clone, Copy)]
struct Called<'a> {
    port: u16,
    /// What its containers declare: names of ports mean these.
    ports: &'a [ContainerPort],
}

impl NetworkRule {
    fn allows(&self, policy: &NetworkPolicy, peer: Peer<'_>, called: Called<'_>) -> bool {
        let port = self.ports.is_empty() || self.ports.iter().any(|port| port.matches(called));
        port && (self.peers.is_empty() || self.peers.iter().any(|own| own.matches(policy, peer)))
    }
}

impl NetworkPeer {
    fn matches(&self, policy: &NetworkPolicy, peer: Peer<'_>) -> bool {
        match (self, peer.pod) {
            (Self::Block(block), _) => block.contains(peer.ip),
            (Self::Pods { .. }, None) => false,
            (Self::Pods { namespaces, pods }, Some(pod)) => {
                let there = match namespaces {
                    None => pod.key.namespace == policy.key.namespace,
                    Some(selector) => pod.namespace_labels.satisfy(selector),
                };
                there && pods.matches(&pod.labels)
            }
        }
    }
}

impl NetworkPort {
    fn matches(&self, called: Called<'_>) -> bool {
        self.protocol == Protocol::Tcp
            && match &self.ports {
                NetworkPorts::All => true,
                NetworkPorts::Range(range) => range.contains(called.port),
                NetworkPorts::Name(name) => called.ports.iter().any(|own| {
                    own.protocol == Protocol::Tcp
                        && own.port == called.port
                        && own.name.as_ref() == Some(name)
                }),
            }
    }
}

/// Everything that the policies of one pod are picked from. For `Mesh::build`.
pub(super) struct Candidates<'a> {
    by_namespace: HashMap<&'a str, Vec<&'a Arc<NetworkPolicy>>>,
    namespace_labels: HashMap<&'a str, Arc<NamespaceLabels>>,
    node: Arc<[IpAddr]>,
}

impl<'a> Candidates<'a> {
    /// `node`: addresses of this agent's node.
    pub(super) fn build(objects: &'a Objects, node: Arc<[IpAddr]>) -> Self {
        let mut by_namespace: HashMap<&str, Vec<_>> = HashMap::new();
        for policy in objects.network_policies.values() {
            by_namespace
                .entry(&policy.key.namespace)
                .or_default()
                .push(policy);
        }
        let namespace_labels = objects
            .namespaces
            .values()
            .map(|namespace| {
                let name = &namespace.key.name;
                let labels = NamespaceLabels::of(name, Some(&namespace.labels));
                (&**name, Arc::new(labels))
            })
            .collect();
        Self {
            by_namespace,
            namespace_labels,
            node,
        }
    }

    /// The policies of a pod of this node.
    pub(super) fn of_pod(&self, pod: &Pod) -> NetworkPolicies {
        let mut found = NetworkPolicies {
            node: Arc::clone(&self.node),
            ..NetworkPolicies::default()
        };
        for policy in self
            .by_namespace
            .get(&*pod.key.namespace)
            .into_iter()
            .flatten()
            .filter(|policy| policy.pod_selector.matches(&pod.labels))
        {
            if policy.ingress.is_some() {
                found.ingress.push(Arc::clone(policy));
            }
            if policy.egress.is_some() {
                found.egress.push(Arc::clone(policy));
            }
        }
        found
    }

    /// Of a namespace that nobody wrote down the name alone is known.
    pub(super) fn namespace_labels(&mut self, namespace: &'a Arc<str>) -> Arc<NamespaceLabels> {
        let labels = self
            .namespace_labels
            .entry(namespace)
            .or_insert_with(|| Arc::new(NamespaceLabels::of(namespace, None)));
        Arc::clone(labels)
    }
}

/// What is known of a namespace's labels.
#[derive(Debug, Default)]
pub struct NamespaceLabels {
    labels: Labels,
    /// There are no others.
    complete: bool,
}

impl NamespaceLabels {
    fn of(name: &Arc<str>, written: Option<&Labels>) -> Self {
        let mut labels = written.cloned().unwrap_or_default();
        labels.insert(NAMESPACE_NAME.into(), Arc::clone(name));
        Self {
            labels,
            complete: written.is_some(),
        }
    }

    /// They are known to: a label that may be there and is not known counts neither as there nor
    /// as absent.
    fn satisfy(&self, selector: &Selector) -> bool {
        let known = |key: &Arc<str>| self.complete || self.labels.contains_key(key);
        selector.matches(&self.labels) && selector.keys().all(known)
    }
}

#[cfg(test)]
mod tests;

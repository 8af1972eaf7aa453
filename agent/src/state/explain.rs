//! Which rule decides about a connection, in words: for `debug policies --pod`. It asks the same
//! functions as the proxy and decides nothing itself.
//!
//! Each end's policies are known to the agent of its node alone, so an end on another node is
//! answered with that node's name.

use std::{net::IpAddr, sync::Arc};

use serde::{Deserialize, Serialize};

use super::{
    Mesh, Workload,
    network_policy::{self, NetworkVerdict, Peer, Way},
    objects::{NetworkPeer, NetworkPort, NetworkPorts, NetworkRule, Operator, Protocol, Selector},
    policy::{Client, ClientIdentity, PolicyRef, Verdict},
};

/// What is asked. Without a pod: the policies of all. With a pod alone: its policies. With a peer:
/// what decides between the two.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Question {
    /// `namespace/name`.
    pub pod: Option<String>,
    /// Who calls it: `namespace/name` or an address.
    pub from: Option<String>,
    /// Whom it calls: `namespace/name` or an address.
    pub to: Option<String>,
    /// The port that is called.
    pub port: Option<u16>,
    /// `ingress` or `egress`: nothing of the other.
    pub direction: Option<Direction>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    Ingress,
    Egress,
}

/// One question that must be answered with yes before a connection stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// `egress`, `ingress` or `mesh`, and the pod whose policies were asked.
    pub asked: String,
    /// `allowed`, `denied`, or `unknown` where another node's agent has to be asked.
    pub verdict: &'static str,
    pub decided_by: String,
    pub why: String,
}

const ALLOWED: &str = "allowed";
const DENIED: &str = "denied";
const UNKNOWN: &str = "unknown";

/// One NetworkPolicy that selects a pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PolicyWords {
    pub pod: String,
    pub policy: String,
    pub direction: Direction,
    /// One sentence for each rule, in order.
    pub rules: Vec<String>,
}

/// One end of the connection that is asked about.
struct End<'a> {
    ip: IpAddr,
    pod: Option<&'a Arc<Workload>>,
}

/// What decides about the connection of `question`, which names a pod, a peer and a port.
pub fn explain(mesh: &Mesh, question: &Question) -> Result<Vec<Check>, String> {
    let pod = question
        .pod
        .as_deref()
        .ok_or("name the pod: --pod NAMESPACE/NAME")?;
    let pod = pod_of(mesh, pod)?;
    let port = question.port.ok_or("name the port: --port NUMBER")?;
    let (from, to) = match (&question.from, &question.to) {
        (Some(from), None) => (end(mesh, from, Some(pod))?, own_end(pod)?),
        (None, Some(to)) => (own_end(pod)?, end(mesh, to, None)?),
        (None, None) => return Err("name the other end: --from or --to".into()),
        (Some(_), Some(_)) => {
            return Err(
                "name one other end: --pod is the second one, leave --from or --to out".into(),
            );
        }
    };

    let mut checks = Vec::new();
    if question.direction != Some(Direction::Ingress)
        && let Some(caller) = from.pod
    {
        checks.push(leaves(caller, &to, port));
    }
    if question.direction != Some(Direction::Egress)
        && let Some(callee) = to.pod
    {
        checks.extend(enters(callee, &from, port));
    }
    if checks.is_empty() {
        let (direction, other) = match question.direction {
            Some(Direction::Ingress) => ("ingress", to.ip),
            Some(Direction::Egress) | None => ("egress", from.ip),
        };
        return Err(format!("{other} is no pod: nobody's {direction} is asked"));
    }
    Ok(checks)
}

/// Every NetworkPolicy that selects `pod`, one row per direction.
pub fn policies_of(pod: &Workload, direction: Option<Direction>) -> Vec<PolicyWords> {
    let Some(known) = &pod.network else {
        return Vec::new();
    };
    let mut rows = Vec::new();
    for (way, shown) in [
        (Way::Ingress, Direction::Ingress),
        (Way::Egress, Direction::Egress),
    ] {
        if direction.is_some_and(|wanted| wanted != shown) {
            continue;
        }
        rows.extend(known.of(way).iter().map(|policy| {
            PolicyWords {
                pod: pod.key.to_string(),
                policy: policy.key.to_string(),
                direction: shown,
                rules: policy
                    .rules(way)
                    .iter()
                    .map(|rule| in_words(rule, way))
                    .collect(),
            }
        }));
    }
    rows
}

fn pod_of<'a>(mesh: &'a Mesh, name: &str) -> Result<&'a Arc<Workload>, String> {
    if !name.contains('/') {
        return Err(format!("{name:?} is no pod; write NAMESPACE/NAME"));
    }
    let mut all = mesh.workloads.values();
    all.find(|workload| workload.key.to_string() == name)
        .ok_or_else(|| format!("there is no pod {name}, or it has ended"))
}

/// The same, if its policies are known here.
pub fn local_pod<'a>(mesh: &'a Mesh, name: &str) -> Result<&'a Arc<Workload>, String> {
    let pod = pod_of(mesh, name)?;
    match &pod.network {
        Some(_) => Ok(pod),
        None => Err(format!("{name}: {}", elsewhere(pod))),
    }
}

fn own_end(pod: &Arc<Workload>) -> Result<End<'_>, String> {
    let ip = pod.ips.first().copied();
    let ip = ip.ok_or_else(|| format!("{} has no address yet", pod.key))?;
    Ok(End { ip, pod: Some(pod) })
}

/// `callee`: the other end, if this one calls.
fn end<'a>(mesh: &'a Mesh, text: &str, callee: Option<&Workload>) -> Result<End<'a>, String> {
    if let Ok(ip) = text.parse::<IpAddr>() {
        let ip = ip.to_canonical();
        if callee.is_none() && mesh.cluster_ips.contains(&ip) {
            return Err(format!(
                "{ip} is a Service's address, and policy is about the endpoint behind it: name that"
            ));
        }
        return Ok(End {
            ip,
            pod: mesh.by_ip.get(&ip),
        });
    }
    own_end(pod_of(mesh, text)?)
}

fn leaves(caller: &Workload, to: &End<'_>, port: u16) -> Check {
    if let Some(kept_out) = kept_out(caller, Way::Egress, port) {
        return kept_out;
    }
    let peer = Peer {
        ip: to.ip,
        pod: to.pod.map(|pod| &**pod),
    };
    network_check(caller, Way::Egress, peer, port)
}

/// What is asked at the callee's node.
fn enters(callee: &Workload, from: &End<'_>, port: u16) -> Vec<Check> {
    if let Some(kept_out) = kept_out(callee, Way::Ingress, port) {
        return vec![kept_out];
    }
    let peer = Peer {
        ip: from.ip,
        pod: from.pod.map(|pod| &**pod),
    };
    let network = network_check(callee, Way::Ingress, peer, port);
    let Some(policy) = callee.policy.as_ref().filter(|_| callee.meshed) else {
        return vec![network];
    };
    let identity = from
        .pod
        .filter(|pod| pod.meshed)
        .map_or(ClientIdentity::None, |pod| {
            ClientIdentity::Proven(pod.identity.clone())
        });
    let who = match &identity {
        ClientIdentity::None => "a client without identity".into(),
        ClientIdentity::Proven(identity) => identity.to_string(),
    };
    let client = Client {
        ip: from.ip,
        pod: from.pod.map(|pod| pod.uid.clone()),
        identity,
    };
    let decision = policy.decide(&client, port);
    let name = |policy: &PolicyRef| format!("{} {}", policy.kind, policy.name);
    let decided_by = name(decision.authz.as_ref().unwrap_or(&decision.server));
    let (verdict, why) = match decision.verdict {
        Verdict::Allow => (ALLOWED, format!("lets {who} in")),
        Verdict::Audit => (ALLOWED, format!("lets {who} in, and logs it")),
        Verdict::Deny(reason) => (DENIED, format!("{}: {who}", reason.as_str())),
    };
    let mesh = Check {
        asked: format!("mesh, into {}", callee.key),
        verdict,
        decided_by,
        why,
    };
    vec![network, mesh]
}

/// The agent does not carry what a pod's skip lists name. Those for calls mean the port that is
/// dialled; it is the one asked about unless a Service lies between.
fn kept_out(pod: &Workload, way: Way, port: u16) -> Option<Check> {
    let (list, word) = match way {
        Way::Ingress => (&pod.skip_inbound, "skip-inbound-ports"),
        Way::Egress => (&pod.skip_outbound, "skip-outbound-ports"),
    };
    let skipped =
        pod.meshed && pod.network.is_some() && list.iter().any(|range| range.contains(port));
    skipped.then(|| Check {
        asked: asked_of(pod, way),
        verdict: ALLOWED,
        decided_by: word.into(),
        why: format!("port {port} is kept out of the mesh, so only the CNI enforces policy"),
    })
}

fn asked_of(pod: &Workload, way: Way) -> String {
    match way {
        Way::Ingress => format!("ingress of {}", pod.key),
        Way::Egress => format!("egress of {}", pod.key),
    }
}

fn network_check(pod: &Workload, way: Way, peer: Peer<'_>, port: u16) -> Check {
    let asked = asked_of(pod, way);
    let verdict = network_policy::decide(pod, way, peer, port);
    let nobody = || "-".to_owned();
    let (decided_by, why) = match verdict {
        NetworkVerdict::NotIsolated => (nobody(), "no NetworkPolicy selects it".into()),
        NetworkVerdict::Itself => (nobody(), "a pod may always call itself".into()),
        NetworkVerdict::OwnNode => (nobody(), "a pod and its own node always may".into()),
        NetworkVerdict::Allow(policy, index) => (
            format!("NetworkPolicy {}, {}", policy.key, place(way, index)),
            policy
                .rules(way)
                .get(index)
                .map_or_else(String::new, |rule| in_words(rule, way)),
        ),
        NetworkVerdict::Deny(policies) => {
            let names: Vec<_> = policies
                .iter()
                .map(|policy| policy.key.to_string())
                .collect();
            (
                format!("NetworkPolicy {}", names.join(", ")),
                "isolated, and no rule allows it".into(),
            )
        }
        NetworkVerdict::Unknown => (nobody(), elsewhere(pod)),
    };
    let word = match verdict {
        NetworkVerdict::Unknown => UNKNOWN,
        NetworkVerdict::Deny(_) => DENIED,
        NetworkVerdict::NotIsolated
        | NetworkVerdict::Itself
        | NetworkVerdict::OwnNode
        | NetworkVerdict::Allow(..) => ALLOWED,
    };
    let outside = !pod.meshed && pod.network.is_some();
    let note = if outside {
        "; it is outside the mesh, so only the CNI enforces this"
    } else {
        ""
    };
    Check {
        asked,
        verdict: word,
        decided_by,
        why: why + note,
    }
}

fn elsewhere(pod: &Workload) -> String {
    match &pod.node {
        _ if pod.host_network => "it has its node's address: no policy selects it".into(),
        Some(node) => format!("it runs on {node}: ask the agent there"),
        None => "it has no node yet".into(),
    }
}

/// Where a rule stands in the manifest.
fn place(way: Way, index: usize) -> String {
    match way {
        Way::Ingress => format!("ingress[{index}]"),
        Way::Egress => format!("egress[{index}]"),
    }
}

fn in_words(rule: &NetworkRule, way: Way) -> String {
    let preposition = match way {
        Way::Ingress => "from",
        Way::Egress => "to",
    };
    let peers: Vec<_> = rule.peers.iter().map(peer).collect();
    let peers = if peers.is_empty() {
        "anybody".into()
    } else {
        peers.join(" or ")
    };
    let named: Vec<_> = rule.ports.iter().map(ports).collect();
    let named = if named.is_empty() {
        "any port".into()
    } else {
        named.join(", ")
    };
    format!("{preposition} {peers}, {named}")
}

fn peer(peer: &NetworkPeer) -> String {
    match peer {
        NetworkPeer::Block(block) => block.to_string(),
        NetworkPeer::Pods { namespaces, pods } => {
            let pods = match selector(pods) {
                None => "all pods".to_owned(),
                Some(words) => format!("pods with {words}"),
            };
            let namespaces = match namespaces.as_ref().map(selector) {
                None => "its namespace".to_owned(),
                Some(None) => "all namespaces".to_owned(),
                Some(Some(words)) => format!("namespaces with {words}"),
            };
            format!("{pods} of {namespaces}")
        }
    }
}

/// `None`: it selects everything.
fn selector(selector: &Selector) -> Option<String> {
    let labels = selector.match_labels.iter();
    let labels = labels.map(|(key, value)| format!("{key}={value}"));
    let requirements = selector.match_expressions.iter().map(|requirement| {
        let key = &requirement.key;
        match &requirement.operator {
            Operator::In(values) => format!("{key} in ({})", values.join(", ")),
            Operator::NotIn(values) => format!("{key} not in ({})", values.join(", ")),
            Operator::Exists => key.to_string(),
            Operator::DoesNotExist => format!("no {key}"),
        }
    });
    let words: Vec<_> = labels.chain(requirements).collect();
    (!words.is_empty()).then(|| words.join(" and "))
}

fn ports(port: &NetworkPort) -> String {
    let protocol = match port.protocol {
        Protocol::Tcp => "TCP",
        Protocol::Udp => "UDP",
        Protocol::Sctp => "SCTP",
    };
    match &port.ports {
        NetworkPorts::All => format!("every port of {protocol}"),
        NetworkPorts::Range(range) if range.first == range.last => {
            format!("{protocol} {}", range.first)
        }
        NetworkPorts::Range(range) => format!("{protocol} {}-{}", range.first, range.last),
        NetworkPorts::Name(name) => format!("{protocol} port named {name}"),
    }
}

#[cfg(test)]
mod tests;

//! The decision, row by row: manifests, both ends and a port in; the answer and who gave it out.
//!
//! Each row goes the whole way: text, conversion, `Mesh::build`, `decide`. The cases of Kubernetes'
//! own suite are in [`kubernetes`]; here is what they leave open.

mod kubernetes;

use super::*;
use crate::{
    state::Mesh,
    testing::manifests::{mesh, mesh_with, node, settings, workload},
};

/// A NetworkPolicy; `name` with its namespace, as `x/p`.
fn policy(name: &str, spec: &str) -> String {
    let (namespace, name) = name.split_once('/').unwrap();
    format!(
        "---\n{{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {{name: {name}, \
         namespace: {namespace}}}, spec: {{{spec}}}}}\n"
    )
}

/// A pod that serves ports 80 and 81 over each protocol, under the names that Kubernetes' suite
/// gives them, and a few more.
fn pod(name: &str, node: &str, ips: &[&str], labels: &str, spec: &str) -> String {
    let (namespace, short) = name.split_once('/').unwrap();
    let ips: Vec<_> = ips.iter().map(|ip| format!("{{ip: \"{ip}\"}}")).collect();
    let ports: Vec<_> = ["tcp", "udp", "sctp"]
        .iter()
        .flat_map(|protocol| [80, 81].map(|port| (protocol, port)))
        .map(|(protocol, port)| {
            format!(
                "{{name: serve-{port}-{protocol}, containerPort: {port}, protocol: {}}}",
                protocol.to_uppercase()
            )
        })
        .collect();
    format!(
        "---\n{{apiVersion: v1, kind: Pod, metadata: {{name: {short}, namespace: {namespace}, \
         uid: {namespace}-{short}, labels: {{pod: {short}, {labels}}}}}, spec: {{nodeName: {node}, \
         {spec} containers: [{{name: c, ports: [{}, {{name: twice, containerPort: 7001}}]}}, \
         {{name: d, ports: [{{name: twice, containerPort: 7002}}]}}]}}, \
         status: {{podIPs: [{}]}}}}\n",
        ports.join(", "),
        ips.join(", ")
    )
}

fn namespace(name: &str, labels: &str) -> String {
    format!(
        "---\n{{apiVersion: v1, kind: Namespace, metadata: {{name: {name}, labels: {{{labels}}}}}}}\n"
    )
}

/// `x/a` is the pod whose policies decide; node `n1` is the agent's.
fn world() -> String {
    [
        node("n1", &["10.0.0.1", "fd00::1"]),
        node("n2", &["10.0.0.2", "fd00::2"]),
        namespace("x", "team: blue"),
        namespace("y", "team: red, env: prod"),
        // The API server would not let it lie about its name.
        namespace("z", "kubernetes.io/metadata.name: y"),
        pod("x/a", "n1", &["10.1.1.1", "fd00:1::1"], "tier: front", ""),
        pod("x/b", "n1", &["10.1.1.2", "fd00:1::2"], "tier: back", ""),
        pod("y/a", "n1", &["10.1.2.1", "fd00:2::1"], "tier: front", ""),
        pod("y/b", "n2", &["10.1.2.2", "fd00:2::2"], "tier: back", ""),
        pod("z/a", "n2", &["10.1.3.1", "fd00:3::1"], "tier: front", ""),
        // Of a namespace that nobody wrote down.
        pod("w/a", "n2", &["10.1.4.1", "fd00:4::1"], "", ""),
        pod(
            "x/local",
            "n1",
            &["10.0.0.1"],
            "tier: front",
            "hostNetwork: true,",
        ),
        pod(
            "x/host",
            "n2",
            &["10.0.0.2"],
            "tier: front",
            "hostNetwork: true,",
        ),
        pod(
            "x/out",
            "n1",
            &["10.1.1.9"],
            "picomesh.io/mesh: disabled",
            "",
        ),
    ]
    .concat()
}

/// A policy that isolates every pod of its namespace and allows nothing.
const DENY: &str = "podSelector: {}, policyTypes: [Ingress, Egress]";

/// The format is told at its head.
const ROWS: &str = include_str!("tests/rows.txt");

#[test]
fn every_row_is_answered_as_it_says() {
    let base = world();
    let mut names = std::collections::HashSet::new();
    let is_row = |line: &&str| !line.is_empty() && !line.starts_with('#');
    for row in ROWS.lines().filter(is_row) {
        let cells: Vec<_> = row.split('|').map(str::trim).collect();
        let [name, policies, question, wanted] = cells[..] else {
            panic!("{row:?} is no row");
        };
        let policies: String = policies
            .split(" & ")
            .filter(|written| !written.is_empty())
            .map(|written| {
                let (name, spec) = written.split_once(' ').unwrap();
                let spec = spec.strip_prefix('{').and_then(|s| s.strip_suffix('}'));
                policy(name, spec.unwrap())
            })
            .collect();
        let mesh = mesh(&(base.clone() + &policies));
        assert_eq!(answer(&mesh, question), wanted, "{name}: {question}");
        assert!(names.insert(name), "two rows are named {name:?}");
    }
    assert!(names.len() >= 100, "{} rows", names.len());
}

/// `CALLER > CALLEE:PORT`, where `a` is `x/a` and says which of both ends is asked; without it the
/// callee is.
fn answer(mesh: &Mesh, question: &str) -> String {
    let (from, to) = question.split_once(" > ").unwrap();
    let (to, port) = to.rsplit_once(':').unwrap();
    let port = port.parse().unwrap();
    let peer = |text: &'_ str| {
        let (pod, ip) = text.split_once('@').unwrap_or((text, ""));
        let pod = (!pod.is_empty()).then(|| workload(mesh, pod));
        let ip = match ip {
            "" => pod.unwrap().ips[0],
            ip => ip.parse().unwrap(),
        };
        Peer {
            ip,
            pod: pod.map(|pod| &**pod),
        }
    };
    spell(&match (from, to) {
        ("a", to) => decide(workload(mesh, "x/a"), Way::Egress, peer(to), port),
        (from, "a") => decide(workload(mesh, "x/a"), Way::Ingress, peer(from), port),
        (from, to) => decide(workload(mesh, to), Way::Ingress, peer(from), port),
    })
}

fn spell(verdict: &NetworkVerdict<'_>) -> String {
    let (word, allows) = match verdict {
        NetworkVerdict::NotIsolated => ("open".to_owned(), true),
        NetworkVerdict::Itself => ("itself".to_owned(), true),
        NetworkVerdict::OwnNode => ("node".to_owned(), true),
        NetworkVerdict::Allow(policy, index) => {
            (format!("allow {}[{index}]", policy.key.name), true)
        }
        NetworkVerdict::Deny(policies) => {
            let names: Vec<_> = policies.iter().map(|policy| &*policy.key.name).collect();
            (format!("deny {}", names.join(",")), false)
        }
        NetworkVerdict::Unknown => ("unknown".to_owned(), false),
    };
    assert_eq!(verdict.allows(), allows, "{word}");
    word
}

#[test]
fn an_address_that_two_pods_or_two_nodes_claim_proves_nothing() {
    let by_label = policy(
        "x/p",
        "podSelector: {}, ingress: [{from: [{podSelector: {}}]}]",
    );
    let twin = pod("x/twin", "n2", &["10.1.1.2"], "", "");
    let one = mesh(&(world() + &by_label));
    let two = mesh(&(world() + &by_label + &twin));
    let holder = |mesh: &Mesh| mesh.by_ip.get(&"10.1.1.2".parse().unwrap()).cloned();
    assert!(holder(&one).is_some() && holder(&two).is_none());

    let rival = node("n3", &["10.0.0.1"]);
    let contested = mesh(&(world() + &by_label + &rival));
    assert_eq!(answer(&contested, "@10.0.0.1 > a:80"), "deny p");
    assert_eq!(answer(&contested, "@fd00::1 > a:80"), "node");
}

#[test]
fn the_node_is_the_agents_own() {
    let settings = crate::state::objects::MeshSettings {
        node: "n2".into(),
        ..settings()
    };
    let text = world() + &policy("x/p", DENY) + &policy("y/p", DENY);
    let mesh = mesh_with(settings, &text);
    assert_eq!(answer(&mesh, "x/b > a:80"), "unknown");
    assert_eq!(answer(&mesh, "x/b > y/b:80"), "deny p");
    assert_eq!(answer(&mesh, "@10.0.0.2 > y/b:80"), "node");
    assert_eq!(answer(&mesh, "@10.0.0.1 > y/b:80"), "deny p");
}

/// 5,000 pods, 100 of them here, and 1,000 policies: a mesh is built, and a decision made, in times
/// that nobody notices. The bounds are far above what is measured, for busy machines.
#[test]
fn a_large_cluster_costs_little() {
    use crate::testing::manifests::objects;
    use std::time::{Duration, Instant};

    let mut all = objects(&(node("n1", &["10.0.0.1"]) + &node("n2", &["10.0.0.2"])));
    let one = objects(&pod("ns/p", "n2", &["10.1.0.1"], "app: web", ""));
    let rule = "{from: [{namespaceSelector: {matchLabels: {team: blue}}}, {ipBlock: {cidr: \
                192.168.0.0/16}}], ports: [{port: 80}]}";
    let spec = format!("podSelector: {{}}, ingress: [{rule}, {rule}]");
    let rules = objects(&policy("ns/policy", &spec));
    for space in 0..50_u8 {
        for number in 0..100_u8 {
            let mut pod = (**one.pods.values().next().unwrap()).clone();
            pod.key.namespace = format!("ns{space}").into();
            pod.key.name = format!("p{number}").into();
            pod.uid = pod.key.to_string().into();
            pod.ips = vec![IpAddr::from([10, 1, space, number])];
            if number < 2 {
                pod.node = Some("n1".into());
            }
            all.pods.insert(pod.uid.clone(), Arc::new(pod));
        }
        for number in 0..20 {
            let mut policy = (**rules.network_policies.values().next().unwrap()).clone();
            policy.key.namespace = format!("ns{space}").into();
            policy.key.name = format!("policy{number}").into();
            let key = policy.key.clone();
            all.network_policies.insert(key, Arc::new(policy));
        }
    }
    let began = Instant::now();
    let mesh = Mesh::build(Arc::new(settings()), 1, &all);
    let built = began.elapsed();
    let (from, to) = (workload(&mesh, "ns7/p9"), workload(&mesh, "ns3/p1"));
    let peer = Peer {
        ip: from.ips[0],
        pod: Some(&**from),
    };
    let began = Instant::now();
    for _ in 0..1000 {
        let verdict = decide(to, Way::Ingress, peer, 80);
        assert!(matches!(verdict, NetworkVerdict::Deny(policies) if policies.len() == 20));
    }
    let decided = began.elapsed() / 1000;
    eprintln!("5,000 pods, 1,000 policies: built in {built:?}, a decision in {decided:?}");
    assert!(built < Duration::from_secs(10), "{built:?}");
    assert!(decided < Duration::from_millis(1), "{decided:?}");
}

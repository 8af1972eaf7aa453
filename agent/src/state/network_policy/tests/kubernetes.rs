//! The cases of Kubernetes' end-to-end suite for NetworkPolicy, each a table of who reaches whom:
//! three namespaces with three pods each, every pair asked on both sides. What the suite asks over
//! UDP or SCTP is asked here over TCP, which such a policy isolates and never allows.

use super::*;

/// What is applied, the port that is asked, and who does not reach whom: `-FROM>TO` takes away,
/// `+FROM>TO` gives back, in this order; `*` stands for every namespace or pod. A pod with itself
/// is left out, as the suite does.
struct Step {
    policies: Vec<String>,
    /// Labels that replace those of a pod or namespace: `(y, ns2: updated)`.
    labels: Option<(&'static str, &'static str)>,
    port: u16,
    reach: &'static str,
}

fn step<const N: usize>(policies: [&str; N], port: u16, reach: &'static str) -> Step {
    Step {
        policies: policies.map(str::to_owned).into(),
        labels: None,
        port,
        reach,
    }
}

impl Step {
    fn labelled(mut self, whom: &'static str, labels: &'static str) -> Self {
        self.labels = Some((whom, labels));
        self
    }
}

const A: &str = "podSelector: {matchLabels: {pod: a}}";
const B: &str = "podSelector: {matchLabels: {pod: b}}";
const Y: &str = "namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: y}}";
const NOT_X: &str = "namespaceSelector: {matchExpressions: [{key: kubernetes.io/metadata.name, \
                     operator: NotIn, values: [x]}]}";

/// A policy of namespace x.
fn x(name: &str, spec: &str) -> String {
    policy(&format!("x/{name}"), spec)
}

fn ingress(name: &str, pods: &str, rules: &str) -> String {
    x(
        name,
        &format!("{pods}, policyTypes: [Ingress], ingress: [{rules}]"),
    )
}

fn egress(name: &str, pods: &str, rules: &str) -> String {
    x(
        name,
        &format!("{pods}, policyTypes: [Egress], egress: [{rules}]"),
    )
}

const ALL: &str = "podSelector: {}";

fn cases() -> Vec<(&'static str, Vec<Step>)> {
    let mut cases = Vec::new();
    let mut add = |name, steps: Vec<Step>| cases.push((name, steps));

    let deny_in = ingress("deny", ALL, "");
    let deny_out = egress("deny", ALL, "");
    let deny = x("deny", "podSelector: {}, policyTypes: [Ingress, Egress]");
    let allow_in = ingress("open", ALL, "{}");
    add(
        "default deny of ingress",
        vec![step([&deny_in], 80, "-*>x/*")],
    );
    add(
        "default deny of both",
        vec![step([&deny], 80, "-*>x/* -x/*>*")],
    );

    let from = |name: &str, peers: &str| ingress(name, A, &format!("{{from: [{peers}]}}"));
    add(
        "pods of the server's namespace by podSelector",
        vec![step(
            [&from("p", &format!("{{{B}}}"))],
            80,
            "-*>x/a +x/b>x/a",
        )],
    );
    add(
        "ingress for one target of a closed namespace",
        vec![step(
            [
                &deny_in,
                &from("p", "{podSelector: {}, namespaceSelector: {}}"),
            ],
            80,
            "-*>x/* +*>x/a",
        )],
    );
    add(
        "pods of all namespaces",
        vec![step([&from("p", "{namespaceSelector: {}}")], 80, "")],
    );
    add(
        "only a different namespace by namespaceSelector",
        vec![step(
            [&from("p", &format!("{{{Y}}}"))],
            80,
            "-x/*>x/a -z/*>x/a",
        )],
    );
    let b_in = "podSelector: {matchExpressions: [{key: pod, operator: In, values: [b]}]}";
    add(
        "podSelector with matchExpressions",
        vec![step(
            [&from("p", &format!("{{{b_in}}}"))],
            80,
            "-*>x/a +x/b>x/a",
        )],
    );
    let y_in = "namespaceSelector: {matchExpressions: [{key: kubernetes.io/metadata.name, \
                operator: In, values: [y]}]}";
    add(
        "namespaceSelector with matchExpressions",
        vec![step(
            [&from("p", &format!("{{{y_in}}}"))],
            80,
            "-x/*>x/a -z/*>x/a",
        )],
    );
    add(
        "podSelector or namespaceSelector",
        vec![step(
            [&from("p", &format!("{{{NOT_X}}}, {{{B}}}"))],
            80,
            "-x/c>x/a",
        )],
    );
    add(
        "podSelector and namespaceSelector",
        vec![step(
            [&from("p", &format!("{{{NOT_X}, {B}}}"))],
            80,
            "-*>x/a +y/b>x/a +z/b>x/a",
        )],
    );
    let bc_in = "podSelector: {matchExpressions: [{key: pod, operator: In, values: [b, c]}]}";
    add(
        "several podSelectors and namespaceSelectors",
        vec![step(
            [&from("p", &format!("{{{NOT_X}, {bc_in}}}"))],
            80,
            "-x/*>x/a -y/a>x/a -z/a>x/a",
        )],
    );
    add(
        "any of several podSelectors",
        vec![step(
            [&from(
                "p",
                &format!("{{{B}}}, {{podSelector: {{matchLabels: {{pod: c}}}}}}"),
            )],
            80,
            "-*>x/a +x/b>x/a +x/c>x/a",
        )],
    );
    add(
        "only one pod of a different namespace",
        vec![step(
            [&from("p", &format!("{{{Y}, {A}}}"))],
            80,
            "-*>x/a +y/a>x/a",
        )],
    );

    let y_on = |name: &str, port: &str| {
        ingress(
            name,
            A,
            &format!("{{from: [{{{Y}}}], ports: [{{{port}, protocol: TCP}}]}}"),
        )
    };
    let (on81, on80) = (y_on("p81", "port: 81"), y_on("p80", "port: 80"));
    let y_alone = "-x/*>x/a -z/*>x/a";
    add("ports", vec![step([&on81], 81, y_alone)]);
    add(
        "stacked policies with overlapping podSelectors",
        vec![
            step([&on81], 81, y_alone),
            step([&on81], 80, "-*>x/a"),
            step([&on81, &on80], 80, y_alone),
            step([&on81, &on80], 81, y_alone),
        ],
    );
    add(
        "an allow-all policy",
        vec![step([&allow_in], 80, ""), step([&allow_in], 81, "")],
    );
    let named = ingress("p", ALL, "{ports: [{port: serve-81-tcp}]}");
    add(
        "ingress on one named port",
        vec![step([&named], 81, ""), step([&named], 80, "-*>x/*")],
    );
    let named = y_on("p", "port: serve-80-tcp");
    add(
        "ingress from a namespace on one named port",
        vec![step([&named], 80, y_alone), step([&named], 81, "-*>x/a")],
    );
    let named = egress("p", ALL, "{ports: [{port: serve-80-tcp}]}");
    add(
        "egress on one named port",
        vec![step([&named], 80, ""), step([&named], 81, "-x/*>*")],
    );
    add(
        "an updated policy",
        vec![
            step([&ingress("p", ALL, "{}")], 81, ""),
            step([&ingress("p", ALL, "")], 81, "-*>x/*"),
        ],
    );
    let updated = from("p", "{namespaceSelector: {matchLabels: {ns2: updated}}}");
    add(
        "ingress from an updated namespace",
        vec![
            step([&updated], 80, "-*>x/a"),
            step([&updated], 80, "-*>x/a +y/*>x/a").labelled("y", "ns2: updated"),
        ],
    );
    let updated = from("p", "{podSelector: {matchLabels: {pod: b, pod2: updated}}}");
    add(
        "ingress from an updated pod",
        vec![
            step([&updated], 80, "-*>x/a"),
            step([&updated], 80, "-*>x/a +x/b>x/a").labelled("x/b", "pod2: updated"),
        ],
    );
    add(
        "no ingress from pods of other namespaces",
        vec![step(
            [&ingress("p", ALL, "{from: [{podSelector: {}}]}")],
            80,
            "-y/*>x/* -z/*>x/*",
        )],
    );
    let isolated = ingress("p", "podSelector: {matchLabels: {target: isolated}}", "");
    add(
        "no ingress to an updated pod",
        vec![
            step([&isolated], 80, ""),
            step([&isolated], 80, "-*>x/a").labelled("x/a", "target: isolated"),
        ],
    );
    add(
        "no egress from pods by podSelector",
        vec![step([&egress("p", A, "")], 80, "-x/a>*")],
    );
    add(
        "no egress from a namespace",
        vec![step([&deny_out], 80, "-x/*>*")],
    );
    let both = x(
        "p",
        &format!(
            "{A}, policyTypes: [Egress, Ingress], ingress: [{{from: [{{{B}}}]}}], \
         egress: [{{ports: [{{port: 80}}]}}]"
        ),
    );
    add(
        "ingress and egress in one policy",
        vec![
            step([&both], 80, "-*>x/a +x/b>x/a"),
            step([&both], 81, "-*>x/a -x/a>* +x/b>x/a"),
        ],
    );
    let to_ya = egress("p", A, &format!("{{to: [{{{Y}, {A}}}]}}"));
    let from_xa = |name: &str, pods: &str| {
        let x = "namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: x}}";
        let spec = format!("{pods}, policyTypes: [Ingress], ingress: [{{from: [{{{x}, {A}}}]}}]");
        policy(&format!("y/{name}"), &spec)
    };
    add(
        "egress denied at the client, although the server allows it",
        vec![step(
            [&to_ya, &from_xa("a", A), &from_xa("b", B)],
            80,
            "-x/a>* -*>y/a +x/a>y/a -*>y/b",
        )],
    );
    add(
        "egress to a server of a different namespace",
        vec![step([&to_ya], 80, "-x/a>* +x/a>y/a")],
    );
    add(
        "ingress on any port of one protocol",
        vec![
            step([&ingress("p", A, "{ports: [{protocol: TCP}]}")], 80, ""),
            step(
                [&ingress("p", A, "{ports: [{protocol: UDP}]}")],
                80,
                "-*>x/a",
            ),
        ],
    );
    let only80 = ingress("p", ALL, "{ports: [{port: 80}]}");
    add(
        "several ingress policies, allow-all among them",
        vec![
            step([&only80], 81, "-*>x/*"),
            step([&only80, &allow_in], 81, ""),
        ],
    );
    let only80 = egress("p", ALL, "{ports: [{port: 80}]}");
    add(
        "several egress policies, allow-all among them",
        vec![
            step([&only80], 81, "-x/*>*"),
            step([&only80, &egress("open", ALL, "{}")], 81, ""),
        ],
    );
    add(
        "policies that are deleted",
        vec![step([&deny], 80, "-x/*>* -*>x/*"), step([], 80, "")],
    );
    add(
        "egress to a server in a block",
        vec![step(
            [&egress("p", A, "{to: [{ipBlock: {cidr: 10.1.2.2/32}}]}")],
            80,
            "-x/a>* +x/a>y/b",
        )],
    );
    let except = "{to: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.1.1.2/32]}}]}";
    add(
        "egress to a block with an exception",
        vec![step([&egress("p", A, except)], 80, "-x/a>x/b")],
    );
    let just_b = "{to: [{ipBlock: {cidr: 10.1.1.2/32}}]}";
    add(
        "an address in a block and in an exception",
        vec![
            step([&egress("p", A, except)], 80, "-x/a>x/b"),
            step([&egress("p", A, just_b)], 80, "-x/a>* +x/a>x/b"),
            step([&egress("p", A, except), &egress("q", A, just_b)], 80, ""),
        ],
    );
    let out = egress("out", A, "{}");
    add(
        "ingress and egress independently",
        vec![
            step([&out], 80, ""),
            step([&out, &ingress("in", A, "")], 80, "-*>x/a"),
        ],
    );
    let sctp = |port: u16| {
        ingress(
            "sctp",
            A,
            &format!("{{ports: [{{port: {port}, protocol: SCTP}}]}}"),
        )
    };
    add(
        "SCTP is not TCP",
        vec![step([&deny_in, &sctp(81)], 81, "-*>x/*")],
    );
    add(
        "a policy for SCTP isolates",
        vec![step([&sctp(80)], 81, "-*>x/a")],
    );
    let udp = ingress("udp", A, "{ports: [{port: 81, protocol: UDP}]}");
    add("UDP is not TCP", vec![step([&udp], 81, "-*>x/a")]);
    add(
        "a namespace by its default label",
        vec![step([&from("p", &format!("{{{Y}}}"))], 80, y_alone)],
    );
    let not_y = "namespaceSelector: {matchExpressions: [{key: kubernetes.io/metadata.name, \
                 operator: NotIn, values: [y]}]}";
    add(
        "namespaces by expression on their default label",
        vec![step(
            [&egress("p", A, &format!("{{to: [{{{not_y}}}]}}"))],
            80,
            "-x/a>y/*",
        )],
    );

    // Over UDP and over SCTP.
    for (protocol, names) in [
        (
            "UDP",
            [
                "default deny of ingress (UDP)",
                "ports (UDP)",
                "only one pod of a different namespace (UDP)",
            ],
        ),
        (
            "SCTP",
            [
                "default deny of ingress (SCTP)",
                "ports (SCTP)",
                "only one pod of a different namespace (SCTP)",
            ],
        ),
    ] {
        let ports = format!("{{from: [{{{Y}}}], ports: [{{port: 81, protocol: {protocol}}}]}}");
        let [denied, ported, one] = names;
        add(denied, vec![step([&deny_in], 80, "-*>x/*")]);
        add(ported, vec![step([&ingress("p", A, &ports)], 81, "-*>x/a")]);
        add(
            one,
            vec![step(
                [&from("p", &format!("{{{Y}, {A}}}"))],
                80,
                "-*>x/a +y/a>x/a",
            )],
        );
    }
    cases
}

#[test]
fn cases_of_kubernetes_suite() {
    let cases = cases();
    for (name, steps) in &cases {
        for (number, step) in steps.iter().enumerate() {
            let mesh = mesh(&(pods(step.labels) + &step.policies.concat()));
            // Blocks of IPv4 say nothing of IPv6.
            let families = if step.policies.concat().contains("cidr") {
                1
            } else {
                2
            };
            for family in 0..families {
                let wrong = compare(&mesh, step, family);
                assert!(
                    wrong.is_empty(),
                    "{name}, step {number}:\n{}",
                    wrong.join("\n")
                );
            }
        }
    }
    assert_eq!(cases.len(), 48, "cases");
}

const NAMESPACES: [&str; 3] = ["x", "y", "z"];
const PODS: [&str; 3] = ["a", "b", "c"];

fn pods(labels: Option<(&str, &str)>) -> String {
    let labels = |name: &str| {
        labels
            .filter(|(whom, _)| *whom == name)
            .map_or("", |(_, new)| new)
    };
    let mut text = node("n1", &["10.0.0.1"]);
    for (n, namespace_name) in (1..).zip(NAMESPACES) {
        text += &namespace(namespace_name, labels(namespace_name));
        for (p, short) in (1..).zip(PODS) {
            let name = format!("{namespace_name}/{short}");
            let ips = [format!("10.1.{n}.{p}"), format!("fd00:{n}::{p}")];
            text += &pod(&name, "n1", &[&ips[0], &ips[1]], labels(&name), "");
        }
    }
    text
}

/// Pairs for which policy and table differ.
fn compare(mesh: &Mesh, step: &Step, family: usize) -> Vec<String> {
    let names: Vec<String> = NAMESPACES
        .iter()
        .flat_map(|namespace| PODS.map(|pod| format!("{namespace}/{pod}")))
        .collect();
    let mut wrong = Vec::new();
    for from in &names {
        for to in names.iter().filter(|to| *to != from) {
            let (caller, callee) = (workload(mesh, from), workload(mesh, to));
            let server = Peer {
                ip: callee.ips[family],
                pod: Some(&**callee),
            };
            let client = Peer {
                ip: caller.ips[family],
                pod: Some(&**caller),
            };
            let reached = decide(caller, Way::Egress, server, step.port).allows()
                && decide(callee, Way::Ingress, client, step.port).allows();
            if reached != expected(step.reach, from, to) {
                wrong.push(format!("{from} > {to}:{} is {reached}", step.port));
            }
        }
    }
    wrong
}

fn expected(reach: &str, from: &str, to: &str) -> bool {
    let fits = |pattern: &str, name: &str| match pattern {
        "*" => true,
        pattern => match pattern.strip_suffix("/*") {
            Some(namespace) => name.split('/').next() == Some(namespace),
            None => name == pattern,
        },
    };
    let mut reached = true;
    for word in reach.split_whitespace() {
        let (sign, pair) = word.split_at(1);
        let (a, b) = pair.split_once('>').unwrap();
        if fits(a, from) && fits(b, to) {
            reached = sign == "+";
        }
    }
    reached
}

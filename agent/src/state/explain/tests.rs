//! What people are told, and that it is what the proxy would do.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use super::*;
use crate::testing::manifests::{mesh, meshed_namespace, node, pod};

fn world() -> Mesh {
    let policies = "---\n{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: \
        web, namespace: shop}, spec: {podSelector: {matchLabels: {app: web}}, policyTypes: \
        [Ingress, Egress], ingress: [{ports: [{port: 1}]}, {from: [{podSelector: {matchLabels: \
        {app: cart}}}, {ipBlock: {cidr: 192.0.2.0/24, except: [192.0.2.7/32]}}], ports: [{port: \
        http}, {port: 90, endPort: 99}, {protocol: UDP}]}], egress: [{to: [{namespaceSelector: \
        {matchExpressions: [{key: team, operator: In, values: [a, b]}]}}]}]}}\n\
        ---\n{apiVersion: policy.linkerd.io/v1beta3, kind: Server, metadata: {name: web, \
        namespace: shop}, spec: {podSelector: {matchLabels: {app: web}}, port: 95}}\n";
    mesh(
        &([
            node("n1", &["192.168.0.1"]),
            node("n2", &["192.168.0.2"]),
            meshed_namespace("shop", ""),
            pod("shop/web", "n1", &["10.1.0.1"], "labels: {app: web}"),
            pod("shop/cart", "n1", &["10.1.0.2"], "labels: {app: cart}"),
            pod("shop/far", "n2", &["10.2.0.1"], ""),
            pod("bank/till", "n1", &["10.1.0.9"], ""),
            "---\n{apiVersion: v1, kind: Service, metadata: {name: web, namespace: shop}, spec: \
             {clusterIP: 10.96.0.1, selector: {app: web}, ports: [{port: 80}]}}\n"
                .into(),
        ]
        .concat()
            + policies),
    )
}

/// `pod < from:port` or `pod > to:port`.
fn question(text: &str) -> Question {
    let mut words = text.split(' ');
    let pod = words.next().map(str::to_owned);
    let sign = words.next();
    let (peer, port) = words.next().unwrap().rsplit_once(':').unwrap();
    let peer = Some(peer.to_owned());
    let (from, to) = if sign == Some("<") {
        (peer, None)
    } else {
        (None, peer)
    };
    Question {
        pod,
        from,
        to,
        port: port.parse().ok(),
        direction: None,
    }
}

fn told(mesh: &Mesh, text: &str) -> Vec<String> {
    let checks = explain(mesh, &question(text)).unwrap();
    let line = |check: Check| {
        format!(
            "{}: {} by {}: {}",
            check.asked, check.verdict, check.decided_by, check.why
        )
    };
    checks.into_iter().map(line).collect()
}

#[test]
fn both_ends_and_both_kinds_of_policy_are_asked() {
    let mesh = world();
    let rule = "from pods with app=cart of its namespace or 192.0.2.0/24 except 192.0.2.7/32, \
                TCP port named http, TCP 90-99, every port of UDP";
    let none = "allowed by -: no NetworkPolicy selects it";
    assert_eq!(
        told(&mesh, "shop/web < shop/cart:8080"),
        [
            format!("egress of shop/cart: {none}"),
            format!("ingress of shop/web: allowed by NetworkPolicy shop/web, ingress[1]: {rule}"),
            "mesh, into shop/web: allowed by default all-unauthenticated: lets \
             spiffe://cluster.local/ns/shop/sa/cart in"
                .into(),
        ]
    );
    // One allows and the other denies: both are told.
    assert_eq!(
        told(&mesh, "shop/cart > shop/web:95")[1..],
        [
            format!("ingress of shop/web: allowed by NetworkPolicy shop/web, ingress[1]: {rule}"),
            "mesh, into shop/web: denied by server web: default_deny: \
             spiffe://cluster.local/ns/shop/sa/cart"
                .into(),
        ]
    );
    assert_eq!(
        told(&mesh, "shop/web < 192.0.2.7:95"),
        [
            "ingress of shop/web: denied by NetworkPolicy shop/web: isolated, and no rule allows it",
            "mesh, into shop/web: denied by server web: default_deny: a client without identity",
        ]
    );
    assert_eq!(
        told(&mesh, "shop/web > 8.8.8.8:53"),
        ["egress of shop/web: denied by NetworkPolicy shop/web: isolated, and no rule allows it"]
    );
    assert_eq!(
        told(&mesh, "shop/cart > 8.8.8.8:53"),
        [format!("egress of shop/cart: {none}")]
    );
    assert_eq!(
        told(&mesh, "shop/web < 192.168.0.1:95")[0],
        "ingress of shop/web: allowed by -: a pod and its own node always may"
    );
    assert_eq!(
        told(&mesh, "shop/web > shop/web:1")[0],
        "egress of shop/web: allowed by -: a pod may always call itself"
    );
}

#[test]
fn what_another_agent_or_the_cni_decides_is_not_guessed() {
    let mesh = world();
    assert_eq!(
        told(&mesh, "shop/cart > shop/far:80")[1..],
        ["ingress of shop/far: unknown by -: it runs on n2: ask the agent there"]
    );
    let outside = "it is outside the mesh, so only the CNI enforces this";
    assert_eq!(
        told(&mesh, "shop/cart > bank/till:80")[1..],
        [format!(
            "ingress of bank/till: allowed by -: no NetworkPolicy selects it; {outside}"
        )]
    );
    let skipping = "annotations: {config.picomesh.io/skip-inbound-ports: \"22\", \
                    config.picomesh.io/skip-outbound-ports: \"25\"}";
    let mesh = with_pod(&pod("shop/skip", "n1", &["10.1.0.7"], skipping));
    assert_eq!(
        told(&mesh, "shop/skip < shop/cart:22")[1..],
        [
            "ingress of shop/skip: allowed by skip-inbound-ports: port 22 is kept out of the mesh, so \
          only the CNI enforces policy"
        ]
    );
    assert_eq!(
        told(&mesh, "shop/skip > 8.8.8.8:25"),
        [
            "egress of shop/skip: allowed by skip-outbound-ports: port 25 is kept out of the mesh, so \
          only the CNI enforces policy"
        ]
    );
}

fn with_pod(pod: &str) -> Mesh {
    let cart = crate::testing::manifests::pod("shop/cart", "n1", &["10.1.0.2"], "");
    mesh(&(meshed_namespace("shop", "") + &cart + pod))
}

#[test]
fn a_direction_narrows_the_question() {
    let mesh = world();
    let asked = |direction| {
        let question = Question {
            direction: Some(direction),
            ..question("shop/web < shop/cart:8080")
        };
        let checks = explain(&mesh, &question).unwrap();
        checks
            .into_iter()
            .map(|check| check.asked)
            .collect::<Vec<_>>()
    };
    assert_eq!(asked(Direction::Egress), ["egress of shop/cart"]);
    assert_eq!(
        asked(Direction::Ingress),
        ["ingress of shop/web", "mesh, into shop/web"]
    );
}

#[test]
fn a_pods_policies_are_told_rule_by_rule() {
    let mesh = world();
    let web = local_pod(&mesh, "shop/web").unwrap();
    let rows = policies_of(web, None);
    assert_eq!(rows.len(), 2);
    assert_eq!(rows[0].direction, Direction::Ingress);
    assert_eq!(rows[0].rules[0], "from anybody, TCP 1");
    assert_eq!(rows[1].policy, "shop/web");
    assert_eq!(
        rows[1].rules,
        ["to all pods of namespaces with team in (a, b), any port"]
    );
    assert_eq!(policies_of(web, Some(Direction::Egress)), rows[1..]);
}

#[test]
fn a_question_that_cannot_be_answered_says_what_to_ask() {
    let mesh = world();
    let direction = |direction| Question {
        direction: Some(direction),
        ..question("shop/web > 8.8.8.8:53")
    };
    let rows = [
        (question("shop > 8.8.8.8:53"), "write NAMESPACE/NAME"),
        (
            question("shop/nobody > 8.8.8.8:53"),
            "there is no pod shop/nobody",
        ),
        (
            question("shop/web > shop/nobody:53"),
            "there is no pod shop/nobody",
        ),
        (question("shop/web > 10.96.0.1:80"), "name that"),
        (direction(Direction::Ingress), "8.8.8.8 is no pod"),
        (
            Question {
                pod: None,
                ..question("shop/web > 8.8.8.8:53")
            },
            "--pod",
        ),
        (
            Question {
                port: None,
                ..question("shop/web > 8.8.8.8:53")
            },
            "--port",
        ),
        (
            Question {
                to: None,
                ..question("shop/web > 8.8.8.8:53")
            },
            "--from or --to",
        ),
        (
            Question {
                from: Some("shop/cart".into()),
                ..question("shop/web > 8.8.8.8:53")
            },
            "leave --from or --to out",
        ),
    ];
    for (question, wanted) in rows {
        let error = explain(&mesh, &question).unwrap_err();
        assert!(error.contains(wanted), "{question:?}: {error}");
    }
    let elsewhere = local_pod(&mesh, "shop/far").unwrap_err();
    assert_eq!(elsewhere, "shop/far: it runs on n2: ask the agent there");
}

//! Who is in the mesh, and where addresses lead: from manifests to the answers.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod services;

use std::net::{IpAddr, SocketAddr};

use super::{
    Mesh, Workload,
    objects::{MeshSettings, OutboundDefault},
    resolve::{Carrier, Destination, RefusedDestination, resolve},
};
use crate::testing::manifests::{mesh, mesh_with, meshed_namespace, node, pod, settings, workload};

/// Two nodes, a meshed namespace `shop` with `web` on this node and `api` on the other, and a
/// plain namespace `bank` with `till` on this one.
fn base() -> String {
    [
        node("n1", &["192.168.0.1", "fd00:1::1"]),
        node("n2", &["192.168.0.2", "fd00:1::2"]),
        meshed_namespace("shop", ""),
        pod(
            "shop/web",
            "n1",
            &["10.1.0.1", "fd00:a::1"],
            "labels: {app: front}",
        ),
        pod(
            "shop/api",
            "n2",
            &["10.2.0.1", "fd00:b::1"],
            "labels: {app: back}",
        ),
        pod("bank/till", "n1", &["10.1.0.9"], "labels: {app: till}"),
    ]
    .concat()
}

fn service(name: &str, spec: &str) -> String {
    format!(
        "---\n{{apiVersion: v1, kind: Service, metadata: {{name: {name}, namespace: shop}}, \
         spec: {{{spec}}}}}\n"
    )
}

fn slice(name: &str, service: &str, body: &str) -> String {
    format!(
        "---\n{{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {{name: {name}, \
         namespace: shop, labels: {{kubernetes.io/service-name: {service}}}}}, \
         addressType: IPv4, {body}}}\n"
    )
}

/// The answer in one line: the carrier and address of each endpoint, or the refusal's word.
fn lead(mesh: &Mesh, destination: &str) -> String {
    lead_from(mesh, workload(mesh, "shop/web"), destination)
}

fn lead_from(mesh: &Mesh, source: &Workload, destination: &str) -> String {
    let endpoint = |endpoint: &super::resolve::Endpoint| {
        let carrier = match &endpoint.carrier {
            Carrier::Local => "local".to_owned(),
            Carrier::Tunnel { node, addresses } => format!("tunnel({node},{})", addresses.len()),
            Carrier::Plain => "plain".to_owned(),
        };
        let name = endpoint
            .workload
            .as_ref()
            .map_or("?", |workload| &*workload.key.name);
        format!("{carrier} {name} {}", endpoint.addr)
    };
    match resolve(mesh, source, destination.parse::<SocketAddr>().unwrap()) {
        Destination::Service(service) => {
            let all: Vec<_> = service.endpoints.iter().map(endpoint).collect();
            format!(
                "{}:{} [{}]",
                service.service.name,
                service.port,
                all.join(", ")
            )
        }
        Destination::Endpoint(one) => endpoint(&one),
        Destination::Passthrough(addr) => format!("pass {addr}"),
        Destination::Refused(reason, _) => format!("refused {}", reason.as_str()),
    }
}

fn problems(mesh: &Mesh) -> Vec<String> {
    mesh.problems.iter().map(ToString::to_string).collect()
}

#[test]
fn the_pods_word_wins_over_its_namespaces_and_some_pods_are_never_meshed() {
    let namespaces = meshed_namespace("shop", "")
        + &meshed_namespace("kube-system", "")
        + &meshed_namespace("picomesh-system", "")
        + "---\n{apiVersion: v1, kind: Namespace, metadata: {name: bank}}\n";
    let yes = "labels: {picomesh.io/mesh: enabled}";
    let no = "annotations: {picomesh.io/mesh: disabled}";
    let rows = [
        ("shop/a", "", true),
        ("shop/a", yes, true),
        ("shop/a", no, false),
        (
            "shop/a",
            "annotations: {linkerd.io/inject: disabled}",
            false,
        ),
        ("bank/a", "", false),
        ("bank/a", yes, true),
        ("nowhere/a", "", false),
        ("nowhere/a", yes, true),
        ("kube-system/a", "", false),
        ("kube-system/a", yes, false),
        ("picomesh-system/a", yes, false),
    ];
    for (name, more, meshed) in rows {
        let mesh = mesh(&(namespaces.clone() + &pod(name, "n1", &["10.1.0.1"], more)));
        assert_eq!(workload(&mesh, name).meshed, meshed, "{name} {more}");
        let told = problems(&mesh).iter().any(|p| p.contains("never is"));
        assert_eq!(
            told,
            name.contains("-system") && more == yes,
            "{name} {more}"
        );
    }
    let host =
        pod("shop/a", "n1", &["192.168.0.1"], yes).replace("spec: {", "spec: {hostNetwork: true, ");
    let mesh = mesh(&(namespaces + &node("n1", &["192.168.0.1"]) + &host));
    let workload = workload(&mesh, "shop/a");
    assert!(!workload.meshed && workload.policy.is_none());
    assert!(mesh.by_ip.is_empty(), "a node's address is never a pod's");
    assert_eq!(
        problems(&mesh),
        [
            "Pod shop/a: asks to be in the mesh and never is: it shares the node's network; remove \
          the word"
        ]
    );
}

#[test]
fn a_mirror_of_a_static_pod_has_no_part_in_the_mesh() {
    let mirror = "annotations: {kubernetes.io/config.mirror: 5e1f}";
    let pods = meshed_namespace("shop", "") + &pod("shop/a", "n1", &["10.1.0.1"], mirror);
    let mesh = mesh(&pods);
    let workload = workload(&mesh, "shop/a");
    assert!(!workload.meshed);
    assert_eq!(workload.mirror_of.as_deref(), Some("5e1f"));
}

#[test]
fn words_of_the_pod_win_over_those_of_the_namespace_and_those_over_the_meshs() {
    let namespace = meshed_namespace(
        "shop",
        "annotations: {config.picomesh.io/skip-inbound-ports: \"1\", \
         config.picomesh.io/skip-outbound-ports: \"2\", config.picomesh.io/outbound-default: deny}",
    );
    let own = "annotations: {config.picomesh.io/skip-outbound-ports: \"3\", \
               config.picomesh.io/outbound-default: allow}";
    let mesh = mesh(
        &(namespace
            + &pod("shop/a", "n1", &["10.1.0.1"], "")
            + &pod("shop/b", "n1", &["10.1.0.2"], own)),
    );
    let ports = |name: &str| {
        let w = workload(&mesh, name);
        (
            w.skip_inbound[0].first,
            w.skip_outbound[0].first,
            w.outbound_default,
        )
    };
    assert_eq!(ports("shop/a"), (1, 2, OutboundDefault::Deny));
    assert_eq!(ports("shop/b"), (1, 3, OutboundDefault::Allow));
    let deny = MeshSettings {
        outbound_default: OutboundDefault::Deny,
        ..settings()
    };
    let strict = mesh_with(deny, &pod("shop/a", "n1", &["10.1.0.1"], ""));
    assert_eq!(
        workload(&strict, "shop/a").outbound_default,
        OutboundDefault::Deny
    );
    assert_eq!(
        lead_from(&strict, workload(&strict, "shop/a"), "1.1.1.1:443"),
        "refused outbound_default_deny"
    );
}

#[test]
fn policy_is_built_for_the_pods_of_this_node() {
    let mesh = mesh(&base());
    assert!(workload(&mesh, "shop/web").local && workload(&mesh, "shop/web").policy.is_some());
    assert!(!workload(&mesh, "shop/api").local && workload(&mesh, "shop/api").policy.is_none());
    assert_eq!(
        workload(&mesh, "shop/api").identity.to_string(),
        "spiffe://cluster.local/ns/shop/sa/api"
    );
}

#[test]
fn a_pods_own_address_leads_to_it_by_the_carrier_its_state_demands() {
    let mut text = base();
    text += &pod(
        "shop/picky",
        "n2",
        &["10.2.0.7"],
        "annotations: {config.linkerd.io/skip-inbound-ports: \"22,4000-5000\"}",
    );
    text += &pod("shop/lost", "n3", &["10.3.0.1"], "");
    let mesh = mesh(&text);
    let rows = [
        ("10.1.0.1:1", "local web 10.1.0.1:1"),
        ("[fd00:a::1]:80", "local web [fd00:a::1]:80"),
        ("10.2.0.1:8080", "tunnel(n2,2) api 10.2.0.1:8080"),
        ("[::ffff:10.2.0.1]:8080", "tunnel(n2,2) api 10.2.0.1:8080"),
        ("10.1.0.9:8080", "plain till 10.1.0.9:8080"),
        ("10.2.0.7:21", "tunnel(n2,2) picky 10.2.0.7:21"),
        ("10.2.0.7:22", "plain picky 10.2.0.7:22"),
        ("10.2.0.7:3999", "tunnel(n2,2) picky 10.2.0.7:3999"),
        ("10.2.0.7:4000", "plain picky 10.2.0.7:4000"),
        ("10.2.0.7:5000", "plain picky 10.2.0.7:5000"),
        ("10.2.0.7:5001", "tunnel(n2,2) picky 10.2.0.7:5001"),
        // HBONE of a pod's own is the pod's.
        ("10.2.0.1:15008", "tunnel(n2,2) api 10.2.0.1:15008"),
        // Never plain, although nobody knows how to get there.
        ("10.3.0.1:80", "tunnel(n3,0) lost 10.3.0.1:80"),
        ("192.168.0.1:22", "pass 192.168.0.1:22"),
        ("1.1.1.1:443", "pass 1.1.1.1:443"),
        ("[::ffff:1.1.1.1]:443", "pass 1.1.1.1:443"),
        ("192.168.0.1:15008", "refused tunnel_port"),
        ("[fd00:1::2]:15008", "refused tunnel_port"),
        ("1.1.1.1:15008", "pass 1.1.1.1:15008"),
        ("127.0.0.1:80", "refused unroutable"),
        ("[::1]:80", "refused unroutable"),
        ("0.0.0.0:80", "refused unroutable"),
        ("[::]:80", "refused unroutable"),
        ("224.0.0.1:80", "refused unroutable"),
        ("[ff02::1]:80", "refused unroutable"),
        ("255.255.255.255:80", "refused unroutable"),
        ("10.2.0.1:0", "refused unroutable"),
    ];
    for (destination, wanted) in rows {
        assert_eq!(lead(&mesh, destination), wanted, "{destination}");
    }
    assert_eq!(
        problems(&mesh),
        [
            "Node n3: runs meshed pods and has no address, so nobody reaches them; give it \
          status.addresses"
        ]
    );
}

/// Rule 8: a meshed Prometheus reads the metrics of agents.
#[test]
fn a_nodes_metrics_pass_whatever_the_default_is() {
    let deny = MeshSettings {
        outbound_default: OutboundDefault::Deny,
        ..settings()
    };
    let mesh = mesh_with(deny.clone(), &base());
    let rows = [
        ("192.168.0.1:4191", "pass 192.168.0.1:4191"),
        ("[fd00:1::2]:4191", "pass [fd00:1::2]:4191"),
        ("192.168.0.2:4192", "refused outbound_default_deny"),
        ("1.1.1.1:4191", "refused outbound_default_deny"),
        // Of a pod it is a port like any other.
        ("10.1.0.1:4191", "local web 10.1.0.1:4191"),
    ];
    for (destination, wanted) in rows {
        assert_eq!(lead(&mesh, destination), wanted, "{destination}");
    }
    let elsewhere = MeshSettings {
        metrics_port: 9000,
        ..deny
    };
    let mesh = mesh_with(elsewhere, &base());
    assert_eq!(lead(&mesh, "192.168.0.2:9000"), "pass 192.168.0.2:9000");
    assert_eq!(
        lead(&mesh, "192.168.0.2:4191"),
        "refused outbound_default_deny"
    );
}

#[test]
fn the_tunnel_port_of_nodes_is_the_one_of_the_settings() {
    let elsewhere = MeshSettings {
        tunnel_port: 25008,
        ..settings()
    };
    let mesh = mesh_with(elsewhere, &base());
    assert_eq!(lead(&mesh, "192.168.0.2:25008"), "refused tunnel_port");
    assert_eq!(lead(&mesh, "192.168.0.2:15008"), "pass 192.168.0.2:15008");
}

#[test]
fn a_refused_destination_says_what_was_dialled_and_what_to_do() {
    let dialled = "10.96.0.1:82".parse().unwrap();
    let rows = [
        (RefusedDestination::NoEndpoints, "selector"),
        (RefusedDestination::NoSuchPort, "add this one to spec.ports"),
        (RefusedDestination::AmbiguousAddress, "debug state"),
        (RefusedDestination::Unroutable, "dial the address of"),
        (
            RefusedDestination::TunnelPort,
            "dial the pod or Service that is meant",
        ),
        (
            RefusedDestination::OutboundDefaultDeny,
            "config.picomesh.io/outbound-default: allow",
        ),
    ];
    for (why, remedy) in rows {
        let sentence = why.sentence(dialled);
        assert!(sentence.contains("10.96.0.1"), "{sentence}");
        assert!(sentence.contains(remedy), "{sentence}");
    }
}

#[test]
fn an_address_of_two_live_pods_is_refused_and_one_of_the_dead_is_not() {
    let claim = |more: &str, node: &str| pod("shop/other", node, &["10.2.0.1"], more);
    let deleted = "deletionTimestamp: \"2026-01-01T00:00:00Z\"";
    let done =
        |phase: &str| claim("", "n2").replace("status: {", &format!("status: {{phase: {phase}, "));
    let rows = [
        (claim("", "n2"), "refused ambiguous_address"),
        (claim("", "n1"), "refused ambiguous_address"),
        // The node gives its addresses out itself; another node's word is not enough.
        (claim(deleted, "n2"), "tunnel(n2,2) api 10.2.0.1:80"),
        (claim(deleted, "n1"), "refused ambiguous_address"),
        (done("Succeeded"), "tunnel(n2,2) api 10.2.0.1:80"),
        (done("Failed"), "tunnel(n2,2) api 10.2.0.1:80"),
        (done("Running"), "refused ambiguous_address"),
    ];
    for (other, wanted) in rows {
        let mesh = mesh(&(base() + &other));
        assert_eq!(lead(&mesh, "10.2.0.1:80"), wanted, "{other}");
        let ambiguous = wanted.contains("ambiguous");
        assert_eq!(
            problems(&mesh).len(),
            if ambiguous { 2 } else { 0 },
            "{other}"
        );
        assert_eq!(
            mesh.by_ip
                .contains_key(&"10.2.0.1".parse::<IpAddr>().unwrap()),
            !ambiguous
        );
    }
    // Alone, a terminating pod keeps its address.
    let text = base() + &pod("shop/leaving", "n2", &["10.2.0.2"], deleted);
    assert_eq!(
        lead(&mesh(&text), "10.2.0.2:80"),
        "tunnel(n2,2) leaving 10.2.0.2:80"
    );
}

#[test]
fn a_pod_cannot_claim_a_nodes_address_nor_a_node_anothers() {
    let text =
        base() + &pod("shop/liar", "n2", &["192.168.0.1"], "") + &node("n3", &["192.168.0.2"]);
    let mesh = mesh(&text);
    assert_eq!(lead(&mesh, "192.168.0.1:80"), "pass 192.168.0.1:80");
    let ip = |text: &str| text.parse::<IpAddr>().unwrap();
    assert_eq!(
        mesh.node_of_address.get(&ip("192.168.0.1")).map(|n| &**n),
        Some("n1")
    );
    assert_eq!(mesh.node_of_address.get(&ip("192.168.0.2")), None);
    assert_eq!(
        mesh.node_of_address.get(&ip("fd00:1::2")).map(|n| &**n),
        Some("n2")
    );
    assert_eq!(lead(&mesh, "192.168.0.2:15008"), "refused tunnel_port");
    assert_eq!(problems(&mesh).len(), 3, "{:?}", problems(&mesh));
}

//! What a NetworkPolicy's fields become, and which are refused, with the field's name.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use super::*;
use crate::{
    local,
    state::objects::{Objects, Protocol},
    testing::manifests::settings,
};

fn read(spec: &str) -> Result<NetworkPolicy, String> {
    read_version("networking.k8s.io/v1", spec)
}

fn read_version(version: &str, spec: &str) -> Result<NetworkPolicy, String> {
    let text = format!(
        "{{apiVersion: {version}, kind: NetworkPolicy, metadata: {{name: p, namespace: shop}}, \
         spec: {{{spec}}}}}\n"
    );
    let objects: Result<Objects, _> = local::objects(&text, &Converter::new(&settings()));
    let objects = objects.map_err(|error| error.message)?;
    let policy = objects.network_policies.into_values().next();
    Ok((*policy.expect("it is ignored")).clone())
}

#[test]
fn every_field_is_read() {
    let policy = read(
        "podSelector: {matchLabels: {app: web}}, policyTypes: [Ingress, Egress], \
         ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.1.0.0/16]}}, \
         {namespaceSelector: {}, podSelector: {matchLabels: {a: b}}}], ports: [{port: 80}, \
         {port: web, protocol: UDP}, {port: 5, endPort: 7, protocol: SCTP}, {}]}], egress: []",
    )
    .unwrap();
    assert_eq!(policy.key.to_string(), "shop/p");
    assert_eq!(policy.pod_selector.match_labels.len(), 1);
    let ingress = policy.ingress.unwrap();
    let block = NetworkMatch {
        cidr: "10.0.0.0/8".parse().unwrap(),
        except: vec!["10.1.0.0/16".parse().unwrap()],
    };
    assert_eq!(ingress[0].peers[0], NetworkPeer::Block(block));
    let pods = Selector {
        match_labels: [("a".into(), "b".into())].into(),
        ..Selector::default()
    };
    let both = NetworkPeer::Pods {
        namespaces: Some(Selector::default()),
        pods,
    };
    assert_eq!(ingress[0].peers[1], both);
    let port = |protocol, first, last| NetworkPort {
        protocol,
        ports: NetworkPorts::Range(PortRange { first, last }),
    };
    let wanted = [
        port(Protocol::Tcp, 80, 80),
        NetworkPort {
            protocol: Protocol::Udp,
            ports: NetworkPorts::Name("web".into()),
        },
        port(Protocol::Sctp, 5, 7),
        NetworkPort {
            protocol: Protocol::Tcp,
            ports: NetworkPorts::All,
        },
    ];
    assert_eq!(ingress[0].ports, wanted);
    assert_eq!(policy.egress, Some(Vec::new()));
}

#[test]
fn what_the_api_server_would_refuse_is_refused_with_field_and_remedy() {
    let peer = |peer: &str| format!("ingress: [{{from: [{peer}]}}]");
    let port = |port: &str| format!("egress: [{{}}, {{ports: [{{{port}}}]}}]");
    let rows = [
        (
            "policyTypes: [Ingress, egress]".into(),
            "spec.policyTypes[1]",
            "write Ingress or Egress",
        ),
        (peer("{}"), "spec.ingress[0].from[0]", "leave from out"),
        (
            "egress: [{to: [{podSelector: {}}, {}]}]".into(),
            "spec.egress[0].to[1]",
            "leave to out",
        ),
        (
            peer("{ipBlock: {cidr: 10.0.0.0/8}, podSelector: {}}"),
            "from[0].ipBlock",
            "a peer of its own",
        ),
        (
            peer("{ipBlock: {cidr: 10.0.0.0/8}, namespaceSelector: {}}"),
            "from[0].ipBlock",
            "a peer of its own",
        ),
        (
            peer("{ipBlock: {cidr: 10.0.0.1}}"),
            "ipBlock.cidr",
            "10.0.0.1/32",
        ),
        (
            peer("{ipBlock: {cidr: 10.0.0.0/33}}"),
            "ipBlock.cidr",
            "is not a network",
        ),
        (
            peer("{ipBlock: {cidr: \"\"}}"),
            "ipBlock.cidr",
            "is not a network",
        ),
        (
            peer("{ipBlock: {cidr: 10.0.0.0/}}"),
            "ipBlock.cidr",
            "is not a network",
        ),
        (
            peer("{ipBlock: {cidr: 10..0.0/8}}"),
            "ipBlock.cidr",
            "is not a network",
        ),
        (
            peer("{ipBlock: {cidr: 10.0.0.0/8, except: [11.0.0.0/16]}}"),
            "except[0]",
            "is no part of 10.0.0.0/8",
        ),
        (
            peer("{ipBlock: {cidr: 10.0.0.0/8, except: [10.0.0.0/16, 10.0.0.0/8]}}"),
            "except[1]",
            "smaller network",
        ),
        (
            peer("{ipBlock: {cidr: 10.0.0.0/8, except: [\"fd00::/16\"]}}"),
            "except[0]",
            "is no part",
        ),
        (
            peer("{podSelector: {matchExpressions: [{key: a, operator: in, values: [b]}]}}"),
            "from[0].podSelector.matchExpressions[0].operator",
            "write In",
        ),
        (
            peer("{namespaceSelector: {matchExpressions: [{key: a, operator: In}]}}"),
            "from[0].namespaceSelector.matchExpressions[0].values",
            "at least one",
        ),
        (
            "podSelector: {matchExpressions: [{key: a, operator: Exists, values: [b]}]}".into(),
            "spec.podSelector.matchExpressions[0].values",
            "leave them out",
        ),
        (
            port("port: 0"),
            "spec.egress[1].ports[0].port",
            "from 1 to 65535",
        ),
        (
            port("port: 65536"),
            "spec.egress[1].ports[0].port",
            "from 1 to 65535",
        ),
        (
            port("port: \"80\""),
            "spec.egress[1].ports[0].port",
            "without quotes",
        ),
        (
            port("port: Not_A_Name"),
            "spec.egress[1].ports[0].port",
            "is not a port",
        ),
        (
            port("protocol: ICMP"),
            "spec.egress[1].ports[0].protocol",
            "write TCP, UDP or SCTP",
        ),
        (
            port("port: 80, endPort: 79"),
            "spec.egress[1].ports[0].endPort",
            "is less than port 80",
        ),
        (
            port("port: 80, endPort: 70000"),
            "spec.egress[1].ports[0].endPort",
            "from 1 to 65535",
        ),
        (
            port("port: web, endPort: 90"),
            "spec.egress[1].ports[0].endPort",
            "no number to begin at",
        ),
        (
            port("endPort: 90"),
            "spec.egress[1].ports[0].endPort",
            "no number to begin at",
        ),
    ];
    for (spec, field, remedy) in rows {
        let message = read(&spec).expect_err(&spec);
        assert!(
            message.contains(field),
            "{spec}: {message} does not name {field}"
        );
        assert!(
            message.contains(remedy),
            "{spec}: {message} does not say {remedy}"
        );
    }
}

#[test]
fn networks_that_kubernetes_lets_stand_are_read_as_it_reads_them() {
    for (written, meant) in [
        ("010.001.000.000/08", "10.1.0.0/8"),
        ("10.1.2.3/16", "10.1.0.0/16"),
        ("0.0.0.0/0", "0.0.0.0/0"),
        ("::ffff:10.1.0.0/112", "10.1.0.0/16"),
        ("::ffff:010.1.0.0/0112", "10.1.0.0/16"),
        ("::ffff:a01:0/112", "10.1.0.0/16"),
        ("::ffff:10.0.0.0/80", "::/80"),
        ("::/0", "::/0"),
    ] {
        let meant: IpNet = meant.parse().unwrap();
        let spec = format!(
            "podSelector: {{}}, ingress: [{{from: [{{ipBlock: {{cidr: \"{written}\"}}}}]}}]"
        );
        let policy = read(&spec).expect(written);
        let block = NetworkMatch {
            cidr: meant.trunc(),
            except: Vec::new(),
        };
        let peer = &policy.ingress.unwrap()[0].peers[0];
        assert_eq!(*peer, NetworkPeer::Block(block), "{written}");
    }
    // What is cut out is cut out in whatever clothes.
    let hole = "podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, \
                except: [\"::ffff:10.1.0.0/112\"]}}]}]";
    let policy = read(hole).unwrap();
    let block = NetworkMatch {
        cidr: "10.0.0.0/8".parse().unwrap(),
        except: vec!["10.1.0.0/16".parse().unwrap()],
    };
    assert_eq!(
        policy.ingress.unwrap()[0].peers[0],
        NetworkPeer::Block(block)
    );
}

#[test]
fn another_version_is_refused_and_other_peoples_kind_ignored() {
    for version in ["networking.k8s.io/v1beta1", "extensions/v1beta1"] {
        let message = read_version(version, "").expect_err(version);
        assert!(message.contains("write networking.k8s.io/v1"), "{message}");
    }
    for version in ["crd.projectcalico.org/v1", "cilium.io/v2", "v1"] {
        let text = format!("{{apiVersion: {version}, kind: NetworkPolicy, metadata: {{name: p}}}}");
        let objects = local::objects(&text, &Converter::new(&settings())).unwrap();
        assert!(objects.network_policies.is_empty(), "{version}");
    }
}

#[test]
fn a_misspelt_field_of_a_manifest_lets_nobody_in() {
    let error = read("podSelector: {}, ingresses: [{}]").unwrap_err();
    assert_eq!(
        error,
        "spec.ingresses: \"ingresses\" is no field here; correct its spelling or leave it out; the \
         fields are podSelector, policyTypes, ingress, egress"
    );
}

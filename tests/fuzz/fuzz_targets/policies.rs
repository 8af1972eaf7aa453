//! Policy of any kind against a small mesh that stands: documents to decisions.
//!
//! Input: the documents of the policy; the mesh around them is fixed. For each pod, client and
//! port: the decision is the same when it is made again, says by what it was made, and for a port
//! that no Server selects follows the default alone, as a table says it here. NetworkPolicy denies
//! nobody whom no policy isolates, and never a pod itself or its node; and of somebody whose pod is
//! known it allows no less than of his address alone.
#![no_main]

use std::{
    net::{IpAddr, Ipv4Addr},
    sync::{Arc, LazyLock},
};

use libfuzzer_sys::fuzz_target;
use picomesh::{
    identity::parse_spiffe_id,
    k8s::Converter,
    local,
    state::{
        Mesh, Workload,
        network_policy::{self, NetworkVerdict, Peer, Way},
        objects::DefaultPolicy,
        policy::{Client, ClientIdentity, Verdict},
    },
    testing::manifests::{meshed_namespace, node, pod, settings},
};

static AROUND: LazyLock<String> = LazyLock::new(|| {
    [
        node("n1", &["192.168.1.1"]),
        node("n2", &["192.168.1.2"]),
        meshed_namespace("shop", ""),
        meshed_namespace(
            "strict",
            "annotations: {config.picomesh.io/default-inbound-policy: cluster-authenticated}",
        ),
        pod("shop/web", "n1", &["10.0.1.1"], "labels: {app: web}"),
        pod(
            "shop/cart",
            "n1",
            &["10.0.1.2", "fd00::2"],
            "labels: {app: cart}",
        ),
        pod("strict/bank", "n1", &["10.0.1.3"], "labels: {app: web}"),
        pod("shop/far", "n2", &["10.0.2.1"], "labels: {app: far}"),
    ]
    .concat()
});

/// Where the pods of `n1` run.
const NODE: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 168, 1, 1));
const PORTS: [u16; 6] = [1, 80, 4191, 8080, 15008, 65535];

fuzz_target!(|text: &str| {
    let settings = Arc::new(settings());
    let converter = Converter::new(&settings);
    // Alone first: what is wrong with it must not depend on what stands around it.
    if local::objects(text, &converter).is_err() {
        return;
    }
    // Behind the end of a document there may be directives, as at the beginning.
    let all = format!("{}\n...\n{text}", *AROUND);
    let Ok(objects) = local::objects(&all, &converter) else {
        panic!("good alone, and bad behind good ones");
    };
    let mesh = Mesh::build(Arc::clone(&settings), 1, &objects);
    let again = Mesh::build(Arc::clone(&settings), 2, &objects);

    for (uid, workload) in &mesh.workloads {
        isolated(&mesh, workload, &again.workloads[uid]);
        let Some(policy) = &workload.policy else {
            continue;
        };
        let twin = again.workloads[uid]
            .policy
            .as_ref()
            .expect("as local as before");
        assert_eq!(policy.describe(), twin.describe());
        let selected: Vec<u16> = policy.servers().map(|(port, _)| port).collect();
        for client in clients() {
            for port in PORTS.iter().chain(&selected) {
                let decision = policy.decide(&client, *port);
                assert_eq!(decision, twin.decide(&client, *port));
                assert_eq!(decision.authz.is_some(), decision.verdict.lets_in());
                if !selected.contains(port) {
                    assert_eq!(
                        decision.verdict.lets_in(),
                        default_lets_in(policy.default, &client),
                        "{} as {:?} on {port}",
                        policy.default.as_str(),
                        client
                    );
                    let audited = matches!(policy.default, DefaultPolicy::Audit);
                    assert_eq!(decision.verdict == Verdict::Audit, audited);
                }
            }
        }
    }
});

/// What NetworkPolicy promises, whatever its documents say.
fn isolated(mesh: &Mesh, pod: &Workload, twin: &Workload) {
    // A document may give the address to another node.
    let node_is_ours = mesh.node_of_address.get(&NODE) == Some(&mesh.settings.node);
    let known: Vec<Peer<'_>> = mesh
        .workloads
        .values()
        .flat_map(|peer| peer.ips.iter().map(move |ip| (*ip, &**peer)))
        .map(|(ip, peer)| Peer {
            ip,
            pod: Some(peer),
        })
        .collect();
    let addresses = clients().map(|client| Peer {
        ip: client.ip,
        pod: None,
    });
    for peer in known.iter().copied().chain(addresses) {
        for (way, port) in [Way::Ingress, Way::Egress]
            .into_iter()
            .flat_map(|way| PORTS.map(|port| (way, port)))
        {
            let verdict = network_policy::decide(pod, way, peer, port);
            let again = network_policy::decide(twin, way, peer, port);
            assert_eq!(verdict.allows(), again.allows());
            match verdict {
                NetworkVerdict::Unknown => assert!(pod.network.is_none()),
                NetworkVerdict::Deny(policies) => {
                    assert!(!policies.is_empty());
                    let itself = peer.pod.is_some_and(|peer| peer.uid == pod.uid);
                    let node = peer.ip == NODE && node_is_ours;
                    assert!(!itself && !node, "{} and {:?}", pod.key, peer.ip);
                }
                NetworkVerdict::NotIsolated
                | NetworkVerdict::Itself
                | NetworkVerdict::OwnNode
                | NetworkVerdict::Allow(..) => assert!(pod.network.is_some()),
            }
            // Rules can only allow: who is known by more is allowed no less.
            let less = Peer { pod: None, ..peer };
            if network_policy::decide(pod, way, less, port).allows() {
                assert!(verdict.allows(), "{} and {:?}", pod.key, peer.ip);
            }
        }
    }
}

fn clients() -> impl Iterator<Item = Client> {
    let proven = |uri: &str| {
        let identity = parse_spiffe_id(uri).expect("an identity");
        ClientIdentity::Proven(identity)
    };
    let identities = [
        ClientIdentity::None,
        proven("spiffe://cluster.local/ns/shop/sa/cart"),
        proven("spiffe://cluster.local/ns/strict/sa/bank"),
    ];
    let addresses: [IpAddr; 5] = [
        [10, 0, 1, 2].into(),
        [8, 8, 8, 8].into(),
        [0xfd00, 0, 0, 0, 0, 0, 0, 2].into(),
        // Another spelling of the first.
        [0, 0, 0, 0, 0, 0xffff, 0x0a00, 0x0102].into(),
        NODE,
    ];
    identities.into_iter().flat_map(move |identity| {
        addresses.map(|ip| Client {
            ip,
            pod: None,
            identity: identity.clone(),
        })
    })
}

/// What the six words promise.
fn default_lets_in(default: DefaultPolicy, client: &Client) -> bool {
    let proven = client.identity != ClientIdentity::None;
    // The private ranges.
    let inside = match client.ip.to_canonical() {
        IpAddr::V4(ip) => ip.is_private(),
        IpAddr::V6(ip) => ip.is_unique_local(),
    };
    match default {
        DefaultPolicy::AllUnauthenticated | DefaultPolicy::Audit => true,
        DefaultPolicy::AllAuthenticated => proven,
        DefaultPolicy::ClusterUnauthenticated => inside,
        DefaultPolicy::ClusterAuthenticated => proven && inside,
        DefaultPolicy::Deny => false,
    }
}

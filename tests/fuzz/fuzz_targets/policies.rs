//! Policy of any kind against a small mesh that stands: documents to decisions.
//!
//! Input: the documents of the policy; the mesh around them is fixed. For each pod, client and
//! port: the decision is the same when it is made again, says by what it was made, and for a port
//! that no Server selects follows the default alone, as a table says it here.
#![no_main]

use std::{
    net::IpAddr,
    sync::{Arc, LazyLock},
};

use libfuzzer_sys::fuzz_target;
use picomesh::{
    identity::parse_spiffe_id,
    k8s::Converter,
    local,
    state::{
        Mesh,
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

const PORTS: [u16; 6] = [1, 80, 4191, 8080, 15008, 65535];

fuzz_target!(|text: &str| {
    let settings = Arc::new(settings());
    let converter = Converter::new(&settings);
    // Alone first: what is wrong with it must not depend on what stands around it.
    if local::objects(text, &converter).is_err() {
        return;
    }
    let all = format!("{}\n---\n{text}", *AROUND);
    let Ok(objects) = local::objects(&all, &converter) else {
        panic!("good alone, and bad behind good ones");
    };
    let mesh = Mesh::build(Arc::clone(&settings), 1, &objects);
    let again = Mesh::build(Arc::clone(&settings), 2, &objects);

    for (uid, workload) in &mesh.workloads {
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
    let addresses: [IpAddr; 4] = [
        [10, 0, 1, 2].into(),
        [8, 8, 8, 8].into(),
        [0xfd00, 0, 0, 0, 0, 0, 0, 2].into(),
        // Another spelling of the first.
        [0, 0, 0, 0, 0, 0xffff, 0x0a00, 0x0102].into(),
    ];
    identities.into_iter().flat_map(move |identity| {
        addresses.map(|ip| Client {
            ip,
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

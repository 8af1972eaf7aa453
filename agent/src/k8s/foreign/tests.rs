use serde_json::{Value, json};

use super::*;
use crate::testing::manifests;

fn seen(namespace: &str, rest: Value) -> Seen {
    let mut object = rest;
    object["metadata"] = json!({"name": "p", "namespace": namespace});
    serde_json::from_str(&object.to_string()).unwrap()
}

/// Which of the pods `shop/web`, `shop/db` and `bank/web` it keeps outside.
fn selected(kind: ForeignKind, policy: &Seen) -> Vec<String> {
    let objects = manifests::objects(
        "
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {team: red}}
---
apiVersion: v1
kind: Namespace
metadata: {name: bank, labels: {team: blue}}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web}}
spec: {nodeName: n1, serviceAccountName: seller}
---
apiVersion: v1
kind: Pod
metadata: {name: db, namespace: shop, labels: {app: db}}
spec: {nodeName: n1}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: bank, labels: {app: web}}
spec: {nodeName: n1}
",
    );
    let mut foreign = Foreign::default();
    assert!(foreign.apply(kind, policy));
    assert!(!foreign.apply(kind, policy), "the same again");
    let mut names: Vec<_> = objects
        .pods
        .values()
        .filter(|pod| {
            let mut namespaces = objects.namespaces.values();
            let own = namespaces.find(|namespace| namespace.key.name == pod.key.namespace);
            foreign.selecting(pod, own.map(|own| &own.labels)).is_some()
        })
        .map(|pod| pod.key.to_string())
        .collect();
    names.sort();
    names
}

const EVERYBODY: [&str; 3] = ["bank/web", "shop/db", "shop/web"];

#[test]
fn calicos_policies_select_by_expression_within_their_namespace() {
    let policy = |namespace, spec: Value| seen(namespace, json!({"spec": spec}));
    let own = |spec| selected(ForeignKind::StoredCalico, &policy("shop", spec));
    assert_eq!(own(json!({"selector": "app == 'web'"})), ["shop/web"]);
    assert_eq!(own(json!({"selector": "all()"})), ["shop/db", "shop/web"]);
    assert_eq!(own(json!({})), ["shop/db", "shop/web"]);
    assert_eq!(
        own(json!({"selector": "app =~ 'web'"})),
        ["shop/db", "shop/web"],
        "unreadable"
    );
    let accounts = "projectcalico.org/serviceaccount == 'seller'";
    assert_eq!(own(json!({"selector": accounts})), ["shop/web"]);
    // What labels an account has is not known.
    assert_eq!(
        own(json!({"selector": "pcsa.x == 'y' && app == 'db'"})),
        ["shop/db"]
    );

    let global = |spec| selected(ForeignKind::CalicoGlobal, &policy("", spec));
    assert_eq!(
        global(json!({"selector": "app == 'web'"})),
        ["bank/web", "shop/web"]
    );
    assert_eq!(
        global(json!({"namespaceSelector": "team == 'blue'"})),
        ["bank/web"]
    );
    assert_eq!(
        global(json!({"namespaceSelector": "global()"})),
        [] as [&str; 0]
    );
    assert_eq!(
        global(json!({"selector": "has(host-endpoint)"})),
        [] as [&str; 0]
    );
    assert_eq!(
        global(json!({"namespaceSelector": "projectcalico.org/name == 'bank'"})),
        ["bank/web"]
    );
    assert_eq!(global(json!({"selector": 7})), EVERYBODY, "malformed");
}

#[test]
fn ciliums_policies_select_by_labels_with_a_source() {
    let spec = |spec| json!({"spec": {"endpointSelector": spec}});
    let own = |policy| selected(ForeignKind::Cilium, &seen("shop", policy));
    assert_eq!(
        own(spec(json!({"matchLabels": {"k8s:app": "web"}}))),
        ["shop/web"]
    );
    assert_eq!(
        own(spec(json!({"matchLabels": {"any:app": "db"}}))),
        ["shop/db"]
    );
    assert_eq!(own(spec(json!({}))), ["shop/db", "shop/web"]);
    let two = json!({"specs": [
        {"endpointSelector": {"matchLabels": {"app": "web"}}},
        {"endpointSelector": {"matchLabels": {"app": "db"}}},
    ]});
    assert_eq!(own(two), ["shop/db", "shop/web"]);

    let wide = |policy| selected(ForeignKind::CiliumClusterwide, &seen("", policy));
    let place = json!({"matchLabels": {"k8s:io.kubernetes.pod.namespace": "bank"}});
    assert_eq!(wide(spec(place)), ["bank/web"]);
    let team = json!({"matchLabels": {"io.cilium.k8s.namespace.labels.team": "red"}});
    assert_eq!(wide(spec(team)), ["shop/db", "shop/web"]);
    let ingress = json!({"matchExpressions": [{"key": "reserved:ingress", "operator": "Exists"}]});
    assert_eq!(wide(spec(ingress)), [] as [&str; 0]);
    let host = json!({"spec": {"nodeSelector": {"matchLabels": {"x": "y"}}}});
    assert_eq!(wide(host), [] as [&str; 0], "the host's firewall");
}

#[test]
fn the_admins_policies_select_namespaces_or_pods_in_them() {
    let of = |subject| seen("", json!({"spec": {"priority": 1, "subject": subject}}));
    let admin = |subject| selected(ForeignKind::Admin, &of(subject));
    let red = json!({"matchLabels": {"team": "red"}});
    assert_eq!(admin(json!({"namespaces": red})), ["shop/db", "shop/web"]);
    let named = json!({"matchLabels": {"kubernetes.io/metadata.name": "bank"}});
    assert_eq!(admin(json!({"namespaces": named})), ["bank/web"]);
    let pods = json!({"pods": {
        "namespaceSelector": {},
        "podSelector": {"matchExpressions": [{"key": "app", "operator": "NotIn", "values": ["db"]}]},
    }});
    assert_eq!(admin(pods), ["bank/web", "shop/web"]);
    assert_eq!(admin(json!({"somethingNew": {}})), EVERYBODY);
}

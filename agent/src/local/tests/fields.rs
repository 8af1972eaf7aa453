//! What nobody knows of an object: refused where it decides something, passed over elsewhere.

use super::*;
use crate::testing::manifests::pod;

/// A misspelt `from` would let everybody in.
#[test]
fn an_unknown_field_of_a_network_policy_is_an_error_and_the_last_good_one_stays() {
    const POLICY: &str = "\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web, namespace: shop}
spec:
  podSelector:
    matchLabels: {app: web}
  ingress:
  - from:
    - podSelector: {}
    ports:
    - port: 80
status: {}
";
    let mut world = World::new();
    world.write("a.yaml", POLICY);
    let snapshot = world.read();
    assert_eq!(world.errors(&snapshot), [""; 0]);
    assert_eq!(snapshot.objects.network_policies.len(), 1);
    // The rules alone tell whether it is still the good one.
    let rules = |snapshot: &Snapshot| {
        let policies = snapshot.objects.network_policies.values();
        let rules = policies.flat_map(|policy| policy.ingress.iter().flatten());
        rules
            .map(|rule| (rule.peers.clone(), rule.ports.clone()))
            .collect::<Vec<_>>()
    };
    let good = rules(&snapshot);
    assert_eq!(good.len(), 1);

    let rows = [
        (
            ("- from:", "- form:"),
            "a.yaml:8: NetworkPolicy shop/web: spec.ingress[0].form: \"form\" is no field here; \
             correct its spelling or leave it out; the fields are from, ports",
        ),
        (
            ("    - podSelector", "    - podselector"),
            "a.yaml:9: NetworkPolicy shop/web: spec.ingress[0].from[0].podselector: \"podselector\" \
             is no field here; correct its spelling or leave it out; the fields are podSelector, \
             namespaceSelector, ipBlock",
        ),
        (
            ("    matchLabels", "    labels"),
            "a.yaml:6: NetworkPolicy shop/web: spec.podSelector.labels: \"labels\" is no field here; \
             correct its spelling or leave it out; the fields are matchLabels, matchExpressions",
        ),
        (
            ("  podSelector:\n", "  egres: null\n  podSelector:\n"),
            "a.yaml:5: NetworkPolicy shop/web: spec.egres: \"egres\" is no field here; correct its \
             spelling or leave it out; the fields are podSelector, policyTypes, ingress, egress",
        ),
        (
            ("spec:", "Spec: {}\nspec:"),
            "a.yaml:4: NetworkPolicy shop/web: Spec: \"Spec\" is no field here; correct its spelling \
             or leave it out; the fields are apiVersion, kind, metadata, spec",
        ),
    ];
    for ((right, wrong), wanted) in rows {
        world.write("a.yaml", &POLICY.replace(right, wrong));
        let snapshot = world.read();
        assert_eq!(world.errors(&snapshot), [wanted]);
        assert_eq!(rules(&snapshot), good, "{wrong}");
    }
}

/// Kinds that decide nothing may have what a newer Kubernetes has.
#[test]
fn an_unknown_field_of_another_kind_of_kubernetes_is_passed_over() {
    let mut world = World::new();
    let text = pod("shop/a", "n1", &["10.1.0.1"], "");
    world.write("a.yaml", &text.replace("spec:", "novelty: 1, spec:"));
    let snapshot = world.read();
    assert_eq!(world.errors(&snapshot), [""; 0]);
    assert_eq!(names(&snapshot.objects), ["shop/a"]);
}

#[test]
fn an_item_of_a_list_is_read_as_if_it_stood_alone() {
    let mut world = World::new();
    world.write(
        "list.yaml",
        "apiVersion: v1
kind: List
items:
- apiVersion: v1
  kind: Pod
  metadata: {name: a}
  spec: {nodeName: n1, containers: [{name: c, resources: {limits: {cpu: 1}}}]}
- {apiVersion: v1, kind: Namespace, metadata: {name: shop}}
---
apiVersion: v1
kind: PodList
metadata: {resourceVersion: \"1\"}
items:
- metadata: {name: b}
  spec: {nodeName: n1, containers: []}
",
    );
    let snapshot = world.read();
    assert_eq!(world.errors(&snapshot), [""; 0]);
    assert_eq!(
        (
            snapshot.objects.pods.len(),
            snapshot.objects.namespaces.len()
        ),
        (2, 1)
    );

    world.write(
        "list.yaml",
        "kind: List\napiVersion: v1\nitems:\n- {apiVersion: v1, kind: Namespace, metadata: {name: \
         shop}}\n- apiVersion: v1\n  kind: Pod\n  metadata: {name: a}\n",
    );
    let snapshot = world.read();
    assert_eq!(
        world.errors(&snapshot),
        [
            "list.yaml:5: Pod a: spec.nodeName: \"\" is missing; name the node that runs the pod: \
          nothing schedules it here"
        ]
    );
}

//! What counts for a policy that does not read and never did: it lets nobody through, wherever it
//! may select. Nothing in its place would be no protection at all, and the API server has accepted
//! it.
//!
//! What of it does read is believed: a selector, the directions, a Server's port. Whoever a policy
//! of its own lets in at such a Server is still let in.

use k8s_openapi::{
    api::networking::v1 as networking,
    apimachinery::pkg::{apis::meta::v1::ObjectMeta, util::intstr::IntOrString},
};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{
    Converter, Seen, convert,
    network_policy::policy_types,
    policy::{self, SelectorSpec},
};
use crate::state::{
    ObjectKey,
    objects::{DefaultPolicy, NetworkPolicy, ProxyProtocol, Selector, Server},
};

/// Both directions, unless it says which.
pub(super) fn network_policy(converter: &Converter, seen: &Seen) -> Option<NetworkPolicy> {
    let parsed = seen.parse::<networking::NetworkPolicy>().ok();
    let spec = parsed.and_then(|policy| policy.spec);
    let types = spec.as_ref().and_then(|spec| {
        let rules = spec.egress.as_ref().is_some_and(|rules| !rules.is_empty());
        policy_types(spec.policy_types.clone(), rules).ok()
    });
    let selector = spec.and_then(|spec| selected(SelectorSpec::from(spec.pod_selector?)));
    Some(NetworkPolicy {
        key: key(converter, seen)?,
        pod_selector: selector.unwrap_or_default(),
        ingress: types.as_ref().is_none_or(|on| on.ingress).then(Vec::new),
        egress: types.as_ref().is_none_or(|on| on.egress).then(Vec::new),
    })
}

/// `None` where it can select nothing: a port that does not read is none that a pod could have.
pub(super) fn server(converter: &Converter, seen: &Seen) -> Option<Server> {
    let written: Value = seen.parse().ok()?;
    let spec = &written["spec"];
    let port: IntOrString = read(&spec["port"])?;
    let pods = &spec["podSelector"];
    if pods.is_null() && !spec["externalWorkloadSelector"].is_null() {
        return None;
    }
    Some(Server {
        key: key(converter, seen)?,
        labels: convert::labels(read(&written["metadata"]["labels"])),
        pod_selector: read(pods).and_then(selected).unwrap_or_default(),
        port: convert::target_port("spec.port", &port).ok()?,
        proxy_protocol: ProxyProtocol::Unknown,
        access_policy: DefaultPolicy::Deny,
    })
}

fn read<T: DeserializeOwned>(value: &Value) -> Option<T> {
    T::deserialize(value).ok()
}

fn selected(written: SelectorSpec) -> Option<Selector> {
    policy::selector("podSelector", written).ok()
}

fn key(converter: &Converter, seen: &Seen) -> Option<ObjectKey> {
    let metadata = ObjectMeta {
        name: Some(seen.name().to_owned()),
        namespace: Some(seen.namespace().to_owned()),
        ..ObjectMeta::default()
    };
    converter.key(&metadata).ok()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::testing::manifests::settings;

    fn seen(spec: Value) -> Seen {
        let metadata = json!({"name": "p", "namespace": "shop", "labels": {"a": "b"}});
        serde_json::from_value(json!({"metadata": metadata, "spec": spec})).unwrap()
    }

    fn converter() -> Converter {
        Converter::new(&settings())
    }

    fn labels(selector: &Selector) -> Vec<&str> {
        selector.match_labels.keys().map(|key| &**key).collect()
    }

    #[test]
    fn a_network_policy_lets_nobody_through_where_it_selects() {
        let bad = json!([{"from": [{"ipBlock": {"cidr": "nowhere"}}]}]);
        let web = json!({"matchLabels": {"app": "web"}});
        for (spec, selects, directions) in [
            (
                json!({"podSelector": web, "ingress": bad}),
                vec!["app"],
                (true, false),
            ),
            (
                json!({"podSelector": web, "policyTypes": ["Egress"], "egress": [{"to": [{}]}]}),
                vec!["app"],
                (false, true),
            ),
            (
                json!({"podSelector": web, "policyTypes": ["Sideways"]}),
                vec!["app"],
                (true, true),
            ),
            (
                json!({"podSelector": {"matchExpressions": [{"key": "x", "operator": "?"}]}}),
                vec![],
                (true, false),
            ),
            (json!(7), vec![], (true, true)),
        ] {
            let policy = network_policy(&converter(), &seen(spec.clone())).unwrap();
            assert_eq!(policy.key.to_string(), "shop/p");
            assert_eq!(labels(&policy.pod_selector), selects, "{spec}");
            let (ingress, egress) = directions;
            let closed = |on: bool| on.then(Vec::new);
            assert_eq!(policy.ingress, closed(ingress), "{spec}");
            assert_eq!(policy.egress, closed(egress), "{spec}");
        }
    }

    #[test]
    fn a_server_lets_nobody_in_at_the_port_that_it_names() {
        let web = json!({"matchLabels": {"app": "web"}});
        let of = |spec| server(&converter(), &seen(spec));
        let closed = of(json!({"podSelector": web, "port": 80, "accessPolicy": "ask"})).unwrap();
        assert_eq!(closed.access_policy, DefaultPolicy::Deny);
        assert_eq!(labels(&closed.pod_selector), ["app"]);
        assert_eq!(closed.labels.len(), 1, "authorizations may select it");
        let all = of(json!({"podSelector": 7, "port": "http"})).unwrap();
        assert_eq!(all.pod_selector, Selector::default());
        for selects_nothing in [
            json!({"podSelector": web, "port": 0}),
            json!({"podSelector": web}),
            json!(7),
            json!({"externalWorkloadSelector": {}, "port": 80}),
        ] {
            assert_eq!(of(selects_nothing.clone()), None, "{selects_nothing}");
        }
    }
}

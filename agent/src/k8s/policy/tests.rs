//! The policy kinds: what is read, and what is refused with the right spelling.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use super::*;
use crate::{
    local,
    state::objects::{Objects, TargetPort},
    testing::manifests::{objects, settings},
};

fn text(version: &str, kind: &str, spec: &str) -> String {
    format!(
        "{{apiVersion: policy.linkerd.io/{version}, kind: {kind}, metadata: {{name: x, namespace: \
         shop}}, spec: {{{spec}}}}}"
    )
}

fn read(version: &str, kind: &str, spec: &str) -> Objects {
    objects(&text(version, kind, spec))
}

fn refused(version: &str, kind: &str, spec: &str) -> String {
    let error = local::objects(&text(version, kind, spec), &Converter::new(&settings()));
    error
        .err()
        .unwrap_or_else(|| panic!("{kind} {version} {spec} was read"))
        .message
}

fn server(version: &str, spec: &str) -> Server {
    (**read(version, "Server", spec)
        .servers
        .values()
        .next()
        .unwrap())
    .clone()
}

#[test]
fn a_server_is_read_in_its_three_versions() {
    for version in ["v1beta1", "v1beta2", "v1beta3"] {
        let server = server(
            version,
            "podSelector: {matchLabels: {app: web}}, port: 8080",
        );
        assert_eq!(server.port, TargetPort::Number(8080));
        assert_eq!(server.access_policy, DefaultPolicy::Deny);
        assert_eq!(server.proxy_protocol, ProxyProtocol::Unknown);
    }
    for (word, protocol) in [
        ("unknown", ProxyProtocol::Unknown),
        ("HTTP/1", ProxyProtocol::Http1),
        ("HTTP/2", ProxyProtocol::Http2),
        ("gRPC", ProxyProtocol::Grpc),
        ("opaque", ProxyProtocol::Opaque),
        ("TLS", ProxyProtocol::Tls),
    ] {
        let spec = format!("podSelector: {{}}, port: http, proxyProtocol: {word}");
        let server = server("v1beta1", &spec);
        assert_eq!(
            (server.proxy_protocol, server.port),
            (protocol, TargetPort::Name("http".into()))
        );
    }
    for policy in DefaultPolicy::ALL {
        let spec = format!(
            "podSelector: {{}}, port: 1, accessPolicy: {}",
            policy.as_str()
        );
        assert_eq!(server("v1beta3", &spec).access_policy, policy);
    }
}

#[test]
fn a_status_that_a_controller_wrote_does_no_harm() {
    let text = text("v1beta3", "Server", "podSelector: {}, port: 80");
    let text = format!(
        "{}, status: {{conditions: [{{type: Accepted}}]}}}}",
        &text[..text.len() - 1]
    );
    assert_eq!(objects(&text).servers.len(), 1);
}

#[test]
fn what_guides_got_wrong_is_refused_with_the_right_spelling() {
    let ok = "podSelector: {}, port: 80";
    let rows = [
        (
            "v1alpha1",
            "Server",
            ok,
            "apiVersion: ",
            "write policy.linkerd.io/v1beta3",
        ),
        (
            "v1beta3",
            "Server",
            "podSelector: {}, port: 1-65535",
            "spec.port: \"1-65535\"",
            "write one number",
        ),
        (
            "v1beta3",
            "Server",
            "podSelector: {}, port: \"80\"",
            "spec.port: \"80\"",
            "without quotes",
        ),
        (
            "v1beta3",
            "Server",
            "podSelector: {}, port: 0",
            "spec.port: \"0\"",
            "1 to 65535",
        ),
        (
            "v1beta3",
            "Server",
            "podSelector: {}",
            "spec.port: \"\" is missing",
            "number or name",
        ),
        (
            "v1beta3",
            "Server",
            "port: 80",
            "spec.podSelector: \"\" is missing",
            "write {}",
        ),
        (
            "v1beta3",
            "Server",
            "podSelector: {}, port: 80, protocol: HTTP",
            "spec.protocol: \"HTTP\"",
            "write proxyProtocol",
        ),
        (
            "v1beta3",
            "Server",
            "podSelector: {}, port: 80, proxyProtocol: HTTP",
            "spec.proxyProtocol: \"HTTP\"",
            "write HTTP/1",
        ),
        (
            "v1beta3",
            "Server",
            "podSelector: {}, port: 80, proxyProtocol: h2",
            "spec.proxyProtocol: \"h2\"",
            "write HTTP/2",
        ),
        (
            "v1beta3",
            "Server",
            "podSelector: {}, port: 80, proxyProtocol: TCP",
            "spec.proxyProtocol: \"TCP\"",
            "write opaque",
        ),
        (
            "v1beta3",
            "Server",
            "podSelector: {}, port: 80, accessPolicy: allow",
            "spec.accessPolicy: \"allow\"",
            "all-unauthenticated",
        ),
        (
            "v1beta2",
            "Server",
            "podSelector: {}, port: 80, accessPolicy: deny",
            "spec.accessPolicy: \"deny\" is no field of policy.linkerd.io/v1beta2",
            "v1beta3",
        ),
        (
            "v1beta3",
            "Server",
            "externalWorkloadSelector: {}, port: 80",
            "spec.externalWorkloadSelector",
            "write podSelector",
        ),
        (
            "v1beta3",
            "Server",
            "podSelector: {matchExpressions: [{key: a, operator: in, values: [b]}]}, port: 80",
            "spec.podSelector.matchExpressions[0].operator: \"in\"",
            "write In,",
        ),
        (
            "v1beta3",
            "Server",
            "podSelector: {matchExpressions: [{key: a, operator: In}]}, port: 80",
            "spec.podSelector.matchExpressions[0].values",
            "at least one",
        ),
        (
            "v1beta3",
            "Server",
            "podSelector: {matchExpressions: [{key: a, operator: NotIn, values: []}]}, port: 80",
            "spec.podSelector.matchExpressions[0].values",
            "at least one",
        ),
        (
            "v1beta3",
            "Server",
            "podSelector: {matchExpressions: [{key: a, operator: Exists, values: [b]}]}, port: 80",
            "spec.podSelector.matchExpressions[0].values: \"b\"",
            "leave them out",
        ),
        (
            "v1beta1",
            "AuthorizationPolicy",
            "rules: []",
            "apiVersion: ",
            "write policy.linkerd.io/v1alpha1; it has no rules",
        ),
        (
            "v1alpha1",
            "AuthorizationPolicy",
            "rules: [{from: [{principalName: a}]}]",
            "spec.rules: ",
            "requiredAuthenticationRefs",
        ),
        (
            "v1alpha1",
            "AuthorizationPolicy",
            "requiredAuthenticationRefs: []",
            "spec.targetRef: ",
            "name a Server",
        ),
        (
            "v1alpha1",
            "AuthorizationPolicy",
            "targetRef: {group: policy.linkerd.io, kind: Server, name: x}",
            "spec.requiredAuthenticationRefs: ",
            "write [] to allow anybody",
        ),
        (
            "v1alpha1",
            "AuthorizationPolicy",
            "targetRef: {kind: Namespace, name: bank}, requiredAuthenticationRefs: []",
            "spec.targetRef.name: \"bank\"",
            "only target shop",
        ),
        (
            "v1alpha1",
            "AuthorizationPolicy",
            "targetRef: {group: apps, kind: Deployment, name: x}, requiredAuthenticationRefs: []",
            "spec.targetRef: \"apps/Deployment\"",
            "kind: Server",
        ),
        (
            "v1alpha1",
            "AuthorizationPolicy",
            "targetRef: {group: policy.linkerd.io, kind: Server, name: x, namespace: bank}, requiredAuthenticationRefs: []",
            "spec.targetRef.namespace: \"bank\"",
            "namespace of its target",
        ),
        (
            "v1alpha1",
            "AuthorizationPolicy",
            "targetRef: {group: policy.linkerd.io, kind: Server, name: x}, requiredAuthenticationRefs: [{kind: MeshTLSAuthentication, name: y}]",
            "spec.requiredAuthenticationRefs[0]: \"/MeshTLSAuthentication\"",
            "group: policy.linkerd.io",
        ),
        (
            "v1alpha1",
            "MeshTLSAuthentication",
            "identities: []",
            "spec.identities: ",
            "at least one",
        ),
        (
            "v1alpha1",
            "MeshTLSAuthentication",
            "identities: [\"web*\"]",
            "spec.identities[0]: \"web*\"",
            "spiffe://",
        ),
        (
            "v1alpha1",
            "MeshTLSAuthentication",
            "identities: [\"*web\"]",
            "spec.identities[0]: \"*web\"",
            "spiffe://",
        ),
        (
            "v1alpha1",
            "MeshTLSAuthentication",
            "identities: [\"spiffe://td/*\"]",
            "spec.identities[0]",
            "spiffe://",
        ),
        (
            "v1alpha1",
            "MeshTLSAuthentication",
            "identities: [\"spiffe://td/ns/*/sa/*\"]",
            "spec.identities[0]",
            "spiffe://",
        ),
        (
            "v1alpha1",
            "MeshTLSAuthentication",
            "identityRefs: [{kind: Pod, name: a}]",
            "spec.identityRefs[0]: \"/Pod\"",
            "ServiceAccount or Namespace",
        ),
        (
            "v1alpha1",
            "NetworkAuthentication",
            "networks: []",
            "spec.networks: ",
            "at least one",
        ),
        (
            "v1alpha1",
            "NetworkAuthentication",
            "networks: [{cidr: 10.0.0.0/33}]",
            "spec.networks[0].cidr: \"10.0.0.0/33\"",
            "10.0.0.0/8",
        ),
        (
            "v1alpha1",
            "NetworkAuthentication",
            "networks: [{cidr: 10.0.0.0/8, except: [x]}]",
            "spec.networks[0].except[0]: \"x\"",
            "10.0.0.0/8",
        ),
        (
            "v1beta1",
            "ServerAuthorization",
            "server: {name: x}, client: {networks: [], unauthenticated: true}",
            "spec.client.networks: \"[]\"",
            "Server without authorization denies",
        ),
        (
            "v1beta1",
            "ServerAuthorization",
            "server: {name: x}, client: {}",
            "spec.client: ",
            "write meshTLS",
        ),
        (
            "v1beta1",
            "ServerAuthorization",
            "server: {name: x}, client: {meshTLS: {}}",
            "spec.client.meshTLS: ",
            "at least one",
        ),
        (
            "v1beta1",
            "ServerAuthorization",
            "server: {name: x}, client: {unauthenticated: true, meshTLS: {}}",
            "spec.client.unauthenticated",
            "one of the two",
        ),
        (
            "v1beta1",
            "ServerAuthorization",
            "server: {name: x}, client: {meshTLS: {unauthenticatedTLS: true, identities: [\"*\"]}}",
            "spec.client.meshTLS.unauthenticatedTLS",
            "one of them",
        ),
        (
            "v1beta1",
            "ServerAuthorization",
            "server: {name: x}, client: {meshTLS: {serviceAccounts: [{name: A}]}}",
            "spec.client.meshTLS.serviceAccounts[0]: \"shop/A\"",
            "service account",
        ),
        (
            "v1beta1",
            "ServerAuthorization",
            "server: {}, client: {unauthenticated: true}",
            "spec.server: ",
            "name or selector",
        ),
        (
            "v1beta1",
            "ServerAuthorization",
            "server: {name: x, selector: {}}, client: {unauthenticated: true}",
            "spec.server.name",
            "not both",
        ),
        (
            "v1beta1",
            "NetworkPolicy",
            "",
            "kind: \"NetworkPolicy\"",
            "networking.k8s.io/v1",
        ),
        (
            "v1beta1",
            "RetryPolicy",
            "",
            "kind: \"RetryPolicy\"",
            "retry.linkerd.io/http",
        ),
        (
            "v1alpha1",
            "BackendPolicy",
            "",
            "kind: \"BackendPolicy\"",
            "HTTPLocalRateLimitPolicy",
        ),
        (
            "v1alpha1",
            "TrafficSplit",
            "",
            "kind: \"TrafficSplit\"",
            "split.smi-spec.io",
        ),
        (
            "v1beta3",
            "HttpRoute",
            "",
            "kind: \"HttpRoute\"",
            "write HTTPRoute",
        ),
        (
            "v1beta3",
            "Servers",
            "",
            "kind: \"Servers\"",
            "the kinds are Server, ",
        ),
    ];
    for (version, kind, spec, start, remedy) in rows {
        let message = refused(version, kind, spec);
        assert!(
            message.starts_with(start),
            "{kind} {spec}:\n{message}\nshould start with {start}"
        );
        let told = message.split_once("; ").map_or("", |(_, told)| told);
        assert!(
            told.contains(remedy),
            "{kind} {spec}:\n{message}\nshould tell {remedy}"
        );
    }
}

#[test]
fn a_field_that_a_kind_does_not_have_is_an_error_with_its_name() {
    let rows = [
        (
            "v1beta3",
            "Server",
            "podSelector: {}, port: 80, ports: [81]",
            "ports",
        ),
        (
            "v1beta3",
            "Server",
            "podSelector: {matchLables: {a: b}}, port: 80",
            "matchLables",
        ),
        (
            "v1beta1",
            "ServerAuthorization",
            "server: {name: x}, client: {meshTls: {}}",
            "meshTls",
        ),
        (
            "v1beta1",
            "ServerAuthorization",
            "server: {name: x}, client: {unauthenticated: true}, ports: []",
            "ports",
        ),
        (
            "v1alpha1",
            "AuthorizationPolicy",
            "targetRef: {kind: Namespace, name: shop, port: 1}, requiredAuthenticationRefs: []",
            "port",
        ),
        (
            "v1alpha1",
            "MeshTLSAuthentication",
            "identity: [a]",
            "identity",
        ),
        (
            "v1alpha1",
            "NetworkAuthentication",
            "networks: [{cidr: 10.0.0.0/8, excepts: []}]",
            "excepts",
        ),
    ];
    for (version, kind, spec, field) in rows {
        let message = refused(version, kind, spec);
        assert!(
            message.starts_with(&format!("unknown field `{field}`")),
            "{kind} {spec}: {message}"
        );
    }
}

#[test]
fn real_kinds_without_bearing_on_connections_are_left_aside() {
    for kind in IGNORED {
        assert_eq!(known(kind, "v1beta3"), Ok(Known::Ignored));
    }
}

#[test]
fn a_single_address_is_a_network() {
    let objects = read(
        "v1alpha1",
        "NetworkAuthentication",
        "networks: [{cidr: 10.0.0.1}, {cidr: \"fd00::1\"}]",
    );
    let found = objects.network_authentications.values().next().unwrap();
    let cidrs: Vec<_> = found
        .networks
        .iter()
        .map(|network| network.cidr.to_string())
        .collect();
    assert_eq!(cidrs, ["10.0.0.1/32", "fd00::1/128"]);
}

//! Kubernetes' own kinds, field by field.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use serde::de::DeserializeOwned;

use super::*;
use crate::testing::manifests::settings;

fn read<T: DeserializeOwned>(text: &str) -> T {
    serde_saphyr::from_str(text).unwrap()
}

fn converter() -> Converter {
    Converter::new(&settings())
}

fn pod(metadata: &str, spec: &str, status: &str) -> Result<Pod, FieldError> {
    converter().pod(read(&format!(
        "{{metadata: {{name: a, uid: u, {metadata}}}, spec: {{containers: [], {spec}}}, status: \
         {{{status}}}}}"
    )))
}

fn service(spec: &str, status: &str) -> Result<Service, FieldError> {
    converter().service(read(&format!(
        "{{metadata: {{name: s}}, spec: {{{spec}}}, status: {{{status}}}}}"
    )))
}

fn ips(texts: &[&str]) -> Vec<IpAddr> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

#[test]
fn a_pod_keeps_what_the_mesh_asks_of_it() {
    let pod = pod(
        "namespace: shop, labels: {app: web}, deletionTimestamp: \"2026-01-01T00:00:00Z\"",
        "nodeName: n1, serviceAccountName: cart, hostNetwork: true",
        "phase: Running, podIP: 10.1.0.1, podIPs: [{ip: 10.1.0.1}, {ip: \"fd00::1\"}], \
         conditions: [{type: Ready, status: \"True\"}]",
    )
    .unwrap();
    assert_eq!(pod.key.to_string(), "shop/a");
    assert_eq!((&*pod.uid, pod.node.as_deref()), ("u", Some("n1")));
    assert_eq!(pod.ips, ips(&["10.1.0.1", "fd00::1"]));
    assert_eq!(&*pod.service_account, "cart");
    assert_eq!(pod.labels.get("app").map(|value| &**value), Some("web"));
    assert!(pod.host_network && pod.ready && pod.terminating && !pod.terminal);
}

#[test]
fn what_a_pod_leaves_out_has_kubernetes_defaults() {
    let pod = pod("", "", "").unwrap();
    assert_eq!(pod.key.to_string(), "default/a");
    assert_eq!((pod.node, pod.owner, pod.mirror_of), (None, None, None));
    assert!(!pod.host_network && !pod.ready && !pod.terminating && !pod.terminal);
}

#[test]
fn a_mirror_is_known_as_one_and_nobody_is_given_an_account() {
    let mirror = "annotations: {kubernetes.io/config.mirror: 5e1f}";
    let mirror = pod(mirror, "serviceAccountName: \"\"", "").unwrap();
    assert_eq!(mirror.mirror_of.as_deref(), Some("5e1f"));
    assert_eq!(&*mirror.service_account, "");
    assert_eq!(&*pod("", "", "").unwrap().service_account, "");
    let error = pod("", "serviceAccountName: we'b", "").unwrap_err();
    assert!(
        error.to_string().contains("spec.serviceAccountName"),
        "{error}"
    );
}

#[test]
fn a_pod_is_terminal_when_its_phase_says_so_and_ready_when_its_condition_does() {
    let rows = [
        ("phase: Succeeded", true, false),
        ("phase: Failed", true, false),
        ("phase: Pending", false, false),
        ("phase: Running", false, false),
        (
            "conditions: [{type: Ready, status: \"False\"}]",
            false,
            false,
        ),
        ("conditions: [{type: Ready, status: Unknown}]", false, false),
        (
            "conditions: [{type: Initialized, status: \"True\"}]",
            false,
            false,
        ),
        ("conditions: [{type: Ready, status: \"True\"}]", false, true),
    ];
    for (status, terminal, ready) in rows {
        let pod = pod("", "", status).unwrap();
        assert_eq!((pod.terminal, pod.ready), (terminal, ready), "{status}");
    }
}

#[test]
fn ports_are_those_of_containers_and_of_sidecars() {
    let pod = converter().pod(read(
        "{metadata: {name: a, uid: u}, spec: {initContainers: [{name: i, ports: [{containerPort: \
         1}]}, {name: s, restartPolicy: Always, ports: [{name: side, containerPort: 2}]}], \
         containers: [{name: c, ports: [{name: http, containerPort: 80, hostPort: 8080, hostIP: \
         192.168.0.1}, {containerPort: 53, protocol: UDP, hostPort: 0, hostIP: 0.0.0.0}]}]}}",
    ));
    let port =
        |name: Option<&str>, port, protocol, host_port, host_ip: Option<&str>| ContainerPort {
            name: name.map(Arc::from),
            port,
            protocol,
            host_port,
            host_ip: host_ip.map(|ip| ip.parse().unwrap()),
        };
    assert_eq!(
        pod.unwrap().ports,
        [
            port(
                Some("http"),
                80,
                Protocol::Tcp,
                Some(8080),
                Some("192.168.0.1")
            ),
            port(None, 53, Protocol::Udp, None, None),
            port(Some("side"), 2, Protocol::Tcp, None, None),
        ]
    );
}

#[test]
fn the_owner_of_a_replica_set_with_the_templates_hash_is_its_deployment() {
    let hash = "labels: {pod-template-hash: 7d9f}";
    let owner = |kind: &str, name: &str| {
        format!(
            "ownerReferences: [{{apiVersion: v1, kind: Other, name: other, uid: o}}, {{apiVersion: \
             v1, kind: {kind}, name: {name}, uid: x, controller: true}}]"
        )
    };
    let rows = [
        (
            format!("{hash}, {}", owner("ReplicaSet", "web-7d9f")),
            Some(("deployment", "web")),
        ),
        (
            format!("{hash}, {}", owner("ReplicaSet", "web-1111")),
            Some(("replicaset", "web-1111")),
        ),
        (
            format!("{hash}, {}", owner("ReplicaSet", "web7d9f")),
            Some(("replicaset", "web7d9f")),
        ),
        (
            owner("ReplicaSet", "web-7d9f"),
            Some(("replicaset", "web-7d9f")),
        ),
        (
            format!("{hash}, {}", owner("StatefulSet", "db-7d9f")),
            Some(("statefulset", "db-7d9f")),
        ),
        (owner("DaemonSet", "log"), Some(("daemonset", "log"))),
        (owner("Job", "once"), Some(("k8s_job", "once"))),
        (owner("Job", "once").replace("true", "false"), None),
        (String::new(), None),
    ];
    for (metadata, wanted) in rows {
        let owner = pod(&metadata, "", "").unwrap().owner;
        let got = owner.as_ref().map(|owner| (&*owner.kind, &*owner.name));
        assert_eq!(got, wanted, "{metadata}");
    }
}

#[test]
fn a_service_keeps_every_kind_of_address() {
    let service = service(
        "clusterIP: 10.96.0.1, clusterIPs: [10.96.0.1, \"fd00::1\"], externalIPs: [192.0.2.1], \
         publishNotReadyAddresses: true, internalTrafficPolicy: Local, externalTrafficPolicy: \
         Cluster, selector: {app: web}, ports: [{port: 80, targetPort: http, nodePort: 30080, \
         name: web, appProtocol: http}, {port: 81, targetPort: 8081, protocol: SCTP}, {port: 82, \
         nodePort: 0, name: \"\"}]",
        "loadBalancer: {ingress: [{ip: 192.0.2.9, ipMode: VIP}, {ip: 192.0.2.10, ipMode: Proxy}, \
         {hostname: lb}]}",
    )
    .unwrap();
    assert_eq!(service.cluster_ips, ips(&["10.96.0.1", "fd00::1"]));
    assert_eq!(service.external_ips, ips(&["192.0.2.1"]));
    assert_eq!(service.load_balancer_ips, ips(&["192.0.2.9"]));
    assert!(service.publish_not_ready && service.internal_traffic_local);
    assert!(!service.external_traffic_local);
    assert_eq!(service.selector.unwrap().len(), 1);
    let ports: Vec<_> = service
        .ports
        .iter()
        .map(|port| {
            (
                port.name.as_deref(),
                port.port,
                &port.target,
                port.protocol,
                port.node_port,
            )
        })
        .collect();
    assert_eq!(
        ports,
        [
            (
                Some("web"),
                80,
                &TargetPort::Name("http".into()),
                Protocol::Tcp,
                Some(30080)
            ),
            (None, 81, &TargetPort::Number(8081), Protocol::Sctp, None),
            (None, 82, &TargetPort::Number(82), Protocol::Tcp, None),
        ]
    );
    assert_eq!(service.ports[0].app_protocol.as_deref(), Some("http"));
}

#[test]
fn affinity_headless_and_external_names_are_read() {
    let affinity = |spec: &str| service(spec, "").unwrap().session_affinity;
    assert_eq!(affinity(""), None);
    assert_eq!(affinity("sessionAffinity: None"), None);
    assert_eq!(affinity("sessionAffinity: ClientIP"), Some(10_800));
    assert_eq!(
        affinity(
            "sessionAffinity: ClientIP, sessionAffinityConfig: {clientIP: {timeoutSeconds: 7}}"
        ),
        Some(7)
    );
    let headless = service("clusterIP: None, clusterIPs: [None], selector: {}", "").unwrap();
    assert!(headless.cluster_ips.is_empty() && headless.selector.is_none());
    let named = service("type: ExternalName, externalName: example.com", "").unwrap();
    assert_eq!(named.external_name.as_deref(), Some("example.com"));
    assert_eq!(
        service("externalName: example.com", "")
            .unwrap()
            .external_name,
        None
    );
}

fn slice(text: &str) -> Result<Option<EndpointSlice>, FieldError> {
    converter().endpoint_slice(read(&format!(
        "{{metadata: {{name: s-1, labels: {{kubernetes.io/service-name: s}}}}, {text}}}"
    )))
}

#[test]
fn a_slice_keeps_conditions_with_kubernetes_defaults() {
    let slice = slice(
        "addressType: IPv4, ports: [{name: \"\", port: 80}, {name: b, protocol: UDP}], endpoints: \
         [{addresses: [10.0.0.1], nodeName: n1, targetRef: {kind: Pod, uid: u}}, {addresses: \
         [10.0.0.2], conditions: {ready: false}, targetRef: {kind: Node, uid: n}}, {addresses: \
         [10.0.0.3], conditions: {ready: false, serving: true, terminating: true}}, {addresses: \
         [10.0.0.4], conditions: {ready: true, serving: false}, targetRef: {kind: Pod, uid: \"\"}}]",
    )
    .unwrap()
    .unwrap();
    assert_eq!(&*slice.service, "s");
    assert_eq!(
        slice.ports,
        [
            (None, Some(80), Protocol::Tcp),
            (Some("b".into()), None, Protocol::Udp)
        ]
    );
    let members: Vec<_> = slice
        .endpoints
        .iter()
        .map(|e| {
            (
                e.pod.as_deref(),
                e.node.as_deref(),
                e.ready,
                e.serving,
                e.terminating,
            )
        })
        .collect();
    assert_eq!(
        members,
        [
            (Some("u"), Some("n1"), true, true, false),
            (None, None, false, false, false),
            (None, None, false, true, true),
            (None, None, true, false, false),
        ]
    );
}

#[test]
fn slices_without_service_and_of_names_are_left_aside() {
    assert!(
        slice("addressType: FQDN, endpoints: [{addresses: [a.b]}]")
            .unwrap()
            .is_none()
    );
    let orphan = read("{metadata: {name: x}, addressType: IPv4, endpoints: []}");
    assert!(converter().endpoint_slice(orphan).unwrap().is_none());
    assert!(slice("addressType: IPv5, endpoints: []").is_err());
}

#[test]
fn a_nodes_addresses_are_those_that_are_addresses_the_internal_ones_first() {
    let node = converter()
        .node(read(
            "{metadata: {name: n1}, status: {addresses: [{type: Hostname, address: n1}, {type: \
             ExternalIP, address: 192.0.2.1}, {type: InternalIP, address: 192.168.0.1}, {type: \
             InternalIP, address: \"fd00::1\"}]}}",
        ))
        .unwrap();
    assert_eq!(node.key.to_string(), "n1");
    assert_eq!(
        node.addresses,
        ips(&["192.168.0.1", "fd00::1", "192.0.2.1"])
    );
    assert!(
        converter()
            .node(read("{metadata: {name: n1}}"))
            .unwrap()
            .addresses
            .is_empty()
    );
}

#[test]
fn every_wrong_value_is_named_with_field_and_remedy() {
    let error = |wrong: Option<FieldError>| wrong.unwrap().to_string();
    let rows = [
        (
            error(pod("", "", "podIP: ten").err()),
            "status.podIP: \"ten\" is not an IP address; write an IPv4 or IPv6 address",
        ),
        (
            error(pod("namespace: A", "", "").err()),
            "metadata.namespace: \"A\" is not a namespace's name; write lower-case letters, digits \
             and '-', at most 63",
        ),
        (
            error(service("ports: [{port: 80}, {port: 65536}]", "").err()),
            "spec.ports[1].port: \"65536\" is not a port; write a number from 1 to 65535",
        ),
        (
            error(service("ports: [{port: 80, targetPort: \"8080\"}]", "").err()),
            "spec.ports[0].targetPort: \"8080\" is not a port; write the number without quotes",
        ),
        (
            error(service("ports: [{port: 80, nodePort: -1}]", "").err()),
            "spec.ports[0].nodePort: \"-1\" is not a port; write a number from 1 to 65535",
        ),
        (
            error(service("ports: [{port: 80, protocol: tcp}]", "").err()),
            "spec.ports[0].protocol: \"tcp\" is not a protocol; write TCP, UDP or SCTP",
        ),
        (
            error(service("internalTrafficPolicy: local", "").err()),
            "spec.internalTrafficPolicy: \"local\" is not understood; write Cluster or Local",
        ),
        (
            error(service("sessionAffinity: Cookie", "").err()),
            "spec.sessionAffinity: \"Cookie\" is not understood; write None or ClientIP",
        ),
        (
            error(slice("addressType: IPv4, endpoints: [{addresses: [10.0.0.1, x]}]").err()),
            "endpoints[0].addresses[1]: \"x\" is not an IP address; write an IPv4 or IPv6 address",
        ),
    ];
    for (got, wanted) in rows {
        assert_eq!(got, wanted);
    }
    let nameless = converter().pod(read("{metadata: {uid: u}, spec: {containers: []}}"));
    assert_eq!(
        error(nameless.err()).split(':').next(),
        Some("metadata.name")
    );
    let no_uid = converter().pod(read("{metadata: {name: a}, spec: {containers: []}}"));
    assert_eq!(
        error(no_uid.err()),
        "metadata.uid: \"\" is missing; give the pod a uid"
    );
}

#[test]
fn port_names_follow_kubernetes() {
    for name in ["http", "a", "h2c-1", "abcdefghijklmno"] {
        assert!(is_port_name(name), "{name}");
    }
    for name in [
        "",
        "80",
        "1-2",
        "-a",
        "a-",
        "a--b",
        "Http",
        "abcdefghijklmnop",
    ] {
        assert!(!is_port_name(name), "{name}");
    }
}

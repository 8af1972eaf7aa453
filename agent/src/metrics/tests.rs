use std::net::IpAddr;

use crate::state::objects::{OutboundDefault, Owner};

use super::*;

fn workload(name: &str, deployment: &str) -> Arc<Workload> {
    let key = ObjectKey {
        cluster: Arc::from("main"),
        namespace: Arc::from("shop"),
        name: Arc::from(name),
    };
    Arc::new(Workload {
        uid: Arc::from(format!("uid-{name}")),
        identity: identity(deployment),
        mirror_of: None,
        node: Some(Arc::from("n1")),
        local: true,
        ips: vec![IpAddr::from([10, 1, 0, 1])],
        host_network: false,
        meshed: true,
        undecided: false,
        refused: None,
        labels: [(Arc::from("app"), Arc::from(deployment))].into(),
        namespace_labels: Default::default(),
        owner: Some(Owner {
            kind: Arc::from("deployment"),
            name: Arc::from(deployment),
        }),
        ports: Vec::new(),
        skip_inbound: Vec::new(),
        skip_outbound: Vec::new(),
        outbound_default: OutboundDefault::Allow,
        policy: None,
        network: None,
        key,
    })
}

fn identity(service_account: &str) -> Identity {
    Identity {
        trust_domain: Arc::from("cluster.local"),
        namespace: Arc::from("shop"),
        service_account: Arc::from(service_account),
    }
}

fn policy(kind: &str, name: &str) -> Option<PolicyRef> {
    Some(PolicyRef {
        group: Arc::from("policy.linkerd.io"),
        kind: Arc::from(kind),
        name: Arc::from(name),
    })
}

fn outbound() -> FlowInfo {
    FlowInfo {
        direction: Direction::Outbound,
        workload: workload("cart-1", "cart"),
        peer: Some(workload("db-1", "db")),
        client_id: Some(identity("cart")),
        server_id: Some(identity("db")),
        target: "10.96.0.7:5432".parse().unwrap(),
        endpoint: "10.1.0.1:6543".parse().unwrap(),
        service: Some((workload("db", "db").key.clone(), 5432)),
        tls: TlsStatus::True,
        server: None,
        authz: None,
    }
}

fn inbound() -> FlowInfo {
    FlowInfo {
        direction: Direction::Inbound,
        workload: workload("db-1", "db"),
        peer: Some(workload("cart-1", "cart")),
        target: "10.1.0.1:5432".parse().unwrap(),
        endpoint: "10.1.0.1:5432".parse().unwrap(),
        service: None,
        server: policy("server", "postgres"),
        authz: policy("authorizationpolicy", "cart-only"),
        ..outbound()
    }
}

fn metrics(settings: MetricsSettings) -> Arc<Metrics> {
    Metrics::new(MetricsSettings {
        data_threads: 2,
        ..settings
    })
}

/// The value of the one sample of a family that has all of these labels.
fn value(text: &str, name: &str, labels: &[&str]) -> f64 {
    let found = samples(text, name, labels);
    assert_eq!(found.len(), 1, "{name} {labels:?} in:\n{text}");
    found[0].rsplit_once(' ').unwrap().1.parse().unwrap()
}

fn samples<'a>(text: &'a str, name: &str, labels: &[&str]) -> Vec<&'a str> {
    text.lines()
        .filter(|line| {
            line.strip_prefix(name)
                .is_some_and(|rest| rest.starts_with(['{', ' ']))
                && labels.iter().all(|label| line.contains(label))
        })
        .collect()
}

const SRC: &str = r#"peer="src""#;
const DST: &str = r#"peer="dst""#;

#[test]
fn one_connection_moves_both_ends_and_threads_are_summed() {
    let metrics = metrics(MetricsSettings::default());
    let flows: Vec<_> = (0..2)
        .map(|thread| metrics.recorder(thread).open(&outbound()))
        .collect();
    for flow in &flows {
        flow.from_source(10);
        flow.from_destination(1_000);
    }
    let text = metrics.encode().unwrap();
    for peer in [SRC, DST] {
        assert_eq!(value(&text, "tcp_open_total", &[peer]), 2.0);
        assert_eq!(value(&text, "tcp_open_connections", &[peer]), 2.0);
    }
    assert_eq!(value(&text, "tcp_read_bytes_total", &[SRC]), 20.0);
    assert_eq!(value(&text, "tcp_write_bytes_total", &[SRC]), 2_000.0);
    assert_eq!(value(&text, "tcp_read_bytes_total", &[DST]), 2_000.0);
    assert_eq!(value(&text, "tcp_write_bytes_total", &[DST]), 20.0);
    assert_eq!(value(&text, "picomesh_connections", &[]), 2.0);
}

#[test]
fn a_close_is_classified_and_an_unsaid_one_counts_as_aborted() {
    let metrics = metrics(MetricsSettings::default());
    let recorder = metrics.recorder(0);
    recorder.open(&outbound()).close(Outcome::Success);
    recorder.open(&outbound()).close(Outcome::Failure("reset"));
    drop(recorder.open(&outbound()));
    let text = metrics.encode().unwrap();
    let closed = |labels: &[&str]| {
        let labels = [labels, &[DST]].concat();
        value(&text, "tcp_close_total", &labels)
    };
    assert_eq!(closed(&[r#"classification="success""#, r#"errno="""#]), 1.0);
    assert_eq!(
        closed(&[r#"classification="failure""#, r#"errno="reset""#]),
        1.0
    );
    assert_eq!(closed(&[r#"errno="aborted""#]), 1.0);
    assert_eq!(value(&text, "tcp_open_connections", &[DST]), 0.0);
    assert_eq!(value(&text, "picomesh_connections", &[]), 0.0);
    let durations = "tcp_connection_duration_ms_count";
    assert_eq!(value(&text, durations, &[DST]), 3.0);
    let infinite = [DST, r#"le="+Inf""#];
    assert_eq!(
        value(&text, "tcp_connection_duration_ms_bucket", &infinite),
        3.0
    );
}

#[test]
fn outbound_labels_are_linkerds_with_the_pod_written_by_us() {
    let metrics = metrics(MetricsSettings::default());
    metrics
        .recorder(0)
        .open(&outbound())
        .close(Outcome::Success);
    let text = metrics.encode().unwrap();
    let expected = concat!(
        r#"tcp_open_total{direction="outbound",peer="dst",target_addr="10.1.0.1:6543","#,
        r#"target_ip="10.1.0.1",target_port="6543",tls="true","#,
        r#"client_id="cart.shop.serviceaccount.identity.linkerd.cluster.local","#,
        r#"server_id="db.shop.serviceaccount.identity.linkerd.cluster.local","#,
        r#"dst_namespace="shop",dst_service="db",dst_port="5432",dst_pod="db-1","#,
        r#"dst_serviceaccount="db",dst_deployment="db","#,
        r#"namespace="shop",pod="cart-1",deployment="cart"} 1"#,
    );
    assert!(text.lines().any(|line| line == expected), "{text}");
    // The application's end shows what was dialled, the other what was picked for it.
    let loopback = concat!(
        r#"tcp_open_total{direction="outbound",peer="src",target_addr="10.96.0.7:5432","#,
        r#"target_ip="10.96.0.7",target_port="5432",tls="no_identity",no_tls_reason="loopback","#,
        r#"namespace="shop",pod="cart-1",deployment="cart"} 1"#,
    );
    assert!(text.lines().any(|line| line == loopback), "{text}");
}

#[test]
fn inbound_labels_name_the_client_and_the_policy_that_decided() {
    let metrics = metrics(MetricsSettings::default());
    let recorder = metrics.recorder(0);
    recorder.authz(&inbound(), true);
    recorder.authz(&inbound(), true);
    let refused = FlowInfo {
        authz: None,
        client_id: None,
        tls: TlsStatus::NotMeshed,
        ..inbound()
    };
    recorder.authz(&refused, false);
    recorder.open(&inbound()).close(Outcome::Success);
    let text = metrics.encode().unwrap();
    let allowed = [
        r#"direction="inbound""#,
        r#"client_id="cart.shop.serviceaccount.identity.linkerd.cluster.local""#,
        r#"srv_group="policy.linkerd.io",srv_kind="server",srv_name="postgres",srv_port="5432""#,
        r#"authz_kind="authorizationpolicy",authz_name="cart-only""#,
        r#"namespace="shop",pod="db-1",deployment="db""#,
    ];
    assert_eq!(value(&text, "inbound_tcp_authz_allow_total", &allowed), 2.0);
    let src: Vec<_> = allowed.into_iter().chain([SRC]).collect();
    assert_eq!(value(&text, "tcp_open_total", &src), 1.0);
    let denied = [r#"no_tls_reason="no_tls_from_remote""#];
    assert_eq!(value(&text, "inbound_tcp_authz_deny_total", &denied), 1.0);
}

#[test]
fn a_same_node_connection_says_so() {
    let metrics = metrics(MetricsSettings::default());
    let info = FlowInfo {
        tls: TlsStatus::SameNode,
        ..outbound()
    };
    metrics.recorder(0).open(&info).close(Outcome::Success);
    let text = metrics.encode().unwrap();
    let labels = [DST, r#"tls="no_identity",no_tls_reason="same_node""#];
    assert_eq!(value(&text, "tcp_open_total", &labels), 1.0);
}

#[test]
fn addresses_outside_the_mesh_make_no_label_sets_of_their_own() {
    let metrics = metrics(MetricsSettings::default());
    let recorder = metrics.recorder(0);
    for host in 0..=255 {
        let info = FlowInfo {
            peer: None,
            service: None,
            server_id: None,
            tls: TlsStatus::Passthrough,
            target: SocketAddr::from(([203, 0, 113, host], 443)),
            endpoint: SocketAddr::from(([203, 0, 113, host], 443)),
            ..outbound()
        };
        recorder.open(&info).close(Outcome::Success);
    }
    let text = metrics.encode().unwrap();
    let labels = [
        DST,
        r#"target_port="443""#,
        r#"no_tls_reason="passthrough""#,
    ];
    assert_eq!(value(&text, "tcp_open_total", &labels), 256.0);
}

#[test]
fn the_number_of_label_sets_is_bounded_and_nothing_goes_uncounted() {
    let metrics = metrics(MetricsSettings {
        max_series: 100,
        ..MetricsSettings::default()
    });
    let recorder = metrics.recorder(0);
    for port in 1..=1_000 {
        let info = FlowInfo {
            target: SocketAddr::from(([10, 1, 0, 1], port)),
            ..inbound()
        };
        recorder.open(&info).close(Outcome::Success);
    }
    let text = metrics.encode().unwrap();
    let all = samples(&text, "tcp_open_total", &[]);
    assert!(all.len() <= 12, "one pod has a tenth: {}", all.len());
    let sum: f64 = samples(&text, "tcp_open_total", &[SRC])
        .iter()
        .map(|line| line.rsplit_once(' ').unwrap().1.parse::<f64>().unwrap())
        .sum();
    assert_eq!(sum, 1_000.0);
    let overflow = [SRC, r#"pod="db-1""#, r#"overflow="true""#];
    assert!(value(&text, "tcp_open_total", &overflow) > 900.0);
    assert!(value(&text, "picomesh_series_dropped_total", &[]) > 900.0);
    assert!(value(&text, "picomesh_series", &[]) <= 25.0);
}

#[test]
fn series_of_a_gone_pod_disappear_after_its_last_flow() {
    let metrics = metrics(MetricsSettings::default());
    let recorder = metrics.recorder(0);
    let flow = recorder.open(&outbound());
    let now = Instant::now();
    metrics.sweep(&HashSet::new(), now);
    let text = metrics.encode().unwrap();
    assert_eq!(samples(&text, "tcp_open_total", &[]).len(), 2, "still open");
    flow.close(Outcome::Success);
    metrics.sweep(&HashSet::new(), now);
    let text = metrics.encode().unwrap();
    assert_eq!(samples(&text, "tcp_open_total", &[]).len(), 0);
    assert_eq!(metrics.series().0, 0);
    // The thread's cache must not count into what nobody shows.
    recorder.open(&outbound()).close(Outcome::Success);
    let text = metrics.encode().unwrap();
    assert_eq!(value(&text, "tcp_open_total", &[DST]), 1.0);
}

#[test]
fn idle_series_of_a_living_pod_go_after_ten_minutes() {
    let metrics = metrics(MetricsSettings::default());
    let recorder = metrics.recorder(1);
    recorder.open(&outbound()).close(Outcome::Success);
    let live = HashSet::from([outbound().workload.uid.clone()]);
    let now = Instant::now();
    metrics.sweep(&live, now + RETAIN_IDLE - Duration::from_secs(2));
    assert_ne!(metrics.series().0, 0);
    metrics.sweep(&live, now + RETAIN_IDLE + Duration::from_secs(2));
    assert_eq!(metrics.series().0, 0);
}

#[test]
fn istio_series_are_there_on_request_with_ztunnels_labels_in_order() {
    let with = metrics(MetricsSettings {
        istio: true,
        ..MetricsSettings::default()
    });
    let flow = with.recorder(0).open(&outbound());
    flow.from_source(10);
    flow.from_destination(1_000);
    flow.close(Outcome::Success);
    let text = with.encode().unwrap();
    let labels = concat!(
        r#"{reporter="source",source_workload="cart",source_canonical_service="cart","#,
        r#"source_canonical_revision="latest",source_workload_namespace="shop","#,
        r#"source_principal="spiffe://cluster.local/ns/shop/sa/cart",source_app="cart","#,
        r#"source_version="latest",source_cluster="main","#,
        r#"destination_service="db.shop.svc.cluster.local","#,
        r#"destination_service_namespace="shop",destination_service_name="db","#,
        r#"destination_workload="db",destination_canonical_service="db","#,
        r#"destination_canonical_revision="latest",destination_workload_namespace="shop","#,
        r#"destination_principal="spiffe://cluster.local/ns/shop/sa/db",destination_app="db","#,
        r#"destination_version="latest",destination_cluster="main",request_protocol="tcp","#,
        r#"response_flags="-",connection_security_policy="mutual_tls"}"#,
    );
    for (name, expected) in [
        ("istio_tcp_connections_opened_total", 1),
        ("istio_tcp_connections_closed_total", 1),
        ("istio_tcp_received_bytes_total", 10),
        ("istio_tcp_sent_bytes_total", 1_000),
    ] {
        let line = format!("{name}{labels} {expected}");
        assert!(text.lines().any(|l| l == line), "{line} in:\n{text}");
    }
    let without = metrics(MetricsSettings::default());
    without
        .recorder(0)
        .open(&outbound())
        .close(Outcome::Success);
    assert!(!without.encode().unwrap().contains("istio"));
}

#[test]
fn errors_handshakes_and_sources_are_shown() {
    let metrics = metrics(MetricsSettings::default());
    metrics.add_source(|| {
        vec![Family {
            name: "picomesh_pods",
            help: "Pods.",
            kind: Kind::Gauge,
            samples: vec![Sample {
                labels: vec![("state", "failed".into()), ("reason", "a \"word\"".into())],
                value: 3.0,
            }],
        }]
    });
    let (first, second) = (metrics.recorder(0), metrics.recorder(1));
    for recorder in [&first, &second] {
        recorder.error(
            Direction::Outbound,
            Some(&outbound().workload),
            "no_endpoints",
        );
        recorder.handshake(true, "unknown_ca");
        recorder.tunnels(2);
        recorder.buffered_bytes(100);
    }
    first.error(Direction::Inbound, None, "claimed_source");
    second.tunnels(-1);
    let text = metrics.encode().unwrap();
    let of_pod = [r#"error="no_endpoints",namespace="shop",pod="cart-1""#];
    assert_eq!(value(&text, "outbound_tcp_errors_total", &of_pod), 2.0);
    let unknown = [r#"{error="claimed_source"}"#];
    assert_eq!(value(&text, "inbound_tcp_errors_total", &unknown), 1.0);
    let handshakes = [r#"side="server",result="unknown_ca""#];
    assert_eq!(value(&text, "picomesh_handshakes_total", &handshakes), 2.0);
    assert_eq!(value(&text, "picomesh_tunnels", &[]), 3.0);
    assert_eq!(value(&text, "picomesh_buffered_bytes", &[]), 200.0);
    assert_eq!(
        value(&text, "picomesh_pods", &[r#"reason="a \"word\"""#]),
        3.0
    );
}

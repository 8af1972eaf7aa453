//! Services: their addresses, endpoints and traffic policies.

use super::*;

#[test]
fn every_frontend_of_a_service_leads_to_its_endpoints() {
    let text = base()
        + &pod(
            "shop/back2",
            "n1",
            &["10.1.0.2", "fd00:a::2"],
            "labels: {app: back}",
        )
        + "---\n{apiVersion: v1, kind: Service, metadata: {name: api, namespace: shop}, spec: \
           {type: LoadBalancer, clusterIPs: [10.96.0.1, \"fd00:c::1\"], externalIPs: [192.0.2.1], \
           selector: {app: back}, ports: [{name: web, port: 80, targetPort: http, nodePort: \
           30080}, {name: raw, port: 81}, {name: dns, port: 53, protocol: UDP}]}, status: \
           {loadBalancer: {ingress: [{ip: 192.0.2.9}, {ip: 192.0.2.10, ipMode: Proxy}, \
           {hostname: lb.example}]}}}\n";
    let mesh = mesh(&text);
    // In the order of the pods' uids.
    let four = "[tunnel(n2,2) api 10.2.0.1:8080, local back2 10.1.0.2:8080]";
    let six = "[tunnel(n2,2) api [fd00:b::1]:8080, local back2 [fd00:a::2]:8080]";
    let rows = [
        ("10.96.0.1:80", format!("api:80 {four}")),
        (
            "10.96.0.1:81",
            format!("api:81 {}", four.replace("8080", "81")),
        ),
        ("[fd00:c::1]:80", format!("api:80 {six}")),
        ("192.0.2.1:80", format!("api:80 {four}")),
        ("192.0.2.9:80", format!("api:80 {four}")),
        ("192.168.0.1:30080", format!("api:80 {four}")),
        ("192.168.0.2:30080", format!("api:80 {four}")),
        ("[fd00:1::2]:30080", format!("api:80 {six}")),
        ("10.96.0.1:53", "refused no_such_port".into()),
        ("10.96.0.1:82", "refused no_such_port".into()),
        ("192.0.2.9:82", "pass 192.0.2.9:82".into()),
        ("192.0.2.10:80", "pass 192.0.2.10:80".into()),
        ("192.168.0.1:30081", "pass 192.168.0.1:30081".into()),
    ];
    for (destination, wanted) in rows {
        assert_eq!(lead(&mesh, destination), wanted, "{destination}");
    }
    assert_eq!(problems(&mesh), [""; 0]);
}

#[test]
fn ready_endpoints_come_first_and_serving_ones_that_terminate_are_the_last_resort() {
    let member = |n: u8, conditions: &str| {
        format!("{{addresses: [10.9.0.{n}], conditions: {{{conditions}}}}}")
    };
    let ready = member(1, "ready: true");
    let unsaid = member(2, "");
    let leaving = member(3, "ready: false, serving: true, terminating: true");
    let dead = member(4, "ready: false, serving: false, terminating: true");
    let waking = member(5, "ready: false, serving: true, terminating: false");
    let rows: [(&[&String], &str, &str); 6] = [
        (&[&ready, &unsaid, &leaving, &dead, &waking], "", "1 2"),
        (&[&leaving, &dead, &waking], "", "3"),
        (&[&dead, &waking], "", "refused no_endpoints"),
        (&[], "", "refused no_endpoints"),
        (
            &[&ready, &leaving, &dead, &waking],
            "publishNotReadyAddresses: true,",
            "1 3 4 5",
        ),
        (&[&dead], "publishNotReadyAddresses: true,", "4"),
    ];
    for (members, more, wanted) in rows {
        let members: Vec<_> = members.iter().map(|member| member.as_str()).collect();
        let mesh = mesh(
            &(base()
                + &service(
                    "x",
                    &format!("{more} clusterIP: 10.96.0.1, ports: [{{port: 80}}]"),
                )
                + &slice(
                    "x-1",
                    "x",
                    &format!("ports: [{{port: 80}}], endpoints: [{}]", members.join(", ")),
                )),
        );
        let got = lead(&mesh, "10.96.0.1:80");
        let wanted = match wanted.strip_prefix("refused") {
            Some(_) => wanted.to_owned(),
            None => {
                let all: Vec<_> = wanted
                    .split(' ')
                    .map(|n| format!("plain ? 10.9.0.{n}:80"))
                    .collect();
                format!("x:80 [{}]", all.join(", "))
            }
        };
        assert_eq!(got, wanted, "{members:?} {more}");
    }
}

#[test]
fn of_two_slices_that_name_an_address_the_better_word_counts_in_either_order() {
    let told = |conditions: &str| {
        format!(
            "ports: [{{port: 80}}], endpoints: [{{addresses: [10.9.0.1], conditions: {{{conditions}}}}}]"
        )
    };
    let ready = told("ready: true");
    let leaving = told("ready: false, serving: true, terminating: true");
    let dead = told("ready: false, serving: false, terminating: true");
    // One that is ready keeps one that leaves from being asked, so the better word shows.
    let other = "ports: [{port: 80}], endpoints: [{addresses: [10.9.0.2], conditions: {ready: \
                 false, serving: true, terminating: true}}]";
    let one = "x:80 [plain ? 10.9.0.1:80]";
    let both = "x:80 [plain ? 10.9.0.1:80, plain ? 10.9.0.2:80]";
    for (better, worse, wanted) in [
        (&ready, &leaving, one),
        (&ready, &dead, one),
        (&leaving, &dead, both),
    ] {
        for (first, second) in [(better, worse), (worse, better)] {
            let text = base()
                + &service("x", "clusterIP: 10.96.0.1, ports: [{port: 80}]")
                + &slice("x-1", "x", first)
                + &slice("x-2", "x", second)
                + &slice("x-3", "x", other);
            assert_eq!(
                lead(&mesh(&text), "10.96.0.1:80"),
                wanted,
                "{first} {second}"
            );
        }
    }
}

#[test]
fn a_named_port_is_the_pods_tcp_port_of_that_name() {
    let text = base()
        + "---\n{apiVersion: v1, kind: Pod, metadata: {name: a, namespace: shop, uid: uid-a, \
           labels: {app: x}}, spec: {nodeName: n1, containers: [{name: main, ports: \
           [{name: admin, containerPort: 9000}, {name: web, containerPort: 9001, protocol: UDP}, \
           {name: web, containerPort: 9002}]}]}, status: {podIPs: [{ip: 10.1.0.5}]}}\n"
        + &service(
            "x",
            "clusterIP: 10.96.0.1, selector: {app: x}, ports: [{port: 80, targetPort: web}]",
        );
    assert_eq!(
        lead(&mesh(&text), "10.96.0.1:80"),
        "x:80 [local a 10.1.0.5:9002]"
    );
}

#[test]
fn a_node_port_exists_in_the_families_of_its_service() {
    let through = |addresses: &str| {
        let spec = format!(
            "type: NodePort, {addresses} selector: {{app: back}}, ports: [{{port: 80, nodePort: 30080}}]"
        );
        let mesh = mesh(&(base() + &service("x", &spec)));
        ["192.168.0.2:30080", "[fd00:1::2]:30080"].map(|to| lead(&mesh, to).starts_with("x:80"))
    };
    assert_eq!(through("clusterIP: 10.96.0.1,"), [true, false]);
    assert_eq!(through("clusterIP: \"fd00:c::1\","), [false, true]);
    assert_eq!(
        through("clusterIPs: [10.96.0.1, \"fd00:c::1\"],"),
        [true, true]
    );
    assert_eq!(through(""), [true, true]);
}

#[test]
fn derived_endpoints_respect_readiness_and_termination() {
    let not_ready = |text: String| text.replace("status: {", "status: {phase: Pending, ");
    let deleted = "labels: {app: x}, deletionTimestamp: \"2026-01-01T00:00:00Z\"";
    let ready = pod("shop/a", "n1", &["10.1.0.5"], "labels: {app: x}");
    let waking = not_ready(pod("shop/b", "n1", &["10.1.0.6"], "labels: {app: x}"));
    let leaving = pod("shop/c", "n1", &["10.1.0.7"], deleted);
    let dead = not_ready(pod("shop/d", "n1", &["10.1.0.8"], deleted));
    let elsewhere = pod("bank/e", "n1", &["10.1.0.10"], "labels: {app: x}");
    let run = |pods: &[&String], more: &str| {
        let pods: String = pods.iter().map(|text| text.as_str()).collect();
        let spec =
            format!("{more} clusterIP: 10.96.0.1, selector: {{app: x}}, ports: [{{port: 80}}]");
        lead(
            &mesh(&(base() + &service("x", &spec) + &pods)),
            "10.96.0.1:80",
        )
    };
    let all = [&ready, &waking, &leaving, &dead, &elsewhere];
    assert_eq!(run(&all, ""), "x:80 [local a 10.1.0.5:80]");
    assert_eq!(run(&all[1..], ""), "x:80 [local c 10.1.0.7:80]");
    assert_eq!(
        run(&[&waking, &dead, &elsewhere], ""),
        "refused no_endpoints"
    );
    assert_eq!(
        run(&[&waking, &dead], "publishNotReadyAddresses: true,"),
        "x:80 [local b 10.1.0.6:80, local d 10.1.0.8:80]"
    );
    let none = service("x", "clusterIP: 10.96.0.1, ports: [{port: 80}]");
    assert_eq!(
        lead(&mesh(&(base() + &none)), "10.96.0.1:80"),
        "refused no_endpoints"
    );
}

#[test]
fn who_an_endpoint_is_comes_from_the_uid_and_the_pod_must_hold_the_address() {
    let target = |uid: &str| format!("targetRef: {{kind: Pod, name: x, uid: {uid}}}");
    let host = "---\n{apiVersion: v1, kind: Pod, metadata: {name: hn, namespace: shop, uid: uid-hn}, \
                spec: {nodeName: n2, hostNetwork: true, containers: []}, status: {podIP: 192.168.0.2}}\n";
    let twice = pod("shop/twin", "n1", &["10.1.0.1"], "");
    let rows = [
        (
            "10.2.0.1",
            target("uid-api"),
            "",
            "x:80 [tunnel(n2,2) api 10.2.0.1:80]",
        ),
        (
            "10.1.0.9",
            target("uid-till"),
            "",
            "x:80 [plain till 10.1.0.9:80]",
        ),
        (
            "192.168.0.2",
            target("uid-hn"),
            host,
            "x:80 [plain hn 192.168.0.2:80]",
        ),
        // Somebody else's address, an unknown pod, an address of two pods.
        ("10.1.0.9", target("uid-api"), "", "refused no_endpoints"),
        ("203.0.113.1", target("uid-api"), "", "refused no_endpoints"),
        ("10.2.0.1", target("uid-hn"), host, "refused no_endpoints"),
        ("10.2.0.1", target("gone"), "", "refused no_endpoints"),
        (
            "10.1.0.1",
            target("uid-web"),
            &twice,
            "refused no_endpoints",
        ),
        ("10.1.0.1", String::new(), &twice, "refused no_endpoints"),
        // Without reference the address speaks, and a meshed pod is not called plain.
        (
            "10.2.0.1",
            String::new(),
            "",
            "x:80 [tunnel(n2,2) api 10.2.0.1:80]",
        ),
        (
            "203.0.113.1",
            String::new(),
            "",
            "x:80 [plain ? 203.0.113.1:80]",
        ),
        (
            "10.2.0.1",
            "targetRef: {kind: Node, uid: n}".into(),
            "",
            "x:80 [tunnel(n2,2) api 10.2.0.1:80]",
        ),
    ];
    for (ip, reference, more, wanted) in rows {
        let body =
            format!("ports: [{{port: 80}}], endpoints: [{{addresses: [{ip}], {reference}}}]");
        let text = base()
            + &service("x", "clusterIP: 10.96.0.1, ports: [{port: 80}]")
            + &slice("x-1", "x", &body)
            + more;
        let mesh = mesh(&text);
        let source = mesh.workloads.get("uid-web").unwrap();
        assert_eq!(
            lead_from(&mesh, source, "10.96.0.1:80"),
            wanted,
            "{ip} {reference}"
        );
        let told = problems(&mesh)
            .iter()
            .any(|p| p.starts_with("EndpointSlice shop/x-1: endpoint"));
        assert_eq!(told, wanted.starts_with("refused"), "{ip} {reference}");
    }
}

#[test]
fn ports_of_a_slice_are_found_by_name_and_endpoints_counted_once() {
    let text = base()
        + &service(
            "x",
            "clusterIP: 10.96.0.1, selector: {app: back}, ports: [{name: a, port: 80, \
           targetPort: 8000}, {name: b, port: 81, targetPort: named}, {name: c, port: 82, targetPort: 9000}]",
        )
        + &slice(
            "x-1",
            "x",
            "ports: [{name: a, port: 1000}, {name: b}, {name: c}, {name: a, port: \
           1, protocol: UDP}], endpoints: [{addresses: [10.9.0.1], conditions: {ready: false}}]",
        )
        + &slice(
            "x-2",
            "x",
            "ports: [{name: a, port: 1000}, {name: b}, {name: c}], endpoints: \
           [{addresses: [10.9.0.1]}]",
        )
        + &slice(
            "x-3",
            "x",
            "ports: [{name: a, port: 1000}], endpoints: [{addresses: [10.9.0.1], \
           conditions: {ready: false}}]",
        )
        + &slice(
            "y-1",
            "y",
            "ports: [{name: a, port: 1000}], endpoints: [{addresses: [10.9.0.2]}]",
        );
    let mesh = mesh(&text);
    assert_eq!(lead(&mesh, "10.96.0.1:80"), "x:80 [plain ? 10.9.0.1:1000]");
    assert_eq!(lead(&mesh, "10.96.0.1:81"), "x:81 [plain ? 10.9.0.1:81]");
    assert_eq!(lead(&mesh, "10.96.0.1:82"), "x:82 [plain ? 10.9.0.1:9000]");
}

#[test]
fn traffic_policies_keep_calls_on_the_node_they_are_meant_for() {
    let back = |name: &str, node: &str, ip: &str| pod(name, node, &[ip], "labels: {app: x}");
    let spec = "clusterIP: 10.96.0.1, externalIPs: [192.0.2.1], selector: {app: x}, ports: \
                [{port: 80, nodePort: 30080}]";
    let both = back("shop/a", "n1", "10.1.0.5") + &back("shop/b", "n2", "10.2.0.5");
    let remote = back("shop/b", "n2", "10.2.0.5");
    let (a, b) = ("local a 10.1.0.5:80", "tunnel(n2,2) b 10.2.0.5:80");
    let all = format!("x:80 [{a}, {b}]");
    let (only_a, only_b) = (format!("x:80 [{a}]"), format!("x:80 [{b}]"));
    let none = "refused no_endpoints".to_owned();
    let internal = "internalTrafficPolicy: Local,";
    let external = "externalTrafficPolicy: Local,";
    // Cluster address, own node port, the other's node port, externalIP.
    let rows = [
        ("", &both, [&all, &all, &all, &all]),
        (internal, &both, [&only_a, &all, &all, &all]),
        (internal, &remote, [&none, &only_b, &only_b, &only_b]),
        (external, &both, [&all, &all, &only_b, &all]),
        (external, &remote, [&only_b, &only_b, &only_b, &only_b]),
    ];
    for (policy, pods, wanted) in rows {
        let mesh = mesh(&(base() + &service("x", &format!("{policy} {spec}")) + pods));
        let dialled = [
            "10.96.0.1:80",
            "192.168.0.1:30080",
            "192.168.0.2:30080",
            "192.0.2.1:80",
        ];
        for (destination, wanted) in dialled.iter().zip(wanted) {
            assert_eq!(lead(&mesh, destination), *wanted, "{policy} {destination}");
        }
    }
    // The node of an endpoint without pod is what the slice says.
    let text = base()
        + &service(
            "x",
            "internalTrafficPolicy: Local, clusterIP: 10.96.0.1, ports: [{port: 80}]",
        )
        + &slice(
            "x-1",
            "x",
            "ports: [{port: 80}], endpoints: [{addresses: [10.9.0.1], nodeName: \
           n1}, {addresses: [10.9.0.2], nodeName: n2}, {addresses: [10.9.0.3]}]",
        );
    assert_eq!(
        lead(&mesh(&text), "10.96.0.1:80"),
        "x:80 [plain ? 10.9.0.1:80]"
    );
}

#[test]
fn a_pod_that_calls_its_own_service_may_get_itself() {
    let text = base()
        + &service(
            "x",
            "clusterIP: 10.96.0.1, selector: {app: front}, ports: [{port: 80, targetPort: http}]",
        );
    assert_eq!(
        lead(&mesh(&text), "10.96.0.1:80"),
        "x:80 [local web 10.1.0.1:8080]"
    );
}

#[test]
fn headless_and_external_name_services_have_no_frontend() {
    let text = base()
        + &service(
            "x",
            "clusterIP: None, selector: {app: back}, ports: [{port: 80}]",
        )
        + &service(
            "y",
            "type: ExternalName, externalName: example.com, ports: [{port: 80}]",
        );
    assert!(mesh(&text).frontends.is_empty());
}

#[test]
fn a_host_port_leads_to_its_pod_unless_a_service_has_the_place() {
    let with = |name: &str, port: &str, more: &str| {
        pod(name, "n2", &["10.2.0.8"], more).replace(
            "containerPort: 8080",
            &format!("containerPort: 8080, {port}"),
        )
    };
    let web = with("shop/hp", "hostPort: 8443", "");
    let mesh_of = |pods: &str| mesh(&(base() + pods));
    assert_eq!(
        lead(&mesh_of(&web), "192.168.0.2:8443"),
        "tunnel(n2,2) hp 10.2.0.8:8080"
    );
    assert_eq!(
        lead(&mesh_of(&web), "192.168.0.1:8443"),
        "pass 192.168.0.1:8443"
    );
    // The pod has no IPv6 address to give.
    assert_eq!(
        lead(&mesh_of(&web), "[fd00:1::2]:8443"),
        "pass [fd00:1::2]:8443"
    );
    for (port, leads) in [
        ("hostPort: 8443, hostIP: 192.168.0.2", true),
        ("hostPort: 8443, hostIP: 0.0.0.0", true),
        ("hostPort: 8443, hostIP: 192.168.7.7", false),
        ("hostPort: 8443, protocol: UDP", false),
    ] {
        let got = lead(&mesh_of(&with("shop/hp", port, "")), "192.168.0.2:8443");
        assert_eq!(got.starts_with("tunnel"), leads, "{port}: {got}");
    }
    let deleted = "deletionTimestamp: \"2026-01-01T00:00:00Z\"";
    let older = with("shop/aa", "hostPort: 8443", deleted).replace("10.2.0.8", "10.2.0.3");
    let got = lead(&mesh_of(&(older + &web)), "192.168.0.2:8443");
    assert_eq!(got, "tunnel(n2,2) hp 10.2.0.8:8080", "who leaves yields");
    let leaving = with("shop/hp", "hostPort: 8443", deleted);
    let got = lead(&mesh_of(&leaving), "192.168.0.2:8443");
    assert_eq!(
        got, "tunnel(n2,2) hp 10.2.0.8:8080",
        "to the end if nobody comes"
    );

    // Two that stay: nobody knows which is meant, so it is neither.
    let other = |port: &str| with("shop/zz", port, "").replace("10.2.0.8", "10.2.0.3");
    let mesh = mesh_of(&(other("hostPort: 8443, hostIP: 192.168.0.2") + &web));
    assert_eq!(lead(&mesh, "192.168.0.2:8443"), "refused ambiguous_address");
    let told = |name: &str| {
        format!(
            "Pod shop/{name}: host port 192.168.0.2:8443 is claimed by 2 live pods, so connections \
             to it are refused; only one pod of a node may have it"
        )
    };
    assert_eq!(problems(&mesh), [told("hp"), told("zz")]);
    let mesh = mesh_of(&(other("hostPort: 8443, hostIP: 192.168.7.7") + &web));
    assert_eq!(
        lead(&mesh, "192.168.0.2:8443"),
        "tunnel(n2,2) hp 10.2.0.8:8080"
    );

    let balancer = "---\n{apiVersion: v1, kind: Service, metadata: {name: lb, namespace: shop}, \
                    spec: {clusterIP: 10.96.0.1, selector: {app: back}, ports: [{port: 8443}]}, \
                    status: {loadBalancer: {ingress: [{ip: 192.168.0.2}]}}}\n";
    let mesh = mesh_of(&(web + balancer));
    assert_eq!(
        lead(&mesh, "192.168.0.2:8443"),
        "lb:8443 [tunnel(n2,2) api 10.2.0.1:8443]"
    );
    assert_eq!(problems(&mesh), [""; 0]);
}

#[test]
fn two_claims_to_one_place_are_settled_the_same_way_everywhere_and_reported() {
    let ports = "selector: {app: back}, ports: [{port: 80, nodePort: 30080}]";
    let mesh = mesh(
        &(base()
            + &service(
                "a",
                &format!("externalIPs: [10.96.0.2], clusterIP: 10.96.0.1, {ports}"),
            )
            + &service(
                "b",
                &format!("externalIPs: [10.1.0.9, 192.0.2.1], clusterIP: 10.96.0.2, {ports}"),
            )
            + &service(
                "c",
                &format!("externalIPs: [192.0.2.1], clusterIP: 10.96.0.3, {ports}"),
            )),
    );
    let first = |destination: &str| {
        lead(&mesh, destination)
            .split(' ')
            .next()
            .unwrap()
            .to_owned()
    };
    assert_eq!(
        first("10.96.0.2:80"),
        "b:80",
        "a cluster address is stronger"
    );
    assert_eq!(first("192.0.2.1:80"), "b:80");
    assert_eq!(first("192.168.0.1:30080"), "a:80");
    assert_eq!(
        lead(&mesh, "10.1.0.9:80"),
        "plain till 10.1.0.9:80",
        "a pod's address is its own"
    );
    let told = problems(&mesh);
    for wanted in [
        "Service shop/a: external address 10.96.0.2:80 is not served: Service shop/b has it",
        "Service shop/b: external address 10.1.0.9 is not served: it is a pod's address",
        "Service shop/b: node port 192.168.0.1:30080 is not served: Service shop/a has it",
        "Service shop/c: external address 192.0.2.1:80 is not served: Service shop/b has it",
    ] {
        assert!(
            told.iter().any(|problem| problem.starts_with(wanted)),
            "{wanted}: {told:#?}"
        );
    }
}

#[test]
fn a_thousand_pods_behind_two_hundred_services_all_resolve() {
    let mut text = node("n1", &["192.168.0.1"])
        + &node("n2", &["192.168.0.2"])
        + &meshed_namespace("shop", "");
    for n in 0..1000_u32 {
        let more = format!("labels: {{app: app{}}}", n % 200);
        let ip = format!("10.1.{}.{}", n / 250, n % 250 + 1);
        text += &pod(
            &format!("shop/p{n}"),
            if n % 2 == 0 { "n1" } else { "n2" },
            &[&ip],
            &more,
        );
    }
    for n in 0..200_u32 {
        text += &service(
            &format!("s{n}"),
            &format!(
                "clusterIP: 10.96.0.{}, selector: {{app: app{n}}}, ports: [{{port: 80}}]",
                n + 1
            ),
        );
    }
    let mesh = mesh(&text);
    assert_eq!(
        (mesh.workloads.len(), mesh.by_ip.len(), mesh.frontends.len()),
        (1000, 1000, 200)
    );
    for n in 0..200 {
        let led = lead_from(
            &mesh,
            &mesh.workloads["uid-p0"],
            &format!("10.96.0.{}:80", n + 1),
        );
        assert_eq!(led.matches("10.1.").count(), 5, "{led}");
    }
    assert_eq!(problems(&mesh), [""; 0]);
}

//! Services: every address that leads to one, and which of its endpoints answers. The world has no
//! kube-proxy, so none of these addresses answers without the mesh: that is the control.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use picomesh_tests::{
    Pod, PodSpec, ServiceSpec,
    client::{self, End},
    server::{Habit, Server},
    wait,
};
use serde_json::json;

use crate::{
    ground::{Ground, PATIENCE, PORT, served, told},
    harness::{Need, Test},
};

pub(crate) const TESTS: &[Test] = &[
    Test {
        name: "services::every_kind_of_address_leads_through_the_mesh",
        needs: &[Need::Mesh],
        run: every_kind_of_address_leads_through_the_mesh,
    },
    Test {
        name: "services::a_headless_services_pods_are_reached_by_their_own_addresses",
        needs: &[Need::Mesh],
        run: a_headless_services_pods_are_reached_by_their_own_addresses,
    },
    Test {
        name: "services::one_without_endpoints_refuses_at_once",
        needs: &[Need::Mesh],
        run: one_without_endpoints_refuses_at_once,
    },
    Test {
        name: "services::connections_spread_over_all_endpoints",
        needs: &[Need::Mesh],
        run: connections_spread_over_all_endpoints,
    },
    Test {
        name: "services::session_affinity_keeps_a_client_at_one_endpoint",
        needs: &[Need::Mesh],
        run: session_affinity_keeps_a_client_at_one_endpoint,
    },
    Test {
        name: "services::a_pod_that_is_not_ready_gets_no_connections",
        needs: &[Need::Mesh],
        run: a_pod_that_is_not_ready_gets_no_connections,
    },
    Test {
        name: "services::addresses_outside_pass_unless_outbound_default_denies",
        needs: &[Need::Mesh],
        run: addresses_outside_pass_unless_outbound_default_denies,
    },
];

const EXTERNAL: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 7);
const BALANCER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 8);
const NODE_PORT: u16 = 30_080;
const HOST_PORT: u16 = 18_080;

fn every_kind_of_address_leads_through_the_mesh() -> Result<()> {
    const MARKER: &[u8] = b"never-plain-by-whatever-address";
    let mut ground = Ground::new()?;
    let manifests = ground.world.manifests();
    let service = ground.world.service(&ServiceSpec {
        name: "everywhere".into(),
        selector: vec![("app".into(), "far".into())],
        more: json!({
            "type": "LoadBalancer",
            "externalIPs": [EXTERNAL.to_string()],
            "ports": [{"name": "echo", "port": PORT, "targetPort": PORT, "nodePort": NODE_PORT,
                       "protocol": "TCP"}],
        }),
        ..ServiceSpec::new("everywhere", PORT, PORT)
    })?;
    manifests.edit("Service", "mesh", "everywhere", |service| {
        service["status"] = json!({"loadBalancer": {"ingress": [{"ip": BALANCER.to_string()}]}});
    })?;
    manifests.edit("Pod", "mesh", "far", |pod| {
        pod["spec"]["containers"][0]["ports"] = json!([
            {"name": "echo", "containerPort": PORT, "hostPort": HOST_PORT, "protocol": "TCP"}
        ]);
    })?;
    let nodes = ground.world.nodes();
    let mut addresses: Vec<(&str, SocketAddr)> = vec![
        ("cluster address", service.at()),
        ("cluster address", service.at6()),
        ("externalIP", (EXTERNAL, PORT).into()),
        ("load balancer's address", (BALANCER, PORT).into()),
        ("host port", (nodes[1].v4(), HOST_PORT).into()),
        ("host port", (nodes[1].v6(), HOST_PORT).into()),
    ];
    for node in &nodes {
        addresses.push(("node port", (node.v4(), NODE_PORT).into()));
        addresses.push(("node port", (node.v6(), NODE_PORT).into()));
    }
    let _server = Server::start(ground.far.netns(), PORT, Habit::Echo)?;
    for (what, to) in &addresses {
        ensure!(
            !served(&ground.near, *to),
            "control: {what} {to} answers without the mesh"
        );
    }
    ground.mesh()?;

    let capture = ground.world.capture_wire(&[MARKER])?;
    for (what, to) in addresses {
        let mutual = [("direction", "outbound"), ("tls", "true")];
        let before = ground.opened(0, &mutual)?;
        let answer = ground
            .near
            .run(|| client::exchange(to, MARKER, PATIENCE))
            .with_context(|| format!("{what} {to}"))?;
        ensure!(answer == MARKER, "{what} {to} answers {answer:?}");
        ensure!(
            ground.opened(0, &mutual)? > before,
            "{what} {to} went past the tunnels"
        );
    }
    let found = capture.stop()?.found[0];
    ensure!(found == 0, "{found} packets in plain");
    Ok(())
}

fn a_headless_services_pods_are_reached_by_their_own_addresses() -> Result<()> {
    let mut ground = Ground::new()?;
    ground.world.service(&ServiceSpec {
        headless: true,
        ..ServiceSpec::new("far", PORT, PORT)
    })?;
    let _server = Server::start(ground.far.netns(), PORT, Habit::WhoAmI)?;
    // What a name of a headless Service resolves to.
    let addresses = [ground.far.at(PORT), ground.far.at6(PORT)];
    let ask = |ground: &Ground| -> Result<Vec<Vec<u8>>> {
        addresses
            .iter()
            .map(|to| Ok(ground.near.run(|| client::exchange(*to, b"", PATIENCE))?))
            .collect()
    };
    let control = ask(&ground).context("control, without the mesh")?;
    ground.mesh()?;
    let mutual = [("direction", "outbound"), ("tls", "true")];
    let before = ground.opened(0, &mutual)?;
    let meshed = ask(&ground)?;
    ensure!(meshed == control, "{control:?} became {meshed:?}");
    ensure!(
        ground.opened(0, &mutual)? == before + 2.0,
        "they went past the tunnels"
    );
    Ok(())
}

fn one_without_endpoints_refuses_at_once() -> Result<()> {
    let mut ground = Ground::new()?;
    let nobody = ground
        .world
        .service(&ServiceSpec::new("nobody", PORT, PORT))?;
    ground.mesh()?;
    let wrong_port = SocketAddr::new(ground.service("far")?.ip(), PORT + 1);
    for (to, reason) in [
        (nobody.at(), "no_endpoints"),
        (nobody.at6(), "no_endpoints"),
        (wrong_port, "no_such_port"),
    ] {
        let asked = Instant::now();
        let end = ground.near.run(|| told(to))?;
        let took = asked.elapsed();
        ensure!(end == End::Reset { read: 0 }, "{to}: {end:?}");
        ensure!(took < Duration::from_millis(500), "{to}: after {took:?}");
        ground
            .agent(0)?
            .wait_log(&[&to.to_string(), reason], PATIENCE)?;
    }
    Ok(())
}

fn connections_spread_over_all_endpoints() -> Result<()> {
    let mut ground = Ground::with(answering)?;
    let service = answers_of_both(&ground)?;
    let _servers = greeters(&ground)?;
    ground.mesh()?;
    for to in [service.at(), service.at6()] {
        // One after the other, and all at a time.
        let (one_by_one, _) = greetings(&ground.near, to, 60, false)?;
        let (at_a_time, _open) = greetings(&ground.near, to, 60, true)?;
        ensure!(
            one_by_one.len() == 2 && one_by_one.values().all(|n| *n >= 10),
            "{to}, one by one: {one_by_one:?}"
        );
        ensure!(
            at_a_time.len() == 2 && at_a_time.values().all(|n| *n >= 25),
            "{to}, all at a time: {at_a_time:?}"
        );
    }
    Ok(())
}

fn session_affinity_keeps_a_client_at_one_endpoint() -> Result<()> {
    let mut ground = Ground::with(answering)?;
    let service = answers_of_both(&ground)?;
    ground
        .world
        .manifests()
        .edit("Service", "mesh", "both", |service| {
            service["spec"]["sessionAffinity"] = "ClientIP".into();
        })?;
    let _servers = greeters(&ground)?;
    ground.mesh()?;
    for to in [service.at(), service.at6()] {
        let (answered, _open) = greetings(&ground.near, to, 30, true)?;
        ensure!(answered.len() == 1, "{to}: {answered:?}");
    }
    Ok(())
}

fn a_pod_that_is_not_ready_gets_no_connections() -> Result<()> {
    let mut ground = Ground::with(answering)?;
    let service = answers_of_both(&ground)?;
    let _servers = greeters(&ground)?;
    ground.mesh()?;
    let manifests = ground.world.manifests();
    let ready = |pod: &str, status: &str| {
        manifests.edit("Pod", "mesh", pod, |pod| {
            pod["status"]["conditions"][0]["status"] = status.into();
        })
    };
    let answer = || greetings(&ground.near, service.at(), 20, false).map(|(by, _)| by);

    ready("far", "False")?;
    wait::for_value("beside answers alone", PATIENCE, || {
        let by = answer()?;
        Ok((by.len() == 1 && by.contains_key("beside")).then_some(()))
    })?;
    let mut own = ground
        .near
        .run(|| client::connect(ground.far.at(PORT), PATIENCE))?;
    let greeting = client::read_until(&mut own, b"\n").context("who dials a pod means that pod")?;
    ensure!(greeting == "far\n", "far's own address leads to {greeting}");

    ready("beside", "False")?;
    wait::until("nobody answers", PATIENCE, || answer().is_err())?;
    ready("far", "True")?;
    wait::for_value("far answers alone", PATIENCE, || {
        let by = answer()?;
        Ok((by.len() == 1 && by.contains_key("far")).then_some(()))
    })
}

fn addresses_outside_pass_unless_outbound_default_denies() -> Result<()> {
    let mut ground = Ground::new()?;
    let outsider = ground.world.outsider()?;
    let _servers =
        [&outsider, &ground.far].map(|pod| Server::start(pod.netns(), PORT, Habit::Echo));
    ground.mesh()?;
    let passed = [("direction", "outbound"), ("no_tls_reason", "passthrough")];
    let before = ground.opened(0, &passed)?;
    for to in [outsider.at(PORT), outsider.at6(PORT)] {
        ensure!(served(&ground.near, to), "{to} does not answer");
    }
    let after = ground.opened(0, &passed)?;
    ensure!(
        after == before + 2.0,
        "{before} became {after}: addresses outside are not counted as such"
    );

    ground
        .world
        .manifests()
        .edit("Pod", "mesh", "near", |pod| {
            pod["metadata"]["annotations"]["config.picomesh.io/outbound-default"] = "deny".into();
        })?;
    wait::until("addresses outside are refused", PATIENCE, || {
        !served(&ground.near, outsider.at(PORT))
    })?;
    ensure!(
        !served(&ground.near, outsider.at6(PORT)),
        "IPv6 addresses outside are served"
    );
    ground
        .agent(0)?
        .wait_log(&["outbound_default_deny"], PATIENCE)?;
    for to in [ground.far.at(PORT), ground.service("far")?.at6()] {
        ensure!(
            served(&ground.near, to),
            "{to}, of the mesh, is refused too"
        );
    }
    ensure!(
        served(&ground.near, ground.far.at6(PORT)),
        "a pod of the mesh is refused too"
    );
    Ok(())
}

fn answering(spec: PodSpec) -> PodSpec {
    spec.label("answers", "yes")
}

/// A Service of `beside` and `far`.
fn answers_of_both(ground: &Ground) -> Result<picomesh_tests::Service> {
    ground.world.service(&ServiceSpec {
        selector: vec![("answers".into(), "yes".into())],
        ..ServiceSpec::new("both", PORT, PORT)
    })
}

/// Each says its own name.
fn greeters(ground: &Ground) -> Result<[Server; 2]> {
    Ok([
        Server::start(ground.beside.netns(), PORT, Habit::SpeaksFirst("beside\n"))?,
        Server::start(ground.far.netns(), PORT, Habit::SpeaksFirst("far\n"))?,
    ])
}

/// Connects `count` times; who answered how often, and the connections where they were to stay.
fn greetings(
    from: &Pod,
    to: SocketAddr,
    count: usize,
    stay_open: bool,
) -> Result<(BTreeMap<String, usize>, Vec<TcpStream>)> {
    from.run(|| {
        let mut by = BTreeMap::new();
        let mut open = Vec::new();
        for _ in 0..count {
            let mut stream = client::connect(to, PATIENCE)?;
            let name = client::read_until(&mut stream, b"\n")?;
            *by.entry(name.trim().to_owned()).or_default() += 1;
            if stay_open {
                open.push(stream);
            }
        }
        Ok((by, open))
    })
}

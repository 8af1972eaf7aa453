//! NetworkPolicy through real sockets: what Kubernetes lets into pods and out of them holds for
//! everything that the mesh carries, although the CNI sees none of it.
//!
//! Clients: `n`ear and its `t`win (one account, one node, other labels), `p`lain (not meshed), and
//! `o`ther (another namespace, another node). Servers: one on the node of the first three, one on
//! the other node.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use picomesh_tests::{
    Pod, PodSpec, Service, ServiceSpec,
    client::{self, End},
    manifest,
    server::{Habit, Server},
    wait,
};
use serde_json::{Value, json};

use crate::{
    ground::{Ground, PATIENCE, PORT, served},
    harness::{Need, Test},
};

pub(crate) const TESTS: &[Test] = &[
    Test {
        name: "network_policy::ingress_decides_on_every_way",
        needs: &[Need::Mesh],
        run: ingress_decides_on_every_way,
    },
    Test {
        name: "network_policy::egress_decides_by_endpoint",
        needs: &[Need::Mesh],
        run: egress_decides_by_endpoint,
    },
    Test {
        name: "network_policy::a_change_closes_what_it_forbids_within_a_second",
        needs: &[Need::Mesh],
        run: a_change_closes_what_it_forbids_within_a_second,
    },
    Test {
        name: "network_policy::a_broken_one_leaves_the_last_in_force_and_debug_tells_why",
        needs: &[Need::Mesh],
        run: a_broken_one_leaves_the_last_in_force_and_debug_tells_why,
    },
];

/// What a file changes is in force this soon.
const IN_FORCE: Duration = Duration::from_secs(2);
/// Served besides [`PORT`], by the server on the other node.
const SECOND: u16 = PORT + 1;

struct Field {
    ground: Ground,
    twin: Pod,
    other: Pod,
    _servers: Vec<Server>,
}

fn ingress_decides_on_every_way() -> Result<()> {
    let field = Field::open()?;
    let plain = &field.ground.plain;
    let from = |peers: Value| json!([{"from": peers}]);
    let clients = json!({"podSelector": {"matchLabels": {"role": "client"}}});
    let red = json!({"namespaceSelector": {"matchLabels": {"team": "red"}}});
    let but_plain = json!([
        {"ipBlock": {"cidr": "10.244.0.0/16", "except": [format!("{}/32", plain.v4())]}},
        {"ipBlock": {"cidr": "fd00:244::/32", "except": [format!("{}/128", plain.v6())]}},
    ]);
    for (what, ingress, expected) in [
        ("no rule", json!([]), ""),
        ("a rule for everybody", json!([{}]), "ntpo"),
        ("pods by label, of one account", from(json!([clients])), "n"),
        ("a namespace by label", from(json!([red])), "o"),
        ("one or the other", from(json!([clients, red])), "no"),
        (
            "pods of that namespace",
            from(json!([{
                "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "mesh"}},
                "podSelector": {"matchExpressions": [
                    {"key": "app", "operator": "In", "values": ["twin", "plain", "other"]},
                ]},
            }])),
            "tp",
        ),
        ("addresses with exceptions", from(but_plain), "nto"),
        (
            "the port by its name",
            json!([{"ports": [{"port": "echo"}]}]),
            "ntpo",
        ),
        (
            "a range beside the port",
            json!([{"ports": [{"port": SECOND, "endPort": 9000}]}]),
            "",
        ),
        (
            "the port of another protocol",
            json!([{"ports": [{"port": PORT, "protocol": "UDP"}]}]),
            "",
        ),
    ] {
        let spec = json!({
            "podSelector": {"matchLabels": {"role": "server"}},
            "ingress": ingress,
        });
        field.apply(&spec)?;
        field.serves(expected).context(what)?;
        let node = field.ground.world.node(1)?;
        let probe = node.run(|| client::exchange(field.ground.far.at(PORT), b"probe", PATIENCE));
        ensure!(probe? == b"probe", "{what}: the host's probe is refused");
    }
    let refused = [("error", "network_policy_ingress")];
    for node in 0..2 {
        let agent = field.ground.agent(node)?;
        agent.wait_metric("inbound_tcp_errors_total", &refused, PATIENCE, |n| n > 0.0)?;
        agent.wait_log(
            &["network_policy_ingress", "NetworkPolicy mesh/only"],
            PATIENCE,
        )?;
    }
    // A node's own port of another number is not what was allowed.
    field.apply(&json!({
        "podSelector": {"matchLabels": {"role": "server"}},
        "ingress": [{"ports": [{"port": SECOND, "endPort": 9000}]}],
    }))?;
    wait::until("a port of the range is served", IN_FORCE, || {
        served(&field.ground.near, field.ground.far.at(SECOND))
    })
}

fn egress_decides_by_endpoint() -> Result<()> {
    let field = Field::open()?;
    let ground = &field.ground;
    let outsider = ground.world.outsider()?;
    let _outside = Server::start(outsider.netns(), PORT, Habit::Echo)?;
    // Its port is another than its endpoint's.
    let by_service = ground
        .world
        .service(&ServiceSpec::new("front", 80, PORT).with(json!({"selector": {"app": "far"}})))?;
    wait::until("the Service is known", PATIENCE, || {
        served(&ground.near, by_service.at())
    })?;
    let to = |peers: Value| json!([{"to": peers}]);
    let far = json!({"podSelector": {"matchLabels": {"app": "far"}}});
    for (what, egress, expected) in [
        ("no rule", json!([]), ""),
        (
            "a rule for everything",
            json!([{}]),
            "far service beside outside",
        ),
        ("pods by label", to(json!([far])), "far service"),
        (
            "the endpoint's port",
            json!([{"ports": [{"port": PORT}]}]),
            "far service beside outside",
        ),
        ("the Service's port", json!([{"ports": [{"port": 80}]}]), ""),
        (
            "the endpoint's port by name",
            json!([{"ports": [{"port": "echo"}]}]),
            "far service beside",
        ),
        (
            "an address outside the cluster",
            to(json!([
                {"ipBlock": {"cidr": format!("{}/32", outsider.v4())}},
                {"ipBlock": {"cidr": format!("{}/128", outsider.v6())}},
            ])),
            "outside",
        ),
    ] {
        field.apply(&json!({
            "podSelector": {"matchLabels": {"role": "client"}},
            "policyTypes": ["Egress"],
            "egress": egress,
        }))?;
        field
            .reaches(&by_service, &outsider, expected)
            .context(what)?;
        ensure!(
            served(&field.twin, ground.beside.at(PORT)),
            "{what}: another pod is isolated"
        );
    }
    let agent = ground.agent(0)?;
    let refused = [("error", "network_policy_egress")];
    agent.wait_metric("outbound_tcp_errors_total", &refused, PATIENCE, |n| n > 0.0)?;
    agent.wait_log(
        &["network_policy_egress", "NetworkPolicy mesh/only"],
        PATIENCE,
    )?;
    Ok(())
}

fn a_change_closes_what_it_forbids_within_a_second() -> Result<()> {
    let field = Field::open()?;
    let ground = &field.ground;
    let all = [&ground.near, &field.twin, &ground.plain, &field.other];
    let isolated = |peers: Value| {
        json!({
            "podSelector": {"matchLabels": {"role": "server"}},
            "ingress": [{"from": peers}],
        })
    };
    let everybody = json!([{"namespaceSelector": {}}]);
    field.apply(&isolated(everybody))?;
    field.serves("ntpo")?;
    let mut open = Vec::new();
    for client in all {
        for to in [ground.beside.at(PORT), ground.far.at6(PORT)] {
            let mut stream = client.run(|| client::connect(to, PATIENCE))?;
            client::ping(&mut stream, b"open")?;
            open.push((client.name(), to, stream));
        }
    }

    let manifests = ground.world.manifests();
    // A namespace's label is policy, too.
    let red = json!([{"namespaceSelector": {"matchLabels": {"team": "red"}}}]);
    let relabelled = |color: &str| {
        manifests.edit("Namespace", "", "mesh", |namespace| {
            namespace["metadata"]["labels"]["team"] = color.into();
        })
    };
    relabelled("red")?;
    field.apply(&isolated(red))?;
    field.serves("ntpo")?;
    for (who, to, stream) in &mut open {
        client::ping(stream, b"still").with_context(|| format!("{who} to {to}"))?;
    }
    relabelled("blue")?;
    let changed = Instant::now();
    for (who, to, stream) in &mut open {
        if *who == "other" {
            client::ping(stream, b"still").with_context(|| format!("{who} to {to}"))?;
            continue;
        }
        let end = client::read_to_end(stream, PATIENCE)?;
        let took = changed.elapsed();
        ensure!(
            matches!(end, End::Reset { .. }) && took < Duration::from_secs(1),
            "{who} to {to}: after {took:?} it is told {end:?}"
        );
    }
    field.serves("o")?;

    // And the way out.
    field.apply(&json!({"podSelector": {}, "policyTypes": ["Egress"], "egress": [{}]}))?;
    field.serves("ntpo")?;
    let mut going = ground
        .near
        .run(|| client::connect(ground.far.at(PORT), PATIENCE))?;
    client::ping(&mut going, b"open")?;
    field.apply(&json!({"podSelector": {}, "policyTypes": ["Egress"]}))?;
    let changed = Instant::now();
    let end = client::read_to_end(&mut going, PATIENCE)?;
    ensure!(
        matches!(end, End::Reset { .. }) && changed.elapsed() < Duration::from_secs(1),
        "going out: after {:?} it is told {end:?}",
        changed.elapsed()
    );
    Ok(())
}

fn a_broken_one_leaves_the_last_in_force_and_debug_tells_why() -> Result<()> {
    let field = Field::open()?;
    let ground = &field.ground;
    let only = |peer: Value| {
        json!({
            "podSelector": {"matchLabels": {"role": "server"}},
            "ingress": [{"from": [peer]}],
        })
    };
    field.apply(&only(
        json!({"podSelector": {"matchLabels": {"role": "client"}}}),
    ))?;
    field.serves("n")?;
    field.apply(&only(json!({"ipBlock": {"cidr": "10.0.0.0/33"}})))?;
    let agent = ground.agent(1)?;
    let error = wait::for_value("the error is shown", PATIENCE, || {
        let state = agent.debug_json(&["state"])?;
        Ok(state["manifest_errors"].get(0).cloned())
    })?;
    for word in [
        "networkpolicy-mesh-only.yaml",
        "spec.ingress[0].from[0].ipBlock.cidr",
        "10.0.0.0/33",
    ] {
        ensure!(error.to_string().contains(word), "no {word} in {error}");
    }
    field.serves("n").context("with a broken policy")?;

    let asked = |from: &str| {
        agent.debug_json(&[
            "policies", "--pod", "mesh/far", "--from", from, "--port", "8080",
        ])
    };
    let rows = asked("mesh/near")?;
    ensure!(
        rows[1]["verdict"] == "allowed"
            && rows[1]["decided_by"] == "NetworkPolicy mesh/only, ingress[0]",
        "near is explained by {rows}"
    );
    ensure!(
        rows[0]["verdict"] == "unknown" && rows[2]["asked"] == "mesh, into mesh/far",
        "near is explained by {rows}"
    );
    let rows = asked("mesh/twin")?;
    ensure!(
        rows[1]["verdict"] == "denied" && rows[1]["decided_by"] == "NetworkPolicy mesh/only",
        "twin is explained by {rows}"
    );
    let words = [
        "policies",
        "--pod",
        "mesh/far",
        "--from",
        "192.0.2.1",
        "--port",
        "8080",
    ];
    let table = agent.debug(&words)?.ok()?.stdout;
    for word in ["DECIDED BY", "denied", "NetworkPolicy mesh/only"] {
        ensure!(table.contains(word), "no {word} in {table}");
    }
    let table = agent
        .debug(&["policies", "--pod", "mesh/far"])?
        .ok()?
        .stdout;
    ensure!(
        table.contains("from pods with role=client of its namespace, any port"),
        "the rule is not told in {table}"
    );
    let wrong = agent.debug(&["policies", "--pod", "mesh/near"])?;
    ensure!(
        !wrong.success() && wrong.stderr.contains("ask the agent there"),
        "a pod of another node is answered: {wrong:?}"
    );
    Ok(())
}

impl Field {
    fn open() -> Result<Self> {
        fn serving(spec: PodSpec) -> PodSpec {
            spec.label("role", "server").port("echo", PORT)
        }
        let mut ground = Ground::with(serving)?;
        ground.world.namespace("other", Some("enabled"))?;
        let manifests = ground.world.manifests();
        manifests.edit("Namespace", "", "other", |namespace| {
            namespace["metadata"]["labels"]["team"] = "red".into();
        })?;
        manifests.edit("Pod", "mesh", "near", |pod| {
            pod["metadata"]["labels"]["role"] = "client".into();
        })?;
        let twin = ground.world.pod(&PodSpec::new("twin").account("near"))?;
        let other = PodSpec::new("other").in_namespace("other").on(1);
        let other = ground.world.pod(&other)?;
        let servers = vec![
            Server::start(ground.beside.netns(), PORT, Habit::Echo)?,
            Server::start(ground.far.netns(), PORT, Habit::Echo)?,
            Server::start(ground.far.netns(), SECOND, Habit::Echo)?,
        ];
        ground.mesh()?;
        ground.agent(0)?.wait_captured(&twin, PATIENCE)?;
        ground.agent(1)?.wait_captured(&other, PATIENCE)?;
        let field = Self {
            ground,
            twin,
            other,
            _servers: servers,
        };
        field.serves("ntpo").context("before the first policy")?;
        Ok(field)
    }

    /// Writes the one policy of these tests.
    fn apply(&self, spec: &Value) -> Result<()> {
        let policy = manifest::network_policy("mesh", "only", spec.clone());
        self.ground.world.manifests().apply(&policy)
    }

    /// Waits until exactly these clients are served by both servers over both families, and they
    /// still are when asked again.
    fn serves(&self, expected: &str) -> Result<()> {
        let ground = &self.ground;
        let clients = [
            ('n', &ground.near),
            ('t', &self.twin),
            ('p', &ground.plain),
            ('o', &self.other),
        ];
        let servers = [
            ground.beside.at(PORT),
            ground.beside.at6(PORT),
            ground.far.at(PORT),
            ground.far.at6(PORT),
        ];
        settled(|| {
            for to in servers {
                let let_in: String = clients
                    .iter()
                    .filter(|(_, client)| served(client, to))
                    .map(|(initial, _)| *initial)
                    .collect();
                ensure!(
                    let_in == expected,
                    "{to} serves {let_in:?} instead of {expected:?}"
                );
            }
            Ok(())
        })
    }

    /// The same for whom `near` reaches.
    fn reaches(&self, service: &Service, outsider: &Pod, expected: &str) -> Result<()> {
        let ground = &self.ground;
        let ways = [
            ("far", [ground.far.at(PORT), ground.far.at6(PORT)]),
            ("service", [service.at(), service.at6()]),
            ("beside", [ground.beside.at(PORT), ground.beside.at6(PORT)]),
            ("outside", [outsider.at(PORT), outsider.at6(PORT)]),
        ];
        settled(|| {
            for family in 0..2 {
                let reached: Vec<_> = ways
                    .iter()
                    .filter(|(_, to)| served(&ground.near, to[family]))
                    .map(|(name, _)| *name)
                    .collect();
                let reached = reached.join(" ");
                ensure!(
                    reached == expected,
                    "near reaches {reached:?} instead of {expected:?}"
                );
            }
            Ok(())
        })
    }
}

fn settled(holds: impl Fn() -> Result<()>) -> Result<()> {
    wait::for_value("the policy is in force", IN_FORCE, || holds().map(Some))?;
    holds()
}

//! What people and Prometheus are shown: metrics, readiness, the access log, `debug`.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use picomesh_tests::{
    AgentOptions, client,
    server::{Habit, Server},
    wait,
};
use serde_json::Value;

use crate::{
    ground::{Ground, PATIENCE, PORT, served},
    harness::{Need, Test},
};

pub(crate) const TESTS: &[Test] = &[
    Test {
        name: "shown::both_ends_of_a_connection_are_counted_with_linkerds_and_istios_labels",
        needs: &[Need::Mesh],
        run: both_ends_of_a_connection_are_counted_with_linkerds_and_istios_labels,
    },
    Test {
        name: "shown::every_connection_has_one_line_in_the_access_log_of_each_end",
        needs: &[Need::Mesh],
        run: every_connection_has_one_line_in_the_access_log_of_each_end,
    },
    Test {
        name: "shown::debug_answers_people_and_programs",
        needs: &[Need::Mesh],
        run: debug_answers_people_and_programs,
    },
    Test {
        name: "shown::series_of_a_gone_pod_disappear",
        needs: &[Need::Mesh],
        run: series_of_a_gone_pod_disappear,
    },
];

fn both_ends_of_a_connection_are_counted_with_linkerds_and_istios_labels() -> Result<()> {
    const WORDS: &[u8] = b"twenty-four bytes or so.";
    let mut ground = Ground::new()?;
    let _server = Server::start(ground.far.netns(), PORT, Habit::Echo)?;
    ground.mesh_with(&AgentOptions::default().arg("--metrics", "linkerd,istio"))?;
    ensure!(ground.agent(0)?.get("/ready")?.0 == 200, "it is not ready");
    ensure!(ground.agent(0)?.get("/live")?.0 == 200, "it is not alive");
    let to = ground.service("far")?.at();
    let mut stream = ground.near.run(|| client::connect(to, PATIENCE))?;
    client::ping(&mut stream, WORDS)?;
    let (near, far) = (ground.near.spiffe_id(), ground.far.spiffe_id());
    let outbound = [
        ("direction", "outbound"),
        ("peer", "dst"),
        ("tls", "true"),
        ("namespace", "mesh"),
        ("pod", "near"),
        ("deployment", "near"),
        ("dst_deployment", "far"),
        ("dst_service", "far"),
    ];
    let inbound = [
        ("direction", "inbound"),
        ("peer", "src"),
        ("tls", "true"),
        ("namespace", "mesh"),
        ("pod", "far"),
        ("deployment", "far"),
    ];
    for (node, labels) in [(0, &outbound[..]), (1, &inbound[..])] {
        let agent = ground.agent(node)?;
        let is = |wanted: f64| move |value: f64| value == wanted;
        agent.wait_metric("tcp_open_total", labels, PATIENCE, is(1.0))?;
        agent.wait_metric("tcp_open_connections", labels, PATIENCE, is(1.0))?;
        let words = WORDS.len() as f64;
        agent.wait_metric("tcp_read_bytes_total", labels, PATIENCE, is(words))?;
        agent.wait_metric("tcp_write_bytes_total", labels, PATIENCE, is(words))?;
        let identities = [
            ("source_principal", near.as_str()),
            ("destination_principal", far.as_str()),
            ("connection_security_policy", "mutual_tls"),
        ];
        agent.wait_metric(
            "istio_tcp_connections_opened_total",
            &identities,
            PATIENCE,
            is(1.0),
        )?;
    }
    drop(stream);
    for (node, labels) in [(0, &outbound[..]), (1, &inbound[..])] {
        let agent = ground.agent(node)?;
        agent.wait_metric("tcp_close_total", labels, PATIENCE, |n| n == 1.0)?;
        agent.wait_metric("tcp_open_connections", labels, PATIENCE, |n| n == 0.0)?;
    }
    Ok(())
}

fn every_connection_has_one_line_in_the_access_log_of_each_end() -> Result<()> {
    const CONNECTIONS: usize = 50;
    let mut ground = Ground::new()?;
    let _server = Server::start(ground.far.netns(), PORT, Habit::Echo)?;
    ground.mesh_with(&AgentOptions::default().arg("--log-format", "json"))?;
    let to = ground.service("far")?.at();
    for _ in 0..CONNECTIONS {
        ensure!(served(&ground.near, to), "near is not served");
    }
    let bytes = "are you there?".len();
    for (node, direction) in [(0, "outbound"), (1, "inbound")] {
        let agent = ground.agent(node)?;
        let lines = wait::for_value("all lines are written", PATIENCE, || {
            let lines = access_lines(&agent.log(), direction);
            ensure!(lines.len() >= CONNECTIONS, "{} are", lines.len());
            Ok(Some(lines))
        })?;
        ensure!(
            lines.len() == CONNECTIONS,
            "{direction}: {} lines of {CONNECTIONS} connections",
            lines.len()
        );
        let mut by_source = BTreeMap::<&str, usize>::new();
        for line in &lines {
            let is = |field: &str, wanted: &str| -> Result<()> {
                ensure!(line[field] == wanted, "{field} is not {wanted}: {line}");
                Ok(())
            };
            is("src.identity", &ground.near.spiffe_id())?;
            is("dst.identity", &ground.far.spiffe_id())?;
            is("src.workload", "near")?;
            is("dst.workload", "far")?;
            is("dst.hbone_addr", &ground.far.at(PORT).to_string())?;
            ensure!(
                line["bytes_sent"] == bytes && line["bytes_recv"] == bytes,
                "{line}"
            );
            ensure!(line["error"].is_null(), "{line}");
            let source = line["src.addr"].as_str().context("src.addr")?;
            *by_source.entry(source).or_default() += 1;
        }
        ensure!(
            by_source.values().all(|lines| *lines == 1),
            "{direction}: a connection has two lines: {by_source:?}"
        );
    }
    Ok(())
}

fn debug_answers_people_and_programs() -> Result<()> {
    let mut ground = Ground::new()?;
    let _server = Server::start(ground.far.netns(), PORT, Habit::Echo)?;
    ground.mesh()?;
    ensure!(served(&ground.near, ground.far.at(PORT)), "near is refused");
    let agent = ground.agent(0)?;
    let (near, far) = (ground.near.spiffe_id(), ground.far.spiffe_id());
    for (subject, words) in [
        ("state", vec!["node0"]),
        ("pods", vec!["mesh/near", "mesh/beside", "captured"]),
        ("tunnels", vec![far.as_str()]),
        ("certificates", vec![near.as_str(), "ready"]),
        ("policies", vec!["mesh/near", "mesh/beside"]),
        ("log-level", vec!["info"]),
    ] {
        // Data threads tell of their tunnels once a second.
        wait::for_value(subject, PATIENCE, || {
            let table = agent.debug(&[subject])?.ok()?.stdout;
            let json = agent.debug_json(&[subject])?.to_string();
            for word in &words {
                ensure!(table.contains(word), "nothing of {word} in {table}");
                ensure!(json.contains(word), "nothing of {word} in {json}");
            }
            Ok(Some(()))
        })?;
    }
    agent.debug(&["log-level", "debug"])?.ok()?;
    ensure!(served(&ground.near, ground.far.at(PORT)), "near is refused");
    agent.wait_log(&["DEBUG"], PATIENCE)?;
    let refused = agent.debug(&["log-level", "loud"])?;
    ensure!(
        !refused.success(),
        "a level that is none is taken: {refused:?}"
    );
    Ok(())
}

fn series_of_a_gone_pod_disappear() -> Result<()> {
    let mut ground = Ground::new()?;
    let _server = Server::start(ground.far.netns(), PORT, Habit::Echo)?;
    ground.mesh()?;
    ensure!(served(&ground.near, ground.far.at(PORT)), "near is refused");
    let of_near = |ground: &Ground| -> Result<usize> {
        let metrics = ground.agent(0)?.metrics()?;
        let named = metrics.all().iter();
        Ok(named
            .filter(|s| s.labels.get("pod").is_some_and(|pod| pod == "near"))
            .count())
    };
    ensure!(of_near(&ground)? > 0, "control: near has no series");
    let manifest = ground.near.manifest(&picomesh_tests::PodSpec::new("near"));
    ground.world.manifests().delete(&manifest)?;
    wait::for_value("near's series disappear", 4 * PATIENCE, || {
        let left = of_near(&ground)?;
        ensure!(left == 0, "{left} are left");
        Ok(Some(()))
    })
}

fn access_lines(log: &str, direction: &str) -> Vec<Value> {
    log.lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|line| line["scope"] == "access" && line["direction"] == direction)
        .collect()
}

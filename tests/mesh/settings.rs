//! What a flag of `picomesh-agent run` changes, and that the rest stays as it is.

use anyhow::{Context, Result, ensure};
use picomesh_tests::{
    AgentOptions, Pod,
    agent::TUNNEL_PORT,
    client,
    hooks::Hooks,
    server::{Habit, Server},
    wait,
};

use crate::{
    ground::{Ground, PATIENCE, PORT, served},
    harness::{Need, Test},
};

pub(crate) const TESTS: &[Test] = &[
    Test {
        name: "settings::clsact_holds_what_tcx_does",
        needs: &[Need::Mesh],
        run: clsact_holds_what_tcx_does,
    },
    Test {
        name: "settings::hbone_goes_to_pods_own_addresses_if_asked",
        needs: &[Need::Mesh],
        run: hbone_goes_to_pods_own_addresses_if_asked,
    },
    Test {
        name: "settings::fail_open_passes_in_plain_while_no_agent_runs",
        needs: &[Need::Mesh],
        run: fail_open_passes_in_plain_while_no_agent_runs,
    },
];

const MARKER: &[u8] = b"words-that-a-setting-must-not-show";
const STRICT: (&str, &str) = (
    "config.picomesh.io/default-inbound-policy",
    "all-authenticated",
);

fn clsact_holds_what_tcx_does() -> Result<()> {
    let mut ground = Ground::with(|spec| spec.annotation(STRICT.0, STRICT.1))?;
    let _servers =
        [&ground.far, &ground.beside].map(|pod| Server::start(pod.netns(), PORT, Habit::WhoAmI));
    let options = AgentOptions::default().flag("--force-clsact");
    ground.mesh_with(&options)?;
    let holds = |ground: &Ground| -> Result<()> {
        for pod in [&ground.near, &ground.far] {
            let hooks = Hooks::of(pod.netns())?;
            ensure!(
                hooks.egress.is_empty() && hooks.ingress.is_empty(),
                "{} has programs at TCX: {hooks:?}",
                pod.name()
            );
            for direction in ["egress", "ingress"] {
                let filters = filters(pod, direction)?;
                ensure!(filters == 1, "{} has {filters} at {direction}", pod.name());
            }
        }
        for pod in [&ground.far, &ground.beside] {
            for ip in ground.addresses(pod) {
                let saw = ground
                    .near
                    .run(|| client::exchange((ip, PORT).into(), b"", PATIENCE))
                    .with_context(|| format!("{ip}"))?;
                let own = if ip.is_ipv4() {
                    ground.near.v4().to_string()
                } else {
                    ground.near.v6().to_string()
                };
                ensure!(saw == format!("{own}\n").as_bytes(), "{ip} saw {saw:?}");
            }
            let refused = ground
                .plain
                .run(|| client::exchange(pod.at(PORT), b"", PATIENCE));
            ensure!(refused.is_err(), "plain is let in by {}", pod.name());
        }
        Ok(())
    };
    holds(&ground)?;

    // The next agent finds its filters: not one more, not one less.
    for agent in &ground.agents {
        agent.kill9();
    }
    ground.mesh_with(&options)?;
    holds(&ground).context("after the agents were killed and started again")
}

fn hbone_goes_to_pods_own_addresses_if_asked() -> Result<()> {
    let mut ground = Ground::new()?;
    let _server = Server::start(ground.far.netns(), PORT, Habit::Echo)?;
    ground.mesh_with(&AgentOptions::default().flag("--hbone-to-pods"))?;
    let capture = ground.world.capture_wire(&[MARKER])?;
    for to in [ground.far.at(PORT), ground.far.at6(PORT)] {
        let answer = ground
            .near
            .run(|| client::exchange(to, MARKER, PATIENCE))
            .with_context(|| format!("{to}: {}", ground.logs()))?;
        ensure!(answer == MARKER, "{to} answers {answer:?}");
    }
    let seen = capture.stop()?;
    ensure!(seen.found[0] == 0, "in plain: {:?}", seen.found);
    let to = |at: std::net::SocketAddr| seen.tcp().filter(|t| t.dst == at).count();
    ensure!(
        to(ground.far.at(TUNNEL_PORT)) + to(ground.far.at6(TUNNEL_PORT)) > 0,
        "nothing went to the pod's own port {TUNNEL_PORT}"
    );
    let node = ground.world.node(1)?;
    let to_node = to((node.v4(), TUNNEL_PORT).into()) + to((node.v6(), TUNNEL_PORT).into());
    ensure!(
        to_node == 0,
        "{to_node} packets went to the node all the same"
    );
    Ok(())
}

fn fail_open_passes_in_plain_while_no_agent_runs() -> Result<()> {
    let mut ground = Ground::new()?;
    let _server = Server::start(ground.far.netns(), PORT, Habit::Echo)?;
    ground.mesh_with(&AgentOptions::default().flag("--fail-open"))?;
    let to = ground.far.at(PORT);
    let mutual = [("direction", "outbound"), ("tls", "true")];
    let say = |ground: &Ground| -> Result<u64> {
        let capture = ground.world.capture_wire(&[MARKER])?;
        let answer = ground.near.run(|| client::exchange(to, MARKER, PATIENCE))?;
        ensure!(answer == MARKER, "{to} answers {answer:?}");
        Ok(capture.stop()?.found[0])
    };
    ensure!(say(&ground)? == 0, "in plain while the agents run");
    for agent in &ground.agents {
        agent.kill9();
    }
    ensure!(
        say(&ground).context("without agents")? > 0,
        "nothing was seen in plain"
    );
    ground.mesh_with(&AgentOptions::default().flag("--fail-open"))?;
    wait::for_value("the mesh carries it again", PATIENCE, || {
        let before = ground.opened(0, &mutual)?;
        ensure!(served(&ground.near, to), "near is not served");
        Ok((ground.opened(0, &mutual)? > before).then_some(()))
    })?;
    ensure!(say(&ground)? == 0, "in plain although agents run again");
    Ok(())
}

/// Programs at one direction of clsact.
fn filters(pod: &Pod, direction: &str) -> Result<usize> {
    let shown = pod
        .output(
            "tc",
            &["filter", "show", "dev", "eth0", direction],
            PATIENCE,
        )?
        .ok()?
        .stdout;
    Ok(shown.matches("direct-action").count())
}

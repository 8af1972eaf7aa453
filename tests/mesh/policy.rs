//! Policy through real sockets: who is let in, who is not, and what a change does to connections
//! that are open.

mod decisions;

use std::{
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use picomesh_tests::{
    Pod, PodSpec,
    client::{self, End},
    manifest, requirements,
    server::{Habit, Server},
    wait,
};

use crate::{
    ground::{Ground, PATIENCE, PORT, served},
    harness::{Need, Test},
};

pub(crate) const TESTS: &[Test] = &[
    Test {
        name: "policy::the_default_serves_everybody",
        needs: &[Need::Mesh],
        run: the_default_serves_everybody,
    },
    Test {
        name: "policy::all_authenticated_refuses_who_has_no_identity",
        needs: &[Need::Mesh],
        run: all_authenticated_refuses_who_has_no_identity,
    },
    Test {
        name: "policy::deny_refuses_everybody_but_the_hosts_probe",
        needs: &[Need::Mesh],
        run: deny_refuses_everybody_but_the_hosts_probe,
    },
    Test {
        name: "policy::a_change_closes_what_it_forbids_within_a_second",
        needs: &[Need::Mesh],
        run: a_change_closes_what_it_forbids_within_a_second,
    },
    Test {
        name: "policy::a_change_leaves_what_it_still_allows",
        needs: &[Need::Mesh],
        run: a_change_leaves_what_it_still_allows,
    },
    Test {
        name: "policy::default_modes_decide_on_every_way",
        needs: &[Need::Mesh],
        run: decisions::default_modes_decide_on_every_way,
    },
    Test {
        name: "policy::servers_and_their_authorizations_decide_on_every_way",
        needs: &[Need::Mesh],
        run: decisions::servers_and_their_authorizations_decide_on_every_way,
    },
    Test {
        name: "policy::authorization_policies_decide_on_every_way",
        needs: &[Need::Mesh],
        run: decisions::authorization_policies_decide_on_every_way,
    },
    Test {
        name: "policy::audit_lets_in_and_tells",
        needs: &[Need::Mesh],
        run: decisions::audit_lets_in_and_tells,
    },
];

const DEFAULT: &str = "config.picomesh.io/default-inbound-policy";

fn the_default_serves_everybody() -> Result<()> {
    let mut ground = Ground::new()?;
    let _servers =
        [&ground.beside, &ground.far].map(|pod| Server::start(pod.netns(), PORT, Habit::Echo));
    ground.mesh()?;
    for server in [&ground.beside, &ground.far] {
        for client in [&ground.near, &ground.plain] {
            ensure!(
                served(client, server.at(PORT)),
                "{} is not served by {}",
                client.name(),
                server.name()
            );
        }
    }
    Ok(())
}

fn all_authenticated_refuses_who_has_no_identity() -> Result<()> {
    fn strict(spec: PodSpec) -> PodSpec {
        spec.annotation(DEFAULT, "all-authenticated")
    }
    let mut ground = Ground::with(strict)?;
    let _servers =
        [&ground.beside, &ground.far].map(|pod| Server::start(pod.netns(), PORT, Habit::Echo));
    for server in [&ground.beside, &ground.far] {
        ensure!(
            served(&ground.plain, server.at(PORT)),
            "control: without the mesh {} serves nobody",
            server.name()
        );
    }
    ground.mesh()?;
    for server in [&ground.beside, &ground.far] {
        let to = server.at(PORT);
        ensure!(
            served(&ground.near, to),
            "near is refused by {}",
            server.name()
        );
        ensure!(
            !served(&ground.plain, to),
            "plain is served by {}",
            server.name()
        );
    }
    let denied = [("direction", "inbound"), ("tls", "no_identity")];
    ground
        .agent(1)?
        .wait_metric("inbound_tcp_authz_deny_total", &denied, PATIENCE, |n| {
            n > 0.0
        })?;
    Ok(())
}

fn deny_refuses_everybody_but_the_hosts_probe() -> Result<()> {
    fn closed(spec: PodSpec) -> PodSpec {
        spec.annotation(DEFAULT, "deny")
    }
    let mut ground = Ground::with(closed)?;
    let _server = Server::start(ground.far.netns(), PORT, Habit::Echo)?;
    let to = ground.far.at(PORT);
    ensure!(
        served(&ground.near, to),
        "control: without the mesh near is refused"
    );
    ground.mesh()?;
    let node = ground.world.node(1)?;
    for round in 0..3 {
        ensure!(!served(&ground.near, to), "round {round}: near is served");
        ensure!(!served(&ground.plain, to), "round {round}: plain is served");
        let answer = node
            .run(|| client::exchange(to, b"probe", PATIENCE))
            .with_context(|| format!("round {round}: a probe of the host"))?;
        ensure!(answer == b"probe", "the probe got {answer:?}");
    }
    Ok(())
}

fn a_change_closes_what_it_forbids_within_a_second() -> Result<()> {
    let mut ground = Ground::new()?;
    let _servers =
        [&ground.beside, &ground.far].map(|pod| Server::start(pod.netns(), PORT, Habit::Echo));
    ground.mesh()?;
    let ways = |ground: &Ground| -> Vec<(&'static str, Pod, SocketAddr)> {
        let (near, plain) = (&ground.near, &ground.plain);
        let mut ways = vec![
            ("by tunnel", near.clone(), ground.far.at(PORT)),
            ("by tunnel", near.clone(), ground.far.at6(PORT)),
            ("on one node", near.clone(), ground.beside.at(PORT)),
            (
                "plainly, from node to node",
                plain.clone(),
                ground.far.at(PORT),
            ),
            (
                "plainly, on one node",
                plain.clone(),
                ground.beside.at6(PORT),
            ),
        ];
        ways.retain(|(_, _, to)| to.is_ipv4() || requirements::ipv6());
        ways
    };
    // What changes, and whom it leaves alone.
    let far = manifest::server("mesh", "far", &[("app", "far")], PORT, Some("deny"));
    let beside = manifest::server("mesh", "beside", &[("app", "beside")], PORT, Some("deny"));
    let mut open = Vec::new();
    for (how, from, to) in ways(&ground) {
        let stream = connected(&from, to).with_context(|| format!("{how}: {to}"))?;
        open.push((how, to, stream));
    }

    ground.world.manifests().apply(&far)?;
    ground.world.manifests().apply(&beside)?;
    let changed = Instant::now();
    for (how, to, stream) in &mut open {
        let end = client::read_to_end(stream, PATIENCE)?;
        let took = changed.elapsed();
        ensure!(
            matches!(end, End::Reset { .. }),
            "{how} to {to}: after {took:?} it is told {end:?}"
        );
        ensure!(
            took < wait::patience(Duration::from_secs(1)),
            "{how} to {to}: it was closed after {took:?}"
        );
    }
    for (how, from, to) in ways(&ground) {
        ensure!(!served(&from, to), "{how}: a new connection is let in");
    }
    for object in [&far, &beside] {
        ground.world.manifests().delete(object)?;
    }
    wait::until("all are served again", PATIENCE, || {
        ways(&ground).iter().all(|(_, from, to)| served(from, *to))
    })
}

fn a_change_leaves_what_it_still_allows() -> Result<()> {
    let mut ground = Ground::new()?;
    let _server = Server::start(ground.far.netns(), PORT, Habit::Echo)?;
    ground.mesh()?;
    let to = ground.far.at(PORT);
    let mut allowed = connected(&ground.near, to)?;
    let mut forbidden = connected(&ground.beside, to)?;

    let server = manifest::server("mesh", "far", &[("app", "far")], PORT, Some("deny"));
    let near_alone = serde_json::json!({"meshTLS": {"serviceAccounts": [{"name": "near"}]}});
    let grant = manifest::server_authorization("mesh", "far", "far", near_alone);
    ground
        .world
        .manifests()
        .write("far.yaml", &[server, grant])?;

    let end = client::read_to_end(&mut forbidden, PATIENCE)?;
    ensure!(
        matches!(end, End::Reset { .. }),
        "what is forbidden now is told {end:?}"
    );
    client::ping(&mut allowed, b"still").context("what is allowed as before")
}

fn connected(from: &Pod, to: SocketAddr) -> Result<TcpStream> {
    let mut stream = from.run(|| client::connect(to, PATIENCE))?;
    client::ping(&mut stream, b"open")?;
    Ok(stream)
}

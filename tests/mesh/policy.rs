//! Policy through real sockets: who is let in, who is not, and what a change does to connections
//! that are open.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use picomesh_tests::{
    PodSpec,
    client::{self, End},
    manifest,
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
    let _server = Server::start(ground.far.netns(), PORT, Habit::Echo)?;
    ground.mesh()?;
    let to = ground.far.at(PORT);
    let mut stream = ground.near.run(|| client::connect(to, PATIENCE))?;
    client::ping(&mut stream, b"open")?;
    let rule = manifest::server("mesh", "far", &[("app", "far")], PORT, Some("deny"));
    ground.world.manifests().apply(&rule)?;
    let changed = Instant::now();
    let end = client::read_to_end(&mut stream, PATIENCE)?;
    let took = changed.elapsed();
    ensure!(
        matches!(end, End::Reset { .. } | End::Closed { .. }),
        "the connection is still open after {took:?}"
    );
    ensure!(
        took < Duration::from_secs(1),
        "it was closed after {took:?}"
    );
    ensure!(!served(&ground.near, to), "a new connection is let in");
    ground.world.manifests().delete(&rule)?;
    wait::until("near is served again", PATIENCE, || {
        served(&ground.near, to)
    })
}

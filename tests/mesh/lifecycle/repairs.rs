//! A container with NET_ADMIN can take its own capture apart. The agent compares the kernel with
//! what should be, and mends it.

use std::{fs, time::Duration};

use anyhow::{Context, Result, ensure};
use picomesh_tests::{
    Agent, Pod,
    hooks::Hooks,
    server::{Habit, Server},
    wait,
};

use crate::ground::{Ground, PATIENCE, PORT, served};

const REPAIR: Duration = Duration::from_secs(30);

pub(super) fn what_a_container_undoes_is_put_back() -> Result<()> {
    let mut ground = Ground::new()?;
    let _server = Server::start(ground.far.netns(), PORT, Habit::Echo)?;
    ground.mesh()?;
    let (near, beside, far) = (&ground.near, &ground.beside, &ground.far);
    let (first, second) = (ground.agent(0)?, ground.agent(1)?);

    near.netns().ip("link del mesh0")?;
    for family in ["-4", "-6"] {
        let rule = [family, "rule", "del", "preference", "1"];
        beside.output("ip", &rule, PATIENCE)?.ok()?;
    }
    let pins = pins_of(&ground, second, far)?;
    let before = Hooks::of(far.netns())?.steer;
    fs::remove_file(pins.join("steer")).context("remove the pin of sk_lookup")?;
    // The kernel takes its time to let a link go that nobody holds any more.
    wait::for_value(
        "without its pin the program steers no more",
        PATIENCE,
        || Ok((Hooks::of(far.netns())?.steer != before).then_some(())),
    )?;

    for (agent, pod) in [(first, near), (first, beside), (second, far)] {
        wait::for_value(&format!("{} is repaired", pod.name()), REPAIR, || {
            let status = agent.pod_status(pod)?;
            let mended = status["repairs"].as_u64().unwrap_or(0) > 0;
            ensure!(mended && status["state"] == "captured", "it is {status}");
            Ok(Some(()))
        })?;
        let hooks = Hooks::of(pod.netns())?;
        ensure!(hooks.are_single(), "{} has {hooks:?}", pod.name());
    }
    let outbound = [("direction", "outbound"), ("tls", "true")];
    for client in [near, beside] {
        let before = ground.opened(0, &outbound)?;
        for to in [far.at(PORT), far.at6(PORT)] {
            ensure!(
                served(client, to),
                "after its repair {} is not served at {to}",
                client.name()
            );
        }
        ensure!(
            ground.opened(0, &outbound)? >= before + 2.0,
            "after its repair {} goes past the mesh",
            client.name()
        );
    }
    Ok(())
}

/// Where the links and programs of one pod are pinned.
fn pins_of(ground: &Ground, agent: &Agent, pod: &Pod) -> Result<std::path::PathBuf> {
    let slot = agent.pod_status(pod)?["slot"]
        .as_u64()
        .context("a captured pod has a slot")?;
    let layouts = ground.world.bpf_dir(agent.node());
    fs::read_dir(&layouts)?
        .flatten()
        .map(|layout| layout.path().join("pods").join(slot.to_string()))
        .find(|dir| dir.is_dir())
        .with_context(|| format!("no pins of slot {slot} below {}", layouts.display()))
}

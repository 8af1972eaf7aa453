//! Whose namespace a pod gets: never the host's, never a neighbour's.

use anyhow::{Result, ensure};
use picomesh_tests::{
    PodSpec, World, client,
    server::{Habit, Server},
};

use super::{PATIENCE, PORT};

pub(super) fn an_annotation_gives_nobody_anothers_namespace() -> Result<()> {
    let world = World::new(1)?;
    world.namespace("mesh", Some("enabled"))?;
    let node = world.node(0)?;
    let victim = world.pod(&PodSpec::new("victim"))?;
    let _server = Server::start(victim.netns(), PORT, Habit::Echo)?;
    let agent = world.start_agent(&node)?;
    agent.wait_captured(&victim, 4 * PATIENCE)?;

    // Three ways to name a namespace that is not the pod's own.
    let by_name = node.netns().path().to_string_lossy().into_owned();
    let by_process = format!("/proc/{}/ns/net", agent.process().pid());
    let neighbour = victim.netns().path().to_string_lossy().into_owned();
    for (name, path, reason) in [
        ("of-host", by_name, "netns_of_host"),
        ("of-agent", by_process, "netns_of_host"),
        ("of-neighbour", neighbour, "netns_taken"),
    ] {
        let labels = [("state", "failed"), ("reason", reason)];
        let failed = agent.metrics()?.sum("picomesh_pods", &labels);
        let spec = PodSpec::new(name).annotation("picomesh.io/netns", &path);
        let thief = world.pod(&spec)?;
        agent.wait_pod_state(&thief, &["failed"], 2 * PATIENCE)?;
        let status = agent.pod_status(&thief)?;
        ensure!(
            status["reason"].to_string().contains(reason),
            "{name} failed, but not for {reason}: {status}"
        );
        agent.wait_metric("picomesh_pods", &labels, PATIENCE, |now| {
            now == failed + 1.0
        })?;
        agent.wait_log(&[reason, name], PATIENCE)?;

        // With its own it is a pod like any other.
        let own = thief.netns().path().to_string_lossy().into_owned();
        world.manifests().edit("pod", "mesh", name, |pod| {
            pod["metadata"]["annotations"]["picomesh.io/netns"] = own.into();
        })?;
        agent.wait_captured(&thief, 8 * PATIENCE)?;
        agent.wait_metric("picomesh_pods", &labels, PATIENCE, |now| now == failed)?;
    }

    // Nothing of it has touched the host or the victim.
    let devices = node.netns().proc_net("dev")?;
    ensure!(!devices.contains("mesh0"), "the node has a device of ours");
    ensure!(
        agent.pod_status(&victim)?["state"] == "captured",
        "the victim is no longer captured"
    );
    let answer = node.run(|| client::exchange(victim.at(PORT), b"still there?", PATIENCE))?;
    ensure!(answer == b"still there?", "the victim does not serve");
    Ok(())
}

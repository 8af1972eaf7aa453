//! What a pod's author writes of network namespaces is for local mode, and nothing on a cluster.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use picomesh_tests::{Netns, cluster::TOOLS, hooks::Hooks};
use serde_json::json;

use crate::{
    ground::{Namespace, Need, Test, ground},
    install::{diagnosis, wait_captured},
    talk::{PORT, SLEEP, Scene, both, wire},
};

pub(crate) const TESTS: &[Test] = &[Test {
    name: "netns::a_pod_that_names_another_namespace_is_captured_in_its_own",
    needs: &[Need::Nodes, Need::Image],
    run: a_pod_that_names_another_namespace_is_captured_in_its_own,
}];

/// The machine's.
const ANOTHER: &str = "/proc/1/ns/net";

fn a_pod_that_names_another_namespace_is_captured_in_its_own() -> Result<()> {
    let ground = ground()?;
    let cluster = ground.own()?;
    let [near, _] = both(cluster)?;
    let machine = Netns::of_process(std::process::id().try_into()?)?;
    let before = seen_in(&machine)?;
    let scene = Scene::new(&ground, "netns")?;
    let outside = ground.namespace("netns-outside")?;
    for space in [&scene.space, &outside] {
        liar(space, near.name())?;
        space.wait_ready("liar")?;
    }
    // One before the mesh, one now: only the one that the namespace's label takes in.
    wait_captured(&ground, 3).with_context(|| diagnosis(&ground))?;

    let meshed = scene.space.netns(cluster, "liar")?;
    let hooks = Hooks::of(&meshed)?;
    ensure!(hooks.are_single(), "its own namespace has {hooks:?}");
    let plain = outside.netns(cluster, "liar")?;
    let hooks = Hooks::of(&plain)?;
    ensure!(hooks.are_empty(), "outside of the mesh there is {hooks:?}");
    let after = seen_in(&machine)?;
    ensure!(
        before == after,
        "the machine's own namespace has changed from {before} to {after}"
    );

    // What it says is carried; the control is the same words of the one outside.
    let words = ["picomesh-liar-in-the-mesh", "picomesh-liar-outside"];
    let capture = wire(cluster, &words.map(str::as_bytes))?;
    let (host, port) = (scene.at[1].ip().to_string(), PORT.to_string());
    for (space, word) in [&scene.space, &outside].into_iter().zip(words) {
        let script = format!("echo {word} | nc -w 5 {host} {port}");
        let answer = space.exec("liar", &["/bin/sh", "-c", &script])?;
        ensure!(answer.contains(word), "the echo is {answer:?}");
    }
    let found = capture.stop()?.found;
    ensure!(found[1] > 0, "the capture finds nothing");
    ensure!(found[0] == 0, "{} packets can be read", found[0]);
    Ok(())
}

fn liar(space: &Namespace, node: &str) -> Result<()> {
    space.apply(json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "liar", "annotations": {"picomesh.io/netns": ANOTHER}},
        "spec": {
            "nodeName": node,
            "terminationGracePeriodSeconds": 1,
            "containers": [{
                "name": "main", "image": TOOLS, "imagePullPolicy": "Never", "command": SLEEP,
            }],
        },
    }))
}

/// Rules and devices of ours would be among them.
fn seen_in(netns: &Netns) -> Result<String> {
    let mut seen = String::new();
    for args in [&["-4", "rule"][..], &["-br", "link"]] {
        let output = netns.run(|| Command::new("ip").args(args).output())?;
        ensure!(output.status.success(), "ip {} failed", args.join(" "));
        seen.push_str(&String::from_utf8_lossy(&output.stdout));
    }
    Ok(seen)
}

//! What a pod had is had by another in the next moment: its sandbox by itself, its address by
//! somebody else.

use std::net::{IpAddr, Ipv4Addr};

use anyhow::{Context, Result, ensure};
use picomesh_tests::{
    cluster::{Node, TOOLS},
    crowd::WORD,
    wait,
};
use serde_json::json;

use crate::{
    ground::{Namespace, Need, PATIENCE, Test, ground, slowly},
    install::{OwnPod, diagnosis, end_processes, log_of, wait_captured},
    talk::{Scene, both, identity, wait_told, wire},
};

pub(crate) const TESTS: &[Test] = &[Test {
    name: "reborn::a_sandbox_made_again_is_in_the_mesh_and_an_address_is_its_new_owners",
    needs: &[Need::Full, Need::Nodes, Need::Image],
    run: a_sandbox_made_again_is_in_the_mesh_and_an_address_is_its_new_owners,
}];

/// What is said outside of the mesh.
const PLAIN: &str = "picomesh-test-heir-in-plain";
/// Where the plugin `host-local` writes down what it gave last; the node's own.
const LAST_GIVEN: &str = "/var/lib/cni/networks/pods/last_reserved_ip.0";

fn a_sandbox_made_again_is_in_the_mesh_and_an_address_is_its_new_owners() -> Result<()> {
    let ground = ground()?;
    let cluster = ground.own()?;
    let [near, far] = both(cluster)?;
    let scene = Scene::new(&ground, "reborn")?;
    let outside = ground.namespace("reborn-outside")?;
    let word = String::from_utf8_lossy(WORD).into_owned();
    let own = identity(&scene.space, "default");
    let told = |address: &str, pod: &str| {
        vec![
            format!("src.addr={address}:"),
            format!("src.workload=\"{pod}\""),
            format!("src.identity=\"{own}\""),
        ]
    };

    // The same pod in a sandbox that its node makes anew.
    let capture = wire(cluster, &[WORD, PLAIN.as_bytes()])?;
    calls(&scene, &scene.space, "again", near, &word)?;
    wait_captured(&ground, 3).with_context(|| diagnosis(&ground))?;
    let first = address(&scene.space, "again")?;
    wait_told(&ground, far.name(), &[told(&first.to_string(), "again")])?;
    let pod = own_pod(&scene.space, "again")?;
    let killed = end_processes(&ground, &pod)?;
    ensure!(killed > 0, "the pod had no process to kill");
    let second = wait::for_value("the pod has another sandbox", PATIENCE, || {
        let now = slowly(address(&scene.space, "again"))?;
        slowly(
            (now != first)
                .then_some(now)
                .context("it has its old address"),
        )
        .map(Some)
    })?;
    scene.space.wait_ready("again")?;
    ensure!(own_pod(&scene.space, "again")? == pod, "it is another pod");
    wait_captured(&ground, 3).with_context(|| diagnosis(&ground))?;
    wait_told(&ground, far.name(), &[told(&second.to_string(), "again")])?;

    // Its address is somebody's who is not in the mesh: it has no identity, and is not captured.
    gone(&scene.space, "again")?;
    gives_next(near, second)?;
    calls(&scene, &outside, "heir", near, PLAIN)?;
    let inherited = address(&outside, "heir")?;
    ensure!(
        inherited == second,
        "the heir has {inherited}, not {second}"
    );
    capture.wait_found(1, PATIENCE)?;
    let line = wait::for_value("the heir is told of", PATIENCE, || {
        let log = slowly(log_of(&ground, far.name()))?;
        let line = log.lines().find(|line| {
            line.contains(&format!("src.addr={second}:")) && line.contains("src.workload=\"heir\"")
        });
        slowly(line.map(str::to_owned).context("no line has it")).map(Some)
    })?;
    ensure!(
        !line.contains("src.identity"),
        "the heir of an address has an identity: {line}"
    );
    wait_captured(&ground, 2).with_context(|| diagnosis(&ground))?;

    // And once more somebody's who is, from its first connection on.
    gone(&outside, "heir")?;
    gives_next(near, second)?;
    calls(&scene, &scene.space, "back", near, &word)?;
    let back = address(&scene.space, "back")?;
    ensure!(back == second, "it has {back}, not {second}");
    wait_told(&ground, far.name(), &[told(&second.to_string(), "back")])?;
    wait_captured(&ground, 3).with_context(|| diagnosis(&ground))?;
    gone(&scene.space, "back")?;

    let seen = capture.stop()?.found[0];
    ensure!(seen == 0, "{seen} packets between the nodes can be read");
    wait_captured(&ground, 2).with_context(|| diagnosis(&ground))?;
    scene.is_read_outside_of_the_mesh(&ground)
}

/// A pod that says `word` to the far pod again and again, and whose node starts it again.
fn calls(scene: &Scene, space: &Namespace, name: &str, node: &Node, word: &str) -> Result<()> {
    let far = scene.at[1];
    let script = format!(
        "while true; do echo {word} | nc -w 2 {} {} > /dev/null; sleep 0.2; done",
        far.ip(),
        far.port()
    );
    space.apply(json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name},
        "spec": {
            "nodeName": node.name(),
            "restartPolicy": "Always",
            "terminationGracePeriodSeconds": 1,
            "enableServiceLinks": false,
            "containers": [{
                "name": "main", "image": TOOLS, "imagePullPolicy": "Never",
                "command": ["/bin/sh", "-c", script],
            }],
        },
    }))?;
    space.wait_ready(name)
}

fn own_pod(space: &Namespace, name: &str) -> Result<OwnPod> {
    let uid = space.get(&["pod", name])?["metadata"]["uid"].clone();
    Ok(OwnPod {
        name: name.to_owned(),
        uid: uid.as_str().context("no uid")?.to_owned(),
    })
}

fn address(space: &Namespace, pod: &str) -> Result<Ipv4Addr> {
    let addresses = space.addresses(pod)?;
    let first = addresses.first().context("it has no address")?;
    match first.parse() {
        Ok(IpAddr::V4(address)) => Ok(address),
        _ => anyhow::bail!("{pod} has no IPv4 address but {first}"),
    }
}

/// Until its kubelet has taken everything down, its address with it.
fn gone(space: &Namespace, pod: &str) -> Result<()> {
    space.kubectl(&["delete", "pod", pod]).map(drop)
}

/// The next pod of the node has this address.
fn gives_next(node: &Node, address: Ipv4Addr) -> Result<()> {
    let before = Ipv4Addr::from(u32::from(address) - 1);
    let script = format!("test -f {LAST_GIVEN} && printf %s {before} > {LAST_GIVEN}");
    node.run(&["sh", "-ec", &script]).map(drop)
}

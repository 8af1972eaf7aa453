//! From its first packet on a pod of the mesh is in the mesh, and where that cannot be it does not
//! start.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use picomesh_tests::{cluster::TOOLS, wait};
use serde_json::{Value, json};

use crate::{
    ground::{self, Ground, Namespace, Need, PATIENCE, Test, ground, items, slowly, url},
    install::{Installed, Part, Placement, diagnosis, log_of, wait_captured, wait_installed},
    talk::{MARKER, PORT, both, identity, label, server, wait_told, wire},
};

pub(crate) const TESTS: &[Test] = &[
    Test {
        name: "start::the_first_thing_that_new_pods_do_is_done_in_the_mesh",
        needs: &[Need::Nodes, Need::Image],
        run: the_first_thing_that_new_pods_do_is_done_in_the_mesh,
    },
    Test {
        name: "start::without_an_agent_pods_of_the_mesh_wait_and_all_others_start",
        needs: &[Need::Nodes, Need::Image],
        run: without_an_agent_pods_of_the_mesh_wait_and_all_others_start,
    },
];

/// Pods that start one after the other, and pods that wait for an agent: the kubelet tries each of
/// them again and again.
const MANY: usize = 50;

fn the_first_thing_that_new_pods_do_is_done_in_the_mesh() -> Result<()> {
    let ground = ground()?;
    let cluster = ground.own()?;
    cluster.import_archive(&ground::image()?)?;
    let [near, far] = both(cluster)?;
    let (space, outside) = (
        ground.namespace("start")?,
        ground.namespace("start-outside")?,
    );
    let _installed = Installed::new(ground.kubectl(), Part::All)?;
    wait_installed(&ground).with_context(|| diagnosis(&ground))?;
    label(&space, "enabled")?;
    server(&space, "server", far.name())?;
    space.wait_ready("server")?;
    wait_captured(&ground, 1).with_context(|| diagnosis(&ground))?;
    let address = space.addresses("server")?.remove(0);

    // The control: the same outside of the mesh.
    let seen = first_words(&ground, &outside, near.name(), &address, 2)?;
    ensure!(seen >= 2, "of two pods in plain {seen} packets were found");

    let seen = first_words(&ground, &space, near.name(), &address, MANY)
        .with_context(|| diagnosis(&ground))?;
    ensure!(seen == 0, "{seen} packets of {MANY} new pods can be read");
    let pods: Vec<_> = (0..MANY)
        .map(|index| {
            vec![
                format!("src.workload=\"{}\"", first(index)),
                format!("src.identity=\"{}\"", identity(&space, "default")),
                format!("dst.identity=\"{}\"", identity(&space, "server")),
                "direction=\"outbound\"".to_owned(),
            ]
        })
        .collect();
    wait_told(&ground, near.name(), &pods)
}

fn first(index: usize) -> String {
    format!("first{index}")
}

/// Packets between the nodes that can be read, of pods that are made one after the other, call
/// `address` first of all, and end.
fn first_words(
    ground: &Ground,
    space: &Namespace,
    node: &str,
    address: &str,
    pods: usize,
) -> Result<u64> {
    let capture = wire(ground.own()?, &[MARKER.as_bytes()])?;
    for index in 0..pods {
        space.apply(caller(&first(index), node, address))?;
    }
    space.wait_all("calls=at-once", "jsonpath={.status.phase}=Succeeded")?;
    Ok(capture.stop()?.found[0])
}

/// A pod whose first and only action is a request, that carries the marker and its own name.
fn caller(name: &str, node: &str, address: &str) -> Value {
    let url = format!("{}{MARKER}-of-{name}/", url(address, PORT));
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "labels": {"calls": "at-once"}},
        "spec": {
            "nodeName": node,
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 1,
            "enableServiceLinks": false,
            "containers": [{
                "name": "main", "image": TOOLS, "imagePullPolicy": "Never",
                "command": ["curl", "-sS", "--fail", "--max-time", "20", url],
            }],
        },
    })
}

fn without_an_agent_pods_of_the_mesh_wait_and_all_others_start() -> Result<()> {
    let ground = ground()?;
    let cluster = ground.own()?;
    cluster.import_archive(&ground::image()?)?;
    let [near, far] = both(cluster)?;
    let (space, outside) = (ground.namespace("wait")?, ground.namespace("wait-outside")?);
    let placement = Placement::new(&ground)?;
    let _installed = Installed::new(ground.kubectl(), Part::All)?;
    placement.rules()?;
    wait_installed(&ground).with_context(|| diagnosis(&ground))?;
    label(&space, "enabled")?;
    server(&space, "server", far.name())?;
    space.wait_ready("server")?;
    wait_captured(&ground, 1).with_context(|| diagnosis(&ground))?;
    let address = space.addresses("server")?.remove(0);
    let whole = "so it waits for the agent";
    let known = format!("namespace {} is in the mesh", space.name());
    wait_intent(&ground, space.name())?;

    let withdrawn = placement.take(near.name())?;
    // As k3s and flannel do at every start of a node, long before an agent is there.
    near.run(&[
        "sh",
        "-c",
        "cd /etc/cni/net.d && list=$(cat 10-pods.conflist) && printf %s \"$list\" > 10-pods.conflist",
    ])?;
    let names = ["waits", "joins", "goes"];
    let markers = names.map(|name| format!("{MARKER}-of-{name}"));
    let markers: Vec<&[u8]> = markers.iter().map(String::as_bytes).collect();
    let capture = wire(cluster, &markers)?;
    let waits = |index: usize| format!("waits{index}");
    for index in 0..MANY {
        space.apply(caller(&waits(index), near.name(), &address))?;
    }
    let mut joins = caller("joins", near.name(), &address);
    joins["metadata"]["annotations"] = json!({"picomesh.io/mesh": "enabled"});
    outside.apply(joins)?;
    outside.apply(caller("goes", near.name(), &address))?;

    // Nobody else is held up, and that is the capture's control.
    outside.wait_succeeded("goes")?;
    capture.wait_found(2, Duration::from_secs(5))?;
    says_why(&space, &waits(0), &[whole, &known])?;
    says_why(&space, &waits(MANY - 1), &[whole, &known])?;
    says_why(&outside, "joins", &[whole, "its own annotation says so"])?;
    for (space, pods) in [(&space, MANY), (&outside, 1)] {
        let pending = ["pods", "--field-selector=status.phase=Pending"];
        let pending = items(&space.get(&pending)?).count();
        ensure!(
            pending == pods,
            "without an agent {pending} of {pods} pods of {} wait",
            space.name()
        );
    }

    withdrawn.give_back().with_context(|| diagnosis(&ground))?;
    space
        .wait_all("calls=at-once", "jsonpath={.status.phase}=Succeeded")
        .with_context(|| refusals(&ground))?;
    outside.wait_succeeded("joins")?;
    let seen = capture.stop()?;
    ensure!(
        seen.found[..2] == [0, 0],
        "packets of waits and joins that can be read: {:?}",
        seen.found
    );
    let all = (0..MANY).map(|index| (&space, waits(index)));
    let all = all.chain([(&outside, "joins".to_owned())]);
    let told = all.map(|(from, pod)| {
        vec![
            format!("src.workload=\"{pod}\""),
            format!("src.identity=\"{}\"", identity(from, "default")),
            format!("dst.identity=\"{}\"", identity(&space, "server")),
        ]
    });
    wait_told(&ground, near.name(), &told.collect::<Vec<_>>())
}

/// What the agents have refused.
fn refusals(ground: &Ground) -> String {
    let mut told = String::new();
    for node in ground.nodes().unwrap_or_default() {
        let log = log_of(ground, &node).unwrap_or_else(|e| format!("{e:#}"));
        let refused = log.lines().filter(|line| line.contains(" error=\""));
        told.extend(refused.map(|line| format!("{node}: {line}\n")));
    }
    told
}

/// Until the plugin of every node would know the namespace without its agent.
fn wait_intent(ground: &Ground, namespace: &str) -> Result<()> {
    let quoted = format!("\"{namespace}\"");
    for node in ground.own()?.nodes() {
        let what = format!("{} has written down {namespace}", node.name());
        wait::for_value(&what, PATIENCE, || {
            let intent = slowly(node.run(&["cat", "/var/lib/picomesh/cni.json"]))?;
            slowly(intent.contains(&quoted).then_some(()).context(intent)).map(Some)
        })?;
    }
    Ok(())
}

/// To whoever looks at the pod.
fn says_why(space: &Namespace, pod: &str, words: &[&str]) -> Result<()> {
    wait::for_value(&format!("{pod} says why it waits"), PATIENCE, || {
        let described = slowly(space.kubectl(&["describe", "pod", pod]))?;
        let all = words.iter().all(|word| described.contains(word));
        slowly(all.then_some(()).context(described)).map(Some)
    })
}

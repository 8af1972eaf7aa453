//! A node that has mounted no bpffs gets one with its first agent, and is a node like any other.
//!
//! The far node of the shared cluster is one: everything else that is tested runs on it, too.

use anyhow::{Context, Result, ensure};
use picomesh_tests::cluster::Node;

use crate::{
    ground::{Need, Test, ground},
    install::{Part, diagnosis, wait_captured},
    talk::{Scene, both, label},
};

pub(crate) const TESTS: &[Test] = &[Test {
    name: "bpffs::a_node_that_starts_without_one_gets_it_and_its_pods_are_meshed",
    needs: &[Need::Nodes, Need::Image],
    run: a_node_that_starts_without_one_gets_it_and_its_pods_are_meshed,
}];

fn a_node_that_starts_without_one_gets_it_and_its_pods_are_meshed() -> Result<()> {
    let ground = ground()?;
    let [near, far] = both(ground.own()?)?;
    let mut scene = Scene::without_mesh(&ground, "bpffs")?;
    // Another test's mesh has left one there, which is right: it is the node's from then on.
    let script = "while umount /sys/fs/bpf 2>/dev/null; do :; done";
    far.run(&["sh", "-c", script])?;
    // The control: what an agent needs is not there, and the other node's is no help.
    ensure!(
        (mounted(near)?, mounted(far)?) == (1, 0),
        "bpffs are mounted {} times on {} and {} times on {}",
        mounted(near)?,
        near.name(),
        mounted(far)?,
        far.name()
    );

    scene.install(&ground, Part::All)?;
    label(&scene.space, "enabled")?;
    wait_captured(&ground, 2).with_context(|| diagnosis(&ground))?;
    for node in [near, far] {
        // Once, also where there was one before: a second one would hide what is pinned.
        let times = mounted(node)?;
        ensure!(
            times == 1,
            "{} has bpffs mounted {times} times",
            node.name()
        );
        // Seen from the node itself, so it outlives the container that mounted it.
        let pinned = node.run(&["find", "/sys/fs/bpf/picomesh", "-type", "f"])?;
        ensure!(
            !pinned.trim().is_empty(),
            "{} has nothing pinned",
            node.name()
        );
    }
    scene.is_carried(&ground)?;
    scene.is_read_outside_of_the_mesh(&ground)
}

/// How often a bpffs is mounted where agents pin.
fn mounted(node: &Node) -> Result<usize> {
    let mounts = node.run(&["cat", "/proc/self/mounts"])?;
    let is_bpffs = |line: &&str| {
        let mut fields = line.split(' ').skip(1);
        (fields.next(), fields.next()) == (Some("/sys/fs/bpf"), Some("bpf"))
    };
    Ok(mounts.lines().filter(is_bpffs).count())
}

//! A mesh that is deleted leaves the nodes as they were, and the pods that run with their
//! connections.

use std::{
    collections::BTreeMap,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use aya::programs::loaded_programs;
use picomesh_tests::{
    Netns, cluster::Node, crowd::Crowd, hooks::Hooks, load::Load, requirements, wait,
};

use crate::{
    ground::{Ground, Need, PATIENCE, Test, ground},
    install::{Kustomization, Part, Placement, diagnosis, wait_captured, wait_installed},
    talk::{Scene, both, label},
};

pub(crate) const TESTS: &[Test] = &[
    Test {
        name: "removal::a_mesh_that_is_deleted_was_never_there",
        needs: &[Need::Nodes, Need::Image],
        run: a_mesh_that_is_deleted_was_never_there,
    },
    Test {
        name: "removal::what_a_node_without_an_agent_has_kept_is_taken_off_later",
        needs: &[Need::Full, Need::Nodes, Need::Image],
        run: what_a_node_without_an_agent_has_kept_is_taken_off_later,
    },
];

/// Of the manifests: what an agent gives the connections that it carries.
const DRAIN: Duration = Duration::from_secs(30);

fn a_mesh_that_is_deleted_was_never_there() -> Result<()> {
    let ground = ground()?;
    let nodes = both(ground.own()?)?;
    // Linkerd's kinds, as if it had brought them.
    let _foreign = Kustomization::new(ground.kubectl(), "create", "policy-crds")?;
    let mut scene = Scene::without_mesh(&ground, "removal")?;
    let look = |scene: &Scene| Traces::look(&ground, nodes, scene);
    let before = look(&scene)?;
    let mounts = || nodes.into_iter().map(mounts_of).collect::<Result<Vec<_>>>();
    let mut mounted = mounts()?;
    for (what, found) in &before.0 {
        let theirs = found.contains("picomesh") || found.contains(MARK);
        ensure!(!theirs, "a mesh was here before; {what}: {found}");
    }

    scene.install(&ground, Part::All)?;
    label(&scene.space, "enabled")?;
    wait_captured(&ground, 2).with_context(|| diagnosis(&ground))?;
    // The control: each of these looks finds something of a mesh that stands.
    let standing = look(&scene)?;
    for (what, found) in &standing.0 {
        ensure!(
            before.0.get(what) != Some(found),
            "with the mesh there is nothing new in {what}: {found}"
        );
    }
    scene.is_carried(&ground)?;

    // Connections that are carried may finish; new ones never fail.
    let carried = Load::on_one_connection(&scene.pods[0], scene.at[1])?;
    let crowds = [(0, 1), (1, 0)]
        .map(|(from, to)| {
            let pause = Duration::from_millis(50);
            Crowd::start(&scene.pods[from], &[scene.at[to]; 2], pause)
        })
        .into_iter()
        .collect::<Result<Vec<_>>>()?;
    let begun = Instant::now();
    let still = thread::scope(|scope| {
        let removal = scope.spawn(|| scene.remove());
        thread::sleep(DRAIN / 6);
        let still = carried.wait_rounds(5);
        let removed = removal.join();
        removed.map_err(|_| anyhow::anyhow!("the removal panicked"))??;
        anyhow::Ok(still)
    })?;
    let took = begun.elapsed();
    for crowd in crowds {
        let fared = crowd.stop()?;
        ensure!(
            fared.failures.is_empty(),
            "while the mesh went, of {} connections failed: {}",
            fared.opened,
            fared.failures.join("; ")
        );
    }
    still.context("a connection was cut at once")?;
    let tally = carried.stop()?;
    ensure!(
        !tally.failures.is_empty(),
        "a connection that was carried goes on after {took:?}, without anybody who carries it"
    );
    ensure!(
        took > DRAIN / 2,
        "all was gone after {took:?}, and a connection may go on for {DRAIN:?}"
    );

    // Where the node had no bpffs, it keeps ours: who could unmount it has ended long ago.
    for of_node in &mut mounted {
        if !of_node.iter().any(|mount| mount == BPFFS) {
            of_node.push(BPFFS.into());
            of_node.sort();
        }
    }
    wait::for_value("all is as before", Duration::from_secs(10), || {
        let after = look(&scene)?;
        ensure!(after == before, "{}", before.differs_from(&after));
        let after = mounts()?;
        ensure!(
            after == mounted,
            "mounted are {after:?}, and should be {mounted:?}"
        );
        Ok(Some(()))
    })?;
    scene.wait_speaks()?;
    scene.is_read(&ground)
}

fn what_a_node_without_an_agent_has_kept_is_taken_off_later() -> Result<()> {
    let ground = ground()?;
    let nodes = both(ground.own()?)?;
    let [near, _] = nodes;
    let placement = Placement::new(&ground)?;
    let mut scene = Scene::without_mesh(&ground, "kept")?;
    let look = |scene: &Scene| Traces::look(&ground, nodes, scene);
    let before = look(&scene)?;
    scene.install(&ground, Part::All)?;
    label(&scene.space, "enabled")?;
    wait_captured(&ground, 2).with_context(|| diagnosis(&ground))?;
    placement.rules()?;
    wait_installed(&ground).with_context(|| diagnosis(&ground))?;
    placement.take(near.name())?.for_good();
    scene.remove()?;

    // The control: only who had no agent has anything left, and its pods wait for one.
    let left = look(&scene)?;
    for what in ["bpffs", "the CNI's directories"] {
        let what = format!("{what} of {}", near.name());
        ensure!(
            left.0.get(&what) != before.0.get(&what),
            "nothing is left in {what}"
        );
    }
    ensure!(
        scene.speak().is_err(),
        "a pod of the mesh speaks without an agent"
    );

    let cleanup = Kustomization::new(ground.kubectl(), "apply", "cleanup")?;
    let timeout = format!("--timeout={}s", wait::patience(PATIENCE).as_secs());
    let daemon_set = ["daemonset/picomesh-cleanup", "-n", "picomesh-cleanup"];
    let status = [&["rollout", "status"][..], &daemon_set, &[&timeout]].concat();
    ground.kubectl().run(&status)?;
    // It is done where it is ready.
    let after = look(&scene)?;
    ensure!(after == before, "{}", before.differs_from(&after));
    scene.wait_speaks()?;
    scene.is_read(&ground)?;
    cleanup.delete()
}

/// How `ip` shows what is ours: by the protocol's number.
const MARK: &str = "proto 112";

/// What a mesh can leave, by where it is.
#[derive(Debug, PartialEq, Eq)]
struct Traces(BTreeMap<String, String>);

impl Traces {
    fn look(ground: &Ground, nodes: [&Node; 2], scene: &Scene) -> Result<Self> {
        let mut all = BTreeMap::new();
        for node in nodes {
            for (what, script) in ON_NODES {
                let found = node.run(&["sh", "-c", script])?;
                all.insert(format!("{what} of {}", node.name()), found);
            }
        }
        for (pod, name) in scene.pods.iter().zip(["near", "far"]) {
            let hooks = format!("{:?}", Hooks::of(pod)?);
            all.insert(format!("programs of {name}"), hooks);
            for (what, args) in IN_PODS {
                let v6 = args.first() == Some(&"-6");
                if !v6 || requirements::ipv6() {
                    all.insert(format!("{what} of {name}"), ip(pod, args)?);
                }
            }
        }
        all.insert("programs of the kernel".into(), programs()?);
        let columns = "-o=custom-columns=N:.metadata.name,U:.metadata.uid,G:.metadata.generation";
        let kinds = ground
            .kubectl()
            .run(&["get", "customresourcedefinitions", columns])?;
        all.insert("definitions of kinds".into(), kinds);
        Ok(Self(all))
    }

    fn differs_from(&self, other: &Self) -> String {
        let differs = self
            .0
            .iter()
            .filter(|(what, found)| other.0.get(*what) != Some(found));
        let told = differs.map(|(what, found)| {
            let now = other.0.get(what).map_or("", String::as_str);
            format!("{what}\n--- before\n{found}\n--- after\n{now}\n")
        });
        told.collect()
    }
}

/// Of the kinds that a mesh could have loaded: runtimes load others for each of their containers.
fn programs() -> Result<String> {
    /// Of `enum bpf_prog_type`: SCHED_CLS, SOCK_OPS, SK_SKB, SK_MSG, SK_LOOKUP.
    const KINDS: [u32; 5] = [3, 13, 14, 16, 30];
    let mut found = Vec::new();
    for program in loaded_programs() {
        let program = program?;
        let kind = program.program_type() as u32;
        if KINDS.contains(&kind) {
            let name = program.name_as_str().unwrap_or_default();
            found.push(format!("{kind} {name} {}", program.id()));
        }
    }
    found.sort();
    Ok(found.join("\n"))
}

const BPFFS: &str = "bpf on /sys/fs/bpf";

/// What is mounted on a node, without what comes and goes with its containers.
fn mounts_of(node: &Node) -> Result<Vec<String>> {
    let mounts = node.run(&["cat", "/proc/self/mounts"])?;
    let own = mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let (at, kind) = fields.next().zip(fields.next())?;
        let of_containers = ["/kubelet/", "/containerd/", "/netns"];
        let is_own = !of_containers.iter().any(|dir| at.contains(dir));
        is_own.then(|| format!("{kind} on {at}"))
    });
    let mut own: Vec<String> = own.collect();
    own.sort();
    Ok(own)
}

/// Directories themselves may stay where the kubelet makes them.
const ON_NODES: [(&str, &str); 4] = [
    ("bpffs", "find /sys/fs/bpf -mindepth 1 | sort"),
    (
        "the CNI's directories",
        "find /etc/cni/net.d /opt/cni/bin ! -type d -exec sha256sum {} + | sort",
    ),
    (
        "files of state",
        "find /var/lib/picomesh ! -type d 2>/dev/null | sort",
    ),
    (
        "files and sockets",
        "find /run/picomesh ! -type d 2>/dev/null | sort",
    ),
];

const IN_PODS: [(&str, &[&str]); 5] = [
    ("devices", &["-o", "link"]),
    ("rules", &["-4", "rule"]),
    ("rules of IPv6", &["-6", "rule"]),
    ("routes", &["-4", "route", "show", "table", "all"]),
    ("routes of IPv6", &["-6", "route", "show", "table", "all"]),
];

fn ip(netns: &Netns, args: &[&str]) -> Result<String> {
    let output = netns.run(|| Command::new("ip").args(args).output())?;
    ensure!(
        output.status.success(),
        "ip {}: {}",
        args.join(" "),
        String::from_utf8_lossy(&output.stderr)
    );
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    // Indices and times change by themselves.
    let lines = said.lines().map(|line| match line.split_once(": ") {
        Some((_, rest)) if args.contains(&"link") => {
            rest.split(": ").next().unwrap_or_default().to_owned()
        }
        Some(_) | None => line
            .split(" expires ")
            .next()
            .unwrap_or_default()
            .to_owned(),
    });
    let mut lines: Vec<String> = lines.collect();
    lines.sort();
    Ok(lines.join("\n"))
}

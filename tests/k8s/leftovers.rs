//! A cluster that is taken down was never there. The control is the same search while it stands.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::MetadataExt,
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use picomesh_tests::{
    cluster::{Cluster, TOOLS},
    netns, reaper,
};

use crate::ground::{self, Namespace, Need, PATIENCE, Test};

pub(crate) const TESTS: &[Test] = &[Test {
    name: "leftovers::a_cluster_that_is_taken_down_leaves_nothing",
    needs: &[Need::Nodes],
    run: a_cluster_that_is_taken_down_leaves_nothing,
}];

/// Where a node writes; on the machine itself nothing of it may appear or change.
const WRITTEN: [&str; 12] = [
    "/etc/cni",
    "/etc/containerd",
    "/etc/kubernetes",
    "/opt/cni",
    "/run/containerd",
    "/run/netns",
    "/usr/libexec/kubernetes",
    "/var/lib/cni",
    "/var/lib/containerd",
    "/var/lib/kubelet",
    "/var/log/containers",
    "/var/log/pods",
];
/// What a kubelet would set for the whole machine.
const TUNABLES: [&str; 4] = [
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
];

fn a_cluster_that_is_taken_down_leaves_nothing() -> Result<()> {
    let before = Machine::look()?;
    let cluster = Cluster::up(&ground::kubernetes()?, 1, false)?;
    let name = cluster.name().to_owned();
    let node = cluster.nodes().first().context("no node")?;
    let inodes = namespaces(&name)?;
    let space = Namespace::of(&cluster, "leftovers")?;
    space.pod("pod", node.name(), TOOLS, &["/bin/sleep", "100000"])?;
    space.wait_ready("pod")?;

    let standing = traces(&name, &inodes)?;
    for kind in [
        "cgroup",
        "file",
        "namespace",
        "process",
        "process in a cgroup",
    ] {
        ensure!(
            standing.get(kind).is_some_and(|found| !found.is_empty()),
            "the search finds no {kind} of a cluster that stands: {standing:?}"
        );
    }
    // The node itself sees what it has written.
    for path in [
        "/opt/cni/bin/bridge",
        "/var/lib/kubelet/pods",
        "/run/containerd",
    ] {
        node.run(&["test", "-e", path])?;
    }
    ensure!(
        node.run(&["cat", "/proc/mounts"])?.contains(&name),
        "the node has no mounts"
    );

    drop(space);
    drop(cluster);
    // Who has died is a line of the process table until its parent has heard of it.
    let deadline = Instant::now() + PATIENCE;
    loop {
        let left = traces(&name, &inodes)?;
        if left.is_empty() {
            break;
        }
        ensure!(Instant::now() < deadline, "left behind: {left:?}");
        thread::sleep(Duration::from_millis(100));
    }
    let after = Machine::look()?;
    ensure!(before == after, "before: {before:?}\nafter: {after:?}");
    Ok(())
}

/// Inodes of the cluster's network namespaces.
fn namespaces(cluster: &str) -> Result<BTreeSet<u64>> {
    netns::list(&format!("{cluster}-"))
        .iter()
        .map(|name| Ok(fs::metadata(Path::new(netns::NETNS_DIR).join(name))?.ino()))
        .collect()
}

/// What on this machine carries the cluster's name or lives in its namespaces, by kind.
fn traces(cluster: &str, inodes: &BTreeSet<u64>) -> Result<BTreeMap<&'static str, Vec<String>>> {
    let mut found: BTreeMap<&'static str, Vec<String>> = BTreeMap::new();
    let mut note = |kind, what: String| found.entry(kind).or_default().push(what);
    for namespace in netns::list(&format!("{cluster}-")) {
        note("namespace", namespace);
    }
    for path in [
        reaper::dir(cluster),
        reaper::run_dir(cluster),
        reaper::bpf_dir(cluster),
    ] {
        if path.exists() {
            note("file", path.display().to_string());
        }
    }
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    for mount in mounts.lines() {
        if mount.contains(cluster) {
            note("mount", mount.to_owned());
        }
        let mut fields = mount.split(' ').skip(1);
        if let (Some(at), Some("cgroup" | "cgroup2")) = (fields.next(), fields.next()) {
            let group = Path::new(at).join(cluster);
            if group.exists() {
                note("cgroup", group.display().to_string());
            }
        }
    }
    for entry in fs::read_dir("/proc")?.flatten() {
        if entry.file_name().to_string_lossy().parse::<u32>().is_err() {
            continue;
        }
        let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        let groups = fs::read_to_string(entry.path().join("cgroup")).unwrap_or_default();
        let inside =
            fs::metadata(entry.path().join("ns/net")).is_ok_and(|ns| inodes.contains(&ns.ino()));
        if groups.contains(cluster) {
            note("process in a cgroup", command);
        } else if inside || command.contains(cluster) {
            note("process", command);
        }
    }
    Ok(found)
}

/// What a cluster could change on the machine without its name on it.
#[derive(Debug, PartialEq, Eq)]
struct Machine {
    links: BTreeSet<String>,
    written: BTreeMap<&'static str, BTreeSet<String>>,
    tunables: Vec<String>,
    mounts: usize,
}

impl Machine {
    fn look() -> Result<Self> {
        let links = Command::new("ip").args(["-o", "link"]).output()?;
        ensure!(links.status.success(), "ip -o link failed");
        let links = String::from_utf8_lossy(&links.stdout)
            .lines()
            .filter_map(|line| line.split(": ").nth(1).map(str::to_owned))
            .collect();
        let mut written = BTreeMap::new();
        for path in WRITTEN {
            if let Ok(entries) = fs::read_dir(path) {
                let names = entries.flatten().map(|e| e.file_name());
                let names = names.map(|n| n.to_string_lossy().into_owned());
                // Other worlds come and go; those of clusters are searched by name.
                let names = names.filter(|n| path != netns::NETNS_DIR || n.starts_with("cni-"));
                written.insert(path, names.collect());
            }
        }
        let tunables = TUNABLES
            .iter()
            .map(|key| Ok(fs::read_to_string(Path::new("/proc/sys").join(key))?))
            .collect::<Result<_>>()?;
        let mounts = fs::read_to_string("/proc/self/mounts")?
            .lines()
            .filter(|mount| !mount.contains(" /run/netns/"))
            .count();
        Ok(Self {
            links,
            written,
            tunables,
            mounts,
        })
    }
}

//! Pods that are older than the agent: found by looking through /proc, by the cgroups of their
//! processes.
//!
//! The kubelet names a pod's cgroup by the pod's uid, whatever the runtime and its driver:
//!
//! | driver | path |
//! | --- | --- |
//! | cgroupfs | `/kubepods/burstable/podUID/CONTAINER` (CRI-O: `crio-CONTAINER`) |
//! | systemd | `/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podUID.slice/cri-containerd-CONTAINER.scope` (`crio-`, `docker-`), with `_` for `-` in UID |
//! | kind | the same below `/kubelet` or `/kubelet.slice`, as `kubelet-kubepods-…` |
//!
//! With cgroup v1 there is a path for every hierarchy. A process sees others' paths from the root of
//! its own cgroup namespace: for an agent in a container they may begin with `/../..`.
//!
//! **Not to be fooled by who lives there.** A container can make cgroups below its own and name them
//! like another pod's. The outermost name counts, and all hierarchies must agree.
//!
//! Of a pod's processes the oldest outside the node's own namespace counts: it is the sandbox's, and
//! a namespace that a container has made for itself is younger. What ends while one looks is passed
//! over. The network namespace of another user's process shows itself to CAP_SYS_PTRACE only.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::{sync::Notify, task::spawn_blocking, time::timeout};
use tracing::warn;

use super::sandboxes::{Found, NetnsId, Sandboxes};
use crate::drain;

/// Between two looks that nobody asks for: what the plugin tells needs none, but a sandbox that went
/// while the agent was away does.
const TURN: Duration = Duration::from_secs(30);
/// Looks that are asked for come in flocks: when a namespace joins, each of its pods asks.
const GATHER: Duration = Duration::from_millis(50);

/// What is looked at in one go. A small node has some hundreds.
const MAX_PROCESSES: usize = 1 << 16;
/// Of one file of a process. With cgroup v1 there are a dozen paths.
const MAX_FILE: u64 = 16 * 1024;
/// How deep a path is read. A pod's own name is among the first.
const MAX_DEPTH: usize = 32;

/// What one look has found.
#[derive(Debug, Default)]
pub struct Running {
    pub pods: HashMap<Arc<str>, Found>,
    /// Processes of pods whose namespace could not be told, although they were there: the right to
    /// look is missing.
    pub hidden: usize,
    /// There were more processes than are looked at.
    pub cut: bool,
}

/// Looks now, now and then, and whenever `asked`: for when a pod is to be captured and nobody has
/// said where it lives. Until the end begins.
pub async fn keep(
    sandboxes: Arc<Sandboxes>,
    proc: PathBuf,
    asked: Arc<Notify>,
    mut drain: drain::Guard,
) {
    let mut complained = false;
    loop {
        let proc_of_node = proc.clone();
        let problem = match spawn_blocking(move || look(&proc_of_node)).await {
            Ok(Ok(running)) => {
                let problem = running.problem();
                sandboxes.found(running.pods);
                problem
            }
            Ok(Err(error)) => Some(error.to_string()),
            // The runtime ends.
            Err(_) => return,
        };
        if let Some(problem) = &problem
            && !complained
        {
            let proc = proc.display();
            warn!(%proc, problem, "not every pod that runs already can be found");
        }
        complained = problem.is_some();
        tokio::select! {
            () = drain.begun() => return,
            _ = timeout(TURN, asked.notified()) => tokio::time::sleep(GATHER).await,
        }
    }
}

impl Running {
    fn problem(&self) -> Option<String> {
        if self.hidden > 0 {
            return Some(format!(
                "{} processes of pods do not show their network namespace; the agent needs \
                 CAP_SYS_PTRACE",
                self.hidden
            ));
        }
        self.cut
            .then(|| format!("there are more than {MAX_PROCESSES} entries; the rest is not read"))
    }
}

/// Looks through `proc`: /proc of the node, as the agent sees it.
pub fn look(proc: &Path) -> io::Result<Running> {
    let mut running = Running::default();
    let net_of = |process: &str| NetnsId::at(&proc.join(process).join("ns/net"));
    // The node's: its first process has it, and an agent on the node's network.
    let own = NetnsId::at(Path::new("/proc/self/ns/net"));
    let nodes = [net_of("1"), own];
    let mut oldest: HashMap<Arc<str>, u64> = HashMap::new();
    for (looked, entry) in fs::read_dir(proc)?.enumerate() {
        if looked >= MAX_PROCESSES {
            running.cut = true;
            break;
        }
        let Ok(name) = entry.map(|entry| entry.file_name()) else {
            continue;
        };
        let Some(process) = name.to_str().filter(|name| is_number(name)) else {
            continue;
        };
        let path = proc.join(process);
        let Some(uid) = read(&path.join("cgroup")).and_then(|text| pod_of(&text)) else {
            continue;
        };
        let Some(netns) = net_of(process) else {
            // Gone meanwhile, or not ours to see.
            running.hidden += usize::from(path.exists() && !is_zombie(&path));
            continue;
        };
        if nodes.contains(&Some(netns)) {
            continue;
        }
        let Some(started) = read(&path.join("stat")).and_then(|text| start_of(&text)) else {
            continue;
        };
        let uid: Arc<str> = uid.into();
        if oldest.get(&uid).is_some_and(|before| *before <= started) {
            continue;
        }
        oldest.insert(Arc::clone(&uid), started);
        let path = path.join("ns/net");
        running.pods.insert(uid, Found { netns, path });
    }
    Ok(running)
}

/// The pod's uid from what stands in /proc/PID/cgroup; `None`: of no pod, or not sure which.
pub fn pod_of(cgroups: &str) -> Option<String> {
    let mut found = None;
    for line in cgroups.lines() {
        // Number, controllers, path.
        let path = line.splitn(3, ':').nth(2)?;
        match (uid_in(path), &found) {
            (None, _) => {}
            (Some(uid), None) => found = Some(uid),
            (Some(uid), Some(before)) if uid == *before => {}
            (Some(_), Some(_)) => return None,
        }
    }
    found
}

/// The outermost name of a pod's cgroup.
fn uid_in(path: &str) -> Option<String> {
    let parts = path.split('/').filter(|part| !part.is_empty());
    // Seen from inside a pod, what all pods have in common is not shown.
    let mut before = "";
    let mut from_inside = false;
    for part in parts.take(MAX_DEPTH) {
        // containerd that was told of systemd's names and not of systemd: SLICE:PREFIX:CONTAINER.
        let part = part.split(':').next().unwrap_or(part);
        if part == ".." {
            from_inside = true;
            continue;
        }
        let uid = match part.strip_prefix("pod") {
            Some(uid) if is_parent(before) || from_inside && before.is_empty() => as_uid(uid),
            Some(_) | None => part
                .strip_suffix(".slice")
                .and_then(|slice| slice.rsplit_once("-pod"))
                .filter(|(class, _)| class.split('-').any(|word| word == "kubepods"))
                .and_then(|(_, uid)| as_uid(&uid.replace('_', "-"))),
        };
        if uid.is_some() {
            return uid;
        }
        before = part;
    }
    None
}

/// Of a pod's cgroup, with the driver cgroupfs.
fn is_parent(name: &str) -> bool {
    ["kubepods", "besteffort", "burstable"].contains(&name)
}

/// A uid of the API server, or, for a static pod, the hash that the kubelet gives it.
fn as_uid(text: &str) -> Option<String> {
    let is_hex = |text: &str| {
        text.bytes()
            .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    };
    let lengths = text
        .split('-')
        .map(|part| is_hex(part).then_some(part.len()));
    let lengths: Option<Vec<usize>> = lengths.take(6).collect();
    let right = matches!(lengths?.as_slice(), [8, 4, 4, 4, 12] | [32]);
    right.then(|| text.to_owned())
}

/// When the process started, in ticks since boot: the 22nd field. Its second, the name, may hold
/// anything.
fn start_of(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(19)?.parse().ok()
}

/// Ended, and not yet collected: it has no namespaces any more.
fn is_zombie(process: &Path) -> bool {
    read(&process.join("stat")).is_none_or(|stat| {
        let after = stat.rsplit_once(')').map(|(_, rest)| rest.trim_start());
        after.is_none_or(|state| state.starts_with(['Z', 'X']))
    })
}

fn is_number(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_digit())
}

fn read(path: &Path) -> Option<String> {
    let mut text = String::new();
    let file = File::open(path).ok()?;
    file.take(MAX_FILE).read_to_string(&mut text).ok()?;
    Some(text)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    const UID: &str = "8f4bd1ac-2f0c-4f2e-9b4e-0d6f5f7a3f11";
    const OTHER: &str = "00000000-1111-2222-3333-444444444444";

    #[test]
    fn the_paths_of_every_runtime_and_driver_are_read() {
        let slice = UID.replace('-', "_");
        let id = "ab".repeat(32);
        for path in [
            format!("/kubepods/burstable/pod{UID}/{id}"),
            format!("/kubepods/pod{UID}/{id}"),
            format!("/kubepods/besteffort/pod{UID}/crio-{id}"),
            format!("/kubelet/kubepods/besteffort/pod{UID}/{id}"),
            format!("/k8s.io/kubepods/burstable/pod{UID}/{id}"),
            format!("/kubepods.slice/kubepods-pod{slice}.slice/cri-containerd-{id}.scope"),
            format!(
                "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{slice}.slice/crio-{id}.scope"
            ),
            format!(
                "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{slice}.slice/docker-{id}.scope"
            ),
            format!(
                "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-pod{slice}.slice/cri-containerd-{id}.scope"
            ),
            format!(
                "/system.slice/containerd.service/kubepods-burstable-pod{slice}.slice:cri-containerd:{id}"
            ),
            format!("/../../../besteffort/pod{UID}/{id}"),
            format!("/../../pod{UID}/{id}"),
            format!("/../../../kubepods-burstable-pod{slice}.slice/cri-containerd-{id}.scope"),
        ] {
            let line = format!("0::{path}\n");
            assert_eq!(pod_of(&line).as_deref(), Some(UID), "{path}");
        }
        let static_pod = "0::/kubepods/burstable/pod0123456789abcdef0123456789abcdef/x";
        let uid = pod_of(static_pod).unwrap();
        assert_eq!(uid, "0123456789abcdef0123456789abcdef");
    }

    #[test]
    fn hierarchies_of_cgroup_v1_that_agree_are_one_pod() {
        let text = format!(
            "12:pids:/kubepods/burstable/pod{UID}/c\n\
             3:cpu,cpuacct:/kubepods/burstable/pod{UID}/c\n\
             2:name=systemd:/kubepods/burstable/pod{UID}/c\n1:misc:/\n0::/\n"
        );
        assert_eq!(pod_of(&text).as_deref(), Some(UID));
        let torn = format!("{text}0::/kubepods/pod{OTHER}/c\n");
        assert_eq!(pod_of(&torn), None);
    }

    #[test]
    fn a_name_that_a_container_gives_its_own_cgroup_is_not_believed() {
        let other = OTHER.replace('-', "_");
        for path in [
            format!("/kubepods/pod{UID}/c/kubepods/pod{OTHER}/x"),
            format!("/kubepods/pod{UID}/c/kubepods-pod{other}.slice/x"),
            format!("/../../pod{UID}/c/kubepods/pod{OTHER}/x"),
        ] {
            assert_eq!(
                pod_of(&format!("0::{path}")).as_deref(),
                Some(UID),
                "{path}"
            );
        }
    }

    #[test]
    fn what_is_no_pods_is_none() {
        for path in [
            "/".to_owned(),
            "/user.slice/user-0.slice/session-1.scope".into(),
            format!("/docker/pod{UID}"),
            format!("/pod{UID}/x"),
            format!("/kubepods/burstable/pod{}", &UID[1..]),
            format!("/kubepods/burstable/pod{}", UID.to_uppercase()),
            "/kubepods/burstable/pod/x".into(),
            "/kubepods/podinfo/x".into(),
            format!("/kubepods/burstable/x{}/pod{UID}", "/y".repeat(40)),
        ] {
            assert_eq!(pod_of(&format!("0::{path}")), None, "{path}");
        }
        assert_eq!(pod_of(""), None);
        assert_eq!(pod_of("no colons"), None);
    }

    #[test]
    fn the_start_is_the_22nd_field_whatever_the_name() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 987654 9 9";
        assert_eq!(start_of(stat), Some(987_654));
        assert_eq!(start_of("7 (a) S 1"), None);
        assert_eq!(start_of(""), None);
    }

    /// A directory like /proc: a process has a cgroup, a start, and a file for its namespace.
    fn process(proc: &Path, pid: u32, cgroup: &str, started: u64, netns: &Path) {
        let dir = proc.join(pid.to_string());
        fs::create_dir_all(dir.join("ns")).unwrap();
        fs::write(dir.join("cgroup"), format!("0::{cgroup}\n")).unwrap();
        let zeros = "0 ".repeat(18);
        fs::write(
            dir.join("stat"),
            format!("{pid} (x y) S {zeros}{started} 0"),
        )
        .unwrap();
        symlink(netns, dir.join("ns/net")).unwrap();
    }

    #[test]
    fn the_oldest_process_outside_the_nodes_namespace_counts() {
        let dir = tempfile::tempdir().unwrap();
        let proc = dir.path().join("proc");
        let file = |name: &str| {
            let path = dir.path().join(name);
            fs::write(&path, "").unwrap();
            path
        };
        let (node, sandbox, nested) = (file("node"), file("sandbox"), file("nested"));
        let pod = format!("/kubepods/burstable/pod{UID}/c");
        process(&proc, 1, "/init.scope", 1, &node);
        process(&proc, 300, &pod, 50, &sandbox);
        process(&proc, 301, &pod, 70, &nested);
        // Of the runtime, in the pod's cgroup: older, and on the node's network.
        process(&proc, 299, &pod, 40, &node);
        let host_pod = format!("/kubepods/pod{OTHER}/c");
        process(&proc, 400, &host_pod, 60, &node);
        process(&proc, 500, "/user.slice", 60, &nested);
        // Gone between one look and the next: no namespace, no start.
        process(&proc, 600, &pod, 10, Path::new("/nowhere"));
        fs::remove_file(proc.join("600/stat")).unwrap();
        fs::create_dir(proc.join("700")).unwrap();
        fs::create_dir(proc.join("sys")).unwrap();

        let running = look(&proc).unwrap();
        let netns = NetnsId::at(&sandbox).unwrap();
        let path = proc.join("300/ns/net");
        assert_eq!(
            running.pods,
            HashMap::from([(Arc::from(UID), Found { netns, path })])
        );
        assert_eq!((running.hidden, running.cut), (0, false));
    }

    #[test]
    fn a_process_that_may_not_be_looked_at_is_counted() {
        let dir = tempfile::tempdir().unwrap();
        let pod = format!("/kubepods/pod{UID}/c");
        process(dir.path(), 300, &pod, 50, Path::new("/nowhere"));
        assert_eq!(look(dir.path()).unwrap().hidden, 1);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_pod_is_found_at_the_start_and_when_somebody_asks() {
        let dir = tempfile::tempdir().unwrap();
        let (proc, netns) = (dir.path().join("proc"), dir.path().join("netns"));
        fs::write(&netns, "").unwrap();
        let cgroup = |uid: &str| format!("/kubepods/pod{uid}/c");
        process(&proc, 300, &cgroup(UID), 50, &netns);
        let (sandboxes, mut paths) = Sandboxes::new(Vec::new());
        let asked = Arc::new(Notify::new());
        let (drain, guard) = drain::Drain::new();
        let kept = tokio::spawn(keep(sandboxes, proc.clone(), Arc::clone(&asked), guard));
        paths.changed().await.unwrap();
        assert_eq!(paths.borrow_and_update()[UID], proc.join("300/ns/net"));

        process(&proc, 301, &cgroup(OTHER), 50, &netns);
        fs::remove_dir_all(proc.join("300")).unwrap();
        asked.notify_one();
        paths.changed().await.unwrap();
        assert!(paths.borrow().contains_key(OTHER) && !paths.borrow().contains_key(UID));
        drain.drain(Duration::from_secs(5)).await;
        kept.await.unwrap();
    }

    #[test]
    fn the_real_proc_is_read_to_its_end() {
        let running = look(Path::new("/proc")).unwrap();
        assert!(!running.cut);
    }
}

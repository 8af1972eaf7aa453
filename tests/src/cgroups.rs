//! Control groups for the nodes of a cluster, in whatever hierarchies the machine has: version 2,
//! version 1, or both.

use std::{
    collections::BTreeSet,
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result};

use crate::wait;

/// Makes `/<world>/<node>` in every hierarchy and returns it as kubelets take it.
pub(crate) fn create(world: &str, node: &str) -> Result<String> {
    for hierarchy in hierarchies() {
        let mut at = hierarchy.clone();
        for part in [world, node] {
            share_controllers(&at);
            let parent = at.clone();
            at.push(part);
            fs::create_dir_all(&at).with_context(|| format!("create {}", at.display()))?;
            // A version 1 group has no processors and no memory until somebody says which.
            for file in ["cpuset.cpus", "cpuset.mems"] {
                let inherited = fs::read_to_string(parent.join(file)).unwrap_or_default();
                let own = fs::read_to_string(at.join(file)).unwrap_or_default();
                if own.trim().is_empty() && !inherited.trim().is_empty() {
                    let file = at.join(file);
                    fs::write(&file, inherited.trim())
                        .with_context(|| format!("write {}", file.display()))?;
                }
            }
        }
    }
    Ok(format!("/{world}/{node}"))
}

/// Processes in a world's groups.
pub(crate) fn processes(world: &str) -> BTreeSet<i32> {
    let mut found = BTreeSet::new();
    for group in groups(world) {
        let text = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
        found.extend(text.lines().filter_map(|l| l.parse::<i32>().ok()));
    }
    found.remove(&0);
    found
}

/// Removes a world's groups; they must be empty.
pub(crate) fn remove(world: &str) {
    // From the bottom up.
    for group in groups(world).iter().rev() {
        // The last process may still be on its way out.
        let gone = wait::for_value("empty", Duration::from_secs(5), || {
            match fs::remove_dir(group) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e.into()),
                Ok(()) | Err(_) => Ok(Some(())),
            }
        });
        if let Err(e) = gone {
            eprintln!("remove {}: {e:#}", group.display());
        }
    }
}

/// Names of all groups right below a hierarchy's root.
pub(crate) fn names() -> BTreeSet<String> {
    hierarchies()
        .iter()
        .flat_map(|h| children(h))
        .filter_map(|path| path.file_name()?.to_str().map(str::to_owned))
        .collect()
}

/// All of a world's groups in all hierarchies, each after the one that holds it.
fn groups(world: &str) -> Vec<PathBuf> {
    let mut all: Vec<PathBuf> = hierarchies()
        .into_iter()
        .map(|h| h.join(world))
        .filter(|path| path.is_dir())
        .collect();
    let mut next = 0;
    while let Some(group) = all.get(next) {
        let below = children(group);
        all.extend(below);
        next += 1;
    }
    all
}

fn children(dir: &Path) -> Vec<PathBuf> {
    fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|e| e.file_type().is_ok_and(|t| t.is_dir()))
        .map(|e| e.path())
        .collect()
}

/// Version 2 gives a group only the controllers that its parent shares; what the machine keeps for
/// itself is not to be had, and a kubelet that needs it says so.
fn share_controllers(group: &Path) {
    let Ok(all) = fs::read_to_string(group.join("cgroup.controllers")) else {
        return;
    };
    for controller in all.split_whitespace() {
        let _ = fs::write(
            group.join("cgroup.subtree_control"),
            format!("+{controller}"),
        );
    }
}

/// Where hierarchies are mounted, each once.
fn hierarchies() -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let mut known = BTreeSet::new();
    mounts
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ').skip(1);
            let (at, kind) = (fields.next()?, fields.next()?);
            (kind == "cgroup" || kind == "cgroup2").then(|| PathBuf::from(at))
        })
        .filter(|at| fs::metadata(at).is_ok_and(|m| known.insert(m.dev())))
        .collect()
}

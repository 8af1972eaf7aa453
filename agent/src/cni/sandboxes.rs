//! Where each pod's network namespace is, by the pod's uid.
//!
//! Told by the plugin when a sandbox is made and unmade, and found in /proc for pods that are older
//! than the agent ([`running`](super::running)). What a path leads to is compared by device and
//! inode; a pod whose path changes is another pod to the datapath, so a path stays for as long as
//! it leads where it did.
//!
//! A new sandbox takes the place of an old one under the same uid. The runtime unmakes the old one
//! when it pleases, often later: then only what belongs to the old one goes.

use std::{
    collections::HashMap,
    fs,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use parking_lot::Mutex;
use tokio::sync::watch;
use tracing::{debug, info};

/// Uid of a pod → path of its network namespace.
pub type Paths = HashMap<Arc<str>, PathBuf>;

/// What the runtime tells of more pods than a node can have is not kept.
const MAX_PODS: usize = 4096;

/// Which network namespace it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NetnsId {
    pub device: u64,
    pub inode: u64,
}

impl NetnsId {
    /// Of what `path` leads to now.
    pub fn at(path: &Path) -> Option<Self> {
        let found = fs::metadata(path).ok()?;
        Some(Self {
            device: found.dev(),
            inode: found.ino(),
        })
    }
}

/// A namespace that was found without the plugin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    pub netns: NetnsId,
    pub path: PathBuf,
}

pub struct Sandboxes {
    /// Where the runtime keeps namespaces by name.
    names: Vec<PathBuf>,
    known: Mutex<HashMap<Arc<str>, Sandbox>>,
    told: watch::Sender<Paths>,
}

struct Sandbox {
    /// The runtime's name for it; `None` if it was found.
    name: Option<String>,
    netns: NetnsId,
    path: PathBuf,
    /// Where no path of the agent's own leads to it.
    _kept: Option<OwnedFd>,
}

impl Sandboxes {
    /// `names`: directories where namespaces are mounted, as the agent sees them: /run/netns.
    pub fn new(names: Vec<PathBuf>) -> (Arc<Self>, watch::Receiver<Paths>) {
        let (told, paths) = watch::channel(Paths::new());
        let known = Mutex::default();
        (Arc::new(Self { names, known, told }), paths)
    }

    /// The plugin has sent `file`, and says that it is at `path`, as the node sees it.
    pub fn add(&self, uid: &str, name: &str, file: OwnedFd, netns: NetnsId, path: Option<&Path>) {
        let mut known = self.known.lock();
        if !known.contains_key(uid) && known.len() >= MAX_PODS {
            tracing::warn!(
                uid,
                "{MAX_PODS} sandboxes are known already; one more is not kept"
            );
            return;
        }
        let kept_path = known
            .get(uid)
            .filter(|before| before.netns == netns && before.is_there())
            .map(|before| before.path.clone());
        let path = kept_path.or_else(|| self.path_of(netns, path));
        let (path, kept) = match path {
            Some(path) => (path, None),
            // Ours for as long as the file is open; a runtime that mounts namespaces where the
            // agent does not see them.
            None => (
                PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd())),
                Some(file),
            ),
        };
        let sandbox = Sandbox {
            name: Some(name.to_owned()),
            netns,
            path,
            _kept: kept,
        };
        known.insert(uid.into(), sandbox);
        self.tell(&known);
    }

    /// The runtime unmakes the sandbox of that name. One that is newer stays.
    pub fn remove(&self, uid: &str, name: &str) {
        let mut known = self.known.lock();
        let is_it = |sandbox: &Sandbox| match &sandbox.name {
            Some(of) => of == name,
            None => !sandbox.is_there(),
        };
        if known.get(uid).is_some_and(is_it) {
            known.remove(uid);
            self.tell(&known);
        }
    }

    /// What a look through /proc has found. Adds what was not known, and lets go what leads nowhere
    /// any more.
    pub fn found(&self, found: HashMap<Arc<str>, Found>) {
        let mut known = self.known.lock();
        known.retain(|uid, sandbox| {
            let stays = sandbox.is_there();
            if !stays {
                debug!(uid = &**uid, path = %sandbox.path.display(), "a sandbox is gone");
            }
            stays
        });
        for (uid, Found { netns, path }) in found {
            if known.contains_key(&uid) || known.len() >= MAX_PODS {
                continue;
            }
            let path = self.path_of(netns, None).unwrap_or(path);
            info!(uid = &*uid, path = %path.display(), "found a pod that runs already");
            let sandbox = Sandbox {
                name: None,
                netns,
                path,
                _kept: None,
            };
            known.insert(uid, sandbox);
        }
        self.tell(&known);
    }

    /// A path that leads there and stays: the one the runtime tells, or its name in one of our
    /// directories.
    fn path_of(&self, netns: NetnsId, told: Option<&Path>) -> Option<PathBuf> {
        let leads = |path: &Path| NetnsId::at(path) == Some(netns);
        let told = told.filter(|path| path.is_absolute());
        let named = told.and_then(Path::file_name);
        let mut by_name = self.names.iter().filter_map(|dir| Some(dir.join(named?)));
        // Under the names first: of two paths to one namespace it must always be the same.
        if let Some(path) = by_name.find(|path| leads(path)) {
            return Some(path);
        }
        self.names
            .iter()
            .filter_map(|dir| fs::read_dir(dir).ok())
            .flat_map(|entries| entries.flatten().take(MAX_PODS))
            .map(|entry| entry.path())
            .find(|path| leads(path))
            .or_else(|| told.filter(|path| leads(path)).map(Path::to_owned))
    }

    fn tell(&self, known: &HashMap<Arc<str>, Sandbox>) {
        let paths: Paths = known
            .iter()
            .map(|(uid, sandbox)| (Arc::clone(uid), sandbox.path.clone()))
            .collect();
        self.told.send_if_modified(|before| {
            let changed = *before != paths;
            if changed {
                *before = paths;
            }
            changed
        });
    }
}

impl Sandbox {
    fn is_there(&self) -> bool {
        NetnsId::at(&self.path) == Some(self.netns)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    /// Files stand for namespaces: all that is compared is device and inode.
    fn netns(dir: &Path, name: &str) -> (OwnedFd, NetnsId, PathBuf) {
        let path = dir.join(name);
        let file = File::create(&path).unwrap();
        (file.into(), NetnsId::at(&path).unwrap(), path)
    }

    fn paths(told: &mut watch::Receiver<Paths>) -> Vec<(String, PathBuf)> {
        let paths = told.borrow_and_update();
        let mut all: Vec<_> = paths
            .iter()
            .map(|(uid, path)| (uid.to_string(), path.clone()))
            .collect();
        all.sort();
        all
    }

    #[test]
    fn a_sandbox_is_told_and_goes_with_its_own_removal_only() {
        let dir = tempfile::tempdir().unwrap();
        let (sandboxes, mut told) = Sandboxes::new(vec![dir.path().into()]);
        let (file, id, path) = netns(dir.path(), "cni-1");
        sandboxes.add("u", "first", file, id, Some(Path::new("/run/netns/cni-1")));
        assert_eq!(paths(&mut told), [("u".into(), path)]);

        let (file, id, path) = netns(dir.path(), "cni-2");
        sandboxes.add("u", "second", file, id, Some(Path::new("/run/netns/cni-2")));
        sandboxes.remove("u", "first");
        assert_eq!(paths(&mut told), [("u".into(), path)]);
        sandboxes.remove("u", "second");
        assert!(paths(&mut told).is_empty());
    }

    #[test]
    fn what_is_found_later_does_not_change_a_path_that_still_leads_there() {
        let (dir, proc) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (sandboxes, mut told) = Sandboxes::new(vec![dir.path().into()]);
        let (file, id, path) = netns(dir.path(), "cni-1");
        sandboxes.add("u", "first", file, id, None);
        let (_, other, elsewhere) = netns(proc.path(), "net");
        let found = |netns, path: &Path| {
            let path = path.to_owned();
            HashMap::from([(Arc::from("u"), Found { netns, path })])
        };
        told.mark_unchanged();
        sandboxes.found(found(other, &elsewhere));
        assert!(!told.has_changed().unwrap());
        assert_eq!(paths(&mut told), [("u".into(), path.clone())]);

        fs::remove_file(&path).unwrap();
        sandboxes.found(found(other, &elsewhere));
        assert_eq!(paths(&mut told), [("u".into(), elsewhere)]);
    }

    #[test]
    fn what_was_found_has_its_name_among_the_runtimes_if_it_has_one() {
        let (dir, proc) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (sandboxes, mut told) = Sandboxes::new(vec![dir.path().into()]);
        let (_, netns, path) = netns(dir.path(), "cni-1");
        let elsewhere = proc.path().join("net");
        fs::hard_link(&path, &elsewhere).unwrap();
        let found = Found {
            netns,
            path: elsewhere.clone(),
        };
        sandboxes.found(HashMap::from([(Arc::from("u"), found)]));
        assert_eq!(paths(&mut told), [("u".into(), path)]);
    }

    #[test]
    fn a_namespace_that_no_path_leads_to_is_kept_open() {
        let dir = tempfile::tempdir().unwrap();
        let (sandboxes, mut told) = Sandboxes::new(vec![dir.path().into()]);
        let elsewhere = tempfile::tempdir().unwrap();
        let (file, id, path) = netns(elsewhere.path(), "net");
        fs::remove_file(path).unwrap();
        sandboxes.add("u", "first", file, id, Some(Path::new("/run/netns/net")));
        let told = paths(&mut told);
        assert_eq!(NetnsId::at(&told[0].1), Some(id));
        // And it is gone with its sandbox.
        sandboxes.remove("u", "first");
        assert_ne!(NetnsId::at(&told[0].1), Some(id));
    }

    #[test]
    fn what_leads_nowhere_is_let_go_when_one_looks() {
        let dir = tempfile::tempdir().unwrap();
        let (sandboxes, mut told) = Sandboxes::new(vec![dir.path().into()]);
        let (file, id, path) = netns(dir.path(), "cni-1");
        sandboxes.add("u", "first", file, id, None);
        fs::remove_file(path).unwrap();
        sandboxes.found(HashMap::new());
        assert!(paths(&mut told).is_empty());
    }
}

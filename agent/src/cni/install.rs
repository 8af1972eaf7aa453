//! The plugin's place on the node: its program among the CNI plugins, and a list of our own among the
//! network configurations.
//!
//! The runtime takes the first configuration by name. Ours, [`LIST`], comes before those of network
//! plugins. It is made of the one that the runtime would take without it, the *original*, with our
//! entry as its last plugin, and follows that whenever it changes.
//!
//! **Nobody else's file is ever written.** Network plugins write theirs anew when they start, k3s and
//! flannel at every start of the node. An entry in there would be gone then, and until the agent is up
//! pods would start outside of the mesh, in silence. A list of our own stays, so that they wait. And
//! what is ours is taken out by removing one file, whatever others have changed meanwhile.
//!
//! **It never outlives its original.** A list that was made of what is gone would make a node look
//! ready whose network plugin was removed, so it goes too. Where the original is there but cannot be
//! read (somebody is writing it) the last good list stays, and people are told.
//!
//! **A configuration that comes before ours** is what the runtime takes. It is as good if it leads to
//! ours: Multus calls the first configuration that is not its own, and is called by `00-multus.conf`.
//! A list in front of that would be taken into it, and it into the list, without end; therefore
//! [`LIST`] comes behind it and before everybody else. One that does not lead to ours is reported.
//!
//! **Every step is one rename or one removal**, and each leaves a configuration that works: the
//! program is there before the list, and goes only when no configuration is found that names it.
//! While the original is newer than ours, pods start by what it was a moment ago.
//!
//! [`Installer::keep`] installs, watches and repairs; [`Installer::remove`] takes out what is ours,
//! and [`Installer::retire`] before it the list alone.

pub mod conflist;
mod files;
mod places;
mod removal;
mod repairs;
mod wake;

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use serde_json::json;
use thiserror::Error;
use tokio::{
    sync::{Notify, watch},
    task::spawn_blocking,
    time::{sleep, timeout},
};
use tracing::{info, warn};

pub use self::removal::Removed;
use self::{
    files::{Dir, Text, mentions, read_as_node, read_program},
    places::PLACES,
    repairs::Repairs,
    wake::Watch,
};
use super::PLUGIN;
use crate::drain;

/// Our own list. Network plugins' begin at `01-` (kube-ovn), Istio's is `02-istio-conf.conflist`,
/// Cilium's `05-cilium.conflist`, most are `10-`; `00-multus.conf` comes before it, see above.
pub const LIST: &str = "00-picomesh.conflist";
/// Configurations in one directory.
const MAX_FILES: usize = 1024;
/// The plugin has less than 2 MB as it ships; a debug build has more.
const MAX_PROGRAM: u64 = 64 * 1024 * 1024;
/// After the first change its companions are waited for.
const GATHER: Duration = Duration::from_millis(100);
/// Looked at this often without being told.
const POLL: Duration = Duration::from_secs(5);

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InstallSettings {
    /// The node's root directory, as the agent sees it.
    pub host_root: PathBuf,
    /// Where configurations are, as the node sees it; `None`: where a distribution has them.
    pub conf_dir: Option<PathBuf>,
    /// Where plugins are, as the node sees it; `None`: where those are that the configuration names.
    pub bin_dir: Option<PathBuf>,
    /// The plugin's program, as the agent sees it.
    pub program: PathBuf,
    /// The agent's run directory, as the node sees it.
    pub run_dir: PathBuf,
    /// What the plugin goes by while no agent answers, as the node sees it.
    pub intent: PathBuf,
}

/// What became of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Installed {
    /// Not tried yet.
    No,
    /// The node has no network configuration yet; the network plugin will write one.
    NoNetwork,
    /// Paths as the node sees them.
    At {
        configuration: PathBuf,
        program: PathBuf,
    },
    /// It is not as it should be, and why.
    Failed(String),
}

#[derive(Debug, Error)]
pub enum InstallError {
    #[error("{path}: {source}")]
    File { path: PathBuf, source: io::Error },
    #[error(
        "{path}: {source}; chown its directory to root, or give the agent the capability \
         DAC_OVERRIDE: without it root may write only where its owner is root"
    )]
    Denied { path: PathBuf, source: io::Error },
    #[error(
        "{path} {why}; no list is made of it, and pods may be captured only after they have started"
    )]
    Malformed {
        path: PathBuf,
        why: conflist::Malformed,
    },
    #[error(
        "{path} comes before {LIST} by name and does not lead to it, so the runtime does not call \
         {PLUGIN}; restart Multus, or name {LIST} as its master (--multus-master-cni-file-name, \
         multusMasterCNI); rename anything else, or have it call {LIST}"
    )]
    Before { path: PathBuf },
    #[error(
        "{path} still names {PLUGIN}, so its program and what that goes by stay: without them no pod \
         would start; take the entry out of the file (restart whoever has copied it from {LIST}), then \
         run: picomesh-agent cleanup"
    )]
    StillNamed { path: PathBuf },
    #[error(
        "{configuration} names the plugin {plugin}, which is in none of {looked}; name its directory \
         with --cni-bin-dir"
    )]
    NoPrograms {
        configuration: PathBuf,
        plugin: String,
        looked: String,
    },
}

pub struct Installer {
    settings: InstallSettings,
    /// Nothing is put in any more. Held while it is: nobody may put back what is just taken out.
    over: Mutex<bool>,
}

/// What one look at the node has come to.
#[derive(Debug, PartialEq, Eq)]
pub struct Ensured {
    pub now: Installed,
    /// Files that were written or removed.
    pub written: Vec<PathBuf>,
    /// What our list holds; `None`: there shall be none.
    list: Option<String>,
}

/// Where the node's network configuration is.
struct Network {
    dir: Dir,
    bins: Vec<PathBuf>,
    /// Names of others' configurations, in order.
    names: Vec<String>,
}

/// What the runtime would use without ours.
struct Original<'a> {
    name: &'a str,
    path: PathBuf,
    text: String,
    mode: u32,
}

impl Installer {
    pub fn new(settings: InstallSettings) -> Self {
        Self {
            settings,
            over: Mutex::new(false),
        }
    }

    /// Installs, watches and repairs until the end begins. Before it is called the file of
    /// [`super::intent`] must be there. Nothing is done while `writes` says no: two agents of
    /// different builds would replace each other's program without end.
    pub async fn keep(
        self: Arc<Self>,
        writes: Arc<AtomicBool>,
        told: watch::Sender<Installed>,
        mut drain: drain::Guard,
    ) {
        let changed = Arc::new(Notify::new());
        let mut watcher = Watch::new(&changed);
        let mut repairs = Repairs::default();
        let mut list = None;
        loop {
            if let Some(watcher) = &mut watcher {
                watcher.follow(&self.directories());
            }
            let mut rest = None;
            if writes.load(Ordering::Acquire) {
                let installer = Arc::clone(&self);
                let done = spawn_blocking(move || installer.ensure()).await;
                let (mut now, written) = match done {
                    Ok(Ok(done)) => {
                        let follows = done.list != list;
                        list = done.list;
                        (done.now, Written::of(done.written, follows))
                    }
                    Ok(Err(error)) => (Installed::Failed(error.to_string()), Written::Nothing),
                    // The runtime ends.
                    Err(_) => return,
                };
                rest = repairs.rest(written.repaired(), Instant::now());
                if rest.is_some() {
                    now = Installed::Failed(repairs.sentence());
                }
                let before = told.send_replace(now.clone());
                report(&before, &now, &written);
            }
            tokio::select! {
                () = drain.begun() => return,
                // Not woken before: the other's change would do that at once.
                () = sleep(rest.unwrap_or_default()), if rest.is_some() => {}
                waited = timeout(POLL, changed.notified()), if rest.is_none() => if waited.is_ok() {
                    sleep(GATHER).await;
                },
            }
        }
    }

    /// The opposite of [`Installer::keep`]: takes out what an agent before has put there, and ends
    /// when that is done. What the plugin goes by stays, for one that is only just being called.
    pub async fn keep_out(
        self: Arc<Self>,
        writes: Arc<AtomicBool>,
        told: watch::Sender<Installed>,
        mut drain: drain::Guard,
    ) {
        loop {
            if writes.load(Ordering::Acquire) {
                let installer = Arc::clone(&self);
                let Ok(removed) = spawn_blocking(move || installer.unplug()).await else {
                    // The runtime ends.
                    return;
                };
                for path in removed.done {
                    info!(path = %path.display(), "the CNI plugin is taken off the node");
                }
                let Some(problem) = removed.problems.first() else {
                    told.send_replace(Installed::No);
                    return;
                };
                let failed = Installed::Failed(problem.to_string());
                if told.send_replace(failed.clone()) != failed {
                    warn!(%problem, "the CNI plugin cannot be taken off the node");
                }
            }
            tokio::select! {
                () = drain.begun() => return,
                () = sleep(POLL) => {}
            }
        }
    }

    /// Puts in what is missing, and takes out what shall not be there.
    pub fn ensure(&self) -> Result<Ensured, InstallError> {
        let over = self.over.lock();
        if *over {
            return Ok(Ensured {
                now: Installed::No,
                written: Vec::new(),
                list: None,
            });
        }
        let network = self.network()?;
        let mut written = Vec::new();
        // Elsewhere nobody keeps it in step.
        for (conf, _) in self.places() {
            if network.as_ref().is_none_or(|used| used.dir.path != conf)
                && let Some(dir) = self.open(&conf)?
            {
                take_out(&dir, &mut written)?;
            }
        }
        let Some(network) = network else {
            let (now, list) = (Installed::NoNetwork, None);
            return Ok(Ensured { now, written, list });
        };
        let before = self.passed_by(&network);
        let Some(name) = network.names.iter().find(|name| name.as_str() > LIST) else {
            take_out(&network.dir, &mut written)?;
            // There is one, and it comes before ours: what it leads to is gone.
            before?;
            let (now, list) = (Installed::NoNetwork, None);
            return Ok(Ensured { now, written, list });
        };
        let done = self
            .original(&network, name)
            .and_then(|original| self.follow(&network, &original, &mut written));
        match done {
            Ok((list, place)) => Ok(Ensured {
                now: match before {
                    Ok(()) => place,
                    Err(error) => Installed::Failed(error.to_string()),
                },
                written,
                list: Some(list),
            }),
            Err(error) => {
                if !is_last_good(&network.dir, &error) {
                    take_out(&network.dir, &mut written)?;
                }
                Err(error)
            }
        }
    }

    /// Makes ours as the original is now. Says what it holds, and where everything is.
    fn follow(
        &self,
        network: &Network,
        original: &Original<'_>,
        written: &mut Vec<PathBuf>,
    ) -> Result<(String, Installed), InstallError> {
        let dir = &network.dir;
        let entry = self.entry(original.name);
        let list = made(
            if is_list(original.name) {
                conflist::from_list(&original.text, &entry)
            } else {
                conflist::from_single(&original.text, &entry)
            },
            &original.path,
        )?;
        let bin = self.bin_of(network, original)?;
        let program = bin.named(PLUGIN);
        if self.copy_program(&bin)? {
            written.push(program.clone());
        }
        let configuration = dir.named(LIST);
        let there = dir.read(LIST, list.len());
        if !there.is_ok_and(|there| there.bytes == list.as_bytes() && there.mode == original.mode) {
            let put = dir.put(LIST, list.as_bytes(), original.mode);
            put.map_err(at(configuration.clone()))?;
            written.push(configuration.clone());
        }
        let place = Installed::At {
            configuration,
            program,
        };
        Ok((list, place))
    }

    /// Is the runtime led to ours by everything that comes before it?
    fn passed_by(&self, network: &Network) -> Result<(), InstallError> {
        let Some(first) = network.names.first().filter(|name| name.as_str() < LIST) else {
            return Ok(());
        };
        let path = network.dir.named(first);
        let root = &self.settings.host_root;
        for word in [PLUGIN, LIST] {
            if mentions(root, &path, word, conflist::MAX_BYTES).map_err(at(path.clone()))? {
                return Ok(());
            }
        }
        Err(InstallError::Before { path })
    }

    /// Of a list that is made of `original`.
    fn entry(&self, original: &str) -> String {
        json!({
            "type": PLUGIN,
            "capabilities": {"io.kubernetes.cri.pod-annotations": true},
            "runDir": self.settings.run_dir.to_string_lossy(),
            "intent": self.settings.intent.to_string_lossy(),
            "madeOf": original,
        })
        .to_string()
    }

    /// Directories of configurations and those of their plugins.
    fn places(&self) -> Vec<(PathBuf, Vec<PathBuf>)> {
        let of = |bins: &[&str]| match &self.settings.bin_dir {
            Some(dir) => vec![dir.clone()],
            None => bins.iter().map(PathBuf::from).collect(),
        };
        match &self.settings.conf_dir {
            Some(conf) => {
                let known = PLACES.iter().find(|(dir, _)| conf == Path::new(dir));
                let (_, everywhere) = PLACES[PLACES.len() - 1];
                vec![(conf.clone(), of(known.map_or(everywhere, |(_, bins)| bins)))]
            }
            None => {
                let all = PLACES.iter();
                all.map(|(conf, bins)| (PathBuf::from(conf), of(bins)))
                    .collect()
            }
        }
    }

    /// The first place that has a configuration of somebody else's.
    fn network(&self) -> Result<Option<Network>, InstallError> {
        for (conf, bins) in self.places() {
            let Some(dir) = self.open(&conf)? else {
                continue;
            };
            let mut names = dir.names(MAX_FILES).map_err(at(conf))?;
            names.retain(|name| is_configuration(name) && name != LIST);
            if !names.is_empty() {
                return Ok(Some(Network { dir, bins, names }));
            }
        }
        Ok(None)
    }

    fn open(&self, path: &Path) -> Result<Option<Dir>, InstallError> {
        Dir::open(&self.settings.host_root, path).map_err(at(path.to_owned()))
    }

    fn original<'a>(&self, network: &Network, name: &'a str) -> Result<Original<'a>, InstallError> {
        let path = network.dir.named(name);
        let read = read_as_node(&self.settings.host_root, &path, conflist::MAX_BYTES);
        let Text { bytes, mode } = read.map_err(at(path.clone()))?;
        let garbage = |_| conflist::Malformed::Garbage("it is not UTF-8".into());
        let text = made(String::from_utf8(bytes).map_err(garbage), &path)?;
        Ok(Original {
            name,
            path,
            text,
            mode,
        })
    }

    /// The directory that holds the first plugin of the configuration.
    fn bin_of(&self, network: &Network, original: &Original<'_>) -> Result<Dir, InstallError> {
        let first = if is_list(original.name) {
            conflist::programs(&original.text).map(|all| all.into_iter().next())
        } else {
            conflist::program(&original.text).map(Some)
        };
        let first = first.and_then(|first| first.ok_or(conflist::Malformed::NoPlugins));
        let plugin = made(first, &original.path)?;
        for path in &network.bins {
            let dir = self.open(path)?;
            // Whoever names a directory knows why.
            let named = self.settings.bin_dir.is_some();
            if let Some(dir) = dir
                && (named || is_name(&plugin) && dir.has(&plugin))
            {
                return Ok(dir);
            }
        }
        let looked: Vec<_> = network
            .bins
            .iter()
            .map(|p| p.display().to_string())
            .collect();
        Err(InstallError::NoPrograms {
            configuration: original.path.clone(),
            plugin,
            looked: looked.join(", "),
        })
    }

    /// True: it was written.
    fn copy_program(&self, bin: &Dir) -> Result<bool, InstallError> {
        let ours = &self.settings.program;
        let program = read_program(ours, MAX_PROGRAM).map_err(at(ours.clone()))?;
        let there = bin.read(PLUGIN, program.len());
        if there.is_ok_and(|there| there.bytes == program && there.mode == 0o755) {
            return Ok(false);
        }
        let put = bin.put(PLUGIN, &program, 0o755);
        put.map(|()| true).map_err(at(bin.named(PLUGIN)))
    }

    /// Those that exist, as the agent sees them.
    fn directories(&self) -> Vec<PathBuf> {
        let open = |path: &Path| {
            let dir = self.open(path).ok().flatten()?;
            fs::canonicalize(dir.at()).ok()
        };
        let mut all = Vec::new();
        for (conf, bins) in self.places() {
            // Without configurations its plugins are of no interest: /bin is one of these places.
            if let Some(conf) = open(&conf) {
                all.push(conf);
                all.extend(bins.iter().filter_map(|bin| open(bin)));
            }
        }
        all
    }
}

/// May our list stay as it is, though the original is not what it could be made of?
fn is_last_good(dir: &Dir, error: &InstallError) -> bool {
    if let InstallError::Malformed {
        why: conflist::Malformed::Version(_),
        ..
    } = error
    {
        // It is good, and newer than ours.
        return false;
    }
    let longest = 2 * conflist::MAX_BYTES;
    let Ok(there) = dir.read(LIST, longest) else {
        return false;
    };
    let text = String::from_utf8(there.bytes).unwrap_or_default();
    conflist::made_of(&text).is_some_and(|name| is_name(&name) && dir.has(&name))
}

fn take_out(dir: &Dir, written: &mut Vec<PathBuf>) -> Result<(), InstallError> {
    let path = dir.named(LIST);
    dir.tidy(LIST).map_err(at(path.clone()))?;
    if dir.remove(LIST).map_err(at(path.clone()))? {
        written.push(path);
    }
    Ok(())
}

fn made<T>(made: Result<T, conflist::Malformed>, path: &Path) -> Result<T, InstallError> {
    made.map_err(|why| InstallError::Malformed {
        path: path.to_owned(),
        why,
    })
}

fn at(path: PathBuf) -> impl FnOnce(io::Error) -> InstallError {
    move |source| {
        if source.kind() == io::ErrorKind::PermissionDenied {
            InstallError::Denied { path, source }
        } else {
            InstallError::File { path, source }
        }
    }
}

/// What runtimes look at.
fn is_configuration(name: &str) -> bool {
    let extension = Path::new(name).extension().and_then(|e| e.to_str());
    matches!(extension, Some("conf" | "conflist" | "json"))
}

fn is_list(name: &str) -> bool {
    Path::new(name).extension().is_some_and(|e| e == "conflist")
}

/// Of a program in a directory, not of a path out of it.
fn is_name(name: &str) -> bool {
    !name.contains('/') && name != "." && name != ".."
}

/// Why files were written.
enum Written {
    Nothing,
    /// The original is another, or ours is new.
    Following(Vec<PathBuf>),
    /// Somebody has undone what was there already.
    Repairing(Vec<PathBuf>),
}

impl Written {
    fn of(files: Vec<PathBuf>, follows: bool) -> Self {
        match (files.is_empty(), follows) {
            (true, _) => Self::Nothing,
            (false, true) => Self::Following(files),
            (false, false) => Self::Repairing(files),
        }
    }

    fn repaired(&self) -> Option<&Path> {
        match self {
            Self::Repairing(files) => files.last().map(PathBuf::as_path),
            Self::Nothing | Self::Following(_) => None,
        }
    }
}

fn report(before: &Installed, now: &Installed, written: &Written) {
    match written {
        Written::Repairing(files) => warn!(
            ?files,
            "the CNI plugin's place was changed by somebody, and is put right"
        ),
        Written::Following(files) => info!(?files, "written as the node's network is"),
        Written::Nothing => {}
    }
    if before == now {
        return;
    }
    match now {
        Installed::At {
            configuration,
            program,
        } => {
            let (configuration, program) = (configuration.display(), program.display());
            info!(%configuration, %program, "the CNI plugin is in its place");
        }
        Installed::NoNetwork => {
            info!("the node has no network configuration; the CNI plugin waits for one");
        }
        Installed::Failed(error) => warn!(error, "the CNI plugin is not as it should be"),
        Installed::No => {}
    }
}

#[cfg(test)]
mod tests;

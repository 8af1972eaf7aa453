//! The plugin's place on the node: its program among the CNI plugins, and its entry in the network
//! configuration that the runtime uses.
//!
//! The runtime takes the first configuration by name. If it is a list (`.conflist`) our entry
//! becomes its last plugin, and nothing else in the file changes. A single plugin (`.conf`) cannot
//! be chained, so a list is made of it in a file of our own, whose name comes before the other's;
//! the other stays as it is.
//!
//! **Every step is one rename**, and each leaves a configuration that works: the program is there
//! before the entry, and the program goes only when no configuration is found that has it. What is not understood is reported
//! and left alone; the runtime would not read it either.
//!
//! **Others write here too.** Network plugins write their configuration anew when they start.
//! [`Installer::keep`] watches, and puts the entry back. What happens to a pod that starts in
//! between is what happens to pods that are older than the agent: it is found and captured, if a
//! moment late.
//!
//! [`Installer::remove`] takes out exactly what is ours, whatever others have changed meanwhile.

pub mod conflist;
mod files;
mod places;
mod wake;

use std::{
    collections::VecDeque,
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use serde_json::json;
use thiserror::Error;
use tokio::{
    sync::{Notify, watch},
    task::spawn_blocking,
    time::{sleep, timeout},
};
use tracing::{debug, info, warn};

use self::{
    files::{Dir, Text, mentions, read_program},
    places::PLACES,
    wake::Watch,
};
use super::PLUGIN;
use crate::drain;

/// What the names of our own lists end with. They come before what they are made of: `-` < `.`.
const MADE: &str = "-picomesh.conflist";
/// Configurations in one directory.
const MAX_FILES: usize = 1024;
/// The plugin has less than 2 MB as it ships; a debug build has more.
const MAX_PROGRAM: u64 = 64 * 1024 * 1024;
/// After the first change its companions are waited for.
const GATHER: Duration = Duration::from_millis(100);
/// How often a file that somebody else is writing is tried in one go.
const TRIES: u32 = 5;
/// More repairs than this within [`QUARREL`] are a quarrel: somebody puts back what we replace.
const REPAIRS: usize = 3;
const QUARREL: Duration = Duration::from_secs(60);
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
    #[error("{path} {why}; it is left alone, and pods are captured only after they have started")]
    Malformed {
        path: PathBuf,
        why: conflist::Malformed,
    },
    #[error("{path} is written by somebody else all the time; it is tried again")]
    Contended { path: PathBuf },
    #[error(
        "{path} still names {PLUGIN}, so its program and what that goes by stay: without them no pod \
         would start; take the entry out of the file, then run: picomesh-agent cleanup"
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

/// What was removed, and what could not be.
#[derive(Debug, Default)]
pub struct Removed {
    pub done: Vec<PathBuf>,
    pub problems: Vec<InstallError>,
    /// No configuration of the node names the plugin any more: nobody misses what it needs.
    pub unplugged: bool,
}

pub struct Installer {
    settings: InstallSettings,
    entry: String,
}

/// The configuration that the runtime uses.
struct Network {
    dir: Dir,
    bins: Vec<PathBuf>,
    name: String,
    text: String,
    read: Text,
}

impl Installer {
    pub fn new(settings: InstallSettings) -> Self {
        let entry = json!({
            "type": PLUGIN,
            "capabilities": {"io.kubernetes.cri.pod-annotations": true},
            "runDir": settings.run_dir.to_string_lossy(),
            "intent": settings.intent.to_string_lossy(),
        });
        Self {
            entry: entry.to_string(),
            settings,
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
        loop {
            if let Some(watcher) = &mut watcher {
                watcher.follow(&self.directories());
            }
            let mut rest = None;
            if writes.load(Ordering::Acquire) {
                let installer = Arc::clone(&self);
                let done = spawn_blocking(move || installer.ensure()).await;
                let (mut now, mended) = match done {
                    Ok(Ok((now, mended))) => (now, mended),
                    Ok(Err(error)) => (Installed::Failed(error.to_string()), Vec::new()),
                    // The runtime ends.
                    Err(_) => return,
                };
                rest = repairs.rest(&mended, Instant::now());
                if rest.is_some() {
                    now = Installed::Failed(repairs.sentence());
                }
                let before = told.send_replace(now.clone());
                report(&before, &now, &mended);
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

    /// Puts in what is missing; says which files were written.
    pub fn ensure(&self) -> Result<(Installed, Vec<PathBuf>), InstallError> {
        let Some(network) = self.network()? else {
            // A list that was made of what is gone would be all that the runtime finds.
            let mut written = Vec::new();
            for (conf, _) in self.places() {
                let dir = Dir::open(&self.settings.host_root, &conf).map_err(at(conf))?;
                written.extend(dir.iter().flat_map(|dir| take_out_others(dir, None)));
            }
            return Ok((Installed::NoNetwork, written));
        };
        let done = self.put_in(&network);
        if let Err(InstallError::Malformed {
            why: conflist::Malformed::Version(_),
            ..
        }) = done
        {
            // Its version was changed below our entry, or an agent before had let it pass.
            take_out_others(&network.dir, None);
        }
        done
    }

    fn put_in(&self, network: &Network) -> Result<(Installed, Vec<PathBuf>), InstallError> {
        let mut written = Vec::new();
        let bin = self.bin_of(network)?;
        let (dir, read) = (&network.dir, &network.read);
        let path = dir.named(&network.name);
        let listed = is_list(&network.name);
        // Ours, and what it shall hold, unless it does already.
        let (name, new) = if listed {
            let new = edited(conflist::with_entry(&network.text, &self.entry), &path)?;
            (network.name.clone(), new)
        } else {
            let list = edited(conflist::from_single(&network.text, &self.entry), &path)?;
            let made = made_of(&network.name);
            let there = dir.read(&made, conflist::MAX_BYTES);
            let same = there.is_ok_and(|there| there.bytes == list.as_bytes());
            (made, (!same).then_some(list))
        };
        let program = bin.named(PLUGIN);
        if self.copy_program(&bin)? {
            written.push(program.clone());
        }
        let configuration = dir.named(&name);
        if let Some(new) = new {
            if listed {
                replace(dir, &name, Some(read), &new)?;
            } else {
                let put = dir.put(&name, new.as_bytes(), read.mode);
                put.map_err(at(configuration.clone()))?;
            }
            written.push(configuration.clone());
        }
        // What the runtime used before, and uses no more.
        written.extend(take_out_others(dir, Some(&name)));
        let now = Installed::At {
            configuration,
            program,
        };
        Ok((now, written))
    }

    /// Takes out everything of ours, wherever a distribution could have it. What others have there
    /// stays as it is now. A runtime that finds our entry and not our program starts no pod, so as
    /// long as one configuration names the plugin everything that it needs stays.
    pub fn remove(&self) -> Removed {
        let mut removed = self.unplug();
        if removed.unplugged {
            // Last: a plugin that still runs must not miss it.
            self.forget_intent(&mut removed);
        }
        removed
    }

    /// The entry, and if no configuration has it any more the program.
    fn unplug(&self) -> Removed {
        let mut removed = Removed::default();
        let mut bins = Vec::new();
        let mut named = false;
        for (conf, candidates) in self.places() {
            match Dir::open(&self.settings.host_root, &conf) {
                Ok(Some(dir)) => {
                    take_out(&dir, None, &mut removed);
                    named |= self.is_named(&dir, &mut removed);
                }
                Ok(None) => {}
                Err(source) => {
                    named = true;
                    removed.problems.push(at(conf)(source));
                }
            }
            bins.extend(candidates);
        }
        removed.unplugged = !named;
        if named {
            return removed;
        }
        for path in bins {
            let gone = Dir::open(&self.settings.host_root, &path).and_then(|dir| match dir {
                Some(dir) => dir.tidy(PLUGIN).and_then(|()| dir.remove(PLUGIN)),
                None => Ok(false),
            });
            removed.note(path.join(PLUGIN), gone);
        }
        removed
    }

    /// Does any configuration still name the plugin? One that cannot be read might.
    fn is_named(&self, dir: &Dir, removed: &mut Removed) -> bool {
        let names = match dir.names(MAX_FILES) {
            Ok(names) => names,
            Err(source) => {
                removed.problems.push(at(dir.path.clone())(source));
                return true;
            }
        };
        let mut named = false;
        for name in names.iter().filter(|name| is_configuration(name)) {
            let path = dir.named(name);
            let root = &self.settings.host_root;
            match mentions(root, &path, PLUGIN, conflist::MAX_BYTES) {
                Ok(false) => continue,
                Ok(true) => removed.problems.push(InstallError::StillNamed { path }),
                Err(source) => removed.problems.push(at(path)(source)),
            }
            named = true;
        }
        named
    }

    fn forget_intent(&self, removed: &mut Removed) {
        let intent = &self.settings.intent;
        let (Some(parent), Some(name)) = (intent.parent(), intent.file_name()) else {
            return;
        };
        let name = name.to_string_lossy();
        let gone = Dir::open(&self.settings.host_root, parent).and_then(|dir| match dir {
            Some(dir) => {
                dir.remove(&format!("{name}.new"))?;
                let gone = dir.remove(&name)?;
                // Not if anything else is in it.
                let _others = fs::canonicalize(dir.at()).and_then(fs::remove_dir);
                Ok(gone)
            }
            None => Ok(false),
        });
        removed.note(intent.clone(), gone);
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

    fn network(&self) -> Result<Option<Network>, InstallError> {
        for (conf, bins) in self.places() {
            let opened = Dir::open(&self.settings.host_root, &conf);
            let Some(dir) = opened.map_err(at(conf.clone()))? else {
                continue;
            };
            let names = dir.names(MAX_FILES).map_err(at(conf))?;
            let Some(name) = names
                .into_iter()
                .find(|name| is_configuration(name) && !name.ends_with(MADE))
            else {
                continue;
            };
            let path = dir.named(&name);
            let read = dir
                .read(&name, conflist::MAX_BYTES)
                .map_err(at(path.clone()))?;
            let Ok(text) = String::from_utf8(read.bytes.clone()) else {
                let why = conflist::Malformed::Garbage("it is not UTF-8".into());
                return Err(InstallError::Malformed { path, why });
            };
            return Ok(Some(Network {
                dir,
                bins,
                name,
                text,
                read,
            }));
        }
        Ok(None)
    }

    /// The directory that holds the first plugin of the configuration.
    fn bin_of(&self, network: &Network) -> Result<Dir, InstallError> {
        let configuration = network.dir.named(&network.name);
        let first = if is_list(&network.name) {
            conflist::programs(&network.text).map(|all| all.into_iter().next())
        } else {
            conflist::program(&network.text).map(Some)
        };
        let first = first.and_then(|first| first.ok_or(conflist::Malformed::NoPlugins));
        let plugin = edited(first, &configuration)?;
        for path in &network.bins {
            let dir = Dir::open(&self.settings.host_root, path).map_err(at(path.clone()))?;
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
            configuration,
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
            let dir = Dir::open(&self.settings.host_root, path).ok().flatten()?;
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

/// Files that were put right of late, so that two who each put theirs back do not do it without end.
#[derive(Default)]
struct Repairs {
    times: VecDeque<Instant>,
    last: PathBuf,
}

impl Repairs {
    /// How long to leave it alone; `None`: nobody quarrels.
    fn rest(&mut self, written: &[PathBuf], now: Instant) -> Option<Duration> {
        if let Some(path) = written.last() {
            self.times.push_back(now);
            self.last.clone_from(path);
        }
        let old = |then: &Instant| now.saturating_duration_since(*then) >= QUARREL;
        while self.times.front().is_some_and(old) {
            self.times.pop_front();
        }
        let more = u32::try_from(self.times.len().checked_sub(REPAIRS + 1)?).unwrap_or(u32::MAX);
        Some((2 * GATHER * 2_u32.saturating_pow(more)).min(POLL))
    }

    fn sentence(&self) -> String {
        format!(
            "somebody restores {} whenever the CNI plugin's entry is put in; find out who, or set \
             --no-cni",
            self.last.display()
        )
    }
}

impl Removed {
    fn note(&mut self, path: PathBuf, gone: io::Result<bool>) {
        match gone {
            Ok(true) => self.done.push(path),
            Ok(false) => {}
            Err(source) => self.problems.push(at(path)(source)),
        }
    }
}

/// Takes our entry out of every list but `kept`, and removes every other list that we have made.
fn take_out(dir: &Dir, kept: Option<&str>, removed: &mut Removed) {
    let names = match dir.names(MAX_FILES) {
        Ok(names) => names,
        Err(source) => return removed.problems.push(at(dir.path.clone())(source)),
    };
    for name in names.into_iter().filter(|name| kept != Some(name.as_str())) {
        let path = dir.named(&name);
        if name.ends_with(MADE) {
            removed.note(path, dir.remove(&name));
            continue;
        }
        if !is_list(&name) {
            continue;
        }
        match take_out_of(dir, &name) {
            Ok(true) => removed.done.push(path),
            Ok(false) => {}
            Err(problem) => removed.problems.push(problem),
        }
    }
}

/// Takes ours out of what the runtime does not use; says which files were written.
fn take_out_others(dir: &Dir, kept: Option<&str>) -> Vec<PathBuf> {
    let mut removed = Removed::default();
    take_out(dir, kept, &mut removed);
    for problem in removed.problems {
        debug!(%problem, "a configuration that is not used");
    }
    removed.done
}

/// True: our entry was there.
fn take_out_of(dir: &Dir, name: &str) -> Result<bool, InstallError> {
    let path = dir.named(name);
    dir.tidy(name).map_err(at(path.clone()))?;
    let mut tries = 0;
    loop {
        tries += 1;
        // What cannot be read is told by whoever must know that nobody names us any more.
        let Ok(read) = dir.read(name, conflist::MAX_BYTES) else {
            return Ok(false);
        };
        let text = match std::str::from_utf8(&read.bytes) {
            Ok(text) if text.contains(PLUGIN) => text,
            Ok(_) | Err(_) => return Ok(false),
        };
        let Some(new) = edited(conflist::without_entry(text), &path)? else {
            return Ok(false);
        };
        match replace(dir, name, Some(&read), &new) {
            Ok(()) => return Ok(true),
            Err(InstallError::Contended { .. }) if tries < TRIES => thread::sleep(GATHER),
            Err(error) => return Err(error),
        }
    }
}

fn replace(dir: &Dir, name: &str, before: Option<&Text>, new: &str) -> Result<(), InstallError> {
    let path = dir.named(name);
    match dir.replace(name, before, new.as_bytes()) {
        Ok(true) => Ok(()),
        Ok(false) => Err(InstallError::Contended { path }),
        Err(source) => Err(at(path)(source)),
    }
}

fn edited<T>(edited: Result<T, conflist::Malformed>, path: &Path) -> Result<T, InstallError> {
    edited.map_err(|why| InstallError::Malformed {
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

/// The name of the list that we make of a single configuration.
fn made_of(name: &str) -> String {
    let stem = name.rsplit_once('.').map_or(name, |(stem, _)| stem);
    format!("{stem}{MADE}")
}

fn report(before: &Installed, now: &Installed, written: &[PathBuf]) {
    if before == now && written.is_empty() {
        return;
    }
    let first = matches!(before, Installed::No | Installed::NoNetwork);
    match now {
        Installed::At { .. } if !written.is_empty() && !first => {
            warn!(
                ?written,
                "the CNI plugin's place was changed by somebody, and is put right"
            );
        }
        Installed::At {
            configuration,
            program,
        } => {
            let (configuration, program) = (configuration.display(), program.display());
            info!(%configuration, %program, "the CNI plugin is in its place");
        }
        Installed::NoNetwork => {
            info!("the node has no network configuration yet; the CNI plugin waits for one");
        }
        Installed::Failed(error) => warn!(error, "the CNI plugin cannot be installed"),
        Installed::No => {}
    }
}

#[cfg(test)]
mod tests;

//! Which pods should be captured, which are, and the way from one to the other.
//!
//! [`Datapath`] is the room's handle for the wiring, `debug pods` and the metrics. Behind it runs
//! one loop: whenever the desired pods change, every thirty seconds and when it is kicked, it
//! compares what should be with what the *kernel* says ([`enrolment`]) and mends the difference.
//! It believes neither annotations nor its own memory; what it remembers over a `kill -9`
//! ([`records`]) it checks first.
//!
//! One writer: only the loop changes the table of pods. The work itself blocks (netlink, loading
//! programs), so it runs on a few worker threads; nothing else of the agent waits for it.

mod captured;
mod claims;
mod enrolment;
mod error;
mod leaving;
mod link_watch;
mod pause;
mod reconcile;
mod records;
mod regain;
mod table;

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use anyhow::Context;
use parking_lot::Mutex;
use picomesh_common::config::rule;
use tokio::{
    sync::{Notify, mpsc, watch},
    task::spawn_blocking,
};

use self::{
    captured::Core,
    claims::Claims,
    enrolment::Adopted,
    error::PodError,
    pause::Turns,
    reconcile::Reconciler,
    records::{Record, RunDir},
    table::Table,
};
use super::{
    Desired, PodEvent,
    loader::{self, Generation, Loader, LoaderSettings},
    netns::Home,
    sockets::{PodHandle, SocketOwner},
};
use crate::state::PodUid;

pub use pause::Paused;

#[derive(Clone, Debug)]
pub struct DatapathSettings {
    /// Pins live in `<bpf_dir>/v<LAYOUT>`.
    pub bpf_dir: PathBuf,
    /// Holds the marks of this boot.
    pub run_dir: PathBuf,
    pub data_threads: usize,
    /// Use clsact even where TCX is there.
    pub force_clsact: bool,
    /// Without a listener packets pass (explicit setting of the user).
    pub fail_open: bool,
    /// `rule` bits in force; anything but all of them only in test builds.
    pub rules: u32,
    /// The default but in test builds.
    pub generation: Generation,
}

/// For `debug pods`, metrics and readiness.
#[derive(Clone, Debug, serde::Serialize)]
pub struct PodStatus {
    pub uid: String,
    pub name: String,
    pub slot: Option<u32>,
    /// `captured`, `pending`, `failed`, `leaving`.
    pub state: &'static str,
    /// Why, when `failed`: a fixed word for the metric's label and a sentence for people.
    pub reason: Option<(&'static str, String)>,
    /// Repairs done since it was captured.
    pub repairs: u64,
    /// What the last of them put right, one fixed word each.
    pub mended: Vec<&'static str>,
    /// (name of `picomesh_common::Counter`, count), zeros left out.
    pub counters: Vec<(&'static str, u64)>,
}

/// Where one pod is captured; for whoever waits for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Capture {
    /// In the network namespace with this inode.
    At { netns: u64 },
    /// Not, and why not, if it was tried.
    Not { reason: Option<String> },
}

/// The room's handle.
pub struct Datapath {
    core: Arc<Core>,
    table: Arc<Mutex<Table>>,
    kick: Arc<Notify>,
    turns: Arc<Turns>,
}

/// Pods whose interfaces changed and that wait to be looked at; more of them wait in their sockets.
const LOOKS: usize = 64;

impl Datapath {
    /// Mounts nothing, needs bpffs and cgroup v2 to be there (says what is missing). Adopts what an
    /// earlier agent of the same layout left pinned: when this returns, each adopted pod has its
    /// listeners.
    ///
    /// The calling thread must be in the node's network namespace. If pods were adopted, an empty
    /// first value of `desired` means "not known yet" and un-enrols nobody; the next value counts
    /// whatever it is. Ends, leaving everything pinned, when the sender of `desired` is dropped.
    pub async fn start(
        settings: DatapathSettings,
        mut desired: watch::Receiver<Desired>,
        events: mpsc::Sender<PodEvent>,
    ) -> anyhow::Result<Arc<Self>> {
        // Now: taken by the loop when it first runs, the next value would pass for the first.
        let first = Arc::clone(&desired.borrow_and_update());
        let home = Home::of_this_thread().context("the agent's network namespace")?;
        let (looks, to_look_at) = mpsc::channel(LOOKS);
        let (core, adopted, failed) = spawn_blocking(move || open(settings, home, events, looks))
            .await
            .context("start")??;
        let mut table = Table::default();
        for (record, error) in failed {
            let uid = PodUid::from(record.uid.as_str());
            table.adopt_failed(&uid, &record.name, &error, Instant::now());
        }
        let mut announced = Vec::new();
        for Adopted {
            captured,
            listeners,
        } in adopted
        {
            if !listeners.is_empty() {
                let pod = Arc::clone(&captured.handle);
                announced.push(PodEvent::Captured { pod, listeners });
            }
            table.adopt(captured);
        }
        let datapath = Arc::new(Self {
            core: Arc::new(core),
            table: Arc::new(Mutex::new(table)),
            kick: Arc::new(Notify::new()),
            turns: Arc::new(Turns::new()),
        });
        let reconciler = Reconciler {
            core: Arc::clone(&datapath.core),
            table: Arc::clone(&datapath.table),
            kick: Arc::clone(&datapath.kick),
            turns: Arc::clone(&datapath.turns),
        };
        tokio::spawn(reconciler.run((first, desired), announced, to_look_at));
        Ok(datapath)
    }

    pub fn status(&self) -> Vec<PodStatus> {
        let mut all: Vec<PodStatus> = self
            .table
            .lock()
            .pods
            .iter()
            .map(|(uid, entry)| entry.status(uid))
            .collect();
        for status in &mut all {
            let counters = status.slot.map(|slot| self.core.loader.counters(slot));
            status.counters = counters
                .and_then(Result::ok)
                .unwrap_or_default()
                .into_iter()
                .filter(|(_counter, count)| *count > 0)
                .map(|(counter, count)| (counter.name(), count))
                .collect();
        }
        all.sort_by(|a, b| a.name.cmp(&b.name).then_with(|| a.uid.cmp(&b.uid)));
        all
    }

    /// Of one pod; `None`: it should not be captured and is not. Cheap: one look into a table.
    pub fn capture(&self, uid: &str) -> Option<Capture> {
        self.table.lock().capture(uid)
    }

    /// Why probes of the host are not recognised (word, sentence), if they are not: strict pods
    /// then fail their probes.
    pub fn host_problem(&self) -> Option<(&'static str, String)> {
        self.table.lock().host_problem.clone()
    }

    /// Repairs of what the pods share: pins of maps that somebody removed.
    pub fn shared_repairs(&self) -> u64 {
        self.table.lock().shared_repairs
    }

    /// Has every desired pod been tried at least once?
    pub fn is_settled(&self) -> bool {
        let table = self.table.lock();
        table.known && table.is_tried()
    }

    /// Compare everything now instead of at the next turn.
    pub fn kick(&self) {
        self.kick.notify_one();
    }

    /// Un-enrols everything and removes every trace (`picomesh-agent cleanup`). For when no agent
    /// runs on these directories; one that does would enrol its pods again. What fails is told at
    /// the end and keeps nothing else; its record stays.
    pub async fn cleanup(settings: DatapathSettings) -> anyhow::Result<()> {
        let home = Home::of_this_thread().context("the agent's network namespace")?;
        spawn_blocking(move || clean(&settings, &home))
            .await
            .context("cleanup")?
    }
}

/// A pod that was captured, and cannot be served.
type NotAdopted = (Record, PodError);

/// Opens everything and adopts what is pinned: listeners into the programs that are there, before
/// anything that takes time.
fn open(
    settings: DatapathSettings,
    home: Arc<Home>,
    events: mpsc::Sender<PodEvent>,
    looks: mpsc::Sender<PodUid>,
) -> anyhow::Result<(Core, Vec<Adopted>, Vec<NotAdopted>)> {
    anyhow::ensure!(
        settings.data_threads > 0,
        "data threads: 0; a connection needs at least one to serve it"
    );
    if cfg!(not(feature = "testing")) {
        anyhow::ensure!(
            settings.rules == rule::ALL,
            "rules: {:#x}; only test builds may take rules of the kernel half out",
            settings.rules
        );
        anyhow::ensure!(
            settings.generation == Generation::default(),
            "generation: {:?}; only test builds may pass for another one",
            settings.generation
        );
    }
    let run_dir = RunDir::open(&settings.run_dir)?;
    records::check_bpffs(&settings.bpf_dir)?;
    let marks = run_dir.marks()?;
    let records = run_dir.records()?;
    let loader = Loader::new(loader_settings(&settings, marks, home.cookie()))
        .context("loading the kernel half")?;
    let owner = SocketOwner {
        mark: marks.ours,
        marker: Arc::new(loader.marker()?),
    };
    let strays = strays(&loader, &records)?;
    let claims = Claims::new(run_dir, records.clone(), strays);
    let core = Core {
        settings,
        loader,
        home,
        marks,
        owner,
        events,
        claims,
        looks,
    };

    let (mut adopted, mut failed) = (Vec::new(), Vec::new());
    for record in records {
        match enrolment::adopt(&core, &record) {
            Ok(Some(pod)) => adopted.push(announce(&core, pod)),
            Ok(None) => tracing::info!(pod = record.name, "gone while no agent was running"),
            Err(error) => failed.push((record, error)),
        }
    }
    Ok((core, adopted, failed))
}

/// What is pinned for pods on no record, with the inodes of their namespaces. They stay as they
/// are, closed, until it turns out whose they are; those of namespaces that are gone are removed.
fn strays(loader: &Loader, records: &[Record]) -> anyhow::Result<HashMap<u32, u64>> {
    let mut strays = HashMap::new();
    for slot in loader.pinned_slots()? {
        if records.iter().any(|record| record.slot == slot) {
            continue;
        }
        if let Some(inode) = loader.netns_of(slot)? {
            tracing::warn!(slot, netns = inode, "pinned programs of a pod on no record");
            strays.insert(slot, inode);
        } else {
            loader.detach(slot, &[])?;
            loader.clear_slot(slot)?;
        }
    }
    Ok(strays)
}

/// Whoever serves connections hears of a pod as soon as its listeners stand in the map: while the
/// others are adopted nobody should wait. What does not fit the queue is told later.
fn announce(core: &Core, mut pod: Adopted) -> Adopted {
    if let Ok(place) = core.events.try_reserve() {
        place.send(PodEvent::Captured {
            pod: Arc::<PodHandle>::clone(&pod.captured.handle),
            listeners: std::mem::take(&mut pod.listeners),
        });
    }
    pod
}

/// Makes the bpf directory, for its owner alone, if it is not there.
pub fn make_bpf_dir(bpf_dir: &Path) -> anyhow::Result<()> {
    records::check_bpffs(bpf_dir)?;
    Ok(loader::make_dir(bpf_dir)?)
}

fn loader_settings(
    settings: &DatapathSettings,
    marks: records::Marks,
    node_netns_cookie: u64,
) -> LoaderSettings {
    LoaderSettings {
        bpf_dir: settings.bpf_dir.clone(),
        our_mark: marks.ours,
        capture_mark: marks.capture,
        node_netns_cookie,
        rules: settings.rules,
        force_clsact: settings.force_clsact,
        generation: settings.generation.clone(),
    }
}

fn clean(settings: &DatapathSettings, home: &Arc<Home>) -> anyhow::Result<()> {
    if !settings.run_dir.exists() && !settings.bpf_dir.exists() {
        return Ok(());
    }
    let run_dir = RunDir::open(&settings.run_dir)?;
    records::check_bpffs(&settings.bpf_dir)?;
    let marks = run_dir.marks()?;
    let loader = Loader::new(loader_settings(settings, marks, home.cookie()))?;
    let mut problems = Problems::default();
    let mut kept = run_dir.records()?;
    kept.retain(|record| {
        let alias = captured::alias(&settings.bpf_dir, &record.uid);
        let cleaned = leaving::clean(&loader, home, marks, record, alias)
            .with_context(|| format!("pod {}", record.name));
        problems.note(cleaned)
    });
    for slot in loader.pinned_slots()? {
        let detached = loader.detach(slot, &[]);
        problems.note(detached.with_context(|| format!("slot {slot}")));
    }
    problems.note(loader.remove_everything().map_err(Into::into));
    // What could not be cleaned is known still to whoever cleans again.
    let recorded = if kept.is_empty() {
        run_dir.forget()
    } else {
        run_dir.save(&kept)
    };
    problems.note(recorded.map_err(Into::into));
    problems.first.map_or(Ok(()), Err)
}

/// What went wrong where the rest is done all the same: one pod must not keep the others.
#[derive(Default)]
struct Problems {
    first: Option<anyhow::Error>,
}

impl Problems {
    /// True: it failed.
    fn note(&mut self, result: anyhow::Result<()>) -> bool {
        let Err(error) = result else { return false };
        if self.first.is_none() {
            self.first = Some(error);
        } else {
            tracing::warn!(error = format!("{error:#}"), "cannot be cleaned either");
        }
        true
    }
}

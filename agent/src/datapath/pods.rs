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

mod enrolment;
mod records;

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context;
use parking_lot::Mutex;
use picomesh_common::{StandingKey, config::rule};
use tokio::{
    sync::{Notify, mpsc, watch},
    task::{JoinSet, spawn_blocking},
};

use self::{
    enrolment::{Captured, Checked, Claims, Core, Leave, PodError},
    records::RunDir,
};
use super::{
    Desired, DesiredPod, PodEvent,
    loader::{Loader, LoaderError, LoaderSettings},
    netns::Home,
    sockets::SocketOwner,
};
use crate::state::PodUid;

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
    /// (name of `picomesh_common::Counter`, count), zeros left out.
    pub counters: Vec<(&'static str, u64)>,
}

/// The room's handle.
pub struct Datapath {
    core: Arc<Core>,
    table: Arc<Mutex<Table>>,
    kick: Arc<Notify>,
}

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
        desired: watch::Receiver<Desired>,
        events: mpsc::Sender<PodEvent>,
    ) -> anyhow::Result<Arc<Self>> {
        let home = Home::of_this_thread().context("the agent's network namespace")?;
        let (core, adopted) = spawn_blocking(move || open(settings, home, events))
            .await
            .context("start")??;
        let mut table = Table::default();
        let mut announced = Vec::new();
        for (captured, event) in adopted {
            announced.push(event);
            table.adopt(captured);
        }
        let datapath = Arc::new(Self {
            core: Arc::new(core),
            table: Arc::new(Mutex::new(table)),
            kick: Arc::new(Notify::new()),
        });
        let reconciler = Reconciler {
            core: Arc::clone(&datapath.core),
            table: Arc::clone(&datapath.table),
            kick: Arc::clone(&datapath.kick),
        };
        tokio::spawn(reconciler.run(desired, announced));
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

    /// Why probes of the host are not recognised (word, sentence), if they are not: strict pods
    /// then fail their probes.
    pub fn host_problem(&self) -> Option<(&'static str, String)> {
        self.table.lock().host_problem.clone()
    }

    /// Has every desired pod been tried at least once?
    pub fn is_settled(&self) -> bool {
        let table = self.table.lock();
        table.known
            && table
                .pods
                .values()
                .all(|entry| !matches!(entry.stage, Stage::Pending))
    }

    /// Compare everything now instead of at the next turn.
    pub fn kick(&self) {
        self.kick.notify_one();
    }

    /// Un-enrols everything and removes every trace (`picomesh-agent cleanup`). For when no agent
    /// runs on these directories; one that does would enrol its pods again.
    pub async fn cleanup(settings: DatapathSettings) -> anyhow::Result<()> {
        let home = Home::of_this_thread().context("the agent's network namespace")?;
        spawn_blocking(move || clean(&settings, &home))
            .await
            .context("cleanup")?
    }
}

/// Opens everything and adopts what is pinned: listeners into the programs that are there, before
/// anything that takes time.
fn open(
    settings: DatapathSettings,
    home: Arc<Home>,
    events: mpsc::Sender<PodEvent>,
) -> anyhow::Result<(Core, Vec<(Arc<Captured>, PodEvent)>)> {
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
    let claims = Claims::new(run_dir, records.clone());
    let core = Core {
        settings,
        loader,
        home,
        marks,
        owner,
        events,
        claims,
    };

    let mut adopted = Vec::new();
    for record in &records {
        match enrolment::adopt(&core, record) {
            Ok(Some((captured, listeners))) => {
                let pod = Arc::clone(&captured.handle);
                adopted.push((captured, PodEvent::Captured { pod, listeners }));
            }
            Ok(None) => tracing::info!(pod = record.name, "gone while no agent was running"),
            Err(error) => {
                tracing::warn!(pod = record.name, error = error.sentence(), "cannot adopt");
            }
        }
    }
    for slot in core.loader.pinned_slots()? {
        if records.iter().all(|record| record.slot != slot) {
            tracing::warn!(slot, "pinned programs of an unknown pod; taking them off");
            core.loader.detach(slot, &[])?;
            core.loader.clear_slot(slot)?;
        }
    }
    Ok((core, adopted))
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
    for record in run_dir.records()? {
        let alias = enrolment::alias(&settings.bpf_dir, &record.uid);
        enrolment::clean(&loader, home, marks, &record, alias)
            .with_context(|| format!("pod {}", record.name))?;
    }
    for slot in loader.pinned_slots()? {
        loader.detach(slot, &[])?;
    }
    loader.remove_everything()?;
    Ok(run_dir.forget()?)
}

// ---- the table ----

#[derive(Default)]
struct Table {
    pods: HashMap<PodUid, Entry>,
    /// The desired pods are known: until then nobody is un-enrolled.
    known: bool,
    host_problem: Option<(&'static str, String)>,
}

struct Entry {
    name: String,
    /// `None`: should not be captured.
    desired: Option<Arc<DesiredPod>>,
    stage: Stage,
    /// What went wrong last, until it goes right.
    failure: Option<Failure>,
    repairs: u64,
    /// Something changed that a check must carry over to the kernel.
    stale: bool,
}

enum Stage {
    /// Not tried yet.
    Pending,
    /// Tried, and not captured.
    Failed,
    Captured(Arc<Captured>),
    Leaving(Arc<Captured>, Arc<Mutex<Option<Leave>>>),
}

struct Failure {
    reason: &'static str,
    sentence: String,
    /// In a row; the wait doubles with each.
    times: u32,
    next_try: Instant,
}

/// What the loop has decided to do for one pod.
enum Job {
    Enrol(Arc<DesiredPod>),
    Check(Arc<DesiredPod>, Arc<Captured>),
    Leave(Arc<Captured>, Arc<Mutex<Option<Leave>>>),
    /// The namespace is not there any more, or is another one.
    Gone(Arc<Captured>),
}

/// What became of it.
enum Outcome {
    Enrolled(Arc<Captured>),
    Checked(Checked),
    StillLeaving,
    Left,
}

impl Table {
    fn adopt(&mut self, captured: Arc<Captured>) {
        use super::PodSockets;
        self.pods.insert(
            Arc::clone(captured.handle.uid()),
            Entry {
                name: captured.name.clone(),
                desired: None,
                stage: Stage::Captured(captured),
                failure: None,
                repairs: 0,
                stale: true,
            },
        );
    }

    /// Writes down what should be. What should not be any more is found by its absence.
    fn want(&mut self, desired: &[DesiredPod]) {
        for entry in self.pods.values_mut() {
            entry.desired = None;
        }
        for pod in desired {
            let entry = self
                .pods
                .entry(Arc::clone(&pod.uid))
                .or_insert_with(|| Entry {
                    name: pod.name.clone(),
                    desired: None,
                    stage: Stage::Pending,
                    failure: None,
                    repairs: 0,
                    stale: false,
                });
            entry.name.clone_from(&pod.name);
            entry.stale = true;
            entry.desired = Some(Arc::new(pod.clone()));
        }
    }

    /// What to do now; `all` for a full turn, else only what is new, due or leaving.
    fn jobs(&mut self, all: bool, now: Instant) -> Vec<(PodUid, Job)> {
        let known = self.known;
        // Wanted no more, and nothing of it in the kernel.
        self.pods.retain(|_uid, entry| {
            entry.desired.is_some()
                || matches!(entry.stage, Stage::Captured(_) | Stage::Leaving(..))
        });
        let mut jobs = Vec::new();
        for (uid, entry) in &mut self.pods {
            let due = entry
                .failure
                .as_ref()
                .is_none_or(|failure| failure.next_try <= now);
            let job = match (&entry.stage, &entry.desired) {
                (Stage::Pending | Stage::Failed, Some(pod)) => {
                    (due || entry.stale).then(|| Job::Enrol(Arc::clone(pod)))
                }
                (Stage::Pending | Stage::Failed, None) => None,
                (Stage::Captured(captured) | Stage::Leaving(captured, _), pod)
                    if !captured.is_there()
                        || pod
                            .as_ref()
                            .is_some_and(|pod| pod.netns != captured.netns_path) =>
                {
                    Some(Job::Gone(Arc::clone(captured)))
                }
                (Stage::Captured(captured) | Stage::Leaving(captured, _), Some(pod)) => {
                    let needed = all
                        || entry.stale
                        || entry.failure.is_some() && due
                        || matches!(entry.stage, Stage::Leaving(..));
                    needed.then(|| Job::Check(Arc::clone(pod), Arc::clone(captured)))
                }
                (Stage::Captured(_), None) if !known => None,
                (Stage::Captured(captured), None) => {
                    let captured = Arc::clone(captured);
                    let leave = Arc::new(Mutex::new(None));
                    entry.stage = Stage::Leaving(Arc::clone(&captured), Arc::clone(&leave));
                    Some(Job::Leave(captured, leave))
                }
                (Stage::Leaving(captured, leave), None) => {
                    due.then(|| Job::Leave(Arc::clone(captured), Arc::clone(leave)))
                }
            };
            if let Some(job) = job {
                entry.stale = false;
                jobs.push((Arc::clone(uid), job));
            }
        }
        jobs
    }

    fn apply(&mut self, uid: &PodUid, result: Result<Outcome, PodError>, now: Instant) {
        let Some(entry) = self.pods.get_mut(uid) else {
            return;
        };
        match result {
            Ok(outcome) => {
                entry.failure = None;
                entry.succeed(outcome);
            }
            Err(error) => entry.fail(&error, now),
        }
    }

    /// When the loop must look again although nothing happened.
    fn next_look(&self, now: Instant) -> Option<Instant> {
        self.pods
            .values()
            .filter_map(|entry| match (&entry.stage, &entry.failure) {
                (_, Some(failure)) => Some(failure.next_try),
                (Stage::Pending, None) => Some(now),
                (Stage::Leaving(..), None) => Some(now + LEAVING_LOOK),
                (Stage::Captured(_) | Stage::Failed, None) => None,
            })
            .min()
    }
}

impl Entry {
    fn succeed(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::Enrolled(captured) => {
                tracing::info!(
                    pod = self.name,
                    slot = captured.handle.slot(),
                    netns = captured.handle.netns().inode(),
                    "captured"
                );
                self.stage = Stage::Captured(captured);
            }
            Outcome::Checked(Checked { repaired }) => {
                if let Stage::Leaving(captured, _) = &self.stage {
                    tracing::info!(pod = self.name, "captured again before it had left");
                    self.stage = Stage::Captured(Arc::clone(captured));
                } else if !repaired.is_empty() {
                    tracing::info!(pod = self.name, ?repaired, "mended");
                    self.repairs += 1;
                }
            }
            Outcome::StillLeaving => {}
            Outcome::Left => {
                tracing::info!(pod = self.name, "released");
                self.stage = Stage::Pending;
            }
        }
    }

    fn fail(&mut self, error: &PodError, now: Instant) {
        let times = self
            .failure
            .as_ref()
            .map_or(1, |failure| failure.times.saturating_add(1));
        let (reason, sentence) = (error.reason(), error.sentence());
        if self
            .failure
            .as_ref()
            .is_none_or(|before| before.sentence != sentence)
        {
            tracing::warn!(
                pod = self.name,
                reason,
                error = sentence,
                "cannot be captured as it should"
            );
        }
        self.failure = Some(Failure {
            reason,
            sentence,
            times,
            next_try: now + backoff(times),
        });
        if matches!(self.stage, Stage::Pending) {
            self.stage = Stage::Failed;
        }
    }

    fn status(&self, uid: &PodUid) -> PodStatus {
        let (state, captured) = match &self.stage {
            Stage::Pending | Stage::Failed => ("pending", None),
            Stage::Captured(captured) => ("captured", Some(captured)),
            Stage::Leaving(captured, _) => ("leaving", Some(captured)),
        };
        PodStatus {
            uid: uid.to_string(),
            name: self.name.clone(),
            slot: captured.map(|captured| captured.handle.slot()),
            state: if self.failure.is_some() {
                "failed"
            } else {
                state
            },
            reason: self
                .failure
                .as_ref()
                .map(|f| (f.reason, f.sentence.clone())),
            repairs: self.repairs,
            counters: Vec::new(),
        }
    }
}

/// 1, 2, 4 … 60 seconds.
fn backoff(times: u32) -> Duration {
    Duration::from_secs(1 << times.saturating_sub(1).min(6)).min(Duration::from_secs(60))
}

// ---- the loop ----

/// A full turn: the kernel's state of every pod is read and compared.
const FULL_TURN: Duration = Duration::from_secs(30);
const LEAVING_LOOK: Duration = Duration::from_millis(500);
/// Enrolments at a time. Loading programs is mostly CPU, so more would only take from the data
/// threads.
const WORKERS: usize = 4;

struct Reconciler {
    core: Arc<Core>,
    table: Arc<Mutex<Table>>,
    kick: Arc<Notify>,
}

impl Reconciler {
    async fn run(self, mut desired: watch::Receiver<Desired>, announced: Vec<PodEvent>) {
        for event in announced {
            if self.core.events.send(event).await.is_err() {
                return;
            }
        }
        let first = Arc::clone(&desired.borrow_and_update());
        {
            let mut table = self.table.lock();
            table.known = !first.is_empty() || table.pods.is_empty();
            table.want(&first);
        }
        let mut next_full = Instant::now();
        loop {
            let now = Instant::now();
            let all = now >= next_full;
            if all {
                next_full = now + FULL_TURN;
                self.look_at_host().await;
            }
            let jobs = self.table.lock().jobs(all, now);
            self.work(jobs).await;

            let wake = self.table.lock().next_look(Instant::now());
            let wake = wake.map_or(next_full, |wake| wake.min(next_full));
            tokio::select! {
                changed = desired.changed() => {
                    if changed.is_err() {
                        tracing::debug!("nobody says what is desired any more; all stays pinned");
                        return;
                    }
                    let desired = Arc::clone(&desired.borrow_and_update());
                    let mut table = self.table.lock();
                    table.known = true;
                    table.want(&desired);
                }
                () = self.kick.notified() => next_full = Instant::now(),
                () = tokio::time::sleep_until(wake.into()) => {}
            }
        }
    }

    async fn work(&self, jobs: Vec<(PodUid, Job)>) {
        let standing = if jobs.iter().any(|(_, job)| matches!(job, Job::Check(..))) {
            let core = Arc::clone(&self.core);
            match spawn_blocking(move || core.loader.standing()).await {
                Ok(Ok(keys)) => keys,
                Ok(Err(error)) => {
                    tracing::warn!(%error, "cannot read the standing connections");
                    Vec::new()
                }
                Err(_ending) => return,
            }
        } else {
            Vec::new()
        };
        let standing: Arc<[StandingKey]> = standing.into();
        let mut running = JoinSet::new();
        let mut jobs = jobs.into_iter();
        loop {
            while running.len() < WORKERS
                && let Some((uid, job)) = jobs.next()
            {
                let (core, standing) = (Arc::clone(&self.core), Arc::clone(&standing));
                running.spawn_blocking(move || (uid, job.run(&core, &standing)));
            }
            match running.join_next().await {
                Some(Ok((uid, result))) => self.table.lock().apply(&uid, result, Instant::now()),
                Some(Err(error)) => tracing::error!(%error, "a worker of the datapath failed"),
                None => return,
            }
        }
    }

    async fn look_at_host(&self) {
        let core = Arc::clone(&self.core);
        let result = spawn_blocking(move || core.loader.attach_host_sockets()).await;
        let problem = match result {
            Ok(Ok(())) => None,
            Ok(Err(error)) => {
                let word = if matches!(error, LoaderError::NoCgroup2) {
                    "no_cgroup2"
                } else {
                    "host_sockets"
                };
                Some((word, PodError::from(error).sentence()))
            }
            Err(_ending) => return,
        };
        let mut table = self.table.lock();
        if let Some((reason, error)) = &problem
            && table.host_problem != problem
        {
            tracing::warn!(reason, error, "probes of the host are not recognised");
        }
        table.host_problem = problem;
    }
}

impl Job {
    fn run(self, core: &Core, standing: &[StandingKey]) -> Result<Outcome, PodError> {
        match self {
            Self::Enrol(pod) => enrolment::enrol(core, &pod).map(Outcome::Enrolled),
            Self::Check(pod, captured) => {
                enrolment::check(core, &pod, &captured, standing).map(Outcome::Checked)
            }
            Self::Leave(captured, leave) => {
                let now = Instant::now();
                // Held for the whole step; nobody else wants it but the next step.
                let mut leave = leave.lock();
                let leave = match &mut *leave {
                    Some(leave) => leave,
                    none => none.insert(Leave::begin(core, &captured, now)?),
                };
                Ok(if leave.step(core, &captured, now)? {
                    Outcome::Left
                } else {
                    Outcome::StillLeaving
                })
            }
            Self::Gone(captured) => enrolment::gone(core, &captured).map(|()| Outcome::Left),
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use picomesh_common::PodConfig;

    use super::*;

    fn pod(uid: &str) -> DesiredPod {
        DesiredPod {
            uid: uid.into(),
            name: format!("ns/{uid}"),
            ips: Vec::new(),
            config: PodConfig::EMPTY,
            netns: format!("/run/netns/{uid}").into(),
        }
    }

    fn uids(jobs: &[(PodUid, Job)]) -> Vec<&str> {
        let mut uids: Vec<&str> = jobs
            .iter()
            .map(|(uid, job)| {
                assert!(matches!(job, Job::Enrol(_)));
                &**uid
            })
            .collect();
        uids.sort_unstable();
        uids
    }

    #[test]
    fn a_failed_pod_is_tried_again_later_and_at_once_when_it_changed() {
        let mut table = Table {
            known: true,
            ..Table::default()
        };
        let start = Instant::now();
        table.want(&[pod("a"), pod("b")]);
        assert_eq!(uids(&table.jobs(false, start)), ["a", "b"]);
        let uid = PodUid::from("a");
        table.apply(&uid, Err(PodError::NoSlot), start);
        table.apply(&PodUid::from("b"), Err(PodError::NoSlot), start);
        let status = table.pods[&uid].status(&uid);
        assert_eq!(
            (status.state, status.reason.unwrap().0),
            ("failed", "no_slot")
        );

        assert!(table.jobs(true, start).is_empty(), "not before its time");
        assert_eq!(table.next_look(start), Some(start + Duration::from_secs(1)));
        assert_eq!(
            uids(&table.jobs(false, start + Duration::from_secs(1))),
            ["a", "b"]
        );
        table.want(&[pod("a")]);
        assert_eq!(uids(&table.jobs(false, start)), ["a"]);
        assert_eq!(
            table.pods.len(),
            1,
            "what is not wanted and not there is forgotten"
        );
    }

    #[test]
    fn tries_grow_rarer_up_to_a_minute() {
        let seconds: Vec<u64> = (1..10).map(|times| backoff(times).as_secs()).collect();
        assert_eq!(seconds, [1, 2, 4, 8, 16, 32, 60, 60, 60]);
        assert_eq!(backoff(u32::MAX).as_secs(), 60);
    }

    #[test]
    fn every_failure_has_a_word_and_a_sentence_without_repeats() {
        let error = PodError::Sockets {
            doing: "making listeners",
            source: std::io::Error::from_raw_os_error(nix::libc::EMFILE),
        };
        assert_eq!(error.reason(), "sockets");
        let sentence = error.sentence();
        assert_eq!(
            sentence.matches("Too many open files").count(),
            1,
            "{sentence}"
        );
    }
}

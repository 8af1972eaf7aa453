//! Which pods there are, what should become of each, and what became of it: no IO, and time is an
//! argument. One writer, the loop.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use super::{
    super::{DesiredPod, Others, Wishes},
    Capture, PodStatus,
    captured::Captured,
    enrolment::Checked,
    error::PodError,
    leaving::Leave,
};
use crate::state::PodUid;

#[derive(Default)]
pub(super) struct Table {
    pub(super) pods: HashMap<PodUid, Entry>,
    /// The desired pods are known: until then nobody is un-enrolled.
    pub(super) known: bool,
    /// What becomes of those that are not desired.
    others: Others,
    pub(super) host_problem: Option<(&'static str, String)>,
    pub(super) shared_repairs: u64,
}

impl Table {
    /// A pod of an agent before this one, or of one that had taken its place and died.
    pub(super) fn adopt(&mut self, captured: Arc<Captured>) {
        let name = captured.name.clone();
        let entry = self.entry(captured.uid(), &name);
        entry.stage = Stage::Captured(captured);
        entry.failure = None;
        entry.stale = true;
    }

    /// Captured by another agent, which may have heard of it before us: not let go at once.
    pub(super) fn adopt_from_another(&mut self, captured: Arc<Captured>, now: Instant) {
        let uid = Arc::clone(captured.uid());
        self.adopt(captured);
        if let Some(entry) = self.pods.get_mut(&uid) {
            entry.spared_until = Some(now + SPARED);
        }
    }

    /// On record, and could not be adopted.
    pub(super) fn adopt_failed(
        &mut self,
        uid: &PodUid,
        name: &str,
        error: &PodError,
        now: Instant,
    ) {
        let entry = self.entry(uid, name);
        entry.stage = Stage::Failed;
        entry.fail(error, now);
        entry.stale = true;
    }

    /// Not captured by us any more, whatever became of it.
    pub(super) fn forget(&mut self, uid: &PodUid) {
        if let Some(entry) = self.pods.get_mut(uid) {
            entry.stage = Stage::Pending;
            entry.failure = None;
        }
    }

    /// It is not on its way out any more.
    pub(super) fn stay(&mut self, uid: &PodUid) {
        if let Some(entry) = self.pods.get_mut(uid)
            && let Stage::Leaving(captured, _) = &entry.stage
        {
            entry.stage = Stage::Captured(Arc::clone(captured));
        }
    }

    pub(super) fn captured(&self) -> Vec<Arc<Captured>> {
        let pods = self.pods.values().filter_map(|entry| match &entry.stage {
            Stage::Captured(captured) | Stage::Leaving(captured, _) => Some(Arc::clone(captured)),
            Stage::Pending | Stage::Failed => None,
        });
        pods.collect()
    }

    fn entry(&mut self, uid: &PodUid, name: &str) -> &mut Entry {
        self.pods.entry(Arc::clone(uid)).or_insert_with(|| Entry {
            name: name.into(),
            desired: None,
            stage: Stage::Pending,
            failure: None,
            repairs: 0,
            mended: Vec::new(),
            stale: false,
            spared_until: None,
        })
    }

    /// Writes down what should be. What should not be any more is found by its absence.
    pub(super) fn want(&mut self, wishes: &Wishes) {
        self.others.clone_from(&wishes.others);
        let mut before: HashMap<PodUid, Arc<DesiredPod>> = HashMap::new();
        for (uid, entry) in &mut self.pods {
            if let Some(pod) = entry.desired.take() {
                before.insert(Arc::clone(uid), pod);
            }
        }
        for pod in &wishes.pods {
            let entry = self.entry(&pod.uid, &pod.name);
            entry.name.clone_from(&pod.name);
            entry.spared_until = None;
            // A change elsewhere is no reason to look at this one.
            entry.desired = Some(match before.remove(&pod.uid) {
                Some(same) if is_same(&same, pod) => same,
                Some(_) | None => {
                    entry.stale = true;
                    Arc::new(pod.clone())
                }
            });
        }
        for uid in before.into_keys() {
            if let Some(entry) = self.pods.get_mut(&uid) {
                entry.stale = true;
            }
        }
    }

    /// What to do now; `all` for a full turn, else only what is new, due or leaving.
    pub(super) fn jobs(&mut self, all: bool, now: Instant) -> Vec<(PodUid, Job)> {
        let (known, others) = (self.known, &self.others);
        // Wanted no more, and nothing of it in the kernel.
        self.pods.retain(|_uid, entry| {
            entry.desired.is_some() || !matches!(entry.stage, Stage::Pending)
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
                (Stage::Pending, None) => None,
                (Stage::Failed, None) => {
                    let uid = Arc::clone(uid);
                    (known && (due || entry.stale)).then(|| match others.leaves(&uid) {
                        true => Job::Forget(uid),
                        false => Job::ForgetGone(uid),
                    })
                }
                (Stage::Captured(captured) | Stage::Leaving(captured, _), pod)
                    if !captured.is_there(pod.as_deref()) =>
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
                (Stage::Captured(_), None) if !known || entry.is_spared(now) => None,
                // Nothing is to be done to it but to wait for its end.
                (Stage::Captured(_), None) if !others.leaves(uid) => {
                    entry.failure = None;
                    entry.stale = false;
                    None
                }
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

    pub(super) fn apply(&mut self, uid: &PodUid, result: Result<Outcome, PodError>, now: Instant) {
        let Some(entry) = self.pods.get_mut(uid) else {
            return;
        };
        match result {
            Ok(Outcome::Stays) => entry.put_off(now),
            Ok(outcome) => {
                entry.failure = None;
                entry.succeed(outcome);
            }
            Err(error) => entry.fail(&error, now),
        }
    }

    /// Something changed in the pod's namespace. One that is not captured has its own time.
    pub(super) fn look_at(&mut self, uid: &PodUid) {
        if let Some(entry) = self.pods.get_mut(uid)
            && matches!(entry.stage, Stage::Captured(_))
        {
            entry.stale = true;
        }
    }

    /// Has every pod been tried?
    pub(super) fn is_tried(&self) -> bool {
        let mut all = self.pods.values();
        all.all(|entry| !matches!(entry.stage, Stage::Pending))
    }

    /// Is every pod as it should be?
    pub(super) fn is_well(&self) -> bool {
        let mut all = self.pods.values();
        self.known && self.is_tried() && all.all(|entry| entry.failure.is_none() && !entry.stale)
    }

    pub(super) fn capture(&self, uid: &str) -> Option<Capture> {
        let entry = self.pods.get(uid)?;
        Some(match &entry.stage {
            Stage::Captured(captured) => Capture::At {
                netns: captured.handle.netns().inode(),
            },
            Stage::Pending | Stage::Failed | Stage::Leaving(..) => Capture::Not {
                reason: entry.failure.as_ref().map(|why| why.sentence.clone()),
            },
        })
    }

    /// When the loop must look again although nothing happened.
    pub(super) fn next_look(&self, now: Instant) -> Option<Instant> {
        let looks = self.pods.values().flat_map(|entry| {
            let captured = matches!(entry.stage, Stage::Captured(_));
            let glance = captured.then_some(now + GLANCE);
            [glance, self.due(entry, now)]
        });
        looks.flatten().min()
    }

    fn due(&self, entry: &Entry, now: Instant) -> Option<Instant> {
        match (&entry.stage, &entry.failure) {
            (Stage::Failed, Some(_)) if !self.known && entry.desired.is_none() => None,
            (_, Some(failure)) => Some(failure.next_try),
            (Stage::Pending, None) => Some(now),
            (Stage::Leaving(..), None) => Some(now + LEAVING_LOOK),
            (Stage::Captured(_) | Stage::Failed, None) => None,
        }
    }
}

pub(super) struct Entry {
    name: String,
    /// `None`: should not be captured.
    desired: Option<Arc<DesiredPod>>,
    pub(super) stage: Stage,
    /// What went wrong last, until it goes right.
    failure: Option<Failure>,
    repairs: u64,
    mended: Vec<&'static str>,
    /// Something changed that a check must carry over to the kernel.
    stale: bool,
    /// Before this nobody lets it go although it is not desired.
    spared_until: Option<Instant>,
}

pub(super) enum Stage {
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
pub(super) enum Job {
    Enrol(Arc<DesiredPod>),
    Check(Arc<DesiredPod>, Arc<Captured>),
    Leave(Arc<Captured>, Arc<Mutex<Option<Leave>>>),
    /// The namespace is not there any more, or is another one.
    Gone(Arc<Captured>),
    /// Not captured and not wanted: take off what may stand of it.
    Forget(PodUid),
    /// The same, if its namespace is gone: nobody has said that it may be let go.
    ForgetGone(PodUid),
}

/// What became of it.
pub(super) enum Outcome {
    Enrolled(Arc<Captured>),
    Checked(Checked),
    StillLeaving,
    Left,
    Forgotten,
    /// Its namespace is still there.
    Stays,
}

fn is_same(before: &DesiredPod, now: &DesiredPod) -> bool {
    let DesiredPod {
        uid,
        name,
        ips,
        config,
        netns,
    } = before;
    *uid == now.uid
        && *name == now.name
        && *ips == now.ips
        && *config == now.config
        && *netns == now.netns
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
                    if repaired.iter().all(|word| is_ordinary(word)) {
                        tracing::info!(pod = self.name, ?repaired, "brought up to date");
                    } else {
                        tracing::warn!(pod = self.name, ?repaired, "mended what somebody undid");
                    }
                    self.repairs += 1;
                    self.mended = repaired;
                }
            }
            Outcome::StillLeaving | Outcome::Stays => {}
            Outcome::Left => {
                tracing::info!(pod = self.name, "released");
                self.stage = Stage::Pending;
            }
            Outcome::Forgotten => self.stage = Stage::Pending,
        }
    }

    fn is_spared(&self, now: Instant) -> bool {
        self.spared_until.is_some_and(|until| now < until)
    }

    /// Nothing has changed: it is looked at again later.
    fn put_off(&mut self, now: Instant) {
        if let Some(failure) = &mut self.failure {
            failure.times = failure.times.saturating_add(1);
            failure.next_try = now + backoff(failure.times);
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

    pub(super) fn status(&self, uid: &PodUid) -> PodStatus {
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
            mended: self.mended.clone(),
            counters: Vec::new(),
        }
    }
}

/// Does this repair follow from a new build or new settings?
fn is_ordinary(word: &str) -> bool {
    matches!(word, "build" | "config" | "addresses" | "listeners")
}

/// What another agent captured is not let go before the manifests were certainly read here, too.
const SPARED: Duration = Duration::from_secs(10);

/// Does a pod's path still lead to its namespace? One that was made again under the same name and
/// uid is captured by this, and nobody else tells of it.
const GLANCE: Duration = Duration::from_secs(1);

const LEAVING_LOOK: Duration = Duration::from_millis(500);

/// 1, 2, 4 … 60 seconds.
fn backoff(times: u32) -> Duration {
    Duration::from_secs(1 << times.saturating_sub(1).min(6)).min(Duration::from_secs(60))
}

#[cfg(test)]
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
        table.want(&vec![pod("a"), pod("b")].into());
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
        table.want(&vec![pod("a")].into());
        let jobs = table.jobs(false, start);
        let [(b, Job::Forget(_))] = &jobs[..] else {
            panic!("{} jobs; only b changed: it is not wanted", jobs.len());
        };
        assert!(
            table.jobs(false, start).is_empty() && table.pods.len() == 2,
            "what may stand in the kernel is not forgotten before it is taken off"
        );
        table.apply(b, Ok(Outcome::Forgotten), start);
        assert!(table.jobs(false, start).is_empty());
        assert_eq!(table.pods.len(), 1);
        let mut moved = pod("a");
        moved.netns = "/run/netns/elsewhere".into();
        table.want(&vec![moved].into());
        assert_eq!(uids(&table.jobs(false, start)), ["a"]);
    }

    #[test]
    fn what_could_not_be_adopted_waits_until_it_is_known_what_is_wanted() {
        let mut table = Table::default();
        let start = Instant::now();
        let uid = PodUid::from("a");
        table.adopt_failed(&uid, "ns/a", &PodError::NoSlot, start);
        let later = start + Duration::from_secs(90);
        assert!(table.jobs(true, later).is_empty());
        assert_eq!(table.next_look(later), None, "nobody spins meanwhile");
        table.known = true;
        table.want(&vec![pod("a")].into());
        assert_eq!(uids(&table.jobs(false, start)), ["a"], "wanted: at once");
        table.want(&Wishes::default());
        let jobs = table.jobs(false, later);
        assert!(matches!(&jobs[..], [(_, Job::Forget(_))]), "unwanted");
    }

    #[test]
    fn of_a_pod_that_nobody_knows_any_more_nothing_is_taken_off_before_it_is_gone() {
        let start = Instant::now();
        let staying = |but: &[&str]| Wishes {
            pods: Vec::new(),
            others: Others::Stay {
                but: but.iter().map(|uid| PodUid::from(*uid)).collect(),
            },
        };
        let mut table = Table {
            known: true,
            ..Table::default()
        };
        let uid = PodUid::from("a");
        table.adopt_failed(&uid, "ns/a", &PodError::NoSlot, start);
        table.want(&staying(&["b"]));
        let jobs = table.jobs(false, start);
        assert!(matches!(&jobs[..], [(_, Job::ForgetGone(_))]));
        table.apply(&uid, Ok(Outcome::Stays), start);
        assert_eq!(table.pods[&uid].status(&uid).state, "failed");
        assert!(table.jobs(true, start).is_empty(), "not before its time");
        let later = start + Duration::from_secs(2);
        assert_eq!(table.next_look(start), Some(later), "rarer each time");
        assert!(matches!(
            &table.jobs(false, later)[..],
            [(_, Job::ForgetGone(_))]
        ));
        // Its object is there, and says that it is outside.
        table.want(&staying(&["a"]));
        let jobs = table.jobs(false, later + Duration::from_secs(60));
        assert!(matches!(&jobs[..], [(_, Job::Forget(_))]));
        table.apply(&uid, Ok(Outcome::Forgotten), later);
        assert!(table.jobs(false, later).is_empty() && table.pods.is_empty());
    }

    #[test]
    fn tries_grow_rarer_up_to_a_minute() {
        let seconds: Vec<u64> = (1..10).map(|times| backoff(times).as_secs()).collect();
        assert_eq!(seconds, [1, 2, 4, 8, 16, 32, 60, 60, 60]);
        assert_eq!(backoff(u32::MAX).as_secs(), 60);
    }
}

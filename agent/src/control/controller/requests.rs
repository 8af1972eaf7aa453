//! All requests of our signer, and which of them something is due for. Pure: time is an argument.
//!
//! Ages are counted from when a request, or a new stage of it, was *seen*: clocks of machines are
//! not compared. A controller that takes over counts anew what it did not see before.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use k8s_openapi::api::certificates::v1::{
    CertificateSigningRequest, CertificateSigningRequestCondition,
};
use tokio::time::Instant;
use tracing::warn;

use super::{
    decide::{Circumstances, Decision, decide},
    pods::Pods,
};
use crate::control::{
    ask::{Ask, Refusal, Rules, Stage, is_ours},
    feed::Told,
};

/// How late a watch may be before a request is denied for what it has not shown.
const PATIENCE: Duration = Duration::from_secs(5);
/// Agents look every two seconds; people want to see why something was refused.
const ISSUED_STAYS: Duration = Duration::from_secs(300);
const REFUSED_STAYS: Duration = Duration::from_secs(3600);
/// Whoever asked has long given up.
const PENDING_STAYS: Duration = Duration::from_secs(900);
/// Finished ones are collected sooner when there are more: somebody floods.
const MOST_FINISHED: usize = 2000;
/// After a write that failed.
const AGAIN: Duration = Duration::from_secs(2);

/// What is to be done with one request.
#[derive(Debug)]
pub(super) struct Work {
    pub(super) name: Arc<str>,
    pub(super) version: String,
    pub(super) what: What,
}

#[derive(Debug)]
pub(super) enum What {
    Approve {
        /// For the log.
        of: String,
        conditions: Vec<CertificateSigningRequestCondition>,
    },
    Deny {
        refusal: Refusal,
        conditions: Vec<CertificateSigningRequestCondition>,
    },
    Collect,
}

pub(super) struct Requests {
    rules: Rules,
    most_pending: usize,
    known: HashMap<Arc<str>, Entry>,
    listed: Option<BTreeSet<Arc<str>>>,
    complete: bool,
}

struct Entry {
    uid: String,
    version: String,
    stage: Stage,
    /// Earlier ones come first.
    order: (Option<i64>, Arc<str>),
    ask: Result<Ask, Refusal>,
    /// Those that stand on it already.
    conditions: Vec<CertificateSigningRequestCondition>,
    /// When it was first seen in this stage.
    since: Instant,
    /// Not before this.
    again: Option<Instant>,
}

impl Entry {
    fn is_pending(&self) -> bool {
        matches!(self.stage, Stage::Undecided | Stage::Approved)
    }

    fn node(&self) -> Option<&str> {
        Some(&self.ask.as_ref().ok()?.requester.node)
    }
}

impl Requests {
    pub(super) fn new(rules: Rules, most_pending: usize) -> Self {
        Self {
            rules,
            most_pending,
            known: HashMap::new(),
            listed: None,
            complete: false,
        }
    }

    pub(super) fn is_complete(&self) -> bool {
        self.complete
    }

    /// Those that wait for somebody's decision.
    pub(super) fn undecided(&self) -> usize {
        let undecided = |entry: &&Entry| entry.stage == Stage::Undecided;
        self.known.values().filter(undecided).count()
    }

    pub(super) fn hear(&mut self, told: Told, now: Instant) {
        match told {
            Told::Listing => self.listed = Some(BTreeSet::new()),
            Told::Listed => {
                self.complete = true;
                let listed = self.listed.take().unwrap_or_default();
                self.known.retain(|name, _| listed.contains(name));
            }
            Told::There(seen) => {
                let name: Arc<str> = seen.name().into();
                if let Some(listed) = &mut self.listed {
                    listed.insert(Arc::clone(&name));
                }
                match seen.parse::<CertificateSigningRequest>() {
                    Ok(request) if is_ours(&request) => self.take(name, request, now),
                    Ok(_) => {}
                    Err(error) => warn!(request = &*name, %error, "does not read"),
                }
            }
            Told::Gone(seen) => {
                self.known.remove(seen.name());
            }
        }
    }

    fn take(&mut self, name: Arc<str>, request: CertificateSigningRequest, now: Instant) {
        let stage = Stage::of(&request);
        let ask = self.rules.read(&request);
        let metadata = request.metadata;
        let uid = metadata.uid.unwrap_or_default();
        let before = self.known.get(&name).filter(|before| before.uid == uid);
        let same = before.filter(|before| before.stage == stage);
        let created = metadata.creation_timestamp.map(|at| at.0.as_second());
        let entry = Entry {
            version: metadata.resource_version.unwrap_or_default(),
            stage,
            order: (created, Arc::clone(&name)),
            ask,
            conditions: request
                .status
                .and_then(|status| status.conditions)
                .unwrap_or_default(),
            since: same.map_or(now, |before| before.since),
            again: None,
            uid,
        };
        self.known.insert(name, entry);
    }

    /// A write has not come through; a watch tells if it was for a reason.
    pub(super) fn failed(&mut self, name: &str, now: Instant) {
        if let Some(entry) = self.known.get_mut(name) {
            entry.again = Some(now + AGAIN);
        }
    }

    /// A write has come through. What it has made of the request comes by the watch.
    pub(super) fn done(&mut self, name: &str, now: Instant) {
        if let Some(entry) = self.known.get_mut(name) {
            // Long enough for any watch; and if the write got lost, it is due again.
            entry.again = Some(now + PATIENCE);
        }
    }

    /// What is to be done now.
    pub(super) fn due(&self, pods: &Pods, now: Instant) -> Vec<Work> {
        let mut work: Vec<_> = self.collected(now).collect();
        let mut pending: HashMap<&str, usize> = HashMap::new();
        for entry in self.known.values() {
            if let (Stage::Approved, Some(node)) = (entry.stage, entry.node()) {
                *pending.entry(node).or_default() += 1;
            }
        }
        let mut undecided: Vec<_> = self.known.iter().collect();
        undecided.retain(|(_, entry)| {
            entry.stage == Stage::Undecided && now - entry.since < PENDING_STAYS
        });
        undecided.sort_by(|(_, a), (_, b)| a.order.cmp(&b.order));
        for (name, entry) in undecided {
            let conditions = entry.conditions.clone();
            let what = match &entry.ask {
                Err(refusal) => What::Deny {
                    refusal: refusal.clone(),
                    conditions,
                },
                Ok(ask) => {
                    let pending = pending.entry(&ask.requester.node).or_default();
                    let at = Circumstances {
                        pods,
                        namespace: &self.rules.namespace,
                        pending: *pending,
                        most_pending: self.most_pending,
                        patience_over: now - entry.since >= PATIENCE,
                    };
                    match decide(ask, &at) {
                        Decision::Deny(refusal) => What::Deny {
                            refusal,
                            conditions,
                        },
                        Decision::Approve => {
                            *pending += 1;
                            What::Approve {
                                of: format!("{} on {}", ask.identity(), ask.requester.node),
                                conditions,
                            }
                        }
                        Decision::Wait(_) => {
                            *pending += 1;
                            continue;
                        }
                    }
                }
            };
            if entry.again.is_none_or(|again| again <= now) {
                work.push(Work {
                    name: Arc::clone(name),
                    version: entry.version.clone(),
                    what,
                });
            }
        }
        work
    }

    fn collected(&self, now: Instant) -> impl Iterator<Item = Work> {
        let mut finished: Vec<_> = self.known.iter().filter(|(_, e)| !e.is_pending()).collect();
        finished.sort_by(|(_, a), (_, b)| a.since.cmp(&b.since).then(a.order.cmp(&b.order)));
        let surplus = finished.len().saturating_sub(MOST_FINISHED);
        let over = finished
            .into_iter()
            .enumerate()
            .filter(move |(at, (_, e))| {
                let stays = match e.stage {
                    Stage::Issued => ISSUED_STAYS,
                    Stage::Denied | Stage::Failed => REFUSED_STAYS,
                    Stage::Undecided | Stage::Approved => PENDING_STAYS,
                };
                *at < surplus || now - e.since >= stays
            });
        let stale = self
            .known
            .iter()
            .filter(move |(_, entry)| entry.is_pending() && now - entry.since >= PENDING_STAYS);
        over.map(|(_, found)| found)
            .chain(stale)
            .filter(move |(_, entry)| entry.again.is_none_or(|again| again <= now))
            .map(|(name, entry)| Work {
                name: Arc::clone(name),
                version: entry.version.clone(),
                what: What::Collect,
            })
    }
}

//! All requests of our signer, and which of them something is due for. Pure: time is an argument.
//!
//! Ages are counted from when a request, or a new stage of it, was *seen*: clocks of machines are
//! not compared. A controller that takes over counts anew what it did not see before, but for the
//! time between the making of a request and of the youngest one: both are the API server's. So
//! what has piled up in an outage is collected, and not answered to nobody.
//!
//! **Fair to nodes.** A round answers a bounded number, by turns of the nodes, and collects after
//! that. Where there is too much, it goes from the node that has most of it.

use std::{
    cmp::Ordering,
    collections::{BTreeSet, BinaryHeap, HashMap},
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
use crate::{
    control::{
        ask::{Ask, Refusal, Rules, Stage, is_ours},
        feed::Told,
    },
    state::Identity,
};

/// How late a watch that is well may be before a request is denied for what it has not shown.
const PATIENCE: Duration = Duration::from_secs(5);
/// Agents look every two seconds; people want to see why something was refused.
const ISSUED_STAYS: Duration = Duration::from_secs(300);
const REFUSED_STAYS: Duration = Duration::from_secs(3600);
/// Whoever asked has long given up.
const PENDING_STAYS: Duration = Duration::from_secs(900);
/// Open requests for one identity that take one place of a node together. Keys of open requests end
/// with the agent, so one that starts anew asks for all of them once more; a container that fails
/// is not started more often in [`PENDING_STAYS`].
pub(super) const REPEATS: usize = 8;
/// Finished ones are collected sooner when there are more: somebody floods.
const MOST_FINISHED: usize = 2000;
/// But not before the agent has seen its certificate.
const FRESH: Duration = Duration::from_secs(30);
/// More are not remembered. Kubernetes collects requests too, after some hours.
const MOST_KNOWN: usize = 8000;
/// Answers of one round.
pub(super) const ROUND: usize = 64;
/// Collected after them.
const SWEEP: usize = 32;
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
    /// When the youngest was made, by the API server's clock, and seen.
    youngest: Option<(i64, Instant)>,
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

    fn work(&self, name: &Arc<str>, what: What) -> Work {
        Work {
            name: Arc::clone(name),
            version: self.version.clone(),
            what,
        }
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
            youngest: None,
        }
    }

    pub(super) fn is_complete(&self) -> bool {
        self.complete
    }

    #[cfg(test)]
    pub(super) fn known(&self) -> usize {
        self.known.len()
    }

    /// Those that wait for somebody's decision.
    pub(super) fn undecided(&self) -> usize {
        let undecided = |entry: &&Entry| entry.stage == Stage::Undecided;
        self.known.values().filter(undecided).count()
    }

    pub(super) fn hear(&mut self, told: Told, now: Instant) {
        match told {
            // What is known is answered; whoever has changed refuses the answer.
            Told::Failed => {}
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
        if let Some(created) = created
            && self.youngest.is_none_or(|(youngest, _)| youngest < created)
        {
            self.youngest = Some((created, now));
        }
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
        if self.known.len() > MOST_KNOWN {
            self.forget();
        }
    }

    /// Makes room, at the cost of those nodes that have most requests and of their last ones.
    fn forget(&mut self) {
        let surplus = self.known.len() - MOST_KNOWN * 3 / 4;
        warn!(
            surplus,
            "there are more CertificateSigningRequests than are looked at"
        );
        let order = |a: &Found<'_>, b: &Found<'_>| b.1.order.cmp(&a.1.order);
        let gone: Vec<_> = from_the_greatest(self.known.iter(), surplus, order)
            .map(|(name, _)| Arc::clone(name))
            .collect();
        for name in gone {
            self.known.remove(&name);
        }
    }

    /// How long it has been waiting at least.
    fn waited(&self, entry: &Entry, now: Instant) -> Duration {
        let made = self.youngest.zip(entry.order.0);
        let made = made.map(|((youngest, seen), created)| {
            let older = u64::try_from(youngest.saturating_sub(created)).unwrap_or(0);
            Duration::from_secs(older) + (now - seen)
        });
        made.unwrap_or_default().max(now - entry.since)
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

    /// What is to be done now, the answers first.
    pub(super) fn due(&self, pods: &Pods, now: Instant) -> Vec<Work> {
        let mut work = self.answers(pods, now);
        work.extend(self.collected(now));
        work
    }

    fn answers(&self, pods: &Pods, now: Instant) -> Vec<Work> {
        let mut pending: HashMap<&str, Share<'_>> = HashMap::new();
        for entry in self.known.values() {
            if let (Stage::Approved, Ok(ask)) = (entry.stage, &entry.ask) {
                let share = pending.entry(&ask.requester.node).or_default();
                share.take(ask.identity());
            }
        }
        let mut undecided: Vec<_> = self.known.iter().collect();
        undecided.retain(|(_, entry)| {
            entry.stage == Stage::Undecided && self.waited(entry, now) < PENDING_STAYS
        });
        undecided.sort_by(|(_, a), (_, b)| a.order.cmp(&b.order));
        let mut turns: HashMap<Option<&str>, usize> = HashMap::new();
        let mut work = Vec::new();
        for (name, entry) in undecided {
            let conditions = entry.conditions.clone();
            let what = match &entry.ask {
                Err(refusal) => What::Deny {
                    refusal: refusal.clone(),
                    conditions,
                },
                Ok(ask) => {
                    let share = pending.entry(&ask.requester.node).or_default();
                    // Silence of a watch that is not well says nothing.
                    let heard = pods.well_since().map(|well| entry.since.max(well));
                    let at = Circumstances {
                        pods,
                        namespace: &self.rules.namespace,
                        pending: share.with(ask.identity()),
                        most_pending: self.most_pending,
                        patience_over: heard.is_some_and(|since| now - since >= PATIENCE),
                    };
                    match decide(ask, &at) {
                        Decision::Deny(refusal) => What::Deny {
                            refusal,
                            conditions,
                        },
                        Decision::Approve => {
                            share.take(ask.identity());
                            What::Approve {
                                of: format!("{} on {}", ask.identity(), ask.requester.node),
                                conditions,
                            }
                        }
                        Decision::Wait(_) => {
                            share.take(ask.identity());
                            continue;
                        }
                    }
                }
            };
            if entry.again.is_none_or(|again| again <= now) {
                let turn = turns.entry(entry.node()).or_default();
                work.push((*turn, entry.work(name, what)));
                *turn += 1;
            }
        }
        // Stable: within a turn the earlier ones come first.
        work.sort_by_key(|(turn, _)| *turn);
        work.truncate(ROUND);
        work.into_iter().map(|(_, work)| work).collect()
    }

    fn collected(&self, now: Instant) -> Vec<Work> {
        let mut over = Vec::new();
        let mut finished = Vec::new();
        for found @ (_, entry) in &self.known {
            let age = now - entry.since;
            let stays = match entry.stage {
                Stage::Issued => age < ISSUED_STAYS,
                Stage::Denied | Stage::Failed => age < REFUSED_STAYS,
                Stage::Undecided | Stage::Approved => self.waited(entry, now) < PENDING_STAYS,
            };
            let fresh = entry.stage == Stage::Issued && age < FRESH;
            if !stays {
                over.push(found);
            } else if !entry.is_pending() && !fresh {
                finished.push(found);
            }
        }
        let oldest = |a: &Found<'_>, b: &Found<'_>| {
            let since = a.1.since.cmp(&b.1.since);
            since.then_with(|| a.1.order.cmp(&b.1.order))
        };
        over.sort_by(oldest);
        let surplus = finished.len().saturating_sub(MOST_FINISHED);
        let surplus = from_the_greatest(finished.into_iter(), surplus, oldest);
        over.into_iter()
            .chain(surplus)
            .filter(|(_, entry)| entry.again.is_none_or(|again| again <= now))
            .take(SWEEP)
            .map(|(name, entry)| entry.work(name, What::Collect))
            .collect()
    }
}

/// What a node has open.
#[derive(Default)]
struct Share<'a> {
    /// Requests for each.
    identities: HashMap<&'a Identity, usize>,
    places: usize,
}

impl<'a> Share<'a> {
    /// Places that are taken if this is asked for, too.
    fn with(&self, identity: &Identity) -> usize {
        let open = self.identities.get(identity).copied().unwrap_or(0);
        self.places + usize::from(open.is_multiple_of(REPEATS))
    }

    fn take(&mut self, identity: &'a Identity) {
        self.places = self.with(identity);
        *self.identities.entry(identity).or_default() += 1;
    }
}

type Found<'a> = (&'a Arc<str>, &'a Entry);

/// So many, each from the node that has most of what is left; of a node first by `order`.
fn from_the_greatest<'a>(
    all: impl Iterator<Item = Found<'a>>,
    count: usize,
    order: impl Fn(&Found<'a>, &Found<'a>) -> Ordering,
) -> impl Iterator<Item = Found<'a>> {
    let mut nodes: HashMap<Option<&str>, Vec<Found<'a>>> = HashMap::new();
    if count > 0 {
        for found in all {
            nodes.entry(found.1.node()).or_default().push(found);
        }
    }
    for of_node in nodes.values_mut() {
        // The last of a list is taken first.
        of_node.sort_by(|a, b| order(b, a));
    }
    let mut greatest: BinaryHeap<_> = nodes.iter().map(|(node, all)| (all.len(), *node)).collect();
    (0..count).map_while(move |_| {
        let (_, node) = greatest.pop()?;
        let of_node = nodes.get_mut(&node)?;
        let found = of_node.pop()?;
        greatest.push((of_node.len(), node));
        Some(found)
    })
}

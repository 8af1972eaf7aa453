//! What became of every connection, and what explains those that failed.
//!
//! Both ends report here by the connection's number. When both have, a connection that went as its
//! script says is only counted; any other is kept and judged at the end against the [`Event`]s:
//! it is explained if something was done, while it was open, to a node or a pod that it touched.
//! Lost or changed bytes are never explained. It knows neither sockets nor how things are done.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use super::talk::{How, Seen};

/// Failures kept with their details; more are counted.
const KEPT: usize = 20_000;

/// What a client knows of its connection when it is over.
#[derive(Clone, Debug)]
pub(crate) struct Attempt {
    pub(crate) kind: &'static str,
    pub(crate) from: &'static str,
    /// What it dialled, in words.
    pub(crate) to: String,
    /// Names of the pods it may lead to.
    pub(crate) pods: BTreeSet<String>,
    /// Nodes it may touch.
    pub(crate) nodes: BTreeSet<usize>,
    pub(crate) started: Instant,
    pub(crate) ended: Instant,
    pub(crate) seen: Seen,
}

/// Something that was done, and to whom.
#[derive(Clone, Debug)]
pub(crate) struct Event {
    pub(crate) what: &'static str,
    pub(crate) details: String,
    pub(crate) affects: Affects,
    pub(crate) from: Instant,
    /// `None`: it goes on.
    pub(crate) until: Option<Instant>,
}

/// Whose connections may fail because of an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Affects {
    /// All that touch the node.
    Node(usize),
    /// All that lead to the pod.
    Pod(String),
    /// None at all: this must not be noticed.
    Nobody,
}

/// What is being done; hand it back to [`Ledger::over`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ongoing(usize);

#[derive(Default)]
pub(crate) struct Ledger(Mutex<Inner>);

#[derive(Default)]
struct Inner {
    clients: HashMap<u64, Attempt>,
    servers: HashMap<u64, (String, Seen)>,
    totals: BTreeMap<&'static str, Totals>,
    failed: Vec<Failure>,
    failed_beyond: u64,
    events: Vec<Event>,
    violations: Vec<String>,
}

/// Of one kind of traffic.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Totals {
    pub(crate) opened: u64,
    pub(crate) whole: u64,
    pub(crate) failed: u64,
    /// Checked at the end that received them.
    pub(crate) bytes: u64,
    pub(crate) longest: Duration,
}

#[derive(Clone, Debug)]
struct Failure {
    attempt: Attempt,
    server: Option<(String, Seen)>,
}

/// The whole story.
#[derive(Debug, Default)]
pub(crate) struct Verdict {
    pub(crate) totals: BTreeMap<&'static str, Totals>,
    pub(crate) events: BTreeMap<&'static str, u64>,
    /// Failures by what explains them.
    pub(crate) explained: BTreeMap<&'static str, u64>,
    pub(crate) unexplained: Vec<String>,
    pub(crate) bytes_lost: u64,
    pub(crate) bytes_wrong: u64,
    pub(crate) violations: Vec<String>,
}

impl Ledger {
    /// The client's end. Counts the connection.
    pub(crate) fn client(&self, connection: u64, attempt: Attempt) {
        let mut inner = self.inner();
        let totals = inner.totals.entry(attempt.kind).or_default();
        totals.opened += 1;
        match inner.servers.remove(&connection) {
            Some((pod, seen)) => inner.settle(attempt, Some((pod, seen))),
            None if matches!(attempt.seen.how, How::NotConnected(_)) => inner.settle(attempt, None),
            None => {
                inner.clients.insert(connection, attempt);
            }
        }
    }

    /// The server's end.
    pub(crate) fn server(&self, connection: u64, pod: String, seen: Seen) {
        let mut inner = self.inner();
        match inner.clients.remove(&connection) {
            Some(attempt) => inner.settle(attempt, Some((pod, seen))),
            None => {
                inner.servers.insert(connection, (pod, seen));
            }
        }
    }

    /// Something begins that may harm connections.
    pub(crate) fn begins(&self, what: &'static str, details: String, affects: Affects) -> Ongoing {
        let mut inner = self.inner();
        inner.events.push(Event {
            what,
            details,
            affects,
            from: Instant::now(),
            until: None,
        });
        Ongoing(inner.events.len() - 1)
    }

    /// From here on nothing may fail because of it.
    pub(crate) fn over(&self, ongoing: Ongoing) {
        if let Some(event) = self.inner().events.get_mut(ongoing.0) {
            event.until = Some(Instant::now());
        }
    }

    /// Something that no disturbance excuses.
    pub(crate) fn violation(&self, what: String) {
        let mut inner = self.inner();
        if inner.violations.len() < KEPT {
            inner.violations.push(what);
        }
    }

    /// So far: connections opened, failed, and bytes carried.
    pub(crate) fn glance(&self) -> (u64, u64, u64) {
        let inner = self.inner();
        inner.totals.values().fold((0, 0, 0), |sum, totals| {
            (
                sum.0 + totals.opened,
                sum.1 + totals.failed,
                sum.2 + totals.bytes,
            )
        })
    }

    /// Judges everything. All traffic must have ended.
    pub(crate) fn verdict(&self) -> Verdict {
        let mut inner = self.inner();
        let clients: Vec<Attempt> = inner.clients.drain().map(|(_, attempt)| attempt).collect();
        for attempt in clients {
            inner.settle(attempt, None);
        }
        let mut verdict = Verdict {
            totals: inner.totals.clone(),
            violations: inner.violations.clone(),
            ..Verdict::default()
        };
        for event in &inner.events {
            *verdict.events.entry(event.what).or_default() += 1;
        }
        for failure in &inner.failed {
            verdict.bytes_lost += failure.lost();
            verdict.bytes_wrong += failure.wrong();
            let excuse = if failure.lost() + failure.wrong() > 0 {
                None
            } else {
                inner.events.iter().find(|event| failure.is_due_to(event))
            };
            match excuse {
                Some(event) => *verdict.explained.entry(event.what).or_default() += 1,
                None => {
                    let meanwhile = inner.events.iter().filter(|e| failure.saw(e));
                    let meanwhile: Vec<String> = meanwhile
                        .map(|event| format!("{} ({})", event.what, event.details))
                        .collect();
                    let meanwhile = meanwhile.join(", ");
                    verdict
                        .unexplained
                        .push(format!("{failure}; meanwhile: {meanwhile}"));
                }
            }
        }
        if inner.failed_beyond > 0 {
            let more = format!("{} more failures were not kept", inner.failed_beyond);
            verdict.unexplained.push(more);
        }
        for (pod, seen) in inner.servers.values() {
            let orphan = format!("{pod} ended a connection that no client had: {seen:?}");
            verdict.violations.push(orphan);
        }
        verdict
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn settle(&mut self, attempt: Attempt, server: Option<(String, Seen)>) {
        let totals = self.totals.entry(attempt.kind).or_default();
        totals.bytes += attempt.seen.received;
        totals.bytes += server.as_ref().map_or(0, |(_, seen)| seen.received);
        totals.longest = totals.longest.max(attempt.ended - attempt.started);
        let whole = attempt.seen.how == How::Whole
            && server.as_ref().is_some_and(|(_, seen)| {
                seen.how == How::Whole && seen.received == attempt.seen.sent
            });
        if whole {
            totals.whole += 1;
            return;
        }
        totals.failed += 1;
        if self.failed.len() < KEPT {
            self.failed.push(Failure { attempt, server });
        } else {
            self.failed_beyond += 1;
        }
    }
}

impl Failure {
    /// Bytes that an end did not get although it was told that this is all.
    fn lost(&self) -> u64 {
        self.ends()
            .filter(|seen| seen.how == How::Short)
            .map(|seen| seen.expected.saturating_sub(seen.received).max(1))
            .sum()
    }

    /// Ends that got bytes nobody had sent.
    fn wrong(&self) -> u64 {
        self.ends()
            .filter(|seen| matches!(seen.how, How::Wrong { .. } | How::Extra))
            .count() as u64
    }

    fn ends(&self) -> impl Iterator<Item = &Seen> {
        std::iter::once(&self.attempt.seen).chain(self.server.iter().map(|(_, seen)| seen))
    }

    fn is_due_to(&self, event: &Event) -> bool {
        self.saw(event)
            && match &event.affects {
                Affects::Node(node) => self.attempt.nodes.contains(node),
                Affects::Pod(pod) => match &self.server {
                    Some((served, _)) => served == pod,
                    None => self.attempt.pods.contains(pod),
                },
                Affects::Nobody => false,
            }
    }

    /// Whether it was open at any moment of the event.
    fn saw(&self, event: &Event) -> bool {
        event.from <= self.attempt.ended
            && event
                .until
                .is_none_or(|until| self.attempt.started <= until)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let attempt = &self.attempt;
        write!(
            f,
            "{} from {} to {} after {:.1} s: client {}",
            attempt.kind,
            attempt.from,
            attempt.to,
            (attempt.ended - attempt.started).as_secs_f64(),
            attempt.seen
        )?;
        match &self.server {
            Some((pod, seen)) => write!(f, ", server {pod} {seen}"),
            None => write!(f, ", no server"),
        }
    }
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:?} (sent {}, received {} of {})",
            self.how, self.sent, self.received, self.expected
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(how: How) -> Seen {
        Seen {
            sent: 10,
            received: 10,
            expected: 10,
            how,
        }
    }

    fn attempt(how: How, started: Instant) -> Attempt {
        Attempt {
            kind: "short",
            from: "a",
            to: "b".into(),
            pods: BTreeSet::from(["b".to_owned(), "c".to_owned()]),
            nodes: BTreeSet::from([0, 1]),
            started,
            ended: started + Duration::from_secs(2),
            seen: seen(how),
        }
    }

    fn judged(event: Affects, how: How, server: Option<(&str, How)>) -> Verdict {
        let ledger = Ledger::default();
        let now = Instant::now();
        let ongoing = ledger.begins("event", String::new(), event);
        ledger.client(1, attempt(how, now));
        if let Some((pod, how)) = server {
            ledger.server(1, pod.to_owned(), seen(how));
        }
        ledger.over(ongoing);
        ledger.verdict()
    }

    #[test]
    fn two_whole_ends_are_a_success_in_either_order() {
        let ledger = Ledger::default();
        let now = Instant::now();
        ledger.client(1, attempt(How::Whole, now));
        ledger.server(1, "b".into(), seen(How::Whole));
        ledger.server(2, "b".into(), seen(How::Whole));
        ledger.client(2, attempt(How::Whole, now));
        let verdict = ledger.verdict();
        assert_eq!(verdict.totals["short"].whole, 2);
        assert_eq!(verdict.totals["short"].bytes, 40);
        assert!(verdict.unexplained.is_empty() && verdict.violations.is_empty());
    }

    #[test]
    fn a_failure_is_explained_by_what_was_done_to_its_node_or_pod() {
        for (affects, server, explained) in [
            (Affects::Node(1), None, true),
            (Affects::Node(2), None, false),
            (Affects::Pod("c".into()), None, true),
            // It is known to have gone to another one.
            (Affects::Pod("c".into()), Some(("b", How::Whole)), false),
            (Affects::Pod("b".into()), Some(("b", How::Reset)), true),
            (Affects::Nobody, None, false),
        ] {
            let verdict = judged(affects.clone(), How::Reset, server);
            let count = usize::from(!explained);
            assert_eq!(verdict.unexplained.len(), count, "{affects:?}");
            assert_eq!(
                verdict.explained.values().sum::<u64>(),
                u64::from(explained)
            );
        }
    }

    #[test]
    fn a_failure_before_or_after_an_event_is_not_explained_by_it() {
        let ledger = Ledger::default();
        let before = Instant::now();
        std::thread::sleep(Duration::from_millis(5));
        let ongoing = ledger.begins("event", String::new(), Affects::Node(0));
        ledger.over(ongoing);
        std::thread::sleep(Duration::from_millis(5));
        let mut early = attempt(How::Reset, before);
        early.ended = before;
        ledger.client(1, early);
        ledger.client(2, attempt(How::Reset, Instant::now()));
        assert_eq!(ledger.verdict().unexplained.len(), 2);
    }

    #[test]
    fn nothing_explains_lost_or_wrong_bytes() {
        let mut short = attempt(How::Short, Instant::now());
        short.seen.received = 4;
        let ledger = Ledger::default();
        let _ = ledger.begins("event", String::new(), Affects::Node(0));
        ledger.client(1, short);
        let verdict = ledger.verdict();
        assert_eq!((verdict.bytes_lost, verdict.unexplained.len()), (6, 1));
        let verdict = judged(Affects::Node(0), How::Wrong { at: 3 }, None);
        assert_eq!((verdict.bytes_wrong, verdict.unexplained.len()), (1, 1));
    }

    #[test]
    fn a_client_that_is_whole_needs_a_server_that_got_everything() {
        for server in [None, Some(("b", How::Silent))] {
            let verdict = judged(Affects::Nobody, How::Whole, server);
            assert_eq!(verdict.unexplained.len(), 1);
        }
    }
}

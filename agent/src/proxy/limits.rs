//! What one pod may take of the node, and all pods together.
//!
//! Every connection is charged to one pod of this node: to the one that dialled it, or, where it
//! comes from outside the node, to the one it goes to. So a pod that calls its neighbours uses up
//! what is its own, never theirs; and because more may come to a pod than any one pod may dial, a
//! single caller cannot use up what a pod of another node may take either. What comes by tunnels,
//! with a proven identity, is counted apart from what comes plainly: strangers cannot keep the mesh
//! out. Five things are bounded: connections open, new ones in a second, those whose far end is
//! still being reached, those that wait for an agent that is away, and bytes that wait in our
//! memory.
//!
//! **Refused, not delayed.** What is over a cap is accepted and reset, before a task or a buffer is
//! made for it, and counted by reason. Leaving it in the listener's queue would cost less and tell
//! nobody: the client would hang in a connection that stands for its kernel, the queue would fill
//! with callers that have given up, and the pod's other callers would wait behind them. A burst is
//! another thing: its last ones wait for places that become free, for two seconds together until
//! somebody finds one at once again ([`Over::passes`], `GRACE` in `proxy/threads.rs`).
//!
//! **Who waits takes no one's place.** While a node's agent is away, for the seconds in which one
//! follows another, all that a pod dials there waits ([`Permit::wait`]). It counts apart: what the
//! pod dials elsewhere goes on, and so does what it dials anew when all of them are let go on. Who is
//! one too many for waiting is told at once what it would have waited for.
//!
//! **Buffers squeeze, they never refuse.** A slow reader is no offence. The fuller a pod's share of
//! buffers is, the less one read may take ([`Share::read_limit`]), down to so little that all
//! connections of the pod together stay within bounds, and every connection still moves.
//!
//! Asked by the accept loops, the tunnel server and the pumps. Nothing here knows sockets; time is
//! an argument.

mod bucket;
mod capacity;

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Instant,
};

use parking_lot::Mutex;
use serde::Serialize;

use super::{copy::CHUNK, reason::Reason, report::Refusal};
use crate::state::PodUid;

pub(super) use bucket::{Bucket, Rate};
pub use capacity::{Bound, Capacity};

/// What a person has set; the rest follows from [`Capacity`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CapSettings {
    pub pod_connections: Option<usize>,
    pub pod_inbound_connections: Option<usize>,
    pub pod_rate: Option<u32>,
    pub pod_pending: Option<usize>,
    pub pod_buffers: Option<usize>,
    pub node_connections: Option<usize>,
    pub node_buffers: Option<usize>,
    pub peer_tunnels: Option<usize>,
}

/// What is in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Caps {
    /// Connections that one pod has dialled and that are open.
    pub pod_connections: usize,
    /// The same of those that came to one pod from outside the node: so many by tunnels, and as many
    /// plainly.
    pub pod_inbound_connections: usize,
    /// Connections that one pod dials in a second; as many may come at once. Twice as many may come
    /// to it.
    pub pod_rate: u32,
    /// Connections that one pod has dialled and whose far end is being reached. Twice as many of
    /// those that came to it.
    pub pod_pending: usize,
    /// Connections that one pod has dialled and that wait until their far end can be reached.
    pub pod_waiting: usize,
    /// Bytes of one pod that wait for a slow reader, from which on reads are smallest.
    pub pod_buffers: usize,
    /// The same of all pods.
    pub node_connections: usize,
    pub node_buffers: usize,
    /// Tunnels that one peer, which has proven who it is, keeps open to this node.
    pub peer_tunnels: usize,
}

impl Default for Caps {
    /// Of a machine with much of everything.
    fn default() -> Self {
        let plenty = Capacity {
            bound: Bound::Machine,
            memory: 16 << 30,
            files: 1 << 20,
        };
        Self::derive(&CapSettings::default(), &plenty)
    }
}

/// How a connection came to be a pod's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// It dialled.
    Dialled,
    /// Somebody called it by a tunnel, and policy let them in.
    Tunnelled,
    /// Somebody called it who has proven nothing.
    Plain,
}

impl Way {
    const ALL: [Self; 3] = [Self::Dialled, Self::Tunnelled, Self::Plain];
}

/// Over which cap?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Over {
    Connections,
    Rate,
    Pending,
    Node,
}

impl Over {
    const ALL: [Self; 4] = [Self::Connections, Self::Rate, Self::Pending, Self::Node];

    /// Does another's end make room?
    pub(super) fn passes(self) -> bool {
        match self {
            Self::Connections | Self::Pending | Self::Node => true,
            Self::Rate => false,
        }
    }

    fn reason(self, way: Way) -> Reason {
        match (self, way) {
            (Self::Connections, Way::Dialled) => Reason::PodConnections,
            (Self::Connections, Way::Tunnelled | Way::Plain) => Reason::PodInboundConnections,
            (Self::Rate, Way::Dialled) => Reason::PodConnectionRate,
            (Self::Rate, Way::Tunnelled | Way::Plain) => Reason::PodInboundRate,
            (Self::Pending, Way::Dialled) => Reason::PodPending,
            (Self::Pending, Way::Tunnelled | Way::Plain) => Reason::PodInboundPending,
            (Self::Node, Way::Dialled | Way::Tunnelled | Way::Plain) => Reason::NodeConnections,
        }
    }

    fn sentence(self, caps: &WayCaps, node: usize) -> String {
        match self {
            Self::Connections => format!(
                "{} connections are open; {} is the cap",
                caps.connections, caps.flag
            ),
            Self::Rate => format!(
                "more than {} new connections in a second; --pod-connection-rate is the cap",
                caps.rate
            ),
            Self::Pending => format!(
                "{} connections wait for their far end; --pod-pending is the cap",
                caps.pending
            ),
            Self::Node => {
                format!("{node} connections of all pods are open; --node-connections is the cap")
            }
        }
    }
}

/// What is in force for one way.
struct WayCaps {
    connections: usize,
    rate: u32,
    pending: usize,
    flag: &'static str,
}

impl Caps {
    fn of(&self, way: Way) -> WayCaps {
        match way {
            Way::Dialled => WayCaps {
                connections: self.pod_connections,
                rate: self.pod_rate,
                pending: self.pod_pending,
                flag: "--pod-connections",
            },
            Way::Tunnelled | Way::Plain => WayCaps {
                connections: self.pod_inbound_connections,
                rate: self.pod_rate.saturating_mul(2),
                pending: self.pod_pending.saturating_mul(2),
                flag: "--pod-inbound-connections",
            },
        }
    }
}

/// A read while its pod's share of buffers, or the node's, is more than half full; and from the
/// cap on. The last is the bound: each connection can hold that much more in either direction.
const READ_WHEN_HALF_FULL: usize = 16 << 10;
const READ_WHEN_FULL: usize = 4 << 10;

/// All pods of the node, all threads.
#[derive(Debug)]
pub(super) struct Limits {
    caps: Caps,
    started: Instant,
    open: AtomicUsize,
    buffered: AtomicUsize,
    /// Locked when a pod is captured, when it is called without being captured, and to be shown.
    shares: Mutex<HashMap<PodUid, Weak<Share>>>,
}

/// One pod's.
#[derive(Debug)]
pub(super) struct Share {
    limits: Arc<Limits>,
    /// By [`Way`].
    counts: [Counts; Way::ALL.len()],
    buffered: AtomicUsize,
}

/// What a pod has of one way.
#[derive(Debug)]
struct Counts {
    open: AtomicUsize,
    /// Of those that are open.
    pending: AtomicUsize,
    /// Beside those that are open, among which they may have found no place.
    waiting: AtomicUsize,
    arrivals: Bucket,
    /// By [`Over`].
    refused: [AtomicU64; Over::ALL.len()],
}

/// A connection that was let in; it counts until this is dropped.
#[derive(Debug)]
pub(super) struct Permit {
    share: Arc<Share>,
    way: Way,
    stage: Stage,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Its far end is being reached.
    Pending,
    /// Its far end cannot be reached for now, or could not.
    Waiting,
    Established,
}

/// For `debug limits` and the metrics.
#[derive(Clone, Debug, Serialize)]
pub struct LimitsStatus {
    pub caps: Caps,
    pub connections: usize,
    pub buffered_bytes: usize,
    #[serde(skip)]
    pub pods: HashMap<PodUid, ShareStatus>,
}

/// For `debug pods`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ShareStatus {
    pub dialled: usize,
    pub came: usize,
    pub pending: usize,
    pub waiting: usize,
    pub buffered_bytes: usize,
    /// Only what happened.
    pub refused: Vec<(&'static str, u64)>,
}

impl Limits {
    pub(super) fn new(caps: Caps, now: Instant) -> Arc<Self> {
        Arc::new(Self {
            caps,
            started: now,
            open: AtomicUsize::new(0),
            buffered: AtomicUsize::new(0),
            shares: Mutex::default(),
        })
    }

    /// The share of a pod, the same for all who ask while one of them holds it.
    pub(super) fn share(self: &Arc<Self>, uid: &PodUid) -> Arc<Share> {
        let mut shares = self.shares.lock();
        if let Some(share) = shares.get(uid).and_then(Weak::upgrade) {
            return share;
        }
        // A new pod is rare, and a good moment to forget those that are gone.
        shares.retain(|_, share| share.strong_count() > 0);
        let counts = |way| {
            let rate = self.caps.of(way).rate;
            Counts {
                open: AtomicUsize::new(0),
                pending: AtomicUsize::new(0),
                waiting: AtomicUsize::new(0),
                arrivals: Bucket::new(Rate::new(rate, rate), self.started),
                refused: Default::default(),
            }
        };
        let share = Arc::new(Share {
            limits: Arc::clone(self),
            counts: Way::ALL.map(counts),
            buffered: AtomicUsize::new(0),
        });
        shares.insert(PodUid::clone(uid), Arc::downgrade(&share));
        share
    }

    pub(super) fn status(&self) -> LimitsStatus {
        let shares = self.shares.lock();
        let pods = shares.iter().filter_map(|(uid, share)| {
            let share = share.upgrade()?;
            Some((PodUid::clone(uid), share.status()))
        });
        LimitsStatus {
            caps: self.caps,
            connections: self.open.load(Ordering::Relaxed),
            buffered_bytes: self.buffered.load(Ordering::Relaxed),
            pods: pods.collect(),
        }
    }
}

impl Share {
    /// Lets a new connection in, or says why not. It is pending until [`Permit::established`].
    pub(super) fn admit(self: &Arc<Self>, way: Way, now: Instant) -> Result<Permit, Over> {
        // The permit gives back what it counted when it is dropped on the way.
        let permit = Permit {
            share: Arc::clone(self),
            way,
            stage: Stage::Pending,
        };
        let counts = &self.counts[way as usize];
        let caps = self.limits.caps.of(way);
        let most = self.limits.caps.node_connections;
        let node = self.limits.open.fetch_add(1, Ordering::Relaxed);
        let own = counts.open.fetch_add(1, Ordering::Relaxed);
        let pending = counts.pending.fetch_add(1, Ordering::Relaxed);
        let over = if own >= caps.connections {
            Over::Connections
        } else if node >= most {
            Over::Node
        } else if pending >= caps.pending {
            Over::Pending
        } else if !counts.arrivals.take(now) {
            Over::Rate
        } else {
            return Ok(permit);
        };
        Err(over)
    }

    /// Who was not let in goes away: counts it.
    pub(super) fn refuse(&self, way: Way, over: Over) -> Refusal {
        let caps = &self.limits.caps;
        self.counts[way as usize].refused[over as usize].fetch_add(1, Ordering::Relaxed);
        let sentence = over.sentence(&caps.of(way), caps.node_connections);
        Refusal::new(over.reason(way), sentence)
    }

    /// How much one read may take.
    pub(super) fn read_limit(&self) -> usize {
        let fullness = |buffered: &AtomicUsize, cap: usize| {
            let buffered = buffered.load(Ordering::Relaxed);
            (buffered >= cap / 2, buffered >= cap)
        };
        let caps = &self.limits.caps;
        let own = fullness(&self.buffered, caps.pod_buffers);
        let node = fullness(&self.limits.buffered, caps.node_buffers);
        if own.1 || node.1 {
            READ_WHEN_FULL
        } else if own.0 || node.0 {
            READ_WHEN_HALF_FULL
        } else {
            CHUNK
        }
    }

    /// Is its share of buffers, or the node's, more than half full?
    pub(super) fn is_pressed(&self) -> bool {
        self.read_limit() < CHUNK
    }

    /// More bytes wait, or fewer.
    pub(super) fn buffered(&self, delta: isize) {
        for count in [&self.buffered, &self.limits.buffered] {
            if delta >= 0 {
                count.fetch_add(delta.unsigned_abs(), Ordering::Relaxed);
            } else {
                count.fetch_sub(delta.unsigned_abs(), Ordering::Relaxed);
            }
        }
    }

    fn status(&self) -> ShareStatus {
        let of = |way: Way| &self.counts[way as usize];
        let open = |way| of(way).open.load(Ordering::Relaxed);
        let pending = Way::ALL.map(|way| of(way).pending.load(Ordering::Relaxed));
        let waiting = Way::ALL.map(|way| of(way).waiting.load(Ordering::Relaxed));
        let mut refused: BTreeMap<&'static str, u64> = BTreeMap::new();
        for way in Way::ALL {
            for over in Over::ALL {
                let count = of(way).refused[over as usize].load(Ordering::Relaxed);
                if count > 0 {
                    *refused.entry(over.reason(way).word()).or_default() += count;
                }
            }
        }
        ShareStatus {
            dialled: open(Way::Dialled),
            came: open(Way::Tunnelled) + open(Way::Plain),
            pending: pending.iter().sum(),
            waiting: waiting.iter().sum(),
            buffered_bytes: self.buffered.load(Ordering::Relaxed),
            refused: refused.into_iter().collect(),
        }
    }
}

impl Permit {
    pub(super) fn share(&self) -> &Arc<Share> {
        &self.share
    }

    fn counts(&self) -> &Counts {
        &self.share.counts[self.way as usize]
    }

    /// The far end cannot be reached for now. Says how many of the pod wait with it; none if they
    /// are so many that this one shall not.
    pub(super) fn wait(&mut self) -> Option<usize> {
        let counts = self.counts();
        let cap = self.share.limits.caps.pod_waiting;
        match self.stage {
            Stage::Pending => {
                let before = counts.waiting.fetch_add(1, Ordering::Relaxed);
                if before >= cap {
                    counts.waiting.fetch_sub(1, Ordering::Relaxed);
                    return None;
                }
                counts.pending.fetch_sub(1, Ordering::Relaxed);
                counts.open.fetch_sub(1, Ordering::Relaxed);
                self.stage = Stage::Waiting;
                Some(before + 1)
            }
            Stage::Waiting => Some(counts.waiting.load(Ordering::Relaxed)),
            Stage::Established => None,
        }
    }

    /// The far end is reached, or there is none. Who has waited takes a place among those that are
    /// open if there is one; if not, all that waited are let go on at once, and it keeps its own.
    pub(super) fn established(&mut self) {
        let counts = self.counts();
        match self.stage {
            Stage::Pending => {
                counts.pending.fetch_sub(1, Ordering::Relaxed);
            }
            Stage::Waiting => {
                let open = counts.open.fetch_add(1, Ordering::Relaxed);
                if open >= self.share.limits.caps.of(self.way).connections {
                    counts.open.fetch_sub(1, Ordering::Relaxed);
                    return;
                }
                counts.waiting.fetch_sub(1, Ordering::Relaxed);
            }
            Stage::Established => {}
        }
        self.stage = Stage::Established;
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let counts = self.counts();
        let counted = match self.stage {
            Stage::Pending => {
                counts.pending.fetch_sub(1, Ordering::Relaxed);
                &counts.open
            }
            Stage::Waiting => &counts.waiting,
            Stage::Established => &counts.open,
        };
        counted.fetch_sub(1, Ordering::Relaxed);
        self.share.limits.open.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn limits(change: impl Fn(&mut Caps)) -> Arc<Limits> {
        let mut caps = Caps {
            pod_connections: 3,
            pod_inbound_connections: 4,
            pod_rate: 100,
            pod_pending: 1000,
            pod_waiting: 2,
            pod_buffers: 1 << 20,
            node_connections: 5,
            node_buffers: 4 << 20,
            peer_tunnels: 5,
        };
        change(&mut caps);
        Limits::new(caps, Instant::now())
    }

    fn refused(pod: &Arc<Share>, way: Way, now: Instant) -> Refusal {
        pod.refuse(way, pod.admit(way, now).unwrap_err())
    }

    fn pod(limits: &Arc<Limits>, name: &str) -> Arc<Share> {
        limits.share(&PodUid::from(name))
    }

    #[test]
    fn a_pod_over_its_cap_is_refused_and_its_neighbour_is_not() {
        let limits = limits(|_| {});
        let now = Instant::now();
        let (greedy, modest) = (pod(&limits, "greedy"), pod(&limits, "modest"));
        let mut held: Vec<_> = (0..3)
            .map(|_| greedy.admit(Way::Dialled, now).unwrap())
            .collect();
        assert_eq!(
            refused(&greedy, Way::Dialled, now).reason,
            Reason::PodConnections
        );
        let neighbour = modest.admit(Way::Dialled, now).unwrap();
        held.pop();
        held.push(greedy.admit(Way::Dialled, now).unwrap());
        assert_eq!(limits.status().connections, 4);
        drop((held, neighbour));
        assert_eq!(limits.status().connections, 0);
        let refused = greedy.status().refused;
        assert_eq!(refused, [("pod_connections", 1)]);
        assert!(modest.status().refused.is_empty());
    }

    #[test]
    fn what_comes_to_a_pod_does_not_count_as_what_it_dials() {
        let limits = limits(|caps| caps.node_connections = 100);
        let now = Instant::now();
        let pod = pod(&limits, "a");
        let came: Vec<_> = (0..4)
            .map(|_| pod.admit(Way::Tunnelled, now).unwrap())
            .collect();
        let refusal = refused(&pod, Way::Tunnelled, now);
        assert_eq!(refusal.reason, Reason::PodInboundConnections);
        assert!(refusal.detail.contains("--pod-inbound-connections"));
        let dialled = pod.admit(Way::Dialled, now).unwrap();
        let plain = pod.admit(Way::Plain, now).unwrap();
        let status = pod.status();
        assert_eq!((status.dialled, status.came), (1, 5));
        drop((came, dialled, plain));
        assert_eq!(limits.status().connections, 0);
    }

    #[test]
    fn all_pods_together_are_bounded_too() {
        let limits = limits(|_| {});
        let now = Instant::now();
        let pods: Vec<_> = ["a", "b", "c"].map(|name| pod(&limits, name)).into();
        let held: Vec<_> = pods
            .iter()
            .flat_map(|pod| [pod.admit(Way::Dialled, now), pod.admit(Way::Dialled, now)])
            .collect();
        assert_eq!(held.iter().filter(|one| one.is_ok()).count(), 5);
        let last = held.into_iter().next_back().unwrap();
        assert_eq!(last.unwrap_err(), Over::Node);
        assert_eq!(limits.status().connections, 0, "a refusal counts nothing");
    }

    #[test]
    fn new_connections_in_a_second_are_bounded_and_come_back() {
        let limits = limits(|_| {});
        let pod = pod(&limits, "a");
        let start = Instant::now();
        let arrive = |at| {
            (0..1000)
                .filter(|_| {
                    pod.admit(Way::Dialled, at)
                        .is_ok_and(|permit| permit.share().status().dialled > 0)
                })
                .count()
        };
        assert_eq!(arrive(start), 100);
        assert_eq!(
            refused(&pod, Way::Dialled, start).reason,
            Reason::PodConnectionRate
        );
        assert_eq!(arrive(start + Duration::from_millis(500)), 50);
    }

    #[test]
    fn who_reaches_for_too_much_at_once_is_refused_until_something_answers() {
        let limits = limits(|caps| caps.pod_pending = 2);
        let pod = pod(&limits, "a");
        let now = Instant::now();
        let mut permits = [
            pod.admit(Way::Dialled, now).unwrap(),
            pod.admit(Way::Dialled, now).unwrap(),
        ];
        assert_eq!(refused(&pod, Way::Dialled, now).reason, Reason::PodPending);
        permits[0].established();
        assert!(pod.admit(Way::Dialled, now).is_ok());
    }

    #[test]
    fn who_waits_takes_no_place_of_those_that_are_open() {
        let limits = limits(|caps| {
            caps.pod_pending = 1;
            caps.pod_connections = 1;
            caps.node_connections = 4;
        });
        let pod = pod(&limits, "a");
        let status = || {
            let status = pod.status();
            (status.dialled, status.pending, status.waiting)
        };
        let now = Instant::now();
        let wait = || {
            let mut permit = pod.admit(Way::Dialled, now).unwrap();
            permit.wait().map(|with| (permit, with))
        };
        let (mut first, alone) = wait().unwrap();
        let (mut second, with) = wait().unwrap();
        assert_eq!((alone, with, first.wait()), (1, 2, Some(2)));
        assert!(wait().is_none(), "two are the cap");
        assert_eq!(status(), (0, 0, 2));

        let mut open = pod.admit(Way::Dialled, now).unwrap();
        open.established();
        assert_eq!(open.wait(), None, "it has nothing to wait for");
        let over = pod.admit(Way::Dialled, now).unwrap_err();
        assert_eq!(over, Over::Connections);
        assert_eq!(limits.status().connections, 3, "the node holds them all");

        first.established();
        assert_eq!(status(), (1, 0, 2), "no place is free");
        drop((open, first));
        assert_eq!(status(), (0, 0, 1));
        second.established();
        assert_eq!(status(), (1, 0, 0));
        drop(second);
        assert_eq!(status(), (0, 0, 0));
        assert_eq!(limits.status().connections, 0);
    }

    #[test]
    fn reads_shrink_while_buffers_fill_and_never_stop() {
        let limits = limits(|_| {});
        let (full, other) = (pod(&limits, "full"), pod(&limits, "other"));
        assert_eq!(full.read_limit(), CHUNK);
        full.buffered(512 << 10);
        assert_eq!(full.read_limit(), READ_WHEN_HALF_FULL);
        full.buffered(512 << 10);
        assert_eq!(full.read_limit(), READ_WHEN_FULL);
        assert_eq!(other.read_limit(), CHUNK, "the neighbour has its own");
        full.buffered(3 << 20);
        assert_eq!(other.read_limit(), READ_WHEN_FULL, "the node is full");
        full.buffered(-(4 << 20));
        assert_eq!((full.read_limit(), other.read_limit()), (CHUNK, CHUNK));
    }

    #[test]
    fn a_share_is_one_for_all_threads_and_goes_with_the_last_of_them() {
        let limits = limits(|_| {});
        let (one, two) = (pod(&limits, "a"), pod(&limits, "a"));
        assert!(Arc::ptr_eq(&one, &two));
        drop((one, two));
        let _other = pod(&limits, "b");
        assert_eq!(limits.shares.lock().len(), 1);
    }

    #[test]
    fn threads_together_let_in_no_more_than_the_cap() {
        let limits = limits(|caps| {
            caps.pod_connections = 100;
            caps.node_connections = 1000;
            caps.pod_rate = 100_000;
        });
        let pod = pod(&limits, "a");
        let now = Instant::now();
        let held: Vec<Permit> = std::thread::scope(|scope| {
            let takers: Vec<_> = (0..4)
                .map(|_| {
                    scope.spawn(|| {
                        (0..100)
                            .filter_map(|_| pod.admit(Way::Dialled, now).ok())
                            .collect()
                    })
                })
                .collect();
            let of = |taker: std::thread::ScopedJoinHandle<'_, Vec<_>>| taker.join().unwrap();
            takers.into_iter().flat_map(of).collect()
        });
        assert!(held.len() <= 100, "{}", held.len());
        drop(held);
        assert_eq!(pod.status().dialled, 0);
    }
}

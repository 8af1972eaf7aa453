//! What strangers may cost: how many handshakes may be pending, and who goes when there are too
//! many.
//!
//! Until a handshake is done nobody has proven anything, so each source (IPv6: each /64) and all
//! together are bounded, and half of all places is kept for addresses of the cluster's nodes. A
//! node is a source of its own: what else is on its link is in its /64, and is not the node.
//! When a bound is reached the oldest of the largest source goes: an honest handshake takes
//! milliseconds, so whoever has waited longest in the largest crowd is the least likely to be one.
//! The newcomer's own source counts, so that a flood pushes out itself first. And because each one
//! costs a signature whether it waits or not, strangers together have a bound in a second, and so
//! has each node: a pod outside the mesh may speak from its node's address.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
    sync::Arc,
    time::Instant,
};

use parking_lot::Mutex;
use tokio::sync::oneshot;

use crate::proxy::limits::{Bucket, Rate};

const PER_SOURCE: usize = 64;
const IN_ALL: usize = 1024;
/// Places that only addresses of nodes can take.
const KEPT_FOR_NODES: usize = IN_ALL / 2;

/// Handshakes that strangers begin in a second: a signature each, which is what they cost.
const STRANGERS: Rate = Rate::new(256, 1024);
/// And one node: after a restart a tunnel for each pair of identities on each thread.
const NODE: Rate = Rate::new(512, 4096);

/// All pending handshakes of the process.
pub(in crate::proxy) struct Admission {
    pending: Mutex<Pending>,
    strangers: Bucket,
}

#[derive(Default)]
struct Pending {
    /// Of each node that ever came.
    rates: HashMap<IpAddr, Bucket>,
    /// Of each the handshakes, oldest first; dropping the sender ends one.
    sources: HashMap<Source, Vec<(u64, oneshot::Sender<()>)>>,
    next: u64,
    strangers: usize,
    nodes: usize,
}

/// Who is counted together.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Source {
    Node(IpAddr),
    /// An address, or the beginning of an IPv6 network.
    Strangers(IpAddr),
}

/// A place among the pending; given back when dropped.
pub(super) struct Place {
    admission: Arc<Admission>,
    source: Source,
    id: u64,
    evicted: oneshot::Receiver<()>,
}

impl Admission {
    pub(in crate::proxy) fn new(now: Instant) -> Arc<Self> {
        Arc::new(Self {
            pending: Mutex::default(),
            strangers: Bucket::new(STRANGERS, now),
        })
    }

    /// A place; somebody else may have to go for it. `None`: they come too fast.
    pub(super) fn enter(self: &Arc<Self>, peer: IpAddr, node: bool, now: Instant) -> Option<Place> {
        let peer = peer.to_canonical();
        let mut pending = self.pending.lock();
        let rates = &mut pending.rates;
        let (source, in_time) = if node {
            let rate = rates.entry(peer).or_insert_with(|| Bucket::new(NODE, now));
            (Source::Node(peer), rate.take(now))
        } else {
            (Source::Strangers(block(peer)), self.strangers.take(now))
        };
        if !in_time {
            return None;
        }
        let (keep, evicted) = oneshot::channel();
        let id = pending.next;
        pending.next += 1;
        pending.add(source, id, keep);
        pending.make_room(source);
        Some(Place {
            admission: Arc::clone(self),
            source,
            id,
            evicted,
        })
    }
}

impl Place {
    /// Returns when somebody else got the place.
    pub(super) async fn evicted(&mut self) {
        let _dropped = (&mut self.evicted).await;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.admission.pending.lock().remove(self.source, self.id);
    }
}

impl Pending {
    fn add(&mut self, source: Source, id: u64, keep: oneshot::Sender<()>) {
        self.sources.entry(source).or_default().push((id, keep));
        *self.count(source) += 1;
    }

    fn remove(&mut self, source: Source, id: u64) {
        let Some(handshakes) = self.sources.get_mut(&source) else {
            return;
        };
        let before = handshakes.len();
        handshakes.retain(|(other, _)| *other != id);
        let removed = before - handshakes.len();
        if handshakes.is_empty() {
            self.sources.remove(&source);
        }
        *self.count(source) -= removed;
    }

    fn count(&mut self, source: Source) -> &mut usize {
        match source {
            Source::Node(_) => &mut self.nodes,
            Source::Strangers(_) => &mut self.strangers,
        }
    }

    fn make_room(&mut self, newcomer: Source) {
        if self
            .sources
            .get(&newcomer)
            .is_some_and(|handshakes| handshakes.len() > PER_SOURCE)
        {
            return self.evict_oldest(newcomer);
        }
        let full = self.strangers + self.nodes > IN_ALL;
        let node = matches!(newcomer, Source::Node(_));
        if self.strangers > IN_ALL - KEPT_FOR_NODES || (full && self.strangers > 0 && node) {
            self.evict_from_largest(|source| matches!(source, Source::Strangers(_)));
        } else if full {
            self.evict_from_largest(|source| matches!(source, Source::Node(_)));
        }
    }

    fn evict_from_largest(&mut self, among: impl Fn(&Source) -> bool) {
        let largest = self
            .sources
            .iter()
            .filter(|(source, _)| among(source))
            .max_by_key(|(_, handshakes)| handshakes.len())
            .map(|(source, _)| *source);
        if let Some(largest) = largest {
            self.evict_oldest(largest);
        }
    }

    fn evict_oldest(&mut self, source: Source) {
        let oldest = self
            .sources
            .get(&source)
            .and_then(|handshakes| handshakes.first())
            .map(|(id, _)| *id);
        if let Some(oldest) = oldest {
            self.remove(source, oldest);
        }
    }
}

/// Whoever has one IPv6 address has its /64.
pub(super) fn block(peer: IpAddr) -> IpAddr {
    match peer.to_canonical() {
        IpAddr::V4(ip) => ip.into(),
        IpAddr::V6(ip) => Ipv6Addr::from_bits(ip.to_bits() & !u128::from(u64::MAX)).into(),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// A second after the one before: as slowly as nobody minds.
    fn enter(admission: &Arc<Admission>, peer: IpAddr, node: bool) -> Place {
        let at = Instant::now() + Duration::from_secs(admission.pending.lock().next);
        admission.enter(peer, node, at).unwrap()
    }

    fn v4(n: u32) -> IpAddr {
        std::net::Ipv4Addr::from_bits(0x0a00_0000 + n).into()
    }

    fn gone(place: &mut Place) -> bool {
        use tokio::sync::oneshot::error::TryRecvError;
        place.evicted.try_recv() == Err(TryRecvError::Closed)
    }

    #[test]
    fn a_source_loses_its_own_oldest_when_it_takes_too_many() {
        let admission = Admission::new(Instant::now());
        let mut other = enter(&admission, v4(2), false);
        let mut flood: Vec<_> = (0..PER_SOURCE + 1)
            .map(|_| enter(&admission, v4(1), false))
            .collect();
        assert!(gone(&mut flood[0]));
        assert!(!gone(&mut flood[1]));
        assert!(!gone(&mut other));
    }

    #[test]
    fn one_ipv6_network_is_one_source() {
        let admission = Admission::new(Instant::now());
        let mut places: Vec<_> = (0..PER_SOURCE as u16 + 1)
            .map(|n| {
                let ip = Ipv6Addr::new(0x2001, 0xdb8, 0, 1, n, 0, 0, 1);
                enter(&admission, ip.into(), false)
            })
            .collect();
        assert!(gone(&mut places[0]));
    }

    #[test]
    fn who_shares_a_nodes_ipv6_network_is_not_the_node() {
        let of_link = |n: u16| IpAddr::from(Ipv6Addr::new(0xfd00, 0, 0, 1, 0, 0, 0, n));
        let flood = |admission: &Arc<Admission>| -> Vec<Place> {
            (100..100 + 3 * PER_SOURCE as u16)
                .map(|n| enter(admission, of_link(n), false))
                .collect()
        };
        for node_first in [true, false] {
            let admission = Admission::new(Instant::now());
            let before = (!node_first).then(|| flood(&admission));
            let mut nodes = [1, 2].map(|n| enter(&admission, of_link(n), true));
            let after = node_first.then(|| flood(&admission));
            assert!(nodes.iter_mut().all(|node| !gone(node)));
            {
                let pending = admission.pending.lock();
                assert_eq!((pending.nodes, pending.strangers), (2, PER_SOURCE));
            }
            drop((before, after, nodes));
            assert!(admission.pending.lock().sources.is_empty());
        }
    }

    #[test]
    fn strangers_cannot_take_the_places_of_nodes() {
        let admission = Admission::new(Instant::now());
        let mut strangers: Vec<_> = (0..2000).map(|n| enter(&admission, v4(n), false)).collect();
        let held = strangers
            .iter_mut()
            .filter_map(|place| (!gone(place)).then_some(()))
            .count();
        assert_eq!(held, IN_ALL - KEPT_FOR_NODES);
        let mut node = enter(&admission, v4(9999), true);
        assert!(!gone(&mut node));
        let more = strangers
            .iter_mut()
            .filter_map(|place| (!gone(place)).then_some(()))
            .count();
        assert_eq!(more, held, "there was room for the node");
    }

    #[test]
    fn the_largest_crowd_pays_first() {
        let admission = Admission::new(Instant::now());
        let mut single = enter(&admission, v4(1), false);
        let mut crowd: Vec<_> = (0..60).map(|_| enter(&admission, v4(2), false)).collect();
        let _rest: Vec<_> = (100..100 + 452)
            .map(|n| enter(&admission, v4(n), false))
            .collect();
        assert!(!gone(&mut single));
        assert!(gone(&mut crowd[0]));
        assert!(!gone(&mut crowd[59]));
    }

    #[test]
    fn a_finished_handshake_gives_its_place_back() {
        let admission = Admission::new(Instant::now());
        for _ in 0..5000 {
            let mut place = enter(&admission, v4(1), false);
            assert!(!gone(&mut place));
        }
        let pending = admission.pending.lock();
        assert_eq!(
            (pending.strangers, pending.nodes, pending.sources.len()),
            (0, 0, 0)
        );
    }

    #[test]
    fn a_node_that_comes_too_fast_is_turned_away_and_others_are_not() {
        let now = Instant::now();
        let admission = Admission::new(now);
        let admitted = |at| {
            (0..9000)
                .filter(|_| admission.enter(v4(1), true, at).is_some())
                .count()
        };
        assert_eq!(admitted(now), 4096);
        assert!(admission.enter(v4(2), true, now).is_some());
        assert!(admission.enter(v4(1), false, now).is_some());
        assert_eq!(admitted(now + Duration::from_secs(1)), 512);
    }

    #[test]
    fn strangers_that_come_too_fast_are_turned_away_and_nodes_are_not() {
        let now = Instant::now();
        let admission = Admission::new(now);
        let admitted = |at| {
            (0..5000)
                .filter(|n| admission.enter(v4(*n), false, at).is_some())
                .count()
        };
        assert_eq!(admitted(now), 1024);
        assert!(admission.enter(v4(1), true, now).is_some());
        assert_eq!(admitted(now + Duration::from_secs(1)), 256);
    }
}

//! How many tunnels one peer may keep open. [`super::admission`] bounds strangers; this bounds who
//! has proven an identity: a node whose keys were stolen has many identities, each of them may call
//! each of ours, and every tunnel costs memory whether anything travels in it or not.
//!
//! Counted for all data threads together, when the handshake is done.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    fmt,
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use parking_lot::Mutex;
use serde::Serialize;

use crate::{
    proxy::{reason::Reason, report::Refusal},
    state::Mesh,
};

use super::admission::block;

/// Where tunnels come from.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Peer {
    /// A node, by whichever of its addresses.
    Node(Arc<str>),
    /// A pod at a pod's own address, or whoever has a certificate and is at no node's address. Of
    /// IPv6 its /64.
    Source(IpAddr),
}

impl Peer {
    pub(super) fn of(mesh: &Mesh, remote: IpAddr) -> Self {
        match mesh.node_of_address.get(&remote) {
            Some(node) => Self::Node(Arc::clone(node)),
            None => Self::Source(block(remote)),
        }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Node(name) => write!(f, "node {name}"),
            Self::Source(ip) => write!(f, "{ip}"),
        }
    }
}

pub(in crate::proxy) struct Peers {
    /// `--peer-tunnels`.
    most: usize,
    /// Only who has one.
    open: Mutex<BTreeMap<Peer, usize>>,
    refused: AtomicU64,
}

/// A tunnel's place; given back when dropped.
pub(super) struct Seat {
    peers: Arc<Peers>,
    peer: Peer,
}

/// For `debug limits`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PeersStatus {
    /// Tunnels that stand, by peer.
    pub open: Vec<(String, usize)>,
    pub refused: u64,
}

impl Peers {
    pub(in crate::proxy) fn new(most: usize) -> Arc<Self> {
        Arc::new(Self {
            most,
            open: Mutex::default(),
            refused: AtomicU64::new(0),
        })
    }

    pub(super) fn enter(self: &Arc<Self>, peer: Peer) -> Result<Seat, Refusal> {
        let mut open = self.open.lock();
        let count = open.entry(peer.clone()).or_default();
        if *count >= self.most {
            self.refused.fetch_add(1, Ordering::Relaxed);
            let detail = format!(
                "{count} tunnels from {peer} are open; --peer-tunnels of this node is the cap"
            );
            return Err(Refusal::new(Reason::PeerTunnels, detail));
        }
        *count += 1;
        drop(open);
        Ok(Seat {
            peers: Arc::clone(self),
            peer,
        })
    }

    pub(in crate::proxy) fn status(&self) -> PeersStatus {
        let open = self.open.lock();
        PeersStatus {
            open: open
                .iter()
                .map(|(peer, count)| (peer.to_string(), *count))
                .collect(),
            refused: self.refused.load(Ordering::Relaxed),
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        if let Entry::Occupied(mut count) = self.peers.open.lock().entry(self.peer.clone()) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_over_its_cap_is_refused_and_another_is_not() {
        let peers = Peers::new(2);
        let node = |name: &str| Peer::Node(name.into());
        let one = peers.enter(node("n1")).ok().unwrap();
        let _two = peers.enter(node("n1")).ok().unwrap();
        let refusal = peers.enter(node("n1")).err().unwrap();
        assert_eq!(refusal.reason, Reason::PeerTunnels);
        for word in ["2 tunnels", "node n1", "--peer-tunnels"] {
            assert!(refusal.detail.contains(word), "{}", refusal.detail);
        }
        let other = peers.enter(node("n2")).ok().unwrap();
        drop(one);
        let _again = peers.enter(node("n1")).ok().unwrap();
        drop(other);
        let status = PeersStatus {
            open: vec![("node n1".into(), 2)],
            refused: 1,
        };
        assert_eq!(peers.status(), status, "who has none is forgotten");
    }

    #[test]
    fn whoever_has_a_network_of_ipv6_is_one_peer_and_a_node_is_one_by_all_its_addresses() {
        let text = crate::testing::manifests::node("n1", &["192.168.0.1", "fd00:1::1"]);
        let mesh = crate::testing::manifests::mesh(&text);
        let of = |text: &str| Peer::of(&mesh, text.parse().unwrap());
        assert_eq!(of("192.168.0.1"), of("fd00:1::1"));
        assert_eq!(of("fd00:2::1"), of("fd00:2::2"));
        assert_ne!(of("fd00:2::1"), of("fd00:2:0:1::1"));
        assert_ne!(of("10.0.0.1"), of("10.0.0.2"));
    }
}

//! Which peers no tunnel can be opened to, so that it is said once and not for every connection.
//!
//! One for all data threads. A node that is away is away for every identity; what has to do with
//! certificates is remembered per pair of identities, or two pairs of which one works would take
//! turns in the log.

use std::{
    collections::{HashMap, hash_map::Entry},
    net::SocketAddr,
};

use parking_lot::Mutex;

use crate::{proxy::reason::Reason, state::Identity};

/// Troubles known at a time. With more of them nobody reads line by line, and what is forgotten is
/// said again at worst.
const MOST: usize = 4096;

/// Whose tunnel, to whom and where.
#[derive(Clone, Copy)]
pub(super) struct Way<'a> {
    pub(super) source: &'a Identity,
    pub(super) destination: &'a Identity,
    pub(super) to: SocketAddr,
}

#[derive(Default)]
pub(in crate::proxy) struct Troubles {
    known: Mutex<HashMap<Trouble, Reason>>,
}

#[derive(PartialEq, Eq, Hash)]
struct Trouble {
    to: SocketAddr,
    /// `None`: whoever it is.
    of: Option<(Identity, Identity)>,
}

impl Way<'_> {
    fn of_all(self) -> Trouble {
        Trouble {
            to: self.to,
            of: None,
        }
    }

    fn of_these(self) -> Trouble {
        Trouble {
            to: self.to,
            of: Some((self.source.clone(), self.destination.clone())),
        }
    }
}

impl Troubles {
    /// No tunnel could be opened. Is that news?
    pub(super) fn begins(&self, way: Way<'_>, reason: Reason) -> bool {
        let trouble = if reason == Reason::TunnelFailed {
            way.of_all()
        } else {
            way.of_these()
        };
        let mut known = self.known.lock();
        if known.len() >= MOST {
            known.clear();
        }
        match known.entry(trouble) {
            Entry::Vacant(place) => {
                place.insert(reason);
                true
            }
            Entry::Occupied(mut before) => before.insert(reason) != reason,
        }
    }

    /// A tunnel was opened. Is that news?
    pub(super) fn ends(&self, way: Way<'_>) -> bool {
        let mut known = self.known.lock();
        // Nearly always: no identity is copied for nothing.
        if known.is_empty() {
            return false;
        }
        let of_all = known.remove(&way.of_all());
        let of_these = known.remove(&way.of_these());
        of_all.is_some() || of_these.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(account: &str) -> Identity {
        Identity::from_spiffe_id(&format!("spiffe://cluster.local/ns/shop/sa/{account}")).unwrap()
    }

    #[test]
    fn a_peer_that_is_away_is_said_once_for_all_identities_and_again_after_it_was_back() {
        let troubles = Troubles::default();
        let (web, cart, api) = (identity("web"), identity("cart"), identity("api"));
        let way = |source, to: &str| Way {
            source,
            destination: &api,
            to: to.parse().unwrap(),
        };
        let (one, other) = ("10.0.0.2:15008", "10.0.0.3:15008");
        assert!(!troubles.ends(way(&web, one)), "nothing was wrong");
        assert!(troubles.begins(way(&web, one), Reason::TunnelFailed));
        assert!(!troubles.begins(way(&web, one), Reason::TunnelFailed));
        assert!(!troubles.begins(way(&cart, one), Reason::TunnelFailed));
        assert!(troubles.begins(way(&web, other), Reason::TunnelFailed));
        assert!(troubles.ends(way(&cart, one)));
        assert!(!troubles.ends(way(&web, one)));
        assert!(troubles.begins(way(&web, one), Reason::TunnelFailed));
    }

    #[test]
    fn a_pair_whose_certificate_is_wrong_is_said_once_while_others_get_through() {
        let troubles = Troubles::default();
        let (web, cart, api) = (identity("web"), identity("cart"), identity("api"));
        let way = |source| Way {
            source,
            destination: &api,
            to: "10.0.0.2:15008".parse().unwrap(),
        };
        assert!(troubles.begins(way(&web), Reason::TunnelIdentity));
        assert!(!troubles.ends(way(&cart)));
        assert!(!troubles.begins(way(&web), Reason::TunnelIdentity));
        assert!(
            troubles.begins(way(&web), Reason::NoCertificate),
            "another reason is news"
        );
        assert!(troubles.ends(way(&web)));
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let troubles = Troubles::default();
        let (web, api) = (identity("web"), identity("api"));
        for n in 0..3 * u32::try_from(MOST).unwrap() {
            let ip = std::net::Ipv4Addr::from_bits(0x0a00_0000 + n);
            let way = Way {
                source: &web,
                destination: &api,
                to: (ip, 15008).into(),
            };
            assert!(troubles.begins(way, Reason::TunnelFailed));
        }
        assert!(troubles.known.lock().len() <= MOST);
    }
}

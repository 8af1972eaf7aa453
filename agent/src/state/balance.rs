//! Which endpoint: pick two at random and take the one with fewer open connections ("the power of
//! two random choices", Mitzenmacher 1996); or the one a client's address is bound to.
//!
//! Randomness and the load of an endpoint are arguments.
//!
//! Affinity (sessionAffinity: ClientIP) has two halves. Who has no binding yet gets the endpoint
//! that a hash of client and endpoint ranks highest: every data thread, and a restarted agent,
//! comes to the same one without asking another. The binding is then remembered, so that an
//! endpoint that joins later does not take over clients that are bound elsewhere. It lasts as long
//! as the client returns within the Service's timeout and the endpoint is there.

use std::{
    collections::HashMap,
    hash::{DefaultHasher, Hash, Hasher},
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use super::{
    ObjectKey,
    resolve::{Endpoint, ServiceFrontend},
};

/// Bindings of one generation; there are two, so an [`Affinity`] holds at most twice as many.
const GENERATION: usize = 4096;

/// Remembers which endpoint a client's address was given (sessionAffinity: ClientIP).
///
/// Bounded without a clock of its own: when the young generation is full it becomes the old one,
/// and the old one is forgotten. Whoever came since then was copied over.
#[derive(Debug, Default)]
pub struct Affinity {
    young: HashMap<Client, Binding>,
    old: HashMap<Client, Binding>,
}

/// A client of one port of a Service.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Client {
    service: ObjectKey,
    port: u16,
    ip: IpAddr,
}

#[derive(Clone, Copy, Debug)]
struct Binding {
    endpoint: SocketAddr,
    last_used: Instant,
}

/// Picks an endpoint. `open` tells how many connections this node has open to an endpoint;
/// `exclude` names endpoints that failed for this connection already. `random(n)` is below `n`.
pub fn pick<'a>(
    service: &'a ServiceFrontend,
    client: IpAddr,
    exclude: &[SocketAddr],
    open: &dyn Fn(&Endpoint) -> usize,
    affinity: &mut Affinity,
    random: &mut dyn FnMut(usize) -> usize,
    now: Instant,
) -> Option<&'a Endpoint> {
    let candidates = || {
        service
            .endpoints
            .iter()
            .filter(|e| !exclude.contains(&e.addr))
    };

    if let Some(seconds) = service.affinity {
        let client = Client {
            service: service.service.clone(),
            port: service.port,
            ip: client.to_canonical(),
        };
        let timeout = Duration::from_secs(seconds.into());
        let bound = affinity.get(&client, timeout, now);
        let chosen = bound
            .and_then(|addr| candidates().find(|endpoint| endpoint.addr == addr))
            .or_else(|| candidates().max_by_key(|endpoint| rank(&client, endpoint)))?;
        affinity.bind(client, chosen.addr, now);
        return Some(chosen);
    }

    match candidates().count() {
        0 => None,
        1 => candidates().next(),
        count => {
            let first = random(count);
            // The second is drawn from the others.
            let second = (first + 1 + random(count - 1)) % count;
            let (first, second) = (candidates().nth(first)?, candidates().nth(second)?);
            Some(if open(second) < open(first) {
                second
            } else {
                first
            })
        }
    }
}

fn rank(client: &Client, endpoint: &Endpoint) -> u64 {
    let mut hasher = DefaultHasher::new();
    client.hash(&mut hasher);
    endpoint.addr.hash(&mut hasher);
    hasher.finish()
}

impl Affinity {
    fn get(&self, client: &Client, timeout: Duration, now: Instant) -> Option<SocketAddr> {
        let binding = self.young.get(client).or_else(|| self.old.get(client))?;
        let idle = now.saturating_duration_since(binding.last_used);
        (idle < timeout).then_some(binding.endpoint)
    }

    fn bind(&mut self, client: Client, endpoint: SocketAddr, now: Instant) {
        if self.young.len() >= GENERATION && !self.young.contains_key(&client) {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(
            client,
            Binding {
                endpoint,
                last_used: now,
            },
        );
    }

    /// Bindings held, expired ones included.
    pub fn len(&self) -> usize {
        self.young.len() + self.old.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use std::collections::BTreeMap;

    use super::*;
    use crate::state::resolve::Carrier;

    const CLIENT: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1));

    fn addr(n: u16) -> SocketAddr {
        SocketAddr::from(([10, 9, (n >> 8) as u8, n as u8], 80))
    }

    fn service(endpoints: impl IntoIterator<Item = u16>, affinity: Option<u32>) -> ServiceFrontend {
        let endpoint = |n| Endpoint {
            addr: addr(n),
            workload: None,
            carrier: Carrier::Plain,
        };
        ServiceFrontend {
            service: ObjectKey {
                cluster: "c".into(),
                namespace: "ns".into(),
                name: "s".into(),
            },
            port: 80,
            port_name: None,
            endpoints: endpoints.into_iter().map(endpoint).collect(),
            affinity,
        }
    }

    /// Picks with scripted randomness: each draw must ask for the given bound.
    fn draw(
        service: &ServiceFrontend,
        exclude: &[u16],
        open: &[(u16, usize)],
        script: &[(usize, usize)],
    ) -> Option<SocketAddr> {
        let open: BTreeMap<_, _> = open.iter().map(|(n, count)| (addr(*n), *count)).collect();
        let exclude: Vec<_> = exclude.iter().map(|n| addr(*n)).collect();
        let mut script = script.iter();
        let picked = pick(
            service,
            CLIENT,
            &exclude,
            &|endpoint| open.get(&endpoint.addr).copied().unwrap_or_default(),
            &mut Affinity::default(),
            &mut |bound| {
                let (wanted, value) = script.next().expect("one draw too many");
                assert_eq!(bound, *wanted);
                *value
            },
            Instant::now(),
        );
        assert_eq!(script.next(), None, "one draw too few");
        picked.map(|endpoint| endpoint.addr)
    }

    #[test]
    fn of_two_drawn_the_one_with_fewer_open_connections_is_taken() {
        let four = service([0, 1, 2, 3], None);
        let rows: [(&[_], [usize; 2], u16); 8] = [
            (&[], [0, 0], 0),
            (&[(0, 1)], [0, 0], 1),
            (&[(0, 1), (1, 1)], [0, 0], 0),
            (&[(0, 1), (1, 2)], [0, 0], 0),
            (&[(0, 3), (3, 2)], [0, 2], 3),
            (&[(3, 1)], [3, 0], 0),
            (&[(3, 1)], [3, 2], 2),
            // The idle ones were not drawn.
            (&[(1, 5), (2, 4)], [1, 0], 2),
        ];
        for (open, [first, second], wanted) in rows {
            let got = draw(&four, &[], open, &[(4, first), (3, second)]);
            assert_eq!(got, Some(addr(wanted)), "{open:?} {first} {second}");
        }
    }

    #[test]
    fn two_different_endpoints_are_drawn_always() {
        let four = service([0, 1, 2, 3], None);
        for first in 0..4_u16 {
            let mut seen = std::collections::BTreeSet::new();
            for second in 0..3 {
                // The first one is busy, so the other is taken.
                let script = [(4, usize::from(first)), (3, second)];
                seen.insert(draw(&four, &[], &[(first, 1)], &script).unwrap());
            }
            assert_eq!(seen.len(), 3);
            assert!(!seen.contains(&addr(first)));
        }
    }

    #[test]
    fn failed_endpoints_are_not_offered_again() {
        let three = service([0, 1, 2], None);
        assert_eq!(
            draw(&three, &[1], &[(0, 1)], &[(2, 0), (1, 0)]),
            Some(addr(2))
        );
        assert_eq!(draw(&three, &[0, 2], &[(1, 99)], &[]), Some(addr(1)));
        assert_eq!(draw(&three, &[0, 1, 2], &[], &[]), None);
        assert_eq!(draw(&service([], None), &[], &[], &[]), None);
        assert_eq!(
            draw(&service([7], None), &[], &[(7, 5)], &[]),
            Some(addr(7))
        );
    }

    /// An affine pick; never draws.
    fn affine(
        service: &ServiceFrontend,
        client: IpAddr,
        exclude: &[SocketAddr],
        affinity: &mut Affinity,
        now: Instant,
    ) -> Option<SocketAddr> {
        let mut random = |_| unreachable!("affinity needs no chance");
        let picked = pick(service, client, exclude, &|_| 0, affinity, &mut random, now);
        picked.map(|endpoint| endpoint.addr)
    }

    fn client(n: u16) -> IpAddr {
        IpAddr::from([10, 1, (n >> 8) as u8, n as u8])
    }

    #[test]
    fn a_client_returns_to_its_endpoint_and_every_thread_chooses_the_same() {
        let ten = service(0..10, Some(60));
        let now = Instant::now();
        let mut used = std::collections::BTreeSet::new();
        for n in 0..100 {
            let mut one = Affinity::default();
            let first = affine(&ten, client(n), &[], &mut one, now).unwrap();
            assert_eq!(affine(&ten, client(n), &[], &mut one, now), Some(first));
            assert_eq!(
                affine(&ten, client(n), &[], &mut Affinity::default(), now),
                Some(first)
            );
            used.insert(first);
        }
        assert_eq!(used.len(), 10, "clients are spread");
        let IpAddr::V4(v4) = client(1) else {
            unreachable!("made so")
        };
        let mapped = IpAddr::V6(v4.to_ipv6_mapped());
        let fresh = || Affinity::default();
        assert_eq!(
            affine(&ten, mapped, &[], &mut fresh(), now),
            affine(&ten, client(1), &[], &mut fresh(), now)
        );
    }

    /// A client that would go to `later` if it were chosen anew.
    fn drawn_to(few: &ServiceFrontend, many: &ServiceFrontend) -> (IpAddr, SocketAddr) {
        let now = Instant::now();
        let fresh = |service, ip| affine(service, ip, &[], &mut Affinity::default(), now).unwrap();
        let mut clients = (0..1000).map(client);
        let moved = clients
            .find(|ip| fresh(few, *ip) != fresh(many, *ip))
            .unwrap();
        (moved, fresh(few, moved))
    }

    #[test]
    fn a_binding_holds_until_the_timeout_after_its_last_use() {
        let (few, many) = (service(0..2, Some(60)), service(0..6, Some(60)));
        let (ip, bound) = drawn_to(&few, &many);
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let mut affinity = Affinity::default();
        assert_eq!(affine(&few, ip, &[], &mut affinity, start), Some(bound));
        // New endpoints do not take it away, and each use counts anew.
        assert_eq!(
            affine(&many, ip, &[], &mut affinity, after(59)),
            Some(bound)
        );
        assert_eq!(
            affine(&many, ip, &[], &mut affinity, after(118)),
            Some(bound)
        );
        assert_ne!(
            affine(&many, ip, &[], &mut affinity, after(178)),
            Some(bound)
        );
    }

    #[test]
    fn a_binding_gives_way_when_its_endpoint_is_gone_or_failed() {
        let three = service(0..3, Some(60));
        let now = Instant::now();
        let mut affinity = Affinity::default();
        let bound = affine(&three, CLIENT, &[], &mut affinity, now).unwrap();
        let next = affine(&three, CLIENT, &[bound], &mut affinity, now).unwrap();
        assert_ne!(next, bound);
        assert_eq!(
            affine(&three, CLIENT, &[], &mut affinity, now),
            Some(next),
            "bound anew"
        );
        let all: Vec<_> = three
            .endpoints
            .iter()
            .map(|endpoint| endpoint.addr)
            .collect();
        assert_eq!(affine(&three, CLIENT, &all, &mut affinity, now), None);
        assert_eq!(
            affine(&service([], Some(60)), CLIENT, &[], &mut affinity, now),
            None
        );
    }

    #[test]
    fn memory_is_bounded_and_who_keeps_coming_is_not_forgotten() {
        let (few, many) = (service(0..2, Some(60)), service(0..6, Some(60)));
        let (regular, bound) = drawn_to(&few, &many);
        let now = Instant::now();
        let mut affinity = Affinity::default();
        assert!(affinity.is_empty());
        assert_eq!(affine(&few, regular, &[], &mut affinity, now), Some(bound));
        assert!(!affinity.is_empty());
        let others = (0..20_000_u32).map(|n| IpAddr::from([11, 0, (n >> 8) as u8, n as u8]));
        for (n, other) in others.enumerate() {
            affine(&few, other, &[], &mut affinity, now);
            assert!(affinity.len() <= 2 * GENERATION);
            if n % 1000 == 0 {
                assert_eq!(affine(&many, regular, &[], &mut affinity, now), Some(bound));
            }
        }
        // A full generation that sees only known clients keeps the old one.
        let mut full = Affinity::default();
        for n in 0..GENERATION as u16 {
            affine(&few, client(n), &[], &mut full, now);
        }
        assert_eq!(full.len(), GENERATION);
        affine(&few, client(0), &[], &mut full, now);
        assert_eq!((full.young.len(), full.old.len()), (GENERATION, 0));
        affine(&few, CLIENT, &[], &mut full, now);
        assert_eq!((full.young.len(), full.old.len()), (1, GENERATION));
    }

    #[test]
    fn ports_of_one_service_are_bound_apart() {
        let now = Instant::now();
        let mut affinity = Affinity::default();
        let web = service(0..5, Some(60));
        let raw = ServiceFrontend {
            port: 81,
            ..service(0..5, Some(60))
        };
        affine(&web, CLIENT, &[], &mut affinity, now);
        affine(&raw, CLIENT, &[], &mut affinity, now);
        assert_eq!(affinity.len(), 2);
    }
}

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

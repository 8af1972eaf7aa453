//! Which endpoint: pick two at random and take the one with fewer open connections ("the power of
//! two random choices", Mitzenmacher 1996); or the one a client's address is bound to.
//!
//! Randomness and the load of an endpoint are arguments.

use std::{net::IpAddr, time::Instant};

use super::resolve::{Endpoint, ServiceFrontend};

/// Remembers which endpoint a client's address was given (sessionAffinity: ClientIP).
#[derive(Debug, Default)]
pub struct Affinity {}

/// Picks an endpoint. `open` tells how many connections this node has open to an endpoint;
/// `exclude` names endpoints that failed for this connection already.
pub fn pick<'a>(
    _service: &'a ServiceFrontend,
    _client: IpAddr,
    _exclude: &[std::net::SocketAddr],
    _open: &dyn Fn(&Endpoint) -> usize,
    _affinity: &mut Affinity,
    _random: &mut dyn FnMut(usize) -> usize,
    _now: Instant,
) -> Option<&'a Endpoint> {
    unreachable!("written by the room's owner")
}

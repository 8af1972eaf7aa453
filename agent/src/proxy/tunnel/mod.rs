//! Tunnels between nodes: HBONE, that is HTTP/2 CONNECT over mutual TLS.
//!
//! [`pool`] opens them and [`server`] accepts them; [`hbone`] is what both sides must agree on,
//! [`wire`] the TCP below TLS. [`admission`] bounds what strangers may cost before they have proven
//! who they are, [`flood`] and [`peers`] what peers may cost afterwards; [`trouble`] remembers which peers cannot
//! be reached. Nothing here resolves or decides where a
//! connection goes.

mod admission;
mod flood;
pub mod hbone;
mod peers;
mod pool;
pub(super) mod server;
mod trouble;
mod wire;

use std::{
    cell::{Cell, RefCell},
    net::SocketAddr,
    rc::Rc,
    time::Duration,
};

use serde::Serialize;
use tokio::sync::Notify;

pub(super) use admission::Admission;
pub(super) use hbone::STREAM_WINDOW;
pub(super) use peers::Peers;
pub use peers::PeersStatus;
pub(super) use pool::{Pool, Route};
pub(super) use server::Port;
pub(super) use trouble::Troubles;

use server::ServerTunnel;

/// For `debug tunnels`.
#[derive(Clone, Debug, Serialize)]
pub struct TunnelStatus {
    /// `client`: we opened it. `server`: the peer did.
    pub role: &'static str,
    pub source: String,
    pub destination: String,
    /// The other end of the TCP connection.
    pub remote: SocketAddr,
    pub streams: usize,
    /// Payload of both directions.
    pub bytes: u64,
    /// Since it was opened.
    pub seconds: u64,
    /// No new streams: the peer or we said goodbye, or the certificate was renewed.
    pub retiring: bool,
}

/// Tunnels that others opened to one of our threads.
#[derive(Default)]
pub(super) struct Tunnels {
    open: RefCell<Vec<Rc<ServerTunnel>>>,
    /// A successor accepts: whoever finishes a handshake now is sent there.
    retiring: Cell<bool>,
    emptied: Notify,
}

impl Tunnels {
    fn add(&self, tunnel: &Rc<ServerTunnel>) {
        if self.retiring.get() {
            tunnel.say_goodbye();
        }
        self.open.borrow_mut().push(Rc::clone(tunnel));
    }

    fn remove(&self, tunnel: &Rc<ServerTunnel>) {
        let mut open = self.open.borrow_mut();
        open.retain(|other| !Rc::ptr_eq(other, tunnel));
        if open.is_empty() {
            self.emptied.notify_waiters();
        }
    }

    /// GOAWAY to everybody: no new streams, the old finish.
    pub(super) fn say_goodbye(&self) {
        for tunnel in self.open.borrow().iter() {
            tunnel.say_goodbye();
        }
    }

    /// Goodbye to everybody, and to whoever comes late.
    pub(super) fn retire(&self) {
        self.retiring.set(true);
        self.say_goodbye();
    }

    /// Returns when no tunnel is left.
    pub(super) async fn empty(&self) {
        while !self.open.borrow().is_empty() {
            self.emptied.notified().await;
        }
    }

    /// Says goodbye to tunnels that nobody has used for so long, and to clients whose certificate
    /// is over: their open streams finish. Cuts those whose peer does not answer a goodbye.
    pub(super) fn tidy(&self, idle: Duration, patience: Duration) {
        for tunnel in self.open.borrow().iter() {
            tunnel.tidy(idle, patience);
        }
    }

    pub(super) fn status(&self) -> Vec<TunnelStatus> {
        self.open
            .borrow()
            .iter()
            .map(|tunnel| tunnel.status())
            .collect()
    }
}

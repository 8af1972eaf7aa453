//! A connection's story: who calls, where to, may it, which endpoint, by what carrier; then bytes.
//!
//! One data thread per core ([`threads`]), each with its own current-thread runtime, its own
//! accepts, tunnels and upstream sockets: a flow never leaves its thread. Nothing here waits for
//! the API server, the signer or a scrape.
//!
//! - [`outbound`]: what the pods of this node dial. [`inbound`]: what comes to them past the mesh.
//! - [`tunnel`]: HBONE between nodes, and for a pod's own address.
//! - [`authz`] asks policy, [`copy`] moves bytes, [`conns`] knows who is open and ends them,
//!   [`limits`] bounds what each pod may take.
//!
//! `app` starts the room, feeds it [`PodEvent`]s and drains it; `admin` reads its status. It knows
//! the rooms before it (state, identity, datapath's sockets) and how to count and log, no more.
#![forbid(unsafe_code)]

mod accept;
mod authz;
mod conns;
mod copy;
mod inbound;
mod limits;
mod outbound;
mod reason;
mod report;
mod tcp;
#[cfg(test)]
mod tests;
mod threads;
mod tunnel;

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::{
    sync::{mpsc, oneshot},
    time::sleep,
};

use crate::{
    access_log::AccessLog,
    datapath::PodEvent,
    drain::{Drain, Drained},
    identity::Identities,
    metrics::Metrics,
    state::{MeshStore, PodUid},
};

pub use accept::TunnelListeners;
pub use limits::{Bound, CapSettings, Capacity, Caps, LimitsStatus, ShareStatus};
pub use reason::Reason;
pub use tunnel::{PeersStatus, TunnelStatus, hbone};

/// The port of tunnels, of nodes and (ztunnel's way) of pods.
pub use picomesh_common::config::TUNNEL_PORT;

/// Between two looks whether anybody is still connected.
const LOOK: Duration = Duration::from_millis(50);
/// Commands that wait for one data thread.
const COMMANDS: usize = 256;

#[derive(Clone, Debug)]
pub struct ProxySettings {
    /// Data threads; the datapath makes as many listeners per pod.
    pub threads: usize,
    /// Where tunnels are accepted. Empty: the tunnel port on all addresses of both families.
    pub tunnel_listen: Vec<SocketAddr>,
    /// The port at which other agents accept tunnels.
    pub tunnel_port: u16,
    /// Address that our tunnels come from; otherwise the kernel picks one of the node's.
    pub tunnel_source: Option<IpAddr>,
    /// Call pods at their own address on the tunnel port instead of their node's agent.
    pub hbone_to_pods: bool,
    pub caps: Caps,
    /// A tunnel that moves more bytes a second is busy with bulk: new connections get another.
    pub bulk: u64,
    pub timing: Timing,
}

/// How long the room waits for what. Settings of tests rather than of people.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// TCP connect to an endpoint or a node.
    pub connect: Duration,
    /// How long a connection waits for a node that takes no tunnels, as while its agent is replaced.
    pub away: Duration,
    /// TLS and HTTP/2 preface, from the first byte, on both sides.
    pub handshake: Duration,
    /// A tunnel without streams is closed after this.
    pub tunnel_idle: Duration,
    /// A tunnel with streams is pinged this often, and is dead if an answer takes as long.
    pub ping: Duration,
    /// How long a pod that left the mesh is still served by tunnels.
    pub recently_meshed: Duration,
    /// How long a tunnel's claim waits for news of a pod that nobody told us of yet. A kubelet tells
    /// of a pod's address some time after the pod has it, and later where many begin at once.
    pub unknown_source: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(5),
            away: Duration::from_secs(15),
            handshake: Duration::from_secs(5),
            tunnel_idle: Duration::from_secs(90),
            ping: Duration::from_secs(10),
            recently_meshed: Duration::from_secs(60),
            unknown_source: Duration::from_secs(5),
        }
    }
}

impl Default for ProxySettings {
    fn default() -> Self {
        Self {
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            tunnel_listen: Vec::new(),
            tunnel_port: TUNNEL_PORT,
            tunnel_source: None,
            hbone_to_pods: false,
            caps: Caps::default(),
            bulk: 64 * 1024 * 1024,
            timing: Timing::default(),
        }
    }
}

/// The rooms that a connection's story asks and tells.
#[derive(Clone)]
pub struct Surroundings {
    pub mesh: Arc<MeshStore>,
    pub identities: Identities,
    pub metrics: Arc<Metrics>,
    pub access_log: AccessLog,
}

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(
        "tunnel listener {address}: {source}; is another agent running? \
         `--tunnel-port` or another network namespace keeps two apart"
    )]
    Listen {
        address: SocketAddr,
        source: io::Error,
    },
    #[error("data thread {thread}: {source}")]
    Thread { thread: usize, source: io::Error },
    #[error("copying a tunnel listener: {source}; raise the limit of open files (ulimit -n)")]
    Copy { source: io::Error },
}

/// The room's handle.
pub struct Proxy {
    threads: Vec<threads::ThreadHandle>,
    tunnel_addresses: Vec<SocketAddr>,
    shared: Arc<threads::Shared>,
    /// Copies of the tunnel listeners, for a successor; given up when it has them.
    tunnel_sockets: Mutex<Vec<std::net::TcpListener>>,
    drain: Mutex<Option<Drain>>,
}

impl Proxy {
    /// Binds the tunnel port in the caller's network namespace, starts the data threads there and
    /// accepts tunnels.
    pub fn start(settings: ProxySettings, around: Surroundings) -> Result<Arc<Self>, StartError> {
        let listeners = TunnelListeners::bind(&settings)?;
        let own = listeners
            .copy()
            .map_err(|source| StartError::Copy { source })?;
        let addresses = listeners.addresses.clone();
        let shares = listeners
            .shares(settings.threads)
            .map_err(|source| StartError::Copy { source })?;
        Self::spawn(settings, around, shares, own, addresses)
    }

    /// The same with listeners that another agent serves too; [`Proxy::accept_tunnels`] begins to
    /// accept from them.
    pub fn prepare(
        settings: ProxySettings,
        around: Surroundings,
        listeners: &TunnelListeners,
    ) -> Result<Arc<Self>, StartError> {
        let own = listeners
            .copy()
            .map_err(|source| StartError::Copy { source })?;
        let addresses = listeners.addresses.clone();
        let none = (0..settings.threads.max(1)).map(|_| Vec::new()).collect();
        Self::spawn(settings, around, none, own, addresses)
    }

    fn spawn(
        settings: ProxySettings,
        around: Surroundings,
        shares: Vec<Vec<std::net::TcpListener>>,
        tunnel_sockets: Vec<std::net::TcpListener>,
        tunnel_addresses: Vec<SocketAddr>,
    ) -> Result<Arc<Self>, StartError> {
        let (drain, guard) = Drain::new();
        let settings = Arc::new(settings);
        let shared = Arc::new(threads::Shared::new(settings.caps, Instant::now()));
        let threads = shares
            .into_iter()
            .enumerate()
            .map(|(index, listeners)| {
                threads::spawn(threads::Start {
                    index,
                    listeners,
                    settings: Arc::clone(&settings),
                    around: around.clone(),
                    shared: Arc::clone(&shared),
                    drain: guard.clone(),
                })
                .map_err(|source| StartError::Thread {
                    thread: index,
                    source,
                })
            })
            .collect::<Result<_, _>>()?;
        Ok(Arc::new(Self {
            threads,
            tunnel_addresses,
            shared,
            tunnel_sockets: Mutex::new(tunnel_sockets),
            drain: Mutex::new(Some(drain)),
        }))
    }

    /// From now on tunnels are accepted from these.
    pub async fn accept_tunnels(&self, listeners: TunnelListeners) -> io::Result<()> {
        let shares = listeners.shares(self.threads.len())?;
        for (thread, listeners) in self.threads.iter().zip(shares) {
            thread.send(threads::Command::Listen { listeners }).await;
        }
        Ok(())
    }

    /// Copies of the sockets that listen for tunnels, for a successor.
    pub fn tunnel_sockets(&self) -> io::Result<Vec<std::net::TcpListener>> {
        let sockets = self.tunnel_sockets.lock();
        sockets
            .iter()
            .map(std::net::TcpListener::try_clone)
            .collect()
    }

    /// A successor accepts everything from here on, or nobody does. Tunnels are not accepted any
    /// more and those that stand are said goodbye; the pods' listeners, which nobody leads anybody
    /// to any more, are closed when their queues have been empty for a while, and not before
    /// `least` is over. [`Proxy::drain`] waits for that.
    pub async fn retire(&self, least: Duration) {
        self.tunnel_sockets.lock().clear();
        let mut answers = Vec::with_capacity(self.threads.len());
        for thread in &self.threads {
            let (done, answer) = oneshot::channel();
            thread.send(threads::Command::Retire { least, done }).await;
            answers.push(answer);
        }
        for answer in answers {
            // A thread that has ended serves nobody: nothing to wait for.
            let _ended = answer.await;
        }
    }

    /// Where tunnels are accepted.
    pub fn tunnel_addresses(&self) -> &[SocketAddr] {
        &self.tunnel_addresses
    }

    /// Serves the datapath's events until it ends.
    pub async fn follow(&self, mut events: mpsc::Receiver<PodEvent>) {
        while let Some(event) = events.recv().await {
            self.handle(event).await;
        }
    }

    /// Returns when no connection is open.
    pub async fn idle(&self) {
        while self.limits().connections > 0 {
            sleep(LOOK).await;
        }
    }

    /// Returns when every data thread has done it.
    pub async fn handle(&self, event: PodEvent) {
        let mut answers = Vec::with_capacity(self.threads.len());
        match event {
            PodEvent::Captured { pod, listeners } => {
                for (thread, listeners) in self.threads.iter().zip(listeners) {
                    let (done, answer) = oneshot::channel();
                    let pod = Arc::clone(&pod);
                    thread
                        .send(threads::Command::Captured {
                            pod,
                            listeners,
                            done,
                        })
                        .await;
                    answers.push(answer);
                }
            }
            PodEvent::Released { uid } => {
                for thread in &self.threads {
                    let (done, answer) = oneshot::channel();
                    thread
                        .send(threads::Command::Released {
                            uid: uid.clone(),
                            done,
                        })
                        .await;
                    answers.push(answer);
                }
            }
        }
        for answer in answers {
            // A thread that has ended serves nobody: nothing to wait for.
            let _ended = answer.await;
        }
    }

    /// Tunnels of all threads, at most a second old.
    pub fn tunnels(&self) -> Vec<TunnelStatus> {
        self.threads
            .iter()
            .flat_map(|thread| thread.status().tunnels)
            .collect()
    }

    /// Open connections per pod of this node, at most a second old.
    pub fn connections(&self) -> HashMap<PodUid, usize> {
        let mut sum = HashMap::new();
        for thread in &self.threads {
            for (uid, count) in thread.status().connections {
                *sum.entry(uid).or_default() += count;
            }
        }
        sum
    }

    /// What is bounded, and how much of it is in use.
    pub fn limits(&self) -> LimitsStatus {
        self.shared.limits.status()
    }

    /// Tunnels that others opened to us, by who did.
    pub fn tunnel_peers(&self) -> PeersStatus {
        self.shared.peers.status()
    }

    /// Goodbye to all peers; open connections have until `deadline`, then they are reset. Accepting
    /// goes on to the last moment unless [`Proxy::retire`] has ended it. A second call returns at once.
    pub async fn drain(&self, deadline: Duration) -> Drained {
        let drain = self.drain.lock().take();
        match drain {
            Some(drain) => drain.drain(deadline).await,
            None => Drained::Finished,
        }
    }
}

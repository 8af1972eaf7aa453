//! Our side of tunnels: one pool per data thread.
//!
//! A tunnel belongs to (source identity, destination identity, where it leads); a stream never
//! travels in a tunnel of another identity. Each thread opens its own, so there is at least one per
//! core and peer, and another when those there are full or busy with bulk. A tunnel retires, that
//! is takes no new streams and ends with its last one, when the peer says goodbye (GOAWAY), when it
//! was idle, when the certificate it was opened with has been replaced, or when the peer's is over.
//!
//! CONNECT does not wait for its answer: the stream is handed out at once and the application's
//! first bytes leave in the same packet.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    future::Future,
    net::{IpAddr, SocketAddr},
    pin::{Pin, pin},
    rc::Rc,
    sync::Arc,
    task::{Poll, Waker},
    time::{Duration, Instant, SystemTime},
};

use bytes::Bytes;
use h2::{
    Ping, SendStream,
    client::{Connection, ResponseFuture, SendRequest},
};
use rustls::ClientConfig;
use tokio::{sync::watch, task::spawn_local, time::timeout};
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::{
    TunnelStatus,
    flood::{self, Cut, Guard},
    hbone::{self, Windows},
    trouble,
    wire::{UNSENT, Wire},
};
use crate::{
    datapath::Source,
    identity,
    proxy::{
        TUNNEL_PORT,
        copy::Counted,
        limits::Share,
        reason::Reason,
        report::Refusal,
        tcp,
        threads::{Pod, Thread},
    },
    state::{Identity, Mesh, PodUid, Workload},
};

/// Tunnels that one thread opens to one peer because of bulk.
const MOST_FOR_BULK: usize = 4;
/// How often a tunnel's rate and certificate are looked at.
const LOOK: Duration = Duration::from_millis(500);

/// Whose tunnel, to whom.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Key {
    source: Identity,
    destination: Identity,
    to: SocketAddr,
    /// The calling pod, where the tunnel leaves from its address.
    from: Option<PodUid>,
}

impl Key {
    fn way(&self) -> trouble::Way<'_> {
        trouble::Way {
            source: &self.source,
            destination: &self.destination,
            to: self.to,
        }
    }
}

/// How to get to a callee: the key, and what is needed to open a tunnel.
pub(in crate::proxy) struct Route {
    key: Key,
    /// Addresses of the node, in order; or the pod's own.
    to: Vec<SocketAddr>,
    /// The calling pod, if the tunnel leaves from its netns.
    from: Option<Rc<Pod>>,
}

impl Route {
    pub(in crate::proxy) fn new(
        thread: &Thread,
        pod: &Rc<Pod>,
        mesh: &Mesh,
        caller: &Workload,
        callee: &Workload,
        target: SocketAddr,
        node_addresses: &[IpAddr],
    ) -> Result<Self, Refusal> {
        let (to, from) = if thread.settings.hbone_to_pods {
            // Of a pod it is always HBONE's own port; only nodes have a setting.
            (
                vec![SocketAddr::new(target.ip(), TUNNEL_PORT)],
                Some(Rc::clone(pod)),
            )
        } else {
            let port = thread.settings.tunnel_port;
            let to = node_addresses
                .iter()
                .map(|ip| SocketAddr::new(*ip, port))
                .collect();
            (to, None)
        };
        let Some(first) = to.first() else {
            let node = callee.node.as_deref().unwrap_or("unknown");
            return Err(Refusal::new(
                Reason::TunnelFailed,
                format!("node {node} has no address (mesh version {})", mesh.version),
            ));
        };
        let key = Key {
            source: caller.identity.clone(),
            destination: callee.identity.clone(),
            to: *first,
            from: from.as_ref().map(|pod| PodUid::clone(pod.sockets.uid())),
        };
        Ok(Self { key, to, from })
    }
}

/// A stream that CONNECT was sent on.
pub(in crate::proxy) struct Stream {
    pub(in crate::proxy) response: ResponseFuture,
    pub(in crate::proxy) send: SendStream<Bytes>,
    pub(in crate::proxy) tunnel: Rc<dyn Counted>,
    pub(in crate::proxy) remote: SocketAddr,
}

/// The tunnels of one thread.
#[derive(Default)]
pub(in crate::proxy) struct Pool {
    peers: RefCell<HashMap<Key, Peer>>,
}

#[derive(Default)]
struct Peer {
    tunnels: Vec<Rc<Tunnel>>,
    /// Somebody is opening one; `true` or an error comes when it is done.
    opening: Option<Opening>,
}

type Opening = watch::Receiver<Option<Result<(), Failure>>>;

/// Why no tunnel could be opened; many may wait for one attempt.
#[derive(Clone, Debug)]
struct Failure {
    reason: Reason,
    detail: Arc<str>,
}

/// One open tunnel.
struct Tunnel {
    key: Key,
    remote: SocketAddr,
    opened: Instant,
    /// Taken away when the tunnel retires: it ends with its last stream then.
    sender: RefCell<Option<SendRequest<Bytes>>>,
    streams: Cell<usize>,
    idle_since: Cell<Instant>,
    moved: Cell<u64>,
    config: Arc<ClientConfig>,
    /// The end of the peer's certificate.
    until: SystemTime,
    looked: Cell<Instant>,
    moved_when_looked: Cell<u64>,
    bulk: Cell<bool>,
    windows: Windows,
    /// Of whoever drives it.
    waker: RefCell<Option<Waker>>,
}

/// One stream of a tunnel, counted until it is dropped.
struct StreamCount(Rc<Tunnel>);

impl StreamCount {
    fn new(tunnel: &Rc<Tunnel>) -> Rc<Self> {
        tunnel.streams.set(tunnel.streams.get() + 1);
        Rc::new(Self(Rc::clone(tunnel)))
    }
}

impl Counted for StreamCount {
    fn moved(&self, bytes: usize) {
        self.0.moved.set(self.0.moved.get() + bytes as u64);
    }

    fn squeeze(&self, share: &Arc<Share>) {
        if self.0.windows.squeeze(share) {
            self.0.wake();
        }
    }
}

impl Drop for StreamCount {
    fn drop(&mut self) {
        self.0.streams.set(self.0.streams.get() - 1);
        self.0.idle_since.set(Instant::now());
    }
}

impl Pool {
    /// A new stream to `target` for `client`, by a tunnel that is there or by a new one.
    pub(in crate::proxy) async fn open(
        &self,
        thread: &Rc<Thread>,
        route: Route,
        client: SocketAddr,
        target: SocketAddr,
    ) -> Result<Stream, Refusal> {
        // A tunnel that was just opened may be full of others before our turn comes.
        for _ in 0..8 {
            if let Some(stream) = self.stream(thread, &route, client, target) {
                return Ok(stream);
            }
            self.one_more(thread, &route)
                .await
                .map_err(|failure| Refusal::new(failure.reason, failure.detail.as_ref()))?;
        }
        Err(Refusal::new(
            Reason::TunnelFailed,
            "every new tunnel was full at once",
        ))
    }

    /// A stream by a tunnel that is there; opens another in the background if all are busy.
    fn stream(
        &self,
        thread: &Rc<Thread>,
        route: &Route,
        client: SocketAddr,
        target: SocketAddr,
    ) -> Option<Stream> {
        let tunnel = {
            let mut peers = self.peers.borrow_mut();
            let peer = peers.get_mut(&route.key)?;
            peer.tunnels.retain(|tunnel| tunnel.usable(thread));
            let best = peer
                .tunnels
                .iter()
                .filter(|tunnel| tunnel.has_room())
                .min_by_key(|tunnel| (tunnel.bulk.get(), tunnel.streams.get()))?;
            let best = Rc::clone(best);
            if best.bulk.get() && peer.tunnels.len() < MOST_FOR_BULK {
                peer.opening(thread, route);
            }
            best
        };
        tunnel.connect(client, target)
    }

    /// Opens a tunnel, or waits for somebody who does.
    async fn one_more(&self, thread: &Rc<Thread>, route: &Route) -> Result<(), Failure> {
        let mut opening = {
            let mut peers = self.peers.borrow_mut();
            let peer = peers.entry(route.key.clone()).or_default();
            peer.opening(thread, route).clone()
        };
        let gone = || Failure {
            reason: Reason::TunnelFailed,
            detail: "the agent ends".into(),
        };
        let result = opening
            .wait_for(Option::is_some)
            .await
            .map_err(|_| gone())?;
        result.clone().unwrap_or_else(|| Err(gone()))
    }

    fn opened(&self, key: &Key, tunnel: Option<Rc<Tunnel>>) {
        let mut peers = self.peers.borrow_mut();
        let peer = peers.entry(key.clone()).or_default();
        peer.opening = None;
        match tunnel {
            Some(tunnel) => peer.tunnels.push(tunnel),
            None if peer.tunnels.is_empty() => drop(peers.remove(key)),
            None => {}
        }
    }

    fn forget(&self, tunnel: &Rc<Tunnel>) {
        let mut peers = self.peers.borrow_mut();
        if let Some(peer) = peers.get_mut(&tunnel.key) {
            peer.tunnels.retain(|other| !Rc::ptr_eq(other, tunnel));
            if peer.tunnels.is_empty() && peer.opening.is_none() {
                peers.remove(&tunnel.key);
            }
        }
    }

    /// Retires tunnels that nobody uses and those whose certificate was replaced.
    pub(in crate::proxy) fn tidy(&self, thread: &Thread) {
        for peer in self.peers.borrow_mut().values_mut() {
            peer.tunnels.retain(|tunnel| {
                let idle = tunnel.streams.get() == 0
                    && tunnel.idle_since.get().elapsed() > thread.settings.timing.tunnel_idle;
                if idle {
                    tunnel.retire();
                }
                if tunnel.windows.may_grow() {
                    tunnel.wake();
                }
                !idle && tunnel.usable(thread)
            });
        }
    }

    pub(in crate::proxy) fn status(&self) -> Vec<TunnelStatus> {
        let peers = self.peers.borrow();
        peers
            .values()
            .flat_map(|peer| &peer.tunnels)
            .map(|tunnel| tunnel.status())
            .collect()
    }
}

impl Peer {
    /// Another tunnel: the attempt that is under way, or a new one.
    fn opening(&mut self, thread: &Rc<Thread>, route: &Route) -> &Opening {
        self.opening.get_or_insert_with(|| {
            let (done, opening) = watch::channel(None);
            // A task of its own: whoever asked first may go away meanwhile.
            let attempt = Attempt {
                key: route.key.clone(),
                to: route.to.clone(),
                from: route.from.clone(),
            };
            spawn_local(attempt.run(Rc::clone(thread), done));
            opening
        })
    }
}

impl Tunnel {
    /// May it take new streams? Looks at its certificate now and then.
    fn usable(&self, thread: &Thread) -> bool {
        if self.sender.borrow().is_none() {
            return false;
        }
        let since = self.looked.get().elapsed();
        if since < LOOK {
            return true;
        }
        let moved = self.moved.get();
        let rate = (moved - self.moved_when_looked.get()) as f64 / since.as_secs_f64();
        self.bulk.set(rate > thread.settings.bulk as f64);
        self.moved_when_looked.set(moved);
        self.looked.set(Instant::now());
        let current = thread
            .identities
            .client_config(&self.key.source, &self.key.destination);
        if SystemTime::now() >= self.until {
            self.retire();
            return false;
        }
        // Without a new certificate the old one goes on: what worked goes on working.
        if current.is_ok_and(|config| !Arc::ptr_eq(&config, &self.config)) {
            self.retire();
            return false;
        }
        true
    }

    fn has_room(&self) -> bool {
        let allowed = self
            .sender
            .borrow()
            .as_ref()
            .map_or(0, |sender| sender.current_max_send_streams());
        self.streams.get() < allowed.min(hbone::STREAMS as usize)
    }

    /// Whoever drives the tunnel has something to do.
    fn wake(&self) {
        if let Some(waker) = &*self.waker.borrow() {
            waker.wake_by_ref();
        }
    }

    fn retire(&self) {
        self.sender.borrow_mut().take();
    }

    /// `None`: the tunnel takes no new streams.
    fn connect(self: &Rc<Self>, client: SocketAddr, target: SocketAddr) -> Option<Stream> {
        let mut sender = self.sender.borrow().clone()?;
        let sent = hbone::connect(client, target)
            .and_then(|request| sender.send_request(request, false).ok());
        let Some((response, send)) = sent else {
            // The peer said goodbye, or the tunnel is dying.
            self.retire();
            return None;
        };
        Some(Stream {
            response,
            send,
            tunnel: StreamCount::new(self),
            remote: self.remote,
        })
    }

    fn status(&self) -> TunnelStatus {
        TunnelStatus {
            role: "client",
            source: self.key.source.to_string(),
            destination: self.key.destination.to_string(),
            remote: self.remote,
            streams: self.streams.get(),
            bytes: self.moved.get(),
            seconds: self.opened.elapsed().as_secs(),
            retiring: self.sender.borrow().is_none(),
        }
    }
}

/// Opening one tunnel.
struct Attempt {
    key: Key,
    to: Vec<SocketAddr>,
    from: Option<Rc<Pod>>,
}

type Tls = Guard<TlsStream<Wire>>;

impl Attempt {
    async fn run(self, thread: Rc<Thread>, done: watch::Sender<Option<Result<(), Failure>>>) {
        match self.open(&thread).await {
            Ok((tunnel, connection, cut)) => {
                thread.recorder.handshake(false, "ok");
                thread.recorder.tunnels(1);
                if thread.shared.troubles.ends(self.key.way()) {
                    tracing::info!(source = %self.key.source, destination = %self.key.destination,
                        to = %self.key.to, "tunnels can be opened again");
                }
                thread.pool.opened(&self.key, Some(Rc::clone(&tunnel)));
                done.send_replace(Some(Ok(())));
                drop(done);
                let ended = drive(connection, &tunnel, thread.settings.timing.ping).await;
                if let Some(reason) = ended.and_then(|error| flood::verdict(&cut, &error)) {
                    thread.recorder.tunnel_cut(reason.word());
                    tracing::warn!(remote = %tunnel.remote, reason = reason.word(),
                        "cut a tunnel whose peer asks too much");
                }
                // Streams that are still open were reset with it; they see an error, never an end.
                tunnel.retire();
                thread.pool.forget(&tunnel);
                thread.recorder.tunnels(-1);
            }
            Err(failure) => {
                // Whoever connects to a node that is away tries: a line for each would bury the
                // log. Their own lines in the access log say why they failed.
                if thread
                    .shared
                    .troubles
                    .begins(self.key.way(), failure.reason)
                {
                    tracing::warn!(
                        source = %self.key.source, destination = %self.key.destination,
                        to = %self.key.to, reason = failure.reason.word(),
                        detail = %failure.detail, "no tunnel; said again when this changes"
                    );
                } else {
                    tracing::debug!(
                        source = %self.key.source, destination = %self.key.destination,
                        to = %self.key.to, reason = failure.reason.word(),
                        detail = %failure.detail, "no tunnel"
                    );
                }
                thread.recorder.handshake(false, failure.reason.word());
                thread.pool.opened(&self.key, None);
                done.send_replace(Some(Err(failure)));
            }
        }
    }

    async fn open(
        &self,
        thread: &Rc<Thread>,
    ) -> Result<(Rc<Tunnel>, Connection<Tls, Bytes>, Cut), Failure> {
        let config = thread
            .identities
            .client_config(&self.key.source, &self.key.destination)
            .map_err(|error| Failure {
                reason: Reason::NoCertificate,
                detail: error.to_string().into(),
            })?;
        let mut last: Option<Failure> = None;
        for remote in &self.to {
            match self.open_to(thread, *remote, &config).await {
                Ok((sender, connection, until, cut)) => {
                    let now = Instant::now();
                    let tunnel = Rc::new(Tunnel {
                        key: self.key.clone(),
                        remote: *remote,
                        opened: now,
                        sender: RefCell::new(Some(sender)),
                        streams: Cell::new(0),
                        idle_since: Cell::new(now),
                        moved: Cell::new(0),
                        config,
                        until,
                        looked: Cell::new(now),
                        moved_when_looked: Cell::new(0),
                        bulk: Cell::new(false),
                        windows: Windows::default(),
                        waker: RefCell::new(None),
                    });
                    return Ok((tunnel, connection, cut));
                }
                // That nobody is at one address must not hide an impostor at another.
                Err(failure) => {
                    if !matches!(&last, Some(worse) if worse.reason == Reason::TunnelIdentity) {
                        last = Some(failure);
                    }
                }
            }
        }
        Err(last.unwrap_or(Failure {
            reason: Reason::TunnelFailed,
            detail: "the node has no address".into(),
        }))
    }

    async fn open_to(
        &self,
        thread: &Rc<Thread>,
        remote: SocketAddr,
        config: &Arc<ClientConfig>,
    ) -> Result<(SendRequest<Bytes>, Connection<Tls, Bytes>, SystemTime, Cut), Failure> {
        let timing = &thread.settings.timing;
        let fail = |reason: Reason, detail: String| Failure {
            reason,
            detail: detail.into(),
        };
        let tcp = match &self.from {
            Some(pod) => {
                let make = || pod.sockets.socket(remote, Source::Own);
                tcp::connect(remote, timing.connect, make).await
            }
            None => {
                let source = thread.settings.tunnel_source;
                let make = || tcp::node_socket(remote, source);
                tcp::connect(remote, timing.connect, make).await
            }
        }
        .map_err(|error| fail(Reason::TunnelFailed, error.to_string()))?;
        // TLS has its own way to say goodbye; an RST could overtake it.
        let _best_effort = socket2::SockRef::from(&tcp).set_linger(None);

        let name = identity::server_name(&self.key.destination);
        let handshake = TlsConnector::from(Arc::clone(config)).connect(name, Wire::new(tcp));
        let mut tls = match timeout(timing.handshake, handshake).await {
            Ok(Ok(tls)) => tls,
            Ok(Err(error)) => {
                let sentence = identity::handshake_sentence(&error);
                return Err(fail(
                    handshake_reason(&error),
                    format!("{remote}: {sentence}"),
                ));
            }
            Err(_) => {
                let waited = timing.handshake.as_millis();
                let detail = format!("{remote}: no TLS handshake in {waited} ms");
                return Err(fail(Reason::TunnelFailed, detail));
            }
        };
        let (wire, session) = tls.get_mut();
        wire.peer_is_known();
        session.set_buffer_limit(Some(UNSENT));
        if session
            .alpn_protocol()
            .is_some_and(|protocol| protocol != b"h2")
        {
            return Err(fail(
                Reason::TunnelFailed,
                format!("{remote} does not speak h2"),
            ));
        }
        // It was verified a moment ago, so it is there and can be read.
        let leaf = session.peer_certificates().and_then(|chain| chain.first());
        let until = leaf
            .and_then(|leaf| identity::peer(leaf).ok())
            .map(|peer| peer.until)
            .ok_or_else(|| {
                fail(
                    Reason::TunnelIdentity,
                    format!("{remote} has no certificate"),
                )
            })?;
        let (guarded, cut) = Guard::client(tls, timing.handshake);
        let (sender, connection) = hbone::client()
            .handshake(guarded)
            .await
            .map_err(|error| fail(Reason::TunnelFailed, format!("{remote}: {error}")))?;
        Ok((sender, connection, until, cut))
    }
}

/// Is the peer the wrong one, or is it the wire?
fn handshake_reason(error: &std::io::Error) -> Reason {
    let tls = error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<rustls::Error>());
    match tls {
        Some(rustls::Error::InvalidCertificate(_)) => Reason::TunnelIdentity,
        _ => Reason::TunnelFailed,
    }
}

/// Runs the tunnel until it ends, and ends it when its peer has gone silent; an error that ended it
/// is handed back.
async fn drive(
    mut connection: Connection<Tls, Bytes>,
    tunnel: &Tunnel,
    every: Duration,
) -> Option<h2::Error> {
    let mut ping_pong = connection.ping_pong();
    let mut ticks = pin!(async_ticks(every));
    let mut waiting = false;
    let ended = std::future::poll_fn(|cx| {
        tunnel
            .windows
            .change(|size| connection.set_initial_window_size(size));
        if let Poll::Ready(result) = Pin::new(&mut connection).poll(cx) {
            return Poll::Ready(result.err());
        }
        let mut waker = tunnel.waker.borrow_mut();
        if !waker
            .as_ref()
            .is_some_and(|waker| waker.will_wake(cx.waker()))
        {
            *waker = Some(cx.waker().clone());
        }
        if let Some(ping_pong) = &mut ping_pong {
            if waiting && ping_pong.poll_pong(cx).is_ready() {
                waiting = false;
            }
            if ticks.as_mut().poll_tick(cx).is_ready() {
                if waiting {
                    tracing::warn!(remote = %tunnel.remote, "a tunnel's peer went silent");
                    return Poll::Ready(None);
                }
                if tunnel.streams.get() > 0 && ping_pong.send_ping(Ping::opaque()).is_ok() {
                    waiting = true;
                    // The answer's waker is registered, and the ping flushed, by one more turn.
                    cx.waker().wake_by_ref();
                }
            }
        }
        Poll::Pending
    })
    .await;
    if let Some(error) = &ended {
        tracing::debug!(remote = %tunnel.remote, %error, "a tunnel ended");
    }
    ended
}

fn async_ticks(every: Duration) -> tokio::time::Interval {
    let mut ticks = tokio::time::interval_at(tokio::time::Instant::now() + every, every);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    ticks
}

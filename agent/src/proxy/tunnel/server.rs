//! Tunnels that others open: to the node's port for any pod here, or to a pod's own address.
//!
//! The server is a confused deputy unless told otherwise, so it believes four things only: the
//! identity in the client's certificate, the identity that SNI asked for (we hold its key), the
//! address that the TCP connection comes from, and our own mesh. A target must be a meshed pod of
//! this node of exactly the identity asked for. The client's address that a request claims must
//! belong to a pod of the client's identity on the node that the tunnel comes from.

use std::{
    cell::{Cell, RefCell},
    future::poll_fn,
    io,
    net::{IpAddr, SocketAddr},
    rc::Rc,
    sync::Arc,
    task::{Poll, Waker},
    time::{Duration, Instant, SystemTime},
};

use bytes::Bytes;
use h2::{RecvStream, server::SendResponse};
use http::{HeaderValue, Request, Response, StatusCode};
use rustls::{CertificateError, ServerConfig, server::Acceptor};
use tokio::{
    net::TcpStream,
    task::spawn_local,
    time::{timeout, timeout_at},
};
use tokio_rustls::{LazyConfigAcceptor, StartHandshake, server::TlsStream};

use super::{
    TunnelStatus,
    flood::{self, Cut},
    hbone::{self, Accepted, Windows},
    peers::{Peer, Seat},
    wire::{UNSENT, Wire},
};
use crate::{
    datapath::Source,
    identity,
    metrics::{Direction, FlowInfo, TlsStatus},
    proxy::{
        authz,
        conns::{Callee, Conn},
        copy::{Counted, Meter, Receive, Shared, StreamPump, Toward, Turns},
        limits::{Permit, Share as PodShare, Way},
        reason::{HEADER, Reason},
        report::{Refusal, Report},
        tcp::{self, TcpEnd},
        threads::{Pod, Thread, canonical},
    },
    state::{
        Identity, Mesh, Workload,
        policy::{Client, ClientIdentity},
    },
};

/// Where a tunnel came in.
pub(in crate::proxy) enum Port {
    /// The node's tunnel port: for any pod of this node.
    Node,
    /// A pod's own address: for that pod alone.
    Pod(Rc<Pod>),
}

/// One tunnel that somebody opened to us.
pub(super) struct ServerTunnel {
    /// Proven by the client's certificate, as long as that lasts.
    client: Identity,
    until: SystemTime,
    /// What SNI asked for; we showed its certificate.
    server: Identity,
    /// Where the tunnel comes from, and where it came in.
    remote: SocketAddr,
    local: SocketAddr,
    /// Only this pod may be called.
    pod: Option<Rc<Pod>>,
    opened: Instant,
    streams: Cell<usize>,
    idle_since: Cell<Instant>,
    moved: Cell<u64>,
    windows: Windows,
    goodbye: Cell<Option<Instant>>,
    /// The peer did not answer the goodbye.
    abandoned: Cell<bool>,
    waker: RefCell<Option<Waker>>,
    /// Among its peer's tunnels.
    _seat: Seat,
}

impl ServerTunnel {
    pub(super) fn say_goodbye(&self) {
        if self.goodbye.get().is_none() {
            self.goodbye.set(Some(Instant::now()));
            self.wake();
        }
    }

    /// See [`super::Tunnels::tidy`].
    pub(super) fn tidy(&self, idle: Duration, patience: Duration) {
        let unused = self.streams.get() == 0;
        match self.goodbye.get() {
            None if self.expired() || (unused && self.idle_since.get().elapsed() > idle) => {
                self.say_goodbye();
            }
            Some(said) if unused && said.max(self.idle_since.get()).elapsed() > patience => {
                self.abandoned.set(true);
                self.wake();
            }
            None | Some(_) => {}
        }
        if self.windows.may_grow() {
            self.wake();
        }
    }

    /// The client's certificate is over: what it proved counts for nothing new.
    fn expired(&self) -> bool {
        SystemTime::now() >= self.until
    }

    /// Whoever drives the tunnel has something to do.
    fn wake(&self) {
        if let Some(waker) = &*self.waker.borrow() {
            waker.wake_by_ref();
        }
    }

    pub(super) fn status(&self) -> TunnelStatus {
        TunnelStatus {
            role: "server",
            source: self.client.to_string(),
            destination: self.server.to_string(),
            remote: self.remote,
            streams: self.streams.get(),
            bytes: self.moved.get(),
            seconds: self.opened.elapsed().as_secs(),
            retiring: self.goodbye.get().is_some(),
        }
    }
}

/// One stream of a tunnel, counted until it is dropped.
struct StreamCount(Rc<ServerTunnel>);

impl Counted for StreamCount {
    fn moved(&self, bytes: usize) {
        self.0.moved.set(self.0.moved.get() + bytes as u64);
    }

    fn squeeze(&self, share: &Arc<PodShare>) {
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

/// A tunnel, from accept to its end.
pub(in crate::proxy) async fn serve(
    thread: Rc<Thread>,
    tcp: TcpStream,
    remote: SocketAddr,
    port: Port,
) {
    // TLS has its own way to say goodbye; an RST could overtake it. Pods' listeners hand down
    // SO_LINGER 0.
    let _best_effort = socket2::SockRef::from(&tcp).set_linger(None);
    let Ok(local) = tcp.local_addr().map(canonical) else {
        return;
    };
    let (connection, tunnel, cut) =
        match Box::pin(shake_hands(&thread, tcp, remote, local, port)).await {
            Ok(standing) => standing,
            Err(refusal) => {
                thread.recorder.handshake(true, refusal.reason.word());
                if thread.failure_words.take(Instant::now()) {
                    tracing::info!(%remote, reason = refusal.reason.word(), detail = refusal.detail,
                    "tunnel refused");
                }
                return Report::new(Direction::Inbound, remote, local).refused(&refusal, &thread);
            }
        };
    thread.recorder.handshake(true, "ok");
    thread.recorder.tunnels(1);
    thread.tunnels.add(&tunnel);
    let ended = run(&thread, &tunnel, connection).await;
    if let Some(reason) = ended.and_then(|error| flood::verdict(&cut, &error)) {
        thread.recorder.tunnel_cut(reason.word());
        tracing::warn!(%remote, client = %tunnel.client, reason = reason.word(),
            "cut a tunnel whose peer asks too much");
    }
    thread.tunnels.remove(&tunnel);
    thread.recorder.tunnels(-1);
}

type Connection = Accepted<TlsStream<Wire>>;

/// From a stranger's first byte to a peer with a name, within bounds.
async fn shake_hands(
    thread: &Rc<Thread>,
    tcp: TcpStream,
    remote: SocketAddr,
    local: SocketAddr,
    port: Port,
) -> Result<(Connection, Rc<ServerTunnel>, Cut), Refusal> {
    let node = thread
        .mesh
        .load()
        .node_of_address
        .contains_key(&remote.ip());
    let mut place = thread
        .shared
        .admission
        .enter(remote.ip(), node, Instant::now())
        .ok_or(Reason::HandshakeRate)?;
    let deadline = tokio::time::Instant::now() + thread.settings.timing.handshake;
    let handshake = timeout_at(deadline, async {
        let hello = LazyConfigAcceptor::new(Acceptor::default(), Wire::new(tcp))
            .await
            .map_err(|error| handshake_failed(&error))?;
        // On the heap from here: who says nothing costs little.
        let (tls, server) = Box::pin(accept_tls(thread, hello, &port)).await?;
        let client = client(&tls)?;
        let peer = Peer::of(&thread.mesh.load(), remote.ip());
        let seat = thread.shared.peers.enter(peer)?;
        let accepted = hbone::accept(tls, thread.settings.timing.handshake);
        let (connection, cut) = Box::pin(accepted)
            .await
            .map_err(|error| Refusal::new(Reason::HandshakeFailed, error.to_string()))?;
        Ok::<_, Refusal>((connection, cut, client, server, seat))
    });
    let (connection, cut, client, server, seat) = tokio::select! {
        done = handshake => match done {
            Ok(done) => done?,
            Err(_) => return Err(Reason::HandshakeTimeout.into()),
        },
        () = place.evicted() => return Err(Reason::HandshakeEvicted.into()),
    };
    let pod = match port {
        Port::Node => None,
        Port::Pod(pod) => Some(pod),
    };
    let now = Instant::now();
    let tunnel = Rc::new(ServerTunnel {
        client: client.identity,
        until: client.until,
        server,
        remote,
        local,
        pod,
        opened: now,
        streams: Cell::new(0),
        idle_since: Cell::new(now),
        moved: Cell::new(0),
        windows: Windows::default(),
        goodbye: Cell::new(None),
        abandoned: Cell::new(false),
        waker: RefCell::new(None),
        _seat: seat,
    });
    Ok((connection, tunnel, cut))
}

/// TLS, as the identity that SNI asks for, or as the pod whose address it is.
async fn accept_tls(
    thread: &Thread,
    hello: StartHandshake<Wire>,
    port: &Port,
) -> Result<(TlsStream<Wire>, Identity), Refusal> {
    let (identity, config): (Identity, Arc<ServerConfig>) = match port {
        Port::Node => {
            let asked = hello.client_hello();
            let name = asked.server_name();
            let identity = name
                .and_then(|name| thread.identities.by_server_name(name))
                .ok_or_else(|| {
                    let name = name.unwrap_or("none");
                    Refusal::new(
                        Reason::UnknownServerName,
                        format!("server name {name:?} is no identity of this node"),
                    )
                })?;
            (identity, thread.identities.server_config())
        }
        Port::Pod(pod) => {
            let mesh = thread.mesh.load();
            let workload = mesh
                .workloads
                .get(pod.sockets.uid())
                .ok_or(Reason::UnknownPod)?;
            let identity = workload.identity.clone();
            let config = thread
                .identities
                .server_config_for(&identity)
                .map_err(|error| Refusal::new(Reason::NoCertificate, error.to_string()))?;
            (identity, config)
        }
    };
    let mut tls = hello
        .into_stream(config)
        .await
        .map_err(|error| handshake_failed(&error))?;
    let (wire, session) = tls.get_mut();
    wire.peer_is_known();
    session.set_buffer_limit(Some(UNSENT));
    Ok((tls, identity))
}

fn client(tls: &TlsStream<Wire>) -> Result<identity::Peer, Refusal> {
    let leaf = tls
        .get_ref()
        .1
        .peer_certificates()
        .and_then(|chain| chain.first())
        .ok_or(Reason::CertificateMissing)?;
    identity::peer(leaf)
        .map_err(|error| Refusal::new(Reason::CertificateInvalid, error.to_string()))
}

/// Which word a failed handshake gets.
#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "rustls' enum is non-exhaustive; everything unnamed is one word"
)]
fn handshake_failed(error: &io::Error) -> Refusal {
    let tls = error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<rustls::Error>());
    let reason = match tls {
        Some(rustls::Error::NoCertificatesPresented) => Reason::CertificateMissing,
        Some(rustls::Error::InvalidCertificate(why)) => match why {
            CertificateError::Expired
            | CertificateError::ExpiredContext { .. }
            | CertificateError::NotValidYet
            | CertificateError::NotValidYetContext { .. } => Reason::CertificateExpired,
            CertificateError::UnknownIssuer | CertificateError::BadSignature => {
                Reason::CertificateUnknownIssuer
            }
            _ => Reason::CertificateInvalid,
        },
        _ => Reason::HandshakeFailed,
    };
    Refusal::new(reason, identity::handshake_sentence(error))
}

/// Accepts streams until the tunnel ends; an error that ended it is handed back.
async fn run(
    thread: &Rc<Thread>,
    tunnel: &Rc<ServerTunnel>,
    mut connection: Connection,
) -> Option<h2::Error> {
    let mut said = false;
    loop {
        let next = poll_fn(|cx| {
            if tunnel.abandoned.get() {
                return Poll::Ready(None);
            }
            tunnel
                .windows
                .change(|size| connection.set_initial_window_size(size));
            if tunnel.goodbye.get().is_some() && !said {
                // The peer opens no new streams; those that are open finish.
                connection.graceful_shutdown();
                said = true;
            }
            let next = connection.poll_accept(cx);
            if next.is_pending() {
                let mut waker = tunnel.waker.borrow_mut();
                if !waker
                    .as_ref()
                    .is_some_and(|waker| waker.will_wake(cx.waker()))
                {
                    *waker = Some(cx.waker().clone());
                }
            }
            next
        })
        .await;
        match next {
            Some(Ok((request, respond))) => {
                tunnel.streams.set(tunnel.streams.get() + 1);
                let count = StreamCount(Rc::clone(tunnel));
                spawn_local(serve_stream(Rc::clone(thread), count, request, respond));
            }
            Some(Err(error)) => {
                tracing::debug!(remote = %tunnel.remote, %error, "a tunnel ended");
                return Some(error);
            }
            None => return None,
        }
    }
}

/// A stream that can begin.
struct Standing {
    socket: TcpStream,
    meter: Meter,
    conn: Rc<Conn>,
    permit: Permit,
    turns: Rc<Turns>,
}

/// One connection, from CONNECT to its record.
async fn serve_stream(
    thread: Rc<Thread>,
    count: StreamCount,
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
) {
    let tunnel = Rc::clone(&count.0);
    let mut report = Report::new(Direction::Inbound, tunnel.remote, tunnel.local);
    let established = tokio::select! {
        biased;
        established = Box::pin(establish(&thread, &tunnel, &request, &mut report)) => established,
        // Whoever has hung up is waited for no longer, nor keeps a place among those who wait.
        _reset = poll_fn(|cx| respond.poll_reset(cx)) => Err(Reason::ClientReset.into()),
    };
    match established {
        Err(refusal) => {
            refuse(&mut respond, refusal.reason);
            report.refused(&refusal, &thread);
        }
        Ok(Standing {
            socket,
            meter,
            conn,
            permit,
            turns,
        }) => {
            let shared = Shared::new(&thread, &turns, permit, conn, meter);
            // An error means that the stream is reset already: dropping the socket says so.
            let Ok(send) = respond.send_response(Response::new(()), false) else {
                let end = crate::proxy::copy::End::Broken(Reason::ClientReset);
                return report.ended(end, shared.meter, &thread);
            };
            let receive = Receive::Open(request.into_body());
            let end = TcpEnd::new(socket);
            let pump = StreamPump::new(end, send, receive, Toward::Client, Rc::new(count), shared);
            let (end, meter) = pump.run().await;
            report.ended(end, meter, &thread);
        }
    }
}

fn refuse(respond: &mut SendResponse<Bytes>, reason: Reason) {
    let mut response = Response::new(());
    *response.status_mut() = reason.status();
    debug_assert_ne!(response.status(), StatusCode::OK);
    response
        .headers_mut()
        .insert(HEADER, HeaderValue::from_static(reason.word()));
    // The stream may be reset already: nobody waits for the answer then.
    let _gone = respond.send_response(response, true);
}

/// Whom may the client call, as whom, and may it: then the socket.
async fn establish(
    thread: &Rc<Thread>,
    tunnel: &Rc<ServerTunnel>,
    request: &Request<RecvStream>,
    report: &mut Report,
) -> Result<Standing, Refusal> {
    report.record.src_identity = Some(tunnel.client.clone());
    let target = hbone::target(request)?;
    report.record.dst_hbone_addr = Some(target);
    if tunnel.expired() {
        return Err(Refusal::new(
            Reason::CertificateExpired,
            "the certificate that the tunnel was opened with is over",
        ));
    }
    let mut mesh = thread.mesh();
    let mut callee = called(thread, tunnel, &mesh, target)?;
    report.record.dst_workload = Some(Arc::clone(&callee));
    report.record.dst_identity = Some(callee.identity.clone());

    let (client_addr, caller) = match &tunnel.pod {
        // ztunnel's way: the TCP connection itself comes from the client.
        Some(_) => {
            let known = mesh.by_ip.get(&tunnel.remote.ip()).cloned();
            (SocketAddr::new(tunnel.remote.ip(), 0), known)
        }
        None => {
            let claimed = hbone::claimed_client(request.headers())?.ok_or_else(|| {
                Refusal::new(
                    Reason::BadRequest,
                    "the request names no client (forwarded: for=…)",
                )
            })?;
            if !mesh.by_ip.contains_key(&claimed.ip()) {
                mesh = Box::pin(news_of(thread, claimed.ip())).await;
                // Policy may have come with the news, and the pod that is called may have gone.
                callee = called(thread, tunnel, &mesh, target)?;
            }
            let caller = claimed_source(&mesh, tunnel, claimed.ip())?;
            (claimed, Some(caller))
        }
    };
    report.record.src_addr = client_addr;
    report.record.src_workload = caller.clone();

    let client = Client {
        ip: client_addr.ip(),
        // At a pod's own port the address is the peer's and not yet held against its identity.
        pod: caller
            .as_ref()
            .filter(|pod| pod.identity == tunnel.client)
            .map(|pod| pod.uid.clone()),
        identity: ClientIdentity::Proven(tunnel.client.clone()),
    };
    let mut info = FlowInfo {
        direction: Direction::Inbound,
        workload: Arc::clone(&callee),
        peer: caller,
        client_id: Some(tunnel.client.clone()),
        server_id: Some(callee.identity.clone()),
        target,
        endpoint: target,
        service: None,
        tls: TlsStatus::True,
        server: None,
        authz: None,
    };
    match authz::decide(&mesh, &callee, &client, target.port()) {
        Ok(allowed) => {
            info.server = allowed.server;
            info.authz = allowed.authz;
            thread.recorder.authz(&info, true);
            if allowed.audited {
                tracing::info!(client = %tunnel.client, callee = %callee.key,
                    "audit: policy would deny this connection");
            }
        }
        Err(denied) => {
            info.server = denied.server;
            thread.recorder.authz(&info, false);
            return Err(denied.refusal);
        }
    }

    // Last: who may not come in uses up nothing of the pod's.
    let pod = thread.pod(&callee.uid);
    let share = match &pod {
        Some(pod) => Arc::clone(&pod.share),
        None => thread.shared.limits.share(&callee.uid),
    };
    let mut permit = share
        .admit(Way::Tunnelled, Instant::now())
        .map_err(|over| share.refuse(Way::Tunnelled, over))?;
    let patience = thread.settings.timing.connect;
    let socket = match &pod {
        Some(pod) => {
            let source = Source::Keep {
                client: client_addr,
            };
            tcp::connect(target, patience, || pod.sockets.socket(target, source)).await
        }
        // Meshed and not captured (yet, or any more): a socket of the node reaches it plainly.
        None => tcp::connect(target, patience, || tcp::node_socket(target, None)).await,
    }
    .map_err(|error| Refusal::new(error.reason(), error.to_string()))?;
    permit.established();
    let guarded = Callee {
        uid: callee.uid.clone(),
        client,
        port: target.port(),
    };
    Ok(Standing {
        socket,
        meter: Meter {
            outbound: None,
            inbound: Some(thread.recorder.open(&info)),
            sent: 0,
            received: 0,
        },
        conn: thread.register(&mesh, None, Some(guarded)),
        permit,
        turns: pod.map_or_else(Rc::default, |pod| Rc::clone(&pod.turns)),
    })
}

/// The pod that may be called by this tunnel at this address.
fn called(
    thread: &Thread,
    tunnel: &ServerTunnel,
    mesh: &Mesh,
    target: SocketAddr,
) -> Result<Arc<Workload>, Refusal> {
    let ip = target.ip();
    if never_a_pod(ip) || mesh.node_of_address.contains_key(&ip) {
        return Err(Refusal::new(
            Reason::BadTarget,
            format!("{target} is no pod's address"),
        ));
    }
    let Some(workload) = mesh.by_ip.get(&ip).filter(|workload| workload.local) else {
        return Err(Refusal::new(
            Reason::NotLocal,
            format!("{ip} is no pod of this node"),
        ));
    };
    if workload.host_network {
        return Err(Refusal::new(
            Reason::BadTarget,
            format!("{ip} is the node's address"),
        ));
    }
    if !workload.meshed && !thread.left_lately(&workload.uid) {
        return Err(Refusal::new(
            Reason::NotMeshed,
            format!("{} is not meshed", workload.key),
        ));
    }
    let other_pod = tunnel
        .pod
        .as_ref()
        .is_some_and(|pod| *pod.sockets.uid() != workload.uid);
    if workload.identity != tunnel.server || other_pod {
        return Err(Refusal::new(
            Reason::WrongIdentity,
            format!(
                "{} is {}, the tunnel is for {}",
                workload.key, workload.identity, tunnel.server
            ),
        ));
    }
    Ok(Arc::clone(workload))
}

/// Addresses that no pod has, whatever anybody's manifests say.
fn never_a_pod(ip: IpAddr) -> bool {
    let link_local = match ip {
        IpAddr::V4(ip) => ip.is_link_local() || ip.is_broadcast(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    ip.is_loopback() || ip.is_unspecified() || ip.is_multicast() || link_local
}

/// A pod may be so new that its node knows it before we do. Who names such pods without end is not
/// waited for.
async fn news_of(thread: &Thread, ip: IpAddr) -> Arc<Mesh> {
    let Ok(_waiting) = thread.unknown_sources.try_acquire() else {
        return thread.mesh();
    };
    let mut changed = thread.mesh.subscribe();
    let known = async {
        while !thread.mesh.load().by_ip.contains_key(&ip) {
            if changed.changed().await.is_err() {
                return;
            }
        }
    };
    // Whether it came or not, what we know now decides.
    let _in_time = timeout(thread.settings.timing.unknown_source, known).await;
    thread.mesh()
}

/// The pod that a tunnel claims to speak for, if it may.
fn claimed_source(
    mesh: &Mesh,
    tunnel: &ServerTunnel,
    claimed: IpAddr,
) -> Result<Arc<Workload>, Refusal> {
    let refuse = |why: String| Err(Refusal::new(Reason::ClaimedSource, why));
    let Some(workload) = mesh.by_ip.get(&claimed) else {
        return refuse(format!("{claimed} is no pod's address"));
    };
    if workload.identity != tunnel.client {
        return refuse(format!(
            "{claimed} is {} of {}, the tunnel is of {}",
            workload.key, workload.identity, tunnel.client
        ));
    }
    let from = mesh.node_of_address.get(&tunnel.remote.ip());
    if from.is_none() || from != workload.node.as_ref() {
        return refuse(format!(
            "{} runs on node {}, the tunnel comes from {}",
            workload.key,
            workload.node.as_deref().unwrap_or("unknown"),
            tunnel.remote.ip()
        ));
    }
    Ok(Arc::clone(workload))
}

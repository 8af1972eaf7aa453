//! Sockets inside a pod's network namespace.
//!
//! [`PodSockets`] is what the proxy sees: one call makes a socket that already is ours (mark and
//! storage, rule 3) and sits in the pod. It runs on data threads, so it does nothing but system
//! calls that cannot block. [`listeners`] makes what the programs lead captured connections to;
//! everything an accepted socket needs is set on the listener, because children inherit it.
//!
//! Knows neither what a connection is for nor who may have it.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
    os::fd::AsFd,
    sync::{
        Arc,
        atomic::{AtomicU16, AtomicUsize, Ordering},
    },
    time::Duration,
};

use nix::libc;
use parking_lot::Mutex;
use socket2::{Domain, Protocol, Socket, TcpKeepalive, Type};

use super::{
    PodListeners, diag,
    loader::SocketMarker,
    netlink::{self, Netlink},
    netns::NetNs,
};
use crate::state::PodUid;

/// Which address the application on the other side will see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The pod's own.
    Own,
    /// This client's address (IP_TRANSPARENT); its own port, which the socket must not take.
    Keep { client: SocketAddr },
}

/// Makes sockets in a pod's netns. A trait so that the proxy's tests need no kernel half.
pub trait PodSockets: Send + Sync + 'static {
    fn uid(&self) -> &PodUid;

    /// A non-blocking TCP socket with TCP_NODELAY, our mark and our storage, bound for `source`,
    /// ready to connect to `remote`. Callers that get EADDRNOTAVAIL from connect ask again: the
    /// next port of the range is tried (rule 7).
    fn socket(&self, remote: SocketAddr, source: Source) -> io::Result<Socket>;

    /// A connection from this address to the pod is open at the proxy: no socket of ours takes its
    /// port until [`PodSockets::release`].
    fn hold(&self, client: SocketAddr);
    fn release(&self, client: SocketAddr);

    /// Is there an application socket listening at `ip:port` in the pod? `None`: cannot tell.
    fn listens(&self, ip: IpAddr, port: u16) -> Option<bool>;
}

/// The real one: an open netns, a slot, a port counter.
pub struct PodHandle {
    uid: PodUid,
    slot: u32,
    netns: NetNs,
    owner: SocketOwner,
    ports: Ports,
}

/// What makes a socket ours.
#[derive(Clone)]
pub(super) struct SocketOwner {
    pub(super) mark: u32,
    pub(super) marker: Arc<SocketMarker>,
}

impl PodHandle {
    pub(super) fn new(uid: PodUid, slot: u32, netns: NetNs, owner: SocketOwner) -> Self {
        Self {
            uid,
            slot,
            netns,
            owner,
            ports: Ports::starting_at(fastrand::u16(PORT_RANGE)),
        }
    }

    pub(super) fn slot(&self) -> u32 {
        self.slot
    }

    pub(super) fn netns(&self) -> &NetNs {
        &self.netns
    }
}

impl PodSockets for PodHandle {
    fn uid(&self) -> &PodUid {
        &self.uid
    }

    fn socket(&self, remote: SocketAddr, source: Source) -> io::Result<Socket> {
        let socket = self.netns.enter(|| {
            Socket::new(
                Domain::for_address(remote),
                Type::STREAM.nonblocking().cloexec(),
                Some(Protocol::TCP),
            )
        })?;
        self.owner.claim(&socket)?;
        socket.set_tcp_nodelay(true)?;
        keep_alive(&socket)?;
        match source {
            Source::Own => {}
            Source::Keep { client } => self.ports.bind(&socket, canonical(client), remote)?,
        }
        Ok(socket)
    }

    fn hold(&self, client: SocketAddr) {
        self.ports.hold(canonical(client));
    }

    fn release(&self, client: SocketAddr) {
        self.ports.release(canonical(client));
    }

    fn listens(&self, ip: IpAddr, port: u16) -> Option<bool> {
        let mut diag = self
            .netns
            .enter(|| Netlink::open(netlink::SOCK_DIAG))
            .ok()?;
        diag::listens(&mut diag, ip, port, self.owner.mark).ok()
    }
}

impl SocketOwner {
    fn claim(&self, socket: &Socket) -> io::Result<()> {
        socket.set_mark(self.mark)?;
        self.marker.claim(socket.as_fd())
    }
}

fn canonical(at: SocketAddr) -> SocketAddr {
    SocketAddr::new(at.ip().to_canonical(), at.port())
}

// ---- ports (rule 7) ----

/// Below the ports that pods use as ephemeral (32768 and up, unless somebody widened the range).
const PORT_RANGE: std::ops::RangeInclusive<u16> = 10_240..=32_767;
/// Binds are tried so often; a pod that has used up so many ports in a row has used up all.
const BIND_ATTEMPTS: usize = 64;

/// The ports that our sockets take when they keep a client's address.
struct Ports {
    next: AtomicU16,
    /// (client's address and port) → open connections from there. Only ports within the range:
    /// others cannot clash with ours.
    held: Mutex<HashMap<SocketAddr, u32>>,
    /// Length of `held`, so that the usual case takes no lock.
    held_count: AtomicUsize,
}

impl Ports {
    fn starting_at(next: u16) -> Self {
        Self {
            next: AtomicU16::new(next),
            held: Mutex::default(),
            held_count: AtomicUsize::new(0),
        }
    }

    fn bind(&self, socket: &Socket, client: SocketAddr, remote: SocketAddr) -> io::Result<()> {
        if client.is_ipv4() != remote.is_ipv4() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("client {client} and destination {remote} are of different families"),
            ));
        }
        if client.is_ipv4() {
            socket.set_ip_transparent_v4(true)?;
        } else {
            socket.set_ip_transparent_v6(true)?;
        }
        // Two connections from one client address may share a port if they lead elsewhere.
        socket.set_reuse_address(true)?;
        for _ in 0..BIND_ATTEMPTS {
            let Some(at) = self.draw(client, remote) else {
                break;
            };
            match socket.bind(&at.into()) {
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
                done => return done,
            }
        }
        Err(io::Error::new(
            io::ErrorKind::AddrNotAvailable,
            format!(
                "no port of {PORT_RANGE:?} is free for {} in the pod",
                client.ip()
            ),
        ))
    }

    /// The client's address with the next port that neither the client nor `remote` holds.
    fn draw(&self, client: SocketAddr, remote: SocketAddr) -> Option<SocketAddr> {
        PORT_RANGE
            .map(|_| SocketAddr::new(client.ip(), self.next_port()))
            .find(|at| *at != client && *at != remote && !self.is_held(*at))
    }

    fn next_port(&self) -> u16 {
        let step = |port: u16| {
            if port >= *PORT_RANGE.end() {
                *PORT_RANGE.start()
            } else {
                port + 1
            }
        };
        // Relaxed: the numbers only need to differ.
        match self
            .next
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |port| {
                Some(step(port))
            }) {
            Ok(port) | Err(port) => port,
        }
    }

    fn hold(&self, client: SocketAddr) {
        if PORT_RANGE.contains(&client.port()) {
            let mut held = self.held.lock();
            *held.entry(client).or_default() += 1;
            self.held_count.store(held.len(), Ordering::Release);
        }
    }

    fn release(&self, client: SocketAddr) {
        if PORT_RANGE.contains(&client.port()) {
            let mut held = self.held.lock();
            if let Some(count) = held.get_mut(&client) {
                *count -= 1;
                if *count == 0 {
                    held.remove(&client);
                    if held.is_empty() {
                        held.shrink_to_fit();
                    }
                }
            }
            self.held_count.store(held.len(), Ordering::Release);
        }
    }

    fn is_held(&self, at: SocketAddr) -> bool {
        self.held_count.load(Ordering::Acquire) > 0 && self.held.lock().contains_key(&at)
    }
}

// ---- listeners ----

const BACKLOG: i32 = 4096;
/// A peer that has vanished is noticed after about two minutes, idle or not; in builds for tests
/// after four seconds.
const KEEP_ALIVE_AFTER: Duration = Duration::from_secs(if TESTING { 2 } else { 60 });
const KEEP_ALIVE_EVERY: Duration = Duration::from_secs(if TESTING { 1 } else { 15 });
const KEEP_ALIVE_TRIES: u32 = if TESTING { 2 } else { 4 };
const USER_TIMEOUT: Duration = Duration::from_secs(if TESTING { 4 } else { 120 });
const TESTING: bool = cfg!(feature = "testing");

/// The families of a pod, as `LISTENERS` numbers them.
pub(super) const FAMILIES: [u32; 2] = [picomesh_common::config::V4, picomesh_common::config::V6];

/// Listeners for one direction and family, one per data thread, as one reuseport group: the
/// kernel splits connections among them, and any of them stands for all in `LISTENERS`. In the
/// calling thread's namespace.
pub(super) fn group(
    family: u32,
    members: usize,
    owner: &SocketOwner,
) -> io::Result<Vec<TcpListener>> {
    let ip = if family == picomesh_common::config::V4 {
        IpAddr::from(Ipv4Addr::LOCALHOST)
    } else {
        IpAddr::from(Ipv6Addr::LOCALHOST)
    };
    let mut at = SocketAddr::new(ip, 0);
    let mut listeners = Vec::with_capacity(members);
    for _ in 0..members {
        let listener = listener(at, owner)?;
        // A group shares its port: the first one's.
        at = listener.local_addr()?;
        listeners.push(listener);
    }
    Ok(listeners)
}

/// All listeners of a pod, element `i` for data thread `i`. In the calling thread's namespace.
pub(super) fn listeners(
    threads: usize,
    ipv6: bool,
    owner: &SocketOwner,
) -> io::Result<Vec<PodListeners>> {
    let mut all: Vec<PodListeners> = (0..threads).map(|_| PodListeners::default()).collect();
    for family in FAMILIES.into_iter().take(1 + usize::from(ipv6)) {
        for (thread, listener) in all.iter_mut().zip(group(family, threads, owner)?) {
            thread.outbound.push(listener);
        }
        for (thread, listener) in all.iter_mut().zip(group(family, threads, owner)?) {
            thread.inbound.push(listener);
        }
    }
    Ok(all)
}

fn listener(at: SocketAddr, owner: &SocketOwner) -> io::Result<TcpListener> {
    let socket = Socket::new(
        Domain::for_address(at),
        Type::STREAM.nonblocking().cloexec(),
        Some(Protocol::TCP),
    )?;
    socket.set_reuse_port(true)?;
    // Transparent: it answers for every address, and may sit on a loopback without one.
    if at.is_ipv4() {
        socket.set_ip_transparent_v4(true)?;
    } else {
        socket.set_only_v6(true)?;
        socket.set_ip_transparent_v6(true)?;
    }
    socket.set_tcp_nodelay(true)?;
    keep_alive(&socket)?;
    socket.bind(&at.into())?;
    // Before listen: a connection must not be accepted without our storage.
    owner.claim(&socket)?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// A peer that is gone without a word does not stay for ever: neither when nothing is said any
/// more, also on a socket that is half closed, nor when what was said is not acknowledged.
pub fn keep_alive(socket: &Socket) -> io::Result<()> {
    socket.set_tcp_keepalive(
        &TcpKeepalive::new()
            .with_time(KEEP_ALIVE_AFTER)
            .with_interval(KEEP_ALIVE_EVERY)
            .with_retries(KEEP_ALIVE_TRIES),
    )?;
    socket.set_tcp_user_timeout(Some(USER_TIMEOUT))
}

/// Is this the error of a kernel or namespace without IPv6?
pub(super) fn is_no_ipv6(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn socket() -> Socket {
        Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP)).unwrap()
    }

    fn drawn(ports: &Ports, client: &str) -> u16 {
        ports.draw(at(client), at("10.0.0.9:80")).unwrap().port()
    }

    #[test]
    fn ports_go_round_within_the_range() {
        let ports = Ports::starting_at(32_766);
        let drawn: Vec<u16> = (0..4).map(|_| ports.next_port()).collect();
        assert_eq!(drawn, [32_766, 32_767, 10_240, 10_241]);
    }

    #[test]
    fn a_held_port_and_the_clients_own_are_passed_over() {
        let ports = Ports::starting_at(20_000);
        ports.hold(at("10.0.0.1:20001"));
        assert_eq!(drawn(&ports, "10.0.0.1:20000"), 20_002);
        assert_eq!(drawn(&ports, "10.0.0.2:40000"), 20_003);

        let ports = Ports::starting_at(20_001);
        ports.hold(at("10.0.0.1:20001"));
        ports.release(at("10.0.0.1:20001"));
        assert_eq!(drawn(&ports, "10.0.0.1:40000"), 20_001);
    }

    #[test]
    fn a_port_is_held_until_its_last_connection_ends() {
        let ports = Ports::starting_at(20_000);
        let client = at("10.0.0.1:20001");
        ports.hold(client);
        ports.hold(client);
        ports.release(client);
        assert!(ports.is_held(client));
        ports.release(client);
        assert!(!ports.is_held(client));
        // Never held, or outside the range: no effect and no underflow.
        ports.release(client);
        ports.hold(at("10.0.0.1:40000"));
        assert_eq!(ports.held_count.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn families_are_not_mixed() {
        let ports = Ports::starting_at(20_000);
        let error = ports
            .bind(&socket(), at("[2001:db8::1]:4000"), at("10.0.0.1:80"))
            .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }
}

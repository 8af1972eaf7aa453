//! Interfaces that carry bare IP packets: no Ethernet header, no address of their own.
//!
//! ```text
//!   client 10.80.0.1 bare0 ══ two tun devices, and threads between them ══ bare0 10.80.0.2 pod
//!          fd80::1                                                            fd80::2
//! ```
//!
//! The pod has its eth0 beside it, so that each interface has programs for its own kind of frame.

use std::{
    fs::File,
    io::{ErrorKind, Read, Write},
    net::{IpAddr, Shutdown, SocketAddr, TcpStream},
    os::fd::{AsFd, AsRawFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
};

use anyhow::{Context, Result, ensure};
use nix::{
    libc,
    poll::{PollFd, PollFlags, poll},
};
use picomesh::datapath::{devices, loader::L2_NONE};
use picomesh_common::Counter;

use crate::{
    Test,
    frames::{Frame, SYN, Wire},
    outbound::vanish,
    topology::{
        Family, Netns, QUIET, SLOT, SOON, Setup, Topology, accept, accept_within, active, attempt,
        dial, families, serve,
    },
};

pub(crate) const TESTS: &[Test] = &[
    (
        "a_connection_through_a_tunnel_lands_on_the_listener",
        outbound,
    ),
    (
        "a_connection_that_arrives_by_a_tunnel_lands_on_the_listener",
        inbound,
    ),
    (
        "without_a_listener_a_tunnel_carries_no_tcp",
        without_a_listener,
    ),
    ("fragments_out_of_a_tunnel_are_dropped", fragments),
    (
        "a_taken_connection_never_goes_plainly_into_a_tunnel",
        never_plain,
    ),
];

fn outbound(setup: &Setup) -> Result<()> {
    let bare = Bare::new(setup)?;
    bare.enrol()?;
    let listeners = bare.topology.listen_as_proxy()?;
    for family in families() {
        let (server, _) = addresses(family);
        let app = dial(&bare.topology.pod, SocketAddr::new(server, 80))?;
        let (taken, peer) = accept(&listeners.outbound[family.index as usize])?;
        ensure!(taken.local_addr()? == SocketAddr::new(server, 80));
        ensure!(peer == app.local_addr()?, "{peer}");
        both_ways(app, taken)?;

        // What the proxy sends itself goes into the tunnel.
        let plain = serve(&bare.topology.client, SocketAddr::new(server, 81))?;
        let ours = bare.topology.pod.enter(|| {
            let socket = bare.topology.proxy_socket(family.index)?;
            socket.connect_timeout(&plain.local_addr()?.into(), SOON)?;
            Ok(TcpStream::from(socket))
        })?;
        let (far, _peer) = accept(&plain)?;
        both_ways(ours, far)?;
    }
    Ok(())
}

fn inbound(setup: &Setup) -> Result<()> {
    let bare = Bare::new(setup)?;
    bare.enrol()?;
    let listeners = bare.topology.listen_as_proxy()?;
    for family in families() {
        let (_, pod) = addresses(family);
        let app = serve(&bare.topology.pod, SocketAddr::new(pod, 80))?;
        let client = dial(&bare.topology.client, app.local_addr()?)?;
        let (taken, peer) = accept(&listeners.inbound[family.index as usize])?;
        ensure!(taken.local_addr()? == app.local_addr()?);
        ensure!(peer == client.local_addr()?, "{peer}");
        // On to the application, as its client, and its answers come back to us.
        let mut from = peer;
        from.set_port(20_000);
        let ours = bare.topology.connect_as_client(from, app.local_addr()?)?;
        let (served, seen) = accept(&app)?;
        ensure!(seen == from, "{seen}");
        both_ways(ours, served)?;
        both_ways(client, taken)?;
    }
    Ok(())
}

fn without_a_listener(setup: &Setup) -> Result<()> {
    let bare = Bare::new(setup)?;
    // The control: the tunnel carries both ways before the pod is enrolled.
    for family in families() {
        let (client, pod) = addresses(family);
        for (near, far, at) in [
            (&bare.topology.pod, &bare.topology.client, client),
            (&bare.topology.client, &bare.topology.pod, pod),
        ] {
            let server = serve(far, SocketAddr::new(at, 79))?;
            let app = dial(near, server.local_addr()?)?;
            let (served, _peer) = accept(&server)?;
            both_ways(app, served)?;
        }
    }
    bare.enrol()?;
    for family in families() {
        let (client, pod) = addresses(family);
        for (near, far, at, counter) in [
            (
                &bare.topology.pod,
                &bare.topology.client,
                client,
                Counter::NoOutboundListener,
            ),
            (
                &bare.topology.client,
                &bare.topology.pod,
                pod,
                Counter::NoInboundListener,
            ),
        ] {
            let server = serve(far, SocketAddr::new(at, 80))?;
            let before = bare.topology.count(counter)?;
            let end = attempt(near, server.local_addr()?, QUIET)?;
            ensure!(end == Some(ErrorKind::TimedOut), "{at}: {end:?}");
            ensure!(
                accept_within(&server, QUIET)?.is_none(),
                "{at} was reached in plain"
            );
            bare.topology.await_count(counter, before)?;
        }
    }
    Ok(())
}

fn fragments(setup: &Setup) -> Result<()> {
    const ETHERNET: usize = 14;
    let bare = Bare::new(setup)?;
    bare.enrol()?;
    let _listeners = bare.topology.listen_as_proxy()?;
    for family in families() {
        let (client, pod) = addresses(family);
        let app = serve(&bare.topology.pod, SocketAddr::new(pod, 80))?;
        let syn = Frame::bare(SocketAddr::new(client, 46_300), app.local_addr()?, SYN);
        // The control: whole, by the same way, it is captured.
        let captured = bare.topology.count(Counter::CapturedInbound)?;
        bare.deliver(&syn.bytes()[ETHERNET..])?;
        bare.topology
            .await_count(Counter::CapturedInbound, captured)?;
        for part in syn.payload(&[0; 20]).fragments(8) {
            let dropped = bare.topology.count(Counter::Fragment)?;
            bare.deliver(&part[ETHERNET..])?;
            bare.topology.await_count(Counter::Fragment, dropped)?;
        }
        ensure!(accept_within(&app, QUIET / 4)?.is_none());
    }
    Ok(())
}

/// Rule 4, where there is no Ethernet address that would keep the packet from anybody.
fn never_plain(setup: &Setup) -> Result<()> {
    for family in families() {
        let bare = Bare::new(setup)?;
        bare.enrol()?;
        let listeners = bare.topology.listen_as_proxy()?;
        let (server, _) = addresses(family);
        let mut app = dial(&bare.topology.pod, SocketAddr::new(server, 80))?;
        let (taken, _peer) = accept(&listeners.outbound[family.index as usize])?;
        let wire = Wire::open(&bare.topology.client, NAME)?;
        bare.topology.pod.run("ip link set mesh0 down")?;
        bare.topology.stop_listening(listeners)?;
        vanish(taken)?;
        let before = bare.topology.count(Counter::OrphanedTaken)?;
        app.write_all(b"marker-of-the-request")?;
        ensure!(
            !wire.carries(QUIET, b"marker-of-the-request"),
            "plain bytes went into the tunnel"
        );
        bare.topology.await_count(Counter::OrphanedTaken, before)?;
    }
    Ok(())
}

const NAME: &str = "bare0";

/// The client's address and the pod's.
fn addresses(family: Family) -> (IpAddr, IpAddr) {
    if family.client.is_ipv4() {
        ([10, 80, 0, 1].into(), [10, 80, 0, 2].into())
    } else {
        (
            [0xfd80, 0, 0, 0, 0, 0, 0, 1].into(),
            [0xfd80, 0, 0, 0, 0, 0, 0, 2].into(),
        )
    }
}

/// The topology with one more wire between its client and its pod.
struct Bare {
    topology: Topology,
    pod: Arc<File>,
    stop: Arc<AtomicBool>,
    movers: Vec<JoinHandle<()>>,
}

impl Bare {
    /// Not enrolled yet.
    fn new(setup: &Setup) -> Result<Self> {
        let mut topology = Topology::unattached(setup)?;
        let client = Arc::new(tun(&topology.client, 1)?);
        let pod = Arc::new(tun(&topology.pod, 2)?);
        let stop = Arc::new(AtomicBool::new(false));
        let movers = [(&client, &pod), (&pod, &client)]
            .into_iter()
            .map(|(from, to)| {
                let (from, to, stop) = (Arc::clone(from), Arc::clone(to), Arc::clone(&stop));
                thread::spawn(move || forward(&from, &to, &stop))
            })
            .collect();
        // As the agent finds them, so that its reading of the device is tested too.
        let found = topology.pod.enter(|| Ok(devices::interfaces()?))?;
        let index = found.iter().position(|known| known.name == NAME);
        let bare = &found[index.with_context(|| format!("{NAME} is not among {found:?}"))?];
        ensure!(bare.l2_len == L2_NONE, "{bare:?}");
        ensure!(found.contains(&topology.interfaces[0]), "{found:?}");
        topology.interfaces = found;
        Ok(Self {
            topology,
            pod,
            stop,
            movers,
        })
    }

    fn enrol(&self) -> Result<()> {
        self.topology.loader.set_pod_config(SLOT, &active())?;
        self.topology.attach()?;
        Ok(())
    }

    /// An IP packet arrives in the pod.
    fn deliver(&self, packet: &[u8]) -> Result<()> {
        (&*self.pod).write_all(packet).context("write to the tun")
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for mover in self.movers.drain(..) {
            let _ = mover.join();
        }
    }
}

/// A tun device of `netns` with the addresses that end in `host`; it goes with its descriptor.
fn tun(netns: &Netns, host: u8) -> Result<File> {
    let tun = netns.enter(|| {
        let file = File::options()
            .read(true)
            .write(true)
            .open("/dev/net/tun")
            .context("/dev/net/tun: the kernel needs CONFIG_TUN")?;
        // SAFETY: all zeros is a value of this plain struct.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, byte) in request.ifr_name.iter_mut().zip(NAME.bytes()) {
            *to = byte as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short;
        // SAFETY: the descriptor is a tun's, the request is whole.
        let result =
            unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) };
        ensure!(
            result == 0,
            "TUNSETIFF: {}",
            std::io::Error::last_os_error()
        );
        Ok(file)
    })?;
    netns.run(&format!(
        "ip addr add 10.80.0.{host}/24 dev {NAME}
         ip addr add fd80::{host}/64 dev {NAME} nodad
         ip link set {NAME} up"
    ))?;
    Ok(tun)
}

/// The wire: what one device sends the other receives.
fn forward(mut from: &File, mut to: &File, stop: &AtomicBool) {
    let mut packet = vec![0; 65_536];
    while !stop.load(Ordering::Relaxed) {
        let mut ready = [PollFd::new(from.as_fd(), PollFlags::POLLIN)];
        if !matches!(poll(&mut ready, 20u16), Ok(1)) {
            continue;
        }
        if let Ok(length) = from.read(&mut packet) {
            // A device that is not up yet takes nothing, as any wire.
            let _ = to.write_all(&packet[..length]);
        }
    }
}

/// More than a segment each way, and the end of each.
fn both_ways(mut one: TcpStream, mut other: TcpStream) -> Result<()> {
    let sent: Vec<u8> = (0..100_000u32).map(|i| (i % 251) as u8).collect();
    for stream in [&one, &other] {
        stream.set_read_timeout(Some(SOON))?;
    }
    let expected = sent.clone();
    let writer = thread::spawn(move || -> Result<()> {
        one.write_all(&sent)?;
        one.shutdown(Shutdown::Write)?;
        let mut back = Vec::new();
        one.read_to_end(&mut back)?;
        ensure!(back == sent, "{} bytes came back", back.len());
        Ok(())
    });
    let mut got = Vec::new();
    other.read_to_end(&mut got)?;
    ensure!(got == expected, "{} bytes came", got.len());
    other.write_all(&got)?;
    drop(other);
    writer
        .join()
        .map_err(|_panic| anyhow::anyhow!("the writer panicked"))?
}

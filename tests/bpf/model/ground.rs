//! The kernel's side: a pod in which a world of [`super::packets`] is real, and the programs that
//! judge a packet there.
//!
//! Connections stand without a peer: TCP_REPAIR makes a socket established by its word alone. Only
//! requests and TIME_WAIT need packets. The programs are attached once, to be pinned, and taken off
//! again before that, so that nothing but the runs is judged and counted.
//! The calling thread enters the pod and stays there.

use std::{
    collections::BTreeMap,
    fs, io,
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    os::fd::{AsFd, AsRawFd, RawFd},
    rc::Rc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use aya::{
    maps::MapData,
    programs::{ProgramError, SchedClassifier, TestRun, TestRunOptions},
};
use nix::{
    libc,
    sched::{CloneFlags, setns},
};
use picomesh::datapath::loader::{Interface, L2_NONE};
use picomesh_common::{
    PodConfig, PortRange, ProbeState, StandingKey, Tuple,
    config::{INBOUND, MESH0_MAC, MESH1_MAC, OUTBOUND, V4, V6, owner},
    pod::MAX_SKIP_RANGES,
};
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use super::{
    packets::{
        Case, Connection, Direction, FAR_V4, FAR_V6, Owner, OwnerIn, Phase, Server, Sockets, World,
    },
    rules::{Judgement, Verdict},
};
use crate::{
    frames::{Frame, SYN, Wire},
    topology::{
        CAPTURE_MARK, FAMILIES, Family, Listeners, SLOT, SOON, Setup, Topology, accept, dial_from,
        serve,
    },
};

/// A connection in TIME_WAIT is there for a minute, a request for as long.
const LIFE: Duration = Duration::from_secs(25);

pub(super) struct Ground {
    topology: Topology,
    listeners: Listeners,
    /// Which of them are in the map.
    listening: [[bool; 2]; 2],
    sockets: Rc<Sockets>,
    /// By direction; Ethernet first.
    programs: [[SchedClassifier; 2]; 2],
    born: Instant,
    _held: Held,
}

/// Sockets that must not close.
#[derive(Default)]
struct Held {
    sockets: Vec<Socket>,
    servers: Vec<TcpListener>,
}

pub(super) enum Ran {
    Verdict(Run),
    /// The kernel wants a whole IP header before it runs anything.
    TooShort,
}

#[derive(Debug)]
pub(super) struct Run {
    verdict: u32,
    mark: u32,
    frame: Vec<u8>,
}

impl Ground {
    pub(super) fn new(setup: &Setup) -> Result<Self> {
        let mut topology = Topology::unattached(setup)?;
        topology.node.run(&format!(
            "ip route add blackhole {FAR_V4}
             ip -6 route add blackhole {FAR_V6}"
        ))?;
        // Nothing is sent through it: it is there so that programs for its kind are loaded.
        topology.pod.run(
            "ip link add plain0 type veth peer name plain1
             ip addr add 10.78.9.9/32 dev lo
             ip addr add fd78:9::9/128 dev lo nodad",
        )?;
        topology.interfaces.push(Interface {
            name: "plain0".to_owned(),
            index: topology
                .pod
                .enter(|| Ok(nix::net::if_::if_nametoindex("plain0")?))?,
            l2_len: L2_NONE,
        });
        // Before there is a request: the kernel forgets one whose SYN-ACK is dropped.
        topology.attach()?;
        let pinned = |word: &str, l2_len: u32| {
            let name = format!("v1/pods/{SLOT}/program-{word}-{l2_len}");
            let pin = topology.bpf_dir.join(name);
            SchedClassifier::from_pin(&pin).with_context(|| pin.display().to_string())
        };
        let programs = [
            [pinned("ingress", 14)?, pinned("ingress", 0)?],
            [pinned("egress", 14)?, pinned("egress", 0)?],
        ];
        topology
            .pod
            .enter(|| Ok(topology.loader.detach(SLOT, &topology.interfaces)?))?;
        let (sockets, held) = sockets(&topology)?;
        let listeners = topology.listen_as_proxy()?;
        setns(topology.pod.fd().as_fd(), CloneFlags::CLONE_NEWNET).context("setns")?;
        Ok(Self {
            topology,
            listeners,
            listening: [[true; 2]; 2],
            sockets: Rc::new(sockets),
            programs,
            born: Instant::now(),
            _held: held,
        })
    }

    /// Makes everything anew before the sockets that do not live long are gone.
    pub(super) fn renew(&mut self, setup: &Setup) -> Result<()> {
        if self.born.elapsed() > LIFE {
            *self = Self::new(setup)?;
        }
        Ok(())
    }

    pub(super) fn sockets(&self) -> Rc<Sockets> {
        Rc::clone(&self.sockets)
    }

    /// Makes `world` real, with all counters at zero.
    pub(super) fn become_world(&mut self, world: &World) -> Result<()> {
        let loader = &self.topology.loader;
        loader.clear_slot(SLOT)?;
        self.listening = [[false; 2]; 2];
        let mut config = PodConfig {
            flags: world.flags(),
            ..PodConfig::EMPTY
        };
        // Anywhere: the last place counts as much as the first.
        for (number, (first, last)) in (1..).zip(&world.skip_outbound) {
            config.skip_outbound[number * 5 % MAX_SKIP_RANGES] = PortRange {
                first: *first,
                last: *last,
            };
        }
        for (number, (first, last)) in (1..).zip(&world.skip_inbound) {
            config.skip_inbound[number * 15 % MAX_SKIP_RANGES] = PortRange {
                first: *first,
                last: *last,
            };
        }
        loader.set_pod_config(SLOT, &config)?;
        for connection in &world.standing {
            loader.insert_standing(&key(connection))?;
        }
        let now = monotonic_ns()?;
        for (connection, phase) in &world.probes {
            let (phase, since_ns) = match phase {
                Phase::Dialling => (ProbeState::DIALLING, now),
                Phase::DiallingTooLong => (ProbeState::DIALLING, long_before(now)),
                Phase::Established => (ProbeState::ESTABLISHED, long_before(now)),
                Phase::Closing => (ProbeState::CLOSING, now),
                Phase::ClosedLongAgo => (ProbeState::CLOSING, long_before(now)),
            };
            let state = ProbeState {
                since_ns,
                phase,
                _pad: 0,
            };
            loader.insert_probe(&key(connection), &state)?;
        }
        for direction in [OUTBOUND, INBOUND] {
            for family in [V4, V6] {
                self.listen(direction, family, world.our_listener(direction, family))?;
            }
        }
        Ok(())
    }

    fn listen(&mut self, direction: u32, family: u32, wanted: bool) -> Result<()> {
        let is = &mut self.listening[direction as usize][family as usize];
        if *is == wanted {
            return Ok(());
        }
        let loader = &self.topology.loader;
        if wanted {
            let listeners = if direction == OUTBOUND {
                &self.listeners.outbound
            } else {
                &self.listeners.inbound
            };
            loader.set_listener(SLOT, direction, family, &listeners[family as usize])?;
        } else {
            loader.clear_listener(SLOT, direction, family)?;
        }
        *is = wanted;
        Ok(())
    }

    /// What was counted since the world came to be, zeros left out.
    pub(super) fn counters(&self) -> Result<BTreeMap<&'static str, u64>> {
        Ok(self.topology.nonzero()?.into_iter().collect())
    }

    /// Runs the program of the packet's direction and link on it.
    pub(super) fn run(&self, case: &Case) -> Result<Ran> {
        const CONTEXT: usize = 192;
        const MARK: std::ops::Range<usize> = 8..12;
        let direction = match case.direction {
            Direction::In => 0,
            Direction::Out => 1,
        };
        let program = &self.programs[direction][usize::from(!case.ethernet)];
        let mut context = [0; CONTEXT];
        context[MARK].copy_from_slice(&case.mark.to_ne_bytes());
        let (mut frame, mut after) = (vec![0; case.frame.len() + 64], [0; CONTEXT]);
        let result = program.test_run(TestRunOptions {
            data_in: Some(&case.frame),
            data_out: Some(&mut frame),
            ctx_in: Some(&context),
            ctx_out: Some(&mut after),
            ..TestRunOptions::default()
        });
        let result = match result {
            Ok(result) => result,
            Err(error) if is_invalid(&error) && is_too_short(case) => return Ok(Ran::TooShort),
            Err(error) => return Err(error).with_context(|| case.to_string()),
        };
        frame.truncate(result.data_size_out as usize);
        let mut mark = [0; 4];
        mark.copy_from_slice(&after[MARK]);
        Ok(Ran::Verdict(Run {
            verdict: result.return_value,
            mark: u32::from_ne_bytes(mark),
            frame,
        }))
    }
}

impl Run {
    /// Is this what the rules say, to the last byte?
    pub(super) fn agrees(&self, case: &Case, expected: &Judgement) -> bool {
        /// TC_ACT_UNSPEC, TC_ACT_SHOT, TC_ACT_REDIRECT.
        const PASS: u32 = u32::MAX;
        const DROP: u32 = 2;
        const REDIRECT: u32 = 7;
        match expected.verdict {
            Verdict::Pass => {
                self.verdict == PASS && self.mark == case.mark && self.frame == case.frame
            }
            Verdict::Dropped => self.verdict == DROP,
            // To no device, as it was.
            Verdict::Lost => {
                self.verdict == REDIRECT && self.mark == case.mark && self.frame == case.frame
            }
            Verdict::Captured => {
                let (mac, mark) = match case.direction {
                    Direction::In => (MESH1_MAC, case.mark),
                    Direction::Out => (MESH0_MAC, CAPTURE_MARK),
                };
                let rewritten = if case.ethernet {
                    self.frame.get(6..) == case.frame.get(6..)
                } else {
                    self.frame.get(12..14) == case.frame.get(12..14)
                        && self.frame.get(14..) == Some(&case.frame)
                };
                self.verdict == REDIRECT
                    && self.mark == mark
                    && self.frame.starts_with(&mac)
                    && rewritten
            }
        }
    }
}

fn is_invalid(error: &ProgramError) -> bool {
    let source = std::error::Error::source(error);
    let source = source.and_then(|source| source.downcast_ref::<io::Error>());
    source.and_then(io::Error::raw_os_error) == Some(libc::EINVAL)
}

fn is_too_short(case: &Case) -> bool {
    let behind = case.frame.len() - 14;
    match case.ethertype() {
        0x0800 => behind < 20,
        0x86dd => behind < 40,
        _other => behind == 0,
    }
}

fn key(connection: &Connection) -> StandingKey {
    StandingKey {
        slot: SLOT,
        tuple: Tuple::new(connection.local, connection.remote),
    }
}

fn long_before(now: u64) -> u64 {
    now.saturating_sub(ProbeState::LIFE_NS * 2)
}

fn monotonic_ns() -> Result<u64> {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the kernel writes a timespec to `now`.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    ensure!(result == 0, "clock_gettime: {}", io::Error::last_os_error());
    Ok(now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs())
}

/// One socket of each kind that can own a connection, in both families.
fn sockets(topology: &Topology) -> Result<(Sockets, Held)> {
    let mut sockets = Sockets::default();
    let mut held = Held::default();
    let any = |family: &Family, port| match family.pod {
        IpAddr::V4(_) => SocketAddr::from(([0, 0, 0, 0], port)),
        IpAddr::V6(_) => SocketAddr::from(([0u16; 8], port)),
    };
    for family in &FAMILIES {
        for at in [any(family, 80), SocketAddr::new(family.pod, 9000)] {
            held.servers.push(topology.pod.enter(|| only(at))?);
            sockets.servers.push(Server { at, only_v6: true });
        }
        // A listener of ours that a client reaches without being captured, for its requests.
        let at = SocketAddr::new(family.pod, 443);
        held.sockets.push(topology.pod.enter(|| {
            let socket = topology.proxy_socket(family.index)?;
            socket.bind(&at.into())?;
            socket.listen(8)?;
            Ok(socket)
        })?);
        sockets.servers.push(Server { at, only_v6: true });
    }
    let both = SocketAddr::from(([0u16; 8], 81));
    held.servers.push(serve(&topology.pod, both)?);
    sockets.servers.push(Server {
        at: both,
        only_v6: false,
    });

    let storages = MapData::from_pin(topology.bpf_dir.join("v1/maps/SOCKETS"))?;
    let storages = storages.fd().as_fd().as_raw_fd();
    for family in &FAMILIES {
        let (pod, client) = (family.pod, family.client);
        let link_local: IpAddr = match pod {
            IpAddr::V4(_) => [169, 254, 7, 7].into(),
            IpAddr::V6(_) => [0xfe80, 0, 0, 0, 0, 0, 0, 7].into(),
        };
        for (local, remote, owner) in [
            // What clients outside have opened, or seem to have.
            ((pod, 80), (client, 41_000), Owner::Application),
            ((pod, 80), (client, 41_001), Owner::Ours),
            ((pod, 80), (client, 41_002), Owner::Taken),
            ((pod, 80), (client, 41_003), Owner::Probed),
            ((pod, 80), (family.node, 41_004), Owner::Application),
            // What the pod has opened.
            ((pod, 43_000), (client, 80), Owner::Application),
            ((pod, 43_001), (client, 80), Owner::Taken),
            ((pod, 43_002), (client, 443), Owner::Application),
            ((pod, 43_003), (link_local, 80), Owner::Application),
            // What pretends to be out there: far ends of ours, and of somebody else's making.
            ((client, 42_000), (pod, 80), Owner::Ours),
            ((client, 80), (pod, 43_001), Owner::Ours),
            ((client, 42_001), (pod, 80), Owner::Application),
        ] {
            // In IPv6 a link-local address wants an interface too.
            if remote.0 == link_local && pod.is_ipv6() {
                continue;
            }
            let connection = Connection::new(local.into(), remote.into());
            let socket = topology
                .pod
                .enter(|| established(&connection))
                .with_context(|| format!("{connection:?}"))?;
            let value = match owner {
                Owner::Ours => Some(owner::OURS),
                Owner::Taken => Some(owner::TAKEN),
                Owner::Probed => Some(owner::PROBED),
                Owner::Application | Owner::OurRequest | Owner::ItsRequest | Owner::Over => None,
            };
            if let Some(value) = value {
                set_storage(storages, socket.as_raw_fd(), value)?;
            }
            held.sockets.push(socket);
            sockets.add(connection, owner, family);
        }
        for (connection, owner) in requests(topology, family)? {
            sockets.add(connection, owner, family);
        }
        sockets.add(over(topology, family)?, Owner::Over, family);
    }
    Ok((sockets, held))
}

impl Sockets {
    fn add(&mut self, connection: Connection, owner: Owner, family: &Family) {
        let family = family.index;
        self.owners.insert(connection, OwnerIn { owner, family });
    }
}

/// A listener of its own family alone.
fn only(at: SocketAddr) -> Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(at), Type::STREAM, Some(Protocol::TCP))?;
    if at.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_reuse_address(true)?;
    socket.bind(&at.into())?;
    socket.listen(8)?;
    Ok(socket.into())
}

/// A socket that stands without a peer, and sends nothing when it is closed.
fn established(connection: &Connection) -> Result<Socket> {
    let domain = Domain::for_address(connection.local);
    let socket = Socket::new(domain, Type::STREAM, Some(Protocol::TCP))?;
    if connection.local.is_ipv4() {
        socket.set_ip_transparent_v4(true)?;
    } else {
        socket.set_ip_transparent_v6(true)?;
    }
    socket.set_reuse_address(true)?;
    let on: i32 = 1;
    // SAFETY: the value is an i32 that lives until the call returns.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_REPAIR,
            (&raw const on).cast(),
            size_of::<i32>() as libc::socklen_t,
        )
    };
    ensure!(result == 0, "TCP_REPAIR: {}", io::Error::last_os_error());
    socket.bind(&connection.local.into()).context("bind")?;
    socket
        .connect(&connection.remote.into())
        .context("connect")?;
    Ok(socket)
}

/// SYNs that nobody will ever complete: one to a listener of ours, one to an application's.
fn requests(topology: &Topology, family: &Family) -> Result<[(Connection, Owner); 2]> {
    let far = match family.pod {
        IpAddr::V4(_) => FAR_V4,
        IpAddr::V6(_) => FAR_V6,
    };
    let wire = Wire::open(&topology.node, "topod")?;
    let made = [
        (443, 40_000, Owner::OurRequest),
        (80, 40_001, Owner::ItsRequest),
    ];
    let made = made.map(|(to, from, owner)| {
        let local = SocketAddr::new(family.pod, to);
        (Connection::new(local, SocketAddr::new(far, from)), owner)
    });
    for (connection, _owner) in &made {
        wire.send(&Frame::to_pod(connection.remote, connection.local, SYN).bytes())?;
        await_state(topology, connection, "03")?;
    }
    Ok(made)
}

/// A connection of the pod to itself whose server said goodbye first.
fn over(topology: &Topology, family: &Family) -> Result<Connection> {
    let client: IpAddr = match family.pod {
        IpAddr::V4(_) => [10, 78, 9, 9].into(),
        IpAddr::V6(_) => [0xfd78, 9, 0, 0, 0, 0, 0, 9].into(),
    };
    let server = topology
        .pod
        .enter(|| only(SocketAddr::new(family.pod, 9001)))?;
    let from = SocketAddr::new(client, 41_006);
    let dialled: TcpStream = dial_from(&topology.pod, from, server.local_addr()?)?;
    let (served, _peer) = accept(&server)?;
    let connection = Connection::new(served.local_addr()?, from);
    drop(served);
    // Waits for the server's FIN, or closing would come first.
    SockRef::from(&dialled).set_read_timeout(Some(SOON))?;
    let end = io::Read::read(&mut &dialled, &mut [0; 1])?;
    ensure!(end == 0, "the server did not say goodbye");
    drop(dialled);
    await_state(topology, &connection, "06")?;
    Ok(connection)
}

/// Waits until the kernel lists the connection in this state.
fn await_state(topology: &Topology, connection: &Connection, state: &str) -> Result<()> {
    let list = match connection.local {
        SocketAddr::V4(_) => "/proc/thread-self/net/tcp",
        SocketAddr::V6(_) => "/proc/thread-self/net/tcp6",
    };
    let port = |end: SocketAddr| format!(":{:04X}", end.port());
    let deadline = Instant::now() + SOON;
    loop {
        let text = topology.pod.enter(|| Ok(fs::read_to_string(list)?))?;
        let there = text.lines().any(|line| {
            let mut words = line.split_whitespace().skip(1);
            let mut next = || words.next().unwrap_or_default();
            next().ends_with(&port(connection.local))
                && next().ends_with(&port(connection.remote))
                && next() == state
        });
        if there {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!("{connection:?} is not in state {state}:\n{text}");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// What only programs do otherwise: says whose a socket is.
fn set_storage(map: RawFd, socket: RawFd, value: u32) -> Result<()> {
    #[repr(C)]
    struct Attr {
        map_fd: u32,
        pad: u32,
        key: u64,
        value: u64,
        flags: u64,
    }
    const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
    let mut attr = Attr {
        map_fd: map.cast_unsigned(),
        pad: 0,
        key: (&raw const socket) as u64,
        value: (&raw const value) as u64,
        flags: 0,
    };
    // SAFETY: the map's key is an i32 and its value a u32; both live until the call returns.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_MAP_UPDATE_ELEM,
            &raw mut attr,
            size_of::<Attr>(),
        )
    };
    ensure!(
        result == 0,
        "storage of a socket: {}",
        io::Error::last_os_error()
    );
    Ok(())
}

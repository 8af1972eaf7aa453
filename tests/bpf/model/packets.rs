//! Worlds and packets, drawn from a seed.
//!
//! Addresses and ports come from small sets, so that a packet meets the sockets, probes and
//! standing connections of its world more often than not; then it is spoilt a little, or a lot.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, SocketAddr},
    rc::Rc,
};

use anyhow::{Context, Result};
use picomesh_common::{
    PodConfig,
    config::{V4, V6},
};

use crate::topology::{
    CAPTURE_MARK, CLIENT_V4, CLIENT_V6, NODE_V4, NODE_V6, OUR_MARK, POD_V4, POD_V6,
};

/// Splitmix64: small, and the same everywhere for ever.
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }

    /// True so many times of a hundred.
    fn percent(&mut self, of_hundred: usize) -> bool {
        self.below(100) < of_hundred
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    fn byte(&mut self) -> u8 {
        self.next() as u8
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.byte()).collect()
    }
}

/// A connection as a socket in the pod's netns names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Connection {
    pub(super) local: SocketAddr,
    pub(super) remote: SocketAddr,
}

impl Connection {
    /// IPv4 is IPv4, in whatever family of socket or packet it comes.
    pub(super) fn new(local: SocketAddr, remote: SocketAddr) -> Self {
        let plain =
            |address: SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
        Self {
            local: plain(local),
            remote: plain(remote),
        }
    }
}

/// Whose socket a connection belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Owner {
    Ours,
    Taken,
    Probed,
    Application,
    OurRequest,
    ItsRequest,
    /// TIME_WAIT.
    Over,
}

/// What a probe of the host does; what counts for ten seconds is fresh or long ago.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Dialling,
    DiallingTooLong,
    Established,
    Closing,
    ClosedLongAgo,
}

const PHASES: [Phase; 5] = [
    Phase::Dialling,
    Phase::DiallingTooLong,
    Phase::Established,
    Phase::Closing,
    Phase::ClosedLongAgo,
];

/// A listener of an application.
#[derive(Clone, Copy, Debug)]
pub(super) struct Server {
    /// Unspecified: all of its family; `[::]` of both.
    pub(super) at: SocketAddr,
    /// Does `[::]` mean IPv6 alone?
    pub(super) only_v6: bool,
}

/// Sockets that stand in the pod all the time.
#[derive(Clone, Debug, Default)]
pub(super) struct Sockets {
    pub(super) servers: Vec<Server>,
    pub(super) owners: BTreeMap<Connection, OwnerIn>,
}

/// A socket and the family of packets by which it is found.
#[derive(Clone, Copy, Debug)]
pub(super) struct OwnerIn {
    pub(super) owner: Owner,
    pub(super) family: u32,
}

/// What a packet meets, beside its bytes.
#[derive(Clone)]
pub(super) struct World {
    pub(super) active: bool,
    pub(super) enrolling: bool,
    pub(super) fail_open: bool,
    pub(super) leaving: bool,
    pub(super) skip_outbound: Vec<(u16, u16)>,
    pub(super) skip_inbound: Vec<(u16, u16)>,
    /// By direction and family.
    pub(super) listeners: [[bool; 2]; 2],
    pub(super) standing: BTreeSet<Connection>,
    pub(super) probes: BTreeMap<Connection, Phase>,
    pub(super) sockets: Rc<Sockets>,
}

impl World {
    /// A captured pod with all its listeners, and nothing special.
    pub(super) fn plain(sockets: Rc<Sockets>) -> Self {
        Self {
            active: true,
            enrolling: false,
            fail_open: false,
            leaving: false,
            skip_outbound: Vec::new(),
            skip_inbound: Vec::new(),
            listeners: [[true; 2]; 2],
            standing: BTreeSet::new(),
            probes: BTreeMap::new(),
            sockets,
        }
    }

    pub(super) fn draw(random: &mut Random, sockets: Rc<Sockets>) -> Self {
        let mut world = Self::plain(sockets);
        world.active = !random.percent(4);
        if random.percent(35) {
            world.enrolling = random.percent(25);
            world.fail_open = random.percent(35);
            world.leaving = random.percent(25);
        }
        if random.percent(35) {
            for direction in &mut world.listeners {
                for family in direction {
                    *family = random.percent(50);
                }
            }
        }
        for _ in 0..random.below(3) {
            let range = range(random);
            world.skip_outbound.push(range);
        }
        for _ in 0..random.below(3) {
            let range = range(random);
            world.skip_inbound.push(range);
        }
        for _ in 0..random.below(8) {
            let connection = world.any_connection(random);
            world.standing.insert(connection);
        }
        for _ in 0..random.below(8) {
            let connection = world.any_connection(random);
            let phase = random.pick(&PHASES);
            world.probes.insert(connection, phase);
        }
        world
    }

    pub(super) fn flags(&self) -> u32 {
        [
            (self.active, PodConfig::ACTIVE),
            (self.enrolling, PodConfig::ENROLLING),
            (self.fail_open, PodConfig::FAIL_OPEN),
            (self.leaving, PodConfig::LEAVING),
        ]
        .iter()
        .filter(|(set, _)| *set)
        .fold(0, |flags, (_, bit)| flags | bit)
    }

    /// Connections that nobody knows pass.
    pub(super) fn is_lenient(&self) -> bool {
        self.enrolling || self.fail_open || self.leaving
    }

    pub(super) fn skips_inbound(&self, port: u16) -> bool {
        within(&self.skip_inbound, port)
    }

    /// Connections of the pod to this place are never captured.
    pub(super) fn excepts_outbound(&self, place: SocketAddr) -> bool {
        let link_local = match place.ip().to_canonical() {
            IpAddr::V4(ip) => ip.is_link_local(),
            IpAddr::V6(ip) => ip.is_unicast_link_local(),
        };
        link_local || within(&self.skip_outbound, place.port())
    }

    pub(super) fn our_listener(&self, direction: u32, family: u32) -> bool {
        self.listeners[direction as usize][family as usize]
    }

    pub(super) fn owner(&self, family: u32, connection: &Connection) -> Option<Owner> {
        let found = self.sockets.owners.get(connection);
        found
            .filter(|found| found.family == family)
            .map(|found| found.owner)
    }

    pub(super) fn somebody_listens(&self, family: u32, at: SocketAddr) -> bool {
        self.sockets.servers.iter().any(|server| {
            let all = server.at.ip().is_unspecified();
            let hears = match server.at {
                SocketAddr::V4(_) => family == V4,
                SocketAddr::V6(_) => family == V6 || (all && !server.only_v6),
            };
            hears && server.at.port() == at.port() && (all || server.at.ip() == at.ip())
        })
    }

    /// One that somebody may know.
    fn any_connection(&self, random: &mut Random) -> Connection {
        if random.percent(50) && !self.sockets.owners.is_empty() {
            let at = random.below(self.sockets.owners.len());
            if let Some((connection, _)) = self.sockets.owners.iter().nth(at) {
                return *connection;
            }
        }
        let place = Place::draw(random);
        let local = SocketAddr::new(place.pod, random.pick(&LOCAL_PORTS));
        Connection::new(
            local,
            SocketAddr::new(random.pick(&place.remotes), random.pick(&REMOTE_PORTS)),
        )
    }

    /// Worlds with one thing less.
    pub(super) fn smaller(&self) -> impl Iterator<Item = Self> + use<> {
        let mut smaller = Vec::new();
        let mut without = |change: &dyn Fn(&mut Self)| {
            let mut world = self.clone();
            change(&mut world);
            if format!("{world:?}") != format!("{self:?}") {
                smaller.push(world);
            }
        };
        without(&|world| world.standing.clear());
        without(&|world| world.probes.clear());
        without(&|world| world.skip_outbound.clear());
        without(&|world| world.skip_inbound.clear());
        without(&|world| world.listeners = [[true; 2]; 2]);
        without(&|world| world.active = true);
        without(&|world| world.enrolling = false);
        without(&|world| world.fail_open = false);
        without(&|world| world.leaving = false);
        for connection in &self.standing {
            without(&|world| {
                world.standing.remove(connection);
            });
        }
        for connection in self.probes.keys() {
            without(&|world| {
                world.probes.remove(connection);
            });
        }
        smaller.into_iter()
    }
}

impl fmt::Debug for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            active,
            enrolling,
            fail_open,
            leaving,
            skip_outbound,
            skip_inbound,
            listeners: [outbound, inbound],
            standing,
            probes,
            // The same in every world.
            sockets: _,
        } = self;
        write!(
            f,
            "active {active}, enrolling {enrolling}, fail-open {fail_open}, leaving {leaving}, \
             skips out {skip_outbound:?} in {skip_inbound:?}, listeners (v4, v6) out {outbound:?} \
             in {inbound:?}, standing {standing:?}, probes {probes:?}"
        )
    }
}

fn within(ranges: &[(u16, u16)], port: u16) -> bool {
    ranges
        .iter()
        .any(|(first, last)| (*first..=*last).contains(&port))
}

fn range(random: &mut Random) -> (u16, u16) {
    let ports = [22, 80, 443, 4191, 9000, 15008, 40_000, 42_000, 43_001];
    let first = random.pick(&ports);
    (first, first + random.below(3) as u16)
}

pub(super) const LOCAL_PORTS: [u16; 8] = [80, 81, 443, 9000, 9001, 15008, 43_000, 50_000];
pub(super) const REMOTE_PORTS: [u16; 7] = [80, 443, 15008, 40_000, 40_001, 42_000, 65_535];

/// Addresses that go together: of a family, and of a kind of interface.
#[derive(Clone)]
struct Place {
    pod: IpAddr,
    remotes: [IpAddr; 4],
    ethernet: bool,
}

impl Place {
    fn draw(random: &mut Random) -> Self {
        let ethernet = random.percent(80);
        let [pod, remotes @ ..] = match (random.percent(50), ethernet) {
            (true, true) => [POD_V4, CLIENT_V4, NODE_V4, FAR_V4, LINK_LOCAL_V4],
            (false, true) => [POD_V6, CLIENT_V6, NODE_V6, FAR_V6, LINK_LOCAL_V6],
            (true, false) => BARE_V4,
            (false, false) => BARE_V6,
        };
        Self {
            pod,
            remotes,
            ethernet,
        }
    }
}

const fn v4(a: u8, b: u8, c: u8, d: u8) -> IpAddr {
    IpAddr::V4(std::net::Ipv4Addr::new(a, b, c, d))
}

const fn v6(a: u16, b: u16, c: u16, h: u16) -> IpAddr {
    IpAddr::V6(std::net::Ipv6Addr::new(a, b, c, 0, 0, 0, 0, h))
}

/// Routed to nowhere: what is asked from there stays a request.
pub(super) const FAR_V4: IpAddr = v4(10, 78, 66, 6);
pub(super) const FAR_V6: IpAddr = v6(0xfd78, 0x66, 0, 6);
const LINK_LOCAL_V4: IpAddr = v4(169, 254, 7, 7);
const LINK_LOCAL_V6: IpAddr = v6(0xfe80, 0, 0, 7);

/// BPF_PROG_TEST_RUN takes the protocol from bytes 12 and 13 of what it is given, always. In a
/// packet without link header the source's address lies there, so it has to be such an address.
const BARE_V4: [IpAddr; 5] = [
    v4(8, 0, 2, 2),
    v4(8, 0, 1, 2),
    v4(8, 0, 2, 1),
    v4(8, 0, 66, 6),
    LINK_LOCAL_V4,
];
const BARE_V6: [IpAddr; 5] = [
    v6(0xfd78, 2, 0x86dd, 2),
    v6(0xfd78, 1, 0x86dd, 2),
    v6(0xfd78, 2, 0x86dd, 1),
    v6(0xfd78, 0x66, 0x86dd, 6),
    v6(0xfe80, 0, 0x86dd, 7),
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    /// tc ingress.
    In,
    /// tc egress.
    Out,
}

/// A packet at a hook.
#[derive(Clone)]
pub(super) struct Case {
    pub(super) direction: Direction,
    /// With a link header of 14 bytes, or none.
    pub(super) ethernet: bool,
    pub(super) mark: u32,
    pub(super) frame: Vec<u8>,
}

/// The least that BPF_PROG_TEST_RUN takes.
const SHORTEST: usize = 14;

impl Case {
    pub(super) fn draw(random: &mut Random, world: &World) -> Self {
        let direction = random.pick(&[Direction::In, Direction::Out]);
        let place = Place::draw(random);
        let (source, destination) = ends(random, world, direction, &place);
        let mut frame = Vec::new();
        if place.ethernet {
            frame.extend(match random.below(100) {
                0..=93 => vec![0; 6],
                94..=95 => vec![0xff; 6],
                _rest => random.bytes(6),
            });
            frame.extend([0; 6]);
            if random.percent(4) {
                for _ in 0..=random.below(3) {
                    frame.extend(random.pick(&[[0x81, 0], [0x88, 0xa8]]));
                    frame.extend([0, random.pick(&[0, 0, 5])]);
                }
            }
            frame.extend(match (random.below(100), source) {
                (0, _) => [0x08, 0x06],
                (1, _) => [0, random.byte()],
                (2, _) => [random.byte(), random.byte()],
                (3, _) => random.pick(&[[0x86, 0xdd], [0x08, 0]]),
                (_usual, SocketAddr::V4(_)) => [0x08, 0],
                (_usual, SocketAddr::V6(_)) => [0x86, 0xdd],
            });
        }
        frame.extend(network(random, source, destination));
        if random.percent(8) {
            frame.truncate(SHORTEST + random.below(frame.len() - SHORTEST));
        }
        if random.percent(12) {
            for _ in 0..=random.below(3) {
                let at = random.below(frame.len());
                // Mostly a flipped bit: a lie that looks like the truth.
                frame[at] = if random.percent(70) {
                    frame[at] ^ 1 << random.below(8)
                } else {
                    random.byte()
                };
            }
        }
        if random.percent(1) {
            let from = SHORTEST.min(frame.len());
            let noise = random.bytes(frame.len() - from);
            frame[from..].copy_from_slice(&noise);
        }
        Self {
            direction,
            ethernet: place.ethernet,
            mark: match random.below(100) {
                0..=87 => 0,
                88..=92 => OUR_MARK,
                93..=97 => CAPTURE_MARK,
                _rest => random.next() as u32,
            },
            frame,
        }
    }

    /// An Ethernet frame written in hex.
    pub(super) fn kept(direction: Direction, hex: &str) -> Result<Self> {
        let bytes = hex.as_bytes().chunks(2).map(|pair| {
            let text = std::str::from_utf8(pair)?;
            u8::from_str_radix(text, 16).with_context(|| hex.to_owned())
        });
        Ok(Self {
            direction,
            ethernet: true,
            mark: 0,
            frame: bytes.collect::<Result<_>>()?,
        })
    }

    /// What lies behind the link header.
    pub(super) fn packet(&self) -> &[u8] {
        if self.ethernet {
            &self.frame[SHORTEST..]
        } else {
            &self.frame
        }
    }

    /// As the kernel reads it: a number below 0x600 is a length (802.3), and no protocol of ours.
    pub(super) fn ethertype(&self) -> u16 {
        match u16::from_be_bytes([self.frame[12], self.frame[13]]) {
            0..0x600 => 4,
            ethertype => ethertype,
        }
    }

    /// The run's device is lo, whose address is zero; a group's address is everybody's.
    pub(super) fn is_for_somebody_else(&self) -> bool {
        self.frame[0] & 1 == 0 && self.frame[..6] != [0; 6]
    }

    /// Packets with a little less in them.
    pub(super) fn smaller(&self) -> impl Iterator<Item = Self> + use<> {
        let mut smaller = Vec::new();
        let whole = self.frame.len();
        for less in [whole / 2, whole / 4, 8, 4, 1] {
            if less > 0 && whole >= SHORTEST + less {
                let mut case = self.clone();
                case.frame.truncate(whole - less);
                smaller.push(case);
            }
        }
        if self.mark != 0 {
            smaller.push(Self {
                mark: 0,
                ..self.clone()
            });
        }
        for at in (0..whole).filter(|at| self.frame[*at] != 0) {
            let mut case = self.clone();
            case.frame[at] = 0;
            smaller.push(case);
        }
        smaller.into_iter()
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let link = if self.ethernet { "Ethernet" } else { "bare" };
        write!(f, "{:?}, {link}, mark {:#x}, ", self.direction, self.mark)?;
        self.frame
            .iter()
            .try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Source and destination: of a connection that somebody knows, mostly.
fn ends(
    random: &mut Random,
    world: &World,
    direction: Direction,
    place: &Place,
) -> (SocketAddr, SocketAddr) {
    let here = |connection: &Connection| {
        connection.local.is_ipv4() == place.pod.is_ipv4() && place.ethernet
    };
    let sockets: Vec<_> = world.sockets.owners.keys().filter(|c| here(c)).collect();
    let others: Vec<_> = world.standing.iter().chain(world.probes.keys()).collect();
    let known = match random.below(100) {
        0..35 if !sockets.is_empty() => Some(*random.pick(&sockets)),
        35..65 if !others.is_empty() => Some(*random.pick(&others)),
        _rest => None,
    };
    let same_kind = |connection: &Connection| {
        connection.local.is_ipv4() == place.pod.is_ipv4()
            && place.ethernet == !is_bare(connection.local.ip())
    };
    let Connection { local, remote } = known.filter(same_kind).unwrap_or_else(|| {
        Connection::new(
            SocketAddr::new(place.pod, random.pick(&LOCAL_PORTS)),
            SocketAddr::new(random.pick(&place.remotes), random.pick(&REMOTE_PORTS)),
        )
    });
    // Some travel the wrong way round: what comes from the pod's own sockets' far ends.
    let (source, destination) = match (direction, random.percent(15)) {
        (Direction::In, false) | (Direction::Out, true) => (remote, local),
        (Direction::Out, false) | (Direction::In, true) => (local, remote),
    };
    let mapped = |end: SocketAddr| match end.ip() {
        IpAddr::V4(ip) => SocketAddr::new(ip.to_ipv6_mapped().into(), end.port()),
        IpAddr::V6(_) => end,
    };
    // Addresses that never appear on a wire (RFC 4291), unless somebody puts them there.
    if place.ethernet && random.percent(2) {
        (mapped(source), mapped(destination))
    } else {
        (source, destination)
    }
}

fn is_bare(ip: IpAddr) -> bool {
    BARE_V4.contains(&ip) || BARE_V6.contains(&ip)
}

/// An IP packet.
fn network(random: &mut Random, source: SocketAddr, destination: SocketAddr) -> Vec<u8> {
    let transport = transport(random, source.port(), destination.port());
    let protocol = match random.below(100) {
        0..=93 => 6,
        94..=96 => random.pick(&[1, 17, 58, 59, 50, 132]),
        _rest => random.byte(),
    };
    match (source.ip(), destination.ip()) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let options = match random.below(100) {
                0..=79 => 0,
                _rest => 4 * random.below(11),
            };
            let words = if random.percent(97) {
                5 + options / 4
            } else {
                random.below(16)
            };
            let place: u16 = match random.below(100) {
                0..=69 => 0x4000,
                70..=89 => 0,
                90..=92 => 0x2000,
                93..=94 => random.below(100) as u16,
                _rest => random.next() as u16 & 0xc000,
            };
            let length = lying(random, 20 + options + transport.len());
            let mut ip = vec![0x40 | words as u8, random.byte()];
            ip.extend(length.to_be_bytes());
            ip.extend([0, 7]);
            ip.extend(place.to_be_bytes());
            ip.extend([64, protocol, 0, 0]);
            ip.extend(source.octets());
            ip.extend(destination.octets());
            ip.extend(if random.percent(50) {
                vec![1; options]
            } else {
                random.bytes(options)
            });
            ip.extend(transport);
            ip
        }
        (source, destination) => {
            let octets = |ip| match ip {
                IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
                IpAddr::V6(ip) => ip.octets(),
            };
            let (first, mut body) = extensions(random, protocol);
            body.extend(transport);
            let length = lying(random, body.len());
            // The class's first bits make a bare packet one for a group, or for another station.
            let mut ip = vec![0x60 | (random.below(100) < 40) as u8, 0, 0, 0];
            ip.extend(length.to_be_bytes());
            ip.extend([first, 64]);
            ip.extend(octets(source));
            ip.extend(octets(destination));
            ip.extend(body);
            ip
        }
    }
}

/// A chain of extension headers, and the number of its first.
fn extensions(random: &mut Random, last: u8) -> (u8, Vec<u8>) {
    let count = match random.below(100) {
        0..=74 => 0,
        75..=92 => 1 + random.below(4),
        _rest => 5 + random.below(6),
    };
    let mut kinds: Vec<u8> = (0..count)
        .map(|_| match random.below(100) {
            0..=9 => 44,
            10..=19 => 51,
            20..=29 => 43,
            30..=59 => 0,
            _rest => 60,
        })
        .collect();
    kinds.push(last);
    let mut chain = Vec::new();
    for pair in kinds.windows(2) {
        let units = if random.percent(80) {
            0
        } else {
            random.below(4)
        };
        let (length, told) = match pair[0] {
            44 => (8, random.byte()),
            // Counts in fours, less two.
            51 => (8 + 4 * units, units as u8),
            _others => (8 + 8 * units, units as u8),
        };
        let told = if random.percent(96) {
            told
        } else {
            random.byte()
        };
        let mut header = vec![pair[1], told];
        header.extend(if random.percent(50) {
            vec![0; length - 2]
        } else {
            random.bytes(length - 2)
        });
        chain.extend(header);
    }
    (kinds[0], chain)
}

fn transport(random: &mut Random, source: u16, destination: u16) -> Vec<u8> {
    const SYN: u8 = 2;
    const RST: u8 = 4;
    const ACK: u8 = 16;
    let flags = match random.below(100) {
        0..=39 => SYN,
        40..=69 => ACK,
        70..=74 => SYN | ACK,
        75..=79 => RST,
        80..=83 => RST | ACK,
        84..=87 => 1 | ACK,
        88 => 0,
        _rest => random.byte(),
    };
    let options = match random.below(100) {
        0..=69 => 0,
        _rest => 4 * random.below(11),
    };
    let words = if random.percent(95) {
        5 + options / 4
    } else {
        random.below(16)
    };
    let mut tcp = Vec::new();
    tcp.extend(source.to_be_bytes());
    tcp.extend(destination.to_be_bytes());
    tcp.extend([0, 0, 3, 232, 0, 0, 7, 208]);
    tcp.extend([(words << 4) as u8, flags, 255, 255, 0, 0, 0, 0]);
    tcp.extend(vec![1; options]);
    if random.percent(45) {
        let payload = random.below(60);
        tcp.extend(vec![b'x'; payload]);
    }
    tcp
}

/// A length field, right most of the time.
fn lying(random: &mut Random, length: usize) -> u16 {
    match random.below(100) {
        0..=91 => length as u16,
        92..=95 => random.below(length + 1) as u16,
        _rest => random.next() as u16,
    }
}

//! What becomes of a packet, as the rules of the design say it. Numbers in comments are theirs.
//!
//! Plain and slow on purpose: no map, no kernel, no constant of the programs. It is read from the
//! top of each function like the text of a rule. Where several things are wrong with a packet, the
//! reason is the first that a reader meets who goes from the outside in: the mark, the link, the
//! network, the transport, the pod, the connection.
//!
//! Two things are decided here that the rules leave open. Length fields of IP headers are the
//! stack's to check: it drops what they contradict, wherever the packet goes, so only bytes count.
//! And a packet that says it is not TCP is nobody's concern, whole or not; a packet that says it
//! is TCP must have all of its TCP header.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use picomesh_common::{
    Counter,
    config::{INBOUND, OUTBOUND, TUNNEL_PORT, V4, V6},
};

use super::packets::{Case, Connection, Direction, Owner, Phase, World};
use crate::topology::CAPTURE_MARK;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Goes on as if we were not there.
    Pass,
    /// To our listener of this direction.
    Captured,
    /// And the sender may know.
    Dropped,
    /// As if on the wire.
    Lost,
}

pub(super) struct Judgement {
    pub(super) verdict: Verdict,
    pub(super) counts: Option<Counter>,
    /// One of [`WAYS`].
    pub(super) why: &'static str,
    /// Stood before the pod was enrolled, and does no longer: a new connection has its tuple.
    pub(super) forgets: Option<Connection>,
}

/// Bits of a TCP header's flags.
const SYN: u8 = 2;
const ACK: u8 = 16;

const TCP: u8 = 6;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
/// What the kernel walks through on its way to TCP: hop-by-hop, routing, fragment, AH and
/// destination options.
const EXTENSIONS: [u8; 5] = [0, 43, FRAGMENT, AUTHENTICATION, 60];
/// Rule 2: "walked, bounded".
const MOST_EXTENSIONS: usize = 8;

macro_rules! ways {
    ($($name:ident = $text:literal;)*) => {
        $(const $name: &str = $text;)*
        /// Every way through the rules that such a run can take.
        pub(super) const WAYS: &[&str] = &[$($name),*];
    };
}

ways! {
    FOREIGN_MARK = "rule 3: from outside, with the capture mark";
    ETHERTYPE = "rule 2: neither ARP nor IPv4 nor IPv6";
    ARP = "rule 2: ARP";
    NOT_TCP = "rule 13: not TCP";
    V4_CUT = "rule 2: the IPv4 header is not whole";
    V4_LIES = "rule 2: the IPv4 header's version or length is none";
    V4_FRAGMENT = "rule 2: an IPv4 fragment of TCP";
    V6_LIES = "rule 2: the IPv6 header's version is none";
    V6_FRAGMENT = "rule 2: an IPv6 fragment of TCP";
    EXTENSION_CUT = "rule 2: an extension header is not whole";
    EXTENSIONS_MANY = "rule 2: too many extension headers";
    TCP_CUT = "rule 2: the TCP header is not whole";
    TCP_LIES = "rule 2: the TCP header's length is none";
    OTHER_HOST = "a frame for another station, which the kernel drops";
    INACTIVE = "rule 5: the slot is not active";
    IN_SKIPPED = "rule 13: a SYN to a port that is skipped";
    IN_PROBE = "rule 9: a socket of the host is dialling this tuple";
    IN_LEAVING = "rule 12: leaving, nothing new is captured";
    IN_REFUSED = "rule 10: nobody listens there";
    IN_OPEN = "rule 5: no inbound listener, and fail-open is set";
    IN_DOWN = "rule 5: no inbound listener";
    IN_CAPTURED = "rule 7: a SYN to a captured port";
    IN_OURS = "rule 4: for a socket of ours, or a connection to a listener of ours";
    IN_PROBED = "rule 9: for the application's end of a probe";
    IN_OVER = "rule 4: for a connection that is over, which may be gone a moment later";
    IN_TAKEN = "rule 4: for a socket whose far end is ours, from outside";
    IN_LENIENT = "rule 12: who stood before is not known yet, or no matter";
    IN_ANSWER = "rule 13: the answer to a connection that was never captured";
    IN_STANDING = "rule 4: for a connection that stood before";
    IN_PROBING = "rule 9: for a socket that a live probe made";
    IN_STRANGER = "rule 4: for an application's socket that neither stood before nor is a probe's";
    IN_NOBODY = "rule 2: nobody owns it, so it may answer a SYN cookie";
    IN_NOBODY_DOWN = "rule 5: nobody owns it, and no inbound listener";
    OUT_EXCEPTED = "rule 13: a SYN to a skipped port or a link-local address";
    OUT_LEAVING = "rule 12: leaving, nothing new is taken";
    OUT_OPEN = "rule 5: no outbound listener, and fail-open is set";
    OUT_DOWN = "rule 5: no outbound listener";
    OUT_CAPTURED = "rule 7: a SYN to a captured port, from inside";
    OUT_FAR_END = "rule 4: its far end is a socket of ours";
    OUT_PROBE = "rule 9: the answer to a probe";
    OUT_STANDING = "rule 12: of a connection that stood before";
    OUT_LENIENT = "rule 12: of an unknown connection while these pass";
    OUT_ANSWER = "rule 13: the answer from a skipped port";
    OUT_SKIPPED = "rule 13: of a connection that was never captured";
    OUT_KERNEL = "rule 10: an empty answer of the kernel's own";
    OUT_UNKNOWN = "rule 4: of a connection that nobody knows";
}

/// Of a way that newer kernels do not run: they want a whole header before they run anything.
const V6_CUT: &str = "rule 2: the IPv6 header is not whole";

fn pass(why: &'static str) -> Judgement {
    Judgement {
        verdict: Verdict::Pass,
        counts: None,
        why,
        forgets: None,
    }
}

fn pass_counted(counter: Counter, why: &'static str) -> Judgement {
    Judgement {
        counts: Some(counter),
        ..pass(why)
    }
}

fn dropped(counter: Counter, why: &'static str) -> Judgement {
    Judgement {
        verdict: Verdict::Dropped,
        ..pass_counted(counter, why)
    }
}

fn lost(counter: Counter, why: &'static str) -> Judgement {
    Judgement {
        verdict: Verdict::Lost,
        ..pass_counted(counter, why)
    }
}

fn captured(counts: Option<Counter>, why: &'static str) -> Judgement {
    Judgement {
        verdict: Verdict::Captured,
        counts,
        ..pass(why)
    }
}

pub(super) fn judge(world: &World, case: &Case) -> Judgement {
    if case.direction == Direction::In && case.mark == CAPTURE_MARK {
        return dropped(Counter::ForeignMark, FOREIGN_MARK);
    }
    let segment = match read(case) {
        Ok(segment) => segment,
        Err(judgement) => return judgement,
    };
    if case.direction == Direction::In && case.is_for_somebody_else() {
        return pass(OTHER_HOST);
    }
    if !world.active {
        return match case.direction {
            Direction::In => dropped(Counter::Inactive, INACTIVE),
            Direction::Out => lost(Counter::Inactive, INACTIVE),
        };
    }
    match (case.direction, segment.asks_for_a_connection()) {
        (Direction::In, true) => asked_from_outside(world, &segment),
        (Direction::In, false) => from_outside(world, &segment),
        (Direction::Out, true) => asked_from_inside(world, &segment),
        (Direction::Out, false) => from_inside(world, &segment),
    }
}

/// The part of a TCP segment that matters.
struct Segment {
    from: SocketAddr,
    to: SocketAddr,
    flags: u8,
    family: u32,
    /// Anything behind the TCP header.
    empty: bool,
}

impl Segment {
    fn asks_for_a_connection(&self) -> bool {
        self.flags & SYN != 0 && self.flags & ACK == 0
    }

    /// As a socket at the destination would name it.
    fn at_destination(&self) -> Connection {
        Connection::new(self.to, self.from)
    }

    /// As a socket at the source would name it.
    fn at_source(&self) -> Connection {
        Connection::new(self.from, self.to)
    }
}

fn asked_from_outside(world: &World, segment: &Segment) -> Judgement {
    if world.skips_inbound(segment.to.port()) {
        return pass(IN_SKIPPED);
    }
    if world.probes.get(&segment.at_destination()) == Some(&Phase::Dialling) {
        return pass_counted(Counter::ProbePassed, IN_PROBE);
    }
    if world.leaving {
        return pass(IN_LEAVING);
    }
    // HBONE for the pod's own address is ours, though no application listens there.
    let hbone = segment.to.port() == TUNNEL_PORT;
    if !hbone && !world.somebody_listens(segment.family, segment.to) {
        return pass_counted(Counter::RefusedByKernel, IN_REFUSED);
    }
    if !world.our_listener(INBOUND, segment.family) {
        return if world.fail_open {
            pass_counted(Counter::FailedOpen, IN_OPEN)
        } else {
            dropped(Counter::NoInboundListener, IN_DOWN)
        };
    }
    captured(Some(Counter::CapturedInbound), IN_CAPTURED)
}

fn from_outside(world: &World, segment: &Segment) -> Judgement {
    let connection = segment.at_destination();
    let owner = world.owner(segment.family, &connection);
    match owner {
        // By way of mesh1, where nobody but us is found if it was closed a moment ago.
        Some(Owner::Ours | Owner::OurRequest) => return captured(None, IN_OURS),
        Some(Owner::Probed) => return pass(IN_PROBED),
        Some(Owner::Taken) => return dropped(Counter::NotStanding, IN_TAKEN),
        Some(Owner::Application | Owner::ItsRequest | Owner::Over) | None => {}
    }
    if world.is_lenient() || world.skips_inbound(segment.to.port()) {
        return pass(IN_LENIENT);
    }
    if owner == Some(Owner::Over) {
        return captured(None, IN_OVER);
    }
    let probe = world.probes.get(&connection);
    if owner == Some(Owner::Application) {
        if world.excepts_outbound(segment.from) {
            return pass(IN_ANSWER);
        }
        if world.standing.contains(&connection) {
            return pass(IN_STANDING);
        }
    }
    // A probe that has just closed may still end the socket it made, and make none.
    let alive = match probe {
        Some(Phase::Dialling | Phase::Established) => true,
        Some(Phase::Closing) => owner.is_some(),
        Some(Phase::DiallingTooLong | Phase::ClosedLongAgo) | None => false,
    };
    if alive {
        return pass(IN_PROBING);
    }
    if owner.is_some() {
        return dropped(Counter::NotStanding, IN_STRANGER);
    }
    if world.our_listener(INBOUND, segment.family) {
        captured(None, IN_NOBODY)
    } else {
        dropped(Counter::NoInboundListener, IN_NOBODY_DOWN)
    }
}

fn asked_from_inside(world: &World, segment: &Segment) -> Judgement {
    if world.excepts_outbound(segment.to) {
        return pass(OUT_EXCEPTED);
    }
    if world.leaving {
        return pass(OUT_LEAVING);
    }
    if !world.our_listener(OUTBOUND, segment.family) {
        return if world.fail_open {
            pass_counted(Counter::FailedOpen, OUT_OPEN)
        } else {
            lost(Counter::NoOutboundListener, OUT_DOWN)
        };
    }
    Judgement {
        forgets: Some(segment.at_source()),
        ..captured(Some(Counter::CapturedOutbound), OUT_CAPTURED)
    }
}

/// None of these packets has a socket of its own, so none can be ours or be known by it.
fn from_inside(world: &World, segment: &Segment) -> Judgement {
    // Only a socket of ours is at home at an address out there.
    if world
        .owner(segment.family, &segment.at_destination())
        .is_some()
    {
        return captured(None, OUT_FAR_END);
    }
    let connection = segment.at_source();
    match world.probes.get(&connection) {
        Some(Phase::Dialling | Phase::Established | Phase::Closing) => return pass(OUT_PROBE),
        Some(Phase::DiallingTooLong | Phase::ClosedLongAgo) | None => {}
    }
    if world.standing.contains(&connection) {
        return pass(OUT_STANDING);
    }
    if world.is_lenient() {
        return pass(OUT_LENIENT);
    }
    if world.skips_inbound(segment.from.port()) {
        return pass(OUT_ANSWER);
    }
    if world.excepts_outbound(segment.to) {
        return pass(OUT_SKIPPED);
    }
    if segment.empty {
        return pass(OUT_KERNEL);
    }
    dropped(Counter::UnknownSender, OUT_UNKNOWN)
}

/// Bytes that are taken from the front.
struct Rest<'a>(&'a [u8]);

impl<'a> Rest<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }
}

/// A segment, or what becomes of a packet that is none.
fn read(case: &Case) -> Result<Segment, Judgement> {
    const IPV4: u16 = 0x0800;
    const IPV6: u16 = 0x86dd;
    let rest = Rest(case.packet());
    match case.ethertype() {
        0x0806 => Err(pass(ARP)),
        IPV4 => read_v4(rest),
        IPV6 => read_v6(rest),
        _other => Err(dropped(Counter::UnknownEthertype, ETHERTYPE)),
    }
}

fn read_v4(mut rest: Rest<'_>) -> Result<Segment, Judgement> {
    let header = rest.take(20).ok_or(dropped(Counter::BadHeader, V4_CUT))?;
    let (version, words) = (header[0] / 16, usize::from(header[0] % 16));
    if version != 4 || words < 5 {
        return Err(dropped(Counter::BadHeader, V4_LIES));
    }
    if header[9] != TCP {
        return Err(pass(NOT_TCP));
    }
    let more_fragments = header[6] & 0x20 != 0;
    let offset = u16::from_be_bytes([header[6] & 0x1f, header[7]]);
    if more_fragments || offset > 0 {
        return Err(dropped(Counter::Fragment, V4_FRAGMENT));
    }
    let options = (words - 5) * 4;
    rest.take(options)
        .ok_or(dropped(Counter::BadHeader, V4_CUT))?;
    let address =
        |at: usize| IpAddr::from([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    read_tcp(rest, address(12), address(16), V4)
}

fn read_v6(mut rest: Rest<'_>) -> Result<Segment, Judgement> {
    let header = rest.take(40).ok_or(dropped(Counter::BadHeader, V6_CUT))?;
    if header[0] / 16 != 6 {
        return Err(dropped(Counter::BadHeader, V6_LIES));
    }
    let cut = || dropped(Counter::BadHeader, EXTENSION_CUT);
    let mut next = header[6];
    let mut in_fragment = false;
    let mut walked = 0;
    while EXTENSIONS.contains(&next) {
        // The fixed part of any of them; in a fragment's it ends with the offset.
        let head = rest.0.get(..4).ok_or_else(cut)?;
        let units = usize::from(head[1]);
        if walked == MOST_EXTENSIONS {
            return Err(dropped(Counter::TooManyExtensions, EXTENSIONS_MANY));
        }
        walked += 1;
        let length = match next {
            FRAGMENT => 8,
            AUTHENTICATION => (units + 2) * 4,
            _others => (units + 1) * 8,
        };
        if next == FRAGMENT {
            let offset = u16::from_be_bytes([head[2], head[3]]) / 8;
            // What follows is the middle of something; only its name can be told.
            if offset > 0 {
                let may_be_tcp = head[0] == TCP || EXTENSIONS.contains(&head[0]);
                return Err(if may_be_tcp {
                    dropped(Counter::Fragment, V6_FRAGMENT)
                } else {
                    pass(NOT_TCP)
                });
            }
            in_fragment = true;
        }
        next = head[0];
        // The last one may reach beyond the end, if it is not TCP that it hides.
        if rest.take(length).is_none() {
            rest.0 = &[];
        }
    }
    if next != TCP {
        return Err(pass(NOT_TCP));
    }
    if in_fragment {
        return Err(dropped(Counter::Fragment, V6_FRAGMENT));
    }
    let address = |at: usize| {
        let mut octets = [0; 16];
        octets.copy_from_slice(&header[at..at + 16]);
        IpAddr::V6(Ipv6Addr::from(octets))
    };
    read_tcp(rest, address(8), address(24), V6)
}

fn read_tcp(
    mut rest: Rest<'_>,
    from: IpAddr,
    to: IpAddr,
    family: u32,
) -> Result<Segment, Judgement> {
    let header = rest.take(20).ok_or(dropped(Counter::BadHeader, TCP_CUT))?;
    let words = usize::from(header[12] / 16);
    if words < 5 {
        return Err(dropped(Counter::BadHeader, TCP_LIES));
    }
    rest.take((words - 5) * 4)
        .ok_or(dropped(Counter::BadHeader, TCP_CUT))?;
    let port = |at: usize| u16::from_be_bytes([header[at], header[at + 1]]);
    Ok(Segment {
        from: SocketAddr::new(from, port(0)),
        to: SocketAddr::new(to, port(2)),
        flags: header[13],
        family,
        empty: rest.0.is_empty(),
    })
}

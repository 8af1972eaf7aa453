//! Attacks by hand: a TCP client without a stack, whose packets wear any shape.
//!
//! A hostile neighbour does not use the kernel's TCP: it sends frames. [`Shape`] is what it may do
//! to a packet, [`Forger`] opens a connection with packets of one shape and tells what came back.
//! The client's address must be nobody's, or that stack's RST ends the attempt.

use std::{
    io::{self, Read},
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use nix::libc;
use socket2::{Domain, Protocol, Socket, Type};

use crate::{
    Netns,
    raw::{self, ACK, PSH, RST, SYN, Segment, Tcp},
};

/// What an attacker does to every packet of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Shape {
    /// As any stack would send it.
    Plain,
    /// Four bytes of IPv4 options, all "no operation".
    IpOptions,
    /// Two fragments, the first with this many bytes of TCP (8: the flags lie in the second);
    /// `swapped` sends the second one first.
    Fragments { first: usize, swapped: bool },
    /// IPv6 extension headers of eight bytes each, by their numbers.
    Extensions(Vec<u8>),
    /// So many 802.1p tags of VLAN 0, which a stack strips.
    Vlan0(usize),
}

/// Without options.
const TCP_HEADER: usize = 20;

/// Number of IPv6's hop-by-hop options header.
pub const HOP_BY_HOP: u8 = 0;
/// Number of IPv6's destination options header.
pub const DESTINATION_OPTIONS: u8 = 60;

impl Shape {
    /// The frames that carry a segment in this shape, in the order in which they are sent.
    pub fn frames(&self, segment: &Segment, from: [u8; 6], to: [u8; 6]) -> Result<Vec<Vec<u8>>> {
        let segment = segment.clone();
        Ok(match self {
            Self::Plain => vec![segment.frame(from, to)?],
            Self::IpOptions => vec![segment.ip_options(&[1, 1, 1, 1]).frame(from, to)?],
            Self::Fragments { first, swapped } => {
                let segment = if TCP_HEADER + segment.payload.len() <= *first {
                    // Something must be left for the second one. A listener takes no data with a
                    // SYN, but it takes the SYN.
                    segment.payload(&[0; 40])
                } else {
                    segment
                };
                let mut frames = segment.fragments(from, to, *first)?;
                if *swapped {
                    frames.reverse();
                }
                frames.into()
            }
            Self::Extensions(headers) => {
                let worn = headers
                    .iter()
                    .fold(segment, |segment, header| segment.extension(*header));
                vec![worn.frame(from, to)?]
            }
            Self::Vlan0(tags) => vec![segment.vlan0(*tags).frame(from, to)?],
        })
    }
}

/// What an attempt to open a connection heard.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Heard {
    /// A SYN-ACK came.
    pub answered: bool,
    /// A RST came.
    pub reset: bool,
    /// What the other side said.
    pub data: Vec<u8>,
}

/// A client on a packet socket of one interface.
#[derive(Debug)]
pub struct Forger {
    socket: Socket,
    from: [u8; 6],
    to: [u8; 6],
}

/// How long an answer may take: everything lies on one machine.
const ANSWER: Duration = Duration::from_millis(400);

impl Forger {
    /// Speaks out of `interface` of `netns` to the Ethernet address `to`.
    pub fn new(netns: &Netns, interface: &str, to: [u8; 6]) -> Result<Self> {
        let from = netns.mac(interface)?;
        let socket = netns.run(|| -> Result<Socket> {
            let protocol = Protocol::from(i32::from((libc::ETH_P_ALL as u16).to_be()));
            let socket = Socket::new(Domain::PACKET, Type::RAW, Some(protocol))
                .context("open a packet socket (needs root)")?;
            raw::bind(&socket, interface)?;
            socket.set_read_timeout(Some(Duration::from_millis(20)))?;
            Ok(socket)
        })?;
        Ok(Self { socket, from, to })
    }

    /// The Ethernet address it speaks from.
    pub fn mac(&self) -> [u8; 6] {
        self.from
    }

    /// Sends one segment and forgets it.
    pub fn send(&self, shape: &Shape, segment: &Segment) -> Result<()> {
        for frame in shape.frames(segment, self.from, self.to)? {
            self.socket.send(&frame).context("send a frame")?;
        }
        Ok(())
    }

    /// A whole handshake and then `payload`; listens for a while to what comes.
    pub fn knock(
        &self,
        shape: &Shape,
        from: SocketAddr,
        to: SocketAddr,
        payload: &[u8],
    ) -> Result<Heard> {
        let mut heard = Heard::default();
        let sequence = 1_000_000;
        self.send(shape, &Segment::new(from, to, SYN).seq(sequence))?;
        let mut theirs = None;
        self.listen(from, to, |packet| {
            heard.reset |= packet.flags & RST != 0;
            if packet.flags & (SYN | ACK) == SYN | ACK && packet.ack == sequence + 1 {
                theirs = Some(packet.seq.wrapping_add(1));
            }
            heard.reset || theirs.is_some()
        })?;
        let Some(theirs) = theirs else {
            return Ok(heard);
        };
        heard.answered = true;
        // The first data completes the handshake too.
        let next = Segment::new(from, to, ACK | PSH)
            .seq(sequence + 1)
            .ack(theirs)
            .payload(payload);
        self.send(shape, &next)?;
        self.listen(from, to, |packet| {
            heard.reset |= packet.flags & RST != 0;
            // What is sent again is heard once.
            if packet.seq == theirs.wrapping_add(heard.data.len() as u32) {
                heard.data.extend(packet.payload);
            }
            heard.reset
        })?;
        Ok(heard)
    }

    /// Hands on what comes from `to` to `from`, until `enough` says so or time is up.
    fn listen(
        &self,
        from: SocketAddr,
        to: SocketAddr,
        mut enough: impl FnMut(&Tcp<'_>) -> bool,
    ) -> Result<()> {
        let start = Instant::now();
        let mut buffer = vec![0; 64 * 1024];
        while start.elapsed() < ANSWER {
            let length = match (&self.socket).read(&mut buffer) {
                Ok(length) => length,
                Err(e)
                    if matches!(
                        e.kind(),
                        io::ErrorKind::WouldBlock
                            | io::ErrorKind::TimedOut
                            | io::ErrorKind::Interrupted
                    ) =>
                {
                    continue;
                }
                Err(e) => return Err(e).context("read from the packet socket"),
            };
            if let Some(packet) = Tcp::parse(&buffer[..length])
                && (packet.src, packet.dst) == (to, from)
                && enough(&packet)
            {
                return Ok(());
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shape_but_the_plain_one_differs_from_it() -> Result<()> {
        let v4 = Segment::new("10.0.0.1:1".parse()?, "10.0.0.2:2".parse()?, SYN);
        let v6 = Segment::new("[fd00::1]:1".parse()?, "[fd00::2]:2".parse()?, SYN);
        let fragments = |first, swapped| Shape::Fragments { first, swapped };
        for (segment, shape, count, extra) in [
            (&v4, Shape::IpOptions, 1, 4),
            (&v4, fragments(16, false), 2, 34),
            (&v6, fragments(8, true), 2, 54 + 16),
            (&v6, fragments(24, false), 2, 54 + 16 + 40),
            (&v6, Shape::Extensions(vec![DESTINATION_OPTIONS; 3]), 1, 24),
            (&v4, Shape::Vlan0(2), 1, 8),
        ] {
            let plain = Shape::Plain.frames(segment, [1; 6], [2; 6])?;
            let worn = shape.frames(segment, [1; 6], [2; 6])?;
            let length = |frames: &[Vec<u8>]| frames.iter().map(Vec::len).sum::<usize>();
            assert_eq!(worn.len(), count, "{shape:?}");
            assert_eq!(length(&worn), length(&plain) + extra, "{shape:?}");
        }
        Ok(())
    }
}

//! Packets made by hand, for what no well-behaved stack sends: VLAN tags, IP options, extension
//! headers, fragments, forged tuples. And the reading half, for captures.

use std::{
    ffi::CString,
    io, mem,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::AsRawFd,
};

use anyhow::{Context, Result, bail, ensure};
use nix::libc;
use socket2::{Domain, Protocol, Socket, Type};

use crate::Netns;

pub const FIN: u8 = 0x01;
pub const SYN: u8 = 0x02;
pub const RST: u8 = 0x04;
pub const PSH: u8 = 0x08;
pub const ACK: u8 = 0x10;

/// A TCP segment to be built; `Default` is not offered because addresses matter.
#[derive(Clone, Debug)]
pub struct Segment {
    pub src: SocketAddr,
    pub dst: SocketAddr,
    pub seq: u32,
    pub ack: u32,
    pub flags: u8,
    pub payload: Vec<u8>,
    /// IPv4 options; padded to four bytes.
    pub ip_options: Vec<u8>,
    /// IPv6 extension headers between IP and TCP: (their own next-header number, their bytes with
    /// the first two left out).
    pub extensions: Vec<(u8, Vec<u8>)>,
    /// VLAN tags (TPID, TCI), outermost first.
    pub vlan: Vec<(u16, u16)>,
}

impl Segment {
    pub fn new(src: SocketAddr, dst: SocketAddr, flags: u8) -> Self {
        Self {
            src,
            dst,
            seq: 1000,
            ack: 0,
            flags,
            payload: Vec::new(),
            ip_options: Vec::new(),
            extensions: Vec::new(),
            vlan: Vec::new(),
        }
    }

    pub fn seq(mut self, seq: u32) -> Self {
        self.seq = seq;
        self
    }

    pub fn ack(mut self, ack: u32) -> Self {
        self.ack = ack;
        self
    }

    pub fn payload(mut self, payload: &[u8]) -> Self {
        self.payload = payload.to_vec();
        self
    }

    /// Four bytes of "no operation": the least that makes the header longer.
    pub fn ip_options(mut self, options: &[u8]) -> Self {
        self.ip_options = options.to_vec();
        self
    }

    /// `count` priority tags (802.1p, VLAN 0), which every stack strips.
    pub fn vlan0(mut self, count: usize) -> Self {
        self.vlan = vec![(0x8100, 0); count];
        self
    }

    /// A hop-by-hop or destination options header of eight bytes (PadN).
    pub fn extension(mut self, header: u8) -> Self {
        self.extensions.push((header, vec![1, 4, 0, 0, 0, 0]));
        self
    }

    /// The whole frame.
    pub fn frame(&self, from: [u8; 6], to: [u8; 6]) -> Result<Vec<u8>> {
        let (ethertype, packet) = self.packet()?;
        Ok(ethernet(from, to, &self.vlan, ethertype, &packet))
    }

    /// The same segment in two fragments, the first with `first` bytes of TCP (a multiple of 8).
    pub fn fragments(&self, from: [u8; 6], to: [u8; 6], first: usize) -> Result<[Vec<u8>; 2]> {
        ensure!(
            first.is_multiple_of(8),
            "a fragment's length is a multiple of 8, not {first}"
        );
        let tcp = self.tcp()?;
        ensure!(
            first < tcp.len(),
            "the first fragment would hold everything"
        );
        let part = |offset: usize, more: bool, bytes: &[u8]| -> Result<Vec<u8>> {
            let (ethertype, packet) = match (self.src.ip(), self.dst.ip()) {
                (IpAddr::V4(src), IpAddr::V4(dst)) => (
                    0x0800,
                    ipv4(src, dst, &self.ip_options, offset, more, bytes)?,
                ),
                (IpAddr::V6(src), IpAddr::V6(dst)) => {
                    let field = (offset as u16) | u16::from(more);
                    let mut inner = vec![6, 0];
                    inner.extend(field.to_be_bytes());
                    inner.extend(0x1234_5678_u32.to_be_bytes());
                    inner.extend(bytes);
                    (0x86dd, ipv6(src, dst, 44, &inner))
                }
                (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => {
                    bail!("{} and {} are of two families", self.src, self.dst)
                }
            };
            Ok(ethernet(from, to, &self.vlan, ethertype, &packet))
        };
        Ok([
            part(0, true, &tcp[..first])?,
            part(first, false, &tcp[first..])?,
        ])
    }

    fn packet(&self) -> Result<(u16, Vec<u8>)> {
        let tcp = self.tcp()?;
        match (self.src.ip(), self.dst.ip()) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                Ok((0x0800, ipv4(src, dst, &self.ip_options, 0, false, &tcp)?))
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                let mut inner = Vec::new();
                let mut headers = self.extensions.iter().peekable();
                let first = headers.peek().map_or(6, |(number, _)| *number);
                while let Some((_, body)) = headers.next() {
                    let next = headers.peek().map_or(6, |(number, _)| *number);
                    ensure!(
                        (body.len() + 2).is_multiple_of(8),
                        "an extension header's length is a multiple of 8"
                    );
                    inner.push(next);
                    inner.push(((body.len() + 2) / 8 - 1) as u8);
                    inner.extend(body);
                }
                inner.extend(tcp);
                Ok((0x86dd, ipv6(src, dst, first, &inner)))
            }
            (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => {
                bail!("{} and {} are of two families", self.src, self.dst)
            }
        }
    }

    fn tcp(&self) -> Result<Vec<u8>> {
        let mut tcp = Vec::with_capacity(20 + self.payload.len());
        tcp.extend(self.src.port().to_be_bytes());
        tcp.extend(self.dst.port().to_be_bytes());
        tcp.extend(self.seq.to_be_bytes());
        tcp.extend(self.ack.to_be_bytes());
        tcp.extend([5 << 4, self.flags]);
        tcp.extend(64_000_u16.to_be_bytes());
        tcp.extend([0; 4]);
        tcp.extend(&self.payload);
        let mut pseudo = Vec::new();
        match (self.src.ip(), self.dst.ip()) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                pseudo.extend(src.octets());
                pseudo.extend(dst.octets());
                pseudo.extend([0, 6]);
                pseudo.extend((tcp.len() as u16).to_be_bytes());
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                pseudo.extend(src.octets());
                pseudo.extend(dst.octets());
                pseudo.extend((tcp.len() as u32).to_be_bytes());
                pseudo.extend([0, 0, 0, 6]);
            }
            (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => {
                bail!("{} and {} are of two families", self.src, self.dst)
            }
        }
        let sum = checksum(&[&pseudo, &tcp]);
        tcp[16..18].copy_from_slice(&sum.to_be_bytes());
        Ok(tcp)
    }
}

/// A TCP packet as it was captured.
#[derive(Clone, Debug)]
pub struct Tcp<'a> {
    pub src: SocketAddr,
    pub dst: SocketAddr,
    pub seq: u32,
    pub ack: u32,
    pub flags: u8,
    pub payload: &'a [u8],
}

impl<'a> Tcp<'a> {
    /// Reads Ethernet, IPv4 or IPv6 without extension headers, and TCP; anything else is `None`.
    pub fn parse(frame: &'a [u8]) -> Option<Self> {
        let ethertype = u16::from_be_bytes(frame.get(12..14)?.try_into().ok()?);
        let ip = frame.get(14..)?;
        let (src, dst, segment): (IpAddr, IpAddr, &[u8]) = match ethertype {
            0x0800 => {
                if *ip.get(9)? != 6 {
                    return None;
                }
                let header = usize::from(ip.first()? & 0x0f) * 4;
                let length = usize::from(u16::from_be_bytes(ip.get(2..4)?.try_into().ok()?));
                let src: [u8; 4] = ip.get(12..16)?.try_into().ok()?;
                let dst: [u8; 4] = ip.get(16..20)?.try_into().ok()?;
                (src.into(), dst.into(), ip.get(header..length)?)
            }
            0x86dd => {
                if *ip.get(6)? != 6 {
                    return None;
                }
                let length = usize::from(u16::from_be_bytes(ip.get(4..6)?.try_into().ok()?));
                let src: [u8; 16] = ip.get(8..24)?.try_into().ok()?;
                let dst: [u8; 16] = ip.get(24..40)?.try_into().ok()?;
                (src.into(), dst.into(), ip.get(40..40 + length)?)
            }
            _ => return None,
        };
        let word = |at: usize| -> Option<u16> {
            Some(u16::from_be_bytes(
                segment.get(at..at + 2)?.try_into().ok()?,
            ))
        };
        let long = |at: usize| -> Option<u32> {
            Some(u32::from_be_bytes(
                segment.get(at..at + 4)?.try_into().ok()?,
            ))
        };
        let offset = usize::from(*segment.get(12)? >> 4) * 4;
        Some(Self {
            src: (src, word(0)?).into(),
            dst: (dst, word(2)?).into(),
            seq: long(4)?,
            ack: long(8)?,
            flags: *segment.get(13)?,
            payload: segment.get(offset..)?,
        })
    }
}

/// Sends whole frames out of an interface of a namespace, past everything but its driver.
pub fn send(netns: &Netns, interface: &str, frames: &[Vec<u8>]) -> Result<()> {
    netns.run(|| {
        let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(0)))
            .context("open a packet socket (needs root)")?;
        bind(&socket, interface)?;
        for frame in frames {
            socket
                .send(frame)
                .with_context(|| format!("send {} bytes out of {interface}", frame.len()))?;
        }
        Ok(())
    })
}

/// Sets IP options on a socket, as an unprivileged process may: its packets carry them.
pub fn set_ip_options(socket: &impl AsRawFd, options: &[u8]) -> io::Result<()> {
    // SAFETY: pointer and length describe `options`, which outlives the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IP,
            libc::IP_OPTIONS,
            options.as_ptr().cast(),
            options.len() as libc::socklen_t,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Binds a packet socket to an interface of the calling thread's namespace.
pub(crate) fn bind(socket: &Socket, interface: &str) -> Result<()> {
    let name = CString::new(interface)?;
    // SAFETY: `name` is a C string that outlives the call.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    ensure!(index != 0, "there is no interface {interface}");
    // SAFETY: all-zero bytes are a valid sockaddr_ll.
    let mut address: libc::sockaddr_ll = unsafe { mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
    address.sll_ifindex = index as i32;
    // SAFETY: pointer and length describe `address`, which outlives the call.
    let result = unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            size_of::<libc::sockaddr_ll>() as libc::socklen_t,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error()).with_context(|| format!("bind to {interface}"))
    }
}

fn ethernet(
    from: [u8; 6],
    to: [u8; 6],
    vlan: &[(u16, u16)],
    ethertype: u16,
    packet: &[u8],
) -> Vec<u8> {
    let mut frame = Vec::with_capacity(18 + packet.len());
    frame.extend(to);
    frame.extend(from);
    for (tpid, tci) in vlan {
        frame.extend(tpid.to_be_bytes());
        frame.extend(tci.to_be_bytes());
    }
    frame.extend(ethertype.to_be_bytes());
    frame.extend(packet);
    frame
}

fn ipv4(
    src: Ipv4Addr,
    dst: Ipv4Addr,
    options: &[u8],
    offset: usize,
    more: bool,
    payload: &[u8],
) -> Result<Vec<u8>> {
    let padded = options.len().next_multiple_of(4);
    ensure!(
        padded <= 40,
        "IPv4 has room for 40 bytes of options, not {padded}"
    );
    let header = 20 + padded;
    let mut ip = vec![0x40 | (header / 4) as u8, 0];
    ip.extend(((header + payload.len()) as u16).to_be_bytes());
    ip.extend(0x4242_u16.to_be_bytes());
    let fragment = (offset / 8) as u16 | if more { 0x2000 } else { 0 };
    ip.extend(fragment.to_be_bytes());
    ip.extend([64, 6, 0, 0]);
    ip.extend(src.octets());
    ip.extend(dst.octets());
    ip.extend(options);
    ip.resize(header, 0);
    let sum = checksum(&[&ip]);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    ip.extend(payload);
    Ok(ip)
}

fn ipv6(src: Ipv6Addr, dst: Ipv6Addr, next: u8, payload: &[u8]) -> Vec<u8> {
    let mut ip = vec![0x60, 0, 0, 0];
    ip.extend((payload.len() as u16).to_be_bytes());
    ip.extend([next, 64]);
    ip.extend(src.octets());
    ip.extend(dst.octets());
    ip.extend(payload);
    ip
}

/// The Internet checksum over several parts; all but the last have an even length.
fn checksum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0_u32;
    for part in parts {
        for pair in part.chunks(2) {
            sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
        }
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_reads_back_as_it_was_built() -> Result<()> {
        let segment = Segment::new("10.0.0.1:1234".parse()?, "10.0.0.2:80".parse()?, SYN)
            .seq(7)
            .payload(b"hello")
            .ip_options(&[1, 1, 1]);
        let frame = segment.frame([1; 6], [2; 6])?;
        let read = Tcp::parse(&frame).context("parse")?;
        assert_eq!((read.src, read.dst), (segment.src, segment.dst));
        assert_eq!(
            (read.seq, read.flags, read.payload),
            (7, SYN, &b"hello"[..])
        );
        // A checksum over a header that holds its checksum is zero.
        assert_eq!(checksum(&[&frame[14..14 + 24]]), 0);
        Ok(())
    }

    #[test]
    fn fragments_hold_the_whole_segment_between_them() -> Result<()> {
        let segment =
            Segment::new("[fd00::1]:1".parse()?, "[fd00::2]:2".parse()?, SYN).payload(b"abcdefgh");
        let [first, second] = segment.fragments([1; 6], [2; 6], 8)?;
        let (a, b) = (&first[14 + 40 + 8..], &second[14 + 40 + 8..]);
        assert_eq!([a, b].concat(), segment.tcp()?);
        assert!(segment.fragments([1; 6], [2; 6], 9).is_err());
        Ok(())
    }
}

//! Frames made by hand, and the packet socket that sends them.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    time::{Duration, Instant},
};

use anyhow::Result;
use nix::libc;

use crate::topology::{NODE_MAC, Netns, POD_MAC};

pub(crate) const SYN: u8 = 2;
pub(crate) const RST: u8 = 4;
pub(crate) const ACK: u8 = 16;

/// One TCP segment and everything around it that a test may want to be odd.
#[derive(Clone)]
pub(crate) struct Frame {
    pub(crate) source: SocketAddr,
    pub(crate) destination: SocketAddr,
    pub(crate) flags: u8,
    pub(crate) sequence: u32,
    pub(crate) acknowledged: u32,
    pub(crate) payload: Vec<u8>,
    /// VLAN-0 tags of type 0x8100 before the IP header.
    pub(crate) tags: usize,
    /// Bytes of IPv4 options (no-operations), or of IPv6 destination options.
    pub(crate) options: usize,
    /// Number of extension headers those options are spread over (IPv6).
    pub(crate) extensions: usize,
    pub(crate) to_mac: [u8; 6],
    pub(crate) from_mac: [u8; 6],
}

impl Frame {
    /// From the node's side of the pod's veth.
    pub(crate) fn to_pod(source: SocketAddr, destination: SocketAddr, flags: u8) -> Self {
        Self {
            source,
            destination,
            flags,
            sequence: 1000,
            acknowledged: if flags & ACK == 0 { 0 } else { 2000 },
            payload: Vec::new(),
            tags: 0,
            options: 0,
            extensions: 0,
            to_mac: POD_MAC,
            from_mac: NODE_MAC,
        }
    }

    /// As it is before the device has an address: for BPF_PROG_TEST_RUN, which runs on lo.
    pub(crate) fn bare(source: SocketAddr, destination: SocketAddr, flags: u8) -> Self {
        Self {
            to_mac: [0; 6],
            from_mac: [0; 6],
            ..Self::to_pod(source, destination, flags)
        }
    }

    pub(crate) fn payload(mut self, payload: &[u8]) -> Self {
        self.payload = payload.to_vec();
        self
    }

    pub(crate) fn tagged(mut self, tags: usize) -> Self {
        self.tags = tags;
        self
    }

    pub(crate) fn options(mut self, bytes: usize) -> Self {
        self.options = bytes;
        self.extensions = 1;
        self
    }

    pub(crate) fn extensions(mut self, count: usize) -> Self {
        self.options = 8 * count;
        self.extensions = count;
        self
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let tcp = self.tcp();
        match (self.source.ip(), self.destination.ip()) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let mut ip = v4_header(
                    source.octets(),
                    destination.octets(),
                    6,
                    0,
                    self.options,
                    tcp.len(),
                );
                ip.extend(tcp);
                self.framed(0x0800, &ip)
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                let mut body = Vec::new();
                for i in 0..self.extensions {
                    let next = if i + 1 == self.extensions { 6 } else { 60 };
                    // One PadN option fills the header.
                    body.extend([next, 0, 1, 4, 0, 0, 0, 0]);
                }
                body.extend(tcp);
                let first = if self.extensions > 0 { 60 } else { 6 };
                let ip = v6_header(source.octets(), destination.octets(), first, &body);
                self.framed(0x86dd, &ip)
            }
            _mixed => Vec::new(),
        }
    }

    /// Cut into two IP fragments, the first with `first` bytes (a multiple of eight) of TCP.
    pub(crate) fn fragments(&self, first: usize) -> [Vec<u8>; 2] {
        let tcp = self.tcp();
        let (head, tail) = tcp.split_at(first);
        match (self.source.ip(), self.destination.ip()) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                [(0x2000, head), ((first / 8) as u16, tail)].map(|(place, part)| {
                    let mut ip = v4_header(
                        source.octets(),
                        destination.octets(),
                        6,
                        place,
                        0,
                        part.len(),
                    );
                    ip.extend(part);
                    self.framed(0x0800, &ip)
                })
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => [(1u16, head), (first as u16, tail)]
                .map(|(place, part)| {
                    let mut body = vec![6, 0];
                    body.extend(place.to_be_bytes());
                    body.extend([0, 0, 0, 7]);
                    body.extend(part);
                    self.framed(
                        0x86dd,
                        &v6_header(source.octets(), destination.octets(), 44, &body),
                    )
                }),
            _mixed => [Vec::new(), Vec::new()],
        }
    }

    fn framed(&self, ethertype: u16, ip: &[u8]) -> Vec<u8> {
        let mut frame = Vec::new();
        frame.extend(self.to_mac);
        frame.extend(self.from_mac);
        for _ in 0..self.tags {
            frame.extend([0x81, 0x00, 0, 0]);
        }
        frame.extend(ethertype.to_be_bytes());
        frame.extend(ip);
        frame
    }

    fn tcp(&self) -> Vec<u8> {
        let mut tcp = Vec::new();
        tcp.extend(self.source.port().to_be_bytes());
        tcp.extend(self.destination.port().to_be_bytes());
        tcp.extend(self.sequence.to_be_bytes());
        tcp.extend(self.acknowledged.to_be_bytes());
        tcp.extend([0x50, self.flags, 0xff, 0xff, 0, 0, 0, 0]);
        tcp.extend(&self.payload);
        let mut pseudo = Vec::new();
        for ip in [self.source.ip(), self.destination.ip()] {
            match ip {
                IpAddr::V4(ip) => pseudo.extend(ip.octets()),
                IpAddr::V6(ip) => pseudo.extend(ip.octets()),
            }
        }
        pseudo.extend((tcp.len() as u32).to_be_bytes());
        pseudo.extend([0, 0, 0, 6]);
        pseudo.extend(&tcp);
        let sum = checksum(&pseudo);
        tcp[16..18].copy_from_slice(&sum.to_be_bytes());
        tcp
    }
}

fn v4_header(
    source: [u8; 4],
    destination: [u8; 4],
    protocol: u8,
    place: u16,
    options: usize,
    body: usize,
) -> Vec<u8> {
    let mut ip = vec![0x40 | (5 + options / 4) as u8, 0];
    ip.extend(((20 + options + body) as u16).to_be_bytes());
    ip.extend([0, 7]);
    ip.extend(place.to_be_bytes());
    ip.extend([64, protocol, 0, 0]);
    ip.extend(source);
    ip.extend(destination);
    ip.extend(vec![1; options]);
    let sum = checksum(&ip);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    ip
}

fn v6_header(source: [u8; 16], destination: [u8; 16], next: u8, body: &[u8]) -> Vec<u8> {
    let mut ip = vec![0x60, 0, 0, 0];
    ip.extend((body.len() as u16).to_be_bytes());
    ip.extend([next, 64]);
    ip.extend(source);
    ip.extend(destination);
    ip.extend(body);
    ip
}

fn checksum(bytes: &[u8]) -> u16 {
    let mut sum = 0u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(u16::from_be_bytes([
            pair[0],
            pair.get(1).copied().unwrap_or(0),
        ]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// A packet socket on one interface.
pub(crate) struct Wire(OwnedFd);

impl Wire {
    pub(crate) fn open(netns: &Netns, interface: &str) -> Result<Self> {
        netns.enter(|| {
            const ETH_P_ALL: u16 = 3;
            // SAFETY: plain numbers in, a new descriptor out, checked below.
            let fd = unsafe {
                libc::socket(
                    libc::AF_PACKET,
                    libc::SOCK_RAW | libc::SOCK_NONBLOCK,
                    i32::from(ETH_P_ALL.to_be()),
                )
            };
            if fd < 0 {
                return Err(io::Error::last_os_error().into());
            }
            // SAFETY: the descriptor was made just now.
            let fd = unsafe { OwnedFd::from_raw_fd(fd) };
            let index = nix::net::if_::if_nametoindex(interface)?;
            // SAFETY: all zeros is a value of this plain struct.
            let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
            address.sll_family = libc::AF_PACKET as u16;
            address.sll_protocol = ETH_P_ALL.to_be();
            address.sll_ifindex = index as i32;
            // SAFETY: the address is a whole sockaddr_ll.
            let result = unsafe {
                libc::bind(
                    fd.as_raw_fd(),
                    (&raw const address).cast(),
                    size_of::<libc::sockaddr_ll>() as libc::socklen_t,
                )
            };
            if result < 0 {
                return Err(io::Error::last_os_error().into());
            }
            Ok(Self(fd))
        })
    }

    pub(crate) fn send(&self, frame: &[u8]) -> Result<()> {
        // SAFETY: the buffer is as long as told.
        let sent = unsafe { libc::send(self.0.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
        if sent < 0 {
            Err(io::Error::last_os_error().into())
        } else {
            Ok(())
        }
    }

    /// The first frame within `patience` that `wanted` likes.
    pub(crate) fn find(
        &self,
        patience: Duration,
        wanted: impl Fn(&[u8]) -> bool,
    ) -> Option<Vec<u8>> {
        let deadline = Instant::now() + patience;
        let mut buffer = vec![0u8; 65_536];
        loop {
            // SAFETY: the buffer is as long as told.
            let got = unsafe {
                libc::recv(
                    self.0.as_raw_fd(),
                    buffer.as_mut_ptr().cast(),
                    buffer.len(),
                    0,
                )
            };
            match usize::try_from(got) {
                Ok(length) if wanted(&buffer[..length]) => return Some(buffer[..length].to_vec()),
                Ok(_length) => {}
                Err(_nothing) if Instant::now() >= deadline => return None,
                Err(_nothing) => std::thread::sleep(Duration::from_millis(2)),
            }
        }
    }

    /// Does anything with these bytes in it come by?
    pub(crate) fn carries(&self, patience: Duration, marker: &[u8]) -> bool {
        self.find(patience, |frame| {
            frame.windows(marker.len()).any(|part| part == marker)
        })
        .is_some()
    }
}

/// Ports and flags of an untagged TCP frame without options.
pub(crate) fn tcp_of(frame: &[u8]) -> Option<(u16, u16, u8)> {
    let at = match frame.get(12..14)? {
        [0x08, 0x00] if *frame.get(23)? == 6 => 14 + 20,
        [0x86, 0xdd] if *frame.get(20)? == 6 => 14 + 40,
        _other => return None,
    };
    let port = |at: usize| Some(u16::from_be_bytes([*frame.get(at)?, *frame.get(at + 1)?]));
    Some((port(at)?, port(at + 2)?, *frame.get(at + 13)?))
}

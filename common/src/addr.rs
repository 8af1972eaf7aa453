//! An IP address as both halves see it: sixteen bytes, IPv4 as `::ffff:a.b.c.d`.
//!
//! One form for both families means that an IPv4 connection opened through an IPv6 socket (Java
//! does so) has the same key as any other.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// An address in network byte order; IPv4 in its IPv4-mapped form (RFC 4291, section 2.5.5.2).
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Addr(pub [u8; 16]);

const _: () = assert!(size_of::<Addr>() == 16);

impl Addr {
    pub const fn v4(ip: [u8; 4]) -> Self {
        Self([
            0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, ip[0], ip[1], ip[2], ip[3],
        ])
    }

    pub const fn v6(ip: [u8; 16]) -> Self {
        Self(ip)
    }

    /// Is it an IPv4 address? All twelve bytes before it tell: others of `::/16` end like one.
    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        let [a, b, c, d, e, f, g, h, i, j, k, l, ..] = self.0;
        u64::from_ne_bytes([a, b, c, d, e, f, g, h]) == 0
            && u32::from_be_bytes([i, j, k, l]) == 0xffff
    }
}

impl From<Ipv4Addr> for Addr {
    fn from(ip: Ipv4Addr) -> Self {
        Self::v4(ip.octets())
    }
}

impl From<Ipv6Addr> for Addr {
    fn from(ip: Ipv6Addr) -> Self {
        Self(ip.octets())
    }
}

impl From<IpAddr> for Addr {
    fn from(ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(ip) => ip.into(),
            IpAddr::V6(ip) => ip.into(),
        }
    }
}

impl From<Addr> for IpAddr {
    fn from(addr: Addr) -> Self {
        IpAddr::V6(Ipv6Addr::from(addr.0)).to_canonical()
    }
}

#[cfg(feature = "user")]
// SAFETY: `repr(C)`, every bit pattern is valid, no padding (size asserted above).
unsafe impl aya::Pod for Addr {}

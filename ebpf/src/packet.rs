//! What a packet is: TCP with these ends, something else, or nothing we can read.
//!
//! Called by both tc hooks before anything is decided. Knows bytes only: no socket, no map, no
//! kernel, so its tests run on the host. What is read here is wide on purpose: an unprivileged
//! process can set IP options and extension headers, and every neighbour can send fragments and
//! tags, so a header that is skipped unread is a way around the mesh. What cannot be walked to
//! its end is an error, and the hooks drop errors.

use picomesh_common::{
    Addr, Counter,
    config::{V4, V6},
};

/// Bytes of a packet, wherever they lie.
pub(crate) trait Bytes {
    /// `None`: the packet ends before.
    fn load<const N: usize>(&self, offset: usize) -> Option<[u8; N]>;

    /// Of the whole packet.
    fn length(&self) -> usize;
}

pub(crate) enum Packet {
    /// ARP, UDP, ICMP and their kind: not ours to judge.
    NotTcp,
    Tcp(Segment),
}

/// The head of one TCP segment.
#[derive(Clone, Copy)]
pub(crate) struct Segment {
    pub(crate) source: Addr,
    pub(crate) destination: Addr,
    /// Network byte order.
    pub(crate) source_port: [u8; 2],
    /// Network byte order.
    pub(crate) destination_port: [u8; 2],
    /// The flag byte: FIN 1, SYN 2, RST 4, ACK 16.
    pub(crate) flags: u8,
    /// [`V4`] or [`V6`].
    pub(crate) family: u32,
    /// Where the payload begins, counted from the beginning of the frame.
    pub(crate) payload: usize,
}

const SYN: u8 = 0x02;
const ACK: u8 = 0x10;

impl Segment {
    /// Asks for a connection. Whatever other flags it carries: a listener is who answers it.
    #[inline(always)]
    pub(crate) fn opens(&self) -> bool {
        self.flags & (SYN | ACK) == SYN
    }

    #[inline(always)]
    pub(crate) fn is_syn_ack(&self) -> bool {
        self.flags & (SYN | ACK) == SYN | ACK
    }
}

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_ARP: u16 = 0x0806;
const ETHERTYPE_IPV6: u16 = 0x86dd;

const HOP_BY_HOP: u8 = 0;
const TCP: u8 = 6;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION_OPTIONS: u8 = 60;

/// Extension headers that are walked; the kernel itself knows no limit, so more is an error.
const MAX_EXTENSIONS: usize = 8;

/// Reads the head of a packet whose IP header begins at `l2_len`.
#[inline(always)]
pub(crate) fn parse(bytes: &impl Bytes, ethertype: u16, l2_len: usize) -> Result<Packet, Counter> {
    if ethertype == ETHERTYPE_IPV4 {
        parse_v4(bytes, l2_len)
    } else if ethertype == ETHERTYPE_IPV6 {
        parse_v6(bytes, l2_len)
    } else if ethertype == ETHERTYPE_ARP {
        Ok(Packet::NotTcp)
    } else {
        // A tag that is still here hides an IP packet which the kernel would find later on.
        Err(Counter::UnknownEthertype)
    }
}

#[inline(always)]
fn parse_v4(bytes: &impl Bytes, l2_len: usize) -> Result<Packet, Counter> {
    let ip: [u8; 20] = bytes.load(l2_len).ok_or(Counter::BadHeader)?;
    let header_len = usize::from(ip[0] & 0x0f) * 4;
    if ip[0] >> 4 != 4 || header_len < 20 {
        return Err(Counter::BadHeader);
    }
    if ip[9] != TCP {
        return Ok(Packet::NotTcp);
    }
    // "More fragments" or an offset. The protocol field stands in every fragment.
    if u16::from_be_bytes([ip[6], ip[7]]) & 0x3fff != 0 {
        return Err(Counter::Fragment);
    }
    parse_tcp(
        bytes,
        l2_len + header_len,
        Addr::v4([ip[12], ip[13], ip[14], ip[15]]),
        Addr::v4([ip[16], ip[17], ip[18], ip[19]]),
        V4,
    )
}

#[inline(always)]
fn parse_v6(bytes: &impl Bytes, l2_len: usize) -> Result<Packet, Counter> {
    let ip: [u8; 8] = bytes.load(l2_len).ok_or(Counter::BadHeader)?;
    if ip[0] >> 4 != 6 {
        return Err(Counter::BadHeader);
    }
    let source: [u8; 16] = bytes.load(l2_len + 8).ok_or(Counter::BadHeader)?;
    let destination: [u8; 16] = bytes.load(l2_len + 24).ok_or(Counter::BadHeader)?;

    let mut next = ip[6];
    let mut offset = l2_len + 40;
    let mut fragmented = false;
    for walked in 0..=MAX_EXTENSIONS {
        if next == TCP {
            if fragmented {
                return Err(Counter::Fragment);
            }
            return parse_tcp(bytes, offset, Addr::v6(source), Addr::v6(destination), V6);
        }
        if !is_extension(next) {
            return Ok(Packet::NotTcp);
        }
        let head: [u8; 4] = bytes.load(offset).ok_or(Counter::BadHeader)?;
        if walked == MAX_EXTENSIONS {
            break;
        }
        let length = if next == FRAGMENT {
            fragmented = true;
            // In a later fragment the chain's rest lies in the first one. Its next header tells
            // the protocol unless it is one more extension, which may lead to TCP.
            let later = u16::from_be_bytes([head[2], head[3]]) & 0xfff8 != 0;
            if later && (head[0] == TCP || is_extension(head[0])) {
                return Err(Counter::Fragment);
            }
            if later {
                return Ok(Packet::NotTcp);
            }
            8
        } else if next == AUTHENTICATION {
            (usize::from(head[1]) + 2) * 4
        } else {
            (usize::from(head[1]) + 1) * 8
        };
        next = head[0];
        offset += length;
    }
    Err(Counter::TooManyExtensions)
}

/// The headers that the kernel walks through on its way to TCP.
#[inline(always)]
fn is_extension(next: u8) -> bool {
    next == HOP_BY_HOP
        || next == ROUTING
        || next == FRAGMENT
        || next == AUTHENTICATION
        || next == DESTINATION_OPTIONS
}

#[inline(always)]
fn parse_tcp(
    bytes: &impl Bytes,
    offset: usize,
    source: Addr,
    destination: Addr,
    family: u32,
) -> Result<Packet, Counter> {
    let tcp: [u8; 14] = bytes.load(offset).ok_or(Counter::BadHeader)?;
    let header_len = usize::from(tcp[12] >> 4) * 4;
    // One that reaches beyond the end would make a payload look like none.
    if header_len < 20 || offset + header_len > bytes.length() {
        return Err(Counter::BadHeader);
    }
    Ok(Packet::Tcp(Segment {
        source,
        destination,
        source_port: [tcp[0], tcp[1]],
        destination_port: [tcp[2], tcp[3]],
        flags: tcp[13],
        family,
        payload: offset + header_len,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_walked_to_the_ports() {
        for options in [0usize, 4, 40] {
            let segment = tcp(parse(&v4(options, TCP, 0).as_slice(), ETHERTYPE_IPV4, 14));
            assert_eq!(segment.source, Addr::v4([10, 0, 0, 1]));
            assert_eq!(segment.destination, Addr::v4([10, 0, 0, 2]));
            assert_eq!(
                (segment.source_port, segment.destination_port),
                ([0x9c, 0x40], [0, 80])
            );
            assert_eq!(
                (segment.family, segment.payload),
                (V4, 14 + 20 + options + 20)
            );
            assert!(segment.opens() && !segment.is_syn_ack());
        }
    }

    #[test]
    fn a_frame_without_link_header_reads_the_same() {
        let segment = tcp(parse(&&v4(0, TCP, 0)[14..], ETHERTYPE_IPV4, 0));
        assert_eq!(segment.payload, 40);
    }

    #[test]
    fn every_fragment_of_tcp_is_refused_and_of_udp_is_not_ours() {
        const MORE: u16 = 0x2000;
        for place in [MORE, MORE | 3, 3, 0x1fff] {
            let first = parse(&v4(0, TCP, place).as_slice(), ETHERTYPE_IPV4, 14);
            assert_eq!(error(first), Counter::Fragment, "{place:#x}");
            let other = parse(&v4(0, 17, place).as_slice(), ETHERTYPE_IPV4, 14);
            assert!(matches!(other, Ok(Packet::NotTcp)), "{place:#x}");
        }
        // "Do not fragment" is no fragment.
        tcp(parse(&v4(0, TCP, 0x4000).as_slice(), ETHERTYPE_IPV4, 14));
    }

    #[test]
    fn what_ends_early_or_lies_about_itself_is_refused() {
        let whole = v4(4, TCP, 0);
        for length in 14..14 + 24 + 20 {
            let cut = parse(&&whole[..length], ETHERTYPE_IPV4, 14);
            assert_eq!(error(cut), Counter::BadHeader, "{length}");
        }
        let mut lying = v4(0, TCP, 0);
        lying[14] = 0x44;
        assert_eq!(
            error(parse(&lying.as_slice(), ETHERTYPE_IPV4, 14)),
            Counter::BadHeader
        );
        lying[14] = 0x65;
        assert_eq!(
            error(parse(&lying.as_slice(), ETHERTYPE_IPV4, 14)),
            Counter::BadHeader
        );
        // Shorter than a header can be, and longer than the packet is.
        for words in [0x40, 0x60, 0xf0] {
            let mut lying_tcp = v4(0, TCP, 0);
            lying_tcp[14 + 20 + 12] = words;
            assert_eq!(
                error(parse(&lying_tcp.as_slice(), ETHERTYPE_IPV4, 14)),
                Counter::BadHeader
            );
        }
    }

    #[test]
    fn only_arp_and_ip_are_known() {
        let frame = v4(0, TCP, 0);
        for ethertype in [0x8100, 0x88a8, 0x9100, 0x8847, 0] {
            let refused = parse(&frame.as_slice(), ethertype, 14);
            assert_eq!(error(refused), Counter::UnknownEthertype, "{ethertype:#x}");
        }
        assert!(matches!(
            parse(&frame.as_slice(), ETHERTYPE_ARP, 14),
            Ok(Packet::NotTcp)
        ));
    }

    #[test]
    fn extension_headers_are_walked_and_counted() {
        for count in 0..=MAX_EXTENSIONS {
            let chain: Vec<u8> = vec![DESTINATION_OPTIONS; count];
            let segment = tcp(parse(&v6(&chain, TCP).as_slice(), ETHERTYPE_IPV6, 14));
            assert_eq!(
                (segment.family, segment.payload),
                (V6, 14 + 40 + count * 8 + 20)
            );
            assert_eq!(segment.destination_port, [0, 80]);
        }
        let chain = vec![HOP_BY_HOP; MAX_EXTENSIONS + 1];
        let refused = parse(&v6(&chain, TCP).as_slice(), ETHERTYPE_IPV6, 14);
        assert_eq!(error(refused), Counter::TooManyExtensions);
        // What is one too many is not looked into, whatever it is.
        let mut chain = vec![HOP_BY_HOP; MAX_EXTENSIONS];
        chain.push(FRAGMENT);
        for last in [TCP, 17] {
            let refused = parse(&v6(&chain, last).as_slice(), ETHERTYPE_IPV6, 14);
            assert_eq!(error(refused), Counter::TooManyExtensions);
        }
        let mixed = [HOP_BY_HOP, ROUTING, AUTHENTICATION, DESTINATION_OPTIONS];
        tcp(parse(&v6(&mixed, TCP).as_slice(), ETHERTYPE_IPV6, 14));
        assert!(matches!(
            parse(&v6(&mixed, 17).as_slice(), ETHERTYPE_IPV6, 14),
            Ok(Packet::NotTcp)
        ));
    }

    #[test]
    fn fragments_of_ipv6_are_judged_by_what_they_may_hold() {
        let with_offset = |chain: &[u8], last, offset: u16| {
            let mut frame = v6(chain, last);
            let at = 14 + 40 + chain.iter().take_while(|h| **h != FRAGMENT).count() * 8;
            frame[at + 2..at + 4].copy_from_slice(&offset.to_be_bytes());
            frame
        };
        let parse = |frame: Vec<u8>| parse(&frame.as_slice(), ETHERTYPE_IPV6, 14);
        // Whole, first and later ones.
        for offset in [0, 1, 8, 9] {
            assert_eq!(
                error(parse(with_offset(&[FRAGMENT], TCP, offset))),
                Counter::Fragment
            );
            assert!(matches!(
                parse(with_offset(&[FRAGMENT], 17, offset)),
                Ok(Packet::NotTcp)
            ));
        }
        // The chain goes on behind the fragment header.
        let hidden = [FRAGMENT, DESTINATION_OPTIONS];
        assert_eq!(
            error(parse(with_offset(&hidden, TCP, 1))),
            Counter::Fragment
        );
        assert_eq!(error(parse(with_offset(&hidden, 17, 8))), Counter::Fragment);
        // A tiny first fragment that ends before it tells.
        let mut tiny = with_offset(&hidden, TCP, 1);
        tiny.truncate(14 + 40 + 8);
        assert_eq!(error(parse(tiny)), Counter::BadHeader);
    }

    impl Bytes for &[u8] {
        fn load<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
            self.get(offset..offset + N)?.try_into().ok()
        }

        fn length(&self) -> usize {
            self.len()
        }
    }

    fn tcp(parsed: Result<Packet, Counter>) -> Segment {
        match parsed {
            Ok(Packet::Tcp(segment)) => segment,
            Ok(Packet::NotTcp) => panic!("read as something other than TCP"),
            Err(reason) => panic!("refused: {}", reason.name()),
        }
    }

    fn error(parsed: Result<Packet, Counter>) -> Counter {
        match parsed {
            Ok(_) => panic!("was not refused"),
            Err(reason) => reason,
        }
    }

    /// A SYN from 10.0.0.1:40000 to 10.0.0.2:80.
    fn v4(options: usize, protocol: u8, fragment: u16) -> Vec<u8> {
        let mut frame = vec![0; 14];
        frame.extend([0x40 | (5 + options / 4) as u8, 0, 0, 0, 0, 0]);
        frame.extend(fragment.to_be_bytes());
        frame.extend([64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        frame.extend(vec![1; options]);
        frame.extend(syn());
        frame
    }

    /// The same over IPv6, behind a chain of extension headers of eight bytes each.
    fn v6(chain: &[u8], last: u8) -> Vec<u8> {
        let mut frame = vec![0; 14];
        let mut kinds = chain.iter().copied().chain([last]);
        let first = kinds.next().unwrap_or(last);
        frame.extend([0x60, 0, 0, 0, 0, 0, first, 64]);
        frame.extend([0xfd; 16]);
        frame.extend([0xfe; 16]);
        for header in chain {
            let next = kinds.next().unwrap_or(last);
            // AH counts in units of four, less two.
            frame.extend([next, 0, 0, 0, 0, 0, 0, 0]);
            debug_assert!(is_extension(*header));
        }
        frame.extend(syn());
        frame
    }

    fn syn() -> [u8; 20] {
        let mut tcp = [0; 20];
        tcp[..4].copy_from_slice(&[0x9c, 0x40, 0, 80]);
        tcp[12] = 0x50;
        tcp[13] = SYN;
        tcp
    }
}

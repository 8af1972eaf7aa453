//! The little netlink that this room speaks: build a message, ask, read the answers.
//!
//! Blocking, on a socket of the thread's own namespace; made for [`super::devices`] and
//! [`super::diag`], which run inside pods. A request is bounded in time, so that a confused kernel
//! cannot hold a worker for ever.

use std::{io, os::fd::AsRawFd, time::Duration};

use netlink_sys::{Socket, SocketAddr};
use nix::libc;

pub(super) const ROUTE: isize = libc::NETLINK_ROUTE as isize;
pub(super) const SOCK_DIAG: isize = libc::NETLINK_SOCK_DIAG as isize;

const HEADER: usize = 16;
const TIMEOUT: Duration = Duration::from_secs(5);

/// A netlink socket of the namespace it was opened in.
pub(super) struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    pub(super) fn open(protocol: isize) -> io::Result<Self> {
        let mut socket = Socket::new(protocol)?;
        socket.bind(&SocketAddr::new(0, 0))?;
        socket2::SockRef::from(&BorrowRaw(&socket)).set_read_timeout(Some(TIMEOUT))?;
        Ok(Self {
            socket,
            sequence: 0,
        })
    }

    /// Sends a change and waits for the kernel's word on it.
    pub(super) fn change(&mut self, message: Message) -> io::Result<()> {
        self.exchange(message, libc::NLM_F_ACK as u16, &mut |_, _| {})
    }

    /// Sends a dump request; `each` gets the type and body of every answer.
    pub(super) fn dump(
        &mut self,
        message: Message,
        mut each: impl FnMut(u16, &[u8]),
    ) -> io::Result<()> {
        self.exchange(message, libc::NLM_F_DUMP as u16, &mut each)
    }

    fn exchange(
        &mut self,
        mut message: Message,
        flags: u16,
        each: &mut dyn FnMut(u16, &[u8]),
    ) -> io::Result<()> {
        self.sequence += 1;
        let bytes = message.finish(flags | libc::NLM_F_REQUEST as u16, self.sequence);
        self.socket.send_to(bytes, &SocketAddr::new(0, 0), 0)?;
        loop {
            // Peeks for the length first: an answer is never cut off.
            let (answer, _) = self.socket.recv_from_full()?;
            let mut rest = &answer[..];
            while rest.len() >= HEADER {
                let length = u32_at(rest, 0) as usize;
                if length < HEADER || length > rest.len() {
                    return Err(io::Error::new(
                        io::ErrorKind::InvalidData,
                        "netlink: an answer is shorter than it says",
                    ));
                }
                let (kind, sequence) = (u16_at(rest, 4), u32_at(rest, 8));
                let body = &rest[HEADER..length];
                rest = &rest[aligned(length).min(rest.len())..];
                if sequence != self.sequence {
                    continue;
                }
                match i32::from(kind) {
                    libc::NLMSG_ERROR => {
                        return match i32_at(body, 0) {
                            0 => Ok(()),
                            code => Err(io::Error::from_raw_os_error(-code)),
                        };
                    }
                    libc::NLMSG_DONE => {
                        return match i32_at(body, 0) {
                            code if code < 0 => Err(io::Error::from_raw_os_error(-code)),
                            _ => Ok(()),
                        };
                    }
                    _ => each(kind, body),
                }
            }
        }
    }
}

/// What happened to an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LinkEvent {
    /// It is new, or something about it is.
    Changed {
        index: u32,
        loopback: bool,
    },
    Gone {
        index: u32,
    },
}

/// A socket that the kernel tells of every change of an interface in the calling thread's
/// namespace. It does not block.
pub(super) fn link_events() -> io::Result<Socket> {
    let mut socket = Socket::new(ROUTE)?;
    socket.bind(&SocketAddr::new(0, libc::RTMGRP_LINK as u32))?;
    socket.set_non_blocking(true)?;
    Ok(socket)
}

/// Reads one packet of [`link_events`].
pub(super) fn read_link_events(socket: &Socket, each: &mut dyn FnMut(LinkEvent)) -> io::Result<()> {
    let (packet, _) = socket.recv_from_full()?;
    link_events_in(&packet, each);
    Ok(())
}

fn link_events_in(packet: &[u8], each: &mut dyn FnMut(LinkEvent)) {
    /// `struct ifinfomsg`.
    const FIXED: usize = 16;
    let mut rest = packet;
    while rest.len() >= HEADER + FIXED {
        let length = u32_at(rest, 0) as usize;
        if length < HEADER + FIXED || length > rest.len() {
            return;
        }
        let (kind, body) = (u16_at(rest, 4), &rest[HEADER..length]);
        rest = &rest[aligned(length).min(rest.len())..];
        let (index, flags) = (u32_at(body, 4), u32_at(body, 8));
        match kind {
            libc::RTM_NEWLINK => each(LinkEvent::Changed {
                index,
                loopback: flags & libc::IFF_LOOPBACK as u32 != 0,
            }),
            libc::RTM_DELLINK => each(LinkEvent::Gone { index }),
            _ => {}
        }
    }
}

/// Lets `SockRef` borrow the descriptor of a socket type that implements only the raw trait.
struct BorrowRaw<'a>(&'a Socket);

impl std::os::fd::AsFd for BorrowRaw<'_> {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        // SAFETY: the socket is borrowed for as long as the descriptor.
        unsafe { std::os::fd::BorrowedFd::borrow_raw(self.0.as_raw_fd()) }
    }
}

/// A message under construction: header, fixed part, attributes.
pub(super) struct Message {
    bytes: Vec<u8>,
}

impl Message {
    pub(super) fn new(kind: u16, flags: i32, fixed: &[u8]) -> Self {
        let mut bytes = vec![0; HEADER];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&(flags as u16).to_ne_bytes());
        bytes.extend_from_slice(fixed);
        bytes.resize(aligned(bytes.len()), 0);
        Self { bytes }
    }

    pub(super) fn attr(mut self, kind: u16, value: &[u8]) -> Self {
        let length = (4 + value.len()) as u16;
        self.bytes.extend_from_slice(&length.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(value);
        self.bytes.resize(aligned(self.bytes.len()), 0);
        self
    }

    pub(super) fn attr_u32(self, kind: u16, value: u32) -> Self {
        self.attr(kind, &value.to_ne_bytes())
    }

    pub(super) fn attr_str(self, kind: u16, value: &str) -> Self {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.attr(kind, &bytes)
    }

    /// An attribute whose value is `prefix` and then attributes.
    pub(super) fn nest(
        mut self,
        kind: u16,
        prefix: &[u8],
        inner: impl FnOnce(Self) -> Self,
    ) -> Self {
        let start = self.bytes.len();
        self = self.attr(kind | libc::NLA_F_NESTED as u16, prefix);
        self = inner(self);
        let length = (self.bytes.len() - start) as u16;
        self.bytes[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        self
    }

    fn finish(&mut self, flags: u16, sequence: u32) -> &[u8] {
        let length = self.bytes.len() as u32;
        let flags = flags | u16_at(&self.bytes, 6);
        self.bytes[0..4].copy_from_slice(&length.to_ne_bytes());
        self.bytes[6..8].copy_from_slice(&flags.to_ne_bytes());
        self.bytes[8..12].copy_from_slice(&sequence.to_ne_bytes());
        &self.bytes
    }
}

/// The attributes in `bytes`, flags taken off their kinds. Stops at the first that does not fit.
pub(super) fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        if rest.len() < 4 {
            return None;
        }
        let (length, kind) = (u16_at(rest, 0) as usize, u16_at(rest, 2));
        if length < 4 || length > rest.len() {
            return None;
        }
        let value = &rest[4..length];
        rest = &rest[aligned(length).min(rest.len())..];
        Some((kind & libc::NLA_TYPE_MASK as u16, value))
    })
}

pub(super) fn attribute(bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    attributes(bytes)
        .find(|(kind, _)| *kind == wanted)
        .map(|(_, value)| value)
}

/// Numbers at a place; zero where the bytes end, as the kernel's older, shorter structs want it.
pub(super) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    bytes
        .get(at..at + 2)
        .and_then(|b| b.try_into().ok())
        .map_or(0, u16::from_ne_bytes)
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..at + 4)
        .and_then(|b| b.try_into().ok())
        .map_or(0, u32::from_ne_bytes)
}

fn i32_at(bytes: &[u8], at: usize) -> i32 {
    u32_at(bytes, at).cast_signed()
}

pub(super) fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

fn aligned(length: usize) -> usize {
    (length + 3) & !3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_nested_comes_out_again() {
        let mut message =
            Message::new(16, 0, &[1, 2, 3])
                .attr_str(3, "mesh0")
                .nest(18, &[9, 9, 9, 9], |inner| {
                    inner.attr_u32(1, 7).attr(2, &[5])
                });
        let bytes = message.finish(0, 42);
        assert_eq!(u32_at(bytes, 0) as usize, bytes.len());
        assert_eq!(u32_at(bytes, 8), 42);
        let body = &bytes[HEADER + 4..];
        assert_eq!(attribute(body, 3).map(text).as_deref(), Some("mesh0"));
        let nested = attribute(body, 18).unwrap_or_default();
        assert_eq!(&nested[..4], &[9, 9, 9, 9]);
        let inner: Vec<_> = attributes(&nested[4..]).collect();
        assert_eq!(inner, vec![(1, &7_u32.to_ne_bytes()[..]), (2, &[5][..])]);
    }

    #[test]
    fn attributes_that_lie_about_their_length_end_the_list() {
        assert_eq!(attributes(&[200, 0, 1, 0, 1]).count(), 0);
        assert_eq!(attributes(&[2, 0, 1, 0]).count(), 0);
        assert_eq!(attributes(&[5, 0, 1, 0, 1]).count(), 1);
    }
}

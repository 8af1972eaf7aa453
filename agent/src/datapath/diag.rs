//! What TCP sockets stand in a pod, asked of the kernel by sock_diag.
//!
//! Four questions: which connections does the application have (at enrolment they count as
//! standing), which are ours (an un-enrolment waits for them), which of the application's had we
//! taken (none of them may become plain), is anybody listening at a port. And one deed: closing what
//! is left when a deadline is over. All run on a thread inside the pod's namespace, or on a socket
//! that was opened there. Knows neither programs nor devices.

use std::{
    collections::HashSet,
    io,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    os::fd::{AsRawFd, BorrowedFd},
};

use nix::libc;

use super::netlink::{self, Message, Netlink, attribute, u32_at};

/// More sockets than this in one pod are not listed: the room's maps could not hold them.
pub const MAX_SOCKETS: usize = 262_144;

/// A socket of the calling thread's namespace, IPv4-mapped addresses as IPv4.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TcpSocket {
    pub local: SocketAddr,
    pub remote: SocketAddr,
    pub mark: u32,
}

/// The connections of a pod, ours apart from the application's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Connections {
    /// Of the application, to the outside and neither to itself over loopback nor to a socket of
    /// ours. (local, remote)
    pub apps: HashSet<(SocketAddr, SocketAddr)>,
    /// Of the application, with a socket of ours at the far end.
    pub taken: HashSet<(SocketAddr, SocketAddr)>,
    /// Of the proxy.
    pub ours: HashSet<(SocketAddr, SocketAddr)>,
}

/// Lists the connections of the calling thread's namespace. Sockets with `our_mark` are ours.
///
/// The kernel walks its table in portions and may miss a socket when others go in between, so the
/// table is walked twice and both answers count.
pub fn connections(our_mark: u32) -> io::Result<Connections> {
    let mut diag = Netlink::open(netlink::SOCK_DIAG)?;
    let mut sockets = HashSet::new();
    for _ in 0..2 {
        for family in FAMILIES {
            list(&mut diag, family, CONNECTED, 0, |socket| {
                if sockets.len() < MAX_SOCKETS {
                    sockets.insert(socket);
                }
            })?;
        }
    }
    if sockets.len() == MAX_SOCKETS {
        return Err(io::Error::other(format!(
            "the pod has {MAX_SOCKETS} TCP sockets or more; enrol it when it has fewer"
        )));
    }
    Ok(sort(sockets, our_mark))
}

/// The connections of the calling thread's namespace whose socket has `owner` in its storage in the
/// map `storages`: the kernel half wrote it there, and it stays as long as the socket, whoever else
/// is gone. (local, remote)
pub fn of_owner(
    storages: BorrowedFd<'_>,
    owner: u32,
) -> io::Result<HashSet<(SocketAddr, SocketAddr)>> {
    let mut diag = Netlink::open(netlink::SOCK_DIAG)?;
    let map = storages.as_raw_fd().cast_unsigned();
    let mut found = HashSet::new();
    // Twice, as above.
    for _ in 0..2 {
        for family in FAMILIES {
            let message =
                Message::new(SOCK_DIAG_BY_FAMILY, 0, &request(family, CONNECTED, None, 0)).nest(
                    INET_DIAG_REQ_SK_BPF_STORAGES,
                    &[],
                    |inner| inner.attr_u32(SK_DIAG_BPF_STORAGE_REQ_MAP_FD, map),
                );
            dump(&mut diag, family, message, |body| {
                if found.len() < MAX_SOCKETS
                    && stored(body) == Some(owner)
                    && let Some(socket) = parse(body)
                {
                    found.insert((socket.local, socket.remote));
                }
            })?;
        }
    }
    Ok(found)
}

/// What one answer says of the socket's storage in the one map that was asked for.
fn stored(body: &[u8]) -> Option<u32> {
    let all = attribute(body.get(DIAG_MSG..)?, INET_DIAG_SK_BPF_STORAGES)?;
    let one = attribute(all, SK_DIAG_BPF_STORAGE)?;
    let value = attribute(one, SK_DIAG_BPF_STORAGE_MAP_VALUE)?;
    Some(u32_at(value, 0))
}

/// Is a socket of the application listening at `ip:port`? For a [`Netlink`] opened in its pod.
pub(super) fn listens(
    diag: &mut Netlink,
    ip: IpAddr,
    port: u16,
    our_mark: u32,
) -> io::Result<bool> {
    let ip = ip.to_canonical();
    let mut found = false;
    for family in FAMILIES {
        list(diag, family, 1 << TCP_LISTEN, port, |socket| {
            let at = socket.local.ip();
            // `::` is shown for both; one that serves IPv6 alone is counted as well, and connecting
            // to it then fails as it would without us.
            let serves = at == ip || at.is_unspecified() && (at.is_ipv6() || ip.is_ipv4());
            found |= serves && socket.local.port() == port && socket.mark != our_mark;
        })?;
    }
    Ok(found)
}

/// Resets these connections, as `ss --kill` does. What is gone already is no error; how many
/// were closed. A kernel without CONFIG_INET_DIAG_DESTROY says EOPNOTSUPP.
pub fn destroy<'a>(
    connections: impl IntoIterator<Item = &'a (SocketAddr, SocketAddr)>,
) -> io::Result<usize> {
    let mut diag = Netlink::open(netlink::SOCK_DIAG)?;
    let mut closed = 0;
    for (local, remote) in connections {
        // An IPv4 connection of an IPv6 socket is found under IPv4 as well.
        let family = if local.is_ipv4() {
            libc::AF_INET
        } else {
            libc::AF_INET6
        } as u8;
        let request = request(family, u32::MAX, Some((*local, *remote)), 0);
        match diag.change(Message::new(SOCK_DESTROY, 0, &request)) {
            Ok(()) => closed += 1,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(closed)
}

// Of linux/sock_diag.h, linux/inet_diag.h and net/tcp_states.h.
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const INET_DIAG_MARK: u16 = 15;
const INET_DIAG_SK_BPF_STORAGES: u16 = 20;
const INET_DIAG_REQ_SK_BPF_STORAGES: u16 = 2;
const SK_DIAG_BPF_STORAGE_REQ_MAP_FD: u16 = 1;
const SK_DIAG_BPF_STORAGE: u16 = 1;
const SK_DIAG_BPF_STORAGE_MAP_VALUE: u16 = 3;
const TCP_TIME_WAIT: u32 = 6;
const TCP_CLOSE: u32 = 7;
const TCP_LISTEN: u32 = 10;
/// `struct inet_diag_msg`.
const DIAG_MSG: usize = 72;
const FAMILIES: [u8; 2] = [libc::AF_INET as u8, libc::AF_INET6 as u8];
/// Everything that can still carry bytes: a TIME_WAIT has no socket, and answers by itself.
const CONNECTED: u32 = !(1 << TCP_LISTEN | 1 << TCP_CLOSE | 1 << TCP_TIME_WAIT);

fn list(
    diag: &mut Netlink,
    family: u8,
    states: u32,
    port: u16,
    mut each: impl FnMut(TcpSocket),
) -> io::Result<()> {
    let request = request(family, states, None, port);
    let message = Message::new(SOCK_DIAG_BY_FAMILY, 0, &request);
    dump(diag, family, message, |body| {
        if let Some(socket) = parse(body) {
            each(socket);
        }
    })
}

fn dump(
    diag: &mut Netlink,
    family: u8,
    message: Message,
    mut each: impl FnMut(&[u8]),
) -> io::Result<()> {
    let result = diag.dump(message, |kind, body| {
        if kind == SOCK_DIAG_BY_FAMILY {
            each(body);
        }
    });
    match result {
        // No IPv6, no IPv6 sockets.
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::EAFNOSUPPORT | libc::ENOENT)
            ) && i32::from(family) == libc::AF_INET6 =>
        {
            Ok(())
        }
        other => other,
    }
}

/// `struct inet_diag_req_v2`; without a connection it asks for a list.
fn request(
    family: u8,
    states: u32,
    connection: Option<(SocketAddr, SocketAddr)>,
    port: u16,
) -> [u8; 56] {
    let mut request = [0; 56];
    request[0] = family;
    request[1] = libc::IPPROTO_TCP as u8;
    request[4..8].copy_from_slice(&states.to_ne_bytes());
    request[8..10].copy_from_slice(&port.to_be_bytes());
    if let Some((local, remote)) = connection {
        request[8..10].copy_from_slice(&local.port().to_be_bytes());
        request[10..12].copy_from_slice(&remote.port().to_be_bytes());
        put_ip(&mut request[12..28], local.ip());
        put_ip(&mut request[28..44], remote.ip());
        // No cookie: whichever socket has this tuple.
        request[48..56].copy_from_slice(&[0xff; 8]);
    }
    request
}

fn put_ip(place: &mut [u8], ip: IpAddr) {
    match ip {
        IpAddr::V4(ip) => place[..4].copy_from_slice(&ip.octets()),
        IpAddr::V6(ip) => place[..16].copy_from_slice(&ip.octets()),
    }
}

fn parse(body: &[u8]) -> Option<TcpSocket> {
    let family = i32::from(*body.first()?);
    let port = |at: usize| Some(u16::from_be_bytes(body.get(at..at + 2)?.try_into().ok()?));
    let ip = |at: usize| -> Option<IpAddr> {
        if family == libc::AF_INET {
            let octets: [u8; 4] = body.get(at..at + 4)?.try_into().ok()?;
            Some(IpAddr::from(octets))
        } else {
            let octets: [u8; 16] = body.get(at..at + 16)?.try_into().ok()?;
            Some(Ipv6Addr::from(octets).to_canonical())
        }
    };
    let attributes = body.get(DIAG_MSG..)?;
    Some(TcpSocket {
        local: SocketAddr::new(ip(8)?, port(4)?),
        remote: SocketAddr::new(ip(24)?, port(6)?),
        // Left out when it is zero.
        mark: attribute(attributes, INET_DIAG_MARK).map_or(0, |mark| u32_at(mark, 0)),
    })
}

fn sort(sockets: HashSet<TcpSocket>, our_mark: u32) -> Connections {
    let (ours, others): (Vec<_>, Vec<_>) = sockets
        .into_iter()
        .partition(|socket| socket.mark == our_mark);
    let ours: HashSet<_> = ours.into_iter().map(|s| (s.local, s.remote)).collect();
    let mut sorted = Connections::default();
    for TcpSocket {
        local,
        remote,
        mark: _,
    } in others
    {
        if ours.contains(&(remote, local)) {
            sorted.taken.insert((local, remote));
        } else if !local.ip().is_loopback() && !remote.ip().is_loopback() {
            sorted.apps.insert((local, remote));
        }
    }
    sorted.ours = ours;
    sorted
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    fn socket(local: &str, remote: &str, mark: u32) -> TcpSocket {
        TcpSocket {
            local: local.parse().unwrap(),
            remote: remote.parse().unwrap(),
            mark,
        }
    }

    #[test]
    fn an_applications_connection_to_a_socket_of_ours_is_taken_not_standing() {
        let sorted = sort(
            HashSet::from([
                socket("10.0.0.2:4000", "10.0.0.9:80", 0),
                socket("10.0.0.9:80", "10.0.0.2:4000", 7),
                socket("10.0.0.2:4001", "10.0.0.9:80", 0),
                socket("127.0.0.1:1", "127.0.0.1:2", 0),
            ]),
            7,
        );
        let pair = |a: &str, b: &str| (a.parse().unwrap(), b.parse().unwrap());
        assert_eq!(
            sorted.taken,
            HashSet::from([pair("10.0.0.2:4000", "10.0.0.9:80")])
        );
        assert_eq!(
            sorted.apps,
            HashSet::from([pair("10.0.0.2:4001", "10.0.0.9:80")])
        );
        assert_eq!(
            sorted.ours,
            HashSet::from([pair("10.0.0.9:80", "10.0.0.2:4000")])
        );
    }

    #[test]
    fn a_mapped_address_counts_as_ipv4() {
        let mut body = vec![0; DIAG_MSG];
        body[0] = libc::AF_INET6 as u8;
        body[4..6].copy_from_slice(&80_u16.to_be_bytes());
        body[6..8].copy_from_slice(&4000_u16.to_be_bytes());
        for (at, last) in [(8, 1), (24, 2)] {
            body[at + 10..at + 12].copy_from_slice(&[0xff, 0xff]);
            body[at + 12..at + 16].copy_from_slice(&[10, 0, 0, last]);
        }
        assert_eq!(
            parse(&body),
            Some(socket("10.0.0.1:80", "10.0.0.2:4000", 0))
        );
        assert_eq!(parse(&body[..40]), None, "cut short");
    }

    #[test]
    fn the_kernel_tells_who_listens_and_who_is_connected() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap();
        let mut diag = Netlink::open(netlink::SOCK_DIAG).unwrap();
        assert!(listens(&mut diag, at.ip(), at.port(), 1).unwrap());
        assert!(!listens(&mut diag, "127.0.0.2".parse().unwrap(), at.port(), 1).unwrap());

        let client = TcpStream::connect(at).unwrap();
        let mut seen = HashSet::new();
        list(&mut diag, libc::AF_INET as u8, CONNECTED, 0, |socket| {
            seen.insert((socket.local, socket.remote));
        })
        .unwrap();
        assert!(seen.contains(&(client.local_addr().unwrap(), at)));
        drop(listener);
        assert!(!listens(&mut diag, at.ip(), at.port(), 1).unwrap());
    }
}

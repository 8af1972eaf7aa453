//! Listeners and the accept loop. An accept error never ends a loop; running out of descriptors or
//! memory makes it wait a moment, so that it does not spin.

use std::{
    future::Future,
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    pin::pin,
    time::Duration,
};

use futures_util::FutureExt;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpListener, TcpStream};

use super::{ProxySettings, StartError};
use crate::datapath::keep_alive;

const BACKLOG: i32 = 4096;
const FIRST_PAUSE: Duration = Duration::from_millis(5);
/// Connections taken before the others of the thread have their turn: what each of them costs at
/// its beginning comes behind what is ready already, not before it.
const BURST: usize = 16;
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// Accepts until `stop`, then takes what is still queued, so that nobody is turned away who was
/// here before the end. The next is taken when `serve` returns. `failed` hears of every error's fixed
/// word.
pub(super) async fn accept(
    listener: TcpListener,
    stop: impl Future<Output = ()>,
    serve: impl AsyncFn(TcpStream, SocketAddr),
    failed: impl Fn(&'static str),
) {
    let mut stop = pin!(stop);
    let mut pause = FIRST_PAUSE;
    let mut taken = 0_usize;
    loop {
        let accepted = tokio::select! {
            biased;
            accepted = listener.accept() => accepted,
            () = &mut stop => break,
        };
        match accepted {
            Ok((stream, peer)) => {
                pause = FIRST_PAUSE;
                serve(stream, peer).await;
                taken += 1;
                if taken.is_multiple_of(BURST) {
                    tokio::task::yield_now().await;
                }
            }
            Err(error) => {
                failed(word(&error));
                if is_shortage(&error) {
                    tracing::warn!(%error, ?pause, "cannot accept for now");
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                } else {
                    tracing::debug!(%error, "a connection died before it was accepted");
                    // Unknown errors could repeat at once: let the others have a turn.
                    tokio::task::yield_now().await;
                }
            }
        }
    }
    while let Some(Ok((stream, peer))) = listener.accept().now_or_never() {
        serve(stream, peer).await;
    }
}

/// Errors that last until somebody gives something back.
fn is_shortage(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(nix::libc::EMFILE | nix::libc::ENFILE | nix::libc::ENOBUFS | nix::libc::ENOMEM)
    )
}

fn word(error: &io::Error) -> &'static str {
    if is_shortage(error) {
        "accept_shortage"
    } else {
        "accept_failed"
    }
}

/// Sockets that listen for tunnels, and where.
pub struct TunnelListeners {
    pub(super) sockets: Vec<std::net::TcpListener>,
    pub(super) addresses: Vec<SocketAddr>,
}

impl TunnelListeners {
    /// One socket per thread and address, by SO_REUSEPORT, in the caller's network namespace.
    pub fn bind(settings: &ProxySettings) -> Result<Self, StartError> {
        let mut sockets = Vec::new();
        let mut addresses = Vec::new();
        for wanted in wanted(settings) {
            let failed = |source| StartError::Listen {
                address: wanted,
                source,
            };
            // Port 0: the first bind draws it, the other threads join.
            let mut address = wanted;
            for _ in 0..settings.threads.max(1) {
                let listener = listen(address).map_err(failed)?;
                address = listener.local_addr().map_err(failed)?;
                sockets.push(listener);
            }
            addresses.push(address);
        }
        Ok(Self { sockets, addresses })
    }

    /// Those that the agent before gave away. Both accept from them until that one stops, so none
    /// of their queues is ever lost.
    pub fn inherit(sockets: Vec<std::net::TcpListener>) -> io::Result<Self> {
        let mut addresses = Vec::new();
        for socket in &sockets {
            socket.set_nonblocking(true)?;
            let address = socket.local_addr()?;
            if !addresses.contains(&address) {
                addresses.push(address);
            }
        }
        Ok(Self { sockets, addresses })
    }

    pub(super) fn copy(&self) -> io::Result<Vec<std::net::TcpListener>> {
        self.sockets.iter().map(|s| s.try_clone()).collect()
    }

    /// For each thread its share. An agent before may have had fewer threads or more: each socket
    /// is served by one thread at least, and each thread serves one socket at least.
    pub(super) fn shares(self, threads: usize) -> io::Result<Vec<Vec<std::net::TcpListener>>> {
        let mut shares: Vec<Vec<_>> = (0..threads.max(1)).map(|_| Vec::new()).collect();
        let (threads, sockets) = (shares.len(), self.sockets.len());
        for place in (sockets..threads).filter(|_| sockets > 0) {
            shares[place].push(self.sockets[place % sockets].try_clone()?);
        }
        for (number, socket) in self.sockets.into_iter().enumerate() {
            shares[number % threads].push(socket);
        }
        Ok(shares)
    }
}

fn wanted(settings: &ProxySettings) -> Vec<SocketAddr> {
    if !settings.tunnel_listen.is_empty() {
        return settings.tunnel_listen.clone();
    }
    // With `ipv6.disable=1` there is no IPv6 socket at all.
    if Socket::new(Domain::IPV6, Type::STREAM, Some(Protocol::TCP)).is_ok() {
        vec![(Ipv6Addr::UNSPECIFIED, settings.tunnel_port).into()]
    } else {
        vec![(Ipv4Addr::UNSPECIFIED, settings.tunnel_port).into()]
    }
}

fn listen(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(!address.ip().is_unspecified())?;
    }
    socket.set_nonblocking(true)?;
    socket.set_tcp_nodelay(true)?;
    keep_alive(&socket)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

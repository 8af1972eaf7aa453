//! One end of a connection that is a TCP socket, and how sockets get there.
//!
//! Three things differ from plain tokio, each for a reason:
//! - A short read or write clears the readiness, so that the next try waits instead of asking the
//!   kernel only to hear EAGAIN (half of all recv calls in a naive loop).
//! - Every socket carries SO_LINGER 0 from birth and loses it only when both directions ended with
//!   FIN. Whatever else happens, a panic or `kill -9` included, the application sees RST and never
//!   takes a cut-off stream for a finished one.
//! - Somebody who waits only to write, or whose reader has seen FIN, still learns of the peer's RST
//!   ([`TcpEnd::poll_reset`]); tokio wakes nobody for it otherwise.

use std::{
    future::Future,
    io::{self, IoSlice},
    net::{IpAddr, Shutdown, SocketAddr},
    os::fd::AsFd,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{BufMut, BytesMut};
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::{io::Interest, net::TcpStream, time::timeout};

use super::reason::Reason;
use crate::datapath::keep_alive;

/// How often another port is tried when the one drawn is taken (rule 7).
const PORT_TRIES: usize = 32;

/// Options of a listener that its accepted sockets inherit, so that accepting costs no call more.
pub(super) fn prepare_listener(listener: &impl AsFd) -> io::Result<()> {
    let socket = SockRef::from(listener);
    socket.set_nonblocking(true)?;
    socket.set_tcp_nodelay(true)?;
    keep_alive(&socket)?;
    socket.set_linger(Some(Duration::ZERO))
}

/// Why a socket did not connect.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectError {
    #[error("no socket for {remote}: {source}")]
    NoSocket {
        remote: SocketAddr,
        source: io::Error,
    },
    #[error("connect to {remote}: {source}")]
    Failed {
        remote: SocketAddr,
        source: io::Error,
    },
    #[error("connect to {remote}: no answer in {} ms", waited.as_millis())]
    Timeout {
        remote: SocketAddr,
        waited: Duration,
    },
}

impl ConnectError {
    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "std may add kinds at any time; all others mean that there is no way"
    )]
    pub(super) fn reason(&self) -> Reason {
        match self {
            Self::NoSocket { .. } => Reason::NoSocket,
            Self::Failed { source, .. } => match source.kind() {
                io::ErrorKind::ConnectionRefused => Reason::ConnectRefused,
                io::ErrorKind::TimedOut => Reason::ConnectTimeout,
                _ => Reason::Unreachable,
            },
            Self::Timeout { .. } => Reason::ConnectTimeout,
        }
    }
}

/// Connects a socket of `make` to `remote`. A connection within one kernel stands when `connect`
/// returns, and then nothing is waited for.
pub(super) async fn connect(
    remote: SocketAddr,
    patience: Duration,
    make: impl Fn() -> io::Result<Socket>,
) -> Result<TcpStream, ConnectError> {
    let no_socket = |source| ConnectError::NoSocket { remote, source };
    let failed = |source| ConnectError::Failed { remote, source };
    let mut tries = 0;
    loop {
        let socket = make().map_err(no_socket)?;
        socket.set_linger(Some(Duration::ZERO)).map_err(no_socket)?;
        match socket.connect(&remote.into()) {
            Ok(()) => return TcpStream::from_std(socket.into()).map_err(no_socket),
            Err(error) if error.raw_os_error() == Some(nix::libc::EINPROGRESS) => {
                let stream = TcpStream::from_std(socket.into()).map_err(no_socket)?;
                // On the heap: hardly a connection within the node comes here.
                return Box::pin(established(stream, remote, patience)).await;
            }
            // The port drawn for the client's address is taken: draw the next.
            Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable && tries < PORT_TRIES => {
                tries += 1;
            }
            Err(error) => return Err(failed(error)),
        }
    }
}

async fn established(
    stream: TcpStream,
    remote: SocketAddr,
    patience: Duration,
) -> Result<TcpStream, ConnectError> {
    match timeout(patience, stream.writable()).await {
        Err(_) => {
            return Err(ConnectError::Timeout {
                remote,
                waited: patience,
            });
        }
        Ok(Err(source)) => return Err(ConnectError::Failed { remote, source }),
        Ok(Ok(())) => {}
    }
    match stream.take_error() {
        Ok(None) => Ok(stream),
        Ok(Some(source)) | Err(source) => Err(ConnectError::Failed { remote, source }),
    }
}

/// A socket in the agent's own netns, for tunnels.
pub(super) fn node_socket(remote: SocketAddr, source: Option<IpAddr>) -> io::Result<Socket> {
    let socket = Socket::new(
        Domain::for_address(remote),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    socket.set_nonblocking(true)?;
    socket.set_tcp_nodelay(true)?;
    keep_alive(&socket)?;
    if let Some(source) = source {
        socket.bind(&SocketAddr::new(source, 0).into())?;
    }
    Ok(socket)
}

/// A connection's end at an application (or at whatever a pod talks to).
pub(super) struct TcpEnd {
    stream: Rc<TcpStream>,
    /// Made when first needed: only ends that wait without reading need it.
    reset: Option<Pin<Box<dyn Future<Output = ()>>>>,
}

impl TcpEnd {
    /// SO_LINGER 0 must be set already: [`prepare_listener`] and [`connect`] do so.
    pub(super) fn new(stream: TcpStream) -> Self {
        Self {
            stream: Rc::new(stream),
            reset: None,
        }
    }

    /// Reads into memory that is initialised already.
    pub(super) fn poll_read(
        &self,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.stream.poll_read_ready(cx))?;
            match self.stream.try_read(buffer) {
                Ok(read) => {
                    if 0 < read && read < buffer.len() {
                        self.drained(Interest::READABLE);
                    }
                    return Poll::Ready(Ok(read));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    /// Reads behind what `buffer` holds, at most `limit` bytes and what room it has.
    pub(super) fn poll_read_buf(
        &self,
        cx: &mut Context<'_>,
        buffer: &mut BytesMut,
        limit: usize,
    ) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.stream.poll_read_ready(cx))?;
            let room = limit.min(buffer.capacity() - buffer.len());
            match self.stream.try_read_buf(&mut buffer.limit(room)) {
                Ok(read) => {
                    if 0 < read && read < room {
                        self.drained(Interest::READABLE);
                    }
                    return Poll::Ready(Ok(read));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    pub(super) fn poll_write(&self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_with(cx, bytes.len(), |stream| stream.try_write(bytes))
    }

    pub(super) fn poll_write_vectored(
        &self,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
        length: usize,
    ) -> Poll<io::Result<usize>> {
        self.poll_write_with(cx, length, |stream| stream.try_write_vectored(slices))
    }

    fn poll_write_with(
        &self,
        cx: &mut Context<'_>,
        length: usize,
        write: impl Fn(&TcpStream) -> io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.stream.poll_write_ready(cx))?;
            match write(&self.stream) {
                Ok(written) => {
                    if 0 < written && written < length {
                        self.drained(Interest::WRITABLE);
                    }
                    return Poll::Ready(Ok(written));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    /// The kernel gave or took less than was offered: wait for its next word before asking again.
    /// The event cannot be lost: only this thread's poller sets the readiness, and it does not run
    /// in between.
    fn drained(&self, interest: Interest) {
        let _always_would_block: io::Result<()> = self
            .stream
            .try_io(interest, || Err(io::ErrorKind::WouldBlock.into()));
    }

    /// Ready once the peer sent RST or the connection timed out.
    pub(super) fn poll_reset(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let reset = self.reset.get_or_insert_with(|| {
            let stream = Rc::clone(&self.stream);
            Box::pin(async move {
                // An error means that the runtime ends, and so does the connection.
                let _ended = stream.ready(Interest::ERROR).await;
            })
        });
        let done = reset.as_mut().poll(cx);
        if done.is_ready() {
            // A finished future must not be polled again; the next one is ready at once.
            self.reset = None;
        }
        done
    }

    /// Sends FIN.
    pub(super) fn finish_writing(&self) -> io::Result<()> {
        match SockRef::from(&*self.stream).shutdown(Shutdown::Write) {
            // The peer sent FIN and RST, or only the latter, before: nothing is left to finish.
            Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
            other => other,
        }
    }

    /// Both directions ended with FIN: close as one closes, delivering what is still under way.
    pub(super) fn close(self) {
        // If it fails the peer sees RST instead of nothing: the safe side.
        let _result = SockRef::from(&*self.stream).set_linger(None);
    }
}

//! Sockets inside a pod's network namespace.

use std::{io, net::{IpAddr, SocketAddr}};

use socket2::Socket;

use crate::state::PodUid;

/// Which address the application on the other side will see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The pod's own.
    Own,
    /// This client's address (IP_TRANSPARENT); its own port, which the socket must not take.
    Keep { client: SocketAddr },
}

/// Makes sockets in a pod's netns. A trait so that the proxy's tests need no kernel half.
pub trait PodSockets: Send + Sync + 'static {
    fn uid(&self) -> &PodUid;

    /// A non-blocking TCP socket with TCP_NODELAY, our mark and our storage, bound for `source`,
    /// ready to connect to `remote`. Callers that get EADDRNOTAVAIL from connect ask again: the
    /// next port of the range is tried (rule 7).
    fn socket(&self, remote: SocketAddr, source: Source) -> io::Result<Socket>;

    /// A connection from this address to the pod is open at the proxy: no socket of ours takes its
    /// port until [`PodSockets::release`].
    fn hold(&self, client: SocketAddr);
    fn release(&self, client: SocketAddr);

    /// Is there an application socket listening at `ip:port` in the pod? `None`: cannot tell.
    fn listens(&self, ip: IpAddr, port: u16) -> Option<bool>;
}

/// The real one: an open netns, a slot, a port counter.
pub struct PodHandle {}

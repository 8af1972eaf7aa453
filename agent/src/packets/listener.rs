//! A socket of packets in the run directory, at which only root may call.

use std::{
    fs, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use rustix::{
    fs::{Mode, fchmod},
    net::{SocketFlags, accept_with},
};
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::io::{Interest, unix::AsyncFd};

/// Bound; whoever calls waits until [`Listener::accept`].
pub struct Listener {
    socket: AsyncFd<OwnedFd>,
    path: PathBuf,
}

impl Listener {
    /// Listens, but where nobody calls, until [`Listener::move_in`]: another agent's socket may be
    /// in the place.
    pub fn beside(path: PathBuf, backlog: i32) -> io::Result<Self> {
        let new = beside(&path);
        match fs::remove_file(&new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
        let socket = Socket::new(Domain::UNIX, packet_socket(), None)?;
        // Before it has a name: the directory may be one that others can enter. What is bound gets
        // the mode that the socket has.
        fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
        socket.bind(&SockAddr::unix(&new)?)?;
        socket.listen(backlog)?;
        let socket = watched(socket.into(), Interest::READABLE)?;
        Ok(Self { socket, path })
    }

    /// Takes the place, and that of whatever socket is there, in one step: whoever calls meets the
    /// one or the other. The file stays when the agent ends, and is found dead by the next.
    pub fn move_in(&self) -> io::Result<()> {
        fs::rename(beside(&self.path), &self.path)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The next call; its socket does not block.
    pub async fn accept(&self) -> io::Result<OwnedFd> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let accept = |socket: &OwnedFd| Ok(accept_with(socket, flags)?);
        self.socket.async_io(Interest::READABLE, accept).await
    }
}

/// SOCK_SEQPACKET, closed on exec, never blocking.
pub fn packet_socket() -> Type {
    Type::SEQPACKET.cloexec().nonblocking()
}

/// For waiting until something can be done with a file that is ours.
pub fn watched(file: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the descriptor stays open and the same for as long as it is registered, because the
    // value owns it and it is never replaced.
    let watched = unsafe { AsyncFd::register_with_interest(file, interest) };
    Ok(watched?)
}

/// Where a socket waits for its place.
fn beside(path: &Path) -> PathBuf {
    path.with_extension("sock.new")
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[tokio::test]
    async fn a_socket_is_its_owners_alone_from_the_moment_it_has_a_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.sock");
        let _listener = Listener::beside(path.clone(), 1).unwrap();
        let found = fs::symlink_metadata(beside(&path)).unwrap();
        assert_eq!(found.mode() & 0o777, 0o600);
    }
}

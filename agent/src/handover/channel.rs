//! A connection between two agents: whole messages, each with the open files that travel beside it.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
    time::Duration,
};

use socket2::{Domain, SockAddr, Socket};
use thiserror::Error;
use tokio::{
    io::{Interest, unix::AsyncFd},
    time::sleep,
};

use crate::packets::{self, Packet, packet_socket, watched};

use super::{
    message::{MAX_MESSAGE, Malformed, Message, decode},
    peer::Peer,
};

/// A queue that is full is tried again after this.
const FULL: Duration = Duration::from_millis(20);

pub struct Channel {
    socket: AsyncFd<OwnedFd>,
    pub(super) peer: Peer,
}

/// One packet.
pub struct Received {
    pub message: Message,
    pub files: Vec<OwnedFd>,
}

#[derive(Debug, Error)]
pub enum ChannelError {
    #[error("the other agent closed the connection")]
    Closed,
    #[error("{0}")]
    Malformed(#[from] Malformed),
    #[error("some of the files were lost on the way; raise the limit of open files (ulimit -n)")]
    FilesLost,
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl Channel {
    /// Waits while the listener's queue is full; bound it by a timeout.
    pub async fn connect(path: &Path) -> io::Result<Self> {
        let socket = Socket::new(Domain::UNIX, packet_socket(), None)?;
        let address = SockAddr::unix(path)?;
        loop {
            match socket.connect(&address) {
                Ok(()) => return Self::over(socket.into()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => sleep(FULL).await,
                Err(error) => return Err(error),
            }
        }
    }

    /// Over a connection that stands.
    pub(super) fn over(socket: OwnedFd) -> io::Result<Self> {
        Ok(Self {
            peer: Peer::of(&socket)?,
            socket: watched(socket, Interest::READABLE | Interest::WRITABLE)?,
        })
    }

    pub async fn send(&self, message: &Message, files: &[BorrowedFd<'_>]) -> io::Result<()> {
        let bytes = message.encode();
        self.socket
            .async_io(Interest::WRITABLE, |socket| {
                packets::write(socket, &bytes, files)
            })
            .await
    }

    pub async fn receive(&self) -> Result<Received, ChannelError> {
        // One more than fits, to see that it does not.
        let read = |socket: &OwnedFd| packets::read(socket, MAX_MESSAGE + 1);
        let Packet {
            bytes,
            files,
            cut,
            files_lost,
        } = self.socket.async_io(Interest::READABLE, read).await?;
        if files_lost {
            return Err(ChannelError::FilesLost);
        }
        if cut {
            let length = bytes.len();
            return Err(Malformed::TooLong { length }.into());
        }
        if bytes.is_empty() {
            return Err(ChannelError::Closed);
        }
        let message = decode(&bytes)?;
        Ok(Received { message, files })
    }
}

impl Channel {
    /// Returns when the other end is closed, at the latest by the end of its process. What it says
    /// until then counts for nothing.
    pub(super) async fn hung_up(&self) {
        loop {
            match self.receive().await {
                Err(ChannelError::Closed | ChannelError::Io(_)) => return,
                Ok(_) | Err(ChannelError::Malformed(_) | ChannelError::FilesLost) => {}
            }
        }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.get_ref().as_fd()
    }
}

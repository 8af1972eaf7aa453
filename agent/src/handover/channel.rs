//! A connection between two agents: whole messages, each with the open files that travel beside it.
//!
//! Files are taken out of a packet before anything in it is looked at, so that whatever is wrong
//! with it, they are closed.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
    time::Duration,
};

use rustix::{
    cmsg_space,
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
    },
};
use socket2::{Domain, SockAddr, Socket, Type};
use thiserror::Error;
use tokio::{
    io::{Interest, unix::AsyncFd},
    time::sleep,
};

use super::{
    message::{MAX_MESSAGE, Malformed, Message, decode},
    peer::Peer,
};

/// What the kernel carries at most beside one packet.
const KERNELS_FILES: usize = 253;
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
        let socket = Socket::new(Domain::UNIX, packets(), None)?;
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
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        self.socket
            .async_io(Interest::WRITABLE, |socket| {
                let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(KERNELS_FILES))];
                let mut beside = SendAncillaryBuffer::new(&mut space);
                if !files.is_empty() && !beside.push(SendAncillaryMessage::ScmRights(files)) {
                    return Err(io::Error::other(format!(
                        "{} files are more than one packet carries",
                        files.len()
                    )));
                }
                sendmsg(socket, &[IoSlice::new(&bytes)], &mut beside, flags)?;
                Ok(())
            })
            .await
    }

    pub async fn receive(&self) -> Result<Received, ChannelError> {
        let packet = self.socket.async_io(Interest::READABLE, read).await?;
        let Packet {
            bytes,
            files,
            flags,
        } = packet;
        if flags.contains(ReturnFlags::CTRUNC) {
            return Err(ChannelError::FilesLost);
        }
        if flags.contains(ReturnFlags::TRUNC) {
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

/// For waiting until something can be done with a file that is ours.
pub(super) fn watched(file: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the descriptor stays open and the same for as long as it is registered, because the
    // value owns it and it is never replaced.
    let watched = unsafe { AsyncFd::register_with_interest(file, interest) };
    Ok(watched?)
}

/// SOCK_SEQPACKET, closed on exec, never blocking.
pub(super) fn packets() -> Type {
    Type::SEQPACKET.cloexec().nonblocking()
}

struct Packet {
    bytes: Vec<u8>,
    files: Vec<OwnedFd>,
    flags: ReturnFlags,
}

fn read(socket: &OwnedFd) -> io::Result<Packet> {
    // One more than fits, to see that it does not.
    let mut bytes = vec![0; MAX_MESSAGE + 1];
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(KERNELS_FILES))];
    let mut beside = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(
        socket.as_fd(),
        &mut [IoSliceMut::new(&mut bytes)],
        &mut beside,
        RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT,
    )?;
    let mut files = Vec::new();
    for message in beside.drain() {
        // Credentials were not asked for, so nothing else comes.
        if let RecvAncillaryMessage::ScmRights(more) = message {
            files.extend(more);
        }
    }
    bytes.truncate(received.bytes);
    Ok(Packet {
        bytes,
        files,
        flags: received.flags,
    })
}

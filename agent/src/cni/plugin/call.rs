//! One question to the agent, and how long its answer may take.

use std::{
    io,
    os::fd::{BorrowedFd, OwnedFd},
    path::Path,
    time::Duration,
};

use rustix::{
    io::Errno,
    net::{
        AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with,
        sockopt::{Timeout, set_socket_timeout, socket_peercred},
    },
    process::geteuid,
};
use thiserror::Error;

use crate::{
    cni::message::{Answer, MAX_MESSAGE, Question},
    packets,
};

/// Why there is no answer.
#[derive(Debug, Error)]
pub(super) enum Silence {
    #[error("nobody listens at its socket")]
    Away,
    #[error("it ended before it answered")]
    HungUp,
    #[error("no answer within {} s", .0.as_secs_f32())]
    Late(Duration),
    #[error("{0}")]
    Undecided(String),
    #[error("its answer is not understood: {0}")]
    Garbled(String),
    #[error("its socket belongs to uid {0}, not to root")]
    Impostor(u32),
    #[error("{0}")]
    Io(#[from] io::Error),
}

impl Silence {
    /// Might the next call find somebody soon?
    pub(super) fn may_pass(&self) -> bool {
        match self {
            Self::Away | Self::HungUp | Self::Undecided(_) => true,
            Self::Late(_) | Self::Garbled(_) | Self::Impostor(_) | Self::Io(_) => false,
        }
    }
}

/// `netns` travels beside the question.
pub(super) fn ask(
    path: &Path,
    question: &Question,
    netns: Option<BorrowedFd<'_>>,
    patience: Duration,
) -> Result<Answer, Silence> {
    let socket = call(path, patience)?;
    let files: Vec<_> = netns.into_iter().collect();
    let late = |error: io::Error| match Errno::from_io_error(&error) {
        Some(Errno::AGAIN) => Silence::Late(patience),
        Some(Errno::PIPE | Errno::CONNRESET) => Silence::HungUp,
        Some(_) | None => Silence::Io(error),
    };
    packets::write(&socket, &question.encode(), &files).map_err(late)?;
    // One more than fits, to see that it does not. Whatever travels beside it is closed.
    let packet = packets::read(&socket, MAX_MESSAGE + 1).map_err(late)?;
    if packet.bytes.is_empty() {
        return Err(Silence::HungUp);
    }
    Answer::decode(&packet.bytes).map_err(|error| Silence::Garbled(error.to_string()))
}

fn call(path: &Path, patience: Duration) -> Result<OwnedFd, Silence> {
    let failed = |error: Errno| Silence::Io(error.into());
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .map_err(failed)?;
    // The first bounds connecting too: the queue of callers may be full.
    for way in [Timeout::Send, Timeout::Recv] {
        set_socket_timeout(&socket, way, Some(patience)).map_err(failed)?;
    }
    let address = SocketAddrUnix::new(path).map_err(failed)?;
    connect(&socket, &address).map_err(|error| match error {
        Errno::NOENT | Errno::CONNREFUSED => Silence::Away,
        Errno::AGAIN => Silence::Late(patience),
        other => failed(other),
    })?;
    // It gets a pod's network namespace.
    let owner = socket_peercred(&socket).map_err(failed)?.uid;
    if !owner.is_root() && owner != geteuid() {
        return Err(Silence::Impostor(owner.as_raw()));
    }
    Ok(socket)
}

//! The side that comes: calls, builds, says that it is ready, and takes over.
//!
//! Whatever becomes of the predecessor meanwhile, the successor ends up in one of two states: it is
//! told no, and ends; or nobody else repairs any more, and it may.

use std::{
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::Duration,
};

use thiserror::Error;
use tokio::time::timeout;
use tracing::{info, warn};

use super::{
    Channel, ChannelError, NAME,
    channel::Received,
    message::{Hello, Malformed, Message, OLDEST_PROTOCOL, What},
};

/// An agent that lives answers at once; one that is silent for so long is stopped or stuck.
const ANSWER: Duration = Duration::from_secs(10);
/// What a predecessor may take beyond its own deadline.
const OVERTIME: Duration = Duration::from_secs(15);
/// Beyond this no drain counts as one that ends.
const LONGEST_DRAIN: Duration = Duration::from_secs(24 * 3600);

/// Who was found at the socket.
pub enum Found {
    /// Nobody, or nobody any more: the lock will tell.
    Nobody,
    Predecessor(Box<Predecessor>),
}

/// An agent that made an offer.
pub struct Predecessor {
    channel: Channel,
    drain: Duration,
    pub files: Vec<(What, OwnedFd)>,
}

#[derive(Debug, Error)]
pub enum CallError {
    #[error("the agent that runs there (process {process}) refuses: {reason}")]
    Refused { process: i32, reason: String },
    #[error(
        "the agent that runs there (process {process}) cannot hand over ({what}); end it first"
    )]
    TooOld { process: i32, what: String },
    #[error("{path} belongs to uid {uid}, not to root; remove it")]
    Stranger { path: PathBuf, uid: u32 },
    #[error(
        "the agent that runs there (process {process}) is silent and cannot be ended from here"
    )]
    Unreachable { process: i32 },
    #[error("talking to the agent at {path}")]
    Io { path: PathBuf, source: io::Error },
}

/// Calls the agent of `run_dir`.
pub async fn call(run_dir: &Path, hello: Hello) -> Result<Found, CallError> {
    let path = run_dir.join(NAME);
    let channel = match timeout(ANSWER, Channel::connect(&path)).await {
        Ok(Ok(channel)) => channel,
        Ok(Err(source)) => {
            let kind = source.kind();
            let nobody =
                kind == io::ErrorKind::NotFound || kind == io::ErrorKind::ConnectionRefused;
            return if nobody {
                Ok(Found::Nobody)
            } else {
                Err(CallError::Io { path, source })
            };
        }
        // Its queue is full of callers that it does not serve.
        Err(_) => return Ok(Found::Nobody),
    };
    if !channel.peer.may_speak() {
        let uid = channel.peer.uid;
        return Err(CallError::Stranger { path, uid });
    }
    let process = channel.peer.pid;
    if channel.send(&Message::Hello(hello), &[]).await.is_err() {
        return Ok(Found::Nobody);
    }
    may_die_after("hello");
    let refused = |reason| Err(CallError::Refused { process, reason });
    let too_old = |what| Err(CallError::TooOld { process, what });
    match timeout(ANSWER, channel.receive()).await {
        Ok(Ok(Received {
            message: Message::Offer(offer),
            files,
        })) => {
            if offer.protocol < OLDEST_PROTOCOL {
                return too_old(format!("it speaks protocol {}", offer.protocol));
            }
            if offer.files.len() != files.len() {
                let (named, came) = (offer.files.len(), files.len());
                return refused(format!("it named {named} files and sent {came}"));
            }
            info!(process, version = offer.version, "succeeding an agent");
            may_die_after("offer");
            let drain = Duration::from_millis(offer.drain_milliseconds);
            Ok(Found::Predecessor(Box::new(Predecessor {
                channel,
                drain: drain.min(LONGEST_DRAIN),
                files: offer.files.into_iter().zip(files).collect(),
            })))
        }
        Ok(Ok(Received { message, .. })) => match message {
            Message::Refused { reason } => refused(reason),
            Message::Unknown { of } => too_old(format!("it does not know {of:?}")),
            Message::Offer(_)
            | Message::Hello(_)
            | Message::Ready
            | Message::Commit
            | Message::Taken => too_old(format!("it answers with {:?}", message.name())),
        },
        Ok(Err(ChannelError::Malformed(malformed))) => too_old(malformed.to_string()),
        Ok(Err(ChannelError::FilesLost)) => refused(ChannelError::FilesLost.to_string()),
        Ok(Err(ChannelError::Closed | ChannelError::Io(_))) => Ok(Found::Nobody),
        Err(_) => {
            warn!(process, "the agent that runs there does not answer");
            if channel.peer.fence().await {
                Ok(Found::Nobody)
            } else {
                Err(CallError::Unreachable { process })
            }
        }
    }
}

impl Predecessor {
    /// Everything is built. When this returns without an error, nobody else repairs: the
    /// predecessor has committed, or it is dead.
    pub async fn ready(&self) -> Result<(), CallError> {
        let process = self.channel.peer.pid;
        // One that has hung up may have said why, so only listening tells.
        let _heard = self.channel.send(&Message::Ready, &[]).await;
        may_die_after("ready");
        let deadline = tokio::time::Instant::now() + ANSWER;
        let mut broken = false;
        loop {
            match tokio::time::timeout_at(deadline, self.channel.receive()).await {
                Ok(Ok(Received { message, .. })) => match message {
                    Message::Commit => {
                        may_die_after("commit");
                        return Ok(());
                    }
                    Message::Refused { reason } => {
                        return Err(CallError::Refused { process, reason });
                    }
                    Message::Unknown { of } => {
                        let what = format!("it does not know {of:?}");
                        return Err(CallError::TooOld { process, what });
                    }
                    // Out of turn: neither yes nor no.
                    Message::Hello(_) | Message::Offer(_) | Message::Ready | Message::Taken => {}
                },
                Ok(Err(ChannelError::Malformed(Malformed::Unknown { .. }))) => {}
                // The kernel tells once that our word was not read; what was said before comes next.
                Ok(Err(ChannelError::Io(_))) if !broken => broken = true,
                Ok(Err(_)) | Err(_) => return self.is_dead().await,
            }
        }
    }

    /// We serve. The predecessor may go; what it owes by its deadline is seen to from afar.
    pub async fn taken(self) {
        may_die_after("swap");
        let process = self.channel.peer.pid;
        if self.channel.send(&Message::Taken, &[]).await.is_err() {
            // It died, or gave up on us and is ending us: the one is fine, the other is over soon.
            return;
        }
        may_die_after("taken");
        info!(process, "took over");
        tokio::spawn(async move {
            let patience = self.drain + OVERTIME;
            if self.channel.peer.has_ended(patience).await {
                info!(process, "the agent before has ended");
            } else if self.channel.peer.fence().await {
                warn!(process, ?patience, "the agent before did not end in time");
            }
        });
    }

    async fn is_dead(&self) -> Result<(), CallError> {
        let process = self.channel.peer.pid;
        if self.channel.peer.fence().await {
            info!(process, "the agent before is dead; going on without it");
            Ok(())
        } else {
            Err(CallError::Unreachable { process })
        }
    }
}

/// Names the message after which a build for tests kills itself as `kill -9` would. Beside the
/// messages there is `swap`: our listeners stand in every pod, and nobody was told.
#[cfg(feature = "testing")]
pub const DIES_AFTER: &str = "PICOMESH_TEST_DIES_AFTER";

#[cfg(feature = "testing")]
fn may_die_after(message: &str) {
    use nix::{
        sys::signal::{Signal, kill},
        unistd::Pid,
    };
    if std::env::var_os(DIES_AFTER).is_some_and(|last| last == *message) {
        // It cannot return.
        let _dead = kill(Pid::this(), Signal::SIGKILL);
    }
}

#[cfg(not(feature = "testing"))]
fn may_die_after(_message: &str) {}

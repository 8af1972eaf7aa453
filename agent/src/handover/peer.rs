//! The process at the other end: who it is, whether it lives, and its end if it must not.
//!
//! Held by a pidfd, opened while the connection proves that the process lives: whatever happens to
//! its number later, nobody else is ever meant.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    time::Duration,
};

use nix::{
    sys::socket::{getsockopt, sockopt::PeerCredentials},
    unistd::geteuid,
};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::{io::Interest, time::timeout};

use crate::packets::watched;

/// A process that is ending has this long to be gone by itself.
const LAST_STEPS: Duration = Duration::from_secs(2);

pub(super) struct Peer {
    pub(super) uid: u32,
    pub(super) pid: i32,
    /// `None`: it runs in a process namespace that we do not see.
    process: Option<OwnedFd>,
}

impl Peer {
    /// Of a connection that stands.
    pub(super) fn of(socket: &impl AsFd) -> io::Result<Self> {
        let credentials = getsockopt(socket, PeerCredentials)?;
        let pid = credentials.pid();
        let process = Pid::from_raw(pid).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
        Ok(Self {
            uid: credentials.uid(),
            pid,
            process,
        })
    }

    pub(super) fn may_speak(&self) -> bool {
        self.uid == 0 || self.uid == geteuid().as_raw()
    }

    /// Not if it runs in a process namespace that we do not see.
    pub(super) fn can_be_ended(&self) -> bool {
        self.process.is_some()
    }

    /// As if it ran in a process namespace that we do not see.
    #[cfg(test)]
    pub(super) fn hide(&mut self) {
        self.process = None;
    }

    /// Makes sure that it does nothing any more: waits a moment for its end, then kills it. False:
    /// it cannot be seen, so it cannot be ended either.
    pub(super) async fn fence(&self) -> bool {
        let Some(process) = &self.process else {
            return false;
        };
        if self.pid == std::process::id().cast_signed() {
            // Both ends are ours (tests): there is nobody to wait for.
            return true;
        }
        if self.is_gone_within(process, LAST_STEPS).await {
            return true;
        }
        tracing::warn!(
            process = self.pid,
            "the other agent neither answers nor ends; killing it"
        );
        // It may end in this moment: then there is nothing to kill.
        let _gone = pidfd_send_signal(process, Signal::KILL);
        self.is_gone_within(process, LAST_STEPS).await
    }

    /// Returns when it has ended, true, or after `patience`, false.
    pub(super) async fn has_ended(&self, patience: Duration) -> bool {
        match &self.process {
            Some(process) => self.is_gone_within(process, patience).await,
            None => true,
        }
    }

    async fn is_gone_within(&self, process: &OwnedFd, patience: Duration) -> bool {
        let Ok(process) = process
            .try_clone()
            .and_then(|p| watched(p, Interest::READABLE))
        else {
            return false;
        };
        let ended = timeout(patience, process.readable()).await;
        matches!(ended, Ok(Ok(_)))
    }
}

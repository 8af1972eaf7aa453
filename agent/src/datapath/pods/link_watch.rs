//! Hears of interfaces that appear in a captured pod: what leaves by one without programs is plain,
//! and the next full turn may be twenty seconds away.
//!
//! One netlink socket per pod, opened in its namespace. It tells the loop which pod to look at and
//! nothing more; the check reads the kernel's state itself, so an event that is lost costs only
//! time. Whoever has NET_ADMIN in the pod can make as many events as it likes, so there is a pause
//! after each look.

use std::{io, sync::Arc, time::Duration};

use netlink_sys::Socket;
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::mpsc,
    task::AbortHandle,
    time::sleep,
};

use super::super::{
    devices,
    netlink::{self, LinkEvent},
    sockets::PodHandle,
};
use crate::{datapath::PodSockets, state::PodUid};

/// Between two looks that one pod's interfaces ask for.
const PAUSE: Duration = Duration::from_secs(1);
/// Messages read in a row.
const AT_ONCE: usize = 64;

/// Ends when dropped.
pub(super) struct LinkWatch {
    task: AbortHandle,
}

impl LinkWatch {
    /// On a thread of the agent's runtime.
    pub(super) fn start(handle: &PodHandle, looks: mpsc::Sender<PodUid>) -> io::Result<Self> {
        let socket = handle.netns().run(netlink::link_events)??;
        let uid = Arc::clone(handle.uid());
        let task = tokio::spawn(async move {
            if let Err(error) = listen(socket, &uid, looks).await {
                tracing::warn!(%uid, %error, "new interfaces of this pod are found late");
            }
        });
        Ok(Self {
            task: task.abort_handle(),
        })
    }
}

impl Drop for LinkWatch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn listen(socket: Socket, uid: &PodUid, looks: mpsc::Sender<PodUid>) -> io::Result<()> {
    // SAFETY: the descriptor stays open and the same for as long as it is registered, because the
    // socket owns it and is never replaced.
    let socket = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) }?;
    loop {
        let mut ready = socket.readable().await?;
        let mut news = false;
        for _ in 0..AT_ONCE {
            match netlink::read_link_events(socket.get_ref(), &mut |event| news |= matters(&event))
            {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    ready.clear_ready();
                    break;
                }
                // Too many for the socket's buffer: some are lost.
                Err(_) => news = true,
            }
        }
        if news {
            if looks.send(Arc::clone(uid)).await.is_err() {
                return Ok(());
            }
            sleep(PAUSE).await;
        }
    }
}

/// Our own devices come with the enrolment itself. That somebody deletes them matters.
fn matters(event: &LinkEvent) -> bool {
    match event {
        LinkEvent::Changed { index, loopback } => !loopback && !devices::is_our_index(*index),
        LinkEvent::Gone { index } => devices::is_our_index(*index),
    }
}

#[cfg(test)]
mod tests {
    use picomesh_common::config::{MESH0_IFINDEX, MESH1_IFINDEX};

    use super::*;

    #[test]
    fn others_that_change_and_ours_that_go_are_looked_at() {
        let changed = |index, loopback| matters(&LinkEvent::Changed { index, loopback });
        assert!(changed(2, false));
        assert!(!changed(1, true));
        assert!(!changed(MESH0_IFINDEX, false) && !changed(MESH1_IFINDEX, false));
        assert!(matters(&LinkEvent::Gone {
            index: MESH1_IFINDEX
        }));
        assert!(!matters(&LinkEvent::Gone { index: 2 }));
    }
}

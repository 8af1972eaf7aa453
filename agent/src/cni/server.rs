//! The agent's end of [`super::SOCKET`]: takes in new sandboxes, and answers when the kernel says
//! that their pods are captured.
//!
//! What is behind it is told by [`Pods`]: is the pod meshed, and where is it captured. The server
//! itself only remembers the sandbox ([`Sandboxes`], whose readers capture what is to be captured)
//! and waits, because the pod may be new to us too: the kubelet hears of it when we do.
//!
//! A pod counts as captured only in the very namespace that the plugin has sent. A sandbox that is
//! made anew has the pod's uid and another namespace, and for a moment the old one is still on
//! record.
//!
//! Strangers cost a place among [`CALLS`] for a few seconds. When all are taken, who calls waits in
//! the socket's queue, and the plugin's own patience ends that. Who waits for a capture has a place
//! among [`WAITING`] instead, so that pods of the mesh that do not start hold up no others.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use nix::{
    sys::{
        socket::{getsockopt, sockopt::PeerCredentials},
        stat::fstat,
        statfs::{NSFS_MAGIC, fstatfs},
    },
    unistd::geteuid,
};
use parking_lot::Mutex;
use thiserror::Error;
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tracing::{debug, info, warn};

use crate::{
    drain,
    packets::{self, Listener, Packet, watched},
};

use super::{
    SOCKET,
    message::{Answer, Ask, MAX_MESSAGE, Malformed, Question},
    sandboxes::{NetnsId, Sandboxes},
};

/// Calls at a time that are read and answered at once.
const CALLS: usize = 64;
/// Calls at a time that wait. A node has fewer pods.
const WAITING: usize = 512;
const BACKLOG: i32 = 256;
/// Between two looks. An enrolment takes tens of milliseconds.
const LOOK: Duration = Duration::from_millis(10);

/// How a pod stands, as far as the agent knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Nobody has told us of it yet, or of its namespace.
    Unknown,
    /// It is not to be captured.
    NotMeshed,
    /// The kernel takes its connections, in this namespace (inode).
    Captured { netns: u64 },
    /// It is to be captured and is not; if that was tried, why not.
    Awaited { reason: Option<String> },
}

/// What the rest of the agent knows of pods. Asked every few milliseconds while somebody waits.
pub trait Pods: Send + Sync + 'static {
    fn standing(&self, uid: &str) -> Standing;

    /// The one pod of this node that is called so.
    fn named(&self, namespace: &str, name: &str) -> Option<Named>;
}

/// A pod, found by its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named {
    pub uid: Arc<str>,
    /// It is the mirror of a static pod, which its runtime knows by this uid.
    pub mirror_of: Option<Arc<str>>,
}

/// How long is waited for what. Together less than the plugin waits ([`super::plugin::Patience`]),
/// or it never hears the reason.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// For the question.
    pub question: Duration,
    /// To hear of a pod at all.
    pub known: Duration,
    /// From the question to the capture.
    pub captured: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            question: Duration::from_secs(2),
            known: Duration::from_secs(10),
            captured: Duration::from_secs(25),
        }
    }
}

#[derive(Debug, Error)]
#[error("cannot listen at {path}")]
pub struct BindError {
    path: PathBuf,
    source: io::Error,
}

/// Bound and not yet served.
pub struct Server {
    listener: Listener,
}

impl Server {
    /// Listens, but where nobody calls, until [`Server::move_in`]: until then the agent before may
    /// be the one who answers.
    pub fn beside(run_dir: &Path) -> Result<Self, BindError> {
        let path = run_dir.join(SOCKET);
        match Listener::beside(path.clone(), BACKLOG) {
            Ok(listener) => Ok(Self { listener }),
            Err(source) => Err(BindError { path, source }),
        }
    }

    pub fn move_in(&self) -> Result<(), BindError> {
        self.listener.move_in().map_err(|source| BindError {
            path: self.listener.path().to_owned(),
            source,
        })
    }

    /// Serves until the end begins. Who waits then is hung up on, and asks the next agent; so is
    /// everybody when the future is dropped, and that agent is there already.
    pub async fn serve(
        self,
        pods: Arc<dyn Pods>,
        sandboxes: Arc<Sandboxes>,
        patience: Patience,
        mut drain: drain::Guard,
    ) {
        let places = Arc::new(Semaphore::new(CALLS));
        let waiting = Arc::new(Semaphore::new(WAITING));
        // They end with this future.
        let mut calls = JoinSet::new();
        loop {
            let place = places.clone().acquire_owned();
            let accepted = async {
                // The semaphore is never closed.
                let place = place.await.ok();
                (place, self.listener.accept().await)
            };
            let (place, accepted) = tokio::select! {
                accepted = accepted => accepted,
                // Nothing is kept of a call that has ended.
                Some(_) = calls.join_next() => continue,
                () = drain.begun() => return,
            };
            match accepted {
                Ok(socket) => {
                    let (pods, sandboxes) = (Arc::clone(&pods), Arc::clone(&sandboxes));
                    let waiting = Arc::clone(&waiting);
                    calls.spawn(async move {
                        let call = Call {
                            pods: &*pods,
                            sandboxes: &sandboxes,
                            patience,
                            place: Mutex::new(place),
                            waiting: &waiting,
                        };
                        if let Err(error) = call.serve(socket).await {
                            debug!(%error, "a caller of the CNI socket broke");
                        }
                    });
                }
                Err(error) => {
                    warn!(%error, "a call to the CNI socket was not accepted");
                    sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }
}

struct Call<'a> {
    pods: &'a dyn Pods,
    sandboxes: &'a Sandboxes,
    patience: Patience,
    /// Among [`CALLS`], until it has to wait.
    place: Mutex<Option<OwnedSemaphorePermit>>,
    waiting: &'a Semaphore,
}

impl Call<'_> {
    async fn serve(&self, socket: OwnedFd) -> io::Result<()> {
        let uid = getsockopt(&socket, PeerCredentials)?.uid();
        let socket = watched(socket, Interest::READABLE | Interest::WRITABLE)?;
        let answer = if uid != 0 && uid != geteuid().as_raw() {
            Answer::unknown(format!("uid {uid} may not ask; only root may"))
        } else {
            let read = |socket: &OwnedFd| packets::read(socket, MAX_MESSAGE + 1);
            let packet = socket.async_io(Interest::READABLE, read);
            match timeout(self.patience.question, packet).await {
                Ok(packet) => self.answer(packet?, &socket).await,
                Err(_) => return Err(io::Error::other("no question in time")),
            }
        };
        let bytes = answer.encode();
        socket
            .async_io(Interest::WRITABLE, |socket| {
                packets::write(socket, &bytes, &[])
            })
            .await
    }

    async fn answer(&self, packet: Packet, caller: &AsyncFd<OwnedFd>) -> Answer {
        let (asked, files) = match read(packet) {
            Ok(question) => question,
            Err(refusal) => return Answer::unknown(refusal.to_string()),
        };
        let begun = Instant::now();
        let Some(uid) = self.uid(&asked, begun).await else {
            return Answer::unknown(
                "the runtime does not tell the pod's uid (K8S_POD_UID), and no pod of that name is \
                 known on this node",
            );
        };
        let uid = &*uid;
        let pod = format!("{}/{}", asked.namespace, asked.name);
        match asked.ask {
            Ask::Add => {
                let netns = match namespace(files) {
                    Ok(netns) => netns,
                    Err(refusal) => return Answer::unknown(refusal.to_string()),
                };
                let id = netns.id;
                let path = asked.netns.as_deref().map(Path::new);
                debug!(%pod, uid, sandbox = asked.sandbox, netns = id.inode, "new sandbox");
                self.sandboxes
                    .add(uid, &asked.sandbox, netns.file, id, path);
                tokio::select! {
                    answer = self.settled(&asked, uid, id, begun) => {
                        if let Answer::Refused { reason } = &answer {
                            info!(%pod, uid, reason, "a pod does not start");
                        }
                        answer
                    }
                    // Nobody waits for it any more; the capture goes on.
                    () = hung_up(caller) => Answer::unknown("the caller is gone"),
                }
            }
            Ask::Remove => {
                self.sandboxes.remove(uid, &asked.sandbox);
                Answer::NotMeshed
            }
            Ask::Check => match self.standing(&asked, uid) {
                Standing::NotMeshed => Answer::NotMeshed,
                Standing::Captured { .. } => Answer::Captured,
                Standing::Unknown => Answer::unknown("the pod is not known"),
                Standing::Awaited { reason } => Answer::refused(not_captured(reason)),
            },
        }
    }

    /// As the runtime tells it, or that of the pod of that name once there is one.
    async fn uid(&self, asked: &Question, begun: Instant) -> Option<Arc<str>> {
        if let Some(uid) = asked.uid.as_deref().filter(|uid| !uid.is_empty()) {
            return Some(uid.into());
        }
        loop {
            if let Some(pod) = self.pods.named(&asked.namespace, &asked.name) {
                return Some(pod.uid);
            }
            // Only who starts may be new to us.
            if asked.ask != Ask::Add || begun.elapsed() >= self.patience.known {
                return None;
            }
            sleep(LOOK).await;
        }
    }

    /// A static pod has a uid that nobody but its kubelet knows, and its mirror tells it.
    fn standing(&self, asked: &Question, uid: &str) -> Standing {
        let standing = self.pods.standing(uid);
        let is_static = || {
            let named = self.pods.named(&asked.namespace, &asked.name);
            named.is_some_and(|pod| pod.mirror_of.as_deref() == Some(uid))
        };
        if standing == Standing::Unknown && is_static() {
            return Standing::NotMeshed;
        }
        standing
    }

    /// Waits until it is known what becomes of the pod.
    async fn settled(&self, asked: &Question, uid: &str, netns: NetnsId, begun: Instant) -> Answer {
        let mut waits = None;
        loop {
            let waited = begun.elapsed();
            match self.standing(asked, uid) {
                Standing::NotMeshed => return Answer::NotMeshed,
                Standing::Captured { netns: there } if there == netns.inode => {
                    return Answer::Captured;
                }
                Standing::Unknown if waited >= self.patience.known => {
                    let seconds = waited.as_secs();
                    return Answer::unknown(format!(
                        "it has not heard of the pod and its namespace within {seconds} s; does \
                         it reach the API server?"
                    ));
                }
                Standing::Awaited { reason } if waited >= self.patience.captured => {
                    return Answer::refused(not_captured(reason));
                }
                Standing::Captured { .. } if waited >= self.patience.captured => {
                    return Answer::refused("the sandbox before this one is still there");
                }
                Standing::Unknown | Standing::Captured { .. } | Standing::Awaited { .. } => {}
            }
            if waits.is_none() {
                let Ok(place) = self.waiting.try_acquire() else {
                    return Answer::unknown(format!("{WAITING} others wait already"));
                };
                waits = Some(place);
                self.place.lock().take();
            }
            sleep(LOOK).await;
        }
    }
}

fn not_captured(reason: Option<String>) -> String {
    reason.unwrap_or_else(|| "its turn has not come yet".into())
}

/// Returns when the other side has closed.
async fn hung_up(caller: &AsyncFd<OwnedFd>) {
    // Whatever comes after the question has no meaning, and its files are closed.
    let read = |socket: &OwnedFd| packets::read(socket, 1);
    while let Ok(packet) = caller.async_io(Interest::READABLE, read).await {
        if packet.bytes.is_empty() {
            return;
        }
    }
}

/// Why a call has no answer but this.
#[derive(Debug, Error)]
enum Refusal {
    #[error("the caller said nothing")]
    Silent,
    #[error("some of the files were lost on the way; raise the limit of open files (ulimit -n)")]
    FilesLost,
    #[error("the question is not understood: {0}")]
    Malformed(#[from] Malformed),
    #[error("{0} files came with the question; one network namespace was expected")]
    Files(usize),
    #[error("what came with the question is no network namespace")]
    NotANetns,
    #[error("what came with the question is the node's own network namespace")]
    Host,
}

fn read(packet: Packet) -> Result<(Question, Vec<OwnedFd>), Refusal> {
    if packet.files_lost {
        return Err(Refusal::FilesLost);
    }
    if packet.cut {
        let length = packet.bytes.len();
        return Err(Malformed::TooLong { length }.into());
    }
    if packet.bytes.is_empty() {
        return Err(Refusal::Silent);
    }
    Ok((Question::decode(&packet.bytes)?, packet.files))
}

struct Netns {
    file: OwnedFd,
    id: NetnsId,
}

/// The one file that came with the question.
fn namespace(files: Vec<OwnedFd>) -> Result<Netns, Refusal> {
    let count = files.len();
    let file = match <[OwnedFd; 1]>::try_from(files) {
        Ok([file]) => file,
        Err(_) => return Err(Refusal::Files(count)),
    };
    let is_nsfs = fstatfs(&file).is_ok_and(|fs| fs.filesystem_type() == NSFS_MAGIC);
    let found = fstat(file.as_fd()).map_err(|_| Refusal::NotANetns)?;
    // A namespace of another kind (mnt, pid) is on nsfs too; whoever enters it is told then.
    if !is_nsfs {
        return Err(Refusal::NotANetns);
    }
    let id = NetnsId {
        device: found.st_dev,
        inode: found.st_ino,
    };
    if NetnsId::at(Path::new("/proc/self/ns/net")) == Some(id) {
        return Err(Refusal::Host);
    }
    Ok(Netns { file, id })
}

#[cfg(test)]
mod tests;

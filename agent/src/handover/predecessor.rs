//! The side that is there: offers what it has, goes on as before until the successor serves, and
//! then leaves.
//!
//! `app` binds [`Server`] in the run directory and gives it an [`Estate`]. Strangers cost a place
//! among a few for a few seconds, and nothing else.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use futures_util::future::BoxFuture;
use thiserror::Error;
use tokio::{
    sync::{Semaphore, watch},
    time::{Instant, timeout_at},
};
use tracing::{debug, info, warn};

use crate::{packets::Listener, places::Places};

use super::{
    Channel, ChannelError, NAME,
    channel::Received,
    message::{Hello, Malformed, Message, OLDEST_PROTOCOL, Offer, PROTOCOL, What},
};

/// Conversations at a time, the successor's among them.
const CONVERSATIONS: usize = 32;
/// Callers that wait for one. A successor that is not answered in time takes us for dead.
const BACKLOG: i32 = 128;
/// Messages that we do not know, in one conversation.
const MOST_UNKNOWN: usize = 16;

/// What is left to the next agent, and how.
pub trait Estate: Send + Sync + 'static {
    /// Copies of all open files that are handed over to one that speaks `protocol`.
    fn files(&self, protocol: u16) -> io::Result<Vec<(What, OwnedFd)>>;
    /// From when this returns, nothing is repaired or written down any more.
    fn pause(&self) -> BoxFuture<'_, ()>;
    /// The successor is dead: everything as before.
    fn resume(&self) -> BoxFuture<'_, ()>;
    /// The successor serves. Accepts no more, gives up all it shares; returns when it has.
    fn leave(&self) -> BoxFuture<'_, ()>;
}

/// How far it has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    Alone,
    /// A successor was made an offer.
    Underway,
    /// It serves.
    Taken,
}

/// How long the successor may take for what.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// For its first word.
    pub hello: Duration,
    /// To read manifests and get certificates.
    pub ready: Duration,
    /// To listen in every pod.
    pub taken: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            hello: Duration::from_secs(2),
            ready: Duration::from_secs(300),
            taken: Duration::from_secs(60),
        }
    }
}

/// Who may succeed, and what it is told.
#[derive(Clone, Debug)]
pub struct Terms {
    pub version: String,
    pub node: String,
    pub layout: u32,
    /// How long our connections go on afterwards.
    pub drain: Duration,
    pub patience: Patience,
}

#[derive(Debug, Error)]
pub enum BindError {
    #[error("cannot listen at {path}")]
    Socket { path: PathBuf, source: io::Error },
}

/// Bound and not yet served.
pub struct Server {
    listener: Listener,
}

impl Server {
    /// Listens, but where nobody calls, until [`Server::move_in`]. Only the holder of the run
    /// directory's lock may do this, or the successor of one that has said `commit`.
    pub fn beside(run_dir: &Path) -> Result<Self, BindError> {
        let path = run_dir.join(NAME);
        match Listener::beside(path.clone(), BACKLOG) {
            Ok(listener) => Ok(Self { listener }),
            Err(source) => Err(BindError::Socket { path, source }),
        }
    }

    /// Takes the place, and that of whatever socket is there, in one step: whoever calls meets the
    /// one or the other. The file stays when the agent ends, and is found dead by the next.
    pub fn move_in(&self) -> Result<(), BindError> {
        self.listener.move_in().map_err(|source| BindError::Socket {
            path: self.listener.path().to_owned(),
            source,
        })
    }

    /// Serves until a successor has taken over. Dropping the future leaves everything as it is.
    pub async fn serve(
        self,
        terms: Terms,
        estate: Arc<dyn Estate>,
        progress: watch::Sender<Progress>,
    ) {
        let house = Arc::new(House {
            terms,
            estate,
            seat: Semaphore::new(1),
            progress,
        });
        let places = Places::new("hand-over socket", CONVERSATIONS);
        let mut seen = house.progress.subscribe();
        let accept = || async { self.listener.accept().await.and_then(Channel::over) };
        loop {
            let (channel, place) = tokio::select! {
                next = places.next(accept) => next,
                // The sender is in the house.
                _ = seen.wait_for(|progress| *progress == Progress::Taken) => return,
            };
            let house = Arc::clone(&house);
            tokio::spawn(async move {
                house.receive(channel).await;
                drop(place);
            });
        }
    }
}

/// What all conversations share.
struct House {
    terms: Terms,
    estate: Arc<dyn Estate>,
    /// There is one successor at a time.
    seat: Semaphore,
    progress: watch::Sender<Progress>,
}

/// Why a conversation ended without a successor.
#[derive(Debug, Error)]
enum NoSuccessor {
    #[error("{0}")]
    Refused(String),
    #[error("it says {said} where {wanted} is due")]
    OutOfTurn {
        said: &'static str,
        wanted: &'static str,
    },
    #[error("{count} files came with {said}, where none belong")]
    Files { said: &'static str, count: usize },
    #[error("it says nothing for {} s where {wanted} is due", waited.as_secs())]
    Silent {
        wanted: &'static str,
        waited: Duration,
    },
    #[error(transparent)]
    Channel(#[from] ChannelError),
    #[error("what is to be handed over: {0}")]
    NothingToOffer(io::Error),
}

impl House {
    async fn receive(&self, channel: Channel) {
        let (process, uid) = (channel.peer.pid, channel.peer.uid);
        if !channel.peer.may_speak() {
            warn!(
                process,
                uid, "a stranger called the hand-over socket; only root may"
            );
            return;
        }
        if let Err(why) = self.converse(&channel).await {
            // It may hang up before it hears this.
            let _gone = channel.send(&Message::refused(why.to_string()), &[]).await;
            warn!(process, %why, "no hand-over; going on as before");
        }
    }

    async fn converse(&self, channel: &Channel) -> Result<(), NoSuccessor> {
        let Patience {
            hello,
            ready,
            taken,
        } = self.terms.patience;
        let heard = self.hear(channel, "hello", hello).await?;
        let Message::Hello(hello) = &heard else {
            return Err(out_of_turn(&heard, "hello"));
        };
        self.consider(hello)?;
        let Ok(_seat) = self.seat.try_acquire() else {
            return Err(NoSuccessor::Refused(
                "another agent is taking over already; let it finish".into(),
            ));
        };
        self.progress.send_replace(Progress::Underway);
        let taken = self.hand_over(channel, hello.protocol, ready, taken).await;
        self.progress.send_replace(match &taken {
            Ok(()) => Progress::Taken,
            Err(_) => Progress::Alone,
        });
        taken
    }

    async fn hand_over(
        &self,
        channel: &Channel,
        protocol: u16,
        ready: Duration,
        taken: Duration,
    ) -> Result<(), NoSuccessor> {
        let process = channel.peer.pid;
        info!(process, "a successor is here");
        let (kinds, files): (Vec<What>, Vec<OwnedFd>) = self
            .estate
            .files(protocol)
            .map_err(NoSuccessor::NothingToOffer)?
            .into_iter()
            .unzip();
        let offer = Message::Offer(Offer {
            protocol: PROTOCOL,
            version: self.terms.version.clone(),
            drain_milliseconds: self.terms.drain.as_millis().try_into().unwrap_or(u64::MAX),
            files: kinds,
        });
        let borrowed: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        channel
            .send(&offer, &borrowed)
            .await
            .map_err(ChannelError::from)?;
        drop(borrowed);
        drop(files);
        let heard = self.hear(channel, "ready", ready).await?;
        let Message::Ready = heard else {
            return Err(out_of_turn(&heard, "ready"));
        };

        info!(process, "the successor is ready; it repairs from now on");
        self.estate.pause().await;
        let heard = match channel.send(&Message::Commit, &[]).await {
            Ok(()) => self.hear_at_last(channel, "taken", taken).await,
            Err(error) => Err(ChannelError::from(error).into()),
        };
        let heard = heard.and_then(|message| {
            let Message::Taken = message else {
                return Err(out_of_turn(&message, "taken"));
            };
            Ok(())
        });
        match heard {
            Ok(()) => {
                info!(process, "the successor serves");
                self.estate.leave().await;
                Ok(())
            }
            Err(why) => {
                // Told at once, so that one that lives ends by itself.
                let _gone = channel.send(&Message::refused(why.to_string()), &[]).await;
                if !channel.peer.fence().await {
                    warn!(
                        process,
                        "the successor cannot be ended from here; nothing is repaired until it \
                         has ended"
                    );
                    channel.hung_up().await;
                }
                self.estate.resume().await;
                Err(why)
            }
        }
    }

    /// From one that repairs already. It must be here in time, or the one who owes it is ended; who
    /// cannot be ended from here may wake at any time, and is waited for.
    async fn hear_at_last(
        &self,
        channel: &Channel,
        wanted: &'static str,
        patience: Duration,
    ) -> Result<Message, NoSuccessor> {
        loop {
            match self.hear(channel, wanted, patience).await {
                Err(why @ NoSuccessor::Silent { .. }) if !channel.peer.can_be_ended() => warn!(
                    %why,
                    "the successor cannot be ended from here; end it: nothing is repaired meanwhile"
                ),
                heard => return heard,
            }
        }
    }

    /// The next message that we know, with no files; it must be here in time.
    async fn hear(
        &self,
        channel: &Channel,
        wanted: &'static str,
        patience: Duration,
    ) -> Result<Message, NoSuccessor> {
        let deadline = Instant::now() + patience;
        for _ in 0..MOST_UNKNOWN {
            match timeout_at(deadline, channel.receive()).await {
                Err(_) => {
                    return Err(NoSuccessor::Silent {
                        wanted,
                        waited: patience,
                    });
                }
                Ok(Ok(Received { message, files })) if files.is_empty() => return Ok(message),
                Ok(Ok(Received { message, files })) => {
                    return Err(NoSuccessor::Files {
                        said: message.name(),
                        count: files.len(),
                    });
                }
                Ok(Err(ChannelError::Malformed(Malformed::Unknown { of }))) => {
                    debug!(of, "a message that is not known here");
                    channel
                        .send(&Message::Unknown { of }, &[])
                        .await
                        .map_err(ChannelError::from)?;
                }
                Ok(Err(error)) => return Err(error.into()),
            }
        }
        Err(NoSuccessor::Refused(format!(
            "{MOST_UNKNOWN} messages in a row are not known to this version"
        )))
    }

    fn consider(&self, hello: &Hello) -> Result<(), NoSuccessor> {
        let refuse = |reason: String| Err(NoSuccessor::Refused(reason));
        if hello.protocol < OLDEST_PROTOCOL {
            return refuse(format!(
                "protocol {} is too old, {OLDEST_PROTOCOL} is the oldest spoken here; end this \
                 agent first",
                hello.protocol
            ));
        }
        if hello.node != self.terms.node {
            return refuse(format!(
                "this directory belongs to the agent of node {}; give that of {} its own",
                self.terms.node, hello.node
            ));
        }
        if hello.layout != self.terms.layout {
            return refuse(format!(
                "the maps of layout {} cannot be handed to an agent with layout {}; end this one \
                 first, connections wait meanwhile",
                self.terms.layout, hello.layout
            ));
        }
        Ok(())
    }
}

fn out_of_turn(said: &Message, wanted: &'static str) -> NoSuccessor {
    match said {
        Message::Refused { reason } => NoSuccessor::Refused(reason.clone()),
        Message::Hello(_)
        | Message::Offer(_)
        | Message::Ready
        | Message::Commit
        | Message::Taken
        | Message::Unknown { .. } => NoSuccessor::OutOfTurn {
            said: said.name(),
            wanted,
        },
    }
}

#[cfg(test)]
mod tests {
    use parking_lot::Mutex;
    use socket2::{Domain, Socket};
    use tokio::time::sleep;

    use crate::packets::packet_socket;

    use super::*;

    #[derive(Default)]
    struct Said(Mutex<Vec<&'static str>>);

    impl Said {
        fn note(&self, word: &'static str) -> BoxFuture<'_, ()> {
            self.0.lock().push(word);
            Box::pin(async {})
        }
    }

    impl Estate for Said {
        fn files(&self, _protocol: u16) -> io::Result<Vec<(What, OwnedFd)>> {
            Ok(Vec::new())
        }

        fn pause(&self) -> BoxFuture<'_, ()> {
            self.note("pause")
        }

        fn resume(&self) -> BoxFuture<'_, ()> {
            self.note("resume")
        }

        fn leave(&self) -> BoxFuture<'_, ()> {
            self.note("leave")
        }
    }

    const TAKEN: Duration = Duration::from_millis(50);

    /// A successor of another process namespace that has been told `commit`, what became of the
    /// estate, and the conversation.
    async fn committed() -> (
        Channel,
        Arc<Said>,
        tokio::task::JoinHandle<Result<(), NoSuccessor>>,
    ) {
        let (ours, theirs) = Socket::pair(Domain::UNIX, packet_socket(), None).unwrap();
        let theirs = Channel::over(theirs.into()).unwrap();
        let mut ours = Channel::over(ours.into()).unwrap();
        ours.peer.hide();
        let said = Arc::new(Said::default());
        let house = House {
            terms: Terms {
                version: "0.1.0".into(),
                node: "node-1".into(),
                layout: 3,
                drain: Duration::from_secs(1),
                patience: Patience {
                    taken: TAKEN,
                    ..Patience::default()
                },
            },
            estate: said.clone(),
            seat: Semaphore::new(1),
            progress: watch::Sender::new(Progress::Alone),
        };
        let conversation = tokio::spawn(async move { house.converse(&ours).await });
        let hello = Message::Hello(Hello {
            protocol: PROTOCOL,
            version: "0.2.0".into(),
            node: "node-1".into(),
            layout: 3,
        });
        for word in [hello, Message::Ready] {
            theirs.send(&word, &[]).await.unwrap();
            theirs.receive().await.unwrap();
        }
        sleep(4 * TAKEN).await;
        assert_eq!(*said.0.lock(), ["pause"], "it may wake and repair, too");
        (theirs, said, conversation)
    }

    #[tokio::test]
    async fn one_that_cannot_be_ended_is_waited_for_until_it_hangs_up() {
        let (successor, said, conversation) = committed().await;
        drop(successor);
        assert!(conversation.await.unwrap().is_err());
        assert_eq!(*said.0.lock(), ["pause", "resume"]);
    }

    #[tokio::test]
    async fn one_that_cannot_be_ended_may_take_over_late() {
        let (successor, said, conversation) = committed().await;
        successor.send(&Message::Taken, &[]).await.unwrap();
        conversation.await.unwrap().unwrap();
        assert_eq!(*said.0.lock(), ["pause", "leave"]);
    }

    #[tokio::test]
    async fn one_that_talks_nonsense_and_cannot_be_ended_is_waited_for() {
        let (successor, said, conversation) = committed().await;
        successor.send(&Message::Commit, &[]).await.unwrap();
        sleep(4 * TAKEN).await;
        assert_eq!(*said.0.lock(), ["pause"]);
        drop(successor);
        assert!(conversation.await.unwrap().is_err());
        assert_eq!(*said.0.lock(), ["pause", "resume"]);
    }
}

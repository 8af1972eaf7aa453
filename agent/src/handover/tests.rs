//! Both sides over a real socket, in one process. What either does to the other's process cannot be
//! seen here: nobody ends itself.

use std::{
    fs::File,
    io::{Read, Write},
    os::fd::{AsFd, OwnedFd},
    path::Path,
    sync::Arc,
    time::Duration,
};

use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{sleep, timeout},
};

use super::{
    message::{Hello, Offer, PROTOCOL, What},
    predecessor::{Estate, Patience, Progress, Server, Terms},
    successor::{CallError, Found, Predecessor, call},
    *,
};

const SOON: Duration = Duration::from_secs(5);

/// An estate of one file, that writes down what becomes of it.
struct Book {
    file: Mutex<Option<OwnedFd>>,
    said: Mutex<Vec<&'static str>>,
}

impl Book {
    fn said(&self) -> Vec<&'static str> {
        self.said.lock().clone()
    }
}

impl Estate for Book {
    fn files(&self, _protocol: u16) -> std::io::Result<Vec<(What, OwnedFd)>> {
        let file = self.file.lock();
        let copies = file.iter().map(|file| Ok((What::Lock, file.try_clone()?)));
        copies.collect()
    }

    fn pause(&self) -> BoxFuture<'_, ()> {
        Box::pin(async { self.said.lock().push("pause") })
    }

    fn resume(&self) -> BoxFuture<'_, ()> {
        Box::pin(async { self.said.lock().push("resume") })
    }

    fn leave(&self) -> BoxFuture<'_, ()> {
        Box::pin(async {
            self.file.lock().take();
            self.said.lock().push("leave");
        })
    }
}

struct Stage {
    dir: tempfile::TempDir,
    book: Arc<Book>,
    /// Ends when every copy of the estate's file is closed.
    closes: File,
    progress: watch::Receiver<Progress>,
    _serving: JoinHandle<()>,
}

fn patience() -> Patience {
    Patience {
        hello: Duration::from_millis(300),
        ready: Duration::from_millis(600),
        taken: Duration::from_millis(300),
    }
}

fn stage() -> Stage {
    let dir = tempfile::tempdir().unwrap();
    let (closes, file) = std::io::pipe().unwrap();
    let book = Arc::new(Book {
        file: Mutex::new(Some(file.into())),
        said: Mutex::default(),
    });
    let server = Server::beside(dir.path()).unwrap();
    server.move_in().unwrap();
    let terms = Terms {
        version: "0.1.0".into(),
        node: "node-1".into(),
        layout: 3,
        drain: Duration::from_secs(30),
        patience: patience(),
    };
    let (progressed, progress) = watch::channel(Progress::Alone);
    let serving = tokio::spawn(server.serve(terms, book.clone(), progressed));
    Stage {
        dir,
        book,
        closes: File::from(OwnedFd::from(closes)),
        progress,
        _serving: serving,
    }
}

impl Stage {
    fn path(&self) -> std::path::PathBuf {
        self.dir.path().join(NAME)
    }

    async fn channel(&self) -> Channel {
        Channel::connect(&self.path()).await.unwrap()
    }

    async fn reaches(&mut self, wanted: Progress) {
        let reached = self.progress.wait_for(|now| *now == wanted);
        timeout(SOON, reached).await.unwrap().unwrap();
    }

    async fn succeeds(&self) -> Box<Predecessor> {
        loop {
            match call(self.dir.path(), hello()).await {
                Ok(Found::Predecessor(predecessor)) => return predecessor,
                Ok(Found::Nobody) => panic!("nobody is there"),
                // The one before is being shown out.
                Err(CallError::Refused { reason, .. }) if reason.contains("already") => {
                    sleep(Duration::from_millis(5)).await;
                }
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// The agent that is there still has everything, and a successor would get it.
    async fn is_as_before(&mut self) {
        self.reaches(Progress::Alone).await;
        let next = self.succeeds().await;
        assert_eq!(next.files.len(), 1);
        next.ready().await.unwrap();
        next.taken().await;
        self.reaches(Progress::Taken).await;
    }

    /// Nobody has a copy of what was handed over any more.
    async fn all_is_closed(mut self) {
        let ended = tokio::task::spawn_blocking(move || self.closes.read(&mut [0; 1]).unwrap());
        assert_eq!(timeout(SOON, ended).await.unwrap().unwrap(), 0);
    }
}

fn hello() -> Hello {
    Hello {
        protocol: PROTOCOL,
        version: "0.2.0".into(),
        node: "node-1".into(),
        layout: 3,
    }
}

async fn refusal(channel: &Channel) -> String {
    let heard = timeout(SOON, channel.receive())
        .await
        .unwrap()
        .unwrap()
        .message;
    let Message::Refused { reason } = heard else {
        panic!("{}", heard.name());
    };
    reason
}

#[tokio::test]
async fn everything_is_handed_over_once_and_the_one_before_keeps_nothing() {
    let mut stage = stage();
    let predecessor = stage.succeeds().await;
    stage.reaches(Progress::Underway).await;
    assert_eq!(
        stage.book.said(),
        Vec::<&str>::new(),
        "it goes on as before"
    );
    predecessor.ready().await.unwrap();
    assert_eq!(stage.book.said(), ["pause"]);
    let [(What::Lock, file)] = &predecessor.files[..] else {
        panic!("{:?}", predecessor.files);
    };
    File::from(file.try_clone().unwrap())
        .write_all(b"x")
        .unwrap();
    predecessor.taken().await;
    stage.reaches(Progress::Taken).await;
    assert_eq!(stage.book.said(), ["pause", "leave"]);
    // Nobody serves the socket any more; the next agent finds nobody there.
    let after = call(stage.dir.path(), hello()).await.unwrap();
    assert!(matches!(after, Found::Nobody));
    let mut byte = [0];
    stage.closes.read_exact(&mut byte).unwrap();
    stage.all_is_closed().await;
}

#[tokio::test]
async fn a_successor_that_dies_after_hello_costs_nothing() {
    let mut stage = stage();
    let channel = stage.channel().await;
    channel.send(&Message::Hello(hello()), &[]).await.unwrap();
    drop(channel);
    stage.reaches(Progress::Alone).await;
    assert_eq!(stage.book.said(), Vec::<&str>::new());
    stage.is_as_before().await;
    stage.all_is_closed().await;
}

#[tokio::test]
async fn a_successor_that_dies_after_the_offer_costs_nothing() {
    let mut stage = stage();
    let predecessor = stage.succeeds().await;
    stage.reaches(Progress::Underway).await;
    drop(predecessor);
    stage.reaches(Progress::Alone).await;
    assert_eq!(stage.book.said(), Vec::<&str>::new());
    stage.is_as_before().await;
    stage.all_is_closed().await;
}

#[tokio::test]
async fn a_successor_that_dies_after_ready_costs_nothing() {
    let mut stage = stage();
    let channel = stage.channel().await;
    channel.send(&Message::Hello(hello()), &[]).await.unwrap();
    channel.receive().await.unwrap();
    channel.send(&Message::Ready, &[]).await.unwrap();
    drop(channel);
    stage.reaches(Progress::Underway).await;
    stage.reaches(Progress::Alone).await;
    assert_eq!(stage.book.said(), ["pause", "resume"]);
    stage.is_as_before().await;
    stage.all_is_closed().await;
}

#[tokio::test]
async fn a_successor_that_dies_after_commit_costs_nothing() {
    let mut stage = stage();
    let predecessor = stage.succeeds().await;
    predecessor.ready().await.unwrap();
    drop(predecessor);
    stage.reaches(Progress::Alone).await;
    assert_eq!(stage.book.said(), ["pause", "resume"]);
    stage.is_as_before().await;
    stage.all_is_closed().await;
}

#[tokio::test]
async fn a_successor_that_falls_silent_is_given_up_after_each_message() {
    for (said, expected) in [(1, vec![]), (2, vec!["pause", "resume"])] {
        let mut stage = stage();
        let channel = stage.channel().await;
        channel.send(&Message::Hello(hello()), &[]).await.unwrap();
        channel.receive().await.unwrap();
        stage.reaches(Progress::Underway).await;
        if said > 1 {
            channel.send(&Message::Ready, &[]).await.unwrap();
            channel.receive().await.unwrap();
        }
        let reason = refusal(&channel).await;
        assert!(reason.contains("says nothing"), "{reason}");
        stage.reaches(Progress::Alone).await;
        assert_eq!(stage.book.said(), expected);
        stage.is_as_before().await;
    }
}

#[tokio::test]
async fn a_successor_that_was_given_up_before_it_is_ready_ends_and_harms_nobody() {
    let mut stage = stage();
    let late = stage.succeeds().await;
    stage.reaches(Progress::Underway).await;
    stage.reaches(Progress::Alone).await;
    match late.ready().await {
        Err(CallError::Refused { reason, .. }) => {
            assert!(reason.contains("says nothing"), "{reason}");
        }
        other => panic!("the one before lives and was taken for dead: {other:?}"),
    }
    drop(late);
    stage.is_as_before().await;
}

#[tokio::test]
async fn a_refusal_is_heard_although_ready_was_said_at_the_same_moment() {
    let dir = tempfile::tempdir().unwrap();
    let listener = listen(dir.path());
    let server = tokio::task::spawn_blocking(move || listener.accept().unwrap().0);
    let called = tokio::spawn({
        let dir = dir.path().to_owned();
        async move { call(&dir, hello()).await }
    });
    let channel = Channel::over(server.await.unwrap().into()).unwrap();
    channel.receive().await.unwrap();
    let offer = Message::Offer(Offer {
        protocol: PROTOCOL,
        version: "0.1.0".into(),
        drain_milliseconds: 1,
        files: Vec::new(),
    });
    channel.send(&offer, &[]).await.unwrap();
    let Ok(Found::Predecessor(predecessor)) = called.await.unwrap() else {
        panic!("nobody is there");
    };
    let hangs_up = async {
        // Meanwhile the other side has spoken, and is not read.
        sleep(Duration::from_millis(50)).await;
        raw(&channel, &Message::refused("too late").encode(), &[]).unwrap();
        drop(channel);
    };
    let ((), said) = tokio::join!(hangs_up, predecessor.ready());
    assert!(
        matches!(&said, Err(CallError::Refused { reason, .. }) if reason == "too late"),
        "{said:?}"
    );
}

#[tokio::test]
async fn of_two_successors_one_is_sent_away_and_may_come_again() {
    let mut stage = stage();
    let first = stage.succeeds().await;
    match call(stage.dir.path(), hello()).await {
        Err(CallError::Refused { reason, .. }) => {
            assert!(reason.contains("taking over already"), "{reason}");
        }
        other => panic!("{:?}", other.err()),
    }
    drop(first);
    stage.is_as_before().await;
}

#[tokio::test]
async fn another_node_layout_or_protocol_is_refused_with_the_remedy() {
    let mut stage = stage();
    let others = [
        (
            Hello {
                node: "node-2".into(),
                ..hello()
            },
            "node node-1",
        ),
        (
            Hello {
                layout: 4,
                ..hello()
            },
            "end this one first",
        ),
        (
            Hello {
                protocol: 0,
                ..hello()
            },
            "too old",
        ),
    ];
    for (other, expected) in others {
        match call(stage.dir.path(), other).await {
            Err(CallError::Refused { reason, .. }) => {
                assert!(reason.contains(expected), "{reason}");
            }
            other => panic!("{expected}: {:?}", other.err()),
        }
    }
    assert_eq!(stage.book.said(), Vec::<&str>::new());
    stage.is_as_before().await;
}

#[tokio::test]
async fn a_message_of_a_later_version_is_answered_and_changes_nothing() {
    let mut stage = stage();
    let channel = stage.channel().await;
    let later = br#"{"message":"greetings","from":"the future"}"#;
    raw(&channel, later, &[]).unwrap();
    let answer = channel.receive().await.unwrap().message;
    let of = "greetings".into();
    assert_eq!(answer, Message::Unknown { of });
    channel.send(&Message::Hello(hello()), &[]).await.unwrap();
    channel.receive().await.unwrap();
    raw(&channel, later, &[]).unwrap();
    let of = "greetings".into();
    let answer = channel.receive().await.unwrap().message;
    assert_eq!(answer, Message::Unknown { of });
    channel.send(&Message::Ready, &[]).await.unwrap();
    let answer = channel.receive().await.unwrap().message;
    assert_eq!(answer, Message::Commit);
    channel.send(&Message::Taken, &[]).await.unwrap();
    stage.reaches(Progress::Taken).await;
}

#[tokio::test]
async fn who_only_says_unknown_things_is_not_listened_to_for_ever() {
    let stage = stage();
    let channel = stage.channel().await;
    let reason = loop {
        // Who is refused may hear so only after its next word found nobody.
        let _gone = raw(&channel, br#"{"message":"blah"}"#, &[]);
        let heard = channel.receive().await.unwrap().message;
        if let Message::Refused { reason } = heard {
            break reason;
        }
        assert!(matches!(heard, Message::Unknown { .. }), "{}", heard.name());
    };
    assert!(reason.contains("in a row"), "{reason}");
}

#[tokio::test]
async fn garbage_oversize_and_messages_out_of_turn_are_refused_in_bounded_time() {
    let mut stage = stage();
    let oversize = vec![b'x'; message::MAX_MESSAGE + 1];
    let cut = &Message::Hello(hello()).encode()[..20];
    for packet in [&b"\0\x01\x02"[..], b"{}", cut, &oversize] {
        let channel = stage.channel().await;
        raw(&channel, packet, &[]).unwrap();
        let _reason = refusal(&channel).await;
        assert!(matches!(channel.receive().await, Err(ChannelError::Closed)));
    }
    for early in [Message::Ready, Message::Commit, Message::Taken] {
        let channel = stage.channel().await;
        channel.send(&early, &[]).await.unwrap();
        let reason = refusal(&channel).await;
        assert!(reason.contains("where hello is due"), "{reason}");
    }
    // Slow, and silent.
    let slow = stage.channel().await;
    let reason = refusal(&slow).await;
    assert!(reason.contains("says nothing"), "{reason}");
    assert_eq!(stage.book.said(), Vec::<&str>::new());
    stage.is_as_before().await;
}

#[tokio::test]
async fn files_where_none_belong_are_closed_and_refused() {
    let mut stage = stage();
    let hello = Message::Hello(hello()).encode();
    for packet in [&hello[..], b"garbage", b"{\"message\":\"later\"}"] {
        let (closes, file) = std::io::pipe().unwrap();
        let channel = stage.channel().await;
        let file = OwnedFd::from(file);
        let many: Vec<_> = (0..200).map(|_| file.as_fd()).collect();
        raw(&channel, packet, &many).unwrap();
        drop(many);
        drop(file);
        // Every copy is closed, whatever was wrong.
        let mut closes = File::from(OwnedFd::from(closes));
        let ended = tokio::task::spawn_blocking(move || closes.read(&mut [0; 1]).unwrap());
        assert_eq!(timeout(SOON, ended).await.unwrap().unwrap(), 0);
    }
    stage.is_as_before().await;
}

#[tokio::test]
async fn idle_strangers_do_not_keep_a_successor_out_for_long() {
    let mut stage = stage();
    let mut strangers = Vec::new();
    for _ in 0..12 {
        strangers.push(timeout(SOON, stage.channel()).await.unwrap());
    }
    timeout(SOON, stage.is_as_before()).await.unwrap();
}

#[tokio::test]
async fn a_successor_gets_no_answer_it_could_mistake_for_yes() {
    // What an agent of another version may answer to `hello` and to `ready`.
    let answers = [
        Message::Commit,
        Message::Unknown { of: "hello".into() },
        Message::Offer(Offer {
            protocol: 0,
            version: "0".into(),
            drain_milliseconds: 1,
            files: Vec::new(),
        }),
        // Names a file that does not come.
        Message::Offer(Offer {
            protocol: PROTOCOL,
            version: "0".into(),
            drain_milliseconds: 1,
            files: vec![What::Lock],
        }),
    ];
    for answer in answers {
        let dir = tempfile::tempdir().unwrap();
        let listener = listen(dir.path());
        let name = answer.name();
        let server = tokio::task::spawn_blocking(move || listener.accept().unwrap().0);
        let called = tokio::spawn({
            let dir = dir.path().to_owned();
            async move { call(&dir, hello()).await }
        });
        let channel = Channel::over(server.await.unwrap().into());
        let channel = channel.unwrap();
        channel.receive().await.unwrap();
        channel.send(&answer, &[]).await.unwrap();
        let outcome = timeout(SOON, called).await.unwrap().unwrap();
        assert!(outcome.is_err(), "{name}");
    }
}

#[tokio::test]
async fn an_agent_that_ends_while_it_is_called_is_nobody() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(
        call(dir.path(), hello()).await.unwrap(),
        Found::Nobody
    ));
    let listener = listen(dir.path());
    let ends = tokio::task::spawn_blocking(move || drop(listener.accept().unwrap()));
    let called = call(dir.path(), hello());
    assert!(matches!(
        timeout(SOON, called).await.unwrap().unwrap(),
        Found::Nobody
    ));
    ends.await.unwrap();
    // Its file is left behind.
    sleep(Duration::from_millis(10)).await;
    assert!(matches!(
        call(dir.path(), hello()).await.unwrap(),
        Found::Nobody
    ));
}

fn listen(dir: &Path) -> socket2::Socket {
    let listener = socket2::Socket::new(
        socket2::Domain::UNIX,
        socket2::Type::SEQPACKET.cloexec(),
        None,
    )
    .unwrap();
    let at = socket2::SockAddr::unix(dir.join(NAME)).unwrap();
    listener.bind(&at).unwrap();
    listener.listen(4).unwrap();
    listener
}

/// One packet as it is.
fn raw(
    channel: &Channel,
    bytes: &[u8],
    files: &[std::os::fd::BorrowedFd<'_>],
) -> rustix::io::Result<usize> {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
    let mut beside = SendAncillaryBuffer::new(&mut space);
    if !files.is_empty() {
        assert!(beside.push(SendAncillaryMessage::ScmRights(files)));
    }
    let packet = [std::io::IoSlice::new(bytes)];
    sendmsg(channel, &packet, &mut beside, SendFlags::empty())
}

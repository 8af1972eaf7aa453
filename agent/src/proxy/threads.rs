//! The data threads: one per core, each with everything a flow needs, so that no flow leaves its
//! thread and no lock is shared on its way.
//!
//! A thread is told by bounded channel which pods to serve. Beside the connections it runs two
//! small tasks: one decides again on every new mesh, one looks after tunnels and status once a
//! second.
//!
//! **Retiring.** When a successor has put its own listeners in the place of ours, ours may still
//! have connections in their queues, and half-open ones whose last packet is under way. A listener
//! that is closed loses both. So they stay open until nobody has come for a while; only then are
//! they closed, and only after that may the thread end.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    io,
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::{
    net::{TcpListener, TcpStream},
    runtime::{Builder, LocalOptions},
    sync::{Notify, Semaphore, mpsc, oneshot},
    task::spawn_local,
    time::sleep,
};

use super::{
    COMMANDS, Caps, ProxySettings, Surroundings, accept,
    conns::{Callee, Caller, Conn, Conns},
    copy::{Scratch, Turns},
    inbound,
    limits::{Bucket, Limits, Permit, Rate, Share, Way},
    outbound,
    reason::Reason,
    report::{Refusal, Report},
    tcp,
    tunnel::{Admission, Peers, Pool, Port, Troubles, TunnelStatus, Tunnels, server},
};
use crate::{
    access_log::AccessLog,
    datapath::{PodListeners, PodSockets},
    drain::Guard,
    identity::Identities,
    metrics::{Direction, Recorder},
    state::{Mesh, MeshStore, PodUid, balance::Affinity},
};

const TICK: Duration = Duration::from_secs(1);
/// Lines about refused tunnels; the rest is counted.
const FAILURE_WORDS: Rate = Rate::new(10, 50);
/// Listeners that nobody is led to any more are open until nobody has come for so long,
const QUIET: Duration = Duration::from_secs(1);
/// and no longer than this.
const LONGEST_RETIRING: Duration = Duration::from_secs(10);

/// A pod that comes to its cap has so long to come away from it before others are refused,
const GRACE: Duration = Duration::from_secs(2);
/// and meanwhile there is a look for room this often.
const LOOK_FOR_ROOM: Duration = Duration::from_millis(5);

/// What a thread is told.
pub(super) enum Command {
    Captured {
        pod: Arc<dyn PodSockets>,
        listeners: PodListeners,
        done: oneshot::Sender<()>,
    },
    Released {
        uid: PodUid,
        done: oneshot::Sender<()>,
    },
    /// Accept tunnels from these too.
    Listen {
        listeners: Vec<std::net::TcpListener>,
    },
    /// Nobody is led here any more. The queues are emptied, for `least` at any rate.
    Retire {
        least: Duration,
        done: oneshot::Sender<()>,
    },
}

/// What few connections need and all threads share.
pub(super) struct Shared {
    /// Handshakes nobody has proven anything in yet. Locked once per handshake.
    pub(super) admission: Arc<Admission>,
    /// Locked per connection to a Service with session affinity only.
    pub(super) affinity: Mutex<Affinity>,
    /// A few counters per connection, shared because a pod's connections are on all threads.
    pub(super) limits: Arc<Limits>,
    /// Locked when a tunnel that somebody opened to us begins, and when it ends.
    pub(super) peers: Arc<Peers>,
    /// Locked once per tunnel that is opened, or is not.
    pub(super) troubles: Troubles,
}

impl Shared {
    pub(super) fn new(caps: Caps, now: Instant) -> Self {
        Self {
            admission: Admission::new(now),
            affinity: Mutex::default(),
            limits: Limits::new(caps, now),
            peers: Peers::new(caps.peer_tunnels),
            troubles: Troubles::default(),
        }
    }
}

/// What a thread needs to begin.
pub(super) struct Start {
    pub(super) index: usize,
    pub(super) listeners: Vec<std::net::TcpListener>,
    pub(super) settings: Arc<ProxySettings>,
    pub(super) around: Surroundings,
    pub(super) shared: Arc<Shared>,
    pub(super) drain: Guard,
}

/// What a thread shows, refreshed once a second.
#[derive(Clone, Debug, Default)]
pub(super) struct ThreadStatus {
    pub(super) tunnels: Vec<TunnelStatus>,
    pub(super) connections: HashMap<PodUid, usize>,
}

/// Held by the room's handle; the thread ends with its drain.
pub(super) struct ThreadHandle {
    commands: mpsc::Sender<Command>,
    status: Arc<Mutex<ThreadStatus>>,
}

impl ThreadHandle {
    pub(super) async fn send(&self, command: Command) {
        // A thread that has ended serves nobody, and whoever waits for an answer sees it dropped.
        let _ended = self.commands.send(command).await;
    }

    pub(super) fn status(&self) -> ThreadStatus {
        self.status.lock().clone()
    }
}

/// Everything that the connections of one thread share.
pub(super) struct Thread {
    pub(super) settings: Arc<ProxySettings>,
    pub(super) mesh: Arc<MeshStore>,
    pub(super) identities: Identities,
    pub(super) access_log: AccessLog,
    pub(super) recorder: Rc<Recorder>,
    pub(super) shared: Arc<Shared>,
    pub(super) scratch: Rc<Scratch>,
    pub(super) conns: Rc<Conns>,
    pub(super) pool: Pool,
    /// Tunnels that others opened to us.
    pub(super) tunnels: Tunnels,
    pub(super) loads: Loads,
    /// Streams that may wait for news of the client that they claim.
    pub(super) unknown_sources: Semaphore,
    pods: RefCell<HashMap<PodUid, Rc<Pod>>>,
    /// Strangers' failures are worth a line, but not one each.
    pub(super) failure_words: Bucket,
    retiring: Retiring,
    /// Pods of this node that were meshed a while ago, and until when that counts.
    left: RefCell<HashMap<PodUid, Instant>>,
}

/// Of one thread at a time. Honest ones come with a new pod, in the moment until we hear of it.
const UNKNOWN_SOURCES: usize = 256;

/// A captured pod, as one thread serves it.
pub(super) struct Pod {
    pub(super) sockets: Arc<dyn PodSockets>,
    pub(super) share: Arc<Share>,
    pub(super) turns: Rc<Turns>,
    stop: Notify,
    stopped: Cell<bool>,
}

impl Pod {
    async fn stopped(&self) {
        while !self.stopped.get() {
            self.stop.notified().await;
        }
    }

    fn stop(&self) {
        self.stopped.set(true);
        self.stop.notify_waiters();
    }
}

/// How far a thread has come that accepts no more.
#[derive(Default)]
struct Retiring {
    begun: Cell<bool>,
    begins: Notify,
    /// Connections accepted from pods' listeners, ever.
    accepted: Cell<u64>,
    /// Of these, those whose story goes on; the drain waits for them too.
    served: Cell<usize>,
    /// The pods' listeners are still open.
    listening: Cell<bool>,
    idle: Notify,
}

impl Retiring {
    async fn begun(&self) {
        while !self.begun.get() {
            self.begins.notified().await;
        }
    }

    /// Returns when nothing is accepted any more and everything accepted is over.
    async fn idle(&self) {
        while self.listening.get() || self.served.get() > 0 {
            self.idle.notified().await;
        }
    }
}

/// A connection from accept to its record.
struct Served(Rc<Thread>);

impl Served {
    fn new(thread: &Rc<Thread>) -> Self {
        let retiring = &thread.retiring;
        retiring.accepted.set(retiring.accepted.get() + 1);
        retiring.served.set(retiring.served.get() + 1);
        Self(Rc::clone(thread))
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let retiring = &self.0.retiring;
        retiring.served.set(retiring.served.get() - 1);
        if retiring.served.get() == 0 {
            retiring.idle.notify_waiters();
        }
    }
}

/// Open connections per endpoint, for balancing. Each thread counts its own: connections spread
/// evenly over the threads, so the comparison comes out the same without sharing a cache line.
#[derive(Default)]
pub(super) struct Loads {
    open: RefCell<HashMap<SocketAddr, usize>>,
}

/// One connection to an endpoint; counts until it is dropped.
pub(super) struct Load {
    thread: Rc<Thread>,
    endpoint: SocketAddr,
}

impl Loads {
    pub(super) fn open(&self, endpoint: SocketAddr) -> usize {
        self.open.borrow().get(&endpoint).copied().unwrap_or(0)
    }
}

impl Load {
    pub(super) fn new(thread: &Rc<Thread>, endpoint: SocketAddr) -> Self {
        *thread.loads.open.borrow_mut().entry(endpoint).or_default() += 1;
        Self {
            thread: Rc::clone(thread),
            endpoint,
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        let mut open = self.thread.loads.open.borrow_mut();
        if let Some(count) = open.get_mut(&self.endpoint) {
            *count -= 1;
            if *count == 0 {
                open.remove(&self.endpoint);
            }
        }
    }
}

impl Thread {
    pub(super) fn mesh(&self) -> Arc<Mesh> {
        Arc::clone(&self.mesh.load())
    }

    /// How to make sockets in a pod, if it is captured.
    pub(super) fn pod(&self, uid: &PodUid) -> Option<Rc<Pod>> {
        self.pods.borrow().get(uid).cloned()
    }

    /// Registers a connection that was decided by `decided`. Policy may have changed while its far
    /// end was connected; then nobody else would ask again.
    pub(super) fn register(
        &self,
        decided: &Mesh,
        caller: Option<Caller>,
        callee: Option<Callee>,
    ) -> Rc<Conn> {
        let conn = self.conns.open(caller, callee);
        let mesh = self.mesh.load();
        if mesh.version != decided.version {
            conn.reconsider(&mesh);
        }
        conn
    }

    /// Did this pod of our node leave the mesh so lately that callers may not know yet?
    pub(super) fn left_lately(&self, uid: &PodUid) -> bool {
        self.left
            .borrow()
            .get(uid)
            .is_some_and(|until| Instant::now() < *until)
    }
}

/// Starts a data thread. It ends when its drain is over.
pub(super) fn spawn(start: Start) -> io::Result<ThreadHandle> {
    let (sender, commands) = mpsc::channel(COMMANDS);
    let status = Arc::new(Mutex::new(ThreadStatus::default()));
    let handle = ThreadHandle {
        commands: sender,
        status: Arc::clone(&status),
    };
    let (started, outcome) = std::sync::mpsc::sync_channel(1);
    std::thread::Builder::new()
        .name(format!("data-{}", start.index))
        .spawn(move || {
            // A runtime of this kind must be made where it runs.
            let runtime = Builder::new_current_thread()
                .enable_all()
                .build_local(LocalOptions::default());
            // Whoever started us waits for the answer.
            match runtime {
                Ok(runtime) => {
                    let _told = started.send(Ok(()));
                    runtime.block_on(run(start, commands, status));
                }
                Err(error) => drop(started.send(Err(error))),
            }
        })?;
    outcome.recv().map_err(io::Error::other)??;
    Ok(handle)
}

async fn run(
    start: Start,
    mut commands: mpsc::Receiver<Command>,
    status: Arc<Mutex<ThreadStatus>>,
) {
    let Start {
        index,
        listeners,
        settings,
        around,
        shared,
        mut drain,
    } = start;
    let thread = Rc::new(Thread {
        settings,
        identities: around.identities,
        access_log: around.access_log,
        recorder: Rc::new(around.metrics.recorder(index)),
        mesh: around.mesh,
        shared,
        scratch: Scratch::new(),
        conns: Conns::new(),
        pool: Pool::default(),
        tunnels: Tunnels::default(),
        loads: Loads::default(),
        unknown_sources: Semaphore::new(UNKNOWN_SOURCES),
        pods: RefCell::new(HashMap::new()),
        failure_words: Bucket::new(FAILURE_WORDS, Instant::now()),
        retiring: Retiring::default(),
        left: RefCell::new(HashMap::new()),
    });
    listen(&thread, listeners);
    spawn_local(follow_mesh(Rc::clone(&thread)));
    spawn_local(tick(Rc::clone(&thread), status));

    let begun = async {
        drain.begun().await;
        drain
    };
    tokio::pin!(begun);
    let mut drain = loop {
        tokio::select! {
            command = commands.recv() => match command {
                Some(command) => obey(&thread, command),
                // The handle is gone; only the drain, whose trigger went with it, is left.
                None => break begun.await,
            },
            drain = &mut begun => break drain,
        }
    };
    thread.tunnels.say_goodbye();
    // Commands are obeyed to the end: a pod that comes now is served too.
    let finished = async {
        thread.retiring.idle().await;
        thread.conns.empty().await;
        thread.tunnels.empty().await;
    };
    tokio::pin!(finished);
    loop {
        tokio::select! {
            () = &mut finished => return,
            () = drain.forced() => break,
            Some(command) = commands.recv() => obey(&thread, command),
        }
    }
    thread.conns.abort_all(Reason::Drained);
    // The connections learn of it, log it and send RST; the tunnels' RST_STREAM leave after them.
    tokio::select! {
        () = thread.conns.empty() => {}
        () = tokio::time::sleep(TICK) => {}
    }
    for _ in 0..4 {
        tokio::task::yield_now().await;
    }
}

fn obey(thread: &Rc<Thread>, command: Command) {
    // Whoever asked may have given up waiting: fine.
    match command {
        Command::Captured {
            pod,
            listeners,
            done,
        } => {
            captured(thread, pod, listeners);
            let _nobody = done.send(());
        }
        Command::Released { uid, done } => {
            if let Some(pod) = thread.pods.borrow_mut().remove(&uid) {
                pod.stop();
            }
            let _nobody = done.send(());
        }
        Command::Listen { listeners } => listen(thread, listeners),
        Command::Retire { least, done } => {
            retire(thread, least);
            let _nobody = done.send(());
        }
    }
}

fn listen(thread: &Rc<Thread>, listeners: Vec<std::net::TcpListener>) {
    for listener in listeners {
        match TcpListener::from_std(listener) {
            Ok(listener) => serve_tunnels(thread, listener),
            Err(error) => tracing::error!(%error, "cannot serve the tunnel port"),
        }
    }
}

fn retire(thread: &Rc<Thread>, least: Duration) {
    if thread.retiring.begun.replace(true) {
        return;
    }
    thread.retiring.begins.notify_waiters();
    thread.tunnels.retire();
    thread.retiring.listening.set(true);
    let thread = Rc::clone(thread);
    spawn_local(async move {
        quiet(&thread.retiring, least).await;
        // Not taken out of the table: what came before by a tunnel still needs sockets in them.
        for pod in thread.pods.borrow().values() {
            pod.stop();
        }
        // Each of the loops takes what is queued in its last turn.
        for _ in 0..4 {
            tokio::task::yield_now().await;
        }
        thread.retiring.listening.set(false);
        thread.retiring.idle.notify_waiters();
    });
}

/// Returns when nobody has come for a while.
async fn quiet(retiring: &Retiring, least: Duration) {
    let begun = Instant::now();
    let (mut seen, mut since) = (retiring.accepted.get(), begun);
    while begun.elapsed() < LONGEST_RETIRING {
        tokio::time::sleep(QUIET / 4).await;
        if retiring.accepted.get() != seen {
            (seen, since) = (retiring.accepted.get(), Instant::now());
        }
        if begun.elapsed() >= least && since.elapsed() >= QUIET {
            return;
        }
    }
}

fn captured(thread: &Rc<Thread>, sockets: Arc<dyn PodSockets>, listeners: PodListeners) {
    let uid = PodUid::clone(sockets.uid());
    let pod = Rc::new(Pod {
        sockets,
        share: thread.shared.limits.share(&uid),
        turns: Rc::default(),
        stop: Notify::new(),
        stopped: Cell::new(false),
    });
    for (direction, set) in [
        (Direction::Outbound, listeners.outbound),
        (Direction::Inbound, listeners.inbound),
    ] {
        for listener in set {
            let prepared =
                tcp::prepare_listener(&listener).and_then(|()| TcpListener::from_std(listener));
            match prepared {
                Ok(listener) => serve_pod(thread, &pod, direction, listener),
                Err(error) => {
                    tracing::error!(pod = %uid, %error, "cannot serve a listener of the pod");
                    thread.recorder.error(direction, None, "listener_failed");
                }
            }
        }
    }
    // After an adoption the old listeners finish their queues and close.
    if let Some(before) = thread.pods.borrow_mut().insert(uid, pod) {
        before.stop();
    }
}

fn serve_pod(thread: &Rc<Thread>, pod: &Rc<Pod>, direction: Direction, listener: TcpListener) {
    let thread = Rc::clone(thread);
    let pod = Rc::clone(pod);
    let way = match direction {
        Direction::Outbound => Way::Dialled,
        Direction::Inbound => Way::Plain,
    };
    spawn_local(async move {
        let full = Cell::new(None);
        let serve = async |stream: TcpStream, peer: SocketAddr| {
            let peer = canonical(peer);
            let permit = match place(&pod, way, &full).await {
                Ok(permit) => permit,
                Err(refusal) => return refuse(&thread, &pod, direction, &stream, peer, &refusal),
            };
            let served = Served::new(&thread);
            let (thread, pod) = (Rc::clone(&thread), Rc::clone(&pod));
            match direction {
                Direction::Outbound => drop(spawn_local(async move {
                    outbound::serve(thread, pod, stream, peer, permit).await;
                    drop(served);
                })),
                Direction::Inbound => drop(spawn_local(async move {
                    inbound::serve(thread, pod, stream, peer, permit).await;
                    drop(served);
                })),
            }
        };
        let failed = |word| thread.recorder.error(direction, None, word);
        accept::accept(listener, pod.stopped(), serve, failed).await;
    });
}

/// Lets a connection in, once there is room: a burst waits, for [`GRACE`] together, until somebody
/// finds room at once again. `full` says since when nobody has.
async fn place(pod: &Pod, way: Way, full: &Cell<Option<Instant>>) -> Result<Permit, Refusal> {
    let mut waited = false;
    loop {
        let now = Instant::now();
        let over = match pod.share.admit(way, now) {
            Ok(permit) => {
                if !waited {
                    full.set(None);
                }
                return Ok(permit);
            }
            Err(over) => over,
        };
        let since = full.get().unwrap_or(now);
        full.set(Some(since));
        if !over.passes() || now - since >= GRACE || pod.stopped.get() {
            return Err(pod.share.refuse(way, over));
        }
        waited = true;
        sleep(LOOK_FOR_ROOM).await;
    }
}

/// Over a cap: recorded, and reset by being dropped, before anything is made for it.
fn refuse(
    thread: &Thread,
    pod: &Pod,
    direction: Direction,
    stream: &TcpStream,
    peer: SocketAddr,
    refusal: &Refusal,
) {
    // An error means that the client is gone already.
    let Ok(target) = stream.local_addr() else {
        return;
    };
    let mut report = Report::new(direction, peer, canonical(target));
    let own = thread.mesh.load().workloads.get(pod.sockets.uid()).cloned();
    match direction {
        Direction::Outbound => report.record.src_workload = own,
        Direction::Inbound => report.record.dst_workload = own,
    }
    report.refused(refusal, thread);
}

fn serve_tunnels(thread: &Rc<Thread>, listener: TcpListener) {
    let thread = Rc::clone(thread);
    spawn_local(async move {
        let serve = async |stream: TcpStream, peer: SocketAddr| {
            let thread = Rc::clone(&thread);
            spawn_local(server::serve(thread, stream, canonical(peer), Port::Node));
        };
        let failed = |word| thread.recorder.error(Direction::Inbound, None, word);
        tokio::select! {
            () = accept::accept(listener, std::future::pending(), serve, failed) => {}
            // What is queued is the successor's: it listens at the same socket.
            () = thread.retiring.begun() => {}
        }
    });
}

/// Every new mesh: end what is now forbidden, and remember who has just left.
async fn follow_mesh(thread: Rc<Thread>) {
    let mut changed = thread.mesh.subscribe();
    let mut before = thread.mesh();
    while changed.changed().await.is_ok() {
        let now = thread.mesh();
        thread.conns.reconsider(&now);
        remember_leavers(&thread, &before, &now);
        before = now;
    }
}

fn remember_leavers(thread: &Thread, before: &Mesh, now: &Mesh) {
    let until = Instant::now() + thread.settings.timing.recently_meshed;
    let mut left = thread.left.borrow_mut();
    left.retain(|_, until| Instant::now() < *until);
    for workload in &before.local {
        let still = now
            .workloads
            .get(&workload.uid)
            .is_some_and(|workload| workload.meshed);
        if workload.meshed && !still {
            left.insert(PodUid::clone(&workload.uid), until);
        }
    }
}

async fn tick(thread: Rc<Thread>, status: Arc<Mutex<ThreadStatus>>) {
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        thread.pool.tidy(&thread);
        let timing = &thread.settings.timing;
        thread
            .tunnels
            .tidy(2 * timing.tunnel_idle, timing.handshake);
        let mut tunnels = thread.pool.status();
        tunnels.extend(thread.tunnels.status());
        let now = ThreadStatus {
            tunnels,
            connections: thread.conns.per_pod(),
        };
        *status.lock() = now;
    }
}

/// An IPv4 peer on a dual-stack listener is an IPv4 peer.
pub(super) fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

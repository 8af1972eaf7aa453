//! The whole agent, put together: the only room that knows all the others.
//!
//! [`start`] reads as the start order, and why it is so. What the rooms need of each other they get
//! here, as handles and closures: which pods should be captured and which identities held is
//! computed from the mesh in [`desired`], what people and Prometheus see in [`views`].
//!
//! Two kinds of threads: the proxy's data threads, each with a runtime of its own, and the admin
//! runtime for everything else. A scrape, a reload of all manifests or a slow signer never delays
//! a byte.
#![forbid(unsafe_code)]

mod bpf_dir;
mod certified;
mod cluster;
pub mod control;
pub mod desired;
mod estate;
pub mod finding;
mod following;
mod keeping;
mod life;
mod place;
mod removing;
mod run_dir;
mod search;
mod sockets;
mod source;
pub mod standing;
mod views;

use std::{
    convert::Infallible,
    fs::OpenOptions,
    io,
    net::SocketAddr,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Context;
use futures_util::{FutureExt, future::BoxFuture};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use parking_lot::Mutex;
use picomesh_common::config::LAYOUT;
use tokio::{
    sync::{mpsc, watch},
    task::{AbortHandle, JoinHandle, spawn_blocking},
    time::{sleep, timeout},
};
use tracing::{info, warn};

use crate::{
    access_log::{self, AccessLog},
    admin, allocator,
    config::{self, AccessLogTarget, Config},
    datapath::{Datapath, DatapathSettings, Desired},
    drain::{Drain, Drained},
    handover::{self, predecessor::Progress},
    identity::{self, Identities, awaited::AwaitedCa, ca::LocalCa},
    k8s::removal::Leaving,
    metrics::{Metrics, MetricsSettings},
    proxy::{Capacity, Caps, Proxy, ProxySettings, Surroundings, TunnelListeners},
    readiness::Readiness,
    state::{Mesh, MeshStore, objects::Objects},
    telemetry::{LogFormat, LogLevel},
};

use crate::cni;
use desired::Told;
use estate::{Estate, HeldDirs};
use following::{Follow, follow_mesh};
use keeping::{Keeper, Known};
use place::{Dirs, Heritage, Place};
use sockets::SocketNames;
use source::{Cluster, Source};

pub use bpf_dir::{BpfDir, BpfDirError};
pub use life::{asked_to_end, run};
pub use run_dir::{RunDir, RunDirError};

/// What an agent that serves may still be waiting for.
const CERTIFICATES: &str = "certificates";
/// Events of the datapath that wait for the data threads.
const EVENTS: usize = 64;
/// How often memory that is free is looked for.
const TURN: Duration = Duration::from_secs(1);
const TURN_AT_START: Duration = Duration::from_millis(100);
/// Less processor time than this in a turn is none to speak of, and what more has left behind is
/// worth giving back. An idle agent takes tens of seconds for so much.
const CALM: Duration = Duration::from_millis(20);
/// For what has nothing to do with connections, once those have ended.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// Of an end without a successor: new connections wait for the next agent while the last ones
/// finish. Those that are short need no more.
const LAST_CALLS: Duration = Duration::from_secs(2);
/// How soon after the signal to end a removal of the mesh must show to count.
const SHOWS: Duration = Duration::from_secs(5);
/// A successor waits for so long, at most, for its certificates before it begins to repair, and then
/// until all is as it should be before it lets the agent before go.
const AS_READY: Duration = Duration::from_secs(10);

/// A running agent.
pub struct Agent {
    pub bound: Bound,
    pub readiness: Readiness,
    proxy: Arc<Proxy>,
    datapath: Arc<Datapath>,
    identities: Identities,
    access_log: AccessLog,
    /// Ends the watch of the manifests and the HTTP server.
    drain: Drain,
    /// Ends the admin socket, last.
    last: Drain,
    tasks: Vec<JoinHandle<()>>,
    /// Dropping it ends the datapath's loop, and leaves everything pinned.
    desired: Arc<watch::Sender<Desired>>,
    /// Turns the mesh into what is desired.
    follow_mesh: AbortHandle,
    /// How far a successor has come.
    progress: watch::Receiver<Progress>,
    cluster: Option<OnCluster>,
    /// The mesh is being taken off this cluster, and every pod leaves it.
    removed: Arc<AtomicBool>,
    /// Held for as long as it is ours.
    dirs: HeldDirs,
}

/// What an agent on a cluster has besides.
struct OnCluster {
    /// The mesh is being taken off this cluster.
    leaving: watch::Receiver<Leaving>,
    /// How everything of ours is removed then.
    removal: DatapathSettings,
    /// What is ours on the node besides.
    traces: finding::Traces,
}

/// Where the agent listens; a configuration may ask for port 0.
#[derive(Clone, Debug)]
pub struct Bound {
    pub metrics: SocketAddr,
    pub tunnels: Vec<SocketAddr>,
}

/// Starts everything, in this order. If another agent runs on the same directories, everything that
/// only we shall have is built first, while that one serves; then it stops repairing, we put our
/// listeners in the place of its own and serve, and it leaves.
///
/// On a cluster `leaving` is told from the first moment whether the mesh is being taken off it.
///
/// The calling thread must be in the node's network namespace,
/// and so must be the threads of its runtime.
pub async fn start(
    config: Config,
    log_level: Option<LogLevel>,
    leaving: watch::Sender<Leaving>,
) -> anyhow::Result<Agent> {
    info!(
        version = env!("CARGO_PKG_VERSION"),
        node = &*config.mesh.node,
        threads = config.data_threads,
        "starting"
    );
    raise_file_limit();
    let capacity = Capacity::read();
    let caps = Caps::derive(&config.caps, &capacity);
    info!(
        ?capacity,
        ?caps,
        "what there is, and what pods may take of it"
    );

    // The lock first: whoever has it may touch sockets and pins of this directory.
    let Place { dirs, heritage } = Box::pin(Place::take(&config)).await?;
    let (predecessor, heir) = match heritage {
        Some(Heritage {
            predecessor,
            metrics,
            tunnels,
        }) => (Some(predecessor), (metrics, tunnels)),
        None => (None, (None, Vec::new())),
    };
    let (inherited_metrics, inherited_tunnels) = heir;

    // People can look from here on: `/ready` tells what is awaited. With a predecessor it is the
    // one who answers until we are ready.
    let readiness = Readiness::new();
    let manifests_read = readiness.register("manifests");
    let certificates_held = readiness.register(CERTIFICATES);
    let pods_tried = readiness.register("pods");
    let metrics = Metrics::new(MetricsSettings {
        data_threads: config.data_threads,
        istio: config.istio_metrics,
        cluster_domain: config.mesh.cluster_domain.clone(),
        ..MetricsSettings::default()
    });
    let access_log = open_access_log(&config)?;
    let (drain, guard) = Drain::new();
    let (last, last_guard) = Drain::new();
    let mut tasks = Vec::new();
    let http = match inherited_metrics {
        Some(socket) => admin::http::Server::inherit(socket),
        None => admin::http::Server::bind(config.metrics_address),
    }
    .with_context(|| {
        format!(
            "--metrics-address {}: cannot listen; is another agent running?",
            config.metrics_address
        )
    })?;
    let metrics_address = http.address();
    let metrics_socket = http.socket().context("copying the metrics socket")?;
    let shown = admin::http::Shown {
        metrics: metrics.clone(),
        readiness: readiness.clone(),
    };
    let mut http = Some(http.serve(shown, guard.clone()));
    let mut accepting = Vec::new();
    if predecessor.is_none() {
        accepting.extend(http.take().map(|http| serve(&mut tasks, http)));
    }

    // What we know. Nothing is decided before the manifests were read once: an empty mesh would
    // let pods go that are captured already.
    let settings = Arc::new(config.mesh.clone());
    let mesh = Arc::new(MeshStore::new(Mesh::build(
        settings.clone(),
        0,
        &Objects::default(),
    )));
    let mesh_of = (settings.clone(), mesh.clone());
    let keeper = Keeper::new(&config);
    let Source {
        netns,
        errors,
        kept,
        cluster,
    } = Box::pin(Source::start(
        &config,
        &keeper,
        mesh_of,
        manifests_read,
        leaving,
        guard.clone(),
        &mut tasks,
    ))
    .await?;
    let told = match cluster {
        None => Told::ByManifests,
        Some(_) => Told::ByCluster,
    };

    // Who we are. Requests for certificates go out now, and are answered while the rest starts.
    let trust_domain = config.mesh.trust_domain.clone();
    let clock: Arc<dyn identity::clock::Clock> = Arc::new(identity::clock::SystemClock);
    let (authority, watch, held) = match (&config.source, &cluster) {
        (config::Source::Local { ca_dir, .. }, _) => {
            authority(&config, ca_dir, clock, keeper.known())?
        }
        (config::Source::Cluster { .. }, cluster) => {
            let cluster = cluster.as_ref().context("a cluster without a client")?;
            let (known, held) = keeper
                .known()
                .map_or((None, Vec::new()), |known| (Some(known.bundle), known.held));
            let (signer, roots) = cluster::signer(
                cluster.client.clone(),
                cluster.namespace.clone(),
                config.certificate_life,
                known,
            );
            (signer as Arc<dyn identity::Signer>, roots.boxed(), held)
        }
    };
    tasks.push(tokio::spawn(watch));
    let bundle = authority.bundle();
    let (identities, manager) = Identities::start_with(
        authority,
        identity::manager::Settings::new(trust_domain),
        held,
    )?;
    tasks.push(manager);
    let mut needed = desired::Identities::default();
    let wanted = needed.wanted(&mesh.load(), Instant::now(), |own| identities.holds(own));
    identities.set_wanted(wanted);

    // The data threads, before anything is captured for them.
    let (settings_of_proxy, around) = (
        ProxySettings {
            threads: config.data_threads,
            tunnel_port: config.tunnel_port,
            hbone_to_pods: config.hbone_to_pods,
            caps,
            ..ProxySettings::default()
        },
        Surroundings {
            mesh: mesh.clone(),
            identities: identities.clone(),
            metrics: metrics.clone(),
            access_log: access_log.clone(),
        },
    );
    let inherited_tunnels = match inherited_tunnels {
        none if none.is_empty() => None,
        some => Some(TunnelListeners::inherit(some).context("the tunnel listeners")?),
    };
    // Threads are made and tried here, which blocks.
    let (proxy, inherited_tunnels) = spawn_blocking(move || {
        let proxy = match &inherited_tunnels {
            None => Proxy::start(settings_of_proxy, around),
            Some(listeners) => Proxy::prepare(settings_of_proxy, around, listeners),
        };
        proxy.map(|proxy| (proxy, inherited_tunnels))
    })
    .await??;
    let (events, captured) = mpsc::channel(EVENTS);
    let follower = proxy.clone();
    tasks.push(tokio::spawn(async move { follower.follow(captured).await }));

    let mut certified = tokio::spawn(certified::follow(identities.clone(), certificates_held));
    if let Some(predecessor) = &predecessor {
        certified::in_hand(&mut certified).await?;
        predecessor.ready().await?;
        dirs.run.sign().context("--run-dir")?;
    }

    // The kernel: adopts what is pinned, then captures what is missing. From here on nobody else
    // repairs; each pod's listeners are put in the place of those before in one step.
    let pods = desired::pods(&mesh.load(), &netns.borrow(), told);
    let first = pods.desired.clone();
    let (desired, desired_seen) = watch::channel(pods.desired);
    let (lost, lost_seen) = watch::channel(Arc::new(pods.lost));
    let datapath = Datapath::start(datapath_settings(&config), desired_seen, events).await?;
    // An empty first word would mean "not known yet" to it. It is known.
    desired.send_replace(first);
    let desired = Arc::new(desired);

    // What we show, now that there is everybody to ask.
    let shown = views::Shown {
        settings,
        started: Instant::now(),
        readiness: readiness.clone(),
        mesh: mesh.clone(),
        errors,
        metrics: metrics.clone(),
        access_log: access_log.clone(),
        identities: identities.clone(),
        datapath: datapath.clone(),
        lost: lost_seen,
        proxy: proxy.clone(),
        capacity,
    };
    let shown = Arc::new(shown);
    views::register(&shown, &metrics);
    let socket = admin::socket::Server::beside(dirs.run.path())?;
    let callers = handover::predecessor::Server::beside(dirs.run.path())?;
    let plugins = cluster
        .is_some()
        .then(|| cni::server::Server::beside(dirs.run.path()));
    let plugins = plugins.transpose()?;
    let answers = views::views(&shown, log_level);
    if let Some(listeners) = inherited_tunnels {
        let accepts = proxy.accept_tunnels(listeners).await;
        accepts.context("the tunnel listeners")?;
    }

    // From here on the mesh drives everything.
    let changes = mesh.subscribe();
    let removed = Arc::new(AtomicBool::new(false));
    let known = standing::Known {
        mesh: mesh.clone(),
        datapath: datapath.clone(),
        removed: removed.clone(),
    };
    let follow = tokio::spawn(follow_mesh(Follow {
        mesh,
        netns,
        told,
        asked: cluster
            .as_ref()
            .map(|cluster| cluster.finding.asked.clone()),
        needed,
        identities: identities.clone(),
        desired: Arc::downgrade(&desired),
        lost,
        metrics,
    }));
    let follow_mesh = follow.abort_handle();
    tasks.push(follow);
    let settling = datapath.clone();
    tasks.push(tokio::spawn(async move {
        while !settling.is_settled() {
            sleep(Duration::from_millis(20)).await;
        }
        pods_tried.done();
    }));
    tasks.push(tokio::spawn(give_memory_back(readiness.clone(), changes)));

    // The agent before leaves when we serve as it did. If we die before we have told it, it goes
    // on: so its sockets keep their place until then.
    if let Some(predecessor) = predecessor {
        let begun = Instant::now();
        while !serves(&readiness.pending()) && begun.elapsed() < AS_READY {
            sleep(Duration::from_millis(20)).await;
        }
        accepting.extend(http.take().map(|http| serve(&mut tasks, http)));
        predecessor.taken().await;
    }
    socket.move_in()?;
    callers.move_in()?;
    accepting.push(serve(&mut tasks, socket.serve(answers, last_guard)));
    if let (Some(plugins), Some(cluster)) = (plugins, &cluster) {
        plugins.move_in()?;
        let answers = cluster.finding.serve(plugins, known, guard.clone());
        accepting.push(serve(&mut tasks, answers));
    }

    // A cluster is told what was found here, and tells when the mesh is taken off. That and the
    // node's own files are ours until a successor has committed.
    let writes = Arc::new(AtomicBool::new(true));
    let cluster = cluster.map(|cluster| {
        let Cluster {
            client,
            leaving,
            finding,
            ..
        } = cluster;
        let (traces, plugin) = finding.keep(
            config.fail_open,
            config.mesh.namespace.clone(),
            &writes,
            &guard,
            &mut tasks,
        );
        cluster::begin(client, &shown, plugin, &writes, &mut tasks);
        OnCluster {
            leaving,
            removal: datapath_settings(&config),
            traces,
        }
    });

    // What the next one begins with if its sources are away.
    tasks.push(tokio::spawn(keeper.keep(
        kept,
        identities.clone(),
        bundle,
        writes.clone(),
    )));

    // And one day we leave all this to another.
    let sockets = SocketNames::of(dirs.run.path());
    let dirs: HeldDirs = Arc::new(Mutex::new(Some(dirs)));
    let estate = Estate {
        dirs: dirs.clone(),
        sockets,
        metrics: Mutex::new(Some((metrics_address, metrics_socket))),
        proxy: proxy.clone(),
        datapath: datapath.clone(),
        paused: Mutex::new(None),
        writes,
        accepting,
    };
    let terms = handover::predecessor::Terms {
        version: env!("CARGO_PKG_VERSION").into(),
        node: config.mesh.node.to_string(),
        layout: LAYOUT,
        drain: config.drain_deadline,
        patience: handover::predecessor::Patience::default(),
    };
    let (progressed, progress) = watch::channel(Progress::Alone);
    tasks.push(tokio::spawn(callers.serve(
        terms,
        Arc::new(estate),
        progressed,
    )));

    let bound = Bound {
        metrics: metrics_address,
        tunnels: proxy.tunnel_addresses().to_vec(),
    };
    info!(metrics = %bound.metrics, tunnels = ?bound.tunnels, "serving");
    Ok(Agent {
        bound,
        readiness,
        proxy,
        datapath,
        identities,
        access_log,
        drain,
        last,
        tasks,
        desired,
        follow_mesh,
        progress,
        cluster,
        removed,
        dirs,
    })
}

/// Pods whose certificates are there are served while others are awaited.
fn serves(awaited: &[&str]) -> bool {
    awaited.iter().all(|what| *what == CERTIFICATES)
}

type Authority = (
    Arc<dyn identity::Signer>,
    BoxFuture<'static, ()>,
    Vec<identity::Held>,
);

/// The authority, who follows it, and the certificates that an agent before left. One whose
/// anchors are known is never made anew: a directory that is away must not become another
/// authority.
fn authority(
    config: &Config,
    dir: &Path,
    clock: Arc<dyn identity::clock::Clock>,
    known: Option<Known>,
) -> anyhow::Result<Authority> {
    let trust_domain = config.mesh.trust_domain.clone();
    let life = config.certificate_life;
    let Some(Known { bundle, held }) = known else {
        let authority = LocalCa::open(dir, trust_domain, life, clock)
            .with_context(|| format!("--ca-dir {}", dir.display()))?;
        return Ok((authority.clone(), Box::pin(authority.watch()), Vec::new()));
    };
    match LocalCa::open_existing(dir, trust_domain.clone(), life, clock.clone()) {
        Ok(authority) => Ok((authority.clone(), Box::pin(authority.watch()), held)),
        Err(error) => {
            warn!(%error, "--ca-dir: serving with the certificates of the agent before until it \
                   can be read");
            let place = identity::awaited::Place {
                dir: dir.to_owned(),
                trust_domain,
                life,
                clock,
            };
            let awaited = AwaitedCa::new(place, bundle);
            Ok((awaited.clone(), Box::pin(awaited.watch()), held))
        }
    }
}

/// Runs one that accepts connections; it can be ended alone.
fn serve(
    tasks: &mut Vec<JoinHandle<()>>,
    server: impl Future<Output = ()> + Send + 'static,
) -> AbortHandle {
    let task = tokio::spawn(server);
    let handle = task.abort_handle();
    tasks.push(task);
    handle
}

impl Agent {
    /// Lets open connections finish until `deadline`, and serves whoever comes meanwhile, but for
    /// the last moment ([`LAST_CALLS`]), so that none is cut. Everything in the kernel stays as it
    /// is: new connections of captured pods wait for the next agent, they do not go out in plain. Unless
    /// the mesh is being taken off its cluster: then every pod leaves it, and nothing stays.
    pub async fn end(self, deadline: Duration) {
        info!(?deadline, "ending: open connections may finish");
        let drain = async {
            let begun = Instant::now();
            // A removal that began this very moment shall still be heard of. Whoever calls meanwhile
            // is served as ever; after a hand-over it is the successor who must know.
            let ours = self.dirs.lock().is_some();
            if let Some(on) = self.cluster.as_ref().filter(|_| ours) {
                cluster::removal_would_show(on.leaving.clone(), LAST_WORDS, SHOWS).await;
            }
            let left = || deadline.saturating_sub(begun.elapsed());
            if ours {
                let serving = left().saturating_sub(LAST_CALLS.min(deadline / 2));
                let _over = timeout(serving, self.proxy.idle()).await;
                self.close().await;
            }
            self.proxy.drain(left()).await
        };
        let drained = tokio::select! {
            // First: what is seen last is seen before the drain ends.
            biased;
            never = self.leave_if_removed() => match never {},
            drained = drain => drained,
        };
        match drained {
            Drained::Finished => info!("all connections have finished"),
            Drained::Forced => info!("the deadline passed, connections were cut"),
            Drained::Stuck => warn!("a data thread does not end, it is left behind"),
        }
        drop(self.desired);
        self.identities.stop();
        self.drain.drain(LAST_WORDS).await;
        let log = self.access_log.clone();
        let flushed = spawn_blocking(move || log.flush(LAST_WORDS)).await;
        if let Err(error) = flushed {
            warn!(%error, "the access log's last lines may be missing");
        }
        self.last.drain(Duration::ZERO).await;
        for task in self.tasks {
            task.abort();
        }
        if let Some(on) = self.cluster
            && self.removed.load(Ordering::Acquire)
        {
            let dirs = self.dirs.lock().take();
            on.traces.remove().await;
            removing::remove(on.removal, dirs).await;
        }
        info!("ended");
    }

    /// Takes no new connection, and cuts none that has come already: closing a listener resets what
    /// is in its queue.
    async fn close(&self) {
        // Meanwhile somebody may have come after all; and whom the mesh lets go needs no agent.
        if self.dirs.lock().is_some() && !self.removed.load(Ordering::Acquire) {
            self.datapath.close().await;
            self.proxy.retire(Duration::ZERO).await;
        }
    }

    /// New connections of all pods go their old way from here on; those that we carry finish.
    async fn leave_if_removed(&self) -> Infallible {
        if let Some(on) = &self.cluster
            && cluster::removal_shows(on.leaving.clone(), SHOWS).await
            // Whoever was succeeded has nothing left to take out.
            && self.dirs.lock().is_some()
        {
            info!("the mesh is being taken off this cluster: every pod leaves it");
            self.removed.store(true, Ordering::Release);
            self.follow_mesh.abort();
            self.desired.send_replace(Arc::default());
            // Until the end nobody else's pod shall wait for us.
            on.traces.retire().await;
        }
        std::future::pending().await
    }
}

/// A burst's memory goes back by the clock; what a start, a change or a burst has run and left
/// lying about goes when it is over.
async fn give_memory_back(readiness: Readiness, mut changes: watch::Receiver<u64>) {
    let mut ready = false;
    let (mut last, mut settled) = (Duration::ZERO, None);
    loop {
        sleep(if ready { TURN } else { TURN_AT_START }).await;
        ready = ready || readiness.pending().is_empty();
        if changes.has_changed().is_ok_and(|changed| changed) {
            changes.mark_unchanged();
            settled = None;
        }
        let spent = allocator::processor_time();
        let calm = spent.saturating_sub(last) < CALM;
        let worked = settled.is_none_or(|then| spent.saturating_sub(then) > CALM);
        if ready && calm && worked {
            allocator::settle();
            settled = Some(spent);
        }
        last = spent;
        allocator::give_back();
    }
}

fn datapath_settings(config: &Config) -> DatapathSettings {
    DatapathSettings {
        bpf_dir: config.bpf_dir.clone(),
        run_dir: config.run_dir.clone(),
        data_threads: config.data_threads,
        force_clsact: config.force_clsact,
        fail_open: config.fail_open,
        rules: config.rules,
        generation: config.generation.clone(),
    }
}

fn open_access_log(config: &Config) -> anyhow::Result<AccessLog> {
    let format = match config.log_format {
        LogFormat::Text => access_log::Format::Text,
        LogFormat::Json => access_log::Format::Json,
    };
    let style = access_log::Style {
        format,
        cluster_domain: Arc::clone(&config.mesh.cluster_domain),
    };
    Ok(match &config.access_log {
        AccessLogTarget::Off => AccessLog::off(),
        AccessLogTarget::Stdout => AccessLog::start(style, io::stdout())?,
        AccessLogTarget::File(path) => {
            let file = OpenOptions::new()
                .create(true)
                .append(true)
                .open(path)
                .with_context(|| format!("--access-log {}", path.display()))?;
            AccessLog::start(style, file)?
        }
    })
}

/// Connections are file descriptors, two each; many systems start a process with 1,024.
fn raise_file_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        warn!(%error, "the limit of open files stays as it is");
    }
}

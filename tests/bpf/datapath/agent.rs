//! The datapath with the least there can be behind it: every connection is passed on, unread.

use std::{
    collections::{HashMap, HashSet},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use parking_lot::Mutex;
use picomesh::datapath::{
    Datapath, DatapathSettings, Desired, DesiredPod, Generation, Others, Paused, PodEvent,
    PodSockets, PodStatus, Source, Wishes,
};
use picomesh_common::{PodConfig, config::rule};
use picomesh_tests::wait::patience;
use tokio::{
    runtime::Runtime,
    sync::{mpsc, watch},
};

use super::world::{Netns, run};

/// Where agents keep what outlives them; gone with the value.
pub(crate) struct Dirs {
    dir: tempfile::TempDir,
}

impl Dirs {
    pub(crate) fn new() -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("datapath-").tempdir()?;
        let bpf = dir.path().join("bpf");
        std::fs::create_dir(&bpf)?;
        run(&["mount", "-t", "bpf", "bpf", &bpf.to_string_lossy()])?;
        Ok(Self { dir })
    }

    pub(crate) fn settings(&self) -> DatapathSettings {
        DatapathSettings {
            bpf_dir: self.bpf().join("picomesh"),
            run_dir: self.dir.path().join("run"),
            data_threads: 2,
            force_clsact: false,
            fail_open: false,
            rules: rule::ALL,
            generation: Generation::default(),
        }
    }

    /// The mount point above the agent's own directory.
    pub(crate) fn bpf(&self) -> PathBuf {
        self.dir.path().join("bpf")
    }
}

impl Drop for Dirs {
    fn drop(&mut self) {
        if let Err(error) = run(&["umount", &self.bpf().to_string_lossy()]) {
            eprintln!("{error:#}");
        }
    }
}

type Served = Arc<Mutex<HashMap<String, (Arc<dyn PodSockets>, Arc<Stop>)>>>;

/// What ends the threads of a pod.
#[derive(Default)]
struct Stop {
    /// Other listeners have taken the place of these: accept what is queued, carry on with it.
    replaced: AtomicBool,
    /// The pod or the agent is gone. Of all listeners that the pod ever had.
    gone: Arc<AtomicBool>,
}

impl Stop {
    fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Relaxed)
    }
}

/// An agent of the node `node`. Dropping it is `kill -9`: all its sockets close, nothing is undone.
pub(crate) struct Agent {
    datapath: Arc<Datapath>,
    desired: watch::Sender<Desired>,
    served: Served,
    runtime: Option<Runtime>,
}

impl Agent {
    pub(crate) fn start(
        node: &Netns,
        settings: DatapathSettings,
        pods: Vec<DesiredPod>,
    ) -> Result<Self> {
        Self::start_with(node, settings, pods, serve)
    }

    /// Keeps the listeners and accepts nothing: many pods, few threads.
    pub(crate) fn start_idle(
        node: &Netns,
        settings: DatapathSettings,
        pods: Vec<DesiredPod>,
    ) -> Result<Self> {
        let mut kept = HashMap::new();
        Self::start_with(node, settings, pods, move |event, _served| match event {
            PodEvent::Captured { pod, listeners } => {
                kept.insert(Arc::clone(pod.uid()), listeners);
            }
            PodEvent::Released { uid } => {
                kept.remove(&uid);
            }
        })
    }

    fn start_with(
        node: &Netns,
        settings: DatapathSettings,
        pods: Vec<DesiredPod>,
        mut each: impl FnMut(PodEvent, &Served) + Send + 'static,
    ) -> Result<Self> {
        let served = Served::default();
        let (sender, receiver) = watch::channel(Arc::new(pods.into()));
        let (runtime, datapath) = node.run(|| -> Result<_> {
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()?;
            let (events, mut inbox) = mpsc::channel(16);
            let datapath = runtime.block_on(Datapath::start(settings, receiver, events))?;
            let served = Arc::clone(&served);
            thread::spawn(move || {
                while let Some(event) = inbox.blocking_recv() {
                    each(event, &served);
                }
                for (_handle, stop) in served.lock().values() {
                    stop.gone.store(true, Ordering::Relaxed);
                }
            });
            Ok((runtime, datapath))
        })??;
        Ok(Self {
            datapath,
            desired: sender,
            served,
            runtime: Some(runtime),
        })
    }

    pub(crate) fn want(&self, pods: Vec<DesiredPod>) {
        self.desired.send_replace(Arc::new(pods.into()));
    }

    /// As on a cluster, where of all others nothing is known any more.
    pub(crate) fn want_only(&self, pods: Vec<DesiredPod>) {
        let but = HashSet::new();
        self.desired.send_replace(Arc::new(Wishes {
            pods,
            others: Others::Stay { but },
        }));
    }

    pub(crate) fn kick(&self) {
        self.datapath.kick();
    }

    /// Mends nothing until it goes on.
    pub(crate) fn pause(&self) -> Result<Paused> {
        let runtime = self.runtime.as_ref().context("it has ended")?;
        Ok(runtime.block_on(self.datapath.pause()))
    }

    pub(crate) fn resume(&self, paused: Paused) -> Result<()> {
        let runtime = self.runtime.as_ref().context("it has ended")?;
        runtime.block_on(self.datapath.resume(paused));
        Ok(())
    }

    pub(crate) fn status(&self, uid: &str) -> Option<PodStatus> {
        self.datapath
            .status()
            .into_iter()
            .find(|status| status.uid == uid)
    }

    pub(crate) fn statuses(&self) -> Vec<PodStatus> {
        self.datapath.status()
    }

    pub(crate) fn handle(&self, uid: &str) -> Option<Arc<dyn PodSockets>> {
        self.served
            .lock()
            .get(uid)
            .map(|(handle, _)| Arc::clone(handle))
    }

    pub(crate) fn wait_for(&self, uid: &str, state: &str) -> Result<PodStatus> {
        until(Duration::from_secs(10), || {
            let status = self.status(uid).context("no such pod")?;
            if status.state == state {
                return Ok(status);
            }
            bail!(
                "{uid} is {} instead of {state}: {:?}",
                status.state,
                status.reason
            )
        })
    }

    pub(crate) fn wait_gone(&self, uid: &str) -> Result<()> {
        until(Duration::from_secs(10), || match self.status(uid) {
            None => Ok(()),
            Some(status) => bail!("{uid} is still there: {status:?}"),
        })
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        for (_handle, stop) in self.served.lock().values() {
            stop.gone.store(true, Ordering::Relaxed);
        }
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(Duration::from_secs(5));
        }
        // The accepting threads look at their flag every few milliseconds.
        thread::sleep(Duration::from_millis(50));
    }
}

pub(crate) fn desired(uid: &str, netns: &Netns, ips: &[&str]) -> DesiredPod {
    DesiredPod {
        uid: uid.into(),
        name: format!("test/{uid}"),
        ips: ips.iter().filter_map(|ip| ip.parse().ok()).collect(),
        config: PodConfig::EMPTY,
        netns: netns.path(),
    }
}

/// Asks again until the answer is good or the time is over.
pub(crate) fn until<T>(time: Duration, mut ask: impl FnMut() -> Result<T>) -> Result<T> {
    let end = Instant::now() + patience(time);
    loop {
        match ask() {
            Err(error) if Instant::now() > end => return Err(error),
            Err(_) => thread::sleep(Duration::from_millis(20)),
            done => return done,
        }
    }
}

fn serve(event: PodEvent, served: &Served) {
    match event {
        PodEvent::Captured { pod, listeners } => {
            let mut served = served.lock();
            let before = served.remove(&**pod.uid()).map(|(_handle, stop)| stop);
            let gone = before.as_ref().map(|stop| Arc::clone(&stop.gone));
            let stop = Arc::new(Stop {
                gone: gone.unwrap_or_default(),
                ..Stop::default()
            });
            served.insert(pod.uid().to_string(), (Arc::clone(&pod), Arc::clone(&stop)));
            for thread in listeners {
                for (listeners, inbound) in [(thread.outbound, false), (thread.inbound, true)] {
                    for listener in listeners {
                        let (pod, stop) = (Arc::clone(&pod), Arc::clone(&stop));
                        thread::spawn(move || accept(&listener, inbound, &pod, &stop));
                    }
                }
            }
            if let Some(stop) = before {
                stop.replaced.store(true, Ordering::Relaxed);
            }
        }
        PodEvent::Released { uid } => {
            if let Some((_handle, stop)) = served.lock().remove(&*uid) {
                stop.gone.store(true, Ordering::Relaxed);
            }
        }
    }
}

fn accept(listener: &TcpListener, inbound: bool, pod: &Arc<dyn PodSockets>, stop: &Arc<Stop>) {
    while !stop.is_gone() {
        match listener.accept() {
            Ok((stream, client)) => {
                let (pod, stop) = (Arc::clone(pod), Arc::clone(stop));
                thread::spawn(move || {
                    if let Err(error) = pass_on(stream, client, inbound, &*pod, &stop) {
                        eprintln!("{}: {client}: {error:#}", pod.uid());
                    }
                });
            }
            Err(_) if stop.replaced.load(Ordering::Relaxed) => return,
            Err(_) => thread::sleep(Duration::from_millis(10)),
        }
    }
}

fn pass_on(
    stream: TcpStream,
    client: SocketAddr,
    inbound: bool,
    pod: &dyn PodSockets,
    stop: &Arc<Stop>,
) -> Result<()> {
    stream.set_nonblocking(false)?;
    let to = stream.local_addr()?;
    let source = if inbound {
        Source::Keep { client }
    } else {
        Source::Own
    };
    pod.hold(client);
    let socket = pod.socket(to, source)?;
    socket.set_nonblocking(false)?;
    if let Err(error) = socket.connect_timeout(&to.into(), Duration::from_secs(5)) {
        // As the application refuses, so do we.
        socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
        pod.release(client);
        return Err(error).context("connect");
    }
    let upstream = TcpStream::from(socket);
    let (one, other) = (stream.try_clone()?, upstream.try_clone()?);
    let pumps = [(stream, other), (upstream, one)].map(|(from, to)| {
        let stop = Arc::clone(stop);
        thread::spawn(move || pump(&from, &to, &stop))
    });
    for pump in pumps {
        if pump.join().is_err() {
            bail!("a pump panicked");
        }
    }
    pod.release(client);
    Ok(())
}

/// Moves bytes until the end, or until the agent is "killed".
fn pump(mut from: &TcpStream, mut to: &TcpStream, stop: &Stop) {
    use std::io::{ErrorKind, Read, Write};
    if from
        .set_read_timeout(Some(Duration::from_millis(10)))
        .is_err()
    {
        return;
    }
    let mut buffer = vec![0; 65_536];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(length) => {
                if to.write_all(&buffer[..length]).is_err() {
                    return;
                }
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                if stop.is_gone() {
                    return;
                }
            }
            Err(_) => return,
        }
    }
    if to.shutdown(Shutdown::Write).is_err() {
        // The other pump has noticed the same reset.
    }
}

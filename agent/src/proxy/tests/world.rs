//! Two nodes and their pods in two network namespaces of one process.
//!
//! Every address of the world is local in both namespaces. In the *outer* one stand the proxies,
//! their tunnels, the clients, and the pods' listeners: a listener "captures" by standing at the
//! very address that a client dials, so the accepted socket's own address is the original
//! destination, as it is with the kernel half. In the *inner* one stand the applications, and there
//! the pods' sockets are made. So the proxy never meets its own listener.

use std::{
    future::Future,
    io::{self, Write},
    net::{IpAddr, SocketAddr, TcpListener as StdListener},
    os::fd::AsFd,
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use nix::sched::{CloneFlags, setns, unshare};
use parking_lot::Mutex;
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::net::{TcpListener, TcpStream};

use crate::{
    access_log::{AccessLog, Format, Style},
    datapath::{PodEvent, PodListeners, PodSockets, Source},
    identity::{
        Identities,
        ca::{LIFE, LocalCa},
        clock::SystemClock,
        manager,
    },
    metrics::{Metrics, MetricsSettings},
    proxy::{Proxy, ProxySettings, Surroundings, TUNNEL_PORT, Timing},
    state::{
        Identity, Mesh, MeshStore, ObjectKey, PodUid,
        objects::{
            DefaultPolicy, EndpointSlice, MeshSettings, Namespace, Node, Objects, OutboundDefault,
            Pod, Protocol as PodProtocol, Service, ServicePort, SliceEndpoint, TargetPort, Words,
            private_networks,
        },
    },
};

pub(super) const NODE_1: &str = "10.9.0.1";
pub(super) const NODE_2: &str = "10.9.0.2";
/// Node 1: calls. Node 2: is called. Node 1 again: for calls within the node.
pub(super) const CALLER: &str = "10.9.1.1";
pub(super) const CALLEE: &str = "10.9.2.1";
pub(super) const NEIGHBOUR: &str = "10.9.1.2";
/// Node 2, of another identity than the callee's.
pub(super) const STRANGER: &str = "10.9.2.2";
/// A pod outside the mesh, on node 2.
pub(super) const UNMESHED: &str = "10.9.2.9";
pub(super) const SERVICE: &str = "10.9.9.1";
pub(super) const PORT: u16 = 8080;
/// For what must happen, on a machine that has much else to do.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// Runs a test in a world of its own; or says why it cannot, so that it counts as skipped.
pub(super) fn world<F>(test: impl FnOnce(World) -> F + Send + 'static)
where
    F: Future<Output = ()>,
{
    world_with(|_| {}, test);
}

/// The same, with other settings of the proxies.
pub(super) fn world_with<F>(
    change: impl Fn(&mut ProxySettings) + Send + 'static,
    test: impl FnOnce(World) -> F + Send + 'static,
) where
    F: Future<Output = ()>,
{
    let name = std::thread::current().name().unwrap_or("?").to_owned();
    let thread = std::thread::spawn(move || {
        if let Err(error) = unshare(CloneFlags::CLONE_NEWNET) {
            // A test that has begun can only pass or fail. `cargo xtask test` counts this line as a
            // skip instead; what the print macros write is not shown of a test that passes.
            let why = format!("no network namespace of its own ({error}); run it as root");
            io::stdout()
                .write_all(format!("\nskipped inside: {name}: {why}\n").as_bytes())
                .unwrap();
            return;
        }
        make_local();
        let inner = inner_netns();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let world = World::new(inner, change).await;
            tokio::time::timeout(4 * PATIENCE, test(world))
                .await
                .expect("in time");
        });
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn make_local() {
    for args in [
        &["link", "set", "lo", "up"][..],
        &["route", "add", "local", "10.9.0.0/16", "dev", "lo"],
    ] {
        assert!(
            Command::new("ip").args(args).status().unwrap().success(),
            "ip {args:?}"
        );
    }
}

/// Stands as long as its file is open.
fn inner_netns() -> Arc<std::fs::File> {
    let made = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        make_local();
        std::fs::File::open("/proc/thread-self/ns/net").unwrap()
    });
    Arc::new(made.join().unwrap())
}

/// Sockets of a pod: ordinary ones, in the inner namespace.
struct FakeSockets {
    uid: PodUid,
    inner: Arc<std::fs::File>,
    held: Mutex<Vec<SocketAddr>>,
}

fn within<T>(inner: &std::fs::File, work: impl FnOnce() -> T) -> T {
    let outer = std::fs::File::open("/proc/thread-self/ns/net").unwrap();
    setns(inner.as_fd(), CloneFlags::CLONE_NEWNET).unwrap();
    let result = work();
    setns(outer.as_fd(), CloneFlags::CLONE_NEWNET).unwrap();
    result
}

impl PodSockets for FakeSockets {
    fn uid(&self) -> &PodUid {
        &self.uid
    }

    fn socket(&self, remote: SocketAddr, source: Source) -> io::Result<Socket> {
        let socket = within(&self.inner, || {
            Socket::new(
                Domain::for_address(remote),
                Type::STREAM,
                Some(Protocol::TCP),
            )
        })?;
        socket.set_nonblocking(true)?;
        socket.set_tcp_nodelay(true)?;
        let address = match source {
            Source::Own => self.own(),
            Source::Keep { client } => client.ip(),
        };
        socket.bind(&SocketAddr::new(address, 0).into())?;
        Ok(socket)
    }

    fn hold(&self, client: SocketAddr) {
        self.held.lock().push(client);
    }

    fn release(&self, client: SocketAddr) {
        self.held.lock().retain(|held| *held != client);
    }

    fn listens(&self, _ip: IpAddr, _port: u16) -> Option<bool> {
        None
    }
}

impl FakeSockets {
    /// A pod's uid is its address here.
    fn own(&self) -> IpAddr {
        self.uid.parse().unwrap()
    }
}

/// One agent's rooms.
pub(super) struct Agent {
    pub(super) proxy: Arc<Proxy>,
    pub(super) mesh: Arc<MeshStore>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) identities: Identities,
    log: AccessLog,
    lines: Arc<Mutex<Vec<u8>>>,
    settings: Arc<MeshSettings>,
}

impl Agent {
    /// What its access log says so far.
    pub(super) fn log(&self) -> String {
        self.log.flush(Duration::from_secs(5));
        String::from_utf8_lossy(&self.lines.lock()).into_owned()
    }

    /// Waits until a line of the log has all these words.
    pub(super) async fn logged(&self, words: &[&str]) {
        let begun = Instant::now();
        let mut log = String::new();
        while begun.elapsed() < PATIENCE {
            log = self.log();
            if log
                .lines()
                .any(|line| words.iter().all(|word| line.contains(word)))
            {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("no line with {words:?} in:\n{log}");
    }

    /// Waits until a metric's line that has all these words has this value.
    pub(super) async fn counted(&self, words: &[&str], value: f64) {
        let begun = Instant::now();
        let mut text = String::new();
        while begun.elapsed() < PATIENCE {
            text = self.metrics.encode().unwrap();
            let sum: f64 = text
                .lines()
                .filter(|line| !line.starts_with('#'))
                .filter(|line| words.iter().all(|word| line.contains(word)))
                .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
                .sum();
            if (sum - value).abs() < 0.5 {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("{words:?} is not {value} in:\n{text}");
    }

    /// Publishes another mesh.
    pub(super) fn publish(&self, objects: &Objects) {
        let version = self.mesh.load().version + 1;
        self.mesh
            .publish(Mesh::build(Arc::clone(&self.settings), version, objects));
    }
}

pub(super) struct World {
    pub(super) one: Agent,
    pub(super) two: Agent,
    pub(super) objects: Objects,
    inner: Arc<std::fs::File>,
    /// Both agents' authority.
    pub(super) ca: tempfile::TempDir,
}

struct Lines(Arc<Mutex<Vec<u8>>>);

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

pub(super) fn identity(account: &str) -> Identity {
    Identity {
        trust_domain: "cluster.local".into(),
        namespace: "shop".into(),
        service_account: account.into(),
    }
}

impl World {
    async fn new(inner: Arc<std::fs::File>, change: impl Fn(&mut ProxySettings)) -> Self {
        let ca = tempfile::tempdir().unwrap();
        let objects = objects();
        let one = agent("one", NODE_1, ca.path(), &objects, &change).await;
        let two = agent("two", NODE_2, ca.path(), &objects, &change).await;
        Self {
            one,
            two,
            objects,
            inner,
            ca,
        }
    }

    /// Captures a pod on its node's agent: outbound listeners at `dialled`, inbound at `served`.
    pub(super) async fn capture(
        &self,
        agent: &Agent,
        pod: &str,
        dialled: &[SocketAddr],
        served: &[SocketAddr],
    ) {
        let sockets = Arc::new(FakeSockets {
            uid: pod.into(),
            inner: Arc::clone(&self.inner),
            held: Mutex::new(Vec::new()),
        });
        let listeners = (0..2)
            .map(|_| PodListeners {
                outbound: dialled.iter().map(|address| listen(*address)).collect(),
                inbound: served.iter().map(|address| listen(*address)).collect(),
            })
            .collect();
        agent
            .proxy
            .handle(PodEvent::Captured {
                pod: sockets,
                listeners,
            })
            .await;
    }

    /// The usual: the caller dials the callee's port by its address and by the Service; the callee
    /// and the neighbour are captured too.
    pub(super) async fn capture_all(&self) {
        let dialled = [
            at(SERVICE, 80),
            at(CALLEE, PORT),
            at(STRANGER, PORT),
            at(NEIGHBOUR, PORT),
        ];
        self.capture(&self.one, CALLER, &dialled, &[]).await;
        self.capture(&self.one, NEIGHBOUR, &[], &[]).await;
        self.capture(
            &self.two,
            CALLEE,
            &[],
            &[at(CALLEE, 9090), at(CALLEE, 15008)],
        )
        .await;
        self.capture(&self.two, STRANGER, &[], &[]).await;
    }

    /// An application's listener in a pod.
    pub(super) fn serve(&self, address: SocketAddr) -> TcpListener {
        let listener = within(&self.inner, || {
            let listener = StdListener::bind(address).unwrap();
            listener.set_nonblocking(true).unwrap();
            listener
        });
        TcpListener::from_std(listener).unwrap()
    }

    pub(super) async fn publish(&self) {
        self.one.publish(&self.objects);
        self.two.publish(&self.objects);
    }

    /// Gives the caller another account, for which nobody has asked for a certificate.
    pub(super) async fn rename_caller(&mut self, account: &str) {
        let caller = self.objects.pods.get_mut(CALLER).unwrap();
        Arc::make_mut(caller).service_account = account.into();
        self.publish().await;
    }

    /// Sets a namespace-wide default policy.
    pub(super) fn set_default(&mut self, policy: DefaultPolicy) {
        for namespace in self.objects.namespaces.values_mut() {
            Arc::make_mut(namespace).words.default_inbound_policy = Some(policy);
        }
    }
}

/// Dials as an application of a pod does, from the pod's address.
pub(super) async fn dial(from: &str, to: SocketAddr) -> TcpStream {
    try_dial(from, to).await.unwrap()
}

pub(super) async fn try_dial(from: &str, to: SocketAddr) -> io::Result<TcpStream> {
    let socket = tokio::net::TcpSocket::new_v4()?;
    socket.bind(at(from, 0))?;
    let stream = socket.connect(to).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Ends a connection with RST.
pub(super) fn reset(stream: TcpStream) {
    SockRef::from(&stream)
        .set_linger(Some(Duration::ZERO))
        .unwrap();
}

pub(super) fn at(ip: &str, port: u16) -> SocketAddr {
    SocketAddr::new(ip.parse().unwrap(), port)
}

fn listen(address: SocketAddr) -> StdListener {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP)).unwrap();
    socket.set_reuse_address(true).unwrap();
    socket.set_reuse_port(true).unwrap();
    socket.bind(&address.into()).unwrap();
    socket.listen(1024).unwrap();
    socket.into()
}

async fn agent(
    name: &str,
    node: &str,
    ca: &std::path::Path,
    objects: &Objects,
    change: impl Fn(&mut ProxySettings),
) -> Agent {
    let settings = Arc::new(MeshSettings {
        cluster: "test".into(),
        cluster_domain: "cluster.local".into(),
        trust_domain: "cluster.local".into(),
        namespace: "picomesh-system".into(),
        node: name.into(),
        default_inbound_policy: DefaultPolicy::AllUnauthenticated,
        outbound_default: OutboundDefault::Allow,
        cluster_networks: private_networks(),
        tunnel_port: TUNNEL_PORT,
        metrics_port: 4191,
    });
    let mesh = Arc::new(MeshStore::new(Mesh::build(
        Arc::clone(&settings),
        1,
        objects,
    )));
    let signer = LocalCa::open(ca, "cluster.local".into(), LIFE, Arc::new(SystemClock)).unwrap();
    let manager = manager::Settings::new("cluster.local".into());
    let (identities, _driver) = Identities::start(signer, manager).unwrap();
    let wanted: Vec<_> = ["caller", "callee", "neighbour", "stranger"]
        .map(identity)
        .into();
    identities.set_wanted(wanted.iter().cloned().collect());
    for own in &wanted {
        while identities.client_config(own, own).is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    let metrics = Metrics::new(MetricsSettings {
        data_threads: 2,
        ..MetricsSettings::default()
    });
    let lines = Arc::new(Mutex::new(Vec::new()));
    let style = Style {
        format: Format::Text,
        cluster_domain: "cluster.local".into(),
    };
    let log = AccessLog::start(style, Lines(Arc::clone(&lines))).unwrap();
    let mut proxy = ProxySettings {
        threads: 2,
        tunnel_listen: vec![at(node, 15008)],
        tunnel_source: Some(node.parse().unwrap()),
        timing: Timing {
            connect: Duration::from_secs(2),
            handshake: Duration::from_millis(500),
            unknown_source: Duration::from_millis(200),
            ..Timing::default()
        },
        ..ProxySettings::default()
    };
    change(&mut proxy);
    let around = Surroundings {
        mesh: Arc::clone(&mesh),
        identities: identities.clone(),
        metrics: Arc::clone(&metrics),
        access_log: log.clone(),
    };
    let proxy = Proxy::start(proxy, around).unwrap();
    Agent {
        proxy,
        mesh,
        metrics,
        identities,
        log,
        lines,
        settings,
    }
}

fn key(namespace: &str, name: &str) -> ObjectKey {
    ObjectKey {
        cluster: "test".into(),
        namespace: namespace.into(),
        name: name.into(),
    }
}

fn objects() -> Objects {
    let mut objects = Objects::default();
    for (name, ip) in [("one", NODE_1), ("two", NODE_2)] {
        let node = Node {
            key: key("", name),
            addresses: vec![ip.parse().unwrap()],
        };
        objects.nodes.insert(node.key.clone(), Arc::new(node));
    }
    let namespace = Namespace {
        key: key("", "shop"),
        labels: Default::default(),
        words: Words {
            mesh: Some(true),
            ..Words::default()
        },
    };
    objects
        .namespaces
        .insert(namespace.key.clone(), Arc::new(namespace));
    for (name, node, ip) in [
        ("caller", "one", CALLER),
        ("neighbour", "one", NEIGHBOUR),
        ("callee", "two", CALLEE),
        ("stranger", "two", STRANGER),
        ("unmeshed", "two", UNMESHED),
    ] {
        let mut words = Words::default();
        if name == "unmeshed" {
            words.mesh = Some(false);
        }
        let pod = Pod {
            key: key("shop", name),
            uid: ip.into(),
            node: Some(node.into()),
            ips: vec![ip.parse().unwrap()],
            host_network: false,
            service_account: name.into(),
            mirror_of: None,
            labels: Default::default(),
            words,
            ports: Vec::new(),
            ready: true,
            terminal: false,
            terminating: false,
            owner: None,
            foreign_policy: None,
        };
        objects.pods.insert(pod.uid.clone(), Arc::new(pod));
    }
    let service = Service {
        key: key("shop", "web"),
        cluster_ips: vec![SERVICE.parse().unwrap()],
        external_ips: Vec::new(),
        load_balancer_ips: Vec::new(),
        ports: vec![ServicePort {
            name: None,
            port: 80,
            target: TargetPort::Number(PORT),
            protocol: PodProtocol::Tcp,
            node_port: None,
            app_protocol: None,
        }],
        selector: None,
        session_affinity: None,
        internal_traffic_local: false,
        external_traffic_local: false,
        publish_not_ready: false,
        external_name: None,
    };
    objects
        .services
        .insert(service.key.clone(), Arc::new(service));
    let slice = EndpointSlice {
        key: key("shop", "web-1"),
        service: "web".into(),
        endpoints: vec![SliceEndpoint {
            addresses: vec![CALLEE.parse().unwrap()],
            pod: Some(CALLEE.into()),
            node: Some("two".into()),
            ready: true,
            serving: true,
            terminating: false,
        }],
        ports: vec![(None, Some(PORT), PodProtocol::Tcp)],
    };
    objects
        .endpoint_slices
        .insert(slice.key.clone(), Arc::new(slice));
    objects
}

/// Resident memory of this process, in bytes.
pub(super) fn resident() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: usize = statm.split_whitespace().nth(1).unwrap().parse().unwrap();
    pages * 4096
}

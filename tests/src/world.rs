//! The world: an underlay, nodes on it, pods behind them, and the manifests that say so.
//!
//! ```text
//!   <w>-wire      bridge br0, one port n<i> per node and per outsider
//!      │ n0                       │ n1                      │ o0
//!   <w>-node0  eth0 192.168.77.10 <w>-node1 192.168.77.11   <w>-outside 192.168.77.200
//!      │ cni0 10.244.0.1/24       │ cni0 10.244.1.1/24
//!      │ p0                       │ p1
//!   <w>-client eth0 10.244.0.2    <w>-server eth0 10.244.1.2
//! ```
//!
//! IPv6 lies beside it: fd77::/64 for the wire, fd00:244:<node>::/64 for pods. Service addresses
//! (10.96.0.0/16, fd00:96::/112) are unreachable at the node: there is no kube-proxy, so only the
//! mesh can resolve them. No interface ever stands in the machine's own namespace, so any number
//! of worlds with the same addresses run side by side.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::{Value, json};

use crate::{
    Agent, AgentOptions, Netns,
    capture::Capture,
    manifest::{self, Manifests, pairs},
    process::{self, Output, Process},
    reaper, requirements, wait,
};

/// The port of a node in the wire's namespace carries everything between it and the others.
const UNDERLAY: &str = "br0";

/// Dropping it removes every trace.
#[derive(Debug)]
pub struct World {
    name: String,
    /// The processes outlive this program, and so does all the rest.
    kept: bool,
    wire: Netns,
    dir: PathBuf,
    manifests: Manifests,
    nodes: Mutex<Vec<Node>>,
    services: AtomicU32,
    outsiders: AtomicU32,
    commands: Arc<AtomicU32>,
}

/// A node's namespace: what would be the host network of a machine.
#[derive(Clone, Debug)]
pub struct Node(Arc<NodeInner>);

#[derive(Debug)]
struct NodeInner {
    name: String,
    index: usize,
    place: Place,
    v4: Ipv4Addr,
    v6: Ipv6Addr,
    pods: AtomicU32,
}

/// A pod: a namespace with eth0, known to the mesh by its manifest.
#[derive(Clone, Debug)]
pub struct Pod(Arc<PodInner>);

#[derive(Debug)]
struct PodInner {
    name: String,
    namespace: String,
    service_account: String,
    uid: String,
    node: Option<Node>,
    place: Place,
    v4: Ipv4Addr,
    v6: Ipv6Addr,
}

/// Somewhere a program can run.
#[derive(Clone, Debug)]
struct Place {
    netns: Netns,
    logs: PathBuf,
    kept: bool,
    /// Numbers the log files of short commands.
    commands: Arc<AtomicU32>,
}

/// What to write about a pod. `PodSpec::new("web")` is meshed as its namespace says.
#[derive(Clone, Debug)]
pub struct PodSpec {
    pub name: String,
    pub namespace: String,
    pub node: usize,
    pub service_account: String,
    pub labels: Vec<(String, String)>,
    pub annotations: Vec<(String, String)>,
    /// Declared container ports (name, number).
    pub ports: Vec<(String, u16)>,
    /// The Deployment it belongs to, by way of a ReplicaSet.
    pub deployment: Option<String>,
}

/// What to write about a Service.
#[derive(Clone, Debug)]
pub struct ServiceSpec {
    pub name: String,
    pub namespace: String,
    pub selector: Vec<(String, String)>,
    /// (port, target port)
    pub ports: Vec<(u16, u16)>,
    pub headless: bool,
    /// Merged into `spec`: externalIPs, sessionAffinity, type …
    pub more: Value,
}

/// A Service's frontends.
#[derive(Clone, Debug)]
pub struct Service {
    pub name: String,
    pub namespace: String,
    pub v4: Ipv4Addr,
    pub v6: Ipv6Addr,
    pub port: u16,
}

impl World {
    /// A world of `nodes` nodes without pods. Needs root, iproute2 and veth.
    pub fn new(nodes: usize) -> Result<Self> {
        Self::create(nodes, false)
    }

    /// A world that stays after this program has ended.
    pub fn kept(nodes: usize) -> Result<Self> {
        Self::create(nodes, true)
    }

    fn create(nodes: usize, kept: bool) -> Result<Self> {
        let name = reaper::claim()?;
        let made = Self::build(&name, nodes, kept);
        if made.is_err() {
            reaper::remove(&name);
        }
        made
    }

    fn build(name: &str, nodes: usize, kept: bool) -> Result<Self> {
        let dir = reaper::dir(name);
        fs::create_dir_all(dir.join("logs"))
            .with_context(|| format!("create {}", dir.display()))?;
        reaper::mount_bpffs()?;
        let wire = Netns::create(&format!("{name}-wire"))?;
        wire.ip(&format!(
            "link add {UNDERLAY} type bridge mcast_snooping 0\nlink set {UNDERLAY} up\n"
        ))?;
        let world = Self {
            name: name.to_owned(),
            kept,
            wire,
            manifests: Manifests::create(dir.join("manifests"))?,
            dir,
            nodes: Mutex::default(),
            services: AtomicU32::new(0),
            outsiders: AtomicU32::new(0),
            commands: Arc::default(),
        };
        for _ in 0..nodes {
            world.add_node()?;
        }
        Ok(world)
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Files of this world: logs, manifests, CA, run directories.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn manifests(&self) -> &Manifests {
        &self.manifests
    }

    /// The CA of the whole world.
    pub fn ca_dir(&self) -> PathBuf {
        self.dir.join("ca")
    }

    pub fn node(&self, index: usize) -> Result<Node> {
        self.nodes()
            .get(index)
            .cloned()
            .ok_or_else(|| anyhow!("the world has no node {index}"))
    }

    pub fn nodes(&self) -> Vec<Node> {
        self.nodes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Another node, routed to and from those that are there.
    pub fn add_node(&self) -> Result<Node> {
        let others = self.nodes();
        let index = others.len();
        ensure!(index < 100, "a world has room for 100 nodes");
        let netns = Netns::create(&format!("{}-node{index}", self.name))?;
        let v4 = Ipv4Addr::new(192, 168, 77, 10 + index as u8);
        let v6 = Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 10 + index as u16);
        self.plug(&netns, &format!("n{index}"), v4, v6)?;
        // A bridge without an address of its own takes that of a port, and another one when the port
        // goes: its pods would send to nobody for half a minute.
        netns.ip(&format!(
            "link add cni0 address 02:00:00:00:00:{index:02x} type bridge mcast_snooping 0\n\
             addr add 10.244.{index}.1/24 dev cni0\n\
             addr add fd00:244:{index}::1/64 dev cni0 nodad\n\
             link set cni0 up\n\
             route add unreachable 10.96.0.0/16\n\
             route add unreachable fd00:96::/112\n"
        ))?;
        for (key, value) in [
            ("net/ipv4/ip_forward", "1"),
            ("net/ipv6/conf/all/forwarding", "1"),
        ] {
            netns.sysctl(key, value)?;
        }
        let node = Node(Arc::new(NodeInner {
            name: format!("node{index}"),
            index,
            place: self.place(netns),
            v4,
            v6,
            pods: AtomicU32::new(0),
        }));
        for other in &others {
            other.netns().ip(&node.route())?;
            node.netns().ip(&other.route())?;
        }
        self.manifests
            .apply(&manifest::node(node.name(), &spoken(v4, v6)))?;
        self.nodes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(node.clone());
        Ok(node)
    }

    /// Writes a namespace: `Some("enabled")` opts in, `Some("disabled")` or `None` does not.
    pub fn namespace(&self, name: &str, mesh: Option<&str>) -> Result<()> {
        self.manifests.apply(&manifest::namespace(name, mesh))
    }

    /// Makes a pod and writes its manifest and its service account's.
    pub fn pod(&self, spec: &PodSpec) -> Result<Pod> {
        let pod = self.pod_without_manifest(spec)?;
        self.manifests.apply(&manifest::service_account(
            &spec.namespace,
            &spec.service_account,
        ))?;
        self.manifests.apply(&pod.manifest(spec))?;
        Ok(pod)
    }

    /// Makes a pod that no manifest tells of.
    pub fn pod_without_manifest(&self, spec: &PodSpec) -> Result<Pod> {
        let node = self.node(spec.node)?;
        let number = node.0.pods.fetch_add(1, Ordering::Relaxed);
        ensure!(number < 250, "{} has room for 250 pods", node.name());
        let host = number as u16 + 2;
        let index = node.0.index;
        let v4 = Ipv4Addr::new(10, 244, index as u8, host as u8);
        let v6 = Ipv6Addr::new(0xfd00, 0x244, index as u16, 0, 0, 0, 0, host);
        // Two namespaces may each have a pod of one name.
        let netns = Netns::create(&format!("{}-{}-{}", self.name, spec.namespace, spec.name))?;
        node.netns().ip(&format!(
            "link add p{number} type veth peer name eth0 netns {}\n\
             link set p{number} master cni0 up\n",
            netns.name()
        ))?;
        netns.ip(&format!(
            "addr add {v4}/24 dev eth0\n\
             addr add {v6}/64 dev eth0 nodad\n\
             link set eth0 up\n\
             route add default via 10.244.{index}.1\n\
             route add default via fd00:244:{index}::1\n"
        ))?;
        Ok(Pod(Arc::new(PodInner {
            name: spec.name.clone(),
            namespace: spec.namespace.clone(),
            service_account: spec.service_account.clone(),
            uid: format!("00000000-0000-4000-8{index:03}-{number:012}"),
            node: Some(node),
            place: self.place(netns),
            v4,
            v6,
        })))
    }

    /// A machine on the nodes' link that is neither node nor pod.
    pub fn outsider(&self) -> Result<Pod> {
        let number = self.outsiders.fetch_add(1, Ordering::Relaxed);
        ensure!(number < 50, "a world has room for 50 outsiders");
        let netns = Netns::create(&format!("{}-outside{number}", self.name))?;
        let v4 = Ipv4Addr::new(192, 168, 77, 200 + number as u8);
        let v6 = Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 200 + number as u16);
        self.plug(&netns, &format!("o{number}"), v4, v6)?;
        for node in self.nodes() {
            netns.ip(&node.route())?;
        }
        Ok(Pod(Arc::new(PodInner {
            name: format!("outside{number}"),
            namespace: String::new(),
            service_account: String::new(),
            uid: String::new(),
            node: None,
            place: self.place(netns),
            v4,
            v6,
        })))
    }

    /// Writes a Service with addresses of both families.
    pub fn service(&self, spec: &ServiceSpec) -> Result<Service> {
        let number = self.services.fetch_add(1, Ordering::Relaxed) as u16 + 10;
        let v4 = Ipv4Addr::new(10, 96, (number >> 8) as u8, number as u8);
        let v6 = Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, number);
        let ports: Vec<Value> = spec
            .ports
            .iter()
            .map(|(port, target)| {
                json!({"name": format!("p{port}"), "port": port, "targetPort": target, "protocol": "TCP"})
            })
            .collect();
        let mut object = json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": spec.name, "namespace": spec.namespace},
            "spec": {
                "type": "ClusterIP",
                "clusterIP": v4.to_string(),
                "clusterIPs": spoken(v4, v6),
                "ipFamilies": &["IPv4", "IPv6"][..spoken(v4, v6).len()],
                "ipFamilyPolicy": "PreferDualStack",
                "ports": ports,
            },
        });
        if spec.headless {
            object["spec"]["clusterIP"] = "None".into();
            object["spec"]["clusterIPs"] = json!(["None"]);
        }
        if !spec.selector.is_empty() {
            object["spec"]["selector"] = pairs(&spec.selector);
        }
        if let Value::Object(more) = &spec.more {
            for (key, value) in more {
                object["spec"][key] = value.clone();
            }
        }
        self.manifests.apply(&object)?;
        let port = spec.ports.first().map_or(0, |p| p.0);
        Ok(Service {
            name: spec.name.clone(),
            namespace: spec.namespace.clone(),
            v4,
            v6,
            port,
        })
    }

    /// Starts the agent of a node and waits until it is ready.
    pub fn start_agent(&self, node: &Node) -> Result<Agent> {
        let agent = self.start_agent_with(node, &AgentOptions::default())?;
        agent.wait_ready(Duration::from_secs(20))?;
        Ok(agent)
    }

    /// Starts the agent of a node with options of the test's own; does not wait.
    pub fn start_agent_with(&self, node: &Node, options: &AgentOptions) -> Result<Agent> {
        Agent::start(self, node, options)
    }

    /// Starts the agents of all nodes and waits until they are ready and every meshed pod among
    /// `pods` is captured.
    pub fn start_mesh(&self, pods: &[&Pod]) -> Result<Vec<Agent>> {
        self.start_mesh_with(pods, &AgentOptions::default())
    }

    /// The same with options of the test's own.
    pub fn start_mesh_with(&self, pods: &[&Pod], options: &AgentOptions) -> Result<Vec<Agent>> {
        let agents = self
            .nodes()
            .iter()
            .map(|node| self.start_agent_with(node, options))
            .collect::<Result<Vec<_>>>()?;
        for agent in &agents {
            agent.wait_ready(Duration::from_secs(20))?;
        }
        for pod in pods {
            let agent = agents
                .iter()
                .find(|a| pod.node().is_some_and(|n| n.name() == a.node().name()))
                .ok_or_else(|| anyhow!("{} runs on no node", pod.name()))?;
            agent.wait_captured(pod, Duration::from_secs(20))?;
        }
        Ok(agents)
    }

    /// Records what passes between the nodes, on every port of the underlay, and counts `markers`.
    pub fn capture_wire(&self, markers: &[&[u8]]) -> Result<Capture> {
        Capture::start(&self.wire, None, markers)
    }

    /// Where one pod's agent keeps its pins.
    pub fn bpf_dir(&self, node: &Node) -> PathBuf {
        reaper::bpf_dir(&self.name).join(node.name())
    }

    pub fn run_dir(&self, node: &Node) -> PathBuf {
        reaper::run_dir(&self.name).join(node.name())
    }

    pub fn logs(&self) -> PathBuf {
        self.dir.join("logs")
    }

    pub fn is_kept(&self) -> bool {
        self.kept
    }

    /// Connects a namespace to the underlay as its eth0.
    fn plug(&self, netns: &Netns, port: &str, v4: Ipv4Addr, v6: Ipv6Addr) -> Result<()> {
        self.wire.ip(&format!(
            "link add {port} type veth peer name eth0 netns {}\n\
             link set {port} master {UNDERLAY} up\n",
            netns.name()
        ))?;
        netns.ip(&format!(
            "addr add {v4}/24 dev eth0\naddr add {v6}/64 dev eth0 nodad\nlink set eth0 up\n"
        ))
    }

    fn place(&self, netns: Netns) -> Place {
        Place {
            netns,
            logs: self.logs(),
            kept: self.kept,
            commands: self.commands.clone(),
        }
    }
}

/// Those of a pair of addresses whose family this kernel has.
fn spoken(v4: Ipv4Addr, v6: Ipv6Addr) -> Vec<String> {
    let mut addresses = vec![v4.to_string()];
    if requirements::ipv6() {
        addresses.push(v6.to_string());
    }
    addresses
}

impl Drop for World {
    fn drop(&mut self) {
        if self.kept && !std::thread::panicking() {
            if let Err(e) = reaper::keep(&self.name, reaper::Kind::World) {
                eprintln!("keep {}: {e:#}", self.name);
            }
        } else if std::thread::panicking() && std::env::var_os("PICOMESH_KEEP_WORLD").is_some() {
            eprintln!("world {} stays, as PICOMESH_KEEP_WORLD asks", self.name);
            let _ = reaper::keep(&self.name, reaper::Kind::World);
        } else {
            reaper::remove(&self.name);
        }
    }
}

impl Node {
    pub fn name(&self) -> &str {
        &self.0.name
    }

    pub fn index(&self) -> usize {
        self.0.index
    }

    pub fn v4(&self) -> Ipv4Addr {
        self.0.v4
    }

    pub fn v6(&self) -> Ipv6Addr {
        self.0.v6
    }

    /// The node's address on its pods' side: what a probe of the host has as source.
    pub fn gateway(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 244, self.0.index as u8, 1)
    }

    pub fn netns(&self) -> &Netns {
        &self.0.place.netns
    }

    /// Runs `f` as a process of the host would.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        self.netns().run(f)
    }

    pub fn spawn(&self, name: &str, program: &str, args: &[&str]) -> Result<Process> {
        self.0.place.spawn(name, program, args)
    }

    pub fn output(&self, program: &str, args: &[&str], deadline: Duration) -> Result<Output> {
        self.0.place.output(program, args, deadline)
    }

    /// How another machine on the wire reaches this node's pods.
    fn route(&self) -> String {
        let index = self.0.index;
        format!(
            "route add 10.244.{index}.0/24 via {}\nroute add fd00:244:{index}::/64 via {}\n",
            self.0.v4, self.0.v6
        )
    }
}

impl AsRef<Netns> for Pod {
    fn as_ref(&self) -> &Netns {
        self.netns()
    }
}

impl Pod {
    pub fn name(&self) -> &str {
        &self.0.name
    }

    pub fn namespace(&self) -> &str {
        &self.0.namespace
    }

    pub fn uid(&self) -> &str {
        &self.0.uid
    }

    /// `None` for an outsider.
    pub fn node(&self) -> Option<&Node> {
        self.0.node.as_ref()
    }

    pub fn v4(&self) -> Ipv4Addr {
        self.0.v4
    }

    pub fn v6(&self) -> Ipv6Addr {
        self.0.v6
    }

    pub fn at(&self, port: u16) -> SocketAddr {
        (self.0.v4, port).into()
    }

    pub fn at6(&self, port: u16) -> SocketAddr {
        (self.0.v6, port).into()
    }

    /// The identity of the pod's service account in the default trust domain.
    pub fn spiffe_id(&self) -> String {
        format!(
            "spiffe://cluster.local/ns/{}/sa/{}",
            self.0.namespace, self.0.service_account
        )
    }

    pub fn netns(&self) -> &Netns {
        &self.0.place.netns
    }

    /// Runs `f` on a thread inside the pod.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        self.netns().run(f)
    }

    pub fn spawn(&self, name: &str, program: &str, args: &[&str]) -> Result<Process> {
        self.0.place.spawn(name, program, args)
    }

    pub fn output(&self, program: &str, args: &[&str], deadline: Duration) -> Result<Output> {
        self.0.place.output(program, args, deadline)
    }

    /// Waits until a socket listens on `port`, without connecting to it.
    pub fn wait_listening(&self, port: u16, deadline: Duration) -> Result<()> {
        wait::until(
            &format!("{} listens on {port}", self.name()),
            deadline,
            || self.listens(port),
        )
    }

    pub fn listens(&self, port: u16) -> bool {
        ["tcp", "tcp6"].iter().any(|file| {
            self.netns().proc_net(file).is_ok_and(|table| {
                table.lines().skip(1).any(|line| {
                    let mut fields = line.split_whitespace().skip(1);
                    let local = fields.next().unwrap_or_default();
                    // State 0A is LISTEN.
                    local.ends_with(&format!(":{port:04X}")) && fields.nth(1) == Some("0A")
                })
            })
        })
    }

    /// The manifest that [`World::pod`] writes.
    pub fn manifest(&self, spec: &PodSpec) -> Value {
        let ports: Vec<Value> = spec
            .ports
            .iter()
            .map(|(name, port)| json!({"name": name, "containerPort": port, "protocol": "TCP"}))
            .collect();
        let addresses: Vec<Value> = spoken(self.v4(), self.v6())
            .into_iter()
            .map(|ip| json!({ "ip": ip }))
            .collect();
        let mut object = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {
                "name": self.name(), "namespace": self.namespace(), "uid": self.uid(),
                "labels": pairs(&spec.labels),
                "annotations": pairs(&spec.annotations),
            },
            "spec": {
                "nodeName": self.node().map_or("", Node::name),
                "serviceAccountName": spec.service_account,
                "containers": [{"name": "main", "image": "none", "ports": ports}],
            },
            "status": {
                "phase": "Running",
                "podIP": self.v4().to_string(),
                "podIPs": addresses,
                "conditions": [{"type": "Ready", "status": "True"}],
            },
        });
        let metadata = &mut object["metadata"];
        if metadata["annotations"]["picomesh.io/netns"].is_null() {
            metadata["annotations"]["picomesh.io/netns"] =
                self.netns().path().to_string_lossy().into();
        }
        if let Some(deployment) = &spec.deployment {
            let hash = "6d4cf56db6";
            metadata["labels"]["pod-template-hash"] = hash.into();
            metadata["ownerReferences"] = json!([{
                "apiVersion": "apps/v1", "kind": "ReplicaSet",
                "name": format!("{deployment}-{hash}"), "uid": format!("{}-rs", self.uid()),
                "controller": true,
            }]);
        }
        object
    }
}

impl Place {
    fn spawn(&self, name: &str, program: &str, args: &[&str]) -> Result<Process> {
        let mut command = Command::new(program);
        command.args(args).current_dir("/");
        Process::spawn(command, &self.netns, &self.logs, name, self.kept)
    }

    fn output(&self, program: &str, args: &[&str], deadline: Duration) -> Result<Output> {
        let number = self.commands.fetch_add(1, Ordering::Relaxed);
        let mut command = Command::new(program);
        command.args(args).current_dir("/");
        process::output(
            command,
            &self.netns,
            &self.logs,
            &format!("{program}-{number}"),
            deadline,
        )
        .with_context(|| format!("{program} {}", args.join(" ")))
    }
}

impl PodSpec {
    /// In namespace `mesh` on node 0, with a service account of its own and label `app: NAME`.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.into(),
            namespace: "mesh".into(),
            node: 0,
            service_account: name.into(),
            labels: vec![("app".into(), name.into())],
            annotations: Vec::new(),
            ports: Vec::new(),
            deployment: Some(name.into()),
        }
    }

    pub fn on(mut self, node: usize) -> Self {
        self.node = node;
        self
    }

    pub fn in_namespace(mut self, namespace: &str) -> Self {
        self.namespace = namespace.into();
        self
    }

    pub fn account(mut self, name: &str) -> Self {
        self.service_account = name.into();
        self
    }

    pub fn label(mut self, key: &str, value: &str) -> Self {
        self.labels.push((key.into(), value.into()));
        self
    }

    pub fn annotation(mut self, key: &str, value: &str) -> Self {
        self.annotations.push((key.into(), value.into()));
        self
    }

    pub fn port(mut self, name: &str, port: u16) -> Self {
        self.ports.push((name.into(), port));
        self
    }

    /// Out of the mesh whatever its namespace says.
    pub fn unmeshed(self) -> Self {
        self.label("picomesh.io/mesh", "disabled")
    }
}

impl ServiceSpec {
    /// In namespace `mesh`, for pods with label `app: NAME`.
    pub fn new(name: &str, port: u16, target: u16) -> Self {
        Self {
            name: name.into(),
            namespace: "mesh".into(),
            selector: vec![("app".into(), name.into())],
            ports: vec![(port, target)],
            headless: false,
            more: Value::Null,
        }
    }

    pub fn in_namespace(mut self, namespace: &str) -> Self {
        self.namespace = namespace.into();
        self
    }

    pub fn with(mut self, more: Value) -> Self {
        self.more = more;
        self
    }
}

impl Service {
    pub fn at(&self) -> SocketAddr {
        (self.v4, self.port).into()
    }

    pub fn at6(&self) -> SocketAddr {
        (self.v6, self.port).into()
    }

    pub fn ip(&self) -> IpAddr {
        self.v4.into()
    }
}

//! A Kubernetes cluster on one machine: real API server, real kubelets, real containers.
//!
//! ```text
//!   <c>-wire      bridge br0
//!      │ control                     │ n0                      │ n1
//!   <c>-control eth0 192.168.77.2  <c>-node0 192.168.77.10   <c>-node1 192.168.77.11
//!   etcd, kube-apiserver,          containerd, kubelet, kube-proxy in a mount namespace each
//!   kube-controller-manager,         │ cni0 10.244.0.1/24      │ cni0 10.244.1.1/24
//!   kube-scheduler                   pods                      pods
//! ```
//!
//! IPv6 lies beside it, as in [`crate::world`]: fd77::/64, fd00:244:<node>::/64, fd00:96::/112. No
//! interface stands in the machine's own namespace; from there the API server is reached by a
//! forwarder on 127.0.0.1, so that the kubeconfig serves everybody on this machine.
//!
//! A cluster is one of the [`reaper`]'s: everything it makes carries its name, and whatever happens
//! to the process that made it, the next one removes it.

mod component;
mod control;
mod kubectl;
mod node;
mod pki;

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;

pub use self::{component::Component, control::Control, kubectl::Kubectl, node::Node};
use self::{node::Place, pki::Pki};
use crate::{Netns, cgroups, image::Image, reaper, requirements};

/// Names the directory with kube-apiserver, kube-controller-manager, kube-scheduler, kubelet,
/// kube-proxy and kubectl.
pub const KUBERNETES: &str = "PICOMESH_TEST_KUBERNETES";
/// What that directory holds.
pub const COMMANDS: [&str; 6] = [
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kubelet",
    "kube-proxy",
    "kubectl",
];
/// Names the archive of the agent's image.
pub const AGENT_IMAGE: &str = "PICOMESH_TEST_IMAGE";
/// What keeps a pod's namespaces open.
const PAUSE: &str = "localhost/picomesh-test/pause:1";
/// busybox, curl and nginx in one image.
pub const TOOLS: &str = "localhost/picomesh-test/tools:1";

/// Between calls of kubectl, which cost a tenth of a second of a core.
const POLL: Duration = Duration::from_millis(250);
const START: Duration = Duration::from_secs(120);

/// Dropping it removes every trace, unless it was made to stay.
#[derive(Debug)]
pub struct Cluster {
    name: String,
    kept: bool,
    kubectl: Kubectl,
    /// Before the namespaces: programs end first.
    nodes: Vec<Node>,
    control: Control,
}

impl Cluster {
    /// A cluster whose nodes are Ready and have the images of [`images`]. `kubernetes` holds the
    /// [`COMMANDS`].
    ///
    /// With `kept` it stays when this process ends, until [`Cluster::down`].
    pub fn up(kubernetes: &Path, nodes: usize, kept: bool) -> Result<Self> {
        let specs = vec![NodeSpec::default(); nodes];
        Self::up_with(kubernetes, &specs, kept)
    }

    pub fn up_with(kubernetes: &Path, nodes: &[NodeSpec], kept: bool) -> Result<Self> {
        ensure!(
            (1..=50).contains(&nodes.len()),
            "a cluster of {} nodes: 1 to 50 are possible",
            nodes.len()
        );
        if let Some(lack) = lack(kubernetes) {
            bail!("{lack}");
        }
        let name = reaper::claim()?;
        let made = Self::build(&name, kubernetes, nodes, kept);
        if made.is_err() {
            reaper::remove(&name);
        }
        made
    }

    fn build(name: &str, kubernetes: &Path, specs: &[NodeSpec], kept: bool) -> Result<Self> {
        let dir = reaper::dir(name);
        let logs = dir.join("logs");
        fs::create_dir_all(&logs).with_context(|| format!("create {}", dir.display()))?;
        for node in ["/etc", "/opt", "/var"] {
            ensure!(
                !dir.starts_with(node),
                "{} lies in {node}, of which every node has a copy: set TMPDIR to a directory elsewhere",
                dir.display()
            );
        }
        let wire = Netns::create(&format!("{name}-wire"))?;
        wire.ip("link add br0 type bridge mcast_snooping 0\nlink set br0 up\n")?;
        let place = |index: usize| Place::new(name, index, kept);
        let places: Vec<Place> = (0..specs.len()).map(place).collect();
        let pki = Pki::create(&dir.join("pki"))?;
        let kubectl = Kubectl::new(&kubernetes.join("kubectl"), &kubeconfig(name))
            .caching_in(&dir.join("kubectl"));
        let control = Control::start(name, kubernetes, &wire, &pki, &places, &kubectl, kept)?;
        let nodes = places
            .iter()
            .zip(specs)
            .map(|(place, spec)| Node::start(place, spec, &places, kubernetes, &wire, &pki))
            .collect::<Result<Vec<_>>>()?;
        let cluster = Self {
            name: name.to_owned(),
            kept,
            kubectl,
            nodes,
            control,
        };
        for image in images()? {
            cluster.import(&image)?;
        }
        for node in &cluster.nodes {
            cluster.register(node)?;
        }
        if let Some(ended) = cluster.components().find(|c| c.pid().is_none()) {
            bail!("{} ended:\n{}", ended.name(), ended.last_words(15));
        }
        if kept {
            reaper::keep(name, reaper::Kind::Cluster)?;
        }
        Ok(cluster)
    }

    /// The name of the cluster that stays, if there is one.
    pub fn kept() -> Option<String> {
        reaper::kept(reaper::Kind::Cluster).pop()
    }

    /// Removes the cluster that stays. Returns its name, if there was one.
    pub fn down() -> Option<String> {
        let name = Self::kept()?;
        reaper::remove(&name);
        Some(name)
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn kubectl(&self) -> &Kubectl {
        &self.kubectl
    }

    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    pub fn control(&self) -> &Control {
        &self.control
    }

    /// Puts an image on every node.
    pub fn import(&self, image: &Image) -> Result<()> {
        let archive = reaper::dir(&self.name).join("import.tar");
        image.write(&archive)?;
        let imported = self.import_archive(&archive);
        let _ = fs::remove_file(&archive);
        imported
    }

    /// Puts the images of an OCI archive on every node.
    pub fn import_archive(&self, archive: &Path) -> Result<()> {
        self.nodes.iter().try_for_each(|node| node.import(archive))
    }

    /// Processes of the pod with this uid, wherever it runs.
    pub fn processes_of(&self, uid: &str) -> Vec<i32> {
        let group = format!("pod{uid}");
        let inside = |pid: &i32| {
            fs::read_to_string(format!("/proc/{pid}/cgroup")).is_ok_and(|all| all.contains(&group))
        };
        cgroups::processes(&self.name)
            .into_iter()
            .filter(inside)
            .collect()
    }

    /// What the programs of this cluster said last, for a person.
    pub fn last_words(&self, lines: usize) -> String {
        self.components()
            .map(|c| format!("--- {} ---\n{}\n", c.name(), c.last_words(lines)))
            .collect()
    }

    /// In the order in which they are to be ended.
    fn components(&self) -> impl Iterator<Item = &Component> {
        let nodes = self.nodes.iter().flat_map(Node::components);
        nodes.chain(self.control.components())
    }

    /// Waits until the node is there and Ready, and tells the API server which addresses its pods
    /// have.
    fn register(&self, node: &Node) -> Result<()> {
        let ready = || -> Result<Option<()>> {
            let state = self.kubectl.text(&[
                "get",
                "node",
                node.name(),
                "-o",
                "jsonpath={.status.conditions[?(@.type==\"Ready\")].status}",
            ])?;
            if state != "True" {
                thread::sleep(POLL);
            }
            Ok((state == "True").then_some(()))
        };
        crate::wait::for_value(&format!("{} is Ready", node.name()), START, ready)
            .with_context(|| self.last_words(15))?;
        let cidrs = node.pod_networks();
        let patch = json!({"spec": {"podCIDR": cidrs[0], "podCIDRs": cidrs}});
        self.kubectl
            .run(&["patch", "node", node.name(), "-p", &patch.to_string()])?;
        Ok(())
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        self.components().for_each(Component::kill);
        reaper::remove(&self.name);
    }
}

/// What a test wants of a node.
#[derive(Clone, Debug)]
pub struct NodeSpec {
    /// Whether a bpffs is mounted on /sys/fs/bpf when the kubelet starts.
    pub bpffs: bool,
}

impl Default for NodeSpec {
    fn default() -> Self {
        Self { bpffs: true }
    }
}

/// The administrator's, for programs in the machine's own namespaces.
pub fn kubeconfig(name: &str) -> PathBuf {
    reaper::dir(name).join("kubeconfig")
}

/// What this machine lacks for a cluster, if it lacks something.
pub fn lack(kubernetes: &Path) -> Option<String> {
    if let Some(missing) = requirements::missing().into_iter().next() {
        return Some(format!("{} is missing: {}", missing.what, missing.remedy));
    }
    let file_systems = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if !file_systems.lines().any(|l| l.ends_with("\toverlay")) {
        return Some("overlayfs is missing: load the module overlay".into());
    }
    if let Some(absent) = COMMANDS.iter().find(|c| !kubernetes.join(c).is_file()) {
        return Some(format!(
            "{} has no {absent}: call cargo xtask setup --for cluster, or name a complete \
             directory by KUBEBUILDER_ASSETS",
            kubernetes.display()
        ));
    }
    let programs = [
        "etcd",
        "containerd",
        "ctr",
        "runc",
        "iptables",
        "conntrack",
        "openssl",
        "socat",
        "busybox",
        "curl",
        "nginx",
        "nsenter",
        "unshare",
    ];
    programs
        .into_iter()
        .find(|p| !requirements::program(p))
        .map(|p| format!("{p} is not installed: cargo xtask setup --for cluster"))
}

/// The images that every cluster of ours has.
pub fn images() -> Result<Vec<Image>> {
    let mut tools = Image::new(TOOLS).entrypoint(&["/bin/busybox"]);
    let busybox = requirements::find_program("busybox").context("busybox is not installed")?;
    tools.copy(&busybox, "/bin/busybox")?;
    for applet in [
        "sh", "cat", "echo", "grep", "hostname", "httpd", "ip", "ls", "mkdir", "nc", "netstat",
        "ps", "seq", "sleep", "true", "wget",
    ] {
        tools.symlink(&format!("/bin/{applet}"), "busybox")?;
    }
    for program in ["curl", "nginx"] {
        tools.program(program)?;
    }
    tools.directory("/tmp", 0o1777)?;
    for dir in ["/var/lib/nginx", "/var/log/nginx", "/run"] {
        tools.directory(dir, 0o755)?;
    }
    tools.file(
        "/etc/passwd",
        0o644,
        b"root:x:0:0::/:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n",
    )?;
    tools.file("/etc/group", 0o644, b"root:x:0:\nnogroup:x:65534:\n")?;
    // No handler for SIGTERM is needed: containerd ends a sandbox by SIGKILL.
    let pause = tools.as_another(PAUSE, &["/bin/busybox", "sleep", "2147483647"]);
    Ok(vec![pause, tools])
}

/// The addresses of a pair of families that this machine speaks: IPv4 first.
fn spoken<T>(v4: T, v6: T) -> Vec<T> {
    if requirements::ipv6() {
        vec![v4, v6]
    } else {
        vec![v4]
    }
}

//! A node: a network namespace on the wire, and a mount namespace in which everything that a
//! kubelet, a container runtime, a CNI and an agent write lies where it lies on a machine of its
//! own (/run, /etc/cni, /opt/cni, /var/lib/kubelet …) without being anywhere else.

use std::{
    fs,
    net::{Ipv4Addr, TcpStream},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{
    NodeSpec, PAUSE,
    component::{Component, words},
    control::{ADDRESS, ADDRESS6, plug, pod_networks},
    pki::{Pki, Subject},
    spoken,
};
use crate::{Netns, cgroups, process, reaper, wait};

const START: Duration = Duration::from_secs(30);
const SOCKET: &str = "/run/containerd/containerd.sock";
/// Of Debian's containernetworking-plugins.
const PLUGINS_DIR: &str = "/usr/lib/cni";
const PLUGINS: [&str; 4] = ["bridge", "host-local", "loopback", "portmap"];
/// Where a kubelet serves its own API.
const KUBELET: u16 = 10250;

/// What a kubelet sets for the whole machine: it finds them set.
const TUNABLES: [(&str, &str); 6] = [
    ("vm/overcommit_memory", "1"),
    ("vm/panic_on_oom", "0"),
    ("kernel/panic", "10"),
    ("kernel/panic_on_oops", "1"),
    ("kernel/keys/root_maxkeys", "1000000"),
    ("kernel/keys/root_maxbytes", "25000000"),
];

/// Where a node is: names and addresses follow from its number.
#[derive(Clone, Debug)]
pub(super) struct Place {
    cluster: String,
    index: usize,
    kept: bool,
}

impl Place {
    pub(super) fn new(cluster: &str, index: usize, kept: bool) -> Self {
        Self {
            cluster: cluster.to_owned(),
            index,
            kept,
        }
    }

    fn name(&self) -> String {
        format!("node{}", self.index)
    }

    /// The kubelet's, for its own server and as a client.
    fn certificate(&self) -> String {
        format!("{}-kubelet", self.name())
    }

    fn dir(&self) -> PathBuf {
        reaper::dir(&self.cluster).join(self.name())
    }

    fn addresses(&self) -> (String, String) {
        let host = 10 + self.index;
        (format!("192.168.77.{host}"), format!("fd77::{host:x}"))
    }

    fn pod_networks(&self) -> Vec<String> {
        let index = self.index;
        spoken(
            format!("10.244.{index}.0/24"),
            format!("fd00:244:0:{index:x}::/64"),
        )
    }

    /// How the others reach its pods.
    pub(super) fn routes(&self) -> String {
        let (v4, v6) = self.addresses();
        self.pod_networks()
            .iter()
            .zip([v4, v6])
            .map(|(network, via)| format!("route add {network} via {via}\n"))
            .collect()
    }
}

#[derive(Debug)]
pub struct Node {
    name: String,
    place: Place,
    netns: Netns,
    // In the order in which they are to be ended.
    proxy: Component,
    kubelet: Component,
    containerd: Component,
    /// Keeps the mount namespace while everything else of the node is away.
    holder: Component,
}

impl Node {
    pub(super) fn start(
        place: &Place,
        spec: &NodeSpec,
        all: &[Place],
        kubernetes: &Path,
        wire: &Netns,
        pki: &Pki,
    ) -> Result<Self> {
        let name = place.name();
        let dir = place.dir();
        let logs = reaper::dir(&place.cluster).join("logs");
        let netns = Netns::create(&format!("{}-{name}", place.cluster))?;
        let (v4, v6) = place.addresses();
        plug(wire, &netns, &format!("n{}", place.index), &v4, &v6)?;
        // A Service's address is turned into a pod's only on the way out, so there must be one.
        for via in spoken(ADDRESS, ADDRESS6) {
            netns.ip(&format!("route add default via {via}\n"))?;
        }
        load_bridge_filter()?;
        for (key, value) in [
            ("net/ipv4/ip_forward", "1"),
            ("net/ipv6/conf/all/forwarding", "1"),
            // What one pod sends to another by a Service passes the rules on its way back, too.
            ("net/bridge/bridge-nf-call-iptables", "1"),
            ("net/bridge/bridge-nf-call-ip6tables", "1"),
        ] {
            netns.sysctl(key, value)?;
        }
        for other in all.iter().filter(|other| other.index != place.index) {
            netns.ip(&other.routes())?;
        }
        let cgroup = cgroups::create(&place.cluster, &name)?;

        let start = |name: &str, argv| Component::start(name, argv, &netns, &logs, place.kept);
        let script = dir.join("mounts.sh");
        fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
        let kubelet = kubelet_config(&cgroup, pki, place, minor_version(kubernetes)?);
        write_files(place, pki, &kubelet, &dir)?;
        fs::write(&script, mounts(&dir, spec))?;
        let holder = start(
            &name,
            words(&[
                "unshare",
                "--mount",
                "--propagation",
                "private",
                "sh",
                "-e",
                &script.to_string_lossy(),
            ]),
        )?;
        wait::until(&format!("{name} has its mounts"), START, || {
            dir.join("mounted").exists()
        })
        .with_context(|| holder.last_words(10))?;
        let pid = holder.pid().context("the node's first process is gone")?;

        let inside = |argv: &[&str]| {
            let mut all = words(&["nsenter", &format!("--mount=/proc/{pid}/ns/mnt")]);
            all.extend(words(argv));
            all
        };
        let containerd = start(&format!("{name}-containerd"), inside(&["containerd"]))?;
        wait::until(&format!("{name}'s containerd answers"), START, || {
            let ask = inside(&["ctr", "--address", SOCKET, "version"]);
            call(&ask, &netns, &logs).is_ok()
        })
        .with_context(|| containerd.last_words(15))?;
        let kubelet = start(
            &format!("{name}-kubelet"),
            inside(&[
                &kubernetes.join("kubelet").to_string_lossy(),
                "--config=/etc/picomesh-node/kubelet.json",
                "--kubeconfig=/etc/picomesh-node/kubelet.kubeconfig",
                &format!("--hostname-override={name}"),
                &format!("--node-ip={}", spoken(v4, v6).join(",")),
            ]),
        )?;
        let proxy = start(
            &format!("{name}-kube-proxy"),
            inside(&[
                &kubernetes.join("kube-proxy").to_string_lossy(),
                "--kubeconfig=/etc/picomesh-node/kube-proxy.kubeconfig",
                &format!("--hostname-override={name}"),
                &format!("--cluster-cidr={}", pod_networks()),
                "--proxy-mode=iptables",
                // These would be set for the whole machine.
                "--conntrack-max-per-core=0",
                "--conntrack-min=0",
                "--conntrack-tcp-timeout-established=0",
                "--conntrack-tcp-timeout-close-wait=0",
                "--oom-score-adj=0",
            ]),
        )?;
        Ok(Self {
            name,
            place: place.clone(),
            netns,
            proxy,
            kubelet,
            containerd,
            holder,
        })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// Networks of its pods: IPv4, and IPv6 where the machine speaks it.
    pub fn pod_networks(&self) -> Vec<String> {
        self.place.pod_networks()
    }

    pub fn kubelet(&self) -> &Component {
        &self.kubelet
    }

    pub fn containerd(&self) -> &Component {
        &self.containerd
    }

    /// Starts runtime and kubelet again, in the order in which a machine does and with a machine's
    /// patience: a kubelet that finds no runtime ends, and so may one whose runtime is only just there.
    pub fn restart(&self) -> Result<()> {
        self.containerd.restart()?;
        wait::until(
            &format!("{}'s containerd answers", self.name),
            START,
            || self.run(&["ctr", "--address", SOCKET, "version"]).is_ok(),
        )
        .with_context(|| self.containerd.last_words(15))?;
        self.kubelet.restart()?;
        let answers = || TcpStream::connect((Ipv4Addr::LOCALHOST, KUBELET)).is_ok();
        wait::for_value(&format!("{}'s kubelet answers", self.name), START, || {
            if self.kubelet.pid().is_none() {
                eprintln!("{}", self.kubelet.last_words(5));
                self.kubelet.restart()?;
            }
            Ok(self.netns.run(answers).then_some(()))
        })
        .with_context(|| self.kubelet.last_words(15))
    }

    pub fn components(&self) -> impl Iterator<Item = &Component> {
        [&self.proxy, &self.kubelet, &self.containerd, &self.holder].into_iter()
    }

    /// Runs a program on the node, in its network and its files; an exit code that is not 0 is an
    /// error. Returns what it printed.
    pub fn run(&self, argv: &[&str]) -> Result<String> {
        let pid = self
            .holder
            .pid()
            .with_context(|| format!("{} is down", self.name))?;
        let mut all = words(&["nsenter", &format!("--mount=/proc/{pid}/ns/mnt")]);
        all.extend(words(argv));
        let logs = reaper::dir(&self.place.cluster).join("logs");
        call(&all, &self.netns, &logs).with_context(|| format!("on {}", self.name))
    }

    pub(super) fn import(&self, archive: &Path) -> Result<()> {
        self.run(&[
            "ctr",
            "--address",
            SOCKET,
            "--namespace",
            "k8s.io",
            "images",
            "import",
            &archive.to_string_lossy(),
        ])
        .map(drop)
    }
}

/// Without it what passes a bridge passes no rules.
fn load_bridge_filter() -> Result<()> {
    let there = || Path::new("/proc/sys/net/bridge").is_dir();
    if !there() {
        let _ = std::process::Command::new("modprobe")
            .arg("br_netfilter")
            .status();
    }
    ensure!(
        there(),
        "the kernel has no br_netfilter: load that module, or take a kernel with \
         CONFIG_BRIDGE_NETFILTER"
    );
    Ok(())
}

fn call(argv: &[String], netns: &Netns, logs: &Path) -> Result<String> {
    static CALLS: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    let number = CALLS.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let mut command = std::process::Command::new(&argv[0]);
    command.args(&argv[1..]);
    let name = format!("call{number}");
    let output = process::output(command, netns, logs, &name, Duration::from_secs(60))?;
    Ok(output.ok().with_context(|| argv.join(" "))?.stdout)
}

/// Runs as the node's first process, and stays.
///
/// /etc, /opt and /var are the machine's, and what is written there stays with the node. Runtime
/// and kubelet have directories on the machine's own file system, because an overlay cannot lie on
/// an overlay.
fn mounts(dir: &Path, spec: &NodeSpec) -> String {
    let at = dir.display();
    let mut script = String::new();
    for overlaid in ["etc", "opt", "var"] {
        script.push_str(&format!(
            "mkdir -p {at}/{overlaid}/upper {at}/{overlaid}/work\n\
             mount -t overlay -o lowerdir=/{overlaid},upperdir={at}/{overlaid}/upper,workdir={at}/{overlaid}/work overlay /{overlaid}\n"
        ));
    }
    script.push_str("mount -t tmpfs -o mode=755 tmpfs /run\nmkdir /run/netns /run/lock\n");
    for bound in ["containerd", "kubelet"] {
        script.push_str(&format!(
            "mkdir -p {at}/{bound} /var/lib/{bound}\nmount --bind {at}/{bound} /var/lib/{bound}\n"
        ));
    }
    script.push_str(&format!(
        "mkdir -p /etc/containerd /etc/cni/net.d /etc/picomesh-node /opt/cni/bin /var/log/pods\n\
         cp {at}/files/config.toml /etc/containerd/\n\
         cp {at}/files/10-pods.conflist /etc/cni/net.d/\n\
         cp {at}/files/*.json {at}/files/*.kubeconfig /etc/picomesh-node/\n\
         cp {} /opt/cni/bin/\n",
        PLUGINS.map(|p| format!("{PLUGINS_DIR}/{p}")).join(" ")
    ));
    for (key, _) in TUNABLES {
        let file = key.replace('/', "-");
        script.push_str(&format!(
            "if [ -e /proc/sys/{key} ]; then mount --bind {at}/files/{file} /proc/sys/{key}; fi\n"
        ));
    }
    // The machine's own, if it is mounted, is not the node's.
    script.push_str("while umount /sys/fs/bpf 2>/dev/null; do :; done\n");
    if spec.bpffs {
        script.push_str("mount -t bpf bpf /sys/fs/bpf\n");
    }
    script.push_str(&format!(
        "mount --make-rshared /\ntouch {at}/mounted\nexec sleep infinity\n"
    ));
    script
}

fn write_files(place: &Place, pki: &Pki, kubelet: &Value, dir: &Path) -> Result<()> {
    let files = dir.join("files");
    fs::create_dir_all(&files).with_context(|| format!("create {}", files.display()))?;
    let name = place.name();
    let (v4, v6) = place.addresses();
    let server = format!("https://{ADDRESS}:6443");
    let node = format!("system:node:{name}");
    let mut alternatives = vec![format!("DNS:{name}")];
    alternatives.extend(spoken(v4, v6).iter().map(|a| format!("IP:{a}")));
    pki.kubeconfig(
        &place.certificate(),
        &Subject {
            name: &node,
            group: "system:nodes",
            alternatives: &alternatives,
        },
        &server,
        &files.join("kubelet.kubeconfig"),
    )?;
    pki.kubeconfig(
        &format!("{name}-kube-proxy"),
        &Subject {
            name: "system:kube-proxy",
            group: "",
            alternatives: &[],
        },
        &server,
        &files.join("kube-proxy.kubeconfig"),
    )?;
    let write = |file: &str, text: &str| {
        fs::write(files.join(file), text).with_context(|| format!("write {file} of {name}"))
    };
    write("config.toml", &containerd_config())?;
    write("10-pods.conflist", &conflist(place).to_string())?;
    write("kubelet.json", &kubelet.to_string())?;
    for (key, value) in TUNABLES {
        write(&key.replace('/', "-"), &format!("{value}\n"))?;
    }
    for plugin in PLUGINS {
        ensure!(
            Path::new(PLUGINS_DIR).join(plugin).is_file(),
            "{PLUGINS_DIR}/{plugin} is missing: cargo xtask setup --for cluster"
        );
    }
    Ok(())
}

fn containerd_config() -> String {
    format!(
        "version = 2\n\
         [grpc]\naddress = \"{SOCKET}\"\n\
         [plugins.\"io.containerd.grpc.v1.cri\"]\n\
         sandbox_image = \"{PAUSE}\"\n\
         # Below our own: that needs CAP_SYS_RESOURCE.\n\
         restrict_oom_score_adj = true\n\
         [plugins.\"io.containerd.grpc.v1.cri\".cni]\n\
         bin_dir = \"/opt/cni/bin\"\n\
         conf_dir = \"/etc/cni/net.d\"\n\
         [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc]\n\
         runtime_type = \"io.containerd.runc.v2\"\n\
         [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc.options]\n\
         SystemdCgroup = false\n"
    )
}

fn conflist(place: &Place) -> Value {
    let ranges: Vec<Value> = place
        .pod_networks()
        .iter()
        .map(|network| json!([{"subnet": network}]))
        .collect();
    let routes = spoken(json!({"dst": "0.0.0.0/0"}), json!({"dst": "::/0"}));
    json!({
        "cniVersion": "1.0.0",
        "name": "pods",
        "plugins": [
            {
                "type": "bridge",
                "bridge": "cni0",
                "isGateway": true,
                "hairpinMode": true,
                "ipam": {"type": "host-local", "ranges": ranges, "routes": routes},
            },
            {"type": "portmap", "capabilities": {"portMappings": true}},
        ],
    })
}

/// `minor`: of the kubelet's version 1.x. It takes no field that it does not know.
fn kubelet_config(cgroup: &str, pki: &Pki, place: &Place, minor: u32) -> Value {
    let certificate = place.certificate();
    let mut config = json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": false},
            "webhook": {"enabled": true},
            "x509": {"clientCAFile": pki.path("ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": pki.path(&format!("{certificate}.crt")),
        "tlsPrivateKeyFile": pki.path(&format!("{certificate}.key")),
        "containerRuntimeEndpoint": format!("unix://{SOCKET}"),
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": cgroup,
        "enforceNodeAllocatable": [],
        "failSwapOn": false,
        "oomScoreAdj": 0,
        "clusterDomain": "cluster.local",
        // The machine's may name a server that pods cannot reach.
        "resolvConf": "",
        "volumePluginDir": "/var/lib/kubelet/volume-plugins",
        "maxPods": 250,
        // The machine is shared, and what others leave of it is not the cluster's to tidy up.
        "evictionHard": {"memory.available": "0%", "nodefs.available": "0%", "nodefs.inodesFree": "0%", "imagefs.available": "0%", "imagefs.inodesFree": "0%"},
        "imageGCHighThresholdPercent": 100,
    });
    if minor >= 31 {
        config["failCgroupV1"] = json!(false);
    }
    config
}

/// Of Kubernetes 1.x.
fn minor_version(kubernetes: &Path) -> Result<u32> {
    let kubelet = kubernetes.join("kubelet");
    let output = std::process::Command::new(&kubelet)
        .arg("--version")
        .output()
        .with_context(|| format!("start {}", kubelet.display()))?;
    // `Kubernetes v1.36.3`
    let said = String::from_utf8_lossy(&output.stdout);
    let mut numbers = said.trim().split(['v', '.']).skip(1);
    let (major, minor) = (numbers.next(), numbers.next());
    let minor = minor.and_then(|minor| minor.parse().ok());
    minor
        .filter(|_| major == Some("1"))
        .with_context(|| format!("{} is of the version {said:?}", kubelet.display()))
}

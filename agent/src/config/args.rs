//! What clap reads: flags, their variables, and the text of `--help`. Nothing is checked here but
//! the form; `config` makes valid values of it.

use std::{net::SocketAddr, path::PathBuf};

use clap::{Args, Parser, Subcommand, ValueEnum};
use ipnet::IpNet;

use crate::state::explain::{Direction, Question};

#[derive(Debug, Parser)]
#[command(
    name = "picomesh-agent",
    version,
    about = "picomesh's node agent: captures, secures, balances and measures the connections of a node's pods"
)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serves the pods of one node, until SIGTERM.
    Run(Box<RunArgs>),
    /// Decides who gets a certificate, for the whole cluster; several may run.
    Controller(Box<super::ControllerArgs>),
    /// Keeps the cluster's authority and signs what is approved; several may run.
    Signer(Box<super::SignerArgs>),
    /// Takes every pod out of the mesh and removes every trace, when no agent runs.
    Cleanup(CleanupArgs),
    /// Asks a running agent.
    Debug(DebugArgs),
    /// Asks the agent of this container, for a kubelet: succeeds or not, and says why.
    Probe(ProbeArgs),
    /// Mounts a bpffs at a directory, if none is mounted there.
    MountBpffs {
        /// /sys/fs/bpf
        directory: PathBuf,
    },
}

#[derive(Debug, Args)]
pub struct RunArgs {
    /// The node whose pods are served, as pods name it in spec.nodeName.
    #[arg(long, env = "PICOMESH_NODE", value_name = "NAME")]
    pub(super) node: String,
    /// Local mode: directory of Kubernetes manifests that describe the cluster (YAML or JSON;
    /// watched). Without it the cluster's API server is asked.
    #[arg(
        long,
        env = "PICOMESH_MANIFESTS",
        value_name = "DIR",
        requires = "ca_dir"
    )]
    pub(super) manifests: Option<PathBuf>,
    /// Local mode: directory of the certificate authority: tls.crt, tls.key, ca.crt; made if it is
    /// empty.
    #[arg(
        long,
        env = "PICOMESH_CA_DIR",
        value_name = "DIR",
        requires = "manifests"
    )]
    pub(super) ca_dir: Option<PathBuf>,
    /// How to reach the API server; in a pod its service account says it.
    #[arg(
        long,
        env = "PICOMESH_KUBECONFIG",
        value_name = "FILE",
        conflicts_with = "manifests"
    )]
    pub(super) kubeconfig: Option<PathBuf>,
    /// The namespace of the mesh's own objects: DaemonSet, trust roots.
    #[arg(
        long,
        env = "PICOMESH_NAMESPACE",
        value_name = "NAME",
        default_value = "picomesh-system"
    )]
    pub(super) namespace: String,
    /// How long a workload's certificate lives, 1m to 720h; it is renewed after two thirds of that.
    #[arg(
        long,
        env = "PICOMESH_CERTIFICATE_LIFE",
        value_name = "TIME",
        default_value = "24h"
    )]
    pub(super) certificate_life: String,
    #[command(flatten)]
    pub(super) dirs: DirArgs,
    #[command(flatten)]
    pub(super) cni: CniArgs,
    /// Do not put the CNI plugin into the node's network configuration, and take it out if an agent
    /// before has put it there. Pods are then captured a moment after their first container has
    /// started.
    #[arg(long, env = "PICOMESH_NO_CNI")]
    pub(super) no_cni: bool,
    /// Trust domain of the workloads' identities.
    #[arg(
        long,
        env = "PICOMESH_TRUST_DOMAIN",
        value_name = "NAME",
        default_value = "cluster.local"
    )]
    pub(super) trust_domain: String,
    /// The cluster's DNS domain.
    #[arg(
        long,
        env = "PICOMESH_CLUSTER_DOMAIN",
        value_name = "NAME",
        default_value = "cluster.local"
    )]
    pub(super) cluster_domain: String,
    /// The cluster's name, for when there is more than one.
    #[arg(
        long,
        env = "PICOMESH_CLUSTER_NAME",
        value_name = "NAME",
        default_value = "Kubernetes"
    )]
    pub(super) cluster_name: String,
    /// Who may connect to a pod that no Server selects, where pod and namespace do not say.
    #[arg(
        long,
        env = "PICOMESH_DEFAULT_INBOUND_POLICY",
        value_enum,
        default_value = "all-unauthenticated"
    )]
    pub(super) default_inbound_policy: PolicyArg,
    /// What becomes of connections to addresses that nobody in the mesh has.
    #[arg(
        long,
        env = "PICOMESH_OUTBOUND_DEFAULT",
        value_enum,
        default_value = "allow"
    )]
    pub(super) outbound_default: OutboundArg,
    /// Networks that the cluster-… policies count as inside, separated by commas.
    #[arg(
        long,
        env = "PICOMESH_CLUSTER_NETWORKS",
        value_name = "CIDR",
        value_delimiter = ',',
        default_value = "10.0.0.0/8,100.64.0.0/10,172.16.0.0/12,192.168.0.0/16,fd00::/8"
    )]
    pub(super) cluster_networks: Vec<IpNet>,
    /// Threads that move bytes; one per core if not given.
    #[arg(long, env = "PICOMESH_DATA_THREADS", value_name = "N")]
    pub(super) data_threads: Option<usize>,
    /// Families of metrics; Linkerd's are always there, `istio` adds ztunnel's.
    #[arg(
        long,
        env = "PICOMESH_METRICS",
        value_enum,
        value_delimiter = ',',
        default_value = "linkerd"
    )]
    pub(super) metrics: Vec<MetricsArg>,
    /// Where /metrics, /ready and /live are served.
    #[arg(
        long,
        env = "PICOMESH_METRICS_ADDRESS",
        value_name = "IP:PORT",
        default_value = "[::]:4191"
    )]
    pub(super) metrics_address: SocketAddr,
    /// Where the other nodes' agents call, and are called. The same on all nodes.
    #[arg(
        long,
        env = "PICOMESH_TUNNEL_PORT",
        value_name = "PORT",
        default_value_t = 15008
    )]
    pub(super) tunnel_port: u16,
    /// Call pods of other nodes at their own address, as Istio's ztunnel does, not at their node.
    #[arg(long, env = "PICOMESH_HBONE_TO_PODS")]
    pub(super) hbone_to_pods: bool,
    #[command(flatten)]
    pub(super) caps: CapArgs,
    /// Attach with clsact even where the kernel has TCX.
    #[arg(long, env = "PICOMESH_FORCE_CLSACT")]
    pub(super) force_clsact: bool,
    /// Let connections pass in plain while no agent runs, instead of dropping them.
    #[arg(long, env = "PICOMESH_FAIL_OPEN")]
    pub(super) fail_open: bool,
    /// What is logged, e.g. `info` or `warn,picomesh::proxy=debug`. Without it LINKERD_LOG_LEVEL
    /// counts, then `info`.
    #[arg(long, env = "PICOMESH_LOG", value_name = "LEVEL")]
    pub(super) log_level: Option<String>,
    /// How it is logged.
    #[arg(long, env = "PICOMESH_LOG_FORMAT", value_enum, default_value = "text")]
    pub(super) log_format: LogFormatArg,
    /// One line per connection: `stdout`, `off`, or a file to append to.
    #[arg(
        long,
        env = "PICOMESH_ACCESS_LOG",
        value_name = "WHERE",
        default_value = "stdout"
    )]
    pub(super) access_log: String,
    /// How long open connections may go on after SIGTERM: 500ms, 30s, 5m.
    #[arg(
        long,
        env = "PICOMESH_DRAIN_DEADLINE",
        value_name = "TIME",
        default_value = "30s"
    )]
    pub(super) drain_deadline: String,
}

/// What one pod may take of the node, and all together. What is over a cap is reset at once.
#[derive(Debug, Args)]
pub(super) struct CapArgs {
    /// Connections that one pod has dialled and that may be open: 1 to 1000000. Without it 4096, or
    /// a sixth of the node's if that is less.
    #[arg(long, env = "PICOMESH_POD_CONNECTIONS", value_name = "N")]
    pub(super) pod_connections: Option<u32>,
    /// Connections from outside the node that may be open at one pod, by tunnels, and as many
    /// plainly: 1 to 1000000. Without it a third of the node's.
    #[arg(long, env = "PICOMESH_POD_INBOUND_CONNECTIONS", value_name = "N")]
    pub(super) pod_inbound_connections: Option<u32>,
    /// Connections that one pod may dial per second, and as many at once: 1 to 1000000. Without it
    /// 5000. Twice as many may come to it.
    #[arg(long, env = "PICOMESH_POD_CONNECTION_RATE", value_name = "N")]
    pub(super) pod_connection_rate: Option<u32>,
    /// Connections that one pod has dialled and that may wait for their far end: 1 to 1000000.
    /// Without it 1024. Twice as many of those that came to it may.
    #[arg(long, env = "PICOMESH_POD_PENDING", value_name = "N")]
    pub(super) pod_pending: Option<u32>,
    /// Bytes of one pod that may wait for slow readers before its connections move in small steps:
    /// 64KiB to 64GiB. Without it 64MiB, or a quarter of the node's if that is less.
    #[arg(long, env = "PICOMESH_POD_BUFFERS", value_name = "SIZE")]
    pub(super) pod_buffers: Option<String>,
    /// Connections of all pods that may be open: 1 to 10000000. Without it as many as a quarter of
    /// the agent's memory limit holds at 16KiB each (without a limit: a sixteenth of the
    /// machine's memory), and no more than one for every two descriptors it may open.
    #[arg(long, env = "PICOMESH_NODE_CONNECTIONS", value_name = "N")]
    pub(super) node_connections: Option<u32>,
    /// The same as --pod-buffers for all pods: 1MiB to 64GiB. Without it a quarter of the agent's
    /// memory limit, or a sixteenth of the machine's memory, and at least 8MiB.
    #[arg(long, env = "PICOMESH_NODE_BUFFERS", value_name = "SIZE")]
    pub(super) node_buffers: Option<String>,
    /// Tunnels that one other node, or one pod that calls a pod's own address, may keep open to
    /// this node: 1 to 1000000. Without it a quarter of --node-connections, 64 to 4096.
    #[arg(long, env = "PICOMESH_PEER_TUNNELS", value_name = "N")]
    pub(super) peer_tunnels: Option<u32>,
}

#[derive(Clone, Debug, Args)]
pub struct DirArgs {
    /// The agent's own directory: sockets, lock, marks of this boot.
    #[arg(
        long,
        env = "PICOMESH_RUN_DIR",
        value_name = "DIR",
        default_value = "/run/picomesh"
    )]
    pub run_dir: PathBuf,
    /// Directory in a bpffs where programs, links and maps are pinned.
    #[arg(
        long,
        env = "PICOMESH_BPF_DIR",
        value_name = "DIR",
        default_value = "/sys/fs/bpf/picomesh"
    )]
    pub bpf_dir: PathBuf,
}

/// Where the node's own files are. Paths on the node are given as the node has them.
#[derive(Clone, Debug, Args)]
pub struct CniArgs {
    /// On a cluster: where the agent sees the node's root directory; an agent in a container sees
    /// of it what is mounted there: proc, run/netns, var/lib/picomesh, the directories of CNI.
    #[arg(
        long,
        env = "PICOMESH_HOST_ROOT",
        value_name = "DIR",
        default_value = "/"
    )]
    pub host_root: PathBuf,
    /// On a cluster: where the node's CNI configurations are; without it where kubeadm, k3s, k3d,
    /// kind and microk8s have them.
    #[arg(long, env = "PICOMESH_CNI_CONF_DIR", value_name = "DIR")]
    pub cni_conf_dir: Option<PathBuf>,
    /// On a cluster: where the node's CNI plugins are; without it where those of the configuration
    /// are found.
    #[arg(long, env = "PICOMESH_CNI_BIN_DIR", value_name = "DIR")]
    pub cni_bin_dir: Option<PathBuf>,
}

#[derive(Clone, Debug, Args)]
pub struct CleanupArgs {
    #[command(flatten)]
    pub dirs: DirArgs,
    #[command(flatten)]
    pub cni: CniArgs,
    /// Stays until it is asked to end: a DaemonSet's container that ends is started anew.
    #[arg(long)]
    pub wait: bool,
}

#[derive(Debug, Args)]
pub struct DebugArgs {
    /// The agent's own directory.
    #[arg(
        long,
        env = "PICOMESH_RUN_DIR",
        value_name = "DIR",
        default_value = "/run/picomesh",
        global = true
    )]
    pub run_dir: PathBuf,
    /// How the answer is shown.
    #[arg(
        long,
        short,
        value_enum,
        value_name = "FORMAT",
        default_value = "table",
        global = true
    )]
    pub output: OutputArg,
    #[command(subcommand)]
    pub subject: DebugSubject,
}

#[derive(Debug, Args)]
pub struct ProbeArgs {
    /// The agent's own directory.
    #[arg(
        long,
        env = "PICOMESH_RUN_DIR",
        value_name = "DIR",
        default_value = "/run/picomesh"
    )]
    pub run_dir: PathBuf,
    #[arg(value_enum, value_name = "WHAT")]
    pub probe: ProbeArg,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ProbeArg {
    /// It serves, and nothing is awaited.
    Ready,
    /// It serves what it can: the mesh is known and every pod was tried. Certificates may still be
    /// awaited, from a signer that is away.
    Serves,
    /// It answers, or has handed over to another.
    Live,
}

#[derive(Debug, Subcommand)]
pub enum DebugSubject {
    /// What the agent knows of the mesh, and what it could not make sense of.
    State,
    /// The node's pods: captured or not, and why.
    Pods,
    /// Tunnels to and from other nodes.
    Tunnels,
    /// Certificates held, and when they are renewed.
    Certificates,
    /// Who may connect to each pod of the node; or which rule decides about one connection.
    Policies(PoliciesArgs),
    /// What pods may take of the node, what they have, and what was refused for it.
    Limits,
    /// Shows the log level, or changes it.
    LogLevel {
        /// e.g. `debug` or `warn,picomesh::proxy=debug`.
        level: Option<String>,
    },
}

#[derive(Debug, Default, Args)]
pub struct PoliciesArgs {
    /// Only this pod, which runs on the agent's node.
    #[arg(long, value_name = "NAMESPACE/NAME")]
    pub(super) pod: Option<String>,
    /// Which rule decides when this pod or address calls it?
    #[arg(long, value_name = "NAMESPACE/NAME|IP", requires_all = ["pod", "port"], conflicts_with = "to")]
    pub(super) from: Option<String>,
    /// Which rule decides when it calls this pod or address?
    #[arg(long, value_name = "NAMESPACE/NAME|IP", requires_all = ["pod", "port"])]
    pub(super) to: Option<String>,
    /// The port that is called, of the pod itself and not of a Service.
    #[arg(long, value_name = "PORT", requires = "pod")]
    pub(super) port: Option<u16>,
    /// Only what is asked about who comes in, or about who goes out.
    #[arg(long, value_enum)]
    pub(super) direction: Option<DirectionArg>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DirectionArg {
    Ingress,
    Egress,
}

impl PoliciesArgs {
    pub fn question(self) -> Question {
        Question {
            pod: self.pod,
            from: self.from,
            to: self.to,
            port: self.port,
            direction: self.direction.map(|direction| match direction {
                DirectionArg::Ingress => Direction::Ingress,
                DirectionArg::Egress => Direction::Egress,
            }),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OutputArg {
    Table,
    Json,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum PolicyArg {
    AllUnauthenticated,
    AllAuthenticated,
    ClusterUnauthenticated,
    ClusterAuthenticated,
    Deny,
    Audit,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum OutboundArg {
    Allow,
    Deny,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum MetricsArg {
    Linkerd,
    Istio,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum LogFormatArg {
    Text,
    Json,
}

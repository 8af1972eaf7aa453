//! The agent's command line. Parsed and checked here, once; the rest of the program gets plain,
//! valid values. Every flag has an environment variable, so that a DaemonSet is tuned by
//! `kubectl set env`.
#![forbid(unsafe_code)]

use std::{
    ffi::OsString,
    fmt,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    ops::RangeInclusive,
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use clap::{Args, Parser, Subcommand, ValueEnum};
use ipnet::IpNet;
use thiserror::Error;

use crate::{
    datapath::Generation,
    proxy::CapSettings,
    state::{
        explain::{Direction, Question},
        names::is_subdomain,
        objects::{DefaultPolicy, MeshSettings, OutboundDefault},
    },
    telemetry::{self, LogFormat},
};

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
    /// Takes every pod out of the mesh and removes every trace, when no agent runs.
    Cleanup(DirArgs),
    /// Asks a running agent.
    Debug(DebugArgs),
}

#[derive(Debug, Args)]
pub struct RunArgs {
    /// The node whose pods are served, as pods name it in spec.nodeName.
    #[arg(long, env = "PICOMESH_NODE", value_name = "NAME")]
    node: String,
    /// Directory of Kubernetes manifests that describe the cluster (YAML or JSON; watched).
    #[arg(long, env = "PICOMESH_MANIFESTS", value_name = "DIR")]
    manifests: PathBuf,
    /// Directory of the certificate authority: tls.crt, tls.key, ca.crt; made if it is empty.
    #[arg(long, env = "PICOMESH_CA_DIR", value_name = "DIR")]
    ca_dir: PathBuf,
    /// How long a workload's certificate lives, 1m to 720h; it is renewed after two thirds of that.
    #[arg(
        long,
        env = "PICOMESH_CERTIFICATE_LIFE",
        value_name = "TIME",
        default_value = "24h"
    )]
    certificate_life: String,
    #[command(flatten)]
    dirs: DirArgs,
    /// Trust domain of the workloads' identities.
    #[arg(
        long,
        env = "PICOMESH_TRUST_DOMAIN",
        value_name = "NAME",
        default_value = "cluster.local"
    )]
    trust_domain: String,
    /// The cluster's DNS domain.
    #[arg(
        long,
        env = "PICOMESH_CLUSTER_DOMAIN",
        value_name = "NAME",
        default_value = "cluster.local"
    )]
    cluster_domain: String,
    /// The cluster's name, for when there is more than one.
    #[arg(
        long,
        env = "PICOMESH_CLUSTER_NAME",
        value_name = "NAME",
        default_value = "Kubernetes"
    )]
    cluster_name: String,
    /// Who may connect to a pod that no Server selects, where pod and namespace do not say.
    #[arg(
        long,
        env = "PICOMESH_DEFAULT_INBOUND_POLICY",
        value_enum,
        default_value = "all-unauthenticated"
    )]
    default_inbound_policy: PolicyArg,
    /// What becomes of connections to addresses that nobody in the mesh has.
    #[arg(
        long,
        env = "PICOMESH_OUTBOUND_DEFAULT",
        value_enum,
        default_value = "allow"
    )]
    outbound_default: OutboundArg,
    /// Networks that the cluster-… policies count as inside, separated by commas.
    #[arg(
        long,
        env = "PICOMESH_CLUSTER_NETWORKS",
        value_name = "CIDR",
        value_delimiter = ',',
        default_value = "10.0.0.0/8,100.64.0.0/10,172.16.0.0/12,192.168.0.0/16,fd00::/8"
    )]
    cluster_networks: Vec<IpNet>,
    /// Threads that move bytes; one per core if not given.
    #[arg(long, env = "PICOMESH_DATA_THREADS", value_name = "N")]
    data_threads: Option<usize>,
    /// Families of metrics; Linkerd's are always there, `istio` adds ztunnel's.
    #[arg(
        long,
        env = "PICOMESH_METRICS",
        value_enum,
        value_delimiter = ',',
        default_value = "linkerd"
    )]
    metrics: Vec<MetricsArg>,
    /// Where /metrics, /ready and /live are served.
    #[arg(
        long,
        env = "PICOMESH_METRICS_ADDRESS",
        value_name = "IP:PORT",
        default_value = "[::]:4191"
    )]
    metrics_address: SocketAddr,
    /// Where the other nodes' agents call, and are called. The same on all nodes.
    #[arg(
        long,
        env = "PICOMESH_TUNNEL_PORT",
        value_name = "PORT",
        default_value_t = 15008
    )]
    tunnel_port: u16,
    /// Call pods of other nodes at their own address, as Istio's ztunnel does, not at their node.
    #[arg(long, env = "PICOMESH_HBONE_TO_PODS")]
    hbone_to_pods: bool,
    #[command(flatten)]
    caps: CapArgs,
    /// Attach with clsact even where the kernel has TCX.
    #[arg(long, env = "PICOMESH_FORCE_CLSACT")]
    force_clsact: bool,
    /// Let connections pass in plain while no agent runs, instead of dropping them.
    #[arg(long, env = "PICOMESH_FAIL_OPEN")]
    fail_open: bool,
    /// What is logged, e.g. `info` or `warn,picomesh::proxy=debug`. Without it LINKERD_LOG_LEVEL
    /// counts, then `info`.
    #[arg(long, env = "PICOMESH_LOG", value_name = "LEVEL")]
    log_level: Option<String>,
    /// How it is logged.
    #[arg(long, env = "PICOMESH_LOG_FORMAT", value_enum, default_value = "text")]
    log_format: LogFormatArg,
    /// One line per connection: `stdout`, `off`, or a file to append to.
    #[arg(
        long,
        env = "PICOMESH_ACCESS_LOG",
        value_name = "WHERE",
        default_value = "stdout"
    )]
    access_log: String,
    /// How long open connections may go on after SIGTERM: 500ms, 30s, 5m.
    #[arg(
        long,
        env = "PICOMESH_DRAIN_DEADLINE",
        value_name = "TIME",
        default_value = "30s"
    )]
    drain_deadline: String,
}

/// What one pod may take of the node, and all together. What is over a cap is reset at once.
#[derive(Debug, Args)]
struct CapArgs {
    /// Connections that one pod has dialled and that may be open: 1 to 1000000. Without it 4096, or
    /// a sixth of the node's if that is less.
    #[arg(long, env = "PICOMESH_POD_CONNECTIONS", value_name = "N")]
    pod_connections: Option<u32>,
    /// Connections from outside the node that may be open at one pod, by tunnels, and as many
    /// plainly: 1 to 1000000. Without it a third of the node's.
    #[arg(long, env = "PICOMESH_POD_INBOUND_CONNECTIONS", value_name = "N")]
    pod_inbound_connections: Option<u32>,
    /// Connections that one pod may dial per second, and as many at once: 1 to 1000000. Without it
    /// 5000. Twice as many may come to it.
    #[arg(long, env = "PICOMESH_POD_CONNECTION_RATE", value_name = "N")]
    pod_connection_rate: Option<u32>,
    /// Connections that one pod has dialled and that may wait for their far end: 1 to 1000000.
    /// Without it 1024. Twice as many of those that came to it may.
    #[arg(long, env = "PICOMESH_POD_PENDING", value_name = "N")]
    pod_pending: Option<u32>,
    /// Bytes of one pod that may wait for slow readers before its connections move in small steps:
    /// 64KiB to 64GiB. Without it 64MiB, or a quarter of the node's if that is less.
    #[arg(long, env = "PICOMESH_POD_BUFFERS", value_name = "SIZE")]
    pod_buffers: Option<String>,
    /// Connections of all pods that may be open: 1 to 10000000. Without it as many as a quarter of
    /// the agent's memory limit holds at 16KiB each (without a limit: a sixteenth of the
    /// machine's memory), and no more than one for every two descriptors it may open.
    #[arg(long, env = "PICOMESH_NODE_CONNECTIONS", value_name = "N")]
    node_connections: Option<u32>,
    /// The same as --pod-buffers for all pods: 1MiB to 64GiB. Without it a quarter of the agent's
    /// memory limit, or a sixteenth of the machine's memory, and at least 8MiB.
    #[arg(long, env = "PICOMESH_NODE_BUFFERS", value_name = "SIZE")]
    node_buffers: Option<String>,
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
    pod: Option<String>,
    /// Which rule decides when this pod or address calls it?
    #[arg(long, value_name = "NAMESPACE/NAME|IP", requires_all = ["pod", "port"], conflicts_with = "to")]
    from: Option<String>,
    /// Which rule decides when it calls this pod or address?
    #[arg(long, value_name = "NAMESPACE/NAME|IP", requires_all = ["pod", "port"])]
    to: Option<String>,
    /// The port that is called, of the pod itself and not of a Service.
    #[arg(long, value_name = "PORT", requires = "pod")]
    port: Option<u16>,
    /// Only what is asked about who comes in, or about who goes out.
    #[arg(long, value_enum)]
    direction: Option<DirectionArg>,
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
enum PolicyArg {
    AllUnauthenticated,
    AllAuthenticated,
    ClusterUnauthenticated,
    ClusterAuthenticated,
    Deny,
    Audit,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum OutboundArg {
    Allow,
    Deny,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum MetricsArg {
    Linkerd,
    Istio,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum LogFormatArg {
    Text,
    Json,
}

/// Everything `run` needs, valid.
#[derive(Clone, Debug)]
pub struct Config {
    pub mesh: MeshSettings,
    pub manifests: PathBuf,
    pub ca_dir: PathBuf,
    pub certificate_life: Duration,
    pub run_dir: PathBuf,
    pub bpf_dir: PathBuf,
    pub data_threads: usize,
    pub istio_metrics: bool,
    /// Unspecified IPv6: all addresses of both families.
    pub metrics_address: SocketAddr,
    pub tunnel_port: u16,
    pub hbone_to_pods: bool,
    pub caps: CapSettings,
    pub force_clsact: bool,
    pub fail_open: bool,
    pub log_level: String,
    pub log_format: LogFormat,
    pub access_log: AccessLogTarget,
    pub drain_deadline: Duration,
    /// [`picomesh_common::config::rule`] bits in force; all of them but in test builds.
    pub rules: u32,
    /// The default but in test builds.
    pub generation: Generation,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AccessLogTarget {
    Stdout,
    Off,
    File(PathBuf),
}

/// A flag whose value cannot be used.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("{flag} is {value:?}: {remedy}")]
pub struct BadValue {
    pub flag: &'static str,
    pub value: String,
    pub remedy: String,
}

impl BadValue {
    fn new(flag: &'static str, value: impl fmt::Display, remedy: impl Into<String>) -> Self {
        Self {
            flag,
            value: value.to_string(),
            remedy: remedy.into(),
        }
    }
}

/// More threads than any board has cores.
const MAX_DATA_THREADS: usize = 64;
const CERTIFICATE_LIFE: RangeInclusive<Duration> =
    Duration::from_secs(60)..=Duration::from_secs(720 * 3600);

impl RunArgs {
    /// `environment` answers for a variable; it is an argument so that tests need not set any.
    pub fn config(
        self,
        environment: impl Fn(&str) -> Option<OsString>,
    ) -> Result<Config, BadValue> {
        let node = name("--node", self.node)?;
        let trust_domain = name("--trust-domain", self.trust_domain)?;
        let cluster_domain = name("--cluster-domain", self.cluster_domain)?;
        if self.cluster_name.is_empty() || self.cluster_name.len() > 253 {
            let remedy = "a name of 1 to 253 characters is needed";
            return Err(BadValue::new("--cluster-name", self.cluster_name, remedy));
        }
        // What an agent before read there is in force until it can be read.
        let kept = self.dirs.run_dir.join(crate::snapshot::STATE);
        if !self.manifests.is_dir() && !kept.is_file() {
            let remedy = "is no directory; make it and put the cluster's manifests there";
            let value = self.manifests.display();
            return Err(BadValue::new("--manifests", value, remedy));
        }
        let data_threads = match self.data_threads {
            None => std::thread::available_parallelism().map_or(1, usize::from),
            Some(n) if (1..=MAX_DATA_THREADS).contains(&n) => n,
            Some(n) => {
                let remedy = format!("1 to {MAX_DATA_THREADS} are possible; one per core is best");
                return Err(BadValue::new("--data-threads", n, remedy));
            }
        }
        .min(MAX_DATA_THREADS);
        let log_level = self
            .log_level
            .or_else(|| environment("LINKERD_LOG_LEVEL")?.into_string().ok())
            .unwrap_or_else(|| "info".into());
        if let Err(error) = telemetry::parse(&log_level) {
            return Err(BadValue::new("--log-level", log_level, error.to_string()));
        }
        Ok(Config {
            mesh: MeshSettings {
                cluster: Arc::from(self.cluster_name),
                cluster_domain,
                trust_domain,
                node,
                default_inbound_policy: self.default_inbound_policy.into(),
                outbound_default: self.outbound_default.into(),
                cluster_networks: self.cluster_networks,
            },
            manifests: self.manifests,
            ca_dir: self.ca_dir,
            certificate_life: certificate_life(&self.certificate_life)?,
            run_dir: absolute("--run-dir", self.dirs.run_dir)?,
            bpf_dir: absolute("--bpf-dir", self.dirs.bpf_dir)?,
            data_threads,
            istio_metrics: self.metrics.contains(&MetricsArg::Istio),
            metrics_address: self.metrics_address,
            tunnel_port: self.tunnel_port,
            hbone_to_pods: self.hbone_to_pods,
            caps: self.caps.settings()?,
            force_clsact: self.force_clsact,
            fail_open: self.fail_open,
            log_level,
            log_format: match self.log_format {
                LogFormatArg::Text => LogFormat::Text,
                LogFormatArg::Json => LogFormat::Json,
            },
            access_log: match self.access_log.as_str() {
                "stdout" => AccessLogTarget::Stdout,
                "off" => AccessLogTarget::Off,
                path => {
                    AccessLogTarget::File(absolute("--access-log", path.into()).map_err(|bad| {
                        BadValue {
                            remedy: "write stdout, off, or the absolute path of a file".into(),
                            ..bad
                        }
                    })?)
                }
            },
            drain_deadline: duration("--drain-deadline", &self.drain_deadline)?,
            rules: rules(&environment)?,
            generation: generation(environment)?,
        })
    }
}

impl CapArgs {
    fn settings(self) -> Result<CapSettings, BadValue> {
        const POD: u32 = 1_000_000;
        const NODE: u32 = 10_000_000;
        const LARGEST: u64 = 64 << 30;
        Ok(CapSettings {
            pod_connections: count("--pod-connections", self.pod_connections, POD)?.map(wide),
            pod_inbound_connections: count(
                "--pod-inbound-connections",
                self.pod_inbound_connections,
                POD,
            )?
            .map(wide),
            pod_rate: count("--pod-connection-rate", self.pod_connection_rate, POD)?,
            pod_pending: count("--pod-pending", self.pod_pending, POD)?.map(wide),
            pod_buffers: size("--pod-buffers", self.pod_buffers, 64 << 10, LARGEST)?,
            node_connections: count("--node-connections", self.node_connections, NODE)?.map(wide),
            node_buffers: size("--node-buffers", self.node_buffers, 1 << 20, LARGEST)?,
        })
    }
}

fn wide(count: u32) -> usize {
    usize::try_from(count).unwrap_or(usize::MAX)
}

impl From<PolicyArg> for DefaultPolicy {
    fn from(arg: PolicyArg) -> Self {
        match arg {
            PolicyArg::AllUnauthenticated => Self::AllUnauthenticated,
            PolicyArg::AllAuthenticated => Self::AllAuthenticated,
            PolicyArg::ClusterUnauthenticated => Self::ClusterUnauthenticated,
            PolicyArg::ClusterAuthenticated => Self::ClusterAuthenticated,
            PolicyArg::Deny => Self::Deny,
            PolicyArg::Audit => Self::Audit,
        }
    }
}

impl From<OutboundArg> for OutboundDefault {
    fn from(arg: OutboundArg) -> Self {
        match arg {
            OutboundArg::Allow => Self::Allow,
            OutboundArg::Deny => Self::Deny,
        }
    }
}

/// Any address of the wildcard's family pair, for a kernel without IPv6.
pub fn wildcard_of_both_families(address: SocketAddr) -> bool {
    address.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED)
}

/// A DNS name; also what node names and trust domains are made of.
fn name(flag: &'static str, value: String) -> Result<Arc<str>, BadValue> {
    if is_subdomain(&value) {
        return Ok(Arc::from(value));
    }
    let remedy = "a name of at most 253 lower-case letters, digits, `-` and `.` is needed, each \
                  part of at most 63 and beginning and ending with a letter or digit";
    Err(BadValue::new(flag, value, remedy))
}

/// The agent's directories are used from other working directories too (debug, cleanup).
fn absolute(flag: &'static str, path: PathBuf) -> Result<PathBuf, BadValue> {
    if path.is_absolute() {
        return Ok(path);
    }
    let remedy = "an absolute path is needed";
    Err(BadValue::new(flag, path.display(), remedy))
}

fn count(flag: &'static str, value: Option<u32>, most: u32) -> Result<Option<u32>, BadValue> {
    match value {
        Some(count) if !(1..=most).contains(&count) => {
            let remedy = format!("1 to {most} are possible; leave it out for the default");
            Err(BadValue::new(flag, count, remedy))
        }
        other => Ok(other),
    }
}

fn size(
    flag: &'static str,
    value: Option<String>,
    least: u64,
    most: u64,
) -> Result<Option<usize>, BadValue> {
    let Some(value) = value else {
        return Ok(None);
    };
    let units = [("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30)];
    let bytes = units.into_iter().find_map(|(unit, bytes)| {
        let number: u64 = value.strip_suffix(unit)?.parse().ok()?;
        number.checked_mul(bytes)
    });
    match bytes {
        Some(bytes) if (least..=most).contains(&bytes) => {
            Ok(Some(usize::try_from(bytes).unwrap_or(usize::MAX)))
        }
        Some(_) | None => {
            let remedy = format!(
                "a whole number and a unit is needed, {}KiB to {}GiB, such as 512KiB, 64MiB or \
                 2GiB",
                least >> 10,
                most >> 30
            );
            Err(BadValue::new(flag, value, remedy))
        }
    }
}

fn duration(flag: &'static str, value: &str) -> Result<Duration, BadValue> {
    let units = [("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000)];
    let parsed = units.into_iter().find_map(|(unit, millis)| {
        let number: u64 = value.strip_suffix(unit)?.parse().ok()?;
        number.checked_mul(millis)
    });
    match parsed {
        Some(millis) => Ok(Duration::from_millis(millis)),
        None => {
            let remedy = "a whole number and a unit is needed, such as 500ms, 30s or 5m";
            Err(BadValue::new(flag, value, remedy))
        }
    }
}

/// In test builds, layout and name of the build that the agent passes for, such as `7/other`.
pub const GENERATION: &str = "PICOMESH_TEST_GENERATION";

#[cfg(feature = "testing")]
fn generation(environment: impl Fn(&str) -> Option<OsString>) -> Result<Generation, BadValue> {
    let Some(given) = environment(GENERATION).filter(|given| !given.is_empty()) else {
        return Ok(Generation::default());
    };
    let given = given.to_string_lossy().into_owned();
    let parsed = given.split_once('/').and_then(|(layout, name)| {
        Some(Generation {
            layout: layout.parse().ok()?,
            name: name.into(),
        })
    });
    parsed.ok_or_else(|| BadValue::new(GENERATION, given, "LAYOUT/NAME is needed, such as 7/other"))
}

#[cfg(not(feature = "testing"))]
fn generation(environment: impl Fn(&str) -> Option<OsString>) -> Result<Generation, BadValue> {
    match environment(GENERATION).filter(|given| !given.is_empty()) {
        None => Ok(Generation::default()),
        Some(given) => Err(BadValue::new(
            GENERATION,
            given.to_string_lossy(),
            "only a build with the feature `testing` can pass for another; unset the variable",
        )),
    }
}

/// Within [`CERTIFICATE_LIFE`].
fn certificate_life(value: &str) -> Result<Duration, BadValue> {
    let flag = "--certificate-life";
    let life = duration(flag, value)?;
    if CERTIFICATE_LIFE.contains(&life) {
        return Ok(life);
    }
    let remedy = "1m to 720h are possible: long enough to be renewed in peace, short enough that a \
                  stolen one is of little use";
    Err(BadValue::new(flag, value, remedy))
}

/// Names a rule of the kernel half to be left out, in test builds.
pub const RULES_OFF: &str = "PICOMESH_TEST_RULES_OFF";

#[cfg(feature = "testing")]
fn rules(environment: impl Fn(&str) -> Option<OsString>) -> Result<u32, BadValue> {
    use picomesh_common::config::rule;
    let Some(off) = environment(RULES_OFF).filter(|off| !off.is_empty()) else {
        return Ok(rule::ALL);
    };
    let off = off.to_string_lossy().into_owned();
    match rule::NAMES.iter().find(|(_, name, _)| *name == off) {
        Some((bit, _, _)) => Ok(rule::ALL & !bit),
        None => {
            let names: Vec<_> = rule::NAMES.iter().map(|(_, name, _)| *name).collect();
            let remedy = format!("one of {} is needed", names.join(", "));
            Err(BadValue::new(RULES_OFF, off, remedy))
        }
    }
}

#[cfg(not(feature = "testing"))]
fn rules(environment: impl Fn(&str) -> Option<OsString>) -> Result<u32, BadValue> {
    // Silently running with all rules would make a test of a left-out rule pass for nothing.
    match environment(RULES_OFF).filter(|off| !off.is_empty()) {
        None => Ok(picomesh_common::config::rule::ALL),
        Some(off) => Err(BadValue::new(
            RULES_OFF,
            off.to_string_lossy(),
            "only a build with the feature `testing` can leave rules out; unset the variable",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> Result<Config, BadValue> {
        parse_with(args, |_| None)
    }

    fn parse_with(
        args: &[&str],
        environment: impl Fn(&str) -> Option<OsString>,
    ) -> Result<Config, BadValue> {
        let required = ["picomesh-agent", "run", "--node", "n1"];
        let dirs = ["--manifests", "/", "--ca-dir", "/ca"];
        let all = [&required, &dirs, args].concat();
        let cli = Cli::try_parse_from(all).unwrap();
        let Command::Run(run) = cli.command else {
            panic!("not `run`")
        };
        run.config(environment)
    }

    #[test]
    fn defaults_are_the_documented_ones() {
        let config = parse(&[]).unwrap();
        assert_eq!(&*config.mesh.node, "n1");
        assert_eq!(&*config.mesh.trust_domain, "cluster.local");
        assert_eq!(
            config.mesh.default_inbound_policy,
            DefaultPolicy::AllUnauthenticated
        );
        assert_eq!(config.mesh.outbound_default, OutboundDefault::Allow);
        assert_eq!(config.mesh.cluster_networks.len(), 5);
        assert_eq!(config.run_dir, PathBuf::from("/run/picomesh"));
        assert_eq!(config.bpf_dir, PathBuf::from("/sys/fs/bpf/picomesh"));
        assert_eq!(config.metrics_address, "[::]:4191".parse().unwrap());
        assert!(wildcard_of_both_families(config.metrics_address));
        assert_eq!(config.tunnel_port, 15008);
        assert_eq!(config.caps, CapSettings::default());
        assert!(config.data_threads >= 1);
        assert!(!config.istio_metrics && !config.fail_open && !config.force_clsact);
        assert_eq!(config.drain_deadline, Duration::from_secs(30));
        assert_eq!(config.certificate_life, crate::identity::ca::LIFE);
        assert_eq!(config.log_level, "info");
        assert_eq!(config.access_log, AccessLogTarget::Stdout);
        assert_eq!(config.rules, picomesh_common::config::rule::ALL);
    }

    #[test]
    fn flags_reach_the_configuration() {
        let config = parse(&[
            "--default-inbound-policy=cluster-authenticated",
            "--outbound-default=deny",
            "--cluster-networks=10.0.0.0/8,fd00::/8",
            "--metrics=linkerd",
            "--metrics=istio",
            "--metrics-address=127.0.0.1:0",
            "--tunnel-port=25008",
            "--data-threads=3",
            "--drain-deadline=250ms",
            "--certificate-life=2m",
            "--hbone-to-pods",
            "--pod-connections=20000",
            "--pod-inbound-connections=25000",
            "--pod-connection-rate=100000",
            "--pod-pending=7",
            "--pod-buffers=512KiB",
            "--node-connections=30000",
            "--node-buffers=2GiB",
            "--access-log=/var/log/access",
        ])
        .unwrap();
        assert_eq!(
            config.mesh.default_inbound_policy,
            DefaultPolicy::ClusterAuthenticated
        );
        assert_eq!(config.mesh.outbound_default, OutboundDefault::Deny);
        assert_eq!(config.mesh.cluster_networks.len(), 2);
        assert!(config.istio_metrics && config.hbone_to_pods);
        assert!(!wildcard_of_both_families(config.metrics_address));
        assert_eq!(config.tunnel_port, 25008);
        assert_eq!(config.data_threads, 3);
        let caps = CapSettings {
            pod_connections: Some(20_000),
            pod_inbound_connections: Some(25_000),
            pod_rate: Some(100_000),
            pod_pending: Some(7),
            pod_buffers: Some(512 << 10),
            node_connections: Some(30_000),
            node_buffers: Some(2 << 30),
        };
        assert_eq!(config.caps, caps);
        assert_eq!(config.drain_deadline, Duration::from_millis(250));
        assert_eq!(config.certificate_life, Duration::from_secs(120));
        let path = PathBuf::from("/var/log/access");
        assert_eq!(config.access_log, AccessLogTarget::File(path));
    }

    #[test]
    fn an_unusable_value_names_flag_value_and_remedy() {
        for (args, expected) in [
            (
                ["--trust-domain", "Cluster.Local"],
                "--trust-domain is \"Cluster.Local\": a name",
            ),
            (
                ["--trust-domain", "a..b"],
                "--trust-domain is \"a..b\": a name",
            ),
            (
                ["--cluster-domain", "-a.b"],
                "--cluster-domain is \"-a.b\": a name",
            ),
            (
                ["--data-threads", "0"],
                "--data-threads is \"0\": 1 to 64 are possible",
            ),
            (
                ["--data-threads", "65"],
                "--data-threads is \"65\": 1 to 64 are possible",
            ),
            (
                ["--drain-deadline", "30"],
                "--drain-deadline is \"30\": a whole number",
            ),
            (
                ["--drain-deadline", "-1s"],
                "--drain-deadline is \"-1s\": a whole number",
            ),
            (
                ["--certificate-life", "59s"],
                "--certificate-life is \"59s\": 1m to 720h are possible",
            ),
            (
                ["--certificate-life", "721h"],
                "--certificate-life is \"721h\": 1m to 720h are possible",
            ),
            (
                ["--run-dir", "here"],
                "--run-dir is \"here\": an absolute path",
            ),
            (
                ["--access-log", "here"],
                "--access-log is \"here\": write stdout, off",
            ),
            (["--log-level", "loud"], "--log-level is \"loud\": "),
            (
                ["--pod-connections", "0"],
                "--pod-connections is \"0\": 1 to 1000000",
            ),
            (
                ["--node-connections", "10000001"],
                "--node-connections is \"10000001\": 1 to 10000000",
            ),
            (
                ["--pod-buffers", "1KiB"],
                "--pod-buffers is \"1KiB\": a whole number and a unit is needed, 64KiB to 64GiB",
            ),
            (
                ["--node-buffers", "64MB"],
                "--node-buffers is \"64MB\": a whole number and a unit",
            ),
        ] {
            let args = [&format!("{}={}", args[0], args[1])[..]];
            let error = parse(&args).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}");
        }
    }

    #[test]
    fn missing_manifests_are_named() {
        let all = [
            "x",
            "run",
            "--node=n1",
            "--manifests=/no/such",
            "--ca-dir=/ca",
        ];
        let Command::Run(run) = Cli::try_parse_from(all).unwrap().command else {
            panic!("not `run`")
        };
        let error = run.config(|_| None).unwrap_err();
        assert_eq!((error.flag, &*error.value), ("--manifests", "/no/such"));
    }

    #[test]
    fn linkerds_variable_sets_the_level_and_the_flag_wins() {
        let environment =
            |name: &str| (name == "LINKERD_LOG_LEVEL").then(|| OsString::from("warn"));
        assert_eq!(parse_with(&[], environment).unwrap().log_level, "warn");
        let both = parse_with(&["--log-level=debug"], environment).unwrap();
        assert_eq!(both.log_level, "debug");
    }

    #[test]
    fn rules_are_left_out_in_test_builds_alone() {
        let off = |rule: &'static str| {
            parse_with(&[], move |name| (name == RULES_OFF).then(|| rule.into()))
        };
        assert_eq!(off("").unwrap().rules, picomesh_common::config::rule::ALL);
        if cfg!(feature = "testing") {
            use picomesh_common::config::rule;
            let without = off("never-plain").unwrap().rules;
            assert_eq!(without, rule::ALL & !rule::NEVER_PLAIN);
            assert!(
                off("no-such-rule")
                    .unwrap_err()
                    .remedy
                    .contains("never-plain")
            );
        } else {
            assert!(off("never-plain").is_err());
        }
    }

    #[test]
    fn a_test_build_alone_passes_for_another() {
        let named = |value: &'static str| {
            parse_with(&[], move |name| (name == GENERATION).then(|| value.into()))
        };
        assert_eq!(named("").unwrap().generation, Generation::default());
        if cfg!(feature = "testing") {
            let other = named("7/other").unwrap().generation;
            assert_eq!((other.layout, &*other.name), (7, "other"));
            assert!(named("other").unwrap_err().remedy.contains("7/other"));
        } else {
            assert!(named("7/other").is_err());
        }
    }

    #[test]
    fn debug_takes_its_flags_before_and_after_the_subject() {
        for args in [
            ["picomesh-agent", "debug", "--run-dir=/r", "-ojson", "pods"],
            ["picomesh-agent", "debug", "pods", "--run-dir=/r", "-ojson"],
        ] {
            let Command::Debug(debug) = Cli::try_parse_from(args).unwrap().command else {
                panic!("not `debug`")
            };
            assert_eq!(debug.run_dir, PathBuf::from("/r"));
            assert_eq!(debug.output, OutputArg::Json);
            assert!(matches!(debug.subject, DebugSubject::Pods));
        }
    }
}

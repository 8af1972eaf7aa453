//! The agent's command line. Parsed and checked here, once; the rest of the program gets plain,
//! valid values. Every flag has an environment variable, so that a DaemonSet is tuned by
//! `kubectl set env`.
#![forbid(unsafe_code)]

mod args;
mod control;
#[cfg(test)]
mod tests;

use std::{
    ffi::OsString,
    fmt,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    ops::RangeInclusive,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use thiserror::Error;

use crate::{
    cni::{self, install::InstallSettings},
    datapath::Generation,
    proxy::CapSettings,
    state::{
        names::is_subdomain,
        objects::{DefaultPolicy, MeshSettings, OutboundDefault},
    },
    telemetry::{self, LogFormat},
};
use args::{CapArgs, LogFormatArg, MetricsArg, OutboundArg, PolicyArg};
pub use args::{
    CleanupArgs, Cli, CniArgs, Command, DebugArgs, DebugSubject, DirArgs, DirectionArg, OutputArg,
    PoliciesArgs, ProbeArg, ProbeArgs, RunArgs,
};
pub use control::{ControlConfig, ControllerArgs, Role, SignerArgs};

/// Everything `run` needs, valid.
#[derive(Clone, Debug)]
pub struct Config {
    pub mesh: MeshSettings,
    pub source: Source,
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

impl Config {
    /// Does a kubelet start this agent anew when it ends?
    pub fn in_a_pod(&self) -> bool {
        match &self.source {
            Source::Local { .. } => false,
            Source::Cluster { kubeconfig, .. } => kubeconfig.is_none(),
        }
    }
}

/// Who tells what there is, and who signs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// Manifests in a directory, and an authority in another.
    Local { manifests: PathBuf, ca_dir: PathBuf },
    /// The API server, and the cluster's signer.
    Cluster {
        /// Without one it is the service account of the agent's own pod that counts.
        kubeconfig: Option<PathBuf>,
        /// Of the mesh's own objects.
        namespace: String,
        cni: Cni,
    },
}

/// Where pods of a node are found, and how the CNI plugin gets there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cni {
    /// The node's root directory, as the agent sees it.
    pub host_root: PathBuf,
    /// Where the plugin is, or was put by an agent before.
    pub install: InstallSettings,
    /// It is put into the node's configuration; otherwise taken out of it.
    pub plugin: bool,
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

/// Kubernetes sets it in every pod.
const IN_A_POD: &str = "KUBERNETES_SERVICE_HOST";
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
        let namespace = name("--namespace", self.namespace)?;
        let source = match (self.manifests, self.ca_dir) {
            (Some(manifests), Some(ca_dir)) => {
                // What an agent before read there is in force until it can be read.
                let kept = self.dirs.run_dir.join(crate::snapshot::STATE);
                if !manifests.is_dir() && !kept.is_file() {
                    let remedy = "is no directory; make it and put the cluster's manifests there";
                    return Err(BadValue::new("--manifests", manifests.display(), remedy));
                }
                Source::Local { manifests, ca_dir }
            }
            // One without the other is refused before we see it.
            (None, _) | (_, None) => {
                if self.kubeconfig.is_none() && environment(IN_A_POD).is_none() {
                    let remedy = "without it the agent must run in a pod of the cluster, or be \
                                  given --kubeconfig; for local mode write --manifests and --ca-dir";
                    return Err(BadValue::new("--manifests", "", remedy));
                }
                let host_root = absolute("--host-root", self.cni.host_root.clone())?;
                let install = self.cni.install(&self.dirs.run_dir)?;
                Source::Cluster {
                    kubeconfig: self.kubeconfig,
                    namespace: namespace.to_string(),
                    cni: Cni {
                        host_root,
                        install,
                        plugin: !self.no_cni,
                    },
                }
            }
        };
        let data_threads = match self.data_threads {
            None => std::thread::available_parallelism().map_or(1, usize::from),
            Some(n) if (1..=MAX_DATA_THREADS).contains(&n) => n,
            Some(n) => {
                let remedy = format!("1 to {MAX_DATA_THREADS} are possible; one per core is best");
                return Err(BadValue::new("--data-threads", n, remedy));
            }
        }
        .min(MAX_DATA_THREADS);
        let tunnel_port = match self.tunnel_port {
            0 => {
                let remedy = "1 to 65535 are possible; the other nodes must know it";
                return Err(BadValue::new("--tunnel-port", 0, remedy));
            }
            port => port,
        };
        let log_level = log_level(self.log_level, &environment)?;
        Ok(Config {
            mesh: MeshSettings {
                cluster: Arc::from(self.cluster_name),
                cluster_domain,
                trust_domain,
                namespace,
                node,
                default_inbound_policy: self.default_inbound_policy.into(),
                outbound_default: self.outbound_default.into(),
                cluster_networks: self.cluster_networks,
                tunnel_port,
                metrics_port: self.metrics_address.port(),
            },
            source,
            certificate_life: certificate_life(&self.certificate_life)?,
            run_dir: absolute("--run-dir", self.dirs.run_dir)?,
            bpf_dir: absolute("--bpf-dir", self.dirs.bpf_dir)?,
            data_threads,
            istio_metrics: self.metrics.contains(&MetricsArg::Istio),
            metrics_address: self.metrics_address,
            tunnel_port,
            hbone_to_pods: self.hbone_to_pods,
            caps: self.caps.settings()?,
            force_clsact: self.force_clsact,
            fail_open: self.fail_open,
            log_level,
            log_format: self.log_format.into(),
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

impl CniArgs {
    /// How the plugin is put into the node's configuration, and taken out of it.
    pub fn install(&self, run_dir: &Path) -> Result<InstallSettings, BadValue> {
        let given = |flag, dir: &Option<PathBuf>| {
            let dir = dir.clone().map(|dir| absolute(flag, dir));
            dir.transpose()
        };
        Ok(InstallSettings {
            host_root: absolute("--host-root", self.host_root.clone())?,
            conf_dir: given("--cni-conf-dir", &self.cni_conf_dir)?,
            bin_dir: given("--cni-bin-dir", &self.cni_bin_dir)?,
            program: plugin(),
            run_dir: run_dir.to_owned(),
            intent: PathBuf::from(cni::INTENT),
        })
    }
}

/// The plugin comes beside the agent.
fn plugin() -> PathBuf {
    let agent = std::env::current_exe().unwrap_or_default();
    agent.with_file_name(cni::PLUGIN)
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
            peer_tunnels: count("--peer-tunnels", self.peer_tunnels, POD)?.map(wide),
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

impl From<LogFormatArg> for LogFormat {
    fn from(arg: LogFormatArg) -> Self {
        match arg {
            LogFormatArg::Text => Self::Text,
            LogFormatArg::Json => Self::Json,
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

fn log_level(
    given: Option<String>,
    environment: impl Fn(&str) -> Option<OsString>,
) -> Result<String, BadValue> {
    let level = given
        .or_else(|| environment("LINKERD_LOG_LEVEL")?.into_string().ok())
        .unwrap_or_else(|| "info".into());
    match telemetry::parse(&level) {
        Ok(_) => Ok(level),
        Err(error) => Err(BadValue::new("--log-level", level, error.to_string())),
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

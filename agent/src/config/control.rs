//! The command line of controller and signer: what both need, and what each needs besides.

use std::{ffi::OsString, net::SocketAddr, ops::RangeInclusive, path::PathBuf, time::Duration};

use clap::Args;

use super::{BadValue, IN_A_POD, args::LogFormatArg, count, duration, log_level, name};
use crate::{
    control::{ask::Rules, controller, signer},
    telemetry::LogFormat,
};

/// Kubernetes allows no shorter life.
const LONGEST_LIFE: RangeInclusive<Duration> =
    Duration::from_secs(600)..=Duration::from_secs(720 * 3600);
/// An issuer of ours lives for a year.
const ROTATION: RangeInclusive<Duration> =
    Duration::from_secs(3600)..=Duration::from_secs(4320 * 3600);
/// As the downward API is asked to give them.
const POD_NAMESPACE: &str = "POD_NAMESPACE";
/// The pod's name, where nothing else says it.
const HOST_NAME: &str = "HOSTNAME";
/// For the keys of objects; more than one cluster is for later.
const CLUSTER: &str = "Kubernetes";

#[derive(Debug, Args)]
pub struct ControllerArgs {
    #[command(flatten)]
    common: CommonArgs,
    /// Service accounts of one node whose requests may wait for an answer, 1 to 10000; more are
    /// denied. Eight requests for one account count as one: an agent that starts anew asks again.
    #[arg(
        long,
        env = "PICOMESH_NODE_REQUESTS",
        value_name = "N",
        default_value_t = 256
    )]
    node_requests: u32,
}

#[derive(Debug, Args)]
pub struct SignerArgs {
    #[command(flatten)]
    common: CommonArgs,
    /// How old an issuer that the signer has made becomes before the next, 1h to 4320h.
    #[arg(
        long,
        env = "PICOMESH_ISSUER_ROTATION",
        value_name = "TIME",
        default_value = "720h"
    )]
    issuer_rotation: String,
}

#[derive(Debug, Args)]
struct CommonArgs {
    /// How to reach the API server; in a pod its service account says it.
    #[arg(long, env = "PICOMESH_KUBECONFIG", value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// The namespace of the mesh's own objects: agents, Lease, Secret, trust roots. Without it
    /// POD_NAMESPACE counts, then `picomesh-system`.
    #[arg(long, env = "PICOMESH_NAMESPACE", value_name = "NAME")]
    namespace: Option<String>,
    /// This replica's name in the Lease.
    #[arg(long, env = "POD_NAME", value_name = "NAME")]
    pod_name: Option<String>,
    /// Trust domain of the workloads' identities; the same as the agents'.
    #[arg(
        long,
        env = "PICOMESH_TRUST_DOMAIN",
        value_name = "NAME",
        default_value = "cluster.local"
    )]
    trust_domain: String,
    /// The longest life of a workload's certificate, 10m to 720h: at least that of the agents.
    #[arg(
        long,
        env = "PICOMESH_CERTIFICATE_LIFE",
        value_name = "TIME",
        default_value = "24h"
    )]
    certificate_life: String,
    /// Where /metrics, /ready and /live are served.
    #[arg(
        long,
        env = "PICOMESH_METRICS_ADDRESS",
        value_name = "IP:PORT",
        default_value = "[::]:4191"
    )]
    metrics_address: SocketAddr,
    /// What is logged, e.g. `info` or `warn,picomesh::control=debug`.
    #[arg(long, env = "PICOMESH_LOG", value_name = "LEVEL")]
    log_level: Option<String>,
    /// How it is logged.
    #[arg(long, env = "PICOMESH_LOG_FORMAT", value_enum, default_value = "text")]
    log_format: LogFormatArg,
}

/// What both processes need, valid.
#[derive(Clone, Debug)]
pub struct ControlConfig {
    pub kubeconfig: Option<PathBuf>,
    pub namespace: String,
    pub pod_name: String,
    pub metrics_address: SocketAddr,
    pub log_level: String,
    pub log_format: LogFormat,
    pub role: Role,
}

#[derive(Clone, Debug)]
pub enum Role {
    Controller(controller::Settings),
    Signer(signer::Settings),
}

impl ControllerArgs {
    /// `environment` answers for a variable; it is an argument so that tests need not set any.
    pub fn config(
        self,
        environment: impl Fn(&str) -> Option<OsString>,
    ) -> Result<ControlConfig, BadValue> {
        let most = count("--node-requests", Some(self.node_requests), 10_000)?;
        self.common.config(environment, |rules, _namespace| {
            Ok(Role::Controller(controller::Settings {
                rules,
                cluster: CLUSTER.into(),
                most_pending: most.map_or(0, super::wide),
            }))
        })
    }
}

impl SignerArgs {
    /// As [`ControllerArgs::config`].
    pub fn config(
        self,
        environment: impl Fn(&str) -> Option<OsString>,
    ) -> Result<ControlConfig, BadValue> {
        let flag = "--issuer-rotation";
        let rotation = duration(flag, &self.issuer_rotation)?;
        if !ROTATION.contains(&rotation) {
            let remedy = "1h to 4320h are possible: half of an issuer's life at most";
            return Err(BadValue::new(flag, self.issuer_rotation, remedy));
        }
        self.common.config(environment, |rules, namespace| {
            Ok(Role::Signer(signer::Settings {
                keeper: signer::KeeperSettings {
                    namespace: namespace.to_owned(),
                    trust_domain: rules.trust_domain.clone(),
                    longest_life: rules.longest_life,
                    rotation,
                },
                rules,
            }))
        })
    }
}

impl CommonArgs {
    fn config(
        self,
        environment: impl Fn(&str) -> Option<OsString>,
        role: impl FnOnce(Rules, &str) -> Result<Role, BadValue>,
    ) -> Result<ControlConfig, BadValue> {
        let said = |variable: &str| {
            let said = environment(variable)?.into_string().ok()?;
            Some(said).filter(|said| !said.is_empty())
        };
        if self.kubeconfig.is_none() && environment(IN_A_POD).is_none() {
            let remedy = "without it this must run in a pod of the cluster";
            return Err(BadValue::new("--kubeconfig", "", remedy));
        }
        let namespace = self.namespace.or_else(|| said(POD_NAMESPACE));
        let namespace = namespace.unwrap_or_else(|| "picomesh-system".into());
        let namespace = name("--namespace", namespace)?;
        let pod_name = self.pod_name.or_else(|| said(HOST_NAME));
        let pod_name = name("--pod-name", pod_name.unwrap_or_else(|| "picomesh".into()))?;
        let flag = "--certificate-life";
        let longest_life = duration(flag, &self.certificate_life)?;
        if !LONGEST_LIFE.contains(&longest_life) {
            let remedy = "10m to 720h are possible: Kubernetes allows no shorter life, and a \
                          stolen certificate is of use for as long";
            return Err(BadValue::new(flag, self.certificate_life, remedy));
        }
        let rules = Rules {
            namespace: namespace.clone(),
            trust_domain: name("--trust-domain", self.trust_domain)?,
            longest_life,
        };
        Ok(ControlConfig {
            role: role(rules, &namespace)?,
            kubeconfig: self.kubeconfig,
            namespace: namespace.to_string(),
            pod_name: pod_name.to_string(),
            metrics_address: self.metrics_address,
            log_level: log_level(self.log_level, &environment)?,
            log_format: self.log_format.into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::{
        super::{Cli, Command},
        *,
    };

    fn in_a_pod(variable: &str) -> Option<OsString> {
        match variable {
            IN_A_POD => Some("10.0.0.1".into()),
            POD_NAMESPACE => Some("mesh".into()),
            HOST_NAME => Some("picomesh-controller-x".into()),
            _ => None,
        }
    }

    fn config(arguments: &[&str]) -> Result<ControlConfig, BadValue> {
        let arguments = ["picomesh-agent"].iter().chain(arguments);
        match Cli::try_parse_from(arguments).unwrap().command {
            Command::Controller(args) => args.config(in_a_pod),
            Command::Signer(args) => args.config(in_a_pod),
            Command::Run(_)
            | Command::Cleanup(_)
            | Command::Debug(_)
            | Command::Probe(_)
            | Command::MountBpffs { .. } => unreachable!(),
        }
    }

    #[test]
    fn in_a_pod_nothing_needs_to_be_said() {
        let controller = config(&["controller"]).unwrap();
        assert_eq!(controller.namespace, "mesh");
        assert_eq!(controller.pod_name, "picomesh-controller-x");
        let Role::Controller(settings) = controller.role else {
            panic!("not a controller")
        };
        assert_eq!(&*settings.rules.namespace, "mesh");
        assert_eq!(settings.most_pending, 256);
        let signer = config(&["signer", "--namespace", "other"]).unwrap();
        let Role::Signer(settings) = signer.role else {
            panic!("not a signer")
        };
        assert_eq!(settings.keeper.namespace, "other");
        assert_eq!(settings.keeper.rotation, Duration::from_secs(720 * 3600));
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        for (arguments, flag) in [
            (["controller", "--node-requests", "0"], "--node-requests"),
            (
                ["controller", "--certificate-life", "5m"],
                "--certificate-life",
            ),
            (
                ["signer", "--certificate-life", "721h"],
                "--certificate-life",
            ),
            (["signer", "--issuer-rotation", "59m"], "--issuer-rotation"),
            (["signer", "--issuer-rotation", "a"], "--issuer-rotation"),
            (["signer", "--trust-domain", "A"], "--trust-domain"),
            (["signer", "--namespace", ""], "--namespace"),
            (["signer", "--log-level", "=="], "--log-level"),
        ] {
            assert_eq!(config(&arguments).unwrap_err().flag, flag);
        }
        let outside = |variable: &str| in_a_pod(variable).filter(|_| variable != IN_A_POD);
        let cli = Cli::try_parse_from(["picomesh-agent", "signer"]).unwrap();
        let Command::Signer(args) = cli.command else {
            unreachable!()
        };
        assert_eq!(args.config(outside).unwrap_err().flag, "--kubeconfig");
    }
}

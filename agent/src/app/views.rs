//! What the rooms tell of themselves, for `debug` (JSON) and for a scrape (families).

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Instant, SystemTime},
};

use picomesh_common::Counter;
use serde_json::{Value, json};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tokio::sync::watch;

use super::source::Errors;
use crate::{
    access_log::AccessLog,
    admin::Views,
    datapath::{Datapath, PodStatus},
    identity::{Identities, ca::SKEW},
    metrics::{Family, Kind, Metrics, Sample},
    proxy::{Capacity, Proxy},
    readiness::Readiness,
    state::{
        MeshStore,
        explain::{self, Direction, Question},
        objects::MeshSettings,
    },
    telemetry::LogLevel,
};

/// Everybody who is asked.
pub(super) struct Shown {
    pub(super) settings: Arc<MeshSettings>,
    pub(super) started: Instant,
    pub(super) readiness: Readiness,
    pub(super) mesh: Arc<MeshStore>,
    pub(super) errors: Errors,
    pub(super) metrics: Arc<Metrics>,
    pub(super) access_log: AccessLog,
    pub(super) identities: Identities,
    pub(super) datapath: Arc<Datapath>,
    /// Pods that should be captured and have no place.
    pub(super) lost: watch::Receiver<Arc<Vec<PodStatus>>>,
    pub(super) proxy: Arc<Proxy>,
    pub(super) capacity: Capacity,
}

pub(super) fn views(shown: &Arc<Shown>, log_level: Option<LogLevel>) -> Views {
    let view = |answer: fn(&Shown) -> Value| -> crate::admin::View {
        let shown = shown.clone();
        Box::new(move || answer(&shown))
    };
    Views {
        readiness: view(Shown::readiness),
        state: view(Shown::state),
        pods: view(Shown::pods),
        tunnels: view(|shown| json!(shown.proxy.tunnels())),
        certificates: view(Shown::certificates),
        policies: {
            let shown = shown.clone();
            Box::new(move |question| shown.policies(question))
        },
        limits: view(Shown::limits),
        log_level,
    }
}

/// Weak, for the metrics are among those who are asked.
pub(super) fn register(shown: &Arc<Shown>, metrics: &Metrics) {
    let shown = Arc::downgrade(shown);
    metrics.add_source(move || {
        shown
            .upgrade()
            .map_or_else(Vec::new, |shown| shown.families())
    });
}

impl Shown {
    pub(super) fn all_pods(&self) -> Vec<PodStatus> {
        let mut pods = self.datapath.status();
        pods.extend(self.lost.borrow().iter().cloned());
        pods
    }

    fn readiness(&self) -> Value {
        let awaited = self.readiness.pending();
        let serves = super::serves(&awaited);
        json!({"ready": awaited.is_empty(), "serves": serves, "awaited": awaited})
    }

    fn state(&self) -> Value {
        let mesh = self.mesh.load();
        let meshed = mesh.local.iter().filter(|workload| workload.meshed);
        let pending = self.readiness.pending();
        let (series, series_dropped) = self.metrics.series();
        let host_problem = self.datapath.host_problem();
        let problems: Vec<_> = mesh
            .problems
            .iter()
            .map(|problem| {
                json!({
                    "kind": problem.kind,
                    "object": problem.object.to_string(),
                    "message": problem.message,
                })
            })
            .collect();
        let load_errors = self.errors.shown();
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "process": std::process::id(),
            "node": &*self.settings.node,
            "cluster": &*self.settings.cluster,
            "trust_domain": &*self.settings.trust_domain,
            "uptime_seconds": self.started.elapsed().as_secs(),
            "ready": pending.is_empty(),
            "awaited": pending,
            "mesh_version": mesh.version,
            "nodes": mesh.node_addresses.len(),
            "workloads": mesh.workloads.len(),
            "local_pods": mesh.local.len(),
            "local_pods_meshed": meshed.count(),
            "frontends": mesh.frontends.len(),
            "connections": self.metrics.connections(),
            "series": series,
            "series_dropped": series_dropped,
            "access_log_dropped": self.access_log.dropped(),
            "probes": host_problem.map_or_else(|| "recognised".into(), |(_, sentence)| sentence),
            "problems": problems,
            "manifest_errors": load_errors,
        })
    }

    fn pods(&self) -> Value {
        let connections = self.proxy.connections();
        let mut shares = self.proxy.limits().pods;
        let pods = self.all_pods().into_iter().map(|pod| {
            let open = connections.get(&*pod.uid).copied().unwrap_or(0);
            let share = shares.remove(&*pod.uid).unwrap_or_default();
            json!({
                "uid": pod.uid,
                "name": pod.name,
                "slot": pod.slot,
                "state": pod.state,
                "reason": pod.reason,
                "repairs": pod.repairs,
                "mended": pod.mended,
                "connections": open,
                "refused": share.refused,
                "counters": pod.counters,
            })
        });
        pods.collect()
    }

    fn limits(&self) -> Value {
        let limits = self.proxy.limits();
        let names: BTreeMap<_, _> = self
            .all_pods()
            .into_iter()
            .map(|pod| (pod.uid, pod.name))
            .collect();
        let mut pods: Vec<_> = limits
            .pods
            .iter()
            .map(|(uid, share)| {
                json!({
                    "pod": names.get(&**uid).map_or(&**uid, |name| name.as_str()),
                    "dialled": share.dialled,
                    "came": share.came,
                    "pending": share.pending,
                    "waiting": share.waiting,
                    "buffered_bytes": share.buffered_bytes,
                    "refused": share.refused,
                })
            })
            .collect();
        pods.sort_by(|a, b| a["pod"].as_str().cmp(&b["pod"].as_str()));
        let tunnels = self.proxy.tunnel_peers();
        let peers = tunnels.open.iter();
        let peers = peers.map(|(peer, open)| json!({"peer": peer, "open": open}));
        let peers: Vec<_> = peers.collect();
        json!({
            "memory_bytes": self.capacity.memory,
            "memory_bound_by": self.capacity.bound,
            "descriptors": self.capacity.files,
            "node_connections": format!(
                "{} of {}", limits.connections, limits.caps.node_connections
            ),
            "node_buffered_bytes": format!(
                "{} of {}", limits.buffered_bytes, limits.caps.node_buffers
            ),
            "tunnels_refused": tunnels.refused,
            "tunnels": peers,
            "caps": limits.caps,
            "pods": pods,
        })
    }

    fn certificates(&self) -> Value {
        let certificates = self.identities.status().into_iter().map(|certificate| {
            json!({
                "identity": certificate.identity,
                "state": certificate.state,
                "serial": certificate.serial,
                "not_before": certificate.not_before.map(timestamp),
                "not_after": certificate.not_after.map(timestamp),
                "renew_at": certificate.renew_at.map(timestamp),
                "renewals": certificate.renewals,
                "last_error": certificate.last_error,
            })
        });
        certificates.collect()
    }

    fn policies(&self, question: &Question) -> Result<Value, String> {
        let mesh = self.mesh.load();
        if question.from.is_some() || question.to.is_some() {
            return explain::explain(&mesh, question).map(|checks| json!(checks));
        }
        let pods = match &question.pod {
            Some(name) => vec![explain::local_pod(&mesh, name)?],
            None => {
                let local = mesh.local.iter();
                let mut pods: Vec<_> = local.filter(|pod| pod.meshed).collect();
                pods.sort_by(|a, b| a.key.cmp(&b.key));
                pods
            }
        };
        let rows = pods.into_iter().flat_map(|pod| {
            let mut rows = Vec::new();
            if question.direction != Some(Direction::Egress) {
                let ports = pod.policy.iter().flat_map(|policy| policy.describe());
                rows.extend(ports.map(|words| {
                    json!({
                        "pod": pod.key.to_string(),
                        "port": words.port.map_or_else(|| json!("others"), |port| json!(port)),
                        "policy": words.server.map(|server| format!("Server {server}")),
                        "allowed": words.allowed,
                        "otherwise": words.otherwise,
                    })
                }));
            }
            let network = explain::policies_of(pod, question.direction);
            rows.extend(network.into_iter().map(|words| {
                json!({
                    "pod": words.pod,
                    "port": words.direction,
                    "policy": format!("NetworkPolicy {}", words.policy),
                    "allowed": words.rules,
                    "otherwise": "nobody, unless another NetworkPolicy allows it",
                })
            }));
            rows
        });
        Ok(rows.collect())
    }

    fn families(&self) -> Vec<Family> {
        let pods = self.all_pods();
        let mut families = vec![
            pod_states(&pods),
            repairs(&pods, self.datapath.shared_repairs()),
            kernel_counters(
                &pods,
                "picomesh_kernel_refusals_total",
                "Packets that the kernel half dropped, by pod and reason.",
                "reason",
                Counter::is_refusal,
            ),
            kernel_counters(
                &pods,
                "picomesh_kernel_events_total",
                "Connections that the kernel half took or let pass, by pod and event.",
                "event",
                |counter| !counter.is_refusal(),
            ),
            Family::single(
                "picomesh_access_log_dropped_total",
                "Lines of the access log that did not fit its queue.",
                Kind::Counter,
                self.access_log.dropped() as f64,
            ),
            Family::single(
                "picomesh_manifest_errors",
                "Errors in manifests; the last good state is in force for those objects.",
                Kind::Gauge,
                self.errors.count() as f64,
            ),
        ];
        families.push(self.problems());
        families.push(self.caps());
        families.extend(self.certificate_families());
        families
    }

    fn problems(&self) -> Family {
        let mut kinds: BTreeMap<&'static str, u64> = BTreeMap::new();
        for problem in &self.mesh.load().problems {
            *kinds.entry(problem.kind).or_default() += 1;
        }
        Family {
            name: "picomesh_problems",
            help: "Objects that do not fit together, by kind; `debug state` names them.",
            kind: Kind::Gauge,
            samples: counted(kinds, "kind"),
        }
    }

    fn caps(&self) -> Family {
        let caps = self.proxy.limits().caps;
        let samples = [
            ("pod_connections", caps.pod_connections),
            ("pod_inbound_connections", caps.pod_inbound_connections),
            ("pod_connection_rate", caps.pod_rate as usize),
            ("pod_pending", caps.pod_pending),
            ("pod_waiting", caps.pod_waiting),
            ("pod_buffers", caps.pod_buffers),
            ("node_connections", caps.node_connections),
            ("node_buffers", caps.node_buffers),
            ("peer_tunnels", caps.peer_tunnels),
        ];
        let samples = samples.into_iter().map(|(cap, value)| Sample {
            labels: vec![("cap", cap.into())],
            value: value as f64,
        });
        Family {
            name: "picomesh_caps",
            help: "What one pod may take, and all pods of the node together.",
            kind: Kind::Gauge,
            samples: samples.collect(),
        }
    }

    fn certificate_families(&self) -> Vec<Family> {
        let all = self.identities.status();
        let family = |name, help, kind, value: &dyn Fn(usize) -> Option<f64>| Family {
            name,
            help,
            kind,
            samples: all
                .iter()
                .enumerate()
                .filter_map(|(n, certificate)| {
                    Some(Sample {
                        labels: vec![("identity", certificate.identity.clone())],
                        value: value(n)?,
                    })
                })
                .collect(),
        };
        vec![
            family(
                "identity_cert_expiration_timestamp_seconds",
                "When an identity's certificate ends, seconds since the epoch.",
                Kind::Gauge,
                &|n| all[n].not_after.and_then(epoch),
            ),
            family(
                "identity_cert_refresh_timestamp_seconds",
                "When an identity's certificate was signed, seconds since the epoch.",
                Kind::Gauge,
                &|n| all[n].not_before.map(|at| at + SKEW).and_then(epoch),
            ),
            family(
                "identity_cert_refreshes_total",
                "Certificates obtained for an identity, the first one included.",
                Kind::Counter,
                &|n| Some(all[n].renewals as f64 + f64::from(u8::from(all[n].not_after.is_some()))),
            ),
        ]
    }
}

/// Always with the three states that alerts compare, also when they are empty.
fn pod_states(pods: &[PodStatus]) -> Family {
    let mut states: BTreeMap<(&'static str, &'static str), u64> =
        BTreeMap::from([(("captured", ""), 0), (("pending", ""), 0)]);
    for pod in pods {
        let reason = pod.reason.as_ref().map_or("", |(word, _)| *word);
        *states.entry((pod.state, reason)).or_default() += 1;
    }
    let samples = states.into_iter().map(|((state, reason), count)| Sample {
        labels: vec![("state", state.into()), ("reason", reason.into())],
        value: count as f64,
    });
    Family {
        name: "picomesh_pods",
        help: "Meshed pods of this node, by state and the reason of a failure.",
        kind: Kind::Gauge,
        samples: samples.collect(),
    }
}

/// Pods alone that needed any; what pods share stands without a pod.
fn repairs(pods: &[PodStatus], shared: u64) -> Family {
    let sample = |namespace: &str, pod: &str, count: u64| Sample {
        labels: vec![("namespace", namespace.into()), ("pod", pod.into())],
        value: count as f64,
    };
    let mut samples = vec![sample("", "", shared)];
    for pod in pods.iter().filter(|pod| pod.repairs > 0) {
        let (namespace, name) = pod.name.split_once('/').unwrap_or(("", &pod.name));
        samples.push(sample(namespace, name, pod.repairs));
    }
    Family {
        name: "picomesh_repairs_total",
        help: "Times that the kernel's state was not as it should be and was mended, by pod.",
        kind: Kind::Counter,
        samples,
    }
}

fn kernel_counters(
    pods: &[PodStatus],
    name: &'static str,
    help: &'static str,
    label: &'static str,
    shown: impl Fn(Counter) -> bool,
) -> Family {
    let mut samples = Vec::new();
    for pod in pods {
        let (namespace, pod_name) = pod.name.split_once('/').unwrap_or(("", &pod.name));
        for (word, count) in &pod.counters {
            let counter = Counter::ALL.into_iter().find(|c| c.name() == *word);
            if counter.is_some_and(&shown) {
                samples.push(Sample {
                    labels: vec![
                        ("namespace", namespace.into()),
                        ("pod", pod_name.into()),
                        (label, (*word).into()),
                    ],
                    value: *count as f64,
                });
            }
        }
    }
    Family {
        name,
        help,
        kind: Kind::Counter,
        samples,
    }
}

fn counted(counts: BTreeMap<&'static str, u64>, label: &'static str) -> Vec<Sample> {
    let samples = counts.into_iter().map(|(word, count)| Sample {
        labels: vec![(label, word.into())],
        value: count as f64,
    });
    samples.collect()
}

fn epoch(at: SystemTime) -> Option<f64> {
    let since = at.duration_since(SystemTime::UNIX_EPOCH).ok()?;
    Some(since.as_secs_f64())
}

pub(super) fn timestamp(at: SystemTime) -> String {
    OffsetDateTime::from(at)
        .replace_nanosecond(0)
        .ok()
        .and_then(|at| at.format(&Rfc3339).ok())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(name: &str, state: &'static str, reason: Option<&'static str>) -> PodStatus {
        PodStatus {
            uid: name.into(),
            name: name.into(),
            slot: None,
            state,
            reason: reason.map(|word| (word, "why".into())),
            repairs: 0,
            mended: Vec::new(),
            counters: vec![("captured_outbound", 7), ("fragment", 2)],
        }
    }

    fn value(family: &Family, labels: &[(&'static str, &str)]) -> f64 {
        let matches = |sample: &&Sample| {
            labels
                .iter()
                .all(|(name, value)| sample.labels.iter().any(|(n, v)| n == name && v == value))
        };
        let found: Vec<_> = family.samples.iter().filter(matches).collect();
        assert_eq!(found.len(), 1, "{labels:?} in {family:?}");
        found[0].value
    }

    #[test]
    fn pods_are_counted_by_state_and_reason_and_none_is_a_number_too() {
        let pods = [
            pod("shop/a", "captured", None),
            pod("shop/b", "captured", None),
            pod("shop/c", "failed", Some("netns")),
        ];
        let family = pod_states(&pods);
        assert_eq!(value(&family, &[("state", "captured")]), 2.0);
        let failed = [("state", "failed"), ("reason", "netns")];
        assert_eq!(value(&family, &failed), 1.0);
        assert_eq!(value(&pod_states(&[]), &[("state", "captured")]), 0.0);
    }

    #[test]
    fn a_refusal_of_the_kernel_names_pod_and_reason_and_a_capture_is_none() {
        let pods = [pod("shop/a", "captured", None)];
        let refusals = kernel_counters(&pods, "x", "x", "reason", Counter::is_refusal);
        let labels = [("namespace", "shop"), ("pod", "a"), ("reason", "fragment")];
        assert_eq!(value(&refusals, &labels), 2.0);
        assert_eq!(refusals.samples.len(), 1);
    }

    #[test]
    fn times_are_written_as_people_write_them() {
        let at = SystemTime::UNIX_EPOCH + std::time::Duration::from_millis(1_700_000_000_999);
        assert_eq!(timestamp(at), "2023-11-14T22:13:20Z");
        assert_eq!(epoch(at).unwrap(), 1_700_000_000.999);
    }
}

//! What an agent does on a cluster besides serving: it says what it found on its node (`MeshNode`),
//! says so where people look (Events), and knows whether the mesh is being taken off.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{interval, sleep},
};

use super::{source::Errors, views::Shown};
use crate::{
    cni::install::Installed,
    control::{ClusterSigner, roots},
    datapath::PodStatus,
    identity::Bundle,
    k8s::{
        client::Client,
        crd::{CertificateCounts, Condition, FailedPod, MeshNodeStatus, PodCounts},
        events::{About, Events, Warning},
        removal::Leaving,
        status, watch as watches,
    },
    state::{Mesh, Problem, Workload},
};

/// Failures that a status names; it must stay small.
const NAMED: usize = 50;
/// A pod that is only just being enrolled is no failure.
const PERSISTS: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_secs(5);

/// The cluster's signer, and who follows the trust anchors. `known`: those of the agent before.
pub(super) fn signer(
    client: Client,
    namespace: String,
    life: Duration,
    known: Option<Bundle>,
) -> (Arc<ClusterSigner>, impl Future<Output = ()> + Send) {
    let known = known.unwrap_or(Bundle {
        anchors: Vec::new(),
    });
    let (told, bundle) = watch::channel(Arc::new(known));
    let signer = ClusterSigner::new(client.clone(), life, bundle);
    (signer, roots::follow(client, namespace, told))
}

/// Begins to tell, while `writes` says that it is ours to tell.
pub(super) fn begin(
    client: Client,
    shown: &Arc<Shown>,
    plugin: watch::Receiver<Installed>,
    writes: &Arc<AtomicBool>,
    tasks: &mut Vec<JoinHandle<()>>,
) {
    let node = shown.settings.node.clone();
    let (events, writing) = Events::start(client.clone(), node.clone());
    tasks.push(tokio::spawn(writing));
    let reporting = report(Arc::clone(shown), events, Arc::clone(writes));
    tasks.push(tokio::spawn(reporting));
    let of_node = Arc::clone(shown);
    let now = move || node_status(&of_node, &plugin.borrow());
    let keeping = status::keep(client, node, Arc::clone(writes), now);
    tasks.push(tokio::spawn(keeping));
}

fn node_status(shown: &Shown, plugin: &Installed) -> MeshNodeStatus {
    let mesh = shown.mesh.load();
    let pods = shown.all_pods();
    let mut failed: Vec<_> = failures(&pods).chain(refused(&mesh)).collect();
    failed.sort_by(|a, b| a.pod.cmp(&b.pod).then_with(|| a.uid.cmp(&b.uid)));
    let captured = pods.iter().filter(|pod| pod.state == "captured").count();
    let meshed = mesh.local.iter().filter(|workload| workload.meshed).count();
    let number = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);

    let certificates = shown.identities.status();
    let (held, pending): (Vec<_>, Vec<_>) = certificates
        .iter()
        .partition(|certificate| certificate.state == "ready");
    let earliest = held.iter().filter_map(|held| held.not_after).min();

    let awaited = shown.readiness.pending();
    let uncaptured = meshed.saturating_sub(captured);
    let conditions = vec![
        condition("Ready", awaited.is_empty(), "Serving", "Starting", || {
            format!("waiting for {}", awaited.join(", "))
        }),
        condition(
            "PodsCaptured",
            uncaptured == 0,
            "AllCaptured",
            "NotCaptured",
            || format!("{uncaptured} pods of the mesh are not captured; see status.failed"),
        ),
        condition(
            "CertificatesHeld",
            pending.is_empty(),
            "AllHeld",
            "Waiting",
            || {
                let last = pending.iter().find_map(|one| one.last_error.clone());
                let waiting = pending.len();
                let last = last.map_or(String::new(), |error| format!(": {error}"));
                format!("{waiting} certificates are missing or over{last}")
            },
        ),
        probes(shown),
        chained(plugin),
    ];
    MeshNodeStatus {
        version: env!("CARGO_PKG_VERSION").into(),
        kernel: kernel(),
        features: vec!["capture".into(), "hbone".into()],
        acceleration: "off".into(),
        pods: PodCounts {
            meshed: number(meshed),
            captured: number(captured),
            failed: number(failed.len()),
        },
        failed: failed.into_iter().take(NAMED).collect(),
        certificates: CertificateCounts {
            held: number(held.len()),
            pending: number(pending.len()),
            earliest_expiry: earliest.map(super::views::timestamp),
        },
        conditions,
    }
}

fn condition(
    type_: &str,
    good: bool,
    well: &str,
    ill: &str,
    why: impl FnOnce() -> String,
) -> Condition {
    Condition {
        type_: type_.into(),
        status: if good { "True" } else { "False" }.into(),
        reason: if good { well } else { ill }.into(),
        message: if good { String::new() } else { why() },
        last_transition_time: String::new(),
    }
}

/// Are probes of the host told apart from strangers?
fn probes(shown: &Shown) -> Condition {
    let problem = shown.datapath.host_problem();
    let sentence = problem.map(|(_, sentence)| sentence);
    condition(
        "ProbesRecognised",
        sentence.is_none(),
        "Recognised",
        "NotRecognised",
        || sentence.clone().unwrap_or_default(),
    )
}

/// Does the CNI plugin hold new pods until they are captured?
fn chained(plugin: &Installed) -> Condition {
    let (good, why) = match plugin {
        Installed::At { .. } => (true, String::new()),
        Installed::No => (
            false,
            "it is not in the node's network configuration".to_owned(),
        ),
        Installed::NoNetwork => (
            false,
            "the node has no network configuration yet; see --cni-conf-dir".to_owned(),
        ),
        Installed::Failed(error) => (false, error.clone()),
    };
    condition("PluginInstalled", good, "Installed", "NotInstalled", || why)
}

fn kernel() -> String {
    nix::sys::utsname::uname()
        .map(|name| name.release().to_string_lossy().into_owned())
        .unwrap_or_default()
}

fn failures(pods: &[PodStatus]) -> impl Iterator<Item = FailedPod> + '_ {
    pods.iter().filter_map(|pod| {
        let (reason, message) = pod.reason.as_ref().filter(|_| pod.state == "failed")?;
        Some(FailedPod {
            uid: pod.uid.clone(),
            pod: pod.name.clone(),
            reason: (*reason).into(),
            message: message.clone(),
        })
    })
}

/// Pods that a policy of the CNI's keeps outside.
fn refused(mesh: &Mesh) -> impl Iterator<Item = FailedPod> + '_ {
    mesh.local.iter().filter_map(|workload| {
        Some(FailedPod {
            uid: workload.uid.to_string(),
            pod: workload.key.to_string(),
            reason: "foreign_policy".into(),
            message: workload.refused.as_ref()?.to_string(),
        })
    })
}

/// Events on what a person should look at.
async fn report(shown: Arc<Shown>, events: Events, writes: Arc<AtomicBool>) {
    let mut since = Since::default();
    let mut ticks = interval(LOOK);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        if !writes.load(Ordering::Acquire) {
            continue;
        }
        let now = Instant::now();
        let failed: Vec<_> = {
            let mesh = shown.mesh.load();
            failures(&shown.all_pods()).chain(refused(&mesh)).collect()
        };
        for failed in since.persisting(failed, now) {
            events.warn(about_pod(failed));
        }
        let mesh = shown.mesh.load();
        for warning in mesh
            .problems
            .iter()
            .filter_map(|it| about_problem(it, &mesh.local))
        {
            events.warn(warning);
        }
        if let Errors::Cluster(faults) = &shown.errors {
            for fault in faults.borrow().iter() {
                events.warn(about_object(fault));
            }
        }
    }
}

/// Since when each pod has failed, and why.
#[derive(Default)]
struct Since(HashMap<(String, String), Instant>);

impl Since {
    fn persisting(&mut self, failed: Vec<FailedPod>, now: Instant) -> Vec<FailedPod> {
        let key = |failed: &FailedPod| (failed.uid.clone(), failed.reason.clone());
        let current: HashSet<_> = failed.iter().map(key).collect();
        self.0.retain(|known, _| current.contains(known));
        failed
            .into_iter()
            .filter(|failed| now - *self.0.entry(key(failed)).or_insert(now) >= PERSISTS)
            .collect()
    }
}

fn about_pod(failed: FailedPod) -> Warning {
    let (namespace, name) = failed.pod.split_once('/').unwrap_or(("", &failed.pod));
    Warning {
        about: About {
            api_version: "v1".into(),
            kind: "Pod".into(),
            namespace: namespace.into(),
            name: name.into(),
            uid: failed.uid,
        },
        reason: "NotInMesh".into(),
        message: format!("{}: {}", failed.reason, failed.message),
    }
}

/// Where a person looks who has written a word that does not read, or two that do not fit.
fn about_problem(problem: &Problem, local: &[Arc<Workload>]) -> Option<Warning> {
    let key = &problem.object;
    let api_version = match problem.kind {
        "Namespace" | "Node" | "Pod" | "Service" => "v1",
        "EndpointSlice" => "discovery.k8s.io/v1",
        "NetworkPolicy" => "networking.k8s.io/v1",
        "Server" => "policy.linkerd.io/v1beta3",
        "ServerAuthorization" => "policy.linkerd.io/v1beta1",
        "AuthorizationPolicy" | "MeshTLSAuthentication" | "NetworkAuthentication" => {
            "policy.linkerd.io/v1alpha1"
        }
        _ => return None,
    };
    // By its identifier `kubectl describe` finds what is said of a pod; its own node's agent knows it.
    let pod = local.iter().find(|pod| pod.key == *key);
    let pod = pod.filter(|_| problem.kind == "Pod");
    Some(Warning {
        about: About {
            api_version: api_version.into(),
            kind: problem.kind.into(),
            namespace: key.namespace.to_string(),
            name: key.name.to_string(),
            uid: pod.map(|pod| pod.uid.to_string()).unwrap_or_default(),
        },
        reason: "Misconfigured".into(),
        message: problem.message.clone(),
    })
}

fn about_object(fault: &watches::Fault) -> Warning {
    Warning {
        about: About {
            api_version: fault.api_version.clone(),
            kind: fault.kind.into(),
            namespace: fault.namespace.clone(),
            name: fault.name.clone(),
            uid: fault.uid.clone(),
        },
        reason: "NotUnderstood".into(),
        message: format!("{}; what was good before stays in force", fault.message),
    }
}

/// Returns once the mesh is being taken off, if that shows within `patience`.
pub(super) async fn removal_shows(
    mut leaving: watch::Receiver<Leaving>,
    patience: Duration,
) -> bool {
    tokio::select! {
        shown = leaving.wait_for(|now| *now == Leaving::Yes) => shown.is_ok(),
        () = sleep(patience) => false,
    }
}

/// Returns when a removal that began before this call would have shown: after `least` if the API
/// server is heard, otherwise when it is heard again, and at the latest after `most`.
pub(super) async fn removal_would_show(
    mut leaving: watch::Receiver<Leaving>,
    least: Duration,
    most: Duration,
) {
    let heard = async {
        sleep(least).await;
        if leaving
            .wait_for(|now| *now != Leaving::Unheard)
            .await
            .is_err()
        {
            // Nobody listens to it any more.
            std::future::pending::<()>().await;
        }
    };
    tokio::select! {
        () = heard => {}
        () = sleep(most) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::ObjectKey;

    #[test]
    fn a_failure_is_told_when_it_persists_and_not_while_it_changes() {
        let (mut since, start) = (Since::default(), Instant::now());
        let failed = |reason: &str| {
            vec![FailedPod {
                uid: "u".into(),
                reason: reason.into(),
                ..FailedPod::default()
            }]
        };
        assert!(since.persisting(failed("no_netns"), start).is_empty());
        let later = start + PERSISTS;
        assert!(since.persisting(failed("netns_missing"), later).is_empty());
        assert_eq!(
            since
                .persisting(failed("netns_missing"), later + PERSISTS)
                .len(),
            1
        );
        // Well again, and then not: that is a new failure.
        assert!(since.persisting(Vec::new(), later + PERSISTS).is_empty());
        assert!(
            since
                .persisting(failed("netns_missing"), later + PERSISTS)
                .is_empty()
        );
    }

    #[test]
    fn a_problem_is_told_on_its_object() {
        let told = |kind: &'static str, namespace: &str| {
            let problem = Problem {
                kind,
                object: ObjectKey {
                    cluster: "".into(),
                    namespace: namespace.into(),
                    name: "it".into(),
                },
                message: "field, value and remedy".into(),
            };
            about_problem(&problem, &[])
        };
        let warning = told("Namespace", "").unwrap();
        let About {
            api_version,
            namespace,
            name,
            ..
        } = &warning.about;
        assert_eq!(
            [api_version.as_str(), namespace, name, &warning.message],
            ["v1", "", "it", "field, value and remedy"]
        );
        assert!(told("Pod", "shop").is_some_and(|it| it.about.uid.is_empty()));
        assert!(told("Something", "shop").is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_removal_counts_if_it_shows_in_time() {
        let (told, leaving) = watch::channel(Leaving::Unheard);
        let patience = Duration::from_secs(5);
        assert!(!removal_shows(leaving.clone(), patience).await);
        told.send_replace(Leaving::Yes);
        assert!(removal_shows(leaving.clone(), patience).await);
        told.send_replace(Leaving::No);
        // The watch has ended without having seen anything.
        drop(told);
        assert!(!removal_shows(leaving, patience).await);
    }

    #[tokio::test(start_paused = true)]
    async fn while_the_api_server_is_not_heard_a_removal_is_waited_for() {
        let (told, leaving) = watch::channel(Leaving::No);
        let (least, most) = (Duration::from_secs(1), Duration::from_secs(5));
        let took = async || {
            let begun = tokio::time::Instant::now();
            removal_would_show(leaving.clone(), least, most).await;
            begun.elapsed()
        };
        assert_eq!(took().await, least);
        told.send_replace(Leaving::Unheard);
        assert_eq!(took().await, most);
        let later = async {
            sleep(Duration::from_secs(3)).await;
            told.send_replace(Leaving::No);
        };
        let (waited, ()) = tokio::join!(took(), later);
        assert_eq!(waited, Duration::from_secs(3));
        drop(told);
        assert_eq!(took().await, least, "it was heard to its end");
    }
}

//! From what we know to what must be: which pods the kernel should capture, which identities must
//! be held, which pods' metrics may stay. Pure; time is an argument.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::{Duration, Instant},
};

use picomesh_common::{PodConfig, PortRange, pod::MAX_SKIP_RANGES};

use crate::{
    datapath::{Desired, DesiredPod, Others, PodStatus, Wishes},
    identity::Wanted,
    local::Netns,
    state::{Identity, Mesh, PodUid, Workload},
};

/// How long an identity is held after its last pod left: a tunnel that others opened for it is
/// served for a minute (they may not have heard), and a short absence costs no new certificate.
const LINGER: Duration = Duration::from_secs(90);

/// Who tells of pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// Manifests, and where each pod lives. What is not in there is meant not to be.
    ByManifests,
    /// An API server, of what it remembers; where a pod lives is found on the node. An object may go
    /// while its containers run on (`kubectl delete --force`, a Node that was deleted).
    ByCluster,
}

/// The pods to capture, and those that cannot be: nobody knows where they live.
pub struct Pods {
    pub desired: Desired,
    pub lost: Vec<PodStatus>,
}

pub fn pods(mesh: &Mesh, netns: &Netns, told: Told) -> Pods {
    let mut pods = Vec::new();
    let mut lost = Vec::new();
    for workload in local_meshed(mesh) {
        let name = workload.key.to_string();
        match netns.get(&workload.uid) {
            Some(path) => pods.push(DesiredPod {
                uid: workload.uid.clone(),
                name,
                ips: workload.ips.clone(),
                config: config(workload),
                netns: path.clone(),
            }),
            None => lost.push(missing(workload, name, told)),
        }
    }
    // The order of the map is nobody's; a stable one keeps slots and logs readable.
    pods.sort_by(|a, b| a.name.cmp(&b.name).then_with(|| a.uid.cmp(&b.uid)));
    lost.sort_by(|a, b| a.name.cmp(&b.name));
    let others = match told {
        Told::ByManifests => Others::Leave,
        Told::ByCluster => Others::Stay { but: outside(mesh) },
    };
    Pods {
        desired: Arc::new(Wishes { pods, others }),
        lost,
    }
}

/// A pod that should be captured and whose network namespace nobody knows.
fn missing(workload: &Workload, name: String, told: Told) -> PodStatus {
    let why = match told {
        Told::ByManifests => {
            Some("its network namespace is not known: set annotation picomesh.io/netns")
        }
        // Its kubelet has not made a sandbox yet; nothing is wrong with it.
        Told::ByCluster if workload.ips.is_empty() => None,
        Told::ByCluster => {
            Some("its network namespace is not found on this node; it is looked for")
        }
    };
    PodStatus {
        uid: workload.uid.to_string(),
        name,
        slot: None,
        state: if why.is_some() { "failed" } else { "pending" },
        reason: why.map(|why| ("no_netns", why.into())),
        repairs: 0,
        mended: Vec::new(),
        counters: Vec::new(),
    }
}

/// Pods of this node that are there and outside of the mesh.
fn outside(mesh: &Mesh) -> HashSet<PodUid> {
    let local = mesh.local.iter();
    let outside = local.filter(|workload| !workload.meshed && !workload.undecided);
    outside.map(|workload| workload.uid.clone()).collect()
}

/// Pods of this node, meshed or not: series of others may go.
pub fn live(mesh: &Mesh) -> HashSet<PodUid> {
    let local = mesh.local.iter();
    local.map(|workload| workload.uid.clone()).collect()
}

/// Remembers when each identity was last needed. Only one that is `held` outlives its last pod:
/// nobody has a tunnel for another, and asking for it would be refused for as long as it is wanted.
#[derive(Debug, Default)]
pub struct Identities {
    last: HashMap<Identity, Instant>,
}

impl Identities {
    pub fn wanted(
        &mut self,
        mesh: &Mesh,
        now: Instant,
        held: impl Fn(&Identity) -> bool,
    ) -> Wanted {
        for workload in local_meshed(mesh) {
            self.last.insert(workload.identity.clone(), now);
        }
        self.last.retain(|identity, last| {
            let ago = now.saturating_duration_since(*last);
            ago.is_zero() || (ago < LINGER && held(identity))
        });
        self.last.keys().cloned().collect()
    }
}

fn local_meshed(mesh: &Mesh) -> impl Iterator<Item = &Arc<Workload>> {
    let local = mesh.local.iter();
    local.filter(|workload| workload.meshed && !workload.host_network)
}

fn config(workload: &Workload) -> PodConfig {
    PodConfig {
        skip_outbound: ranges(&workload.skip_outbound),
        skip_inbound: ranges(&workload.skip_inbound),
        ..PodConfig::EMPTY
    }
}

/// More than fit were refused when the annotation was read.
fn ranges(list: &[PortRange]) -> [PortRange; MAX_SKIP_RANGES] {
    let mut ranges = [PortRange::UNUSED; MAX_SKIP_RANGES];
    for (place, range) in ranges.iter_mut().zip(list) {
        *place = *range;
    }
    ranges
}

#[cfg(test)]
mod tests {
    use crate::state::ObjectKey;
    use crate::state::objects::{
        DefaultPolicy, MeshSettings, Namespace, Objects, OutboundDefault, Pod, Words,
    };
    use crate::testing::manifests;

    use std::path::PathBuf;

    use super::*;

    fn key(namespace: &str, name: &str) -> ObjectKey {
        ObjectKey {
            cluster: Arc::from("main"),
            namespace: Arc::from(namespace),
            name: Arc::from(name),
        }
    }

    fn pod(name: &str, node: &str, account: &str) -> Pod {
        Pod {
            key: key("shop", name),
            uid: Arc::from(format!("uid-{name}")),
            node: Some(Arc::from(node)),
            ips: vec!["10.1.0.1".parse().unwrap()],
            host_network: false,
            service_account: Arc::from(account),
            mirror_of: None,
            labels: Default::default(),
            words: Words {
                skip_outbound: Some(vec![PortRange {
                    first: 25,
                    last: 25,
                }]),
                ..Words::default()
            },
            ports: Vec::new(),
            ready: true,
            terminal: false,
            terminating: false,
            owner: None,
            foreign_policy: None,
        }
    }

    fn mesh(pods: Vec<Pod>) -> Mesh {
        let mut objects = Objects::default();
        let namespace = Namespace {
            key: key("", "shop"),
            labels: Default::default(),
            words: Words {
                mesh: Some(true),
                ..Words::default()
            },
        };
        let namespace_key = namespace.key.clone();
        objects
            .namespaces
            .insert(namespace_key, Arc::new(namespace));
        for (n, mut pod) in pods.into_iter().enumerate() {
            pod.ips = vec![[10, 1, 0, n as u8 + 1].into()];
            objects.pods.insert(pod.uid.clone(), Arc::new(pod));
        }
        let settings = MeshSettings {
            cluster: Arc::from("main"),
            cluster_domain: Arc::from("cluster.local"),
            trust_domain: Arc::from("cluster.local"),
            namespace: Arc::from("picomesh-system"),
            node: Arc::from("n1"),
            default_inbound_policy: DefaultPolicy::default(),
            outbound_default: OutboundDefault::default(),
            cluster_networks: Vec::new(),
            tunnel_port: 15008,
            metrics_port: 4191,
        };
        Mesh::build(Arc::new(settings), 1, &objects)
    }

    fn names(wanted: &Wanted) -> Vec<String> {
        wanted
            .iter()
            .map(|identity| identity.service_account.to_string())
            .collect()
    }

    #[test]
    fn only_meshed_pods_of_this_node_are_captured_with_their_ports_skipped() {
        let mut host = pod("host", "n1", "a");
        host.host_network = true;
        let mut out = pod("out", "n1", "a");
        out.words.mesh = Some(false);
        let mesh = mesh(vec![
            pod("b", "n1", "a"),
            pod("a", "n1", "a"),
            pod("elsewhere", "n2", "a"),
            host,
            out,
        ]);
        let netns = mesh
            .workloads
            .keys()
            .map(|uid| (uid.clone(), PathBuf::from(format!("/ns/{uid}"))))
            .collect();
        let pods = pods(&mesh, &netns, Told::ByManifests);
        let names: Vec<_> = pods.desired.pods.iter().map(|pod| &*pod.name).collect();
        assert_eq!(names, ["shop/a", "shop/b"]);
        assert!(pods.lost.is_empty());
        let first = &pods.desired.pods[0];
        assert_eq!(first.netns, PathBuf::from("/ns/uid-a"));
        assert!(first.config.skip_outbound[0].contains(25));
        assert_eq!(first.config.skip_outbound[1], PortRange::UNUSED);
        assert_eq!(first.config.skip_inbound[0], PortRange::UNUSED);
    }

    #[test]
    fn a_pod_whose_place_is_unknown_is_reported_as_failed() {
        let mesh = mesh(vec![pod("a", "n1", "a")]);
        for told in [Told::ByManifests, Told::ByCluster] {
            let pods = pods(&mesh, &Netns::new(), told);
            assert!(pods.desired.pods.is_empty());
            assert_eq!(pods.lost[0].state, "failed");
            assert_eq!(pods.lost[0].reason.as_ref().unwrap().0, "no_netns");
        }
    }

    #[test]
    fn a_pod_without_sandbox_and_address_is_no_failure_on_a_cluster() {
        let pod = manifests::pod("shop/a", "n1", &[], "");
        let mesh = manifests::mesh(&(manifests::meshed_namespace("shop", "") + &pod));
        let of = |told| pods(&mesh, &Netns::new(), told).lost[0].clone();
        let early = of(Told::ByCluster);
        assert_eq!((early.state, early.reason), ("pending", None));
        assert_eq!(of(Told::ByManifests).state, "failed");
    }

    #[test]
    fn on_a_cluster_only_who_is_there_and_outside_is_let_go() {
        let mut out = pod("out", "n1", "a");
        out.words.mesh = Some(false);
        let mut undecided = pod("undecided", "n1", "a");
        undecided.key = key("unheard-of", "undecided");
        let mesh = mesh(vec![pod("in", "n1", "a"), out, undecided]);
        let others = |told| pods(&mesh, &Netns::new(), told).desired.others.clone();
        let by_cluster = others(Told::ByCluster);
        for (uid, leaves) in [
            ("uid-out", true),
            ("uid-in", false),
            ("uid-undecided", false),
            ("uid-deleted", false),
        ] {
            let by = |others: Others| others.leaves(&PodUid::from(uid));
            assert_eq!(by(by_cluster.clone()), leaves, "{uid}");
            assert!(by(others(Told::ByManifests)), "{uid}");
        }
    }

    #[test]
    fn an_identity_outlives_its_last_pod_for_a_while() {
        let with = mesh(vec![pod("a", "n1", "cart"), pod("b", "n2", "db")]);
        let without = mesh(Vec::new());
        let mut identities = Identities::default();
        let start = Instant::now();
        let mut wanted = |mesh, now| names(&identities.wanted(mesh, now, |_| true));
        assert_eq!(wanted(&with, start), ["cart"]);
        let soon = start + LINGER - Duration::from_secs(1);
        assert_eq!(wanted(&without, soon), ["cart"]);
        let late = start + LINGER;
        assert!(wanted(&without, late).is_empty());
    }

    #[test]
    fn an_identity_that_was_never_had_goes_with_its_last_pod() {
        let with = mesh(vec![pod("a", "n1", "cart")]);
        let mut identities = Identities::default();
        let start = Instant::now();
        let mut wanted = |mesh, now| names(&identities.wanted(mesh, now, |_| false));
        assert_eq!(wanted(&with, start), ["cart"]);
        let soon = start + Duration::from_millis(1);
        assert!(wanted(&mesh(Vec::new()), soon).is_empty());
    }

    #[test]
    fn live_pods_are_those_of_the_node_meshed_or_not() {
        let mut out = pod("out", "n1", "a");
        out.words.mesh = Some(false);
        let mesh = mesh(vec![out, pod("b", "n2", "a")]);
        assert_eq!(live(&mesh), HashSet::from([Arc::from("uid-out")]));
    }
}

mod large;

use serde_json::{Value, json};
use tokio::{sync::oneshot, time::sleep};

use super::*;
use crate::{
    state::{PodUid, Workload},
    testing::{api::Api, manifests},
};

const NODES: &str = "/api/v1/nodes";
const NAMESPACES: &str = "/api/v1/namespaces";
const PODS: &str = "/api/v1/pods";
const SERVICES: &str = "/api/v1/services";
const SLICES: &str = "/apis/discovery.k8s.io/v1/endpointslices";
const SERVERS: &str = "/apis/policy.linkerd.io/v1beta3/servers";
const CILIUM: &str = "/apis/cilium.io/v2/ciliumnetworkpolicies";

/// An agent's watches on an API server of our own.
struct World {
    api: Api,
    store: Arc<MeshStore>,
    faults: watch::Receiver<Arc<Vec<Fault>>>,
    objects: watch::Receiver<Arc<Objects>>,
    loaded: oneshot::Receiver<()>,
    _watching: tokio::task::JoinHandle<()>,
}

impl World {
    fn start(api: &Api, before: Option<Objects>) -> Self {
        let settings = Arc::new(manifests::settings());
        let empty = Mesh::build(settings.clone(), 0, &Objects::default());
        let store = Arc::new(MeshStore::new(empty));
        let (faults_told, faults) = watch::channel(Arc::default());
        let (objects_told, objects) = watch::channel(Arc::default());
        let outputs = Outputs {
            faults: faults_told,
            objects: objects_told,
        };
        let (load, loaded) = oneshot::channel();
        let watching = run(
            api.client(),
            before,
            settings,
            store.clone(),
            outputs,
            move || {
                let _heard = load.send(());
            },
            std::future::pending(),
        );
        Self {
            api: api.clone(),
            store,
            faults,
            objects,
            loaded,
            _watching: tokio::spawn(watching),
        }
    }

    async fn ready(&mut self) {
        let loaded = tokio::time::timeout(Duration::from_secs(60), &mut self.loaded);
        loaded.await.expect("no mesh within a minute").unwrap();
    }

    /// Until the mesh is so, or a minute of the test's time has passed.
    async fn until(&self, what: &str, so: impl Fn(&Mesh) -> bool) {
        let begun = Instant::now();
        while !so(&self.store.load()) {
            assert!(begun.elapsed() < Duration::from_secs(60), "never: {what}");
            sleep(Duration::from_millis(10)).await;
        }
    }

    /// Until something is wrong with an object, or nothing.
    async fn faulty(&mut self, some: bool) -> Arc<Vec<Fault>> {
        let so = self.faults.wait_for(|faults| faults.is_empty() != some);
        let told = tokio::time::timeout(Duration::from_secs(60), so);
        let told = told.await.expect("faults do not become so within a minute");
        told.unwrap().clone()
    }

    fn pod(&self, uid: &str) -> Option<Arc<Workload>> {
        self.store.load().workloads.get(&PodUid::from(uid)).cloned()
    }
}

fn namespace(name: &str, meshed: bool) -> Value {
    let labels = if meshed {
        json!({"picomesh.io/mesh": "enabled"})
    } else {
        json!({})
    };
    json!({"metadata": {"name": name, "labels": labels, "managedFields": [{"manager": "x"}]}})
}

fn pod(name: &str, node: &str, ip: &str) -> Value {
    json!({
        "metadata": {
            "name": name, "namespace": "shop", "uid": format!("uid-{name}"),
            "labels": {"app": name},
            "annotations": {"picomesh.io/netns": "/proc/1/ns/net"},
        },
        "spec": {"nodeName": node, "serviceAccountName": "default", "containers": [{"name": "c", "ports": [
            {"containerPort": 8080}, {"containerPort": 9090, "name": "metrics"},
        ]}]},
        "status": {"phase": "Running", "podIP": ip,
                   "conditions": [{"type": "Ready", "status": "True"}]},
    })
}

fn slice(ready: [bool; 2]) -> Value {
    let endpoint = |name: &str, ip: &str, ready: bool| {
        json!({"addresses": [ip], "conditions": {"ready": ready, "serving": ready},
               "targetRef": {"kind": "Pod", "name": name, "uid": format!("uid-{name}")}})
    };
    json!({
        "metadata": {"name": "web-1", "namespace": "shop",
                     "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
        "endpoints": [endpoint("a", "10.1.0.1", ready[0]), endpoint("b", "10.2.0.1", ready[1])],
    })
}

/// Two nodes, a meshed namespace, a pod on each node and a Service of both.
fn cluster() -> Api {
    let api = Api::default();
    for (name, ip) in [("n1", "192.168.0.1"), ("n2", "192.168.0.2")] {
        let addresses = json!([{"type": "InternalIP", "address": ip}]);
        api.put(
            NODES,
            json!({"metadata": {"name": name}, "status": {"addresses": addresses}}),
        );
    }
    api.put(NAMESPACES, namespace("shop", true));
    api.put(PODS, pod("a", "n1", "10.1.0.1"));
    api.put(PODS, pod("b", "n2", "10.2.0.1"));
    api.put(
        SERVICES,
        json!({
            "metadata": {"name": "web", "namespace": "shop"},
            "spec": {"clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1"], "selector": {"x": "y"},
                     "ports": [{"name": "http", "port": 80, "targetPort": 8080}]},
        }),
    );
    api.put(SLICES, slice([true, true]));
    api
}

fn server(port: Value) -> Value {
    json!({
        "apiVersion": "policy.linkerd.io/v1beta3", "kind": "Server",
        "metadata": {"name": "web", "namespace": "shop", "uid": "uid-server"},
        "spec": {"podSelector": {}, "port": port},
    })
}

fn ready_endpoints(objects: &Objects) -> Vec<bool> {
    let slices = objects.endpoint_slices.values();
    slices
        .flat_map(|slice| slice.endpoints.iter().map(|endpoint| endpoint.ready))
        .collect()
}

#[tokio::test(start_paused = true)]
async fn every_kind_is_listed_once_and_makes_one_mesh() {
    let api = cluster();
    let mut world = World::start(&api, None);
    world.ready().await;
    let mesh = world.store.load();
    assert_eq!(
        mesh.version, 1,
        "nothing was published before all was known"
    );
    assert_eq!(mesh.workloads.len(), 2);
    assert!(mesh.workloads.values().all(|pod| pod.meshed));
    assert!(
        mesh.frontends
            .contains_key(&"10.96.0.1:80".parse().unwrap())
    );
    sleep(Duration::from_secs(1)).await;
    for path in [NODES, NAMESPACES, PODS, SERVICES, SLICES] {
        let asked = api.requests();
        let asked = asked
            .iter()
            .filter(|asked| **asked == format!("GET {path}"));
        assert_eq!(asked.count(), 2, "{path}: one list and one watch");
    }
}

#[tokio::test(start_paused = true)]
async fn a_pods_author_cannot_name_a_network_namespace() {
    let mut world = World::start(&cluster(), None);
    world.ready().await;
    let mine = world.pod("uid-a").unwrap();
    assert!(mine.local && mine.meshed);
    let all = format!("{:?}", world.objects.borrow());
    assert!(!all.contains("/proc/1/ns/net"), "{all}");
}

#[tokio::test(start_paused = true)]
async fn a_pod_of_another_node_is_kept_for_routing_only() {
    let mut world = World::start(&cluster(), None);
    world.ready().await;
    let ports = |uid| world.pod(uid).unwrap().ports.len();
    assert_eq!(ports("uid-a"), 2);
    assert_eq!(ports("uid-b"), 1, "only the port with a name");

    let mut ended = pod("b", "n2", "10.2.0.1");
    ended["status"]["phase"] = json!("Succeeded");
    world.api.put(PODS, ended);
    world
        .until("an ended pod is gone", |mesh| mesh.workloads.len() == 1)
        .await;
    assert_eq!(world.objects.borrow().pods.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_change_makes_a_mesh_soon_and_a_heartbeat_none() {
    let mut world = World::start(&cluster(), None);
    world.ready().await;
    let before = world.store.load().version;
    let mut beaten = world.api.get(PODS, "shop/a").unwrap();
    beaten["status"]["conditions"][0]["lastProbeTime"] = json!("2026-01-01T00:00:00Z");
    world.api.put(PODS, beaten);
    sleep(Duration::from_secs(5)).await;
    assert_eq!(world.store.load().version, before);

    world.api.put(NAMESPACES, namespace("shop", false));
    let begun = Instant::now();
    world
        .until("the namespace leaves", |mesh| {
            mesh.workloads.values().all(|pod| !pod.meshed)
        })
        .await;
    assert!(begun.elapsed() < Duration::from_secs(1));
}

#[tokio::test(start_paused = true)]
async fn a_pod_of_the_same_name_takes_the_place_of_the_one_before() {
    let mut world = World::start(&cluster(), None);
    world.ready().await;
    let mut again = pod("a", "n1", "10.1.0.9");
    again["metadata"]["uid"] = json!("uid-other");
    // Its deletion was not told: the watch had been cut.
    world.api.put(PODS, again);
    world
        .until("the new one", |mesh| {
            mesh.workloads.contains_key("uid-other")
        })
        .await;
    assert!(world.pod("uid-a").is_none());
}

#[tokio::test(start_paused = true)]
async fn an_object_that_does_not_read_keeps_its_last_good_state_and_is_named() {
    let api = cluster();
    api.define("servers", "policy.linkerd.io", "v1beta3");
    api.put(SERVERS, server(json!(8080)));
    let mut world = World::start(&api, None);
    world.ready().await;
    let good = world.objects.borrow().servers.clone();
    assert_eq!(good.len(), 1);

    api.put(SERVERS, server(json!(0)));
    let fault = world.faulty(true).await[0].clone();
    assert_eq!(
        (fault.kind, &*fault.name, &*fault.uid),
        ("Server", "web", "uid-server")
    );
    assert_eq!(fault.api_version, "policy.linkerd.io/v1beta3");
    assert!(fault.message.contains("spec.port"), "{fault}");
    assert_eq!(world.objects.borrow().servers, good);

    // Not even a list takes it away.
    api.forget(SERVERS);
    sleep(Duration::from_secs(10)).await;
    assert_eq!(world.objects.borrow().servers, good);
    assert_eq!(world.faults.borrow().len(), 1);

    api.put(SERVERS, server(json!(9090)));
    world.faulty(false).await;
    assert_ne!(world.objects.borrow().servers, good);
    api.put(SERVERS, server(json!("no port!")));
    world.faulty(true).await;
    api.delete(SERVERS, "shop/web");
    world.faulty(false).await;
    assert!(world.objects.borrow().servers.is_empty());
}

#[tokio::test(start_paused = true)]
async fn what_was_deleted_while_the_watch_was_forgotten_is_gone_after_the_list() {
    let mut world = World::start(&cluster(), None);
    world.ready().await;
    // Cut first, so that the deletion is told to nobody; then 410 Gone.
    world.api.cut(PODS);
    world.api.delete(PODS, "shop/b");
    world.api.put(PODS, pod("c", "n2", "10.2.0.3"));
    world.api.forget(PODS);
    world
        .until("the list", |mesh| {
            mesh.workloads.contains_key("uid-c") && !mesh.workloads.contains_key("uid-b")
        })
        .await;
    assert!(world.pod("uid-a").is_some());
}

#[tokio::test(start_paused = true)]
async fn a_watch_that_is_refused_begins_from_nothing() {
    let mut world = World::start(&cluster(), None);
    world.ready().await;
    world.api.refuse_old(PODS);
    world.api.delete(PODS, "shop/b");
    world
        .until("the list", |mesh| !mesh.workloads.contains_key("uid-b"))
        .await;
    assert!(world.pod("uid-a").is_some());
}

#[tokio::test(start_paused = true)]
async fn more_objects_than_fit_a_page_are_all_there() {
    let api = cluster();
    for number in 0..350 {
        let ip = format!("10.3.{}.{}", number / 200, number % 200 + 1);
        api.put(PODS, pod(&format!("many-{number}"), "n2", &ip));
    }
    let mut world = World::start(&api, None);
    world.ready().await;
    assert_eq!(world.store.load().workloads.len(), 352);
    // Each may have megabytes.
    assert_eq!(api.largest_page(PODS), Some(16));
}

#[tokio::test(start_paused = true)]
async fn an_object_that_is_too_long_is_a_fault_and_keeps_its_last_state() {
    let mut world = World::start(&cluster(), None);
    world.ready().await;
    let mut long = pod("a", "n1", "10.1.0.1");
    long["metadata"]["annotations"] = json!({"x": "x".repeat(600_000)});
    world.api.put(PODS, long);
    let fault = world.faulty(true).await[0].clone();
    assert_eq!((fault.kind, &*fault.name), ("Pod", "a"));
    assert!(fault.message.contains("at most 524288 are read"), "{fault}");
    assert!(world.pod("uid-a").is_some());
}

#[tokio::test(start_paused = true)]
async fn while_the_api_server_is_away_everything_stays_and_then_it_catches_up() {
    let mut world = World::start(&cluster(), None);
    world.ready().await;
    let version = world.store.load().version;
    world.api.set_away(true);
    world.api.delete(PODS, "shop/b");
    world.api.put(PODS, pod("c", "n2", "10.2.0.3"));
    world.api.forget(PODS);
    sleep(Duration::from_secs(120)).await;
    assert_eq!(world.store.load().version, version);

    world.api.set_away(false);
    let begun = Instant::now();
    world
        .until("what happened meanwhile", |mesh| {
            mesh.workloads.contains_key("uid-c") && !mesh.workloads.contains_key("uid-b")
        })
        .await;
    assert!(
        begun.elapsed() < 2 * follow::LONGEST_PAUSE + LONGEST_WAIT,
        "{:?}",
        begun.elapsed()
    );
}

#[tokio::test(start_paused = true)]
async fn endpoints_stay_ready_for_a_lease_after_the_api_server_was_away() {
    let mut world = World::start(&cluster(), None);
    world.ready().await;
    world.api.set_away(true);
    sleep(Duration::from_secs(60)).await;
    world.api.set_away(false);
    // It has not heard of a single kubelet, and calls every node dead.
    world.api.put(SLICES, slice([false, false]));
    world.api.put(NAMESPACES, namespace("seen", true));
    let seen = |objects: &Arc<Objects>| objects.namespaces.len() == 2;
    world.objects.wait_for(seen).await.unwrap();
    sleep(Duration::from_secs(15)).await;
    assert_eq!(ready_endpoints(&world.objects.borrow()), [true, true]);

    // One that is being deleted is not held, and what it says after a lease counts.
    let mut leaving = pod("b", "n2", "10.2.0.1");
    leaving["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
    world.api.put(PODS, leaving);
    sleep(Duration::from_secs(1)).await;
    world.api.put(SLICES, slice([false, false]));
    sleep(Duration::from_secs(1)).await;
    assert_eq!(ready_endpoints(&world.objects.borrow()), [true, false]);
    sleep(CAREFUL).await;
    assert_eq!(ready_endpoints(&world.objects.borrow()), [false, false]);
}

#[tokio::test(start_paused = true)]
async fn an_absence_counts_from_the_last_word_before_it() {
    for (quiet, held) in [(60, true), (0, false)] {
        let mut world = World::start(&cluster(), None);
        world.ready().await;
        sleep(Duration::from_secs(60)).await;
        world.api.put(NAMESPACES, namespace("seen", true));
        sleep(Duration::from_secs(quiet)).await;
        // For all that was heard it may have been away all that time.
        world.api.set_away(true);
        sleep(Duration::from_secs(2)).await;
        world.api.set_away(false);
        sleep(Duration::from_secs(2)).await;
        world.api.put(SLICES, slice([false, false]));
        sleep(Duration::from_secs(10)).await;
        let ready = ready_endpoints(&world.objects.borrow());
        assert_eq!(ready, [held, held], "after {quiet} quiet seconds");
    }
}

#[test]
fn a_change_that_comes_alone_does_not_wait_for_a_turn_and_a_stream_does() {
    let now = Instant::now() + Duration::from_secs(3600);
    let built = |ago: u64, took: u64| {
        Some(Built {
            took: Duration::from_millis(took),
            at: now - Duration::from_millis(ago),
        })
    };
    for (last, waits) in [
        (None, 50),
        (built(1000, 60), 50),
        (built(580, 60), 50),
        (built(0, 60), 600),
        (built(200, 60), 400),
        (built(0, 2), 50),
        (built(0, 2000), 700),
    ] {
        assert_eq!((due(now, last) - now).as_millis(), waits, "{last:?}");
    }
}

#[test]
fn a_connection_that_fell_silent_was_absent_for_as_long() {
    let now = Instant::now() + Duration::from_secs(3600);
    let mut outage = Outage::default();
    outage.heard(now);
    outage.failed(now, Duration::ZERO);
    assert!(!outage.is_doubtful(now));
    outage.failed(now, Duration::from_secs(150));
    assert!(outage.is_doubtful(now));
}

#[tokio::test(start_paused = true)]
async fn an_endpoint_that_fails_while_the_api_server_is_there_is_not_held() {
    let mut world = World::start(&cluster(), None);
    world.ready().await;
    world.api.put(SLICES, slice([true, false]));
    let so = |objects: &Arc<Objects>| ready_endpoints(objects) == [true, false];
    let told = tokio::time::timeout(Duration::from_secs(1), world.objects.wait_for(so));
    told.await.expect("within a second").unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_agent_started_while_the_api_server_is_away_serves_from_what_was_known() {
    let api = cluster();
    let mut first = World::start(&api, None);
    first.ready().await;
    let before = Objects::clone(&first.objects.borrow());

    api.set_away(true);
    let mut world = World::start(&api, Some(before));
    let begun = Instant::now();
    world.ready().await;
    assert!(begun.elapsed() < PATIENCE * 2, "{:?}", begun.elapsed());
    assert!(world.pod("uid-b").is_some());
    // Deleted before the API server is there again: its list wins.
    api.delete(PODS, "shop/b");
    api.set_away(false);
    world
        .until("the list", |mesh| !mesh.workloads.contains_key("uid-b"))
        .await;

    api.set_away(true);
    let mut new = World::start(&api, None);
    sleep(Duration::from_secs(120)).await;
    assert_eq!(
        new.store.load().version,
        0,
        "half a cluster would let pods go"
    );
    api.set_away(false);
    new.ready().await;
    assert!(new.pod("uid-a").is_some());
}

#[tokio::test(start_paused = true)]
async fn a_kind_that_is_not_defined_is_read_once_it_is() {
    let api = cluster();
    let mut world = World::start(&api, None);
    world.ready().await;
    sleep(Duration::from_secs(600)).await;
    let asked = api.requests();
    let asked = asked
        .iter()
        .filter(|asked| asked.contains("policy.linkerd.io"));
    assert_eq!(asked.count(), 0, "nobody asks again and again");

    api.define("servers", "policy.linkerd.io", "v1beta3");
    api.put(SERVERS, server(json!(8080)));
    let there = |objects: &Arc<Objects>| objects.servers.len() == 1;
    let told = tokio::time::timeout(Duration::from_secs(5), world.objects.wait_for(there));
    told.await.expect("within five seconds").unwrap();

    api.undefine("servers", "policy.linkerd.io");
    let gone = |objects: &Arc<Objects>| objects.servers.is_empty();
    let told = tokio::time::timeout(Duration::from_secs(5), world.objects.wait_for(gone));
    told.await.expect("within five seconds").unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_older_version_is_read_where_the_newest_is_not_served() {
    let api = cluster();
    api.define("servers", "policy.linkerd.io", "v1beta1");
    let mut old = server(json!(8080));
    old["apiVersion"] = json!("policy.linkerd.io/v1beta1");
    api.put("/apis/policy.linkerd.io/v1beta1/servers", old);
    let mut world = World::start(&api, None);
    world.ready().await;
    assert_eq!(world.objects.borrow().servers.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_a_policy_of_the_cnis_selects_stays_outside() {
    let api = cluster();
    api.define("ciliumnetworkpolicies", "cilium.io", "v2");
    api.put(
        CILIUM,
        json!({
            "apiVersion": "cilium.io/v2", "kind": "CiliumNetworkPolicy",
            "metadata": {"name": "deny", "namespace": "shop"},
            "spec": {"endpointSelector": {"matchLabels": {"app": "b"}}},
        }),
    );
    let mut world = World::start(&api, None);
    world.ready().await;
    assert!(world.pod("uid-a").unwrap().meshed);
    let kept = world.pod("uid-b").unwrap();
    assert!(!kept.meshed);
    let why = kept.refused.clone().unwrap();
    assert!(
        why.contains("CiliumNetworkPolicy shop/deny of cilium.io"),
        "{why}"
    );

    // A pod that comes to be selected leaves, and one that no longer is comes back.
    let mut relabelled = pod("a", "n1", "10.1.0.1");
    relabelled["metadata"]["labels"] = json!({"app": "b"});
    api.put(PODS, relabelled);
    world
        .until("selected too", |mesh| {
            mesh.workloads.values().all(|pod| !pod.meshed)
        })
        .await;
    api.delete(CILIUM, "shop/deny");
    world
        .until("nobody selects", |mesh| {
            mesh.workloads.values().all(|pod| pod.meshed)
        })
        .await;
}

#[tokio::test(start_paused = true)]
async fn definitions_are_heard_of_after_a_watch_was_refused() {
    let api = Api::default();
    let (told, mut known) = watch::channel(None);
    let following = tokio::spawn(follow::definitions(api.client(), told));
    known.wait_for(Option::is_some).await.unwrap();
    api.refuse_old("/apis/apiextensions.k8s.io/v1/customresourcedefinitions");
    sleep(Duration::from_secs(15)).await;
    api.define("servers", "policy.linkerd.io", "v1beta3");
    sleep(Duration::from_secs(1)).await;
    let name = "servers.policy.linkerd.io";
    assert!(known.borrow().as_ref().unwrap().contains(name));
    following.abort();
}

//! Refusals as a table, and the flows against a server.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use rcgen::{CertificateParams, DistinguishedName, KeyPair, SanType};
use serde_json::{Value, json};
use tokio::time::sleep;

use super::*;
use crate::{
    control::{
        ask::{Reason, Refusal},
        feed::Told,
    },
    testing::api::Api as Server,
};

const REQUESTS: &str = "/apis/certificates.k8s.io/v1/certificatesigningrequests";
const PODS: &str = "/api/v1/pods";
const NAMESPACES: &str = "/api/v1/namespaces";
const EXTRA: &str = "authentication.kubernetes.io/";

fn rules() -> Rules {
    Rules {
        namespace: "picomesh-system".into(),
        trust_domain: "cluster.local".into(),
        longest_life: Duration::from_secs(86_400),
    }
}

fn settings() -> Settings {
    Settings {
        rules: rules(),
        cluster: "Kubernetes".into(),
        most_pending: 4,
    }
}

fn pem_of(uri: &str) -> String {
    let pair = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![SanType::URI(uri.try_into().unwrap())];
    params.serialize_request(&pair).unwrap().pem().unwrap()
}

fn base64(bytes: &[u8]) -> Value {
    serde_json::to_value(k8s_openapi::ByteString(bytes.to_vec())).unwrap()
}

/// What the agent of n1 asks for shop/web.
fn request(name: &str) -> Value {
    json!({
        "metadata": {"name": name, "uid": format!("uid-{name}")},
        "spec": {
            "signerName": SIGNER,
            "request": base64(pem_of("spiffe://cluster.local/ns/shop/sa/web").as_bytes()),
            "usages": ["digital signature", "client auth", "server auth"],
            "expirationSeconds": 86_400,
            "username": "system:serviceaccount:picomesh-system:picomesh-agent",
            "extra": {
                format!("{EXTRA}node-name"): ["n1"],
                format!("{EXTRA}pod-name"): ["agent-1"],
                format!("{EXTRA}pod-uid"): ["agent-uid"],
            },
        },
    })
}

/// What it asks for another account of that namespace.
fn request_for(name: &str, account: &str) -> Value {
    let mut request = request(name);
    let uri = format!("spiffe://cluster.local/ns/shop/sa/{account}");
    asking(&mut request, &pem_of(&uri));
    request
}

fn pod(namespace: &str, name: &str, uid: &str, account: &str, node: &str) -> Value {
    json!({
        "metadata": {"namespace": namespace, "name": name, "uid": uid},
        "spec": {"serviceAccountName": account, "nodeName": node,
                 "containers": [{"name": "c"}]},
        "status": {"phase": "Running"},
    })
}

fn agent() -> Value {
    let mut agent = pod(
        "picomesh-system",
        "agent-1",
        "agent-uid",
        "picomesh-agent",
        "n1",
    );
    agent["spec"]["hostNetwork"] = true.into();
    agent
}

fn namespace(name: &str, meshed: bool) -> Value {
    let labels = if meshed {
        json!({"picomesh.io/mesh": "enabled"})
    } else {
        json!({})
    };
    json!({"metadata": {"name": name, "labels": labels}})
}

/// The mesh of one node: its agent, and shop/web.
fn server() -> Server {
    let server = Server::default();
    server.put(NAMESPACES, namespace("shop", true));
    server.put(NAMESPACES, namespace("plain", false));
    server.put(PODS, agent());
    server.put(PODS, pod("shop", "web-1", "web-uid", "web", "n1"));
    server
}

struct Running {
    counts: Arc<Counts>,
    ready: Arc<AtomicBool>,
    leading: watch::Sender<bool>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn run_on(server: &Server, leads: bool) -> Running {
    let (leading, follows) = watch::channel(leads);
    let (counts, ready) = (Arc::<Counts>::default(), Arc::<AtomicBool>::default());
    let (counted, done) = (counts.clone(), ready.clone());
    let done = move || done.store(true, Ordering::Release);
    let never = std::future::pending();
    let task = run(server.client(), settings(), follows, counted, done, never);
    Running {
        counts,
        ready,
        leading,
        task: tokio::spawn(task),
    }
}

fn status_of(server: &Server, name: &str) -> Value {
    let request = server.get(REQUESTS, &format!("/{name}"));
    request.map_or(Value::Null, |mut request| request["status"].take())
}

/// Kind and reason of its only condition.
fn answer_of(server: &Server, name: &str) -> Option<(String, String)> {
    let status = status_of(server, name);
    let conditions = status["conditions"].as_array()?;
    assert_eq!(conditions.len(), 1, "{conditions:?}");
    let text = |field: &str| conditions[0][field].as_str().unwrap().to_owned();
    assert_eq!(text("status"), "True");
    assert!(!text("message").is_empty());
    Some((text("type"), text("reason")))
}

#[tokio::test(start_paused = true)]
async fn what_runs_on_the_node_is_approved_at_once() {
    let server = server();
    let running = run_on(&server, true);
    sleep(Duration::from_secs(2)).await;
    assert!(running.ready.load(Ordering::Acquire));
    server.put(REQUESTS, request("r"));
    sleep(Duration::from_millis(200)).await;
    let answer = answer_of(&server, "r").unwrap();
    assert_eq!(answer, ("Approved".into(), "RunsOnNode".into()));
    assert_eq!(running.counts.shown().good, 1);
}

/// Changes one request into one that must be refused.
type Change = fn(&mut Value);

fn spec(request: &mut Value, field: &str, value: Value) {
    request["spec"][field] = value;
}

fn asking(request: &mut Value, text: &str) {
    spec(request, "request", base64(text.as_bytes()));
}

fn said(request: &mut Value, name: &str, values: Value) {
    request["spec"]["extra"][format!("{EXTRA}{name}")] = values;
}

const REFUSED: &[(&str, Reason, Change)] = &[
    ("a person", Reason::NotAnAgent, |r| {
        spec(r, "username", json!("kubernetes-admin"));
    }),
    ("nobody", Reason::NotAnAgent, |r| {
        spec(r, "username", Value::Null);
    }),
    ("another account of ours", Reason::NotAnAgent, |r| {
        let user = "system:serviceaccount:picomesh-system:picomesh-signer";
        spec(r, "username", json!(user));
    }),
    ("an agent of another namespace", Reason::NotAnAgent, |r| {
        let user = "system:serviceaccount:shop:picomesh-agent";
        spec(r, "username", json!(user));
    }),
    ("a token of no pod", Reason::UnboundToken, |r| {
        spec(r, "extra", Value::Null);
    }),
    ("a token of no node", Reason::UnboundToken, |r| {
        said(r, "node-name", json!([]));
    }),
    ("a token of no pod's name", Reason::UnboundToken, |r| {
        said(r, "pod-name", json!([""]));
    }),
    ("a token of no uid", Reason::UnboundToken, |r| {
        said(r, "pod-uid", json!([]));
    }),
    ("a token of two nodes", Reason::UnboundToken, |r| {
        said(r, "node-name", json!(["n1", "n2"]));
    }),
    ("one usage less", Reason::Usages, |r| {
        spec(r, "usages", json!(["digital signature", "client auth"]));
    }),
    ("one usage more", Reason::Usages, |r| {
        let usages = json!([
            "digital signature",
            "client auth",
            "server auth",
            "cert sign"
        ]);
        spec(r, "usages", usages);
    }),
    ("a usage twice", Reason::Usages, |r| {
        spec(
            r,
            "usages",
            json!(["server auth", "client auth", "server auth"]),
        );
    }),
    ("no usages", Reason::Usages, |r| {
        spec(r, "usages", Value::Null)
    }),
    ("no life", Reason::Life, |r| {
        spec(r, "expirationSeconds", Value::Null);
    }),
    ("too long a life", Reason::Life, |r| {
        spec(r, "expirationSeconds", json!(86_401));
    }),
    ("too short a life", Reason::Life, |r| {
        spec(r, "expirationSeconds", json!(599));
    }),
    ("a life before now", Reason::Life, |r| {
        spec(r, "expirationSeconds", json!(-1));
    }),
    ("no PEM", Reason::Malformed, |r| asking(r, "nonsense")),
    ("another kind of PEM", Reason::Malformed, |r| {
        let text = pem_of("spiffe://cluster.local/ns/shop/sa/web");
        asking(r, &text.replace("CERTIFICATE REQUEST", "CERTIFICATE"));
    }),
    ("two requests in one", Reason::Malformed, |r| {
        let text = pem_of("spiffe://cluster.local/ns/shop/sa/web");
        asking(r, &text.repeat(2));
    }),
    ("more than anybody needs", Reason::Malformed, |r| {
        asking(r, &" ".repeat(16 * 1024 + 1));
    }),
    ("PEM of nonsense", Reason::Malformed, |r| {
        let (begin, end) = ("BEGIN CERTIFICATE REQUEST", "END CERTIFICATE REQUEST");
        asking(r, &format!("-----{begin}-----\nAAAA\n-----{end}-----\n"));
    }),
    ("another curve", Reason::Key, |r| {
        let pair = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap();
        let made = CertificateParams::default().serialize_request(&pair);
        asking(r, &made.unwrap().pem().unwrap());
    }),
    ("no name", Reason::Names, |r| {
        let pair = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        asking(r, &params.serialize_request(&pair).unwrap().pem().unwrap());
    }),
    ("a name that is no workload's", Reason::Names, |r| {
        asking(r, &pem_of("spiffe://cluster.local/shop/web"));
    }),
    ("a subject", Reason::Names, |r| {
        let pair = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
        // The library's own default has a common name.
        let made = CertificateParams::default().serialize_request(&pair);
        asking(r, &made.unwrap().pem().unwrap());
    }),
    ("an authority", Reason::Authority, |r| {
        let pair = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        asking(r, &params.serialize_request(&pair).unwrap().pem().unwrap());
    }),
    ("another trust domain", Reason::TrustDomain, |r| {
        asking(r, &pem_of("spiffe://other.local/ns/shop/sa/web"));
    }),
    ("a pod that is not there", Reason::UnknownAgent, |r| {
        said(r, "pod-name", json!(["agent-2"]));
    }),
    ("a pod of another time", Reason::UnknownAgent, |r| {
        said(r, "pod-uid", json!(["older-uid"]));
    }),
    ("a pod of another account", Reason::WrongAgent, |r| {
        said(r, "pod-name", json!(["stranger"]));
        said(r, "pod-uid", json!(["stranger-uid"]));
    }),
    ("a token of another node", Reason::WrongAgent, |r| {
        said(r, "node-name", json!(["n2"]));
    }),
    ("an account with no pod", Reason::NotOnNode, |r| {
        asking(r, &pem_of("spiffe://cluster.local/ns/shop/sa/other"));
    }),
    ("an account on another node", Reason::NotOnNode, |r| {
        asking(r, &pem_of("spiffe://cluster.local/ns/shop/sa/far"));
    }),
    ("an account outside of the mesh", Reason::NotOnNode, |r| {
        asking(r, &pem_of("spiffe://cluster.local/ns/plain/sa/web"));
    }),
    ("a pod that says no", Reason::NotOnNode, |r| {
        asking(r, &pem_of("spiffe://cluster.local/ns/shop/sa/unwilling"));
    }),
    ("a pod on the node's network", Reason::NotOnNode, |r| {
        asking(r, &pem_of("spiffe://cluster.local/ns/shop/sa/host"));
    }),
    ("the account of no account", Reason::NotOnNode, |r| {
        asking(r, &pem_of("spiffe://cluster.local/ns/shop/sa/default"));
    }),
    ("the account of a mirror", Reason::NotOnNode, |r| {
        asking(r, &pem_of("spiffe://cluster.local/ns/shop/sa/mirrored"));
    }),
    ("a pod that has ended", Reason::NotOnNode, |r| {
        asking(r, &pem_of("spiffe://cluster.local/ns/shop/sa/job"));
    }),
    ("the agent itself", Reason::NotOnNode, |r| {
        let own = "spiffe://cluster.local/ns/picomesh-system/sa/picomesh-agent";
        asking(r, &pem_of(own));
    }),
];

#[tokio::test(start_paused = true)]
async fn everything_else_is_denied_with_its_reason() {
    let server = server();
    // What the rows speak of.
    let stranger = pod(
        "picomesh-system",
        "stranger",
        "stranger-uid",
        "default",
        "n1",
    );
    server.put(PODS, stranger);
    server.put(PODS, pod("shop", "far-1", "u1", "far", "n2"));
    server.put(PODS, pod("plain", "web-1", "u2", "web", "n1"));
    let mut unwilling = pod("shop", "unwilling-1", "u3", "unwilling", "n1");
    unwilling["metadata"]["annotations"] = json!({"picomesh.io/mesh": "disabled"});
    server.put(PODS, unwilling);
    let mut host = pod("shop", "host-1", "u4", "host", "n1");
    host["spec"]["hostNetwork"] = true.into();
    server.put(PODS, host);
    // What a kubelet may make anywhere: a mirror, which names no account.
    let mut mirror = pod("shop", "mirror-1", "u6", "", "n1");
    mirror["metadata"]["annotations"] = json!({"kubernetes.io/config.mirror": "5e1f"});
    server.put(PODS, mirror);
    let mut nobody = pod("shop", "nobody-1", "u7", "", "n1");
    nobody["spec"]
        .as_object_mut()
        .unwrap()
        .remove("serviceAccountName");
    server.put(PODS, nobody);
    let mut mirrored = pod("shop", "mirror-2", "u8", "mirrored", "n1");
    mirrored["metadata"]["annotations"] = json!({"kubernetes.io/config.mirror": "5e1f"});
    server.put(PODS, mirrored);
    let mut job = pod("shop", "job-1", "u5", "job", "n1");
    job["status"]["phase"] = "Succeeded".into();
    server.put(PODS, job);

    let running = run_on(&server, true);
    let mut told = std::collections::BTreeSet::new();
    for (number, (what, reason, change)) in REFUSED.iter().enumerate() {
        let name = format!("r{number}");
        let mut request = request(&name);
        change(&mut request);
        server.put(REQUESTS, request);
        // One after the other: only so many may wait.
        sleep(Duration::from_secs(8)).await;
        let answer = answer_of(&server, &name);
        let expected = ("Denied".to_owned(), reason.as_str().to_owned());
        assert_eq!(answer, Some(expected), "{what}");
        told.insert(*reason);
    }
    let shown = running.counts.shown();
    assert_eq!(shown.good, 0);
    let denied: u64 = shown.refused.iter().map(|(_, count)| count).sum();
    assert_eq!(denied, REFUSED.len() as u64);
    // Each word has a row; the rest is the signer's, or has a test of its own below.
    let elsewhere = [
        Reason::TooManyPending,
        Reason::IssuerExpired,
        Reason::CannotSign,
    ];
    for reason in Reason::ALL {
        assert_ne!(
            told.contains(&reason),
            elsewhere.contains(&reason),
            "{reason:?}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn what_a_watch_may_not_have_shown_yet_is_waited_for() {
    let server = server();
    let _running = run_on(&server, true);
    let mut early = request("early");
    asking(&mut early, &pem_of("spiffe://cluster.local/ns/shop/sa/new"));
    server.put(REQUESTS, early);
    sleep(Duration::from_secs(3)).await;
    assert_eq!(answer_of(&server, "early"), None);
    server.put(PODS, pod("shop", "new-1", "new-uid", "new", "n1"));
    sleep(Duration::from_millis(500)).await;
    assert_eq!(answer_of(&server, "early").unwrap().0, "Approved");
}

#[tokio::test(start_paused = true)]
async fn a_node_with_too_many_open_requests_is_denied_and_others_are_not() {
    let server = server();
    let mut second = pod(
        "picomesh-system",
        "agent-2",
        "agent-2-uid",
        "picomesh-agent",
        "n2",
    );
    second["spec"]["hostNetwork"] = true.into();
    server.put(PODS, second);
    server.put(PODS, pod("shop", "web-2", "web-2-uid", "web", "n2"));
    let _running = run_on(&server, true);
    // Nobody signs, so what is approved is still open.
    for number in 0..6 {
        let account = format!("a{number}");
        server.put(PODS, pod("shop", &account, &account, &account, "n1"));
        let asks = request_for(&format!("r{number}"), &account);
        server.put(REQUESTS, asks);
        sleep(Duration::from_secs(1)).await;
    }
    let answers: Vec<_> = (0..6)
        .map(|number| answer_of(&server, &format!("r{number}")).unwrap().0)
        .collect();
    assert_eq!(answers[..4], ["Approved"; 4]);
    assert_eq!(answers[4..], ["Denied"; 2]);
    let denied = answer_of(&server, "r5").unwrap().1;
    assert_eq!(denied, Reason::TooManyPending.as_str());

    let mut other = request("other");
    said(&mut other, "node-name", json!(["n2"]));
    said(&mut other, "pod-name", json!(["agent-2"]));
    said(&mut other, "pod-uid", json!(["agent-2-uid"]));
    server.put(REQUESTS, other);
    sleep(Duration::from_secs(1)).await;
    assert_eq!(answer_of(&server, "other").unwrap().0, "Approved");
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_starts_anew_and_asks_the_same_again_takes_no_second_place() {
    let server = server();
    for account in ["a", "b", "c", "d"] {
        server.put(PODS, pod("shop", account, account, account, "n1"));
    }
    let _running = run_on(&server, true);
    let asks = async |name: String, account: &str| {
        server.put(REQUESTS, request_for(&name, account));
        sleep(Duration::from_secs(1)).await;
        answer_of(&server, &name).unwrap().0
    };
    // Nobody signs, so each start leaves its requests open.
    for start in 0..requests::REPEATS {
        for account in ["a", "b", "c", "web"] {
            let answer = asks(format!("{account}{start}"), account).await;
            assert_eq!(answer, "Approved", "{account}, start {start}");
        }
    }
    // All places are taken, and somebody who asks without end takes more of them.
    assert_eq!(asks("another".into(), "d").await, "Denied");
    assert_eq!(asks("once-more".into(), "web").await, "Denied");
}

#[tokio::test(start_paused = true)]
async fn who_does_not_lead_writes_nothing_and_takes_over() {
    let server = server();
    let running = run_on(&server, false);
    server.put(REQUESTS, request("r"));
    sleep(Duration::from_secs(30)).await;
    assert!(running.ready.load(Ordering::Acquire), "ready to take over");
    assert_eq!(status_of(&server, "r"), Value::Null);
    running.leading.send_replace(true);
    sleep(Duration::from_secs(1)).await;
    assert_eq!(answer_of(&server, "r").unwrap().0, "Approved");
}

#[tokio::test(start_paused = true)]
async fn two_that_both_believe_to_lead_answer_once() {
    let server = server();
    let running = [run_on(&server, true), run_on(&server, true)];
    sleep(Duration::from_secs(2)).await;
    for number in 0..3 {
        server.put(REQUESTS, request(&format!("r{number}")));
    }
    sleep(Duration::from_secs(10)).await;
    for number in 0..3 {
        // One condition: the helper asserts it.
        let answer = answer_of(&server, &format!("r{number}")).unwrap();
        assert_eq!(answer.0, "Approved");
    }
    let good: u64 = running.iter().map(|one| one.counts.shown().good).sum();
    assert_eq!(good, 3);
}

#[tokio::test(start_paused = true)]
async fn requests_of_others_are_left_alone() {
    let server = server();
    let _running = run_on(&server, true);
    let mut other = request("other");
    spec(
        &mut other,
        "signerName",
        json!("kubernetes.io/kubelet-serving"),
    );
    server.put(REQUESTS, other);
    sleep(Duration::from_secs(2 * 3600)).await;
    assert_eq!(status_of(&server, "other"), Value::Null);
    assert!(server.get(REQUESTS, "/other").is_some());
}

#[tokio::test(start_paused = true)]
async fn what_is_finished_or_stale_is_collected() {
    let server = server();
    let running = run_on(&server, true);
    let with = |name: &str, status: Value| {
        let mut request = request(name);
        request["status"] = status;
        server.put(REQUESTS, request);
    };
    let condition = |kind: &str| json!([{"type": kind, "status": "True"}]);
    let certificate = base64(b"-----BEGIN CERTIFICATE-----");
    let approved = condition("Approved");
    with(
        "issued",
        json!({"conditions": approved.clone(), "certificate": certificate}),
    );
    with("unsigned", json!({"conditions": approved}));
    with("denied", json!({"conditions": condition("Denied")}));
    with("failed", json!({"conditions": condition("Failed")}));
    let left = || {
        let mut names: Vec<_> = server
            .all(REQUESTS)
            .iter()
            .map(|request| request["metadata"]["name"].as_str().unwrap().to_owned())
            .collect();
        names.sort();
        names
    };
    let minute = Duration::from_secs(60);
    sleep(4 * minute).await;
    assert_eq!(left(), ["denied", "failed", "issued", "unsigned"]);
    sleep(2 * minute).await;
    assert_eq!(left(), ["denied", "failed", "unsigned"]);
    sleep(10 * minute).await;
    assert_eq!(left(), ["denied", "failed"]);
    sleep(50 * minute).await;
    assert_eq!(left(), Vec::<String>::new());
    assert_eq!(running.counts.shown().collected, 4);
}

#[tokio::test(start_paused = true)]
async fn an_api_server_that_is_away_costs_nothing_but_time() {
    let server = server();
    let _running = run_on(&server, true);
    sleep(Duration::from_secs(2)).await;
    server.set_away(true);
    server.put(REQUESTS, request("r"));
    sleep(Duration::from_secs(120)).await;
    server.set_away(false);
    sleep(Duration::from_secs(15)).await;
    assert_eq!(answer_of(&server, "r").unwrap().0, "Approved");
}

/// Of what a watch tells.
fn there(object: Value) -> Told {
    Told::There(Box::new(serde_json::from_value(object).unwrap()))
}

/// Pods and namespaces as [`server`] has them, all heard.
fn pods(now: Instant) -> Pods {
    let converter = Converter::named(&"Kubernetes".into(), &"cluster.local".into());
    let mut pods = Pods::new(converter, "picomesh-system".into());
    for told in [
        Told::Listing,
        there(agent()),
        there(agent_2()),
        there(pod("shop", "web-1", "web-uid", "web", "n1")),
        there(pod("shop", "web-2", "web-2-uid", "web", "n2")),
        Told::Listed,
    ] {
        pods.hear_pod(told, now);
    }
    for told in [Told::Listing, there(namespace("shop", true)), Told::Listed] {
        pods.hear_namespace(told, now);
    }
    pods
}

fn agent_2() -> Value {
    let account = "picomesh-agent";
    let mut agent = pod("picomesh-system", "agent-2", "agent-2-uid", account, "n2");
    agent["spec"]["hostNetwork"] = true.into();
    agent
}

fn of_agent_2(request: &mut Value) {
    said(request, "node-name", json!(["n2"]));
    said(request, "pod-name", json!(["agent-2"]));
    said(request, "pod-uid", json!(["agent-2-uid"]));
}

/// Each with the second in which it was made, and its stage.
fn requests(all: impl IntoIterator<Item = (Value, i64, Option<&'static str>)>) -> Requests {
    let mut requests = Requests::new(rules(), 4);
    requests.hear(Told::Listing, Instant::now());
    for (mut request, made, stage) in all {
        let made = Time(Timestamp::from_second(1_800_000_000 + made).unwrap());
        request["metadata"]["creationTimestamp"] = json!(made);
        match stage {
            Some("Issued") => {
                request["status"] = json!({"certificate": base64(b"x"),
                                           "conditions": [{"type": "Approved", "status": "True"}]});
            }
            Some(stage) => {
                request["status"] = json!({"conditions": [{"type": stage, "status": "True"}]});
            }
            None => {}
        }
        requests.hear(there(request), Instant::now());
    }
    requests.hear(Told::Listed, Instant::now());
    requests
}

fn renamed(request: &Value, name: String) -> Value {
    let mut request = request.clone();
    request["metadata"]["uid"] = json!(format!("uid-{name}"));
    request["metadata"]["name"] = json!(name);
    request
}

#[tokio::test(start_paused = true)]
async fn a_flood_from_one_node_waits_for_the_requests_of_others() {
    let flood = request("r");
    let mut honest = request("honest");
    of_agent_2(&mut honest);
    let flood = (0..300).map(|number| (renamed(&flood, format!("r{number:03}")), 0, None));
    let requests = requests(flood.chain([(honest, 60, None)]));
    let work = requests.due(&pods(Instant::now()), Instant::now());
    assert_eq!(work.len(), requests::ROUND);
    let names: Vec<_> = work[..2].iter().map(|work| &*work.name).collect();
    assert_eq!(names, ["r000", "honest"]);
    assert!(matches!(work[1].what, What::Approve { .. }));
}

#[tokio::test(start_paused = true)]
async fn too_many_finished_ones_go_from_the_node_that_has_most() {
    let flood = request("r");
    let mut honest = request("honest");
    of_agent_2(&mut honest);
    let issued = (0..10).map(|n| (renamed(&flood, format!("issued{n}")), 0, Some("Issued")));
    let flood = (0..1995).map(|n| (renamed(&flood, format!("r{n:04}")), n, Some("Denied")));
    let honest = (0..20).map(|n| (renamed(&honest, format!("honest{n}")), 0, Some("Denied")));
    let requests = requests(honest.chain(issued).chain(flood));
    let collected = |now| -> Vec<_> {
        let due = requests.due(&pods(now), now).into_iter();
        due.map(|work| {
            assert!(matches!(work.what, What::Collect), "{work:?}");
            work.name.to_string()
        })
        .collect()
    };
    // The oldest; and what was issued just now has not been seen by its agent.
    let expected: Vec<_> = (0..15).map(|n| format!("r{n:04}")).collect();
    assert_eq!(collected(Instant::now()), expected);
    sleep(Duration::from_secs(31)).await;
    assert_eq!(collected(Instant::now()).len(), 25);
}

#[tokio::test(start_paused = true)]
async fn what_has_piled_up_is_collected_and_not_approved() {
    let requests = requests([
        (request("forgotten"), 0, None),
        (request("late"), 60, Some("Approved")),
        (request("waiting"), 901, None),
        (request("young"), 1000, None),
    ]);
    let work = requests.due(&pods(Instant::now()), Instant::now());
    let mut what: Vec<_> = work
        .iter()
        .map(|work| (&*work.name, matches!(work.what, What::Collect)))
        .collect();
    what.sort_unstable();
    let expected = [
        ("forgotten", true),
        ("late", true),
        ("waiting", false),
        ("young", false),
    ];
    assert_eq!(what, expected);
}

#[tokio::test(start_paused = true)]
async fn no_more_are_remembered_than_fit() {
    let one = request("r");
    let mut honest = request("honest");
    of_agent_2(&mut honest);
    let flood = (0..8100).map(|n| (renamed(&one, format!("r{n:04}")), n, Some("Denied")));
    let requests = requests([(honest, 0, None)].into_iter().chain(flood));
    assert!(requests.known() <= 8000, "{}", requests.known());
    let work = requests.due(&pods(Instant::now()), Instant::now());
    assert_eq!(&*work[0].name, "honest");
}

#[tokio::test(start_paused = true)]
async fn nobody_is_denied_for_what_a_broken_watch_has_not_shown() {
    let mut unknown = request("r");
    asking(
        &mut unknown,
        &pem_of("spiffe://cluster.local/ns/shop/sa/new"),
    );
    let requests = requests([(unknown, 0, None)]);
    let mut pods = pods(Instant::now());
    pods.hear_namespace(Told::Failed, Instant::now());
    sleep(Duration::from_secs(60)).await;
    assert!(requests.due(&pods, Instant::now()).is_empty());
    // Well again: from now on it has time.
    pods.hear_namespace(Told::Listing, Instant::now());
    assert!(requests.due(&pods, Instant::now()).is_empty());
    pods.hear_namespace(there(namespace("shop", true)), Instant::now());
    pods.hear_namespace(Told::Listed, Instant::now());
    sleep(Duration::from_secs(4)).await;
    assert!(requests.due(&pods, Instant::now()).is_empty());
    sleep(Duration::from_secs(2)).await;
    let work = requests.due(&pods, Instant::now());
    let [
        Work {
            what: What::Deny { refusal, .. },
            ..
        },
    ] = &work[..]
    else {
        panic!("{work:?}")
    };
    assert_eq!(refusal.reason, Reason::NotOnNode);
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_came_while_the_watches_were_broken_has_its_certificate() {
    let server = server();
    let _running = run_on(&server, true);
    sleep(Duration::from_secs(2)).await;
    server.cut(PODS);
    server.set_away(true);
    sleep(Duration::from_secs(30)).await;
    server.set_away(false);
    let mut early = request("early");
    asking(&mut early, &pem_of("spiffe://cluster.local/ns/shop/sa/new"));
    server.put(REQUESTS, early);
    server.put(PODS, pod("shop", "new-1", "new-uid", "new", "n1"));
    sleep(Duration::from_secs(20)).await;
    assert_eq!(answer_of(&server, "early").unwrap().0, "Approved");
}

#[test]
fn a_refusal_reads_as_one_sentence() {
    let refusal = Refusal::new(Reason::NotOnNode, "no pod of shop/web runs there");
    assert_eq!(
        refusal.to_string(),
        "NotOnNode: no pod of shop/web runs there"
    );
}

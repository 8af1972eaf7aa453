//! The authority's life against a server, with a clock that can be set; and signing.

use std::sync::atomic::{AtomicBool, Ordering};

use k8s_openapi::api::core::v1::ConfigMap;
use rustls::pki_types::{CertificateDer, pem::PemObject};
use tokio::time::sleep;
use x509_parser::{certificate::X509Certificate, extensions::GeneralName, prelude::FromDer};

use super::{anchors::SPREAD, *};
use crate::{
    control::{TRUST_ROOTS, TRUST_ROOTS_KEY, lease::Election, roots},
    identity::{
        authority::{make_issuer, make_root},
        clock::{Clock, TestClock},
        csr,
    },
    state::Identity,
    testing::api::{Api as Server, Now},
};

const REQUESTS: &str = "/apis/certificates.k8s.io/v1/certificatesigningrequests";
const SECRETS: &str = "/api/v1/namespaces/picomesh-system/secrets";
const MAPS: &str = "/api/v1/namespaces/picomesh-system/configmaps";
const EVENTS: &str = "/api/v1/namespaces/picomesh-system/events";
const SECRET: &str = "picomesh-system/picomesh-issuer";
const MAP: &str = "picomesh-system/picomesh-trust-roots";
const EXTRA: &str = "authentication.kubernetes.io/";
const DAY: Duration = Duration::from_secs(86_400);

fn settings() -> Settings {
    let rules = Rules {
        namespace: "picomesh-system".into(),
        trust_domain: "cluster.local".into(),
        longest_life: DAY,
    };
    let keeper = KeeperSettings {
        namespace: "picomesh-system".into(),
        trust_domain: "cluster.local".into(),
        longest_life: DAY,
        rotation: 30 * DAY,
    };
    Settings { rules, keeper }
}

/// What a server goes by that has this clock.
fn shown_by(clock: &Arc<TestClock>) -> Now {
    let clock = Arc::clone(clock);
    Arc::new(move || clock.now())
}

/// One cluster and its clock.
struct World {
    server: Server,
    clock: Arc<TestClock>,
}

impl World {
    fn new() -> Self {
        let (server, clock) = (Server::default(), TestClock::new());
        server.set_clock(shown_by(&clock));
        Self { server, clock }
    }

    fn keeper(&self) -> Keeper {
        let (events, writing) =
            Events::start_as(COMPONENT, self.server.client(), "picomesh-signer-x".into());
        tokio::spawn(writing);
        let client = self.server.client();
        Keeper::new(client, settings().keeper, self.clock.clone(), events)
    }

    /// An entry of the Secret, as bytes.
    fn secret(&self, entry: &str) -> Option<Vec<u8>> {
        let secret = self.server.get(SECRETS, SECRET)?;
        let bytes: ByteString = serde_json::from_value(secret["data"][entry].clone()).ok()?;
        Some(bytes.0)
    }

    fn version(&self) -> Value {
        self.server.get(SECRETS, SECRET).unwrap()["metadata"]["resourceVersion"].clone()
    }

    /// The anchors as an agent reads them.
    fn anchors(&self) -> Vec<CertificateDer<'static>> {
        let map = self.server.get(MAPS, MAP).unwrap();
        let map: ConfigMap = serde_json::from_value(map).unwrap();
        roots::read(&map).unwrap().anchors
    }

    fn give(&self, entries: &[(&str, &str)]) {
        let data = entries.iter().map(|(name, text)| {
            let bytes = ByteString(text.as_bytes().to_vec());
            ((*name).to_owned(), json!(bytes))
        });
        let data: serde_json::Map<_, _> = data.collect();
        let metadata = json!({"namespace": "picomesh-system", "name": ISSUER, "uid": "given"});
        let secret = json!({"metadata": metadata, "type": "kubernetes.io/tls", "data": data});
        self.server.put(SECRETS, secret);
    }

    /// A root and an issuer below it, as cert-manager would keep them.
    fn give_authority(&self) -> (String, String) {
        let now = self.clock.now();
        let root = make_root("cluster.local", now).unwrap();
        let issuer = make_issuer(&root.certificate, &root.key, "cluster.local", now).unwrap();
        self.give(&[
            ("tls.crt", &issuer.certificate),
            ("tls.key", &issuer.key),
            ("ca.crt", &root.certificate),
        ]);
        (root.certificate, issuer.certificate)
    }

    fn said(&self) -> Vec<String> {
        let events = self.server.all(EVENTS);
        let said = events.iter().map(|event| &event["message"]);
        said.map(|said| said.as_str().unwrap().to_owned()).collect()
    }
}

fn der(pem: &[u8]) -> CertificateDer<'static> {
    CertificateDer::from_pem_slice(pem).unwrap()
}

/// When the issuer that signs ends: as good as its name.
fn signing(keeper: &Keeper) -> Option<SystemTime> {
    keeper.authority().map(|authority| authority.not_after)
}

#[tokio::test(start_paused = true)]
async fn where_there_is_no_authority_the_leader_makes_one() {
    let world = World::new();
    let (mut idle, mut leader) = (world.keeper(), world.keeper());
    idle.look(false).await.unwrap();
    assert!(world.secret("tls.crt").is_none());
    leader.look(true).await.unwrap();
    let root = der(&world.secret("ca.crt").unwrap());
    assert_eq!(world.anchors(), std::slice::from_ref(&root));
    let ends = crate::identity::authority::ends;
    let now = world.clock.now();
    assert!(ends(&root).unwrap() > now + 3649 * DAY);
    let issuer = ends(&der(&world.secret("tls.crt").unwrap())).unwrap();
    assert!(issuer > now + 364 * DAY && issuer <= now + 365 * DAY);
    // At once: nobody believes in another.
    assert_eq!(signing(&leader), Some(issuer));
    idle.look(false).await.unwrap();
    assert_eq!(signing(&idle), Some(issuer), "it could take over");
    let secret = world.server.get(SECRETS, SECRET).unwrap();
    assert_eq!(secret["type"], "kubernetes.io/tls");
}

#[tokio::test(start_paused = true)]
async fn two_that_both_believe_to_lead_make_one_authority() {
    let world = World::new();
    let (mut one, mut other) = (world.keeper(), world.keeper());
    let (first, second) = tokio::join!(one.look(true), other.look(true));
    first.unwrap();
    second.unwrap();
    one.look(true).await.unwrap();
    other.look(true).await.unwrap();
    assert_eq!(signing(&one), signing(&other));
    assert!(signing(&one).is_some());
    assert_eq!(world.anchors(), [der(&world.secret("ca.crt").unwrap())]);
}

#[tokio::test(start_paused = true)]
async fn an_issuer_is_rotated_monthly_below_the_same_root() {
    let world = World::new();
    let mut keeper = world.keeper();
    keeper.look(true).await.unwrap();
    let (first, root) = (signing(&keeper), world.anchors());
    world.clock.jump(29 * DAY);
    keeper.look(true).await.unwrap();
    assert_eq!(signing(&keeper), first);
    world.clock.jump(2 * DAY);
    let mut idle = world.keeper();
    idle.look(false).await.unwrap();
    assert_eq!(signing(&idle), first, "only the leader rotates");
    keeper.look(true).await.unwrap();
    assert!(signing(&keeper) > first);
    assert_eq!(world.anchors(), root);
    // And so on for years; the root is followed by another before it ends.
    for _ in 0..130 {
        world.clock.jump(31 * DAY);
        for _ in 0..2 {
            keeper.look(true).await.unwrap();
            world.clock.jump(SPREAD);
        }
        let now = world.clock.now();
        assert!(signing(&keeper).unwrap() > now + 300 * DAY);
        assert!((1..=2).contains(&world.anchors().len()));
    }
    assert_ne!(world.anchors(), root);
    assert_eq!(world.anchors().len(), 1, "the old root is gone");
}

#[tokio::test(start_paused = true)]
async fn two_that_both_rotate_end_with_one_issuer() {
    let world = World::new();
    let (mut one, mut other) = (world.keeper(), world.keeper());
    one.look(true).await.unwrap();
    other.look(true).await.unwrap();
    world.clock.jump(31 * DAY);
    let (first, second) = tokio::join!(one.look(true), other.look(true));
    first.unwrap();
    second.unwrap();
    one.look(true).await.unwrap();
    other.look(true).await.unwrap();
    let ends = crate::identity::authority::ends;
    let kept = ends(&der(&world.secret("tls.crt").unwrap()));
    assert_eq!((signing(&one), signing(&other)), (kept, kept));
}

#[tokio::test(start_paused = true)]
async fn without_its_key_the_root_is_followed_by_another_and_stays_until_nothing_uses_it() {
    let world = World::new();
    let mut keeper = world.keeper();
    keeper.look(true).await.unwrap();
    let (first, old) = (signing(&keeper), world.anchors());
    let mut secret = world.server.get(SECRETS, SECRET).unwrap();
    secret["data"].as_object_mut().unwrap().remove("root.key");
    world.server.put(SECRETS, secret);
    world.clock.jump(31 * DAY);
    keeper.look(true).await.unwrap();
    // The new root is told first, and signs when all know it.
    assert_eq!(world.anchors().len(), 2);
    assert_eq!(signing(&keeper), first);
    world.clock.jump(SPREAD);
    keeper.look(true).await.unwrap();
    assert!(signing(&keeper) > first);
    assert!(world.anchors().contains(&old[0]));
    keeper.look(true).await.unwrap();
    world.clock.jump(DAY);
    keeper.look(true).await.unwrap();
    assert_eq!(
        world.anchors().len(),
        2,
        "what was signed last may still live"
    );
    world.clock.jump(Duration::from_secs(2 * 3600));
    keeper.look(true).await.unwrap();
    assert_eq!(world.anchors(), [der(&world.secret("ca.crt").unwrap())]);
    assert_ne!(world.anchors(), old);
}

#[tokio::test(start_paused = true)]
async fn a_signer_that_restarts_meanwhile_waits_until_the_new_root_is_known() {
    let world = World::new();
    world.give_authority();
    world.keeper().look(true).await.unwrap();
    world.give_authority();
    let mut fresh = world.keeper();
    fresh.look(true).await.unwrap();
    assert_eq!(signing(&fresh), None);
    assert_eq!(
        world.anchors().len(),
        2,
        "nothing says that the old one is unused"
    );
    world.clock.jump(SPREAD);
    fresh.look(true).await.unwrap();
    assert!(signing(&fresh).is_some());
}

#[tokio::test(start_paused = true)]
async fn somebody_elses_secret_is_followed_and_never_written() {
    let world = World::new();
    let (root, issuer) = world.give_authority();
    let (mut keeper, version) = (world.keeper(), world.version());
    keeper.look(true).await.unwrap();
    let ends = crate::identity::authority::ends;
    assert_eq!(signing(&keeper), ends(&der(issuer.as_bytes())));
    assert_eq!(world.anchors(), [der(root.as_bytes())]);
    // However old it gets.
    world.clock.jump(340 * DAY);
    keeper.look(true).await.unwrap();
    assert_eq!(world.version(), version);
    sleep(Duration::from_secs(2)).await;
    let said = world.said().join("\n");
    assert!(said.contains("somebody else's: renew it"), "{said}");

    // It is renewed: the new anchor first, then what it signs.
    let before = signing(&keeper);
    let (_, issuer) = world.give_authority();
    let version = world.version();
    keeper.look(true).await.unwrap();
    assert_eq!(signing(&keeper), before);
    assert_eq!(world.anchors().len(), 2);
    world.clock.jump(SPREAD);
    keeper.look(true).await.unwrap();
    assert_eq!(signing(&keeper), ends(&der(issuer.as_bytes())));
    assert_eq!(world.version(), version);
    assert!(!keeper.is_troubled());
}

#[tokio::test(start_paused = true)]
async fn what_somebody_puts_over_ours_is_theirs_from_then_on() {
    let world = World::new();
    let mut keeper = world.keeper();
    keeper.look(true).await.unwrap();
    let marks = world.server.get(SECRETS, SECRET).unwrap()["metadata"]["annotations"].clone();
    world.give_authority();
    // As a tool does that changes the data and leaves the annotations.
    let mut secret = world.server.get(SECRETS, SECRET).unwrap();
    secret["metadata"]["annotations"] = marks;
    world.server.put(SECRETS, secret);
    let version = world.version();
    world.clock.jump(60 * DAY);
    keeper.look(true).await.unwrap();
    assert_eq!(world.version(), version);
}

#[tokio::test(start_paused = true)]
async fn a_given_secret_that_is_gone_is_not_replaced_by_one_of_ours() {
    let world = World::new();
    world.give_authority();
    let mut keeper = world.keeper();
    keeper.look(true).await.unwrap();
    let before = signing(&keeper);
    world.server.delete(SECRETS, SECRET);
    keeper.look(true).await.unwrap();
    assert_eq!(signing(&keeper), before, "the last good one signs on");
    let mut fresh = world.keeper();
    fresh.look(true).await.unwrap();
    assert_eq!(signing(&fresh), None);
    assert!(world.secret("tls.crt").is_none());
    sleep(Duration::from_secs(2)).await;
    let said = world.said().join("\n");
    assert!(said.contains("put it back"), "{said}");
}

#[tokio::test(start_paused = true)]
async fn ours_that_is_gone_is_made_anew_and_the_old_root_stays_for_a_while() {
    let world = World::new();
    let mut keeper = world.keeper();
    keeper.look(true).await.unwrap();
    let before = signing(&keeper);
    world.server.delete(SECRETS, SECRET);
    world.clock.jump(DAY);
    keeper.look(true).await.unwrap();
    assert_eq!(world.anchors().len(), 2);
    assert_eq!(signing(&keeper), before);
    world.clock.jump(SPREAD);
    keeper.look(true).await.unwrap();
    assert!(signing(&keeper) > before);
}

#[tokio::test(start_paused = true)]
async fn a_clock_that_is_wrong_makes_rotates_and_removes_nothing_and_is_told() {
    let world = World::new();
    let right = TestClock::new();
    world.server.set_clock(shown_by(&right));
    let mut keeper = world.keeper();
    world.clock.jump(400 * DAY);
    keeper.look(true).await.unwrap();
    assert!(world.secret("tls.crt").is_none());
    assert!(keeper.is_troubled());

    // Right at first, and an anchor is on its way out.
    world.server.set_clock(shown_by(&world.clock));
    keeper.look(true).await.unwrap();
    assert!(!keeper.is_troubled());
    let made = world.server.get(SECRETS, SECRET).unwrap();
    world.server.delete(SECRETS, SECRET);
    keeper.look(true).await.unwrap();
    world.clock.jump(SPREAD);
    keeper.look(true).await.unwrap();
    keeper.look(true).await.unwrap();
    assert_eq!(world.anchors().len(), 2);
    assert_ne!(world.server.get(SECRETS, SECRET).unwrap(), made);
    let (version, before) = (world.version(), signing(&keeper));
    let right = TestClock::new();
    right.jump(400 * DAY + SPREAD);
    world.server.set_clock(shown_by(&right));
    for wrong in [60 * DAY, 300 * DAY] {
        world.clock.jump(wrong);
        keeper.look(true).await.unwrap();
        sleep(Duration::from_secs(2)).await;
        assert_eq!(world.anchors().len(), 2);
        assert_eq!(
            (world.version(), signing(&keeper)),
            (version.clone(), before)
        );
        assert!(
            world
                .said()
                .iter()
                .any(|said| said.contains("minutes apart"))
        );
    }

    // It was the API server's that was wrong.
    right.jump(360 * DAY);
    keeper.look(true).await.unwrap();
    assert_eq!(world.anchors().len(), 1);
    assert_ne!(world.version(), version);
    assert!(!keeper.is_troubled());
}

#[tokio::test(start_paused = true)]
async fn a_secret_that_cannot_be_used_is_told_and_the_last_good_one_signs_on() {
    let world = World::new();
    let (root, issuer) = world.give_authority();
    let mut keeper = world.keeper();
    keeper.look(true).await.unwrap();
    let before = signing(&keeper);
    let key = String::from_utf8(world.secret("tls.key").unwrap()).unwrap();
    let now = world.clock.now();
    let other = make_root("cluster.local", now).unwrap();
    let good = [
        ("tls.crt", &*issuer),
        ("tls.key", &*key),
        ("ca.crt", &*root),
    ];
    let with = |name: &str, text: &str| {
        good.map(|(entry, own)| {
            if entry == name {
                (entry, text.to_owned())
            } else {
                (entry, own.to_owned())
            }
        })
    };
    for (entries, says) in [
        (with("tls.crt", ""), "tls.crt is missing"),
        (with("tls.crt", "nonsense"), "tls.crt holds no certificate"),
        (with("tls.key", ""), "tls.key is missing"),
        (with("tls.key", "nonsense"), "tls.key is not a private key"),
        (
            with("tls.key", &other.key),
            "is not the certificate of tls.key",
        ),
        (with("ca.crt", ""), "ca.crt is missing"),
        (
            with("ca.crt", &other.certificate),
            "not accepted with the anchors",
        ),
        (with("ca.crt", &" ".repeat(300_000)), "too long"),
    ] {
        let entries = entries.each_ref().map(|(name, text)| (*name, &**text));
        world.give(&entries);
        let version = world.version();
        keeper.look(true).await.unwrap();
        assert!(keeper.is_troubled(), "{says}");
        assert_eq!(signing(&keeper), before, "{says}");
        assert_eq!(world.version(), version, "{says}");
        assert_eq!(world.anchors(), [der(root.as_bytes())], "{says}");
        sleep(Duration::from_secs(2)).await;
        let said = world.said().join("\n");
        assert!(said.contains(says), "{says}: {said}");
        assert!(!said.contains(&key[30..60]), "a key is shown");
    }
    world.give(&good);
    keeper.look(true).await.unwrap();
    assert!(!keeper.is_troubled());
}

#[tokio::test(start_paused = true)]
async fn a_root_that_signs_by_itself_needs_no_anchors_beside_it() {
    let world = World::new();
    let root = make_root("cluster.local", world.clock.now()).unwrap();
    world.give(&[("tls.crt", &root.certificate), ("tls.key", &root.key)]);
    let mut keeper = world.keeper();
    keeper.look(true).await.unwrap();
    assert!(signing(&keeper).is_some());
    assert_eq!(world.anchors(), [der(root.certificate.as_bytes())]);
}

#[tokio::test(start_paused = true)]
async fn a_broken_config_map_is_mended_and_told() {
    let world = World::new();
    let mut keeper = world.keeper();
    keeper.look(true).await.unwrap();
    let anchors = world.anchors();
    let mut map = world.server.get(MAPS, MAP).unwrap();
    map["data"][TRUST_ROOTS_KEY] = "-----BEGIN CERTIFICATE-----\n!!\n".into();
    world.server.put(MAPS, map);
    keeper.look(true).await.unwrap();
    assert_eq!(world.anchors(), anchors);
    sleep(Duration::from_secs(2)).await;
    assert!(
        world.said().join("\n").contains("not PEM"),
        "{:?}",
        world.said()
    );
    world.server.delete(MAPS, MAP);
    keeper.look(true).await.unwrap();
    assert_eq!(world.anchors(), anchors);
    assert_eq!(
        world.server.get(MAPS, MAP).unwrap()["metadata"]["name"],
        TRUST_ROOTS
    );
}

// Signing.

struct Running {
    counts: Arc<Counts>,
    ready: Arc<AtomicBool>,
    /// Of one that is told.
    leading: Option<watch::Sender<bool>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn run_in(world: &World, leads: bool) -> Running {
    let (leading, follows) = watch::channel(leads);
    let (fit, _) = watch::channel(true);
    let clock = world.clock.clone();
    let mut running = run_by(world, clock, follows, fit, std::future::pending());
    running.leading = Some(leading);
    running
}

/// With a clock of its own; one of those that elect their leader.
fn stand_in(world: &World, clock: Arc<TestClock>, pod: &str) -> Running {
    let (fit, is_fit) = watch::channel(true);
    let election = Election::new(world.server.client(), "picomesh-system", LEASE, pod);
    let follows = election.leading();
    let election = election.while_fit(is_fit).run(std::future::pending());
    run_by(world, clock, follows, fit, election)
}

fn run_by(
    world: &World,
    clock: Arc<TestClock>,
    follows: watch::Receiver<bool>,
    fit: watch::Sender<bool>,
    election: impl Future<Output = ()> + Send + 'static,
) -> Running {
    let (counts, ready) = (Arc::<Counts>::default(), Arc::<AtomicBool>::default());
    let (events, _writing) = Events::start_as(COMPONENT, world.server.client(), "x".into());
    let around = Surroundings {
        client: world.server.client(),
        clock,
        events,
        leading: follows,
        fit,
        counts: counts.clone(),
    };
    let known = ready.clone();
    let done = move || known.store(true, Ordering::Release);
    let acting = run(settings(), around, done, std::future::pending());
    let task = tokio::spawn(async move {
        tokio::join!(acting, election);
    });
    Running {
        counts,
        ready,
        leading: None,
        task,
    }
}

fn identity() -> Identity {
    Identity::from_spiffe_id("spiffe://cluster.local/ns/shop/sa/web").unwrap()
}

/// An approved request, and the public key it is for.
fn approved(name: &str) -> (Value, Vec<u8>) {
    let made = csr::Request::new(&identity()).unwrap();
    let block = pem::encode(&pem::Pem::new("CERTIFICATE REQUEST", made.der));
    let request = json!({
        "metadata": {"name": name},
        "spec": {
            "signerName": SIGNER,
            "request": ByteString(block.into_bytes()),
            "usages": ["digital signature", "client auth", "server auth"],
            "expirationSeconds": 3600,
            "username": "system:serviceaccount:picomesh-system:picomesh-agent",
            "extra": {
                format!("{EXTRA}node-name"): ["n1"],
                format!("{EXTRA}pod-name"): ["agent-1"],
                format!("{EXTRA}pod-uid"): ["agent-uid"],
            },
        },
        "status": {"conditions": [{"type": "Approved", "status": "True"}]},
    });
    (request, made.public_key)
}

fn status_of(world: &World, name: &str) -> Value {
    let request = world.server.get(REQUESTS, &format!("/{name}")).unwrap();
    request["status"].clone()
}

#[tokio::test(start_paused = true)]
async fn what_is_approved_is_signed_for_its_key_and_its_one_identity() {
    let world = World::new();
    let running = run_in(&world, true);
    let (request, key) = approved("r");
    world.server.put(REQUESTS, request);
    sleep(Duration::from_secs(3)).await;
    assert!(running.ready.load(Ordering::Acquire));
    let status = status_of(&world, "r");
    assert_eq!(status["conditions"][0]["type"], "Approved", "it stays");
    let chain: ByteString = serde_json::from_value(status["certificate"].clone()).unwrap();
    let chain: Vec<_> = CertificateDer::pem_slice_iter(&chain.0)
        .collect::<Result<_, _>>()
        .unwrap();
    assert_eq!(chain.len(), 2, "the leaf and its issuer");
    let (_, leaf) = X509Certificate::from_der(&chain[0]).unwrap();
    assert_eq!(leaf.public_key().subject_public_key.data.as_ref(), &key[..]);
    let names = leaf.subject_alternative_name().unwrap().unwrap();
    let [GeneralName::URI(uri)] = &names.value.general_names[..] else {
        panic!("{names:?}")
    };
    assert_eq!(*uri, identity().to_string());
    assert!(!leaf.is_ca());
    let validity = leaf.validity();
    let life = validity.not_after.timestamp() - validity.not_before.timestamp();
    assert_eq!(life, 3600 + 3600, "an hour back, and what was asked for");
    assert_eq!(running.counts.shown().good, 1);
    assert!(running.counts.shown().issuer_ends.is_some());
}

#[tokio::test(start_paused = true)]
async fn what_is_not_approved_is_not_signed() {
    let world = World::new();
    let _running = run_in(&world, true);
    let with = |name: &str, conditions: Value| {
        let mut request = approved(name).0;
        request["status"] = json!({"conditions": conditions});
        world.server.put(REQUESTS, request);
    };
    let of = |kind: &str| json!({"type": kind, "status": "True"});
    with("undecided", json!([]));
    with("denied", json!([of("Denied")]));
    with("both", json!([of("Approved"), of("Denied")]));
    with("failed", json!([of("Approved"), of("Failed")]));
    let mut other = approved("other").0;
    other["spec"]["signerName"] = "example.com/other".into();
    world.server.put(REQUESTS, other);
    sleep(Duration::from_secs(30)).await;
    for name in ["undecided", "denied", "both", "failed", "other"] {
        assert_eq!(
            status_of(&world, name)["certificate"],
            Value::Null,
            "{name}"
        );
    }
    // All others were signed.
    world.server.put(REQUESTS, approved("good").0);
    sleep(Duration::from_secs(3)).await;
    assert_ne!(status_of(&world, "good")["certificate"], Value::Null);
}

#[tokio::test(start_paused = true)]
async fn an_approval_of_what_nobody_may_have_ends_as_failed_with_its_reason() {
    let world = World::new();
    let running = run_in(&world, true);
    type Change = fn(&mut Value);
    let rows: [(&str, Reason, Change); 4] = [
        ("stranger", Reason::NotAnAgent, |r| {
            r["spec"]["username"] = "kubernetes-admin".into();
        }),
        ("usages", Reason::Usages, |r| {
            r["spec"]["usages"] = json!(["client auth"]);
        }),
        ("life", Reason::Life, |r| {
            r["spec"]["expirationSeconds"] = json!(1_000_000);
        }),
        ("bytes", Reason::Malformed, |r| {
            r["spec"]["request"] = json!(ByteString(b"nonsense".to_vec()));
        }),
    ];
    for (name, reason, change) in rows {
        let mut request = approved(name).0;
        change(&mut request);
        world.server.put(REQUESTS, request);
        sleep(Duration::from_secs(3)).await;
        let status = status_of(&world, name);
        assert_eq!(status["certificate"], Value::Null, "{name}");
        let conditions = status["conditions"].as_array().unwrap();
        assert_eq!(conditions.len(), 2, "{name}: the approval stays");
        assert_eq!(conditions[1]["type"], "Failed", "{name}");
        assert_eq!(conditions[1]["reason"], reason.as_str(), "{name}");
    }
    assert_eq!(running.counts.shown().good, 0);
}

#[tokio::test(start_paused = true)]
async fn an_issuer_that_has_ended_signs_nothing_and_says_so() {
    let world = World::new();
    world.give_authority();
    let running = run_in(&world, true);
    sleep(Duration::from_secs(3)).await;
    world.clock.jump(366 * DAY);
    world.server.put(REQUESTS, approved("late").0);
    sleep(Duration::from_secs(3)).await;
    let status = status_of(&world, "late");
    assert_eq!(status["conditions"][1]["reason"], "IssuerExpired");
    let shown = running.counts.shown();
    let expired = shown
        .refused
        .iter()
        .find(|(word, _)| *word == "IssuerExpired");
    assert_eq!(expired.unwrap().1, 1);
}

#[tokio::test(start_paused = true)]
async fn who_does_not_lead_signs_nothing_and_takes_over() {
    let world = World::new();
    let leader = run_in(&world, true);
    sleep(Duration::from_secs(3)).await;
    drop(leader);
    let idle = run_in(&world, false);
    world.server.put(REQUESTS, approved("r").0);
    sleep(Duration::from_secs(30)).await;
    assert!(idle.ready.load(Ordering::Acquire), "ready to take over");
    assert_eq!(status_of(&world, "r")["certificate"], Value::Null);
    idle.leading.as_ref().unwrap().send_replace(true);
    sleep(Duration::from_secs(1)).await;
    assert_ne!(status_of(&world, "r")["certificate"], Value::Null);
}

#[tokio::test(start_paused = true)]
async fn whose_clock_is_wrong_signs_nothing_and_leaves_it_to_the_other() {
    let world = World::new();
    let own = TestClock::new();
    let wrong = stand_in(&world, own.clone(), "wrong");
    sleep(Duration::from_secs(5)).await;
    world.server.put(REQUESTS, approved("before").0);
    sleep(Duration::from_secs(5)).await;
    assert_eq!(wrong.counts.shown().good, 1, "the control: it leads");

    own.jump(2 * DAY);
    sleep(2 * LOOK).await;
    world.server.put(REQUESTS, approved("r").0);
    sleep(3 * LOOK).await;
    assert_eq!(status_of(&world, "r")["certificate"], Value::Null);
    assert!(wrong.counts.shown().troubled);
    let right = stand_in(&world, world.clock.clone(), "right");
    sleep(LOOK).await;
    assert_ne!(status_of(&world, "r")["certificate"], Value::Null);
    assert_eq!(right.counts.shown().good, 1);
    assert_eq!(wrong.counts.shown().good, 1);

    // It stands in again when its clock is right.
    world.clock.jump(2 * DAY);
    drop(right);
    sleep(3 * LOOK).await;
    world.server.put(REQUESTS, approved("again").0);
    sleep(LOOK).await;
    assert_eq!(wrong.counts.shown().good, 2);
}

#[tokio::test(start_paused = true)]
async fn two_that_both_believe_to_lead_sign_once() {
    let world = World::new();
    let running = [run_in(&world, true), run_in(&world, true)];
    sleep(Duration::from_secs(15)).await;
    world.server.put(REQUESTS, approved("r").0);
    sleep(Duration::from_secs(15)).await;
    assert_ne!(status_of(&world, "r")["certificate"], Value::Null);
    let good: u64 = running.iter().map(|one| one.counts.shown().good).sum();
    assert_eq!(good, 1);
}

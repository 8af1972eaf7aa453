use std::sync::atomic::Ordering;

use super::*;
use crate::identity::{
    ca::{LIFE, LocalCa},
    clock::TestClock,
    spiffe::server_name,
    testing::*,
};

const HOUR: Duration = Duration::from_secs(3600);

#[tokio::test(start_paused = true)]
async fn whatever_is_wanted_gets_a_certificate_and_serves() {
    let world = World::start(&["alice", "bob"]).await;
    for state in world.identities.status() {
        assert_eq!(state.state, "ready");
        assert!(!state.serial.is_empty());
    }
    assert_eq!(world.call("alice", "bob").await, Ok(()));
    let server = world.identities.server_config_for(&identity("bob"));
    let client = world
        .identities
        .client_config(&identity("alice"), &identity("bob"));
    // For a pod's own port the SNI does not matter.
    let name = server_name(&identity("carol"));
    let (called, answered) = shake(client.unwrap(), server.unwrap(), name).await;
    assert!(called.is_ok() && answered.is_ok());
}

#[tokio::test(start_paused = true)]
async fn names_lead_to_identities_that_are_held_and_no_others() {
    let world = World::start(&["bob"]).await;
    let name = server_name(&identity("bob")).to_str().into_owned();
    let by_name = |name: &str| world.identities.by_server_name(name);
    assert_eq!(by_name(&name), Some(identity("bob")));
    assert_eq!(by_name(&name.to_uppercase()), Some(identity("bob")));
    assert_eq!(by_name(&server_name(&identity("carol")).to_str()), None);
    assert_eq!(by_name(""), None);
}

#[tokio::test(start_paused = true)]
async fn renewal_comes_at_two_thirds_with_a_tenth_of_jitter() {
    let names: Vec<String> = (0..40).map(|n| format!("sa-{n}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let world = World::start(&names).await;
    world.signer.asked.lock().clear();
    let start = Instant::now();
    tokio::time::sleep(18 * HOUR).await;

    let asked = world.signer.asked.lock().clone();
    assert_eq!(asked.len(), 40, "each is renewed once, and only once");
    let after: Vec<Duration> = asked.iter().map(|(_, at)| *at - start).collect();
    let (first, last) = (*after.iter().min().unwrap(), *after.iter().max().unwrap());
    assert!(first >= LIFE.mul_f64(0.6) - HOUR / 60, "{first:?}");
    assert!(last <= LIFE.mul_f64(0.734) + HOUR / 60, "{last:?}");
    assert!(last - first > HOUR, "renewals bunch: {first:?} to {last:?}");
    assert!(world.identities.status().iter().all(|s| s.renewals == 1));
}

#[tokio::test(start_paused = true)]
async fn a_signer_that_fails_is_asked_less_and_less_often_and_the_old_certificate_serves() {
    let world = World::start(&["alice", "bob"]).await;
    world.signer.set(Mood::Fail);
    world.signer.asked.lock().clear();
    tokio::time::sleep(23 * HOUR).await;

    let times: Vec<Instant> = world.asked_by("bob").into_iter().take(12).collect();
    let waits: Vec<f64> = times
        .windows(2)
        .map(|pair| (pair[1] - pair[0]).as_secs_f64())
        .collect();
    for (wait, ideal) in waits
        .iter()
        .zip([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0])
    {
        assert!((wait / ideal - 1.0).abs() < 0.25, "{waits:?}");
    }
    let status = world.status("bob");
    assert_eq!(status.state, "ready");
    assert!(status.last_error.unwrap().contains("out to lunch"));
    assert_eq!(world.call("alice", "bob").await, Ok(()));
}

#[tokio::test(start_paused = true)]
async fn what_is_not_answered_is_asked_again_and_nothing_else_is() {
    let world = World::idle();
    world.signer.set(Mood::Hang);
    world.want(&["bob"]);
    tokio::time::sleep(HOUR).await;
    let asked = std::mem::take(&mut *world.signer.requests.lock());
    assert!(asked.len() > 10, "{}", asked.len());
    assert!(asked.iter().all(|csr| *csr == asked[0]));

    // An answer is the end of a request, whatever it was; and the key is never used again.
    world.signer.set(Mood::Fail);
    tokio::time::sleep(Duration::from_secs(100)).await;
    world.signer.set(Mood::Sign);
    tokio::time::sleep(Duration::from_secs(100)).await;
    let later = world.signer.requests.lock().clone();
    assert_eq!(later[0], asked[0]);
    assert!(later.windows(2).all(|pair| pair[0] != pair[1]));
    assert_eq!(world.status("bob").state, "ready");
}

#[tokio::test(start_paused = true)]
async fn the_longer_a_certificate_serves_the_fewer_are_the_tries_to_renew_it() {
    let world = World::start(&["bob"]).await;
    world.signer.set(Mood::Fail);
    world.signer.asked.lock().clear();
    tokio::time::sleep(LIFE - HOUR / 4).await;
    let tries = world.asked_by("bob").len();
    // A try a minute for eight hours would be 480.
    assert!((20..100).contains(&tries), "{tries}");
    world.signer.set(Mood::Sign);
    tokio::time::sleep(Duration::from_secs(90)).await;
    assert_eq!(world.status("bob").renewals, 1);
}

#[tokio::test(start_paused = true)]
async fn an_expired_certificate_is_not_used_and_comes_back_with_the_signer() {
    let world = World::start(&["alice", "bob"]).await;
    let (alice, bob) = (identity("alice"), identity("bob"));
    let client = world.identities.client_config(&alice, &bob).unwrap();
    world.signer.set(Mood::Fail);
    tokio::time::sleep(LIFE + HOUR).await;

    assert_eq!(world.status("bob").state, "expired");
    let refusal = world.identities.client_config(&alice, &bob).unwrap_err();
    assert!(refusal.to_string().contains("out to lunch"), "{refusal}");
    assert!(world.identities.server_config_for(&bob).is_err());
    let server = world.identities.server_config();
    let (_, answered) = shake(client, server, server_name(&bob)).await;
    assert_eq!(answered.err(), Some("unknown_server_name"));

    world.signer.set(Mood::Sign);
    tokio::time::sleep(Duration::from_secs(90)).await;
    assert_eq!(world.call("alice", "bob").await, Ok(()));
    assert_eq!(world.status("bob").last_error, None);
}

#[tokio::test(start_paused = true)]
async fn a_refusal_is_not_repeated_every_second() {
    let world = World::idle();
    world.signer.set(Mood::Refuse);
    world.want(&["bob"]);
    tokio::time::sleep(Duration::from_secs(200)).await;
    assert_eq!(world.asked_by("bob").len(), 1);
    assert!(
        world
            .status("bob")
            .last_error
            .unwrap()
            .contains("no such pod")
    );
    tokio::time::sleep(Duration::from_secs(200)).await;
    assert_eq!(world.asked_by("bob").len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_signer_that_hangs_panics_or_sends_nonsense_harms_nothing() {
    for (mood, said) in [
        (Mood::Hang, "no answer within 30 s"),
        (Mood::Panic, "the request ended"),
        (Mood::AnotherKey, "another key"),
        (Mood::AnotherIdentity, "wrong_identity"),
        (Mood::AnotherCa, "foreign_ca"),
        (Mood::Stale, "expired"),
    ] {
        let world = World::idle();
        world.signer.set(mood);
        world.want(&["bob"]);
        tokio::time::sleep(Duration::from_secs(31)).await;
        let status = world.status("bob");
        assert_eq!(status.state, "pending", "{mood:?}");
        let error = status.last_error.unwrap();
        assert!(error.contains(said), "{mood:?}: {error}");
        assert!(
            world
                .identities
                .server_config_for(&identity("bob"))
                .is_err()
        );

        world.signer.set(Mood::Sign);
        tokio::time::sleep(Duration::from_secs(90)).await;
        assert_eq!(world.status("bob").state, "ready", "{mood:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_clock_that_jumps_by_years_costs_half_a_minute() {
    let world = World::start(&["alice", "bob"]).await;
    world.clock.jump(400 * LIFE);
    assert_eq!(world.status("bob").state, "expired");
    tokio::time::sleep(Duration::from_secs(31)).await;
    assert_eq!(world.status("bob").state, "ready");
    assert_eq!(world.call("alice", "bob").await, Ok(()));
}

#[tokio::test(start_paused = true)]
async fn what_is_no_longer_wanted_serves_for_another_minute() {
    let world = World::start(&["alice", "bob"]).await;
    world.want(&["alice"]);
    tokio::time::sleep(Duration::from_secs(55)).await;
    assert_eq!(world.call("alice", "bob").await, Ok(()));
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert_eq!(world.call("alice", "bob").await, Err("unknown_server_name"));
    assert_eq!(world.identities.status().len(), 1);
    let name = server_name(&identity("bob")).to_str().into_owned();
    assert_eq!(world.identities.by_server_name(&name), None);
}

#[tokio::test(start_paused = true)]
async fn who_comes_back_within_the_minute_keeps_the_certificate() {
    let world = World::start(&["bob"]).await;
    let serial = world.status("bob").serial;
    world.want(&[]);
    tokio::time::sleep(Duration::from_secs(30)).await;
    world.want(&["bob"]);
    tokio::time::sleep(Duration::from_secs(120)).await;
    assert_eq!(world.status("bob").serial, serial);
    assert_eq!(world.asked_by("bob").len(), 1);
}

#[tokio::test(start_paused = true)]
async fn many_identities_at_once_do_not_flood_the_signer() {
    let names: Vec<String> = (0..100).map(|n| format!("sa-{n}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let world = World::start(&names).await;
    assert_eq!(world.signer.asked.lock().len(), 100);
    let most = world.signer.most_at_once.load(Ordering::SeqCst);
    assert!((2..=ASKING).contains(&most), "{most}");
}

#[tokio::test(start_paused = true)]
async fn a_client_configuration_is_the_same_until_certificate_or_bundle_change() {
    let world = World::start(&["alice"]).await;
    let config = || {
        let (alice, bob) = (identity("alice"), identity("bob"));
        world.identities.client_config(&alice, &bob).unwrap()
    };
    let first = config();
    assert!(Arc::ptr_eq(&first, &config()));

    let mut changed = world.identities.changed();
    changed.borrow_and_update();
    let ca = world.signer.ca.lock().clone();
    let both = bundle(&[&ca, &TestCa::new("two")]);
    world.signer.bundle.send_replace(Arc::new(both));
    changed.changed().await.unwrap();
    let second = config();
    assert!(!Arc::ptr_eq(&first, &second));

    changed.borrow_and_update();
    tokio::time::sleep(18 * HOUR).await;
    assert!(changed.has_changed().unwrap());
    assert!(!Arc::ptr_eq(&second, &config()));
}

#[tokio::test(start_paused = true)]
async fn client_configurations_are_bounded() {
    let world = World::start(&["alice"]).await;
    let alice = identity("alice");
    for n in 0..CLIENT_CONFIGS + 10 {
        let server = identity(&format!("s-{n}"));
        world.identities.client_config(&alice, &server).unwrap();
    }
    let kept = world.identities.table.load().held[&alice]
        .clients
        .load()
        .len();
    assert_eq!(kept, 10);
}

#[tokio::test(start_paused = true)]
async fn a_certificate_whose_anchor_is_gone_is_renewed_within_seconds() {
    let world = World::start(&["alice", "bob"]).await;
    let next = Arc::new(TestCa::new("two"));
    *world.signer.ca.lock() = next.clone();
    let only = Arc::new(bundle(&[&next]));
    world.signer.bundle.send_replace(only);
    tokio::time::sleep(Duration::from_secs(6)).await;
    assert_eq!(world.asked_by("bob").len(), 2);
    assert_eq!(world.call("alice", "bob").await, Ok(()));
}

#[tokio::test(start_paused = true)]
async fn the_driver_ends_when_told_and_when_nobody_is_left() {
    let World {
        identities, driver, ..
    } = World::start(&["bob"]).await;
    identities.stop();
    driver.await.unwrap();
    assert!(identities.server_config_for(&identity("bob")).is_ok());

    let World {
        identities, driver, ..
    } = World::start(&["bob"]).await;
    drop(identities);
    driver.await.unwrap();
}

/// Two agents with the same directory; the authority is replaced step by step, as an operator
/// does it, while they shake hands without a pause.
#[tokio::test(start_paused = true)]
async fn no_handshake_fails_while_the_authority_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let clock = TestClock::new();
    let open = || LocalCa::open(dir.path(), TRUST_DOMAIN.into(), LIFE, clock.clone()).unwrap();
    let (left_ca, right_ca) = (open(), open());
    let watches = [
        tokio::spawn(left_ca.clone().watch()),
        tokio::spawn(right_ca.clone().watch()),
    ];
    let settings = || Settings {
        clock: clock.clone(),
        ..Settings::new(TRUST_DOMAIN.into())
    };
    let (left, _left) = Identities::start(left_ca, settings()).unwrap();
    let (right, _right) = Identities::start(right_ca, settings()).unwrap();
    left.set_wanted([identity("alice")].into());
    right.set_wanted([identity("bob")].into());
    tokio::time::sleep(Duration::from_secs(1)).await;
    let call = || async {
        let client = left.client_config(&identity("alice"), &identity("bob"));
        let name = server_name(&identity("bob"));
        shake(client.unwrap(), right.server_config(), name).await
    };
    let (called, answered) = call().await;
    let (mut standing_client, mut standing_server) = (called.unwrap(), answered.unwrap());
    let mut handshakes = 0;
    let mut load = async |seconds: u64| {
        for _ in 0..seconds * 4 {
            let (called, answered) = call().await;
            assert_eq!(called.err(), None);
            assert_eq!(answered.err(), None);
            handshakes += 1;
            tokio::time::sleep(Duration::from_millis(250)).await;
        }
    };

    let fresh = tempfile::tempdir().unwrap();
    LocalCa::open(fresh.path(), TRUST_DOMAIN.into(), LIFE, clock.clone()).unwrap();
    let file = |dir: &tempfile::TempDir, name: &str| dir.path().join(name);
    let text = |dir: &tempfile::TempDir, name: &str| std::fs::read(file(dir, name)).unwrap();
    let old_serial = right.status()[0].serial.clone();
    load(2).await;
    // The new anchor joins the old one, everywhere.
    let new_anchor = text(&fresh, "ca.crt");
    let both = [text(&dir, "ca.crt"), new_anchor.clone()].concat();
    std::fs::write(file(&dir, "ca.crt"), both).unwrap();
    load(4).await;
    // The new authority signs; the files are replaced one after the other.
    std::fs::write(file(&dir, "tls.crt"), text(&fresh, "tls.crt")).unwrap();
    load(3).await;
    std::fs::write(file(&dir, "tls.key"), text(&fresh, "tls.key")).unwrap();
    load(3).await;
    assert_eq!(right.status()[0].serial, old_serial);
    // Everybody renews; then the old anchor can go.
    tokio::time::sleep(18 * HOUR).await;
    assert_ne!(right.status()[0].serial, old_serial);
    load(2).await;
    std::fs::write(file(&dir, "ca.crt"), new_anchor).unwrap();
    load(5).await;

    assert_eq!(handshakes, 19 * 4);
    let renewals: Vec<u64> = [&left, &right].map(|ids| ids.status()[0].renewals).into();
    assert_eq!(renewals, [1, 1]);
    ping(&mut standing_client, &mut standing_server).await;
    for watch in watches {
        watch.abort();
    }
}

#[tokio::test(start_paused = true)]
async fn what_an_agent_left_serves_at_once_and_nobody_is_asked() {
    let before = World::start(&["alice", "bob"]).await;
    let left = before.identities.held();
    assert_eq!(left.len(), 2);
    before.driver.abort();
    before.signer.set(Mood::Fail);

    let world = before.next(left.clone());
    assert_eq!(world.call("alice", "bob").await, Ok(()));
    world.want(&["alice", "bob"]);
    tokio::time::sleep(HOUR).await;
    assert_eq!(world.call("alice", "bob").await, Ok(()));
    for name in ["alice", "bob"] {
        assert_eq!(world.status(name).state, "ready");
        assert!(
            world.asked_by(name).len() == 1,
            "asked by the first agent only"
        );
    }
    // Whom nobody wants is forgotten as ever.
    world.want(&["alice"]);
    tokio::time::sleep(HOUR).await;
    assert_eq!(world.identities.held().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn what_was_left_and_is_expired_foreign_or_anothers_is_not_used() {
    let before = World::start(&["alice", "bob"]).await;
    let left = before.identities.held();
    before.driver.abort();

    // Another's key, another's certificate, no key at all, no certificate at all.
    let (alice, bob) = (&left[0], &left[1]);
    let swapped = [
        Held {
            pkcs8: bob.pkcs8.clone(),
            ..alice.clone()
        },
        Held {
            chain: alice.chain.clone(),
            pkcs8: alice.pkcs8.clone(),
            ..bob.clone()
        },
    ];
    let broken = [
        Held {
            pkcs8: Arc::from(&b"no key"[..]),
            ..alice.clone()
        },
        Held {
            chain: Vec::new(),
            ..bob.clone()
        },
    ];
    for wrong in [swapped, broken] {
        let world = before.next(wrong.to_vec());
        assert!(world.identities.held().is_empty());
        world.driver.abort();
    }

    // Of an authority that is not this one.
    let other = World::idle();
    let (foreign, driver) = Identities::start_with(
        other.signer.clone(),
        Settings {
            clock: other.clock.clone(),
            ..Settings::new(TRUST_DOMAIN.into())
        },
        left.clone(),
    )
    .unwrap();
    assert!(foreign.held().is_empty());
    driver.abort();

    before.clock.jump(LIFE + HOUR);
    let late = before.next(left);
    assert!(late.identities.held().is_empty());
    assert!(
        late.identities
            .client_config(&identity("alice"), &identity("bob"))
            .is_err()
    );
}

struct World {
    clock: Arc<TestClock>,
    signer: Arc<TestSigner>,
    identities: Identities,
    driver: JoinHandle<()>,
}

impl World {
    fn idle() -> Self {
        let clock = TestClock::new();
        let signer = TestSigner::new(clock.clone());
        let settings = Settings {
            clock: clock.clone(),
            ..Settings::new(TRUST_DOMAIN.into())
        };
        let (identities, driver) = Identities::start(signer.clone(), settings).unwrap();
        Self {
            clock,
            signer,
            identities,
            driver,
        }
    }

    /// The next agent of the same node and signer, with what this one left.
    fn next(&self, held: Vec<Held>) -> Self {
        let settings = Settings {
            clock: self.clock.clone(),
            ..Settings::new(TRUST_DOMAIN.into())
        };
        let (identities, driver) =
            Identities::start_with(self.signer.clone(), settings, held).unwrap();
        Self {
            clock: self.clock.clone(),
            signer: self.signer.clone(),
            identities,
            driver,
        }
    }

    /// Wants these and waits until all of them have a certificate.
    async fn start(names: &[&str]) -> Self {
        let world = Self::idle();
        let mut changed = world.identities.changed();
        world.want(names);
        let ready = async {
            while world.identities.status().len() < names.len()
                || world.identities.status().iter().any(|s| s.state != "ready")
            {
                changed.changed().await.unwrap();
            }
        };
        tokio::time::timeout(HOUR, ready).await.unwrap();
        world
    }

    fn want(&self, names: &[&str]) {
        let wanted = names.iter().map(|name| identity(name)).collect();
        self.identities.set_wanted(wanted);
    }

    fn status(&self, name: &str) -> CertificateStatus {
        let id = identity(name).to_string();
        let status = self.identities.status();
        status.into_iter().find(|s| s.identity == id).unwrap()
    }

    fn asked_by(&self, name: &str) -> Vec<Instant> {
        let id = identity(name);
        let asked = self.signer.asked.lock();
        asked
            .iter()
            .filter(|(who, _)| *who == id)
            .map(|(_, at)| *at)
            .collect()
    }

    /// A handshake on the tunnel port; the server's word if it fails.
    async fn call(&self, from: &str, to: &str) -> Result<(), &'static str> {
        let client = self
            .identities
            .client_config(&identity(from), &identity(to))
            .unwrap();
        let name = server_name(&identity(to));
        let (called, answered) = shake(client, self.identities.server_config(), name).await;
        answered.and(called).map(drop)
    }
}

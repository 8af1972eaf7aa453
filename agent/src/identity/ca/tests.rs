use std::{os::unix::fs::PermissionsExt, sync::Barrier};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyUsagePurpose, SanType,
};
use tempfile::TempDir;
use x509_parser::{certificate::X509Certificate, extensions::GeneralName, prelude::FromDer};

use super::*;
use crate::identity::{
    authority::{CA_LIFE, at, params},
    clock::TestClock,
    csr::Request,
    peer_identity,
    testing::*,
};

#[test]
fn agents_that_start_at_once_end_with_the_same_authority() {
    for _ in 0..10 {
        let dir = tempfile::tempdir().unwrap();
        let inside = dir.path().join("made/by/them");
        let start = Barrier::new(8);
        let bundles: Vec<Arc<Bundle>> = std::thread::scope(|scope| {
            let agents: Vec<_> = (0..8)
                .map(|_| {
                    scope.spawn(|| {
                        start.wait();
                        let clock = Arc::new(super::super::clock::SystemClock);
                        let ca = LocalCa::open(&inside, TRUST_DOMAIN.into(), LIFE, clock).unwrap();
                        sign(&ca, "alice").unwrap();
                        ca.bundle().borrow().clone()
                    })
                })
                .collect();
            agents
                .into_iter()
                .map(|agent| agent.join().unwrap())
                .collect()
        });
        assert!(bundles.iter().all(|bundle| *bundle == bundles[0]));
    }
}

#[test]
fn the_key_is_for_its_owner_alone() {
    let world = World::new();
    world.open().unwrap();
    let mode = |name: &str| fs::metadata(world.file(name)).unwrap().mode() & 0o777;
    assert_eq!(mode("tls.key"), 0o600);
    assert_eq!(mode(".lock"), 0o600);
    assert_eq!(mode("tls.crt") & 0o022, 0);
    assert_eq!(mode("ca.crt") & 0o022, 0);
}

#[test]
fn what_others_could_read_or_change_is_refused_with_the_remedy() {
    for (name, mode, remedy) in [
        ("tls.key", 0o640, "chmod 600"),
        ("tls.key", 0o604, "chmod 600"),
        ("tls.crt", 0o664, "chmod 644"),
        ("ca.crt", 0o646, "chmod 644"),
        ("", 0o770, "chmod 700"),
        ("", 0o707, "chmod 700"),
    ] {
        let world = World::new();
        world.open().unwrap();
        fs::set_permissions(world.file(name), fs::Permissions::from_mode(mode)).unwrap();
        let error = world.open().err().unwrap().to_string();
        assert!(error.contains(remedy), "{name}: {error}");
        assert!(error.contains(&format!("{mode:04o}")), "{name}: {error}");
    }
}

#[test]
fn a_creation_that_was_cut_short_is_finished_with_the_same_key() {
    for missing in [&["ca.crt"][..], &["ca.crt", "tls.crt"]] {
        let world = World::new();
        world.open().unwrap();
        let key = world.read("tls.key");
        for name in missing {
            fs::remove_file(world.file(name)).unwrap();
        }
        sign(&world.open().unwrap(), "alice").unwrap();
        assert_eq!(world.read("tls.key"), key);
        assert_eq!(world.read("ca.crt"), world.read("tls.crt"));
    }
}

#[test]
fn an_authority_with_a_part_missing_is_not_replaced_by_a_new_one() {
    for missing in ["tls.key", "tls.crt"] {
        let world = World::new();
        world.open().unwrap();
        fs::remove_file(world.file(missing)).unwrap();
        let error = world.open().err().unwrap().to_string();
        assert!(error.contains(missing), "{error}");
        assert!(!world.file(missing).exists());
    }
}

#[test]
fn files_that_do_not_fit_are_refused_and_named() {
    let other = World::new();
    other.open().unwrap();
    for (name, content, said) in [
        (
            "tls.key",
            other.read("tls.key"),
            "tls.crt: is not the certificate of tls.key",
        ),
        (
            "tls.key",
            b"secret words".to_vec(),
            "tls.key: is not a private key",
        ),
        ("tls.key", vec![0xff; 9], "tls.key: is not PEM"),
        ("tls.crt", Vec::new(), "tls.crt: holds no certificate"),
        (
            "ca.crt",
            other.read("ca.crt"),
            "(foreign_ca): add its root to ca.crt",
        ),
        (
            "ca.crt",
            vec![b'a'; MAX_FILE as usize + 1],
            "ca.crt: has 1048577 bytes",
        ),
    ] {
        let world = World::new();
        world.open().unwrap();
        fs::write(world.file(name), content).unwrap();
        let error = world.open().err().unwrap().to_string();
        assert!(error.contains(said), "{error}");
        assert!(!error.contains("secret"), "{error}");
    }
}

#[test]
fn a_certificate_says_who_and_nothing_more() {
    let world = World::new();
    let ca = world.open().unwrap();
    let signed = sign(&ca, "alice").unwrap();
    // The issuer is an anchor: peers have it.
    assert_eq!(signed.chain.len(), 1);
    assert_eq!(peer_identity(&signed.chain[0]).unwrap(), identity("alice"));

    let (_, leaf) = X509Certificate::from_der(&signed.chain[0]).unwrap();
    let names = &leaf
        .subject_alternative_name()
        .unwrap()
        .unwrap()
        .value
        .general_names;
    assert!(matches!(names[..], [GeneralName::URI(_)]));
    assert!(!leaf.is_ca());
    let usage = leaf.key_usage().unwrap().unwrap().value;
    assert!(usage.digital_signature() && !usage.key_cert_sign());
    let purposes = leaf.extended_key_usage().unwrap().unwrap().value;
    assert!(purposes.client_auth && purposes.server_auth && !purposes.any);
    let (now, validity) = (world.clock.now(), leaf.validity());
    assert!(close(at(validity.not_before.timestamp()), now - SKEW));
    assert!(close(at(validity.not_after.timestamp()), now + LIFE));
}

#[test]
fn what_is_signed_lives_as_long_as_the_agent_was_told() {
    let world = World::new();
    let ca = world.open_for(Duration::from_secs(120)).unwrap();
    let signed = sign(&ca, "alice").unwrap();
    let (_, leaf) = X509Certificate::from_der(&signed.chain[0]).unwrap();
    let end = at(leaf.validity().not_after.timestamp());
    assert!(close(end, world.clock.now() + Duration::from_secs(120)));
}

#[test]
fn whatever_else_a_request_asks_for_is_ignored() {
    let world = World::new();
    let ca = world.open().unwrap();
    let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
    let mut greedy = CertificateParams::new(["bank.example".to_owned()]).unwrap();
    greedy.subject_alt_names.push(SanType::URI(
        "spiffe://cluster.local/ns/kube-system/sa/admin"
            .try_into()
            .unwrap(),
    ));
    greedy.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    greedy.extended_key_usages = vec![ExtendedKeyUsagePurpose::Any];
    let csr = greedy.serialize_request(&key).unwrap().der().to_vec();
    let signed = ca.sign_now(&identity("alice"), &csr).unwrap();

    let (_, leaf) = X509Certificate::from_der(&signed.chain[0]).unwrap();
    let names = &leaf
        .subject_alternative_name()
        .unwrap()
        .unwrap()
        .value
        .general_names;
    assert_eq!(names.len(), 1);
    assert_eq!(peer_identity(&signed.chain[0]).unwrap(), identity("alice"));
    assert_eq!(leaf.subject().iter().count(), 0);
    assert!(!leaf.key_usage().unwrap().unwrap().value.key_cert_sign());
    assert!(!leaf.extended_key_usage().unwrap().unwrap().value.any);
    assert_eq!(
        leaf.public_key().subject_public_key.data.as_ref(),
        key.public_key_raw()
    );
}

#[test]
fn identities_that_are_not_ours_to_give_are_refused() {
    let world = World::new();
    let ca = world.open().unwrap();
    let alice = identity("alice");
    for wrong in [
        Identity {
            trust_domain: "elsewhere".into(),
            ..alice.clone()
        },
        Identity {
            service_account: "a/../b".into(),
            ..alice.clone()
        },
        Identity {
            namespace: "".into(),
            ..alice.clone()
        },
    ] {
        let csr = Request::new(&alice).unwrap().der;
        let error = ca.sign_now(&wrong, &csr).unwrap_err();
        assert!(matches!(error, SignError::Refused { .. }), "{error}");
    }
    let error = ca.sign_now(&alice, b"not a request").unwrap_err();
    assert!(matches!(error, SignError::Refused { .. }), "{error}");
}

#[test]
fn no_certificate_outlives_its_authority() {
    let world = World::new();
    let ca = world.open().unwrap();
    world.clock.jump(CA_LIFE - LIFE / 2);
    let signed = sign(&ca, "alice").unwrap();
    let (_, leaf) = X509Certificate::from_der(&signed.chain[0]).unwrap();
    let end = at(leaf.validity().not_after.timestamp());
    assert!(end <= world.clock.now() + LIFE / 2);

    world.clock.jump(LIFE);
    let error = sign(&ca, "alice").unwrap_err();
    assert!(error.to_string().contains("rotate"), "{error}");
    assert!(matches!(error, SignError::Unavailable(_)), "{error}");
}

#[test]
fn an_intermediate_issuer_travels_with_what_it_signs_if_it_may_sign() {
    let world = World::new();
    let (from, to) = (world.clock.now() - SKEW, world.clock.now() + CA_LIFE);
    let root_key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
    let mut root = params(from, to);
    root.distinguished_name.push(DnType::CommonName, "root");
    root.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let root_pem = root.self_signed(&root_key).unwrap().pem();
    let issuer = Issuer::from_params(&root, root_key);
    let install = |is_ca: IsCa| {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
        let mut between = params(from, to);
        between
            .distinguished_name
            .push(DnType::CommonName, "between");
        between.is_ca = is_ca;
        let pem = between.signed_by(&key, &issuer).unwrap().pem();
        write(
            &world.file("tls.key"),
            0o600,
            key.serialize_pem().as_bytes(),
        )
        .unwrap();
        write(&world.file("tls.crt"), 0o644, pem.as_bytes()).unwrap();
        write(&world.file("ca.crt"), 0o644, root_pem.as_bytes()).unwrap();
    };

    install(IsCa::Ca(BasicConstraints::Constrained(0)));
    let signed = sign(&world.open().unwrap(), "alice").unwrap();
    assert_eq!(signed.chain.len(), 2);

    install(IsCa::ExplicitNoCa);
    let error = world.open().err().unwrap().to_string();
    assert!(error.contains("may sign"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn changes_of_the_files_are_followed_and_half_done_ones_are_not() {
    let (world, next) = (World::new(), World::new());
    let ca = world.open().unwrap();
    next.open().unwrap();
    let watch = tokio::spawn(ca.clone().watch());
    let bundle = ca.bundle();
    let anchors = || bundle.borrow().anchors.len();
    let settle = || tokio::time::sleep(Duration::from_secs(4));
    let issued_by_next = || {
        let signed = sign(&ca, "alice").unwrap();
        let (_, leaf) = X509Certificate::from_der(&signed.chain[0]).unwrap();
        let issuer = next.read("tls.crt");
        let issuer = CertificateDer::from_pem_slice(&issuer).unwrap();
        let (_, issuer) = X509Certificate::from_der(&issuer).unwrap();
        leaf.issuer() == issuer.subject()
    };
    settle().await;
    assert_eq!(anchors(), 1);

    let both = [world.read("ca.crt"), next.read("ca.crt")].concat();
    fs::write(world.file("ca.crt"), &both).unwrap();
    settle().await;
    assert_eq!(anchors(), 2);
    assert!(!issued_by_next());

    fs::write(world.file("tls.crt"), next.read("tls.crt")).unwrap();
    settle().await;
    assert!(!issued_by_next());

    fs::write(world.file("tls.key"), next.read("tls.key")).unwrap();
    settle().await;
    assert!(issued_by_next());

    fs::write(world.file("ca.crt"), b"-----BEGIN CERTIFICATE-----\nhalf").unwrap();
    settle().await;
    assert_eq!(anchors(), 2);
    fs::write(world.file("ca.crt"), next.read("ca.crt")).unwrap();
    settle().await;
    assert_eq!(anchors(), 1);
    watch.abort();
}

struct World {
    dir: TempDir,
    clock: Arc<TestClock>,
}

impl World {
    /// A directory and a clock that stands (outside of tokio's paused time it moves as time does).
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            clock: TestClock::new(),
        }
    }

    fn open(&self) -> Result<Arc<LocalCa>, CaError> {
        self.open_for(LIFE)
    }

    fn open_for(&self, life: Duration) -> Result<Arc<LocalCa>, CaError> {
        LocalCa::open(
            self.dir.path(),
            TRUST_DOMAIN.into(),
            life,
            self.clock.clone(),
        )
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.file(name)).unwrap()
    }
}

/// Certificates count whole seconds.
fn close(a: SystemTime, b: SystemTime) -> bool {
    let apart = a.duration_since(b).unwrap_or_else(|error| error.duration());
    apart < Duration::from_secs(2)
}

fn sign(ca: &LocalCa, name: &str) -> Result<Signed, SignError> {
    let identity = identity(name);
    ca.sign_now(&identity, &Request::new(&identity).unwrap().der)
}

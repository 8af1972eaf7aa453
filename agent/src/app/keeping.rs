//! Keeps the snapshot: what the next agent begins with if its sources are away, and what this one
//! finds of the one before.
//!
//! Written soon after a change, and only while this agent is the one that repairs: a successor that
//! has committed writes its own. Nothing here may fail a start.

use std::{
    fs,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use rustls::pki_types::CertificateDer;
use tokio::{sync::watch, task::spawn_blocking, time::sleep};
use tracing::{info, warn};

use crate::{
    config::{Config, Source},
    identity::{Bundle, Held, Identities},
    local::Texts,
    snapshot::{self, Der, HeldKey, Keys, Origin, State},
    state::{Identity, objects::Objects},
};

/// After a change its companions are waited for.
const GATHER: Duration = Duration::from_millis(300);
/// A large cluster changes all the time, and each time all of it is written.
const GATHER_OBJECTS: Duration = Duration::from_secs(5);

/// After a write that failed.
const AGAIN: Duration = Duration::from_secs(30);
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Where the snapshot lies and what must stand on it.
#[derive(Clone)]
pub(super) struct Keeper {
    dir: Arc<Path>,
    state: Origin,
    keys: Origin,
    /// Keys may be written: what is in `dir` ends with the boot.
    in_memory: bool,
}

/// What is in force, as its source gives it.
pub(super) enum Kept {
    Texts(watch::Receiver<Arc<Texts>>),
    Objects(watch::Receiver<Arc<Objects>>),
}

impl Kept {
    fn gather(&self) -> Duration {
        match self {
            Self::Texts(_) => GATHER,
            Self::Objects(_) => GATHER_OBJECTS,
        }
    }

    async fn changed(&mut self) -> Result<(), watch::error::RecvError> {
        match self {
            Self::Texts(texts) => texts.changed().await,
            Self::Objects(objects) => objects.changed().await,
        }
    }

    fn now(&mut self) -> Content {
        match self {
            Self::Texts(texts) => Content::Texts(texts.borrow_and_update().clone()),
            Self::Objects(objects) => Content::Objects(objects.borrow_and_update().clone()),
        }
    }
}

#[derive(PartialEq)]
enum Content {
    Texts(Arc<Texts>),
    Objects(Arc<Objects>),
}

impl Content {
    fn encode(&self) -> Vec<u8> {
        match self {
            Self::Texts(texts) => State {
                manifests: texts
                    .iter()
                    .map(|(name, text)| (name.clone(), text.to_string()))
                    .collect(),
                objects: Vec::new(),
            }
            .encode(),
            Self::Objects(objects) => State::encode_objects(objects),
        }
    }
}

/// What an agent before knew of identities.
pub(super) struct Known {
    pub(super) bundle: Bundle,
    pub(super) held: Vec<Held>,
}

impl Keeper {
    pub(super) fn new(config: &Config) -> Self {
        let boot = fs::read_to_string(BOOT_ID).unwrap_or_else(|error| {
            warn!(file = BOOT_ID, %error, "cannot tell one boot from another: no snapshot is kept");
            String::new()
        });
        let origin = |source: String| Origin {
            boot: boot.trim().to_owned(),
            node: config.mesh.node.to_string(),
            trust_domain: config.mesh.trust_domain.to_string(),
            source,
        };
        let (state, keys) = match &config.source {
            Source::Local { manifests, ca_dir } => (
                manifests.display().to_string(),
                ca_dir.display().to_string(),
            ),
            Source::Cluster { namespace, .. } => {
                let cluster = format!("Kubernetes {}", config.mesh.cluster);
                let signer = format!("{cluster} {namespace}");
                (cluster, signer)
            }
        };
        let in_memory = snapshot::is_memory(&config.run_dir);
        if !in_memory {
            warn!(
                run_dir = %config.run_dir.display(),
                "--run-dir is no tmpfs, so no keys are kept there: after a restart new certificates \
                 are asked for"
            );
        }
        Self {
            dir: config.run_dir.clone().into(),
            state: origin(state),
            keys: origin(keys),
            in_memory,
        }
    }

    /// The manifests of the agent before.
    pub(super) fn texts(&self) -> Option<Texts> {
        let texts = self.state()?.manifests.into_iter();
        Some(texts.map(|(name, text)| (name, text.into())).collect())
    }

    /// The same on a cluster.
    pub(super) fn objects(&self) -> Option<Objects> {
        let mut objects = Objects::default();
        for object in self.state()?.objects {
            objects.insert(object);
        }
        Some(objects)
    }

    fn state(&self) -> Option<State> {
        let body = self.read(snapshot::STATE, &self.state)?;
        State::decode(&body)
            .map_err(|error| ignored(snapshot::STATE, &error))
            .ok()
    }

    /// The keys of the agent before; which of them are still good, `identity` sees.
    pub(super) fn known(&self) -> Option<Known> {
        if !self.in_memory {
            return None;
        }
        let body = self.read(snapshot::KEYS, &self.keys)?;
        let keys = Keys::decode(&body).map_err(|error| ignored(snapshot::KEYS, &error));
        let Keys { anchors, held } = keys.ok()?;
        let held = held.into_iter().filter_map(|held| {
            let Some(identity) = Identity::from_spiffe_id(&held.identity) else {
                ignored(
                    snapshot::KEYS,
                    &format!("{:?} is no identity", held.identity),
                );
                return None;
            };
            Some(Held {
                identity,
                chain: held.chain.into_iter().map(certificate).collect(),
                pkcs8: held.key.0.into(),
            })
        });
        let known = Known {
            held: held.collect(),
            bundle: Bundle {
                anchors: anchors.into_iter().map(certificate).collect(),
            },
        };
        (!known.bundle.anchors.is_empty()).then_some(known)
    }

    fn read(&self, name: &'static str, origin: &Origin) -> Option<Vec<u8>> {
        match snapshot::read(&self.dir, name, origin) {
            Ok(body) => body,
            Err(error) => {
                ignored(name, &error);
                None
            }
        }
    }

    /// Writes after every change, while `writes` says so.
    pub(super) async fn keep(
        self,
        mut kept: Kept,
        identities: Identities,
        bundle: watch::Receiver<Arc<Bundle>>,
        writes: Arc<AtomicBool>,
    ) {
        if self.state.boot.is_empty() {
            // It would never count.
            return;
        }
        let mut certificates = identities.changed();
        // What was there before we came is not trusted to be ours.
        let (mut written, mut keys_due) = (None, self.in_memory);
        loop {
            sleep(kept.gather()).await;
            if !writes.load(Ordering::Acquire) {
                // Ours counts again if the successor that had committed is dead.
                continue;
            }
            let now = kept.now();
            let mut failed = false;
            if written.as_ref() != Some(&now) {
                let state = now.encode();
                if self.write(snapshot::STATE, self.state.clone(), state).await {
                    written = Some(now);
                } else {
                    failed = true;
                }
            }
            if keys_due {
                let keys = encode_keys(&identities, &bundle.borrow());
                keys_due = !self.write(snapshot::KEYS, self.keys.clone(), keys).await;
                failed |= keys_due;
            }
            tokio::select! {
                changed = kept.changed() => if changed.is_err() {
                    // The source is no longer read; the keys may still change.
                    sleep(Duration::from_secs(1)).await;
                },
                changed = certificates.changed() => match changed {
                    Ok(()) => keys_due = self.in_memory,
                    Err(_) => return,
                },
                () = sleep(AGAIN), if failed => {}
            }
        }
    }

    /// True: it is written.
    async fn write(&self, name: &'static str, origin: Origin, body: Vec<u8>) -> bool {
        let dir = self.dir.clone();
        let written = spawn_blocking(move || snapshot::write(&dir, name, &origin, &body)).await;
        match written {
            Ok(Ok(())) => return true,
            Ok(Err(error)) => warn!(%error, "no snapshot"),
            Err(error) => warn!(%error, "no snapshot"),
        }
        // One that is older than what is in force would be worse than none.
        snapshot::remove(&self.dir, name);
        false
    }
}

fn encode_keys(identities: &Identities, bundle: &Bundle) -> Vec<u8> {
    let der = |certificate: &CertificateDer<'_>| Der(certificate.to_vec());
    let held = identities.held().into_iter().map(|held| HeldKey {
        identity: held.identity.to_string(),
        chain: held.chain.iter().map(der).collect(),
        key: Der(held.pkcs8.to_vec()),
    });
    Keys {
        anchors: bundle.anchors.iter().map(der).collect(),
        held: held.collect(),
    }
    .encode()
}

fn certificate(der: Der) -> CertificateDer<'static> {
    CertificateDer::from(der.0)
}

fn ignored(name: &str, error: &dyn std::fmt::Display) {
    info!(snapshot = name, %error, "a snapshot does not count and is ignored");
}

#[cfg(test)]
mod tests {
    use crate::identity::{
        self, ca::LocalCa, clock::SystemClock, manager::Settings as IdentitySettings,
    };

    use super::*;

    fn keeper(dir: &Path, boot: &str) -> Keeper {
        let origin = Origin {
            boot: boot.into(),
            node: "node-1".into(),
            trust_domain: "cluster.local".into(),
            source: "/etc/manifests".into(),
        };
        Keeper {
            dir: dir.into(),
            state: origin.clone(),
            keys: origin,
            in_memory: true,
        }
    }

    /// Keeps in `dir` until the test ends.
    fn keep(keeper: Keeper, authority: &Path) -> watch::Sender<Arc<Texts>> {
        let (texts, seen) = watch::channel(Arc::default());
        let life = Duration::from_secs(3600);
        let clock = Arc::new(SystemClock);
        let authority = LocalCa::open(authority, "cluster.local".into(), life, clock).unwrap();
        let bundle = identity::Signer::bundle(&*authority);
        let settings = IdentitySettings::new("cluster.local".into());
        let (identities, _driver) = Identities::start(authority, settings).unwrap();
        let writes = Arc::new(AtomicBool::new(true));
        tokio::spawn(keeper.keep(Kept::Texts(seen), identities, bundle, writes));
        texts
    }

    #[tokio::test(start_paused = true)]
    async fn what_could_not_be_written_is_written_later_although_nothing_changed() {
        let dir = tempfile::tempdir().unwrap();
        let run_dir = dir.path().join("run");
        let _texts = keep(keeper(&run_dir, "boot-1"), &dir.path().join("ca"));
        sleep(2 * GATHER).await;
        fs::create_dir(&run_dir).unwrap();
        sleep(AGAIN + 2 * GATHER).await;
        for name in [snapshot::STATE, snapshot::KEYS] {
            assert!(run_dir.join(name).is_file(), "{name}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_kept_where_nobody_knows_which_boot_this_is() {
        let dir = tempfile::tempdir().unwrap();
        let run_dir = dir.path().join("run");
        fs::create_dir(&run_dir).unwrap();
        let _texts = keep(keeper(&run_dir, ""), &dir.path().join("ca"));
        sleep(2 * AGAIN).await;
        assert_eq!(fs::read_dir(&run_dir).unwrap().count(), 0);
    }
}

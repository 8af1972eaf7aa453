//! How long an agent that starts waits for its certificates.
//!
//! What an agent before left is there at once. The rest takes a signer, and one that does not come
//! must not keep all others: neither the agent from being ready, nor its predecessor from leaving.
//! `MeshNode` and `debug certificates` tell of it for as long as it lasts.

use std::time::Duration;

use tokio::{
    task::{JoinError, JoinHandle},
    time::{sleep, timeout},
};
use tracing::warn;

use super::AS_READY;
use crate::{
    identity::{CertificateStatus, Identities},
    readiness::Task,
};

/// Where the signer starts with the agents, it signs by then.
const PATIENCE: Duration = Duration::from_secs(60);
/// Not every word of the manager is a change.
const LOOK: Duration = Duration::from_millis(100);

/// Drops its guard when every certificate that is wanted is there or refused, or it has waited for
/// long enough.
pub(super) async fn follow(identities: Identities, held: Task) {
    match timeout(PATIENCE, arrive(&identities)).await {
        // Nobody asks any more.
        Ok(false) => return,
        Ok(true) => {}
        Err(_elapsed) => {
            let missing = identities.status();
            let missing = missing.iter().filter(|one| is_awaited(one)).count();
            warn!(
                missing,
                "certificates do not come; serving those who have theirs"
            );
        }
    }
    held.done();
}

/// A predecessor goes on until this returns: what it has in hand must not be missed by anybody.
pub(super) async fn in_hand(follow: &mut JoinHandle<()>) -> Result<(), JoinError> {
    // Late is as good: it has gone on serving, and cannot get what we do not get.
    timeout(AS_READY, follow).await.unwrap_or(Ok(()))
}

/// `false`: the manager has ended.
async fn arrive(identities: &Identities) -> bool {
    let mut changed = identities.changed();
    // The manager takes up what is wanted in a moment; a list that is empty still is no answer.
    sleep(Duration::from_millis(10)).await;
    while identities.status().iter().any(is_awaited) {
        tokio::select! {
            changed = changed.changed() => if changed.is_err() { return false },
            () = sleep(LOOK) => {}
        }
    }
    true
}

fn is_awaited(certificate: &CertificateStatus) -> bool {
    certificate.state != "ready" && !certificate.refused
}

#[cfg(test)]
mod tests {
    use std::{future::Future, pin::Pin, sync::Arc};

    use tokio::{sync::watch, time::Instant};

    use super::*;
    use crate::{
        identity::{
            Bundle, Settings, SignError, Signed, Signer,
            ca::LocalCa,
            clock::{Clock, SystemClock},
        },
        readiness::Readiness,
        state::Identity,
    };

    /// Signs for all but `shop/odd`.
    struct Odd {
        authority: Arc<LocalCa>,
        refuses: bool,
    }

    impl Signer for Odd {
        fn sign<'a>(
            &'a self,
            identity: &'a Identity,
            csr: Vec<u8>,
        ) -> Pin<Box<dyn Future<Output = Result<Signed, SignError>> + Send + 'a>> {
            if &*identity.service_account != "odd" {
                return self.authority.sign(identity, csr);
            }
            let refused = self.refuses.then(|| SignError::Refused {
                identity: identity.clone(),
                reason: "WrongLife".into(),
            });
            Box::pin(async {
                match refused {
                    Some(error) => Err(error),
                    None => std::future::pending().await,
                }
            })
        }

        fn bundle(&self) -> watch::Receiver<Arc<Bundle>> {
            self.authority.bundle()
        }
    }

    fn identity(account: &str) -> Identity {
        Identity::from_spiffe_id(&format!("spiffe://cluster.local/ns/shop/sa/{account}")).unwrap()
    }

    /// Of an agent that wants certificates for these accounts.
    struct World {
        readiness: Readiness,
        identities: Identities,
        follow: JoinHandle<()>,
        begun: Instant,
        _ca_dir: tempfile::TempDir,
    }

    impl World {
        fn start(accounts: &[&str], refuses: bool) -> Self {
            let ca_dir = tempfile::tempdir().unwrap();
            let clock: Arc<dyn Clock> = Arc::new(SystemClock);
            let life = Duration::from_secs(3600);
            let authority =
                LocalCa::open(ca_dir.path(), "cluster.local".into(), life, clock).unwrap();
            let signer = Odd { authority, refuses };
            let settings = Settings::new("cluster.local".into());
            let (identities, _driver) = Identities::start(Arc::new(signer), settings).unwrap();
            identities.set_wanted(accounts.iter().map(|account| identity(account)).collect());
            let readiness = Readiness::new();
            let held = readiness.register("certificates");
            Self {
                follow: tokio::spawn(follow(identities.clone(), held)),
                readiness,
                identities,
                begun: Instant::now(),
                _ca_dir: ca_dir,
            }
        }

        async fn ready(&self) -> Duration {
            while !self.readiness.pending().is_empty() {
                sleep(Duration::from_millis(20)).await;
            }
            self.begun.elapsed()
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_refused_certificate_keeps_nobody_waiting() {
        let mut world = World::start(&["odd", "web"], true);
        let took = world.ready().await;
        assert!(took < Duration::from_secs(2), "{took:?}");
        assert!(world.identities.holds(&identity("web")));
        in_hand(&mut world.follow).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_does_not_come_is_waited_for_a_minute_and_keeps_no_predecessor() {
        let mut world = World::start(&["odd", "web"], false);
        in_hand(&mut world.follow).await.unwrap();
        let took = world.begun.elapsed();
        assert!(took < AS_READY + Duration::from_secs(1), "{took:?}");
        assert!(world.identities.holds(&identity("web")));
        // It is not ready all the same: the signer may be starting, too.
        assert_eq!(world.readiness.pending(), ["certificates"]);
        let took = world.ready().await;
        assert!(took >= PATIENCE, "{took:?}");
        assert!(took < PATIENCE + Duration::from_secs(1), "{took:?}");
    }
}

//! An authority that is away at start, of an agent that has certificates and knows the anchors from
//! the one before it: it signs nothing until it is there, and the known anchors are in force.
//!
//! `app` uses it in local mode, when `--ca-dir` cannot be read and a snapshot can.

use std::{
    future::Future,
    path::PathBuf,
    pin::Pin,
    sync::{Arc, OnceLock},
    time::Duration,
};

use tokio::{sync::watch, time::sleep};

use super::{
    Bundle, SignError, Signed, Signer,
    ca::{CaError, LocalCa},
    clock::Clock,
};
use crate::state::Identity;

const AGAIN: Duration = Duration::from_secs(1);

/// Where to look for it.
pub struct Place {
    pub dir: PathBuf,
    pub trust_domain: Arc<str>,
    /// How long what it signs lives.
    pub life: Duration,
    pub clock: Arc<dyn Clock>,
}

impl Place {
    fn look(&self) -> Result<Arc<LocalCa>, CaError> {
        LocalCa::open_existing(
            &self.dir,
            self.trust_domain.clone(),
            self.life,
            self.clock.clone(),
        )
    }
}

pub struct AwaitedCa {
    place: Place,
    found: OnceLock<Arc<LocalCa>>,
    bundle: watch::Sender<Arc<Bundle>>,
}

impl AwaitedCa {
    pub fn new(place: Place, known: Bundle) -> Arc<Self> {
        Arc::new(Self {
            place,
            found: OnceLock::new(),
            bundle: watch::Sender::new(Arc::new(known)),
        })
    }

    /// Looks for it each second, then follows it, until dropped.
    pub async fn watch(self: Arc<Self>) {
        let authority = loop {
            sleep(AGAIN).await;
            match self.place.look() {
                Ok(authority) => break authority,
                Err(error) => tracing::debug!(%error, "the authority is still away"),
            }
        };
        tracing::info!(dir = %self.place.dir.display(), "the authority is there");
        let mut bundle = authority.bundle();
        self.bundle.send_replace(bundle.borrow_and_update().clone());
        // Only this task ever sets it.
        let _first = self.found.set(authority.clone());
        let follow = async {
            while bundle.changed().await.is_ok() {
                self.bundle.send_replace(bundle.borrow_and_update().clone());
            }
        };
        tokio::join!(authority.watch(), follow);
    }
}

impl Signer for AwaitedCa {
    fn sign<'a>(
        &'a self,
        identity: &'a Identity,
        csr: Vec<u8>,
    ) -> Pin<Box<dyn Future<Output = Result<Signed, SignError>> + Send + 'a>> {
        match self.found.get() {
            Some(authority) => authority.sign(identity, csr),
            None => {
                let dir = self.place.dir.display();
                let why = format!("{dir} is not there; mount or restore it");
                Box::pin(async { Err(SignError::Unavailable(why)) })
            }
        }
    }

    fn bundle(&self) -> watch::Receiver<Arc<Bundle>> {
        self.bundle.subscribe()
    }
}

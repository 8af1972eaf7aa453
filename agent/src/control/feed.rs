//! One kind, watched for one reader: what is there, what has changed, and nothing twice.
//!
//! `k8s/watch` serves the mesh, of which every kind is a part; controller and signer need three
//! kinds at most, all of which every cluster has. Errors are survived here. Whoever reads hears of
//! objects, and when nothing can be heard: after an error everything is listed anew, because only
//! the end of a list shows that nothing was missed. A watch that goes on says nothing.

use futures_util::StreamExt;
use kube::{
    Api,
    runtime::watcher::{self, Event, watcher},
};
use tokio::{sync::mpsc, time::sleep};
use tracing::{debug, info, warn};

use crate::k8s::{Seen, watch};

/// Objects that the reader has not taken yet.
pub(super) const QUEUE: usize = 64;

pub(super) enum Told {
    /// What happens is not seen until the next list is complete.
    Failed,
    /// A list begins: what it does not name is gone.
    Listing,
    Listed,
    There(Box<Seen>),
    Gone(Box<Seen>),
}

/// Until nobody listens. `tag` tells the reader which kind it is.
pub(super) async fn follow<T: Copy + Send>(
    tag: T,
    kind: &'static str,
    api: Api<Seen>,
    only: watcher::Config,
    tell: mpsc::Sender<(T, Told)>,
) {
    let mut pause = watch::Pause::default();
    let mut complained = false;
    loop {
        let mut events = watcher(api.clone(), only.clone()).boxed();
        while let Some(event) = events.next().await {
            let told = match event {
                Ok(Event::Init) => Told::Listing,
                Ok(Event::InitDone) => Told::Listed,
                Ok(Event::InitApply(seen) | Event::Apply(seen)) => {
                    Told::There(Box::new(seen.bounded()))
                }
                Ok(Event::Delete(seen)) => Told::Gone(Box::new(seen)),
                Err(error) => {
                    let sentence = watch::sentence(&error);
                    debug!(kind, error = sentence, "watching");
                    // A list that is due anew is no failure.
                    if !watch::is_relist(&error) && !std::mem::replace(&mut complained, true) {
                        warn!(
                            kind,
                            error = sentence,
                            "cannot be watched; it is tried again"
                        );
                    }
                    if tell.send((tag, Told::Failed)).await.is_err() {
                        return;
                    }
                    sleep(pause.next()).await;
                    break;
                }
            };
            if !matches!(told, Told::Listing) {
                pause.reset();
                if std::mem::take(&mut complained) {
                    info!(kind, "is watched again");
                }
            }
            if tell.send((tag, told)).await.is_err() {
                return;
            }
        }
    }
}

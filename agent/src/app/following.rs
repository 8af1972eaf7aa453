//! From the mesh to what is desired: which pods are to be captured, which identities to be held, and
//! whom to ask for pods that nobody has found.

use std::{
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use tokio::{
    sync::{Notify, watch},
    time::{MissedTickBehavior, interval, sleep_until},
};

use super::{
    desired::{self, Told},
    search::Search,
};
use crate::{
    datapath::{Desired, PodStatus},
    identity::Identities,
    local::Netns,
    metrics::Metrics,
    state::MeshStore,
};

/// What [`follow_mesh`] turns the mesh into.
pub(super) struct Follow {
    pub(super) mesh: Arc<MeshStore>,
    pub(super) netns: watch::Receiver<Netns>,
    pub(super) told: Told,
    /// Whom to ask for one that is not in there.
    pub(super) asked: Option<Arc<Notify>>,
    pub(super) needed: desired::Identities,
    pub(super) identities: Identities,
    /// Weak: the end of the agent is told by dropping the only strong one.
    pub(super) desired: Weak<watch::Sender<Desired>>,
    pub(super) lost: watch::Sender<Arc<Vec<PodStatus>>>,
    pub(super) metrics: Arc<Metrics>,
}

/// On every new mesh, and now and then for what only time changes.
pub(super) async fn follow_mesh(mut follow: Follow) {
    let mut changed = follow.mesh.subscribe();
    let mut ticks = interval(Duration::from_secs(15));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut search = Search::default();
    loop {
        let now = Instant::now();
        let searched;
        {
            let mesh = follow.mesh.load();
            let netns = follow.netns.borrow_and_update().clone();
            let pods = desired::pods(&mesh, &netns, follow.told);
            let Some(desired) = follow.desired.upgrade() else {
                return;
            };
            // The identity first: a pod is captured only when somebody may speak for it soon.
            let identities = &follow.identities;
            let held = |own: &_| identities.holds(own);
            identities.set_wanted(follow.needed.wanted(&mesh, now, held));
            desired.send_if_modified(|current| {
                let changed = **current != *pods.desired;
                if changed {
                    current.clone_from(&pods.desired);
                }
                changed
            });
            let due = search.next(&pods.lost, now);
            searched = follow.asked.clone().zip(due);
            follow.lost.send_replace(Arc::new(pods.lost));
            follow.metrics.sweep(&desired::live(&mesh), now);
        }
        tokio::select! {
            changed = changed.changed() => if changed.is_err() { return },
            changed = follow.netns.changed() => if changed.is_err() { return },
            _ = ticks.tick() => {}
            asked = due(searched) => {
                search.looked(Instant::now());
                asked.notify_one();
            }
        }
    }
}

/// Whom to ask, when it is time.
async fn due(search: Option<(Arc<Notify>, Instant)>) -> Arc<Notify> {
    match search {
        Some((asked, at)) => {
            sleep_until(at.into()).await;
            asked
        }
        None => std::future::pending().await,
    }
}

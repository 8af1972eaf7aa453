//! The cluster from its API server: every kind watched once, one mesh published of all.
//!
//! [`run`] is the single writer of the [`MeshStore`] on a cluster, as `local::run` is with a
//! directory. `follow` watches one kind and survives what becomes of the API server; `index` keeps
//! what all of them have told; here changes are gathered, turned into a mesh and published.
//!
//! **While the API server is away** everything stays as it was. What it says in the first moments
//! after it is back is taken with care: it may not have heard from the kubelets yet and call whole
//! nodes unready. For one kubelet lease period ([`CAREFUL`]) endpoints that were ready stay so,
//! unless their pod is gone or being deleted.
//!
//! **At start** nothing is published before every kind is known once: half a cluster would let
//! pods go that are captured already. If an agent before left what it knew, that is in force after
//! [`PATIENCE`], and each kind from the moment its own list is complete.
#![forbid(unsafe_code)]

mod follow;
mod index;

use std::{collections::BTreeSet, future::Future, pin::pin, sync::Arc, time::Duration};

use kube::Client;
use tokio::{
    sync::{mpsc, watch},
    task::{JoinSet, spawn_blocking},
    time::{Instant, sleep_until},
};
use tracing::{debug, info, warn};

use super::Converter;
use crate::state::{
    Mesh, MeshStore,
    objects::{Kind, MeshSettings, Objects},
};

use follow::{Message, Told, Watched};
use index::Index;

pub use index::Fault;

pub(crate) use follow::{Pause, config, config_of_many, endless, is_relist, sentence};

/// After the first change its companions are waited for.
const GATHER: Duration = Duration::from_millis(50);
/// Meshes are built during at most so large a part of the time: one in this many.
const SHARE: u32 = 10;
/// And yet after a build no change waits longer than this for the next.
const LONGEST_WAIT: Duration = Duration::from_millis(700);
/// How long the API server may take at start before what an agent before knew is in force.
const PATIENCE: Duration = Duration::from_secs(3);
/// A kubelet's lease: after so long the API server knows which nodes live.
const CAREFUL: Duration = Duration::from_secs(40);
/// An absence that kubelets do not notice needs no care afterwards.
const SHORT_ABSENCE: Duration = Duration::from_secs(10);
/// People are told again and again what a start waits for.
const REMIND: Duration = Duration::from_secs(30);
/// Objects that the writer has not taken yet.
const QUEUE: usize = 64;

/// What [`run`] tells the rest of the agent besides the mesh itself.
pub struct Outputs {
    /// Objects that do not read; the last good state of each is in force.
    pub faults: watch::Sender<Arc<Vec<Fault>>>,
    /// What is in force, for whoever comes after us.
    pub objects: watch::Sender<Arc<Objects>>,
}

/// Watches until `stop`. `loaded` hears of the first mesh. `before`: what an agent before knew.
pub async fn run(
    client: Client,
    before: Option<Objects>,
    settings: Arc<MeshSettings>,
    store: Arc<MeshStore>,
    outputs: Outputs,
    loaded: impl FnOnce() + Send,
    stop: impl Future<Output = ()> + Send,
) {
    let (tell, mut told) = mpsc::channel(QUEUE);
    let mut watches = JoinSet::new();
    let (known, definitions) = watch::channel(None);
    watches.spawn(follow::definitions(client.clone(), known));
    for watched in Watched::all() {
        let (client, tell, definitions) = (client.clone(), tell.clone(), definitions.clone());
        watches.spawn(follow::follow(client, watched, definitions, tell));
    }
    drop(tell);

    let mut index = Index::new(Converter::new(&settings), Arc::clone(&settings.node));
    let has_before = before.is_some();
    if let Some(before) = before {
        index.begin_with(before);
    }
    let mut writer = Writer {
        index: Some(index),
        settings,
        store,
        outputs,
        outage: Outage::default(),
        due: has_before.then(|| Instant::now() + PATIENCE),
        last: None,
        loaded: Some(loaded),
        has_before,
        more_faults: 0,
        begun: Instant::now(),
        remind: Instant::now() + REMIND,
    };
    let mut stop = pin!(stop);
    loop {
        let next = writer.next_look();
        tokio::select! {
            () = &mut stop => return,
            message = told.recv() => match message {
                Some(message) => writer.hear(message),
                // No watch ends by itself.
                None => return,
            },
            () = sleep_until(next) => writer.look().await,
        }
    }
}

/// When the API server did not answer last, and since when, as the watch of EndpointSlices finds it.
///
/// Only that watch counts: whoever is away breaks it too, and one kind that goes on failing, as one
/// whose conversion is broken, would keep everybody ready for ever. What *was heard* counts from all
/// of them. A watch that is cut notices at the end of an absence as often as at its beginning, so it
/// may have begun with the last word of any watch; and what fails after a word is another absence.
#[derive(Clone, Copy, Debug, Default)]
struct Outage {
    heard: Option<Instant>,
    /// The first failure in a row, or the word before it, and the last.
    seen: Option<(Instant, Instant)>,
    /// Until then it may not know what it should. A short absence behind a long one ends no doubt.
    doubt: Option<Instant>,
    told: bool,
}

impl Outage {
    fn heard(&mut self, now: Instant) {
        self.heard = Some(now);
    }

    /// `silent`: nothing came on that connection for so long.
    fn failed(&mut self, now: Instant, silent: Duration) {
        let silent = now.checked_sub(silent).unwrap_or(now);
        let since = self.heard.unwrap_or(now).min(silent);
        let first = match self.seen {
            // Watches try again at least so often.
            Some((first, last))
                if now - last < 3 * follow::LONGEST_PAUSE
                    && self.heard.is_none_or(|heard| heard <= last) =>
            {
                first.min(silent)
            }
            Some(_) | None => since,
        };
        self.seen = Some((first, now));
        if now - first >= SHORT_ABSENCE {
            self.doubt = Some(now + CAREFUL + follow::LONGEST_PAUSE);
        }
    }

    /// It answers again, and may not know yet what it should.
    fn is_doubtful(&self, now: Instant) -> bool {
        self.doubt.is_some_and(|until| now < until)
    }
}

/// A build.
#[derive(Clone, Copy, Debug)]
struct Built {
    took: Duration,
    /// It ended then.
    at: Instant,
}

/// When a mesh is to be built of a change that has come now. One that comes alone waits for its
/// companions only; one in a stream, for its turn as well.
fn due(now: Instant, last: Option<Built>) -> Instant {
    let turn = last.map(|last| last.at + (last.took * SHARE).min(LONGEST_WAIT));
    turn.into_iter().fold(now + GATHER, Instant::max)
}

struct Writer<F> {
    /// Out while a blocking thread builds.
    index: Option<Index>,
    settings: Arc<MeshSettings>,
    store: Arc<MeshStore>,
    outputs: Outputs,
    outage: Outage,
    /// A mesh is to be built then.
    due: Option<Instant>,
    last: Option<Built>,
    /// Until the first mesh.
    loaded: Option<F>,
    has_before: bool,
    /// Faults beyond those that are named.
    more_faults: usize,
    begun: Instant,
    remind: Instant,
}

impl<F: FnOnce() + Send> Writer<F> {
    fn hear(&mut self, Message { watched, told }: Message) {
        let now = Instant::now();
        if let Told::Failed { error, away } = &told {
            let of_slices = watched == Watched::Mesh(Kind::EndpointSlice);
            if let Some(silent) = away.filter(|_| of_slices) {
                self.outage.failed(now, silent);
            }
            if !self.outage.told {
                warn!(%error, kind = watched.resource().kind, "the API server does not answer as it \
                       should; what is known stays in force");
                self.outage.told = true;
            }
        } else if !matches!(told, Told::Listing) {
            // A list that begins is no answer yet.
            self.outage.heard(now);
            if std::mem::take(&mut self.outage.told) {
                info!("the API server answers again");
            }
        }
        let doubtful = self.outage.is_doubtful(now);
        let Some(index) = &mut self.index else { return };
        if index.hear(watched, told, now, doubtful) {
            let soon = due(now, self.last);
            self.due = Some(self.due.map_or(soon, |due| due.min(soon)));
        }
    }

    fn next_look(&self) -> Instant {
        let first = [self.due, self.loaded.as_ref().map(|_| self.remind)];
        let due = first.into_iter().flatten().min();
        let due = due.unwrap_or_else(|| Instant::now() + Duration::from_secs(1));
        let decides = self.index.as_ref().and_then(Index::decides_at);
        decides.map_or(due, |decides| due.min(decides))
    }

    /// Something may be due.
    async fn look(&mut self) {
        let now = Instant::now();
        let Some(index) = &mut self.index else { return };
        if !self.outage.is_doubtful(now) && index.release() {
            self.due.get_or_insert(now);
        }
        if index.decide(now) {
            self.due.get_or_insert(now);
        }
        if self.loaded.is_some() && !index.is_complete() {
            let patience_over = now >= self.begun + PATIENCE;
            if !(self.has_before && patience_over) {
                if now >= self.remind {
                    let awaited = index.awaited().join(", ");
                    warn!(%awaited, "still waiting for the API server to list these; see to its \
                           address and to the rights of this agent's service account");
                    self.remind = now + REMIND;
                }
                // Looked at again with the next change, or when patience is over.
                self.due = self.has_before.then(|| self.begun + PATIENCE);
                return;
            }
            warn!("the API server does not answer; what the agent before knew is in force");
        }
        if self.due.is_some_and(|due| due <= now) {
            self.publish().await;
        }
    }

    async fn publish(&mut self) {
        self.due = None;
        let Some(mut index) = self.index.take() else {
            return;
        };
        let settings = Arc::clone(&self.settings);
        let version = self.store.load().version + 1;
        let begun = Instant::now();
        let building = spawn_blocking(move || {
            index.judge();
            let mesh = Mesh::build(settings, version, index.objects());
            (index, mesh)
        });
        let (mut index, mesh) = match building.await {
            Ok(done) => done,
            Err(panicked) => std::panic::resume_unwind(panicked.into_panic()),
        };
        let last = Built {
            took: begun.elapsed(),
            at: Instant::now(),
        };
        self.last = Some(last);

        for fault in index.take_new_faults() {
            warn!(%fault, "an object is not in force; what was good before stays");
        }
        let more = index.more_faults();
        if std::mem::replace(&mut self.more_faults, more) < more {
            warn!(more, "and more objects are not in force than are named");
        }
        let faults: Vec<_> = index.faults().cloned().collect();
        let reported: BTreeSet<_> = self.store.load().problems.iter().cloned().collect();
        let new = |problem: &&crate::state::Problem| !reported.contains(problem);
        for problem in mesh.problems.iter().filter(new) {
            warn!(%problem, "the objects do not fit together");
        }
        debug!(version, pods = mesh.workloads.len(), took = ?last.took, "new mesh");
        self.outputs.faults.send_replace(Arc::new(faults));
        let objects = Arc::new(index.objects().clone());
        self.outputs.objects.send_replace(objects);
        self.index = Some(index);
        self.store.publish(mesh);
        if let Some(loaded) = self.loaded.take() {
            loaded();
        }
    }
}

#[cfg(test)]
mod tests;

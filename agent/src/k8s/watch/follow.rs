//! One kind, watched for as long as the agent lives.
//!
//! The library lists, watches, pages, resumes and lists anew after 410 Gone. Here is what it leaves
//! to us: how long to wait after an error; a kind whose definition is missing, or comes, or goes;
//! and that a watch which cannot even begin where the last one ended begins from nothing. So do
//! namespaces after any error: a watch that goes on says nothing until something happens, and only
//! a list tells that nothing was missed. They are few.

use std::{collections::BTreeSet, fmt, io, sync::Arc, time::Duration};

use futures_util::{
    StreamExt,
    stream::{self, BoxStream},
};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::{
    Api, Client, ResourceExt,
    core::PartialObjectMeta,
    runtime::watcher::{self, Event, watcher},
};
use serde::de::DeserializeOwned;
use tokio::{
    sync::{mpsc, watch},
    time::sleep,
};
use tracing::{debug, info, warn};

use super::super::{Seen, client::SILENT, foreign::ForeignKind, resources::Resource};
use crate::state::objects::Kind;

/// Objects of one answer. Their text is held at once, and a large cluster has tens of megabytes.
const PAGE: u32 = 100;
/// Of kinds whose objects anybody may make, and as large as they get.
const SMALL_PAGE: u32 = 16;
/// The API server ends a watch after this, and we ask it to go on.
const WATCH_SECONDS: u32 = 120;
const SHORTEST_PAUSE: Duration = Duration::from_millis(500);
pub(super) const LONGEST_PAUSE: Duration = Duration::from_secs(8);
/// A definition that is there and whose kind is not served yet, or in no version that we read.
const UNSERVED: Duration = Duration::from_secs(1);
const UNREADABLE: Duration = Duration::from_secs(60);
/// The API server takes a moment to serve what was defined; after so many looks it will not.
const LOOKS: u32 = 10;

/// Whose objects they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Watched {
    Mesh(Kind),
    Foreign(ForeignKind),
}

impl Watched {
    pub(super) fn all() -> impl Iterator<Item = Self> {
        let mesh = Kind::ALL.map(Self::Mesh).into_iter();
        mesh.chain(ForeignKind::ALL.map(Self::Foreign))
    }

    fn config(self) -> watcher::Config {
        match self {
            Self::Mesh(
                Kind::Node
                | Kind::Namespace
                | Kind::Service
                | Kind::EndpointSlice
                | Kind::ServiceAccount,
            ) => config(),
            Self::Mesh(
                Kind::Pod
                | Kind::Server
                | Kind::ServerAuthorization
                | Kind::AuthorizationPolicy
                | Kind::MeshTlsAuthentication
                | Kind::NetworkAuthentication
                | Kind::NetworkPolicy,
            )
            | Self::Foreign(_) => config_of_many(),
        }
    }

    fn bound(self, seen: Seen) -> Seen {
        match self {
            Self::Mesh(Kind::Server | Kind::NetworkPolicy) => seen,
            Self::Mesh(
                Kind::Node
                | Kind::Namespace
                | Kind::Pod
                | Kind::Service
                | Kind::EndpointSlice
                | Kind::ServiceAccount
                | Kind::ServerAuthorization
                | Kind::AuthorizationPolicy
                | Kind::MeshTlsAuthentication
                | Kind::NetworkAuthentication,
            )
            | Self::Foreign(_) => seen.bounded(),
        }
    }

    pub(super) fn resource(self) -> Resource {
        match self {
            Self::Mesh(kind) => kind.resource(),
            Self::Foreign(kind) => kind.resource(),
        }
    }
}

pub(super) struct Message {
    pub(super) watched: Watched,
    pub(super) told: Told,
}

pub(super) enum Told {
    /// A list begins.
    Listing,
    Listed,
    /// It is there as it stands, in a list or after a change.
    There {
        seen: Seen,
        api_version: Arc<str>,
    },
    Gone(Seen),
    /// There is no such kind here.
    Absent,
    Failed {
        error: String,
        /// It was not the API server that refused: it is away, or as good as. For so long already,
        /// if that is known.
        away: Option<Duration>,
    },
}

/// Names of all CustomResourceDefinitions; `None` before they were listed once.
pub(super) type Definitions = Option<BTreeSet<String>>;

/// Watches which kinds are defined here.
pub(super) async fn definitions(client: Client, known: watch::Sender<Definitions>) {
    let api: Api<PartialObjectMeta<CustomResourceDefinition>> = Api::all(client);
    let mut events = endless(api, config());
    let (mut listed, mut told) = (BTreeSet::new(), false);
    while let Some(event) = events.next().await {
        match event {
            Ok(Event::Init) => listed = BTreeSet::new(),
            Ok(Event::InitApply(definition)) => {
                listed.insert(definition.name_any());
            }
            Ok(Event::InitDone) => {
                known.send_replace(Some(std::mem::take(&mut listed)));
            }
            Ok(Event::Apply(definition)) => known.send_modify(|known| {
                known.get_or_insert_default().insert(definition.name_any());
            }),
            Ok(Event::Delete(definition)) => known.send_modify(|known| {
                known.get_or_insert_default().remove(&definition.name_any());
            }),
            Err(error) => {
                // Without them nothing begins, so people must hear why.
                if !std::mem::replace(&mut told, true) {
                    let error = sentence(&error);
                    warn!(%error, "the CustomResourceDefinitions cannot be watched");
                }
            }
        }
    }
}

/// Until nobody listens any more.
pub(super) async fn follow(
    client: Client,
    watched: Watched,
    mut definitions: watch::Receiver<Definitions>,
    tell: mpsc::Sender<Message>,
) {
    let resource = watched.resource();
    let name = resource.definition();
    let mut said_absent = false;
    let mut pause = Pause::default();
    while !tell.is_closed() {
        let version = if resource.optional {
            let Ok(defined) = definitions
                .wait_for(Option::is_some)
                .await
                .map(|known| known.as_ref().is_some_and(|known| known.contains(&name)))
            else {
                return;
            };
            let version = if defined {
                serving(&client, &resource).await
            } else {
                Ok(None)
            };
            match version {
                Ok(Some(version)) => version,
                Ok(None) => {
                    if !std::mem::replace(&mut said_absent, true) {
                        let (kind, group) = (resource.kind, resource.group);
                        info!(
                            kind,
                            group, "this kind is not defined here; it is read once it is"
                        );
                    }
                    say(&tell, watched, Told::Absent).await;
                    tokio::select! {
                        changed = definitions.changed() => if changed.is_err() { return },
                        // A version that we read may have been added to the definition.
                        () = sleep(UNREADABLE), if defined => {}
                    }
                    continue;
                }
                Err(error) => {
                    let failed = Told::Failed {
                        away: is_away(&error).then(|| silence(&error)),
                        error: error.to_string(),
                    };
                    say(&tell, watched, failed).await;
                    sleep(pause.next()).await;
                    continue;
                }
            }
        } else {
            resource.versions[0]
        };
        if std::mem::take(&mut said_absent) {
            info!(kind = resource.kind, version, "this kind is defined now");
        }

        let watching = watch_version(&client, watched, version, &mut pause, &tell);
        if resource.optional {
            tokio::select! {
                () = watching => {}
                gone = definitions.wait_for(|known| {
                    known.as_ref().is_some_and(|known| !known.contains(&name))
                }) => if gone.is_err() { return },
            }
        } else {
            watching.await;
        }
    }
}

/// The best version that is served; `None`: none that we read.
async fn serving(
    client: &Client,
    resource: &Resource,
) -> Result<Option<&'static str>, kube::Error> {
    for look in 0..LOOKS {
        if look > 0 {
            sleep(UNSERVED).await;
        }
        for version in resource.versions {
            let group = format!("{}/{version}", resource.group);
            match client.list_api_group_resources(&group).await {
                Ok(list) => {
                    if list
                        .resources
                        .iter()
                        .any(|found| found.name == resource.plural)
                    {
                        return Ok(Some(version));
                    }
                }
                Err(kube::Error::Api(status)) if status.code == 404 => {}
                Err(error) => return Err(error),
            }
        }
    }
    let (kind, group, versions) = (resource.kind, resource.group, resource.versions);
    warn!(
        kind,
        group,
        ?versions,
        "this kind is defined here, and served in none of the versions \
           that are read"
    );
    Ok(None)
}

/// Watches without end, with a pause after each error. The library goes on by itself; where it
/// would ask for the same again and again, all begins from nothing.
pub(crate) fn endless<K>(
    api: Api<K>,
    only: watcher::Config,
) -> BoxStream<'static, watcher::Result<Event<K>>>
where
    K: kube::Resource + Clone + DeserializeOwned + fmt::Debug + Send + 'static,
{
    let events = watcher(api.clone(), only.clone()).boxed();
    let state = (events, Pause::default(), Duration::ZERO);
    let next = move |(mut events, mut pause, wait): (BoxStream<'static, _>, Pause, Duration)| {
        let (api, only) = (api.clone(), only.clone());
        async move {
            sleep(wait).await;
            let event: watcher::Result<Event<K>> = events.next().await?;
            let mut wait = Duration::ZERO;
            match &event {
                // No answer yet.
                Ok(Event::Init) => {}
                Ok(_) => pause.reset(),
                Err(error) => {
                    wait = pause.next();
                    if is_expired(error) {
                        events = watcher(api, only).boxed();
                    }
                }
            }
            Some((event, (events, pause, wait)))
        }
    };
    stream::unfold(state, next).boxed()
}

/// Returns when the watch must begin from nothing.
async fn watch_version(
    client: &Client,
    watched: Watched,
    version: &'static str,
    pause: &mut Pause,
    tell: &mpsc::Sender<Message>,
) {
    let resource = watched.resource().at(version);
    let api_version: Arc<str> = resource.api_version.as_str().into();
    let api = Api::<Seen>::all_with(client.clone(), &resource);
    let mut events = watcher(api, watched.config()).boxed();
    while let Some(event) = events.next().await {
        let told = match event {
            Ok(Event::Init) => Told::Listing,
            Ok(Event::InitDone) => Told::Listed,
            Ok(Event::InitApply(seen) | Event::Apply(seen)) => Told::There {
                seen: watched.bound(seen),
                api_version: Arc::clone(&api_version),
            },
            Ok(Event::Delete(seen)) => Told::Gone(seen),
            Err(error) => {
                let from_nothing = is_expired(&error) || watched == Watched::Mesh(Kind::Namespace);
                debug!(kind = resource.kind, %error, "watching");
                // That is no failure: the API server has forgotten what we knew last.
                if !is_relist(&error) {
                    let failed = Told::Failed {
                        error: sentence(&error),
                        away: cause(&error).is_none_or(is_away).then(|| silence(&error)),
                    };
                    say(tell, watched, failed).await;
                }
                sleep(pause.next()).await;
                if from_nothing || tell.is_closed() {
                    return;
                }
                continue;
            }
        };
        // A list that begins is no answer yet.
        if !matches!(told, Told::Listing) {
            pause.reset();
        }
        say(tell, watched, told).await;
    }
}

/// No answer, or one that says that there will be one later.
fn is_away(error: &kube::Error) -> bool {
    if let kube::Error::Api(status) = error {
        status.code >= 500 || status.code == 429
    } else {
        true
    }
}

/// How long nothing was heard before it was an error.
fn silence(error: &(dyn std::error::Error + 'static)) -> Duration {
    let mut next = Some(error);
    while let Some(error) = next {
        let io = error.downcast_ref::<io::Error>();
        if io.is_some_and(|io| io.kind() == io::ErrorKind::TimedOut) {
            return SILENT;
        }
        // What such an error holds is not among its sources.
        let held = io.and_then(io::Error::get_ref);
        next = match held {
            Some(held) => Some(held as &(dyn std::error::Error + 'static)),
            None => error.source(),
        };
    }
    Duration::ZERO
}

fn cause(error: &watcher::Error) -> Option<&kube::Error> {
    match error {
        watcher::Error::InitialListFailed(error)
        | watcher::Error::WatchStartFailed(error)
        | watcher::Error::WatchFailed(error) => Some(error),
        watcher::Error::WatchError(_) | watcher::Error::NoResourceVersion => None,
    }
}

/// The watch itself was refused: the library would ask for the same again and again. A refusal that
/// is the answer to the request comes to us as the failure of a watch that had begun.
pub(crate) fn is_expired(error: &watcher::Error) -> bool {
    match error {
        watcher::Error::WatchStartFailed(kube::Error::Api(status))
        | watcher::Error::WatchFailed(kube::Error::Api(status)) => status.code == 410,
        watcher::Error::NoResourceVersion => true,
        watcher::Error::InitialListFailed(_)
        | watcher::Error::WatchStartFailed(_)
        | watcher::Error::WatchError(_)
        | watcher::Error::WatchFailed(_) => false,
    }
}

/// 410 Gone, by whatever way.
pub(crate) fn is_relist(error: &watcher::Error) -> bool {
    match error {
        watcher::Error::WatchError(status) => status.code == 410,
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status))
        | watcher::Error::WatchFailed(kube::Error::Api(status)) => status.code == 410,
        watcher::Error::InitialListFailed(_)
        | watcher::Error::WatchStartFailed(_)
        | watcher::Error::WatchFailed(_)
        | watcher::Error::NoResourceVersion => false,
    }
}

/// With its sources: the outermost error says only that watching failed.
pub(crate) fn sentence(error: &watcher::Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        let more = error.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        source = error.source();
    }
    text
}

async fn say(tell: &mpsc::Sender<Message>, watched: Watched, told: Told) {
    // Unheard, the agent is ending.
    let _heard = tell.send(Message { watched, told }).await;
}

pub(crate) fn config() -> watcher::Config {
    watcher::Config::default()
        .timeout(WATCH_SECONDS)
        .page_size(PAGE)
}

/// For kinds whose objects anybody may make.
pub(crate) fn config_of_many() -> watcher::Config {
    config().page_size(SMALL_PAGE)
}

/// Between tries: longer each time, and never the same on two nodes.
#[derive(Debug, Default)]
pub(crate) struct Pause {
    tries: u32,
}

impl Pause {
    pub(crate) fn next(&mut self) -> Duration {
        let longest = SHORTEST_PAUSE * 2_u32.saturating_pow(self.tries.min(8));
        self.tries += 1;
        longest
            .min(LONGEST_PAUSE)
            .mul_f64(0.5 + 0.5 * fastrand::f64())
    }

    pub(crate) fn reset(&mut self) {
        self.tries = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_watch_that_fell_silent_was_away_for_as_long() {
        let timed_out = io::Error::from(io::ErrorKind::TimedOut);
        // As the client wraps what its connection says.
        let read = |error| watcher::Error::WatchFailed(kube::Error::ReadEvents(error));
        assert_eq!(silence(&read(io::Error::other(timed_out))), SILENT);
        let reset = io::Error::from(io::ErrorKind::ConnectionReset);
        assert_eq!(silence(&read(io::Error::other(reset))), Duration::ZERO);
    }
}

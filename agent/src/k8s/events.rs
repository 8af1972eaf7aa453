//! Events on objects, for `kubectl describe`: an object that does not read, a pod that cannot be
//! enrolled.
//!
//! Bounded in every way: a queue that drops and counts when it is full, each thing said once and
//! again only after [`AGAIN`], a rate for all of them. All agents see the same broken object; the
//! name of an Event is made of what it says, so the second to say it is told that it exists.

use std::{
    collections::HashMap,
    hash::{DefaultHasher, Hash, Hasher},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use k8s_openapi::{
    api::core::v1::{Event, EventSource, ObjectReference},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta, Time},
    jiff::Timestamp,
};
use kube::{Api, Client, api::PostParams};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep},
};
use tracing::debug;

const QUEUE: usize = 128;
/// An Event lives for an hour; who looks after that shall find another.
const AGAIN: Duration = Duration::from_secs(3600);
/// Things said are remembered up to so many; then the oldest may be said again.
const REMEMBERED: usize = 1024;
/// One each, and so many at once.
const EVERY: Duration = Duration::from_secs(1);
const BURST: u32 = 20;
const AGENT: Component = Component {
    name: "picomesh-agent",
    action: "Enrol",
};
/// What the API server allows, and more than people read.
const MAX_MESSAGE: usize = 1000;

/// Who says it, and what it was doing.
#[derive(Clone, Copy, Debug)]
pub struct Component {
    pub name: &'static str,
    /// In upper camel case.
    pub action: &'static str,
}

/// What an Event is about.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct About {
    pub api_version: String,
    pub kind: String,
    /// Empty for an object of the whole cluster.
    pub namespace: String,
    pub name: String,
    pub uid: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Warning {
    pub about: About,
    /// In upper camel case, as Kubernetes wants it.
    pub reason: String,
    pub message: String,
}

/// Says it, soon, if there is room.
#[derive(Clone)]
pub struct Events {
    queue: mpsc::Sender<Warning>,
    dropped: Arc<AtomicU64>,
}

impl Events {
    /// An agent's, of `node`.
    pub fn start(client: Client, node: Arc<str>) -> (Self, impl Future<Output = ()> + Send) {
        Self::start_as(AGENT, client, node)
    }

    /// The future writes them, and ends with the last handle.
    pub fn start_as(
        component: Component,
        client: Client,
        instance: Arc<str>,
    ) -> (Self, impl Future<Output = ()> + Send) {
        let (queue, warnings) = mpsc::channel(QUEUE);
        let events = Self {
            queue,
            dropped: Arc::default(),
        };
        (events, write(component, client, instance, warnings))
    }

    pub fn warn(&self, warning: Warning) {
        if self.queue.try_send(warning).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Those that did not fit.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }
}

async fn write(
    component: Component,
    client: Client,
    instance: Arc<str>,
    mut warnings: mpsc::Receiver<Warning>,
) {
    let mut said = Said::default();
    let (mut tokens, mut filled) = (BURST, Instant::now());
    while let Some(warning) = warnings.recv().await {
        let now = Instant::now();
        if !said.is_new(&warning, now) {
            continue;
        }
        let earned = u32::try_from((now - filled).as_secs() / EVERY.as_secs()).unwrap_or(BURST);
        if earned > 0 {
            tokens = tokens.saturating_add(earned).min(BURST);
            filled = now;
        }
        if tokens == 0 {
            sleep(EVERY).await;
            filled = Instant::now();
            tokens = 1;
        }
        tokens -= 1;
        let event = event(component, &warning, &instance, Timestamp::now());
        let place = event.metadata.namespace.clone().unwrap_or_default();
        let api = Api::<Event>::namespaced(client.clone(), &place);
        match api.create(&PostParams::default(), &event).await {
            Ok(_) => {}
            // Another agent has said it.
            Err(kube::Error::Api(status)) if status.code == 409 => {}
            Err(error) => {
                // It is in the log and in the metrics as well.
                debug!(%error, ?warning, "an Event could not be written");
                said.forget(&warning);
            }
        }
    }
}

/// What was said, by its hash, and when. The texts are others' and may be long.
#[derive(Default)]
struct Said(HashMap<u64, Instant>);

impl Said {
    fn is_new(&mut self, warning: &Warning, now: Instant) -> bool {
        let hash = hash_of(warning);
        if self.0.get(&hash).is_some_and(|said| now - *said < AGAIN) {
            return false;
        }
        if self.0.len() >= REMEMBERED {
            self.0.retain(|_, said| now - *said < AGAIN);
        }
        if self.0.len() >= REMEMBERED {
            let oldest = self.0.iter().min_by_key(|(_, said)| **said);
            if let Some(oldest) = oldest.map(|(hash, _)| *hash) {
                self.0.remove(&oldest);
            }
        }
        self.0.insert(hash, now);
        true
    }

    fn forget(&mut self, warning: &Warning) {
        self.0.remove(&hash_of(warning));
    }
}

fn hash_of(warning: &Warning) -> u64 {
    let mut hasher = DefaultHasher::new();
    warning.hash(&mut hasher);
    hasher.finish()
}

fn event(component: Component, warning: &Warning, instance: &str, now: Timestamp) -> Event {
    let Warning {
        about,
        reason,
        message,
    } = warning;
    // Events of objects of the whole cluster are kept in `default`.
    let namespace = match about.namespace.as_str() {
        "" => "default",
        namespace => namespace,
    };
    let mut hasher = DefaultHasher::new();
    warning.hash(&mut hasher);
    // Another hour, another Event: the last one may be gone by then.
    (now.as_second() / 3600).hash(&mut hasher);
    let suffix = format!(".{:016x}", hasher.finish());
    let longest = 253 - suffix.len();
    let stem: String = about.name.chars().take(longest).collect();
    let mut message = message.clone();
    if message.len() > MAX_MESSAGE {
        let end = message.floor_char_boundary(MAX_MESSAGE);
        message.truncate(end);
        message.push('…');
    }
    Event {
        metadata: ObjectMeta {
            name: Some(format!("{stem}{suffix}")),
            namespace: Some(namespace.to_owned()),
            ..ObjectMeta::default()
        },
        involved_object: ObjectReference {
            api_version: Some(about.api_version.clone()),
            kind: Some(about.kind.clone()),
            name: Some(about.name.clone()),
            namespace: Some(about.namespace.clone()).filter(|namespace| !namespace.is_empty()),
            uid: Some(about.uid.clone()).filter(|uid| !uid.is_empty()),
            ..ObjectReference::default()
        },
        reason: Some(reason.clone()),
        message: Some(message),
        type_: Some("Warning".into()),
        count: Some(1),
        first_timestamp: Some(Time(now)),
        last_timestamp: Some(Time(now)),
        event_time: Some(MicroTime(now)),
        action: Some(component.action.into()),
        reporting_component: Some(component.name.into()),
        reporting_instance: Some(instance.to_owned()),
        source: Some(EventSource {
            component: Some(component.name.into()),
            host: Some(instance.to_owned()),
        }),
        ..Event::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::api::Api as Server;

    #[tokio::test(start_paused = true)]
    async fn the_same_is_written_once_and_a_flood_slowly() {
        let server = Server::default();
        let (events, writing) = Events::start(server.client(), "n1".into());
        let writing = tokio::spawn(writing);
        let place = "/api/v1/namespaces/shop/events";
        for _ in 0..5 {
            events.warn(warning("a", "x"));
        }
        sleep(EVERY).await;
        let written = server.all(place);
        assert_eq!(written.len(), 1);
        assert_eq!(written[0]["involvedObject"]["uid"], "u");
        assert_eq!(written[0]["type"], "Warning");

        for number in 0..2 * QUEUE {
            events.warn(warning("b", &number.to_string()));
        }
        assert!(events.dropped() >= QUEUE as u64 - 1, "{}", events.dropped());
        sleep(EVERY * 10).await;
        let soon = server.all(place).len();
        assert!(soon <= BURST as usize + 12, "{soon} in ten seconds");
        writing.abort();
    }

    fn warning(name: &str, message: &str) -> Warning {
        Warning {
            about: About {
                api_version: "v1".into(),
                kind: "Pod".into(),
                namespace: "shop".into(),
                name: name.into(),
                uid: "u".into(),
            },
            reason: "CannotEnrol".into(),
            message: message.into(),
        }
    }

    #[test]
    fn the_same_is_said_once_an_hour_and_little_is_remembered() {
        let (mut said, start) = (Said::default(), Instant::now());
        assert!(said.is_new(&warning("a", "x"), start));
        assert!(!said.is_new(&warning("a", "x"), start + AGAIN / 2));
        assert!(said.is_new(&warning("a", "y"), start));
        assert!(said.is_new(&warning("a", "x"), start + AGAIN));
        for number in 0..2 * REMEMBERED {
            said.is_new(&warning("b", &number.to_string()), start + AGAIN);
        }
        assert!(said.0.len() <= REMEMBERED);
    }

    #[test]
    fn two_agents_give_the_same_event_the_same_name_for_an_hour() {
        let at = |seconds| Timestamp::from_second(seconds).unwrap();
        let name = |node, seconds, message: &str| {
            let event = event(AGENT, &warning("a", message), node, at(seconds));
            event.metadata.name.unwrap()
        };
        assert_eq!(name("n1", 7200, "x"), name("n2", 7300, "x"));
        assert_ne!(name("n1", 7200, "x"), name("n1", 7200, "y"));
        assert_ne!(name("n1", 7200, "x"), name("n1", 10_800, "x"));
    }

    #[test]
    fn an_event_fits_whatever_it_says() {
        let long = warning(&"n".repeat(253), &"ü".repeat(5000));
        let event = event(AGENT, &long, "n1", Timestamp::UNIX_EPOCH);
        assert_eq!(event.metadata.name.unwrap().len(), 253);
        assert!(event.message.unwrap().len() <= MAX_MESSAGE + '…'.len_utf8());
    }
}

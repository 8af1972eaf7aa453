//! Is the mesh being taken off this cluster? Asked when the agent is told to end: then, and only
//! then, it takes its pods out of the mesh; otherwise everything stays for the next agent.
//!
//! The answer must stand *before* it is needed: what deletes the DaemonSet deletes the agent's
//! rights too, and from then on the API server says 401 or 403, which proves nothing. Hence a
//! standing watch of two objects. Only what a watch has shown counts: the object is being deleted,
//! or is gone after it was seen. Silence and errors mean no.

use std::time::Duration;

use futures_util::StreamExt;
use k8s_openapi::{
    api::{apps::v1::DaemonSet, core::v1::Namespace},
    apimachinery::pkg::apis::meta::v1::Time,
};
use kube::{
    Api, Client,
    core::ApiResource,
    runtime::watcher::{self, Event},
};
use serde::Deserialize;
use tokio::{sync::watch, time::timeout};
use tracing::{debug, info};

use super::{Seen, watch as watches};

/// The DaemonSet that agents are of.
pub const DAEMON_SET: &str = "picomesh-agent";

/// A watch that has not failed for so long after it had is well. No try takes longer.
const SILENCE: Duration = Duration::from_secs(60);

/// Is the mesh being taken off?
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Leaving {
    /// The API server has not said anything yet, or says nothing at the moment.
    #[default]
    Unheard,
    No,
    Yes,
}

impl Leaving {
    /// Of two objects: the one that goes takes the mesh with it.
    fn either(self, other: Self) -> Self {
        match (self, other) {
            (Self::Yes, _) | (_, Self::Yes) => Self::Yes,
            (Self::No, Self::No) => Self::No,
            (Self::Unheard, _) | (_, Self::Unheard) => Self::Unheard,
        }
    }
}

/// Tells `leaving` whether the DaemonSet in `namespace`, or `namespace` itself, goes. Ends when
/// nobody listens.
pub async fn follow(client: Client, namespace: String, leaving: watch::Sender<Leaving>) {
    let namespaces = Api::<Seen>::all_with(client.clone(), &ApiResource::erase::<Namespace>(&()));
    let sets = ApiResource::erase::<DaemonSet>(&());
    let sets = Api::<Seen>::namespaced_with(client, &namespace, &sets);
    let (of_namespace, namespace_goes) = watch::channel(Leaving::default());
    let (of_set, set_goes) = watch::channel(Leaving::default());
    let told = async {
        let (mut one, mut other) = (namespace_goes, set_goes);
        loop {
            let (of_one, of_other) = (*one.borrow_and_update(), *other.borrow_and_update());
            let goes = of_one.either(of_other);
            leaving.send_if_modified(|known| {
                let changed = *known != goes;
                *known = goes;
                changed
            });
            tokio::select! {
                changed = one.changed() => if changed.is_err() { return },
                changed = other.changed() => if changed.is_err() { return },
                () = leaving.closed() => return,
            }
        }
    };
    tokio::select! {
        () = told => {}
        () = one(namespaces, &namespace, &of_namespace) => {}
        () = one(sets, DAEMON_SET, &of_set) => {}
    }
}

/// One object by its name.
async fn one(api: Api<Seen>, name: &str, goes: &watch::Sender<Leaving>) {
    let only = watches::config().fields(&format!("metadata.name={name}"));
    let mut events = watches::endless(api, only);
    let mut life = Life::default();
    // A watch that was broken off goes on without a word when it can.
    let mut resuming = false;
    loop {
        let event = match timeout(SILENCE, events.next()).await {
            Ok(Some(event)) => event,
            Ok(None) => return,
            Err(_) => {
                if std::mem::take(&mut resuming) {
                    goes.send_replace(life.leaving(true));
                }
                continue;
            }
        };
        resuming = false;
        match event {
            Ok(event) => {
                let (before, after) = (life.goes(), life.hear(&event));
                if before != after {
                    info!(name, leaving = after, "seen in the API server");
                }
                let listing = matches!(event, Event::Init | Event::InitApply(_));
                goes.send_replace(life.leaving(!listing));
            }
            Err(error) => {
                goes.send_replace(life.leaving(false));
                resuming = matches!(
                    error,
                    watcher::Error::WatchStartFailed(_) | watcher::Error::WatchFailed(_)
                );
                debug!(name, %error, "watching for its deletion");
            }
        }
    }
}

/// What is known of one object.
#[derive(Debug, Default)]
struct Life {
    state: State,
    /// The list under way has shown it.
    listed: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    /// Never seen, so nothing follows from its absence: agents may run without it.
    #[default]
    Unseen,
    There,
    Deleting,
    Gone,
}

#[derive(Deserialize)]
struct Head {
    metadata: HeadMeta,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct HeadMeta {
    deletion_timestamp: Option<Time>,
}

impl Life {
    fn goes(&self) -> bool {
        matches!(self.state, State::Deleting | State::Gone)
    }

    /// `heard`: nothing may have happened that we were not told of.
    fn leaving(&self, heard: bool) -> Leaving {
        match (self.goes(), heard) {
            (true, _) => Leaving::Yes,
            (false, true) => Leaving::No,
            (false, false) => Leaving::Unheard,
        }
    }

    fn hear(&mut self, event: &watcher::Event<Seen>) -> bool {
        match event {
            Event::Init => self.listed = false,
            Event::InitApply(seen) | Event::Apply(seen) => {
                self.listed = true;
                let head = seen.parse::<Head>();
                let deleting = head.is_ok_and(|head| head.metadata.deletion_timestamp.is_some());
                self.state = if deleting {
                    State::Deleting
                } else {
                    State::There
                };
            }
            Event::InitDone => {
                if !self.listed && self.state != State::Unseen {
                    self.state = State::Gone;
                }
            }
            Event::Delete(_) => self.state = State::Gone,
        }
        self.goes()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use tokio::time::sleep;

    use super::*;
    use crate::testing::api::Api as Server;

    const SETS: &str = "/apis/apps/v1/namespaces/picomesh-system/daemonsets";

    #[tokio::test(start_paused = true)]
    async fn a_daemon_set_that_goes_is_told_and_an_api_server_that_goes_is_not() {
        let server = Server::default();
        server.put(
            SETS,
            json!({"metadata": {"name": DAEMON_SET, "namespace": "picomesh-system"}}),
        );
        server.put(
            "/api/v1/namespaces",
            json!({"metadata": {"name": "picomesh-system"}}),
        );
        let (told, mut leaving) = watch::channel(Leaving::default());
        let following = follow(server.client(), "picomesh-system".into(), told);
        let following = tokio::spawn(following);
        sleep(Duration::from_secs(5)).await;
        assert_eq!(*leaving.borrow(), Leaving::No);
        server.set_away(true);
        sleep(Duration::from_secs(180)).await;
        assert_eq!(*leaving.borrow(), Leaving::Unheard);
        server.set_away(false);
        sleep(Duration::from_secs(15)).await;
        assert_ne!(*leaving.borrow(), Leaving::Yes);
        // It may have forgotten what we knew last, and answer the watch itself so.
        server.refuse_old(SETS);
        sleep(Duration::from_secs(15)).await;
        assert_ne!(*leaving.borrow(), Leaving::Yes);
        sleep(SILENCE).await;
        assert_eq!(*leaving.borrow(), Leaving::No);

        server.delete(SETS, &format!("picomesh-system/{DAEMON_SET}"));
        let gone = tokio::time::timeout(
            Duration::from_secs(1),
            leaving.wait_for(|now| *now == Leaving::Yes),
        );
        gone.await.expect("within a second").unwrap();
        following.abort();
    }

    #[test]
    fn one_that_goes_is_enough_and_both_must_be_heard_of_to_know_better() {
        use Leaving::{No, Unheard, Yes};
        for (one, other, both) in [
            (Yes, Unheard, Yes),
            (No, Yes, Yes),
            (No, No, No),
            (No, Unheard, Unheard),
            (Unheard, Unheard, Unheard),
        ] {
            assert_eq!((one.either(other), other.either(one)), (both, both));
        }
    }

    fn object(deleting: bool) -> Seen {
        let when = if deleting {
            r#", "deletionTimestamp": "2026-01-01T00:00:00Z""#
        } else {
            ""
        };
        serde_json::from_str(&format!(r#"{{"metadata": {{"name": "a"{when}}}}}"#)).unwrap()
    }

    #[test]
    fn only_a_deletion_that_was_seen_counts() {
        let mut life = Life::default();
        assert!(!life.hear(&Event::Init));
        assert!(!life.hear(&Event::InitDone), "never seen");
        assert!(!life.hear(&Event::Apply(object(false))));
        assert!(life.hear(&Event::Apply(object(true))), "being deleted");
        assert!(life.hear(&Event::Delete(object(true))), "gone");
        // Somebody has installed it again.
        assert!(!life.hear(&Event::Apply(object(false))));
    }

    #[test]
    fn one_that_was_there_and_is_in_no_list_any_more_is_gone() {
        let mut life = Life::default();
        life.hear(&Event::Init);
        life.hear(&Event::InitApply(object(false)));
        assert!(!life.hear(&Event::InitDone));
        // The next list is under way: it says nothing until it is complete.
        assert!(!life.hear(&Event::Init));
        assert!(life.hear(&Event::InitDone));
    }
}

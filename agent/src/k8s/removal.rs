//! Is the mesh being taken off this cluster? Asked when the agent is told to end: then, and only
//! then, it takes its pods out of the mesh; otherwise everything stays for the next agent.
//!
//! The answer must stand *before* it is needed: what deletes the DaemonSet deletes the agent's
//! rights too, and from then on the API server says 401 or 403, which proves nothing. Hence a
//! standing watch of two objects. Only what a watch has shown counts: the object is being deleted,
//! or is gone after it was seen. Silence and errors mean no.

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
use tokio::sync::watch;
use tracing::{debug, info};

use super::{Seen, watch as watches};

/// The DaemonSet that agents are of.
pub const DAEMON_SET: &str = "picomesh-agent";

/// Tells `leaving` whether the DaemonSet in `namespace`, or `namespace` itself, goes. Ends when
/// nobody listens.
pub async fn follow(client: Client, namespace: String, leaving: watch::Sender<bool>) {
    let namespaces = Api::<Seen>::all_with(client.clone(), &ApiResource::erase::<Namespace>(&()));
    let sets = ApiResource::erase::<DaemonSet>(&());
    let sets = Api::<Seen>::namespaced_with(client, &namespace, &sets);
    let (of_namespace, namespace_goes) = watch::channel(false);
    let (of_set, set_goes) = watch::channel(false);
    let told = async {
        let (mut one, mut other) = (namespace_goes, set_goes);
        loop {
            let goes = *one.borrow_and_update() || *other.borrow_and_update();
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
async fn one(api: Api<Seen>, name: &str, goes: &watch::Sender<bool>) {
    let only = watches::config().fields(&format!("metadata.name={name}"));
    let mut events = watches::endless(api, only);
    let mut life = Life::default();
    while let Some(event) = events.next().await {
        match event {
            Ok(event) => {
                let (before, after) = (life.goes(), life.hear(&event));
                if before != after {
                    info!(name, leaving = after, "seen in the API server");
                    goes.send_replace(after);
                }
            }
            Err(error) => debug!(name, %error, "watching for its deletion"),
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
    use std::time::Duration;

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
        let (told, mut leaving) = watch::channel(false);
        let following = follow(server.client(), "picomesh-system".into(), told);
        let following = tokio::spawn(following);
        sleep(Duration::from_secs(5)).await;
        server.set_away(true);
        sleep(Duration::from_secs(60)).await;
        server.set_away(false);
        sleep(Duration::from_secs(15)).await;
        assert!(!*leaving.borrow());
        // It may have forgotten what we knew last, and answer the watch itself so.
        server.refuse_old(SETS);
        sleep(Duration::from_secs(15)).await;
        assert!(!*leaving.borrow());

        server.delete(SETS, &format!("picomesh-system/{DAEMON_SET}"));
        let gone = tokio::time::timeout(Duration::from_secs(1), leaving.wait_for(|gone| *gone));
        gone.await.expect("within a second").unwrap();
        following.abort();
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

//! Keeps this node's [`MeshNode`]: compares what should stand there with what was written last,
//! and writes when that differs, or when it was long ago (somebody may have changed it). Of two
//! agents that change places one writes at a time.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use k8s_openapi::{
    api::core::v1::Node, apimachinery::pkg::apis::meta::v1::OwnerReference, jiff::Timestamp,
};
use kube::{
    Api, Client,
    api::{Patch, PatchParams, PostParams},
    core::PartialObjectMeta,
};
use serde_json::json;
use tokio::time::{Instant, sleep};
use tracing::{debug, warn};

use super::{
    crd::{Condition, MeshNode, MeshNodeSpec, MeshNodeStatus},
    watch::Pause,
};

/// How often it is looked at; a change is seen after this at the latest.
const LOOK: Duration = Duration::from_secs(2);
/// Written anew without a change.
const REFRESH: Duration = Duration::from_secs(600);

/// Writes what `now` says, until dropped; nothing while `writes` says no: then another agent does.
pub async fn keep(
    client: Client,
    node: Arc<str>,
    writes: Arc<AtomicBool>,
    now: impl Fn() -> MeshNodeStatus + Send,
) {
    let api = Api::<MeshNode>::all(client.clone());
    let mut pause = Pause::default();
    let mut complained = false;
    let mut written: Option<(MeshNodeStatus, Instant)> = None;
    // Times of transition go on where the agent before left them.
    let mut last = match api.get_opt(&node).await {
        Ok(found) => found.and_then(|found| found.status).unwrap_or_default(),
        Err(_) => MeshNodeStatus::default(),
    };
    loop {
        if !writes.load(Ordering::Acquire) {
            // Should it be ours again, it is not what we wrote last.
            written = None;
            sleep(LOOK).await;
            continue;
        }
        let mut status = now();
        date(&mut status.conditions, &last.conditions, Timestamp::now());
        let due = written
            .as_ref()
            .is_none_or(|(before, at)| *before != status || at.elapsed() >= REFRESH);
        if due {
            match write(&client, &api, &node, &status).await {
                Ok(()) => {
                    pause.reset();
                    complained = false;
                    last = status.clone();
                    written = Some((status, Instant::now()));
                }
                Err(error) => {
                    if !std::mem::replace(&mut complained, true) {
                        warn!(%error, node = &*node, "the MeshNode of this node cannot be written; \
                               see to its definition and to the rights of this agent");
                    }
                    debug!(%error, "MeshNode");
                    sleep(pause.next()).await;
                }
            }
        }
        sleep(LOOK).await;
    }
}

async fn write(
    client: &Client,
    api: &Api<MeshNode>,
    node: &str,
    status: &MeshNodeStatus,
) -> Result<(), kube::Error> {
    let patch = json!({ "status": status });
    let patch = Patch::Merge(&patch);
    let params = PatchParams::default();
    match api.patch_status(node, &params, &patch).await {
        Ok(_) => return Ok(()),
        Err(kube::Error::Api(status)) if status.code == 404 => {}
        Err(error) => return Err(error),
    }
    // It goes with its node.
    let nodes = Api::<PartialObjectMeta<Node>>::all(client.clone());
    let owner = nodes.get_opt(node).await?.map(|found| OwnerReference {
        api_version: "v1".into(),
        kind: "Node".into(),
        name: node.to_owned(),
        uid: found.metadata.uid.unwrap_or_default(),
        ..OwnerReference::default()
    });
    let mut own = MeshNode::new(node, MeshNodeSpec {});
    own.metadata.owner_references = owner.map(|owner| vec![owner]);
    match api.create(&PostParams::default(), &own).await {
        Ok(_) => {}
        Err(kube::Error::Api(status)) if status.code == 409 => {}
        Err(error) => return Err(error),
    }
    api.patch_status(node, &params, &patch).await.map(|_| ())
}

/// A condition keeps its time until its status changes.
fn date(conditions: &mut [Condition], before: &[Condition], now: Timestamp) {
    for condition in conditions {
        let same = before
            .iter()
            .find(|known| known.type_ == condition.type_ && known.status == condition.status)
            .filter(|known| !known.last_transition_time.is_empty());
        condition.last_transition_time = match same {
            Some(known) => known.last_transition_time.clone(),
            // To the second, as Kubernetes writes it.
            None => now.strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
        };
    }
}

#[cfg(test)]
mod tests {
    use parking_lot::Mutex;

    use super::*;
    use crate::testing::api::Api as Server;

    const MESH_NODES: &str = "/apis/picomesh.io/v1alpha1/meshnodes";

    #[tokio::test(start_paused = true)]
    async fn a_node_is_made_once_and_written_when_something_changes() {
        let server = Server::default();
        server.put(
            "/api/v1/nodes",
            json!({"metadata": {"name": "n1", "uid": "uid-n1"}}),
        );
        let status = Arc::new(Mutex::new(MeshNodeStatus {
            version: "1".into(),
            ..MeshNodeStatus::default()
        }));
        let now = Arc::clone(&status);
        let writes = Arc::new(AtomicBool::new(true));
        let of_agent = Arc::clone(&writes);
        let keeping = keep(server.client(), "n1".into(), of_agent, move || {
            now.lock().clone()
        });
        let keeping = tokio::spawn(keeping);
        sleep(Duration::from_secs(10)).await;
        let own = server.get(MESH_NODES, "/n1").unwrap();
        assert_eq!(own["status"]["version"], "1");
        assert_eq!(own["metadata"]["ownerReferences"][0]["uid"], "uid-n1");
        let written = |server: &Server| {
            let all = server.requests();
            all.iter().filter(|one| one.starts_with("PATCH")).count()
        };
        let before = written(&server);
        sleep(Duration::from_secs(60)).await;
        assert_eq!(written(&server), before, "nothing has changed");

        // What happens while the API server is away is written when it is back.
        server.set_away(true);
        status.lock().pods.captured = 7;
        sleep(Duration::from_secs(60)).await;
        server.set_away(false);
        sleep(Duration::from_secs(15)).await;
        let own = server.get(MESH_NODES, "/n1").unwrap();
        assert_eq!(own["status"]["pods"]["captured"], 7);

        // A successor has it, whatever its predecessor still sees; then that one died.
        writes.store(false, Ordering::Release);
        let before = written(&server);
        status.lock().pods.captured = 0;
        sleep(2 * REFRESH).await;
        assert_eq!(written(&server), before);
        writes.store(true, Ordering::Release);
        sleep(2 * LOOK).await;
        let own = server.get(MESH_NODES, "/n1").unwrap();
        assert_eq!(own["status"]["pods"]["captured"], 0);
        keeping.abort();
    }

    #[test]
    fn a_condition_keeps_its_time_until_its_status_changes() {
        let condition = |status: &str, message: &str| Condition {
            type_: "Ready".into(),
            status: status.into(),
            message: message.into(),
            ..Condition::default()
        };
        let at = |second| Timestamp::from_second(second).unwrap();
        let mut first = [condition("True", "")];
        date(&mut first, &[], at(0));
        assert_eq!(first[0].last_transition_time, "1970-01-01T00:00:00Z");
        let mut same = [condition("True", "other words")];
        date(&mut same, &first, at(60));
        assert_eq!(same[0].last_transition_time, "1970-01-01T00:00:00Z");
        let mut other = [condition("False", "")];
        date(&mut other, &first, at(60));
        assert_eq!(other[0].last_transition_time, "1970-01-01T00:01:00Z");
    }
}

//! May this node have this certificate? Pure: everything that is known is an argument.

use std::sync::Arc;

use super::pods::Pods;
use crate::control::{
    AGENT,
    ask::{Ask, Reason, Refusal},
};

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Decision {
    Approve,
    Deny(Refusal),
    /// So it stands, and a watch may only be late: a pod's agent can hear of it before we do.
    Wait(Refusal),
}

/// What counts besides the request.
pub(super) struct Circumstances<'a> {
    pub(super) pods: &'a Pods,
    /// Of the agents.
    pub(super) namespace: &'a Arc<str>,
    /// Places that requests of that node take which are not answered yet, this one among them.
    pub(super) pending: usize,
    pub(super) most_pending: usize,
    /// It has waited as long as anything may.
    pub(super) patience_over: bool,
}

pub(super) fn decide(ask: &Ask, at: &Circumstances<'_>) -> Decision {
    let node = &ask.requester.node;
    if at.pending > at.most_pending {
        return Decision::Deny(Refusal::new(
            Reason::TooManyPending,
            format!(
                "requests of node {node} that are not answered yet take all of its {} places \
                 (PICOMESH_NODE_REQUESTS); ask again later",
                at.most_pending
            ),
        ));
    }
    match placed(ask, at) {
        Ok(()) => Decision::Approve,
        Err(refusal) if at.patience_over => Decision::Deny(refusal),
        Err(refusal) => Decision::Wait(refusal),
    }
}

fn placed(ask: &Ask, at: &Circumstances<'_>) -> Result<(), Refusal> {
    let asker = &ask.requester;
    let (namespace, name) = (at.namespace, &asker.pod);
    let unknown = |message| Refusal::new(Reason::UnknownAgent, message);
    let Some(agent) = at.pods.pod(namespace, name) else {
        return Err(unknown(format!(
            "there is no pod {namespace}/{name}, whose token asks; agents that have ended may not \
             ask"
        )));
    };
    if *agent.uid != *asker.uid {
        return Err(unknown(format!(
            "the pod {namespace}/{name} has another uid than {}, whose token asks",
            asker.uid
        )));
    }
    let wrong = |message| Err(Refusal::new(Reason::WrongAgent, message));
    if *agent.service_account != *AGENT {
        return wrong(format!(
            "the pod {namespace}/{name} runs as service account {}, agents as {AGENT}",
            agent.service_account
        ));
    }
    if agent.node.as_deref() != Some(&*asker.node) {
        return wrong(format!(
            "the pod {namespace}/{name} is on node {}, its token says {}",
            agent.node.as_deref().unwrap_or("none"),
            asker.node
        ));
    }
    let identity = ask.identity();
    if !at.pods.runs(identity, &asker.node) {
        return Err(Refusal::new(
            Reason::NotOnNode,
            format!(
                "no pod of service account {}/{} that is in the mesh and has not ended runs on \
                 node {}",
                identity.namespace, identity.service_account, asker.node
            ),
        ));
    }
    Ok(())
}

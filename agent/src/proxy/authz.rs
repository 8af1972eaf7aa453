//! May it come in? The one call of the policy engine, the same for tunnelled, same-node and plain
//! connections, at their beginning and whenever policy changes.

use super::reason::Reason;
use crate::state::{
    Workload,
    policy::{Client, PolicyRef, Verdict},
};

/// Who decided that a connection is allowed.
#[derive(Clone, Debug)]
pub(super) struct Allowed {
    pub(super) server: Option<PolicyRef>,
    pub(super) authz: Option<PolicyRef>,
    /// Only because policy is `audit`.
    pub(super) audited: bool,
}

/// Who decided that it is not.
#[derive(Clone, Debug)]
pub(super) struct Denied {
    pub(super) reason: Reason,
    pub(super) server: Option<PolicyRef>,
}

/// A pod without a policy lets nobody in: policies are built for every pod of this node, so a
/// missing one means that something is wrong.
pub(super) fn decide(callee: &Workload, client: &Client, port: u16) -> Result<Allowed, Denied> {
    let Some(policy) = &callee.policy else {
        return Err(Denied {
            reason: Reason::NoPolicy,
            server: None,
        });
    };
    let decision = policy.decide(client, port);
    match decision.verdict {
        Verdict::Allow => Ok(Allowed {
            server: Some(decision.server),
            authz: decision.authz,
            audited: false,
        }),
        Verdict::Audit => Ok(Allowed {
            server: Some(decision.server),
            authz: decision.authz,
            audited: true,
        }),
        Verdict::Deny(reason) => Err(Denied {
            reason: reason.into(),
            server: Some(decision.server),
        }),
    }
}

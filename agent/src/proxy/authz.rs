//! May it? The one call of the policy engines, the same for tunnelled, same-node and plain
//! connections, at their beginning and whenever policy changes. A connection into a pod of this
//! node needs both NetworkPolicy and the mesh's policy ([`decide`]); one out of it needs
//! NetworkPolicy ([`leaves`]), and the callee's agent asks the rest.

use std::{net::SocketAddr, sync::Arc};

use super::{reason::Reason, report::Refusal};
use crate::state::{
    Mesh, Workload,
    network_policy::{self, NETWORK_POLICY_GROUP, NetworkVerdict, Peer, Way},
    objects::NetworkPolicy,
    policy::{Client, ClientIdentity, PolicyRef, Verdict},
};

/// Isolating policies that a refusal names.
const NAMED: usize = 3;

/// Who decided that a connection is allowed.
#[derive(Clone, Debug)]
pub(super) struct Allowed {
    pub(super) server: Option<PolicyRef>,
    pub(super) authz: Option<PolicyRef>,
    /// Only because policy is `audit`.
    pub(super) audited: bool,
}

/// Who decided that it is not.
#[derive(Debug)]
pub(super) struct Denied {
    pub(super) refusal: Refusal,
    pub(super) server: Option<PolicyRef>,
}

/// A pod without a policy lets nobody in: policies are built for every pod of this node, so a
/// missing one means that something is wrong.
pub(super) fn decide(
    mesh: &Mesh,
    callee: &Workload,
    client: &Client,
    port: u16,
) -> Result<Allowed, Denied> {
    enters(mesh, callee, client, port)?;
    let no_policy = || Denied {
        refusal: Reason::NoPolicy.into(),
        server: None,
    };
    let decision = callee
        .policy
        .as_ref()
        .ok_or_else(no_policy)?
        .decide(client, port);
    let audited = match decision.verdict {
        Verdict::Allow => false,
        Verdict::Audit => true,
        Verdict::Deny(reason) => {
            let who = match &client.identity {
                ClientIdentity::None => "plain client".into(),
                ClientIdentity::Proven(identity) => identity.to_string(),
            };
            let detail = format!("{who} may not call port {port} of {}", callee.key);
            return Err(Denied {
                refusal: Refusal::new(reason.into(), detail),
                server: Some(decision.server),
            });
        }
    };
    Ok(Allowed {
        server: Some(decision.server),
        authz: decision.authz,
        audited,
    })
}

/// NetworkPolicy's half of [`decide`].
pub(super) fn enters(
    mesh: &Mesh,
    callee: &Workload,
    client: &Client,
    port: u16,
) -> Result<(), Denied> {
    let pod = client.pod.as_ref().and_then(|uid| mesh.workloads.get(uid));
    let peer = Peer {
        ip: client.ip,
        pod: pod.map(|pod| &**pod),
    };
    match network_policy::decide(callee, Way::Ingress, peer, port) {
        NetworkVerdict::NotIsolated
        | NetworkVerdict::Itself
        | NetworkVerdict::OwnNode
        | NetworkVerdict::Allow(..) => Ok(()),
        NetworkVerdict::Deny(policies) => Err(Denied {
            refusal: Refusal::new(
                Reason::NetworkPolicyIngress,
                format!(
                    "{} is isolated by {} and no rule lets {} call port {port}",
                    callee.key,
                    names(policies),
                    name_of(peer),
                ),
            ),
            server: policies.first().map(|policy| PolicyRef {
                group: NETWORK_POLICY_GROUP.into(),
                kind: "networkpolicy".into(),
                name: Arc::clone(&policy.key.name),
            }),
        }),
        NetworkVerdict::Unknown => Err(Denied {
            refusal: Reason::NoPolicy.into(),
            server: None,
        }),
    }
}

/// May `caller` connect to the endpoint `to`, which is the pod `callee` if it is a pod?
pub(super) fn leaves(
    caller: &Workload,
    to: SocketAddr,
    callee: Option<&Workload>,
) -> Result<(), Refusal> {
    let peer = Peer {
        ip: to.ip(),
        pod: callee,
    };
    match network_policy::decide(caller, Way::Egress, peer, to.port()) {
        NetworkVerdict::NotIsolated
        | NetworkVerdict::Itself
        | NetworkVerdict::OwnNode
        | NetworkVerdict::Allow(..) => Ok(()),
        NetworkVerdict::Deny(policies) => Err(Refusal::new(
            Reason::NetworkPolicyEgress,
            format!(
                "{} is isolated by {} and no rule lets it call port {} of {}",
                caller.key,
                names(policies),
                to.port(),
                name_of(peer),
            ),
        )),
        NetworkVerdict::Unknown => Err(Reason::NoPolicy.into()),
    }
}

fn names(policies: &[Arc<NetworkPolicy>]) -> String {
    let shown: Vec<_> = policies
        .iter()
        .take(NAMED)
        .map(|policy| policy.key.to_string())
        .collect();
    let more = policies.len().saturating_sub(NAMED);
    let more = if more > 0 {
        format!(" and {more} more")
    } else {
        String::new()
    };
    format!("NetworkPolicy {}{more}", shown.join(", "))
}

fn name_of(peer: Peer<'_>) -> String {
    match peer.pod {
        Some(pod) => format!("{} ({})", peer.ip, pod.key),
        None => peer.ip.to_string(),
    }
}

//! Who may come in: the one place where a connection to a local pod is allowed or denied, for
//! tunnelled, same-node and plain clients alike. Pure.

use std::{net::{IpAddr, SocketAddr}, sync::Arc};

use super::{Identity, ObjectKey, objects::DefaultPolicy};

/// All rules that bear on one pod. Built with the mesh, evaluated per connection.
#[derive(Debug)]
pub struct InboundPolicy {
    // Fields are the room's own.
    pub default: DefaultPolicy,
}

/// Who calls, as far as it is proven.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Client {
    /// The client's own address, as the application will see it.
    pub ip: IpAddr,
    pub identity: ClientIdentity,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClientIdentity {
    /// Plain connection from outside the mesh.
    None,
    /// Proven by mTLS, or by the netns whose listener accepted it (same node).
    Proven(Identity),
}

/// The answer, with what metrics and logs want to name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    pub verdict: Verdict,
    /// srv_group/kind/name: the Server, or kind `default` and the default policy's name.
    pub server: PolicyRef,
    /// authz_group/kind/name of what allowed it.
    pub authz: Option<PolicyRef>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Allow,
    /// Allowed because the policy in force is `audit`: would be denied.
    Audit,
    Deny(DenyReason),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DenyReason {
    /// The port needs a proven identity and the client has none.
    Unauthenticated,
    /// The identity is proven, and no rule allows it.
    Unauthorized,
    /// The client's address is outside the networks allowed.
    Network,
    /// The default policy is `deny` and no rule allows it.
    DefaultDeny,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PolicyRef {
    pub group: Arc<str>,
    pub kind: Arc<str>,
    pub name: Arc<str>,
}

impl InboundPolicy {
    /// May `client` connect to `port` of this pod?
    pub fn decide(&self, _client: &Client, _port: u16) -> Decision {
        unreachable!("written by the room's owner")
    }
}

/// Kept for readers that log where a connection was going.
pub type Target = (ObjectKey, SocketAddr);

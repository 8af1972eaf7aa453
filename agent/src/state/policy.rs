//! Who may come in: the one place where a connection to a local pod is allowed or denied, for
//! tunnelled, same-node and plain clients alike. Pure.
//!
//! `servers` builds one [`InboundPolicy`] per local pod from the policy objects; the proxy asks it
//! for each connection, and again for each open one when the mesh has changed. Precedence is
//! Linkerd's:
//!
//! 1. A Server that selects the pod and the port closes the port. Whatever authorises a client for
//!    that Server opens it again, for that client.
//! 2. Who is authorised by nothing falls to the Server's `accessPolicy` (`deny` if it names none).
//! 3. A port without Server follows the default inbound policy: the pod's own, else its
//!    namespace's, else the mesh's. Authorizations never apply to such a port, not even those that
//!    target the namespace.
//!
//! A client on the same node counts as proven, although its bytes are not encrypted: the netns it
//! called from says who it is.
//!
//! Which [`DenyReason`] is given when several authorizations fail is for people, not for security:
//! it is that of the authorization the client came nearest to. Somebody whose identity is right and
//! whose address is wrong hears of the address.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use ipnet::IpNet;

use super::{
    Identity, PodUid,
    objects::{DefaultPolicy, IdentityPattern, NetworkMatch},
};

/// API group of the policy kinds.
pub const POLICY_GROUP: &str = "policy.linkerd.io";

/// All rules that bear on one pod. Built with the mesh, evaluated per connection.
#[derive(Debug)]
pub struct InboundPolicy {
    /// For ports that no Server selects.
    pub default: DefaultPolicy,
    pub(super) default_ref: PolicyRef,
    /// The Server that selects a port, with what it allows. Shared by the pods it selects.
    pub(super) servers: BTreeMap<u16, Arc<ServerPolicy>>,
    /// What the `cluster-*` modes count as inside.
    pub(super) cluster_networks: Arc<[IpNet]>,
}

/// One Server and all that authorises clients for it.
#[derive(Debug)]
pub(super) struct ServerPolicy {
    pub(super) server: PolicyRef,
    pub(super) access: DefaultPolicy,
    pub(super) access_ref: PolicyRef,
    /// Any of them lets a client in. Ordered by kind and name, so that the same one is named always.
    pub(super) authorizations: Vec<Authorization>,
}

/// One ServerAuthorization or AuthorizationPolicy, its references resolved.
#[derive(Debug)]
pub(super) struct Authorization {
    pub(super) authz: PolicyRef,
    /// All must hold; none means anybody.
    pub(super) conditions: Vec<Condition>,
}

#[derive(Clone, Debug)]
pub(super) enum Condition {
    /// The client's address lies in any of them.
    Networks(Vec<NetworkMatch>),
    /// The client has proven an identity that matches any of them.
    Identities(Vec<IdentityPattern>),
    /// A reference to something that is not there: holds for nobody.
    Never,
}

/// Who calls, as far as it is proven.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Client {
    /// The client's own address, as the application will see it.
    pub ip: IpAddr,
    /// The pod that has this address, unless the client has proven to be another. For
    /// [`super::network_policy`]; the mesh's policy asks for the identity.
    pub pod: Option<PodUid>,
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

impl DenyReason {
    /// The fixed word in logs and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unauthenticated => "unauthenticated",
            Self::Unauthorized => "unauthorized",
            Self::Network => "network",
            Self::DefaultDeny => "default_deny",
        }
    }
}

/// Kinds in lower case, as Linkerd's metrics have them: `server`, `serverauthorization`,
/// `authorizationpolicy`, `default`. The group of a `default` is empty.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PolicyRef {
    pub group: Arc<str>,
    pub kind: Arc<str>,
    pub name: Arc<str>,
}

impl PolicyRef {
    pub(super) fn of_default(policy: DefaultPolicy) -> Self {
        Self {
            group: "".into(),
            kind: "default".into(),
            name: policy.as_str().into(),
        }
    }

    pub(super) fn of_object(kind: &str, name: &Arc<str>) -> Self {
        Self {
            group: POLICY_GROUP.into(),
            kind: kind.into(),
            name: Arc::clone(name),
        }
    }
}

impl InboundPolicy {
    /// May `client` connect to `port` of this pod?
    pub fn decide(&self, client: &Client, port: u16) -> Decision {
        let ip = client.ip.to_canonical();
        let Some(server) = self.servers.get(&port) else {
            let verdict = self.by_mode(self.default, ip, &client.identity);
            return Decision {
                verdict,
                server: self.default_ref.clone(),
                authz: verdict.lets_in().then(|| self.default_ref.clone()),
            };
        };

        let mut nearest: Option<DenyReason> = None;
        for authorization in &server.authorizations {
            match authorization.check(ip, &client.identity) {
                Ok(()) => {
                    return Decision {
                        verdict: Verdict::Allow,
                        server: server.server.clone(),
                        authz: Some(authorization.authz.clone()),
                    };
                }
                Err(reason) => {
                    nearest = nearest
                        .into_iter()
                        .chain([reason])
                        .max_by_key(|r| r.nearness());
                }
            }
        }

        let verdict = match (self.by_mode(server.access, ip, &client.identity), nearest) {
            (Verdict::Deny(_), Some(reason)) => Verdict::Deny(reason),
            (verdict @ (Verdict::Allow | Verdict::Audit | Verdict::Deny(_)), _) => verdict,
        };
        Decision {
            verdict,
            server: server.server.clone(),
            authz: verdict.lets_in().then(|| server.access_ref.clone()),
        }
    }

    /// What one of the six default policies says.
    fn by_mode(&self, mode: DefaultPolicy, ip: IpAddr, identity: &ClientIdentity) -> Verdict {
        let inside = || {
            self.cluster_networks
                .iter()
                .any(|network| network.contains(&ip))
        };
        let proven = match identity {
            ClientIdentity::None => false,
            ClientIdentity::Proven(_) => true,
        };
        match mode {
            DefaultPolicy::AllUnauthenticated => Verdict::Allow,
            DefaultPolicy::AllAuthenticated if proven => Verdict::Allow,
            DefaultPolicy::AllAuthenticated => Verdict::Deny(DenyReason::Unauthenticated),
            DefaultPolicy::ClusterUnauthenticated if inside() => Verdict::Allow,
            DefaultPolicy::ClusterUnauthenticated => Verdict::Deny(DenyReason::Network),
            DefaultPolicy::ClusterAuthenticated if !proven => {
                Verdict::Deny(DenyReason::Unauthenticated)
            }
            DefaultPolicy::ClusterAuthenticated if inside() => Verdict::Allow,
            DefaultPolicy::ClusterAuthenticated => Verdict::Deny(DenyReason::Network),
            DefaultPolicy::Deny => Verdict::Deny(DenyReason::DefaultDeny),
            DefaultPolicy::Audit => Verdict::Audit,
        }
    }

    /// The Server on each port that has one, for `debug policies`.
    pub fn servers(&self) -> impl Iterator<Item = (u16, &PolicyRef)> {
        self.servers
            .iter()
            .map(|(port, policy)| (*port, &policy.server))
    }
}

impl Verdict {
    pub fn lets_in(self) -> bool {
        match self {
            Self::Allow | Self::Audit => true,
            Self::Deny(_) => false,
        }
    }
}

impl Authorization {
    fn check(&self, ip: IpAddr, identity: &ClientIdentity) -> Result<(), DenyReason> {
        let failures = self
            .conditions
            .iter()
            .filter_map(|condition| condition.check(ip, identity));
        // The failure that keeps the client out even if the others were mended.
        failures
            .min_by_key(|reason| reason.nearness())
            .map_or(Ok(()), Err)
    }
}

impl Condition {
    /// `None`: it holds.
    fn check(&self, ip: IpAddr, identity: &ClientIdentity) -> Option<DenyReason> {
        match (self, identity) {
            (Self::Networks(networks), _) => {
                let inside = networks.iter().any(|network| network.contains(ip));
                (!inside).then_some(DenyReason::Network)
            }
            (Self::Identities(_), ClientIdentity::None) => Some(DenyReason::Unauthenticated),
            (Self::Identities(patterns), ClientIdentity::Proven(identity)) => {
                let known = patterns.iter().any(|pattern| pattern.matches(identity));
                (!known).then_some(DenyReason::Unauthorized)
            }
            (Self::Never, _) => Some(DenyReason::DefaultDeny),
        }
    }
}

impl DenyReason {
    /// How close the client came to being let in.
    fn nearness(self) -> u8 {
        match self {
            Self::DefaultDeny => 0,
            Self::Unauthenticated | Self::Unauthorized => 1,
            Self::Network => 2,
        }
    }
}

#[cfg(test)]
mod tests;

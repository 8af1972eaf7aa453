//! The objects of `policy.linkerd.io` that decide about connections.

use std::{fmt, net::IpAddr, sync::Arc};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::{DefaultPolicy, Labels, TargetPort};
use crate::state::{Identity, ObjectKey};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Server {
    pub key: ObjectKey,
    pub labels: Labels,
    pub pod_selector: Selector,
    pub port: TargetPort,
    pub proxy_protocol: ProxyProtocol,
    pub access_policy: DefaultPolicy,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum ProxyProtocol {
    #[default]
    Unknown,
    Http1,
    Http2,
    Grpc,
    Opaque,
    Tls,
}

/// A Kubernetes label selector; both parts must hold.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Selector {
    pub match_labels: Labels,
    pub match_expressions: Vec<Requirement>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Requirement {
    pub key: Arc<str>,
    pub operator: Operator,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Operator {
    In(Vec<Arc<str>>),
    NotIn(Vec<Arc<str>>),
    Exists,
    DoesNotExist,
}

impl Selector {
    /// An empty selector selects everything.
    pub fn matches(&self, labels: &Labels) -> bool {
        contains_all(labels, &self.match_labels)
            && self
                .match_expressions
                .iter()
                .all(|requirement| requirement.matches(labels))
    }

    /// The labels it speaks of.
    pub fn keys(&self) -> impl Iterator<Item = &Arc<str>> {
        let expressions = self.match_expressions.iter();
        self.match_labels
            .keys()
            .chain(expressions.map(|requirement| &requirement.key))
    }
}

impl Requirement {
    fn matches(&self, labels: &Labels) -> bool {
        let value = labels.get(&self.key);
        match &self.operator {
            Operator::In(values) => value.is_some_and(|value| values.contains(value)),
            // As in Kubernetes: an absent label is not in the set.
            Operator::NotIn(values) => value.is_none_or(|value| !values.contains(value)),
            Operator::Exists => value.is_some(),
            Operator::DoesNotExist => value.is_none(),
        }
    }
}

/// Every one of `wanted` stands in `labels` with the same value.
pub fn contains_all(labels: &Labels, wanted: &Labels) -> bool {
    wanted
        .iter()
        .all(|(key, value)| labels.get(key) == Some(value))
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ServerAuthorization {
    pub key: ObjectKey,
    pub server: ServerRef,
    /// Any of them; empty means any address.
    pub networks: Vec<NetworkMatch>,
    pub client: ClientMatch,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum ServerRef {
    Name(Arc<str>),
    Selector(Selector),
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum ClientMatch {
    /// Anybody, with or without identity.
    Unauthenticated,
    /// Any client over TLS of the mesh, whoever it is. The mesh's TLS always proves an identity.
    AnyTls,
    Identities(Vec<IdentityPattern>),
}

/// One identity, or a pattern with a leading `*`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum IdentityPattern {
    Any,
    Exact(Identity),
    /// Everything of one namespace (identityRef kind Namespace).
    Namespace {
        trust_domain: Arc<str>,
        namespace: Arc<str>,
    },
    /// `*.ns.serviceaccount.identity.linkerd.<td>` and the like: what follows the `*`, with its
    /// leading dot.
    LinkerdSuffix(Arc<str>),
}

impl IdentityPattern {
    pub fn matches(&self, identity: &Identity) -> bool {
        match self {
            Self::Any => true,
            Self::Exact(exact) => exact == identity,
            Self::Namespace {
                trust_domain,
                namespace,
            } => *trust_domain == identity.trust_domain && *namespace == identity.namespace,
            Self::LinkerdSuffix(suffix) => identity.linkerd_name().ends_with(&**suffix),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NetworkMatch {
    pub cidr: IpNet,
    pub except: Vec<IpNet>,
}

impl NetworkMatch {
    pub fn contains(&self, ip: IpAddr) -> bool {
        self.cidr.contains(&ip) && !self.except.iter().any(|hole| hole.contains(&ip))
    }
}

impl fmt::Display for NetworkMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.cidr)?;
        for (index, hole) in self.except.iter().enumerate() {
            let before = if index == 0 { " except" } else { "," };
            write!(f, "{before} {hole}")?;
        }
        Ok(())
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AuthorizationPolicy {
    pub key: ObjectKey,
    pub target: PolicyTarget,
    /// All must hold; empty means anybody.
    pub required: Vec<AuthenticationRef>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum PolicyTarget {
    Server(Arc<str>),
    Namespace,
    /// HTTPRoute and GRPCRoute: kept and reported, without effect before HTTP is here: connections
    /// they would have to allow stay forbidden.
    Route {
        kind: Arc<str>,
        name: Arc<str>,
    },
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum AuthenticationRef {
    MeshTls { namespace: Arc<str>, name: Arc<str> },
    Network { namespace: Arc<str>, name: Arc<str> },
    ServiceAccount { namespace: Arc<str>, name: Arc<str> },
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MeshTlsAuthentication {
    pub key: ObjectKey,
    /// Any of them.
    pub identities: Vec<IdentityPattern>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NetworkAuthentication {
    pub key: ObjectKey,
    pub networks: Vec<NetworkMatch>,
}

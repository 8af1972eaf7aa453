//! An [`InboundPolicy`] in words, for `debug policies`. What it says is what [`super::policy`]
//! decides by; it decides nothing itself.

use serde::Serialize;

use super::{
    objects::{DefaultPolicy, IdentityPattern},
    policy::{Authorization, Condition, InboundPolicy, ServerPolicy},
};

/// Who may come in by one port of a pod, or by all that no Server selects.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PortWords {
    /// `None`: every port without a Server.
    pub port: Option<u16>,
    /// The Server, `None` for the default policy.
    pub server: Option<String>,
    /// One sentence for each way in.
    pub allowed: Vec<String>,
    /// What happens to everybody else.
    pub otherwise: &'static str,
}

impl InboundPolicy {
    /// The default first, then the ports that have a Server.
    pub fn describe(&self) -> Vec<PortWords> {
        let default = PortWords {
            port: None,
            server: None,
            allowed: Vec::new(),
            otherwise: default_policy(self.default),
        };
        let servers = self.servers.iter().map(|(port, server)| PortWords {
            port: Some(*port),
            ..server_words(server)
        });
        std::iter::once(default).chain(servers).collect()
    }
}

fn server_words(server: &ServerPolicy) -> PortWords {
    PortWords {
        port: None,
        server: Some(server.server.name.to_string()),
        allowed: server.authorizations.iter().map(authorization).collect(),
        otherwise: default_policy(server.access),
    }
}

fn authorization(authorization: &Authorization) -> String {
    let name = format!("{} {}", authorization.authz.kind, authorization.authz.name);
    if authorization.conditions.is_empty() {
        return format!("{name}: anybody");
    }
    let conditions: Vec<_> = authorization.conditions.iter().map(condition).collect();
    format!("{name}: {}", conditions.join(" and "))
}

fn condition(condition: &Condition) -> String {
    match condition {
        Condition::Networks(networks) => {
            let networks: Vec<_> = networks.iter().map(ToString::to_string).collect();
            format!("from {}", networks.join(" or "))
        }
        Condition::Identities(patterns) => {
            let patterns: Vec<_> = patterns.iter().map(identity).collect();
            format!("as {}", patterns.join(" or "))
        }
        Condition::Never => "nobody (it refers to something that is not there)".into(),
    }
}

fn identity(pattern: &IdentityPattern) -> String {
    match pattern {
        IdentityPattern::Any => "any identity".into(),
        IdentityPattern::Exact(identity) => identity.to_string(),
        IdentityPattern::Namespace {
            trust_domain,
            namespace,
        } => format!("any of spiffe://{trust_domain}/ns/{namespace}"),
        IdentityPattern::LinkerdSuffix(suffix) => format!("*{suffix}"),
    }
}

fn default_policy(policy: DefaultPolicy) -> &'static str {
    match policy {
        DefaultPolicy::AllUnauthenticated => "all-unauthenticated: anybody",
        DefaultPolicy::AllAuthenticated => "all-authenticated: whoever proves an identity",
        DefaultPolicy::ClusterUnauthenticated => {
            "cluster-unauthenticated: anybody of the cluster's networks"
        }
        DefaultPolicy::ClusterAuthenticated => {
            "cluster-authenticated: whoever proves an identity, of the cluster's networks"
        }
        DefaultPolicy::Deny => "deny: nobody",
        DefaultPolicy::Audit => "audit: anybody, and logged",
    }
}

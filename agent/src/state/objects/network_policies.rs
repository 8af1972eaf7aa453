//! NetworkPolicy of `networking.k8s.io/v1`, as written: what its selectors select is not known yet.

use std::sync::Arc;

use picomesh_common::PortRange;
use serde::{Deserialize, Serialize};

use super::{NetworkMatch, Protocol, Selector};
use crate::state::ObjectKey;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NetworkPolicy {
    pub key: ObjectKey,
    /// The pods of its own namespace that it isolates.
    pub pod_selector: Selector,
    /// `None`: it does not isolate them from clients. Any rule lets a client in; no rule, none.
    pub ingress: Option<Vec<NetworkRule>>,
    /// The same for the servers they call.
    pub egress: Option<Vec<NetworkRule>>,
}

/// Both parts must hold.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NetworkRule {
    /// Any of them; empty means anybody.
    pub peers: Vec<NetworkPeer>,
    /// Any of them; empty means every port of every protocol.
    pub ports: Vec<NetworkPort>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum NetworkPeer {
    Block(NetworkMatch),
    Pods {
        /// `None`: the policy's own namespace.
        namespaces: Option<Selector>,
        pods: Selector,
    },
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NetworkPort {
    pub protocol: Protocol,
    pub ports: NetworkPorts,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum NetworkPorts {
    All,
    Range(#[serde(with = "super::ranges::one")] PortRange),
    /// A container's port of that name in the pod that is called.
    Name(Arc<str>),
}

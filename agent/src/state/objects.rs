//! The cluster's objects in plain types: what `k8s::convert` makes of manifests and watches, and
//! what [`super::Mesh::build`] reads. Nothing here is resolved against anything else yet.

mod network_policies;
mod policies;
mod ranges;
mod table;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use ipnet::IpNet;
use picomesh_common::PortRange;
use serde::{Deserialize, Serialize};

use super::{ObjectKey, PodUid};

pub use network_policies::*;
pub use policies::*;
pub use table::Kind;

pub type Labels = BTreeMap<Arc<str>, Arc<str>>;

/// Everything known at one moment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Objects {
    pub nodes: BTreeMap<ObjectKey, Arc<Node>>,
    pub namespaces: BTreeMap<ObjectKey, Arc<Namespace>>,
    pub pods: BTreeMap<PodUid, Arc<Pod>>,
    pub services: BTreeMap<ObjectKey, Arc<Service>>,
    pub endpoint_slices: BTreeMap<ObjectKey, Arc<EndpointSlice>>,
    pub service_accounts: BTreeMap<ObjectKey, ()>,
    pub servers: BTreeMap<ObjectKey, Arc<Server>>,
    pub server_authorizations: BTreeMap<ObjectKey, Arc<ServerAuthorization>>,
    pub authorization_policies: BTreeMap<ObjectKey, Arc<AuthorizationPolicy>>,
    pub mesh_tls_authentications: BTreeMap<ObjectKey, Arc<MeshTlsAuthentication>>,
    pub network_authentications: BTreeMap<ObjectKey, Arc<NetworkAuthentication>>,
    pub network_policies: BTreeMap<ObjectKey, Arc<NetworkPolicy>>,
    /// Pods that came while nobody told of namespaces: theirs may have joined the mesh before.
    pub early: BTreeSet<PodUid>,
}

/// One object of any kind that we read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Object {
    Node(Node),
    Namespace(Namespace),
    Pod(Pod),
    Service(Service),
    EndpointSlice(EndpointSlice),
    ServiceAccount(ObjectKey),
    Server(Server),
    ServerAuthorization(ServerAuthorization),
    AuthorizationPolicy(AuthorizationPolicy),
    MeshTlsAuthentication(MeshTlsAuthentication),
    NetworkAuthentication(NetworkAuthentication),
    NetworkPolicy(NetworkPolicy),
}

impl Object {
    pub fn kind(&self) -> &'static str {
        self.of().as_str()
    }

    pub fn key(&self) -> &ObjectKey {
        match self {
            Self::Node(object) => &object.key,
            Self::Namespace(object) => &object.key,
            Self::Pod(object) => &object.key,
            Self::Service(object) => &object.key,
            Self::EndpointSlice(object) => &object.key,
            Self::ServiceAccount(key) => key,
            Self::Server(object) => &object.key,
            Self::ServerAuthorization(object) => &object.key,
            Self::AuthorizationPolicy(object) => &object.key,
            Self::MeshTlsAuthentication(object) => &object.key,
            Self::NetworkAuthentication(object) => &object.key,
            Self::NetworkPolicy(object) => &object.key,
        }
    }
}

/// Settings of the mesh as a whole; from the command line.
#[derive(Clone, Debug)]
pub struct MeshSettings {
    pub cluster: Arc<str>,
    pub cluster_domain: Arc<str>,
    pub trust_domain: Arc<str>,
    /// Of the mesh's own pods, which are never in it.
    pub namespace: Arc<str>,
    /// This agent's node.
    pub node: Arc<str>,
    pub default_inbound_policy: DefaultPolicy,
    pub outbound_default: OutboundDefault,
    /// Source addresses that the `cluster-*` modes count as inside.
    pub cluster_networks: Vec<IpNet>,
    /// Where the nodes' agents accept tunnels from each other.
    pub tunnel_port: u16,
    /// Where the nodes' agents show their metrics. 0, which tests may choose: nobody knows.
    pub metrics_port: u16,
}

/// What `--cluster-networks` is when nobody says it: the private ranges.
pub fn private_networks() -> Vec<IpNet> {
    let v4 = |a, b, prefix| (IpAddr::from([a, b, 0, 0]), prefix);
    let v6 = IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, 0]);
    [
        v4(10, 0, 8),
        v4(172, 16, 12),
        v4(192, 168, 16),
        v4(100, 64, 10),
        (v6, 8),
    ]
    .into_iter()
    .map(|(address, prefix)| IpNet::new_assert(address, prefix))
    .collect()
}

/// Linkerd's default inbound policies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum DefaultPolicy {
    #[default]
    AllUnauthenticated,
    AllAuthenticated,
    ClusterUnauthenticated,
    ClusterAuthenticated,
    Deny,
    /// Allowed, and logged as what would be denied.
    Audit,
}

impl DefaultPolicy {
    pub const ALL: [Self; 6] = [
        Self::AllUnauthenticated,
        Self::AllAuthenticated,
        Self::ClusterUnauthenticated,
        Self::ClusterAuthenticated,
        Self::Deny,
        Self::Audit,
    ];

    /// The word that users write and that metrics show.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::AllUnauthenticated => "all-unauthenticated",
            Self::AllAuthenticated => "all-authenticated",
            Self::ClusterUnauthenticated => "cluster-unauthenticated",
            Self::ClusterAuthenticated => "cluster-authenticated",
            Self::Deny => "deny",
            Self::Audit => "audit",
        }
    }

    pub fn from_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|policy| policy.as_str() == word)
    }
}

/// What becomes of a connection to an address nobody in the mesh has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum OutboundDefault {
    #[default]
    Allow,
    Deny,
}

/// Words on a namespace or pod (labels and annotations, aliases resolved). `None`: not said here.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Words {
    pub mesh: Option<bool>,
    pub default_inbound_policy: Option<DefaultPolicy>,
    pub outbound_default: Option<OutboundDefault>,
    #[serde(with = "ranges")]
    pub skip_inbound: Option<Vec<PortRange>>,
    #[serde(with = "ranges")]
    pub skip_outbound: Option<Vec<PortRange>>,
    /// Read and kept; HTTP comes later, so today every port is opaque.
    #[serde(with = "ranges")]
    pub opaque_ports: Option<Vec<PortRange>>,
    /// Words that could not be read, as sentences that name field, value and remedy. The fields
    /// above hold the safe reading. The built mesh lists them among its problems.
    pub problems: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Node {
    pub key: ObjectKey,
    pub addresses: Vec<IpAddr>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Namespace {
    pub key: ObjectKey,
    pub labels: Labels,
    pub words: Words,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Pod {
    pub key: ObjectKey,
    pub uid: PodUid,
    pub node: Option<Arc<str>>,
    pub ips: Vec<IpAddr>,
    pub host_network: bool,
    /// Empty: it names none, which a cluster lets no pod do but a mirror.
    pub service_account: Arc<str>,
    /// A mirror of a pod that its kubelet runs by itself: the uid by which the kubelet knows that
    /// one.
    pub mirror_of: Option<Arc<str>>,
    pub labels: Labels,
    pub words: Words,
    pub ports: Vec<ContainerPort>,
    pub ready: bool,
    /// Phase Succeeded or Failed: its addresses may belong to somebody else already.
    pub terminal: bool,
    /// deletionTimestamp is set.
    pub terminating: bool,
    /// Owning workload, e.g. (Deployment, "web"); `deployment` in metrics. A ReplicaSet's name
    /// less its pod-template-hash counts as a Deployment.
    pub owner: Option<Owner>,
    /// A policy that only the CNI can enforce selects it, so it is never meshed: which one, as a
    /// sentence.
    pub foreign_policy: Option<Arc<str>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// Lower case, as Linkerd's metric label: deployment, statefulset, daemonset, replicaset, k8s_job…
    pub kind: Arc<str>,
    pub name: Arc<str>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerPort {
    pub name: Option<Arc<str>>,
    pub port: u16,
    pub protocol: Protocol,
    pub host_port: Option<u16>,
    pub host_ip: Option<IpAddr>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Service {
    pub key: ObjectKey,
    /// Empty for a headless Service.
    pub cluster_ips: Vec<IpAddr>,
    pub external_ips: Vec<IpAddr>,
    pub load_balancer_ips: Vec<IpAddr>,
    pub ports: Vec<ServicePort>,
    /// `None`: a Service without selector (endpoints come from EndpointSlices alone).
    pub selector: Option<Labels>,
    /// Some(timeout in seconds): sessionAffinity ClientIP.
    pub session_affinity: Option<u32>,
    pub internal_traffic_local: bool,
    pub external_traffic_local: bool,
    pub publish_not_ready: bool,
    pub external_name: Option<Arc<str>>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ServicePort {
    pub name: Option<Arc<str>>,
    pub port: u16,
    pub target: TargetPort,
    pub protocol: Protocol,
    pub node_port: Option<u16>,
    pub app_protocol: Option<Arc<str>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TargetPort {
    Number(u16),
    Name(Arc<str>),
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EndpointSlice {
    pub key: ObjectKey,
    /// Label kubernetes.io/service-name.
    pub service: Arc<str>,
    pub endpoints: Vec<SliceEndpoint>,
    /// (name, port, protocol); no port means every port of the address.
    pub ports: Vec<(Option<Arc<str>>, Option<u16>, Protocol)>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SliceEndpoint {
    pub addresses: Vec<IpAddr>,
    /// targetRef, if it names a Pod: identity and node come from here, never from the address.
    pub pod: Option<PodUid>,
    pub node: Option<Arc<str>>,
    pub ready: bool,
    pub serving: bool,
    pub terminating: bool,
}

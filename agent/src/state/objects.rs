//! The cluster's objects in plain types: what `k8s::convert` makes of manifests and watches, and
//! what [`super::Mesh::build`] reads. Nothing here is resolved against anything else yet.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use ipnet::IpNet;
use picomesh_common::PortRange;

use super::{Identity, ObjectKey, PodUid};

pub type Labels = BTreeMap<Arc<str>, Arc<str>>;

/// Everything known at one moment.
#[derive(Clone, Debug, Default)]
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
}

/// Settings of the mesh as a whole; from the command line.
#[derive(Clone, Debug)]
pub struct MeshSettings {
    pub cluster: Arc<str>,
    pub cluster_domain: Arc<str>,
    pub trust_domain: Arc<str>,
    /// This agent's node.
    pub node: Arc<str>,
    pub default_inbound_policy: DefaultPolicy,
    pub outbound_default: OutboundDefault,
    /// Source addresses that the `cluster-*` modes count as inside.
    pub cluster_networks: Vec<IpNet>,
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum OutboundDefault {
    #[default]
    Allow,
    Deny,
}

/// Words on a namespace or pod (labels and annotations, aliases resolved). `None`: not said here.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Words {
    pub mesh: Option<bool>,
    pub default_inbound_policy: Option<DefaultPolicy>,
    pub outbound_default: Option<OutboundDefault>,
    pub skip_inbound: Option<Vec<PortRange>>,
    pub skip_outbound: Option<Vec<PortRange>>,
    /// Read and kept; HTTP comes later, so today every port is opaque.
    pub opaque_ports: Option<Vec<PortRange>>,
    /// Words that could not be read, as sentences that name field, value and remedy. The fields
    /// above hold the safe reading. The built mesh lists them among its problems.
    pub problems: Vec<String>,
}

#[derive(Clone, Debug)]
pub struct Node {
    pub key: ObjectKey,
    pub addresses: Vec<IpAddr>,
}

#[derive(Clone, Debug)]
pub struct Namespace {
    pub key: ObjectKey,
    pub labels: Labels,
    pub words: Words,
}

#[derive(Clone, Debug)]
pub struct Pod {
    pub key: ObjectKey,
    pub uid: PodUid,
    pub node: Option<Arc<str>>,
    pub ips: Vec<IpAddr>,
    pub host_network: bool,
    pub service_account: Arc<str>,
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
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Lower case, as Linkerd's metric label: deployment, statefulset, daemonset, replicaset, k8s_job…
    pub kind: Arc<str>,
    pub name: Arc<str>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContainerPort {
    pub name: Option<Arc<str>>,
    pub port: u16,
    pub protocol: Protocol,
    pub host_port: Option<u16>,
    pub host_ip: Option<IpAddr>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

#[derive(Clone, Debug)]
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

#[derive(Clone, Debug)]
pub struct ServicePort {
    pub name: Option<Arc<str>>,
    pub port: u16,
    pub target: TargetPort,
    pub protocol: Protocol,
    pub node_port: Option<u16>,
    pub app_protocol: Option<Arc<str>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetPort {
    Number(u16),
    Name(Arc<str>),
}

#[derive(Clone, Debug)]
pub struct EndpointSlice {
    pub key: ObjectKey,
    /// Label kubernetes.io/service-name.
    pub service: Arc<str>,
    pub endpoints: Vec<SliceEndpoint>,
    /// (name, port, protocol); no port means every port of the address.
    pub ports: Vec<(Option<Arc<str>>, Option<u16>, Protocol)>,
}

#[derive(Clone, Debug)]
pub struct SliceEndpoint {
    pub addresses: Vec<IpAddr>,
    /// targetRef, if it names a Pod: identity and node come from here, never from the address.
    pub pod: Option<PodUid>,
    pub node: Option<Arc<str>>,
    pub ready: bool,
    pub serving: bool,
    pub terminating: bool,
}

// ---- policy.linkerd.io ----

#[derive(Clone, Debug)]
pub struct Server {
    pub key: ObjectKey,
    pub labels: Labels,
    pub pod_selector: Selector,
    pub port: TargetPort,
    pub proxy_protocol: ProxyProtocol,
    pub access_policy: DefaultPolicy,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
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
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Selector {
    pub match_labels: Labels,
    pub match_expressions: Vec<Requirement>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Requirement {
    pub key: Arc<str>,
    pub operator: Operator,
}

#[derive(Clone, Debug, PartialEq)]
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

#[derive(Clone, Debug)]
pub struct ServerAuthorization {
    pub key: ObjectKey,
    pub server: ServerRef,
    /// Any of them; empty means any address.
    pub networks: Vec<NetworkMatch>,
    pub client: ClientMatch,
}

#[derive(Clone, Debug)]
pub enum ServerRef {
    Name(Arc<str>),
    Selector(Selector),
}

#[derive(Clone, Debug, PartialEq)]
pub enum ClientMatch {
    /// Anybody, with or without identity.
    Unauthenticated,
    /// Any client over TLS of the mesh, whoever it is. The mesh's TLS always proves an identity.
    AnyTls,
    Identities(Vec<IdentityPattern>),
}

/// One identity, or a pattern with a leading `*`.
#[derive(Clone, Debug, PartialEq)]
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

#[derive(Clone, Debug, PartialEq)]
pub struct NetworkMatch {
    pub cidr: IpNet,
    pub except: Vec<IpNet>,
}

impl NetworkMatch {
    pub fn contains(&self, ip: IpAddr) -> bool {
        self.cidr.contains(&ip) && !self.except.iter().any(|hole| hole.contains(&ip))
    }
}

#[derive(Clone, Debug)]
pub struct AuthorizationPolicy {
    pub key: ObjectKey,
    pub target: PolicyTarget,
    /// All must hold; empty means anybody.
    pub required: Vec<AuthenticationRef>,
}

#[derive(Clone, Debug, PartialEq)]
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

#[derive(Clone, Debug, PartialEq)]
pub enum AuthenticationRef {
    MeshTls { namespace: Arc<str>, name: Arc<str> },
    Network { namespace: Arc<str>, name: Arc<str> },
    ServiceAccount { namespace: Arc<str>, name: Arc<str> },
}

#[derive(Clone, Debug)]
pub struct MeshTlsAuthentication {
    pub key: ObjectKey,
    /// Any of them.
    pub identities: Vec<IdentityPattern>,
}

#[derive(Clone, Debug)]
pub struct NetworkAuthentication {
    pub key: ObjectKey,
    pub networks: Vec<NetworkMatch>,
}

/// Where a frontend stands: an address and port that leads to a Service or a pod.
pub type FrontendAddr = SocketAddr;

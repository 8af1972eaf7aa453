//! Which label sets a connection moves, in Linkerd's words and in Istio's.
//!
//! **Bounds.** Whatever a stranger can choose must not make label sets without end. Addresses
//! outside the mesh (passthrough) are therefore not named, only their port; the port of an inbound
//! connection is the pod's own business, and what a scan of ports makes of it is bounded per pod by
//! [`super::series::Budget`].
//!
//! **Linkerd's two ends.** Every proxied connection has a `peer="src"` and a `peer="dst"`. As with
//! Linkerd the end towards the application is `tls="no_identity", no_tls_reason="loopback"`; the
//! other end says how the connection was carried.

use std::{net::SocketAddr, sync::Arc};

use crate::state::{Identity, ObjectKey, PodUid, Workload, policy::PolicyRef};

use super::{
    Direction, FlowInfo, TlsStatus,
    series::{Labels, Wanted},
};

/// Linkerd's `peer`: which end of the proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Peer {
    Src,
    Dst,
}

/// All that distinguishes the label sets of two connections; the key of a thread's cache.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct FlowKey {
    direction: Direction,
    workload: PodUid,
    peer: Option<PodUid>,
    client_id: Option<Identity>,
    server_id: Option<Identity>,
    target: Target,
    endpoint: Target,
    service: Option<(ObjectKey, u16)>,
    tls: TlsStatus,
    server: Option<PolicyRef>,
    authz: Option<PolicyRef>,
}

/// A destination as far as it is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Target {
    Known(SocketAddr),
    /// Nobody in the mesh has the address.
    Outside {
        port: u16,
    },
}

impl Target {
    /// What was dialled.
    fn of(info: &FlowInfo) -> Self {
        Self::shown(info.target, info.tls)
    }

    /// Where it was led.
    fn reached(info: &FlowInfo) -> Self {
        Self::shown(info.endpoint, info.tls)
    }

    fn shown(addr: SocketAddr, tls: TlsStatus) -> Self {
        match tls {
            TlsStatus::Passthrough => Self::Outside { port: addr.port() },
            TlsStatus::True | TlsStatus::SameNode | TlsStatus::NotMeshed => {
                Self::Known(SocketAddr::new(addr.ip().to_canonical(), addr.port()))
            }
        }
    }
}

impl FlowKey {
    pub(super) fn of(info: &FlowInfo) -> Self {
        Self {
            direction: info.direction,
            workload: info.workload.uid.clone(),
            peer: info.peer.as_ref().map(|peer| peer.uid.clone()),
            client_id: info.client_id.clone(),
            server_id: info.server_id.clone(),
            target: Target::of(info),
            endpoint: Target::reached(info),
            service: info.service.clone(),
            tls: info.tls,
            server: info.server.clone(),
            authz: info.authz.clone(),
        }
    }
}

/// The label set of one end of a connection.
pub(super) fn tcp(info: &FlowInfo, peer: Peer) -> Wanted<'_> {
    let mut labels = Builder::default();
    labels.direction(info.direction);
    labels.peer(peer);
    match (info.direction, peer) {
        (Direction::Outbound, Peer::Src) => {
            labels.target(Target::of(info));
            labels.application();
        }
        (Direction::Inbound, Peer::Dst) => labels.application(),
        (Direction::Outbound, Peer::Dst) => {
            labels.target(Target::reached(info));
            labels.tls(info);
            labels.identity("client_id", info.client_id.as_ref());
            labels.identity("server_id", info.server_id.as_ref());
            labels.destination(info);
        }
        (Direction::Inbound, Peer::Src) => {
            labels.target(Target::of(info));
            labels.tls(info);
            labels.identity("client_id", info.client_id.as_ref());
            labels.identity("server_id", info.server_id.as_ref());
            labels.policy(info);
        }
    }
    labels.pod(&info.workload);
    labels.wanted(&info.workload, |overflow| {
        overflow.direction(info.direction);
        overflow.peer(peer);
    })
}

/// `tcp_connection_duration_ms`: thirty lines a label set, so only what dashboards group by.
pub(super) fn duration(info: &FlowInfo, peer: Peer) -> Wanted<'_> {
    let mut labels = Builder::default();
    labels.direction(info.direction);
    labels.peer(peer);
    match (info.direction, peer) {
        (Direction::Outbound, Peer::Src) | (Direction::Inbound, Peer::Dst) => labels.application(),
        (Direction::Outbound, Peer::Dst) | (Direction::Inbound, Peer::Src) => labels.tls(info),
    }
    labels.pod(&info.workload);
    labels.wanted(&info.workload, |overflow| {
        overflow.direction(info.direction);
        overflow.peer(peer);
    })
}

/// `inbound_tcp_authz_{allow,deny}_total`.
pub(super) fn authz(info: &FlowInfo) -> Wanted<'_> {
    let mut labels = Builder::default();
    labels.direction(info.direction);
    labels.target(Target::of(info));
    labels.tls(info);
    labels.identity("client_id", info.client_id.as_ref());
    labels.policy(info);
    labels.pod(&info.workload);
    labels.wanted(&info.workload, |overflow| {
        overflow.direction(info.direction);
    })
}

/// `{inbound,outbound}_tcp_errors_total`.
pub(super) fn error<'a>(workload: Option<&'a Workload>, reason: &'static str) -> Wanted<'a> {
    let mut labels = Builder::default();
    labels.set("error", reason);
    let overflow = Builder::overflow(|overflow| overflow.set("error", reason));
    match workload {
        Some(workload) => {
            labels.pod(workload);
            labels.wanted(workload, |overflow| overflow.set("error", reason))
        }
        None => Wanted {
            labels: labels.build(),
            pod: None,
            pod_overflow: overflow.clone(),
            overflow,
        },
    }
}

/// ztunnel's label set, in its order; what is not known is `unknown`.
pub(super) fn istio<'a>(info: &'a FlowInfo, cluster_domain: &str) -> Wanted<'a> {
    let (source, destination) = match info.direction {
        Direction::Inbound => (info.peer.as_deref(), Some(&*info.workload)),
        Direction::Outbound => (Some(&*info.workload), info.peer.as_deref()),
    };
    let reporter = match info.direction {
        Direction::Inbound => "destination",
        Direction::Outbound => "source",
    };
    let mut labels = Builder::default();
    labels.set("reporter", reporter);
    labels.istio_end(&SOURCE, source, info.client_id.as_ref());
    match &info.service {
        Some((service, _)) => {
            labels.set(
                "destination_service",
                &format!(
                    "{}.{}.svc.{cluster_domain}",
                    service.name, service.namespace
                ),
            );
            labels.set("destination_service_namespace", &service.namespace);
            labels.set("destination_service_name", &service.name);
        }
        None => {
            labels.set("destination_service", UNKNOWN);
            labels.set("destination_service_namespace", UNKNOWN);
            labels.set("destination_service_name", UNKNOWN);
        }
    }
    labels.istio_end(&DESTINATION, destination, info.server_id.as_ref());
    labels.set("request_protocol", "tcp");
    labels.set("response_flags", "-");
    // Same-node connections are authenticated, and not encrypted: Istio has no word for that.
    let security = match info.tls {
        TlsStatus::True => "mutual_tls",
        TlsStatus::SameNode | TlsStatus::NotMeshed | TlsStatus::Passthrough => UNKNOWN,
    };
    labels.set("connection_security_policy", security);
    labels.wanted(&info.workload, |overflow| {
        overflow.set("reporter", reporter)
    })
}

const UNKNOWN: &str = "unknown";

/// Names of the labels of one end, in Istio's words.
struct IstioEnd {
    workload: &'static str,
    canonical_service: &'static str,
    canonical_revision: &'static str,
    workload_namespace: &'static str,
    principal: &'static str,
    app: &'static str,
    version: &'static str,
    cluster: &'static str,
}

const SOURCE: IstioEnd = IstioEnd {
    workload: "source_workload",
    canonical_service: "source_canonical_service",
    canonical_revision: "source_canonical_revision",
    workload_namespace: "source_workload_namespace",
    principal: "source_principal",
    app: "source_app",
    version: "source_version",
    cluster: "source_cluster",
};

const DESTINATION: IstioEnd = IstioEnd {
    workload: "destination_workload",
    canonical_service: "destination_canonical_service",
    canonical_revision: "destination_canonical_revision",
    workload_namespace: "destination_workload_namespace",
    principal: "destination_principal",
    app: "destination_app",
    version: "destination_version",
    cluster: "destination_cluster",
};

/// Collects labels in order.
#[derive(Default)]
struct Builder(Vec<(&'static str, Arc<str>)>);

impl Builder {
    fn set(&mut self, name: &'static str, value: &str) {
        self.0.push((name, Arc::from(value)));
    }

    fn build(self) -> Labels {
        self.0.into()
    }

    fn overflow(fill: impl Fn(&mut Self)) -> Labels {
        let mut labels = Self::default();
        fill(&mut labels);
        labels.set("overflow", "true");
        labels.build()
    }

    fn wanted(self, workload: &Workload, keep: impl Fn(&mut Self)) -> Wanted<'_> {
        Wanted {
            labels: self.build(),
            pod: Some(&workload.uid),
            pod_overflow: Self::overflow(|labels| {
                keep(labels);
                labels.pod(workload);
            }),
            overflow: Self::overflow(&keep),
        }
    }

    fn direction(&mut self, direction: Direction) {
        let word = match direction {
            Direction::Inbound => "inbound",
            Direction::Outbound => "outbound",
        };
        self.set("direction", word);
    }

    fn peer(&mut self, peer: Peer) {
        let word = match peer {
            Peer::Src => "src",
            Peer::Dst => "dst",
        };
        self.set("peer", word);
    }

    fn target(&mut self, target: Target) {
        match target {
            Target::Known(addr) => {
                self.set("target_addr", &addr.to_string());
                self.set("target_ip", &addr.ip().to_string());
                self.set("target_port", &addr.port().to_string());
            }
            Target::Outside { port } => self.set("target_port", &port.to_string()),
        }
    }

    /// The end between application and proxy: it stays in the pod's network namespace.
    fn application(&mut self) {
        self.set("tls", "no_identity");
        self.set("no_tls_reason", "loopback");
    }

    fn tls(&mut self, info: &FlowInfo) {
        let reason = match (info.tls, info.direction) {
            (TlsStatus::True, _) => {
                self.set("tls", "true");
                return;
            }
            (TlsStatus::SameNode, _) => "same_node",
            (TlsStatus::NotMeshed, Direction::Outbound) => "not_provided_by_service_discovery",
            (TlsStatus::NotMeshed, Direction::Inbound) => "no_tls_from_remote",
            (TlsStatus::Passthrough, _) => "passthrough",
        };
        self.set("tls", "no_identity");
        self.set("no_tls_reason", reason);
    }

    fn identity(&mut self, name: &'static str, identity: Option<&Identity>) {
        if let Some(id) = identity {
            self.set(
                name,
                &format!(
                    "{}.{}.serviceaccount.identity.linkerd.{}",
                    id.service_account, id.namespace, id.trust_domain
                ),
            );
        }
    }

    fn destination(&mut self, info: &FlowInfo) {
        match (&info.peer, &info.service) {
            (Some(peer), _) => self.set("dst_namespace", &peer.key.namespace),
            (None, Some((service, _))) => self.set("dst_namespace", &service.namespace),
            (None, None) => {}
        }
        if let Some((service, port)) = &info.service {
            self.set("dst_service", &service.name);
            self.set("dst_port", &port.to_string());
        }
        if let Some(peer) = &info.peer {
            self.set("dst_pod", &peer.key.name);
            self.set("dst_serviceaccount", &peer.identity.service_account);
            if let Some(owner) = &peer.owner
                && let Some((_, name)) = owner_label(&owner.kind)
            {
                self.set(name, &owner.name);
            }
        }
    }

    fn policy(&mut self, info: &FlowInfo) {
        if let Some(server) = &info.server {
            self.set("srv_group", &server.group);
            self.set("srv_kind", &server.kind);
            self.set("srv_name", &server.name);
            self.set("srv_port", &info.target.port().to_string());
        }
        if let Some(authz) = &info.authz {
            self.set("authz_group", &authz.group);
            self.set("authz_kind", &authz.kind);
            self.set("authz_name", &authz.name);
        }
    }

    /// The local pod. Linkerd's Prometheus adds these at the scrape; a node agent has no such
    /// target for each pod and writes them itself.
    fn pod(&mut self, workload: &Workload) {
        self.set("namespace", &workload.key.namespace);
        self.set("pod", &workload.key.name);
        if let Some(owner) = &workload.owner
            && let Some((name, _)) = owner_label(&owner.kind)
        {
            self.set(name, &owner.name);
        }
    }

    fn istio_end(
        &mut self,
        names: &IstioEnd,
        workload: Option<&Workload>,
        principal: Option<&Identity>,
    ) {
        let label = |keys: &[&str]| {
            let labels = &workload?.labels;
            keys.iter().find_map(|key| labels.get(*key)).map(|v| &**v)
        };
        let name = workload.map(|workload| match &workload.owner {
            Some(owner) => &*owner.name,
            None => &*workload.key.name,
        });
        let canonical = label(&[
            "service.istio.io/canonical-name",
            "app.kubernetes.io/name",
            "app",
        ])
        .or(name);
        let revision = label(&[
            "service.istio.io/canonical-revision",
            "app.kubernetes.io/version",
            "version",
        ])
        .or(workload.map(|_| "latest"));
        let app = label(&["app", "app.kubernetes.io/name"]).or(canonical);
        let version = label(&["version", "app.kubernetes.io/version"]).or(revision);
        let principal = principal.map(ToString::to_string);
        let or_unknown = |value: Option<&str>| value.unwrap_or(UNKNOWN).to_owned();
        self.set(names.workload, &or_unknown(name));
        self.set(names.canonical_service, &or_unknown(canonical));
        self.set(names.canonical_revision, &or_unknown(revision));
        self.set(
            names.workload_namespace,
            &or_unknown(workload.map(|w| &*w.key.namespace)),
        );
        self.set(names.principal, &or_unknown(principal.as_deref()));
        self.set(names.app, &or_unknown(app));
        self.set(names.version, &or_unknown(version));
        self.set(
            names.cluster,
            &or_unknown(workload.map(|w| &*w.key.cluster)),
        );
    }
}

/// Label names for an owner of this kind, for the local pod and for the destination. Kinds that
/// Linkerd does not know have none: a kind is free text, and might spell another label.
fn owner_label(kind: &str) -> Option<(&'static str, &'static str)> {
    [
        ("deployment", "dst_deployment"),
        ("statefulset", "dst_statefulset"),
        ("daemonset", "dst_daemonset"),
        ("replicaset", "dst_replicaset"),
        ("k8s_job", "dst_k8s_job"),
        ("k8s_cronjob", "dst_k8s_cronjob"),
        ("replicationcontroller", "dst_replicationcontroller"),
    ]
    .into_iter()
    .find(|(name, _)| *name == kind)
}

//! Kubernetes' own kinds to plain types, one object at a time. The labels and annotations that
//! speak to the mesh are tabled in [`super::words`].
//!
//! What Kubernetes would fill in, or refuse, stands here as well: manifests on disk have not been
//! through an API server. `picomesh.io/netns` is not read here, on purpose: on a cluster it would
//! let the author of a pod name the host's network namespace.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use k8s_openapi::{
    api::{core::v1 as core, discovery::v1 as discovery},
    apimachinery::pkg::{apis::meta::v1::ObjectMeta, util::intstr::IntOrString},
};

use crate::state::{
    ObjectKey,
    objects::{
        ContainerPort, EndpointSlice, Labels, MeshSettings, Namespace, Node, Owner, Pod, Protocol,
        Service, ServicePort, SliceEndpoint, TargetPort,
    },
};

use super::{
    field::{self, FieldError},
    words::{self, Place},
};

/// The label that ties a slice to its Service.
const SERVICE_NAME: &str = "kubernetes.io/service-name";
/// On the mirror of a static pod, with the uid of that one. No kubelet runs a pod that has it, and
/// the API server lets nobody add or change it later.
const MIRROR: &str = "kubernetes.io/config.mirror";
/// Kubernetes' default for sessionAffinityConfig.clientIP.timeoutSeconds: three hours.
const AFFINITY_SECONDS: u32 = 10_800;

/// What every name needs besides the object itself.
#[derive(Clone, Debug)]
pub struct Converter {
    pub(super) cluster: Arc<str>,
    pub(super) trust_domain: Arc<str>,
}

impl Converter {
    pub fn new(settings: &MeshSettings) -> Self {
        Self::named(&settings.cluster, &settings.trust_domain)
    }

    /// For who needs nothing else of the mesh's settings.
    pub fn named(cluster: &Arc<str>, trust_domain: &Arc<str>) -> Self {
        Self {
            cluster: Arc::clone(cluster),
            trust_domain: Arc::clone(trust_domain),
        }
    }

    pub fn cluster(&self) -> &str {
        &self.cluster
    }

    pub fn node(&self, node: core::Node) -> Result<Node, FieldError> {
        let key = self.cluster_key(&node.metadata)?;
        let addresses = node
            .status
            .unwrap_or_default()
            .addresses
            .unwrap_or_default();
        let mut internal = Vec::new();
        let mut external = Vec::new();
        for (index, address) in addresses.iter().enumerate() {
            let list = match address.type_.as_str() {
                "InternalIP" => &mut internal,
                "ExternalIP" => &mut external,
                // Names: Hostname, InternalDNS, ExternalDNS.
                _ => continue,
            };
            let ip = field::ip(
                format!("status.addresses[{index}].address"),
                &address.address,
            )?;
            list.push(ip);
        }
        internal.append(&mut external);
        Ok(Node {
            key,
            addresses: internal,
        })
    }

    pub fn namespace(&self, namespace: core::Namespace) -> Result<Namespace, FieldError> {
        let metadata = namespace.metadata;
        Ok(Namespace {
            key: self.cluster_key(&metadata)?,
            words: words_of(Place::Namespace, &metadata),
            labels: labels(metadata.labels),
        })
    }

    pub fn service_account(&self, account: core::ServiceAccount) -> Result<ObjectKey, FieldError> {
        self.key(&account.metadata)
    }

    pub fn pod(&self, pod: core::Pod) -> Result<Pod, FieldError> {
        let key = self.key(&pod.metadata)?;
        let words = words_of(Place::Pod, &pod.metadata);
        let uid = pod.metadata.uid.as_deref().filter(|uid| !uid.is_empty());
        let uid = uid.ok_or_else(|| FieldError::missing("metadata.uid", "give the pod a uid"))?;
        let owner = owner(&pod.metadata);
        let spec = pod.spec.unwrap_or_default();
        let status = pod.status.unwrap_or_default();

        let mut ips = Vec::new();
        let listed = status.pod_ips.unwrap_or_default();
        let listed = listed.iter().enumerate();
        let listed = listed.map(|(index, ip)| (format!("status.podIPs[{index}].ip"), &ip.ip));
        let single = status
            .pod_ip
            .iter()
            .map(|ip| ("status.podIP".to_owned(), ip));
        for (field, text) in single.chain(listed).filter(|(_, text)| !text.is_empty()) {
            let ip = field::ip(field, text)?;
            if !ips.contains(&ip) {
                ips.push(ip);
            }
        }

        // An init container that keeps running is a sidecar, and its ports are the pod's.
        let sidecars = spec.init_containers.unwrap_or_default();
        let sidecars = sidecars
            .iter()
            .enumerate()
            .filter_map(|(index, container)| {
                (container.restart_policy.as_deref() == Some("Always"))
                    .then_some((format!("spec.initContainers[{index}]"), container))
            });
        let containers = spec.containers.iter().enumerate();
        let containers = containers.map(|(index, own)| (format!("spec.containers[{index}]"), own));
        let mut ports = Vec::new();
        for (path, container) in containers.chain(sidecars) {
            for (index, port) in container.ports.iter().flatten().enumerate() {
                ports.push(container_port(&format!("{path}.ports[{index}]"), port)?);
            }
        }

        let conditions = status.conditions.unwrap_or_default();
        let ready = conditions
            .iter()
            .any(|c| c.type_ == "Ready" && c.status == "True");
        let service_account = spec.service_account_name.unwrap_or_default();
        if !service_account.is_empty() && !crate::state::names::is_object_name(&service_account) {
            return Err(FieldError::new(
                "spec.serviceAccountName",
                service_account,
                "is no name of an account",
                "write the name of a ServiceAccount of the pod's namespace",
            ));
        }
        let annotations = pod.metadata.annotations.as_ref();
        let mirror_of = annotations.and_then(|annotations| annotations.get(MIRROR));
        Ok(Pod {
            key,
            uid: uid.into(),
            node: spec
                .node_name
                .filter(|name| !name.is_empty())
                .map(Arc::from),
            ips,
            host_network: spec.host_network.unwrap_or(false),
            // No default: the API server gives one to every pod but to mirrors, which a kubelet may
            // make in any namespace.
            service_account: service_account.into(),
            mirror_of: mirror_of.map(|uid| Arc::from(uid.as_str())),
            words,
            ports,
            ready,
            terminal: matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")),
            terminating: pod.metadata.deletion_timestamp.is_some(),
            owner,
            foreign_policy: None,
            labels: labels(pod.metadata.labels),
        })
    }

    pub fn service(&self, service: core::Service) -> Result<Service, FieldError> {
        let key = self.key(&service.metadata)?;
        let spec = service.spec.unwrap_or_default();

        // clusterIP repeats the first of clusterIPs.
        let mut cluster_ips = Vec::new();
        let listed = spec.cluster_ips.unwrap_or_default();
        let listed = listed.iter().enumerate();
        let listed = listed.map(|(index, ip)| (format!("spec.clusterIPs[{index}]"), ip));
        let single = spec
            .cluster_ip
            .iter()
            .map(|ip| ("spec.clusterIP".to_owned(), ip));
        for (field, text) in single.chain(listed) {
            if text.is_empty() || text == "None" {
                continue;
            }
            let ip = field::ip(field, text)?;
            if !cluster_ips.contains(&ip) {
                cluster_ips.push(ip);
            }
        }
        let external_ips = spec.external_ips.unwrap_or_default();
        let external_ips = external_ips.iter().enumerate();
        let external_ips = external_ips
            .map(|(index, ip)| field::ip(format!("spec.externalIPs[{index}]"), ip))
            .collect::<Result<_, _>>()?;
        let ingress = service.status.and_then(|status| status.load_balancer);
        let ingress = ingress
            .and_then(|balancer| balancer.ingress)
            .unwrap_or_default();
        let mut load_balancer_ips = Vec::new();
        for (index, ingress) in ingress.iter().enumerate() {
            // Mode Proxy says that calls must really go to the load balancer.
            if ingress.ip_mode.as_deref() == Some("Proxy") {
                continue;
            }
            if let Some(ip) = &ingress.ip {
                let field = format!("status.loadBalancer.ingress[{index}].ip");
                load_balancer_ips.push(field::ip(field, ip)?);
            }
        }

        let ports = spec.ports.unwrap_or_default();
        let ports = ports.iter().enumerate();
        let ports = ports
            .map(|(index, port)| service_port(&format!("spec.ports[{index}]"), port))
            .collect::<Result<_, _>>()?;

        let session_affinity = match spec.session_affinity.as_deref() {
            Some("ClientIP") => {
                let config = spec
                    .session_affinity_config
                    .and_then(|config| config.client_ip);
                let seconds = config.and_then(|config| config.timeout_seconds);
                Some(match seconds {
                    None => AFFINITY_SECONDS,
                    Some(seconds) => u32::try_from(seconds).map_err(|_| {
                        FieldError::new(
                            "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
                            seconds,
                            "is not a time",
                            "write a number of seconds from 1 to 86400",
                        )
                    })?,
                })
            }
            None | Some("" | "None") => None,
            Some(other) => {
                return Err(FieldError::new(
                    "spec.sessionAffinity",
                    other,
                    "is not understood",
                    "write None or ClientIP",
                ));
            }
        };
        let is_external_name = spec.type_.as_deref() == Some("ExternalName");
        Ok(Service {
            key,
            cluster_ips,
            external_ips,
            load_balancer_ips,
            ports,
            selector: spec
                .selector
                .filter(|s| !s.is_empty())
                .map(|s| labels(Some(s))),
            session_affinity,
            internal_traffic_local: is_local(
                "spec.internalTrafficPolicy",
                spec.internal_traffic_policy.as_deref(),
            )?,
            external_traffic_local: is_local(
                "spec.externalTrafficPolicy",
                spec.external_traffic_policy.as_deref(),
            )?,
            publish_not_ready: spec.publish_not_ready_addresses.unwrap_or(false),
            external_name: spec
                .external_name
                .filter(|_| is_external_name)
                .map(Arc::from),
        })
    }

    /// `None`: a slice that belongs to no Service, or that holds names instead of addresses.
    pub fn endpoint_slice(
        &self,
        slice: discovery::EndpointSlice,
    ) -> Result<Option<EndpointSlice>, FieldError> {
        let key = self.key(&slice.metadata)?;
        let labels = slice.metadata.labels.unwrap_or_default();
        let Some(service) = labels.get(SERVICE_NAME).filter(|name| !name.is_empty()) else {
            return Ok(None);
        };
        match slice.address_type.as_str() {
            "IPv4" | "IPv6" => {}
            "FQDN" => return Ok(None),
            other => {
                return Err(FieldError::new(
                    "addressType",
                    other,
                    "is not understood",
                    "write IPv4, IPv6 or FQDN",
                ));
            }
        }

        let mut ports = Vec::new();
        for (index, port) in slice.ports.unwrap_or_default().iter().enumerate() {
            let number = port
                .port
                .map(|number| field::port(format!("ports[{index}].port"), number))
                .transpose()?;
            let protocol = protocol(
                &format!("ports[{index}].protocol"),
                port.protocol.as_deref(),
            )?;
            ports.push((name(port.name.as_deref()), number, protocol));
        }
        let mut endpoints = Vec::new();
        for (index, endpoint) in slice.endpoints.unwrap_or_default().into_iter().enumerate() {
            let addresses = endpoint.addresses.iter().enumerate();
            let addresses = addresses
                .map(|(at, ip)| field::ip(format!("endpoints[{index}].addresses[{at}]"), ip))
                .collect::<Result<_, _>>()?;
            let conditions = endpoint.conditions.unwrap_or_default();
            // Kubernetes: an unknown condition counts as ready; serving is ready if it is not said.
            let ready = conditions.ready.unwrap_or(true);
            let pod = endpoint
                .target_ref
                .filter(|target| target.kind.as_deref() == Some("Pod"));
            endpoints.push(SliceEndpoint {
                addresses,
                pod: pod
                    .and_then(|pod| pod.uid)
                    .filter(|uid| !uid.is_empty())
                    .map(Arc::from),
                node: endpoint.node_name.map(Arc::from),
                ready,
                serving: conditions.serving.unwrap_or(ready),
                terminating: conditions.terminating.unwrap_or(false),
            });
        }
        Ok(Some(EndpointSlice {
            key,
            service: service.as_str().into(),
            endpoints,
            ports,
        }))
    }

    /// Key of a namespaced object; without a namespace it is in `default`, as with kubectl.
    pub(super) fn key(&self, metadata: &ObjectMeta) -> Result<ObjectKey, FieldError> {
        let namespace = metadata
            .namespace
            .as_deref()
            .filter(|namespace| !namespace.is_empty());
        let namespace = namespace.unwrap_or("default");
        if !crate::state::names::is_label(namespace) {
            return Err(FieldError::new(
                "metadata.namespace",
                namespace,
                "is not a namespace's name",
                "write lower-case letters, digits and '-', at most 63",
            ));
        }
        Ok(ObjectKey {
            namespace: namespace.into(),
            ..self.cluster_key(metadata)?
        })
    }

    fn cluster_key(&self, metadata: &ObjectMeta) -> Result<ObjectKey, FieldError> {
        let name = metadata.name.as_deref().unwrap_or_default();
        if !crate::state::names::is_object_name(name) {
            return Err(FieldError::new(
                "metadata.name",
                name,
                "is not a name",
                "write lower-case letters, digits, '-' and '.', at most 253",
            ));
        }
        Ok(ObjectKey {
            cluster: Arc::clone(&self.cluster),
            namespace: "".into(),
            name: name.into(),
        })
    }
}

pub(super) fn labels(labels: Option<BTreeMap<String, String>>) -> Labels {
    let labels = labels.unwrap_or_default().into_iter();
    labels
        .map(|(key, value)| (key.into(), value.into()))
        .collect()
}

fn words_of(place: Place, metadata: &ObjectMeta) -> crate::state::objects::Words {
    let empty = BTreeMap::new();
    words::read(
        place,
        metadata.labels.as_ref().unwrap_or(&empty),
        metadata.annotations.as_ref().unwrap_or(&empty),
    )
}

/// The workload that manages the pod, named as in Linkerd's metrics. A ReplicaSet that a Deployment
/// made carries the hash of the pod template at the end of its name.
fn owner(metadata: &ObjectMeta) -> Option<Owner> {
    let references = metadata.owner_references.iter().flatten();
    let reference = references
        .into_iter()
        .find(|owner| owner.controller == Some(true))?;
    let hash = metadata
        .labels
        .iter()
        .flatten()
        .find(|(key, _)| *key == "pod-template-hash");
    let deployment = hash
        .filter(|_| reference.kind == "ReplicaSet")
        .and_then(|(_, hash)| {
            reference
                .name
                .strip_suffix(hash.as_str())?
                .strip_suffix('-')
        });
    let (kind, name) = match (deployment, reference.kind.as_str()) {
        (Some(deployment), _) => ("deployment".to_owned(), deployment),
        (None, "Job") => ("k8s_job".to_owned(), reference.name.as_str()),
        (None, kind) => (kind.to_ascii_lowercase(), reference.name.as_str()),
    };
    (!name.is_empty()).then(|| Owner {
        kind: kind.into(),
        name: name.into(),
    })
}

fn container_port(path: &str, port: &core::ContainerPort) -> Result<ContainerPort, FieldError> {
    let host_port = port.host_port.filter(|port| *port != 0);
    let host_ip = port.host_ip.as_deref().filter(|ip| !ip.is_empty());
    Ok(ContainerPort {
        name: name(port.name.as_deref()),
        port: field::port(format!("{path}.containerPort"), port.container_port)?,
        protocol: protocol(&format!("{path}.protocol"), port.protocol.as_deref())?,
        host_port: host_port
            .map(|port| field::port(format!("{path}.hostPort"), port))
            .transpose()?,
        host_ip: host_ip
            .map(|ip| field::ip(format!("{path}.hostIP"), ip))
            .transpose()?
            .filter(|ip: &IpAddr| !ip.is_unspecified()),
    })
}

fn service_port(path: &str, port: &core::ServicePort) -> Result<ServicePort, FieldError> {
    let number = field::port(format!("{path}.port"), port.port)?;
    let target = match &port.target_port {
        None => TargetPort::Number(number),
        Some(target) => target_port(&format!("{path}.targetPort"), target)?,
    };
    let node_port = port.node_port.filter(|port| *port != 0);
    Ok(ServicePort {
        name: name(port.name.as_deref()),
        port: number,
        target,
        protocol: protocol(&format!("{path}.protocol"), port.protocol.as_deref())?,
        node_port: node_port
            .map(|port| field::port(format!("{path}.nodePort"), port))
            .transpose()?,
        app_protocol: name(port.app_protocol.as_deref()),
    })
}

/// A port's number, or the name that a container gives it.
pub(super) fn target_port(path: &str, port: &IntOrString) -> Result<TargetPort, FieldError> {
    match port {
        IntOrString::Int(number) => field::port(path, *number).map(TargetPort::Number),
        IntOrString::String(name) if is_port_name(name) => {
            Ok(TargetPort::Name(name.as_str().into()))
        }
        IntOrString::String(text) => {
            let remedy = if text.parse::<u16>().is_ok() {
                "write the number without quotes"
            } else {
                "write one number from 1 to 65535, or the name of a container's port"
            };
            Err(FieldError::new(path, text, "is not a port", remedy))
        }
    }
}

/// A port's name as Kubernetes wants it: up to 15 of a-z, 0-9 and single '-', with a letter.
fn is_port_name(name: &str) -> bool {
    name.len() <= 15
        && crate::state::names::is_label(name)
        && !name.contains("--")
        && name.bytes().any(|byte| byte.is_ascii_lowercase())
}

pub(super) fn protocol(path: &str, protocol: Option<&str>) -> Result<Protocol, FieldError> {
    match protocol {
        None | Some("" | "TCP") => Ok(Protocol::Tcp),
        Some("UDP") => Ok(Protocol::Udp),
        Some("SCTP") => Ok(Protocol::Sctp),
        Some(other) => Err(FieldError::new(
            path,
            other,
            "is not a protocol",
            "write TCP, UDP or SCTP",
        )),
    }
}

fn is_local(path: &str, policy: Option<&str>) -> Result<bool, FieldError> {
    match policy {
        Some("Local") => Ok(true),
        None | Some("" | "Cluster") => Ok(false),
        Some(other) => Err(FieldError::new(
            path,
            other,
            "is not understood",
            "write Cluster or Local",
        )),
    }
}

/// Kubernetes writes "no name" in two ways.
fn name(name: Option<&str>) -> Option<Arc<str>> {
    name.filter(|name| !name.is_empty()).map(Arc::from)
}

#[cfg(test)]
mod tests;

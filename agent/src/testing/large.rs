//! A generated cluster of a size that a mesh for small ones must still bear: 50 nodes of which two
//! are somebody else's to make, 500 Services, 5,000 pods, with as much text as real ones have.
//!
//! The objects are as users and kubelets write them; [`stored`] adds what an API server does. Both
//! a test beside the watches and the tier `k8s` are given the same ones.

use serde_json::{Map, Value, json};

/// Those that run no kubelet.
pub const NODES: usize = 48;
pub const NAMESPACES: usize = 50;
pub const SERVICES: usize = 500;
pub const PODS: usize = 5_000;

/// Services of a namespace follow each other, and so do pods of a Service.
const SERVICES_OF_NAMESPACE: usize = SERVICES / NAMESPACES;
const PODS_OF_SERVICE: usize = PODS / SERVICES;
/// Whose time everything carries that nobody compares with another.
const THEN: &str = "2026-01-01T00:00:00Z";

pub fn namespace_name(number: usize) -> String {
    format!("crowded-{number:02}")
}

pub fn node_name(number: usize) -> String {
    format!("crowded-node-{number:02}")
}

/// Where [`service`] `number`, its pods and their account live.
pub fn namespace_of_service(number: usize) -> String {
    namespace_name(number / SERVICES_OF_NAMESPACE)
}

/// Where [`pod`] `number` lives.
pub fn namespace_of_pod(number: usize) -> String {
    namespace_of_service(number / PODS_OF_SERVICE)
}

fn service_name(number: usize) -> String {
    format!("service-{number:03}")
}

pub fn pod_name(number: usize) -> String {
    let (service, place) = (number / PODS_OF_SERVICE, number % PODS_OF_SERVICE);
    format!("{}-6d4cf56db6-x{place:03}z", service_name(service))
}

fn pod_addresses(number: usize) -> [String; 2] {
    let (node, place) = (number % NODES, number / NODES + 2);
    [
        format!("10.250.{node}.{place}"),
        format!("fd00:250:0:{node:x}::{place:x}"),
    ]
}

/// In the mesh.
pub fn namespace(number: usize) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Namespace",
        "metadata": {
            "name": namespace_name(number),
            "labels": {"picomesh.io/mesh": "enabled", "team": format!("team-{}", number % 7)},
        },
    })
}

/// Ready, with a status of the length that a kubelet's has. Nothing else is scheduled there, and no
/// DaemonSet that asks for Linux.
pub fn node(number: usize) -> Value {
    let images: Vec<_> = (0..30)
        .map(|image| {
            let name = format!("registry.example.com/team-{}/program-{image:02}", image % 7);
            json!({
                "names": [format!("{name}@sha256:{image:064x}"), format!("{name}:v1.{image}.0")],
                "sizeBytes": 10_000_000 + image,
            })
        })
        .collect();
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {
            "name": node_name(number),
            "labels": {
                "kubernetes.io/arch": "arm64", "kubernetes.io/hostname": node_name(number),
                "topology.kubernetes.io/zone": format!("zone-{}", number % 3),
            },
        },
        "spec": {"unschedulable": true},
        "status": {
            "addresses": [
                {"type": "InternalIP", "address": format!("172.30.0.{}", number + 1)},
                {"type": "InternalIP", "address": format!("fd30::{:x}", number + 1)},
                {"type": "Hostname", "address": node_name(number)},
            ],
            "allocatable": {"cpu": "4", "memory": "8Gi", "pods": "250"},
            "capacity": {"cpu": "4", "memory": "8Gi", "pods": "250"},
            "conditions": node_conditions(THEN),
            "images": images,
            "nodeInfo": {
                "machineID": format!("{number:032x}"), "systemUUID": format!("{number:032x}"),
                "bootID": format!("{number:032x}"), "kernelVersion": "6.12.0",
                "osImage": "Debian GNU/Linux 13", "containerRuntimeVersion": "containerd://2.1.0",
                "kubeletVersion": "v1.36.3", "kubeProxyVersion": "", "operatingSystem": "linux",
                "architecture": "arm64",
            },
        },
    })
}

/// A kubelet writes them every five minutes, also when only the time of its heartbeat is another.
pub fn node_conditions(heartbeat: &str) -> Value {
    let condition = |kind: &str, status: &str, reason: &str| {
        json!({
            "type": kind, "status": status, "reason": reason,
            "message": format!("kubelet says {reason}"),
            "lastHeartbeatTime": heartbeat, "lastTransitionTime": THEN,
        })
    };
    json!([
        condition("MemoryPressure", "False", "KubeletHasSufficientMemory"),
        condition("DiskPressure", "False", "KubeletHasNoDiskPressure"),
        condition("PIDPressure", "False", "KubeletHasSufficientPID"),
        condition("Ready", "True", "KubeletReady"),
    ])
}

/// The account of the pods of one Service.
pub fn account(number: usize) -> Value {
    json!({
        "apiVersion": "v1", "kind": "ServiceAccount",
        "metadata": {"name": service_name(number), "namespace": namespace_of_service(number)},
    })
}

/// Of two ports, both named.
pub fn service(number: usize) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {
            "name": service_name(number), "namespace": namespace_of_service(number),
            "labels": {"app.kubernetes.io/name": service_name(number)},
        },
        "spec": {
            "selector": {"app.kubernetes.io/name": service_name(number)},
            "ipFamilyPolicy": "PreferDualStack",
            "ports": [
                {"name": "http", "port": 80, "targetPort": "http", "protocol": "TCP"},
                {"name": "metrics", "port": 9090, "targetPort": "metrics", "protocol": "TCP"},
            ],
        },
    })
}

/// On a node of [`node`]'s, running and ready, with two containers.
pub fn pod(number: usize) -> Value {
    let service = service_name(number / PODS_OF_SERVICE);
    let environment: Vec<_> = (0..12)
        .map(|of| json!({"name": format!("SETTING_{of}"), "value": format!("value {of} of {service}")}))
        .collect();
    let probe = json!({"httpGet": {"path": "/healthz", "port": "http"}, "periodSeconds": 10});
    let containers = [("main", "http", 8080), ("exporter", "metrics", 9090)];
    let specs: Vec<_> = containers
        .iter()
        .map(|(name, port, at)| {
            json!({
                "name": name, "image": format!("registry.example.com/{service}/{name}:v1.2.3"),
                "env": environment,
                "ports": [{"name": port, "containerPort": at, "protocol": "TCP"}],
                "readinessProbe": probe,
                "resources": {"requests": {"cpu": "10m", "memory": "32Mi"}, "limits": {"memory": "64Mi"}},
            })
        })
        .collect();
    let statuses: Vec<_> = containers
        .iter()
        .map(|(name, _, at)| {
            let image = format!("registry.example.com/{service}/{name}");
            json!({
                "name": name, "ready": true, "started": true, "restartCount": 0,
                "image": format!("{image}:v1.2.3"), "imageID": format!("{image}@sha256:{at:064x}"),
                "containerID": format!("containerd://{:064x}", number * 2 + at),
                "state": {"running": {"startedAt": THEN}},
            })
        })
        .collect();
    let conditions = ["PodScheduled", "Initialized", "ContainersReady", "Ready"]
        .map(|kind| json!({"type": kind, "status": "True", "lastTransitionTime": THEN}));
    let addresses = pod_addresses(number);
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": pod_name(number), "namespace": namespace_of_pod(number),
            "labels": {
                "app.kubernetes.io/name": service, "app.kubernetes.io/part-of": "crowd",
                "app.kubernetes.io/version": "1.2.3", "pod-template-hash": "6d4cf56db6",
                "team": format!("team-{}", number % 7),
            },
            "annotations": {
                "prometheus.io/scrape": "true", "prometheus.io/port": "9090",
                "checksum/config": format!("{number:064x}"),
            },
        },
        "spec": {
            "nodeName": node_name(number % NODES), "serviceAccountName": service,
            "containers": specs,
        },
        "status": {
            "phase": "Running", "qosClass": "Burstable", "startTime": THEN,
            "conditions": conditions, "containerStatuses": statuses,
            "hostIP": format!("172.30.0.{}", number % NODES + 1),
            "podIP": addresses[0], "podIPs": [{"ip": addresses[0]}, {"ip": addresses[1]}],
        },
    })
}

/// What the cluster's own controller makes of [`service`] `number`: a slice for each family.
pub fn slices(number: usize) -> [Value; 2] {
    [("IPv4", 0), ("IPv6", 1)].map(|(family, at)| {
        let pods = number * PODS_OF_SERVICE..(number + 1) * PODS_OF_SERVICE;
        let endpoints: Vec<_> = pods
            .map(|pod| {
                json!({
                    "addresses": [pod_addresses(pod)[at]],
                    "conditions": {"ready": true, "serving": true, "terminating": false},
                    "nodeName": node_name(pod % NODES),
                    "targetRef": {
                        "kind": "Pod", "name": pod_name(pod), "namespace": namespace_of_pod(pod),
                        "uid": uid(&pod_name(pod)),
                    },
                    "zone": format!("zone-{}", pod % 3),
                })
            })
            .collect();
        let name = service_name(number);
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {
                "name": format!("{name}-{}", family.to_lowercase()),
                "namespace": namespace_of_service(number),
                "labels": {"kubernetes.io/service-name": name},
            },
            "addressType": family,
            "ports": [
                {"name": "http", "port": 8080, "protocol": "TCP"},
                {"name": "metrics", "port": 9090, "protocol": "TCP"},
            ],
            "endpoints": endpoints,
        })
    })
}

/// As an API server keeps and sends it.
pub fn stored(mut object: Value) -> Value {
    let fields = Value::Object(
        ["metadata", "spec", "status"]
            .into_iter()
            .filter_map(|part| Some((format!("f:{part}"), fields(object.get(part)?))))
            .collect(),
    );
    let name = object["metadata"]["name"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    let metadata = &mut object["metadata"];
    metadata["uid"] = json!(uid(&name));
    metadata["resourceVersion"] = json!("123456");
    metadata["creationTimestamp"] = json!(THEN);
    metadata["managedFields"] = json!([{
        "apiVersion": "v1", "fieldsType": "FieldsV1", "fieldsV1": fields,
        "manager": "crowd", "operation": "Update", "time": THEN,
    }]);
    object
}

/// Of the form of a uid, and the same for the same name.
fn uid(name: &str) -> String {
    let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    let low = hash & 0xffff_ffff_ffff;
    format!("{:08x}-0000-4000-8000-{low:012x}", hash >> 32)
}

/// How server-side apply notes whose fields these are.
fn fields(value: &Value) -> Value {
    let noted: Map<_, _> = match value {
        Value::Object(fields_of) => fields_of
            .iter()
            .map(|(name, value)| (format!("f:{name}"), fields(value)))
            .collect(),
        Value::Array(list) => list
            .iter()
            .filter_map(|member| {
                let key = ["name", "type", "ip"]
                    .iter()
                    .find_map(|key| Some(json!({ *key: member.get(key)? })))?;
                Some((format!("k:{key}"), fields(member)))
            })
            .collect(),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => Map::new(),
    };
    Value::Object(noted)
}

//! Meshes for tests, from manifests written out in the test: what a reader sees is what a user
//! would write, and it takes the same way through the conversion.

use std::sync::Arc;

use crate::{
    k8s::Converter,
    local,
    state::{
        Mesh, Workload,
        objects::{DefaultPolicy, MeshSettings, Objects, OutboundDefault, private_networks},
    },
};

/// Node `n1` of cluster `test`, trust domain `cluster.local`, defaults as on the command line.
pub fn settings() -> MeshSettings {
    MeshSettings {
        cluster: "test".into(),
        cluster_domain: "cluster.local".into(),
        trust_domain: "cluster.local".into(),
        namespace: "picomesh-system".into(),
        node: "n1".into(),
        default_inbound_policy: DefaultPolicy::default(),
        outbound_default: OutboundDefault::default(),
        cluster_networks: private_networks(),
        tunnel_port: 15008,
        metrics_port: 4191,
    }
}

/// All documents of `text`.
///
/// # Panics
/// If one of them cannot be read.
pub fn objects(text: &str) -> Objects {
    local::objects(text, &Converter::new(&settings())).unwrap_or_else(|error| panic!("{error}"))
}

/// The mesh of `text` as node `n1` sees it.
pub fn mesh(text: &str) -> Mesh {
    Mesh::build(Arc::new(settings()), 1, &objects(text))
}

/// The mesh of `text` with other settings.
pub fn mesh_with(settings: MeshSettings, text: &str) -> Mesh {
    Mesh::build(Arc::new(settings), 1, &objects(text))
}

/// The one pod of that name, as `namespace/name`.
///
/// # Panics
/// If there is none.
pub fn workload<'a>(mesh: &'a Mesh, name: &str) -> &'a Arc<Workload> {
    let mut all = mesh.workloads.values();
    all.find(|workload| workload.key.to_string() == name)
        .unwrap_or_else(|| panic!("no pod {name} in the mesh"))
}

/// A pod in one line of YAML. `more` is put into its metadata, e.g. `labels: {app: web}`.
pub fn pod(name: &str, node: &str, ips: &[&str], more: &str) -> String {
    let (namespace, name) = name.split_once('/').unwrap_or(("default", name));
    let ips: Vec<_> = ips.iter().map(|ip| format!("{{ip: \"{ip}\"}}")).collect();
    format!(
        "---\n{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, namespace: {namespace}, \
         uid: uid-{name}, {more}}}, spec: {{nodeName: {node}, serviceAccountName: {name}, \
         containers: [{{name: main, ports: [{{name: http, containerPort: 8080}}]}}]}}, \
         status: {{podIPs: [{}]}}}}\n",
        ips.join(", ")
    )
}

/// A namespace whose pods are in the mesh; `more` as in [`pod`].
pub fn meshed_namespace(name: &str, more: &str) -> String {
    format!(
        "---\n{{apiVersion: v1, kind: Namespace, metadata: {{name: {name}, \
         labels: {{picomesh.io/mesh: enabled}}, {more}}}}}\n"
    )
}

/// A node with its addresses.
pub fn node(name: &str, ips: &[&str]) -> String {
    let ips: Vec<_> = ips
        .iter()
        .map(|ip| format!("{{type: InternalIP, address: \"{ip}\"}}"))
        .collect();
    format!(
        "---\n{{apiVersion: v1, kind: Node, metadata: {{name: {name}}}, \
         status: {{addresses: [{}]}}}}\n",
        ips.join(", ")
    )
}

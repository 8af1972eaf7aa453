//! Our own kinds. The Rust types are the source; `deploy` has what is generated from them.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::{CustomResource, CustomResourceExt};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What the agent of one node found there. One per node, by the node's name, written by its agent
/// alone; there is nothing to ask for, so it has a status only.
#[derive(Clone, CustomResource, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[expect(
    clippy::duplicated_attributes,
    reason = "columns of one type are no duplicates of each other"
)]
#[kube(
    group = "picomesh.io",
    version = "v1alpha1",
    kind = "MeshNode",
    plural = "meshnodes",
    shortname = "mn",
    status = "MeshNodeStatus",
    printcolumn(
        name = "Ready",
        type_ = "string",
        json_path = ".status.conditions[?(@.type=='Ready')].status"
    ),
    printcolumn(name = "Meshed", type_ = "integer", json_path = ".status.pods.meshed"),
    printcolumn(
        name = "Captured",
        type_ = "integer",
        json_path = ".status.pods.captured"
    ),
    printcolumn(name = "Failed", type_ = "integer", json_path = ".status.pods.failed"),
    printcolumn(name = "Version", type_ = "string", json_path = ".status.version"),
    printcolumn(
        name = "Age",
        type_ = "date",
        json_path = ".metadata.creationTimestamp"
    )
)]
pub struct MeshNodeSpec {}

/// From the kernel's state, not from what should be.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct MeshNodeStatus {
    /// The agent's version.
    pub version: String,
    /// The kernel's release.
    pub kernel: String,
    /// What this kernel and this agent can do.
    pub features: Vec<String>,
    /// off, opt-in or on.
    pub acceleration: String,
    pub pods: PodCounts,
    /// Pods that should be captured and are not; the first fifty by name.
    pub failed: Vec<FailedPod>,
    pub certificates: CertificateCounts,
    pub conditions: Vec<Condition>,
}

#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PodCounts {
    /// Pods of this node whose labels ask for the mesh and that may be in it.
    pub meshed: u32,
    /// Those that the kernel captures.
    pub captured: u32,
    /// Those that it cannot be made to capture, or that a policy keeps outside.
    pub failed: u32,
}

#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct FailedPod {
    pub uid: String,
    /// namespace/name
    pub pod: String,
    /// A fixed word.
    pub reason: String,
    pub message: String,
}

#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct CertificateCounts {
    /// Identities whose certificate is there.
    pub held: u32,
    /// Those that wait for one, or whose is over.
    pub pending: u32,
    /// When the first of those that are held ends (RFC 3339).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub earliest_expiry: Option<String>,
}

/// Like Kubernetes' own.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Condition {
    #[serde(rename = "type")]
    pub type_: String,
    /// True, False or Unknown.
    pub status: String,
    /// A fixed word.
    pub reason: String,
    pub message: String,
    /// When `status` became what it is (RFC 3339).
    pub last_transition_time: String,
}

/// Every definition of ours.
pub fn definitions() -> Vec<CustomResourceDefinition> {
    vec![MeshNode::crd()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mesh_node_belongs_to_the_whole_cluster_and_has_its_status_apart() {
        let definition = serde_json::to_value(MeshNode::crd()).unwrap();
        assert_eq!(definition["metadata"]["name"], "meshnodes.picomesh.io");
        assert_eq!(definition["spec"]["scope"], "Cluster");
        assert_eq!(definition["spec"]["names"]["shortNames"][0], "mn");
        let version = &definition["spec"]["versions"][0];
        assert!(version["subresources"]["status"].is_object());
        let status = &version["schema"]["openAPIV3Schema"]["properties"]["status"];
        assert_eq!(
            status["properties"]["pods"]["properties"]["captured"]["type"],
            "integer"
        );
    }
}

//! Kubernetes manifests in local mode's directory: builders for the kinds a test needs, and files
//! that can be edited while the agents watch.
//!
//! A manifest is a [`Value`] as `kubectl get -o json` would show it; files are YAML, so that a
//! person who looks at a kept world reads what they know.

use std::{
    collections::BTreeMap,
    fmt::Write,
    fs,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use anyhow::{Context, Result, anyhow};
use serde_json::{Value, json};

/// The directory that the agents of a world watch.
#[derive(Debug)]
pub struct Manifests {
    dir: PathBuf,
    /// What each file holds, so that a test can edit a document without parsing YAML.
    files: Mutex<BTreeMap<String, Vec<Value>>>,
}

impl Manifests {
    pub(crate) fn create(dir: PathBuf) -> Result<Self> {
        fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
        Ok(Self {
            dir,
            files: Mutex::default(),
        })
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Writes one object to a file of its own, named by kind, namespace and name.
    pub fn apply(&self, object: &Value) -> Result<()> {
        self.write(&file_of(object), std::slice::from_ref(object))
    }

    /// Takes the file of an object away.
    pub fn delete(&self, object: &Value) -> Result<()> {
        let file = file_of(object);
        self.files().remove(&file);
        let path = self.dir.join(&file);
        fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))
    }

    /// Changes the object that `kind/namespace/name` (namespace empty for cluster-scoped kinds)
    /// names, and writes its file again.
    pub fn edit(
        &self,
        kind: &str,
        namespace: &str,
        name: &str,
        change: impl FnOnce(&mut Value),
    ) -> Result<()> {
        let file = file_name(kind, namespace, name);
        let mut documents = self
            .files()
            .get(&file)
            .cloned()
            .ok_or_else(|| anyhow!("{file}: no such manifest was written"))?;
        if let Some(first) = documents.first_mut() {
            change(first);
        }
        self.write(&file, &documents)
    }

    /// Writes a file of several documents.
    pub fn write(&self, file: &str, documents: &[Value]) -> Result<()> {
        let mut text = String::new();
        for document in documents {
            text.push_str("---\n");
            text.push_str(&to_yaml(document));
        }
        self.files().insert(file.to_owned(), documents.to_vec());
        self.write_text(file, &text)
    }

    /// Writes a file as it is given: for manifests that are broken on purpose.
    pub fn write_text(&self, file: &str, text: &str) -> Result<()> {
        // Beside, then renamed: a reader sees the old file or the new one.
        let path = self.dir.join(file);
        let hidden = self.dir.join(format!(".{file}.new"));
        fs::write(&hidden, text).with_context(|| format!("write {}", hidden.display()))?;
        fs::rename(&hidden, &path).with_context(|| format!("rename to {}", path.display()))
    }

    pub fn remove_file(&self, file: &str) -> Result<()> {
        self.files().remove(file);
        fs::remove_file(self.dir.join(file)).with_context(|| format!("remove {file}"))
    }

    fn files(&self) -> MutexGuard<'_, BTreeMap<String, Vec<Value>>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub fn node(name: &str, addresses: &[String]) -> Value {
    let addresses: Vec<Value> = addresses
        .iter()
        .map(|a| json!({"type": "InternalIP", "address": a}))
        .collect();
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": name},
        "status": {"addresses": addresses},
    })
}

/// A namespace; `mesh` is the value of its label `picomesh.io/mesh`, if any.
pub fn namespace(name: &str, mesh: Option<&str>) -> Value {
    let mut object = json!({
        "apiVersion": "v1", "kind": "Namespace",
        "metadata": {"name": name, "labels": {"kubernetes.io/metadata.name": name}},
    });
    if let Some(mesh) = mesh {
        object["metadata"]["labels"]["picomesh.io/mesh"] = mesh.into();
    }
    object
}

pub fn service_account(namespace: &str, name: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "ServiceAccount",
        "metadata": {"name": name, "namespace": namespace},
    })
}

/// A Server for the pods that `selector` chooses; `access` is its accessPolicy.
pub fn server(
    namespace: &str,
    name: &str,
    selector: &[(&str, &str)],
    port: u16,
    access: Option<&str>,
) -> Value {
    let mut object = json!({
        "apiVersion": "policy.linkerd.io/v1beta3", "kind": "Server",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"podSelector": {"matchLabels": pairs(selector)}, "port": port, "proxyProtocol": "opaque"},
    });
    if let Some(access) = access {
        object["spec"]["accessPolicy"] = access.into();
    }
    object
}

/// An AuthorizationPolicy for a Server (or, with an empty name, for its whole namespace) that
/// requires all of `authentications` (kind, name).
pub fn authorization_policy(
    namespace: &str,
    name: &str,
    server: &str,
    authentications: &[(&str, &str)],
) -> Value {
    let target = if server.is_empty() {
        json!({"group": "core", "kind": "Namespace", "name": namespace})
    } else {
        json!({"group": "policy.linkerd.io", "kind": "Server", "name": server})
    };
    let required: Vec<Value> = authentications
        .iter()
        .map(|(kind, name)| match *kind {
            "ServiceAccount" => json!({"kind": kind, "name": name}),
            kind => json!({"group": "policy.linkerd.io", "kind": kind, "name": name}),
        })
        .collect();
    json!({
        "apiVersion": "policy.linkerd.io/v1alpha1", "kind": "AuthorizationPolicy",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"targetRef": target, "requiredAuthenticationRefs": required},
    })
}

pub fn mesh_tls_authentication(namespace: &str, name: &str, identities: &[&str]) -> Value {
    json!({
        "apiVersion": "policy.linkerd.io/v1alpha1", "kind": "MeshTLSAuthentication",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"identities": identities},
    })
}

pub fn network_authentication(namespace: &str, name: &str, cidrs: &[&str]) -> Value {
    let networks: Vec<Value> = cidrs.iter().map(|c| json!({"cidr": c})).collect();
    json!({
        "apiVersion": "policy.linkerd.io/v1alpha1", "kind": "NetworkAuthentication",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"networks": networks},
    })
}

pub fn server_authorization(namespace: &str, name: &str, server: &str, client: Value) -> Value {
    json!({
        "apiVersion": "policy.linkerd.io/v1beta1", "kind": "ServerAuthorization",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"server": {"name": server}, "client": client},
    })
}

/// A NetworkPolicy of Kubernetes' own.
pub fn network_policy(namespace: &str, name: &str, spec: Value) -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": name, "namespace": namespace},
        "spec": spec,
    })
}

/// An object of strings.
pub fn pairs<K: AsRef<str>, V: AsRef<str>>(pairs: &[(K, V)]) -> Value {
    Value::Object(
        pairs
            .iter()
            .map(|(k, v)| (k.as_ref().to_owned(), Value::from(v.as_ref())))
            .collect(),
    )
}

fn file_of(object: &Value) -> String {
    let word = |v: &Value| v.as_str().unwrap_or_default().to_owned();
    file_name(
        &word(&object["kind"]),
        &word(&object["metadata"]["namespace"]),
        &word(&object["metadata"]["name"]),
    )
}

fn file_name(kind: &str, namespace: &str, name: &str) -> String {
    let mut file = kind.to_lowercase();
    for part in [namespace, name] {
        if !part.is_empty() {
            file.push('-');
            file.push_str(part);
        }
    }
    file.push_str(".yaml");
    file
}

/// YAML in block style. Strings are always quoted, as JSON quotes them: "yes" stays a string.
pub fn to_yaml(value: &Value) -> String {
    let mut text = String::new();
    match value {
        Value::Object(_) | Value::Array(_) => block(value, 0, &mut text),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {
            let _ = writeln!(text, "{value}");
        }
    }
    text
}

fn block(value: &Value, indent: usize, text: &mut String) {
    let pad = " ".repeat(indent);
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                let _ = write!(text, "{pad}{}:", plain_or_quoted(key));
                nested(value, indent + 2, text);
            }
        }
        Value::Array(items) => {
            for item in items {
                let _ = write!(text, "{pad}-");
                // The item's first line stands beside the dash.
                let mut inner = String::new();
                nested(item, indent + 2, &mut inner);
                match inner.strip_prefix('\n') {
                    Some(lines) => {
                        let _ = write!(text, " {}", lines.trim_start_matches(' '));
                    }
                    None => text.push_str(&inner),
                }
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {
            let _ = writeln!(text, "{pad}{value}");
        }
    }
}

/// What follows a key or a dash: a scalar on the same line, or a block below.
fn nested(value: &Value, indent: usize, text: &mut String) {
    let empty = match value {
        Value::Object(map) => map.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => true,
    };
    if empty {
        let _ = writeln!(text, " {value}");
    } else {
        text.push('\n');
        block(value, indent, text);
    }
}

fn plain_or_quoted(key: &str) -> String {
    let plain = !key.is_empty()
        && key
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/'));
    if plain {
        key.to_owned()
    } else {
        Value::from(key).to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn yaml_keeps_types_and_nesting() {
        let value = json!({
            "a": {"b": ["x", {"c": 1, "d": [true, null]}, []]},
            "e.f/g": "yes",
            "h": {},
        });
        assert_eq!(
            to_yaml(&value),
            concat!(
                "a:\n",
                "  b:\n",
                "    - \"x\"\n",
                "    - c: 1\n",
                "      d:\n",
                "        - true\n",
                "        - null\n",
                "    - []\n",
                "e.f/g: \"yes\"\n",
                "h: {}\n",
            )
        );
    }

    #[test]
    fn an_object_has_a_file_of_its_own() {
        assert_eq!(
            file_of(&server("shop", "web", &[], 80, None)),
            "server-shop-web.yaml"
        );
        assert_eq!(file_of(&node("n1", &[])), "node-n1.yaml");
    }
}

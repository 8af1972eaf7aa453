//! What the mesh's own accounts may do, tried on a real API server with tokens of their own, bound
//! to a pod as theirs are. A stolen one must be of as little use as its table says.
//!
//! Every row is tried: what is permitted is the control, without which a refusal could be that of a
//! wrong command. A refusal must be the one that is meant.

use std::{path::PathBuf, process::Command};

use anyhow::{Context, Result, bail, ensure};
use picomesh_tests::{
    cluster::{Kubectl, TOOLS},
    wait,
};
use serde_json::{Value, json};

use crate::{
    api::{Api, Call},
    ground::{Need, PATIENCE, Test, ground, slowly},
    install::{Installed, NAMESPACE, Part},
};

pub(crate) const TESTS: &[Test] = &[
    Test {
        name: "rights::an_account_of_the_mesh_can_do_what_its_table_says_and_nothing_else",
        needs: &[Need::Cluster],
        run: an_account_of_the_mesh_can_do_what_its_table_says_and_nothing_else,
    },
    Test {
        name: "rights::controller_and_signer_fit_into_a_restricted_namespace",
        needs: &[Need::Cluster],
        run: controller_and_signer_fit_into_a_restricted_namespace,
    },
];

/// Words of kubectl, and what it reads. In both OWN and OTHER are names of nodes.
struct Row {
    words: &'static str,
    input: fn() -> Value,
    /// What the API server says of it; `None`: it is permitted.
    refused: Option<&'static str>,
}

const fn may(words: &'static str, input: fn() -> Value) -> Row {
    Row {
        words,
        input,
        refused: None,
    }
}

const fn never(words: &'static str, input: fn() -> Value, refused: &'static str) -> Row {
    Row {
        words,
        input,
        refused: Some(refused),
    }
}

fn nothing() -> Value {
    Value::Null
}

/// In the order in which they are tried: some need what one before has made.
const AGENT: &[Row] = &[
    may(
        "get nodes,namespaces,pods,services,serviceaccounts -A -o name",
        nothing,
    ),
    may("create -f -", || mesh_node("OWN")),
    may(STATUS, || mesh_node("OWN")),
    may("create -f -", || request("by-agent", OURS)),
    may("get csr by-agent -o name", nothing),
    may("create -f -", event),
    may(
        "get daemonsets -n picomesh-system --field-selector metadata.name=picomesh-agent",
        nothing,
    ),
    may(TRUST_ROOTS, nothing),
    // Another node's word.
    never("create -f -", || mesh_node("OTHER"), "own node only"),
    never(STATUS, || mesh_node("OTHER"), "own node only"),
    never("delete meshnode OWN", nothing, "cannot delete"),
    // Certificates.
    never(
        "create -f -",
        || request("elsewhere", THEIRS),
        "picomesh.io/workload only",
    ),
    never(APPROVAL, || approval("by-agent"), "cannot patch"),
    never(STATUS, || certificate("by-agent"), "cannot patch"),
    never("delete csr by-agent", nothing, "cannot delete"),
    never("get csr", nothing, "cannot list"),
    // Keys and anchors.
    never(
        "get secret picomesh-issuer -n picomesh-system",
        nothing,
        "cannot get",
    ),
    never("get secrets -A", nothing, "cannot list"),
    never(
        "create -f -",
        || issuer("kubernetes.io/tls"),
        "cannot create",
    ),
    never(
        "create -f -",
        || trust_roots("picomesh-trust-roots"),
        "cannot create",
    ),
    never(
        APPLY,
        || trust_roots("picomesh-trust-roots"),
        "cannot patch",
    ),
    never(
        "delete configmap picomesh-trust-roots -n picomesh-system",
        nothing,
        "cannot delete",
    ),
    never("get configmaps -n picomesh-system", nothing, "cannot list"),
    // What runs.
    never("create -f -", || pod("new"), "cannot create"),
    never(APPLY, || pod("picomesh-controller"), "cannot patch"),
    never(
        "delete pod picomesh-controller -n picomesh-system",
        nothing,
        "cannot delete",
    ),
    never("create -f -", deployment, "cannot create"),
    never(APPLY, || node("OTHER"), "cannot patch"),
    never(APPLY, || namespace("default"), "cannot patch"),
    never("create -f -", network_policy, "cannot create"),
    // Others' rights.
    never(
        "create token picomesh-controller -n picomesh-system",
        nothing,
        "cannot create",
    ),
    never("get nodes --as=admin", nothing, "cannot impersonate"),
    never(
        "delete validatingadmissionpolicy picomesh-agent-mesh-nodes",
        nothing,
        "cannot delete",
    ),
    never("create -f -", admin_binding, "cannot create"),
];

const CONTROLLER: &[Row] = &[
    may("get namespaces,pods -A -o name", nothing),
    may("get csr", nothing),
    may(APPROVAL, || approval("by-agent")),
    may("create -f -", || lease("picomesh-controller")),
    may("delete csr unwanted", nothing),
    never("delete csr foreign", nothing, "picomesh.io/workload only"),
    // It decides, and makes nothing.
    never(STATUS, || certificate("by-agent"), "cannot patch"),
    never(APPROVAL, || approval("foreign"), "not permitted to approve"),
    never(
        "create -f -",
        || request("by-controller", OURS),
        "cannot create",
    ),
    never(
        "create -f -",
        || lease("picomesh-signer"),
        "Lease of its own name",
    ),
    // Keys and anchors.
    never(
        "get secret picomesh-issuer -n picomesh-system",
        nothing,
        "cannot get",
    ),
    never("get secrets -A", nothing, "cannot list"),
    never(
        "create -f -",
        || issuer("kubernetes.io/tls"),
        "cannot create",
    ),
    never(
        "create -f -",
        || trust_roots("picomesh-trust-roots"),
        "cannot create",
    ),
    never(
        APPLY,
        || trust_roots("picomesh-trust-roots"),
        "cannot patch",
    ),
    // What runs.
    never("create -f -", || pod("new"), "cannot create"),
    never(
        "delete pod picomesh-agent -n picomesh-system",
        nothing,
        "cannot delete",
    ),
    never("create -f -", || mesh_node("OTHER"), "cannot create"),
    never(
        "create token picomesh-signer -n picomesh-system",
        nothing,
        "cannot create",
    ),
    never("create -f -", admin_binding, "cannot create"),
];

const SIGNER: &[Row] = &[
    may("get csr", nothing),
    may("create -f -", || issuer("kubernetes.io/tls")),
    may(
        "get secret picomesh-issuer -n picomesh-system -o name",
        nothing,
    ),
    may("create -f -", || trust_roots("picomesh-trust-roots")),
    may("replace -f -", || trust_roots("picomesh-trust-roots")),
    may("create -f -", || lease("picomesh-signer")),
    may(STATUS, || certificate("by-agent")),
    // It signs what was approved, and decides nothing.
    never(APPROVAL, || approval("pending"), "cannot patch"),
    never(STATUS, || certificate("foreign"), "not permitted to sign"),
    never("delete csr pending", nothing, "cannot delete"),
    never(
        "create -f -",
        || request("by-signer", OURS),
        "cannot create",
    ),
    never(
        "create -f -",
        || lease("picomesh-controller"),
        "Lease of its own name",
    ),
    // Keys that are not the mesh's, and a token of another account in the clothes of its own.
    never("get secrets -n picomesh-system", nothing, "cannot list"),
    never("get secrets -A", nothing, "cannot list"),
    never("get secret other -n picomesh-system", nothing, "cannot get"),
    never(
        "create -f -",
        || secret("other", "kubernetes.io/tls"),
        "the signer makes",
    ),
    never("create -f -", || secret("token", TOKEN), "the signer makes"),
    never("create -f -", || issuer(TOKEN), "the signer makes"),
    never("create -f -", || trust_roots("other"), "the signer makes"),
    never(
        "delete secret picomesh-issuer -n picomesh-system",
        nothing,
        "cannot delete",
    ),
    // What runs.
    never("get pods -A", nothing, "cannot list"),
    never("create -f -", || pod("new"), "cannot create"),
    never("create -f -", || mesh_node("OTHER"), "cannot create"),
    never(
        "create token picomesh-controller -n picomesh-system",
        nothing,
        "cannot create",
    ),
    never("create -f -", admin_binding, "cannot create"),
];

const OURS: &str = "picomesh.io/workload";
/// Of nobody: what the cluster's own signs, has a certificate before anybody else can try.
const THEIRS: &str = "example.com/nobody";
const TOKEN: &str = "kubernetes.io/service-account-token";
/// Without reading before, as kubectl does for other changes.
const APPLY: &str = "apply --server-side --force-conflicts -f -";
/// The same of a part of an object, which not every kubectl can: what it reads is sent as a patch.
const STATUS: &str = "patch status";
const APPROVAL: &str = "patch approval";
const TRUST_ROOTS: &str = "get configmaps -n picomesh-system --field-selector \
                           metadata.name=picomesh-trust-roots";

fn an_account_of_the_mesh_can_do_what_its_table_says_and_nothing_else() -> Result<()> {
    let ground = ground()?;
    let kubectl = ground.kubectl();
    let nodes = ground.nodes()?;
    let [own, other] = nodes.get(..2).context("the tests need two nodes")? else {
        bail!("a slice of two");
    };
    let _installed = Installed::new(kubectl, Part::Rights)?;
    let accounts = [
        ("picomesh-agent", AGENT),
        ("picomesh-controller", CONTROLLER),
        ("picomesh-signer", SIGNER),
    ];
    let scratch = tempfile::tempdir()?;
    let mut tokens = Vec::new();
    for (account, _) in accounts {
        let mut pod = pod(account);
        pod["spec"]["nodeName"] = json!(own);
        pod["spec"]["serviceAccountName"] = json!(account);
        kubectl.apply(&pod)?;
        let get = ["get", "pod", account, "-n", NAMESPACE];
        let uid = kubectl.text(&[&get[..], &["-o=jsonpath={.metadata.uid}"]].concat())?;
        let token = kubectl.text(&[
            "create",
            "token",
            account,
            "-n",
            NAMESPACE,
            "--bound-object-kind=Pod",
            &format!("--bound-object-name={account}"),
            &format!("--bound-object-uid={uid}"),
        ])?;
        tokens.push(kubectl.with_token(&token, &scratch.path().join(account))?);
    }
    // What is somebody else's, for what is tried on it.
    kubectl.apply(&mesh_node(other))?;
    for (name, signer) in [("pending", OURS), ("unwanted", OURS), ("foreign", THEIRS)] {
        kubectl.apply(&with(request(name, signer), &[]))?;
    }
    kubectl.run(&["certificate", "approve", "foreign"])?;

    // The API server takes a moment to act by new policies.
    let probe = mesh_node("picomesh-test-nowhere").to_string();
    let agent = tokens.first().context("no token")?;
    wait::until("the admission policies are in force", PATIENCE, || {
        let made = agent.feed(&["create", "--dry-run=server", "-f", "-"], &probe);
        slowly(made.err().context("it was let in"))
            .is_ok_and(|e| format!("{e:#}").contains("own node only"))
    })?;

    let mut mistakes = Vec::new();
    for ((account, rows), kubectl) in accounts.iter().zip(&tokens) {
        for row in *rows {
            let names = [("OWN", own.as_str()), ("OTHER", other.as_str())];
            if let Err(e) = tried(kubectl, row, &names) {
                mistakes.push(format!("{account}: {e:#}"));
            }
        }
    }
    for name in ["by-agent", "pending", "unwanted", "foreign"] {
        // Of the whole cluster, so that nothing else removes them.
        let _ = kubectl.run(&["delete", "csr", name, "--ignore-not-found"]);
    }
    ensure!(mistakes.is_empty(), "{}", mistakes.join("\n"));
    Ok(())
}

fn tried(kubectl: &Kubectl, row: &Row, names: &[(&str, &str)]) -> Result<()> {
    let words: Vec<String> = row
        .words
        .split_ascii_whitespace()
        .map(|word| replaced(word, names))
        .collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let input = with((row.input)(), names);
    let tried = match words[..] {
        ["patch", part] => {
            patch(&input, part).and_then(|call| Api::new(kubectl)?.call(&call).map(drop))
        }
        _ if input.is_null() => kubectl.run(&words).map(drop),
        _ => kubectl.feed(&words, &input.to_string()).map(drop),
    };
    let what = format!("{} {input}", words.join(" "));
    match (tried, row.refused) {
        (Ok(_), None) => Ok(()),
        (Ok(_), Some(_)) => bail!("could do this: {what}"),
        (Err(e), None) => bail!("could not do this: {what}: {e:#}"),
        (Err(e), Some(refused)) => {
            let said = format!("{e:#}");
            ensure!(
                said.contains("orbidden") && said.contains(refused),
                "{what}: refused otherwise than by {refused:?}: {said}"
            );
            Ok(())
        }
    }
}

/// Of a part of an object of the whole cluster.
fn patch(object: &Value, part: &str) -> Result<Call> {
    let word = |value: &Value| value.as_str().map(str::to_owned).context("no text");
    let (version, name) = (
        word(&object["apiVersion"])?,
        word(&object["metadata"]["name"])?,
    );
    let kind = word(&object["kind"])?.to_lowercase();
    Ok(Call::patch(
        format!("/apis/{version}/{kind}s/{name}/{part}"),
        object,
    ))
}

fn replaced(text: &str, names: &[(&str, &str)]) -> String {
    let mut text = text.to_owned();
    for (name, value) in names {
        text = text.replace(name, value);
    }
    text
}

/// With names in the place of their stand-ins.
fn with(object: Value, names: &[(&str, &str)]) -> Value {
    match object {
        Value::String(text) => Value::String(replaced(&text, names)),
        Value::Array(all) => all.into_iter().map(|one| with(one, names)).collect(),
        Value::Object(fields) => {
            let fields = fields.into_iter();
            Value::Object(fields.map(|(key, one)| (key, with(one, names))).collect())
        }
        other @ (Value::Null | Value::Bool(_) | Value::Number(_)) => other,
    }
}

fn controller_and_signer_fit_into_a_restricted_namespace() -> Result<()> {
    let ground = ground()?;
    let kubectl = ground.kubectl();
    let space = ground.namespace("restricted")?;
    space.kubectl(&[
        "label",
        "namespace",
        space.name(),
        "pod-security.kubernetes.io/enforce=restricted",
    ])?;
    let base = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../deploy/kustomize/base");
    let template = |file: &str, path: &str| -> Result<Value> {
        let file = format!("-f={}", base.join(file).display());
        let shown = kubectl.run(&["create", "--dry-run=client", "-o=json", &file])?;
        // One document after the other.
        let mut documents = serde_json::Deserializer::from_str(&shown).into_iter::<Value>();
        let first = documents.next().context("no document")??;
        let mut pod = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": "try", "namespace": space.name()},
            "spec": first.pointer(path).context("no template")?,
        });
        let spec = pod["spec"].as_object_mut().context("no spec")?;
        // Of the mesh's own namespace.
        spec.remove("serviceAccountName");
        spec.remove("priorityClassName");
        Ok(pod)
    };
    let create =
        |pod: Value| kubectl.feed(&["create", "--dry-run=server", "-f", "-"], &pod.to_string());
    for file in ["controller.yaml", "signer.yaml"] {
        create(template(file, "/spec/template/spec")?)?;
    }
    // The control: the agent does not, so somebody looks.
    let agent = create(template("agent.yaml", "/spec/template/spec")?);
    let why = format!("{:#}", agent.err().context("the agent fits, too")?);
    ensure!(why.contains("violates PodSecurity"), "{why}");
    Ok(())
}

fn pod(name: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {
            "automountServiceAccountToken": false,
            "terminationGracePeriodSeconds": 1,
            "containers": [{
                "name": "main", "image": TOOLS, "imagePullPolicy": "Never",
                "command": ["/bin/sleep", "100000"],
            }],
        },
    })
}

fn mesh_node(name: &str) -> Value {
    json!({
        "apiVersion": "picomesh.io/v1alpha1", "kind": "MeshNode",
        "metadata": {"name": name}, "spec": {}, "status": {"version": "by a test"},
    })
}

/// Any request for a certificate; what it asks for is nothing that this is about.
fn request(name: &str, signer: &str) -> Value {
    let usages = if signer == OURS {
        json!(["digital signature", "client auth", "server auth"])
    } else {
        json!(["client auth"])
    };
    json!({
        "apiVersion": "certificates.k8s.io/v1", "kind": "CertificateSigningRequest",
        "metadata": {"name": name},
        "spec": {"signerName": signer, "usages": usages, "request": made().request},
    })
}

fn approval(request: &str) -> Value {
    json!({
        "apiVersion": "certificates.k8s.io/v1", "kind": "CertificateSigningRequest",
        "metadata": {"name": request},
        "status": {"conditions": [{
            "type": "Approved", "status": "True", "reason": "Tested", "message": "by a test",
        }]},
    })
}

fn certificate(request: &str) -> Value {
    json!({
        "apiVersion": "certificates.k8s.io/v1", "kind": "CertificateSigningRequest",
        "metadata": {"name": request},
        "status": {"certificate": made().certificate},
    })
}

fn issuer(type_: &str) -> Value {
    secret("picomesh-issuer", type_)
}

fn secret(name: &str, type_: &str) -> Value {
    let mut secret = json!({
        "apiVersion": "v1", "kind": "Secret", "type": type_,
        "metadata": {"name": name, "namespace": NAMESPACE},
    });
    if type_ == TOKEN {
        secret["metadata"]["annotations"] =
            json!({"kubernetes.io/service-account.name": "picomesh-controller"});
    } else {
        secret["data"] = json!({"tls.crt": made().certificate, "tls.key": made().key});
    }
    secret
}

fn trust_roots(name: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "ConfigMap",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "data": {"ca.crt": "by a test"},
    })
}

fn lease(name: &str) -> Value {
    json!({
        "apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
        "metadata": {"name": name, "namespace": NAMESPACE},
    })
}

fn event() -> Value {
    json!({
        "apiVersion": "v1", "kind": "Event",
        "metadata": {"name": "picomesh-test", "namespace": NAMESPACE},
        "involvedObject": {
            "apiVersion": "v1", "kind": "Pod", "name": "picomesh-agent", "namespace": NAMESPACE,
        },
        "reason": "Tested", "type": "Normal", "message": "by a test",
    })
}

fn deployment() -> Value {
    json!({
        "apiVersion": "apps/v1", "kind": "Deployment",
        "metadata": {"name": "new", "namespace": NAMESPACE},
        "spec": {
            "selector": {"matchLabels": {"app": "new"}},
            "template": {"metadata": {"labels": {"app": "new"}}, "spec": pod("new")["spec"]},
        },
    })
}

fn node(name: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": name, "labels": {"by": "a-test"}},
    })
}

fn namespace(name: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Namespace",
        "metadata": {"name": name, "labels": {"picomesh.io/mesh": "disabled"}},
    })
}

fn network_policy() -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": "new", "namespace": NAMESPACE},
        "spec": {"podSelector": {}},
    })
}

fn admin_binding() -> Value {
    json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding",
        "metadata": {"name": "picomesh-test"},
        "roleRef": {
            "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole",
            "name": "cluster-admin",
        },
        "subjects": [{
            "kind": "ServiceAccount", "name": "picomesh-agent", "namespace": NAMESPACE,
        }],
    })
}

/// In base64, as Kubernetes has bytes.
struct Made {
    key: String,
    request: String,
    certificate: String,
}

/// A key, a request and a certificate, made once.
fn made() -> &'static Made {
    static MADE: std::sync::OnceLock<Made> = std::sync::OnceLock::new();
    MADE.get_or_init(|| {
        let script = "openssl ecparam -name prime256v1 -genkey -noout -out k && \
                      openssl req -new -key k -subj /CN=test -out r && \
                      openssl req -x509 -key k -subj /CN=test -days 1 -out c && \
                      for f in k r c; do openssl base64 -A -in $f; echo; done";
        let scratch = tempfile::tempdir().expect("a directory");
        let output = Command::new("sh")
            .args(["-ec", script])
            .current_dir(scratch.path())
            .output()
            .expect("openssl is a need of every cluster");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let mut lines = text.lines().map(str::to_owned);
        let mut line = || lines.next().expect("openssl made all three");
        Made {
            key: line(),
            request: line(),
            certificate: line(),
        }
    })
}

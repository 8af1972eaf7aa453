//! The mesh as users install it, seen from outside: by kubectl, by what travels on the wire between
//! the nodes, and by what the agents say about it.

use std::{fs, path::Path, process::Command, time::Duration};

use anyhow::{Context, Result, ensure};
use picomesh_tests::{
    capture::Capture,
    cluster::{Cluster, TOOLS},
    wait,
};
use serde_json::json;

use crate::{
    ground::{self, Ground, Namespace, Need, PATIENCE, Test, ground, items, slowly, url},
    install::{Installed, NAMESPACE, Part},
};

pub(crate) const TESTS: &[Test] = &[Test {
    name: "mesh::a_label_takes_running_pods_into_the_mesh_and_out_of_it",
    needs: &[Need::Nodes, Need::Image],
    run: a_label_takes_running_pods_into_the_mesh_and_out_of_it,
}];

const PORT: u16 = 8080;
/// In the answer of every server, so on the wire if it is plain.
const MARKER: &str = "picomesh-marker-5b1c";

fn a_label_takes_running_pods_into_the_mesh_and_out_of_it() -> Result<()> {
    let ground = ground()?;
    let cluster = ground.own()?;
    cluster.import_archive(&ground::image()?)?;
    let space = ground.namespace("mesh")?;
    let [near, far] = cluster.nodes() else {
        anyhow::bail!("two nodes are expected")
    };
    // Pods first: they are older than the agents, and are never started anew.
    let nodes = [near.name(), far.name()];
    space.apply(json!({
        "apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "server"},
    }))?;
    server(&space, far.name())?;
    for (index, node) in nodes.iter().enumerate() {
        space.pod(
            &format!("client{index}"),
            node,
            TOOLS,
            &["/bin/sleep", "100000"],
        )?;
    }
    space.service("server", "server", PORT)?;
    for pod in ["server", "client0", "client1"] {
        space.wait_ready(pod)?;
    }
    let clients = ["client0", "client1"];
    let address = space.addresses("server")?.remove(0);
    let service = space.service_addresses("server")?.remove(0);
    let started = started(&space)?;

    // The control: outside of the mesh everybody on the wire reads along.
    ensure!(
        seen_on_the_wire(cluster, &space, &address)? > 0,
        "the capture finds nothing"
    );

    let _installed = Installed::new(ground.kubectl(), Part::All)?;
    wait_installed(&ground).with_context(|| diagnosis(&ground))?;

    label(&space, "enabled")?;
    wait_captured(&ground, 3).with_context(|| diagnosis(&ground))?;
    for client in clients {
        for address in [&address, &service] {
            let answer = served(&space, client, address)?;
            ensure!(answer.contains(MARKER), "{client} got {answer:?}");
        }
    }
    let seen = seen_on_the_wire(cluster, &space, &address)?;
    ensure!(seen == 0, "{seen} packets between the nodes can be read");
    both_ends_are_named(&ground, &space, near.name(), far.name())?;
    probes_reach_their_pod(&ground, &space)?;
    a_stolen_token_speaks_for_its_node_only(&ground, &space, near.name())
        .with_context(|| diagnosis(&ground))?;

    // And out again. Nobody was started anew for any of it.
    label(&space, "disabled")?;
    wait_captured(&ground, 0)?;
    ensure!(served(&space, "client0", &address)?.contains(MARKER));
    ensure!(
        seen_on_the_wire(cluster, &space, &address)? > 0,
        "pods that have left the mesh are still carried"
    );
    ensure!(self::started(&space)? == started, "a pod was started anew");
    Ok(())
}

/// What names a container's one start, for every pod of the test.
fn started(space: &Namespace) -> Result<Vec<String>> {
    let pods = space.get(&["pods"])?;
    Ok(items(&pods)
        .map(|pod| pod["status"]["containerStatuses"][0]["containerID"].to_string())
        .collect())
}

/// nginx that names itself to whoever asks, and is asked by the kubelet.
fn server(space: &Namespace, node: &str) -> Result<()> {
    let listen_v6 = if fs::exists("/proc/net/if_inet6")? {
        format!("listen [::]:{PORT};")
    } else {
        String::new()
    };
    let config = format!(
        "user root; worker_processes 1; pid /tmp/nginx.pid; error_log stderr; \
         events {{}} http {{ access_log off; server {{ listen {PORT}; {listen_v6} \
         location / {{ default_type text/plain; return 200 \"{MARKER}\\n\"; }} }} }}"
    );
    let script = format!(
        "cat > /tmp/nginx.conf <<'END'\n{config}\nEND\n\
         exec nginx -e stderr -c /tmp/nginx.conf -g 'daemon off;'"
    );
    space.apply(json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "server", "labels": {"app": "server"}},
        "spec": {
            "nodeName": node,
            "terminationGracePeriodSeconds": 1,
            "enableServiceLinks": false,
            "serviceAccountName": "server",
            "containers": [{
                "name": "main", "image": TOOLS, "imagePullPolicy": "Never",
                "command": ["/bin/sh", "-c", script],
                "readinessProbe": {
                    "httpGet": {"path": "/", "port": PORT},
                    "periodSeconds": 1, "failureThreshold": 2,
                },
            }],
        },
    }))
}

fn label(space: &Namespace, value: &str) -> Result<()> {
    let label = format!("picomesh.io/mesh={value}");
    space.kubectl(&["label", "--overwrite", "namespace", space.name(), &label])?;
    Ok(())
}

fn wait_installed(ground: &Ground) -> Result<()> {
    let timeout = format!("--timeout={}s", wait::patience(PATIENCE).as_secs());
    for what in [
        "daemonset/picomesh-agent",
        "deployment/picomesh-controller",
        "deployment/picomesh-signer",
    ] {
        let args = ["rollout", "status", "-n", NAMESPACE, what, &timeout];
        ground.kubectl().run(&args)?;
    }
    Ok(())
}

/// As the agents tell it of their nodes, from the kernel.
fn wait_captured(ground: &Ground, wanted: u64) -> Result<()> {
    wait::for_value(&format!("{wanted} pods are captured"), PATIENCE, || {
        let nodes = slowly(ground.kubectl().get(&["meshnodes"]))?;
        let pods = items(&nodes).map(|node| &node["status"]["pods"]);
        let (mut meshed, mut captured) = (0, 0);
        for pods in pods {
            meshed += pods["meshed"].as_u64().unwrap_or(0);
            captured += pods["captured"].as_u64().unwrap_or(0);
        }
        let done = (meshed, captured) == (wanted, wanted);
        slowly(done.then_some(()).with_context(|| {
            format!(
                "{meshed} are meshed, {captured} captured: {}",
                nodes["items"]
            )
        }))
        .map(Some)
    })
}

fn served(space: &Namespace, client: &str, address: &str) -> Result<String> {
    let url = url(address, PORT);
    space.exec(client, &["curl", "-sS", "--max-time", "5", &url])
}

/// Packets between the nodes that could be read, of a few requests across.
fn seen_on_the_wire(cluster: &Cluster, space: &Namespace, address: &str) -> Result<u64> {
    let far = cluster.nodes().last().context("no node")?;
    let capture = Capture::start(far.netns(), Some("eth0"), &[MARKER.as_bytes()])?;
    for _ in 0..3 {
        let answer = served(space, "client0", address)?;
        ensure!(answer.contains(MARKER), "it answered {answer:?}");
    }
    // What is under way still counts.
    std::thread::sleep(Duration::from_millis(300));
    Ok(capture.found(0))
}

fn identity(space: &Namespace, account: &str) -> String {
    format!("spiffe://cluster.local/ns/{}/sa/{account}", space.name())
}

/// With the token of `node`'s agent: an account that runs there, which is the control, and one that
/// runs on the other node only.
fn a_stolen_token_speaks_for_its_node_only(
    ground: &Ground,
    space: &Namespace,
    node: &str,
) -> Result<()> {
    let kubectl = ground.kubectl();
    let pod = agent_on(ground, node)?;
    let uid = kubectl.text(&[
        "get",
        "pod",
        &pod,
        "-n",
        NAMESPACE,
        "-o=jsonpath={.metadata.uid}",
    ])?;
    let token = kubectl.text(&[
        "create",
        "token",
        "picomesh-agent",
        "-n",
        NAMESPACE,
        "--bound-object-kind=Pod",
        &format!("--bound-object-name={pod}"),
        &format!("--bound-object-uid={uid}"),
    ])?;
    let scratch = tempfile::tempdir()?;
    let thief = kubectl.with_token(&token, &scratch.path().join("kubeconfig"))?;
    let timeout = format!("--timeout={}s", wait::patience(PATIENCE).as_secs());
    for (account, answer) in [("default", "Approved"), ("server", "Denied")] {
        let name = format!("picomesh-test-{account}");
        let request = request(&identity(space, account), scratch.path())?;
        let object = json!({
            "apiVersion": "certificates.k8s.io/v1", "kind": "CertificateSigningRequest",
            "metadata": {"name": name},
            "spec": {
                "signerName": "picomesh.io/workload", "request": request,
                "expirationSeconds": 600,
                "usages": ["digital signature", "client auth", "server auth"],
            },
        });
        thief.feed(&["create", "-f", "-"], &object.to_string())?;
        let condition = format!("--for=condition={answer}");
        let answered = kubectl.run(&["wait", "csr", &name, &condition, &timeout]);
        answered.with_context(|| format!("{account} is not {answer}"))?;
        let issued = wait::for_value("a certificate is issued", Duration::from_secs(10), || {
            let request = slowly(kubectl.get(&["csr", &name]))?;
            slowly(
                request["status"]["certificate"]
                    .as_str()
                    .map(drop)
                    .context("none"),
            )
            .map(Some)
        });
        ensure!(
            issued.is_ok() == (answer == "Approved"),
            "{account}: {issued:?}"
        );
        kubectl.run(&["delete", "csr", &name, "--ignore-not-found"])?;
    }
    Ok(())
}

/// In base64.
fn request(identity: &str, dir: &Path) -> Result<String> {
    let script = "openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes \
                  -keyout key -subj / -addext \"subjectAltName=URI:$1\" -out request && \
                  openssl base64 -A -in request";
    let output = Command::new("sh")
        .args(["-ec", script, "sh", identity])
        .current_dir(dir)
        .output()?;
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8(output.stdout)?)
}

/// In the access log and in the metrics of both nodes.
fn both_ends_are_named(ground: &Ground, space: &Namespace, near: &str, far: &str) -> Result<()> {
    let (client, server) = (identity(space, "default"), identity(space, "server"));
    for (node, direction, peer) in [(near, "outbound", "dst"), (far, "inbound", "src")] {
        let agent = agent_on(ground, node)?;
        let log = ground
            .kubectl()
            .run(&["logs", "-n", NAMESPACE, &agent, "--tail=-1"])?;
        let named = log.lines().filter(|line| {
            line.contains(&format!("direction=\"{direction}\""))
                && line.contains(&format!("src.identity=\"{client}\""))
                && line.contains(&format!("dst.identity=\"{server}\""))
        });
        ensure!(
            named.count() > 0,
            "{node}: nobody {direction} is named in:\n{log}"
        );
        let metrics = ground
            .own()?
            .nodes()
            .iter()
            .find(|own| own.name() == node)
            .context("no such node")?
            .run(&[
                "curl",
                "-sS",
                "--max-time",
                "5",
                "http://127.0.0.1:4191/metrics",
            ])?;
        let opened = metrics.lines().any(|line| {
            line.starts_with("tcp_open_total{")
                && line.contains(&format!("direction=\"{direction}\""))
                && line.contains(&format!("peer=\"{peer}\""))
                && line.contains("tls=\"true\"")
        });
        ensure!(opened, "{node}: no connection by mTLS was counted");
    }
    Ok(())
}

/// The kubelet's, under a policy that lets nobody in. The control: a client is refused.
fn probes_reach_their_pod(ground: &Ground, space: &Namespace) -> Result<()> {
    let deny = "config.picomesh.io/default-inbound-policy=deny";
    let address = space.addresses("server")?.remove(0);
    space.kubectl(&["annotate", "namespace", space.name(), deny])?;
    wait::until("nobody is let in", PATIENCE, || {
        slowly(served(space, "client0", &address).err().context("served")).is_ok()
    })
    .with_context(|| diagnosis(ground))?;
    // Longer than it takes the kubelet to call a pod unready.
    std::thread::sleep(Duration::from_secs(5));
    let ready = space.kubectl(&[
        "get",
        "pod",
        "server",
        "-o=jsonpath={.status.conditions[?(@.type==\"Ready\")].status}",
    ])?;
    ensure!(
        ready == "True",
        "under default deny the kubelet's probe fails"
    );
    let open = deny.split('=').next().unwrap_or_default();
    space.kubectl(&["annotate", "namespace", space.name(), &format!("{open}-")])?;
    wait::until("everybody is let in again", PATIENCE, || {
        slowly(served(space, "client0", &address)).is_ok()
    })
}

fn agent_on(ground: &Ground, node: &str) -> Result<String> {
    let on = format!("--field-selector=spec.nodeName={node}");
    let label = "-l=app.kubernetes.io/name=picomesh-agent";
    let pods = ground
        .kubectl()
        .get(&["pods", "-n", NAMESPACE, &on, label])?;
    let mut names = items(&pods).filter_map(|pod| pod["metadata"]["name"].as_str());
    Ok(names.next().context("no agent there")?.to_owned())
}

/// What a person would look at.
fn diagnosis(ground: &Ground) -> String {
    let mut text = String::new();
    for args in [
        &["get", "pods,events", "-n", NAMESPACE, "-o=wide"][..],
        &["describe", "pods", "-n", NAMESPACE],
        &["get", "meshnodes", "-o=yaml"],
        &["get", "csr"],
    ] {
        let said = ground.kubectl().run(args);
        text.push_str(&said.unwrap_or_else(|e| format!("{e:#}\n")));
    }
    for what in ["agent", "controller", "signer"] {
        let label = format!("-l=app.kubernetes.io/name=picomesh-{what}");
        let args = ["logs", "-n", NAMESPACE, &label, "--tail=40", "--prefix"];
        let said = ground.kubectl().run(&args);
        text.push_str(&said.unwrap_or_else(|e| format!("{e:#}\n")));
    }
    text
}

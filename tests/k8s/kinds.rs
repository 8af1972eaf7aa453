//! What people run, and how they look into it, in the mesh as out of it.

use std::{
    io::{BufRead, BufReader},
    net::{Ipv4Addr, SocketAddr},
    process::{Child, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use picomesh_tests::{
    client,
    cluster::{Kubectl, Node, TOOLS},
    wait,
};
use serde_json::{Value, json};

use crate::{
    ground::{self, Ground, Namespace, Need, PATIENCE, Test, ground, items, slowly, url},
    install::{Installed, Part, diagnosis, log_of, wait_captured, wait_installed},
    talk::{
        MARKER, PORT, SLEEP, both, identity, label, nginx, seen_on_the_wire, served, wait_told,
        wire,
    },
};

pub(crate) const TESTS: &[Test] = &[Test {
    name: "kinds::workloads_of_every_kind_are_in_the_mesh_and_people_can_look_into_them",
    needs: &[Need::Nodes, Need::Image],
    run: workloads_of_every_kind_are_in_the_mesh_and_people_can_look_into_them,
}];

fn workloads_of_every_kind_are_in_the_mesh_and_people_can_look_into_them() -> Result<()> {
    let ground = ground()?;
    let cluster = ground.own()?;
    cluster.import_archive(&ground::image()?)?;
    let nodes = both(cluster)?;
    let space = ground.namespace("kinds")?;
    workloads(&space)?;
    for (index, node) in nodes.iter().enumerate() {
        space.pod(&format!("client{index}"), node.name(), TOOLS, SLEEP)?;
    }
    for what in ["deployment/web", "statefulset/db", "daemonset/each"] {
        let timeout = format!("--timeout={}s", wait::patience(PATIENCE).as_secs());
        space.kubectl(&["rollout", "status", what, &timeout])?;
    }
    for client in ["client0", "client1"] {
        space.wait_ready(client)?;
    }
    let servers = servers(&space)?;
    ensure!(servers.len() == 6, "six servers are expected: {servers:?}");
    let across = servers
        .iter()
        .find(|server| server.node == nodes[1].name())
        .context("no server on the far node")?;
    // The control.
    let seen = seen_on_the_wire(cluster, &space, &across.address)?;
    ensure!(seen > 0, "the capture finds nothing");

    let _installed = Installed::new(ground.kubectl(), Part::All)?;
    wait_installed(&ground).with_context(|| diagnosis(&ground))?;
    label(&space, "enabled")?;
    wait_captured(&ground, 8).with_context(|| diagnosis(&ground))?;

    // Everybody calls everybody, by address and by Service; a Job does so too and comes to its end.
    let capture = wire(cluster, &[MARKER.as_bytes()])?;
    let service = space.service_addresses("web")?.remove(0);
    let addresses = servers.iter().map(|server| &server.address);
    let addresses: Vec<&String> = addresses.chain([&service]).collect();
    for client in ["client0", "client1"] {
        for address in &addresses {
            let answer = served(&space, client, address)?;
            ensure!(answer.contains(MARKER), "{client} got {answer:?}");
        }
    }
    space.apply(job(&addresses))?;
    let timeout = format!("--timeout={}s", wait::patience(PATIENCE).as_secs());
    space
        .kubectl(&["wait", "job/caller", "--for=condition=Complete", &timeout])
        .with_context(|| diagnosis(&ground))?;
    let seen = capture.stop()?.found[0];
    ensure!(seen == 0, "{seen} packets between the nodes can be read");
    all_are_named(&ground, &space, nodes, &servers)?;
    let caller = space.get(&["pods", "-l", "job-name=caller"])?;
    let caller = items(&caller).next().context("the Job has no pod")?;
    let name = caller["metadata"]["name"].as_str().context("no name")?;
    let node = caller["spec"]["nodeName"].as_str().context("no node")?;
    let own = identity(&space, "default");
    let told = vec![
        format!("src.workload=\"{name}\""),
        format!("src.identity=\"{own}\""),
    ];
    wait_told(&ground, node, &[told])?;

    // A container before the others had the network too, and a Job's words are kept.
    for container in ["before", "main"] {
        let said = space.kubectl(&["logs", "job/caller", "-c", container])?;
        ensure!(
            said.contains(MARKER),
            "{container} of the Job said {said:?}"
        );
    }
    ensure!(space.exec("db-0", &["echo", "alive"])? == "alive\n");
    is_forwarded(ground.kubectl(), &space, "db-0")?;
    is_known_to_the_api_server(&space, nodes[0].name())
}

/// A Deployment and a StatefulSet of two, a DaemonSet; the first two with a Service each.
fn workloads(space: &Namespace) -> Result<()> {
    let template = |app: &str, spread: bool| -> Result<Value> {
        let mut template = json!({
            "metadata": {"labels": {"app": app}},
            "spec": {
                "terminationGracePeriodSeconds": 1,
                "enableServiceLinks": false,
                "containers": [nginx()?],
            },
        });
        if spread {
            template["spec"]["topologySpreadConstraints"] = json!([{
                "maxSkew": 1, "topologyKey": "kubernetes.io/hostname",
                "whenUnsatisfiable": "DoNotSchedule",
                "labelSelector": {"matchLabels": {"app": app}},
            }]);
        }
        Ok(template)
    };
    for (kind, app) in [
        ("Deployment", "web"),
        ("StatefulSet", "db"),
        ("DaemonSet", "each"),
    ] {
        let many = kind != "DaemonSet";
        let mut object = json!({
            "apiVersion": "apps/v1", "kind": kind,
            "metadata": {"name": app},
            "spec": {
                "selector": {"matchLabels": {"app": app}},
                "template": template(app, many)?,
            },
        });
        if many {
            object["spec"]["replicas"] = json!(2);
        }
        if kind == "StatefulSet" {
            object["spec"]["serviceName"] = json!(app);
        }
        space.apply(object)?;
    }
    space.service("web", "web", PORT)?;
    space.apply(json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": "db"},
        "spec": {"clusterIP": "None", "selector": {"app": "db"}, "ports": [{"port": PORT}]},
    }))
}

#[derive(Debug)]
struct Served {
    pod: String,
    node: String,
    address: String,
}

/// The pods that serve; those of the StatefulSet must be what the headless Service leads to.
fn servers(space: &Namespace) -> Result<Vec<Served>> {
    let pods = space.get(&["pods", "-l", "app in (web,db,each)"])?;
    let word = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let servers: Vec<Served> = items(&pods)
        .map(|pod| Served {
            pod: word(&pod["metadata"]["name"]),
            node: word(&pod["spec"]["nodeName"]),
            address: word(&pod["status"]["podIP"]),
        })
        .collect();
    let slices = space.get(&["endpointslices", "-l", "kubernetes.io/service-name=db"])?;
    let of_service = items(&slices)
        .filter(|slice| slice["addressType"] == "IPv4")
        .flat_map(|slice| slice["endpoints"].as_array().into_iter().flatten());
    let mut of_service: Vec<String> = of_service.map(|one| word(&one["addresses"][0])).collect();
    let of_set = servers
        .iter()
        .filter(|server| server.pod.starts_with("db-"));
    let mut of_set: Vec<String> = of_set.map(|server| server.address.clone()).collect();
    of_service.sort();
    of_set.sort();
    ensure!(
        of_service == of_set,
        "the headless Service leads to {of_service:?}, not to {of_set:?}"
    );
    Ok(servers)
}

/// Calls all of them, first in a container that must end before the others start.
fn job(addresses: &[&String]) -> Value {
    let calls = addresses.iter().map(|address| {
        let url = url(address, PORT);
        format!("curl -sS --fail --max-time 20 {url}\n")
    });
    let script = format!("set -e\n{}", calls.collect::<String>());
    let container = |name: &str| {
        json!({
            "name": name, "image": TOOLS, "imagePullPolicy": "Never",
            "command": ["/bin/sh", "-c", script],
        })
    };
    json!({
        "apiVersion": "batch/v1", "kind": "Job",
        "metadata": {"name": "caller"},
        "spec": {"backoffLimit": 0, "template": {"spec": {
            "restartPolicy": "Never",
            "enableServiceLinks": false,
            "initContainers": [container("before")],
            "containers": [container("main")],
        }}},
    })
}

/// Every server by the agent of who called it, with both identities.
fn all_are_named(
    ground: &Ground,
    space: &Namespace,
    nodes: [&Node; 2],
    servers: &[Served],
) -> Result<()> {
    let identity = identity(space, "default");
    let both = [
        format!("src.identity=\"{identity}\""),
        format!("dst.identity=\"{identity}\""),
    ];
    wait::for_value("all connections are told", PATIENCE, || {
        for node in nodes {
            let log = slowly(log_of(ground, node.name()))?;
            let silent = servers.iter().find(|server| {
                let pod = format!("dst.workload=\"{}\"", server.pod);
                !log.lines()
                    .any(|line| line.contains(&pod) && both.iter().all(|word| line.contains(word)))
            });
            if let Some(server) = silent {
                let name = node.name();
                slowly(Err::<(), _>(anyhow::anyhow!(
                    "{name} tells nothing of {server:?}"
                )))?;
            }
        }
        Ok(Some(()))
    })
}

/// `kubectl port-forward`, which ends with this.
struct Forward(Child);

impl Drop for Forward {
    fn drop(&mut self) {
        // It is a program that ends another: SIGKILL would leave that.
        let _ = kill(Pid::from_raw(self.0.id().cast_signed()), Signal::SIGTERM);
        let _ = self.0.wait();
    }
}

fn is_forwarded(kubectl: &Kubectl, space: &Namespace, pod: &str) -> Result<()> {
    let mut command = kubectl.command(&[
        "port-forward",
        "-n",
        space.name(),
        "--address=127.0.0.1",
        &format!("pod/{pod}"),
        &format!(":{PORT}"),
    ]);
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut forward = Forward(command.spawn().context("start kubectl port-forward")?);
    let stdout = forward.0.stdout.take().context("no output")?;
    // It must not lose its reader: it says a word for every connection.
    let mut stdout = BufReader::new(stdout);
    let mut said = String::new();
    stdout.read_line(&mut said)?;
    // Forwarding from 127.0.0.1:40000 -> 8080
    let port = said
        .split_whitespace()
        .find_map(|word| word.strip_prefix("127.0.0.1:")?.parse::<u16>().ok())
        .with_context(|| format!("it said {said:?}"))?;
    let to = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let (status, body) = client::http_get(to, "/", Duration::from_secs(10))?;
    ensure!(
        status == 200 && body.contains(MARKER),
        "forwarded, it answers {status} {body:?}"
    );
    Ok(())
}

/// A new pod of the mesh calls the API server, which knows it by its token and by nothing else.
fn is_known_to_the_api_server(space: &Namespace, node: &str) -> Result<()> {
    let call = "curl -sS --max-time 20 -o /dev/null -w %{http_code} --cacert $d/ca.crt";
    let url = "https://$KUBERNETES_SERVICE_HOST:$KUBERNETES_SERVICE_PORT/apis";
    let script = format!(
        "d=/var/run/secrets/kubernetes.io/serviceaccount\n\
         echo with $({call} -H \"Authorization: Bearer $(cat $d/token)\" {url}) \
         without $({call} {url})"
    );
    space.pod("asks", node, TOOLS, &["/bin/sh", "-c", &script])?;
    space.wait_succeeded("asks")?;
    let said = space.kubectl(&["logs", "asks"])?;
    ensure!(said.trim() == "with 200 without 403", "it said {said:?}");
    Ok(())
}

//! Pods that let nobody in who is nobody: the kubelet still asks how they are, and there is no way
//! around the policy.

use std::{
    net::{IpAddr, SocketAddr},
    process::Command,
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use picomesh_tests::{
    client,
    cluster::{Cluster, Kubectl, TOOLS},
    wait,
};
use serde_json::{Value, json};

use crate::{
    ground::{self, Namespace, Need, PATIENCE, Test, ground, slowly, url},
    install::{Installed, Part, diagnosis, wait_captured, wait_installed},
    talk::{MARKER, PORT, SLEEP, both, label, served, server},
};

pub(crate) const TESTS: &[Test] = &[Test {
    name: "strict::under_default_deny_probes_of_every_kind_pass_and_node_ports_do_not",
    needs: &[Need::Nodes, Need::Image],
    run: under_default_deny_probes_of_every_kind_pass_and_node_ports_do_not,
}];

fn under_default_deny_probes_of_every_kind_pass_and_node_ports_do_not() -> Result<()> {
    let ground = ground()?;
    let cluster = ground.own()?;
    cluster.import_archive(&ground::image()?)?;
    let [near, far] = both(cluster)?;
    let (space, outside) = (
        ground.namespace("strict")?,
        ground.namespace("strict-outside")?,
    );
    let _installed = Installed::new(ground.kubectl(), Part::All)?;
    wait_installed(&ground).with_context(|| diagnosis(&ground))?;
    policy(&space, "deny")?;
    label(&space, "enabled")?;
    server(&space, "server", far.name())?;
    space.pod("client0", near.name(), TOOLS, SLEEP)?;
    outside.pod("stranger", far.name(), TOOLS, SLEEP)?;
    space.apply(probed("well", far.name(), &Ports::SERVED)?)?;
    // The control: somebody does look.
    space.apply(probed("ill", far.name(), &Ports::NOT_SERVED)?)?;
    for pod in ["server", "client0", "well"] {
        space.wait_ready(pod).with_context(|| diagnosis(&ground))?;
    }
    outside.wait_ready("stranger")?;
    wait_captured(&ground, 4).with_context(|| diagnosis(&ground))?;
    let address = space.addresses("server")?.remove(0);
    wait_refused("a client", || served(&space, "client0", &address))?;
    // Longer than it takes the kubelet to find fault with somebody.
    thread::sleep(Duration::from_secs(6));
    let pod = space.get(&["pod", "well"])?;
    for container in containers(&pod) {
        ensure!(
            container["ready"] == true && container["restartCount"] == 0,
            "its probe fails: {container}"
        );
    }
    let ill = space.get(&["pod", "ill"])?;
    for container in containers(&ill) {
        // The one that serves is asked by nobody.
        let wanted = container["name"] == "main";
        ensure!(
            container["ready"] == wanted,
            "a probe that must fail passes, or nothing serves: {container}"
        );
    }

    // First the control, without which a way that leads nowhere would look like a refusal.
    policy(&space, "all-unauthenticated")?;
    let port = node_port(&space)?;
    let mut ways = Vec::new();
    for node in [near, far] {
        let to = node_address(ground.kubectl(), node.name())?;
        ways.extend(asks(cluster, &outside, (to, port).into()));
    }
    for (way, asked) in &ways {
        let answer = wait::for_value(way, PATIENCE, || slowly(asked()).map(Some))?;
        ensure!(answer.contains(MARKER), "{way}: {answer:?}");
    }
    // Who has an identity may come, and nobody else, whatever way he takes.
    policy(&space, "all-authenticated")?;
    for (way, asked) in &ways {
        wait_refused(way, asked)?;
    }
    for (way, asked) in &ways {
        let answer = asked();
        ensure!(answer.is_err(), "{way} is open again: {answer:?}");
    }
    let answer = served(&space, "client0", &address)?;
    ensure!(answer.contains(MARKER), "the mesh itself got {answer:?}");
    Ok(())
}

fn policy(space: &Namespace, word: &str) -> Result<()> {
    let word = format!("config.picomesh.io/default-inbound-policy={word}");
    space
        .kubectl(&["annotate", "--overwrite", "namespace", space.name(), &word])
        .map(drop)
}

fn wait_refused(way: &str, asked: impl Fn() -> Result<String>) -> Result<()> {
    wait::until(&format!("{way} is refused"), PATIENCE, || {
        slowly(asked().err().context("served")).is_ok()
    })
}

type Asked<'a> = Box<dyn Fn() -> Result<String> + 'a>;

/// From beside the cluster, and from a pod outside of the mesh on the server's own node.
fn asks<'a>(
    cluster: &'a Cluster,
    outside: &'a Namespace,
    to: SocketAddr,
) -> [(String, Asked<'a>); 2] {
    let beside = move || -> Result<String> {
        let get = || client::http_get(to, "/", Duration::from_secs(5));
        let (status, body) = cluster.control().netns().run(get)?;
        ensure!(status == 200, "it answers {status}");
        Ok(body)
    };
    let stranger = move || -> Result<String> {
        let url = url(&to.ip().to_string(), to.port());
        outside.exec(
            "stranger",
            &["curl", "-sS", "--fail", "--max-time", "5", &url],
        )
    };
    [
        (
            format!("from a machine beside the cluster to {to}"),
            Box::new(beside),
        ),
        (
            format!("from a pod of the server's node to {to}"),
            Box::new(stranger),
        ),
    ]
}

fn node_port(space: &Namespace) -> Result<u16> {
    space.apply(json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": "door"},
        "spec": {"type": "NodePort", "selector": {"app": "server"}, "ports": [{"port": PORT}]},
    }))?;
    let port = &space.get(&["service", "door"])?["spec"]["ports"][0]["nodePort"];
    let port = port.as_u64().context("no port")?;
    Ok(u16::try_from(port)?)
}

fn node_address(kubectl: &Kubectl, node: &str) -> Result<IpAddr> {
    let node = kubectl.get(&["node", node])?;
    let addresses = node["status"]["addresses"].as_array();
    let mut addresses = addresses.into_iter().flatten().filter_map(|one| {
        let address = one["address"].as_str()?.parse::<IpAddr>().ok()?;
        (one["type"] == "InternalIP" && address.is_ipv4()).then_some(address)
    });
    addresses.next().context("the node has no address")
}

fn containers(pod: &Value) -> impl Iterator<Item = &Value> {
    let statuses = pod["status"]["containerStatuses"].as_array();
    statuses.into_iter().flatten()
}

/// Where probes of each kind go.
struct Ports {
    http: u16,
    https: u16,
    tcp: u16,
    grpc: u16,
    /// The code with which the program ends that is run.
    exec: u8,
}

impl Ports {
    const SERVED: Self = Self {
        http: 8080,
        https: 8443,
        tcp: 8080,
        grpc: 8081,
        exec: 0,
    };
    const NOT_SERVED: Self = Self {
        http: 9,
        https: 9,
        tcp: 9,
        grpc: 9,
        exec: 1,
    };
}

/// A pod of nginx that speaks HTTP, HTTPS and enough of gRPC, and of one container for each kind of
/// probe, which is its readiness; where all succeed, also its start and its life.
fn probed(name: &str, node: &str, ports: &Ports) -> Result<Value> {
    let exec = format!("exit {}", ports.exec);
    let kinds = [
        (
            "http",
            json!({"httpGet": {"path": "/", "port": ports.http}}),
        ),
        (
            "https",
            json!({"httpGet": {"path": "/", "port": ports.https, "scheme": "HTTPS"}}),
        ),
        ("tcp", json!({"tcpSocket": {"port": ports.tcp}})),
        (
            "exec",
            json!({"exec": {"command": ["/bin/sh", "-c", exec]}}),
        ),
        ("grpc", json!({"grpc": {"port": ports.grpc}})),
    ];
    let well = ports.exec == 0;
    let mut containers = vec![json!({
        "name": "main", "image": TOOLS, "imagePullPolicy": "Never",
        "command": ["/bin/sh", "-c", speaks_everything()?],
    })];
    for (kind, how) in kinds {
        let probe = |failures: u32| {
            let mut probe = how.clone();
            probe["periodSeconds"] = json!(1);
            probe["timeoutSeconds"] = json!(3);
            probe["failureThreshold"] = json!(failures);
            probe
        };
        let mut container = json!({
            "name": kind, "image": TOOLS, "imagePullPolicy": "Never", "command": SLEEP,
            "readinessProbe": probe(2),
        });
        if well {
            container["startupProbe"] = probe(60);
            container["livenessProbe"] = probe(2);
        }
        containers.push(container);
    }
    Ok(json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name},
        "spec": {
            "nodeName": node,
            "terminationGracePeriodSeconds": 1,
            "enableServiceLinks": false,
            "containers": containers,
        },
    }))
}

/// nginx on 8080 (HTTP), 8443 (HTTPS) and 8081 (gRPC: the answer of a healthy program is a file,
/// and what makes it one of gRPC stands behind it).
fn speaks_everything() -> Result<String> {
    let config = "user root; worker_processes 1; pid /tmp/nginx.pid; error_log stderr; \
         events {} http { access_log off; default_type text/plain; \
         server { listen 8080; location / { return 200 well; } } \
         server { listen 8443 ssl; ssl_certificate /tmp/pem; ssl_certificate_key /tmp/pem; \
         location / { return 200 well; } } \
         server { listen 8081 http2; root /tmp; location /grpc.health.v1.Health/ { \
         default_type application/grpc; error_page 405 =200 $uri; add_trailer grpc-status 0; } } }";
    // SERVING, in five bytes of gRPC's own and two of protobuf.
    let answer = r"\0\0\0\0\002\010\001";
    let pem = certificate()?;
    Ok(format!(
        "set -e\n\
         mkdir /tmp/grpc.health.v1.Health\n\
         printf '{answer}' > /tmp/grpc.health.v1.Health/Check\n\
         cat > /tmp/pem <<'END'\n{pem}\nEND\n\
         cat > /tmp/nginx.conf <<'END'\n{config}\nEND\n\
         exec nginx -e stderr -c /tmp/nginx.conf -g 'daemon off;'"
    ))
}

/// Key and certificate of nobody in particular: the kubelet does not look.
fn certificate() -> Result<String> {
    let script = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes \
                  -keyout - -subj /CN=probed -days 2";
    let output = Command::new("sh").args(["-ec", script]).output()?;
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8(output.stdout)?)
}

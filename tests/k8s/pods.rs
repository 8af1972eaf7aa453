//! The ground itself, before any mesh: nodes, images, pods that reach each other, and what a person
//! does with them.

use std::{collections::BTreeSet, fs, time::Duration};

use anyhow::{Context, Result, ensure};
use picomesh_tests::{
    cluster::TOOLS,
    image::{self, Image},
    wait,
};

use crate::ground::{self, Namespace, Need, PATIENCE, Test, ground, items, slowly, url};

pub(crate) const TESTS: &[Test] = &[
    Test {
        name: "pods::all_nodes_are_ready_and_have_networks_of_their_own",
        needs: &[Need::Cluster],
        run: all_nodes_are_ready_and_have_networks_of_their_own,
    },
    Test {
        name: "pods::an_imported_image_is_on_every_node",
        needs: &[Need::Nodes],
        run: an_imported_image_is_on_every_node,
    },
    Test {
        name: "pods::the_agents_image_starts_on_every_node",
        needs: &[Need::Nodes, Need::Image],
        run: the_agents_image_starts_on_every_node,
    },
    Test {
        name: "pods::pods_reach_each_other_by_address_and_by_service",
        needs: &[Need::Cluster],
        run: pods_reach_each_other_by_address_and_by_service,
    },
    Test {
        name: "pods::logs_and_exec_tell_what_happens_inside",
        needs: &[Need::Cluster],
        run: logs_and_exec_tell_what_happens_inside,
    },
    Test {
        name: "pods::a_pod_outlives_its_nodes_kubelet_and_runtime",
        needs: &[Need::Nodes],
        run: a_pod_outlives_its_nodes_kubelet_and_runtime,
    },
];

const PORT: u16 = 8080;
/// Stays until it is told to end.
const WAIT: &[&str] = &[
    "/bin/sh",
    "-c",
    "trap 'exit 0' TERM; while :; do sleep 1; done",
];

fn all_nodes_are_ready_and_have_networks_of_their_own() -> Result<()> {
    let nodes = ground()?.kubectl().get(&["nodes"])?;
    let mut networks = BTreeSet::new();
    let mut count = 0;
    for node in items(&nodes) {
        let name = &node["metadata"]["name"];
        let conditions = node["status"]["conditions"].as_array();
        let ready = conditions
            .into_iter()
            .flatten()
            .any(|c| c["type"] == "Ready" && c["status"] == "True");
        ensure!(
            ready,
            "{name} is not Ready: {}",
            node["status"]["conditions"]
        );
        let network = node["spec"]["podCIDR"].as_str();
        let network = network.with_context(|| format!("{name} has no podCIDR"))?;
        ensure!(
            networks.insert(network.to_owned()),
            "{network} belongs to two nodes"
        );
        count += 1;
    }
    ensure!(count >= 2, "the tests need two nodes, and there is {count}");
    Ok(())
}

fn an_imported_image_is_on_every_node() -> Result<()> {
    let ground = ground()?;
    let cluster = ground.own()?;
    let name = "localhost/picomesh-test/imported:1";
    let mut image = Image::new(name);
    image.file("/marker", 0o644, b"from the test")?;
    let listed = || -> Result<Vec<bool>> {
        let nodes = cluster.nodes().iter();
        nodes
            .map(|node| {
                let images = node.run(&["ctr", "--namespace", "k8s.io", "images", "list", "-q"])?;
                Ok(images.lines().any(|line| line == name))
            })
            .collect()
    };
    ensure!(listed()? == [false, false], "it was there before");
    cluster.import(&image)?;
    ensure!(listed()? == [true, true], "it is not on every node");
    Ok(())
}

fn the_agents_image_starts_on_every_node() -> Result<()> {
    let ground = ground()?;
    let cluster = ground.own()?;
    cluster.import_archive(&ground::image()?)?;
    let space = ground.namespace("agent-image")?;
    for node in cluster.nodes() {
        let pod = format!("version-{}", node.name());
        let command = ["picomesh-agent", "--version"];
        space.pod(&pod, node.name(), image::AGENT, &command)?;
        space.wait_succeeded(&pod)?;
        let version = space.kubectl(&["logs", &pod])?;
        ensure!(version.starts_with("picomesh-agent "), "it says {version}");
    }
    Ok(())
}

fn pods_reach_each_other_by_address_and_by_service() -> Result<()> {
    let ground = ground()?;
    let space = ground.namespace("reach")?;
    let nodes = ground.nodes()?;
    let [one, other] = nodes.get(..2).context("the tests need two nodes")? else {
        unreachable!("a slice of two")
    };
    for (index, node) in [one, other].into_iter().enumerate() {
        nginx(&space, &format!("server{index}"), node)?;
        space.pod(&format!("client{index}"), node, TOOLS, WAIT)?;
        space.service(&format!("server{index}"), &format!("server{index}"), PORT)?;
    }
    space.service("nobody", "nobody", PORT)?;
    for pod in ["server0", "server1", "client0", "client1"] {
        space.wait_ready(pod)?;
    }
    let get = |client: &str, address: &str| {
        let url = url(address, PORT);
        space.exec(client, &["curl", "-sS", "--max-time", "5", &url])
    };
    for client in ["client0", "client1"] {
        let own = space.addresses(client)?;
        for server in ["server0", "server1"] {
            for (address, own) in space.addresses(server)?.iter().zip(&own) {
                // The client's own address arrives: nothing on the way hides it.
                let answer = get(client, address)?;
                ensure!(
                    answer == format!("{server} served {own}\n"),
                    "{client} ({own}) asked {server} at {address} and got {answer:?}"
                );
            }
            for address in space.service_addresses(server)? {
                let what = format!("{client} reaches Service {server} at {address}");
                // kube-proxy takes its time to hear of a new one.
                let answer =
                    wait::for_value(&what, PATIENCE, || slowly(get(client, &address)).map(Some))?;
                ensure!(
                    answer.starts_with(&format!("{server} served ")),
                    "{what}: {answer:?}"
                );
            }
        }
        // The control: a Service is an address only by those behind it.
        for address in space.service_addresses("nobody")? {
            let answer = get(client, &address);
            ensure!(
                answer.is_err(),
                "a Service without pods answered {answer:?}"
            );
        }
    }
    Ok(())
}

fn logs_and_exec_tell_what_happens_inside() -> Result<()> {
    let ground = ground()?;
    let space = ground.namespace("inside")?;
    for (index, node) in ground.nodes()?.iter().enumerate() {
        let pod = format!("talker{index}");
        let script = format!("echo marker-{index}; trap 'exit 0' TERM; while :; do sleep 1; done");
        space.pod(&pod, node, TOOLS, &["/bin/sh", "-c", &script])?;
        space.wait_ready(&pod)?;
        ensure!(space.kubectl(&["logs", &pod])? == format!("marker-{index}\n"));
        ensure!(space.exec(&pod, &["hostname"])?.trim() == pod);
        let failed = space.exec(&pod, &["/bin/sh", "-c", "exit 3"]);
        let why = failed.err().context("a failure inside went unnoticed")?;
        ensure!(format!("{why:#}").contains("exit code 3"), "{why:#}");
    }
    Ok(())
}

fn a_pod_outlives_its_nodes_kubelet_and_runtime() -> Result<()> {
    let ground = ground()?;
    let node = ground.own()?.nodes().last().context("no node")?;
    let space = ground.namespace("outlives")?;
    space.pod("before", node.name(), TOOLS, WAIT)?;
    space.wait_ready("before")?;
    let started = |pod: &str| -> Result<String> {
        Ok(space.get(&["pod", pod])?["status"]["containerStatuses"][0]["containerID"].to_string())
    };
    let container = started("before")?;
    node.kubelet().kill();
    node.containerd().kill();
    // The control: nothing new starts while they are away.
    space.pod("after", node.name(), TOOLS, WAIT)?;
    let early = wait::until(
        "a pod starts without a kubelet",
        Duration::from_secs(5),
        || {
            space
                .get(&["pod", "after"])
                .is_ok_and(|pod| pod["status"]["phase"] == "Running")
        },
    );
    ensure!(early.is_err(), "a pod started on a node without a kubelet");
    node.restart()?;
    space.wait_ready("after")?;
    space.wait_ready("before")?;
    ensure!(
        started("before")? == container,
        "the pod's container was started anew"
    );
    ensure!(space.exec("before", &["echo", "alive"])? == "alive\n");
    Ok(())
}

/// Answers with its own name and the client's address.
fn nginx(space: &Namespace, name: &str, node: &str) -> Result<()> {
    let listen_v6 = if fs::exists("/proc/net/if_inet6")? {
        format!("listen [::]:{PORT};")
    } else {
        String::new()
    };
    let config = format!(
        "user root; worker_processes 1; pid /tmp/nginx.pid; error_log stderr; \
         events {{}} http {{ access_log off; server {{ listen {PORT}; {listen_v6} \
         location / {{ default_type text/plain; \
         return 200 \"{name} served $remote_addr\\n\"; }} }} }}"
    );
    let script = format!(
        "cat > /tmp/nginx.conf <<'END'\n{config}\nEND\n\
         exec nginx -e stderr -c /tmp/nginx.conf -g 'daemon off;'"
    );
    space.pod(name, node, TOOLS, &["/bin/sh", "-c", &script])
}

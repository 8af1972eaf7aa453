//! The mesh as users install it, seen from outside: by kubectl, by what travels on the wire between
//! the nodes, and by what the agents say about it.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use picomesh_tests::{cluster::TOOLS, wait};

use crate::{
    ground::{self, Ground, Namespace, Need, PATIENCE, Test, ground, items, slowly},
    install::{Installed, Part, agent_on, diagnosis, log_of, wait_captured, wait_installed},
    requests::{Asked, token_of},
    talk::{MARKER, PORT, identity, label, seen_on_the_wire, served, server},
};

pub(crate) const TESTS: &[Test] = &[Test {
    name: "mesh::a_label_takes_running_pods_into_the_mesh_and_out_of_it",
    needs: &[Need::Nodes, Need::Image],
    run: a_label_takes_running_pods_into_the_mesh_and_out_of_it,
}];

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
    server(&space, "server", far.name())?;
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

/// With the token of `node`'s agent: an account that runs there, which is the control, and one that
/// runs on the other node only.
fn a_stolen_token_speaks_for_its_node_only(
    ground: &Ground,
    space: &Namespace,
    node: &str,
) -> Result<()> {
    let kubectl = ground.kubectl();
    let scratch = tempfile::tempdir()?;
    let thief = token_of(ground, &agent_on(ground, node)?, scratch.path())?;
    let timeout = format!("--timeout={}s", wait::patience(PATIENCE).as_secs());
    for (account, answer) in [("default", "Approved"), ("server", "Denied")] {
        let name = format!("picomesh-test-{account}");
        let asked = Asked {
            names: format!("URI:{}", identity(space, account)),
            ..Asked::default()
        };
        let object = asked.object(&name)?;
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

/// In the access log and in the metrics of both nodes.
fn both_ends_are_named(ground: &Ground, space: &Namespace, near: &str, far: &str) -> Result<()> {
    let (client, server) = (identity(space, "default"), identity(space, "server"));
    // As Linkerd writes them.
    let ids = [("client_id", "default"), ("server_id", "server")].map(|(label, account)| {
        let space = space.name();
        format!("{label}=\"{account}.{space}.serviceaccount.identity.linkerd.cluster.local\"")
    });
    for (node, direction, peer) in [(near, "outbound", "dst"), (far, "inbound", "src")] {
        let log = log_of(ground, node)?;
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
                && ids.iter().all(|id| line.contains(id))
        });
        ensure!(
            opened,
            "{node}: no connection by mTLS was counted with {ids:?}:\n{metrics}"
        );
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

//! Who talks in the scenarios, and what is seen of it on the wire between the nodes.

use std::{fs, net::SocketAddr, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use picomesh_tests::{
    Netns,
    capture::Capture,
    cluster::{Cluster, Node, TOOLS},
    crowd::WORD,
    server::{Habit, Server},
    wait,
};
use serde_json::{Value, json};

use crate::{
    ground::{Ground, Namespace, PATIENCE, image, items, slowly, url},
    install::{Installed, Part, diagnosis, log_of, wait_captured, wait_installed},
};

pub(crate) const PORT: u16 = 8080;
/// In the answer of every nginx, so on the wire if it is plain.
pub(crate) const MARKER: &str = "picomesh-marker-5b1c";
/// A pod that does nothing by itself.
pub(crate) const SLEEP: &[&str] = &["/bin/sleep", "100000"];

/// A container of nginx that names itself to whoever asks, and is asked by the kubelet.
pub(crate) fn nginx() -> Result<Value> {
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
    Ok(json!({
        "name": "main", "image": TOOLS, "imagePullPolicy": "Never",
        "command": ["/bin/sh", "-c", script],
        "readinessProbe": {
            "httpGet": {"path": "/", "port": PORT},
            "periodSeconds": 1, "failureThreshold": 2,
        },
    }))
}

/// A pod of [`nginx`], with a service account of its own name.
pub(crate) fn server(space: &Namespace, name: &str, node: &str) -> Result<()> {
    space.apply(json!({
        "apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name},
    }))?;
    space.apply(json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": {
            "nodeName": node,
            "terminationGracePeriodSeconds": 1,
            "enableServiceLinks": false,
            "serviceAccountName": name,
            "containers": [nginx()?],
        },
    }))
}

pub(crate) fn label(space: &Namespace, value: &str) -> Result<()> {
    let label = format!("picomesh.io/mesh={value}");
    space.kubectl(&["label", "--overwrite", "namespace", space.name(), &label])?;
    Ok(())
}

pub(crate) fn served(space: &Namespace, client: &str, address: &str) -> Result<String> {
    let url = url(address, PORT);
    space.exec(client, &["curl", "-sS", "--max-time", "5", &url])
}

/// Packets between the nodes that could be read, of a few requests of `client0` across.
pub(crate) fn seen_on_the_wire(cluster: &Cluster, space: &Namespace, address: &str) -> Result<u64> {
    let capture = wire(cluster, &[MARKER.as_bytes()])?;
    for _ in 0..3 {
        let answer = served(space, "client0", address)?;
        ensure!(answer.contains(MARKER), "it answered {answer:?}");
    }
    // What is under way still counts.
    Ok(capture.stop()?.found[0])
}

/// Searches everything between the nodes.
pub(crate) fn wire(cluster: &Cluster, markers: &[&[u8]]) -> Result<Capture> {
    let far = cluster.nodes().last().context("no node")?;
    Capture::start(far.netns(), Some("eth0"), markers)
}

pub(crate) fn identity(space: &Namespace, account: &str) -> String {
    format!("spiffe://cluster.local/ns/{}/sa/{account}", space.name())
}

/// Waits until the log of the node's agent has a line with each of these words: connections are
/// told when they have ended, and a moment later.
pub(crate) fn wait_told(ground: &Ground, node: &str, lines: &[Vec<String>]) -> Result<()> {
    wait::for_value(&format!("{node} tells of all"), PATIENCE, || {
        let log = slowly(log_of(ground, node))?;
        let told = |words: &&Vec<String>| {
            log.lines()
                .any(|line| words.iter().all(|word| line.contains(word)))
        };
        let silent = lines.iter().find(|words| !told(words));
        slowly(match silent {
            None => Ok(Some(())),
            Some(words) => Err(anyhow::anyhow!("no line has {words:?}")),
        })
    })
}

/// Waits until `kubectl describe` of the object would show a warning with this word.
pub(crate) fn event_about(space: &Namespace, kind: &str, name: &str, word: &str) -> Result<()> {
    let about = format!("--field-selector=involvedObject.kind={kind},involvedObject.name={name}");
    wait::for_value(&format!("an Event on {kind} {name}"), PATIENCE, || {
        let events = slowly(space.get(&["events", &about]))?;
        let told = items(&events).any(|event| {
            let message = event["message"].as_str().unwrap_or_default();
            event["type"] == "Warning" && message.contains(word)
        });
        slowly(told.then_some(()).with_context(|| events.to_string())).map(Some)
    })
}

/// The two nodes: the near and the far one, which starts without a bpffs.
pub(crate) fn both(cluster: &Cluster) -> Result<[&Node; 2]> {
    match cluster.nodes() {
        [near, far] => Ok([near, far]),
        other => bail!("two nodes are expected, and there are {}", other.len()),
    }
}

/// A pod on each node, with an echo server in it.
fn inhabit(
    cluster: &Cluster,
    space: &Namespace,
) -> Result<([Server; 2], [Netns; 2], [SocketAddr; 2])> {
    let [near, far] = both(cluster)?;
    space.pod("near", near.name(), TOOLS, SLEEP)?;
    space.pod("far", far.name(), TOOLS, SLEEP)?;
    for pod in ["near", "far"] {
        space.wait_ready(pod)?;
    }
    let pods = [space.netns(cluster, "near")?, space.netns(cluster, "far")?];
    let at = [space.at("near", PORT)?, space.at("far", PORT)?];
    let echo = |pod: &Netns| Server::start(pod, PORT, Habit::Echo);
    Ok(([echo(&pods[0])?, echo(&pods[1])?], pods, at))
}

/// The mesh installed and a meshed pod on each node, with an echo server in it.
pub(crate) struct Scene {
    // In the order in which they are to be ended.
    _echoes: [Server; 2],
    installed: Option<Installed>,
    pub(crate) space: Namespace,
    /// On the near and on the far node.
    pub(crate) pods: [Netns; 2],
    pub(crate) at: [SocketAddr; 2],
}

impl Scene {
    /// The pods are `near` and `far`, and older than the mesh.
    pub(crate) fn new(ground: &Ground, name: &str) -> Result<Self> {
        Self::with(ground, name, Part::All)
    }

    pub(crate) fn with(ground: &Ground, name: &str, part: Part) -> Result<Self> {
        let mut scene = Self::without_mesh(ground, name)?;
        scene.install(ground, part)?;
        label(&scene.space, "enabled")?;
        wait_captured(ground, 2).with_context(|| diagnosis(ground))?;
        Ok(scene)
    }

    pub(crate) fn without_mesh(ground: &Ground, name: &str) -> Result<Self> {
        let cluster = ground.own()?;
        cluster.import_archive(&image()?)?;
        let space = ground.namespace(name)?;
        let (echoes, pods, at) = inhabit(cluster, &space)?;
        Ok(Self {
            _echoes: echoes,
            installed: None,
            space,
            pods,
            at,
        })
    }

    /// The namespace is removed, and made again with pods of the same names. Where `labelled`, they
    /// are born in the mesh.
    pub(crate) fn make_again(&mut self, ground: &Ground, labelled: bool) -> Result<()> {
        self.space.make_again()?;
        if labelled {
            label(&self.space, "enabled")?;
        }
        (self._echoes, self.pods, self.at) = inhabit(ground.own()?, &self.space)?;
        Ok(())
    }

    pub(crate) fn install(&mut self, ground: &Ground, part: Part) -> Result<()> {
        self.installed = Some(Installed::new(ground.kubectl(), part)?);
        wait_installed(ground).with_context(|| diagnosis(ground))
    }

    /// What [`Installed::remove`] does.
    pub(crate) fn remove(&mut self) -> Result<()> {
        self.installed.take().context("it is not there")?.remove()
    }

    /// One connection across the nodes, in each direction.
    pub(crate) fn speak(&self) -> Result<()> {
        for (from, to) in [(0, 1), (1, 0)] {
            let to = self.at[to];
            self.pods[from]
                .run(|| picomesh_tests::client::exchange(to, WORD, Duration::from_secs(5)))
                .with_context(|| format!("{from} to {to}"))
                .and_then(|answer| {
                    ensure!(answer == WORD, "the echo is {answer:?}");
                    Ok(())
                })?;
        }
        Ok(())
    }

    /// Waits until [`Scene::speak`] succeeds.
    pub(crate) fn wait_speaks(&self) -> Result<()> {
        wait::for_value("pods reach each other", PATIENCE, || self.speak().map(Some))
    }

    /// The control of every capture of [`WORD`]: out of the mesh it is found.
    pub(crate) fn is_read_outside_of_the_mesh(&self, ground: &Ground) -> Result<()> {
        label(&self.space, "disabled")?;
        wait_captured(ground, 0).with_context(|| diagnosis(ground))?;
        self.is_read(ground)
    }

    pub(crate) fn is_carried(&self, ground: &Ground) -> Result<()> {
        let capture = wire(ground.own()?, &[WORD])?;
        self.speak()?;
        let seen = capture.stop()?.found[0];
        ensure!(seen == 0, "{seen} packets between the nodes can be read");
        Ok(())
    }

    pub(crate) fn is_read(&self, ground: &Ground) -> Result<()> {
        let capture = wire(ground.own()?, &[WORD])?;
        self.speak()?;
        capture.wait_found(0, Duration::from_secs(5)).map(drop)
    }
}

//! The mesh on the cluster: by the manifests that users apply, what it says of itself, and taken off
//! again.

use std::{fs, path::Path};

use anyhow::{Context, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use picomesh_tests::{
    cluster::{Cluster, Kubectl},
    wait,
};

use crate::ground::{Ground, PATIENCE, items, slowly};

/// The two that give certificates: the one that decides, and the one that signs.
pub(crate) const AUTHORITIES: [&str; 2] = ["picomesh-controller", "picomesh-signer"];

/// Where everything of it lives.
pub(crate) const NAMESPACE: &str = "picomesh-system";

/// What of it a test wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// Accounts, rights and definitions; nothing that runs.
    Rights,
    All,
    /// All of it, as for nodes that have no room for two agents.
    AllOneByOne,
}

/// Removed when dropped.
pub(crate) struct Installed {
    kubectl: Kubectl,
    sources: Vec<String>,
}

impl Installed {
    pub(crate) fn new(kubectl: &Kubectl, part: Part) -> Result<Self> {
        let there = kubectl.text(&[
            "get",
            "namespace",
            NAMESPACE,
            "--ignore-not-found",
            "-o=name",
        ]);
        ensure!(
            there?.is_empty(),
            "the cluster has a namespace {NAMESPACE}: a test installs the mesh itself, and takes it \
             off again; it must not be yours"
        );
        let deploy = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy");
        let at = |file: &str| deploy.join(file).to_string_lossy().into_owned();
        let sources = match part {
            Part::All => vec![format!("-k={}", at("kustomize/base"))],
            Part::AllOneByOne => vec![format!("-k={}", at("kustomize/max-unavailable"))],
            Part::Rights => {
                let files = [
                    "namespace",
                    "accounts",
                    "admission",
                    "rbac-agent",
                    "rbac-controller",
                    "rbac-signer",
                ];
                let files = files
                    .iter()
                    .map(|file| format!("-f={}", at(&format!("kustomize/base/{file}.yaml"))));
                files.chain([format!("-k={}", at("crds"))]).collect()
            }
        };
        let installed = Self {
            kubectl: kubectl.clone(),
            sources,
        };
        for source in &installed.sources {
            kubectl.run(&["apply", source])?;
        }
        let definition = "customresourcedefinition/meshnodes.picomesh.io";
        kubectl.run(&["wait", "--for=condition=Established", definition])?;
        Ok(installed)
    }

    /// Takes it off, as users do. Returns when everything is gone.
    pub(crate) fn remove(mut self) -> Result<()> {
        self.delete()
    }

    fn delete(&mut self) -> Result<()> {
        let mut first = Ok(());
        // The namespace last: it takes its time, and what comes after must find none.
        for source in std::mem::take(&mut self.sources).iter().rev() {
            let gone = self
                .kubectl
                .run(&["delete", source, "--ignore-not-found", "--timeout=90s"]);
            if let Err(e) = gone
                && first.is_ok()
            {
                first = Err(e);
            }
        }
        first
    }
}

impl Drop for Installed {
    fn drop(&mut self) {
        if let Err(e) = self.delete() {
            eprintln!("{e:#}");
        }
    }
}

/// One of deploy/kustomize. Removed when dropped.
pub(crate) struct Kustomization {
    kubectl: Kubectl,
    source: String,
}

impl Kustomization {
    /// `verb`: how kubectl takes it up.
    pub(crate) fn new(kubectl: &Kubectl, verb: &str, name: &str) -> Result<Self> {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/kustomize");
        let made = Self {
            kubectl: kubectl.clone(),
            source: format!("-k={}", dir.join(name).display()),
        };
        made.kubectl.run(&[verb, &made.source])?;
        Ok(made)
    }

    pub(crate) fn delete(&self) -> Result<()> {
        let patience = ["--ignore-not-found", "--timeout=60s"];
        let args = [&["delete", &self.source][..], &patience].concat();
        self.kubectl.run(&args).map(drop)
    }
}

impl Drop for Kustomization {
    fn drop(&mut self) {
        if let Err(e) = self.delete() {
            eprintln!("{e:#}");
        }
    }
}

/// A label of nodes that the tests have to themselves.
const PLACE: &str = "picomesh-test-agent";

/// Which nodes have an agent: all at first. To be made before the mesh is installed and so dropped
/// after it is taken off: who has no agent then keeps what its agent left.
pub(crate) struct Placement<'a> {
    ground: &'a Ground,
    nodes: Vec<String>,
}

impl<'a> Placement<'a> {
    pub(crate) fn new(ground: &'a Ground) -> Result<Self> {
        let placement = Self {
            ground,
            nodes: ground.nodes()?,
        };
        let mut nodes = placement.nodes.iter();
        nodes.try_for_each(|node| placement.label(node))?;
        Ok(placement)
    }

    /// Lets the DaemonSet go by it. Agents that run are succeeded for that.
    pub(crate) fn rules(&self) -> Result<()> {
        let patch = format!(
            r#"{{"spec":{{"template":{{"spec":{{"nodeSelector":{{"{PLACE}":"here"}}}}}}}}}}"#
        );
        let what = ["patch", "daemonset", "picomesh-agent", "-n", NAMESPACE];
        let patch = ["-p", &patch];
        self.ground
            .kubectl()
            .run(&[&what[..], &patch].concat())
            .map(drop)
    }

    /// Ends the node's agent, and lets it have none. Returns when it is gone.
    pub(crate) fn take(&self, node: &str) -> Result<Withdrawn<'_>> {
        let agent = agent_on(self.ground, node)?;
        let withdrawn = Withdrawn {
            placement: self,
            node: Some(node.to_owned()),
            agent,
        };
        self.unlabel(node)?;
        let kubectl = self.ground.kubectl();
        withdrawn.agent.wait_gone(kubectl)?;
        Ok(withdrawn)
    }

    fn label(&self, node: &str) -> Result<()> {
        let label = format!("{PLACE}=here");
        let kubectl = self.ground.kubectl();
        kubectl
            .run(&["label", "--overwrite", "node", node, &label])
            .map(drop)
    }

    fn unlabel(&self, node: &str) -> Result<()> {
        let label = format!("{PLACE}-");
        let kubectl = self.ground.kubectl();
        kubectl.run(&["label", "node", node, &label]).map(drop)
    }
}

impl Drop for Placement<'_> {
    fn drop(&mut self) {
        for node in &self.nodes {
            if let Err(e) = self.unlabel(node) {
                eprintln!("{e:#}");
            }
        }
    }
}

/// A node without its agent. Dropped, it gets one.
pub(crate) struct Withdrawn<'a> {
    placement: &'a Placement<'a>,
    node: Option<String>,
    agent: OwnPod,
}

impl Withdrawn<'_> {
    /// Returns when an agent is ready there.
    pub(crate) fn give_back(mut self) -> Result<()> {
        self.give()
    }

    /// It stays without.
    pub(crate) fn for_good(mut self) {
        self.node = None;
    }

    fn give(&mut self) -> Result<()> {
        let Some(node) = self.node.take() else {
            return Ok(());
        };
        self.placement.label(&node)?;
        wait_another(self.placement.ground, &node, &self.agent).map(drop)
    }
}

impl Drop for Withdrawn<'_> {
    fn drop(&mut self) {
        if let Err(e) = self.give() {
            eprintln!("{e:#}");
        }
    }
}

pub(crate) fn wait_installed(ground: &Ground) -> Result<()> {
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
pub(crate) fn wait_captured(ground: &Ground, wanted: u64) -> Result<()> {
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

/// A pod of the mesh's own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct OwnPod {
    pub(crate) name: String,
    pub(crate) uid: String,
}

impl OwnPod {
    fn wait_gone(&self, kubectl: &Kubectl) -> Result<()> {
        let pod = format!("pod/{}", self.name);
        let timeout = format!("--timeout={}s", wait::patience(PATIENCE).as_secs());
        kubectl
            .run(&["wait", "-n", NAMESPACE, "--for=delete", &pod, &timeout])
            .map(drop)
    }
}

/// The node's agent: of two that change places the one that stays.
pub(crate) fn agent_on(ground: &Ground, node: &str) -> Result<OwnPod> {
    let on = format!("--field-selector=spec.nodeName={node}");
    let label = "-l=app.kubernetes.io/name=picomesh-agent";
    let pods = ground
        .kubectl()
        .get(&["pods", "-n", NAMESPACE, &on, label])?;
    let staying = items(&pods).filter(|pod| pod["metadata"]["deletionTimestamp"].is_null());
    let newest = staying.max_by_key(|pod| pod["metadata"]["creationTimestamp"].to_string());
    let pod = newest.with_context(|| format!("no agent on {node}"))?;
    let word = |key: &str| pod["metadata"][key].as_str().unwrap_or_default().to_owned();
    Ok(OwnPod {
        name: word("name"),
        uid: word("uid"),
    })
}

/// The agent itself, of its pod's processes.
pub(crate) fn agent_process(cluster: &Cluster, uid: &str) -> Result<i32> {
    let is_agent = |pid: &i32| {
        let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let mut words = command.split(|byte| *byte == 0);
        // Probes run the same program.
        words
            .next()
            .is_some_and(|it| it.ends_with(b"picomesh-agent"))
            && words.next() == Some(&b"run"[..])
    };
    let mut processes = cluster.processes_of(uid).into_iter().filter(is_agent);
    processes.next().context("the agent does not run")
}

/// Waits for another agent on the node than `before`, and until that one is ready.
pub(crate) fn wait_another(ground: &Ground, node: &str, before: &OwnPod) -> Result<OwnPod> {
    let what = format!("another agent on {node} than {}", before.name);
    let next = wait::for_value(&what, PATIENCE, || {
        let agent = slowly(agent_on(ground, node))?;
        slowly(ensure_another(&agent, before)).map(|()| Some(agent))
    })?;
    let pod = format!("pod/{}", next.name);
    let timeout = format!("--timeout={}s", wait::patience(PATIENCE).as_secs());
    let ready = [
        "wait",
        "-n",
        NAMESPACE,
        "--for=condition=Ready",
        &pod,
        &timeout,
    ];
    ground.kubectl().run(&ready)?;
    Ok(next)
}

fn ensure_another(agent: &OwnPod, before: &OwnPod) -> Result<()> {
    ensure!(agent.uid != before.uid, "it is still {}", agent.name);
    Ok(())
}

/// Returns at once; the API server knows it no more, and its kubelet ends it.
pub(crate) fn remove_by_force(ground: &Ground, pod: &OwnPod) -> Result<()> {
    let how = ["--force", "--grace-period=0", "--wait=false"];
    let args = ["delete", "pod", &pod.name, "-n", NAMESPACE];
    ground.kubectl().run(&[&args[..], &how].concat()).map(drop)
}

/// SIGKILL to all processes of the pod. Returns how many there were.
pub(crate) fn end_processes(ground: &Ground, pod: &OwnPod) -> Result<usize> {
    let processes = ground.own()?.processes_of(&pod.uid);
    for pid in &processes {
        // It may be gone already.
        let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
    }
    Ok(processes.len())
}

/// So many replicas of one of the [`AUTHORITIES`]. Returns when they are gone, if there are to be none.
pub(crate) fn scale(ground: &Ground, deployment: &str, replicas: u32) -> Result<()> {
    let wanted = format!("--replicas={replicas}");
    let kubectl = ground.kubectl();
    let args = ["scale", "deployment", deployment, "-n", NAMESPACE, &wanted];
    kubectl.run(&args)?;
    if replicas == 0 {
        let label = format!("-l=app.kubernetes.io/name={deployment}");
        let timeout = format!("--timeout={}s", wait::patience(PATIENCE).as_secs());
        let gone = "--for=delete";
        kubectl.run(&["wait", "pods", "-n", NAMESPACE, gone, &label, &timeout])?;
    }
    Ok(())
}

/// What the node's agent has said since its container started, the access log with it.
pub(crate) fn log_of(ground: &Ground, node: &str) -> Result<String> {
    let agent = agent_on(ground, node)?;
    ground
        .kubectl()
        .run(&["logs", "-n", NAMESPACE, &agent.name, "--tail=-1"])
}

/// What a person would look at.
pub(crate) fn diagnosis(ground: &Ground) -> String {
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

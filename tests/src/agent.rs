//! The real `picomesh-agent` in a node's namespace, used as a user uses it: by its command line,
//! its metrics port, its log and its admin socket.

use std::{
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::{
    Netns, Node, Pod, World, client,
    metrics::Metrics,
    process::{self, Output, Process},
    wait,
};

/// Names the agent's binary; else it is looked for beside the running program.
pub const BINARY: &str = "PICOMESH_AGENT";
/// Names the agent that takes rules out on request (feature `testing`).
pub const TESTING_BINARY: &str = "PICOMESH_TESTING_AGENT";
/// Where every agent serves metrics and readiness.
pub const ADMIN_PORT: u16 = 4191;
/// Where agents listen for each other's tunnels.
pub const TUNNEL_PORT: u16 = 15008;

/// What a test wants otherwise.
#[derive(Clone, Debug, Default)]
pub struct AgentOptions {
    /// More flags for `run`.
    pub args: Vec<String>,
    pub env: Vec<(String, String)>,
    /// Another CA directory than the world's.
    pub ca_dir: Option<PathBuf>,
    /// Another binary than [`binary`] finds.
    pub binary: Option<PathBuf>,
}

/// A started agent. Dropping it kills it; what it pinned goes with the world.
#[derive(Debug)]
pub struct Agent {
    node: Node,
    process: Process,
    binary: PathBuf,
    run_dir: PathBuf,
    logs: PathBuf,
}

impl AgentOptions {
    pub fn arg(mut self, flag: &str, value: &str) -> Self {
        self.args.push(flag.into());
        self.args.push(value.into());
        self
    }

    pub fn flag(mut self, flag: &str) -> Self {
        self.args.push(flag.into());
        self
    }

    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.into(), value.into()));
        self
    }
}

impl Agent {
    pub(crate) fn start(world: &World, node: &Node, options: &AgentOptions) -> Result<Self> {
        let binary = match &options.binary {
            Some(binary) => binary.clone(),
            None => binary()?,
        };
        let run_dir = world.run_dir(node);
        let bpf_dir = world.bpf_dir(node);
        // Only the agent's own directory is its to make; those above must be there.
        for dir in [&run_dir, &bpf_dir] {
            let above = dir.parent().unwrap_or(dir);
            fs::create_dir_all(above).with_context(|| format!("create {}", above.display()))?;
        }
        let mut command = Command::new(&binary);
        command
            .arg("run")
            .args(["--node", node.name()])
            .arg("--manifests")
            .arg(world.manifests().dir())
            .arg("--ca-dir")
            .arg(options.ca_dir.clone().unwrap_or_else(|| world.ca_dir()))
            .arg("--run-dir")
            .arg(&run_dir)
            .arg("--bpf-dir")
            .arg(&bpf_dir)
            .args(&options.args)
            .envs(options.env.iter().cloned())
            .current_dir("/");
        let name = format!("agent-{}", node.name());
        let process = Process::spawn(command, node.netns(), &world.logs(), &name, world.is_kept())?;
        Ok(Self {
            node: node.clone(),
            process,
            binary,
            run_dir,
            logs: world.logs(),
        })
    }

    pub fn node(&self) -> &Node {
        &self.node
    }

    pub fn process(&self) -> &Process {
        &self.process
    }

    pub fn run_dir(&self) -> &Path {
        &self.run_dir
    }

    /// Waits for `200` from `/ready`; an agent that ends meanwhile is an error with its last words.
    pub fn wait_ready(&self, deadline: Duration) -> Result<()> {
        wait::for_value(
            &format!("the agent of {} is ready", self.node.name()),
            deadline,
            || {
                if let Err(ended) = self.still_runs() {
                    return Ok(Some(Err(ended)));
                }
                match self.get("/ready") {
                    Ok((200, _)) => Ok(Some(Ok(()))),
                    Ok((status, body)) => Err(anyhow!("/ready answers {status}: {}", body.trim())),
                    Err(e) => Err(e),
                }
            },
        )
        .flatten()
        .with_context(|| self.last_words())
    }

    /// Waits until it is this process that answers `debug`: until it has taken over, if there was
    /// an agent before it.
    pub fn wait_serves(&self, deadline: Duration) -> Result<()> {
        let pid = self.process.pid();
        wait::for_value(
            &format!("process {pid} serves {}", self.node.name()),
            deadline,
            || {
                if let Err(ended) = self.still_runs() {
                    return Ok(Some(Err(ended)));
                }
                let answers = self.debug_json(&["state"])?["process"].clone();
                if answers == pid {
                    return Ok(Some(Ok(())));
                }
                bail!("process {answers} answers")
            },
        )
        .flatten()
        .with_context(|| self.last_words())
    }

    /// Waits until `debug pods` says that the kernel has the pod.
    pub fn wait_captured(&self, pod: &Pod, deadline: Duration) -> Result<()> {
        self.wait_pod_state(pod, &["captured"], deadline)
    }

    /// Waits until the agent no longer captures the pod.
    pub fn wait_released(&self, pod: &Pod, deadline: Duration) -> Result<()> {
        self.wait_pod_state(pod, &["", "released"], deadline)
    }

    /// Waits until the pod's state is one of `states`; "" stands for a pod that is not listed.
    pub fn wait_pod_state(&self, pod: &Pod, states: &[&str], deadline: Duration) -> Result<()> {
        wait::for_value(
            &format!("the state of {} is {}", pod.name(), states.join(" or ")),
            deadline,
            || {
                if let Err(ended) = self.still_runs() {
                    return Ok(Some(Err(ended)));
                }
                let status = self.pod_status(pod)?;
                let state = status["state"].as_str().unwrap_or_default();
                if states.contains(&state) {
                    Ok(Some(Ok(())))
                } else {
                    bail!("it is {status}")
                }
            },
        )
        .flatten()
        .with_context(|| self.last_words())
    }

    /// What `debug pods` says of one pod: an object with `state`, `reason` …, or null.
    pub fn pod_status(&self, pod: &Pod) -> Result<Value> {
        let pods = self.debug_json(&["pods"])?;
        let list = pods
            .as_array()
            .or_else(|| pods["pods"].as_array())
            .cloned()
            .unwrap_or_default();
        Ok(list
            .into_iter()
            .find(|p| p["uid"] == pod.uid())
            .unwrap_or(Value::Null))
    }

    /// How many pods this agent has captured.
    pub fn captured_pods(&self) -> Result<usize> {
        Ok(self
            .metrics()?
            .sum("picomesh_pods", &[("state", "captured")]) as usize)
    }

    /// SIGKILL: nothing is detached, nothing is said.
    pub fn kill9(&self) {
        self.process.kill();
    }

    /// Asks it to end, and waits.
    pub fn sigterm(&self, deadline: Duration) -> Result<()> {
        self.process.signal(Signal::SIGTERM);
        self.process.wait(deadline)?;
        Ok(())
    }

    pub fn metrics(&self) -> Result<Metrics> {
        match self.get("/metrics")? {
            (200, body) => Ok(Metrics::parse(&body)),
            (status, body) => bail!("/metrics answers {status}: {body}"),
        }
    }

    /// `GET` on the admin port, from inside the node.
    pub fn get(&self, path: &str) -> Result<(u16, String)> {
        self.node.run(|| {
            client::http_get(
                (Ipv4Addr::LOCALHOST, ADMIN_PORT).into(),
                path,
                Duration::from_secs(5),
            )
        })
    }

    /// Waits until a metric satisfies `enough`; returns its value.
    pub fn wait_metric(
        &self,
        name: &str,
        labels: &[(&str, &str)],
        deadline: Duration,
        enough: impl Fn(f64) -> bool,
    ) -> Result<f64> {
        wait::for_value(&format!("metric {name} {labels:?}"), deadline, || {
            let metrics = self.metrics()?;
            let value = metrics.sum(name, labels);
            if enough(value) {
                return Ok(Some(value));
            }
            let all: Vec<String> = metrics.series(name, &[]).map(ToString::to_string).collect();
            bail!("it is {value}; all of it: {}", all.join("; "))
        })
    }

    /// Everything it has said, on both outputs: the access log and the rest.
    pub fn log(&self) -> String {
        format!("{}{}", self.process.stdout(), self.process.stderr())
    }

    /// Waits for a line that contains all of `words`.
    pub fn wait_log(&self, words: &[&str], deadline: Duration) -> Result<String> {
        wait::for_value(&format!("a log line with {words:?}"), deadline, || {
            Ok(self
                .log()
                .lines()
                .rfind(|line| words.iter().all(|word| line.contains(word)))
                .map(str::to_owned))
        })
        .with_context(|| self.last_words())
    }

    /// `picomesh-agent debug WORDS`, as a person calls it.
    pub fn debug(&self, words: &[&str]) -> Result<Output> {
        let mut command = Command::new(&self.binary);
        command
            .arg("debug")
            .arg("--run-dir")
            .arg(&self.run_dir)
            .args(words);
        process::output(
            command,
            self.node.netns(),
            &self.logs,
            &format!(
                "debug-{}-{:?}",
                self.node.name(),
                std::thread::current().id()
            ),
            Duration::from_secs(10),
        )
    }

    pub fn debug_json(&self, words: &[&str]) -> Result<Value> {
        let output = self.debug(&[&["-o", "json"], words].concat())?.ok()?;
        serde_json::from_str(&output.stdout)
            .with_context(|| format!("debug {}: {}", words.join(" "), output.stdout))
    }

    fn last_words(&self) -> String {
        format!("the agent's last words:\n{}\n", self.process.last_words(30))
    }

    fn still_runs(&self) -> Result<()> {
        match self.process.exited() {
            None => Ok(()),
            Some(status) => bail!("the agent of {} ended: {status}", self.node.name()),
        }
    }
}

/// The agent's binary: what [`BINARY`] names, else `picomesh-agent` in the directory of the
/// running program or above it (`target/debug/deps/mesh-…` finds `target/debug/picomesh-agent`).
pub fn binary() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os(BINARY) {
        let path = PathBuf::from(path);
        if path.is_file() {
            return Ok(path);
        }
        bail!("{BINARY} is {}: no such file", path.display());
    }
    let running = std::env::current_exe()?;
    running
        .ancestors()
        .skip(1)
        .take(2)
        .map(|dir| dir.join("picomesh-agent"))
        .find(|path| path.is_file())
        .ok_or_else(|| {
            anyhow!(
                "no picomesh-agent beside {}; build it, or name it by {BINARY}",
                running.display()
            )
        })
}

/// The agent built with the feature `testing`, which [`TESTING_BINARY`] names.
pub fn testing_binary() -> Result<PathBuf> {
    match std::env::var_os(TESTING_BINARY).map(PathBuf::from) {
        Some(path) if path.is_file() => Ok(path),
        Some(path) => bail!("{TESTING_BINARY} is {}: no such file", path.display()),
        None => bail!(
            "{TESTING_BINARY} is not set: name an agent built with `--features testing`, \
             as `cargo xtask test --tier mesh` does"
        ),
    }
}

/// Runs `picomesh-agent cleanup` for a node whose agent is gone.
pub fn cleanup(world: &World, node: &Node) -> Result<Output> {
    let netns: &Netns = node.netns();
    let mut command = Command::new(binary()?);
    command
        .arg("cleanup")
        .arg("--run-dir")
        .arg(world.run_dir(node))
        .arg("--bpf-dir")
        .arg(world.bpf_dir(node));
    process::output(
        command,
        netns,
        &world.logs(),
        &format!("cleanup-{}", node.name()),
        Duration::from_secs(30),
    )
}

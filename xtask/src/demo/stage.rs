//! Who is on stage: two nodes, the pods of a small shop, their Services, and the programs in them.

use std::{fs, path::PathBuf, time::Duration};

use anyhow::{Context, Result};
use picomesh_tests::{
    Agent, AgentOptions, Pod, PodSpec, Service, ServiceSpec, World, manifest, process::Process,
    program,
};

/// Port of the shop's web server, which the policy scene closes.
pub(crate) const WEB: u16 = 80;
pub(crate) const IPERF: u16 = 5201;
pub(crate) const REDIS: u16 = 6379;
/// Size of the file that is downloaded while a namespace leaves and joins.
pub(crate) const FILE_BYTES: usize = 48 * 1024 * 1024;

pub(crate) struct Stage {
    // Before the world: programs end first.
    programs: Vec<Process>,
    pub(crate) agents: Vec<Agent>,
    /// Meshed, node 0.
    pub(crate) client: Pod,
    /// Meshed, node 0; the policy scene refuses it.
    pub(crate) stranger: Pod,
    /// Meshed, node 1: nginx, redis, iperf3.
    pub(crate) web: Pod,
    /// Meshed, node 1, takes only clients with an identity.
    pub(crate) strict: Pod,
    /// Meshed, node 1, takes nobody.
    pub(crate) vault: Pod,
    /// Not in the mesh, node 0.
    pub(crate) legacy: Pod,
    /// Node 0 and node 1, in a namespace that opts out and in.
    pub(crate) reader: Pod,
    pub(crate) library: Pod,
    pub(crate) service: Service,
    pub(crate) world: World,
    agent: PathBuf,
}

impl Stage {
    pub(crate) fn new(agent: PathBuf, keep: bool) -> Result<Self> {
        let world = if keep {
            World::kept(2)?
        } else {
            World::new(2)?
        };
        world.namespace("shop", Some("enabled"))?;
        world.namespace("lab", Some("enabled"))?;
        world.namespace("old", None)?;
        let shop = |name: &str, node| PodSpec::new(name).in_namespace("shop").on(node);
        let policy = "config.picomesh.io/default-inbound-policy";
        let client = world.pod(&shop("client", 0))?;
        let stranger = world.pod(&shop("stranger", 0))?;
        let web = world.pod(&shop("web", 1).port("http", WEB))?;
        let strict = world.pod(&shop("strict", 1).annotation(policy, "all-authenticated"))?;
        let vault = world.pod(&shop("vault", 1).annotation(policy, "deny"))?;
        let legacy = world.pod(&PodSpec::new("legacy").in_namespace("old"))?;
        let lab = |name: &str, node| PodSpec::new(name).in_namespace("lab").on(node);
        let reader = world.pod(&lab("reader", 0))?;
        let library = world.pod(&lab("library", 1))?;
        let mut spec = ServiceSpec::new("web", WEB, WEB).in_namespace("shop");
        spec.ports.push((IPERF, IPERF));
        spec.ports.push((REDIS, REDIS));
        let service = world.service(&spec)?;

        let mut programs = Vec::new();
        for pod in [&web, &strict, &vault, &library] {
            programs.push(program::nginx(&world, pod, WEB)?);
        }
        programs.push(program::redis(&web, REDIS)?);
        programs.push(program::iperf3_server(&web, IPERF)?);
        // Not all zeros: a lost or doubled piece must change the sum.
        let bytes: Vec<u8> = (0..FILE_BYTES / 8)
            .flat_map(|i| (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes())
            .collect();
        fs::write(program::files(&world, &library).join("book"), bytes)
            .context("write the file to download")?;
        Ok(Self {
            programs,
            agents: Vec::new(),
            client,
            stranger,
            web,
            strict,
            vault,
            legacy,
            reader,
            library,
            service,
            world,
            agent,
        })
    }

    /// Starts an agent per node and waits until every meshed pod is captured.
    pub(crate) fn start_mesh(&mut self) -> Result<()> {
        for node in self.world.nodes() {
            let options = AgentOptions {
                binary: Some(self.agent.clone()),
                ..AgentOptions::default()
            };
            self.agents
                .push(self.world.start_agent_with(&node, &options)?);
        }
        for agent in &self.agents {
            agent.wait_ready(Duration::from_secs(20))?;
        }
        for pod in self.meshed() {
            self.agent_of(pod)?
                .wait_captured(pod, Duration::from_secs(20))?;
        }
        Ok(())
    }

    pub(crate) fn meshed(&self) -> [&Pod; 7] {
        [
            &self.client,
            &self.stranger,
            &self.web,
            &self.strict,
            &self.vault,
            &self.reader,
            &self.library,
        ]
    }

    pub(crate) fn agent_of(&self, pod: &Pod) -> Result<&Agent> {
        let node = pod.node().context("an outsider has no agent")?;
        self.agents
            .get(node.index())
            .with_context(|| format!("no agent was started on {}", node.name()))
    }

    /// Closes the web server's port to all but the identities named.
    pub(crate) fn admit(&self, pods: &[&Pod]) -> Result<()> {
        let identities: Vec<String> = pods.iter().map(|p| p.spiffe_id()).collect();
        let identities: Vec<&str> = identities.iter().map(String::as_str).collect();
        let manifests = self.world.manifests();
        manifests.apply(&manifest::mesh_tls_authentication(
            "shop",
            "web-clients",
            &identities,
        ))
    }

    pub(crate) fn close_web(&self) -> Result<()> {
        let manifests = self.world.manifests();
        self.admit(&[&self.client])?;
        manifests.apply(&manifest::authorization_policy(
            "shop",
            "web-clients",
            "web",
            &[("MeshTLSAuthentication", "web-clients")],
        ))?;
        manifests.apply(&manifest::server(
            "shop",
            "web",
            &[("app", "web")],
            WEB,
            None,
        ))
    }

    /// The last words of the agents and the programs.
    pub(crate) fn evidence(&self) -> String {
        let mut text = String::new();
        for process in self.agents.iter().map(Agent::process).chain(&self.programs) {
            let words = process.last_words(15);
            if !words.is_empty() {
                text.push_str(&format!("--- {} ---\n{words}\n", process.name()));
            }
        }
        text
    }

    pub(crate) fn what_to_try(&self) -> String {
        let agent = &self.agent;
        let run_dir = self
            .agents
            .first()
            .map(|a| a.run_dir().display().to_string())
            .unwrap_or_default();
        format!(
            "Everything is still running. Try:\n\
             \x20 nsenter --net={client} curl http://{service}/\n\
             \x20 {agent} debug --run-dir {run_dir} pods\n\
             \x20 {agent} debug --run-dir {run_dir} tunnels\n\
             \x20 nsenter --net={node} curl -s http://127.0.0.1:4191/metrics\n\
             \x20 edit the manifests in {manifests}\n\
             \x20 tail -f {logs}/agent-node*.out\n\
             \x20 cargo xtask demo --clean",
            client = self.client.netns().path().display(),
            service = self.service.at(),
            agent = agent.display(),
            node = self
                .world
                .node(0)
                .map(|n| n.netns().path().display().to_string())
                .unwrap_or_default(),
            manifests = self.world.manifests().dir().display(),
            logs = self.world.logs().display(),
        )
    }
}

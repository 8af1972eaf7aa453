//! Who takes part: two nodes, their agents, the pods that talk, and what the policies say.
//!
//! ```text
//!   node 0: alpha, legacy (outside the mesh)      node 1: beta, gate, vault, drifter
//!   behind the Service `churn`: pods that come and go on both
//! ```

use std::{
    collections::BTreeSet,
    fs,
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use picomesh_tests::{
    Agent, AgentOptions, Pod, PodSpec, Service, ServiceSpec, World, manifest, netns,
};

use super::{
    ledger::{Affects, Ledger},
    server::Server,
};

pub(crate) const PORT: u16 = 7000;
/// How long a change may take to hold everywhere.
pub(crate) const SPREADS: Duration = Duration::from_secs(2);
const START: Duration = Duration::from_secs(30);
/// The agents' drain deadline, and time to say so.
const DRAINED: Duration = Duration::from_secs(95);
const NAMESPACE: &str = "mesh";

/// What all threads share.
#[derive(Default)]
pub(crate) struct Shared {
    pub(crate) ledger: Ledger,
    /// Workers open nothing new, and end what can be ended.
    pub(crate) calm: AtomicBool,
    /// Conversations under way, of clients and of servers.
    pub(crate) talking: AtomicUsize,
    /// The pods behind the Service `churn`, and their nodes.
    pub(crate) churn: Mutex<Vec<(String, usize)>>,
    /// Since when the gate is closed; `None` while it is open.
    pub(crate) closed: Mutex<Option<Instant>>,
    /// Attempts of one who may never enter.
    pub(crate) intrusions: AtomicU64,
}

/// A pod with a server in it. The server ends first.
pub(crate) struct Inhabited {
    pub(crate) server: Server,
    pub(crate) pod: Pod,
    pub(crate) spec: PodSpec,
}

pub(crate) struct Stage {
    pub(crate) agents: Vec<Agent>,
    /// Agents that were succeeded, since when, and have connections left.
    retired: Vec<(Instant, Agent)>,
    pub(crate) alpha: Inhabited,
    pub(crate) beta: Inhabited,
    /// Leaves the mesh and joins it.
    pub(crate) drifter: Inhabited,
    /// Lets alpha in, or nobody.
    pub(crate) gate: Inhabited,
    /// Takes only clients with an identity.
    pub(crate) vault: Inhabited,
    /// Outside the mesh.
    pub(crate) legacy: Pod,
    churning: Vec<Inhabited>,
    pub(crate) service: Service,
    pub(crate) churn: Service,
    pub(crate) shared: Arc<Shared>,
    born: usize,
    options: AgentOptions,
    pub(crate) world: World,
}

/// What an agent costs at a moment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Size {
    pub(crate) resident_kib: u64,
    pub(crate) descriptors: usize,
}

impl Stage {
    pub(crate) fn new(agent: PathBuf) -> Result<Self> {
        let world = World::new(2)?;
        let shared = Arc::<Shared>::default();
        world.namespace(NAMESPACE, Some("enabled"))?;
        let policy = "config.picomesh.io/default-inbound-policy";
        let inhabit = |spec: PodSpec| inhabit(&world, &shared, spec);
        let alpha = inhabit(PodSpec::new("alpha").label("tier", "steady"))?;
        let beta = inhabit(PodSpec::new("beta").label("tier", "steady").on(1))?;
        let drifter = inhabit(PodSpec::new("drifter").on(1))?;
        let gate = inhabit(PodSpec::new("gate").on(1))?;
        let vault = inhabit(
            PodSpec::new("vault")
                .on(1)
                .annotation(policy, "all-authenticated"),
        )?;
        let legacy = world.pod(&PodSpec::new("legacy").unmeshed())?;
        let service = |name: &str, key: &str, value: &str| {
            let mut spec = ServiceSpec::new(name, PORT, PORT);
            spec.selector = vec![(key.into(), value.into())];
            world.service(&spec)
        };
        let steady = service("steady", "tier", "steady")?;
        let churn = service("churn", "tier", "churn")?;
        let options = AgentOptions {
            binary: Some(agent),
            ..AgentOptions::default()
        }
        .arg("--certificate-life", "2m")
        // Longer than any connection lasts: a hand-over may cost none.
        .arg("--drain-deadline", "90s");
        let mut stage = Self {
            agents: Vec::new(),
            retired: Vec::new(),
            alpha,
            beta,
            drifter,
            gate,
            vault,
            legacy,
            churning: Vec::new(),
            service: steady,
            churn,
            shared,
            born: 0,
            options,
            world,
        };
        stage.write_gate(true)?;
        stage.guard_gate()?;
        for node in stage.world.nodes() {
            let agent = stage.world.start_agent_with(&node, &stage.options)?;
            stage.agents.push(agent);
        }
        for node in 0..stage.agents.len() {
            stage.wait_captured(node)?;
        }
        for _ in 0..2 {
            stage.bear()?;
        }
        Ok(stage)
    }

    /// The agent of a node, after another one.
    pub(crate) fn start_agent(&mut self, node: usize) -> Result<()> {
        let place = self.world.node(node)?;
        let agent = self.world.start_agent_with(&place, &self.options)?;
        *self.agents.get_mut(node).context("no such agent")? = agent;
        self.wait_captured(node)
    }

    /// A successor takes the agent's place while that one serves.
    pub(crate) fn succeed_agent(&mut self, node: usize) -> Result<()> {
        let place = self.world.node(node)?;
        let next = self.world.start_agent_with(&place, &self.options)?;
        let agent = self.agents.get_mut(node).context("no such agent")?;
        let before = std::mem::replace(agent, next);
        self.retired.push((Instant::now(), before));
        self.wait_captured(node)
    }

    pub(crate) fn agent(&self, node: usize) -> Result<&Agent> {
        self.agents.get(node).context("no such agent")
    }

    fn wait_captured(&self, node: usize) -> Result<()> {
        let agent = self.agent(node)?;
        agent.wait_ready(START)?;
        for pod in self.meshed() {
            if pod.node().is_some_and(|n| n.index() == node) {
                agent.wait_captured(pod, START)?;
            }
        }
        Ok(())
    }

    fn meshed(&self) -> impl Iterator<Item = &Pod> {
        [
            &self.alpha,
            &self.beta,
            &self.drifter,
            &self.gate,
            &self.vault,
        ]
        .into_iter()
        .chain(&self.churning)
        .map(|inhabited| &inhabited.pod)
    }

    /// Another pod behind the Service `churn`.
    pub(crate) fn bear(&mut self) -> Result<String> {
        self.born += 1;
        let name = format!("churn{}", self.born);
        let node = self.born % self.agents.len();
        let spec = PodSpec::new(&name).label("tier", "churn").on(node);
        // Told before it is there: connections to it are connections to one that may be called.
        self.shared.churn().push((name.clone(), node));
        let inhabited = inhabit(&self.world, &self.shared, spec)?;
        self.agent(node)?.wait_captured(&inhabited.pod, START)?;
        self.churning.push(inhabited);
        Ok(name)
    }

    /// The oldest of them goes: first its manifest, then its server, then its namespace.
    pub(crate) fn bury(&mut self) -> Result<()> {
        ensure!(self.churning.len() > 1, "the last one must stay");
        let Inhabited { server, pod, spec } = self.churning.remove(0);
        let ledger = &self.shared.ledger;
        let dying = Affects::Pod(pod.name().to_owned());
        let ongoing = ledger.begins("a pod was deleted", pod.name().to_owned(), dying);
        self.world.manifests().delete(&pod.manifest(&spec))?;
        std::thread::sleep(SPREADS);
        let accepted = server.accepted();
        std::thread::sleep(Duration::from_secs(1));
        if server.accepted() > accepted {
            ledger.violation(format!(
                "{} was called {:.0} s after it was deleted",
                pod.name(),
                SPREADS.as_secs_f64()
            ));
        }
        server.stop();
        netns::delete(pod.netns().name())?;
        self.shared.churn().retain(|(name, _)| name != pod.name());
        ledger.over(ongoing);
        Ok(())
    }

    /// Lets alpha in to the gate, or nobody.
    pub(crate) fn write_gate(&self, open: bool) -> Result<()> {
        let admitted = if open {
            self.alpha.pod.spiffe_id()
        } else {
            "spiffe://cluster.local/ns/mesh/sa/nobody".to_owned()
        };
        self.world
            .manifests()
            .apply(&manifest::mesh_tls_authentication(
                NAMESPACE,
                "gate",
                &[&admitted],
            ))
    }

    fn guard_gate(&self) -> Result<()> {
        let manifests = self.world.manifests();
        manifests.apply(&manifest::authorization_policy(
            NAMESPACE,
            "gate",
            "gate",
            &[("MeshTLSAuthentication", "gate")],
        ))?;
        manifests.apply(&manifest::server(
            NAMESPACE,
            "gate",
            &[("app", "gate")],
            PORT,
            None,
        ))
    }

    pub(crate) fn set_meshed(&self, inhabited: &Inhabited, meshed: bool) -> Result<()> {
        let word = if meshed { "enabled" } else { "disabled" };
        let pod = &inhabited.pod;
        self.world
            .manifests()
            .edit("Pod", pod.namespace(), pod.name(), |object| {
                object["metadata"]["labels"]["picomesh.io/mesh"] = word.into();
            })
    }

    /// Looks for an agent that ended by itself, and for one that was succeeded and does not end.
    pub(crate) fn watch_agents(&mut self) {
        self.retired.retain(|(since, agent)| {
            let ended = agent.process().exited().is_some();
            if !ended && since.elapsed() > DRAINED {
                let name = agent.node().name();
                self.shared.ledger.violation(format!(
                    "an agent of {name} lives on {DRAINED:?} after it was succeeded"
                ));
            }
            !ended && since.elapsed() <= DRAINED
        });
        for agent in &self.agents {
            if let Some(status) = agent.process().exited() {
                self.shared.ledger.violation(format!(
                    "the agent of {} ended by itself: {status}: {}",
                    agent.node().name(),
                    agent.process().last_words(5)
                ));
            }
        }
    }

    /// What each agent costs now.
    pub(crate) fn sizes(&self) -> Result<Vec<Size>> {
        self.agents
            .iter()
            .map(|agent| {
                let process = agent.process();
                Ok(Size {
                    resident_kib: process.resident_kib()?,
                    descriptors: fs::read_dir(format!("/proc/{}/fd", process.pid()))?.count(),
                })
            })
            .collect()
    }
}

impl Shared {
    pub(crate) fn churn(&self) -> MutexGuard<'_, Vec<(String, usize)>> {
        self.churn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn closed(&self) -> MutexGuard<'_, Option<Instant>> {
        self.closed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn is_calm(&self) -> bool {
        self.calm.load(Ordering::Relaxed)
    }

    /// Counts a conversation until the guard is dropped.
    pub(crate) fn talks(self: &Arc<Self>) -> Talking {
        self.talking.fetch_add(1, Ordering::SeqCst);
        Talking(self.clone())
    }
}

pub(crate) struct Talking(Arc<Shared>);

impl Drop for Talking {
    fn drop(&mut self) {
        self.0.talking.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Where a client may go.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    pub(crate) words: String,
    pub(crate) at: Vec<SocketAddr>,
    pub(crate) pods: BTreeSet<String>,
    pub(crate) nodes: BTreeSet<usize>,
}

impl Target {
    pub(crate) fn pod(pod: &Pod) -> Self {
        Self {
            words: pod.name().to_owned(),
            at: vec![pod.at(PORT), pod.at6(PORT)],
            pods: BTreeSet::from([pod.name().to_owned()]),
            nodes: pod.node().map(|node| node.index()).into_iter().collect(),
        }
    }

    pub(crate) fn service(service: &Service, pods: &[(String, usize)]) -> Self {
        Self {
            words: format!("Service {}", service.name),
            at: vec![service.at(), service.at6()],
            pods: pods.iter().map(|(name, _)| name.clone()).collect(),
            nodes: pods.iter().map(|(_, node)| *node).collect(),
        }
    }
}

fn inhabit(world: &World, shared: &Arc<Shared>, spec: PodSpec) -> Result<Inhabited> {
    // The server first: a pod is called as soon as its manifest is there.
    let pod = world.pod_without_manifest(&spec)?;
    let server = Server::start(&pod, PORT, shared)?;
    world.manifests().apply(&manifest::service_account(
        &spec.namespace,
        &spec.service_account,
    ))?;
    world.manifests().apply(&pod.manifest(&spec))?;
    Ok(Inhabited { server, pod, spec })
}

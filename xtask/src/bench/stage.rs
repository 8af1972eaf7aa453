//! What one contender is measured on: a world of its own, a server, and whatever stands between.
//!
//! ```text
//!   client ──── node 0 ──── node 1 ──── server        one node: client ──── node 0 ──── server
//! ```
//!
//! The client's and the server's pod hang on their node's bridge, the nodes on the wire's; all
//! links are veth pairs with the kernel's defaults, and all contenders have the same. Each gets
//! a fresh world in every round: nothing of one (pins in the kernel, sockets in TIME_WAIT, memory
//! grown by an earlier load) is there when the next is measured.

use std::{fs, net::SocketAddr, path::Path, time::Duration};

use anyhow::{Context, Result, ensure};
use picomesh_tests::{
    Agent, AgentOptions, Pod, PodSpec, ServiceSpec, World, process::Process, program, wait,
};

use super::{
    contender::Contender,
    load::{self, Sink},
    peers,
    usage::{Meter, resident_mb},
};

/// Where the servers listen, and the peers' first side for them.
pub(crate) const HTTP: u16 = 8080;
pub(crate) const BULK: u16 = 8081;
/// What a burst asks for.
pub(crate) const LARGE: &str = "/files/large";
const LARGE_BYTES: usize = 256 * 1024;
const START: Duration = Duration::from_secs(20);

/// Dropping it ends the programs and removes the world, in this order.
pub(crate) struct Stage {
    pub(crate) sink: Sink,
    agents: Vec<Agent>,
    peers: Vec<Process>,
    _server: Process,
    pub(crate) client: Pod,
    /// What the client dials for HTTP and for bulk.
    pub(crate) http: SocketAddr,
    pub(crate) bulk: SocketAddr,
    _world: World,
}

impl Stage {
    /// Sets the contender up and waits until a request through it is answered. `agent` is the
    /// binary, for those that need it.
    pub(crate) fn set(contender: Contender, agent: Option<&Path>) -> Result<Self> {
        let world = World::new(contender.nodes())?;
        world.namespace("mesh", Some("enabled"))?;
        let client = world.pod(&PodSpec::new("client"))?;
        let server = world.pod(
            &PodSpec::new("server")
                .on(contender.nodes() - 1)
                .port("http", HTTP)
                .port("bulk", BULK),
        )?;
        let mut service = ServiceSpec::new("server", HTTP, HTTP);
        service.ports.push((BULK, BULK));
        let service = world.service(&service)?;

        let files = program::files(&world, &server);
        fs::create_dir_all(&files)?;
        fs::write(files.join("large"), vec![b'p'; LARGE_BYTES])?;
        let nginx = program::nginx(&world, &server, HTTP)?;
        let sink = Sink::start(server.netns(), server.at(BULK))?;

        let servers = [server.at(HTTP), server.at(BULK)];
        let (mut agents, mut proxies) = (Vec::new(), Vec::new());
        let dialled = match contender {
            Contender::None | Contender::NoneOneNode => server.v4(),
            Contender::Haproxy => {
                proxies = peers::haproxy(&world, servers)?;
                world.node(0)?.v4()
            }
            Contender::Nginx => {
                proxies = peers::nginx(&world, servers)?;
                world.node(0)?.v4()
            }
            Contender::Picomesh | Contender::PicomeshOneNode => {
                agents = mesh(&world, agent, &[&client, &server])?;
                service.v4
            }
        };
        let stage = Self {
            sink,
            agents,
            peers: proxies,
            _server: nginx,
            client,
            http: (dialled, HTTP).into(),
            bulk: (dialled, BULK).into(),
            _world: world,
        };
        stage.wait_answer()?;
        Ok(stage)
    }

    /// Meters every proxy there is.
    pub(crate) fn meter(&self) -> Meter {
        Meter::of(&self.proxies())
    }

    /// Resident MB of each side, the client's first.
    pub(crate) fn resident(&self) -> Result<Vec<f64>> {
        self.proxies().into_iter().map(resident_mb).collect()
    }

    fn proxies(&self) -> Vec<i32> {
        let agents = self.agents.iter().map(|agent| agent.process().pid());
        let peers = self.peers.iter().map(Process::pid);
        agents.chain(peers).collect()
    }

    fn wait_answer(&self) -> Result<()> {
        wait::for_value("a request is answered", START, || {
            for process in &self.peers {
                ensure!(process.exited().is_none(), "{} ended", process.name());
            }
            let streams = self.client.run(|| load::open(self.http, 1))?;
            load::once(&streams, "/")?;
            Ok(Some(()))
        })
        .with_context(|| {
            let peers = self.peers.iter().map(|p| p.last_words(10));
            let agents = self.agents.iter().map(|a| a.process().last_words(10));
            peers.chain(agents).collect::<Vec<_>>().join("\n")
        })
    }
}

/// An agent on every node, as a user starts it, once all of `pods` are captured.
fn mesh(world: &World, binary: Option<&Path>, pods: &[&Pod]) -> Result<Vec<Agent>> {
    let options = AgentOptions {
        binary: binary.map(Path::to_owned),
        ..AgentOptions::default()
    }
    // One pod makes all the load here; variables, because older agents know no such flags.
    .env("PICOMESH_POD_CONNECTIONS", "100000")
    .env("PICOMESH_POD_INBOUND_CONNECTIONS", "100000")
    .env("PICOMESH_POD_CONNECTION_RATE", "1000000");
    let agents = world
        .nodes()
        .iter()
        .map(|node| world.start_agent_with(node, &options))
        .collect::<Result<Vec<_>>>()?;
    for agent in &agents {
        agent.wait_ready(START)?;
        for pod in pods {
            if pod.node().is_some_and(|n| n.name() == agent.node().name()) {
                agent.wait_captured(pod, START)?;
            }
        }
    }
    Ok(agents)
}

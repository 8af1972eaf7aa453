//! What most tests stand on: two nodes, a client, and servers near and far.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use picomesh_tests::{
    Agent, AgentOptions, Pod, PodSpec, Service, ServiceSpec, World,
    client::{self, End},
    requirements,
};

/// Long enough for a slow machine, short enough that a hang shows.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);

pub(crate) struct Ground {
    pub(crate) agents: Vec<Agent>,
    /// Meshed, node 0.
    pub(crate) near: Pod,
    /// Meshed, node 0: what `near` reaches without a tunnel.
    pub(crate) beside: Pod,
    /// Meshed, node 1.
    pub(crate) far: Pod,
    /// Not meshed, node 0.
    pub(crate) plain: Pod,
    /// A Service for each, on the same port as the pod.
    services: Vec<(String, Service)>,
    pub(crate) world: World,
}

/// The port that all servers of this tier listen on.
pub(crate) const PORT: u16 = 8080;

impl Ground {
    pub(crate) fn new() -> Result<Self> {
        Self::with(|spec| spec)
    }

    /// A ground whose server pods (`beside`, `far`) are written as `change` says.
    pub(crate) fn with(change: fn(PodSpec) -> PodSpec) -> Result<Self> {
        let world = World::new(2)?;
        world.namespace("mesh", Some("enabled"))?;
        let near = world.pod(&PodSpec::new("near"))?;
        let beside = world.pod(&change(PodSpec::new("beside")))?;
        let far = world.pod(&change(PodSpec::new("far").on(1)))?;
        let plain = world.pod(&PodSpec::new("plain").unmeshed())?;
        let services = ["near", "beside", "far"]
            .into_iter()
            .map(|name| {
                let service = world.service(&ServiceSpec::new(name, PORT, PORT))?;
                Ok((name.to_owned(), service))
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            agents: Vec::new(),
            near,
            beside,
            far,
            plain,
            services,
            world,
        })
    }

    /// Starts the agents and waits for all meshed pods.
    pub(crate) fn mesh(&mut self) -> Result<()> {
        self.mesh_with(&AgentOptions::default())
    }

    /// The same with options of the test's own.
    pub(crate) fn mesh_with(&mut self, options: &AgentOptions) -> Result<()> {
        let pods = [&self.near, &self.beside, &self.far];
        self.agents = self.world.start_mesh_with(&pods, options)?;
        Ok(())
    }

    /// Connections that the agent of `node` counted as opened, of those with `labels`.
    pub(crate) fn opened(&self, node: usize, labels: &[(&str, &str)]) -> Result<f64> {
        Ok(self.agent(node)?.metrics()?.sum("tcp_open_total", labels))
    }

    pub(crate) fn agent(&self, node: usize) -> Result<&Agent> {
        self.agents
            .get(node)
            .with_context(|| format!("no agent runs on node {node}"))
    }

    /// What the agents said last, for a person who looks for the cause of a failure.
    pub(crate) fn logs(&self) -> String {
        self.agents
            .iter()
            .map(|agent| {
                let words = agent.process().last_words(15);
                format!("\n{}:\n{words}", agent.node().name())
            })
            .collect()
    }

    /// The Service of one pod.
    pub(crate) fn service(&self, pod: &str) -> Result<&Service> {
        self.services
            .iter()
            .find_map(|(name, service)| (name == pod).then_some(service))
            .with_context(|| format!("{pod} has no Service"))
    }

    /// All addresses under which a pod is known: its own, and with the mesh its Service's.
    pub(crate) fn addresses(&self, pod: &Pod) -> Vec<IpAddr> {
        let mut addresses: Vec<IpAddr> = vec![pod.v4().into(), pod.v6().into()];

        if !self.agents.is_empty()
            && let Some((_, service)) = self.services.iter().find(|(name, _)| name == pod.name())
        {
            addresses.push(service.v4.into());
            addresses.push(service.v6.into());
        }
        addresses.retain(|ip| ip.is_ipv4() || requirements::ipv6());
        addresses
    }
}

/// Plays a case without the mesh and then with it, towards a pod of the same node and one of the
/// other, under all their addresses. The mesh must have carried the second half.
pub(crate) fn as_without_the_mesh(case: fn(&Ground, &Pod, SocketAddr) -> Result<()>) -> Result<()> {
    let mut ground = Ground::new()?;
    play(&ground, case).context("control, without the mesh")?;
    ground.mesh()?;
    let outbound = [("direction", "outbound")];
    let before = ground.opened(0, &outbound)?;
    play(&ground, case).context("through the mesh")?;
    let after = ground.opened(0, &outbound)?;
    ensure!(
        after > before,
        "tcp_open_total did not move from {before}: the traffic went past the mesh"
    );
    Ok(())
}

fn play(ground: &Ground, case: fn(&Ground, &Pod, SocketAddr) -> Result<()>) -> Result<()> {
    for server in [&ground.far, &ground.beside] {
        for ip in ground.addresses(server) {
            case(ground, server, (ip, PORT).into())
                .with_context(|| format!("{} at {ip}", server.name()))?;
        }
    }
    Ok(())
}

/// Whether a whole request and answer get through.
pub(crate) fn served(from: &Pod, to: SocketAddr) -> bool {
    from.run(|| client::exchange(to, b"are you there?", Duration::from_secs(2)))
        .is_ok_and(|answer| answer == b"are you there?")
}

/// How a connection ends on which nobody says anything. It may be refused, or taken and reset
/// before or after the caller hears that it stands: all of them are a refusal.
pub(crate) fn told(to: SocketAddr) -> Result<End> {
    use std::io::ErrorKind::{ConnectionRefused, ConnectionReset};
    match client::connect(to, PATIENCE) {
        Err(e) if matches!(e.kind(), ConnectionRefused | ConnectionReset) => {
            Ok(End::Reset { read: 0 })
        }
        Err(e) => Err(e).with_context(|| format!("connect to {to}")),
        Ok(mut stream) => Ok(client::read_to_end(&mut stream, PATIENCE)?),
    }
}

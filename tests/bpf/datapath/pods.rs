//! A pod's whole way: in, under attack, over a dead agent, and out; on real programs.

use std::{
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use picomesh::datapath::{Datapath, DatapathSettings};
use picomesh_tests::{requirements, wait::patience};
use serde_json::{Value, json};

use super::{
    Test,
    agent::{Agent, Dirs, desired, until},
    world::{Netns, ensure_same},
};

pub(super) const TESTS: [Test; 11] = [
    ("a_captured_pod_speaks_through_its_listeners", captured),
    ("what_stood_before_enrolment_goes_on", standing),
    (
        "leaving_lets_our_connections_finish_and_removes_every_trace",
        leaving,
    ),
    (
        "what_was_taken_from_a_pod_that_leaves_ends_with_it_also_after_a_restart",
        left_behind,
    ),
    (
        "a_dead_agents_pods_are_silent_until_the_next_adopts_them",
        adopted,
    ),
    ("what_was_undone_in_the_pod_is_mended", mended),
    ("a_netns_of_the_host_or_of_another_pod_is_refused", refused),
    (
        "a_vanished_netns_frees_its_slot_and_a_new_one_is_a_new_pod",
        vanished,
    ),
    ("cleanup_after_a_dead_agent_removes_every_trace", cleaned),
    (
        "a_pod_that_cannot_be_cleaned_keeps_no_other",
        cleaned_but_one,
    ),
    ("a_hundred_pods_are_enrolled_in_seconds", hundred),
];

pub(super) const CLIENT: [&str; 2] = ["10.97.0.2", "fd97::2"];
pub(super) const SERVER: [&str; 2] = ["10.97.0.3", "fd97::3"];

/// Those of the families that this kernel has.
pub(super) fn addresses(both: &'static [&'static str; 2]) -> &'static [&'static str] {
    &both[..1 + usize::from(requirements::ipv6())]
}

/// Two pods on one wire, and the node beside them.
pub(super) struct World {
    pub(super) node: Netns,
    pub(super) client: Netns,
    pub(super) server: Netns,
    // After the namespaces in the order of drops: the last agent's pins go first.
    pub(super) dirs: Dirs,
}

impl World {
    pub(super) fn new(purpose: &str) -> Result<Self> {
        let world = Self {
            node: Netns::new(&format!("{purpose}-node"))?,
            client: Netns::new(&format!("{purpose}-client"))?,
            server: Netns::new(&format!("{purpose}-server"))?,
            dirs: Dirs::new()?,
        };
        world.client.connect_eth0(&world.server, &CLIENT, &SERVER)?;
        Ok(world)
    }

    pub(super) fn pods(&self) -> Vec<picomesh::datapath::DesiredPod> {
        vec![
            desired("client", &self.client, addresses(&CLIENT)),
            desired("server", &self.server, addresses(&SERVER)),
        ]
    }

    pub(super) fn agent(&self) -> Result<Agent> {
        let agent = Agent::start(&self.node, self.dirs.settings(), self.pods())?;
        for pod in ["client", "server"] {
            agent.wait_for(pod, "captured")?;
        }
        Ok(agent)
    }

    pub(super) fn serve(&self, at: &str) -> Result<Server> {
        Server::start(&self.server, at)
    }

    pub(super) fn dial(&self, to: SocketAddr) -> Result<TcpStream> {
        dial(&self.client, to)
    }
}

pub(super) fn dial(from: &Netns, to: SocketAddr) -> Result<TcpStream> {
    let stream = from
        .run(move || TcpStream::connect_timeout(&to, patience(Duration::from_secs(5))))?
        .with_context(|| format!("connect {to}"))?;
    stream.set_read_timeout(Some(patience(Duration::from_secs(5))))?;
    Ok(stream)
}

/// Tells every client its address, line by line: `ping` → `ping from 10.97.0.2:4000`.
pub(super) struct Server {
    pub(super) at: SocketAddr,
}

impl Server {
    pub(super) fn start(netns: &Netns, at: &str) -> Result<Self> {
        let at: SocketAddr = at.parse()?;
        let listener = netns.run(move || TcpListener::bind(at))??;
        thread::spawn(move || {
            for stream in listener.incoming() {
                // A connection that was closed in the queue is an error of accept().
                let Ok(stream) = stream else { continue };
                thread::spawn(move || answer(stream));
            }
        });
        Ok(Self { at })
    }
}

fn answer(mut stream: TcpStream) -> Option<()> {
    let peer = stream.peer_addr().ok()?;
    let mut line = [0; 4];
    loop {
        stream.read_exact(&mut line).ok()?;
        let word = String::from_utf8_lossy(&line);
        stream
            .write_all(format!("{word} from {peer}\n").as_bytes())
            .ok()?;
    }
}

/// The client's address as the server sees it.
pub(super) fn ping(stream: &mut TcpStream) -> Result<SocketAddr> {
    stream.write_all(b"ping")?;
    let mut line = Vec::new();
    let mut byte = [0];
    loop {
        stream.read_exact(&mut byte)?;
        if byte[0] == b'\n' {
            break;
        }
        line.push(byte[0]);
    }
    let line = String::from_utf8(line)?;
    Ok(line
        .strip_prefix("ping from ")
        .context("another answer")?
        .parse()?)
}

fn captured() -> Result<()> {
    for force_clsact in [false, true] {
        let world = World::new("captured")?;
        let mut settings = world.dirs.settings();
        settings.force_clsact = force_clsact;
        let agent = Agent::start(&world.node, settings, world.pods())?;
        for pod in ["client", "server"] {
            agent.wait_for(pod, "captured")?;
        }
        let families = [("10.97.0.3:8080", CLIENT[0]), ("[fd97::3]:8080", CLIENT[1])];
        let families = &families[..addresses(&CLIENT).len()];
        for (at, client) in families {
            let server = world.serve(at)?;
            let mut stream = world
                .dial(server.at)
                .with_context(|| format!("{:?}", agent.statuses()))?;
            let seen = ping(&mut stream)?;
            let own = stream.local_addr()?;
            ensure!(
                seen.ip() == client.parse::<IpAddr>()?,
                "the server saw {seen}"
            );
            ensure!(
                seen.port() != own.port() && (10_240..=32_767).contains(&seen.port()),
                "the server saw {seen} of {own}"
            );
        }
        let count = |pod: &str, counter: &str| {
            agent.status(pod).and_then(|s| {
                s.counters
                    .iter()
                    .find(|(name, _)| *name == counter)
                    .map(|c| c.1)
            })
        };
        ensure!(
            count("client", "captured_outbound") == Some(families.len() as u64),
            "{:?}",
            agent.statuses()
        );
        ensure!(
            count("server", "captured_inbound") == Some(families.len() as u64),
            "{:?}",
            agent.statuses()
        );

        let handle = agent.handle("server").context("no handle")?;
        let listens = |at: &str, port| Ok::<_, anyhow::Error>(handle.listens(at.parse()?, port));
        for at in addresses(&SERVER) {
            ensure!(listens(at, 8080)? == Some(true), "{at}");
        }
        ensure!(listens(SERVER[0], 8081)? == Some(false));
        // The kernel's refusal, as without the mesh, at least at the server's own door.
        let refused = dial(&world.client, "10.97.0.3:8081".parse()?).and_then(|mut s| ping(&mut s));
        ensure!(refused.is_err());
    }
    Ok(())
}

fn standing() -> Result<()> {
    let world = World::new("standing")?;
    let server = world.serve("10.97.0.3:8080")?;
    let mut before = world.dial(server.at)?;
    ping(&mut before)?;
    let agent = world.agent()?;
    ensure!(
        ping(&mut before)?.port() == before.local_addr()?.port(),
        "not the same connection"
    );
    let mut after = world.dial(server.at)?;
    ensure!(
        ping(&mut after)?.port() != after.local_addr()?.port(),
        "not captured"
    );
    ensure!(ping(&mut before)?.port() == before.local_addr()?.port());
    drop(agent);
    // Fail closed is for what the mesh took; what it never touched goes on.
    ping(&mut before)?;
    after.set_read_timeout(Some(Duration::from_millis(500)))?;
    ensure!(ping(&mut after).is_err(), "taken, and its agent is dead");
    Ok(())
}

fn leaving() -> Result<()> {
    let world = World::new("leaving")?;
    let before = world.client.picture()? + &world.server.picture()?;
    let server = world.serve("10.97.0.3:8080")?;
    let agent = world.agent()?;
    let mut taken = world.dial(server.at)?;
    let seen = ping(&mut taken)?;

    agent.want(Vec::new());
    for pod in ["client", "server"] {
        agent.wait_for(pod, "leaving")?;
    }
    thread::sleep(Duration::from_millis(700));
    ensure!(
        ping(&mut taken)? == seen,
        "the taken connection is as it was"
    );
    let mut plain = world.dial(server.at)?;
    ensure!(
        ping(&mut plain)?.port() == plain.local_addr()?.port(),
        "new ones are plain"
    );

    // In again before it is out: what went plain meanwhile stands, what was taken stays ours.
    agent.want(world.pods());
    for pod in ["client", "server"] {
        agent.wait_for(pod, "captured")?;
    }
    ping(&mut plain)?;
    ensure!(ping(&mut taken)? == seen);
    let mut again = world.dial(server.at)?;
    ensure!(
        ping(&mut again)?.port() != again.local_addr()?.port(),
        "captured again"
    );

    drop((taken, again));
    agent.want(Vec::new());
    for pod in ["client", "server"] {
        agent.wait_gone(pod)?;
    }
    ping(&mut plain)?;
    let after = world.client.picture()? + &world.server.picture()?;
    ensure_same(&before, &after)?;
    let pins = world.dirs.settings().bpf_dir.join("v1/pods");
    ensure!(std::fs::read_dir(&pins)?.count() == 0, "pins are left");
    Ok(())
}

/// The agent ends while a pod is leaving, and an application keeps its half of a connection that was
/// taken. It must not live to be plain; one that was plain from its first packet goes on.
fn left_behind() -> Result<()> {
    let world = World::new("left-behind")?;
    world
        .client
        .run(|| std::fs::write("/proc/sys/net/ipv4/tcp_fin_timeout", "1"))??;
    let server = world.serve("10.97.0.3:8080")?;
    let agent = world.agent()?;
    let mut taken = world.dial(server.at)?;
    ping(&mut taken)?;
    agent.want(Vec::new());
    for pod in ["client", "server"] {
        agent.wait_for(pod, "leaving")?;
    }
    let (mut plain, seen) = until(Duration::from_secs(5), || {
        let mut plain = world.dial(server.at)?;
        let seen = ping(&mut plain)?;
        ensure!(seen.port() == plain.local_addr()?.port(), "control: {seen}");
        Ok((plain, seen))
    })?;

    drop(agent);
    let end = taken.read(&mut [0]).context("the other half ends")?;
    ensure!(end == 0, "control: {end} bytes");
    // The kernel forgets our end.
    thread::sleep(Duration::from_secs(3));
    let next = Agent::start(&world.node, world.dirs.settings(), Vec::new())?;
    ensure!(
        taken.take_error()?.is_none(),
        "control: it is closed already"
    );
    next.want(Vec::new());
    for pod in ["client", "server"] {
        next.wait_gone(pod)?;
    }
    ensure!(
        taken.take_error()?.is_some(),
        "it stands, and nothing keeps it from being plain"
    );
    ensure!(ping(&mut plain)? == seen, "plain by right");
    Ok(())
}

fn adopted() -> Result<()> {
    let world = World::new("adopted")?;
    let server = world.serve("10.97.0.3:8080")?;
    let agent = world.agent()?;
    ping(&mut world.dial(server.at)?)?;
    drop(agent);

    let refusal = dial(&world.client, server.at).expect_err("nobody serves");
    let kind = refusal
        .downcast_ref::<std::io::Error>()
        .map(std::io::Error::kind);
    ensure!(kind == Some(std::io::ErrorKind::TimedOut), "{refusal:#}");

    // A connect that waits is served by the next agent.
    let waiting = thread::scope(|scope| -> Result<_> {
        let waiting = scope.spawn(|| -> Result<_> {
            let mut stream = world.dial(server.at)?;
            ping(&mut stream)
        });
        thread::sleep(Duration::from_millis(300));
        // Nobody knows yet what is desired: nobody is un-enrolled.
        let agent = Agent::start(&world.node, world.dirs.settings(), Vec::new())?;
        let seen = waiting.join().map_err(|_| anyhow::anyhow!("panicked"))??;
        agent.want(world.pods());
        for pod in ["client", "server"] {
            let status = agent.wait_for(pod, "captured")?;
            ensure!(status.repairs == 0, "{status:?}");
        }
        ping(&mut world.dial(server.at)?)?;
        Ok(seen)
    })?;
    ensure!(
        (10_240..=32_767).contains(&waiting.port()),
        "not captured: {waiting}"
    );
    Ok(())
}

fn mended() -> Result<()> {
    let world = World::new("mended-pods")?;
    let server = world.serve("10.97.0.3:8080")?;
    let agent = world.agent()?;
    // Settled: the first full turn is over.
    thread::sleep(Duration::from_millis(300));
    let repairs = agent.status("client").context("no pod")?.repairs;
    world.client.ip(&["link", "del", "mesh0"])?;
    world.client.ip(&["rule", "del", "pref", "1"])?;
    agent.kick();
    until(Duration::from_secs(5), || {
        let status = agent.status("client").context("no pod")?;
        ensure!(status.repairs > repairs, "{status:?}");
        Ok(())
    })?;
    let mut stream = world.dial(server.at)?;
    ensure!(
        ping(&mut stream)?.port() != stream.local_addr()?.port(),
        "captured"
    );

    // A second interface appears.
    let third = Netns::new("mended-third")?;
    world.client.ip(&[
        "link",
        "add",
        "net1",
        "type",
        "veth",
        "peer",
        "name",
        "eth0",
        "netns",
        &third.name,
    ])?;
    for (netns, device, address) in [
        (&world.client, "net1", "10.96.0.2/24"),
        (&third, "eth0", "10.96.0.3/24"),
    ] {
        netns.ip(&["addr", "add", address, "dev", device])?;
        netns.ip(&["link", "set", device, "up"])?;
    }
    let other = Server::start(&third, "10.96.0.3:8080")?;
    // The kernel tells of it: the next full turn would be later.
    until(Duration::from_secs(5), || {
        let mut stream = dial(&world.client, other.at)?;
        ensure!(
            ping(&mut stream)?.port() != stream.local_addr()?.port(),
            "passes by"
        );
        Ok(())
    })
}

fn refused() -> Result<()> {
    let world = World::new("refused")?;
    let before = world.node.picture()?;
    let mut pods = world.pods();
    pods.push(desired("thief", &world.server, &[]));
    pods.push(desired("host", &world.node, &[]));
    let mut missing = desired("missing", &world.node, &[]);
    missing.netns = "/run/netns/datapath-no-such".into();
    pods.push(missing);
    let agent = Agent::start(&world.node, world.dirs.settings(), pods)?;
    for (pod, word) in [("host", "netns_of_host"), ("missing", "netns_missing")] {
        let status = agent.wait_for(pod, "failed")?;
        let (reason, sentence) = status.reason.context("no reason")?;
        ensure!(
            reason == word && sentence.contains("netns "),
            "{pod}: {reason}: {sentence}"
        );
    }
    // Whichever of the two came first has it; the other is refused.
    until(Duration::from_secs(5), || {
        let of = |uid| agent.status(uid).context("no pod");
        let (server, thief) = (of("server")?, of("thief")?);
        let states = [server.state, thief.state];
        ensure!(
            states.contains(&"captured") && states.contains(&"failed"),
            "{states:?}"
        );
        let reason = server.reason.or(thief.reason).context("no reason")?;
        ensure!(reason.0 == "netns_taken", "{reason:?}");
        Ok(())
    })?;
    ensure!(
        world.node.picture()? == before,
        "the node's netns was touched"
    );
    Ok(())
}

fn vanished() -> Result<()> {
    let world = World::new("vanished")?;
    let third = Netns::new("vanished-third")?;
    let mut pods = world.pods();
    let mut short = desired("short", &third, &[]);
    pods.push(short.clone());
    let agent = Agent::start(&world.node, world.dirs.settings(), pods)?;
    let slot = agent.wait_for("short", "captured")?.slot;
    drop(third);
    agent.kick();
    agent.wait_for("short", "failed")?;
    let pin = world
        .dirs
        .settings()
        .bpf_dir
        .join("v1/pods")
        .join(slot.context("no slot")?.to_string());
    ensure!(!pin.exists(), "{} is left", pin.display());

    let next = Netns::new("vanished-next")?;
    short.netns = next.path();
    let mut pods = world.pods();
    pods.push(short);
    agent.want(pods);
    ensure!(
        agent.wait_for("short", "captured")?.slot == slot,
        "the slot was free"
    );
    Ok(())
}

fn cleaned() -> Result<()> {
    for force_clsact in [false, true] {
        let world = World::new("cleaned")?;
        let mut settings = world.dirs.settings();
        settings.force_clsact = force_clsact;
        let before = world.client.picture()? + &world.server.picture()?;
        let server = world.serve("10.97.0.3:8080")?;
        let agent = Agent::start(&world.node, settings.clone(), world.pods())?;
        for pod in ["client", "server"] {
            agent.wait_for(pod, "captured")?;
        }
        let mut taken = world.dial(server.at)?;
        ping(&mut taken)?;
        drop(agent);
        clean(&world, &settings)?;
        // Closed, not left to send plain what was to be encrypted (rule 4).
        let error = ping(&mut taken)
            .expect_err("still open")
            .downcast::<std::io::Error>()?;
        ensure!(error.kind() != std::io::ErrorKind::WouldBlock, "{error}");
        let mut plain = world.dial(server.at)?;
        ensure!(
            ping(&mut plain)?.port() == plain.local_addr()?.port(),
            "still captured"
        );
        drop(plain);
        let after = world.client.picture()? + &world.server.picture()?;
        if !force_clsact {
            // An empty clsact may have been there before us, so it stays.
            ensure_same(&before, &after)?;
        }
        ensure!(!settings.bpf_dir.exists() && std::fs::read_dir(settings.run_dir)?.count() == 0);
    }
    Ok(())
}

fn cleaned_but_one() -> Result<()> {
    let world = World::new("but-one")?;
    let settings = world.dirs.settings();
    let before = world.client.picture()? + &world.server.picture()?;
    let agent = Agent::start(&world.node, settings.clone(), world.pods())?;
    for pod in ["client", "server"] {
        agent.wait_for(pod, "captured")?;
    }
    drop(agent);
    // On record before all others, in a place that no map has.
    let path = settings.run_dir.join("pods.json");
    let mut file: Value = serde_json::from_slice(&std::fs::read(&path)?)?;
    let records = file["content"].as_array_mut().context("no records")?;
    let broken = json!({"uid": "broken", "name": "shop/broken", "slot": 1 << 20,
                        "netns": "/run/netns/nowhere", "cookie": 1});
    records.insert(0, broken.clone());
    std::fs::write(&path, file.to_string())?;

    let error = clean(&world, &settings).expect_err("the slot is beyond the maps");
    ensure!(format!("{error:#}").contains("shop/broken"), "{error:#}");
    let after = world.client.picture()? + &world.server.picture()?;
    ensure_same(&before, &after)?;
    ensure!(!settings.bpf_dir.exists(), "something is pinned");
    // Whoever cleans again knows of it, and of no other.
    let file: Value = serde_json::from_slice(&std::fs::read(&path)?)?;
    ensure!(file["content"] == json!([broken]), "{file}");
    Ok(())
}

fn clean(world: &World, settings: &DatapathSettings) -> Result<()> {
    world.node.run(|| -> Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().build()?;
        runtime.block_on(Datapath::cleanup(settings.clone()))
    })?
}

fn hundred() -> Result<()> {
    let node = Netns::new("hundred-node")?;
    let pods = (0..100)
        .map(|_| Netns::new("hundred"))
        .collect::<Result<Vec<_>>>()?;
    for pod in &pods {
        pod.ip(&["link", "add", "eth0", "type", "veth", "peer", "name", "x"])?;
    }
    let dirs = Dirs::new()?;
    let wanted: Vec<_> = pods
        .iter()
        .enumerate()
        .map(|(i, pod)| desired(&format!("pod-{i}"), pod, &[&format!("10.95.0.{}", i + 1)]))
        .collect();
    let start = Instant::now();
    let agent = Agent::start_idle(&node, dirs.settings(), wanted)?;
    until(Duration::from_secs(40), || {
        let statuses = agent.statuses();
        let captured = statuses
            .iter()
            .filter(|status| status.state == "captured")
            .count();
        ensure!(captured == 100, "{captured} of 100: {:?}", statuses.first());
        Ok(())
    })?;
    let took = start.elapsed();
    // Parsing objects without optimisation takes several times as long.
    let limit = Duration::from_secs(if cfg!(debug_assertions) { 30 } else { 10 });
    ensure!(took < patience(limit), "took {took:?}");
    let memory = std::fs::read_to_string("/proc/self/status")?;
    let memory = memory
        .lines()
        .find(|line| line.starts_with("VmRSS"))
        .unwrap_or_default();
    eprintln!("100 pods: enrolled in {took:?}, with the tests {memory}");
    let start = Instant::now();
    agent.kick();
    thread::sleep(Duration::from_millis(50));
    agent.want(Vec::new());
    until(Duration::from_secs(30), || {
        ensure!(
            agent.statuses().is_empty(),
            "{} left",
            agent.statuses().len()
        );
        Ok(())
    })?;
    eprintln!(
        "100 pods: in {took:?}, checked and out {:?}",
        start.elapsed()
    );
    Ok(())
}

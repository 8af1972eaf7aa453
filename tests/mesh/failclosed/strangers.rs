//! Strangers at the door of a captured pod: when nobody is at home, behind a node's address, and
//! in such a crowd that the kernel answers with SYN cookies.

use std::{net::SocketAddr, thread, time::Duration};

use anyhow::{Context, Result, ensure};
use picomesh_tests::{
    Netns, Pod, PodSpec,
    capture::Capture,
    client,
    frames::{Forger, Shape},
    raw::{ACK, SYN, Segment},
    server::{Habit, Server},
};

use super::{Ground, PATIENCE, PORT};

const MARKER: &[u8] = b"is-anybody-at-home";

pub(super) fn without_an_agent_an_enrolled_pod_is_closed_and_waits() -> Result<()> {
    let mut ground = Ground::new()?;
    let server = Server::start(ground.far.netns(), PORT, Habit::Echo)?;
    let outsider = ground.world.outsider()?;
    let targets = [ground.far.at(PORT), ground.far.at6(PORT)];

    let capture = ground.world.capture_wire(&[MARKER])?;
    for to in targets {
        for from in [&ground.near, &outsider, &ground.neighbour] {
            ensure!(
                served(from, to),
                "{} is not served by {to} without the mesh",
                from.name()
            );
        }
    }
    capture.wait_found(0, PATIENCE)?;
    capture.stop()?;

    ground.mesh()?;
    ensure!(served(&ground.near, targets[0]), "the mesh does not carry");
    for agent in &ground.agents {
        agent.kill9();
    }
    let accepted = server.accepted();
    let capture = ground.world.capture_wire(&[MARKER])?;
    for to in targets {
        // Out of a captured pod.
        ensure!(!served(&ground.near, to), "near is served by {to}");
        // Into one.
        for from in [&outsider, &ground.neighbour] {
            ensure!(!served(from, to), "{} is served by {to}", from.name());
        }
    }
    let seen = capture.stop()?;
    ensure!(seen.found[0] == 0, "the marker is on the wire in plain");
    let near = [ground.near.v4().into(), ground.near.v6().into()];
    let bare = seen.tcp().filter(|t| near.contains(&t.src.ip())).count();
    ensure!(
        bare == 0,
        "{bare} packets of the captured client are on the wire"
    );
    ensure!(
        server.accepted() == accepted,
        "the application accepted a stranger"
    );
    // The host's own probes need no agent.
    let node = ground.world.node(1)?;
    let probe = node.run(|| client::exchange(targets[0], MARKER, PATIENCE));
    ensure!(
        probe.is_ok_and(|answer| answer == MARKER),
        "a probe of the host is not served while the agent is away"
    );

    // A client that dials now only waits a little longer.
    let patient = ground.near.netns().spawn("patient", move || {
        client::exchange(targets[0], MARKER, Duration::from_secs(60))
    })?;
    thread::sleep(Duration::from_millis(300));
    ground.agents.clear();
    ground.mesh().context("start the agents again")?;
    let answer = patient
        .join()
        .map_err(|_| anyhow::anyhow!("the patient client panicked"))?;
    ensure!(
        answer.is_ok_and(|answer| answer == MARKER),
        "who dialled while the agent was away is not served after it came"
    );
    Ok(())
}

/// A node port's way: to the node's address, on to the pod, from the address that probes have.
const NODE_PORT: u16 = 30_080;

pub(super) fn masqueraded_strangers_are_no_probes() -> Result<()> {
    const PROBE_PORT: u16 = 23_456;
    let mut ground = Ground::new()?;
    let server = Server::start(ground.far.netns(), PORT, Habit::Echo)?;
    let outsider = ground.world.outsider()?;
    let node = ground.world.node(1)?;
    let door: SocketAddr = (node.v4(), NODE_PORT).into();
    let far = ground.far.at(PORT);
    let as_probe: SocketAddr = (node.gateway(), PROBE_PORT).into();
    let probe = || {
        node.run(|| -> Result<()> {
            let mut stream = client::connect_from(as_probe, far, PATIENCE)?;
            client::ping(&mut stream, b"a probe")?;
            // A reset leaves no TIME_WAIT behind: only the probe's own record is left of it.
            Ok(client::reset(stream)?)
        })
        .context("a probe of the host")
    };

    // Any port of the node's, then exactly the one that a probe had a moment ago.
    masquerade(node.netns(), far, None)?;
    ensure!(served(&outsider, door), "no node port without the mesh");
    probe()?;
    masquerade(node.netns(), far, Some(PROBE_PORT))?;
    arrives_as(&ground.far, as_probe, || {
        ensure!(
            served(&outsider, door),
            "a stranger on a probe's tuple is not served without the mesh"
        );
        Ok(())
    })
    .context("control, without the mesh")?;

    ground.mesh()?;
    masquerade(node.netns(), far, None)?;
    probe()?;
    let accepted = server.accepted();
    ensure!(
        !served(&outsider, door),
        "a masqueraded stranger is served by a strict pod"
    );
    ensure!(server.accepted() == accepted, "the application accepted it");
    for round in 0..3 {
        masquerade(node.netns(), far, None)?;
        probe()?;
        let accepted = server.accepted();
        masquerade(node.netns(), far, Some(PROBE_PORT))?;
        arrives_as(&ground.far, as_probe, || {
            ensure!(
                !served(&outsider, door),
                "a stranger on a finished probe's tuple is served (round {round})"
            );
            Ok(())
        })?;
        ensure!(
            server.accepted() == accepted,
            "the application accepted a stranger on a finished probe's tuple (round {round})"
        );
    }
    Ok(())
}

/// Sends the door's visitors to `to` with the node's address as source, from `port` if given.
fn masquerade(netns: &Netns, to: SocketAddr, port: Option<u16>) -> Result<()> {
    let (ip, target) = (to.ip(), to.port());
    let port = port.map(|p| format!(" to :{p}")).unwrap_or_default();
    netns.nft(&format!(
        "table ip attack\ndelete table ip attack\n\
         table ip attack {{\n\
         chain visit {{ type nat hook prerouting priority -100\n\
         tcp dport {NODE_PORT} dnat to {to}\n}}\n\
         chain leave {{ type nat hook postrouting priority 100\n\
         iifname \"eth0\" ip daddr {ip} tcp dport {target} masquerade{port}\n}}\n}}\n"
    ))?;
    // A tuple is free again as soon as its last user is gone.
    for state in ["time_wait", "close", "close_wait", "last_ack", "fin_wait"] {
        netns.sysctl(
            &format!("net/netfilter/nf_conntrack_tcp_timeout_{state}"),
            "1",
        )?;
    }
    thread::sleep(Duration::from_millis(1500));
    Ok(())
}

/// Runs `attack` and makes sure that its SYN reached the pod's own interface from `source`.
fn arrives_as(pod: &Pod, source: SocketAddr, attack: impl FnOnce() -> Result<()>) -> Result<()> {
    let capture = Capture::start(pod.netns(), Some("eth0"), &[])?;
    attack()?;
    let seen = capture.stop()?;
    ensure!(
        seen.tcp()
            .any(|t| t.src == source && t.flags & (SYN | ACK) == SYN),
        "no SYN came from {source}: the attack was not what it should be"
    );
    Ok(())
}

pub(super) fn a_flood_of_syn_cookies_lets_nobody_past_policy() -> Result<()> {
    let mut ground = Ground::new()?;
    let open = ground.world.pod(&PodSpec::new("open").on(1))?;
    let outsider = ground.world.outsider()?;
    // Every SYN is answered with a cookie, also the first.
    for pod in [&ground.near, &ground.far, &open] {
        pod.netns().sysctl("net/ipv4/tcp_syncookies", "2")?;
    }
    let strict = Server::start(ground.far.netns(), PORT, Habit::Echo)?;
    let free = Server::start(open.netns(), PORT, Habit::Echo)?;
    let targets = [ground.far.at(PORT), ground.far.at6(PORT)];

    for to in targets {
        ensure!(
            served(&outsider, to),
            "{to} does not serve without the mesh"
        );
    }
    let cookies = cookies_redeemed(&ground.far)?;
    ensure!(
        cookies >= targets.len() as u64,
        "{cookies} cookies were redeemed without the mesh: the setting does nothing"
    );

    ground.mesh()?;
    ground.guard()?.wait_captured(&open, 4 * PATIENCE)?;
    let accepted = strict.accepted();
    for round in 0..20 {
        for to in targets {
            ensure!(
                !served_within(&outsider, to, Duration::from_millis(500)),
                "a stranger's cookie is served by a strict pod (round {round})"
            );
        }
    }
    flood(&ground)?;
    ensure!(
        strict.accepted() == accepted,
        "the strict application accepted {} strangers",
        strict.accepted() - accepted
    );
    ensure!(
        cookies_redeemed(&ground.far)? > cookies,
        "no cookie was redeemed with the mesh on: the attack was not what it should be"
    );

    // Cookies are not what is refused: who may come is served, by way of the mesh.
    for to in targets {
        ensure!(served(&ground.near, to), "the mesh does not serve {to}");
    }
    let name = "tcp_open_total";
    let labels = [("direction", "inbound"), ("pod", open.name())];
    let carried = ground.guard()?.metrics()?.sum(name, &labels);
    for _ in 0..5 {
        ensure!(
            served(&outsider, open.at(PORT)),
            "a pod that is open to all does not serve a stranger"
        );
    }
    ground
        .guard()?
        .wait_metric(name, &labels, PATIENCE, |now| now >= carried + 5.0)
        .context("strangers reached the open pod past the mesh")?;
    drop(free);
    Ok(())
}

/// Thousands of SYNs, and of ACKs that pretend to bring a cookie back, from nobody.
fn flood(ground: &Ground) -> Result<()> {
    let forger = Forger::new(
        ground.neighbour.netns(),
        "eth0",
        ground.far.netns().mac("eth0")?,
    )?;
    for number in 0..4000_u32 {
        let from: SocketAddr = format!(
            "10.244.1.{}:{}",
            240 + number % 10,
            30_000 + number % 20_000
        )
        .parse()?;
        let guess = number.wrapping_mul(0x9e37_79b9);
        for segment in [
            Segment::new(from, ground.far.at(PORT), SYN).seq(number),
            Segment::new(from, ground.far.at(PORT), ACK)
                .seq(number + 1)
                .ack(guess),
        ] {
            forger.send(&Shape::Plain, &segment)?;
        }
    }
    Ok(())
}

/// `TcpExt: SyncookiesRecv` of the pod.
fn cookies_redeemed(pod: &Pod) -> Result<u64> {
    let table = pod.netns().proc_net("netstat")?;
    let mut lines = table.lines().filter(|line| line.starts_with("TcpExt:"));
    let (names, values) = (lines.next(), lines.next());
    let place = names
        .unwrap_or_default()
        .split_whitespace()
        .position(|name| name == "SyncookiesRecv");
    place
        .and_then(|at| values.unwrap_or_default().split_whitespace().nth(at))
        .and_then(|value| value.parse().ok())
        .with_context(|| format!("/proc/net/netstat of {} has no SyncookiesRecv", pod.name()))
}

fn served(from: &Pod, to: SocketAddr) -> bool {
    served_within(from, to, Duration::from_secs(2))
}

fn served_within(from: &Pod, to: SocketAddr, patience: Duration) -> bool {
    from.run(|| client::exchange(to, MARKER, patience))
        .is_ok_and(|answer| answer == MARKER)
}

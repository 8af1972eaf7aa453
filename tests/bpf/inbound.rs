//! What comes to the pod from outside.

use std::{
    fs,
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpListener},
    os::fd::AsFd,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use picomesh_common::{
    Counter, PodConfig, PortRange, StandingKey, Tuple,
    config::{MESH1_MAC, TUNNEL_PORT, owner},
};
use picomesh_tests::wait;

use crate::{
    Test,
    frames::{ACK, Frame, SYN, Wire, tcp_of},
    outbound::vanish,
    topology::{
        Family, Listeners, QUIET, SLOT, SOON, Setup, Topology, Unfit, accept, accept_within,
        active, attempt, dial, dial_from, families, serve,
    },
    verdicts::{PASS, REDIRECT, run},
};

pub(crate) const TESTS: &[Test] = &[
    (
        "a_client_lands_on_the_listener_not_on_the_application",
        lands_on_the_listener,
    ),
    ("the_application_sees_the_clients_address", clients_address),
    (
        "a_port_nobody_listens_on_is_refused_by_the_kernel",
        natural_refusal,
    ),
    (
        "on_the_tunnels_port_our_listener_answers_for_every_pod",
        tunnels_port,
    ),
    (
        "without_a_listener_the_syn_waits_and_is_not_refused",
        without_a_listener,
    ),
    ("fail_open_reaches_the_application", fail_open),
    ("sk_lookup_without_a_listener_drops", steered_nowhere),
    ("a_reused_port_in_time_wait_goes_to_the_listener", time_wait),
    ("a_syn_cookies_ack_goes_to_the_listener", syn_cookie),
    (
        "a_cookie_is_not_redeemed_again_behind_a_closed_connection",
        closed_behind_a_cookie,
    ),
    (
        "an_application_never_accepts_by_a_race_with_listen",
        request_race,
    ),
    ("skipped_ports_reach_the_application", skipped_ports),
    ("a_connection_that_stood_before_goes_on", standing_goes_on),
    (
        "an_unknown_connection_gets_nothing_in",
        unknown_gets_nothing,
    ),
    (
        "an_accepted_connection_whose_proxy_died_never_sends_plain",
        never_plain,
    ),
];

fn lands_on_the_listener(setup: &Setup) -> Result<()> {
    let (topology, listeners) = Topology::with_listeners(setup)?;
    for family in families() {
        let app = serve(&topology.pod, SocketAddr::new(family.pod, 80))?;
        let mut client = dial(&topology.client, app.local_addr()?)?;
        let (mut taken, peer) = accept(&listeners.inbound[family.index as usize])?;
        ensure!(
            taken.local_addr()? == app.local_addr()?,
            "{:?}",
            taken.local_addr()
        );
        ensure!(peer == client.local_addr()?, "{peer}");
        // More than a segment both ways, checksums by offload.
        let sent = vec![7u8; 300_000];
        let copy = sent.clone();
        let writer = std::thread::spawn(move || -> Result<()> { Ok(client.write_all(&copy)?) });
        let mut got = Vec::new();
        taken.read_to_end(&mut got)?;
        ensure!(got == sent);
        writer
            .join()
            .map_err(|_panic| anyhow::anyhow!("the client panicked"))??;
        ensure!(
            accept_within(&app, QUIET)?.is_none(),
            "the application got it as well"
        );
    }
    Ok(())
}

fn clients_address(setup: &Setup) -> Result<()> {
    let (topology, _listeners) = Topology::with_listeners(setup)?;
    for family in families() {
        let app = serve(&topology.pod, SocketAddr::new(family.pod, 80))?;
        let mut ours = topology
            .connect_as_client(SocketAddr::new(family.client, 20_000), app.local_addr()?)?;
        let (mut served, peer) = accept(&app)?;
        ensure!(peer == SocketAddr::new(family.client, 20_000), "{peer}");
        let big = vec![9u8; 200_000];
        let copy = big.clone();
        let writer = std::thread::spawn(move || -> Result<()> { Ok(served.write_all(&copy)?) });
        ours.set_read_timeout(Some(SOON))?;
        let mut got = Vec::new();
        ours.read_to_end(&mut got)?;
        ensure!(got == big, "{} bytes", got.len());
        writer
            .join()
            .map_err(|_panic| anyhow::anyhow!("the application panicked"))??;
    }
    Ok(())
}

fn natural_refusal(setup: &Setup) -> Result<()> {
    let (topology, _listeners) = Topology::with_listeners(setup)?;
    for family in families() {
        let end = attempt(&topology.client, SocketAddr::new(family.pod, 81), SOON)?;
        ensure!(
            end == Some(ErrorKind::ConnectionRefused),
            "{end:?}, {:?}",
            topology.nonzero()?
        );
    }
    ensure!(
        topology.count(Counter::RefusedByKernel)? >= families().count() as u64,
        "{:?}",
        topology.nonzero()?
    );
    Ok(())
}

fn tunnels_port(setup: &Setup) -> Result<()> {
    let (topology, listeners) = Topology::with_listeners(setup)?;
    for family in families() {
        let _peer = dial(&topology.client, SocketAddr::new(family.pod, TUNNEL_PORT))?;
        accept(&listeners.inbound[family.index as usize])?;
    }
    Ok(())
}

fn without_a_listener(setup: &Setup) -> Result<()> {
    let topology = Topology::new(setup)?;
    for family in families() {
        let app = serve(&topology.pod, SocketAddr::new(family.pod, 80))?;
        let end = attempt(&topology.client, app.local_addr()?, QUIET)?;
        ensure!(end == Some(ErrorKind::TimedOut), "{end:?}");
        ensure!(
            accept_within(&app, QUIET)?.is_none(),
            "it reached the application"
        );
    }
    ensure!(
        topology.count(Counter::NoInboundListener)? >= families().count() as u64,
        "{:?}",
        topology.nonzero()?
    );
    Ok(())
}

fn fail_open(setup: &Setup) -> Result<()> {
    let topology = Topology::new(setup)?;
    let open = PodConfig {
        flags: PodConfig::ACTIVE | PodConfig::FAIL_OPEN,
        ..active()
    };
    topology.loader.set_pod_config(SLOT, &open)?;
    for family in families() {
        let app = serve(&topology.pod, SocketAddr::new(family.pod, 80))?;
        let mut client = dial(&topology.client, app.local_addr()?)?;
        let (mut served, _peer) = accept(&app)?;
        client.write_all(b"open")?;
        let mut got = [0; 4];
        served.read_exact(&mut got)?;
        ensure!(&got == b"open");
    }
    Ok(())
}

/// What came to mesh1 was captured, so it must not go on to whoever listens.
fn steered_nowhere(setup: &Setup) -> Result<()> {
    let topology = Topology::new(setup)?;
    for family in families() {
        let app = serve(&topology.pod, SocketAddr::new(family.pod, 80))?;
        let before = topology.count(Counter::SteeredNowhere)?;
        let mut syn = Frame::to_pod(
            SocketAddr::new(family.client, 40_000),
            app.local_addr()?,
            SYN,
        );
        syn.to_mac = MESH1_MAC;
        let mesh0 = Wire::open(&topology.pod, "mesh0")?;
        // An application's answer would leave by eth0, where it shows as an unknown sender.
        mesh0.send(&syn.bytes())?;
        topology.await_count(Counter::SteeredNowhere, before)?;
        std::thread::sleep(QUIET);
        let answered = topology.count(Counter::UnknownSender)?;
        ensure!(
            answered == 0,
            "the application answered: {:?}",
            topology.nonzero()?
        );
    }
    Ok(())
}

/// Rule 7: our side closed first, and the client comes again from the same port.
fn time_wait(setup: &Setup) -> Result<()> {
    let (topology, listeners) = Topology::with_listeners(setup)?;
    for family in families() {
        let app = serve(&topology.pod, SocketAddr::new(family.pod, 80))?;
        let from = SocketAddr::new(family.client, 41_000);
        let inbound = &listeners.inbound[family.index as usize];
        for round in 0..3 {
            // The client's end of the round before is free once its FIN is answered.
            let what = format!("round {round}");
            let mut client = wait::for_value(&what, SOON, || {
                dial_from(&topology.client, from, app.local_addr()?).map(Some)
            })?;
            let (taken, _peer) = accept(inbound).with_context(|| format!("round {round}"))?;
            drop(taken);
            client.set_read_timeout(Some(SOON))?;
            ensure!(client.read(&mut [0; 1])? == 0);
        }
        ensure!(
            accept_within(&app, QUIET)?.is_none(),
            "a reused port reached the application"
        );
        // Its answer would be stopped on the way out, but it must not even be asked.
        let answered = topology.count(Counter::UnknownSender)?;
        ensure!(
            answered == 0,
            "the application answered: {:?}",
            topology.nonzero()?
        );
    }
    Ok(())
}

/// The ACK that answers a cookie has no owner, and any listener of the port would take it.
fn syn_cookie(setup: &Setup) -> Result<()> {
    for family in families() {
        let topology = Topology::unattached(setup)?;
        let (app, listeners) = serve_with_cookies(&topology, family)?;
        let mut client = dial(&topology.client, app.local_addr()?)?;
        client.write_all(b"hello")?;
        let past = accept_within(&app, QUIET)?;
        ensure!(past.is_none(), "the cookie's ACK reached the application");
        accept(&listeners.inbound[family.index as usize])?;
    }
    Ok(())
}

/// The stack looks for a packet's socket a moment after we did, and a connection of ours may be
/// closed in that moment. Its first data carry the numbers that redeem its cookie. Here the
/// moment lasts: the verdict on the data is taken while our socket stands, and what it leads to
/// happens when it is closed.
fn closed_behind_a_cookie(setup: &Setup) -> Result<()> {
    const DATA: &[u8] = b"behind the cookie";
    for family in families() {
        let topology = Topology::unattached(setup)?;
        // A way into the pod without programs: what a packet is once it has passed.
        topology.pod.run(
            "ip link add passed type veth peer name way
             ip link set passed address 02:00:00:00:00:77 up
             ip link set way up",
        )?;
        let (app, listeners) = serve_with_cookies(&topology, family)?;
        let wire = Wire::open(&topology.node, "topod")?;
        let mut client = dial(&topology.client, app.local_addr()?)?;
        let (taken, peer) = accept(&listeners.inbound[family.index as usize])?;
        client.write_all(DATA)?;
        let seen = wire
            .find(SOON, |frame| frame.ends_with(DATA))
            .context("the data are not on the wire")?;
        let tcp = if family.pod.is_ipv4() { 34 } else { 54 };
        let number = |at: usize| u32::from_be_bytes([0, 1, 2, 3].map(|i| seen[tcp + at + i]));
        let mut data = Frame::bare(peer, app.local_addr()?, ACK).payload(DATA);
        (data.sequence, data.acknowledged) = (number(4), number(8));

        let ran = run(&topology, "ingress", &data.bytes(), 0)?;
        socket2::SockRef::from(&taken).set_linger(Some(Duration::ZERO))?;
        drop(taken);
        if ran.verdict == PASS {
            data.to_mac = [2, 0, 0, 0, 0, 0x77];
            Wire::open(&topology.pod, "way")?.send(&data.bytes())?;
        } else {
            ensure!(
                ran.verdict == REDIRECT && ran.frame[..6] == MESH1_MAC,
                "{ran:?}"
            );
            data.to_mac = MESH1_MAC;
            Wire::open(&topology.pod, "mesh0")?.send(&data.bytes())?;
        }
        ensure!(
            accept_within(&app, QUIET)?.is_none(),
            "the application accepted a stranger by a cookie of ours"
        );
        // It was good for a connection, and only ours.
        let (mut again, _peer) = accept(&listeners.inbound[family.index as usize])?;
        let mut got = [0; DATA.len()];
        again.read_exact(&mut got)?;
        ensure!(got == DATA);
    }
    Ok(())
}

/// An application in a pod where every SYN is answered with a cookie, enrolled when it has taken
/// one itself: from then on it takes any that is good.
fn serve_with_cookies(topology: &Topology, family: Family) -> Result<(TcpListener, Listeners)> {
    topology
        .pod
        .enter(|| Ok(fs::write("/proc/sys/net/ipv4/tcp_syncookies", "2")?))?;
    let app = serve(&topology.pod, SocketAddr::new(family.pod, 80))?;
    let _before = dial(&topology.client, app.local_addr()?)?;
    accept(&app)?;
    topology.loader.set_pod_config(SLOT, &active())?;
    topology.attach()?;
    Ok((app, topology.listen_as_proxy()?))
}

/// A SYN that came past us a moment before `listen` leaves a request of the application's. Here
/// it is made before the programs are attached, by a client that answers only afterwards.
fn request_race(setup: &Setup) -> Result<()> {
    // Once the listener has failed to send its SYN-ACK again, after a second, it knows of no
    // request: a slow machine may need more than one try.
    for family in families() {
        let mut tries = 5;
        while !request_raced(setup, family)? {
            tries -= 1;
            ensure!(
                tries > 0,
                Unfit("each try took longer than a SYN-ACK's repetition")
            );
        }
    }
    Ok(())
}

/// False: too late to tell.
fn request_raced(setup: &Setup, family: Family) -> Result<bool> {
    let topology = Topology::unattached(setup)?;
    let app = serve(&topology.pod, SocketAddr::new(family.pod, 80))?;
    let (from, to) = (SocketAddr::new(family.node, 42_000), app.local_addr()?);
    // The node's own stack would answer the SYN-ACK with RST.
    topology.node.run("ip link set topod arp off")?;
    let wire = Wire::open(&topology.node, "topod")?;
    let mut stranger = SocketAddr::new(family.client, from.port());
    stranger.set_port(42_000);
    blackhole(&topology)?;
    let asked = Instant::now();
    wire.send(&Frame::to_pod(stranger, to, SYN).bytes())?;
    let answer = wire
        .find(SOON, |frame| tcp_of(frame) == Some((80, 42_000, SYN | ACK)))
        .context("the application's listener did not answer")?;
    let at = if family.pod.is_ipv4() { 34 } else { 54 };
    let sequence = u32::from_be_bytes([
        answer[at + 4],
        answer[at + 5],
        answer[at + 6],
        answer[at + 7],
    ]);

    topology.loader.set_pod_config(SLOT, &active())?;
    topology.attach()?;
    let _listeners = topology.listen_as_proxy()?;
    let mut ack = Frame::to_pod(stranger, to, ACK);
    ack.sequence = 1001;
    ack.acknowledged = sequence.wrapping_add(1);
    wire.send(&ack.bytes())?;
    let in_time = asked.elapsed() < Duration::from_millis(900);
    ensure!(
        accept_within(&app, QUIET)?.is_none(),
        "the application accepted it"
    );
    if !in_time {
        return Ok(false);
    }
    topology.await_count(Counter::NotStanding, 0)?;
    // Its SYN-ACK comes again, and goes nowhere.
    topology.await_count(Counter::UnknownSender, 0)?;
    Ok(true)
}

/// Makes the client deaf, so that it does not answer what it never asked for.
fn blackhole(topology: &Topology) -> Result<()> {
    topology.client.run("ip link set eth0 down")
}

fn skipped_ports(setup: &Setup) -> Result<()> {
    let (topology, _listeners) = Topology::with_listeners(setup)?;
    let mut config = active();
    config.skip_inbound[0] = PortRange {
        first: 80,
        last: 80,
    };
    topology.loader.set_pod_config(SLOT, &config)?;
    for family in families() {
        let app = serve(&topology.pod, SocketAddr::new(family.pod, 80))?;
        let mut client = dial(&topology.client, app.local_addr()?)?;
        let (mut served, _peer) = accept(&app)?;
        exchange(&mut client, &mut served)?;
    }
    Ok(())
}

fn standing_goes_on(setup: &Setup) -> Result<()> {
    let topology = Topology::unattached(setup)?;
    for family in families() {
        let app = serve(&topology.pod, SocketAddr::new(family.pod, 80))?;
        let mut client = dial(&topology.client, app.local_addr()?)?;
        let (mut served, peer) = accept(&app)?;
        let key = StandingKey {
            slot: SLOT,
            tuple: Tuple::new(served.local_addr()?, peer),
        };
        topology.loader.insert_standing(&key)?;
        topology.loader.set_pod_config(SLOT, &active())?;
        topology.attach()?;
        exchange(&mut client, &mut served)?;
        ensure!(topology.loader.standing()? == [key]);
        topology.loader.clear_slot(SLOT)?;
        ensure!(topology.loader.standing()?.is_empty());
        topology
            .pod
            .enter(|| Ok(topology.loader.detach(SLOT, &topology.interfaces)?))?;
    }
    Ok(())
}

fn unknown_gets_nothing(setup: &Setup) -> Result<()> {
    let topology = Topology::unattached(setup)?;
    for family in families() {
        let app = serve(&topology.pod, SocketAddr::new(family.pod, 80))?;
        let mut client = dial(&topology.client, app.local_addr()?)?;
        let (mut served, _peer) = accept(&app)?;
        topology.loader.set_pod_config(SLOT, &active())?;
        topology.attach()?;
        let before = topology.count(Counter::NotStanding)?;
        client.write_all(b"in by the back door")?;
        served.set_read_timeout(Some(QUIET))?;
        let got = served.read(&mut [0; 64]);
        ensure!(got.is_err(), "the application read {got:?} bytes");
        topology.await_count(Counter::NotStanding, before)?;
        topology
            .pod
            .enter(|| Ok(topology.loader.detach(SLOT, &topology.interfaces)?))?;
    }
    Ok(())
}

/// Rule 4 on the accepting side: its peer was a socket of ours that pretended to be the client.
fn never_plain(setup: &Setup) -> Result<()> {
    for family in families() {
        let (topology, listeners) = Topology::with_listeners(setup)?;
        let app = serve(&topology.pod, SocketAddr::new(family.pod, 80))?;
        let mut ours = topology
            .connect_as_client(SocketAddr::new(family.client, 20_001), app.local_addr()?)?;
        let (mut served, _peer) = accept(&app)?;
        exchange(&mut ours, &mut served)?;
        let storage = topology.loader.storage(served.as_fd())?;
        ensure!(storage == Some(owner::TAKEN), "{storage:?}");
        let wire = Wire::open(&topology.node, "topod")?;
        topology.stop_listening(listeners)?;
        vanish(ours)?;
        served.write_all(b"marker-of-the-answer")?;
        ensure!(
            !wire.carries(QUIET, b"marker-of-the-answer"),
            "plain bytes left the pod"
        );
        topology.await_count(Counter::OrphanedTaken, 0)?;
    }
    Ok(())
}

fn exchange(one: &mut std::net::TcpStream, other: &mut std::net::TcpStream) -> Result<()> {
    let mut got = [0; 4];
    for stream in [&*one, &*other] {
        stream.set_read_timeout(Some(SOON))?;
    }
    one.write_all(b"ping")?;
    other.read_exact(&mut got).context("ping")?;
    other.write_all(b"pong")?;
    one.read_exact(&mut got).context("pong")?;
    ensure!(&got == b"pong");
    Ok(())
}

//! What the pod's applications dial.

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, Shutdown, SocketAddr},
    os::fd::AsFd,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use picomesh_common::{
    Counter, PodConfig, PortRange, StandingKey, Tuple,
    config::{OUTBOUND, owner},
};
use socket2::{Domain, Protocol, Socket, Type};

use crate::{
    Test,
    frames::Wire,
    topology::{
        FAMILIES, OUR_MARK, POD_V4, QUIET, SLOT, SOON, Setup, Topology, accept, accept_within,
        active, attempt, dial, families, needs_ipv6, serve,
    },
};

pub(crate) const TESTS: &[Test] = &[
    (
        "a_connection_lands_on_the_listener_and_names_where_it_went",
        lands_on_the_listener,
    ),
    (
        "bytes_and_both_ends_of_the_stream_survive_the_capture",
        bytes_survive,
    ),
    (
        "without_a_listener_the_syn_waits_and_is_not_refused",
        without_a_listener,
    ),
    (
        "without_a_listener_the_syn_waits_for_long",
        waits_for_a_listener,
    ),
    (
        "fail_open_passes_when_it_is_chosen_and_nothing_stands",
        fail_open,
    ),
    ("skipped_ports_are_never_captured", skipped_ports),
    ("a_mark_without_our_storage_is_no_pass", forged_mark),
    ("the_capture_mark_leads_nowhere", forged_capture_mark),
    (
        "a_taken_connection_whose_proxy_died_never_sends_plain",
        never_plain,
    ),
    ("with_a_listener_back_the_orphan_is_reset", orphan_is_reset),
    ("a_connection_that_stood_before_goes_on", standing_goes_on),
    ("an_unknown_connection_is_dropped", unknown_is_dropped),
    ("leaving_captures_nothing_new_and_lets_ours_finish", leaving),
    ("our_own_sockets_go_out_plainly", ours_go_out),
    ("a_slot_without_configuration_lets_no_tcp_through", inactive),
    (
        "an_ipv4_connection_of_an_ipv6_socket_is_captured_as_ipv4",
        mapped,
    ),
];

fn lands_on_the_listener(setup: &Setup) -> Result<()> {
    let (topology, listeners) = Topology::with_listeners(setup)?;
    for family in families() {
        let destination = SocketAddr::new(family.client, 80);
        let app = dial(&topology.pod, destination)?;
        let (taken, peer) = accept(&listeners.outbound[family.index as usize])?;
        ensure!(
            taken.local_addr()? == destination,
            "{:?}",
            taken.local_addr()
        );
        ensure!(peer == app.local_addr()?, "{peer}");
        ensure!(peer.ip() == family.pod, "{peer}");
    }
    ensure!(
        topology.count(Counter::CapturedOutbound)? == families().count() as u64,
        "{:?}",
        topology.nonzero()?
    );
    Ok(())
}

fn bytes_survive(setup: &Setup) -> Result<()> {
    let (topology, listeners) = Topology::with_listeners(setup)?;
    for family in families() {
        let mut app = dial(&topology.pod, SocketAddr::new(family.client, 80))?;
        let (mut taken, _peer) = accept(&listeners.outbound[family.index as usize])?;
        // Larger than any segment, so that offloads have something to do.
        let sent: Vec<u8> = (0..400_000u32).map(|i| (i % 251) as u8).collect();
        let copy = sent.clone();
        let writer = std::thread::spawn(move || -> Result<Vec<u8>> {
            app.write_all(&copy)?;
            app.shutdown(Shutdown::Write)?;
            let mut back = Vec::new();
            app.set_read_timeout(Some(SOON))?;
            app.read_to_end(&mut back)?;
            Ok(back)
        });
        let mut got = Vec::new();
        taken.read_to_end(&mut got)?;
        ensure!(
            got == sent,
            "{} of {} bytes came through",
            got.len(),
            sent.len()
        );
        taken.write_all(b"late answer")?;
        drop(taken);
        let back = writer
            .join()
            .map_err(|_panic| anyhow::anyhow!("the writer panicked"))??;
        ensure!(back == b"late answer", "{back:?}");
    }
    Ok(())
}

fn without_a_listener(setup: &Setup) -> Result<()> {
    let topology = Topology::new(setup)?;
    for family in families() {
        let server = serve(&topology.client, SocketAddr::new(family.client, 80))?;
        let end = attempt(&topology.pod, server.local_addr()?, QUIET)?;
        ensure!(end == Some(std::io::ErrorKind::TimedOut), "{end:?}");
        ensure!(
            accept_within(&server, QUIET)?.is_none(),
            "it went past in plain"
        );
    }
    ensure!(
        topology.count(Counter::NoOutboundListener)? >= families().count() as u64,
        "{:?}",
        topology.nonzero()?
    );
    // The restart of an agent costs a retransmission and no more.
    let server = SocketAddr::new(FAMILIES[0].client, 81);
    std::thread::scope(|scope| {
        let app = scope.spawn(|| dial(&topology.pod, server));
        std::thread::sleep(QUIET);
        let listeners = topology.listen_as_proxy()?;
        accept(&listeners.outbound[0])?;
        app.join()
            .map_err(|_panic| anyhow::anyhow!("the application panicked"))??;
        Ok(())
    })
}

/// What a tc program drops on the sender's side counts for TCP as congestion of its own host: it
/// tries again every half second, and gives up after the sixth time. A SYN must look lost on its way.
fn waits_for_a_listener(setup: &Setup) -> Result<()> {
    const AWAY: Duration = Duration::from_secs(6);
    const LATE: Duration = Duration::from_secs(30);
    let topology = Topology::new(setup)?;
    let server = SocketAddr::new(FAMILIES[0].client, 80);
    std::thread::scope(|scope| {
        let app = scope.spawn(|| attempt(&topology.pod, server, LATE));
        std::thread::sleep(AWAY);
        let listeners = topology.listen_as_proxy()?;
        let taken = accept_within(&listeners.outbound[0], LATE)?;
        let end = app
            .join()
            .map_err(|_panic| anyhow::anyhow!("the application panicked"))??;
        ensure!(taken.is_some() && end.is_none(), "{end:?}");
        Ok(())
    })
}

fn fail_open(setup: &Setup) -> Result<()> {
    let topology = Topology::new(setup)?;
    let open = PodConfig {
        flags: PodConfig::ACTIVE | PodConfig::FAIL_OPEN,
        ..active()
    };
    topology.loader.set_pod_config(SLOT, &open)?;
    for family in families() {
        let server = serve(&topology.client, SocketAddr::new(family.client, 80))?;
        let mut app = dial(&topology.pod, server.local_addr()?)?;
        let (mut far, _peer) = accept(&server)?;
        app.write_all(b"open")?;
        let mut got = [0; 4];
        far.read_exact(&mut got)?;
        ensure!(&got == b"open");
    }
    ensure!(
        topology.count(Counter::FailedOpen)? == families().count() as u64,
        "{:?}",
        topology.nonzero()?
    );
    Ok(())
}

fn skipped_ports(setup: &Setup) -> Result<()> {
    let (topology, listeners) = Topology::with_listeners(setup)?;
    let mut config = active();
    config.skip_outbound[7] = PortRange {
        first: 5432,
        last: 5433,
    };
    topology.loader.set_pod_config(SLOT, &config)?;
    for family in families() {
        let server = serve(&topology.client, SocketAddr::new(family.client, 5433))?;
        let mut app = dial(&topology.pod, server.local_addr()?)?;
        let (mut far, _peer) = accept(&server)?;
        app.write_all(b"plain")?;
        far.write_all(b"reply")?;
        let mut got = [0; 5];
        far.read_exact(&mut got)?;
        app.set_read_timeout(Some(SOON))?;
        app.read_exact(&mut got)?;
        ensure!(&got == b"reply");
        let nobody = accept_within(&listeners.outbound[family.index as usize], QUIET)?;
        ensure!(nobody.is_none(), "it was captured all the same");
    }
    Ok(())
}

/// CAP_NET_RAW, which containers have by default, is enough to set any mark.
fn forged_mark(setup: &Setup) -> Result<()> {
    let (topology, listeners) = Topology::with_listeners(setup)?;
    for family in families() {
        let server = serve(&topology.client, SocketAddr::new(family.client, 80))?;
        let address = server.local_addr()?;
        let _app = topology.pod.enter(|| marked_dial(OUR_MARK, address))?;
        accept(&listeners.outbound[family.index as usize])
            .context("the forged mark went past the listener")?;
        ensure!(
            accept_within(&server, QUIET)?.is_none(),
            "it went out in plain"
        );
    }
    Ok(())
}

fn forged_capture_mark(setup: &Setup) -> Result<()> {
    let (topology, _listeners) = Topology::with_listeners(setup)?;
    for family in families() {
        let server = serve(&topology.client, SocketAddr::new(family.client, 80))?;
        let address = server.local_addr()?;
        let end = topology
            .pod
            .enter(|| Ok(marked_dial(topology.setup_settings.capture_mark, address).is_ok()))?;
        ensure!(!end, "a connection stood");
        ensure!(
            accept_within(&server, QUIET)?.is_none(),
            "it went out in plain"
        );
    }
    Ok(())
}

/// Rule 4: the agent dies under an open connection, and the application writes.
fn never_plain(setup: &Setup) -> Result<()> {
    for family in families() {
        let (topology, listeners) = Topology::with_listeners(setup)?;
        let mut app = dial(&topology.pod, SocketAddr::new(family.client, 80))?;
        let (taken, _peer) = accept(&listeners.outbound[family.index as usize])?;
        let storage = topology.loader.storage(app.as_fd())?;
        ensure!(storage == Some(owner::TAKEN), "{storage:?}");
        let wire = Wire::open(&topology.node, "topod")?;
        // The kill: nothing of the proxy is left, and its RST finds no way either.
        topology.pod.run("ip link set mesh0 down")?;
        topology.stop_listening(listeners)?;
        vanish(taken)?;
        let before = topology.count(Counter::OrphanedTaken)?;
        app.write_all(b"marker-of-the-request")?;
        ensure!(
            !wire.carries(QUIET, b"marker-of-the-request"),
            "plain bytes left the pod"
        );
        topology.await_count(Counter::OrphanedTaken, before)?;
    }
    Ok(())
}

fn orphan_is_reset(setup: &Setup) -> Result<()> {
    for family in families() {
        let (topology, listeners) = Topology::with_listeners(setup)?;
        let mut app = dial(&topology.pod, SocketAddr::new(family.client, 80))?;
        let (taken, _peer) = accept(&listeners.outbound[family.index as usize])?;
        vanish(taken)?;
        app.write_all(b"anybody there")?;
        app.set_read_timeout(Some(SOON))?;
        let end = app.read(&mut [0; 1]).map_err(|error| error.kind());
        ensure!(end == Err(std::io::ErrorKind::ConnectionReset), "{end:?}");
    }
    Ok(())
}

fn standing_goes_on(setup: &Setup) -> Result<()> {
    let topology = Topology::unattached(setup)?;
    for family in families() {
        let server = serve(&topology.client, SocketAddr::new(family.client, 80))?;
        let mut app = dial(&topology.pod, server.local_addr()?)?;
        let (mut far, _peer) = accept(&server)?;
        // Enrolment: first lenient, then the dump of what stands, then strict.
        let mut config = active();
        config.flags |= PodConfig::ENROLLING;
        topology.loader.set_pod_config(SLOT, &config)?;
        topology.attach()?;
        exchange(&mut app, &mut far)?;
        let key = StandingKey {
            slot: SLOT,
            tuple: Tuple::new(app.local_addr()?, app.peer_addr()?),
        };
        topology.loader.insert_standing(&key)?;
        topology.loader.set_pod_config(SLOT, &active())?;
        exchange(&mut app, &mut far)?;
        topology
            .pod
            .enter(|| Ok(topology.loader.detach(SLOT, &topology.interfaces)?))?;
    }
    Ok(())
}

fn unknown_is_dropped(setup: &Setup) -> Result<()> {
    let topology = Topology::unattached(setup)?;
    for family in families() {
        let server = serve(&topology.client, SocketAddr::new(family.client, 80))?;
        let mut app = dial(&topology.pod, server.local_addr()?)?;
        let (_far, _peer) = accept(&server)?;
        topology.loader.set_pod_config(SLOT, &active())?;
        topology.attach()?;
        let wire = Wire::open(&topology.node, "topod")?;
        let before = topology.count(Counter::UnknownSender)?;
        app.write_all(b"never announced")?;
        ensure!(
            !wire.carries(QUIET, b"never announced"),
            "plain bytes left the pod"
        );
        topology.await_count(Counter::UnknownSender, before)?;
        topology
            .pod
            .enter(|| Ok(topology.loader.detach(SLOT, &topology.interfaces)?))?;
    }
    Ok(())
}

fn leaving(setup: &Setup) -> Result<()> {
    let (topology, listeners) = Topology::with_listeners(setup)?;
    for family in families() {
        topology.loader.set_pod_config(SLOT, &active())?;
        let server = serve(&topology.client, SocketAddr::new(family.client, 80))?;
        let mut ours = dial(&topology.pod, server.local_addr()?)?;
        let (mut taken, _peer) = accept(&listeners.outbound[family.index as usize])?;
        let config = PodConfig {
            flags: PodConfig::ACTIVE | PodConfig::LEAVING,
            ..active()
        };
        topology.loader.set_pod_config(SLOT, &config)?;
        exchange(&mut ours, &mut taken)?;
        let mut new = dial(&topology.pod, server.local_addr()?)?;
        let (mut far, _peer) = accept(&server)?;
        exchange(&mut new, &mut far)?;
    }
    Ok(())
}

fn ours_go_out(setup: &Setup) -> Result<()> {
    let (topology, listeners) = Topology::with_listeners(setup)?;
    for family in families() {
        let server = serve(&topology.client, SocketAddr::new(family.client, 80))?;
        let address = server.local_addr()?;
        let ours = topology.pod.enter(|| {
            let socket = topology.proxy_socket(family.index)?;
            socket.connect_timeout(&address.into(), SOON)?;
            Ok(socket)
        })?;
        let (mut far, _peer) = accept(&server)?;
        exchange(&mut ours.into(), &mut far)?;
        let nobody = accept_within(&listeners.outbound[family.index as usize], QUIET)?;
        ensure!(nobody.is_none(), "the proxy captured itself");
    }
    Ok(())
}

fn inactive(setup: &Setup) -> Result<()> {
    let (topology, _listeners) = Topology::with_listeners(setup)?;
    topology.loader.set_pod_config(SLOT, &PodConfig::EMPTY)?;
    for family in families() {
        let server = serve(&topology.client, SocketAddr::new(family.client, 80))?;
        let end = attempt(&topology.pod, server.local_addr()?, QUIET)?;
        ensure!(end == Some(std::io::ErrorKind::TimedOut), "{end:?}");
    }
    ensure!(
        topology.count(Counter::Inactive)? >= families().count() as u64,
        "{:?}",
        topology.nonzero()?
    );
    // What is not TCP passes.
    let echo = topology
        .client
        .enter(|| Ok(std::net::UdpSocket::bind("10.78.1.2:7")?))?;
    echo.set_read_timeout(Some(SOON))?;
    topology
        .pod
        .enter(|| Ok(std::net::UdpSocket::bind("10.78.2.2:0")?.send_to(b"udp", "10.78.1.2:7")?))?;
    echo.recv_from(&mut [0; 8]).context("UDP did not pass")?;
    Ok(())
}

/// Java opens IPv4 connections like this.
fn mapped(setup: &Setup) -> Result<()> {
    needs_ipv6()?;
    let (topology, listeners) = Topology::with_listeners(setup)?;
    let _app = topology.pod.enter(|| {
        let socket = Socket::new(Domain::IPV6, Type::STREAM, Some(Protocol::TCP))?;
        socket.set_only_v6(false)?;
        let mapped = Ipv4Addr::new(10, 78, 1, 2).to_ipv6_mapped();
        socket.connect_timeout(&SocketAddr::from((mapped, 80)).into(), SOON)?;
        Ok(socket)
    })?;
    let (taken, peer) = accept(&listeners.outbound[0])?;
    ensure!(taken.local_addr()? == SocketAddr::from(([10, 78, 1, 2], 80)));
    ensure!(peer.ip() == POD_V4, "{peer}");
    ensure!(topology.loader.clear_listener(SLOT, OUTBOUND, 0).is_ok());
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

fn marked_dial(mark: u32, to: SocketAddr) -> Result<Socket> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_mark(mark)?;
    socket.connect_timeout(&to.into(), SOON)?;
    Ok(socket)
}

/// Ends a socket without a word on the wire, as an orphan ends that the kernel gave up: in repair
/// mode a disconnect is silent.
pub(crate) fn vanish(stream: std::net::TcpStream) -> Result<()> {
    const TCP_REPAIR: i32 = 19;
    let on = 1i32;
    // SAFETY: an int option of a TCP socket.
    let result = unsafe {
        nix::libc::setsockopt(
            std::os::fd::AsRawFd::as_raw_fd(&stream),
            nix::libc::IPPROTO_TCP,
            TCP_REPAIR,
            (&raw const on).cast(),
            size_of::<i32>() as nix::libc::socklen_t,
        )
    };
    ensure!(
        result == 0,
        "TCP_REPAIR: {}",
        std::io::Error::last_os_error()
    );
    // Not by closing it: a process that another test is just starting has a copy of it.
    let nowhere = nix::libc::sockaddr {
        sa_family: nix::libc::AF_UNSPEC as u16,
        sa_data: [0; 14],
    };
    // SAFETY: a whole address.
    let result = unsafe {
        nix::libc::connect(
            std::os::fd::AsRawFd::as_raw_fd(&stream),
            &raw const nowhere,
            size_of_val(&nowhere) as nix::libc::socklen_t,
        )
    };
    ensure!(
        result == 0,
        "disconnect: {}",
        std::io::Error::last_os_error()
    );
    Ok(())
}

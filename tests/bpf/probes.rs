//! The host's own connections to its pods (rule 9).

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    os::fd::AsFd,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use picomesh_common::{Counter, ProbeState, StandingKey, Tuple, config::owner};
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use crate::{
    Test,
    frames::{Frame, SYN, Wire},
    topology::{
        FAMILIES, QUIET, SLOT, SOON, Setup, Topology, accept, accept_within, dial, dial_from,
        families, needs_ipv6, serve,
    },
};

pub(crate) const TESTS: &[Test] = &[
    (
        "a_socket_of_the_host_reaches_the_application",
        reaches_the_application,
    ),
    (
        "a_probe_that_ends_with_rst_ends_the_applications_socket",
        ends_with_rst,
    ),
    ("an_answer_outlives_the_probes_entry", answer_outlives),
    ("a_stranger_with_the_nodes_address_is_no_probe", stranger),
    ("a_finished_probes_tuple_opens_nothing", finished),
    ("a_dial_that_is_stale_opens_nothing", stale),
    ("an_ipv4_probe_of_an_ipv6_socket_is_known", mapped),
    (
        "sockets_of_other_namespaces_leave_no_trace",
        other_namespaces,
    ),
];

fn reaches_the_application(setup: &Setup) -> Result<()> {
    let (topology, _listeners) = Topology::with_listeners(setup)?;
    topology.watch_probes()?;
    ensure!(topology.loader.host_sockets_attached()?);
    for family in families() {
        let app = serve(&topology.pod, SocketAddr::new(family.pod, 80))?;
        let mut probe = dial(&topology.node, app.local_addr()?)?;
        let (mut served, peer) = accept(&app)?;
        ensure!(peer == probe.local_addr()?, "{peer}");
        probe.write_all(b"GET")?;
        let mut got = [0; 3];
        served.read_exact(&mut got)?;
        served.write_all(b"200")?;
        probe.set_read_timeout(Some(SOON))?;
        probe.read_exact(&mut got)?;
        let storage = topology.loader.storage(served.as_fd())?;
        ensure!(storage == Some(owner::PROBED), "{storage:?}");
    }
    ensure!(
        topology.count(Counter::ProbePassed)? >= families().count() as u64,
        "{:?}",
        topology.nonzero()?
    );
    Ok(())
}

/// A kubelet's TCP probe: connect, then close with linger 0.
fn ends_with_rst(setup: &Setup) -> Result<()> {
    let (topology, _listeners) = Topology::with_listeners(setup)?;
    topology.watch_probes()?;
    for family in families() {
        let app = serve(&topology.pod, SocketAddr::new(family.pod, 80))?;
        let probe = dial(&topology.node, app.local_addr()?)?;
        SockRef::from(&probe).set_linger(Some(Duration::ZERO))?;
        drop(probe);
        let (mut served, _peer) = accept(&app)?;
        let end = served.read(&mut [0; 1]).map_err(|error| error.kind());
        ensure!(end == Err(std::io::ErrorKind::ConnectionReset), "{end:?}");
    }
    ensure!(
        topology.count(Counter::NotStanding)? == 0,
        "{:?}",
        topology.nonzero()?
    );
    Ok(())
}

fn answer_outlives(setup: &Setup) -> Result<()> {
    let (topology, _listeners) = Topology::with_listeners(setup)?;
    topology.watch_probes()?;
    for family in families() {
        let app = serve(&topology.pod, SocketAddr::new(family.pod, 80))?;
        let mut probe = dial(&topology.node, app.local_addr()?)?;
        let (mut served, peer) = accept(&app)?;
        probe.write_all(b"x")?;
        served.read_exact(&mut [0; 1])?;
        // Pushed out by a thousand other probes, say.
        let key = StandingKey {
            slot: SLOT,
            tuple: Tuple::new(served.local_addr()?, peer),
        };
        topology.loader.remove_probe(&key)?;
        served.write_all(b"late")?;
        probe.set_read_timeout(Some(SOON))?;
        let mut got = [0; 4];
        probe
            .read_exact(&mut got)
            .context("the answer was dropped")?;
        probe.write_all(b"more")?;
        served
            .read_exact(&mut got)
            .context("the request was dropped")?;
    }
    Ok(())
}

/// Masqueraded traffic has the node's address too.
fn stranger(setup: &Setup) -> Result<()> {
    let (topology, _listeners) = Topology::with_listeners(setup)?;
    topology.watch_probes()?;
    let wire = Wire::open(&topology.node, "topod")?;
    for family in families() {
        let app = serve(&topology.pod, SocketAddr::new(family.pod, 80))?;
        let _probe = dial(&topology.node, app.local_addr()?)?;
        accept(&app)?;
        let (passed, captured) = (
            topology.count(Counter::ProbePassed)?,
            topology.count(Counter::CapturedInbound)?,
        );
        let from = SocketAddr::new(family.node, 43_000);
        wire.send(&Frame::to_pod(from, app.local_addr()?, SYN).bytes())?;
        topology.await_count(Counter::CapturedInbound, captured)?;
        ensure!(
            topology.count(Counter::ProbePassed)? == passed,
            "{:?}",
            topology.nonzero()?
        );
    }
    Ok(())
}

fn finished(setup: &Setup) -> Result<()> {
    let (topology, _listeners) = Topology::with_listeners(setup)?;
    topology.watch_probes()?;
    let wire = Wire::open(&topology.node, "topod")?;
    for family in families() {
        let app = serve(&topology.pod, SocketAddr::new(family.pod, 80))?;
        for (port, close_first) in [(44_000, false), (44_001, true)] {
            let from = SocketAddr::new(family.node, port);
            let probe = dial_from(&topology.node, from, app.local_addr()?)?;
            let (served, _peer) = accept(&app)?;
            SockRef::from(&probe).set_linger(Some(Duration::ZERO))?;
            let open = if close_first {
                None
            } else {
                Some((probe, served))
            };
            std::thread::sleep(QUIET / 4);
            let (passed, captured) = (
                topology.count(Counter::ProbePassed)?,
                topology.count(Counter::CapturedInbound)?,
            );
            wire.send(&Frame::to_pod(from, app.local_addr()?, SYN).bytes())?;
            topology.await_count(Counter::CapturedInbound, captured)?;
            ensure!(
                topology.count(Counter::ProbePassed)? == passed,
                "{:?}",
                topology.nonzero()?
            );
            ensure!(
                accept_within(&app, QUIET / 4)?.is_none(),
                "the application accepted it"
            );
            drop(open);
        }
    }
    Ok(())
}

fn stale(setup: &Setup) -> Result<()> {
    let (topology, _listeners) = Topology::with_listeners(setup)?;
    let wire = Wire::open(&topology.node, "topod")?;
    for family in families() {
        let app = serve(&topology.pod, SocketAddr::new(family.pod, 80))?;
        let from = SocketAddr::new(family.node, 45_000);
        let key = StandingKey {
            slot: SLOT,
            tuple: Tuple::new(app.local_addr()?, from),
        };
        let state = ProbeState {
            since_ns: 1,
            phase: ProbeState::DIALLING,
            _pad: 0,
        };
        topology.loader.insert_probe(&key, &state)?;
        let captured = topology.count(Counter::CapturedInbound)?;
        wire.send(&Frame::to_pod(from, app.local_addr()?, SYN).bytes())?;
        topology.await_count(Counter::CapturedInbound, captured)?;
        ensure!(
            topology.count(Counter::ProbePassed)? == 0,
            "{:?}",
            topology.nonzero()?
        );
    }
    Ok(())
}

fn mapped(setup: &Setup) -> Result<()> {
    needs_ipv6()?;
    let (topology, _listeners) = Topology::with_listeners(setup)?;
    topology.watch_probes()?;
    let app = serve(&topology.pod, SocketAddr::new(FAMILIES[0].pod, 80))?;
    let _probe: TcpStream = topology.node.enter(|| {
        let socket = Socket::new(Domain::IPV6, Type::STREAM, Some(Protocol::TCP))?;
        socket.set_only_v6(false)?;
        let mapped = std::net::Ipv4Addr::new(10, 78, 2, 2).to_ipv6_mapped();
        socket.connect_timeout(&SocketAddr::from((mapped, 80)).into(), SOON)?;
        Ok(socket.into())
    })?;
    accept(&app)?;
    Ok(())
}

fn other_namespaces(setup: &Setup) -> Result<()> {
    let (topology, listeners) = Topology::with_listeners(setup)?;
    topology.watch_probes()?;
    for family in families() {
        let app = serve(&topology.pod, SocketAddr::new(family.pod, 80))?;
        let _client = dial(&topology.client, app.local_addr()?)?;
        accept(&listeners.inbound[family.index as usize])?;
    }
    let probes = topology.loader.probes()?;
    ensure!(probes.is_empty(), "{probes:?}");
    Ok(())
}

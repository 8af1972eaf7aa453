//! Packets that an application's options or a neighbour's hands make odd (rule 2).

use std::{
    io::Write,
    net::{IpAddr, SocketAddr},
};

use anyhow::{Context, Result, ensure};
use nix::libc;
use picomesh_common::Counter;
use socket2::{Domain, Protocol, Socket, Type};

use crate::{
    Test,
    frames::{Frame, SYN, Wire},
    topology::{
        FAMILIES, Listeners, QUIET, SOON, Setup, Topology, accept, accept_within, families,
        needs_ipv6, serve,
    },
};

pub(crate) const TESTS: &[Test] = &[
    (
        "one_vlan_tag_is_seen_through_and_more_are_dropped",
        vlan_tags,
    ),
    ("ip_options_and_extension_headers_are_walked", options),
    ("too_many_extension_headers_are_dropped", too_many),
    ("fragments_in_both_orders_are_dropped", fragments),
    (
        "an_applications_ip_options_do_not_lead_past_us",
        own_options,
    ),
];

/// The kernel takes the first tag off before tc and the inner ones after it.
fn vlan_tags(setup: &Setup) -> Result<()> {
    let (topology, _listeners) = Topology::with_listeners(setup)?;
    let wire = Wire::open(&topology.node, "topod")?;
    for family in families() {
        let app = serve(&topology.pod, SocketAddr::new(family.pod, 80))?;
        let frame = Frame::to_pod(
            SocketAddr::new(family.client, 46_000),
            app.local_addr()?,
            SYN,
        );
        let captured = topology.count(Counter::CapturedInbound)?;
        wire.send(&frame.clone().tagged(1).bytes())?;
        topology.await_count(Counter::CapturedInbound, captured)?;
        for tags in [2, 3] {
            let dropped = topology.count(Counter::UnknownEthertype)?;
            wire.send(&frame.clone().tagged(tags).bytes())?;
            topology
                .await_count(Counter::UnknownEthertype, dropped)
                .with_context(|| format!("{tags} tags"))?;
        }
    }
    Ok(())
}

fn options(setup: &Setup) -> Result<()> {
    let (topology, _listeners) = Topology::with_listeners(setup)?;
    let wire = Wire::open(&topology.node, "topod")?;
    for (index, family) in families().enumerate() {
        let app = serve(&topology.pod, SocketAddr::new(family.pod, 80))?;
        let from = SocketAddr::new(family.client, 46_100);
        let frame = Frame::to_pod(from, app.local_addr()?, SYN);
        let odd = if index == 0 {
            [frame.clone().options(4), frame.clone().options(40)]
        } else {
            [frame.clone().extensions(1), frame.clone().extensions(8)]
        };
        for frame in odd {
            let captured = topology.count(Counter::CapturedInbound)?;
            wire.send(&frame.bytes())?;
            topology.await_count(Counter::CapturedInbound, captured)?;
        }
        ensure!(accept_within(&app, QUIET / 4)?.is_none());
    }
    Ok(())
}

fn too_many(setup: &Setup) -> Result<()> {
    needs_ipv6()?;
    let (topology, _listeners) = Topology::with_listeners(setup)?;
    let wire = Wire::open(&topology.node, "topod")?;
    let family = FAMILIES[1];
    let app = serve(&topology.pod, SocketAddr::new(family.pod, 80))?;
    let from = SocketAddr::new(family.client, 46_200);
    wire.send(
        &Frame::to_pod(from, app.local_addr()?, SYN)
            .extensions(9)
            .bytes(),
    )?;
    topology.await_count(Counter::TooManyExtensions, 0)?;
    nothing_reached(&topology)
}

fn fragments(setup: &Setup) -> Result<()> {
    let (topology, _listeners) = Topology::with_listeners(setup)?;
    let wire = Wire::open(&topology.node, "topod")?;
    for family in families() {
        let app = serve(&topology.pod, SocketAddr::new(family.pod, 80))?;
        let from = SocketAddr::new(family.client, 46_300);
        let frame = Frame::to_pod(from, app.local_addr()?, SYN).payload(&[0; 20]);
        // The whole header in the first, and a tiny first that tells only the ports.
        for first in [24, 8] {
            for backwards in [false, true] {
                let mut parts = frame.fragments(first);
                if backwards {
                    parts.reverse();
                }
                let dropped = topology.count(Counter::Fragment)?;
                for part in &parts {
                    wire.send(part)?;
                }
                topology.await_count(Counter::Fragment, dropped + 1)?;
            }
        }
    }
    nothing_reached(&topology)
}

/// Any process may set these.
fn own_options(setup: &Setup) -> Result<()> {
    let (topology, listeners): (_, Listeners) = Topology::with_listeners(setup)?;
    let wire = Wire::open(&topology.node, "topod")?;
    for family in families() {
        let server = SocketAddr::new(family.client, 80);
        let mut app: std::net::TcpStream = topology.pod.enter(|| {
            let socket = Socket::new(
                Domain::for_address(server),
                Type::STREAM,
                Some(Protocol::TCP),
            )?;
            add_options(&socket, family.pod)?;
            socket.connect_timeout(&server.into(), SOON)?;
            Ok(socket.into())
        })?;
        let (taken, _peer) = accept(&listeners.outbound[family.index as usize])?;
        ensure!(taken.local_addr()? == server);
        app.write_all(b"marker-behind-options")?;
        ensure!(
            !wire.carries(QUIET, b"marker-behind-options"),
            "plain bytes left the pod"
        );
    }
    Ok(())
}

/// Four no-operations (IPv4) or a destination option that is padding (IPv6).
fn add_options(socket: &Socket, family: IpAddr) -> Result<()> {
    const IP_OPTIONS: i32 = 4;
    const IPV6_DSTOPTS: i32 = 59;
    let (level, name, value): (_, _, &[u8]) = match family {
        IpAddr::V4(_) => (libc::IPPROTO_IP, IP_OPTIONS, &[1, 1, 1, 1]),
        IpAddr::V6(_) => (libc::IPPROTO_IPV6, IPV6_DSTOPTS, &[0, 0, 1, 4, 0, 0, 0, 0]),
    };
    // SAFETY: the value is as long as told.
    let result = unsafe {
        libc::setsockopt(
            std::os::fd::AsRawFd::as_raw_fd(socket),
            level,
            name,
            value.as_ptr().cast(),
            value.len() as libc::socklen_t,
        )
    };
    ensure!(
        result == 0,
        "setsockopt: {}",
        std::io::Error::last_os_error()
    );
    Ok(())
}

/// An application that got the SYN would answer, and its answer is an unknown sender's.
fn nothing_reached(topology: &Topology) -> Result<()> {
    std::thread::sleep(QUIET / 2);
    let answered = topology.count(Counter::UnknownSender)?;
    ensure!(
        answered == 0,
        "the application answered: {:?}",
        topology.nonzero()?
    );
    Ok(())
}

//! What an application in a captured pod may do to its own sockets to get around the mesh.

use std::{
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    os::fd::AsRawFd,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use nix::libc;
use picomesh_tests::{
    Pod, raw,
    server::{Habit, Server},
};
use serde_json::Value;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use super::{Ground, PORT};

const MARKER: &[u8] = b"an-application-says-this-in-plain";
const PATIENCE: Duration = Duration::from_secs(3);

pub(super) fn options_and_extension_headers_leave_nothing_plain() -> Result<()> {
    let mut ground = Ground::new()?;
    let _server = Server::start(ground.far.netns(), PORT, Habit::Echo)?;
    let targets = [ground.far.at(PORT), ground.far.at6(PORT)];

    let capture = ground.world.capture_wire(&[MARKER])?;
    for (number, to) in targets.into_iter().enumerate() {
        ensure!(
            talk(&ground.near, to, wear_headers, None)?,
            "{to} does not echo without the mesh"
        );
        ensure!(
            capture.wait_found(0, PATIENCE)? > number as u64,
            "the search does not find what goes to {to} in plain"
        );
    }
    capture.stop()?;

    ground.mesh()?;
    let capture = ground.world.capture_wire(&[MARKER])?;
    let mut served = Vec::new();
    for to in targets {
        served.push((to, talk(&ground.near, to, wear_headers, None)?));
    }
    let seen = capture.stop()?;
    ensure!(seen.found[0] == 0, "plain bytes are on the wire");
    let bare = ground.bare_packets(&seen);
    ensure!(bare == 0, "{bare} packets name the pods on the wire");
    // The headers are walked, not feared: such a connection is taken like any other.
    for (to, served) in served {
        ensure!(served, "a connection with headers to {to} is not served");
    }
    Ok(())
}

pub(super) fn a_forged_mark_sends_nothing_plain() -> Result<()> {
    let mut ground = Ground::new()?;
    let _server = Server::start(ground.far.netns(), PORT, Habit::Echo)?;
    let targets = [ground.far.at(PORT), ground.far.at6(PORT)];

    let capture = ground.world.capture_wire(&[MARKER])?;
    let mark = |socket: &Socket| Ok(socket.set_mark(0x1234)?);
    for (number, to) in targets.into_iter().enumerate() {
        ensure!(
            talk(&ground.near, to, mark, None)?,
            "{to} does not echo without the mesh"
        );
        ensure!(
            capture.wait_found(0, PATIENCE)? > number as u64,
            "the search does not find what goes to {to} in plain"
        );
    }
    capture.stop()?;

    ground.mesh()?;
    let capture = ground.world.capture_wire(&[MARKER])?;
    for name in ["ours", "capture"] {
        let mark = mark_of_the_agent(&ground, name)?;
        for to in targets {
            // From the first packet on, and when the connection stands already.
            talk(&ground.near, to, |socket| Ok(socket.set_mark(mark)?), None)?;
            talk(&ground.near, to, |_| Ok(()), Some(mark))?;
        }
    }
    let seen = capture.stop()?;
    ensure!(seen.found[0] == 0, "plain bytes are on the wire");
    let bare = ground.bare_packets(&seen);
    ensure!(bare == 0, "{bare} packets name the pods on the wire");
    Ok(())
}

/// Connects with a prepared socket, says the marker and waits for the echo: whether it came.
fn talk(
    pod: &Pod,
    to: SocketAddr,
    prepare: impl Fn(&Socket) -> Result<()> + Sync,
    mark_later: Option<u32>,
) -> Result<bool> {
    pod.run(|| {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?;
        prepare(&socket).with_context(|| format!("prepare the socket for {to}"))?;
        if socket
            .connect_timeout(&SockAddr::from(to), PATIENCE)
            .is_err()
        {
            return Ok(false);
        }
        if let Some(mark) = mark_later {
            socket.set_mark(mark)?;
        }
        let mut stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut echo = vec![0; MARKER.len()];
        Ok(stream.write_all(MARKER).is_ok()
            && stream.read_exact(&mut echo).is_ok()
            && echo == MARKER)
    })
}

/// IP options, as any process may set them; IPv6 destination options.
fn wear_headers(socket: &Socket) -> Result<()> {
    let local = socket.domain()?;
    if local == Domain::IPV4 {
        return Ok(raw::set_ip_options(socket, &[1, 1, 1, 1])?);
    }
    // Next header (filled in by the kernel), length 0 (eight bytes), PadN of four bytes.
    let header = [0_u8, 0, 1, 4, 0, 0, 0, 0];
    // SAFETY: pointer and length describe `header`, which outlives the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IPV6,
            libc::IPV6_DSTOPTS,
            header.as_ptr().cast(),
            header.len() as libc::socklen_t,
        )
    };
    ensure!(
        result == 0,
        "set destination options: {}",
        std::io::Error::last_os_error()
    );
    Ok(())
}

/// What an attacker would have to guess among sixteen million.
fn mark_of_the_agent(ground: &Ground, name: &str) -> Result<u32> {
    let file = ground.world.run_dir(&ground.world.node(0)?).join("marks");
    let text = fs::read(&file).with_context(|| format!("read {}", file.display()))?;
    let marks: Value = serde_json::from_slice(&text)?;
    let mark = marks["content"][name]
        .as_u64()
        .with_context(|| format!("{} has no mark {name}: {marks}", file.display()))?;
    Ok(u32::try_from(mark)?)
}

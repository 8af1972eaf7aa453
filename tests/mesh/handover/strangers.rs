//! Who calls `handover.sock` and is no agent.

use std::{
    fs,
    os::{fd::OwnedFd, unix::fs::PermissionsExt},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};
use nix::{
    libc,
    sys::socket::{
        AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, send, socket,
    },
};
use std::os::fd::AsRawFd;

use picomesh_tests::{
    AgentOptions,
    server::{Habit, Server},
};

use super::{ends, succeed};
use crate::ground::{Ground, PORT, served};

const SOCKET: &str = "handover.sock";
/// `nobody`.
const STRANGER: u32 = 65_534;

pub(super) fn strangers_at_the_socket_get_nothing_and_keep_nobody_out() -> Result<()> {
    let mut ground = Ground::new()?;
    let _echo = Server::start(ground.far.netns(), PORT, Habit::Echo)?;
    ground.mesh()?;
    let agent = ground.agent(0)?;
    let path = agent.run_dir().join(SOCKET);
    let files = open_files(agent.process().pid())?;

    // Whoever is not root is not even listened to, should the directory ever let it in.
    let mode = fs::metadata(&path)?.permissions().mode();
    ensure!(mode & 0o777 == 0o600, "{SOCKET} has mode {mode:o}");
    let opened = [(agent.run_dir(), 0o711), (&path, 0o666)];
    for (path, mode) in opened {
        fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
    }
    let said = as_stranger(&path, br#"{"message":"hello","protocol":1}"#)?;
    ensure!(said.is_empty(), "a stranger was told {said:?}");
    for (path, mode) in [(agent.run_dir(), 0o700), (&path, 0o600)] {
        fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
    }
    agent.wait_log(&["stranger", "65534"], Duration::from_secs(5))?;

    // Root that talks nonsense is refused, and root that says nothing is not waited for.
    let long = vec![b'{'; 64 * 1024];
    for nonsense in [
        &b"\0"[..],
        b"{\"message\":\"hello\"}",
        b"{\"message\":\"taken\"}",
        &long,
    ] {
        let said = converse(&path, nonsense)?;
        ensure!(
            said.contains("refused"),
            "{:?} is answered by {said:?}",
            String::from_utf8_lossy(&nonsense[..nonsense.len().min(40)])
        );
    }
    let silent: Vec<OwnedFd> = (0..16).map(|_| call(&path)).collect::<Result<_>>()?;
    let asked = Instant::now();
    let before = succeed(&mut ground, 0, &AgentOptions::default())
        .context("with sixteen silent callers before it")?;
    ensure!(
        asked.elapsed() < Duration::from_secs(25),
        "silent callers kept the successor out for {:?}",
        asked.elapsed()
    );
    drop(silent);
    ends(&before)?;
    let now = open_files(ground.agent(0)?.process().pid())?;
    ensure!(
        now < files + 8,
        "{files} files were open before, {now} are now"
    );
    ensure!(served(&ground.near, ground.far.at(PORT)), "not served");
    Ok(())
}

fn open_files(pid: i32) -> Result<usize> {
    Ok(fs::read_dir(format!("/proc/{pid}/fd"))?.count())
}

fn call(path: &Path) -> Result<OwnedFd> {
    let fd = socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    connect(fd.as_raw_fd(), &UnixAddr::new(path)?)
        .with_context(|| format!("connect to {}", path.display()))?;
    Ok(fd)
}

/// Everything that is answered to one packet, until the other side hangs up.
fn converse(path: &Path, packet: &[u8]) -> Result<String> {
    let fd = call(path)?;
    // It may have hung up already.
    let _sent = send(fd.as_raw_fd(), packet, MsgFlags::MSG_NOSIGNAL);
    let mut said = String::new();
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match recv(fd.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
            Ok(0) | Err(_) => return Ok(said),
            Ok(n) => said.push_str(&String::from_utf8_lossy(&buffer[..n])),
        }
    }
}

/// The same from a thread that has given up being root.
fn as_stranger(path: &Path, packet: &'static [u8]) -> Result<String> {
    let path = path.to_owned();
    thread::spawn(move || {
        // Not by libc's function, which changes every thread of the process.
        // SAFETY: the call takes three numbers and changes the calling thread's identity alone.
        let changed = unsafe { libc::syscall(libc::SYS_setresuid, STRANGER, STRANGER, STRANGER) };
        ensure!(changed == 0, "become uid {STRANGER}");
        converse(&path, packet)
    })
    .join()
    .map_err(|_| anyhow!("the stranger panicked"))?
}

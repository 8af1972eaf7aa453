//! A named network namespace, and code that runs inside it.
//!
//! A network namespace belongs to a thread, so everything here either runs on a thread of its own
//! ([`Netns::run`]) or in a child between fork and exec ([`Netns::enter`]).

use std::{
    fs::File,
    io::{self, Write},
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
    thread,
};

use anyhow::{Context, Result, anyhow, ensure};
use nix::sched::{CloneFlags, setns};

use crate::requirements;

/// Where `ip netns` keeps its names.
pub const NETNS_DIR: &str = "/run/netns";

/// Cheap to clone; the namespace lives until [`delete`] is called with its name.
#[derive(Clone, Debug)]
pub struct Netns {
    name: Arc<str>,
    file: Arc<File>,
}

impl Netns {
    /// Makes the namespace, with lo up.
    pub fn create(name: &str) -> Result<Self> {
        ip(&["netns", "add", name])?;
        let netns = Self::open(name)?;
        // No duplicate address detection: link-local addresses serve at once, and a router needs
        // one to ask for its neighbours.
        for scope in ["all", "default"] {
            netns.sysctl(&format!("net/ipv6/conf/{scope}/accept_dad"), "0")?;
        }
        netns.ip("link set lo up")?;
        Ok(netns)
    }

    pub fn open(name: &str) -> Result<Self> {
        let path = Path::new(NETNS_DIR).join(name);
        let file = File::open(&path).with_context(|| format!("open {}", path.display()))?;
        Ok(Self {
            name: name.into(),
            file: Arc::new(file),
        })
    }

    /// The namespace of the calling thread.
    pub fn current() -> Result<Self> {
        let path = Path::new("/proc/thread-self/ns/net");
        let file = File::open(path).with_context(|| format!("open {}", path.display()))?;
        Ok(Self {
            name: "current".into(),
            file: Arc::new(file),
        })
    }

    /// The namespace that a process lives in. It needs no name, and has none that others know.
    pub fn of_process(pid: i32) -> Result<Self> {
        let path = format!("/proc/{pid}/ns/net");
        let file = File::open(&path).with_context(|| format!("open {path}"))?;
        Ok(Self {
            name: format!("of process {pid}").into(),
            file: Arc::new(file),
        })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn path(&self) -> PathBuf {
        Path::new(NETNS_DIR).join(&*self.name)
    }

    /// Moves the calling thread in, for good.
    pub fn enter(&self) -> io::Result<()> {
        Ok(setns(self.file.as_fd(), CloneFlags::CLONE_NEWNET)?)
    }

    /// Runs `f` on a thread inside and waits for it. A panic inside goes on outside.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let inside = scope.spawn(move || {
                if let Err(e) = self.enter() {
                    panic!("enter network namespace {}: {e}", self.name);
                }
                f()
            });
            match inside.join() {
                Ok(value) => value,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// Starts a named thread inside that outlives the call.
    pub fn spawn<T: Send + 'static>(
        &self,
        name: &str,
        f: impl FnOnce() -> T + Send + 'static,
    ) -> Result<thread::JoinHandle<T>> {
        let netns = self.clone();
        thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                if let Err(e) = netns.enter() {
                    panic!("enter network namespace {}: {e}", netns.name);
                }
                f()
            })
            .with_context(|| format!("start thread {name}"))
    }

    /// Runs lines of `ip` commands inside (`link set lo up`, one a line).
    ///
    /// Not by `ip -n`: that mounts, which fails in a chroot whose root is no mount point. On a
    /// kernel without IPv6 the lines with its addresses are left out.
    pub fn ip(&self, script: &str) -> Result<()> {
        let script: String = script
            .lines()
            .filter(|line| requirements::ipv6() || !line.contains("::"))
            .flat_map(|line| [line, "\n"])
            .collect();
        self.feed("ip", &["-batch", "-"], &script)
            .context("the package iproute2 has it")
    }

    /// Sets `net.…` inside: `netns.sysctl("net/ipv4/ip_forward", "1")`.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        if key.starts_with("net/ipv6/") && !requirements::ipv6() {
            return Ok(());
        }
        self.run(|| std::fs::write(Path::new("/proc/sys").join(key), value))
            .with_context(|| format!("set {key} to {value} in {}", self.name))
    }

    /// What `/proc/net/FILE` says inside.
    pub fn proc_net(&self, file: &str) -> io::Result<String> {
        self.run(|| std::fs::read_to_string(Path::new("/proc/thread-self/net").join(file)))
    }

    /// Runs nftables rules inside.
    pub fn nft(&self, script: &str) -> Result<()> {
        self.feed("nft", &["-f", "-"], script)
            .context("the package nftables has it")
    }

    /// Runs a program inside that reads `script`.
    fn feed(&self, program: &str, args: &[&str], script: &str) -> Result<()> {
        self.run(|| {
            let mut child = Command::new(program)
                .args(args)
                .stdin(Stdio::piped())
                .stdout(Stdio::null())
                .stderr(Stdio::piped())
                .spawn()
                .with_context(|| format!("start `{program}`"))?;
            if let Some(mut stdin) = child.stdin.take() {
                stdin.write_all(script.as_bytes())?;
            }
            let output = child.wait_with_output()?;
            ensure!(
                output.status.success(),
                "{program} {} in {}: {}\n{script}",
                args.join(" "),
                self.name,
                String::from_utf8_lossy(&output.stderr).trim()
            );
            Ok(())
        })
    }

    /// The interface's Ethernet address.
    pub fn mac(&self, interface: &str) -> Result<[u8; 6]> {
        let output = self.run(|| {
            Command::new("ip")
                .args(["-o", "link", "show", "dev", interface])
                .output()
        })?;
        let line = String::from_utf8_lossy(&output.stdout).into_owned();
        let text = line
            .split_whitespace()
            .skip_while(|w| *w != "link/ether")
            .nth(1)
            .ok_or_else(|| anyhow!("{interface} in {} has no Ethernet address", self.name))?;
        let mut mac = [0; 6];
        for (byte, part) in mac.iter_mut().zip(text.split(':')) {
            *byte = u8::from_str_radix(part, 16)?;
        }
        Ok(mac)
    }
}

impl AsRef<Netns> for Netns {
    fn as_ref(&self) -> &Netns {
        self
    }
}

/// Takes the name away; the namespace goes with its last process and socket.
pub fn delete(name: &str) -> Result<()> {
    ip(&["netns", "del", name])
}

/// Names of all namespaces that start with `prefix`.
pub fn list(prefix: &str) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(NETNS_DIR) else {
        return Vec::new();
    };
    let mut names: Vec<String> = entries
        .flatten()
        .filter_map(|e| e.file_name().into_string().ok())
        .filter(|name| name.starts_with(prefix))
        .collect();
    names.sort();
    names
}

fn ip(args: &[&str]) -> Result<()> {
    let output = Command::new("ip")
        .args(args)
        .output()
        .context("start `ip`; install the package iproute2")?;
    ensure!(
        output.status.success(),
        "ip {}: {}",
        args.join(" "),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}

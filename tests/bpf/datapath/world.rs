//! Namespaces for the datapath's tests: made by name, gone with the value.

use std::{
    process::{Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, setns};
use picomesh_tests::requirements;

/// A network namespace with loopback up.
pub(crate) struct Netns {
    pub(crate) name: String,
}

impl Netns {
    pub(crate) fn new(purpose: &str) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("datapath-{purpose}-{}-{number}", std::process::id());
        run(&["ip", "netns", "add", &name])?;
        let netns = Self { name };
        netns.ip(&["link", "set", "lo", "up"])?;
        Ok(netns)
    }

    pub(crate) fn path(&self) -> std::path::PathBuf {
        std::path::Path::new("/run/netns").join(&self.name)
    }

    /// `ip …` inside.
    pub(crate) fn ip(&self, args: &[&str]) -> Result<String> {
        self.exec(&[&["ip"], args].concat())
    }

    /// Runs a program inside. Not by `ip netns exec`: that mounts, which fails in a chroot whose
    /// root is no mount point.
    pub(crate) fn exec(&self, args: &[&str]) -> Result<String> {
        self.run(|| run(args))?
    }

    /// Runs `work` on a thread inside.
    pub(crate) fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        let file = std::fs::File::open(self.path())?;
        thread::scope(|scope| {
            let inside = scope.spawn(move || {
                setns(file, CloneFlags::CLONE_NEWNET)?;
                Ok(work())
            });
            match inside.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// A wire from `eth0` here to `eth0` there, up, with these addresses at each end.
    pub(crate) fn connect_eth0(&self, other: &Netns, here: &[&str], there: &[&str]) -> Result<()> {
        self.ip(&[
            "link",
            "add",
            "eth0",
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            &other.name,
        ])?;
        for (netns, addresses) in [(self, here), (other, there)] {
            for address in addresses {
                if address.contains(':') && !requirements::ipv6() {
                    continue;
                }
                let length = if address.contains(':') { 64 } else { 24 };
                netns.ip(&[
                    "addr",
                    "add",
                    &format!("{address}/{length}"),
                    "dev",
                    "eth0",
                    "nodad",
                ])?;
            }
            // A link-local address would come a while after the carrier and spoil the pictures.
            if requirements::ipv6() {
                netns.ip(&["link", "set", "eth0", "addrgenmode", "none"])?;
            }
            netns.ip(&["link", "set", "eth0", "up"])?;
        }
        for netns in [self, other] {
            // The carrier is noticed by a worker of the kernel's.
            for _ in 0..100 {
                if netns.ip(&["link", "show", "eth0"])?.contains("state UP") {
                    break;
                }
                thread::sleep(Duration::from_millis(20));
            }
        }
        Ok(())
    }

    /// Everything in it that an enrolment could change, as text.
    pub(crate) fn picture(&self) -> Result<String> {
        let mut picture = String::new();
        for args in [
            &["-d", "link"][..],
            &["addr"],
            &["-4", "rule"],
            &["-6", "rule"],
            &["-4", "route", "show", "table", "all"],
            &["-6", "route", "show", "table", "all"],
        ] {
            if requirements::ipv6() || args[0] != "-6" {
                picture.push_str(&self.ip(args)?);
            }
        }
        Ok(picture)
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        if let Err(error) = run(&["ip", "netns", "del", &self.name]) {
            eprintln!("{error:#}");
        }
    }
}

/// Says what is only in one of two pictures.
pub(crate) fn ensure_same(before: &str, after: &str) -> Result<()> {
    let only = |one: &str, other: &str| -> Vec<String> {
        one.lines()
            .filter(|line| !other.lines().any(|l| l == *line))
            .map(str::to_owned)
            .collect()
    };
    let (gone, new) = (only(before, after), only(after, before));
    ensure!(before == after, "gone: {gone:#?}, new: {new:#?}");
    Ok(())
}

pub(crate) fn run(command: &[&str]) -> Result<String> {
    let (program, args) = command.split_first().context("an empty command")?;
    let output = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .output()
        .with_context(|| command.join(" "))?;
    ensure!(
        output.status.success(),
        "{}: {}",
        command.join(" "),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

//! Namespaces for the datapath's tests: made by name, gone with the value.

use std::{
    process::{Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    thread,
};

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, setns};

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

    /// `ip -n NAME …`
    pub(crate) fn ip(&self, args: &[&str]) -> Result<String> {
        let mut all = vec!["ip", "-n", &self.name];
        all.extend(args);
        run(&all)
    }

    pub(crate) fn exec(&self, args: &[&str]) -> Result<String> {
        let mut all = vec!["ip", "netns", "exec", &self.name];
        all.extend(args);
        run(&all)
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

    /// `eth0` here and `peer` there, up, with these addresses (`10.0.0.2/24`) on each.
    pub(crate) fn connect(
        &self,
        other: &Netns,
        peer: &str,
        here: &[&str],
        there: &[&str],
    ) -> Result<()> {
        self.ip(&[
            "link",
            "add",
            "eth0",
            "type",
            "veth",
            "peer",
            "name",
            peer,
            "netns",
            &other.name,
        ])?;
        for (netns, device, addresses) in [(self, "eth0", here), (other, peer, there)] {
            for address in addresses {
                netns.ip(&["addr", "add", address, "dev", device, "nodad"])?;
            }
            netns.ip(&["link", "set", device, "up"])?;
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
            picture.push_str(&self.ip(args)?);
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

//! `cargo xtask setup`: gets what the verbs need. Debian packages by apt-get, the rest by
//! `cargo install` into the cache. Does nothing, in no time, when nothing is missing.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Command, ExitCode, Stdio},
};

use anyhow::{Context, Result, bail};
use nix::unistd::geteuid;
use picomesh_tests::requirements;

use crate::{
    cache::Tool,
    kubernetes,
    needs::{self, Need, Purpose, Source},
    shell,
};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only what is needed for this; everything if not given
    #[arg(long = "for", value_name = "PURPOSE")]
    purposes: Vec<Purpose>,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let purposes = if args.purposes.is_empty() {
        Purpose::ALL.to_vec()
    } else {
        args.purposes.clone()
    };
    let missing: Vec<&Need> = needs::of(&purposes).filter(|n| !n.is_met()).collect();
    if missing.is_empty() {
        println!("nothing is missing");
    } else {
        get(&missing)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Packages first: the tools are built with them.
pub(crate) fn get(missing: &[&Need]) -> Result<()> {
    let mut packages = Vec::new();
    let mut tools: Vec<&Tool> = Vec::new();
    let mut kubernetes = false;
    for need in missing {
        println!("{} is missing: {}", need.name(), need.why);
        match &need.source {
            Source::Package(name, _) => packages.push(*name),
            Source::Tool(tool) => tools.push(tool),
            Source::Kubernetes => kubernetes = true,
        }
    }
    if !packages.is_empty() {
        install_packages(&packages)?;
    }
    for tool in tools {
        tool.install()?;
    }
    if kubernetes {
        kubernetes::NEWEST.install()?;
    }
    if let Some(need) = missing.iter().find(|n| !n.is_met()) {
        bail!("{} is still missing after setup: {}", need.name(), need.why);
    }
    Ok(())
}

fn install_packages(packages: &[&str]) -> Result<()> {
    let list = packages.join(" ");
    if !requirements::program("apt-get") {
        bail!("no apt-get here; install what Debian calls {list}, then try again");
    }
    if !geteuid().is_root() {
        bail!("not root; call: sudo apt-get install --no-install-recommends {list}");
    }
    // A policy that forbids to start daemons: what is installed here runs in namespaces only.
    let _policy = NoDaemons::forbid()?;
    if lists_are_empty() {
        shell::run(apt().args(["-q", "update"]))?;
    }
    let install = || {
        shell::run(
            apt()
                .args(["-q", "-y", "--no-install-recommends", "install"])
                .args(packages),
        )
    };
    // Lists that are old name versions that are gone: read them again, once.
    install().or_else(|_| {
        shell::run(apt().args(["-q", "update"]))?;
        install()
    })?;
    for package in packages {
        disable_unit(package);
    }
    Ok(())
}

fn apt() -> Command {
    let mut apt = Command::new("apt-get");
    apt.env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(Stdio::null());
    apt
}

fn lists_are_empty() -> bool {
    !fs::read_dir("/var/lib/apt/lists").is_ok_and(|entries| {
        entries
            .flatten()
            .any(|e| e.file_name().to_string_lossy().contains("_Packages"))
    })
}

/// A daemon that we brought does not start at the next boot either. Only called for packages that
/// were not there before.
fn disable_unit(package: &str) {
    let unit = match package {
        "nginx-light" => "nginx",
        "redis-server" => "redis-server",
        "haproxy" => "haproxy",
        "etcd-server" => "etcd",
        "containerd" => "containerd",
        _ => return,
    };
    if requirements::program("systemctl") {
        let _ = Command::new("systemctl")
            .args(["-q", "disable", unit])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
    }
}

/// `policy-rc.d` is what Debian's maintainer scripts ask before they start a service. An existing
/// one is left alone.
struct NoDaemons {
    written: bool,
}

const POLICY: &str = "/usr/sbin/policy-rc.d";

impl NoDaemons {
    fn forbid() -> Result<Self> {
        if Path::new(POLICY).exists() {
            return Ok(Self { written: false });
        }
        fs::write(POLICY, "#!/bin/sh\nexit 101\n").with_context(|| format!("write {POLICY}"))?;
        fs::set_permissions(POLICY, fs::Permissions::from_mode(0o755))?;
        Ok(Self { written: true })
    }
}

impl Drop for NoDaemons {
    fn drop(&mut self) {
        if self.written {
            let _ = fs::remove_file(POLICY);
        }
    }
}

//! What a test machine boots with: the kernel's modules, busybox, the tests, the agent, and the
//! programs that these call, each with the libraries it is linked with here.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use picomesh_tests::{image::linked, requirements};

use super::{cpio::Archive, kernel::Kernel};
use crate::shell;

/// What the world of network namespaces and the programs in the kernel stand on. A kernel that has
/// one of them built in has no such module.
const MODULES: [&str; 20] = [
    "veth",
    "bridge",
    "tun",
    "ipip",
    "sit",
    "sch_ingress",
    "cls_bpf",
    "inet_diag",
    "tcp_diag",
    "nf_tables",
    "nf_conntrack",
    "nf_nat",
    "nft_chain_nat",
    "nft_nat",
    "nft_masq",
    "nft_ct",
    "nft_limit",
    "nf_reject_ipv4",
    "nf_reject_ipv6",
    "nft_reject_inet",
];

/// Beside busybox, whose namesakes know too little.
const PROGRAMS: [&str; 4] = ["ip", "tc", "nft", "bash"];

/// busybox's part.
const APPLETS: [&str; 14] = [
    "sh", "mount", "umount", "insmod", "cat", "uname", "sleep", "poweroff", "echo", "ls", "grep",
    "dmesg", "kill", "true",
];

/// The tests of the tier `mesh` that a kernel must pass: captured both ways, mTLS between nodes with
/// nothing plain on the wire, policy, an agent killed with -9 and adopted, probes, no trace left.
const SMOKE: [&str; 9] = [
    "world::pods_of_all_nodes_reach_each_other_over_both_families",
    "traffic::a_client_may_close_its_half_and_read_late",
    "shown::both_ends_of_a_connection_are_counted_with_linkerds_and_istios_labels",
    "policy::all_authenticated_refuses_who_has_no_identity",
    "policy::deny_refuses_everybody_but_the_hosts_probe",
    "policy::a_change_closes_what_it_forbids_within_a_second",
    "failclosed::a_killed_agent_leaves_nothing_plain",
    "lifecycle::the_next_agent_adopts_what_a_killed_one_left",
    "lifecycle::cleanup_leaves_no_trace",
];

/// Programs that were built for all machines.
pub(super) struct Built {
    pub(super) bpf: PathBuf,
    pub(super) mesh: PathBuf,
    pub(super) agent: PathBuf,
}

/// How many results the tier `mesh` owes.
pub(super) const fn smoke_tests() -> u32 {
    SMOKE.len() as u32
}

/// Writes the archive that `kernel` unpacks as its root.
pub(super) fn write(built: &Built, kernel: &Kernel, to: &Path) -> Result<()> {
    let mut archive = Archive::create(to)?;
    for dir in [
        "/proc", "/sys", "/dev", "/run", "/tmp", "/root", "/var/run", "/etc",
    ] {
        archive.directory(dir)?;
    }
    archive.file("/init", 0o755, include_bytes!("init.sh"))?;
    archive.copy(&find("busybox")?, "/bin/busybox")?;
    for applet in APPLETS {
        archive.symlink(&format!("/bin/{applet}"), "busybox")?;
    }
    let mut order = String::new();
    for module in with_dependencies(&kernel.modules)? {
        let file = format!("{}.ko", name_of(&module));
        let bytes = unpacked(&kernel.modules.join(&module))?;
        archive.file(&format!("/modules/{file}"), 0o644, &bytes)?;
        order.push_str(&file);
        order.push('\n');
    }
    archive.file("/modules/order", 0o644, order.as_bytes())?;

    let mut libraries = BTreeSet::new();
    for name in PROGRAMS {
        let path = find(name)?;
        libraries.extend(linked(&path)?);
        archive.copy(&path, &format!("/usr/sbin/{name}"))?;
    }
    let tests = to.with_file_name("stripped");
    for (path, at) in [
        (&built.bpf, "/tests/bpf"),
        (&built.mesh, "/tests/mesh"),
        (&built.agent, "/tests/picomesh-agent"),
    ] {
        libraries.extend(linked(path)?);
        // What only a debugger reads is three quarters of it, and all of it would lie in memory.
        shell::run(
            Command::new("strip")
                .args(["--strip-debug", "-o"])
                .arg(&tests)
                .arg(path),
        )?;
        archive.copy(&tests, at)?;
    }
    fs::remove_file(&tests)?;
    for library in libraries {
        archive.copy(Path::new(&library), &library)?;
    }
    let mut smoke = SMOKE.join("\n");
    smoke.push('\n');
    archive.file("/tests/smoke", 0o644, smoke.as_bytes())?;
    archive.finish()?;
    Ok(())
}

/// A module as the kernel takes it; busybox unpacks none.
fn unpacked(module: &Path) -> Result<Vec<u8>> {
    let extension = module.extension().unwrap_or_default();
    if extension == "ko" {
        return fs::read(module).with_context(|| format!("read {}", module.display()));
    }
    ensure!(
        extension == "xz",
        "{} is packed by neither xz nor nothing: teach `unpacked` how",
        module.display()
    );
    let output = Command::new("xz")
        .args(["--decompress", "--stdout"])
        .arg(module)
        .output()
        .context("start xz")?;
    ensure!(
        output.status.success(),
        "xz cannot unpack {}",
        module.display()
    );
    Ok(output.stdout)
}

/// Paths below the modules' directory, in the order in which they can be loaded.
fn with_dependencies(modules: &Path) -> Result<Vec<String>> {
    let path = modules.join("modules.dep");
    let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    let built_in = fs::read_to_string(modules.join("modules.builtin")).unwrap_or_default();
    let mut order = Vec::new();
    for wanted in MODULES {
        match in_order(&text, wanted) {
            Some(paths) => order.extend(paths),
            None => ensure!(
                built_in.lines().any(|line| name_of(line) == wanted),
                "this kernel has no {wanted}"
            ),
        }
    }
    let mut seen = BTreeSet::new();
    order.retain(|path| seen.insert(path.clone()));
    Ok(order)
}

/// A line of `modules.dep` is `PATH: NEEDED…`, the first to be loaded standing last.
fn in_order(dependencies: &str, wanted: &str) -> Option<Vec<String>> {
    dependencies.lines().find_map(|line| {
        let (path, needed) = line.split_once(':')?;
        (name_of(path) == wanted).then(|| {
            needed
                .split_whitespace()
                .rev()
                .chain([path])
                .map(str::to_owned)
                .collect()
        })
    })
}

/// `kernel/net/sched/cls_bpf.ko.xz` → `cls_bpf`
fn name_of(path: &str) -> &str {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split('.').next().unwrap_or(file)
}

fn find(name: &str) -> Result<PathBuf> {
    requirements::find_program(name)
        .with_context(|| format!("{name} is missing: cargo xtask setup --for vm"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_module_needs_is_loaded_before_it() {
        let text = "kernel/lib/libcrc32c.ko:\n\
             kernel/net/bridge/bridge.ko.xz: kernel/net/802/stp.ko.xz kernel/net/llc/llc.ko.xz\n";
        assert_eq!(
            in_order(text, "bridge"),
            Some(vec![
                "kernel/net/llc/llc.ko.xz".into(),
                "kernel/net/802/stp.ko.xz".into(),
                "kernel/net/bridge/bridge.ko.xz".into(),
            ])
        );
        assert_eq!(in_order(text, "bridg"), None);
    }

    #[test]
    fn a_module_is_known_by_its_file() {
        assert_eq!(name_of("kernel/net/sched/cls_bpf.ko.xz"), "cls_bpf");
        assert_eq!(name_of("veth.ko"), "veth");
    }
}

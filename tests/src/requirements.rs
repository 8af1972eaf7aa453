//! What a machine must have before a world with agents can stand on it; said in one line each.

use std::{
    ffi::CString,
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use nix::unistd::geteuid;

/// Something that is missing, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    pub what: String,
    pub remedy: String,
}

/// What the kernel and the rights of this process lack for a world with agents.
pub fn missing() -> Vec<Missing> {
    let mut missing = Vec::new();
    let mut need = |there: bool, what: &str, remedy: &str| {
        if !there {
            missing.push(Missing {
                what: what.into(),
                remedy: remedy.into(),
            });
        }
    };
    if !geteuid().is_root() {
        need(false, "root", "call it with sudo");
        return missing;
    }
    let kernel = kernel();
    need(
        kernel >= (6, 1),
        &format!("Linux 6.1 (this is {}.{})", kernel.0, kernel.1),
        "boot a newer kernel",
    );
    need(
        cgroup2().is_some(),
        "a cgroup v2 mount",
        "mount -t cgroup2 none /sys/fs/cgroup",
    );
    need(
        Path::new("/sys/fs/bpf").is_dir() || fs::create_dir_all("/sys/fs/bpf").is_ok(),
        "/sys/fs/bpf",
        "a kernel with CONFIG_BPF_SYSCALL",
    );
    need(
        separate_netns(),
        "the right to make network namespaces",
        "CAP_SYS_ADMIN; in a container run it privileged",
    );
    missing
}

/// Major and minor version of the running kernel.
pub fn kernel() -> (u32, u32) {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release.split(['.', '-']).map(|p| p.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// Whether the kernel speaks IPv6; with `ipv6.disable=1` it does not.
pub fn ipv6() -> bool {
    Path::new("/proc/net/if_inet6").exists()
}

/// The mount point of cgroup v2.
pub fn cgroup2() -> Option<String> {
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let (_, at, kind) = (fields.next()?, fields.next()?, fields.next()?);
        (kind == "cgroup2").then(|| at.to_owned())
    })
}

/// Whether a program is on the PATH, or where administrators' programs live.
pub fn program(name: &str) -> bool {
    find_program(name).is_some()
}

/// Where [`program`] finds it.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var("PATH").unwrap_or_default();
    path.split(':')
        .chain(["/usr/sbin", "/sbin", "/usr/local/sbin"])
        .map(|dir| Path::new(dir).join(name))
        .find(|path| fs::metadata(path).is_ok_and(|m| m.is_file() && m.mode() & 0o111 != 0))
}

fn separate_netns() -> bool {
    std::thread::spawn(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).is_ok() && has_lo()
    })
    .join()
    .unwrap_or(false)
}

fn has_lo() -> bool {
    let Ok(lo) = CString::new("lo") else {
        return false;
    };
    nix::net::if_::if_nametoindex(lo.as_c_str()).is_ok()
}

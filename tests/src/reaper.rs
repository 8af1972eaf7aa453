//! Removes worlds: when they are dropped, when the process is told to stop, and those that a
//! process that was killed left behind.
//!
//! Everything a world makes carries its name (`pm<pid>-<number>`): namespaces in /run/netns, the
//! directory below the temporary directory, the directory below /sys/fs/bpf, the control groups of
//! a [`crate::cluster`]. Processes are found by the namespace and the control group they run in, so
//! that next to nothing needs to be remembered and nothing that a world did not start is touched.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use nix::{
    errno::Errno,
    sys::{
        signal::{SigSet, Signal, kill, killpg},
        statfs::{FsType, statfs},
    },
    unistd::Pid,
};

use crate::{cgroups, netns};

/// First letters of everything that belongs to a world.
pub const PREFIX: &str = "pm";
/// A file in a world's directory that says: leave it, somebody looks at it. It tells the kind.
pub const KEPT: &str = "kept";
/// A file in a world's directory with the heads of process groups that run outside of it.
const OUTSIDE: &str = "outside";

/// What was kept, and so who removes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    World,
    Cluster,
}

impl Kind {
    const fn name(self) -> &'static str {
        match self {
            Self::World => "world",
            Self::Cluster => "cluster",
        }
    }
}

const BPF_DIR: &str = "/sys/fs/bpf";
const BPF_FS_MAGIC: FsType = FsType(0xcafe_4a11_u32 as _);

/// Names of this process's worlds.
static LIVE: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
static STOPPING: AtomicBool = AtomicBool::new(false);
static MOUNTED: AtomicBool = AtomicBool::new(false);

/// Makes SIGINT, SIGTERM and SIGHUP remove this process's worlds before it ends. Call it first in
/// `main`: threads inherit the signal mask.
pub fn install() -> Result<()> {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        signals.add(signal);
    }
    signals.thread_block().context("block signals")?;
    thread::Builder::new()
        .name("reaper".into())
        .spawn(move || {
            let Ok(signal) = signals.wait() else { return };
            STOPPING.store(true, Ordering::SeqCst);
            eprintln!("{signal}: removing every trace");
            // Twice: a thread may have been in the middle of making something.
            for _ in 0..2 {
                // Not in the loop's head: the lock would be held while `remove` takes it again.
                let names = live().clone();
                for name in names {
                    remove(&name);
                }
                thread::sleep(Duration::from_millis(50));
            }
            unmount_bpffs();
            std::process::exit(128 + signal as i32);
        })
        .context("start the reaper's thread")?;
    Ok(())
}

/// True once the process was told to stop: nothing new is made then.
pub fn stopping() -> bool {
    STOPPING.load(Ordering::SeqCst)
}

/// A name for a new world; the first one removes what processes that were killed left behind.
pub(crate) fn claim() -> Result<String> {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    ensure!(
        nix::unistd::geteuid().is_root(),
        "a world of network namespaces needs root"
    );
    ensure!(!stopping(), "told to stop: no new world is made");
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    if number == 0 {
        sweep();
    }
    let name = format!("{PREFIX}{}-{number}", std::process::id());
    live().insert(name.clone());
    Ok(name)
}

/// Remembers the head of a process group that runs in the machine's own namespaces. Its command
/// line must name the world's directory: numbers are used again.
pub(crate) fn note_process(name: &str, pid: i32) -> Result<()> {
    let path = dir(name).join(OUTSIDE);
    let mut text = fs::read_to_string(&path).unwrap_or_default();
    text.push_str(&format!("{pid}\n"));
    fs::write(&path, text).with_context(|| format!("write {}", path.display()))
}

/// The world stays after the process; `cargo xtask demo --clean`, `cargo xtask cluster down` or
/// [`remove`] takes it away.
pub(crate) fn keep(name: &str, kind: Kind) -> Result<()> {
    fs::write(dir(name).join(KEPT), kind.name())?;
    live().remove(name);
    Ok(())
}

/// Where a world keeps its files.
pub fn dir(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("picomesh-{name}"))
}

/// Where a world's agents have their run directories: in memory, as /run is on a machine of its own.
pub fn run_dir(name: &str) -> PathBuf {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() {
        memory.join(format!("picomesh-{name}"))
    } else {
        dir(name).join("run")
    }
}

/// Where a world's agents keep their pins.
pub fn bpf_dir(name: &str) -> PathBuf {
    Path::new(BPF_DIR).join(name)
}

/// Removes everything of one world: processes, namespaces, pins, files.
pub fn remove(name: &str) {
    let prefix = format!("{name}-");
    let namespaces = netns::list(&prefix);
    kill_outside(name);
    kill_inside(name, &namespaces);
    cgroups::remove(name);
    for netns in &namespaces {
        if let Err(e) = netns::delete(netns) {
            eprintln!("remove {netns}: {e:#}");
        }
    }
    for path in [bpf_dir(name), run_dir(name), dir(name)] {
        if let Err(e) = fs::remove_dir_all(&path)
            && e.kind() != std::io::ErrorKind::NotFound
        {
            eprintln!("remove {}: {e}", path.display());
        }
    }
    let mut live = live();
    live.remove(name);
    if live.is_empty() {
        unmount_bpffs();
    }
}

/// Removes the worlds of processes that are gone, unless they were kept on purpose. Returns their
/// names.
pub fn sweep() -> Vec<String> {
    let mut swept = Vec::new();
    for name in leftovers() {
        if owner(&name).is_some_and(is_alive) || dir(&name).join(KEPT).exists() {
            continue;
        }
        remove(&name);
        swept.push(name);
    }
    swept
}

/// Removes what was kept of a kind. Returns the names.
pub fn sweep_kept(kind: Kind) -> Vec<String> {
    let swept = kept(kind);
    for name in &swept {
        remove(name);
    }
    swept
}

/// Names of what was kept of a kind.
pub fn kept(kind: Kind) -> Vec<String> {
    leftovers()
        .into_iter()
        .filter(|name| fs::read_to_string(dir(name).join(KEPT)).is_ok_and(|k| k == kind.name()))
        .collect()
}

/// Mounts bpffs on /sys/fs/bpf if it is not there; it is unmounted again with the last world.
pub(crate) fn mount_bpffs() -> Result<()> {
    if statfs(BPF_DIR).is_ok_and(|s| s.filesystem_type() == BPF_FS_MAGIC) {
        return Ok(());
    }
    nix::mount::mount(
        Some("bpf"),
        BPF_DIR,
        Some("bpf"),
        nix::mount::MsFlags::empty(),
        None::<&str>,
    )
    .with_context(|| format!("mount bpffs on {BPF_DIR}"))?;
    MOUNTED.store(true, Ordering::SeqCst);
    Ok(())
}

fn unmount_bpffs() {
    let empty = fs::read_dir(BPF_DIR).is_ok_and(|mut entries| entries.next().is_none());
    // Busy means that another process uses it by now: then it is theirs.
    if empty && MOUNTED.swap(false, Ordering::SeqCst) {
        let _ = nix::mount::umount(BPF_DIR);
    }
}

fn live() -> MutexGuard<'static, BTreeSet<String>> {
    LIVE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Names of all worlds of which anything is left on this machine.
fn leftovers() -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for netns in netns::list(PREFIX) {
        let mut parts = netns.splitn(3, '-');
        if let (Some(owner), Some(number)) = (parts.next(), parts.next()) {
            names.insert(format!("{owner}-{number}"));
        }
    }
    for (directory, prefix) in [
        (Path::new(BPF_DIR).to_owned(), ""),
        (std::env::temp_dir(), "picomesh-"),
    ] {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            let name = entry.file_name();
            if let Some(name) = name.to_str().and_then(|n| n.strip_prefix(prefix)) {
                names.insert(name.to_owned());
            }
        }
    }
    names.extend(cgroups::names());
    names.retain(|name| owner(name).is_some());
    names
}

/// `pm1234-0` → 1234.
fn owner(name: &str) -> Option<i32> {
    let (owner, number) = name.strip_prefix(PREFIX)?.split_once('-')?;
    number.parse::<u32>().ok()?;
    owner.parse().ok()
}

fn is_alive(pid: i32) -> bool {
    kill(Pid::from_raw(pid), None) != Err(Errno::ESRCH)
}

/// Kills the process groups that [`note_process`] was told of.
fn kill_outside(name: &str) {
    let dir = dir(name);
    let noted = fs::read_to_string(dir.join(OUTSIDE)).unwrap_or_default();
    for pid in noted.lines().filter_map(|l| l.parse::<i32>().ok()) {
        let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        if pid > 1 && String::from_utf8_lossy(&command).contains(&*dir.to_string_lossy()) {
            let _ = killpg(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

/// Kills what runs in these namespaces and in the world's control groups, and waits until it is
/// gone.
fn kill_inside(name: &str, namespaces: &[String]) {
    let inodes: BTreeSet<u64> = namespaces
        .iter()
        .filter_map(|n| fs::metadata(Path::new(netns::NETNS_DIR).join(n)).ok())
        .map(|m| m.ino())
        .collect();
    let ourselves = std::process::id() as i32;
    let start = Instant::now();
    loop {
        let mut found = false;
        let grouped = cgroups::processes(name);
        for pid in pids().filter(|pid| *pid != ourselves) {
            let inside = grouped.contains(&pid)
                || fs::metadata(format!("/proc/{pid}/ns/net"))
                    .is_ok_and(|m| inodes.contains(&m.ino()));
            if inside {
                found = true;
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
        if !found || start.elapsed() > Duration::from_secs(20) {
            return;
        }
        thread::sleep(Duration::from_millis(5));
    }
}

fn pids() -> impl Iterator<Item = i32> {
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_worlds_have_an_owner() {
        assert_eq!(owner("pm1234-0"), Some(1234));
        assert_eq!(owner("pm1234"), None);
        assert_eq!(owner("pmx-0"), None);
        assert_eq!(owner("pm12-kernel"), None);
        assert_eq!(owner("picomesh"), None);
    }

    #[test]
    fn the_caller_is_alive() {
        assert!(is_alive(std::process::id() as i32));
    }
}

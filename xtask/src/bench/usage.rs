//! What the kernel says a contender used: CPU time and resident memory of its processes, CPU time
//! of the machine; and what machine this is.
//!
//! CPU per request is user plus system time of the proxies' own processes. Work that the kernel
//! does in softirq context is charged to whoever happens to run at that moment, or to nobody: it
//! is not attributed here. The machine's busy time, kept beside it in the JSON, has it all, the
//! client's and the server's included.

use std::{
    fmt, fs,
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use picomesh_tests::process::cpu_of;
use serde::Serialize;

/// Reads the CPU time of a set of processes. Empty, it reads the machine's alone.
#[derive(Clone, Debug, Default)]
pub(crate) struct Meter {
    pids: Vec<i32>,
}

/// CPU time since some moment.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Usage {
    /// User and system time of the proxies, all threads.
    pub(crate) proxies: Duration,
    /// Time that the machine's CPUs did not idle, summed over them.
    pub(crate) machine: Duration,
}

impl Meter {
    /// Of these processes and of every process that descends from them now.
    pub(crate) fn of(roots: &[i32]) -> Self {
        Self { pids: tree(roots) }
    }

    pub(crate) fn read(&self) -> Result<Usage> {
        let mut proxies = Duration::ZERO;
        for pid in &self.pids {
            proxies += cpu_of(*pid).context("a proxy ended during the load")?;
        }
        Ok(Usage {
            proxies,
            machine: machine_busy()?,
        })
    }
}

impl Usage {
    pub(crate) fn since(self, before: Self) -> Self {
        Self {
            proxies: self.proxies.saturating_sub(before.proxies),
            machine: self.machine.saturating_sub(before.machine),
        }
    }
}

/// Resident MB of a process and its descendants. Pages that they share count once for each.
pub(crate) fn resident_mb(root: i32) -> Result<f64> {
    let mut kib = 0;
    for pid in tree(&[root]) {
        let status = fs::read_to_string(format!("/proc/{pid}/status"))
            .with_context(|| format!("process {pid} ended while it was measured"))?;
        kib += number_after(&status, "VmRSS:").context("no VmRSS in /proc/PID/status")?;
    }
    Ok(kib as f64 * 1024.0 / 1e6)
}

/// The share of the machine's CPU time, 0 to 1, that others use while we sleep.
pub(crate) fn busy_share(during: Duration) -> Result<f64> {
    let (start, before) = (Instant::now(), machine_busy()?);
    thread::sleep(during);
    let busy = machine_busy()?.saturating_sub(before);
    let cores = thread::available_parallelism().map_or(1, usize::from);
    Ok(busy.as_secs_f64() / start.elapsed().as_secs_f64() / cores as f64)
}

/// What the figures depend on besides the code.
#[derive(Debug, Serialize)]
pub(crate) struct Machine {
    pub(crate) cpu: String,
    pub(crate) cores: usize,
    pub(crate) memory_mb: u64,
    pub(crate) kernel: String,
    pub(crate) congestion_control: String,
    pub(crate) haproxy: Option<String>,
    pub(crate) nginx: Option<String>,
    /// The checkout's commit, with `+` if the tree differs from it.
    pub(crate) revision: Option<String>,
}

impl Machine {
    pub(crate) fn here() -> Self {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let model = ["model name", "Model", "Hardware"].iter().find_map(|key| {
            let line = cpuinfo.lines().find(|line| line.starts_with(key))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        });
        Self {
            cpu: model.unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
            cores: thread::available_parallelism().map_or(1, usize::from),
            memory_mb: number_after(&meminfo, "MemTotal:").unwrap_or(0) / 1024,
            kernel: one_line("/proc/sys/kernel/osrelease"),
            congestion_control: one_line("/proc/sys/net/ipv4/tcp_congestion_control"),
            haproxy: said("haproxy", &["-v"], "version "),
            nginx: said("nginx", &["-v"], "nginx/"),
            revision: revision(),
        }
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} × {}, Linux {}, {}",
            self.cores, self.cpu, self.kernel, self.congestion_control
        )?;
        for (name, version) in [("haproxy", &self.haproxy), ("nginx", &self.nginx)] {
            if let Some(version) = version {
                write!(f, ", {name} {version}")?;
            }
        }
        Ok(())
    }
}

fn revision() -> Option<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent()?;
    let git = |args: &[&str]| {
        let output = Command::new("git").args(args).current_dir(root).output();
        let output = output.ok().filter(|o| o.status.success())?;
        Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let mut revision = git(&["rev-parse", "--short", "HEAD"])?;
    if !git(&["status", "--porcelain", "--untracked-files=no"])?.is_empty() {
        revision.push('+');
    }
    Some(revision)
}

/// The word after `marker` in what a program prints about itself.
fn said(program: &str, args: &[&str], marker: &str) -> Option<String> {
    let output = Command::new(program).args(args).output().ok()?;
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    let word = text.split_once(marker)?.1.split_whitespace().next()?;
    Some(word.to_owned())
}

fn one_line(path: &str) -> String {
    fs::read_to_string(path)
        .map(|text| text.trim().to_owned())
        .unwrap_or_default()
}

/// User, nice, system, irq and softirq time of all CPUs.
fn machine_busy() -> Result<Duration> {
    let stat = fs::read_to_string("/proc/stat").context("read /proc/stat")?;
    let fields: Vec<u64> = stat
        .lines()
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .skip(1)
        .filter_map(|field| field.parse().ok())
        .collect();
    let busy: u64 = [0, 1, 2, 5, 6].iter().filter_map(|i| fields.get(*i)).sum();
    let hertz = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?.unwrap_or(100);
    Ok(Duration::from_secs_f64(busy as f64 / hertz as f64))
}

/// The processes and all their descendants.
fn tree(roots: &[i32]) -> Vec<i32> {
    let parents: Vec<(i32, i32)> = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
            let status = fs::read_to_string(entry.path().join("status")).ok()?;
            Some((pid, number_after(&status, "PPid:")? as i32))
        })
        .collect();
    let mut found = roots.to_vec();
    let mut next = 0;
    while let Some(parent) = found.get(next).copied() {
        found.extend(parents.iter().filter(|(_, p)| *p == parent).map(|(c, _)| c));
        next += 1;
    }
    found
}

fn number_after(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_of_a_descendant_counts() {
        let script = "sh -c 'while :; do :; done' & echo; wait";
        let mut shell = Command::new("sh")
            .args(["-c", script])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        // Its first output says that the child is there.
        let mut byte = [0];
        std::io::Read::read_exact(shell.stdout.as_mut().unwrap(), &mut byte).unwrap();
        let root = shell.id() as i32;
        let meter = Meter::of(&[root]);
        assert_eq!(meter.pids.len(), 2);
        let (start, before) = (Instant::now(), meter.read().unwrap());
        let mut spent = Usage::default();
        while spent.proxies.is_zero() && start.elapsed() < Duration::from_secs(10) {
            thread::sleep(Duration::from_millis(20));
            spent = meter.read().unwrap().since(before);
        }
        for pid in meter.pids.iter().rev() {
            let _ = nix::sys::signal::kill(
                nix::unistd::Pid::from_raw(*pid),
                nix::sys::signal::Signal::SIGKILL,
            );
        }
        shell.wait().unwrap();
        assert!(spent.proxies > Duration::ZERO);
        assert!(spent.machine > Duration::ZERO);
    }

    #[test]
    fn a_process_that_is_gone_is_an_error_and_not_zero() {
        let mut child = Command::new("true").spawn().unwrap();
        let meter = Meter::of(&[child.id() as i32]);
        child.wait().unwrap();
        assert!(meter.read().is_err());
    }

    #[test]
    fn a_process_is_resident_with_its_descendants() {
        // Not this one: other tests' children come and go.
        let mut shell = Command::new("sh")
            .args(["-c", "sleep 60 & wait"])
            .spawn()
            .unwrap();
        let resident = || resident_mb(shell.id() as i32);
        let start = Instant::now();
        // Just born it is next to nothing.
        while resident().is_ok_and(|mb| mb < 0.1) && start.elapsed() < Duration::from_secs(10) {
            thread::sleep(Duration::from_millis(20));
        }
        let mb = resident();
        for pid in tree(&[shell.id() as i32]) {
            let pid = nix::unistd::Pid::from_raw(pid);
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
        }
        shell.wait().unwrap();
        let mb = mb.unwrap();
        assert!(mb > 0.1 && mb < 100.0, "{mb} MB");
    }
}

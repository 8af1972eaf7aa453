//! Programs that run in a namespace, end with it, and leave their words in files.

use std::{
    ffi::OsStr,
    fs::{self, File},
    os::unix::process::{CommandExt, ExitStatusExt},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Mutex, OnceLock, PoisonError, mpsc},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::{
    sys::{
        resource::{Resource, getrlimit, setrlimit},
        signal::{SigSet, Signal, killpg},
        stat::Mode,
    },
    unistd::Pid,
};

use crate::{Netns, reaper, wait};

/// A running program. Dropping it kills it and its children.
#[derive(Debug)]
pub struct Process {
    name: String,
    pid: Pid,
    child: Mutex<Child>,
    stdout: PathBuf,
    stderr: PathBuf,
    outlive: bool,
}

/// What a program that ended has said.
#[derive(Debug)]
pub struct Output {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
    pub took: Duration,
}

impl Process {
    /// Starts `command` in `netns` as the head of a process group. Its output goes to
    /// `<logs>/<name>.out` and `.err`, appended to what is there.
    ///
    /// With `outlive` it goes on when this process ends and when the value is dropped.
    pub fn spawn(
        mut command: Command,
        netns: &Netns,
        logs: &Path,
        name: &str,
        outlive: bool,
    ) -> Result<Self> {
        ensure!(!reaper::stopping(), "told to stop: {name} is not started");
        let stdout = logs.join(format!("{name}.out"));
        let stderr = logs.join(format!("{name}.err"));
        command
            .stdin(Stdio::null())
            .stdout(append(&stdout)?)
            .stderr(append(&stderr)?)
            .process_group(0);
        let netns = netns.clone();
        // SAFETY: the closure only makes system calls that are safe between fork and exec: setns,
        // sigprocmask, prctl, umask.
        unsafe {
            command.pre_exec(move || {
                netns.enter()?;
                SigSet::empty().thread_set_mask()?;
                if !outlive {
                    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
                }
                nix::sys::stat::umask(Mode::from_bits_truncate(0o022));
                Ok(())
            });
        }
        let program = command.get_program().to_owned();
        let child = on_spawner(move || command.spawn())?
            .with_context(|| format!("start {}: is it installed?", display(&program)))?;
        Ok(Self {
            name: name.to_owned(),
            pid: Pid::from_raw(child.id() as i32),
            child: Mutex::new(child),
            stdout,
            stderr,
            outlive,
        })
    }

    pub fn pid(&self) -> i32 {
        self.pid.as_raw()
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// To the whole process group.
    pub fn signal(&self, signal: Signal) {
        let _ = killpg(self.pid, signal);
    }

    /// SIGKILL, and waits for the end.
    pub fn kill(&self) {
        self.signal(Signal::SIGKILL);
        let _ = self.child().wait();
    }

    pub fn exited(&self) -> Option<ExitStatus> {
        self.child().try_wait().ok().flatten()
    }

    pub fn wait(&self, deadline: Duration) -> Result<ExitStatus> {
        wait::for_value(&format!("{} ends", self.name), deadline, || {
            Ok(self.child().try_wait()?)
        })
    }

    pub fn stdout(&self) -> String {
        read(&self.stdout)
    }

    pub fn stderr(&self) -> String {
        read(&self.stderr)
    }

    pub fn stdout_path(&self) -> &Path {
        &self.stdout
    }

    /// The last lines it said, for a person.
    pub fn last_words(&self, lines: usize) -> String {
        let text = format!("{}{}", self.stdout(), self.stderr());
        let all: Vec<&str> = text.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }

    /// Resident memory in KiB.
    pub fn resident_kib(&self) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid))?;
        status
            .lines()
            .find_map(|l| l.strip_prefix("VmRSS:"))
            .and_then(|v| v.split_whitespace().next())
            .ok_or_else(|| anyhow!("{} has no VmRSS", self.name))?
            .parse()
            .context("VmRSS")
    }

    /// CPU time used by the process and its threads: user and system.
    pub fn cpu(&self) -> Result<Duration> {
        cpu_of(self.pid.as_raw())
    }

    fn child(&self) -> std::sync::MutexGuard<'_, Child> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.outlive {
            self.kill();
        }
    }
}

impl Output {
    pub fn success(&self) -> bool {
        self.status.success()
    }

    /// The exit code; a signal counts as in a shell.
    pub fn code(&self) -> i32 {
        self.status
            .code()
            .unwrap_or_else(|| 128 + self.status.signal().unwrap_or(0))
    }

    pub fn ok(self) -> Result<Self> {
        if self.success() {
            Ok(self)
        } else {
            bail!(
                "ended with code {}: {}{}",
                self.code(),
                self.stdout,
                self.stderr
            )
        }
    }
}

/// Runs a program to its end; it is killed at the deadline.
pub fn output(
    command: Command,
    netns: &Netns,
    logs: &Path,
    name: &str,
    deadline: Duration,
) -> Result<Output> {
    let start = Instant::now();
    let process = Process::spawn(command, netns, logs, name, false)?;
    let status = process.wait(deadline);
    process.signal(Signal::SIGKILL);
    let output = (process.stdout(), process.stderr());
    let _ = (
        fs::remove_file(&process.stdout),
        fs::remove_file(&process.stderr),
    );
    let status = status.with_context(|| format!("{}{}", output.0, output.1))?;
    Ok(Output {
        status,
        stdout: output.0,
        stderr: output.1,
        took: start.elapsed(),
    })
}

/// User and system time of one process, in the kernel's clock ticks.
pub fn cpu_of(pid: i32) -> Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The command's name may hold blanks and parentheses: count from the last one.
    let (_, rest) = stat.rsplit_once(") ").context("parse /proc/PID/stat")?;
    let fields: Vec<&str> = rest.split(' ').collect();
    let ticks = |i: usize| -> Result<u64> {
        fields
            .get(i)
            .context("parse /proc/PID/stat")?
            .parse()
            .context("parse /proc/PID/stat")
    };
    let hertz = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?.unwrap_or(100) as f64;
    Ok(Duration::from_secs_f64(
        (ticks(11)? + ticks(12)?) as f64 / hertz,
    ))
}

type Job = Box<dyn FnOnce() + Send>;

/// PR_SET_PDEATHSIG means the death of the *thread* that forked. Tests come and go on threads of
/// their own, so one thread that lives as long as the process does all the forking.
fn on_spawner<T: Send + 'static>(job: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    static SPAWNER: OnceLock<mpsc::SyncSender<Job>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (sender, jobs) = mpsc::sync_channel::<Job>(16);
        thread::spawn(move || {
            for job in jobs {
                job();
            }
        });
        sender
    });
    let (answer, result) = mpsc::sync_channel(1);
    spawner
        .send(Box::new(move || {
            let _ = answer.send(job());
        }))
        .map_err(|_| anyhow!("the thread that starts programs is gone"))?;
    result
        .recv()
        .context("the thread that starts programs is gone")
}

fn append(path: &Path) -> Result<File> {
    File::options()
        .create(true)
        .append(true)
        .open(path)
        .with_context(|| format!("open {}", path.display()))
}

fn read(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}

fn display(program: &OsStr) -> String {
    program.to_string_lossy().into_owned()
}

/// Both ends of many connections are files of this process and its children.
pub fn allow_files(wanted: u64) -> Result<()> {
    let (soft, hard) =
        getrlimit(Resource::RLIMIT_NOFILE).context("read the limit of open files")?;
    if soft >= wanted {
        return Ok(());
    }
    ensure!(
        hard >= wanted,
        "{wanted} open files are needed, {hard} are allowed: raise the hard limit (ulimit -Hn)"
    );
    setrlimit(Resource::RLIMIT_NOFILE, wanted, hard).context("raise the limit of open files")
}

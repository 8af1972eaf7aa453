//! One machine under qemu: booted, listened to, and turned off when its time is over.

use std::{
    fs::{self, OpenOptions},
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc::{self, Receiver, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use picomesh_tests::requirements;

/// Who executes the machine's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Accel {
    /// The processor
    Kvm,
    /// qemu itself, an order of magnitude slower
    Tcg,
}

impl Accel {
    /// The processor's help where this machine is a real one: in a machine that is virtual itself
    /// it is seldom offered, and seldom sound where it is.
    pub(super) fn best() -> Self {
        let virtual_machine = fs::read_to_string("/proc/cpuinfo").is_ok_and(|text| {
            text.lines()
                .filter(|line| line.starts_with("flags"))
                .any(|flags| flags.split_whitespace().any(|flag| flag == "hypervisor"))
        });
        let usable = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .is_ok();
        if usable && !virtual_machine {
            Self::Kvm
        } else {
            Self::Tcg
        }
    }

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

/// A machine to boot.
pub(super) struct Plan<'a> {
    pub(super) image: &'a Path,
    pub(super) initrd: &'a Path,
    /// Appended to the kernel's command line.
    pub(super) arguments: &'a str,
    pub(super) accel: Accel,
    /// What the processor must not offer, as qemu calls it; empty for nothing.
    pub(super) hidden: &'a str,
    /// Where the kernel's own words go.
    pub(super) console: PathBuf,
    pub(super) deadline: Duration,
}

/// A running machine. Dropping it ends it.
pub(super) struct Machine {
    qemu: Child,
    lines: Receiver<String>,
    console: PathBuf,
    start: Instant,
    deadline: Duration,
}

impl Machine {
    pub(super) fn boot(plan: Plan<'_>) -> Result<Self> {
        // qemu ends with us however we end.
        let (program, dies_with_us): (&str, &[&str]) = if requirements::program("setpriv") {
            (
                "setpriv",
                &["--pdeathsig", "KILL", "--", "qemu-system-x86_64"],
            )
        } else {
            ("qemu-system-x86_64", &[])
        };
        let mut processor = "max".to_owned();
        if !plan.hidden.is_empty() {
            processor.push_str(&format!(",-{}", plan.hidden));
        }
        let mut command = Command::new(program);
        command
            .args(dies_with_us)
            .args(["-accel", plan.accel.name(), "-cpu", &processor])
            .args(["-smp", "2"])
            .args([
                "-m",
                "2048",
                "-nodefaults",
                "-display",
                "none",
                "-no-reboot",
            ])
            .args(["-nic", "none", "-device", "virtio-rng-pci"])
            .arg("-kernel")
            .arg(plan.image)
            .arg("-initrd")
            .arg(plan.initrd)
            .arg("-append")
            .arg(format!(
                "console=ttyS0 loglevel=5 panic=-1 {}",
                plan.arguments
            ))
            .arg("-serial")
            .arg(format!("file:{}", plan.console.display()))
            .args(["-serial", "stdio"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        let mut qemu = command.spawn().context("start qemu-system-x86_64")?;
        let stdout = qemu.stdout.take().context("qemu has no output")?;
        let (sender, lines) = mpsc::sync_channel(64);
        thread::spawn(move || {
            for line in BufReader::new(stdout).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line)
                    .trim_end_matches('\r')
                    .to_owned();
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Ok(Self {
            qemu,
            lines,
            console: plan.console,
            start: Instant::now(),
            deadline: plan.deadline,
        })
    }

    /// The next line of the tests' serial port; `None` when the machine is off.
    pub(super) fn line(&self) -> Result<Option<String>> {
        let left = self.deadline.saturating_sub(self.start.elapsed());
        match self.lines.recv_timeout(left) {
            Ok(line) => Ok(Some(line)),
            Err(RecvTimeoutError::Disconnected) => Ok(None),
            Err(RecvTimeoutError::Timeout) => {
                bail!("not done within {} s", self.deadline.as_secs())
            }
        }
    }

    pub(super) fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }

    /// What the kernel said last.
    pub(super) fn last_words(&self) -> String {
        let text = fs::read(&self.console).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

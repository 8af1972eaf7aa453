//! `cargo xtask vm`: the kernel half, and the mesh on it, on other kernels than this machine's.
//!
//! Each machine is a kernel of one of Debian's suites under qemu, with a root that lives in memory.
//! It runs the tier `bpf` whole and of the tier `mesh` a smoke test, and says over a serial port
//! what came out. At the end stands the table of the README.

mod cpio;
mod kernel;
mod machine;
mod payload;
mod report;

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{ExitCode, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use picomesh_tests::{agent, wait};
use serde_json::Value;

use self::{
    machine::{Accel, Machine, Plan},
    payload::Built,
    report::Outcome,
};
use crate::{
    ebpf, image,
    needs::{self, Purpose},
    shell,
    test::Count,
};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only these machines; all if not given
    #[arg(value_name = "MACHINE")]
    machines: Vec<String>,
    /// Name the machines instead of booting them
    #[arg(long)]
    list: bool,
    /// Of the tier bpf only tests whose name contains this
    #[arg(long, value_name = "WORD")]
    filter: Option<String>,
    /// kvm unless this machine is a virtual one itself
    #[arg(long)]
    accel: Option<Accel>,
}

/// A kernel and what is taken away from it.
struct Run {
    name: &'static str,
    suite: &'static str,
    /// Of the kernel's command line.
    arguments: &'static str,
    /// What the processor must not offer where it is emulated.
    hidden: &'static str,
    what: &'static str,
}

/// qemu 7.2 leaves rubbish in EFLAGS behind an emulated `cmpxchg16b`, and Linux 6.12 dies of it in
/// its allocator. The newest cannot do without: they allocate sockets' storage by kmalloc_nolock(),
/// which answers null on a processor that lacks it.
const UNSOUND: &str = "cx16";

const RUNS: [Run; 5] = [
    Run {
        name: "6.1",
        suite: "bookworm",
        arguments: "",
        hidden: "",
        what: "Debian 12's kernel, the oldest that will do",
    },
    Run {
        name: "6.12",
        suite: "trixie",
        arguments: "",
        hidden: UNSOUND,
        what: "Debian 13's kernel",
    },
    Run {
        name: "newest",
        suite: "sid",
        arguments: "",
        hidden: "",
        what: "the newest kernel of Debian's suites",
    },
    Run {
        name: "no-btf",
        suite: "trixie",
        arguments: "HIDE_BTF=1",
        hidden: UNSOUND,
        what: "Debian 13's kernel with /sys/kernel/btf hidden, as a Raspberry Pi's has none",
    },
    Run {
        name: "no-ipv6",
        suite: "bookworm",
        arguments: "ipv6.disable=1",
        hidden: "",
        what: "Debian 12's kernel with ipv6.disable=1",
    },
];

/// How many times longer an emulated machine may take for what tests wait for.
const EMULATED: u32 = 5;

/// Boot included. Emulated, the tier bpf takes a quarter of it on a quiet machine.
const DEADLINE: Duration = Duration::from_secs(40 * 60);

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    if args.list {
        for run in &RUNS {
            println!("{:8} {}", run.name, run.what);
        }
        return Ok(ExitCode::SUCCESS);
    }
    let runs = chosen(&args.machines)?;
    let outcomes = boot_all(&runs, args.filter.as_deref(), args.accel)?;
    let mut total = Count::default();
    for outcome in &outcomes {
        total.add(outcome.count());
    }
    for name in &total.failures {
        println!("failed: {name}");
    }
    for skip in &total.skips {
        println!("skipped: {skip}");
    }
    println!("\n{}", report::table(&outcomes));
    println!(
        "{} passed, {} failed, {} skipped",
        total.passed, total.failed, total.skipped
    );
    Ok(if total.failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// For `test --full`.
pub(crate) fn count() -> Count {
    match boot_all(&RUNS.iter().collect::<Vec<_>>(), None, None) {
        Ok(outcomes) => {
            println!("{}", report::table(&outcomes));
            let mut total = Count::default();
            for outcome in &outcomes {
                total.add(outcome.count());
            }
            total
        }
        Err(e) => Count::failure("vm", &format!("{e:#}")),
    }
}

fn chosen(names: &[String]) -> Result<Vec<&'static Run>> {
    if names.is_empty() {
        return Ok(RUNS.iter().collect());
    }
    names
        .iter()
        .map(|name| {
            RUNS.iter()
                .find(|run| run.name == name)
                .with_context(|| format!("no machine is called {name}: cargo xtask vm --list"))
        })
        .collect()
}

fn boot_all(runs: &[&Run], filter: Option<&str>, accel: Option<Accel>) -> Result<Vec<Outcome>> {
    ensure!(
        env::consts::ARCH == "x86_64",
        "machines are x86_64 so far, and this one is {}",
        env::consts::ARCH
    );
    needs::ensure(&[Purpose::Build, Purpose::World, Purpose::Vm])?;
    let built = build()?;
    let accel = accel.unwrap_or_else(Accel::best);
    let dir = shell::target_dir().join("vm");
    fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    let mut outcomes = Vec::new();
    for run in runs {
        println!("== {}: {} ({}) ==", run.name, run.what, accel.name());
        let mut outcome = Outcome {
            run: run.name.into(),
            ..Outcome::default()
        };
        if let Err(e) = boot(run, &built, filter, accel, &dir, &mut outcome) {
            println!("{e:#}");
            // The table has room for one line.
            let why = format!("{e:#}");
            outcome.broken = Some(why.lines().next().unwrap_or_default().to_owned());
        }
        outcomes.push(outcome);
    }
    Ok(outcomes)
}

fn boot(
    run: &Run,
    built: &Built,
    filter: Option<&str>,
    accel: Accel,
    dir: &Path,
    outcome: &mut Outcome,
) -> Result<()> {
    let kernel = kernel::of(run.suite)?;
    let initrd = dir.join(format!("{}.cpio", run.name));
    payload::write(built, &kernel, &initrd)?;
    let mut arguments = run.arguments.to_owned();
    if let Some(word) = filter {
        arguments.push_str(&format!(" FILTER={word}"));
    }
    if accel == Accel::Tcg {
        arguments.push_str(&format!(" {}={EMULATED}", wait::SLOWNESS));
    }
    let machine = Machine::boot(Plan {
        image: &kernel.image,
        initrd: &initrd,
        arguments: &arguments,
        accel,
        hidden: if accel == Accel::Tcg { run.hidden } else { "" },
        console: dir.join(format!("{}.console", run.name)),
        deadline: DEADLINE,
    })?;
    let end = listen(&machine, run, outcome);
    println!("{}: {:.0} s", run.name, machine.elapsed().as_secs_f64());
    fs::remove_file(&initrd)?;
    end.with_context(|| format!("the kernel's last words:\n{}", machine.last_words()))
        // The reason first, the evidence after it.
        .map_err(|e| {
            let reason = e.root_cause().to_string();
            anyhow::anyhow!("{reason}\n{e}")
        })
}

/// Reads what `init.sh` and the tests say, until the machine is done.
fn listen(machine: &Machine, run: &Run, outcome: &mut Outcome) -> Result<()> {
    let mut tier = None;
    while let Some(line) = machine.line()? {
        println!("{line}");
        match line.split_once(' ') {
            Some(("kernel", release)) => outcome.release = release.to_owned(),
            Some(("lacks", what)) => outcome.lacks.push(what.to_owned()),
            Some(("tier", name)) => tier = Some(name.to_owned()),
            // A test's own words may begin so, too.
            Some(("ended", name)) if tier.as_deref() == Some(name) => tier = None,
            _ => {}
        }
        let counted = match tier.as_deref() {
            Some("bpf") => &mut outcome.bpf,
            Some("mesh") => &mut outcome.mesh,
            _ if line == "done" => return complete(outcome),
            _ => continue,
        };
        let step = format!("vm: {}: {}", run.name, tier.as_deref().unwrap_or_default());
        counted.read(&step, &line);
    }
    bail!("the machine went off before its tests were done")
}

/// Silence is not success: each tier owes its results.
fn complete(outcome: &Outcome) -> Result<()> {
    let mesh = &outcome.mesh;
    let results = mesh.passed + mesh.failed + mesh.skipped;
    ensure!(
        results == payload::smoke_tests(),
        "{results} results of the {} tests of the tier mesh",
        payload::smoke_tests()
    );
    ensure!(!outcome.bpf.is_empty(), "no result of the tier bpf");
    Ok(())
}

fn build() -> Result<Built> {
    ebpf::build()?;
    let agent = if env::var_os(agent::BINARY).is_some() {
        agent::binary()?
    } else {
        image::AGENT_PROGRAM.build()?
    };
    let [bpf, mesh] = test_programs()?;
    Ok(Built { bpf, mesh, agent })
}

/// The programs that hold the tiers' tests.
fn test_programs() -> Result<[PathBuf; 2]> {
    let output = shell::cargo()
        .args(["test", "-p", "picomesh-tests", "--no-run"])
        .args(["--message-format", "json-render-diagnostics"])
        .stderr(Stdio::inherit())
        .output()
        .context("start cargo test")?;
    ensure!(output.status.success(), "the tests do not compile");
    let text = String::from_utf8_lossy(&output.stdout);
    let program = |tier: &str| {
        text.lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok())
            .find(|message| {
                message["target"]["name"] == tier && message["target"]["kind"][0] == "test"
            })
            .and_then(|message| message["executable"].as_str().map(PathBuf::from))
            .with_context(|| format!("cargo names no program of the tier {tier}"))
    };
    Ok([program("bpf")?, program("mesh")?])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_that_nobody_knows_is_named() {
        let error = chosen(&["6.2".into()]).map(|runs| runs.len());
        assert!(error.is_err_and(|e| e.to_string().contains("6.2")));
        assert_eq!(chosen(&[]).map_or(0, |runs| runs.len()), RUNS.len());
    }

    #[test]
    fn silence_of_a_tier_is_no_success() {
        let mut outcome = Outcome::default();
        outcome.mesh.passed = payload::smoke_tests();
        assert!(complete(&outcome).is_err());
        outcome.bpf.passed = 1;
        assert!(complete(&outcome).is_ok());
        outcome.mesh.passed -= 1;
        assert!(complete(&outcome).is_err());
    }
}

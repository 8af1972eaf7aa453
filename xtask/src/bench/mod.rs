//! `cargo xtask bench`: what the mesh costs, beside what its peers cost, in one run.
//!
//! Every round goes through all contenders, one after the other, so that a machine that gets
//! slower or faster over the run does so for all of them. [`stage`] sets a contender up,
//! [`load`] is what a client does, [`measure`] is one contender in one round, [`report`] makes
//! tables and ratios of the rounds. Nothing here knows how the agent works: it is a program
//! between two addresses, like its peers.

mod contender;
mod load;
mod measure;
mod peers;
mod report;
mod spin;
mod stage;
mod usage;

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, ensure};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use picomesh_tests::{agent::BINARY, reaper};
use serde_json::json;

use self::{
    contender::Contender,
    measure::{Plan, Round},
    report::Report,
    usage::Machine,
};
use crate::{
    ebpf, image,
    needs::{self, Purpose},
};

/// Files that a thousand connections need on either side of them, and to spare.
const FILES: u64 = 8_192;
/// What a machine may do for others, as a share of its CPU time, and still be worth measuring.
const QUIET: f64 = 0.05;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Shorter loads: under five minutes after the build, with wider spreads
    #[arg(long)]
    quick: bool,
    /// Write every figure of every round, and what machine it was, to FILE
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Only these contenders (again or separated by commas for several)
    #[arg(long, value_name = "NAME", value_enum, value_delimiter = ',')]
    only: Vec<Contender>,
    /// How often each contender is measured
    #[arg(long, value_name = "N")]
    rounds: Option<u32>,
    /// Measure latency once more with every CPU kept awake by a spinner of idle priority
    #[arg(long)]
    spin: bool,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "the benchmark makes network namespaces and needs root; call it with sudo"
    );
    let plan = plan(args)?;
    let contenders: Vec<Contender> = Contender::ALL
        .into_iter()
        .filter(|c| args.only.is_empty() || args.only.contains(c))
        .collect();
    needs::ensure(&[Purpose::World, Purpose::Bench])?;
    let agent = if contenders.iter().any(|c| c.is_picomesh()) {
        Some(agent()?)
    } else {
        None
    };
    raise_open_files()?;
    reaper::install()?;

    let machine = Machine::here();
    println!(
        "{machine}; {} rounds of {:?} loads",
        plan.rounds, plan.measure
    );
    let busy = usage::busy_share(Duration::from_secs(1))?;
    if busy > QUIET {
        println!(
            "warning: others use {:.0} % of this machine; the figures will not mean much",
            busy * 100.0
        );
    }
    let began = Instant::now();
    let (rounds, broken) = measure_all(&contenders, &plan, agent.as_deref());
    let took = began.elapsed();

    let report = Report::of(&rounds);
    println!("\n{}", report.tables());
    println!(
        "Median (least–most) of {} rounds; ratios within a round. CPU is user and system time of \
         the proxies on both nodes; what the kernel does in softirq context is not attributed. \
         Memory is that of the larger side. A peer is dialled at its node's address: it pays for \
         no redirection, and the server sees the node.",
        plan.rounds
    );
    let targets = report.targets();
    if !targets.is_empty() {
        println!();
    }
    for verdict in &targets {
        println!("{}", verdict.line());
    }
    if let Some(file) = &args.json {
        let all = json!({
            "unix_time": SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs(),
            "took_seconds": took.as_secs_f64(),
            "machine": machine,
            "busy_before": busy,
            "agent": agent,
            "plan": plan,
            "rounds": rounds,
            "summary": report.summary(),
            "ratios": report.ratios(),
            "targets": targets,
            "broken": broken,
        });
        write_json(file, &all)?;
        println!("\nEvery figure is in {}.", file.display());
    }
    println!("\nTook {} s.", took.as_secs());
    ensure!(
        broken.is_empty(),
        "{} measurements are missing:\n{}",
        broken.len(),
        broken.join("\n")
    );
    Ok(ExitCode::SUCCESS)
}

/// The agent's binary: a named one, else the release build of this checkout.
fn agent() -> Result<PathBuf> {
    if let Some(named) = std::env::var_os(BINARY) {
        let named = PathBuf::from(named);
        ensure!(
            named.is_file(),
            "{BINARY} is {}: no such file; leave it out and the agent is built",
            named.display()
        );
        return Ok(named);
    }
    ebpf::build()?;
    image::AGENT_PROGRAM.build()
}

/// Goes through the rounds; what could not be measured comes back in words. A contender that
/// failed once is tried again in the next round.
fn measure_all(
    contenders: &[Contender],
    plan: &Plan,
    agent: Option<&Path>,
) -> (Vec<Round>, Vec<String>) {
    let (mut rounds, mut broken) = (Vec::new(), Vec::new());
    for number in 1..=plan.rounds {
        for contender in contenders {
            let began = Instant::now();
            print!("round {number}/{}  {:<18} ", plan.rounds, contender.name());
            let _ = std::io::Write::flush(&mut std::io::stdout());
            match measure::round(*contender, number, plan, agent) {
                Ok(round) => {
                    println!("{}  ({:.0?})", one_line(&round), began.elapsed());
                    rounds.push(round);
                }
                Err(e) => {
                    println!("failed");
                    eprintln!("  {e:#}");
                    broken.push(format!("round {number}, {}: {e:#}", contender.name()));
                }
            }
        }
    }
    (rounds, broken)
}

fn plan(args: &Args) -> Result<Plan> {
    let plan = if args.quick {
        Plan {
            rounds: 3,
            warm: Duration::from_millis(300),
            measure: Duration::from_millis(1_500),
            settle: Duration::from_secs(3),
            memory_rounds: 1,
            spin: args.spin,
        }
    } else {
        Plan {
            rounds: 5,
            warm: Duration::from_secs(1),
            measure: Duration::from_secs(5),
            settle: Duration::from_secs(10),
            memory_rounds: u32::MAX,
            spin: args.spin,
        }
    };
    let rounds = args.rounds.unwrap_or(plan.rounds);
    ensure!(rounds > 0, "--rounds is 0; give it at least 1");
    Ok(Plan {
        rounds,
        memory_rounds: plan.memory_rounds.min(rounds),
        ..plan
    })
}

/// What a person who waits wants to see at once.
fn one_line(round: &Round) -> String {
    let value = |metric: measure::Metric| round.values.get(metric.key()).copied().unwrap_or(0.0);
    let mut line = format!(
        "p50 {:.0} µs, {:.0} req/s, {:.0} connections/s, {:.1} Gbit/s",
        value(measure::Metric::P50),
        value(measure::Metric::Requests),
        value(measure::Metric::Connections),
        value(measure::Metric::Bulk),
    );
    for (load, count) in &round.failed {
        line += &format!(", {count} failed in {load}");
    }
    line
}

/// A thousand connections take more files than shells allow by default. What this process starts
/// inherits the limit.
fn raise_open_files() -> Result<()> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    ensure!(
        hard >= FILES,
        "the limit of open files is {hard}; raise it to {FILES} (ulimit -Hn {FILES})"
    );
    if soft < hard {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard).context("raise the limit of open files")?;
    }
    Ok(())
}

fn write_json(file: &Path, value: &serde_json::Value) -> Result<()> {
    let mut text = serde_json::to_string_pretty(value)?;
    text.push('\n');
    std::fs::write(file, text).with_context(|| format!("write {}", file.display()))
}

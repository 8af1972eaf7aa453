//! `cargo xtask soak`: mixed traffic for as long as one wants, every byte checked, while agents die,
//! policies change, pods come and go and certificates of two minutes are renewed.
//!
//! The story of a run: traffic without disturbances, calm, the agents' size; then disturbances one
//! after the other with traffic throughout; then traffic without them, calm, the size again. What
//! failed and is not explained by what was done to its nodes or its pod makes the run fail, and so
//! does any byte lost or changed, anybody served who must not be, and an agent that grew.

mod disturbances;
mod ledger;
mod report;
mod server;
mod stage;
mod stream;
mod talk;
mod workers;

use std::{
    io::Write,
    path::PathBuf,
    process::ExitCode,
    sync::atomic::Ordering,
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, bail, ensure};
use picomesh_tests::{agent, reaper, requirements, wait};

use self::{
    disturbances::Disturbance,
    report::Report,
    stage::{Size, Stage},
    stream::Chance,
    workers::Workers,
};
use crate::{
    ebpf, image,
    needs::{self, Purpose},
    test::Count,
};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// How long disturbances go on
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=24 * 60))]
    minutes: u64,
    /// Only these disturbances, by any part of their name; all of them if not given
    #[arg(long = "only", value_name = "WORD")]
    only: Vec<String>,
    /// Repeats the choices of an earlier run, which printed it
    #[arg(long, value_name = "NUMBER")]
    seed: Option<u64>,
}

/// Traffic before the first size is taken, and after the last disturbance.
const UNDISTURBED: Duration = Duration::from_secs(20);
/// After this without connections an agent has given back what it gives back.
const SETTLES: Duration = Duration::from_secs(12);

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    if let Some(missing) = requirements::missing().first() {
        bail!("the soak needs {}: {}", missing.what, missing.remedy);
    }
    reaper::install()?;
    let report = soak(args)?;
    println!("{report}");
    Ok(if report.failures().is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// A short soak as one test of a longer list.
pub(crate) fn count(minutes: u64) -> Count {
    let args = Args {
        minutes,
        only: Vec::new(),
        seed: None,
    };
    match soak(&args) {
        Ok(report) => {
            println!("{report}");
            match report.failures().first() {
                None => Count::success(),
                Some(first) => Count::failure("soak", first),
            }
        }
        Err(e) => Count::failure("soak", &format!("{e:#}")),
    }
}

fn soak(args: &Args) -> Result<Report> {
    let list: Vec<&Disturbance> = disturbances::ALL
        .iter()
        .filter(|d| args.only.is_empty() || args.only.iter().any(|word| d.name.contains(word)))
        .collect();
    ensure!(
        !list.is_empty(),
        "--only {}: no disturbance has such a name; there are: {}",
        args.only.join(" "),
        disturbances::ALL.map(|d| d.name).join(", ")
    );
    let seed = args.seed.unwrap_or_else(|| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        now.map_or(1, |now| now.as_nanos() as u64 & 0xffff_ffff)
    });
    println!("seed {seed}");
    let mut chance = Chance::new(seed);
    let mut stage = Stage::new(agent()?)?;
    let workers = Workers::start(&stage, chance.next())?;

    say(&stage, "traffic, undisturbed");
    thread::sleep(UNDISTURBED);
    let before = sizes_in_calm(&stage)?;

    let start = Instant::now();
    let whole = Duration::from_secs(60 * args.minutes);
    if let Err(e) = disturb(&mut stage, &list, &mut chance, start, whole) {
        // What was found until then is worth more than a clean end.
        stage.shared.ledger.violation(format!("{e:#}"));
    }

    say(&stage, "traffic, undisturbed");
    thread::sleep(UNDISTURBED);
    let after = sizes_in_calm(&stage)?;
    workers.join()?;
    stage.watch_agents();
    let log = stage.world.logs();
    Ok(Report {
        took: start.elapsed(),
        verdict: stage.shared.ledger.verdict(),
        intrusions: stage.shared.intrusions.load(Ordering::Relaxed),
        before,
        after,
        reasons: report::reasons(&log)?,
    })
}

/// One disturbance after the other in an order of chance, with pauses in which nothing may fail.
fn disturb(
    stage: &mut Stage,
    list: &[&Disturbance],
    chance: &mut Chance,
    start: Instant,
    whole: Duration,
) -> Result<()> {
    let mut left: Vec<&Disturbance> = Vec::new();
    while start.elapsed() < whole {
        ensure!(!reaper::stopping(), "told to stop");
        // All of them before any comes again.
        if left.is_empty() {
            left = list.to_vec();
        }
        let next = left.remove(chance.between(0, left.len() as u64 - 1) as usize);
        // In the second half one agent lives on, so that what it does not give back adds up.
        let node = if next.ends_an_agent && start.elapsed() * 2 > whole {
            0
        } else {
            chance.between(0, 1) as usize
        };
        say(stage, &format!("{} (node{node})", next.name));
        (next.play)(stage, chance, node).context(next.name)?;
        stage.watch_agents();
        thread::sleep(Duration::from_millis(chance.between(2_000, 8_000)));
    }
    Ok(())
}

/// Lets every connection end, waits for the agents to give back what they can, and looks.
fn sizes_in_calm(stage: &Stage) -> Result<Vec<Size>> {
    say(stage, "calm");
    let shared = &stage.shared;
    shared.calm.store(true, Ordering::SeqCst);
    // The longest anybody waits for bytes that do not come, three times in a row.
    let quiet = wait::until("every connection ends", 4 * talk::PATIENCE, || {
        shared.talking.load(Ordering::SeqCst) == 0
    });
    if let Err(e) = quiet {
        let open = shared.talking.load(Ordering::SeqCst);
        shared
            .ledger
            .violation(format!("{e:#}: {open} conversations hang"));
    }
    thread::sleep(SETTLES);
    let sizes = stage.sizes();
    shared.calm.store(false, Ordering::SeqCst);
    sizes
}

/// The binary that ships, built if it is not named by the environment.
fn agent() -> Result<PathBuf> {
    if std::env::var_os(agent::BINARY).is_some() {
        return agent::binary();
    }
    needs::ensure(&[Purpose::Build, Purpose::World])?;
    ebpf::build()?;
    image::AGENT_PROGRAM.build()
}

fn say(stage: &Stage, what: &str) {
    let (opened, failed, bytes) = stage.shared.ledger.glance();
    println!(
        "{opened:>8} connections, {failed:>5} of them failed, {:>8.1} MB: {what}",
        bytes as f64 / 1e6
    );
    let _ = std::io::stdout().flush();
}

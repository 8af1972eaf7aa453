//! `cargo xtask demo`: the mesh on one machine, shown by measuring it.
//!
//! Builds what is missing, makes the same world that the tests use, and plays scenes on it. A scene
//! prints what it measured and fails if that is not what the mesh promises, so the exit code tells.

mod scenes;
mod stage;

use std::{
    io::{IsTerminal, Write},
    process::ExitCode,
    time::Instant,
};

use anyhow::{Result, bail};
use picomesh_tests::{agent, reaper, requirements};

use self::stage::Stage;
use crate::{
    ebpf, image,
    needs::{self, Purpose},
};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Leave everything running at the end, and say what to try
    #[arg(long)]
    keep: bool,
    /// Only remove what an earlier --keep left
    #[arg(long, conflicts_with = "keep")]
    clean: bool,
}

/// What a scene has shown, one line each.
pub(crate) type Shown = Result<Vec<String>>;

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    if let Some(missing) = requirements::missing().first() {
        bail!("the demo needs {}: {}", missing.what, missing.remedy);
    }
    reaper::install()?;
    if args.clean {
        let swept = [reaper::sweep(), reaper::sweep_kept(reaper::Kind::World)].concat();
        println!(
            "removed: {}",
            if swept.is_empty() {
                "nothing was left".into()
            } else {
                swept.join(", ")
            }
        );
        return Ok(ExitCode::SUCCESS);
    }
    step("fetching what is missing", || {
        needs::ensure(&[Purpose::Build, Purpose::World])
    })?;
    let agent = if std::env::var_os(agent::BINARY).is_some() {
        agent::binary()?
    } else {
        step("compiling the kernel half", || ebpf::build().map(drop))?;
        step("compiling the agent (minutes, the first time)", || {
            image::AGENT_PROGRAM.build()
        })?
    };
    let mut stage = step("making two nodes and their pods", || {
        Stage::new(agent, args.keep)
    })?;

    let mut results = Vec::new();
    for scene in scenes::ALL {
        println!("\n{}", bold(scene.title));
        let start = Instant::now();
        let shown = (scene.play)(&mut stage);
        match &shown {
            Ok(lines) => {
                for line in lines {
                    println!("  {line}");
                }
            }
            Err(e) => println!("  failed: {e:#}"),
        }
        results.push((scene.title, shown.is_ok(), start.elapsed()));
        if shown.is_err() && scene.vital {
            println!("  without it there is nothing more to see");
            break;
        }
    }

    println!("\n{}", bold("Summary"));
    for (title, ok, took) in &results {
        println!(
            "  {} {title} ({:.1} s)",
            if *ok { "ok  " } else { "FAIL" },
            took.as_secs_f64()
        );
    }
    let failed = results.iter().filter(|(_, ok, _)| !ok).count();
    if failed > 0 {
        println!("{}", stage.evidence());
    }
    if args.keep {
        println!("\n{}", stage.what_to_try());
    }
    drop(stage);
    if failed > 0 {
        bail!("{failed} of {} scenes failed", results.len());
    }
    println!(
        "  all {} scenes showed what they promise{}",
        results.len(),
        if args.keep {
            ""
        } else {
            "; every trace is removed"
        }
    );
    Ok(ExitCode::SUCCESS)
}

/// Says what is being done, and how long it took.
fn step<T>(what: &str, f: impl FnOnce() -> Result<T>) -> Result<T> {
    print!("{what} … ");
    std::io::stdout().flush()?;
    let start = Instant::now();
    let done = f();
    match &done {
        Ok(_) => println!("{:.1} s", start.elapsed().as_secs_f64()),
        Err(_) => println!("failed"),
    }
    done
}

fn bold(text: &str) -> String {
    if std::io::stdout().is_terminal() {
        format!("\x1b[1m{text}\x1b[0m")
    } else {
        text.to_owned()
    }
}

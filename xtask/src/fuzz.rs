//! `cargo xtask fuzz`: bytes that nobody foresaw, for everything that reads bytes of others, and
//! packets for the kernel half.
//!
//! The targets of bytes lie in `tests/fuzz/fuzz_targets`, in the form that cargo-fuzz wants; here
//! they are built and run without it, because a stable compiler can do that: libFuzzer needs
//! instrumented code, and what instruments it is a flag of LLVM's. There is no address sanitizer:
//! what the targets run is Rust without `unsafe`, and its panics, overflows and endless loops show
//! without one. The target `packets` is the model of the kernel half's rules, in the tier `bpf`.
//!
//! What a run finds on its way is kept in `target/fuzz/corpus`, so the next one begins there;
//! `tests/fuzz/corpus` holds what everybody begins with.

use std::{
    env::consts::ARCH,
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use picomesh_tests::requirements;

use crate::{
    ebpf,
    needs::{self, Purpose},
    shell,
    test::{Count, bpf_tests, run_step},
};

/// The target that is no program of libFuzzer's.
const PACKETS: &str = "packets";
/// Of one target, where nobody says otherwise.
const SECONDS: u64 = 60;
const MILLION: u64 = 1_000_000;

const CRATE: &str = "tests/fuzz";

/// What makes code tell libFuzzer where it went and what it compared.
const INSTRUMENTATION: [&str; 8] = [
    "--cfg=fuzzing",
    "-Ccodegen-units=1",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Cllvm-args=-simplifycfg-branch-fold-threshold=0",
];

/// Longest input: what we read from others is small, and long inputs are slow.
const LONGEST: usize = 8192;
/// One input that takes so long, or makes the process so large, is a finding.
const ONE_INPUT: Duration = Duration::from_secs(10);
const LARGEST_MB: usize = 1024;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only these; all of them if none is named
    targets: Vec<String>,
    /// How long each target runs
    #[arg(long, value_name = "N", default_value_t = SECONDS)]
    seconds: u64,
    /// How many packets `packets` judges
    #[arg(long, value_name = "N", default_value_t = MILLION)]
    packets: u64,
    /// Where random packets begin
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Run one target on this file alone, to see what it does
    #[arg(long, value_name = "FILE")]
    input: Option<PathBuf>,
    /// Name the targets instead of running them
    #[arg(long)]
    list: bool,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let known = targets()?;
    if args.list {
        known.iter().for_each(|name| println!("{name}"));
        return Ok(ExitCode::SUCCESS);
    }
    for name in &args.targets {
        ensure!(
            known.contains(name),
            "there is no target {name}; there are {}",
            known.join(", ")
        );
    }
    if let Some(input) = &args.input {
        let [name] = args.targets.as_slice() else {
            bail!("--input wants exactly one target before it");
        };
        return once(name, input);
    }
    let wanted = if args.targets.is_empty() {
        known
    } else {
        args.targets.clone()
    };
    let count = run_all(&wanted, args.seconds, args.packets, args.seed);
    println!(
        "{} passed, {} failed, {} skipped",
        count.passed, count.failed, count.skipped
    );
    Ok(if count.failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Every target for a minute and a million packets, for `test --full`.
pub(crate) fn count() -> Count {
    match targets() {
        Ok(targets) => run_all(&targets, SECONDS, MILLION, 1),
        Err(e) => Count::failure("fuzz", &format!("{e:#}")),
    }
}

/// The names of all targets.
fn targets() -> Result<Vec<String>> {
    let dir = shell::root().join(CRATE).join("fuzz_targets");
    let files = fs::read_dir(&dir).with_context(|| format!("read {}", dir.display()))?;
    let mut names: Vec<String> = files
        .flatten()
        .filter_map(|file| Some(file.file_name().to_str()?.strip_suffix(".rs")?.to_owned()))
        .collect();
    names.sort();
    names.push(PACKETS.to_owned());
    Ok(names)
}

fn run_all(targets: &[String], seconds: u64, packets: u64, seed: u64) -> Count {
    let mut total = Count::default();
    let bytes: Vec<&String> = targets.iter().filter(|name| *name != PACKETS).collect();
    if !bytes.is_empty() {
        match build() {
            Ok(dir) => {
                for name in bytes {
                    total.add(match fuzz(&dir, name, seconds) {
                        Ok(count) => count,
                        Err(e) => Count::failure(&format!("fuzz: {name}"), &format!("{e:#}")),
                    });
                }
            }
            Err(e) => total.add(Count::failure("fuzz: build", &format!("{e:#}"))),
        }
    }
    if targets.iter().any(|name| name == PACKETS) {
        total.add(judge_packets(packets, seed));
    }
    total
}

/// Builds all targets and says where their programs are.
fn build() -> Result<PathBuf> {
    needs::ensure(&[Purpose::Build, Purpose::Fuzz])?;
    copy_lock()?;
    let target = target_dir();
    // No target loads the kernel half, and with it each change of it would build the agent again.
    let no_object = target.join("no-object");
    if !no_object.is_file() {
        fs::write(&no_object, [])?;
    }
    let triple = format!("{ARCH}-unknown-linux-gnu");
    let mut command = shell::cargo();
    command
        .args(["build", "--quiet", "--release", "--manifest-path"])
        .arg(shell::root().join(CRATE).join("Cargo.toml"))
        // With a triple, flags are not for build scripts.
        .args(["--target", &triple, "--target-dir"])
        .arg(&target)
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env("RUSTFLAGS", INSTRUMENTATION.join(" "))
        .env("PICOMESH_BPF_OBJECT", no_object);
    shell::run(&mut command).context("build the fuzz targets")?;
    Ok(target.join(triple).join("release"))
}

fn target_dir() -> PathBuf {
    shell::target_dir().join("fuzz")
}

/// The targets are built with the workspace's versions of everything. Their own lock is a copy
/// that cargo has added libFuzzer to, made anew when the workspace's changes. To be called before
/// cargo is shown their manifest.
pub(crate) fn copy_lock() -> Result<()> {
    let ours = fs::read(shell::root().join("Cargo.lock")).context("read Cargo.lock")?;
    let copy = shell::root().join(CRATE).join("Cargo.lock");
    let copied = target_dir().join("Cargo.lock");
    if copy.is_file() && fs::read(&copied).is_ok_and(|before| before == ours) {
        return Ok(());
    }
    fs::create_dir_all(target_dir())?;
    fs::write(&copy, &ours).with_context(|| format!("write {}", copy.display()))?;
    fs::write(&copied, &ours).with_context(|| format!("write {}", copied.display()))
}

/// Runs one target for so long, and prints one line.
fn fuzz(programs: &Path, name: &str, seconds: u64) -> Result<Count> {
    let found = target_dir().join("corpus").join(name);
    let artifacts = target_dir().join("artifacts").join(name);
    fs::create_dir_all(&found)?;
    fs::create_dir_all(&artifacts)?;
    let before = files(&artifacts)?;
    let output = Command::new(programs.join(name))
        // New inputs go to the first.
        .arg(&found)
        .arg(shell::root().join(CRATE).join("corpus").join(name))
        .arg(format!("-artifact_prefix={}/", artifacts.display()))
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-max_len={LONGEST}"))
        .arg(format!("-timeout={}", ONE_INPUT.as_secs()))
        .arg(format!("-rss_limit_mb={LARGEST_MB}"))
        .arg("-print_final_stats=1")
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("start {name}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    if output.status.success() {
        let runs = after(&said, "stat::number_of_executed_units:");
        ensure!(runs > 0, "ran nothing:\n{}", last_lines(&said, 20));
        println!(
            "fuzz: {name}: {runs} inputs in {seconds} s, {} edges, {} inputs worth keeping",
            after(&said, "cov:"),
            files(&found)?.len()
        );
        return Ok(Count::success());
    }
    println!("{}", last_lines(&said, 40));
    let crash = files(&artifacts)?
        .into_iter()
        .find(|file| !before.contains(file));
    let why = match crash {
        Some(file) => format!(
            "broke on {0}; to see it again: cargo xtask fuzz {name} --input {0}",
            file.display()
        ),
        None => format!("ended with {} and left no input", output.status),
    };
    Ok(Count::failure(&format!("fuzz: {name}"), &why))
}

/// Runs one target on one file, and shows everything it says.
fn once(name: &str, input: &Path) -> Result<ExitCode> {
    ensure!(
        name != PACKETS,
        "packets have seeds and no files: give --seed"
    );
    ensure!(input.is_file(), "{} is no file", input.display());
    let program = build()?.join(name);
    let status = Command::new(program).arg(input).status()?;
    println!("{name} on {}: {status}", input.display());
    Ok(if status.success() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn judge_packets(packets: u64, seed: u64) -> Count {
    if let Some(missing) = requirements::missing().first() {
        let reason = format!("{} is missing: {}", missing.what, missing.remedy);
        return Count::skipped("fuzz: packets", &reason);
    }
    if let Err(e) = needs::ensure(&[Purpose::World]).and_then(|()| ebpf::build().map(drop)) {
        return Count::failure("fuzz: packets", &format!("{e:#}"));
    }
    let mut command = bpf_tests(Some("model::"));
    command
        .env("PICOMESH_MODEL_PACKETS", packets.to_string())
        .env("PICOMESH_MODEL_SEED", seed.to_string());
    run_step("fuzz: packets", &mut command)
}

fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(dir).with_context(|| format!("read {}", dir.display()))?;
    Ok(entries.flatten().map(|entry| entry.path()).collect())
}

/// The number behind the last `word`, or zero.
fn after(text: &str, word: &str) -> u64 {
    text.rsplit_once(word)
        .and_then(|(_, rest)| rest.split_whitespace().next())
        .and_then(|number| number.parse().ok())
        .unwrap_or(0)
}

fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_is_built_and_has_something_to_begin_with() {
        let manifest = fs::read_to_string(shell::root().join(CRATE).join("Cargo.toml")).unwrap();
        for name in targets().unwrap() {
            if name == PACKETS {
                continue;
            }
            assert!(manifest.contains(&format!("name = \"{name}\"")), "{name}");
            let corpus = shell::root().join(CRATE).join("corpus").join(&name);
            let kept = files(&corpus).unwrap();
            assert!(!kept.is_empty(), "{name}");
            for file in kept {
                let length = fs::metadata(&file).unwrap().len();
                assert!(length <= LONGEST as u64, "{}", file.display());
            }
        }
    }

    #[test]
    fn libfuzzers_last_numbers_are_read() {
        let said = "#2\tINITED cov: 12 ft: 13\n#99\tDONE   cov: 345 ft: 6\n\
                    stat::number_of_executed_units: 99\n";
        assert_eq!(after(said, "cov:"), 345);
        assert_eq!(after(said, "stat::number_of_executed_units:"), 99);
        assert_eq!(after(said, "nothing:"), 0);
    }
}

//! `cargo xtask mutants`: changes the files that decide, one operator at a time, and runs their
//! tests. A change that no test notices must have a written reason in `xtask/mutants.txt`.

use std::{collections::BTreeMap, fs, process::ExitCode};

use anyhow::{Context, Result, bail};

use crate::{
    cache::CARGO_MUTANTS,
    needs::{self, Purpose},
    shell,
    test::Count,
};

/// The files whose every branch is somebody's access.
const FILES: [&str; 7] = [
    "agent/src/state/policy.rs",
    "agent/src/state/network_policy.rs",
    "agent/src/state/servers.rs",
    "agent/src/state/endpoints.rs",
    "agent/src/state/resolve.rs",
    "agent/src/state/frontends.rs",
    "agent/src/state/balance.rs",
];

/// Survivors that were looked at: `FILE: CHANGE = REASON`, one a line.
const ACCEPTED: &str = "xtask/mutants.txt";

#[derive(clap::Args)]
pub(crate) struct Args {}

pub(crate) fn run(_args: &Args) -> Result<ExitCode> {
    let count = count();
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

/// One pass for all mutants together, or one failure for each survivor without a reason.
pub(crate) fn count() -> Count {
    match survivors() {
        Ok(survivors) if survivors.is_empty() => Count::success(),
        Ok(survivors) => {
            let mut count = Count::default();
            for survivor in survivors {
                count.add(Count::failure(
                    "mutants",
                    &format!("no test notices: {survivor}; test it or tell why in {ACCEPTED}"),
                ));
            }
            count
        }
        Err(e) => Count::failure("mutants", &format!("{e:#}")),
    }
}

/// Changes that no test noticed and nobody explained.
fn survivors() -> Result<Vec<String>> {
    needs::ensure(&[Purpose::Build, Purpose::Mutants])?;
    let accepted = accepted()?;
    let output = shell::target_dir().join("mutants");
    fs::create_dir_all(&output)?;
    let mut command = shell::cargo();
    command.args([
        "mutants",
        "--package",
        "picomesh-agent",
        "--no-shuffle",
        "--colors",
        "never",
    ]);
    for file in FILES {
        command.args(["--file", file]);
    }
    command
        .arg("--output")
        .arg(&output)
        .args(["--timeout", "120", "--cargo-test-arg=--lib"])
        .env("PATH", path());
    let status = command.status().context("start cargo mutants")?;
    // 0: all caught; 2: some missed; 3: some timed out, which counts as noticed.
    if !matches!(status.code(), Some(0 | 2 | 3)) {
        bail!("cargo mutants: {status}");
    }
    let missed = fs::read_to_string(output.join("mutants.out/missed.txt"))
        .context("read what cargo mutants missed")?;
    Ok(missed
        .lines()
        .map(without_position)
        .filter(|name| !accepted.contains_key(name))
        .collect())
}

fn accepted() -> Result<BTreeMap<String, String>> {
    let text = fs::read_to_string(shell::root().join(ACCEPTED))
        .with_context(|| format!("read {ACCEPTED}"))?;
    parse_accepted(&text)
}

fn parse_accepted(text: &str) -> Result<BTreeMap<String, String>> {
    let mut accepted = BTreeMap::new();
    for line in text.lines() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        // A change may contain "=" of its own; the reason may not contain " = ".
        match line.rsplit_once(" = ") {
            Some((name, reason)) if !reason.trim().is_empty() => {
                accepted.insert(name.trim().to_owned(), reason.trim().to_owned());
            }
            Some(_) | None => bail!("{ACCEPTED}: {line:?} has no reason; write CHANGE = REASON"),
        }
    }
    Ok(accepted)
}

/// `file.rs:12:5: change` → `file.rs: change`; lines move, changes stay.
fn without_position(mutant: &str) -> String {
    match mutant.split_once(": ") {
        Some((place, change)) => {
            let file = place.split(':').next().unwrap_or(place);
            format!("{file}: {change}")
        }
        None => mutant.to_owned(),
    }
}

fn path() -> String {
    let path = std::env::var("PATH").unwrap_or_default();
    format!("{}:{path}", CARGO_MUTANTS.bin_dir().display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_survivor_is_known_by_file_and_change() {
        assert_eq!(
            without_position("agent/src/state/policy.rs:12:5: replace a == b with true"),
            "agent/src/state/policy.rs: replace a == b with true"
        );
    }

    #[test]
    fn an_accepted_survivor_needs_a_reason() {
        let good = parse_accepted("# why\n\na.rs: replace == with != = both are zero\n");
        assert!(good.is_ok_and(|a| a["a.rs: replace == with !="] == "both are zero"));
        assert!(parse_accepted("a.rs: replace x with y\n").is_err());
    }
}

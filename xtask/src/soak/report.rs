//! What a soak found, for a person and for the exit code.

use std::{collections::BTreeMap, fmt, fs, path::Path, time::Duration};

use anyhow::{Context, Result};

use super::{ledger::Verdict, stage::Size, workers};

/// As many as this may grow without being a leak.
const MORE_MEMORY: f64 = 1.2;
const MORE_DESCRIPTORS: usize = 10;
/// Details shown of each kind of failure.
const SHOWN: usize = 20;

pub(crate) struct Report {
    pub(crate) took: Duration,
    pub(crate) verdict: Verdict,
    pub(crate) intrusions: u64,
    /// One per node, with no connection open.
    pub(crate) before: Vec<Size>,
    pub(crate) after: Vec<Size>,
    /// What the agents' access logs say of refused and broken connections.
    pub(crate) reasons: BTreeMap<String, u64>,
}

impl Report {
    /// Why the run failed; empty if it did not.
    pub(crate) fn failures(&self) -> Vec<String> {
        let verdict = &self.verdict;
        let mut failures = Vec::new();
        if verdict.bytes_lost + verdict.bytes_wrong > 0 {
            failures.push(format!(
                "{} bytes lost, {} ends got other bytes than were sent",
                verdict.bytes_lost, verdict.bytes_wrong
            ));
        }
        if !verdict.unexplained.is_empty() {
            failures.push(format!(
                "{} connections failed for no reason known",
                verdict.unexplained.len()
            ));
        }
        failures.extend(verdict.violations.iter().cloned());
        for kind in workers::kinds() {
            if verdict.totals.get(kind).is_none_or(|t| t.whole == 0) {
                failures.push(format!("not one connection of kind {kind:?} was whole"));
            }
        }
        if self.intrusions == 0 {
            failures.push("nobody tried the vault".into());
        }
        for (node, (before, after)) in self.before.iter().zip(&self.after).enumerate() {
            if after.resident_kib as f64 > before.resident_kib as f64 * MORE_MEMORY {
                failures.push(format!(
                    "the agent of node{node} grew from {} to {} KiB",
                    before.resident_kib, after.resident_kib
                ));
            }
            if after.descriptors > before.descriptors + MORE_DESCRIPTORS {
                failures.push(format!(
                    "the agent of node{node} had {} descriptors and has {}",
                    before.descriptors, after.descriptors
                ));
            }
        }
        failures
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = &self.verdict;
        writeln!(
            f,
            "\nafter {:.0} s of disturbances",
            self.took.as_secs_f64()
        )?;
        writeln!(
            f,
            "\n{:<22}{:>10}{:>10}{:>10}{:>12}{:>12}",
            "connections", "opened", "whole", "failed", "MB", "longest, s"
        )?;
        for (kind, totals) in &verdict.totals {
            writeln!(
                f,
                "{kind:<22}{:>10}{:>10}{:>10}{:>12.1}{:>12.1}",
                totals.opened,
                totals.whole,
                totals.failed,
                totals.bytes as f64 / 1e6,
                totals.longest.as_secs_f64()
            )?;
        }
        writeln!(
            f,
            "\nbytes lost: {}; ends that got other bytes: {}",
            verdict.bytes_lost, verdict.bytes_wrong
        )?;
        writeln!(
            f,
            "attempts of a client without identity at the vault: {}",
            self.intrusions
        )?;
        writeln!(
            f,
            "\n{:<38}{:>8}{:>24}",
            "done", "times", "connections failed"
        )?;
        for (what, times) in &verdict.events {
            let failed = verdict.explained.get(what).copied().unwrap_or(0);
            writeln!(f, "{what:<38}{times:>8}{failed:>24}")?;
        }
        writeln!(
            f,
            "{:<38}{:>8}{:>24}",
            "unexplained",
            "",
            verdict.unexplained.len()
        )?;
        writeln!(f, "\nwhat the access logs say of them")?;
        for (reason, times) in &self.reasons {
            writeln!(f, "  {reason:<36}{times:>8}")?;
        }
        writeln!(f, "\nagents, no connection open")?;
        for (node, (before, after)) in self.before.iter().zip(&self.after).enumerate() {
            writeln!(
                f,
                "  node{node}: {:.1} MB → {:.1} MB resident, {} → {} descriptors",
                before.resident_kib as f64 / 1024.0,
                after.resident_kib as f64 / 1024.0,
                before.descriptors,
                after.descriptors
            )?;
        }
        for unexplained in verdict.unexplained.iter().take(SHOWN) {
            writeln!(f, "unexplained: {unexplained}")?;
        }
        let failures = self.failures();
        for failure in failures.iter().take(SHOWN) {
            writeln!(f, "failed: {failure}")?;
        }
        if failures.len() > SHOWN {
            writeln!(f, "failed: {} more", failures.len() - SHOWN)?;
        }
        if failures.is_empty() {
            writeln!(f, "nothing lost, nothing unexplained")?;
        }
        Ok(())
    }
}

/// The error fields in all agents' access logs, counted.
pub(crate) fn reasons(logs: &Path) -> Result<BTreeMap<String, u64>> {
    let mut reasons = BTreeMap::new();
    for entry in fs::read_dir(logs)?.flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if !(name.starts_with("agent-") && name.ends_with(".out")) {
            continue;
        }
        let text = fs::read(entry.path()).with_context(|| format!("read {name}"))?;
        for line in String::from_utf8_lossy(&text).lines() {
            if let Some(reason) = reason_of(line) {
                *reasons.entry(reason.to_owned()).or_default() += 1;
            }
        }
    }
    Ok(reasons)
}

/// `… error="policy: unauthorized" …` → `policy: unauthorized`.
fn reason_of(line: &str) -> Option<&str> {
    let (_, after) = line.split_once(" error=\"")?;
    after.get(..after.find('"')?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reason_is_the_error_field() {
        let line = "2026 error access connection complete bytes=3 error=\"policy: unauthorized\" x";
        assert_eq!(reason_of(line), Some("policy: unauthorized"));
        assert_eq!(
            reason_of("2026 info access connection complete bytes=3"),
            None
        );
    }
}

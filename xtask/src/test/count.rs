//! Counting: what test programs print, line by line, and sums of it.

/// Results so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Count {
    pub(crate) passed: u32,
    pub(crate) failed: u32,
    pub(crate) skipped: u32,
    pub(crate) failures: Vec<String>,
    /// "name: reason"
    pub(crate) skips: Vec<String>,
    /// Tests that said themselves that they were skipped, and that the summary to come counts as
    /// passed.
    pub(crate) skipped_inside: u32,
}

/// How a line begins by which a test says that it cannot run here, with its name and why. libtest
/// knows no skip of a test that has begun.
const SKIPPED_INSIDE: &str = "skipped inside: ";

impl Count {
    pub(crate) fn success() -> Self {
        Self {
            passed: 1,
            ..Self::default()
        }
    }

    /// One failure, said at once.
    pub(crate) fn failure(name: &str, why: &str) -> Self {
        println!("{name}: {why}");
        Self {
            failed: 1,
            failures: vec![format!("{name}: {why}")],
            ..Self::default()
        }
    }

    pub(crate) fn skipped(name: &str, reason: &str) -> Self {
        println!("{name}: skipped: {reason}");
        Self {
            skipped: 1,
            skips: vec![format!("{name}: {reason}")],
            ..Self::default()
        }
    }

    pub(crate) fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
        self.failures.extend(other.failures);
        self.skips.extend(other.skips);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.passed + self.failed + self.skipped == 0
    }

    /// Reads one line of a test program in libtest's format.
    pub(crate) fn read(&mut self, step: &str, line: &str) {
        if let Some(summary) = line.strip_prefix("test result: ") {
            let not_run = std::mem::take(&mut self.skipped_inside);
            self.passed += before(summary, " passed").saturating_sub(not_run);
            self.failed += before(summary, " failed");
            self.skipped += before(summary, " ignored");
        } else if let Some(skip) = line.strip_prefix(SKIPPED_INSIDE) {
            self.skipped += 1;
            self.skipped_inside += 1;
            self.skips.push(format!("{step}: {skip}"));
        } else if let Some((name, outcome)) = line
            .strip_prefix("test ")
            .and_then(|rest| rest.rsplit_once(" ... "))
        {
            let name = name.trim();
            if outcome.starts_with("FAILED") {
                self.failures.push(format!("{step}: {name}"));
            } else if let Some(reason) = outcome.strip_prefix("ignored") {
                // libtest writes ", reason", libtest-mimic " (reason)".
                let reason = reason.trim_start_matches([',', ' ', '(']);
                let reason = reason.strip_suffix(')').unwrap_or(reason);
                let reason = if reason.is_empty() {
                    "without a reason"
                } else {
                    reason
                };
                self.skips.push(format!("{step}: {name}: {reason}"));
            }
        }
    }
}

/// The number that stands before `word`.
fn before(summary: &str, word: &str) -> u32 {
    summary
        .split(word)
        .next()
        .and_then(|head| head.rsplit([' ', ';']).next())
        .filter(|_| summary.contains(word))
        .and_then(|number| number.parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn summaries_of_several_binaries_add_up() {
        let mut count = Count::default();
        for line in [
            "running 3 tests",
            "test a::b ... ok",
            "test a::c ... FAILED",
            "test d ... ignored, needs root",
            "test e       ... ignored (nginx is not installed)",
            "test result: FAILED. 1 passed; 1 failed; 2 ignored; 0 measured; 0 filtered out; finished in 0.00s",
            "test result: ok. 12 passed; 0 failed; 0 ignored; 0 measured; 3 filtered out",
        ] {
            count.read("unit: x", line);
        }
        assert_eq!((count.passed, count.failed, count.skipped), (13, 1, 2));
        assert_eq!(count.failures, ["unit: x: a::c"]);
        assert_eq!(
            count.skips,
            [
                "unit: x: d: needs root",
                "unit: x: e: nginx is not installed"
            ]
        );
    }

    #[test]
    fn a_test_that_says_itself_that_it_was_skipped_is_no_pass() {
        let mut count = Count::default();
        for line in [
            "test a ... ok",
            "skipped inside: proxy::b: no network namespace; run it as root",
            "test proxy::b ... ok",
            "test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out",
            "test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out",
        ] {
            count.read("unit: x", line);
        }
        assert_eq!((count.passed, count.failed, count.skipped), (4, 0, 1));
        assert_eq!(
            count.skips,
            ["unit: x: proxy::b: no network namespace; run it as root"]
        );
    }

    #[test]
    fn what_a_test_prints_is_not_counted() {
        let mut count = Count::default();
        count.read("x", "5 passed, by the way");
        count.read("x", "testing ... FAILED");
        assert!(count.is_empty() && count.failures.is_empty());
    }
}

//! The table of kernels that stands in the README.

use std::fmt::Write as _;

use crate::test::Count;

/// What one machine showed.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    pub(super) run: String,
    /// `uname -r`; empty if it never came up.
    pub(super) release: String,
    pub(super) lacks: Vec<String>,
    pub(super) bpf: Count,
    pub(super) mesh: Count,
    /// Why the machine did not get to its end.
    pub(super) broken: Option<String>,
}

impl Outcome {
    /// All results, the machine's own end included.
    pub(super) fn count(&self) -> Count {
        let mut count = self.bpf.clone();
        count.add(self.mesh.clone());
        if let Some(why) = &self.broken {
            count.failed += 1;
            count.failures.push(format!("vm: {}: {why}", self.run));
        }
        count
    }

    fn hook(&self) -> &'static str {
        let mut numbers = self
            .release
            .split(['.', '-', '+'])
            .map(|n| n.parse::<u32>().unwrap_or(0));
        let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
        match version {
            (0, _) => "–",
            version if version >= (6, 6) => "TCX, clsact",
            _ => "clsact",
        }
    }
}

pub(super) fn table(outcomes: &[Outcome]) -> String {
    let mut table = String::from(
        "| machine | kernel | tc programs by | lacks | bpf | mesh (smoke) |\n\
         | --- | --- | --- | --- | --- | --- |\n",
    );
    for outcome in outcomes {
        let lacks = match (&outcome.broken, outcome.lacks.join(", ")) {
            (Some(why), _) => why.clone(),
            (None, lacks) if lacks.is_empty() => "nothing".into(),
            (None, lacks) => lacks,
        };
        let release = if outcome.release.is_empty() {
            "did not come up"
        } else {
            &outcome.release
        };
        // Writing to a String cannot fail.
        let _ = writeln!(
            table,
            "| {} | {release} | {} | {lacks} | {} | {} |",
            outcome.run,
            outcome.hook(),
            results(&outcome.bpf),
            results(&outcome.mesh)
        );
    }
    table
}

fn results(count: &Count) -> String {
    let mut text = format!("{} passed", count.passed);
    for (number, word) in [(count.failed, "failed"), (count.skipped, "skipped")] {
        if number > 0 {
            let _ = write!(text, ", {number} {word}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_tells_kernel_way_lack_and_results() {
        let outcome = Outcome {
            run: "6.1".into(),
            release: "6.1.0-50-cloud-amd64".into(),
            lacks: vec!["BTF".into()],
            bpf: Count {
                passed: 3,
                failed: 1,
                ..Count::default()
            },
            ..Outcome::default()
        };
        let row = "| 6.1 | 6.1.0-50-cloud-amd64 | clsact | BTF | 3 passed, 1 failed | 0 passed |\n";
        assert!(table(&[outcome]).ends_with(row));
    }

    #[test]
    fn a_machine_that_breaks_is_a_failure() {
        let outcome = Outcome {
            run: "6.1".into(),
            broken: Some("off before its time".into()),
            ..Outcome::default()
        };
        assert_eq!(outcome.count().failed, 1);
        assert!(table(&[outcome]).contains("did not come up"));
    }
}

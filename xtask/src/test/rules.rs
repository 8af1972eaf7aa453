//! Takes the rules of the kernel half out, one at a time, and demands that the tests turn red: a
//! rule whose absence nobody notices is not tested.

use picomesh_common::config::rule;
use picomesh_tests::requirements;

use super::{bpf_tests, count::Count, steps};
use crate::{
    ebpf,
    needs::{self, Purpose},
};

/// What the loader reads in builds for tests.
const RULES_OFF: &str = "PICOMESH_TEST_RULES_OFF";

pub(crate) fn run() -> Count {
    if let Some(missing) = requirements::missing().first() {
        return Count::skipped(
            "rules",
            &format!("{} is missing: {}", missing.what, missing.remedy),
        );
    }
    if let Err(e) = needs::ensure(&[Purpose::World]).and_then(|()| ebpf::build().map(drop)) {
        return Count::failure("rules: prepare", &format!("{e:#}"));
    }
    // Red must come from the missing rule: with all of them in force the tier is green.
    let whole = steps::run("rules: all in force", &mut bpf_tests(None));
    if whole.failed > 0 || whole.passed == 0 {
        return Count::failure("rules", "the tier bpf is not green with all rules in force");
    }
    let mut total = Count::default();
    for (_, name, number) in rule::NAMES {
        let step = format!("rules: without {name} (rule {number})");
        let without = steps::run(&step, bpf_tests(None).env(RULES_OFF, name));
        if without.passed == 0 {
            // Did not compile, for one: red for another reason than a missing rule.
            total.add(Count::failure(&step, "the tests did not run"));
        } else if without.failures.is_empty() {
            total.add(Count::failure(
                &step,
                "no test turns red, so no test holds this rule",
            ));
        } else {
            println!("{step}: red, as it must: {}", without.failures.join(", "));
            total.add(Count::success());
        }
    }
    total
}

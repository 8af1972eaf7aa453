//! The tier `bpf`: the kernel half alone, without an agent.
//!
//! Two kinds of test. [`verdicts`] feeds hand-made frames to each entry point by BPF_PROG_TEST_RUN
//! and asks for the verdict, the rewritten bytes and the counter; [`model`] does the same with
//! random ones and asks a model of the rules. The others attach the programs
//! in a pod of their own (a network namespace behind a veth pair, checksum offload on) and look at
//! where real connections and real frames end, by TCX and by clsact, over IPv4 and IPv6.
//!
//! Needs root and an agent built with its eBPF object; without them every test is ignored and says
//! why. `PICOMESH_TEST_RULES_OFF=name,...` takes rules of the kernel half out, to see the tests
//! that hold them turn red.

mod bare;
mod datapath;
mod frames;
mod hostile;
mod inbound;
mod lifecycle;
mod model;
mod outbound;
mod probes;
mod topology;
mod verdicts;

use anyhow::Result;
use libtest_mimic::{Arguments, Completion, Failed, Trial};

use topology::{Setup, Unfit};

/// A test is a name and a function of the way programs are attached.
type Test = (&'static str, fn(&Setup) -> anyhow::Result<()>);

fn main() {
    let arguments = Arguments::from_args();
    let missing = topology::prepare().err().map(|error| format!("{error:#}"));
    let mut trials = Vec::new();
    for (subject, tests) in [
        ("verdicts", verdicts::TESTS),
        ("outbound", outbound::TESTS),
        ("inbound", inbound::TESTS),
        ("probes", probes::TESTS),
        ("hostile", hostile::TESTS),
        ("bare", bare::TESTS),
        ("lifecycle", lifecycle::TESTS),
        ("model", model::TESTS),
    ] {
        // Packets that are run, not sent, do not care how programs are attached.
        let ways: &[bool] = if subject == "model" {
            &[false]
        } else {
            &[false, true]
        };
        for (name, test) in tests {
            for force_clsact in ways.iter().copied() {
                let way = if force_clsact { "clsact" } else { "tcx" };
                let missing = missing.clone();
                trials.push(Trial::ignorable_test(
                    format!("{subject}::{name}::{way}"),
                    move || match missing {
                        Some(reason) => Ok(Completion::ignored_with(reason)),
                        None => completion(test(&Setup { force_clsact })),
                    },
                ));
            }
        }
    }
    trials.extend(datapath::trials(missing.as_deref()));
    libtest_mimic::run(&arguments, trials).exit();
}

/// A test says so itself where it cannot tell anything.
fn completion(result: Result<()>) -> Result<Completion, Failed> {
    match result {
        Ok(()) => Ok(Completion::Completed),
        Err(error) => match error.downcast_ref::<Unfit>() {
            Some(lack) => Ok(Completion::ignored_with(lack.to_string())),
            None => Err(Failed::from(format!("{error:#}"))),
        },
    }
}

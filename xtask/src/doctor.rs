//! `cargo xtask doctor`: what is missing, and why it is needed. Changes nothing.

use std::process::ExitCode;

use anyhow::Result;
use picomesh_tests::requirements;

use crate::{
    ebpf,
    needs::{self, Purpose},
};

#[derive(clap::Args)]
pub(crate) struct Args {}

pub(crate) fn run(_args: &Args) -> Result<ExitCode> {
    let mut lacking = 0;
    for purpose in Purpose::ALL {
        let missing: Vec<_> = needs::of(&[purpose]).filter(|n| !n.is_met()).collect();
        if missing.is_empty() {
            println!("{:8} ok{}", purpose.name(), note(purpose));
        }
        for need in &missing {
            println!(
                "{:8} {} is missing: {}",
                purpose.name(),
                need.name(),
                need.why
            );
        }
        lacking += missing.len();
    }
    let machine = requirements::missing();
    if machine.is_empty() {
        let (major, minor) = requirements::kernel();
        let hook = if (major, minor) >= (6, 6) {
            "TCX"
        } else {
            "clsact"
        };
        println!("{:8} ok: Linux {major}.{minor} ({hook})", "machine");
    }
    for missing in &machine {
        println!(
            "{:8} {} is missing: {}",
            "machine", missing.what, missing.remedy
        );
    }
    if lacking > 0 {
        println!("`cargo xtask setup` gets what is missing");
    }
    Ok(if lacking == 0 && machine.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn note(purpose: Purpose) -> String {
    match purpose {
        Purpose::Ebpf => format!(": {}", ebpf::way()),
        Purpose::Build
        | Purpose::World
        | Purpose::Bench
        | Purpose::Deny
        | Purpose::Mutants
        | Purpose::Fuzz
        | Purpose::Vm
        | Purpose::Cluster => String::new(),
    }
}

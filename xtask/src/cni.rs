//! `cargo xtask cni`: the CNI plugin as it ships. It runs on the node's own system, so it is static,
//! and it is copied to every node and started once per pod, so it is small.

use std::{fs, path::PathBuf, process::ExitCode};

use anyhow::{Context, Result, ensure};

use crate::{
    image::Program,
    needs::{self, Purpose},
};

/// What it may have.
const MAX_BYTES: u64 = 2_000_000;

const PLUGIN: Program = Program {
    name: "picomesh-cni",
    profile: "cni",
    args: &[
        "-p",
        "picomesh-agent",
        "--no-default-features",
        "--features",
        "cni",
    ],
};

#[derive(clap::Args)]
pub(crate) struct Args {}

pub(crate) fn run(_args: &Args) -> Result<ExitCode> {
    needs::ensure(&[Purpose::Build])?;
    let program = build()?;
    let bytes = fs::metadata(&program)?.len();
    println!("{}: {bytes} bytes", program.display());
    Ok(ExitCode::SUCCESS)
}

/// Builds it and returns the program, which is static and not too large.
pub(crate) fn build() -> Result<PathBuf> {
    let program = PLUGIN.build()?;
    let bytes = fs::metadata(&program)
        .with_context(|| format!("read {}", program.display()))?
        .len();
    ensure!(
        bytes <= MAX_BYTES,
        "the CNI plugin has {bytes} bytes, at most {MAX_BYTES} are wanted; what was added to it?"
    );
    Ok(program)
}

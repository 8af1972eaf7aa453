//! `cargo xtask cni`: the CNI plugin as it ships. It runs on the node's own system, so it is static,
//! and it is copied to every node and started once per pod, so it is small.

use std::{env::consts::ARCH, fs, path::PathBuf, process::ExitCode};

use anyhow::{Context, Result, ensure};

use crate::{
    needs::{self, Purpose},
    shell,
};

/// What it may have.
const MAX_BYTES: u64 = 2_000_000;

#[derive(clap::Args)]
pub(crate) struct Args {}

pub(crate) fn run(_args: &Args) -> Result<ExitCode> {
    let program = build()?;
    let bytes = fs::metadata(&program)?.len();
    println!("{}: {bytes} bytes", program.display());
    Ok(ExitCode::SUCCESS)
}

/// Builds it and returns the program, which is static and not too large.
pub(crate) fn build() -> Result<PathBuf> {
    needs::ensure(&[Purpose::Build])?;
    let triple = format!("{ARCH}-unknown-linux-gnu");
    let mut command = shell::cargo();
    command
        .args([
            "build",
            "--quiet",
            "--profile",
            "cni",
            "-p",
            "picomesh-agent",
        ])
        .args([
            "--bin",
            "picomesh-cni",
            "--no-default-features",
            "--features",
            "cni",
        ])
        // With a triple, flags are not for build scripts.
        .args(["--target", &triple])
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env("RUSTFLAGS", "-C target-feature=+crt-static");
    shell::run(&mut command).context("build the CNI plugin")?;
    let program = shell::target_dir().join(triple).join("cni/picomesh-cni");
    let image = fs::read(&program).with_context(|| format!("read {}", program.display()))?;
    let bytes = image.len() as u64;
    ensure!(
        bytes <= MAX_BYTES,
        "the CNI plugin has {bytes} bytes, at most {MAX_BYTES} are wanted; what was added to it?"
    );
    ensure!(
        !names_an_interpreter(&image),
        "the CNI plugin is not static: it would need the node's own libraries"
    );
    Ok(program)
}

/// Whether an ELF program (64 bit, little endian) asks for a dynamic linker.
fn names_an_interpreter(image: &[u8]) -> bool {
    const INTERPRETER: usize = 3;
    let number = |at: usize, bytes: usize| {
        let field = image.get(at..at + bytes)?;
        let digits = field.iter().rev();
        Some(digits.fold(0, |sum: usize, byte| sum << 8 | usize::from(*byte)))
    };
    let header = || Some((number(0x20, 8)?, number(0x36, 2)?, number(0x38, 2)?));
    let Some((first, size, count)) = header() else {
        return false;
    };
    (0..count).any(|n| number(first + n * size, 4) == Some(INTERPRETER))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_needs_a_linker_is_told_from_one_that_does_not() {
        let own = fs::read("/proc/self/exe").unwrap();
        assert!(names_an_interpreter(&own), "tests are linked dynamically");
        assert!(!names_an_interpreter(&[0; 64]));
        assert!(!names_an_interpreter(b"short"));
    }
}

//! `cargo xtask ebpf`: compiles the kernel half to `target/ebpf/picomesh.bpf.o`, which the agent's
//! build embeds.
//!
//! Two ways to a compiler for `bpfel-unknown-none`; the first that is there is taken:
//! 1. rustup's nightly with rust-src, and bpf-linker on the PATH;
//! 2. Debian's rustc-web, whose core is compiled already, and a bpf-linker from the cache.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use anyhow::{Context, Result};
use picomesh_tests::requirements;

use crate::{
    needs::{self, Purpose},
    shell,
};

const TARGET: &str = "bpfel-unknown-none";
/// Socket storage needs BTF in the object, and BTF needs debug information.
const FLAGS: [&str; 4] = ["-C", "debuginfo=2", "-C", "link-arg=--btf"];

#[derive(clap::Args)]
pub(crate) struct Args {}

pub(crate) fn run(_args: &Args) -> Result<ExitCode> {
    println!("{}", way());
    println!("{}", build()?.display());
    Ok(ExitCode::SUCCESS)
}

/// Gets the tools, compiles, and returns the object. The object's time changes only with its
/// bytes, so that the agent is not built again for nothing.
pub(crate) fn build() -> Result<PathBuf> {
    needs::ensure(&[Purpose::Build, Purpose::Ebpf])?;
    let build = shell::target_dir().join("ebpf-build");
    let mut command = if rustup_way() {
        let mut command = shell::fresh_cargo();
        command
            .env("RUSTUP_TOOLCHAIN", "nightly")
            .args(["build", "-Z", "build-std=core"]);
        command
    } else {
        let mut command = shell::fresh_cargo();
        let path = env::var("PATH").unwrap_or_default();
        command
            .env(
                "PATH",
                format!("{}:{path}", needs::bpf_linker_dir().display()),
            )
            .env("RUSTC", "/usr/bin/rustc")
            .env("RUSTC_BOOTSTRAP", "1")
            .arg("build");
        command
    };
    // The debug information names files: not by where they lie on this machine.
    let mut flags = FLAGS.map(str::to_owned).to_vec();
    flags.extend(shell::remap_flags());
    command
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
        .args([
            "--quiet",
            "--release",
            "-p",
            "picomesh-ebpf",
            "--target",
            TARGET,
        ])
        .arg("--target-dir")
        .arg(&build);
    shell::run(&mut command).context("compile the kernel half")?;
    let made = build.join(TARGET).join("release/picomesh-ebpf");
    let object = shell::root().join("target/ebpf/picomesh.bpf.o");
    copy_if_changed(&made, &object)?;
    Ok(object)
}

/// One line for a person: which compiler makes the kernel half.
pub(crate) fn way() -> &'static str {
    if rustup_way() {
        "the kernel half is compiled by rustup's nightly, with core built from rust-src"
    } else {
        "the kernel half is compiled by Debian's rustc-web, which has core for BPF"
    }
}

/// Whether way 1 is complete.
pub(crate) fn rustup_way() -> bool {
    if !requirements::program("bpf-linker") || !requirements::program("rustup") {
        return false;
    }
    shell::stdout(Command::new("rustc").args(["+nightly", "--print", "sysroot"])).is_some_and(
        |sysroot| {
            Path::new(&sysroot)
                .join("lib/rustlib/src/rust/library/core")
                .is_dir()
        },
    )
}

fn copy_if_changed(from: &Path, to: &Path) -> Result<()> {
    let bytes = fs::read(from).with_context(|| format!("read {}", from.display()))?;
    if fs::read(to).is_ok_and(|old| old == bytes) {
        return Ok(());
    }
    if let Some(dir) = to.parent() {
        fs::create_dir_all(dir)?;
    }
    fs::write(to, bytes).with_context(|| format!("write {}", to.display()))
}

//! Tools that are built once per machine, outside the checkout, each in a directory whose name
//! holds everything that determines it.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

use crate::shell;

/// A program that `cargo install` makes.
pub(crate) struct Tool {
    pub(crate) name: &'static str,
    pub(crate) version: &'static str,
    /// What else determines the binary.
    pub(crate) flavour: &'static str,
    pub(crate) args: &'static [&'static str],
    pub(crate) env: &'static [(&'static str, &'static str)],
}

pub(crate) const BPF_LINKER: Tool = Tool {
    name: "bpf-linker",
    version: "0.13.0",
    flavour: "llvm22",
    args: &["--locked", "--no-default-features", "--features", "llvm-22"],
    env: &[("LLVM_PREFIX", "/usr/lib/llvm-22")],
};

pub(crate) const CARGO_DENY: Tool = Tool {
    name: "cargo-deny",
    version: "0.20.2",
    flavour: "default",
    args: &["--locked", "--no-default-features"],
    env: &[],
};

pub(crate) const CARGO_MUTANTS: Tool = Tool {
    name: "cargo-mutants",
    version: "27.1.0",
    flavour: "default",
    args: &["--locked"],
    env: &[],
};

impl Tool {
    /// The program, if it is installed.
    pub(crate) fn find(&self) -> Option<PathBuf> {
        let path = self.bin_dir().join(self.name);
        path.is_file().then_some(path)
    }

    /// The directory for the PATH.
    pub(crate) fn bin_dir(&self) -> PathBuf {
        dir()
            .join(format!(
                "{}-{}-{}-{}",
                self.name,
                self.version,
                self.flavour,
                env::consts::ARCH
            ))
            .join("bin")
    }

    /// Builds it if it is not there.
    pub(crate) fn install(&self) -> Result<PathBuf> {
        if let Some(path) = self.find() {
            return Ok(path);
        }
        println!("building {} {} (once)", self.name, self.version);
        let bin = self.bin_dir();
        let home = bin.parent().unwrap_or(&bin);
        let build = dir().join("build").join(self.name);
        let mut command = shell::fresh_cargo();
        command
            // Outside the checkout: its cargo settings are not the tool's.
            .current_dir("/")
            .args(["install", self.name, "--version", self.version, "--root"])
            .arg(home)
            .arg("--target-dir")
            .arg(&build)
            .args(self.args)
            .envs(self.env.iter().copied());
        shell::run(&mut command)?;
        // Only the binary is worth its room.
        let _ = fs::remove_dir_all(&build);
        self.find()
            .with_context(|| format!("cargo install {} left no binary", self.name))
    }
}

/// `$PICOMESH_CACHE`, else `picomesh` in the user's cache directory.
pub(crate) fn dir() -> PathBuf {
    if let Some(dir) = env::var_os("PICOMESH_CACHE") {
        return dir.into();
    }
    if let Some(dir) = env::var_os("XDG_CACHE_HOME") {
        return Path::new(&dir).join("picomesh");
    }
    let home = env::var_os("HOME").unwrap_or_else(|| "/root".into());
    Path::new(&home).join(".cache/picomesh")
}

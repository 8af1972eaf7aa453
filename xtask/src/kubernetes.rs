//! Kubernetes for the tests: its own commands, compiled from `tests/k8s/cluster` into one program
//! that acts by the name it is called by. Made once per machine and kept in the cache.

use std::{env, fs, os::unix::fs::symlink, path::PathBuf, process::Command};

use anyhow::{Context, Result, bail};
use picomesh_tests::{cluster::COMMANDS, image, requirements};

use crate::{cache, shell};

const VERSION: &str = "1.36.3";
/// The convention of controller-runtime's envtest: a directory that has the programs.
const ASSETS: &str = "KUBEBUILDER_ASSETS";
const PROGRAM: &str = "kubernetes";

/// The directory with the programs, if it is there.
pub(crate) fn find() -> Option<PathBuf> {
    let dir = dir()?;
    COMMANDS
        .iter()
        .all(|c| dir.join(c).is_file())
        .then_some(dir)
}

/// Compiles them if they are not there: minutes, once.
pub(crate) fn install() -> Result<PathBuf> {
    if let Some(dir) = find() {
        return Ok(dir);
    }
    if let Some(assets) = env::var_os(ASSETS) {
        bail!(
            "{ASSETS}={}: not all of {} are there; complete it, or unset it to have them compiled",
            assets.to_string_lossy(),
            COMMANDS.join(", ")
        );
    }
    let Some(dir) = dir() else {
        bail!(
            "go is missing: install Go 1.26 (https://go.dev/dl), or name a directory with the programs by {ASSETS}"
        );
    };
    println!("compiling Kubernetes {VERSION} (minutes, once)");
    let at = "k8s.io/component-base/version";
    let mut numbers = VERSION.split('.');
    let (major, minor) = (numbers.next().unwrap_or(""), numbers.next().unwrap_or(""));
    let program = dir.join(PROGRAM);
    shell::run(
        go().args(["build", "-trimpath", "-mod=readonly", "-ldflags"])
            .arg(format!(
                "-s -w -X {at}.gitVersion=v{VERSION} -X {at}.gitMajor={major} -X {at}.gitMinor={minor}"
            ))
            .arg("-o")
            .arg(&program)
            .arg("."),
    )?;
    for command in COMMANDS {
        symlink(PROGRAM, dir.join(command))
            .with_context(|| format!("link {command} in {}", dir.display()))?;
    }
    Ok(dir)
}

/// Named by all that determines what is in it; none without Go.
fn dir() -> Option<PathBuf> {
    if let Some(assets) = env::var_os(ASSETS) {
        return Some(assets.into());
    }
    if !requirements::program("go") {
        return None;
    }
    let mut key = shell::stdout(go().arg("version"))?.into_bytes();
    for file in ["go.mod", "go.sum", "main.go"] {
        key.extend(fs::read(source().join(file)).ok()?);
    }
    let digest = image::digest(&key).replace("sha256:", "");
    Some(cache::dir().join(format!(
        "kubernetes-{VERSION}-{}-{}",
        digest.get(..16)?,
        env::consts::ARCH
    )))
}

fn source() -> PathBuf {
    shell::root().join("tests/k8s/cluster")
}

/// The machine's Go and no other, without C.
fn go() -> Command {
    let mut go = Command::new("go");
    go.current_dir(source())
        .env("GOTOOLCHAIN", "local")
        .env("CGO_ENABLED", "0")
        .env_remove("GOFLAGS");
    go
}

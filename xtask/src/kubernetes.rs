//! Kubernetes for the tests: its own commands, compiled into one program that acts by the name it is
//! called by. Made once per machine and version, and kept in the cache.

use std::{
    env, fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};
use picomesh_tests::{cluster::COMMANDS, image, requirements};

use crate::{cache, shell};

/// A version that the tests run on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Release {
    pub(crate) version: &'static str,
    /// Its Go module, in the checkout.
    source: &'static str,
}

/// What is meant where nobody says which.
pub(crate) const NEWEST: Release = Release {
    version: "1.36.3",
    source: "tests/k8s/cluster",
};
/// The oldest that is supported.
pub(crate) const OLDEST: Release = Release {
    version: "1.30.4",
    source: "tests/k8s/cluster/oldest",
};
const RELEASES: [Release; 2] = [NEWEST, OLDEST];

/// The convention of controller-runtime's envtest: a directory that has the programs. It stands for
/// [`NEWEST`], whatever it holds.
const ASSETS: &str = "KUBEBUILDER_ASSETS";
const PROGRAM: &str = "kubernetes";

/// Nothing else is asked of a person's machine that `setup` cannot get.
const NO_GO: &str = "go is missing: install Go 1.26 (https://go.dev/dl), or name a directory with \
                     the programs of the newest Kubernetes by KUBEBUILDER_ASSETS";

impl Release {
    /// Why it cannot be had here.
    pub(crate) fn lacks(self) -> Option<&'static str> {
        self.dir().is_none().then_some(NO_GO)
    }

    /// As people name it: 1.30.4, or 1.30.
    pub(crate) fn parse(word: &str) -> Result<Self, String> {
        let mut all = RELEASES.into_iter();
        all.find(|release| word == release.version || word == release.line())
            .ok_or_else(|| {
                let known = RELEASES.map(|release| release.version).join(", ");
                format!("{word:?}: {known} can be compiled")
            })
    }

    /// Major and minor.
    fn line(self) -> &'static str {
        self.version
            .rsplit_once('.')
            .map_or(self.version, |(line, _)| line)
    }

    /// The directory with the programs, if it is there.
    pub(crate) fn find(self) -> Option<PathBuf> {
        let dir = self.dir()?;
        COMMANDS
            .iter()
            .all(|c| dir.join(c).is_file())
            .then_some(dir)
    }

    /// Compiles them if they are not there: minutes, once.
    pub(crate) fn install(self) -> Result<PathBuf> {
        if let Some(dir) = self.find() {
            return Ok(dir);
        }
        if let Some(assets) = self.assets() {
            bail!(
                "{ASSETS}={}: not all of {} are there; complete it, or unset it to have them compiled",
                assets.display(),
                COMMANDS.join(", ")
            );
        }
        let version = self.version;
        let Some(dir) = self.dir() else {
            bail!("{NO_GO}");
        };
        println!("compiling Kubernetes {version} (minutes, once)");
        let at = "k8s.io/component-base/version";
        let (major, minor) = self.line().split_once('.').unwrap_or_default();
        let program = dir.join(PROGRAM);
        shell::run(
            self.go()
                .args(["build", "-trimpath", "-mod=readonly", "-ldflags"])
                .arg(format!(
                    "-s -w -X {at}.gitVersion=v{version} -X {at}.gitMajor={major} -X {at}.gitMinor={minor}"
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
    fn dir(self) -> Option<PathBuf> {
        if let Some(assets) = self.assets() {
            return Some(assets);
        }
        if !requirements::program("go") {
            return None;
        }
        let mut key = shell::stdout(self.go().arg("version"))?.into_bytes();
        for file in ["go.mod", "go.sum", "main.go"] {
            key.extend(fs::read(self.source().join(file)).ok()?);
        }
        let digest = image::digest(&key).replace("sha256:", "");
        Some(cache::dir().join(format!(
            "kubernetes-{}-{}-{}",
            self.version,
            digest.get(..16)?,
            env::consts::ARCH
        )))
    }

    fn assets(self) -> Option<PathBuf> {
        (self == NEWEST)
            .then(|| env::var_os(ASSETS))
            .flatten()
            .map(PathBuf::from)
    }

    fn source(self) -> PathBuf {
        shell::root().join(Path::new(self.source))
    }

    /// The machine's Go and no other, without C.
    fn go(self) -> Command {
        let mut go = Command::new("go");
        go.current_dir(self.source())
            .env("GOTOOLCHAIN", "local")
            .env("CGO_ENABLED", "0")
            .env_remove("GOFLAGS");
        go
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_release_is_known_by_its_version_and_by_its_line() {
        assert_eq!(Release::parse("1.36"), Ok(NEWEST));
        assert_eq!(Release::parse("1.30"), Ok(OLDEST));
        for release in RELEASES {
            assert_eq!(Release::parse(release.version), Ok(release));
        }
        let error = Release::parse("1.3").unwrap_err();
        assert!(error.contains("1.30.4"), "{error}");
    }

    /// What the program says of itself is stamped by hand, so it could lie.
    #[test]
    fn a_release_is_of_the_version_that_its_module_requires() {
        for release in RELEASES {
            let module = fs::read_to_string(release.source().join("go.mod")).unwrap();
            let required = format!("k8s.io/kubernetes v{}\n", release.version);
            assert!(module.contains(&required), "{release:?}");
        }
    }

    #[test]
    fn releases_do_not_share_a_directory() {
        if let (Some(newest), Some(oldest)) = (NEWEST.dir(), OLDEST.dir()) {
            assert_ne!(newest, oldest);
        }
    }
}

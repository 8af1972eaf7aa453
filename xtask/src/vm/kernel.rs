//! Kernels of Debian's suites: found by apt, unpacked into the cache, installed nowhere.
//!
//! apt works on sources, lists and an empty package state of its own below the cache, so that the
//! machine's own package management never hears of the other suites.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, SystemTime},
};

use anyhow::{Context, Result, bail, ensure};

use crate::{cache, shell};

/// Debian's name for the kernel made for virtual machines, whatever its version.
const PACKAGE: &str = "linux-image-cloud-amd64";
const LISTS_LAST: Duration = Duration::from_secs(24 * 3600);

/// A kernel in the cache.
#[derive(Clone, Debug)]
pub(super) struct Kernel {
    pub(super) image: PathBuf,
    /// The directory that has `modules.dep`.
    pub(super) modules: PathBuf,
}

/// The kernel of a suite, downloaded unless the cache has this version. When apt cannot be asked,
/// the one that the suite had the last time does.
pub(super) fn of(suite: &str) -> Result<Kernel> {
    let home = cache::dir().join("kernels");
    fs::create_dir_all(&home).with_context(|| format!("create {}", home.display()))?;
    let last = home.join(format!("{suite}.last"));
    let packages = match Apt::of(suite).and_then(|apt| Ok((apt.packages()?, apt))) {
        Ok((packages, apt)) => {
            let dir = home.join(packages.join("+"));
            if !dir.is_dir() {
                apt.unpack(&packages, &dir)?;
            }
            fs::write(&last, packages.join("+"))?;
            return Kernel::in_dir(&dir);
        }
        Err(e) => match fs::read_to_string(&last) {
            Ok(packages) => {
                println!("{e:#}; taking {packages}, which {suite} had the last time");
                packages
            }
            Err(_) => return Err(e),
        },
    };
    Kernel::in_dir(&home.join(packages))
}

impl Kernel {
    fn in_dir(dir: &Path) -> Result<Self> {
        let below = dir.join("lib/modules");
        let modules = fs::read_dir(&below)
            .with_context(|| format!("read {}", below.display()))?
            .flatten()
            .map(|entry| entry.path())
            .next()
            .with_context(|| format!("{} is empty: remove it", below.display()))?;
        let image = modules.join("vmlinuz");
        ensure!(
            image.is_file(),
            "{} is not there: remove {} and try again",
            image.display(),
            dir.display()
        );
        Ok(Self { image, modules })
    }
}

/// apt with a state of its own.
struct Apt {
    root: PathBuf,
}

impl Apt {
    fn of(suite: &str) -> Result<Self> {
        let root = cache::dir().join("apt").join(suite);
        for dir in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(root.join(dir)).with_context(|| format!("create {dir}"))?;
        }
        let at = root.display();
        fs::write(
            root.join("sources.list"),
            format!("deb {} {suite} main\n", source()?),
        )?;
        fs::write(root.join("status"), "")?;
        fs::write(
            root.join("apt.conf"),
            format!(
                "Dir::Etc::SourceList \"{at}/sources.list\";\n\
                 Dir::Etc::SourceParts \"/dev/null\";\n\
                 Dir::State::Lists \"{at}/lists\";\n\
                 Dir::State::Status \"{at}/status\";\n\
                 Dir::Cache \"{at}/cache\";\n\
                 Acquire::Languages \"none\";\n\
                 Acquire::IndexTargets::deb::DEP-11::DefaultEnabled \"false\";\n\
                 APT::Sandbox::User \"root\";\n"
            ),
        )?;
        let apt = Self { root };
        apt.update(suite)?;
        Ok(apt)
    }

    fn get(&self) -> Command {
        let mut command = Command::new("apt-get");
        command
            .env("APT_CONFIG", self.root.join("apt.conf"))
            .env("DEBIAN_FRONTEND", "noninteractive")
            .stdin(Stdio::null())
            .arg("-q");
        command
    }

    fn update(&self, suite: &str) -> Result<()> {
        let stamp = self.root.join("updated");
        let fresh = fs::metadata(&stamp)
            .and_then(|m| m.modified())
            .is_ok_and(|at| {
                SystemTime::now()
                    .duration_since(at)
                    .is_ok_and(|age| age < LISTS_LAST)
            });
        if fresh {
            return Ok(());
        }
        shell::stdout(self.get().args(["update", "--error-on=any"]))
            .with_context(|| format!("apt cannot read the suite {suite}"))?;
        fs::write(stamp, "").context("note the time of apt's update")
    }

    /// `NAME_VERSION` of all packages that hold the kernel: one, or an image with parts.
    fn packages(&self) -> Result<Vec<String>> {
        let plan = shell::stdout(self.get().args([
            "--simulate",
            "--no-install-recommends",
            "install",
            PACKAGE,
        ]))
        .with_context(|| format!("apt finds no way to {PACKAGE}"))?;
        let packages = parts(&plan);
        ensure!(
            !packages.is_empty(),
            "{PACKAGE} brings no kernel; apt's plan was: {plan}"
        );
        Ok(packages)
    }

    /// Into a directory that gets its name when it is complete.
    fn unpack(&self, packages: &[String], dir: &Path) -> Result<()> {
        println!("downloading {}", packages.join(", "));
        let mut making = dir.as_os_str().to_owned();
        making.push(".part");
        let making = PathBuf::from(making);
        let tree = making.join("tree");
        let _ = fs::remove_dir_all(&making);
        fs::create_dir_all(&tree).with_context(|| format!("create {}", tree.display()))?;
        let names = packages
            .iter()
            .map(|p| p.split('_').next().unwrap_or(p.as_str()));
        shell::run(
            self.get()
                .arg("-qq")
                .arg("download")
                .args(names)
                .current_dir(&making),
        )?;
        for entry in fs::read_dir(&making)?.flatten() {
            let path = entry.path();
            if path.extension().is_some_and(|e| e == "deb") {
                shell::run(Command::new("dpkg").arg("-x").arg(&path).arg(&tree))?;
                fs::remove_file(&path)?;
            }
        }
        let done = making.join("done");
        arrange(&tree, &done)?;
        fs::remove_dir_all(&tree)?;
        fs::rename(&done, dir).with_context(|| format!("rename to {}", dir.display()))?;
        fs::remove_dir_all(&making).context("remove what the download left")
    }
}

/// `URI` of Debian on this machine, with the key that signs it: what its own sources say.
fn source() -> Result<String> {
    let targets = shell::stdout(Command::new("apt-get").args([
        "indextargets",
        "--format",
        "$(REPO_URI) $(RELEASE)",
        "Created-By: Packages",
        "Origin: Debian",
    ]))
    .context("apt-get indextargets")?;
    let uri = targets
        .lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(_, release)| !release.contains("security"))
        .map(|(uri, _)| uri);
    let Some(uri) = uri else {
        bail!("no Debian among apt's sources: kernels come from Debian's suites");
    };
    const KEYS: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
    ensure!(
        Path::new(KEYS).is_file(),
        "{KEYS} is missing: install debian-archive-keyring"
    );
    Ok(format!("[signed-by={KEYS}] {uri}"))
}

/// The kernel's own packages of apt's plan, which carry its version; not those without one.
fn parts(plan: &str) -> Vec<String> {
    plan.lines()
        .filter_map(|line| {
            let (name, rest) = line.strip_prefix("Inst ")?.split_once(" (")?;
            let kind = [
                "linux-image-",
                "linux-binary-",
                "linux-modules-",
                "linux-base-",
            ]
            .iter()
            .find_map(|kind| name.strip_prefix(kind))?;
            kind.starts_with(|c: char| c.is_ascii_digit())
                .then(|| format!("{name}_{}", rest.split(' ').next().unwrap_or_default()))
        })
        .collect()
}

/// One shape for all suites: `lib/modules/VERSION` with `vmlinuz` in it and what depends on what.
fn arrange(tree: &Path, done: &Path) -> Result<()> {
    let found = ["usr/lib/modules", "lib/modules"]
        .iter()
        .flat_map(|dir| fs::read_dir(tree.join(dir)).into_iter().flatten().flatten())
        .collect::<Vec<_>>();
    let Some(version) = found.first().map(fs::DirEntry::file_name) else {
        bail!("the kernel's packages hold no modules");
    };
    let modules = done.join("lib/modules").join(&version);
    fs::create_dir_all(&modules)?;
    for dir in ["usr/lib/modules", "lib/modules"] {
        let from = tree.join(dir).join(&version);
        for entry in fs::read_dir(&from).into_iter().flatten().flatten() {
            fs::rename(entry.path(), modules.join(entry.file_name()))?;
        }
    }
    let image = modules.join("vmlinuz");
    if !image.is_file() {
        let mut name = std::ffi::OsString::from("boot/vmlinuz-");
        name.push(&version);
        let boot = tree.join(name);
        fs::rename(&boot, &image).with_context(|| format!("move {}", boot.display()))?;
    }
    shell::run(Command::new("depmod").arg("-b").arg(done).arg(&version))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_is_one_package_or_an_image_with_parts() {
        let old = "Reading package lists...\n\
             Inst linux-base (4.12.1~deb12u1 Debian:12.15/oldstable [all])\n\
             Inst linux-image-6.1.0-50-cloud-amd64 (6.1.176-1 Debian:12.15/oldstable [amd64])\n\
             Inst linux-image-cloud-amd64 (6.1.176-1 Debian:12.15/oldstable [amd64])\n";
        assert_eq!(parts(old), ["linux-image-6.1.0-50-cloud-amd64_6.1.176-1"]);
        let new = "Inst linux-base-7.2.13+deb14-cloud-amd64 (7.2.13-1 Debian:unstable [amd64])\n\
             Inst linux-binary-7.2.13+deb14-cloud-amd64 (7.2.13-1 Debian:unstable [amd64])\n\
             Inst linux-modules-7.2.13+deb14-cloud-amd64 (7.2.13-1 Debian:unstable [amd64])\n\
             Inst linux-image-7.2.13+deb14-cloud-amd64 (7.2.13-1 Debian:unstable [amd64])\n\
             Conf linux-image-7.2.13+deb14-cloud-amd64 (7.2.13-1 Debian:unstable [amd64])\n";
        assert_eq!(
            parts(new),
            [
                "linux-base-7.2.13+deb14-cloud-amd64_7.2.13-1",
                "linux-binary-7.2.13+deb14-cloud-amd64_7.2.13-1",
                "linux-modules-7.2.13+deb14-cloud-amd64_7.2.13-1",
                "linux-image-7.2.13+deb14-cloud-amd64_7.2.13-1"
            ]
        );
    }
}

//! `cargo xtask image`: the programs that run on a cluster, as an OCI archive, without a container
//! engine. They are linked statically, so the image holds them and nothing else.
//!
//! The same commit gives the same bytes on any machine with the same compilers: the names of the
//! checkout, the target directory and cargo's home are replaced in what compilers write down, and
//! the archive is written without times and owners ([`picomesh_tests::image`]).

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use anyhow::{Context, Result, bail, ensure};
use picomesh_tests::{
    image::{AGENT, Image, Written, linked},
    reaper,
};

use crate::{
    cni, ebpf,
    needs::{self, Purpose},
    shell,
    test::Count,
};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Where to write the archive instead of target/image/
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// The name it is imported under
    #[arg(long, default_value = AGENT)]
    name: String,
}

/// A program that needs nothing of the system it runs on.
pub(crate) struct Program {
    pub(crate) name: &'static str,
    /// Of cargo; the directory of what is built has the same name.
    pub(crate) profile: &'static str,
    /// What else `cargo build` is told.
    pub(crate) args: &'static [&'static str],
}

/// What all tiers run, the benchmark measures and people get.
pub(crate) const AGENT_PROGRAM: Program = Program {
    name: "picomesh-agent",
    profile: "release",
    args: &["-p", "picomesh-agent"],
};

/// What the image starts when it is told nothing else.
const ENTRYPOINT: &str = "/usr/bin/picomesh-agent";

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let to = args.output.clone().unwrap_or_else(archive);
    let written = build(&args.name, &to)?;
    println!("{} {}", args.name, written.digest);
    println!(
        "{}: {:.1} MB unpacked",
        to.display(),
        written.unpacked as f64 / 1e6
    );
    Ok(ExitCode::SUCCESS)
}

/// Where the archive lies if nobody says otherwise.
pub(crate) fn archive() -> PathBuf {
    shell::target_dir().join("image/picomesh-agent.tar")
}

/// Compiles the programs and writes the archive.
pub(crate) fn build(name: &str, to: &Path) -> Result<Written> {
    needs::ensure(&[Purpose::Build])?;
    ebpf::build()?;
    let mut image = Image::new(name).entrypoint(&[ENTRYPOINT]);
    for path in [AGENT_PROGRAM.build()?, cni::build()?] {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        image.copy(&path, &format!("/usr/bin/{name}"))?;
    }
    image.write(to)
}

impl Program {
    /// Compiles it; what is linked in is looked at.
    pub(crate) fn build(&self) -> Result<PathBuf> {
        shell::run(&mut self.command())
            .with_context(|| format!("compile {} statically", self.name))?;
        let path = self.path();
        let libraries = linked(&path)?;
        ensure!(
            libraries.is_empty(),
            "{} is linked with {}, which the image does not have",
            path.display(),
            libraries.join(", ")
        );
        Ok(path)
    }

    /// Where it lies when it is built.
    pub(crate) fn path(&self) -> PathBuf {
        shell::target_dir()
            .join(target())
            .join(self.profile)
            .join(self.name)
    }

    fn command(&self) -> Command {
        // Naming the target keeps these flags from build scripts and procedural macros, which
        // cannot be linked so.
        let target = target();
        let mut rustflags = vec!["-C".to_owned(), "target-feature=+crt-static".to_owned()];
        // A pointer that only moves with the program takes a bit, not 24 bytes.
        rustflags.extend(["-C", "link-arg=-Wl,-z,pack-relative-relocs"].map(str::to_owned));
        rustflags.extend(shell::remap_flags());
        let cflags: Vec<String> = shell::renamed_paths()
            .iter()
            .map(|(from, to)| format!("-ffile-prefix-map={}={to}", from.display()))
            .collect();
        let mut command = shell::cargo();
        command
            .args(["build", "--locked", "--target", &target])
            .args(["--profile", self.profile, "--bin", self.name])
            .args(self.args)
            .env("CARGO_ENCODED_RUSTFLAGS", rustflags.join("\x1f"))
            .env(
                format!("CFLAGS_{}", target.replace('-', "_")),
                cflags.join(" "),
            );
        command
    }
}

fn target() -> String {
    format!("{}-unknown-linux-gnu", env::consts::ARCH)
}

/// A test of `cargo xtask test --full`: two whole builds, in two directories and one after the
/// other, must give the same archive.
pub(crate) fn count() -> Count {
    match reproduced() {
        Ok(digest) => {
            println!("image: two builds gave {digest}");
            Count::success()
        }
        Err(e) => Count::failure("image: reproducible", &format!("{e:#}")),
    }
}

fn reproduced() -> Result<String> {
    let first = build(AGENT, &archive())?;
    let elsewhere = Elsewhere::new()?;
    let to = elsewhere.0.join("image.tar");
    let mut again = shell::cargo();
    again
        .current_dir(elsewhere.0.join("checkout"))
        .env("CARGO_TARGET_DIR", elsewhere.0.join("built"))
        .args(["xtask", "image", "--output"])
        .arg(&to);
    shell::run(&mut again)?;
    if fs::read(archive())? != fs::read(&to)? {
        let kept = shell::target_dir().join("image/another.tar");
        fs::copy(&to, &kept)?;
        bail!(
            "the archives differ: compare {} and {}",
            archive().display(),
            kept.display()
        );
    }
    Ok(first.digest)
}

/// The checkout as it stands, in another directory; removed when dropped.
struct Elsewhere(PathBuf);

impl Elsewhere {
    fn new() -> Result<Self> {
        ensure!(!reaper::stopping(), "told to stop");
        let dir = env::temp_dir().join(format!("picomesh-image-{}", std::process::id()));
        let elsewhere = Self(dir);
        let mut list = Command::new("git");
        list.current_dir(shell::root()).args([
            "ls-files",
            "--cached",
            "--others",
            "--exclude-standard",
        ]);
        let files = shell::stdout(&mut list).context("git ls-files in the checkout")?;
        for file in files.lines() {
            let from = shell::root().join(file);
            // Deleted and not yet committed.
            if !from.is_file() {
                continue;
            }
            let to = elsewhere.0.join("checkout").join(file);
            if let Some(dir) = to.parent() {
                fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
            }
            fs::copy(&from, &to).with_context(|| format!("copy {}", from.display()))?;
        }
        Ok(elsewhere)
    }
}

impl Drop for Elsewhere {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

//! `cargo xtask test`: every tier, whatever fails, and one closing line.
//!
//! A tier is a list of steps; a step is a command whose output is shown as it comes and counted:
//! by its test results where it prints them, else as one. A tier that cannot run here is skipped
//! with its reason, which counts as one skip, and with `CI=true` a skip makes the run fail.

mod count;
mod rules;
mod steps;

use std::process::{Command, ExitCode};

use anyhow::Result;
use nix::unistd::geteuid;
use picomesh_tests::{
    cluster::{AGENT_IMAGE, KUBERNETES},
    reaper, requirements,
};

pub(crate) use self::{count::Count, steps::run as run_step};
use crate::{
    cache::CARGO_DENY,
    cluster, fuzz, image,
    kubernetes::{NEWEST, OLDEST, Release},
    mutants,
    needs::{self, Purpose},
    shell, soak, vm,
};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Run only these tiers
    #[arg(long = "tier", value_name = "TIER")]
    tiers: Vec<Tier>,
    /// Run only tests whose name contains this
    #[arg(long, value_name = "WORD")]
    filter: Option<String>,
    /// Name the tests instead of running them
    #[arg(long)]
    list: bool,
    /// Also run the tests that take much of the machine, and the tiers that take long: rules,
    /// mutants, vm, fuzz, a short soak, the image built twice, and k8s on the oldest Kubernetes
    #[arg(long)]
    full: bool,
    /// The Kubernetes that the tier k8s makes its cluster of: 1.36 or 1.30. Without it the newest,
    /// and with --full the oldest after it
    #[arg(long, value_name = "VERSION", value_parser = Release::parse)]
    kubernetes: Option<Release>,
}

/// What is played of a tier.
#[derive(Clone, Copy, Default)]
struct Play<'a> {
    filter: Option<&'a str>,
    full: bool,
    kubernetes: Option<Release>,
}

impl Play<'_> {
    /// What the tier `k8s` runs on.
    fn releases(self) -> Vec<Release> {
        // Somebody else's cluster is of its own version.
        let foreign = std::env::var_os("KUBECONFIG").is_some();
        match self.kubernetes {
            Some(release) => vec![release],
            None if self.full && !foreign => vec![NEWEST, OLDEST],
            None => vec![NEWEST],
        }
    }
}

/// Enough for every disturbance to come; before a release `cargo xtask soak` belongs beside it.
const SOAK_MINUTES: u64 = 3;

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Tier {
    /// Formatting, clippy, generated files, licences and duplicates
    Lint,
    /// Tests beside the code; needs no root
    Unit,
    /// The kernel half, packet by packet and attached in namespaces
    Bpf,
    /// Whole agents in a world of namespaces
    Mesh,
    /// One rule of the kernel half after the other taken out; each must turn `bpf` red
    Rules,
    /// Changes to the files that decide; each must turn their tests red
    Mutants,
    /// Other kernels
    Vm,
    /// Bytes and packets that nobody foresaw
    Fuzz,
    /// Minutes of mixed traffic and trouble
    Soak,
    /// The image, built twice from two directories and two clocks
    Image,
    /// A Kubernetes cluster of this machine's own, or the one that KUBECONFIG names
    K8s,
}

impl Tier {
    const ALL: [Self; 5] = [Self::Lint, Self::Unit, Self::Bpf, Self::Mesh, Self::K8s];
    /// With `--full`, or when they are named.
    const LONG: [Self; 6] = [
        Self::Rules,
        Self::Mutants,
        Self::Vm,
        Self::Fuzz,
        Self::Soak,
        Self::Image,
    ];

    const fn name(self) -> &'static str {
        match self {
            Self::Lint => "lint",
            Self::Unit => "unit",
            Self::Bpf => "bpf",
            Self::Mesh => "mesh",
            Self::Rules => "rules",
            Self::Mutants => "mutants",
            Self::Vm => "vm",
            Self::Fuzz => "fuzz",
            Self::Soak => "soak",
            Self::Image => "image",
            Self::K8s => "k8s",
        }
    }
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    reaper::install()?;
    let mut tiers = args.tiers.clone();
    if tiers.is_empty() {
        tiers.extend(Tier::ALL);
        if args.full {
            tiers.extend(Tier::LONG);
        }
    }
    let play = Play {
        filter: args.filter.as_deref(),
        full: args.full,
        kubernetes: args.kubernetes,
    };
    let mut total = Count::default();
    for tier in tiers {
        if args.list {
            list(tier, play)?;
            continue;
        }
        println!("== {} ==", tier.name());
        total.add(run_tier(tier, play));
    }
    if args.list {
        return Ok(ExitCode::SUCCESS);
    }
    for name in &total.failures {
        println!("failed: {name}");
    }
    for skip in &total.skips {
        println!("skipped: {skip}");
    }
    let in_ci = std::env::var("CI").is_ok_and(|v| v == "true");
    if in_ci && total.skipped > 0 {
        println!("a skip is a failure here, because CI=true");
    }
    println!(
        "{} passed, {} failed, {} skipped",
        total.passed, total.failed, total.skipped
    );
    Ok(if total.failed > 0 || (in_ci && total.skipped > 0) {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

fn run_tier(tier: Tier, play: Play) -> Count {
    let prepared = match tier {
        Tier::Rules => return rules::run(),
        Tier::Mutants => return mutants::count(),
        Tier::Vm => return vm::count(),
        Tier::Fuzz => return fuzz::count(),
        Tier::Soak => return soak::count(SOAK_MINUTES),
        Tier::Image => return image::count(),
        Tier::Lint => {
            needs::ensure(&[Purpose::Build, Purpose::Deny]).and_then(|()| fuzz::copy_lock())
        }
        // As root they use namespaces, too.
        Tier::Unit if geteuid().is_root() => needs::ensure(&[Purpose::Build, Purpose::World]),
        Tier::Unit => needs::ensure(&[Purpose::Build]),
        Tier::Bpf | Tier::Mesh => {
            if let Some(missing) = requirements::missing().first() {
                return Count::skipped(
                    tier.name(),
                    &format!("{} is missing: {}", missing.what, missing.remedy),
                );
            }
            prepare_kernel_tiers(tier)
        }
        Tier::K8s => match NEWEST.lacks() {
            Some(lacks) if std::env::var_os("KUBECONFIG").is_none() => {
                return Count::skipped(tier.name(), lacks);
            }
            Some(_) | None => prepare_k8s(play),
        },
    };
    if let Err(e) = prepared {
        return Count::failure(&format!("{}: prepare", tier.name()), &format!("{e:#}"));
    }
    let mut total = Count::default();
    for (name, mut command) in commands(tier, play) {
        total.add(steps::run(
            &format!("{}: {name}", tier.name()),
            &mut command,
        ));
    }
    total
}

/// The kernel half, and for whole agents the binary that ships.
fn prepare_kernel_tiers(tier: Tier) -> Result<()> {
    needs::ensure(&[Purpose::World])?;
    crate::ebpf::build()?;
    if tier == Tier::Mesh {
        image::AGENT_PROGRAM.build()?;
        shell::run(&mut testing_agent_build())?;
    }
    Ok(())
}

/// Kubernetes' programs and the agent's image.
fn prepare_k8s(play: Play) -> Result<()> {
    if std::env::var_os("KUBECONFIG").is_none() {
        for release in play.releases() {
            cluster::prepare(release)?;
        }
        image::build(picomesh_tests::image::AGENT, &image::archive())?;
    }
    Ok(())
}

/// The agent that takes rules out on request; with just the features that the tiers' own use of the
/// library has, so that the library is not compiled once more.
fn testing_agent_build() -> Command {
    let mut command = shell::cargo();
    command.args(["build", "-p", "picomesh-agent", "--bin", "picomesh-agent"]);
    command.args(["--no-default-features", "--features", "agent,testing"]);
    command
}

fn commands(tier: Tier, play: Play) -> Vec<(&'static str, Command)> {
    let Play { filter, full, .. } = play;
    let cargo = |args: &[&str]| {
        let mut command = shell::cargo();
        command.args(args);
        command
    };
    match tier {
        // A filter names tests, and these are none.
        Tier::Lint if filter.is_some() => Vec::new(),
        Tier::Lint => {
            let mut deny = cargo(&[
                "deny",
                "--workspace",
                "check",
                "licenses",
                "bans",
                "sources",
            ]);
            let path = std::env::var("PATH").unwrap_or_default();
            deny.env("PATH", format!("{}:{path}", CARGO_DENY.bin_dir().display()));
            // What the targets stand on was compiled for the steps before, and lies there.
            let mut fuzz_targets = cargo(&[
                "clippy",
                "--manifest-path",
                "tests/fuzz/Cargo.toml",
                "--no-default-features",
                "--",
                "-D",
                "warnings",
            ]);
            fuzz_targets.env("CARGO_TARGET_DIR", shell::target_dir());
            vec![
                ("fmt", cargo(&["fmt", "--all", "--check"])),
                // Not of the workspace.
                (
                    "fmt of the fuzz targets",
                    cargo(&["fmt", "--manifest-path", "tests/fuzz/Cargo.toml", "--check"]),
                ),
                (
                    "clippy",
                    cargo(&[
                        "clippy",
                        "--workspace",
                        "--all-targets",
                        "--",
                        "-D",
                        "warnings",
                    ]),
                ),
                (
                    "clippy of the CNI plugin, without other features",
                    cargo(&[
                        "clippy",
                        "-p",
                        "picomesh-agent",
                        "-p",
                        "picomesh-common",
                        "--lib",
                        "--bins",
                        "--no-default-features",
                        "--features",
                        "picomesh-agent/cni",
                        "--",
                        "-D",
                        "warnings",
                    ]),
                ),
                ("definitions of kinds", cargo(&["xtask", "crds", "--check"])),
                // Without libFuzzer itself there is no C++ to compile.
                ("clippy of the fuzz targets", fuzz_targets),
                ("deny", deny),
            ]
        }
        Tier::Unit => vec![
            (
                "agent, common, xtask",
                test(
                    &[
                        "-p",
                        "picomesh-agent",
                        "-p",
                        "picomesh-common",
                        "-p",
                        "xtask",
                    ],
                    filter,
                ),
            ),
            ("world", test(&["-p", "picomesh-tests", "--lib"], filter)),
        ],
        Tier::Bpf => vec![("programs", bpf_tests(filter))],
        Tier::Mesh => {
            let mut mesh = test(&["-p", "picomesh-tests", "--test", "mesh"], filter);
            mesh.env(picomesh_tests::agent::BINARY, image::AGENT_PROGRAM.path());
            if full {
                mesh.env(picomesh_tests::FULL, "1");
            }
            let testing = shell::target_dir().join("debug/picomesh-agent");
            mesh.env(picomesh_tests::agent::TESTING_BINARY, testing);
            vec![("agents", mesh)]
        }
        Tier::K8s => {
            let on = |release: Release| {
                let mut k8s = test(&["-p", "picomesh-tests", "--test", "k8s"], filter);
                k8s.env(AGENT_IMAGE, image::archive());
                if full {
                    k8s.env(picomesh_tests::FULL, "1");
                }
                if let Some(kubernetes) = release.find() {
                    k8s.env(KUBERNETES, kubernetes);
                }
                (release.version, k8s)
            };
            play.releases().into_iter().map(on).collect()
        }
        // These have verbs of their own.
        Tier::Rules | Tier::Mutants | Tier::Vm | Tier::Fuzz | Tier::Soak | Tier::Image => {
            Vec::new()
        }
    }
}

pub(crate) fn bpf_tests(filter: Option<&str>) -> Command {
    test(&["-p", "picomesh-tests", "--test", "bpf"], filter)
}

fn test(args: &[&str], filter: Option<&str>) -> Command {
    let mut command = shell::cargo();
    // Every binary runs, also after one has failed.
    command.args(["test", "--no-fail-fast"]).args(args);
    if let Some(filter) = filter {
        command.args(["--", filter]);
    }
    command
}

fn list(tier: Tier, play: Play) -> Result<()> {
    match tier {
        Tier::Lint => {
            for (name, _) in commands(
                tier,
                Play {
                    filter: None,
                    ..play
                },
            ) {
                println!("{}: {name}", tier.name());
            }
        }
        Tier::Rules | Tier::Mutants | Tier::Vm | Tier::Fuzz | Tier::Soak | Tier::Image => {
            println!("{}", tier.name());
        }
        Tier::Unit | Tier::Bpf | Tier::Mesh | Tier::K8s => {
            for (_, mut command) in commands(
                tier,
                Play {
                    filter: None,
                    ..play
                },
            ) {
                // No doc tests: they have no names worth listing.
                let output = command.args(["--", "--list"]).output()?;
                for line in String::from_utf8_lossy(&output.stdout).lines() {
                    if let Some(name) = line.strip_suffix(": test") {
                        println!("{}: {name}", tier.name());
                    }
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, fs, path::Path};

    use super::*;

    /// All directories of the checkout that hold a package.
    fn packages(dir: &Path, found: &mut BTreeSet<String>) {
        for entry in fs::read_dir(dir).unwrap().flatten() {
            let (path, name) = (entry.path(), entry.file_name());
            if path.is_dir() && name != "target" && !name.as_encoded_bytes().starts_with(b".") {
                let manifest = fs::read_to_string(path.join("Cargo.toml")).unwrap_or_default();
                if manifest.contains("[package]") {
                    let inside = path.strip_prefix(shell::root()).unwrap();
                    found.insert(inside.to_str().unwrap().to_owned());
                }
                packages(&path, found);
            }
        }
    }

    #[test]
    fn lint_compiles_every_package_of_the_checkout() {
        let mut left = BTreeSet::new();
        packages(shell::root(), &mut left);
        assert!(left.contains("tests/fuzz"), "{left:?}");
        let workspace = fs::read_to_string(shell::root().join("Cargo.toml")).unwrap();
        let members = workspace.lines().find(|line| line.starts_with("members"));
        for (_name, command) in commands(Tier::Lint, Play::default()) {
            let args: Vec<_> = command.get_args().filter_map(|arg| arg.to_str()).collect();
            if args[0] != "clippy" {
                continue;
            }
            left.retain(|package| {
                let member = members.unwrap().contains(&format!("\"{package}\""));
                let named = format!("{package}/Cargo.toml");
                !(member && args.contains(&"--workspace") || args.contains(&named.as_str()))
            });
        }
        assert!(left.is_empty(), "never compiled: {left:?}");
    }
}

//! `cargo xtask cluster up|down|kubectl`: the cluster of the tier `k8s`, for a person.

use std::{
    os::unix::process::CommandExt,
    process::{Command, ExitCode},
};

use anyhow::{Context, Result, bail};
use clap::Subcommand;
use picomesh_tests::{
    cluster::{self, Cluster},
    image::AGENT,
    reaper,
};

use crate::{
    image,
    kubernetes::{NEWEST, Release},
    needs::{self, Purpose},
};

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Start a control plane and nodes, and leave them running
    Up {
        #[arg(long, default_value_t = 2)]
        nodes: usize,
        /// Of this Kubernetes: 1.36 or 1.30
        #[arg(long, value_name = "VERSION", value_parser = Release::parse, default_value = NEWEST.version)]
        kubernetes: Release,
    },
    /// Remove it with every trace
    Down,
    /// Call kubectl on it
    Kubectl {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    match &args.verb {
        Verb::Up { nodes, kubernetes } => up(*nodes, *kubernetes),
        Verb::Down => {
            match Cluster::down() {
                Some(name) => println!("removed {name}"),
                None => println!("no cluster is up"),
            }
            Ok(ExitCode::SUCCESS)
        }
        Verb::Kubectl { args } => {
            let Some(name) = Cluster::kept() else {
                bail!("no cluster is up: cargo xtask cluster up");
            };
            let kubectl = NEWEST.install()?.join("kubectl");
            // Instead of us: its terminal, its signals, its exit code.
            Err(Command::new(&kubectl)
                .args(args)
                .env("KUBECONFIG", cluster::kubeconfig(&name))
                .exec())
            .with_context(|| format!("start {}", kubectl.display()))
        }
    }
}

fn up(nodes: usize, release: Release) -> Result<ExitCode> {
    reaper::install()?;
    if let Some(name) = Cluster::kept() {
        println!("{name} is up already");
        tell(&name);
        return Ok(ExitCode::SUCCESS);
    }
    let kubernetes = prepare(release)?;
    let cluster = Cluster::up(&kubernetes, nodes, true)?;
    for node in cluster.nodes() {
        println!(
            "{} is Ready; its network: nsenter --net={} COMMAND",
            node.name(),
            node.netns().path().display()
        );
    }
    let archive = image::archive();
    if archive.is_file() {
        cluster.import_archive(&archive)?;
        println!("{AGENT} is on every node: kubectl apply -k deploy/kustomize/base");
    } else {
        println!("for the mesh: cargo xtask image, and a cluster after that");
    }
    tell(cluster.name());
    Ok(ExitCode::SUCCESS)
}

/// Gets what a cluster needs; returns the directory with Kubernetes' programs.
pub(crate) fn prepare(release: Release) -> Result<std::path::PathBuf> {
    needs::ensure(&[Purpose::World, Purpose::Cluster])?;
    release.install()
}

fn tell(name: &str) {
    println!("export KUBECONFIG={}", cluster::kubeconfig(name).display());
    println!("cargo xtask cluster kubectl get nodes; cargo xtask cluster down");
}

//! The project's verbs: `cargo xtask VERB`. One file each; this one is their table.
#![forbid(unsafe_code)]
#![expect(
    clippy::print_stdout,
    reason = "a command line speaks on standard output"
)]

mod bench;
mod cache;
mod cluster;
mod cni;
mod crds;
mod demo;
mod doctor;
mod ebpf;
mod fuzz;
mod image;
mod kubernetes;
mod mutants;
mod needs;
mod setup;
mod shell;
mod soak;
mod test;
mod vm;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "The project's verbs", version)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Say what this machine lacks for which verb, and why it is needed
    Doctor(doctor::Args),
    /// Get what `doctor` misses
    Setup(setup::Args),
    /// Build the CNI plugin as it ships: static and small
    Cni(cni::Args),
    /// Write the definitions of our own kinds out of the Rust types
    Crds(crds::Args),
    /// Compile the kernel half to target/ebpf/picomesh.bpf.o
    Ebpf(ebpf::Args),
    /// Build the image that a cluster runs, as an OCI archive
    Image(image::Args),
    /// A Kubernetes cluster on this machine: control plane, nodes, containers
    Cluster(cluster::Args),
    /// Show the mesh at work in a world of network namespaces
    Demo(demo::Args),
    /// Compare the mesh with no mesh, haproxy and nginx, in one run
    Bench(bench::Args),
    /// Run every tier of tests
    Test(test::Args),
    /// Change the files that decide, one operator at a time, and see whether the tests notice
    Mutants(mutants::Args),
    /// Feed random bytes to everything that reads bytes of others, and packets to the kernel half
    Fuzz(fuzz::Args),
    /// Let mixed traffic run while agents die, policies change and pods come and go
    Soak(soak::Args),
    /// Run the tier bpf and a smoke test of the mesh on other kernels, under qemu
    Vm(vm::Args),
}

fn main() -> ExitCode {
    let done = match Cli::parse().verb {
        Verb::Doctor(args) => doctor::run(&args),
        Verb::Setup(args) => setup::run(&args),
        Verb::Cni(args) => cni::run(&args),
        Verb::Crds(args) => crds::run(&args),
        Verb::Ebpf(args) => ebpf::run(&args),
        Verb::Image(args) => image::run(&args),
        Verb::Cluster(args) => cluster::run(&args),
        Verb::Demo(args) => demo::run(&args),
        Verb::Bench(args) => bench::run(&args),
        Verb::Test(args) => test::run(&args),
        Verb::Mutants(args) => mutants::run(&args),
        Verb::Fuzz(args) => fuzz::run(&args),
        Verb::Soak(args) => soak::run(&args),
        Verb::Vm(args) => vm::run(&args),
    };
    done.unwrap_or_else(|e| {
        eprintln!("{e:#}");
        ExitCode::FAILURE
    })
}

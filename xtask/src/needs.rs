//! What each verb needs of the machine, why, and how to tell that it is there.
//!
//! `doctor` prints this, `setup` gets it, and every verb asks [`ensure`] for its own part first, so
//! that the first command on a fresh machine works. Looking costs a few file look-ups.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::Result;
use picomesh_tests::requirements;

use crate::{
    cache::{BPF_LINKER, CARGO_DENY, CARGO_MUTANTS, Tool},
    ebpf, kubernetes, setup,
};

/// A group of needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub(crate) enum Purpose {
    /// Compiling the agent
    Build,
    /// Compiling the kernel half
    Ebpf,
    /// Worlds of network namespaces and the programs in them
    World,
    /// Comparing with other proxies
    Bench,
    /// Checking licences and duplicates
    Deny,
    /// Testing the tests
    Mutants,
    /// Fuzzing what reads bytes of others
    Fuzz,
    /// Booting other kernels
    Vm,
    /// A Kubernetes cluster of this machine's own
    Cluster,
}

impl Purpose {
    pub(crate) const ALL: [Self; 9] = [
        Self::Build,
        Self::Ebpf,
        Self::World,
        Self::Bench,
        Self::Deny,
        Self::Mutants,
        Self::Fuzz,
        Self::Vm,
        Self::Cluster,
    ];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Build => "build",
            Self::Ebpf => "ebpf",
            Self::World => "world",
            Self::Bench => "bench",
            Self::Deny => "deny",
            Self::Mutants => "mutants",
            Self::Fuzz => "fuzz",
            Self::Vm => "vm",
            Self::Cluster => "cluster",
        }
    }
}

/// One thing that a verb cannot do without.
pub(crate) struct Need {
    pub(crate) purpose: Purpose,
    pub(crate) source: Source,
    /// Why it is needed, as the end of "… is missing: ".
    pub(crate) why: &'static str,
}

pub(crate) enum Source {
    /// A Debian package and how to tell that what it brings is there.
    Package(&'static str, Sign),
    /// A program that `cargo install` builds into the cache.
    Tool(&'static Tool),
    /// Kubernetes' programs, compiled into the cache.
    Kubernetes,
}

pub(crate) enum Sign {
    /// Any of these programs is on the PATH.
    Program(&'static str),
    File(&'static str),
    /// A directory that holds a file whose name starts so.
    FileIn(&'static str, &'static str),
}

const NEEDS: &[Need] = &[
    package(
        Purpose::Build,
        "gcc",
        Sign::Program("cc"),
        "links Rust programs, compiles aws-lc",
    ),
    package(
        Purpose::Build,
        "libc6-dev",
        Sign::File("/usr/include/stdio.h"),
        "headers for aws-lc and jemalloc",
    ),
    package(
        Purpose::Build,
        "make",
        Sign::Program("make"),
        "builds jemalloc",
    ),
    package(
        Purpose::Ebpf,
        "rustc-web",
        Sign::File("/usr/bin/rustc"),
        "a compiler that has core for BPF",
    ),
    package(
        Purpose::Ebpf,
        "libstd-rust-web-dev-bpf",
        Sign::FileIn("/usr/lib/rustlib/bpfel-unknown-none/lib", "libcore-"),
        "core, compiled for BPF",
    ),
    package(
        Purpose::Ebpf,
        "llvm-22-dev",
        Sign::File("/usr/lib/llvm-22/bin/llvm-config"),
        "bpf-linker is built on it",
    ),
    Need {
        purpose: Purpose::Ebpf,
        source: Source::Tool(&BPF_LINKER),
        why: "links the kernel half",
    },
    package(
        Purpose::World,
        "iproute2",
        Sign::Program("ip"),
        "makes namespaces and their links",
    ),
    package(
        Purpose::World,
        "nftables",
        Sign::Program("nft"),
        "masquerades, as a NodePort does",
    ),
    package(
        Purpose::World,
        "nginx-light",
        Sign::Program("nginx"),
        "a server in a pod",
    ),
    package(
        Purpose::World,
        "curl",
        Sign::Program("curl"),
        "a client in a pod",
    ),
    package(
        Purpose::World,
        "iperf3",
        Sign::Program("iperf3"),
        "bulk in both directions",
    ),
    package(
        Purpose::World,
        "redis-server",
        Sign::Program("redis-server"),
        "a server in a pod",
    ),
    package(
        Purpose::World,
        "redis-tools",
        Sign::Program("redis-cli"),
        "a client in a pod",
    ),
    package(
        Purpose::World,
        "socat",
        Sign::Program("socat"),
        "a server that speaks first",
    ),
    package(
        Purpose::Bench,
        "haproxy",
        Sign::Program("haproxy"),
        "a proxy to compare with",
    ),
    package(
        Purpose::Bench,
        "libnginx-mod-stream",
        Sign::File("/usr/lib/nginx/modules/ngx_stream_module.so"),
        "a proxy to compare with",
    ),
    package(
        Purpose::Bench,
        "openssl",
        Sign::Program("openssl"),
        "certificates for the proxies compared with",
    ),
    Need {
        purpose: Purpose::Deny,
        source: Source::Tool(&CARGO_DENY),
        why: "checks licences, sources and duplicates",
    },
    Need {
        purpose: Purpose::Mutants,
        source: Source::Tool(&CARGO_MUTANTS),
        why: "changes the files that decide",
    },
    package(
        Purpose::Fuzz,
        "g++",
        Sign::Program("c++"),
        "compiles libFuzzer",
    ),
    package(
        Purpose::Vm,
        "qemu-system-x86",
        Sign::Program("qemu-system-x86_64"),
        "boots other kernels",
    ),
    package(
        Purpose::Vm,
        "busybox-static",
        Sign::Program("busybox"),
        "the system below the tests on other kernels",
    ),
    package(
        Purpose::Vm,
        "kmod",
        Sign::Program("depmod"),
        "tells which modules of a kernel need which",
    ),
    package(
        Purpose::Vm,
        "xz-utils",
        Sign::Program("xz"),
        "unpacks a kernel's modules",
    ),
    package(
        Purpose::Vm,
        "binutils",
        Sign::Program("strip"),
        "makes the tests small enough for a machine in memory",
    ),
    package(
        Purpose::Cluster,
        "etcd-server",
        Sign::Program("etcd"),
        "keeps what the API server knows",
    ),
    package(
        Purpose::Cluster,
        "containerd",
        Sign::Program("containerd"),
        "runs a node's containers",
    ),
    package(
        Purpose::Cluster,
        "runc",
        Sign::Program("runc"),
        "starts a container",
    ),
    package(
        Purpose::Cluster,
        "containernetworking-plugins",
        Sign::File("/usr/lib/cni/bridge"),
        "gives pods their network",
    ),
    package(
        Purpose::Cluster,
        "iptables",
        Sign::Program("iptables"),
        "kube-proxy writes Services as its rules",
    ),
    package(
        Purpose::Cluster,
        "conntrack",
        Sign::Program("conntrack"),
        "kube-proxy forgets connections by it",
    ),
    package(
        Purpose::Cluster,
        "openssl",
        Sign::Program("openssl"),
        "makes the cluster's certificates",
    ),
    package(
        Purpose::Cluster,
        "busybox-static",
        Sign::Program("busybox"),
        "what is in the tests' images",
    ),
    Need {
        purpose: Purpose::Cluster,
        source: Source::Kubernetes,
        why: "API server, kubelet and the others, compiled by Go",
    },
];

const fn package(purpose: Purpose, name: &'static str, sign: Sign, why: &'static str) -> Need {
    Need {
        purpose,
        source: Source::Package(name, sign),
        why,
    }
}

impl Need {
    pub(crate) fn name(&self) -> &'static str {
        match self.source {
            Source::Package(name, _) => name,
            Source::Tool(tool) => tool.name,
            Source::Kubernetes => "kubernetes",
        }
    }

    pub(crate) fn is_met(&self) -> bool {
        // A developer's rustup with nightly, rust-src and bpf-linker replaces all of this.
        if self.purpose == Purpose::Ebpf && ebpf::rustup_way() {
            return true;
        }
        match &self.source {
            Source::Package(_, sign) => match sign {
                Sign::Program(name) => requirements::program(name),
                Sign::File(path) => Path::new(path).is_file(),
                Sign::FileIn(dir, prefix) => fs::read_dir(dir).is_ok_and(|entries| {
                    entries
                        .flatten()
                        .any(|e| e.file_name().to_string_lossy().starts_with(prefix))
                }),
            },
            Source::Tool(tool) => tool.find().is_some(),
            Source::Kubernetes => kubernetes::NEWEST.find().is_some(),
        }
    }
}

/// All needs of some purposes, in the order in which they are to be met.
pub(crate) fn of(purposes: &[Purpose]) -> impl Iterator<Item = &'static Need> {
    NEEDS.iter().filter(|n| purposes.contains(&n.purpose))
}

/// Gets what is missing for these purposes; silent and quick when nothing is.
pub(crate) fn ensure(purposes: &[Purpose]) -> Result<()> {
    let missing: Vec<&Need> = of(purposes).filter(|n| !n.is_met()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    setup::get(&missing)
}

/// The directory of bpf-linker, for the PATH.
pub(crate) fn bpf_linker_dir() -> PathBuf {
    BPF_LINKER.bin_dir()
}

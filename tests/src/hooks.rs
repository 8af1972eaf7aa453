//! Which programs stand at a pod's hooks, asked of the kernel: what the agent believes is no proof
//! of it.

use std::{io, os::fd::AsRawFd, process::Command};

use anyhow::{Context, Result};
use nix::libc;

use crate::{Netns, requirements};

/// Identifiers of the programs at each hook of a pod, in the kernel's order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hooks {
    pub egress: Vec<u32>,
    pub ingress: Vec<u32>,
    pub steer: Vec<u32>,
}

impl Hooks {
    /// What stands at `eth0` and at the namespace itself; at `eth0` by TCX, or before Linux 6.6
    /// by clsact.
    pub fn of(netns: &Netns) -> Result<Self> {
        netns
            .run(|| {
                let eth0 = nix::net::if_::if_nametoindex("eth0")?;
                let own = std::fs::File::open("/proc/thread-self/ns/net")?;
                Ok::<_, io::Error>(Self {
                    egress: tc_programs(eth0, TCX_EGRESS, "egress")?,
                    ingress: tc_programs(eth0, TCX_INGRESS, "ingress")?,
                    steer: programs(own.as_raw_fd().cast_unsigned(), SK_LOOKUP)?,
                })
            })
            .with_context(|| format!("ask for the programs of {}", netns.name()))
    }

    /// Exactly one program at each.
    pub fn are_single(&self) -> bool {
        [&self.egress, &self.ingress, &self.steer]
            .iter()
            .all(|programs| programs.len() == 1)
    }

    pub fn are_empty(&self) -> bool {
        [&self.egress, &self.ingress, &self.steer]
            .iter()
            .all(|programs| programs.is_empty())
    }
}

/// Of `enum bpf_attach_type`.
const SK_LOOKUP: u32 = 36;
const TCX_INGRESS: u32 = 46;
const TCX_EGRESS: u32 = 47;

/// Of `enum bpf_cmd`.
const PROG_QUERY: libc::c_long = 16;
/// More than anybody attaches to one hook.
const MANY: usize = 32;

/// The part of `union bpf_attr` that BPF_PROG_QUERY reads and writes.
#[repr(C)]
#[derive(Default)]
struct Query {
    target: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    program_ids: u64,
    count: u32,
    pad: u32,
    program_attach_flags: u64,
    link_ids: u64,
    link_attach_flags: u64,
    revision: u64,
}

/// Programs of `eth0` in the calling thread's namespace.
fn tc_programs(eth0: u32, attach_type: u32, direction: &str) -> io::Result<Vec<u32>> {
    if requirements::kernel() >= (6, 6) {
        return programs(eth0, attach_type);
    }
    let output = Command::new("tc")
        .args(["filter", "show", "dev", "eth0", direction])
        .output()?;
    // `… direct-action not_in_hw id 42 tag …`; without a clsact it says nothing.
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let words: Vec<&str> = text.split_whitespace().collect();
    Ok(words
        .windows(2)
        .filter(|pair| pair[0] == "id")
        .filter_map(|pair| pair[1].parse().ok())
        .collect())
}

/// `target` is an interface's index, or a descriptor of a network namespace.
fn programs(target: u32, attach_type: u32) -> io::Result<Vec<u32>> {
    let mut ids = [0_u32; MANY];
    let mut query = Query {
        target,
        attach_type,
        program_ids: ids.as_mut_ptr() as u64,
        count: MANY as u32,
        ..Query::default()
    };
    // SAFETY: the attribute is what the command takes, its size is its own, and `program_ids` has
    // room for `count` numbers until the call returns.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            PROG_QUERY,
            &raw mut query,
            size_of::<Query>(),
        )
    };
    if result == 0 {
        Ok(ids.iter().copied().take(query.count as usize).collect())
    } else {
        Err(io::Error::last_os_error())
    }
}

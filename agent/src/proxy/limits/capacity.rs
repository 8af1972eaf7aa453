//! What the machine gives us: memory by the cgroup's limit, descriptors by RLIMIT_NOFILE. Read once,
//! at start; the caps that nobody set follow from it.

use std::{
    fs,
    path::{Path, PathBuf},
};

use nix::sys::resource::{Resource, getrlimit};
use serde::Serialize;

use super::{CapSettings, Caps};

/// Where the bound of memory comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Bound {
    /// `memory.max` of our cgroup or of one above it.
    CgroupV2,
    /// `memory.limit_in_bytes` of our cgroup or of one above it.
    CgroupV1,
    /// Nobody limits us: a share of MemTotal.
    Machine,
}

/// What there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Capacity {
    pub bound: Bound,
    /// Bytes that `bound` says.
    pub memory: u64,
    /// RLIMIT_NOFILE, soft.
    pub files: u64,
}

/// Of a limit that is ours alone, connections and their buffers may take a half; of a machine that
/// we share with its pods, an eighth.
const SHARE_OF_LIMIT: u64 = 2;
const SHARE_OF_MACHINE: u64 = 8;
/// What a connection costs when it is idle: about 5 KB are resident (`cargo xtask bench`), and its
/// two sockets in the kernel take less than 4 KB each.
const PER_CONNECTION: u64 = 12 << 10;
/// Of our share, buffers may take so much; the rest is for what idle connections cost.
const SHARE_OF_BUFFERS: u64 = 2;
/// Descriptors that are not connections': listeners, pins, logs, namespaces.
const OTHER_FILES: u64 = 512;
/// A connection that leaves its thread by a socket has two.
const FILES_PER_CONNECTION: u64 = 2;
/// What v1 says when it limits nothing is the largest multiple of a page; nobody has so much.
const UNLIMITED: u64 = 1 << 60;

const FEWEST_CONNECTIONS: u64 = 256;
const FEWEST_BUFFERS: u64 = 8 << 20;
/// Defaults of one pod, where the node has enough.
const POD_CONNECTIONS: usize = 4096;
const POD_RATE: u32 = 5000;
const POD_PENDING: usize = 1024;
const POD_BUFFERS: usize = 64 << 20;
/// Tunnels of one peer: one per pair of identities and data thread, and a few more for bulk.
const PEER_TUNNELS: usize = 4096;
const FEWEST_TUNNELS: usize = 64;

impl Capacity {
    /// Of this process, now: call it when RLIMIT_NOFILE is raised.
    pub fn read() -> Self {
        let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let limit = memory_limit(
            &text("/proc/self/cgroup"),
            &text("/proc/self/mountinfo"),
            |path| fs::read_to_string(path).ok(),
        );
        let total = mem_total(&text("/proc/meminfo"));
        let (bound, memory) = match limit {
            Some((bound, limit)) if limit < total => (bound, limit),
            Some(_) | None => (Bound::Machine, total),
        };
        // It cannot fail; if it did, little would be promised.
        let files = getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(soft, _)| soft);
        Self {
            bound,
            memory,
            files,
        }
    }

    /// Our share of the memory.
    fn share(&self) -> u64 {
        match self.bound {
            Bound::CgroupV2 | Bound::CgroupV1 => self.memory / SHARE_OF_LIMIT,
            Bound::Machine => self.memory / SHARE_OF_MACHINE,
        }
    }
}

impl Caps {
    /// What is set counts; what is not follows from what there is.
    pub fn derive(set: &CapSettings, capacity: &Capacity) -> Self {
        let share = capacity.share();
        let by_memory = (share / SHARE_OF_BUFFERS) / PER_CONNECTION;
        let by_files = capacity.files.saturating_sub(OTHER_FILES) / FILES_PER_CONNECTION;
        let connections = by_memory.min(by_files).max(FEWEST_CONNECTIONS);
        let node_connections = set.node_connections.unwrap_or(to_usize(connections));
        let buffers = (share / SHARE_OF_BUFFERS).max(FEWEST_BUFFERS);
        let node_buffers = set.node_buffers.unwrap_or(to_usize(buffers));
        Self {
            pod_connections: set
                .pod_connections
                .unwrap_or(POD_CONNECTIONS.min(node_connections / 6))
                .max(1),
            pod_inbound_connections: set
                .pod_inbound_connections
                .unwrap_or(node_connections / 3)
                .max(1),
            pod_rate: set.pod_rate.unwrap_or(POD_RATE),
            pod_pending: set.pod_pending.unwrap_or(POD_PENDING),
            pod_waiting: (node_connections / 2).max(1),
            pod_buffers: set.pod_buffers.unwrap_or(POD_BUFFERS.min(node_buffers / 4)),
            node_connections,
            node_buffers,
            peer_tunnels: set
                .peer_tunnels
                .unwrap_or((node_connections / 4).clamp(FEWEST_TUNNELS, PEER_TUNNELS)),
        }
    }
}

fn to_usize(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

fn mem_total(meminfo: &str) -> u64 {
    let kib = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))
        .and_then(|rest| rest.trim().trim_end_matches(" kB").parse::<u64>().ok());
    // A kernel that does not say is none that we know: promise little.
    kib.map_or(256 << 20, |kib| kib << 10)
}

/// The lowest limit of our cgroup and of those above it, as far as they are mounted here. On a
/// machine with both versions the memory controller is in one of them only.
fn memory_limit(
    cgroup: &str,
    mountinfo: &str,
    read: impl Fn(&Path) -> Option<String>,
) -> Option<(Bound, u64)> {
    let v1 = cgroup.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let memory = fields.next()?.split(',').any(|name| name == "memory");
        memory.then(|| fields.next())?
    });
    let v2 = cgroup.lines().find_map(|line| line.strip_prefix("0::"));
    let mounts: Vec<Mount<'_>> = mountinfo.lines().filter_map(Mount::parse).collect();
    let find = |bound: Bound, own: Option<&str>, wanted: &dyn Fn(&Mount<'_>) -> bool, file| {
        let mount = mounts.iter().find(|mount| wanted(mount))?;
        let limit = lowest(&mount.at(own?), mount.point, file, &read)?;
        Some((bound, limit))
    };
    let is_v1 = |mount: &Mount<'_>| {
        mount.kind == "cgroup" && mount.options.split(',').any(|option| option == "memory")
    };
    find(Bound::CgroupV1, v1, &is_v1, "memory.limit_in_bytes").or_else(|| {
        // One that begins above our own namespace's root is the node's, not where we are.
        let is_v2 = |mount: &Mount<'_>| mount.kind == "cgroup2" && !mount.root.starts_with("/..");
        find(Bound::CgroupV2, v2, &is_v2, "memory.max")
    })
}

/// One line of mountinfo, as far as we need it.
struct Mount<'a> {
    /// Which directory of the file system is mounted.
    root: &'a str,
    point: &'a str,
    kind: &'a str,
    options: &'a str,
}

impl<'a> Mount<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let (left, right) = line.split_once(" - ")?;
        let mut left = left.split(' ').skip(3);
        let (root, point) = (left.next()?, left.next()?);
        let mut right = right.split(' ');
        let kind = right.next()?;
        let options = right.nth(1).unwrap_or_default();
        Some(Self {
            root,
            point,
            kind,
            options,
        })
    }

    /// Where a cgroup's directory is under this mount. A container sees its own as the root of the
    /// mount, whatever its path is called outside.
    fn at(&self, own: &str) -> PathBuf {
        let inside = own.strip_prefix(self.root).unwrap_or(own);
        Path::new(self.point).join(inside.trim_start_matches('/'))
    }
}

fn lowest(
    own: &Path,
    top: &str,
    file: &str,
    read: &impl Fn(&Path) -> Option<String>,
) -> Option<u64> {
    own.ancestors()
        .take_while(|dir| dir.starts_with(top))
        .filter_map(|dir| read(&dir.join(file))?.trim().parse::<u64>().ok())
        .filter(|limit| *limit < UNLIMITED)
        .min()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const HYBRID: &str = "\
        31 23 0:27 / /sys/fs/cgroup/memory rw,nosuid - cgroup cgroup rw,memory\n\
        42 23 0:39 / /sys/fs/cgroup/unified rw,nosuid shared:9 - cgroup2 cgroup2 rw\n";
    const V2: &str = "31 23 0:27 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";

    fn limit(cgroup: &str, mounts: &str, files: &[(&str, &str)]) -> Option<(Bound, u64)> {
        memory_limit(cgroup, mounts, |path| {
            let found = files.iter().find(|(name, _)| Path::new(name) == path)?;
            Some(found.1.to_owned())
        })
    }

    #[test]
    fn the_lowest_limit_on_the_way_up_counts() {
        let files = [
            ("/sys/fs/cgroup/kubepods/pod1/c1/memory.max", "max\n"),
            ("/sys/fs/cgroup/kubepods/pod1/memory.max", "134217728\n"),
            ("/sys/fs/cgroup/kubepods/memory.max", "4294967296\n"),
        ];
        let found = limit("0::/kubepods/pod1/c1\n", V2, &files);
        assert_eq!(found, Some((Bound::CgroupV2, 128 * MIB)));
    }

    #[test]
    fn version_one_is_read_where_the_memory_controller_is_its() {
        let cgroup = "9:name=systemd:/\n4:memory:/agents/one\n1:cpu,cpuacct:/\n0::/\n";
        let files = [
            (
                "/sys/fs/cgroup/memory/agents/one/memory.limit_in_bytes",
                "67108864\n",
            ),
            (
                "/sys/fs/cgroup/memory/memory.limit_in_bytes",
                "9223372036854771712\n",
            ),
        ];
        let found = limit(cgroup, HYBRID, &files);
        assert_eq!(found, Some((Bound::CgroupV1, 64 * MIB)));
        assert_eq!(limit(cgroup, HYBRID, &files[1..]), None, "no limit is none");
    }

    #[test]
    fn a_container_finds_its_own_directory_at_the_root_of_its_mount() {
        let mounts = "31 23 0:27 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n";
        let file = ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "67108864\n");
        let found = limit("4:memory:/docker/abc\n", mounts, &[file]);
        assert_eq!(found, Some((Bound::CgroupV1, 64 * MIB)));
        let file = ("/sys/fs/cgroup/memory.max", "67108864\n");
        let found = limit("0::/\n", V2, &[file]);
        assert_eq!(found, Some((Bound::CgroupV2, 64 * MIB)));
    }

    #[test]
    fn the_nodes_root_that_a_container_was_given_is_not_where_it_is() {
        let own = "90 80 0:27 / /sys/fs/cgroup ro - cgroup2 cgroup rw\n";
        let node = "95 80 0:27 /../../.. /host/sys/fs/cgroup ro - cgroup2 cgroup2 rw\n";
        let file = ("/sys/fs/cgroup/memory.max", "67108864\n");
        for mounts in [format!("{own}{node}"), format!("{node}{own}")] {
            let found = limit("0::/\n", &mounts, &[file]);
            assert_eq!(found, Some((Bound::CgroupV2, 64 * MIB)));
        }
    }

    #[test]
    fn nothing_readable_is_no_limit() {
        assert_eq!(limit("", "", &[]), None);
        assert_eq!(limit("0::/x\n", V2, &[]), None);
        assert_eq!(limit("4:memory:/x\n", "garbage\n1 2 3 - \n", &[]), None);
        assert_eq!(mem_total("MemTotal:       24684364 kB\n"), 24_684_364 << 10);
        assert_eq!(mem_total(""), 256 * MIB);
    }

    #[test]
    fn this_machine_can_be_read() {
        let capacity = Capacity::read();
        assert!(capacity.memory > 16 * MIB, "{capacity:?}");
        assert!(capacity.files >= 64, "{capacity:?}");
    }

    fn caps(bound: Bound, memory: u64, files: u64) -> Caps {
        let capacity = Capacity {
            bound,
            memory,
            files,
        };
        Caps::derive(&CapSettings::default(), &capacity)
    }

    #[test]
    fn caps_follow_from_what_there_is() {
        // An agent limited to 256 MiB: half of it, half of that for connections.
        let small = caps(Bound::CgroupV2, 256 * MIB, 1 << 20);
        assert_eq!(small.node_connections, 5461);
        assert_eq!(small.pod_connections, 910);
        assert_eq!(small.pod_inbound_connections, 1820);
        assert_eq!(small.pod_waiting, 2730);
        assert_eq!(small.node_buffers, 64 << 20);
        assert_eq!(small.pod_buffers, 16 << 20);
        assert_eq!(small.peer_tunnels, 1365);
        // A board of 8 GiB that limits nothing.
        let board = caps(Bound::Machine, 8192 * MIB, 1 << 20);
        assert_eq!(board.node_connections, 43_690);
        assert_eq!(board.pod_connections, 4096);
        assert_eq!(board.pod_buffers, 64 << 20);
        // Few descriptors.
        let few = caps(Bound::Machine, 8192 * MIB, 4096);
        assert_eq!(few.node_connections, 1792);
        assert_eq!(few.pod_connections, 298);
        // Hardly anything at all still serves somebody.
        let none = caps(Bound::CgroupV1, MIB, 64);
        assert_eq!(none.node_connections, 256);
        assert_eq!(none.pod_connections, 42);
        assert_eq!((none.peer_tunnels, board.peer_tunnels), (64, 4096));
    }

    #[test]
    fn what_is_set_counts() {
        let set = CapSettings {
            pod_connections: Some(20_000),
            node_connections: Some(30_000),
            ..CapSettings::default()
        };
        let capacity = Capacity {
            bound: Bound::CgroupV2,
            memory: 64 * MIB,
            files: 1024,
        };
        let caps = Caps::derive(&set, &capacity);
        assert_eq!(
            (caps.pod_connections, caps.node_connections),
            (20_000, 30_000)
        );
        assert_eq!((caps.pod_rate, caps.pod_pending), (5000, 1024));
    }
}

//! The one program on the cgroup v2 root, which tells probes by their sockets.
//!
//! Called through [`Loader`]. One per bpf directory; another agent's is never touched.

use std::{cmp::Reverse, fs, os::fd::AsFd, path::PathBuf};

use aya::programs::{CgroupAttachMode, SockOps, links::FdLink};
use picomesh_common::config::program;

use super::{
    Loader, LoaderError,
    attach::{attached, load_patiently},
    pins::{pinned_program, repin, replace},
    sys,
};

impl Loader {
    /// Attaches the program of the host's sockets to the cgroup v2 root, or puts it in the place
    /// of an earlier build's.
    pub fn attach_host_sockets(&self) -> Result<(), LoaderError> {
        let dir = self.root.join("host");
        let root = cgroup2_root()?;
        let cgroup = fs::File::open(&root).map_err(|source| LoaderError::PinFile {
            pin: root.clone(),
            source,
        })?;
        let attached = attached(cgroup.as_fd(), sys::ATTACH_SOCK_OPS)?;
        let pin = dir.join("sockops");
        let stands = |id| attached.contains(&id) && self.runs_on_our_maps(id);
        if self.is_stamped(&dir) && pinned_program(&pin)?.is_some_and(stands) {
            return Ok(());
        }
        Self::unstamp(&dir)?;
        let mut host = self.aya.lock().load(self.bytes)?;
        let sockops: &mut SockOps = host
            .program_mut(program::HOST_SOCKETS)
            .ok_or(LoaderError::ObjectLacks {
                what: "program",
                name: program::HOST_SOCKETS,
            })?
            .try_into()?;
        load_patiently(|| sockops.load())?;
        if !replace(&pin, sockops.fd()?.as_fd(), &attached)? {
            // A cgroup link stands beside those of others, whatever the mode is called.
            let id = sockops
                .attach(&cgroup, CgroupAttachMode::Single)
                .map_err(|source| LoaderError::Attach {
                    what: format!("{} to {}", program::HOST_SOCKETS, root.display()),
                    source: Box::new(source),
                })?;
            let link: FdLink = sockops.take_link(id)?.try_into()?;
            link.pin(&pin)?;
        }
        repin(&dir.join("program"), |path| sockops.pin(path))?;
        self.stamp(&dir)
    }

    /// Is the program of the host's sockets attached, exactly once?
    pub fn host_sockets_attached(&self) -> Result<bool, LoaderError> {
        let root = cgroup2_root()?;
        let cgroup =
            fs::File::open(&root).map_err(|source| LoaderError::PinFile { pin: root, source })?;
        let programs = attached(cgroup.as_fd(), sys::ATTACH_SOCK_OPS)?;
        Ok(programs.iter().filter(|id| self.is_ours(**id)).count() == 1)
    }
}

/// The root of cgroup v2: it holds every process, on hosts with cgroup v1 as well.
fn cgroup2_root() -> Result<PathBuf, LoaderError> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").map_err(|source| LoaderError::Io {
        doing: "reading /proc/self/mountinfo",
        source,
    })?;
    cgroup2_in(&mounts).ok_or(LoaderError::NoCgroup2)
}

/// Of all mounts of cgroup v2 the one that reaches highest. In a container there are two: its own
/// cgroup, which is `/` to it, and the node's root, which the kernel tells as `/../..`.
fn cgroup2_in(mounts: &str) -> Option<PathBuf> {
    let mounts = mounts.lines().filter_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        let mut left = left.split(' ').skip(3);
        let (root, point) = (left.next()?, left.next()?);
        right.starts_with("cgroup2 ").then_some((root, point))
    });
    let (_root, point) = mounts.min_by_key(|(root, _)| {
        let above = root.split('/').filter(|part| *part == "..").count();
        (Reverse(above), root.len())
    })?;
    // The kernel writes blanks in paths as octal.
    Some(PathBuf::from(point.replace("\\040", " ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroup2_is_found_wherever_it_is_mounted() {
        let v1 = "31 30 0:26 / /sys/fs/cgroup/cpu rw shared:5 - cgroup cgroup rw,cpu\n";
        let hybrid = format!(
            "30 24 0:25 / /sys/fs/cgroup ro - tmpfs tmpfs ro\n{v1}\
             32 30 0:27 / /sys/fs/cgroup/unified rw shared:6 - cgroup2 cgroup2 rw\n"
        );
        assert_eq!(
            cgroup2_in(&hybrid),
            Some(PathBuf::from("/sys/fs/cgroup/unified"))
        );
        let blank = "32 30 0:27 / /mnt/with\\040blank rw - cgroup2 none rw\n";
        assert_eq!(cgroup2_in(blank), Some(PathBuf::from("/mnt/with blank")));
        assert_eq!(cgroup2_in(v1), None);
    }

    #[test]
    fn in_a_container_it_is_the_nodes_and_not_the_containers_own() {
        // With a cgroup namespace of its own, as on nodes with cgroup v2.
        let namespaced = "90 80 0:27 / /sys/fs/cgroup ro - cgroup2 cgroup rw\n\
                          95 80 0:27 /../../../.. /host/sys/fs/cgroup ro - cgroup2 cgroup2 rw\n";
        // Without, as on nodes with cgroup v1.
        let plain = "90 80 0:27 /kubepods/pod1/c1 /sys/fs/cgroup/unified ro - cgroup2 cgroup rw\n\
                     95 80 0:27 / /host/sys/fs/cgroup ro - cgroup2 cgroup2 rw\n";
        for mounts in [namespaced, plain] {
            let reversed: String = mounts
                .lines()
                .rev()
                .map(|line| format!("{line}\n"))
                .collect();
            for mounts in [mounts, &reversed] {
                assert_eq!(
                    cgroup2_in(mounts),
                    Some(PathBuf::from("/host/sys/fs/cgroup"))
                );
            }
        }
    }
}

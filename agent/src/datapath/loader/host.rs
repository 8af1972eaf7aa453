//! The one program on the cgroup v2 root, which tells probes by their sockets.
//!
//! Called through [`Loader`]. One per bpf directory; another agent's is never touched.

use std::{fs, os::fd::AsFd, path::PathBuf};

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

/// The first cgroup v2 mount: its root holds every process, on hosts with cgroup v1 as well.
fn cgroup2_root() -> Result<PathBuf, LoaderError> {
    let mounts = fs::read_to_string("/proc/self/mounts").map_err(|source| LoaderError::Io {
        doing: "reading /proc/self/mounts",
        source,
    })?;
    cgroup2_in(&mounts).ok_or(LoaderError::NoCgroup2)
}

fn cgroup2_in(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let (_device, path, kind) = (fields.next()?, fields.next()?, fields.next()?);
        // The kernel writes blanks in paths as octal.
        (kind == "cgroup2").then(|| PathBuf::from(path.replace("\\040", " ")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroup2_is_found_wherever_it_is_mounted() {
        let hybrid = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\n\
                      cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n\
                      cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(
            cgroup2_in(hybrid),
            Some(PathBuf::from("/sys/fs/cgroup/unified"))
        );
        let blank = "none /mnt/with\\040blank cgroup2 rw 0 0\n";
        assert_eq!(cgroup2_in(blank), Some(PathBuf::from("/mnt/with blank")));
        assert_eq!(
            cgroup2_in("cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n"),
            None
        );
    }
}

//! A file system for pins, where the node has none. Most systems mount it themselves; in a container
//! only a privileged one may, so it is done apart from the agent, before it starts.

use std::path::{Path, PathBuf};

use nix::{
    errno::Errno,
    mount::{MsFlags, mount},
    sys::statfs,
};

#[derive(Debug, thiserror::Error)]
pub enum BpffsError {
    #[error("{path} cannot be looked at: {source}; name a directory, such as /sys/fs/bpf")]
    Missing { path: PathBuf, source: Errno },
    #[error("a bpffs cannot be mounted at {path}: {source}; that takes a privileged container")]
    Mount { path: PathBuf, source: Errno },
}

/// Mounts one at `path`, for root alone as systemd does. False: there is one.
pub fn mount_bpffs(path: &Path) -> Result<bool, BpffsError> {
    let found = statfs::statfs(path).map_err(|source| BpffsError::Missing {
        path: path.into(),
        source,
    })?;
    if found.filesystem_type() == statfs::BPF_FS_MAGIC {
        return Ok(false);
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("bpf"), path, Some("bpf"), flags, Some("mode=0700")).map_err(|source| {
        BpffsError::Mount {
            path: path.into(),
            source,
        }
    })?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use std::io::{self, Write};

    use nix::sched::{CloneFlags, unshare};

    use super::*;

    /// In a mount namespace of the thread's own: nothing of it is left.
    #[test]
    fn it_is_mounted_once_and_what_is_there_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().to_owned();
        let name = std::thread::current().name().unwrap_or("?").to_owned();
        std::thread::spawn(move || {
            if let Err(error) = unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS) {
                // `cargo xtask test` counts this line as a skip.
                let why = format!("no mount namespace of its own ({error}); run it as root");
                let line = format!("\nskipped inside: {name}: {why}\n");
                io::stdout().write_all(line.as_bytes()).unwrap();
                return;
            }
            let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
            mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
            assert!(mount_bpffs(&at).unwrap());
            std::fs::create_dir(at.join("pins")).unwrap();
            assert!(!mount_bpffs(&at).unwrap());
            assert!(at.join("pins").is_dir(), "another was mounted over it");
        })
        .join()
        .unwrap();
        assert!(!dir.path().join("pins").exists());

        let missing = mount_bpffs(&dir.path().join("missing")).unwrap_err();
        assert!(missing.to_string().contains("name a directory"));
    }
}

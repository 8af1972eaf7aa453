//! The agent's own directory and the lock in it: one agent per run directory.
//!
//! The lock is the kernel's (flock), so that a killed agent leaves none behind. The file stays; it
//! names the process that holds it, for the message that the second agent prints.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    unistd::geteuid,
};
use thiserror::Error;

use crate::admin;

const LOCK: &str = "agent.lock";

#[derive(Debug, Error)]
pub enum RunDirError {
    #[error("--run-dir {path} cannot be used: {problem}")]
    Unusable { path: PathBuf, problem: String },
    #[error(
        "an agent (process {holder}) runs with --run-dir {path} already; stop it, or give this one \
         directories of its own"
    )]
    Taken { path: PathBuf, holder: String },
}

/// Held for as long as the agent runs.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    _lock: Flock<File>,
}

impl RunDir {
    /// Makes the directory (0700) if it is not there. One that others could write to is refused:
    /// they could put a socket or the marks of this boot in our place.
    pub fn open(path: &Path) -> Result<Self, RunDirError> {
        let unusable = |problem: String| RunDirError::Unusable {
            path: path.into(),
            problem,
        };
        let failed = |error: io::Error| unusable(error.to_string());
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .map_err(failed)?;
        let found = fs::symlink_metadata(path).map_err(failed)?;
        if !found.is_dir() {
            return Err(unusable("it is no directory; name another".into()));
        }
        let own = geteuid().as_raw();
        if found.uid() != own {
            let uid = found.uid();
            let problem = format!("it belongs to uid {uid}, not to {own}; chown it");
            return Err(unusable(problem));
        }
        if found.mode() & 0o022 != 0 {
            let problem = format!(
                "others may write to it (mode {:o}); run: chmod go-w {}",
                found.mode() & 0o7777,
                path.display()
            );
            return Err(unusable(problem));
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path.join(LOCK))
            .map_err(failed)?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(mut lock) => {
                sign(&mut lock).map_err(failed)?;
                Ok(Self {
                    path: path.into(),
                    _lock: lock,
                })
            }
            Err((mut file, Errno::EWOULDBLOCK)) => {
                let mut holder = String::new();
                // Only for the message.
                let _ = file.read_to_string(&mut holder);
                let holder = match holder.trim() {
                    "" => "unknown".into(),
                    holder => holder.to_owned(),
                };
                Err(RunDirError::Taken {
                    path: path.into(),
                    holder,
                })
            }
            Err((_, errno)) => Err(unusable(format!("its lock: {}", errno.desc()))),
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes what agents leave here, and the directory if nothing else is in it.
    pub fn remove(self) -> io::Result<()> {
        for name in [admin::socket::NAME, LOCK] {
            match fs::remove_file(self.path.join(name)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                Ok(()) | Err(_) => {}
            }
        }
        match fs::remove_dir(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::DirectoryNotEmpty => Err(error),
            Ok(()) | Err(_) => Ok(()),
        }
    }
}

fn sign(lock: &mut Flock<File>) -> io::Result<()> {
    lock.set_len(0)?;
    lock.rewind()?;
    writeln!(lock, "{}", std::process::id())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_second_agent_is_refused_with_the_first_ones_process() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run");
        let first = RunDir::open(&path).unwrap();
        let error = RunDir::open(&path).unwrap_err().to_string();
        let process = format!("(process {})", std::process::id());
        assert!(error.contains(&process), "{error}");
        drop(first);
        RunDir::open(&path).unwrap();
    }

    #[test]
    fn the_directory_is_made_for_its_owner_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b");
        let _held = RunDir::open(&path).unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
    }

    #[test]
    fn removing_leaves_only_what_is_not_ours() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run");
        RunDir::open(&path).unwrap().remove().unwrap();
        assert!(!path.exists());
        let held = RunDir::open(&path).unwrap();
        fs::write(path.join("precious"), "").unwrap();
        held.remove().unwrap();
        let left: Vec<_> = fs::read_dir(&path).unwrap().collect();
        assert_eq!(left.len(), 1);
    }

    #[test]
    fn a_directory_that_others_may_write_to_is_refused_with_the_remedy() {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o770)).unwrap();
        let error = RunDir::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("chmod go-w"), "{error}");
    }
}

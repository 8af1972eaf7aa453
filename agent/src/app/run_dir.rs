//! The agent's own directory and the lock in it: one agent per run directory.
//!
//! The lock is the kernel's (flock), so that a killed agent leaves none behind. The file stays; it
//! names the process that holds it, for the message that the second agent prints. The lock belongs
//! to the open file, not to the process: a copy of the file that a successor is given is the same
//! lock, free when the last copy is closed.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Read, Seek, Write},
    os::{
        fd::OwnedFd,
        unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
};

use nix::unistd::geteuid;
use thiserror::Error;

use super::sockets::kept;
use crate::{admin, cni, handover, snapshot};

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
    lock: File,
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
        let mut lock = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path.join(LOCK))
            .map_err(failed)?;
        match lock.try_lock() {
            Ok(()) => {
                sign(&lock).map_err(failed)?;
                let path = path.into();
                Ok(Self { path, lock })
            }
            Err(TryLockError::WouldBlock) => {
                let mut holder = String::new();
                // Only for the message.
                let _ = lock.read_to_string(&mut holder);
                let holder = match holder.trim() {
                    "" => "unknown".into(),
                    holder => holder.to_owned(),
                };
                Err(RunDirError::Taken {
                    path: path.into(),
                    holder,
                })
            }
            Err(TryLockError::Error(error)) => Err(unusable(format!("its lock: {error}"))),
        }
    }

    /// With the lock that the agent before was holding and gave away.
    pub(super) fn inherit(path: &Path, lock: OwnedFd) -> Result<Self, RunDirError> {
        let lock = File::from(lock);
        let there = fs::symlink_metadata(path.join(LOCK));
        let same = match (lock.metadata(), there) {
            (Ok(given), Ok(there)) => (given.dev(), given.ino()) == (there.dev(), there.ino()),
            (Ok(_) | Err(_), Ok(_) | Err(_)) => false,
        };
        if same && lock.try_lock().is_ok() {
            let path = path.into();
            return Ok(Self { path, lock });
        }
        Err(RunDirError::Unusable {
            path: path.into(),
            problem: "the lock that the agent before gave away is not this directory's; end that \
                      agent first"
                .into(),
        })
    }

    /// A copy of the lock, for a successor.
    pub(super) fn lock(&self) -> io::Result<OwnedFd> {
        Ok(self.lock.try_clone()?.into())
    }

    /// From now on it is this process that is named.
    pub(super) fn sign(&self) -> io::Result<()> {
        sign(&self.lock)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes what agents leave here, and the directory if nothing else is in it.
    pub fn remove(self) -> io::Result<()> {
        for name in [
            admin::socket::NAME,
            handover::NAME,
            cni::SOCKET,
            snapshot::STATE,
            snapshot::KEYS,
            LOCK,
        ] {
            // What an agent that was killed had not moved to its place yet.
            let _absent = fs::remove_file(self.path.join(format!("{name}.new")));
            let _absent = fs::remove_file(kept(&self.path.join(name)));
            match fs::remove_file(self.path.join(name)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                Ok(()) | Err(_) => {}
            }
        }
        match fs::remove_dir(&self.path) {
            Err(error) if !stays(&error) => Err(error),
            Ok(()) | Err(_) => Ok(()),
        }
    }
}

/// Something else is in the directory, or it is the node's and mounted into our container.
fn stays(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::ResourceBusy
    )
}

fn sign(mut lock: &File) -> io::Result<()> {
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
    fn a_lock_that_was_given_away_is_held_until_both_are_done_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let first = RunDir::open(dir.path()).unwrap();
        let next = RunDir::inherit(dir.path(), first.lock().unwrap()).unwrap();
        drop(first);
        assert!(matches!(
            RunDir::open(dir.path()),
            Err(RunDirError::Taken { .. })
        ));
        drop(next);
        RunDir::open(dir.path()).unwrap();
    }

    #[test]
    fn another_directorys_lock_is_not_inherited() {
        let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let held = RunDir::open(dir.path()).unwrap();
        let foreign = RunDir::open(other.path()).unwrap().lock().unwrap();
        let error = RunDir::inherit(dir.path(), foreign).unwrap_err();
        assert!(
            error.to_string().contains("not this directory's"),
            "{error}"
        );
        drop(held);
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
    fn a_directory_that_is_mounted_here_stays_and_is_no_failure() {
        assert!(stays(&rustix::io::Errno::BUSY.into()));
        assert!(!stays(&rustix::io::Errno::ACCESS.into()));
    }

    #[test]
    fn a_directory_that_others_may_write_to_is_refused_with_the_remedy() {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o770)).unwrap();
        let error = RunDir::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("chmod go-w"), "{error}");
    }
}

//! The bpf directory's lock: one agent per bpf directory, whatever its run directory is. Two would
//! undo each other's pins and programs, each of them repairing.
//!
//! bpffs has no files to write to, but its directories can be opened and locked (flock). As in
//! [`super::run_dir`] the lock belongs to the open file: a successor is given a copy of it on
//! purpose, and a killed agent leaves none behind.

use std::{
    fs::{self, File, TryLockError},
    io,
    os::{fd::OwnedFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use thiserror::Error;

use crate::datapath;

/// An agent that was killed lets go of its two locks one after the other.
const DYING: Duration = Duration::from_millis(500);
/// Of a command line, in a message.
const MAX_COMMAND: usize = 300;

#[derive(Debug, Error)]
pub enum BpfDirError {
    #[error("--bpf-dir {path} cannot be used: {problem}")]
    Unusable { path: PathBuf, problem: String },
    #[error(
        "--bpf-dir {path} is another agent's ({holder}), whose --run-dir is not {run_dir}: give \
         this agent a --bpf-dir of its own, or that one's --run-dir to succeed it"
    )]
    Taken {
        path: PathBuf,
        run_dir: PathBuf,
        holder: String,
    },
}

/// Held for as long as the agent runs.
#[derive(Debug)]
pub struct BpfDir {
    lock: File,
}

impl BpfDir {
    /// For whoever holds `run_dir`. Makes the directory if it is not there.
    pub fn open(path: &Path, run_dir: &Path) -> Result<Self, BpfDirError> {
        datapath::make_bpf_dir(path).map_err(|error| unusable(path, format!("{error:#}")))?;
        Self::hold(path, run_dir)
    }

    fn hold(path: &Path, run_dir: &Path) -> Result<Self, BpfDirError> {
        let failed = |error: io::Error| unusable(path, error.to_string());
        let lock = File::open(path).map_err(failed)?;
        let begun = Instant::now();
        loop {
            match lock.try_lock() {
                Ok(()) if is_at(&lock, path) => return Ok(Self { lock }),
                // `cleanup` removed it meanwhile.
                Ok(()) => return Err(unusable(path, "it was just removed; try again".into())),
                Err(TryLockError::WouldBlock) if begun.elapsed() < DYING => {
                    thread::sleep(Duration::from_millis(20));
                }
                Err(TryLockError::WouldBlock) => {
                    return Err(BpfDirError::Taken {
                        path: path.into(),
                        run_dir: run_dir.into(),
                        holder: holder(&lock),
                    });
                }
                Err(TryLockError::Error(error)) => return Err(failed(error)),
            }
        }
    }

    /// With the lock that the agent before was holding and gave away.
    pub(super) fn inherit(path: &Path, lock: OwnedFd) -> Result<Self, BpfDirError> {
        let lock = File::from(lock);
        if is_at(&lock, path) && lock.try_lock().is_ok() {
            return Ok(Self { lock });
        }
        let problem = "the agent before, of the same --run-dir, has another one; name that, or end \
                       that agent first";
        Err(unusable(path, problem.into()))
    }

    /// A copy of the lock, for a successor.
    pub(super) fn lock(&self) -> io::Result<OwnedFd> {
        Ok(self.lock.try_clone()?.into())
    }
}

fn unusable(path: &Path, problem: String) -> BpfDirError {
    BpfDirError::Unusable {
        path: path.into(),
        problem,
    }
}

/// Is what was opened still what is found under this path?
fn is_at(opened: &File, path: &Path) -> bool {
    match (opened.metadata(), fs::metadata(path)) {
        (Ok(opened), Ok(there)) => (opened.dev(), opened.ino()) == (there.dev(), there.ino()),
        (Ok(_) | Err(_), Ok(_) | Err(_)) => false,
    }
}

/// Who else has the directory open, for the message: nothing can be written down in a bpffs.
fn holder(lock: &File) -> String {
    let found = || -> io::Result<Option<String>> {
        let wanted = lock.metadata()?;
        for process in fs::read_dir("/proc")?.flatten() {
            let name = process.file_name();
            let Some(id) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else {
                continue;
            };
            // It may have ended, or be another's.
            let Ok(files) = fs::read_dir(process.path().join("fd")) else {
                continue;
            };
            let has_it = files.flatten().any(|file| {
                let file = fs::metadata(file.path());
                file.is_ok_and(|file| (file.dev(), file.ino()) == (wanted.dev(), wanted.ino()))
            });
            if has_it && id != std::process::id() {
                let command = fs::read(process.path().join("cmdline")).unwrap_or_default();
                let command = String::from_utf8_lossy(&command).replace('\0', " ");
                let command: String = command.trim().chars().take(MAX_COMMAND).collect();
                return Ok(Some(format!("process {id}: {command}")));
            }
        }
        Ok(None)
    };
    match found() {
        Ok(Some(holder)) => holder,
        Ok(None) | Err(_) => "process unknown".into(),
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_second_agent_of_another_run_directory_is_refused_with_both_flags_and_the_holder() {
        let dir = tempfile::tempdir().unwrap();
        // Another process, as in life: it inherits what stands on its standard input.
        let first = BpfDir::hold(dir.path(), Path::new("/run/first")).unwrap();
        let mut holder = Command::new("sleep")
            .arg("60")
            .stdin(Stdio::from(first.lock().unwrap()))
            .spawn()
            .unwrap();
        drop(first);
        let error = BpfDir::hold(dir.path(), Path::new("/run/second")).unwrap_err();
        let process = format!("process {}: sleep 60", holder.id());
        holder.kill().unwrap();
        holder.wait().unwrap();
        let error = error.to_string();
        for word in ["--bpf-dir", "--run-dir", "/run/second", &process] {
            assert!(error.contains(word), "{word}: {error}");
        }
        // A killed one leaves nothing behind.
        BpfDir::hold(dir.path(), Path::new("/run/second")).unwrap();
    }

    #[test]
    fn a_lock_that_was_given_away_is_held_until_both_are_done_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let run_dir = Path::new("/run/first");
        let first = BpfDir::hold(dir.path(), run_dir).unwrap();
        let next = BpfDir::inherit(dir.path(), first.lock().unwrap()).unwrap();
        drop(first);
        assert!(matches!(
            BpfDir::hold(dir.path(), run_dir),
            Err(BpfDirError::Taken { .. })
        ));
        drop(next);
        BpfDir::hold(dir.path(), run_dir).unwrap();
    }

    #[test]
    fn another_directorys_lock_is_not_inherited() {
        let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let foreign = BpfDir::hold(other.path(), Path::new("/run/first")).unwrap();
        let error = BpfDir::inherit(dir.path(), foreign.lock().unwrap()).unwrap_err();
        assert!(error.to_string().contains("--run-dir"), "{error}");
    }

    #[test]
    fn a_directory_that_is_on_no_bpffs_is_refused_with_the_remedy() {
        let dir = tempfile::tempdir().unwrap();
        let error = BpfDir::open(dir.path(), Path::new("/run/first")).unwrap_err();
        assert!(error.to_string().contains("mount -t bpf"), "{error}");
    }
}

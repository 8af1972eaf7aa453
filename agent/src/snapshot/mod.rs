//! What lets a restarted agent serve before its sources answer: two files in the run directory.
//!
//! `state.snapshot` holds the manifests as they were when last good, `keys.snapshot` the keys and
//! certificates. Keys are written only where a file is memory ([`is_memory`]): on a disk they would
//! outlive the boot. `app` writes them soon after a change and reads them at start; the sources,
//! once there, win. This room knows files and what is in them, not what becomes of it.
//!
//! **Never trusted for being there.** A snapshot counts if it was written whole, by this version of
//! the format, in this boot, for this node, trust domain and authority ([`open`] is pure and checks
//! all of it); its files must be ours alone. Anything else is ignored with one line, and the agent
//! starts as it would without.
#![forbid(unsafe_code)]

mod content;
mod sealed;

use std::{
    fs::{self, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use nix::{
    fcntl::OFlag,
    sys::statfs::{TMPFS_MAGIC, statfs},
    unistd::geteuid,
};
use thiserror::Error;

pub use content::{Der, HeldKey, Keys, State};
pub use sealed::{Origin, Unusable, open, seal};

/// File names in the run directory.
pub const STATE: &str = "state.snapshot";
pub const KEYS: &str = "keys.snapshot";

/// No snapshot is longer, and no longer one is read.
pub const MAX_BYTES: usize = 64 * 1024 * 1024;

#[derive(Debug, Error)]
pub enum SnapshotError {
    #[error("{path}: {source}")]
    File { path: PathBuf, source: io::Error },
    #[error("{path} has mode {mode:o} and owner {owner}; only 600 and our own count")]
    NotOurs {
        path: PathBuf,
        mode: u32,
        owner: u32,
    },
    #[error("{path}: {why}")]
    Unusable { path: PathBuf, why: Unusable },
    #[error("{path} would have {bytes} bytes, more than {MAX_BYTES}; nothing is kept")]
    TooLong { path: PathBuf, bytes: usize },
}

/// Does what is written to `dir` go with the boot?
pub fn is_memory(dir: &Path) -> bool {
    statfs(dir).is_ok_and(|found| found.filesystem_type() == TMPFS_MAGIC)
}

/// In one step: whoever reads sees the last one or this one, whole.
pub fn write(dir: &Path, name: &str, origin: &Origin, body: &[u8]) -> Result<(), SnapshotError> {
    let path = dir.join(name);
    let sealed = seal(origin, body);
    if sealed.len() > MAX_BYTES {
        let bytes = sealed.len();
        return Err(SnapshotError::TooLong { path, bytes });
    }
    let new = dir.join(format!("{name}.new"));
    let written = (|| {
        match fs::remove_file(&new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&new)?;
        file.write_all(&sealed)?;
        fs::rename(&new, &path)
    })();
    written.map_err(|source| SnapshotError::File { path, source })
}

/// `None`: there is none. An error: there is one, and it does not count.
pub fn read(dir: &Path, name: &str, origin: &Origin) -> Result<Option<Vec<u8>>, SnapshotError> {
    let path = dir.join(name);
    let failed = |source| SnapshotError::File {
        path: path.clone(),
        source,
    };
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags((OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits())
        .open(&path);
    let file = match opened {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(failed)?,
    };
    let found = file.metadata().map_err(failed)?;
    let (mode, owner) = (found.mode() & 0o7777, found.uid());
    if !found.is_file() || mode != 0o600 || owner != geteuid().as_raw() {
        return Err(SnapshotError::NotOurs { path, mode, owner });
    }
    let mut bytes = Vec::new();
    file.take(MAX_BYTES as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    match open(&bytes, origin) {
        Ok(body) => Ok(Some(body.to_vec())),
        Err(why) => Err(SnapshotError::Unusable { path, why }),
    }
}

/// If it is there.
pub fn remove(dir: &Path, name: &str) {
    if let Err(error) = fs::remove_file(dir.join(name))
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(name, %error, "a snapshot that counts no more cannot be removed");
    }
}

#[cfg(test)]
mod tests;

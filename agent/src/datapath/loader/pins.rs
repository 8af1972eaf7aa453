//! Files and directories of bpffs: pins, and what they hold.
//!
//! Used by the rest of the loader. Everything here is idempotent: what should be gone may be gone
//! already, what should be there may be there.

use std::{
    fs, io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::{DirBuilderExt, PermissionsExt},
    },
    path::Path,
};

use aya::{
    pin::PinError,
    programs::links::{FdLink, LinkError, PinnedLink},
};
use picomesh_common::config::program;

use super::{LoaderError, sys};

/// Program that the link pinned at `pin` runs; `None` if nothing is pinned there.
pub(super) fn pinned_program(pin: &Path) -> Result<Option<u32>, LoaderError> {
    match PinnedLink::from_pin(pin) {
        Ok(link) => Ok(Some(FdLink::from(link).info()?.program_id())),
        Err(LinkError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => {
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}

/// Puts `program` behind the link that is pinned at `pin`, if that link is the one at the hook
/// which runs the programs `attached`. A pin of anything else (its device or namespace is gone, or
/// the slot had another pod) is removed, and the answer is no.
pub(super) fn replace(
    pin: &Path,
    program: BorrowedFd<'_>,
    attached: &[u32],
) -> Result<bool, LoaderError> {
    let Some(old) = pinned_program(pin)? else {
        return Ok(false);
    };
    let failed = |source| LoaderError::Replace {
        pin: pin.to_owned(),
        source,
    };
    if attached.contains(&old) {
        let link = sys::open_pin(pin).map_err(failed)?;
        match sys::update_link(link.as_fd(), program) {
            Ok(()) => return Ok(true),
            // Went away between the two questions.
            Err(error) if error.raw_os_error() == Some(nix::libc::ENOLINK) => {}
            Err(error) => return Err(failed(error)),
        }
    }
    take_off(pin)?;
    Ok(false)
}

/// Detaches and unpins a link, if it is pinned.
pub(super) fn take_off(pin: &Path) -> Result<(), LoaderError> {
    match sys::open_pin(pin) {
        Ok(link) => {
            // What it was attached to may be gone, and then it is detached already.
            let _ = sys::detach_link(link.as_fd());
            remove(pin)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(LoaderError::PinFile {
            pin: pin.to_owned(),
            source,
        }),
    }
}

/// Pins by `pin`, in the place of whatever is at `path`.
pub(super) fn repin(
    path: &Path,
    pin: impl FnOnce(&Path) -> Result<(), PinError>,
) -> Result<(), LoaderError> {
    remove(path)?;
    Ok(pin(path)?)
}

/// A missing directory has no entries.
pub(super) fn entries(dir: &Path) -> Result<Vec<String>, LoaderError> {
    let failed = |source| LoaderError::PinFile {
        pin: dir.to_owned(),
        source,
    };
    match fs::read_dir(dir) {
        Ok(entries) => entries
            .map(|entry| {
                Ok(entry
                    .map_err(failed)?
                    .file_name()
                    .to_string_lossy()
                    .into_owned())
            })
            .collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(failed(error)),
    }
}

/// Does a pin of this name in a pod's directory hold a link?
pub(super) fn is_link(name: &str) -> bool {
    ["egress-", "ingress-", program::STEER]
        .iter()
        .any(|prefix| name.starts_with(prefix))
}

/// Removes a pin or an empty directory, if it is there.
pub(super) fn remove(path: &Path) -> Result<(), LoaderError> {
    let result = match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match result {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(LoaderError::PinFile {
            pin: path.to_owned(),
            source: error,
        }),
        Ok(()) | Err(_) => Ok(()),
    }
}

pub(super) fn remove_tree(dir: &Path) -> Result<(), LoaderError> {
    for name in entries(dir)? {
        let path = dir.join(name);
        if path.is_dir() {
            remove_tree(&path)?
        } else {
            remove(&path)?
        }
    }
    remove(dir)
}

/// Makes a directory for its owner alone; one that others may write is refused, because whoever
/// can put a pin there decides what runs.
pub(in crate::datapath) fn make_dir(dir: &Path) -> Result<(), LoaderError> {
    let problem = |problem: String| LoaderError::Directory {
        path: dir.to_owned(),
        problem,
    };
    match fs::DirBuilder::new().mode(0o700).create(dir) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            let meta = fs::metadata(dir).map_err(|error| problem(error.to_string()))?;
            if meta.permissions().mode() & 0o022 != 0 {
                return Err(problem(format!(
                    "mode {:o} lets others write: chmod go-w it or choose another --bpf-dir",
                    meta.permissions().mode() & 0o7777
                )));
            }
            Ok(())
        }
        Err(error) => Err(problem(format!(
            "{error}; it must be below a mounted bpffs (`mount -t bpf bpf /sys/fs/bpf`)"
        ))),
    }
}

#[cfg(test)]
mod tests {

    use super::*;

    #[test]
    fn a_directory_that_others_may_write_is_refused() {
        let outer = tempfile::tempdir().unwrap();
        let dir = outer.path().join("pins");
        make_dir(&dir).unwrap();
        make_dir(&dir).unwrap();
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o770)).unwrap();
        let error = make_dir(&dir).unwrap_err().to_string();
        assert!(
            error.contains("770") && error.contains("--bpf-dir"),
            "{error}"
        );
    }

    #[test]
    fn removing_what_is_gone_is_no_error() {
        let outer = tempfile::tempdir().unwrap();
        remove_tree(&outer.path().join("never")).unwrap();
        fs::create_dir_all(outer.path().join("a/b")).unwrap();
        remove_tree(&outer.path().join("a")).unwrap();
        assert!(!outer.path().join("a").exists());
    }
}

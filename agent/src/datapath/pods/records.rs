//! What must be known again after `kill -9`: the marks of this boot, and which namespace has which
//! slot. Both lie in the run directory and are written in one step (rename).
//!
//! A record is a hint, never the truth: it is used only if the boot is the same and the path still
//! leads to the namespace with the recorded cookie. Records of another boot are thrown away with
//! their marks; the pins they speak of went with that boot too.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use nix::{libc, sys::statfs};
use picomesh_common::config::MARK_MASK;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

#[derive(Debug, thiserror::Error)]
pub(super) enum RecordsError {
    #[error("run directory {path}: {problem}")]
    RunDir { path: PathBuf, problem: String },
    #[error("bpf directory {path} is not on a bpffs; mount one with: mount -t bpf bpf /sys/fs/bpf")]
    NoBpffs { path: PathBuf },
    #[error("{path} cannot be {done}: {source}")]
    File {
        path: PathBuf,
        done: &'static str,
        source: io::Error,
    },
}

/// Marks of packets; random per boot, so that a pod cannot know them from another machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Marks {
    /// Of the proxy's own sockets.
    pub(super) ours: u32,
    /// Of captured packets on their way to mesh0.
    pub(super) capture: u32,
}

/// One enrolled pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) uid: String,
    pub(super) name: String,
    pub(super) slot: u32,
    pub(super) netns: PathBuf,
    pub(super) cookie: u64,
}

/// A file of the run directory, good for one boot.
#[derive(Serialize, Deserialize)]
struct OfThisBoot<T> {
    boot: String,
    content: T,
}

/// The run directory, checked.
pub(super) struct RunDir {
    dir: PathBuf,
    boot: String,
}

impl RunDir {
    /// Makes the directory (0700) if it is not there; refuses one that others may write to.
    pub(super) fn open(dir: &Path) -> Result<Self, RecordsError> {
        let refuse = |problem: String| RecordsError::RunDir {
            path: dir.into(),
            problem,
        };
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(|source| refuse(format!("cannot be made: {source}")))?;
        let metadata = fs::symlink_metadata(dir)
            .map_err(|source| refuse(format!("cannot be read: {source}")))?;
        if !metadata.is_dir() {
            return Err(refuse("is not a directory; name one with --run-dir".into()));
        }
        let euid = nix::unistd::geteuid().as_raw();
        if metadata.uid() != euid {
            return Err(refuse(format!(
                "belongs to uid {}, not to the agent's {euid}; give it away with chown",
                metadata.uid()
            )));
        }
        if metadata.mode() & 0o022 != 0 {
            return Err(refuse(format!(
                "is writable by group or others (mode {:o}); run: chmod go-w {}",
                metadata.mode() & 0o7777,
                dir.display()
            )));
        }
        let boot_id = Path::new("/proc/sys/kernel/random/boot_id");
        let boot = fs::read_to_string(boot_id).map_err(|source| RecordsError::File {
            path: boot_id.into(),
            done: "read",
            source,
        })?;
        Ok(Self {
            dir: dir.into(),
            boot: boot.trim().into(),
        })
    }

    /// The marks of this boot; drawn if there are none yet.
    pub(super) fn marks(&self) -> Result<Marks, RecordsError> {
        if let Some(marks) = self.read::<Marks>(MARKS)?
            && is_usable(marks)
        {
            return Ok(marks);
        }
        let marks = draw(|| fastrand::u32(..));
        self.write(MARKS, &marks)?;
        Ok(marks)
    }

    /// The pods that the last agent of this boot had enrolled.
    pub(super) fn records(&self) -> Result<Vec<Record>, RecordsError> {
        Ok(self.read(PODS)?.unwrap_or_default())
    }

    pub(super) fn save(&self, records: &[Record]) -> Result<(), RecordsError> {
        self.write(PODS, &records)
    }

    pub(super) fn forget(&self) -> Result<(), RecordsError> {
        for name in [PODS, MARKS] {
            let path = self.dir.join(name);
            match fs::remove_file(&path) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    return Err(RecordsError::File {
                        path,
                        done: "removed",
                        source,
                    });
                }
                Ok(()) | Err(_) => {}
            }
        }
        Ok(())
    }

    fn read<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, RecordsError> {
        let path = self.dir.join(name);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => {
                return Err(RecordsError::File {
                    path,
                    done: "read",
                    source,
                });
            }
        };
        match serde_json::from_slice::<OfThisBoot<T>>(&text) {
            Ok(file) if file.boot == self.boot => Ok(Some(file.content)),
            Ok(_of_another_boot) => Ok(None),
            Err(error) => {
                // Written by rename, so this is no torn write: of another version, or by hand.
                tracing::warn!(path = %path.display(), %error, "unreadable, starting afresh");
                Ok(None)
            }
        }
    }

    fn write<T: Serialize>(&self, name: &str, content: &T) -> Result<(), RecordsError> {
        let path = self.dir.join(name);
        let failed = |source| RecordsError::File {
            path: path.clone(),
            done: "written",
            source,
        };
        let text = serde_json::to_vec(&OfThisBoot {
            boot: self.boot.clone(),
            content,
        })
        .map_err(|error| failed(error.into()))?;
        let new = self.dir.join(format!("{name}.new"));
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&new)
            .map_err(failed)?;
        file.write_all(&text).map_err(failed)?;
        drop(file);
        fs::rename(&new, &path).map_err(failed)
    }
}

const MARKS: &str = "marks";
const PODS: &str = "pods.json";

/// Refuses a bpf directory that is not (going to be) on a bpffs: pins elsewhere fail one by one
/// with errors nobody understands.
pub(super) fn check_bpffs(bpf_dir: &Path) -> Result<(), RecordsError> {
    let there = bpf_dir
        .ancestors()
        .find(|dir| dir.is_dir())
        .unwrap_or(Path::new("/"));
    let is_bpffs =
        statfs::statfs(there).is_ok_and(|fs| fs.filesystem_type() == statfs::BPF_FS_MAGIC);
    if is_bpffs {
        Ok(())
    } else {
        Err(RecordsError::NoBpffs {
            path: bpf_dir.into(),
        })
    }
}

fn draw(mut random: impl FnMut() -> u32) -> Marks {
    loop {
        let marks = Marks {
            ours: random() & MARK_MASK,
            capture: random() & MARK_MASK,
        };
        if is_usable(marks) {
            return marks;
        }
    }
}

fn is_usable(marks: Marks) -> bool {
    let alone = |mark: u32| {
        // Istio's ambient mode takes what carries 0x539 in these bits for its own.
        mark != 0 && mark & !MARK_MASK == 0 && mark & 0xfff != 0x539
    };
    marks.ours != marks.capture && alone(marks.ours) && alone(marks.capture)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn marks_are_never_zero_equal_or_anothers() {
        let mut numbers = [
            0,
            5,
            7,
            7,
            0x1539,
            5,
            5,
            0xff00_0000,
            0xff00_0005,
            0xff00_0009,
        ]
        .into_iter();
        let marks = draw(|| numbers.next().unwrap());
        assert_eq!(
            marks,
            Marks {
                ours: 5,
                capture: 9
            }
        );
    }

    #[test]
    fn the_next_agent_of_a_boot_has_the_same_marks_and_records() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run");
        let record = Record {
            uid: "u".into(),
            name: "ns/a".into(),
            slot: 3,
            netns: "/run/netns/a".into(),
            cookie: 77,
        };
        let first = RunDir::open(&path).unwrap();
        let marks = first.marks().unwrap();
        first.save(std::slice::from_ref(&record)).unwrap();

        let next = RunDir::open(&path).unwrap();
        assert_eq!(next.marks().unwrap(), marks);
        assert_eq!(next.records().unwrap(), [record]);
        let mode = fs::metadata(path.join(MARKS)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn another_boot_begins_afresh() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run");
        let mut run = RunDir::open(&path).unwrap();
        run.save(&[]).unwrap();
        let marks = run.marks().unwrap();
        run.boot = "another".into();
        assert_eq!(run.read::<Vec<Record>>(PODS).unwrap(), None);
        assert_ne!(run.marks().unwrap(), marks);
    }

    #[test]
    fn a_directory_that_others_may_write_to_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        for mode in [0o720, 0o702, 0o777] {
            fs::set_permissions(dir.path(), fs::Permissions::from_mode(mode)).unwrap();
            let error = RunDir::open(dir.path()).err().unwrap().to_string();
            assert!(error.contains("chmod go-w"), "{mode:o}: {error}");
        }
    }

    #[test]
    fn a_bpf_directory_elsewhere_names_the_command_to_mount_one() {
        let dir = tempfile::tempdir().unwrap();
        let error = check_bpffs(&dir.path().join("not/yet"))
            .unwrap_err()
            .to_string();
        assert!(error.contains("mount -t bpf"), "{error}");
    }
}

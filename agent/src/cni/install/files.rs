//! Files of the node: found below the agent's view of it, read with bounds, replaced in one step.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown},
    },
    path::{Path, PathBuf},
};

use rustix::fs::{Mode, OFlags, ResolveFlags, open, openat2};

/// What a file that waits for its place ends with: no runtime reads it.
const NEW: &str = ".picomesh-new";

/// A directory of the node, held open: what is done in it happens there, whatever becomes of its
/// path.
#[derive(Debug)]
pub(super) struct Dir {
    file: OwnedFd,
    /// As the node sees it, for messages and to tell one from another.
    pub(super) path: PathBuf,
}

impl Dir {
    /// `path` below `root`; links on the way lead where they lead on the node. `None`: it is not
    /// there.
    pub(super) fn open(root: &Path, path: &Path) -> io::Result<Option<Self>> {
        let root = open(
            root,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        let opened = openat2(
            root,
            path,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
            ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
        );
        match opened {
            Ok(file) => Ok(Some(Self {
                file,
                path: path.to_owned(),
            })),
            Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// A path of ours that leads into it.
    pub(super) fn at(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.file.as_raw_fd()))
    }

    /// Of a file in it, for messages.
    pub(super) fn named(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Is there anything of that name?
    pub(super) fn has(&self, name: &str) -> bool {
        fs::symlink_metadata(self.at().join(name)).is_ok()
    }

    /// Names of what is in it, in order; at most so many.
    pub(super) fn names(&self, most: usize) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(self.at())?.take(most) {
            if let Ok(name) = entry?.file_name().into_string() {
                names.push(name);
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    /// An ordinary file; a link is none, because what replaces it would not be one.
    pub(super) fn read(&self, name: &str, longest: usize) -> io::Result<Text> {
        let file = OpenOptions::new()
            .read(true)
            .custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed())
            .open(self.at().join(name))?;
        let found = file.metadata()?;
        if !found.is_file() {
            return Err(io::Error::other("is no ordinary file; replace it by one"));
        }
        let mut bytes = Vec::new();
        file.take(longest as u64 + 1).read_to_end(&mut bytes)?;
        if bytes.len() > longest {
            return Err(io::Error::other(format!("has more than {longest} bytes")));
        }
        Ok(Text {
            bytes,
            version: version_of(&found),
            mode: found.mode() & 0o7777,
            owner: (found.uid(), found.gid()),
        })
    }

    /// In one step, if the file is still the one that was read (`before`; `None`: there was none).
    /// False: somebody else has changed it meanwhile.
    pub(super) fn replace(
        &self,
        name: &str,
        before: Option<&Text>,
        new: &[u8],
    ) -> io::Result<bool> {
        let (mode, owner) = before.map_or((0o644, None), |text| (text.mode, Some(text.owner)));
        let waiting = self.prepare(name, new, mode, owner)?;
        let place = self.at().join(name);
        let there = fs::symlink_metadata(&place).ok();
        if there.as_ref().map(version_of) != before.map(|text| text.version) {
            fs::remove_file(waiting)?;
            return Ok(false);
        }
        fs::rename(waiting, place)?;
        self.sync()?;
        Ok(true)
    }

    /// In one step, whatever is there.
    pub(super) fn put(&self, name: &str, new: &[u8], mode: u32) -> io::Result<()> {
        let waiting = self.prepare(name, new, mode, None)?;
        fs::rename(waiting, self.at().join(name))?;
        self.sync()
    }

    /// If it is there.
    pub(super) fn remove(&self, name: &str) -> io::Result<bool> {
        match fs::remove_file(self.at().join(name)) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// What an agent that was killed had not moved to its place yet.
    pub(super) fn tidy(&self, name: &str) -> io::Result<()> {
        self.remove(&waiting(name)).map(drop)
    }

    fn prepare(
        &self,
        name: &str,
        new: &[u8],
        mode: u32,
        owner: Option<(u32, u32)>,
    ) -> io::Result<PathBuf> {
        self.tidy(name)?;
        let path = self.at().join(waiting(name));
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)?;
        file.write_all(new)?;
        if let Some((user, group)) = owner {
            let found = file.metadata()?;
            if (found.uid(), found.gid()) != (user, group) {
                or_denied(fchown(&file, Some(user), Some(group)))?;
            }
        }
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        file.sync_all()?;
        Ok(path)
    }

    fn sync(&self) -> io::Result<()> {
        // The open descriptor is for paths alone; this one can be synced.
        File::open(self.at())?.sync_all()
    }
}

/// Without CAP_CHOWN the file becomes ours. Whoever reads it is root, or may by its mode.
fn or_denied(chown: io::Result<()>) -> io::Result<()> {
    match chown {
        Err(error) if error.raw_os_error() == Some(rustix::io::Errno::PERM.raw_os_error()) => {
            Ok(())
        }
        done => done,
    }
}

/// What a file held when it was read.
pub(super) struct Text {
    pub(super) bytes: Vec<u8>,
    version: Version,
    pub(super) mode: u32,
    owner: (u32, u32),
}

/// Changes with every write: inode, length, time of the last change.
type Version = (u64, u64, i64, i64);

fn version_of(found: &fs::Metadata) -> Version {
    let time = (found.ctime(), found.ctime_nsec());
    (found.ino(), found.len(), time.0, time.1)
}

fn waiting(name: &str) -> String {
    format!(".{name}{NEW}")
}

/// Does `word` stand in the file that `path` leads to on the node? Links are followed, as a runtime
/// would; what is no file, or is not there, says nothing.
pub(super) fn mentions(root: &Path, path: &Path, word: &str, longest: usize) -> io::Result<bool> {
    let root = open(
        root,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let opened = openat2(
        root,
        path,
        OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
    );
    let file = match opened {
        Ok(file) => File::from(file),
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => return Ok(false),
        Err(error) => return Err(error.into()),
    };
    if !file.metadata()?.is_file() {
        return Ok(false);
    }
    let mut bytes = Vec::new();
    file.take(longest as u64 + 1).read_to_end(&mut bytes)?;
    let word = word.as_bytes();
    if bytes.windows(word.len()).any(|part| part == word) {
        return Ok(true);
    }
    if bytes.len() > longest {
        return Err(io::Error::other(format!("has more than {longest} bytes")));
    }
    Ok(false)
}

/// A program of ours, to be copied.
pub(super) fn read_program(path: &Path, longest: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?
        .take(longest + 1)
        .read_to_end(&mut bytes)?;
    if bytes.len() as u64 > longest {
        return Err(io::Error::other(format!("has more than {longest} bytes")));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn links_lead_where_they_lead_on_the_node() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("data/1a2b/bin")).unwrap();
        fs::write(root.path().join("data/1a2b/bin/flannel"), "").unwrap();
        symlink("/data/1a2b", root.path().join("data/current")).unwrap();
        let path = Path::new("/data/current/bin");
        let dir = Dir::open(root.path(), path).unwrap().unwrap();
        assert!(dir.has("flannel"));
        assert_eq!(dir.named("x"), Path::new("/data/current/bin/x"));
        let out = Dir::open(root.path(), Path::new("/../../etc"));
        assert!(out.unwrap().is_none(), "nothing outside the root is found");
        assert!(
            Dir::open(root.path(), Path::new("/nowhere"))
                .unwrap()
                .is_none()
        );
    }

    #[test]
    fn a_file_is_replaced_with_its_mode_unless_somebody_was_quicker() {
        let root = tempfile::tempdir().unwrap();
        let dir = Dir::open(root.path(), Path::new("/")).unwrap().unwrap();
        let path = root.path().join("a.conflist");
        fs::write(&path, "one").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        let read = dir.read("a.conflist", 16).unwrap();
        assert!(dir.replace("a.conflist", Some(&read), b"two").unwrap());
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o640);
        // What was read is not what is there any more.
        assert!(!dir.replace("a.conflist", Some(&read), b"three").unwrap());
        assert!(!dir.replace("a.conflist", None, b"three").unwrap());
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(dir.names(10).unwrap(), ["a.conflist"]);
    }

    #[test]
    fn a_file_whose_owner_we_may_not_name_is_written_all_the_same() {
        let failed = |errno: rustix::io::Errno| Err(errno.into());
        or_denied(failed(rustix::io::Errno::PERM)).unwrap();
        or_denied(failed(rustix::io::Errno::ROFS)).unwrap_err();
    }

    #[test]
    fn links_directories_and_long_files_are_not_read() {
        let root = tempfile::tempdir().unwrap();
        let dir = Dir::open(root.path(), Path::new("/")).unwrap().unwrap();
        fs::write(root.path().join("file"), "12345").unwrap();
        symlink("file", root.path().join("link")).unwrap();
        fs::create_dir(root.path().join("dir")).unwrap();
        assert!(dir.read("link", 16).is_err());
        assert!(dir.read("dir", 16).is_err());
        assert!(dir.read("file", 4).is_err());
        assert_eq!(dir.read("file", 5).unwrap().bytes, b"12345");
    }
}

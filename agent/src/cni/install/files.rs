//! Files of the node: found below the agent's view of it, read with bounds, put there in one step.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt},
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

    /// Names of what is in it and is no directory, in order; at most so many are looked at.
    pub(super) fn names(&self, most: usize) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(self.at())?.take(most) {
            let entry = entry?;
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                continue;
            }
            if let Ok(name) = entry.file_name().into_string() {
                names.push(name);
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    /// An ordinary file of ours; a link is none, because what replaces it would not be one.
    pub(super) fn read(&self, name: &str, longest: usize) -> io::Result<Text> {
        let file = OpenOptions::new()
            .read(true)
            .custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed())
            .open(self.at().join(name))?;
        Text::read(file, longest)
    }

    /// In one step, whatever is there.
    pub(super) fn put(&self, name: &str, new: &[u8], mode: u32) -> io::Result<()> {
        let waiting = self.prepare(name, new, mode)?;
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

    fn prepare(&self, name: &str, new: &[u8], mode: u32) -> io::Result<PathBuf> {
        self.tidy(name)?;
        let path = self.at().join(waiting(name));
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)?;
        file.write_all(new)?;
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        file.sync_all()?;
        Ok(path)
    }

    fn sync(&self) -> io::Result<()> {
        // The open descriptor is for paths alone; this one can be synced.
        File::open(self.at())?.sync_all()
    }
}

/// What a file held when it was read.
pub(super) struct Text {
    pub(super) bytes: Vec<u8>,
    pub(super) mode: u32,
}

impl Text {
    fn read(file: File, longest: usize) -> io::Result<Self> {
        let found = file.metadata()?;
        if !found.is_file() {
            return Err(io::Error::other("is no ordinary file; replace it by one"));
        }
        let mut bytes = Vec::new();
        file.take(longest as u64 + 1).read_to_end(&mut bytes)?;
        if bytes.len() > longest {
            return Err(io::Error::other(format!("has more than {longest} bytes")));
        }
        let mode = found.mode() & 0o7777;
        Ok(Self { bytes, mode })
    }
}

fn waiting(name: &str) -> String {
    format!(".{name}{NEW}")
}

/// What `path` leads to on the node. Links are followed, as a runtime would.
pub(super) fn read_as_node(root: &Path, path: &Path, longest: usize) -> io::Result<Text> {
    Text::read(open_as_node(root, path)?, longest)
}

/// Does `word` stand in the file that `path` leads to on the node? What is no file, or is not there,
/// says nothing.
pub(super) fn mentions(root: &Path, path: &Path, word: &str, longest: usize) -> io::Result<bool> {
    let file = match open_as_node(root, path) {
        Ok(file) => file,
        Err(error) => {
            let gone = [io::ErrorKind::NotFound, io::ErrorKind::NotADirectory];
            return if gone.contains(&error.kind()) {
                Ok(false)
            } else {
                Err(error)
            };
        }
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

fn open_as_node(root: &Path, path: &Path) -> io::Result<File> {
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
    Ok(File::from(opened?))
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
    fn what_is_put_there_has_its_mode_and_replaces_what_was() {
        let root = tempfile::tempdir().unwrap();
        let dir = Dir::open(root.path(), Path::new("/")).unwrap().unwrap();
        // Of an agent that was killed over it.
        fs::write(root.path().join(waiting("a.conflist")), "half").unwrap();
        fs::create_dir(root.path().join("b.conflist")).unwrap();
        for (text, mode) in [("one", 0o600), ("two", 0o640)] {
            dir.put("a.conflist", text.as_bytes(), mode).unwrap();
            let read = dir.read("a.conflist", 16).unwrap();
            assert_eq!((&read.bytes[..], read.mode), (text.as_bytes(), mode));
        }
        assert_eq!(dir.names(10).unwrap(), ["a.conflist"]);
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
        // Of somebody else's a link is as good as the file.
        let as_node = |path: &str, most| read_as_node(root.path(), Path::new(path), most);
        assert_eq!(as_node("/link", 5).unwrap().bytes, b"12345");
        assert!(as_node("/link", 4).is_err());
        assert!(as_node("/dir", 16).is_err());
    }
}

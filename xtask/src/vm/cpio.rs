//! An archive in the kernel's "newc" form, which is what it unpacks as its first file system.
//!
//! Written here because it is a page of code, and one program less that a machine must have.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{BufWriter, Write},
    os::unix::fs::PermissionsExt,
    path::Path,
};

use anyhow::{Context, Result};

const DIRECTORY: u32 = 0o040_755;
const SYMLINK: u32 = 0o120_777;
const REGULAR: u32 = 0o100_000;

pub(super) struct Archive<W: Write> {
    out: W,
    /// Bytes written so far: names and contents begin at multiples of four.
    written: u64,
    entries: u32,
    /// Paths that are in it; a directory is written before the first file below it.
    known: BTreeSet<String>,
}

impl Archive<BufWriter<File>> {
    pub(super) fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).with_context(|| format!("create {}", path.display()))?;
        Ok(Self::new(BufWriter::new(file)))
    }
}

impl<W: Write> Archive<W> {
    fn new(out: W) -> Self {
        Self {
            out,
            written: 0,
            entries: 0,
            known: BTreeSet::new(),
        }
    }

    pub(super) fn directory(&mut self, at: &str) -> Result<()> {
        self.parents(at)?;
        if self.known.insert(at.to_owned()) {
            self.entry(at, DIRECTORY, &[])?;
        }
        Ok(())
    }

    pub(super) fn symlink(&mut self, at: &str, to: &str) -> Result<()> {
        self.parents(at)?;
        if self.known.insert(at.to_owned()) {
            self.entry(at, SYMLINK, to.as_bytes())?;
        }
        Ok(())
    }

    /// A file with these bytes; the first one at a path stays.
    pub(super) fn file(&mut self, at: &str, mode: u32, bytes: &[u8]) -> Result<()> {
        self.parents(at)?;
        if self.known.insert(at.to_owned()) {
            self.entry(at, REGULAR | mode, bytes)?;
        }
        Ok(())
    }

    /// A file of this machine, under its own or another path.
    pub(super) fn copy(&mut self, from: &Path, at: &str) -> Result<()> {
        let bytes = fs::read(from).with_context(|| format!("read {}", from.display()))?;
        let mode = fs::metadata(from)?.permissions().mode() & 0o777;
        self.file(at, mode, &bytes)
    }

    pub(super) fn finish(mut self) -> Result<W> {
        self.entry("/TRAILER!!!", 0, &[])?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn parents(&mut self, at: &str) -> Result<()> {
        let ends = at.match_indices('/').map(|(i, _)| i).filter(|i| *i > 0);
        for end in ends {
            let parent = &at[..end];
            if self.known.insert(parent.to_owned()) {
                self.entry(parent, DIRECTORY, &[])?;
            }
        }
        Ok(())
    }

    fn entry(&mut self, at: &str, mode: u32, bytes: &[u8]) -> Result<()> {
        let name = at.trim_start_matches('/');
        self.entries += 1;
        let size = u32::try_from(bytes.len()).with_context(|| format!("{at} is over 4 GiB"))?;
        let links = if mode & DIRECTORY == DIRECTORY { 2 } else { 1 };
        let name_size = name.len() as u32 + 1;
        // inode, mode, uid, gid, links, time, size, device × 2, its device × 2, name, checksum
        let fields = [
            self.entries,
            mode,
            0,
            0,
            links,
            0,
            size,
            0,
            0,
            0,
            0,
            name_size,
            0,
        ];
        self.put(b"070701")?;
        for field in fields {
            self.put(format!("{field:08x}").as_bytes())?;
        }
        self.put(name.as_bytes())?;
        self.put(&[0])?;
        self.align()?;
        self.put(bytes)?;
        self.align()
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.write_all(bytes)?;
        self.written += bytes.len() as u64;
        Ok(())
    }

    fn align(&mut self) -> Result<()> {
        let missing = (4 - self.written % 4) % 4;
        self.put(&[0; 3][..missing as usize])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_come_once_and_before_what_is_in_them() {
        let archive = made();
        let text = String::from_utf8_lossy(&archive);
        let at = |name: &str| text.find(name);
        assert!(at("bin\0") < at("bin/sh\0") && at("bin/sh\0").is_some());
        assert_eq!(text.matches("bin\0").count(), 1);
        assert!(text.ends_with("TRAILER!!!\0") || text.contains("TRAILER!!!\0"));
    }

    #[test]
    fn headers_and_contents_begin_at_multiples_of_four() {
        let archive = made();
        let text = String::from_utf8_lossy(&archive);
        for (at, _) in text.match_indices("070701") {
            assert_eq!(at % 4, 0, "{at}");
        }
        assert_eq!(text.matches("070701").count(), 5);
        assert_eq!(archive.len() % 4, 0);
    }

    #[test]
    fn the_first_file_at_a_path_stays() {
        let archive = made();
        let text = String::from_utf8_lossy(&archive);
        assert!(text.contains("first") && !text.contains("second"));
    }

    fn made() -> Vec<u8> {
        let mut archive = Archive::new(Vec::new());
        for bytes in [b"first".as_slice(), b"second"] {
            assert!(archive.file("/bin/busybox", 0o755, bytes).is_ok());
        }
        assert!(archive.directory("/bin").is_ok());
        assert!(archive.symlink("/bin/sh", "busybox").is_ok());
        assert!(archive.directory("/dev").is_ok());
        archive.finish().unwrap_or_default()
    }
}

//! Container images without a container engine: an OCI image layout in a tar archive, as
//! `ctr images import`, `k3s ctr`, `skopeo` and `podman load` take it.
//!
//! The same contents give the same bytes, wherever and whenever they are written: entries are
//! sorted, belong to root, carry no time, and the one layer is not compressed (compressors differ
//! from version to version; what carries images compresses them anyway).

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{BufWriter, Write},
    os::unix::fs::PermissionsExt,
    path::Path,
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tar::{Builder, EntryType, Header};

use crate::requirements;

const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// The name that `cargo xtask image` gives if it is told no other.
pub const AGENT: &str = "localhost/picomesh/agent:dev";

/// An image with one layer.
#[derive(Clone, Debug)]
pub struct Image {
    name: String,
    architecture: &'static str,
    /// By path without the leading slash, so that a directory stands before what is in it.
    entries: BTreeMap<String, Entry>,
    entrypoint: Vec<String>,
}

#[derive(Clone, Debug)]
enum Entry {
    Directory(u32),
    File { mode: u32, bytes: Vec<u8> },
    Symlink(String),
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// `sha256:…` of the manifest.
    pub digest: String,
    /// Bytes of the files in the layer.
    pub unpacked: u64,
}

impl Image {
    /// An empty image for this machine's architecture. `name` is a full reference,
    /// `localhost/picomesh/agent:dev`.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            architecture: match std::env::consts::ARCH {
                "x86_64" => "amd64",
                "aarch64" => "arm64",
                other => other,
            },
            entries: BTreeMap::new(),
            entrypoint: Vec::new(),
        }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// The same layer under another name, with another program to start.
    pub fn as_another(&self, name: &str, entrypoint: &[&str]) -> Self {
        Self {
            name: name.to_owned(),
            ..self.clone()
        }
        .entrypoint(entrypoint)
    }

    pub fn entrypoint(mut self, words: &[&str]) -> Self {
        self.entrypoint = words.iter().map(|&w| w.to_owned()).collect();
        self
    }

    pub fn directory(&mut self, at: &str, mode: u32) -> Result<()> {
        self.insert(at, Entry::Directory(mode))
    }

    pub fn file(&mut self, at: &str, mode: u32, bytes: &[u8]) -> Result<()> {
        let bytes = bytes.to_vec();
        self.insert(at, Entry::File { mode, bytes })
    }

    pub fn symlink(&mut self, at: &str, to: &str) -> Result<()> {
        self.insert(at, Entry::Symlink(to.to_owned()))
    }

    /// A file of this machine, under its own or another path.
    pub fn copy(&mut self, from: &Path, at: &str) -> Result<()> {
        let bytes = fs::read(from).with_context(|| format!("read {}", from.display()))?;
        let executable = fs::metadata(from)?.permissions().mode() & 0o111 != 0;
        self.file(at, if executable { 0o755 } else { 0o644 }, &bytes)
    }

    /// A program of this machine under `/usr/bin`, with the libraries that it is linked with.
    pub fn program(&mut self, name: &str) -> Result<()> {
        let Some(path) = requirements::find_program(name) else {
            bail!("{name} is not installed: cargo xtask setup")
        };
        self.copy(&path, &format!("/usr/bin/{name}"))?;
        for library in linked(&path)? {
            self.copy(Path::new(&library), &library)?;
        }
        Ok(())
    }

    /// Writes the archive.
    pub fn write(&self, to: &Path) -> Result<Written> {
        let layer = self.layer()?;
        let layer_digest = digest(&layer);
        let config = serde_json::to_vec(&json!({
            "architecture": self.architecture,
            "os": "linux",
            "config": {
                "Entrypoint": self.entrypoint,
                "Env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"],
            },
            "rootfs": {"type": "layers", "diff_ids": [layer_digest]},
        }))?;
        let manifest = serde_json::to_vec(&json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": descriptor(CONFIG, &config),
            "layers": [descriptor(LAYER, &layer)],
        }))?;
        let mut described = descriptor(MANIFEST, &manifest);
        described["platform"] = json!({"architecture": self.architecture, "os": "linux"});
        // The first is containerd's full name, the second what the specification has: a tag.
        described["annotations"] = json!({
            "io.containerd.image.name": self.name,
            "org.opencontainers.image.ref.name": self.name,
        });
        let index = serde_json::to_vec(&json!({
            "schemaVersion": 2,
            "mediaType": INDEX,
            "manifests": [described],
        }))?;

        let blobs: BTreeMap<String, &[u8]> = [&config, &manifest, &layer]
            .map(|blob| {
                let digest = digest(blob);
                (digest.replace(':', "/"), blob.as_slice())
            })
            .into();
        if let Some(dir) = to.parent() {
            fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
        }
        let file = File::create(to).with_context(|| format!("create {}", to.display()))?;
        let mut archive = Builder::new(BufWriter::new(file));
        for dir in ["blobs/", "blobs/sha256/"] {
            append(&mut archive, dir, &Entry::Directory(0o755))?;
        }
        let mut plain = |at: &str, bytes: &[u8]| {
            let bytes = bytes.to_vec();
            append(&mut archive, at, &Entry::File { mode: 0o644, bytes })
        };
        for (at, blob) in blobs {
            plain(&format!("blobs/{at}"), blob)?;
        }
        plain("index.json", &index)?;
        plain("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        archive.into_inner()?.flush()?;
        Ok(Written {
            digest: digest(&manifest),
            unpacked: self.entries.values().map(Entry::size).sum(),
        })
    }

    fn layer(&self) -> Result<Vec<u8>> {
        let mut layer = Builder::new(Vec::new());
        for (at, entry) in &self.entries {
            append(&mut layer, at, entry)?;
        }
        Ok(layer.into_inner()?)
    }

    /// With the directories above that are not in it yet.
    fn insert(&mut self, at: &str, entry: Entry) -> Result<()> {
        ensure!(
            at.starts_with('/') && !at.split('/').any(|part| part == ".." || part == "."),
            "{at} in image {}: not an absolute path without `.` and `..`",
            self.name
        );
        let at = at.trim_matches('/');
        for (end, _) in at.match_indices('/') {
            let parent = format!("{}/", &at[..end]);
            self.entries
                .entry(parent)
                .or_insert(Entry::Directory(0o755));
        }
        let at = match entry {
            Entry::Directory(_) => format!("{at}/"),
            Entry::File { .. } | Entry::Symlink(_) => at.to_owned(),
        };
        self.entries.insert(at, entry);
        Ok(())
    }
}

impl Entry {
    fn size(&self) -> u64 {
        match self {
            Self::File { bytes, .. } => bytes.len() as u64,
            Self::Directory(_) | Self::Symlink(_) => 0,
        }
    }
}

fn append<W: Write>(archive: &mut Builder<W>, at: &str, entry: &Entry) -> Result<()> {
    // Owner, group and time are 0 in a new header, and it holds no names of theirs.
    let mut header = Header::new_gnu();
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    let written = match entry {
        Entry::Directory(mode) => {
            header.set_entry_type(EntryType::Directory);
            header.set_mode(*mode);
            header.set_size(0);
            archive.append_data(&mut header, at, std::io::empty())
        }
        Entry::File { mode, bytes } => {
            header.set_entry_type(EntryType::Regular);
            header.set_mode(*mode);
            header.set_size(bytes.len() as u64);
            archive.append_data(&mut header, at, bytes.as_slice())
        }
        Entry::Symlink(to) => {
            header.set_entry_type(EntryType::Symlink);
            header.set_mode(0o777);
            header.set_size(0);
            archive.append_link(&mut header, at, to)
        }
    };
    written.with_context(|| format!("write {at} to an image"))
}

fn descriptor(media_type: &str, blob: &[u8]) -> Value {
    json!({"mediaType": media_type, "digest": digest(blob), "size": blob.len()})
}

/// `sha256:…`
pub fn digest(bytes: &[u8]) -> String {
    let mut text = "sha256:".to_owned();
    for byte in Sha256::digest(bytes) {
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

/// The libraries that a program is linked with, and what loads them; none if it is static.
pub fn linked(program: &Path) -> Result<Vec<String>> {
    let output = Command::new("ldd")
        .arg(program)
        .output()
        .context("start ldd")?;
    let text = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        let static_one = text.contains("not a dynamic executable")
            || String::from_utf8_lossy(&output.stderr).contains("not a dynamic executable");
        ensure!(static_one, "ldd {}: {text}", program.display());
    }
    let mut found = Vec::new();
    for line in text.lines() {
        let Some(path) = line.split_whitespace().find(|word| word.starts_with('/')) else {
            ensure!(
                !line.contains("not found"),
                "{}: {}",
                program.display(),
                line.trim()
            );
            continue;
        };
        found.push(path.to_owned());
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::{io::Read, time::SystemTime};

    use super::*;

    /// Files of this name in a directory of its own, made at another time and in another order.
    fn written(place: &str, order: &[usize], content: &[u8]) -> (Vec<u8>, Written) {
        let dir =
            std::env::temp_dir().join(format!("picomesh-image-{}-{place}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let source = dir.join("program");
        fs::write(&source, content).unwrap();
        fs::set_permissions(&source, fs::Permissions::from_mode(0o755)).unwrap();
        let elsewhen = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(place.len() as u64);
        File::options()
            .write(true)
            .open(&source)
            .unwrap()
            .set_modified(elsewhen)
            .unwrap();
        let long = format!("/etc/{}/name", "long".repeat(40));
        let mut image = Image::new("localhost/test:1").entrypoint(&["/usr/bin/program"]);
        for step in order {
            match step {
                0 => image.copy(&source, "/usr/bin/program").unwrap(),
                1 => image.symlink("/bin", "usr/bin").unwrap(),
                2 => image.file(&long, 0o644, b"far down").unwrap(),
                _ => image.directory("/tmp", 0o1777).unwrap(),
            }
        }
        let to = dir.join("image.tar");
        let written = image.write(&to).unwrap();
        let bytes = fs::read(&to).unwrap();
        fs::remove_dir_all(&dir).unwrap();
        (bytes, written)
    }

    fn files(archive: &[u8]) -> BTreeMap<String, Vec<u8>> {
        tar::Archive::new(archive)
            .entries()
            .unwrap()
            .map(|entry| {
                let mut entry = entry.unwrap();
                let path = entry.path().unwrap().to_string_lossy().into_owned();
                let mut bytes = Vec::new();
                entry.read_to_end(&mut bytes).unwrap();
                (path, bytes)
            })
            .collect()
    }

    #[test]
    fn the_same_contents_give_the_same_bytes_from_two_directories_at_two_times() {
        let one = written("one", &[0, 1, 2, 3], b"the program");
        let other = written("another", &[3, 2, 1, 0], b"the program");
        assert!(one == other, "the archives differ");
        // The control: the comparison sees a change.
        let changed = written("one", &[0, 1, 2, 3], b"the Program");
        assert!(one.0 != changed.0 && one.1.digest != changed.1.digest);
    }

    #[test]
    fn every_blob_is_found_by_its_digest_and_none_is_left_over() {
        let (archive, written) = written("blobs", &[0, 1, 2, 3], b"the program");
        let files = files(&archive);
        let blob = |digest: &Value| {
            let digest = digest.as_str().unwrap();
            let bytes = &files[&format!("blobs/{}", digest.replace(':', "/"))];
            assert_eq!(super::digest(bytes), digest);
            bytes
        };
        let index: Value = serde_json::from_slice(&files["index.json"]).unwrap();
        assert_eq!(index["manifests"][0]["digest"], written.digest.as_str());
        let manifest: Value =
            serde_json::from_slice(blob(&index["manifests"][0]["digest"])).unwrap();
        let config: Value = serde_json::from_slice(blob(&manifest["config"]["digest"])).unwrap();
        let layer = &manifest["layers"][0]["digest"];
        assert_eq!(&config["rootfs"]["diff_ids"][0], layer);
        assert_eq!(blob(layer).len() as u64, manifest["layers"][0]["size"]);
        let blobs = files.iter().filter(|(_, bytes)| !bytes.is_empty()).count();
        assert_eq!(blobs, 3 + ["index.json", "oci-layout"].len());
    }

    #[test]
    fn a_layer_holds_what_was_put_in_with_the_directories_above() {
        let (archive, written) = written("layer", &[0, 1, 2, 3], b"the program");
        assert_eq!(
            written.unpacked,
            ("the program".len() + "far down".len()) as u64
        );
        let layer = files(&archive).into_values().max_by_key(Vec::len).unwrap();
        let mut seen = Vec::new();
        for entry in tar::Archive::new(layer.as_slice()).entries().unwrap() {
            let entry = entry.unwrap();
            let header = entry.header();
            assert_eq!((header.uid().unwrap(), header.mtime().unwrap()), (0, 0));
            let path = entry.path().unwrap().to_string_lossy().into_owned();
            seen.push((path, header.mode().unwrap(), header.entry_type()));
        }
        let long = format!("etc/{}/", "long".repeat(40));
        let expected = [
            ("bin", 0o777, EntryType::Symlink),
            ("etc/", 0o755, EntryType::Directory),
            (&long, 0o755, EntryType::Directory),
            (&format!("{long}name"), 0o644, EntryType::Regular),
            ("tmp/", 0o1777, EntryType::Directory),
            ("usr/", 0o755, EntryType::Directory),
            ("usr/bin/", 0o755, EntryType::Directory),
            ("usr/bin/program", 0o755, EntryType::Regular),
        ];
        let expected = expected.map(|(path, mode, kind)| (path.to_owned(), mode, kind));
        assert_eq!(seen, expected);
    }

    #[test]
    fn a_path_that_leaves_the_image_is_refused() {
        let mut image = Image::new("localhost/test:1");
        for path in ["usr/bin", "/../etc", "/usr/./bin"] {
            assert!(image.file(path, 0o644, b"").is_err(), "{path}");
        }
    }
}

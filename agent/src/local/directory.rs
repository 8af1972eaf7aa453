//! The files of the directory: what each held when it was last good, and what is wrong with it now.
//!
//! A file counts as a whole. If any of its documents cannot be read, all of them keep the state
//! they had when the whole file could be; other files are not affected. Between files every object
//! must be unique: of two, the one in the first file by name counts, and the error names both.
//!
//! A text counts when it has come to rest: nobody is known to write the file, and it is as old as
//! [`GATHER`] or was the same when it was looked at before. Until then the file keeps what it had.
//!
//! The good text of each file is kept beside its objects ([`Texts`]), so that the next agent can
//! begin with what was good here, also for files that are broken or gone by then.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    io::{self, Read},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use nix::fcntl::OFlag;

use crate::{
    k8s::Converter,
    state::{
        ObjectKey, PodUid,
        objects::{Object, Objects},
    },
};

use super::{
    GATHER, LoadError, LocalError, Netns,
    document::{self, Document, Loaded},
    writers::Writers,
};

/// No manifest of a small cluster comes near.
const MAX_FILE_BYTES: u64 = 4 * 1024 * 1024;
const MAX_FILES: usize = 4096;
/// A file that does not come to rest for so long is left out of the first reading.
const AWAITED: Duration = Duration::from_secs(15);

pub(super) struct Directory {
    dir: PathBuf,
    converter: Converter,
    files: BTreeMap<PathBuf, File>,
    /// Nothing was read yet.
    fresh: bool,
    /// When the first reading began.
    begun: Option<Instant>,
    writers: Writers,
    /// Texts that had not come to rest at the last look, by their fingerprints.
    unsettled: HashMap<PathBuf, u64>,
    too_many: bool,
}

/// Everything the files say at one moment.
pub(super) struct Snapshot {
    pub(super) objects: Objects,
    pub(super) netns: Netns,
    pub(super) errors: Vec<LoadError>,
    /// `apiVersion kind` of what was left aside.
    pub(super) ignored: BTreeSet<String>,
}

/// What each file held when it was last good, by its name.
pub type Texts = BTreeMap<String, Arc<str>>;

#[derive(Default)]
struct File {
    /// Of the text that was read last, or of the reason why it could not be.
    fingerprint: u64,
    good: Vec<Loaded>,
    /// What `good` was read from.
    text: Option<Arc<str>>,
    ignored: BTreeSet<String>,
    error: Option<LoadError>,
}

impl Directory {
    pub(super) fn new(dir: PathBuf, converter: Converter) -> Self {
        Self {
            dir,
            converter,
            files: BTreeMap::new(),
            fresh: true,
            begun: None,
            writers: Writers::default(),
            unsettled: HashMap::new(),
            too_many: false,
        }
    }

    /// Files that somebody is writing are not read.
    pub(super) fn with_writers(mut self, writers: Writers) -> Self {
        self.writers = writers;
        self
    }

    /// As it was for another agent. What does not read any more is passed over; the files
    /// themselves count as soon as they are read.
    pub(super) fn with_texts(mut self, texts: Texts) -> Self {
        for (name, text) in texts {
            let path = self.dir.join(&name);
            if Path::new(&name)
                .file_name()
                .is_none_or(|alone| alone != &*name)
                || !is_manifest(&path)
            {
                continue;
            }
            let text = Ok(text.to_string());
            let mut file = File {
                fingerprint: fingerprint(&text),
                ..File::default()
            };
            file.load(&path, text, &self.converter);
            if file.error.is_none() {
                self.files.insert(path, file);
            }
        }
        self
    }

    /// The good text of every file.
    pub(super) fn texts(&self) -> Texts {
        let all = self.files.iter().filter_map(|(path, file)| {
            let name = path.file_name()?.to_str()?.to_owned();
            Some((name, file.text.clone()?))
        });
        all.collect()
    }

    /// Would [`Directory::read`] find anything new? Changes nothing.
    pub(super) fn has_news(&self) -> bool {
        let Ok(paths) = self.manifests() else {
            return true;
        };
        let count = paths.len().min(MAX_FILES);
        let known = |path: &PathBuf| {
            let known = self.files.get(path);
            known.is_some_and(|known| known.fingerprint == fingerprint(&read_bounded(path)))
        };
        self.files.len() != count || !paths.iter().take(count).all(known)
    }

    /// Is a text to be looked at again soon?
    pub(super) fn is_unsettled(&self) -> bool {
        !self.unsettled.is_empty()
    }

    /// The first reading waits for such a text: an incomplete mesh would let go what the rest holds.
    pub(super) fn awaits_all(&self) -> bool {
        self.fresh && self.is_unsettled()
    }

    fn is_settled(&self, path: &Path, fingerprint: u64) -> bool {
        let same = self.unsettled.get(path) == Some(&fingerprint);
        !self.writers.has(path) && (same || age(path).is_some_and(|age| age >= GATHER))
    }

    fn manifests(&self) -> Result<BTreeSet<PathBuf>, LocalError> {
        let unreadable = |source| LocalError::Unreadable {
            dir: self.dir.clone(),
            source,
        };
        let mut paths = BTreeSet::new();
        for entry in fs::read_dir(&self.dir).map_err(unreadable)? {
            let path = entry.map_err(unreadable)?.path();
            // Not by the entry's type: manifests may be links, as in a mounted ConfigMap.
            if is_manifest(&path) && !path.is_dir() {
                paths.insert(path);
            }
        }
        Ok(paths)
    }

    /// `None`: nothing changed since the last time, or nothing that has come to rest.
    pub(super) fn read(&mut self) -> Result<Option<Snapshot>, LocalError> {
        let paths = self.manifests()?;
        let too_many = paths.len() > MAX_FILES;

        let before = self.files.len();
        self.files.retain(|path, _| paths.contains(path));
        let mut changed = self.fresh || self.files.len() != before || self.too_many != too_many;
        let mut unsettled = HashMap::new();
        for path in paths.into_iter().take(MAX_FILES) {
            let text = read_bounded(&path);
            let fingerprint = fingerprint(&text);
            let known = self.files.get(&path);
            if known.is_some_and(|known| known.fingerprint == fingerprint) {
                continue;
            }
            if !self.is_settled(&path, fingerprint) {
                unsettled.insert(path, fingerprint);
                continue;
            }
            changed = true;
            let file = self.files.entry(path.clone()).or_default();
            file.fingerprint = fingerprint;
            file.load(&path, text, &self.converter);
        }
        self.unsettled = unsettled;
        let begun = *self.begun.get_or_insert_with(Instant::now);
        if self.awaits_all() && begun.elapsed() < AWAITED {
            return Ok(None);
        }
        self.fresh = false;
        self.too_many = too_many;
        Ok(changed.then(|| self.snapshot()))
    }

    pub(super) fn snapshot(&self) -> Snapshot {
        let mut errors: Vec<LoadError> = self
            .files
            .values()
            .filter_map(|file| file.error.clone())
            .collect();
        if self.too_many {
            errors.push(LoadError {
                file: self.dir.clone(),
                line: None,
                object: None,
                message: format!(
                    "holds more than {MAX_FILES} manifests, and those after them in the order of \
                     names are not read; put several objects into one file"
                ),
            });
        }

        let mut objects = Objects::default();
        let mut netns = Netns::new();
        let mut seen: HashMap<(&str, &ObjectKey), (&Path, u64)> = HashMap::new();
        let mut uids: HashMap<PodUid, (&ObjectKey, &Path)> = HashMap::new();
        for (path, file) in &self.files {
            for loaded in &file.good {
                let (kind, key) = (loaded.object.kind(), loaded.object.key());
                let mut refuse = |message| {
                    errors.push(LoadError {
                        file: path.clone(),
                        line: Some(loaded.line),
                        object: Some(format!("{kind} {key}")),
                        message,
                    });
                };
                if let Some((first, line)) = seen.get(&(kind, key)) {
                    refuse(format!(
                        "stands in {}:{line} too, and only that one counts; delete one of them",
                        first.display()
                    ));
                    continue;
                }
                seen.insert((kind, key), (path, loaded.line));
                if let Object::Pod(pod) = &loaded.object {
                    if let Some((other, first)) = uids.get(&pod.uid) {
                        refuse(format!(
                            "metadata.uid: {:?} is the uid of Pod {other} in {} too; give each its \
                             own, or none",
                            pod.uid,
                            first.display()
                        ));
                        continue;
                    }
                    uids.insert(Arc::clone(&pod.uid), (key, path));
                    if let Some(path) = &loaded.netns {
                        netns.insert(Arc::clone(&pod.uid), path.clone());
                    }
                }
                objects.insert(loaded.object.clone());
            }
        }
        errors.sort_unstable();
        let ignored = self
            .files
            .values()
            .flat_map(|file| &file.ignored)
            .cloned()
            .collect();
        Snapshot {
            objects,
            netns,
            errors,
            ignored,
        }
    }
}

impl File {
    fn load(&mut self, path: &Path, text: Result<String, String>, converter: &Converter) {
        let error = |line, object, message| LoadError {
            file: path.to_owned(),
            line,
            object,
            message,
        };
        let text = match text {
            Ok(text) => text,
            Err(reason) => {
                self.error = Some(error(None, None, reason));
                return;
            }
        };
        let mut good = Vec::new();
        let mut ignored = BTreeSet::new();
        for document in document::read(&text, converter) {
            match document {
                Ok(Document::Object(loaded)) => good.push(*loaded),
                Ok(Document::Ignored { api_version, kind }) => {
                    ignored.insert(format!("{api_version} {kind}"));
                }
                Err(wrong) => {
                    self.error = Some(wrong.in_file(path));
                    return;
                }
            }
        }
        let mut seen: HashMap<(&str, &ObjectKey), u64> = HashMap::new();
        for loaded in &good {
            let name = (loaded.object.kind(), loaded.object.key());
            if let Some(first) = seen.insert(name, loaded.line) {
                let message =
                    format!("stands in line {first} of this file too; delete one of them");
                let object = format!("{} {}", name.0, name.1);
                self.error = Some(error(Some(loaded.line), Some(object), message));
                return;
            }
        }
        *self = Self {
            fingerprint: self.fingerprint,
            good,
            text: Some(text.into()),
            ignored,
            error: None,
        };
    }
}

fn fingerprint(text: &Result<String, String>) -> u64 {
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    hasher.finish()
}

/// Since when it holds what it holds; `None` without a clock or a file that could tell.
fn age(path: &Path) -> Option<Duration> {
    let written = fs::metadata(path).and_then(|file| file.modified());
    SystemTime::now().duration_since(written.ok()?).ok()
}

fn is_manifest(path: &Path) -> bool {
    let hidden = path
        .file_name()
        .is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
    let extension = path.extension().and_then(|extension| extension.to_str());
    !hidden && matches!(extension, Some("yaml" | "yml" | "json"))
}

/// The error is a sentence: it is shown, and compared with the last one.
fn read_bounded(path: &Path) -> Result<String, String> {
    let cannot = |error: io::Error| format!("cannot be read: {error}");
    // A pipe named like a manifest would hold us up until somebody writes to it.
    let mut options = fs::OpenOptions::new();
    options.read(true).custom_flags(OFlag::O_NONBLOCK.bits());
    let file = options.open(path).map_err(cannot)?;
    if !file.metadata().map_err(cannot)?.is_file() {
        return Err("is no ordinary file; replace it by one".into());
    }
    let mut bytes = Vec::new();
    file.take(MAX_FILE_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(cannot)?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        let mebibytes = MAX_FILE_BYTES / (1024 * 1024);
        return Err(format!(
            "is larger than {mebibytes} MiB; split it into several files"
        ));
    }
    String::from_utf8(bytes).map_err(|_| "is not UTF-8 text; save it as such".into())
}

//! Local mode: the mesh's objects from a directory of ordinary Kubernetes manifests.
//!
//! [`run`] is the single writer of the [`MeshStore`]: it reads every `*.yaml`, `*.yml` and `*.json`
//! of one directory (not of directories in it), builds a mesh of what it found and publishes it,
//! again after each change. `directory` keeps what each file held when it was last good, `document`
//! turns text into objects through the same conversion as on a cluster. Errors never stop it: they
//! are shown by `debug state` and logged once.
//!
//! Here and nowhere else is a pod's network namespace read, from the annotation
//! `picomesh.io/netns`: who writes these files is root on this machine already.
//!
//! What a cluster would add is derived. A pod needs `spec.nodeName` and a uid; without
//! `metadata.uid` it gets one from its cluster, namespace, name and netns, so that the same pod in
//! another network namespace is another pod. A pod without a Ready condition is ready while its
//! phase is Running or not said.
#![forbid(unsafe_code)]

mod directory;
mod document;
mod locate;
mod writers;

use std::{
    collections::{BTreeSet, HashMap},
    fmt,
    future::Future,
    io,
    path::{Path, PathBuf},
    pin::pin,
    sync::Arc,
    time::Duration,
};

use tokio::{sync::watch, time};
use tracing::{debug, info, warn};

use crate::{
    k8s::Converter,
    state::{
        Mesh, MeshStore, PodUid,
        objects::{MeshSettings, Objects},
    },
};

use directory::{Directory, Snapshot};
use writers::Writers;

pub use directory::Texts;

/// After the first change we wait this long for its companions: editors and `kubectl`-like tools
/// write several files, or one file in several steps. A text that has not been at rest for as long
/// is not taken up.
const GATHER: Duration = Duration::from_millis(50);
/// The directory is read anew this often without being told, for file systems that do not tell.
const POLL: Duration = Duration::from_secs(5);

/// Where each pod's network namespace is.
pub type Netns = HashMap<PodUid, PathBuf>;

/// What [`run`] tells the rest of the agent besides the mesh itself.
pub struct Outputs {
    /// Written before the mesh that has the same pods.
    pub netns: watch::Sender<Netns>,
    /// Everything that is wrong in the files now; for `debug state`.
    pub errors: watch::Sender<Arc<Vec<LoadError>>>,
    /// What the files held when they were last good; for whoever comes after us.
    pub texts: watch::Sender<Arc<Texts>>,
}

/// Something in the files that a person should mend.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
pub struct LoadError {
    pub file: PathBuf,
    /// From 1. `None`: the file as a whole.
    pub line: Option<u64>,
    /// Kind and name, where it got so far.
    pub object: Option<String>,
    /// Names field, value and remedy, as far as there is a field.
    pub message: String,
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file.display())?;
        if let Some(line) = self.line {
            write!(f, ":{line}")?;
        }
        if let Some(object) = &self.object {
            write!(f, ": {object}")?;
        }
        write!(f, ": {}", self.message)
    }
}

#[derive(Debug, thiserror::Error)]
pub enum LocalError {
    #[error("cannot read the manifests in {}: make it a directory that this user may read", dir.display())]
    Unreadable { dir: PathBuf, source: io::Error },
}

/// Reads `dir`, publishes the mesh, and goes on until `stop`. `loaded` hears of the first mesh.
/// `before`: what an agent before us read there; it is in force until the directory can be read,
/// and after that for files that are broken.
pub async fn run(
    (dir, before): (PathBuf, Option<Texts>),
    settings: Arc<MeshSettings>,
    store: Arc<MeshStore>,
    outputs: Outputs,
    loaded: impl FnOnce() + Send,
    stop: impl Future<Output = ()> + Send,
) -> Result<(), LocalError> {
    let (changed, mut changes) = watch::channel(());
    // Before the first reading, so that no change falls between the two.
    let writers = Writers::default();
    let watcher = writers::watch(&dir, changed, writers.clone());
    let mut directory = Directory::new(dir, Converter::new(&settings)).with_writers(writers);
    let has_before = before.is_some();
    if let Some(texts) = before {
        directory = directory.with_texts(texts);
    }
    let mut writer = Writer {
        directory: Some(directory),
        settings,
        store,
        outputs,
        named: BTreeSet::new(),
    };
    let mut stop = pin!(stop);
    loop {
        match writer.load().await {
            Ok(()) => {}
            Err(error) if has_before => {
                warn!(%error, "the manifests of the agent before are in force until these can be read");
                writer.publish_before();
                break;
            }
            Err(error) => return Err(error),
        }
        if !writer.awaits_all() {
            break;
        }
        tokio::select! {
            () = &mut stop => return Ok(()),
            () = time::sleep(GATHER) => {}
        }
    }
    loaded();

    loop {
        tokio::select! {
            () = &mut stop => return Ok(()),
            // Never without a watcher: then the poll alone finds changes.
            Ok(()) = changes.changed(), if watcher.is_some() => {
                time::sleep(GATHER).await;
                changes.borrow_and_update();
            }
            () = time::sleep(GATHER), if writer.is_unsettled() => {}
            () = time::sleep(POLL) => {
                if !writer.has_news().await {
                    continue;
                }
                // A file that is being replaced is not gone.
                time::sleep(GATHER).await;
            }
        }
        if let Err(error) = writer.load().await {
            // The directory may be swapped for another this very moment: what we know stays.
            warn!(%error, "the manifests are gone; the last ones stay in force");
        }
    }
}

/// All objects of a text with one or more documents; kinds that are not read are left out.
pub fn objects(text: &str, converter: &Converter) -> Result<Objects, LoadError> {
    let mut objects = Objects::default();
    for document in document::read(text, converter) {
        match document {
            Ok(document::Document::Object(loaded)) => {
                objects.insert(loaded.object);
            }
            Ok(document::Document::Ignored { .. }) => {}
            Err(wrong) => return Err(wrong.in_file(Path::new("-"))),
        }
    }
    Ok(objects)
}

struct Writer {
    /// Out while a blocking thread reads.
    directory: Option<Directory>,
    settings: Arc<MeshSettings>,
    store: Arc<MeshStore>,
    outputs: Outputs,
    /// Kinds we do not read, named once.
    named: BTreeSet<String>,
}

impl Writer {
    async fn has_news(&mut self) -> bool {
        let Some(directory) = self.directory.take() else {
            return true;
        };
        let looking = tokio::task::spawn_blocking(move || (directory.has_news(), directory));
        let (news, directory) = match looking.await {
            Ok(done) => done,
            Err(panicked) => std::panic::resume_unwind(panicked.into_panic()),
        };
        self.directory = Some(directory);
        news
    }

    /// Somebody was writing a file when it was last looked at.
    fn is_unsettled(&self) -> bool {
        self.directory.as_ref().is_some_and(Directory::is_unsettled)
    }

    /// Nothing was published yet, for that reason.
    fn awaits_all(&self) -> bool {
        self.directory.as_ref().is_some_and(Directory::awaits_all)
    }

    /// Reads what changed; publishes if anything did.
    async fn load(&mut self) -> Result<(), LocalError> {
        let Some(mut directory) = self.directory.take() else {
            return Ok(());
        };
        let settings = Arc::clone(&self.settings);
        let version = self.store.load().version + 1;
        let reading = tokio::task::spawn_blocking(move || {
            let built = directory.read().map(|snapshot| {
                snapshot
                    .map(|snapshot| (Mesh::build(settings, version, &snapshot.objects), snapshot))
            });
            (directory, built)
        });
        let (directory, built) = match reading.await {
            Ok(done) => done,
            Err(panicked) => std::panic::resume_unwind(panicked.into_panic()),
        };
        self.directory = Some(directory);
        if let Some((mesh, snapshot)) = built? {
            self.publish(mesh, snapshot);
        }
        Ok(())
    }

    /// Without having read anything.
    fn publish_before(&mut self) {
        if let Some(directory) = &self.directory {
            let snapshot = directory.snapshot();
            let version = self.store.load().version + 1;
            let mesh = Mesh::build(Arc::clone(&self.settings), version, &snapshot.objects);
            self.publish(mesh, snapshot);
        }
    }

    fn publish(&mut self, mesh: Mesh, snapshot: Snapshot) {
        let Snapshot {
            objects: _,
            netns,
            errors,
            ignored,
        } = snapshot;
        for kind in ignored {
            if !self.named.contains(&kind) {
                info!(
                    kind,
                    "manifests of this kind have no meaning here and are ignored"
                );
                self.named.insert(kind);
            }
        }
        let known = Arc::clone(&self.outputs.errors.borrow());
        for error in errors.iter().filter(|error| !known.contains(error)) {
            warn!(error = %error, "a manifest is not in force; what was good before stays");
        }
        let reported: BTreeSet<_> = self.store.load().problems.iter().cloned().collect();
        for problem in mesh
            .problems
            .iter()
            .filter(|problem| !reported.contains(problem))
        {
            warn!(problem = %problem, "the objects do not fit together");
        }
        debug!(
            version = mesh.version,
            pods = mesh.workloads.len(),
            "new mesh"
        );
        if let Some(directory) = &self.directory {
            self.outputs.texts.send_replace(Arc::new(directory.texts()));
        }
        self.outputs.errors.send_replace(Arc::new(errors));
        self.outputs.netns.send_replace(netns);
        self.store.publish(mesh);
    }
}

#[cfg(test)]
mod tests;

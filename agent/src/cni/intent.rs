//! What the plugin goes by while no agent answers: a small file that the agent keeps on disk, and
//! what the pod says of itself.
//!
//! The plugin sees a pod's annotations, if the runtime passes them on, and never its labels. So a
//! namespace whose pods have opted in one by one counts as a whole: while the agent is away a pod
//! there waits, unless its own annotation takes it out of the mesh. A pod that a *label* takes out
//! of a meshed namespace waits too.
//!
//! **Without the file nobody knows who is meshed, and every pod waits** but those of the namespaces
//! that never are and those that an annotation takes out. The agent writes the file before it puts
//! the plugin into the node's configuration and removes it last, so a file that is not there was
//! lost: starting pods then could start meshed ones in plain, which no later repair undoes. The
//! agent itself needs no plugin to start, and mends it. `--fail-open` is the explicit opposite, and
//! stands in the file.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use rustix::{fs::OFlags, process::geteuid};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Namespaces whose pods are never meshed, file or not. `state` has the same.
pub const NEVER: [&str; 2] = ["kube-system", "picomesh-system"];

/// Ten thousand namespaces of long names fit.
pub const MAX_BYTES: usize = 1024 * 1024;
const VERSION: u16 = 1;

type Names = BTreeSet<String>;
pub type Annotations = BTreeMap<String, String>;

/// Which pods are meshed, as far as namespaces tell.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Intent {
    version: u16,
    /// Opted in as a whole.
    namespaces: Names,
    /// Not opted in, but a pod of theirs was once.
    #[serde(default)]
    pod_opt_ins: Names,
    /// Never meshed, whatever stands on them.
    #[serde(default)]
    never: Names,
    /// Pods start in plain rather than wait.
    #[serde(default)]
    fail_open: bool,
}

impl Default for Intent {
    fn default() -> Self {
        Self {
            version: VERSION,
            namespaces: Names::new(),
            pod_opt_ins: Names::new(),
            never: NEVER.map(str::to_owned).into(),
            fail_open: false,
        }
    }
}

#[derive(Debug, Error)]
pub enum IntentError {
    #[error("{path}: {source}")]
    File { path: PathBuf, source: io::Error },
    #[error("{path} has mode {mode:o} and owner {owner}; only its owner may write to it: root")]
    NotOurs {
        path: PathBuf,
        mode: u32,
        owner: u32,
    },
    #[error("{path}: {why}")]
    Unusable { path: PathBuf, why: Unusable },
}

/// Why bytes are no [`Intent`].
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Unusable {
    #[error("more than {MAX_BYTES} bytes")]
    TooLong,
    #[error("not what an agent writes: {0}")]
    Garbage(String),
    #[error("version {0} is not read here, only {VERSION}")]
    Version(u16),
}

/// What becomes of a pod while no agent answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    Starts,
    /// It belongs to the mesh, or might; why.
    Waits(String),
}

impl Intent {
    /// From the namespaces there are (name, opted in?) and the pods (namespace, what the pod itself
    /// says). Of `before`, namespaces that have shown a pod's opt-in keep that mark while they are.
    pub fn of<'a>(
        before: &Self,
        namespaces: impl IntoIterator<Item = (&'a str, bool)>,
        pods: impl IntoIterator<Item = (&'a str, Option<bool>)>,
        fail_open: bool,
    ) -> Self {
        let mut intent = Self {
            fail_open,
            ..Self::default()
        };
        for (name, opted_in) in namespaces {
            if intent.never.contains(name) {
                continue;
            }
            if opted_in {
                intent.namespaces.insert(name.to_owned());
            }
            if before.pod_opt_ins.contains(name) {
                intent.pod_opt_ins.insert(name.to_owned());
            }
        }
        for (namespace, said) in pods {
            if said == Some(true) && !intent.never.contains(namespace) {
                intent.pod_opt_ins.insert(namespace.to_owned());
            }
        }
        intent
    }

    /// The mesh's own pods stay outside of it, wherever it is installed.
    #[must_use]
    pub fn sparing(mut self, namespace: &str) -> Self {
        self.namespaces.remove(namespace);
        self.pod_opt_ins.remove(namespace);
        self.never.insert(namespace.to_owned());
        self
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, Unusable> {
        #[derive(Deserialize)]
        struct Versioned {
            version: u16,
        }
        if bytes.len() > MAX_BYTES {
            return Err(Unusable::TooLong);
        }
        let garbage =
            |error: serde_json::Error| Unusable::Garbage(super::shortened(error.to_string(), 256));
        let Versioned { version } = serde_json::from_slice(bytes).map_err(garbage)?;
        if version != VERSION {
            return Err(Unusable::Version(version));
        }
        serde_json::from_slice(bytes).map_err(garbage)
    }

    pub fn encode(&self) -> Vec<u8> {
        // Plain structs and strings: nothing in them can fail to become JSON.
        let mut bytes = serde_json::to_vec(self).unwrap_or_default();
        bytes.push(b'\n');
        bytes
    }

    /// Reads what an agent wrote; whatever others could have written does not count.
    pub fn read(path: &Path) -> Result<Self, IntentError> {
        let failed = |source| IntentError::File {
            path: path.into(),
            source,
        };
        let file = OpenOptions::new()
            .read(true)
            .custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed())
            .open(path)
            .map_err(failed)?;
        let found = file.metadata().map_err(failed)?;
        let (mode, owner) = (found.mode() & 0o7777, found.uid());
        let ours = owner == 0 || owner == geteuid().as_raw();
        if !found.is_file() || mode & 0o022 != 0 || !ours {
            let path = path.into();
            return Err(IntentError::NotOurs { path, mode, owner });
        }
        let mut bytes = Vec::new();
        file.take(MAX_BYTES as u64 + 1)
            .read_to_end(&mut bytes)
            .map_err(failed)?;
        Self::decode(&bytes).map_err(|why| IntentError::Unusable {
            path: path.into(),
            why,
        })
    }

    /// In one step, and so that it outlives a power cut. Does nothing if the file says it already.
    pub fn write(&self, path: &Path) -> Result<(), IntentError> {
        if Self::read(path).is_ok_and(|there| there == *self) {
            return Ok(());
        }
        let bytes = self.encode();
        if bytes.len() > MAX_BYTES {
            return Err(IntentError::Unusable {
                path: path.into(),
                why: Unusable::TooLong,
            });
        }
        let written = (|| {
            let dir = path.parent().unwrap_or(Path::new("/"));
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(dir)?;
            let new = path.with_extension("json.new");
            match fs::remove_file(&new) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                Ok(()) | Err(_) => {}
            }
            let mut file = OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&new)?;
            file.write_all(&bytes)?;
            file.sync_all()?;
            fs::rename(&new, path)?;
            File::open(dir)?.sync_all()
        })();
        written.map_err(|source| IntentError::File {
            path: path.into(),
            source,
        })
    }
}

/// Does this pod start although no agent answers? `intent` is what the file says, if it can be
/// read; `annotations` are the pod's own, empty if the runtime does not tell them.
pub fn judge(
    intent: &Result<Intent, IntentError>,
    namespace: &str,
    annotations: &Annotations,
) -> Verdict {
    if NEVER.contains(&namespace) {
        return Verdict::Starts;
    }
    let waits = |why: String| Verdict::Waits(why);
    let said = own_word(annotations);
    match (intent, said) {
        (Ok(intent), _) if intent.fail_open || intent.never.contains(namespace) => Verdict::Starts,
        (Ok(_) | Err(_), Some(false)) => Verdict::Starts,
        (Ok(_) | Err(_), Some(true)) => waits("its own annotation says so".into()),
        (Err(error), None) => waits(format!("it may: which pods do is not known, {error}")),
        (Ok(intent), None) if intent.namespaces.contains(namespace) => {
            waits(format!("namespace {namespace} is in the mesh"))
        }
        (Ok(intent), None) if intent.pod_opt_ins.contains(namespace) => waits(format!(
            "it may: pods of namespace {namespace} have joined by themselves, perhaps by a label"
        )),
        (Ok(_), None) => Verdict::Starts,
    }
}

/// What a pod's annotations say for or against the mesh. The same words in the same order of
/// strength as `k8s::words` reads them, less the labels.
fn own_word(annotations: &Annotations) -> Option<bool> {
    let ours = annotations.get("picomesh.io/mesh").map(String::as_str);
    let linkerds = annotations.get("linkerd.io/inject").map(String::as_str);
    match (ours, linkerds) {
        (Some("enabled"), _) => Some(true),
        (Some("disabled"), _) => Some(false),
        (_, Some("enabled" | "ingress")) => Some(true),
        (_, Some("disabled")) => Some(false),
        (_, _) => None,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn intent() -> Intent {
        Intent::of(
            &Intent::default(),
            [("shop", true), ("blog", false), ("plain", false)],
            [("blog", Some(true)), ("plain", Some(false)), ("shop", None)],
            false,
        )
    }

    fn annotated(pairs: &[(&str, &str)]) -> Annotations {
        let owned = |(key, value): &(&str, &str)| ((*key).into(), (*value).into());
        pairs.iter().map(owned).collect()
    }

    #[test]
    fn a_pod_that_would_be_meshed_waits_and_all_others_start() {
        let intent = Ok(intent());
        let enabled: &[_] = &[("picomesh.io/mesh", "enabled")];
        let disabled: &[_] = &[("picomesh.io/mesh", "disabled")];
        type Pairs<'a> = &'a [(&'a str, &'a str)];
        let rows: &[(&str, Pairs<'_>, Option<&str>)] = &[
            ("shop", &[], Some("namespace shop is in the mesh")),
            ("shop", enabled, Some("its own annotation")),
            ("shop", disabled, None),
            ("shop", &[("linkerd.io/inject", "disabled")], None),
            (
                "shop",
                &[("picomesh.io/mesh", "off")],
                Some("namespace shop"),
            ),
            ("blog", &[], Some("have joined by themselves")),
            ("blog", disabled, None),
            ("plain", &[], None),
            ("plain", enabled, Some("its own annotation")),
            (
                "plain",
                &[("linkerd.io/inject", "ingress")],
                Some("its own"),
            ),
            ("new", &[], None),
            ("new", enabled, Some("its own annotation")),
            ("kube-system", enabled, None),
            ("picomesh-system", enabled, None),
        ];
        for (namespace, annotations, waits) in rows {
            let verdict = judge(&intent, namespace, &annotated(annotations));
            match (&verdict, waits) {
                (Verdict::Starts, None) => {}
                (Verdict::Waits(why), Some(word)) => assert!(why.contains(word), "{why}"),
                (Verdict::Starts | Verdict::Waits(_), _) => {
                    panic!("{namespace} {annotations:?}: {verdict:?}")
                }
            }
        }
    }

    #[test]
    fn without_the_file_only_those_start_that_certainly_are_not_meshed() {
        let dir = tempfile::tempdir().unwrap();
        let lost = || Intent::read(&dir.path().join("cni.json"));
        assert!(matches!(
            judge(&lost(), "plain", &annotated(&[])),
            Verdict::Waits(why) if why.contains("cni.json") && why.contains("not known")
        ));
        let out = annotated(&[("picomesh.io/mesh", "disabled")]);
        assert_eq!(judge(&lost(), "plain", &out), Verdict::Starts);
        assert_eq!(
            judge(&lost(), "kube-system", &annotated(&[])),
            Verdict::Starts
        );
    }

    #[test]
    fn with_fail_open_nobody_waits() {
        let namespaces = [("shop", true)];
        let open = Intent::of(&Intent::default(), namespaces, [], true);
        let enabled = annotated(&[("picomesh.io/mesh", "enabled")]);
        assert_eq!(judge(&Ok(open), "shop", &enabled), Verdict::Starts);
    }

    #[test]
    fn a_namespace_keeps_the_mark_of_a_pods_opt_in_while_it_is() {
        let blog_emptied = Intent::of(&intent(), [("blog", false)], [], false);
        assert!(blog_emptied.pod_opt_ins.contains("blog"));
        let blog_gone = Intent::of(&blog_emptied, [("shop", true)], [], false);
        assert!(blog_gone.pod_opt_ins.is_empty());
        let system = Intent::of(
            &Intent::default(),
            [("kube-system", true)],
            [("kube-system", Some(true))],
            false,
        );
        assert_eq!(system, Intent::default());
    }

    #[test]
    fn what_is_written_is_read_and_the_directory_is_made_for_its_owner_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("picomesh/cni.json");
        let intent = intent();
        intent.write(&path).unwrap();
        assert_eq!(Intent::read(&path).unwrap(), intent);
        let inode = || fs::metadata(&path).unwrap().ino();
        let before = inode();
        intent.write(&path).unwrap();
        assert_eq!(
            inode(),
            before,
            "what stands there already is not written again"
        );
        Intent::default().write(&path).unwrap();
        assert_ne!(inode(), before);
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o700));
    }

    #[test]
    fn a_file_that_others_could_have_written_does_not_count() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cni.json");
        intent().write(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o620)).unwrap();
        assert!(matches!(
            Intent::read(&path),
            Err(IntentError::NotOurs { mode: 0o620, .. })
        ));
        let link = dir.path().join("link.json");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(matches!(Intent::read(&link), Err(IntentError::File { .. })));
        assert!(Intent::read(dir.path()).is_err(), "a directory");
    }

    #[test]
    fn garbage_another_version_and_oversize_are_refused() {
        for bytes in [&b""[..], b"{}", b"[]", b"\xff", br#"{"version":1}"#] {
            assert!(matches!(Intent::decode(bytes), Err(Unusable::Garbage(_))));
        }
        let later = br#"{"version":2,"whatever":[]}"#;
        assert_eq!(Intent::decode(later), Err(Unusable::Version(2)));
        let long = vec![b' '; MAX_BYTES + 1];
        assert_eq!(Intent::decode(&long), Err(Unusable::TooLong));
        let more = br#"{"version":1,"namespaces":["a"],"mood":"good"}"#;
        assert!(Intent::decode(more).unwrap().namespaces.contains("a"));
    }

    #[cfg(feature = "agent")]
    #[test]
    fn annotations_mean_what_they_mean_to_the_agent() {
        use crate::k8s::words::{Place, read};
        let words = ["enabled", "disabled", "ingress", "ambient", "", "Enabled"];
        let each = || words.iter().copied().map(Some).chain([None]);
        for (ours, linkerds) in each().flat_map(|a| each().map(move |b| (a, b))) {
            let said = [("picomesh.io/mesh", ours), ("linkerd.io/inject", linkerds)];
            let annotations: Annotations = said
                .into_iter()
                .filter_map(|(key, value)| Some((key.to_owned(), value?.to_owned())))
                .collect();
            let agents = read(Place::Pod, &Annotations::new(), &annotations).mesh;
            assert_eq!(own_word(&annotations), agents, "{annotations:?}");
        }
        assert_eq!(NEVER, crate::state::mesh::NEVER_MESHED);
    }
}

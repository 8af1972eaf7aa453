//! From files to a published mesh: what is read, what is in it, and when.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod fields;
mod objects;
mod reading;
mod running;

use super::*;
use crate::{state::objects::Objects, testing::manifests::settings};

const SERVER: &str = "\
apiVersion: policy.linkerd.io/v1beta3
kind: Server
metadata:
  name: web
  namespace: shop
spec:
  podSelector: {}
  port: 8080
";

/// A directory and what `run` would read from it, without the loop.
struct World {
    dir: tempfile::TempDir,
    directory: Directory,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let directory = Directory::new(dir.path().to_owned(), Converter::new(&settings()));
        Self { dir, directory }
    }

    /// Long ago.
    fn write(&self, name: &str, text: &str) {
        let path = self.dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        let file = std::fs::File::options().append(true).open(path).unwrap();
        let before = std::time::SystemTime::now() - Duration::from_secs(60);
        file.set_modified(before).unwrap();
    }

    fn remove(&self, name: &str) {
        std::fs::remove_file(self.dir.path().join(name)).unwrap();
    }

    /// What changed since the last reading; panics if nothing did.
    fn read(&mut self) -> Snapshot {
        self.directory.read().unwrap().expect("nothing changed")
    }

    /// The error's text, with the directory's name taken out.
    fn errors(&self, snapshot: &Snapshot) -> Vec<String> {
        let dir = format!("{}/", self.dir.path().display());
        snapshot
            .errors
            .iter()
            .map(|error| error.to_string().replace(&dir, ""))
            .collect()
    }
}

fn names(objects: &Objects) -> Vec<String> {
    objects
        .pods
        .values()
        .map(|pod| pod.key.to_string())
        .collect()
}

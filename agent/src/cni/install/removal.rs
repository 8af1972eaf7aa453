//! The end: what is ours goes, and what others have there stays as it is now.
//!
//! A runtime that finds our entry and not our program starts no pod, so as long as one configuration
//! names the plugin (somebody has copied our list into another) everything that it needs stays.

use std::{fs, io, path::PathBuf};

use super::{
    InstallError, Installer, LIST, MAX_FILES, at, conflist,
    files::{Dir, mentions},
    is_configuration, take_out,
};
use crate::cni::PLUGIN;

/// What was removed, and what could not be.
#[derive(Debug, Default)]
pub struct Removed {
    pub done: Vec<PathBuf>,
    pub problems: Vec<InstallError>,
    /// No configuration of the node names the plugin any more: nobody misses what it needs.
    pub unplugged: bool,
}

impl Removed {
    fn note(&mut self, path: PathBuf, gone: io::Result<bool>) {
        match gone {
            Ok(true) => self.done.push(path),
            Ok(false) => {}
            Err(source) => self.problems.push(at(path)(source)),
        }
    }
}

impl Installer {
    /// Takes our list out, and puts nothing in any more: pods that start from here on never meet the
    /// plugin. Its program stays, for whoever is calling it.
    pub fn retire(&self) -> Removed {
        let mut over = self.over.lock();
        *over = true;
        let mut removed = Removed::default();
        for (conf, _) in self.places() {
            let taken = self.open(&conf).and_then(|dir| match dir {
                Some(dir) => take_out(&dir, &mut removed.done),
                None => Ok(()),
            });
            removed.problems.extend(taken.err());
        }
        removed
    }

    /// Takes out everything of ours, wherever a distribution could have it.
    pub fn remove(&self) -> Removed {
        let mut removed = self.unplug();
        if removed.unplugged {
            // Last: a plugin that still runs must not miss it.
            self.forget_intent(&mut removed);
        }
        removed
    }

    /// Our list, and if no configuration names the plugin any more its program.
    pub(super) fn unplug(&self) -> Removed {
        let mut removed = Removed::default();
        let mut bins = Vec::new();
        let mut named = false;
        for (conf, candidates) in self.places() {
            match self.open(&conf) {
                Ok(Some(dir)) => {
                    if let Err(problem) = take_out(&dir, &mut removed.done) {
                        removed.problems.push(problem);
                    }
                    named |= self.is_named(&dir, &mut removed);
                }
                Ok(None) => {}
                Err(problem) => {
                    named = true;
                    removed.problems.push(problem);
                }
            }
            bins.extend(candidates);
        }
        removed.unplugged = !named;
        if named {
            return removed;
        }
        for path in bins {
            let gone = Dir::open(&self.settings.host_root, &path).and_then(|dir| match dir {
                Some(dir) => dir.tidy(PLUGIN).and_then(|()| dir.remove(PLUGIN)),
                None => Ok(false),
            });
            removed.note(path.join(PLUGIN), gone);
        }
        removed
    }

    /// Does any configuration still name the plugin? One that cannot be read might.
    fn is_named(&self, dir: &Dir, removed: &mut Removed) -> bool {
        let names = match dir.names(MAX_FILES) {
            Ok(names) => names,
            Err(source) => {
                removed.problems.push(at(dir.path.clone())(source));
                return true;
            }
        };
        let mut named = false;
        for name in names.iter().filter(|name| is_configuration(name)) {
            let path = dir.named(name);
            let root = &self.settings.host_root;
            match mentions(root, &path, PLUGIN, conflist::MAX_BYTES) {
                Ok(false) => continue,
                // It could not be removed, and that is told.
                Ok(true) if name == LIST => {}
                Ok(true) => removed.problems.push(InstallError::StillNamed { path }),
                Err(source) => removed.problems.push(at(path)(source)),
            }
            named = true;
        }
        named
    }

    fn forget_intent(&self, removed: &mut Removed) {
        let intent = &self.settings.intent;
        let (Some(parent), Some(name)) = (intent.parent(), intent.file_name()) else {
            return;
        };
        let name = name.to_string_lossy();
        let gone = Dir::open(&self.settings.host_root, parent).and_then(|dir| match dir {
            Some(dir) => {
                dir.remove(&format!("{name}.new"))?;
                let gone = dir.remove(&name)?;
                // Not if anything else is in it.
                let _others = fs::canonicalize(dir.at()).and_then(fs::remove_dir);
                Ok(gone)
            }
            None => Ok(false),
        });
        removed.note(intent.clone(), gone);
    }
}

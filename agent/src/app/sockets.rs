//! The names of this agent's sockets in the run directory, while a successor may put its own in
//! their place.
//!
//! A successor moves in when it has said `taken`. If its predecessor had given it up in that very
//! moment, it is dead and its sockets stand where ours should. A socket whose name is gone can be
//! given no other, so each has a second name from `commit` on.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use tracing::warn;

use crate::{admin, cni, handover};

pub(super) const NAMES: [&str; 3] = [admin::socket::NAME, handover::NAME, cni::SOCKET];

pub(super) struct SocketNames {
    run_dir: PathBuf,
}

impl SocketNames {
    pub(super) fn of(run_dir: &Path) -> Self {
        Self {
            run_dir: run_dir.into(),
        }
    }

    /// From now on another may take their place for a while.
    pub(super) fn keep(&self) {
        self.each("is not kept", |name, kept| {
            absent_is_fine(fs::remove_file(kept))?;
            // Nobody finds pods by the plugin's word in local mode.
            absent_is_fine(fs::hard_link(name, kept))
        });
    }

    /// Nobody else has the place any more.
    pub(super) fn put_back(&self) {
        self.each("is not back in its place", |name, kept| {
            absent_is_fine(fs::rename(kept, name))?;
            // Two names of one file are left as they are.
            absent_is_fine(fs::remove_file(kept))
        });
    }

    /// The place is another's for good.
    pub(super) fn give_up(&self) {
        self.each("keeps its second name", |_name, kept| {
            absent_is_fine(fs::remove_file(kept))
        });
    }

    fn each(&self, failed: &'static str, work: impl Fn(&Path, &Path) -> io::Result<()>) {
        for name in NAMES {
            let name = self.run_dir.join(name);
            if let Err(error) = work(&name, &kept(&name)) {
                warn!(socket = %name.display(), %error, "a socket {failed}");
            }
        }
    }
}

/// The second name.
pub(super) fn kept(name: &Path) -> PathBuf {
    name.with_extension("sock.kept")
}

fn absent_is_fine(done: io::Result<()>) -> io::Result<()> {
    match done {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    /// Takes the place as an agent does.
    fn moves_in(dir: &Path) -> Vec<UnixListener> {
        let bind = |name: &&str| {
            let new = dir.join(format!("{name}.new"));
            let listener = UnixListener::bind(&new).unwrap();
            fs::rename(new, dir.join(name)).unwrap();
            listener
        };
        NAMES.iter().map(bind).collect()
    }

    fn answers(dir: &Path, listeners: &[UnixListener]) {
        for (name, listener) in NAMES.iter().zip(listeners) {
            let _caller = UnixStream::connect(dir.join(name)).unwrap();
            listener.set_nonblocking(true).unwrap();
            listener.accept().unwrap();
        }
    }

    fn files(dir: &Path) -> usize {
        fs::read_dir(dir).unwrap().count()
    }

    #[test]
    fn the_one_before_answers_again_when_a_successor_died_in_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let names = SocketNames::of(dir.path());
        let before = moves_in(dir.path());
        for round in 0..2 {
            names.keep();
            drop(moves_in(dir.path()));
            for name in NAMES {
                let called = UnixStream::connect(dir.path().join(name));
                assert!(called.is_err(), "control: {name} answers, round {round}");
            }
            names.put_back();
            answers(dir.path(), &before);
            assert_eq!(files(dir.path()), NAMES.len());
        }
        // It died before it had moved in.
        names.keep();
        names.put_back();
        answers(dir.path(), &before);
        assert_eq!(files(dir.path()), NAMES.len());
    }

    #[test]
    fn a_successor_that_serves_keeps_the_place() {
        let dir = tempfile::tempdir().unwrap();
        let names = SocketNames::of(dir.path());
        let _before = moves_in(dir.path());
        names.keep();
        let next = moves_in(dir.path());
        names.give_up();
        answers(dir.path(), &next);
        assert_eq!(files(dir.path()), NAMES.len());
    }
}

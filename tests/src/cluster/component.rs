//! A program of the cluster that can be killed and started again.

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::{Mutex, MutexGuard, PoisonError},
};

use anyhow::Result;

use crate::{Netns, process::Process};

/// Killed when dropped, unless it is to stay.
#[derive(Debug)]
pub struct Component {
    name: String,
    netns: Netns,
    logs: PathBuf,
    outlive: bool,
    argv: Vec<String>,
    process: Mutex<Option<Process>>,
}

impl Component {
    /// Starts it. `argv[0]` is the program.
    pub(super) fn start(
        name: &str,
        argv: Vec<String>,
        netns: &Netns,
        logs: &Path,
        outlive: bool,
    ) -> Result<Self> {
        let component = Self {
            name: name.to_owned(),
            netns: netns.clone(),
            logs: logs.to_owned(),
            outlive,
            argv,
            process: Mutex::new(None),
        };
        component.restart()?;
        Ok(component)
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// SIGKILL, and waits for the end; nothing if it does not run.
    pub fn kill(&self) {
        if let Some(process) = self.process().take() {
            process.kill();
        }
    }

    /// Starts it as it was started first; kills it before if it runs.
    pub fn restart(&self) -> Result<()> {
        self.kill();
        let mut command = Command::new(&self.argv[0]);
        command.args(&self.argv[1..]);
        let process = Process::spawn(command, &self.netns, &self.logs, &self.name, self.outlive)?;
        *self.process() = Some(process);
        Ok(())
    }

    /// Its process, while it runs.
    pub fn pid(&self) -> Option<i32> {
        self.process()
            .as_ref()
            .filter(|p| p.exited().is_none())
            .map(Process::pid)
    }

    /// The last lines it said, for a person.
    pub fn last_words(&self, lines: usize) -> String {
        self.process()
            .as_ref()
            .map(|p| p.last_words(lines))
            .unwrap_or_default()
    }

    fn process(&self) -> MutexGuard<'_, Option<Process>> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Words of a command line.
pub(super) fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|&w| w.to_owned()).collect()
}

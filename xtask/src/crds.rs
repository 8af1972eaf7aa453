//! `cargo xtask crds`: writes deploy/crds out of the Rust types, or says that they differ.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, Result, bail};

use crate::shell;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Write nothing; fail where a file is not what the types say
    #[arg(long)]
    check: bool,
}

/// Not generated: it lists those that are.
const LIST: &str = "kustomization.yaml";

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let to = shell::root().join("deploy/crds");
    let generated = generate()?;
    let there = read(&to)?;
    let changes = differences(&generated, &there);
    if args.check {
        if !changes.is_empty() {
            bail!(
                "deploy/crds is not what the Rust types say ({}); call cargo xtask crds",
                changes.join(", ")
            );
        }
        return Ok(ExitCode::SUCCESS);
    }
    for name in &changes {
        let path = to.join(name);
        match generated.get(name) {
            Some(text) => fs::write(&path, text),
            None => fs::remove_file(&path),
        }
        .with_context(|| format!("write {}", path.display()))?;
        println!("deploy/crds/{name}");
    }
    Ok(ExitCode::SUCCESS)
}

/// Text by file name.
type Files = BTreeMap<String, String>;

fn generate() -> Result<Files> {
    let dir = shell::target_dir().join("crds");
    // What a former kind left.
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    let mut command = shell::cargo();
    command
        .args([
            "run",
            "--quiet",
            "-p",
            "picomesh-agent",
            "--example",
            "crds",
            "--",
        ])
        .arg(&dir);
    shell::run(&mut command)?;
    read(&dir)
}

fn read(dir: &Path) -> Result<Files> {
    let read = || -> std::io::Result<Files> {
        let mut files = Files::new();
        for entry in fs::read_dir(dir)? {
            let path: PathBuf = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if name != LIST {
                files.insert(name.into_owned(), fs::read_to_string(&path)?);
            }
        }
        Ok(files)
    };
    read().with_context(|| format!("read {}", dir.display()))
}

/// Names of files that differ, or are on one side only.
fn differences(generated: &Files, there: &Files) -> Vec<String> {
    let mut names: Vec<_> = generated.keys().chain(there.keys()).cloned().collect();
    names.sort();
    names.dedup();
    names.retain(|name| generated.get(name) != there.get(name));
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_differs_is_missing_or_is_too_much_is_named() {
        let files = |all: &[(&str, &str)]| -> Files {
            let all = all.iter();
            all.map(|(name, text)| ((*name).to_owned(), (*text).to_owned()))
                .collect()
        };
        let generated = files(&[("a", "1"), ("b", "2"), ("c", "3")]);
        assert!(differences(&generated, &generated).is_empty());
        let there = files(&[("a", "1"), ("b", "other"), ("d", "4")]);
        assert_eq!(differences(&generated, &there), ["b", "c", "d"]);
    }
}

//! Writes the definitions of our own kinds into a directory, one file each. `cargo xtask crds` calls
//! it: that program knows nothing of the agent's library.

use std::{env, fs, path::PathBuf};

use anyhow::Context;
use picomesh::k8s::crd;

const HEAD: &str = "# Written by `cargo xtask crds` out of the Rust types; do not edit.\n";

fn main() -> anyhow::Result<()> {
    let dir: PathBuf = env::args_os().nth(1).context("name a directory")?.into();
    for definition in crd::definitions() {
        let name = definition.metadata.name.as_deref();
        let path = dir.join(format!("{}.yaml", name.context("a kind without a name")?));
        let text = HEAD.to_owned() + &serde_saphyr::to_string(&definition)?;
        fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
    }
    Ok(())
}

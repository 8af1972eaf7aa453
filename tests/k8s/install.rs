//! The mesh on the cluster: by the manifests that users apply, and taken off again.

use std::path::Path;

use anyhow::{Result, ensure};
use picomesh_tests::cluster::Kubectl;

/// Where everything of it lives.
pub(crate) const NAMESPACE: &str = "picomesh-system";

/// What of it a test wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// Accounts, rights and definitions; nothing that runs.
    Rights,
    All,
}

/// Removed when dropped.
pub(crate) struct Installed {
    kubectl: Kubectl,
    sources: Vec<String>,
}

impl Installed {
    pub(crate) fn new(kubectl: &Kubectl, part: Part) -> Result<Self> {
        let there = kubectl.text(&[
            "get",
            "namespace",
            NAMESPACE,
            "--ignore-not-found",
            "-o=name",
        ]);
        ensure!(
            there?.is_empty(),
            "the cluster has a namespace {NAMESPACE}: a test installs the mesh itself, and takes it \
             off again; it must not be yours"
        );
        let deploy = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy");
        let at = |file: &str| deploy.join(file).to_string_lossy().into_owned();
        let sources = match part {
            Part::All => vec![format!("-k={}", at("kustomize/base"))],
            Part::Rights => {
                let files = [
                    "namespace",
                    "accounts",
                    "admission",
                    "rbac-agent",
                    "rbac-controller",
                    "rbac-signer",
                ];
                let files = files
                    .iter()
                    .map(|file| format!("-f={}", at(&format!("kustomize/base/{file}.yaml"))));
                files.chain([format!("-k={}", at("crds"))]).collect()
            }
        };
        let installed = Self {
            kubectl: kubectl.clone(),
            sources,
        };
        for source in &installed.sources {
            kubectl.run(&["apply", source])?;
        }
        let definition = "customresourcedefinition/meshnodes.picomesh.io";
        kubectl.run(&["wait", "--for=condition=Established", definition])?;
        Ok(installed)
    }
}

impl Drop for Installed {
    fn drop(&mut self) {
        // The namespace last: it takes its time, and what comes after must find none.
        for source in self.sources.iter().rev() {
            let gone = self
                .kubectl
                .run(&["delete", source, "--ignore-not-found", "--timeout=90s"]);
            if let Err(e) = gone {
                eprintln!("{e:#}");
            }
        }
    }
}

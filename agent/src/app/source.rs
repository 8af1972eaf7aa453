//! Where what we know comes from: manifests in a directory, or a cluster's API server. Both publish
//! meshes, say what is wrong with what they read, and leave something for the next agent.

use std::sync::Arc;

use anyhow::Context;
use serde_json::{Value, json};
use tokio::{
    sync::{oneshot, watch},
    task::JoinHandle,
};
use tracing::error;

use super::{
    finding::Finding,
    keeping::{Keeper, Kept},
};
use crate::{
    config::{self, Config},
    k8s::{
        client,
        removal::{self, Leaving},
        watch as watches,
    },
    local::{self, LoadError, Netns},
    readiness,
    state::{MeshStore, objects::MeshSettings},
};

pub(super) struct Source {
    /// Where this node's pods live.
    pub(super) netns: watch::Receiver<Netns>,
    pub(super) errors: Errors,
    pub(super) kept: Kept,
    /// On a cluster only.
    pub(super) cluster: Option<Cluster>,
}

/// What the rest of the agent needs of a cluster besides the mesh.
pub(super) struct Cluster {
    pub(super) client: client::Client,
    pub(super) namespace: String,
    /// Is the mesh being taken off?
    pub(super) leaving: watch::Receiver<Leaving>,
    /// Who finds this node's pods. Nothing that stands in a pod says where it lives: its author
    /// could name the host's network namespace.
    pub(super) finding: Finding,
}

/// What is wrong with what was read.
#[derive(Clone)]
pub(super) enum Errors {
    Local(watch::Receiver<Arc<Vec<LoadError>>>),
    Cluster(watch::Receiver<Arc<Vec<watches::Fault>>>),
}

impl Errors {
    pub(super) fn shown(&self) -> Value {
        match self {
            Self::Local(errors) => json!(**errors.borrow()),
            Self::Cluster(faults) => faults
                .borrow()
                .iter()
                .map(|fault| {
                    let name = match fault.namespace.as_str() {
                        "" => fault.name.clone(),
                        namespace => format!("{namespace}/{}", fault.name),
                    };
                    json!({
                        "object": format!("{} {name}", fault.kind),
                        "message": fault.message,
                    })
                })
                .collect(),
        }
    }

    pub(super) fn count(&self) -> usize {
        match self {
            Self::Local(errors) => errors.borrow().len(),
            Self::Cluster(faults) => faults.borrow().len(),
        }
    }
}

impl Source {
    /// Returns when the first mesh is published, and on a cluster this node's pods are found.
    pub(super) async fn start(
        config: &Config,
        keeper: &Keeper,
        (settings, mesh): (Arc<MeshSettings>, Arc<MeshStore>),
        known: readiness::Task,
        leaving: watch::Sender<Leaving>,
        guard: crate::drain::Guard,
        tasks: &mut Vec<JoinHandle<()>>,
    ) -> anyhow::Result<Self> {
        let (read, was_read) = oneshot::channel::<()>();
        let loaded = move || {
            known.done();
            // Only this start waits for it.
            let _waiting = read.send(());
        };
        let mut end = guard.clone();
        let ended = async move { end.begun().await };
        match &config.source {
            config::Source::Local { manifests, .. } => {
                let (netns_told, netns) = watch::channel(Netns::new());
                let (errors_told, errors) = watch::channel(Arc::default());
                let (texts_told, texts) = watch::channel(Arc::default());
                let outputs = local::Outputs {
                    netns: netns_told,
                    errors: errors_told,
                    texts: texts_told,
                };
                let from = (manifests.clone(), keeper.texts());
                let mut reading =
                    tokio::spawn(local::run(from, settings, mesh, outputs, loaded, ended));
                tokio::select! {
                    // Unsent, the reading has failed: the other branch knows why.
                    Ok(()) = was_read => {}
                    ended = &mut reading => ended?.context("--manifests")?,
                }
                tasks.push(tokio::spawn(async move {
                    match reading.await {
                        Ok(Ok(())) => {}
                        Ok(Err(error)) => error!(%error, "the manifests are no longer read"),
                        Err(error) => error!(%error, "the manifests are no longer read"),
                    }
                }));
                Ok(Self {
                    netns,
                    errors: Errors::Local(errors),
                    kept: Kept::Texts(texts),
                    cluster: None,
                })
            }
            config::Source::Cluster {
                kubeconfig,
                namespace,
                cni,
            } => {
                let client = client::connect(kubeconfig.clone()).await?;
                // Before anything is waited for: whoever is told to end meanwhile must know.
                let told = leaving.subscribe();
                let following = removal::follow(client.clone(), namespace.clone(), leaving);
                tasks.push(tokio::spawn(following));
                let (faults_told, faults) = watch::channel(Arc::default());
                let (objects_told, objects) = watch::channel(Arc::default());
                let outputs = watches::Outputs {
                    faults: faults_told,
                    objects: objects_told,
                };
                let watching = watches::run(
                    client.clone(),
                    keeper.objects(),
                    settings,
                    mesh,
                    outputs,
                    loaded,
                    ended,
                );
                tasks.push(tokio::spawn(watching));
                was_read
                    .await
                    .context("watching the API server has ended before it began")?;
                let (finding, netns) =
                    Finding::start(cni.clone(), objects.clone(), guard, tasks).await?;
                Ok(Self {
                    netns,
                    errors: Errors::Cluster(faults),
                    kept: Kept::Objects(objects),
                    cluster: Some(Cluster {
                        client,
                        namespace: namespace.clone(),
                        leaving: told,
                        finding,
                    }),
                })
            }
        }
    }
}

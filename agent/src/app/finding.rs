//! How an agent on a cluster finds its node's pods, and keeps what that takes: the CNI plugin in
//! the node's network configuration, the file the plugin goes by while no agent answers, and the
//! socket where it asks.
//!
//! Pods that run already come first, before anything is decided: a captured pod whose network
//! namespace is not found would be taken for one that has left.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, atomic::AtomicBool},
};

use anyhow::Context;
use tokio::{
    sync::{Notify, watch},
    task::{JoinHandle, spawn_blocking},
};
use tracing::{info, warn};

use crate::{
    cni::{
        self,
        install::{InstallSettings, Installed, Installer, Removed},
        intent::Intent,
        keeping, running,
        sandboxes::Sandboxes,
        server::{Patience, Server},
    },
    config::Cni,
    drain,
    local::Netns,
    state::objects::Objects,
};

/// Where runtimes keep network namespaces by name, as the node sees it.
const NAMES: [&str; 2] = ["run/netns", "var/run/netns"];

pub(super) struct Finding {
    settings: Cni,
    pub(super) sandboxes: Arc<Sandboxes>,
    /// Tell it when a pod is to be captured and nobody knows where it lives.
    pub(super) asked: Arc<Notify>,
    objects: watch::Receiver<Arc<Objects>>,
}

/// What an end for good takes out.
pub(super) struct Traces {
    /// Also where the plugin is not wanted: an agent before may have put it there.
    installer: Arc<Installer>,
    intent: PathBuf,
}

impl Finding {
    /// Returns when the pods that run already are found.
    pub(super) async fn start(
        settings: Cni,
        objects: watch::Receiver<Arc<Objects>>,
        guard: drain::Guard,
        tasks: &mut Vec<JoinHandle<()>>,
    ) -> anyhow::Result<(Self, watch::Receiver<Netns>)> {
        let names = NAMES.map(|dir| settings.host_root.join(dir));
        let (sandboxes, netns) = Sandboxes::new(names.into());
        let proc = settings.host_root.join("proc");
        let of_node = proc.clone();
        let running = spawn_blocking(move || running::look(&of_node)).await?;
        let running =
            running.with_context(|| format!("--host-root: {} cannot be read", proc.display()))?;
        info!(
            pods = running.pods.len(),
            "looked for pods that run already"
        );
        sandboxes.found(running.pods);
        let asked = Arc::new(Notify::new());
        tasks.push(tokio::spawn(running::keep(
            Arc::clone(&sandboxes),
            proc,
            Arc::clone(&asked),
            guard,
        )));
        let finding = Self {
            settings,
            sandboxes,
            asked,
            objects,
        };
        Ok((finding, netns))
    }

    /// Answers the plugin, in the place that `server` has taken.
    pub(super) fn serve(
        &self,
        server: Server,
        known: super::standing::Known,
        guard: drain::Guard,
    ) -> impl Future<Output = ()> + Send + 'static {
        let sandboxes = Arc::clone(&self.sandboxes);
        server.serve(Arc::new(known), sandboxes, Patience::default(), guard)
    }

    /// Keeps the plugin on the node, while `writes` says that it is ours to keep.
    pub(super) fn keep(
        self,
        fail_open: bool,
        own: Arc<str>,
        writes: &Arc<AtomicBool>,
        guard: &drain::Guard,
        tasks: &mut Vec<JoinHandle<()>>,
    ) -> (Traces, watch::Receiver<Installed>) {
        let intent = self.settings.host_root.join(within(cni::INTENT));
        let (told, intents) = watch::channel(None);
        let before = intent.clone();
        tasks.push(tokio::spawn(async move {
            let before = spawn_blocking(move || Intent::read(&before)).await;
            let before = before.ok().and_then(Result::ok).unwrap_or_default();
            follow(self.objects, before, fail_open, own, told).await;
        }));
        let (written, mut was_written) = watch::channel(false);
        tasks.push(tokio::spawn(keeping::keep(
            intent.clone(),
            intents,
            Arc::clone(writes),
            written,
            guard.clone(),
        )));
        let (told, installed) = watch::channel(Installed::No);
        let installer = Arc::new(Installer::new(self.settings.install));
        if self.settings.plugin {
            let keeping = Arc::clone(&installer).keep(Arc::clone(writes), told, guard.clone());
            tasks.push(tokio::spawn(async move {
                // A plugin without its file holds every pod up.
                if was_written.wait_for(|written| *written).await.is_ok() {
                    keeping.await;
                }
            }));
        } else {
            info!("--no-cni: pods are found in /proc when they have started");
            let taking = Arc::clone(&installer).keep_out(Arc::clone(writes), told, guard.clone());
            tasks.push(tokio::spawn(taking));
        }
        (Traces { installer, intent }, installed)
    }
}

impl Traces {
    /// The list that leads to the plugin; pods that start meanwhile do without.
    pub(super) async fn retire(&self) {
        let installer = Arc::clone(&self.installer);
        if let Ok(removed) = spawn_blocking(move || installer.retire()).await {
            tell(removed);
        }
    }

    /// The plugin and its file, as they are found now.
    pub(super) async fn remove(self) {
        let removed = spawn_blocking(move || {
            let removed = self.installer.remove();
            // The plugin goes by it as long as it is there.
            let file = if removed.unplugged {
                remove_intent(&self.intent)
            } else {
                Ok(())
            };
            (removed, file)
        });
        let Ok((removed, file)) = removed.await else {
            return;
        };
        tell(removed);
        if let Err(error) = file {
            warn!(%error, "what the CNI plugin went by could not be removed");
        }
    }
}

fn tell(removed: Removed) {
    for path in removed.done {
        info!(path = %path.display(), "removed from the node");
    }
    for problem in removed.problems {
        warn!(%problem, "not everything could be removed from the node");
    }
}

/// Takes the plugin and its file off the node, where no agent runs.
pub fn unplug(settings: InstallSettings) -> anyhow::Result<()> {
    let intent = settings.host_root.join(within(cni::INTENT));
    let removed = Installer::new(settings).remove();
    if removed.unplugged {
        remove_intent(&intent).with_context(|| format!("{} is still there", intent.display()))?;
    }
    match removed.problems.into_iter().next() {
        Some(problem) => Err(problem).context("the CNI plugin is not removed"),
        None => Ok(()),
    }
}

/// The file of [`cni::intent`], and its directory if nothing else is in there.
fn remove_intent(intent: &Path) -> io::Result<()> {
    match fs::remove_file(intent) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    // In a container it is the node's, mounted, and stays: empty it does no harm.
    let _others_keep_it = intent.parent().map(fs::remove_dir);
    Ok(())
}

/// Where a path of the node is found below its root.
fn within(path: &str) -> &str {
    path.trim_start_matches('/')
}

/// Tells after every change what the plugin shall go by.
async fn follow(
    mut objects: watch::Receiver<Arc<Objects>>,
    mut before: Intent,
    fail_open: bool,
    own: Arc<str>,
    told: watch::Sender<Option<Intent>>,
) {
    loop {
        let now = objects.borrow_and_update().clone();
        let namespaces = now
            .namespaces
            .values()
            .map(|namespace| (&*namespace.key.name, namespace.words.mesh == Some(true)));
        let pods = now
            .pods
            .values()
            .map(|pod| (&*pod.key.namespace, pod.words.mesh));
        before = Intent::of(&before, namespaces, pods, fail_open).sparing(&own);
        told.send_if_modified(|last| {
            let changed = last.as_ref() != Some(&before);
            if changed {
                *last = Some(before.clone());
            }
            changed
        });
        if objects.changed().await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str = r#"{"cniVersion":"1.0.0","name":"a","plugins":[{"type":"bridge"}]}"#;

    /// A node on which an agent has put the plugin.
    fn node() -> (tempfile::TempDir, InstallSettings) {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().to_owned();
        for path in ["etc/cni/net.d", "opt/cni/bin", "var/lib/picomesh"] {
            fs::create_dir_all(root.join(path)).unwrap();
        }
        for (path, text) in [
            ("etc/cni/net.d/10-a.conflist", LIST),
            ("opt/cni/bin/bridge", ""),
            ("plugin", "the plugin"),
        ] {
            fs::write(root.join(path), text).unwrap();
        }
        let settings = InstallSettings {
            program: root.join("plugin"),
            host_root: root,
            conf_dir: None,
            bin_dir: None,
            run_dir: "/run/picomesh".into(),
            intent: cni::INTENT.into(),
        };
        Installer::new(settings.clone()).ensure().unwrap();
        let intent = settings.host_root.join(within(cni::INTENT));
        Intent::default().write(&intent).unwrap();
        (dir, settings)
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn an_end_for_good_takes_the_plugin_out_and_its_file_only_behind_it() {
        let (dir, settings) = node();
        let at = |path: &str| dir.path().join(path);
        let traces = || Traces {
            installer: Arc::new(Installer::new(settings.clone())),
            intent: at(within(cni::INTENT)),
        };
        let broken = at("etc/cni/net.d/20-b.conflist");
        fs::write(&broken, r#"{"plugins":[{"type":"picomesh-cni"}"#).unwrap();
        traces().remove().await;
        assert!(at(within(cni::INTENT)).exists());
        assert!(at("opt/cni/bin/picomesh-cni").exists());
        assert!(unplug(settings.clone()).is_err());
        assert!(at(within(cni::INTENT)).exists());

        fs::remove_file(broken).unwrap();
        traces().remove().await;
        assert!(!at(within(cni::INTENT)).exists());
        assert!(!at("opt/cni/bin/picomesh-cni").exists());
        assert!(!at("etc/cni/net.d/00-picomesh.conflist").exists());
        unplug(settings).unwrap();
    }
}

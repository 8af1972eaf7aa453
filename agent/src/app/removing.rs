//! The end of the mesh on this node: what an agent does that is told to end while the mesh is being
//! taken off its cluster, whether it serves already or not yet.

use tokio::{sync::watch, task::spawn_blocking};
use tracing::{info, warn};

use super::{BpfDir, RunDir, SHOWS, cluster, finding, place::Dirs};
use crate::{
    cni::install::InstallSettings,
    datapath::{Datapath, DatapathSettings},
    k8s::removal::Leaving,
};

/// Every trace in the kernel and in our directories.
pub(super) async fn remove(settings: DatapathSettings, dirs: Option<Dirs>) {
    if let Err(error) = Datapath::cleanup(settings).await {
        warn!(
            error = format!("{error:#}"),
            "not everything could be removed"
        );
    }
    // In any case: keys are among it.
    if let Some(dirs) = dirs
        && let Err(error) = dirs.run.remove()
    {
        warn!(%error, "the run directory could not be removed");
    }
}

/// For an agent that does not serve yet, because the API server is away or because it has only just
/// begun: what agents before have left would stay for good, and the plugin would hold up pods.
pub(super) async fn remove_unserved(
    leaving: watch::Receiver<Leaving>,
    install: InstallSettings,
    settings: DatapathSettings,
) {
    if !cluster::removal_shows(leaving, SHOWS).await {
        return;
    }
    let run = match RunDir::open(&settings.run_dir) {
        Ok(run) => run,
        // An agent that serves sees to it itself.
        Err(error) => return info!(%error, "not removed by this agent"),
    };
    info!("the mesh is being taken off this cluster: what agents before have left goes");
    let unplugged = spawn_blocking(move || finding::unplug(install)).await;
    if let Ok(Err(error)) = unplugged {
        warn!(
            error = format!("{error:#}"),
            "not everything could be removed from the node"
        );
    }
    match BpfDir::open(&settings.bpf_dir, &settings.run_dir) {
        Ok(bpf) => remove(settings, Some(Dirs { run, bpf })).await,
        Err(error) => warn!(%error, "what is in the kernel stays"),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        path::{Path, PathBuf},
    };

    use picomesh_common::config::rule;

    use super::*;
    use crate::{cni::install::Installer, datapath::Generation};

    const CONF: &str = "etc/cni/net.d/10-a.conflist";
    const OURS: &str = "etc/cni/net.d/00-picomesh.conflist";

    /// A node with the plugin of an agent before.
    fn node(root: &Path) -> (InstallSettings, DatapathSettings) {
        for (path, text) in [
            (
                CONF,
                r#"{"cniVersion":"1.0.0","name":"a","plugins":[{"type":"bridge"}]}"#,
            ),
            ("opt/cni/bin/bridge", ""),
            ("plugin", "the plugin"),
        ] {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let install = InstallSettings {
            host_root: root.into(),
            conf_dir: None,
            bin_dir: None,
            program: root.join("plugin"),
            run_dir: "/run/picomesh".into(),
            intent: PathBuf::from(crate::cni::INTENT),
        };
        Installer::new(install.clone()).ensure().unwrap();
        let settings = DatapathSettings {
            bpf_dir: root.join("no-bpffs"),
            run_dir: root.join("run"),
            data_threads: 1,
            force_clsact: false,
            fail_open: false,
            rules: rule::ALL,
            generation: Generation::default(),
        };
        (install, settings)
    }

    #[tokio::test]
    async fn what_cannot_be_cleaned_keeps_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let (_, mut settings) = node(dir.path());
        // No bpffs: nothing of the kernel half can be cleaned.
        settings.bpf_dir = dir.path().into();
        let lock = fs::File::open(dir.path()).unwrap();
        let dirs = Dirs {
            run: RunDir::open(&settings.run_dir).unwrap(),
            bpf: BpfDir::inherit(dir.path(), lock.into()).unwrap(),
        };
        let keys = settings.run_dir.join(crate::snapshot::KEYS);
        fs::write(&keys, "the keys").unwrap();
        remove(settings, Some(dirs)).await;
        assert!(!keys.exists());
    }

    #[tokio::test(start_paused = true)]
    async fn who_does_not_serve_yet_takes_off_what_others_left_if_the_mesh_goes() {
        let dir = tempfile::tempdir().unwrap();
        let (install, settings) = node(dir.path());
        let is_there = || dir.path().join(OURS).exists();
        let (told, leaving) = watch::channel(Leaving::No);
        let end = || remove_unserved(leaving.clone(), install.clone(), settings.clone());
        end().await;
        assert!(is_there(), "nobody takes it off");

        told.send_replace(Leaving::Yes);
        let serving = RunDir::open(&settings.run_dir).unwrap();
        end().await;
        assert!(is_there(), "another agent serves");
        drop(serving);
        end().await;
        assert!(!is_there());
        assert!(!dir.path().join("opt/cni/bin/picomesh-cni").exists());
    }
}

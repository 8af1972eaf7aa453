//! Which pods should be captured, which are, and the way from one to the other.

use std::{path::PathBuf, sync::Arc};

use tokio::sync::{mpsc, watch};

use super::{Desired, PodEvent};

#[derive(Clone, Debug)]
pub struct DatapathSettings {
    /// Pins live in `<bpf_dir>/v<LAYOUT>`.
    pub bpf_dir: PathBuf,
    /// Holds the marks of this boot.
    pub run_dir: PathBuf,
    pub data_threads: usize,
    /// Use clsact even where TCX is there.
    pub force_clsact: bool,
    /// Without a listener packets pass (explicit setting of the user).
    pub fail_open: bool,
    /// `rule` bits in force; anything but all of them only in test builds.
    pub rules: u32,
}

/// For `debug pods`, metrics and readiness.
#[derive(Clone, Debug, serde::Serialize)]
pub struct PodStatus {
    pub uid: String,
    pub name: String,
    pub slot: Option<u32>,
    /// `captured`, `pending`, `failed`, `leaving`.
    pub state: &'static str,
    /// Why, when `failed`: a fixed word for the metric's label and a sentence for people.
    pub reason: Option<(&'static str, String)>,
    /// Repairs done since it was captured.
    pub repairs: u64,
    /// (name of `picomesh_common::Counter`, count), zeros left out.
    pub counters: Vec<(&'static str, u64)>,
}

/// The room's handle.
pub struct Datapath {}

impl Datapath {
    /// Mounts nothing, needs bpffs and cgroup v2 to be there (says what is missing). Adopts what an
    /// earlier agent of the same layout left pinned.
    pub async fn start(
        _settings: DatapathSettings,
        _desired: watch::Receiver<Desired>,
        _events: mpsc::Sender<PodEvent>,
    ) -> anyhow::Result<Arc<Self>> {
        unreachable!("written by the room's owner")
    }

    pub fn status(&self) -> Vec<PodStatus> {
        unreachable!("written by the room's owner")
    }

    /// Un-enrols everything and removes every trace (`picomesh-agent cleanup`).
    pub async fn cleanup(_settings: DatapathSettings) -> anyhow::Result<()> {
        unreachable!("written by the room's owner")
    }
}

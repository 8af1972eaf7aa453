//! The life of the process: from its start to the signal that ends it, and the second one.

use std::{io, time::Duration};

use tokio::{
    runtime,
    signal::unix::{Signal, SignalKind, signal},
    sync::watch,
    time::sleep,
};
use tracing::{info, warn};

use super::{Agent, datapath_settings, removing, start};
use crate::{
    config::{self, Config},
    handover::predecessor::Progress,
    k8s::removal::Leaving,
    telemetry,
};

/// `picomesh-agent run`: until SIGTERM or SIGINT, and the second of them.
pub fn run(config: Config) -> anyhow::Result<()> {
    let log_level = telemetry::init(&config.log_level, config.log_format)?;
    let runtime = runtime::Builder::new_multi_thread()
        .worker_threads(2)
        // Scrapes, manifests, netlink: none of it needs to be quick, all of it costs stacks.
        .max_blocking_threads(16)
        .thread_name("admin")
        .enable_all()
        .build()?;
    let ended = runtime.block_on(async {
        let deadline = config.drain_deadline;
        let in_a_pod = config.in_a_pod();
        let mut signals = Signals::new()?;
        let (told, leaving) = watch::channel(Leaving::default());
        let unserved = match &config.source {
            config::Source::Local { .. } => None,
            config::Source::Cluster { cni, .. } => {
                Some((cni.install.clone(), datapath_settings(&config)))
            }
        };
        let agent = tokio::select! {
            agent = start(config, Some(log_level), told) => agent?,
            // What is pinned already stays, as with any other end.
            () = signals.next() => {
                if let Some((install, settings)) = unserved {
                    removing::remove_unserved(leaving, install, settings).await;
                }
                return Ok(());
            }
        };
        live(agent, &mut signals, deadline, in_a_pod).await;
        anyhow::Ok(())
    });
    // Whatever still blocks a thread (a stuck file system) must not hold up the end.
    runtime.shutdown_background();
    ended
}

/// For whoever has nothing left to do and shall not end by itself.
pub async fn asked_to_end() -> io::Result<()> {
    Signals::new()?.next().await;
    Ok(())
}

/// Until it is asked to end or a successor serves; then until its connections have ended, or it is
/// asked a second time. In a pod whoever was succeeded stays until it is asked to end.
async fn live(agent: Agent, signals: &mut Signals, deadline: Duration, in_a_pod: bool) {
    let mut progress = agent.progress.clone();
    let asked = tokio::select! {
        () = signals.next() => true,
        () = reached(&mut progress, |now| now == Progress::Taken) => false,
    };
    let underway = *progress.borrow() == Progress::Underway;
    if asked && underway {
        info!("asked to end while a successor is coming: it shall have everything first");
        tokio::select! {
            () = reached(&mut progress, |now| now != Progress::Underway) => {}
            () = sleep(deadline) => warn!("the successor is not ready in time"),
            () = signals.next() => return warn!("asked to end a second time, open connections are cut"),
        }
    }
    let mut told = asked;
    tokio::select! {
        () = agent.end(deadline) => {}
        () = async {
            // Who has handed over is ending already: the first signal says nothing new.
            if !told {
                signals.next().await;
                told = true;
                info!("asked to end, and ending already");
            }
            signals.next().await;
        } => return warn!("asked to end a second time, open connections are cut"),
    }
    // A container that ends by itself is started anew, and would take everything back.
    if !told && in_a_pod {
        info!("a successor has everything; waiting to be ended");
        signals.next().await;
    }
}

async fn reached(progress: &mut watch::Receiver<Progress>, far: impl Fn(Progress) -> bool) {
    if progress.wait_for(|now| far(*now)).await.is_err() {
        // Nobody hands over any more.
        std::future::pending::<()>().await;
    }
}

/// SIGTERM and SIGINT, which mean the same.
pub(super) struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    pub(super) async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

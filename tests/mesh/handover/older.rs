//! Agents of earlier builds before and after one of this build.

use std::{
    fs::{File, TryLockError},
    future::Future,
    io,
    os::fd::OwnedFd,
    path::Path,
    pin::Pin,
    sync::{Arc, Mutex},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use picomesh::handover::{
    message::{Hello, KNOWS_BPF_LOCK, What},
    predecessor::{Estate, Patience, Progress, Server as Callers, Terms},
    successor::{Found, call},
};
use picomesh_common::config::LAYOUT;
use picomesh_tests::{
    AgentOptions,
    server::{Habit, Server},
};
use tokio::{runtime, sync::watch, time::timeout};

use super::{SOON, ends};
use crate::ground::{Ground, PORT, served};

/// The protocol before the bpf directory had a lock.
const OLD: u16 = KNOWS_BPF_LOCK - 1;

/// What such an agent has to leave: the lock of the run directory.
struct OldAgent(Mutex<Option<OwnedFd>>);

impl OldAgent {
    /// Takes over from the agent of `run_dir`, and waits for a successor.
    async fn takes_over(run_dir: &Path, node: &str) -> Result<watch::Receiver<Progress>> {
        let hello = Hello {
            protocol: OLD,
            version: "0.0.9".into(),
            node: node.into(),
            layout: LAYOUT,
        };
        let Found::Predecessor(mut before) = call(run_dir, hello).await? else {
            bail!("nobody is there");
        };
        let mut lock = None;
        for (what, file) in std::mem::take(&mut before.files) {
            match what {
                What::Lock => lock = Some(file),
                What::BpfLock => bail!("it was given what it does not know"),
                What::Metrics { .. } | What::Tunnels { .. } => {}
            }
        }
        ensure!(lock.is_some(), "it was not given the lock");
        before.ready().await?;
        let callers = Callers::beside(run_dir)?;
        before.taken().await;
        callers.move_in()?;
        let terms = Terms {
            version: "0.0.9".into(),
            node: node.into(),
            layout: LAYOUT,
            // It does not end: it is this process.
            drain: Duration::from_secs(3600),
            patience: Patience::default(),
        };
        let (progressed, progress) = watch::channel(Progress::Alone);
        let estate = Arc::new(Self(Mutex::new(lock)));
        tokio::spawn(callers.serve(terms, estate, progressed));
        Ok(progress)
    }
}

type Done<'a> = Pin<Box<dyn Future<Output = ()> + Send + 'a>>;

impl Estate for OldAgent {
    fn files(&self, _protocol: u16) -> io::Result<Vec<(What, OwnedFd)>> {
        let lock = self.0.lock().map_err(|_| io::Error::other("poisoned"))?;
        let copies = lock.iter().map(|lock| Ok((What::Lock, lock.try_clone()?)));
        copies.collect()
    }

    fn pause(&self) -> Done<'_> {
        Box::pin(async {})
    }

    fn resume(&self) -> Done<'_> {
        Box::pin(async {})
    }

    fn leave(&self) -> Done<'_> {
        Box::pin(async {
            if let Ok(mut lock) = self.0.lock() {
                lock.take();
            }
        })
    }
}

pub(super) fn one_that_knows_nothing_of_the_bpf_directorys_lock_may_come_between() -> Result<()> {
    let mut ground = Ground::new()?;
    let _echo = Server::start(ground.far.netns(), PORT, Habit::Echo)?;
    ground.mesh()?;
    let node = ground.world.node(0)?;
    let (run_dir, bpf_dir) = (ground.world.run_dir(&node), ground.world.bpf_dir(&node));
    let lock = || File::open(&bpf_dir).context("open the bpf directory");
    let runtime = runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?;
    let mut old = runtime.block_on(OldAgent::takes_over(&run_dir, node.name()))?;
    // At once: the one before has not ended.
    let next = ground
        .world
        .start_agent_with(&node, &AgentOptions::default())?;
    next.wait_serves(SOON)?;
    next.wait_ready(SOON)?;
    runtime.block_on(async {
        let taken = old.wait_for(|progress| *progress == Progress::Taken);
        timeout(SOON, taken).await
    })??;
    ends(ground.agent(0)?)?;
    ensure!(
        matches!(lock()?.try_lock(), Err(TryLockError::WouldBlock)),
        "the next agent has not locked the bpf directory"
    );
    ensure!(served(&ground.near, ground.far.at(PORT)), "not served");
    ground.agents[0] = next;
    Ok(())
}

//! An agent's place: its two directories with their locks, taken because they are free, or from the
//! agent that holds the run directory, which then is the predecessor and leaves what it has.

use std::{
    net::{SocketAddr, TcpListener},
    time::Duration,
};

use anyhow::Context;
use picomesh_common::config::LAYOUT;
use tokio::time::{Instant, sleep};
use tracing::{info, warn};

use super::{BpfDir, RunDir, RunDirError};
use crate::{
    config::{Config, wildcard_of_both_families},
    handover::{
        message::{Hello, PROTOCOL, What},
        successor::{self, Found, Predecessor},
    },
};

/// An agent that holds the lock and cannot be called is starting or ending.
const PATIENCE: Duration = Duration::from_secs(20);
const AGAIN: Duration = Duration::from_millis(100);

/// Both, or none: who has one of them only would work on another's pins, or be called in its place.
pub(super) struct Dirs {
    pub(super) run: RunDir,
    pub(super) bpf: BpfDir,
}

pub(super) struct Place {
    pub(super) dirs: Dirs,
    /// What the agent before leaves, if it lives.
    pub(super) heritage: Option<Heritage>,
}

pub(super) struct Heritage {
    pub(super) predecessor: Box<Predecessor>,
    /// Listens where we should.
    pub(super) metrics: Option<TcpListener>,
    /// Listen where we should; none if it listened elsewhere.
    pub(super) tunnels: Vec<TcpListener>,
}

impl Place {
    pub(super) async fn take(config: &Config) -> anyhow::Result<Self> {
        let deadline = Instant::now() + PATIENCE;
        let mut waiting = false;
        loop {
            let taken = match RunDir::open(&config.run_dir) {
                Ok(run) => {
                    let bpf = BpfDir::open(&config.bpf_dir, &config.run_dir)?;
                    return Ok(Self {
                        dirs: Dirs { run, bpf },
                        heritage: None,
                    });
                }
                Err(taken @ RunDirError::Taken { .. }) => taken,
                Err(unusable @ RunDirError::Unusable { .. }) => return Err(unusable.into()),
            };
            match successor::call(&config.run_dir, hello(config)).await? {
                Found::Predecessor(predecessor) => return Self::inherit(config, predecessor),
                Found::Nobody if Instant::now() < deadline => {
                    if !waiting {
                        info!("another agent is starting or ending here; waiting for it");
                        waiting = true;
                    }
                    sleep(AGAIN).await;
                }
                Found::Nobody => return Err(taken.into()),
            }
        }
    }

    fn inherit(config: &Config, mut predecessor: Box<Predecessor>) -> anyhow::Result<Self> {
        let (mut run, mut bpf, mut metrics, mut tunnels) = (None, None, None, Vec::new());
        for (what, file) in std::mem::take(&mut predecessor.files) {
            match what {
                What::Lock => run = Some(RunDir::inherit(&config.run_dir, file)?),
                What::BpfLock => bpf = Some(BpfDir::inherit(&config.bpf_dir, file)?),
                What::Metrics { address } if serves(config.metrics_address, address) => {
                    metrics = Some(TcpListener::from(file));
                }
                What::Tunnels { address } if config.tunnel_port == address.port() => {
                    tunnels.push(TcpListener::from(file));
                }
                What::Metrics { address } | What::Tunnels { address } => {
                    warn!(%address, "the agent before listens where this one should not");
                }
            }
        }
        let bpf = match bpf {
            Some(bpf) => bpf,
            // An older agent has not locked it.
            None => BpfDir::open(&config.bpf_dir, &config.run_dir)?,
        };
        let run = run.context("the agent before kept the lock; end it first")?;
        Ok(Self {
            dirs: Dirs { run, bpf },
            heritage: Some(Heritage {
                predecessor,
                metrics,
                tunnels,
            }),
        })
    }
}

fn hello(config: &Config) -> Hello {
    Hello {
        protocol: PROTOCOL,
        version: env!("CARGO_PKG_VERSION").into(),
        node: config.mesh.node.to_string(),
        layout: LAYOUT,
    }
}

/// Is a socket at `found` what `wanted` asks for?
fn serves(wanted: SocketAddr, found: SocketAddr) -> bool {
    let same_ip = wanted.ip() == found.ip()
        || wildcard_of_both_families(wanted) && found.ip().is_unspecified();
    same_ip && (wanted.port() == 0 || wanted.port() == found.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_inherited_only_where_one_is_wanted() {
        let at = |text: &str| text.parse::<SocketAddr>().unwrap();
        assert!(serves(at("[::]:4191"), at("[::]:4191")));
        assert!(serves(at("[::]:4191"), at("0.0.0.0:4191")));
        assert!(serves(at("127.0.0.1:0"), at("127.0.0.1:40123")));
        assert!(!serves(at("127.0.0.1:0"), at("[::]:40123")));
        assert!(!serves(at("[::]:4191"), at("[::]:4192")));
        assert!(!serves(at("10.0.0.1:4191"), at("[::]:4191")));
    }
}

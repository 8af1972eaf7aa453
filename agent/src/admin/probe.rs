//! `picomesh-agent probe`: what a kubelet asks of the agent in its own container.
//!
//! While one agent hands over to the next, both containers see one run directory, and the socket in
//! it is that of whoever serves. An answer of the old one would call the new one ready too early,
//! and the old one would be ended for it. The kernel tells them apart: containers have process
//! numbers of their own, and a caller sees no number for who lives elsewhere.
//!
//! An agent that does not have the socket is not ready: it has not taken over yet, or has been
//! succeeded. It lives all the same, and its connections must be let finish.

use std::path::{Path, PathBuf};

use serde_json::Value;
use thiserror::Error;

use super::{
    Request,
    socket::{AskError, Peer, ask_peer},
};
use crate::config::ProbeArg;

#[derive(Debug, Error)]
pub enum ProbeError {
    #[error(transparent)]
    Unanswered(#[from] AskError),
    #[error("not ready, pending: {}", .awaited.join(", "))]
    Pending { awaited: Vec<String> },
    #[error(
        "not ready: the agent at {path} is that of another container; this one has not taken over \
         yet, or was succeeded"
    )]
    Elsewhere { path: PathBuf },
}

/// A sentence for whoever looks at what the probe printed.
pub async fn run(run_dir: &Path, probe: ProbeArg) -> Result<&'static str, ProbeError> {
    let (peer, answer) = ask_peer(run_dir, &Request::Readiness).await?;
    judge(probe, peer, answer, run_dir)
}

fn judge(
    probe: ProbeArg,
    peer: Peer,
    answer: Result<Value, AskError>,
    run_dir: &Path,
) -> Result<&'static str, ProbeError> {
    match (probe, peer) {
        // However it fares: that is for its own container's probe.
        (ProbeArg::Live, Peer::Elsewhere) => Ok("live: another agent serves"),
        (ProbeArg::Live, Peer::Here) => answer.map(|_| "live").map_err(ProbeError::from),
        (ProbeArg::Ready | ProbeArg::Serves, Peer::Elsewhere) => Err(ProbeError::Elsewhere {
            path: run_dir.join(super::socket::NAME),
        }),
        (ProbeArg::Ready | ProbeArg::Serves, Peer::Here) => {
            let answer = answer?;
            if probe == ProbeArg::Serves && answer["serves"] == true {
                return Ok("serves");
            }
            let awaited = answer["awaited"].as_array().into_iter().flatten();
            let awaited: Vec<_> = awaited
                .filter_map(|what| what.as_str().map(str::to_owned))
                .collect();
            if answer["ready"] == true {
                Ok("ready")
            } else {
                Err(ProbeError::Pending { awaited })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn judged(probe: ProbeArg, peer: Peer, answer: Value) -> Result<&'static str, String> {
        judge(probe, peer, Ok(answer), Path::new("/run/picomesh")).map_err(|e| e.to_string())
    }

    #[test]
    fn only_the_agent_of_the_own_container_makes_it_ready() {
        let ready = json!({"ready": true, "awaited": []});
        let pending = json!({"ready": false, "awaited": ["certificates", "pods"]});
        let probe = ProbeArg::Ready;
        assert_eq!(judged(probe, Peer::Here, ready.clone()), Ok("ready"));
        assert_eq!(
            judged(probe, Peer::Here, pending.clone()),
            Err("not ready, pending: certificates, pods".into())
        );
        let elsewhere = judged(probe, Peer::Elsewhere, ready).unwrap_err();
        assert!(elsewhere.contains("another container"), "{elsewhere}");

        assert_eq!(judged(ProbeArg::Live, Peer::Here, pending), Ok("live"));
    }

    #[test]
    fn who_waits_for_certificates_alone_serves_and_is_not_ready() {
        let waiting = json!({"ready": false, "serves": true, "awaited": ["certificates"]});
        let started = |peer, answer: &Value| judged(ProbeArg::Serves, peer, answer.clone());
        assert_eq!(started(Peer::Here, &waiting), Ok("serves"));
        started(Peer::Elsewhere, &waiting).unwrap_err();
        judged(ProbeArg::Ready, Peer::Here, waiting).unwrap_err();
        let early = json!({"ready": false, "serves": false, "awaited": ["pods"]});
        let why = started(Peer::Here, &early).unwrap_err();
        assert_eq!(why, "not ready, pending: pods");
    }

    #[test]
    fn whoever_was_succeeded_lives_whatever_the_successor_says() {
        let silent = || AskError::Silent {
            path: "/run/picomesh/admin.sock".into(),
        };
        let at = Path::new("/run/picomesh");
        judge(ProbeArg::Live, Peer::Elsewhere, Err(silent()), at).unwrap();
        // The control: of the own agent silence is the end.
        judge(ProbeArg::Live, Peer::Here, Err(silent()), at).unwrap_err();
    }
}

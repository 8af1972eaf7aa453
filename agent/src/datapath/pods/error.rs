//! Why a pod is not as it should be: a word for machines, a sentence for people.

use std::{io, path::PathBuf};

use picomesh_common::config::MAX_PODS;

use super::{
    super::{devices::DevicesError, loader::LoaderError, netns::NetnsError},
    records::RecordsError,
};
use crate::state::PodUid;

/// Why a pod is not as it should be.
#[derive(Debug, thiserror::Error)]
pub(super) enum PodError {
    #[error(transparent)]
    Netns(#[from] NetnsError),
    #[error("netns {path} is the node's own; a pod needs one of its own")]
    NetnsOfHost { path: PathBuf },
    #[error(
        "netns {path} is not the pod's any more, whose namespace is still there: it stays closed \
         until it is found"
    )]
    NetnsMoved { path: PathBuf },
    #[error("netns {path} belongs to pod {owner} already; a netns can belong to one pod only")]
    NetnsTaken { path: PathBuf, owner: PodUid },
    #[error(transparent)]
    Devices(#[from] DevicesError),
    #[error(transparent)]
    Programs(#[from] LoaderError),
    #[error("{doing} in the pod's netns: {source}")]
    Sockets {
        doing: &'static str,
        source: io::Error,
    },
    #[error(
        "{count} connections stand in the pod, more than there is room for: {source}; enrol it \
         when it has fewer, or restart it"
    )]
    StandingFull { count: usize, source: LoaderError },
    #[error("all {MAX_PODS} places for pods on this node are taken")]
    NoSlot,
    #[error(transparent)]
    Records(#[from] RecordsError),
    #[error("a worker of the datapath did not finish, which is a bug of ours: {0}")]
    Worker(tokio::task::JoinError),
    #[error("the data threads take no events any more: the agent is ending")]
    NobodyServes,
}

impl PodError {
    /// The fixed word for metrics and status.
    pub(super) fn reason(&self) -> &'static str {
        match self {
            Self::Netns(error) => error.reason(),
            Self::NetnsOfHost { .. } => "netns_of_host",
            Self::NetnsMoved { .. } => "netns_moved",
            Self::NetnsTaken { .. } => "netns_taken",
            Self::Devices(error) => error.reason(),
            Self::Programs(_) => "programs",
            Self::Sockets { .. } => "sockets",
            Self::StandingFull { .. } => "standing_full",
            Self::NoSlot => "no_slot",
            Self::Records(_) => "records",
            Self::Worker(_) => "worker",
            Self::NobodyServes => "ending",
        }
    }

    /// The whole chain as one sentence.
    pub(super) fn sentence(&self) -> String {
        let mut sentence = self.to_string();
        let mut source = std::error::Error::source(self);
        while let Some(error) = source {
            let words = error.to_string();
            if !sentence.contains(&words) {
                sentence.push_str(": ");
                sentence.push_str(&words);
            }
            source = error.source();
        }
        sentence
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_failure_has_a_word_and_a_sentence_without_repeats() {
        let error = PodError::Sockets {
            doing: "making listeners",
            source: std::io::Error::from_raw_os_error(nix::libc::EMFILE),
        };
        assert_eq!(error.reason(), "sockets");
        let sentence = error.sentence();
        assert_eq!(
            sentence.matches("Too many open files").count(),
            1,
            "{sentence}"
        );
    }
}

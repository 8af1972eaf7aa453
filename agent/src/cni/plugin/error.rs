//! What the runtime is told when a call fails. It ends up in an Event of the pod, so it is written
//! for the person who looks there.

use std::{io, path::Path};

use serde_json::json;

use super::{
    call::Silence,
    configuration::{Malformed, VERSIONS},
};

/// Of the specification.
#[derive(Clone, Copy, Debug)]
enum Code {
    IncompatibleVersion = 1,
    InvalidEnvironment = 4,
    Io = 5,
    Undecodable = 6,
    InvalidConfiguration = 7,
    TryAgainLater = 11,
    /// From 100 on they are the plugin's own.
    NotCaptured = 100,
}

#[derive(Debug)]
pub(super) struct Failure {
    code: Code,
    message: String,
    details: String,
}

impl Failure {
    fn new(code: Code, message: impl Into<String>, details: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            details: details.into(),
        }
    }

    /// The agent says that the pod is meshed and cannot be captured.
    pub(super) fn refused(reason: &str) -> Self {
        Self::new(
            Code::NotCaptured,
            format!("picomesh cannot take this pod into the mesh, so it does not start: {reason}"),
            "the kubelet tries again; picomesh-agent debug pods on this node says more",
        )
    }

    pub(super) fn away(silence: &Silence, why: &str) -> Self {
        Self::new(
            Code::TryAgainLater,
            format!(
                "the picomesh agent of this node cannot be asked ({silence}), and this pod belongs \
                 to the mesh ({why}), so it waits for the agent"
            ),
            "the kubelet tries again; see kubectl -n picomesh-system get pods -o wide; a pod with \
             the annotation picomesh.io/mesh: disabled does not wait; if picomesh was removed: \
             kubectl apply -k deploy/kustomize/cleanup, of its sources",
        )
    }

    pub(super) fn variable(name: &str, problem: &str) -> Self {
        Self::new(Code::InvalidEnvironment, format!("{name} {problem}"), "")
    }

    pub(super) fn netns(path: &Path, error: &io::Error) -> Self {
        let path = path.display();
        let message = format!("CNI_NETNS {path}: cannot be opened: {error}");
        Self::new(Code::Io, message, "is the sandbox gone again?")
    }

    pub(super) fn input(error: io::Error) -> Self {
        Self::new(Code::Io, format!("reading standard input: {error}"), "")
    }

    pub(super) fn unknown_command(command: &str) -> Self {
        let command = super::super::shortened(command.to_owned(), 64);
        let message = format!("CNI_COMMAND {command:?} is not known");
        let known = "ADD, DEL, CHECK, GC, STATUS and VERSION are";
        Self::new(Code::InvalidEnvironment, message, known)
    }

    pub(super) fn too_old(command: &str, version: &str) -> Self {
        let message = format!("cniVersion {version} has no {command}");
        Self::new(Code::IncompatibleVersion, message, "")
    }

    pub(super) fn to_json(&self, version: &str) -> Vec<u8> {
        let mut error = json!({
            "cniVersion": version,
            "code": self.code as u32,
            "msg": self.message,
        });
        if !self.details.is_empty() {
            error["details"] = self.details.as_str().into();
        }
        error.to_string().into_bytes()
    }
}

impl From<Malformed> for Failure {
    fn from(malformed: Malformed) -> Self {
        let names = VERSIONS.map(|version| version.name()).join(", ");
        let (code, details) = match &malformed {
            Malformed::Version(_) => (Code::IncompatibleVersion, format!("supported: {names}")),
            Malformed::TooLong | Malformed::Garbage(_) => (Code::Undecodable, String::new()),
            Malformed::First | Malformed::Path { .. } => {
                (Code::InvalidConfiguration, String::new())
            }
        };
        Self::new(code, malformed.to_string(), details)
    }
}

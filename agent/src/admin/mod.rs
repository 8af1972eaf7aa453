//! What we show to people and to Prometheus: [`http`] serves metrics and readiness on the node's
//! address, [`socket`] answers `picomesh-agent debug` on a unix socket, [`show`] is that command;
//! [`probe`] is what a kubelet asks there.
//!
//! All of it runs on the admin runtime and asks the other rooms through [`Views`], closures given
//! at wiring, that answer from memory. Nothing here changes what the agent does, save the log
//! level, and that only on the socket, whose peer must be root.
#![forbid(unsafe_code)]

pub mod http;
pub mod probe;
pub mod show;
pub mod socket;

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{state::explain::Question, telemetry::LogLevel};

/// What may be asked on the socket; one line of JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, tag = "subject")]
pub enum Request {
    /// For probes: small, whatever the mesh is.
    Readiness,
    State,
    Pods,
    Tunnels,
    Certificates,
    Policies(Question),
    Limits,
    LogLevel {
        /// `None`: only tell.
        level: Option<String>,
    },
}

/// The answer; one line of JSON.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Response {
    Ok(Value),
    Error(String),
}

/// Answers at once, from memory.
pub type View = Box<dyn Fn() -> Value + Send + Sync>;
/// The same; the error says what to ask instead.
pub type PolicyView = Box<dyn Fn(&Question) -> Result<Value, String> + Send + Sync>;

/// Where answers come from.
pub struct Views {
    /// `{"ready": bool, "serves": bool, "awaited": [words]}`
    pub readiness: View,
    pub state: View,
    pub pods: View,
    pub tunnels: View,
    pub certificates: View,
    pub policies: PolicyView,
    pub limits: View,
    /// `None` where logging is somebody else's (tests).
    pub log_level: Option<LogLevel>,
}

impl Views {
    fn answer(&self, request: Request) -> Response {
        match request {
            Request::Readiness => Response::Ok((self.readiness)()),
            Request::State => Response::Ok((self.state)()),
            Request::Pods => Response::Ok((self.pods)()),
            Request::Tunnels => Response::Ok((self.tunnels)()),
            Request::Certificates => Response::Ok((self.certificates)()),
            Request::Policies(question) => match (self.policies)(&question) {
                Ok(answer) => Response::Ok(answer),
                Err(reason) => Response::Error(reason),
            },
            Request::Limits => Response::Ok((self.limits)()),
            Request::LogLevel { level } => self.log_level(level),
        }
    }

    fn log_level(&self, wanted: Option<String>) -> Response {
        let Some(log_level) = &self.log_level else {
            return Response::Error("this agent's log is not its own".into());
        };
        if let Some(wanted) = wanted {
            let before = log_level.get();
            match log_level.set(&wanted) {
                Ok(()) => tracing::info!(before, now = wanted, "log level changed"),
                Err(error) => return Response::Error(error.to_string()),
            }
        }
        Response::Ok(Value::from(log_level.get()))
    }
}

/// Shared by the tasks that serve.
type SharedViews = Arc<Views>;

//! The plugin: what the runtime asks on standard input and in the environment, and what it is told
//! on standard output. CNI specification 0.3.0 to 1.1.0.
//!
//! It is the last of a chain: the plugins before it have made the pod's interfaces, and it makes
//! none. On ADD it hands the pod's network namespace to the agent and answers, with the result of
//! the plugin before it exactly as it came, once the kernel takes the pod's connections. An error
//! makes the runtime take the sandbox down; the kubelet shows it as an Event of the pod and tries
//! again.
//!
//! **While no agent answers** [`intent`] decides: a pod that belongs to the mesh fails its ADD, all
//! others start. An agent that is about to be back (an upgrade, a crash) is waited for first.
//!
//! **Nobody else is held up.** DEL always succeeds: what the agent keeps goes with the namespace.
//! STATUS does not speak of the agent: the node would count as not ready, and so would pods that
//! are not meshed.

mod call;
pub mod configuration;
mod environment;
mod error;

use std::{
    ffi::OsString,
    io::Read,
    os::fd::AsFd,
    path::{Path, PathBuf},
    thread::sleep,
    time::{Duration, Instant},
};

use serde_json::json;

use self::{
    call::{Silence, ask},
    configuration::{Configuration, MAX_INPUT, VERSIONS, Version},
    environment::{Environment, Pod},
    error::Failure,
};
use super::{
    intent::{self, Intent, Verdict},
    message::{Answer, Ask, PROTOCOL, Question},
};

/// How long is waited for what.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// For the agent's answer to ADD and CHECK. A little more than the agent takes for it, so that
    /// its reason is heard.
    pub answer: Duration,
    /// For an agent to be there at all, if the pod belongs to the mesh.
    pub agent: Duration,
    /// For the answer to DEL.
    pub farewell: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            answer: Duration::from_secs(30),
            agent: Duration::from_secs(5),
            farewell: Duration::from_secs(1),
        }
    }
}

/// An agent that is away is called again after this.
const AGAIN: Duration = Duration::from_millis(200);

/// What the runtime reads.
#[derive(Debug)]
pub struct Output {
    pub text: Vec<u8>,
    pub success: bool,
}

/// One call of the plugin.
pub fn run(
    variables: impl Fn(&str) -> Option<OsString>,
    input: impl Read,
    patience: Patience,
) -> Output {
    let mut text = Vec::new();
    let read = input.take(MAX_INPUT as u64 + 1).read_to_end(&mut text);
    let mut version = VERSIONS[VERSIONS.len() - 1].name();
    let done = read.map_err(Failure::input).and_then(|_| {
        let environment = Environment::read(variables)?;
        match environment.command.as_str() {
            "VERSION" => Ok(versions()),
            // Whatever is wrong: a pod must be able to go.
            "DEL" => {
                if let Ok(configuration) = configuration::read(&text) {
                    remove(&environment, &configuration, patience);
                }
                Ok(Vec::new())
            }
            command => {
                let configuration = configuration::read(&text)?;
                version = configuration.version.name();
                serve(command, &environment, &configuration, patience)
            }
        }
    });
    match done {
        Ok(text) => Output {
            text,
            success: true,
        },
        Err(failure) => Output {
            text: failure.to_json(version),
            success: false,
        },
    }
}

fn serve(
    command: &str,
    environment: &Environment,
    configuration: &Configuration<'_>,
    patience: Patience,
) -> Result<Vec<u8>, Failure> {
    let version = configuration.version;
    match command {
        "ADD" => {
            let result = configuration.result()?;
            add(environment, configuration, patience)?;
            Ok(result)
        }
        "CHECK" if version >= Version::V0_4_0 => {
            check(environment, configuration, patience).map(|()| Vec::new())
        }
        // What the agent keeps of sandboxes that are gone goes with their namespaces.
        "STATUS" | "GC" if version >= Version::V1_1_0 => Ok(Vec::new()),
        "CHECK" | "STATUS" | "GC" => Err(Failure::too_old(command, version.name())),
        other => Err(Failure::unknown_command(other)),
    }
}

/// Returns when the pod's containers may start.
fn add(
    environment: &Environment,
    configuration: &Configuration<'_>,
    patience: Patience,
) -> Result<(), Failure> {
    let netns = environment.netns()?;
    let Some(pod) = environment.pod()? else {
        // Not of Kubernetes: somebody uses the node's network configuration by hand.
        return Ok(());
    };
    if intent::NEVER.contains(&pod.namespace.as_str()) {
        // Also while the agent is there: nothing the cluster needs waits for us.
        return Ok(());
    }
    let question = question(Ask::Add, environment, &pod);
    let socket = configuration.socket();
    let mut away_since = None;
    loop {
        let silence = match ask(&socket, &question, Some(netns.as_fd()), patience.answer) {
            Ok(Answer::Captured | Answer::NotMeshed) => return Ok(()),
            Ok(Answer::Refused { reason }) => return Err(Failure::refused(&reason)),
            Ok(Answer::Unknown { reason }) => Silence::Undecided(reason),
            Err(silence) => silence,
        };
        let since = *away_since.get_or_insert_with(Instant::now);
        let known = Intent::read(configuration.intent());
        let annotations = configuration.annotations();
        match intent::judge(&known, &pod.namespace, annotations) {
            Verdict::Starts => return Ok(()),
            Verdict::Waits(_) if silence.may_pass() && since.elapsed() < patience.agent => {
                sleep(AGAIN);
            }
            Verdict::Waits(why) => return Err(Failure::away(&silence, &why)),
        }
    }
}

fn check(
    environment: &Environment,
    configuration: &Configuration<'_>,
    patience: Patience,
) -> Result<(), Failure> {
    let Some(pod) = environment.pod()? else {
        return Ok(());
    };
    if intent::NEVER.contains(&pod.namespace.as_str()) {
        return Ok(());
    }
    let question = question(Ask::Check, environment, &pod);
    match ask(&configuration.socket(), &question, None, patience.answer) {
        Ok(Answer::Refused { reason }) => Err(Failure::refused(&reason)),
        // What is captured stays so while the agent is away.
        Ok(Answer::Captured | Answer::NotMeshed | Answer::Unknown { .. }) | Err(_) => Ok(()),
    }
}

fn remove(environment: &Environment, configuration: &Configuration<'_>, patience: Patience) {
    if let Ok(Some(pod)) = environment.pod() {
        let question = question(Ask::Remove, environment, &pod);
        // Best effort: an agent that is away looks for itself when it is back.
        let _heard = ask(&configuration.socket(), &question, None, patience.farewell);
    }
}

fn question(ask: Ask, environment: &Environment, pod: &Pod) -> Question {
    Question {
        protocol: PROTOCOL,
        ask,
        namespace: pod.namespace.clone(),
        name: pod.name.clone(),
        uid: pod.uid.clone(),
        sandbox: environment.container.clone(),
        netns: environment.netns_path().map(as_the_node_sees_it),
    }
}

/// `/var/run` is a link to `/run` on the node, and need not be one where the agent lives.
fn as_the_node_sees_it(path: &Path) -> String {
    let path = match path.strip_prefix("/var/run") {
        Ok(rest) => PathBuf::from("/run").join(rest),
        Err(_) => path.to_owned(),
    };
    path.to_string_lossy().into_owned()
}

fn versions() -> Vec<u8> {
    let names = VERSIONS.map(Version::name);
    let newest = names[names.len() - 1];
    json!({"cniVersion": newest, "supportedVersions": names})
        .to_string()
        .into_bytes()
}

#[cfg(test)]
mod tests;

//! What stands on the plugin's standard input: its entry of the network configuration, with what
//! the runtime adds to it.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use serde_json::value::RawValue;
use thiserror::Error;

use crate::cni::{INTENT, SOCKET, intent::Annotations, shortened};

/// A pod's annotations alone may have 256 KiB.
pub const MAX_INPUT: usize = 4 * 1024 * 1024;
const RUN_DIR: &str = "/run/picomesh";
/// The key under which runtimes pass on a pod's annotations.
const ANNOTATIONS: &str = "io.kubernetes.cri.pod-annotations";

/// Of the specification.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    V0_3_0,
    V0_3_1,
    V0_4_0,
    V1_0_0,
    V1_1_0,
}

pub const VERSIONS: [Version; 5] = [
    Version::V0_3_0,
    Version::V0_3_1,
    Version::V0_4_0,
    Version::V1_0_0,
    Version::V1_1_0,
];

impl Version {
    pub fn name(self) -> &'static str {
        match self {
            Self::V0_3_0 => "0.3.0",
            Self::V0_3_1 => "0.3.1",
            Self::V0_4_0 => "0.4.0",
            Self::V1_0_0 => "1.0.0",
            Self::V1_1_0 => "1.1.0",
        }
    }
}

#[derive(Debug)]
pub struct Configuration<'a> {
    /// What is spoken: the newest known if the configuration's own is newer still.
    pub version: Version,
    /// As it stands there.
    said: String,
    run_dir: PathBuf,
    intent: PathBuf,
    annotations: Annotations,
    previous: Option<&'a RawValue>,
}

/// Why the runtime's input is refused.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Malformed {
    #[error("standard input has more than {MAX_INPUT} bytes")]
    TooLong,
    #[error("standard input is no network configuration: {0}")]
    Garbage(String),
    #[error(
        "cniVersion: {0:?} is not supported; 0.3.0, 0.3.1, 0.4.0, 1.0.0, 1.1.0 and later 1.x are"
    )]
    Version(String),
    #[error(
        "prevResult: missing; picomesh-cni makes no interfaces, so in the list of plugins it must \
         stand behind one that does"
    )]
    First,
    #[error("{field}: {found:?} is no absolute path")]
    Path { field: &'static str, found: String },
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Input<'a> {
    #[serde(default)]
    cni_version: String,
    /// Ours, written by the agent.
    run_dir: Option<String>,
    intent: Option<String>,
    #[serde(borrow)]
    runtime_config: Option<BTreeMap<String, &'a RawValue>>,
    #[serde(borrow)]
    prev_result: Option<&'a RawValue>,
}

pub fn read(text: &[u8]) -> Result<Configuration<'_>, Malformed> {
    if text.len() > MAX_INPUT {
        return Err(Malformed::TooLong);
    }
    let garbage = |error: serde_json::Error| Malformed::Garbage(shortened(error.to_string(), 512));
    if !text.trim_ascii_start().starts_with(b"{") {
        return Err(Malformed::Garbage("it is no JSON object".into()));
    }
    let input: Input<'_> = serde_json::from_slice(text).map_err(garbage)?;
    let Some(version) = spoken(&input.cni_version) else {
        return Err(Malformed::Version(shortened(input.cni_version, 64)));
    };
    let passed_on = input.runtime_config.as_ref();
    let annotations = match passed_on.and_then(|config| config.get(ANNOTATIONS)) {
        Some(map) => serde_json::from_str::<Option<Annotations>>(map.get())
            .map_err(garbage)?
            .unwrap_or_default(),
        None => Annotations::new(),
    };
    Ok(Configuration {
        version,
        said: input.cni_version,
        run_dir: absolute("runDir", input.run_dir, RUN_DIR)?,
        intent: absolute("intent", input.intent, INTENT)?,
        annotations,
        // `null` is as good as nothing.
        previous: input.prev_result.filter(|result| result.get() != "null"),
    })
}

/// A later 1.x may add words, which are passed on as they come, and takes none away.
fn spoken(version: &str) -> Option<Version> {
    let known = VERSIONS.into_iter().find(|known| known.name() == version);
    known.or_else(|| {
        let numbers: Result<Vec<u16>, _> = version.split('.').map(str::parse).collect();
        let later = matches!(numbers.ok()?[..], [1, minor, _] if minor >= 1);
        later.then_some(Version::V1_1_0)
    })
}

fn absolute(
    field: &'static str,
    given: Option<String>,
    otherwise: &str,
) -> Result<PathBuf, Malformed> {
    match given {
        None => Ok(otherwise.into()),
        Some(path) if path.starts_with('/') => Ok(path.into()),
        Some(path) => Err(Malformed::Path {
            field,
            found: shortened(path, 256),
        }),
    }
}

impl Configuration<'_> {
    /// What the plugin before us has answered, byte by byte.
    pub fn result(&self) -> Result<Vec<u8>, Malformed> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Versioned<'a> {
            #[serde(borrow)]
            cni_version: Option<Cow<'a, str>>,
        }
        let text = self.previous.ok_or(Malformed::First)?.get();
        if !text.trim_start().starts_with('{') {
            return Err(Malformed::Garbage("prevResult is no object".into()));
        }
        match serde_json::from_str::<Versioned<'_>>(text) {
            Ok(Versioned {
                cni_version: Some(_),
            }) => Ok(text.into()),
            // A result must say its version; whoever left it out meant the configuration's.
            Ok(Versioned { cni_version: None }) => {
                let fields = text.trim_start().trim_start_matches('{');
                let comma = if fields.trim_start().starts_with('}') {
                    ""
                } else {
                    ","
                };
                let version = &self.said;
                Ok(format!(r#"{{"cniVersion":"{version}"{comma}{fields}"#).into())
            }
            Err(error) => Err(Malformed::Garbage(format!("prevResult: {error}"))),
        }
    }

    pub fn socket(&self) -> PathBuf {
        self.run_dir.join(SOCKET)
    }

    pub fn intent(&self) -> &Path {
        &self.intent
    }

    /// Of the pod; empty if the runtime passes none on.
    pub fn annotations(&self) -> &Annotations {
        &self.annotations
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_runtime_writes_is_read() {
        let text = br#"{"cniVersion":"1.0.0","name":"kindnet","type":"picomesh-cni",
            "capabilities":{"io.kubernetes.cri.pod-annotations":true},
            "runDir":"/run/other","runtimeConfig":{"io.kubernetes.cri.pod-annotations":
            {"picomesh.io/mesh":"enabled"},"portMappings":[]},"prevResult":{"cniVersion":"1.0.0"}}"#;
        let read = read(text).unwrap();
        assert_eq!(read.version, Version::V1_0_0);
        assert_eq!(read.socket(), Path::new("/run/other/cni.sock"));
        assert_eq!(read.intent(), Path::new(INTENT));
        assert_eq!(read.annotations()["picomesh.io/mesh"], "enabled");
    }

    #[test]
    fn the_result_before_is_passed_on_byte_by_byte() {
        let previous = r#"{ "ips":[{"z":1e2, "address":"10.0.0.1/24"}],
            "cniVersion" : "0.4.0", "u":"\u00e4","n":123456789012345678901234567890 }"#;
        let text = format!(r#"{{"cniVersion":"0.4.0","prevResult":{previous}}}"#);
        let result = read(text.as_bytes()).unwrap().result().unwrap();
        assert_eq!(String::from_utf8(result).unwrap(), previous);
    }

    #[test]
    fn a_result_without_version_gets_the_configurations() {
        for (previous, wanted) in [
            ("{}", r#"{"cniVersion":"0.3.1"}"#),
            (" { \"ips\":[]}", r#"{"cniVersion":"0.3.1", "ips":[]}"#),
        ] {
            let text = format!(r#"{{"cniVersion":"0.3.1","prevResult":{previous}}}"#);
            let result = read(text.as_bytes()).unwrap().result().unwrap();
            assert_eq!(String::from_utf8(result).unwrap(), wanted);
        }
    }

    #[test]
    fn a_later_version_of_the_first_kind_is_passed_on_as_it_comes() {
        for later in ["1.1.1", "1.2.0", "1.30.0"] {
            let text = format!(r#"{{"cniVersion":"{later}","prevResult":{{"new":[1]}}}}"#);
            let read = read(text.as_bytes()).unwrap();
            assert_eq!(read.version, Version::V1_1_0, "{later}");
            let result = String::from_utf8(read.result().unwrap()).unwrap();
            assert_eq!(result, format!(r#"{{"cniVersion":"{later}","new":[1]}}"#));
        }
        for other in [
            "1.0.1", "1.2", "1.2.0.0", "1.x.0", "2.0.0", "0.5.0", "-1.2.0",
        ] {
            let text = format!(r#"{{"cniVersion":"{other}"}}"#);
            let error = read(text.as_bytes()).unwrap_err();
            assert_eq!(error, Malformed::Version(other.into()));
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        let wrong = |text: &str| read(text.as_bytes()).unwrap_err().to_string();
        assert!(wrong("").contains("no network configuration"));
        assert!(wrong(r#"{"cniVersion":"0.2.0"}"#).contains("\"0.2.0\" is not supported"));
        assert!(wrong("{}").contains("cniVersion"));
        assert!(wrong(r#"{"cniVersion":"1.0.0","runDir":"run"}"#).starts_with("runDir"));
        let long = " ".repeat(MAX_INPUT + 1);
        assert!(wrong(&long).contains("more than"));
        let annotations = r#"{"cniVersion":"1.0.0","runtimeConfig":
            {"io.kubernetes.cri.pod-annotations":{"a":1}}}"#;
        assert!(wrong(annotations).contains("no network configuration"));
        for first in [
            r#"{"cniVersion":"1.1.0"}"#,
            r#"{"cniVersion":"1.1.0","prevResult":null}"#,
        ] {
            let first = read(first.as_bytes()).unwrap();
            assert_eq!(first.result(), Err(Malformed::First));
        }
        let odd = br#"{"cniVersion":"1.1.0","prevResult":[]}"#;
        assert!(read(odd).unwrap().result().is_err());
    }
}

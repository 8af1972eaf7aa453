//! What the plugin asks and the agent answers: one packet each way, then the connection ends.
//! [`Question::decode`] and [`Answer::decode`] are pure, bounded and believe nothing.
//!
//! Plugin and agent may be of different builds for as long as an upgrade takes. Fields that a side
//! does not know are passed over; a question that the agent does not know is answered with
//! `unknown`, which leaves the plugin to itself, as if no agent had been there.

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use thiserror::Error;

use super::shortened;

/// Grows when a message changes its meaning.
pub const PROTOCOL: u16 = 1;
/// Of either message.
pub const MAX_MESSAGE: usize = 16 * 1024;
/// Of a text within a message; a path is the longest.
const MAX_TEXT: usize = 4096;
/// Of a reason: JSON can make six bytes of one.
const MAX_REASON: usize = 1024;

/// About one pod's sandbox. With [`Ask::Add`] its network namespace travels beside it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Question {
    pub protocol: u16,
    pub ask: Ask,
    pub namespace: String,
    pub name: String,
    /// Older runtimes do not tell it.
    #[serde(default)]
    pub uid: Option<String>,
    /// The runtime's name for the sandbox. A pod may come to have another one.
    pub sandbox: String,
    /// Where the runtime says the network namespace is, as the node sees it.
    #[serde(default)]
    pub netns: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ask {
    /// The sandbox is new: capture it if it is to be.
    Add,
    /// It is about to go. There may be none.
    Remove,
    /// Is it as it should be?
    Check,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
pub enum Answer {
    /// The kernel takes its connections.
    Captured,
    /// It is not to be captured. To `remove`: heard.
    NotMeshed,
    /// It is to be captured and cannot be, or not in time. Its containers must not start.
    Refused { reason: String },
    /// The agent cannot tell.
    Unknown { reason: String },
}

/// Why a packet is no message.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Malformed {
    #[error("{length} bytes are more than the {MAX_MESSAGE} of the longest message")]
    TooLong { length: usize },
    #[error("no message: {0}")]
    Garbage(String),
    #[error("protocol {found} is not spoken here, only {PROTOCOL}")]
    Protocol { found: u16 },
    #[error("{field} has {found} bytes, at most {MAX_TEXT} make sense")]
    TooMuch { field: &'static str, found: usize },
}

impl Question {
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let question: Self = decode(bytes)?;
        if question.protocol != PROTOCOL {
            let found = question.protocol;
            return Err(Malformed::Protocol { found });
        }
        let uid = question.uid.as_deref().unwrap_or_default();
        let netns = question.netns.as_deref().unwrap_or_default();
        for (field, text) in [
            ("namespace", question.namespace.as_str()),
            ("name", &question.name),
            ("uid", uid),
            ("sandbox", &question.sandbox),
            ("netns", netns),
        ] {
            bounded(field, text)?;
        }
        Ok(question)
    }

    pub fn encode(&self) -> Vec<u8> {
        encode(self)
    }
}

impl Answer {
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let answer: Self = decode(bytes)?;
        match &answer {
            Self::Refused { reason } | Self::Unknown { reason } => bounded("reason", reason)?,
            Self::Captured | Self::NotMeshed => {}
        }
        Ok(answer)
    }

    /// Of these all texts are short: what we say ourselves always fits.
    pub fn refused(reason: impl Into<String>) -> Self {
        Self::Refused {
            reason: shortened(reason.into(), MAX_REASON),
        }
    }

    pub fn unknown(reason: impl Into<String>) -> Self {
        Self::Unknown {
            reason: shortened(reason.into(), MAX_REASON),
        }
    }

    pub fn encode(&self) -> Vec<u8> {
        encode(self)
    }
}

fn encode(message: &impl Serialize) -> Vec<u8> {
    // Plain structs and strings: nothing in them can fail to become JSON.
    serde_json::to_vec(message).unwrap_or_default()
}

fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Malformed> {
    if bytes.len() > MAX_MESSAGE {
        let length = bytes.len();
        return Err(Malformed::TooLong { length });
    }
    serde_json::from_slice(bytes)
        .map_err(|error| Malformed::Garbage(shortened(error.to_string(), MAX_REASON)))
}

fn bounded(field: &'static str, text: &str) -> Result<(), Malformed> {
    let found = text.len();
    if found > MAX_TEXT {
        return Err(Malformed::TooMuch { field, found });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn question() -> Question {
        Question {
            protocol: PROTOCOL,
            ask: Ask::Add,
            namespace: "shop".into(),
            name: "cart-0".into(),
            uid: Some("8f4bd1ac-2f0c-4f2e-9b4e-0d6f5f7a3f11".into()),
            sandbox: "ab".repeat(32),
            netns: Some("/var/run/netns/cni-1".into()),
        }
    }

    fn answers() -> [Answer; 4] {
        [
            Answer::Captured,
            Answer::NotMeshed,
            Answer::refused("\u{1}".repeat(5_000)),
            Answer::unknown("ü".repeat(5_000)),
        ]
    }

    #[test]
    fn what_is_said_is_understood_and_fits() {
        let question = question();
        assert_eq!(Question::decode(&question.encode()), Ok(question));
        for answer in answers() {
            let bytes = answer.encode();
            assert!(bytes.len() <= MAX_MESSAGE, "{}", bytes.len());
            assert_eq!(Answer::decode(&bytes), Ok(answer));
        }
    }

    #[test]
    fn a_question_without_uid_is_one_and_fields_of_later_builds_are_passed_over() {
        let text =
            r#"{"protocol":1,"ask":"check","namespace":"a","name":"b","sandbox":"c","mood":1}"#;
        let question = Question::decode(text.as_bytes()).unwrap();
        assert_eq!((question.ask, question.uid), (Ask::Check, None));
    }

    #[test]
    fn truncated_garbage_and_oversize_are_refused_at_every_length() {
        let bytes = question().encode();
        for length in 0..bytes.len() {
            let cut = Question::decode(&bytes[..length]);
            assert!(matches!(cut, Err(Malformed::Garbage(_))), "cut to {length}");
        }
        for answer in answers() {
            let bytes = answer.encode();
            assert!(Answer::decode(&bytes[..bytes.len() - 1]).is_err());
        }
        let deep = "[".repeat(MAX_MESSAGE);
        assert!(matches!(
            Answer::decode(deep.as_bytes()),
            Err(Malformed::Garbage(_))
        ));
        let long = vec![b' '; MAX_MESSAGE + 1];
        assert!(matches!(
            Question::decode(&long),
            Err(Malformed::TooLong { .. })
        ));
    }

    #[test]
    fn another_protocol_and_long_texts_are_refused_by_name() {
        let mut other = question();
        other.protocol = 2;
        assert_eq!(
            Question::decode(&other.encode()),
            Err(Malformed::Protocol { found: 2 })
        );
        let mut long = question();
        long.name = "x".repeat(MAX_TEXT + 1);
        let error = Question::decode(&long.encode()).unwrap_err();
        assert!(error.to_string().starts_with("name has 4097"), "{error}");
        let reason = format!(r#"{{"answer":"unknown","reason":"{}"}}"#, "x".repeat(5_000));
        assert!(matches!(
            Answer::decode(reason.as_bytes()),
            Err(Malformed::TooMuch { .. })
        ));
    }
}

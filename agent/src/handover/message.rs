//! What the two agents say to each other, and how a packet is read: [`decode`] is pure, bounded and
//! believes nothing.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Grows when a message changes its meaning or a kind of file is added; new fields and new messages
/// do not need that.
pub const PROTOCOL: u16 = 2;
/// From this one on [`What::BpfLock`] is understood.
pub const KNOWS_BPF_LOCK: u16 = 2;
/// The oldest that is still spoken.
pub const OLDEST_PROTOCOL: u16 = 1;
/// An offer of 64 data threads in two families has about 7 KiB.
pub const MAX_MESSAGE: usize = 16 * 1024;
/// The kernel carries 253 files in one packet.
pub const MAX_FILES: usize = 250;
/// Of a text within a message.
const MAX_TEXT: usize = 1024;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "message", rename_all = "kebab-case")]
pub enum Message {
    /// The successor is here.
    Hello(Hello),
    /// What there is to have; the files travel beside it, in the same order.
    Offer(Offer),
    /// The successor has built everything it can build beforehand.
    Ready,
    /// The predecessor repairs nothing any more.
    Commit,
    /// The successor serves; the predecessor may go.
    Taken,
    /// No, and why. Whoever says it goes on as if nothing had been said.
    Refused { reason: String },
    /// A message that the speaker does not know.
    Unknown { of: String },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    pub protocol: u16,
    /// Of the build, for the log.
    pub version: String,
    /// The node it serves: two nodes' agents do not succeed each other.
    pub node: String,
    /// Of the pinned maps. Another layout has other maps, in which no listener can be swapped.
    pub layout: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    pub protocol: u16,
    pub version: String,
    /// How long the predecessor's connections may go on after `taken`.
    pub drain_milliseconds: u64,
    /// What each file is.
    pub files: Vec<What>,
}

/// What an open file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(tag = "file", rename_all = "kebab-case")]
pub enum What {
    /// The locked file of the run directory.
    Lock,
    /// The locked bpf directory.
    BpfLock,
    /// The listening socket of metrics and readiness.
    Metrics { address: SocketAddr },
    /// A listening socket of the tunnel port; there is one per data thread.
    Tunnels { address: SocketAddr },
}

/// Why a packet is no message.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Malformed {
    #[error("{length} bytes are more than the {MAX_MESSAGE} of the longest message")]
    TooLong { length: usize },
    /// Said by a newer agent, or by nobody we know.
    #[error("message {of:?} is not known to this version")]
    Unknown { of: String },
    #[error("no message: {0}")]
    Garbage(String),
    #[error("{field} is {found}, at most {limit} make sense")]
    OutOfBounds {
        field: &'static str,
        found: usize,
        limit: usize,
    },
}

impl Message {
    /// Its word on the wire, for logs.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Hello(_) => "hello",
            Self::Offer(_) => "offer",
            Self::Ready => "ready",
            Self::Commit => "commit",
            Self::Taken => "taken",
            Self::Refused { .. } => "refused",
            Self::Unknown { .. } => "unknown",
        }
    }

    /// Of these all texts are short: what we say ourselves always fits.
    pub fn refused(reason: impl Into<String>) -> Self {
        Self::Refused {
            reason: shortened(reason.into()),
        }
    }

    pub fn encode(&self) -> Vec<u8> {
        // Plain structs and strings: nothing in them can fail to become JSON.
        serde_json::to_vec(self).unwrap_or_default()
    }
}

const KNOWN: [&str; 7] = [
    "hello", "offer", "ready", "commit", "taken", "refused", "unknown",
];

/// Reads one packet.
pub fn decode(bytes: &[u8]) -> Result<Message, Malformed> {
    #[derive(Deserialize)]
    struct Named {
        message: String,
    }
    if bytes.len() > MAX_MESSAGE {
        return Err(Malformed::TooLong {
            length: bytes.len(),
        });
    }
    match serde_json::from_slice::<Message>(bytes) {
        Ok(message) => within_bounds(&message).map(|()| message),
        Err(error) => match serde_json::from_slice::<Named>(bytes) {
            Ok(Named { message }) if !KNOWN.contains(&message.as_str()) => {
                Err(Malformed::Unknown {
                    of: shortened(message),
                })
            }
            Ok(_) | Err(_) => Err(Malformed::Garbage(shortened(error.to_string()))),
        },
    }
}

fn within_bounds(message: &Message) -> Result<(), Malformed> {
    let text = |field, text: &str| bounded(field, text.len(), MAX_TEXT);
    match message {
        Message::Hello(hello) => {
            text("version", &hello.version)?;
            text("node", &hello.node)
        }
        Message::Offer(offer) => {
            text("version", &offer.version)?;
            bounded("files", offer.files.len(), MAX_FILES)
        }
        Message::Refused { reason } => text("reason", reason),
        Message::Unknown { of } => text("of", of),
        Message::Ready | Message::Commit | Message::Taken => Ok(()),
    }
}

fn bounded(field: &'static str, found: usize, limit: usize) -> Result<(), Malformed> {
    if found > limit {
        return Err(Malformed::OutOfBounds {
            field,
            found,
            limit,
        });
    }
    Ok(())
}

/// To a quarter of what a text may have: JSON can make much of a character.
fn shortened(mut text: String) -> String {
    let mut end = text.len().min(MAX_TEXT / 4);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer(tunnels: usize) -> Message {
        let address = "[2001:db8:1111:2222:3333:4444:5555:6666]:15008"
            .parse()
            .unwrap();
        let mut files = vec![What::Lock, What::BpfLock, What::Metrics { address }];
        files.extend((0..tunnels).map(|_| What::Tunnels { address }));
        Message::Offer(Offer {
            protocol: PROTOCOL,
            version: "0.1.0".into(),
            drain_milliseconds: 30_000,
            files,
        })
    }

    fn all() -> Vec<Message> {
        vec![
            Message::Hello(Hello {
                protocol: PROTOCOL,
                version: "0.1.0".into(),
                node: "node-1".into(),
                layout: 3,
            }),
            offer(128),
            Message::Ready,
            Message::Commit,
            Message::Taken,
            Message::refused("ü".repeat(5_000)),
            Message::Unknown {
                of: "\u{1}".repeat(255),
            },
        ]
    }

    #[test]
    fn what_is_said_is_understood_and_fits() {
        for message in all() {
            let bytes = message.encode();
            assert!(bytes.len() <= MAX_MESSAGE, "{}", message.name());
            assert_eq!(decode(&bytes), Ok(message));
        }
    }

    #[test]
    fn every_message_is_known_by_its_name() {
        let names: Vec<_> = all().iter().map(Message::name).collect();
        assert_eq!(names, KNOWN);
        for message in all() {
            let name = format!("\"message\":\"{}\"", message.name());
            assert!(String::from_utf8_lossy(&message.encode()).contains(&name));
        }
    }

    #[test]
    fn a_message_of_a_later_version_is_named_and_its_fields_are_passed_over() {
        assert_eq!(
            decode(br#"{"message":"borrow","what":7}"#),
            Err(Malformed::Unknown {
                of: "borrow".into()
            })
        );
        let more = br#"{"message":"ready","mood":"good"}"#;
        assert_eq!(decode(more), Ok(Message::Ready));
    }

    #[test]
    fn truncated_garbage_and_oversize_are_refused_at_every_length() {
        for message in all() {
            let bytes = message.encode();
            for length in 0..bytes.len() {
                assert!(
                    matches!(decode(&bytes[..length]), Err(Malformed::Garbage(_))),
                    "{} cut to {length}",
                    message.name()
                );
            }
        }
        for garbage in [&b"\0"[..], b"[]", b"{}", b"{\"message\":7}", &[0xff; 64]] {
            assert!(matches!(decode(garbage), Err(Malformed::Garbage(_))));
        }
        let deep = "[".repeat(MAX_MESSAGE);
        assert!(matches!(
            decode(deep.as_bytes()),
            Err(Malformed::Garbage(_))
        ));
        let long = vec![b' '; MAX_MESSAGE + 1];
        assert!(matches!(decode(&long), Err(Malformed::TooLong { .. })));
    }

    #[test]
    fn more_files_than_the_kernel_carries_and_long_texts_are_refused() {
        let many = r#"{"file":"lock"},"#.repeat(MAX_FILES);
        let offer = format!(
            r#"{{"message":"offer","protocol":1,"version":"1","drain_milliseconds":1,"files":[{many}{{"file":"lock"}}]}}"#
        );
        assert!(matches!(
            decode(offer.as_bytes()),
            Err(Malformed::OutOfBounds { field: "files", .. })
        ));
        let reason = "x".repeat(MAX_TEXT + 1);
        let refused = format!(r#"{{"message":"refused","reason":"{reason}"}}"#);
        assert!(matches!(
            decode(refused.as_bytes()),
            Err(Malformed::OutOfBounds {
                field: "reason",
                ..
            })
        ));
    }
}

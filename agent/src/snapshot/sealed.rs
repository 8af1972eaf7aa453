//! The wrapping of a snapshot: one line that says what it is and whose, then the body.

use std::fmt::Write as _;

use aws_lc_rs::digest;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::MAX_BYTES;

/// Grows when the meaning of anything in a snapshot changes.
const VERSION: u32 = 1;
/// The first line is shorter than this.
const MAX_HEAD: usize = 4096;

/// When and for whom it was written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// The kernel's id of this boot.
    pub boot: String,
    pub node: String,
    pub trust_domain: String,
    /// Where its content came from: the manifests' directory, or the authority's.
    pub source: String,
}

/// Why a snapshot does not count.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Unusable {
    #[error("is no snapshot, or was cut off")]
    Garbled,
    #[error("is of version {found} of the format, this is {VERSION}")]
    Version { found: u32 },
    #[error("{what} is {found:?} there and {wanted:?} here")]
    Foreign {
        what: &'static str,
        found: String,
        wanted: String,
    },
    #[error("its checksum does not match: it is damaged")]
    Damaged,
    #[error("the kernel does not tell which boot this is, so it may be of another")]
    NoBoot,
    #[error("is longer than {MAX_BYTES} bytes")]
    TooLong,
}

#[derive(Serialize, Deserialize)]
struct Head {
    version: u32,
    #[serde(flatten)]
    origin: Origin,
    bytes: usize,
    sha256: String,
}

pub fn seal(origin: &Origin, body: &[u8]) -> Vec<u8> {
    let head = Head {
        version: VERSION,
        origin: origin.clone(),
        bytes: body.len(),
        sha256: checksum(body),
    };
    // Plain numbers and strings cannot fail to become JSON.
    let mut sealed = serde_json::to_vec(&head).unwrap_or_default();
    sealed.push(b'\n');
    sealed.extend_from_slice(body);
    sealed
}

/// The body, if everything about it is as it should be.
pub fn open<'a>(sealed: &'a [u8], wanted: &Origin) -> Result<&'a [u8], Unusable> {
    #[derive(Deserialize)]
    struct Version {
        version: u32,
    }
    if sealed.len() > MAX_BYTES {
        return Err(Unusable::TooLong);
    }
    // Two boots of which nobody knows anything are not the same.
    if wanted.boot.is_empty() {
        return Err(Unusable::NoBoot);
    }
    let end = sealed
        .iter()
        .take(MAX_HEAD)
        .position(|byte| *byte == b'\n')
        .ok_or(Unusable::Garbled)?;
    let (head, body) = (&sealed[..end], &sealed[end + 1..]);
    // The version alone first: another one's head may look otherwise.
    let garbled = |_| Unusable::Garbled;
    let Version { version: found } = serde_json::from_slice(head).map_err(garbled)?;
    if found != VERSION {
        return Err(Unusable::Version { found });
    }
    let head: Head = serde_json::from_slice(head).map_err(garbled)?;
    let found = &head.origin;
    for (what, found, wanted) in [
        ("the boot", &found.boot, &wanted.boot),
        ("the node", &found.node, &wanted.node),
        (
            "the trust domain",
            &found.trust_domain,
            &wanted.trust_domain,
        ),
        ("its source", &found.source, &wanted.source),
    ] {
        if found != wanted {
            return Err(Unusable::Foreign {
                what,
                found: found.clone(),
                wanted: wanted.clone(),
            });
        }
    }
    if head.bytes != body.len() {
        return Err(Unusable::Garbled);
    }
    if head.sha256 != checksum(body) {
        return Err(Unusable::Damaged);
    }
    Ok(body)
}

fn checksum(body: &[u8]) -> String {
    hex(digest::digest(&digest::SHA256, body).as_ref())
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

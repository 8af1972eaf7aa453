//! One field that cannot be read, and the readers of small values that several kinds share.

use std::net::IpAddr;

use ipnet::IpNet;

/// Of a value or a path: enough to find it.
const MAX_SHOWN: usize = 128;

/// Says where, what stands there, and what to write instead.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {value:?} {problem}; {remedy}")]
pub struct FieldError {
    /// Path within the object, e.g. `spec.ports[0].port`.
    pub field: String,
    pub value: String,
    pub problem: String,
    pub remedy: String,
}

impl FieldError {
    pub(crate) fn new(
        field: impl Into<String>,
        value: impl ToString,
        problem: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self {
            field: shown(field.into()),
            value: shown(value.to_string()),
            problem: problem.into(),
            remedy: remedy.into(),
        }
    }

    /// As the parser tells it, who repeats what stands there.
    pub(super) fn misfit(field: String, problem: String) -> Self {
        Self {
            field: shown(field),
            value: String::new(),
            problem: shown(problem),
            remedy: "correct it, or delete the object".into(),
        }
    }

    pub(crate) fn missing(field: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::new(field, "", "is missing", remedy)
    }
}

/// Its author may have written megabytes, and this is kept, logged and sent.
fn shown(mut text: String) -> String {
    if let Some((end, _)) = text.char_indices().nth(MAX_SHOWN) {
        text.truncate(end);
        text.push('…');
        text.shrink_to_fit();
    }
    text
}

pub(super) fn port(field: impl Into<String>, number: i32) -> Result<u16, FieldError> {
    match u16::try_from(number) {
        Ok(port) if port != 0 => Ok(port),
        Ok(_) | Err(_) => Err(FieldError::new(
            field,
            number,
            "is not a port",
            "write a number from 1 to 65535",
        )),
    }
}

pub(super) fn ip(field: impl Into<String>, text: &str) -> Result<IpAddr, FieldError> {
    text.parse::<IpAddr>()
        .map(|ip| ip.to_canonical())
        .map_err(|_| {
            FieldError::new(
                field,
                text,
                "is not an IP address",
                "write an IPv4 or IPv6 address",
            )
        })
}

/// A network, or a single address as Linkerd allows.
pub(super) fn network(field: impl Into<String>, text: &str) -> Result<IpNet, FieldError> {
    text.parse::<IpNet>()
        .or_else(|_| text.parse::<IpAddr>().map(IpNet::from))
        .map_err(|_| {
            FieldError::new(
                field,
                text,
                "is not a network",
                "write one like 10.0.0.0/8 or fd00::/8",
            )
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_of_a_value_is_bounded() {
        let long = "ü".repeat(1_000_000);
        let error = ip(long.clone(), &long).unwrap_err();
        assert_eq!(error.value.chars().count(), MAX_SHOWN + 1);
        assert!(error.field.ends_with('…') && error.value.ends_with('…'));
        assert!(error.to_string().len() < 1000);
        assert_eq!(ip("spec.ip", "nowhere").unwrap_err().value, "nowhere");
    }
}

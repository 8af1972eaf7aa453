//! One fixed word for each way a handshake fails, and a sentence for people.
//!
//! `proxy` writes it into metrics and the access log, `manager` and `ca` into their errors. Words
//! that begin with `refused_` are what the other side said of us.

use std::io;

use rustls::{AlertDescription, CertificateError, Error, OtherError};

use super::PeerError;

/// The fixed word for a failed handshake, for metrics and logs.
pub fn handshake_reason(error: &io::Error) -> &'static str {
    if let Some(error) = error.get_ref().and_then(|inner| inner.downcast_ref()) {
        return tls_reason(error);
    }
    // `ErrorKind` is open; the rest is "io".
    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "std may add kinds at any time"
    )]
    match error.kind() {
        io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe => "closed",
        io::ErrorKind::ConnectionReset | io::ErrorKind::ConnectionAborted => "reset",
        io::ErrorKind::ConnectionRefused => "connect_refused",
        io::ErrorKind::TimedOut => "timeout",
        _ => "io",
    }
}

/// What was wrong with a handshake, for people: rustls' own words show our types' insides.
pub fn handshake_sentence(error: &io::Error) -> String {
    let tls = error.get_ref().and_then(|inner| inner.downcast_ref());
    tls.and_then(certificate_sentence)
        .unwrap_or_else(|| error.to_string())
}

/// `None`: rustls says it well enough.
#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "rustls' enums are non-exhaustive; the rest keeps rustls' words"
)]
fn certificate_sentence(error: &Error) -> Option<String> {
    let certificate = match error {
        Error::InvalidCertificate(why) => why,
        Error::NoCertificatesPresented => return Some(PeerError::NoCertificate.to_string()),
        _ => return None,
    };
    Some(match certificate {
        CertificateError::ExpiredContext { time, not_after } => {
            let ago = time.as_secs().saturating_sub(not_after.as_secs());
            format!("the peer's certificate ended {ago} s ago; is its clock right, and ours?")
        }
        CertificateError::NotValidYetContext { time, not_before } => {
            let left = not_before.as_secs().saturating_sub(time.as_secs());
            format!("the peer's certificate begins in {left} s; is its clock right, and ours?")
        }
        CertificateError::UnknownIssuer => {
            "the peer's certificate is of a CA that our trust bundle does not have".into()
        }
        CertificateError::BadSignature => {
            "the peer's certificate is not signed by the CA that it names".into()
        }
        CertificateError::Other(OtherError(inner)) => {
            inner.downcast_ref::<PeerError>()?.to_string()
        }
        _ => return None,
    })
}

/// The fixed word for a TLS error; see [`handshake_reason`].
#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "rustls' enums are non-exhaustive; everything unnamed is one word"
)]
pub fn tls_reason(error: &Error) -> &'static str {
    match error {
        Error::InvalidCertificate(why) => certificate_reason(why),
        Error::NoCertificatesPresented => "no_certificate",
        Error::AlertReceived(alert) => match alert {
            // What a peer of ours says when it has no certificate for the SNI.
            AlertDescription::AccessDenied => "refused_access",
            AlertDescription::CertificateExpired => "refused_expired",
            AlertDescription::UnknownCA => "refused_foreign_ca",
            AlertDescription::CertificateRequired => "refused_no_certificate",
            _ => "refused_by_peer",
        },
        Error::PeerIncompatible(_) | Error::NoApplicationProtocol => "incompatible",
        Error::PeerMisbehaved(_)
        | Error::InappropriateMessage { .. }
        | Error::InappropriateHandshakeMessage { .. }
        | Error::DecryptError
        | Error::PeerSentOversizedRecord => "misbehaved",
        Error::InvalidMessage(_) => "not_tls",
        // rustls has no variant of its own for "the resolver returned nothing"; a test holds this.
        Error::General(text) if text == "no server certificate chain resolved" => {
            "unknown_server_name"
        }
        _ => "tls",
    }
}

#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "rustls' enum is non-exhaustive; everything unnamed is one word"
)]
fn certificate_reason(why: &CertificateError) -> &'static str {
    match why {
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => "expired",
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            "not_yet_valid"
        }
        CertificateError::UnknownIssuer => "foreign_ca",
        CertificateError::BadSignature => "bad_signature",
        CertificateError::BadEncoding => "malformed_certificate",
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
            "wrong_purpose"
        }
        CertificateError::Other(OtherError(inner)) => {
            inner.downcast_ref().map_or("bad_certificate", peer_reason)
        }
        _ => "bad_certificate",
    }
}

fn peer_reason(why: &PeerError) -> &'static str {
    match why {
        PeerError::NoCertificate => "no_certificate",
        PeerError::Malformed(_) => "malformed_certificate",
        PeerError::NotOneUri(_) => "not_one_uri",
        PeerError::NotAWorkload(_) => "not_a_workload",
        PeerError::WrongIdentity { .. } => "wrong_identity",
        PeerError::WrongTrustDomain { .. } => "wrong_trust_domain",
    }
}

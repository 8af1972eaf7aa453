//! One fixed word for each way a handshake fails.
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

//! Who we are: keys, certificates and the TLS configurations made of them.
//!
//! One X.509 SVID per service account with a meshed pod on this node. Keys are made here and never
//! leave the node; the next agent of this boot finds them in memory ([`Held`]). [`Signer`] is the only way to a certificate: in local mode [`ca`] signs in
//! the process, on a cluster the controller and signer do, through the same trait.
#![forbid(unsafe_code)]

pub mod authority;
pub mod awaited;
pub mod ca;
pub mod clock;
pub mod csr;
pub mod manager;
mod schedule;
pub mod spiffe;
#[cfg(test)]
mod testing;
pub mod tls;

use std::{collections::BTreeSet, future::Future, pin::Pin, sync::Arc, time::SystemTime};

use rustls::pki_types::CertificateDer;
use tokio::sync::watch;

use crate::state::Identity;

pub use manager::{Held, Identities, NoCertificate, Settings};
pub use spiffe::{parse_spiffe_id, server_name};
pub use tls::{Peer, handshake_reason, handshake_sentence, peer, peer_identity, tls_reason};

/// Trust anchors; old and new ones while a bundle rotates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bundle {
    pub anchors: Vec<CertificateDer<'static>>,
}

/// A signed certificate: leaf first, then intermediates.
#[derive(Clone, Debug)]
pub struct Signed {
    pub chain: Vec<CertificateDer<'static>>,
}

/// Turns a certificate signing request into a certificate.
pub trait Signer: Send + Sync + 'static {
    /// The same `csr` may come again, after [`SignError::Unanswered`] or when nobody waited any
    /// longer; then it is the same request. It is DER, made by [`csr`]; the signer believes only its public key and decides the rest.
    fn sign<'a>(
        &'a self,
        identity: &'a Identity,
        csr: Vec<u8>,
    ) -> Pin<Box<dyn Future<Output = Result<Signed, SignError>> + Send + 'a>>;

    /// The trust bundle in force, and every later one.
    fn bundle(&self) -> watch::Receiver<Arc<Bundle>>;
}

#[derive(Debug, thiserror::Error)]
pub enum SignError {
    /// Asking again later may help.
    #[error("the signer cannot sign now: {0}")]
    Unavailable(String),
    /// It may be answered yet: asking the same again goes on with it.
    #[error("no certificate yet: {0}")]
    Unanswered(String),
    /// Asking again will not help.
    #[error("the signer refused the request for {identity}: {reason}")]
    Refused { identity: Identity, reason: String },
}

/// The identities that should be held now (service accounts with a meshed pod on this node).
pub type Wanted = BTreeSet<Identity>;

/// For `debug certificates` and the expiry metric.
#[derive(Clone, Debug, serde::Serialize)]
pub struct CertificateStatus {
    pub identity: String,
    /// `ready`, `pending`, `expired`.
    pub state: &'static str,
    pub serial: String,
    pub not_before: Option<SystemTime>,
    pub not_after: Option<SystemTime>,
    /// When the next renewal is due.
    pub renew_at: Option<SystemTime>,
    pub renewals: u64,
    pub last_error: Option<String>,
    /// The last answer was no.
    pub refused: bool,
}

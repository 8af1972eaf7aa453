//! Holds a valid certificate for every identity that is wanted, and renews it in time.

use std::sync::Arc;

use crate::state::Identity;

use super::{CertificateStatus, Wanted};

/// Shared handle; cheap to clone.
#[derive(Clone)]
pub struct Identities {}

/// There is no usable certificate for the identity now.
#[derive(Debug, thiserror::Error)]
#[error("no certificate for {identity} yet: {reason}")]
pub struct NoCertificate {
    pub identity: Identity,
    pub reason: String,
}

impl Identities {
    /// For a tunnel as `source` to a server that must prove to be `server` (exactly that SPIFFE
    /// URI, nothing else is looked at). ALPN is set to `alpn`. The same `Arc` comes back until
    /// certificate or bundle change, so that sessions can be pooled by it.
    pub fn client_config(
        &self,
        _source: &Identity,
        _server: &Identity,
    ) -> Result<Arc<rustls::ClientConfig>, NoCertificate> {
        unreachable!("written by the room's owner")
    }

    /// For the node's tunnel port: picks the certificate by SNI among the identities we hold,
    /// demands and verifies the client's certificate.
    pub fn server_config(&self) -> Arc<rustls::ServerConfig> {
        unreachable!("written by the room's owner")
    }

    /// For HBONE to a pod's own address: serves `identity` whatever the SNI says.
    pub fn server_config_for(&self, _identity: &Identity) -> Result<Arc<rustls::ServerConfig>, NoCertificate> {
        unreachable!("written by the room's owner")
    }

    /// Which of our identities a client asked for by this SNI.
    pub fn by_server_name(&self, _sni: &str) -> Option<Identity> {
        unreachable!("written by the room's owner")
    }

    pub fn set_wanted(&self, _wanted: Wanted) {
        unreachable!("written by the room's owner")
    }

    pub fn status(&self) -> Vec<CertificateStatus> {
        unreachable!("written by the room's owner")
    }
}

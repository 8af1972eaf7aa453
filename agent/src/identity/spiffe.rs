//! SPIFFE IDs and the server names made of them.

use rustls::pki_types::ServerName;

use crate::state::Identity;

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{uri:?} is not spiffe://<trust-domain>/ns/<namespace>/sa/<service-account>")]
pub struct NotAWorkload {
    pub uri: String,
}

pub fn parse_spiffe_id(_uri: &str) -> Result<Identity, NotAWorkload> {
    unreachable!("written by the room's owner")
}

/// `hex(SHA-256(identity))[..32].id.picomesh.internal`: SNI cannot hold a URI.
pub fn server_name(_identity: &Identity) -> ServerName<'static> {
    unreachable!("written by the room's owner")
}

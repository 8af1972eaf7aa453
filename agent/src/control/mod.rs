//! Certificates on a cluster, the agent's side: requests for them go out as
//! CertificateSigningRequests, and the anchors that vouch for everybody come from a ConfigMap.
//!
//! [`requests`] implements `identity`'s signing trait, [`roots`] follows the anchors. Who approves
//! and who signs are other processes, with other rights. The agent may create and read requests
//! and cannot delete any: those that are finished are collected by the controller.
#![forbid(unsafe_code)]

pub mod requests;
pub mod roots;

pub use requests::ClusterSigner;

/// Whom our requests are for.
pub const SIGNER: &str = "picomesh.io/workload";
/// The ConfigMap of anchors, and its key: PEM, old and new ones while they are changed.
pub const TRUST_ROOTS: &str = "picomesh-trust-roots";
pub const TRUST_ROOTS_KEY: &str = "ca.crt";

#[cfg(test)]
mod tests;

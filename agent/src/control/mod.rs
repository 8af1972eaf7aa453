//! Certificates on a cluster: requests for them go out as CertificateSigningRequests, and the
//! anchors that vouch for everybody come from a ConfigMap.
//!
//! Three processes with three accounts, and what each of them may do the others may not:
//!
//! | who | module | does |
//! | --- | --- | --- |
//! | agent | [`requests`], [`roots`] | implements `identity`'s signing trait: makes requests, reads answers, follows the anchors |
//! | controller | [`controller`] | knows who runs where; approves, denies with a reason, collects what is finished |
//! | signer | [`signer`] | alone reads the authority's key; keeps it, signs what is approved, keeps the anchors |
//!
//! What a request must look like is said once, in [`ask`]. Controller and signer run twice, and
//! whoever has the [`lease`] acts.
#![forbid(unsafe_code)]

pub mod ask;
pub mod controller;
pub mod counts;
mod feed;
pub mod lease;
pub mod requests;
pub mod roots;
pub mod signer;

pub use requests::ClusterSigner;

/// Whom our requests are for.
pub const SIGNER: &str = "picomesh.io/workload";
/// The service account of the agents.
pub const AGENT: &str = "picomesh-agent";
/// The ConfigMap of anchors, and its key: PEM, old and new ones while they are changed.
pub const TRUST_ROOTS: &str = "picomesh-trust-roots";
pub const TRUST_ROOTS_KEY: &str = "ca.crt";

#[cfg(test)]
mod tests;

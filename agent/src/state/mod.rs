//! What we know of the mesh, and the questions it answers. Plain types: no IO, no async, no clock,
//! no Kubernetes types; time and randomness are arguments.
//!
//! [`objects`] are the cluster's objects as `k8s::convert` hands them over. [`Mesh::build`] turns
//! all of them into one immutable, indexed [`Mesh`]; the only writer publishes it through a
//! [`MeshStore`], and every data thread reads its current `Arc` without a lock. Then
//! [`resolve`] says where an address leads, [`policy`] who may come in, [`network_policy`] what
//! Kubernetes lets in and out, [`balance`] which endpoint; [`explain`] tells people why.
//!
//! A rebuild costs time in proportion to the number of objects (1,000 pods behind 200 Services: see
//! the test in `tests.rs`); bursts of changes are gathered before one is started. In return no reader ever sees half an
//! update, and nothing needs to be undone.
#![forbid(unsafe_code)]

pub mod balance;
mod describe;
mod endpoints;
pub mod explain;
mod frontends;
pub mod mesh;
pub mod names;
pub mod network_policy;
pub mod objects;
pub mod policy;
pub mod resolve;
mod servers;
mod store;

pub use mesh::{Mesh, Problem, Workload};
pub use names::{Identity, ObjectKey, PodUid};
pub use store::MeshStore;

#[cfg(test)]
mod tests;

//! The cluster comes in: Kubernetes objects become the plain types of `state`.
//!
//! [`convert`] reads the kinds that Kubernetes defines, [`network_policy`] its NetworkPolicy,
//! [`policy`] the kinds of `policy.linkerd.io`, [`words`] the labels and annotations that speak to us. Called by `local` with what stands in
//! files. Conversion of one object may fail and says which field, what stands there and what should;
//! it never looks at another object, and never at the network or the clock.
#![forbid(unsafe_code)]

pub mod client;
pub mod convert;
pub mod crd;
pub mod events;
mod field;
mod foreign;
pub mod network_policy;
mod object;
pub mod policy;
pub mod read;
pub mod removal;
mod resources;
mod share;
mod stand_in;
pub mod status;
pub mod watch;
pub mod words;

pub use convert::Converter;
pub use field::FieldError;
pub use object::Seen;

//! Builders for tests.

#[cfg(test)]
pub(crate) mod api;
#[cfg(test)]
pub(crate) mod counted;
pub mod large;
pub mod manifests;

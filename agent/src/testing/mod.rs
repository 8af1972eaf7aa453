//! Builders for tests.

#[cfg(test)]
pub(crate) mod api;
pub mod manifests;

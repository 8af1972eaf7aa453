//! Builders for tests.

pub mod manifests;

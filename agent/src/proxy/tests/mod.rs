//! The room as a whole, in process: real TLS, real sockets, two nodes.
//!
//! See [`world`] for how two nodes fit into one process. Making network namespaces needs root;
//! without it each test says that it was skipped, and `cargo xtask test` counts that.

mod attacks;
mod ends;
mod floods;
mod network_policy;
mod policy;
mod relay;
mod tunnels;
mod world;

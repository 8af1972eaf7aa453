//! A cluster on one machine: nodes and pods as network namespaces, real agents, real programs.
//!
//! The tiers `bpf` and `mesh`, `cargo xtask demo` and `cargo xtask bench` build on it. It knows
//! the agent only as a program with a command line: nothing of the agent's library is linked
//! here, so the world compiles in seconds and cannot see more than a user sees.
//!
//! [`cluster`] is the same with Kubernetes: a real API server, kubelets and containers, from images
//! that [`image`] writes. The tier `k8s` and `cargo xtask cluster` build on that.
//!
//! Read [`world`] first; [`netns`], [`process`] and [`reaper`] are what it stands on,
//! [`manifest`] and [`agent`] what runs the mesh, [`client`], [`server`] and [`program`] what
//! talks through it, [`load`], [`crowd`] and [`calls`] what goes on meanwhile, [`capture`], [`hooks`] and [`raw`] what looks
//! at the wire and the kernel and forges frames.
pub mod agent;
pub mod calls;
pub mod capture;
mod cgroups;
pub mod client;
pub mod cluster;
pub mod crowd;
pub mod frames;
pub mod hooks;
pub mod image;
pub mod load;
pub mod manifest;
pub mod metrics;
pub mod netns;
pub mod process;
pub mod program;
pub mod raw;
pub mod reaper;
pub mod requirements;
pub mod server;
pub mod wait;
pub mod world;

pub use agent::{Agent, AgentOptions};
pub use netns::Netns;
pub use world::{Node, Pod, PodSpec, Service, ServiceSpec, World};

/// Set by `cargo xtask test --full`: tests that have a long version play that.
pub const FULL: &str = "PICOMESH_TEST_FULL";

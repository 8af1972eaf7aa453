//! The user half of picomesh: one agent per node.
//!
//! The rooms, in the order of the data's way. A room knows those before it and the plain types of
//! `state`; `app` alone knows all of them and wires them together.
//!
//! 1. [`k8s`] turns Kubernetes objects into plain types; [`local`] feeds it from a directory.
//! 2. [`state`] holds what we know and answers: who is it, where to, may it.
//! 3. [`identity`] holds who we are: keys, certificates, TLS configurations.
//! 4. [`datapath`] tells the kernel: programs, devices, listeners, sockets in pods.
//! 5. [`proxy`] lives a connection's story.
//! 6. [`metrics`], [`access_log`], [`admin`] show what happened.
//! 7. [`handover`] leaves all that to the next agent, in [`packets`].
pub mod access_log;
pub mod admin;
pub mod allocator;
pub mod app;
pub mod config;
pub mod datapath;
pub mod drain;
pub mod handover;
pub mod identity;
pub mod k8s;
pub mod local;
pub mod metrics;
pub mod packets;
pub mod places;
pub mod proxy;
pub mod readiness;
pub mod snapshot;
pub mod state;
pub mod telemetry;
#[cfg(any(test, feature = "testing"))]
pub mod testing;

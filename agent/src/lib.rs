//! The user half of picomesh: one agent per node.
//!
//! The rooms, in the order of the data's way. A room knows those before it and the plain types of
//! `state`; `app` alone knows all of them and wires them together.
//!
//! 1. [`k8s`] watches the API server and turns its objects into plain types; [`local`] feeds them
//!    from a directory.
//! 2. [`state`] holds what we know and answers: who is it, where to, may it.
//! 3. [`identity`] holds who we are: keys, certificates, TLS configurations; [`control`] asks the
//!    cluster's signer for them.
//! 4. [`datapath`] tells the kernel: programs, devices, listeners, sockets in pods.
//! 5. [`proxy`] lives a connection's story.
//! 6. [`metrics`], [`access_log`], [`admin`] show what happened.
//! 7. [`handover`] leaves all that to the next agent.
//!
//! [`cni`] finds pods. With [`packets`] it is all there is without the feature `agent`: the CNI
//! plugin is built of these two alone.
#[cfg(feature = "agent")]
pub mod access_log;
#[cfg(feature = "agent")]
pub mod admin;
#[cfg(feature = "agent")]
pub mod allocator;
#[cfg(feature = "agent")]
pub mod app;
pub mod cni;
#[cfg(feature = "agent")]
pub mod config;
#[cfg(feature = "agent")]
pub mod control;
#[cfg(feature = "agent")]
pub mod datapath;
#[cfg(feature = "agent")]
pub mod drain;
#[cfg(feature = "agent")]
pub mod handover;
#[cfg(feature = "agent")]
pub mod identity;
#[cfg(feature = "agent")]
pub mod k8s;
#[cfg(feature = "agent")]
pub mod local;
#[cfg(feature = "agent")]
pub mod metrics;
pub mod packets;
#[cfg(feature = "agent")]
pub mod places;
#[cfg(feature = "agent")]
pub mod proxy;
#[cfg(feature = "agent")]
pub mod readiness;
#[cfg(feature = "agent")]
pub mod snapshot;
#[cfg(feature = "agent")]
pub mod state;
#[cfg(feature = "agent")]
pub mod telemetry;
#[cfg(all(feature = "agent", any(test, feature = "testing")))]
pub mod testing;

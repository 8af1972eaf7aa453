//! The contract between picomesh's kernel half (`ebpf`) and its user half (`agent`).
//!
//! Everything both sides must agree on stands here once: what lies in the maps, which number means
//! which refusal, which device has which index. The crate depends on nothing, so that it compiles
//! for the kernel; the feature `user` adds the markers that `aya` wants before it writes a value
//! into a map.
//!
//! Byte order: addresses and ports are kept as they are on the wire (network order, as byte
//! arrays). Constructors take `core::net` types, so nobody swaps bytes by hand.
#![no_std]

pub mod addr;
pub mod config;
pub mod flow;
pub mod pod;
pub mod verdict;

pub use addr::Addr;
pub use flow::{ProbeKey, ProbeState, StandingKey, Tuple};
pub use pod::{PodConfig, PortRange};
pub use verdict::Counter;

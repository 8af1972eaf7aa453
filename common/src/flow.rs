//! Keys and values of the per-connection maps.

use core::net::SocketAddr;

use crate::Addr;

/// A TCP connection as the pod's own socket names it: local is the pod's end.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tuple {
    pub local: Addr,
    pub remote: Addr,
    /// Network byte order.
    pub local_port: [u8; 2],
    /// Network byte order.
    pub remote_port: [u8; 2],
}

const _: () = assert!(size_of::<Tuple>() == 36);

impl Tuple {
    pub fn new(local: SocketAddr, remote: SocketAddr) -> Self {
        Self {
            local: local.ip().into(),
            remote: remote.ip().into(),
            local_port: local.port().to_be_bytes(),
            remote_port: remote.port().to_be_bytes(),
        }
    }
}

/// Key of `STANDING`: a connection of the pod in `slot` that stood before the pod was enrolled.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StandingKey {
    pub slot: u32,
    pub tuple: Tuple,
}

const _: () = assert!(size_of::<StandingKey>() == 40);

/// Key of `PROBES`: a connection that a socket of the host dials to the pod in `slot`. The tuple
/// is seen from the pod: `local` is the pod's end.
pub type ProbeKey = StandingKey;

/// Value of `PROBES`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProbeState {
    /// `bpf_ktime_get_ns` when this phase began.
    pub since_ns: u64,
    /// [`ProbeState::DIALLING`], [`ProbeState::ESTABLISHED`] or [`ProbeState::CLOSING`].
    pub phase: u32,
    pub _pad: u32,
}

const _: () = assert!(size_of::<ProbeState>() == 16);

impl ProbeState {
    /// The host's SYN may pass, for [`ProbeState::LIFE_NS`].
    pub const DIALLING: u32 = 1;
    /// The host's socket stands: no SYN passes any more, other packets do until it closes.
    pub const ESTABLISHED: u32 = 2;
    /// The host's socket is closed. What it sent last (a kubelet's TCP probe ends with RST, and the
    /// kernel reports the close before it sends that) still reaches the application's socket that
    /// was made for it, for [`ProbeState::LIFE_NS`]. Nobody can open anything with it.
    pub const CLOSING: u32 = 3;
    /// How long an entry counts that waits for something.
    pub const LIFE_NS: u64 = 10_000_000_000;
}

#[cfg(feature = "user")]
mod user {
    use super::{ProbeState, StandingKey, Tuple};
    // SAFETY: `repr(C)`, no padding (sizes asserted above), every bit pattern is valid.
    unsafe impl aya::Pod for Tuple {}
    // SAFETY: as above.
    unsafe impl aya::Pod for StandingKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for ProbeState {}
}

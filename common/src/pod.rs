//! What the programs must know of one enrolled pod: value of the array `PODS`, index = slot.

/// An inclusive range of ports, host byte order. `first > last` is an unused place.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortRange {
    pub first: u16,
    pub last: u16,
}

impl PortRange {
    pub const UNUSED: Self = Self { first: 1, last: 0 };

    #[inline(always)]
    pub const fn contains(&self, port: u16) -> bool {
        self.first <= port && port <= self.last
    }
}

/// Skip ranges per direction; more are refused with the annotation's name when the pod is read.
pub const MAX_SKIP_RANGES: usize = 16;

#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PodConfig {
    /// Bits below.
    pub flags: u32,
    /// Destination ports of the pod's own connections that are never captured.
    pub skip_outbound: [PortRange; MAX_SKIP_RANGES],
    /// Ports of the pod whose clients are never captured.
    pub skip_inbound: [PortRange; MAX_SKIP_RANGES],
}

const _: () = assert!(size_of::<PodConfig>() == 4 + 2 * 4 * MAX_SKIP_RANGES);

impl PodConfig {
    /// The slot is in use. Without it the programs drop every TCP packet (fail closed).
    pub const ACTIVE: u32 = 1 << 0;
    /// The dump of standing connections is not finished: connections nobody knows pass.
    pub const ENROLLING: u32 = 1 << 1;
    /// Explicit setting of the user: without a listener, packets pass instead of being dropped.
    pub const FAIL_OPEN: u32 = 1 << 2;
    /// Un-enrolment has begun: no new connection is captured, those that are ours finish.
    pub const LEAVING: u32 = 1 << 3;

    pub const EMPTY: Self = Self {
        flags: 0,
        skip_outbound: [PortRange::UNUSED; MAX_SKIP_RANGES],
        skip_inbound: [PortRange::UNUSED; MAX_SKIP_RANGES],
    };
}

#[cfg(feature = "user")]
// SAFETY: `repr(C)`, no padding (size asserted above), every bit pattern is valid.
unsafe impl aya::Pod for PodConfig {}

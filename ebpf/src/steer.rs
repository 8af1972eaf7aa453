//! sk_lookup of a pod's netns: which listener gets a connection that tc redirected.
//!
//! The hook sees neither mark nor netns cookie, and over lo it reports the interface a packet
//! really came through. So a captured packet is known by the device it arrives at: mesh0 and mesh1
//! carry nothing else.

use aya_ebpf::programs::SkLookupContext;
use picomesh_common::{
    Counter,
    config::{INBOUND, MESH0_IFINDEX, MESH1_IFINDEX, OUTBOUND, V4, V6, rule},
};

use crate::maps::{LISTENERS, Slot, count, listener_place, rule};

const AF_INET: u32 = 2;

/// Selects our listener if the packet is a captured one. False: it must be dropped.
#[inline(always)]
pub(crate) fn find(ctx: &SkLookupContext) -> bool {
    // SAFETY: fields of the context, read before anything branches.
    let (device, family) = unsafe {
        (
            core::ptr::read_volatile(&raw const (*ctx.lookup).ingress_ifindex),
            core::ptr::read_volatile(&raw const (*ctx.lookup).family),
        )
    };
    let direction = if device == MESH0_IFINDEX {
        OUTBOUND
    } else if device == MESH1_IFINDEX {
        INBOUND
    } else {
        return true;
    };
    let family = if family == AF_INET { V4 } else { V6 };
    let slot = Slot::own();
    if LISTENERS
        .redirect_sk_lookup(ctx, listener_place(slot, direction, family), 0)
        .is_ok()
    {
        return true;
    }
    count(slot, Counter::SteeredNowhere);
    // Without us the kernel would go on to the application's listener.
    !rule(rule::STEER_OR_DROP)
}

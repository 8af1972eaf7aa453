//! A verdict, and how it is carried out.

use aya_ebpf::{
    bindings::{BPF_F_INGRESS, TC_ACT_SHOT, TC_ACT_UNSPEC},
    helpers::generated::{bpf_redirect, bpf_skb_change_head},
    programs::TcContext,
};
use picomesh_common::{
    Counter,
    config::{MESH0_IFINDEX, MESH0_MAC, MESH1_IFINDEX, MESH1_MAC},
};

use crate::{
    maps::{Slot, capture_mark, count, l2_len},
    packet::{self, Bytes, Packet},
};

/// What becomes of a packet.
#[derive(Clone, Copy)]
pub(crate) enum Verdict {
    Pass,
    /// Passes, and is counted.
    PassCounted(Counter),
    /// The sender may know: for TCP it is congestion of its own host, and after a few tries within
    /// seconds it gives up.
    Drop(Counter),
    /// As if lost on the wire: the sender waits as long as it would for a far end that is silent.
    Lose(Counter),
    /// To the outbound listener.
    Outbound,
    /// To the inbound listener.
    Inbound,
}

/// Carries a verdict out. "Pass" leaves the packet to the programs and filters after ours.
#[inline(always)]
pub(crate) fn act(ctx: &TcContext, slot: Slot, verdict: Verdict) -> i32 {
    match verdict {
        Verdict::Pass => TC_ACT_UNSPEC,
        Verdict::PassCounted(counter) => {
            count(slot, counter);
            TC_ACT_UNSPEC
        }
        Verdict::Drop(counter) => drop(slot, counter),
        Verdict::Lose(counter) => lose(slot, counter),
        Verdict::Outbound => {
            // Our policy rule finds the packet by this and calls every address local.
            // SAFETY: a field of the context that programs may write.
            unsafe { (*ctx.skb.skb).mark = capture_mark() };
            redirect(ctx, slot, MESH0_IFINDEX, &MESH0_MAC)
        }
        Verdict::Inbound => redirect(ctx, slot, MESH1_IFINDEX, &MESH1_MAC),
    }
}

#[inline(always)]
fn redirect(ctx: &TcContext, slot: Slot, ifindex: u32, mac: &[u8; 6]) -> i32 {
    const ETHERNET: u32 = 14;
    if l2_len() == 0 {
        // The device wants a link header where this interface has none; its last two bytes tell
        // the protocol.
        // SAFETY: a field of the context, and a helper that grows the packet's head.
        let protocol = unsafe {
            let protocol = (*ctx.skb.skb).protocol as u16;
            if bpf_skb_change_head(ctx.skb.skb, ETHERNET, 0) != 0 {
                return lose(slot, Counter::RedirectFailed);
            }
            protocol
        };
        if ctx.store(12, &protocol, 0).is_err() {
            return lose(slot, Counter::RedirectFailed);
        }
    }
    if ctx.store(0, mac, 0).is_err() {
        return lose(slot, Counter::RedirectFailed);
    }
    // SAFETY: plain numbers.
    unsafe { bpf_redirect(ifindex, BPF_F_INGRESS as u64) as i32 }
}

#[inline(always)]
pub(crate) fn drop(slot: Slot, counter: Counter) -> i32 {
    count(slot, counter);
    TC_ACT_SHOT
}

/// A redirection to no device drops the packet, and on egress that counts as sent
/// (`sch_handle_egress` and `skb_do_redirect` of Linux). TC_ACT_STOLEN says the same, but not to tcx, which
/// takes it for "go on".
#[inline(always)]
pub(crate) fn lose(slot: Slot, counter: Counter) -> i32 {
    const NO_DEVICE: u32 = 0;
    count(slot, counter);
    // SAFETY: plain numbers.
    unsafe { bpf_redirect(NO_DEVICE, 0) as i32 }
}

/// Reads the packet at hand.
#[inline(always)]
pub(crate) fn parse(ctx: &TcContext) -> Result<Packet, Counter> {
    // SAFETY: fields of the context. Both are read before anything branches, or the compiler
    // merges the two accesses into one that the verifier refuses.
    let (protocol, tci) = unsafe {
        (
            core::ptr::read_volatile(&raw const (*ctx.skb.skb).protocol),
            core::ptr::read_volatile(&raw const (*ctx.skb.skb).vlan_tci),
        )
    };
    // A tag of a real VLAN that the device or the kernel took off already: the packet is for an
    // interface on top of this one, and would be nobody's on ours.
    if tci & 0x0fff != 0 {
        return Err(Counter::UnknownEthertype);
    }
    packet::parse(
        &Frame(ctx),
        u16::from_be(protocol as u16),
        l2_len() as usize,
    )
}

struct Frame<'a>(&'a TcContext);

impl Bytes for Frame<'_> {
    #[inline(always)]
    fn load<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.0.load(offset).ok()
    }

    #[inline(always)]
    fn length(&self) -> usize {
        // SAFETY: a field of the context.
        unsafe { core::ptr::read_volatile(&raw const (*self.0.skb.skb).len) as usize }
    }
}

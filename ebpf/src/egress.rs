//! tc egress of a pod's interfaces: what applications and the proxy's sockets send.
//!
//! The order of the questions is the security of it. First: is the packet of a socket of ours,
//! which takes mark *and* storage (rule 3). A SYN to a captured port then goes to the outbound
//! listener, and its socket is marked: once taken, never plain (rule 4). For everything else the
//! far end is looked up: a proxy socket that pretends to be the remote address owns the flipped
//! tuple, and then the sender is the accepted end of a connection of ours. What remains must be
//! known: a probe's answer, a connection that stood before enrolment, a port the user excepted, or
//! an empty answer that the kernel makes by itself (RST, the ACK of TIME_WAIT). Unknown senders
//! are dropped.

use aya_ebpf::programs::TcContext;
use picomesh_common::{
    Addr, Counter, PodConfig, Tuple,
    config::{OUTBOUND, owner, rule},
    pod::PortRange,
};

use crate::{
    maps::{
        Probe, Slot, count, forget_standing, is_standing, listener_stands, our_mark, pod, probe,
        rule,
    },
    packet::{Packet, Segment},
    redirect::{Verdict, parse},
    sockets::{Owner, Sender, owner_of},
};

#[inline(always)]
pub(crate) fn judge(ctx: &TcContext, slot: Slot) -> Verdict {
    let segment = match parse(ctx) {
        Ok(Packet::Tcp(segment)) => segment,
        Ok(Packet::NotTcp) => return Verdict::Pass,
        Err(reason) if rule(rule::PARSE_OR_DROP) => return Verdict::Drop(reason),
        Err(_reason) => return Verdict::Pass,
    };
    let Some(pod) = pod(slot) else {
        return Verdict::Lose(Counter::Inactive);
    };
    if pod.flags & PodConfig::ACTIVE == 0 {
        return Verdict::Lose(Counter::Inactive);
    }
    // SAFETY: fields of the context.
    let (mark, length) = unsafe {
        (
            core::ptr::read_volatile(&raw const (*ctx.skb.skb).mark),
            core::ptr::read_volatile(&raw const (*ctx.skb.skb).len),
        )
    };
    let sender = Sender::of(ctx);
    if mark == our_mark() && (sender.owner == owner::OURS || !rule(rule::STORAGE_DECIDES)) {
        return Verdict::Pass;
    }

    let tuple = Tuple {
        local: segment.source,
        remote: segment.destination,
        local_port: segment.source_port,
        remote_port: segment.destination_port,
    };
    if segment.opens() {
        open(slot, pod, &segment, &tuple, sender)
    } else {
        let empty = length as usize <= segment.payload;
        go_on(ctx, slot, pod, &segment, &tuple, sender, empty)
    }
}

/// A SYN of an application.
#[inline(always)]
fn open(slot: Slot, pod: &PodConfig, segment: &Segment, tuple: &Tuple, sender: Sender) -> Verdict {
    let taken = sender.owner == owner::TAKEN;
    if excepted(pod, segment) {
        // The socket may have had a captured connection before: this is a new one.
        if taken {
            sender.mark(0);
        }
        return Verdict::Pass;
    }
    if pod.flags & PodConfig::LEAVING != 0 && !taken {
        return Verdict::Pass;
    }
    if !listener_stands(slot, OUTBOUND, segment.family) {
        if pod.flags & PodConfig::FAIL_OPEN != 0 && !taken {
            return Verdict::PassCounted(Counter::FailedOpen);
        }
        if rule(rule::NO_LISTENER_DROP) {
            return Verdict::Lose(Counter::NoOutboundListener);
        }
    }
    if !sender.mark(owner::TAKEN) {
        return Verdict::Lose(Counter::RedirectFailed);
    }
    forget_standing(slot, tuple);
    if !taken {
        count(slot, Counter::CapturedOutbound);
    }
    Verdict::Outbound
}

/// Anything of a connection that has been asked for already.
#[inline(always)]
fn go_on(
    ctx: &TcContext,
    slot: Slot,
    pod: &PodConfig,
    segment: &Segment,
    tuple: &Tuple,
    sender: Sender,
    empty: bool,
) -> Verdict {
    let flipped = Tuple {
        local: tuple.remote,
        remote: tuple.local,
        local_port: tuple.remote_port,
        remote_port: tuple.local_port,
    };
    match owner_of(ctx, &flipped, segment.family) {
        // Only a socket of ours can be at home at somebody else's address.
        Owner::Socket(_) | Owner::Request | Owner::OurRequest | Owner::TimeWait => {
            if sender.owner != owner::TAKEN && rule(rule::NEVER_PLAIN) && !sender.mark(owner::TAKEN)
            {
                return Verdict::Lose(Counter::RedirectFailed);
            }
            return Verdict::Outbound;
        }
        Owner::Nobody => {}
    }
    if !rule(rule::NEVER_PLAIN) {
        return Verdict::Pass;
    }

    if sender.owner == owner::TAKEN {
        // Our end is gone. The listener answers RST, and the application learns of it.
        return if listener_stands(slot, OUTBOUND, segment.family) {
            Verdict::Outbound
        } else {
            Verdict::Drop(Counter::OrphanedTaken)
        };
    }
    if sender.owner == owner::PROBED {
        return Verdict::Pass;
    }
    if probe(slot, tuple) != Probe::No {
        // Later packets pass when the probe's entry is gone. If there is no memory for that they
        // are dropped then, and the probe is repeated.
        sender.mark(owner::PROBED);
        return Verdict::Pass;
    }
    if is_standing(slot, tuple) {
        return Verdict::Pass;
    }
    const LENIENT: u32 = PodConfig::ENROLLING | PodConfig::LEAVING | PodConfig::FAIL_OPEN;
    if pod.flags & LENIENT != 0 {
        return Verdict::Pass;
    }
    let listens = sender.listens;
    if contains(&pod.skip_inbound, segment.source_port) || (!listens && excepted(pod, segment)) {
        return Verdict::Pass;
    }
    // What the kernel says for no socket, or refuses on a listener's behalf. A SYN-ACK of an
    // application's listener is neither: its SYN came past us.
    if empty && (sender.is_nobody() || (listens && !segment.is_syn_ack())) {
        return Verdict::Pass;
    }
    Verdict::Drop(Counter::UnknownSender)
}

/// Does the pod's own connection to this destination bypass us (rule 13)?
#[inline(always)]
fn excepted(pod: &PodConfig, segment: &Segment) -> bool {
    contains(&pod.skip_outbound, segment.destination_port) || is_link_local(&segment.destination)
}

#[inline(always)]
pub(crate) fn contains(ranges: &[PortRange], port: [u8; 2]) -> bool {
    let port = u16::from_be_bytes(port);
    for range in ranges {
        if range.contains(port) {
            return true;
        }
    }
    false
}

/// 169.254.0.0/16 and fe80::/10.
#[inline(always)]
pub(crate) fn is_link_local(addr: &Addr) -> bool {
    let bytes = &addr.0;
    (bytes[0] == 0xfe && bytes[1] & 0xc0 == 0x80)
        || (addr.is_v4() && bytes[12] == 169 && bytes[13] == 254)
}

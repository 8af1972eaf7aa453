//! tc ingress of a pod's interfaces: what comes from outside.
//!
//! A SYN to a captured port goes to the inbound listener, whoever owns its tuple (rule 7): a
//! connection in TIME_WAIT would otherwise hand it to the application's listener. Two exceptions:
//! the SYN of a host's socket that is dialling at this moment (rule 9), and a port on which nobody
//! listens, where the kernel's own refusal is the right answer (rule 10).
//!
//! Every other packet needs an owner, or the ACK to a SYN cookie would reach an application's
//! listener. What belongs to a socket of ours goes to it by way of mesh1: the stack looks for the
//! socket once more, and if it was closed in between, on mesh1 nobody but our listener is found.
//! An application's socket passes only if it is a probe's or stood before enrolment (rule 4); its
//! *request* never does otherwise, because a SYN that passed for rule 10 a moment before `listen`
//! would be accepted past policy.

use aya_ebpf::programs::TcContext;
use picomesh_common::{
    Counter, PodConfig, Tuple,
    config::{INBOUND, TUNNEL_PORT, owner, rule},
};

use crate::{
    egress::{contains, is_link_local},
    maps::{Probe, Slot, capture_mark, count, is_standing, listener_stands, pod, probe, rule},
    packet::{Packet, Segment},
    redirect::{Verdict, parse},
    sockets::{Owner, owner_of, somebody_listens},
};

const PACKET_OTHERHOST: u32 = 3;

#[inline(always)]
pub(crate) fn judge(ctx: &TcContext, slot: Slot) -> Verdict {
    // SAFETY: fields of the context.
    let (mark, kind) = unsafe {
        (
            core::ptr::read_volatile(&raw const (*ctx.skb.skb).mark),
            core::ptr::read_volatile(&raw const (*ctx.skb.skb).pkt_type),
        )
    };
    if mark == capture_mark() && rule(rule::FOREIGN_MARK) {
        return Verdict::Drop(Counter::ForeignMark);
    }
    let segment = match parse(ctx) {
        Ok(Packet::Tcp(segment)) => segment,
        Ok(Packet::NotTcp) => return Verdict::Pass,
        Err(reason) if rule(rule::PARSE_OR_DROP) => return Verdict::Drop(reason),
        Err(_reason) => return Verdict::Pass,
    };
    // A frame that a bridge floods, for somebody else's address: the kernel drops it. Given our
    // device's address it would become ours.
    if kind == PACKET_OTHERHOST {
        return Verdict::Pass;
    }
    let Some(pod) = pod(slot) else {
        return Verdict::Drop(Counter::Inactive);
    };
    if pod.flags & PodConfig::ACTIVE == 0 {
        return Verdict::Drop(Counter::Inactive);
    }
    let tuple = Tuple {
        local: segment.destination,
        remote: segment.source,
        local_port: segment.destination_port,
        remote_port: segment.source_port,
    };
    if segment.opens() {
        open(ctx, slot, pod, &segment, &tuple)
    } else {
        go_on(ctx, slot, pod, &segment, &tuple)
    }
}

/// A SYN from outside.
#[inline(always)]
fn open(ctx: &TcContext, slot: Slot, pod: &PodConfig, segment: &Segment, tuple: &Tuple) -> Verdict {
    if contains(&pod.skip_inbound, segment.destination_port) {
        return Verdict::Pass;
    }
    if probe(slot, tuple) == Probe::Dialling {
        return Verdict::PassCounted(Counter::ProbePassed);
    }
    if pod.flags & PodConfig::LEAVING != 0 {
        return Verdict::Pass;
    }
    // A tunnel to the pod's own address is for us; no application listens there. HBONE's own port,
    // always: where *nodes* accept tunnels is a setting, and no matter of this hook.
    let tunnel = segment.destination_port == TUNNEL_PORT.to_be_bytes();
    if rule(rule::NATURAL_REFUSAL) && !tunnel && !somebody_listens(ctx, tuple, segment.family) {
        return Verdict::PassCounted(Counter::RefusedByKernel);
    }
    if !rule(rule::SYN_TO_LISTENER) && owner_of(ctx, tuple, segment.family) != Owner::Nobody {
        return Verdict::Pass;
    }
    if !listener_stands(slot, INBOUND, segment.family) {
        if pod.flags & PodConfig::FAIL_OPEN != 0 {
            return Verdict::PassCounted(Counter::FailedOpen);
        }
        if rule(rule::NO_LISTENER_DROP) {
            return Verdict::Drop(Counter::NoInboundListener);
        }
    }
    count(slot, Counter::CapturedInbound);
    Verdict::Inbound
}

/// Anything but a SYN.
#[inline(always)]
fn go_on(
    ctx: &TcContext,
    slot: Slot,
    pod: &PodConfig,
    segment: &Segment,
    tuple: &Tuple,
) -> Verdict {
    const LENIENT: u32 = PodConfig::ENROLLING | PodConfig::LEAVING | PodConfig::FAIL_OPEN;
    let excepted_here = contains(&pod.skip_inbound, segment.destination_port);
    let lenient = pod.flags & LENIENT != 0 || excepted_here;
    match owner_of(ctx, tuple, segment.family) {
        Owner::Socket(owner::PROBED) => Verdict::Pass,
        // Passed as it is, data behind a redeemed cookie would redeem it again with whoever
        // listens, if our socket is closed before the stack comes to it.
        Owner::Socket(owner::OURS) | Owner::OurRequest if rule(rule::OURS_BY_MESH1) => {
            Verdict::Inbound
        }
        // It delivers nothing to anybody any more and only answers, for as long as it is there.
        Owner::TimeWait if !lenient && rule(rule::OURS_BY_MESH1) => Verdict::Inbound,
        Owner::Socket(owner::OURS) | Owner::OurRequest | Owner::TimeWait => Verdict::Pass,
        // Its peer is a socket of ours in this very namespace, never somebody outside.
        Owner::Socket(owner::TAKEN) if rule(rule::ONLY_STANDING_IN) => {
            Verdict::Drop(Counter::NotStanding)
        }
        Owner::Socket(_) => {
            // The answer to a connection that rule 13 let past.
            let excepted =
                contains(&pod.skip_outbound, segment.source_port) || is_link_local(&segment.source);
            if lenient
                || excepted
                || is_standing(slot, tuple)
                || probe(slot, tuple) != Probe::No
                || !rule(rule::ONLY_STANDING_IN)
            {
                Verdict::Pass
            } else {
                Verdict::Drop(Counter::NotStanding)
            }
        }
        Owner::Request => {
            if lenient || probe(slot, tuple) != Probe::No || !rule(rule::ONLY_STANDING_IN) {
                Verdict::Pass
            } else {
                Verdict::Drop(Counter::NotStanding)
            }
        }
        Owner::Nobody => {
            if lenient || probe(slot, tuple).is_live() || !rule(rule::ACK_NEEDS_OWNER) {
                return Verdict::Pass;
            }
            // A SYN cookie of our listener comes back like this. Anything else it answers as the
            // kernel would, with RST.
            if listener_stands(slot, INBOUND, segment.family) || !rule(rule::NO_LISTENER_DROP) {
                Verdict::Inbound
            } else {
                Verdict::Drop(Counter::NoInboundListener)
            }
        }
    }
}

//! sock_ops of the cgroup v2 root: which connections to local pods are the host's own (rule 9).
//!
//! A kubelet's probe is exempt from policy, and it is known by its *socket*: the callback comes
//! before the SYN leaves, in the context of the host's socket, and the tuple is put down for the
//! pod's ingress to find. Its source address alone would not do, because masqueraded strangers
//! have it too.
//!
//! An entry lives through three phases. *Dialling* admits the SYN, for ten seconds. *Established*
//! admits no SYN any more; it stays while the host's socket does, because the last ACK of the
//! handshake leaves after the callback. *Closing* admits what the socket sent last. The program
//! runs for every TCP socket of the machine, so it asks for the netns first and leaves.

use aya_ebpf::{
    bindings::{
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG,
        BPF_SOCK_OPS_TCP_CONNECT_CB,
    },
    helpers::generated::{bpf_get_netns_cookie, bpf_sock_ops_cb_flags_set},
    programs::SockOpsContext,
};
use picomesh_common::{Addr, ProbeState, Tuple, config::rule};

use crate::maps::{knows_probe, node_netns, rule, set_probe, slot_of};

const AF_INET: u32 = 2;
const AF_INET6: u32 = 10;
const TCP_CLOSE: u32 = 7;

#[inline(always)]
pub(crate) fn remember(ctx: &SockOpsContext) {
    // SAFETY: a field of the context.
    let op = unsafe { core::ptr::read_volatile(&raw const (*ctx.ops).op) };
    if op != BPF_SOCK_OPS_TCP_CONNECT_CB
        && op != BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB
        && op != BPF_SOCK_OPS_STATE_CB
    {
        return;
    }
    // SAFETY: the helper takes the context of this kind of program.
    if unsafe { bpf_get_netns_cookie(ctx.ops.cast()) } != node_netns() {
        return;
    }
    let Some(tuple) = tuple(ctx) else { return };
    let Some(slot) = slot_of(&tuple.local) else {
        return;
    };

    if op == BPF_SOCK_OPS_TCP_CONNECT_CB {
        set_probe(slot, &tuple, ProbeState::DIALLING);
        // Asks to be called when the socket closes. It fails for no socket that dials.
        // SAFETY: the context of this program.
        unsafe { bpf_sock_ops_cb_flags_set(ctx.ops, BPF_SOCK_OPS_STATE_CB_FLAG as i32) };
        return;
    }
    if !rule(rule::PROBE_EXPIRES) || !rule(rule::PROBE_BY_SOCKET) {
        return;
    }
    // A socket that was dialled before we were attached has no entry and gets none.
    if !knows_probe(slot, &tuple) {
        return;
    }
    if op == BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB {
        set_probe(slot, &tuple, ProbeState::ESTABLISHED);
        return;
    }
    // SAFETY: a field of the context; for this operation it is the new state.
    let state = unsafe { core::ptr::read_volatile(&raw const (*ctx.ops).__bindgen_anon_1.args[1]) };
    if state == TCP_CLOSE {
        set_probe(slot, &tuple, ProbeState::CLOSING);
    }
}

/// The connection as the pod names it: the host's remote end is the pod's local one.
#[inline(always)]
fn tuple(ctx: &SockOpsContext) -> Option<Tuple> {
    // SAFETY: fields of the context, all read before anything branches on them.
    let (family, local_port, remote_port) = unsafe {
        (
            core::ptr::read_volatile(&raw const (*ctx.ops).family),
            core::ptr::read_volatile(&raw const (*ctx.ops).local_port),
            core::ptr::read_volatile(&raw const (*ctx.ops).remote_port),
        )
    };
    let (here, there) = if family == AF_INET {
        (v4_here(ctx), v4_there(ctx))
    } else if family == AF_INET6 {
        let there = v6_there(ctx);
        // An IPv4 connection of an IPv6 socket.
        if there.is_v4() {
            (v4_here(ctx), there)
        } else {
            (v6_here(ctx), there)
        }
    } else {
        return None;
    };
    Some(Tuple {
        local: there,
        remote: here,
        // Network order, in the upper half of the word.
        local_port: ((remote_port >> 16) as u16).to_ne_bytes(),
        // Host order.
        remote_port: (local_port as u16).to_be_bytes(),
    })
}

#[inline(always)]
fn v4_here(ctx: &SockOpsContext) -> Addr {
    // SAFETY: a field of the context, in network order.
    Addr::v4(unsafe { core::ptr::read_volatile(&raw const (*ctx.ops).local_ip4) }.to_ne_bytes())
}

#[inline(always)]
fn v4_there(ctx: &SockOpsContext) -> Addr {
    // SAFETY: as above.
    Addr::v4(unsafe { core::ptr::read_volatile(&raw const (*ctx.ops).remote_ip4) }.to_ne_bytes())
}

#[inline(always)]
fn v6_here(ctx: &SockOpsContext) -> Addr {
    let mut words = [0u32; 4];
    for (i, word) in words.iter_mut().enumerate() {
        // SAFETY: a field of the context; the verifier wants it word by word.
        *word = unsafe { core::ptr::read_volatile(&raw const (*ctx.ops).local_ip6[i]) };
    }
    Addr(bytes(words))
}

#[inline(always)]
fn v6_there(ctx: &SockOpsContext) -> Addr {
    let mut words = [0u32; 4];
    for (i, word) in words.iter_mut().enumerate() {
        // SAFETY: as above.
        *word = unsafe { core::ptr::read_volatile(&raw const (*ctx.ops).remote_ip6[i]) };
    }
    Addr(bytes(words))
}

#[inline(always)]
fn bytes(words: [u32; 4]) -> [u8; 16] {
    // SAFETY: same size, plain bytes; the words are in network order already.
    unsafe { core::mem::transmute(words) }
}

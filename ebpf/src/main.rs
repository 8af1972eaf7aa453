//! The kernel half of picomesh: four programs, one file per hook.
//!
//! | program | hook | file |
//! | --- | --- | --- |
//! | `enter_egress`, `enter_ingress` | tc egress and ingress of a pod's interfaces | [`enter`] |
//! | `pod_egress` | jumped to from the first | [`egress`] |
//! | `pod_ingress` | jumped to from the second | [`ingress`] |
//! | `steer` | sk_lookup of the pod's netns | [`steer`] |
//! | `host_sockets` | sock_ops of the cgroup v2 root | [`sockops`] |
//!
//! The entry points here only turn a decision into the hook's word for it. Each pod has instances
//! of its own of `enter_…` and `steer`, told apart by the constant `SLOT`; maps are shared, and so
//! are the two programs that decide, because the kernel takes 30 ms to verify them. Every
//! refusal counts under its number in `picomesh_common::Counter`. Nothing here logs: the counters
//! tell, and a line per packet would cost more than the packet.
//!
//! Only contexts of the stable kernel interface are used, so that a kernel without BTF will do.
//! Off the kernel's target this is an empty program around the tests of [`packet`].
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(any(target_arch = "bpf", test))]
mod packet;

#[cfg(target_arch = "bpf")]
mod egress;
#[cfg(target_arch = "bpf")]
mod enter;
#[cfg(target_arch = "bpf")]
mod ingress;
#[cfg(target_arch = "bpf")]
mod maps;
#[cfg(target_arch = "bpf")]
mod redirect;
#[cfg(target_arch = "bpf")]
mod sockets;
#[cfg(target_arch = "bpf")]
mod sockops;
#[cfg(target_arch = "bpf")]
mod steer;

#[cfg(target_arch = "bpf")]
#[expect(
    unreachable_pub,
    reason = "the programs' symbols must be visible, though no Rust calls them"
)]
mod entry {
    use aya_ebpf::{
        macros::{classifier, sk_lookup, sock_ops},
        programs::{SkLookupContext, SockOpsContext, TcContext},
    };

    use picomesh_common::config::{EGRESS, INGRESS};

    use crate::{egress, enter, ingress, maps::Slot, redirect, sockops, steer};

    #[classifier]
    pub fn enter_egress(ctx: TcContext) -> i32 {
        enter::enter(&ctx, EGRESS)
    }

    #[classifier]
    pub fn enter_ingress(ctx: TcContext) -> i32 {
        enter::enter(&ctx, INGRESS)
    }

    #[classifier]
    pub fn pod_egress(ctx: TcContext) -> i32 {
        let slot = Slot::take_over(&ctx);
        let verdict = egress::judge(&ctx, slot);
        redirect::act(&ctx, slot, verdict)
    }

    #[classifier]
    pub fn pod_ingress(ctx: TcContext) -> i32 {
        let slot = Slot::take_over(&ctx);
        let verdict = ingress::judge(&ctx, slot);
        redirect::act(&ctx, slot, verdict)
    }

    #[sk_lookup]
    pub fn steer(ctx: SkLookupContext) -> u32 {
        const SK_DROP: u32 = 0;
        const SK_PASS: u32 = 1;
        if steer::find(&ctx) { SK_PASS } else { SK_DROP }
    }

    #[sock_ops]
    pub fn host_sockets(ctx: SockOpsContext) -> u32 {
        sockops::remember(&ctx);
        1
    }

    #[panic_handler]
    fn panic(_info: &core::panic::PanicInfo) -> ! {
        loop {}
    }

    /// Some of the helpers are for programs under the GPL only, so the object offers both.
    #[unsafe(link_section = "license")]
    #[unsafe(no_mangle)]
    static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
}

#[cfg(not(target_arch = "bpf"))]
fn main() {}

//! What is attached to a pod's interfaces: says whose packet it is, and jumps to the program that
//! decides and that all pods share.
//!
//! A program of its own tells a pod apart from all others without a word of the packet, and this
//! one is so short that a hundred of them load in no time. If there is nothing to jump to, the
//! packet is lost.

use aya_ebpf::programs::TcContext;
use picomesh_common::{Counter, config::jump_index};

use crate::{
    maps::{JUMPS, Slot, l2_len},
    redirect,
};

#[inline(always)]
pub(crate) fn enter(ctx: &TcContext, direction: u32) -> i32 {
    let slot = Slot::own();
    slot.hand_over(ctx);
    // SAFETY: what is jumped to takes the same context and nothing from this program's stack.
    unsafe { JUMPS.tail_call(ctx, jump_index(direction, l2_len())) };
    redirect::lose(slot, Counter::NoProgram)
}

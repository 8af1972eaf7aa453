//! Hand-over: one agent leaves its place to the next without a connection noticing.
//!
//! Two agents of one run directory meet at `handover.sock`, a SOCK_SEQPACKET socket that only root
//! may use: one message, one packet. `app` serves it ([`predecessor`]) for as long as it runs and
//! calls there ([`successor`]) when it finds the directory taken. What is handed over are open
//! files (SCM_RIGHTS); what is done on either side is `app`'s, behind the trait
//! [`predecessor::Estate`]. This room knows no other.
//!
//! ```text
//! successor                                     predecessor
//!     ── hello ─────────────────────────────────►   may it be? one at a time
//!     ◄────────── offer, with the open files ────   goes on as before
//!   builds everything
//!     ── ready ─────────────────────────────────►   stops repairing, goes on serving
//!     ◄────────────────────────────── commit ────
//!   listens in every pod, repairs, answers
//!     ── taken ─────────────────────────────────►   accepts no more, empties its queues, drains
//! ```
//!
//! **Two phases.** Until `taken` the predecessor keeps all it has: its listeners, its sockets, the
//! locks of both directories (the successor's copy of a lock is the same lock). A successor that
//! dies before, after whichever message, costs nothing: its end of the connection closes, and the
//! predecessor puts its own listeners back and goes on repairing.
//!
//! **One repairs, never two.** Before `commit` it is the predecessor, after it the successor. If
//! the other side is silent for too long where that matters it is killed first ([`peer`]): a
//! process that was stopped could otherwise wake and repair too. A closed connection is no proof of
//! death, so a side that ends the conversation alive says `refused`, and one that just closes it is
//! waited for, then killed. After that, things are as after any `kill -9`. A process that we do not
//! see (another process namespace) cannot be killed: a predecessor then repairs nothing until the
//! connection is closed, at the latest by the end of that process, and a successor gives up.
//!
//! **Versions.** A message that a side does not know is answered with `unknown` and changes
//! nothing. Fields that it does not know are passed over.

mod channel;
pub mod message;
mod peer;
pub mod predecessor;
pub mod successor;
#[cfg(test)]
mod tests;

pub use channel::{Channel, ChannelError};
pub use message::Message;

/// The socket's name in the run directory.
pub const NAME: &str = "handover.sock";

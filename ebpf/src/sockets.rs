//! Sockets as the tc hooks meet them: the one that sends a packet, the one that owns a tuple.
//!
//! Each question takes what it needs from the kernel's socket and gives the reference back before
//! it answers, so that no decision holds one.

use core::ptr::{null_mut, read_volatile};

use aya_ebpf::{
    bindings::{BPF_F_CURRENT_NETNS, BPF_SK_STORAGE_GET_F_CREATE, bpf_sock, bpf_sock_tuple},
    helpers::generated::{
        bpf_get_listener_sock, bpf_sk_fullsock, bpf_sk_release, bpf_sk_storage_get,
        bpf_skc_lookup_tcp,
    },
    programs::TcContext,
};
use picomesh_common::{
    Tuple,
    config::{V4, owner},
};

use crate::maps::SOCKETS;

const SOCK_STREAM: u32 = 1;
const IPPROTO_TCP: u32 = 6;
const TCP_LISTEN: u32 = 10;
const TCP_TIME_WAIT: u32 = 6;
const TCP_NEW_SYN_RECV: u32 = 12;

/// The TCP socket that sends the packet at hand, or nobody: what the kernel makes itself (RST, the
/// ACKs of TIME_WAIT: they leave through a raw socket of its own, which must never be marked), and
/// what raw and packet sockets send.
///
/// Not an `Option`: its `None` leaves the other fields without a value, the compiler copies them
/// all the same, and before Linux 6.3 the verifier refuses to read what nobody wrote.
#[derive(Clone, Copy)]
pub(crate) struct Sender {
    /// Null for nobody.
    socket: *mut bpf_sock,
    /// It listens: the packet is a SYN-ACK or a refusal on its behalf, and what it is marked with
    /// its children inherit.
    pub(crate) listens: bool,
    /// Value of its storage, 0 without one.
    pub(crate) owner: u32,
}

impl Sender {
    const NOBODY: Self = Self {
        socket: null_mut(),
        listens: false,
        owner: 0,
    };

    #[inline(always)]
    pub(crate) fn of(ctx: &TcContext) -> Self {
        // SAFETY: the verifier checks each access: `sk` against null here, the rest behind `full`,
        // which answers null unless every field may be read.
        unsafe {
            let any = (*ctx.skb.skb).__bindgen_anon_2.sk;
            if any.is_null() {
                return Self::NOBODY;
            }
            let socket = full(any);
            if socket.is_null() {
                return Self::NOBODY;
            }
            if (*socket).type_ != SOCK_STREAM || (*socket).protocol != IPPROTO_TCP {
                return Self::NOBODY;
            }
            let listens = (*socket).state == TCP_LISTEN;
            let storage = storage(socket, 0);
            let owner = if storage.is_null() { 0 } else { *storage };
            Self {
                socket,
                listens,
                owner,
            }
        }
    }

    #[inline(always)]
    pub(crate) fn is_nobody(&self) -> bool {
        self.socket.is_null()
    }

    /// Writes the socket's storage; a listener's only if it is ours, and then not here. False if
    /// the kernel has no memory for it.
    #[inline(always)]
    pub(crate) fn mark(&self, owner: u32) -> bool {
        if self.is_nobody() || self.listens {
            return true;
        }
        // SAFETY: `socket` was checked by `of` and belongs to the packet, which outlives this.
        unsafe {
            let storage = storage(self.socket, BPF_SK_STORAGE_GET_F_CREATE as u64);
            if storage.is_null() {
                return false;
            }
            *storage = owner;
        }
        true
    }
}

/// Who owns a tuple in the pod's netns.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Owner {
    /// Nobody; a listener is nobody's owner.
    Nobody,
    /// A connection that is over. Whose it was cannot be told any more.
    TimeWait,
    /// A connection that is being opened towards a listener of the proxy.
    OurRequest,
    /// The same towards a listener of an application.
    Request,
    /// A connection, with the value of its socket's storage.
    Socket(u32),
}

/// Looks up `tuple`, seen from the socket that is looked for.
#[inline(always)]
pub(crate) fn owner_of(ctx: &TcContext, tuple: &Tuple, family: u32) -> Owner {
    let socket = lookup(ctx, tuple, family);
    if socket.is_null() {
        return Owner::Nobody;
    }
    // SAFETY: not null, and held until the release below; `state` is there in every kind of it.
    let state = unsafe { read_volatile(&raw const (*socket).state) };
    let found = if state == TCP_LISTEN {
        Owner::Nobody
    } else if state == TCP_TIME_WAIT {
        Owner::TimeWait
    } else {
        // SAFETY: held. For a request this is its listener, which lives at least as long.
        let value = unsafe {
            let full = full(socket);
            let storage = if full.is_null() {
                null_mut()
            } else {
                storage(full, 0)
            };
            if storage.is_null() { 0 } else { *storage }
        };
        if state != TCP_NEW_SYN_RECV {
            Owner::Socket(value)
        } else if value == owner::OURS {
            Owner::OurRequest
        } else {
            Owner::Request
        }
    };
    // SAFETY: the reference that the look-up took.
    unsafe { bpf_sk_release(socket.cast()) };
    found
}

/// Does an application listen at the local end of `tuple`? Asked with a remote end that no
/// connection has, or a connection on the tuple would hide the listener.
#[inline(always)]
pub(crate) fn somebody_listens(ctx: &TcContext, tuple: &Tuple, family: u32) -> bool {
    let mut anyone = *tuple;
    anyone.remote.0 = [0; 16];
    anyone.remote_port = [0; 2];
    let socket = lookup(ctx, &anyone, family);
    if socket.is_null() {
        return false;
    }
    // SAFETY: not null, and held until the release.
    unsafe {
        let listens = read_volatile(&raw const (*socket).state) == TCP_LISTEN;
        bpf_sk_release(socket.cast());
        listens
    }
}

/// A reference that the caller gives back, or null.
#[inline(always)]
fn lookup(ctx: &TcContext, tuple: &Tuple, family: u32) -> *mut bpf_sock {
    // The helper takes the tuple of an incoming packet: its source is the socket's remote end.
    // SAFETY: all zeros is a value of it, and the union's members are plain numbers. The helper
    // reads as many bytes as it is told, all of them initialised.
    unsafe {
        let mut key: bpf_sock_tuple = core::mem::zeroed();
        let length = if family == V4 {
            key.__bindgen_anon_1.ipv4.saddr = v4_word(&tuple.remote.0);
            key.__bindgen_anon_1.ipv4.daddr = v4_word(&tuple.local.0);
            key.__bindgen_anon_1.ipv4.sport = u16::from_ne_bytes(tuple.remote_port);
            key.__bindgen_anon_1.ipv4.dport = u16::from_ne_bytes(tuple.local_port);
            size_of_val(&key.__bindgen_anon_1.ipv4)
        } else {
            key.__bindgen_anon_1.ipv6.saddr =
                core::mem::transmute::<[u8; 16], [u32; 4]>(tuple.remote.0);
            key.__bindgen_anon_1.ipv6.daddr =
                core::mem::transmute::<[u8; 16], [u32; 4]>(tuple.local.0);
            key.__bindgen_anon_1.ipv6.sport = u16::from_ne_bytes(tuple.remote_port);
            key.__bindgen_anon_1.ipv6.dport = u16::from_ne_bytes(tuple.local_port);
            size_of_val(&key.__bindgen_anon_1.ipv6)
        };
        bpf_skc_lookup_tcp(
            ctx.skb.skb.cast(),
            &raw mut key,
            length as u32,
            BPF_F_CURRENT_NETNS as u64,
            0,
        )
    }
}

/// The socket with all its fields: for a connection that is being opened its listener, whose
/// storage it will inherit. Null for TIME_WAIT.
///
/// # Safety
/// `socket` must be one the verifier knows, and not null.
#[inline(always)]
unsafe fn full(socket: *mut bpf_sock) -> *mut bpf_sock {
    // SAFETY: `state` is there in every kind of socket; the helpers take any kind.
    unsafe {
        if read_volatile(&raw const (*socket).state) == TCP_NEW_SYN_RECV {
            bpf_get_listener_sock(socket)
        } else {
            bpf_sk_fullsock(socket)
        }
    }
}

#[inline(always)]
fn v4_word(addr: &[u8; 16]) -> u32 {
    u32::from_ne_bytes([addr[12], addr[13], addr[14], addr[15]])
}

/// # Safety
/// `socket` must be one the verifier knows as a live full socket.
#[inline(always)]
unsafe fn storage(socket: *mut bpf_sock, flags: u64) -> *mut u32 {
    // SAFETY: the map is an sk_storage with a u32 value.
    unsafe {
        bpf_sk_storage_get(
            (&raw const SOCKETS).cast_mut().cast(),
            socket.cast(),
            null_mut(),
            flags,
        )
    }
    .cast()
}

//! What user space tells the programs (constants, configuration, listeners) and what they tell it
//! (counters, probes). The only file that touches maps; the hooks ask it questions.

use core::ptr::{null, read_volatile, write_volatile};

use aya_ebpf::{
    bindings::{BPF_F_CLONE, BPF_F_NO_PREALLOC, bpf_map_type::BPF_MAP_TYPE_SK_STORAGE},
    helpers::generated::{bpf_ktime_get_ns, bpf_map_lookup_elem, bpf_sk_release},
    macros::{btf_map, map},
    maps::{Array, HashMap, LruHashMap, PerCpuArray, ProgramArray, SockMap},
    programs::TcContext,
};
use picomesh_common::{
    Addr, Counter, PodConfig, ProbeKey, ProbeState, StandingKey, Tuple,
    config::{JUMPS as JUMPS_LEN, MAX_PODS, MAX_PROBES, MAX_STANDING, listener_index, rule},
};

/// Listeners of the proxy at [`listener_index`].
#[map]
pub(crate) static LISTENERS: SockMap = SockMap::with_max_entries(MAX_PODS * 4, 0);
#[map]
static PODS: Array<PodConfig> = Array::with_max_entries(MAX_PODS, 0);
#[map]
static STANDING: HashMap<StandingKey, u32> =
    HashMap::with_max_entries(MAX_STANDING, BPF_F_NO_PREALLOC);
#[map]
static LOCAL: HashMap<Addr, u32> = HashMap::with_max_entries(MAX_PODS * 4, BPF_F_NO_PREALLOC);
#[map]
static PROBES: LruHashMap<ProbeKey, ProbeState> = LruHashMap::with_max_entries(MAX_PROBES, 0);
#[map]
static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(MAX_PODS * Counter::COUNT, 0);
#[map]
pub(crate) static JUMPS: ProgramArray = ProgramArray::with_max_entries(JUMPS_LEN, 0);

const STORAGE_FLAGS: usize = (BPF_F_NO_PREALLOC | BPF_F_CLONE) as usize;

/// Who a socket belongs to (`picomesh_common::config::owner`), kept in the socket itself and, by
/// the flag CLONE, inherited by what a listener accepts. Declared by hand in the form that libbpf
/// reads from BTF, because aya's own type has no such flag.
#[repr(C)]
pub(crate) struct SocketStorage {
    r#type: *const [i32; BPF_MAP_TYPE_SK_STORAGE as usize],
    key: *const i32,
    value: *const u32,
    max_entries: *const [i32; 0],
    map_flags: *const [i32; STORAGE_FLAGS],
}

// SAFETY: the pointers are never followed; they only carry numbers into BTF.
unsafe impl Sync for SocketStorage {}

#[btf_map]
pub(crate) static SOCKETS: SocketStorage = SocketStorage {
    r#type: null(),
    key: null(),
    value: null(),
    max_entries: null(),
    map_flags: null(),
};

#[unsafe(no_mangle)]
static SLOT: u32 = 0;
#[unsafe(no_mangle)]
static OUR_MARK: u32 = 0;
#[unsafe(no_mangle)]
static CAPTURE_MARK: u32 = 0;
#[unsafe(no_mangle)]
static L2_LEN: u32 = 0;
#[unsafe(no_mangle)]
static NODE_NETNS: u64 = 0;
#[unsafe(no_mangle)]
static RULES: u32 = 0;

/// Constants are overridden when the object is loaded, which the compiler must not foresee.
macro_rules! constant {
    ($name:ident, $symbol:ident, $kind:ty) => {
        #[inline(always)]
        pub(crate) fn $name() -> $kind {
            // SAFETY: an aligned, initialised static.
            unsafe { read_volatile(&raw const $symbol) }
        }
    };
}
constant!(own_slot, SLOT, u32);
constant!(our_mark, OUR_MARK, u32);
constant!(capture_mark, CAPTURE_MARK, u32);
constant!(l2_len, L2_LEN, u32);
constant!(node_netns, NODE_NETNS, u64);

/// Is this rule in force? Only a test's loader clears a bit.
#[inline(always)]
pub(crate) fn rule(bit: u32) -> bool {
    // SAFETY: an aligned, initialised static.
    unsafe { read_volatile(&raw const RULES) & bit != 0 }
}

const _: () = assert!(rule::ALL != 0);

/// Which pod's packet is at hand.
#[derive(Clone, Copy)]
pub(crate) struct Slot(u32);

impl Slot {
    /// In a pod's own program.
    #[inline(always)]
    pub(crate) fn own() -> Self {
        Self(own_slot())
    }

    /// Puts it down in the packet's scratch space, for the program that is jumped to.
    #[inline(always)]
    pub(crate) fn hand_over(self, ctx: &TcContext) {
        // SAFETY: a field of the context that programs may write.
        unsafe { write_volatile(&raw mut (*ctx.skb.skb).cb[0], self.0) };
    }

    /// Takes it up, in the program that was jumped to. The scratch space is as clean afterwards as
    /// programs after ours may expect it.
    #[inline(always)]
    pub(crate) fn take_over(ctx: &TcContext) -> Self {
        // SAFETY: as above.
        unsafe {
            let slot = read_volatile(&raw const (*ctx.skb.skb).cb[0]);
            write_volatile(&raw mut (*ctx.skb.skb).cb[0], 0);
            Self(slot)
        }
    }
}

/// Counts an outcome of a pod.
#[inline(always)]
pub(crate) fn count(slot: Slot, counter: Counter) {
    if slot.0 >= MAX_PODS {
        return;
    }
    if let Some(value) = COUNTERS.get_ptr_mut(slot.0 * Counter::COUNT + counter as u32) {
        // SAFETY: a live element of a per-CPU array; nobody else writes this CPU's copy.
        unsafe { *value += 1 };
    }
}

/// Configuration of a pod.
#[inline(always)]
pub(crate) fn pod(slot: Slot) -> Option<&'static PodConfig> {
    PODS.get(slot.0)
}

/// Place of a pod's listener in [`LISTENERS`].
#[inline(always)]
pub(crate) fn listener_place(slot: Slot, direction: u32, family: u32) -> u32 {
    listener_index(slot.0, direction, family)
}

/// Does a listener of the proxy stand for this pod, direction and family?
#[inline(always)]
pub(crate) fn listener_stands(slot: Slot, direction: u32, family: u32) -> bool {
    let index = listener_place(slot, direction, family);
    // SAFETY: the map is a SOCKMAP with a u32 key; what it answers is a socket with a reference,
    // which is given back.
    unsafe {
        let socket = bpf_map_lookup_elem(
            (&raw const LISTENERS).cast_mut().cast(),
            (&raw const index).cast(),
        );
        if socket.is_null() {
            return false;
        }
        bpf_sk_release(socket);
    }
    true
}

/// Did this connection of the pod stand before it was enrolled?
#[inline(always)]
pub(crate) fn is_standing(slot: Slot, tuple: &Tuple) -> bool {
    // SAFETY: the value is not read.
    unsafe { STANDING.get(key(slot, tuple)) }.is_some()
}

/// The connection's place is taken by a new one.
#[inline(always)]
pub(crate) fn forget_standing(slot: Slot, tuple: &Tuple) {
    // Most are not there.
    let _ = STANDING.remove(key(slot, tuple));
}

/// Slot of the local pod that has this address.
#[inline(always)]
pub(crate) fn slot_of(addr: &Addr) -> Option<u32> {
    // SAFETY: the value is copied at once; user space replaces it as a whole.
    unsafe { LOCAL.get(addr) }.copied()
}

/// How far a probe on this tuple may go.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Probe {
    No,
    /// The host's socket is dialling: its SYN may pass.
    Dialling,
    /// The host's socket stands.
    Established,
    /// It has just closed: what it sent last may still reach the socket that was made for it.
    Closing,
}

impl Probe {
    /// May something answer that is no established socket yet?
    #[inline(always)]
    pub(crate) fn is_live(self) -> bool {
        matches!(self, Self::Dialling | Self::Established)
    }
}

/// What the host's sockets are doing with this tuple of a pod.
#[inline(always)]
pub(crate) fn probe(slot: Slot, tuple: &Tuple) -> Probe {
    let key = probe_key(slot.0, tuple);
    // SAFETY: copied at once. A mix of two writes of one tuple is a phase of one of them.
    let Some(state) = (unsafe { PROBES.get(key) }).copied() else {
        return Probe::No;
    };
    if state.phase == ProbeState::ESTABLISHED {
        return Probe::Established;
    }
    // SAFETY: no arguments.
    let age = unsafe { bpf_ktime_get_ns() }.wrapping_sub(state.since_ns);
    if rule(rule::PROBE_EXPIRES) && age > ProbeState::LIFE_NS {
        Probe::No
    } else if state.phase == ProbeState::CLOSING {
        Probe::Closing
    } else {
        Probe::Dialling
    }
}

/// Records a phase of a probe of the pod in `slot`.
#[inline(always)]
pub(crate) fn set_probe(slot: u32, tuple: &Tuple, phase: u32) {
    // SAFETY: no arguments.
    let state = ProbeState {
        since_ns: unsafe { bpf_ktime_get_ns() },
        phase,
        _pad: 0,
    };
    // An LRU map makes room by itself.
    let _ = PROBES.insert(probe_key(slot, tuple), state, 0);
}

#[inline(always)]
pub(crate) fn knows_probe(slot: u32, tuple: &Tuple) -> bool {
    // SAFETY: the value is not read.
    unsafe { PROBES.get(probe_key(slot, tuple)) }.is_some()
}

#[inline(always)]
fn key(slot: Slot, tuple: &Tuple) -> StandingKey {
    StandingKey {
        slot: slot.0,
        tuple: *tuple,
    }
}

/// Without the rule "by its socket" a probe is whatever comes from the node's address.
#[inline(always)]
fn probe_key(slot: u32, tuple: &Tuple) -> ProbeKey {
    let mut tuple = *tuple;
    if !rule(rule::PROBE_BY_SOCKET) {
        tuple.remote_port = [0; 2];
    }
    ProbeKey { slot, tuple }
}

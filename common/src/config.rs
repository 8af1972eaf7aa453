//! Names and numbers that both halves use literally.

/// Version of everything that outlives the process: maps, their values, names of pins. The pins
/// of a layout live in a directory of this name below the bpf directory.
pub const LAYOUT: u32 = 1;

/// Pods that one agent can enrol; the size of every map that is indexed by slot.
pub const MAX_PODS: u32 = 512;
/// Connections of all pods together that stood before their pod was enrolled.
pub const MAX_STANDING: u32 = 16384;
/// Probes of the host that are under way; the least recently used make room.
pub const MAX_PROBES: u32 = 4096;

/// ifindex of the device through which captured *outbound* packets reach our listener.
pub const MESH0_IFINDEX: u32 = 15001;
/// ifindex of the device through which captured *inbound* packets reach our listener.
pub const MESH1_IFINDEX: u32 = 15006;
pub const MESH0_NAME: &str = "mesh0";
pub const MESH1_NAME: &str = "mesh1";
/// A redirected packet must carry the device's address, or it counts as somebody else's.
pub const MESH0_MAC: [u8; 6] = [0x02, 0x70, 0x6d, 0x00, 0x00, 0x01];
pub const MESH1_MAC: [u8; 6] = [0x02, 0x70, 0x6d, 0x00, 0x00, 0x02];

/// Preference of our policy rule and number of its table, in the pod's netns.
pub const RULE_PRIORITY: u32 = 1;
pub const ROUTE_TABLE: u32 = 15001;

/// The port of tunnels: HBONE's own. At a pod's own address it is always this one, as others call
/// there (ztunnel); nodes accept theirs at `--tunnel-port`, which is this unless somebody says so.
pub const TUNNEL_PORT: u16 = 15008;

/// Direction of a capture, as used in [`listener_index`].
pub const OUTBOUND: u32 = 0;
pub const INBOUND: u32 = 1;
/// Family of a capture, as used in [`listener_index`].
pub const V4: u32 = 0;
pub const V6: u32 = 1;

/// Index into the SOCKMAP `LISTENERS`.
#[inline(always)]
pub const fn listener_index(slot: u32, direction: u32, family: u32) -> u32 {
    slot * 4 + direction * 2 + family
}

/// Direction of a packet at a pod's interface, as used in [`jump_index`].
pub const EGRESS: u32 = 0;
pub const INGRESS: u32 = 1;
/// Length of `JUMPS`.
pub const JUMPS: u32 = 4;

/// Index into the array of programs `JUMPS`.
#[inline(always)]
pub const fn jump_index(direction: u32, l2_len: u32) -> u32 {
    direction * 2 + (l2_len != 0) as u32
}

/// Values of the socket storage `SOCKETS`.
pub mod owner {
    /// A socket of the proxy: its packets pass untouched.
    pub const OURS: u32 = 1;
    /// A socket of an application whose connection we took: redirected or dropped, never passed.
    pub const TAKEN: u32 = 2;
    /// The application's end of a probe of the host: passes.
    pub const PROBED: u32 = 3;
}

/// Maps, by the name they have in the object and as pins.
pub mod map {
    pub const LISTENERS: &str = "LISTENERS";
    pub const SOCKETS: &str = "SOCKETS";
    pub const PODS: &str = "PODS";
    pub const STANDING: &str = "STANDING";
    /// Addresses of local enrolled pods → slot; what `sock_ops` consults.
    pub const LOCAL: &str = "LOCAL";
    pub const PROBES: &str = "PROBES";
    pub const COUNTERS: &str = "COUNTERS";
    /// The programs that all pods share, at [`super::jump_index`].
    pub const JUMPS: &str = "JUMPS";
}

/// Programs, by the name of their function.
pub mod program {
    /// Each pod's own: they put the slot down and jump.
    pub const ENTER_EGRESS: &str = "enter_egress";
    pub const ENTER_INGRESS: &str = "enter_ingress";
    /// Shared by all pods with the same kind of interface: they decide.
    pub const EGRESS: &str = "pod_egress";
    pub const INGRESS: &str = "pod_ingress";
    pub const STEER: &str = "steer";
    pub const HOST_SOCKETS: &str = "host_sockets";
}

/// Read-only constants that the loader overrides, by symbol.
pub mod constant {
    /// u32: slot of the pod this instance serves, in `enter_egress`, `enter_ingress` and `steer`.
    pub const SLOT: &str = "SLOT";
    /// u32: mark of the proxy's own sockets; random per boot.
    pub const OUR_MARK: &str = "OUR_MARK";
    /// u32: mark of a captured packet on its way to mesh0; random per boot.
    pub const CAPTURE_MARK: &str = "CAPTURE_MARK";
    /// u32: bytes before the IP header: 14, or 0 for an interface without Ethernet header.
    pub const L2_LEN: &str = "L2_LEN";
    /// u64: netns cookie of the node, for `host_sockets`.
    pub const NODE_NETNS: &str = "NODE_NETNS";
    /// u32: [`super::rule`] bits in force; all of them outside tests.
    pub const RULES: &str = "RULES";
}

/// Marks: both are drawn at random per boot within this mask, never equal, never zero, and never
/// 0x539/0xfff, which Istio's ambient mode uses.
pub const MARK_MASK: u32 = 0x00ff_ffff;

/// Rules of the kernel half that a test run can take out one at a time, to see the tests fail.
pub mod rule {
    /// Rule 2: what cannot be parsed is dropped (VLAN tags, fragments, bad options).
    pub const PARSE_OR_DROP: u32 = 1 << 0;
    /// Rule 3: ours is who has our storage, not who has only the mark.
    pub const STORAGE_DECIDES: u32 = 1 << 1;
    /// Rule 3: a packet from outside that carries the capture mark is dropped.
    pub const FOREIGN_MARK: u32 = 1 << 2;
    /// Rule 4: a socket whose connection we took never sends plain.
    pub const NEVER_PLAIN: u32 = 1 << 3;
    /// Rule 4: only standing connections and probes reach an application's socket from outside.
    pub const ONLY_STANDING_IN: u32 = 1 << 4;
    /// Rule 5: no listener, no packet (tc).
    pub const NO_LISTENER_DROP: u32 = 1 << 5;
    /// Rule 5: no listener, no connection (sk_lookup).
    pub const STEER_OR_DROP: u32 = 1 << 6;
    /// Rule 7: a SYN to a captured port goes to the listener whoever owns its tuple.
    pub const SYN_TO_LISTENER: u32 = 1 << 7;
    /// Rule 9: a probe is known by its socket, not by the node's address.
    pub const PROBE_BY_SOCKET: u32 = 1 << 8;
    /// Rule 9: a probe's tuple admits SYNs only until it is established, and for ten seconds.
    pub const PROBE_EXPIRES: u32 = 1 << 9;
    /// Rule 10: a port on which nobody listens is refused by the kernel, not by us.
    pub const NATURAL_REFUSAL: u32 = 1 << 10;
    /// tc ingress: a packet without SYN needs an owner too (SYN cookies).
    pub const ACK_NEEDS_OWNER: u32 = 1 << 11;

    /// Rule 4: what belongs to a socket of ours reaches it by way of mesh1, where nobody else is
    /// found if it was closed a moment ago.
    pub const OURS_BY_MESH1: u32 = 1 << 12;

    pub const ALL: u32 = (1 << 13) - 1;

    /// Bit, name and number of the rule in the architecture, for the test loader.
    pub const NAMES: [(u32, &str, &str); 13] = [
        (PARSE_OR_DROP, "parse-or-drop", "2"),
        (STORAGE_DECIDES, "storage-decides", "3"),
        (FOREIGN_MARK, "foreign-mark", "3"),
        (NEVER_PLAIN, "never-plain", "4"),
        (ONLY_STANDING_IN, "only-standing-in", "4"),
        (NO_LISTENER_DROP, "no-listener-drop", "5"),
        (STEER_OR_DROP, "steer-or-drop", "5"),
        (SYN_TO_LISTENER, "syn-to-listener", "7"),
        (PROBE_BY_SOCKET, "probe-by-socket", "9"),
        (PROBE_EXPIRES, "probe-expires", "9"),
        (NATURAL_REFUSAL, "natural-refusal", "10"),
        (ACK_NEEDS_OWNER, "ack-needs-owner", "2"),
        (OURS_BY_MESH1, "ours-by-mesh1", "4"),
    ];
}

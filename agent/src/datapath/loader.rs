//! Loads, pins, attaches, replaces and inspects the kernel half.
//!
//! [`super::pods`] decides which pod has which slot and when; this file knows how. It keeps no
//! memory of what it did: whether a hook is right is asked of the kernel each time ([`Loader::hooks`]),
//! because a container with NET_ADMIN may have undone it meanwhile.
//!
//! Everything that must outlive the process lies in bpffs:
//!
//! ```text
//! <bpf_dir>/v<LAYOUT>/maps/<NAME>                     shared by all pods
//!                    /shared/<l2 length>/{pod_egress,pod_ingress,build-…}   for all pods
//!                    /host/{sockops,program,build-…}   the one program on the cgroup root
//!                    /pods/<slot>/{egress,ingress}-<ifindex>   links (TCX; clsact filters have none)
//!                                /steer                        link (sk_lookup)
//!                                /program-…                    the programs
//!                                /build-…                      directory whose name tells the build
//! ```
//!
//! Methods that say so act on the network namespace of the *calling thread*, as the kernel's own
//! calls do.

mod attach;
mod clsact;
mod former;
mod host;
mod maps;
mod pins;
mod sys;

use std::{
    collections::HashMap,
    fmt::Write as _,
    fs, io,
    net::IpAddr,
    os::fd::{AsRawFd, BorrowedFd},
    path::{Path, PathBuf},
};

use aya::{
    EbpfError, EbpfLoader,
    maps::MapError,
    pin::PinError,
    programs::{ProgramError, links::LinkError},
    util::KernelVersion,
};
use parking_lot::Mutex;
use picomesh_common::{
    Addr, Counter, PodConfig, ProbeKey, ProbeState, StandingKey,
    config::{INBOUND, LAYOUT, MAX_PODS, OUTBOUND, V4, V6, constant},
};
use thiserror::Error;

pub use attach::{HookFault, PodHooks, PodPrograms};
use former::Former;
use maps::SharedMaps;
pub use maps::SocketMarker;
pub(super) use pins::make_dir;
use pins::{entries, remove, remove_tree, take_off};

/// The object that `cargo xtask ebpf` made, if it was there when this was built.
static OBJECT: Option<&[u8]> = include!(concat!(env!("OUT_DIR"), "/object.rs"));

/// Bytes before the IP header on an Ethernet-like interface.
pub const L2_ETHERNET: u32 = 14;
/// The same on an interface that carries bare IP packets.
pub const L2_NONE: u32 = 0;

/// Directories of a layout.
const DIRS: [&str; 4] = ["maps", "pods", "host", "shared"];

const TCX_SINCE: KernelVersion = KernelVersion::new(6, 6, 0);

/// Constants of the programs are borrowed by aya's loader for as long as it lives, and the loader
/// is kept because making one parses the kernel's whole BTF, only to throw it away.
static SLOTS: [u32; MAX_PODS as usize] = {
    let mut slots = [0; MAX_PODS as usize];
    let mut i = 0;
    while i < slots.len() {
        slots[i] = i as u32;
        i += 1;
    }
    slots
};
static L2_LENS: [u32; 2] = [L2_NONE, L2_ETHERNET];

#[derive(Clone, Debug)]
pub struct LoaderSettings {
    /// Pins live in `<bpf_dir>/v<LAYOUT>`; must be on a bpffs, writable by its owner alone.
    pub bpf_dir: PathBuf,
    /// Mark of the proxy's own sockets (see [`picomesh_common::config::MARK_MASK`]).
    pub our_mark: u32,
    /// Mark of captured packets.
    pub capture_mark: u32,
    /// SO_NETNS_COOKIE of the node's network namespace.
    pub node_netns_cookie: u64,
    /// [`picomesh_common::config::rule`] bits in force; all of them outside tests.
    pub rules: u32,
    /// Use clsact even where the kernel has TCX.
    pub force_clsact: bool,
    pub generation: Generation,
}

/// What tells this build apart in the kernel. Only tests name one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Generation {
    /// [`LAYOUT`]; pins of other layouts are taken over.
    pub layout: u32,
    /// Makes another build of the same object.
    pub name: String,
}

impl Default for Generation {
    fn default() -> Self {
        Self {
            layout: LAYOUT,
            name: String::new(),
        }
    }
}

/// An interface of a pod, `lo` and our own devices excepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    pub name: String,
    pub index: u32,
    /// [`L2_ETHERNET`] or [`L2_NONE`].
    pub l2_len: u32,
}

#[derive(Debug, Error)]
pub enum LoaderError {
    #[error("this build has no eBPF object: run `cargo xtask ebpf` and build again")]
    NoObject,
    #[error("bpf directory {path}: {problem}")]
    Directory { path: PathBuf, problem: String },
    #[error(
        "no cgroup v2 is mounted (no line `cgroup2` in /proc/self/mounts): mount one, or probes of strict pods fail"
    )]
    NoCgroup2,
    #[error(
        "the eBPF object has no {what} named {name}: it is of another build, run `cargo xtask ebpf`"
    )]
    ObjectLacks {
        what: &'static str,
        name: &'static str,
    },
    #[error(
        "pinned map {name} has (key, value, entries) {found:?} where this layout has {wanted:?}: run `picomesh-agent cleanup`"
    )]
    Shape {
        name: &'static str,
        found: (usize, usize, u32),
        wanted: (usize, usize, u32),
    },
    #[error("slot {0} is beyond the {MAX_PODS} pods that one agent enrols")]
    SlotOutOfRange(u32),
    #[error("interface {name}: l2_len {l2_len} is neither {L2_NONE} nor {L2_ETHERNET}")]
    UnknownL2 { name: String, l2_len: u32 },
    #[error("{doing}")]
    Io {
        doing: &'static str,
        source: io::Error,
    },
    #[error("attaching {what}")]
    Attach {
        what: String,
        source: Box<ProgramError>,
    },
    #[error("replacing the program behind {pin}")]
    Replace { pin: PathBuf, source: io::Error },
    #[error("pin {pin}")]
    PinFile { pin: PathBuf, source: io::Error },
    #[error(transparent)]
    Object(#[from] Box<EbpfError>),
    #[error(transparent)]
    Map(#[from] MapError),
    #[error(transparent)]
    Program(#[from] Box<ProgramError>),
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error(transparent)]
    Pin(#[from] PinError),
}

impl From<ProgramError> for LoaderError {
    fn from(source: ProgramError) -> Self {
        Self::Program(Box::new(source))
    }
}

impl From<EbpfError> for LoaderError {
    fn from(source: EbpfError) -> Self {
        Self::Object(Box::new(source))
    }
}

/// The kernel half of one agent. `Send + Sync`; every method takes `&self`.
pub struct Loader {
    settings: LoaderSettings,
    /// `<bpf_dir>/v<LAYOUT>`.
    root: PathBuf,
    bytes: &'static [u8],
    kernel_has_tcx: bool,
    maps: SharedMaps,
    /// Other layouts whose programs may still be attached.
    former: Mutex<Vec<Former>>,
    /// One for all pods; see [`SLOTS`].
    aya: Mutex<EbpfLoader<'static>>,
    /// Held while shared programs are put into their places.
    sharing: Mutex<()>,
}

impl Loader {
    /// Makes or opens the shared pinned maps. Attaches nothing.
    pub fn new(settings: LoaderSettings) -> Result<Self, LoaderError> {
        Self::with_object(OBJECT.ok_or(LoaderError::NoObject)?, settings)
    }

    fn with_object(bytes: &'static [u8], settings: LoaderSettings) -> Result<Self, LoaderError> {
        let root = settings
            .bpf_dir
            .join(format!("v{}", settings.generation.layout));
        for dir in [&settings.bpf_dir, &root] {
            make_dir(dir)?;
        }
        for dir in DIRS {
            make_dir(&root.join(dir))?;
        }
        let former = former::inherit(&settings.bpf_dir, &root)?;

        let mut aya = EbpfLoader::new();
        // Nothing of ours is relocated by the kernel's types (rule 15), and parsed they are 12 MB.
        aya.btf(None);
        for (name, pin) in maps::pins(&root.join("maps")) {
            aya.map_pin_path(name, pin);
        }
        // Live as long as the loader that borrows them: once per agent.
        let marks: &'static [u32; 3] = Box::leak(Box::new([
            settings.our_mark,
            settings.capture_mark,
            settings.rules,
        ]));
        let cookie: &'static u64 = Box::leak(Box::new(settings.node_netns_cookie));
        aya.override_global(constant::OUR_MARK, &marks[0], true)
            .override_global(constant::CAPTURE_MARK, &marks[1], true)
            .override_global(constant::RULES, &marks[2], true)
            .override_global(constant::NODE_NETNS, cookie, true);
        let maps = SharedMaps::take(&mut aya.load(bytes)?, &root.join("maps"))?;

        let kernel_has_tcx = KernelVersion::current().is_ok_and(|running| running >= TCX_SINCE);
        Ok(Self {
            settings,
            root,
            bytes,
            kernel_has_tcx,
            maps,
            former: Mutex::new(former),
            aya: Mutex::new(aya),
            sharing: Mutex::new(()),
        })
    }

    /// Are the tc programs attached by TCX (else by clsact)?
    pub fn uses_tcx(&self) -> bool {
        self.kernel_has_tcx && !self.settings.force_clsact
    }

    /// For data threads: makes their sockets ours.
    pub fn marker(&self) -> Result<SocketMarker, LoaderError> {
        self.maps.marker().map_err(|source| LoaderError::Io {
            doing: "duplicating the map SOCKETS",
            source,
        })
    }

    /// Value of the socket's storage ([`picomesh_common::config::owner`]), for `debug` and tests.
    pub fn storage(&self, socket: BorrowedFd<'_>) -> io::Result<Option<u32>> {
        self.maps.storage(socket)
    }

    /// The map of all sockets' storages, for [`super::diag::of_owner`].
    pub(super) fn storages(&self) -> BorrowedFd<'_> {
        self.maps.storages()
    }

    /// From now on `socket` (a listening TCP socket of the pod's netns) gets what is captured in
    /// this direction and family; the socket before it keeps what it accepted. One member of a
    /// reuseport group stands for the group.
    pub fn set_listener(
        &self,
        slot: u32,
        direction: u32,
        family: u32,
        socket: &impl AsRawFd,
    ) -> Result<(), LoaderError> {
        self.maps
            .set_listener(checked(slot)?, direction, family, socket)
    }

    pub fn clear_listener(
        &self,
        slot: u32,
        direction: u32,
        family: u32,
    ) -> Result<(), LoaderError> {
        self.maps.clear_listener(checked(slot)?, direction, family)
    }

    pub fn pod_config(&self, slot: u32) -> Result<PodConfig, LoaderError> {
        self.maps.pod(checked(slot)?)
    }

    pub fn set_pod_config(&self, slot: u32, config: &PodConfig) -> Result<(), LoaderError> {
        self.maps.set_pod(checked(slot)?, config)
    }

    pub fn insert_standing(&self, key: &StandingKey) -> Result<(), LoaderError> {
        self.maps.insert_standing(key)
    }

    pub fn remove_standing(&self, key: &StandingKey) -> Result<(), LoaderError> {
        self.maps.remove_standing(key)
    }

    /// Of all slots.
    pub fn standing(&self) -> Result<Vec<StandingKey>, LoaderError> {
        self.maps.standing()
    }

    /// What builds of other layouts knew of a slot.
    pub fn former_standing(&self, slot: u32) -> Vec<StandingKey> {
        let former = self.former.lock();
        let all = former.iter().flat_map(|former| &former.standing);
        all.filter(|key| key.slot == slot).copied().collect()
    }

    /// Has another layout left anything?
    pub fn has_former(&self) -> bool {
        !self.former.lock().is_empty()
    }

    /// Removes what other layouts left. To be called when no pod's programs use it any more.
    pub fn forget_former(&self) -> Result<(), LoaderError> {
        for former in std::mem::take(&mut *self.former.lock()) {
            former.forget()?;
        }
        Ok(())
    }

    /// Puts back pins of maps that somebody removed, and says which.
    pub fn mend_pins(&self) -> Result<Vec<&'static str>, LoaderError> {
        make_dir(&self.root)?;
        for dir in DIRS {
            make_dir(&self.root.join(dir))?;
        }
        self.maps.mend_pins()
    }

    /// Tells `host_sockets` that a pod of this node has this address.
    pub fn insert_local(&self, addr: Addr, slot: u32) -> Result<(), LoaderError> {
        self.maps.insert_local(addr, checked(slot)?)
    }

    /// Takes all addresses of this slot away but those in `keep`.
    pub fn keep_local(&self, slot: u32, keep: &[IpAddr]) -> Result<(), LoaderError> {
        self.maps.keep_local(slot, keep)
    }

    pub fn local(&self) -> Result<HashMap<Addr, u32>, LoaderError> {
        self.maps.local()
    }

    /// The probes under way, for `debug` and tests.
    pub fn probes(&self) -> Result<Vec<(ProbeKey, ProbeState)>, LoaderError> {
        self.maps.probes()
    }

    pub fn insert_probe(&self, key: &ProbeKey, state: &ProbeState) -> Result<(), LoaderError> {
        self.maps.insert_probe(key, state)
    }

    pub fn remove_probe(&self, key: &ProbeKey) -> Result<(), LoaderError> {
        self.maps.remove_probe(key)
    }

    /// Summed over the CPUs, zeros included.
    pub fn counters(&self, slot: u32) -> Result<Vec<(Counter, u64)>, LoaderError> {
        self.maps.counters(checked(slot)?)
    }

    /// Empties a slot for its next pod: configuration (so that TCP is dropped until the next one
    /// is written), listeners (closed ones leave by themselves, but perhaps too late), addresses,
    /// then the probes that they admitted, standing connections and counters.
    pub fn clear_slot(&self, slot: u32) -> Result<(), LoaderError> {
        self.maps.set_pod(checked(slot)?, &PodConfig::EMPTY)?;
        for direction in [OUTBOUND, INBOUND] {
            for family in [V4, V6] {
                self.maps.clear_listener(slot, direction, family)?;
            }
        }
        self.maps.keep_local(slot, &[])?;
        for key in self.maps.standing()? {
            if key.slot == slot {
                self.maps.remove_standing(&key)?;
            }
        }
        for (key, _state) in self.maps.probes()? {
            if key.slot == slot {
                self.maps.remove_probe(&key)?;
            }
        }
        self.maps.clear_counters(slot)
    }

    /// Slots for which something is pinned: what an earlier agent left, or this one made.
    pub fn pinned_slots(&self) -> Result<Vec<u32>, LoaderError> {
        let mut slots: Vec<u32> = entries(&self.root.join("pods"))?
            .iter()
            .filter_map(|name| name.parse().ok())
            .collect();
        slots.sort_unstable();
        Ok(slots)
    }

    /// Was what is pinned for this slot made by this very build, with the same constants? Then it
    /// may stay as it is.
    pub fn same_build(&self, slot: u32) -> bool {
        self.is_stamped(&self.pod_dir(slot))
    }

    /// Removes every pin of this layout, and with the last one the directories. Detach the pods
    /// first: clsact filters hang in their namespaces, not here.
    pub fn remove_everything(self) -> Result<(), LoaderError> {
        self.forget_former()?;
        let Self { root, settings, .. } = self;
        take_off(&root.join("host/sockops"))?;
        remove_tree(&root)?;
        match fs::remove_dir(&settings.bpf_dir) {
            // Another's pins, or somebody's mount: not ours to remove.
            Err(error)
                if !matches!(
                    error.kind(),
                    io::ErrorKind::DirectoryNotEmpty
                        | io::ErrorKind::NotFound
                        | io::ErrorKind::ResourceBusy
                ) =>
            {
                Err(LoaderError::PinFile {
                    pin: settings.bpf_dir,
                    source: error,
                })
            }
            Ok(()) | Err(_) => Ok(()),
        }
    }

    fn pod_dir(&self, slot: u32) -> PathBuf {
        self.root.join("pods").join(slot.to_string())
    }

    /// Names what is loaded: the object and every constant that is not the slot.
    fn build(&self) -> String {
        use aws_lc_rs::digest;
        let LoaderSettings {
            our_mark,
            capture_mark,
            node_netns_cookie,
            rules,
            ref generation,
            ..
        } = self.settings;
        let mut hash = digest::Context::new(&digest::SHA256);
        hash.update(self.bytes);
        for word in [our_mark, capture_mark, rules] {
            hash.update(&word.to_ne_bytes());
        }
        hash.update(&node_netns_cookie.to_ne_bytes());
        hash.update(generation.name.as_bytes());
        hash.finish().as_ref()[..8]
            .iter()
            .fold(String::new(), |mut text, byte| {
                // Writing to a String cannot fail.
                let _ = write!(text, "{byte:02x}");
                text
            })
    }

    fn is_stamped(&self, dir: &Path) -> bool {
        dir.join(format!("build-{}", self.build())).is_dir()
    }

    /// Leaves this build's name in `dir`, when everything there is of it.
    fn stamp(&self, dir: &Path) -> Result<(), LoaderError> {
        make_dir(&dir.join(format!("build-{}", self.build())))
    }

    /// Takes every build's name away, before the first program there is replaced: whoever is killed
    /// in between leaves programs of two.
    fn unstamp(dir: &Path) -> Result<(), LoaderError> {
        for name in entries(dir)? {
            if name.starts_with("build-") {
                remove(&dir.join(name))?;
            }
        }
        Ok(())
    }
}

fn checked(slot: u32) -> Result<u32, LoaderError> {
    if slot < MAX_PODS {
        Ok(slot)
    } else {
        Err(LoaderError::SlotOutOfRange(slot))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_beyond_the_maps_is_refused() {
        assert!(checked(MAX_PODS - 1).is_ok());
        assert!(matches!(
            checked(MAX_PODS),
            Err(LoaderError::SlotOutOfRange(512))
        ));
    }
}

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
//!                    /host/{sockops,program,build-…}   the one program on the cgroup root
//!                    /pods/<slot>/{egress,ingress}-<ifindex>   links (TCX; clsact filters have none)
//!                                /steer                        link (sk_lookup)
//!                                /program-…                    the programs
//!                                /build-…                      directory whose name tells the build
//! ```
//!
//! Methods that say so act on the network namespace of the *calling thread*, as the kernel's own
//! calls do.

mod clsact;
mod maps;
mod sys;

use std::{
    collections::HashMap,
    fmt::Write as _,
    fs, io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::fs::{DirBuilderExt, PermissionsExt},
    },
    path::{Path, PathBuf},
};

use aya::{
    Ebpf, EbpfError, EbpfLoader,
    maps::MapError,
    pin::PinError,
    programs::{
        CgroupAttachMode, Link as _, LinkOrder, ProgramError, ProgramInfo, SchedClassifier,
        SkLookup, SockOps, TcAttachType,
        links::{FdLink, LinkError, PinnedLink},
        tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcError},
    },
    util::KernelVersion,
};
use parking_lot::Mutex;
use picomesh_common::{
    Addr, Counter, PodConfig, ProbeKey, ProbeState, StandingKey,
    config::{LAYOUT, MAX_PODS, constant, program},
};
use thiserror::Error;

use maps::SharedMaps;
pub use maps::SocketMarker;

/// The object that `cargo xtask ebpf` made, if it was there when this was built.
static OBJECT: Option<&[u8]> = include!(concat!(env!("OUT_DIR"), "/object.rs"));

/// Bytes before the IP header on an Ethernet-like interface.
pub const L2_ETHERNET: u32 = 14;
/// The same on an interface that carries bare IP packets.
pub const L2_NONE: u32 = 0;

const TCX_SINCE: KernelVersion = KernelVersion::new(6, 6, 0);

/// Constants of the programs are borrowed by aya's loader for as long as it lives, and the loader
/// is kept because making one parses the kernel's whole BTF.
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
    /// Parsing the kernel's BTF is most of the cost of a loader, so one serves every pod.
    aya: Mutex<EbpfLoader<'static>>,
    /// The instance that made or opened the maps; it runs the program of the host's sockets.
    host: Mutex<Ebpf>,
}

impl Loader {
    /// Makes or opens the shared pinned maps. Attaches nothing.
    pub fn new(settings: LoaderSettings) -> Result<Self, LoaderError> {
        Self::with_object(OBJECT.ok_or(LoaderError::NoObject)?, settings)
    }

    fn with_object(bytes: &'static [u8], settings: LoaderSettings) -> Result<Self, LoaderError> {
        let root = settings.bpf_dir.join(format!("v{LAYOUT}"));
        for dir in [&settings.bpf_dir, &root, &root.join("maps")] {
            make_dir(dir)?;
        }
        for dir in ["pods", "host"] {
            make_dir(&root.join(dir))?;
        }

        let mut aya = EbpfLoader::new();
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
        let mut host = aya.load(bytes)?;
        let maps = SharedMaps::take(&mut host)?;

        let kernel_has_tcx = KernelVersion::current().is_ok_and(|running| running >= TCX_SINCE);
        Ok(Self {
            settings,
            root,
            bytes,
            kernel_has_tcx,
            maps,
            aya: Mutex::new(aya),
            host: Mutex::new(host),
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

    /// Tells `host_sockets` that a pod of this node has this address.
    pub fn insert_local(&self, addr: Addr, slot: u32) -> Result<(), LoaderError> {
        self.maps.insert_local(addr, checked(slot)?)
    }

    pub fn remove_local(&self, addr: Addr) -> Result<(), LoaderError> {
        self.maps.remove_local(addr)
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
    /// is written), standing connections, probes, addresses and counters. The listeners leave the
    /// map by themselves when they are closed.
    pub fn clear_slot(&self, slot: u32) -> Result<(), LoaderError> {
        self.maps.set_pod(checked(slot)?, &PodConfig::EMPTY)?;
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
        for (addr, owner) in self.maps.local()? {
            if owner == slot {
                self.maps.remove_local(addr)?;
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
        self.pod_dir(slot)
            .join(format!("build-{}", self.build()))
            .is_dir()
    }

    /// Loads the pod's programs (about 17 ms, most of it parsing). Needs no particular netns.
    pub fn load_pod(
        &self,
        slot: u32,
        interfaces: &[Interface],
    ) -> Result<PodPrograms, LoaderError> {
        let constant_slot = &SLOTS[checked(slot)? as usize];
        let mut by_l2 = HashMap::new();
        let mut steer = None;
        for interface in interfaces {
            let Some(l2_len) = L2_LENS.iter().find(|known| **known == interface.l2_len) else {
                return Err(LoaderError::UnknownL2 {
                    name: interface.name.clone(),
                    l2_len: interface.l2_len,
                });
            };
            if by_l2.contains_key(l2_len) {
                continue;
            }
            let mut object = {
                let mut aya = self.aya.lock();
                aya.override_global(constant::SLOT, constant_slot, true);
                aya.override_global(constant::L2_LEN, l2_len, true);
                aya.load(self.bytes)?
            };
            for name in [program::EGRESS, program::INGRESS] {
                let classifier = classifier(&mut object, name)?;
                load_patiently(|| classifier.load())?;
            }
            if steer.is_none() {
                let lookup = lookup(&mut object)?;
                load_patiently(|| lookup.load())?;
                steer = Some(*l2_len);
            }
            by_l2.insert(*l2_len, object);
        }
        Ok(PodPrograms {
            slot,
            interfaces: interfaces.to_vec(),
            by_l2,
            steer,
        })
    }

    /// Attaches a pod's programs, or puts them in the place of what an earlier agent attached,
    /// with no packet in between that sees neither or both. The calling thread must be in the
    /// pod's netns, which `netns` names.
    ///
    /// sk_lookup comes first: a packet that tc redirects must find it there.
    pub fn attach(&self, pod: &mut PodPrograms, netns: BorrowedFd<'_>) -> Result<(), LoaderError> {
        let dir = self.pod_dir(pod.slot);
        make_dir(&dir)?;
        let interfaces = std::mem::take(&mut pod.interfaces);
        let result = self.attach_in(&dir, pod, &interfaces, netns);
        pod.interfaces = interfaces;
        result?;
        self.stamp(&dir)
    }

    fn attach_in(
        &self,
        dir: &Path,
        pod: &mut PodPrograms,
        interfaces: &[Interface],
        netns: BorrowedFd<'_>,
    ) -> Result<(), LoaderError> {
        if let Some(object) = pod.steer.and_then(|l2_len| pod.by_l2.get_mut(&l2_len)) {
            let steer = lookup(object)?;
            let pin = dir.join(program::STEER);
            let attached = attached(netns, sys::ATTACH_SK_LOOKUP)?;
            if !replace(&pin, steer.fd()?.as_fd(), &attached)? {
                let id = steer.attach(netns).map_err(|source| LoaderError::Attach {
                    what: program::STEER.to_owned(),
                    source: Box::new(source),
                })?;
                FdLink::from(steer.take_link(id)?).pin(&pin)?;
            }
            repin(&dir.join("program-steer"), |path| steer.pin(path))?;
        }
        for interface in interfaces {
            let Some(object) = pod.by_l2.get_mut(&interface.l2_len) else {
                continue;
            };
            for (name, direction) in HOOKS {
                let classifier = classifier(object, name)?;
                let pin = dir.join(link_name(direction, interface.index));
                if self.uses_tcx() {
                    self.attach_tcx(classifier, interface, direction, &pin)?;
                } else {
                    self.attach_clsact(classifier, interface, direction)?;
                    take_off(&pin)?;
                }
                let program = format!("program-{}-{}", word(direction), interface.l2_len);
                repin(&dir.join(program), |path| classifier.pin(path))?;
            }
        }
        self.drop_stale_links(dir, interfaces)
    }

    fn attach_tcx(
        &self,
        program: &mut SchedClassifier,
        interface: &Interface,
        direction: TcAttachType,
        pin: &Path,
    ) -> Result<(), LoaderError> {
        let attached = self.tcx_programs(interface, direction)?;
        if !replace(pin, program.fd()?.as_fd(), &attached)? {
            let id = program
                .attach_with_options(
                    &interface.name,
                    direction,
                    // A program before ours could end the chain and let a packet past us.
                    TcAttachOptions::TcxOrder(LinkOrder::first()),
                )
                .map_err(|source| LoaderError::Attach {
                    what: format!("{} of {}", word(direction), interface.name),
                    source: Box::new(source),
                })?;
            let link: FdLink = program.take_link(id)?.try_into()?;
            link.pin(pin)?;
        }
        // An earlier agent may have been told to use clsact.
        self.remove_clsact(interface, direction)
    }

    fn attach_clsact(
        &self,
        program: &mut SchedClassifier,
        interface: &Interface,
        direction: TcAttachType,
    ) -> Result<(), LoaderError> {
        let attach_error = |source: ProgramError| LoaderError::Attach {
            what: format!("{} of {} (clsact)", word(direction), interface.name),
            source: Box::new(source),
        };
        match tc::qdisc_add_clsact(&interface.name) {
            Ok(()) => {}
            Err(TcError::NetlinkError(error))
                if error.raw_os_error() == Some(nix::libc::EEXIST) => {}
            Err(error) => return Err(attach_error(error.into())),
        }
        let options = || NlOptions {
            priority: clsact::PRIORITY,
            handle: clsact::HANDLE,
            classid: None,
        };
        let ours = |filter: &clsact::Filter| {
            filter.priority == clsact::PRIORITY && filter.handle == clsact::HANDLE
        };
        let there =
            clsact::filters(interface.index, direction).map_err(|source| LoaderError::Io {
                doing: "listing tc filters",
                source,
            })?;
        let id = if there.iter().any(ours) {
            let old = filter_link(interface, direction)?;
            program.attach_to_link(old)
        } else {
            program.attach_with_options(
                &interface.name,
                direction,
                TcAttachOptions::Netlink(options()),
            )
        }
        .map_err(attach_error)?;
        // The filter outlives the process by itself; aya's link would take it along.
        std::mem::forget(program.take_link(id)?);
        Ok(())
    }

    /// Removes our clsact filter, if it is there. Another one's is never touched: the handle must
    /// be ours and the program must use our maps.
    fn remove_clsact(
        &self,
        interface: &Interface,
        direction: TcAttachType,
    ) -> Result<(), LoaderError> {
        let filters =
            clsact::filters(interface.index, direction).map_err(|source| LoaderError::Io {
                doing: "listing tc filters",
                source,
            })?;
        for filter in filters {
            if filter.priority == clsact::PRIORITY
                && filter.handle == clsact::HANDLE
                && self.is_ours(filter.program)
            {
                filter_link(interface, direction)?.detach()?;
            }
        }
        Ok(())
    }

    /// Pins of interfaces that the pod no longer has.
    fn drop_stale_links(&self, dir: &Path, interfaces: &[Interface]) -> Result<(), LoaderError> {
        for name in entries(dir)? {
            let stale = ["egress-", "ingress-"].iter().any(|prefix| {
                name.strip_prefix(prefix)
                    .and_then(|index| index.parse::<u32>().ok())
                    .is_some_and(|index| interfaces.iter().all(|known| known.index != index))
            });
            if stale {
                take_off(&dir.join(name))?;
            }
        }
        Ok(())
    }

    /// What is attached for this pod, asked of the kernel. The calling thread must be in the
    /// pod's netns, which `netns` names.
    pub fn hooks(
        &self,
        slot: u32,
        interfaces: &[Interface],
        netns: BorrowedFd<'_>,
    ) -> Result<PodHooks, LoaderError> {
        let count = |programs: &[u32]| programs.iter().filter(|id| self.is_ours(**id)).count();
        let mut faults = Vec::new();
        let mut expect_once = |hook: String, found: usize| {
            if found != 1 {
                faults.push(HookFault { hook, found });
            }
        };
        let steer = attached(netns, sys::ATTACH_SK_LOOKUP)?;
        expect_once(program::STEER.to_owned(), count(&steer));
        for interface in interfaces {
            for (_name, direction) in HOOKS {
                let mut programs = self.tcx_programs(interface, direction)?;
                let filters = clsact::filters(interface.index, direction).map_err(|source| {
                    LoaderError::Io {
                        doing: "listing tc filters",
                        source,
                    }
                })?;
                programs.extend(filters.iter().map(|filter| filter.program));
                expect_once(
                    format!("{} of {}", word(direction), interface.name),
                    count(&programs),
                );
            }
        }
        Ok(PodHooks {
            faults,
            same_build: self.same_build(slot),
        })
    }

    /// Takes a pod's programs off and removes its pins. With `interfaces`, the calling thread must
    /// be in the pod's netns; without (the netns is gone), only the pins go. The maps' entries are
    /// left to [`Loader::clear_slot`].
    pub fn detach(&self, slot: u32, interfaces: &[Interface]) -> Result<(), LoaderError> {
        for interface in interfaces {
            for (_name, direction) in HOOKS {
                self.remove_clsact(interface, direction)?;
            }
        }
        // tc first: what it would redirect, sk_lookup must still steer.
        let dir = self.pod_dir(slot);
        let mut names = entries(&dir)?;
        names.sort_by_key(|name| name == program::STEER);
        for name in names {
            let is_link = ["egress-", "ingress-", program::STEER]
                .iter()
                .any(|prefix| name.starts_with(prefix));
            let path = dir.join(name);
            if is_link { take_off(&path)? } else { remove(&path)? }
        }
        remove(&dir)
    }

    /// Attaches the program of the host's sockets to the cgroup v2 root, or puts it in the place
    /// of an earlier build's.
    pub fn attach_host_sockets(&self) -> Result<(), LoaderError> {
        let dir = self.root.join("host");
        let root = cgroup2_root()?;
        let cgroup = fs::File::open(&root).map_err(|source| LoaderError::PinFile {
            pin: root.clone(),
            source,
        })?;
        let attached = attached(cgroup.as_fd(), sys::ATTACH_SOCK_OPS)?;
        let pin = dir.join("sockops");
        let build = dir.join(format!("build-{}", self.build()));
        if build.is_dir() && pinned_program(&pin)?.is_some_and(|id| attached.contains(&id)) {
            return Ok(());
        }
        let mut host = self.host.lock();
        let sockops: &mut SockOps = host
            .program_mut(program::HOST_SOCKETS)
            .ok_or(LoaderError::ObjectLacks {
                what: "program",
                name: program::HOST_SOCKETS,
            })?
            .try_into()?;
        match load_patiently(|| sockops.load()) {
            // A repair: this agent attached it before and somebody took it off.
            Ok(()) | Err(ProgramError::AlreadyLoaded) => {}
            Err(error) => return Err(error.into()),
        }
        if !replace(&pin, sockops.fd()?.as_fd(), &attached)? {
            // A cgroup link stands beside those of others, whatever the mode is called.
            let id = sockops
                .attach(&cgroup, CgroupAttachMode::Single)
                .map_err(|source| LoaderError::Attach {
                    what: format!("{} to {}", program::HOST_SOCKETS, root.display()),
                    source: Box::new(source),
                })?;
            let link: FdLink = sockops.take_link(id)?.try_into()?;
            link.pin(&pin)?;
        }
        repin(&dir.join("program"), |path| sockops.pin(path))?;
        self.stamp(&dir)
    }

    /// Is the program of the host's sockets attached, exactly once?
    pub fn host_sockets_attached(&self) -> Result<bool, LoaderError> {
        let root = cgroup2_root()?;
        let cgroup =
            fs::File::open(&root).map_err(|source| LoaderError::PinFile { pin: root, source })?;
        let programs = attached(cgroup.as_fd(), sys::ATTACH_SOCK_OPS)?;
        Ok(programs.iter().filter(|id| self.is_ours(**id)).count() == 1)
    }

    /// Removes every pin of this layout, and with the last one the directories. Detach the pods
    /// first: clsact filters hang in their namespaces, not here.
    pub fn remove_everything(self) -> Result<(), LoaderError> {
        let Self { root, settings, .. } = self;
        take_off(&root.join("host/sockops"))?;
        remove_tree(&root)?;
        match fs::remove_dir(&settings.bpf_dir) {
            // Another layout's pins, or somebody's mount: not ours to remove.
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
            ..
        } = self.settings;
        let mut hash = digest::Context::new(&digest::SHA256);
        hash.update(self.bytes);
        for word in [our_mark, capture_mark, rules] {
            hash.update(&word.to_ne_bytes());
        }
        hash.update(&node_netns_cookie.to_ne_bytes());
        hash.finish().as_ref()[..8]
            .iter()
            .fold(String::new(), |mut text, byte| {
                // Writing to a String cannot fail.
                let _ = write!(text, "{byte:02x}");
                text
            })
    }

    /// Leaves this build's name in `dir` and takes away any other's.
    fn stamp(&self, dir: &Path) -> Result<(), LoaderError> {
        let build = format!("build-{}", self.build());
        for name in entries(dir)? {
            if name.starts_with("build-") && name != build {
                remove(&dir.join(name))?;
            }
        }
        make_dir(&dir.join(build))
    }

    /// Empty where the kernel has no TCX.
    fn tcx_programs(
        &self,
        interface: &Interface,
        direction: TcAttachType,
    ) -> Result<Vec<u32>, LoaderError> {
        if !self.kernel_has_tcx {
            return Ok(Vec::new());
        }
        let (_revision, programs) = SchedClassifier::query_tcx(&interface.name, direction)?;
        Ok(programs.iter().map(ProgramInfo::id).collect())
    }

    /// Is this a program of this bpf directory, whichever agent loaded it? They are known by the
    /// maps they use: a name is anybody's.
    fn is_ours(&self, program: u32) -> bool {
        let ours = self.maps.ids();
        sys::maps_of(program).is_ok_and(|maps| maps.iter().any(|map| ours.contains(map)))
    }
}

/// The programs of one pod, loaded. Dropping them detaches nothing.
pub struct PodPrograms {
    slot: u32,
    interfaces: Vec<Interface>,
    /// One instance per kind of interface: the length of the link header is a constant.
    by_l2: HashMap<u32, Ebpf>,
    /// The instance whose sk_lookup program serves the pod.
    steer: Option<u32>,
}

/// What the kernel says of one pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodHooks {
    /// Hooks that do not have exactly one program of ours.
    pub faults: Vec<HookFault>,
    /// What is attached is of this build, with the same constants.
    pub same_build: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HookFault {
    /// `steer`, or `egress of eth0`.
    pub hook: String,
    /// Programs of ours that were found there; 0: somebody took it off.
    pub found: usize,
}

/// Program and direction of each tc hook.
const HOOKS: [(&str, TcAttachType); 2] = [
    (program::EGRESS, TcAttachType::Egress),
    (program::INGRESS, TcAttachType::Ingress),
];

fn word(direction: TcAttachType) -> &'static str {
    match direction {
        TcAttachType::Egress => "egress",
        TcAttachType::Ingress => "ingress",
        TcAttachType::Custom(_) => "custom",
    }
}

/// By index: an interface's name may hold a dot, which bpffs forbids.
fn link_name(direction: TcAttachType, ifindex: u32) -> String {
    format!("{}-{ifindex}", word(direction))
}

fn checked(slot: u32) -> Result<u32, LoaderError> {
    if slot < MAX_PODS {
        Ok(slot)
    } else {
        Err(LoaderError::SlotOutOfRange(slot))
    }
}

fn classifier<'a>(
    object: &'a mut Ebpf,
    name: &'static str,
) -> Result<&'a mut SchedClassifier, LoaderError> {
    let program = object.program_mut(name).ok_or(LoaderError::ObjectLacks {
        what: "program",
        name,
    })?;
    Ok(program.try_into()?)
}

fn lookup(object: &mut Ebpf) -> Result<&mut SkLookup, LoaderError> {
    let program = object
        .program_mut(program::STEER)
        .ok_or(LoaderError::ObjectLacks {
            what: "program",
            name: program::STEER,
        })?;
    Ok(program.try_into()?)
}

/// The verifier gives up with EAGAIN when a signal is pending, whoever it is for; the kernel expects
/// to be asked again.
fn load_patiently(
    mut load: impl FnMut() -> Result<(), ProgramError>,
) -> Result<(), ProgramError> {
    const ATTEMPTS: usize = 10;
    let mut result = load();
    for _ in 1..ATTEMPTS {
        match &result {
            Err(ProgramError::LoadError { io_error, .. })
                if io_error.raw_os_error() == Some(nix::libc::EAGAIN) =>
            {
                result = load();
            }
            Ok(()) | Err(_) => break,
        }
    }
    result
}

fn filter_link(
    interface: &Interface,
    direction: TcAttachType,
) -> Result<SchedClassifierLink, LoaderError> {
    SchedClassifierLink::attached(
        &interface.name,
        direction,
        clsact::PRIORITY,
        clsact::HANDLE,
        None,
    )
    .map_err(|source| LoaderError::Io {
        doing: "finding the interface of a tc filter",
        source,
    })
}

fn attached(target: BorrowedFd<'_>, attach_type: u32) -> Result<Vec<u32>, LoaderError> {
    sys::attached_programs(target, attach_type).map_err(|source| LoaderError::Io {
        doing: "asking a hook for its programs",
        source,
    })
}

/// Program that the link pinned at `pin` runs; `None` if nothing is pinned there.
fn pinned_program(pin: &Path) -> Result<Option<u32>, LoaderError> {
    match PinnedLink::from_pin(pin) {
        Ok(link) => Ok(Some(FdLink::from(link).info()?.program_id())),
        Err(LinkError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => {
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}

/// Puts `program` behind the link that is pinned at `pin`, if that link is the one at the hook
/// which runs the programs `attached`. A pin of anything else (its device or namespace is gone, or
/// the slot had another pod) is removed, and the answer is no.
fn replace(pin: &Path, program: BorrowedFd<'_>, attached: &[u32]) -> Result<bool, LoaderError> {
    let Some(old) = pinned_program(pin)? else {
        return Ok(false);
    };
    let failed = |source| LoaderError::Replace {
        pin: pin.to_owned(),
        source,
    };
    if attached.contains(&old) {
        let link = sys::open_pin(pin).map_err(failed)?;
        match sys::update_link(link.as_fd(), program) {
            Ok(()) => return Ok(true),
            // Went away between the two questions.
            Err(error) if error.raw_os_error() == Some(nix::libc::ENOLINK) => {}
            Err(error) => return Err(failed(error)),
        }
    }
    take_off(pin)?;
    Ok(false)
}

/// Detaches and unpins a link, if it is pinned.
fn take_off(pin: &Path) -> Result<(), LoaderError> {
    match sys::open_pin(pin) {
        Ok(link) => {
            // What it was attached to may be gone, and then it is detached already.
            let _ = sys::detach_link(link.as_fd());
            remove(pin)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(LoaderError::PinFile { pin: pin.to_owned(), source }),
    }
}

/// Pins by `pin`, in the place of whatever is at `path`.
fn repin(path: &Path, pin: impl FnOnce(&Path) -> Result<(), PinError>) -> Result<(), LoaderError> {
    remove(path)?;
    Ok(pin(path)?)
}

/// A missing directory has no entries.
fn entries(dir: &Path) -> Result<Vec<String>, LoaderError> {
    let failed = |source| LoaderError::PinFile {
        pin: dir.to_owned(),
        source,
    };
    match fs::read_dir(dir) {
        Ok(entries) => entries
            .map(|entry| {
                Ok(entry
                    .map_err(failed)?
                    .file_name()
                    .to_string_lossy()
                    .into_owned())
            })
            .collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(failed(error)),
    }
}

/// Removes a pin or an empty directory, if it is there.
fn remove(path: &Path) -> Result<(), LoaderError> {
    let result = match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match result {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(LoaderError::PinFile {
            pin: path.to_owned(),
            source: error,
        }),
        Ok(()) | Err(_) => Ok(()),
    }
}

fn remove_tree(dir: &Path) -> Result<(), LoaderError> {
    for name in entries(dir)? {
        let path = dir.join(name);
        if path.is_dir() {
            remove_tree(&path)?
        } else {
            remove(&path)?
        }
    }
    remove(dir)
}

/// Makes a directory for its owner alone; one that others may write is refused, because whoever
/// can put a pin there decides what runs.
fn make_dir(dir: &Path) -> Result<(), LoaderError> {
    let problem = |problem: String| LoaderError::Directory {
        path: dir.to_owned(),
        problem,
    };
    match fs::DirBuilder::new().mode(0o700).create(dir) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            let meta = fs::metadata(dir).map_err(|error| problem(error.to_string()))?;
            if meta.permissions().mode() & 0o022 != 0 {
                return Err(problem(format!(
                    "mode {:o} lets others write: chmod go-w it or choose another --bpf-dir",
                    meta.permissions().mode() & 0o7777
                )));
            }
            Ok(())
        }
        Err(error) => Err(problem(format!(
            "{error}; it must be below a mounted bpffs (`mount -t bpf bpf /sys/fs/bpf`)"
        ))),
    }
}

/// The first cgroup v2 mount: its root holds every process, on hosts with cgroup v1 as well.
fn cgroup2_root() -> Result<PathBuf, LoaderError> {
    let mounts = fs::read_to_string("/proc/self/mounts").map_err(|source| LoaderError::Io {
        doing: "reading /proc/self/mounts",
        source,
    })?;
    cgroup2_in(&mounts).ok_or(LoaderError::NoCgroup2)
}

fn cgroup2_in(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let (_device, path, kind) = (fields.next()?, fields.next()?, fields.next()?);
        // The kernel writes blanks in paths as octal.
        (kind == "cgroup2").then(|| PathBuf::from(path.replace("\\040", " ")))
    })
}

#[cfg(test)]
mod tests {
    #![expect(
        clippy::unwrap_used,
        reason = "a test may stop at what it did not expect"
    )]

    use super::*;

    #[test]
    fn cgroup2_is_found_wherever_it_is_mounted() {
        let hybrid = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\n\
                      cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n\
                      cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(
            cgroup2_in(hybrid),
            Some(PathBuf::from("/sys/fs/cgroup/unified"))
        );
        let blank = "none /mnt/with\\040blank cgroup2 rw 0 0\n";
        assert_eq!(cgroup2_in(blank), Some(PathBuf::from("/mnt/with blank")));
        assert_eq!(
            cgroup2_in("cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n"),
            None
        );
    }

    #[test]
    fn a_directory_that_others_may_write_is_refused() {
        let outer = tempfile::tempdir().unwrap();
        let dir = outer.path().join("pins");
        make_dir(&dir).unwrap();
        make_dir(&dir).unwrap();
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o770)).unwrap();
        let error = make_dir(&dir).unwrap_err().to_string();
        assert!(
            error.contains("770") && error.contains("--bpf-dir"),
            "{error}"
        );
    }

    #[test]
    fn a_slot_beyond_the_maps_is_refused() {
        assert!(checked(MAX_PODS - 1).is_ok());
        assert!(matches!(
            checked(MAX_PODS),
            Err(LoaderError::SlotOutOfRange(512))
        ));
    }

    #[test]
    fn removing_what_is_gone_is_no_error() {
        let outer = tempfile::tempdir().unwrap();
        remove_tree(&outer.path().join("never")).unwrap();
        fs::create_dir_all(outer.path().join("a/b")).unwrap();
        remove_tree(&outer.path().join("a")).unwrap();
        assert!(!outer.path().join("a").exists());
    }
}

//! Attaches a pod's programs, replaces them, and asks the kernel what is attached.
//!
//! Called by the agent's loop through [`Loader`]. Knows hooks and links; which pod has which slot
//! and what lies in the maps is not its business.

use std::{
    collections::{HashMap, HashSet},
    io,
    os::fd::{AsFd, BorrowedFd},
    path::{Path, PathBuf},
};

use aya::{
    Ebpf,
    programs::{
        Link as _, LinkOrder, ProgramError, ProgramInfo, SchedClassifier, SkLookup, TcAttachType,
        links::FdLink,
        tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcError},
    },
};
use picomesh_common::config::{EGRESS, INGRESS, constant, jump_index, program};

use super::{
    Interface, L2_LENS, Loader, LoaderError, SLOTS, checked, clsact,
    pins::{entries, is_link, make_dir, pinned_program, remove, repin, replace, take_off},
    sys,
};

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
    /// What is attached is of this build, with the same constants, and runs on this loader's maps.
    pub same_build: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HookFault {
    /// `steer`, or `egress of eth0`.
    pub hook: String,
    /// Programs of ours that were found there; 0: somebody took it off.
    pub found: usize,
}

impl Loader {
    /// Loads the pod's programs, and those that all pods share if they are not in their place.
    /// Needs no particular netns.
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
            self.share(l2_len)?;
            let mut object = self.object(constant_slot, l2_len)?;
            for (name, _direction) in HOOKS {
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

    /// Puts the programs that decide into their places, for all pods with interfaces of this kind,
    /// unless they are there and of this build. Replacing one is one step for all pods.
    fn share(&self, l2_len: &'static u32) -> Result<(), LoaderError> {
        let _one_at_a_time = self.sharing.lock();
        let dir = self.shared_dir(*l2_len);
        if self.is_shared(*l2_len)? {
            return Ok(());
        }
        make_dir(&dir)?;
        Self::unstamp(&dir)?;
        let mut object = self.object(&SLOTS[0], l2_len)?;
        for (direction, name) in SHARED {
            let classifier = classifier(&mut object, name)?;
            load_patiently(|| classifier.load())?;
            self.maps
                .set_jump(jump_index(direction, *l2_len), classifier.fd()?)?;
            repin(&dir.join(name), |path| classifier.pin(path))?;
        }
        self.stamp(&dir)
    }

    /// Are the shared programs of this build in their places?
    fn is_shared(&self, l2_len: u32) -> Result<bool, LoaderError> {
        let dir = self.shared_dir(l2_len);
        if !self.is_stamped(&dir) {
            return Ok(false);
        }
        for (direction, name) in SHARED {
            let there = self
                .maps
                .jump(jump_index(direction, l2_len))
                .map_err(|source| LoaderError::Io {
                    doing: "asking for a shared program",
                    source,
                })?;
            let pinned = ProgramInfo::from_pin(dir.join(name)).ok();
            let pinned = pinned.map(|program| program.id());
            if pinned.is_none_or(|id| there != Some(id) || !self.runs_on_our_maps(id)) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn shared_dir(&self, l2_len: u32) -> PathBuf {
        self.root.join("shared").join(l2_len.to_string())
    }

    /// The object with a pod's constants, nothing loaded yet.
    fn object(&self, slot: &'static u32, l2_len: &'static u32) -> Result<Ebpf, LoaderError> {
        let mut aya = self.aya.lock();
        aya.override_global(constant::SLOT, slot, true);
        aya.override_global(constant::L2_LEN, l2_len, true);
        Ok(aya.load(self.bytes)?)
    }

    /// Attaches a pod's programs, or puts them in the place of what an earlier agent attached,
    /// with no packet in between that sees neither or both. The calling thread must be in the
    /// pod's netns, which `netns` names.
    ///
    /// sk_lookup comes first: a packet that tc redirects must find it there.
    pub fn attach(&self, pod: &mut PodPrograms, netns: BorrowedFd<'_>) -> Result<(), LoaderError> {
        let dir = self.pod_dir(pod.slot);
        make_dir(&dir)?;
        Self::unstamp(&dir)?;
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
        let pinned = self.pinned_programs(slot)?;
        let mut faults = Vec::new();
        let mut adrift = false;
        let mut expect_once = |hook: String, programs: &[u32]| {
            let ours = |id: &&u32| pinned.contains(id) || self.is_ours(**id);
            let found: Vec<u32> = programs.iter().filter(ours).copied().collect();
            adrift |= found.iter().any(|id| !self.runs_on_our_maps(*id));
            if found.len() != 1 {
                faults.push(HookFault {
                    hook,
                    found: found.len(),
                });
            }
        };
        let steer = attached(netns, sys::ATTACH_SK_LOOKUP)?;
        expect_once(program::STEER.to_owned(), &steer);
        let mut same_build = self.same_build(slot);
        for interface in interfaces {
            same_build &= self.is_shared(interface.l2_len)?;
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
                    &programs,
                );
            }
        }
        same_build &= !adrift;
        Ok(PodHooks { faults, same_build })
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
            let path = dir.join(&name);
            if is_link(&name) {
                take_off(&path)?
            } else {
                remove(&path)?
            }
        }
        remove(&dir)
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

    /// The network namespace (its inode) whose pod has this slot, says the pinned link of
    /// sk_lookup; `None` if nothing is pinned or the namespace is gone.
    pub fn netns_of(&self, slot: u32) -> Result<Option<u64>, LoaderError> {
        let pin = self.pod_dir(slot).join(program::STEER);
        let inode = match sys::open_pin(&pin) {
            Ok(link) => sys::netns_of_link(link.as_fd()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => Err(error),
        };
        let inode = inode.map_err(|source| LoaderError::PinFile { pin, source })?;
        Ok(Some(u64::from(inode)).filter(|inode| *inode != 0))
    }

    /// What the links of a slot run, and with clsact, which has no links, what is pinned itself.
    fn pinned_programs(&self, slot: u32) -> Result<HashSet<u32>, LoaderError> {
        let dir = self.pod_dir(slot);
        let mut programs = HashSet::new();
        for name in entries(&dir)? {
            let pin = dir.join(&name);
            if is_link(&name) {
                programs.extend(pinned_program(&pin)?);
            } else if name.starts_with("program-") && !self.uses_tcx() {
                programs.extend(ProgramInfo::from_pin(&pin).ok().map(|program| program.id()));
            }
        }
        Ok(programs)
    }

    /// Is this a program of this bpf directory, whichever agent loaded it? They are known by the
    /// maps they use: a name is anybody's.
    pub(super) fn is_ours(&self, program: u32) -> bool {
        let former = self.former.lock();
        sys::maps_of(program).is_ok_and(|maps| {
            maps.iter().any(|map| {
                self.maps.has(*map) || former.iter().any(|former| former.maps.contains(map))
            })
        })
    }

    /// All its maps are this loader's, but for the one that holds its constants. A program that is
    /// gone runs on none.
    pub(super) fn runs_on_our_maps(&self, program: u32) -> bool {
        sys::maps_of(program).map_or(true, |maps| {
            maps.iter().filter(|map| !self.maps.has(**map)).count() <= 1
        })
    }
}

/// Program and direction of each tc hook.
const HOOKS: [(&str, TcAttachType); 2] = [
    (program::ENTER_EGRESS, TcAttachType::Egress),
    (program::ENTER_INGRESS, TcAttachType::Ingress),
];

/// Direction and name of each shared program.
const SHARED: [(u32, &str); 2] = [(EGRESS, program::EGRESS), (INGRESS, program::INGRESS)];

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
pub(super) fn load_patiently(
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

pub(super) fn attached(target: BorrowedFd<'_>, attach_type: u32) -> Result<Vec<u32>, LoaderError> {
    sys::attached_programs(target, attach_type).map_err(|source| LoaderError::Io {
        doing: "asking a hook for its programs",
        source,
    })
}

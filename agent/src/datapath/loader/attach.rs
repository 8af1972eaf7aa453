//! Attaches a pod's programs, replaces them, and asks the kernel what is attached.
//!
//! Called by the agent's loop through [`Loader`]. Knows hooks and links; which pod has which slot
//! and what lies in the maps is not its business.

use std::{
    collections::HashMap,
    os::fd::{AsFd, BorrowedFd},
    path::Path,
};

use aya::{
    Ebpf,
    programs::{
        Link as _, LinkOrder, ProgramError, ProgramInfo, SchedClassifier, SkLookup, TcAttachType,
        links::FdLink,
        tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcError},
    },
};
use picomesh_common::config::{constant, program};

use super::{
    Interface, L2_LENS, Loader, LoaderError, SLOTS, checked, clsact,
    pins::{entries, make_dir, remove, repin, replace, take_off},
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

impl Loader {
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
            if is_link {
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

    /// Is this a program of this bpf directory, whichever agent loaded it? They are known by the
    /// maps they use: a name is anybody's.
    pub(super) fn is_ours(&self, program: u32) -> bool {
        let ours = self.maps.ids();
        sys::maps_of(program).is_ok_and(|maps| maps.iter().any(|map| ours.contains(map)))
    }
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

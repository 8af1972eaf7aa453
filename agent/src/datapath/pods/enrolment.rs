//! A pod's way in, told as a story: [`enrol`], then [`check`] for as long as it stays, and
//! [`adopt`] when another agent enrolled it.
//!
//! Blocking, each on a worker thread of the loop; what needs the pod's namespace runs inside it on
//! a thread of its own. The order of the steps is the point of this file: at no moment may a
//! packet be captured that nobody serves, or a connection pass that should be taken.

use std::{collections::HashSet, os::fd::AsFd, path::Path, sync::Arc};

use picomesh_common::{
    Addr, PodConfig, StandingKey, Tuple,
    config::{OUTBOUND, V6},
};

use super::{
    super::{
        DesiredPod, PodListeners,
        devices::{self, DevicesError},
        diag::Connections,
        netns::{Home, NetNs},
        sockets::{self, PodHandle},
    },
    captured::{Captured, Core, inside, list_connections},
    error::PodError,
    leaving::{self, DevicesAre, close, undo},
    records::Record,
};
use crate::state::PodUid;

pub(super) fn enrol(core: &Core, pod: &DesiredPod) -> Result<Arc<Captured>, PodError> {
    let netns = NetNs::open(&pod.netns, &core.home)?;
    if netns.cookie() == core.home.cookie() || is_of_init(&netns, &core.home) {
        return Err(PodError::NetnsOfHost {
            path: pod.netns.clone(),
        });
    }
    // On record before anything is made: whoever finds the pieces must know whose they are.
    let inode = netns.inode();
    let record = Record {
        uid: pod.uid.to_string(),
        name: pod.name.clone(),
        slot: 0,
        netns: pod.netns.clone(),
        cookie: netns.cookie(),
    };
    let slot = core.claims.claim(record, inode)?;
    let handle = Arc::new(PodHandle::new(
        Arc::clone(&pod.uid),
        slot,
        netns,
        core.owner.clone(),
    ));
    let captured = Arc::new(Captured::new(core, handle, &pod.name, &pod.netns));
    let stands_in = core.loader.netns_of(slot)?;
    if stands_in == Some(inode) {
        // Its programs stand and keep it closed. To begin anew would open it, also after a failure.
        let listeners = listeners_without_devices(core, &captured)?;
        captured.install(core, listeners)?;
        check(core, pod, &captured, &core.loader.standing()?)?;
        return Ok(captured);
    }
    if stands_in.is_some() {
        // A sandbox before this one, which nobody had found.
        core.loader.detach(slot, &[])?;
    }
    match enrol_claimed(core, pod, &captured) {
        Ok(()) => Ok(captured),
        Err(error) => {
            // Half an enrolment would be a pod that cannot speak. What turned out to be another's
            // stays as it is.
            let devices = match &error {
                PodError::Devices(DevicesError::Taken { .. } | DevicesError::Conflict { .. }) => {
                    DevicesAre::AnotherS
                }
                PodError::Devices(_)
                | PodError::Netns(_)
                | PodError::NetnsOfHost { .. }
                | PodError::NetnsMoved { .. }
                | PodError::NetnsTaken { .. }
                | PodError::Programs(_)
                | PodError::Sockets { .. }
                | PodError::StandingFull { .. }
                | PodError::NoSlot
                | PodError::Records(_)
                | PodError::Worker(_)
                | PodError::NobodyServes => DevicesAre::Ours,
            };
            if let Err(error) = undo(core, &captured, devices) {
                tracing::warn!(pod = pod.name, %error, "undoing a failed enrolment");
            }
            Err(error)
        }
    }
}

fn enrol_claimed(core: &Core, pod: &DesiredPod, captured: &Arc<Captured>) -> Result<(), PodError> {
    let handle = &captured.handle;
    let (slot, netns) = (handle.slot(), handle.netns());
    core.loader.clear_slot(slot)?;

    // 1. Devices, rules, routes: harmless without programs.
    let (ensured, listeners) = inside(netns, || {
        let ensured = devices::ensure(&captured.device_owner(false), core.marks.capture)?;
        let listeners = make_listeners(core, ensured.ipv6)?;
        Ok((ensured, listeners))
    })?;
    // 2. Listeners, and somebody who serves them.
    captured.install(core, listeners)?;
    // 3. The host's probes are known before they could be mistaken for strangers.
    for ip in &pod.ips {
        core.loader.insert_local(Addr::from(*ip), slot)?;
    }
    // 4. Programs, letting pass what they do not know: what stands must not be touched.
    core.loader
        .set_pod_config(slot, &config(core, pod, PodConfig::ENROLLING))?;
    let mut programs = core.loader.load_pod(slot, &ensured.interfaces)?;
    inside(netns, || {
        Ok(core.loader.attach(&mut programs, netns.as_fd())?)
    })?;
    drop(programs);
    // 5. From here on new connections are taken, so whatever stands now stood before.
    let connections = inside(netns, || list_connections(core))?;
    record_standing(core, slot, &connections)?;
    core.loader.set_pod_config(slot, &config(core, pod, 0))?;
    Ok(())
}

/// How a pod came through a check.
#[derive(Default)]
pub(super) struct Checked {
    pub(super) repaired: Vec<&'static str>,
}

/// Compares the kernel's state of a captured pod with what it should be, and mends it.
/// `standing`: the map's keys, read once for all pods.
pub(super) fn check(
    core: &Core,
    pod: &DesiredPod,
    captured: &Captured,
    standing: &[StandingKey],
) -> Result<Checked, PodError> {
    let handle = &captured.handle;
    let (slot, netns) = (handle.slot(), handle.netns());
    let (ensured, hooks) = inside(netns, || {
        let ensured = devices::ensure(&captured.device_owner(true), core.marks.capture)?;
        let hooks = core
            .loader
            .hooks(slot, &ensured.interfaces, netns.as_fd())?;
        Ok((ensured, hooks))
    })?;
    let mut repaired = ensured.repaired;

    if ensured.ipv6 && !captured.members.lock().contains_key(&(OUTBOUND, V6)) {
        let listeners = inside(netns, || make_listeners(core, true))?;
        captured.install(core, listeners)?;
        repaired.push("listeners");
    } else {
        // A SOCKMAP does not tell what is in it; putting the same socket back changes nothing.
        captured.put_in_map(core)?;
    }

    let local = core.loader.local()?;
    for ip in &pod.ips {
        if local.get(&Addr::from(*ip)) != Some(&slot) {
            core.loader.insert_local(Addr::from(*ip), slot)?;
            repaired.push("addresses");
        }
    }
    core.loader.keep_local(slot, &pod.ips)?;

    let found = core.loader.pod_config(slot)?;
    let wanted = config(core, pod, 0);
    // A slot is active before anything is attached. So these are programs of another layout, or
    // maps were lost: what stood before, and what was ours, is known only so far as it could be
    // taken over.
    let inactive = found.flags & PodConfig::ACTIVE == 0;
    let lost = inactive && core.loader.netns_of(slot)?.is_some();
    if lost {
        for key in core.loader.former_standing(slot) {
            core.loader.insert_standing(&key)?;
        }
        core.loader.set_pod_config(slot, &wanted)?;
    }
    // Before programs that serve are attached: what comes after them is ours by right.
    let unknown = if lost {
        inside(netns, || {
            leaving::unknown(&core.loader, slot, core.marks, true)
        })?
    } else {
        HashSet::new()
    };
    // An agent that died while enrolling, or a pod that was on its way out, has connections that
    // nobody wrote down.
    let unlisted =
        !lost && (inactive || found.flags & (PodConfig::ENROLLING | PodConfig::LEAVING) != 0);
    if unlisted {
        core.loader
            .set_pod_config(slot, &config(core, pod, PodConfig::ENROLLING))?;
    }
    if !hooks.faults.is_empty() || !hooks.same_build {
        let mut programs = core.loader.load_pod(slot, &ensured.interfaces)?;
        inside(netns, || {
            Ok(core.loader.attach(&mut programs, netns.as_fd())?)
        })?;
        repaired.push(if hooks.faults.is_empty() {
            "build"
        } else {
            "programs"
        });
        for fault in &hooks.faults {
            tracing::warn!(
                pod = captured.name,
                hook = fault.hook,
                found = fault.found,
                "a hook had not exactly one program of ours; mended"
            );
        }
    }

    if lost {
        let closed = inside(netns, || Ok(close(unknown.iter())))?;
        tracing::warn!(
            pod = captured.name,
            closed,
            standing = core.loader.former_standing(slot).len(),
            "taken over from another layout, or from maps that were lost"
        );
        repaired.push("maps");
    }

    let mut listed = standing.iter().filter(|key| key.slot == slot).peekable();
    if unlisted || listed.peek().is_some() {
        let connections = inside(netns, || list_connections(core))?;
        if unlisted {
            record_standing(core, slot, &connections)?;
        }
        let alive: HashSet<Tuple> = connections
            .apps
            .iter()
            .map(|(local, remote)| Tuple::new(*local, *remote))
            .collect();
        for gone in listed.filter(|key| !alive.contains(&key.tuple)) {
            core.loader.remove_standing(gone)?;
        }
    }
    if found != wanted && !lost {
        core.loader.set_pod_config(slot, &wanted)?;
        repaired.push("config");
    }
    Ok(Checked { repaired })
}

/// A pod of an earlier agent, served again.
pub(super) struct Adopted {
    pub(super) captured: Arc<Captured>,
    pub(super) listeners: Vec<PodListeners>,
}

/// Finds a recorded pod again after a start: `None` if it is gone, and with it the record. A path
/// may have ended with the agent that wrote it down; then the pod is closed as it is, until somebody
/// says where it lives.
pub(super) fn adopt(core: &Core, record: &Record) -> Result<Option<Adopted>, PodError> {
    let slot = record.slot;
    let netns = NetNs::open(&record.netns, &core.home)
        .ok()
        .filter(|n| n.cookie() == record.cookie);
    let Some(netns) = netns else {
        if core.loader.netns_of(slot)?.is_some() {
            return Err(PodError::NetnsMoved {
                path: record.netns.clone(),
            });
        }
        core.loader.detach(slot, &[])?;
        core.loader.clear_slot(slot)?;
        core.claims.free(&PodUid::from(record.uid.as_str()))?;
        return Ok(None);
    };
    let uid = PodUid::from(record.uid.as_str());
    let handle = Arc::new(PodHandle::new(uid, slot, netns, core.owner.clone()));
    let captured = Arc::new(Captured::new(core, handle, &record.name, &record.netns));
    // The programs drop what nobody listens to, so listeners come before everything else.
    let listeners = listeners_without_devices(core, &captured)?;
    captured.keep_members(&listeners)?;
    captured.put_in_map(core)?;
    Ok(Some(Adopted {
        captured,
        listeners,
    }))
}

fn config(core: &Core, pod: &DesiredPod, extra: u32) -> PodConfig {
    let open = if core.settings.fail_open {
        PodConfig::FAIL_OPEN
    } else {
        0
    };
    PodConfig {
        flags: PodConfig::ACTIVE | open | extra,
        ..pod.config
    }
}

/// Listeners for a pod of which nobody has asked yet whether it has IPv6.
fn listeners_without_devices(
    core: &Core,
    captured: &Captured,
) -> Result<Vec<PodListeners>, PodError> {
    inside(captured.handle.netns(), || {
        match make_listeners(core, true) {
            Err(PodError::Sockets { source, .. }) if sockets::is_no_ipv6(&source) => {
                make_listeners(core, false)
            }
            other => other,
        }
    })
}

fn make_listeners(core: &Core, ipv6: bool) -> Result<Vec<PodListeners>, PodError> {
    sockets::listeners(core.settings.data_threads, ipv6, &core.owner).map_err(|source| {
        PodError::Sockets {
            doing: "making listeners",
            source,
        }
    })
}

fn record_standing(core: &Core, slot: u32, connections: &Connections) -> Result<(), PodError> {
    for (local, remote) in &connections.apps {
        let key = StandingKey {
            slot,
            tuple: Tuple::new(*local, *remote),
        };
        core.loader
            .insert_standing(&key)
            .map_err(|source| PodError::StandingFull {
                count: connections.apps.len(),
                source,
            })?;
    }
    Ok(())
}

/// The machine's first namespace, where the agent's node is another one.
fn is_of_init(netns: &NetNs, home: &Arc<Home>) -> bool {
    NetNs::open(Path::new("/proc/1/ns/net"), home).is_ok_and(|init| init.cookie() == netns.cookie())
}

//! A pod's way out: [`Leave`] while its namespace is there, [`gone`] when it is not, [`undo`] for
//! what could not be finished, [`clean`] after an agent that no longer runs.

use std::{
    collections::HashSet,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use picomesh_common::{PodConfig, Tuple};

use super::{
    super::{
        PodEvent,
        devices::{self, DeviceOwner},
        diag,
        loader::Loader,
        netns::{Home, NetNs},
    },
    captured::{self, Captured, Core, inside, list_connections, list_taken},
    error::PodError,
    records::{Marks, Record},
};
use crate::state::PodUid;

/// A pod on its way out: new connections pass, ours finish, then everything goes.
pub(super) struct Leave {
    since: Instant,
    /// Connections of the application that we had taken. None of them may outlive the programs:
    /// what its socket then sends would be plain (rule 4).
    taken: HashSet<(SocketAddr, SocketAddr)>,
}

/// How long connections of ours may keep a pod that leaves.
const LEAVE_DEADLINE: Duration = Duration::from_secs(3600);

impl Leave {
    pub(super) fn begin(core: &Core, captured: &Captured, now: Instant) -> Result<Self, PodError> {
        let (slot, netns) = (captured.handle.slot(), captured.handle.netns());
        let mut config = core.loader.pod_config(slot)?;
        let was_captured = config.flags & (PodConfig::ENROLLING | PodConfig::LEAVING) == 0
            && !core.settings.fail_open;
        let before = inside(netns, || list_connections(core))?;
        config.flags = config.flags & !PodConfig::ENROLLING | PodConfig::LEAVING;
        core.loader.set_pod_config(slot, &config)?;
        let after = inside(netns, || list_connections(core))?;

        let mut taken: HashSet<_> = before.taken.union(&after.taken).copied().collect();
        // Our end may be gone already where the application's is not. In a pod that was leaving
        // when an agent before us ended, plain ones stand beside them that are so by right.
        taken.extend(inside(netns, || list_taken(&core.loader))?);
        if was_captured {
            let known = Known::read(core, slot, config)?;
            taken.extend(before.apps.iter().filter(|pair| !known.is_plain(pair)));
        }
        Ok(Self { since: now, taken })
    }

    /// True: the pod has left.
    pub(super) fn step(
        &mut self,
        core: &Core,
        captured: &Captured,
        now: Instant,
    ) -> Result<bool, PodError> {
        let netns = captured.handle.netns();
        let connections = inside(netns, || list_connections(core))?;
        self.taken.extend(&connections.taken);
        let overdue = now.saturating_duration_since(self.since) >= LEAVE_DEADLINE;
        if !connections.ours.is_empty() && !overdue {
            return Ok(false);
        }
        inside(netns, || {
            let leftover = self
                .taken
                .iter()
                .filter(|pair| connections.taken.contains(pair) || connections.apps.contains(pair));
            close(leftover.chain(&connections.ours));
            Ok(())
        })?;
        undo(core, captured, DevicesAre::Ours)?;
        Ok(true)
    }
}

/// The pod's namespace is no longer where it was: everything in it goes with it.
pub(super) fn gone(core: &Core, captured: &Captured) -> Result<(), PodError> {
    release(core, captured);
    core.loader.detach(captured.handle.slot(), &[])?;
    free(core, captured)
}

/// Takes a pod's programs and devices off and frees its slot. The namespace is still there.
pub(super) fn undo(core: &Core, captured: &Captured, devices: DevicesAre) -> Result<(), PodError> {
    let slot = captured.handle.slot();
    let result = inside(captured.handle.netns(), || {
        core.loader.detach(slot, &devices::interfaces()?)?;
        match devices {
            DevicesAre::Ours => Ok(devices::remove(&captured.device_owner(true))?),
            DevicesAre::AnotherS => Ok(()),
        }
    });
    release(core, captured);
    result?;
    free(core, captured)
}

/// Whose the devices in the pod's namespace are.
#[derive(Clone, Copy)]
pub(super) enum DevicesAre {
    Ours,
    AnotherS,
}

/// A pod that could not be captured, or not be adopted, and is wanted no more. What an agent had
/// made for it may stand, and would keep it closed.
pub(super) fn forget(core: &Core, uid: &PodUid) -> Result<(), PodError> {
    let Some(record) = core.claims.record(uid) else {
        return Ok(());
    };
    let alias = captured::alias(&core.settings.bpf_dir, uid);
    clean(&core.loader, &core.home, core.marks, &record, alias)?;
    tell_released(core, uid);
    core.claims.free(uid)
}

/// The same, if nothing of it stands in a namespace that still is. False: it does.
pub(super) fn forget_gone(core: &Core, uid: &PodUid) -> Result<bool, PodError> {
    if let Some(record) = core.claims.record(uid)
        && core.loader.netns_of(record.slot)?.is_some()
    {
        return Ok(false);
    }
    forget(core, uid).map(|()| true)
}

pub(super) fn release(core: &Core, captured: &Captured) {
    captured.members.lock().clear();
    tell_released(core, captured.uid());
}

fn tell_released(core: &Core, uid: &PodUid) {
    let event = PodEvent::Released {
        uid: Arc::clone(uid),
    };
    if core.events.blocking_send(event).is_err() {
        tracing::debug!(%uid, "nobody is left to be told of a released pod");
    }
}

pub(super) fn is_leaving(config: &PodConfig) -> bool {
    config.flags & PodConfig::LEAVING != 0
}

fn free(core: &Core, captured: &Captured) -> Result<(), PodError> {
    core.loader.clear_slot(captured.handle.slot())?;
    core.claims.free(captured.uid())
}

/// What [`super::Datapath::cleanup`] does to a pod of an agent that no longer runs.
pub(super) fn clean(
    loader: &Loader,
    home: &Arc<Home>,
    marks: Marks,
    record: &Record,
    alias: String,
) -> Result<(), PodError> {
    let netns = NetNs::open(&record.netns, home)
        .ok()
        .filter(|n| n.cookie() == record.cookie);
    if let Some(netns) = netns {
        inside(&netns, || take_out(loader, record.slot, marks, alias))?;
    } else {
        loader.detach(record.slot, &[])?;
    }
    Ok(loader.clear_slot(record.slot)?)
}

/// What is pinned for a pod on no record, in the namespace of `inode`, and wanted by nobody: the pod
/// left the mesh while nobody knew of it. False: the namespace cannot be entered, and without that
/// the programs cannot be taken off there (clsact): better closed than forgotten.
pub(super) fn take_out_stray(core: &Core, slot: u32, inode: u64) -> Result<bool, PodError> {
    let loader = &core.loader;
    match NetNs::find(inode, &core.home) {
        // Whose the devices are, their alias tells; ours are the programs beside them.
        Some(netns) => inside(&netns, || take_out(loader, slot, core.marks, String::new()))?,
        // The links lead there, and with the last namespace everything goes.
        None if loader.uses_tcx() || loader.netns_of(slot)?.is_none() => {
            loader.detach(slot, &[])?;
        }
        None => return Ok(false),
    }
    loader.clear_slot(slot)?;
    Ok(true)
}

/// Takes everything of ours out of the calling thread's namespace, at once.
fn take_out(loader: &Loader, slot: u32, marks: Marks, alias: String) -> Result<(), PodError> {
    let config = loader.pod_config(slot)?;
    let open = PodConfig::ENROLLING | PodConfig::LEAVING | PodConfig::FAIL_OPEN;
    let active = config.flags & PodConfig::ACTIVE != 0;
    // Pinned and not active: of another layout, or its maps were lost.
    let captured =
        (active && config.flags & open == 0) || (!active && loader.netns_of(slot)?.is_some());
    close(unknown(loader, slot, marks, captured)?.iter());
    loader.detach(slot, &devices::interfaces()?)?;
    Ok(devices::remove(&DeviceOwner {
        alias,
        on_record: true,
    })?)
}

/// What is ours in the calling thread's namespace, and, if the pod `was_captured`, every
/// connection of the application that is not known to be plain by right.
pub(super) fn unknown(
    loader: &Loader,
    slot: u32,
    marks: Marks,
    was_captured: bool,
) -> Result<HashSet<(SocketAddr, SocketAddr)>, PodError> {
    let connections = diag::connections(marks.ours).map_err(|source| PodError::Sockets {
        doing: "listing sockets",
        source,
    })?;
    let known = Known::of(loader, slot, loader.pod_config(slot)?)?;
    let mut unknown = connections.apps;
    unknown.retain(|pair| was_captured && !known.is_plain(pair));
    unknown.extend(connections.taken);
    unknown.extend(list_taken(loader)?);
    unknown.extend(connections.ours);
    Ok(unknown)
}

/// Connections of an application that are plain by right.
struct Known {
    plain: HashSet<Tuple>,
    config: PodConfig,
}

impl Known {
    fn read(core: &Core, slot: u32, config: PodConfig) -> Result<Self, PodError> {
        Self::of(&core.loader, slot, config)
    }

    fn of(loader: &Loader, slot: u32, config: PodConfig) -> Result<Self, PodError> {
        let former = loader.former_standing(slot);
        let standing = loader.standing()?.into_iter().chain(former);
        let probes = loader.probes()?.into_iter().map(|(key, _state)| key);
        let plain = standing
            .chain(probes)
            .filter(|key| key.slot == slot)
            .map(|key| key.tuple)
            .collect();
        Ok(Self { plain, config })
    }

    fn is_plain(&self, (local, remote): &(SocketAddr, SocketAddr)) -> bool {
        let skipped_out = self
            .config
            .skip_outbound
            .iter()
            .any(|r| r.contains(remote.port()));
        let skipped_in = self
            .config
            .skip_inbound
            .iter()
            .any(|r| r.contains(local.port()));
        skipped_out
            || skipped_in
            || local.port() == METRICS_PORT
            || is_link_local(remote.ip())
            || self.plain.contains(&Tuple::new(*local, *remote))
    }
}

/// Scraped in plain whatever the pod's policy (rule 8).
const METRICS_PORT: u16 = 4191;

fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    }
}

/// Closing needs a kernel with CONFIG_INET_DIAG_DESTROY. Without it the far end's stack resets
/// the connection at its next packet.
pub(super) fn close<'a>(connections: impl Iterator<Item = &'a (SocketAddr, SocketAddr)>) -> usize {
    match diag::destroy(connections) {
        Ok(0) => 0,
        Ok(closed) => {
            tracing::info!(closed, "closed connections that the mesh had carried");
            closed
        }
        Err(error) => {
            tracing::warn!(%error, "cannot close connections of a pod that left");
            0
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_plain_by_right_is_not_closed_when_a_pod_leaves() {
        let pair = |l: &str, r: &str| (l.parse().unwrap(), r.parse().unwrap());
        let standing = pair("10.0.0.2:80", "10.0.0.9:4000");
        let mut config = PodConfig::EMPTY;
        config.skip_outbound[0] = picomesh_common::PortRange {
            first: 25,
            last: 25,
        };
        config.skip_inbound[0] = picomesh_common::PortRange {
            first: 9000,
            last: 9010,
        };
        let known = Known {
            plain: HashSet::from([Tuple::new(standing.0, standing.1)]),
            config,
        };
        assert!(known.is_plain(&standing));
        assert!(known.is_plain(&pair("10.0.0.2:4000", "10.0.0.9:25")));
        assert!(known.is_plain(&pair("10.0.0.2:9001", "10.0.0.9:4000")));
        assert!(known.is_plain(&pair("10.0.0.2:4191", "10.0.0.9:4000")));
        assert!(known.is_plain(&pair("[fd00::2]:5000", "[fe80::1]:80")));
        assert!(!known.is_plain(&pair("10.0.0.2:80", "10.0.0.9:4001")));
        assert!(!known.is_plain(&pair("10.0.0.2:25", "10.0.0.9:4001")));
    }
}

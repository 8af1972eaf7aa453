//! One pod's way in and out, told as a story each: [`enrol`], [`check`], [`Leave`], [`gone`].
//!
//! Blocking, each on a worker thread of [`super`]'s loop; what needs the pod's namespace runs
//! inside it on a thread of its own. The order of the steps is the point of this file: at no
//! moment may a packet be captured that nobody serves, or a connection pass that should be taken.

use std::{
    collections::{HashMap, HashSet},
    io,
    net::{IpAddr, SocketAddr, TcpListener},
    os::fd::AsFd,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use picomesh_common::{
    Addr, PodConfig, StandingKey, Tuple,
    config::{INBOUND, MAX_PODS, OUTBOUND, V6},
};
use tokio::sync::mpsc;

use super::{
    super::{
        DesiredPod, PodEvent, PodListeners,
        devices::{self, ALIAS_PREFIX, DeviceOwner, DevicesError},
        diag::{self, Connections},
        loader::{Loader, LoaderError},
        netns::{Home, NetNs, NetnsError},
        sockets::{self, PodHandle, SocketOwner},
    },
    DatapathSettings,
    records::{Marks, Record, RecordsError, RunDir},
};
use crate::state::PodUid;

/// Why a pod is not as it should be.
#[derive(Debug, thiserror::Error)]
pub(super) enum PodError {
    #[error(transparent)]
    Netns(#[from] NetnsError),
    #[error("netns {path} is the node's own; a pod needs one of its own")]
    NetnsOfHost { path: PathBuf },
    #[error("netns {path} belongs to pod {owner} already; a netns can belong to one pod only")]
    NetnsTaken { path: PathBuf, owner: PodUid },
    #[error(transparent)]
    Devices(#[from] DevicesError),
    #[error(transparent)]
    Programs(#[from] LoaderError),
    #[error("{doing} in the pod's netns: {source}")]
    Sockets {
        doing: &'static str,
        source: io::Error,
    },
    #[error(
        "{count} connections stand in the pod, more than there is room for: {source}; enrol it \
         when it has fewer, or restart it"
    )]
    StandingFull { count: usize, source: LoaderError },
    #[error("all {MAX_PODS} places for pods on this node are taken")]
    NoSlot,
    #[error(transparent)]
    Records(#[from] RecordsError),
    #[error("the data threads take no events any more: the agent is ending")]
    NobodyServes,
}

impl PodError {
    /// The fixed word for metrics and status.
    pub(super) fn reason(&self) -> &'static str {
        match self {
            Self::Netns(error) => error.reason(),
            Self::NetnsOfHost { .. } => "netns_of_host",
            Self::NetnsTaken { .. } => "netns_taken",
            Self::Devices(error) => error.reason(),
            Self::Programs(_) => "programs",
            Self::Sockets { .. } => "sockets",
            Self::StandingFull { .. } => "standing_full",
            Self::NoSlot => "no_slot",
            Self::Records(_) => "records",
            Self::NobodyServes => "ending",
        }
    }

    /// The whole chain as one sentence.
    pub(super) fn sentence(&self) -> String {
        let mut sentence = self.to_string();
        let mut source = std::error::Error::source(self);
        while let Some(error) = source {
            let words = error.to_string();
            if !sentence.contains(&words) {
                sentence.push_str(": ");
                sentence.push_str(&words);
            }
            source = error.source();
        }
        sentence
    }
}

/// What every enrolment of this agent shares.
pub(super) struct Core {
    pub(super) settings: DatapathSettings,
    pub(super) loader: Loader,
    pub(super) home: Arc<Home>,
    pub(super) marks: Marks,
    pub(super) owner: SocketOwner,
    pub(super) events: mpsc::Sender<PodEvent>,
    pub(super) claims: Claims,
}

/// A pod that is enrolled, or on its way out.
pub(super) struct Captured {
    pub(super) handle: Arc<PodHandle>,
    pub(super) name: String,
    pub(super) netns_path: PathBuf,
    alias: String,
    /// The members that stand in `LISTENERS`, by (direction, family): a second descriptor of each,
    /// so that a repair can put them back.
    members: Mutex<HashMap<(u32, u32), TcpListener>>,
}

/// How a pod came through a check.
#[derive(Default)]
pub(super) struct Checked {
    pub(super) repaired: Vec<&'static str>,
}

pub(super) fn enrol(core: &Core, pod: &DesiredPod) -> Result<Arc<Captured>, PodError> {
    let netns = NetNs::open(&pod.netns, &core.home)?;
    if netns.cookie() == core.home.cookie() || is_of_init(&netns, &core.home) {
        return Err(PodError::NetnsOfHost {
            path: pod.netns.clone(),
        });
    }
    // On record before anything is made: whoever finds the pieces must know whose they are.
    let slot = core.claims.claim(Record {
        uid: pod.uid.to_string(),
        name: pod.name.clone(),
        slot: 0,
        netns: pod.netns.clone(),
        cookie: netns.cookie(),
    })?;
    let handle = Arc::new(PodHandle::new(
        Arc::clone(&pod.uid),
        slot,
        netns,
        core.owner.clone(),
    ));
    let captured = Arc::new(Captured::new(core, handle, &pod.name, &pod.netns));
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
                | PodError::NetnsTaken { .. }
                | PodError::Programs(_)
                | PodError::Sockets { .. }
                | PodError::StandingFull { .. }
                | PodError::NoSlot
                | PodError::Records(_)
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
    for (stale, _slot) in local
        .iter()
        .filter(|(addr, owner)| **owner == slot && !pod.ips.contains(&IpAddr::from(**addr)))
    {
        core.loader.remove_local(*stale)?;
    }

    let found = core.loader.pod_config(slot)?;
    let wanted = config(core, pod, 0);
    // An agent that died while enrolling, or a pod that was on its way out, has connections that
    // nobody wrote down.
    let unlisted = found.flags & (PodConfig::ENROLLING | PodConfig::LEAVING) != 0
        || found.flags & PodConfig::ACTIVE == 0;
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
    if found != wanted {
        core.loader.set_pod_config(slot, &wanted)?;
        repaired.push("config");
    }
    Ok(Checked { repaired })
}

/// A pod on its way out: new connections pass, ours finish, then everything goes.
pub(super) struct Leave {
    since: Instant,
    /// Connections of the application that we had taken. None of them may outlive the programs:
    /// what its socket then sends would be plain (rule 4).
    taken: HashSet<(SocketAddr, SocketAddr)>,
}

/// How long connections of ours may keep a pod that leaves.
pub(super) const LEAVE_DEADLINE: Duration = Duration::from_secs(3600);

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
        if was_captured {
            // Our end may be gone already where the application's is not.
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
fn undo(core: &Core, captured: &Captured, devices: DevicesAre) -> Result<(), PodError> {
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
enum DevicesAre {
    Ours,
    AnotherS,
}

fn release(core: &Core, captured: &Captured) {
    captured.members.lock().clear();
    let uid = Arc::clone(uid_of(captured));
    if core
        .events
        .blocking_send(PodEvent::Released { uid })
        .is_err()
    {
        tracing::debug!(
            pod = captured.name,
            "nobody is left to be told of a released pod"
        );
    }
}

fn free(core: &Core, captured: &Captured) -> Result<(), PodError> {
    core.loader.clear_slot(captured.handle.slot())?;
    core.claims.free(uid_of(captured))
}

fn uid_of(captured: &Captured) -> &PodUid {
    use super::super::PodSockets;
    captured.handle.uid()
}

/// Finds a recorded pod again after a start: `None` if it is gone, and with it the record.
pub(super) fn adopt(
    core: &Core,
    record: &Record,
) -> Result<Option<(Arc<Captured>, Vec<PodListeners>)>, PodError> {
    let slot = record.slot;
    let netns = NetNs::open(&record.netns, &core.home)
        .ok()
        .filter(|n| n.cookie() == record.cookie);
    let Some(netns) = netns else {
        core.loader.detach(slot, &[])?;
        core.loader.clear_slot(slot)?;
        core.claims.free(&PodUid::from(record.uid.as_str()))?;
        return Ok(None);
    };
    let uid = PodUid::from(record.uid.as_str());
    let handle = Arc::new(PodHandle::new(uid, slot, netns, core.owner.clone()));
    let captured = Arc::new(Captured::new(core, handle, &record.name, &record.netns));
    // The programs drop what nobody listens to, so listeners come before everything else.
    let listeners = inside(captured.handle.netns(), || {
        match make_listeners(core, true) {
            Err(PodError::Sockets { source, .. }) if sockets::is_no_ipv6(&source) => {
                make_listeners(core, false)
            }
            other => other,
        }
    })?;
    captured.keep_members(&listeners)?;
    captured.put_in_map(core)?;
    Ok(Some((captured, listeners)))
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
        inside(&netns, || {
            let config = loader.pod_config(record.slot)?;
            let connections =
                diag::connections(marks.ours).map_err(|source| PodError::Sockets {
                    doing: "listing sockets",
                    source,
                })?;
            let known = Known::of(loader, record.slot, config)?;
            let captured = config.flags & PodConfig::ACTIVE != 0
                && config.flags
                    & (PodConfig::ENROLLING | PodConfig::LEAVING | PodConfig::FAIL_OPEN)
                    == 0;
            close(
                connections
                    .apps
                    .iter()
                    .filter(|pair| captured && !known.is_plain(pair))
                    .chain(&connections.taken)
                    .chain(&connections.ours),
            );
            loader.detach(record.slot, &devices::interfaces()?)?;
            Ok(devices::remove(&DeviceOwner {
                alias,
                on_record: true,
            })?)
        })?;
    } else {
        loader.detach(record.slot, &[])?;
    }
    Ok(loader.clear_slot(record.slot)?)
}

impl Captured {
    fn new(core: &Core, handle: Arc<PodHandle>, name: &str, netns_path: &Path) -> Self {
        let mut captured = Self {
            handle,
            name: name.into(),
            netns_path: netns_path.into(),
            alias: String::new(),
            members: Mutex::default(),
        };
        captured.alias = alias(&core.settings.bpf_dir, uid_of(&captured));
        captured
    }

    /// The path still leads to the pod's namespace.
    pub(super) fn is_there(&self) -> bool {
        self.handle.netns().is_still_at(&self.netns_path)
    }

    fn device_owner(&self, on_record: bool) -> DeviceOwner {
        DeviceOwner {
            alias: self.alias.clone(),
            on_record,
        }
    }

    /// Puts listeners into the map and hands them to the data threads.
    fn install(&self, core: &Core, listeners: Vec<PodListeners>) -> Result<(), PodError> {
        self.keep_members(&listeners)?;
        self.put_in_map(core)?;
        let event = PodEvent::Captured {
            pod: Arc::clone(&self.handle),
            listeners,
        };
        core.events
            .blocking_send(event)
            .map_err(|_closed| PodError::NobodyServes)
    }

    fn keep_members(&self, listeners: &[PodListeners]) -> Result<(), PodError> {
        let Some(first) = listeners.first() else {
            return Ok(());
        };
        let mut members = HashMap::new();
        for (direction, group) in [(OUTBOUND, &first.outbound), (INBOUND, &first.inbound)] {
            for (family, listener) in sockets::FAMILIES.into_iter().zip(group) {
                let member = listener.try_clone().map_err(|source| PodError::Sockets {
                    doing: "duplicating a listener",
                    source,
                })?;
                members.insert((direction, family), member);
            }
        }
        *self.members.lock() = members;
        Ok(())
    }

    fn put_in_map(&self, core: &Core) -> Result<(), PodError> {
        for ((direction, family), member) in self.members.lock().iter() {
            core.loader
                .set_listener(self.handle.slot(), *direction, *family, member)?;
        }
        Ok(())
    }
}

/// Written into the devices, so that no other agent takes the namespace for free.
pub(super) fn alias(bpf_dir: &Path, uid: &str) -> String {
    let mut alias = format!("{ALIAS_PREFIX}{uid} {}", bpf_dir.display());
    let mut end = alias.len().min(250);
    while !alias.is_char_boundary(end) {
        end -= 1;
    }
    alias.truncate(end);
    alias
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
        let standing = loader.standing()?.into_iter();
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

fn make_listeners(core: &Core, ipv6: bool) -> Result<Vec<PodListeners>, PodError> {
    sockets::listeners(core.settings.data_threads, ipv6, &core.owner).map_err(|source| {
        PodError::Sockets {
            doing: "making listeners",
            source,
        }
    })
}

fn list_connections(core: &Core) -> Result<Connections, PodError> {
    diag::connections(core.marks.ours).map_err(|source| PodError::Sockets {
        doing: "listing sockets",
        source,
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

/// Closing needs a kernel with CONFIG_INET_DIAG_DESTROY. Without it the far end's stack resets
/// the connection at its next packet.
fn close<'a>(connections: impl Iterator<Item = &'a (SocketAddr, SocketAddr)>) {
    match diag::destroy(connections) {
        Ok(0) => {}
        Ok(closed) => tracing::info!(closed, "closed connections that the mesh had carried"),
        Err(error) => tracing::warn!(%error, "cannot close connections of a pod that left"),
    }
}

fn inside<T: Send>(
    netns: &NetNs,
    work: impl FnOnce() -> Result<T, PodError> + Send,
) -> Result<T, PodError> {
    netns.run(work).map_err(|source| PodError::Sockets {
        doing: "entering",
        source,
    })?
}

/// The machine's first namespace, where the agent's node is another one.
fn is_of_init(netns: &NetNs, home: &Arc<Home>) -> bool {
    NetNs::open(Path::new("/proc/1/ns/net"), home).is_ok_and(|init| init.cookie() == netns.cookie())
}

/// Who has which slot and which namespace; the same is on record for the next agent.
pub(super) struct Claims {
    run_dir: RunDir,
    /// Held while the record file is written: one writer.
    records: Mutex<Vec<Record>>,
}

impl Claims {
    pub(super) fn new(run_dir: RunDir, records: Vec<Record>) -> Self {
        Self {
            run_dir,
            records: Mutex::new(records),
        }
    }

    /// Finds a slot; `record.slot` is filled in here. A pod that has one already keeps it.
    fn claim(&self, mut record: Record) -> Result<u32, PodError> {
        let mut records = self.records.lock();
        let of_netns = |r: &&Record| r.cookie == record.cookie;
        if let Some(other) = records
            .iter()
            .find(of_netns)
            .filter(|r| r.uid != record.uid)
        {
            return Err(PodError::NetnsTaken {
                path: record.netns,
                owner: PodUid::from(other.uid.as_str()),
            });
        }
        if let Some(own) = records.iter_mut().find(|r| r.uid == record.uid) {
            record.slot = own.slot;
            own.clone_from(&record);
            self.run_dir.save(&records)?;
            return Ok(record.slot);
        }
        let taken: HashSet<u32> = records.iter().map(|r| r.slot).collect();
        record.slot = (0..MAX_PODS)
            .find(|slot| !taken.contains(slot))
            .ok_or(PodError::NoSlot)?;
        let slot = record.slot;
        records.push(record);
        self.run_dir.save(&records)?;
        Ok(slot)
    }

    fn free(&self, uid: &PodUid) -> Result<(), PodError> {
        let mut records = self.records.lock();
        records.retain(|record| record.uid != **uid);
        Ok(self.run_dir.save(&records)?)
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test may panic")]

    use super::*;

    fn record(uid: &str, cookie: u64) -> Record {
        Record {
            uid: uid.into(),
            name: format!("ns/{uid}"),
            slot: 0,
            netns: format!("/run/netns/{uid}").into(),
            cookie,
        }
    }

    fn claims(dir: &Path) -> Claims {
        let run_dir = RunDir::open(dir).unwrap();
        let records = run_dir.records().unwrap();
        Claims::new(run_dir, records)
    }

    #[test]
    fn a_namespace_belongs_to_one_pod_also_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run");
        let first = claims(&path);
        assert_eq!(first.claim(record("a", 1)).unwrap(), 0);
        assert_eq!(first.claim(record("b", 2)).unwrap(), 1);
        let error = first.claim(record("c", 1)).unwrap_err();
        assert_eq!(error.reason(), "netns_taken");
        assert!(error.to_string().contains("pod a "), "{error}");

        let next = claims(&path);
        assert_eq!(
            next.claim(record("c", 2)).unwrap_err().reason(),
            "netns_taken"
        );
        assert_eq!(
            next.claim(record("b", 3)).unwrap(),
            1,
            "the same pod keeps its slot"
        );
        next.free(&PodUid::from("a")).unwrap();
        assert_eq!(
            next.claim(record("c", 1)).unwrap(),
            0,
            "the lowest free slot"
        );
    }

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

    #[test]
    fn an_alias_fits_into_the_kernels_field() {
        let alias = alias(Path::new("/sys/fs/bpf/picomesh"), &"ü".repeat(300));
        assert!(alias.len() <= 255 && alias.starts_with(ALIAS_PREFIX));
    }
}

//! The maps that all pods' programs share, pinned, behind typed accessors.
//!
//! Each accessor takes `&self`: aya wants `&mut` for writes, so every map has a lock of its own,
//! held for one system call and never over an `.await`.

use std::{
    collections::HashMap,
    io,
    net::IpAddr,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use aya::{
    Ebpf,
    maps::{
        Array, HashMap as BpfHashMap, Map, MapData, MapError, MapInfo, PerCpuArray, ProgramArray,
        SockMap,
    },
    programs::ProgramFd,
};
use parking_lot::Mutex;
use picomesh_common::{
    Addr, Counter, PodConfig, ProbeKey, ProbeState, StandingKey,
    config::{JUMPS, MAX_PODS, MAX_PROBES, MAX_STANDING, listener_index, map, owner},
};

use super::{LoaderError, pins::remove, sys};

/// What the layout says of each map: key, value, entries. A pin of another shape was made by
/// something else, and no program of ours may run on it.
const SHAPES: [(&str, usize, usize, u32); 8] = [
    (map::LISTENERS, 4, 4, MAX_PODS * 4),
    (map::SOCKETS, 4, 4, 0),
    (map::PODS, 4, size_of::<PodConfig>(), MAX_PODS),
    (map::STANDING, size_of::<StandingKey>(), 4, MAX_STANDING),
    (map::LOCAL, size_of::<Addr>(), 4, MAX_PODS * 4),
    (
        map::PROBES,
        size_of::<ProbeKey>(),
        size_of::<ProbeState>(),
        MAX_PROBES,
    ),
    (map::COUNTERS, 4, 8, MAX_PODS * Counter::COUNT),
    (map::JUMPS, 4, 4, JUMPS),
];

pub(super) struct SharedMaps {
    listeners: Mutex<SockMap<MapData>>,
    pods: Mutex<Array<MapData, PodConfig>>,
    standing: Mutex<BpfHashMap<MapData, StandingKey, u32>>,
    local: Mutex<BpfHashMap<MapData, Addr, u32>>,
    probes: Mutex<BpfHashMap<MapData, ProbeKey, ProbeState>>,
    counters: Mutex<PerCpuArray<MapData, u64>>,
    jumps: Mutex<ProgramArray<MapData>>,
    /// The same map, for what aya's type cannot ask.
    jump_ids: OwnedFd,
    sockets: OwnedFd,
    pins: Vec<MapPin>,
}

/// What keeps a map alive besides this process.
struct MapPin {
    name: &'static str,
    path: PathBuf,
    map: OwnedFd,
    id: u32,
}

/// Where each map is pinned.
pub(super) fn pins(dir: &Path) -> Vec<(&'static str, PathBuf)> {
    SHAPES
        .iter()
        .map(|(name, ..)| (*name, dir.join(name)))
        .collect()
}

impl SharedMaps {
    /// Takes the maps out of an object that was loaded with [`pins`].
    pub(super) fn take(object: &mut Ebpf, dir: &Path) -> Result<Self, LoaderError> {
        let mut pins = Vec::new();
        for (name, key, value, entries) in SHAPES {
            let Some(map) = object.map(name) else {
                return Err(LoaderError::ObjectLacks { what: "map", name });
            };
            let info = map_data(map)
                .ok_or(LoaderError::ObjectLacks {
                    what: "map of the right kind",
                    name,
                })?
                .info()?;
            pins.push(MapPin {
                name,
                path: dir.join(name),
                map: descriptor(map, name)?,
                id: info.id(),
            });
            let found = (
                info.key_size() as usize,
                info.value_size() as usize,
                info.max_entries(),
            );
            if found != (key, value, entries) {
                return Err(LoaderError::Shape {
                    name,
                    found,
                    wanted: (key, value, entries),
                });
            }
        }
        let mut take = |name: &'static str| {
            object
                .take_map(name)
                .ok_or(LoaderError::ObjectLacks { what: "map", name })
        };
        let sockets = descriptor(&take(map::SOCKETS)?, map::SOCKETS)?;
        let jumps = take(map::JUMPS)?;
        Ok(Self {
            listeners: Mutex::new(take(map::LISTENERS)?.try_into()?),
            pods: Mutex::new(take(map::PODS)?.try_into()?),
            standing: Mutex::new(take(map::STANDING)?.try_into()?),
            local: Mutex::new(take(map::LOCAL)?.try_into()?),
            probes: Mutex::new(take(map::PROBES)?.try_into()?),
            counters: Mutex::new(take(map::COUNTERS)?.try_into()?),
            jump_ids: descriptor(&jumps, map::JUMPS)?,
            jumps: Mutex::new(jumps.try_into()?),
            sockets,
            pins,
        })
    }

    /// Is this the id of one of these maps?
    pub(super) fn has(&self, id: u32) -> bool {
        self.pins.iter().any(|pin| pin.id == id)
    }

    /// Puts back the pins that somebody removed, or put something else in the place of, and says
    /// which. The maps themselves live on in the programs, but the next agent would make others.
    pub(super) fn mend_pins(&self) -> Result<Vec<&'static str>, LoaderError> {
        let mut mended = Vec::new();
        for pin in &self.pins {
            let there = MapInfo::from_pin(&pin.path).ok().map(|info| info.id());
            if there == Some(pin.id) {
                continue;
            }
            remove(&pin.path)?;
            sys::pin(pin.map.as_fd(), &pin.path).map_err(|source| LoaderError::PinFile {
                pin: pin.path.clone(),
                source,
            })?;
            mended.push(pin.name);
        }
        Ok(mended)
    }

    pub(super) fn set_listener(
        &self,
        slot: u32,
        direction: u32,
        family: u32,
        socket: &impl AsRawFd,
    ) -> Result<(), LoaderError> {
        Ok(self
            .listeners
            .lock()
            .set(listener_index(slot, direction, family), socket, 0)?)
    }

    pub(super) fn clear_listener(
        &self,
        slot: u32,
        direction: u32,
        family: u32,
    ) -> Result<(), LoaderError> {
        absent_is_fine(
            self.listeners
                .lock()
                .clear_index(&listener_index(slot, direction, family)),
        )
    }

    pub(super) fn pod(&self, slot: u32) -> Result<PodConfig, LoaderError> {
        Ok(self.pods.lock().get(&slot, 0)?)
    }

    pub(super) fn set_pod(&self, slot: u32, config: &PodConfig) -> Result<(), LoaderError> {
        Ok(self.pods.lock().set(slot, config, 0)?)
    }

    pub(super) fn insert_standing(&self, key: &StandingKey) -> Result<(), LoaderError> {
        Ok(self.standing.lock().insert(key, 1, 0)?)
    }

    pub(super) fn remove_standing(&self, key: &StandingKey) -> Result<(), LoaderError> {
        absent_is_fine(self.standing.lock().remove(key))
    }

    pub(super) fn standing(&self) -> Result<Vec<StandingKey>, LoaderError> {
        Ok(self.standing.lock().keys().collect::<Result<_, _>>()?)
    }

    pub(super) fn insert_local(&self, addr: Addr, slot: u32) -> Result<(), LoaderError> {
        Ok(self.local.lock().insert(addr, slot, 0)?)
    }

    /// Takes the addresses of a slot away but those in `keep`. One that another pod has meanwhile
    /// (the same pod made again) is its own.
    pub(super) fn keep_local(&self, slot: u32, keep: &[IpAddr]) -> Result<(), LoaderError> {
        let mut local = self.local.lock();
        let all = local.iter().collect::<Result<Vec<(Addr, u32)>, _>>()?;
        for (addr, owner) in all {
            if owner == slot && !keep.contains(&IpAddr::from(addr)) {
                absent_is_fine(local.remove(&addr))?;
            }
        }
        Ok(())
    }

    pub(super) fn local(&self) -> Result<HashMap<Addr, u32>, LoaderError> {
        Ok(self.local.lock().iter().collect::<Result<_, _>>()?)
    }

    pub(super) fn probes(&self) -> Result<Vec<(ProbeKey, ProbeState)>, LoaderError> {
        Ok(self.probes.lock().iter().collect::<Result<_, _>>()?)
    }

    pub(super) fn insert_probe(
        &self,
        key: &ProbeKey,
        state: &ProbeState,
    ) -> Result<(), LoaderError> {
        Ok(self.probes.lock().insert(key, state, 0)?)
    }

    pub(super) fn remove_probe(&self, key: &ProbeKey) -> Result<(), LoaderError> {
        absent_is_fine(self.probes.lock().remove(key))
    }

    pub(super) fn counters(&self, slot: u32) -> Result<Vec<(Counter, u64)>, LoaderError> {
        let map = self.counters.lock();
        Counter::ALL
            .iter()
            .map(|counter| {
                let per_cpu = map.get(&(slot * Counter::COUNT + *counter as u32), 0)?;
                Ok((*counter, per_cpu.iter().sum()))
            })
            .collect()
    }

    pub(super) fn clear_counters(&self, slot: u32) -> Result<(), LoaderError> {
        let mut map = self.counters.lock();
        for counter in Counter::ALL {
            let index = slot * Counter::COUNT + counter as u32;
            let zeros = vec![0u64; map.get(&index, 0)?.len()];
            let zeros =
                aya::maps::PerCpuValues::try_from(zeros).map_err(|source| LoaderError::Io {
                    doing: "clearing a pod's counters",
                    source,
                })?;
            map.set(index, zeros, 0)?;
        }
        Ok(())
    }

    /// Id of the shared program at this place.
    pub(super) fn jump(&self, index: u32) -> io::Result<Option<u32>> {
        sys::lookup(self.jump_ids.as_fd(), index.cast_signed())
    }

    /// From the next packet on it is this one that decides.
    pub(super) fn set_jump(&self, index: u32, program: &ProgramFd) -> Result<(), LoaderError> {
        Ok(self.jumps.lock().set(index, program, 0)?)
    }

    pub(super) fn storage(&self, socket: BorrowedFd<'_>) -> io::Result<Option<u32>> {
        sys::lookup(self.sockets.as_fd(), socket.as_raw_fd())
    }

    pub(super) fn storages(&self) -> BorrowedFd<'_> {
        self.sockets.as_fd()
    }

    pub(super) fn marker(&self) -> io::Result<SocketMarker> {
        Ok(SocketMarker {
            sockets: self.sockets.try_clone()?,
        })
    }
}

/// Makes sockets ours, from any thread, with one system call each.
#[derive(Debug)]
pub struct SocketMarker {
    sockets: OwnedFd,
}

impl SocketMarker {
    /// From now on the packets of `socket` pass untouched (together with our mark), and so do
    /// those of the sockets it accepts. Before `connect` and `listen`, never after.
    pub fn claim(&self, socket: BorrowedFd<'_>) -> io::Result<()> {
        sys::set_storage(self.sockets.as_fd(), socket, owner::OURS)
    }
}

fn descriptor(map: &Map, name: &'static str) -> Result<OwnedFd, LoaderError> {
    let data = map_data(map).ok_or(LoaderError::ObjectLacks {
        what: "map of the right kind",
        name,
    })?;
    data.fd()
        .as_fd()
        .try_clone_to_owned()
        .map_err(|source| LoaderError::Io {
            doing: "duplicating a map",
            source,
        })
}

fn map_data(map: &Map) -> Option<&MapData> {
    #[expect(clippy::wildcard_enum_match_arm, reason = "aya's enum, and it grows")]
    match map {
        Map::Array(data)
        | Map::HashMap(data)
        | Map::LruHashMap(data)
        | Map::PerCpuArray(data)
        | Map::ProgramArray(data)
        | Map::SkStorage(data)
        | Map::SockMap(data) => Some(data),
        _ => None,
    }
}

/// What should be gone may be gone already.
fn absent_is_fine(result: Result<(), MapError>) -> Result<(), LoaderError> {
    match result {
        Err(MapError::KeyNotFound | MapError::ElementNotFound) => Ok(()),
        Err(MapError::SyscallError(error))
            if matches!(
                error.io_error.raw_os_error(),
                // A SOCKMAP says EINVAL for an empty place.
                Some(nix::libc::ENOENT | nix::libc::EINVAL)
            ) =>
        {
            Ok(())
        }
        other => Ok(other?),
    }
}

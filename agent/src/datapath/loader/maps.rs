//! The maps that all pods' programs share, pinned, behind typed accessors.
//!
//! Each accessor takes `&self`: aya wants `&mut` for writes, so every map has a lock of its own,
//! held for one system call and never over an `.await`.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use aya::{
    Ebpf,
    maps::{Array, HashMap as BpfHashMap, Map, MapData, MapError, PerCpuArray, SockMap},
};
use parking_lot::Mutex;
use picomesh_common::{
    Addr, Counter, PodConfig, ProbeKey, ProbeState, StandingKey,
    config::{MAX_PODS, MAX_PROBES, MAX_STANDING, listener_index, map, owner},
};

use super::{LoaderError, sys};

/// What the layout says of each map: key, value, entries. A pin of another shape was made by
/// something else, and no program of ours may run on it.
const SHAPES: [(&str, usize, usize, u32); 7] = [
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
];

pub(super) struct SharedMaps {
    listeners: Mutex<SockMap<MapData>>,
    pods: Mutex<Array<MapData, PodConfig>>,
    standing: Mutex<BpfHashMap<MapData, StandingKey, u32>>,
    local: Mutex<BpfHashMap<MapData, Addr, u32>>,
    probes: Mutex<BpfHashMap<MapData, ProbeKey, ProbeState>>,
    counters: Mutex<PerCpuArray<MapData, u64>>,
    sockets: OwnedFd,
    /// Ids of the maps of which every program of ours uses at least one.
    ids: [u32; 2],
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
    pub(super) fn take(object: &mut Ebpf) -> Result<Self, LoaderError> {
        let mut ids = [0; 2];
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
            match name {
                map::COUNTERS => ids[0] = info.id(),
                map::PROBES => ids[1] = info.id(),
                _other => {}
            }
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
        let sockets = take(map::SOCKETS)?;
        let sockets = map_data(&sockets)
            .ok_or(LoaderError::ObjectLacks {
                what: "map of the right kind",
                name: map::SOCKETS,
            })?
            .fd()
            .as_fd()
            .try_clone_to_owned()
            .map_err(|source| LoaderError::Io {
                doing: "duplicating the map SOCKETS",
                source,
            })?;
        Ok(Self {
            listeners: Mutex::new(take(map::LISTENERS)?.try_into()?),
            pods: Mutex::new(take(map::PODS)?.try_into()?),
            standing: Mutex::new(take(map::STANDING)?.try_into()?),
            local: Mutex::new(take(map::LOCAL)?.try_into()?),
            probes: Mutex::new(take(map::PROBES)?.try_into()?),
            counters: Mutex::new(take(map::COUNTERS)?.try_into()?),
            sockets,
            ids,
        })
    }

    pub(super) fn ids(&self) -> [u32; 2] {
        self.ids
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

    pub(super) fn remove_local(&self, addr: Addr) -> Result<(), LoaderError> {
        absent_is_fine(self.local.lock().remove(&addr))
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

    pub(super) fn storage(&self, socket: BorrowedFd<'_>) -> io::Result<Option<u32>> {
        sys::storage(self.sockets.as_fd(), socket)
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

fn map_data(map: &Map) -> Option<&MapData> {
    #[expect(clippy::wildcard_enum_match_arm, reason = "aya's enum, and it grows")]
    match map {
        Map::Array(data)
        | Map::HashMap(data)
        | Map::LruHashMap(data)
        | Map::PerCpuArray(data)
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

//! What builds of other layouts left below the bpf directory, older or newer: both ways are the
//! same.
//!
//! Maps depend on the layout, links do not. So a pod's links move into this layout's directory (a
//! rename, without a moment in between), where the loop finds that they run programs of other maps and
//! puts this build's in their place, in one step each. Until then nobody listens in those maps,
//! and the old programs drop. The maps stay where they are for as long as programs use them.
//!
//! Of what lies in them only the standing connections are taken over, and those only if keys and
//! values have the shape that they have here: a map of that name and shape means the same in every
//! layout. Otherwise none is known, and connections that stood are cut, never guessed at.

use std::{
    collections::HashSet,
    fs,
    path::{Path, PathBuf},
};

use aya::maps::{HashMap as BpfHashMap, Map, MapData, MapInfo};
use picomesh_common::{StandingKey, config::map, config::program};

use super::{
    LoaderError,
    pins::{entries, is_link, remove_tree, take_off},
};

/// The pins of one other layout.
pub(super) struct Former {
    root: PathBuf,
    /// Ids of its maps: programs that use them are ours.
    pub(super) maps: HashSet<u32>,
    pub(super) standing: Vec<StandingKey>,
}

/// Moves the links of all other layouts below `root`, and says what was found.
pub(super) fn inherit(bpf_dir: &Path, root: &Path) -> Result<Vec<Former>, LoaderError> {
    let mut found = Vec::new();
    for name in entries(bpf_dir)? {
        let theirs = bpf_dir.join(&name);
        let is_layout = name
            .strip_prefix('v')
            .is_some_and(|number| number.parse::<u32>().is_ok());
        if !is_layout || theirs == root {
            continue;
        }
        let former = Former {
            maps: ids(&theirs.join("maps"))?,
            standing: standing(&theirs.join("maps").join(map::STANDING)),
            root: theirs.clone(),
        };
        let slots = entries(&theirs.join("pods"))?;
        tracing::warn!(
            pins = %theirs.display(),
            pods = slots.len(),
            standing = former.standing.len(),
            "pins of a build with another layout; its pods stay closed until they are taken over"
        );
        for slot in slots {
            move_pod(
                &theirs.join("pods").join(&slot),
                &root.join("pods").join(slot),
            )?;
        }
        let (from, to) = (theirs.join("host/sockops"), root.join("host/sockops"));
        if to.exists() {
            take_off(&from)?;
        } else if from.exists() {
            rename(&from, &to)?;
        }
        found.push(former);
    }
    Ok(found)
}

impl Former {
    /// Nothing runs on its maps any more.
    pub(super) fn forget(&self) -> Result<(), LoaderError> {
        remove_tree(&self.root)
    }
}

fn move_pod(from: &Path, to: &Path) -> Result<(), LoaderError> {
    if to.join(program::STEER).exists() {
        // This layout has the pod already, so what is left over there holds nothing closed.
        for name in entries(from)?.iter().filter(|name| is_link(name)) {
            take_off(&from.join(name))?;
        }
        return remove_tree(from);
    }
    if to.exists() {
        remove_tree(to)?;
    }
    rename(from, to)
}

fn rename(from: &Path, to: &Path) -> Result<(), LoaderError> {
    fs::rename(from, to).map_err(|source| LoaderError::PinFile {
        pin: from.to_owned(),
        source,
    })
}

fn ids(maps: &Path) -> Result<HashSet<u32>, LoaderError> {
    let ids = entries(maps)?
        .into_iter()
        .filter_map(|name| MapInfo::from_pin(maps.join(name)).ok())
        .map(|info| info.id())
        .collect();
    Ok(ids)
}

/// Empty if the map is not there, or of another shape.
fn standing(pin: &Path) -> Vec<StandingKey> {
    let keys = || -> Option<Vec<StandingKey>> {
        let info = MapInfo::from_pin(pin).ok()?;
        if (info.key_size() as usize, info.value_size()) != (size_of::<StandingKey>(), 4) {
            return None;
        }
        let map = Map::HashMap(MapData::from_pin(pin).ok()?);
        let map: BpfHashMap<_, StandingKey, u32> = map.try_into().ok()?;
        map.keys().collect::<Result<_, _>>().ok()
    };
    keys().unwrap_or_default()
}

//! Who has which slot and which namespace; the same is on record for the next agent.

use std::collections::{HashMap, HashSet};

use parking_lot::Mutex;
use picomesh_common::config::MAX_PODS;

use super::{
    error::PodError,
    records::{Record, RunDir},
};
use crate::state::PodUid;

pub(super) struct Claims {
    run_dir: RunDir,
    /// Held while the record file is written: one writer.
    records: Mutex<Vec<Record>>,
    /// Slots whose pod is on no record (the run directory was emptied, or a build wrote it that
    /// this one cannot read), with the inode of its namespace.
    strays: Mutex<HashMap<u32, u64>>,
}

impl Claims {
    pub(super) fn new(run_dir: RunDir, records: Vec<Record>, strays: HashMap<u32, u64>) -> Self {
        Self {
            run_dir,
            records: Mutex::new(records),
            strays: Mutex::new(strays),
        }
    }

    /// Finds a slot; `record.slot` is filled in here. A pod that has one already keeps it, and so
    /// does a namespace (`inode`) whose programs are found without a record.
    pub(super) fn claim(&self, mut record: Record, inode: u64) -> Result<u32, PodError> {
        let mut records = self.records.lock();
        let mut strays = self.strays.lock();
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
        let stray = strays.iter().find(|(_slot, of)| **of == inode);
        record.slot = if let Some((slot, _inode)) = stray {
            *slot
        } else {
            let taken: HashSet<u32> = records.iter().map(|r| r.slot).collect();
            (0..MAX_PODS)
                .find(|slot| !taken.contains(slot) && !strays.contains_key(slot))
                .ok_or(PodError::NoSlot)?
        };
        let slot = record.slot;
        records.push(record);
        self.run_dir.save(&records)?;
        strays.remove(&slot);
        Ok(slot)
    }

    /// Slots that nobody has claimed although something is pinned for them, and the inodes of their
    /// namespaces.
    pub(super) fn strays(&self) -> Vec<(u32, u64)> {
        let strays = self.strays.lock();
        strays.iter().map(|(slot, inode)| (*slot, *inode)).collect()
    }

    pub(super) fn forget_stray(&self, slot: u32) {
        self.strays.lock().remove(&slot);
    }

    /// What is on record now, after another agent wrote there.
    pub(super) fn reload(&self) -> Vec<Record> {
        let mut records = self.records.lock();
        *records = self.run_dir.records().unwrap_or_else(|error| {
            tracing::warn!(%error, "the pods on record are gone; what is attached tells of them");
            Vec::new()
        });
        records.clone()
    }

    /// One of ours that was lost.
    pub(super) fn put_back(&self, record: Record) -> Result<(), PodError> {
        let mut records = self.records.lock();
        records.push(record);
        Ok(self.run_dir.save(&records)?)
    }

    pub(super) fn set_strays(&self, strays: HashMap<u32, u64>) {
        *self.strays.lock() = strays;
    }

    pub(super) fn record(&self, uid: &PodUid) -> Option<Record> {
        let records = self.records.lock();
        records.iter().find(|record| record.uid == **uid).cloned()
    }

    pub(super) fn free(&self, uid: &PodUid) -> Result<(), PodError> {
        let mut records = self.records.lock();
        records.retain(|record| record.uid != **uid);
        Ok(self.run_dir.save(&records)?)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

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
        Claims::new(run_dir, records, HashMap::from([(1, 77)]))
    }

    #[test]
    fn a_namespace_belongs_to_one_pod_also_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run");
        let first = claims(&path);
        assert_eq!(first.claim(record("a", 1), 71).unwrap(), 0);
        assert_eq!(first.claim(record("b", 2), 72).unwrap(), 2);
        let error = first.claim(record("c", 1), 71).unwrap_err();
        assert_eq!(error.reason(), "netns_taken");
        assert!(error.to_string().contains("pod a "), "{error}");

        let next = claims(&path);
        assert_eq!(
            next.claim(record("c", 2), 72).unwrap_err().reason(),
            "netns_taken"
        );
        assert_eq!(
            next.claim(record("b", 3), 73).unwrap(),
            2,
            "the same pod keeps its slot"
        );
        next.free(&PodUid::from("a")).unwrap();
        assert_eq!(
            next.claim(record("c", 1), 71).unwrap(),
            0,
            "the lowest free slot"
        );
    }

    #[test]
    fn a_namespace_without_a_record_has_the_slot_of_its_programs_and_nobody_else_has() {
        let dir = tempfile::tempdir().unwrap();
        let claims = claims(&dir.path().join("run"));
        assert_eq!(claims.claim(record("a", 1), 70).unwrap(), 0);
        assert_eq!(claims.claim(record("b", 2), 70).unwrap(), 2);
        assert_eq!(claims.strays(), [(1, 77)]);
        assert_eq!(claims.claim(record("c", 3), 77).unwrap(), 1);
        assert!(claims.strays().is_empty());
    }
}

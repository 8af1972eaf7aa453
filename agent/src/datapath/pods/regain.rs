//! Going on after a successor that died between `commit` and `taken`. What it did is on record and
//! in the kernel; what this agent remembers is older.
//!
//! It may have let a pod go and given its slot to another. Who mends or releases that slot by the
//! older memory does it to the other pod, and opens it. So memory is compared first, before a
//! single listener is put back: a pod that is not where we remember it is forgotten here, one that
//! we do not know is adopted as at a start. Blocking, while the loop stands still.

use std::{sync::Arc, time::Instant};

use parking_lot::Mutex;

use super::{
    super::{PodEvent, sockets::PodHandle},
    captured::{Captured, Core},
    enrolment::{self, Adopted},
    leaving,
    records::Record,
    strays,
    table::Table,
};
use crate::state::PodUid;

pub(super) fn regain(core: &Core, table: &Mutex<Table>) {
    let mut records = core.claims.reload();
    let remembered = table.lock().captured();
    for pod in &remembered {
        let record = pod.record();
        let programs = core.loader.netns_of(record.slot).ok().flatten();
        let stand = programs == Some(pod.handle.netns().inode());
        if !is_ours(&record, stand, &records) {
            tracing::info!(
                pod = pod.name,
                slot = record.slot,
                "let go by the successor that died"
            );
            leaving::release(core, pod);
            table.lock().forget(pod.uid());
            continue;
        }
        if let Err(error) = pod.put_in_map(core) {
            let error = error.sentence();
            // The full turn tries again.
            tracing::warn!(pod = pod.name, error, "its listeners are not back yet");
        }
        // Captured again meanwhile: whose connections were taken must be asked anew.
        let config = core.loader.pod_config(record.slot);
        if config.is_ok_and(|config| !leaving::is_leaving(&config)) {
            table.lock().stay(pod.uid());
        }
        if !records.iter().any(|known| known.uid == record.uid) {
            if let Err(error) = core.claims.put_back(record.clone()) {
                tracing::warn!(
                    pod = pod.name,
                    error = error.sentence(),
                    "it is on no record"
                );
            }
            records.push(record);
        }
    }

    let held = table.lock().captured();
    for record in &records {
        if !held.iter().any(|pod| **pod.uid() == *record.uid) {
            adopt(core, table, record);
        }
    }
    match strays(&core.loader, &records) {
        Ok(found) => core.claims.set_strays(found),
        Err(error) => tracing::warn!(%error, "cannot see what else is pinned"),
    }
}

/// Is the pod of `record`, which we remember, still where it was? `stand`: what is pinned for its
/// slot is attached in its namespace.
fn is_ours(record: &Record, stand: bool, records: &[Record]) -> bool {
    let mut same = records
        .iter()
        .filter(|r| r.uid == record.uid || r.slot == record.slot || r.cookie == record.cookie)
        .peekable();
    if same.peek().is_none() {
        // Let go if nothing is attached any more; else only its record was lost.
        return stand;
    }
    same.all(|r| r.uid == record.uid && r.slot == record.slot && r.cookie == record.cookie)
}

/// A pod that the successor captured.
fn adopt(core: &Core, table: &Mutex<Table>, record: &Record) {
    let now = Instant::now();
    match enrolment::adopt(core, record) {
        Ok(Some(Adopted {
            captured,
            listeners,
        })) => {
            let event = PodEvent::Captured {
                pod: Arc::<PodHandle>::clone(&captured.handle),
                listeners,
            };
            table.lock().adopt_from_another(captured, now);
            if core.events.blocking_send(event).is_err() {
                tracing::debug!(pod = record.name, "nobody is left to serve it");
            }
        }
        Ok(None) => {}
        Err(error) => {
            let uid = PodUid::from(record.uid.as_str());
            table.lock().adopt_failed(&uid, &record.name, &error, now);
        }
    }
}

impl Captured {
    fn record(&self) -> Record {
        Record {
            uid: self.uid().to_string(),
            name: self.name.clone(),
            slot: self.handle.slot(),
            netns: self.netns_path.clone(),
            cookie: self.handle.netns().cookie(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(uid: &str, slot: u32, cookie: u64) -> Record {
        Record {
            uid: uid.into(),
            name: format!("ns/{uid}"),
            slot,
            netns: format!("/run/netns/{uid}").into(),
            cookie,
        }
    }

    #[test]
    fn a_pod_is_ours_where_nobody_else_has_its_slot_or_its_namespace() {
        let own = record("a", 1, 10);
        for (records, programs_stand, expected) in [
            (vec![record("a", 1, 10), record("b", 2, 20)], true, true),
            // Half taken off, and not finished: as any damage.
            (vec![record("a", 1, 10)], false, true),
            (vec![record("b", 1, 20)], true, false),
            (vec![record("b", 2, 10)], true, false),
            (vec![record("a", 2, 10)], true, false),
            (vec![record("a", 1, 30)], true, false),
            (vec![record("a", 2, 10), record("b", 1, 20)], true, false),
            // On no record: let go, or the file was lost.
            (vec![record("b", 2, 20)], false, false),
            (vec![record("b", 2, 20)], true, true),
        ] {
            let found = is_ours(&own, programs_stand, &records);
            assert_eq!(found, expected, "{records:?}, {programs_stand}");
        }
    }
}

//! When pods are looked for that nobody has told of. A look goes through all of /proc, and a pod may
//! have no sandbox for long (its image is pulled, its CNI is broken), so looks for the same pods grow
//! rarer. Pure; time is an argument.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use crate::datapath::PodStatus;

/// The kubelet may only be making it.
const SOON: Duration = Duration::from_millis(500);
/// As often as is looked without being asked.
const LATE: Duration = Duration::from_secs(30);

#[derive(Default)]
pub(super) struct Search {
    /// Uids of those that are looked for.
    lost: BTreeSet<String>,
    pause: Duration,
    next: Option<Instant>,
}

impl Search {
    /// When the next look is due, if anybody is lost.
    pub(super) fn next(&mut self, lost: &[PodStatus], now: Instant) -> Option<Instant> {
        let lost: BTreeSet<_> = lost.iter().map(|pod| pod.uid.clone()).collect();
        if lost.is_empty() {
            self.next = None;
        } else if self.next.is_none() || !lost.is_subset(&self.lost) {
            self.pause = SOON;
            self.next = Some(now + SOON);
        }
        self.lost = lost;
        self.next
    }

    pub(super) fn looked(&mut self, now: Instant) {
        self.pause = (2 * self.pause).min(LATE);
        self.next = Some(now + self.pause);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lost(uids: &[&str]) -> Vec<PodStatus> {
        let status = |uid: &&str| PodStatus {
            uid: (*uid).into(),
            name: String::new(),
            slot: None,
            state: "pending",
            reason: None,
            repairs: 0,
            mended: Vec::new(),
            counters: Vec::new(),
        };
        uids.iter().map(status).collect()
    }

    #[test]
    fn looks_for_the_same_pods_grow_rarer_and_a_new_one_is_looked_for_soon() {
        let (mut search, mut now) = (Search::default(), Instant::now());
        assert_eq!(search.next(&[], now), None);
        let mut pauses = Vec::new();
        for _ in 0..9 {
            let due = search.next(&lost(&["a", "b"]), now).unwrap();
            pauses.push((due - now).as_millis());
            // A mesh that changes in between moves nothing.
            let again = search.next(&lost(&["a", "b"]), now + SOON / 2);
            assert_eq!(again, Some(due));
            now = due;
            search.looked(now);
        }
        assert_eq!(
            pauses,
            [500, 1000, 2000, 4000, 8000, 16_000, 30_000, 30_000, 30_000]
        );
        let late = Some(now + LATE);
        assert_eq!(search.next(&lost(&["a"]), now), late, "one was found");
        assert_eq!(search.next(&lost(&["a", "c"]), now), Some(now + SOON));
        assert_eq!(search.next(&[], now), None);
        assert_eq!(search.next(&lost(&["a"]), now), Some(now + SOON));
    }
}

//! Files that were put right of late, so that two who each put theirs back do not do it without end.
//!
//! Cilium, as it is installed by default, renames every configuration that is not its own.

use std::{
    collections::VecDeque,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use super::{GATHER, POLL};

/// More repairs than this within [`QUARREL`] are a quarrel: somebody undoes what we do.
const REPAIRS: usize = 3;
const QUARREL: Duration = Duration::from_secs(60);

#[derive(Default)]
pub(super) struct Repairs {
    times: VecDeque<Instant>,
    last: PathBuf,
}

impl Repairs {
    /// How long to leave it alone; `None`: nobody quarrels.
    pub(super) fn rest(&mut self, repaired: Option<&Path>, now: Instant) -> Option<Duration> {
        if let Some(path) = repaired {
            self.times.push_back(now);
            path.clone_into(&mut self.last);
        }
        let old = |then: &Instant| now.saturating_duration_since(*then) >= QUARREL;
        while self.times.front().is_some_and(old) {
            self.times.pop_front();
        }
        let more = u32::try_from(self.times.len().checked_sub(REPAIRS + 1)?).unwrap_or(u32::MAX);
        Some((2 * GATHER * 2_u32.saturating_pow(more)).min(POLL))
    }

    pub(super) fn sentence(&self) -> String {
        format!(
            "somebody removes or changes {} whenever it is written; find out who (Cilium does unless \
             its chart has cni.exclusive=false), or set --no-cni",
            self.last.display()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_undoes_what_we_do_is_given_way_more_and_more() {
        let (mut repairs, mut now) = (Repairs::default(), Instant::now());
        let list = Some(Path::new("/etc/cni/net.d/00-picomesh.conflist"));
        let mut rests = Vec::new();
        for _ in 0..10 {
            let rest = repairs.rest(list, now);
            now += rest.unwrap_or(GATHER);
            rests.push(rest.map(|rest| rest.as_millis()));
        }
        let some = [200, 400, 800, 1600, 3200, 5000, 5000].map(Some);
        assert_eq!(rests[..REPAIRS], [None; REPAIRS]);
        assert_eq!(rests[REPAIRS..], some);
        assert!(repairs.sentence().contains("changes /etc/cni/net.d/00-p"));
        // Told until a minute is over in which less was done.
        assert!(repairs.rest(None, now).is_some());
        assert_eq!(repairs.rest(None, now + QUARREL), None);
    }
}

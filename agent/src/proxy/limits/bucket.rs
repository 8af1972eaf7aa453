//! How often something may happen: a token bucket in one word, so that threads can share it.
//!
//! It remembers the moment at which it will be full again. Taking a token moves that moment on by
//! what one token takes to come back, and is refused when it would lie further ahead than the
//! bucket is deep. Time is an argument.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

/// How fast tokens come, and how many can wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::proxy) struct Rate {
    per_second: u32,
    burst: u32,
}

#[derive(Debug)]
pub(in crate::proxy) struct Bucket {
    epoch: Instant,
    /// Nanoseconds since `epoch`.
    full_at: AtomicU64,
    /// Nanoseconds that one token takes.
    token: u64,
    /// Nanoseconds that all tokens take.
    depth: u64,
}

impl Rate {
    /// Both at least one.
    pub(in crate::proxy) const fn new(per_second: u32, burst: u32) -> Self {
        Self {
            per_second: if per_second == 0 { 1 } else { per_second },
            burst: if burst == 0 { 1 } else { burst },
        }
    }
}

impl Bucket {
    /// Full.
    pub(in crate::proxy) fn new(rate: Rate, now: Instant) -> Self {
        let token = 1_000_000_000 / u64::from(rate.per_second);
        Self {
            epoch: now,
            full_at: AtomicU64::new(0),
            token: token.max(1),
            depth: token.max(1) * u64::from(rate.burst),
        }
    }

    /// Takes a token, if there is one.
    pub(in crate::proxy) fn take(&self, now: Instant) -> bool {
        let now = nanos(now.saturating_duration_since(self.epoch));
        let took = self
            .full_at
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |full_at| {
                let full_at = full_at.max(now) + self.token;
                (full_at - now <= self.depth).then_some(full_at)
            });
        took.is_ok()
    }
}

fn nanos(since: Duration) -> u64 {
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX / 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_bucket_gives_its_burst_and_then_one_token_at_a_time() {
        let start = Instant::now();
        let bucket = Bucket::new(Rate::new(10, 3), start);
        let taken = |at: Instant| (0..100).filter(|_| bucket.take(at)).count();
        assert_eq!(taken(start), 3);
        assert_eq!(taken(start + Duration::from_millis(99)), 0);
        assert_eq!(taken(start + Duration::from_millis(100)), 1);
        assert_eq!(taken(start + Duration::from_millis(350)), 2);
        assert_eq!(
            taken(start + Duration::from_secs(3600)),
            3,
            "and never more than it holds"
        );
    }

    #[test]
    fn a_refused_taker_costs_the_others_nothing() {
        let start = Instant::now();
        let bucket = Bucket::new(Rate::new(1, 1), start);
        assert!(bucket.take(start));
        for _ in 0..1000 {
            assert!(!bucket.take(start));
        }
        assert!(bucket.take(start + Duration::from_secs(1)));
    }

    #[test]
    fn a_clock_that_stands_before_the_beginning_is_the_beginning() {
        let start = Instant::now() + Duration::from_secs(5);
        let bucket = Bucket::new(Rate::new(1, 2), start);
        assert!(bucket.take(Instant::now()));
    }

    #[test]
    fn threads_together_get_no_more_than_one_alone() {
        let start = Instant::now();
        let bucket = Bucket::new(Rate::new(1, 1000), start);
        let taken: usize = std::thread::scope(|scope| {
            let takers: Vec<_> = (0..4)
                .map(|_| scope.spawn(|| (0..1000).filter(|_| bucket.take(start)).count()))
                .collect();
            takers.into_iter().map(|taker| taker.join().unwrap()).sum()
        });
        assert_eq!(taken, 1000);
    }
}

//! The wall clock as a seam: certificates live in wall time, and tests must be able to move it.
//!
//! Everything of this room that asks for the time of day asks a [`Clock`]; rustls does too. Waits
//! and backoff use tokio's monotonic clock instead, so that a board whose clock jumps by decades
//! when NTP answers does not stop trying.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rustls::{pki_types::UnixTime, time_provider::TimeProvider};

pub trait Clock: fmt::Debug + Send + Sync + 'static {
    fn now(&self) -> SystemTime;
}

/// The machine's clock.
#[derive(Debug)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> SystemTime {
        SystemTime::now()
    }
}

/// Lets rustls judge validity by the same clock as we do.
#[derive(Debug)]
pub(super) struct RustlsClock(pub(super) Arc<dyn Clock>);

impl TimeProvider for RustlsClock {
    fn current_time(&self) -> Option<UnixTime> {
        Some(unix_time(self.0.now()))
    }
}

/// A clock before 1970 counts as 1970: every certificate is then "not yet valid".
pub(super) fn unix_time(at: SystemTime) -> UnixTime {
    UnixTime::since_unix_epoch(at.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO))
}

/// Wall time that follows tokio's (pausable) clock and can be set apart from it.
#[cfg(test)]
#[derive(Debug)]
pub(crate) struct TestClock {
    start: tokio::time::Instant,
    base: parking_lot::Mutex<SystemTime>,
}

#[cfg(test)]
impl TestClock {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            start: tokio::time::Instant::now(),
            base: parking_lot::Mutex::new(UNIX_EPOCH + Duration::from_secs(1_800_000_000)),
        })
    }

    /// As when NTP answers: wall time jumps, monotonic time does not.
    pub(crate) fn jump(&self, by: Duration) {
        *self.base.lock() += by;
    }
}

#[cfg(test)]
impl Clock for TestClock {
    fn now(&self) -> SystemTime {
        *self.base.lock() + self.start.elapsed()
    }
}

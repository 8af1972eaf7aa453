//! Waiting for something to become true, with a deadline and a last word.
//!
//! On a machine that is emulated everything takes its time: [`SLOWNESS`] stretches what tests wait
//! for at most.

use std::{
    sync::OnceLock,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

/// The variable that says how many times slower than a real one this machine is.
pub const SLOWNESS: &str = "PICOMESH_TEST_SLOWNESS";

/// A deadline for this machine.
pub fn patience(deadline: Duration) -> Duration {
    static FACTOR: OnceLock<u32> = OnceLock::new();
    deadline
        * *FACTOR.get_or_init(|| {
            std::env::var(SLOWNESS)
                .ok()
                .and_then(|factor| factor.parse().ok())
                .filter(|factor| (1..=100).contains(factor))
                .unwrap_or(1)
        })
}

/// Asks every 10 ms until `probe` gives a value; `Err` is remembered and told when time is up.
pub fn for_value<T>(
    what: &str,
    deadline: Duration,
    mut probe: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let deadline = patience(deadline);
    let start = Instant::now();
    let mut last = None;
    loop {
        match probe() {
            Ok(Some(value)) => return Ok(value),
            Ok(None) => {}
            Err(e) => last = Some(e),
        }
        if start.elapsed() > deadline {
            match last {
                Some(e) => bail!("{what}: not within {deadline:?}; last: {e:#}"),
                None => bail!("{what}: not within {deadline:?}"),
            }
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// Asks every 10 ms until `probe` says yes.
pub fn until(what: &str, deadline: Duration, mut probe: impl FnMut() -> bool) -> Result<()> {
    for_value(what, deadline, || Ok(probe().then_some(())))
}

//! Waiting for something to become true, with a deadline and a last word.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

/// Asks every 10 ms until `probe` gives a value; `Err` is remembered and told when time is up.
pub fn for_value<T>(
    what: &str,
    deadline: Duration,
    mut probe: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
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

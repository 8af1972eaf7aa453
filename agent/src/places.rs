//! Accepting with bounds: a caller gets in when there is a place, the others wait in the backlog;
//! and an error costs a pause, never the loop.
//!
//! For the sockets that people, scrapers and successors call. What pods dial is the proxy's, which
//! refuses instead of waiting.

use std::{future::Future, io, sync::Arc, time::Duration};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::sleep,
};
use tracing::warn;

/// Out of file descriptors, most likely: that passes.
const PAUSE: Duration = Duration::from_millis(100);

pub struct Places {
    /// Whose callers, for the log.
    whose: &'static str,
    free: Arc<Semaphore>,
}

/// A caller's; given back when dropped.
pub struct Place {
    _permit: Option<OwnedSemaphorePermit>,
}

impl Places {
    pub fn new(whose: &'static str, count: usize) -> Self {
        Self {
            whose,
            free: Arc::new(Semaphore::new(count)),
        }
    }

    /// The next caller and its place. May be dropped while it waits, if `accept` may.
    pub async fn next<T, F>(&self, accept: impl Fn() -> F) -> (T, Place)
    where
        F: Future<Output = io::Result<T>>,
    {
        // The semaphore is never closed.
        let place = Place {
            _permit: Arc::clone(&self.free).acquire_owned().await.ok(),
        };
        loop {
            match accept().await {
                Ok(caller) => return (caller, place),
                Err(error) => {
                    warn!(%error, socket = self.whose, "a call was not accepted");
                    sleep(PAUSE).await;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use futures_util::FutureExt;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn who_finds_no_place_waits_until_one_is_given_back() {
        let places = Places::new("test", 2);
        let accepted = Cell::new(0);
        let accept = || async {
            accepted.set(accepted.get() + 1);
            Ok(accepted.get())
        };
        let (_first, one) = places.next(accept).await;
        let (_second, _two) = places.next(accept).await;
        assert!(places.next(accept).now_or_never().is_none());
        assert_eq!(
            accepted.get(),
            2,
            "nobody is accepted for whom there is no place"
        );
        drop(one);
        let (third, _three) = places.next(accept).await;
        assert_eq!(third, 3);
    }

    #[tokio::test(start_paused = true)]
    async fn an_error_costs_a_pause_and_not_the_loop() {
        let places = Places::new("test", 1);
        let tried = Cell::new(0);
        let accept = || async {
            tried.set(tried.get() + 1);
            match tried.get() {
                1..=3 => Err(io::Error::other("no descriptors")),
                tries => Ok(tries),
            }
        };
        let begun = tokio::time::Instant::now();
        let (caller, _place) = places.next(accept).await;
        assert_eq!(caller, 4);
        assert_eq!(begun.elapsed(), 3 * PAUSE);
    }
}

//! The loads: what a client does to an address, and what came of it.
//!
//! They are our own and not a tool's, because one program then measures every contender alike:
//! requests as fast as answers come, requests at a fixed pace, connections that ask once and go,
//! one stream of bulk. A load knows an address and nothing of who answers there. Sockets belong
//! to the network namespace they were made in, so a load opens them on a thread inside the
//! client's and may drive them from anywhere.

mod bulk;
mod connections;
mod http;

use std::time::{Duration, Instant};

use anyhow::Result;

use super::usage::{Meter, Usage};

pub(crate) use bulk::{Sink, stream};
pub(crate) use connections::churn;
pub(crate) use http::{once, open, requests};

/// How long a single answer may take before the load calls it a failure.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often a load that waits looks at the clock.
const TICK_MS: u8 = 50;

/// A load runs `warm` uncounted, then `measure` counted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Window {
    pub(crate) warm: Duration,
    pub(crate) measure: Duration,
}

/// What happened inside the counted part of a window.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// Requests answered, connections finished, or bytes that arrived.
    pub(crate) done: u64,
    /// Whatever broke or was refused, also while warming up.
    pub(crate) failed: u64,
    pub(crate) elapsed: Duration,
    /// Nanoseconds of each answer, unsorted; empty for bulk.
    pub(crate) latencies: Vec<u64>,
    /// CPU time between the two edges.
    pub(crate) spent: Usage,
}

impl Outcome {
    pub(crate) fn per_second(&self) -> f64 {
        self.done as f64 / self.elapsed.as_secs_f64()
    }

    /// The latency in microseconds that the fraction `p` of the answers did not exceed.
    pub(crate) fn percentile(&self, p: f64) -> Option<f64> {
        let mut sorted = self.latencies.clone();
        sorted.sort_unstable();
        let rank = (sorted.len() as f64 * p).ceil() as usize;
        sorted
            .get(rank.saturating_sub(1))
            .map(|ns| *ns as f64 / 1_000.0)
    }
}

/// Where in its window a load is; takes the meter's readings at the edges.
struct Clock<'a> {
    begin: Instant,
    end: Instant,
    meter: &'a Meter,
    began: Option<(Instant, Usage)>,
}

impl<'a> Clock<'a> {
    fn start(window: Window, meter: &'a Meter) -> Self {
        let begin = Instant::now() + window.warm;
        Self {
            begin,
            end: begin + window.measure,
            meter,
            began: None,
        }
    }

    /// True while the load goes on; the first call after the warm-up opens the counted part.
    fn goes_on(&mut self, now: Instant) -> Result<bool> {
        if self.began.is_none() && now >= self.begin {
            self.began = Some((now, self.meter.read()?));
        }
        Ok(now < self.end)
    }

    fn counts(&self) -> bool {
        self.began.is_some()
    }

    /// Time and CPU since the counted part began.
    fn stop(self) -> Result<(Duration, Usage)> {
        match self.began {
            Some((began, before)) => Ok((began.elapsed(), self.meter.read()?.since(before))),
            None => Ok((Duration::ZERO, Usage::default())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_is_the_smallest_latency_that_covers_the_fraction() {
        let outcome = Outcome {
            done: 4,
            failed: 0,
            elapsed: Duration::from_secs(2),
            latencies: vec![4_000, 1_000, 3_000, 2_000],
            spent: Usage::default(),
        };
        assert_eq!(outcome.percentile(0.5), Some(2.0));
        assert_eq!(outcome.percentile(0.51), Some(3.0));
        assert_eq!(outcome.percentile(0.99), Some(4.0));
        assert_eq!(outcome.per_second(), 2.0);
    }

    #[test]
    fn no_answers_have_no_percentile() {
        let outcome = Outcome {
            done: 0,
            failed: 3,
            elapsed: Duration::from_secs(1),
            latencies: Vec::new(),
            spent: Usage::default(),
        };
        assert_eq!(outcome.percentile(0.5), None);
    }
}

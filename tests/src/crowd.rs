//! Many clients at once that open new connections at a steady pace, and a tally of how each fared.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Result, anyhow};

use crate::{Netns, client};

/// Dropping it stops it.
#[derive(Debug)]
pub struct Crowd {
    stop: Arc<AtomicBool>,
    members: Vec<JoinHandle<Fared>>,
}

#[derive(Clone, Debug, Default)]
pub struct Fared {
    pub opened: u64,
    /// In words, with the time since the start.
    pub failures: Vec<String>,
    /// From the first SYN until the connection had carried a word there and back.
    pub longest: Duration,
    pub took: Duration,
}

/// What every connection carries to and fro: in a capture of plain connections it is found.
pub const WORD: &[u8] = b"picomesh-crowd-word";

/// After as many the point is made.
const MANY_FAILURES: usize = 20;
const PATIENCE: Duration = Duration::from_secs(10);

impl Crowd {
    /// For each of `targets`, which are echo servers, a client in `from` that opens a connection
    /// `every` so often, or as fast as it can if that is too much.
    pub fn start(
        from: &impl AsRef<Netns>,
        targets: &[SocketAddr],
        every: Duration,
    ) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let members = targets
            .iter()
            .map(|to| {
                let (stop, to) = (stop.clone(), *to);
                from.as_ref()
                    .spawn("crowd", move || member(to, every, &stop))
            })
            .collect::<Result<_>>()?;
        Ok(Self { stop, members })
    }

    pub fn stop(mut self) -> Result<Fared> {
        self.stop.store(true, Ordering::Relaxed);
        let mut all = Fared::default();
        for member in self.members.drain(..) {
            all.add(member.join().map_err(|_| anyhow!("a client panicked"))?);
        }
        Ok(all)
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

impl Fared {
    pub fn add(&mut self, other: Self) {
        self.opened += other.opened;
        self.failures.extend(other.failures);
        self.longest = self.longest.max(other.longest);
        self.took = self.took.max(other.took);
    }

    pub fn per_second(&self) -> f64 {
        self.opened as f64 / self.took.as_secs_f64().max(0.001)
    }
}

fn member(to: SocketAddr, every: Duration, stop: &AtomicBool) -> Fared {
    let begun = Instant::now();
    let mut next = begun;
    let mut fared = Fared::default();
    while !stop.load(Ordering::Relaxed) && fared.failures.len() < MANY_FAILURES {
        let start = Instant::now();
        let mut phase = "connect";
        let once = || -> std::io::Result<()> {
            let mut stream = client::connect(to, PATIENCE)?;
            phase = "exchange";
            client::ping(&mut stream, WORD)
        };
        match { once }() {
            Ok(()) => fared.opened += 1,
            Err(e) => fared
                .failures
                .push(format!("{to} at {:?}, {phase}: {e}", begun.elapsed())),
        }
        fared.longest = fared.longest.max(start.elapsed());
        next = (next + every).max(start);
        thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    fared.took = begun.elapsed();
    fared
}

//! Traffic that goes on while something else happens, and a tally of how it fared.

use std::{
    io::Read,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};

use crate::{Netns, client, crowd::WORD, wait};

/// One client that works until it is told to stop. Dropping it stops it too.
#[derive(Debug)]
pub struct Load {
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
    thread: Option<JoinHandle<Tally>>,
}

#[derive(Clone, Debug, Default)]
pub struct Tally {
    pub rounds: u64,
    /// What went wrong, in words, with the round's number.
    pub failures: Vec<String>,
    pub longest: Duration,
}

/// What the failure of a stream says that was served before.
pub const BEGUN: &str = "cut while it was served";

/// After as many the point is made.
const MANY_FAILURES: usize = 20;
const PATIENCE: Duration = Duration::from_secs(10);

impl Load {
    /// A new connection to an echo server every few milliseconds.
    pub fn of_connections(from: &impl AsRef<Netns>, to: SocketAddr) -> Result<Self> {
        Self::start(from, move |_| {
            let answer = client::exchange(to, WORD, PATIENCE)?;
            ensure!(answer == WORD, "the echo is {answer:?}");
            Ok(())
        })
    }

    /// One connection to an echo server, opened before this returns, on which words go to and fro.
    pub fn on_one_connection(from: &impl AsRef<Netns>, to: SocketAddr) -> Result<Self> {
        let mut stream = from.as_ref().run(|| client::connect(to, PATIENCE))?;
        client::ping(&mut stream, b"first words")?;
        Self::start(from, move |round| {
            client::ping(&mut stream, &round.to_be_bytes())?;
            Ok(())
        })
    }

    /// One connection to an echo server after the other, each as long as `life`, with a word to and
    /// fro five times a second. Stopping it waits for the last one's end. A failure says whether
    /// the stream had [`BEGUN`].
    pub fn of_streams(from: &impl AsRef<Netns>, to: SocketAddr, life: Duration) -> Result<Self> {
        Self::start(from, move |_| {
            let mut stream = client::connect(to, PATIENCE)?;
            client::ping(&mut stream, WORD)?;
            let begun = Instant::now();
            while begun.elapsed() < life {
                client::ping(&mut stream, WORD).context(BEGUN)?;
                thread::sleep(Duration::from_millis(200));
            }
            Ok(())
        })
    }

    /// A download from [`crate::server::Habit::Source`] at a few MB a second, opened before this
    /// returns; every byte is looked at.
    pub fn download(from: &impl AsRef<Netns>, to: SocketAddr) -> Result<Self> {
        let mut stream = from.as_ref().run(|| client::connect(to, PATIENCE))?;
        let mut chunk = vec![0; 16 * 1024];
        Self::start(from, move |_| {
            stream.read_exact(&mut chunk)?;
            ensure!(
                chunk.iter().all(|byte| *byte == 0x5a),
                "a byte is not the server's"
            );
            Ok(())
        })
    }

    fn start(
        from: &impl AsRef<Netns>,
        mut round: impl FnMut(u64) -> Result<()> + Send + 'static,
    ) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let rounds = Arc::new(AtomicU64::new(0));
        let (stopped, counted) = (stop.clone(), rounds.clone());
        let thread = from.as_ref().spawn("load", move || {
            let mut tally = Tally::default();
            while !stopped.load(Ordering::Relaxed) && tally.failures.len() < MANY_FAILURES {
                let start = Instant::now();
                if let Err(e) = round(tally.rounds) {
                    tally.failures.push(format!("{}: {e:#}", tally.rounds));
                }
                tally.longest = tally.longest.max(start.elapsed());
                tally.rounds += 1;
                counted.store(tally.rounds, Ordering::Relaxed);
                thread::sleep(Duration::from_millis(4));
            }
            tally
        })?;
        Ok(Self {
            stop,
            rounds,
            thread: Some(thread),
        })
    }

    /// Waits for this many more rounds: what was changed before has been met by traffic.
    pub fn wait_rounds(&self, more: u64) -> Result<()> {
        let until = self.rounds.load(Ordering::Relaxed) + more;
        wait::until("the load goes on", PATIENCE, || {
            self.rounds.load(Ordering::Relaxed) >= until
        })
    }

    /// The round that is under way is the last. Said to many before each is stopped, they end
    /// together.
    pub fn no_more(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    pub fn stop(mut self) -> Result<Tally> {
        self.no_more();
        self.thread
            .take()
            .ok_or_else(|| anyhow!("the load was stopped already"))?
            .join()
            .map_err(|_| anyhow!("the load panicked"))
    }

    /// Stops it; one failure is an error.
    pub fn stop_unharmed(self) -> Result<Tally> {
        let tally = self.stop()?;
        ensure!(
            tally.failures.is_empty(),
            "of {} rounds failed: {}",
            tally.rounds,
            tally.failures.join("; ")
        );
        ensure!(tally.rounds > 0, "the load did nothing");
        Ok(tally)
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

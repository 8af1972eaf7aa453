//! Calls at a steady pace, none of which waits for the one before: what a moment in which nobody
//! answers is like for everybody who comes in it.

use std::{
    mem,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow};
use socket2::{Domain, Socket, Type};

use crate::{Netns, client, crowd::WORD};

/// A new connection to an echo server `every` so often. Dropping it stops it.
#[derive(Debug)]
pub struct Calls {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<Vec<Call>>>>,
}

/// One connection, that carries [`WORD`] there and back.
#[derive(Clone, Debug)]
pub struct Call {
    pub begun: Instant,
    /// From the first SYN until the word was back, or until it failed.
    pub took: Duration,
    /// Its own address, once it was accepted.
    pub from: Option<SocketAddr>,
    pub failure: Option<String>,
}

/// Nobody is so late that all of it shall be made up for.
const CATCH_UP: Duration = Duration::from_secs(1);
/// Each is a thread; while so many wait nobody new comes.
const MOST_AT_ONCE: usize = 2_000;
/// Long after a lost SYN was sent again for the fourth time.
const PATIENCE: Duration = Duration::from_secs(45);

impl Calls {
    pub fn start(from: &impl AsRef<Netns>, to: SocketAddr, every: Duration) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        // Its own threads are born in the same namespace.
        let thread = from
            .as_ref()
            .spawn("calls", move || calls(to, every, &stopped))?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }

    /// Makes no more of them, waits for those under way, and tells of all in the order in which
    /// they ended.
    pub fn stop(mut self) -> Result<Vec<Call>> {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self
            .thread
            .take()
            .context("the calls were stopped before")?;
        let mut calls = thread
            .join()
            .map_err(|_| anyhow!("the caller panicked"))??;
        calls.sort_by_key(Call::ended);
        Ok(calls)
    }
}

impl Drop for Calls {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

impl Call {
    pub fn ended(&self) -> Instant {
        self.begun + self.took
    }
}

fn calls(to: SocketAddr, every: Duration, stop: &AtomicBool) -> Result<Vec<Call>> {
    let mut waiting: Vec<JoinHandle<Call>> = Vec::new();
    let mut done = Vec::new();
    let mut next = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        if waiting.len() < MOST_AT_ONCE {
            let one = thread::Builder::new().name("call".into());
            waiting.push(one.spawn(move || call(to)).context("start a thread")?);
        }
        for one in mem::take(&mut waiting) {
            if one.is_finished() {
                done.push(one.join().map_err(|_| anyhow!("a call panicked"))?);
            } else {
                waiting.push(one);
            }
        }
        // What a busy machine keeps from beginning in time begins as soon as it can.
        let now = Instant::now();
        next = (next + every).max(now.checked_sub(CATCH_UP).unwrap_or(now));
        thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    for one in waiting {
        done.push(one.join().map_err(|_| anyhow!("a call panicked"))?);
    }
    Ok(done)
}

fn call(to: SocketAddr) -> Call {
    let begun = Instant::now();
    let mut from = None;
    let mut phase = "connect";
    let once = || -> std::io::Result<()> {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
        let connected = socket.connect_timeout(&to.into(), PATIENCE);
        // One that is reset before anybody looks has had an address, too.
        from = socket.local_addr().ok().and_then(|own| own.as_socket());
        connected?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.set_write_timeout(Some(PATIENCE))?;
        let mut stream = socket.into();
        phase = "exchange";
        client::ping(&mut stream, WORD)
    };
    let failed = { once }().err();
    Call {
        begun,
        took: begun.elapsed(),
        from,
        failure: failed.map(|e| format!("{phase}: {e}")),
    }
}

//! One stream as fast as it goes, counted where it arrives.

use std::{
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use picomesh_tests::Netns;
use socket2::SockRef;

use super::{Clock, Outcome, PATIENCE, TICK_MS, Window};
use crate::bench::usage::Meter;

/// As much as the usual tools read and write at a time.
const CHUNK: usize = 128 * 1024;
const TICK: Duration = Duration::from_millis(TICK_MS as u64);

/// Reads whatever is sent to it, from one connection after the other.
pub(crate) struct Sink {
    received: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Sink {
    /// Listens in `netns`.
    pub(crate) fn start(netns: &Netns, address: SocketAddr) -> Result<Self> {
        let listener = netns
            .run(|| TcpListener::bind(address))
            .with_context(|| format!("listen on {address}"))?;
        // The limit also holds for accept, which is how the thread comes to see `stop`.
        SockRef::from(&listener).set_read_timeout(Some(TICK))?;
        let received = Arc::new(AtomicU64::new(0));
        let stop = Arc::new(AtomicBool::new(false));
        let thread = thread::Builder::new().name("sink".into()).spawn({
            let (received, stop) = (Arc::clone(&received), Arc::clone(&stop));
            move || swallow(&listener, &received, &stop)
        })?;
        Ok(Self {
            received,
            stop,
            thread: Some(thread),
        })
    }

    fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn swallow(listener: &TcpListener, received: &AtomicU64, stop: &AtomicBool) {
    let mut buffer = vec![0; CHUNK];
    while !stop.load(Ordering::Relaxed) {
        let Ok((mut stream, _)) = listener.accept() else {
            continue;
        };
        if stream.set_read_timeout(Some(TICK)).is_err() {
            continue;
        }
        while !stop.load(Ordering::Relaxed) {
            match stream.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => {
                    received.fetch_add(n as u64, Ordering::Relaxed);
                }
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                Err(_) => break,
            }
        }
    }
}

/// Sends to `target`, from `netns`, what must arrive at `sink`.
pub(crate) fn stream(
    netns: &Netns,
    target: SocketAddr,
    sink: &Sink,
    window: Window,
    meter: &Meter,
) -> Result<Outcome> {
    let mut stream = netns
        .run(|| TcpStream::connect_timeout(&target, PATIENCE))
        .with_context(|| format!("connect to {target}"))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    thread::scope(|scope| {
        let until = Instant::now() + window.warm + window.measure + TICK;
        let sender = scope.spawn(move || {
            let chunk = vec![b'p'; CHUNK];
            while Instant::now() < until {
                stream.write_all(&chunk)?;
            }
            std::io::Result::Ok(())
        });
        let mut clock = Clock::start(window, meter);
        let mut at_begin = None;
        while clock.goes_on(Instant::now())? {
            if clock.counts() && at_begin.is_none() {
                at_begin = Some(sink.received());
            }
            thread::sleep(Duration::from_millis(1));
        }
        let done = sink.received() - at_begin.unwrap_or_else(|| sink.received());
        let (elapsed, spent) = clock.stop()?;
        let sent = sender.join();
        let failed = u64::from(!matches!(sent, Ok(Ok(()))));
        ensure!(
            done > 0 && failed == 0,
            "the stream to {target} broke: {sent:?}"
        );
        Ok(Outcome {
            done,
            failed,
            elapsed,
            latencies: Vec::new(),
            spent,
        })
    })
}

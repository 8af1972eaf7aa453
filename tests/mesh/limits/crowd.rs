//! Many connections of one pod, and another pod that would like to be answered.

use std::{
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};
use picomesh_tests::{
    AgentOptions, Pod, client,
    process::allow_files,
    program,
    server::{Habit, Server},
};

use crate::ground::{Ground, PATIENCE, PORT};

/// Where the crowd's server listens, in `far`.
const CROWDED: u16 = 8081;
const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: crowd\r\n\r\n";
/// Clocks of a busy machine are not finer than this.
const NOISE: Duration = Duration::from_micros(300);
/// Both sides are measured in turn, so that whoever else uses the machine meets both, and the middle
/// one of each counts: neither a round that was spoilt nor one that was lucky decides.
const ROUNDS: usize = 3;

pub(super) fn a_small_crowd_does_not_slow_another_pod_down() -> Result<()> {
    crowd_beside_another(500, Duration::from_secs(2))
}

pub(super) fn ten_thousand_connections_do_not_triple_another_pods_p99() -> Result<()> {
    crowd_beside_another(10_000, Duration::from_secs(5))
}

fn crowd_beside_another(connections: usize, window: Duration) -> Result<()> {
    allow_files(connections as u64 + 1_000)?;
    let mut ground = Ground::new()?;
    let _nginx = program::nginx(&ground.world, &ground.far, CROWDED)?;
    let _echo = Server::start(ground.far.netns(), PORT, Habit::Echo)?;
    let cap = (2 * connections).to_string();
    let options = AgentOptions::default()
        .arg("--pod-connections", &cap)
        .arg("--pod-inbound-connections", &cap)
        // They are dialled as fast as one after the other can be.
        .arg("--pod-connection-rate", &cap)
        .arg("--pod-pending", &cap)
        .arg("--node-connections", &cap);
    ground.mesh_with(&options)?;
    let to = ground.far.at(PORT);
    let crowded = ground.far.at(CROWDED);

    let (mut alone, mut beside) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        alone.push(p99(&ground.beside, to, window)?);
        let crowd = Crowd::start(&ground.near, crowded, connections)?;
        crowd.wait_answers(connections as u64)?;
        beside.push(p99(&ground.beside, to, window)?);
        let answers = crowd.stop()?;
        eprintln!(
            "{connections} connections, {answers} answers: alone {alone:?}, beside {beside:?}"
        );
    }
    let own = middle(&mut alone).max(NOISE);
    let theirs = middle(&mut beside);
    ensure!(
        theirs <= 3 * own,
        "another pod's p99 is {theirs:?} beside the crowd and {own:?} without it; by rounds: \
         {beside:?} and {alone:?}"
    );
    Ok(())
}

fn middle(rounds: &mut [Duration]) -> Duration {
    rounds.sort_unstable();
    rounds[rounds.len() / 2]
}

pub(super) fn what_is_over_the_default_cap_is_refused_and_counted() -> Result<()> {
    const TRIED: usize = 5_000;
    allow_files(TRIED as u64 + 1_000)?;
    let mut ground = Ground::new()?;
    let _nginx = program::nginx(&ground.world, &ground.far, CROWDED)?;
    let _echo = Server::start(ground.far.netns(), PORT, Habit::Echo)?;
    ground.mesh()?;
    let agent = ground.agent(0)?;
    let cap = agent.debug_json(&["limits"])?["caps"]["pod_connections"]
        .as_u64()
        .context("debug limits names no cap")? as usize;
    ensure!(cap < TRIED, "the default is {cap}");
    let to = ground.far.at(CROWDED);
    let mut buffer = [0; 4096];
    let mut held = Vec::new();
    let mut refused = 0;
    ground.near.run(|| -> Result<()> {
        for number in 0..TRIED {
            let asked = client::connect(to, 2 * PATIENCE).and_then(|mut stream| {
                stream.write_all(REQUEST)?;
                match stream.read(&mut buffer)? {
                    0 => Err(ErrorKind::UnexpectedEof.into()),
                    _ => Ok(stream),
                }
            });
            match asked {
                Ok(stream) => held.push(stream),
                Err(e) if e.kind() == ErrorKind::ConnectionReset => refused += 1,
                Err(e) => return Err(e).with_context(|| format!("connection {number}")),
            }
        }
        Ok(())
    })?;
    ensure!(
        (held.len(), refused) == (cap, TRIED - cap),
        "{} are open, {refused} were refused; the cap is {cap}",
        held.len()
    );
    let why = [("error", "pod_connections"), ("pod", "near")];
    agent.wait_metric("outbound_tcp_errors_total", &why, PATIENCE, |n| {
        n == refused as f64
    })?;
    p99(&ground.beside, ground.far.at(PORT), Duration::from_secs(1)).map(drop)
}

/// The 99th percentile of one connection's answers.
fn p99(from: &Pod, to: SocketAddr, window: Duration) -> Result<Duration> {
    from.run(|| {
        let mut stream = client::connect(to, PATIENCE)?;
        let mut took = Vec::new();
        let begun = Instant::now();
        while begun.elapsed() < window {
            let asked = Instant::now();
            client::ping(&mut stream, b"how long does it take?")?;
            took.push(asked.elapsed());
            thread::sleep(Duration::from_millis(2));
        }
        took.sort_unstable();
        let at = took.len() * 99 / 100;
        took.get(at)
            .copied()
            .with_context(|| format!("{} answers in {window:?}", took.len()))
    })
}

/// Connections that are all open, and each of which asks once a second.
struct Crowd {
    stop: Arc<AtomicBool>,
    answers: Arc<AtomicU64>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Crowd {
    fn start(from: &Pod, to: SocketAddr, connections: usize) -> Result<Self> {
        let (stop, answers) = <(Arc<AtomicBool>, Arc<AtomicU64>)>::default();
        let (stopped, counted) = (Arc::clone(&stop), Arc::clone(&answers));
        let thread = from.netns().spawn("crowd", move || {
            let mut streams = Vec::new();
            for number in 0..connections {
                let stream = client::connect(to, 2 * PATIENCE)
                    .and_then(|stream| {
                        stream.set_nonblocking(true)?;
                        Ok(stream)
                    })
                    .with_context(|| format!("connection {number} of {connections}"))?;
                streams.push(stream);
            }
            ask(&mut streams, &stopped, &counted)
        })?;
        Ok(Self {
            stop,
            answers,
            thread: Some(thread),
        })
    }

    /// Each has been answered once.
    fn wait_answers(&self, count: u64) -> Result<()> {
        picomesh_tests::wait::until("the crowd is answered", Duration::from_secs(120), || {
            self.answers.load(Ordering::Relaxed) >= count
                || self.thread.as_ref().is_none_or(JoinHandle::is_finished)
        })
    }

    fn stop(mut self) -> Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().context("stopped twice")?;
        thread.join().map_err(|_| anyhow!("the crowd panicked"))??;
        Ok(self.answers.load(Ordering::Relaxed))
    }
}

/// Goes round once a second: takes what was answered, asks again.
fn ask(streams: &mut [TcpStream], stop: &AtomicBool, answers: &AtomicU64) -> Result<()> {
    let each = Duration::from_secs(1) / streams.len() as u32;
    let mut waiting = vec![false; streams.len()];
    let mut buffer = [0; 4096];
    let mut next = Instant::now();
    loop {
        for (number, stream) in streams.iter_mut().enumerate() {
            if stop.load(Ordering::Relaxed) {
                return Ok(());
            }
            if waiting[number] {
                match stream.read(&mut buffer) {
                    Ok(0) => return Err(anyhow!("connection {number} ended")),
                    Ok(_) => {
                        answers.fetch_add(1, Ordering::Relaxed);
                        waiting[number] = false;
                    }
                    Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                    Err(e) => return Err(e).with_context(|| format!("connection {number}")),
                }
            }
            if !waiting[number] {
                stream
                    .write_all(REQUEST)
                    .with_context(|| format!("connection {number}"))?;
                waiting[number] = true;
            }
            next += each;
            let now = Instant::now();
            // Sleeps are coarse: some at a time.
            if next > now + Duration::from_millis(1) {
                thread::sleep(next - now);
            } else if now > next + Duration::from_secs(1) {
                next = now;
            }
        }
    }
}

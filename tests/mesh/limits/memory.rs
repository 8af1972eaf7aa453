//! Memory: what slow readers hold, and what a burst leaves behind.

use std::{
    io::{ErrorKind, Read, Write},
    net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};
use picomesh_tests::{
    Agent, AgentOptions, Pod, client,
    process::allow_files,
    server::{Habit, Server},
    wait,
};

use super::open;
use crate::ground::{Ground, PATIENCE, PORT};

const KIB: u64 = 1;
const MIB: u64 = 1024 * KIB;

pub(super) fn slow_readers_share_the_memory_of_their_pod_and_lose_nothing() -> Result<()> {
    const CONNECTIONS: usize = 100;
    let mut ground = Ground::new()?;
    let late = LateReader::start(&ground.far)?;
    let _echo = Server::start(ground.far.netns(), PORT, Habit::Echo)?;
    ground.mesh_with(&AgentOptions::default().arg("--pod-buffers", "1MiB"))?;
    drop(open(&ground.near, ground.far.at(PORT), 1)?);
    let idle = settled(&ground)?;

    let mut streams: Vec<TcpStream> = ground.near.run(|| {
        (0..CONNECTIONS)
            .map(|_| client::connect(ground.far.at(late.port), PATIENCE))
            .collect::<Result<_, _>>()
    })?;
    // One after the other, so that the pod's share is known to be full when the next comes.
    let mut sent = 0;
    for (number, stream) in streams.iter_mut().enumerate() {
        sent += stuff(stream).with_context(|| format!("connection {number}"))?;
    }
    // Without a bound each would hold half a megabyte on the reader's side alone.
    for (agent, idle) in ground.agents.iter().zip(idle) {
        let resident = agent.process().resident_kib()?;
        ensure!(
            resident < idle + 12 * MIB,
            "{CONNECTIONS} slow readers cost the agent of {} {} KiB",
            agent.node().name(),
            resident - idle
        );
    }
    let shown = ground.agent(1)?.debug_json(&["limits"])?;
    ensure!(
        shown["pods"][0]["buffered_bytes"].as_u64() > Some(1 << 20),
        "{shown:#}"
    );
    // Whoever reads at once is served meanwhile, also by the same pods.
    for stream in &mut open(&ground.near, ground.far.at(PORT), 3)? {
        client::ping(stream, &vec![3; 200_000])?;
    }

    for stream in &streams {
        stream.set_nonblocking(false)?;
        stream.shutdown(std::net::Shutdown::Write)?;
    }
    let read = late.read_all()?;
    ensure!(
        read == sent,
        "{sent} bytes were sent and {read} came in the end"
    );
    Ok(())
}

pub(super) fn memory_comes_back_after_a_small_burst() -> Result<()> {
    burst(200)
}

pub(super) fn memory_comes_back_after_two_thousand_connections_with_64_kib_each() -> Result<()> {
    burst(2_000)
}

/// Each connection has 64 KiB under way before anybody reads an answer.
fn burst(connections: usize) -> Result<()> {
    allow_files(2 * connections as u64 + 1_000)?;
    let mut ground = Ground::new()?;
    let _server = Server::start(ground.far.netns(), PORT, Habit::Echo)?;
    let cap = (2 * connections).to_string();
    let options = AgentOptions::default()
        .arg("--pod-connections", &cap)
        .arg("--pod-inbound-connections", &cap);
    ground.mesh_with(&options)?;
    // Not of a start, but of an agent that has worked.
    let few = open(&ground.near, ground.far.at(PORT), 10)?;
    drop(few);
    let idle = settled(&ground)?;

    let payload = vec![0x5a; 64 * 1024];
    let mut streams = open(&ground.near, ground.far.at(PORT), connections)?;
    for stream in &mut streams {
        stream.write_all(&payload)?;
    }
    let peak: Vec<u64> = ground
        .agents
        .iter()
        .map(|agent| agent.process().resident_kib())
        .collect::<Result<_>>()?;
    let mut back = vec![0; payload.len()];
    for (number, stream) in streams.iter_mut().enumerate() {
        stream
            .read_exact(&mut back)
            .with_context(|| format!("connection {number}"))?;
        ensure!(back == payload, "connection {number} got something else");
    }
    drop(streams);
    let begun = Instant::now();
    for ((agent, idle), peak) in ground.agents.iter().zip(idle).zip(peak) {
        let name = agent.node().name().to_owned();
        let now = wait::for_value(
            &format!("the agent of {name} gives memory back"),
            Duration::from_secs(30).saturating_sub(begun.elapsed()),
            || {
                let resident = agent.process().resident_kib()?;
                ensure!(
                    resident * 10 <= idle * 13,
                    "{resident} KiB are resident; idle it was {idle}, in the burst {peak}"
                );
                Ok(Some(resident))
            },
        )?;
        eprintln!(
            "{connections} connections: {name} idle {idle} KiB, in the burst {peak}, {now} after \
             {:?}",
            begun.elapsed()
        );
    }
    Ok(())
}

/// What the agents hold when nothing happens.
fn settled(ground: &Ground) -> Result<Vec<u64>> {
    let idle = |agent: &Agent| {
        wait::for_value("connections have ended", PATIENCE, || {
            let open = agent.metrics()?.sum("picomesh_connections", &[]);
            Ok((open == 0.0).then_some(()))
        })
    };
    ground.agents.iter().try_for_each(idle)?;
    thread::sleep(Duration::from_secs(3));
    ground
        .agents
        .iter()
        .map(|agent| agent.process().resident_kib())
        .collect()
}

/// Writes until nothing is taken for a while; how much was.
fn stuff(stream: &mut TcpStream) -> Result<u64> {
    const QUIET: Duration = Duration::from_millis(30);
    let chunk = vec![7; 64 * 1024];
    stream.set_nonblocking(true)?;
    let mut taken = 0;
    let mut last = Instant::now();
    while last.elapsed() < QUIET {
        match stream.write(&chunk) {
            Ok(n) => {
                taken += n as u64;
                last = Instant::now();
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock => {
                thread::sleep(Duration::from_millis(2));
            }
            Err(e) => return Err(e.into()),
        }
        ensure!(taken < 64 << 20, "{taken} bytes that nobody reads");
    }
    Ok(taken)
}

/// A server that accepts and reads only when it is told to.
struct LateReader {
    port: u16,
    go: mpsc::Sender<()>,
    thread: thread::JoinHandle<Result<u64>>,
}

impl LateReader {
    fn start(pod: &Pod) -> Result<Self> {
        let at = SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0));
        let listener = pod.run(|| TcpListener::bind(at))?;
        let port = listener.local_addr()?.port();
        listener.set_nonblocking(true)?;
        let (go, told) = mpsc::channel();
        let thread = thread::spawn(move || {
            let mut held = Vec::new();
            loop {
                match listener.accept() {
                    Ok((stream, _)) => held.push(stream),
                    Err(e) if e.kind() == ErrorKind::WouldBlock => {
                        if told.recv_timeout(Duration::from_millis(5)).is_ok() {
                            break;
                        }
                    }
                    Err(e) => return Err(e.into()),
                }
            }
            let mut read = 0;
            let mut buffer = vec![0; 64 * 1024];
            for mut stream in held {
                stream.set_nonblocking(false)?;
                stream.set_read_timeout(Some(2 * PATIENCE))?;
                loop {
                    match stream.read(&mut buffer)? {
                        0 => break,
                        n => read += n as u64,
                    }
                }
            }
            Ok(read)
        });
        Ok(Self { port, go, thread })
    }

    fn read_all(self) -> Result<u64> {
        self.go.send(())?;
        self.thread
            .join()
            .map_err(|_| anyhow!("the reader panicked"))?
    }
}

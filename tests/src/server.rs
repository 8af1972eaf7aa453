//! Servers of our own, each with one habit that real programs show rarely and on their own time.
//! They run on threads of this process inside a pod, one thread per connection.

use std::{
    io::{self, Read, Write},
    net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use socket2::{Domain, Protocol, Socket, Type};

use crate::{Netns, client, requirements};

/// What a server does with a connection.
#[derive(Clone, Debug)]
pub enum Habit {
    /// Sends back what comes, and closes when the client has.
    Echo,
    /// One line: the client's address as the server sees it, then closes.
    WhoAmI,
    /// Answers `pong` to the first bytes and closes first.
    PongAndClose,
    /// Reads to the client's FIN, waits, and only then sends this many bytes.
    AnswerAfterFin { wait: Duration, bytes: usize },
    /// Sends this many bytes and its FIN at once; then reads to the end, after a wait.
    FinThenRead { bytes: usize, wait: Duration },
    /// Says this before the client says anything, then echoes.
    SpeaksFirst(&'static str),
    /// Upgrades the standard's example handshake to WebSocket, then sends every frame back
    /// unmasked.
    WebSocket,
    /// Accepts and never reads.
    ReadsNothing,
    /// Reads a first byte and answers with RST.
    Resets,
    /// Reads everything and counts.
    Sink,
    /// Sends without end.
    Source,
}

/// How long a closed listener may hold on to its port.
const LINGERS: Duration = Duration::from_secs(5);

/// A running server. Dropping it closes the listener and everything accepted.
#[derive(Debug)]
pub struct Server {
    port: u16,
    stop: Arc<AtomicBool>,
    seen: Arc<Seen>,
    thread: Option<thread::JoinHandle<()>>,
}

/// What happened at a server so far.
#[derive(Debug, Default)]
pub struct Seen {
    pub accepted: AtomicU64,
    pub bytes: AtomicU64,
    /// Connections that a RST ended.
    pub resets: AtomicU64,
    /// Connections that a FIN ended.
    pub fins: AtomicU64,
}

impl Server {
    /// Listens on `port` of both families (0: one of the kernel's choice) in `netns`.
    pub fn start(netns: &Netns, port: u16, habit: Habit) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::new(Seen::default());
        let (ready, listening) = mpsc::sync_channel(1);
        let (stopped, counted) = (stop.clone(), seen.clone());
        let thread = netns.spawn(&format!("server-{port}"), move || {
            let listener = match listen_in_time(port) {
                Ok(listener) => listener,
                Err(e) => {
                    let _ = ready.send(Err(e));
                    return;
                }
            };
            let _ = ready.send(listener.local_addr().map(|a| a.port()));
            serve(&listener, &habit, &stopped, &counted);
        })?;
        let port = listening
            .recv()
            .context("the server's thread is gone")?
            .with_context(|| format!("listen on port {port} in {}", netns.name()))?;
        Ok(Self {
            port,
            stop,
            seen,
            thread: Some(thread),
        })
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn accepted(&self) -> u64 {
        self.seen.accepted.load(Ordering::Relaxed)
    }

    pub fn bytes(&self) -> u64 {
        self.seen.bytes.load(Ordering::Relaxed)
    }

    pub fn resets(&self) -> u64 {
        self.seen.resets.load(Ordering::Relaxed)
    }

    pub fn fins(&self) -> u64 {
        self.seen.fins.load(Ordering::Relaxed)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // The port is free for the next server when this returns.
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A closed listener lives on for a moment if another thread was between fork and exec when it was
/// closed: the port of the server before this one may be taken until that exec.
fn listen_in_time(port: u16) -> io::Result<TcpListener> {
    let started = Instant::now();
    loop {
        match listen(port) {
            Err(e) if e.kind() == io::ErrorKind::AddrInUse && started.elapsed() < LINGERS => {
                thread::sleep(Duration::from_millis(5));
            }
            done => return done,
        }
    }
}

/// On all addresses of both families, or of the one that the kernel has.
fn listen(port: u16) -> io::Result<TcpListener> {
    let any: SocketAddr = if requirements::ipv6() {
        (Ipv6Addr::UNSPECIFIED, port).into()
    } else {
        (Ipv4Addr::UNSPECIFIED, port).into()
    };
    let socket = Socket::new(Domain::for_address(any), Type::STREAM, Some(Protocol::TCP))?;
    if any.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.set_reuse_address(true)?;
    socket.bind(&any.into())?;
    socket.listen(4096)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

fn serve(listener: &TcpListener, habit: &Habit, stop: &Arc<AtomicBool>, seen: &Arc<Seen>) {
    while !stop.load(Ordering::Relaxed) {
        match listener.accept() {
            Ok((stream, _)) => {
                seen.accepted.fetch_add(1, Ordering::Relaxed);
                let (habit, stop, seen) = (habit.clone(), stop.clone(), seen.clone());
                // Failing to start a thread closes the connection: the client sees it.
                let _ = thread::Builder::new()
                    .stack_size(256 * 1024)
                    .spawn(move || talk(stream, &habit, &stop, &seen));
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                thread::sleep(Duration::from_micros(200));
            }
            Err(_) => thread::sleep(Duration::from_millis(1)),
        }
    }
}

fn talk(mut stream: TcpStream, habit: &Habit, stop: &AtomicBool, seen: &Seen) {
    let done = converse(&mut stream, habit, stop, seen);
    match done {
        Err(e) if e.kind() == io::ErrorKind::ConnectionReset => {
            seen.resets.fetch_add(1, Ordering::Relaxed);
        }
        Ok(()) | Err(_) => {}
    }
}

fn converse(
    stream: &mut TcpStream,
    habit: &Habit,
    stop: &AtomicBool,
    seen: &Seen,
) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_nodelay(true)?;
    // Short, so that a stopped server lets go.
    stream.set_read_timeout(Some(Duration::from_millis(100)))?;
    match habit {
        Habit::Echo => echo(stream, stop, seen),
        Habit::WhoAmI => {
            let peer = stream.peer_addr()?;
            let ip = match peer.ip() {
                std::net::IpAddr::V6(ip) => ip.to_canonical(),
                std::net::IpAddr::V4(ip) => ip.into(),
            };
            stream.write_all(format!("{ip}\n").as_bytes())?;
            stream.shutdown(Shutdown::Write)?;
            drain(stream, stop, seen)
        }
        Habit::PongAndClose => {
            let mut first = [0; 64];
            if read(stream, &mut first, stop)? > 0 {
                stream.write_all(b"pong")?;
            }
            Ok(())
        }
        Habit::AnswerAfterFin { wait, bytes } => {
            drain(stream, stop, seen)?;
            thread::sleep(*wait);
            send(stream, *bytes)?;
            stream.shutdown(Shutdown::Write)
        }
        Habit::FinThenRead { bytes, wait } => {
            send(stream, *bytes)?;
            stream.shutdown(Shutdown::Write)?;
            thread::sleep(*wait);
            drain(stream, stop, seen)
        }
        Habit::SpeaksFirst(greeting) => {
            stream.write_all(greeting.as_bytes())?;
            echo(stream, stop, seen)
        }
        Habit::WebSocket => web_socket(stream, stop),
        Habit::ReadsNothing => {
            while !stop.load(Ordering::Relaxed) {
                thread::sleep(Duration::from_millis(50));
            }
            Ok(())
        }
        Habit::Resets => {
            let mut first = [0; 1];
            read(stream, &mut first, stop)?;
            client::reset(stream.try_clone()?)
        }
        Habit::Sink => drain(stream, stop, seen),
        Habit::Source => {
            let chunk = vec![0x5a; 64 * 1024];
            while !stop.load(Ordering::Relaxed) {
                stream.write_all(&chunk)?;
                seen.bytes.fetch_add(chunk.len() as u64, Ordering::Relaxed);
            }
            Ok(())
        }
    }
}

fn echo(stream: &mut TcpStream, stop: &AtomicBool, seen: &Seen) -> io::Result<()> {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let n = read(stream, &mut buffer, stop)?;
        if n == 0 {
            seen.fins.fetch_add(1, Ordering::Relaxed);
            return stream.shutdown(Shutdown::Write);
        }
        seen.bytes.fetch_add(n as u64, Ordering::Relaxed);
        stream.write_all(&buffer[..n])?;
    }
}

/// Enough of the protocol for short frames with the mask zero.
fn web_socket(stream: &mut TcpStream, stop: &AtomicBool) -> io::Result<()> {
    client::read_until(stream, b"\r\n\r\n")?;
    stream.write_all(
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
          Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n",
    )?;
    let mut buffer = [0; 256];
    let mut have = 0;
    loop {
        let n = read(stream, &mut buffer[have..], stop)?;
        if n == 0 {
            return Ok(());
        }
        have += n;
        // Two bytes of header, four of mask, and what the header says.
        while have >= 6 && have >= 6 + usize::from(buffer[1] & 0x7f) {
            let length = usize::from(buffer[1] & 0x7f);
            stream.write_all(&[buffer[0], length as u8])?;
            stream.write_all(&buffer[6..6 + length])?;
            buffer.copy_within(6 + length..have, 0);
            have -= 6 + length;
        }
    }
}

fn drain(stream: &mut TcpStream, stop: &AtomicBool, seen: &Seen) -> io::Result<()> {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let n = read(stream, &mut buffer, stop)?;
        if n == 0 {
            seen.fins.fetch_add(1, Ordering::Relaxed);
            return Ok(());
        }
        seen.bytes.fetch_add(n as u64, Ordering::Relaxed);
    }
}

fn send(stream: &mut TcpStream, mut bytes: usize) -> io::Result<()> {
    let chunk = vec![0x5a; 64 * 1024];
    while bytes > 0 {
        let n = bytes.min(chunk.len());
        stream.write_all(&chunk[..n])?;
        bytes -= n;
    }
    Ok(())
}

/// A read that looks up now and then whether the server was stopped.
fn read(stream: &mut TcpStream, buffer: &mut [u8], stop: &AtomicBool) -> io::Result<usize> {
    loop {
        match stream.read(buffer) {
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::WouldBlock
                        | io::ErrorKind::TimedOut
                        | io::ErrorKind::Interrupted
                ) =>
            {
                if stop.load(Ordering::Relaxed) {
                    return Err(io::Error::other("the server was stopped"));
                }
            }
            done => return done,
        }
    }
}

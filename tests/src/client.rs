//! Clients of our own, for what no program does on demand: plain requests with a deadline,
//! half-close, reset, a fixed source port. All of them act in the calling thread's namespace:
//! call them inside [`crate::Netns::run`].

use std::{
    io::{self, Read, Write},
    net::{IpAddr, Shutdown, SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::wait::patience;

/// Connects; reads and writes fail after `deadline` too.
pub fn connect(to: SocketAddr, deadline: Duration) -> io::Result<TcpStream> {
    let deadline = patience(deadline);
    let stream = TcpStream::connect_timeout(&to, deadline)?;
    stream.set_read_timeout(Some(deadline))?;
    stream.set_write_timeout(Some(deadline))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Connects from a port of the caller's choice (SO_REUSEADDR).
pub fn connect_from(from: SocketAddr, to: SocketAddr, deadline: Duration) -> io::Result<TcpStream> {
    let deadline = patience(deadline);
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.bind(&from.into())?;
    socket.connect_timeout(&SockAddr::from(to), deadline)?;
    socket.set_read_timeout(Some(deadline))?;
    socket.set_write_timeout(Some(deadline))?;
    socket.set_tcp_nodelay(true)?;
    Ok(socket.into())
}

/// Sends `request`, says that it is all, and reads to the end.
pub fn exchange(to: SocketAddr, request: &[u8], deadline: Duration) -> io::Result<Vec<u8>> {
    let mut stream = connect(to, deadline)?;
    stream.write_all(request)?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    Ok(answer)
}

/// Sends `bytes` and reads as many back.
pub fn ping(stream: &mut TcpStream, bytes: &[u8]) -> io::Result<()> {
    stream.write_all(bytes)?;
    let mut back = vec![0; bytes.len()];
    stream.read_exact(&mut back)?;
    if back == bytes {
        Ok(())
    } else {
        Err(io::Error::other("the echo differs from what was sent"))
    }
}

/// Reads byte by byte up to and including `end`.
pub fn read_until(stream: &mut TcpStream, end: &[u8]) -> io::Result<String> {
    let mut text = Vec::new();
    let mut byte = [0];
    while !text.ends_with(end) {
        stream.read_exact(&mut byte)?;
        text.push(byte[0]);
        if text.len() > 64 * 1024 {
            return Err(io::Error::other("64 KiB without the end looked for"));
        }
    }
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// How a connection ended for a reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// A FIN, after `read` bytes.
    Closed { read: usize },
    /// A RST.
    Reset { read: usize },
    /// Neither came in time.
    Silent { read: usize },
}

/// Reads until the connection ends or `deadline` has passed without a byte.
pub fn read_to_end(stream: &mut TcpStream, deadline: Duration) -> io::Result<End> {
    stream.set_read_timeout(Some(patience(deadline)))?;
    let mut buffer = vec![0; 64 * 1024];
    let mut read = 0;
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return Ok(End::Closed { read }),
            Ok(n) => read += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return Ok(End::Reset { read }),
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
                ) =>
            {
                return Ok(End::Silent { read });
            }
            Err(e) => return Err(e),
        }
    }
}

/// Closes with a RST instead of a FIN.
pub fn reset(stream: TcpStream) -> io::Result<()> {
    Socket::from(stream).set_linger(Some(Duration::ZERO))
}

/// `GET path` over HTTP/1.1, one connection; returns status and body.
pub fn http_get(to: SocketAddr, path: &str, deadline: Duration) -> Result<(u16, String)> {
    let request = format!("GET {path} HTTP/1.1\r\nHost: {to}\r\nConnection: close\r\n\r\n");
    let mut stream = connect(to, deadline).with_context(|| format!("connect to {to}"))?;
    stream.write_all(request.as_bytes())?;
    let mut answer = Vec::new();
    stream
        .read_to_end(&mut answer)
        .with_context(|| format!("read the answer of {to}{path}"))?;
    let text = String::from_utf8_lossy(&answer).into_owned();
    let (head, body) = text
        .split_once("\r\n\r\n")
        .with_context(|| format!("{to}{path} did not answer in HTTP: {text:?}"))?;
    let status = head
        .split_whitespace()
        .nth(1)
        .and_then(|s| s.parse().ok())
        .with_context(|| format!("{to}{path} answered without a status: {head:?}"))?;
    let body = if head
        .to_ascii_lowercase()
        .contains("transfer-encoding: chunked")
    {
        unchunk(body)
    } else {
        body.to_owned()
    };
    Ok((status, body))
}

/// What repeated connections from few source ports saw.
#[derive(Clone, Debug, Default)]
pub struct Reuse {
    pub rounds: u32,
    pub failed: u32,
    pub first_error: Option<String>,
    pub longest: Duration,
    pub over_200_ms: u32,
}

/// Dials `to` again and again from the same few source ports, as a client behind a small port
/// range does. The server must close first, so that TIME_WAIT lies on its side.
pub fn reuse_source_ports(
    from: IpAddr,
    ports: std::ops::Range<u16>,
    to: SocketAddr,
    rounds: u32,
) -> Result<Reuse> {
    ensure!(!ports.is_empty(), "at least one source port is needed");
    let mut result = Reuse {
        rounds,
        ..Reuse::default()
    };
    for port in ports.cycle().take(rounds as usize) {
        let start = Instant::now();
        let once = || -> io::Result<()> {
            let mut stream = loop {
                match connect_from((from, port).into(), to, Duration::from_secs(5)) {
                    // Our own last connection from this port waits for its last ACK.
                    Err(e)
                        if matches!(
                            e.kind(),
                            io::ErrorKind::AddrInUse | io::ErrorKind::AddrNotAvailable
                        ) && start.elapsed() < Duration::from_secs(5) =>
                    {
                        std::thread::sleep(Duration::from_millis(1));
                    }
                    done => break done?,
                }
            };
            stream.write_all(b"ping")?;
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer)?;
            if answer == b"pong" {
                Ok(())
            } else {
                Err(io::Error::other("wrong answer"))
            }
        };
        if let Err(e) = once() {
            result.failed += 1;
            result.first_error.get_or_insert(e.to_string());
        }
        let took = start.elapsed();
        result.longest = result.longest.max(took);
        if took > Duration::from_millis(200) {
            result.over_200_ms += 1;
        }
    }
    Ok(result)
}

fn unchunk(mut body: &str) -> String {
    let mut whole = String::new();
    while let Some((size, rest)) = body.split_once("\r\n") {
        let Ok(size) = usize::from_str_radix(size.trim(), 16) else {
            break;
        };
        let Some(chunk) = rest.get(..size).filter(|_| size > 0) else {
            break;
        };
        whole.push_str(chunk);
        body = rest.get(size + 2..).unwrap_or_default();
    }
    whole
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_joined() {
        assert_eq!(unchunk("4\r\nwiki\r\n5\r\npedia\r\n0\r\n\r\n"), "wikipedia");
    }
}

//! Connections that ask once and go.

use std::{
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpStream},
    time::Instant,
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    errno::Errno,
    sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags},
};
use socket2::{Domain, Protocol, Socket, Type};

use super::{Clock, Outcome, PATIENCE, TICK_MS, Window};
use crate::bench::usage::Meter;

/// The server closes, so that its side keeps the TIME_WAIT and the client does not run out of
/// ports at tens of thousands of connections a second.
const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n";
const GOOD: &[u8] = b"HTTP/1.1 200 ";

/// Opens, asks once, reads to the end, closes, `at_once` at a time, as fast as it goes, from the
/// calling thread's network namespace.
pub(crate) fn churn(
    target: SocketAddr,
    at_once: usize,
    window: Window,
    meter: &Meter,
) -> Result<Outcome> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let mut clock = Clock::start(window, meter);
    let mut slots: Vec<Slot> = (0..at_once)
        .map(|i| Slot::dial(target, &epoll, i))
        .collect::<Result<_>>()?;
    let mut buffer = vec![0; 16 * 1024];
    let mut latencies = Vec::new();
    let (mut done, mut failed) = (0, 0);
    let mut looked = Instant::now();

    let mut events = [EpollEvent::empty(); 128];
    while clock.goes_on(Instant::now())? {
        let ready = match epoll.wait(&mut events, TICK_MS) {
            Ok(ready) => ready,
            Err(Errno::EINTR) => continue,
            Err(e) => bail!("epoll_wait: {e}"),
        };
        for event in &events[..ready] {
            let i = event.data() as usize;
            match slots[i].step(&epoll, i, &mut buffer) {
                Step::Waiting => continue,
                Step::Done if clock.counts() => {
                    done += 1;
                    latencies.push(slots[i].since.elapsed().as_nanos() as u64);
                }
                Step::Done => {}
                Step::Failed => failed += 1,
            }
            slots[i] = Slot::dial(target, &epoll, i)?;
        }
        if looked.elapsed().as_secs() >= 1 {
            looked = Instant::now();
            for (i, slot) in slots.iter_mut().enumerate() {
                if slot.since.elapsed() > PATIENCE {
                    failed += 1;
                    *slot = Slot::dial(target, &epoll, i)?;
                }
            }
            ensure!(
                done > 0 || failed < 1_000,
                "{failed} connections to {target} failed and none came through"
            );
        }
    }
    let (elapsed, spent) = clock.stop()?;
    Ok(Outcome {
        done,
        failed,
        elapsed,
        latencies,
        spent,
    })
}

/// One of the connections that are under way at any time.
struct Slot {
    stream: TcpStream,
    since: Instant,
    asked: bool,
    answered: bool,
}

enum Step {
    Waiting,
    Done,
    Failed,
}

impl Slot {
    fn dial(target: SocketAddr, epoll: &Epoll, i: usize) -> Result<Self> {
        let kind = Type::STREAM.nonblocking().cloexec();
        let socket = Socket::new(Domain::for_address(target), kind, Some(Protocol::TCP))
            .context("make a socket")?;
        socket.set_tcp_nodelay(true)?;
        let since = Instant::now();
        match socket.connect(&target.into()) {
            Ok(()) => {}
            Err(e) if e.raw_os_error() == Some(Errno::EINPROGRESS as i32) => {}
            Err(e) => return Err(e).with_context(|| format!("connect to {target}")),
        }
        let stream = TcpStream::from(socket);
        epoll.add(&stream, EpollEvent::new(EpollFlags::EPOLLOUT, i as u64))?;
        Ok(Self {
            stream,
            since,
            asked: false,
            answered: false,
        })
    }

    fn step(&mut self, epoll: &Epoll, i: usize, buffer: &mut [u8]) -> Step {
        if !self.asked {
            // Writing tells a refused connection as well as SO_ERROR does.
            if !matches!(self.stream.write(REQUEST), Ok(n) if n == REQUEST.len()) {
                return Step::Failed;
            }
            self.asked = true;
            let mut event = EpollEvent::new(EpollFlags::EPOLLIN, i as u64);
            return match epoll.modify(&self.stream, &mut event) {
                Ok(()) => Step::Waiting,
                Err(_) => Step::Failed,
            };
        }
        loop {
            match self.stream.read(buffer) {
                Ok(0) if self.answered => return Step::Done,
                Ok(0) => return Step::Failed,
                Ok(n) if self.answered || buffer[..n].starts_with(GOOD) => self.answered = true,
                Ok(_) => return Step::Failed,
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Step::Waiting,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(_) => return Step::Failed,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{net::TcpListener, thread, time::Duration};

    use super::*;

    const SHORT: Window = Window {
        warm: Duration::from_millis(20),
        measure: Duration::from_millis(200),
    };

    /// A server that reads once, answers with `answer` and closes.
    fn server(answer: &'static [u8]) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut request = [0; 1024];
                let _ = stream.read(&mut request);
                let _ = stream.write_all(answer);
            }
        });
        address
    }

    #[test]
    fn every_connection_that_is_answered_counts() {
        let target = server(b"HTTP/1.1 200 OK\r\n\r\n");
        let outcome = churn(target, 4, SHORT, &Meter::default()).unwrap();
        assert_eq!(outcome.failed, 0);
        assert!(outcome.done > 50, "{} connections", outcome.done);
    }

    #[test]
    fn an_empty_answer_is_a_failure() {
        let outcome = churn(server(b""), 1, SHORT, &Meter::default()).unwrap();
        assert_eq!(outcome.done, 0);
        assert!(outcome.failed > 0);
    }

    #[test]
    fn an_error_for_an_answer_is_a_failure() {
        let target = server(b"HTTP/1.1 502 Bad Gateway\r\n\r\n");
        let outcome = churn(target, 1, SHORT, &Meter::default()).unwrap();
        assert_eq!(outcome.done, 0);
        assert!(outcome.failed > 0);
    }
}

//! Requests on connections that stay open.

use std::{
    collections::VecDeque,
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::{
    epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags},
    time::TimeSpec,
    timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags},
};

use super::{Clock, Outcome, PATIENCE, TICK_MS, Window};
use crate::bench::usage::Meter;

const TIMER: u64 = u64::MAX;
const BUFFER: usize = 64 * 1024;

/// Opens `count` connections from the calling thread's network namespace.
pub(crate) fn open(target: SocketAddr, count: usize) -> Result<Vec<TcpStream>> {
    (0..count)
        .map(|i| {
            let stream = TcpStream::connect_timeout(&target, PATIENCE)
                .with_context(|| format!("open connection {} of {count} to {target}", i + 1))?;
            stream.set_nodelay(true)?;
            stream.set_nonblocking(true)?;
            Ok(stream)
        })
        .collect()
}

/// Asks for `path` once on every connection, all at once, and waits for the answers.
pub(crate) fn once(streams: &[TcpStream], path: &str) -> Result<()> {
    let window = Window {
        warm: Duration::ZERO,
        measure: Duration::ZERO,
    };
    // A load that is over as soon as it began still waits for what it has sent.
    let outcome = requests(streams, path, None, window, &Meter::default())?;
    ensure!(
        outcome.failed == 0,
        "{} of {} connections broke or were not answered",
        outcome.failed,
        streams.len()
    );
    Ok(())
}

/// Asks for `path` on every connection, again and again: as soon as the answer is there, or, with
/// a `pace`, so many times a second in all on whichever connection is idle.
///
/// A paced request's latency counts from its sending; if every connection was busy when it was
/// due, from the moment it was due. So a contender that stalls is not spared the requests that
/// queued up meanwhile, and the timer's own lateness is not charged to it.
pub(crate) fn requests(
    streams: &[TcpStream],
    path: &str,
    pace: Option<u32>,
    window: Window,
    meter: &Meter,
) -> Result<Outcome> {
    let request = format!("GET {path} HTTP/1.1\r\nHost: bench\r\n\r\n").into_bytes();
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    for (i, stream) in streams.iter().enumerate() {
        epoll.add(stream, EpollEvent::new(EpollFlags::EPOLLIN, i as u64))?;
    }
    let timer = TimerFd::new(
        ClockId::CLOCK_MONOTONIC,
        TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC,
    )?;
    let interval = pace.map(|per_second| Duration::from_secs(1) / per_second);
    if let Some(interval) = interval {
        let every = Expiration::Interval(TimeSpec::from_duration(interval));
        timer.set(every, TimerSetTimeFlags::empty())?;
        epoll.add(&timer, EpollEvent::new(EpollFlags::EPOLLIN, TIMER))?;
    }

    let mut clock = Clock::start(window, meter);
    let mut client = Client {
        calls: streams.iter().map(Call::new).collect(),
        idle: (0..streams.len()).collect(),
        due: VecDeque::new(),
        request,
        buffer: vec![0; BUFFER],
        failed: 0,
    };
    let mut latencies = Vec::new();
    let mut done = 0;
    let mut next_due = Instant::now();
    if interval.is_none() {
        while let Some(i) = client.idle.pop_front() {
            client.send(i, next_due);
        }
    }

    let mut events = [EpollEvent::empty(); 128];
    while clock.goes_on(Instant::now())? {
        ensure!(
            client.calls.iter().any(|call| !call.broken),
            "all {} connections broke",
            streams.len()
        );
        let ready = match epoll.wait(&mut events, TICK_MS) {
            Ok(ready) => ready,
            Err(nix::errno::Errno::EINTR) => continue,
            Err(e) => bail!("epoll_wait: {e}"),
        };
        for event in &events[..ready] {
            if event.data() == TIMER {
                // Emptied for epoll's sake; what is due follows from the time alone.
                let _ = timer.wait();
                continue;
            }
            let i = event.data() as usize;
            let Some(latency) = client.receive(i) else {
                continue;
            };
            if clock.counts() {
                done += 1;
                latencies.push(latency.as_nanos() as u64);
            }
            match interval {
                None => client.send(i, Instant::now()),
                Some(_) => match client.due.pop_front() {
                    Some(due) => client.send(i, due),
                    None => client.idle.push_back(i),
                },
            }
        }
        if let Some(interval) = interval {
            let now = Instant::now();
            while next_due <= now {
                match client.idle.pop_front() {
                    Some(i) => client.send(i, Instant::now()),
                    None => client.due.push_back(next_due),
                }
                next_due += interval;
            }
        }
    }
    let (elapsed, spent) = clock.stop()?;
    client.finish();
    Ok(Outcome {
        done,
        failed: client.failed,
        elapsed,
        latencies,
        spent,
    })
}

struct Client<'a> {
    calls: Vec<Call<'a>>,
    /// Connections that wait for a paced request, the longest idle first.
    idle: VecDeque<usize>,
    /// Paced requests that found no idle connection.
    due: VecDeque<Instant>,
    request: Vec<u8>,
    buffer: Vec<u8>,
    failed: u64,
}

/// One connection and the request that is under way on it.
struct Call<'a> {
    stream: &'a TcpStream,
    since: Instant,
    /// Bytes of the answer that are still to come; 0 when nothing is under way.
    left: usize,
    /// Length of a whole answer, learnt from the first one: all answers to a path are equal.
    length: Option<usize>,
    waiting: bool,
    broken: bool,
}

impl<'a> Call<'a> {
    fn new(stream: &'a TcpStream) -> Self {
        Self {
            stream,
            since: Instant::now(),
            left: 0,
            length: None,
            waiting: false,
            broken: false,
        }
    }
}

impl Client<'_> {
    fn send(&mut self, i: usize, since: Instant) {
        let call = &mut self.calls[i];
        call.since = since;
        call.left = call.length.unwrap_or(0);
        call.waiting = true;
        let mut stream = call.stream;
        match stream.write(&self.request) {
            Ok(n) if n == self.request.len() => {}
            Ok(_) | Err(_) => self.fail(i),
        }
    }

    /// Reads once; the latency if that was the answer's end.
    fn receive(&mut self, i: usize) -> Option<Duration> {
        let call = &mut self.calls[i];
        if call.broken {
            return None;
        }
        let mut stream = call.stream;
        let n = match stream.read(&mut self.buffer) {
            Ok(0) => {
                self.fail(i);
                return None;
            }
            Ok(n) => n,
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                return None;
            }
            Err(_) => {
                self.fail(i);
                return None;
            }
        };
        if call.length.is_none() {
            let Some(length) = answer_length(&self.buffer[..n]) else {
                self.fail(i);
                return None;
            };
            call.length = Some(length);
            call.left = length;
        }
        if !call.waiting || n > call.left {
            self.fail(i);
            return None;
        }
        call.left -= n;
        if call.left > 0 {
            return None;
        }
        call.waiting = false;
        Some(call.since.elapsed())
    }

    /// A broken connection stays broken: the sum of failures says that it happened.
    fn fail(&mut self, i: usize) {
        let call = &mut self.calls[i];
        if !call.broken {
            call.broken = true;
            self.failed += 1;
            // Its namespace may not be this thread's, so it is not opened again; shut down, it
            // wakes epoll no more than once.
            let _ = call.stream.shutdown(std::net::Shutdown::Both);
        }
    }

    /// Reads what is still under way, so that the next load finds the connections clean. Gives up
    /// when nothing has come to an end for a while, and not before: a thousand handshakes take
    /// their time on a small board.
    fn finish(&mut self) {
        let mut deadline = Instant::now() + PATIENCE;
        for i in 0..self.calls.len() {
            while self.calls[i].waiting && !self.calls[i].broken {
                let left = self.calls[i].left;
                if self.receive(i).is_some() || self.calls[i].left != left {
                    deadline = Instant::now() + PATIENCE;
                } else if Instant::now() > deadline {
                    self.fail(i);
                } else {
                    std::thread::sleep(Duration::from_micros(200));
                }
            }
        }
    }
}

/// Length of head and body of an answer of which the head is there; none if it is not a 200 or
/// says no length.
fn answer_length(bytes: &[u8]) -> Option<usize> {
    let end = bytes.windows(4).position(|w| w == b"\r\n\r\n")? + 4;
    let head = std::str::from_utf8(&bytes[..end]).ok()?;
    if !head.starts_with("HTTP/1.1 200 ") {
        return None;
    }
    let body: usize = head
        .lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
        .and_then(|(_, value)| value.trim().parse().ok())?;
    Some(end + body)
}

#[cfg(test)]
mod tests {
    use std::{io::BufRead, io::BufReader, net::TcpListener, thread};

    use super::*;

    #[test]
    fn an_answer_is_as_long_as_its_head_says() {
        let head = "HTTP/1.1 200 OK\r\ncontent-LENGTH: 5\r\n\r\n";
        assert_eq!(answer_length(head.as_bytes()), Some(head.len() + 5));
        assert_eq!(answer_length(b"HTTP/1.1 200 OK\r\n\r\n"), None);
        assert_eq!(
            answer_length(b"HTTP/1.1 503 No\r\nContent-Length: 5\r\n\r\n"),
            None
        );
        assert_eq!(answer_length(b"HTTP/1.1 200 OK\r\nContent-Le"), None);
    }

    /// A server that answers `answers` times on each connection, then closes it.
    fn server(answers: usize) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let stream = stream.unwrap();
                thread::spawn(move || {
                    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
                    let mut stream = stream;
                    for _ in 0..answers {
                        while lines.next().is_some_and(|l| !l.unwrap().is_empty()) {}
                        let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
                        if stream.write_all(answer).is_err() {
                            return;
                        }
                    }
                });
            }
        });
        address
    }

    const SHORT: Window = Window {
        warm: Duration::from_millis(50),
        measure: Duration::from_millis(400),
    };

    #[test]
    fn a_paced_load_asks_as_often_as_told() {
        let streams = open(server(usize::MAX), 4).unwrap();
        let outcome = requests(&streams, "/", Some(500), SHORT, &Meter::default()).unwrap();
        assert_eq!(outcome.failed, 0);
        assert!(
            (150..=220).contains(&outcome.done),
            "{} answers in 0.4 s at 500 a second",
            outcome.done
        );
        assert_eq!(outcome.latencies.len() as u64, outcome.done);
    }

    #[test]
    fn connections_can_be_loaded_again_after_a_load() {
        let streams = open(server(usize::MAX), 2).unwrap();
        for _ in 0..2 {
            let outcome = requests(&streams, "/", None, SHORT, &Meter::default()).unwrap();
            assert_eq!(outcome.failed, 0);
            assert!(outcome.done > 100, "{} answers", outcome.done);
        }
    }

    #[test]
    fn every_connection_is_asked_once() {
        // A second request on any of them would go without an answer.
        once(&open(server(1), 20).unwrap(), "/").unwrap();
    }

    #[test]
    fn a_connection_that_is_not_answered_once_is_an_error() {
        let error = once(&open(server(0), 2).unwrap(), "/").unwrap_err();
        assert!(error.to_string().starts_with("2 of 2 connections broke"));
    }

    #[test]
    fn a_server_that_hangs_up_is_a_failure() {
        let streams = open(server(3), 2).unwrap();
        let error = requests(&streams, "/", None, SHORT, &Meter::default()).unwrap_err();
        assert!(error.to_string().contains("all 2 connections broke"));
    }
}

//! One connection's conversation, as its client and as its server: who sends how much when, every
//! byte checked by the end that receives it.
//!
//! The client opens with a header that tells the server the whole script, so the server needs to
//! know nothing and both ends know what each direction's stream must be. Either end tells [`How`]
//! it ended. It knows sockets, and neither pods nor disturbances.

use std::{
    io::{self, ErrorKind, Read, Write},
    net::{Shutdown, TcpStream},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use super::stream::Stream;

/// How long either end waits for bytes that the script says will come.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

const MAGIC: u64 = 0x7069_636f_736f_616b;
const HEADER: usize = 40;
const CHUNK: usize = 64 * 1024;
/// A stopped server notices so soon.
const LOOK_UP: Duration = Duration::from_millis(200);

/// What a connection is for, and so in which order bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// `up` bytes, then `down` bytes back, again and again; the client ends it.
    Rounds,
    /// Both directions at once, each with its FIN when it is through.
    Together,
    /// The server answers some time after the client's FIN.
    AfterFin,
    /// The server sends and FINs; the client answers some time after that.
    ServerFirst,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Script {
    pub(crate) connection: u64,
    pub(crate) order: Order,
    /// Only for [`Order::Rounds`].
    pub(crate) rounds: u32,
    /// Bytes from the client and to the client; of a round, where there are rounds.
    pub(crate) up: u32,
    pub(crate) down: u32,
    /// Between rounds, before an answer, or after each chunk of bulk.
    pub(crate) pause: Duration,
}

/// What one end saw of a connection.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) sent: u64,
    pub(crate) received: u64,
    /// What should have been received by the end; less than the script's when it was cut short.
    pub(crate) expected: u64,
    pub(crate) how: How,
}

/// How it ended for one end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum How {
    /// As the script says.
    Whole,
    /// Another byte than was sent, at this place of the stream.
    Wrong {
        at: u64,
    },
    /// A FIN before everything had come: bytes are lost and nobody was told.
    Short,
    /// More than was sent.
    Extra,
    /// It never stood.
    NotConnected(String),
    Reset,
    /// Nothing came or nothing went for [`PATIENCE`].
    Silent,
    /// The server was stopped.
    Stopped,
    Other(String),
}

impl Script {
    /// Everything the client sends after the header, if it goes to its end.
    const fn whole_up(&self) -> u64 {
        self.up as u64 * self.repeated()
    }

    const fn whole_down(&self) -> u64 {
        self.down as u64 * self.repeated()
    }

    const fn repeated(&self) -> u64 {
        match self.order {
            Order::Rounds => self.rounds as u64,
            Order::Together | Order::AfterFin | Order::ServerFirst => 1,
        }
    }

    pub(crate) fn header(&self) -> [u8; HEADER] {
        let mut header = [0; HEADER];
        let order = match self.order {
            Order::Rounds => 0_u32,
            Order::Together => 1,
            Order::AfterFin => 2,
            Order::ServerFirst => 3,
        };
        let words = [
            order,
            self.rounds,
            self.up,
            self.down,
            self.pause.as_millis() as u32,
        ];
        header[..8].copy_from_slice(&MAGIC.to_le_bytes());
        header[8..16].copy_from_slice(&self.connection.to_le_bytes());
        for (to, word) in header[16..].chunks_exact_mut(4).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        header
    }

    fn parse(header: &[u8; HEADER]) -> Option<Self> {
        let long = |at: usize| -> Option<u64> {
            Some(u64::from_le_bytes(header.get(at..at + 8)?.try_into().ok()?))
        };
        let short = |at: usize| -> Option<u32> {
            Some(u32::from_le_bytes(header.get(at..at + 4)?.try_into().ok()?))
        };
        (long(0)? == MAGIC).then_some(())?;
        Some(Self {
            connection: long(8)?,
            order: match short(16)? {
                0 => Order::Rounds,
                1 => Order::Together,
                2 => Order::AfterFin,
                3 => Order::ServerFirst,
                _ => return None,
            },
            rounds: short(20)?,
            up: short(24)?,
            down: short(28)?,
            pause: Duration::from_millis(short(32)?.into()),
        })
    }
}

/// Talks as the client. With `stop` set, rounds end after the one that is under way.
pub(crate) fn client(mut stream: TcpStream, script: &Script, stop: &AtomicBool) -> Seen {
    let mut talk = Talk::new(script, true);
    let done = talk.client(&mut stream, script, stop);
    talk.seen(done)
}

/// Reads the header and talks as the server. `None` if no header came: nobody's connection.
pub(crate) fn server(mut stream: TcpStream, stop: &AtomicBool) -> Option<(u64, Seen)> {
    stream.set_nodelay(true).ok()?;
    stream.set_read_timeout(Some(LOOK_UP)).ok()?;
    stream.set_write_timeout(Some(PATIENCE)).ok()?;
    let mut header = [0; HEADER];
    let mut have = 0;
    while have < HEADER {
        have += match read(&mut stream, header.get_mut(have..)?, Some(stop)) {
            Ok(0) | Err(_) => return None,
            Ok(n) => n,
        };
    }
    let script = Script::parse(&header)?;
    let mut talk = Talk::new(&script, false);
    let done = talk.server(&mut stream, &script, stop);
    if done.is_err() {
        // Like an application that dies: what is in flight must not look like an end.
        let _ = socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO));
    }
    Some((script.connection, talk.seen(done)))
}

/// One end's place in both streams.
struct Talk {
    out: Stream,
    come: Stream,
    /// Bytes that must have come when the other end's FIN does.
    expected: u64,
    buffer: Vec<u8>,
}

impl Talk {
    fn new(script: &Script, client: bool) -> Self {
        Self {
            out: Stream::new(script.connection, client),
            come: Stream::new(script.connection, !client),
            expected: if client {
                script.whole_down()
            } else {
                script.whole_up()
            },
            buffer: vec![0; CHUNK.min(script.up.max(script.down).max(1) as usize)],
        }
    }

    fn seen(&self, done: Result<(), How>) -> Seen {
        Seen {
            sent: self.out.at(),
            received: self.come.at(),
            expected: self.expected,
            how: done.err().unwrap_or(How::Whole),
        }
    }

    fn client(
        &mut self,
        stream: &mut TcpStream,
        script: &Script,
        stop: &AtomicBool,
    ) -> Result<(), How> {
        stream.write_all(&script.header()).map_err(how)?;
        match script.order {
            Order::Rounds => {
                for round in 1..=script.rounds {
                    self.send(stream, script.up, Duration::ZERO)?;
                    self.receive(stream, script.down, None)?;
                    if stop.load(Ordering::Relaxed) || round == script.rounds {
                        break;
                    }
                    nap(script.pause, stop);
                }
                self.expected = self.come.at();
                stream.shutdown(Shutdown::Write).map_err(how)?;
                self.receive_fin(stream, None)
            }
            Order::Together => self.both(stream, script, None),
            Order::AfterFin => {
                self.send(stream, script.up, Duration::ZERO)?;
                stream.shutdown(Shutdown::Write).map_err(how)?;
                self.receive(stream, script.down, None)?;
                self.receive_fin(stream, None)
            }
            Order::ServerFirst => {
                self.receive(stream, script.down, None)?;
                self.receive_fin(stream, None)?;
                thread::sleep(script.pause);
                self.send(stream, script.up, Duration::ZERO)?;
                stream.shutdown(Shutdown::Write).map_err(how)
            }
        }
    }

    fn server(
        &mut self,
        stream: &mut TcpStream,
        script: &Script,
        stop: &AtomicBool,
    ) -> Result<(), How> {
        match script.order {
            Order::Rounds => {
                for _ in 0..script.rounds {
                    // A client may end it after any round, whose answer it has had.
                    if !self.more(stream, stop)? {
                        break;
                    }
                    self.receive(stream, script.up, Some(stop))?;
                    self.send(stream, script.down, Duration::ZERO)?;
                }
                self.expected = self.come.at();
                self.receive_fin(stream, Some(stop))?;
                stream.shutdown(Shutdown::Write).map_err(how)
            }
            Order::Together => self.both(stream, script, Some(stop)),
            Order::AfterFin => {
                self.receive(stream, script.up, Some(stop))?;
                self.receive_fin(stream, Some(stop))?;
                thread::sleep(script.pause);
                self.send(stream, script.down, Duration::ZERO)?;
                stream.shutdown(Shutdown::Write).map_err(how)
            }
            Order::ServerFirst => {
                self.send(stream, script.down, Duration::ZERO)?;
                stream.shutdown(Shutdown::Write).map_err(how)?;
                self.receive(stream, script.up, Some(stop))?;
                self.receive_fin(stream, Some(stop))
            }
        }
    }

    /// Sends on a thread of its own what this end has to send, and receives the rest meanwhile.
    fn both(
        &mut self,
        stream: &mut TcpStream,
        script: &Script,
        stop: Option<&AtomicBool>,
    ) -> Result<(), How> {
        let mut writer = stream.try_clone().map_err(how)?;
        let come = self.expected;
        let go = script.whole_up() + script.whole_down() - come;
        let mut out = Self {
            out: self.out.clone(),
            come: self.come.clone(),
            expected: 0,
            buffer: self.buffer.clone(),
        };
        let (sent, received) = thread::scope(|scope| {
            let sending = scope.spawn(|| {
                let sent = out.send(&mut writer, go as u32, script.pause);
                sent.and_then(|()| writer.shutdown(Shutdown::Write).map_err(how))
            });
            let received = self
                .receive(stream, come as u32, stop)
                .and_then(|()| self.receive_fin(stream, stop));
            if !matches!(received, Ok(()) | Err(How::Short)) {
                // The other direction would wait for a reader that is gone.
                let _ = stream.shutdown(Shutdown::Both);
            }
            let sent = sending.join();
            (
                sent.unwrap_or_else(|_| Err(How::Other("the sender panicked".into()))),
                received,
            )
        });
        self.out = out.out;
        match (received, sent) {
            // A RST is told once, to whichever of the two asks first; the other one sees an end.
            (Err(How::Short), Err(sending)) => Err(sending),
            (received, sent) => received.and(sent),
        }
    }

    fn send(&mut self, stream: &mut TcpStream, bytes: u32, pause: Duration) -> Result<(), How> {
        let mut left = bytes as usize;
        while left > 0 {
            let length = left.min(self.buffer.len());
            let piece = self.buffer.get_mut(..length).unwrap_or_default();
            self.out.fill(piece);
            stream.write_all(piece).map_err(how)?;
            left -= length;
            if !pause.is_zero() {
                thread::sleep(pause);
            }
        }
        Ok(())
    }

    fn receive(
        &mut self,
        stream: &mut TcpStream,
        bytes: u32,
        stop: Option<&AtomicBool>,
    ) -> Result<(), How> {
        let mut left = bytes as usize;
        while left > 0 {
            let length = left.min(self.buffer.len());
            let piece = self.buffer.get_mut(..length).unwrap_or_default();
            let n = read(stream, piece, stop)?;
            if n == 0 {
                return Err(How::Short);
            }
            let came = self.buffer.get(..n).unwrap_or_default();
            self.come
                .check(came)
                .map_err(|wrong| How::Wrong { at: wrong.at })?;
            left -= n;
        }
        Ok(())
    }

    fn receive_fin(
        &mut self,
        stream: &mut TcpStream,
        stop: Option<&AtomicBool>,
    ) -> Result<(), How> {
        match read(stream, &mut [0], stop)? {
            0 => Ok(()),
            _ => Err(How::Extra),
        }
    }

    /// Whether another round comes, instead of a FIN.
    fn more(&self, stream: &TcpStream, stop: &AtomicBool) -> Result<bool, How> {
        let started = Instant::now();
        // A client pauses between rounds, for up to a minute.
        while started.elapsed() < 3 * PATIENCE {
            match stream.peek(&mut [0]) {
                Ok(n) => return Ok(n > 0),
                Err(e) if is_nothing_yet(&e) => {
                    if stop.load(Ordering::Relaxed) {
                        return Err(How::Stopped);
                    }
                }
                Err(e) => return Err(how(e)),
            }
        }
        Err(How::Silent)
    }
}

/// A read that, at a server, looks up now and then whether it was stopped.
fn read(
    stream: &mut TcpStream,
    buffer: &mut [u8],
    stop: Option<&AtomicBool>,
) -> Result<usize, How> {
    let started = Instant::now();
    loop {
        match stream.read(buffer) {
            Ok(n) => return Ok(n),
            Err(e) if is_nothing_yet(&e) => {
                if stop.is_some_and(|stop| stop.load(Ordering::Relaxed)) {
                    return Err(How::Stopped);
                }
                if started.elapsed() >= PATIENCE {
                    return Err(How::Silent);
                }
            }
            Err(e) => return Err(how(e)),
        }
    }
}

fn nap(pause: Duration, stop: &AtomicBool) {
    let started = Instant::now();
    while started.elapsed() < pause && !stop.load(Ordering::Relaxed) {
        thread::sleep((pause - started.elapsed().min(pause)).min(LOOK_UP));
    }
}

fn is_nothing_yet(e: &io::Error) -> bool {
    matches!(
        e.kind(),
        ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
    ) && e.raw_os_error() != Some(nix::libc::ETIMEDOUT)
}

fn how(e: io::Error) -> How {
    match e.kind() {
        ErrorKind::ConnectionReset | ErrorKind::BrokenPipe | ErrorKind::NotConnected => How::Reset,
        _ if is_nothing_yet(&e) => How::Silent,
        _ => How::Other(e.to_string()),
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test")]

    use std::{net::TcpListener, sync::Arc};

    use super::*;

    fn script(order: Order) -> Script {
        Script {
            connection: 77,
            order,
            rounds: 5,
            up: 100_000,
            down: 150_001,
            pause: Duration::from_millis(1),
        }
    }

    /// Both ends of a conversation, with `between` in the middle.
    fn talk(
        script: Script,
        between: impl FnOnce(TcpStream, TcpStream) + Send + 'static,
    ) -> (Seen, Option<(u64, Seen)>) {
        let front = TcpListener::bind("127.0.0.1:0").unwrap();
        let back = TcpListener::bind("127.0.0.1:0").unwrap();
        let (front_at, back_at) = (front.local_addr().unwrap(), back.local_addr().unwrap());
        let never = Arc::new(AtomicBool::new(false));
        let stop = never.clone();
        let serving = thread::spawn(move || server(back.accept().unwrap().0, &stop));
        let passing = thread::spawn(move || {
            let client = front.accept().unwrap().0;
            between(client, TcpStream::connect(back_at).unwrap());
        });
        let stream = TcpStream::connect(front_at).unwrap();
        let seen = client(stream, &script, &never);
        passing.join().unwrap();
        (seen, serving.join().unwrap())
    }

    /// Passes everything on in both directions, after `change` on what the client sends.
    fn pass(client: TcpStream, server: TcpStream, mut change: impl FnMut(usize, &mut Vec<u8>)) {
        let (mut back_from, mut back_to) =
            (server.try_clone().unwrap(), client.try_clone().unwrap());
        let back = thread::spawn(move || {
            let _ = io::copy(&mut back_from, &mut back_to);
            let _ = back_to.shutdown(Shutdown::Write);
        });
        let (mut from, mut to) = (client, server);
        let mut at = 0;
        let mut buffer = vec![0; 10_000];
        while let Ok(n @ 1..) = from.read(&mut buffer) {
            let mut piece = buffer[..n].to_vec();
            change(at, &mut piece);
            at += n;
            if to.write_all(&piece).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Write);
        back.join().unwrap();
    }

    #[test]
    fn every_order_is_whole_at_both_ends() {
        for order in [
            Order::Rounds,
            Order::Together,
            Order::AfterFin,
            Order::ServerFirst,
        ] {
            let script = script(order);
            let (client, server) = talk(script, |client, server| pass(client, server, |_, _| {}));
            let (connection, server) = server.unwrap();
            assert_eq!(connection, 77);
            assert_eq!(
                (&client.how, &server.how),
                (&How::Whole, &How::Whole),
                "{order:?}"
            );
            assert_eq!(
                (client.sent, server.received),
                (script.whole_up(), script.whole_up())
            );
            assert_eq!(
                (server.sent, client.received),
                (script.whole_down(), script.whole_down())
            );
        }
    }

    #[test]
    fn a_changed_byte_is_found_where_it_is() {
        let (_, server) = talk(script(Order::Together), |client, server| {
            pass(client, server, |at, piece| {
                if let Some(byte) = (HEADER + 5_000)
                    .checked_sub(at)
                    .and_then(|i| piece.get_mut(i))
                {
                    *byte ^= 1;
                }
            });
        });
        assert_eq!(server.unwrap().1.how, How::Wrong { at: 5_000 });
    }

    #[test]
    fn a_fin_before_the_end_is_short_and_not_whole() {
        let (_, server) = talk(script(Order::AfterFin), |mut client, mut server| {
            let mut some = vec![0; HEADER + 1_000];
            client.read_exact(&mut some).unwrap();
            server.write_all(&some).unwrap();
            server.shutdown(Shutdown::Write).unwrap();
        });
        let seen = server.unwrap().1;
        assert_eq!(
            (seen.how, seen.received, seen.expected),
            (How::Short, 1_000, 100_000)
        );
    }

    #[test]
    fn a_fin_in_the_middle_of_both_directions_is_short_and_a_reset_is_none() {
        for (linger, expected) in [(None, How::Short), (Some(Duration::ZERO), How::Reset)] {
            let (client, _) = talk(script(Order::Together), move |mut client, mut server| {
                let mut some = vec![0; HEADER + 50_000];
                client.read_exact(&mut some).unwrap();
                server.write_all(&some).unwrap();
                let mut back = vec![0; 50_000];
                server.read_exact(&mut back).unwrap();
                client.write_all(&back).unwrap();
                if linger.is_some() {
                    socket2::SockRef::from(&client).set_linger(linger).unwrap();
                    return;
                }
                client.shutdown(Shutdown::Write).unwrap();
                while client.read(&mut some).is_ok_and(|n| n > 0) {}
            });
            assert_eq!(client.how, expected);
        }
    }

    #[test]
    fn an_early_end_of_rounds_is_whole() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap();
        let serving =
            thread::spawn(move || server(listener.accept().unwrap().0, &AtomicBool::new(false)));
        let stopped = AtomicBool::new(true);
        let seen = client(
            TcpStream::connect(at).unwrap(),
            &script(Order::Rounds),
            &stopped,
        );
        assert_eq!((seen.how, seen.received), (How::Whole, 150_001));
        let served = serving.join().unwrap().unwrap().1;
        assert_eq!((served.how, served.received), (How::Whole, 100_000));
    }
}

//! The byte pump: TCP to TCP, and TCP to a stream of a tunnel, both directions in one future.
//!
//! Memory: an idle connection has no buffer at all. Reading happens into one scratch buffer per
//! thread ([`Scratch`]), and normally what was read is written in the same breath. Only what the
//! other side does not take at once is kept, at most one read per direction (between two sockets),
//! or what HTTP/2's flow control admits (towards a tunnel). So a buffer grows from nothing to
//! [`CHUNK`] while it is needed and is given back when it is empty.
//!
//! Speed: one read, one write per message, no copy on the way into a tunnel, vectored writes on the
//! way out of it. A pump gives way to the others after [`ROUNDS`] reads, and sooner when its pod has
//! many busy connections ([`Turns`]).
//!
//! Ends: FIN travels as FIN or END_STREAM and leaves the other direction open. RST, RST_STREAM and
//! the death of a tunnel travel as RST or RST_STREAM; see [`super::tcp`] for why no accident turns
//! into FIN.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    future::Future,
    io::{self, IoSlice},
    pin::Pin,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::{Buf, Bytes, BytesMut};
use h2::{RecvStream, SendStream, client::ResponseFuture};
use http::StatusCode;

use super::{
    conns::Conn,
    limits::{Permit, Share},
    reason::{HEADER, Reason},
    tcp::TcpEnd,
    threads::Thread,
    tunnel::STREAM_WINDOW,
};
use crate::metrics::{Flow, Recorder};

/// The most that one read takes.
pub(super) const CHUNK: usize = 128 * 1024;
/// Of many busy pumps of a pod each may read at least so much at a time.
const LEAST_CHUNK: usize = 16 * 1024;
/// The scratch for tunnels is renewed when less than this is left of it.
const LEAST_ROOM: usize = 16 * 1024;
/// Size of the scratch for tunnels: many small messages share one allocation.
const SCRATCH: usize = 512 * 1024;
/// Reads of one direction before the others have their turn.
const ROUNDS: usize = 8;
/// Slices of one vectored write.
const SLICES: usize = 16;
/// Bytes sent into a tunnel before asking again whether its window still has room.
const UNASKED: usize = 128 * 1024;

// A connection's task is little more than its pump: hold the bound.
const _: () = assert!(size_of::<SocketPump>() <= 384 && size_of::<StreamPump>() <= 512);

/// How a pump ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// Both directions ended with FIN.
    Finished,
    Broken(Reason),
}

/// Buffers that all pumps of a thread share; only borrowed within one poll.
pub(super) struct Scratch {
    /// Between sockets: what was read is written before anybody else runs.
    plain: RefCell<Box<[u8]>>,
    /// Towards tunnels: what was read is split off and travels on without a copy.
    shared: RefCell<BytesMut>,
}

impl Scratch {
    pub(super) fn new() -> Rc<Self> {
        Rc::new(Self {
            plain: RefCell::new(vec![0; CHUNK].into_boxed_slice()),
            shared: RefCell::new(BytesMut::new()),
        })
    }
}

/// Counts bytes into the series of a connection; the same-node case has two of them.
pub(super) struct Meter {
    pub(super) outbound: Option<Flow>,
    pub(super) inbound: Option<Flow>,
    /// From the client to the server.
    pub(super) sent: u64,
    pub(super) received: u64,
}

impl Meter {
    fn count(&mut self, way: Toward, bytes: usize) {
        let bytes = bytes as u64;
        let flows = self.outbound.iter().chain(&self.inbound);
        match way {
            Toward::Server => {
                self.sent += bytes;
                flows.for_each(|flow| flow.from_source(bytes));
            }
            Toward::Client => {
                self.received += bytes;
                flows.for_each(|flow| flow.from_destination(bytes));
            }
        }
    }
}

/// Direction of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Toward {
    Server,
    Client,
}

impl Toward {
    /// Whose RST it is when reading for this direction fails.
    fn reader_reset(self) -> Reason {
        match self {
            Self::Server => Reason::ClientReset,
            Self::Client => Reason::ServerReset,
        }
    }

    fn writer_reset(self) -> Reason {
        match self {
            Self::Server => Reason::ServerReset,
            Self::Client => Reason::ClientReset,
        }
    }
}

fn broken(error: &io::Error, reset: Reason) -> End {
    if error.kind() == io::ErrorKind::TimedOut {
        End::Broken(Reason::Timeout)
    } else {
        End::Broken(reset)
    }
}

/// What one direction's step came to.
enum Step {
    /// Waits for somebody who will wake us.
    Waits,
    /// Waits for the writer's side: the reader's RST would go unseen.
    Blocked,
    /// Could go on and gives way.
    Yields,
    /// FIN was passed on.
    Done,
    Broken(End),
}

// ---- between two sockets ----

/// Two sockets.
pub(super) struct SocketPump {
    client: TcpEnd,
    server: TcpEnd,
    to_server: Way,
    to_client: Way,
    shared: Shared,
}

/// What both kinds of pump need of their surroundings.
pub(super) struct Shared {
    pub(super) scratch: Rc<Scratch>,
    pub(super) recorder: Rc<Recorder>,
    pub(super) conn: Rc<Conn>,
    pub(super) meter: Meter,
    permit: Permit,
    appetite: Appetite,
}

impl Shared {
    pub(super) fn new(
        thread: &Thread,
        turns: &Rc<Turns>,
        permit: Permit,
        conn: Rc<Conn>,
        meter: Meter,
    ) -> Self {
        Self {
            scratch: Rc::clone(&thread.scratch),
            recorder: Rc::clone(&thread.recorder),
            conn,
            meter,
            permit,
            appetite: Appetite {
                turns: Rc::clone(turns),
                hungry: false,
            },
        }
    }

    /// Bytes that wait in our memory: more of them, or fewer.
    fn buffered(&self, delta: isize) {
        if delta != 0 {
            self.recorder.buffered_bytes(delta as i64);
            self.permit.share().buffered(delta);
        }
    }

    /// Reads of this turn, and how much each may take.
    fn turn(&self) -> (usize, usize) {
        let (rounds, chunk) = self.appetite.turns.turn();
        (rounds, chunk.min(self.permit.share().read_limit()))
    }
}

/// How one pod's pumps share its part of a thread.
///
/// A pump's turn is [`ROUNDS`] reads of [`CHUNK`] bytes. Turns go round over all pumps of a thread,
/// so a pod with a hundred busy connections would have a hundred turns and its neighbour one. The
/// more pumps of a pod are busy, therefore, the shorter each one's turn.
#[derive(Default)]
pub(super) struct Turns {
    /// Pumps that gave way with work left.
    hungry: Cell<usize>,
}

/// One pump's part in [`Turns`].
struct Appetite {
    turns: Rc<Turns>,
    hungry: bool,
}

impl Appetite {
    /// The turn is over; is there work left?
    fn is(&mut self, hungry: bool) {
        if self.hungry != hungry {
            self.hungry = hungry;
            let all = self.turns.hungry.get();
            let all = if hungry { all + 1 } else { all - 1 };
            self.turns.hungry.set(all);
        }
    }
}

impl Drop for Appetite {
    fn drop(&mut self) {
        self.is(false);
    }
}

impl Turns {
    fn turn(&self) -> (usize, usize) {
        let hungry = self.hungry.get().max(1);
        let rounds = (ROUNDS / hungry).max(1);
        let chunk = (CHUNK * ROUNDS / (rounds * hungry)).clamp(LEAST_CHUNK, CHUNK);
        (rounds, chunk)
    }
}

/// One direction between two sockets.
struct Way {
    /// Read and not yet taken by the other side.
    rest: Bytes,
    fin_seen: bool,
    done: bool,
}

impl Way {
    fn new() -> Self {
        Self {
            rest: Bytes::new(),
            fin_seen: false,
            done: false,
        }
    }
}

impl SocketPump {
    pub(super) fn new(client: TcpEnd, server: TcpEnd, shared: Shared) -> Self {
        Self {
            client,
            server,
            to_server: Way::new(),
            to_client: Way::new(),
            shared,
        }
    }

    /// Moves bytes until the end; hands back what was counted.
    pub(super) async fn run(mut self) -> (End, Meter) {
        let end = std::future::poll_fn(|cx| self.poll(cx)).await;
        for way in [&self.to_server, &self.to_client] {
            self.shared.buffered(-(way.rest.len() as isize));
        }
        if end == End::Finished {
            self.client.close();
            self.server.close();
        }
        (end, self.shared.meter)
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        if let Poll::Ready(reason) = self.shared.conn.poll_aborted(cx) {
            return Poll::Ready(End::Broken(reason));
        }
        let mut waits_on_client = false;
        let mut waits_on_server = false;
        let mut hungry = false;
        for toward in [Toward::Server, Toward::Client] {
            let (from, to, way) = match toward {
                Toward::Server => (&self.client, &self.server, &mut self.to_server),
                Toward::Client => (&self.server, &self.client, &mut self.to_client),
            };
            if way.done {
                continue;
            }
            match step(cx, toward, from, to, way, &mut self.shared) {
                Step::Waits => match toward {
                    Toward::Server => waits_on_client = true,
                    Toward::Client => waits_on_server = true,
                },
                Step::Blocked => {}
                Step::Yields => {
                    hungry = true;
                    match toward {
                        Toward::Server => waits_on_client = true,
                        Toward::Client => waits_on_server = true,
                    }
                }
                Step::Done => way.done = true,
                Step::Broken(end) => return Poll::Ready(end),
            }
        }
        if self.to_server.done && self.to_client.done {
            return Poll::Ready(End::Finished);
        }
        self.shared.appetite.is(hungry);
        if hungry {
            cx.waker().wake_by_ref();
        }
        // Nobody reads from this end just now, so only this tells of its RST.
        if !waits_on_client && self.client.poll_reset(cx).is_ready() {
            return Poll::Ready(End::Broken(Reason::ClientReset));
        }
        if !waits_on_server && self.server.poll_reset(cx).is_ready() {
            return Poll::Ready(End::Broken(Reason::ServerReset));
        }
        Poll::Pending
    }
}

fn step(
    cx: &mut Context<'_>,
    toward: Toward,
    from: &TcpEnd,
    to: &TcpEnd,
    way: &mut Way,
    shared: &mut Shared,
) -> Step {
    let (rounds, chunk) = shared.turn();
    let scratch = Rc::clone(&shared.scratch);
    let mut scratch = scratch.plain.borrow_mut();
    for _ in 0..rounds {
        while !way.rest.is_empty() {
            match to.poll_write(cx, &way.rest) {
                Poll::Ready(Ok(written)) => {
                    way.rest.advance(written);
                    shared.buffered(-(written as isize));
                    if way.rest.is_empty() {
                        way.rest = Bytes::new();
                    }
                }
                Poll::Ready(Err(error)) => {
                    return Step::Broken(broken(&error, toward.writer_reset()));
                }
                Poll::Pending => return Step::Blocked,
            }
        }
        if way.fin_seen {
            return match to.finish_writing() {
                Ok(()) => Step::Done,
                Err(error) => Step::Broken(broken(&error, toward.writer_reset())),
            };
        }
        let read = match from.poll_read(cx, &mut scratch[..chunk]) {
            Poll::Ready(Ok(read)) => read,
            Poll::Ready(Err(error)) => return Step::Broken(broken(&error, toward.reader_reset())),
            Poll::Pending => return Step::Waits,
        };
        if read == 0 {
            way.fin_seen = true;
            continue;
        }
        shared.meter.count(toward, read);
        let written = match to.poll_write(cx, &scratch[..read]) {
            Poll::Ready(Ok(written)) => written,
            Poll::Ready(Err(error)) => return Step::Broken(broken(&error, toward.writer_reset())),
            Poll::Pending => 0,
        };
        if written < read {
            way.rest = Bytes::copy_from_slice(&scratch[written..read]);
            shared.buffered((read - written) as isize);
        }
    }
    Step::Yields
}

// ---- between a socket and a stream ----

/// A socket and a stream of a tunnel.
pub(super) struct StreamPump {
    socket: TcpEnd,
    send: SendStream<Bytes>,
    receive: Receive,
    /// Where bytes that come from the socket go.
    socket_sends: Toward,
    /// What the socket has said and the stream not yet heard.
    into: Into,
    out: Out,
    shared: Shared,
    tunnel: Rc<dyn Counted>,
}

/// Something that counts the streams it carries; the pump holds it to the end, and tells it of
/// bytes.
pub(super) trait Counted {
    fn moved(&self, bytes: usize);
    /// A reader is slow and its pod has too much in memory: the windows should shrink.
    fn squeeze(&self, share: &Arc<Share>);
}

/// The stream's receiving half.
pub(super) enum Receive {
    /// The answer to our CONNECT is under way; bytes already flow the other way.
    Awaiting(ResponseFuture),
    Open(RecvStream),
}

/// Socket to stream.
struct Into {
    /// Sent since the window was last asked.
    unasked: usize,
    /// What the pod's share was charged with.
    charged: usize,
    fin_seen: bool,
    done: bool,
}

/// Stream to socket.
struct Out {
    chunks: VecDeque<Bytes>,
    /// Sum of the chunks.
    length: usize,
    /// What of it the metric of buffered bytes was told.
    told: usize,
    /// What the pod's share was charged with.
    charged: usize,
    fin_seen: bool,
    done: bool,
}

impl StreamPump {
    pub(super) fn new(
        socket: TcpEnd,
        send: SendStream<Bytes>,
        receive: Receive,
        socket_sends: Toward,
        tunnel: Rc<dyn Counted>,
        shared: Shared,
    ) -> Self {
        Self {
            socket,
            send,
            receive,
            socket_sends,
            into: Into {
                unasked: 0,
                charged: 0,
                fin_seen: false,
                done: false,
            },
            out: Out {
                chunks: VecDeque::new(),
                length: 0,
                told: 0,
                charged: 0,
                fin_seen: false,
                done: false,
            },
            shared,
            tunnel,
        }
    }

    /// Moves bytes until the end; hands back what was counted.
    pub(super) async fn run(mut self) -> (End, Meter) {
        let end = std::future::poll_fn(|cx| self.poll(cx)).await;
        self.tell(0);
        self.charge_unsent(0);
        match end {
            End::Finished => self.socket.close(),
            // Dropping the socket sends RST.
            End::Broken(_) => self.send.send_reset(h2::Reason::CANCEL),
        }
        (end, self.shared.meter)
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        if let Poll::Ready(reason) = self.shared.conn.poll_aborted(cx) {
            return Poll::Ready(End::Broken(reason));
        }
        // First what the tunnel says: it knows better than a failing write why a stream is gone.
        let mut hungry = false;
        if !self.out.done {
            match self.step_out(cx) {
                Step::Waits | Step::Blocked => {}
                Step::Yields => hungry = true,
                Step::Done => self.out.done = true,
                Step::Broken(end) => return Poll::Ready(end),
            }
        }
        let mut reads = false;
        if !self.into.done {
            match self.step_into(cx) {
                Step::Waits => reads = true,
                Step::Blocked => {}
                Step::Yields => {
                    reads = true;
                    hungry = true;
                }
                Step::Done => self.into.done = true,
                Step::Broken(end) => return Poll::Ready(end),
            }
        }
        if self.into.done && self.out.done {
            return Poll::Ready(End::Finished);
        }
        self.shared.appetite.is(hungry);
        if hungry {
            cx.waker().wake_by_ref();
        }
        if !reads && self.socket.poll_reset(cx).is_ready() {
            return Poll::Ready(End::Broken(self.socket_sends.reader_reset()));
        }
        // Nobody waits for data of the stream any more, so only this tells of its RST_STREAM.
        if self.out.fin_seen
            && let Poll::Ready(result) = self.send.poll_reset(cx)
        {
            return Poll::Ready(match result {
                // The peer has all it wants and finished: no failure (RFC 9113, section 8.1).
                Ok(h2::Reason::NO_ERROR) => End::Finished,
                Ok(_) => End::Broken(self.socket_sends.writer_reset()),
                Err(error) => stream_broken(&error, self.socket_sends.writer_reset()),
            });
        }
        Poll::Pending
    }

    fn step_into(&mut self, cx: &mut Context<'_>) -> Step {
        let far_reset = self.socket_sends.writer_reset();
        let (rounds, chunk) = self.shared.turn();
        let limit = self.shared.permit.share().read_limit();
        let unasked = UNASKED.min(limit);
        for _ in 0..rounds {
            if self.into.unasked >= unasked {
                match self.poll_window(cx) {
                    Poll::Ready(Ok(())) => {
                        self.into.unasked = 0;
                        self.charge_unsent(0);
                    }
                    Poll::Ready(Err(end)) => return Step::Broken(end),
                    Poll::Pending => {
                        // What waits may be little, and keep all of the scratch it lies in.
                        let piece = if limit < CHUNK { limit } else { SCRATCH };
                        self.charge_unsent(self.into.unasked.max(piece));
                        return Step::Blocked;
                    }
                }
            }
            // A piece of the shared scratch keeps all of it; that is too much when memory is scarce.
            let piece = if limit < CHUNK {
                let mut scratch = self.shared.scratch.plain.borrow_mut();
                match self.socket.poll_read(cx, &mut scratch[..chunk]) {
                    Poll::Ready(Ok(read)) => Bytes::copy_from_slice(&scratch[..read]),
                    Poll::Ready(Err(error)) => {
                        return Step::Broken(broken(&error, self.socket_sends.reader_reset()));
                    }
                    Poll::Pending => return Step::Waits,
                }
            } else {
                let mut scratch = self.shared.scratch.shared.borrow_mut();
                if scratch.capacity() < LEAST_ROOM {
                    scratch.reserve(SCRATCH);
                }
                match self.socket.poll_read_buf(cx, &mut scratch, chunk) {
                    Poll::Ready(Ok(_)) => scratch.split().freeze(),
                    Poll::Ready(Err(error)) => {
                        return Step::Broken(broken(&error, self.socket_sends.reader_reset()));
                    }
                    Poll::Pending => return Step::Waits,
                }
            };
            let fin = piece.is_empty();
            self.into.unasked += piece.len();
            self.shared.meter.count(self.socket_sends, piece.len());
            self.tunnel.moved(piece.len());
            if self.send.send_data(piece, fin).is_err() {
                // It says only that the stream is gone; the stream itself knows why.
                return Step::Broken(match self.send.poll_reset(cx) {
                    Poll::Ready(Ok(_)) => End::Broken(far_reset),
                    Poll::Ready(Err(error)) => stream_broken(&error, far_reset),
                    Poll::Pending => End::Broken(Reason::TunnelLost),
                });
            }
            if fin {
                self.into.fin_seen = true;
                return Step::Done;
            }
        }
        Step::Yields
    }

    /// Is there room beyond what was given to the tunnel already? One byte is asked for, so that an
    /// idle stream keeps nothing of the connection's window from the others.
    fn poll_window(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), End>> {
        let far_reset = self.socket_sends.writer_reset();
        self.send.reserve_capacity(1);
        while self.send.capacity() == 0 {
            match self.send.poll_capacity(cx) {
                Poll::Ready(Some(Ok(_))) => {}
                Poll::Ready(Some(Err(error))) => {
                    return Poll::Ready(Err(stream_broken(&error, far_reset)));
                }
                Poll::Ready(None) => return Poll::Ready(Err(End::Broken(far_reset))),
                Poll::Pending => return Poll::Pending,
            }
        }
        Poll::Ready(Ok(()))
    }

    fn step_out(&mut self, cx: &mut Context<'_>) -> Step {
        let (rounds, chunk) = self.shared.turn();
        for _ in 0..rounds {
            let gathered = match self.gather(cx, chunk) {
                Ok(gathered) => gathered,
                Err(end) => return Step::Broken(end),
            };
            while self.out.length > 0 {
                match self.write(cx) {
                    Poll::Ready(Ok(())) => {}
                    Poll::Ready(Err(end)) => return Step::Broken(end),
                    Poll::Pending => {
                        self.tell(self.out.length);
                        if self.shared.permit.share().is_pressed() {
                            self.tunnel.squeeze(self.shared.permit.share());
                        }
                        return Step::Blocked;
                    }
                }
            }
            self.tell(0);
            if self.out.fin_seen {
                return match self.socket.finish_writing() {
                    Ok(()) => Step::Done,
                    Err(error) => Step::Broken(broken(&error, self.socket_sends.reader_reset())),
                };
            }
            if gathered.is_pending() {
                if self.out.chunks.capacity() > SLICES {
                    self.out.chunks = VecDeque::new();
                }
                return Step::Waits;
            }
        }
        Step::Yields
    }

    /// What waits for the stream's window, as the pod's share is charged with it.
    fn charge_unsent(&mut self, charged: usize) {
        let share = self.shared.permit.share();
        share.buffered(charged as isize - self.into.charged as isize);
        self.into.charged = charged;
    }

    fn tell(&mut self, held: usize) {
        // The peer may fill the whole window while nobody reads: that is what a stalled stream
        // costs, whatever has come of it so far.
        let charged = if held > 0 { held.max(STREAM_WINDOW) } else { 0 };
        let share = self.shared.permit.share();
        share.buffered(charged as isize - self.out.charged as isize);
        self.out.charged = charged;
        if held != self.out.told {
            self.shared
                .recorder
                .buffered_bytes(held as i64 - self.out.told as i64);
            self.out.told = held;
        }
    }

    /// Takes what the stream has ready, up to a chunk's worth. Pending: the stream will wake us.
    fn gather(&mut self, cx: &mut Context<'_>, limit: usize) -> Result<Poll<()>, End> {
        let far_reset = self.socket_sends.writer_reset();
        while !self.out.fin_seen && self.out.length < limit && self.out.chunks.len() < SLICES {
            let stream = match &mut self.receive {
                Receive::Open(stream) => stream,
                Receive::Awaiting(response) => match Pin::new(response).poll(cx) {
                    Poll::Pending => return Ok(Poll::Pending),
                    Poll::Ready(Err(error)) => return Err(stream_broken(&error, far_reset)),
                    Poll::Ready(Ok(response)) => {
                        self.receive = Receive::Open(accepted(response)?);
                        continue;
                    }
                },
            };
            match stream.poll_data(cx) {
                Poll::Pending => return Ok(Poll::Pending),
                Poll::Ready(None) => self.out.fin_seen = true,
                Poll::Ready(Some(Err(error))) => return Err(stream_broken(&error, far_reset)),
                Poll::Ready(Some(Ok(chunk))) => {
                    if !chunk.is_empty() {
                        self.out.length += chunk.len();
                        self.out.chunks.push_back(chunk);
                    }
                }
            }
        }
        Ok(Poll::Ready(()))
    }

    fn write(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), End>> {
        let length = self.out.length;
        let result = if self.out.chunks.len() == 1 {
            self.socket.poll_write(cx, &self.out.chunks[0])
        } else {
            let mut slices = [IoSlice::new(&[]); SLICES];
            for (slice, chunk) in slices.iter_mut().zip(&self.out.chunks) {
                *slice = IoSlice::new(chunk);
            }
            let filled = self.out.chunks.len().min(SLICES);
            self.socket
                .poll_write_vectored(cx, &slices[..filled], length)
        };
        let written = match result {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(Ok(written)) => written,
            Poll::Ready(Err(error)) => {
                return Poll::Ready(Err(broken(&error, self.socket_sends.reader_reset())));
            }
        };
        self.out.length -= written;
        let mut left = written;
        while let Some(front) = self.out.chunks.front_mut() {
            if left < front.len() {
                front.advance(left);
                break;
            }
            left -= front.len();
            self.out.chunks.pop_front();
        }
        let toward = match self.socket_sends {
            Toward::Server => Toward::Client,
            Toward::Client => Toward::Server,
        };
        self.shared.meter.count(toward, written);
        self.tunnel.moved(written);
        if let Receive::Open(stream) = &mut self.receive {
            // Only now may the peer send more. It fails when the stream is gone, which the next
            // `poll_data` tells properly.
            let _gone = stream.flow_control().release_capacity(written);
        }
        Poll::Ready(Ok(()))
    }
}

/// The stream of an answer that accepts, or why it does not.
fn accepted(response: http::Response<RecvStream>) -> Result<RecvStream, End> {
    if response.status() == StatusCode::OK {
        return Ok(response.into_body());
    }
    let reason = response
        .headers()
        .get(HEADER)
        .map_or(Reason::RefusedByPeer, |word| {
            Reason::from_peer(word.as_bytes())
        });
    Err(End::Broken(reason))
}

/// RST_STREAM is the far application's doing; anything else is the tunnel's death.
fn stream_broken(error: &h2::Error, far_reset: Reason) -> End {
    if error.is_reset() && error.is_remote() {
        End::Broken(far_reset)
    } else {
        End::Broken(Reason::TunnelLost)
    }
}
#[cfg(test)]
mod tests;

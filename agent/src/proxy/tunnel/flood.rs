//! What a peer may make us do besides moving bytes.
//!
//! HTTP/2 lets a peer ask for work with frames of a few bytes: settings to acknowledge, pings to
//! answer, streams to open and reset, windows to open by nothing, header blocks without end. The
//! library bounds what such frames may keep in memory. This bounds how often they may come: it
//! stands between TLS and HTTP/2, reads no more than the nine bytes in front of every frame, and
//! has a bucket per kind, wide enough for the busiest honest tunnel. When one is empty, or a frame
//! that is not data stays unfinished for longer than a handshake may take, reading fails and the
//! tunnel is cut; [`Cut`] tells why.
//!
//! Nothing here knows what a stream is for.

use std::{
    cell::Cell,
    future::Future,
    io::{self, IoSlice},
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::Sleep,
};

use crate::proxy::{
    limits::{Bucket, Rate},
    reason::Reason,
};

/// Why a tunnel was cut, if it was; shared by whoever drives it.
pub(super) type Cut = Rc<Cell<Option<Reason>>>;

/// What a client sends in front of its first frame.
const PREFACE: usize = 24;
const HEAD: usize = 9;
const END_HEADERS: u8 = 0x4;

/// A kind of frame as far as it costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Data,
    Headers,
    Reset,
    Settings,
    Ping,
    Window,
    Continuation,
    /// Rare ones, and those that nobody knows.
    Other,
}

impl Kind {
    fn of(byte: u8) -> Self {
        match byte {
            0 => Self::Data,
            1 => Self::Headers,
            3 => Self::Reset,
            4 => Self::Settings,
            6 => Self::Ping,
            8 => Self::Window,
            9 => Self::Continuation,
            _ => Self::Other,
        }
    }

    /// A crowd of connections opens and ends at once, and a reader in a hurry gives windows back
    /// often: thousands a second. The rest belongs to a tunnel, not to its connections.
    const fn rate(self) -> Rate {
        match self {
            // Data pays for itself: flow control bounds it.
            Self::Data => Rate::new(u32::MAX, u32::MAX),
            Self::Headers => Rate::new(10_000, 20_000),
            Self::Reset => Rate::new(5_000, 10_000),
            Self::Settings => Rate::new(10, 50),
            Self::Ping => Rate::new(20, 100),
            Self::Window => Rate::new(20_000, 40_000),
            Self::Continuation => Rate::new(20, 20),
            Self::Other => Rate::new(10, 100),
        }
    }

    fn reason(self) -> Reason {
        match self {
            Self::Headers | Self::Data => Reason::FloodHeaders,
            Self::Reset => Reason::FloodResets,
            Self::Settings => Reason::FloodSettings,
            Self::Ping => Reason::FloodPings,
            Self::Window => Reason::FloodWindows,
            Self::Continuation => Reason::FloodContinuations,
            Self::Other => Reason::FloodOther,
        }
    }
}

/// Reads frames' heads as they pass, and nothing else of them.
struct Scan {
    head: [u8; HEAD],
    /// Bytes of `head` that are there.
    have: usize,
    /// Bytes of the frame, or of the preface, that are still to come.
    rest: usize,
    kind: Kind,
    /// A header block has begun and not ended.
    block: bool,
    /// Frames so far; the pieces of a header block are one.
    begun: u64,
    /// By [`Kind`].
    buckets: [Bucket; 8],
}

impl Scan {
    fn new(preface: usize, now: Instant) -> Self {
        let kinds = [
            Kind::Data,
            Kind::Headers,
            Kind::Reset,
            Kind::Settings,
            Kind::Ping,
            Kind::Window,
            Kind::Continuation,
            Kind::Other,
        ];
        Self {
            head: [0; HEAD],
            have: 0,
            rest: preface,
            kind: Kind::Data,
            block: false,
            begun: 0,
            buckets: kinds.map(|kind| Bucket::new(kind.rate(), now)),
        }
    }

    fn see(&mut self, mut bytes: &[u8], now: Instant) -> Result<(), Reason> {
        while !bytes.is_empty() {
            let passed = self.rest.min(bytes.len());
            self.rest -= passed;
            bytes = &bytes[passed..];
            let taken = (HEAD - self.have).min(bytes.len());
            self.head[self.have..self.have + taken].copy_from_slice(&bytes[..taken]);
            self.have += taken;
            bytes = &bytes[taken..];
            if self.have == HEAD {
                self.have = 0;
                self.begin(now)?;
            }
        }
        Ok(())
    }

    fn begin(&mut self, now: Instant) -> Result<(), Reason> {
        let [a, b, c, kind, flags, ..] = self.head;
        self.rest = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
        self.kind = Kind::of(kind);
        if self.kind != Kind::Continuation {
            self.begun += 1;
        }
        match self.kind {
            Kind::Headers | Kind::Continuation => self.block = flags & END_HEADERS == 0,
            Kind::Data | Kind::Reset | Kind::Settings | Kind::Ping | Kind::Window | Kind::Other => {
            }
        }
        if self.kind != Kind::Data && !self.buckets[self.kind as usize].take(now) {
            return Err(self.kind.reason());
        }
        Ok(())
    }

    /// Has something begun that is small and should be here at once?
    fn unfinished(&self) -> bool {
        self.block || self.have > 0 || (self.rest > 0 && self.kind != Kind::Data)
    }
}

/// A peer's bytes, bounded. Writing passes.
pub struct Guard<S> {
    inner: S,
    scan: Scan,
    cut: Cut,
    /// How long something may stay unfinished.
    patience: Duration,
    /// Runs while something is, with what it was.
    unfinished: Option<(u64, Pin<Box<Sleep>>)>,
}

impl<S> Guard<S> {
    /// In front of a server, which hears a preface first.
    pub(super) fn server(inner: S, patience: Duration) -> (Self, Cut) {
        Self::new(inner, patience, PREFACE)
    }

    pub(super) fn client(inner: S, patience: Duration) -> (Self, Cut) {
        Self::new(inner, patience, 0)
    }

    fn new(inner: S, patience: Duration, preface: usize) -> (Self, Cut) {
        let cut = Cut::default();
        let guard = Self {
            inner,
            scan: Scan::new(preface, Instant::now()),
            cut: Rc::clone(&cut),
            patience,
            unfinished: None,
        };
        (guard, cut)
    }

    fn cut(&self, reason: Reason) -> io::Error {
        self.cut.set(Some(reason));
        io::Error::other(reason.word())
    }

    /// Ready if patience with what is unfinished is over.
    fn poll_patience(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if !self.scan.unfinished() {
            self.unfinished = None;
            return Poll::Pending;
        }
        // A busy peer's reads may end within a frame time after time: not within the same.
        if self.unfinished.as_ref().map(|(begun, _)| *begun) != Some(self.scan.begun) {
            let sleep = Box::pin(tokio::time::sleep(self.patience));
            self.unfinished = Some((self.scan.begun, sleep));
        }
        match &mut self.unfinished {
            Some((_, sleep)) => sleep.as_mut().poll(cx),
            None => Poll::Pending,
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Guard<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let before = out.filled().len();
        let read = Pin::new(&mut this.inner).poll_read(cx, out);
        if let Poll::Ready(Ok(())) = &read
            && let Err(reason) = this.scan.see(&out.filled()[before..], Instant::now())
        {
            return Poll::Ready(Err(this.cut(reason)));
        }
        // Also when bytes came: one at a time they could come for ever.
        if this.poll_patience(cx).is_ready() {
            return Poll::Ready(Err(this.cut(Reason::SlowFrames)));
        }
        ready!(read)?;
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Guard<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

/// The word for a tunnel that ended with an error: ours if we cut it, else the library's verdict on
/// its peer. `None`: it ended as tunnels do.
pub(super) fn verdict(cut: &Cut, error: &h2::Error) -> Option<Reason> {
    if let Some(reason) = cut.get() {
        return Some(reason);
    }
    if error.is_remote() {
        return None;
    }
    match error.reason() {
        Some(h2::Reason::ENHANCE_YOUR_CALM) => Some(Reason::FloodOther),
        Some(h2::Reason::NO_ERROR | h2::Reason::CANCEL) | None => None,
        Some(_) => Some(Reason::ProtocolError),
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let length = (payload.len() as u32).to_be_bytes();
        let head = [length[1], length[2], length[3], kind, flags, 0, 0, 0, 1];
        [&head[..], payload].concat()
    }

    fn scan() -> (Scan, Instant) {
        let now = Instant::now();
        (Scan::new(PREFACE, now), now)
    }

    /// How many of these frames, sent at once, are borne; and what is said of the next.
    fn borne(kind: u8) -> (usize, Reason) {
        let (mut scan, now) = scan();
        scan.see(&[b'p'; PREFACE], now).unwrap();
        let one = frame(kind, END_HEADERS, b"xxxx");
        for count in 0..1_000_000 {
            if let Err(reason) = scan.see(&one, now) {
                return (count, reason);
            }
        }
        panic!("frames of kind {kind} are never too many");
    }

    #[test]
    fn each_kind_of_frame_has_its_bound_and_its_word() {
        assert_eq!(borne(1), (20_000, Reason::FloodHeaders));
        assert_eq!(borne(2), (100, Reason::FloodOther));
        assert_eq!(borne(3), (10_000, Reason::FloodResets));
        assert_eq!(borne(4), (50, Reason::FloodSettings));
        assert_eq!(borne(6), (100, Reason::FloodPings));
        assert_eq!(borne(8), (40_000, Reason::FloodWindows));
        assert_eq!(borne(9), (20, Reason::FloodContinuations));
        assert_eq!(borne(0x7f), (100, Reason::FloodOther));
    }

    #[test]
    fn data_passes_without_end_and_hides_no_other_frame() {
        let (mut scan, now) = scan();
        scan.see(&[b'p'; PREFACE], now).unwrap();
        // Payload that looks like pings.
        let pings = frame(6, 0, &[0; 8]).repeat(50);
        let data = frame(0, 0, &pings);
        for _ in 0..1000 {
            scan.see(&data, now).unwrap();
        }
        for _ in 0..100 {
            scan.see(&frame(6, 0, &[0; 8]), now).unwrap();
        }
        assert_eq!(
            scan.see(&frame(6, 0, &[0; 8]), now),
            Err(Reason::FloodPings)
        );
    }

    #[test]
    fn frames_are_counted_the_same_however_they_are_cut() {
        let mut bytes = vec![b'p'; PREFACE];
        for _ in 0..60 {
            bytes.extend(frame(0, 0, b"some data"));
            bytes.extend(frame(4, 0, &[0; 6]));
        }
        for size in [1, 2, 7, 9, 10, 100, 10_000] {
            let (mut scan, now) = scan();
            let failed = bytes
                .chunks(size)
                .position(|piece| scan.see(piece, now).is_err());
            let at = failed.unwrap() * size;
            // The head of settings 51 ends here.
            let expected = PREFACE + 50 * (18 + 15) + 18 + 9;
            assert!((at..at + size).contains(&(expected - 1)), "{size}: {at}");
        }
    }

    #[test]
    fn the_bucket_fills_again() {
        let (mut scan, now) = scan();
        scan.see(&[b'p'; PREFACE], now).unwrap();
        let ping = frame(6, 0, &[0; 8]);
        scan.see(&ping.repeat(100), now).unwrap();
        let later = now + Duration::from_secs(1);
        scan.see(&ping.repeat(20), later).unwrap();
        assert!(scan.see(&ping, later).is_err());
    }

    async fn guarded(
        patience: Duration,
        send: impl AsyncFnOnce(&mut tokio::io::DuplexStream),
    ) -> (io::Result<usize>, Option<Reason>) {
        let (mut far, near) = tokio::io::duplex(1 << 16);
        let (mut guard, cut) = Guard::client(near, patience);
        let read = async {
            let mut all = Vec::new();
            guard.read_to_end(&mut all).await
        };
        let send = async {
            send(&mut far).await;
            drop(far);
        };
        let (read, ()) = tokio::join!(read, send);
        (read, cut.get())
    }

    #[tokio::test(start_paused = true)]
    async fn a_header_block_that_does_not_end_is_cut() {
        let second = Duration::from_secs(1);
        let (read, cut) = guarded(5 * second, async |far| {
            far.write_all(&frame(1, 0, b"begun")).await.unwrap();
            tokio::time::sleep(60 * second).await;
        })
        .await;
        assert!(read.is_err());
        assert_eq!(cut, Some(Reason::SlowFrames));
    }

    #[tokio::test(start_paused = true)]
    async fn bytes_that_come_one_at_a_time_buy_no_time() {
        let second = Duration::from_secs(1);
        let (read, cut) = guarded(5 * second, async |far| {
            for byte in frame(1, END_HEADERS, &[0; 30]) {
                // The other end may be gone by then: that is the point.
                let _gone = far.write_all(&[byte]).await;
                tokio::time::sleep(second).await;
            }
        })
        .await;
        assert!(read.is_err());
        assert_eq!(cut, Some(Reason::SlowFrames));
    }

    #[tokio::test(start_paused = true)]
    async fn frames_that_each_come_in_two_reads_are_no_offence() {
        let second = Duration::from_secs(1);
        let (read, cut) = guarded(5 * second, async |far| {
            let one = frame(8, 0, &[0, 0, 0, 1]);
            far.write_all(&one[..5]).await.unwrap();
            for _ in 0..30 {
                tokio::time::sleep(second).await;
                far.write_all(&one[5..]).await.unwrap();
                far.write_all(&one[..5]).await.unwrap();
            }
        })
        .await;
        assert_eq!(read.unwrap(), 30 * 13 + 5);
        assert_eq!(cut, None);
    }

    #[tokio::test(start_paused = true)]
    async fn slow_data_and_silence_between_frames_are_no_offence() {
        let second = Duration::from_secs(1);
        let (read, cut) = guarded(5 * second, async |far| {
            for byte in frame(0, 0, &[0; 3]) {
                far.write_all(&[byte]).await.unwrap();
            }
            tokio::time::sleep(60 * second).await;
            let data = frame(0, 0, &[0; 4]);
            far.write_all(&data[..11]).await.unwrap();
            tokio::time::sleep(60 * second).await;
            far.write_all(&data[11..]).await.unwrap();
            tokio::time::sleep(60 * second).await;
        })
        .await;
        assert_eq!(read.unwrap(), 12 + 13);
        assert_eq!(cut, None);
    }
}

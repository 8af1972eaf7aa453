//! The TCP connection below TLS, read in large pieces.
//!
//! rustls asks for 4 KiB at a time, so that one full record would cost five calls. This reads as
//! much as there is and hands it on from memory. Writes go through as they are: rustls offers whole
//! records, vectored.
//!
//! **An end that can be heard.** A socket that is closed while something in it is unread sends a
//! reset, and a peer that is just about to write hears of that before it has read the last frames:
//! streams that had ended well would fail there. Something is unread as a rule, because peers answer
//! data with windows. So after our FIN everything is read and thrown away until the peer's, for
//! [`LINGER`] at most (RFC 9112, section 9.6, has the same for HTTP/1.1).

use std::{
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::{Sleep, sleep},
};

use super::hbone::FRAME;

/// What one read takes of a stranger, and what all of them together may be before the handshake is
/// done: certificates of three CAs fit several times. It bounds what a half-open handshake costs.
const OF_A_STRANGER: usize = 2 * 1024;
const HANDSHAKE: usize = 16 * 1024;
/// What one read takes at first: a record, or many small ones.
const SMALL: usize = 16 * 1024 + 256;
/// Under bulk: eight records.
const LARGE: usize = 8 * SMALL;
/// After so many small reads in a row the bulk is over and its buffer is given back.
const QUIET_READS: u32 = 256;
/// Reads in a row before the thread's others have their turn.
const TURN: u32 = 8;
/// Ciphertext that rustls keeps for the socket. The largest DATA frame fits with its overhead, so
/// that it leaves in one call and not in two.
pub(super) const UNSENT: usize = 2 * FRAME as usize;

/// What a peer may take to close its side when we have closed ours.
const LINGER: Duration = Duration::from_secs(1);

pub(super) struct Wire {
    tcp: TcpStream,
    /// Made at the first read.
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    /// What the buffer's length should be at the next read.
    wanted: usize,
    /// Reads in a row that would have fitted a small buffer.
    quiet: u32,
    /// Reads since this gave way.
    turn: u32,
    /// What a stranger may still send; `None`: no stranger any more.
    stranger: Option<usize>,
    /// Our FIN is out, and the peer's is awaited until then.
    lingering: Option<Pin<Box<Sleep>>>,
}

impl Wire {
    pub(super) fn new(tcp: TcpStream) -> Self {
        Self {
            tcp,
            buffer: Box::default(),
            start: 0,
            end: 0,
            wanted: OF_A_STRANGER,
            quiet: 0,
            turn: 0,
            stranger: Some(HANDSHAKE),
            lingering: None,
        }
    }

    /// The handshake is done: from here on flow control bounds what comes.
    pub(super) fn peer_is_known(&mut self) {
        self.stranger = None;
        self.wanted = SMALL;
    }

    fn poll_linger(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if let Some(end) = &mut self.lingering
            && end.as_mut().poll(cx).is_ready()
        {
            return Poll::Ready(());
        }
        let mut unread = [0; 4096];
        for _ in 0..TURN {
            let mut unread = ReadBuf::new(&mut unread);
            match ready!(Pin::new(&mut self.tcp).poll_read(cx, &mut unread)) {
                Ok(()) if !unread.filled().is_empty() => {}
                Ok(()) | Err(_) => return Poll::Ready(()),
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Learns from a read how long the buffer should be.
    fn adapt(&mut self, read: usize) {
        if self.stranger.is_some() {
            return;
        }
        if read > SMALL / 2 {
            self.quiet = 0;
            if read == self.buffer.len() {
                self.wanted = LARGE;
            }
        } else {
            self.quiet = self.quiet.saturating_add(1);
            if self.quiet == QUIET_READS {
                self.wanted = SMALL;
            }
        }
    }
}

impl AsyncRead for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.start == this.end {
            if this.buffer.len() != this.wanted {
                this.buffer = vec![0; this.wanted].into_boxed_slice();
            }
            if this.turn == TURN {
                this.turn = 0;
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            this.turn += 1;
            let mut all = ReadBuf::new(&mut this.buffer);
            let read = Pin::new(&mut this.tcp).poll_read(cx, &mut all);
            if read.is_pending() {
                this.turn = 0;
            }
            ready!(read)?;
            this.start = 0;
            this.end = all.filled().len();
            if let Some(left) = this.stranger {
                let Some(left) = left.checked_sub(this.end) else {
                    return Poll::Ready(Err(io::Error::other(
                        "more bytes than a handshake may have",
                    )));
                };
                this.stranger = Some(left);
            }
            this.adapt(this.end);
        }
        let length = out.remaining().min(this.end - this.start);
        out.put_slice(&this.buffer[this.start..this.start + length]);
        this.start += length;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Wire {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tcp).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tcp).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.lingering.is_none() {
            ready!(Pin::new(&mut this.tcp).poll_shutdown(cx))?;
            if this.stranger.is_some() {
                return Poll::Ready(Ok(()));
            }
            this.lingering = Some(Box::pin(sleep(LINGER)));
        }
        this.poll_linger(cx).map(Ok)
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    use super::*;

    async fn pair() -> (Wire, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap());
        let (near, far) = tokio::join!(near, listener.accept());
        let mut wire = Wire::new(near.unwrap());
        wire.peer_is_known();
        (wire, far.unwrap().0)
    }

    #[tokio::test]
    async fn the_buffer_grows_under_bulk_and_shrinks_after_it_and_loses_nothing() {
        let (mut wire, mut far) = pair().await;
        let bulk: Vec<u8> = (0..8 * LARGE).map(|at| (at / 7) as u8).collect();

        let sent = bulk.clone();
        let sender = tokio::spawn(async move {
            far.write_all(&sent).await.unwrap();
            far
        });
        let mut got = vec![0; bulk.len()];
        wire.read_exact(&mut got).await.unwrap();
        assert!(got == bulk);
        assert_eq!(wire.wanted, LARGE);

        let mut far = sender.await.unwrap();
        for _ in 0..=QUIET_READS {
            far.write_all(b"small").await.unwrap();
            let mut got = [0; 5];
            wire.read_exact(&mut got).await.unwrap();
            assert_eq!(&got, b"small");
        }
        assert_eq!(wire.buffer.len(), SMALL);
    }

    #[tokio::test]
    async fn a_stranger_has_small_buffers_and_an_end() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap());
        let (near, far) = tokio::join!(near, listener.accept());
        let (mut wire, mut far) = (Wire::new(near.unwrap()), far.unwrap().0);
        let talk = tokio::spawn(async move {
            // It fails when the other side has had enough.
            let _cut = far.write_all(&vec![b'x'; 4 * HANDSHAKE]).await;
            far
        });
        let mut got = vec![0; HANDSHAKE];
        wire.read_exact(&mut got).await.unwrap();
        assert_eq!(wire.buffer.len(), OF_A_STRANGER);
        assert!(wire.read_exact(&mut got).await.is_err());
        drop(wire);
        talk.await.unwrap();
    }

    #[tokio::test]
    async fn a_peer_that_still_writes_reads_our_last_words_and_no_reset() {
        let (mut wire, mut far) = pair().await;
        far.write_all(b"a window that nobody reads").await.unwrap();
        wire.write_all(b"last words").await.unwrap();
        let closing = tokio::spawn(async move { wire.shutdown().await });
        tokio::time::sleep(LINGER / 10).await;
        far.write_all(b"and another").await.unwrap();
        tokio::time::sleep(LINGER / 10).await;
        // With a reset this fails, and h2 stops at the first error of either direction.
        far.write_all(b"and one more").await.unwrap();
        let mut heard = Vec::new();
        far.read_to_end(&mut heard).await.unwrap();
        assert_eq!(heard, b"last words");
        assert!(!closing.is_finished(), "it waits for the peer's end");
        drop(far);
        closing.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_peer_that_never_closes_is_not_waited_for_longer() {
        let (mut wire, far) = pair().await;
        let begun = std::time::Instant::now();
        wire.shutdown().await.unwrap();
        assert!(begun.elapsed() >= LINGER);
        assert!(begun.elapsed() < 3 * LINGER);
        drop(far);
    }
}

//! The TCP connection below TLS, read in large pieces.
//!
//! rustls asks for 4 KiB at a time, so that one full record would cost five calls. This reads as
//! much as there is and hands it on from memory. Writes go through as they are: rustls offers whole
//! records, vectored.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
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
        }
    }

    /// The handshake is done: from here on flow control bounds what comes.
    pub(super) fn peer_is_known(&mut self) {
        self.stranger = None;
        self.wanted = SMALL;
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
        Pin::new(&mut self.tcp).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    use super::*;

    #[tokio::test]
    async fn the_buffer_grows_under_bulk_and_shrinks_after_it_and_loses_nothing() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap());
        let (near, far) = tokio::join!(near, listener.accept());
        let (mut wire, mut far) = (Wire::new(near.unwrap()), far.unwrap().0);
        wire.peer_is_known();
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
}

//! A tunnel from a peer with a certificate and bad manners: bytes of HTTP/2, behind the agent's own
//! guard and against its settings.
//!
//! Whatever comes, the connection ends when its bytes do, every request on it is either refused or
//! names an address and a port, and no more is answered than the guard lets pass.
#![no_main]

use std::{sync::LazyLock, time::Duration};

use libfuzzer_sys::fuzz_target;
use picomesh::proxy::hbone;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    runtime::{Builder, Runtime},
};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Of a handshake, as the agent has it.
const PATIENCE: Duration = Duration::from_secs(5);
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const ACK: u8 = 1;
/// What the guard lets pass at once, and in a second after that for as long as an input may take.
const MOST_SETTINGS: usize = 50 + 10 * 10;
const MOST_PINGS: usize = 100 + 10 * 20;

static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| {
    let runtime = Builder::new_current_thread().enable_time().build();
    runtime.expect("a runtime")
});

fuzz_target!(|data: &[u8]| {
    RUNTIME.block_on(async {
        let (mut peer, ours) = tokio::io::duplex(1 << 20);
        let sent = peer
            .write_all(PREFACE)
            .await
            .and(peer.write_all(data).await);
        sent.expect("there is room for it all");
        // Half closed: we may still answer.
        peer.shutdown().await.expect("it is open");
        let served = tokio::time::timeout(Duration::from_secs(5), serve(ours)).await;
        assert!(
            served.is_ok(),
            "the bytes have ended, the connection has not"
        );
        let mut said = Vec::new();
        peer.read_to_end(&mut said).await.expect("it is closed");
        assert!(acknowledged(&said, SETTINGS) <= MOST_SETTINGS);
        assert!(acknowledged(&said, PING) <= MOST_PINGS);
    });
});

async fn serve(ours: tokio::io::DuplexStream) {
    let Ok((mut connection, _cut)) = hbone::accept(ours, PATIENCE).await else {
        return;
    };
    while let Some(Ok((request, mut respond))) = connection.accept().await {
        let target = hbone::target(&request);
        let claimed = hbone::claimed_client(request.headers());
        let status = match (target, claimed) {
            (Ok(target), Ok(_)) => {
                assert_ne!(target.port(), 0);
                200
            }
            (Err(_), _) | (_, Err(_)) => 400,
        };
        let mut response = http::Response::new(());
        *response.status_mut() = http::StatusCode::from_u16(status).expect("a status");
        // The stream may be reset already.
        let _ = respond.send_response(response, true);
    }
}

/// How many frames of this kind were answered.
fn acknowledged(said: &[u8], kind: u8) -> usize {
    let (mut rest, mut count) = (said, 0);
    while let [a, b, c, this, flags, ..] = *rest {
        count += usize::from(this == kind && flags & ACK != 0);
        let length = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
        rest = rest.get(9 + length..).unwrap_or_default();
    }
    count
}

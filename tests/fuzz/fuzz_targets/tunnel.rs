//! A tunnel from a peer with a certificate and bad manners: bytes of HTTP/2 against our settings.
//!
//! Whatever comes, the connection ends when its bytes do, and every request on it is either
//! refused or names an address and a port.
#![no_main]

use std::{sync::LazyLock, time::Duration};

use libfuzzer_sys::fuzz_target;
use picomesh::proxy::hbone;
use tokio::{
    io::AsyncWriteExt,
    runtime::{Builder, Runtime},
};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

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
    });
});

async fn serve(ours: tokio::io::DuplexStream) {
    let Ok(mut connection) = hbone::server().handshake::<_, bytes::Bytes>(ours).await else {
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

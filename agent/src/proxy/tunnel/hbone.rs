//! What both ends of a tunnel agree on: HTTP/2 settings, and what a CONNECT says.
//!
//! A request names the target in `:authority` (always an address and port, never a name) and the
//! client in `forwarded: for=…` (RFC 7239). `baggage` and `traceparent` are accepted and not
//! believed.
//!
//! Windows: the connection's window is as large as all streams' windows together, so that streams
//! whose reader is slow can never stop the others.

use std::{
    cell::{Cell, RefCell},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Uri, header};
use tokio::io::{AsyncRead, AsyncWrite};

use super::flood::{Cut, Guard};
use crate::proxy::{limits::Share, reason::Reason};

/// What a peer may send on one stream before our side has taken it.
pub(in crate::proxy) const STREAM_WINDOW: usize = 512 * 1024;
/// The same while the memory of the pods that read from it is scarce.
const SQUEEZED_WINDOW: u32 = 16 * 1024;
const WINDOW: u32 = STREAM_WINDOW as u32;
/// Streams that one tunnel carries; more open another tunnel.
pub(super) const STREAMS: u32 = 1024;
const CONNECTION_WINDOW: u32 = WINDOW * STREAMS;
const _: () = assert!(CONNECTION_WINDOW < 1 << 31);
/// Largest DATA frame we take.
pub(super) const FRAME: u32 = 128 * 1024;
/// What one stream may have waiting for the tunnel's socket on our side.
const SEND_BUFFER: usize = 256 * 1024;
/// Header fields of one request.
const HEADERS: u32 = 8 * 1024;
/// A `forwarded` longer than this is nothing we would send.
const LONGEST_FORWARDED: usize = 256;
/// Streams that were reset are remembered for frames still under way. A crowd of connections may
/// end by RST at once, so there are many.
const REMEMBERED_RESETS: usize = 4096;
/// Streams that a peer made us reset by breaking the protocol, in a tunnel's life. An honest one
/// does so only with frames for streams that are long forgotten.
const FAULTS: usize = 16 * 1024;

pub(super) fn client() -> h2::client::Builder {
    let mut builder = h2::client::Builder::new();
    builder
        .initial_window_size(WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME)
        .max_send_buffer_size(SEND_BUFFER)
        .max_header_list_size(HEADERS)
        .max_concurrent_reset_streams(REMEMBERED_RESETS)
        .max_local_error_reset_streams(None)
        .enable_push(false);
    builder
}

/// A tunnel that somebody opened to us.
pub type Accepted<S> = h2::server::Connection<Guard<S>, Bytes>;

/// Accepts a tunnel over `stream`, whose peer is known and not trusted. Nothing that it asks for may
/// stay unfinished for longer than `patience`; [`Cut`] tells if it asked too much.
pub async fn accept<S>(stream: S, patience: Duration) -> Result<(Accepted<S>, Cut), h2::Error>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (guarded, cut) = Guard::server(stream, patience);
    let connection = server().handshake(guarded).await?;
    Ok((connection, cut))
}

fn server() -> h2::server::Builder {
    let mut builder = h2::server::Builder::new();
    builder
        .initial_window_size(WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME)
        .max_send_buffer_size(SEND_BUFFER)
        .max_header_list_size(HEADERS)
        .max_concurrent_streams(STREAMS)
        .max_concurrent_reset_streams(REMEMBERED_RESETS)
        .max_pending_accept_reset_streams(REMEMBERED_RESETS)
        .max_local_error_reset_streams(Some(FAULTS));
    builder
}

/// The streams' windows of one tunnel: large, unless a pod that reads from it slowly has too much in
/// memory. The peer then hears of small ones; what it sent before is still taken.
#[derive(Default)]
pub(super) struct Windows {
    squeezed_by: RefCell<Option<Arc<Share>>>,
    squeezed: Cell<bool>,
}

impl Windows {
    /// `true`: whoever drives the tunnel should look at [`Windows::change`].
    pub(super) fn squeeze(&self, share: &Arc<Share>) -> bool {
        let mut by = self.squeezed_by.borrow_mut();
        let first = by.is_none();
        *by = Some(Arc::clone(share));
        first
    }

    /// Is the pressure over, and the peer not told so?
    pub(super) fn may_grow(&self) -> bool {
        let by = self.squeezed_by.borrow();
        by.as_ref().is_some_and(|share| !share.is_pressed())
    }

    /// Tells the peer by `set` what has changed. It may fail while the last change is not
    /// acknowledged; the next call tries again.
    pub(super) fn change(&self, set: impl FnOnce(u32) -> Result<(), h2::Error>) {
        let squeeze = !self.may_grow() && self.squeezed_by.borrow().is_some();
        if squeeze != self.squeezed.get() {
            let window = if squeeze { SQUEEZED_WINDOW } else { WINDOW };
            if set(window).is_err() {
                return;
            }
            self.squeezed.set(squeeze);
        }
        if !squeeze {
            self.squeezed_by.borrow_mut().take();
        }
    }
}

/// A CONNECT to `target` for `client`.
pub fn connect(client: SocketAddr, target: SocketAddr) -> Option<Request<()>> {
    let authority = Bytes::from(target.to_string());
    let mut request = Request::new(());
    *request.method_mut() = Method::CONNECT;
    *request.uri_mut() = Uri::from_maybe_shared(authority).ok()?;
    let mut forwarded =
        HeaderValue::from_maybe_shared(Bytes::from(format!("for=\"{client}\""))).ok()?;
    // It differs each time: keep it out of the compression's memory.
    forwarded.set_sensitive(true);
    request.headers_mut().insert(header::FORWARDED, forwarded);
    Some(request)
}

/// The target of a CONNECT: an address and a port, nothing to look up.
pub fn target<B>(request: &Request<B>) -> Result<SocketAddr, Reason> {
    if request.method() != Method::CONNECT {
        return Err(Reason::BadRequest);
    }
    let authority = request.uri().authority().ok_or(Reason::BadRequest)?;
    let target: SocketAddr = authority.as_str().parse().map_err(|_| Reason::BadTarget)?;
    if target.port() == 0 {
        return Err(Reason::BadTarget);
    }
    Ok(SocketAddr::new(target.ip().to_canonical(), target.port()))
}

/// The client that the request claims to speak for. No port: zero.
pub fn claimed_client(headers: &HeaderMap) -> Result<Option<SocketAddr>, Reason> {
    let mut values = headers.get_all(header::FORWARDED).iter();
    let Some(value) = values.next() else {
        return Ok(None);
    };
    // Two of them would let each reader choose.
    if values.next().is_some() || value.len() > LONGEST_FORWARDED {
        return Err(Reason::BadRequest);
    }
    let value = value.to_str().map_err(|_| Reason::BadRequest)?;
    // A list of hops is nothing that a node's agent sends.
    if value.contains(',') {
        return Err(Reason::BadRequest);
    }
    let mut client = None;
    for pair in value.split(';') {
        let Some((name, node)) = pair.trim().split_once('=') else {
            continue;
        };
        if name.eq_ignore_ascii_case("for") {
            if client.is_some() {
                return Err(Reason::BadRequest);
            }
            client = Some(node_address(node.trim()).ok_or(Reason::BadRequest)?);
        }
    }
    Ok(client)
}

/// RFC 7239's node: `192.0.2.1`, `"192.0.2.1:80"`, `"[2001:db8::1]"`, `"[2001:db8::1]:80"`.
fn node_address(node: &str) -> Option<SocketAddr> {
    let node = match node.strip_prefix('"') {
        Some(rest) => rest.strip_suffix('"')?,
        None => node,
    };
    let address = match node.parse::<SocketAddr>() {
        Ok(address) => address,
        Err(_) => {
            let ip = node
                .strip_prefix('[')
                .and_then(|ip| ip.strip_suffix(']'))
                .unwrap_or(node);
            SocketAddr::new(ip.parse::<IpAddr>().ok()?, 0)
        }
    };
    Some(SocketAddr::new(address.ip().to_canonical(), address.port()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    fn claimed(values: &[&str]) -> Result<Option<SocketAddr>, Reason> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(header::FORWARDED, value.parse().unwrap());
        }
        claimed_client(&headers)
    }

    #[test]
    fn what_we_send_is_what_we_read() {
        for client in ["10.1.2.3:4567", "[fd00::1]:4567"] {
            let client: SocketAddr = client.parse().unwrap();
            let target: SocketAddr = "[fd00::2]:80".parse().unwrap();
            let request = connect(client, target).unwrap();
            assert_eq!(request.uri().to_string(), "[fd00::2]:80");
            assert_eq!(claimed_client(request.headers()), Ok(Some(client)));
        }
    }

    #[test]
    fn other_peoples_forwarded_is_read() {
        let bare: SocketAddr = "10.1.2.3:0".parse().unwrap();
        assert_eq!(claimed(&["for=10.1.2.3"]), Ok(Some(bare)));
        assert_eq!(
            claimed(&["by=web.shop.svc; For=\"10.1.2.3\""]),
            Ok(Some(bare))
        );
        assert_eq!(claimed(&["for=\"[::ffff:10.1.2.3]\""]), Ok(Some(bare)));
        assert_eq!(
            claimed(&["for=\"[fd00::1]\""]),
            Ok(Some("[fd00::1]:0".parse().unwrap()))
        );
        assert_eq!(claimed(&[]), Ok(None));
        assert_eq!(claimed(&["proto=http"]), Ok(None));
    }

    #[test]
    fn what_could_be_read_in_two_ways_is_refused() {
        for values in [
            &["for=10.1.2.3", "for=10.1.2.4"][..],
            &["for=10.1.2.3;for=10.1.2.4"],
            &["for=10.1.2.3, for=10.1.2.4"],
            &["for=unknown"],
            &["for=\"10.1.2.3"],
            &["for=_secret"],
        ] {
            assert_eq!(claimed(values), Err(Reason::BadRequest), "{values:?}");
        }
        assert_eq!(
            claimed(&[&format!("for=\"{}\"", "1".repeat(300))]),
            Err(Reason::BadRequest)
        );
    }
}

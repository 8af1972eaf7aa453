//! `GET /metrics`, `/ready` and `/live`, for Prometheus and for people. Whoever reaches the node's
//! address can ask; so there is nothing to change here, and connections, their age and the work of
//! encoding are bounded.

use std::{
    convert::Infallible,
    io,
    net::{Ipv4Addr, SocketAddr},
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::Incoming,
    header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::timeout,
};
use tracing::{debug, warn};

use crate::{
    config::wildcard_of_both_families, drain, metrics::Metrics, places::Places,
    readiness::Readiness,
};

/// More than scrapers and people need; the next one waits in the backlog.
const CONNECTIONS: usize = 64;
/// For a request's head.
const HEAD: Duration = Duration::from_secs(5);
/// For a connection, requests and answers and pauses between them.
const LIFE: Duration = Duration::from_secs(120);

/// Bound and not yet served.
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
}

/// What is shown.
#[derive(Clone)]
pub struct Shown {
    pub metrics: Arc<Metrics>,
    pub readiness: Readiness,
}

impl Server {
    /// `[::]` means both families; where the kernel has no IPv6 it means IPv4.
    pub fn bind(address: SocketAddr) -> io::Result<Self> {
        let listener = match listen(address) {
            Err(_) if wildcard_of_both_families(address) => {
                listen((Ipv4Addr::UNSPECIFIED, address.port()).into())?
            }
            other => other?,
        };
        let address = listener.local_addr()?;
        Ok(Self { listener, address })
    }

    /// With a socket that listens already: the agent before gave it away, and both accept from it
    /// until that one stops.
    pub fn inherit(listener: std::net::TcpListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let listener = TcpListener::from_std(listener)?;
        Ok(Self { listener, address })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// A copy of the socket, for a successor.
    pub fn socket(&self) -> io::Result<OwnedFd> {
        self.listener.as_fd().try_clone_to_owned()
    }

    /// Serves until the end begins; answers that are under way are given.
    pub async fn serve(self, shown: Shown, mut drain: drain::Guard) {
        let places = Places::new("metrics port", CONNECTIONS);
        // One at a time: encoding is the only work here that takes milliseconds and memory.
        let encoding = Arc::new(Semaphore::new(1));
        loop {
            let ((stream, peer), place) = tokio::select! {
                next = places.next(|| self.listener.accept()) => next,
                () = drain.begun() => return,
            };
            let (shown, encoding, drain) = (shown.clone(), encoding.clone(), drain.clone());
            tokio::spawn(async move {
                serve_connection(stream, peer, shown, encoding, drain).await;
                drop(place);
            });
        }
    }
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(!wildcard_of_both_families(address))?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(128)?;
    TcpListener::from_std(socket.into())
}

async fn serve_connection(
    stream: TcpStream,
    peer: SocketAddr,
    shown: Shown,
    encoding: Arc<Semaphore>,
    mut drain: drain::Guard,
) {
    let service = service_fn(move |request: Request<Incoming>| {
        let (shown, encoding) = (shown.clone(), encoding.clone());
        async move { Ok::<_, Infallible>(answer(&request, &shown, &encoding).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD)
        .max_buf_size(16 * 1024)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    let served = timeout(LIFE, async {
        tokio::select! {
            served = connection.as_mut() => served,
            () = drain.begun() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        }
    });
    match served.await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => debug!(%peer, %error, "a connection to the metrics port broke"),
        Err(_) => debug!(%peer, "a connection to the metrics port was open for too long"),
    }
}

async fn answer<B>(
    request: &Request<B>,
    shown: &Shown,
    encoding: &Semaphore,
) -> Response<Full<Bytes>> {
    let known = ["/metrics", "/ready", "/live"].contains(&request.uri().path());
    if !known {
        return text(
            StatusCode::NOT_FOUND,
            "there are /metrics, /ready and /live\n".into(),
        );
    }
    if request.method() != Method::GET {
        let mut response = text(StatusCode::METHOD_NOT_ALLOWED, "only GET\n".into());
        response
            .headers_mut()
            .insert(ALLOW, HeaderValue::from_static("GET"));
        return response;
    }
    match request.uri().path() {
        "/live" => text(StatusCode::OK, "live\n".into()),
        "/ready" => {
            let pending = shown.readiness.pending();
            if pending.is_empty() {
                text(StatusCode::OK, "ready\n".into())
            } else {
                let body = format!("not ready, pending: {}\n", pending.join(", "));
                text(StatusCode::SERVICE_UNAVAILABLE, body)
            }
        }
        _ => metrics(shown, encoding).await,
    }
}

async fn metrics(shown: &Shown, encoding: &Semaphore) -> Response<Full<Bytes>> {
    // The semaphore is never closed.
    let _one = encoding.acquire().await.ok();
    let metrics = shown.metrics.clone();
    let encoded = tokio::task::spawn_blocking(move || metrics.encode()).await;
    let problem = match encoded {
        Ok(Ok(body)) => {
            let mut response = text(StatusCode::OK, body);
            response.headers_mut().insert(
                CONTENT_TYPE,
                HeaderValue::from_static(crate::metrics::TEXT_FORMAT),
            );
            return response;
        }
        Ok(Err(error)) => error.to_string(),
        Err(error) => error.to_string(),
    };
    warn!(error = problem, "metrics could not be encoded");
    text(
        StatusCode::INTERNAL_SERVER_ERROR,
        format!("metrics could not be encoded: {problem}\n"),
    )
}

fn text(status: StatusCode, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(
        CONTENT_TYPE,
        HeaderValue::from_static("text/plain; charset=utf-8"),
    );
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use crate::metrics::MetricsSettings;

    use super::*;

    struct Served {
        address: SocketAddr,
        readiness: Readiness,
        drain: drain::Drain,
        task: tokio::task::JoinHandle<()>,
    }

    async fn serve(address: &str) -> Served {
        let server = Server::bind(address.parse().unwrap()).unwrap();
        let mut address = server.address();
        if address.ip().is_unspecified() {
            address.set_ip(Ipv4Addr::LOCALHOST.into());
        }
        let readiness = Readiness::new();
        let (drain, guard) = drain::Drain::new();
        let shown = Shown {
            metrics: Metrics::new(MetricsSettings::default()),
            readiness: readiness.clone(),
        };
        let task = tokio::spawn(server.serve(shown, guard));
        Served {
            address,
            readiness,
            drain,
            task,
        }
    }

    async fn send(address: SocketAddr, method: &str, path: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!("{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut response = String::new();
        stream.read_to_string(&mut response).await.unwrap();
        response
    }

    #[tokio::test]
    async fn readiness_names_what_is_awaited_until_it_is_there() {
        let served = serve("127.0.0.1:0").await;
        let task = served.readiness.register("certificates");
        let response = send(served.address, "GET", "/ready").await;
        assert!(response.starts_with("HTTP/1.1 503"), "{response}");
        assert!(response.ends_with("not ready, pending: certificates\n"));
        task.done();
        let response = send(served.address, "GET", "/ready").await;
        assert!(response.starts_with("HTTP/1.1 200"), "{response}");
    }

    #[tokio::test]
    async fn metrics_come_in_prometheus_format_over_both_families() {
        let served = serve("[::]:0").await;
        let response = send(served.address, "GET", "/metrics").await;
        assert!(response.starts_with("HTTP/1.1 200"), "{response}");
        assert!(response.contains("content-type: text/plain; version=0.0.4"));
        assert!(response.contains("\nprocess_start_time_seconds "));
        let response = send(served.address, "GET", "/live").await;
        assert!(response.starts_with("HTTP/1.1 200"), "{response}");
    }

    #[tokio::test]
    async fn nothing_else_is_served_and_nothing_can_be_changed() {
        let served = serve("127.0.0.1:0").await;
        let response = send(served.address, "GET", "/shutdown").await;
        assert!(response.starts_with("HTTP/1.1 404"), "{response}");
        for method in ["POST", "PUT", "DELETE"] {
            let response = send(served.address, method, "/ready").await;
            assert!(response.starts_with("HTTP/1.1 405"), "{response}");
        }
    }

    #[tokio::test]
    async fn more_connections_than_places_wait_and_are_served() {
        let served = serve("127.0.0.1:0").await;
        let mut idle = Vec::new();
        for _ in 0..CONNECTIONS {
            idle.push(TcpStream::connect(served.address).await.unwrap());
        }
        let late = tokio::spawn(send(served.address, "GET", "/live"));
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(!late.is_finished(), "all places are taken");
        idle.pop();
        let response = timeout(HEAD, late).await.unwrap().unwrap();
        assert!(response.starts_with("HTTP/1.1 200"), "{response}");
    }

    #[tokio::test]
    async fn a_drain_ends_the_server() {
        let served = serve("127.0.0.1:0").await;
        let drained = served.drain.drain(Duration::from_secs(5)).await;
        assert_eq!(drained, drain::Drained::Finished);
        served.task.await.unwrap();
    }
}

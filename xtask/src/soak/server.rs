//! The server in a pod: one thread that accepts, one for each conversation.

use std::{
    io::ErrorKind,
    net::{Ipv6Addr, SocketAddr, TcpListener},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context, Result};
use picomesh_tests::Pod;
use socket2::{Domain, Protocol, Socket, Type};

use super::{stage::Shared, talk};

const STACK: usize = 256 * 1024;

pub(crate) struct Server {
    stop: Arc<AtomicBool>,
    accepted: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Listens on both families in the pod when this returns.
    pub(crate) fn start(pod: &Pod, port: u16, shared: &Arc<Shared>) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let accepted = Arc::new(AtomicU64::new(0));
        let (ready, listening) = mpsc::sync_channel(1);
        let serving = Serving {
            pod: pod.name().to_owned(),
            stop: stop.clone(),
            accepted: accepted.clone(),
            shared: shared.clone(),
        };
        let thread = pod
            .netns()
            .spawn("soak-server", move || match listen(port) {
                Ok(listener) => {
                    let _ = ready.send(Ok(()));
                    serving.serve(&listener);
                }
                Err(e) => {
                    let _ = ready.send(Err(e));
                }
            })?;
        listening
            .recv()
            .context("the server's thread is gone")?
            .with_context(|| format!("listen on port {port} in {}", pod.name()))?;
        Ok(Self {
            stop,
            accepted,
            thread: Some(thread),
        })
    }

    pub(crate) fn accepted(&self) -> u64 {
        self.accepted.load(Ordering::Relaxed)
    }

    /// Ends the listener and every conversation, as a program that is killed does.
    pub(crate) fn stop(self) {
        drop(self);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Serving {
    pod: String,
    stop: Arc<AtomicBool>,
    accepted: Arc<AtomicU64>,
    shared: Arc<Shared>,
}

impl Serving {
    fn serve(&self, listener: &TcpListener) {
        let mut conversations: Vec<JoinHandle<()>> = Vec::new();
        while !self.stop.load(Ordering::Relaxed) {
            match listener.accept() {
                Ok((stream, _)) => {
                    self.accepted.fetch_add(1, Ordering::Relaxed);
                    let (pod, stop) = (self.pod.clone(), self.stop.clone());
                    let shared = self.shared.clone();
                    let talking = shared.talks();
                    let conversation = thread::Builder::new().stack_size(STACK).spawn(move || {
                        let _talking = talking;
                        if stream.set_nonblocking(false).is_err() {
                            return;
                        }
                        if let Some((connection, seen)) = talk::server(stream, &stop) {
                            shared.ledger.server(connection, pod, seen);
                        }
                    });
                    // Failing to start a thread closes the connection: the client sees it.
                    conversations.extend(conversation);
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    conversations.retain(|conversation| !conversation.is_finished());
                    thread::sleep(Duration::from_millis(1));
                }
                Err(_) => thread::sleep(Duration::from_millis(1)),
            }
        }
        // Their last words belong into the ledger before the server counts as stopped.
        for conversation in conversations {
            let _ = conversation.join();
        }
    }
}

fn listen(port: u16) -> std::io::Result<TcpListener> {
    let socket = Socket::new(Domain::IPV6, Type::STREAM, Some(Protocol::TCP))?;
    socket.set_only_v6(false)?;
    socket.set_reuse_address(true)?;
    socket.bind(&SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)).into())?;
    socket.listen(4096)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

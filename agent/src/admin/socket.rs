//! `admin.sock` in the run directory: one request, one answer, each a line of JSON. Only root may
//! connect: the file is 0600, and the peer's uid is asked of the kernel besides.

use std::{
    fs, io,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use nix::unistd::geteuid;
use rustix::fs::{Mode, fchmod};
use socket2::{Domain, SockAddr, Socket, Type};
use thiserror::Error;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream},
    time::timeout,
};
use tracing::debug;

use crate::{drain, places::Places};

use super::{Request, Response, SharedViews, Views};

pub const NAME: &str = "admin.sock";

const CONNECTIONS: usize = 16;
const BACKLOG: i32 = 128;
const PATIENCE: Duration = Duration::from_secs(5);
const MAX_REQUEST: u64 = 4 * 1024;

#[derive(Debug, Error)]
pub enum SocketError {
    #[error("{path} is there and is no socket; move it away")]
    Occupied { path: PathBuf },
    #[error("cannot listen at {path}")]
    Bind { path: PathBuf, source: io::Error },
}

/// Bound and not yet served.
pub struct Server {
    listener: UnixListener,
    path: PathBuf,
    inode: u64,
}

impl Server {
    /// Whoever binds holds the run directory's lock, so a socket found there is a dead agent's.
    pub fn bind(run_dir: &Path) -> Result<Self, SocketError> {
        let server = Self::beside(run_dir)?;
        server.move_in()?;
        Ok(server)
    }

    /// Listens, but where nobody calls: another agent's socket is in the place until
    /// [`Server::move_in`].
    pub fn beside(run_dir: &Path) -> Result<Self, SocketError> {
        let path = run_dir.join(NAME);
        let failed = |source| SocketError::Bind {
            path: path.clone(),
            source,
        };
        match fs::symlink_metadata(&path) {
            Ok(found) if !found.file_type().is_socket() => {
                return Err(SocketError::Occupied { path });
            }
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            Ok(_) | Err(_) => {}
        }
        let new = beside(&path);
        match fs::remove_file(&new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            Ok(()) | Err(_) => {}
        }
        let listener = listen(&new).map_err(failed)?;
        let inode = fs::symlink_metadata(&new).map_err(failed)?.ino();
        Ok(Self {
            listener,
            path,
            inode,
        })
    }

    /// Takes the place, and that of whatever socket is there, in one step.
    pub fn move_in(&self) -> Result<(), SocketError> {
        fs::rename(beside(&self.path), &self.path).map_err(|source| SocketError::Bind {
            path: self.path.clone(),
            source,
        })
    }

    pub async fn serve(self, views: Views, mut drain: drain::Guard) {
        let views: SharedViews = Arc::new(views);
        let places = Places::new("admin socket", CONNECTIONS);
        loop {
            let ((stream, _), place) = tokio::select! {
                next = places.next(|| self.listener.accept()) => next,
                // To the very end: a drain is what one wants to look at.
                () = drain.forced() => break,
            };
            let views = views.clone();
            tokio::spawn(async move {
                let served = timeout(PATIENCE, serve_one(stream, &views)).await;
                match served {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => debug!(%error, "a caller of the admin socket broke"),
                    Err(_) => debug!("a caller of the admin socket was too slow"),
                }
                drop(place);
            });
        }
        // The file goes before the guard: whoever waits for the guard may end the process then.
        self.remove();
        drop(drain);
    }

    /// Not when it is dropped: then a successor is about to take its place, or the file is found
    /// dead by the next.
    fn remove(self) {
        let ours = fs::symlink_metadata(&self.path).is_ok_and(|found| found.ino() == self.inode);
        if ours && let Err(error) = fs::remove_file(&self.path) {
            debug!(%error, "the admin socket was gone already");
        }
    }
}

/// For its owner alone from the first moment: the directory may be one that others can enter. What
/// is bound gets the mode that the socket has.
fn listen(path: &Path) -> io::Result<UnixListener> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM.cloexec().nonblocking(), None)?;
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    socket.bind(&SockAddr::unix(path)?)?;
    socket.listen(BACKLOG)?;
    UnixListener::from_std(socket.into())
}

/// Where a socket waits for its place.
fn beside(path: &Path) -> PathBuf {
    path.with_extension("sock.new")
}

async fn serve_one(mut stream: UnixStream, views: &SharedViews) -> io::Result<()> {
    let peer = stream.peer_cred()?.uid();
    let response = if peer != 0 && peer != geteuid().as_raw() {
        Response::Error(format!("uid {peer} may not ask; only root may"))
    } else {
        let (reader, _) = stream.split();
        let mut line = String::new();
        BufReader::new(reader.take(MAX_REQUEST))
            .read_line(&mut line)
            .await?;
        match serde_json::from_str::<Request>(&line) {
            Ok(request) => {
                let views = views.clone();
                // Big answers take milliseconds; the runtime has other callers.
                tokio::task::spawn_blocking(move || views.answer(request))
                    .await
                    .unwrap_or_else(|error| Response::Error(error.to_string()))
            }
            Err(error) => Response::Error(format!(
                "the request is not understood ({error}); are agent and caller of one version?"
            )),
        }
    };
    let mut line = serde_json::to_vec(&response)?;
    line.push(b'\n');
    stream.write_all(&line).await?;
    stream.shutdown().await
}

/// Where the one lives that answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// It has a process number here.
    Here,
    /// In another container: it has none.
    Elsewhere,
}

/// Asks the agent of `run_dir`.
pub async fn ask(run_dir: &Path, request: &Request) -> Result<serde_json::Value, AskError> {
    ask_peer(run_dir, request).await?.1
}

/// The same, and who it is that answers, or does not.
pub(super) async fn ask_peer(
    run_dir: &Path,
    request: &Request,
) -> Result<(Peer, Result<serde_json::Value, AskError>), AskError> {
    let path = run_dir.join(NAME);
    let connected = UnixStream::connect(&path).await;
    let peer = connected.and_then(|stream| Ok((stream.peer_cred()?.pid(), stream)));
    let (number, stream) = peer.map_err(|source| not_asked(path.clone(), source))?;
    let peer = match number {
        None | Some(0) => Peer::Elsewhere,
        Some(_) => Peer::Here,
    };
    Ok((peer, ask_at(path, stream, request).await))
}

async fn ask_at(
    path: PathBuf,
    stream: UnixStream,
    request: &Request,
) -> Result<serde_json::Value, AskError> {
    match timeout(PATIENCE * 2, exchange(stream, request)).await {
        Ok(Ok(line)) => match serde_json::from_str(&line) {
            Ok(Response::Ok(value)) => Ok(value),
            Ok(Response::Error(reason)) => Err(AskError::Refused { reason }),
            Err(_) => Err(AskError::Garbled { path }),
        },
        Ok(Err(source)) => Err(not_asked(path, source)),
        Err(_) => Err(AskError::Silent { path }),
    }
}

fn not_asked(path: PathBuf, source: io::Error) -> AskError {
    let kind = source.kind();
    if kind == io::ErrorKind::NotFound || kind == io::ErrorKind::ConnectionRefused {
        AskError::NoAgent { path }
    } else if kind == io::ErrorKind::PermissionDenied {
        AskError::NotRoot { path }
    } else {
        AskError::Io { path, source }
    }
}

async fn exchange(mut stream: UnixStream, request: &Request) -> io::Result<String> {
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    stream.write_all(&line).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(answer)
}

#[derive(Debug, Error)]
pub enum AskError {
    #[error("no agent answers at {path}; is it running, and is --run-dir the same?")]
    NoAgent { path: PathBuf },
    #[error("{path} is root's; ask as root")]
    NotRoot { path: PathBuf },
    #[error("the agent at {path} does not answer")]
    Silent { path: PathBuf },
    #[error("the agent at {path} answered something else than JSON")]
    Garbled { path: PathBuf },
    #[error("{reason}")]
    Refused { reason: String },
    #[error("talking to the agent at {path}")]
    Io { path: PathBuf, source: io::Error },
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn views() -> Views {
        Views {
            readiness: Box::new(|| json!({"ready": true, "awaited": []})),
            state: Box::new(|| json!({"version": 7})),
            pods: Box::new(|| json!([{"name": "shop/cart"}])),
            tunnels: Box::new(|| json!([])),
            certificates: Box::new(|| json!([])),
            policies: Box::new(|_| Ok(json!([]))),
            limits: Box::new(|| json!({})),
            log_level: None,
        }
    }

    fn serve(dir: &Path) -> drain::Drain {
        let server = Server::bind(dir).unwrap();
        let (drain, guard) = drain::Drain::new();
        tokio::spawn(server.serve(views(), guard));
        drain
    }

    #[tokio::test]
    async fn a_question_is_answered_and_many_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let _drain = serve(dir.path());
        let asked = (0..50).map(|_| ask(dir.path(), &Request::Pods));
        for answer in futures_util::future::join_all(asked).await {
            assert_eq!(answer.unwrap(), json!([{"name": "shop/cart"}]));
        }
        let state = ask(dir.path(), &Request::State).await.unwrap();
        assert_eq!(state["version"], 7);
    }

    #[tokio::test]
    async fn a_probe_is_answered_by_an_agent_of_the_own_container() {
        let dir = tempfile::tempdir().unwrap();
        let _drain = serve(dir.path());
        let (peer, answer) = ask_peer(dir.path(), &Request::Readiness).await.unwrap();
        assert_eq!(peer, Peer::Here);
        assert_eq!(answer.unwrap()["ready"], true);
    }

    #[tokio::test]
    async fn the_socket_is_for_its_owner_alone() {
        let dir = tempfile::tempdir().unwrap();
        let _drain = serve(dir.path());
        let mode = fs::metadata(dir.path().join(NAME)).unwrap().permissions();
        assert_eq!(mode.mode() & 0o777, 0o600);
    }

    #[tokio::test]
    async fn a_dead_agents_socket_is_replaced_and_a_file_is_not() {
        let dir = tempfile::tempdir().unwrap();
        drop(std::os::unix::net::UnixListener::bind(dir.path().join(NAME)).unwrap());
        assert!(matches!(
            ask(dir.path(), &Request::State).await,
            Err(AskError::NoAgent { .. })
        ));
        let _drain = serve(dir.path());
        ask(dir.path(), &Request::State).await.unwrap();

        let other = tempfile::tempdir().unwrap();
        fs::write(other.path().join(NAME), "precious").unwrap();
        assert!(matches!(
            Server::bind(other.path()),
            Err(SocketError::Occupied { .. })
        ));
        assert_eq!(fs::read(other.path().join(NAME)).unwrap(), b"precious");
    }

    #[tokio::test]
    async fn the_next_server_takes_the_path_and_the_one_before_leaves_it() {
        let dir = tempfile::tempdir().unwrap();
        let before = serve(dir.path());
        let next = Server::beside(dir.path()).unwrap();
        ask(dir.path(), &Request::State).await.unwrap();
        next.move_in().unwrap();
        let (_drain, guard) = drain::Drain::new();
        tokio::spawn(next.serve(views(), guard));
        before.drain(Duration::ZERO).await;
        ask(dir.path(), &Request::State).await.unwrap();
    }

    #[tokio::test]
    async fn nonsense_and_oversize_are_answered_with_a_reason() {
        let dir = tempfile::tempdir().unwrap();
        let _drain = serve(dir.path());
        for line in [
            "{\"subject\":\"shutdown\"}\n".to_owned(),
            "x".repeat(8_000) + "\n",
        ] {
            let mut stream = UnixStream::connect(dir.path().join(NAME)).await.unwrap();
            // What is beyond the bound may meet a closed socket.
            let _ = stream.write_all(line.as_bytes()).await;
            let mut answer = Vec::new();
            let _ = stream.read_to_end(&mut answer).await;
            let answer = String::from_utf8(answer).unwrap();
            assert!(answer.contains("is not understood"), "{answer}");
        }
    }

    #[tokio::test]
    async fn it_answers_while_the_agent_drains_and_is_gone_after() {
        let dir = tempfile::tempdir().unwrap();
        let server = Server::bind(dir.path()).unwrap();
        let (drain, guard) = drain::Drain::new();
        let slow = guard.clone();
        let served = tokio::spawn(server.serve(views(), guard));
        let drained = tokio::spawn(drain.drain(Duration::from_millis(200)));
        tokio::time::sleep(Duration::from_millis(50)).await;
        ask(dir.path(), &Request::State).await.unwrap();
        drop(slow);
        drained.await.unwrap();
        served.await.unwrap();
        assert!(!dir.path().join(NAME).exists());
    }
}

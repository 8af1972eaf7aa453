//! The server and the plugin, each as it is, over the real socket.

use std::{
    collections::HashMap,
    ffi::OsString,
    fs::{self, File},
    os::unix::fs::PermissionsExt,
    time::Duration,
};

use parking_lot::Mutex;
use serde_json::Value;
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::{
    sync::watch,
    task::{AbortHandle, spawn_blocking},
    time::sleep,
};

use super::*;
use crate::cni::{intent::Intent, message::PROTOCOL, plugin, sandboxes::Paths};

/// On nsfs, and not this process's network: all that is seen of a namespace before it is entered.
const NAMESPACE: &str = "/proc/self/ns/uts";

#[derive(Default)]
struct Known(Mutex<HashMap<String, Standing>>, Mutex<Option<Named>>);

impl Known {
    fn set(&self, uid: &str, standing: Standing) {
        self.0.lock().insert(uid.into(), standing);
    }
}

impl Pods for Known {
    fn standing(&self, uid: &str) -> Standing {
        self.0.lock().get(uid).cloned().unwrap_or(Standing::Unknown)
    }

    /// `shop/cart`, as every call here names it.
    fn named(&self, namespace: &str, name: &str) -> Option<Named> {
        assert_eq!((namespace, name), ("shop", "cart"));
        self.1.lock().clone()
    }
}

struct World {
    dir: tempfile::TempDir,
    known: Arc<Known>,
    paths: watch::Receiver<Paths>,
    drain: drain::Drain,
    serving: AbortHandle,
}

fn serve() -> World {
    let dir = tempfile::tempdir().unwrap();
    let intent = Intent::of(&Intent::default(), [("shop", true)], [], false);
    intent.write(&dir.path().join("cni.json")).unwrap();
    let server = Server::beside(dir.path()).unwrap();
    server.move_in().unwrap();
    let known = Arc::new(Known::default());
    let (sandboxes, paths) = Sandboxes::new(Vec::new());
    let (drain, guard) = drain::Drain::new();
    let patience = Patience {
        question: Duration::from_millis(300),
        known: Duration::from_millis(500),
        captured: Duration::from_millis(800),
    };
    let serving = tokio::spawn(server.serve(known.clone(), sandboxes, patience, guard));
    World {
        dir,
        known,
        paths,
        drain,
        serving: serving.abort_handle(),
    }
}

fn inode() -> u64 {
    NetnsId::at(Path::new(NAMESPACE)).unwrap().inode
}

impl World {
    /// A call of the plugin, as the runtime makes it.
    async fn call(&self, command: &'static str, uid: &str, sandbox: &str) -> (bool, String) {
        let run_dir = self.dir.path().display();
        let input = format!(
            r#"{{"cniVersion":"1.0.0","runDir":"{run_dir}","intent":"{run_dir}/cni.json",
            "prevResult":{{"cniVersion":"1.0.0"}}}}"#
        );
        let arguments = format!("K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart;K8S_POD_UID={uid}");
        let variables = HashMap::from([
            ("CNI_COMMAND", command.to_owned()),
            ("CNI_CONTAINERID", sandbox.to_owned()),
            ("CNI_NETNS", NAMESPACE.to_owned()),
            ("CNI_ARGS", arguments),
        ]);
        let patience = plugin::Patience {
            answer: Duration::from_secs(10),
            agent: Duration::ZERO,
            farewell: Duration::from_secs(10),
        };
        let output = spawn_blocking(move || {
            let find = |name: &str| variables.get(name).map(OsString::from);
            plugin::run(find, input.as_bytes(), patience)
        });
        let output = output.await.unwrap();
        (output.success, String::from_utf8(output.text).unwrap())
    }

    async fn refusal(&self, uid: &str) -> String {
        let (success, text) = self.call("ADD", uid, "s").await;
        assert!(!success, "{text}");
        let error: Value = serde_json::from_str(&text).unwrap();
        error["msg"].as_str().unwrap().to_owned()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_starts_when_it_is_captured_in_the_very_namespace() {
    let world = serve();
    // The sandbox before this one is captured still.
    world.known.set("u", Standing::Captured { netns: 1 });
    let known = Arc::clone(&world.known);
    let mut paths = world.paths.clone();
    let captured = tokio::spawn(async move {
        paths.changed().await.unwrap();
        assert!(paths.borrow().contains_key("u"), "{:?}", *paths.borrow());
        known.set("u", Standing::Awaited { reason: None });
        sleep(Duration::from_millis(100)).await;
        let netns = inode();
        known.set("u", Standing::Captured { netns });
    });
    let begun = Instant::now();
    let (success, text) = world.call("ADD", "u", "s").await;
    assert!(success, "{text}");
    assert!(begun.elapsed() >= Duration::from_millis(100));
    captured.await.unwrap();

    world.call("DEL", "u", "another").await;
    assert!(world.paths.borrow().contains_key("u"));
    world.call("DEL", "u", "s").await;
    assert!(world.paths.borrow().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_outside_the_mesh_starts_at_once_and_one_nobody_knows_is_left_to_the_plugin() {
    let world = serve();
    world.known.set("out", Standing::NotMeshed);
    assert!(world.call("ADD", "out", "s").await.0);
    let message = world.refusal("nobody").await;
    assert!(message.contains("not heard of the pod"), "{message}");
    assert!(
        message.contains("namespace shop is in the mesh"),
        "{message}"
    );
    let message = world.refusal("").await;
    assert!(message.contains("uid"), "{message}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_static_pod_starts_and_without_a_uid_the_name_counts() {
    let world = serve();
    let named = |uid: &str, mirror_of: Option<&str>| {
        *world.known.1.lock() = Some(Named {
            uid: uid.into(),
            mirror_of: mirror_of.map(Arc::from),
        });
    };
    named("mirror", Some("5e1f"));
    assert!(world.call("ADD", "5e1f", "s").await.0);
    assert!(world.call("CHECK", "5e1f", "s").await.0);
    // A mirror that is still there says nothing of the next pod with its name.
    let message = world.refusal("next").await;
    assert!(message.contains("not heard of the pod"), "{message}");

    named("u", None);
    let netns = inode();
    world.known.set("u", Standing::Captured { netns });
    assert!(world.call("ADD", "", "s").await.0);
    assert!(world.paths.borrow().contains_key("u"));
    world.call("DEL", "", "s").await;
    assert!(!world.paths.borrow().contains_key("u"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn why_a_pod_cannot_be_captured_is_told_after_a_bounded_time() {
    let world = serve();
    let reason = Some("no_slot: all 256 places are taken".to_owned());
    world.known.set("u", Standing::Awaited { reason });
    let begun = Instant::now();
    let message = world.refusal("u").await;
    assert!(begun.elapsed() < Duration::from_secs(5));
    assert!(message.contains("all 256 places are taken"), "{message}");
    world.known.set("old", Standing::Captured { netns: 1 });
    let message = world.refusal("old").await;
    assert!(message.contains("sandbox before"), "{message}");
    let (success, text) = world.call("CHECK", "u", "s").await;
    assert!(!success && text.contains("all 256 places"), "{text}");
    assert!(world.call("CHECK", "old", "s").await.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_waits_when_the_agent_ends_is_hung_up_on() {
    let world = serve();
    world.known.set("u", Standing::Awaited { reason: None });
    let World {
        dir,
        known,
        paths,
        drain,
        serving,
    } = world;
    tokio::spawn(async move {
        sleep(Duration::from_millis(100)).await;
        drain.drain(Duration::from_secs(1)).await;
    });
    let (other, _guard) = drain::Drain::new();
    let world = World {
        dir,
        known,
        paths,
        drain: other,
        serving,
    };
    let begun = Instant::now();
    let message = world.refusal("u").await;
    assert!(begun.elapsed() < Duration::from_millis(700));
    assert!(message.contains("ended before it answered"), "{message}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_waits_when_the_place_is_anothers_is_hung_up_on_while_connections_finish() {
    let world = serve();
    world.known.set("u", Standing::Awaited { reason: None });
    let serving = world.serving.clone();
    tokio::spawn(async move {
        sleep(Duration::from_millis(100)).await;
        serving.abort();
    });
    let begun = Instant::now();
    let message = world.refusal("u").await;
    assert!(begun.elapsed() < Duration::from_millis(700));
    assert!(message.contains("ended before it answered"), "{message}");
    // The drain has not even begun.
    world.drain.drain(Duration::from_secs(1)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_that_wait_for_their_capture_hold_up_nobody() {
    let world = serve();
    world.known.set("u", Standing::Awaited { reason: None });
    world.known.set("out", Standing::NotMeshed);
    let dir = world.dir.path().to_owned();
    let waiting = spawn_blocking(move || {
        let question = Question {
            protocol: PROTOCOL,
            ask: Ask::Add,
            namespace: "shop".into(),
            name: "cart".into(),
            uid: Some("u".into()),
            sandbox: "s".into(),
            netns: None,
        };
        let netns = File::open(NAMESPACE).unwrap();
        let ask = |_| {
            let socket = call(&dir);
            packets::write(&socket, &question.encode(), &[netns.as_fd()]).unwrap();
            socket
        };
        (0..CALLS + 10).map(ask).collect::<Vec<_>>()
    });
    let waiting = waiting.await.unwrap();
    let begun = Instant::now();
    assert!(world.call("ADD", "out", "s").await.0);
    let took = begun.elapsed();
    assert!(took < Duration::from_millis(700), "{took:?}");
    drop(waiting);
}

fn call(dir: &Path) -> Socket {
    let socket = Socket::new(Domain::UNIX, Type::SEQPACKET, None).unwrap();
    let address = SockAddr::unix(dir.join(SOCKET)).unwrap();
    socket.connect(&address).unwrap();
    let long = Some(Duration::from_secs(10));
    socket.set_read_timeout(long).unwrap();
    socket
}

/// What is answered to a packet.
fn answer(dir: &Path, bytes: &[u8], files: &[File]) -> String {
    let socket = call(dir);
    let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
    packets::write(&socket, bytes, &files).unwrap();
    match Answer::decode(&packets::read(&socket, MAX_MESSAGE).unwrap().bytes).unwrap() {
        Answer::Unknown { reason } => reason,
        other @ (Answer::Captured | Answer::NotMeshed | Answer::Refused { .. }) => {
            panic!("{other:?}")
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nonsense_and_files_that_are_no_namespace_are_answered_with_a_reason() {
    let world = serve();
    let dir = world.dir.path().to_owned();
    let asked = spawn_blocking(move || {
        let question = Question {
            protocol: PROTOCOL,
            ask: Ask::Add,
            namespace: "shop".into(),
            name: "cart".into(),
            uid: Some("u".into()),
            sandbox: "s".into(),
            netns: None,
        };
        let good = question.encode();
        let open = |path: &str| File::open(path).unwrap();
        assert!(answer(&dir, b"hello", &[]).contains("not understood"));
        let long = vec![b' '; MAX_MESSAGE + 10];
        assert!(answer(&dir, &long, &[]).contains("more than"));
        assert!(answer(&dir, &good, &[]).contains("0 files came"));
        let two = [open(NAMESPACE), open(NAMESPACE)];
        assert!(answer(&dir, &good, &two).contains("2 files came"));
        let file = [open("/proc/self/stat")];
        assert!(answer(&dir, &good, &file).contains("no network namespace"));
        let own = [open("/proc/self/ns/net")];
        assert!(answer(&dir, &good, &own).contains("node's own"));
    });
    asked.await.unwrap();
    assert!(world.paths.borrow().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_callers_than_places_that_say_nothing_hold_up_nobody_for_long() {
    let world = serve();
    world.known.set("out", Standing::NotMeshed);
    let dir = world.dir.path().to_owned();
    let strangers = spawn_blocking(move || (0..CALLS + 10).map(|_| call(&dir)).collect::<Vec<_>>());
    let strangers = strangers.await.unwrap();
    let begun = Instant::now();
    assert!(world.call("ADD", "out", "s").await.0);
    assert!(begun.elapsed() < Duration::from_secs(5));
    drop(strangers);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_socket_is_for_its_owner_alone() {
    let world = serve();
    let found = fs::metadata(world.dir.path().join(SOCKET)).unwrap();
    assert_eq!(found.permissions().mode() & 0o777, 0o600);
    world.drain.drain(Duration::from_secs(1)).await;
}

//! The CNI plugin's program, called as containerd calls it, with a real network namespace and the
//! agent's real end of the socket.
#![expect(clippy::unwrap_used, reason = "a test")]

use std::{
    collections::HashMap,
    fs,
    io::Write,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use picomesh::{
    cni::{
        intent::Intent,
        sandboxes::{Paths, Sandboxes},
        server::{Named, Patience, Pods, Server, Standing},
    },
    drain::Drain,
};
use tokio::{sync::watch, task::spawn_blocking};

const PREVIOUS: &str = r#"{ "cniVersion":"0.4.0", "interfaces":[{"name":"eth0","sandbox":"x"}],
  "ips":[{"version":"4","address":"10.9.0.5/24","interface":0}], "dns":{} }"#;

/// A process with a network namespace of its own: a pod's sandbox.
struct Sandbox(Child);

impl Sandbox {
    /// `None`, with a word why: this machine does not let us.
    fn start() -> Option<Self> {
        let mut command = Command::new("unshare");
        if !nix::unistd::geteuid().is_root() {
            command.arg("--map-root-user");
        }
        command.args(["--net", "sleep", "60"]);
        let child = command.stderr(Stdio::null()).spawn();
        let mut child = child
            .inspect_err(|error| eprintln!("skipped: unshare: {error}"))
            .ok()?;
        let own = inode(Path::new("/proc/self/ns/net"));
        let path = PathBuf::from(format!("/proc/{}/ns/net", child.id()));
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(10) {
            if let Some(status) = child.try_wait().unwrap() {
                eprintln!("skipped: no network namespace can be made here: {status}");
                return None;
            }
            if fs::metadata(&path).is_ok_and(|found| found.ino() != own) {
                return Some(Self(child));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("unshare does nothing");
    }

    fn netns(&self) -> PathBuf {
        format!("/proc/{}/ns/net", self.0.id()).into()
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        let _gone = self.0.kill();
        let _gone = self.0.wait();
    }
}

fn inode(path: &Path) -> u64 {
    fs::metadata(path).unwrap().ino()
}

#[derive(Default)]
struct Known(Mutex<HashMap<String, Standing>>);

impl Pods for Known {
    fn standing(&self, uid: &str) -> Standing {
        let known = self.0.lock().unwrap();
        known.get(uid).cloned().unwrap_or(Standing::Unknown)
    }

    fn named(&self, _namespace: &str, _name: &str) -> Option<Named> {
        None
    }
}

struct Node {
    dir: tempfile::TempDir,
    known: Arc<Known>,
}

impl Node {
    /// Namespace `shop` is in the mesh. No agent runs.
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let intent = Intent::of(&Intent::default(), [("shop", true)], [], false);
        intent.write(&dir.path().join("cni.json")).unwrap();
        let known = Arc::default();
        Self { dir, known }
    }

    fn agent(&self) -> (watch::Receiver<Paths>, Drain) {
        let server = Server::beside(self.dir.path()).unwrap();
        server.move_in().unwrap();
        let (sandboxes, paths) = Sandboxes::new(vec!["/run/netns".into()]);
        let (drain, guard) = Drain::new();
        let known = Arc::clone(&self.known) as Arc<dyn Pods>;
        tokio::spawn(server.serve(known, sandboxes, Patience::default(), guard));
        (paths, drain)
    }

    /// As containerd 1.6 does it.
    async fn call(&self, command: &str, namespace: &str, netns: &Path) -> Output {
        let run_dir = self.dir.path().display();
        let input = format!(
            r#"{{"capabilities":{{"io.kubernetes.cri.pod-annotations":true}},"cniVersion":"0.4.0",
            "intent":"{run_dir}/cni.json","madeOf":"10-kindnet.conflist","name":"kindnet","prevResult":{PREVIOUS},
            "runDir":"{run_dir}","runtimeConfig":{{"io.kubernetes.cri.pod-annotations":{{"a":"b"}}}},
            "type":"picomesh-cni"}}"#
        );
        let mut call = Command::new(env!("CARGO_BIN_EXE_picomesh-cni"));
        call.env_clear()
            .env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", "ab".repeat(32))
            .env("CNI_NETNS", netns)
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", "/opt/cni/bin")
            .env(
                "CNI_ARGS",
                format!(
                    "K8S_POD_INFRA_CONTAINER_ID=x;K8S_POD_UID=uid-1;IgnoreUnknown=1;\
                     K8S_POD_NAMESPACE={namespace};K8S_POD_NAME=cart-0"
                ),
            )
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let called = spawn_blocking(move || {
            let mut child = call.spawn().unwrap();
            let mut stdin = child.stdin.take().unwrap();
            stdin.write_all(input.as_bytes()).unwrap();
            drop(stdin);
            child.wait_with_output().unwrap()
        });
        called.await.unwrap()
    }
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pods_namespace_reaches_the_agent_and_its_containers_wait_for_the_capture() {
    let Some(sandbox) = Sandbox::start() else {
        return;
    };
    let node = Node::new();
    let (mut paths, drain) = node.agent();
    let (known, netns) = (Arc::clone(&node.known), inode(&sandbox.netns()));
    let captured = tokio::spawn(async move {
        paths.changed().await.unwrap();
        let path = paths.borrow()["uid-1"].clone();
        assert_eq!(inode(&path), netns, "the very namespace");
        // The kernel takes its time.
        tokio::time::sleep(Duration::from_millis(200)).await;
        let standing = Standing::Captured { netns };
        known.0.lock().unwrap().insert("uid-1".into(), standing);
        paths
    });
    let begun = Instant::now();
    let added = node.call("ADD", "shop", &sandbox.netns()).await;
    assert!(added.status.success(), "{}", text(&added));
    assert!(begun.elapsed() >= Duration::from_millis(200));
    assert_eq!(text(&added), PREVIOUS);
    let paths = captured.await.unwrap();

    let removed = node.call("DEL", "shop", Path::new("")).await;
    assert!(removed.status.success() && removed.stdout.is_empty());
    assert!(paths.borrow().is_empty());
    drain.drain(Duration::from_secs(1)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_an_agent_a_meshed_pod_fails_its_add_and_another_starts() {
    let Some(sandbox) = Sandbox::start() else {
        return;
    };
    let node = Node::new();
    let other = node.call("ADD", "plain", &sandbox.netns()).await;
    assert!(other.status.success(), "{}", text(&other));
    assert_eq!(text(&other), PREVIOUS);
    let meshed = node.call("ADD", "shop", &sandbox.netns()).await;
    assert!(!meshed.status.success());
    assert!(meshed.stderr.is_empty());
    let error: serde_json::Value = serde_json::from_slice(&meshed.stdout).unwrap();
    assert_eq!(
        (&error["code"], &error["cniVersion"]),
        (&11.into(), &"0.4.0".into())
    );
    let message = error["msg"].as_str().unwrap();
    assert!(
        message.contains("namespace shop is in the mesh"),
        "{message}"
    );
    assert!(
        node.call("DEL", "shop", Path::new(""))
            .await
            .status
            .success()
    );
}

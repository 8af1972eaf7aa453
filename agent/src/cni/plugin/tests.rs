//! The plugin against an agent of this test's own, on a real socket.

use std::{
    collections::HashMap,
    fs,
    os::fd::OwnedFd,
    sync::{Arc, Mutex},
    thread,
};

use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept, bind, listen, socket_with,
};
use serde_json::Value;

use super::*;
use crate::{
    cni::{SOCKET, message::MAX_MESSAGE},
    packets,
};

const PREVIOUS: &str = r#"{ "cniVersion":"1.0.0","ips": [{"address":"10.1.0.5/24"}], "n":1e2 }"#;

/// What an agent does with one call: an answer, or `None` to hang up.
type Manner = Box<dyn Fn(&Question, usize) -> Option<Vec<u8>> + Send>;

struct World {
    dir: tempfile::TempDir,
    heard: Arc<Mutex<Vec<(Question, usize)>>>,
}

impl World {
    /// Nobody listens; namespace `shop` is in the mesh.
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let intent = Intent::of(
            &Intent::default(),
            [("shop", true), ("out", false)],
            [],
            false,
        );
        intent.write(&dir.path().join("cni.json")).unwrap();
        Self {
            dir,
            heard: Arc::default(),
        }
    }

    fn with_agent(manner: impl Fn(&Question, usize) -> Option<Vec<u8>> + Send + 'static) -> Self {
        let world = Self::new();
        world.agent(Box::new(manner));
        world
    }

    fn answering(answer: Answer) -> Self {
        Self::with_agent(move |_, _| Some(answer.encode()))
    }

    fn agent(&self, manner: Manner) {
        let socket = socket_with(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        bind(
            &socket,
            &SocketAddrUnix::new(self.dir.path().join(SOCKET)).unwrap(),
        )
        .unwrap();
        listen(&socket, 8).unwrap();
        let heard = Arc::clone(&self.heard);
        // It ends with the test's process.
        thread::spawn(move || {
            while let Ok(call) = accept(&socket) {
                Self::answer(&call, &manner, &heard);
            }
        });
    }

    fn answer(call: &OwnedFd, manner: &Manner, heard: &Mutex<Vec<(Question, usize)>>) {
        let packet = packets::read(call, MAX_MESSAGE).unwrap();
        let question = Question::decode(&packet.bytes).unwrap();
        let calls = {
            let mut heard = heard.lock().unwrap();
            heard.push((question.clone(), packet.files.len()));
            heard.len()
        };
        if let Some(answer) = manner(&question, calls) {
            packets::write(call, &answer, &[]).unwrap();
        }
    }

    fn configuration(&self, version: &str, annotations: &Value) -> String {
        let run_dir = self.dir.path();
        let previous = PREVIOUS.replace("1.0.0", version);
        format!(
            r#"{{"cniVersion":"{version}","name":"net","type":"picomesh-cni","runDir":"{}",
            "intent":"{}","runtimeConfig":{{"io.kubernetes.cri.pod-annotations":{annotations}}},
            "prevResult":{previous}}}"#,
            run_dir.display(),
            run_dir.join("cni.json").display()
        )
    }

    fn call(&self, command: &str, namespace: &str, version: &str) -> Output {
        let input = self.configuration(version, &json!({}));
        call(command, namespace, &input)
    }

    fn heard(&self) -> Vec<(Question, usize)> {
        self.heard.lock().unwrap().clone()
    }
}

fn call(command: &str, namespace: &str, input: &str) -> Output {
    let arguments =
        format!("IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME=cart;K8S_POD_UID=u-1");
    let variables = HashMap::from([
        ("CNI_COMMAND", command.to_owned()),
        ("CNI_CONTAINERID", "sandbox-1".into()),
        ("CNI_NETNS", "/proc/self/ns/net".into()),
        ("CNI_IFNAME", "eth0".into()),
        ("CNI_ARGS", arguments),
    ]);
    let patience = Patience {
        answer: Duration::from_millis(300),
        agent: Duration::from_millis(600),
        farewell: Duration::from_millis(300),
    };
    run(
        |name| variables.get(name).map(OsString::from),
        input.as_bytes(),
        patience,
    )
}

fn text(output: &Output) -> String {
    String::from_utf8(output.text.clone()).unwrap()
}

/// Code and message of a failed call.
fn error(output: &Output) -> (u64, String) {
    assert!(!output.success, "{}", text(output));
    let error: Value = serde_json::from_slice(&output.text).unwrap();
    let message = error["msg"].as_str().unwrap().to_owned();
    (error["code"].as_u64().unwrap(), message)
}

#[test]
fn add_hands_the_namespace_over_and_passes_the_result_on_unchanged() {
    for answer in [Answer::Captured, Answer::NotMeshed] {
        for version in ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
            let world = World::answering(answer.clone());
            let output = world.call("ADD", "shop", version);
            assert!(output.success, "{}", text(&output));
            assert_eq!(text(&output), PREVIOUS.replace("1.0.0", version));
            let heard = world.heard();
            let (question, files) = &heard[0];
            assert_eq!((heard.len(), *files, question.ask), (1, 1, Ask::Add));
            assert_eq!((&*question.namespace, &*question.name), ("shop", "cart"));
            assert_eq!(question.uid.as_deref(), Some("u-1"));
            assert_eq!(question.sandbox, "sandbox-1");
        }
    }
}

#[test]
fn a_pod_that_cannot_be_captured_does_not_start_and_is_told_why() {
    let world = World::answering(Answer::refused("no_slot: all places are taken"));
    let (code, message) = error(&world.call("ADD", "out", "1.0.0"));
    assert_eq!(code, 100);
    assert!(message.contains("all places are taken"), "{message}");
}

#[test]
fn while_the_agent_is_away_meshed_pods_wait_and_others_start_at_once() {
    let world = World::new();
    let begun = Instant::now();
    assert!(world.call("ADD", "out", "1.0.0").success);
    assert!(begun.elapsed() < Duration::from_millis(300));

    let begun = Instant::now();
    let output = world.call("ADD", "shop", "1.0.0");
    assert!(begun.elapsed() >= Duration::from_millis(600));
    let (code, message) = error(&output);
    assert_eq!(code, 11);
    assert!(message.contains("nobody listens"), "{message}");
    assert!(
        message.contains("namespace shop is in the mesh"),
        "{message}"
    );
    let value: Value = serde_json::from_slice(&output.text).unwrap();
    assert_eq!(value["cniVersion"], "1.0.0");
    let details = value["details"].as_str().unwrap();
    assert!(details.contains("picomesh.io/mesh: disabled"), "{details}");
    assert!(
        details.contains("kubectl apply -k deploy/kustomize/cleanup"),
        "{details}"
    );
}

#[test]
fn the_pods_own_annotation_counts_while_the_agent_is_away() {
    let world = World::new();
    let with = |word: &str| world.configuration("1.0.0", &json!({"picomesh.io/mesh": word}));
    assert!(call("ADD", "shop", &with("disabled")).success);
    assert_eq!(error(&call("ADD", "out", &with("enabled"))).0, 11);
    let without = world.configuration("1.0.0", &Value::Null);
    assert!(call("ADD", "out", &without).success);
}

#[test]
fn without_the_file_pods_wait_and_the_message_names_it() {
    let world = World::new();
    fs::remove_file(world.dir.path().join("cni.json")).unwrap();
    let (code, message) = error(&world.call("ADD", "out", "1.0.0"));
    assert_eq!(code, 11);
    assert!(message.contains("cni.json"), "{message}");
    assert!(world.call("ADD", "kube-system", "1.0.0").success);
}

#[test]
fn an_agent_that_comes_back_in_time_is_asked() {
    let world = Arc::new(World::new());
    let late = Arc::clone(&world);
    let coming = thread::spawn(move || {
        sleep(Duration::from_millis(250));
        late.agent(Box::new(|_, _| Some(Answer::Captured.encode())));
    });
    assert!(world.call("ADD", "shop", "1.0.0").success);
    coming.join().unwrap();
    // One that hangs up while it ends is away too.
    let ending = World::with_agent(|_, calls| (calls > 1).then(|| Answer::Captured.encode()));
    assert!(ending.call("ADD", "shop", "1.0.0").success);
    assert_eq!(ending.heard().len(), 2);
}

#[test]
fn an_agent_that_is_silent_or_talks_nonsense_counts_as_away() {
    let silent = World::with_agent(|_, _| {
        sleep(Duration::from_secs(2));
        None
    });
    let begun = Instant::now();
    let (code, message) = error(&silent.call("ADD", "shop", "1.0.0"));
    assert!(begun.elapsed() < Duration::from_millis(1500), "bounded");
    assert!(
        code == 11 && message.contains("no answer within"),
        "{message}"
    );

    let nonsense = World::with_agent(|_, _| Some(b"captured".to_vec()));
    assert!(nonsense.call("ADD", "out", "1.0.0").success);
    let (_, message) = error(&nonsense.call("ADD", "shop", "1.0.0"));
    assert!(message.contains("not understood"), "{message}");

    let undecided = World::answering(Answer::unknown("it has not heard of the pod"));
    let (_, message) = error(&undecided.call("ADD", "shop", "1.0.0"));
    assert!(message.contains("has not heard of the pod"), "{message}");
    assert!(undecided.call("ADD", "out", "1.0.0").success);
}

#[test]
fn what_the_cluster_needs_and_what_is_no_pod_is_not_asked_about() {
    let world = World::answering(Answer::refused("never"));
    for namespace in ["kube-system", "picomesh-system"] {
        assert!(world.call("ADD", namespace, "1.0.0").success);
    }
    let input = world.configuration("1.0.0", &json!({}));
    assert!(call("ADD", "", &input).success, "no pod of Kubernetes");
    assert!(world.heard().is_empty());
}

#[test]
fn del_always_succeeds_and_tells_the_agent_if_there_is_one() {
    let away = World::new();
    let output = away.call("DEL", "shop", "1.0.0");
    assert!(output.success && output.text.is_empty());
    assert!(call("DEL", "shop", "nonsense").success);

    let there = World::answering(Answer::NotMeshed);
    assert!(there.call("DEL", "shop", "0.3.1").success);
    let (question, files) = there.heard().remove(0);
    assert_eq!((question.ask, files), (Ask::Remove, 0));

    let silent = World::with_agent(|_, _| {
        sleep(Duration::from_secs(2));
        None
    });
    let begun = Instant::now();
    assert!(silent.call("DEL", "shop", "1.0.0").success);
    assert!(begun.elapsed() < Duration::from_millis(1500), "bounded");
}

#[test]
fn check_fails_only_if_the_agent_says_so() {
    let wrong = World::answering(Answer::refused("its programs are gone"));
    let (code, message) = error(&wrong.call("CHECK", "shop", "0.4.0"));
    assert!(
        code == 100 && message.contains("programs are gone"),
        "{message}"
    );
    assert_eq!(wrong.heard()[0].0.ask, Ask::Check);
    assert!(
        World::answering(Answer::Captured)
            .call("CHECK", "shop", "1.1.0")
            .success
    );
    assert!(World::new().call("CHECK", "shop", "1.1.0").success);
    assert_eq!(error(&World::new().call("CHECK", "shop", "0.3.1")).0, 1);
}

#[test]
fn status_and_gc_do_not_speak_of_the_agent() {
    let away = World::new();
    for command in ["STATUS", "GC"] {
        let output = away.call(command, "", "1.1.0");
        assert!(output.success && output.text.is_empty(), "{command}");
        assert_eq!(error(&away.call(command, "", "1.0.0")).0, 1);
    }
}

#[test]
fn version_names_what_is_supported() {
    for input in [r#"{"cniVersion":"0.4.0"}"#, ""] {
        let output = call("VERSION", "", input);
        assert!(output.success);
        let told: Value = serde_json::from_slice(&output.text).unwrap();
        assert_eq!(told["cniVersion"], "1.1.0");
        let supported = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
        assert_eq!(told["supportedVersions"], json!(supported));
    }
}

#[test]
fn what_cannot_be_read_is_told_with_the_codes_of_the_specification() {
    assert_eq!(error(&call("ADD", "shop", "{")).0, 6);
    assert_eq!(
        error(&call("ADD", "shop", r#"{"cniVersion":"9.9.9"}"#)).0,
        1
    );
    let (code, message) = error(&call("ADD", "shop", r#"{"cniVersion":"1.0.0"}"#));
    assert!(
        code == 7 && message.contains("behind one that does"),
        "{message}"
    );
    let (code, message) = error(&call("FLY", "shop", r#"{"cniVersion":"1.0.0"}"#));
    assert!(code == 4 && message.contains("FLY"), "{message}");
}

#[test]
fn a_path_is_told_as_the_node_sees_it() {
    let told = |path: &str| as_the_node_sees_it(Path::new(path));
    assert_eq!(told("/var/run/netns/cni-1"), "/run/netns/cni-1");
    assert_eq!(told("/run/netns/cni-1"), "/run/netns/cni-1");
    assert_eq!(told("/proc/7/ns/net"), "/proc/7/ns/net");
}

//! From files to a published mesh.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use tokio::sync::oneshot;

use super::*;
use crate::{
    state::objects::Objects,
    testing::manifests::{meshed_namespace, node, pod, settings},
};

const SERVER: &str = "\
apiVersion: policy.linkerd.io/v1beta3
kind: Server
metadata:
  name: web
  namespace: shop
spec:
  podSelector: {}
  port: 8080
";

/// A directory and what `run` would read from it, without the loop.
struct World {
    dir: tempfile::TempDir,
    directory: Directory,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let directory = Directory::new(dir.path().to_owned(), Converter::new(&settings()));
        Self { dir, directory }
    }

    /// Long ago.
    fn write(&self, name: &str, text: &str) {
        let path = self.dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        let file = std::fs::File::options().append(true).open(path).unwrap();
        let before = std::time::SystemTime::now() - Duration::from_secs(60);
        file.set_modified(before).unwrap();
    }

    fn remove(&self, name: &str) {
        std::fs::remove_file(self.dir.path().join(name)).unwrap();
    }

    /// What changed since the last reading; panics if nothing did.
    fn read(&mut self) -> Snapshot {
        self.directory.read().unwrap().expect("nothing changed")
    }

    /// The error's text, with the directory's name taken out.
    fn errors(&self, snapshot: &Snapshot) -> Vec<String> {
        let dir = format!("{}/", self.dir.path().display());
        snapshot
            .errors
            .iter()
            .map(|error| error.to_string().replace(&dir, ""))
            .collect()
    }
}

fn names(objects: &Objects) -> Vec<String> {
    objects
        .pods
        .values()
        .map(|pod| pod.key.to_string())
        .collect()
}

#[test]
fn every_manifest_of_the_directory_is_read_and_nothing_else() {
    let mut world = World::new();
    world.write(
        "a.yaml",
        &(meshed_namespace("shop", "") + &pod("shop/a", "n1", &["10.1.0.1"], "")),
    );
    world.write("b.yml", &pod("shop/b", "n1", &["10.1.0.2"], ""));
    world.write(
        "c.json",
        "{\n\t\"apiVersion\": \"v1\", \"kind\": \"Pod\", \"metadata\": {\"name\": \"c\"},\n\
         \t\"spec\": {\"nodeName\": \"n1\", \"containers\": []}\n}\n",
    );
    world.write("d.txt", "not a manifest");
    world.write(".e.yaml", "an editor's: [");
    world.write("f.yaml~", "another editor's: [");
    std::fs::create_dir(world.dir.path().join("g.yaml")).unwrap();
    let snapshot = world.read();
    assert_eq!(world.errors(&snapshot), [""; 0]);
    assert_eq!(snapshot.objects.namespaces.len(), 1);
    let mut found = names(&snapshot.objects);
    found.sort();
    assert_eq!(found, ["default/c", "shop/a", "shop/b"]);
}

#[test]
fn nothing_changed_is_nothing_to_publish() {
    let mut world = World::new();
    assert!(
        world.directory.read().unwrap().is_some(),
        "an empty directory is a mesh too"
    );
    assert!(world.directory.read().unwrap().is_none());
    world.write("a.yaml", SERVER);
    assert_eq!(world.read().objects.servers.len(), 1);
    world.write("a.yaml", SERVER);
    assert!(
        world.directory.read().unwrap().is_none(),
        "the same text again"
    );
    world.remove("a.yaml");
    assert_eq!(world.read().objects.servers.len(), 0);
}

#[test]
fn a_broken_file_keeps_its_last_good_objects_while_others_change() {
    let mut world = World::new();
    world.write("a.yaml", SERVER);
    world.write("b.yaml", &pod("shop/b", "n1", &["10.1.0.2"], ""));
    world.read();

    world.write("a.yaml", &SERVER.replace("port: 8080", "port: [8080"));
    world.write("b.yaml", &pod("shop/c", "n1", &["10.1.0.3"], ""));
    let snapshot = world.read();
    assert_eq!(snapshot.objects.servers.len(), 1);
    assert_eq!(names(&snapshot.objects), ["shop/c"]);
    assert_eq!(snapshot.errors.len(), 1);
    assert_eq!(snapshot.errors[0].file, world.dir.path().join("a.yaml"));
    assert!(
        world.directory.read().unwrap().is_none(),
        "an error is told once"
    );

    world.write("a.yaml", "# deleted on purpose\n");
    let snapshot = world.read();
    assert_eq!(world.errors(&snapshot), [""; 0]);
    assert_eq!(snapshot.objects.servers.len(), 0);
}

#[test]
fn a_file_counts_as_a_whole() {
    let mut world = World::new();
    let broken = SERVER.replace("port: 8080", "port: 0");
    world.write(
        "a.yaml",
        &format!("{}---\n{broken}", pod("shop/a", "n1", &["10.1.0.1"], "")),
    );
    let snapshot = world.read();
    assert_eq!(names(&snapshot.objects), [""; 0]);
    assert_eq!(
        world.errors(&snapshot),
        [
            "a.yaml:11: Server shop/web: spec.port: \"0\" is not a port; write a number from 1 to \
          65535"
        ]
    );
}

#[test]
fn an_error_names_file_line_object_field_value_and_remedy() {
    let rows = [
        (
            SERVER.replace("port: 8080", "port: 1-65535"),
            "a.yaml:8: Server shop/web: spec.port: \"1-65535\" is not a port; write one number \
             from 1 to 65535, or the name of a container's port",
        ),
        (
            SERVER.replace("port: 8080", "port: 8080\n  protcol: HTTP/1"),
            "a.yaml:9: Server shop/web: unknown field `protcol`, expected one of podSelector, port, \
             proxyProtocol, accessPolicy, in `protcol: HTTP/1`",
        ),
        (
            SERVER.replace("port: 8080", "port: 8080\n  protocol: HTTP/1"),
            "a.yaml:9: Server shop/web: spec.protocol: \"HTTP/1\" is no field; write proxyProtocol: \
             unknown, HTTP/1, HTTP/2, gRPC, opaque or TLS",
        ),
        (
            SERVER.replace("v1beta3", "v2"),
            "a.yaml:1: Server shop/web: apiVersion: \"policy.linkerd.io/v2\" is no version of \
             Server; write policy.linkerd.io/v1beta3",
        ),
        (
            format!("# shop\n---\n{}", pod("shop/a", "", &["10.1.0.1"], "")),
            "a.yaml:4: Pod shop/a: spec.nodeName: \"\" is missing; name the node that runs the \
             pod: nothing schedules it here",
        ),
        (
            pod("shop/a", "n1", &["10.1.0.300"], ""),
            "a.yaml:2: Pod shop/a: status.podIPs[0].ip: \"10.1.0.300\" is not an IP address; write \
             an IPv4 or IPv6 address",
        ),
        (
            "apiVersion: v1\nmetadata: {name: x}\n".to_owned(),
            "a.yaml:1: kind: \"\" is missing; every Kubernetes object says it",
        ),
    ];
    for (text, wanted) in rows {
        let mut world = World::new();
        world.write("a.yaml", &text);
        let snapshot = world.read();
        assert_eq!(world.errors(&snapshot), [wanted], "{text}");
    }
}

/// YAML counts a CR alone as a line's end, and so does the parser.
#[test]
fn a_lone_carriage_return_counts_as_a_lines_end() {
    for end in ["\n", "\r\n", "\r"] {
        let text = format!("# shop\n# more{end}---\n{SERVER}")
            .replace("kind: Server\n", &format!("kind: Server{end}"));
        for (wrong, wanted) in [
            (
                "prt: 8080",
                "a.yaml:11: Server shop/web: unknown field `prt`",
            ),
            ("port: 0", "a.yaml:11: Server shop/web: spec.port"),
        ] {
            let mut world = World::new();
            world.write("a.yaml", &text.replace("port: 8080", wrong));
            let snapshot = world.read();
            let told = world.errors(&snapshot).concat();
            assert!(told.starts_with(wanted), "{end:?}: {told}");
            if wrong.starts_with("prt") {
                assert!(told.ends_with("in `prt: 8080`"), "{end:?}: {told}");
            }
        }
    }
}

/// A misspelt `from` would let everybody in.
#[test]
fn an_unknown_field_of_a_network_policy_is_an_error_and_the_last_good_one_stays() {
    const POLICY: &str = "\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web, namespace: shop}
spec:
  podSelector:
    matchLabels: {app: web}
  ingress:
  - from:
    - podSelector: {}
    ports:
    - port: 80
status: {}
";
    let mut world = World::new();
    world.write("a.yaml", POLICY);
    let snapshot = world.read();
    assert_eq!(world.errors(&snapshot), [""; 0]);
    assert_eq!(snapshot.objects.network_policies.len(), 1);
    // The rules alone tell whether it is still the good one.
    let rules = |snapshot: &Snapshot| {
        let policies = snapshot.objects.network_policies.values();
        let rules = policies.flat_map(|policy| policy.ingress.iter().flatten());
        rules
            .map(|rule| (rule.peers.clone(), rule.ports.clone()))
            .collect::<Vec<_>>()
    };
    let good = rules(&snapshot);
    assert_eq!(good.len(), 1);

    let rows = [
        (
            ("- from:", "- form:"),
            "a.yaml:8: NetworkPolicy shop/web: spec.ingress[0].form: \"form\" is no field here; \
             correct its spelling or leave it out; the fields are from, ports",
        ),
        (
            ("    - podSelector", "    - podselector"),
            "a.yaml:9: NetworkPolicy shop/web: spec.ingress[0].from[0].podselector: \"podselector\" \
             is no field here; correct its spelling or leave it out; the fields are podSelector, \
             namespaceSelector, ipBlock",
        ),
        (
            ("    matchLabels", "    labels"),
            "a.yaml:6: NetworkPolicy shop/web: spec.podSelector.labels: \"labels\" is no field here; \
             correct its spelling or leave it out; the fields are matchLabels, matchExpressions",
        ),
        (
            ("  podSelector:\n", "  egres: null\n  podSelector:\n"),
            "a.yaml:5: NetworkPolicy shop/web: spec.egres: \"egres\" is no field here; correct its \
             spelling or leave it out; the fields are podSelector, policyTypes, ingress, egress",
        ),
        (
            ("spec:", "Spec: {}\nspec:"),
            "a.yaml:4: NetworkPolicy shop/web: Spec: \"Spec\" is no field here; correct its spelling \
             or leave it out; the fields are apiVersion, kind, metadata, spec",
        ),
    ];
    for ((right, wrong), wanted) in rows {
        world.write("a.yaml", &POLICY.replace(right, wrong));
        let snapshot = world.read();
        assert_eq!(world.errors(&snapshot), [wanted]);
        assert_eq!(rules(&snapshot), good, "{wrong}");
    }
}

/// Kinds that decide nothing may have what a newer Kubernetes has.
#[test]
fn an_unknown_field_of_another_kind_of_kubernetes_is_passed_over() {
    let mut world = World::new();
    let text = pod("shop/a", "n1", &["10.1.0.1"], "");
    world.write("a.yaml", &text.replace("spec:", "novelty: 1, spec:"));
    let snapshot = world.read();
    assert_eq!(world.errors(&snapshot), [""; 0]);
    assert_eq!(names(&snapshot.objects), ["shop/a"]);
}

#[test]
fn an_item_of_a_list_is_read_as_if_it_stood_alone() {
    let mut world = World::new();
    world.write(
        "list.yaml",
        "apiVersion: v1
kind: List
items:
- apiVersion: v1
  kind: Pod
  metadata: {name: a}
  spec: {nodeName: n1, containers: [{name: c, resources: {limits: {cpu: 1}}}]}
- {apiVersion: v1, kind: Namespace, metadata: {name: shop}}
---
apiVersion: v1
kind: PodList
metadata: {resourceVersion: \"1\"}
items:
- metadata: {name: b}
  spec: {nodeName: n1, containers: []}
",
    );
    let snapshot = world.read();
    assert_eq!(world.errors(&snapshot), [""; 0]);
    assert_eq!(
        (
            snapshot.objects.pods.len(),
            snapshot.objects.namespaces.len()
        ),
        (2, 1)
    );

    world.write(
        "list.yaml",
        "kind: List\napiVersion: v1\nitems:\n- {apiVersion: v1, kind: Namespace, metadata: {name: \
         shop}}\n- apiVersion: v1\n  kind: Pod\n  metadata: {name: a}\n",
    );
    let snapshot = world.read();
    assert_eq!(
        world.errors(&snapshot),
        [
            "list.yaml:5: Pod a: spec.nodeName: \"\" is missing; name the node that runs the pod: \
          nothing schedules it here"
        ]
    );
}

#[test]
fn the_same_object_in_two_files_is_an_error_that_names_both() {
    let mut world = World::new();
    world.write("a.yaml", &pod("shop/a", "n1", &["10.1.0.1"], ""));
    world.write(
        "b.yaml",
        &format!("# b\n{}", pod("shop/a", "n2", &["10.1.0.2"], "")),
    );
    let snapshot = world.read();
    let dir = world.dir.path().display();
    assert_eq!(
        world.errors(&snapshot),
        [
            "b.yaml:3: Pod shop/a: stands in a.yaml:2 too, and only that one counts; delete one of \
          them"
        ],
        "{dir}"
    );
    let pods: Vec<_> = snapshot.objects.pods.values().collect();
    assert_eq!(pods.len(), 1);
    assert_eq!(pods[0].node.as_deref(), Some("n1"));

    world.remove("a.yaml");
    let snapshot = world.read();
    assert_eq!(world.errors(&snapshot), [""; 0]);
    assert_eq!(
        snapshot
            .objects
            .pods
            .values()
            .next()
            .unwrap()
            .node
            .as_deref(),
        Some("n2")
    );
}

#[test]
fn the_same_object_twice_in_one_file_breaks_the_file() {
    let mut world = World::new();
    world.write("a.yaml", &format!("{SERVER}---\n{SERVER}"));
    let snapshot = world.read();
    assert_eq!(snapshot.objects.servers.len(), 0);
    assert_eq!(
        world.errors(&snapshot),
        ["a.yaml:10: Server shop/web: stands in line 1 of this file too; delete one of them"]
    );
}

#[test]
fn two_pods_of_one_uid_are_an_error() {
    let mut world = World::new();
    world.write("a.yaml", &pod("shop/a", "n1", &["10.1.0.1"], ""));
    world.write(
        "b.yaml",
        &pod("shop/b", "n1", &["10.1.0.2"], "").replace("uid-b", "uid-a"),
    );
    let snapshot = world.read();
    assert_eq!(names(&snapshot.objects), ["shop/a"]);
    assert_eq!(
        world.errors(&snapshot),
        [
            "b.yaml:2: Pod shop/b: metadata.uid: \"uid-a\" is the uid of Pod shop/a in a.yaml too; \
          give each its own, or none"
        ]
    );
}

#[test]
fn the_netns_annotation_is_read_and_a_relative_one_refused() {
    let mut world = World::new();
    let more = "annotations: {picomesh.io/netns: /run/netns/a}";
    world.write("a.yaml", &pod("shop/a", "n1", &["10.1.0.1"], more));
    world.write("b.yaml", &pod("shop/b", "n1", &["10.1.0.2"], ""));
    let snapshot = world.read();
    assert_eq!(
        snapshot.netns.into_iter().collect::<Vec<_>>(),
        [(PodUid::from("uid-a"), PathBuf::from("/run/netns/a"))]
    );

    world.write(
        "a.yaml",
        &pod("shop/a", "n1", &["10.1.0.1"], &more.replace("/run", "run")),
    );
    let snapshot = world.read();
    assert_eq!(
        world.errors(&snapshot),
        [
            "a.yaml:2: Pod shop/a: metadata.annotations[picomesh.io/netns]: \"run/netns/a\" is a \
          relative path; write the whole path, like /run/netns/web"
        ]
    );
    assert_eq!(snapshot.netns.len(), 1, "the last good one stays");
}

#[test]
fn a_derived_uid_is_stable_and_belongs_to_one_pod_in_one_netns() {
    let uid = |text: &str| {
        let objects = objects(text, &Converter::new(&settings())).unwrap();
        objects.pods.keys().next().unwrap().to_string()
    };
    let more = "annotations: {picomesh.io/netns: /run/netns/a}";
    let text = pod("shop/a", "n1", &["10.1.0.1"], more).replace("uid: uid-a, ", "");
    let first = uid(&text);
    // Two agents of different builds, and one before and after a restart, must agree.
    assert_eq!(first, "85b3bc16-d553-65e3-2848-9ee56b12aab4");
    assert_eq!(uid(&text.replace("10.1.0.1", "10.1.0.9")), first);
    for other in [
        text.replace("netns/a", "netns/b"),
        text.replace("namespace: shop", "namespace: shopa"),
        text.replace("name: a,", "name: b,"),
    ] {
        assert_ne!(uid(&other), first, "{other}");
    }
}

#[test]
fn readiness_is_the_condition_or_else_the_phase() {
    let rows = [
        ("", true),
        ("phase: Running", true),
        ("phase: Pending", false),
        ("phase: Failed", false),
        (
            "phase: Running, conditions: [{type: Ready, status: \"False\"}]",
            false,
        ),
        (
            "phase: Pending, conditions: [{type: Ready, status: \"True\"}]",
            true,
        ),
        ("conditions: [{type: Initialized, status: \"True\"}]", true),
        (
            "phase: Pending, conditions: [{type: Initialized, status: \"True\"}]",
            false,
        ),
    ];
    for (status, ready) in rows {
        let text = format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: a}}, spec: {{nodeName: n1, \
             containers: []}}, status: {{{status}}}}}"
        );
        let objects = objects(&text, &Converter::new(&settings())).unwrap();
        assert_eq!(
            objects.pods.values().next().unwrap().ready,
            ready,
            "{status}"
        );
    }
}

#[test]
fn kinds_that_are_not_read_are_named_and_do_no_harm() {
    let mut world = World::new();
    world.write(
        "a.yaml",
        &format!(
            "apiVersion: apps/v1\nkind: Deployment\nmetadata: {{name: a}}\nspec: {{replicas: x}}\n\
             ---\napiVersion: policy.linkerd.io/v1beta3\nkind: HTTPRoute\nmetadata: {{name: a}}\n\
             ---\n{SERVER}"
        ),
    );
    let snapshot = world.read();
    assert_eq!(world.errors(&snapshot), [""; 0]);
    let ignored: Vec<_> = snapshot.ignored.iter().map(String::as_str).collect();
    assert_eq!(
        ignored,
        ["apps/v1 Deployment", "policy.linkerd.io/v1beta3 HTTPRoute"]
    );
    assert_eq!(snapshot.objects.servers.len(), 1);
}

#[test]
fn what_is_no_text_of_bounded_size_is_an_error() {
    let mut world = World::new();
    let path = |name: &str| world.dir.path().join(name);
    let file = std::fs::File::create(path("big.yaml")).unwrap();
    file.set_len(4 * 1024 * 1024 + 1).unwrap();
    std::fs::write(path("latin1.yaml"), b"name: \xe9").unwrap();
    nix::unistd::mkfifo(&path("pipe.yaml"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(world.directory.read().unwrap().is_none(), "none is at rest");
    let snapshot = world.read();
    assert_eq!(
        world.errors(&snapshot),
        [
            "big.yaml: is larger than 4 MiB; split it into several files",
            "latin1.yaml: is not UTF-8 text; save it as such",
            "pipe.yaml: is no ordinary file; replace it by one",
        ]
    );
    let mut fits = b"#".to_vec();
    fits.resize(4 * 1024 * 1024, b' ');
    world.write("big.yaml", std::str::from_utf8(&fits).unwrap());
    assert_eq!(world.read().errors.len(), 2);
}

#[test]
fn a_separator_counts_wherever_it_stands() {
    let text = "%YAML 1.2\n---\n# one\n...\n---\r\napiVersion: v1\nkind: Namespace\nmetadata:\n  \
                name: a\n--- # two\n{apiVersion: v1, kind: Namespace, metadata: {name: b}}\n---\n---\n";
    let objects = objects(text, &Converter::new(&settings())).unwrap();
    let names: Vec<_> = objects.namespaces.keys().map(ToString::to_string).collect();
    assert_eq!(names, ["a", "b"]);
}

#[tokio::test]
async fn a_missing_directory_is_an_error_before_readiness() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("nothing");
    let running = start(missing.clone());
    let error = running.task.await.unwrap().unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("cannot read the manifests in "),
        "{error}"
    );
    assert!(
        error.to_string().contains(&missing.display().to_string()),
        "{error}"
    );
}

#[tokio::test]
async fn an_edit_is_published_without_restart_and_the_loop_ends_when_asked() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("mesh.yaml");
    let base = node("n1", &["192.168.0.1"]) + &meshed_namespace("shop", "");
    let annotated = |more: &str| base.clone() + &pod("shop/a", "n1", &["10.1.0.1"], more);
    std::fs::write(
        &file,
        annotated("annotations: {picomesh.io/netns: /run/netns/a}"),
    )
    .unwrap();

    let mut running = start(dir.path().to_owned());
    running.loaded.await.unwrap_err();
    let mesh = running.store.load();
    assert_eq!(mesh.version, 1);
    assert!(mesh.workloads["uid-a"].meshed);
    assert_eq!(
        running.netns.borrow()["uid-a"],
        PathBuf::from("/run/netns/a")
    );
    assert!(running.errors.borrow().is_empty());

    let mut versions = running.store.subscribe();
    std::fs::write(&file, annotated("labels: {picomesh.io/mesh: disabled}")).unwrap();
    let published = versions.wait_for(|_| !running.store.load().workloads["uid-a"].meshed);
    time::timeout(Duration::from_secs(2), published)
        .await
        .expect("not told of the edit")
        .unwrap();
    assert!(running.netns.borrow().is_empty());

    std::fs::write(&file, "{").unwrap();
    let told = running.errors.wait_for(|errors| errors.len() == 1);
    time::timeout(Duration::from_secs(2), told)
        .await
        .expect("not told of the error")
        .unwrap();
    assert!(
        running.store.load().workloads.contains_key("uid-a"),
        "the last good state stays"
    );

    drop(running.stop);
    running.task.await.unwrap().unwrap();
}

#[test]
fn a_text_counts_when_it_has_come_to_rest() {
    let mut world = World::new();
    world.write("a.yaml", SERVER);
    world.read();
    let file = world.dir.path().join("a.yaml");
    let mut read = |text: &str| {
        std::fs::write(&file, text).unwrap();
        let read = world.directory.read().unwrap();
        (read.is_some(), world.directory.is_unsettled())
    };
    let other = SERVER.replace("8080", "8081");
    assert_eq!(read(""), (false, true), "it may be half");
    assert_eq!(read(&other), (false, true), "it goes on");
    assert_eq!(read(&other), (true, false), "the same for two looks");
    assert_eq!(read(""), (false, true));
    assert_eq!(read(&other), (false, false), "as it was");
    let last = SERVER.replace("8080", "8082");
    assert_eq!(read(&last), (false, true), "looks before that do not count");
    // Put in its place, and old: at once.
    world.write("b.new", &pod("shop/b", "n1", &["10.1.0.2"], ""));
    std::fs::rename(
        world.dir.path().join("b.new"),
        file.with_file_name("b.yaml"),
    )
    .unwrap();
    assert_eq!(names(&world.read().objects), ["shop/b"]);
}

/// `kubectl get … > mesh.yaml` empties the file at once and writes it when it has the text.
#[tokio::test]
async fn a_file_that_is_written_slowly_is_read_when_it_is_whole() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mesh.yaml");
    let base = node("n1", &["192.168.0.1"]) + &meshed_namespace("shop", "");
    let all = base.clone() + &pod("shop/a", "n1", &["10.1.0.1"], "");
    std::fs::write(&path, &all).unwrap();
    let running = start(dir.path().to_owned());
    running.loaded.await.unwrap_err();
    let good = running.store.load().version;
    let mut versions = running.store.subscribe();

    let mut file = std::fs::File::create(&path).unwrap();
    for piece in [&*base, "---\n", &pod("shop/a", "n1", &["10.1.0.1"], "")] {
        time::sleep(4 * GATHER).await;
        std::io::Write::write_all(&mut file, piece.as_bytes()).unwrap();
    }
    time::sleep(4 * GATHER).await;
    assert_eq!(running.store.load().version, good, "half a file was taken");
    std::io::Write::write_all(&mut file, pod("shop/b", "n1", &["10.1.0.2"], "").as_bytes())
        .unwrap();
    drop(file);
    let published = versions.wait_for(|_| running.store.load().workloads.len() == 2);
    time::timeout(Duration::from_secs(2), published)
        .await
        .expect("not told that it is whole")
        .unwrap();
    assert_eq!(running.store.load().version, good + 1);
    drop(running.stop);
    running.task.await.unwrap().unwrap();
}

/// A poll that came while an editor had emptied a file opened what its policies close.
#[tokio::test(start_paused = true)]
async fn a_poll_that_meets_a_file_half_written_waits_for_the_rest() {
    let dir = tempfile::tempdir().unwrap();
    let files = dir.path().join("manifests");
    let next = dir.path().join("next");
    let base = node("n1", &["192.168.0.1"]) + &meshed_namespace("shop", "");
    let all = base.clone() + &pod("shop/a", "n1", &["10.1.0.1"], "");
    for dir in [&files, &next] {
        std::fs::create_dir(dir).unwrap();
        std::fs::write(dir.join("mesh.yaml"), &all).unwrap();
    }
    let running = start(files.clone());
    running.loaded.await.unwrap_err();
    // From here on nobody tells of changes: the watched directory is another.
    std::fs::rename(&files, dir.path().join("before")).unwrap();
    std::fs::rename(&next, &files).unwrap();
    // That itself may be told; the watcher's thread knows real time only.
    std::thread::sleep(Duration::from_millis(100));
    // The polls are counted from this one.
    let more = all.clone() + &pod("shop/b", "n1", &["10.1.0.2"], "");
    let mut versions = running.store.subscribe();
    std::fs::write(files.join("mesh.yaml"), &more).unwrap();
    let published = versions.wait_for(|_| running.store.load().workloads.len() == 2);
    time::timeout(3 * POLL, published).await.unwrap().unwrap();
    let good = running.store.load().version;
    for half in ["", &base] {
        time::sleep(POLL - GATHER / 4).await;
        std::fs::write(files.join("mesh.yaml"), half).unwrap();
        time::sleep(GATHER / 2).await;
        std::fs::write(files.join("mesh.yaml"), &more).unwrap();
        time::sleep(GATHER - GATHER / 4).await;
        assert_eq!(
            running.store.load().version,
            good,
            "half a file was taken for the whole: {half:?}"
        );
    }
    time::sleep(2 * POLL).await;
    assert!(running.store.load().workloads.contains_key("uid-a"));
    // What stays is taken.
    std::fs::write(files.join("mesh.yaml"), &base).unwrap();
    time::sleep(2 * POLL).await;
    assert!(!running.store.load().workloads.contains_key("uid-a"));
    drop(running.stop);
    running.task.await.unwrap().unwrap();
}

#[tokio::test]
async fn what_an_agent_before_read_is_in_force_until_the_directory_can_be_read() {
    let dir = tempfile::tempdir().unwrap();
    let files = dir.path().join("manifests");
    std::fs::create_dir(&files).unwrap();
    let base = node("n1", &["192.168.0.1"]) + &meshed_namespace("shop", "");
    std::fs::write(files.join("base.yaml"), &base).unwrap();
    let a = pod("shop/a", "n1", &["10.1.0.1"], "");
    std::fs::write(files.join("a.yaml"), &a).unwrap();
    let b = pod("shop/b", "n1", &["10.1.0.2"], "");
    std::fs::write(files.join("b.yaml"), &b).unwrap();
    let first = start(files.clone());
    first.loaded.await.unwrap_err();
    let left = Texts::clone(&first.texts.borrow());
    assert_eq!(left.len(), 3);
    drop(first.stop);
    first.task.await.unwrap().unwrap();

    // The directory is away.
    let away = dir.path().join("away");
    std::fs::rename(&files, &away).unwrap();
    let mut next = start_after(files.clone(), Some(left.clone()));
    (&mut next.loaded).await.unwrap_err();
    let known = |running: &Running| running.store.load().workloads.len();
    assert_eq!(known(&next), 2);
    assert_eq!(*next.texts.borrow_and_update(), Arc::new(left.clone()));
    drop(next.stop);
    next.task.await.unwrap().unwrap();

    // It is there, one file is broken and one is gone: the first keeps what was good.
    std::fs::rename(&away, &files).unwrap();
    std::fs::write(files.join("a.yaml"), "{").unwrap();
    std::fs::remove_file(files.join("b.yaml")).unwrap();
    let third = start_after(files.clone(), Some(left));
    third.loaded.await.unwrap_err();
    let mesh = third.store.load();
    assert!(mesh.workloads.contains_key("uid-a") && mesh.workloads.len() == 1);
    assert_eq!(third.errors.borrow().len(), 1);
    let texts: Vec<_> = third.texts.borrow().keys().cloned().collect();
    assert_eq!(texts, ["a.yaml", "base.yaml"]);
    drop(third.stop);
    third.task.await.unwrap().unwrap();
}

#[tokio::test]
async fn texts_of_an_agent_before_that_do_not_read_or_lead_elsewhere_are_passed_over() {
    let dir = tempfile::tempdir().unwrap();
    let namespace = meshed_namespace("shop", "");
    let base = node("n1", &["192.168.0.1"]) + &namespace;
    let texts = [
        ("base.yaml", base.as_str()),
        ("broken.yaml", "{"),
        ("../other.yaml", namespace.as_str()),
        ("/etc/other.yaml", namespace.as_str()),
        (".hidden.yaml", namespace.as_str()),
        ("notes.txt", namespace.as_str()),
    ];
    let texts: Texts = texts
        .into_iter()
        .map(|(name, text)| (name.to_owned(), Arc::from(text)))
        .collect();
    let running = start_after(dir.path().join("away"), Some(texts));
    running.loaded.await.unwrap_err();
    let kept: Vec<_> = running.texts.borrow().keys().cloned().collect();
    assert_eq!(kept, ["base.yaml"]);
    drop(running.stop);
    running.task.await.unwrap().unwrap();
}

struct Running {
    store: Arc<MeshStore>,
    netns: watch::Receiver<Netns>,
    errors: watch::Receiver<Arc<Vec<LoadError>>>,
    texts: watch::Receiver<Arc<Texts>>,
    /// Errs once the guard is dropped.
    loaded: oneshot::Receiver<()>,
    stop: oneshot::Sender<()>,
    task: tokio::task::JoinHandle<Result<(), LocalError>>,
}

fn start(dir: PathBuf) -> Running {
    start_after(dir, None)
}

fn start_after(dir: PathBuf, before: Option<Texts>) -> Running {
    let settings = Arc::new(settings());
    let empty = Mesh::build(Arc::clone(&settings), 0, &Objects::default());
    let store = Arc::new(MeshStore::new(empty));
    let (netns_sender, netns) = watch::channel(Netns::new());
    let (errors_sender, errors) = watch::channel(Arc::default());
    let (loading, loaded) = oneshot::channel();
    let (stop, stopped) = oneshot::channel::<()>();
    let (texts_sender, texts) = watch::channel(Arc::default());
    let outputs = Outputs {
        netns: netns_sender,
        errors: errors_sender,
        texts: texts_sender,
    };
    let task = tokio::spawn(run(
        (dir, before),
        settings,
        Arc::clone(&store),
        outputs,
        || drop(loading),
        async move {
            let _closed = stopped.await;
        },
    ));
    Running {
        store,
        netns,
        errors,
        texts,
        loaded,
        stop,
        task,
    }
}

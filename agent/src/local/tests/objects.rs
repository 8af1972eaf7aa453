//! What objects say of themselves: names, uids, network namespaces, readiness.

use super::*;
use crate::testing::manifests::pod;

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

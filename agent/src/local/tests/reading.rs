//! Which files are read, what an error says, and what stays in force.

use super::*;
use crate::testing::manifests::{meshed_namespace, pod};

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
            "a.yaml:9: Server shop/web: unknown field `protcol`, expected one of `podSelector`, `port`, \
             `proxyProtocol`, `accessPolicy`, in `protcol: HTTP/1`",
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

/// As kubectl reads it, but for `yes` and `off`: they are words here and no booleans.
#[test]
fn what_is_written_without_quotes_is_what_the_api_server_would_take_it_for() {
    let mut world = World::new();
    let words = "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: y\n  labels: {team: off}\n";
    world.write("a.yaml", words);
    let snapshot = world.read();
    assert!(world.errors(&snapshot).is_empty());
    assert_eq!(snapshot.objects.namespaces.len(), 1);

    world.write("a.yaml", &words.replace("off", "5"));
    let snapshot = world.read();
    assert_eq!(
        world.errors(&snapshot),
        [
            "a.yaml:5: Namespace y: invalid type: integer `5`, expected a string, in `labels: {team: 5}`"
        ]
    );
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
    // However long this takes, they have only just been written.
    let soon = std::time::SystemTime::now() + Duration::from_secs(60);
    for name in ["big.yaml", "latin1.yaml", "pipe.yaml"] {
        let mut both = std::fs::File::options();
        let file = both.read(true).write(true).open(path(name)).unwrap();
        file.set_modified(soon).unwrap();
    }
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

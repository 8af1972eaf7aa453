//! The invariants of ARCHITECTURE.md that a look at the source can hold: which room may know which,
//! and who alone may name a thing.
//!
//! A source file is read as text: lines of comment are left out, and what follows `mod tests` too.
#![expect(clippy::unwrap_used, reason = "a test")]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

/// Room → rooms it may name with `crate::`. `app` and `bin` wire everything and are free.
const MAY_KNOW: &[(&str, &[&str])] = &[
    ("state", &["state"]),
    ("drain", &[]),
    ("packets", &["packets"]),
    ("handover", &["handover", "packets", "places"]),
    ("places", &[]),
    ("cni", &["cni", "packets", "drain"]),
    ("snapshot", &["snapshot", "state"]),
    ("readiness", &[]),
    ("telemetry", &[]),
    ("k8s", &["k8s", "state"]),
    ("local", &["local", "k8s", "state", "drain", "readiness"]),
    ("identity", &["identity", "state", "drain"]),
    ("control", &["control", "k8s", "state", "identity"]),
    ("datapath", &["datapath", "state", "drain"]),
    ("metrics", &["metrics", "state"]),
    ("access_log", &["access_log", "metrics", "state"]),
    (
        "proxy",
        &[
            "proxy",
            "state",
            "identity",
            "datapath",
            "metrics",
            "access_log",
            "drain",
        ],
    ),
];

/// Word → the rooms that alone may use it.
const ONLY_IN: &[(&str, &[&str])] = &[
    ("aya::", &["datapath"]),
    ("aya_log::", &["datapath"]),
    ("rtnetlink::", &["datapath"]),
    ("kube::", &["k8s", "control", "testing"]),
    ("k8s_openapi::", &["k8s", "control", "local", "testing"]),
    ("rcgen::", &["identity", "testing"]),
    ("h2::", &["proxy"]),
    ("prometheus::", &["metrics"]),
    ("unsafe {", &["datapath", "proxy", "allocator", "packets"]),
];

/// What `state` must not have: no async, no IO, no clock. The store publishes, and may wake.
const NOT_IN_STATE: &[&str] = &[
    "async fn",
    ".await",
    "Instant::now",
    "SystemTime::now",
    "std::fs",
    "std::io",
    "std::thread",
    "TcpStream",
    "TcpListener",
    "fastrand",
];

#[test]
fn a_room_knows_only_the_rooms_before_it() {
    let mut wrong = Vec::new();
    for (path, text) in sources() {
        let room = room_of(&path);
        let Some((_, allowed)) = MAY_KNOW.iter().find(|(name, _)| *name == room) else {
            continue;
        };
        for named in crate_names(&text) {
            let is_room = MAY_KNOW.iter().any(|(name, _)| *name == named)
                || ["admin", "app", "config"].contains(&named.as_str());
            if is_room && !allowed.contains(&named.as_str()) {
                wrong.push(format!("{}: `{room}` names `{named}`", path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn each_library_is_named_in_its_room_only() {
    let mut wrong = Vec::new();
    for (path, text) in sources() {
        let room = room_of(&path);
        for (word, rooms) in ONLY_IN {
            if text.contains(word) && !rooms.contains(&room.as_str()) {
                wrong.push(format!("{}: `{word}` belongs to {rooms:?}", path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn state_has_no_async_no_io_and_no_clock() {
    let mut wrong = Vec::new();
    for (path, text) in sources() {
        if room_of(&path) != "state" {
            continue;
        }
        for word in NOT_IN_STATE {
            if text.contains(word) {
                wrong.push(format!("{}: `{word}`", path.display()));
            }
        }
        if text.contains("tokio::") && !path.ends_with("store.rs") {
            wrong.push(format!(
                "{}: `tokio::` (only store.rs may wake)",
                path.display()
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_unsafe_block_is_outside_the_rooms_that_forbid_it() {
    for (path, text) in sources() {
        let room = room_of(&path);
        if ["state", "k8s", "identity"].contains(&room.as_str())
            && path.ends_with("mod.rs")
            && depth(&path) == 2
        {
            assert!(
                text.contains("#![forbid(unsafe_code)]"),
                "{}: a room without need for unsafe forbids it",
                path.display()
            );
        }
    }
}

/// Relative path → text without comments and without unit tests.
fn sources() -> BTreeMap<PathBuf, String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = BTreeMap::new();
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") && !is_test_file(&path) {
                let relative = path.strip_prefix(&root).unwrap().to_owned();
                found.insert(relative, code_of(&fs::read_to_string(&path).unwrap()));
            }
        }
    }
    assert!(found.len() > 20, "the sources were not found");
    found
}

fn is_test_file(path: &Path) -> bool {
    path.iter()
        .any(|part| part == "tests" || part == "tests.rs" || part == "testing")
}

fn code_of(text: &str) -> String {
    text.lines()
        .take_while(|line| !line.starts_with("#[cfg(test)]"))
        .filter(|line| !line.trim_start().starts_with("//"))
        .collect::<Vec<_>>()
        .join("\n")
}

fn room_of(path: &Path) -> String {
    let first = path.iter().next().unwrap().to_string_lossy();
    first.trim_end_matches(".rs").to_owned()
}

fn depth(path: &Path) -> usize {
    path.iter().count()
}

/// Every `name` of `crate::name` and of `crate::{name::…, name, …}`.
fn crate_names(text: &str) -> Vec<String> {
    let mut names = Vec::new();
    for (at, _) in text.match_indices("crate::") {
        let rest = &text[at + "crate::".len()..];
        if let Some(group) = rest.strip_prefix('{') {
            let mut level = 0;
            let mut item = String::new();
            for c in group.chars() {
                match c {
                    '{' => level += 1,
                    '}' if level == 0 => break,
                    '}' => level -= 1,
                    ',' if level == 0 => names.push(std::mem::take(&mut item)),
                    _ if level == 0 => item.push(c),
                    _ => {}
                }
            }
            names.push(item);
        } else {
            names.push(rest.to_owned());
        }
    }
    names
        .into_iter()
        .map(|n| {
            n.trim_start()
                .chars()
                .take_while(|c| c.is_alphanumeric() || *c == '_')
                .collect::<String>()
        })
        .filter(|n| !n.is_empty())
        .collect()
}

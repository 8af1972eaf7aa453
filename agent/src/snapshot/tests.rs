use std::{os::unix::fs::PermissionsExt, os::unix::fs::symlink};

use super::*;

fn origin() -> Origin {
    Origin {
        boot: "boot-1".into(),
        node: "node-1".into(),
        trust_domain: "cluster.local".into(),
        source: "/etc/manifests".into(),
    }
}

const BODY: &[u8] = b"line one\nline two\n\0";

#[test]
fn what_was_written_is_read_back_by_its_owner_alone() {
    let dir = tempfile::tempdir().unwrap();
    assert!(read(dir.path(), STATE, &origin()).unwrap().is_none());
    write(dir.path(), STATE, &origin(), b"before").unwrap();
    write(dir.path(), STATE, &origin(), BODY).unwrap();
    let body = read(dir.path(), STATE, &origin()).unwrap().unwrap();
    assert_eq!(body, BODY);
    let path = dir.path().join(STATE);
    let mode = fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);

    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    let error = read(dir.path(), STATE, &origin()).unwrap_err();
    assert!(matches!(error, SnapshotError::NotOurs { .. }), "{error}");
    remove(dir.path(), STATE);
    assert!(read(dir.path(), STATE, &origin()).unwrap().is_none());
}

#[test]
fn a_link_is_not_followed_and_a_pipe_not_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let elsewhere = dir.path().join("elsewhere");
    fs::write(&elsewhere, seal(&origin(), BODY)).unwrap();
    symlink(&elsewhere, dir.path().join(KEYS)).unwrap();
    assert!(read(dir.path(), KEYS, &origin()).is_err());
    // Writing replaces the link and leaves what it led to.
    write(dir.path(), KEYS, &origin(), b"new").unwrap();
    assert_eq!(fs::read(&elsewhere).unwrap(), seal(&origin(), BODY));

    let pipe = dir.path().join(STATE);
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
    let error = read(dir.path(), STATE, &origin()).unwrap_err();
    assert!(matches!(error, SnapshotError::NotOurs { .. }), "{error}");
}

#[test]
fn one_of_another_boot_node_domain_or_source_does_not_count() {
    let others = [
        (
            "the boot",
            Origin {
                boot: "boot-2".into(),
                ..origin()
            },
        ),
        (
            "the node",
            Origin {
                node: "node-2".into(),
                ..origin()
            },
        ),
        (
            "the trust domain",
            Origin {
                trust_domain: "other".into(),
                ..origin()
            },
        ),
        (
            "its source",
            Origin {
                source: "/elsewhere".into(),
                ..origin()
            },
        ),
    ];
    for (expected, other) in others {
        match open(&seal(&other, BODY), &origin()) {
            Err(Unusable::Foreign { what, .. }) => assert_eq!(what, expected),
            found => panic!("{expected}: {found:?}"),
        }
    }
    assert_eq!(open(&seal(&origin(), BODY), &origin()), Ok(BODY));
}

#[test]
fn one_does_not_count_where_nobody_knows_which_boot_this_is() {
    let unknown = Origin {
        boot: String::new(),
        ..origin()
    };
    assert_eq!(open(&seal(&unknown, BODY), &unknown), Err(Unusable::NoBoot));
}

#[test]
fn one_that_is_cut_off_anywhere_does_not_count() {
    let sealed = seal(&origin(), BODY);
    for length in 0..sealed.len() {
        assert_eq!(
            open(&sealed[..length], &origin()),
            Err(Unusable::Garbled),
            "cut to {length}"
        );
    }
    let mut longer = sealed.clone();
    longer.push(b'x');
    assert_eq!(open(&longer, &origin()), Err(Unusable::Garbled));
}

#[test]
fn one_with_any_bit_of_its_body_turned_does_not_count() {
    let sealed = seal(&origin(), BODY);
    for place in sealed.len() - BODY.len()..sealed.len() {
        for bit in 0..8 {
            let mut damaged = sealed.clone();
            damaged[place] ^= 1 << bit;
            assert_eq!(open(&damaged, &origin()), Err(Unusable::Damaged));
        }
    }
}

#[test]
fn one_of_another_version_is_named_whatever_else_its_head_says() {
    let other = b"{\"version\":7,\"shape\":\"round\"}\nbody";
    assert_eq!(open(other, &origin()), Err(Unusable::Version { found: 7 }));
    for garbage in [&b""[..], b"\n", b"{}\n", b"[1]\n", &[0xff; 5000]] {
        assert_eq!(open(garbage, &origin()), Err(Unusable::Garbled));
    }
}

#[test]
fn keys_survive_the_way_through_the_file() {
    let keys = Keys {
        anchors: vec![Der(vec![0, 1, 0xfe, 0xff])],
        held: vec![HeldKey {
            identity: "spiffe://cluster.local/ns/shop/sa/web".into(),
            chain: vec![Der(vec![1]), Der(Vec::new())],
            key: Der((0..=255).collect()),
        }],
    };
    let read = Keys::decode(&keys.encode()).unwrap();
    assert!(read == keys);
    for bad in ["\"abc\"", "\"zz\"", "\"+1\"", "\"ü\"", "7"] {
        let body = format!("{{\"anchors\":[{bad}],\"held\":[]}}");
        assert!(Keys::decode(body.as_bytes()).is_err(), "{bad}");
    }
}

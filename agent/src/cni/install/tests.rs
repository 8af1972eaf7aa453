//! The installer on directories like those of a node.

use std::{
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    time::Instant,
};

use super::*;

const FLANNEL: &str = r#"{
  "cniVersion": "0.3.1",
  "name": "cbr0",
  "plugins": [
    { "type": "flannel" },
    { "type": "portmap", "capabilities": { "portMappings": true } }
  ]
}
"#;
const BRIDGE: &str = "{\"cniVersion\":\"0.4.0\",\"name\":\"net\",\"type\":\"bridge\"}";

struct Node {
    root: tempfile::TempDir,
}

impl Node {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("plugin-of-the-image"), "the plugin").unwrap();
        Self { root }
    }

    /// With kubeadm's directories and flannel.
    fn kubeadm() -> Self {
        let node = Self::new();
        node.file("/opt/cni/bin/flannel", "");
        node.file("/etc/cni/net.d/10-flannel.conflist", FLANNEL);
        node
    }

    fn path(&self, path: &str) -> PathBuf {
        self.root.path().join(path.trim_start_matches('/'))
    }

    fn file(&self, path: &str, text: &str) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn read(&self, path: &str) -> String {
        fs::read_to_string(self.path(path)).unwrap()
    }

    fn settings(&self) -> InstallSettings {
        InstallSettings {
            host_root: self.root.path().into(),
            conf_dir: None,
            bin_dir: None,
            program: self.root.path().join("plugin-of-the-image"),
            run_dir: "/run/picomesh".into(),
            intent: "/var/lib/picomesh/cni.json".into(),
        }
    }

    fn installer(&self) -> Installer {
        Installer::new(self.settings())
    }

    fn installed(&self) -> (String, String) {
        match self.installer().ensure().unwrap().0 {
            Installed::At {
                configuration,
                program,
            } => (
                configuration.display().to_string(),
                program.display().to_string(),
            ),
            other @ (Installed::No | Installed::NoNetwork | Installed::Failed(_)) => {
                panic!("{other:?}")
            }
        }
    }

    /// Every file below the root, with its mode and what is in it.
    fn everything(&self) -> Vec<(PathBuf, u32, Vec<u8>)> {
        let mut all = Vec::new();
        let mut folders = vec![self.root.path().to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                let found = fs::symlink_metadata(&path).unwrap();
                if found.is_dir() {
                    folders.push(path);
                } else if found.is_file() {
                    let bytes = fs::read(&path).unwrap();
                    all.push((path, found.mode(), bytes));
                }
            }
        }
        all.sort();
        all
    }
}

#[test]
fn the_directories_of_each_distribution_are_found() {
    let k3s = "/var/lib/rancher/k3s";
    let rows: &[(&str, String, String)] = &[
        ("kubeadm", "/etc/cni/net.d".into(), "/opt/cni/bin".into()),
        ("debian", "/etc/cni/net.d".into(), "/usr/lib/cni".into()),
        (
            "k3s",
            format!("{k3s}/agent/etc/cni/net.d"),
            format!("{k3s}/data/cni"),
        ),
        (
            "old k3s",
            format!("{k3s}/agent/etc/cni/net.d"),
            format!("{k3s}/data/current/bin"),
        ),
        ("k3d", format!("{k3s}/agent/etc/cni/net.d"), "/bin".into()),
        (
            "microk8s",
            "/var/snap/microk8s/current/args/cni-network".into(),
            "/var/snap/microk8s/current/opt/cni/bin".into(),
        ),
    ];
    for (name, conf, bin) in rows {
        let node = Node::new();
        if *name == "old k3s" {
            node.file(&format!("{k3s}/data/1a2b/bin/flannel"), "");
            symlink(
                format!("{k3s}/data/1a2b"),
                node.path(&format!("{k3s}/data/current")),
            )
            .unwrap();
            // Of a container's tools, and not the network's.
            node.file("/bin/sh", "");
        } else if *name == "microk8s" {
            node.file("/var/snap/microk8s/77/opt/cni/bin/flannel", "");
            symlink("77", node.path("/var/snap/microk8s/current")).unwrap();
        } else {
            node.file(&format!("{bin}/flannel"), "");
        }
        if *name != "kubeadm" {
            fs::create_dir_all(node.path("/etc/cni/net.d")).unwrap();
            fs::create_dir_all(node.path("/opt/cni/bin")).unwrap();
        }
        node.file(&format!("{conf}/10-flannel.conflist"), FLANNEL);
        let (configuration, program) = node.installed();
        assert_eq!(
            configuration,
            format!("{conf}/10-flannel.conflist"),
            "{name}"
        );
        assert_eq!(program, format!("{bin}/picomesh-cni"), "{name}");
    }
}

#[test]
fn what_is_installed_is_complete_and_removed_without_a_trace() {
    let node = Node::kubeadm();
    let conf = node.path("/etc/cni/net.d/10-flannel.conflist");
    fs::set_permissions(&conf, fs::Permissions::from_mode(0o600)).unwrap();
    let before = node.everything();
    let installer = node.installer();
    assert_eq!(installer.ensure().unwrap().1.len(), 2);
    let list: serde_json::Value =
        serde_json::from_str(&node.read("/etc/cni/net.d/10-flannel.conflist")).unwrap();
    let entry = &list["plugins"][2];
    assert_eq!(entry["type"], "picomesh-cni");
    assert_eq!(
        entry["capabilities"]["io.kubernetes.cri.pod-annotations"],
        true
    );
    assert_eq!(entry["runDir"], "/run/picomesh");
    assert_eq!(entry["intent"], "/var/lib/picomesh/cni.json");
    let program = node.path("/opt/cni/bin/picomesh-cni");
    assert_eq!(fs::read(&program).unwrap(), b"the plugin");
    assert_eq!(fs::metadata(&program).unwrap().mode() & 0o777, 0o755);
    assert_eq!(
        installer.ensure().unwrap().1,
        [""; 0].map(PathBuf::from),
        "nothing to do"
    );

    node.file("/var/lib/picomesh/cni.json", "{}");
    let removed = installer.remove();
    assert!(removed.problems.is_empty(), "{:?}", removed.problems);
    assert_eq!(removed.done.len(), 3);
    assert_eq!(node.everything(), before);
    assert!(!node.path("/var/lib/picomesh").exists());
    assert!(installer.remove().done.is_empty());
}

#[test]
fn a_new_build_replaces_the_program_and_its_entry() {
    let node = Node::kubeadm();
    node.installed();
    fs::write(node.path("/plugin-of-the-image"), "the plugin, better").unwrap();
    let mut settings = node.settings();
    settings.run_dir = "/run/other".into();
    let (_, written) = Installer::new(settings).ensure().unwrap();
    assert_eq!(written.len(), 2);
    assert_eq!(node.read("/opt/cni/bin/picomesh-cni"), "the plugin, better");
    let list = node.read("/etc/cni/net.d/10-flannel.conflist");
    assert_eq!(list.matches("picomesh-cni").count(), 1, "{list}");
    assert!(list.contains("/run/other"));
}

#[test]
fn a_single_configuration_gets_a_list_that_comes_first_and_stays_as_it_is() {
    let node = Node::new();
    node.file("/opt/cni/bin/bridge", "");
    node.file("/etc/cni/net.d/10-net.conf", BRIDGE);
    node.file("/etc/cni/net.d/README", "no configuration");
    let before = node.everything();
    let (configuration, _) = node.installed();
    assert_eq!(configuration, "/etc/cni/net.d/10-net-picomesh.conflist");
    let names = fs::read_dir(node.path("/etc/cni/net.d")).unwrap();
    let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let first = names.filter(|name| is_configuration(name)).min();
    assert_eq!(first.as_deref(), Some("10-net-picomesh.conflist"));
    assert_eq!(node.read("/etc/cni/net.d/10-net.conf"), BRIDGE);

    // Whoever writes the configuration anew finds it in the list.
    node.file(
        "/etc/cni/net.d/10-net.conf",
        &BRIDGE.replace("net", "other"),
    );
    node.installed();
    assert!(
        node.read("/etc/cni/net.d/10-net-picomesh.conflist")
            .contains("other")
    );
    node.file("/etc/cni/net.d/10-net.conf", BRIDGE);

    // A list of somebody else's takes its place; ours goes.
    node.file("/etc/cni/net.d/05-net.conflist", FLANNEL);
    node.file("/opt/cni/bin/flannel", "");
    node.installed();
    assert!(
        !node
            .path("/etc/cni/net.d/10-net-picomesh.conflist")
            .exists()
    );
    fs::remove_file(node.path("/etc/cni/net.d/05-net.conflist")).unwrap();
    fs::remove_file(node.path("/opt/cni/bin/flannel")).unwrap();
    node.installed();
    node.installer().remove();
    assert_eq!(node.everything(), before);
}

#[test]
fn a_list_goes_with_the_configuration_that_it_was_made_of() {
    let node = Node::new();
    node.file("/opt/cni/bin/bridge", "");
    node.file("/etc/cni/net.d/10-net.conf", BRIDGE);
    node.installed();
    fs::remove_file(node.path("/etc/cni/net.d/10-net.conf")).unwrap();
    let (now, written) = node.installer().ensure().unwrap();
    assert_eq!((now, written.len()), (Installed::NoNetwork, 1));
    assert!(
        !node
            .path("/etc/cni/net.d/10-net-picomesh.conflist")
            .exists()
    );
}

#[test]
fn a_directory_that_is_not_roots_is_told_with_the_remedy() {
    let denied = io::Error::from(io::ErrorKind::PermissionDenied);
    let told = at("/opt/cni/bin/x".into())(denied).to_string();
    assert!(
        told.contains("/opt/cni/bin/x") && told.contains("DAC_OVERRIDE"),
        "{told}"
    );
}

#[test]
fn when_another_list_comes_first_the_entry_moves_there() {
    let node = Node::kubeadm();
    node.installed();
    let other = FLANNEL.replace("cbr0", "newer");
    node.file("/etc/cni/net.d/05-newer.conflist", &other);
    let (configuration, _) = node.installed();
    assert_eq!(configuration, "/etc/cni/net.d/05-newer.conflist");
    assert_eq!(node.read("/etc/cni/net.d/10-flannel.conflist"), FLANNEL);
    assert!(
        node.read("/etc/cni/net.d/05-newer.conflist")
            .contains("picomesh-cni")
    );
}

#[test]
fn what_cannot_be_read_is_reported_and_left_alone() {
    for (text, word) in [
        (
            "{\"cniVersion\": \"0.3.1\", \"plugins\": [",
            "is no network configuration",
        ),
        ("", "is no network configuration"),
        (
            "{\"cniVersion\":\"0.3.1\",\"plugins\":[]}",
            "has no plugins",
        ),
        (
            "{\"cniVersion\":\"0.1.0\",\"plugins\":[{\"type\":\"flannel\"}]}",
            "0.1.0",
        ),
    ] {
        let node = Node::kubeadm();
        // It comes first, so the runtime fails at it too.
        node.file("/etc/cni/net.d/00-broken.conflist", text);
        let before = node.everything();
        let error = node.installer().ensure().unwrap_err().to_string();
        assert!(
            error.contains("/etc/cni/net.d/00-broken.conflist"),
            "{error}"
        );
        assert!(error.contains(word), "{error}");
        let ours: Vec<_> = node.everything();
        let without_program = |(path, ..): &&(PathBuf, u32, Vec<u8>)| {
            path.file_name().is_none_or(|name| name != PLUGIN)
        };
        assert!(before.iter().eq(ours.iter().filter(without_program)));
    }
}

#[test]
fn what_the_plugin_needs_stays_while_a_configuration_names_it() {
    let broken = "{\"plugins\": [ {\"type\":\"picomesh-cni\"}";
    let long = format!("{FLANNEL}{}", " ".repeat(conflist::MAX_BYTES));
    for (text, word) in [(broken, "still names"), (&long, "more than")] {
        let node = Node::kubeadm();
        node.installed();
        node.file("/etc/cni/net.d/20-other.conflist", text);
        node.file("/var/lib/picomesh/cni.json", "{}");
        let removed = node.installer().remove();
        assert!(!removed.unplugged);
        let told: Vec<_> = removed.problems.iter().map(ToString::to_string).collect();
        let is_told = |line: &String| line.contains("20-other") && line.contains(word);
        assert!(told.iter().any(is_told), "{told:?}");
        assert_eq!(node.read("/etc/cni/net.d/20-other.conflist"), text);
        assert_eq!(node.read("/etc/cni/net.d/10-flannel.conflist"), FLANNEL);
        assert!(node.path("/opt/cni/bin/picomesh-cni").exists());
        assert!(node.path("/var/lib/picomesh/cni.json").exists());

        fs::remove_file(node.path("/etc/cni/net.d/20-other.conflist")).unwrap();
        let removed = node.installer().remove();
        assert!(removed.unplugged && removed.problems.is_empty());
        assert!(!node.path("/opt/cni/bin/picomesh-cni").exists());
        assert!(!node.path("/var/lib/picomesh/cni.json").exists());
    }
}

#[test]
fn a_version_that_the_plugin_does_not_know_is_left_without_it() {
    let node = Node::kubeadm();
    let conf = "/etc/cni/net.d/10-flannel.conflist";
    let newer = FLANNEL.replace("0.3.1", "1.2.0");
    node.file(conf, &newer);
    let before = node.everything();
    let error = node.installer().ensure().unwrap_err().to_string();
    assert!(error.contains("\"1.2.0\""), "{error}");
    assert_eq!(node.everything(), before);

    // Somebody has changed the version below our entry.
    node.file(conf, FLANNEL);
    node.installed();
    for version in ["1.2.0", "0.2.0"] {
        let with = node.read(conf).replace("0.3.1", version);
        assert!(with.contains(PLUGIN));
        node.file(conf, &with);
        node.installer().ensure().unwrap_err();
        assert_eq!(node.read(conf), FLANNEL.replace("0.3.1", version));
        // And at the end the same, where no agent had looked in between.
        node.file(conf, &with);
        assert!(node.installer().remove().unplugged);
        assert_eq!(node.read(conf), FLANNEL.replace("0.3.1", version));
        node.file(conf, FLANNEL);
        node.installed();
    }
}

#[test]
fn a_link_to_a_list_that_names_the_plugin_counts() {
    let node = Node::kubeadm();
    node.installed();
    node.file(
        "/elsewhere",
        &node.read("/etc/cni/net.d/10-flannel.conflist"),
    );
    symlink("/elsewhere", node.path("/etc/cni/net.d/30-link.conflist")).unwrap();
    symlink("/nowhere", node.path("/etc/cni/net.d/40-link.conflist")).unwrap();
    fs::create_dir(node.path("/etc/cni/net.d/50-dir.conf")).unwrap();
    let removed = node.installer().remove();
    assert_eq!(removed.problems.len(), 1, "{:?}", removed.problems);
    assert!(removed.problems[0].to_string().contains("30-link"));
    assert!(node.path("/opt/cni/bin/picomesh-cni").exists());
}

#[test]
fn a_list_that_somebody_is_changing_is_tried_again() {
    let node = Node::kubeadm();
    let before = node.everything();
    node.installed();
    let conf = node.path("/etc/cni/net.d/10-flannel.conflist");
    let mode = fs::metadata(&conf).unwrap().permissions();
    let busy = Arc::new(AtomicBool::new(true));
    let changing = {
        let busy = Arc::clone(&busy);
        thread::spawn(move || {
            while busy.load(Ordering::Acquire) {
                // Between our own removal and renaming it is not there.
                let _moment = fs::set_permissions(&conf, mode.clone());
            }
        })
    };
    let installer = node.installer();
    let removing = thread::spawn(move || installer.remove());
    thread::sleep(2 * GATHER);
    busy.store(false, Ordering::Release);
    changing.join().unwrap();
    let removed = removing.join().unwrap();
    assert!(removed.unplugged, "{:?}", removed.problems);
    assert_eq!(node.everything(), before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_plugin_what_an_agent_before_has_put_there_goes() {
    let node = Node::kubeadm();
    let before = node.everything();
    node.installed();
    let broken = "{\"plugins\": [ {\"type\":\"picomesh-cni\"}";
    node.file("/etc/cni/net.d/20-broken.conflist", broken);
    let (told, seen) = watch::channel(Installed::No);
    let (_drain, guard) = drain::Drain::new();
    let writes = Arc::new(AtomicBool::new(true));
    let kept = tokio::spawn(Arc::new(node.installer()).keep_out(writes, told, guard));
    until("told", || matches!(*seen.borrow(), Installed::Failed(_))).await;
    assert!(node.path("/opt/cni/bin/picomesh-cni").exists());
    fs::remove_file(node.path("/etc/cni/net.d/20-broken.conflist")).unwrap();
    kept.await.unwrap();
    assert_eq!(*seen.borrow(), Installed::No);
    assert_eq!(node.everything(), before);
}

#[test]
fn a_node_without_network_waits_and_one_without_its_plugins_is_told() {
    let node = Node::new();
    let installed = || node.installer().ensure();
    assert_eq!(installed().unwrap().0, Installed::NoNetwork);
    fs::create_dir_all(node.path("/etc/cni/net.d")).unwrap();
    assert_eq!(installed().unwrap().0, Installed::NoNetwork);
    node.file("/etc/cni/net.d/10-flannel.conflist", FLANNEL);
    fs::create_dir_all(node.path("/opt/cni/bin")).unwrap();
    let error = installed().unwrap_err().to_string();
    assert!(
        error.contains("flannel") && error.contains("/opt/cni/bin"),
        "{error}"
    );
    assert_eq!(node.read("/etc/cni/net.d/10-flannel.conflist"), FLANNEL);
    // Whoever names a directory knows why.
    let mut settings = node.settings();
    settings.bin_dir = Some("/opt/cni/bin".into());
    Installer::new(settings).ensure().unwrap();
    assert!(node.path("/opt/cni/bin/picomesh-cni").exists());
}

#[test]
fn a_configuration_that_is_a_link_is_left_alone() {
    let node = Node::kubeadm();
    node.file("/elsewhere", FLANNEL);
    symlink("/elsewhere", node.path("/etc/cni/net.d/00-link.conflist")).unwrap();
    let error = node.installer().ensure().unwrap_err().to_string();
    assert!(error.contains("00-link.conflist"), "{error}");
    assert_eq!(node.read("/elsewhere"), FLANNEL);
}

#[test]
fn who_puts_back_what_we_replace_is_given_way_more_and_more() {
    let (mut repairs, mut now) = (Repairs::default(), Instant::now());
    let written = [PathBuf::from("/etc/cni/net.d/10-flannel.conflist")];
    let mut rests = Vec::new();
    for _ in 0..10 {
        let rest = repairs.rest(&written, now);
        now += rest.unwrap_or(GATHER);
        rests.push(rest.map(|rest| rest.as_millis()));
    }
    let some = [200, 400, 800, 1600, 3200, 5000, 5000].map(Some);
    assert_eq!(rests[..REPAIRS], [None; REPAIRS]);
    assert_eq!(rests[REPAIRS..], some);
    assert!(repairs.sentence().contains("restores /etc/cni/net.d/10-f"));
    // Told until a minute is over in which less was done.
    assert!(repairs.rest(&[], now).is_some());
    assert_eq!(repairs.rest(&[], now + QUARREL), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_who_each_put_theirs_back_do_it_rarely_and_people_are_told() {
    let node = Node::kubeadm();
    let (told, seen) = watch::channel(Installed::No);
    let (drain, guard) = drain::Drain::new();
    let writes = Arc::new(AtomicBool::new(true));
    let kept = tokio::spawn(Arc::new(node.installer()).keep(writes, told, guard));
    let conf = "/etc/cni/net.d/10-flannel.conflist";
    let mut restored = 0;
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(4) {
        if node.read(conf).contains(PLUGIN) {
            node.file(conf, FLANNEL);
            restored += 1;
        }
        sleep(Duration::from_millis(5)).await;
    }
    assert!((4..=9).contains(&restored), "{restored} times in 4 s");
    let quarrel =
        |now: &Installed| matches!(now, Installed::Failed(why) if why.contains("restores"));
    assert!(quarrel(&seen.borrow()), "{:?}", *seen.borrow());
    drain.drain(Duration::from_secs(5)).await;
    kept.await.unwrap();
}

/// Waits until `done`, and says how long it took.
async fn until(what: &str, done: impl Fn() -> bool) -> Duration {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < Duration::from_secs(20), "{what}");
        sleep(Duration::from_millis(10)).await;
    }
    begun.elapsed()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_another_tool_undoes_is_put_back_soon() {
    let node = Node::new();
    node.file("/opt/cni/bin/flannel", "");
    fs::create_dir_all(node.path("/etc/cni/net.d")).unwrap();
    let (told, seen) = watch::channel(Installed::No);
    let (drain, guard) = drain::Drain::new();
    let writes = Arc::new(AtomicBool::new(true));
    let kept = tokio::spawn(Arc::new(node.installer()).keep(writes, told, guard));
    let conf = "/etc/cni/net.d/10-flannel.conflist";
    let has = || node.read(conf).contains("picomesh-cni");
    until("told", || *seen.borrow() == Installed::NoNetwork).await;

    node.file(conf, FLANNEL);
    let took = until("the network comes", has).await;
    assert!(took < POLL, "it is told, not polled: {took:?}");
    until("told", || matches!(*seen.borrow(), Installed::At { .. })).await;

    node.file(conf, &FLANNEL.replace("cbr0", "anew"));
    until("written anew", has).await;
    assert!(node.read(conf).contains("anew"));
    fs::remove_file(node.path("/opt/cni/bin/picomesh-cni")).unwrap();
    until("removed", || {
        node.path("/opt/cni/bin/picomesh-cni").exists()
    })
    .await;
    node.file(conf, "{");
    until(
        "told",
        || matches!(&*seen.borrow(), Installed::Failed(why) if why.contains(conf)),
    )
    .await;
    node.file(conf, FLANNEL);
    until("mended by its owner", has).await;

    drain.drain(Duration::from_secs(5)).await;
    kept.await.unwrap();
}

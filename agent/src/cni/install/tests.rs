//! The installer on directories like those of a node.

use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

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
const NET_D: &str = "/etc/cni/net.d";
const ORIGINAL: &str = "/etc/cni/net.d/10-flannel.conflist";
const OURS: &str = "/etc/cni/net.d/00-picomesh.conflist";
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
        node.file(ORIGINAL, FLANNEL);
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

    /// What the runtime would use.
    fn first(&self) -> Option<String> {
        let entries = fs::read_dir(self.path(NET_D)).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| is_configuration(name)).min()
    }

    fn remove_file(&self, path: &str) {
        fs::remove_file(self.path(path)).unwrap();
    }

    /// Is ours made of what is in that file now?
    fn follows(&self, name: &str) -> bool {
        let (ours, original) = (self.read(OURS), self.read(&format!("{NET_D}/{name}")));
        let kinds = |text: &str| {
            conflist::programs(text).or_else(|_| conflist::program(text).map(|only| vec![only]))
        };
        conflist::made_of(&ours).as_deref() == Some(name)
            && kinds(&ours) == kinds(&original)
            && original.lines().take(4).all(|line| ours.contains(line))
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
        match self.installer().ensure().unwrap().now {
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
            format!("{conf}/00-picomesh.conflist"),
            "{name}"
        );
        assert_eq!(node.read(&format!("{conf}/10-flannel.conflist")), FLANNEL);
        assert_eq!(program, format!("{bin}/picomesh-cni"), "{name}");
    }
}

#[test]
fn what_is_installed_is_complete_and_removed_without_a_trace() {
    let node = Node::kubeadm();
    let conf = node.path(ORIGINAL);
    fs::set_permissions(&conf, fs::Permissions::from_mode(0o600)).unwrap();
    let before = node.everything();
    let installer = node.installer();
    assert_eq!(installer.ensure().unwrap().written.len(), 2);
    assert_eq!(node.first().as_deref(), Some(LIST));
    let list: serde_json::Value = serde_json::from_str(&node.read(OURS)).unwrap();
    let original: serde_json::Value = serde_json::from_str(FLANNEL).unwrap();
    // What the network plugin keeps of pods, it finds again.
    assert_eq!(list["name"], original["name"]);
    assert_eq!(list["plugins"][1], original["plugins"][1]);
    let entry = &list["plugins"][2];
    assert_eq!(entry["type"], "picomesh-cni");
    assert_eq!(
        entry["capabilities"]["io.kubernetes.cri.pod-annotations"],
        true
    );
    assert_eq!(entry["runDir"], "/run/picomesh");
    assert_eq!(entry["intent"], "/var/lib/picomesh/cni.json");
    let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
    assert_eq!(mode(&node.path(OURS)), 0o600);
    let program = node.path("/opt/cni/bin/picomesh-cni");
    assert_eq!(fs::read(&program).unwrap(), b"the plugin");
    assert_eq!(mode(&program), 0o755);
    assert_eq!(
        installer.ensure().unwrap().written.len(),
        0,
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
fn a_list_that_is_retired_stays_away_and_the_program_is_there_until_the_end() {
    let node = Node::kubeadm();
    let installer = node.installer();
    installer.ensure().unwrap();
    let retired = installer.retire();
    assert!(retired.problems.is_empty(), "{:?}", retired.problems);
    assert_eq!(retired.done, [PathBuf::from(OURS)]);
    assert_eq!(node.first().as_deref(), Some("10-flannel.conflist"));
    // Who looks after it finds nothing to do.
    let ensured = installer.ensure().unwrap();
    assert_eq!((ensured.now, ensured.written.len()), (Installed::No, 0));
    assert!(!node.path(OURS).exists());
    assert!(node.path("/opt/cni/bin/picomesh-cni").exists());
    assert!(installer.remove().unplugged);
    assert!(!node.path("/opt/cni/bin/picomesh-cni").exists());
}

#[test]
fn nobody_elses_file_is_ever_written() {
    let node = Node::kubeadm();
    node.file("/etc/cni/net.d/20-net.conf", BRIDGE);
    let inodes = || {
        ["10-flannel.conflist", "20-net.conf"].map(|name| {
            let found = fs::metadata(node.path(&format!("{NET_D}/{name}"))).unwrap();
            (found.ino(), found.ctime(), found.ctime_nsec())
        })
    };
    let before = inodes();
    node.installed();
    node.remove_file(OURS);
    node.installed();
    node.installer().remove();
    assert_eq!(inodes(), before);
}

#[test]
fn a_network_plugin_that_writes_its_list_anew_does_not_open_the_node() {
    let node = Node::kubeadm();
    node.installed();
    // No agent is there yet, and the runtime starts pods by what it finds.
    node.file(ORIGINAL, &FLANNEL.replace("cbr0", "anew"));
    assert_eq!(node.first().as_deref(), Some(LIST));
    assert!(node.read(OURS).contains(PLUGIN));
    // It is, and ours follows.
    node.installed();
    assert!(node.follows("10-flannel.conflist"));
    assert!(node.read(OURS).contains("anew"));
}

#[test]
fn a_new_build_replaces_the_program_and_its_entry() {
    let node = Node::kubeadm();
    node.installed();
    fs::write(node.path("/plugin-of-the-image"), "the plugin, better").unwrap();
    let mut settings = node.settings();
    settings.run_dir = "/run/other".into();
    let done = Installer::new(settings).ensure().unwrap();
    assert_eq!(done.written.len(), 2);
    assert_eq!(node.read("/opt/cni/bin/picomesh-cni"), "the plugin, better");
    let list = node.read(OURS);
    assert_eq!(list.matches("picomesh-cni").count(), 1, "{list}");
    assert!(list.contains("/run/other"));
}

#[test]
fn a_single_configuration_gets_a_list_that_follows_it() {
    let node = Node::new();
    node.file("/opt/cni/bin/bridge", "");
    node.file("/etc/cni/net.d/10-net.conf", BRIDGE);
    node.file("/etc/cni/net.d/README", "no configuration");
    let before = node.everything();
    assert_eq!(node.installed().0, OURS);
    assert_eq!(node.first().as_deref(), Some(LIST));
    assert!(node.follows("10-net.conf"));

    // Whoever writes the configuration anew finds it in the list.
    let other = BRIDGE.replace("net", "other");
    node.file("/etc/cni/net.d/10-net.conf", &other);
    node.installed();
    assert!(node.read(OURS).contains("other"));
    node.file("/etc/cni/net.d/10-net.conf", BRIDGE);

    // A list of somebody else's takes its place.
    node.file("/etc/cni/net.d/05-net.conflist", FLANNEL);
    node.file("/opt/cni/bin/flannel", "");
    node.installed();
    assert!(node.follows("05-net.conflist"));
    node.remove_file("/etc/cni/net.d/05-net.conflist");
    node.remove_file("/opt/cni/bin/flannel");
    node.installed();
    assert!(node.follows("10-net.conf"));
    node.installer().remove();
    assert_eq!(node.everything(), before);
}

#[test]
fn a_list_goes_with_what_it_was_made_of() {
    let broken = "/etc/cni/net.d/20-broken.conflist";
    for also in [None, Some(broken)] {
        let node = Node::kubeadm();
        node.installed();
        if let Some(path) = also {
            node.file(path, "{");
        }
        node.remove_file(ORIGINAL);
        let done = node.installer().ensure();
        match also {
            None => {
                let done = done.unwrap();
                assert_eq!((done.now, done.written.len()), (Installed::NoNetwork, 1));
            }
            Some(path) => assert!(done.unwrap_err().to_string().contains(path)),
        }
        assert!(!node.path(OURS).exists(), "{also:?}");
    }
}

#[test]
fn a_list_stays_while_its_original_is_half_written() {
    let node = Node::kubeadm();
    node.installed();
    let ours = node.read(OURS);
    for half in ["", &FLANNEL[..FLANNEL.len() / 2]] {
        node.file(ORIGINAL, half);
        let error = node.installer().ensure().unwrap_err().to_string();
        assert!(error.contains(ORIGINAL), "{error}");
        assert_eq!(node.read(OURS), ours);
    }
    // What somebody has damaged, and nothing could be made anew of, would keep every pod from starting.
    node.file(OURS, "{");
    node.installer().ensure().unwrap_err();
    assert!(!node.path(OURS).exists());
}

#[test]
fn a_list_where_the_network_is_no_longer_goes() {
    let node = Node::kubeadm();
    node.installed();
    let k3s = "/var/lib/rancher/k3s";
    node.file(
        &format!("{k3s}/agent/etc/cni/net.d/10-flannel.conflist"),
        FLANNEL,
    );
    node.file(&format!("{k3s}/data/cni/flannel"), "");
    let (configuration, _) = node.installed();
    assert!(configuration.starts_with(k3s), "{configuration}");
    assert!(!node.path(OURS).exists());
}

#[test]
fn ours_comes_before_those_of_network_plugins() {
    for name in [
        "01-kube-ovn.conflist",
        "02-istio-conf.conflist",
        "05-cilium.conflist",
        "1-k8s.conflist",
        "10-flannel.conflist",
        "10-kindnet.conflist",
        "87-podman-bridge.conflist",
    ] {
        let node = Node::new();
        node.file("/opt/cni/bin/flannel", "");
        node.file(&format!("{NET_D}/{name}"), FLANNEL);
        node.installed();
        assert_eq!(node.first().as_deref(), Some(LIST), "{name}");
    }
}

#[test]
fn what_comes_before_ours_must_lead_to_it() {
    let node = Node::kubeadm();
    let multus = "/etc/cni/net.d/00-multus.conf";
    let delegating = |to: &str| {
        format!(r#"{{"cniVersion":"0.3.1","name":"m","type":"multus","delegates":[{to}]}}"#)
    };
    node.file(multus, &delegating(FLANNEL));
    let done = node.installer().ensure().unwrap();
    let told = |done: &Ensured| match &done.now {
        Installed::Failed(why) => why.contains(multus) && why.contains("--multus-master"),
        Installed::No | Installed::NoNetwork | Installed::At { .. } => false,
    };
    assert!(told(&done), "{done:?}");
    // Ours is there for whoever looks for the first that is not his own.
    assert!(node.follows("10-flannel.conflist"));

    let by_name = r#"{"cniVersion":"0.3.1","name":"m","type":"multus-shim",
        "clusterNetwork":"/etc/cni/net.d/00-picomesh.conflist"}"#;
    for leading in [delegating(&node.read(OURS)), by_name.to_owned()] {
        node.file(multus, &leading);
        let (ours, written) = (node.read(OURS), node.installer().ensure().unwrap());
        assert!(matches!(written.now, Installed::At { .. }), "{written:?}");
        assert_eq!(
            node.read(OURS),
            ours,
            "it does not take in what has taken it in"
        );
    }
    // And if what all that leads to is gone, ours does not pretend.
    node.remove_file(ORIGINAL);
    assert_eq!(node.installer().ensure().unwrap().now, Installed::NoNetwork);
    assert!(!node.path(OURS).exists());
    node.file(multus, &delegating(FLANNEL));
    let error = node.installer().ensure().unwrap_err().to_string();
    assert!(error.contains(multus), "{error}");
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
        node.file("/etc/cni/net.d/05-broken.conflist", text);
        let before = node.everything();
        let error = node.installer().ensure().unwrap_err().to_string();
        assert!(
            error.contains("/etc/cni/net.d/05-broken.conflist"),
            "{error}"
        );
        assert!(error.contains(word), "{error}");
        assert_eq!(node.everything(), before);
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
    for version in ["1.2.0", "0.2.0"] {
        // The network plugin's own change; the runtime must go by it, and not by what was.
        node.installed();
        node.file(ORIGINAL, &FLANNEL.replace("0.3.1", version));
        let error = node.installer().ensure().unwrap_err().to_string();
        assert!(error.contains(version), "{error}");
        assert!(!node.path(OURS).exists());
        node.file(ORIGINAL, FLANNEL);
    }
    node.installed();
    assert!(node.follows("10-flannel.conflist"));
}

#[test]
fn a_link_to_a_list_that_names_the_plugin_counts() {
    let node = Node::kubeadm();
    node.installed();
    node.file("/elsewhere", &node.read(OURS));
    symlink("/elsewhere", node.path("/etc/cni/net.d/30-link.conflist")).unwrap();
    symlink("/nowhere", node.path("/etc/cni/net.d/40-link.conflist")).unwrap();
    fs::create_dir(node.path("/etc/cni/net.d/50-dir.conf")).unwrap();
    let removed = node.installer().remove();
    assert_eq!(removed.problems.len(), 1, "{:?}", removed.problems);
    assert!(removed.problems[0].to_string().contains("30-link"));
    assert!(node.path("/opt/cni/bin/picomesh-cni").exists());
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
    assert_eq!(installed().unwrap().now, Installed::NoNetwork);
    fs::create_dir_all(node.path("/etc/cni/net.d")).unwrap();
    assert_eq!(installed().unwrap().now, Installed::NoNetwork);
    node.file("/etc/cni/net.d/10-flannel.conflist", FLANNEL);
    fs::create_dir_all(node.path("/opt/cni/bin")).unwrap();
    let error = installed().unwrap_err().to_string();
    assert!(
        error.contains("flannel") && error.contains("/opt/cni/bin"),
        "{error}"
    );
    assert!(!node.path(OURS).exists());
    // Whoever names a directory knows why.
    let mut settings = node.settings();
    settings.bin_dir = Some("/opt/cni/bin".into());
    Installer::new(settings).ensure().unwrap();
    assert!(node.path("/opt/cni/bin/picomesh-cni").exists());
}

#[test]
fn a_configuration_that_is_a_link_is_read_where_it_leads_on_the_node() {
    let node = Node::kubeadm();
    let link = node.path("/etc/cni/net.d/05-link.conflist");
    symlink("/elsewhere", &link).unwrap();
    let error = node.installer().ensure().unwrap_err().to_string();
    assert!(error.contains("05-link.conflist"), "{error}");
    node.file("/elsewhere", &FLANNEL.replace("cbr0", "linked"));
    node.installed();
    assert!(node.read(OURS).contains("linked"));
    assert!(fs::symlink_metadata(link).unwrap().is_symlink());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_who_each_put_theirs_back_do_it_rarely_and_people_are_told() {
    let node = Node::kubeadm();
    let (told, seen) = watch::channel(Installed::No);
    let (drain, guard) = drain::Drain::new();
    let writes = Arc::new(AtomicBool::new(true));
    let kept = tokio::spawn(Arc::new(node.installer()).keep(writes, told, guard));
    let mut removed = 0;
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(4) {
        // As Cilium does.
        let away = node.path("/etc/cni/net.d/00-picomesh.conflist.cilium_bak");
        removed += usize::from(fs::rename(node.path(OURS), away).is_ok());
        sleep(Duration::from_millis(5)).await;
    }
    assert!((4..=9).contains(&removed), "{removed} times in 4 s");
    let quarrel =
        |now: &Installed| matches!(now, Installed::Failed(why) if why.contains("cni.exclusive"));
    assert!(quarrel(&seen.borrow()), "{:?}", *seen.borrow());
    drain.drain(Duration::from_secs(5)).await;
    kept.await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_changes_his_own_often_has_no_quarrel_with_us() {
    let node = Node::kubeadm();
    let (told, seen) = watch::channel(Installed::No);
    let (drain, guard) = drain::Drain::new();
    let writes = Arc::new(AtomicBool::new(true));
    let kept = tokio::spawn(Arc::new(node.installer()).keep(writes, told, guard));
    for change in 0..8 {
        let name = format!("net{change}");
        node.file(ORIGINAL, &FLANNEL.replace("cbr0", &name));
        let is_new = || fs::read_to_string(node.path(OURS)).is_ok_and(|ours| ours.contains(&name));
        let took = until("followed", is_new).await;
        assert!(took < POLL, "it is told, not polled: {took:?}");
    }
    until("told", || matches!(*seen.borrow(), Installed::At { .. })).await;
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
    let conf = ORIGINAL;
    let follows = || node.path(OURS).exists() && node.follows("10-flannel.conflist");
    until("told", || *seen.borrow() == Installed::NoNetwork).await;

    node.file(conf, FLANNEL);
    let took = until("the network comes", follows).await;
    assert!(took < POLL, "it is told, not polled: {took:?}");
    until("told", || matches!(*seen.borrow(), Installed::At { .. })).await;

    node.file(conf, &FLANNEL.replace("cbr0", "anew"));
    until("written anew", follows).await;
    node.remove_file("/opt/cni/bin/picomesh-cni");
    until("removed", || {
        node.path("/opt/cni/bin/picomesh-cni").exists()
    })
    .await;
    node.remove_file(OURS);
    until("removed", follows).await;
    node.file(OURS, FLANNEL);
    until("overwritten", follows).await;
    node.file(conf, "{");
    until(
        "told",
        || matches!(&*seen.borrow(), Installed::Failed(why) if why.contains(conf)),
    )
    .await;
    node.file(conf, FLANNEL);
    until("mended by its owner", follows).await;
    node.remove_file(conf);
    until("the network goes", || !node.path(OURS).exists()).await;
    until("told", || *seen.borrow() == Installed::NoNetwork).await;

    drain.drain(Duration::from_secs(5)).await;
    kept.await.unwrap();
}

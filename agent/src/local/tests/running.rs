//! The loop: what is published when, and what holds until then.

use tokio::sync::oneshot;

use super::*;
use crate::testing::manifests::{meshed_namespace, node, pod};

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

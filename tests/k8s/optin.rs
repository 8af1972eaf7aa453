//! Every word that takes a pod into the mesh or out of it, on pods that run and are never started
//! anew; and those that are never in it, whatever is said of them.

use std::{thread, time::Duration};

use anyhow::{Context, Result, ensure};
use picomesh_tests::{cluster::TOOLS, wait};
use serde_json::json;

use crate::{
    ground::{Ground, Need, PATIENCE, Test, ground, slowly},
    install::{NAMESPACE, Part, diagnosis, wait_captured},
    talk::{SLEEP, Scene, both, event_about, label},
};

pub(crate) const TESTS: &[Test] = &[Test {
    name: "optin::pods_come_and_go_by_every_word_that_says_so",
    needs: &[Need::Full, Need::Nodes, Need::Image],
    run: pods_come_and_go_by_every_word_that_says_so,
}];

/// What may be said of a pod for it, and of a pod of a namespace in the mesh against it.
const FOR: [(&str, &str); 5] = [
    ("label", "picomesh.io/mesh=enabled"),
    ("annotate", "picomesh.io/mesh=enabled"),
    ("annotate", "linkerd.io/inject=enabled"),
    ("label", "linkerd.io/injection=enabled"),
    ("label", "istio.io/dataplane-mode=ambient"),
];
const AGAINST: [(&str, &str); 4] = [
    ("label", "picomesh.io/mesh=disabled"),
    ("annotate", "picomesh.io/mesh=disabled"),
    ("annotate", "linkerd.io/inject=disabled"),
    ("label", "istio.io/dataplane-mode=none"),
];
/// Of a namespace, besides the label that all other tests use.
const ALIASES: [(&str, &str); 3] = [
    ("annotate", "linkerd.io/inject=enabled"),
    ("label", "linkerd.io/injection=enabled"),
    ("label", "istio.io/dataplane-mode=ambient"),
];

fn pods_come_and_go_by_every_word_that_says_so() -> Result<()> {
    let ground = ground()?;
    let [near, _] = both(ground.own()?)?;
    let mut scene = Scene::without_mesh(&ground, "words")?;
    scene.install(&ground, Part::All)?;
    let captured = |wanted: u64, word: &str| {
        let waited = wait_captured(&ground, wanted).with_context(|| diagnosis(&ground));
        waited.with_context(|| word.to_owned())
    };
    let namespace = ["namespace", scene.space.name()];
    captured(0, "before anybody said a word")?;
    for (verb, word) in FOR {
        let _said = Said::new(&scene, verb, ["pod", "far"], word)?;
        captured(1, word)?;
    }
    captured(0, "after the last word was taken back")?;
    for (verb, word) in ALIASES {
        let _said = Said::new(&scene, verb, namespace, word)?;
        captured(2, word)?;
    }
    captured(0, "after the namespace's last word was taken back")?;
    label(&scene.space, "enabled")?;
    for (verb, word) in AGAINST {
        let _said = Said::new(&scene, verb, ["pod", "far"], word)?;
        captured(1, word)?;
    }
    captured(2, "the namespace's word alone")?;
    carried(&scene, &ground, "the namespace's word alone")?;

    // Ports that are left alone, of a pod and of the namespace, of who serves and of who calls.
    for (what, words) in [
        (["pod", "far"], "config.picomesh.io/skip-inbound-ports=8080"),
        (
            ["pod", "near"],
            "config.linkerd.io/skip-outbound-ports=8000-8080",
        ),
        (namespace, "config.linkerd.io/skip-inbound-ports=8080"),
    ] {
        let said = Said::new(&scene, "annotate", what, words)?;
        wait::for_value(words, PATIENCE, || scene.is_read(&ground).map(Some))?;
        drop(said);
        carried(&scene, &ground, words)?;
    }
    // What does not read changes nothing, and is told where a person looks.
    let nonsense = "config.picomesh.io/skip-inbound-ports=all";
    let _said = Said::new(&scene, "annotate", ["pod", "far"], nonsense)?;
    event_about(&scene.space, "Pod", "far", "skip-inbound-ports")?;
    captured(2, nonsense)?;
    scene.is_carried(&ground)?;

    // Never: pods on their node's network, and those of the system.
    scene.space.apply(json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "host", "labels": {"picomesh.io/mesh": "enabled"}},
        "spec": {
            "nodeName": near.name(),
            "hostNetwork": true,
            "terminationGracePeriodSeconds": 1,
            "containers": [{
                "name": "main", "image": TOOLS, "imagePullPolicy": "Never", "command": SLEEP,
            }],
        },
    }))?;
    scene.space.wait_ready("host")?;
    let kubectl = ground.kubectl();
    let system = SystemPod::new(&ground, near.name())?;
    let systems = ["kube-system", NAMESPACE];
    for namespace in systems {
        kubectl.run(&["label", "namespace", namespace, "picomesh.io/mesh=enabled"])?;
    }
    // Longer than an agent takes for anybody else.
    thread::sleep(Duration::from_secs(5));
    let seen = captured(2, "the system's pods");
    for namespace in systems {
        kubectl.run(&["label", "namespace", namespace, "picomesh.io/mesh-"])?;
    }
    drop(system);
    seen?;
    scene.is_carried(&ground)
}

/// A word on an object of the scene's namespace. Taken back when dropped.
struct Said<'a> {
    scene: &'a Scene,
    verb: &'a str,
    what: [&'a str; 2],
    key: &'a str,
}

impl<'a> Said<'a> {
    fn new(scene: &'a Scene, verb: &'a str, what: [&'a str; 2], word: &'a str) -> Result<Self> {
        let (key, _) = word.split_once('=').context("a key and its value")?;
        let [kind, name] = what;
        scene.space.kubectl(&[verb, kind, name, word])?;
        Ok(Self {
            scene,
            verb,
            what,
            key,
        })
    }
}

impl Drop for Said<'_> {
    fn drop(&mut self) {
        let [kind, name] = self.what;
        let gone = format!("{}-", self.key);
        if let Err(e) = self.scene.space.kubectl(&[self.verb, kind, name, &gone]) {
            eprintln!("{e:#}");
        }
    }
}

/// A pod that the system could have. Removed when dropped.
struct SystemPod<'a>(&'a Ground);

const SYSTEM_POD: [&str; 4] = ["pod", "picomesh-test", "-n", "kube-system"];

impl<'a> SystemPod<'a> {
    fn new(ground: &'a Ground, node: &str) -> Result<Self> {
        ground.kubectl().apply(&json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": SYSTEM_POD[1], "namespace": SYSTEM_POD[3]},
            "spec": {
                "nodeName": node,
                "terminationGracePeriodSeconds": 1,
                "containers": [{
                    "name": "main", "image": TOOLS, "imagePullPolicy": "Never", "command": SLEEP,
                }],
            },
        }))?;
        let pod = Self(ground);
        let ready = ["wait", "--for=condition=Ready", "--timeout=90s"];
        ground.kubectl().run(&[&ready[..], &SYSTEM_POD].concat())?;
        Ok(pod)
    }
}

impl Drop for SystemPod<'_> {
    fn drop(&mut self) {
        let delete = [&["delete"][..], &SYSTEM_POD].concat();
        if let Err(e) = self.0.kubectl().run(&delete) {
            eprintln!("{e:#}");
        }
    }
}

/// Soon nothing can be read any more.
fn carried(scene: &Scene, ground: &Ground, when: &str) -> Result<()> {
    wait::for_value(&format!("{when}: all is carried"), PATIENCE, || {
        slowly(scene.is_carried(ground)).map(Some)
    })
    .and_then(|()| {
        ensure!(scene.speak().is_ok(), "{when}: nobody speaks");
        Ok(())
    })
}

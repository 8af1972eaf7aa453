//! Linkerd's policy kinds on a cluster that gets them while the mesh runs.

use std::{thread, time::Duration};

use anyhow::{Context, Result};
use picomesh_tests::{client::exchange, crowd::WORD, wait};
use serde_json::{Value, json};

use crate::{
    ground::{Ground, Need, PATIENCE, Test, ground},
    install::{Kustomization, diagnosis},
    talk::{PORT, Scene, event_about},
};

pub(crate) const TESTS: &[Test] = &[Test {
    name: "policies::kinds_that_come_later_decide_and_what_does_not_read_is_told",
    needs: &[Need::Full, Need::Nodes, Need::Image],
    run: kinds_that_come_later_decide_and_what_does_not_read_is_told,
}];

fn kinds_that_come_later_decide_and_what_does_not_read_is_told() -> Result<()> {
    let ground = ground()?;
    let scene = Scene::new(&ground, "policies")?;
    scene.wait_speaks()?;
    let _kinds = Kustomization::new(ground.kubectl(), "create", "policy-crds")?;
    let established = [
        "wait",
        "--for=condition=Established",
        "--timeout=60s",
        "crd",
    ];
    let servers = [
        "servers.policy.linkerd.io",
        "serverauthorizations.policy.linkerd.io",
    ];
    ground
        .kubectl()
        .run(&[&established[..], &servers].concat())?;

    let space = &scene.space;
    space.apply(json!({
        "apiVersion": "policy.linkerd.io/v1beta3", "kind": "Server",
        "metadata": {"name": "far"},
        "spec": {
            "podSelector": {"matchLabels": {"app": "far"}},
            "port": PORT, "proxyProtocol": "opaque",
        },
    }))?;
    waits_served(
        &scene,
        &ground,
        false,
        "a Server that nobody is authorized for",
    )?;
    let authorization = |client: Value| {
        space.apply(json!({
            "apiVersion": "policy.linkerd.io/v1beta1", "kind": "ServerAuthorization",
            "metadata": {"name": "near"},
            "spec": {"server": {"name": "far"}, "client": client},
        }))
    };
    let account = |name: &str| json!({"meshTLS": {"serviceAccounts": [{"name": name}]}});
    authorization(account("default"))?;
    waits_served(&scene, &ground, true, "the client's account is authorized")?;

    // What the API server takes and nobody can read: what it said before still counts.
    let mut broken = account("nobody");
    broken["networks"] = json!([{"cidr": "10.0.0.0/99"}]);
    authorization(broken)?;
    event_about(space, "ServerAuthorization", "near", "10.0.0.0/99")?;
    thread::sleep(Duration::from_secs(2));
    is_served(&scene, true).context("with an authorization that does not read")?;
    authorization(account("nobody"))?;
    waits_served(&scene, &ground, false, "another account is authorized")?;

    space.kubectl(&["delete", "servers.policy.linkerd.io", "far"])?;
    waits_served(&scene, &ground, true, "there is no Server any more")
}

fn waits_served(scene: &Scene, ground: &Ground, served: bool, why: &str) -> Result<()> {
    let what = if served { "is let in" } else { "is refused" };
    wait::for_value(&format!("{why}: the client {what}"), PATIENCE, || {
        is_served(scene, served).map(Some)
    })
    .with_context(|| diagnosis(ground))
}

fn is_served(scene: &Scene, wanted: bool) -> Result<()> {
    let to = scene.at[1];
    let answer = scene.pods[0].run(|| exchange(to, WORD, Duration::from_secs(5)));
    let served = answer.as_ref().is_ok_and(|answer| answer == WORD);
    anyhow::ensure!(served == wanted, "the answer is {answer:?}");
    Ok(())
}

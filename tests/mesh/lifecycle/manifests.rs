//! What an edited file does: who is in the mesh, which ports, and what a mistake costs.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context, Result, ensure};
use picomesh_tests::{
    Agent, Pod, PodSpec, World, client,
    load::Load,
    manifest,
    server::{Habit, Server},
    wait,
};
use serde_json::{Value, json};

use crate::ground::{Ground, PATIENCE, PORT, served};

/// A second port of the same server.
const OTHER_PORT: u16 = 8090;
/// Un-enrolling looks every half second whether the last connection has ended.
const RELEASE: Duration = Duration::from_secs(10);

pub(super) fn a_namespace_leaves_and_joins_and_no_standing_connection_is_harmed() -> Result<()> {
    let mut ground = Ground::new()?;
    let _echoes = echoes(&ground)?;
    let _sources = [
        Server::start(ground.far.netns(), OTHER_PORT, Habit::Source)?,
        Server::start(ground.beside.netns(), OTHER_PORT, Habit::Source)?,
    ];
    ground.mesh()?;
    let pods = [&ground.near, &ground.beside, &ground.far];
    let through_the_mesh = [("direction", "outbound"), ("dst_deployment", "far")];
    let standing = |ground: &Ground| -> Result<Vec<Load>> {
        Ok(vec![
            Load::download(&ground.near, ground.far.at(OTHER_PORT))?,
            Load::download(&ground.near, ground.beside.at6(OTHER_PORT))?,
            Load::on_one_connection(&ground.near, ground.far.at6(PORT))?,
            Load::on_one_connection(&ground.plain, ground.beside.at(PORT))?,
        ])
    };

    // Out, while connections stand that are the mesh's.
    let meshed = standing(&ground)?;
    let carried = || -> Result<bool> {
        let before = ground.opened(0, &through_the_mesh)?;
        let to = ground.far.at(PORT);
        ensure!(served(&ground.near, to), "near is not served");
        Ok(ground.opened(0, &through_the_mesh)? > before)
    };
    ensure!(carried()?, "control: the mesh does not carry connections");
    label_namespace(&ground.world, "disabled")?;
    wait::for_value("new connections pass the mesh by", PATIENCE, || {
        Ok((!carried()?).then_some(()))
    })?;
    go_on(&meshed)?;
    for load in meshed {
        load.stop_unharmed()
            .context("a connection that stood while its pods left")?;
    }
    for pod in pods {
        agent_of(&ground, pod)?.wait_released(pod, RELEASE)?;
        ensure!(
            picomesh_tests::hooks::Hooks::of(pod.netns())?.are_empty(),
            "{} has left and still has programs",
            pod.name()
        );
    }

    // In again, while connections stand that are not.
    let plain = standing(&ground)?;
    label_namespace(&ground.world, "enabled")?;
    for pod in pods {
        agent_of(&ground, pod)?.wait_captured(pod, PATIENCE)?;
    }
    ensure!(
        carried()?,
        "after joining a new connection goes past the mesh"
    );
    go_on(&plain)?;
    for load in plain {
        load.stop_unharmed()
            .context("a connection that stood while its pods joined")?;
    }
    Ok(())
}

pub(super) fn linkerds_and_istios_words_opt_in_and_out_too() -> Result<()> {
    let world = World::new(1)?;
    let manifests = world.manifests();
    for (name, word) in [
        (
            "linkerd",
            json!({"annotations": {"linkerd.io/inject": "enabled"}}),
        ),
        (
            "istio",
            json!({"labels": {"istio.io/dataplane-mode": "ambient"}}),
        ),
        ("silent", json!({})),
        // Never, whatever it says.
        (
            "kube-system",
            json!({"labels": {"picomesh.io/mesh": "enabled"}}),
        ),
    ] {
        let mut namespace = manifest::namespace(name, None);
        for (part, words) in word.as_object().into_iter().flatten() {
            for (key, value) in words.as_object().into_iter().flatten() {
                namespace["metadata"][part][key] = value.clone();
            }
        }
        manifests.apply(&namespace)?;
    }
    let joins = [
        PodSpec::new("by-linkerds-namespace").in_namespace("linkerd"),
        PodSpec::new("by-istios-namespace").in_namespace("istio"),
        PodSpec::new("by-its-own-annotation")
            .in_namespace("silent")
            .annotation("linkerd.io/inject", "enabled"),
        PodSpec::new("by-its-own-label")
            .in_namespace("silent")
            .label("istio.io/dataplane-mode", "ambient"),
        PodSpec::new("by-our-label")
            .in_namespace("silent")
            .label("picomesh.io/mesh", "enabled"),
        // Ours wins over an alias.
        PodSpec::new("by-our-label-in-spite")
            .in_namespace("linkerd")
            .label("picomesh.io/mesh", "enabled")
            .annotation("linkerd.io/inject", "disabled"),
    ]
    .map(|spec| world.pod(&spec));
    let stays_out = [
        PodSpec::new("nobody-said-so").in_namespace("silent"),
        PodSpec::new("linkerd-says-no")
            .in_namespace("linkerd")
            .annotation("linkerd.io/inject", "disabled"),
        PodSpec::new("istio-says-no")
            .in_namespace("istio")
            .label("istio.io/dataplane-mode", "none"),
        PodSpec::new("a-typing-error")
            .in_namespace("silent")
            .label("picomesh.io/mesh", "enable"),
        PodSpec::new("never")
            .in_namespace("kube-system")
            .label("picomesh.io/mesh", "enabled"),
    ]
    .map(|spec| world.pod(&spec));
    let agent = world.start_agent(&world.node(0)?)?;

    for pod in joins {
        agent.wait_captured(&pod?, PATIENCE)?;
    }
    for pod in stays_out {
        let pod = pod?;
        let status = agent.pod_status(&pod)?;
        ensure!(status == Value::Null, "{} is listed: {status}", pod.name());
        ensure!(
            picomesh_tests::hooks::Hooks::of(pod.netns())?.are_empty(),
            "{} has programs",
            pod.name()
        );
    }
    Ok(())
}

pub(super) fn skipped_ports_are_not_captured() -> Result<()> {
    fn servers(spec: PodSpec) -> PodSpec {
        spec.annotation("config.picomesh.io/skip-inbound-ports", "9000,8085-8095")
            .annotation(
                "config.picomesh.io/default-inbound-policy",
                "all-authenticated",
            )
    }
    const INBOUND: &[u8] = b"to-a-port-that-the-server-keeps-out";
    const OUTBOUND: &[u8] = b"to-a-port-that-the-client-keeps-out";
    const CAPTURED: &[u8] = b"to-a-port-that-is-nobodys-exception";
    const SKIPPED_OUTBOUND: u16 = 8070;

    let mut ground = Ground::with(servers)?;
    let manifests = ground.world.manifests();
    manifests.edit("Pod", "mesh", "near", |pod| {
        pod["metadata"]["annotations"]["config.linkerd.io/skip-outbound-ports"] = "8070".into();
    })?;
    // Open to all, so that the client's own exception alone decides.
    let open = manifest::server(
        "mesh",
        "open",
        &[("app", "far")],
        SKIPPED_OUTBOUND,
        Some("all-unauthenticated"),
    );
    manifests.apply(&open)?;
    let far = &ground.far;
    let _servers = [PORT, OTHER_PORT, SKIPPED_OUTBOUND]
        .map(|port| Server::start(far.netns(), port, Habit::Echo));
    ground.mesh()?;
    let (near, plain, far) = (&ground.near, &ground.plain, &ground.far);
    let capture = ground.world.capture_wire(&[INBOUND, OUTBOUND, CAPTURED])?;

    say(near, far.at(OTHER_PORT), INBOUND)?;
    say(near, far.at6(SKIPPED_OUTBOUND), OUTBOUND)?;
    say(near, far.at(PORT), CAPTURED)?;
    ensure!(
        served(plain, far.at(OTHER_PORT)),
        "policy reaches a port that was taken out"
    );
    ensure!(
        !served(plain, far.at(PORT)),
        "control: plain is served where a proven identity is asked for"
    );
    let found = capture.stop()?.found;
    ensure!(
        found[0] > 0 && found[1] > 0,
        "what should be plain is not: {found:?}"
    );
    ensure!(found[2] == 0, "what should not be plain is: {found:?}");
    Ok(())
}

pub(super) fn a_broken_manifest_keeps_the_last_good_state_and_is_named() -> Result<()> {
    let mut ground = Ground::new()?;
    let _echoes = echoes(&ground)?;
    let manifests = ground.world.manifests();
    let near_alone = json!({"meshTLS": {"serviceAccounts": [{"name": "near"}]}});
    let server = manifest::server("mesh", "far", &[("app", "far")], PORT, None);
    let grant = manifest::server_authorization("mesh", "far", "far", near_alone);
    manifests.write("policy.yaml", &[server, grant])?;
    ground.mesh()?;
    let manifests = ground.world.manifests();
    let decided = |ground: &Ground| {
        let to = ground.far.at(PORT);
        (served(&ground.near, to), served(&ground.plain, to))
    };
    ensure!(
        decided(&ground) == (true, false),
        "before: {:?}",
        decided(&ground)
    );

    // A field that the kind does not have, far down in the file's second document.
    let broken = "\
---
apiVersion: policy.linkerd.io/v1beta3
kind: Server
metadata: {name: far, namespace: mesh}
spec:
  podSelector: {matchLabels: {app: far}}
  port: 8080
---
apiVersion: policy.linkerd.io/v1beta1
kind: ServerAuthorization
metadata: {name: far, namespace: mesh}
spec:
  server: {name: far}
  client:
    unauthenticatd: true
";
    manifests.write_text("policy.yaml", broken)?;
    for agent in &ground.agents {
        let error = wait::for_value("the mistake is named", PATIENCE, || {
            let state = agent.debug_json(&["state"])?;
            Ok(state["manifest_errors"].get(0).cloned())
        })?;
        let file = error["file"].as_str().unwrap_or_default();
        let message = error["message"].as_str().unwrap_or_default();
        ensure!(
            file.ends_with("policy.yaml"),
            "the file is not named: {error}"
        );
        ensure!(
            error["line"]
                .as_u64()
                .is_some_and(|line| (9..=15).contains(&line)),
            "the line is not one of the broken document: {error}"
        );
        ensure!(
            message.contains("unauthenticatd"),
            "the field is not named: {error}"
        );
        let metric = agent.metrics()?.sum("picomesh_manifest_errors", &[]);
        ensure!(metric == 1.0, "picomesh_manifest_errors is {metric}");
        let table = agent.debug(&["state"])?.ok()?.stdout;
        ensure!(
            table.contains("policy.yaml") && table.contains("unauthenticatd"),
            "people are not told: {table}"
        );
    }
    ensure!(
        decided(&ground) == (true, false),
        "with a broken file: {:?}",
        decided(&ground)
    );

    manifests.write_text(
        "policy.yaml",
        &broken.replace("unauthenticatd", "unauthenticated"),
    )?;
    wait::until("the mended file is in force", PATIENCE, || {
        decided(&ground) == (true, true)
    })?;
    for agent in &ground.agents {
        agent.wait_metric("picomesh_manifest_errors", &[], PATIENCE, |n| n == 0.0)?;
    }
    Ok(())
}

fn echoes(ground: &Ground) -> Result<[Server; 2]> {
    Ok([
        Server::start(ground.far.netns(), PORT, Habit::Echo)?,
        Server::start(ground.beside.netns(), PORT, Habit::Echo)?,
    ])
}

fn label_namespace(world: &World, value: &str) -> Result<()> {
    world
        .manifests()
        .edit("Namespace", "", "mesh", |namespace| {
            namespace["metadata"]["labels"]["picomesh.io/mesh"] = value.into();
        })
}

fn go_on(loads: &[Load]) -> Result<()> {
    loads.iter().try_for_each(|load| load.wait_rounds(100))
}

fn agent_of<'a>(ground: &'a Ground, pod: &Pod) -> Result<&'a Agent> {
    let node = pod.node().context("it runs on a node")?;
    ground.agent(node.index())
}

fn say(from: &Pod, to: SocketAddr, words: &[u8]) -> Result<()> {
    let answer = from
        .run(|| client::exchange(to, words, PATIENCE))
        .with_context(|| format!("{} to {to}", from.name()))?;
    ensure!(answer == words, "{to} answers {answer:?}");
    Ok(())
}

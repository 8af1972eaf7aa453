//! The scenes, in the order in which they are played. Each builds on those before it: the first
//! plays without a mesh, because its measurements are the controls of the others.

use std::{
    net::SocketAddr,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use picomesh_tests::{Pod, agent::TUNNEL_PORT, client, program, wait};

use super::{
    Shown,
    stage::{FILE_BYTES, IPERF, REDIS, Stage, WEB},
};

pub(crate) struct Scene {
    pub(crate) title: &'static str,
    /// The scenes after it cannot be played without it.
    pub(crate) vital: bool,
    pub(crate) play: fn(&mut Stage) -> Shown,
}

pub(crate) const ALL: &[Scene] = &[
    Scene {
        title: "Without the mesh: the wire shows everything (the control)",
        vital: true,
        play: control,
    },
    Scene {
        title: "An agent per node: pods are captured, none is restarted",
        vital: true,
        play: start,
    },
    Scene {
        title: "From node to node, by Service and by pod address, IPv4 and IPv6",
        vital: false,
        play: requests,
    },
    Scene {
        title: "The wire between the nodes carries only TLS",
        vital: false,
        play: wire,
    },
    Scene {
        title: "Who it was: identities, access log, metrics",
        vital: false,
        play: identities,
    },
    Scene {
        title: "A connection refused by policy, and allowed after one file is edited",
        vital: false,
        play: policy,
    },
    Scene {
        title: "A host's probe reaches a pod that denies everybody",
        vital: false,
        play: probe,
    },
    Scene {
        title: "A pod outside the mesh: refused where identity is asked for, else served",
        vital: false,
        play: outside,
    },
    Scene {
        title: "A namespace leaves and joins; downloads run through both",
        vital: false,
        play: leave_and_join,
    },
];

const MARKER: &str = "the-marker-of-this-demo";
const PATIENCE: Duration = Duration::from_secs(10);

fn control(stage: &mut Stage) -> Shown {
    let capture = stage.world.capture_wire(&[MARKER.as_bytes()])?;
    let seen_by_server = get(&stage.client, stage.web.at(WEB))?;
    let packets = capture.wait_found(0, PATIENCE)?;
    capture.stop()?;
    Ok(vec![
        format!(
            "curl {} answers; the server saw {seen_by_server}",
            stage.web.at(WEB)
        ),
        format!("the request's marker was found in {packets} packets on the wire"),
        match get(&stage.client, stage.service.at()) {
            Ok(_) => bail!(
                "{} answers although nothing resolves Services",
                stage.service.at()
            ),
            Err(_) => format!(
                "curl {} fails: nothing resolves Services here",
                stage.service.at()
            ),
        },
    ])
}

fn start(stage: &mut Stage) -> Shown {
    let begin = Instant::now();
    stage.start_mesh()?;
    let took = begin.elapsed();
    let mut lines = vec![format!(
        "{} pods captured {:.2} s after the agents were started",
        stage.meshed().len(),
        took.as_secs_f64()
    )];
    for agent in &stage.agents {
        lines.push(format!(
            "{}: {} pods captured, {:.1} MB resident",
            agent.node().name(),
            agent.captured_pods()?,
            agent.process().resident_kib()? as f64 / 1024.0
        ));
    }
    Ok(lines)
}

fn requests(stage: &mut Stage) -> Shown {
    let mut lines = Vec::new();
    for (what, to) in [
        ("Service, IPv4", stage.service.at()),
        ("Service, IPv6", stage.service.at6()),
        ("pod, IPv4", stage.web.at(WEB)),
        ("pod, IPv6", stage.web.at6(WEB)),
    ] {
        let begin = Instant::now();
        let saw = get(&stage.client, to)?;
        let took = begin.elapsed();
        let expected = if to.is_ipv4() {
            stage.client.v4().to_string()
        } else {
            stage.client.v6().to_string()
        };
        ensure!(
            saw == expected,
            "{what}: the server saw {saw}, not {expected}"
        );
        lines.push(format!(
            "{what}: curl {to} in {:.0} ms; the server saw the client's own {saw}",
            took.as_secs_f64() * 1000.0
        ));
    }
    let host = stage.service.v4.to_string();
    let pong = stage
        .client
        .output(
            "redis-cli",
            &["-h", &host, "-p", &REDIS.to_string(), "ping"],
            PATIENCE,
        )?
        .ok()?;
    lines.push(format!("redis-cli -h {host} ping: {}", pong.stdout.trim()));
    let up = program::iperf3(&stage.client, &host, IPERF, 2, false)?;
    let down = program::iperf3(&stage.client, &host, IPERF, 2, true)?;
    lines.push(format!(
        "iperf3 -c {host}: {up:.2} Gbit/s there, {down:.2} Gbit/s back"
    ));
    Ok(lines)
}

fn wire(stage: &mut Stage) -> Shown {
    let capture = stage.world.capture_wire(&[MARKER.as_bytes()])?;
    for to in [stage.service.at(), stage.web.at(WEB), stage.web.at6(WEB)] {
        get(&stage.client, to)?;
    }
    let seen = capture.stop()?;
    ensure!(
        seen.found[0] == 0,
        "the marker was found in {} packets on the wire",
        seen.found[0]
    );
    let plain = seen.plain_payload(TUNNEL_PORT);
    ensure!(
        plain == 0,
        "{plain} bytes of payload passed outside of the tunnels"
    );
    let tunnelled: usize = seen.tcp().map(|t| t.payload.len()).sum();
    ensure!(
        tunnelled > 0,
        "nothing passed at all: the capture looks at the wrong wire"
    );
    Ok(vec![format!(
        "the same search finds the marker in none of {} packets; all {tunnelled} bytes of payload \
         went through port {TUNNEL_PORT}",
        seen.packets
    )])
}

fn identities(stage: &mut Stage) -> Shown {
    let from = stage.agent_of(&stage.client)?;
    let to = stage.agent_of(&stage.web)?;
    let moved = |agent: &picomesh_tests::Agent, direction| -> Result<f64> {
        Ok(agent.metrics()?.sum(
            "tcp_open_total",
            &[("direction", direction), ("tls", "true")],
        ))
    };
    let before = (moved(from, "outbound")?, moved(to, "inbound")?);
    get(&stage.client, stage.service.at())?;
    let line = to.wait_log(
        &[
            "direction=\"inbound\"",
            &stage.client.spiffe_id(),
            &stage.web.spiffe_id(),
        ],
        PATIENCE,
    )?;
    let after = wait::for_value("the metrics move", PATIENCE, || {
        let after = (moved(from, "outbound")?, moved(to, "inbound")?);
        Ok((after.0 > before.0 && after.1 > before.1).then_some(after))
    })?;
    Ok(vec![
        format!("client: {}", stage.client.spiffe_id()),
        format!("server: {}", stage.web.spiffe_id()),
        format!("access log of node1: {line}"),
        format!(
            "tcp_open_total{{tls=\"true\"}}: outbound at node0 {} → {}, inbound at node1 {} → {}",
            before.0, after.0, before.1, after.1
        ),
    ])
}

fn policy(stage: &mut Stage) -> Shown {
    let saw = get(&stage.stranger, stage.service.at())?;
    let mut lines = vec![format!("before: stranger ({saw}) is served")];
    stage.close_web()?;
    let begin = Instant::now();
    wait::until("stranger is refused", PATIENCE, || {
        get(&stage.stranger, stage.service.at()).is_err()
    })?;
    lines.push(format!(
        "with a Server and an AuthorizationPolicy for client alone, stranger is refused after {:.2} s",
        begin.elapsed().as_secs_f64()
    ));
    let line = stage.agent_of(&stage.web)?.wait_log(
        &[
            "direction=\"inbound\"",
            &stage.stranger.spiffe_id(),
            "error=",
        ],
        PATIENCE,
    )?;
    lines.push(format!(
        "the reason, from the access log: {}",
        error_of(&line)
    ));
    get(&stage.client, stage.service.at()).context("client is still served")?;
    lines.push("client is served as before".to_owned());
    stage.admit(&[&stage.client, &stage.stranger])?;
    let begin = Instant::now();
    wait::until("stranger is served again", PATIENCE, || {
        get(&stage.stranger, stage.service.at()).is_ok()
    })?;
    lines.push(format!(
        "{:.2} s after meshtlsauthentication-shop-web-clients.yaml was edited, stranger is served",
        begin.elapsed().as_secs_f64()
    ));
    Ok(lines)
}

fn probe(stage: &mut Stage) -> Shown {
    let to = stage.vault.at(WEB);
    ensure!(
        get(&stage.client, to).is_err(),
        "vault serves a meshed client although it denies everybody"
    );
    let node = stage.vault.node().context("vault has a node")?;
    let (status, body) = node.run(|| client::http_get(to, "/healthz", PATIENCE))?;
    ensure!(status == 200, "the probe got status {status}");
    ensure!(
        get(&stage.client, to).is_err(),
        "after a probe vault serves a meshed client"
    );
    Ok(vec![
        format!("client is refused by vault ({to}), before and after"),
        format!(
            "a probe of node1 gets {status}; the server saw the host's own {}",
            body.trim()
        ),
    ])
}

fn outside(stage: &mut Stage) -> Shown {
    let to = stage.strict.at(WEB);
    let served = get(&stage.client, to)?;
    ensure!(
        get(&stage.legacy, to).is_err(),
        "strict serves a pod without identity"
    );
    let line = stage
        .agent_of(&stage.strict)?
        .wait_log(&[&stage.legacy.v4().to_string(), "error="], PATIENCE)?;
    let saw = get(&stage.legacy, stage.library.at(WEB))?;
    Ok(vec![
        format!("strict (all-authenticated) serves client {served}"),
        format!("strict refuses legacy: {}", error_of(&line)),
        format!("library (all-unauthenticated, the default) serves legacy {saw}"),
    ])
}

fn leave_and_join(stage: &mut Stage) -> Shown {
    let pods = [&stage.reader, &stage.library];
    let manifests = stage.world.manifests();
    let label = |value: &str| {
        manifests.edit("Namespace", "", "lab", |namespace| {
            namespace["metadata"]["labels"]["picomesh.io/mesh"] = value.into();
        })
    };
    let expected = stage
        .library
        .output(
            "sha256sum",
            &[&program::files(&stage.world, &stage.library)
                .join("book")
                .to_string_lossy()],
            PATIENCE,
        )?
        .ok()?
        .stdout;
    let expected = expected.split_whitespace().next().unwrap_or_default();
    let mut lines = Vec::new();
    // Both are slow enough that the label changes in their middle.
    let while_label_becomes = |value: &str, what: &str| -> Result<String> {
        thread::scope(|scope| {
            let running = scope.spawn(|| download(stage));
            thread::sleep(Duration::from_millis(700));
            label(value)?;
            if value == "enabled" {
                for pod in pods {
                    stage.agent_of(pod)?.wait_captured(pod, PATIENCE)?;
                }
            }
            ensure!(
                !running.is_finished(),
                "{what} ended before the label was changed"
            );
            let Ok(done) = running.join() else {
                bail!("{what}: the thread panicked")
            };
            let (sum, took) = done.with_context(|| what.to_owned())?;
            ensure!(sum == expected, "{what}: the sum is {sum}, not {expected}");
            Ok(format!(
                "{what} ran {:.1} s and has the right SHA-256 ({} MiB)",
                took.as_secs_f64(),
                FILE_BYTES / 1024 / 1024
            ))
        })
    };
    lines.push(while_label_becomes(
        "disabled",
        "the download during which lab left",
    )?);
    let ended = Instant::now();
    for pod in pods {
        stage.agent_of(pod)?.wait_released(pod, 2 * PATIENCE)?;
    }
    lines.push(format!(
        "its pods were let go {:.1} s after their last connection ended",
        ended.elapsed().as_secs_f64()
    ));
    lines.push(while_label_becomes(
        "enabled",
        "the download during which lab joined",
    )?);
    Ok(lines)
}

/// Downloads the book at a limited rate; returns its sum and how long it took.
fn download(stage: &Stage) -> Result<(String, Duration)> {
    let begin = Instant::now();
    let rate = FILE_BYTES / 5;
    let command = format!(
        "set -o pipefail; curl -sS --noproxy '*' --limit-rate {rate} http://{}/files/book | sha256sum",
        stage.library.at(WEB)
    );
    let output = stage
        .reader
        .output("bash", &["-c", &command], Duration::from_secs(60))?
        .ok()?;
    let sum = output.stdout.split_whitespace().next().unwrap_or_default();
    Ok((sum.to_owned(), begin.elapsed()))
}

/// curl with the marker in the request; the client's address as the server saw it.
fn get(from: &Pod, to: SocketAddr) -> Result<String> {
    Ok(program::curl(from, &format!("http://{to}/{MARKER}"))?
        .trim()
        .to_owned())
}

/// The field `error` of an access-log line.
fn error_of(line: &str) -> &str {
    line.split_once("error=")
        .map_or(line, |(_, error)| error.trim())
}

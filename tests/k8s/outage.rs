//! The API server, the controller and the signer are away: nothing that runs notices, and what
//! changed is applied when they are back.

use std::{
    net::{IpAddr, SocketAddr},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use picomesh_tests::{
    client,
    cluster::{Cluster, Control, Node},
    crowd::{Crowd, Fared, WORD},
    load::Load,
    wait,
};

use crate::{
    ground::{Ground, Need, PATIENCE, Test, full, ground, slowly},
    install::{NAMESPACE, agent_on, diagnosis, wait_captured, wait_installed},
    talk::{PORT, Scene, both, label, wire},
};

pub(crate) const TESTS: &[Test] = &[Test {
    name: "outage::nothing_notices_that_the_api_server_is_away",
    needs: &[Need::Nodes, Need::Image],
    run: nothing_notices_that_the_api_server_is_away,
}];

/// The two that give certificates.
const AUTHORITIES: [&str; 2] = ["picomesh-controller", "picomesh-signer"];

fn nothing_notices_that_the_api_server_is_away() -> Result<()> {
    let ground = ground()?;
    let cluster = ground.own()?;
    let [near, _] = both(cluster)?;
    let scene = Scene::new(&ground, "outage")?;
    // How long it is away before anything else happens, and how long what comes after its return
    // is looked at: it may believe for a moment that no kubelet lives.
    let (away, after) = if full() {
        (Duration::from_secs(120), Duration::from_secs(60))
    } else {
        (Duration::from_secs(20), Duration::from_secs(15))
    };
    // Whose endpoints may be marked unready for a moment when it is back.
    scene.space.service("far", "far", PORT)?;
    let service: IpAddr = scene.space.service_addresses("far")?.remove(0).parse()?;
    let service = SocketAddr::from((service, PORT));
    let calls = || client::exchange(service, WORD, Duration::from_secs(5));
    wait::for_value("the Service leads to its pod", PATIENCE, || {
        Ok(Some(scene.pods[0].run(calls)?))
    })?;
    let agent = agent_on(&ground, near.name())?;
    // It gathers for five seconds what the next agent begins with.
    thread::sleep(Duration::from_secs(7));

    let capture = wire(cluster, &[WORD])?;
    let traffic = Traffic::start(&scene, service)?;
    scale(&ground, 0)?;
    let outage = Outage::begin(cluster)?;
    thread::sleep(away);
    ensure!(
        ground.kubectl().text(&["get", "--raw", "/readyz"]).is_err(),
        "the API server answers"
    );
    traffic.stop_unharmed("while the API server is away")?;

    // An agent that starts meanwhile has what the one before has left.
    let former = agent_process(cluster, &agent.uid)?;
    kill(Pid::from_raw(former), Signal::SIGKILL).context("kill the agent")?;
    let what = format!("{} has another agent, without an API server", near.name());
    wait::for_value(&what, PATIENCE, || {
        let now = slowly(agent_process(cluster, &agent.uid))?;
        slowly(ensure_other(now, former))?;
        slowly(is_ready(near)).map(Some)
    })
    .with_context(|| near_log(near))?;
    scene.wait_speaks()?;
    let traffic = Traffic::start(&scene, service)?;
    thread::sleep(away / 4);
    ensure!(
        cluster.control().api_server().pid().is_none(),
        "the API server runs: nothing is shown"
    );

    outage.end()?;
    thread::sleep(after);
    traffic.stop_unharmed("when the API server is back")?;
    let seen = capture.stop()?.found[0];
    ensure!(seen == 0, "{seen} packets between the nodes can be read");

    // What changes now reaches the agents, also the one that has never seen the API server; and
    // it is the capture's control.
    label(&scene.space, "disabled")?;
    wait_captured(&ground, 0).with_context(|| diagnosis(&ground))?;
    scene.is_read(&ground)?;
    scale(&ground, 2)?;
    wait_installed(&ground).with_context(|| diagnosis(&ground))?;
    label(&scene.space, "enabled")?;
    wait_captured(&ground, 2).with_context(|| diagnosis(&ground))?;
    scene.wait_speaks()
}

/// New connections and streams in both directions, in one also by a Service.
struct Traffic {
    crowds: Vec<Crowd>,
    streams: Vec<Load>,
}

impl Traffic {
    fn start(scene: &Scene, service: SocketAddr) -> Result<Self> {
        let ([near, far], [to_near, to_far]) = (&scene.pods, scene.at);
        let pace = Duration::from_millis(40);
        Ok(Self {
            crowds: vec![
                Crowd::start(near, &[to_far, service], pace)?,
                Crowd::start(far, &[to_near], pace)?,
            ],
            streams: vec![
                Load::on_one_connection(near, to_far)?,
                Load::on_one_connection(far, to_near)?,
            ],
        })
    }

    fn stop_unharmed(self, when: &str) -> Result<()> {
        let mut fared = Fared::default();
        for crowd in self.crowds {
            fared.add(crowd.stop()?);
        }
        ensure!(
            fared.opened > 0 && fared.failures.is_empty(),
            "{when} of {} connections failed: {}",
            fared.opened,
            fared.failures.join("; ")
        );
        for stream in self.streams {
            stream.stop_unharmed().context(when.to_owned())?;
        }
        Ok(())
    }
}

/// Whoever could give certificates is gone, or back.
fn scale(ground: &Ground, replicas: u32) -> Result<()> {
    let wanted = format!("--replicas={replicas}");
    let kubectl = ground.kubectl();
    for deployment in AUTHORITIES {
        let args = ["scale", "deployment", deployment, "-n", NAMESPACE, &wanted];
        kubectl.run(&args)?;
        if replicas == 0 {
            let label = format!("-l=app.kubernetes.io/name={deployment}");
            let timeout = format!("--timeout={}s", wait::patience(PATIENCE).as_secs());
            let gone = "--for=delete";
            kubectl.run(&["wait", "pods", "-n", NAMESPACE, gone, &label, &timeout])?;
        }
    }
    Ok(())
}

/// The API server is killed until this ends; dropping it ends it.
struct Outage<'a>(Option<&'a Cluster>);

impl<'a> Outage<'a> {
    fn begin(cluster: &'a Cluster) -> Result<Self> {
        let api_server = cluster.control().api_server();
        ensure!(api_server.pid().is_some(), "the API server is away already");
        api_server.kill();
        Ok(Self(Some(cluster)))
    }

    fn end(mut self) -> Result<()> {
        self.restart()
    }

    fn restart(&mut self) -> Result<()> {
        let Some(cluster) = self.0.take() else {
            return Ok(());
        };
        let control: &Control = cluster.control();
        control.api_server().restart()?;
        wait::for_value("the API server is back", PATIENCE, || {
            slowly(cluster.kubectl().text(&["get", "--raw", "/readyz"])).map(Some)
        })
        .map(drop)
        .with_context(|| control.api_server().last_words(15))
    }
}

impl Drop for Outage<'_> {
    fn drop(&mut self) {
        if let Err(e) = self.restart() {
            eprintln!("{e:#}");
        }
    }
}

/// The agent itself, of its pod's processes.
pub(crate) fn agent_process(cluster: &Cluster, uid: &str) -> Result<i32> {
    let is_agent = |pid: &i32| {
        let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let mut words = command.split(|byte| *byte == 0);
        // Probes run the same program.
        words
            .next()
            .is_some_and(|it| it.ends_with(b"picomesh-agent"))
            && words.next() == Some(&b"run"[..])
    };
    let mut processes = cluster.processes_of(uid).into_iter().filter(is_agent);
    processes.next().context("the agent does not run")
}

fn ensure_other(now: i32, former: i32) -> Result<()> {
    ensure!(now != former, "process {former} is still there");
    Ok(())
}

fn is_ready(node: &Node) -> Result<()> {
    let url = "http://127.0.0.1:4191/ready";
    node.run(&["curl", "-sS", "--fail", "--max-time", "5", url])
        .map(drop)
}

/// What the agents of the node have said; without an API server nobody else tells.
fn near_log(node: &Node) -> String {
    let script = "tail -n 60 /var/log/pods/picomesh-system_picomesh-agent-*/agent/*.log";
    node.run(&["sh", "-c", script])
        .unwrap_or_else(|e| format!("{e:#}"))
}

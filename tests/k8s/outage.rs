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
    hooks::Hooks,
    load::Load,
    wait,
};
use serde_json::json;

use crate::{
    ground::{Ground, Namespace, Need, PATIENCE, Test, ground, slowly},
    install::{
        AUTHORITIES, agent_on, agent_process, diagnosis, scale, wait_captured, wait_installed,
    },
    talk::{PORT, Scene, both, label, wire},
};

pub(crate) const TESTS: &[Test] = &[Test {
    name: "outage::nothing_notices_that_the_api_server_is_away",
    needs: &[Need::Nodes, Need::Image],
    run: nothing_notices_that_the_api_server_is_away,
}];

/// How long the API server is away before anything else happens: with what does, two minutes.
const AWAY: Duration = Duration::from_secs(95);
/// How long what is believed for a moment lasts.
const UNREADY: Duration = Duration::from_secs(5);
/// Between a node and the API server; what comes from there is known by its port until the rules of
/// Services have turned it back.
const CUT_OFF: &str = "table inet cut_off {
    chain in {
        type filter hook prerouting priority raw;
        tcp sport 6443 drop
    }
    chain out {
        type filter hook output priority 10;
        tcp dport 6443 drop
    }
}
";
/// What comes after its return: it may believe for a moment that no kubelet lives.
const AFTER: Duration = Duration::from_secs(60);

fn nothing_notices_that_the_api_server_is_away() -> Result<()> {
    let ground = ground()?;
    let cluster = ground.own()?;
    let [near, _] = both(cluster)?;
    let scene = Scene::new(&ground, "outage")?;
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
    scale_all(&ground, 0)?;
    let mut outage = Outage::begin(cluster)?;
    thread::sleep(AWAY);
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
    thread::sleep(AWAY / 4);
    ensure!(
        cluster.control().api_server().pid().is_none(),
        "the API server runs: nothing is shown"
    );

    // It has not heard of the far node's kubelet yet, and calls its pods unready.
    outage.end()?;
    set_ready(&scene.space, false)?;
    thread::sleep(UNREADY);
    let ready = ready(&scene.space)?;
    ensure!(
        !ready.is_empty() && !ready.contains("true"),
        "the Service's endpoints are ready: {ready:?}"
    );
    set_ready(&scene.space, true)?;
    outage.over()?;
    thread::sleep(AFTER);
    traffic.stop_unharmed("when the API server is back")?;
    let seen = capture.stop()?.found[0];
    ensure!(seen == 0, "{seen} packets between the nodes can be read");

    // What changes while an agent does not hear of it, here the one that has never seen the API
    // server, is applied when it does; and it is the capture's control.
    near.netns().nft(CUT_OFF)?;
    label(&scene.space, "disabled")?;
    wait_captured(&ground, 1).with_context(|| diagnosis(&ground))?;
    thread::sleep(UNREADY);
    let hooks = format!("{:?}", Hooks::of(&scene.pods[0])?);
    near.netns().nft("delete table inet cut_off\n")?;
    wait_captured(&ground, 0).with_context(|| diagnosis(&ground))?;
    let without = format!("{:?}", Hooks::of(&scene.pods[0])?);
    ensure!(
        hooks != without,
        "cut off from the API server {} has heard of the label: {hooks}",
        near.name()
    );
    scene.is_read(&ground)?;
    scale_all(&ground, 2)?;
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
fn scale_all(ground: &Ground, replicas: u32) -> Result<()> {
    let mut all = AUTHORITIES.into_iter();
    all.try_for_each(|deployment| scale(ground, deployment, replicas))
}

/// The API server and what keeps its objects in order are killed until this ends; dropping it ends
/// it.
struct Outage<'a>(Option<&'a Cluster>);

impl<'a> Outage<'a> {
    fn begin(cluster: &'a Cluster) -> Result<Self> {
        let api_server = cluster.control().api_server();
        ensure!(api_server.pid().is_some(), "the API server is away already");
        api_server.kill();
        cluster.control().controllers().kill();
        Ok(Self(Some(cluster)))
    }

    /// The API server is back.
    fn end(&mut self) -> Result<()> {
        let Some(cluster) = self.0 else {
            return Ok(());
        };
        let control: &Control = cluster.control();
        if control.api_server().pid().is_none() {
            control.api_server().restart()?;
        }
        wait::for_value("the API server is back", PATIENCE, || {
            slowly(cluster.kubectl().text(&["get", "--raw", "/readyz"])).map(Some)
        })
        .map(drop)
        .with_context(|| control.api_server().last_words(15))
    }

    fn over(&mut self) -> Result<()> {
        let Some(cluster) = self.0.take() else {
            return Ok(());
        };
        cluster.control().controllers().restart()
    }
}

impl Drop for Outage<'_> {
    fn drop(&mut self) {
        if let Err(e) = self.end().and_then(|()| self.over()) {
            eprintln!("{e:#}");
        }
    }
}

/// As the API server says it of the Service's endpoints.
fn set_ready(space: &Namespace, ready: bool) -> Result<()> {
    let conditions = ["ready", "serving"].map(|condition| {
        let path = format!("/endpoints/0/conditions/{condition}");
        json!({"op": "replace", "path": path, "value": ready})
    });
    let conditions = json!(conditions).to_string();
    for slice in slices(space)?.lines() {
        space.kubectl(&["patch", slice, "--type=json", "-p", &conditions])?;
    }
    Ok(())
}

fn slices(space: &Namespace) -> Result<String> {
    let of_service = "kubernetes.io/service-name=far";
    space.kubectl(&["get", "endpointslices", "-l", of_service, "-o=name"])
}

fn ready(space: &Namespace) -> Result<String> {
    let ready = "-o=jsonpath={.items[*].endpoints[*].conditions.ready}";
    let of_service = "kubernetes.io/service-name=far";
    space.kubectl(&["get", "endpointslices", "-l", of_service, ready])
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

//! A cluster of fifty nodes, 500 Services and 5,000 pods, as far as its API server can tell: what
//! that costs the agents of the two nodes that are real.
//!
//! The other 48 run no kubelet. What kubelets would say of them and of their pods is written here:
//! that they are ready, once; and then, as long as the crowd is there, the ordinary noise of every
//! node: its lease every ten seconds and its status every five minutes.

use std::{
    collections::BTreeMap,
    fs,
    net::SocketAddr,
    process::Command,
    sync::{Arc, mpsc},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use nix::unistd::{SysconfVar, sysconf};
use picomesh::testing::large;
use picomesh_tests::{client::exchange, cluster::Kubectl, crowd::WORD, requirements, wait};
use serde_json::{Value, json};

use crate::{
    api::{Api, Call},
    ground::{Ground, Need, Test, ground},
    install::{NAMESPACE, agent_on, agent_process},
    talk::{Scene, both},
};

pub(crate) const TESTS: &[Test] = &[Test {
    name: "crowded::five_thousand_pods_cost_an_agent_little",
    needs: &[Need::Nodes, Need::Image],
    run: five_thousand_pods_cost_an_agent_little,
}];

/// What may be known of the whole cluster.
const STATE: u64 = 40_000_000;
/// Until a client sees a change of policy.
const CHANGE: Duration = Duration::from_secs(1);
const CHANGES: usize = 5;
const IDLE: Duration = Duration::from_secs(60);
/// Of one processor.
const IDLE_SHARE: f64 = 0.005;
/// To make all objects, or for the cluster's own controllers to follow.
const LONG: Duration = Duration::from_secs(300);

fn five_thousand_pods_cost_an_agent_little() -> Result<()> {
    let ground = ground()?;
    let cluster = ground.own()?;
    let scene = Scene::new(&ground, "crowded")?;
    scene.wait_speaks()?;
    // What its start left lying about has gone back by then.
    thread::sleep(Duration::from_secs(15));
    let mut agents = Vec::new();
    for node in both(cluster)? {
        let pod = agent_on(&ground, node.name())?;
        let pid = agent_process(cluster, &pod.uid)?;
        agents.push((pod.name, pid, Memory::of(pid)?));
    }

    let crowd = Crowd::gather(ground.kubectl())?;
    for (name, ..) in &agents {
        wait_known(&ground, name)?;
    }
    // It gathers for five seconds what the next agent begins with, and then lets go of what the
    // news have cost.
    thread::sleep(Duration::from_secs(20));

    let before = agents.iter().map(|(_, pid, _)| processor_time(*pid));
    let before = before.collect::<Result<Vec<_>>>()?;
    thread::sleep(IDLE);
    let mut shares = Vec::new();
    for ((name, pid, alone), before) in agents.iter().zip(before) {
        let share = (processor_time(*pid)? - before).as_secs_f64() / IDLE.as_secs_f64();
        let now = Memory::of(*pid)?;
        eprintln!(
            "{name}: alone {alone}, in the crowd {now}; idle {:.2} % of a processor",
            100.0 * share
        );
        shares.push((name, share, now.resident.saturating_sub(alone.resident)));
    }
    crowd.still_there()?;

    let (_, far, _) = agents.last().context("no agent")?;
    changes_are_seen_soon(&scene, &crowd.api, *far)?;
    for (name, share, state) in shares {
        ensure!(
            share < IDLE_SHARE,
            "{name} takes {:.2} % of a processor and has nothing to do",
            100.0 * share
        );
        ensure!(state < STATE, "{name} has grown by {state} bytes");
    }
    Ok(())
}

/// Of the far pod's policy, by a client on the other node. `agent`: the process that decides.
fn changes_are_seen_soon(scene: &Scene, api: &Api, agent: i32) -> Result<()> {
    let space = &scene.space;
    let policies = format!(
        "/apis/networking.k8s.io/v1/namespaces/{}/networkpolicies",
        space.name()
    );
    let nobody = json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": "nobody"},
        "spec": {"podSelector": {"matchLabels": {"app": "far"}}, "policyTypes": ["Ingress"]},
    });
    let default = |word: Value| {
        let annotations = json!({"config.picomesh.io/default-inbound-policy": word});
        let path = format!("/api/v1/namespaces/{}", space.name());
        Call::patch(path, &json!({"metadata": {"annotations": annotations}}))
    };
    for (what, close, open) in [
        (
            "a NetworkPolicy",
            Call::post(policies.clone(), &nobody),
            Call::delete(format!("{policies}/nobody")),
        ),
        (
            "the namespace's default",
            default(json!("deny")),
            default(Value::Null),
        ),
    ] {
        let spent = processor_time(agent)?;
        let mut took = Vec::new();
        for _ in 0..CHANGES {
            for (call, served) in [(&close, false), (&open, true)] {
                let begun = Instant::now();
                api.call(call)?;
                let accepted = begun.elapsed();
                wait_served(scene, served)?;
                took.push((begun.elapsed(), accepted));
                // Another change does not come in its wake.
                thread::sleep(Duration::from_secs(1));
            }
        }
        let (longest, accepted) = took.iter().max().copied().unwrap_or_default();
        let (shortest, _) = took.iter().min().copied().unwrap_or_default();
        let each = (processor_time(agent)? - spent) / (2 * CHANGES as u32);
        eprintln!(
            "{what} is in force after {shortest:?} to {longest:?}, of which the API server took \
             {accepted:?}; each costs its agent {each:?} of a processor"
        );
        ensure!(
            longest < wait::patience(CHANGE),
            "{what} was in force after {longest:?}"
        );
    }
    Ok(())
}

fn wait_served(scene: &Scene, served: bool) -> Result<()> {
    let to: SocketAddr = scene.at[1];
    let what = if served { "is let in" } else { "is refused" };
    wait::until(&format!("the client {what}"), 10 * CHANGE, || {
        let answer = scene.pods[0].run(|| exchange(to, WORD, CHANGE));
        answer.is_ok_and(|answer| answer == WORD) == served
    })
}

/// What the kernel tells of a process; bytes.
struct Memory {
    resident: u64,
    /// Less what is mapped from files.
    own: u64,
    most: u64,
}

impl Memory {
    fn of(pid: i32) -> Result<Self> {
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let kib: BTreeMap<_, u64> = status
            .lines()
            .filter_map(|line| {
                let (name, value) = line.split_once(':')?;
                Some((name, value.trim().strip_suffix(" kB")?.parse().ok()?))
            })
            .collect();
        let of = |name: &str| -> Result<u64> {
            let kib = kib.get(name).with_context(|| format!("no {name}"))?;
            Ok(1024 * kib)
        };
        Ok(Self {
            resident: of("VmRSS")?,
            own: of("RssAnon")?,
            most: of("VmHWM")?,
        })
    }
}

impl std::fmt::Display for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [resident, own, most] =
            [self.resident, self.own, self.most].map(|bytes| bytes as f64 / 1e6);
        write!(
            f,
            "{resident:.1} MB resident ({own:.1} its own, at most {most:.1})"
        )
    }
}

/// What a process has run so far.
fn processor_time(pid: i32) -> Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name may hold anything.
    let (_, fields) = stat.rsplit_once(')').context("no name")?;
    let ticks: Vec<u64> = fields
        .split_ascii_whitespace()
        .skip(11)
        .take(2)
        .filter_map(|field| field.parse().ok())
        .collect();
    let per_second = sysconf(SysconfVar::CLK_TCK)?.context("no clock tick")?;
    let seconds = ticks.iter().sum::<u64>() as f64 / per_second as f64;
    Ok(Duration::from_secs_f64(seconds))
}

/// As the agent itself tells it.
fn wait_known(ground: &Ground, agent: &str) -> Result<()> {
    let families = if requirements::ipv6() { 2 } else { 1 };
    let known = [
        ("nodes", large::NODES + 2),
        ("workloads", large::PODS),
        ("frontends", 2 * families * large::SERVICES),
    ];
    wait::for_value(&format!("{agent} knows them all"), LONG, || {
        thread::sleep(Duration::from_secs(1));
        let debug = ["/usr/bin/picomesh-agent", "debug", "state", "-o", "json"];
        let exec = ["exec", "-n", NAMESPACE, agent, "-c", "agent", "--"];
        let state = ground.kubectl().run(&[&exec[..], &debug].concat())?;
        let state: Value = serde_json::from_str(&state)?;
        for (name, least) in known {
            let found = state[name].as_u64().unwrap_or(0);
            ensure!(found >= least as u64, "{name}: {found} of {least}");
        }
        Ok(Some(()))
    })
}

/// Removed when dropped.
struct Crowd {
    api: Arc<Api>,
    noise: Option<(mpsc::Sender<()>, JoinHandle<()>)>,
}

impl Crowd {
    /// Returns when the API server and its controllers have it all.
    fn gather(kubectl: &Kubectl) -> Result<Self> {
        let api = Arc::new(Api::new(kubectl)?);
        let mut crowd = Self {
            api: Arc::clone(&api),
            noise: None,
        };
        let begun = Instant::now();
        let now = time("+%FT%T.%6NZ")?;
        let conditions = large::node_conditions(&time("+%FT%TZ")?);
        api.all((0..large::NODES).map(move |number| {
            let lease = json!({
                "apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
                "metadata": {"name": large::node_name(number)},
                "spec": {
                    "holderIdentity": large::node_name(number), "leaseDurationSeconds": 40,
                    "renewTime": now,
                },
            });
            Call::post(LEASES.into(), &lease)
        }))?;
        api.all((0..large::NODES).map(move |number| {
            let mut node = large::node(number);
            node["status"]["conditions"] = conditions.clone();
            Call::post("/api/v1/nodes".into(), &node)
        }))?;
        crowd.noise = Some(Self::begin_noise(Arc::clone(&api)));
        api.all(
            (0..large::NAMESPACES)
                .map(|number| Call::post("/api/v1/namespaces".into(), &large::namespace(number))),
        )?;
        api.all((0..large::SERVICES).map(|number| {
            let namespace = large::namespace_of_service(number);
            let path = format!("/api/v1/namespaces/{namespace}/serviceaccounts");
            Call::post(path, &large::account(number))
        }))?;
        api.all((0..large::PODS).map(|number| Call::post(pods(number), &large::pod(number))))?;
        api.all((0..large::PODS).map(|number| {
            let path = format!("{}/{}/status", pods(number), large::pod_name(number));
            Call::patch(path, &json!({"status": large::pod(number)["status"]}))
        }))?;
        // Last, so that each slice is made once.
        api.all((0..large::SERVICES).map(|number| {
            let namespace = large::namespace_of_service(number);
            let path = format!("/api/v1/namespaces/{namespace}/services");
            Call::post(path, &large::service(number))
        }))?;
        eprintln!(
            "the crowd stands in the API server after {:?}",
            begun.elapsed()
        );
        let families = if requirements::ipv6() { 2 } else { 1 };
        wait::for_value("every Service has its slices", LONG, || {
            thread::sleep(Duration::from_secs(1));
            let found = api.count("/apis/discovery.k8s.io/v1/endpointslices")?;
            let least = (families * large::SERVICES) as u64;
            ensure!(found >= least, "{found} of {least}");
            Ok(Some(()))
        })?;
        eprintln!(
            "and its Services have their endpoints after {:?}",
            begun.elapsed()
        );
        Ok(crowd)
    }

    /// What 48 kubelets say while nothing happens. Ends when nobody holds the sender any more.
    fn begin_noise(api: Arc<Api>) -> (mpsc::Sender<()>, JoinHandle<()>) {
        const LEASE: usize = 10;
        const STATUS: usize = 300;
        let (held, stop) = mpsc::channel();
        let noise = thread::spawn(move || {
            let mut second = 0;
            while stop.recv_timeout(Duration::from_secs(1)) == Err(mpsc::RecvTimeoutError::Timeout)
            {
                // Each node in its turn.
                let due = |period: usize| {
                    let number = |place: usize| place * large::NODES / period;
                    number(second % period)..number(second % period + 1)
                };
                let said = (|| {
                    let (lease, heartbeat) = (time("+%FT%T.%6NZ")?, time("+%FT%TZ")?);
                    for number in due(LEASE) {
                        let path = format!("{LEASES}/{}", large::node_name(number));
                        api.call(&Call::patch(path, &json!({"spec": {"renewTime": lease}})))?;
                    }
                    for number in due(STATUS) {
                        let path = format!("/api/v1/nodes/{}/status", large::node_name(number));
                        let conditions = large::node_conditions(&heartbeat);
                        api.call(&Call::patch(
                            path,
                            &json!({"status": {"conditions": conditions}}),
                        ))?;
                    }
                    anyhow::Ok(())
                })();
                if let Err(e) = said {
                    eprintln!("the crowd's nodes: {e:#}");
                }
                second += 1;
            }
        });
        (held, noise)
    }

    /// The control: nobody has taken the crowd away meanwhile, or called its pods unready.
    fn still_there(&self) -> Result<()> {
        let pods = self.api.count("/api/v1/pods")?;
        ensure!(pods >= large::PODS as u64, "only {pods} pods are left");
        for number in [0, large::SERVICES - 1] {
            let namespace = large::namespace_of_service(number);
            let slices = self.api.call(&Call::get(format!(
                "/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices"
            )))?;
            let slices: Value = serde_json::from_str(&slices)?;
            let endpoints = slices["items"].as_array().into_iter().flatten();
            let mut endpoints = endpoints
                .flat_map(|slice| slice["endpoints"].as_array().cloned().unwrap_or_default());
            ensure!(
                endpoints.all(|endpoint| endpoint["conditions"]["ready"] == true),
                "an endpoint in {namespace} is not ready"
            );
        }
        Ok(())
    }

    /// As far as it goes.
    fn disperse(&self) -> Result<()> {
        // There is no kubelet that would let them end. A namespace's at once take the API server
        // longer than a request may.
        let pods = (0..large::PODS).map(|number| {
            let (pods, name) = (pods(number), large::pod_name(number));
            Call::delete(format!("{pods}/{name}?gracePeriodSeconds=0"))
        });
        let pods = self.api.all(pods);
        let nodes = (0..large::NODES).map(large::node_name).flat_map(|node| {
            let paths = [format!("/api/v1/nodes/{node}"), format!("{LEASES}/{node}")];
            paths.map(Call::delete)
        });
        let nodes = self.api.all(nodes);
        let spaces = (0..large::NAMESPACES).map(large::namespace_name);
        let spaces = spaces.map(|space| Call::delete(format!("/api/v1/namespaces/{space}")));
        pods.and(nodes).and(self.api.all(spaces))
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        if let Some((held, noise)) = self.noise.take() {
            drop(held);
            let _ = noise.join();
        }
        if let Err(e) = self.disperse() {
            eprintln!("{e:#}");
        }
    }
}

/// Where the pod with this number is made.
fn pods(number: usize) -> String {
    let namespace = large::namespace_of_pod(number);
    format!("/api/v1/namespaces/{namespace}/pods")
}

const LEASES: &str = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases";

/// Now, as `date` writes it.
fn time(format: &str) -> Result<String> {
    let output = Command::new("date").args(["-u", format]).output();
    let output = output.context("start date: is coreutils installed?")?;
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

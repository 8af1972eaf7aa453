//! What outlives an agent: pins of other layouts, records and pins that were lost, slots that are
//! used again, and what somebody undid. Never is a connection plain that should not be.

use std::{
    fs,
    net::{SocketAddr, TcpStream},
    os::unix::fs::symlink,
    path::PathBuf,
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use picomesh::datapath::{
    DatapathSettings, Generation,
    loader::{Loader, LoaderSettings},
};
use picomesh_common::{
    Counter, PodConfig, ProbeState, StandingKey, Tuple,
    config::{LAYOUT, rule},
};

use picomesh_tests::requirements;

use super::{
    Test,
    agent::{Agent, Dirs, desired, until},
    pods::{CLIENT, SERVER, World, addresses, dial, ping},
    world::{Netns, ensure_same},
};

pub(super) const TESTS: [Test; 10] = [
    (
        "another_layout_takes_over_in_both_directions_and_nothing_is_plain",
        layouts,
    ),
    ("lost_records_marks_and_maps_open_nothing", lost),
    (
        "a_pod_that_left_the_mesh_and_its_record_is_let_go",
        unrecorded,
    ),
    (
        "a_pod_that_nobody_knows_any_more_or_whose_path_ended_stays_closed",
        orphaned,
    ),
    ("damage_from_outside_is_mended_and_told", damage),
    ("a_reused_slot_has_nothing_of_its_former_pod", reused),
    ("a_pod_made_again_at_once_is_a_new_pod", made_again),
    (
        "a_netns_made_again_under_the_same_name_is_captured_soon",
        remade,
    ),
    (
        "a_netns_that_vanishes_at_any_moment_leaves_nothing",
        vanishing,
    ),
    (
        "what_a_successor_did_before_it_died_is_known_to_the_agent_that_goes_on",
        bereft,
    ),
];

const SOON: Duration = Duration::from_secs(10);

fn layouts() -> Result<()> {
    for force_clsact in [false, true] {
        let world = World::new("layouts")?;
        let server = world.serve("10.97.0.3:8080")?;
        let mut before = world.dial(server.at)?;
        ping(&mut before)?;
        let settings = |layout| DatapathSettings {
            force_clsact,
            generation: Generation {
                layout,
                ..Generation::default()
            },
            ..world.dirs.settings()
        };
        let mut agent = captured(&world, settings(LAYOUT))?;
        for layout in [LAYOUT + 6, LAYOUT] {
            let mut taken = world.dial(server.at)?;
            ping(&mut taken).with_context(|| format!("before layout {layout}"))?;
            drop(agent);
            agent = without_a_plain_connection(&world, server.at, || {
                let agent = captured(&world, settings(layout))?;
                for pod in ["client", "server"] {
                    taken_over(&agent, pod).with_context(|| format!("layout {layout}"))?;
                }
                Ok(agent)
            })?;
            ping(&mut before).with_context(|| format!("what stood before, layout {layout}"))?;
            is_closed(&mut taken)?;
            let mut after = world.dial(server.at)?;
            let seen = ping(&mut after).with_context(|| format!("by layout {layout}"))?;
            ensure!(seen.port() != after.local_addr()?.port());
            let bpf_dir = world.dirs.settings().bpf_dir;
            until(SOON, || {
                let layouts = names(&bpf_dir)?;
                ensure!(layouts == [format!("v{layout}")], "{layouts:?}");
                Ok(())
            })?;
        }
    }
    Ok(())
}

/// What the agent needs to know again is gone, while none runs.
fn lost() -> Result<()> {
    type Loss = fn(&DatapathSettings) -> Result<()>;
    let remove: [(&str, Loss); 4] = [
        ("the records", |settings| {
            Ok(fs::remove_file(settings.run_dir.join("pods.json"))?)
        }),
        ("the run directory", |settings| {
            Ok(fs::remove_dir_all(&settings.run_dir)?)
        }),
        ("a map", |settings| {
            let maps = settings.bpf_dir.join(format!("v{LAYOUT}/maps"));
            Ok(fs::remove_file(maps.join("PODS"))?)
        }),
        ("all maps", |settings| {
            let maps = settings.bpf_dir.join(format!("v{LAYOUT}/maps"));
            for name in names(&maps)? {
                fs::remove_file(maps.join(name))?;
            }
            Ok(())
        }),
    ];
    for (what, remove) in remove {
        let world = World::new("lost")?;
        let server = world.serve("10.97.0.3:8080")?;
        let agent = world.agent()?;
        let slots = ["client", "server"].map(|pod| agent.status(pod).and_then(|s| s.slot));
        let mut taken = world.dial(server.at)?;
        ping(&mut taken)?;
        drop(agent);
        let agent = without_a_plain_connection(&world, server.at, || {
            remove(&world.dirs.settings())?;
            world.agent()
        })
        .with_context(|| what.to_owned())?;
        let now = ["client", "server"].map(|pod| agent.status(pod).and_then(|s| s.slot));
        ensure!(
            now == slots,
            "without {what}: slots {slots:?}, then {now:?}"
        );
        until(SOON, || {
            let mut after = world.dial(server.at)?;
            ensure!(
                ping(&mut after)?.port() != after.local_addr()?.port(),
                "plain"
            );
            Ok(())
        })
        .with_context(|| format!("without {what}: {:?}", agent.statuses()))?;
        taken.set_read_timeout(Some(Duration::from_millis(300)))?;
        ensure!(ping(&mut taken).is_err(), "nobody carries it any more");
    }
    Ok(())
}

/// Nobody wants it captured any more, and nothing says where it was: what is attached there does.
fn unrecorded() -> Result<()> {
    for force_clsact in [false, true] {
        let world = World::new("unrecorded")?;
        let before = world.client.picture()?;
        let server = world.serve("10.97.0.3:8080")?;
        let settings = DatapathSettings {
            force_clsact,
            ..world.dirs.settings()
        };
        drop(captured(&world, settings.clone())?);
        fs::remove_file(settings.run_dir.join("pods.json"))?;
        let staying = desired("server", &world.server, addresses(&SERVER));
        let agent = Agent::start(&world.node, settings, vec![staying])?;
        agent.wait_for("server", "captured")?;
        until(SOON, || ensure_same(&before, &world.client.picture()?))
            .with_context(|| format!("clsact {force_clsact}"))?;
        ping(&mut world.dial(server.at)?).with_context(|| format!("clsact {force_clsact}"))?;
    }
    Ok(())
}

/// Its object is gone and its containers run on; then the path that is on record leads nowhere.
fn orphaned() -> Result<()> {
    for force_clsact in [false, true] {
        let world = World::new("orphaned")?;
        let server = world.serve("10.97.0.3:8080")?;
        let settings = DatapathSettings {
            force_clsact,
            ..world.dirs.settings()
        };
        fs::create_dir(&settings.run_dir)?;
        let link = settings.run_dir.join("link");
        symlink(world.client.path(), &link)?;
        let mut pods = world.pods();
        pods[0].netns = link.clone();
        let staying = vec![pods[1].clone()];
        let agent = Agent::start(&world.node, settings.clone(), pods)?;
        for pod in ["client", "server"] {
            agent.wait_for(pod, "captured")?;
        }
        let agent = without_a_plain_connection(&world, server.at, || {
            agent.want_only(staying.clone());
            thread::sleep(Duration::from_secs(3));
            let status = agent.status("client").context("forgotten")?;
            ensure!(status.state == "captured", "{status:?}");
            drop(agent);
            fs::remove_file(&link)?;
            captured(&world, settings)
        })
        .with_context(|| format!("clsact {force_clsact}"))?;
        let mut stream = world.dial(server.at)?;
        ensure!(ping(&mut stream)?.port() != stream.local_addr()?.port());
        // And it goes with its namespace.
        agent.want_only(staying);
        world.client.remake()?;
        agent.wait_gone("client")?;
    }
    Ok(())
}

fn damage() -> Result<()> {
    type Deed = fn(&World, &DatapathSettings) -> Result<()>;
    let deeds: [(&str, bool, Deed); 7] = [
        ("a device deleted", false, |world, _| {
            world.client.ip(&["link", "del", "mesh0"]).map(drop)
        }),
        ("rules removed", false, |world, _| {
            for_families(|family| {
                let rule = [family, "rule", "del", "pref", "1"];
                world.client.ip(&rule).map(drop)
            })
        }),
        ("routes flushed", false, |world, _| {
            for_families(|family| {
                let routes = [family, "route", "flush", "table", "15001"];
                world.client.ip(&routes).map(drop)
            })
        }),
        ("a link's pin unlinked", false, |_, settings| {
            let pods = settings.bpf_dir.join(format!("v{LAYOUT}/pods"));
            for slot in names(&pods)? {
                for name in names(&pods.join(&slot))? {
                    // Before Linux 6.6 there is no other.
                    if name.starts_with("egress-") || name == "steer" {
                        fs::remove_file(pods.join(&slot).join(name))?;
                    }
                }
            }
            Ok(())
        }),
        (
            "the shared programs' pins unlinked",
            false,
            |_, settings| {
                let dir = settings.bpf_dir.join(format!("v{LAYOUT}/shared/14"));
                fs::remove_file(dir.join("pod_egress"))?;
                Ok(fs::remove_file(dir.join("pod_ingress"))?)
            },
        ),
        ("the qdisc replaced", true, |world, _| {
            world
                .client
                .exec(&["tc", "qdisc", "del", "dev", "eth0", "clsact"])?;
            world
                .client
                .exec(&["tc", "qdisc", "add", "dev", "eth0", "clsact"])
                .map(drop)
        }),
        ("the interface made again", false, |world, _| {
            world.client.ip(&["link", "del", "eth0"])?;
            world.client.connect_eth0(&world.server, &CLIENT, &SERVER)
        }),
    ];
    for (what, force_clsact, deed) in deeds {
        let world = World::new("damage")?;
        let server = world.serve("10.97.0.3:8080")?;
        let settings = DatapathSettings {
            force_clsact,
            ..world.dirs.settings()
        };
        let agent = captured(&world, settings.clone())?;
        // The first full turn is over.
        thread::sleep(Duration::from_millis(300));
        let repairs = agent.status("client").context("no pod")?.repairs;
        deed(&world, &settings).with_context(|| what.to_owned())?;
        until(SOON, || {
            agent.kick();
            thread::sleep(Duration::from_millis(100));
            let status = agent.status("client").context("no pod")?;
            ensure!(
                status.repairs > repairs && !status.mended.is_empty(),
                "{what}: {status:?}"
            );
            let mut stream = dial(&world.client, server.at)?;
            ensure!(
                ping(&mut stream)?.port() != stream.local_addr()?.port(),
                "{what}: not captured"
            );
            Ok(())
        })?;
    }

    // Pins of maps are nobody's pod's.
    let world = World::new("damage-maps")?;
    let agent = world.agent()?;
    let maps = world
        .dirs
        .settings()
        .bpf_dir
        .join(format!("v{LAYOUT}/maps"));
    let before = names(&maps)?;
    fs::remove_file(maps.join("LISTENERS"))?;
    fs::remove_file(maps.join("SOCKETS"))?;
    agent.kick();
    until(SOON, || {
        ensure!(names(&maps)? == before, "{:?}", names(&maps)?);
        Ok(())
    })?;
    // An address that nobody told the agent of is captured like any other.
    let server = world.serve("10.97.0.3:8080")?;
    world
        .client
        .ip(&["addr", "del", "10.97.0.2/24", "dev", "eth0"])?;
    world
        .client
        .ip(&["addr", "add", "10.97.0.77/24", "dev", "eth0"])?;
    let mut stream = world.dial(server.at)?;
    ensure!(ping(&mut stream)?.port() != stream.local_addr()?.port());
    Ok(())
}

fn for_families(deed: impl Fn(&str) -> Result<()>) -> Result<()> {
    deed("-4")?;
    if requirements::ipv6() {
        deed("-6")?;
    }
    Ok(())
}

fn reused() -> Result<()> {
    let world = World::new("reused")?;
    let third = Netns::new("reused-third")?;
    let address: SocketAddr = "10.93.0.1:80".parse()?;
    let mut pods = world.pods();
    pods.push(desired("short", &third, &["10.93.0.1"]));
    let agent = Agent::start(&world.node, world.dirs.settings(), pods)?;
    let slot = agent
        .wait_for("short", "captured")?
        .slot
        .context("no slot")?;
    let loader = look(&world.dirs)?;
    let key = StandingKey {
        slot,
        tuple: Tuple::new(address, "10.93.0.9:4000".parse()?),
    };
    loader.insert_standing(&key)?;
    loader.insert_probe(
        &key,
        &ProbeState {
            since_ns: 0,
            phase: ProbeState::ESTABLISHED,
            _pad: 0,
        },
    )?;
    // A refusal to count.
    let _nobody_there = dial(&third, "10.93.0.9:80".parse()?);
    drop(third);
    agent.kick();
    agent.wait_for("short", "failed")?;
    ensure!(loader.pod_config(slot)? == PodConfig::EMPTY);
    ensure!(loader.standing()?.iter().all(|key| key.slot != slot));
    ensure!(loader.probes()?.iter().all(|(key, _)| key.slot != slot));
    ensure!(loader.local()?.values().all(|owner| *owner != slot));
    let counted: Vec<(Counter, u64)> = loader.counters(slot)?;
    ensure!(counted.iter().all(|(_, count)| *count == 0), "{counted:?}");
    Ok(())
}

/// As a StatefulSet's pod: same name, same address, same path, and another one.
fn made_again() -> Result<()> {
    let world = World::new("again")?;
    let server = world.serve("10.97.0.3:8080")?;
    let agent = world.agent()?;
    for round in 0..3 {
        world.client.remake()?;
        // Unless it has gone with the old namespace.
        let _gone = world.server.ip(&["link", "del", "eth0"]);
        world.client.connect_eth0(&world.server, &CLIENT, &SERVER)?;
        let mut pods = world.pods();
        let uid = format!("client-{round}");
        pods[0].uid = uid.as_str().into();
        agent.want(pods);
        let slot = agent.wait_for(&uid, "captured")?.slot.context("no slot")?;
        agent.wait_gone(&if round == 0 {
            "client".to_owned()
        } else {
            format!("client-{}", round - 1)
        })?;
        let mut stream = world.dial(server.at)?;
        ensure!(ping(&mut stream)?.port() != stream.local_addr()?.port());
        let local = look(&world.dirs)?.local()?;
        for ip in addresses(&CLIENT) {
            let ip: std::net::IpAddr = ip.parse()?;
            ensure!(local.get(&ip.into()) == Some(&slot), "{ip}: {local:?}");
        }
    }
    Ok(())
}

/// The same pod for whoever wrote the manifests, and another namespace, which is plain at first.
fn remade() -> Result<()> {
    let world = World::new("remade")?;
    let server = world.serve("10.97.0.3:8080")?;
    let _agent = world.agent()?;
    // The first full turn is over, and the next is long after the test.
    thread::sleep(Duration::from_millis(300));
    world.client.remake()?;
    // Unless it has gone with the old namespace.
    let _gone = world.server.ip(&["link", "del", "eth0"]);
    world.client.connect_eth0(&world.server, &CLIENT, &SERVER)?;
    until(Duration::from_secs(6), || {
        let mut stream = world.dial(server.at)?;
        ensure!(
            ping(&mut stream)?.port() != stream.local_addr()?.port(),
            "plain"
        );
        Ok(())
    })
}

fn vanishing() -> Result<()> {
    let world = World::new("vanishing")?;
    let agent = Agent::start(&world.node, world.dirs.settings(), world.pods())?;
    for round in 0..12 {
        let short = Netns::new("vanishing-short")?;
        let mut pods = world.pods();
        pods.push(desired("short", &short, &["10.93.0.1"]));
        agent.want(pods);
        thread::sleep(Duration::from_millis(round * 9));
        drop(short);
        agent.want(world.pods());
    }
    agent.wait_gone("short")?;
    for pod in ["client", "server"] {
        agent.wait_for(pod, "captured")?;
    }
    let pods = world
        .dirs
        .settings()
        .bpf_dir
        .join(format!("v{LAYOUT}/pods"));
    until(SOON, || {
        let slots = names(&pods)?;
        ensure!(slots.len() == 2, "pins of slots {slots:?}");
        Ok(())
    })
}

/// The successor had let a pod go, given its slot to another and captured a third. Who goes on from
/// older memory opens one of them.
fn bereft() -> Result<()> {
    for force_clsact in [false, true] {
        let world = World::new("bereft")?;
        let [leaves, comes] = ["leaves", "comes"].map(|name| Netns::new(&format!("bereft-{name}")));
        let (leaves, comes) = (leaves?, comes?);
        let server = world.serve("10.97.0.3:8080")?;
        let settings = DatapathSettings {
            force_clsact,
            ..world.dirs.settings()
        };
        let staying = desired("server", &world.server, addresses(&SERVER));
        let leaving = desired("leaves", &leaves, &["10.93.0.1"]);
        let client = desired("client", &world.client, addresses(&CLIENT));
        let coming = desired("comes", &comes, &["10.93.0.2"]);
        let slot = |agent: &Agent, pod: &str| -> Result<u32> {
            let status = agent.wait_for(pod, "captured")?;
            status.slot.context("captured, and no slot")
        };

        let first = vec![leaving, staying.clone()];
        let before = Agent::start(&world.node, settings.clone(), first.clone())?;
        let left = slot(&before, "leaves")?;
        let stayed = slot(&before, "server")?;
        let paused = before.pause()?;

        let successor = Agent::start(&world.node, settings.clone(), first)?;
        successor.want(vec![staying.clone()]);
        successor.wait_gone("leaves")?;
        let last = vec![staying, client, coming];
        successor.want(last[..2].to_vec());
        let reused = slot(&successor, "client")?;
        ensure!(reused == left, "control: slot {reused} instead of {left}");
        successor.want(last.clone());
        let new = slot(&successor, "comes")?;

        without_a_plain_connection(&world, server.at, || {
            drop(successor);
            before.resume(paused)?;
            // Before it hears of the pods itself.
            thread::sleep(Duration::from_millis(500));
            before.want(last);
            let now = [slot(&before, "client")?, slot(&before, "server")?];
            ensure!(now == [reused, stayed], "slots {now:?}");
            ensure!(slot(&before, "comes")? == new);
            before.wait_gone("leaves")
        })
        .with_context(|| format!("clsact {force_clsact}: {:?}", before.statuses()))?;
        until(SOON, || {
            let mut stream = world.dial(server.at)?;
            ensure!(ping(&mut stream)?.port() != stream.local_addr()?.port());
            Ok(())
        })?;
        drop(before);
        // What is on record is what stands.
        let next = Agent::start(&world.node, settings, world.pods())?;
        ensure!([slot(&next, "client")?, slot(&next, "server")?] == [reused, stayed]);
        next.wait_gone("comes")?;
    }
    Ok(())
}

fn captured(world: &World, settings: DatapathSettings) -> Result<Agent> {
    let agent = Agent::start(&world.node, settings, world.pods())?;
    for pod in ["client", "server"] {
        agent.wait_for(pod, "captured")?;
    }
    Ok(agent)
}

fn taken_over(agent: &Agent, pod: &str) -> Result<()> {
    until(SOON, || {
        let status = agent.status(pod).context("no such pod")?;
        ensure!(status.mended.contains(&"maps"), "{status:?}");
        Ok(())
    })
}

/// Dials all the while. A connection may fail, but none may reach the server from the client's own
/// port.
fn without_a_plain_connection<T>(
    world: &World,
    to: SocketAddr,
    work: impl FnOnce() -> Result<T>,
) -> Result<T> {
    let stop = AtomicBool::new(false);
    let (tries, plain) = (AtomicU32::new(0), AtomicU32::new(0));
    let done = thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                tries.fetch_add(1, Ordering::Relaxed);
                let dialled = world
                    .client
                    .run(|| TcpStream::connect_timeout(&to, Duration::from_millis(50)));
                let Ok(Ok(mut stream)) = dialled else {
                    continue;
                };
                let own = stream.local_addr().map(|at| at.port()).unwrap_or_default();
                let short = stream.set_read_timeout(Some(Duration::from_millis(100)));
                if short.is_ok() && ping(&mut stream).is_ok_and(|seen| seen.port() == own) {
                    plain.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        thread::sleep(Duration::from_millis(100));
        let done = work();
        stop.store(true, Ordering::Relaxed);
        done
    })?;
    let (tries, plain) = (tries.into_inner(), plain.into_inner());
    ensure!(
        tries > 0 && plain == 0,
        "{plain} of {tries} connections were plain"
    );
    Ok(done)
}

fn is_closed(stream: &mut TcpStream) -> Result<()> {
    let error = ping(stream)
        .expect_err("still carried")
        .downcast::<std::io::Error>()?;
    ensure!(
        error.kind() != std::io::ErrorKind::WouldBlock,
        "left open, and silent: {error}"
    );
    Ok(())
}

/// A second look at the same maps.
fn look(dirs: &Dirs) -> Result<Loader> {
    Ok(Loader::new(LoaderSettings {
        bpf_dir: dirs.settings().bpf_dir,
        our_mark: 1,
        capture_mark: 2,
        node_netns_cookie: 0,
        rules: rule::ALL,
        force_clsact: false,
        generation: Generation::default(),
    })?)
}

fn names(dir: &PathBuf) -> Result<Vec<String>> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .with_context(|| format!("read {}", dir.display()))?
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    Ok(names)
}

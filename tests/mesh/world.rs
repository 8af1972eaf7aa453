//! The world itself, without a mesh: it must carry traffic and leave nothing behind, or every
//! other test of this tier lies.

use std::{net::Ipv4Addr, path::Path, time::Duration};

use anyhow::{Result, bail, ensure};
use picomesh_tests::{
    Pod, PodSpec, ServiceSpec, World, client, netns, program,
    raw::{self, SYN, Segment},
    reaper, requirements,
    server::{Habit, Server},
};

use crate::harness::{Need, Test};

pub(crate) const TESTS: &[Test] = &[
    Test {
        name: "world::pods_of_all_nodes_reach_each_other_over_both_families",
        needs: &[],
        run: pods_of_all_nodes_reach_each_other_over_both_families,
    },
    Test {
        name: "world::services_are_unreachable_without_the_mesh",
        needs: &[],
        run: services_are_unreachable_without_the_mesh,
    },
    Test {
        name: "world::a_capture_finds_plain_text_on_the_wire",
        needs: &[],
        run: a_capture_finds_plain_text_on_the_wire,
    },
    Test {
        name: "world::frames_made_by_hand_reach_the_stack",
        needs: &[],
        run: frames_made_by_hand_reach_the_stack,
    },
    Test {
        name: "world::real_programs_serve_in_pods",
        needs: &[
            Need::Program("nginx"),
            Need::Program("curl"),
            Need::Program("redis-server"),
            Need::Program("redis-cli"),
        ],
        run: real_programs_serve_in_pods,
    },
    Test {
        name: "world::a_dropped_world_leaves_nothing",
        needs: &[],
        run: a_dropped_world_leaves_nothing,
    },
];

const SECOND: Duration = Duration::from_secs(1);

fn pods_of_all_nodes_reach_each_other_over_both_families() -> Result<()> {
    let (world, near, far) = two_pods()?;
    let outsider = world.outsider()?;
    let server = Server::start(far.netns(), 8080, Habit::WhoAmI)?;
    for from in [&near, &outsider] {
        for to in [far.at(server.port()), far.at6(server.port())] {
            if to.is_ipv6() && !requirements::ipv6() {
                continue;
            }
            let answer = from.run(|| client::exchange(to, b"", SECOND))?;
            let expected = if to.is_ipv4() {
                format!("{}\n", from.v4())
            } else {
                format!("{}\n", from.v6())
            };
            ensure!(
                String::from_utf8_lossy(&answer) == expected,
                "{to} saw {answer:?} instead of {expected}"
            );
        }
    }
    let node = world.node(1)?;
    let answer = node.run(|| client::exchange(far.at(8080), b"", SECOND))?;
    ensure!(
        answer == format!("{}\n", node.gateway()).as_bytes(),
        "a probe of the host comes from the pods' gateway, not {answer:?}"
    );
    Ok(())
}

fn services_are_unreachable_without_the_mesh() -> Result<()> {
    let (world, near, far) = two_pods()?;
    let _server = Server::start(far.netns(), 8080, Habit::Echo)?;
    let service = world.service(&ServiceSpec::new("far", 80, 8080))?;
    for to in [service.at(), service.at6()] {
        if near.run(|| client::connect(to, SECOND)).is_ok() {
            bail!("{to} answers without a mesh: the world resolves Services by itself");
        }
    }
    Ok(())
}

fn a_capture_finds_plain_text_on_the_wire() -> Result<()> {
    let (world, near, far) = two_pods()?;
    let _server = Server::start(far.netns(), 8080, Habit::Echo)?;
    let capture = world.capture_wire(&[b"a-marker-of-its-own", b"never-sent"])?;
    near.run(|| client::exchange(far.at(8080), b"a-marker-of-its-own", SECOND))?;
    capture.wait_found(0, SECOND)?;
    let seen = capture.stop()?;
    ensure!(seen.found[1] == 0, "found what was never sent");
    ensure!(
        seen.tcp()
            .any(|t| t.src == far.at(8080) && t.payload.starts_with(b"a-marker")),
        "the echo is not among the {} packets",
        seen.packets
    );
    ensure!(
        seen.plain_payload(15008) > 0,
        "plain payload was not counted"
    );
    let file = world.dir().join("wire.pcap");
    seen.write_pcap(&file)?;
    ensure!(file.metadata()?.len() > 100, "the pcap file is empty");
    Ok(())
}

fn frames_made_by_hand_reach_the_stack() -> Result<()> {
    let (world, near, far) = two_pods()?;
    let _server = Server::start(far.netns(), 8080, Habit::Echo)?;
    let to = far.netns().mac("eth0")?;
    let node = world.node(1)?;
    // Nobody has the source: the SYN-ACK is proof enough, seen on the pod's own interface.
    let ghost = (Ipv4Addr::new(10, 244, 1, 251), 4321).into();
    let capture = picomesh_tests::capture::Capture::start(far.netns(), Some("eth0"), &[])?;
    // A neighbour entry makes the pod answer at once instead of asking who the source is.
    far.netns()
        .ip("neigh add 10.244.1.251 lladdr 02:00:00:00:00:99 dev eth0")?;
    let syn = Segment::new(ghost, far.at(8080), SYN);
    let frames = [
        syn.clone().frame([2, 0, 0, 0, 0, 0x99], to)?,
        syn.clone()
            .ip_options(&[1, 1, 1, 1])
            .frame([2, 0, 0, 0, 0, 0x99], to)?,
    ];
    raw::send(node.netns(), "cni0", &frames)?;
    let [first, second] = syn.seq(9000).fragments([2, 0, 0, 0, 0, 0x99], to, 16)?;
    raw::send(node.netns(), "cni0", &[second, first])?;
    std::thread::sleep(Duration::from_millis(200));
    let seen = capture.stop()?;
    let answers = seen
        .tcp()
        .filter(|t| t.dst == ghost && t.flags & (SYN | raw::ACK) == SYN | raw::ACK)
        .count();
    ensure!(
        answers >= 2,
        "{answers} answers to three forged SYNs; {} packets seen",
        seen.packets
    );
    drop(near);
    Ok(())
}

fn real_programs_serve_in_pods() -> Result<()> {
    let (world, near, far) = two_pods()?;
    let _nginx = program::nginx(&world, &far, 80)?;
    let _redis = program::redis(&far, 6379)?;
    let body = program::curl(&near, &format!("http://{}/", far.at(80)))?;
    ensure!(body.trim() == near.v4().to_string(), "nginx saw {body}");
    let body = program::curl(&near, &format!("http://{}/", far.at6(80)))?;
    ensure!(body.trim() == near.v6().to_string(), "nginx saw {body}");
    let pong = near.output(
        "redis-cli",
        &["-h", &far.v4().to_string(), "ping"],
        5 * SECOND,
    )?;
    ensure!(pong.stdout.trim() == "PONG", "redis says {pong:?}");
    Ok(())
}

fn a_dropped_world_leaves_nothing() -> Result<()> {
    let (world, near, far) = two_pods()?;
    let name = world.name().to_owned();
    let sleeper = near.spawn("sleeper", "sleep", &["1000"])?;
    let pid = sleeper.pid();
    ensure!(
        Path::new(&format!("/proc/{pid}")).exists(),
        "sleep does not run"
    );
    ensure!(
        !netns::list(&name).is_empty(),
        "the world has no namespaces"
    );
    drop((world, near, far));
    ensure!(
        sleeper.exited().is_some(),
        "process {pid} outlives its world"
    );
    let left = netns::list(&name);
    ensure!(left.is_empty(), "namespaces are left: {left:?}");
    ensure!(!reaper::dir(&name).exists(), "files are left");
    ensure!(!reaper::bpf_dir(&name).exists(), "pins are left");
    Ok(())
}

fn two_pods() -> Result<(World, Pod, Pod)> {
    let world = World::new(2)?;
    world.namespace("mesh", Some("enabled"))?;
    let near = world.pod(&PodSpec::new("near"))?;
    let far = world.pod(&PodSpec::new("far").on(1))?;
    Ok((world, near, far))
}

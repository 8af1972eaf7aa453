//! What is attached, who notices, what outlives whom (rules 6 and 11).

use std::{
    io::{Read, Write},
    net::SocketAddr,
    os::fd::AsFd,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use picomesh::datapath::loader::{HookFault, Loader, LoaderSettings, PodHooks};
use picomesh_common::{Counter, config::rule};
use picomesh_tests::wait;

use crate::{
    Test,
    topology::{
        FAMILIES, QUIET, SLOT, SOON, Setup, Topology, accept, attempt, dial, families, serve,
    },
};

pub(crate) const TESTS: &[Test] = &[
    (
        "the_next_agent_of_the_same_build_finds_everything_in_place",
        adoption,
    ),
    (
        "another_build_replaces_every_program_in_one_step",
        replacement,
    ),
    ("what_somebody_took_off_is_noticed_and_put_back", repair),
    (
        "without_the_programs_that_decide_a_pod_is_closed",
        no_program,
    ),
    ("tcx_and_clsact_never_stand_together", change_of_way),
    ("leaving_removes_every_trace", removal),
    (
        "two_agents_on_one_kernel_do_not_touch_each_other",
        two_agents,
    ),
    ("a_second_interface_is_captured_too", second_interface),
];

fn adoption(setup: &Setup) -> Result<()> {
    let (mut topology, listeners) = Topology::with_listeners(setup)?;
    topology.watch_probes()?;
    let config = topology.loader.pod_config(SLOT)?;
    // The agent is gone; its maps, links and programs are not. (The listeners of a real agent go
    // with it: here they show that the map is the same.)
    topology.loader = Loader::new(topology.setup_settings.clone())?;
    ensure!(topology.loader.pinned_slots()? == [SLOT]);
    ensure!(topology.loader.pod_config(SLOT)? == config);
    ensure!(topology.loader.host_sockets_attached()?);
    let hooks = hooks(&topology)?;
    ensure!(
        hooks
            == PodHooks {
                faults: vec![],
                same_build: true
            },
        "{hooks:?}"
    );
    for family in families() {
        let _app = dial(&topology.pod, SocketAddr::new(family.client, 80))?;
        accept(&listeners.outbound[family.index as usize])?;
    }
    // Nothing is attached a second time.
    topology.loader.attach_host_sockets()?;
    topology.attach()?;
    ensure!(topology.loader.host_sockets_attached()?);
    ensure!(self::hooks(&topology)?.faults.is_empty());
    Ok(())
}

fn replacement(setup: &Setup) -> Result<()> {
    let (mut topology, listeners) = Topology::with_listeners(setup)?;
    topology.watch_probes()?;
    let mut app = dial(&topology.pod, SocketAddr::new(FAMILIES[0].client, 80))?;
    let (mut taken, _peer) = accept(&listeners.outbound[0])?;
    let other = LoaderSettings {
        // A bit that no rule has: another build to whoever looks, the same to packets.
        rules: topology.setup_settings.rules | !rule::ALL,
        ..topology.setup_settings.clone()
    };
    topology.loader = Loader::new(other)?;
    ensure!(
        !hooks(&topology)?.same_build,
        "it passes for the same build"
    );
    topology.attach()?;
    topology.loader.attach_host_sockets()?;
    let after = hooks(&topology)?;
    ensure!(
        after
            == PodHooks {
                faults: vec![],
                same_build: true
            },
        "{after:?}"
    );
    ensure!(topology.loader.host_sockets_attached()?);
    // The open connection did not notice.
    app.write_all(b"still")?;
    let mut got = [0; 5];
    taken.read_exact(&mut got)?;
    taken.write_all(b"there")?;
    app.set_read_timeout(Some(SOON))?;
    app.read_exact(&mut got)?;
    ensure!(&got == b"there");
    Ok(())
}

/// A container with NET_ADMIN can do this.
fn repair(setup: &Setup) -> Result<()> {
    let (topology, listeners) = Topology::with_listeners(setup)?;
    if topology.loader.uses_tcx() {
        let dir = topology.bpf_dir.join(format!("v1/pods/{SLOT}"));
        std::fs::remove_file(dir.join(format!("egress-{}", topology.interfaces[0].index)))?;
        std::fs::remove_file(dir.join("steer"))?;
    } else {
        topology.pod.run("tc filter del dev eth0 egress")?;
        std::fs::remove_file(topology.bpf_dir.join(format!("v1/pods/{SLOT}/steer")))?;
    }
    let missing = |hook: &str| HookFault {
        hook: hook.to_owned(),
        found: 0,
    };
    // A link whose pin is gone goes a moment later.
    await_faults(&topology, &[missing("steer"), missing("egress of eth0")])?;
    topology.attach()?;
    ensure!(
        self::hooks(&topology)?.faults.is_empty(),
        "{:?}",
        self::hooks(&topology)?
    );
    let _app = dial(&topology.pod, SocketAddr::new(FAMILIES[0].client, 80))?;
    accept(&listeners.outbound[0])?;
    Ok(())
}

/// The array of shared programs loses them when nobody has it open and its pin is removed.
fn no_program(setup: &Setup) -> Result<()> {
    let (mut topology, listeners) = Topology::with_listeners(setup)?;
    std::fs::remove_file(topology.bpf_dir.join("v1/maps/JUMPS"))?;
    topology.loader = Loader::new(topology.setup_settings.clone())?;
    for family in families() {
        let before = topology.count(Counter::NoProgram)?;
        // The kernel takes its time to let go of a map that nobody holds any more.
        wait::until("nothing gets out", SOON, || {
            let end = attempt(&topology.pod, SocketAddr::new(family.client, 80), QUIET);
            matches!(end, Ok(Some(std::io::ErrorKind::TimedOut)))
        })?;
        topology.await_count(Counter::NoProgram, before)?;
    }
    ensure!(!hooks(&topology)?.same_build, "nobody would notice");
    topology.attach()?;
    ensure!(
        hooks(&topology)?
            == PodHooks {
                faults: vec![],
                same_build: true
            },
        "{:?}",
        hooks(&topology)?
    );
    let _app = dial(&topology.pod, SocketAddr::new(FAMILIES[0].client, 80))?;
    accept(&listeners.outbound[0])?;
    Ok(())
}

fn change_of_way(setup: &Setup) -> Result<()> {
    let (mut topology, listeners) = Topology::with_listeners(setup)?;
    let was_tcx = topology.loader.uses_tcx();
    for force_clsact in [!setup.force_clsact, setup.force_clsact] {
        let settings = LoaderSettings {
            force_clsact,
            ..topology.setup_settings.clone()
        };
        topology.loader = Loader::new(settings)?;
        topology.attach()?;
        ensure!(
            hooks(&topology)?.faults.is_empty(),
            "{:?}",
            hooks(&topology)?
        );
        let _app = dial(&topology.pod, SocketAddr::new(FAMILIES[0].client, 80))?;
        accept(&listeners.outbound[0])?;
    }
    ensure!(topology.loader.uses_tcx() == was_tcx);
    ensure!(
        topology.count(Counter::CapturedOutbound)? == 2,
        "{:?}",
        topology.nonzero()?
    );
    Ok(())
}

fn removal(setup: &Setup) -> Result<()> {
    let (topology, _listeners) = Topology::with_listeners(setup)?;
    topology.watch_probes()?;
    topology
        .pod
        .enter(|| Ok(topology.loader.detach(SLOT, &topology.interfaces)?))?;
    let hooks = hooks(&topology)?;
    ensure!(
        hooks.faults.len() == 3 && hooks.faults.iter().all(|fault| fault.found == 0),
        "{hooks:?}"
    );
    topology.loader.clear_slot(SLOT)?;
    ensure!(topology.loader.local()?.is_empty());
    ensure!(topology.loader.pinned_slots()?.is_empty());
    // The pod is as it was.
    for family in families() {
        let server = serve(&topology.client, SocketAddr::new(family.client, 80))?;
        let _app = dial(&topology.pod, server.local_addr()?)?;
        accept(&server).context("outbound")?;
        let app = serve(&topology.pod, SocketAddr::new(family.pod, 80))?;
        let _client = dial(&topology.client, app.local_addr()?)?;
        accept(&app).context("inbound")?;
    }
    Loader::new(topology.setup_settings.clone())?.remove_everything()?;
    ensure!(
        !topology.bpf_dir.exists(),
        "{} is still there",
        topology.bpf_dir.display()
    );
    Ok(())
}

fn two_agents(setup: &Setup) -> Result<()> {
    let (one, _listeners) = Topology::with_listeners(setup)?;
    let (other, _others) = Topology::with_listeners(setup)?;
    one.watch_probes()?;
    other.watch_probes()?;
    ensure!(one.loader.host_sockets_attached()? && other.loader.host_sockets_attached()?);
    let app = serve(&one.pod, SocketAddr::new(FAMILIES[0].pod, 80))?;
    let _probe = dial(&one.node, app.local_addr()?)?;
    accept(&app)?;
    ensure!(
        other.loader.probes()?.is_empty(),
        "the other agent saw this one's probe"
    );
    other
        .pod
        .enter(|| Ok(other.loader.detach(SLOT, &other.interfaces)?))?;
    Loader::new(other.setup_settings.clone())?.remove_everything()?;
    ensure!(one.loader.host_sockets_attached()?);
    ensure!(hooks(&one)?.faults.is_empty());
    Ok(())
}

fn second_interface(setup: &Setup) -> Result<()> {
    let (mut topology, listeners) = Topology::with_listeners(setup)?;
    topology.pod.run(
        "ip link add net.1 type veth peer name far
         ip addr add 10.79.0.1/24 dev net.1
         ip link set net.1 up
         ip link set far up
         ip neigh add 10.79.0.2 lladdr 02:00:00:00:09:09 dev net.1",
    )?;
    let index = topology
        .pod
        .enter(|| Ok(nix::net::if_::if_nametoindex("net.1")?))?;
    let mut interface = topology.interfaces[0].clone();
    interface.name = "net.1".to_owned();
    interface.index = index;
    topology.interfaces.push(interface);
    ensure!(
        hooks(&topology)?.faults.len() == 2,
        "{:?}",
        hooks(&topology)?
    );
    topology.attach()?;
    ensure!(
        hooks(&topology)?.faults.is_empty(),
        "{:?}",
        hooks(&topology)?
    );
    let _app = dial(&topology.pod, SocketAddr::from(([10, 79, 0, 2], 80)))?;
    accept(&listeners.outbound[0])?;
    Ok(())
}

fn await_faults(topology: &Topology, faults: &[HookFault]) -> Result<()> {
    let deadline = Instant::now() + SOON;
    loop {
        let found = hooks(topology)?.faults;
        if found == faults {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "{found:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn hooks(topology: &Topology) -> Result<PodHooks> {
    topology.pod.enter(|| {
        Ok(topology
            .loader
            .hooks(SLOT, &topology.interfaces, topology.pod.fd().as_fd())?)
    })
}

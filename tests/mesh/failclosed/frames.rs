//! What a neighbour may send by hand, in every shape, to a pod that lets only proven identities in.

use std::{fmt, net::SocketAddr, time::Duration};

use anyhow::{Context, Result, ensure};
use picomesh_tests::{
    Pod,
    frames::{DESTINATION_OPTIONS, Forger, HOP_BY_HOP, Heard, Shape},
    server::{Habit, Server},
    wait,
};

use super::{Ground, PATIENCE, PORT};

const GREETING: &str = "the-application-speaks";
const PAYLOAD: &[u8] = b"let-me-in";

/// Nobody's addresses on the victim's link.
const GHOSTS: [&str; 2] = ["10.244.1.251", "fd00:244:1::251"];

struct Case {
    shape: Shape,
    /// Index into [`GHOSTS`], and of the victim's address.
    family: usize,
    refusal: Refusal,
}

/// Who turns the frame down when the mesh is on.
#[derive(Clone, Copy)]
enum Refusal {
    /// The kernel half, for this reason.
    Kernel(&'static str),
    /// It is taken to the proxy like any connection, and policy denies it.
    Policy,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} from {}", self.shape, GHOSTS[self.family])
    }
}

pub(super) fn frames_of_any_shape_reach_no_strict_pod() -> Result<()> {
    let mut ground = Ground::new()?;
    let server = Server::start(ground.far.netns(), PORT, Habit::SpeaksFirst(GREETING))?;
    let victim = ground.far.clone();
    let forger = Forger::new(
        ground.neighbour.netns(),
        "eth0",
        victim.netns().mac("eth0")?,
    )?;
    let mac = forger.mac().map(|byte| format!("{byte:02x}")).join(":");
    for ghost in GHOSTS {
        victim
            .netns()
            .ip(&format!("neigh add {ghost} lladdr {mac} dev eth0\n"))?;
    }

    for (number, case) in cases().iter().enumerate() {
        control(&forger, &victim, &server, case, 20_000 + number as u16)
            .with_context(|| format!("control, without the mesh: {case}"))?;
    }
    ground.mesh()?;
    for (number, case) in cases().iter().enumerate() {
        attack(&ground, &forger, &server, case, 21_000 + number as u16)
            .with_context(|| format!("with the mesh: {case}"))?;
    }
    Ok(())
}

fn cases() -> Vec<Case> {
    let fragments = |first, swapped| Shape::Fragments { first, swapped };
    let fragment = Refusal::Kernel("fragment");
    let tag = Refusal::Kernel("unknown_ethertype");
    let of = |family: usize| {
        move |(shape, refusal)| Case {
            shape,
            family,
            refusal,
        }
    };
    let v4 = [
        (Shape::Plain, Refusal::Policy),
        (Shape::IpOptions, Refusal::Policy),
        (fragments(16, false), fragment),
        (fragments(16, true), fragment),
        (fragments(8, false), fragment),
        (fragments(8, true), fragment),
        // The kernel takes one tag off before any program runs.
        (Shape::Vlan0(1), Refusal::Policy),
        (Shape::Vlan0(2), tag),
        (Shape::Vlan0(3), tag),
    ];
    let v6 = [
        (Shape::Plain, Refusal::Policy),
        (Shape::Extensions(vec![HOP_BY_HOP]), Refusal::Policy),
        (
            Shape::Extensions(vec![DESTINATION_OPTIONS]),
            Refusal::Policy,
        ),
        (
            Shape::Extensions(vec![HOP_BY_HOP, DESTINATION_OPTIONS, DESTINATION_OPTIONS]),
            Refusal::Policy,
        ),
        (
            Shape::Extensions(vec![DESTINATION_OPTIONS; 12]),
            Refusal::Kernel("too_many_extensions"),
        ),
        // IPv6 itself wants all headers in the first fragment.
        (fragments(24, false), fragment),
        (fragments(24, true), fragment),
        (Shape::Vlan0(1), Refusal::Policy),
        (Shape::Vlan0(2), tag),
        (Shape::Vlan0(3), tag),
    ];
    v4.into_iter()
        .map(of(0))
        .chain(v6.into_iter().map(of(1)))
        .collect()
}

/// The frame gets in: the application accepts, hears and speaks.
fn control(forger: &Forger, victim: &Pod, server: &Server, case: &Case, port: u16) -> Result<()> {
    let before = server.bytes();
    let heard = knock(forger, victim, case, port)?;
    ensure!(
        heard.data.starts_with(GREETING.as_bytes()),
        "the application does not speak: {heard:?}"
    );
    wait::until("the application hears", PATIENCE, || {
        server.bytes() >= before + PAYLOAD.len() as u64
    })
}

/// The frame does not get in, and is counted.
fn attack(ground: &Ground, forger: &Forger, server: &Server, case: &Case, port: u16) -> Result<()> {
    let (name, labels) = match case.refusal {
        Refusal::Kernel(reason) => (
            "picomesh_kernel_refusals_total",
            vec![("pod", ground.far.name()), ("reason", reason)],
        ),
        Refusal::Policy => ("inbound_tcp_authz_deny_total", Vec::new()),
    };
    let refused = ground.guard()?.metrics()?.sum(name, &labels);
    let accepted = server.accepted();
    let heard = knock(forger, &ground.far, case, port)?;
    // What would come late still counts.
    std::thread::sleep(Duration::from_millis(50));
    ensure!(heard.data.is_empty(), "somebody speaks: {heard:?}");
    ensure!(
        server.accepted() == accepted,
        "the application accepted: {heard:?}"
    );
    match case.refusal {
        Refusal::Kernel(_) => ensure!(!heard.answered, "it was answered: {heard:?}"),
        Refusal::Policy => ensure!(heard.reset, "policy does not reset it: {heard:?}"),
    }
    ground
        .guard()?
        .wait_metric(name, &labels, PATIENCE, |now| now > refused)?;
    Ok(())
}

fn knock(forger: &Forger, victim: &Pod, case: &Case, port: u16) -> Result<Heard> {
    let to = [victim.at(PORT), victim.at6(PORT)][case.family];
    let ghost = SocketAddr::new(GHOSTS[case.family].parse()?, port);
    forger.knock(&case.shape, ghost, to, PAYLOAD)
}

//! Random and mutated packets through the kernel half, against a plain model of its rules.
//!
//! [`rules`] says in ordinary Rust what the design promises for a packet; it was written from the
//! rules, not from the programs. [`packets`] draws packets and the world they meet from a seed,
//! [`ground`] makes that world real in a pod and runs the programs by BPF_PROG_TEST_RUN, and this
//! file compares, packet by packet: the verdict, the bytes and the mark that come out, and what is
//! counted. A packet on which the two disagree is shrunk and printed with both opinions.
//!
//! What such a run cannot see: a packet's own socket (the kernel gives it a dummy one), a tag that
//! the device took off, and sk_lookup's device. The tests that attach have those.
//!
//! `PICOMESH_MODEL_PACKETS` and `PICOMESH_MODEL_SEED` choose how many and which.

mod ground;
mod packets;
mod rules;

use std::{collections::BTreeMap, env, fmt::Write as _, str::FromStr};

use anyhow::{Result, bail, ensure};
use picomesh_common::Counter;

use crate::{
    Test,
    topology::{Setup, needs_ipv6},
};

use ground::{Ground, Ran};
use packets::{Case, Direction, Random, World};

pub(crate) const TESTS: &[Test] = &[
    ("kept_packets_are_judged_as_the_rules_say", kept),
    ("random_packets_are_judged_as_the_rules_say", random),
];

/// Packets of a run in which nobody asked for more.
const PACKETS: u64 = 20_000;
/// Packets that meet the same world.
const BATCH: u64 = 200;
/// Attempts to make a failing packet smaller.
const SHRINKING: u32 = 2_000;

/// Packets on which programs and rules once disagreed: what they are, and their frames.
const KEPT: &[(&str, &str)] = &[
    (
        "a TCP header that reaches beyond the packet",
        "00000000000000000000000086dd610000000000060000000000000000000000000000000000000000000000\
         000000000000000000000000000000000000000000007000",
    ),
    (
        "an IPv6 address that ends like a mapped link-local one",
        "00000000000000000000000086dd610000000000060000000000000000000000000000000000000000000000\
         00000000000002000000ffffa9fe0000000000000000000000000000500000000000000000",
    ),
    (
        "a fragment header behind eight others, before UDP",
        "00000000000000000000000086dd600000000060004000000000000000000000000000000000000000000000\
         0000000000000000000000000000000000000000000000000000000000000000000000000000000000000000\
         000000000000000000000000000000000000000000002c000000000000001100000800000000000000000000\
         0000000000000000000000000000",
    ),
];

fn kept(setup: &Setup) -> Result<()> {
    apart(|| kept_inside(setup))
}

fn random(setup: &Setup) -> Result<()> {
    apart(|| random_inside(setup))
}

/// On a thread of its own, which may enter the pod and never come back.
fn apart(act: impl FnOnce() -> Result<()> + Send) -> Result<()> {
    needs_ipv6()?;
    std::thread::scope(|scope| {
        scope
            .spawn(act)
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn kept_inside(setup: &Setup) -> Result<()> {
    let mut ground = Ground::new(setup)?;
    let world = World::plain(ground.sockets());
    for (what, frame) in KEPT {
        for direction in [Direction::In, Direction::Out] {
            let case = Case::kept(direction, frame)?;
            if let Some(both) = disagreement(&mut ground, &world, &case)? {
                bail!("{what}: {case}\n{both}");
            }
        }
    }
    Ok(())
}

fn random_inside(setup: &Setup) -> Result<()> {
    let packets = setting("PICOMESH_MODEL_PACKETS", PACKETS)?;
    let seed: u64 = setting("PICOMESH_MODEL_SEED", 1)?;
    let mut ground = Ground::new(setup)?;
    let mut seen = Seen::default();
    let mut left = packets;
    for number in 0.. {
        if left == 0 {
            break;
        }
        let now = left.min(BATCH);
        ground.renew(setup)?;
        seen.add(batch(&mut ground, seed << 32 | number, now)?);
        left -= now;
    }
    println!("{packets} packets from seed {seed}: {seen}");
    // A generator that has forgotten a way through the rules tests nothing there.
    if packets >= PACKETS {
        seen.is_complete()?;
    }
    Ok(())
}

fn setting<T: FromStr>(name: &str, default: T) -> Result<T> {
    match env::var(name) {
        Ok(text) => match text.parse() {
            Ok(value) => Ok(value),
            Err(_) => bail!("{name}={text:?} is not a number"),
        },
        Err(_) => Ok(default),
    }
}

/// How often each way through the rules was taken.
#[derive(Default)]
struct Seen {
    ways: BTreeMap<&'static str, u64>,
    counters: BTreeMap<&'static str, u64>,
    unrunnable: u64,
}

impl Seen {
    fn add(&mut self, other: Self) {
        for (way, times) in other.ways {
            *self.ways.entry(way).or_default() += times;
        }
        for (counter, times) in other.counters {
            *self.counters.entry(counter).or_default() += times;
        }
        self.unrunnable += other.unrunnable;
    }

    fn is_complete(&self) -> Result<()> {
        for counter in Counter::ALL {
            let reachable = match counter {
                // Needs the packet's own socket, sk_lookup's device, or no memory.
                Counter::OrphanedTaken | Counter::SteeredNowhere | Counter::RedirectFailed => false,
                Counter::CapturedOutbound
                | Counter::CapturedInbound
                | Counter::ProbePassed
                | Counter::RefusedByKernel
                | Counter::FailedOpen
                | Counter::UnknownEthertype
                | Counter::BadHeader
                | Counter::Fragment
                | Counter::TooManyExtensions
                | Counter::ForeignMark
                | Counter::NoOutboundListener
                | Counter::NoInboundListener
                | Counter::NotStanding
                | Counter::UnknownSender
                | Counter::Inactive => true,
            };
            ensure!(
                self.counters.contains_key(counter.name()) == reachable,
                "{}: among these packets it must{} occur",
                counter.name(),
                if reachable { "" } else { " not" }
            );
        }
        for way in rules::WAYS {
            ensure!(
                self.ways.contains_key(way),
                "no packet went this way: {way}"
            );
        }
        Ok(())
    }
}

impl std::fmt::Display for Seen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ways through the rules", self.ways.len())?;
        if self.unrunnable > 0 {
            write!(f, ", {} too short for the kernel to run", self.unrunnable)?;
        }
        for (way, times) in &self.ways {
            write!(f, "\n{times:9} {way}")?;
        }
        Ok(())
    }
}

/// Draws a world and packets from `seed`, and compares.
fn batch(ground: &mut Ground, seed: u64, packets: u64) -> Result<Seen> {
    let mut random = Random::new(seed);
    let world = World::draw(&mut random, ground.sockets());
    let cases: Vec<Case> = (0..packets)
        .map(|_| Case::draw(&mut random, &world))
        .collect();

    let mut seen = Seen::default();
    let mut counted = BTreeMap::new();
    let mut now = world.clone();
    ground.become_world(&world)?;
    for (number, case) in cases.iter().enumerate() {
        let expected = rules::judge(&now, case);
        match ground.run(case)? {
            Ran::Verdict(ran) if ran.agrees(case, &expected) => {}
            Ran::Verdict(_) => return Err(explain(ground, seed, number, &now, case)),
            Ran::TooShort => {
                seen.unrunnable += 1;
                continue;
            }
        }
        if let Some(connection) = &expected.forgets {
            now.standing.remove(connection);
        }
        *seen.ways.entry(expected.why).or_default() += 1;
        if let Some(counter) = expected.counts {
            *seen.counters.entry(counter.name()).or_default() += 1;
            *counted.entry(counter.name()).or_default() += 1;
        }
    }
    if ground.counters()? == counted {
        return Ok(seen);
    }
    // Somewhere a refusal had another reason than expected: once more, slowly.
    let mut now = world.clone();
    for (number, case) in cases.iter().enumerate() {
        if disagreement(ground, &now, case)?.is_some() {
            return Err(explain(ground, seed, number, &now, case));
        }
        if let Some(connection) = &rules::judge(&now, case).forgets {
            now.standing.remove(connection);
        }
    }
    bail!(
        "batch {seed:#x}: counted {:?} instead of {counted:?}, and no packet alone shows why",
        ground.counters()?
    )
}

/// What is different if this packet alone meets this world; `None` if nothing is.
fn disagreement(ground: &mut Ground, world: &World, case: &Case) -> Result<Option<String>> {
    let expected = rules::judge(world, case);
    ground.become_world(world)?;
    let Ran::Verdict(ran) = ground.run(case)? else {
        return Ok(None);
    };
    let counted = ground.counters()?;
    let counts: BTreeMap<_, _> = expected.counts.iter().map(|c| (c.name(), 1)).collect();
    if ran.agrees(case, &expected) && counted == counts {
        return Ok(None);
    }
    Ok(Some(format!(
        "rules:   {:?}, counting {counts:?}, because {}\nkernel:  {ran:?}, counting {counted:?}",
        expected.verdict, expected.why
    )))
}

/// The smallest packet and world found on which the two disagree, as an error for a person.
fn explain(
    ground: &mut Ground,
    seed: u64,
    number: usize,
    world: &World,
    case: &Case,
) -> anyhow::Error {
    let (mut world, mut case) = (world.clone(), case.clone());
    let mut tries = 0;
    loop {
        let smaller = world.smaller().map(|world| (world, case.clone()));
        let simpler = case.smaller().map(|case| (world.clone(), case));
        let found = smaller.chain(simpler).find(|(world, case)| {
            tries += 1;
            tries < SHRINKING && matches!(disagreement(ground, world, case), Ok(Some(_)))
        });
        match found {
            Some(found) => (world, case) = found,
            None => break,
        }
    }
    let mut text = format!("programs and rules disagree: packet {number} of batch {seed:#x}\n");
    let _ = writeln!(text, "packet:  {case}\nworld:   {world:?}");
    match disagreement(ground, &world, &case) {
        Ok(Some(both)) => text.push_str(&both),
        Ok(None) => text.push_str("alone, after the packets before it, it does not happen again"),
        Err(error) => text.push_str(&format!("{error:#}")),
    }
    anyhow::Error::msg(text)
}

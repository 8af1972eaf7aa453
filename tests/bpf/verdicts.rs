//! Each entry point fed by BPF_PROG_TEST_RUN: what it answers, rewrites and counts.
//!
//! The kernel runs the programs on a frame without socket, on the loopback device of the calling
//! thread's netns. sock_ops has no such run; the tests of probes attach it.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    os::fd::{AsFd, AsRawFd},
};

use anyhow::{Context, Result, ensure};
use aya::programs::{SchedClassifier, SkLookup, TestRun, TestRunOptions};
use nix::libc;
use picomesh_common::{
    Counter, PodConfig, PortRange,
    config::{MESH0_MAC, MESH1_MAC},
};

use crate::{
    Test,
    frames::{ACK, Frame, RST, SYN},
    topology::{CAPTURE_MARK, FAMILIES, OUR_MARK, SLOT, Setup, Topology, active, families, serve},
};

pub(crate) const TESTS: &[Test] = &[
    ("egress_takes_a_syn_with_mark_and_address", egress_takes),
    (
        "egress_passes_what_is_not_tcp_and_what_is_excepted",
        egress_passes,
    ),
    ("egress_refuses_with_a_number", egress_refuses),
    ("ingress_takes_a_syn_with_address_alone", ingress_takes),
    ("ingress_refuses_with_a_number", ingress_refuses),
    ("steer_leaves_other_devices_alone", steer),
];

pub(crate) const PASS: u32 = u32::MAX;
const DROP: u32 = 2;
pub(crate) const REDIRECT: u32 = 7;

fn egress_takes(setup: &Setup) -> Result<()> {
    let (topology, _listeners) = Topology::with_listeners(setup)?;
    for family in families() {
        let frame = Frame::bare(at(family.pod, 40_000), at(family.client, 80), SYN);
        for frame in [frame.clone(), frame.options(8)] {
            let ran = run(&topology, "egress", &frame.bytes(), 0)?;
            ensure!(ran.verdict == REDIRECT, "{ran:?}");
            ensure!(ran.mark == CAPTURE_MARK, "{ran:?}");
            ensure!(ran.frame[..6] == MESH0_MAC, "{ran:?}");
            ensure!(
                ran.frame[6..] == frame.bytes()[6..],
                "more than the address was rewritten"
            );
        }
    }
    ensure!(
        topology.count(Counter::CapturedOutbound)? == 2 * families().count() as u64,
        "{:?}",
        topology.nonzero()?
    );
    Ok(())
}

fn egress_passes(setup: &Setup) -> Result<()> {
    let (topology, _listeners) = Topology::with_listeners(setup)?;
    let mut config = active();
    config.skip_outbound[15] = PortRange {
        first: 443,
        last: 443,
    };
    config.skip_inbound[0] = PortRange {
        first: 9000,
        last: 9001,
    };
    topology.loader.set_pod_config(SLOT, &config)?;
    for family in families() {
        let (pod, client) = (family.pod, family.client);
        let mut udp = Frame::bare(at(pod, 40_000), at(client, 53), 0).bytes();
        udp[if pod.is_ipv4() { 23 } else { 20 }] = 17;
        let mut arp = udp.clone();
        arp[12..14].copy_from_slice(&[0x08, 0x06]);
        let link_local: IpAddr = if pod.is_ipv4() {
            Ipv4Addr::new(169, 254, 169, 254).into()
        } else {
            "fe80::1".parse()?
        };
        for (what, frame) in [
            ("UDP", udp),
            ("ARP", arp),
            (
                "skipped",
                Frame::bare(at(pod, 40_000), at(client, 443), SYN).bytes(),
            ),
            (
                "skipped data",
                Frame::bare(at(pod, 40_000), at(client, 443), ACK)
                    .payload(b"x")
                    .bytes(),
            ),
            (
                "skipped reply",
                Frame::bare(at(pod, 9001), at(client, 5), ACK)
                    .payload(b"x")
                    .bytes(),
            ),
            (
                "link-local",
                Frame::bare(at(pod, 40_000), at(link_local, 80), SYN).bytes(),
            ),
            (
                "the kernel's RST",
                Frame::bare(at(pod, 81), at(client, 40_000), RST | ACK).bytes(),
            ),
        ] {
            let ran = run(&topology, "egress", &frame, 0)?;
            ensure!(ran.verdict == PASS && ran.frame == frame, "{what}: {ran:?}");
        }
    }
    ensure!(topology.nonzero()?.is_empty(), "{:?}", topology.nonzero()?);
    Ok(())
}

fn egress_refuses(setup: &Setup) -> Result<()> {
    let topology = Topology::new(setup)?;
    for family in families() {
        let syn = Frame::bare(at(family.pod, 40_000), at(family.client, 80), SYN);
        let data = Frame::bare(at(family.pod, 40_000), at(family.client, 80), ACK).payload(b"x");
        let [first, later] = data.clone().payload(&[0; 30]).fragments(24);
        let short = short_of_tcp(&syn);
        for (what, frame, mark, counter) in [
            ("no listener", syn.bytes(), 0, Counter::NoOutboundListener),
            (
                "a forged mark",
                syn.bytes(),
                OUR_MARK,
                Counter::NoOutboundListener,
            ),
            ("data of nobody", data.bytes(), 0, Counter::UnknownSender),
            (
                "a tag",
                syn.clone().tagged(2).bytes(),
                0,
                Counter::UnknownEthertype,
            ),
            ("a first fragment", first, 0, Counter::Fragment),
            ("a later fragment", later, 0, Counter::Fragment),
            ("a short header", short, 0, Counter::BadHeader),
        ] {
            refused(&topology, "egress", what, &frame, mark, counter)?;
        }
    }
    let many = Frame::bare(at(FAMILIES[1].pod, 40_000), at(FAMILIES[1].client, 80), SYN);
    let many = many.extensions(9).bytes();
    refused(
        &topology,
        "egress",
        "nine headers",
        &many,
        0,
        Counter::TooManyExtensions,
    )?;
    topology.loader.set_pod_config(SLOT, &PodConfig::EMPTY)?;
    for family in families() {
        let syn = Frame::bare(at(family.pod, 40_000), at(family.client, 80), SYN).bytes();
        refused(
            &topology,
            "egress",
            "an empty slot",
            &syn,
            0,
            Counter::Inactive,
        )?;
    }
    Ok(())
}

fn ingress_takes(setup: &Setup) -> Result<()> {
    let (topology, _listeners) = Topology::with_listeners(setup)?;
    for family in families() {
        let app = serve(&topology.pod, at(family.pod, 80))?;
        let syn = Frame::bare(at(family.client, 40_000), app.local_addr()?, SYN);
        let ran = run(&topology, "ingress", &syn.bytes(), 0)?;
        ensure!(ran.verdict == REDIRECT, "{ran:?}");
        ensure!(ran.mark == 0, "inbound needs no mark: {ran:?}");
        ensure!(ran.frame[..6] == MESH1_MAC, "{ran:?}");
        ensure!(
            ran.frame[6..] == syn.bytes()[6..],
            "more than the address was rewritten"
        );
        // An ACK that nobody owns.
        let ack = Frame::bare(at(family.client, 40_000), app.local_addr()?, ACK);
        let ran = run(&topology, "ingress", &ack.bytes(), 0)?;
        ensure!(ran.verdict == REDIRECT, "{ran:?}");
        // Somebody else's frame, flooded by a bridge.
        let mut flooded = syn.clone();
        flooded.to_mac = [2, 9, 9, 9, 9, 9];
        let ran = run(&topology, "ingress", &flooded.bytes(), 0)?;
        ensure!(ran.verdict == PASS, "{ran:?}");
    }
    ensure!(
        topology.count(Counter::CapturedInbound)? == families().count() as u64,
        "{:?}",
        topology.nonzero()?
    );
    Ok(())
}

fn ingress_refuses(setup: &Setup) -> Result<()> {
    let topology = Topology::new(setup)?;
    for family in families() {
        let app = serve(&topology.pod, at(family.pod, 80))?;
        let syn = Frame::bare(at(family.client, 40_000), app.local_addr()?, SYN);
        let ack = Frame::bare(at(family.client, 40_000), app.local_addr()?, ACK);
        let [first, later] = ack.clone().payload(&[0; 30]).fragments(24);
        for (what, frame, mark, counter) in [
            (
                "a foreign mark",
                syn.bytes(),
                CAPTURE_MARK,
                Counter::ForeignMark,
            ),
            ("no listener", syn.bytes(), 0, Counter::NoInboundListener),
            ("nobody's ACK", ack.bytes(), 0, Counter::NoInboundListener),
            (
                "two tags",
                syn.clone().tagged(2).bytes(),
                0,
                Counter::UnknownEthertype,
            ),
            ("a first fragment", first, 0, Counter::Fragment),
            ("a later fragment", later, 0, Counter::Fragment),
            ("a short header", short_of_tcp(&syn), 0, Counter::BadHeader),
        ] {
            refused(&topology, "ingress", what, &frame, mark, counter)?;
        }
        let closed = Frame::bare(at(family.client, 40_000), at(family.pod, 81), SYN);
        let before = topology.count(Counter::RefusedByKernel)?;
        let ran = run(&topology, "ingress", &closed.bytes(), 0)?;
        ensure!(ran.verdict == PASS, "a port nobody listens on: {ran:?}");
        topology.await_count(Counter::RefusedByKernel, before)?;
    }
    Ok(())
}

/// The run takes no ingress device, so only this is left of it; the tests that attach see where a
/// packet of our devices goes.
fn steer(setup: &Setup) -> Result<()> {
    const SK_PASS: u32 = 1;
    let (topology, _listeners) = Topology::with_listeners(setup)?;
    for family in families() {
        let (verdict, cookie) = look_up(&topology, family.client, family.pod)?;
        ensure!(
            (verdict, cookie) == (SK_PASS, 0),
            "verdict {verdict}, socket {cookie}"
        );
    }
    ensure!(topology.nonzero()?.is_empty(), "{:?}", topology.nonzero()?);
    Ok(())
}

#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) verdict: u32,
    mark: u32,
    pub(crate) frame: Vec<u8>,
}

/// Runs the pod's pinned program on `frame`, with `mark` in its context.
pub(crate) fn run(topology: &Topology, direction: &str, frame: &[u8], mark: u32) -> Result<Ran> {
    const CONTEXT: usize = 192;
    const MARK_AT: usize = 8;
    let pin = topology
        .bpf_dir
        .join(format!("v1/pods/{SLOT}/program-{direction}-14"));
    let program = SchedClassifier::from_pin(&pin).with_context(|| pin.display().to_string())?;
    let mut context = [0u8; CONTEXT];
    context[MARK_AT..MARK_AT + 4].copy_from_slice(&mark.to_ne_bytes());
    let (mut frame_out, mut context_out) = (vec![0u8; frame.len() + 64], [0u8; CONTEXT]);
    let result = topology.pod.enter(|| {
        Ok(program.test_run(TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut frame_out),
            ctx_in: Some(&context),
            ctx_out: Some(&mut context_out),
            ..TestRunOptions::default()
        })?)
    })?;
    frame_out.truncate(result.data_size_out as usize);
    let mark = [8, 9, 10, 11].map(|at| context_out[at]);
    Ok(Ran {
        verdict: result.return_value,
        mark: u32::from_ne_bytes(mark),
        frame: frame_out,
    })
}

fn refused(
    topology: &Topology,
    direction: &str,
    what: &str,
    frame: &[u8],
    mark: u32,
    counter: Counter,
) -> Result<()> {
    let before = topology.count(counter)?;
    let ran = run(topology, direction, frame, mark)?;
    let counted = topology.count(counter)? - before;
    let as_said = if looks_lost(direction, counter) {
        ran.verdict == REDIRECT && ran.frame == frame && ran.mark == mark
    } else {
        ran.verdict == DROP
    };
    ensure!(as_said, "{direction}, {what}: {ran:?}");
    ensure!(
        counted == 1,
        "{direction}, {what}: {} counted {counted}",
        counter.name()
    );
    Ok(())
}

/// What the agent's return mends must not be known to its sender as a drop of this host.
fn looks_lost(direction: &str, counter: Counter) -> bool {
    direction == "egress" && matches!(counter, Counter::NoOutboundListener | Counter::Inactive)
}

/// Verdict of the sk_lookup program, and the cookie of the socket it selects (0 for none).
fn look_up(topology: &Topology, from: IpAddr, to: IpAddr) -> Result<(u32, u64)> {
    /// `struct bpf_sk_lookup`; the first field is what the run answers.
    #[repr(C)]
    #[derive(Default)]
    struct Context {
        cookie: u64,
        family: u32,
        protocol: u32,
        remote_ip4: u32,
        remote_ip6: [u32; 4],
        remote_port: u16,
        _pad: u16,
        local_ip4: u32,
        local_ip6: [u32; 4],
        local_port: u32,
        ingress_ifindex: u32,
        /// Named, because the kernel wants it to be zero and padding is anything.
        _end: u32,
    }
    #[repr(C)]
    #[derive(Default)]
    struct Attr {
        prog_fd: u32,
        retval: u32,
        data_size_in: u32,
        data_size_out: u32,
        data_in: u64,
        data_out: u64,
        repeat: u32,
        duration: u32,
        ctx_size_in: u32,
        ctx_size_out: u32,
        ctx_in: u64,
        ctx_out: u64,
        flags: u32,
        cpu: u32,
        batch_size: u32,
        _pad: u32,
    }
    const BPF_PROG_TEST_RUN: libc::c_long = 10;

    let mut context = Context {
        protocol: 6,
        remote_port: 40_000u16.to_be(),
        local_port: 80,
        ..Context::default()
    };
    let words = |ip: std::net::Ipv6Addr| {
        let bytes = ip.octets();
        [0, 4, 8, 12]
            .map(|i| u32::from_ne_bytes([bytes[i], bytes[i + 1], bytes[i + 2], bytes[i + 3]]))
    };
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            context.family = libc::AF_INET as u32;
            context.remote_ip4 = u32::from_ne_bytes(from.octets());
            context.local_ip4 = u32::from_ne_bytes(to.octets());
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            context.family = libc::AF_INET6 as u32;
            context.remote_ip6 = words(from);
            context.local_ip6 = words(to);
        }
        _mixed => anyhow::bail!("{from} and {to} are of two families"),
    }
    let program = SkLookup::from_pin(
        topology
            .bpf_dir
            .join(format!("v1/pods/{SLOT}/program-steer")),
    )?;
    let mut attr = Attr {
        prog_fd: program.fd()?.as_fd().as_raw_fd().cast_unsigned(),
        ctx_size_in: size_of::<Context>() as u32,
        ctx_size_out: size_of::<Context>() as u32,
        ctx_in: (&raw const context) as u64,
        ctx_out: (&raw mut context) as u64,
        ..Attr::default()
    };
    topology.pod.enter(|| {
        // SAFETY: both contexts are as long as told and live until the call returns.
        let result = unsafe {
            libc::syscall(
                libc::SYS_bpf,
                BPF_PROG_TEST_RUN,
                &raw mut attr,
                size_of::<Attr>(),
            )
        };
        if result < 0 {
            Err(io::Error::last_os_error().into())
        } else {
            Ok(())
        }
    })?;
    Ok((attr.retval, context.cookie))
}

/// Ends within the TCP header.
fn short_of_tcp(frame: &Frame) -> Vec<u8> {
    let ip = if frame.source.is_ipv4() { 20 } else { 40 };
    frame.bytes()[..14 + ip + 8].to_vec()
}

fn at(ip: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(ip, port)
}

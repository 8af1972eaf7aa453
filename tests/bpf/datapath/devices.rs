//! What the datapath puts into a pod's namespace, and takes out again; on real namespaces.

use anyhow::{Result, ensure};
use picomesh::datapath::{
    devices::{self, DeviceOwner, DevicesError, Ensured},
    diag,
};
use picomesh_tests::requirements;

use super::{
    Test,
    world::{Netns, ensure_same},
};

const MARK: u32 = 0x5a_1234;

pub(super) const TESTS: [Test; 7] = [
    ("devices_are_silent_and_accept_what_is_redirected", silent),
    ("what_is_there_already_is_left_alone", idempotent),
    ("each_damage_is_mended_and_named", mended),
    ("removing_leaves_the_namespace_as_it_was", removed),
    ("devices_of_somebody_else_are_refused_and_stay", foreign),
    ("a_pod_without_ipv6_gets_ipv4_alone", without_ipv6),
    (
        "the_applications_connections_are_listed_apart_from_ours",
        listed,
    ),
];

fn owner(on_record: bool) -> DeviceOwner {
    DeviceOwner {
        alias: format!("{}uid-1 /bpf", devices::ALIAS_PREFIX),
        on_record,
    }
}

fn ensure_in(netns: &Netns, on_record: bool) -> Result<Result<Ensured, DevicesError>> {
    netns.run(|| devices::ensure(&owner(on_record), MARK))
}

fn silent() -> Result<()> {
    let pod = Netns::new("silent")?;
    let ensured = ensure_in(&pod, false)??;
    ensure!(
        ensured.ipv6 == requirements::ipv6() && ensured.interfaces.is_empty(),
        "{ensured:?}"
    );
    let links = pod.ip(&["-d", "link"])?;
    for (index, name, mac) in [
        (15001, "mesh0", "02:70:6d:00:00:01"),
        (15006, "mesh1", "02:70:6d:00:00:02"),
    ] {
        let link = pod.ip(&["-d", "link", "show", name])?;
        ensure!(link.starts_with(&format!("{index}: {name}@")), "{link}");
        ensure!(link.contains(mac) && link.contains("mtu 65535"), "{link}");
        ensure!(
            !link.contains("MULTICAST") && link.contains(",UP"),
            "{link}"
        );
        ensure!(link.contains("addrgenmode none") || !ensured.ipv6, "{link}");
        let rp_filter = pod.exec(&["cat", &format!("/proc/sys/net/ipv4/conf/{name}/rp_filter")])?;
        ensure!(rp_filter.trim() == "2", "{name}: rp_filter {rp_filter}");
    }
    ensure!(links.contains("alias picomesh uid-1"), "{links}");
    let accept = pod.exec(&["cat", "/proc/sys/net/ipv4/conf/mesh0/accept_local"])?;
    ensure!(accept.trim() == "1", "accept_local {accept}");
    let families = ["-4", "-6"];
    for family in &families[..1 + usize::from(ensured.ipv6)] {
        let rules = pod.ip(&[family, "rule", "show", "pref", "1"])?;
        ensure!(
            rules.contains("fwmark 0x5a1234") && rules.contains("lookup 15001"),
            "{rules}"
        );
        let routes = pod.ip(&[family, "route", "show", "table", "15001"])?;
        ensure!(routes.starts_with("local default dev lo"), "{routes}");
    }
    // Nothing may be sent on them: no router solicitation, no report, no discovery.
    std::thread::sleep(std::time::Duration::from_millis(1500));
    for name in ["mesh0", "mesh1"] {
        let shown = pod.ip(&["-s", "link", "show", name])?;
        // The last line is what was sent: bytes, packets, errors …
        let sent = shown
            .lines()
            .last()
            .and_then(|line| line.split_whitespace().nth(1));
        ensure!(sent == Some("0"), "{shown}");
    }
    Ok(())
}

fn idempotent() -> Result<()> {
    let pod = Netns::new("idempotent")?;
    let first = ensure_in(&pod, false)??;
    ensure!(first.repaired.contains(&"devices"), "{first:?}");
    let before = pod.picture()?;
    for on_record in [false, true] {
        let again = ensure_in(&pod, on_record)??;
        ensure!(again.repaired.is_empty(), "{again:?}");
    }
    ensure!(pod.picture()? == before);
    Ok(())
}

fn mended() -> Result<()> {
    let pod = Netns::new("mended")?;
    ensure_in(&pod, false)??;
    let good = pod.picture()?;
    let damages: [(&str, &[&[&str]]); 13] = [
        ("device_address", &[&["addr", "flush", "dev", "mesh0"]]),
        ("devices", &[&["link", "del", "mesh0"]]),
        (
            "devices",
            &[
                &["link", "set", "mesh1", "down"],
                &["link", "set", "mesh1", "name", "x"],
            ],
        ),
        ("device_down", &[&["link", "set", "mesh0", "down"]]),
        (
            "device_settings",
            &[&["link", "set", "mesh1", "address", "02:00:00:00:00:99"]],
        ),
        (
            "device_settings",
            &[&["link", "set", "mesh0", "mtu", "1500"]],
        ),
        (
            "device_settings",
            &[&["link", "set", "mesh0", "alias", "nobody"]],
        ),
        (
            "device_settings",
            &[&["link", "set", "mesh0", "addrgenmode", "random"]],
        ),
        ("rule", &[&["-4", "rule", "del", "pref", "1"]]),
        ("rule", &[&["-6", "rule", "del", "pref", "1"]]),
        ("route", &[&["-4", "route", "flush", "table", "15001"]]),
        ("route", &[&["-6", "route", "flush", "table", "15001"]]),
        (
            "route",
            &[&["route", "replace", "blackhole", "default", "table", "15001"]],
        ),
    ];
    for (word, commands) in damages {
        let ipv6 = commands
            .iter()
            .any(|command| command.contains(&"-6") || command.contains(&"addrgenmode"));
        if ipv6 && !requirements::ipv6() {
            continue;
        }
        for command in commands {
            pod.ip(command)?;
        }
        ensure!(pod.picture()? != good, "{commands:?} did no damage");
        let ensured = ensure_in(&pod, true)??;
        ensure!(
            ensured.repaired.contains(&word),
            "{commands:?}: {:?}",
            ensured.repaired
        );
        let after = ensure_in(&pod, true)??;
        ensure!(
            after.repaired.is_empty(),
            "{commands:?}: still {:?}",
            after.repaired
        );
    }
    pod.exec(&[
        "sh",
        "-c",
        "echo 1 > /proc/sys/net/ipv4/conf/mesh0/rp_filter",
    ])?;
    let ensured = ensure_in(&pod, true)??;
    ensure!(ensured.repaired == ["device_settings"], "{ensured:?}");
    // A rule with the mark of an agent that is no more.
    let other = pod.run(|| devices::ensure(&owner(true), MARK + 1))??;
    ensure!(other.repaired.contains(&"stale_rule"), "{other:?}");
    let rules = pod.ip(&["rule", "show", "pref", "1"])?;
    ensure!(
        rules.lines().count() == 1 && rules.contains("0x5a1235"),
        "{rules}"
    );
    Ok(())
}

fn removed() -> Result<()> {
    let pod = Netns::new("removed")?;
    let node = Netns::new("removed-node")?;
    pod.connect_eth0(&node, &["10.99.0.2", "fd99::2"], &["10.99.0.1", "fd99::1"])?;
    // Things that look a little like ours.
    pod.ip(&[
        "rule", "add", "pref", "1", "fwmark", "0x5a1234", "lookup", "77",
    ])?;
    pod.ip(&[
        "route",
        "add",
        "10.98.0.0/24",
        "via",
        "10.99.0.1",
        "table",
        "15001",
    ])?;
    std::thread::sleep(std::time::Duration::from_millis(100));
    let before = pod.picture()?;
    let ensured = ensure_in(&pod, false)??;
    let eth0 = &ensured.interfaces[..];
    ensure!(
        eth0.len() == 1 && eth0[0].name == "eth0" && eth0[0].l2_len == 14,
        "{eth0:?}"
    );
    ensure!(pod.picture()? != before);
    for _ in 0..2 {
        pod.run(|| devices::remove(&owner(false)))??;
        let after = pod.picture()?;
        ensure_same(&before, &after)?;
    }
    Ok(())
}

fn foreign() -> Result<()> {
    let pod = Netns::new("foreign")?;
    pod.ip(&["link", "add", "mesh0", "type", "veth", "peer", "name", "x"])?;
    let before = pod.picture()?;
    let error = ensure_in(&pod, false)?.expect_err("a stranger's device");
    ensure!(
        error.reason() == "device_conflict" && error.to_string().contains("mesh0"),
        "{error}"
    );
    pod.run(|| devices::remove(&owner(false)))??;
    ensure!(pod.picture()? == before);

    let pod = Netns::new("taken")?;
    pod.run(|| {
        let alias = format!("{}uid-2 /other", devices::ALIAS_PREFIX);
        devices::ensure(
            &DeviceOwner {
                alias,
                on_record: false,
            },
            MARK + 1,
        )
    })??;
    let before = pod.picture()?;
    let error = ensure_in(&pod, false)?.expect_err("another agent's pod");
    ensure!(
        error.reason() == "netns_taken" && error.to_string().contains("uid-2"),
        "{error}"
    );
    ensure!(pod.picture()? == before);
    Ok(())
}

fn without_ipv6() -> Result<()> {
    let pod = Netns::new("no-ipv6")?;
    for which in ["all", "default"] {
        let set = format!("echo 1 > /proc/sys/net/ipv6/conf/{which}/disable_ipv6");
        if requirements::ipv6() {
            pod.exec(&["sh", "-c", &set])?;
        }
    }
    let ensured = ensure_in(&pod, false)??;
    ensure!(!ensured.ipv6, "{ensured:?}");
    if requirements::ipv6() {
        ensure!(pod.ip(&["-6", "rule", "show", "pref", "1"])?.is_empty());
    }
    let again = ensure_in(&pod, true)??;
    ensure!(again.repaired.is_empty(), "{again:?}");
    pod.run(|| devices::remove(&owner(false)))??;
    Ok(())
}

fn listed() -> Result<()> {
    use std::net::{SocketAddr, TcpListener, TcpStream};
    crate::topology::needs_ipv6()?;
    let pod = Netns::new("listed")?;
    let node = Netns::new("listed-node")?;
    pod.connect_eth0(&node, &["10.99.0.2", "fd99::2"], &["10.99.0.1", "fd99::1"])?;
    std::thread::sleep(std::time::Duration::from_millis(100));
    let servers: Vec<TcpListener> = ["10.99.0.1:80", "[fd99::1]:80"]
        .into_iter()
        .map(|at| node.run(move || TcpListener::bind(at)))
        .collect::<Result<Vec<_>>>()?
        .into_iter()
        .collect::<std::io::Result<_>>()?;
    let connect =
        |to: SocketAddr| -> Result<TcpStream> { Ok(pod.run(move || TcpStream::connect(to))??) };
    let mut clients = Vec::new();
    for server in &servers {
        clients.push(connect(server.local_addr()?)?);
    }
    // As Java does it: IPv4 by an IPv6 socket.
    clients.push(connect("[::ffff:10.99.0.1]:80".parse()?)?);
    let ours = pod.run(|| -> Result<_> {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
        socket.set_mark(MARK)?;
        socket.connect(&"10.99.0.1:80".parse::<SocketAddr>()?.into())?;
        Ok(socket)
    })??;
    let found = pod.run(|| diag::connections(MARK))??;
    let expected: std::collections::HashSet<_> = clients
        .iter()
        .map(|client| {
            let plain = |at: SocketAddr| SocketAddr::new(at.ip().to_canonical(), at.port());
            Ok((plain(client.local_addr()?), plain(client.peer_addr()?)))
        })
        .collect::<Result<_>>()?;
    ensure!(
        expected.len() == 3 && found.apps == expected,
        "{found:?} instead of {expected:?}"
    );
    let local = ours.local_addr()?.as_socket().expect("an IP socket");
    ensure!(
        found.ours.len() == 1 && found.ours.iter().all(|(at, _)| *at == local),
        "{found:?}"
    );

    let victim = clients.first().expect("a client");
    let pair = (victim.local_addr()?, victim.peer_addr()?);
    let closed = pod.run(|| diag::destroy([&pair]))??;
    ensure!(closed == 1, "closed {closed}");
    let left = pod.run(|| diag::connections(MARK))??;
    ensure!(
        left.apps.len() == 2 && !left.apps.contains(&pair),
        "{left:?}"
    );
    ensure!(
        pod.run(|| diag::destroy([&pair]))?? == 0,
        "what is gone is no error"
    );
    Ok(())
}

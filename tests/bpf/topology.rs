//! One enrolled pod, its node and a client, as network namespaces without names.
//!
//! ```text
//!   client 10.78.1.2 ── 10.78.1.1 node 10.78.2.1 ── 10.78.2.2 eth0 pod
//!          fd78:1::2     fd78:1::1      fd78:2::1     fd78:2::2
//! ```
//!
//! The node routes. A namespace belongs to the threads that entered it and to open descriptors, so
//! all of this is gone with the process, and so are the pins: they lie on a bpffs of this
//! process's own mount namespace.

use std::{
    fmt,
    fs::{self, File},
    io::{self, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    os::fd::{AsFd, AsRawFd},
    path::PathBuf,
    process::{Command, Stdio},
    sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns, unshare},
    unistd::Uid,
};
use picomesh::datapath::loader::{
    Generation, Interface, L2_ETHERNET, Loader, LoaderError, LoaderSettings, PodPrograms,
    SocketMarker,
};
use picomesh_common::{
    Counter, PodConfig,
    config::{
        INBOUND, MESH0_IFINDEX, MESH0_MAC, MESH0_NAME, MESH1_IFINDEX, MESH1_MAC, MESH1_NAME,
        OUTBOUND, ROUTE_TABLE, RULE_PRIORITY, V4, V6, rule,
    },
};
use picomesh_tests::requirements;
use socket2::{Domain, Protocol, Socket, Type};

pub(crate) const OUR_MARK: u32 = 0x7a_31c5;
pub(crate) const CAPTURE_MARK: u32 = 0x3b_9001;
pub(crate) const SLOT: u32 = 3;

pub(crate) const CLIENT_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 78, 1, 2));
pub(crate) const NODE_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 78, 2, 1));
pub(crate) const POD_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 78, 2, 2));
pub(crate) const CLIENT_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd78, 1, 0, 0, 0, 0, 0, 2));
pub(crate) const NODE_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd78, 2, 0, 0, 0, 0, 0, 1));
pub(crate) const POD_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd78, 2, 0, 0, 0, 0, 0, 2));

pub(crate) const POD_MAC: [u8; 6] = [2, 0, 0, 0, 2, 2];
pub(crate) const NODE_MAC: [u8; 6] = [2, 0, 0, 0, 2, 1];

/// Addresses of one family.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Family {
    pub(crate) client: IpAddr,
    pub(crate) node: IpAddr,
    pub(crate) pod: IpAddr,
    pub(crate) index: u32,
}

pub(crate) const FAMILIES: [Family; 2] = [
    Family {
        client: CLIENT_V4,
        node: NODE_V4,
        pod: POD_V4,
        index: V4,
    },
    Family {
        client: CLIENT_V6,
        node: NODE_V6,
        pod: POD_V6,
        index: V6,
    },
];

/// Those that this kernel has: with `ipv6.disable=1` the first alone.
pub(crate) fn families() -> impl Iterator<Item = Family> {
    FAMILIES
        .into_iter()
        .filter(|family| family.index == V4 || requirements::ipv6())
}

/// The error by which a test says what this machine lacks for it; it counts as a skip.
#[derive(Debug)]
pub(crate) struct Unfit(pub(crate) &'static str);

impl fmt::Display for Unfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl std::error::Error for Unfit {}

pub(crate) fn needs_ipv6() -> Result<()> {
    ensure!(requirements::ipv6(), Unfit("this kernel has no IPv6"));
    Ok(())
}

/// Long enough for anything that arrives, short enough for what must not.
pub(crate) const SOON: Duration = Duration::from_secs(10);
pub(crate) const QUIET: Duration = Duration::from_millis(400);

/// How a test attaches.
pub(crate) struct Setup {
    pub(crate) force_clsact: bool,
}

static BPFFS: OnceLock<PathBuf> = OnceLock::new();

/// Once, before there are threads. An error is the reason why nothing can run.
pub(crate) fn prepare() -> Result<()> {
    ensure!(
        Uid::effective().is_root(),
        "needs root: it makes network namespaces"
    );
    unshare(CloneFlags::CLONE_NEWNS).context("unshare(CLONE_NEWNS)")?;
    let none = None::<&str>;
    // Not "/": in a chroot that need not be a mount point. Nothing is mounted but below /sys.
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(none, "/sys", none, private, none).context("making the mounts of /sys private")?;
    let dir = PathBuf::from("/sys/fs/bpf");
    mount(Some("bpf"), &dir, Some("bpf"), MsFlags::empty(), none)
        .context("mounting a bpffs: the kernel needs CONFIG_BPF_SYSCALL")?;
    let settings = settings(dir.join("probe"), false, rule::ALL);
    match Loader::new(settings).and_then(Loader::remove_everything) {
        Ok(()) => {}
        Err(error @ LoaderError::NoObject) => bail!(error),
        // Not a reason to skip: the tests are there to show it.
        Err(_error) => {}
    }
    BPFFS.set(dir).ok();
    Ok(())
}

fn settings(bpf_dir: PathBuf, force_clsact: bool, rules: u32) -> LoaderSettings {
    LoaderSettings {
        bpf_dir,
        our_mark: OUR_MARK,
        capture_mark: CAPTURE_MARK,
        node_netns_cookie: 0,
        rules,
        force_clsact,
        generation: Generation::default(),
    }
}

/// All rules but those that the environment names.
pub(crate) fn rules() -> Result<u32> {
    let mut rules = rule::ALL;
    let off = std::env::var("PICOMESH_TEST_RULES_OFF").unwrap_or_default();
    for name in off.split(',').filter(|name| !name.is_empty()) {
        let Some((bit, ..)) = rule::NAMES.iter().find(|(_, known, _)| *known == name) else {
            bail!("PICOMESH_TEST_RULES_OFF={off}: no rule is called {name:?}");
        };
        rules &= !bit;
    }
    Ok(rules)
}

/// A network namespace that lives as long as this.
pub(crate) struct Netns(File);

impl Netns {
    fn new() -> Result<Self> {
        std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).context("unshare(CLONE_NEWNET)")?;
            let file = File::open("/proc/thread-self/ns/net")?;
            // Nobody else is on these links, so nobody's address can be a duplicate.
            for scope in ["all", "default"] {
                if requirements::ipv6() {
                    fs::write(format!("/proc/sys/net/ipv6/conf/{scope}/accept_dad"), "0")?;
                }
            }
            run("ip link set lo up")?;
            Ok(Self(file))
        })
        .join()
        .map_err(|_panic| anyhow::anyhow!("the thread that makes a netns panicked"))?
    }

    /// Runs `act` on a thread inside; its sockets stay there.
    pub(crate) fn enter<T: Send>(&self, act: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        std::thread::scope(|scope| {
            scope
                .spawn(|| {
                    setns(self.0.as_fd(), CloneFlags::CLONE_NEWNET).context("setns")?;
                    act()
                })
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// One command a line; without IPv6 what is about it alone is left out. Neighbours among the
    /// lines that are `ip`'s are one process: where programs start slowly it shows.
    pub(crate) fn run(&self, commands: &str) -> Result<()> {
        let commands: Vec<&str> = commands
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty())
            .filter(|line| requirements::ipv6() || !about_ipv6(line))
            .collect();
        self.enter(|| {
            commands
                .chunk_by(|one, next| family_of(one).is_some() && family_of(one) == family_of(next))
                .try_for_each(|chunk| match family_of(chunk[0]) {
                    Some(option) => batch(option, chunk),
                    None => chunk.iter().try_for_each(|command| run(command)),
                })
        })
    }

    pub(crate) fn fd(&self) -> &File {
        &self.0
    }
}

/// The option of `ip` that a command of it begins with, if it is one that a batch can hold.
fn family_of(command: &str) -> Option<&'static str> {
    if command.starts_with("ip -6 ") {
        Some("-6")
    } else if command.starts_with("ip -") {
        None
    } else if command.starts_with("ip ") {
        Some("")
    } else {
        None
    }
}

/// Commands of `ip` that share an option, as one process.
fn batch(option: &str, commands: &[&str]) -> Result<()> {
    let script: String = commands
        .iter()
        .map(|command| command.trim_start_matches("ip ").trim_start_matches("-6 "))
        .flat_map(|command| [command, "\n"])
        .collect();
    let mut ip = Command::new("ip")
        .args(
            [option, "-batch", "-"]
                .iter()
                .filter(|word| !word.is_empty()),
        )
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("start ip")?;
    if let Some(mut stdin) = ip.stdin.take() {
        stdin.write_all(script.as_bytes())?;
    }
    let output = ip.wait_with_output()?;
    ensure!(
        output.status.success(),
        "{}: {}",
        commands.join("; "),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}

fn about_ipv6(command: &str) -> bool {
    command.contains("::") || command.contains(" -6 ") || command.contains("addrgenmode")
}

fn run(command: &str) -> Result<()> {
    let mut words = command.split_whitespace();
    let program = words.next().context("an empty command")?;
    let output = Command::new(program)
        .args(words)
        .output()
        .with_context(|| command.to_owned())?;
    if !output.status.success() {
        bail!(
            "{command}: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}

/// The three namespaces, and the pod enrolled with the kernel half and nothing else.
pub(crate) struct Topology {
    pub(crate) client: Netns,
    pub(crate) node: Netns,
    pub(crate) pod: Netns,
    pub(crate) loader: Loader,
    pub(crate) marker: SocketMarker,
    pub(crate) interfaces: Vec<Interface>,
    pub(crate) bpf_dir: PathBuf,
    pub(crate) setup_settings: LoaderSettings,
}

impl Topology {
    /// An enrolled pod: configuration, devices and programs, but no listener yet.
    pub(crate) fn new(setup: &Setup) -> Result<Self> {
        let topology = Self::unattached(setup)?;
        topology.loader.set_pod_config(SLOT, &active())?;
        topology.attach()?;
        Ok(topology)
    }

    /// The same with the four listeners.
    pub(crate) fn with_listeners(setup: &Setup) -> Result<(Self, Listeners)> {
        let topology = Self::new(setup)?;
        let listeners = topology.listen_as_proxy()?;
        Ok((topology, listeners))
    }

    /// Namespaces and maps, and no program anywhere.
    pub(crate) fn unattached(setup: &Setup) -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let bpffs = BPFFS.get().context("not prepared")?;
        let bpf_dir = bpffs.join(NEXT.fetch_add(1, Ordering::Relaxed).to_string());

        let (client, node, pod) = (Netns::new()?, Netns::new()?, Netns::new()?);
        link(&node, "toclient", None, &client, None)?;
        link(&node, "topod", Some(NODE_MAC), &pod, Some(POD_MAC))?;
        node.run(
            "ip addr add 10.78.1.1/24 dev toclient
             ip addr add 10.78.2.1/24 dev topod
             ip addr add fd78:1::1/64 dev toclient nodad
             ip addr add fd78:2::1/64 dev topod nodad",
        )?;
        node.enter(|| {
            fs::write("/proc/sys/net/ipv4/ip_forward", "1")?;
            if requirements::ipv6() {
                fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1")?;
            }
            Ok(())
        })?;
        for (netns, net) in [(&client, 1), (&pod, 2)] {
            netns.run(&format!(
                "ip addr add 10.78.{net}.2/24 dev eth0
                 ip addr add fd78:{net}::2/64 dev eth0 nodad
                 ip route add default via 10.78.{net}.1
                 ip -6 route add default via fd78:{net}::1"
            ))?;
        }
        add_mesh_devices(&pod)?;
        // Neighbours find each other before a test counts or times anything.
        for family in families() {
            let closed = SocketAddr::new(family.client, 9);
            let deadline = Instant::now() + 2 * SOON;
            while attempt(&pod, closed, QUIET)? != Some(io::ErrorKind::ConnectionRefused) {
                ensure!(
                    Instant::now() < deadline,
                    "the client is not reached at {closed}"
                );
            }
        }

        let cookie = node.enter(|| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
            Ok(socket.cookie_of_netns()?)
        })?;
        let setup_settings = LoaderSettings {
            node_netns_cookie: cookie,
            ..settings(bpf_dir.clone(), setup.force_clsact, rules()?)
        };
        let loader = Loader::new(setup_settings.clone())?;
        let marker = loader.marker()?;
        let interfaces = pod.enter(|| {
            let index = nix::net::if_::if_nametoindex("eth0")?;
            Ok(vec![Interface {
                name: "eth0".to_owned(),
                index,
                l2_len: L2_ETHERNET,
            }])
        })?;
        Ok(Self {
            client,
            node,
            pod,
            loader,
            marker,
            interfaces,
            bpf_dir,
            setup_settings,
        })
    }

    pub(crate) fn attach(&self) -> Result<PodPrograms> {
        let mut programs = self.loader.load_pod(SLOT, &self.interfaces)?;
        self.pod
            .enter(|| Ok(self.loader.attach(&mut programs, self.pod.fd().as_fd())?))?;
        Ok(programs)
    }

    /// Claims local addresses for probes and starts listening to the node's sockets.
    pub(crate) fn watch_probes(&self) -> Result<()> {
        for family in families() {
            self.loader.insert_local(family.pod.into(), SLOT)?;
        }
        Ok(self.loader.attach_host_sockets()?)
    }

    /// The proxy's listeners, as the agent makes them: on loopback, found by sk_lookup alone.
    pub(crate) fn listen_as_proxy(&self) -> Result<Listeners> {
        let make = |direction, family| -> Result<TcpListener> {
            let listener = self.pod.enter(|| {
                let socket = self.proxy_socket(family)?;
                let address: SocketAddr = if family == V4 {
                    (Ipv4Addr::LOCALHOST, 0).into()
                } else {
                    (Ipv6Addr::LOCALHOST, 0).into()
                };
                socket.bind(&address.into())?;
                socket.listen(64)?;
                Ok(TcpListener::from(socket))
            })?;
            self.loader
                .set_listener(SLOT, direction, family, &listener)?;
            Ok(listener)
        };
        let all = |direction| -> Result<Vec<TcpListener>> {
            families()
                .map(|family| make(direction, family.index))
                .collect()
        };
        Ok(Listeners {
            outbound: all(OUTBOUND)?,
            inbound: all(INBOUND)?,
        })
    }

    /// A socket of ours in the pod, as the agent makes them. Call inside the pod.
    pub(crate) fn proxy_socket(&self, family: u32) -> Result<Socket> {
        let domain = if family == V4 {
            Domain::IPV4
        } else {
            Domain::IPV6
        };
        let socket = Socket::new(domain, Type::STREAM, Some(Protocol::TCP))?;
        if family == V4 {
            socket.set_ip_transparent_v4(true)?;
        } else {
            socket.set_ip_transparent_v6(true)?;
            socket.set_only_v6(true)?;
        }
        socket.set_mark(OUR_MARK)?;
        self.marker.claim(socket.as_fd())?;
        Ok(socket)
    }

    /// From the proxy to the pod's own application, with a client's address.
    pub(crate) fn connect_as_client(
        &self,
        client: SocketAddr,
        to: SocketAddr,
    ) -> Result<TcpStream> {
        self.pod.enter(|| {
            let socket = self.proxy_socket(if to.is_ipv4() { V4 } else { V6 })?;
            socket.bind(&client.into())?;
            socket.connect_timeout(&to.into(), SOON)?;
            Ok(socket.into())
        })
    }

    /// The agent dies: its listeners are gone. They leave the map by hand, because a closed one
    /// lives on for as long as a process that is just being started by another test has it.
    pub(crate) fn stop_listening(&self, listeners: Listeners) -> Result<()> {
        for direction in [OUTBOUND, INBOUND] {
            for family in [V4, V6] {
                self.loader.clear_listener(SLOT, direction, family)?;
            }
        }
        drop(listeners);
        Ok(())
    }

    pub(crate) fn count(&self, counter: Counter) -> Result<u64> {
        let counters = self.loader.counters(SLOT)?;
        Ok(counters
            .iter()
            .find(|(known, _)| *known == counter)
            .map_or(0, |(_, count)| *count))
    }

    /// Waits for a counter to pass what it was.
    pub(crate) fn await_count(&self, counter: Counter, more_than: u64) -> Result<()> {
        let deadline = Instant::now() + SOON;
        while self.count(counter)? <= more_than {
            ensure!(
                Instant::now() < deadline,
                "{} stays at {more_than}; counted: {:?}",
                counter.name(),
                self.nonzero()?
            );
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    pub(crate) fn nonzero(&self) -> Result<Vec<(&'static str, u64)>> {
        let counters = self.loader.counters(SLOT)?;
        Ok(counters
            .iter()
            .filter(|(_, n)| *n > 0)
            .map(|(c, n)| (c.name(), *n))
            .collect())
    }
}

impl Drop for Topology {
    /// What the kernel half counted, for whoever looks for the cause of a failure.
    fn drop(&mut self) {
        if std::env::var_os("PICOMESH_TEST_VERBOSE").is_some() {
            eprintln!("{}: {:?}", self.bpf_dir.display(), self.nonzero());
            let dump = "ip -s link\nip rule\nip route show table all\nnstat -az\nss -tanie";
            for command in dump.lines() {
                let said = self.pod.enter(|| {
                    let mut words = command.split(' ');
                    Ok(Command::new(words.next().unwrap_or_default())
                        .args(words)
                        .output()?)
                });
                if let Ok(said) = said {
                    eprintln!("{command}\n{}", String::from_utf8_lossy(&said.stdout));
                }
            }
        }
    }
}

/// By family: IPv4 first.
pub(crate) struct Listeners {
    pub(crate) outbound: Vec<TcpListener>,
    pub(crate) inbound: Vec<TcpListener>,
}

/// A captured pod with no exceptions.
pub(crate) fn active() -> PodConfig {
    PodConfig {
        flags: PodConfig::ACTIVE,
        ..PodConfig::EMPTY
    }
}

/// An application that listens in `netns`.
pub(crate) fn serve(netns: &Netns, at: SocketAddr) -> Result<TcpListener> {
    netns.enter(|| TcpListener::bind(at).with_context(|| format!("bind {at}")))
}

pub(crate) fn dial(netns: &Netns, to: SocketAddr) -> Result<TcpStream> {
    netns.enter(|| Ok(TcpStream::connect_timeout(&to, SOON)?))
}

/// The same from a given address and port.
pub(crate) fn dial_from(netns: &Netns, from: SocketAddr, to: SocketAddr) -> Result<TcpStream> {
    netns.enter(|| {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?;
        socket.set_reuse_address(true)?;
        socket.bind(&from.into())?;
        socket.connect_timeout(&to.into(), SOON)?;
        Ok(socket.into())
    })
}

/// How a connection attempt of `netns` ends: the kind of its error, or that it stood.
pub(crate) fn attempt(
    netns: &Netns,
    to: SocketAddr,
    patience: Duration,
) -> Result<Option<io::ErrorKind>> {
    netns.enter(|| match TcpStream::connect_timeout(&to, patience) {
        Ok(_stream) => Ok(None),
        Err(error) => Ok(Some(error.kind())),
    })
}

/// The next connection of a listener, or an error after a while.
pub(crate) fn accept(listener: &TcpListener) -> Result<(TcpStream, SocketAddr)> {
    accept_within(listener, SOON)?.context("nobody connected")
}

pub(crate) fn accept_within(
    listener: &TcpListener,
    patience: Duration,
) -> Result<Option<(TcpStream, SocketAddr)>> {
    listener.set_nonblocking(true)?;
    let deadline = Instant::now() + patience;
    loop {
        match listener.accept() {
            Ok((stream, peer)) => {
                stream.set_nonblocking(false)?;
                stream.set_read_timeout(Some(SOON))?;
                return Ok(Some((stream, peer)));
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if Instant::now() >= deadline {
                    return Ok(None);
                }
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(error) => return Err(error.into()),
        }
    }
}

fn link(
    near: &Netns,
    near_name: &str,
    near_mac: Option<[u8; 6]>,
    far: &Netns,
    far_mac: Option<[u8; 6]>,
) -> Result<()> {
    let mac =
        |mac: Option<[u8; 6]>| mac.map_or(String::new(), |mac| format!("address {}", text(mac)));
    let there = format!("/proc/{}/fd/{}", std::process::id(), near.fd().as_raw_fd());
    far.run(&format!(
        "ip link add eth0 {} type veth peer name {near_name} {} netns {there}
         ip link set eth0 up",
        mac(far_mac),
        mac(near_mac)
    ))?;
    near.run(&format!("ip link set {near_name} up"))
}

fn text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// What the agent's room of devices makes in every pod. The addresses are for the loose source
/// check alone, which fails on a device without any.
fn add_mesh_devices(pod: &Netns) -> Result<()> {
    pod.run(&format!(
        "ip link add {MESH0_NAME} index {MESH0_IFINDEX} address {} type veth peer name {MESH1_NAME} index {MESH1_IFINDEX} address {}
         ip link set {MESH0_NAME} addrgenmode none
         ip link set {MESH1_NAME} addrgenmode none
         ip addr add 169.254.69.1/32 dev {MESH0_NAME} scope link
         ip addr add 169.254.69.2/32 dev {MESH1_NAME} scope link
         ip link set {MESH0_NAME} mtu 65535 up
         ip link set {MESH1_NAME} mtu 65535 up
         ip rule add pref {RULE_PRIORITY} fwmark {CAPTURE_MARK}/0xffffffff lookup {ROUTE_TABLE}
         ip -6 rule add pref {RULE_PRIORITY} fwmark {CAPTURE_MARK}/0xffffffff lookup {ROUTE_TABLE}
         ip route add local default dev lo table {ROUTE_TABLE}
         ip -6 route add local default dev lo table {ROUTE_TABLE}",
        text(MESH0_MAC),
        text(MESH1_MAC),
    ))?;
    pod.enter(|| {
        for device in [MESH0_NAME, MESH1_NAME] {
            fs::write(format!("/proc/sys/net/ipv4/conf/{device}/rp_filter"), "2")?;
        }
        fs::write(
            format!("/proc/sys/net/ipv4/conf/{MESH0_NAME}/accept_local"),
            "1",
        )?;
        Ok(())
    })
}

trait NetnsCookie {
    fn cookie_of_netns(&self) -> io::Result<u64>;
}

impl NetnsCookie for Socket {
    fn cookie_of_netns(&self) -> io::Result<u64> {
        const SO_NETNS_COOKIE: i32 = 71;
        let mut cookie = 0u64;
        let mut length = size_of::<u64>() as nix::libc::socklen_t;
        // SAFETY: the kernel writes eight bytes to `cookie`.
        let result = unsafe {
            nix::libc::getsockopt(
                self.as_raw_fd(),
                nix::libc::SOL_SOCKET,
                SO_NETNS_COOKIE,
                (&raw mut cookie).cast(),
                &raw mut length,
            )
        };
        if result == 0 {
            Ok(cookie)
        } else {
            Err(io::Error::last_os_error())
        }
    }
}

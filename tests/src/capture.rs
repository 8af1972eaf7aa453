//! What passes on a wire: a packet socket in a namespace, searched for markers while it runs.
//!
//! A search that finds nothing proves nothing by itself, so every use has a control: the same
//! marker, the same capture, the mesh off, and a count above zero. A capture that lost packets is
//! an error when it is read.

use std::{
    fs::File,
    io::{self, Write},
    os::fd::AsRawFd,
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread::JoinHandle,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, bail};
use nix::libc;
use socket2::{Domain, Protocol, Socket, Type};

use crate::{Netns, raw::Tcp};

/// Bytes of packets that are kept for [`Capture::packets`] and pcap files; searching goes on
/// beyond it.
const KEPT_BYTES: usize = 64 * 1024 * 1024;

/// A running capture.
#[derive(Debug)]
pub struct Capture {
    markers: Vec<Vec<u8>>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    seen: Mutex<Seen>,
}

/// What a capture has seen.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Packets in all.
    pub packets: u64,
    /// Packets that contained each marker, in the order given.
    pub found: Vec<u64>,
    /// The kernel had to drop packets before they were read.
    pub lost: u64,
    kept: Vec<Packet>,
    kept_bytes: usize,
}

/// One packet with its Ethernet header.
#[derive(Clone, Debug)]
pub struct Packet {
    pub at: SystemTime,
    pub bytes: Vec<u8>,
}

impl Capture {
    /// Records on `interface`, or on all interfaces of the namespace (a packet that is forwarded
    /// counts on each).
    pub fn start(netns: &Netns, interface: Option<&str>, markers: &[&[u8]]) -> Result<Self> {
        let markers: Vec<Vec<u8>> = markers.iter().map(|m| m.to_vec()).collect();
        let shared = Arc::new(Shared::default());
        shared.seen().found = vec![0; markers.len()];
        let (ready, opened) = mpsc::sync_channel(1);
        let (interface, sought, out) = (
            interface.map(str::to_owned),
            markers.clone(),
            shared.clone(),
        );
        let thread = netns.spawn("capture", move || match open(interface.as_deref()) {
            Ok(socket) => {
                let _ = ready.send(Ok(()));
                record(&socket, &sought, &out);
            }
            Err(e) => {
                let _ = ready.send(Err(e));
            }
        })?;
        opened
            .recv()
            .context("the capture's thread is gone")?
            .with_context(|| format!("capture in {}", netns.name()))?;
        Ok(Self {
            markers,
            shared,
            thread: Some(thread),
        })
    }

    /// Packets so far that contained the marker `index`.
    pub fn found(&self, index: usize) -> u64 {
        self.shared.seen().found.get(index).copied().unwrap_or(0)
    }

    /// Everything so far.
    pub fn snapshot(&self) -> Seen {
        self.shared.seen().clone()
    }

    /// Ends the capture, after what is on its way has arrived.
    pub fn stop(mut self) -> Result<Seen> {
        std::thread::sleep(Duration::from_millis(100));
        self.end();
        let seen = self.shared.seen().clone();
        if seen.lost > 0 {
            bail!("the capture lost {} packets: it proves nothing", seen.lost);
        }
        Ok(seen)
    }

    /// Waits until the marker `index` was seen: for controls.
    pub fn wait_found(&self, index: usize, deadline: Duration) -> Result<u64> {
        let start = Instant::now();
        loop {
            match self.found(index) {
                0 if start.elapsed() > deadline => bail!(
                    "marker {:?} was not seen in {} packets",
                    String::from_utf8_lossy(&self.markers[index]),
                    self.shared.seen().packets
                ),
                0 => std::thread::sleep(Duration::from_millis(5)),
                n => return Ok(n),
            }
        }
    }

    fn end(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.end();
    }
}

impl Seen {
    pub fn packets(&self) -> &[Packet] {
        &self.kept
    }

    /// The kept packets that are TCP, parsed.
    pub fn tcp(&self) -> impl Iterator<Item = Tcp<'_>> {
        self.kept.iter().filter_map(|p| Tcp::parse(&p.bytes))
    }

    /// Bytes of TCP payload between any two addresses on any port but `tunnel`.
    pub fn plain_payload(&self, tunnel: u16) -> usize {
        self.tcp()
            .filter(|t| t.src.port() != tunnel && t.dst.port() != tunnel)
            .map(|t| t.payload.len())
            .sum()
    }

    /// For a person with tcpdump or wireshark.
    pub fn write_pcap(&self, path: &Path) -> Result<()> {
        let mut file = io::BufWriter::new(
            File::create(path).with_context(|| format!("create {}", path.display()))?,
        );
        // Magic, version 2.4, no zone, no accuracy, snap length, Ethernet.
        for word in [0xa1b2_c3d4_u32, 4 << 16 | 2, 0, 0, 262_144, 1] {
            file.write_all(&word.to_le_bytes())?;
        }
        for packet in &self.kept {
            let at = packet.at.duration_since(UNIX_EPOCH).unwrap_or_default();
            let length = packet.bytes.len() as u32;
            for word in [at.as_secs() as u32, at.subsec_micros(), length, length] {
                file.write_all(&word.to_le_bytes())?;
            }
            file.write_all(&packet.bytes)?;
        }
        file.flush().context("write the pcap file")
    }
}

impl Shared {
    fn seen(&self) -> std::sync::MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A packet socket for everything, in both directions.
fn open(interface: Option<&str>) -> Result<Socket> {
    let protocol = Protocol::from(i32::from((libc::ETH_P_ALL as u16).to_be()));
    let socket = Socket::new(Domain::PACKET, Type::RAW, Some(protocol))
        .context("open a packet socket (needs root)")?;
    // SO_RCVBUFFORCE: the default would lose packets under load.
    let bytes: libc::c_int = 64 * 1024 * 1024;
    nix::sys::socket::setsockopt(
        &socket,
        nix::sys::socket::sockopt::RcvBufForce,
        &(bytes as usize),
    )?;
    socket.set_read_timeout(Some(Duration::from_millis(20)))?;
    if let Some(interface) = interface {
        crate::raw::bind(&socket, interface)?;
    }
    Ok(socket)
}

fn record(socket: &Socket, markers: &[Vec<u8>], out: &Shared) {
    let mut buffer = vec![0_u8; 256 * 1024];
    let mut until = None;
    loop {
        // After the stop everything that was already received is still read.
        if out.stop.load(Ordering::Relaxed) && until.is_none() {
            until = Some(Instant::now() + Duration::from_millis(200));
        }
        match io::Read::read(&mut &*socket, &mut buffer) {
            Ok(n) => {
                let bytes = &buffer[..n];
                let mut seen = out.seen();
                seen.packets += 1;
                for (i, marker) in markers.iter().enumerate() {
                    if contains(bytes, marker) {
                        seen.found[i] += 1;
                    }
                }
                if seen.kept_bytes + n <= KEPT_BYTES {
                    seen.kept_bytes += n;
                    seen.kept.push(Packet {
                        at: SystemTime::now(),
                        bytes: bytes.to_vec(),
                    });
                }
            }
            Err(_) if until.is_some() => break,
            Err(_) => {}
        }
        if until.is_some_and(|t| Instant::now() > t) {
            break;
        }
    }
    out.seen().lost = lost(socket);
}

/// PACKET_STATISTICS: what did not fit into the socket's buffer.
fn lost(socket: &Socket) -> u64 {
    let mut stats = libc::tpacket_stats {
        tp_packets: 0,
        tp_drops: 0,
    };
    let mut length = size_of::<libc::tpacket_stats>() as libc::socklen_t;
    // SAFETY: the pointer and the length describe `stats`, which outlives the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_STATISTICS,
            (&raw mut stats).cast(),
            &mut length,
        )
    };
    if result == 0 {
        u64::from(stats.tp_drops)
    } else {
        u64::MAX
    }
}

/// A search that skips fast to the marker's first byte.
fn contains(bytes: &[u8], marker: &[u8]) -> bool {
    let Some((first, rest)) = marker.split_first() else {
        return false;
    };
    let mut from = 0;
    while let Some(at) = bytes[from..].iter().position(|b| b == first) {
        let after = from + at + 1;
        if bytes[after..].starts_with(rest) {
            return true;
        }
        from = after;
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markers_are_found_at_the_start_middle_and_end() {
        assert!(contains(b"marker", b"marker"));
        assert!(contains(b"xxmmarkerxx", b"marker"));
        assert!(contains(b"xxmarker", b"marker"));
        assert!(!contains(b"marke", b"marker"));
        assert!(!contains(b"marke r", b"marker"));
        assert!(!contains(b"anything", b""));
    }
}

//! One line per finished connection, written off the data path.
//!
//! The proxy hands over a [`Record`] when a connection ends, and never waits: a queue of bounded
//! length takes it, a thread of its own renders and writes it. What does not fit is dropped and
//! counted. The writer is woken when it sleeps and then gathers for a moment, so that ten thousand
//! connections a second cost some fifty wake-ups and as many writes, not ten thousand.
//!
//! Fields and words are ztunnel's, so that what people have built on its log works on ours.
#![forbid(unsafe_code)]

use std::{
    fmt::Write as _,
    io::{self, Write},
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant, SystemTime},
};

use parking_lot::{Condvar, Mutex};
use time::OffsetDateTime;

use crate::{
    metrics::Direction,
    state::{Identity, ObjectKey, Workload},
};

/// ztunnel's fields.
#[derive(Debug)]
pub struct Record {
    pub direction: Direction,
    pub src_addr: SocketAddr,
    pub src_workload: Option<Arc<Workload>>,
    /// Only if proven by mTLS or the netns.
    pub src_identity: Option<Identity>,
    /// Where it was led: the tunnel's far end, or the endpoint; what was dialled if it got no
    /// further.
    pub dst_addr: SocketAddr,
    /// The target that the tunnel was asked for.
    pub dst_hbone_addr: Option<SocketAddr>,
    pub dst_service: Option<ObjectKey>,
    pub dst_workload: Option<Arc<Workload>>,
    pub dst_identity: Option<Identity>,
    /// As the pod of this node sees it: what it sent, and what it got.
    pub bytes_sent: u64,
    pub bytes_recv: u64,
    pub duration: Duration,
    /// A sentence; with a fixed word in front, e.g. `policy: unauthenticated …`.
    pub error: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Text,
    Json,
}

/// How lines are written.
#[derive(Clone, Debug)]
pub struct Style {
    pub format: Format,
    /// Services are shown by their DNS names.
    pub cluster_domain: Arc<str>,
}

/// Records that wait at most; some 4 MB.
const QUEUE: usize = 8_192;

/// How long the writer gathers after it was woken.
const GATHER: Duration = Duration::from_millis(20);

/// Sends records to the writer; never waits. What does not fit is counted and dropped.
#[derive(Clone)]
pub struct AccessLog {
    /// `None`: the log is off.
    queue: Option<Arc<Queue>>,
}

struct Queue {
    state: Mutex<State>,
    /// Somebody waits for the writer: to work, or to have worked.
    wake: Condvar,
    done: Condvar,
    dropped: AtomicU64,
    capacity: usize,
    gather: Duration,
}

#[derive(Default)]
struct State {
    records: Vec<(SystemTime, Record)>,
    /// The writer waits on `wake`.
    asleep: bool,
    /// Batches handed to the writer and not written yet: 0 or 1.
    writing: bool,
    /// No more records; the writer ends when it has written what is there.
    closed: bool,
}

impl AccessLog {
    /// Starts the writer. It ends when the last handle is gone, or the output breaks.
    pub fn start(style: Style, output: impl Write + Send + 'static) -> io::Result<Self> {
        Self::with(style, output, QUEUE, GATHER)
    }

    /// Takes records and forgets them.
    pub fn off() -> Self {
        Self { queue: None }
    }

    pub fn record(&self, record: Record) {
        let Some(queue) = &self.queue else { return };
        let now = SystemTime::now();
        let mut state = queue.state.lock();
        if state.closed || state.records.len() >= queue.capacity {
            drop(state);
            queue.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        state.records.push((now, record));
        if std::mem::take(&mut state.asleep) {
            drop(state);
            queue.wake.notify_one();
        }
    }

    /// Records that did not fit, or came after the output broke.
    pub fn dropped(&self) -> u64 {
        let dropped = |queue: &Arc<Queue>| queue.dropped.load(Ordering::Relaxed);
        self.queue.as_ref().map_or(0, dropped)
    }

    /// Waits until what was recorded so far is written, at most for `patience`. For the end of the
    /// process; blocks.
    pub fn flush(&self, patience: Duration) {
        let Some(queue) = &self.queue else { return };
        let deadline = Instant::now() + patience;
        let mut state = queue.state.lock();
        while !state.closed && (state.writing || !state.records.is_empty()) {
            if queue.done.wait_until(&mut state, deadline).timed_out() {
                return;
            }
        }
    }

    fn with(
        style: Style,
        output: impl Write + Send + 'static,
        capacity: usize,
        gather: Duration,
    ) -> io::Result<Self> {
        let queue = Arc::new(Queue {
            state: Mutex::default(),
            wake: Condvar::new(),
            done: Condvar::new(),
            dropped: AtomicU64::new(0),
            capacity,
            gather,
        });
        let writers = queue.clone();
        thread::Builder::new()
            .name("access-log".into())
            .spawn(move || writers.write(&style, output))?;
        Ok(Self { queue: Some(queue) })
    }
}

impl Queue {
    fn write(self: Arc<Self>, style: &Style, mut output: impl Write) {
        let mut text = String::new();
        while let Some(batch) = self.next_batch() {
            text.clear();
            for (at, record) in &batch {
                match style.format {
                    Format::Text => render_text(&mut text, *at, record, &style.cluster_domain),
                    Format::Json => render_json(&mut text, *at, record, &style.cluster_domain),
                }
                text.push('\n');
            }
            let written = output
                .write_all(text.as_bytes())
                .and_then(|()| output.flush());
            if let Err(error) = written {
                self.broken(batch.len(), &error);
                return;
            }
            // A burst's buffers are given back.
            text.shrink_to(64 * 1024);
        }
    }

    /// Sleeps until there is something to write; `None` when nobody is left who could record.
    fn next_batch(self: &Arc<Self>) -> Option<Vec<(SystemTime, Record)>> {
        let mut state = self.state.lock();
        state.writing = false;
        self.done.notify_all();
        while state.records.is_empty() {
            if Arc::strong_count(self) == 1 {
                return None;
            }
            state.asleep = true;
            self.wake.wait_for(&mut state, Duration::from_secs(5));
        }
        state.asleep = false;
        drop(state);
        thread::sleep(self.gather);
        let mut state = self.state.lock();
        state.writing = true;
        Some(std::mem::take(&mut state.records))
    }

    fn broken(&self, lost: usize, error: &io::Error) {
        let mut state = self.state.lock();
        state.closed = true;
        let waiting = std::mem::take(&mut state.records).len();
        self.dropped
            .fetch_add((lost + waiting) as u64, Ordering::Relaxed);
        drop(state);
        self.done.notify_all();
        tracing::warn!(%error, "the access log's output broke; connections are no longer logged");
    }
}

/// Level and message: ztunnel tells a connection that never came to be from one that ended.
fn headline(record: &Record) -> (&'static str, &'static str) {
    match &record.error {
        None => ("info", "connection complete"),
        Some(_) if record.bytes_sent == 0 && record.bytes_recv == 0 => {
            ("warn", "connection failed")
        }
        Some(_) => ("error", "connection complete"),
    }
}

fn render_text(text: &mut String, at: SystemTime, record: &Record, cluster_domain: &str) {
    let (level, message) = headline(record);
    let _ = write!(text, "{}\t{level}\taccess\t{message}", timestamp(at));
    fields(record, cluster_domain, |name, value| {
        // Writing to a String cannot fail.
        let _ = match value {
            Value::Bare(value) => write!(text, " {name}={value}"),
            Value::Number(value) => write!(text, " {name}={value}"),
            Value::Quoted(value) => write!(text, " {name}={value:?}"),
        };
    });
}

fn render_json(text: &mut String, at: SystemTime, record: &Record, cluster_domain: &str) {
    let (level, message) = headline(record);
    let mut line = serde_json::Map::new();
    let mut set = |name: &str, value: serde_json::Value| line.insert(name.into(), value);
    set("level", level.into());
    set("time", timestamp(at).into());
    set("scope", "access".into());
    set("message", message.into());
    fields(record, cluster_domain, |name, value| {
        set(
            name,
            match value {
                Value::Bare(value) | Value::Quoted(value) => value.into(),
                Value::Number(value) => value.into(),
            },
        );
    });
    let _ = write!(text, "{}", serde_json::Value::Object(line));
}

enum Value {
    /// Nothing in it that needs quotes.
    Bare(String),
    Quoted(String),
    Number(u64),
}

/// The fields of a line, in order; those that have no value are left out.
fn fields(record: &Record, cluster_domain: &str, mut field: impl FnMut(&'static str, Value)) {
    let bare = |value: &dyn ToString| Value::Bare(value.to_string());
    let quoted = |value: &dyn ToString| Value::Quoted(value.to_string());
    field("src.addr", bare(&record.src_addr));
    if let Some(workload) = &record.src_workload {
        field("src.workload", quoted(&workload.key.name));
        field("src.namespace", quoted(&workload.key.namespace));
    }
    if let Some(identity) = &record.src_identity {
        field("src.identity", quoted(identity));
    }
    field("dst.addr", bare(&record.dst_addr));
    if let Some(addr) = &record.dst_hbone_addr {
        field("dst.hbone_addr", bare(addr));
    }
    if let Some(service) = &record.dst_service {
        let (name, namespace) = (&service.name, &service.namespace);
        let host = format!("{name}.{namespace}.svc.{cluster_domain}");
        field("dst.service", Value::Quoted(host));
    }
    if let Some(workload) = &record.dst_workload {
        field("dst.workload", quoted(&workload.key.name));
        field("dst.namespace", quoted(&workload.key.namespace));
    }
    if let Some(identity) = &record.dst_identity {
        field("dst.identity", quoted(identity));
    }
    let direction = match record.direction {
        Direction::Inbound => "inbound",
        Direction::Outbound => "outbound",
    };
    field("direction", quoted(&direction));
    field("bytes_sent", Value::Number(record.bytes_sent));
    field("bytes_recv", Value::Number(record.bytes_recv));
    let duration = format!("{}ms", record.duration.as_millis());
    field("duration", Value::Quoted(duration));
    if let Some(error) = &record.error {
        field("error", quoted(error));
    }
}

/// RFC 3339 with microseconds, always six of them.
fn timestamp(at: SystemTime) -> String {
    let at = OffsetDateTime::from(at);
    format!(
        "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}.{:06}Z",
        at.year(),
        u8::from(at.month()),
        at.day(),
        at.hour(),
        at.minute(),
        at.second(),
        at.microsecond()
    )
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use crate::state::objects::OutboundDefault;

    use super::*;

    fn workload(name: &str) -> Option<Arc<Workload>> {
        Some(Arc::new(Workload {
            uid: Arc::from(name),
            key: key(name),
            identity: identity(name),
            mirror_of: None,
            node: None,
            local: true,
            ips: Vec::new(),
            host_network: false,
            meshed: true,
            undecided: false,
            refused: None,
            labels: Default::default(),
            namespace_labels: Default::default(),
            owner: None,
            ports: Vec::new(),
            skip_inbound: Vec::new(),
            skip_outbound: Vec::new(),
            outbound_default: OutboundDefault::Allow,
            policy: None,
            network: None,
        }))
    }

    fn key(name: &str) -> ObjectKey {
        ObjectKey {
            cluster: Arc::from("main"),
            namespace: Arc::from("shop"),
            name: Arc::from(name),
        }
    }

    fn identity(name: &str) -> Identity {
        Identity {
            trust_domain: Arc::from("cluster.local"),
            namespace: Arc::from("shop"),
            service_account: Arc::from(name),
        }
    }

    fn record() -> Record {
        Record {
            direction: Direction::Outbound,
            src_addr: "10.1.0.2:40000".parse().unwrap(),
            src_workload: workload("cart-1"),
            src_identity: Some(identity("cart")),
            dst_addr: "192.168.1.2:15008".parse().unwrap(),
            dst_hbone_addr: Some("10.1.0.7:5432".parse().unwrap()),
            dst_service: Some(key("db")),
            dst_workload: workload("db-1"),
            dst_identity: Some(identity("db")),
            bytes_sent: 10,
            bytes_recv: 1_000,
            duration: Duration::from_micros(13_900),
            error: None,
        }
    }

    fn style() -> Style {
        Style {
            format: Format::Text,
            cluster_domain: Arc::from("cluster.local"),
        }
    }

    fn at() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_micros(1_700_000_000_000_042)
    }

    fn text(record: &Record) -> String {
        let mut text = String::new();
        render_text(&mut text, at(), record, "cluster.local");
        text
    }

    /// Sends what is written to the test; waits for `gate` before each write, if there is one.
    struct Output {
        lines: mpsc::Sender<String>,
        gate: Option<mpsc::Receiver<()>>,
        broken: bool,
    }

    impl Write for Output {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if self.broken {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            if let Some(gate) = &self.gate {
                gate.recv().unwrap();
            }
            let text = String::from_utf8(bytes.to_vec()).unwrap();
            self.lines.send(text).unwrap();
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_complete_connection_reads_like_ztunnels_line() {
        assert_eq!(
            text(&record()),
            concat!(
                "2023-11-14T22:13:20.000042Z\tinfo\taccess\tconnection complete",
                " src.addr=10.1.0.2:40000 src.workload=\"cart-1\" src.namespace=\"shop\"",
                " src.identity=\"spiffe://cluster.local/ns/shop/sa/cart\"",
                " dst.addr=192.168.1.2:15008 dst.hbone_addr=10.1.0.7:5432",
                " dst.service=\"db.shop.svc.cluster.local\" dst.workload=\"db-1\" dst.namespace=\"shop\"",
                " dst.identity=\"spiffe://cluster.local/ns/shop/sa/db\" direction=\"outbound\"",
                " bytes_sent=10 bytes_recv=1000 duration=\"13ms\"",
            )
        );
    }

    #[test]
    fn json_has_the_same_fields_with_numbers_as_numbers() {
        let mut line = String::new();
        render_json(&mut line, at(), &record(), "cluster.local");
        let line: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(line["level"], "info");
        assert_eq!(line["message"], "connection complete");
        assert_eq!(line["src.addr"], "10.1.0.2:40000");
        assert_eq!(line["dst.service"], "db.shop.svc.cluster.local");
        assert_eq!(line["bytes_recv"], 1_000);
        assert_eq!(line["duration"], "13ms");
        assert!(line.get("error").is_none());
    }

    #[test]
    fn a_refusal_warns_and_a_connection_that_broke_is_an_error() {
        let refused = Record {
            bytes_sent: 0,
            bytes_recv: 0,
            error: Some("policy: unauthenticated".into()),
            ..record()
        };
        let refused = text(&refused);
        assert!(refused.contains("\twarn\taccess\tconnection failed "));
        assert!(refused.ends_with(" error=\"policy: unauthenticated\""));
        let broken = Record {
            error: Some("reset".into()),
            ..record()
        };
        assert!(text(&broken).contains("\terror\taccess\tconnection complete "));
    }

    #[test]
    fn a_client_cannot_forge_a_line() {
        let forged = Record {
            error: Some("bad\n2023 info access \"connection complete\" x=1".into()),
            ..record()
        };
        let line = text(&forged);
        assert_eq!(line.lines().count(), 1);
        assert!(line.contains(r#"error="bad\n2023 info access \"connection complete\" x=1""#));
    }

    #[test]
    fn every_record_becomes_a_line_and_flush_waits_for_it() {
        let (lines, written) = mpsc::channel();
        let output = Output {
            lines,
            gate: None,
            broken: false,
        };
        let log = AccessLog::start(style(), output).unwrap();
        for _ in 0..100 {
            log.record(record());
        }
        log.flush(Duration::from_secs(10));
        let lines: usize = written.try_iter().map(|text| text.lines().count()).sum();
        assert_eq!(lines, 100);
        assert_eq!(log.dropped(), 0);
    }

    #[test]
    fn a_slow_output_costs_lines_and_never_time() {
        let (lines, written) = mpsc::channel();
        let (open, gate) = mpsc::channel();
        let output = Output {
            lines,
            gate: Some(gate),
            broken: false,
        };
        let log = AccessLog::with(style(), output, 10, Duration::ZERO).unwrap();
        log.record(record());
        // The writer hangs on the first batch, then ten fit.
        while !log.queue.as_ref().unwrap().state.lock().writing {
            thread::yield_now();
        }
        for _ in 0..25 {
            log.record(record());
        }
        assert_eq!(log.dropped(), 15);
        open.send(()).unwrap();
        open.send(()).unwrap();
        log.flush(Duration::from_secs(10));
        let lines: usize = written.try_iter().map(|text| text.lines().count()).sum();
        assert_eq!(lines, 11);
    }

    #[test]
    fn a_broken_output_is_counted_and_harms_nobody() {
        let output = Output {
            lines: mpsc::channel().0,
            gate: None,
            broken: true,
        };
        let log = AccessLog::start(style(), output).unwrap();
        log.record(record());
        log.flush(Duration::from_secs(10));
        log.record(record());
        assert_eq!(log.dropped(), 2);
    }

    #[test]
    fn switched_off_it_takes_records_and_writes_nothing() {
        let log = AccessLog::off();
        log.record(record());
        log.flush(Duration::from_secs(10));
        assert_eq!(log.dropped(), 0);
    }
}

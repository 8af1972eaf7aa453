//! Golden metrics in Linkerd's names (and Istio's, if wanted), and our own.
//!
//! Data threads hold a [`Recorder`] each: it turns what is known of a connection ([`FlowInfo`])
//! into the series it moves, once, and gives back a [`Flow`] whose counting is a handful of
//! uncontended atomic adds. [`Metrics::encode`] sums all of it when somebody scrapes, on the admin
//! runtime. What other rooms know (pods, certificates, refusals of the kernel) comes in through
//! [`Metrics::add_source`], given at wiring and asked at each scrape.
//!
//! This room must not know how a connection was carried or decided, nor the kernel's maps.
#![forbid(unsafe_code)]

mod expose;
mod labels;
mod process;
mod series;

use std::{
    collections::{HashMap, HashSet},
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use crate::state::{Identity, ObjectKey, PodUid, Workload, policy::PolicyRef};

pub use expose::{Family, Kind, Sample};
/// Content type of what [`Metrics::encode`] writes.
pub use prometheus::TEXT_FORMAT;

use labels::{FlowKey, Peer};
use series::{Budget, CountCell, DurationCell, Series, Table, TcpCell};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    Inbound,
    Outbound,
}

/// What is known of one proxied connection once it is decided; resolves to the series it moves.
#[derive(Clone, Debug)]
pub struct FlowInfo {
    pub direction: Direction,
    /// The pod on this node whose traffic it is: the caller (outbound) or the callee (inbound).
    pub workload: Arc<Workload>,
    /// The other end, if it is a pod we know.
    pub peer: Option<Arc<Workload>>,
    pub client_id: Option<Identity>,
    pub server_id: Option<Identity>,
    /// Original destination.
    pub target: SocketAddr,
    /// Where it was led: the endpoint that was picked. Inbound it is the target.
    pub endpoint: SocketAddr,
    /// The Service that was dialled.
    pub service: Option<(ObjectKey, u16)>,
    pub tls: TlsStatus,
    /// Inbound: which Server and authorization decided.
    pub server: Option<PolicyRef>,
    pub authz: Option<PolicyRef>,
}

/// Linkerd's `tls` and `no_tls_reason`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TlsStatus {
    /// Carried by a tunnel.
    True,
    /// `no_identity`, reason `same_node`: one kernel and one process hold both ends.
    SameNode,
    /// `no_identity`: plain, the peer is not meshed. The reason is
    /// `not_provided_by_service_discovery` outbound and `no_tls_from_remote` inbound.
    NotMeshed,
    /// `no_identity`, reason `passthrough`: nobody in the mesh has the address.
    Passthrough,
}

/// How a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    Success,
    /// With the error's fixed word, e.g. `reset`, `connect_refused`, `policy_changed`, `timeout`.
    Failure(&'static str),
}

#[derive(Clone, Debug)]
pub struct MetricsSettings {
    pub data_threads: usize,
    /// Adds ztunnel's four stable TCP series.
    pub istio: bool,
    /// For `destination_service`.
    pub cluster_domain: Arc<str>,
    /// Label sets that the process may hold.
    pub max_series: usize,
}

impl Default for MetricsSettings {
    fn default() -> Self {
        Self {
            data_threads: 1,
            istio: false,
            cluster_domain: Arc::from("cluster.local"),
            max_series: 10_000,
        }
    }
}

/// A label set is forgotten when nobody moved it for so long, as Linkerd does.
pub const RETAIN_IDLE: Duration = Duration::from_secs(600);

/// A connection that ended without anybody saying how (its task was dropped).
const ABORTED: Outcome = Outcome::Failure("aborted");

/// Entries of a thread's cache; full, it is emptied and fills with what is in use.
const CACHE: usize = 4_096;

/// All metrics of the process.
pub struct Metrics {
    started: Instant,
    istio: Option<Arc<str>>,
    budget: Arc<Budget>,
    tables: Arc<Tables>,
    threads: Arc<[Thread]>,
    exposition: expose::Exposition,
}

/// One table for each kind of counter.
struct Tables {
    tcp: Table<TcpCell>,
    duration: Table<DurationCell>,
    istio: Table<TcpCell>,
    authz_allow: Table<CountCell>,
    authz_deny: Table<CountCell>,
    inbound_errors: Table<CountCell>,
    outbound_errors: Table<CountCell>,
}

/// What a data thread counts that has no labels of a connection.
#[repr(align(64))]
#[derive(Default)]
struct Thread {
    connections: AtomicI64,
    tunnels: AtomicI64,
    buffered: AtomicI64,
    /// By (is it the server's side, result); results are a dozen fixed words.
    handshakes: Mutex<HashMap<(bool, &'static str), u64>>,
    /// By reason, a dozen fixed words too.
    cuts: Mutex<HashMap<&'static str, u64>>,
}

impl Metrics {
    pub fn new(settings: MetricsSettings) -> Arc<Self> {
        let threads = settings.data_threads.max(1);
        let budget = Arc::new(Budget::new(settings.max_series));
        let tables = Arc::new(Tables {
            tcp: Table::new(threads, budget.clone()),
            duration: Table::new(threads, budget.clone()),
            istio: Table::new(threads, budget.clone()),
            authz_allow: Table::new(threads, budget.clone()),
            authz_deny: Table::new(threads, budget.clone()),
            inbound_errors: Table::new(threads, budget.clone()),
            outbound_errors: Table::new(threads, budget.clone()),
        });
        let counts: Arc<[Thread]> = (0..threads).map(|_| Thread::default()).collect();
        let exposition = expose::Exposition::new(&tables, &counts, &budget, settings.istio);
        Arc::new(Self {
            started: Instant::now(),
            istio: settings.istio.then_some(settings.cluster_domain),
            budget,
            tables,
            threads: counts,
            exposition,
        })
    }

    /// The view of data thread `thread`, counted from 0.
    pub fn recorder(self: &Arc<Self>, thread: usize) -> Recorder {
        Recorder {
            metrics: self.clone(),
            thread: thread % self.threads.len(),
            cache: Mutex::new(Cache::default()),
        }
    }

    /// Something else to show; asked at every scrape, on the admin runtime. It must answer at once.
    pub fn add_source(&self, source: impl Fn() -> Vec<Family> + Send + Sync + 'static) {
        self.exposition.add_source(Box::new(source));
    }

    /// Everything, as Prometheus' text format. Takes milliseconds when there are many series: not
    /// for a data thread.
    pub fn encode(&self) -> Result<String, prometheus::Error> {
        self.exposition.encode()
    }

    /// Forgets what belongs to pods that are gone, and what is idle for [`RETAIN_IDLE`].
    pub fn sweep(&self, live: &HashSet<PodUid>, now: Instant) {
        let (now, idle) = (self.seconds(now), RETAIN_IDLE.as_secs());
        let tables = &*self.tables;
        tables.tcp.sweep(live, now, idle);
        tables.duration.sweep(live, now, idle);
        tables.istio.sweep(live, now, idle);
        tables.authz_allow.sweep(live, now, idle);
        tables.authz_deny.sweep(live, now, idle);
        tables.inbound_errors.sweep(live, now, idle);
        tables.outbound_errors.sweep(live, now, idle);
    }

    /// Connections open now.
    pub fn connections(&self) -> i64 {
        sum(&self.threads, |thread| &thread.connections)
    }

    /// Label sets held now, and how often one was refused for lack of room.
    pub fn series(&self) -> (usize, u64) {
        (
            self.budget.used.load(Ordering::Relaxed),
            self.budget.dropped.load(Ordering::Relaxed),
        )
    }

    fn seconds(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.started).as_secs()
    }

    fn count(
        &self,
        table: &Table<CountCell>,
        wanted: series::Wanted<'_>,
        thread: usize,
        now: u64,
    ) -> Arc<Series<CountCell>> {
        let series = table.enter(wanted, thread, now);
        series.cell(thread).0.fetch_add(1, Ordering::Relaxed);
        series.leave(thread, now);
        series
    }
}

fn sum(threads: &[Thread], of: impl Fn(&Thread) -> &AtomicI64) -> i64 {
    threads
        .iter()
        .map(|thread| of(thread).load(Ordering::Relaxed))
        .sum()
}

/// A data thread's view: cheap, no lock that another data thread holds on the hot path.
pub struct Recorder {
    metrics: Arc<Metrics>,
    thread: usize,
    /// Only this thread takes it; a mutex so that a caller may share the recorder between tasks.
    cache: Mutex<Cache>,
}

/// Series that this thread has met, by what it knows of a connection.
#[derive(Default)]
struct Cache {
    /// Sum of the tables' generations when it was filled.
    generation: u64,
    flows: HashMap<FlowKey, Arc<FlowSeries>>,
    authz: HashMap<(FlowKey, bool), Arc<Series<CountCell>>>,
}

/// All series that one connection moves.
struct FlowSeries {
    src: Arc<Series<TcpCell>>,
    dst: Arc<Series<TcpCell>>,
    src_duration: Arc<Series<DurationCell>>,
    dst_duration: Arc<Series<DurationCell>>,
    istio: Option<Arc<Series<TcpCell>>>,
}

impl Recorder {
    pub fn open(&self, info: &FlowInfo) -> Flow {
        let started = Instant::now();
        let now = self.metrics.seconds(started);
        let key = FlowKey::of(info);
        let mut cache = self.fresh_cache();
        let series = match cache.flows.get(&key) {
            Some(series) if series.enter(self.thread, now) => series.clone(),
            Some(_) | None => {
                let series = Arc::new(self.resolve(info, now));
                if cache.flows.len() >= CACHE {
                    cache.flows.clear();
                }
                cache.flows.insert(key, series.clone());
                series
            }
        };
        drop(cache);
        series.opened(self.thread);
        self.thread().connections.fetch_add(1, Ordering::Relaxed);
        Flow {
            metrics: self.metrics.clone(),
            series,
            thread: self.thread,
            started,
            closed: false,
        }
    }

    /// `inbound_tcp_authz_allow_total` / `_deny_total`.
    pub fn authz(&self, info: &FlowInfo, allowed: bool) {
        let now = self.metrics.seconds(Instant::now());
        let key = (FlowKey::of(info), allowed);
        let mut cache = self.fresh_cache();
        if let Some(series) = cache.authz.get(&key)
            && series.enter(self.thread, now)
        {
            series.cell(self.thread).0.fetch_add(1, Ordering::Relaxed);
            series.leave(self.thread, now);
            return;
        }
        let table = if allowed {
            &self.metrics.tables.authz_allow
        } else {
            &self.metrics.tables.authz_deny
        };
        let series = self
            .metrics
            .count(table, labels::authz(info), self.thread, now);
        if cache.authz.len() >= CACHE {
            cache.authz.clear();
        }
        cache.authz.insert(key, series);
    }

    /// A connection refused or failed before it had a flow; `reason` is a fixed word.
    pub fn error(
        &self,
        direction: Direction,
        workload: Option<&Arc<Workload>>,
        reason: &'static str,
    ) {
        let table = match direction {
            Direction::Inbound => &self.metrics.tables.inbound_errors,
            Direction::Outbound => &self.metrics.tables.outbound_errors,
        };
        let wanted = labels::error(workload.map(|workload| &**workload), reason);
        let now = self.metrics.seconds(Instant::now());
        self.metrics.count(table, wanted, self.thread, now);
    }

    /// A TLS handshake on the tunnel port; `result` is `ok` or a fixed word.
    pub fn handshake(&self, server: bool, result: &'static str) {
        let mut handshakes = self.thread().handshakes.lock();
        *handshakes.entry((server, result)).or_default() += 1;
    }

    /// A tunnel was cut because its peer broke a bound; `reason` is a fixed word.
    pub fn tunnel_cut(&self, reason: &'static str) {
        *self.thread().cuts.lock().entry(reason).or_default() += 1;
    }

    pub fn tunnels(&self, delta: i64) {
        self.thread().tunnels.fetch_add(delta, Ordering::Relaxed);
    }

    pub fn buffered_bytes(&self, delta: i64) {
        self.thread().buffered.fetch_add(delta, Ordering::Relaxed);
    }

    fn thread(&self) -> &Thread {
        &self.metrics.threads[self.thread]
    }

    /// The cache, less what a sweep may have retired (it would keep memory that is given up).
    fn fresh_cache(&self) -> parking_lot::MutexGuard<'_, Cache> {
        let tables = &*self.metrics.tables;
        let generation = tables.tcp.generation()
            + tables.duration.generation()
            + tables.istio.generation()
            + tables.authz_allow.generation()
            + tables.authz_deny.generation();
        let mut cache = self.cache.lock();
        if cache.generation != generation {
            *cache = Cache {
                generation,
                ..Cache::default()
            };
        }
        cache
    }

    /// The slow way, once per label set and thread; the series come back entered.
    fn resolve(&self, info: &FlowInfo, now: u64) -> FlowSeries {
        let (tables, thread) = (&*self.metrics.tables, self.thread);
        let tcp = |peer| tables.tcp.enter(labels::tcp(info, peer), thread, now);
        let duration = |peer| {
            tables
                .duration
                .enter(labels::duration(info, peer), thread, now)
        };
        let istio =
            |domain: &Arc<str>| tables.istio.enter(labels::istio(info, domain), thread, now);
        FlowSeries {
            src: tcp(Peer::Src),
            dst: tcp(Peer::Dst),
            src_duration: duration(Peer::Src),
            dst_duration: duration(Peer::Dst),
            istio: self.metrics.istio.as_ref().map(istio),
        }
    }
}

impl FlowSeries {
    /// Enters all or none.
    fn enter(&self, thread: usize, now: u64) -> bool {
        if !self.src.enter(thread, now) {
            return false;
        }
        if !self.dst.enter(thread, now) {
            self.src.leave(thread, now);
            return false;
        }
        if !self.src_duration.enter(thread, now) {
            self.src.leave(thread, now);
            self.dst.leave(thread, now);
            return false;
        }
        if !self.dst_duration.enter(thread, now) {
            self.src.leave(thread, now);
            self.dst.leave(thread, now);
            self.src_duration.leave(thread, now);
            return false;
        }
        if let Some(istio) = &self.istio
            && !istio.enter(thread, now)
        {
            self.src.leave(thread, now);
            self.dst.leave(thread, now);
            self.src_duration.leave(thread, now);
            self.dst_duration.leave(thread, now);
            return false;
        }
        true
    }

    fn leave(&self, thread: usize, now: u64) {
        self.src.leave(thread, now);
        self.dst.leave(thread, now);
        self.src_duration.leave(thread, now);
        self.dst_duration.leave(thread, now);
        if let Some(istio) = &self.istio {
            istio.leave(thread, now);
        }
    }

    fn tcp(&self) -> impl Iterator<Item = &Arc<Series<TcpCell>>> {
        [&self.src, &self.dst].into_iter().chain(&self.istio)
    }

    fn opened(&self, thread: usize) {
        for series in self.tcp() {
            series.cell(thread).opened.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// The counters of one open connection. Opening counts; [`Flow::close`] or drop closes.
pub struct Flow {
    metrics: Arc<Metrics>,
    series: Arc<FlowSeries>,
    thread: usize,
    started: Instant,
    closed: bool,
}

impl Flow {
    /// Bytes read from the source (the client's side).
    pub fn from_source(&self, bytes: u64) {
        self.moved(&self.series.src, &self.series.dst, bytes);
        if let Some(istio) = &self.series.istio {
            istio
                .cell(self.thread)
                .read
                .fetch_add(bytes, Ordering::Relaxed);
        }
    }

    /// Bytes read from the destination (the server's side).
    pub fn from_destination(&self, bytes: u64) {
        self.moved(&self.series.dst, &self.series.src, bytes);
        if let Some(istio) = &self.series.istio {
            let cell = istio.cell(self.thread);
            cell.written.fetch_add(bytes, Ordering::Relaxed);
        }
    }

    /// How long the connection is open.
    pub fn age(&self) -> Duration {
        self.started.elapsed()
    }

    pub fn close(mut self, outcome: Outcome) {
        self.finish(outcome);
    }

    fn moved(&self, read: &Series<TcpCell>, written: &Series<TcpCell>, bytes: u64) {
        let thread = self.thread;
        read.cell(thread).read.fetch_add(bytes, Ordering::Relaxed);
        let written = &written.cell(thread).written;
        written.fetch_add(bytes, Ordering::Relaxed);
    }

    fn finish(&mut self, outcome: Outcome) {
        if std::mem::replace(&mut self.closed, true) {
            return;
        }
        let now = Instant::now();
        let duration = now.saturating_duration_since(self.started);
        let (series, thread) = (&*self.series, self.thread);
        for tcp in series.tcp() {
            let cell = tcp.cell(thread);
            match outcome {
                Outcome::Success => {
                    cell.succeeded.fetch_add(1, Ordering::Relaxed);
                }
                Outcome::Failure(word) => cell.fail(word),
            }
        }
        series.src_duration.cell(thread).observe(duration);
        series.dst_duration.cell(thread).observe(duration);
        series.leave(thread, self.metrics.seconds(now));
        let connections = &self.metrics.threads[thread].connections;
        connections.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        self.finish(ABORTED);
    }
}

#[cfg(test)]
mod tests;

//! What a scrape sees: our tables as collectors of the `prometheus` crate.
//!
//! Each large family has a registry of its own, and they are gathered and encoded one after the
//! other: as label pairs of owned strings ten thousand series take ten times the room of their
//! text, and a board must not find that for all families at once.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, atomic::Ordering},
};

use parking_lot::RwLock;
use prometheus::{
    Registry, TextEncoder,
    core::{Collector, Desc},
    proto,
};

use super::{
    Tables, Thread, process,
    series::{BOUNDS_MS, Budget, CountCell, DurationCell, Labels, Series, Table, TcpCell},
    sum,
};

/// A family of metrics from another room.
#[derive(Clone, Debug)]
pub struct Family {
    pub name: &'static str,
    pub help: &'static str,
    pub kind: Kind,
    pub samples: Vec<Sample>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Counter,
    Gauge,
}

#[derive(Clone, Debug)]
pub struct Sample {
    pub labels: Vec<(&'static str, String)>,
    pub value: f64,
}

impl Family {
    /// One sample without labels.
    pub fn single(name: &'static str, help: &'static str, kind: Kind, value: f64) -> Self {
        let labels = Vec::new();
        Self {
            name,
            help,
            kind,
            samples: vec![Sample { labels, value }],
        }
    }
}

pub(super) type Source = Box<dyn Fn() -> Vec<Family> + Send + Sync>;

pub(super) struct Exposition {
    registries: Vec<Registry>,
    sources: Arc<RwLock<Vec<Source>>>,
}

impl Exposition {
    pub(super) fn new(
        tables: &Arc<Tables>,
        threads: &Arc<[Thread]>,
        budget: &Arc<Budget>,
        istio: bool,
    ) -> Self {
        let sources: Arc<RwLock<Vec<Source>>> = Arc::default();
        let small = {
            let (threads, budget, sources) = (threads.clone(), budget.clone(), sources.clone());
            FamilyCollector::new("picomesh_series", move || {
                let mut families = own(&threads, &budget);
                families.extend(process::families());
                families.extend(sources.read().iter().flat_map(|source| source()));
                families.into_iter().map(from_family).collect()
            })
        };
        let mut collectors = vec![small];
        for (name, build) in TCP {
            let tables = tables.clone();
            collectors.push(FamilyCollector::new(name, move || {
                vec![build(name, &tables.tcp.snapshot())]
            }));
        }
        let durations = tables.clone();
        collectors.push(FamilyCollector::new(
            "tcp_connection_duration_ms",
            move || vec![durations_family(&durations.duration)],
        ));
        for (name, table) in COUNTS {
            let tables = tables.clone();
            collectors.push(FamilyCollector::new(name, move || {
                vec![counts(name, table(&tables))]
            }));
        }
        if istio {
            for (name, build) in ISTIO {
                let tables = tables.clone();
                collectors.push(FamilyCollector::new(name, move || {
                    vec![build(name, &tables.istio.snapshot())]
                }));
            }
        }
        let registries = collectors
            .into_iter()
            .map(|collector| {
                let registry = Registry::new();
                // Fails only for two collectors of one name, and each has its own registry.
                if let Err(error) = registry.register(Box::new(collector)) {
                    tracing::error!(%error, "a family of metrics is not shown");
                }
                registry
            })
            .collect();
        Self {
            registries,
            sources,
        }
    }

    pub(super) fn add_source(&self, source: Source) {
        self.sources.write().push(source);
    }

    pub(super) fn encode(&self) -> Result<String, prometheus::Error> {
        let mut text = String::new();
        for registry in &self.registries {
            TextEncoder::new().encode_utf8(&registry.gather(), &mut text)?;
        }
        Ok(text)
    }
}

type TcpFamily = fn(&'static str, &[Arc<Series<TcpCell>>]) -> proto::MetricFamily;

const TCP: [(&str, TcpFamily); 5] = [
    ("tcp_open_total", |name, all| {
        let help = "Connections opened.";
        tcp_counter(name, help, all, |cell| cell.opened.load(Ordering::Relaxed))
    }),
    ("tcp_close_total", tcp_closed),
    ("tcp_open_connections", tcp_open),
    ("tcp_read_bytes_total", |name, all| {
        let help = "Bytes read from the peer.";
        tcp_counter(name, help, all, |cell| cell.read.load(Ordering::Relaxed))
    }),
    ("tcp_write_bytes_total", |name, all| {
        let help = "Bytes written to the peer.";
        tcp_counter(name, help, all, |cell| cell.written.load(Ordering::Relaxed))
    }),
];

const ISTIO: [(&str, TcpFamily); 4] = [
    ("istio_tcp_connections_opened_total", |name, all| {
        let help = "Connections opened, in Istio's labels.";
        tcp_counter(name, help, all, |cell| cell.opened.load(Ordering::Relaxed))
    }),
    ("istio_tcp_connections_closed_total", |name, all| {
        let help = "Connections closed, in Istio's labels.";
        tcp_counter(name, help, all, closed)
    }),
    ("istio_tcp_received_bytes_total", |name, all| {
        let help = "Bytes of requests, from client to server, in Istio's labels.";
        tcp_counter(name, help, all, |cell| cell.read.load(Ordering::Relaxed))
    }),
    ("istio_tcp_sent_bytes_total", |name, all| {
        let help = "Bytes of responses, from server to client, in Istio's labels.";
        tcp_counter(name, help, all, |cell| cell.written.load(Ordering::Relaxed))
    }),
];

type CountTable = fn(&Tables) -> &Table<CountCell>;

const COUNTS: [(&str, CountTable); 4] = [
    ("inbound_tcp_authz_allow_total", |tables| {
        &tables.authz_allow
    }),
    ("inbound_tcp_authz_deny_total", |tables| &tables.authz_deny),
    ("inbound_tcp_errors_total", |tables| &tables.inbound_errors),
    ("outbound_tcp_errors_total", |tables| {
        &tables.outbound_errors
    }),
];

fn tcp_counter(
    name: &'static str,
    help: &'static str,
    all: &[Arc<Series<TcpCell>>],
    value: impl Fn(&TcpCell) -> u64,
) -> proto::MetricFamily {
    let metrics = all.iter().map(|series| {
        let sum: u64 = series.cells().map(&value).sum();
        counter(pairs(&series.labels), sum as f64)
    });
    family(name, help, proto::MetricType::COUNTER, metrics.collect())
}

fn closed(cell: &TcpCell) -> u64 {
    let failed: u64 = cell.failures().iter().map(|(_, count)| count).sum();
    cell.succeeded.load(Ordering::Relaxed) + failed
}

fn tcp_open(name: &'static str, all: &[Arc<Series<TcpCell>>]) -> proto::MetricFamily {
    let metrics = all.iter().map(|series| {
        // Closed first: what opens and closes meanwhile must not make it negative.
        let closed: u64 = series.cells().map(closed).sum();
        let opened: u64 = series
            .cells()
            .map(|cell| cell.opened.load(Ordering::Relaxed))
            .sum();
        gauge(pairs(&series.labels), opened.saturating_sub(closed) as f64)
    });
    let help = "Connections open now.";
    family(name, help, proto::MetricType::GAUGE, metrics.collect())
}

fn tcp_closed(name: &'static str, all: &[Arc<Series<TcpCell>>]) -> proto::MetricFamily {
    let mut metrics = Vec::new();
    for series in all {
        let mut succeeded = 0;
        let mut failed: BTreeMap<&'static str, u64> = BTreeMap::new();
        for cell in series.cells() {
            succeeded += cell.succeeded.load(Ordering::Relaxed);
            for (word, count) in cell.failures() {
                *failed.entry(word).or_default() += count;
            }
        }
        let mut add = |classification: &str, errno: &str, count: u64| {
            let mut labels = pairs(&series.labels);
            labels.push(pair("classification", classification));
            labels.push(pair("errno", errno));
            metrics.push(counter(labels, count as f64));
        };
        if succeeded > 0 {
            add("success", "", succeeded);
        }
        for (word, count) in failed {
            add("failure", word, count);
        }
    }
    let help = "Connections closed, by how they ended.";
    family(name, help, proto::MetricType::COUNTER, metrics)
}

fn durations_family(table: &Table<DurationCell>) -> proto::MetricFamily {
    let metrics = table.snapshot().into_iter().map(|series| {
        let mut counts = [0u64; BOUNDS_MS.len() + 1];
        let mut sum_us = 0;
        for cell in series.cells() {
            for (count, bucket) in counts.iter_mut().zip(&cell.buckets) {
                *count += bucket.load(Ordering::Relaxed);
            }
            sum_us += cell.sum_us.load(Ordering::Relaxed);
        }
        let mut cumulative = 0;
        let buckets = BOUNDS_MS.iter().zip(counts).map(|(bound, count)| {
            cumulative += count;
            let mut bucket = proto::Bucket::default();
            bucket.set_upper_bound(*bound as f64);
            bucket.set_cumulative_count(cumulative);
            bucket
        });
        let mut histogram = proto::Histogram::default();
        histogram.set_bucket(buckets.collect());
        histogram.set_sample_count(counts.iter().sum());
        histogram.set_sample_sum(sum_us as f64 / 1_000.0);
        let mut metric = proto::Metric::from_label(pairs(&series.labels));
        metric.set_histogram(histogram);
        metric
    });
    family(
        "tcp_connection_duration_ms",
        "How long connections were open.",
        proto::MetricType::HISTOGRAM,
        metrics.collect(),
    )
}

fn counts(name: &'static str, table: &Table<CountCell>) -> proto::MetricFamily {
    let help = match name {
        "inbound_tcp_authz_allow_total" => "Connections to a pod that policy allowed.",
        "inbound_tcp_authz_deny_total" => "Connections to a pod that policy refused.",
        "inbound_tcp_errors_total" => "Connections to a pod that failed, by reason.",
        _ => "Connections of a pod that failed, by reason.",
    };
    let metrics = table.snapshot().into_iter().map(|series| {
        let sum: u64 = series.cells().map(|c| c.0.load(Ordering::Relaxed)).sum();
        counter(pairs(&series.labels), sum as f64)
    });
    family(name, help, proto::MetricType::COUNTER, metrics.collect())
}

/// What the threads and the tables tell of themselves.
fn own(threads: &[Thread], budget: &Budget) -> Vec<Family> {
    let mut handshakes: HashMap<(bool, &'static str), u64> = HashMap::new();
    for thread in threads {
        for (key, count) in thread.handshakes.lock().iter() {
            *handshakes.entry(*key).or_default() += count;
        }
    }
    let mut cuts: BTreeMap<&'static str, u64> = BTreeMap::new();
    for thread in threads {
        for (reason, count) in thread.cuts.lock().iter() {
            *cuts.entry(*reason).or_default() += count;
        }
    }
    let cuts = cuts.into_iter().map(|(reason, count)| Sample {
        labels: vec![("reason", reason.into())],
        value: count as f64,
    });
    let handshakes = handshakes.into_iter().map(|((server, result), count)| {
        let side = if server { "server" } else { "client" };
        Sample {
            labels: vec![("side", side.into()), ("result", result.into())],
            value: count as f64,
        }
    });
    vec![
        Family {
            name: "picomesh_handshakes_total",
            help: "TLS handshakes of tunnels, by side and result.",
            kind: Kind::Counter,
            samples: handshakes.collect(),
        },
        Family {
            name: "picomesh_tunnels_cut_total",
            help: "Tunnels that were cut because the peer broke a bound, by reason.",
            kind: Kind::Counter,
            samples: cuts.collect(),
        },
        Family::single(
            "picomesh_connections",
            "Connections that the proxy holds open now.",
            Kind::Gauge,
            sum(threads, |t| &t.connections) as f64,
        ),
        Family::single(
            "picomesh_tunnels",
            "Tunnels to and from other nodes that stand now.",
            Kind::Gauge,
            sum(threads, |t| &t.tunnels) as f64,
        ),
        Family::single(
            "picomesh_buffered_bytes",
            "Bytes that the proxy has read and not yet written.",
            Kind::Gauge,
            sum(threads, |t| &t.buffered) as f64,
        ),
        Family::single(
            "picomesh_series",
            "Label sets held.",
            Kind::Gauge,
            budget.used.load(Ordering::Relaxed) as f64,
        ),
        Family::single(
            "picomesh_series_dropped_total",
            "Times a new label set was counted in an overflow series, for lack of room.",
            Kind::Counter,
            budget.dropped.load(Ordering::Relaxed) as f64,
        ),
    ]
}

/// A function as a collector.
struct FamilyCollector<F> {
    desc: Option<Desc>,
    collect: F,
}

type BoxedCollect = Box<dyn Fn() -> Vec<proto::MetricFamily> + Send + Sync>;

impl FamilyCollector<BoxedCollect> {
    fn new(
        name: &str,
        collect: impl Fn() -> Vec<proto::MetricFamily> + Send + Sync + 'static,
    ) -> Self {
        let desc = Desc::new(name.into(), name.into(), Vec::new(), HashMap::new());
        Self {
            desc: desc.ok(),
            collect: Box::new(collect),
        }
    }
}

impl<F: Fn() -> Vec<proto::MetricFamily> + Send + Sync> Collector for FamilyCollector<F> {
    fn desc(&self) -> Vec<&Desc> {
        self.desc.iter().collect()
    }

    fn collect(&self) -> Vec<proto::MetricFamily> {
        (self.collect)()
    }
}

fn from_family(from: Family) -> proto::MetricFamily {
    let (kind, build): (_, fn(Vec<proto::LabelPair>, f64) -> proto::Metric) = match from.kind {
        Kind::Counter => (proto::MetricType::COUNTER, counter),
        Kind::Gauge => (proto::MetricType::GAUGE, gauge),
    };
    let metrics = from.samples.into_iter().map(|sample| {
        let labels = sample.labels.iter().map(|(name, value)| pair(name, value));
        build(labels.collect(), sample.value)
    });
    family(from.name, from.help, kind, metrics.collect())
}

fn family(
    name: &str,
    help: &str,
    kind: proto::MetricType,
    metrics: Vec<proto::Metric>,
) -> proto::MetricFamily {
    let mut family = proto::MetricFamily::default();
    family.set_name(name.into());
    family.set_help(help.into());
    family.set_field_type(kind);
    family.set_metric(metrics);
    family
}

fn counter(labels: Vec<proto::LabelPair>, value: f64) -> proto::Metric {
    let mut counter = proto::Counter::default();
    counter.set_value(value);
    let mut metric = proto::Metric::from_label(labels);
    metric.set_counter(counter);
    metric
}

fn gauge(labels: Vec<proto::LabelPair>, value: f64) -> proto::Metric {
    let mut gauge = proto::Gauge::default();
    gauge.set_value(value);
    let mut metric = proto::Metric::from_label(labels);
    metric.set_gauge(gauge);
    metric
}

fn pairs(labels: &Labels) -> Vec<proto::LabelPair> {
    labels
        .iter()
        .map(|(name, value)| pair(name, value))
        .collect()
}

fn pair(name: &str, value: &str) -> proto::LabelPair {
    let mut pair = proto::LabelPair::default();
    pair.set_name(name.into());
    pair.set_value(value.into());
    pair
}

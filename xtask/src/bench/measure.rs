//! One contender in one round: every load once, and what is kept of it.

use std::{collections::BTreeMap, path::Path, thread, time::Duration};

use anyhow::{Context, Result};
use picomesh_tests::Netns;
use serde::{Serialize, Serializer};

use super::{
    contender::Contender,
    load::{self, Outcome, Window},
    spin::Spinner,
    stage::{LARGE, Stage},
};

/// Connections of the keep-alive loads, and connections at a time of the churn.
const CONNECTIONS: usize = 32;
const PACE: u32 = 1_000;
/// Connections of the memory load.
const MANY: usize = 1_000;
/// From the last byte to reading what memory is in use, while the connections stay.
const QUIET: Duration = Duration::from_secs(2);

/// How long and how often, settled by the command line.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Plan {
    pub(crate) rounds: u32,
    #[serde(serialize_with = "seconds")]
    pub(crate) warm: Duration,
    /// The counted part of each load.
    #[serde(serialize_with = "seconds")]
    pub(crate) measure: Duration,
    /// From closing the burst's connections to reading what memory is left.
    #[serde(serialize_with = "seconds")]
    pub(crate) settle: Duration,
    /// How many rounds, from the first, measure memory.
    pub(crate) memory_rounds: u32,
    /// Latency once more with a spinner on each core.
    pub(crate) spin: bool,
}

/// A row of the table. All are of one client; CPU is that of all proxies together; memory is that
/// of the larger side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Metric {
    P50,
    P99,
    SpinP50,
    SpinP99,
    Requests,
    RequestCpu,
    Connections,
    ConnectionCpu,
    Bulk,
    Idle,
    Open,
    After,
}

impl Metric {
    pub(crate) const ALL: [Self; 12] = [
        Self::P50,
        Self::P99,
        Self::SpinP50,
        Self::SpinP99,
        Self::Requests,
        Self::RequestCpu,
        Self::Connections,
        Self::ConnectionCpu,
        Self::Bulk,
        Self::Idle,
        Self::Open,
        Self::After,
    ];

    /// In the JSON; the unit is part of the name.
    pub(crate) fn key(self) -> &'static str {
        match self {
            Self::P50 => "p50_us",
            Self::P99 => "p99_us",
            Self::SpinP50 => "p50_spinning_us",
            Self::SpinP99 => "p99_spinning_us",
            Self::Requests => "requests_per_second",
            Self::RequestCpu => "cpu_us_per_request",
            Self::Connections => "connections_per_second",
            Self::ConnectionCpu => "cpu_us_per_connection",
            Self::Bulk => "bulk_gbit_per_second",
            Self::Idle => "resident_idle_mb",
            Self::Open => "resident_1000_connections_mb",
            Self::After => "resident_after_burst_mb",
        }
    }

    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::P50 => "p50 at 1,000 req/s, µs",
            Self::P99 => "p99 at 1,000 req/s, µs",
            Self::SpinP50 => "p50, CPUs kept awake, µs",
            Self::SpinP99 => "p99, CPUs kept awake, µs",
            Self::Requests => "max req/s",
            Self::RequestCpu => "CPU per request at max, µs",
            Self::Connections => "new connections/s",
            Self::ConnectionCpu => "CPU per connection, µs",
            Self::Bulk => "one stream, Gbit/s",
            Self::Idle => "resident idle, MB",
            Self::Open => "resident, 1,000 connections, MB",
            Self::After => "resident after a burst, MB",
        }
    }

    pub(crate) fn digits(self) -> usize {
        match self {
            Self::P50
            | Self::P99
            | Self::SpinP50
            | Self::SpinP99
            | Self::Requests
            | Self::Connections
            | Self::ConnectionCpu => 0,
            Self::RequestCpu | Self::Idle | Self::Open | Self::After => 1,
            Self::Bulk => 2,
        }
    }
}

/// What one contender did in one round.
#[derive(Debug, Serialize)]
pub(crate) struct Round {
    pub(crate) round: u32,
    pub(crate) contender: &'static str,
    pub(crate) values: BTreeMap<&'static str, f64>,
    /// Requests and connections that broke or were refused, by load; absent if none.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) failed: BTreeMap<&'static str, u64>,
    /// What the contender's table leaves out: both sides' memory, the machine's CPU.
    pub(crate) more: BTreeMap<String, f64>,
}

impl Round {
    fn put(&mut self, metric: Metric, value: f64) {
        self.values.insert(metric.key(), value);
    }

    fn note(&mut self, load: &'static str, outcome: &Outcome) {
        if outcome.failed > 0 {
            *self.failed.entry(load).or_default() += outcome.failed;
        }
        if outcome.done > 0 {
            let machine = outcome.spent.machine.as_secs_f64() * 1e6 / outcome.done as f64;
            self.more
                .insert(format!("{load}_machine_cpu_us_each"), machine);
        }
    }
}

/// Sets the contender up, loads it, takes it down.
pub(crate) fn round(
    contender: Contender,
    round: u32,
    plan: &Plan,
    agent: Option<&Path>,
) -> Result<Round> {
    let stage = Stage::set(contender, agent).context("set up")?;
    let mut result = Round {
        round,
        contender: contender.name(),
        values: BTreeMap::new(),
        failed: BTreeMap::new(),
        more: BTreeMap::new(),
    };
    if contender.has_proxies() && round <= plan.memory_rounds {
        // First, while the processes are fresh: idle means that they have done nothing yet.
        memory(&stage, plan, &mut result).context("memory")?;
    }
    let window = Window {
        warm: plan.warm,
        measure: plan.measure,
    };
    let meter = stage.meter();
    let client: &Netns = stage.client.netns();

    let streams = client.run(|| load::open(stage.http, CONNECTIONS))?;
    let paced = load::requests(&streams, "/", Some(PACE), window, &meter).context("latency")?;
    result.note("paced", &paced);
    put_percentiles(&mut result, &paced, Metric::P50, Metric::P99);
    if plan.spin {
        let spinner = Spinner::start(&stage.client)?;
        let paced = load::requests(&streams, "/", Some(PACE), window, &meter)
            .context("latency, CPUs kept awake")?;
        drop(spinner);
        put_percentiles(&mut result, &paced, Metric::SpinP50, Metric::SpinP99);
    }

    let requests = load::requests(&streams, "/", None, window, &meter).context("requests")?;
    drop(streams);
    result.note("requests", &requests);
    result.put(Metric::Requests, requests.per_second());

    let churn = client
        .run(|| load::churn(stage.http, CONNECTIONS, window, &meter))
        .context("connections")?;
    result.note("connections", &churn);
    result.put(Metric::Connections, churn.per_second());
    if contender.has_proxies() {
        put_cpu(&mut result, &requests, Metric::RequestCpu);
        put_cpu(&mut result, &churn, Metric::ConnectionCpu);
    }

    let bulk = load::stream(client, stage.bulk, &stage.sink, window, &meter).context("bulk")?;
    result.put(Metric::Bulk, bulk.per_second() * 8.0 / 1e9);
    Ok(result)
}

/// Idle, with a thousand connections that each asked once, and some time after a thousand
/// connections at once asked for as much as they could get.
fn memory(stage: &Stage, plan: &Plan, result: &mut Round) -> Result<()> {
    thread::sleep(QUIET);
    put_memory(result, stage, Metric::Idle)?;

    let meter = stage.meter();
    let streams = stage.client.netns().run(|| load::open(stage.http, MANY))?;
    load::once(&streams, "/")?;
    thread::sleep(QUIET);
    put_memory(result, stage, Metric::Open)?;

    let burst = Window {
        warm: Duration::ZERO,
        measure: plan.measure,
    };
    let burst = load::requests(&streams, LARGE, None, burst, &meter)?;
    result.note("burst", &burst);
    drop(streams);
    thread::sleep(plan.settle);
    put_memory(result, stage, Metric::After)
}

fn put_memory(result: &mut Round, stage: &Stage, metric: Metric) -> Result<()> {
    let sides = stage.resident()?;
    for (i, mb) in sides.iter().enumerate() {
        result
            .more
            .insert(format!("{}_side_{i}", metric.key()), *mb);
    }
    result.put(metric, sides.into_iter().fold(0.0, f64::max));
    Ok(())
}

fn put_percentiles(result: &mut Round, outcome: &Outcome, p50: Metric, p99: Metric) {
    for (metric, fraction) in [(p50, 0.50), (p99, 0.99)] {
        if let Some(us) = outcome.percentile(fraction) {
            result.put(metric, us);
        }
    }
}

fn put_cpu(result: &mut Round, outcome: &Outcome, metric: Metric) {
    if outcome.done > 0 {
        let us = outcome.spent.proxies.as_secs_f64() * 1e6 / outcome.done as f64;
        result.put(metric, us);
    }
}

fn seconds<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(duration.as_secs_f64())
}

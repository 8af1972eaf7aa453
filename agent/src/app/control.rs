//! `picomesh-agent controller` and `signer`, put together: a client, the port for people and
//! Prometheus, the Lease, and the one of the two that was asked for.

use std::{io, sync::Arc, time::Duration};

use anyhow::Context;
use tokio::{runtime, sync::watch};
use tracing::info;

use super::life::Signals;
use crate::{
    admin::http::{Server, Shown},
    config::{ControlConfig, Role},
    control::{controller, counts::Counts, lease::Election, signer},
    drain::Drain,
    identity::clock::SystemClock,
    k8s::{client, events::Events},
    metrics::{Family, Kind, Metrics, MetricsSettings, Sample},
    readiness::Readiness,
    telemetry,
};

/// For answers that are under way, and to let go of the Lease.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// Until SIGTERM or SIGINT.
pub fn run(config: ControlConfig) -> anyhow::Result<()> {
    let _level = telemetry::init(&config.log_level, config.log_format)?;
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(4)
        .build()?;
    let ended = runtime.block_on(serve(config));
    runtime.shutdown_background();
    ended
}

async fn serve(config: ControlConfig) -> anyhow::Result<()> {
    let mut signals = Signals::new()?;
    let readiness = Readiness::new();
    let (drain, guard) = Drain::new();
    let counts = Arc::<Counts>::default();

    // People can look from here on.
    let http = Server::bind(config.metrics_address).with_context(|| {
        format!(
            "--metrics-address {}: cannot listen",
            config.metrics_address
        )
    })?;
    let metrics = Metrics::new(MetricsSettings::default());
    let shown = Shown {
        metrics: metrics.clone(),
        readiness: readiness.clone(),
    };
    let mut serving = tokio::spawn(http.serve(shown, guard.clone()));

    let lease = match config.role {
        Role::Controller(_) => controller::LEASE,
        Role::Signer(_) => signer::LEASE,
    };
    info!(
        version = env!("CARGO_PKG_VERSION"),
        role = lease,
        namespace = config.namespace,
        "starting"
    );
    let client = client::connect(config.kubeconfig).await?;
    let (fit, is_fit) = watch::channel(true);
    let election =
        Election::new(client.clone(), &config.namespace, lease, &config.pod_name).while_fit(is_fit);
    let leading = election.leading();
    let of_metrics = (leading.clone(), counts.clone());
    let is_signer = matches!(config.role, Role::Signer(_));
    metrics.add_source(move || families(is_signer, *of_metrics.0.borrow(), &of_metrics.1));

    // Nothing is written any more when the Lease is let go.
    let (work_ended, mut work_end) = watch::channel(());
    let electing = tokio::spawn(election.run(async move {
        let _ended = work_end.changed().await;
    }));
    let mut stop = guard.clone();
    let stop = async move { stop.begun().await };
    let mut acting = match config.role {
        Role::Controller(settings) => {
            let known = readiness.register("requests, pods and namespaces");
            let done = move || known.done();
            tokio::spawn(async move {
                controller::run(client, settings, leading, counts, done, stop).await;
            })
        }
        Role::Signer(settings) => {
            let known = readiness.register("authority");
            let done = move || known.done();
            let instance = config.pod_name.as_str().into();
            let (events, writing) = Events::start_as(signer::COMPONENT, client.clone(), instance);
            // Ends with the last handle.
            tokio::spawn(writing);
            let around = signer::Surroundings {
                client,
                clock: Arc::new(SystemClock),
                events,
                leading,
                fit,
                counts,
            };
            tokio::spawn(async move { signer::run(settings, around, done, stop).await })
        }
    };
    let ended: io::Result<()> = tokio::select! {
        () = signals.next() => Ok(()),
        ended = &mut acting => Err(io::Error::other(format!("the work has ended: {ended:?}"))),
        ended = &mut serving => Err(io::Error::other(format!("the port has ended: {ended:?}"))),
    };
    info!("ending");
    drop(guard);
    let drained = drain.drain(LAST_WORDS).await;
    info!(?drained, "everybody has ended");
    if !acting.is_finished() {
        acting.abort();
    }
    drop(work_ended);
    electing.await.context("the Lease")?;
    Ok(ended?)
}

fn families(is_signer: bool, leads: bool, counts: &Counts) -> Vec<Family> {
    let shown = counts.shown();
    let number = |count: u64| count as f64;
    let results = if is_signer {
        (
            "picomesh_signer_results_total",
            "Approved requests by what became of them.",
            "signed",
            "failed",
        )
    } else {
        (
            "picomesh_controller_decisions_total",
            "Requests by what was decided.",
            "approved",
            "denied",
        )
    };
    let (name, help, good, bad) = results;
    let sample = |result: &str, reason: &str, count: u64| Sample {
        labels: vec![("result", result.to_owned()), ("reason", reason.to_owned())],
        value: number(count),
    };
    let refused = shown.refused.iter();
    let refused = refused.map(|(reason, count)| sample(bad, reason, *count));
    let mut families = vec![
        Family {
            name,
            help,
            kind: Kind::Counter,
            samples: std::iter::once(sample(good, "", shown.good))
                .chain(refused)
                .collect(),
        },
        Family::single(
            "picomesh_leader",
            "1 while this replica has the Lease.",
            Kind::Gauge,
            f64::from(u8::from(leads)),
        ),
        Family::single(
            "picomesh_requests_waiting",
            "Requests that wait for an answer of ours.",
            Kind::Gauge,
            number(u64::try_from(shown.waiting).unwrap_or(u64::MAX)),
        ),
    ];
    if is_signer {
        families.push(Family::single(
            "picomesh_authority_trouble",
            "1 while the Secret or the ConfigMap of the authority is not as it should be.",
            Kind::Gauge,
            f64::from(u8::from(shown.troubled)),
        ));
        if let Some(ends) = shown.issuer_ends {
            families.push(Family::single(
                "picomesh_issuer_expiration_timestamp_seconds",
                "When the certificate of the issuer that signs ends.",
                Kind::Gauge,
                number(ends),
            ));
        }
    } else {
        families.push(Family::single(
            "picomesh_requests_collected_total",
            "Requests that were deleted because they were finished or stale.",
            Kind::Counter,
            number(shown.collected),
        ));
    }
    families
}

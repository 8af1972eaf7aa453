//! The controller: approves or denies what agents ask for, and collects what is finished.
//!
//! It knows who runs where ([`pods`]), reads every request by [`Rules`] and decides ([`decide`],
//! pure). It cannot sign, and reads no Secret. All replicas watch, the one that leads acts; what it
//! writes carries the version that was judged, so a request that has changed since, or that another
//! replica has answered, is left alone.
//!
//! A refusal stands on the object as a `Denied` condition with reason and message. What a watch may
//! only not have shown yet (a pod that has just started) is waited for, for some seconds in which
//! all watches are well.

mod decide;
mod pods;
mod requests;
#[cfg(test)]
mod tests;

use std::{sync::Arc, time::Duration};

use futures_util::StreamExt;
use k8s_openapi::{
    api::{
        certificates::v1::{CertificateSigningRequest, CertificateSigningRequestCondition},
        core::v1::{Namespace, Pod},
    },
    apimachinery::pkg::apis::meta::v1::Time,
    jiff::Timestamp,
};
use kube::{
    Api, Client,
    api::{DeleteParams, Patch, PatchParams, Preconditions},
    core::ApiResource,
};
use serde_json::json;
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time::{Instant, sleep_until, timeout},
};
use tracing::{debug, info, warn};

use super::{SIGNER, ask::Rules, counts::Counts, feed};
use crate::k8s::{Converter, Seen, watch as watches};
use pods::Pods;
use requests::{Requests, What, Work};

/// The Lease of the one that acts.
pub const LEASE: &str = "picomesh-controller";

/// After the first change its companions are waited for.
const GATHER: Duration = Duration::from_millis(20);
/// What becomes due without any change is seen within this.
const LOOK: Duration = Duration::from_secs(1);
/// Answers that are written at once.
const AT_ONCE: usize = 8;
/// For one write.
const ANSWER: Duration = Duration::from_secs(10);

#[derive(Clone, Debug)]
pub struct Settings {
    pub rules: Rules,
    pub cluster: Arc<str>,
    /// Requests of one node that may wait for an answer.
    pub most_pending: usize,
}

#[derive(Clone, Copy, Debug)]
enum Of {
    Requests,
    Pods,
    Namespaces,
}

/// Until `stop`. `ready`: everything was listed once.
pub async fn run(
    client: Client,
    settings: Settings,
    mut leading: watch::Receiver<bool>,
    counts: Arc<Counts>,
    ready: impl FnOnce() + Send,
    stop: impl Future<Output = ()> + Send,
) {
    let (tell, mut told) = mpsc::channel(feed::QUEUE);
    let mut feeds = JoinSet::new();
    let all = |of: &ApiResource| Api::<Seen>::all_with(client.clone(), of);
    let ours = watches::config_of_many().fields(&format!("spec.signerName={SIGNER}"));
    // Pods that have ended would be most of them on a cluster that runs jobs.
    let live = watches::config_of_many().fields("status.phase!=Succeeded,status.phase!=Failed");
    for (tag, kind, of, only) in [
        (
            Of::Requests,
            "CertificateSigningRequest",
            ApiResource::erase::<CertificateSigningRequest>(&()),
            ours,
        ),
        (Of::Pods, "Pod", ApiResource::erase::<Pod>(&()), live),
        (
            Of::Namespaces,
            "Namespace",
            ApiResource::erase::<Namespace>(&()),
            watches::config(),
        ),
    ] {
        feeds.spawn(feed::follow(tag, kind, all(&of), only, tell.clone()));
    }
    drop(tell);

    let trust_domain = &settings.rules.trust_domain;
    let converter = Converter::named(&settings.cluster, trust_domain);
    let mut pods = Pods::new(converter, settings.rules.namespace.clone());
    let mut requests = Requests::new(settings.rules, settings.most_pending);
    let api = Api::<CertificateSigningRequest>::all(client);
    let mut ready = Some(ready);
    let mut due = Instant::now() + LOOK;
    let mut stop = std::pin::pin!(stop);
    loop {
        tokio::select! {
            () = &mut stop => return,
            message = told.recv() => {
                let Some((of, told)) = message else { return };
                let now = Instant::now();
                match of {
                    Of::Requests => requests.hear(told, now),
                    Of::Pods => pods.hear_pod(told, now),
                    Of::Namespaces => pods.hear_namespace(told, now),
                }
                due = due.min(Instant::now() + GATHER);
                continue;
            }
            changed = leading.changed() => if changed.is_err() { return },
            () = sleep_until(due) => {}
        }
        due = Instant::now() + LOOK;
        counts.waiting(requests.undecided());
        // Half of what is known would deny what is right.
        if !(requests.is_complete() && pods.is_complete()) {
            continue;
        }
        if let Some(ready) = ready.take() {
            ready();
        }
        if !*leading.borrow_and_update() {
            continue;
        }
        let work = requests.due(&pods, Instant::now());
        // A round was full, so there may be more.
        let more = work.len() >= requests::ROUND;
        let acting = futures_util::stream::iter(work)
            .map(|work| act(&api, &leading, &counts, work))
            .buffer_unordered(AT_ONCE)
            .collect::<Vec<_>>();
        let acted = tokio::select! {
            acted = acting => acted,
            () = &mut stop => return,
        };
        let now = Instant::now();
        if more {
            due = now;
        }
        for (name, well) in acted {
            if well {
                requests.done(&name, now);
            } else {
                requests.failed(&name, now);
            }
        }
    }
}

/// `true`: it is done, or was somebody else's.
async fn act(
    api: &Api<CertificateSigningRequest>,
    leading: &watch::Receiver<bool>,
    counts: &Counts,
    work: Work,
) -> (Arc<str>, bool) {
    let Work {
        name,
        version,
        what,
    } = work;
    if !*leading.borrow() {
        return (name, false);
    }
    let written = match &what {
        What::Approve { of, conditions } => {
            let message = format!("{of}: asked for by the agent of that node");
            let added = condition("Approved", "RunsOnNode", &message);
            timeout(ANSWER, answer(api, &name, &version, conditions, added)).await
        }
        What::Deny {
            refusal,
            conditions,
        } => {
            let added = condition("Denied", refusal.reason.as_str(), &refusal.message);
            timeout(ANSWER, answer(api, &name, &version, conditions, added)).await
        }
        What::Collect => timeout(ANSWER, collect(api, &name, &version)).await,
    };
    let request = &*name;
    match written {
        Ok(Ok(())) => match what {
            What::Approve { of, .. } => {
                counts.good();
                info!(request, of, "approved");
            }
            What::Deny { refusal, .. } => {
                counts.refused(refusal.reason);
                warn!(
                    request,
                    reason = refusal.reason.as_str(),
                    message = refusal.message,
                    "denied"
                );
            }
            What::Collect => {
                counts.collected();
                debug!(request, "collected");
            }
        },
        // It has changed or is gone: a watch tells.
        Ok(Err(kube::Error::Api(status))) if [404, 409].contains(&status.code) => {}
        Ok(Err(error)) => {
            warn!(request, %error, "a request cannot be answered; it is tried again");
            return (name, false);
        }
        Err(_late) => {
            warn!(request, "the API server does not answer; it is tried again");
            return (name, false);
        }
    }
    (name, true)
}

async fn answer(
    api: &Api<CertificateSigningRequest>,
    name: &str,
    version: &str,
    conditions: &[CertificateSigningRequestCondition],
    added: CertificateSigningRequestCondition,
) -> Result<(), kube::Error> {
    let mut conditions = conditions.to_vec();
    conditions.push(added);
    // Judged was this version, and no other is answered.
    let patch = json!({"metadata": {"resourceVersion": version},
                       "status": {"conditions": conditions}});
    let (params, patch) = (PatchParams::default(), Patch::Merge(&patch));
    let answered = api.patch_approval(name, &params, &patch).await;
    answered.map(|_| ())
}

async fn collect(
    api: &Api<CertificateSigningRequest>,
    name: &str,
    version: &str,
) -> Result<(), kube::Error> {
    let params = DeleteParams {
        preconditions: Some(Preconditions {
            resource_version: Some(version.to_owned()),
            uid: None,
        }),
        ..DeleteParams::default()
    };
    api.delete(name, &params).await.map(|_| ())
}

/// Conditions of requests are always true once they stand.
pub(in crate::control) fn condition(
    kind: &str,
    reason: &str,
    message: &str,
) -> CertificateSigningRequestCondition {
    CertificateSigningRequestCondition {
        type_: kind.to_owned(),
        status: "True".to_owned(),
        reason: Some(reason.to_owned()),
        message: Some(message.to_owned()),
        last_update_time: Some(Time(Timestamp::now())),
        last_transition_time: None,
    }
}

//! The signer: the only one that reads the authority's key.
//!
//! It keeps the authority ([`keeper`], [`anchors`]) and signs what is approved. An approval alone is
//! not believed: every check that needs no state is made once more ([`Rules`]), and the certificate
//! is built here, from the public key and the one identity, with nothing else of the request. It
//! knows nothing of pods and cannot approve.
//!
//! What it will never sign ends as a `Failed` condition with reason and message. While there is no
//! authority yet, requests wait.

mod anchors;
mod keeper;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
    time::{Duration, SystemTime},
};

use futures_util::StreamExt;
use k8s_openapi::{
    ByteString,
    api::certificates::v1::{CertificateSigningRequest, CertificateSigningRequestCondition},
};
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
    core::ApiResource,
};
use serde_json::{Value, json};
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time::{Instant, sleep_until, timeout},
};
use tracing::{info, warn};

use super::{
    SIGNER,
    ask::{Reason, Refusal, Rules, Stage, is_ours},
    controller::condition,
    counts::Counts,
    feed::{self, Told},
};
use crate::{
    identity::{
        authority::{Authority, to_pem},
        clock::Clock,
    },
    k8s::{
        Seen,
        events::{Component, Events},
        watch as watches,
    },
};
use keeper::Keeper;

pub use keeper::{ISSUER, Settings as KeeperSettings};

/// The Lease of the one that acts.
pub const LEASE: &str = "picomesh-signer";
pub const COMPONENT: Component = Component {
    name: "picomesh-signer",
    action: "KeepAuthority",
};

/// How often Secret and ConfigMap are read: the rights are to get these two, not to watch.
const LOOK: Duration = Duration::from_secs(10);
/// While there is nobody to sign.
const LOOK_SOON: Duration = Duration::from_secs(1);
const GATHER: Duration = Duration::from_millis(20);
const AT_ONCE: usize = 8;
/// For one write.
const ANSWER: Duration = Duration::from_secs(10);
const AGAIN: Duration = Duration::from_secs(2);

#[derive(Clone, Debug)]
pub struct Settings {
    pub rules: Rules,
    pub keeper: KeeperSettings,
}

/// What the signer is given besides.
pub struct Surroundings {
    pub client: Client,
    pub clock: Arc<dyn Clock>,
    pub events: Events,
    pub leading: watch::Receiver<bool>,
    /// Told whether this one may lead: not while its clock is wrong.
    pub fit: watch::Sender<bool>,
    pub counts: Arc<Counts>,
}

/// Approved requests, as they were last seen.
#[derive(Default)]
struct Approved {
    known: HashMap<Arc<str>, Waiting>,
    listed: Option<BTreeSet<Arc<str>>>,
}

struct Waiting {
    request: CertificateSigningRequest,
    again: Option<Instant>,
}

/// Until `stop`. `ready`: somebody can sign.
pub async fn run(
    settings: Settings,
    around: Surroundings,
    ready: impl FnOnce() + Send,
    stop: impl Future<Output = ()> + Send,
) {
    let Surroundings {
        client,
        clock,
        events,
        mut leading,
        fit,
        counts,
    } = around;
    let (tell, mut told) = mpsc::channel(feed::QUEUE);
    let mut feeds = JoinSet::new();
    let of = ApiResource::erase::<CertificateSigningRequest>(&());
    let all = Api::<Seen>::all_with(client.clone(), &of);
    let ours = watches::config_of_many().fields(&format!("spec.signerName={SIGNER}"));
    feeds.spawn(feed::follow(
        (),
        "CertificateSigningRequest",
        all,
        ours,
        tell,
    ));

    let api = Api::<CertificateSigningRequest>::all(client.clone());
    let mut keeper = Keeper::new(client, settings.keeper, clock.clone(), events);
    let mut approved = Approved::default();
    let mut ready = Some(ready);
    let mut looked: Option<Instant> = None;
    let mut due = Instant::now();
    let mut stop = std::pin::pin!(stop);
    loop {
        tokio::select! {
            () = &mut stop => return,
            message = told.recv() => {
                let Some(((), told)) = message else { return };
                approved.hear(told);
                due = due.min(Instant::now() + GATHER);
                continue;
            }
            changed = leading.changed() => {
                if changed.is_err() {
                    return;
                }
                // Whoever leads now looks at once.
                looked = None;
            }
            () = sleep_until(due) => {}
        }
        let leads = *leading.borrow_and_update();
        let pause = if keeper.authority().is_some() {
            LOOK
        } else {
            LOOK_SOON
        };
        if looked.is_none_or(|at| at.elapsed() >= pause) {
            looked = Some(Instant::now());
            let look = tokio::select! {
                look = timeout(3 * ANSWER, keeper.look(leads)) => look,
                () = &mut stop => return,
            };
            match look {
                Ok(Ok(())) => {}
                Ok(Err(error)) => warn!(%error, "the authority cannot be looked at; what is known \
                                                 signs on"),
                Err(_late) => warn!("the API server does not answer; what is known signs on"),
            }
            fit.send_if_modified(|fit| {
                std::mem::replace(fit, !keeper.clock_is_wrong()) == keeper.clock_is_wrong()
            });
        }
        due = Instant::now() + LOOK_SOON;
        let authority = keeper.authority();
        let ends = authority.as_ref().map(|authority| authority.not_after);
        counts.authority(ends, keeper.is_troubled());
        counts.waiting(approved.known.len());
        let Some(authority) = authority else { continue };
        if let Some(ready) = ready.take() {
            ready();
        }
        if !leads || keeper.clock_is_wrong() {
            continue;
        }
        let hand = Hand {
            api: &api,
            rules: &settings.rules,
            authority: &authority,
            now: clock.now(),
            leading: &leading,
            counts: &counts,
        };
        let answering = futures_util::stream::iter(approved.due(Instant::now()))
            .map(|(name, request)| hand.answer(name, request))
            .buffer_unordered(AT_ONCE)
            .collect::<Vec<_>>();
        let answered = tokio::select! {
            answered = answering => answered,
            () = &mut stop => return,
        };
        for (name, well) in answered {
            if let Some(waiting) = approved.known.get_mut(&name) {
                // What was answered comes back by the watch, and no longer waits.
                let pause = if well { 3 * AGAIN } else { AGAIN };
                waiting.again = Some(Instant::now() + pause);
            }
        }
    }
}

impl Approved {
    fn hear(&mut self, told: Told) {
        match told {
            Told::Failed => {}
            Told::Listing => self.listed = Some(BTreeSet::new()),
            Told::Listed => {
                let listed = self.listed.take().unwrap_or_default();
                self.known.retain(|name, _| listed.contains(name));
            }
            Told::There(seen) => {
                let name: Arc<str> = seen.name().into();
                if let Some(listed) = &mut self.listed {
                    listed.insert(Arc::clone(&name));
                }
                match seen.parse::<CertificateSigningRequest>() {
                    Ok(request) if is_ours(&request) && Stage::of(&request) == Stage::Approved => {
                        let again = None;
                        self.known.insert(name, Waiting { request, again });
                    }
                    Ok(_) => drop(self.known.remove(&name)),
                    Err(error) => {
                        warn!(request = &*name, %error, "does not read");
                        self.known.remove(&name);
                    }
                }
            }
            Told::Gone(seen) => drop(self.known.remove(seen.name())),
        }
    }

    fn due(&self, now: Instant) -> Vec<(Arc<str>, CertificateSigningRequest)> {
        let due = |waiting: &Waiting| waiting.again.is_none_or(|again| again <= now);
        let due = self.known.iter().filter(|(_, waiting)| due(waiting));
        due.map(|(name, waiting)| (Arc::clone(name), waiting.request.clone()))
            .collect()
    }
}

/// What one signature needs.
struct Hand<'a> {
    api: &'a Api<CertificateSigningRequest>,
    rules: &'a Rules,
    authority: &'a Authority,
    now: SystemTime,
    leading: &'a watch::Receiver<bool>,
    counts: &'a Counts,
}

impl Hand<'_> {
    /// `true`: it is answered, or was somebody else's.
    async fn answer(&self, name: Arc<str>, request: CertificateSigningRequest) -> (Arc<str>, bool) {
        if !*self.leading.borrow() {
            return (name, false);
        }
        let signed = self.sign(&request);
        let version = &request.metadata.resource_version;
        let status = match &signed {
            Ok((_, chain)) => json!({"certificate": chain}),
            Err(refusal) => failed(request.status.and_then(|own| own.conditions), refusal),
        };
        // Only what was judged is answered.
        let patch = json!({"metadata": {"resourceVersion": version}, "status": status});
        let (params, patch) = (PatchParams::default(), Patch::Merge(&patch));
        let written = timeout(ANSWER, self.api.patch_status(&name, &params, &patch)).await;
        let request = &*name;
        match written {
            Ok(Ok(_)) => match signed {
                Ok((identity, _)) => {
                    self.counts.good();
                    info!(request, identity, "signed");
                }
                Err(Refusal { reason, message }) => {
                    self.counts.refused(reason);
                    warn!(request, reason = reason.as_str(), message, "not signed");
                }
            },
            // It has changed or is gone: the watch tells.
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

    /// The identity, and the chain as it stands on the object.
    fn sign(&self, request: &CertificateSigningRequest) -> Result<(String, ByteString), Refusal> {
        let ask = self.rules.read(request)?;
        if self.now >= self.authority.not_after {
            return Err(Refusal::new(
                Reason::IssuerExpired,
                format!("the issuer in the Secret {ISSUER} has ended; renew it"),
            ));
        }
        let identity = ask.identity();
        let signed = self
            .authority
            .sign(identity, &ask.claim.key, self.now, ask.life)
            .map_err(|problem| Refusal::new(Reason::CannotSign, problem))?;
        let chain: String = signed.chain.iter().map(|der| to_pem(der)).collect();
        Ok((identity.to_string(), ByteString(chain.into_bytes())))
    }
}

fn failed(before: Option<Vec<CertificateSigningRequestCondition>>, refusal: &Refusal) -> Value {
    let mut conditions = before.unwrap_or_default();
    conditions.push(condition(
        "Failed",
        refusal.reason.as_str(),
        &refusal.message,
    ));
    json!({"conditions": conditions})
}

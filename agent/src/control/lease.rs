//! One of several replicas acts: whoever holds the Lease.
//!
//! The holder writes it anew every [`RENEW`]. Who does not hold it looks as often, and takes it the
//! moment it has not changed for [`LIFE`] *on the looker's own clock*: two machines' clocks are never
//! compared. A holder that has not managed to renew for [`GIVE_UP`], which is shorter, stops acting
//! by itself, so that two never act for longer than one request takes; and what they write carries
//! the version it was read at, so that even then one of them is refused.
//!
//! What a holder wrote last is seen one look ([`RENEW`] and an answer) later at most, and [`LIFE`]
//! after that it is replaced: within 15 seconds. One that ends in peace lets go and is replaced at
//! the next look; so does one that finds itself unfit, until it is fit again.

use std::{sync::Arc, time::Duration};

use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::MicroTime,
    jiff::Timestamp,
};
use kube::{
    Api, Client,
    api::{ObjectMeta, PostParams},
};
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};
use tracing::{debug, info, warn};

const LIFE: Duration = Duration::from_secs(10);
const RENEW: Duration = Duration::from_secs(2);
const GIVE_UP: Duration = Duration::from_secs(8);
/// For one request. What takes longer counts as failed.
const ANSWER: Duration = Duration::from_secs(3);

/// A candidate.
pub struct Election {
    api: Api<Lease>,
    name: Arc<str>,
    /// Ours alone: no other process was or will be called the same.
    own: String,
    leading: watch::Sender<bool>,
    /// Of a candidate that may find that another would do better.
    fit: Option<watch::Receiver<bool>>,
    seen: Seen,
}

/// The Lease as it was last seen to change.
struct Seen {
    lease: Option<Lease>,
    changed: Instant,
    /// When we last wrote it as its holder.
    renewed: Option<Instant>,
}

impl Election {
    /// `pod` is for people; two processes of one pod are still two.
    pub fn new(client: Client, namespace: &str, name: &str, pod: &str) -> Self {
        Self {
            api: Api::namespaced(client, namespace),
            name: name.into(),
            own: format!("{pod}_{:016x}", fastrand::u64(..)),
            leading: watch::Sender::new(false),
            fit: None,
            seen: Seen {
                lease: None,
                changed: Instant::now(),
                renewed: None,
            },
        }
    }

    /// Leads only while `fit`.
    pub fn while_fit(mut self, fit: watch::Receiver<bool>) -> Self {
        self.fit = Some(fit);
        self
    }

    /// Whether we are the one, from now on.
    pub fn leading(&self) -> watch::Receiver<bool> {
        self.leading.subscribe()
    }

    /// Until `end`; then lets go.
    pub async fn run(mut self, end: impl Future<Output = ()> + Send) {
        let mut end = std::pin::pin!(end);
        let mut complained = false;
        loop {
            if self
                .fit
                .as_mut()
                .is_some_and(|fit| !*fit.borrow_and_update())
            {
                self.step_aside().await;
                tokio::select! {
                    () = next(&mut self.fit) => continue,
                    () = &mut end => return,
                }
            }
            // Whoever leads must not wait past the moment in which it stops.
            let patience = self.leads_for().unwrap_or(ANSWER).min(ANSWER);
            match timeout(patience, self.look()).await.unwrap_or_else(|late| {
                let late = std::io::Error::new(std::io::ErrorKind::TimedOut, late);
                Err(kube::Error::Service(late.into()))
            }) {
                Ok(()) => complained = false,
                Err(error) => {
                    debug!(%error, lease = &*self.name, "the Lease");
                    if !std::mem::replace(&mut complained, true) {
                        warn!(%error, lease = &*self.name, "the Lease cannot be kept or taken");
                    }
                }
            }
            self.judge();
            let pause = RENEW.mul_f64(0.8 + 0.2 * fastrand::f64());
            tokio::select! {
                () = sleep(self.next_change().map_or(pause, |at| at.min(pause))) => self.judge(),
                () = next(&mut self.fit) => {}
                () = &mut end => break,
            }
        }
        self.step_aside().await;
    }

    /// Leads no more, and says so.
    async fn step_aside(&mut self) {
        self.seen.renewed = None;
        let held = *self.leading.borrow();
        self.judge();
        if held && let Err(error) = self.let_go().await {
            debug!(%error, lease = &*self.name, "the Lease was not given back; it runs out");
        }
    }

    /// Who has held it lately leads, and nobody else.
    fn judge(&self) {
        let leads = self.seen.renewed.is_some_and(|at| at.elapsed() < GIVE_UP);
        self.leading.send_if_modified(|leading| {
            let changed = *leading != leads;
            if changed {
                info!(lease = &*self.name, own = self.own, leads, "leader");
            }
            *leading = leads;
            changed
        });
    }

    /// Until we no longer lead unless something happens. `None`: we do not lead.
    fn leads_for(&self) -> Option<Duration> {
        let spent = self.seen.renewed?.elapsed();
        GIVE_UP.checked_sub(spent).filter(|left| !left.is_zero())
    }

    /// Until it becomes ours to lose, or to take.
    fn next_change(&self) -> Option<Duration> {
        let free = || LIFE.checked_sub(self.seen.changed.elapsed());
        let next = self.leads_for().or_else(free);
        next.filter(|left| !left.is_zero())
    }

    async fn look(&mut self) -> Result<(), kube::Error> {
        let found = self.api.get_opt(&self.name).await?;
        let version = |lease: &Option<Lease>| lease.as_ref()?.metadata.resource_version.clone();
        if version(&found) != version(&self.seen.lease) {
            self.seen.changed = Instant::now();
            self.seen.lease.clone_from(&found);
        }
        let spec = found.as_ref().and_then(|lease| lease.spec.as_ref());
        let holder = spec.and_then(|spec| spec.holder_identity.as_deref());
        let ours = holder == Some(&self.own);
        if !ours {
            // Taken from us, by somebody who saw it run out.
            self.seen.renewed = None;
        }
        let free = holder.is_none_or(str::is_empty) || self.seen.changed.elapsed() >= LIFE;
        if !ours && !free {
            return Ok(());
        }
        // What counts is when we asked: the answer may have taken its time.
        let asked = Instant::now();
        match self.write(found.as_ref(), &self.own, LIFE).await {
            Ok(lease) => {
                self.seen = Seen {
                    lease: Some(lease),
                    changed: asked,
                    renewed: Some(asked),
                };
                Ok(())
            }
            // Somebody was quicker.
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn let_go(&self) -> Result<(), kube::Error> {
        let Some(lease) = &self.seen.lease else {
            return Ok(());
        };
        match timeout(ANSWER, self.write(Some(lease), "", Duration::from_secs(1))).await {
            Ok(written) => written.map(|_| ()),
            Err(_late) => Ok(()),
        }
    }

    async fn write(
        &self,
        before: Option<&Lease>,
        holder: &str,
        life: Duration,
    ) -> Result<Lease, kube::Error> {
        let now = MicroTime(Timestamp::now());
        let none = LeaseSpec::default();
        let known = before
            .and_then(|lease| lease.spec.as_ref())
            .unwrap_or(&none);
        let same = known.holder_identity.as_deref() == Some(holder);
        let changes = known.lease_transitions.unwrap_or_default();
        let lease = Lease {
            metadata: ObjectMeta {
                name: Some(self.name.to_string()),
                // Refused if somebody has written it since.
                resource_version: before.and_then(|own| own.metadata.resource_version.clone()),
                ..ObjectMeta::default()
            },
            spec: Some(LeaseSpec {
                holder_identity: Some(holder.to_owned()),
                lease_duration_seconds: i32::try_from(life.as_secs()).ok(),
                acquire_time: known
                    .acquire_time
                    .clone()
                    .filter(|_| same)
                    .or_else(|| Some(now.clone())),
                renew_time: Some(now),
                lease_transitions: Some(changes + i32::from(!same)),
                ..LeaseSpec::default()
            }),
        };
        let params = PostParams::default();
        match before {
            None => self.api.create(&params, &lease).await,
            Some(_) => self.api.replace(&self.name, &params, &lease).await,
        }
    }
}

/// When it may be otherwise.
async fn next(fit: &mut Option<watch::Receiver<bool>>) {
    if let Some(fit) = fit
        && fit.changed().await.is_ok()
    {
        return;
    }
    std::future::pending().await
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;

    use super::*;
    use crate::testing::api::Api as Server;

    const LEASES: &str = "/apis/coordination.k8s.io/v1/namespaces/picomesh-system/leases";

    /// A replica that runs until it is told to end.
    struct Replica {
        leading: watch::Receiver<bool>,
        end: Option<oneshot::Sender<()>>,
        task: tokio::task::JoinHandle<()>,
    }

    impl Replica {
        fn start(server: &Server, pod: &str) -> Self {
            Self::stand(Election::new(
                server.client(),
                "picomesh-system",
                "one",
                pod,
            ))
        }

        fn stand(election: Election) -> Self {
            let leading = election.leading();
            let (end, ended) = oneshot::channel();
            let task = tokio::spawn(election.run(async move {
                let _ended = ended.await;
            }));
            let end = Some(end);
            Self { leading, end, task }
        }

        fn leads(&self) -> bool {
            *self.leading.borrow()
        }

        /// How long until it does.
        async fn wins(&mut self) -> Duration {
            let begun = Instant::now();
            self.leading.wait_for(|leads| *leads).await.unwrap();
            begun.elapsed()
        }
    }

    fn holder(server: &Server) -> String {
        let lease = server.get(LEASES, "picomesh-system/one").unwrap();
        let holder = lease["spec"]["holderIdentity"].as_str();
        holder.unwrap().to_owned()
    }

    #[tokio::test(start_paused = true)]
    async fn of_replicas_that_start_at_once_one_leads_and_stays() {
        let server = Server::default();
        let replicas: Vec<_> = ["a", "b", "c"]
            .map(|pod| Replica::start(&server, pod))
            .into();
        for _ in 0..20 {
            sleep(RENEW).await;
            assert_eq!(replicas.iter().filter(|replica| replica.leads()).count(), 1);
        }
        let lease = server.get(LEASES, "picomesh-system/one").unwrap();
        assert_eq!(lease["spec"]["leaseTransitions"], 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_lost_leader_is_replaced_within_fifteen_seconds() {
        // The worst of many: it depends on who looked when.
        for round in 0..50 {
            let server = Server::default();
            let mut first = Replica::start(&server, "first");
            first.wins().await;
            let mut second = Replica::start(&server, "second");
            sleep(Duration::from_secs(60) + RENEW * round / 50).await;
            assert!(!second.leads());
            first.task.abort();
            let took = second.wins().await;
            assert!(took <= Duration::from_secs(13), "{took:?}");
            assert!(
                took >= Duration::from_secs(6),
                "{took:?}: it may have lived"
            );
            assert!(holder(&server).starts_with("second_"));
            second.task.abort();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_leader_that_ends_lets_go_and_the_next_one_leads_at_its_next_look() {
        let server = Server::default();
        let mut first = Replica::start(&server, "first");
        first.wins().await;
        let mut second = Replica::start(&server, "second");
        sleep(RENEW).await;
        first.end.take();
        (&mut first.task).await.unwrap();
        assert!(!first.leads());
        let took = second.wins().await;
        assert!(took <= RENEW, "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_leader_that_is_unfit_lets_go_until_it_is_fit_and_the_lease_is_free() {
        let server = Server::default();
        let (judge, fit) = watch::channel(true);
        let election = Election::new(server.client(), "picomesh-system", "one", "first");
        let mut first = Replica::stand(election.while_fit(fit));
        first.wins().await;
        let mut second = Replica::start(&server, "second");
        sleep(RENEW).await;
        judge.send_replace(false);
        let took = second.wins().await;
        assert!(took <= RENEW, "{took:?}");
        assert!(!first.leads());
        second.task.abort();
        sleep(3 * LIFE).await;
        assert!(!first.leads(), "it is free, and not for who is unfit");
        judge.send_replace(true);
        assert!(first.wins().await <= LIFE + RENEW);
        // Nobody judges any more: it goes by what was said last.
        drop(judge);
        sleep(LIFE).await;
        assert!(first.leads());
    }

    #[tokio::test(start_paused = true)]
    async fn a_leader_that_cannot_renew_stops_before_another_may_begin() {
        let server = Server::default();
        let mut first = Replica::start(&server, "first");
        first.wins().await;
        server.set_away(true);
        let begun = Instant::now();
        first.leading.wait_for(|leads| !*leads).await.unwrap();
        assert!(begun.elapsed() <= GIVE_UP, "{:?}", begun.elapsed());
        assert!(begun.elapsed() >= GIVE_UP - RENEW, "{:?}", begun.elapsed());
        // It is its own still when the API server is back.
        server.set_away(false);
        assert!(first.wins().await <= 2 * RENEW);
    }

    #[tokio::test(start_paused = true)]
    async fn a_leader_whose_lease_was_taken_stops_at_its_next_look() {
        let server = Server::default();
        let mut first = Replica::start(&server, "first");
        first.wins().await;
        let mut lease = server.get(LEASES, "picomesh-system/one").unwrap();
        lease["spec"]["holderIdentity"] = "somebody".into();
        server.put(LEASES, lease);
        let begun = Instant::now();
        first.leading.wait_for(|leads| !*leads).await.unwrap();
        assert!(begun.elapsed() <= RENEW);
        assert_eq!(holder(&server), "somebody");
    }
}

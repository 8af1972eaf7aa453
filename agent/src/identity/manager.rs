//! Holds a valid certificate for every identity that is wanted, and renews it in time.
//!
//! `app` starts it with a [`Signer`] and tells it what is wanted; `proxy` takes TLS configurations
//! from it; `admin` and `metrics` read its status. It must not know who signs or how.
//!
//! One task, the driver, does all the work and is the only writer. Readers see immutable tables
//! behind an [`ArcSwap`] and take no lock. When to do what is decided in [`super::schedule`], which
//! has no clock; the driver supplies the time and sleeps. It never sleeps longer than
//! [`LONGEST_SLEEP`], because wall time may jump and nothing tells us.
//!
//! A signer that fails costs nothing as long as the certificate in hand is valid. When it expires
//! it is no longer used: neither shown to clients nor to servers, and [`NoCertificate`] says why.

use std::{
    collections::{BTreeSet, HashMap},
    fmt,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use arc_swap::ArcSwap;
use rustls::{
    pki_types::CertificateDer,
    sign::{CertifiedKey, SigningKey},
};
use tokio::{
    sync::watch,
    task::{self, JoinHandle, JoinSet},
    time::Instant,
};
use x509_parser::{certificate::X509Certificate, prelude::FromDer};

use crate::state::Identity;

use super::{
    Bundle, CertificateStatus, SignError, Signed, Signer, Wanted,
    clock::{Clock, SystemClock},
    csr::{Request, public_key, signing_key},
    schedule::{Now, Schedule, Validity},
    spiffe::server_name_text,
    tls::{Certificates, Tls, tls_reason},
};

/// Requests under way at once: enough for a node that starts, too few to flood a signer.
const ASKING: usize = 8;
const LONGEST_SLEEP: Duration = Duration::from_secs(30);
/// Client configurations kept per source. A node calls far fewer identities; beyond this the
/// cache starts again, which costs a pooled tunnel at most a new handshake.
const CLIENT_CONFIGS: usize = 1024;

/// What the manager must be told.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Servers accept workloads of this trust domain only.
    pub trust_domain: Arc<str>,
    pub clock: Arc<dyn Clock>,
    /// How long one request to the signer may take.
    pub sign_timeout: Duration,
}

impl Settings {
    pub fn new(trust_domain: Arc<str>) -> Self {
        Self {
            trust_domain,
            clock: Arc::new(SystemClock),
            sign_timeout: Duration::from_secs(30),
        }
    }
}

/// Shared handle; cheap to clone. When the last one is gone the driver ends.
#[derive(Clone)]
pub struct Identities {
    table: Arc<ArcSwap<Table>>,
    status: Arc<ArcSwap<Vec<CertificateStatus>>>,
    tls: Tls,
    clock: Arc<dyn Clock>,
    server: Arc<rustls::ServerConfig>,
    orders: watch::Sender<Order>,
    changes: watch::Receiver<u64>,
}

/// There is no usable certificate for the identity now.
#[derive(Debug, thiserror::Error)]
#[error("no certificate for {identity} yet: {reason}")]
pub struct NoCertificate {
    pub identity: Identity,
    pub reason: String,
}

/// A certificate and its key, as one agent leaves them to the next. Not `Debug`.
#[derive(Clone)]
pub struct Held {
    pub identity: Identity,
    /// Leaf first.
    pub chain: Vec<CertificateDer<'static>>,
    pub pkcs8: Arc<[u8]>,
}

impl Identities {
    /// With nothing in hand.
    pub fn start(
        signer: Arc<dyn Signer>,
        settings: Settings,
    ) -> Result<(Self, JoinHandle<()>), rustls::Error> {
        Self::start_with(signer, settings, Vec::new())
    }

    /// Starts the driver on the current runtime, with what an agent before left: of that, what is
    /// valid now and would be accepted by peers is used from the first moment on. It ends at [`Identities::stop`] or with the last
    /// handle; requests under way are abandoned then.
    pub fn start_with(
        signer: Arc<dyn Signer>,
        settings: Settings,
        held: Vec<Held>,
    ) -> Result<(Self, JoinHandle<()>), rustls::Error> {
        let mut bundle = signer.bundle();
        let current = bundle.borrow_and_update().clone();
        let tls = Tls::new(settings.trust_domain, &current, settings.clock.clone());
        let table = Arc::new(ArcSwap::from_pointee(Table::default()));
        let status = Arc::new(ArcSwap::from_pointee(Vec::new()));
        let (orders, orders_seen) = watch::channel(Order::default());
        let (changed, changes) = watch::channel(0);

        let server = tls.server(Arc::new(ByServerName {
            table: table.clone(),
            clock: settings.clock.clone(),
        }))?;
        let mut driver = Driver {
            signer,
            bundle: Some(bundle),
            sign_timeout: settings.sign_timeout,
            schedule: Schedule::default(),
            asking: JoinSet::new(),
            open: HashMap::new(),
            asked: HashMap::new(),
            expired: BTreeSet::new(),
            tls: tls.clone(),
            clock: settings.clock.clone(),
            table: table.clone(),
            status: status.clone(),
            orders: orders_seen,
            changed,
        };
        driver.take_up(held);
        let handle = Self {
            table,
            status,
            tls,
            clock: settings.clock,
            server: Arc::new(server),
            orders,
            changes,
        };
        Ok((handle, tokio::spawn(driver.run())))
    }

    /// For a tunnel as `source` to a server that must prove to be `server` (exactly that SPIFFE
    /// URI, nothing else is looked at). ALPN is set to `h2`. The same `Arc` comes back until
    /// certificate or bundle change, so that sessions can be pooled by it.
    pub fn client_config(
        &self,
        source: &Identity,
        server: &Identity,
    ) -> Result<Arc<rustls::ClientConfig>, NoCertificate> {
        let table = self.table.load();
        let own = self.usable(&table, source)?;
        if let Some(config) = own.clients.load().get(server) {
            return Ok(config.clone());
        }
        let fresh = self
            .tls
            .client(server.clone(), own.certified.clone())
            .map_err(|error| NoCertificate {
                identity: source.clone(),
                reason: error.to_string(),
            })?;
        Ok(own.remember(server, Arc::new(fresh)))
    }

    /// For the node's tunnel port: picks the certificate by SNI among the identities we hold,
    /// demands and verifies the client's certificate. It follows every change by itself.
    pub fn server_config(&self) -> Arc<rustls::ServerConfig> {
        self.server.clone()
    }

    /// For HBONE to a pod's own address: serves `identity` whatever the SNI says.
    pub fn server_config_for(
        &self,
        identity: &Identity,
    ) -> Result<Arc<rustls::ServerConfig>, NoCertificate> {
        let table = self.table.load();
        Ok(self.usable(&table, identity)?.server.clone())
    }

    /// Which of our identities a client asked for by this SNI.
    pub fn by_server_name(&self, sni: &str) -> Option<Identity> {
        self.table.load().by_server_name(sni).cloned()
    }

    /// Replaces the set of identities to hold. What is no longer in it is held for another minute:
    /// a pod that has just left the mesh may still be called.
    pub fn set_wanted(&self, wanted: Wanted) {
        self.orders.send_modify(|order| order.wanted = wanted);
    }

    /// Grows with every certificate or bundle that comes, changes or goes. Configurations are to
    /// be asked for anew then; standing connections need nothing.
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.changes.clone()
    }

    /// What is held and valid, to be left to the next agent.
    pub fn held(&self) -> Vec<Held> {
        let (table, now) = (self.table.load(), self.clock.now());
        let valid = table.held.iter().filter(|(_, own)| own.validity.holds(now));
        let mut all: Vec<Held> = valid
            .map(|(identity, own)| Held {
                identity: identity.clone(),
                chain: own.certified.cert.clone(),
                pkcs8: own.pkcs8.clone(),
            })
            .collect();
        all.sort_by(|a, b| a.identity.cmp(&b.identity));
        all
    }

    /// Is there a certificate for it, whatever its age?
    pub fn holds(&self, identity: &Identity) -> bool {
        self.table.load().held.contains_key(identity)
    }

    /// Was the last word of the signer on it a no?
    pub fn is_refused(&self, identity: &Identity) -> bool {
        let name = identity.to_string();
        let status = self.status.load();
        status.iter().any(|one| one.refused && one.identity == name)
    }

    pub fn status(&self) -> Vec<CertificateStatus> {
        let now = self.clock.now();
        let mut list = self.status.load().as_ref().clone();
        for entry in &mut list {
            if entry.not_after.is_some_and(|end| end <= now) {
                entry.state = "expired";
            }
        }
        list
    }

    /// Ends the driver; what is held serves on until it expires.
    pub fn stop(&self) {
        self.orders.send_modify(|order| order.stop = true);
    }

    fn usable<'a>(
        &self,
        table: &'a Table,
        identity: &Identity,
    ) -> Result<&'a Arc<Own>, NoCertificate> {
        let reason = match table.held.get(identity) {
            Some(own) if own.validity.holds(self.clock.now()) => return Ok(own),
            Some(_) => self.why_not(identity, "it has expired"),
            None => self.why_not(identity, "it has been asked for"),
        };
        Err(NoCertificate {
            identity: identity.clone(),
            reason,
        })
    }

    fn why_not(&self, identity: &Identity, otherwise: &str) -> String {
        let name = identity.to_string();
        let status = self.status.load();
        match status.iter().find(|entry| entry.identity == name) {
            Some(CertificateStatus {
                last_error: Some(error),
                ..
            }) => error.clone(),
            Some(_) => otherwise.to_owned(),
            None => "it is not among the identities of this node".to_owned(),
        }
    }
}

impl fmt::Debug for Identities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identities")
            .field("held", &self.table.load().held.len())
            .finish_non_exhaustive()
    }
}

/// What the handle asks of the driver.
#[derive(Default)]
struct Order {
    wanted: Wanted,
    stop: bool,
}

/// Everything a handshake needs, immutable; replaced whole.
#[derive(Default)]
struct Table {
    held: HashMap<Identity, Arc<Own>>,
    /// By what stands in the SNI.
    names: HashMap<Box<str>, Identity>,
}

impl Table {
    fn by_server_name(&self, sni: &str) -> Option<&Identity> {
        if sni.bytes().any(|byte| byte.is_ascii_uppercase()) {
            self.names.get(sni.to_ascii_lowercase().as_str())
        } else {
            self.names.get(sni)
        }
    }

    fn replace(&self, identity: &Identity, own: Option<Arc<Own>>) -> Self {
        let (mut held, mut names) = (self.held.clone(), self.names.clone());
        let name = server_name_text(identity).into_boxed_str();
        match own {
            Some(own) => {
                held.insert(identity.clone(), own);
                names.insert(name, identity.clone());
            }
            None => {
                held.remove(identity);
                names.remove(&name);
            }
        }
        Self { held, names }
    }
}

/// One of our identities: a certificate, its key, and the configurations made of them.
struct Own {
    certified: Arc<CertifiedKey>,
    /// Its key, for the snapshot.
    pkcs8: Arc<[u8]>,
    validity: Validity,
    /// Serves this identity whatever the SNI says.
    server: Arc<rustls::ServerConfig>,
    /// By the server that is called. Copied when it grows: reads are many, growth is rare.
    clients: ArcSwap<HashMap<Identity, Arc<rustls::ClientConfig>>>,
}

impl Own {
    /// Keeps `fresh` unless another thread was faster; returns what is kept.
    fn remember(
        &self,
        server: &Identity,
        fresh: Arc<rustls::ClientConfig>,
    ) -> Arc<rustls::ClientConfig> {
        self.clients.rcu(|known| {
            if known.contains_key(server) {
                return known.clone();
            }
            let mut grown = if known.len() < CLIENT_CONFIGS {
                HashMap::clone(known)
            } else {
                HashMap::new()
            };
            grown.insert(server.clone(), fresh.clone());
            Arc::new(grown)
        });
        self.clients.load().get(server).cloned().unwrap_or(fresh)
    }

    /// The same certificate with no configurations yet, after the anchors have changed.
    fn anew(&self) -> Self {
        Self {
            certified: self.certified.clone(),
            pkcs8: self.pkcs8.clone(),
            validity: self.validity.clone(),
            server: self.server.clone(),
            clients: ArcSwap::default(),
        }
    }
}

/// The tunnel port's choice: the SNI names one of the identities we hold, or there is none.
struct ByServerName {
    table: Arc<ArcSwap<Table>>,
    clock: Arc<dyn Clock>,
}

impl Certificates for ByServerName {
    fn pick(&self, server_name: Option<&str>) -> Option<Arc<CertifiedKey>> {
        let table = self.table.load();
        let own = table.held.get(table.by_server_name(server_name?)?)?;
        own.validity
            .holds(self.clock.now())
            .then(|| own.certified.clone())
    }
}

impl fmt::Debug for ByServerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ByServerName")
    }
}

/// A pod's own port: always the same certificate, until it expires.
struct Always {
    certified: Arc<CertifiedKey>,
    validity: Validity,
    clock: Arc<dyn Clock>,
}

impl Certificates for Always {
    fn pick(&self, _server_name: Option<&str>) -> Option<Arc<CertifiedKey>> {
        self.validity
            .holds(self.clock.now())
            .then(|| self.certified.clone())
    }
}

impl fmt::Debug for Always {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Always")
            .field("serial", &self.validity.serial)
            .finish_non_exhaustive()
    }
}

/// The one writer.
struct Driver {
    signer: Arc<dyn Signer>,
    /// `None` when the signer has gone: the last bundle stays in force.
    bundle: Option<watch::Receiver<Arc<Bundle>>>,
    sign_timeout: Duration,
    schedule: Schedule,
    asking: JoinSet<Result<Answer, Failed>>,
    /// Requests that nobody has answered yet, for the next try.
    open: HashMap<Identity, Request>,
    /// Whose request a task is, also if it panics.
    asked: HashMap<task::Id, Identity>,
    /// Whose end has been told already.
    expired: BTreeSet<Identity>,
    tls: Tls,
    clock: Arc<dyn Clock>,
    table: Arc<ArcSwap<Table>>,
    status: Arc<ArcSwap<Vec<CertificateStatus>>>,
    orders: watch::Receiver<Order>,
    changed: watch::Sender<u64>,
}

struct Answer {
    request: Request,
    signed: Signed,
}

struct Failed {
    error: SignError,
    /// It is not answered, so the next try goes on with it.
    open: Option<Box<Request>>,
}

/// A key, and what is said to be its certificate.
struct Pair {
    chain: Vec<CertificateDer<'static>>,
    key: Arc<dyn SigningKey>,
    pkcs8: Arc<[u8]>,
    public_key: Vec<u8>,
}

impl Driver {
    async fn run(mut self) {
        loop {
            let now = self.now();
            self.forget_gone(now);
            self.tell_expired(now);
            self.ask_for_due(now);
            self.status.store(Arc::new(self.schedule.status(now.wall)));
            let sleep = self
                .schedule
                .idle_for(now)
                .map_or(LONGEST_SLEEP, |idle| idle.min(LONGEST_SLEEP));
            // What is due now waits for a free place among the requests, not for time.
            let full = self.asking.len() >= ASKING;
            let sleep = if full { LONGEST_SLEEP } else { sleep };

            tokio::select! {
                order = self.orders.changed() => {
                    if order.is_err() || self.orders.borrow().stop {
                        return;
                    }
                    let now = self.now();
                    self.schedule.want(&self.orders.borrow_and_update().wanted, now);
                }
                bundle = next_bundle(&mut self.bundle) => self.adopt_bundle(bundle),
                Some(done) = self.asking.join_next_with_id() => self.take_answer(done),
                () = tokio::time::sleep(sleep) => {}
            }
        }
    }

    fn ask_for_due(&mut self, now: Now) {
        let room = ASKING.saturating_sub(self.asking.len());
        for identity in self.schedule.take_due(room, now) {
            let open = self.open.remove(&identity);
            let task = ask(
                self.signer.clone(),
                identity.clone(),
                open,
                self.sign_timeout,
            );
            let id = self.asking.spawn(task).id();
            self.asked.insert(id, identity);
        }
    }

    fn take_answer(&mut self, done: Result<(task::Id, Result<Answer, Failed>), task::JoinError>) {
        let (id, answer) = match done {
            Ok((id, answer)) => (id, answer),
            Err(error) => {
                let ended = format!("the request ended: {error}");
                (error.id(), Err(SignError::Unavailable(ended).into()))
            }
        };
        let Some(identity) = self.asked.remove(&id) else {
            return;
        };
        let (now, chance) = (self.now(), chance());
        let answer = answer.map_err(|Failed { error, open }| {
            if let Some(open) = open.filter(|_| self.schedule.knows(&identity)) {
                self.open.insert(identity.clone(), *open);
            }
            error
        });
        let pair = answer.map(|Answer { request, signed }| Pair {
            chain: signed.chain,
            key: request.key,
            pkcs8: request.pkcs8,
            public_key: request.public_key,
        });
        match pair.and_then(|pair| self.check(&identity, pair)) {
            Ok(own) => {
                tracing::info!(
                    %identity,
                    serial = own.validity.serial,
                    not_after = seconds(own.validity.not_after),
                    "certificate"
                );
                let validity = own.validity.clone();
                if self.schedule.signed(&identity, validity, now, chance) {
                    self.expired.remove(&identity);
                    let table = self.table.load().replace(&identity, Some(Arc::new(own)));
                    self.publish(table);
                }
            }
            Err(error) => {
                tracing::warn!(%identity, %error, "no certificate, will ask again");
                let refused = matches!(error, SignError::Refused { .. });
                self.schedule
                    .failed(&identity, error.to_string(), refused, now, chance);
            }
        }
    }

    /// What an agent before left counts as signed just now, if it may be used at all. Whether
    /// anybody wants it will be told; until then it lingers.
    fn take_up(&mut self, held: Vec<Held>) {
        let now = self.now();
        self.schedule.want(
            &held.iter().map(|held| held.identity.clone()).collect(),
            now,
        );
        let mut table = Table::default();
        for Held {
            identity,
            chain,
            pkcs8,
        } in held
        {
            let usable = pair(chain, pkcs8).and_then(|pair| self.check(&identity, pair));
            let own = match usable {
                Ok(own) if own.validity.holds(now.wall) => own,
                Ok(own) => {
                    let not_after = seconds(own.validity.not_after);
                    tracing::info!(%identity, not_after, "a certificate left behind is not valid now");
                    continue;
                }
                Err(error) => {
                    tracing::warn!(%identity, %error, "a certificate left behind is not usable");
                    continue;
                }
            };
            let validity = own.validity.clone();
            if self.schedule.signed(&identity, validity, now, chance()) {
                table = table.replace(&identity, Some(Arc::new(own)));
            }
        }
        self.publish(table);
    }

    /// Nothing is used that a peer would refuse: better the old certificate and another try.
    fn check(&self, identity: &Identity, pair: Pair) -> Result<Own, SignError> {
        let wrong = |what: String| SignError::Unavailable(format!("what it sent {what}"));
        let Pair {
            chain,
            key,
            pkcs8,
            public_key,
        } = pair;
        let leaf = chain
            .first()
            .ok_or_else(|| wrong("holds no certificate".to_owned()))?;
        let (validity, certified_key) = read(leaf).map_err(wrong)?;
        if certified_key != public_key {
            return Err(wrong("is for another key".to_owned()));
        }
        self.tls.check_own(identity, &chain).map_err(|error| {
            wrong(format!(
                "would not be accepted by peers ({}); see to the trust bundle and to \
                 this node's clock, which says {} s since 1970",
                tls_reason(&error),
                seconds(self.clock.now())
            ))
        })?;
        let certified = Arc::new(CertifiedKey::new(chain, key));
        let server = self
            .tls
            .server(Arc::new(Always {
                certified: certified.clone(),
                validity: validity.clone(),
                clock: self.clock.clone(),
            }))
            .map_err(|error| wrong(format!("is not usable: {error}")))?;
        Ok(Own {
            certified,
            pkcs8,
            validity,
            server: Arc::new(server),
            clients: ArcSwap::default(),
        })
    }

    /// New handshakes go by the new anchors. Certificates whose anchor is gone are renewed soon;
    /// they are still shown meanwhile, to peers that have not heard yet.
    fn adopt_bundle(&mut self, bundle: Option<Arc<Bundle>>) {
        let Some(bundle) = bundle else {
            tracing::warn!("the signer is gone, the last trust bundle stays in force");
            self.bundle = None;
            return;
        };
        self.tls.set_bundle(&bundle);
        self.schedule.retry_now();
        let now = self.now();
        let old = self.table.load_full();
        let mut held = HashMap::with_capacity(old.held.len());
        for (identity, own) in &old.held {
            if own.validity.holds(now.wall)
                && self.tls.check_own(identity, &own.certified.cert).is_err()
            {
                self.schedule.renew_soon(identity, now, chance());
            }
            held.insert(identity.clone(), Arc::new(own.anew()));
        }
        self.publish(Table {
            held,
            names: old.names.clone(),
        });
    }

    fn forget_gone(&mut self, now: Now) {
        for identity in self.schedule.take_gone(now) {
            self.expired.remove(&identity);
            self.open.remove(&identity);
            let table = self.table.load().replace(&identity, None);
            self.publish(table);
        }
    }

    /// Once per certificate: readers notice an expiry by themselves, people should too.
    fn tell_expired(&mut self, now: Now) {
        let table = self.table.load_full();
        for (identity, own) in &table.held {
            if own.validity.not_after <= now.wall && self.expired.insert(identity.clone()) {
                tracing::warn!(%identity, "certificate has expired and is no longer used");
                self.changed.send_modify(|version| *version += 1);
            }
        }
    }

    fn publish(&self, table: Table) {
        self.table.store(Arc::new(table));
        // Whoever is woken by the change must find it in the status too.
        self.status
            .store(Arc::new(self.schedule.status(self.clock.now())));
        self.changed.send_modify(|version| *version += 1);
    }

    fn now(&self) -> Now {
        Now {
            wall: self.clock.now(),
            mono: Instant::now(),
        }
    }
}

async fn ask(
    signer: Arc<dyn Signer>,
    identity: Identity,
    open: Option<Request>,
    within: Duration,
) -> Result<Answer, Failed> {
    let request = match open {
        Some(open) => open,
        None => {
            Request::new(&identity).map_err(|error| SignError::Unavailable(error.to_string()))?
        }
    };
    let signing = signer.sign(&identity, request.der.clone());
    let signed = tokio::time::timeout(within, signing).await;
    let late = |_elapsed| {
        let seconds = within.as_secs();
        Err(SignError::Unanswered(format!(
            "no answer within {seconds} s"
        )))
    };
    match signed.unwrap_or_else(late) {
        Ok(signed) => Ok(Answer { request, signed }),
        Err(error @ SignError::Unanswered(_)) => Err(Failed {
            error,
            open: Some(Box::new(request)),
        }),
        Err(error @ (SignError::Unavailable(_) | SignError::Refused { .. })) => Err(error.into()),
    }
}

impl From<SignError> for Failed {
    fn from(error: SignError) -> Self {
        Self { error, open: None }
    }
}

/// Of what was left behind; its public key comes from the key itself.
fn pair(chain: Vec<CertificateDer<'static>>, pkcs8: Arc<[u8]>) -> Result<Pair, SignError> {
    let wrong = |error: &dyn fmt::Display| SignError::Unavailable(format!("its key: {error}"));
    let key = signing_key(&pkcs8).map_err(|error| wrong(&error))?;
    let public_key = public_key(&pkcs8).map_err(|error| wrong(&error))?;
    Ok(Pair {
        chain,
        key,
        pkcs8,
        public_key,
    })
}

/// The next bundle; `None` once when the signer is gone, then never again.
async fn next_bundle(bundle: &mut Option<watch::Receiver<Arc<Bundle>>>) -> Option<Arc<Bundle>> {
    match bundle {
        Some(receiver) => {
            receiver.changed().await.ok()?;
            Some(receiver.borrow_and_update().clone())
        }
        None => std::future::pending().await,
    }
}

fn read(leaf: &CertificateDer<'_>) -> Result<(Validity, Vec<u8>), String> {
    let (_, certificate) = X509Certificate::from_der(leaf)
        .map_err(|error| format!("does not parse as a certificate: {error}"))?;
    let at = |timestamp: i64| {
        UNIX_EPOCH + Duration::from_secs(u64::try_from(timestamp).unwrap_or_default())
    };
    let validity = Validity {
        serial: certificate.raw_serial_as_string(),
        not_before: at(certificate.validity().not_before.timestamp()),
        not_after: at(certificate.validity().not_after.timestamp()),
    };
    let key = &certificate.public_key().subject_public_key.data;
    Ok((validity, key.to_vec()))
}

/// -1 to 1.
fn chance() -> f64 {
    fastrand::f64() * 2.0 - 1.0
}

fn seconds(at: SystemTime) -> u64 {
    at.duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests;

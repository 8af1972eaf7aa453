//! Keeps the authority: a Secret with its key, and the ConfigMap of anchors.
//!
//! Every look reads both, makes or rotates what is ours, and decides who signs. All replicas look;
//! only the one that leads writes, and each write carries the version that was read, so that two
//! never undo each other.
//!
//! **Whose Secret it is.** What the signer made carries a mark with the fingerprint of its
//! `tls.crt`. A Secret without it, or whose certificate is not the one of the mark, is somebody
//! else's (a person's, cert-manager's): it is followed and never written. A ConfigMap that remembers
//! a given authority keeps the signer from making one when the Secret is gone.
//!
//! **Ours** is a root of ten years and an issuer of one below it, `root.key` beside `tls.key`. A new
//! issuer comes every [`Settings::rotation`] (a month) below the same root; only when that root
//! cannot outlive another issuer, or somebody took `root.key` out of the Secret, comes a new root,
//! by way of [`anchors`](super::anchors).
//!
//! **A clock that is wrong** would make what nobody believes yet, or take anchors out for good.
//! So nothing is written while this clock is further from the API server's than certificates allow
//! ([`SKEW`]); nothing is signed either, and another replica may lead, whose clock is right.
//!
//! **What cannot be used** is told, in the log and by an Event, and the last good authority signs
//! on for as long as this process lives.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use http::{Request, header::DATE};
use k8s_openapi::{
    ByteString,
    api::core::v1::{ConfigMap, Secret},
    jiff::fmt::rfc2822,
};
use kube::{
    Api, Client,
    api::{ObjectMeta, PostParams},
    client::Body,
};
use rustls::pki_types::{CertificateDer, pem::PemObject};
use tracing::{info, warn};
use zeroize::Zeroize;

use super::{
    super::TRUST_ROOTS,
    anchors::{Anchors, Origin, Wanted},
};
use crate::{
    identity::{
        Bundle,
        authority::{
            Authority, Made, Part, SKEW, Unusable, fingerprint, make_issuer, make_root,
            outlives_an_issuer, self_signed_of,
        },
        clock::Clock,
    },
    k8s::events::{About, Events, Warning},
};

pub const ISSUER: &str = "picomesh-issuer";
const ROOT_KEY: &str = "root.key";
const TLS: &str = "kubernetes.io/tls";
/// On a Secret that the signer made: the fingerprint of the certificate that it put there.
const MARK: &str = "picomesh.io/made-by-signer";
/// From when on a person is told that somebody else's issuer ends.
const WARNING: Duration = Duration::from_secs(30 * 24 * 3600);
/// Of one entry of a Secret. Certificates and keys are small.
const MAX_ENTRY: usize = 256 * 1024;

#[derive(Clone, Debug)]
pub struct Settings {
    pub namespace: String,
    pub trust_domain: Arc<str>,
    /// The longest life of a workload's certificate.
    pub longest_life: Duration,
    /// How old an issuer of ours becomes before the next.
    pub rotation: Duration,
}

pub(super) struct Keeper {
    client: Client,
    secrets: Api<Secret>,
    maps: Api<ConfigMap>,
    settings: Settings,
    clock: Arc<dyn Clock>,
    events: Events,
    in_force: Option<InForce>,
    /// At the last look.
    clock_is_wrong: bool,
    /// What was told last, so that it is told once.
    told: Option<String>,
}

/// Who signs now.
struct InForce {
    authority: Arc<Authority>,
    bundle: Bundle,
}

/// A Secret, overwritten when it goes. What the client's buffers held before is beyond us.
struct Private(Secret);

impl Drop for Private {
    fn drop(&mut self) {
        for value in self.0.data.iter_mut().flat_map(|data| data.values_mut()) {
            value.0.zeroize();
        }
    }
}

/// A Secret that can be used.
struct Candidate {
    authority: Authority,
    bundle: Bundle,
    origin: Origin,
}

/// This clock beside the API server's.
enum Time {
    Right,
    /// What depends on the time must wait; what was good goes on.
    Unknown,
    Wrong,
}

impl Time {
    fn trouble(&self) -> Option<String> {
        match self {
            Self::Right => None,
            Self::Unknown => Some(
                "the API server's answers carry no Date, so this clock cannot be trusted and the \
                 authority is left as it is; let proxies before the API server pass it on"
                    .into(),
            ),
            Self::Wrong => Some(format!(
                "the clocks of this node and of the API server are more than {} minutes apart, so \
                 this signer leaves the authority as it is and signs nothing; set them (NTP)",
                SKEW.as_secs() / 60
            )),
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub(super) enum KeepError {
    #[error("{0}")]
    Api(#[from] kube::Error),
    #[error("{0}")]
    Make(String),
}

impl Keeper {
    pub(super) fn new(
        client: Client,
        settings: Settings,
        clock: Arc<dyn Clock>,
        events: Events,
    ) -> Self {
        Self {
            secrets: Api::namespaced(client.clone(), &settings.namespace),
            maps: Api::namespaced(client.clone(), &settings.namespace),
            client,
            settings,
            clock,
            events,
            in_force: None,
            clock_is_wrong: false,
            told: None,
        }
    }

    /// Who signs; `None`: nobody can yet.
    pub(super) fn authority(&self) -> Option<Arc<Authority>> {
        Some(Arc::clone(&self.in_force.as_ref()?.authority))
    }

    /// What would be signed now, nobody would believe yet or for long.
    pub(super) fn clock_is_wrong(&self) -> bool {
        self.clock_is_wrong
    }

    /// Something is not as it should be.
    pub(super) fn is_troubled(&self) -> bool {
        self.told.is_some()
    }

    /// One look. Writes only while `leads`.
    pub(super) async fn look(&mut self, leads: bool) -> Result<(), KeepError> {
        let now = self.clock.now();
        let map = self.maps.get_opt(TRUST_ROOTS).await?;
        let (anchors, mut trouble) = Anchors::read(map.as_ref());
        let trouble_of_map = trouble.is_some();
        // Also who does not lead: perhaps it does not for that reason.
        let time = self.time().await?;
        self.clock_is_wrong = matches!(time, Time::Wrong);
        let leads = leads && matches!(time, Time::Right);

        let mut secret = self.secrets.get_opt(ISSUER).await?.map(Private);
        if secret.is_none() && leads && anchors.origin != Some(Origin::Given) {
            secret = self.make(now).await?;
        }
        let mut uid = secret.as_ref().and_then(|own| own.0.metadata.uid.clone());
        let mut candidate = None;
        match &secret {
            None if anchors.origin == Some(Origin::Given) => {
                trouble = Some(format!(
                    "the Secret {ISSUER} is gone, and was somebody else's, so none is made in its \
                     place; put it back, or delete the ConfigMap {TRUST_ROOTS} to begin with a new \
                     authority"
                ));
            }
            // Whoever leads makes it.
            None => {}
            Some(found) => match self.read(&found.0) {
                Ok(read) => {
                    let due = read.origin == Origin::Made && self.is_old(&read.authority, now);
                    let renewed = if due && leads {
                        self.rotate(found, &read, now).await?
                    } else {
                        None
                    };
                    candidate = Some(renewed.unwrap_or(read));
                }
                Err(unusable) => {
                    trouble = Some(format!(
                        "the Secret {ISSUER} cannot be used: {unusable}; the last good one signs on"
                    ));
                }
            },
        }
        if let Some(given) = candidate.as_ref().filter(|c| c.origin == Origin::Given)
            && given.authority.not_after < now + WARNING
        {
            let words = "ends soon or has ended, and is somebody else's: renew it";
            trouble = Some(format!("the issuer in the Secret {ISSUER} {words}"));
        }

        let anchors = match self
            .publish(map, anchors, candidate.as_ref(), leads, now)
            .await
        {
            Ok(anchors) => anchors,
            Err(KeepError::Make(problem)) => {
                self.tell(Some((problem, uid.take())), true);
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        if let Some(ready) = candidate.filter(|ready| anchors.have_spread(&ready.bundle, now)) {
            self.put_in_force(ready);
        }
        let of_time = time.trouble();
        let of_map = trouble_of_map && of_time.is_none();
        let trouble = of_time.or(trouble);
        self.tell(trouble.map(|trouble| (trouble, uid)), of_map);
        Ok(())
    }

    /// Asked of the API server.
    async fn time(&self) -> Result<Time, KeepError> {
        let request = Request::get("/version").body(Body::empty()).map_err(made)?;
        // Whatever the answer is, it carries its time.
        let answer = self.client.send(request).await?;
        let date = answer.headers().get(DATE);
        let date = date.and_then(|date| {
            let parser = rfc2822::DateTimeParser::new();
            parser.parse_timestamp(date.as_bytes()).ok()
        });
        let Some(there) = date.map(SystemTime::from) else {
            return Ok(Time::Unknown);
        };
        let here = self.clock.now();
        let apart = here.duration_since(there);
        let apart = apart.unwrap_or_else(|behind| behind.duration());
        Ok(if apart > SKEW {
            Time::Wrong
        } else {
            Time::Right
        })
    }

    fn is_old(&self, authority: &Authority, now: SystemTime) -> bool {
        now >= authority.not_before + SKEW + self.settings.rotation
    }

    fn put_in_force(
        &mut self,
        Candidate {
            authority,
            bundle,
            origin,
        }: Candidate,
    ) {
        let ends = |authority: &Authority| (authority.not_before, authority.not_after);
        let same = self.in_force.as_ref().is_some_and(|before| {
            before.bundle == bundle && ends(&before.authority) == ends(&authority)
        });
        if !same {
            info!(?origin, not_after = ?authority.not_after, anchors = bundle.anchors.len(),
                  "this issuer signs from now on");
        }
        self.in_force = Some(InForce {
            authority: Arc::new(authority),
            bundle,
        });
    }

    /// The anchors as they stand after this look.
    async fn publish(
        &self,
        map: Option<ConfigMap>,
        anchors: Anchors,
        candidate: Option<&Candidate>,
        leads: bool,
        now: SystemTime,
    ) -> Result<Anchors, KeepError> {
        let signing = self.in_force.as_ref().map(|own| &own.bundle);
        let wanted = candidate.map(|candidate| &candidate.bundle);
        let bundles: Vec<_> = wanted.into_iter().chain(signing).collect();
        if bundles.is_empty() {
            return Ok(anchors);
        }
        let next = anchors.with(
            &Wanted {
                bundles: &bundles,
                origin: candidate.map(|candidate| candidate.origin),
                life: self.settings.longest_life,
            },
            now,
        );
        let next = next.map_err(KeepError::Make)?;
        if !leads || next == anchors {
            return Ok(anchors);
        }
        let made = map.is_none();
        let map = next.write(map).map_err(KeepError::Make)?;
        let params = PostParams::default();
        let written = if made {
            self.maps.create(&params, &map).await
        } else {
            self.maps.replace(TRUST_ROOTS, &params, &map).await
        };
        match written {
            Ok(_) => {
                info!("the ConfigMap {TRUST_ROOTS} is written");
                Ok(next)
            }
            // Somebody else was quicker; the next look sees what they wrote.
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(anchors),
            Err(error) => Err(error.into()),
        }
    }

    /// The first authority. `None`: somebody else was quicker.
    async fn make(&self, now: SystemTime) -> Result<Option<Private>, KeepError> {
        let root = make_root(&self.settings.trust_domain, now).map_err(made)?;
        let domain = &self.settings.trust_domain;
        let issuer = make_issuer(&root.certificate, &root.key, domain, now).map_err(made)?;
        let mut secret = Private(filled(&issuer, &root.certificate, &root.key));
        secret.0.metadata.name = Some(ISSUER.to_owned());
        secret.0.type_ = Some(TLS.to_owned());
        match self.secrets.create(&PostParams::default(), &secret.0).await {
            Ok(made) => {
                info!("made a root and an issuer, in the Secret {ISSUER}");
                Ok(Some(Private(made)))
            }
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// A new issuer in our own Secret. `None`: somebody else was quicker.
    async fn rotate(
        &self,
        found: &Private,
        read: &Candidate,
        now: SystemTime,
    ) -> Result<Option<Candidate>, KeepError> {
        let domain = &self.settings.trust_domain;
        let data = found.0.data.as_ref();
        let text = |name: &str| str::from_utf8(&data?.get(name)?.0).ok();
        let below = |root: &str, key: &str| make_issuer(root, key, domain, now);
        let root = text(Part::Anchors.as_str()).zip(text(ROOT_KEY));
        let root = root.filter(|_| {
            let anchors = &read.bundle.anchors;
            anchors.len() == 1 && outlives_an_issuer(&anchors[0], now)
        });
        let mut next = match root {
            Some((root, key)) => {
                let issuer = below(root, key).map_err(made)?;
                Private(filled(&issuer, root, key))
            }
            None => {
                info!("the root of the Secret {ISSUER} signs no more issuers: here is a new one");
                let root = make_root(domain, now).map_err(made)?;
                let issuer = below(&root.certificate, &root.key).map_err(made)?;
                Private(filled(&issuer, &root.certificate, &root.key))
            }
        };
        // What others say of it stays, and it is refused if it has changed since.
        let marks = next.0.metadata.annotations.take().unwrap_or_default();
        next.0.metadata = found.0.metadata.clone();
        next.0.metadata.managed_fields = None;
        next.0
            .metadata
            .annotations
            .get_or_insert_default()
            .extend(marks);
        next.0.type_.clone_from(&found.0.type_);
        // Not what we would find next time? Then it is not written either.
        let candidate = self
            .read(&next.0)
            .map_err(|unusable| KeepError::Make(unusable.to_string()))?;
        match self
            .secrets
            .replace(ISSUER, &PostParams::default(), &next.0)
            .await
        {
            Ok(written) => {
                drop(Private(written));
                info!(not_after = ?candidate.authority.not_after, "a new issuer is made");
                Ok(Some(candidate))
            }
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn read(&self, secret: &Secret) -> Result<Candidate, Unusable> {
        let entry = |part: Part| {
            let entry = secret.data.as_ref()?.get(part.as_str())?;
            Some(&entry.0[..]).filter(|entry| !entry.is_empty())
        };
        let wrong = |part, reason: &str| Unusable {
            part,
            reason: reason.to_owned(),
        };
        for part in [Part::Chain, Part::Key, Part::Anchors] {
            if entry(part).is_some_and(|entry| entry.len() > MAX_ENTRY) {
                return Err(wrong(part, "is too long to be what it should be"));
            }
        }
        let missing = |part| wrong(part, "is missing; write PEM there");
        let chain = entry(Part::Chain).ok_or_else(|| missing(Part::Chain))?;
        let key = entry(Part::Key).ok_or_else(|| missing(Part::Key))?;
        let own = entry(Part::Anchors)
            .is_none()
            .then(|| self_signed_of(chain));
        let anchors = match &own {
            None => entry(Part::Anchors).unwrap_or_default(),
            Some(Some(own)) => own.as_bytes(),
            Some(None) => {
                let remedy = "is missing, and tls.crt does not hold its own root; write the root's \
                              certificate there, as PEM";
                return Err(wrong(Part::Anchors, remedy));
            }
        };
        let domain = &self.settings.trust_domain;
        let (authority, bundle) = Authority::read(chain, key, anchors, domain, &self.clock)?;
        let mark = secret.metadata.annotations.as_ref();
        let mark = mark.and_then(|annotations| annotations.get(MARK));
        let origin = if mark == mark_of(chain).as_ref() && mark.is_some() {
            Origin::Made
        } else {
            Origin::Given
        };
        Ok(Candidate {
            authority,
            bundle,
            origin,
        })
    }

    /// `trouble` with the uid of the Secret; `of_map`: it is of the ConfigMap.
    fn tell(&mut self, trouble: Option<(String, Option<String>)>, of_map: bool) {
        let Some((message, uid)) = trouble else {
            if self.told.take().is_some() {
                info!("the authority is as it should be again");
            }
            return;
        };
        let (kind, name) = if of_map {
            ("ConfigMap", TRUST_ROOTS)
        } else {
            ("Secret", ISSUER)
        };
        // Said again now and then: whoever looks after an hour finds it.
        self.events.warn(Warning {
            about: About {
                api_version: "v1".into(),
                kind: kind.into(),
                namespace: self.settings.namespace.clone(),
                name: name.into(),
                uid: uid.filter(|_| !of_map).unwrap_or_default(),
            },
            reason: "AuthorityTrouble".into(),
            message: message.clone(),
        });
        if self.told.as_ref() != Some(&message) {
            warn!(kind, name, message, "authority");
            self.told = Some(message);
        }
    }
}

fn made(error: impl std::error::Error) -> KeepError {
    KeepError::Make(error.to_string())
}

/// Data and mark of a Secret of ours.
fn filled(issuer: &Made, root: &str, root_key: &str) -> Secret {
    let bytes = |text: &str| ByteString(text.as_bytes().to_vec());
    let data = [
        (Part::Chain.as_str(), bytes(&issuer.certificate)),
        (Part::Key.as_str(), bytes(&issuer.key)),
        (Part::Anchors.as_str(), bytes(root)),
        (ROOT_KEY, bytes(root_key)),
    ];
    let mark = mark_of(issuer.certificate.as_bytes()).unwrap_or_default();
    Secret {
        metadata: ObjectMeta {
            annotations: Some([(MARK.to_owned(), mark)].into()),
            ..ObjectMeta::default()
        },
        data: Some(data.map(|(name, value)| (name.to_owned(), value)).into()),
        ..Secret::default()
    }
}

/// The fingerprint of the first certificate of a chain.
fn mark_of(chain: &[u8]) -> Option<String> {
    let first = CertificateDer::from_pem_slice(chain).ok()?;
    Some(fingerprint(&first))
}

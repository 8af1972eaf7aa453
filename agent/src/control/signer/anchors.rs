//! The trust anchors in their ConfigMap: who comes in, who goes, and when.
//!
//! `data["ca.crt"]` is what agents read. An annotation beside it remembers of each anchor that this
//! signer has put there since when it stands there, how long what is signed below it may live, and
//! since when nothing is signed below it any more.
//!
//! **A new one comes first.** An issuer signs only once its anchors have stood here for [`SPREAD`]:
//! agents follow the ConfigMap, so by then all that reach the API server believe them. In the first
//! ConfigMap nobody can believe in others, so there is nothing to wait for.
//!
//! **When nothing uses the old one.** What was signed below an anchor is over when its longest life
//! has passed since the last signature. So an anchor that neither the Secret nor the issuer that
//! signs now names gets a mark, and goes when the longest life that was allowed while it was in use
//! (and the hour by which clocks may differ) has passed since. Nobody needs to be asked for it.
//!
//! An anchor that stands here without such a record was put here by a person, and stays.
//!
//! Pure: time is an argument.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::ObjectMeta;
use rustls::pki_types::{CertificateDer, pem::PemObject};
use serde::{Deserialize, Serialize};

use super::super::{TRUST_ROOTS, TRUST_ROOTS_KEY};
use crate::identity::{
    Bundle,
    authority::{SKEW, ends, fingerprint, to_pem},
};

/// How long an anchor stands here before anything is signed below it.
pub(super) const SPREAD: Duration = Duration::from_secs(60);
/// As many as agents read.
const MOST: usize = 64;
const RECORDS: &str = "picomesh.io/anchors";
const ORIGIN: &str = "picomesh.io/authority";

/// Where the authority comes from. Once it was given, none is ever made in its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// The signer has made it.
    Made,
    /// Somebody else keeps the Secret.
    Given,
}

impl Origin {
    fn as_str(self) -> &'static str {
        match self {
            Self::Made => "made",
            Self::Given => "given",
        }
    }
}

/// Seconds since 1970 and of life.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    since: u64,
    life: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    unused: Option<u64>,
}

/// The ConfigMap, read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Anchors {
    certificates: Vec<CertificateDer<'static>>,
    /// By fingerprint.
    records: BTreeMap<String, Record>,
    pub(super) origin: Option<Origin>,
}

/// What must be in force.
pub(super) struct Wanted<'a> {
    /// Of the Secret as it stands, and of the issuer that signs now if that is another.
    pub(super) bundles: &'a [&'a Bundle],
    pub(super) origin: Option<Origin>,
    /// The longest that is signed.
    pub(super) life: Duration,
}

impl Anchors {
    /// What does not read is left out, and told.
    pub(super) fn read(map: Option<&ConfigMap>) -> (Self, Option<String>) {
        let Some(map) = map else {
            return (Self::default(), None);
        };
        let mut problem = None;
        let text = map.data.as_ref().and_then(|data| data.get(TRUST_ROOTS_KEY));
        let mut certificates = Vec::new();
        let text = text.map_or(&[][..], |text| text.as_bytes());
        // The library goes on after an error, and must not do so without end.
        for found in CertificateDer::pem_slice_iter(text).take(4 * MOST) {
            match found {
                Ok(found) if ends(&found).is_none() => {
                    problem = Some(format!(
                        "data[{TRUST_ROOTS_KEY:?}] holds a certificate that does not parse; it is \
                         left out"
                    ));
                }
                Ok(found) if !certificates.contains(&found) => certificates.push(found),
                Ok(_) => {}
                Err(error) => {
                    problem = Some(format!(
                        "data[{TRUST_ROOTS_KEY:?}] is not PEM all through ({error}); what does not \
                         read is left out"
                    ));
                }
            }
        }
        let annotations = map.metadata.annotations.as_ref();
        let said = |name| annotations.and_then(|all| all.get(name));
        let records = said(RECORDS).map(|text| serde_json::from_str(text));
        let records = records.unwrap_or_else(|| Ok(BTreeMap::new()));
        let records = records.unwrap_or_else(|error| {
            problem = Some(format!(
                "the annotation {RECORDS} does not read ({error}); the anchors that stand there \
                 stay until a person removes them"
            ));
            BTreeMap::new()
        });
        let origin = said(ORIGIN).map(|word| match word.as_str() {
            "made" => Origin::Made,
            // Whatever else stands there: nothing is made in its place.
            _ => Origin::Given,
        });
        let anchors = Self {
            certificates,
            records,
            origin,
        };
        (anchors, problem)
    }

    /// As they should stand from now on.
    pub(super) fn with(&self, wanted: &Wanted<'_>, now: SystemTime) -> Result<Self, String> {
        let (now_seconds, life) = (seconds(now), wanted.life.as_secs());
        let mut next = self.clone();
        next.origin = wanted.origin.or(self.origin);
        let first = self.certificates.is_empty();
        let mut used = BTreeSet::new();
        for anchor in wanted.bundles.iter().flat_map(|bundle| &bundle.anchors) {
            let name = fingerprint(anchor);
            let known = self.certificates.contains(anchor);
            if !next.certificates.contains(anchor) {
                next.certificates.push(anchor.clone());
            }
            let spread = first || known;
            let record = next.records.entry(name.clone()).or_insert(Record {
                since: now_seconds.saturating_sub(if spread { SPREAD.as_secs() } else { 0 }),
                life,
                unused: None,
            });
            if !known && !first {
                // It was taken out by hand in between.
                record.since = record.since.max(now_seconds);
            }
            record.life = record.life.max(life);
            record.unused = None;
            used.insert(name);
        }
        for (name, record) in &mut next.records {
            if !used.contains(name) {
                record.unused.get_or_insert(now_seconds);
            }
        }
        let records = &next.records;
        next.certificates.retain(|anchor| {
            let name = fingerprint(anchor);
            let over = records
                .get(&name)
                .is_some_and(|record| is_over(record, now));
            let ended = ends(anchor).is_none_or(|end| end <= now);
            used.contains(&name) || !(over || ended)
        });
        let there: BTreeSet<_> = next.certificates.iter().map(|a| fingerprint(a)).collect();
        next.records.retain(|name, _| there.contains(name));
        if next.certificates.len() > MOST {
            return Err(format!(
                "{TRUST_ROOTS} would hold {} certificates and agents read {MOST}; leave out of it \
                 and of the Secret those that nobody uses",
                next.certificates.len()
            ));
        }
        Ok(next)
    }

    /// Do all agents know these by now?
    pub(super) fn have_spread(&self, bundle: &Bundle, now: SystemTime) -> bool {
        let now = seconds(now);
        bundle.anchors.iter().all(|anchor| {
            let record = self.records.get(&fingerprint(anchor));
            self.certificates.contains(anchor)
                && record.is_some_and(|record| {
                    // A time that is still to come was written by a clock that was wrong.
                    now >= record.since + SPREAD.as_secs() || now < record.since
                })
        })
    }

    /// Written over what stands there; other data and words of others stay.
    pub(super) fn write(&self, before: Option<ConfigMap>) -> Result<ConfigMap, String> {
        let mut map = before.unwrap_or_else(|| ConfigMap {
            metadata: ObjectMeta {
                name: Some(TRUST_ROOTS.to_owned()),
                ..ObjectMeta::default()
            },
            ..ConfigMap::default()
        });
        map.metadata.managed_fields = None;
        let text = self.certificates.iter().map(|der| to_pem(der)).collect();
        map.data
            .get_or_insert_default()
            .insert(TRUST_ROOTS_KEY.to_owned(), text);
        let annotations = map.metadata.annotations.get_or_insert_default();
        let records = serde_json::to_string(&self.records).map_err(|error| error.to_string())?;
        annotations.insert(RECORDS.to_owned(), records);
        if let Some(origin) = self.origin {
            annotations.insert(ORIGIN.to_owned(), origin.as_str().to_owned());
        }
        Ok(map)
    }
}

fn is_over(record: &Record, now: SystemTime) -> bool {
    let rest = record.life + SKEW.as_secs();
    let last = record.unused.map(|unused| unused.saturating_add(rest));
    last.is_some_and(|last| last <= seconds(now))
}

fn seconds(at: SystemTime) -> u64 {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    since.as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::authority::make_root;

    const DAY: Duration = Duration::from_secs(86_400);

    fn start() -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(1_800_000_000)
    }

    fn root() -> Bundle {
        let made = make_root("cluster.local", start()).unwrap();
        let anchor = CertificateDer::from_pem_slice(made.certificate.as_bytes()).unwrap();
        Bundle {
            anchors: vec![anchor],
        }
    }

    fn wanted<'a>(bundles: &'a [&'a Bundle], life: Duration) -> Wanted<'a> {
        Wanted {
            bundles,
            origin: Some(Origin::Made),
            life,
        }
    }

    /// Written and read again, as the next look sees it.
    fn stored(anchors: &Anchors) -> Anchors {
        let map = anchors.write(None).unwrap();
        let (read, problem) = Anchors::read(Some(&map));
        assert_eq!((&read, problem), (anchors, None));
        read
    }

    #[test]
    fn the_first_anchor_needs_no_time_to_spread_and_the_next_does() {
        let (old, new) = (root(), root());
        let first = Anchors::default().with(&wanted(&[&old], DAY), start());
        let first = stored(&first.unwrap());
        assert!(first.have_spread(&old, start()));
        assert!(!first.have_spread(&new, start() + 10 * DAY));
        let both = first.with(&wanted(&[&new, &old], DAY), start() + DAY);
        let both = stored(&both.unwrap());
        assert!(!both.have_spread(&new, start() + DAY + SPREAD / 2));
        assert!(both.have_spread(&new, start() + DAY + SPREAD));
        assert!(both.have_spread(&old, start() + DAY));
    }

    #[test]
    fn an_anchor_goes_when_the_longest_life_below_it_is_over() {
        let (old, new) = (root(), root());
        let both = [&new, &old];
        let mut anchors = Anchors::default()
            .with(&wanted(&[&old], 7 * DAY), start())
            .unwrap();
        // Somebody shortens the life: what was signed before lives on.
        anchors = anchors.with(&wanted(&both, DAY), start() + DAY).unwrap();
        let left = start() + 2 * DAY;
        anchors = stored(&anchors.with(&wanted(&[&new], DAY), left).unwrap());
        assert_eq!(anchors.certificates.len(), 2);
        let last = left + 7 * DAY + SKEW;
        let almost = last - Duration::from_secs(1);
        anchors = stored(&anchors.with(&wanted(&[&new], DAY), almost).unwrap());
        assert_eq!(anchors.certificates.len(), 2, "something may still live");
        anchors = stored(&anchors.with(&wanted(&[&new], DAY), last).unwrap());
        assert_eq!(anchors.certificates, new.anchors);
    }

    #[test]
    fn an_anchor_that_is_used_again_stays() {
        let (old, new) = (root(), root());
        let mut anchors = Anchors::default();
        for (day, used) in [(0, &old), (1, &new), (2, &old)] {
            let now = start() + day * DAY;
            anchors = anchors.with(&wanted(&[used], DAY), now).unwrap();
        }
        let later = anchors.with(&wanted(&[&old], DAY), start() + 30 * DAY);
        assert_eq!(later.unwrap().certificates, old.anchors);
    }

    #[test]
    fn what_a_person_put_there_stays_until_it_ends() {
        let (ours, theirs) = (root(), root());
        let mut map = Anchors::default().write(None).unwrap();
        let data = map.data.as_mut().unwrap();
        data.insert(TRUST_ROOTS_KEY.into(), to_pem(&theirs.anchors[0]));
        data.insert("notes".into(), "kept".into());
        let (anchors, _) = Anchors::read(Some(&map));
        let later = anchors.with(&wanted(&[&ours], DAY), start() + 300 * DAY);
        let later = later.unwrap();
        assert_eq!(later.certificates.len(), 2);
        let written = later.write(Some(map)).unwrap();
        assert_eq!(written.data.unwrap()["notes"], "kept");
        let ended = later.with(&wanted(&[&ours], DAY), start() + 3651 * DAY);
        assert_eq!(ended.unwrap().certificates, ours.anchors);
    }

    #[test]
    fn what_does_not_read_is_left_out_and_told() {
        let good = root();
        let mut map = ConfigMap::default();
        let broken = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        let text = format!("{broken}{}", to_pem(&good.anchors[0]));
        map.data
            .get_or_insert_default()
            .insert(TRUST_ROOTS_KEY.into(), text);
        let (read, problem) = Anchors::read(Some(&map));
        assert_eq!(read.certificates, good.anchors);
        assert!(problem.unwrap().contains("does not parse"));
        map.metadata
            .annotations
            .get_or_insert_default()
            .insert(RECORDS.into(), "{".into());
        let (_, problem) = Anchors::read(Some(&map));
        assert!(problem.unwrap().contains(RECORDS));
    }

    #[test]
    fn more_than_agents_read_are_refused() {
        let many: Vec<_> = (0..=MOST).map(|_| root()).collect();
        let many: Vec<_> = many.iter().collect();
        let error = Anchors::default().with(&wanted(&many, DAY), start());
        assert!(error.unwrap_err().contains("65"));
    }
}

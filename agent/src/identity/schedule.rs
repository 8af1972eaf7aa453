//! When to ask for which certificate: the plan behind `manager`, with time and chance as arguments.
//!
//! One [`Entry`] per identity that is wanted or was until a minute ago. `manager` tells what
//! happened and asks what is due; nothing here waits, signs or looks at a clock.
//!
//! Two clocks are in [`Now`], for two questions. Whether a certificate is valid is a matter of
//! wall time. How long to wait after a failure is a matter of monotonic time: on a board without
//! a clock battery wall time jumps, and a backoff computed in it could last for years.

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime},
};

use tokio::time::Instant;

use crate::state::Identity;

use super::{CertificateStatus, Wanted};

/// A pod that has just stopped being meshed may still be called for this long.
pub(super) const LINGER: Duration = Duration::from_secs(60);
const FIRST_RETRY: Duration = Duration::from_secs(1);
const LAST_RETRY: Duration = Duration::from_secs(60);
/// A certificate that is valid still is tried to be renewed so often, at least, in what is left.
const TRIES: u32 = 16;
/// A refusal may end when somebody changes the signer's mind, but not within seconds.
const REFUSED_RETRY: Duration = Duration::from_secs(300);
/// When an anchor goes, all certificates under it are renewed within this time.
const HURRY: Duration = Duration::from_secs(5);

#[derive(Clone, Copy, Debug)]
pub(super) struct Now {
    pub(super) wall: SystemTime,
    pub(super) mono: Instant,
}

/// From when to when a certificate is valid.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Validity {
    pub(super) serial: String,
    pub(super) not_before: SystemTime,
    pub(super) not_after: SystemTime,
}

impl Validity {
    pub(super) fn holds(&self, wall: SystemTime) -> bool {
        self.not_before <= wall && wall < self.not_after
    }
}

#[derive(Debug, Default)]
pub(super) struct Schedule {
    entries: BTreeMap<Identity, Entry>,
}

#[derive(Debug, Default)]
struct Entry {
    held: Option<Held>,
    /// A request is under way; there is never a second one.
    asking: bool,
    /// Failures since the last success, and when to try again because of them.
    failures: u32,
    retry_at: Option<Instant>,
    renewals: u64,
    last_error: Option<String>,
    /// The last answer was no.
    refused: bool,
    unwanted_since: Option<Instant>,
}

#[derive(Debug)]
struct Held {
    validity: Validity,
    renew_at: SystemTime,
}

impl Schedule {
    /// Brings the entries in line with what is wanted. What is no longer wanted lingers.
    pub(super) fn want(&mut self, wanted: &Wanted, now: Now) {
        for identity in wanted {
            self.entries
                .entry(identity.clone())
                .or_default()
                .unwanted_since = None;
        }
        for (identity, entry) in &mut self.entries {
            if !wanted.contains(identity) {
                entry.unwanted_since.get_or_insert(now.mono);
            }
        }
    }

    /// Up to `limit` identities to ask a certificate for now; they count as asked for.
    pub(super) fn take_due(&mut self, limit: usize, now: Now) -> Vec<Identity> {
        // Those that have nothing come before those that renew.
        let mut due: Vec<(bool, &Identity, &mut Entry)> = self
            .entries
            .iter_mut()
            .filter(|(_, entry)| entry.wait(now) == Some(Duration::ZERO))
            .map(|(identity, entry)| (entry.usable(now.wall), identity, entry))
            .collect();
        due.sort_by_key(|(usable, _, _)| *usable);
        due.into_iter()
            .take(limit)
            .map(|(_, identity, entry)| {
                entry.asking = true;
                identity.clone()
            })
            .collect()
    }

    /// A certificate came. Renewal is due at two thirds of what is left of its life, up to a tenth
    /// earlier or later as `chance` (-1 to 1) says, so that a node's certificates do not all come
    /// due together. Tells whether somebody still wants it.
    pub(super) fn signed(
        &mut self,
        identity: &Identity,
        validity: Validity,
        now: Now,
        chance: f64,
    ) -> bool {
        let Some(entry) = self.entries.get_mut(identity) else {
            return false;
        };
        let left = validity
            .not_after
            .duration_since(now.wall)
            .unwrap_or(Duration::ZERO);
        let wait = left.mul_f64(2.0 / 3.0 * (1.0 + 0.1 * chance));
        if entry.held.is_some() {
            entry.renewals += 1;
        }
        entry.held = Some(Held {
            validity,
            renew_at: now.wall + wait,
        });
        entry.asking = false;
        entry.failures = 0;
        entry.retry_at = None;
        entry.last_error = None;
        entry.refused = false;
        true
    }

    pub(super) fn knows(&self, identity: &Identity) -> bool {
        self.entries.contains_key(identity)
    }

    /// None came. The next try is twice as far away as the last one was, a fifth more or less as
    /// `chance` (-1 to 1) says. A certificate in hand serves on, and the more of its life is left
    /// the longer the tries may be apart: an outage shall not end in a pile of requests.
    pub(super) fn failed(
        &mut self,
        identity: &Identity,
        error: String,
        refused: bool,
        now: Now,
        chance: f64,
    ) {
        let Some(entry) = self.entries.get_mut(identity) else {
            return;
        };
        let wait = if refused {
            REFUSED_RETRY
        } else {
            let longest = LAST_RETRY.max(entry.left(now.wall) / TRIES);
            let wait = FIRST_RETRY.saturating_mul(1_u32 << entry.failures.min(16));
            wait.min(longest)
        };
        entry.asking = false;
        entry.failures = entry.failures.saturating_add(1);
        entry.retry_at = Some(now.mono + wait.mul_f64(1.0 + 0.2 * chance));
        entry.last_error = Some(error);
        entry.refused = refused;
    }

    /// The anchor over this certificate is gone: renew soon, `chance` (-1 to 1) spreads it.
    pub(super) fn renew_soon(&mut self, identity: &Identity, now: Now, chance: f64) {
        if let Some(Entry {
            held: Some(held), ..
        }) = self.entries.get_mut(identity)
        {
            let soon = now.wall + HURRY.mul_f64((1.0 + chance) / 2.0);
            held.renew_at = held.renew_at.min(soon);
        }
    }

    /// A signer was refused or down and has changed: what waits because of a failure asks now.
    pub(super) fn retry_now(&mut self) {
        for entry in self.entries.values_mut() {
            entry.retry_at = None;
        }
    }

    /// Removes what has lingered long enough; the caller forgets its certificates.
    pub(super) fn take_gone(&mut self, now: Now) -> Vec<Identity> {
        let gone: Vec<Identity> = self
            .entries
            .iter()
            .filter(|(_, entry)| entry.lingers(now) == Some(Duration::ZERO))
            .map(|(identity, _)| identity.clone())
            .collect();
        for identity in &gone {
            self.entries.remove(identity);
        }
        gone
    }

    /// How long nothing happens unless told: a renewal, a retry, an end of lingering, an expiry.
    pub(super) fn idle_for(&self, now: Now) -> Option<Duration> {
        self.entries
            .values()
            .flat_map(|entry| [entry.wait(now), entry.lingers(now), entry.expires(now)])
            .flatten()
            .min()
    }

    pub(super) fn status(&self, now: SystemTime) -> Vec<CertificateStatus> {
        self.entries
            .iter()
            .map(|(identity, entry)| entry.status(identity, now))
            .collect()
    }
}

impl Entry {
    /// How long until a certificate is to be asked for; `None` if not at all.
    fn wait(&self, now: Now) -> Option<Duration> {
        if self.asking || self.unwanted_since.is_some() {
            return None;
        }
        let renewal = match &self.held {
            // A clock that was set back makes a good certificate one of the future: ask anew.
            Some(held) if held.validity.holds(now.wall) => held
                .renew_at
                .duration_since(now.wall)
                .unwrap_or(Duration::ZERO),
            Some(_) | None => Duration::ZERO,
        };
        let retry = self
            .retry_at
            .map_or(Duration::ZERO, |at| at.saturating_duration_since(now.mono));
        Some(renewal.max(retry))
    }

    fn lingers(&self, now: Now) -> Option<Duration> {
        self.unwanted_since
            .map(|since| (since + LINGER).saturating_duration_since(now.mono))
    }

    fn expires(&self, now: Now) -> Option<Duration> {
        let not_after = self.held.as_ref()?.validity.not_after;
        not_after
            .duration_since(now.wall)
            .ok()
            .filter(|left| !left.is_zero())
    }

    /// Of the certificate in hand.
    fn left(&self, wall: SystemTime) -> Duration {
        let held = self.held.as_ref().map(|held| &held.validity);
        let held = held.filter(|validity| validity.holds(wall));
        let left = held.and_then(|validity| validity.not_after.duration_since(wall).ok());
        left.unwrap_or_default()
    }

    fn usable(&self, wall: SystemTime) -> bool {
        self.held
            .as_ref()
            .is_some_and(|held| held.validity.holds(wall))
    }

    fn status(&self, identity: &Identity, now: SystemTime) -> CertificateStatus {
        let validity = self.held.as_ref().map(|held| &held.validity);
        CertificateStatus {
            identity: identity.to_string(),
            state: match validity {
                None => "pending",
                Some(validity) if validity.holds(now) => "ready",
                Some(validity) if now < validity.not_before => "pending",
                Some(_) => "expired",
            },
            serial: validity.map_or_else(String::new, |validity| validity.serial.clone()),
            not_before: validity.map(|validity| validity.not_before),
            not_after: validity.map(|validity| validity.not_after),
            renew_at: self.held.as_ref().map(|held| held.renew_at),
            renewals: self.renewals,
            last_error: self.last_error.clone(),
            refused: self.refused,
        }
    }
}

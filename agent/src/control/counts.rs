//! What controller and signer have decided, counted by word.

use std::{
    collections::BTreeMap,
    time::{SystemTime, UNIX_EPOCH},
};

use parking_lot::Mutex;

use super::ask::Reason;

/// Shared by who counts and who shows.
#[derive(Debug, Default)]
pub struct Counts(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    good: u64,
    refused: BTreeMap<Reason, u64>,
    collected: u64,
    waiting: usize,
    issuer_ends: Option<SystemTime>,
    troubled: bool,
}

/// Everything at one moment.
#[derive(Debug)]
pub struct Shown {
    /// Approved, or signed.
    pub good: u64,
    /// All words, also those that were never said: a series that is there can be alerted on.
    pub refused: Vec<(&'static str, u64)>,
    /// Requests that were deleted.
    pub collected: u64,
    /// Requests that wait for us.
    pub waiting: usize,
    /// Unix seconds.
    pub issuer_ends: Option<u64>,
    /// The Secret or the ConfigMap is not as it should be.
    pub troubled: bool,
}

impl Counts {
    pub(super) fn good(&self) {
        self.0.lock().good += 1;
    }

    pub(super) fn refused(&self, reason: Reason) {
        *self.0.lock().refused.entry(reason).or_default() += 1;
    }

    pub(super) fn collected(&self) {
        self.0.lock().collected += 1;
    }

    pub(super) fn waiting(&self, requests: usize) {
        self.0.lock().waiting = requests;
    }

    pub(super) fn authority(&self, ends: Option<SystemTime>, troubled: bool) {
        let mut inner = self.0.lock();
        inner.issuer_ends = ends;
        inner.troubled = troubled;
    }

    pub fn shown(&self) -> Shown {
        let inner = self.0.lock();
        let said = |reason: Reason| inner.refused.get(&reason).copied().unwrap_or_default();
        let since = |end: SystemTime| end.duration_since(UNIX_EPOCH).ok();
        Shown {
            good: inner.good,
            refused: Reason::ALL.map(|r| (r.as_str(), said(r))).into(),
            collected: inner.collected,
            waiting: inner.waiting,
            issuer_ends: inner.issuer_ends.and_then(since).map(|end| end.as_secs()),
            troubled: inner.troubled,
        }
    }
}

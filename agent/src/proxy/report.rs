//! The one exit of every connection: exactly one access-log record and one change of counters.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    copy::{End, Meter},
    reason::Reason,
    threads::Thread,
};
use crate::{
    access_log::Record,
    metrics::{Direction, Outcome},
    state::{Workload, resolve::RefusedDestination},
};

/// What is known of a connection so far. On the heap: it lives as long as the connection.
pub(super) struct Report {
    pub(super) record: Record,
    /// What was dialled; the record says where it was led.
    pub(super) target: SocketAddr,
    started: Instant,
}

/// A refusal, with the sentence that people read.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) reason: Reason,
    pub(super) detail: String,
}

impl Refusal {
    pub(super) fn new(reason: Reason, detail: impl Into<String>) -> Self {
        Self {
            reason,
            detail: detail.into(),
        }
    }
}

impl From<Reason> for Refusal {
    fn from(reason: Reason) -> Self {
        Self {
            reason,
            detail: String::new(),
        }
    }
}

/// Why it leads nowhere, and what was dialled.
impl From<(RefusedDestination, SocketAddr)> for Refusal {
    fn from((why, dialled): (RefusedDestination, SocketAddr)) -> Self {
        Self::new(why.into(), why.sentence(dialled))
    }
}

impl Report {
    pub(super) fn new(direction: Direction, client: SocketAddr, target: SocketAddr) -> Box<Self> {
        Box::new(Self {
            record: Record {
                direction,
                src_addr: client,
                src_workload: None,
                src_identity: None,
                dst_addr: target,
                dst_hbone_addr: None,
                dst_service: None,
                dst_workload: None,
                dst_identity: None,
                bytes_sent: 0,
                bytes_recv: 0,
                duration: Duration::ZERO,
                error: None,
            },
            target,
            started: Instant::now(),
        })
    }

    /// The pod of this node whose traffic it is.
    fn own(&self) -> Option<&Arc<Workload>> {
        match self.record.direction {
            Direction::Outbound => self.record.src_workload.as_ref(),
            Direction::Inbound => self.record.dst_workload.as_ref(),
        }
    }

    /// Refused, or failed before a byte could flow.
    pub(super) fn refused(mut self: Box<Self>, refusal: &Refusal, thread: &Thread) {
        let word = refusal.reason.word();
        thread
            .recorder
            .error(self.record.direction, self.own(), word);
        self.record.error = Some(if refusal.detail.is_empty() {
            word.to_owned()
        } else {
            format!("{word}: {}", refusal.detail)
        });
        self.log(thread);
    }

    /// Bytes flowed; now they do not any more.
    pub(super) fn ended(mut self: Box<Self>, end: End, meter: Meter, thread: &Thread) {
        let outcome = match end {
            End::Finished => Outcome::Success,
            End::Broken(reason) => {
                self.record.error = Some(reason.word().to_owned());
                Outcome::Failure(reason.word())
            }
        };
        (self.record.bytes_sent, self.record.bytes_recv) = match self.record.direction {
            Direction::Outbound => (meter.sent, meter.received),
            Direction::Inbound => (meter.received, meter.sent),
        };
        for flow in [meter.outbound, meter.inbound].into_iter().flatten() {
            flow.close(outcome);
        }
        self.log(thread);
    }

    fn log(mut self: Box<Self>, thread: &Thread) {
        self.record.duration = self.started.elapsed();
        thread.access_log.record(self.record);
    }
}

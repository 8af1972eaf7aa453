//! One line per finished connection, written off the data path.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use crate::{metrics::Direction, state::{Identity, ObjectKey, Workload}};

/// ztunnel's fields.
#[derive(Debug)]
pub struct Record {
    pub direction: Direction,
    pub src_addr: SocketAddr,
    pub src_workload: Option<Arc<Workload>>,
    /// Only if proven by mTLS or the netns.
    pub src_identity: Option<Identity>,
    /// Original destination.
    pub dst_addr: SocketAddr,
    /// The tunnel's far end.
    pub dst_hbone_addr: Option<SocketAddr>,
    pub dst_service: Option<ObjectKey>,
    pub dst_workload: Option<Arc<Workload>>,
    pub dst_identity: Option<Identity>,
    /// Bytes from the client to the server, and back.
    pub bytes_sent: u64,
    pub bytes_recv: u64,
    pub duration: Duration,
    /// A sentence; with a fixed word in front, e.g. `policy: unauthenticated …`.
    pub error: Option<String>,
}

/// Sends records to the writer; never waits. What does not fit is counted and dropped.
#[derive(Clone)]
pub struct AccessLog {}

impl AccessLog {
    pub fn record(&self, _record: Record) {
        unreachable!("written by the room's owner")
    }
}

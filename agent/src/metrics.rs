//! Golden metrics in Linkerd's names, and our own. Hot counters are resolved once per flow and
//! live per data thread; a scrape sums them.

use std::{net::SocketAddr, sync::Arc};

use crate::state::{Identity, ObjectKey, Workload, policy::PolicyRef};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    Inbound,
    Outbound,
}

/// What is known of one proxied connection once it is decided; resolves to the series it moves.
#[derive(Clone, Debug)]
pub struct FlowInfo {
    pub direction: Direction,
    /// The pod on this node whose traffic it is: the caller (outbound) or the callee (inbound).
    pub workload: Arc<Workload>,
    /// The other end, if it is a pod we know.
    pub peer: Option<Arc<Workload>>,
    pub client_id: Option<Identity>,
    pub server_id: Option<Identity>,
    /// Original destination.
    pub target: SocketAddr,
    /// The Service that was dialled.
    pub service: Option<(ObjectKey, u16)>,
    pub tls: TlsStatus,
    /// Inbound: which Server and authorization decided.
    pub server: Option<PolicyRef>,
    pub authz: Option<PolicyRef>,
}

/// Linkerd's `tls` and `no_tls_reason`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TlsStatus {
    /// Carried by a tunnel.
    True,
    /// `no_identity`, reason `same_node`: one kernel and one process hold both ends.
    SameNode,
    /// `no_identity`, reason `not_provided_by_service_discovery`: plain, the peer is not meshed.
    NotMeshed,
    /// `no_identity`, reason `passthrough`: nobody in the mesh has the address.
    Passthrough,
}

/// How a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    Success,
    /// With the error's fixed word, e.g. `reset`, `connect_refused`, `policy_changed`, `timeout`.
    Failure(&'static str),
}

/// All metrics of the process.
pub struct Metrics {}

/// A data thread's view: cheap, no lock on the hot path.
pub struct Recorder {}

/// The counters of one open connection. Opening counts; [`Flow::close`] or drop closes.
pub struct Flow {}

impl Metrics {
    pub fn recorder(self: &Arc<Self>, _thread: usize) -> Recorder {
        unreachable!("written by the room's owner")
    }
}

impl Recorder {
    pub fn open(&self, _info: &FlowInfo) -> Flow {
        unreachable!("written by the room's owner")
    }
    /// `inbound_tcp_authz_allow_total` / `_deny_total`.
    pub fn authz(&self, _info: &FlowInfo, _allowed: bool) {}
    /// A connection refused or failed before it had a flow; `reason` is a fixed word.
    pub fn error(&self, _direction: Direction, _workload: Option<&Arc<Workload>>, _reason: &'static str) {}
    /// A TLS handshake on the tunnel port; `result` is `ok` or a fixed word.
    pub fn handshake(&self, _server: bool, _result: &'static str) {}
    pub fn tunnels(&self, _delta: i64) {}
    pub fn buffered_bytes(&self, _delta: i64) {}
}

impl Flow {
    /// Bytes read from the source (the client's side).
    pub fn from_source(&self, _bytes: u64) {}
    /// Bytes read from the destination (the server's side).
    pub fn from_destination(&self, _bytes: u64) {}
    pub fn close(self, _outcome: Outcome) {}
}

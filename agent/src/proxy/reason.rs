//! Why a connection was refused or ended badly: one fixed word each.
//!
//! The words are labels of metrics, open the error field of an access-log line, and travel in the
//! header [`HEADER`] of a tunnel's refusal, so that the caller's agent can say why. A peer's word
//! that is not in the table becomes [`Reason::RefusedByPeer`]: nobody can make us grow labels.

use http::StatusCode;

use crate::state::{policy::DenyReason, resolve::RefusedDestination};

/// Response header of a refused CONNECT.
pub(super) const HEADER: &str = "picomesh-reason";

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident = $word:literal, $status:ident;)*) => {
        /// Why. The word is what people see; the status is what a tunnel's peer is answered.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Reason {
            $($(#[$doc])* $name,)*
        }

        impl Reason {
            /// All of them, for documentation and for reading a peer's word.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            pub const fn word(self) -> &'static str {
                match self {
                    $(Self::$name => $word,)*
                }
            }

            /// What a tunnel's client is answered.
            pub(super) const fn status(self) -> StatusCode {
                match self {
                    $(Self::$name => StatusCode::$status,)*
                }
            }
        }
    };
}

reasons! {
    // May it.
    /// The callee's policy wants a proven identity and there is none.
    Unauthenticated = "unauthenticated", FORBIDDEN;
    /// The identity is proven and no rule of the callee allows it.
    Unauthorized = "unauthorized", FORBIDDEN;
    /// The client's address is outside the networks allowed.
    Network = "network", FORBIDDEN;
    /// The callee's default policy is `deny`.
    DefaultDeny = "default_deny", FORBIDDEN;
    /// A NetworkPolicy isolates the callee and no rule lets the client in.
    NetworkPolicyIngress = "network_policy_ingress", FORBIDDEN;
    /// A NetworkPolicy isolates the caller and no rule lets it go there.
    NetworkPolicyEgress = "network_policy_egress", FORBIDDEN;
    /// The pod is local and its policy is not known: fail closed.
    NoPolicy = "no_policy", FORBIDDEN;
    /// The address a tunnel claims for its client is not the identity's on that node.
    ClaimedSource = "claimed_source", FORBIDDEN;
    /// The target pod is not of the identity that the tunnel was opened for.
    WrongIdentity = "wrong_identity", FORBIDDEN;

    // Where to.
    /// No pod of this node has the address.
    NotLocal = "not_local", NOT_FOUND;
    /// The pod is local and not meshed.
    NotMeshed = "not_meshed", NOT_FOUND;
    /// A tunnel's target is no address of a pod at all: loopback, link-local, the node.
    BadTarget = "bad_target", BAD_REQUEST;
    /// A tunnel's request is not a CONNECT with the headers it needs.
    BadRequest = "bad_request", BAD_REQUEST;
    /// A Service with that address has no endpoint to offer.
    NoEndpoints = "no_endpoints", SERVICE_UNAVAILABLE;
    /// A Service has the address and not the port.
    NoSuchPort = "no_such_port", NOT_FOUND;
    /// Two live pods claim the address.
    AmbiguousAddress = "ambiguous_address", SERVICE_UNAVAILABLE;
    /// Loopback, unspecified, multicast, or a listener's own address.
    Unroutable = "unroutable", BAD_REQUEST;
    /// The node's own tunnel port, from a pod.
    TunnelPort = "tunnel_port", FORBIDDEN;
    /// Nobody in the mesh has the address and `outbound-default` is `deny`.
    OutboundDefaultDeny = "outbound_default_deny", FORBIDDEN;
    /// The pod whose listener accepted is not known yet, or not any more.
    UnknownPod = "unknown_pod", SERVICE_UNAVAILABLE;

    // Getting there.
    /// The application refused.
    ConnectRefused = "connect_refused", BAD_GATEWAY;
    /// The application, or the way to it, did not answer in time.
    ConnectTimeout = "connect_timeout", GATEWAY_TIMEOUT;
    /// There is no way to the address.
    Unreachable = "unreachable", BAD_GATEWAY;
    /// A socket could not be made: limits, or the pod's namespace is gone.
    NoSocket = "no_socket", SERVICE_UNAVAILABLE;
    /// There is no certificate for the caller's identity yet.
    NoCertificate = "no_certificate", SERVICE_UNAVAILABLE;
    /// No tunnel to the callee's node could be opened.
    TunnelFailed = "tunnel_failed", BAD_GATEWAY;
    /// The callee's node showed a certificate that is not the callee's.
    TunnelIdentity = "tunnel_identity", BAD_GATEWAY;
    /// The callee's node refused without a word that we know.
    RefusedByPeer = "refused_by_peer", BAD_GATEWAY;

    // Too much of it.
    /// The pod has as many connections dialled and open as it may.
    PodConnections = "pod_connections", TOO_MANY_REQUESTS;
    /// The pod dials faster than it may.
    PodConnectionRate = "pod_connection_rate", TOO_MANY_REQUESTS;
    /// Too many connections that the pod has dialled wait for their far end.
    PodPending = "pod_pending", TOO_MANY_REQUESTS;
    /// As many connections from outside the node as may be open at the pod.
    PodInboundConnections = "pod_inbound_connections", TOO_MANY_REQUESTS;
    /// The pod is called faster than it may be.
    PodInboundRate = "pod_inbound_rate", TOO_MANY_REQUESTS;
    /// Too many connections that came to the pod wait for the application.
    PodInboundPending = "pod_inbound_pending", TOO_MANY_REQUESTS;
    /// All pods of the node together have as many connections open as they may.
    NodeConnections = "node_connections", SERVICE_UNAVAILABLE;

    /// The peer that opens the tunnel has as many open as it may.
    PeerTunnels = "peer_tunnels", TOO_MANY_REQUESTS;

    // Ending badly.
    /// The client's side sent RST.
    ClientReset = "client_reset", BAD_GATEWAY;
    /// The server's side sent RST.
    ServerReset = "server_reset", BAD_GATEWAY;
    /// The tunnel that carried it died.
    TunnelLost = "tunnel_lost", BAD_GATEWAY;
    /// A peer went silent.
    Timeout = "timeout", GATEWAY_TIMEOUT;
    /// A changed policy forbids it.
    PolicyChanged = "policy_changed", FORBIDDEN;
    /// The pod is gone.
    PodGone = "pod_gone", SERVICE_UNAVAILABLE;
    /// The agent ends and its patience is over.
    Drained = "drained", SERVICE_UNAVAILABLE;

    // Before anybody is known (tunnel port).
    /// SNI names no identity of this node.
    UnknownServerName = "unknown_server_name", FORBIDDEN;
    /// The handshake took too long.
    HandshakeTimeout = "handshake_timeout", FORBIDDEN;
    /// Too many handshakes are pending and this one was among the oldest of the largest source.
    HandshakeEvicted = "handshake_evicted", FORBIDDEN;
    /// Not TLS, not our versions, or the peer went away.
    HandshakeFailed = "handshake_failed", FORBIDDEN;
    /// No client certificate.
    CertificateMissing = "certificate_missing", FORBIDDEN;
    /// Expired or not yet valid.
    CertificateExpired = "certificate_expired", FORBIDDEN;
    /// Of a foreign CA.
    CertificateUnknownIssuer = "certificate_unknown_issuer", FORBIDDEN;
    /// Not of the form we want: no SPIFFE ID, or more than one.
    CertificateInvalid = "certificate_invalid", FORBIDDEN;
    /// Strangers begin handshakes faster than they may.
    HandshakeRate = "handshake_rate", TOO_MANY_REQUESTS;

    // Why a tunnel was cut.
    /// More new streams in a second than a tunnel may open.
    FloodHeaders = "flood_headers", TOO_MANY_REQUESTS;
    /// Streams reset as fast as they are opened.
    FloodResets = "flood_resets", TOO_MANY_REQUESTS;
    /// Settings without need.
    FloodSettings = "flood_settings", TOO_MANY_REQUESTS;
    /// Pings without need.
    FloodPings = "flood_pings", TOO_MANY_REQUESTS;
    /// Windows opened by next to nothing.
    FloodWindows = "flood_windows", TOO_MANY_REQUESTS;
    /// A header block in too many pieces.
    FloodContinuations = "flood_continuations", TOO_MANY_REQUESTS;
    /// Other frames, or more of something than HTTP/2's own bounds allow.
    FloodOther = "flood_other", TOO_MANY_REQUESTS;
    /// A frame was begun and not finished in time.
    SlowFrames = "slow_frames", TOO_MANY_REQUESTS;
    /// The peer does not keep to HTTP/2.
    ProtocolError = "protocol_error", BAD_REQUEST;
}

impl Reason {
    /// A peer's word; unknown words are all the same to us.
    pub(super) fn from_peer(word: &[u8]) -> Self {
        Self::ALL
            .iter()
            .copied()
            .find(|reason| reason.word().as_bytes() == word)
            .unwrap_or(Self::RefusedByPeer)
    }
}

impl From<DenyReason> for Reason {
    fn from(reason: DenyReason) -> Self {
        match reason {
            DenyReason::Unauthenticated => Self::Unauthenticated,
            DenyReason::Unauthorized => Self::Unauthorized,
            DenyReason::Network => Self::Network,
            DenyReason::DefaultDeny => Self::DefaultDeny,
        }
    }
}

impl From<RefusedDestination> for Reason {
    fn from(reason: RefusedDestination) -> Self {
        match reason {
            RefusedDestination::NoEndpoints => Self::NoEndpoints,
            RefusedDestination::NoSuchPort => Self::NoSuchPort,
            RefusedDestination::AmbiguousAddress => Self::AmbiguousAddress,
            RefusedDestination::Unroutable => Self::Unroutable,
            RefusedDestination::TunnelPort => Self::TunnelPort,
            RefusedDestination::OutboundDefaultDeny => Self::OutboundDefaultDeny,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_word_is_its_own_and_comes_back() {
        let words: HashSet<_> = Reason::ALL.iter().map(|reason| reason.word()).collect();
        assert_eq!(words.len(), Reason::ALL.len());
        for reason in Reason::ALL {
            assert_eq!(Reason::from_peer(reason.word().as_bytes()), *reason);
            assert!(!reason.status().is_success());
        }
    }

    #[test]
    fn a_foreign_word_makes_no_label() {
        assert_eq!(
            Reason::from_peer(b"made_up_by_a_peer"),
            Reason::RefusedByPeer
        );
    }
}

//! The one list of outcomes.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! close_reasons {
    ($($(#[doc = $doc:literal])+ $variant:ident => $text:literal, $flags:literal, $fault:ident;)+) => {
        /// Why a flow ended: the one list used by logs, metrics, `connections` and `explain`.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum CloseReason {
            $($(#[doc = $doc])+ $variant,)+
        }

        impl CloseReason {
            /// Every reason, in order.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)+];

            /// The word in logs and in `culvert_` metrics.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text,)+ }
            }

            /// Istio's `response_flags` value; `-` when the flow ended well.
            #[must_use]
            pub const fn response_flags(self) -> &'static str {
                match self { $(Self::$variant => $flags,)+ }
            }

            /// Whose doing it was.
            #[must_use]
            pub const fn fault(self) -> Fault {
                match self { $(Self::$variant => Fault::$fault,)+ }
            }
        }
    };
}

/// Whose doing an outcome is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Fault {
    /// Nobody's: the flow ended as its ends wished.
    None,
    /// The dialling side's.
    Client,
    /// The far side's: application, agent or network.
    Peer,
    /// An operator's decision.
    Policy,
    /// The controller's, or missing configuration.
    ControlPlane,
    /// This agent's, or its node's.
    Agent,
}

close_reasons! {
    /// Both directions ended with FIN.
    Complete => "complete", "-", None;
    /// The client reset.
    ClientReset => "client_reset", "-", Client;
    /// The server reset.
    ServerReset => "server_reset", "-", Peer;
    /// A policy refused the flow.
    PolicyDenied => "policy_denied", "DENY", Policy;
    /// A policy, identity or trust change cut the live flow.
    PolicyChanged => "policy_changed", "DENY", Policy;
    /// Unknown destination outside the mesh while `unknownEgress: deny`.
    EgressDenied => "egress_denied", "DENY", Policy;
    /// The peer answered CONNECT with a policy refusal (401).
    PeerDenied => "peer_denied", "DENY", Policy;
    /// The destination is an agent port, or leads back to this agent.
    LoopRefused => "loop_refused", "DENY", Client;
    /// An address of the cluster's own pods at which nobody is known (yet).
    UnknownDestination => "unknown_destination", "CONNECT", ControlPlane;
    /// The CONNECT named an address or service that is not this pod's.
    WrongDestination => "wrong_destination", "DENY", Client;
    /// A service without an endpoint to send to.
    NoHealthyUpstream => "no_healthy_upstream", "CONNECT", Peer;
    /// A service that has no such port.
    NoSuchPort => "no_such_port", "CONNECT", Client;
    /// The bound waypoint is unknown or not ready.
    WaypointUnavailable => "waypoint_unavailable", "CONNECT", ControlPlane;
    /// The far network's gateway is unknown, or the flow cannot use one.
    GatewayUnavailable => "gateway_unavailable", "CONNECT", ControlPlane;
    /// This agent does not know the pod's workload (yet).
    UnknownWorkload => "unknown_workload", "CONNECT", ControlPlane;
    /// This agent has not heard all policies since it was started for the first time.
    NotSynced => "not_synced", "CONNECT", ControlPlane;
    /// A policy that applies has not been received.
    PolicyMissing => "policy_missing", "DENY", ControlPlane;
    /// The destination refused the connection.
    ConnectRefused => "connect_refused", "CONNECT", Peer;
    /// The destination did not answer in time.
    ConnectTimeout => "connect_timeout", "CONNECT", Peer;
    /// Nothing answered on port 15008: perhaps a NetworkPolicy blocks it.
    TunnelConnectFailed => "tunnel_connect_failed", "NETWORK_POLICY", Peer;
    /// No route, no address or no socket for the destination.
    ConnectFailed => "connect_failed", "CONNECT", Peer;
    /// The TLS handshake failed.
    TlsFailure => "tls_failure", "TLS_FAILURE", Peer;
    /// The peer proved another identity than expected.
    WrongIdentity => "wrong_identity", "TLS_FAILURE", Peer;
    /// The peer's certificate is revoked.
    CertRevoked => "cert_revoked", "CERT_REVOKED", Peer;
    /// This agent has no valid certificate for the pod.
    NoCertificate => "no_certificate", "IDENTITY_ERROR", ControlPlane;
    /// The peer broke HTTP/2 or HBONE.
    ProtocolError => "protocol_error", "H2_HANDSHAKE_FAILURE", Peer;
    /// The tunnel ended under the stream.
    TunnelClosed => "tunnel_closed", "CONNECT", Peer;
    /// The peer answered CONNECT with another failure.
    PeerRefused => "peer_refused", "CONNECT", Peer;
    /// A limit of descriptors, memory, streams or connections refused the flow.
    Overloaded => "overloaded", "CONNECT", Agent;
    /// The pod was un-enrolled or removed, or the agent drained.
    Drained => "drained", "-", None;
    /// A peer that stopped answering: keepalive or user timeout.
    TimedOut => "timed_out", "CONNECT", Peer;
    /// A fault of this agent.
    Internal => "internal", "CONNECT", Agent;
}

impl fmt::Display for CloseReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_reason_has_a_word_of_its_own() {
        let words: BTreeSet<_> = CloseReason::ALL.iter().map(|reason| reason.as_str()).collect();
        assert_eq!(words.len(), CloseReason::ALL.len());
    }
}

//! What happened to a connection.

use std::borrow::Cow;
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use mesh_model::{CloseReason, Direction, FlowId, PodUid};
use serde::{Deserialize, Serialize};

use crate::labels::FlowFacts;
use crate::traceparent::TraceParent;

/// How a flow's bytes travelled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FlowPath {
    /// In an HBONE tunnel.
    Tunnel,
    /// In plaintext, because policy allows it.
    Plaintext,
    /// From socket to socket on one node, without the agent in between.
    Direct,
    /// Not at all: refused before a path was chosen.
    None,
}

impl FlowPath {
    /// The word in logs and metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Tunnel => "tunnel",
            Self::Plaintext => "plaintext",
            Self::Direct => "direct",
            Self::None => "none",
        }
    }
}

/// Bytes of payload, by direction of travel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct FlowBytes {
    /// From the client to the server: the request direction.
    pub client_to_server: u64,
    /// From the server to the client: the response direction.
    pub server_to_client: u64,
}

impl FlowBytes {
    /// What was added since `earlier`; zero where a counter went back.
    #[must_use]
    pub const fn since(self, earlier: Self) -> Self {
        Self {
            client_to_server: self.client_to_server.saturating_sub(earlier.client_to_server),
            server_to_client: self.server_to_client.saturating_sub(earlier.server_to_client),
        }
    }

    /// Bytes the local pod sent, for the access log.
    #[must_use]
    pub const fn sent_by_local(self, direction: Direction) -> u64 {
        match direction {
            Direction::Outbound => self.client_to_server,
            Direction::InboundTunnel | Direction::InboundPlaintext => self.server_to_client,
        }
    }

    /// Bytes the local pod received, for the access log.
    #[must_use]
    pub const fn received_by_local(self, direction: Direction) -> u64 {
        match direction {
            Direction::Outbound => self.server_to_client,
            Direction::InboundTunnel | Direction::InboundPlaintext => self.client_to_server,
        }
    }
}

/// The policy that decided about a flow.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PolicyRef {
    /// Kind, namespace and name, e.g. `AuthorizationPolicy shop/allow-cart`.
    pub policy: Arc<str>,
    /// Why the object cannot be read, where that is why it decided. For the log, never for labels: it is long, and
    /// changes with every edit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<Arc<str>>,
    /// Which of its rules, from 0; absent when no single rule decided.
    pub rule: Option<usize>,
}

impl PolicyRef {
    /// The policy's name, and why it cannot be read.
    #[must_use]
    pub fn described(&self) -> Cow<'_, str> {
        match &self.problem {
            Some(problem) => format!("{} (unreadable: {problem})", self.policy).into(),
            None => (&*self.policy).into(),
        }
    }
}

impl fmt::Display for PolicyRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.described())?;
        self.rule.map_or(Ok(()), |rule| write!(f, " rule {rule}"))
    }
}

/// One connection from beginning to end. Every accepted flow yields exactly one.
#[derive(Clone, Debug, PartialEq)]
pub struct FlowRecord {
    /// Its name in logs and in `culvert connections`.
    pub id: FlowId,
    /// The enrolled pod it was captured in.
    pub pod: PodUid,
    /// Which way it went, seen from that pod.
    pub direction: Direction,
    /// Who dialled (`src.addr`).
    pub source: SocketAddr,
    /// What was dialled on the wire (`dst.addr`): port 15008 of the next hop for a tunnelled flow.
    pub destination: SocketAddr,
    /// The CONNECT authority of a tunnelled flow (`dst.hbone_addr`).
    pub authority: Option<Arc<str>>,
    /// Who talked to whom.
    pub facts: FlowFacts,
    /// How the bytes travelled.
    pub path: FlowPath,
    /// Bytes of payload.
    pub bytes: FlowBytes,
    /// From accept to the end of both directions.
    pub duration: Duration,
    /// How it ended.
    pub reason: CloseReason,
    /// The policy that decided, where one did.
    pub policy: Option<PolicyRef>,
    /// What went wrong, in words of the stage that saw it; absent when the reason says it all.
    pub detail: Option<Arc<str>>,
    /// The trace the flow belongs to.
    pub trace: Option<TraceParent>,
}

/// A connection that ended before it became a flow: a failed handshake, an unknown pod, an overload.
///
/// It has a log line and a counter of ours, and no traffic metrics, as in Istio.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EarlyDenial {
    /// Who dialled.
    pub source: SocketAddr,
    /// What was dialled.
    pub destination: SocketAddr,
    /// Which way it would have gone.
    pub direction: Direction,
    /// Why it ended.
    pub reason: CloseReason,
    /// What went wrong, in words.
    pub detail: Option<Arc<str>>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_counts_from_the_local_pods_side() {
        let bytes = FlowBytes { client_to_server: 10, server_to_client: 700 };
        assert_eq!(bytes.sent_by_local(Direction::Outbound), 10);
        assert_eq!(bytes.received_by_local(Direction::Outbound), 700);
        assert_eq!(bytes.sent_by_local(Direction::InboundTunnel), 700);
        assert_eq!(bytes.received_by_local(Direction::InboundPlaintext), 10);
    }

    #[test]
    fn a_counter_that_went_back_adds_nothing() {
        let earlier = FlowBytes { client_to_server: 10, server_to_client: 5 };
        let later = FlowBytes { client_to_server: 4, server_to_client: 9 };
        let expected = FlowBytes { client_to_server: 0, server_to_client: 4 };
        assert_eq!(later.since(earlier), expected);
    }

    #[test]
    fn a_policy_is_named_with_its_rule() {
        let mut policy = PolicyRef {
            policy: "AuthorizationPolicy shop/allow-cart".into(),
            problem: None,
            rule: Some(2),
        };
        assert_eq!(policy.to_string(), "AuthorizationPolicy shop/allow-cart rule 2");
        (policy.rule, policy.problem) = (None, Some("no action".into()));
        assert_eq!(
            policy.to_string(),
            "AuthorizationPolicy shop/allow-cart (unreadable: no action)"
        );
    }
}

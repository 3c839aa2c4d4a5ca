//! One captured connection's facts.

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::address::{ClientAddr, OrigDst};

/// Names a flow in logs and in `connections`; unique within one agent's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct FlowId(pub u64);

impl fmt::Display for FlowId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// An enrolled pod's key on this node: the Kubernetes pod uid, or the name given at enrolment.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PodUid(Arc<str>);

impl PodUid {
    /// A uid as it was enrolled.
    #[must_use]
    pub fn new(uid: &str) -> Self {
        Self(uid.into())
    }

    /// The text of it.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for PodUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Which way a flow goes, seen from the pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Direction {
    /// The pod dialled.
    Outbound,
    /// The pod is dialled, through the tunnel.
    InboundTunnel,
    /// The pod is dialled in plaintext.
    InboundPlaintext,
}

impl Direction {
    /// The side that reports the flow in telemetry.
    #[must_use]
    pub const fn reporter(self) -> Reporter {
        match self {
            Self::Outbound => Reporter::Source,
            Self::InboundTunnel | Self::InboundPlaintext => Reporter::Destination,
        }
    }
}

/// The side that reports a flow. Source: Istio's `reporter` label.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Reporter {
    /// The client's agent.
    Source,
    /// The server's agent.
    Destination,
}

impl Reporter {
    /// The label's value.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }
}

/// A stamp of the index or of the policies; it never goes back within one agent's life.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
pub struct Revision(pub u64);

impl Revision {
    /// The stamp after this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A captured connection, before anything is known about it but what the kernel says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flow {
    /// Its name in logs.
    pub id: FlowId,
    /// Which way it goes.
    pub direction: Direction,
    /// Who dialled.
    pub client: ClientAddr,
    /// What was dialled. For [`Direction::InboundTunnel`] the pod address of the tunnel and the authority's port.
    pub orig_dst: OrigDst,
    /// The enrolled pod it was captured in.
    pub pod: PodUid,
    /// When it was accepted.
    pub accepted_at: Instant,
}

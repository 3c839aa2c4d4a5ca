//! What the agent answers.

use std::collections::BTreeSet;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::names::{ContainerId, NetnsPath};
use crate::request::PodRef;

/// One reply.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum EnrollReply {
    /// Done; for an enrolment: the pod is captured.
    Ok,
    /// The pod is not to be in the mesh, and is not.
    Excluded {
        /// Why, e.g. `namespace kube-system is excluded`.
        reason: String,
    },
    /// The pods the agent knows, by namespace and name.
    Pods {
        /// Them.
        pods: Vec<EnrolledPod>,
    },
    /// Not done, and nothing was left half done.
    Refused(Refusal),
}

/// Why the agent did not do what was asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{reason}")]
pub struct Refusal {
    /// What is wrong, one line.
    pub reason: String,
    /// What to do about it, one line; empty when nothing can be said.
    pub remedy: String,
    /// True when the same request may succeed later without anybody's doing.
    pub retryable: bool,
}

impl From<Refusal> for EnrollReply {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

/// How far a pod has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PodPhase {
    /// Known and outside the mesh.
    Excluded,
    /// To be captured; the last try failed and it is tried again.
    Pending,
    /// Captured.
    Enrolled,
    /// Being let go; its last connections finish.
    Draining,
    /// A sandbox that was replaced or removed and in which something may live: captured, and refused everything.
    Closed,
}

impl PodPhase {
    /// The word for people.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Excluded => "excluded",
            Self::Pending => "pending",
            Self::Enrolled => "enrolled",
            Self::Draining => "draining",
            Self::Closed => "closed",
        }
    }
}

/// One pod of the node, as the agent sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EnrolledPod {
    /// Its names.
    pub pod: PodRef,
    /// Its network namespace.
    pub netns: NetnsPath,
    /// Its addresses.
    pub ips: BTreeSet<IpAddr>,
    /// Its sandbox.
    pub container_id: ContainerId,
    /// How far it has come.
    pub phase: PodPhase,
    /// Why it is not [`PodPhase::Enrolled`]; empty otherwise.
    pub detail: String,
}

//! What was decided, and which rule decided.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use mesh_model::{CloseReason, Revision};
use serde::{Deserialize, Serialize};

use crate::policy::{PolicyName, PolicyOrigin};

/// The answer to "may this flow happen".
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub struct Verdict {
    /// Whether it may.
    pub decision: Decision,
    /// What AUDIT and dry-run policies say. Never part of the decision; at most one per policy.
    pub notes: Vec<Note>,
}

/// Yes, with the proof of it, or no.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub enum Decision {
    /// It may.
    Allow(Permit),
    /// It may not.
    Deny(Denial),
}

/// Proof that a flow was allowed. Spent by opening a tunnel or passing bytes on; it cannot be copied.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a permit that is not spent permits nothing"]
pub struct Permit {
    rule: Option<RuleRef>,
    revision: Revision,
}

impl Permit {
    pub(crate) const fn new(rule: Option<RuleRef>, revision: Revision) -> Self {
        Self { rule, revision }
    }

    /// The ALLOW rule that matched; none when nothing applied.
    #[must_use]
    pub const fn rule(&self) -> Option<&RuleRef> {
        self.rule.as_ref()
    }

    /// The revision of the policies that allowed it.
    #[must_use]
    pub const fn revision(&self) -> Revision {
        self.revision
    }
}

/// Why a flow may not happen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Denial {
    /// The outcome that is logged and counted.
    pub reason: CloseReason,
    /// The policy and rule that logs and metrics name. When no ALLOW matched, the first of those considered.
    pub rule: Option<RuleRef>,
    /// The particulars.
    pub detail: DenialDetail,
}

/// The particulars of a [`Denial`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DenialDetail {
    /// A DENY rule matched.
    DenyMatched,
    /// ALLOW policies apply and none matched.
    NoAllowMatched {
        /// Those policies, the first eight.
        considered: Vec<PolicyOrigin>,
        /// How many there are beyond those named.
        more: usize,
    },
    /// The workload lists policies that have not been received.
    PolicyMissing {
        /// Their names as listed, the first eight.
        names: Vec<Arc<str>>,
    },
    /// Policies that may apply could not be read, by the controller or by this agent.
    PolicyUnreadable {
        /// Their names, the first eight.
        names: Vec<PolicyName>,
        /// Why the first could not be read.
        reason: Arc<str>,
    },
    /// The flow did not come through the waypoint bound to its destination.
    WaypointBypassed {
        /// The waypoints it could have come through.
        waypoints: Vec<Arc<str>>,
    },
    /// The waypoint bound to the destination is not known, so nothing can have come through it.
    WaypointUnknown {
        /// The waypoints bound.
        waypoints: Vec<Arc<str>>,
    },
    /// The destination is an address of the cluster's own pods that no workload is known to have.
    UnknownDestination {
        /// The address.
        address: IpAddr,
    },
    /// The destination is unknown to the mesh and the namespace denies that.
    UnknownEgress {
        /// The namespace.
        namespace: Arc<str>,
    },
    /// The flow was judged at the wrong end; a fault of the agent, refused.
    WrongStage,
}

impl fmt::Display for Denial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.detail, &self.rule) {
            (DenialDetail::DenyMatched, Some(rule)) => write!(f, "denied by {rule}"),
            (DenialDetail::DenyMatched, None) => f.write_str("denied"),
            (DenialDetail::NoAllowMatched { considered, more }, _) => {
                f.write_str("not allowed by ")?;
                list(f, considered)?;
                if *more > 0 { write!(f, " and {more} more") } else { Ok(()) }
            }
            (DenialDetail::PolicyMissing { names }, _) => {
                f.write_str("policies not received: ")?;
                list(f, names)
            }
            (DenialDetail::PolicyUnreadable { names, .. }, Some(rule)) if names.len() < 2 => {
                write!(f, "denied by {rule}")
            }
            (DenialDetail::PolicyUnreadable { names, reason }, _) => {
                f.write_str("policies cannot be read: ")?;
                list(f, names)?;
                write!(f, " ({reason})")
            }
            (DenialDetail::WaypointBypassed { waypoints }, _) => {
                f.write_str("not through the required waypoint ")?;
                list(f, waypoints)
            }
            (DenialDetail::WaypointUnknown { waypoints }, _) => {
                f.write_str("the required waypoint is unknown: ")?;
                list(f, waypoints)
            }
            (DenialDetail::UnknownDestination { address }, _) => {
                write!(f, "no pod is known at {address}, an address of the cluster's own pods")
            }
            (DenialDetail::UnknownEgress { namespace }, _) => {
                write!(f, "namespace {namespace} denies destinations unknown to the mesh")
            }
            (DenialDetail::WrongStage, _) => f.write_str("judged at the wrong end"),
        }
    }
}

fn list<T: fmt::Display>(f: &mut fmt::Formatter<'_>, items: &[T]) -> fmt::Result {
    for (index, item) in items.iter().enumerate() {
        let separator = if index == 0 { "" } else { ", " };
        write!(f, "{separator}{item}")?;
    }
    Ok(())
}

/// A rule of a policy, by what an operator calls it: `AuthorizationPolicy shop/allow-cart rule 0`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RuleRef {
    /// The object.
    pub origin: PolicyOrigin,
    /// The rule within it, from 0; none when the policy as a whole decided.
    pub rule_index: Option<usize>,
}

impl fmt::Display for RuleRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.rule_index {
            Some(index) => write!(f, "{} rule {index}", self.origin),
            None => self.origin.fmt(f),
        }
    }
}

/// What a policy that is not enforced says about a flow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Note {
    /// What it says.
    pub kind: NoteKind,
    /// The policy's key.
    pub policy: PolicyName,
    /// The rule that says it.
    pub rule: RuleRef,
}

/// What a policy that is not enforced says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NoteKind {
    /// An AUDIT rule matched.
    Audit,
    /// A dry-run DENY rule matched: enforced, it would deny.
    WouldDeny,
    /// A dry-run ALLOW rule matched.
    WouldAllow,
    /// A dry-run ALLOW policy did not match, nor did any other ALLOW: enforced, it would deny.
    WouldNotAllow,
}

impl NoteKind {
    /// The word in logs.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Audit => "audit",
            Self::WouldDeny => "would_deny",
            Self::WouldAllow => "would_allow",
            Self::WouldNotAllow => "would_not_allow",
        }
    }
}

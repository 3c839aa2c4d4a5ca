//! Stage three of a connection: may it happen.
//!
//! [`PolicySet`] holds the compiled policies; [`authorize`] judges inbound flows, [`authorize_egress`] outbound ones. Both
//! cannot fail and do no I/O. A [`Verdict`] says yes with a [`Permit`], of which this crate is the only birthplace, or no with
//! a [`Denial`] that names the rule. [`explain()`] and [`explain_egress`] run the same code and keep every step.
//!
//! ```text
//! applicable: global policies, those of the workload's namespace, those that it lists; and the waypoint it requires
//!  1. the peer is not the required waypoint ──► denied
//!  2. a DENY policy matches ──────────────────► denied
//!  3. a listed policy is not known, or one that
//!     could apply cannot be read ────────────► denied (policy missing)
//!  4. there is no ALLOW policy ───────────────► allowed
//!  5. an ALLOW policy matches ────────────────► allowed, else denied
//! ```
//! A waypoint judges requests with [`authorize_request`]: the same engine and policies, whose conditions on requests it alone can
//! see, without step 1 and by the policies attached to what was dialled.
//!
//! AUDIT and dry-run policies are matched too and leave notes; they never change the decision.

#![forbid(unsafe_code)]

mod claims;
mod compile;
mod evaluate;
pub mod explain;
pub mod policy;
pub mod request;
pub mod set;
mod template;
pub mod verdict;

pub use claims::RequestClaims;
pub use evaluate::{authorize, authorize_egress};
pub use explain::{Explanation, Outcome, PolicyStep, RuleStep, explain, explain_egress};
pub use policy::{
    Action, ClaimMatch, Clause, HeaderMatch, InvalidPolicyName, InvalidTemplate, Match, PathMatch,
    PathTemplate, Policy, PolicyKind, PolicyName, PolicyOrigin, PolicyScope, RequestMatch, Rule,
    ServiceAccountMatch, StringMatch,
};
pub use request::{
    Connection, Request, authorize_connection, authorize_request, explain_connection,
    explain_request,
};
pub use set::{MissingPolicy, PolicySet, UnknownEgress, UnreadablePolicy};
pub use verdict::{Decision, Denial, DenialDetail, Note, NoteKind, Permit, RuleRef, Verdict};

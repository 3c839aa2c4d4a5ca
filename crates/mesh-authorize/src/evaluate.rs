//! The decision.

use std::sync::Arc;

use mesh_model::{CloseReason, Direction, SpiffeId};
use mesh_resolve::{RequiredWaypoint, ResolvedFlow, Route};

use crate::compile::{CompiledPolicy, Subject};
use crate::policy::{Action, PolicyKind, PolicyOrigin};
use crate::set::{Judged, PolicySet, UnknownEgress, UnreadablePolicy};
use crate::verdict::{Decision, Denial, DenialDetail, Note, NoteKind, Permit, RuleRef, Verdict};

/// Policies and missing names that a denial names; beyond, they are counted.
const MAX_NAMED: usize = 8;

/// Whether an inbound flow may be delivered. `peer` is what the tunnel's client proved to be; plaintext proves nothing,
/// whatever is given.
///
/// Judge again, with the current workload in `resolved.local`, whenever policies, workload or trust have changed.
pub fn authorize(
    policies: &PolicySet,
    resolved: &ResolvedFlow,
    peer: Option<&SpiffeId>,
) -> Verdict {
    judge(policies, resolved, peer, &mut ())
}

/// Whether an outbound flow may leave. Tunnels may, since the far end judges them; plaintext to where the mesh knows nobody
/// may unless the pod's namespace denies that.
pub fn authorize_egress(policies: &PolicySet, resolved: &ResolvedFlow) -> Verdict {
    let namespace = &resolved.local.namespace;
    let decision = match &resolved.route {
        Route::Deliver { .. } => wrong_stage(),
        Route::Passthrough { known: false, target } if policies.is_pod_address(target.ip()) => {
            Decision::Deny(Denial {
                reason: CloseReason::UnknownDestination,
                rule: Some(synthetic(namespace, "unknown-destination")),
                detail: DenialDetail::UnknownDestination { address: target.ip() },
            })
        }
        Route::Passthrough { known: false, .. }
            if policies.egress(namespace) == UnknownEgress::Deny =>
        {
            Decision::Deny(Denial {
                reason: CloseReason::EgressDenied,
                rule: Some(synthetic(namespace, "unknown-egress")),
                detail: DenialDetail::UnknownEgress { namespace: Arc::clone(namespace) },
            })
        }
        Route::Tunnel(_) | Route::ViaWaypoint { .. } | Route::Passthrough { .. } => {
            Decision::Allow(Permit::new(None, policies.revision()))
        }
    };
    Verdict { decision, notes: Vec::new() }
}

/// Watches a decision being made.
pub(crate) trait Observe {
    /// A policy was matched against the flow.
    fn considered(
        &mut self,
        policy: &CompiledPolicy,
        subject: &Subject<'_>,
        matched: Option<usize>,
    );
}

impl Observe for () {
    fn considered(&mut self, _: &CompiledPolicy, _: &Subject<'_>, _: Option<usize>) {}
}

/// The one decision procedure; see the crate's documentation for its order.
pub(crate) fn judge(
    policies: &PolicySet,
    resolved: &ResolvedFlow,
    peer: Option<&SpiffeId>,
    observer: &mut impl Observe,
) -> Verdict {
    let Route::Deliver { target, waypoint, .. } = &resolved.route else {
        return Verdict { decision: wrong_stage(), notes: Vec::new() };
    };
    let identity = match resolved.flow.direction {
        Direction::InboundTunnel => peer,
        Direction::InboundPlaintext => None,
        Direction::Outbound => return Verdict { decision: wrong_stage(), notes: Vec::new() },
    };
    let subject = Subject {
        identity,
        source_ip: resolved.flow.client.ip(),
        destination: *target,
        request: None,
    };
    let namespace = &resolved.local.namespace;
    if let Some(denial) = waypoint.as_deref().and_then(|one| bypassed(one, namespace, identity)) {
        return Verdict { decision: Decision::Deny(denial), notes: Vec::new() };
    }
    decide(policies, Judged::workload(&resolved.local), &subject, observer)
}

/// What the policies that apply say of a subject.
pub(crate) fn decide(
    policies: &PolicySet,
    judged: Judged<'_>,
    subject: &Subject<'_>,
    observer: &mut impl Observe,
) -> Verdict {
    let mut notes = Vec::new();
    let mut denied = None;
    let mut allowed = None;
    let mut considered = Considered::default();
    let mut dry_allows = Vec::new();
    for policy in policies.applicable(judged) {
        let source = policy.source();
        let enforced = !source.dry_run;
        let decided = match source.action {
            Action::Deny if enforced => denied.is_some(),
            Action::Allow if enforced => denied.is_some() || allowed.is_some(),
            Action::Deny | Action::Allow | Action::Audit => false,
        };
        if decided {
            continue;
        }
        let matched = policy.matching_rule(subject);
        observer.considered(policy, subject, matched);
        let mut note = |kind, rule_index| {
            let policy_name = source.name.clone();
            notes.push(Note { kind, policy: policy_name, rule: policy.rule_ref(rule_index) });
        };
        match (source.action, enforced, matched) {
            (Action::Audit, _, Some(_)) => note(NoteKind::Audit, matched),
            (Action::Deny, false, Some(_)) => note(NoteKind::WouldDeny, matched),
            (Action::Allow, false, Some(_)) => note(NoteKind::WouldAllow, matched),
            (Action::Allow, false, None) => dry_allows.push(policy),
            (Action::Deny, true, Some(_)) => denied = Some((policy, matched)),
            (Action::Allow, true, Some(_)) => allowed = Some(policy.rule_ref(matched)),
            (Action::Allow, true, None) => considered.add(policy),
            (Action::Audit, _, None) | (Action::Deny, _, None) => {}
        }
    }
    let dry_allowed = notes.iter().any(|note| note.kind == NoteKind::WouldAllow);
    if allowed.is_none() && !dry_allowed {
        notes.extend(dry_allows.into_iter().map(|policy| Note {
            kind: NoteKind::WouldNotAllow,
            policy: policy.source().name.clone(),
            rule: policy.rule_ref(None),
        }));
    }

    let mut unreadable = policies.unreadable_for(judged).peekable();
    let missing: Vec<_> = policies.missing(judged).take(MAX_NAMED).cloned().collect();
    let decision = if let Some((policy, matched)) = denied {
        Decision::Deny(denied_by(policy, matched))
    } else if let Some(first) = unreadable.peek().copied() {
        Decision::Deny(Denial {
            reason: CloseReason::PolicyMissing,
            rule: Some(whole(first)),
            detail: DenialDetail::PolicyUnreadable {
                reason: Arc::clone(&first.reason),
                names: unreadable.take(MAX_NAMED).map(|policy| policy.name.clone()).collect(),
            },
        })
    } else if !missing.is_empty() {
        Decision::Deny(Denial {
            reason: CloseReason::PolicyMissing,
            rule: None,
            detail: DenialDetail::PolicyMissing { names: missing },
        })
    } else if allowed.is_some() || considered.first.is_none() {
        Decision::Allow(Permit::new(allowed, policies.revision()))
    } else {
        Decision::Deny(Denial {
            reason: CloseReason::PolicyDenied,
            rule: considered.first,
            detail: DenialDetail::NoAllowMatched {
                considered: considered.named,
                more: considered.more,
            },
        })
    };
    Verdict { decision, notes }
}

/// A DENY that matched: written so, or put in the place of an object that could not be read.
fn denied_by(policy: &CompiledPolicy, matched: Option<usize>) -> Denial {
    match &policy.source().origin.unreadable {
        None => Denial {
            reason: CloseReason::PolicyDenied,
            rule: Some(policy.rule_ref(matched)),
            detail: DenialDetail::DenyMatched,
        },
        Some(reason) => Denial {
            reason: CloseReason::PolicyMissing,
            rule: Some(policy.rule_ref(None)),
            detail: DenialDetail::PolicyUnreadable {
                names: vec![policy.source().name.clone()],
                reason: Arc::clone(reason),
            },
        },
    }
}

/// The ALLOW policies that did not match.
#[derive(Default)]
struct Considered {
    first: Option<RuleRef>,
    named: Vec<PolicyOrigin>,
    more: usize,
}

impl Considered {
    fn add(&mut self, policy: &CompiledPolicy) {
        self.first.get_or_insert_with(|| policy.rule_ref(None));
        if self.named.len() < MAX_NAMED {
            self.named.push(policy.source().origin.clone());
        } else {
            self.more += 1;
        }
    }
}

/// Why a peer cannot have come through a required waypoint, if so.
fn bypassed(
    required: &RequiredWaypoint,
    namespace: &Arc<str>,
    identity: Option<&SpiffeId>,
) -> Option<Denial> {
    let waypoints = required.names.clone();
    let (reason, detail) = if required.identities.is_empty() {
        (CloseReason::WaypointUnavailable, DenialDetail::WaypointUnknown { waypoints })
    } else if identity.is_some_and(|id| required.identities.binary_search(id).is_ok()) {
        return None;
    } else {
        (CloseReason::PolicyDenied, DenialDetail::WaypointBypassed { waypoints })
    };
    Some(Denial { reason, rule: Some(synthetic(namespace, "waypoint-required")), detail })
}

const fn wrong_stage() -> Decision {
    Decision::Deny(Denial {
        reason: CloseReason::Internal,
        rule: None,
        detail: DenialDetail::WrongStage,
    })
}

/// A policy that could not be read. What kind of object it comes from is unknown; most are these.
fn whole(policy: &UnreadablePolicy) -> RuleRef {
    let origin = PolicyOrigin {
        kind: PolicyKind::AuthorizationPolicy,
        namespace: Arc::clone(&policy.name.namespace),
        name: Arc::clone(&policy.name.name),
        unreadable: Some(Arc::clone(&policy.reason)),
    };
    RuleRef { origin, rule_index: None }
}

fn synthetic(namespace: &Arc<str>, name: &str) -> RuleRef {
    let origin = PolicyOrigin {
        kind: PolicyKind::Synthetic,
        namespace: Arc::clone(namespace),
        name: name.into(),
        unreadable: None,
    };
    RuleRef { origin, rule_index: None }
}

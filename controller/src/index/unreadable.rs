//! Policies that stand in the place of objects that cannot be read: they refuse whatever those may have refused.
//!
//! An AuthorizationPolicy may have refused anything, also one that allows: it allows nobody then. A PeerAuthentication can
//! refuse nothing but what proves no identity. A RequestAuthentication holds at waypoints, which refuse everything where one is
//! attached that they do not know (see `authentications`). At a target that has a waypoint they hold at the endpoints, since nobody
//! knows what the waypoint would have to refuse.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use mesh_authorize::{
    Action, Clause, Policy, PolicyKind, PolicyName, PolicyOrigin, PolicyScope, Rule,
};

use super::policies::{PolicyStatus, Target, members, target_ports, workloads_in};
use super::workloads::{View, WorkloadSource};
use super::{authorization, peer};
use crate::manifest::policy::PolicyTarget;
use crate::manifest::{Kind, Reach, UnreadablePolicy};

/// The targets it is attached to.
pub(super) fn targets(policy: &UnreadablePolicy) -> impl Iterator<Item = Target> + '_ {
    let targets = match &policy.reach {
        Reach::Attached(targets) => targets.as_slice(),
        Reach::Mesh | Reach::Namespace | Reach::Selected(_) => &[],
    };
    Target::among(targets, &policy.meta.namespace)
}

/// The Gateways and classes it is attached to.
pub(super) fn gateways(policy: &UnreadablePolicy) -> impl Iterator<Item = &PolicyTarget> {
    let targets = match &policy.reach {
        Reach::Attached(targets) => targets.as_slice(),
        Reach::Mesh | Reach::Namespace | Reach::Selected(_) => &[],
    };
    targets.iter().filter(|target| matches!(target, PolicyTarget::Gateway(..)))
}

/// The workloads that list its policies, or stop to.
pub(super) fn workloads(view: View<'_>, policy: &UnreadablePolicy) -> Vec<WorkloadSource> {
    if policy.kind == Kind::RequestAuthentication {
        return Vec::new();
    }
    match &policy.reach {
        Reach::Mesh | Reach::Namespace => Vec::new(),
        Reach::Selected(selector) => {
            let everywhere = is_of_root(view, policy);
            let namespace = if everywhere { None } else { Some(&*policy.meta.namespace) };
            workloads_in(view, namespace, |labels| selector.matches(labels))
        }
        Reach::Attached(_) => targets(policy).flat_map(|target| members(view, &target)).collect(),
    }
}

/// Names of the policies a workload lists.
pub(super) fn of_workload(
    view: View<'_>,
    namespace: &str,
    labels: &BTreeMap<String, String>,
    attached: &BTreeSet<Target>,
) -> Vec<Arc<str>> {
    let mut names = Vec::new();
    let all = view.objects.unreadable.values();
    for policy in all.filter(|policy| policy.kind != Kind::RequestAuthentication) {
        match &policy.reach {
            Reach::Mesh | Reach::Namespace => {}
            Reach::Selected(selector) => {
                let here = *policy.meta.namespace == *namespace || is_of_root(view, policy);
                if here && selector.matches(labels) {
                    names.push(name(view, policy, None).to_string().into());
                }
            }
            Reach::Attached(_) => {
                let own = targets(policy).filter(|target| attached.contains(target));
                names
                    .extend(own.map(|target| name(view, policy, Some(&target)).to_string().into()));
            }
        }
    }
    names
}

/// The policies that stand in its place.
pub(super) fn policies(view: View<'_>, policy: &UnreadablePolicy) -> Vec<Policy> {
    if policy.kind == Kind::RequestAuthentication {
        return Vec::new();
    }
    let (kind, clauses) = if policy.kind == Kind::PeerAuthentication {
        let clause = Clause { matches: vec![peer::without_identity()] };
        (PolicyKind::PeerAuthentication, vec![clause])
    } else {
        (PolicyKind::AuthorizationPolicy, Vec::new())
    };
    let rules = vec![Rule { clauses }];
    let namespace: &str =
        if policy.meta.namespace.is_empty() { "?" } else { &policy.meta.namespace };
    let built = |name, scope, rules| Policy {
        name,
        origin: PolicyOrigin {
            unreadable: Some(Arc::clone(&policy.reason)),
            ..PolicyOrigin::new(kind, namespace, &policy.meta.name)
        },
        scope,
        action: Action::Deny,
        dry_run: false,
        rules,
    };
    let one = |scope| vec![built(name(view, policy, None), scope, rules.clone())];
    match &policy.reach {
        Reach::Mesh => one(PolicyScope::Global),
        Reach::Namespace if is_of_root(view, policy) => one(PolicyScope::Global),
        Reach::Namespace => one(PolicyScope::Namespace),
        Reach::Selected(_) => one(PolicyScope::Workload),
        Reach::Attached(_) => targets(policy)
            .map(|target| {
                let ports = target_ports(view, &target);
                let rules = authorization::on_ports(rules.clone(), &ports);
                built(name(view, policy, Some(&target)), PolicyScope::Workload, rules)
            })
            // At waypoints.
            .chain(
                gateways(policy)
                    .next()
                    .map(|_| built(name(view, policy, None), PolicyScope::Workload, rules.clone())),
            )
            .collect(),
    }
}

/// What becomes of it, for people.
pub(super) fn status(view: View<'_>, policy: &UnreadablePolicy) -> PolicyStatus {
    let namespace = &policy.meta.namespace;
    let in_root = is_of_root(view, policy);
    let place = match &policy.reach {
        Reach::Mesh => "every workload of the mesh".to_owned(),
        Reach::Namespace if in_root => "every workload of the mesh".to_owned(),
        Reach::Namespace => format!("every workload of namespace {namespace}"),
        Reach::Selected(_) if in_root => "selected workloads of every namespace".to_owned(),
        Reach::Selected(_) => format!("selected workloads of namespace {namespace}"),
        Reach::Attached(_) => {
            let targets: Vec<String> = targets(policy)
                .map(|target| format!("endpoints of {} {}", target.kind(), target.key()))
                .collect();
            targets.join("; ")
        }
    };
    if policy.kind == Kind::RequestAuthentication {
        let place = match &policy.reach {
            Reach::Mesh => "every waypoint".to_owned(),
            Reach::Namespace | Reach::Selected(_) if in_root => "every waypoint".to_owned(),
            Reach::Namespace | Reach::Selected(_) => {
                format!("the waypoints of namespace {namespace}")
            }
            Reach::Attached(_) => "the waypoints of its targets".to_owned(),
        };
        let refused =
            format!("it cannot be read ({}): every request is refused there", policy.reason);
        return PolicyStatus {
            enforced_as_written: false,
            denying: true,
            place,
            notes: vec![refused],
        };
    }
    let refused = if policy.kind == Kind::PeerAuthentication {
        "connections without a proven identity are refused"
    } else {
        "every connection is refused"
    };
    let mut notes = vec![format!("it cannot be read ({}): {refused}", policy.reason)];
    if policy.reach == Reach::Mesh {
        notes.push("its namespace cannot be read, so it may be about any".to_owned());
    }
    PolicyStatus { enforced_as_written: false, denying: true, place, notes }
}

/// The name of its policy, or of that at one target. The underscore keeps it apart from every object's name.
pub(super) fn name(
    view: View<'_>,
    policy: &UnreadablePolicy,
    target: Option<&Target>,
) -> PolicyName {
    let namespace = if policy.meta.namespace.is_empty() {
        &view.settings.root_namespace
    } else {
        &policy.meta.namespace
    };
    let kind = policy.kind.as_str();
    let at = target.map(|target| format!("_{}_{}", target.kind(), target.key().name));
    let name = format!("unreadable_{kind}_{}{}", policy.meta.name, at.unwrap_or_default());
    PolicyName::new(namespace, &name)
}

fn is_of_root(view: View<'_>, policy: &UnreadablePolicy) -> bool {
    *policy.meta.namespace == *view.settings.root_namespace
}

//! RequestAuthentications: what waypoints are told of them, and which hold where.
//!
//! With targetRefs they hold at what they name. Without, at every service of their namespace that is behind a waypoint, or of
//! the mesh from the root namespace; with a selector, at those services whose own selector picks no other workloads than it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::frontends::{self, FrontendSource};
use super::objects::{Key, in_namespace};
use super::policies::{PolicyStatus, Target, gateway_place};
use super::unreadable;
use super::workloads::View;
use crate::manifest::metadata::Selector;
use crate::manifest::policy::PolicyTarget;
use crate::manifest::{Kind, Reach, RequestAuthentication, UnreadablePolicy};

/// What waypoints are told.
pub(super) fn published(object: &RequestAuthentication) -> mesh_jwt::RequestAuthentication {
    mesh_jwt::RequestAuthentication {
        namespace: Arc::clone(&object.meta.namespace),
        name: Arc::clone(&object.meta.name),
        rules: object.rules.clone(),
    }
}

/// Names of those that hold at a service.
pub(super) fn of_target(view: View<'_>, target: &Target) -> Vec<Arc<str>> {
    let own = &target.key().namespace;
    let mut names = BTreeSet::new();
    for (at, object) in nearby(view, own) {
        let holds = match object.targets.is_empty() {
            true => object.selector.as_ref().is_none_or(|selector| picks(view, selector, target)),
            false => Target::among(&object.targets, &at.namespace).any(|one| one == *target),
        };
        if holds {
            names.insert(at.to_string().into());
        }
    }
    for policy in unreadable_ones(view) {
        let is_here = is_in_scope(view, policy, own);
        let holds = match &policy.reach {
            Reach::Mesh => true,
            Reach::Namespace => is_here,
            Reach::Selected(selector) => is_here && picks(view, selector, target),
            Reach::Attached(_) => unreadable::targets(policy).any(|one| one == *target),
        };
        if holds {
            names.insert(unreadable::name(view, policy, None).to_string().into());
        }
    }
    names.into_iter().collect()
}

/// Names of those that hold at everything behind a waypoint, and of those that hold for the workloads of its namespace besides.
/// `is_meant` tells of a target whether it is that waypoint.
pub(super) fn of_gateway(
    view: View<'_>,
    key: &Key,
    is_meant: &dyn Fn(&PolicyTarget, &str) -> bool,
) -> (Vec<Arc<str>>, Vec<Arc<str>>) {
    let root = &view.settings.root_namespace;
    let (mut all, mut of_workloads) = (BTreeSet::new(), BTreeSet::new());
    for (at, object) in nearby(view, &key.namespace) {
        let name = at.to_string().into();
        if object.targets.iter().any(|target| is_meant(target, &at.namespace)) {
            all.insert(name);
        } else if object.targets.is_empty() && object.selector.is_none() {
            let set = if at.namespace == *root { &mut all } else { &mut of_workloads };
            set.insert(name);
        }
    }
    for policy in unreadable_ones(view) {
        let name = unreadable::name(view, policy, None).to_string().into();
        match &policy.reach {
            Reach::Mesh => drop(all.insert(name)),
            Reach::Namespace if policy.meta.namespace == *root => drop(all.insert(name)),
            Reach::Namespace if policy.meta.namespace == key.namespace => {
                of_workloads.insert(name);
            }
            Reach::Namespace | Reach::Selected(_) => {}
            Reach::Attached(_) => {
                let namespace = &policy.meta.namespace;
                if unreadable::gateways(policy).any(|target| is_meant(target, namespace)) {
                    all.insert(name);
                }
            }
        }
    }
    (all.into_iter().collect(), of_workloads.into_iter().collect())
}

/// What a RequestAuthentication, as things stand, may hold at.
pub(super) fn frontends_of(
    view: View<'_>,
    namespace: &Arc<str>,
    targets: &[PolicyTarget],
) -> Vec<FrontendSource> {
    if targets.is_empty() {
        return in_scope(view, namespace);
    }
    let attached = Target::among(targets, namespace).map(FrontendSource::Target);
    attached.chain(frontends::gateways_of(view, targets, namespace)).collect()
}

/// The same of one that cannot be read.
pub(super) fn frontends_of_unreadable(
    view: View<'_>,
    policy: &UnreadablePolicy,
) -> Vec<FrontendSource> {
    match &policy.reach {
        Reach::Mesh => in_scope(view, &view.settings.root_namespace),
        Reach::Namespace | Reach::Selected(_) => in_scope(view, &policy.meta.namespace),
        Reach::Attached(targets) => frontends_of(view, &policy.meta.namespace, targets),
    }
}

/// Every service and Gateway of a namespace, or of all from the root namespace.
fn in_scope(view: View<'_>, namespace: &Arc<str>) -> Vec<FrontendSource> {
    let everywhere = *namespace == view.settings.root_namespace;
    let here = |key: &&Key| everywhere || key.namespace == *namespace;
    let services = view.objects.services.keys().filter(here).cloned();
    let entries = view.objects.service_entries.keys().filter(here).cloned();
    let gateways = view.objects.gateway_objects.keys().filter(here).cloned();
    let services = services.map(Target::Service).chain(entries.map(Target::ServiceEntry));
    services.map(FrontendSource::Target).chain(gateways.map(FrontendSource::Gateway)).collect()
}

/// Those of a namespace and of the root namespace.
fn nearby<'v>(
    view: View<'v>,
    namespace: &'v str,
) -> impl Iterator<Item = (&'v Key, &'v Arc<RequestAuthentication>)> {
    let namespaces: BTreeSet<&str> = [namespace, &*view.settings.root_namespace].into();
    namespaces.into_iter().flat_map(move |one| in_namespace(&view.objects.authentications, one))
}

fn unreadable_ones<'v>(view: View<'v>) -> impl Iterator<Item = &'v Arc<UnreadablePolicy>> {
    let all = view.objects.unreadable.values();
    all.filter(|policy| policy.kind == Kind::RequestAuthentication)
}

fn is_in_scope(view: View<'_>, policy: &UnreadablePolicy, namespace: &str) -> bool {
    let own = &policy.meta.namespace;
    **own == *namespace || *own == view.settings.root_namespace
}

/// True when every workload that a service selects is picked.
fn picks(view: View<'_>, selector: &Selector, target: &Target) -> bool {
    let of_target = match target {
        Target::Service(key) => {
            view.objects.services.get(key).and_then(|one| one.selector.as_ref())
        }
        Target::ServiceEntry(key) => {
            view.objects.service_entries.get(key).and_then(|one| one.selector.as_ref())
        }
    };
    of_target.is_some_and(|of_target: &Selector| {
        let labels: &BTreeMap<String, String> = &of_target.0;
        selector.matches(labels)
    })
}

/// How one is enforced.
pub(super) fn status(view: View<'_>, object: &RequestAuthentication) -> PolicyStatus {
    let namespace = &object.meta.namespace;
    let root = &view.settings.root_namespace;
    let (mut places, mut notes) = (Vec::new(), Vec::new());
    for target in Target::among(&object.targets, namespace) {
        let key = target.key();
        let exists = match &target {
            Target::Service(key) => view.objects.services.contains_key(key),
            Target::ServiceEntry(key) => view.objects.service_entries.contains_key(key),
        };
        if frontends::bound(view, &target).is_some() {
            places.push(format!("the waypoint of {} {key}", target.kind()));
        } else if exists {
            let kind = target.kind();
            notes.push(format!(
                "no waypoint is bound to {kind} {key}: tokens are not looked at there, and nobody has a request principal"
            ));
        } else {
            notes.push(format!("target {} {key} does not exist", target.kind()));
        }
    }
    for target in &object.targets {
        if let PolicyTarget::Gateway(kind, name) = target {
            match gateway_place(view, namespace, kind, name) {
                Ok(place) => places.push(place),
                Err(note) => notes.push(note),
            }
        }
    }
    if object.targets.is_empty() {
        let services = in_scope(view, namespace).into_iter().filter(|one| match one {
            FrontendSource::Target(target) => {
                let is_picked =
                    object.selector.as_ref().is_none_or(|selector| picks(view, selector, target));
                is_picked && frontends::bound(view, target).is_some()
            }
            FrontendSource::Gateway(_) => false,
        });
        let (count, everywhere) = (services.count(), namespace == root);
        let which = match (&object.selector, everywhere) {
            (None, true) => "every service of the mesh".to_owned(),
            (None, false) => format!("every service of namespace {namespace}"),
            (Some(_), true) => "services of selected workloads".to_owned(),
            (Some(_), false) => format!("services of selected workloads of namespace {namespace}"),
        };
        places.push(format!("the waypoints of {which}: {count} now"));
        if count == 0 {
            let which =
                if object.selector.is_some() { "that selects only such workloads " } else { "" };
            notes.push(format!(
                "no service {which}is behind a waypoint: tokens are not looked at, and nobody has a request principal"
            ));
        }
    }
    PolicyStatus {
        enforced_as_written: notes.is_empty(),
        denying: false,
        place: places.join("; "),
        notes,
    }
}

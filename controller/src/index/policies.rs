//! Which policies exist, and which of them a workload lists.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use mesh_authorize::{Policy, PolicyName};
use serde::Serialize;

use super::objects::{Key, in_namespace, slice_service};
use super::services::waypoint;
use super::workloads::{View, WorkloadSource, selects, target_ports_in, target_ports_on};
use super::{authorization, frontends, peer, unreadable};
use crate::manifest::policy::{PolicyAction, PolicyTarget};
use crate::manifest::service::TargetPort;
use crate::manifest::{AuthorizationPolicy, ObjectKey};

/// What a policy with targetRefs is attached to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Target {
    Service(Key),
    ServiceEntry(Key),
}

impl Target {
    /// The targets of a policy that have endpoints.
    pub(super) fn of(policy: &AuthorizationPolicy) -> impl Iterator<Item = Self> + '_ {
        Self::among(&policy.targets, &policy.meta.namespace)
    }

    /// Those of a namespace's `targets` that have endpoints.
    pub(super) fn among<'t>(
        targets: &'t [PolicyTarget],
        namespace: &'t Arc<str>,
    ) -> impl Iterator<Item = Self> + 't {
        targets.iter().filter_map(move |target| match target {
            PolicyTarget::Service(name) => {
                Some(Self::Service(Key { namespace: namespace.clone(), name: name.clone() }))
            }
            PolicyTarget::ServiceEntry(name) => {
                Some(Self::ServiceEntry(Key { namespace: namespace.clone(), name: name.clone() }))
            }
            PolicyTarget::Gateway(..) => None,
        })
    }

    pub(super) const fn key(&self) -> &Key {
        match self {
            Self::Service(key) | Self::ServiceEntry(key) => key,
        }
    }

    pub(super) const fn kind(&self) -> &'static str {
        match self {
            Self::Service(_) => "service",
            Self::ServiceEntry(_) => "serviceentry",
        }
    }
}

/// What makes policies.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum PolicySource {
    Authorization(Key),
    TargetAllow(Target),
    Peer(Key),
    Unreadable(ObjectKey),
}

/// How a policy object is enforced, for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PolicyStatus {
    /// True when everything it says is enforced as written.
    pub enforced_as_written: bool,
    /// True when it cannot be read and what it may have refused is refused in its place.
    pub denying: bool,
    /// Where it is enforced.
    pub place: String,
    /// What is not as written, and what happens instead.
    pub notes: Vec<String>,
}

/// Names of the policies a workload lists, in stable order.
pub(super) fn of_workload(
    view: View<'_>,
    namespace: &str,
    labels: &BTreeMap<String, String>,
    targets: &BTreeSet<Target>,
) -> Vec<Arc<str>> {
    let root = &view.settings.root_namespace;
    let mut names: BTreeSet<Arc<str>> = BTreeSet::new();
    let namespaces: BTreeSet<&str> = [namespace, root].into();
    for (_, policy) in namespaces
        .into_iter()
        .flat_map(|namespace| in_namespace(&view.objects.authorizations, namespace))
    {
        let selected = policy.selector.as_ref().is_some_and(|selector| selector.matches(labels));
        if selected && policy.targets.is_empty() {
            names.insert(format!("{}/{}", policy.meta.namespace, policy.meta.name).into());
        }
    }
    for target in targets {
        for policy in attached(view, target) {
            let name = if joins_others(policy) {
                authorization::target_allow_name(target.key(), target.kind())
            } else {
                authorization::target_policy_name(policy, target.key(), target.kind())
            };
            names.insert(name.to_string().into());
        }
    }
    names.extend(peer::effective(view.objects, namespace, labels, root));
    names.extend(unreadable::of_workload(view, namespace, labels, targets));
    names.into_iter().collect()
}

/// Policies attached to a target and enforced at its endpoints; none while a waypoint is bound, which enforces them then.
fn attached<'v>(view: View<'v>, target: &'v Target) -> Vec<&'v Arc<AuthorizationPolicy>> {
    if behind_waypoint(view, target) {
        return Vec::new();
    }
    in_namespace(&view.objects.authorizations, &target.key().namespace)
        .map(|(_, policy)| policy)
        .filter(|policy| Target::of(policy).any(|one| one == *target))
        .collect()
}

fn behind_waypoint(view: View<'_>, target: &Target) -> bool {
    let meta = match target {
        Target::Service(key) => view.objects.services.get(key).map(|service| &service.meta),
        Target::ServiceEntry(key) => view.objects.service_entries.get(key).map(|entry| &entry.meta),
    };
    meta.is_some_and(|meta| waypoint(meta, target.key(), view.objects, view.settings).is_some())
}

/// True for a policy with a target that a waypoint stands for.
fn at_waypoint(view: View<'_>, policy: &AuthorizationPolicy) -> bool {
    policy.targets.iter().any(|target| matches!(target, PolicyTarget::Gateway(..)))
        || Target::of(policy).any(|target| behind_waypoint(view, &target))
}

/// True for the ALLOW policies of a target, of which any may allow.
fn joins_others(policy: &AuthorizationPolicy) -> bool {
    policy.action == PolicyAction::Allow && !policy.dry_run
}

/// The workloads behind a target.
pub(super) fn members(view: View<'_>, target: &Target) -> BTreeSet<WorkloadSource> {
    let objects = view.objects;
    let key = target.key();
    let (selector, pods_too) = match target {
        Target::Service(key) => {
            let service = objects.services.get(key).filter(|service| !service.external_name);
            (service.and_then(|service| service.selector.as_ref()), !objects.has_slices(key))
        }
        Target::ServiceEntry(key) => {
            (objects.service_entries.get(key).and_then(|entry| entry.selector.as_ref()), true)
        }
    };
    let mut members = BTreeSet::new();
    if let Target::Service(key) = target {
        let pods = objects.slices_of(key).flat_map(|slice| super::objects::slice_pods(slice));
        members.extend(pods.map(WorkloadSource::Pod));
    }
    let Some(selector) = selector else { return members };
    if pods_too {
        let pods = in_namespace(&objects.pods, &key.namespace)
            .filter(|(_, pod)| selector.matches(&pod.meta.labels));
        members.extend(pods.map(|(key, _)| WorkloadSource::Pod(key.clone())));
    }
    let entries = in_namespace(&objects.workload_entries, &key.namespace)
        .filter(|(_, entry)| selector.matches(&entry.endpoint.labels));
    members.extend(entries.map(|(key, _)| WorkloadSource::WorkloadEntry(key.clone())));
    members
}

/// Ports on which a target is served, over all of its endpoints, ready or not.
pub(super) fn target_ports(view: View<'_>, target: &Target) -> Vec<u16> {
    let objects = view.objects;
    let ports = match target {
        Target::Service(key) => objects.services.get(key).map(|service| &service.ports),
        Target::ServiceEntry(key) => objects.service_entries.get(key).map(|entry| &entry.ports),
    };
    let Some(ports) = ports else { return Vec::new() };
    let mut numbers: BTreeSet<u16> = ports
        .iter()
        .filter_map(|port| match port.target {
            TargetPort::Number(number) => Some(number),
            TargetPort::Name(_) => None,
        })
        .collect();
    if let Target::Service(key) = target
        && let Some(service) = objects.services.get(key)
    {
        numbers.extend(objects.slices_of(key).flat_map(|slice| target_ports_in(service, slice)));
    }
    for member in members(view, target) {
        match member {
            WorkloadSource::Pod(key) => {
                let Some(pod) = objects.pods.get(&key) else { continue };
                numbers.extend(target_ports_on(pod, ports));
                if matches!(target, Target::ServiceEntry(_)) {
                    numbers.extend(ports.iter().filter_map(|port| pod.named_ports.get(&port.name)));
                }
            }
            WorkloadSource::WorkloadEntry(key) => {
                let Some(entry) = objects.workload_entries.get(&key) else { continue };
                numbers.extend(ports.iter().flat_map(|port| {
                    let target = match &port.target {
                        TargetPort::Number(_) => None,
                        TargetPort::Name(name) => entry.endpoint.ports.get(name),
                    };
                    entry.endpoint.ports.get(&port.name).into_iter().chain(target).copied()
                }));
            }
            WorkloadSource::Slice(_) | WorkloadSource::ServiceEntry(_) => {}
        }
    }
    numbers.into_iter().collect()
}

/// The policies a source makes.
pub(super) fn policies_of(view: View<'_>, source: &PolicySource) -> Vec<Policy> {
    let objects = view.objects;
    let root = &view.settings.root_namespace;
    match source {
        PolicySource::Unreadable(key) => objects
            .unreadable
            .get(key)
            .map(|policy| unreadable::policies(view, policy))
            .unwrap_or_default(),
        PolicySource::Peer(key) => {
            let Some(object) = objects.peers.get(key) else { return Vec::new() };
            let level = peer::namespace_level(objects, &key.namespace, root);
            peer::policy(object, level.strict, root).into_iter().collect()
        }
        PolicySource::TargetAllow(target) => {
            let allow: Vec<_> =
                attached(view, target).into_iter().filter(|policy| joins_others(policy)).collect();
            if allow.is_empty() {
                return Vec::new();
            }
            let name = authorization::target_allow_name(target.key(), target.kind());
            vec![authorization::target_allow(name, &allow, &target_ports(view, target), false).0]
        }
        PolicySource::Authorization(key) => {
            let Some(object) = objects.authorizations.get(key) else { return Vec::new() };
            if object.targets.is_empty() {
                return vec![authorization::policy(object, root).0];
            }
            // Waypoints judge it as it is written, under its own name.
            let at_waypoint =
                at_waypoint(view, object).then(|| authorization::at_waypoint(object).0);
            if joins_others(object) {
                return at_waypoint.into_iter().collect();
            }
            Target::of(object)
                .filter(|target| !behind_waypoint(view, target))
                .map(|target| {
                    let name =
                        authorization::target_policy_name(object, target.key(), target.kind());
                    let ports = target_ports(view, &target);
                    match object.action {
                        PolicyAction::Allow => {
                            authorization::target_allow(name, &[object], &ports, true).0
                        }
                        PolicyAction::Deny | PolicyAction::Audit | PolicyAction::Custom => {
                            authorization::target_policy(name, object, &ports).0
                        }
                    }
                })
                .chain(at_waypoint)
                .collect()
        }
    }
}

/// Names the policies a source makes.
pub(super) fn names(policies: &[Policy]) -> Vec<PolicyName> {
    policies.iter().map(|policy| policy.name.clone()).collect()
}

/// How an AuthorizationPolicy is enforced.
pub(super) fn authorization_status(view: View<'_>, policy: &AuthorizationPolicy) -> PolicyStatus {
    let elsewhere = policy.targets.is_empty()
        || Target::of(policy).any(|target| !behind_waypoint(view, &target));
    let mut notes = if elsewhere { authorization::convert(policy).notes } else { Vec::new() };
    if at_waypoint(view, policy) {
        notes.extend(authorization::at_waypoint(policy).1);
    }
    let root = &view.settings.root_namespace;
    let mut places = Vec::new();
    if policy.targets.is_empty() {
        let namespace = &policy.meta.namespace;
        places.push(match (&policy.selector, **namespace == **root) {
            (None, true) => "every workload of the mesh".to_owned(),
            (None, false) => format!("every workload of namespace {namespace}"),
            (Some(_), true) => "selected workloads of every namespace".to_owned(),
            (Some(_), false) => format!("selected workloads of namespace {namespace}"),
        });
    }
    for target in Target::of(policy) {
        let key = target.key();
        let exists = match &target {
            Target::Service(key) => view.objects.services.contains_key(key),
            Target::ServiceEntry(key) => view.objects.service_entries.contains_key(key),
        };
        if !exists {
            notes.push(format!("target {} {key} does not exist", target.kind()));
        } else if behind_waypoint(view, &target) {
            places.push(format!("the waypoint of {} {key}", target.kind()));
        } else if members(view, &target).is_empty() {
            notes.push(format!(
                "target {} {key} has no workload in the mesh to enforce it at",
                target.kind()
            ));
        } else {
            let ports = target_ports(view, &target);
            if ports.is_empty() {
                notes.push(format!("target {} {key} has no TCP port", target.kind()));
            }
            places.push(format!("endpoints of {} {key}, ports {ports:?}", target.kind()));
        }
    }
    for target in &policy.targets {
        if let PolicyTarget::Gateway(kind, name) = target {
            match gateway_place(view, &policy.meta.namespace, kind, name) {
                Ok(place) => places.push(place),
                Err(note) => notes.push(note),
            }
        }
    }
    if policy.dry_run {
        notes.push("dry run: it is evaluated and reported, not enforced".into());
    }
    PolicyStatus {
        enforced_as_written: notes.is_empty(),
        denying: false,
        place: places.join("; "),
        notes,
    }
}

/// Where a policy with this Gateway or GatewayClass as its target is enforced, or why nowhere.
pub(super) fn gateway_place(
    view: View<'_>,
    namespace: &Arc<str>,
    kind: &str,
    name: &str,
) -> Result<String, String> {
    if kind == "GatewayClass" {
        let root = &view.settings.root_namespace;
        return if *namespace != *root {
            Err(format!("target {kind} {name}: only policies of namespace {root} can have it"))
        } else if frontends::is_waypoint_class(view, name) {
            Ok(format!("every waypoint of class {name}"))
        } else {
            Err(format!("target {kind} {name} is not served by this mesh"))
        };
    }
    match view.objects.gateway_objects.get(&Key::new(namespace, name)) {
        Some(gateway) if frontends::is_waypoint_class(view, &gateway.class) => {
            Ok(format!("the waypoint {namespace}/{name}"))
        }
        Some(gateway) => Err(format!(
            "target {kind} {name} is of class {}, which this mesh does not serve",
            gateway.class
        )),
        None => Err(format!("target {kind} {name} does not exist")),
    }
}

/// How a PeerAuthentication is enforced.
pub(super) fn peer_status(
    view: View<'_>,
    object: &crate::manifest::PeerAuthentication,
) -> PolicyStatus {
    let root = &view.settings.root_namespace;
    let namespace = &object.meta.namespace;
    let mut notes = Vec::new();
    let in_root = **namespace == **root;
    let place = match (&object.selector, in_root) {
        (Some(_), true) => {
            notes.push(format!("a selector in the root namespace {root} selects nothing; put it into the workloads' namespace"));
            String::new()
        }
        (Some(_), false) => format!("selected workloads of namespace {namespace}"),
        (None, true) => "every workload of the mesh without a closer one".to_owned(),
        (None, false) => format!("every workload of namespace {namespace} without a closer one"),
    };
    if object.selector.is_none()
        && let Some(oldest) = peer::oldest_of(view.objects, namespace)
        && oldest.meta.name != object.meta.name
    {
        notes.push(format!("{} is older and takes precedence", oldest.meta.name));
    }
    PolicyStatus { enforced_as_written: notes.is_empty(), denying: false, place, notes }
}

/// The workloads that a selector policy may pick: of its namespace, or of all for the root namespace.
pub(super) fn selected(view: View<'_>, policy: &AuthorizationPolicy) -> Vec<WorkloadSource> {
    let Some(selector) = policy.selector.as_ref() else { return Vec::new() };
    let everywhere = *policy.meta.namespace == *view.settings.root_namespace;
    workloads_in(view, if everywhere { None } else { Some(&policy.meta.namespace) }, |labels| {
        selector.matches(labels)
    })
}

/// Pods and WorkloadEntries of a namespace, or of all, whose labels satisfy `wanted`.
pub(super) fn workloads_in(
    view: View<'_>,
    namespace: Option<&str>,
    wanted: impl Fn(&BTreeMap<String, String>) -> bool,
) -> Vec<WorkloadSource> {
    let objects = view.objects;
    let here = |key: &Key| namespace.is_none_or(|namespace| *key.namespace == *namespace);
    let from = Key::new(namespace.unwrap_or_default(), "");
    let pods = objects
        .pods
        .range(from.clone()..)
        .take_while(|(key, _)| here(key))
        .filter(|(_, pod)| wanted(&pod.meta.labels))
        .map(|(key, _)| WorkloadSource::Pod(key.clone()));
    let entries = objects
        .workload_entries
        .range(from..)
        .take_while(|(key, _)| here(key))
        .filter(|(_, entry)| wanted(&entry.endpoint.labels))
        .map(|(key, _)| WorkloadSource::WorkloadEntry(key.clone()));
    pods.chain(entries).collect()
}

/// The targets whose members or ports a pod's or entry's labels may change.
pub(super) fn targets_of_labels(
    view: View<'_>,
    namespace: &str,
    labels: &BTreeMap<String, String>,
    pod: Option<&Key>,
) -> BTreeSet<Target> {
    let objects = view.objects;
    let services = in_namespace(&objects.services, namespace)
        .filter(|(_, service)| selects(service, labels))
        .map(|(key, _)| Target::Service(key.clone()));
    let entries = in_namespace(&objects.service_entries, namespace)
        .filter(|(_, entry)| {
            entry.selector.as_ref().is_some_and(|selector| selector.matches(labels))
        })
        .map(|(key, _)| Target::ServiceEntry(key.clone()));
    let slices = pod
        .and_then(|pod| objects.slices_by_pod.get(pod))
        .into_iter()
        .flatten()
        .filter_map(|key| objects.slices.get(key))
        .map(|slice| Target::Service(slice_service(slice)));
    services.chain(entries).chain(slices).collect()
}

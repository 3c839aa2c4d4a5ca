//! Routes with their references resolved, which waypoints see them, and what becomes of them, for people.

use std::collections::BTreeSet;
use std::sync::Arc;

use mesh_route::{
    BackendTarget, Filters, FrontendKind, FrontendName, Parent, Route, RouteKind, Rule, ServiceRef,
};
use serde::Serialize;

use super::frontends::{bound, caller, is_waypoint_class};
use super::objects::{Key, in_namespace};
use super::policies::Target;
use super::workloads::View;
use crate::manifest::RouteObject;
use crate::manifest::route::{ParentKind, ParentRef};
use crate::manifest::service::Port;

/// A route as its waypoints see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublishedRoute {
    /// It, with the parents that accept it.
    pub route: Route,
    /// The waypoints, as callers.
    pub waypoints: BTreeSet<Arc<str>>,
}

/// What becomes of a route, for people. The words are those of the Gateway API's conditions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RouteStatus {
    /// True when at least one parent accepts it.
    pub accepted: bool,
    /// True when every backend is there and may be referred to.
    pub resolved_refs: bool,
    /// Each parent with its waypoint, or why it does not accept the route.
    pub parents: Vec<String>,
    /// What answers 500, or is not applied, and what to do.
    pub notes: Vec<String>,
}

/// What a route object becomes.
pub(super) struct Resolved {
    pub(super) published: Option<PublishedRoute>,
    pub(super) status: RouteStatus,
}

/// Resolves what a route refers to.
pub(super) fn resolve(view: View<'_>, object: &RouteObject) -> Resolved {
    let mut parents = Vec::new();
    let mut waypoints = BTreeSet::new();
    let mut told = Vec::new();
    for parent in &object.parents {
        let shown = shown(parent);
        match attach(view, parent) {
            Ok((attached, gateway)) => {
                told.push(format!("{shown}: accepted, at waypoint {gateway}"));
                waypoints.insert(caller(&gateway));
                parents.push(attached);
            }
            Err((reason, remedy)) => told.push(format!("{shown}: {reason}; {remedy}")),
        }
    }
    let mut references = References { view, object, notes: Vec::new() };
    let rules =
        object.rules.iter().enumerate().map(|(index, rule)| references.rule(rule, index)).collect();
    let mut notes = references.notes;
    let resolved_refs = notes.is_empty();
    notes.extend(object.notes.iter().cloned());
    if object.parents.is_empty() {
        told.push("it names no parent: add parentRefs".to_owned());
    }
    let accepted = !parents.is_empty();
    let published =
        accepted.then(|| PublishedRoute { route: object.with(parents, rules), waypoints });
    let status = RouteStatus { accepted, resolved_refs, parents: told, notes };
    Resolved { published, status }
}

/// The services whose coming, going or binding changes a route.
pub(super) fn services(object: &RouteObject) -> BTreeSet<Key> {
    let parents = object
        .parents
        .iter()
        .filter(|parent| parent.kind != ParentKind::Gateway)
        .map(|parent| Key { namespace: parent.namespace.clone(), name: parent.name.clone() });
    let backends = object
        .services()
        .map(|one| Key { namespace: one.namespace.clone(), name: one.name.clone() });
    parents.chain(backends).collect()
}

fn shown(parent: &ParentRef) -> String {
    let mut text = format!("{} {}/{}", parent.kind.as_str(), parent.namespace, parent.name);
    if let Some(port) = parent.port {
        text.push_str(&format!(" port {port}"));
    }
    if let Some(section) = &parent.section {
        text.push_str(&format!(" section {section}"));
    }
    text
}

/// A parent in force and its waypoint; or the reason why not, and what to do.
fn attach(view: View<'_>, parent: &ParentRef) -> Result<(Parent, Key), (String, String)> {
    let key = Key { namespace: parent.namespace.clone(), name: parent.name.clone() };
    let (target, kind, ports) = match &parent.kind {
        ParentKind::Service => {
            let ports = view.objects.services.get(&key).map(|service| &service.ports);
            (Target::Service(key), FrontendKind::Service, ports)
        }
        ParentKind::ServiceEntry => {
            let ports = view.objects.service_entries.get(&key).map(|entry| &entry.ports);
            (Target::ServiceEntry(key), FrontendKind::ServiceEntry, ports)
        }
        ParentKind::Gateway => {
            let class = view.objects.gateway_objects.get(&key).map(|gateway| &*gateway.class);
            let is_waypoint = class.is_some_and(|class| is_waypoint_class(view, class));
            let reason = if is_waypoint {
                "NotAllowedByListeners: a waypoint has no hosts of its own"
            } else {
                "NoMatchingParent: it is no waypoint, and gateways are not served yet"
            };
            return Err((reason.to_owned(), "attach the route to a Service".to_owned()));
        }
        ParentKind::Other(_) => {
            let reason = "InvalidKind: routes cannot be attached to it".to_owned();
            return Err((reason, "attach the route to a Service".to_owned()));
        }
    };
    let Some(ports) = ports else {
        let remedy = "create it, or correct the name".to_owned();
        return Err(("NoMatchingParent: it does not exist".to_owned(), remedy));
    };
    let is_meant = |port: &Port| {
        parent.port.is_none_or(|number| number == port.number)
            && parent.section.as_ref().is_none_or(|section| **section == *port.name)
    };
    if !ports.iter().any(is_meant) {
        let remedy = format!("use one of the ports {:?}", numbers(ports));
        return Err(("NoMatchingParent: it has no such port".to_owned(), remedy));
    }
    let Some(gateway) = bound(view, &target) else {
        let remedy = "label it, or its namespace, with culvert.dev/use-waypoint".to_owned();
        return Err(("NoMatchingParent: no waypoint is bound to it".to_owned(), remedy));
    };
    let frontend =
        FrontendName { kind, namespace: parent.namespace.clone(), name: parent.name.clone() };
    let parent = Parent { frontend, port: parent.port, section: parent.section.clone() };
    Ok((parent, gateway))
}

fn numbers(ports: &[Port]) -> Vec<u16> {
    ports.iter().map(|port| port.number).collect()
}

struct References<'r> {
    view: View<'r>,
    object: &'r RouteObject,
    notes: Vec<String>,
}

impl References<'_> {
    fn rule(&mut self, rule: &Rule, index: usize) -> Rule {
        let mut rule = rule.clone();
        self.filters(&mut rule.filters, index);
        for backend in &mut rule.backends {
            self.target(&mut backend.target, index, "answers 500 for its share");
            self.filters(&mut backend.filters, index);
        }
        if rule.backends.is_empty() && rule.filters.redirect.is_none() {
            self.notes
                .push(format!("rule {index} answers 500: it names no backend; add backendRefs"));
        }
        rule
    }

    fn filters(&mut self, filters: &mut Filters, index: usize) {
        if let Some(reason) = &filters.unresolved {
            self.notes.push(format!("rule {index} answers 500: {reason}"));
        }
        for mirror in &mut filters.mirrors {
            self.target(&mut mirror.target, index, "sends no copies");
        }
    }

    fn target(&mut self, target: &mut BackendTarget, index: usize, effect: &str) {
        let reason = match target {
            BackendTarget::Service(service) => self.problem(service),
            BackendTarget::Invalid { reason } => Some(reason.to_string()),
        };
        if let Some(reason) = reason {
            self.notes.push(format!("a backend of rule {index} {effect}: {reason}"));
            *target = BackendTarget::Invalid { reason: reason.into() };
        }
    }

    /// Why a service cannot be referred to.
    fn problem(&self, service: &ServiceRef) -> Option<String> {
        let ServiceRef { namespace, name, port } = service;
        let own = &self.object.meta.namespace;
        let kind = match self.object.kind {
            RouteKind::Http => "HTTPRoute",
            RouteKind::Grpc => "GRPCRoute",
        };
        let granted = namespace == own
            || in_namespace(&self.view.objects.grants, namespace)
                .any(|(_, grant)| grant.allows_service(kind, own, name));
        if !granted {
            return Some(format!(
                "RefNotPermitted: Service {namespace}/{name} is of another namespace; allow it there by a ReferenceGrant"
            ));
        }
        let key = Key { namespace: namespace.clone(), name: name.clone() };
        match self.view.objects.services.get(&key).filter(|one| !one.external_name) {
            None => Some(format!("BackendNotFound: there is no Service {namespace}/{name}")),
            Some(found) if !found.ports.iter().any(|one| one.number == *port) => Some(format!(
                "BackendNotFound: Service {namespace}/{name} has no port {port}; it has {:?}",
                numbers(&found.ports)
            )),
            Some(_) => None,
        }
    }
}

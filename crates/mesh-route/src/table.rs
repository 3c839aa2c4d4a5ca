//! The routes of the mesh and what they attach to.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use imbl::{OrdMap, OrdSet};
use mesh_model::InvalidPath;
use serde::{Deserialize, Serialize};

use crate::compile::CompiledRoute;
use crate::index::{Entry, Index};
use crate::pattern::InvalidPattern;
use crate::request::RequestHead;
use crate::route::{
    FrontendKind, FrontendName, Parent, Route, RouteKind, RouteMatch, RouteName, Rule,
};

/// What routes attach to, and its ports.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Frontend {
    /// The object.
    pub name: FrontendName,
    /// Its ports.
    pub ports: Vec<FrontendPort>,
}

/// A port of a service, or a listener of a gateway.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrontendPort {
    /// The number that clients dial.
    pub port: u16,
    /// Its name, which a `parentRef` may give as `sectionName`.
    pub section: Option<Arc<str>>,
}

/// A change of the table.
#[derive(Clone, Debug)]
pub enum RouteChange {
    /// A route is added, or replaces the one of its name.
    Upsert(Route),
    /// A route is gone.
    Remove(RouteName),
    /// A frontend is added, or its ports are changed.
    Frontend(Frontend),
    /// A frontend is gone.
    RemoveFrontend(FrontendName),
}

/// A route that was not taken over. The one of its name that was there before, if any, stays in force.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{route}, rule {rule}, is invalid")]
pub struct InvalidRoute {
    /// The route.
    pub route: RouteName,
    /// The rule, from 0.
    pub rule: usize,
    /// What is wrong with it.
    #[source]
    pub problem: RouteProblem,
}

/// What is wrong with a rule.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum RouteProblem {
    /// An expression that is none.
    #[error("the expression {pattern:?} cannot be used")]
    Pattern {
        /// The expression, cut to 256 characters.
        pattern: String,
        /// Why.
        source: InvalidPattern,
    },
    /// A path that no request has.
    #[error("no request has the path {path:?}")]
    Path {
        /// The path, cut to 256 characters.
        path: String,
        /// Why, unless it holds a query or is `*`.
        source: Option<InvalidPath>,
    },
    /// A redirect and a rewrite in one rule.
    #[error("a rule cannot both redirect and rewrite")]
    RedirectAndRewrite,
    /// A redirect or CORS on a backend.
    #[error("a backend can have neither a redirect nor CORS")]
    BackendFilter,
    /// A match of another kind of route.
    #[error("a match is of the other kind of route")]
    MatchKind,
}

/// The routes of the mesh, compiled. A clone is a snapshot and costs O(1).
///
/// Memory is bounded by the routes that are there. The default is empty: every request goes to its service.
#[derive(Clone, Debug, Default)]
pub struct RouteTable {
    routes: OrdMap<RouteName, Arc<CompiledRoute>>,
    frontends: OrdMap<FrontendName, Arc<CompiledFrontend>>,
    attached: OrdMap<FrontendName, OrdSet<RouteName>>,
}

#[derive(Debug)]
struct CompiledFrontend {
    source: Frontend,
    ports: BTreeMap<u16, PortIndexes>,
}

#[derive(Debug, Default)]
struct PortIndexes {
    /// Of routes of the frontend's own namespace; none when there are none.
    producer: Option<Index>,
    /// Of routes of other namespaces, for clients there.
    consumers: BTreeMap<Arc<str>, Index>,
}

/// What the table says of a request.
#[derive(Clone, Copy, Debug)]
pub enum Selection<'t> {
    /// No route is attached to what was dialled: the request goes there.
    Unrouted,
    /// Routes are attached and none has a match: the answer is 404, and UNIMPLEMENTED to a gRPC request.
    NotFound,
    /// A rule has one.
    Selected(Selected<'t>),
}

/// The rule that a request goes by.
#[derive(Clone, Copy, Debug)]
pub struct Selected<'t> {
    pub(crate) entry: &'t Entry,
    /// The port that was dialled.
    pub(crate) port: u16,
}

impl<'t> Selected<'t> {
    /// The route.
    #[must_use]
    pub fn route(&self) -> &'t Route {
        &self.entry.route.source
    }

    /// The rule's place in it, from 0.
    #[must_use]
    pub const fn rule_index(&self) -> usize {
        self.entry.rule
    }

    /// The match's place in the rule, from 0; 0 as well for a rule without matches.
    #[must_use]
    pub const fn match_index(&self) -> usize {
        self.entry.one
    }

    /// The rule.
    #[must_use]
    pub fn rule(&self) -> &'t Rule {
        &self.entry.route.source.rules[self.entry.rule]
    }
}

impl RouteTable {
    /// Applies changes in their order and compiles what they touch once. Returns the routes that were not taken over.
    pub fn apply(&mut self, changes: impl IntoIterator<Item = RouteChange>) -> Vec<InvalidRoute> {
        let mut touched = BTreeSet::new();
        let mut invalid = Vec::new();
        for change in changes {
            match change {
                RouteChange::Upsert(route) => match self.upsert(route, &mut touched) {
                    Ok(()) => {}
                    Err(error) => invalid.push(error),
                },
                RouteChange::Remove(name) => self.unlink(&name, &mut touched),
                RouteChange::Frontend(frontend) => {
                    let name = frontend.name.clone();
                    let blank = CompiledFrontend { source: frontend, ports: BTreeMap::new() };
                    self.frontends.insert(name.clone(), Arc::new(blank));
                    touched.insert(name);
                }
                RouteChange::RemoveFrontend(name) => {
                    self.frontends.remove(&name);
                }
            }
        }
        for name in touched {
            self.compile(&name);
        }
        invalid
    }

    /// The rule for a request to a frontend's port from a client in `client_namespace`; none when the client has no identity.
    #[must_use]
    pub fn select(
        &self,
        frontend: &FrontendName,
        port: u16,
        client_namespace: Option<&str>,
        request: &RequestHead<'_>,
    ) -> Selection<'_> {
        let indexes = self.frontends.get(frontend).and_then(|frontend| frontend.ports.get(&port));
        let Some(indexes) = indexes else { return Selection::Unrouted };
        let consumer = client_namespace.and_then(|namespace| indexes.consumers.get(namespace));
        let Some(index) = consumer.or(indexes.producer.as_ref()) else {
            return Selection::Unrouted;
        };
        match index.find(request) {
            Some(entry) => Selection::Selected(Selected { entry, port }),
            None => Selection::NotFound,
        }
    }

    /// True when routes are attached to a frontend's port, whoever's clients they are for.
    #[must_use]
    pub fn is_routed(&self, frontend: &FrontendName, port: u16) -> bool {
        let indexes = self.frontends.get(frontend).and_then(|frontend| frontend.ports.get(&port));
        indexes.is_some_and(|one| one.producer.is_some() || !one.consumers.is_empty())
    }

    /// A route by its name.
    #[must_use]
    pub fn route(&self, name: &RouteName) -> Option<&Route> {
        self.routes.get(name).map(|compiled| &compiled.source)
    }

    /// All routes, in the order of their names.
    pub fn routes(&self) -> impl ExactSizeIterator<Item = &Route> {
        self.routes.values().map(|compiled| &compiled.source)
    }

    fn upsert(
        &mut self,
        route: Route,
        touched: &mut BTreeSet<FrontendName>,
    ) -> Result<(), InvalidRoute> {
        if self.route(&route.name) == Some(&route) {
            return Ok(());
        }
        let name = route.name.clone();
        if let Some(rule) = route.rules.iter().position(|rule| of_other_kind(rule, name.kind)) {
            return Err(InvalidRoute { route: name, rule, problem: RouteProblem::MatchKind });
        }
        let compiled = CompiledRoute::new(route).map_err(|(rule, problem)| InvalidRoute {
            route: name.clone(),
            rule,
            problem,
        })?;
        self.unlink(&name, touched);
        for parent in &compiled.source.parents {
            self.attached.entry(parent.frontend.clone()).or_default().insert(name.clone());
            touched.insert(parent.frontend.clone());
        }
        self.routes.insert(name, Arc::new(compiled));
        Ok(())
    }

    fn unlink(&mut self, name: &RouteName, touched: &mut BTreeSet<FrontendName>) {
        let Some(old) = self.routes.remove(name) else { return };
        for parent in &old.source.parents {
            if let Some(attached) = self.attached.get_mut(&parent.frontend) {
                attached.remove(name);
                if attached.is_empty() {
                    self.attached.remove(&parent.frontend);
                }
            }
            touched.insert(parent.frontend.clone());
        }
    }

    fn compile(&mut self, name: &FrontendName) {
        let Some(frontend) = self.frontends.get(name) else { return };
        let attached = self.attached.get(name);
        let routes: Vec<_> =
            attached.into_iter().flatten().filter_map(|route| self.routes.get(route)).collect();
        let source = frontend.source.clone();
        let ports = source.ports.iter().map(|port| (port.port, indexes(&source, port, &routes)));
        let ports = ports.collect();
        self.frontends.insert(name.clone(), Arc::new(CompiledFrontend { source, ports }));
    }
}

fn of_other_kind(rule: &Rule, kind: RouteKind) -> bool {
    rule.matches.iter().any(|one| match one {
        RouteMatch::Http(_) => kind != RouteKind::Http,
        RouteMatch::Grpc(_) => kind != RouteKind::Grpc,
    })
}

/// Whether a `parentRef` means this port of this frontend.
fn means(parent: &Parent, frontend: &FrontendName, port: &FrontendPort) -> bool {
    parent.frontend == *frontend
        && parent.port.is_none_or(|number| number == port.port)
        && (parent.section.is_none() || parent.section == port.section)
}

fn indexes(
    frontend: &Frontend,
    port: &FrontendPort,
    attached: &[&Arc<CompiledRoute>],
) -> PortIndexes {
    // A gateway's routes count for every client, wherever they live.
    let (by_namespace, by_host) = match frontend.name.kind {
        FrontendKind::Service | FrontendKind::ServiceEntry => (true, false),
        FrontendKind::Gateway => (false, true),
    };
    let mut groups: BTreeMap<Option<&Arc<str>>, Vec<&Arc<CompiledRoute>>> = BTreeMap::new();
    for route in attached {
        if route.source.parents.iter().any(|parent| means(parent, &frontend.name, port)) {
            let namespace = &route.source.name.namespace;
            let is_consumer = by_namespace && *namespace != frontend.name.namespace;
            groups.entry(is_consumer.then_some(namespace)).or_default().push(route);
        }
    }
    let mut indexes = PortIndexes::default();
    for (consumer, routes) in groups {
        let is_grpc = |route: &&Arc<CompiledRoute>| route.source.name.kind == RouteKind::Grpc;
        let only_grpc = by_namespace && routes.iter().any(is_grpc);
        let counted = routes.into_iter().filter(|route| !only_grpc || is_grpc(route));
        let index = Index::new(counted, by_host);
        match consumer {
            Some(namespace) => {
                indexes.consumers.insert(Arc::clone(namespace), index);
            }
            None => indexes.producer = Some(index),
        }
    }
    indexes
}

#[cfg(test)]
pub(crate) mod tests;

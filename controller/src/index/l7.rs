//! What waypoints are told, kept up to date: frontends, routes, and what becomes of routes.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use mesh_route::{FrontendName, RouteKind, RouteName};

use super::Delta;
use super::authentications;
use super::frontends::{self, Frontend, FrontendSource};
use super::objects::{Key, in_namespace};
use super::policies::Target;
use super::routes::{self, PublishedRoute, Resolved, RouteStatus};
use super::unreadable;
use super::workloads::View;
use crate::manifest::route::ParentKind;
use crate::manifest::{Kind, Object, RouteObject};

/// A route object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct RouteSource {
    kind: RouteKind,
    key: Key,
}

impl RouteSource {
    fn name(&self) -> RouteName {
        RouteName::new(self.kind, &self.key.namespace, &self.key.name)
    }

    fn object<'v>(&self, view: View<'v>) -> Option<&'v Arc<RouteObject>> {
        match self.kind {
            RouteKind::Http => view.objects.http_routes.get(&self.key),
            RouteKind::Grpc => view.objects.grpc_routes.get(&self.key),
        }
    }
}

/// What waypoints are told.
#[derive(Debug, Default)]
pub(super) struct L7 {
    frontends: BTreeMap<FrontendName, Arc<Frontend>>,
    routes: BTreeMap<RouteName, Arc<PublishedRoute>>,
    status: BTreeMap<RouteName, RouteStatus>,
    /// The services that each route names, and the other way round.
    services_of: BTreeMap<RouteSource, BTreeSet<Key>>,
    routes_of: BTreeMap<Key, BTreeSet<RouteSource>>,
}

impl L7 {
    pub(super) fn frontends(&self) -> impl Iterator<Item = &Arc<Frontend>> {
        self.frontends.values()
    }

    pub(super) fn routes(&self) -> impl Iterator<Item = &Arc<PublishedRoute>> {
        self.routes.values()
    }

    pub(super) fn status(&self) -> impl Iterator<Item = (RouteName, &RouteStatus)> {
        self.status.iter().map(|(name, status)| (name.clone(), status))
    }

    /// Marks what `object` affects as things stand.
    pub(super) fn mark(
        &self,
        view: View<'_>,
        object: &Object,
        key: &Key,
        frontends: &mut BTreeSet<FrontendSource>,
        routes: &mut BTreeSet<RouteSource>,
    ) {
        match object {
            Object::HttpRoute(_) => {
                routes.insert(RouteSource { kind: RouteKind::Http, key: key.clone() });
            }
            Object::GrpcRoute(_) => {
                routes.insert(RouteSource { kind: RouteKind::Grpc, key: key.clone() });
            }
            Object::ReferenceGrant(_) => routes.extend(self.routes_in(&key.namespace)),
            Object::Gateway(_) => {
                frontends.insert(FrontendSource::Gateway(key.clone()));
                // They are not attached, and say why.
                for (kind, table) in [
                    (RouteKind::Http, &view.objects.http_routes),
                    (RouteKind::Grpc, &view.objects.grpc_routes),
                ] {
                    let named = table.iter().filter(|(_, route)| {
                        route.parents.iter().any(|parent| {
                            parent.kind == ParentKind::Gateway
                                && parent.namespace == key.namespace
                                && parent.name == key.name
                        })
                    });
                    routes.extend(named.map(|(key, _)| RouteSource { kind, key: key.clone() }));
                }
            }
            Object::Service(_) => {
                frontends.insert(FrontendSource::Target(Target::Service(key.clone())));
                routes.extend(self.routes_of.get(key).into_iter().flatten().cloned());
            }
            Object::ServiceEntry(_) => {
                frontends.insert(FrontendSource::Target(Target::ServiceEntry(key.clone())));
                routes.extend(self.routes_of.get(key).into_iter().flatten().cloned());
            }
            Object::Namespace(_) => {
                let services = in_namespace(&view.objects.services, &key.name)
                    .map(|(key, _)| Target::Service(key.clone()));
                let entries = in_namespace(&view.objects.service_entries, &key.name)
                    .map(|(key, _)| Target::ServiceEntry(key.clone()));
                frontends.extend(services.chain(entries).map(FrontendSource::Target));
                routes.extend(self.routes_in(&key.name));
            }
            Object::AuthorizationPolicy(policy) => {
                frontends.extend(Target::of(policy).map(FrontendSource::Target));
                frontends.extend(frontends::gateways_of(view, &policy.targets, &key.namespace));
            }
            Object::RequestAuthentication(object) => {
                let namespace = &key.namespace;
                frontends.extend(authentications::frontends_of(view, namespace, &object.targets));
            }
            Object::Unreadable(policy) if policy.kind == Kind::RequestAuthentication => {
                frontends.extend(authentications::frontends_of_unreadable(view, policy));
            }
            Object::Unreadable(policy) => {
                frontends.extend(unreadable::targets(policy).map(FrontendSource::Target));
                let gateways: Vec<_> = unreadable::gateways(policy).cloned().collect();
                frontends.extend(frontends::gateways_of(view, &gateways, &policy.meta.namespace));
            }
            Object::Node(_)
            | Object::Pod(_)
            | Object::ServiceAccount(_)
            | Object::EndpointSlice(_)
            | Object::WorkloadEntry(_)
            | Object::PeerAuthentication(_) => {}
        }
    }

    /// Computes again what was marked.
    pub(super) fn settle(
        &mut self,
        view: View<'_>,
        frontends: BTreeSet<FrontendSource>,
        routes: BTreeSet<RouteSource>,
        delta: &mut Delta,
    ) {
        for source in frontends {
            let name = source.name();
            match frontends::of(view, &source) {
                None => {
                    if self.frontends.remove(&name).is_some() {
                        delta.removed_frontends.push(name);
                    }
                }
                Some(frontend) => {
                    if self.frontends.get(&name).is_none_or(|old| **old != frontend) {
                        let frontend = Arc::new(frontend);
                        delta.frontends.push(Arc::clone(&frontend));
                        self.frontends.insert(name, frontend);
                    }
                }
            }
        }
        for source in routes {
            self.settle_route(view, source, delta);
        }
    }

    fn settle_route(&mut self, view: View<'_>, source: RouteSource, delta: &mut Delta) {
        let name = source.name();
        let object = source.object(view);
        let services = object.map(|object| routes::services(object)).unwrap_or_default();
        self.link(source, services);
        let resolved = object.map(|object| routes::resolve(view, object));
        let published = match resolved {
            Some(Resolved { published, status }) => {
                self.status.insert(name.clone(), status);
                published
            }
            None => {
                self.status.remove(&name);
                None
            }
        };
        match published {
            None => {
                if self.routes.remove(&name).is_some() {
                    delta.removed_routes.push(name);
                }
            }
            Some(route) => {
                if self.routes.get(&name).is_none_or(|old| **old != route) {
                    let route = Arc::new(route);
                    delta.routes.push(Arc::clone(&route));
                    self.routes.insert(name, route);
                }
            }
        }
    }

    fn link(&mut self, source: RouteSource, services: BTreeSet<Key>) {
        for old in self.services_of.remove(&source).unwrap_or_default() {
            if let Some(routes) = self.routes_of.get_mut(&old) {
                routes.remove(&source);
                if routes.is_empty() {
                    self.routes_of.remove(&old);
                }
            }
        }
        for service in &services {
            self.routes_of.entry(service.clone()).or_default().insert(source.clone());
        }
        if !services.is_empty() {
            self.services_of.insert(source, services);
        }
    }

    /// The routes that name a service of a namespace.
    fn routes_in<'l>(&'l self, namespace: &'l str) -> impl Iterator<Item = RouteSource> + 'l {
        self.routes_of
            .range(Key::new(namespace, "")..)
            .take_while(move |(key, _)| *key.namespace == *namespace)
            .flat_map(|(_, routes)| routes.iter().cloned())
    }
}

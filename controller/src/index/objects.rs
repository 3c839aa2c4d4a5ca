//! The objects that are in force, with the look-ups the mappings need.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use super::workloads::gateway_network;
use crate::manifest::{
    AuthorizationPolicy, EndpointSlice, Gateway, Kind, Namespace, Node, Object, ObjectKey,
    PeerAuthentication, Pod, ReferenceGrant, RequestAuthentication, RouteObject, Service,
    ServiceAccount, ServiceEntry, UnreadablePolicy, WorkloadEntry,
};

/// Namespace and name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// Namespace.
    pub namespace: Arc<str>,
    /// Name.
    pub name: Arc<str>,
}

impl Key {
    /// A key of its parts.
    #[must_use]
    pub fn new(namespace: &str, name: &str) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl From<&ObjectKey> for Key {
    fn from(key: &ObjectKey) -> Self {
        Self { namespace: key.namespace.clone(), name: key.name.clone() }
    }
}

/// Objects of one kind by key.
pub(super) type Table<T> = BTreeMap<Key, Arc<T>>;

/// The entries of one namespace.
pub(super) fn in_namespace<'t, T>(
    table: &'t Table<T>,
    namespace: &'t str,
) -> impl Iterator<Item = (&'t Key, &'t Arc<T>)> {
    table.range(Key::new(namespace, "")..).take_while(move |(key, _)| &*key.namespace == namespace)
}

/// All objects.
#[derive(Clone, Debug, Default)]
pub(super) struct Objects {
    pub(super) namespaces: BTreeMap<Arc<str>, Arc<Namespace>>,
    pub(super) nodes: BTreeMap<Arc<str>, Arc<Node>>,
    pub(super) service_accounts: Table<ServiceAccount>,
    pub(super) pods: Table<Pod>,
    pub(super) services: Table<Service>,
    /// The services that are gateways, by the network they lead to.
    pub(super) gateways: BTreeMap<Arc<str>, BTreeSet<Key>>,
    pub(super) slices: Table<EndpointSlice>,
    pub(super) workload_entries: Table<WorkloadEntry>,
    pub(super) service_entries: Table<ServiceEntry>,
    pub(super) authorizations: Table<AuthorizationPolicy>,
    pub(super) peers: Table<PeerAuthentication>,
    pub(super) authentications: Table<RequestAuthentication>,
    pub(super) gateway_objects: Table<Gateway>,
    pub(super) http_routes: Table<RouteObject>,
    pub(super) grpc_routes: Table<RouteObject>,
    pub(super) grants: Table<ReferenceGrant>,
    /// Policies that cannot be read; never one of a key that is in a table as well.
    pub(super) unreadable: BTreeMap<ObjectKey, Arc<UnreadablePolicy>>,
    pub(super) slices_by_service: BTreeMap<Key, BTreeSet<Key>>,
    pub(super) slices_by_pod: BTreeMap<Key, BTreeSet<Key>>,
    pub(super) pods_by_node: BTreeMap<Arc<str>, BTreeSet<Key>>,
}

impl Objects {
    /// Stores `object`; returns what it replaced.
    pub(super) fn upsert(&mut self, object: &Object) -> Option<Object> {
        let whole = object.key();
        let key = Key::from(&whole);
        if let Object::Unreadable(new) = object {
            let old = self.remove(&whole);
            self.unreadable.insert(whole, Arc::clone(new));
            return old;
        }
        let unreadable = self.unreadable.remove(&whole).map(Object::Unreadable);
        let old = match object {
            Object::Namespace(new) => {
                self.namespaces.insert(key.name, Arc::clone(new)).map(Object::Namespace)
            }
            Object::Node(new) => self.nodes.insert(key.name, Arc::clone(new)).map(Object::Node),
            Object::ServiceAccount(new) => {
                self.service_accounts.insert(key, Arc::clone(new)).map(Object::ServiceAccount)
            }
            Object::Pod(new) => {
                let old = self.pods.insert(key.clone(), Arc::clone(new));
                if let Some(old) = &old {
                    unlink(&mut self.pods_by_node, &old.node, &key);
                }
                self.pods_by_node.entry(new.node.clone()).or_default().insert(key);
                old.map(Object::Pod)
            }
            Object::Service(new) => {
                let old = self.services.insert(key.clone(), Arc::clone(new));
                self.link_gateway(&key, old.as_deref(), Some(new));
                old.map(Object::Service)
            }
            Object::EndpointSlice(new) => {
                let old = self.slices.insert(key.clone(), Arc::clone(new));
                if let Some(old) = &old {
                    self.unlink_slice(&key, old);
                }
                for pod in slice_pods(new) {
                    self.slices_by_pod.entry(pod).or_default().insert(key.clone());
                }
                self.slices_by_service.entry(slice_service(new)).or_default().insert(key);
                old.map(Object::EndpointSlice)
            }
            Object::WorkloadEntry(new) => {
                self.workload_entries.insert(key, Arc::clone(new)).map(Object::WorkloadEntry)
            }
            Object::ServiceEntry(new) => {
                self.service_entries.insert(key, Arc::clone(new)).map(Object::ServiceEntry)
            }
            Object::AuthorizationPolicy(new) => {
                self.authorizations.insert(key, Arc::clone(new)).map(Object::AuthorizationPolicy)
            }
            Object::PeerAuthentication(new) => {
                self.peers.insert(key, Arc::clone(new)).map(Object::PeerAuthentication)
            }
            Object::RequestAuthentication(new) => {
                self.authentications.insert(key, Arc::clone(new)).map(Object::RequestAuthentication)
            }
            Object::Gateway(new) => {
                self.gateway_objects.insert(key, Arc::clone(new)).map(Object::Gateway)
            }
            Object::HttpRoute(new) => {
                self.http_routes.insert(key, Arc::clone(new)).map(Object::HttpRoute)
            }
            Object::GrpcRoute(new) => {
                self.grpc_routes.insert(key, Arc::clone(new)).map(Object::GrpcRoute)
            }
            Object::ReferenceGrant(new) => {
                self.grants.insert(key, Arc::clone(new)).map(Object::ReferenceGrant)
            }
            Object::Unreadable(_) => None,
        };
        unreadable.or(old)
    }

    /// Removes an object; returns it.
    pub(super) fn remove(&mut self, key: &ObjectKey) -> Option<Object> {
        if let Some(old) = self.unreadable.remove(key) {
            return Some(Object::Unreadable(old));
        }
        let id = Key::from(key);
        match key.kind {
            Kind::Namespace => self.namespaces.remove(&id.name).map(Object::Namespace),
            Kind::Node => self.nodes.remove(&id.name).map(Object::Node),
            Kind::ServiceAccount => self.service_accounts.remove(&id).map(Object::ServiceAccount),
            Kind::Pod => {
                let old = self.pods.remove(&id)?;
                unlink(&mut self.pods_by_node, &old.node, &id);
                Some(Object::Pod(old))
            }
            Kind::Service => {
                let old = self.services.remove(&id);
                self.link_gateway(&id, old.as_deref(), None);
                old.map(Object::Service)
            }
            Kind::EndpointSlice => {
                let old = self.slices.remove(&id)?;
                self.unlink_slice(&id, &old);
                Some(Object::EndpointSlice(old))
            }
            Kind::WorkloadEntry => self.workload_entries.remove(&id).map(Object::WorkloadEntry),
            Kind::ServiceEntry => self.service_entries.remove(&id).map(Object::ServiceEntry),
            Kind::AuthorizationPolicy => {
                self.authorizations.remove(&id).map(Object::AuthorizationPolicy)
            }
            Kind::PeerAuthentication => self.peers.remove(&id).map(Object::PeerAuthentication),
            Kind::RequestAuthentication => {
                self.authentications.remove(&id).map(Object::RequestAuthentication)
            }
            Kind::Gateway => self.gateway_objects.remove(&id).map(Object::Gateway),
            Kind::HttpRoute => self.http_routes.remove(&id).map(Object::HttpRoute),
            Kind::GrpcRoute => self.grpc_routes.remove(&id).map(Object::GrpcRoute),
            Kind::ReferenceGrant => self.grants.remove(&id).map(Object::ReferenceGrant),
        }
    }

    /// The object of a key, readable or not.
    pub(super) fn current(&self, key: &ObjectKey) -> Option<Object> {
        if let Some(policy) = self.unreadable.get(key) {
            return Some(Object::Unreadable(Arc::clone(policy)));
        }
        let id = Key::from(key);
        match key.kind {
            Kind::Namespace => self.namespaces.get(&id.name).cloned().map(Object::Namespace),
            Kind::Node => self.nodes.get(&id.name).cloned().map(Object::Node),
            Kind::Pod => self.pods.get(&id).cloned().map(Object::Pod),
            Kind::ServiceAccount => {
                self.service_accounts.get(&id).cloned().map(Object::ServiceAccount)
            }
            Kind::Service => self.services.get(&id).cloned().map(Object::Service),
            Kind::EndpointSlice => self.slices.get(&id).cloned().map(Object::EndpointSlice),
            Kind::WorkloadEntry => {
                self.workload_entries.get(&id).cloned().map(Object::WorkloadEntry)
            }
            Kind::ServiceEntry => self.service_entries.get(&id).cloned().map(Object::ServiceEntry),
            Kind::AuthorizationPolicy => {
                self.authorizations.get(&id).cloned().map(Object::AuthorizationPolicy)
            }
            Kind::PeerAuthentication => {
                self.peers.get(&id).cloned().map(Object::PeerAuthentication)
            }
            Kind::RequestAuthentication => {
                self.authentications.get(&id).cloned().map(Object::RequestAuthentication)
            }
            Kind::Gateway => self.gateway_objects.get(&id).cloned().map(Object::Gateway),
            Kind::HttpRoute => self.http_routes.get(&id).cloned().map(Object::HttpRoute),
            Kind::GrpcRoute => self.grpc_routes.get(&id).cloned().map(Object::GrpcRoute),
            Kind::ReferenceGrant => self.grants.get(&id).cloned().map(Object::ReferenceGrant),
        }
    }

    /// The slices of a service.
    pub(super) fn slices_of(&self, service: &Key) -> impl Iterator<Item = &Arc<EndpointSlice>> {
        self.slices_by_service
            .get(service)
            .into_iter()
            .flatten()
            .filter_map(|key| self.slices.get(key))
    }

    /// True when the service's endpoints are given by slices, so that its selector is not consulted for pods.
    pub(super) fn has_slices(&self, service: &Key) -> bool {
        self.slices_by_service.contains_key(service)
    }

    fn link_gateway(&mut self, key: &Key, old: Option<&Service>, new: Option<&Service>) {
        if let Some(network) = old.and_then(gateway_network)
            && let Some(keys) = self.gateways.get_mut(network)
        {
            keys.remove(key);
            if keys.is_empty() {
                self.gateways.remove(network);
            }
        }
        if let Some(network) = new.and_then(gateway_network) {
            self.gateways.entry(network.into()).or_default().insert(key.clone());
        }
    }

    fn unlink_slice(&mut self, key: &Key, slice: &EndpointSlice) {
        for pod in slice_pods(slice) {
            unlink(&mut self.slices_by_pod, &pod, key);
        }
        unlink(&mut self.slices_by_service, &slice_service(slice), key);
    }
}

/// The pods a slice names.
pub(super) fn slice_pods(slice: &EndpointSlice) -> impl Iterator<Item = Key> + '_ {
    slice
        .endpoints
        .iter()
        .filter_map(|endpoint| endpoint.pod.as_ref())
        .map(|pod| Key { namespace: slice.meta.namespace.clone(), name: pod.clone() })
}

/// The service a slice belongs to.
pub(super) fn slice_service(slice: &EndpointSlice) -> Key {
    Key { namespace: slice.meta.namespace.clone(), name: slice.service.clone() }
}

fn unlink<K: Ord>(map: &mut BTreeMap<K, BTreeSet<Key>>, at: &K, key: &Key) {
    if let Some(set) = map.get_mut(at) {
        set.remove(key);
        if set.is_empty() {
            map.remove(at);
        }
    }
}

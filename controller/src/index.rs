//! Objects in, the smallest deltas out.
//!
//! [`Index::apply`] stores a batch of changes, marks what they can affect, computes only that again and returns what is
//! different from before. Nothing here has a clock, a file or a socket, and everything but the enrolment (see
//! `enrolment`) and addresses that are remembered (see `vip`) is a function of the set of objects: applying changes in any order and grouping ends in the same result.

mod authentications;
mod authorization;
mod enrolment;
mod frontends;
mod generations;
mod l7;
mod notes;
mod objects;
mod peer;
mod pods;
mod policies;
mod routes;
mod services;
mod standing;
mod unreadable;
mod vip;
mod workloads;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use mesh_authorize::{Policy, PolicyName, UnknownEgress};
use mesh_model::{IpPrefix, NamespacedHostname, Service, Workload, WorkloadUid};
use mesh_route::{FrontendName, RouteName};

use self::enrolment::Enrolment;
use self::frontends::FrontendSource;
use self::l7::{L7, RouteSource};
use self::objects::{Objects, in_namespace, slice_pods, slice_service};
use self::policies::{PolicySource, Target};
use self::services::{HostDefinitions, ServiceSource};
use self::vip::{Kept, Vips};
use self::workloads::{View, WorkloadSource};
use crate::manifest::metadata::Metadata;
use crate::manifest::{Kind, Object, ObjectKey};
use crate::source::Change;

pub use self::enrolment::Captured;
pub use self::frontends::Frontend;
pub use self::objects::Key;
pub use self::pods::{PodMode, PodSettings};
pub use self::policies::PolicyStatus;
pub use self::routes::{PublishedRoute, RouteStatus};

/// What the index is told once.
#[derive(Clone, Debug)]
pub struct IndexSettings {
    /// Trust domain of every workload here; default `cluster.local`.
    pub trust_domain: Arc<str>,
    /// Name of this cluster, the first part of each workload's uid; default `Kubernetes`.
    pub cluster_id: Arc<str>,
    /// Network of pods that do not say otherwise; default the unnamed one.
    pub network: Arc<str>,
    /// DNS domain of services; default `cluster.local`.
    pub cluster_domain: Arc<str>,
    /// Namespace whose policies hold for the whole mesh; default `istio-system`.
    pub root_namespace: Arc<str>,
    /// Also honour the `istio.io/…` twins of our labels; default off.
    pub istio_labels: bool,
    /// What becomes of unknown destinations in namespaces that do not say; default allow.
    pub unknown_egress: UnknownEgress,
    /// Namespaces whose pods are never captured, whatever their labels say; default
    /// [`mesh_model::EXCLUDED_NAMESPACES`].
    pub excluded_namespaces: BTreeSet<Arc<str>>,
    /// Networks that pods have their addresses from beside the nodes' `podCIDRs`; default none.
    pub pod_networks: Vec<IpPrefix>,
}

impl Default for IndexSettings {
    fn default() -> Self {
        Self {
            trust_domain: "cluster.local".into(),
            cluster_id: "Kubernetes".into(),
            network: "".into(),
            cluster_domain: "cluster.local".into(),
            root_namespace: "istio-system".into(),
            istio_labels: false,
            unknown_egress: UnknownEgress::Allow,
            excluded_namespaces: mesh_model::EXCLUDED_NAMESPACES.map(Into::into).into(),
            pod_networks: Vec::new(),
        }
    }
}

impl IndexSettings {
    /// The value of `culvert.dev/NAME`, or of its twin `istio.io/NAME` where those are honoured.
    fn mesh_label<'m>(&self, meta: &'m Metadata, name: &str) -> Option<&'m str> {
        meta.label(&format!("culvert.dev/{name}"))
            .or_else(|| meta.label(&format!("istio.io/{name}")).filter(|_| self.istio_labels))
    }
}

/// What an agent tells about its node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NodeReport {
    /// Its first stream has come.
    Connected,
    /// Its last stream has gone.
    Disconnected,
    /// It captures exactly these pods.
    Enrolled(BTreeSet<Key>),
}

/// What a batch changed.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Delta {
    /// New and changed workloads.
    pub workloads: Vec<Arc<Workload>>,
    /// Workloads that are gone.
    pub removed_workloads: Vec<WorkloadUid>,
    /// New and changed services.
    pub services: Vec<Arc<Service>>,
    /// Services that are gone.
    pub removed_services: Vec<NamespacedHostname>,
    /// New and changed policies.
    pub policies: Vec<Arc<Policy>>,
    /// Policies that are gone.
    pub removed_policies: Vec<PolicyName>,
    /// New and changed capture settings.
    pub pods: Vec<Arc<PodSettings>>,
    /// Capture settings that are gone.
    pub removed_pods: Vec<WorkloadUid>,
    /// Namespaces whose `unknownEgress` is new, changed or gone (`None`).
    pub egress: Vec<(Arc<str>, Option<UnknownEgress>)>,
    /// The networks of the cluster's own pods, where they are other ones than before.
    pub pod_networks: Option<Vec<IpPrefix>>,
    /// New and changed frontends of waypoints.
    pub frontends: Vec<Arc<Frontend>>,
    /// Frontends that are gone.
    pub removed_frontends: Vec<FrontendName>,
    /// New and changed routes.
    pub routes: Vec<Arc<PublishedRoute>>,
    /// Routes that are gone.
    pub removed_routes: Vec<RouteName>,
    /// New and changed RequestAuthentications.
    pub authentications: Vec<Arc<mesh_jwt::RequestAuthentication>>,
    /// RequestAuthentications that are gone, as `namespace/name`.
    pub removed_authentications: Vec<Arc<str>>,
}

impl Delta {
    /// True when nothing changed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// The mapping from objects to what agents receive.
#[derive(Debug)]
pub struct Index {
    settings: IndexSettings,
    objects: Objects,
    enrolment: Enrolment,
    vips: BTreeMap<NamespacedHostname, Vips>,
    /// What was assigned before, where that is remembered.
    kept_vips: Option<Kept>,
    hosts: BTreeMap<Arc<str>, HostDefinitions>,
    hosts_of: BTreeMap<ServiceSource, BTreeSet<Arc<str>>>,
    workloads_of: BTreeMap<WorkloadSource, Vec<WorkloadUid>>,
    policies_of: BTreeMap<PolicySource, Vec<PolicyName>>,
    services: BTreeMap<(Arc<str>, Arc<str>), Arc<Service>>,
    workloads: BTreeMap<WorkloadUid, Arc<Workload>>,
    policies: BTreeMap<(Arc<str>, Arc<str>), Arc<Policy>>,
    pods: BTreeMap<WorkloadUid, Arc<PodSettings>>,
    egress: BTreeMap<Arc<str>, UnknownEgress>,
    pod_networks: Vec<IpPrefix>,
    authentications: BTreeMap<Key, Arc<mesh_jwt::RequestAuthentication>>,
    l7: L7,
}

/// What has to be computed again.
#[derive(Debug, Default)]
struct Dirty {
    workloads: BTreeSet<WorkloadSource>,
    services: BTreeSet<ServiceSource>,
    policies: BTreeSet<PolicySource>,
    namespaces: BTreeSet<Arc<str>>,
    frontends: BTreeSet<FrontendSource>,
    routes: BTreeSet<RouteSource>,
    authentications: BTreeSet<Key>,
    vips: bool,
    pod_networks: bool,
}

impl Index {
    /// An empty index.
    #[must_use]
    pub fn new(settings: IndexSettings) -> Self {
        let pod_networks = IpPrefix::aggregate(settings.pod_networks.iter().copied());
        Self {
            settings,
            objects: Objects::default(),
            enrolment: Enrolment::default(),
            vips: BTreeMap::new(),
            kept_vips: None,
            hosts: BTreeMap::new(),
            hosts_of: BTreeMap::new(),
            workloads_of: BTreeMap::new(),
            policies_of: BTreeMap::new(),
            services: BTreeMap::new(),
            workloads: BTreeMap::new(),
            policies: BTreeMap::new(),
            pods: BTreeMap::new(),
            egress: BTreeMap::new(),
            pod_networks,
            authentications: BTreeMap::new(),
            l7: L7::default(),
        }
    }

    /// Remembers from now on which address each ServiceEntry's host was assigned, beginning with what
    /// [`kept_addresses`](Self::kept_addresses) gave before.
    pub fn keep_addresses(&mut self, before: &str) {
        self.kept_vips = Some(Kept::read(before));
    }

    /// Which address each ServiceEntry's host was assigned, as text; none when that is not remembered.
    #[must_use]
    pub fn kept_addresses(&self) -> Option<String> {
        self.kept_vips.as_ref().map(Kept::lines)
    }

    /// Applies changes together; returns what is different.
    pub fn apply(&mut self, changes: impl IntoIterator<Item = Change>) -> Delta {
        let mut dirty = Dirty::default();
        for change in changes {
            // What the change affects is looked up before and after it: an old selector counts as well as a new one.
            match change {
                Change::Upsert(object) => {
                    let key = object.key();
                    if let Some(old) = self.objects.current(&key) {
                        if old == *object {
                            continue;
                        }
                        self.mark(&old, &mut dirty);
                    }
                    self.objects.upsert(&object);
                    self.mark(&object, &mut dirty);
                }
                Change::Delete(key) => {
                    if let Some(old) = self.objects.current(&key) {
                        self.mark(&old, &mut dirty);
                        self.objects.remove(&key);
                        self.mark(&old, &mut dirty);
                    }
                }
            }
        }
        self.settle(dirty)
    }

    /// Takes in what a node's agent tells.
    pub fn report(&mut self, node: &str, report: NodeReport) -> Delta {
        let workloads = self.enrolment.report(node, report).into_iter().collect();
        self.settle(Dirty { workloads, ..Dirty::default() })
    }

    /// Its settings.
    #[must_use]
    pub const fn settings(&self) -> &IndexSettings {
        &self.settings
    }

    /// All workloads, by uid.
    pub fn workloads(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.workloads.values()
    }

    /// All services, by namespace and host.
    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.services.values()
    }

    /// All policies, by name.
    pub fn policies(&self) -> impl Iterator<Item = &Arc<Policy>> {
        self.policies.values()
    }

    /// Capture settings of all pods, by workload uid.
    pub fn pods(&self) -> impl Iterator<Item = &Arc<PodSettings>> {
        self.pods.values()
    }

    /// `unknownEgress` of the namespaces that set it.
    #[must_use]
    pub const fn egress(&self) -> &BTreeMap<Arc<str>, UnknownEgress> {
        &self.egress
    }

    /// The networks that pods have their addresses from, the nodes' and those of the settings, joined where they touch.
    #[must_use]
    pub fn pod_networks(&self) -> &[IpPrefix] {
        &self.pod_networks
    }

    /// What becomes of each route.
    pub fn route_status(&self) -> impl Iterator<Item = (RouteName, &RouteStatus)> {
        self.l7.status()
    }

    /// The frontends of waypoints, by name.
    pub fn frontends(&self) -> impl Iterator<Item = &Arc<Frontend>> {
        self.l7.frontends()
    }

    /// The routes in force, by name.
    pub fn routes(&self) -> impl Iterator<Item = &Arc<PublishedRoute>> {
        self.l7.routes()
    }

    /// What waypoints are told of RequestAuthentications, by name.
    pub fn authentications(&self) -> impl Iterator<Item = &Arc<mesh_jwt::RequestAuthentication>> {
        self.authentications.values()
    }

    /// What agents say they capture.
    #[must_use]
    pub fn captured(&self) -> Captured {
        self.enrolment.captured()
    }

    /// How each policy object is enforced.
    #[must_use]
    pub fn policy_status(&self) -> BTreeMap<ObjectKey, PolicyStatus> {
        let view = self.view();
        let key = |kind, key: &Key| ObjectKey {
            kind,
            namespace: key.namespace.clone(),
            name: key.name.clone(),
        };
        let authorizations = self.objects.authorizations.iter().map(|(at, policy)| {
            (key(Kind::AuthorizationPolicy, at), policies::authorization_status(view, policy))
        });
        let peers = self.objects.peers.iter().map(|(at, object)| {
            (key(Kind::PeerAuthentication, at), policies::peer_status(view, object))
        });
        let tokens = self.objects.authentications.iter().map(|(at, object)| {
            (key(Kind::RequestAuthentication, at), authentications::status(view, object))
        });
        let unreadable = self
            .objects
            .unreadable
            .iter()
            .map(|(key, policy)| (key.clone(), unreadable::status(view, policy)));
        authorizations.chain(peers).chain(tokens).chain(unreadable).collect()
    }

    const fn view(&self) -> View<'_> {
        View { objects: &self.objects, settings: &self.settings }
    }

    /// Marks what `object` affects as things stand.
    fn mark(&self, object: &Object, dirty: &mut Dirty) {
        let view = self.view();
        let objects = &self.objects;
        let key = Key::from(&object.key());
        self.l7.mark(view, object, &key, &mut dirty.frontends, &mut dirty.routes);
        match object {
            Object::Gateway(_)
            | Object::HttpRoute(_)
            | Object::GrpcRoute(_)
            | Object::ReferenceGrant(_) => {}
            Object::Namespace(_) => {
                let name = key.name;
                dirty.workloads.extend(policies::workloads_in(view, Some(&name), |_| true));
                let services = in_namespace(&objects.services, &name).map(|(key, _)| key.clone());
                let entries =
                    in_namespace(&objects.service_entries, &name).map(|(key, _)| key.clone());
                dirty.services.extend(services.map(ServiceSource::Service));
                dirty.services.extend(entries.map(ServiceSource::ServiceEntry));
                // Its waypoint label decides where policies with targetRefs are enforced.
                for (_, policy) in in_namespace(&objects.authorizations, &name) {
                    self.mark_targets(Target::of(policy), dirty);
                }
                dirty.namespaces.insert(name);
            }
            Object::Node(_) => {
                dirty.pod_networks = true;
                let pods = objects.pods_by_node.get(&key.name).into_iter().flatten().cloned();
                dirty.workloads.extend(pods.map(WorkloadSource::Pod));
                let slices = objects
                    .slices
                    .iter()
                    .filter(|(_, slice)| {
                        slice.endpoints.iter().any(|one| one.pod.is_none() && one.node == key.name)
                    })
                    .map(|(key, _)| WorkloadSource::Slice(key.clone()));
                dirty.workloads.extend(slices);
            }
            Object::ServiceAccount(_) => {}
            Object::Pod(pod) => {
                self.mark_ports(
                    policies::targets_of_labels(view, &key.namespace, &pod.meta.labels, Some(&key)),
                    dirty,
                );
                dirty.workloads.insert(WorkloadSource::Pod(key));
            }
            Object::Service(service) => {
                if workloads::gateway_network(service).is_some() {
                    // Where workloads of that network are reached by.
                    dirty.workloads.extend(policies::workloads_in(view, None, |_| true));
                    let entries = objects.service_entries.keys().cloned();
                    dirty.workloads.extend(entries.map(WorkloadSource::ServiceEntry));
                }
                let slices = objects.slices_by_service.get(&key).into_iter().flatten().cloned();
                dirty.workloads.extend(slices.map(WorkloadSource::Slice));
                // The object itself may be the old one, which is not stored any more.
                if let Some(selector) = &service.selector {
                    let wanted = |labels: &BTreeMap<String, String>| selector.matches(labels);
                    dirty.workloads.extend(policies::workloads_in(
                        view,
                        Some(&key.namespace),
                        wanted,
                    ));
                }
                dirty.vips |= service.cluster_ips.iter().any(|ip| vip::is_assignable(*ip));
                let target = Target::Service(key.clone());
                dirty.workloads.extend(policies::members(view, &target));
                self.mark_ports([target], dirty);
                dirty.services.insert(ServiceSource::Service(key));
            }
            Object::EndpointSlice(slice) => {
                let service = slice_service(slice);
                dirty.workloads.extend(slice_pods(slice).map(WorkloadSource::Pod));
                // Its first and last slice switch a service between slices and selector.
                if objects.slices_by_service.get(&service).is_none_or(|slices| slices.len() == 1)
                    && let Some(selector) =
                        objects.services.get(&service).and_then(|one| one.selector.as_ref())
                {
                    let wanted = |labels: &BTreeMap<String, String>| selector.matches(labels);
                    dirty.workloads.extend(policies::workloads_in(
                        view,
                        Some(&key.namespace),
                        wanted,
                    ));
                }
                self.mark_ports([Target::Service(service)], dirty);
                dirty.workloads.insert(WorkloadSource::Slice(key));
            }
            Object::WorkloadEntry(entry) => {
                self.mark_ports(
                    policies::targets_of_labels(view, &key.namespace, &entry.endpoint.labels, None),
                    dirty,
                );
                dirty.workloads.insert(WorkloadSource::WorkloadEntry(key));
            }
            Object::ServiceEntry(entry) => {
                if let Some(selector) = &entry.selector {
                    let wanted = |labels: &BTreeMap<String, String>| selector.matches(labels);
                    dirty.workloads.extend(policies::workloads_in(
                        view,
                        Some(&key.namespace),
                        wanted,
                    ));
                }
                self.mark_ports([Target::ServiceEntry(key.clone())], dirty);
                dirty.workloads.insert(WorkloadSource::ServiceEntry(key.clone()));
                dirty.services.insert(ServiceSource::ServiceEntry(key));
                dirty.vips = true;
            }
            Object::AuthorizationPolicy(policy) => {
                dirty.workloads.extend(policies::selected(view, policy));
                self.mark_targets(Target::of(policy), dirty);
                dirty.policies.insert(PolicySource::Authorization(key));
            }
            Object::PeerAuthentication(peer) => {
                let root = &self.settings.root_namespace;
                let everywhere = *key.namespace == **root;
                let scope = if everywhere { None } else { Some(&*key.namespace) };
                let wanted = |labels: &BTreeMap<String, String>| {
                    peer.selector.as_ref().is_none_or(|selector| selector.matches(labels))
                };
                dirty.workloads.extend(policies::workloads_in(view, scope, wanted));
                // What UNSET inherits decides what the selecting objects below become.
                let below = objects
                    .peers
                    .keys()
                    .filter(|peer| everywhere || peer.namespace == key.namespace);
                dirty.policies.extend(below.cloned().map(PolicySource::Peer));
                dirty.policies.insert(PolicySource::Peer(key));
            }
            Object::RequestAuthentication(_) => {
                dirty.authentications.insert(key);
            }
            Object::Unreadable(policy) => {
                dirty.workloads.extend(unreadable::workloads(view, policy));
                dirty.policies.insert(PolicySource::Unreadable(policy.key()));
            }
        }
    }

    /// Marks targets whose policies come or go: their policies and their members.
    fn mark_targets(&self, targets: impl Iterator<Item = Target>, dirty: &mut Dirty) {
        for target in targets {
            dirty.workloads.extend(policies::members(self.view(), &target));
            self.mark_policies(&target, dirty);
        }
    }

    /// Marks targets whose ports may change.
    fn mark_ports(&self, targets: impl IntoIterator<Item = Target>, dirty: &mut Dirty) {
        for target in targets {
            self.mark_policies(&target, dirty);
        }
    }

    fn mark_policies(&self, target: &Target, dirty: &mut Dirty) {
        let namespace = match target {
            Target::Service(key) | Target::ServiceEntry(key) => &key.namespace,
        };
        for policy in self.objects.unreadable.values() {
            if unreadable::targets(policy).any(|one| one == *target) {
                dirty.policies.insert(PolicySource::Unreadable(policy.key()));
            }
        }
        let mut any = self.policies_of.contains_key(&PolicySource::TargetAllow(target.clone()));
        for (key, policy) in in_namespace(&self.objects.authorizations, namespace) {
            if Target::of(policy).any(|one| one == *target) {
                dirty.policies.insert(PolicySource::Authorization(key.clone()));
                any = true;
            }
        }
        if any {
            dirty.policies.insert(PolicySource::TargetAllow(target.clone()));
        }
    }

    fn settle(&mut self, mut dirty: Dirty) -> Delta {
        let mut delta = Delta::default();
        if dirty.vips {
            self.settle_vips(&mut dirty);
        }
        self.settle_services(dirty.services, &mut delta);
        self.settle_workloads(dirty.workloads, &mut delta);
        self.settle_policies(dirty.policies, &mut delta);
        let view = View { objects: &self.objects, settings: &self.settings };
        self.l7.settle(view, dirty.frontends, dirty.routes, &mut delta);
        self.settle_authentications(dirty.authentications, &mut delta);
        for name in dirty.namespaces {
            let new =
                self.objects.namespaces.get(&name).and_then(|namespace| namespace.unknown_egress);
            let old = match new {
                Some(new) => self.egress.insert(name.clone(), new),
                None => self.egress.remove(&name),
            };
            if old != new {
                delta.egress.push((name, new));
            }
        }
        if dirty.pod_networks {
            let of_nodes = self.objects.nodes.values().flat_map(|node| &node.pod_networks);
            let networks =
                IpPrefix::aggregate(of_nodes.chain(&self.settings.pod_networks).copied());
            if networks != self.pod_networks {
                self.pod_networks.clone_from(&networks);
                delta.pod_networks = Some(networks);
            }
        }
        delta
    }

    fn settle_authentications(&mut self, keys: BTreeSet<Key>, delta: &mut Delta) {
        for key in keys {
            let object = self.objects.authentications.get(&key);
            match object.map(|object| authentications::published(object)) {
                None => {
                    if self.authentications.remove(&key).is_some() {
                        delta.removed_authentications.push(key.to_string().into());
                    }
                }
                Some(new) => {
                    if self.authentications.get(&key).is_none_or(|old| **old != new) {
                        let new = Arc::new(new);
                        delta.authentications.push(Arc::clone(&new));
                        self.authentications.insert(key, new);
                    }
                }
            }
        }
    }

    fn settle_vips(&mut self, dirty: &mut Dirty) {
        let entries = self.objects.service_entries.values().flat_map(|entry| &entry.addresses);
        let cluster = self.objects.services.values().flat_map(|service| &service.cluster_ips);
        let reserved: BTreeSet<IpAddr> =
            entries.chain(cluster).copied().filter(|ip| vip::is_assignable(*ip)).collect();
        let hosts = services::hosts_to_allocate(&self.objects);
        let assigned = match &mut self.kept_vips {
            Some(kept) => kept.assign(&hosts, &reserved),
            None => vip::assign(&hosts, &reserved),
        };
        for (key, entry) in &self.objects.service_entries {
            let moved = entry.hosts.iter().any(|host| {
                let host =
                    NamespacedHostname { namespace: key.namespace.clone(), hostname: host.clone() };
                assigned.get(&host) != self.vips.get(&host)
            });
            if moved {
                dirty.services.insert(ServiceSource::ServiceEntry(key.clone()));
            }
        }
        self.vips = assigned;
    }

    fn settle_services(&mut self, sources: BTreeSet<ServiceSource>, delta: &mut Delta) {
        let mut touched: BTreeSet<Arc<str>> = BTreeSet::new();
        for source in sources {
            for host in self.hosts_of.remove(&source).unwrap_or_default() {
                if let Some(definitions) = self.hosts.get_mut(&host) {
                    definitions.remove(&source);
                }
                touched.insert(host);
            }
            let Some(rank) = services::rank(&source, &self.objects) else { continue };
            let defined = services::services_of(&source, &self.objects, &self.vips, &self.settings);
            for service in defined {
                let host = service.key.hostname.clone();
                self.hosts.entry(host.clone()).or_default().insert(rank.clone(), service);
                self.hosts_of.entry(source.clone()).or_default().insert(host.clone());
                touched.insert(host);
            }
        }
        // Removals are found by comparing each touched host's winners with what was sent for it.
        let mut winners: BTreeMap<(Arc<str>, Arc<str>), Service> = BTreeMap::new();
        for host in &touched {
            if let Some(definitions) = self.hosts.get(host) {
                for service in definitions.winners() {
                    winners.insert((host.clone(), service.key.namespace.clone()), service);
                }
                if definitions.is_empty() {
                    self.hosts.remove(host);
                }
            }
            let sent: Vec<_> = self
                .services
                .range((host.clone(), "".into())..)
                .take_while(|((at, _), _)| at == host)
                .map(|(key, _)| key.clone())
                .collect();
            for key in sent.into_iter().filter(|key| !winners.contains_key(key)) {
                if let Some(old) = self.services.remove(&key) {
                    delta.removed_services.push(old.key.clone());
                }
            }
        }
        for (key, service) in winners {
            if self.services.get(&key).is_none_or(|old| **old != service) {
                let service = Arc::new(service);
                delta.services.push(Arc::clone(&service));
                self.services.insert(key, service);
            }
        }
    }

    fn settle_workloads(&mut self, sources: BTreeSet<WorkloadSource>, delta: &mut Delta) {
        for source in sources {
            let (mut workloads, pod) = self.compute(&source);
            for workload in &mut workloads {
                workload.network_gateway = workloads::network_gateway(self.view(), workload);
            }
            self.settle_pod(&source, pod, delta);
            let uids: Vec<WorkloadUid> =
                workloads.iter().map(|workload| workload.uid.clone()).collect();
            for old in self.workloads_of.remove(&source).unwrap_or_default() {
                if !uids.contains(&old) && self.workloads.remove(&old).is_some() {
                    delta.removed_workloads.push(old);
                }
            }
            for workload in workloads {
                if self.workloads.get(&workload.uid).is_none_or(|old| **old != workload) {
                    let workload = Arc::new(workload);
                    delta.workloads.push(Arc::clone(&workload));
                    self.workloads.insert(workload.uid.clone(), workload);
                }
            }
            if !uids.is_empty() {
                self.workloads_of.insert(source, uids);
            }
        }
    }

    fn compute(&mut self, source: &WorkloadSource) -> (Vec<Workload>, Option<PodSettings>) {
        let view = View { objects: &self.objects, settings: &self.settings };
        match source {
            WorkloadSource::Pod(key) => {
                let Some(pod) = self.objects.pods.get(key) else {
                    self.enrolment.forget(source);
                    return (Vec::new(), None);
                };
                let ambient = pods::is_ambient_pod(view, pod);
                let hbone = self.enrolment.is_hbone(source, &pod.meta.uid, &pod.node, ambient);
                let workload = workloads::of_pod(view, key, pod, hbone);
                (workload.into_iter().collect(), pods::of_pod(view, key, pod, ambient))
            }
            WorkloadSource::WorkloadEntry(key) => {
                let Some(entry) = self.objects.workload_entries.get(key) else {
                    self.enrolment.forget(source);
                    return (Vec::new(), None);
                };
                let ambient = pods::is_ambient_entry(view, entry);
                let hbone = self.enrolment.is_hbone(source, &entry.meta.uid, &entry.node, ambient);
                let workload = workloads::of_workload_entry(view, key, hbone);
                (workload.into_iter().collect(), pods::of_entry(view, key, entry, ambient))
            }
            WorkloadSource::Slice(key) => (workloads::of_slice(view, key), None),
            WorkloadSource::ServiceEntry(key) => (workloads::of_service_entry(view, key), None),
        }
    }

    fn settle_pod(&mut self, source: &WorkloadSource, pod: Option<PodSettings>, delta: &mut Delta) {
        let uid = match source {
            WorkloadSource::Pod(key) => workloads::pod_uid(key, &self.settings),
            WorkloadSource::WorkloadEntry(key) => workloads::entry_uid(key, &self.settings),
            WorkloadSource::Slice(_) | WorkloadSource::ServiceEntry(_) => return,
        };
        match pod {
            None => {
                if self.pods.remove(&uid).is_some() {
                    delta.removed_pods.push(uid);
                }
            }
            Some(pod) => {
                if self.pods.get(&uid).is_none_or(|old| **old != pod) {
                    let pod = Arc::new(pod);
                    delta.pods.push(Arc::clone(&pod));
                    self.pods.insert(uid, pod);
                }
            }
        }
    }

    fn settle_policies(&mut self, sources: BTreeSet<PolicySource>, delta: &mut Delta) {
        for source in sources {
            let policies = policies::policies_of(self.view(), &source);
            let names = policies::names(&policies);
            let table_key = |name: &PolicyName| (name.namespace.clone(), name.name.clone());
            for old in self.policies_of.remove(&source).unwrap_or_default() {
                if !names.contains(&old) && self.policies.remove(&table_key(&old)).is_some() {
                    delta.removed_policies.push(old);
                }
            }
            for policy in policies {
                let key = table_key(&policy.name);
                if self.policies.get(&key).is_none_or(|old| **old != policy) {
                    let policy = Arc::new(policy);
                    delta.policies.push(Arc::clone(&policy));
                    self.policies.insert(key, policy);
                }
            }
            if !names.is_empty() {
                self.policies_of.insert(source, names);
            }
        }
    }
}

#[cfg(test)]
mod tests;

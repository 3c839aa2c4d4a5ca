//! What is published, encoded once, and which node sees what.
//!
//! Writers replace resources and append their names to a log with a bound. A stream remembers how far it has read: it
//! takes the names since then and looks up what they are *now*. So a slow agent costs no queue, only skips what it
//! missed, and one that falls out of the log compares everything.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mesh_authorize::{Policy, PolicyScope};
use mesh_model::Workload;
use mesh_route::FrontendName;
use mesh_wire::pb::discovery::DeltaDiscoveryResponse;
use mesh_wire::{
    DeltaServerState, MeshConfig, NodeView, PodConfig, Published, Resource, ResourceKind,
};
use tokio::sync::watch;

use crate::index::{Delta, Frontend, PodMode, PodSettings};

/// Names the log holds at least. Beyond that it holds as many as there are resources: an agent that is further behind compares
/// everything once, which costs no more than a longer log would, and thousands of resources that have gone leave nothing behind.
const MIN_LOG: usize = 256;

/// Kind and name of a resource.
pub type Name = (ResourceKind, Arc<str>);

/// How far a stream has read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position(u64);

/// What changed since a [`Position`].
#[derive(Debug, PartialEq, Eq)]
pub enum Since {
    /// These, in order of kind.
    Names(BTreeSet<Name>),
    /// More than the log holds.
    Everything,
}

/// Who sees a resource.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Audience {
    Everyone,
    Node(Arc<str>),
    /// Nodes with a pod of the namespace.
    Namespace(Arc<str>),
    /// Nodes with a workload, and waypoints with a frontend, that lists the policy.
    Listed,
    /// Waypoints with a frontend that lists the RequestAuthentication.
    Authenticating,
    /// These waypoints.
    Waypoints(BTreeSet<Arc<str>>),
}

#[derive(Debug)]
struct Entry {
    published: Arc<Published>,
    audience: Audience,
}

/// How many workloads and pods of a node need something.
type Needs = BTreeMap<Arc<str>, BTreeMap<Arc<str>, usize>>;

#[derive(Debug, Default)]
struct Inner {
    entries: BTreeMap<Name, Entry>,
    log: VecDeque<Name>,
    /// Position of the log's end.
    end: u64,
    workloads: BTreeMap<Arc<str>, Arc<Workload>>,
    pods: BTreeMap<Arc<str>, Arc<PodSettings>>,
    frontends: BTreeMap<FrontendName, Arc<Frontend>>,
    namespaces: Needs,
    listed: Needs,
    authenticating: Needs,
}

/// The published resources.
#[derive(Debug)]
pub struct Store {
    inner: Mutex<Inner>,
    end: watch::Sender<Position>,
}

impl Default for Store {
    fn default() -> Self {
        Self { inner: Mutex::default(), end: watch::Sender::new(Position::default()) }
    }
}

impl Store {
    /// Publishes what the index changed; returns how many resources are different.
    pub fn apply(&self, delta: &Delta) -> usize {
        let mut inner = self.lock();
        let before = inner.end;
        for policy in &delta.policies {
            let audience = match policy.scope {
                PolicyScope::Global => Audience::Everyone,
                PolicyScope::Namespace => Audience::Namespace(policy.name.namespace.clone()),
                PolicyScope::Workload => Audience::Listed,
            };
            inner.put(&Resource::Policy(Policy::clone(policy)), audience);
        }
        for service in &delta.services {
            inner.put(&Resource::Service(service.as_ref().clone()), Audience::Everyone);
        }
        for pod in &delta.pods {
            let uid: Arc<str> = pod.uid.as_str().into();
            let old = inner.pods.insert(uid, Arc::clone(pod));
            inner.need_namespace(&pod.node, &pod.key.namespace, true);
            if let Some(old) = old {
                inner.need_namespace(&old.node, &old.key.namespace, false);
            }
            inner.put(&Resource::Pod(pod_config(pod)), Audience::Node(pod.node.clone()));
        }
        for workload in &delta.workloads {
            let uid: Arc<str> = workload.uid.as_str().into();
            let old = inner.workloads.insert(uid, Arc::clone(workload));
            inner.need(workload, true);
            if let Some(old) = old {
                inner.need(&old, false);
            }
            inner.put(&Resource::Workload(workload.as_ref().clone()), Audience::Everyone);
        }
        for frontend in &delta.frontends {
            let name = frontend.config.frontend.clone();
            let old = inner.frontends.insert(name, Arc::clone(frontend));
            inner.need_frontend(frontend, true);
            if let Some(old) = old {
                inner.need_frontend(&old, false);
            }
            let audience = Audience::Waypoints(frontend.waypoints.clone());
            inner.put(&Resource::Frontend(frontend.config.clone()), audience);
        }
        for route in &delta.routes {
            let audience = Audience::Waypoints(route.waypoints.clone());
            inner.put(&Resource::Route(Box::new(route.route.clone())), audience);
        }
        for one in &delta.authentications {
            let resource = Resource::Authentication(Box::new(one.as_ref().clone()));
            inner.put(&resource, Audience::Authenticating);
        }
        for name in &delta.removed_frontends {
            if let Some(old) = inner.frontends.remove(name) {
                inner.need_frontend(&old, false);
                let resource = Resource::Frontend(old.config.clone()).name();
                inner.remove((ResourceKind::Frontend, resource.into()));
            }
        }
        for name in &delta.removed_routes {
            inner.remove((ResourceKind::Route, name.to_string().into()));
        }
        for uid in &delta.removed_workloads {
            if let Some(old) = inner.workloads.remove(uid.as_str()) {
                inner.need(&old, false);
            }
            inner.remove((ResourceKind::Address, uid.as_str().into()));
        }
        for uid in &delta.removed_pods {
            if let Some(old) = inner.pods.remove(uid.as_str()) {
                inner.need_namespace(&old.node, &old.key.namespace, false);
            }
            inner.remove((ResourceKind::Pod, uid.as_str().into()));
        }
        for key in &delta.removed_services {
            inner.remove((ResourceKind::Address, key.to_string().into()));
        }
        for name in &delta.removed_policies {
            inner.remove((ResourceKind::Authorization, name.to_string().into()));
        }
        for name in &delta.removed_authentications {
            inner.remove((ResourceKind::Authentication, Arc::clone(name)));
        }
        self.wake(&inner, before)
    }

    /// Publishes the settings of the mesh.
    pub fn set_mesh(&self, config: MeshConfig) {
        let mut inner = self.lock();
        let before = inner.end;
        inner.put(&Resource::Mesh(config), Audience::Everyone);
        self.wake(&inner, before);
    }

    /// Follows the end of the log.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<Position> {
        self.end.subscribe()
    }

    /// What changed after `position`, and the position that has been read then.
    #[must_use]
    pub fn since(&self, position: Position) -> (Since, Position) {
        let inner = self.lock();
        let end = Position(inner.end);
        let behind = usize::try_from(inner.end.saturating_sub(position.0)).unwrap_or(usize::MAX);
        if behind > inner.log.len() {
            return (Since::Everything, end);
        }
        let names = inner.log.range(inner.log.len() - behind..).cloned().collect();
        (Since::Names(names), end)
    }

    /// Marks in `state` what changed since `position`; returns the position that has been read then.
    pub fn mark(&self, position: Position, state: &mut DeltaServerState) -> Position {
        let (since, end) = self.since(position);
        match since {
            Since::Everything => {
                ResourceKind::ALL.into_iter().for_each(|kind| state.changed_everything(kind))
            }
            Since::Names(names) => {
                for kind in ResourceKind::ALL {
                    state.changed(
                        kind,
                        names.iter().filter(|(of, _)| *of == kind).map(|(_, name)| name),
                    );
                }
            }
        }
        end
    }

    /// The next response for the agent of `node`, if one is due.
    pub fn poll(&self, node: &str, state: &mut DeltaServerState) -> Option<DeltaDiscoveryResponse> {
        let inner = self.lock();
        state.poll_response(&View { inner: &inner, node })
    }

    /// Resources published, by kind.
    #[must_use]
    pub fn counts(&self) -> BTreeMap<ResourceKind, usize> {
        let mut counts = BTreeMap::new();
        for (kind, _) in self.lock().entries.keys() {
            *counts.entry(*kind).or_default() += 1;
        }
        counts
    }

    fn wake(&self, inner: &Inner, before: u64) -> usize {
        if inner.end != before {
            self.end.send_replace(Position(inner.end));
        }
        usize::try_from(inner.end - before).unwrap_or(usize::MAX)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Each change leaves the tables whole before anything could panic.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What one node sees, while the store is locked.
struct View<'v> {
    inner: &'v Inner,
    node: &'v str,
}

impl NodeView for View<'_> {
    fn get(&self, kind: ResourceKind, name: &str) -> Option<&Published> {
        let name = (kind, Arc::from(name));
        let entry = self.inner.entries.get(&name)?;
        self.inner.sees(self.node, &name, &entry.audience).then_some(&*entry.published)
    }

    fn for_each(&self, kind: ResourceKind, show: &mut dyn FnMut(&Published)) {
        let of_kind = self
            .inner
            .entries
            .range((kind, Arc::from(""))..)
            .take_while(|((at, _), _)| *at == kind);
        for (name, entry) in of_kind {
            if self.inner.sees(self.node, name, &entry.audience) {
                show(&entry.published);
            }
        }
    }
}

impl Inner {
    fn put(&mut self, resource: &Resource, audience: Audience) {
        let published = Arc::new(Published::new(resource));
        let name = (published.kind(), published.name().clone());
        let same = self.entries.get(&name).is_some_and(|old| {
            old.published.version() == published.version() && old.audience == audience
        });
        if !same {
            self.entries.insert(name.clone(), Entry { published, audience });
            self.note(name);
        }
    }

    fn remove(&mut self, name: Name) {
        // The log shares the entry's own name: a gone resource costs no second one.
        if let Some((name, _)) = self.entries.remove_entry(&name) {
            self.note(name);
        }
    }

    fn note(&mut self, name: Name) {
        self.log.push_back(name);
        self.end += 1;
        let most = self.entries.len().max(MIN_LOG);
        self.log.drain(..self.log.len().saturating_sub(most));
        if self.log.capacity() / 4 > most {
            self.log.shrink_to(most);
        }
    }

    fn sees(&self, node: &str, name: &Name, audience: &Audience) -> bool {
        match audience {
            Audience::Everyone => true,
            Audience::Node(at) => **at == *node,
            Audience::Namespace(namespace) => {
                self.namespaces.get(node).is_some_and(|needs| needs.contains_key(namespace))
            }
            Audience::Listed => {
                self.listed.get(node).is_some_and(|needs| needs.contains_key(&name.1))
            }
            Audience::Authenticating => {
                self.authenticating.get(node).is_some_and(|needs| needs.contains_key(&name.1))
            }
            Audience::Waypoints(waypoints) => waypoints.contains(node),
        }
    }

    fn need(&mut self, workload: &Workload, more: bool) {
        if workload.node.is_empty() {
            return;
        }
        self.need_namespace(&workload.node, &workload.namespace, more);
        for policy in &workload.authorization_policies {
            if count(&mut self.listed, &workload.node, policy, more) {
                self.note((ResourceKind::Authorization, policy.clone()));
            }
        }
    }

    fn need_frontend(&mut self, frontend: &Frontend, more: bool) {
        for waypoint in &frontend.waypoints {
            for policy in &frontend.config.policies {
                if count(&mut self.listed, waypoint, policy, more) {
                    self.note((ResourceKind::Authorization, policy.clone()));
                }
            }
            let config = &frontend.config;
            for one in config.authentications.iter().chain(&config.workload_authentications) {
                if count(&mut self.authenticating, waypoint, one, more) {
                    self.note((ResourceKind::Authentication, one.clone()));
                }
            }
        }
    }

    fn need_namespace(&mut self, node: &Arc<str>, namespace: &Arc<str>, more: bool) {
        if !count(&mut self.namespaces, node, namespace, more) {
            return;
        }
        let policies: Vec<Name> = self
            .entries
            .range((ResourceKind::Authorization, Arc::from(""))..)
            .take_while(|((kind, _), _)| *kind == ResourceKind::Authorization)
            .filter(|(_, entry)| entry.audience == Audience::Namespace(namespace.clone()))
            .map(|(name, _)| name.clone())
            .collect();
        for policy in policies {
            self.note(policy);
        }
    }
}

/// Counts one more or one less; true when that makes the node need it, or need it no longer.
fn count(needs: &mut Needs, node: &Arc<str>, what: &Arc<str>, more: bool) -> bool {
    let of_node = needs.entry(node.clone()).or_default();
    let uses = of_node.entry(what.clone()).or_default();
    if more {
        *uses += 1;
        return *uses == 1;
    }
    *uses = uses.saturating_sub(1);
    if *uses > 0 {
        return false;
    }
    of_node.remove(what);
    if of_node.is_empty() {
        needs.remove(node);
    }
    true
}

fn pod_config(pod: &PodSettings) -> PodConfig {
    let capture = &pod.capture;
    PodConfig {
        uid: pod.uid.clone(),
        namespace: pod.key.namespace.clone(),
        name: pod.key.name.clone(),
        service_account: pod.service_account.clone(),
        pod_uid: pod.pod_uid.clone(),
        mode: match pod.mode {
            PodMode::None => mesh_wire::PodMode::None,
            PodMode::Ambient => mesh_wire::PodMode::Ambient,
        },
        probe_ports: pod.probe_ports.clone(),
        dns_capture: capture.dns_capture,
        outbound: mesh_wire::TrafficFilter {
            include_ports: capture.include_outbound_ports.iter().copied().collect(),
            exclude_ports: capture.exclude_outbound_ports.iter().copied().collect(),
            include_cidrs: capture.include_outbound_cidrs.clone(),
            exclude_cidrs: capture.exclude_outbound_cidrs.clone(),
        },
        inbound: mesh_wire::TrafficFilter {
            include_ports: capture.include_inbound_ports.iter().copied().collect(),
            exclude_ports: capture.exclude_inbound_ports.iter().copied().collect(),
            include_cidrs: capture.include_inbound_cidrs.clone(),
            exclude_cidrs: capture.exclude_inbound_cidrs.clone(),
        },
        bypass_inbound: capture.bypass_inbound,
        tunnel_same_node: pod.tunnel_same_node,
    }
}

//! Everything the controller has said, as it is in force.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use mesh_authorize::{MissingPolicy, PolicyName, PolicySet};
use mesh_enroll::PodName;
use mesh_identity::{InvalidBundle, TrustBundle};
use mesh_model::{NamespacedHostname, WorkloadUid};
use mesh_resolve::{IndexDelta, WorkloadIndex};
use mesh_telemetry::metric;
use mesh_wire::{MeshConfig, PodConfig, RemovedResource, Resource, ResourceKind, Update};

use crate::control::pods::{self, Denied, WantedPods};
use crate::dataplane::Changed;
use crate::enrolment::enroller::WantedPod;
use crate::error::error_chain;

/// The controller's words. Held by the one task that hears them.
#[derive(Debug)]
pub(crate) struct World {
    denied: Denied,
    /// Workloads and services.
    pub(crate) index: WorkloadIndex,
    /// The policies as compiled.
    pub(crate) policies: PolicySet,
    /// Whom to trust; of the last settings that were usable.
    pub(crate) trust: Option<Arc<TrustBundle>>,
    /// The roots of it, PEM.
    pub(crate) roots: Option<Arc<str>>,
    /// Settings of the mesh.
    pub(crate) mesh: Option<MeshConfig>,
    pods: BTreeMap<WorkloadUid, (PodConfig, Option<(PodName, WantedPod)>)>,
    /// Namespaces whose egress has been set.
    egress_set: BTreeSet<Arc<str>>,
}

/// What an update touched.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Touched {
    /// Parts of the data plane's picture.
    pub(crate) picture: Option<Changed>,
    /// Settings of pods.
    pub(crate) pods: bool,
}

impl World {
    /// Nothing was said yet.
    pub(crate) fn new(denied: Denied, missing: MissingPolicy) -> Self {
        let mut policies = PolicySet::default();
        policies.set_missing(missing);
        Self {
            denied,
            index: WorkloadIndex::default(),
            policies,
            trust: None,
            roots: None,
            mesh: None,
            pods: BTreeMap::new(),
            egress_set: BTreeSet::new(),
        }
    }

    /// Applies one response, all at once.
    pub(crate) fn apply(&mut self, update: Update) -> Touched {
        for rejected in &update.rejected {
            metrics::counter!(metric::RESOURCES_REJECTED.name, "type" => kind_name(update.kind))
                .increment(1);
            tracing::warn!(
                resource = rejected.name, error = %rejected.error,
                remedy = rejected.error.problem.remedy(), "the controller sent a resource that cannot be used"
            );
        }
        let mut touched = Touched::default();
        let mut delta = IndexDelta::default();
        for removed in update.removed {
            match removed {
                // Settings that go away leave the last ones in force: nobody would be trusted otherwise.
                RemovedResource::Mesh => {
                    tracing::warn!("the controller withdrew the mesh's settings")
                }
                RemovedResource::Pod(uid) => {
                    touched.pods |= self.pods.remove(&uid).is_some();
                }
                RemovedResource::Policy(name) => {
                    self.policies.remove(&name);
                    touched.add(Changed::POLICIES);
                }
                RemovedResource::Workload(uid) => delta.removed_workloads.push(uid),
                RemovedResource::Service(key) => delta.removed_services.push(key),
                // Only waypoints ask for these.
                RemovedResource::Frontend(_)
                | RemovedResource::Route(_)
                | RemovedResource::Authentication(_) => {}
            }
        }
        for unreadable in update.unreadable {
            tracing::error!(
                policy = %unreadable.name, scope = ?unreadable.scope, error = %unreadable.reason,
                "a policy cannot be read; what it could apply to is refused until the controller replaces or removes it"
            );
            self.policies.set_unreadable(unreadable);
            touched.add(Changed::POLICIES);
        }
        for resource in update.resources {
            match resource {
                Resource::Mesh(config) => self.apply_mesh(config, &mut touched),
                Resource::Pod(config) => {
                    touched.pods = true;
                    self.apply_pod(config);
                }
                Resource::Policy(policy) => {
                    self.policies.upsert(policy);
                    touched.add(Changed::POLICIES);
                }
                Resource::Workload(workload) => delta.workloads.push(workload),
                Resource::Service(service) => delta.services.push(service),
                Resource::Frontend(_) | Resource::Route(_) | Resource::Authentication(_) => {}
            }
        }
        if touched.pods {
            self.refresh_egress(&mut touched);
        }
        let is_empty = delta.workloads.is_empty()
            && delta.removed_workloads.is_empty()
            && delta.services.is_empty()
            && delta.removed_services.is_empty();
        if !is_empty {
            self.index.apply(delta);
            touched.add(Changed::INDEX);
        }
        touched
    }

    /// The pods of this node that the controller has spoken of.
    pub(crate) fn wanted_pods(&self, known: bool) -> WantedPods {
        let pods = self.pods.values().filter_map(|(_, wanted)| wanted.clone()).collect();
        WantedPods { known, pods }
    }

    /// A resource in force, for the node's disk.
    pub(crate) fn find(&self, kind: ResourceKind, name: &str) -> Option<Resource> {
        let pair = || name.split_once('/');
        match kind {
            ResourceKind::Mesh => self.mesh.clone().map(Resource::Mesh),
            ResourceKind::Pod => {
                let (config, _) = self.pods.get(&WorkloadUid::new(name))?;
                Some(Resource::Pod(config.clone()))
            }
            ResourceKind::Authorization => {
                let (namespace, name) = pair()?;
                let policy = self.policies.policy(&PolicyName::new(namespace, name));
                policy.cloned().map(Resource::Policy)
            }
            ResourceKind::Address => {
                if let Some(workload) = self.index.workload(&WorkloadUid::new(name)) {
                    return Some(Resource::Workload((**workload).clone()));
                }
                let (namespace, hostname) = pair()?;
                let key = NamespacedHostname::new(namespace, hostname);
                self.index.service(&key).map(|service| Resource::Service((**service).clone()))
            }
            ResourceKind::Frontend | ResourceKind::Route | ResourceKind::Authentication => None,
        }
    }

    fn apply_mesh(&mut self, config: MeshConfig, touched: &mut Touched) {
        match self.trust_of(&config) {
            Ok(trust) => {
                self.roots = Some(Arc::clone(&config.root_pem));
                if self.trust.as_deref() != Some(&trust) {
                    self.trust = Some(Arc::new(trust));
                    touched.add(Changed::TRUST);
                }
            }
            Err(error) => {
                metrics::counter!(metric::RESOURCES_REJECTED.name, "type" => "mesh").increment(1);
                tracing::error!(
                    error = %error_chain(&error),
                    "roots or revocation lists from the controller cannot be used; the last ones stay in force"
                );
            }
        }
        self.mesh = Some(config);
        self.refresh_egress(touched);
    }

    /// Applies what may be dialled outside the mesh to every namespace that is listed or has pods on this node.
    fn refresh_egress(&mut self, touched: &mut Touched) {
        let Some(mesh) = &self.mesh else { return };
        let of_pods = self.pods.values().map(|(config, _)| &config.namespace);
        let namespaces: BTreeSet<&Arc<str>> =
            mesh.unknown_egress.keys().chain(of_pods).chain(&self.egress_set).collect();
        let before = self.policies.revision();
        for namespace in &namespaces {
            let egress = mesh.unknown_egress.get(*namespace).copied();
            self.policies.set_egress(namespace, egress.unwrap_or(mesh.default_unknown_egress));
        }
        self.policies.set_pod_networks(&mesh.pod_networks);
        let namespaces = namespaces.into_iter().cloned().collect();
        self.egress_set = namespaces;
        if self.policies.revision() != before {
            touched.add(Changed::POLICIES);
        }
    }

    fn trust_of(&self, config: &MeshConfig) -> Result<TrustBundle, InvalidBundle> {
        TrustBundle::from_pem(&config.trust_domain, &config.root_pem, &config.crl_pem)
    }

    fn apply_pod(&mut self, config: PodConfig) {
        let wanted = match pods::wanted(&config, self.denied) {
            Ok(wanted) => Some(wanted),
            Err(error) => {
                metrics::counter!(metric::RESOURCES_REJECTED.name, "type" => "pod").increment(1);
                tracing::warn!(
                    pod = %config.uid, error = %error_chain(&error),
                    "the controller's settings of a pod cannot be applied; the last ones stay in force"
                );
                self.pods.get(&config.uid).and_then(|(_, before)| before.clone())
            }
        };
        self.pods.insert(config.uid.clone(), (config, wanted));
    }
}

impl Touched {
    /// True when nothing was.
    pub(crate) const fn is_nothing(self) -> bool {
        self.picture.is_none() && !self.pods
    }

    /// Adds a part of the picture.
    pub(crate) fn add(&mut self, part: Changed) {
        self.picture = Some(self.picture.map_or(part, |picture| picture.and(part)));
    }
}

/// A kind as a label.
pub(crate) const fn kind_name(kind: ResourceKind) -> &'static str {
    match kind {
        ResourceKind::Mesh => "mesh",
        ResourceKind::Pod => "pod",
        ResourceKind::Authorization => "authorization",
        ResourceKind::Address => "address",
        ResourceKind::Frontend => "frontend",
        ResourceKind::Route => "route",
        ResourceKind::Authentication => "authentication",
    }
}

#[cfg(test)]
mod tests {
    use mesh_wire::DeltaClientState;
    use mesh_wire::pb::discovery;

    use super::*;

    fn policies(names: &[&str], removed: &[&str]) -> discovery::DeltaDiscoveryResponse {
        let bad = |name: &&str| discovery::Resource { name: (*name).into(), ..Default::default() };
        discovery::DeltaDiscoveryResponse {
            type_url: ResourceKind::Authorization.type_url().into(),
            resources: names.iter().map(bad).collect(),
            removed_resources: removed.iter().map(|name| (*name).into()).collect(),
            ..Default::default()
        }
    }

    #[test]
    fn a_policy_that_cannot_be_read_is_in_force_as_a_refusal() {
        let mut world = World::new(Denied::default(), MissingPolicy::Deny);
        let mut client = DeltaClientState::new(&ResourceKind::AGENT);
        let (update, _) = client.handle(policies(&["shop/p"], &[])).unwrap();
        let touched = world.apply(update);
        assert_eq!(touched.picture, Some(Changed::POLICIES));
        let marked: Vec<_> = world.policies.unreadable().map(|one| one.name.to_string()).collect();
        assert_eq!(marked, ["shop/p"]);
        let (update, _) = client.handle(policies(&[], &["shop/p"])).unwrap();
        assert_eq!(world.apply(update).picture, Some(Changed::POLICIES));
        assert_eq!(world.policies.unreadable().len(), 0);
    }
}

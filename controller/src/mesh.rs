//! The mesh as the controller knows it: the index, what is published of it, and the picture `explain` looks at. All are
//! changed together, under one lock, so that they never tell different stories.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use imbl::OrdMap;
use mesh_authorize::{Policy, PolicySet};
use mesh_model::{SpiffeId, WorkloadUid};
use mesh_resolve::{IndexDelta, WorkloadIndex};
use mesh_route::{FrontendName, FrontendPort, RouteChange, RouteTable};
use mesh_telemetry::metric;
use mesh_wire::MeshConfig;
use serde::Serialize;
use tokio::sync::watch;

use crate::ca::revocations::RevocationStatus;
use crate::cluster::conditions::PolicyReport;
use crate::index::{
    Captured, Delta, Frontend, Index, IndexSettings, NodeReport, PodSettings, PolicyStatus,
    RouteStatus,
};
use crate::manifest::ObjectKey;
use crate::publish::Store;
use crate::source::{Change, Refusal, SourceEvent, SourceStatus};

/// What proves identities: PEM, as agents receive it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trust {
    /// Roots; several while one replaces another.
    pub root_pem: String,
    /// Revocation lists; may be empty.
    pub crl_pem: String,
    /// How the operator's lists among them stand; none without.
    pub revocations: Option<RevocationStatus>,
}

/// Most warnings beside an answer.
const MAX_WARNINGS: usize = 8;

/// A snapshot for [`explain`](crate::explain).
#[derive(Clone, Debug, Default)]
pub struct Picture {
    /// Workloads and services.
    pub index: WorkloadIndex,
    /// Policies.
    pub policies: PolicySet,
    /// What agents say they capture.
    pub captured: Captured,
    /// What is captured of each pod, by its workload.
    pub pods: OrdMap<WorkloadUid, Arc<PodSettings>>,
    /// What waypoints serve.
    pub frontends: BTreeMap<FrontendName, Arc<Frontend>>,
    /// The routes at them.
    pub routes: RouteTable,
    /// What tokens count, by `namespace/name`.
    pub authentications: BTreeMap<Arc<str>, Arc<mesh_jwt::Rules>>,
}

/// The mesh.
#[derive(Debug)]
pub struct Mesh {
    state: Mutex<State>,
    store: Store,
    synced: watch::Sender<bool>,
    revision: AtomicU64,
}

#[derive(Debug)]
struct State {
    index: Index,
    picture: Picture,
    trust: Trust,
    source: SourceStatus,
}

/// What an operator should know.
#[derive(Debug, Serialize)]
pub struct Status {
    /// Everything that existed at the start has been read.
    pub synced: bool,
    /// What the source could not use.
    pub source: SourceStatus,
    /// How the operator's revocation lists stand; none without `--crl-file`.
    pub revocations: Option<RevocationStatus>,
    /// How each policy object is enforced.
    pub policies: BTreeMap<String, PolicyStatus>,
    /// What becomes of each route.
    pub routes: BTreeMap<String, RouteStatus>,
    /// Objects that do something else than their author may think.
    pub notes: Vec<(String, String)>,
}

impl Mesh {
    /// An empty mesh.
    #[must_use]
    pub fn new(settings: IndexSettings) -> Self {
        let index = Index::new(settings);
        let mut picture = Picture::default();
        picture.policies.set_pod_networks(index.pod_networks());
        let state =
            State { index, picture, trust: Trust::default(), source: SourceStatus::default() };
        Self {
            state: Mutex::new(state),
            store: Store::default(),
            synced: watch::Sender::new(false),
            revision: AtomicU64::new(0),
        }
    }

    /// What is published.
    #[must_use]
    pub const fn store(&self) -> &Store {
        &self.store
    }

    /// Takes in what a source tells.
    pub fn source_event(&self, event: SourceEvent) {
        self.revision.fetch_add(1, Ordering::Relaxed);
        match event {
            SourceEvent::Changes(changes) => self.apply(changes),
            SourceEvent::Status(status) => {
                metrics::gauge!(metric::CONTROLLER_OBJECTS.name).set(count(status.objects));
                metrics::gauge!(metric::CONTROLLER_KEPT.name).set(count(status.kept));
                metrics::gauge!(metric::CONTROLLER_SOURCE_MISSING.name)
                    .set(count(usize::from(status.missing.is_some())));
                let mut state = self.lock();
                count_refused(&state.source, &status);
                state.source = status;
            }
            SourceEvent::Synced => {
                self.synced.send_replace(true);
            }
        }
    }

    /// Applies object changes.
    pub fn apply(&self, changes: Vec<Change>) {
        let mut state = self.lock();
        let delta = state.index.apply(changes);
        self.take(&mut state, delta);
    }

    /// Takes in what an agent tells about its node.
    pub fn report(&self, node: &str, report: NodeReport) {
        let mut state = self.lock();
        let delta = state.index.report(node, report);
        self.take(&mut state, delta);
    }

    /// Replaces what proves identities.
    pub fn set_trust(&self, trust: Trust) {
        let mut state = self.lock();
        if state.trust != trust {
            state.trust = trust;
            self.publish_mesh(&state);
        }
    }

    /// True when an identity's workload runs on a node.
    #[must_use]
    pub fn runs_on(&self, node: &str, identity: &SpiffeId) -> bool {
        self.lock().index.runs_on(node, identity)
    }

    /// True once everything that existed at the start has been read.
    #[must_use]
    pub fn is_synced(&self) -> bool {
        *self.synced.borrow()
    }

    /// Waits for [`is_synced`](Self::is_synced). Before that an agent must be told nothing: what is not read yet would look
    /// as if it were gone.
    pub async fn synced(&self) {
        // The sender lives as long as `self`, so waiting cannot fail.
        if self.synced.subscribe().wait_for(|synced| *synced).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// A snapshot of workloads, services and policies.
    #[must_use]
    pub fn picture(&self) -> Picture {
        let state = self.lock();
        Picture { captured: state.index.captured(), ..state.picture.clone() }
    }

    /// What a reader of any answer about this mesh should know: what of it is not as its manifests say.
    #[must_use]
    pub fn warnings(&self) -> Vec<String> {
        let state = self.lock();
        let source = &state.source;
        let mut warnings = Vec::new();
        if let Some(problem) = &source.missing {
            warnings
                .push(format!("the manifests are gone ({problem}); everything stays as it was"));
        } else if source.kept > 0 {
            let named = source.kept_objects.iter().take(3).cloned().collect::<Vec<_>>().join(", ");
            warnings.push(format!(
                "{} in use in an earlier version, such as {named}",
                objects(source.kept)
            ));
        }
        for refusal in source.refused.iter().filter(|refusal| refusal.is_not_enforced()) {
            warnings.push(format!(
                "{}:{} is not enforced and may hold a policy: {}",
                refusal.file, refusal.line, refusal.problem
            ));
        }
        warnings.truncate(MAX_WARNINGS);
        warnings
    }

    /// What an operator should know.
    #[must_use]
    pub fn status(&self) -> Status {
        let state = self.lock();
        let policies = state
            .index
            .policy_status()
            .into_iter()
            .map(|(key, status)| (key.to_string(), status))
            .collect();
        Status {
            synced: self.is_synced(),
            source: state.source.clone(),
            revocations: state.trust.revocations.clone(),
            policies,
            routes: state
                .index
                .route_status()
                .map(|(name, status)| (name.to_string(), status.clone()))
                .collect(),
            notes: state.index.notes(|network, ip| {
                let holder = state.picture.index.workload_by_ip(network, ip)?;
                Some(holder.uid.clone())
            }),
        }
    }

    /// Remembers the addresses that are assigned to hosts of ServiceEntries, see [`Index::keep_addresses`].
    pub fn keep_addresses(&self, before: &str) {
        self.lock().index.keep_addresses(before);
    }

    /// Another number whenever objects or what is known of them may have changed.
    #[must_use]
    pub fn revision(&self) -> u64 {
        self.revision.load(Ordering::Relaxed)
    }

    /// How every policy object stands, for its status.
    pub(crate) fn policy_reports(&self) -> BTreeMap<ObjectKey, PolicyReport> {
        let state = self.lock();
        let mut reports: BTreeMap<ObjectKey, PolicyReport> = BTreeMap::new();
        for (key, status) in state.index.policy_status() {
            let generation = state.index.policy_generation(&key);
            let report = PolicyReport { generation, enforcement: Some(status), refusal: None };
            reports.insert(key, report);
        }
        for refusal in &state.source.refused {
            if let Some(key) = refusal.policy() {
                reports.entry(key).or_default().refusal = Some(refusal.clone());
            }
        }
        reports
    }

    /// Looks at the index.
    pub fn with_index<T>(&self, look: impl FnOnce(&Index) -> T) -> T {
        look(&self.lock().index)
    }

    fn take(&self, state: &mut State, delta: Delta) {
        if delta.is_empty() {
            return;
        }
        let State { index, picture, .. } = state;
        for name in &delta.removed_policies {
            picture.policies.remove(name);
        }
        for policy in &delta.policies {
            picture.policies.upsert(Policy::clone(policy));
        }
        let default = index.settings().unknown_egress;
        for (namespace, egress) in &delta.egress {
            picture.policies.set_egress(namespace, egress.unwrap_or(default));
        }
        for workload in &delta.workloads {
            let own = index.egress().get(&workload.namespace);
            picture.policies.set_egress(&workload.namespace, own.copied().unwrap_or(default));
        }
        if let Some(networks) = &delta.pod_networks {
            picture.policies.set_pod_networks(networks);
        }
        for uid in &delta.removed_pods {
            picture.pods.remove(uid);
        }
        for pod in &delta.pods {
            picture.pods.insert(pod.uid.clone(), Arc::clone(pod));
        }
        picture.index.apply(IndexDelta {
            workloads: delta.workloads.iter().map(|workload| workload.as_ref().clone()).collect(),
            removed_workloads: delta.removed_workloads.clone(),
            services: delta.services.iter().map(|service| service.as_ref().clone()).collect(),
            removed_services: delta.removed_services.clone(),
        });
        picture.take_l7(&delta);
        let changed = self.store.apply(&delta);
        metrics::counter!(metric::CONTROLLER_CHANGES.name).increment(changed as u64);
        if !delta.egress.is_empty() || delta.pod_networks.is_some() {
            self.publish_mesh(state);
        }
    }

    fn publish_mesh(&self, state: &State) {
        // Agents refuse settings without a root; there is one from the start, before the listener is.
        if state.trust.root_pem.is_empty() {
            return;
        }
        let settings = state.index.settings();
        self.store.set_mesh(MeshConfig {
            trust_domain: settings.trust_domain.clone(),
            root_pem: state.trust.root_pem.as_str().into(),
            crl_pem: state.trust.crl_pem.as_str().into(),
            unknown_egress: state.index.egress().clone(),
            default_unknown_egress: settings.unknown_egress,
            cluster_domain: settings.cluster_domain.clone(),
            pod_networks: state.index.pod_networks().to_vec(),
        });
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic in the index is a bug; what it had computed so far is still consistent enough to be served.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Picture {
    /// Takes over what waypoints are told.
    fn take_l7(&mut self, delta: &Delta) {
        for name in &delta.removed_authentications {
            self.authentications.remove(name);
        }
        for one in &delta.authentications {
            match mesh_jwt::Rules::new(one) {
                Ok(rules) => {
                    self.authentications.insert(Arc::clone(&rules.name), Arc::new(rules));
                }
                // What cannot be used was refused when the manifest was read.
                Err(error) => {
                    tracing::error!(error = %format!("{:#}", anyhow::Error::from(error)), "an accepted RequestAuthentication cannot be used")
                }
            }
        }
        let mut changes: Vec<RouteChange> = Vec::new();
        for name in &delta.removed_frontends {
            self.frontends.remove(name);
            changes.push(RouteChange::RemoveFrontend(name.clone()));
        }
        changes.extend(delta.removed_routes.iter().cloned().map(RouteChange::Remove));
        for frontend in &delta.frontends {
            let config = &frontend.config;
            let ports = config.ports.iter().map(|port| FrontendPort {
                port: port.port,
                section: (!port.name.is_empty()).then(|| port.name.clone()),
            });
            changes.push(RouteChange::Frontend(mesh_route::Frontend {
                name: config.frontend.clone(),
                ports: ports.collect(),
            }));
            self.frontends.insert(config.frontend.clone(), Arc::clone(frontend));
        }
        let routes = delta.routes.iter().map(|one| RouteChange::Upsert(one.route.clone()));
        changes.extend(routes);
        // What the table would refuse was refused when the manifest was read.
        for invalid in self.routes.apply(changes) {
            tracing::error!(error = %format!("{:#}", anyhow::Error::from(invalid)), "a route that was accepted cannot be used");
        }
    }
}

fn objects(number: usize) -> String {
    if number == 1 { "1 object is".to_owned() } else { format!("{number} objects are") }
}

/// Refused objects by kind. A kind of which nothing is refused any more goes to 0.
fn count_refused(before: &SourceStatus, now: &SourceStatus) {
    let kind = |refusal: &Refusal| refusal.kind.unwrap_or("unknown");
    let mut counts: BTreeMap<&str, usize> =
        before.refused.iter().map(|refusal| (kind(refusal), 0)).collect();
    for refusal in &now.refused {
        *counts.entry(kind(refusal)).or_default() += 1;
    }
    let denying = now.refused.iter().filter(|refusal| refusal.denied).count();
    metrics::gauge!(metric::CONTROLLER_DENYING.name).set(count(denying));
    for (kind, number) in counts {
        metrics::gauge!(metric::CONTROLLER_REFUSED.name, "kind" => kind.to_owned())
            .set(count(number));
    }
}

#[expect(clippy::cast_precision_loss, reason = "a gauge")]
fn count(number: usize) -> f64 {
    number as f64
}

/// A mesh shared by the controller's parts.
pub type SharedMesh = Arc<Mesh>;

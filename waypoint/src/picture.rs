//! What the controller has said, as requests see it: one snapshot, swapped whole.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use arc_swap::ArcSwap;
use mesh_authorize::PolicySet;
use mesh_identity::{InvalidBundle, Svid, TrustBundle, tls};
use mesh_jwt::{RequestAuthentication, Rules};
use mesh_model::{NamespacedHostname, NetworkId, Service, SpiffeId, Workload};
use mesh_resolve::{IndexDelta, ResolveSettings, WorkloadIndex};
use mesh_route::{
    Frontend, FrontendKind, FrontendName, FrontendPort, RouteChange, RouteTable, ServiceRef,
};
use mesh_telemetry::metric;
use mesh_wire::{
    AppProtocol, FrontendConfig, MeshConfig, RemovedResource, Resource, ResourceKind, Update,
};
use rustls::ServerConfig;
use tokio::sync::watch;

use crate::config::GatewayName;
use crate::keys::{KeyStore, RemoteKeys};

/// Everything a request is judged and routed by. A clone costs a few reference counts.
#[derive(Clone)]
pub(crate) struct Snapshot {
    /// Workloads and services.
    pub(crate) index: WorkloadIndex,
    /// Policies.
    pub(crate) policies: PolicySet,
    /// Routes.
    pub(crate) routes: RouteTable,
    frontends: imbl::OrdMap<FrontendName, Arc<Served>>,
    by_host: imbl::OrdMap<NamespacedHostname, Arc<Served>>,
    /// Of the waypoint itself: what holds for all it serves. None while nothing is known of its Gateway.
    gateway_policies: Option<Arc<[Arc<str>]>>,
    /// What tokens count, by `namespace/name`.
    pub(crate) authentications: imbl::OrdMap<Arc<str>, Arc<Authentication>>,
    /// Those that hold for workloads that are dialled themselves: of the waypoint's own namespace, and of others.
    workload_authentications: [Arc<[Arc<str>]>; 2],
    own_namespace: Arc<str>,
    /// Whom to trust.
    pub(crate) trust: Arc<TrustBundle>,
    /// What this waypoint proves to be.
    pub(crate) identity: Option<Identity>,
    cluster_domain: Arc<str>,
    /// Everything has been said once.
    pub(crate) synced: bool,
}

/// The waypoint's certificate, and what is made of it once.
#[derive(Clone)]
pub(crate) struct Identity {
    /// The certificate.
    pub(crate) svid: Arc<Svid>,
    /// Grows with every certificate and every change of trust: what was dialled under an older one dials anew.
    pub(crate) stamp: u64,
    /// For answering tunnels.
    pub(crate) server: Arc<ServerConfig>,
}

/// What the waypoint serves, ready for requests.
pub(crate) struct Served {
    /// As the controller says.
    pub(crate) config: FrontendConfig,
    /// The policies attached to it and to the waypoint.
    pub(crate) policies: Arc<[Arc<str>]>,
    /// The RequestAuthentications that hold at it.
    pub(crate) authentications: Arc<[Arc<str>]>,
}

/// A RequestAuthentication, ready for requests.
pub(crate) struct Authentication {
    pub(crate) rules: Rules,
    /// For each rule the keys that are not written in it.
    pub(crate) keys: Vec<Option<Arc<RemoteKeys>>>,
    source: RequestAuthentication,
}

impl Served {
    /// What is spoken at a port.
    pub(crate) fn protocol(&self, port: u16) -> AppProtocol {
        let found = self.config.ports.iter().find(|one| one.port == port);
        found.map_or(AppProtocol::Detect, |one| one.protocol)
    }
}

impl Snapshot {
    fn new(own_namespace: Arc<str>) -> Self {
        Self {
            index: WorkloadIndex::default(),
            policies: PolicySet::default(),
            routes: RouteTable::default(),
            frontends: imbl::OrdMap::new(),
            by_host: imbl::OrdMap::new(),
            gateway_policies: None,
            authentications: imbl::OrdMap::new(),
            workload_authentications: [Arc::default(), Arc::default()],
            own_namespace,
            trust: Arc::default(),
            identity: None,
            cluster_domain: "cluster.local".into(),
            synced: false,
        }
    }

    /// What is served under a service's key.
    pub(crate) fn served(&self, service: &NamespacedHostname) -> Option<&Arc<Served>> {
        self.by_host.get(service)
    }

    /// The policies of the waypoint itself; none while nothing is known of its Gateway, and so of what is attached to that.
    pub(crate) const fn gateway_policies(&self) -> Option<&Arc<[Arc<str>]>> {
        self.gateway_policies.as_ref()
    }

    /// The RequestAuthentications that hold for a workload that is dialled itself.
    pub(crate) fn of_workload(&self, workload: &Workload) -> &Arc<[Arc<str>]> {
        let [own, other] = &self.workload_authentications;
        if workload.namespace == self.own_namespace { own } else { other }
    }

    /// RequestAuthentications, in the order of their names.
    pub(crate) fn authentications(&self) -> impl Iterator<Item = &RequestAuthentication> {
        self.authentications.values().map(|one| &one.source)
    }

    /// This waypoint's own workload, by an address of the machine.
    pub(crate) fn own(&self, ip: IpAddr) -> Option<Arc<Workload>> {
        let identity = self.identity.as_ref()?.svid.id();
        self.index
            .workload_by_ip(&NetworkId::default(), ip)
            .or_else(|| {
                let mut all = self.index.workloads();
                all.find(|workload| workload.addresses.contains(&ip))
            })
            .filter(|workload| workload.identity().is_ok_and(|id| id == *identity))
            .cloned()
    }

    /// The service behind a `backendRef`.
    pub(crate) fn backend(&self, backend: &ServiceRef) -> Option<&Arc<Service>> {
        let ServiceRef { namespace, name, .. } = backend;
        let host = format!("{name}.{namespace}.svc.{}", self.cluster_domain);
        self.index
            .service(&NamespacedHostname { namespace: namespace.clone(), hostname: host.into() })
    }

    /// Numbers of what is known, for the admin page.
    pub(crate) fn counts(&self) -> BTreeMap<&'static str, usize> {
        BTreeMap::from([
            ("workloads", self.index.workloads().len()),
            ("services", self.index.services().len()),
            ("policies", self.policies.policies().len()),
            ("frontends", self.frontends.len()),
            ("routes", self.routes.routes().len()),
            ("authentications", self.authentications.len()),
        ])
    }

    /// What is served, in the order of names.
    pub(crate) fn frontends(&self) -> impl Iterator<Item = &FrontendConfig> {
        self.frontends.values().map(|served| &served.config)
    }
}

/// The picture: one writer, readers that take snapshots.
pub(crate) struct Picture {
    current: ArcSwap<Snapshot>,
    changed: watch::Sender<u64>,
    /// How backends are looked for.
    pub(crate) resolving: ResolveSettings,
}

impl Picture {
    pub(crate) fn new(resolving: ResolveSettings) -> Self {
        let current = ArcSwap::from_pointee(Snapshot::new(Arc::default()));
        Self { current, changed: watch::Sender::new(0), resolving }
    }

    /// The picture as it is.
    pub(crate) fn snapshot(&self) -> Arc<Snapshot> {
        self.current.load_full()
    }

    /// Tells of every change.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    fn swap(&self, snapshot: Snapshot) {
        self.current.store(Arc::new(snapshot));
        self.changed.send_modify(|changes| *changes += 1);
    }
}

/// Applies what the controller and the CA say; held by the one task that hears them.
pub(crate) struct World {
    gateway: GatewayName,
    next: Snapshot,
    /// Settings of the mesh, once they are known.
    pub(crate) mesh: Option<MeshConfig>,
    stamp: u64,
    keys: Arc<KeyStore>,
}

impl World {
    pub(crate) fn new(gateway: GatewayName, keys: Arc<KeyStore>) -> Self {
        let next = Snapshot::new(gateway.namespace.clone());
        Self { gateway, next, mesh: None, stamp: 0, keys }
    }

    /// Applies one response, all at once.
    pub(crate) fn apply(&mut self, update: Update) {
        for rejected in &update.rejected {
            let kind = kind_name(update.kind);
            metrics::counter!(metric::RESOURCES_REJECTED.name, "type" => kind).increment(1);
            tracing::warn!(
                resource = rejected.name, error = %rejected.error,
                remedy = rejected.error.problem.remedy(), "the controller sent a resource that cannot be used"
            );
        }
        let mut delta = IndexDelta::default();
        let mut routes = Vec::new();
        let mut frontends = false;
        for removed in update.removed {
            match removed {
                // Settings that go away leave the last ones in force: nobody would be trusted otherwise.
                RemovedResource::Mesh => {
                    tracing::warn!("the controller withdrew the mesh's settings")
                }
                RemovedResource::Pod(_) => {}
                RemovedResource::Policy(name) => {
                    self.next.policies.remove(&name);
                }
                RemovedResource::Workload(uid) => delta.removed_workloads.push(uid),
                RemovedResource::Service(key) => delta.removed_services.push(key),
                RemovedResource::Frontend(name) => {
                    frontends = true;
                    self.next.frontends.remove(&name);
                    routes.push(RouteChange::RemoveFrontend(name));
                }
                RemovedResource::Route(name) => routes.push(RouteChange::Remove(name)),
                RemovedResource::Authentication(name) => {
                    self.next.authentications.remove(&name);
                }
            }
        }
        for unreadable in update.unreadable {
            tracing::error!(
                policy = %unreadable.name, error = %unreadable.reason,
                "a policy cannot be read; everything is refused until the controller replaces or removes it"
            );
            self.next.policies.set_unreadable(unreadable);
        }
        for resource in update.resources {
            match resource {
                Resource::Mesh(config) => self.apply_mesh(config),
                Resource::Pod(_) => {}
                Resource::Policy(policy) => {
                    self.next.policies.upsert(policy);
                }
                Resource::Workload(workload) => delta.workloads.push(workload),
                Resource::Service(service) => delta.services.push(service),
                Resource::Frontend(config) => {
                    frontends = true;
                    routes.push(RouteChange::Frontend(frontend(&config)));
                    let served = Served {
                        policies: Arc::default(),
                        authentications: Arc::default(),
                        config,
                    };
                    let name = served.config.frontend.clone();
                    self.next.frontends.insert(name, Arc::new(served));
                }
                Resource::Route(route) => routes.push(RouteChange::Upsert(*route)),
                Resource::Authentication(source) => self.authenticate(*source),
            }
        }
        self.next.index.apply(delta);
        for invalid in self.next.routes.apply(routes) {
            tracing::warn!(
                error = %format!("{:#}", anyhow::Error::from(invalid)),
                "a route cannot be used; the version before it stays in force"
            );
        }
        if frontends {
            self.attach();
        }
    }

    fn authenticate(&mut self, source: RequestAuthentication) {
        match Rules::new(&source) {
            Ok(rules) => {
                let keys =
                    rules.rules.iter().map(|rule| Some(self.keys.at(rule.place()?))).collect();
                let name = Arc::clone(&rules.name);
                let one = Arc::new(Authentication { rules, keys, source });
                self.next.authentications.insert(name, one);
            }
            Err(error) => tracing::error!(
                name = %format!("{}/{}", source.namespace, source.name), error = %format!("{:#}", anyhow::Error::from(error)),
                "a RequestAuthentication cannot be used; the version before it stays in force, and without one everything is refused where it is attached"
            ),
        }
    }

    /// Everything has been said once.
    pub(crate) const fn set_synced(&mut self) {
        self.next.synced = true;
    }

    /// Takes over a certificate.
    pub(crate) fn certified(&mut self, svid: Svid) {
        let svid = Arc::new(svid);
        self.next.identity = Some(self.identity(svid));
    }

    /// Makes what was said visible to requests.
    pub(crate) fn publish(&self, picture: &Picture) {
        picture.swap(self.next.clone());
    }

    /// Whom this waypoint is to prove to be.
    pub(crate) fn wanted(&self, service_account: &str) -> Option<SpiffeId> {
        let trust_domain = &self.mesh.as_ref()?.trust_domain;
        SpiffeId::new(trust_domain, &self.gateway.namespace, service_account).ok()
    }

    /// The roots that the controller named last, PEM.
    pub(crate) fn roots(&self) -> Option<&str> {
        self.mesh.as_ref().map(|config| &*config.root_pem)
    }

    fn identity(&mut self, svid: Arc<Svid>) -> Identity {
        self.stamp += 1;
        let server = Arc::new(tls::server(&svid, Arc::clone(&self.next.trust)));
        Identity { svid, stamp: self.stamp, server }
    }

    fn apply_mesh(&mut self, config: MeshConfig) {
        match trust_of(&config) {
            Ok(trust) if *self.next.trust != trust => {
                self.next.trust = Arc::new(trust);
                if let Some(identity) = self.next.identity.take() {
                    self.next.identity = Some(self.identity(identity.svid));
                }
            }
            Ok(_same) => {}
            Err(error) => tracing::error!(
                %error,
                "roots or revocation lists from the controller cannot be used; the last ones stay in force"
            ),
        }
        self.next.cluster_domain = Arc::clone(&config.cluster_domain);
        self.mesh = Some(config);
    }

    /// Joins each frontend's policies with the waypoint's own.
    fn attach(&mut self) {
        let own = FrontendName {
            kind: FrontendKind::Gateway,
            namespace: self.gateway.namespace.clone(),
            name: self.gateway.name.clone(),
        };
        let of_gateway: Option<Arc<[Arc<str>]>> =
            self.next.frontends.get(&own).map(|served| served.config.policies.as_slice().into());
        self.next.gateway_policies.clone_from(&of_gateway);
        let of_gateway: &[Arc<str>] = of_gateway.as_deref().unwrap_or_default();
        let own = self.next.frontends.get(&own).cloned();
        let own = own.as_ref().map(|served| &served.config);
        let for_all = own.map(|own| own.authentications.as_slice()).unwrap_or_default();
        let for_workloads =
            own.map(|own| own.workload_authentications.as_slice()).unwrap_or_default();
        self.next.workload_authentications = [joined(for_all, for_workloads), joined(for_all, &[])];
        let mut by_host = imbl::OrdMap::new();
        let all: Vec<_> = self.next.frontends.values().cloned().collect();
        for served in all {
            let policies: Arc<[Arc<str>]> =
                served.config.policies.iter().chain(of_gateway).cloned().collect();
            let authentications = joined(&served.config.authentications, for_all);
            let is_same =
                *served.policies == *policies && *served.authentications == *authentications;
            let served = match is_same {
                true => served,
                false => {
                    let config = served.config.clone();
                    Arc::new(Served { config, policies, authentications })
                }
            };
            for host in &served.config.hosts {
                let namespace = served.config.frontend.namespace.clone();
                let key = NamespacedHostname { namespace, hostname: host.clone() };
                by_host.insert(key, Arc::clone(&served));
            }
            self.next.frontends.insert(served.config.frontend.clone(), served);
        }
        self.next.by_host = by_host;
    }
}

fn trust_of(config: &MeshConfig) -> Result<TrustBundle, InvalidBundle> {
    TrustBundle::from_pem(&config.trust_domain, &config.root_pem, &config.crl_pem)
}

/// Both lists, each name once.
fn joined(first: &[Arc<str>], second: &[Arc<str>]) -> Arc<[Arc<str>]> {
    let further = second.iter().filter(|name| !first.contains(name));
    first.iter().chain(further).cloned().collect()
}

fn frontend(config: &FrontendConfig) -> Frontend {
    let section = |name: &Arc<str>| (!name.is_empty()).then(|| Arc::clone(name));
    Frontend {
        name: config.frontend.clone(),
        ports: config
            .ports
            .iter()
            .map(|port| FrontendPort { port: port.port, section: section(&port.name) })
            .collect(),
    }
}

/// A kind as a label.
const fn kind_name(kind: ResourceKind) -> &'static str {
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

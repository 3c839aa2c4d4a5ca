//! What controller and agent say to each other.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::BytesMut;
use mesh_authorize::PolicySet;
use mesh_controller::publish::take_request;
use mesh_model::{NamespacedHostname, Service, Workload, WorkloadUid};
use mesh_resolve::{IndexDelta, WorkloadIndex};
use mesh_route::FrontendKind;
use mesh_wire::pb::auth::IstioCertificateRequest;
use mesh_wire::pb::discovery::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node, Resource as WireResource,
};
use mesh_wire::pb::mesh::SavedState;
use mesh_wire::{
    DeltaClientState, DeltaServerState, NodeIdentity, NodeView, Problem, Published, Resource,
    ResourceKind, Update, impersonated_identity, node_name,
};
use prost::Message as _;
use prost_types::Any;

use crate::fixture;
use crate::input::{Input, long};

/// One resource of any type: what converts is published and converts back to itself under the same name, and the world
/// that holds it stands.
pub fn resource(data: &[u8]) {
    let mut input = Input::new(data);
    let kind = ResourceKind::ALL[usize::from(input.byte()) % ResourceKind::ALL.len()];
    let mut wire = WireResource {
        resource: Some(Any { type_url: kind.type_url().to_owned(), value: input.rest().to_vec() }),
        ..WireResource::default()
    };
    let decoded = match Resource::decode(kind, &wire) {
        Ok(resource) => resource,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            let Problem::OtherName { content } = &error.problem else { return };
            wire.name.clone_from(content);
            Resource::decode(kind, &wire).expect("the name was all that was wrong")
        }
    };
    check(&decoded);
}

/// A resource survives the wire, the index and the policies.
pub(crate) fn check(resource: &Resource) {
    let published = Published::new(resource);
    assert_eq!(
        (published.kind(), &**published.name()),
        (resource.kind(), resource.name().as_str())
    );
    let again = Resource::decode(resource.kind(), &published.to_wire());
    assert_eq!(again.as_ref(), Ok(resource));
    assert_eq!(Published::new(resource).version(), published.version());
    let mut world = World::default();
    world.add(resource);
    world.remove(resource);
    world.check_empty();
}

/// What an agent makes of resources.
#[derive(Debug, Default)]
pub(crate) struct World {
    pub(crate) index: WorkloadIndex,
    pub(crate) policies: PolicySet,
    held: BTreeMap<(ResourceKind, String), Resource>,
}

impl World {
    fn add(&mut self, resource: &Resource) {
        let before = self.index.revision();
        let mut delta = IndexDelta::default();
        match resource {
            Resource::Workload(workload) => delta.workloads.push(workload.clone()),
            Resource::Service(service) => delta.services.push(service.clone()),
            Resource::Policy(policy) => drop(self.policies.upsert(policy.clone())),
            Resource::Mesh(_)
            | Resource::Pod(_)
            | Resource::Frontend(_)
            | Resource::Route(_)
            | Resource::Authentication(_) => {}
        }
        assert!(self.index.apply(delta) >= before, "the revision went back");
        self.held.insert((resource.kind(), resource.name()), resource.clone());
    }

    fn remove(&mut self, resource: &Resource) {
        let mut delta = IndexDelta::default();
        match resource {
            Resource::Workload(workload) => delta.removed_workloads.push(workload.uid.clone()),
            Resource::Service(service) => delta.removed_services.push(service.key.clone()),
            Resource::Policy(policy) => drop(self.policies.remove(&policy.name)),
            Resource::Mesh(_)
            | Resource::Pod(_)
            | Resource::Frontend(_)
            | Resource::Route(_)
            | Resource::Authentication(_) => {}
        }
        self.index.apply(delta);
        self.held.remove(&(resource.kind(), resource.name()));
    }

    fn check_empty(&self) {
        assert_eq!((self.index.workloads().len(), self.index.services().len()), (0, 0));
        assert_eq!(self.policies.policies().len(), 0);
    }

    fn apply(&mut self, update: &Update) {
        for removed in &update.removed {
            let name = removed_name(removed);
            self.held.remove(&(update.kind, name));
        }
        for resource in &update.resources {
            self.add(resource);
        }
    }

    fn find(&self, kind: ResourceKind, name: &str) -> Option<Resource> {
        self.held.get(&(kind, name.to_owned())).cloned()
    }
}

fn removed_name(removed: &mesh_wire::RemovedResource) -> String {
    use mesh_wire::RemovedResource as Gone;
    match removed {
        Gone::Mesh => mesh_wire::MESH_CONFIG_NAME.to_owned(),
        Gone::Pod(uid) | Gone::Workload(uid) => uid.as_str().to_owned(),
        Gone::Policy(name) => name.to_string(),
        Gone::Service(key) => key.to_string(),
        Gone::Frontend(name) => {
            let kind = match name.kind {
                FrontendKind::Service => "Service",
                FrontendKind::ServiceEntry => "ServiceEntry",
                FrontendKind::Gateway => "Gateway",
            };
            format!("{kind} {}/{}", name.namespace, name.name)
        }
        Gone::Route(name) => name.to_string(),
        Gone::Authentication(name) => name.to_string(),
    }
}

fn samples() -> Vec<Resource> {
    let mut workload = Workload::named("K//Pod/shop/cart", "shop", "cart");
    workload.addresses = vec![[10, 0, 0, 1].into(), [0xfd00, 0, 0, 0, 0, 0, 0, 1].into()];
    workload.authorization_policies = vec!["shop/p".into()];
    let key = NamespacedHostname::new("shop", "cart.shop.svc.cluster.local");
    let port = mesh_model::ServicePort { service_port: 80, target_port: 8080 };
    workload.services.insert(key.clone(), vec![port]);
    let mut service = Service::named("shop", &key.hostname, "cart");
    service.ports = vec![port];
    let network = mesh_model::NetworkId::default();
    service.vips = vec![mesh_model::NetworkAddress::new(network, [10, 96, 0, 1].into())];
    let policies = crate::policy::samples();
    let mesh = mesh_wire::MeshConfig {
        trust_domain: "cluster.local".into(),
        root_pem: fixture::ROOTS.into(),
        crl_pem: "".into(),
        unknown_egress: BTreeMap::from([("shop".into(), mesh_authorize::UnknownEgress::Deny)]),
        default_unknown_egress: mesh_authorize::UnknownEgress::Allow,
        cluster_domain: "cluster.local".into(),
        pod_networks: vec![mesh_model::IpPrefix::host([10, 0, 0, 1].into())],
    };
    let pod = mesh_wire::PodConfig {
        uid: WorkloadUid::new("K//Pod/shop/cart"),
        namespace: "shop".into(),
        name: "cart".into(),
        service_account: "cart".into(),
        pod_uid: "u-1".into(),
        mode: mesh_wire::PodMode::Ambient,
        probe_ports: [8080].into(),
        dns_capture: true,
        outbound: mesh_wire::TrafficFilter {
            exclude_cidrs: vec!["10.9.0.0/16".parse().expect("a prefix")],
            ..mesh_wire::TrafficFilter::default()
        },
        inbound: mesh_wire::TrafficFilter::default(),
        bypass_inbound: false,
        tunnel_same_node: false,
    };
    let frontend = mesh_wire::FrontendConfig {
        frontend: mesh_route::FrontendName::service("shop", "cart"),
        hosts: vec!["cart.shop.svc.cluster.local".into()],
        ports: vec![mesh_wire::FrontendPortConfig {
            port: 80,
            name: "http".into(),
            protocol: mesh_wire::AppProtocol::Http1,
        }],
        policies: vec!["shop/p".into()],
        authentications: vec!["shop/jwt".into()],
        workload_authentications: Vec::new(),
    };
    let mut samples = vec![
        Resource::Workload(workload),
        Resource::Service(service),
        Resource::Mesh(mesh),
        Resource::Pod(pod),
        Resource::Frontend(frontend),
        Resource::Route(Box::new(crate::route::sample())),
        Resource::Authentication(Box::new(crate::jwt::sample())),
    ];
    samples.extend(policies.into_iter().map(Resource::Policy));
    samples
}

fn content(resource: &Resource) -> Vec<u8> {
    Published::new(resource).to_wire().resource.map(|any| any.value).unwrap_or_default()
}

fn kind_byte(kind: ResourceKind) -> u8 {
    let place = ResourceKind::ALL.iter().position(|one| *one == kind).unwrap_or_default();
    u8::try_from(place).unwrap_or_default()
}

pub(crate) fn resource_seeds() -> Vec<Vec<u8>> {
    let seed = |resource: &Resource| [vec![kind_byte(resource.kind())], content(resource)].concat();
    samples().iter().map(seed).collect()
}

fn response(kind: ResourceKind, nonce: &str) -> DeltaDiscoveryResponse {
    let of_kind = |resource: &&Resource| resource.kind() == kind;
    DeltaDiscoveryResponse {
        type_url: kind.type_url().to_owned(),
        nonce: nonce.to_owned(),
        resources: samples()
            .iter()
            .filter(of_kind)
            .map(|one| Published::new(one).to_wire())
            .collect(),
        removed_resources: vec!["shop/gone".to_owned()],
        ..DeltaDiscoveryResponse::default()
    }
}

/// Responses to an agent: each is acknowledged or refused under its own nonce, and what is held survives a restart.
pub fn client(data: &[u8]) {
    let mut input = Input::new(data);
    let mut state = DeltaClientState::new(&ResourceKind::ALL);
    let mut world = World::default();
    let node = Node::default();
    assert_eq!(state.start(&node).len(), ResourceKind::ALL.len());
    while !input.is_empty() {
        let Ok(response) = DeltaDiscoveryResponse::decode(input.long()) else { continue };
        let nonce = response.nonce.clone();
        let Ok((update, reply)) = state.handle(response) else { continue };
        assert_eq!(reply.response_nonce, nonce);
        assert_eq!(reply.error_detail.is_some(), !update.rejected.is_empty());
        for resource in &update.resources {
            assert!(state.held(update.kind).any(|(name, _)| name == resource.name()));
        }
        world.apply(&update);
    }
    let saved = state.save(|kind, name| world.find(kind, name));
    let saved = SavedState::decode(saved.encode_to_vec().as_slice()).expect("as it was written");
    let mut restored = DeltaClientState::new(&ResourceKind::ALL);
    restored.restore(&saved);
    for kind in ResourceKind::ALL {
        let held: Vec<_> = state.held(kind).collect();
        assert_eq!(held, restored.held(kind).collect::<Vec<_>>(), "after a restart");
    }
}

pub(crate) fn client_seeds() -> Vec<Vec<u8>> {
    let all: Vec<u8> = ResourceKind::ALL
        .into_iter()
        .flat_map(|kind| long(&response(kind, "1").encode_to_vec()))
        .collect();
    let mut again = response(ResourceKind::Address, "2");
    again.resources.truncate(1);
    again.removed_resources = vec!["shop/cart.shop.svc.cluster.local".to_owned()];
    let broken = DeltaDiscoveryResponse {
        type_url: ResourceKind::Authorization.type_url().to_owned(),
        resources: vec![WireResource { name: "shop/p".to_owned(), ..WireResource::default() }],
        ..DeltaDiscoveryResponse::default()
    };
    vec![
        [all, long(&again.encode_to_vec())].concat(),
        [
            long(&broken.encode_to_vec()),
            long(&response(ResourceKind::Authorization, "3").encode_to_vec()),
        ]
        .concat(),
    ]
}

struct View(Vec<Published>);

impl NodeView for View {
    fn get(&self, kind: ResourceKind, name: &str) -> Option<&Published> {
        self.0.iter().find(|one| one.kind() == kind && **one.name() == *name)
    }

    fn for_each(&self, kind: ResourceKind, show: &mut dyn FnMut(&Published)) {
        self.0.iter().filter(|one| one.kind() == kind).for_each(show);
    }
}

/// Requests to a controller: one response under way per type, and never one without end.
pub fn server(data: &[u8]) {
    thread_local! {
        static VIEW: View = View(samples().iter().map(Published::new).collect());
    }
    let mut input = Input::new(data);
    let mut state = DeltaServerState::new(1);
    while !input.is_empty() {
        let option = input.byte();
        let Ok(mut request) = DeltaDiscoveryRequest::decode(input.long()) else { continue };
        if let Some(node) = &request.node {
            drop(node_name(node).map(str::to_owned));
        }
        if option & 1 == 1 {
            // Nonces are counted: the one under way can be named.
            request.response_nonce = format!("1-{:x}", option >> 1);
        }
        if state.handle(request).is_err() {
            return;
        }
        VIEW.with(|view| {
            for kind in ResourceKind::ALL {
                if option & 0x80 != 0 {
                    state.changed_everything(kind);
                } else {
                    let name: Arc<str> = "shop/p".into();
                    state.changed(kind, [&name]);
                }
            }
            let mut responses = 0;
            while let Some(response) = state.poll_response(view) {
                responses += 1;
                assert!(responses <= ResourceKind::ALL.len(), "one under way per type");
                let kind = ResourceKind::from_type_url(&response.type_url).expect("one of ours");
                assert!(state.is_awaiting(kind) && !response.nonce.is_empty());
            }
        });
    }
}

/// Framed requests, whole and cut in two: the same requests, and the same rest.
pub fn requests(data: &[u8]) {
    let take = |read: &mut BytesMut| {
        let mut taken = Vec::new();
        loop {
            let before = read.len();
            match take_request(read) {
                Ok(Some(request)) => {
                    assert!(read.len() < before, "a request without bytes");
                    taken.push(request);
                }
                Ok(None) => return (taken, false),
                Err(_status) => {
                    assert_eq!(read.len(), before, "a refusal takes nothing");
                    return (taken, true);
                }
            }
        }
    };
    let mut whole = BytesMut::from(data);
    let (at_once, refused) = take(&mut whole);
    let (first, second) = data.split_at(data.len() / 2);
    let mut cut = BytesMut::from(first);
    let (mut in_two, refused_early) = take(&mut cut);
    cut.extend_from_slice(second);
    let (rest, refused_late) = take(&mut cut);
    in_two.extend(rest);
    assert_eq!((at_once, refused, whole), (in_two, refused_late, cut));
    assert!(refused || !refused_early, "a refusal is final");
}

pub(crate) fn requests_seeds() -> Vec<Vec<u8>> {
    let framed = |type_url: String| {
        let content = DeltaDiscoveryRequest { type_url, ..Default::default() }.encode_to_vec();
        let length = u32::try_from(content.len()).expect("a small request");
        [&[0][..], &length.to_be_bytes(), &content].concat()
    };
    let address = framed(ResourceKind::Address.type_url().to_owned());
    let large = framed("x".repeat(5_000));
    vec![
        [&address[..], &framed(String::new()), &address].concat(),
        [&large[..], &address].concat(),
        [&address[..], &[1, 0, 0, 0, 0]].concat(),
        vec![0, 0xff, 0xff, 0xff, 0xff],
    ]
}

pub(crate) fn server_seeds() -> Vec<Vec<u8>> {
    let node = NodeIdentity {
        ip: [10, 0, 0, 9].into(),
        pod_name: "agent".to_owned(),
        pod_namespace: "culvert-system".to_owned(),
        node_name: "node-a".to_owned(),
        cluster_id: "Kubernetes".to_owned(),
        cluster_domain: "cluster.local".to_owned(),
        version: "1".to_owned(),
    };
    let subscribe = |kind: ResourceKind| DeltaDiscoveryRequest {
        node: Some(Node::from(&node)),
        type_url: kind.type_url().to_owned(),
        ..DeltaDiscoveryRequest::default()
    };
    let step = |option: u8, request: &DeltaDiscoveryRequest| {
        [vec![option], long(&request.encode_to_vec())].concat()
    };
    let mut named = subscribe(ResourceKind::Address);
    named.resource_names_subscribe = vec!["K//Pod/shop/cart".to_owned(), "absent".to_owned()];
    named.initial_resource_versions.insert("gone".to_owned(), "1".to_owned());
    let mut leaves = subscribe(ResourceKind::Address);
    leaves.resource_names_unsubscribe = vec!["K//Pod/shop/cart".to_owned(), "*".to_owned()];
    let mut refuses = subscribe(ResourceKind::Authorization);
    refuses.error_detail = Some(mesh_wire::pb::rpc::Status {
        code: 3,
        message: "no".to_owned(),
        ..Default::default()
    });
    vec![
        [
            step(0, &subscribe(ResourceKind::Authorization)),
            step(3, &refuses),
            step(0x80, &subscribe(ResourceKind::Mesh)),
            step(5, &subscribe(ResourceKind::Mesh)),
        ]
        .concat(),
        [step(0, &named), step(3, &leaves), step(0x85, &subscribe(ResourceKind::Address))].concat(),
    ]
}

/// The file an agent starts from: whatever survived its checksum, it restores and saves again as the same.
pub fn saved_state(data: &[u8]) {
    let Ok(saved) = SavedState::decode(data) else { return };
    let mut state = DeltaClientState::new(&ResourceKind::ALL);
    let mut world = World::default();
    for update in state.restore(&saved) {
        world.apply(&update);
    }
    let again = state.save(|kind, name| world.find(kind, name));
    let mut restored = DeltaClientState::new(&ResourceKind::ALL);
    let mut same_world = World::default();
    for update in restored.restore(&again) {
        same_world.apply(&update);
    }
    assert_eq!(world.held, same_world.held);
    assert_eq!(restored.save(|kind, name| same_world.find(kind, name)), again);
}

pub(crate) fn saved_state_seeds() -> Vec<Vec<u8>> {
    let responses = ResourceKind::ALL.into_iter().map(|kind| {
        let mut response = response(kind, "");
        response.removed_resources.clear();
        response
    });
    vec![SavedState { responses: responses.collect() }.encode_to_vec()]
}

/// A request to the CA: the identity it asks for is one, or it is refused.
pub fn certificate_request(data: &[u8]) {
    let Ok(request) = IstioCertificateRequest::decode(data) else { return };
    if let Ok(Some(id)) = impersonated_identity(&request) {
        let validity = std::time::Duration::from_secs(60);
        let ours = mesh_wire::certificate_request(request.csr, &id, validity);
        assert_eq!(impersonated_identity(&ours), Ok(Some(id)));
    }
}

pub(crate) fn certificate_request_seeds() -> Vec<Vec<u8>> {
    let id = fixture::id();
    let hour = std::time::Duration::from_secs(3600);
    let asked = mesh_wire::certificate_request(fixture::CSR.to_owned(), &id, hour);
    vec![asked.encode_to_vec(), IstioCertificateRequest::default().encode_to_vec()]
}

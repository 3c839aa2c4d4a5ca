//! The agent's half of the delta xDS conversation.
//!
//! ```text
//! start() ── one request per kind, with the versions kept ─►
//!         ◄─ response: changed resources, removed names ──── handle() ─► Update + ACK or NACK ─►
//! ```

use std::collections::BTreeMap;
use std::sync::Arc;

use mesh_authorize::{PolicyName, UnreadablePolicy};
use mesh_model::{NamespacedHostname, WorkloadUid};
use mesh_route::{FrontendName, RouteName};

use crate::address::two_parts;
use crate::error::InvalidResource;
use crate::kind::ResourceKind;
use crate::pb::discovery::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node, Resource as WireResource,
};
use crate::pb::mesh::SavedState;
use crate::pb::rpc::Status;
use crate::policy::{policy_name, unreadable};
use crate::resource::{Published, Resource};
use crate::waypoint;

/// What an agent holds of a controller's resources, over all streams of its life.
///
/// A resource that was refused is not held under its new version: it is sent again after a reconnect. What was held
/// under that name before stays in force until then. Where nothing was, a refused policy is remembered, also on disk:
/// the flows it may be about must not pass for want of it.
#[derive(Clone, Debug)]
pub struct DeltaClientState {
    kinds: BTreeMap<ResourceKind, Held>,
}

#[derive(Clone, Debug, Default)]
struct Held {
    resources: BTreeMap<Arc<str>, HeldResource>,
    /// Policies that were refused and have no readable predecessor, as they were sent.
    unreadable: BTreeMap<Arc<str>, WireResource>,
    /// A response came on the current stream.
    answered: bool,
}

#[derive(Clone, Debug)]
struct HeldResource {
    version: Arc<str>,
    content: Content,
}

/// What is behind a name; names alone do not tell workloads from services.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    Mesh,
    Pod,
    Policy,
    Workload,
    Service,
    Frontend,
    Route,
    Authentication,
}

/// What one response changes: removals first, then what is unreadable, then resources, each replacing what bore its key.
#[derive(Clone, Debug, PartialEq)]
pub struct Update {
    /// The kind it is about.
    pub kind: ResourceKind,
    /// What is gone.
    pub removed: Vec<RemovedResource>,
    /// What is new or changed.
    pub resources: Vec<Resource>,
    /// What was refused. What bore these names before stays in force.
    pub rejected: Vec<RejectedResource>,
    /// Refused policies of which there is no earlier version: what they could apply to must be refused. Each ends with
    /// a policy or a removal of its name. For [`PolicySet::set_unreadable`](mesh_authorize::PolicySet::set_unreadable).
    pub unreadable: Vec<UnreadablePolicy>,
}

/// The key of something that is gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RemovedResource {
    /// The settings of the mesh.
    Mesh,
    /// A pod's settings.
    Pod(WorkloadUid),
    /// A policy, or one that was unreadable.
    Policy(PolicyName),
    /// A workload.
    Workload(WorkloadUid),
    /// A service.
    Service(NamespacedHostname),
    /// What a waypoint served.
    Frontend(FrontendName),
    /// A route.
    Route(RouteName),
    /// What tokens counted, as `namespace/name`.
    Authentication(Arc<str>),
}

/// A resource that did not convert.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("resource {name:?} refused")]
pub struct RejectedResource {
    /// Its name.
    pub name: String,
    /// Why.
    #[source]
    pub error: InvalidResource,
}

/// A response that answers nothing this agent asked; the control plane's fault. End the stream.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("response of type {type_url:?}, which was not asked for")]
pub struct UnexpectedResponse {
    /// The type.
    pub type_url: String,
}

impl DeltaClientState {
    /// Asks for `kinds`: [`ResourceKind::AGENT`] of a Culvert controller, [`ResourceKind::ISTIO`] of another.
    #[must_use]
    pub fn new(kinds: &[ResourceKind]) -> Self {
        Self { kinds: kinds.iter().map(|kind| (*kind, Held::default())).collect() }
    }

    /// A new stream: the first requests on it, one per kind.
    pub fn start(&mut self, node: &Node) -> Vec<DeltaDiscoveryRequest> {
        self.kinds
            .iter_mut()
            .map(|(kind, held)| {
                held.answered = false;
                DeltaDiscoveryRequest {
                    node: Some(node.clone()),
                    type_url: kind.type_url().to_owned(),
                    initial_resource_versions: held.versions(),
                    ..Default::default()
                }
            })
            .collect()
    }

    /// Takes a response: what it changes, and the acknowledgement to send.
    ///
    /// # Errors
    /// When it is of a kind that was not asked for.
    pub fn handle(
        &mut self,
        response: DeltaDiscoveryResponse,
    ) -> Result<(Update, DeltaDiscoveryRequest), UnexpectedResponse> {
        let asked = ResourceKind::from_type_url(&response.type_url)
            .and_then(|kind| self.kinds.get_mut(&kind).map(|held| (kind, held)));
        let Some((kind, held)) = asked else {
            return Err(UnexpectedResponse { type_url: response.type_url });
        };
        held.answered = true;
        let update = held.apply(kind, &response);
        let reply = DeltaDiscoveryRequest {
            type_url: response.type_url,
            response_nonce: response.nonce,
            error_detail: nack(&update.rejected),
            ..Default::default()
        };
        Ok((update, reply))
    }

    /// True once every kind was answered on the current stream: what is held is what the controller wants.
    #[must_use]
    pub fn is_synced(&self) -> bool {
        self.kinds.values().all(|held| held.answered)
    }

    /// Kinds that have not been answered on the current stream; for readiness messages.
    pub fn unanswered(&self) -> impl Iterator<Item = ResourceKind> {
        self.kinds.iter().filter(|(_, held)| !held.answered).map(|(kind, _)| *kind)
    }

    /// Names and versions held of `kind`, in order of name.
    pub fn held(&self, kind: ResourceKind) -> impl Iterator<Item = (&str, &str)> {
        self.kinds
            .get(&kind)
            .into_iter()
            .flat_map(|held| &held.resources)
            .map(|(name, held)| (name.as_ref(), held.version.as_ref()))
    }

    /// Everything held, for the node's disk. `find` looks a resource up where it is in use; what it does not find is
    /// left out, and sent again by the controller after the restart.
    #[must_use]
    pub fn save(&self, find: impl Fn(ResourceKind, &str) -> Option<Resource>) -> SavedState {
        let responses = self
            .kinds
            .iter()
            .map(|(kind, held)| DeltaDiscoveryResponse {
                type_url: kind.type_url().to_owned(),
                resources: held
                    .resources
                    .iter()
                    .filter_map(|(name, held)| {
                        let resource = find(*kind, name)?;
                        Some(Published::new(&resource).to_wire_as(&held.version))
                    })
                    .chain(held.unreadable.values().cloned())
                    .collect(),
                ..Default::default()
            })
            .collect();
        SavedState { responses }
    }

    /// Takes back what [`save`](Self::save) wrote, as if it had just been received; kinds not asked for are ignored.
    pub fn restore(&mut self, saved: &SavedState) -> Vec<Update> {
        saved
            .responses
            .iter()
            .filter_map(|response| {
                let kind = ResourceKind::from_type_url(&response.type_url)?;
                let held = self.kinds.get_mut(&kind)?;
                Some(held.apply(kind, response))
            })
            .collect()
    }
}

impl Held {
    /// What the control plane is told at the start of a stream. A name that is missing there would not be removed, so
    /// what is unreadable is listed too, as held in a version that nothing has.
    fn versions(&self) -> BTreeMap<String, String> {
        let held = self.resources.iter().map(|(name, held)| (name, held.version.as_ref()));
        let unreadable = self.unreadable.keys().map(|name| (name, UNREADABLE_VERSION));
        held.chain(unreadable)
            .map(|(name, version)| (name.as_ref().to_owned(), version.to_owned()))
            .collect()
    }

    fn apply(&mut self, kind: ResourceKind, response: &DeltaDiscoveryResponse) -> Update {
        let mut update = Update {
            kind,
            removed: Vec::new(),
            resources: Vec::new(),
            rejected: Vec::new(),
            unreadable: Vec::new(),
        };
        for name in &response.removed_resources {
            if let Some(gone) = self.resources.remove(name.as_str()) {
                update.removed.extend(gone.content.key(name));
            }
            if self.unreadable.remove(name.as_str()).is_some() {
                update.removed.push(RemovedResource::Policy(policy_name(name)));
            }
        }
        for wire in &response.resources {
            match Resource::decode(kind, wire) {
                Ok(resource) => {
                    let content = Content::of(&resource);
                    let held = HeldResource { version: wire.version.as_str().into(), content };
                    self.unreadable.remove(wire.name.as_str());
                    let before = self.resources.insert(wire.name.as_str().into(), held);
                    if let Some(before) = before.filter(|before| before.content != content) {
                        update.removed.extend(before.content.key(&wire.name));
                    }
                    update.resources.push(resource);
                }
                Err(error) => {
                    if kind == ResourceKind::Authorization {
                        self.refuse_policy(wire, &error, &mut update);
                    }
                    update.rejected.push(RejectedResource { name: wire.name.clone(), error });
                }
            }
        }
        update
    }

    fn refuse_policy(&mut self, wire: &WireResource, error: &InvalidResource, update: &mut Update) {
        if self.resources.contains_key(wire.name.as_str()) {
            return;
        }
        match unreadable(wire, error) {
            Some(policy) => {
                self.unreadable.insert(wire.name.as_str().into(), wire.clone());
                update.unreadable.push(policy);
            }
            // It was to be enforced before, and is not now.
            None => {
                if self.unreadable.remove(wire.name.as_str()).is_some() {
                    update.removed.push(RemovedResource::Policy(policy_name(&wire.name)));
                }
            }
        }
    }
}

impl Content {
    const fn of(resource: &Resource) -> Self {
        match resource {
            Resource::Mesh(_) => Self::Mesh,
            Resource::Pod(_) => Self::Pod,
            Resource::Policy(_) => Self::Policy,
            Resource::Workload(_) => Self::Workload,
            Resource::Service(_) => Self::Service,
            Resource::Frontend(_) => Self::Frontend,
            Resource::Route(_) => Self::Route,
            Resource::Authentication(_) => Self::Authentication,
        }
    }

    /// The key behind `name`. Always there: a held name was compared with its content's.
    fn key(self, name: &str) -> Option<RemovedResource> {
        match self {
            Self::Mesh => Some(RemovedResource::Mesh),
            Self::Pod => Some(RemovedResource::Pod(WorkloadUid::new(name))),
            Self::Workload => Some(RemovedResource::Workload(WorkloadUid::new(name))),
            Self::Policy => two_parts(name)
                .map(|(namespace, name)| RemovedResource::Policy(PolicyName::new(namespace, name))),
            Self::Service => two_parts(name).map(|(namespace, hostname)| {
                RemovedResource::Service(NamespacedHostname::new(namespace, hostname))
            }),
            Self::Frontend => waypoint::parse_frontend(name).map(RemovedResource::Frontend),
            Self::Route => waypoint::parse_route(name).map(RemovedResource::Route),
            Self::Authentication => Some(RemovedResource::Authentication(name.into())),
        }
    }
}

/// No version of ours; a control plane that gives none gives the empty one.
const UNREADABLE_VERSION: &str = "unreadable";
/// Most refusals told in one answer; the rest is counted.
const MAX_TOLD: usize = 8;

fn nack(rejected: &[RejectedResource]) -> Option<Status> {
    if rejected.is_empty() {
        return None;
    }
    let told: Vec<String> = rejected
        .iter()
        .take(MAX_TOLD)
        .map(|rejected| format!("{}: {}", rejected.name, rejected.error))
        .collect();
    let mut message = told.join("; ");
    if rejected.len() > MAX_TOLD {
        message.push_str(&format!("; and {} more", rejected.len() - MAX_TOLD));
    }
    // ztunnel leaves the code 0 as well; the message is what makes it a refusal.
    Some(Status { code: 0, message, details: Vec::new() })
}

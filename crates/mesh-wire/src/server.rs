//! The controller's half of the delta xDS conversation, for one stream.
//!
//! Each kind has at most one response under way. What changes meanwhile is remembered by name only, so an agent that
//! does not answer costs a set of names and is brought up to date by one response once it does. What an agent holds is kept as
//! one pointer per resource, to the name and version that every stream shares.

use std::borrow::Borrow;
use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::kind::ResourceKind;
use crate::pb::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use crate::resource::{Label, Published};

/// What one node may see. Narrowing it later is enough to take resources back: what stops being visible is sent as
/// removed.
pub trait NodeView {
    /// The resource of `kind` called `name`, if this node sees it.
    fn get(&self, kind: ResourceKind, name: &str) -> Option<&Published>;
    /// Shows every resource of `kind` that this node sees, in stable order.
    fn for_each(&self, kind: ResourceKind, show: &mut dyn FnMut(&Published));
}

/// One agent's stream.
#[derive(Clone, Debug)]
pub struct DeltaServerState {
    /// Distinguishes this stream's nonces from another's.
    stream: u64,
    responses: u64,
    kinds: BTreeMap<ResourceKind, Subscription>,
}

#[derive(Clone, Debug, Default)]
struct Subscription {
    /// Everything visible, not only `names`.
    wildcard: bool,
    names: BTreeSet<String>,
    /// Versions the agent holds or has been sent.
    known: BTreeSet<Held>,
    dirty: Dirty,
    /// Names asked for since the last response: each is answered, also when there is no such resource.
    asked: BTreeSet<String>,
    /// A response is due even if it is empty: an agent is not ready before each kind was answered.
    owes_response: bool,
    /// Nonce of the response under way.
    in_flight: Option<String>,
}

/// A version of a resource that an agent holds; by name.
#[derive(Clone, Debug)]
struct Held(Arc<Label>);

/// What must be compared with the view before the next response.
#[derive(Clone, Debug)]
enum Dirty {
    Names(BTreeSet<Arc<str>>),
    Everything,
}

/// What a request turned out to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Received {
    /// A subscription, new or changed; poll for the response.
    Subscribed(ResourceKind),
    /// The last response was taken.
    Acknowledged(ResourceKind),
    /// Parts of the last response were refused; worth a log line and a status, never a repetition.
    Refused {
        /// Of which kind.
        kind: ResourceKind,
        /// What the agent says.
        message: String,
    },
    /// An answer to something that is not under way any more.
    Stale(ResourceKind),
}

/// A request that makes no sense; the agent's fault. End the stream.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidRequest {
    /// A type this controller does not serve.
    #[error("unknown resource type {type_url:?}")]
    UnknownType {
        /// The type.
        type_url: String,
    },
    /// More names than are kept per stream.
    #[error("more than {MAX_NAMES} names subscribed")]
    TooManyNames,
    /// An answer to a response of a kind that was never subscribed.
    #[error("answer without a subscription")]
    NotSubscribed,
}

/// Most names one stream may subscribe one by one, or claim to hold, per kind.
const MAX_NAMES: usize = 1_000_000;
/// The name that stands for all. Source: xDS protocol, delta wildcard.
const WILDCARD: &str = "*";

impl Borrow<str> for Held {
    fn borrow(&self) -> &str {
        &self.0.name
    }
}

impl PartialEq for Held {
    fn eq(&self, other: &Self) -> bool {
        self.0.name == other.0.name
    }
}

impl Eq for Held {}

impl PartialOrd for Held {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Held {
    fn cmp(&self, other: &Self) -> Ordering {
        self.0.name.cmp(&other.0.name)
    }
}

impl Default for Dirty {
    fn default() -> Self {
        Self::Names(BTreeSet::new())
    }
}

impl DeltaServerState {
    /// A stream just opened; `stream` must differ from every other of this controller's life.
    #[must_use]
    pub const fn new(stream: u64) -> Self {
        Self { stream, responses: 0, kinds: BTreeMap::new() }
    }

    /// Takes a request. Poll for responses afterwards.
    ///
    /// # Errors
    /// When the stream should end.
    pub fn handle(&mut self, request: DeltaDiscoveryRequest) -> Result<Received, InvalidRequest> {
        let Some(kind) = ResourceKind::from_type_url(&request.type_url) else {
            return Err(InvalidRequest::UnknownType { type_url: request.type_url });
        };
        if let Some(subscription) = self.kinds.get_mut(&kind) {
            return subscription.handle(kind, request);
        }
        if !request.response_nonce.is_empty() {
            return Err(InvalidRequest::NotSubscribed);
        }
        self.kinds.insert(kind, Subscription::open(request)?);
        Ok(Received::Subscribed(kind))
    }

    /// Resources of `kind` changed, appeared or vanished, or their visibility did. Announce everything that belongs
    /// together, of all kinds, before polling: then policies arrive before the workloads that name them, and leave
    /// after.
    pub fn changed<'a>(
        &mut self,
        kind: ResourceKind,
        names: impl IntoIterator<Item = &'a Arc<str>>,
    ) {
        if let Some(Dirty::Names(dirty)) = self.kinds.get_mut(&kind).map(|kind| &mut kind.dirty) {
            dirty.extend(names.into_iter().cloned());
        }
    }

    /// Anything of `kind` may have changed.
    pub fn changed_everything(&mut self, kind: ResourceKind) {
        if let Some(subscription) = self.kinds.get_mut(&kind) {
            subscription.dirty = Dirty::Everything;
        }
    }

    /// The next response to send; call until it returns none.
    pub fn poll_response(&mut self, view: &impl NodeView) -> Option<DeltaDiscoveryResponse> {
        let waited = self.addresses_pending();
        if let Some(response) = self.poll_kinds(view) {
            return Some(response);
        }
        // Addresses that turned out the same held removals back; nothing else would send those now.
        if waited && !self.addresses_pending() { self.poll_kinds(view) } else { None }
    }

    /// True while a response of `kind` is not answered; for a watchdog over silent agents.
    #[must_use]
    pub fn is_awaiting(&self, kind: ResourceKind) -> bool {
        self.kinds.get(&kind).is_some_and(|subscription| subscription.in_flight.is_some())
    }

    /// True when `kind` was subscribed on this stream.
    #[must_use]
    pub fn is_subscribed(&self, kind: ResourceKind) -> bool {
        self.kinds.contains_key(&kind)
    }

    fn poll_kinds(&mut self, view: &impl NodeView) -> Option<DeltaDiscoveryResponse> {
        for kind in ResourceKind::ALL {
            let may_be_named =
                matches!(kind, ResourceKind::Authorization | ResourceKind::Authentication);
            let removals_wait = may_be_named && self.addresses_pending();
            let Some(subscription) = self.kinds.get_mut(&kind) else { continue };
            let Some(mut response) = subscription.respond(kind, view, removals_wait) else {
                continue;
            };
            self.responses += 1;
            response.nonce = format!("{:x}-{:x}", self.stream, self.responses);
            subscription.in_flight = Some(response.nonce.clone());
            return Some(response);
        }
        None
    }

    /// Addresses or frontends have changes that were not sent. What still names a removed policy refuses traffic, so
    /// policies leave only after everything stopped naming them.
    fn addresses_pending(&self) -> bool {
        [ResourceKind::Address, ResourceKind::Frontend]
            .iter()
            .any(|kind| self.kinds.get(kind).is_some_and(Subscription::is_pending))
    }
}

impl Subscription {
    fn open(request: DeltaDiscoveryRequest) -> Result<Self, InvalidRequest> {
        let mut subscription =
            Self { owes_response: true, dirty: Dirty::Everything, ..Self::default() };
        if request.initial_resource_versions.len() > MAX_NAMES {
            return Err(InvalidRequest::TooManyNames);
        }
        subscription.known = request
            .initial_resource_versions
            .iter()
            .map(|(name, version)| {
                Held(Arc::new(Label {
                    name: name.as_str().into(),
                    version: version.as_str().into(),
                }))
            })
            .collect();
        let implicit = request.resource_names_subscribe.is_empty()
            && request.resource_names_unsubscribe.is_empty();
        subscription.wildcard = implicit;
        subscription.subscribe(request)?;
        Ok(subscription)
    }

    fn handle(
        &mut self,
        kind: ResourceKind,
        request: DeltaDiscoveryRequest,
    ) -> Result<Received, InvalidRequest> {
        let answer = (!request.response_nonce.is_empty()).then(|| {
            if self.in_flight.as_deref() != Some(request.response_nonce.as_str()) {
                return Received::Stale(kind);
            }
            self.in_flight = None;
            match &request.error_detail {
                None => Received::Acknowledged(kind),
                Some(status) => Received::Refused { kind, message: status.message.clone() },
            }
        });
        let subscribed = self.subscribe(request)?;
        Ok(answer.filter(|_| !subscribed).unwrap_or(Received::Subscribed(kind)))
    }

    /// Applies the names of a request; true when there were any.
    fn subscribe(&mut self, request: DeltaDiscoveryRequest) -> Result<bool, InvalidRequest> {
        let (add, remove) = (request.resource_names_subscribe, request.resource_names_unsubscribe);
        let any = !add.is_empty() || !remove.is_empty();
        for name in add {
            if name == WILDCARD {
                self.wildcard = true;
                self.owes_response = true;
                self.dirty = Dirty::Everything;
            } else {
                self.asked.insert(name.clone());
                self.names.insert(name);
                if self.names.len() > MAX_NAMES {
                    return Err(InvalidRequest::TooManyNames);
                }
            }
        }
        for name in remove {
            if name == WILDCARD {
                self.wildcard = false;
            } else {
                self.names.remove(&name);
                self.asked.remove(&name);
            }
            // The client forgets what it unsubscribes without being told.
            let Self { known, names, wildcard, .. } = self;
            known.retain(|held| *wildcard || names.contains(held.0.name.as_ref()));
        }
        Ok(any)
    }

    fn is_pending(&self) -> bool {
        match &self.dirty {
            Dirty::Everything => true,
            Dirty::Names(names) => !names.is_empty(),
        }
    }

    fn covers(&self, name: &str) -> bool {
        self.wildcard || self.names.contains(name)
    }

    fn respond(
        &mut self,
        kind: ResourceKind,
        view: &impl NodeView,
        removals_wait: bool,
    ) -> Option<DeltaDiscoveryResponse> {
        if self.in_flight.is_some() {
            return None;
        }
        let mut response =
            DeltaDiscoveryResponse { type_url: kind.type_url().to_owned(), ..Default::default() };
        let gone = self.compare(kind, view, &mut response);
        for name in std::mem::take(&mut self.asked) {
            // Answered by `compare` already when it was changed or removed.
            let told = response.resources.iter().any(|resource| resource.name == name)
                || gone.iter().any(|gone| **gone == *name);
            if told {
                continue;
            }
            match view.get(kind, &name) {
                Some(resource) => self.send(resource, &mut response),
                None => response.removed_resources.push(name),
            }
        }
        if removals_wait {
            if let Dirty::Names(dirty) = &mut self.dirty {
                dirty.extend(gone);
            }
        } else {
            for name in gone {
                self.known.remove(&*name);
                response.removed_resources.push(name.as_ref().to_owned());
            }
        }
        let empty = response.resources.is_empty() && response.removed_resources.is_empty();
        if empty && !self.owes_response {
            return None;
        }
        self.owes_response = false;
        Some(response)
    }

    /// Puts what changed into `response`; returns the names that are known to the agent and gone.
    fn compare(
        &mut self,
        kind: ResourceKind,
        view: &impl NodeView,
        response: &mut DeltaDiscoveryResponse,
    ) -> BTreeSet<Arc<str>> {
        let mut gone = BTreeSet::new();
        match std::mem::take(&mut self.dirty) {
            Dirty::Names(names) => {
                for name in names {
                    match view.get(kind, &name).filter(|_| self.covers(&name)) {
                        Some(resource) => self.send_if_changed(resource, response),
                        None => {
                            if self.known.contains(&*name) {
                                gone.insert(name);
                            }
                        }
                    }
                }
            }
            Dirty::Everything => {
                let mut seen = BTreeSet::new();
                view.for_each(kind, &mut |resource| {
                    if self.covers(resource.name()) {
                        seen.insert(Arc::clone(resource.name()));
                        self.send_if_changed(resource, response);
                    }
                });
                // Built anew from what is in order, the set is dense; one that grew in order is half empty.
                self.known = std::mem::take(&mut self.known).into_iter().collect();
                let known = self.known.iter().map(|held| &held.0.name);
                gone.extend(known.filter(|name| !seen.contains(*name)).cloned());
            }
        }
        gone
    }

    fn send_if_changed(&mut self, resource: &Published, response: &mut DeltaDiscoveryResponse) {
        match self.known.get(&**resource.name()) {
            Some(held) if held.0.version == *resource.version() => {
                // What an agent claims when it comes is a copy of its own.
                if !Arc::ptr_eq(&held.0, resource.label()) {
                    self.known.replace(Held(Arc::clone(resource.label())));
                }
            }
            Some(_) | None => self.send(resource, response),
        }
    }

    fn send(&mut self, resource: &Published, response: &mut DeltaDiscoveryResponse) {
        self.known.replace(Held(Arc::clone(resource.label())));
        response.resources.push(resource.to_wire());
    }
}

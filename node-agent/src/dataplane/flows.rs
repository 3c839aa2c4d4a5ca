//! The flows of one worker: what is open, and what is reported of it.
//!
//! Each accepted flow is reported exactly once as [`FlowEvent::Closed`], also when it was refused; a tunnel that was not
//! let in is no flow, and is reported as [`FlowEvent::Denied`]. In between come
//! [`FlowEvent::Opened`] when both ends are connected, and [`FlowEvent::Moved`] with the bytes since the last one.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::ops::Bound;
use std::sync::Arc;
use std::time::Instant;

use mesh_authorize::{Note, RuleRef};
use mesh_model::{CloseReason, Direction, FlowId, PodUid, SpiffeId};
use mesh_resolve::{Authority, Route};
use mesh_telemetry::{EarlyDenial, FlowBytes, FlowFacts, FlowPath, FlowRecord};
use mesh_tunnel::{RelayBytes, RelayId};
use serde::Serialize;

use crate::dataplane::handover::state::{FlowState, Parts};
use crate::dataplane::pods::{FlowSlot, PlaintextClient, Pod, PodKey};
use crate::dataplane::shared::FlowSink;
use crate::dataplane::telemetry::Story;
use crate::dataplane::worker::Refusal;

/// What happened to a flow.
#[derive(Clone, Debug)]
pub enum FlowEvent {
    /// Both ends are connected.
    Opened {
        /// Whose.
        facts: Arc<FlowFacts>,
        /// How it goes over the network.
        path: FlowPath,
    },
    /// A flow that a predecessor reported as opened goes on here.
    TakenOver {
        /// Which.
        facts: Arc<FlowFacts>,
        /// How it goes over the network.
        path: FlowPath,
        /// What the predecessor has reported of it.
        bytes: FlowBytes,
    },
    /// Bytes moved.
    Moved {
        /// Whose.
        facts: Arc<FlowFacts>,
        /// How many since the last report.
        bytes: FlowBytes,
    },
    /// The flow has ended, or was refused.
    Closed {
        /// Everything about it.
        record: Box<FlowRecord>,
        /// Those of its bytes that no [`Moved`](Self::Moved) has reported.
        unreported: FlowBytes,
        /// True when [`Opened`](Self::Opened) was reported.
        was_open: bool,
    },
    /// A policy in audit mode or dry run matched a flow.
    Noted {
        /// Which flow.
        flow: FlowId,
        /// The pod it was captured in.
        pod: PodUid,
        /// What matched.
        note: Note,
    },
    /// Somebody dialled a pod's tunnel port and was not let in: no flow began.
    Denied(EarlyDenial),
}

/// One open flow, for `culvert connections` and the admin API.
#[derive(Clone, Debug, Serialize)]
pub struct ConnectionView {
    /// Its name in logs.
    pub id: String,
    /// Which way it goes.
    pub direction: Direction,
    /// The pod it was captured in.
    pub pod: PodUid,
    /// Namespace of that pod.
    pub pod_namespace: Arc<str>,
    /// Name of that pod.
    pub pod_name: Arc<str>,
    /// Who dialled.
    pub client: SocketAddr,
    /// What was dialled.
    pub destination: SocketAddr,
    /// The client's identity, where it was proved.
    pub source_principal: Option<SpiffeId>,
    /// The server's identity, where it was proved.
    pub destination_principal: Option<SpiffeId>,
    /// The service it was addressed to.
    pub service: Option<String>,
    /// How it goes over the network.
    pub path: FlowPath,
    /// The rule that allowed it.
    pub rule: Option<String>,
    /// True once both ends are connected.
    pub established: bool,
    /// Bytes so far.
    pub bytes: FlowBytes,
    /// Age, milliseconds.
    pub age_ms: u64,
}

/// One open flow.
#[derive(Debug)]
pub(super) struct LiveFlow {
    pub(super) story: Story,
    pub(super) pod: Arc<Pod>,
    /// The identity its client proved; inbound through the tunnel only.
    pub(super) peer: Option<SpiffeId>,
    /// What its CONNECT asked for; inbound through the tunnel only.
    pub(super) authority: Option<Authority>,
    rule: Option<RuleRef>,
    /// True when the engine's `app` socket is the client's.
    app_is_client: bool,
    established: bool,
    /// Its opening was reported, and so its end will be. Without room for the report it is tried again.
    announced: bool,
    reported: FlowBytes,
    /// The rule for which it is being cut.
    cut_by: Option<RuleRef>,
    /// Why it is about to end, in words; said in the same turn as its end.
    detail: Option<Arc<str>>,
    _held: Held,
}

/// What a flow holds for as long as it lasts, and gives back by being dropped.
#[derive(Debug)]
#[expect(dead_code, reason = "held, not read")]
pub(super) struct Held {
    /// Its place among its pod's flows.
    pub(super) slot: FlowSlot,
    /// Its client's port; captured plaintext only.
    pub(super) client_port: Option<PlaintextClient>,
}

impl LiveFlow {
    pub(super) fn new(
        story: Story,
        pod: Arc<Pod>,
        peer: Option<SpiffeId>,
        rule: Option<RuleRef>,
        held: Held,
    ) -> Self {
        let app_is_client = story.flow.direction != Direction::InboundTunnel;
        Self {
            story,
            pod,
            peer,
            authority: None,
            rule,
            app_is_client,
            established: false,
            announced: false,
            reported: FlowBytes::default(),
            cut_by: None,
            detail: None,
            _held: held,
        }
    }

    /// The authority it was asked for by.
    pub(super) fn asked_as(mut self, authority: Option<Authority>) -> Self {
        self.authority = authority;
        self
    }

    /// What a predecessor knew of it.
    pub(super) fn handed_over(
        mut self,
        (established, announced): (bool, bool),
        reported: FlowBytes,
        cut_by: Option<RuleRef>,
    ) -> Self {
        (self.established, self.announced) = (established, announced);
        (self.reported, self.cut_by) = (reported, cut_by);
        self
    }

    const fn bytes(&self, relay: RelayBytes) -> FlowBytes {
        if self.app_is_client {
            FlowBytes { client_to_server: relay.from_app, server_to_client: relay.to_app }
        } else {
            FlowBytes { client_to_server: relay.to_app, server_to_client: relay.from_app }
        }
    }

    fn view(&self, bytes: RelayBytes, now: Instant) -> ConnectionView {
        let Story { flow, facts, path, .. } = &self.story;
        let age = now.saturating_duration_since(flow.accepted_at);
        ConnectionView {
            id: flow.id.to_string(),
            direction: flow.direction,
            pod: flow.pod.clone(),
            pod_namespace: Arc::clone(&self.pod.sockets.namespace),
            pod_name: Arc::clone(&self.pod.sockets.name),
            client: flow.client.addr(),
            destination: flow.orig_dst.addr(),
            source_principal: facts.source_principal.clone(),
            destination_principal: facts.destination_principal.clone(),
            service: facts.service.as_ref().map(|service| service.hostname.to_string()),
            path: *path,
            rule: self.rule.as_ref().map(ToString::to_string),
            established: self.established,
            bytes: self.bytes(bytes),
            age_ms: u64::try_from(age.as_millis()).unwrap_or(u64::MAX),
        }
    }
}

/// A connection that goes to a pod by a tunnel.
#[derive(Clone, Copy, Debug)]
pub(super) struct ToPod {
    /// The client's namespace, and its address.
    pub(super) cookie: u64,
    pub(super) client: IpAddr,
    pub(super) dialled: SocketAddr,
    pub(super) pod_ip: IpAddr,
    /// `dialled` is a service's virtual address.
    pub(super) by_service: bool,
}

/// The open flows, in order of their relays.
pub(super) struct FlowTable {
    flows: BTreeMap<RelayId, LiveFlow>,
    by_pod: BTreeMap<PodKey, usize>,
    sink: Arc<dyn FlowSink>,
}

impl FlowTable {
    pub(super) const fn new(sink: Arc<dyn FlowSink>) -> Self {
        Self { flows: BTreeMap::new(), by_pod: BTreeMap::new(), sink }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.flows.is_empty()
    }

    /// A flow has been given to the engine.
    pub(super) fn opened(&mut self, relay: RelayId, flow: LiveFlow) {
        *self.by_pod.entry(flow.pod.key).or_default() += 1;
        self.flows.insert(relay, flow);
    }

    /// All flows, for another process.
    pub(super) fn written(&self, parts: &mut Parts, now: Instant) -> Vec<FlowState> {
        let write = |(relay, flow): (&RelayId, &LiveFlow)| FlowState {
            relay: relay.get(),
            pod: flow.pod.key.0,
            story: parts.story(&flow.story, now),
            peer: flow.peer.clone(),
            asked: flow.authority.clone(),
            rule: flow.rule.clone(),
            cut_by: flow.cut_by.clone(),
            established: flow.established,
            announced: flow.announced,
            reported: flow.reported,
        };
        self.flows.iter().map(write).collect()
    }

    /// A flow of a predecessor; nothing is reported before [`announce`](Self::announce).
    pub(super) fn take_over(&mut self, relay: RelayId, flow: LiveFlow) {
        self.opened(relay, flow);
    }

    /// Reports that the flows taken over are this process's.
    pub(super) fn announce(&self) {
        for flow in self.flows.values().filter(|flow| flow.announced) {
            let facts = Arc::clone(&flow.story.facts);
            let (path, bytes) = (flow.story.path, flow.reported);
            self.sink.report(FlowEvent::TakenOver { facts, path, bytes });
        }
    }

    /// Forgets all flows without a report: another process makes it.
    pub(super) fn forget(&mut self) {
        self.flows.clear();
        self.by_pod.clear();
    }

    /// A flow was refused before the engine had it.
    pub(super) fn refused(&self, story: Story, refusal: Refusal, now: Instant) {
        let Refusal { reason, rule, detail } = refusal;
        let duration = now.saturating_duration_since(story.flow.accepted_at);
        let record = story.end(reason, rule.as_ref(), detail, FlowBytes::default(), duration);
        self.sink.report(FlowEvent::Closed {
            record: Box::new(record),
            unreported: FlowBytes::default(),
            was_open: false,
        });
    }

    /// Reports what matched in audit mode or dry run.
    pub(super) fn note(&self, flow: &mesh_model::Flow, notes: Vec<Note>) {
        for note in notes {
            self.sink.report(FlowEvent::Noted { flow: flow.id, pod: flow.pod.clone(), note });
        }
    }

    /// Reports a connection that did not become a flow.
    pub(super) fn denied(&self, denial: EarlyDenial) {
        self.sink.report(FlowEvent::Denied(denial));
    }

    /// Both ends are connected.
    pub(super) fn established(
        &mut self,
        relay: RelayId,
        proved: Option<&SpiffeId>,
        baggage: Option<&str>,
    ) {
        let Some(flow) = self.flows.get_mut(&relay) else { return };
        flow.established = true;
        flow.story.connected(proved, baggage);
        let (facts, path) = (Arc::clone(&flow.story.facts), flow.story.path);
        flow.announced = self.sink.report(FlowEvent::Opened { facts, path });
    }

    /// A pod's own connection that goes to a pod by a tunnel, dialled by that one's address or by a service's.
    pub(super) fn to_pod(&self, relay: RelayId) -> Option<ToPod> {
        let LiveFlow { story, pod, .. } = self.flows.get(&relay)?;
        let resolved = story.resolved.as_ref()?;
        let dialled = story.flow.orig_dst.addr();
        match &resolved.route {
            Route::Tunnel(route) => {
                let pod_ip = route.next_hop.ip();
                let by_service = pod_ip != dialled.ip();
                (!by_service || (resolved.service.is_some() && route.gateway.is_none())).then(
                    || {
                        let client = story.flow.client.ip();
                        ToPod { cookie: pod.sockets.cookie, client, dialled, pod_ip, by_service }
                    },
                )
            }
            Route::ViaWaypoint { .. } | Route::Passthrough { .. } | Route::Deliver { .. } => None,
        }
    }

    /// The engine has ended a flow.
    pub(super) fn closed(
        &mut self,
        relay: RelayId,
        reason: CloseReason,
        bytes: RelayBytes,
        now: Instant,
    ) {
        let Some(flow) = self.flows.remove(&relay) else { return };
        if let Some(count) = self.by_pod.get_mut(&flow.pod.key) {
            *count -= 1;
            if *count == 0 {
                self.by_pod.remove(&flow.pod.key);
            }
        }
        let bytes = flow.bytes(bytes);
        let unreported = bytes.since(flow.reported);
        let duration = now.saturating_duration_since(flow.story.flow.accepted_at);
        let rule = flow.cut_by.or(flow.rule);
        let record = flow.story.end(reason, rule.as_ref(), flow.detail, bytes, duration);
        self.sink.report(FlowEvent::Closed {
            record: Box::new(record),
            unreported,
            was_open: flow.announced,
        });
    }

    /// Remembers the rule for which a flow is about to be cut.
    pub(super) fn cut_by(&mut self, relay: RelayId, rule: Option<RuleRef>) {
        if let Some(flow) = self.flows.get_mut(&relay) {
            flow.cut_by = rule;
        }
    }

    /// Remembers why a flow is about to end.
    pub(super) fn explain(&mut self, relay: RelayId, detail: &Arc<str>) {
        if let Some(flow) = self.flows.get_mut(&relay) {
            flow.detail = Some(Arc::clone(detail));
        }
    }

    /// Reports the bytes that open flows moved.
    pub(super) fn report_progress(&mut self, count: impl Fn(RelayId) -> Option<RelayBytes>) {
        for (relay, flow) in &mut self.flows {
            let facts = Arc::clone(&flow.story.facts);
            if flow.established && !flow.announced {
                let (facts, path) = (Arc::clone(&facts), flow.story.path);
                flow.announced = self.sink.report(FlowEvent::Opened { facts, path });
            }
            let Some(bytes) = count(*relay).map(|bytes| flow.bytes(bytes)) else { continue };
            let moved = bytes.since(flow.reported);
            if flow.announced
                && moved != FlowBytes::default()
                && self.sink.report(FlowEvent::Moved { facts, bytes: moved })
            {
                flow.reported = bytes;
            }
        }
    }

    /// At most `limit` flows behind `cursor`, in order.
    pub(super) fn behind(
        &self,
        cursor: Option<RelayId>,
        limit: usize,
    ) -> impl Iterator<Item = (RelayId, &LiveFlow)> {
        let from = cursor.map_or(Bound::Unbounded, Bound::Excluded);
        self.flows.range((from, Bound::Unbounded)).take(limit).map(|(id, flow)| (*id, flow))
    }

    /// Every flow.
    pub(super) fn all(&self) -> Vec<RelayId> {
        self.flows.keys().copied().collect()
    }

    /// The flows of `pod`.
    pub(super) fn of_pod(&self, pod: PodKey) -> Vec<RelayId> {
        self.flows.iter().filter(|(_, flow)| flow.pod.key == pod).map(|(id, _)| *id).collect()
    }

    /// How many flows of `pod` are open.
    pub(super) fn count_of(&self, pod: PodKey) -> usize {
        self.by_pod.get(&pod).copied().unwrap_or(0)
    }

    /// The open flows, for people.
    pub(super) fn views(
        &self,
        count: impl Fn(RelayId) -> Option<RelayBytes>,
        now: Instant,
    ) -> Vec<ConnectionView> {
        self.flows.iter().map(|(id, flow)| flow.view(count(*id).unwrap_or_default(), now)).collect()
    }
}

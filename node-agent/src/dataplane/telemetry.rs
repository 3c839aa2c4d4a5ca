//! What is said about a flow: its labels, its record, and what it tells the other side about itself.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use mesh_authorize::{PolicyOrigin, RuleRef};
use mesh_model::{CloseReason, Direction, Flow, NetworkId, SpiffeId, Workload, ports};
use mesh_resolve::{Authority, ResolvedFlow, Route, TunnelRoute};
use mesh_telemetry::{
    Baggage, FlowBytes, FlowFacts, FlowPath, FlowRecord, Forwarded, PolicyRef, ServiceLabels,
    TraceParent, WorkloadLabels,
};
use mesh_tunnel::{ConnectHead, ResponseHead};

use crate::dataplane::shared::Snapshot;

/// What a CONNECT says about its source; bounded, and not to be trusted.
#[derive(Clone, Debug, Default)]
pub(super) struct PeerHead {
    pub(super) baggage: Option<Baggage>,
    pub(super) forwarded: Forwarded,
    pub(super) trace: Option<TraceParent>,
    /// The client's network, when it came through a gateway.
    pub(super) network: Option<String>,
}

impl PeerHead {
    pub(super) fn read(head: &ConnectHead) -> Self {
        let forwarded =
            head.forwarded.as_deref().map(str::as_bytes).map(Forwarded::parse).unwrap_or_default();
        Self {
            baggage: head.baggage.as_deref().map(|text| Baggage::parse([text.as_bytes()])),
            forwarded,
            trace: head.traceparent.as_deref().and_then(|text| text.parse().ok()),
            network: head.forwarded_network.clone(),
        }
    }

    /// True when the client is on another network than `own`: the address it comes from is a gateway's, not its own.
    /// Source: wire.md §1.3.
    pub(super) fn came_through_gateway(&self, own: &NetworkId) -> bool {
        self.network.as_ref().is_some_and(|network| !network.eq_ignore_ascii_case(own.as_str()))
    }
}

/// The CONNECT of an outbound flow. Source: wire.md §1.3.
pub(super) fn connect_head(
    resolved: &ResolvedFlow,
    route: &TunnelRoute,
    trace: TraceParent,
) -> ConnectHead {
    let forwarded = Forwarded {
        client: Some(resolved.flow.client.addr()),
        host: resolved.service.as_ref().map(|service| Arc::clone(&service.key.hostname)),
    };
    ConnectHead {
        authority: route.authority.to_string(),
        baggage: Some(Baggage::from(&*resolved.local).to_string()),
        forwarded: Some(forwarded.to_string()),
        traceparent: Some(trace.to_string()),
        forwarded_network: route.gateway.as_ref().map(|_| resolved.local.network.as_str().into()),
        ..ConnectHead::default()
    }
}

/// What goes with a 200: the destination describes itself. Source: wire.md §1.5.
pub(super) fn response_head(local: &Workload) -> ResponseHead {
    ResponseHead { baggage: Some(Baggage::from(local).to_string()), ..ResponseHead::default() }
}

/// Everything a flow's record is made of, while it lasts.
#[derive(Clone, Debug)]
pub(super) struct Story {
    pub(super) flow: Flow,
    pub(super) resolved: Option<ResolvedFlow>,
    pub(super) facts: Arc<FlowFacts>,
    pub(super) path: FlowPath,
    pub(super) authority: Option<Arc<str>>,
    pub(super) trace: Option<TraceParent>,
}

impl Story {
    /// A pod's own connection.
    pub(super) fn outbound(
        flow: Flow,
        resolved: Option<ResolvedFlow>,
        trace: Option<TraceParent>,
    ) -> Self {
        let tunnel = resolved.as_ref().and_then(|resolved| resolved.route.tunnel());
        let path = match (&resolved, tunnel) {
            (_, Some(_)) => FlowPath::Tunnel,
            (Some(_), None) => FlowPath::Plaintext,
            (None, None) => FlowPath::None,
        };
        let authority = tunnel.map(|route| route.authority.to_string().into());
        let facts = Arc::new(facts(&flow, resolved.as_ref(), None, None));
        Self { flow, resolved, facts, path, authority, trace }
    }

    /// A captured plaintext connection to a pod.
    pub(super) fn plaintext(flow: Flow, resolved: Option<ResolvedFlow>) -> Self {
        let path = if resolved.is_some() { FlowPath::Plaintext } else { FlowPath::None };
        let facts = Arc::new(facts(&flow, resolved.as_ref(), None, None));
        Self { flow, resolved, facts, path, authority: None, trace: None }
    }

    /// A CONNECT to a pod.
    pub(super) fn request(
        flow: Flow,
        resolved: Option<ResolvedFlow>,
        peer: &SpiffeId,
        authority: Option<&Authority>,
        head: &PeerHead,
        snapshot: &Snapshot,
    ) -> Self {
        let mut facts = facts(&flow, resolved.as_ref(), Some(peer), head.baggage.as_ref());
        if let (None, Some(host), Some(resolved)) =
            (&facts.service, &head.forwarded.host, &resolved)
        {
            facts.service = snapshot
                .index
                .services_by_hostname(host)
                .find(|service| snapshot.index.is_endpoint(&service.key, &resolved.local.uid))
                .map(|service| ServiceLabels::from(&**service));
        }
        Self {
            flow,
            resolved,
            facts: Arc::new(facts),
            path: FlowPath::Tunnel,
            authority: authority.map(|authority| authority.to_string().into()),
            trace: head.trace,
        }
    }

    /// The far end of an outbound flow is connected: who it proved to be, and what it says about itself.
    pub(super) fn connected(&mut self, proved: Option<&SpiffeId>, baggage: Option<&str>) {
        if self.flow.direction != Direction::Outbound || self.path != FlowPath::Tunnel {
            return;
        }
        let facts = Arc::make_mut(&mut self.facts);
        if let Some(proved) = proved {
            facts.destination_principal = Some(proved.clone());
        }
        if let (None, Some(baggage)) = (&facts.destination, baggage) {
            facts.destination = Some(WorkloadLabels::from(&Baggage::parse([baggage.as_bytes()])));
        }
    }

    /// The flow has ended.
    pub(super) fn end(
        self,
        reason: CloseReason,
        rule: Option<&RuleRef>,
        detail: Option<Arc<str>>,
        bytes: FlowBytes,
        duration: Duration,
    ) -> FlowRecord {
        FlowRecord {
            id: self.flow.id,
            pod: self.flow.pod.clone(),
            direction: self.flow.direction,
            source: self.flow.client.addr(),
            destination: self.destination(),
            authority: self.authority,
            facts: Arc::unwrap_or_clone(self.facts),
            path: self.path,
            bytes,
            duration,
            reason,
            policy: rule.map(policy_ref),
            detail,
            trace: self.trace,
        }
    }

    /// What was dialled on the wire.
    fn destination(&self) -> SocketAddr {
        let orig_dst = self.flow.orig_dst.addr();
        match self.flow.direction {
            Direction::InboundTunnel => SocketAddr::new(orig_dst.ip(), ports::HBONE),
            Direction::InboundPlaintext => orig_dst,
            Direction::Outbound => {
                self.resolved.as_ref().map_or(orig_dst, |resolved| match &resolved.route {
                    Route::Tunnel(_) | Route::ViaWaypoint { .. } | Route::Passthrough { .. } => {
                        resolved.route.next_hop()
                    }
                    Route::Deliver { .. } => orig_dst,
                })
            }
        }
    }
}

/// A rule, as metrics and logs name it.
pub(crate) fn policy_ref(rule: &RuleRef) -> PolicyRef {
    let PolicyOrigin { kind, namespace, name, unreadable } = &rule.origin;
    PolicyRef {
        policy: format!("{kind} {namespace}/{name}").into(),
        problem: unreadable.clone(),
        rule: rule.rule_index,
    }
}

/// The labels of a connection on the direct path. The node has proved both identities, without TLS.
pub(super) fn direct_facts(
    resolved: &ResolvedFlow,
    source: &SpiffeId,
    destination: &SpiffeId,
) -> FlowFacts {
    FlowFacts {
        source_principal: Some(source.clone()),
        destination_principal: Some(destination.clone()),
        mutual_tls: false,
        ..facts(&resolved.flow, Some(resolved), Some(source), None)
    }
}

/// The labels of a flow. What the index knows about the source goes before what the source says.
fn facts(
    flow: &Flow,
    resolved: Option<&ResolvedFlow>,
    proved: Option<&SpiffeId>,
    baggage: Option<&Baggage>,
) -> FlowFacts {
    let mut facts = FlowFacts::unknown(flow.direction.reporter());
    facts.source_principal = proved.cloned();
    let Some(resolved) = resolved else {
        facts.source = baggage.map(WorkloadLabels::from);
        return facts;
    };
    let labels = |workload: &Arc<Workload>| WorkloadLabels::from(&**workload);
    facts.source = resolved.source().map(labels).or_else(|| baggage.map(WorkloadLabels::from));
    facts.destination = resolved.destination().map(labels);
    facts.service = resolved.service.as_deref().map(ServiceLabels::from);
    match flow.direction {
        Direction::Outbound => {
            if let Some(route) = resolved.route.tunnel() {
                facts.mutual_tls = true;
                facts.source_principal = resolved.local.identity().ok();
                facts.destination_principal = match route.expected.as_slice() {
                    [only] => Some(only.clone()),
                    _ => None,
                };
            }
        }
        Direction::InboundTunnel => {
            facts.mutual_tls = true;
            facts.destination_principal = resolved.local.identity().ok();
        }
        Direction::InboundPlaintext => {}
    }
    facts
}

//! Flows to other networks: the tunnel to the destination inside the tunnel to the gateway of its network.
//!
//! ```text
//! app ── stream ── inner tunnel ── far ═ near ── stream ── outer tunnel ══► gateway ──► endpoint's agent
//!        of the flow             a socket pair   of the carrier
//! ```
//! To the engine both are ordinary: the inner tunnel is dialled over one end of a socket pair, and a relay of the outer
//! tunnel, the carrier, has the other end for its application. The pair's buffers carry back-pressure from one to the other,
//! and its end in either direction. That a reset looks like an end in it does no harm: the inner tunnel is TLS, and one that
//! ends without its last words resets the flow.
//!
//! An inner tunnel serves one flow: its key names the flow beside the workload, so that the pool finds it for nobody else,
//! and it is retired when the flow ends. Source: wire.md §1.8, "inner connections are never pooled".

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use mesh_authorize::{Decision, authorize_egress};
use mesh_model::{CloseReason, FlowId, WorkloadUid};
use mesh_net::driver::ops::Ops;
use mesh_net::socket;
use mesh_resolve::ResolvedFlow;
use mesh_tunnel::{ConnectHead, DialId, RelayId, Retire, TunnelKey};
use mio::net::TcpStream;

use crate::dataplane::outbound::connect_failure;
use crate::dataplane::shared::Snapshot;
use crate::dataplane::worker::{NodeWorker, Refusal};

/// A flow to another network, and what its carrier is opened with.
#[derive(Debug)]
pub(super) struct Crossing {
    /// The flow, judged again whenever a carrier is opened for it.
    pub(super) resolved: ResolvedFlow,
    /// The tunnel to the gateway.
    pub(super) key: TunnelKey,
    /// What the gateway is asked for.
    pub(super) head: ConnectHead,
    /// The workload that is meant at the far end.
    pub(super) target: WorkloadUid,
}

/// The crossings of one worker.
#[derive(Debug, Default)]
pub(super) struct Crossings {
    /// By the uid in the inner tunnel's key.
    by_lane: BTreeMap<WorkloadUid, Crossing>,
    lanes: BTreeMap<RelayId, WorkloadUid>,
    /// Relays of outer tunnels, each opened for an inner one.
    carriers: BTreeMap<RelayId, Carrier>,
}

#[derive(Debug)]
struct Carrier {
    /// The dial of the inner tunnel that it was opened for.
    dial: DialId,
    /// Why it is about to end, in words.
    detail: Option<Arc<str>>,
}

/// The uid in the key of an inner tunnel, which is its flow's alone.
pub(super) fn lane(target: &WorkloadUid, flow: FlowId) -> WorkloadUid {
    WorkloadUid::new(&format!("{target}#{flow}"))
}

impl Crossings {
    /// The flow `relay` has been given to the engine under `lane`.
    pub(super) fn begin(&mut self, relay: RelayId, lane: WorkloadUid, crossing: Crossing) {
        self.lanes.insert(relay, lane.clone());
        self.by_lane.insert(lane, crossing);
    }

    /// The workload that a tunnel's key means.
    pub(super) fn target<'a>(&'a self, uid: &'a WorkloadUid) -> &'a WorkloadUid {
        self.by_lane.get(uid).map_or(uid, |crossing| &crossing.target)
    }

    /// Remembers why `relay` is about to end; false if it is no carrier.
    pub(super) fn explain(&mut self, relay: RelayId, detail: &Arc<str>) -> bool {
        let Some(carrier) = self.carriers.get_mut(&relay) else { return false };
        carrier.detail = Some(Arc::clone(detail));
        true
    }

    /// The relays of outer tunnels that carry inner ones.
    pub(super) fn carriers(&self) -> impl Iterator<Item = RelayId> + '_ {
        self.carriers.keys().copied()
    }
}

/// True for what [`lane`] makes; no workload's own name has its mark.
pub(super) fn is_lane(target: &WorkloadUid) -> bool {
    target.as_str().contains('#')
}

impl NodeWorker {
    /// Opens a carrier for the inner tunnel that `dial` is for, and gives the end to shake hands over. None: the tunnel is
    /// not an inner one.
    pub(super) fn carry(
        &mut self,
        ops: &mut Ops,
        snapshot: &Snapshot,
        dial: DialId,
        key: &TunnelKey,
    ) -> Option<Result<TcpStream, Refusal>> {
        let crossing = self.crossings.by_lane.get(&key.target_uid)?;
        let opened = open_carrier(ops, snapshot, crossing);
        Some(opened.map(|(carrier, far)| {
            self.crossings.carriers.insert(carrier, Carrier { dial, detail: None });
            far
        }))
    }

    /// A relay has ended. True if it was a carrier, which is no flow.
    ///
    /// An inner tunnel that still waits for its handshake fails for the carrier's reason; one that is up sees its end.
    pub(super) fn carrier_closed(
        &mut self,
        ops: &mut Ops,
        relay: RelayId,
        reason: CloseReason,
    ) -> bool {
        let Some(Carrier { dial, detail }) = self.crossings.carriers.remove(&relay) else {
            return false;
        };
        // The gateway took the stream and ended it at once.
        let reason =
            if reason == CloseReason::Complete { CloseReason::PeerRefused } else { reason };
        self.fail_dial(ops, dial, Refusal { detail, ..reason.into() });
        true
    }

    /// A flow has ended: so may its inner tunnel.
    pub(super) fn crossing_closed(&mut self, ops: &mut Ops, relay: RelayId) {
        if let Some(lane) = self.crossings.lanes.remove(&relay) {
            self.crossings.by_lane.remove(&lane);
            ops.engine.retire(Retire::Target(lane), ops.now());
        }
    }
}

/// Spends a permit of the flow's on a stream to the gateway.
fn open_carrier(
    ops: &mut Ops,
    snapshot: &Snapshot,
    crossing: &Crossing,
) -> Result<(RelayId, TcpStream), Refusal> {
    let permit = match authorize_egress(&snapshot.policies, &crossing.resolved).decision {
        Decision::Allow(permit) => permit,
        Decision::Deny(denial) => return Err(denial.into()),
    };
    if !ops.has_room(2) {
        return Err(CloseReason::Overloaded.into());
    }
    let refused = |error: io::Error| Refusal::new(connect_failure(&error), &error);
    let (near, far) = socket::pair().map_err(refused)?;
    let near = ops.add(near).map_err(refused)?;
    let (key, head) = (crossing.key.clone(), crossing.head.clone());
    let carrier = ops.engine.open(permit, key, head, near, ops.now());
    ops.engage(near);
    Ok((carrier, far))
}

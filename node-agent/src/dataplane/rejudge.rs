//! Live flows are judged again when policies, trust or the pod's own workload change, and cut when now denied.
//!
//! Never all at once: each turn of the worker takes a batch, so that thousands of flows do not stall the byte path.
//! A flow opened while a round is under way was judged by the new snapshot already, or is behind the cursor.

use std::time::{Duration, Instant, SystemTime};

use mesh_authorize::{Decision, Denial, RuleRef, authorize, authorize_egress};
use mesh_identity::PeerRejection;
use mesh_model::{CloseReason, Direction};
use mesh_net::driver::ops::Ops;
use mesh_resolve::resolve_inbound;
use mesh_tunnel::{RelayId, Retire, TunnelId};

use crate::dataplane::flows::LiveFlow;
use crate::dataplane::shared::{Changed, Snapshot};
use crate::dataplane::worker::NodeWorker;

/// Flows judged per turn; some hundred nanoseconds each.
const FLOWS_PER_TURN: usize = 512;
/// Tunnels whose certificates are judged per turn; some hundred microseconds each.
const TUNNELS_PER_TURN: usize = 8;

/// How often the wall clock is looked at while there are tunnels: it may have been set.
const CLOCK_CHECK_INTERVAL: Duration = Duration::from_secs(60);

/// How far the rounds under way have come.
#[derive(Debug, Default)]
pub(super) struct Rejudge {
    flows: Option<Cursor<RelayId>>,
    tunnels: Option<Cursor<TunnelId>>,
    due: Option<Instant>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cursor<T> {
    Begin,
    Behind(T),
}

impl<T: Copy> Cursor<T> {
    const fn position(self) -> Option<T> {
        match self {
            Self::Begin => None,
            Self::Behind(id) => Some(id),
        }
    }
}

impl Rejudge {
    /// When the next batch is due; now, while a round is under way.
    pub(super) const fn due(&self) -> Option<Instant> {
        self.due
    }

    pub(super) const fn is_pending(&self) -> bool {
        self.due.is_some()
    }
}

impl NodeWorker {
    /// Begins the rounds that a change asks for, anew if one is under way.
    pub(super) fn begin_rejudging(&mut self, ops: &mut Ops, changed: Changed) {
        let snapshot = self.snapshot();
        if changed.has(Changed::IDENTITIES) {
            self.retire_replaced_identities(ops, &snapshot);
        }
        if changed.has(Changed::INDEX) {
            self.retire_vanished_targets(ops, &snapshot);
        }
        if changed.has(Changed::POLICIES) || changed.has(Changed::INDEX) {
            self.rejudge.flows = Some(Cursor::Begin);
        }
        if changed.has(Changed::TRUST) {
            self.rejudge.tunnels = Some(Cursor::Begin);
        }
        if self.rejudge.flows.is_some() || self.rejudge.tunnels.is_some() {
            self.rejudge.due = Some(ops.now());
        }
    }

    /// Judges one batch of flows and one of tunnels.
    pub(super) fn rejudge_some(&mut self, ops: &mut Ops) {
        let snapshot = self.snapshot();
        if let Some(cursor) = self.rejudge.flows {
            self.rejudge.flows = self.rejudge_flows(ops, &snapshot, cursor);
        }
        if let Some(cursor) = self.rejudge.tunnels {
            self.rejudge.tunnels = self.rejudge_tunnels(ops, &snapshot, cursor);
        }
        let pending = self.rejudge.flows.is_some() || self.rejudge.tunnels.is_some();
        self.rejudge.due = pending.then_some(ops.now());
    }

    fn rejudge_flows(
        &mut self,
        ops: &mut Ops,
        snapshot: &Snapshot,
        cursor: Cursor<RelayId>,
    ) -> Option<Cursor<RelayId>> {
        let mut last = None;
        let mut cuts: Vec<(RelayId, CloseReason, Option<RuleRef>)> = Vec::new();
        let mut judged = 0;
        for (relay, flow) in self.flows.behind(cursor.position(), FLOWS_PER_TURN) {
            judged += 1;
            last = Some(relay);
            if let Some(denial) = judge_again(snapshot, flow) {
                cuts.push((relay, live_reason(denial.reason), denial.rule));
            }
        }
        self.stats.rejudged(judged);
        for (relay, reason, rule) in cuts {
            self.stats.live_cut();
            self.flows.cut_by(relay, rule);
            ops.engine.cut(relay, reason, ops.now());
        }
        last.map(Cursor::Behind)
    }

    fn rejudge_tunnels(
        &mut self,
        ops: &mut Ops,
        snapshot: &Snapshot,
        cursor: Cursor<TunnelId>,
    ) -> Option<Cursor<TunnelId>> {
        let now = SystemTime::now();
        let mut last = None;
        let mut refused: Vec<(TunnelId, PeerRejection)> = Vec::new();
        for (tunnel, certificate) in self.tunnels.behind(cursor.position(), TUNNELS_PER_TURN) {
            last = Some(tunnel);
            if let Err(rejection) = certificate.is_trusted(&snapshot.trust, now) {
                refused.push((tunnel, rejection));
            }
        }
        for (tunnel, rejection) in refused {
            tracing::info!(tunnel = tunnel.get(), error = %rejection, "tunnel's peer is trusted no more");
            for relay in self.flows.all() {
                if ops.engine.relay_tunnel(relay) == Some(tunnel) {
                    self.stats.live_cut();
                    ops.engine.cut(relay, rejection.close_reason(), ops.now());
                }
            }
            for carrier in self.crossings.carriers().collect::<Vec<_>>() {
                if ops.engine.relay_tunnel(carrier) == Some(tunnel) {
                    ops.engine.cut(carrier, rejection.close_reason(), ops.now());
                }
            }
            self.tunnels.distrust(tunnel);
            ops.engine.retire(Retire::Tunnel(tunnel), ops.now());
        }
        last.map(Cursor::Behind)
    }

    /// Tunnels under a certificate that was replaced take no new streams; what they carry goes on.
    fn retire_replaced_identities(&mut self, ops: &mut Ops, snapshot: &Snapshot) {
        self.tls.forget_replaced(snapshot);
        let in_force = self.tls.stamps();
        for tunnel in self.tunnels.proved_by(|stamp| !in_force.contains(&stamp)) {
            ops.engine.retire(Retire::Tunnel(tunnel), ops.now());
        }
    }

    /// Tunnels of which a certificate has ended take no new streams; what they carry goes on.
    ///
    /// Looked at again when the next one ends, and every minute in case the wall clock was set.
    pub(super) fn retire_ended(&mut self, ops: &mut Ops) {
        let wall = SystemTime::now();
        while let Some(tunnel) = self.tunnels.pop_ended(wall) {
            tracing::debug!(tunnel = tunnel.get(), "a certificate of a tunnel has ended");
            ops.engine.retire(Retire::Tunnel(tunnel), ops.now());
        }
        self.look_at_ends = self.tunnels.next_end().map(|end| {
            let left = end.duration_since(wall).unwrap_or_default();
            ops.now() + left.min(CLOCK_CHECK_INTERVAL)
        });
    }

    /// Tunnels to workloads that are gone take no new streams; what they carry goes on until it ends.
    fn retire_vanished_targets(&self, ops: &mut Ops, snapshot: &Snapshot) {
        for target in self.tunnels.targets() {
            if snapshot.index.workload(self.crossings.target(&target)).is_none() {
                ops.engine.retire(Retire::Target(target), ops.now());
            }
        }
    }
}

/// The verdict of today on a flow of yesterday; none when it may go on.
///
/// A live connection cannot be sent elsewhere, so where it goes is not a question; but what is known about its ends is
/// today's: the pod's workload, and for inbound flows the waypoint that it must have come through. When the pod's
/// workload is gone the pod is ending, and its flows may end with it.
fn judge_again(snapshot: &Snapshot, live: &LiveFlow) -> Option<Denial> {
    let resolved = live.story.resolved.as_ref()?;
    let flow = &live.story.flow;
    let mut current = resolved.clone();
    if let Some(local) = live.pod.workload(snapshot) {
        if flow.direction != Direction::Outbound
            && let Ok(resolved) = resolve_inbound(
                &snapshot.index,
                &snapshot.settings,
                flow,
                &local,
                live.authority.as_ref(),
            )
        {
            current = resolved;
        }
        current.local = local;
    }
    let verdict = match flow.direction {
        Direction::Outbound => authorize_egress(&snapshot.policies, &current),
        Direction::InboundTunnel => authorize(&snapshot.policies, &current, live.peer.as_ref()),
        Direction::InboundPlaintext => authorize(&snapshot.policies, &current, None),
    };
    match verdict.decision {
        Decision::Allow(_permit) => None,
        // Where it goes is not a question any more.
        Decision::Deny(denial) if denial.reason == CloseReason::UnknownDestination => None,
        Decision::Deny(denial) => Some(denial),
    }
}

/// A live flow that is denied was allowed before: what changed is the policy.
fn live_reason(reason: CloseReason) -> CloseReason {
    let of_policy =
        [CloseReason::PolicyDenied, CloseReason::EgressDenied, CloseReason::PolicyMissing];
    if of_policy.contains(&reason) { CloseReason::PolicyChanged } else { reason }
}

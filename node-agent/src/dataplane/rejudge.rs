//! Live flows are judged again when policies, trust or the pod's own workload change, and cut when now denied.
//!
//! Never all at once: each turn of the worker takes a batch, so that thousands of flows do not stall the byte path.
//! A flow opened while a round is under way was judged by the new snapshot already, or is still to be met.

use std::time::{Duration, Instant, SystemTime};

use mesh_authorize::{Decision, Denial, RuleRef, authorize, authorize_egress};
use mesh_identity::PeerRejection;
use mesh_model::{CloseReason, Direction};
use mesh_net::driver::ops::Ops;
use mesh_resolve::resolve_inbound;
use mesh_tunnel::{RelayId, Retire, TunnelId};

use crate::dataplane::flows::LiveFlow;
use crate::dataplane::shared::{Changed, Snapshot};
use crate::dataplane::stats::TunnelRole;
use crate::dataplane::worker::{NodeWorker, Refusal};
use crate::error::detail;

/// Flows judged per turn; some hundred nanoseconds each.
const FLOWS_PER_TURN: usize = 512;
/// Tunnels whose certificates are judged per turn; some hundred microseconds each.
const TUNNELS_PER_TURN: usize = 8;

/// How often the wall clock is looked at while there are tunnels: it may have been set.
const CLOCK_CHECK_INTERVAL: Duration = Duration::from_secs(60);

/// How far the rounds under way have come.
#[derive(Debug, Default)]
pub(super) struct Rejudge {
    flows: Option<Round<RelayId>>,
    tunnels: Option<Round<TunnelId>>,
    due: Option<Instant>,
    /// When roots or lists were last known to have changed.
    trust_changed: Option<Instant>,
}

/// A walk over everything there is, in the order of ids. A change under way does not send it back: it goes on to the end,
/// then from the beginning to where it was, so that however often something changes everything has its turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Round<T> {
    /// The last that was judged; none at the beginning.
    behind: Option<T>,
    /// The last that was judged before the latest change, and has to be again: the walk ends there once it is past the end.
    until: Option<T>,
}

impl<T: Copy + Ord> Round<T> {
    const fn new() -> Self {
        Self { behind: None, until: None }
    }

    /// Sees to it that everything is judged once more from here on.
    fn begin(round: &mut Option<Self>) {
        match round {
            None => *round = Some(Self::new()),
            Some(round) => round.until = round.behind,
        }
    }

    /// The round after a batch of at most `limit`, the last of which was `last`; none when everything was judged.
    fn after(self, last: Option<T>, judged: usize, limit: usize) -> Option<Self> {
        let at_end = judged < limit;
        let passed = |until: T, last: Option<T>| last.is_some_and(|last| last >= until);
        match self.until {
            // On the way from the beginning, or there is no second way to go.
            None if at_end => None,
            None => Some(Self { behind: last, until: None }),
            // On the way to the end: what is left begins anew and ends at `until`.
            Some(until) if self.behind.is_some_and(|behind| behind >= until) => Some(if at_end {
                Self { behind: None, until: Some(until) }
            } else {
                Self { behind: last, until: Some(until) }
            }),
            Some(until) if at_end || passed(until, last) => None,
            Some(until) => Some(Self { behind: last, until: Some(until) }),
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
    /// Begins the rounds that a change asks for; one that is under way goes on, and round once more.
    pub(super) fn begin_rejudging(&mut self, ops: &mut Ops, changed: Changed) {
        let snapshot = self.snapshot();
        if changed.has(Changed::IDENTITIES) {
            self.retire_replaced_identities(ops, &snapshot);
        }
        if changed.has(Changed::INDEX) {
            self.retire_vanished_targets(ops, &snapshot);
        }
        if changed.has(Changed::POLICIES) || changed.has(Changed::INDEX) {
            Round::begin(&mut self.rejudge.flows);
        }
        if changed.has(Changed::TRUST) {
            Round::begin(&mut self.rejudge.tunnels);
            self.rejudge.trust_changed = Some(ops.now());
        }
        if self.rejudge.flows.is_some() || self.rejudge.tunnels.is_some() {
            self.rejudge.due = Some(ops.now());
        }
    }

    /// Judges one batch of flows and one of tunnels.
    pub(super) fn rejudge_some(&mut self, ops: &mut Ops) {
        let snapshot = self.snapshot();
        if let Some(round) = self.rejudge.flows {
            self.rejudge.flows = self.rejudge_flows(ops, &snapshot, round);
        }
        if let Some(round) = self.rejudge.tunnels {
            self.rejudge.tunnels = self.rejudge_tunnels(ops, &snapshot, round);
        }
        let pending = self.rejudge.flows.is_some() || self.rejudge.tunnels.is_some();
        self.rejudge.due = pending.then_some(ops.now());
    }

    fn rejudge_flows(
        &mut self,
        ops: &mut Ops,
        snapshot: &Snapshot,
        round: Round<RelayId>,
    ) -> Option<Round<RelayId>> {
        let mut last = None;
        let mut cuts: Vec<(RelayId, CloseReason, Option<RuleRef>)> = Vec::new();
        let mut judged = 0;
        for (relay, flow) in self.flows.behind(round.behind, FLOWS_PER_TURN) {
            judged += 1;
            last = Some(relay);
            if let Some(denial) = judge_again(snapshot, flow) {
                cuts.push((relay, live_reason(denial.reason), denial.rule));
            }
        }
        self.stats.rejudged(judged);
        let judged = usize::try_from(judged).unwrap_or(usize::MAX);
        for (relay, reason, rule) in cuts {
            self.stats.live_cut();
            self.flows.cut_by(relay, rule);
            ops.engine.cut(relay, reason, ops.now());
        }
        round.after(last, judged, FLOWS_PER_TURN)
    }

    fn rejudge_tunnels(
        &mut self,
        ops: &mut Ops,
        snapshot: &Snapshot,
        round: Round<TunnelId>,
    ) -> Option<Round<TunnelId>> {
        let now = SystemTime::now();
        let (mut last, mut judged) = (None, 0_usize);
        let mut refused: Vec<(TunnelId, PeerRejection)> = Vec::new();
        for (tunnel, certificate) in self.tunnels.behind(round.behind, TUNNELS_PER_TURN) {
            judged += 1;
            last = Some(tunnel);
            if let Err(rejection) = certificate.may_go_on(&snapshot.trust, now) {
                refused.push((tunnel, rejection));
            }
        }
        for (tunnel, rejection) in refused {
            self.distrust(ops, tunnel, &rejection);
        }
        round.after(last, judged, TUNNELS_PER_TURN)
    }

    /// Ends a tunnel whose peer is trusted no more, with all that goes over it or waits to.
    pub(super) fn distrust(&mut self, ops: &mut Ops, tunnel: TunnelId, rejection: &PeerRejection) {
        tracing::info!(tunnel = tunnel.get(), error = %rejection, "tunnel's peer is trusted no more");
        let reason = rejection.close_reason();
        self.tunnels.distrust(tunnel);
        for request in self.take_requests(tunnel) {
            self.refuse_request(ops, request, None, Refusal::new(reason, rejection));
        }
        let detail = detail(rejection);
        for relay in self.flows.all() {
            if ops.engine.relay_tunnel(relay) == Some(tunnel) {
                self.stats.live_cut();
                self.explain(&[relay], &detail);
                ops.engine.cut(relay, reason, ops.now());
            }
        }
        for carrier in self.crossings.carriers().collect::<Vec<_>>() {
            if ops.engine.relay_tunnel(carrier) == Some(tunnel) {
                self.explain(&[carrier], &detail);
                ops.engine.cut(carrier, reason, ops.now());
            }
        }
        ops.engine.retire(Retire::Tunnel(tunnel), ops.now());
    }

    /// Judges a peer again that has just been proved; why it is refused after all.
    ///
    /// Its handshake judged by the roots and lists of its beginning. A change since then has begun a round that did not meet
    /// the tunnel yet; without a change for as long as a handshake may take, there is nothing to judge.
    pub(super) fn judge_proved(
        &mut self,
        ops: &mut Ops,
        (role, tunnel): (TunnelRole, TunnelId),
    ) -> Option<PeerRejection> {
        let changed = self.rejudge.trust_changed?;
        if ops.now().saturating_duration_since(changed) > self.config.limits.handshake_timeout {
            return None;
        }
        let snapshot = self.snapshot();
        let certificate = self.tunnels.certificate(tunnel)?;
        let rejection = certificate.is_trusted(&snapshot.trust, SystemTime::now()).err()?;
        // Besides the tunnel's own end: whoever looks for refused peers looks at handshakes.
        self.stats.handshake_failed(role, rejection.close_reason());
        self.distrust(ops, tunnel, &rejection);
        Some(rejection)
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
pub(super) fn live_reason(reason: CloseReason) -> CloseReason {
    let of_policy =
        [CloseReason::PolicyDenied, CloseReason::EgressDenied, CloseReason::PolicyMissing];
    if of_policy.contains(&reason) { CloseReason::PolicyChanged } else { reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Turns until `round` has met all of `0..count`, with a change every `every` turns; what was judged since the last change.
    fn turns(count: usize, every: usize, limit: usize) -> Vec<usize> {
        let mut round = None;
        let mut judged = Vec::new();
        for turn in 0..10 * count.div_ceil(limit) {
            if turn % every == 0 {
                Round::begin(&mut round);
            }
            let Some(walk) = round else { continue };
            let from = walk.behind.map_or(0, |last: usize| last + 1);
            let batch: Vec<usize> = (from..count).take(limit).collect();
            judged.extend(&batch);
            round = walk.after(batch.last().copied(), batch.len(), limit);
        }
        judged
    }

    #[test]
    fn changes_in_every_turn_leave_nobody_unjudged() {
        for every in [1, 2, 3, 7] {
            let judged = turns(10_000, every, 512);
            let mut met = vec![0; 10_000];
            for one in judged {
                met[one] += 1;
            }
            let (least, most) = (met.iter().min().unwrap(), met.iter().max().unwrap());
            assert!(
                *least >= 5,
                "a change every {every} turns: one is judged {least} times of ten"
            );
            assert!(most - least <= 2, "a change every {every} turns: {least} and {most}");
        }
    }

    #[test]
    fn everything_is_judged_after_the_last_change() {
        let (count, limit) = (100, 8);
        for change_at in 0..count / limit + 2 {
            let mut round = None;
            Round::begin(&mut round);
            let mut since: std::collections::BTreeSet<usize> = Default::default();
            let mut turn = 0;
            loop {
                if turn == change_at {
                    since.clear();
                    Round::begin(&mut round);
                }
                let Some(walk) = round else { break };
                let from = walk.behind.map_or(0, |last: usize| last + 1);
                let batch: Vec<usize> = (from..count).take(limit).collect();
                since.extend(&batch);
                round = walk.after(batch.last().copied(), batch.len(), limit);
                turn += 1;
                assert!(turn < 100, "a round without end");
            }
            assert_eq!(since.len(), count, "changed in turn {change_at}");
        }
    }
}

//! Counters of the data plane that belong to no flow.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use mesh_model::CloseReason;
use serde::Serialize;

/// Which side of a tunnel this agent is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum TunnelRole {
    /// It dialled.
    Client,
    /// It was dialled.
    Server,
}

impl TunnelRole {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Client, Self::Server];

    /// The word in metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Server => "server",
        }
    }
}

/// Counts, shared by all workers.
#[derive(Debug)]
pub(super) struct Stats {
    shed: AtomicU64,
    no_orig_dst: AtomicU64,
    listeners_ended: AtomicU64,
    source_fallbacks: AtomicU64,
    live_cut: AtomicU64,
    rejudged: AtomicU64,
    clients: RoleStats,
    servers: RoleStats,
}

/// Counts of one role.
#[derive(Debug)]
struct RoleStats {
    proved: AtomicU64,
    failed: ByReason,
    open: AtomicU64,
    closed: ByReason,
}

/// A count for each reason, in order of [`CloseReason::ALL`].
#[derive(Debug)]
struct ByReason(Vec<AtomicU64>);

/// The tunnels of one role.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct TunnelStats {
    /// Handshakes in which both sides proved themselves.
    pub handshakes_ok: u64,
    /// Handshakes that failed, by reason.
    pub handshakes_failed: BTreeMap<CloseReason, u64>,
    /// Tunnels open.
    pub open: u64,
    /// Tunnels that have ended, by reason.
    pub closed: BTreeMap<CloseReason, u64>,
}

/// What the data plane has counted since it started.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct DataPlaneStats {
    /// Connections reset because there were no descriptors left, or memory was short.
    pub shed: u64,
    /// Connections to port 15001 that capture knows nothing about; all refused.
    pub no_orig_dst: u64,
    /// Listeners that were ended from inside their pods; each is opened again.
    pub listeners_ended: u64,
    /// Connections to applications that do not show the client's address, where the setting allows it.
    pub source_fallbacks: u64,
    /// Live flows cut because policy, trust or workload changed.
    pub live_cut: u64,
    /// Live flows judged again.
    pub rejudged: u64,
    /// Tunnel handshakes of both roles that failed, by reason.
    pub handshakes_failed: BTreeMap<CloseReason, u64>,
    /// Tunnels, by role.
    pub tunnels: BTreeMap<TunnelRole, TunnelStats>,
    /// Flows open.
    pub open_flows: usize,
    /// Sockets in use by the data plane.
    pub sockets: u64,
    /// Sockets that the data plane may use.
    pub socket_limit: u64,
    /// Nothing is admitted for want of memory.
    pub memory_is_short: bool,
    /// Pods served.
    pub pods: usize,
    /// Engines, each on a thread of its own.
    pub workers: usize,
    /// Engines that do not turn.
    pub stuck_workers: usize,
}

impl Stats {
    pub(super) fn new() -> Self {
        Self {
            shed: AtomicU64::new(0),
            no_orig_dst: AtomicU64::new(0),
            listeners_ended: AtomicU64::new(0),
            source_fallbacks: AtomicU64::new(0),
            live_cut: AtomicU64::new(0),
            rejudged: AtomicU64::new(0),
            clients: RoleStats::new(),
            servers: RoleStats::new(),
        }
    }

    pub(super) fn shed(&self) {
        self.shed.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn no_orig_dst(&self) {
        self.no_orig_dst.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn listener_ended(&self) {
        self.listeners_ended.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn source_fallback(&self) {
        self.source_fallbacks.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn live_cut(&self) {
        self.live_cut.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn rejudged(&self, flows: u64) {
        self.rejudged.fetch_add(flows, Ordering::Relaxed);
    }

    pub(super) fn handshake_failed(&self, role: TunnelRole, reason: CloseReason) {
        self.of(role).failed.count(reason);
    }

    /// A handshake has made a tunnel.
    pub(super) fn tunnel_opened(&self, role: TunnelRole) {
        self.of(role).proved.fetch_add(1, Ordering::Relaxed);
        self.tunnel_taken_over(role);
    }

    /// A tunnel of a predecessor goes on here.
    pub(super) fn tunnel_taken_over(&self, role: TunnelRole) {
        self.of(role).open.fetch_add(1, Ordering::Relaxed);
    }

    /// A tunnel that was counted as open has ended.
    pub(super) fn tunnel_closed(&self, role: TunnelRole, reason: CloseReason) {
        self.of(role).open.fetch_sub(1, Ordering::Relaxed);
        self.of(role).closed.count(reason);
    }

    const fn of(&self, role: TunnelRole) -> &RoleStats {
        match role {
            TunnelRole::Client => &self.clients,
            TunnelRole::Server => &self.servers,
        }
    }

    /// The counts; what is not counted here is left at its default.
    pub(super) fn read(&self) -> DataPlaneStats {
        let tunnels = TunnelRole::ALL.map(|role| (role, self.of(role).read()));
        let mut handshakes_failed = BTreeMap::new();
        for (reason, count) in tunnels.iter().flat_map(|(_, tunnels)| &tunnels.handshakes_failed) {
            *handshakes_failed.entry(*reason).or_default() += count;
        }
        DataPlaneStats {
            shed: self.shed.load(Ordering::Relaxed),
            no_orig_dst: self.no_orig_dst.load(Ordering::Relaxed),
            listeners_ended: self.listeners_ended.load(Ordering::Relaxed),
            source_fallbacks: self.source_fallbacks.load(Ordering::Relaxed),
            live_cut: self.live_cut.load(Ordering::Relaxed),
            rejudged: self.rejudged.load(Ordering::Relaxed),
            handshakes_failed,
            tunnels: tunnels.into(),
            ..DataPlaneStats::default()
        }
    }
}

impl RoleStats {
    fn new() -> Self {
        let (proved, open) = (AtomicU64::new(0), AtomicU64::new(0));
        Self { proved, failed: ByReason::new(), open, closed: ByReason::new() }
    }

    fn read(&self) -> TunnelStats {
        TunnelStats {
            handshakes_ok: self.proved.load(Ordering::Relaxed),
            handshakes_failed: self.failed.read(),
            open: self.open.load(Ordering::Relaxed),
            closed: self.closed.read(),
        }
    }
}

impl ByReason {
    fn new() -> Self {
        Self(CloseReason::ALL.iter().map(|_| AtomicU64::new(0)).collect())
    }

    fn count(&self, reason: CloseReason) {
        if let Some(place) = CloseReason::ALL.iter().position(|other| *other == reason) {
            self.0[place].fetch_add(1, Ordering::Relaxed);
        }
    }

    fn read(&self) -> BTreeMap<CloseReason, u64> {
        let all = CloseReason::ALL.iter().zip(&self.0);
        let all = all.map(|(reason, count)| (*reason, count.load(Ordering::Relaxed)));
        all.filter(|(_, count)| *count > 0).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_a_counter_of_its_own() {
        let stats = Stats::new();
        for reason in CloseReason::ALL {
            stats.handshake_failed(TunnelRole::Client, *reason);
        }
        stats.handshake_failed(TunnelRole::Server, CloseReason::TlsFailure);
        let read = stats.read();
        assert_eq!(read.handshakes_failed.len(), CloseReason::ALL.len());
        assert_eq!(read.handshakes_failed[&CloseReason::TlsFailure], 2);
        let of_servers = &read.tunnels[&TunnelRole::Server].handshakes_failed;
        assert_eq!(*of_servers, BTreeMap::from([(CloseReason::TlsFailure, 1)]));
    }

    #[test]
    fn tunnels_are_open_until_they_are_closed() {
        let stats = Stats::new();
        stats.tunnel_opened(TunnelRole::Server);
        stats.tunnel_taken_over(TunnelRole::Server);
        stats.tunnel_closed(TunnelRole::Server, CloseReason::Drained);
        let expected = TunnelStats {
            handshakes_ok: 1,
            open: 1,
            closed: BTreeMap::from([(CloseReason::Drained, 1)]),
            ..TunnelStats::default()
        };
        assert_eq!(stats.read().tunnels[&TunnelRole::Server], expected);
        assert_eq!(stats.read().tunnels[&TunnelRole::Client], TunnelStats::default());
    }
}

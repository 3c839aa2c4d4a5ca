//! Counters of the data plane that belong to no flow.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use mesh_model::CloseReason;
use serde::Serialize;

/// Counts, shared by all workers.
#[derive(Debug)]
pub(super) struct Stats {
    shed: AtomicU64,
    no_orig_dst: AtomicU64,
    source_fallbacks: AtomicU64,
    live_cut: AtomicU64,
    rejudged: AtomicU64,
    handshakes_failed: Vec<AtomicU64>,
}

/// What the data plane has counted since it started.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct DataPlaneStats {
    /// Connections reset because there were no descriptors left, or memory was short.
    pub shed: u64,
    /// Connections to port 15001 that capture knows nothing about; all refused.
    pub no_orig_dst: u64,
    /// Connections to applications that do not show the client's address, where the setting allows it.
    pub source_fallbacks: u64,
    /// Live flows cut because policy, trust or workload changed.
    pub live_cut: u64,
    /// Live flows judged again.
    pub rejudged: u64,
    /// Tunnel handshakes that failed, by reason.
    pub handshakes_failed: BTreeMap<CloseReason, u64>,
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
            source_fallbacks: AtomicU64::new(0),
            live_cut: AtomicU64::new(0),
            rejudged: AtomicU64::new(0),
            handshakes_failed: CloseReason::ALL.iter().map(|_| AtomicU64::new(0)).collect(),
        }
    }

    pub(super) fn shed(&self) {
        self.shed.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn no_orig_dst(&self) {
        self.no_orig_dst.fetch_add(1, Ordering::Relaxed);
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

    pub(super) fn handshake_failed(&self, reason: CloseReason) {
        if let Some(place) = CloseReason::ALL.iter().position(|other| *other == reason) {
            self.handshakes_failed[place].fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The counts; what is not counted here is left at its default.
    pub(super) fn read(&self) -> DataPlaneStats {
        let handshakes_failed = CloseReason::ALL
            .iter()
            .zip(&self.handshakes_failed)
            .map(|(reason, count)| (*reason, count.load(Ordering::Relaxed)))
            .filter(|(_, count)| *count > 0)
            .collect();
        DataPlaneStats {
            shed: self.shed.load(Ordering::Relaxed),
            no_orig_dst: self.no_orig_dst.load(Ordering::Relaxed),
            source_fallbacks: self.source_fallbacks.load(Ordering::Relaxed),
            live_cut: self.live_cut.load(Ordering::Relaxed),
            rejudged: self.rejudged.load(Ordering::Relaxed),
            handshakes_failed,
            ..DataPlaneStats::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_a_counter_of_its_own() {
        let stats = Stats::new();
        for reason in CloseReason::ALL {
            stats.handshake_failed(*reason);
        }
        stats.handshake_failed(CloseReason::TlsFailure);
        let read = stats.read();
        assert_eq!(read.handshakes_failed.len(), CloseReason::ALL.len());
        assert_eq!(read.handshakes_failed[&CloseReason::TlsFailure], 2);
    }
}

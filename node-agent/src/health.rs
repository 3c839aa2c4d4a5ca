//! What makes an agent that runs unfit to serve.

use std::sync::Arc;
use std::time::Duration;

use mesh_runtime::{Pending, Readiness};
use tokio_util::sync::CancellationToken;

use crate::dataplane::{DataPlane, DataPlaneStats};
use crate::memory::MemoryMeter;

/// Between looks at the data plane.
const HEALTH_INTERVAL: Duration = Duration::from_secs(1);
/// Looks without a shed connection after which descriptors count as enough again.
const QUIET_LOOKS: u32 = 10;

/// The agent is not ready while it cannot serve: an engine that hangs, or no descriptors or memory for
/// new connections.
pub(crate) async fn watch(
    data_plane: Arc<DataPlane>,
    readiness: Readiness,
    stop: CancellationToken,
) {
    let mut interval = tokio::time::interval(HEALTH_INTERVAL);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let (mut engines, mut descriptors, mut memory) = (None, None, None);
    let mut exhaustion = Exhaustion::default();
    let mut meter = MemoryMeter::of_this_process();
    loop {
        tokio::select! {
            _ = interval.tick() => {}
            () = stop.cancelled() => return,
        }
        let short = meter.look();
        data_plane.set_memory_short(short);
        if short && memory.is_none() {
            tracing::error!(
                "the agent's memory is short: new connections are refused, open ones go on; raise its memory limit"
            );
        }
        follow(&mut memory, short, || readiness.pending("memory"));
        let stats = data_plane.stats();
        let exhausted = exhaustion.look(&stats);
        follow(&mut engines, stats.stuck_workers > 0, || readiness.pending("engines"));
        if exhausted && descriptors.is_none() {
            tracing::error!(
                sockets = stats.sockets,
                limit = stats.socket_limit,
                "no descriptors left: new connections are reset, open ones go on; raise the limit of open files"
            );
        }
        follow(&mut descriptors, exhausted, || readiness.pending("descriptors"));
    }
}

/// Makes `pending` be there while `wanted` holds.
fn follow(pending: &mut Option<Pending>, wanted: bool, begin: impl FnOnce() -> Pending) {
    match (wanted, pending.take()) {
        (true, None) => *pending = Some(begin()),
        (true, kept) => *pending = kept,
        (false, Some(over)) => over.done(),
        (false, None) => {}
    }
}

/// Whether descriptors ran out lately.
#[derive(Debug, Default)]
struct Exhaustion {
    shed: u64,
    /// Looks since connections were last shed, while that is lately.
    quiet: Option<u32>,
}

impl Exhaustion {
    fn look(&mut self, stats: &DataPlaneStats) -> bool {
        // What is shed for want of memory says nothing of descriptors.
        self.quiet = if stats.shed > self.shed && !stats.memory_is_short {
            Some(0)
        } else {
            self.quiet.map(|quiet| quiet + 1).filter(|quiet| *quiet < QUIET_LOOKS)
        };
        self.shed = stats.shed;
        self.quiet.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readiness_follows_exhaustion_and_comes_back_after_a_quiet_while() {
        let readiness = Readiness::new();
        let (mut exhaustion, mut pending) = (Exhaustion::default(), None);
        let mut look = |shed: u64| {
            let exhausted = exhaustion.look(&DataPlaneStats { shed, ..DataPlaneStats::default() });
            follow(&mut pending, exhausted, || readiness.pending("descriptors"));
            readiness.is_ready()
        };
        assert!(look(0));
        assert!(!look(3));
        assert!((1..QUIET_LOOKS).all(|_| !look(3)));
        assert!(look(3));
        assert!(!look(4) && !look(5));
    }
}

//! How many lines of a kind the access log takes: whoever floods a port must not flood the disk as well.
//!
//! Only connections that were refused count; one that was open has cost its peer something. Metrics count them all.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use mesh_model::{CloseReason, Direction};

/// Lines of one kind at once, after a quiet time.
const BURST: u32 = 200;
/// Lines of one kind per second in the long run.
const PER_SECOND: u32 = 20;
/// How often a summary says what was left out.
pub(super) const SUMMARY_INTERVAL: Duration = Duration::from_secs(10);

/// What is limited together. Bounded: there are few directions and reasons.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct LineKind {
    pub(super) direction: Direction,
    pub(super) reason: CloseReason,
}

#[derive(Debug)]
struct Bucket {
    tokens: u32,
    /// Until when tokens were handed out.
    filled: Instant,
    left_out: u64,
}

/// The lines that may still be written.
#[derive(Debug, Default)]
pub(super) struct LineBudget {
    buckets: BTreeMap<LineKind, Bucket>,
    summary_due: Option<Instant>,
}

impl LineBudget {
    /// True when a line of `kind` may be written; otherwise it is counted.
    pub(super) fn take(&mut self, kind: LineKind, now: Instant) -> bool {
        let fresh = || Bucket { tokens: BURST, filled: now, left_out: 0 };
        let bucket = self.buckets.entry(kind).or_insert_with(fresh);
        let token = Duration::from_secs(1) / PER_SECOND;
        let elapsed = now.saturating_duration_since(bucket.filled);
        let earned = u32::try_from(elapsed.as_nanos() / token.as_nanos()).unwrap_or(u32::MAX);
        if earned >= BURST {
            (bucket.tokens, bucket.filled) = (BURST, now);
        } else {
            bucket.tokens = (bucket.tokens + earned).min(BURST);
            bucket.filled += token * earned;
        }
        if bucket.tokens > 0 {
            bucket.tokens -= 1;
            return true;
        }
        bucket.left_out += 1;
        self.summary_due.get_or_insert(now + SUMMARY_INTERVAL);
        false
    }

    /// When [`summary`](Self::summary) should be asked for.
    pub(super) const fn summary_due(&self) -> Option<Instant> {
        self.summary_due
    }

    /// What was left out since the last summary, once that is due.
    pub(super) fn summary(&mut self, now: Instant) -> Vec<(LineKind, u64)> {
        if self.summary_due.is_none_or(|due| due > now) {
            return Vec::new();
        }
        self.summary_due = None;
        self.buckets
            .iter_mut()
            .filter(|(_, bucket)| bucket.left_out > 0)
            .map(|(kind, bucket)| (*kind, std::mem::take(&mut bucket.left_out)))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIND: LineKind =
        LineKind { direction: Direction::InboundTunnel, reason: CloseReason::TlsFailure };

    #[test]
    fn a_flood_is_cut_to_the_rate_and_summed_up() {
        let mut budget = LineBudget::default();
        let start = Instant::now();
        let written = |budget: &mut LineBudget, kind, at| {
            (0..10_000).filter(|_| budget.take(kind, start + Duration::from_millis(at))).count()
        };
        assert_eq!(written(&mut budget, KIND, 0), 200);
        assert_eq!(written(&mut budget, KIND, 1_000), 20);
        // Another kind has a budget of its own.
        let other = LineKind { reason: CloseReason::PolicyDenied, ..KIND };
        assert_eq!(written(&mut budget, other, 1_000), 200);
        assert_eq!(budget.summary(start + Duration::from_secs(9)), []);
        let summary = budget.summary(start + Duration::from_secs(10));
        assert_eq!(summary, [(KIND, 19_780), (other, 9_800)].into_iter().rev().collect::<Vec<_>>());
        assert_eq!(budget.summary_due(), None);
        assert_eq!(written(&mut budget, KIND, 3_600_000), 200);
    }

    #[test]
    fn tokens_are_earned_between_lines_that_come_often() {
        let mut budget = LineBudget::default();
        let start = Instant::now();
        while budget.take(KIND, start) {}
        let taken = (1..=1_000_u64)
            .filter(|step| budget.take(KIND, start + Duration::from_millis(step * 7)))
            .count();
        assert_eq!(taken, 140);
    }
}

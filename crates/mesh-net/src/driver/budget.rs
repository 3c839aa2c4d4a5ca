//! How many descriptors the data plane may use, counted over all workers; none while memory is short.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Counts sockets against the descriptor limit, so that admission ends before the kernel refuses.
///
/// What is left over belongs to the rest of the agent: files, streams to the controller, DNS.
#[derive(Debug)]
pub struct DescriptorBudget {
    limit: u64,
    used: AtomicU64,
    memory_is_short: AtomicBool,
}

/// Descriptors that the data plane leaves to the rest of the agent.
const KEPT_FOR_OTHERS: u64 = 128;

impl DescriptorBudget {
    /// A budget under the process's descriptor limit: nine tenths of it, and at least 128 are left to others.
    #[must_use]
    pub const fn under(descriptor_limit: u64) -> Self {
        let tenth = descriptor_limit / 10;
        let kept = if tenth > KEPT_FOR_OTHERS { tenth } else { KEPT_FOR_OTHERS };
        Self {
            limit: descriptor_limit.saturating_sub(kept),
            used: AtomicU64::new(0),
            memory_is_short: AtomicBool::new(false),
        }
    }

    /// True when `more` further sockets fit, and memory is not short.
    #[must_use]
    pub fn has_room(&self, more: u64) -> bool {
        !self.memory_is_short()
            && self.used.load(Ordering::Relaxed).saturating_add(more) <= self.limit
    }

    /// Flows that one pod may have open before it is refused more, so that no pod takes the last descriptors from the others:
    /// when less than an eighth is left, a sixteenth of all.
    #[must_use]
    pub fn pod_share(&self) -> usize {
        if self.used.load(Ordering::Relaxed) <= self.limit - self.limit / 8 {
            return usize::MAX;
        }
        usize::try_from(self.limit / 16).unwrap_or(usize::MAX)
    }

    /// Ends or begins admission for want of memory. Sockets that are there are not touched.
    pub fn set_memory_short(&self, short: bool) {
        self.memory_is_short.store(short, Ordering::Relaxed);
    }

    /// Whether nothing is admitted for want of memory.
    #[must_use]
    pub fn memory_is_short(&self) -> bool {
        self.memory_is_short.load(Ordering::Relaxed)
    }

    /// Sockets in use.
    #[must_use]
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Sockets allowed.
    #[must_use]
    pub const fn limit(&self) -> u64 {
        self.limit
    }

    pub(super) fn take(&self) {
        self.used.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn give_back(&self) {
        self.used.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_ends_at_the_limit_and_comes_back() {
        let budget = DescriptorBudget::under(130);
        assert_eq!(budget.limit(), 2);
        assert!(budget.has_room(2) && !budget.has_room(3));
        budget.take();
        assert!(budget.has_room(1) && !budget.has_room(2));
        budget.give_back();
        assert!(budget.has_room(2));
        budget.set_memory_short(true);
        assert!(!budget.has_room(1));
        budget.set_memory_short(false);
        assert!(budget.has_room(2));
        let budget = DescriptorBudget::under(128 + 160);
        assert_eq!(budget.pod_share(), usize::MAX);
        (0..141).for_each(|_| budget.take());
        assert_eq!(budget.pod_share(), 10);
        budget.give_back();
        assert_eq!(budget.pod_share(), usize::MAX);
        assert_eq!(DescriptorBudget::under(10).limit(), 0);
        assert_eq!(DescriptorBudget::under(1_000_000).limit(), 900_000);
    }
}

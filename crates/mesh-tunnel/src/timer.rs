//! Deadlines of tunnels, dials and connecting sockets, in order.

use std::collections::BTreeSet;
use std::time::Instant;

/// Whose deadline it is. Stale names are harmless: whoever gets one looks it up and finds nothing, or nothing due.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum TimerKey {
    Tunnel(u64),
    Stream(u64),
    Splice(u64),
    Dial(u64),
}

/// An ordered set of deadlines. The owner remembers its entry, to take it back.
#[derive(Debug, Default)]
pub(crate) struct Timers {
    set: BTreeSet<(Instant, TimerKey)>,
}

impl Timers {
    pub(crate) fn insert(&mut self, at: Instant, key: TimerKey) {
        self.set.insert((at, key));
    }

    pub(crate) fn remove(&mut self, at: Instant, key: TimerKey) {
        self.set.remove(&(at, key));
    }

    pub(crate) fn next(&self) -> Option<Instant> {
        self.set.first().map(|(at, _)| *at)
    }

    /// Takes the first deadline that has passed.
    pub(crate) fn pop_due(&mut self, now: Instant) -> Option<TimerKey> {
        let (at, key) = *self.set.first()?;
        if at > now {
            return None;
        }
        self.set.pop_first();
        Some(key)
    }

    pub(crate) fn len(&self) -> usize {
        self.set.len()
    }
}

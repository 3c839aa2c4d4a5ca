//! Flows that wait, for a bounded time and without a thread, for something the agent does not know yet.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use mesh_model::CloseReason;

/// What a flow waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WaitFor {
    /// The pod's own workload.
    Workload,
    /// The pod's certificate.
    Certificate,
    /// The addresses of a host name.
    Name,
}

impl WaitFor {
    /// The outcome when it does not come.
    pub(super) const fn in_vain(self) -> CloseReason {
        match self {
            Self::Workload => CloseReason::UnknownWorkload,
            Self::Certificate => CloseReason::NoCertificate,
            Self::Name => CloseReason::NoHealthyUpstream,
        }
    }
}

/// Names a waiting flow within its worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct WaitId(pub(super) u64);

#[derive(Debug)]
struct Entry<T> {
    what: T,
    wait_for: WaitFor,
    deadline: Instant,
}

/// The waiting room. Bounded: [`park`](Self::park) gives back what does not fit.
#[derive(Debug)]
pub(super) struct WaitingRoom<T> {
    entries: BTreeMap<WaitId, Entry<T>>,
    deadlines: BTreeSet<(Instant, WaitId)>,
    next: u64,
    limit: usize,
}

impl<T> WaitingRoom<T> {
    pub(super) const fn new(limit: usize) -> Self {
        Self { entries: BTreeMap::new(), deadlines: BTreeSet::new(), next: 0, limit }
    }

    /// The id that the next flow parked here will have.
    pub(super) const fn next_id(&self) -> WaitId {
        WaitId(self.next)
    }

    /// Lets `what` wait until `deadline`.
    pub(super) fn park(&mut self, what: T, wait_for: WaitFor, deadline: Instant) -> Result<(), T> {
        if self.entries.len() >= self.limit {
            return Err(what);
        }
        let id = WaitId(self.next);
        self.next += 1;
        self.deadlines.insert((deadline, id));
        self.entries.insert(id, Entry { what, wait_for, deadline });
        Ok(())
    }

    /// Takes one out.
    pub(super) fn take(&mut self, id: WaitId) -> Option<T> {
        let entry = self.entries.remove(&id)?;
        self.deadlines.remove(&(entry.deadline, id));
        Some(entry.what)
    }

    /// Takes all out that wait for `wait_for`, oldest first.
    pub(super) fn take_all(&mut self, wait_for: WaitFor) -> Vec<T> {
        self.take_if(|entry| entry.wait_for == wait_for)
    }

    /// Takes all out for which `condition` holds.
    pub(super) fn take_where(&mut self, condition: impl Fn(&T) -> bool) -> Vec<T> {
        self.take_if(|entry| condition(&entry.what))
    }

    fn take_if(&mut self, condition: impl Fn(&Entry<T>) -> bool) -> Vec<T> {
        let ids: Vec<WaitId> =
            self.entries.iter().filter(|(_, entry)| condition(entry)).map(|(id, _)| *id).collect();
        ids.into_iter().filter_map(|id| self.take(id)).collect()
    }

    /// Takes one out that has waited in vain.
    pub(super) fn pop_expired(&mut self, now: Instant) -> Option<(T, WaitFor)> {
        let (deadline, id) = *self.deadlines.first()?;
        if deadline > now {
            return None;
        }
        self.deadlines.pop_first();
        self.entries.remove(&id).map(|entry| (entry.what, entry.wait_for))
    }

    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|(deadline, _)| *deadline)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn flows_leave_by_name_by_cause_or_by_time() {
        let now = Instant::now();
        let second = Duration::from_secs(1);
        let mut room = WaitingRoom::new(4);
        let named = room.next_id();
        assert_eq!(room.park("name", WaitFor::Name, now + second), Ok(()));
        assert_eq!(room.park("workload", WaitFor::Workload, now + 2 * second), Ok(()));
        assert_eq!(room.park("late", WaitFor::Certificate, now + 3 * second), Ok(()));
        assert_eq!(room.park("other", WaitFor::Certificate, now + 4 * second), Ok(()));
        assert_eq!(room.park("too many", WaitFor::Name, now), Err("too many"));

        assert_eq!(room.take(named), Some("name"));
        assert_eq!(room.take(named), None);
        assert_eq!(room.take_all(WaitFor::Workload), ["workload"]);
        assert_eq!(room.take_where(|what| *what == "other"), ["other"]);
        assert_eq!(room.pop_expired(now + 2 * second), None);
        assert_eq!(room.next_deadline(), Some(now + 3 * second));
        assert_eq!(room.pop_expired(now + 3 * second), Some(("late", WaitFor::Certificate)));
        assert!(room.entries.is_empty() && room.next_deadline().is_none());
    }
}

//! Flows that wait, for a bounded time and without a thread, for something the agent does not know yet.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use mesh_model::CloseReason;

use crate::dataplane::pods::PodKey;

/// One pod takes at most this fraction of the room, so that one without a certificate leaves room to the others.
const POD_SHARE: usize = 4;

/// What a flow waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WaitFor {
    /// The policies, before which nothing is judged.
    Policies,
    /// The pod's own workload.
    Workload,
    /// Somebody at an address of the cluster's own pods.
    Destination,
    /// The pod's certificate.
    Certificate,
    /// The addresses of a host name.
    Name,
    /// This process or its successor: somebody will go on after a hand-over.
    HandOver,
}

impl WaitFor {
    /// The outcome when it does not come.
    pub(super) const fn in_vain(self) -> CloseReason {
        match self {
            Self::Policies => CloseReason::NotSynced,
            Self::Workload => CloseReason::UnknownWorkload,
            Self::Destination => CloseReason::UnknownDestination,
            Self::Certificate => CloseReason::NoCertificate,
            Self::Name => CloseReason::NoHealthyUpstream,
            Self::HandOver => CloseReason::TimedOut,
        }
    }
}

/// Names a waiting flow within its worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct WaitId(pub(super) u64);

#[derive(Debug)]
struct Entry<T> {
    what: T,
    pod: PodKey,
    wait_for: WaitFor,
    deadline: Instant,
}

/// The waiting room. Bounded, as a whole and for each pod: [`park`](Self::park) gives back what does not fit.
#[derive(Debug)]
pub(super) struct WaitingRoom<T> {
    entries: BTreeMap<WaitId, Entry<T>>,
    by_pod: BTreeMap<PodKey, usize>,
    deadlines: BTreeSet<(Instant, WaitId)>,
    next: u64,
    limit: usize,
}

impl<T> WaitingRoom<T> {
    pub(super) const fn new(limit: usize) -> Self {
        let by_pod = BTreeMap::new();
        Self { entries: BTreeMap::new(), by_pod, deadlines: BTreeSet::new(), next: 0, limit }
    }

    /// The id that the next flow parked here will have.
    pub(super) const fn next_id(&self) -> WaitId {
        WaitId(self.next)
    }

    /// Lets `what` of `pod` wait until `deadline`.
    pub(super) fn park(
        &mut self,
        what: T,
        pod: PodKey,
        wait_for: WaitFor,
        deadline: Instant,
    ) -> Result<(), T> {
        let of_pod = self.by_pod.get(&pod).copied().unwrap_or(0);
        if self.entries.len() >= self.limit || of_pod >= self.limit.div_ceil(POD_SHARE) {
            return Err(what);
        }
        self.by_pod.insert(pod, of_pod + 1);
        let id = WaitId(self.next);
        self.next += 1;
        self.deadlines.insert((deadline, id));
        self.entries.insert(id, Entry { what, pod, wait_for, deadline });
        Ok(())
    }

    /// How many of `pod` wait.
    pub(super) fn count_of(&self, pod: PodKey) -> usize {
        self.by_pod.get(&pod).copied().unwrap_or(0)
    }

    /// All that wait, oldest first.
    pub(super) fn iter(&self) -> impl Iterator<Item = &T> {
        self.entries.values().map(|entry| &entry.what)
    }

    /// Takes one out.
    pub(super) fn take(&mut self, id: WaitId) -> Option<T> {
        let entry = self.remove(id)?;
        self.deadlines.remove(&(entry.deadline, id));
        Some(entry.what)
    }

    fn remove(&mut self, id: WaitId) -> Option<Entry<T>> {
        let entry = self.entries.remove(&id)?;
        if let Some(count) = self.by_pod.get_mut(&entry.pod) {
            *count -= 1;
            if *count == 0 {
                self.by_pod.remove(&entry.pod);
            }
        }
        Some(entry)
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
        self.remove(id).map(|entry| (entry.what, entry.wait_for))
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
        let mut park = |what, pod, wait_for, seconds: u32| {
            room.park(what, PodKey(pod), wait_for, now + seconds * second)
        };
        assert_eq!(park("name", 1, WaitFor::Name, 1), Ok(()));
        assert_eq!(park("workload", 2, WaitFor::Workload, 2), Ok(()));
        assert_eq!(park("late", 3, WaitFor::Certificate, 3), Ok(()));
        assert_eq!(park("other", 4, WaitFor::Certificate, 4), Ok(()));
        assert_eq!(park("too many", 5, WaitFor::Name, 0), Err("too many"));

        assert_eq!(room.take(named), Some("name"));
        assert_eq!(room.take(named), None);
        assert_eq!(room.take_all(WaitFor::Workload), ["workload"]);
        assert_eq!(room.take_where(|what| *what == "other"), ["other"]);
        assert_eq!(room.pop_expired(now + 2 * second), None);
        assert_eq!(room.next_deadline(), Some(now + 3 * second));
        assert_eq!(room.pop_expired(now + 3 * second), Some(("late", WaitFor::Certificate)));
        assert!(room.entries.is_empty() && room.next_deadline().is_none());
        assert!(room.by_pod.is_empty());
    }

    #[test]
    fn one_pod_does_not_fill_the_room() {
        let now = Instant::now();
        let mut room = WaitingRoom::new(8);
        let mut park = |what, pod| room.park(what, PodKey(pod), WaitFor::Certificate, now);
        assert_eq!(park(1, 7), Ok(()));
        assert_eq!(park(2, 7), Ok(()));
        assert_eq!(park(3, 7), Err(3));
        assert_eq!(park(4, 8), Ok(()));
        assert_eq!(room.pop_expired(now), Some((1, WaitFor::Certificate)));
        assert_eq!(room.park(5, PodKey(7), WaitFor::Certificate, now), Ok(()));
    }
}

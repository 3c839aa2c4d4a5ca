//! Which tunnel a flow goes through. Pure bookkeeping: names in, names out.
//!
//! ```text
//!            open                    dialled                 capacity gone, GOAWAY, death
//!  (nothing) ────► waiting + dialling ──────► pooled tunnel ─────────────────► not pooled
//!                     │ dial failed: every waiting open fails with the reason
//! ```
//! One dial per key is under way at a time. An entry that holds nothing is removed.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use crate::event::{DialId, Retire, TunnelId, TunnelKey};

/// Where an open goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Placement {
    /// A stream of this tunnel; it is counted.
    On(TunnelId),
    /// It waits for a dial that is under way.
    Waiting,
    /// It waits, and this dial must be started.
    Dial(DialId),
    /// As many wait as may.
    Full,
}

/// What a change set free.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Granted {
    /// Opens that now have their place; counted.
    pub(crate) placed: Vec<(u64, TunnelId)>,
    /// A dial to start for those that still wait.
    pub(crate) dial: Option<DialId>,
}

#[derive(Debug)]
struct Pooled {
    tunnel: TunnelId,
    streams: u32,
    limit: u32,
}

#[derive(Debug, Default)]
struct Entry {
    dialling: Option<DialId>,
    waiting: VecDeque<u64>,
    tunnels: Vec<Pooled>,
    /// What the peer's last tunnel said of its limit: a new one takes no more until it has spoken itself.
    known_limit: Option<u32>,
}

impl Entry {
    fn is_empty(&self) -> bool {
        self.dialling.is_none() && self.waiting.is_empty() && self.tunnels.is_empty()
    }

    /// The first tunnel with room, so that later ones run empty and may go.
    fn take_place(&mut self) -> Option<TunnelId> {
        let pooled = self.tunnels.iter_mut().find(|pooled| pooled.streams < pooled.limit)?;
        pooled.streams += 1;
        Some(pooled.tunnel)
    }
}

/// The pool's brain: tunnels by key, the opens that wait, and the dials under way.
#[derive(Debug)]
pub(crate) struct PoolCore {
    entries: BTreeMap<Arc<TunnelKey>, Entry>,
    dials: BTreeMap<DialId, Arc<TunnelKey>>,
    next_dial: u64,
    max_waiting: usize,
}

impl PoolCore {
    pub(crate) const fn new(max_waiting: usize) -> Self {
        Self { entries: BTreeMap::new(), dials: BTreeMap::new(), next_dial: 1, max_waiting }
    }

    /// The one allocation of a key that all users share.
    pub(crate) fn intern(&self, key: TunnelKey) -> Arc<TunnelKey> {
        match self.entries.get_key_value(&key) {
            Some((known, _)) => Arc::clone(known),
            None => Arc::new(key),
        }
    }

    /// Finds a place for an open.
    pub(crate) fn place(&mut self, key: &Arc<TunnelKey>, open: u64) -> Placement {
        let entry = match self.entries.get_mut(key) {
            Some(entry) => entry,
            None => self.entries.entry(Arc::clone(key)).or_default(),
        };
        if let Some(tunnel) = entry.take_place() {
            return Placement::On(tunnel);
        }
        if entry.waiting.len() >= self.max_waiting {
            return Placement::Full;
        }
        entry.waiting.push_back(open);
        match self.dial_if_needed(key) {
            Some(dial) => Placement::Dial(dial),
            None => Placement::Waiting,
        }
    }

    fn dial_if_needed(&mut self, key: &Arc<TunnelKey>) -> Option<DialId> {
        let entry = self.entries.get_mut(key)?;
        if entry.waiting.is_empty() || entry.dialling.is_some() {
            return None;
        }
        let dial = DialId(self.next_dial);
        self.next_dial += 1;
        entry.dialling = Some(dial);
        self.dials.insert(dial, Arc::clone(key));
        Some(dial)
    }

    /// The key a dial that is under way is for.
    pub(crate) fn dial_key(&self, dial: DialId) -> Option<&Arc<TunnelKey>> {
        self.dials.get(&dial)
    }

    /// A dial has brought a tunnel.
    pub(crate) fn dialled(&mut self, dial: DialId, tunnel: TunnelId, limit: u32) -> Granted {
        let Some(key) = self.dials.remove(&dial) else { return Granted::default() };
        let Some(entry) = self.entries.get_mut(&key) else { return Granted::default() };
        entry.dialling = None;
        let limit = entry.known_limit.map_or(limit, |known| known.min(limit));
        entry.tunnels.push(Pooled { tunnel, streams: 0, limit });
        self.grant(&key)
    }

    /// A dial has failed: those that waited for it fail too.
    pub(crate) fn dial_failed(&mut self, dial: DialId) -> Vec<u64> {
        let Some(key) = self.dials.remove(&dial) else { return Vec::new() };
        let Some(entry) = self.entries.get_mut(&key) else { return Vec::new() };
        entry.dialling = None;
        let failed = std::mem::take(&mut entry.waiting).into();
        self.tidy(&key);
        failed
    }

    /// A stream of a tunnel has ended.
    pub(crate) fn release(&mut self, key: &Arc<TunnelKey>, tunnel: TunnelId) -> Granted {
        if let Some(pooled) = self.pooled(key, tunnel) {
            pooled.streams = pooled.streams.saturating_sub(1);
            return self.grant(key);
        }
        Granted::default()
    }

    /// The peer says how many streams it takes.
    pub(crate) fn set_limit(
        &mut self,
        key: &Arc<TunnelKey>,
        tunnel: TunnelId,
        limit: u32,
    ) -> Granted {
        if let Some(pooled) = self.pooled(key, tunnel) {
            pooled.limit = limit;
            if let Some(entry) = self.entries.get_mut(key) {
                entry.known_limit = Some(limit);
            }
            return self.grant(key);
        }
        Granted::default()
    }

    /// The peer refused a stream for want of room: until one ends it takes no more.
    pub(crate) fn refused(&mut self, key: &Arc<TunnelKey>, tunnel: TunnelId) {
        if let Some(pooled) = self.pooled(key, tunnel) {
            pooled.limit = pooled.limit.min(pooled.streams.saturating_sub(1)).max(1);
        }
    }

    /// The tunnel takes no more streams. True if it was in the pool.
    pub(crate) fn remove(&mut self, key: &Arc<TunnelKey>, tunnel: TunnelId) -> bool {
        let Some(entry) = self.entries.get_mut(key) else { return false };
        let before = entry.tunnels.len();
        entry.tunnels.retain(|pooled| pooled.tunnel != tunnel);
        let found = entry.tunnels.len() != before;
        self.tidy(key);
        found
    }

    /// Looks again at what waits for a key, after [`remove`](Self::remove).
    pub(crate) fn kick(&mut self, key: &Arc<TunnelKey>) -> Granted {
        self.grant(key)
    }

    /// An open that waited has gone.
    pub(crate) fn forget(&mut self, key: &Arc<TunnelKey>, open: u64) {
        if let Some(entry) = self.entries.get_mut(key) {
            entry.waiting.retain(|waiting| *waiting != open);
            self.tidy(key);
        }
    }

    /// The opens that wait for the tunnels meant; their dials are given up.
    pub(crate) fn give_up(&mut self, which: &Retire) -> Vec<u64> {
        let meant = |key: &TunnelKey| match which {
            Retire::Tunnel(_) => false,
            Retire::Pod(pod) => key.pod == *pod,
            Retire::Target(uid) => key.target_uid == *uid,
            Retire::All => true,
        };
        let keys: Vec<_> = self.entries.keys().filter(|key| meant(key)).cloned().collect();
        let mut given_up = Vec::new();
        for key in keys {
            let Some(entry) = self.entries.get_mut(&key) else { continue };
            given_up.extend(std::mem::take(&mut entry.waiting));
            if let Some(dial) = entry.dialling.take() {
                self.dials.remove(&dial);
            }
            self.tidy(&key);
        }
        given_up
    }

    /// Keys, dials and waiting opens held. All zero when nothing goes on.
    pub(crate) fn sizes(&self) -> (usize, usize, usize) {
        let waiting = self.entries.values().map(|entry| entry.waiting.len()).sum();
        (self.entries.len(), self.dials.len(), waiting)
    }

    fn pooled(&mut self, key: &Arc<TunnelKey>, tunnel: TunnelId) -> Option<&mut Pooled> {
        self.entries.get_mut(key)?.tunnels.iter_mut().find(|pooled| pooled.tunnel == tunnel)
    }

    fn grant(&mut self, key: &Arc<TunnelKey>) -> Granted {
        let mut granted = Granted::default();
        if let Some(entry) = self.entries.get_mut(key) {
            while !entry.waiting.is_empty() {
                let Some(tunnel) = entry.take_place() else { break };
                if let Some(open) = entry.waiting.pop_front() {
                    granted.placed.push((open, tunnel));
                }
            }
        }
        granted.dial = self.dial_if_needed(key);
        granted
    }

    fn tidy(&mut self, key: &Arc<TunnelKey>) {
        if self.entries.get(key).is_some_and(Entry::is_empty) {
            self.entries.remove(key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_model::{PodUid, SpiffeId, WorkloadUid};

    fn key(target: &str) -> Arc<TunnelKey> {
        Arc::new(TunnelKey {
            pod: PodUid::new("pod"),
            source: SpiffeId::new("td", "ns", "sa").unwrap(),
            source_ip: [10, 0, 0, 1].into(),
            next_hop: ([10, 0, 0, 2], 15008).into(),
            target_uid: WorkloadUid::new(target),
            expected: vec![],
        })
    }

    #[test]
    fn one_dial_serves_all_that_wait_and_more_follow() {
        let (mut pool, key) = (PoolCore::new(1000), key("w"));
        assert_eq!(pool.place(&key, 0), Placement::Dial(DialId(1)));
        for open in 1..250 {
            assert_eq!(pool.place(&key, open), Placement::Waiting);
        }
        for (n, expected) in [(1, 100), (2, 100), (3, 50)] {
            let granted = pool.dialled(DialId(n), TunnelId(n), 100);
            assert_eq!(granted.placed.len(), expected);
            assert_eq!(granted.dial, (n < 3).then_some(DialId(n + 1)));
        }
        assert_eq!(pool.place(&key, 250), Placement::On(TunnelId(3)));
        pool.release(&key, TunnelId(1));
        assert_eq!(pool.place(&key, 251), Placement::On(TunnelId(1)));
    }

    #[test]
    fn keys_of_another_workload_share_nothing() {
        let mut pool = PoolCore::new(10);
        assert_eq!(pool.place(&key("a"), 0), Placement::Dial(DialId(1)));
        assert_eq!(pool.place(&key("b"), 1), Placement::Dial(DialId(2)));
    }

    #[test]
    fn a_failed_dial_fails_those_that_wait_and_leaves_nothing() {
        let (mut pool, key) = (PoolCore::new(2), key("w"));
        pool.place(&key, 0);
        pool.place(&key, 1);
        assert_eq!(pool.place(&key, 2), Placement::Full);
        pool.forget(&key, 0);
        assert_eq!(pool.dial_failed(DialId(1)), [1]);
        assert_eq!(pool.dial_failed(DialId(1)), [0u64; 0]);
        assert_eq!(pool.sizes(), (0, 0, 0));
    }

    #[test]
    fn a_removed_tunnel_gets_no_more_streams() {
        let (mut pool, key) = (PoolCore::new(10), key("w"));
        pool.place(&key, 0);
        pool.dialled(DialId(1), TunnelId(1), 100);
        assert!(pool.remove(&key, TunnelId(1)));
        assert!(!pool.remove(&key, TunnelId(1)));
        assert_eq!(pool.sizes(), (0, 0, 0));
        assert_eq!(pool.place(&key, 1), Placement::Dial(DialId(2)));
        assert_eq!(pool.give_up(&Retire::Target(key.target_uid.clone())), [1]);
        assert_eq!(pool.dialled(DialId(2), TunnelId(2), 100), Granted::default());
        assert_eq!(pool.sizes(), (0, 0, 0));
    }

    #[test]
    fn a_lowered_limit_holds_back_until_streams_end() {
        let (mut pool, key) = (PoolCore::new(10), key("w"));
        pool.place(&key, 0);
        pool.place(&key, 1);
        pool.dialled(DialId(1), TunnelId(1), 100);
        pool.set_limit(&key, TunnelId(1), 1);
        assert_eq!(pool.place(&key, 2), Placement::Dial(DialId(2)));
        assert_eq!(pool.release(&key, TunnelId(1)), Granted::default());
        let granted = pool.release(&key, TunnelId(1));
        assert_eq!(granted.placed, [(2, TunnelId(1))]);
    }
}

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
    /// As many wait, or as many tunnels are there, as may.
    Full,
}

/// What a change set free.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Granted {
    /// Opens that now have their place; counted.
    pub(crate) placed: Vec<(u64, TunnelId)>,
    /// A dial to start for those that still wait.
    pub(crate) dial: Option<DialId>,
    /// Opens that waited for a tunnel that may not be dialled, as there are as many as may be.
    pub(crate) crowded_out: Vec<u64>,
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
    max_tunnels_per_key: usize,
}

impl PoolCore {
    pub(crate) const fn new(max_waiting: usize, max_tunnels_per_key: usize) -> Self {
        Self {
            entries: BTreeMap::new(),
            dials: BTreeMap::new(),
            next_dial: 1,
            max_waiting,
            max_tunnels_per_key,
        }
    }

    /// A predecessor's tunnel, with the streams that are on it.
    pub(crate) fn adopt(
        &mut self,
        key: &Arc<TunnelKey>,
        tunnel: TunnelId,
        streams: u32,
        limit: u32,
    ) {
        let entry = self.entries.entry(Arc::clone(key)).or_default();
        entry.tunnels.push(Pooled { tunnel, streams, limit });
    }

    /// How many streams a pooled tunnel takes.
    pub(crate) fn limit(&self, key: &Arc<TunnelKey>, tunnel: TunnelId) -> Option<u32> {
        let pooled =
            self.entries.get(key)?.tunnels.iter().find(|pooled| pooled.tunnel == tunnel)?;
        Some(pooled.limit)
    }

    /// The number of the next dial.
    pub(crate) const fn next_dial(&self) -> u64 {
        self.next_dial
    }

    /// Numbers dials from here on, so that an answer to a predecessor's dial is not taken for one of ours.
    pub(crate) fn number_dials_from(&mut self, next: u64) {
        self.next_dial = self.next_dial.max(next);
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
        let no_dial = entry.dialling.is_none() && entry.tunnels.len() >= self.max_tunnels_per_key;
        if no_dial || entry.waiting.len() >= self.max_waiting {
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
        let full = entry.tunnels.len() >= self.max_tunnels_per_key;
        if entry.waiting.is_empty() || entry.dialling.is_some() || full {
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
        // At least one: a peer that once took none would have us dial on and on.
        let limit = entry.known_limit.map_or(limit, |known| known.clamp(1, limit.max(1)));
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
            Retire::Tunnel(_) | Retire::Pod(_) => false,
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
        if let Some(entry) = self.entries.get_mut(key)
            && entry.dialling.is_none()
        {
            granted.crowded_out = std::mem::take(&mut entry.waiting).into();
        }
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
        let (mut pool, key) = (PoolCore::new(1000, 10), key("w"));
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
        let mut pool = PoolCore::new(10, 10);
        assert_eq!(pool.place(&key("a"), 0), Placement::Dial(DialId(1)));
        assert_eq!(pool.place(&key("b"), 1), Placement::Dial(DialId(2)));
    }

    #[test]
    fn a_failed_dial_fails_those_that_wait_and_leaves_nothing() {
        let (mut pool, key) = (PoolCore::new(2, 10), key("w"));
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
        let (mut pool, key) = (PoolCore::new(10, 10), key("w"));
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
    fn a_peer_that_takes_nothing_does_not_make_us_dial_on_and_on() {
        let (mut pool, key) = (PoolCore::new(10, 2), key("w"));
        for open in 0..5 {
            pool.place(&key, open);
        }
        let first = pool.dialled(DialId(1), TunnelId(1), 1);
        assert_eq!((first.placed, first.dial), (vec![(0, TunnelId(1))], Some(DialId(2))));
        assert_eq!(pool.set_limit(&key, TunnelId(1), 0), Granted::default());
        let second = pool.dialled(DialId(2), TunnelId(2), 100);
        assert_eq!(second.placed, [(1, TunnelId(2))]);
        assert_eq!((second.dial, second.crowded_out), (None, vec![2, 3, 4]));
        assert_eq!(pool.place(&key, 5), Placement::Full);
    }

    /// Everything the pool says is checked against a plain count: no open is placed twice or lost, no tunnel gets more than
    /// its limit, one dial per key, and nothing is left when all have gone.
    #[test]
    fn the_pool_keeps_its_books_under_stress() {
        for seed in 0..200u64 {
            Stress::new(seed).run();
        }
    }

    struct Stress {
        random: u64,
        pool: PoolCore,
        keys: Vec<Arc<TunnelKey>>,
        /// Of each open: its key.
        waiting: BTreeMap<u64, usize>,
        placed: BTreeMap<u64, TunnelId>,
        dials: BTreeMap<DialId, usize>,
        /// Of each tunnel: its key, its streams, its limit.
        tunnels: BTreeMap<TunnelId, (usize, u32, u32)>,
        next: u64,
    }

    impl Stress {
        fn new(seed: u64) -> Self {
            Self {
                random: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
                pool: PoolCore::new(20, 5),
                keys: ["a", "b", "c"].map(key).to_vec(),
                waiting: BTreeMap::new(),
                placed: BTreeMap::new(),
                dials: BTreeMap::new(),
                tunnels: BTreeMap::new(),
                next: 1,
            }
        }

        fn below(&mut self, bound: u64) -> u64 {
            self.random ^= self.random << 13;
            self.random ^= self.random >> 7;
            self.random ^= self.random << 17;
            self.random % bound.max(1)
        }

        fn some<T: Copy + Ord, V>(random: u64, of: &BTreeMap<T, V>) -> Option<T> {
            let place = usize::try_from(random).ok()?.checked_rem(of.len())?;
            of.keys().nth(place).copied()
        }

        fn granted(&mut self, key: usize, granted: Granted) {
            for (open, tunnel) in granted.placed {
                assert_eq!(self.waiting.remove(&open), Some(key), "only who waits is placed");
                self.on(open, tunnel, key);
            }
            for open in granted.crowded_out {
                assert_eq!(self.waiting.remove(&open), Some(key));
            }
            if let Some(dial) = granted.dial {
                self.dialling(dial, key);
            }
        }

        fn dialling(&mut self, dial: DialId, key: usize) {
            assert!(self.dials.values().all(|known| *known != key), "one dial per key");
            assert_eq!(self.dials.insert(dial, key), None);
        }

        fn on(&mut self, open: u64, tunnel: TunnelId, key: usize) {
            let (of, streams, limit) = self.tunnels.get_mut(&tunnel).unwrap();
            assert_eq!(*of, key);
            *streams += 1;
            assert!(streams <= limit, "more streams than the tunnel takes");
            assert_eq!(self.placed.insert(open, tunnel), None);
        }

        fn step(&mut self) {
            let random = self.below(1 << 20);
            match self.below(9) {
                0..3 => {
                    let (open, key) = (self.next, usize::try_from(self.below(3)).unwrap());
                    self.next += 1;
                    let shared = self.keys[key].clone();
                    match self.pool.place(&shared, open) {
                        Placement::On(tunnel) => self.on(open, tunnel, key),
                        Placement::Waiting => assert_eq!(self.waiting.insert(open, key), None),
                        Placement::Dial(dial) => {
                            self.waiting.insert(open, key);
                            self.dialling(dial, key);
                        }
                        Placement::Full => {}
                    }
                }
                3 => {
                    let Some(dial) = Self::some(random, &self.dials) else { return };
                    let key = self.dials.remove(&dial).unwrap();
                    let tunnel = TunnelId(self.next);
                    self.next += 1;
                    let limit = 1 + u32::try_from(self.below(6)).unwrap();
                    self.tunnels.insert(tunnel, (key, 0, limit));
                    let granted = self.pool.dialled(dial, tunnel, limit);
                    self.granted(key, granted);
                }
                4 => {
                    let Some(dial) = Self::some(random, &self.dials) else { return };
                    let key = self.dials.remove(&dial).unwrap();
                    for open in self.pool.dial_failed(dial) {
                        assert_eq!(self.waiting.remove(&open), Some(key));
                    }
                    assert!(self.waiting.values().all(|waits| *waits != key), "all of them failed");
                }
                5 | 6 => {
                    let Some(open) = Self::some(random, &self.placed) else { return };
                    let tunnel = self.placed.remove(&open).unwrap();
                    let Some((key, streams, _)) = self.tunnels.get_mut(&tunnel) else { return };
                    *streams -= 1;
                    let key = *key;
                    let shared = self.keys[key].clone();
                    let granted = self.pool.release(&shared, tunnel);
                    self.granted(key, granted);
                }
                7 => {
                    let Some(open) = Self::some(random, &self.waiting) else { return };
                    let key = self.waiting.remove(&open).unwrap();
                    let shared = self.keys[key].clone();
                    self.pool.forget(&shared, open);
                }
                _ => {
                    let Some(tunnel) = Self::some(random, &self.tunnels) else { return };
                    let (key, ..) = self.tunnels.remove(&tunnel).unwrap();
                    self.placed.retain(|_, on| *on != tunnel);
                    let shared = self.keys[key].clone();
                    assert!(self.pool.remove(&shared, tunnel));
                    let granted = self.pool.kick(&shared);
                    self.granted(key, granted);
                }
            }
        }

        fn run(mut self) {
            for _ in 0..400 {
                self.step();
                let (_, dials, waiting) = self.pool.sizes();
                assert_eq!((dials, waiting), (self.dials.len(), self.waiting.len()));
                for key in 0..self.keys.len() {
                    let waits = self.waiting.values().any(|waits| *waits == key);
                    let dials = self.dials.values().any(|of| *of == key);
                    assert!(!waits || dials, "who waits has a dial to wait for");
                    let tunnels = self.tunnels.values().filter(|(of, ..)| *of == key).count();
                    assert!(tunnels <= 5, "no more tunnels than may be");
                }
            }
            self.pool.give_up(&Retire::All);
            for (tunnel, (key, ..)) in std::mem::take(&mut self.tunnels) {
                self.pool.remove(&self.keys[key].clone(), tunnel);
            }
            assert_eq!(self.pool.sizes(), (0, 0, 0));
        }
    }

    #[test]
    fn a_lowered_limit_holds_back_until_streams_end() {
        let (mut pool, key) = (PoolCore::new(10, 10), key("w"));
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

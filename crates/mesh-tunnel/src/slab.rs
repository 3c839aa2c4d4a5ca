//! A slab whose keys carry a generation, so that a stale key finds nothing.

/// Values by slot; a key is `generation << 32 | slot` and is never given twice.
#[derive(Debug)]
pub(crate) struct Slab<T> {
    entries: Vec<Entry<T>>,
    free: Vec<u32>,
    len: usize,
    /// Above the generation of every key given so far, once slots have been given back.
    first_generation: u32,
    newest_generation: u32,
}

#[derive(Debug)]
struct Entry<T> {
    generation: u32,
    value: Option<T>,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Self {
            entries: Vec::new(),
            free: Vec::new(),
            len: 0,
            first_generation: 1,
            newest_generation: 1,
        }
    }
}

const SLOT_MASK: u64 = u32::MAX as u64;

/// The top bit of a key is the caller's.
const LAST_GENERATION: u32 = (1 << 31) - 1;
/// Slots that are kept even if none is in use.
const KEEP: usize = 1024;
/// Slots that a restored slab may have: far more than any engine's limits allow.
const MOST_RESTORED: usize = 1 << 22;

impl<T> Slab<T> {
    pub(crate) fn insert(&mut self, value: T) -> u64 {
        self.len += 1;
        if let Some(slot) = self.free.pop() {
            let entry = &mut self.entries[slot as usize];
            entry.value = Some(value);
            return u64::from(entry.generation) << 32 | u64::from(slot);
        }
        let slot = u32::try_from(self.entries.len()).expect("fewer than 2^32 slots: max_relays");
        let generation = self.first_generation;
        self.entries.push(Entry { generation, value: Some(value) });
        u64::from(generation) << 32 | u64::from(slot)
    }

    #[inline]
    pub(crate) fn get(&self, key: u64) -> Option<&T> {
        let entry = self.entries.get((key & SLOT_MASK) as usize)?;
        if u64::from(entry.generation) == key >> 32 { entry.value.as_ref() } else { None }
    }

    #[inline]
    pub(crate) fn get_mut(&mut self, key: u64) -> Option<&mut T> {
        let entry = self.entries.get_mut((key & SLOT_MASK) as usize)?;
        if u64::from(entry.generation) == key >> 32 { entry.value.as_mut() } else { None }
    }

    pub(crate) fn remove(&mut self, key: u64) -> Option<T> {
        let slot = (key & SLOT_MASK) as usize;
        let entry = self.entries.get_mut(slot)?;
        if u64::from(entry.generation) != key >> 32 {
            return None;
        }
        let value = entry.value.take()?;
        self.len -= 1;
        // A slot whose generations are used up stays empty, so that no key comes back.
        if entry.generation < LAST_GENERATION {
            entry.generation += 1;
            self.newest_generation = self.newest_generation.max(entry.generation);
            self.free.push((key & SLOT_MASK) as u32);
        }
        if self.len == 0 && self.entries.len() > KEEP && self.newest_generation < LAST_GENERATION {
            // No key in use: the slots of busier times go back, and new ones begin above all generations that were.
            self.first_generation = self.newest_generation;
            self.entries = Vec::new();
            self.free = Vec::new();
        }
        Some(value)
    }

    /// A slab with these values under the keys another one gave them, which gives none of its keys again.
    /// `newest_generation` is that one's. `None` when two values have one key, or a key is none of such a slab.
    pub(crate) fn restore(values: Vec<(u64, T)>, newest_generation: u32) -> Option<Self> {
        let first_generation = newest_generation.clamp(1, LAST_GENERATION - 1) + 1;
        let mut slab = Self {
            first_generation,
            newest_generation: first_generation,
            len: values.len(),
            ..Self::default()
        };
        for (key, value) in values {
            let slot = (key & SLOT_MASK) as usize;
            let generation = u32::try_from(key >> 32).ok()?;
            if generation == 0 || generation > newest_generation || slot >= MOST_RESTORED {
                return None;
            }
            while slab.entries.len() <= slot {
                slab.entries.push(Entry { generation: first_generation, value: None });
            }
            let entry = &mut slab.entries[slot];
            if entry.value.replace(value).is_some() {
                return None;
            }
            entry.generation = generation;
        }
        for (slot, entry) in (0u32..).zip(&slab.entries) {
            if entry.value.is_none() {
                slab.free.push(slot);
            }
        }
        Some(slab)
    }

    /// What [`restore`](Self::restore) is to be told.
    pub(crate) fn newest_generation(&self) -> u32 {
        self.newest_generation
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Live keys in slot order.
    pub(crate) fn keys(&self) -> impl Iterator<Item = u64> + '_ {
        self.entries.iter().zip(0u64..).filter_map(|(entry, slot)| {
            entry.value.as_ref().map(|_| u64::from(entry.generation) << 32 | slot)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_given_back_keep_their_keys_stale() {
        let mut slab = Slab::default();
        let mut seen = std::collections::BTreeSet::new();
        for _ in 0..3 {
            let keys: Vec<u64> = (0..2 * KEEP).map(|n| slab.insert(n)).collect();
            assert!(keys.iter().all(|key| seen.insert(*key)), "a key was given twice");
            for key in keys {
                slab.remove(key);
            }
            assert!(slab.entries.is_empty());
            assert!(seen.iter().all(|key| slab.get(*key).is_none()));
        }
    }

    #[test]
    fn stale_keys_find_nothing() {
        let mut slab = Slab::default();
        let first = slab.insert('a');
        assert_eq!(slab.remove(first), Some('a'));
        let second = slab.insert('b');
        assert_ne!(first, second);
        assert_eq!(slab.get(first), None);
        assert_eq!(slab.remove(first), None);
        assert_eq!(slab.get_mut(second), Some(&mut 'b'));
        assert_eq!((slab.len(), slab.keys().collect::<Vec<_>>()), (1, vec![second]));
    }
}

//! A slab whose keys carry a generation, so that a stale key finds nothing.

/// Values by slot; a key is `generation << 32 | slot` and is never given twice.
#[derive(Debug)]
pub(crate) struct Slab<T> {
    entries: Vec<Entry<T>>,
    free: Vec<u32>,
    len: usize,
}

#[derive(Debug)]
struct Entry<T> {
    generation: u32,
    value: Option<T>,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Self { entries: Vec::new(), free: Vec::new(), len: 0 }
    }
}

const SLOT_MASK: u64 = u32::MAX as u64;

impl<T> Slab<T> {
    pub(crate) fn insert(&mut self, value: T) -> u64 {
        self.len += 1;
        if let Some(slot) = self.free.pop() {
            let entry = &mut self.entries[slot as usize];
            entry.value = Some(value);
            return u64::from(entry.generation) << 32 | u64::from(slot);
        }
        let slot = u32::try_from(self.entries.len()).expect("fewer than 2^32 slots: max_relays");
        self.entries.push(Entry { generation: 1, value: Some(value) });
        1 << 32 | u64::from(slot)
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
        // A slot whose generations are used up stays empty, so that no key comes back. The top bit is the caller's.
        if entry.generation < (1 << 31) - 1 {
            entry.generation += 1;
            self.free.push((key & SLOT_MASK) as u32);
        }
        if self.len == 0 {
            self.free.shrink_to(1024);
        }
        Some(value)
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

//! Virtual addresses for ServiceEntry hosts that bring none.
//!
//! A host's address must not change while connections and caches hold it. Each host has its own order of slots; the oldest
//! host (by creation, then by name) takes the first that is free. So a new host never moves another, every replica of a
//! controller comes to the same, and after a restart too. A host that goes moves only one that wanted its very slot: with
//! 1,000 hosts in the 65,000 slots about one removal in a hundred does.
//!
//! Manifests in a folder have no age and one controller: there [`Kept`] remembers what was assigned, so that nothing moves at
//! all, and gives the slot of a host that is gone to another only when no other is free.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use mesh_model::{NamespacedHostname, splitmix};

/// Slots in 240.240.0.0/16; .0.0 and .255.255 stay free.
const SLOTS: u32 = 0xfffe;
/// Slots of its own that a host tries before it takes the next free one.
const ATTEMPTS: u64 = 16;
/// Hosts that are gone and still remembered; beyond it the one that went first is forgotten.
const MAX_GONE: usize = 4_096;

/// The IPv4 and IPv6 address of one host.
pub(super) type Vips = [IpAddr; 2];

/// What was assigned before.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Kept {
    slots: BTreeMap<NamespacedHostname, u32>,
    /// Those of them that are gone, in the order in which they went.
    gone: BTreeMap<u64, NamespacedHostname>,
}

impl Kept {
    /// What [`lines`](Self::lines) wrote. A line that cannot be read is left out: its host gets an address anew.
    pub(super) fn read(text: &str) -> Self {
        let mut kept = Self::default();
        let mut taken = BTreeSet::new();
        for line in text.lines() {
            let mut words = line.split_ascii_whitespace();
            let (Some(ip), Some(host)) = (words.next(), words.next()) else { continue };
            let slot = ip.parse().ok().and_then(slot_of);
            let (Some(slot), Some((namespace, hostname))) = (slot, host.split_once('/')) else {
                continue;
            };
            let host = NamespacedHostname::new(namespace, hostname);
            if taken.insert(slot) && kept.slots.insert(host.clone(), slot).is_none() {
                kept.leave(host);
            }
        }
        kept
    }

    /// A line for each host: its IPv4 address and its name, those that went first at the top.
    pub(super) fn lines(&self) -> String {
        let gone: BTreeSet<_> = self.gone.values().collect();
        let present = self.slots.keys().filter(|host| !gone.contains(host));
        let line = |host: &NamespacedHostname| {
            let [ip, _] = addresses(*self.slots.get(host)?);
            Some(format!("{ip} {host}\n"))
        };
        self.gone.values().chain(present).filter_map(line).collect()
    }

    /// Assigns an address to each of `hosts`: the one it had, else one that nobody has or had.
    pub(super) fn assign(
        &mut self,
        hosts: &[NamespacedHostname],
        reserved: &BTreeSet<IpAddr>,
    ) -> BTreeMap<NamespacedHostname, Vips> {
        let present: BTreeSet<_> = hosts.iter().collect();
        self.gone.retain(|_, host| !present.contains(host));
        let gone: BTreeSet<_> = self.gone.values().cloned().collect();
        let left =
            self.slots.keys().filter(|host| !present.contains(host) && !gone.contains(*host));
        for host in left.cloned().collect::<Vec<_>>() {
            self.leave(host);
        }
        self.slots.retain(|_, slot| is_usable(*slot, reserved));
        self.gone.retain(|_, host| self.slots.contains_key(host));
        while self.gone.len() > MAX_GONE {
            self.forget_first();
        }
        let mut taken = Taken::default();
        self.slots.values().for_each(|slot| taken.insert(*slot));
        for host in hosts {
            if self.slots.contains_key(host) {
                continue;
            }
            let slot = free_slot(host, &taken, reserved).or_else(|| self.forget_first());
            if let Some(slot) = slot {
                taken.insert(slot);
                self.slots.insert(host.clone(), slot);
            }
        }
        let of =
            |host: &NamespacedHostname| Some((host.clone(), addresses(*self.slots.get(host)?)));
        hosts.iter().filter_map(of).collect()
    }

    fn leave(&mut self, host: NamespacedHostname) {
        let next = self.gone.last_key_value().map_or(0, |(last, _)| last + 1);
        self.gone.insert(next, host);
    }

    /// Forgets the host that went first; gives its slot.
    fn forget_first(&mut self) -> Option<u32> {
        let (_, host) = self.gone.pop_first()?;
        self.slots.remove(&host)
    }
}

/// Assigns an IPv4 and an IPv6 address to each host, none of them in `reserved`. `hosts` come in order of precedence.
///
/// Source: the ranges are Istio's, 240.240.0.0/16 and 2001:2::/48. Hosts beyond the number of slots get none.
pub(super) fn assign(
    hosts: &[NamespacedHostname],
    reserved: &BTreeSet<IpAddr>,
) -> BTreeMap<NamespacedHostname, Vips> {
    let mut taken = Taken::default();
    let mut assigned = BTreeMap::new();
    for host in hosts {
        let Some(slot) = free_slot(host, &taken, reserved) else { break };
        taken.insert(slot);
        assigned.insert(host.clone(), addresses(slot));
    }
    assigned
}

fn free_slot(host: &NamespacedHostname, taken: &Taken, reserved: &BTreeSet<IpAddr>) -> Option<u32> {
    if taken.count >= SLOTS as usize {
        return None;
    }
    let hash = hash(host);
    let last = wish(hash, ATTEMPTS);
    let own = (0..ATTEMPTS).map(|attempt| wish(hash, attempt));
    let rest = (0..SLOTS).map(|step| (last + step) % SLOTS);
    own.chain(rest).find(|slot| !taken.holds(*slot) && is_usable(*slot, reserved))
}

/// Slots that are not free.
struct Taken {
    slots: Vec<bool>,
    count: usize,
}

impl Default for Taken {
    fn default() -> Self {
        Self { slots: vec![false; SLOTS as usize], count: 0 }
    }
}

impl Taken {
    fn holds(&self, slot: u32) -> bool {
        self.slots.get(slot as usize).copied().unwrap_or(true)
    }

    fn insert(&mut self, slot: u32) {
        if let Some(taken) = self.slots.get_mut(slot as usize)
            && !std::mem::replace(taken, true)
        {
            self.count += 1;
        }
    }
}

/// The slot that a host with this hash wants at its `attempt`th try.
fn wish(hash: u64, attempt: u64) -> u32 {
    let z = if attempt == 0 { hash } else { splitmix::nth(hash, attempt) };
    u32::try_from(z % u64::from(SLOTS)).unwrap_or(0)
}

fn is_usable(slot: u32, reserved: &BTreeSet<IpAddr>) -> bool {
    addresses(slot).iter().all(|address| !reserved.contains(address))
}

/// The slot of an IPv4 address that is assigned from.
fn slot_of(ip: Ipv4Addr) -> Option<u32> {
    let [240, 240, high, low] = ip.octets() else { return None };
    u32::from(u16::from_be_bytes([high, low])).checked_sub(1).filter(|slot| *slot < SLOTS)
}

/// True for an address of the ranges that are assigned from.
pub(super) fn is_assignable(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.octets()[..2] == [240, 240],
        IpAddr::V6(ip) => ip.segments()[..3] == [0x2001, 2, 0],
    }
}

fn addresses(slot: u32) -> Vips {
    let [_, _, high, low] = (slot + 1).to_be_bytes();
    let host = u16::from_be_bytes([high, low]);
    [
        Ipv4Addr::new(240, 240, high, low).into(),
        Ipv6Addr::new(0x2001, 2, 0, 0, 0, 0, 0xf0f0, host).into(),
    ]
}

/// FNV-1a, 64 bits: any stable hash would do.
fn hash(host: &NamespacedHostname) -> u64 {
    [host.hostname.as_bytes(), b"/", host.namespace.as_bytes()]
        .concat()
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
        })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn hosts(numbers: impl IntoIterator<Item = u32>) -> Vec<NamespacedHostname> {
        let host = |n| NamespacedHostname::new("ns", &format!("h{n}.example"));
        numbers.into_iter().map(host).collect()
    }

    /// Those of `before` that have another address in `after`.
    fn moved(
        before: &BTreeMap<NamespacedHostname, Vips>,
        after: &BTreeMap<NamespacedHostname, Vips>,
    ) -> Vec<NamespacedHostname> {
        let has_moved = |(host, vips): &(&NamespacedHostname, &Vips)| {
            after.get(*host).is_some_and(|now| now != *vips)
        };
        before.iter().filter(has_moved).map(|(host, _)| host.clone()).collect()
    }

    #[test]
    fn addresses_are_unique_and_not_reserved() {
        let hosts = hosts(0..2_000);
        let reserved = assign(&hosts[..1], &BTreeSet::new())[&hosts[0]].into_iter().collect();
        let assigned = assign(&hosts, &reserved);
        let unique: BTreeSet<_> = assigned.values().flatten().collect();
        assert_eq!(unique.len(), 4_000);
        assert!(unique.iter().all(|ip| is_assignable(**ip) && !reserved.contains(ip)));
    }

    #[test]
    fn more_hosts_than_slots_leave_some_without() {
        let all = hosts(0..SLOTS + 5);
        assert_eq!(assign(&all, &BTreeSet::new()).len(), SLOTS as usize);
    }

    #[test]
    fn a_slot_is_given_to_another_only_when_no_other_is_free() {
        let reserved = BTreeSet::new();
        let mut kept = Kept::default();
        let all = hosts(0..SLOTS);
        let first = kept.assign(&all[..1], &reserved);
        // Everything is taken but what the one that is gone had.
        let others = kept.assign(&all[1..], &reserved);
        assert_eq!(others.len(), all.len() - 1);
        assert!(!others.values().any(|vips| *vips == first[&all[0]]));
        let late = NamespacedHostname::new("ns", "late.example");
        let with_late: Vec<_> = all[1..].iter().cloned().chain([late.clone()]).collect();
        assert_eq!(kept.assign(&with_late, &reserved)[&late], first[&all[0]]);
    }

    #[test]
    fn damaged_lines_are_left_out() {
        let kept =
            Kept::read("240.240.0.1 a/x\n240.240.0.1 a/y\n10.0.0.1 a/z\n240.240.0.0 a/q\n\nx\n");
        assert_eq!(kept.lines(), "240.240.0.1 a/x\n");
    }

    proptest! {
        #[test]
        fn a_new_host_moves_no_other_and_one_that_goes_only_who_wanted_its_slot(
            count in 1_u32..4_000,
            at in any::<prop::sample::Index>(),
        ) {
            let all = hosts(0..count);
            let reserved = BTreeSet::new();
            let whole = assign(&all, &reserved);
            let youngest = assign(&all[..all.len() - 1], &reserved);
            prop_assert_eq!(moved(&youngest, &whole), vec![]);
            let gone = at.index(all.len());
            let mut fewer = all.clone();
            let host = fewer.remove(gone);
            let after = assign(&fewer, &reserved);
            let moved = moved(&whole, &after);
            if let Some(first) = moved.iter().min_by_key(|one| all.iter().position(|host| host == *one)) {
                prop_assert_eq!(after[first], whole[&host], "moved without a collision");
            }
            prop_assert!(moved.len() <= 3, "{} moved", moved.len());
        }

        #[test]
        fn what_is_kept_never_moves(
            steps in prop::collection::vec((0_u32..300, any::<bool>()), 1..80),
        ) {
            let reserved = BTreeSet::new();
            let mut kept = Kept::default();
            let mut present: BTreeSet<u32> = (0..150).collect();
            let mut ever: BTreeMap<NamespacedHostname, Vips> = BTreeMap::new();
            for (number, add) in steps {
                if add { present.insert(number); } else { present.remove(&number); }
                let assigned = kept.assign(&hosts(present.iter().copied()), &reserved);
                prop_assert_eq!(assigned.len(), present.len());
                prop_assert_eq!(moved(&ever, &assigned), vec![], "moved, or not given back");
                ever.extend(assigned);
                let unique: BTreeSet<_> = ever.values().collect();
                prop_assert_eq!(unique.len(), ever.len(), "a slot of one that is gone was given away");
                // As over a restart.
                let again = Kept::read(&kept.lines());
                prop_assert_eq!(&again.slots, &kept.slots);
                kept = again;
            }
        }
    }
}

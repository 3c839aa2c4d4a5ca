//! Virtual addresses for ServiceEntry hosts that bring none.
//!
//! The assignment is a pure function of the set of hosts, so it is the same after a restart and on every replica, without
//! a place to keep it. A host's address changes only when one that shares its slot and sorts before it comes or goes:
//! with 1,000 hosts in the 65,000 slots about one in a hundred of all changes moves another host.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use mesh_model::NamespacedHostname;

/// Slots in 240.240.0.0/16; .0.0 and .255.255 stay free.
const SLOTS: u32 = 0xfffe;

/// The IPv4 and IPv6 address of one host.
pub(super) type Vips = [IpAddr; 2];

/// Assigns an IPv4 and an IPv6 address to each host, none of them in `reserved`.
///
/// Source: the ranges are Istio's, 240.240.0.0/16 and 2001:2::/48. Hosts beyond the number of slots get none.
pub(super) fn assign<'h>(
    hosts: impl Iterator<Item = &'h NamespacedHostname>,
    reserved: &BTreeSet<IpAddr>,
) -> BTreeMap<NamespacedHostname, Vips> {
    let mut ordered: Vec<(u64, &NamespacedHostname)> =
        hosts.map(|host| (hash(host), host)).collect();
    ordered.sort_by(|left, right| {
        let key = |(hash, host): &(u64, &NamespacedHostname)| {
            (*hash, host.namespace.clone(), host.hostname.clone())
        };
        key(left).cmp(&key(right))
    });
    let mut taken = BTreeSet::new();
    let mut assigned = BTreeMap::new();
    for (hash, host) in ordered {
        let start = u32::try_from(hash % u64::from(SLOTS)).unwrap_or(0);
        if taken.len() >= SLOTS as usize {
            break;
        }
        let free = (0..SLOTS).map(|step| (start + step) % SLOTS).find(|slot| {
            !taken.contains(slot)
                && addresses(*slot).iter().all(|address| !reserved.contains(address))
        });
        if let Some(slot) = free {
            taken.insert(slot);
            assigned.insert(host.clone(), addresses(slot));
        }
    }
    assigned
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
    use super::*;

    #[test]
    fn addresses_are_unique_and_depend_on_the_set_alone() {
        let hosts: Vec<_> =
            (0..2_000).map(|n| NamespacedHostname::new("ns", &format!("h{n}.example"))).collect();
        let reserved =
            assign(hosts.iter().take(1), &BTreeSet::new())[&hosts[0]].into_iter().collect();
        let forward = assign(hosts.iter(), &reserved);
        let backward = assign(hosts.iter().rev(), &reserved);
        assert_eq!(forward, backward);
        let unique: BTreeSet<_> = forward.values().flatten().collect();
        assert_eq!(unique.len(), 4_000);
        assert!(unique.iter().all(|ip| is_assignable(**ip) && !reserved.contains(ip)));
    }

    #[test]
    fn more_hosts_than_slots_leave_some_without() {
        let hosts: Vec<_> =
            (0..SLOTS + 5).map(|n| NamespacedHostname::new("ns", &format!("h{n}"))).collect();
        let reserved = BTreeSet::new();
        let few = assign(hosts.iter().take(100), &reserved);
        assert_eq!(few.len(), 100);
    }
}

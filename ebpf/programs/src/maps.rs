//! The maps, in the shapes that the ABI states, and their counters.

use aya_ebpf::bindings::BPF_F_NO_PREALLOC;
use aya_ebpf::btf_maps::SkStorage;
use aya_ebpf::macros::{btf_map, map};
use aya_ebpf::maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, Queue, SockHash};
use mesh_ebpf_abi::{
    Address, ClientKey, Counter, DialledVip, DirectEvent, DirectKey, Endpoint, FlowKey, FlowState,
    ListenerKey, NetworkRule, Pod, PortKey, SocketNote, VipEndpoints, VipKey, maps,
};

#[map]
pub static PODS: HashMap<u64, Pod> = HashMap::with_max_entries(maps::PODS.max_entries, 0);
#[map]
pub static ADDRESSES: HashMap<Address, u64> =
    HashMap::with_max_entries(maps::ADDRESSES.max_entries, 0);
#[map]
pub static GUARDS: HashMap<u32, u64> = HashMap::with_max_entries(maps::GUARDS.max_entries, 0);
#[map]
pub static LISTENERS: SockHash<ListenerKey> =
    SockHash::with_max_entries(maps::LISTENERS.max_entries, 0);
#[map]
pub static PORT_RULES: HashMap<PortKey, u8> =
    HashMap::with_max_entries(maps::PORT_RULES.max_entries, BPF_F_NO_PREALLOC);
#[map]
pub static NETWORK_RULES: LpmTrie<NetworkRule, u8> =
    LpmTrie::with_max_entries(maps::NETWORK_RULES.max_entries, 0);
#[map]
pub static NODE_ADDRESSES: HashMap<Address, u8> =
    HashMap::with_max_entries(maps::NODE_ADDRESSES.max_entries, 0);
#[map]
pub static ORIGINALS: LruHashMap<ClientKey, Endpoint> =
    LruHashMap::with_max_entries(maps::ORIGINALS.max_entries, 0);
#[map]
pub static RESOLVERS: LruHashMap<ClientKey, Endpoint> =
    LruHashMap::with_max_entries(maps::RESOLVERS.max_entries, 0);
#[map]
pub static FLOWS: HashMap<FlowKey, FlowState> =
    HashMap::with_max_entries(maps::FLOWS.max_entries, BPF_F_NO_PREALLOC);
#[map]
pub static REMAINS: LruHashMap<FlowKey, u8> =
    LruHashMap::with_max_entries(maps::REMAINS.max_entries, 0);
#[map]
pub static DIRECT: HashMap<DirectKey, u64> =
    HashMap::with_max_entries(maps::DIRECT.max_entries, BPF_F_NO_PREALLOC);
#[map]
pub static DIRECT_LEASE: Array<u64> = Array::with_max_entries(maps::DIRECT_LEASE.max_entries, 0);
#[map]
pub static VIPS: HashMap<VipKey, VipEndpoints> =
    HashMap::with_max_entries(maps::VIPS.max_entries, BPF_F_NO_PREALLOC);
#[map]
pub static VIPS_LEASE: Array<u64> = Array::with_max_entries(maps::VIPS_LEASE.max_entries, 0);
#[map]
pub static DIALLED: HashMap<FlowKey, DialledVip> =
    HashMap::with_max_entries(maps::DIALLED.max_entries, BPF_F_NO_PREALLOC);
#[map]
pub static DIRECT_EVENTS: Queue<DirectEvent> =
    Queue::with_max_entries(maps::DIRECT_EVENTS.max_entries, 0);
#[map]
static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(maps::COUNTER_SLOTS, 0);
#[btf_map]
pub static LABELS: SkStorage<u32> = SkStorage::new();
#[btf_map]
pub static NOTES: SkStorage<SocketNote> = SkStorage::new();

/// Counts one event.
#[inline(always)]
pub fn count(counter: Counter) {
    if let Some(slot) = COUNTERS.get_ptr_mut(counter as u32) {
        // SAFETY: the slot is this CPU's own and the verifier checked the bound; a softirq between
        // load and store may lose one count, never more.
        unsafe { *slot += 1 }
    }
}

/// Settings of a pod; `None` when it is not enrolled.
#[inline(always)]
pub fn pod<'a>(netns_cookie: u64) -> Option<&'a Pod> {
    // SAFETY: map values stay valid for the run of the program (RCU), and user space replaces the
    // element instead of writing into it.
    unsafe { PODS.get(netns_cookie) }
}

/// Whose address it is.
#[inline(always)]
pub fn owner(address: &Address) -> Option<u64> {
    // SAFETY: as in `pod`; the value is one aligned word, copied at once.
    unsafe { ADDRESSES.get(address) }.copied()
}

/// Whether an address belongs to the pod.
#[inline(always)]
pub fn is_own(netns_cookie: u64, address: &Address) -> bool {
    owner(address).is_some_and(|owner| owner == netns_cookie)
}

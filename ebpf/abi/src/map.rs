//! The pinned maps: names, shapes, bounds, and what happens at the bound.

use crate::{
    Address, ClientKey, Counter, DialledVip, DirectEvent, DirectKey, Endpoint, FlowKey, FlowState,
    ListenerKey, NetworkKey, Pod, PortKey, SocketNote, VipEndpoints, VipKey,
};

/// Kind of a map, with the kernel's number for it (`enum bpf_map_type`).
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapKind {
    /// `BPF_MAP_TYPE_HASH`
    Hash = 1,
    /// `BPF_MAP_TYPE_ARRAY`
    Array = 2,
    /// `BPF_MAP_TYPE_PERCPU_ARRAY`
    PerCpuArray = 6,
    /// `BPF_MAP_TYPE_LRU_HASH`
    LruHash = 9,
    /// `BPF_MAP_TYPE_LPM_TRIE`
    LpmTrie = 11,
    /// `BPF_MAP_TYPE_SOCKHASH`
    SockHash = 18,
    /// `BPF_MAP_TYPE_QUEUE`
    Queue = 22,
    /// `BPF_MAP_TYPE_SK_STORAGE`
    SocketStorage = 24,
}

/// Shape of a pinned map. One that is found with another shape is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapSpec {
    /// Its name, in the object and in the pin directory.
    pub name: &'static str,
    /// Its kind.
    pub kind: MapKind,
    /// Size of a key in bytes.
    pub key_size: u32,
    /// Size of a value in bytes.
    pub value_size: u32,
    /// Most entries; 0 where the kind has no bound of its own.
    pub max_entries: u32,
}

const fn spec<K, V>(name: &'static str, kind: MapKind, max_entries: u32) -> MapSpec {
    assert!(size_of::<K>() < 256 && size_of::<V>() < 256);
    #[expect(clippy::cast_possible_truncation, reason = "below 256, asserted")]
    let (key_size, value_size) = (size_of::<K>() as u32, size_of::<V>() as u32);
    MapSpec { name, kind, key_size, value_size, max_entries }
}

/// All pinned maps.
pub mod maps {
    use super::*;

    /// Netns cookie → settings. Full: enrolment is refused.
    pub const PODS: MapSpec = spec::<u64, Pod>("PODS", MapKind::Hash, 4096);
    /// Pod address → netns cookie. Full: enrolment is refused.
    pub const ADDRESSES: MapSpec = spec::<Address, u64>("ADDRESSES", MapKind::Hash, 16_384);
    /// Host-side interface index → netns cookie. Full: enrolment is refused.
    pub const GUARDS: MapSpec = spec::<u32, u64>("GUARDS", MapKind::Hash, 8192);
    /// Pod, port, number → a listener of the agent. Full: enrolment is refused.
    pub const LISTENERS: MapSpec = spec::<ListenerKey, u32>("LISTENERS", MapKind::SockHash, 65_536);
    /// Ports in lists. Full: enrolment is refused.
    pub const PORT_RULES: MapSpec = spec::<PortKey, u8>("PORT_RULES", MapKind::Hash, 65_536);
    /// Networks in lists. Full: enrolment is refused.
    pub const NETWORK_RULES: MapSpec =
        spec::<NetworkKey, u8>("NETWORK_RULES", MapKind::LpmTrie, 65_536);
    /// The node's own addresses, from which probes come. Full: setting them is refused.
    pub const NODE_ADDRESSES: MapSpec = spec::<Address, u8>("NODE_ADDRESSES", MapKind::Hash, 1024);
    /// TCP client → where it was going. Full: the oldest goes, whose connection the agent then
    /// refuses if it was not accepted yet.
    pub const ORIGINALS: MapSpec =
        spec::<ClientKey, Endpoint>("ORIGINALS", MapKind::LruHash, 65_536);
    /// UDP client → the resolver it asked. Full: the oldest goes.
    pub const RESOLVERS: MapSpec =
        spec::<ClientKey, Endpoint>("RESOLVERS", MapKind::LruHash, 16_384);
    /// Permitted flows with an open socket. Full: counted, and the guard drops the new flow.
    pub const FLOWS: MapSpec = spec::<FlowKey, FlowState>("FLOWS", MapKind::Hash, 262_144);
    /// Tuples without open socket on which answers may leave. Full: the oldest goes, and with it a
    /// connection that was not accepted yet.
    pub const REMAINS: MapSpec = spec::<FlowKey, u8>("REMAINS", MapKind::LruHash, 65_536);
    /// Pairs of pods that may talk without the agent → revision of the picture the verdict was taken
    /// on. Full: the pair goes on through the agent.
    pub const DIRECT: MapSpec = spec::<DirectKey, u64>("DIRECT", MapKind::Hash, 65_536);
    /// One element: until when verdicts in `DIRECT` are in force, nanoseconds of the monotonic clock.
    pub const DIRECT_LEASE: MapSpec = spec::<u32, u64>("DIRECT_LEASE", MapKind::Array, 1);
    /// Client and virtual address of a service → endpoints among which the kernel's side chooses. Full:
    /// the address goes on through the agent.
    pub const VIPS: MapSpec = spec::<VipKey, VipEndpoints>("VIPS", MapKind::Hash, 16_384);
    /// One element: until when `VIPS` is in force, nanoseconds of the monotonic clock. Apart from that of
    /// `DIRECT`, since an agent that knows nothing of `VIPS` would keep what it does not look after.
    pub const VIPS_LEASE: MapSpec = spec::<u32, u64>("VIPS_LEASE", MapKind::Array, 1);
    /// Direct connections, as their clients see them → the virtual address that was dialled. The agent
    /// removes them, after it has heard of their end. Full: counted, and the connection is told of under
    /// its endpoint's address only.
    pub const DIALLED: MapSpec =
        spec::<FlowKey, DialledVip>("DIALLED", MapKind::Hash, FLOWS.max_entries);
    /// What happened to direct connections. Full: counted, and the event is lost.
    pub const DIRECT_EVENTS: MapSpec =
        spec::<(), DirectEvent>("DIRECT_EVENTS", MapKind::Queue, 32_768);
    /// The agent's sockets (by its own hand, through their descriptors).
    pub const LABELS: MapSpec = spec::<u32, u32>("LABELS", MapKind::SocketStorage, 0);
    /// Notes on the sockets of pods.
    pub const NOTES: MapSpec = spec::<u32, SocketNote>("NOTES", MapKind::SocketStorage, 0);
    /// Counters, by [`Counter`].
    pub const COUNTERS: MapSpec = spec::<u32, u64>("COUNTERS", MapKind::PerCpuArray, COUNTER_SLOTS);

    /// Slots for counters; more than there are, so that a new counter is no new layout.
    pub const COUNTER_SLOTS: u32 = 64;
    const _: () = assert!(Counter::ALL.len() <= COUNTER_SLOTS as usize);

    /// All of them.
    pub const ALL: [MapSpec; 20] = [
        PODS,
        ADDRESSES,
        GUARDS,
        LISTENERS,
        PORT_RULES,
        NETWORK_RULES,
        NODE_ADDRESSES,
        ORIGINALS,
        RESOLVERS,
        FLOWS,
        REMAINS,
        DIRECT,
        DIRECT_LEASE,
        VIPS,
        VIPS_LEASE,
        DIALLED,
        DIRECT_EVENTS,
        LABELS,
        NOTES,
        COUNTERS,
    ];
}

//! A pod's settings, its lists of ports and networks, and the notes kept on its sockets.

use crate::{Address, Endpoint, Port};

/// What is done with a pod. The entry is the switch: without it the programs do nothing.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pod {
    /// Where captured IPv4 connections go; [`Address::NONE`] when the pod has no IPv4 address.
    pub ipv4: Address,
    /// Where captured IPv6 connections go; [`Address::NONE`] when the pod has no IPv6 address.
    pub ipv6: Address,
    /// A [`PodFlags`].
    pub flags: u32,
    /// Which set of list entries is the pod's. A change of settings writes a new set and switches
    /// to it with this one entry.
    pub rule_set: u32,
    /// How many listeners the agent has on each port, numbered from 0. New connections are spread
    /// over them.
    pub slots: u32,
    padding: u32,
}

const _: () = assert!(size_of::<Pod>() == 48);

impl Pod {
    /// From its parts.
    #[inline(always)]
    pub const fn new(ipv4: Address, ipv6: Address, flags: u32, rule_set: u32, slots: u32) -> Self {
        Self { ipv4, ipv6, flags, rule_set, slots, padding: 0 }
    }
}

/// Which of the agent's listening sockets in a pod.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ListenerKey {
    /// The pod's network namespace.
    pub netns_cookie: u64,
    /// Its port, see [`port`](crate::port).
    pub port: Port,
    /// Its number among those of this port.
    pub slot: u16,
    padding: u32,
}

const _: () = assert!(size_of::<ListenerKey>() == 16);

impl ListenerKey {
    /// From its parts.
    #[inline(always)]
    pub const fn new(netns_cookie: u64, port: Port, slot: u16) -> Self {
        Self { netns_cookie, port, slot, padding: 0 }
    }
}

/// Bits of [`Pod::flags`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PodFlags(pub u32);

impl PodFlags {
    /// Outbound TCP is captured.
    pub const OUTBOUND: u32 = 1;
    /// Inbound TCP is captured.
    pub const INBOUND: u32 = 1 << 1;
    /// DNS is captured.
    pub const DNS: u32 = 1 << 2;
    /// UDP is dropped.
    pub const DENY_UDP: u32 = 1 << 3;
    /// ICMP is dropped.
    pub const DENY_ICMP: u32 = 1 << 4;
    /// Enrolment is under way: everything passes, and every new connection is registered with the
    /// guard.
    pub const OBSERVE: u32 = 1 << 5;
    const LISTS: u32 = 8;

    /// The bit that says a list has entries, which saves the look-up when it has none.
    #[inline(always)]
    pub const fn list(list: RuleList) -> u32 {
        1 << (Self::LISTS + list as u32)
    }

    /// Whether any of these bits is set.
    #[inline(always)]
    pub const fn has(self, bits: u32) -> bool {
        self.0 & bits != 0
    }
}

/// A list of ports or networks of a pod.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum RuleList {
    /// Destination ports that are captured.
    OutboundIncludePorts = 0,
    /// Destination ports that are not.
    OutboundExcludePorts = 1,
    /// Local ports that are captured.
    InboundIncludePorts = 2,
    /// Local ports that are not.
    InboundExcludePorts = 3,
    /// Local ports that the node may probe.
    ProbePorts = 4,
    /// Destination networks that are captured.
    OutboundIncludeNetworks = 5,
    /// Destination networks that are not.
    OutboundExcludeNetworks = 6,
    /// Client networks that are captured.
    InboundIncludeNetworks = 7,
    /// Client networks that are not.
    InboundExcludeNetworks = 8,
}

/// Key of a port in a list.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PortKey {
    rule_set: u32,
    port: Port,
    list: u16,
}

const _: () = assert!(size_of::<PortKey>() == 8);

impl PortKey {
    /// From its parts.
    #[inline(always)]
    pub const fn new(rule_set: u32, list: RuleList, port: Port) -> Self {
        Self { rule_set, port, list: list as u16 }
    }

    /// Whose it is.
    pub const fn rule_set(&self) -> u32 {
        self.rule_set
    }
}

/// The part of a [`NetworkKey`] that is matched.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct NetworkRule {
    rule_set: u32,
    list: u32,
    address: [u32; 4],
}

const _: () = assert!(size_of::<NetworkRule>() == 24);

impl NetworkRule {
    /// Bits before the address.
    const HEAD_BITS: u32 = 64;
    /// Bits to compare when an address is looked up.
    pub const LOOKUP_BITS: u32 = Self::HEAD_BITS + 128;

    /// From its parts.
    #[inline(always)]
    pub const fn new(rule_set: u32, list: RuleList, address: Address) -> Self {
        Self { rule_set, list: list as u32, address: address.words() }
    }
}

/// Key of a network in a list, as longest-prefix maps want it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct NetworkKey {
    prefix_length: u32,
    rule: NetworkRule,
}

const _: () = assert!(size_of::<NetworkKey>() == 28);

impl NetworkKey {
    /// A network of `length` bits, counted in the 16-byte form: an IPv4 prefix has 96 more.
    pub const fn new(rule: NetworkRule, length: u8) -> Self {
        Self { prefix_length: NetworkRule::HEAD_BITS + length as u32, rule }
    }

    /// Whose it is.
    pub const fn rule_set(&self) -> u32 {
        self.rule.rule_set
    }
}

/// What was decided about a socket at its last connect.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing: it stays inside the pod.
    None = 0,
    /// It was sent to the agent; the note holds where it was going.
    Captured = 1,
    /// It passes, and its flow is to be registered with the guard.
    Passed = 2,
    /// It goes straight to another pod of the node.
    Direct = 3,
    /// It came straight from another pod of the node.
    DirectAccepted = 4,
}

/// A note on a socket of a pod (socket storage).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketNote {
    /// Where it was going.
    pub target: Endpoint,
    /// A [`Verdict`].
    pub verdict: u32,
    padding: u32,
}

const _: () = assert!(size_of::<SocketNote>() == 32);

impl SocketNote {
    /// From its parts.
    #[inline(always)]
    pub const fn new(verdict: Verdict, target: Endpoint) -> Self {
        Self { target, verdict: verdict as u32, padding: 0 }
    }

    /// Whether the socket was sent to the agent.
    #[inline(always)]
    pub const fn captured(&self) -> bool {
        self.verdict == Verdict::Captured as u32
    }

    /// Whether it goes straight to another pod of the node.
    #[inline(always)]
    pub const fn direct(&self) -> bool {
        self.verdict == Verdict::Direct as u32
    }

    /// Whether it came straight from another pod of the node.
    #[inline(always)]
    pub const fn direct_accepted(&self) -> bool {
        self.verdict == Verdict::DirectAccepted as u32
    }

    /// Whether its flow is to be registered with the guard.
    #[inline(always)]
    pub const fn passed(&self) -> bool {
        self.verdict == Verdict::Passed as u32
    }
}

//! What the eBPF programs and user space agree on: map keys and values, verdicts, counters, and the
//! packet parsing of the guard.
//!
//! **Invariants.** No allocation, no dependency, no unsafe. Everything in a map is `repr(C)`, has no
//! implicit padding, and holds addresses and ports in network byte order; both families use one
//! 16-byte address form. [`LAYOUT`] changes with any of these types.
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

mod address;
mod counter;
mod direct;
mod flow;
mod map;
mod packet;
mod pod;

pub use address::{Address, Endpoint, Port};
pub use counter::Counter;
pub use direct::{
    DialledVip, DirectEvent, DirectEventKind, DirectKey, VIP_ENDPOINTS, VipEndpoints, VipKey,
    payload_acknowledged, tcp_state,
};
pub use flow::{
    ClientKey, FlowKey, FlowOrigin, FlowState, Remains, admits_payload, permits_after_close,
};
pub use map::{MapKind, MapSpec, maps};
pub use packet::{Fetch, Packet, Refusal, TcpFlags, Transport, parse_packet};
pub use pod::{
    ListenerKey, NetworkKey, NetworkRule, Pod, PodFlags, PortKey, RuleList, SocketNote, Verdict,
};

/// Version of everything in the pinned maps. Pins live in a directory of this number, so that a
/// build with other shapes never reads them. Raise it with any change to a key, a value, or to what
/// a field means.
pub const LAYOUT: u32 = 3;

/// The agent's listeners inside a pod's network namespace.
pub mod port {
    /// Captured outbound connections.
    pub const OUTBOUND: u16 = 15001;
    /// Captured inbound connections.
    pub const INBOUND: u16 = 15006;
    /// Tunnels (HBONE). Never captured.
    pub const TUNNEL: u16 = 15008;
    /// The resolver, UDP and TCP.
    pub const RESOLVER: u16 = 15053;
    /// DNS (RFC 1035 §4.2).
    pub const DNS: u16 = 53;

    /// Whether the port is one of the agent's inside an enrolled pod.
    #[inline(always)]
    pub const fn is_agents(port: u16) -> bool {
        matches!(port, OUTBOUND | INBOUND | TUNNEL | RESOLVER)
    }
}

/// IP protocol numbers (IANA "Assigned Internet Protocol Numbers").
pub mod protocol {
    /// ICMP for IPv4.
    pub const ICMP: u8 = 1;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// ICMP for IPv6.
    pub const ICMPV6: u8 = 58;
}

/// Mark of the agent's sockets towards an application inside the pod. Connections that carry it
/// never leave the pod, so the guard has no flow of theirs. It grants nothing.
pub const DELIVERY_MARK: u32 = 0x539;

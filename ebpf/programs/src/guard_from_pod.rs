//! The guard on the host side of a pod's interface, on what comes from the pod. The pod cannot
//! reach it, whatever its capabilities are.

use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use mesh_ebpf_abi::{
    Counter, FlowKey, Packet, PodFlags, Refusal, Transport, permits_after_close, protocol,
};

use crate::maps::{FLOWS, REMAINS, is_own};
use crate::skb::{Guarded, NEXT, guarded, parse, shoot};

#[classifier]
pub fn guard_from_pod(ctx: TcContext) -> i32 {
    let (mut cookie, mut flags) = (0, PodFlags(0));
    match guarded(&ctx, &mut cookie, &mut flags) {
        Guarded::Active => {}
        Guarded::Passive => return NEXT,
        Guarded::Unknown => return shoot(Counter::GuardInterface),
    }
    let mut packet = Packet::ARP;
    if let Err(refusal) = parse(&ctx, &mut packet) {
        return shoot(counter_of(refusal));
    }
    if packet.transport == Transport::Arp {
        return NEXT;
    }
    if !is_own(cookie, &packet.source) && !is_address_free(&packet) {
        return shoot(Counter::GuardSpoofed);
    }
    judge(flags, &packet)
}

#[inline(always)]
fn judge(flags: PodFlags, packet: &Packet) -> i32 {
    match packet.transport {
        Transport::Tcp => judge_tcp(packet),
        Transport::Udp if flags.has(PodFlags::DENY_UDP) => {
            let key = flow_key(protocol::UDP, packet);
            // SAFETY: only the presence is looked at.
            if unsafe { FLOWS.get(key) }.is_some() { NEXT } else { shoot(Counter::GuardUdp) }
        }
        Transport::Icmp | Transport::IcmpV6
            if flags.has(PodFlags::DENY_ICMP) && !packet.is_essential_icmp() =>
        {
            shoot(Counter::GuardIcmp)
        }
        Transport::Fragment if flags.has(PodFlags::DENY_UDP) => shoot(Counter::GuardUdp),
        Transport::Fragment if flags.has(PodFlags::DENY_ICMP) => shoot(Counter::GuardIcmp),
        Transport::Arp
        | Transport::Udp
        | Transport::Icmp
        | Transport::IcmpV6
        | Transport::Fragment => NEXT,
    }
}

#[inline(always)]
fn judge_tcp(packet: &Packet) -> i32 {
    let key = flow_key(protocol::TCP, packet);
    // SAFETY: only the presence is looked at.
    if unsafe { FLOWS.get(key) }.is_some() {
        return NEXT;
    }
    // SAFETY: the value is one byte.
    match unsafe { REMAINS.get(key) } {
        Some(remains) if permits_after_close(*remains, packet.flags, packet.empty) => NEXT,
        _ => shoot(Counter::GuardNoFlow),
    }
}

#[inline(always)]
fn flow_key(transport: u8, packet: &Packet) -> FlowKey {
    FlowKey::new(
        transport,
        (packet.source, packet.source_port),
        (packet.target, packet.target_port),
    )
}

/// What a host sends before or beside its addresses: duplicate address detection and router
/// discovery (RFC 4862 §5.4), DHCP. Never TCP.
#[inline(always)]
fn is_address_free(packet: &Packet) -> bool {
    (packet.source.is_unspecified() || packet.source.is_link_local_v6())
        && packet.transport != Transport::Tcp
}

#[inline(always)]
const fn counter_of(refusal: Refusal) -> Counter {
    match refusal {
        Refusal::Vlan => Counter::GuardVlan,
        Refusal::EtherType => Counter::GuardEtherType,
        Refusal::Malformed => Counter::GuardMalformed,
        Refusal::Protocol => Counter::GuardProtocol,
        Refusal::Fragment => Counter::GuardFragment,
        Refusal::Extension => Counter::GuardExtension,
    }
}

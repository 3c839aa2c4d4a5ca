//! The guard on the host side of a pod's interface, on what comes from the pod. The pod cannot
//! reach it, whatever its capabilities are.

use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use mesh_ebpf_abi::{
    Address, Counter, FlowKey, Packet, Pod, PodFlags, Refusal, TcpSegment, Transport,
    permits_after_close, protocol,
};

use crate::maps::{FLOWS, REMAINS, is_own};
use crate::skb::{Guarded, NEXT, guarded, parse, shoot};

#[classifier]
pub fn guard_from_pod(ctx: TcContext) -> i32 {
    let (cookie, pod) = match guarded(&ctx) {
        Guarded::Pod { cookie, pod } => (cookie, pod),
        Guarded::Passive => return NEXT,
        Guarded::Unknown => return shoot(Counter::GuardInterface),
    };
    let (source, target, transport) = match parse(&ctx) {
        Ok(Packet::Ip { source, target, transport }) => (source, target, transport),
        Ok(Packet::Arp) => return NEXT,
        Err(refusal) => return shoot(counter_of(refusal)),
    };
    if !is_own(cookie, &source) && !is_address_free(&source, &transport) {
        return shoot(Counter::GuardSpoofed);
    }
    judge(&pod, &source, &target, &transport)
}

#[inline(always)]
fn judge(pod: &Pod, source: &Address, target: &Address, transport: &Transport) -> i32 {
    let flags = PodFlags(pod.flags);
    match transport {
        Transport::Tcp(segment) => judge_tcp(source, target, segment),
        Transport::Udp { source_port, target_port } => {
            let key =
                FlowKey::new(protocol::UDP, (*source, *source_port), (*target, *target_port));
            // SAFETY: only the presence is looked at.
            if !flags.has(PodFlags::DENY_UDP) || unsafe { FLOWS.get(key) }.is_some() {
                NEXT
            } else {
                shoot(Counter::GuardUdp)
            }
        }
        Transport::Icmp(message) if flags.has(PodFlags::DENY_ICMP) && !message.is_essential() => {
            shoot(Counter::GuardIcmp)
        }
        Transport::Fragment if flags.has(PodFlags::DENY_UDP) => shoot(Counter::GuardUdp),
        Transport::Fragment if flags.has(PodFlags::DENY_ICMP) => shoot(Counter::GuardIcmp),
        Transport::Icmp(_) | Transport::Fragment => NEXT,
    }
}

#[inline(always)]
fn judge_tcp(source: &Address, target: &Address, segment: &TcpSegment) -> i32 {
    let key = FlowKey::new(
        protocol::TCP,
        (*source, segment.source_port),
        (*target, segment.target_port),
    );
    // SAFETY: only the presence is looked at.
    if unsafe { FLOWS.get(key) }.is_some() {
        return NEXT;
    }
    // SAFETY: the value is one byte, copied at once.
    match unsafe { REMAINS.get(key) }.copied() {
        Some(remains) if permits_after_close(remains, segment) => NEXT,
        _ => shoot(Counter::GuardNoFlow),
    }
}

/// What a host sends before or beside its addresses: duplicate address detection and router
/// discovery (RFC 4862 §5.4), DHCP. Never TCP.
#[inline(always)]
fn is_address_free(source: &Address, transport: &Transport) -> bool {
    (source.is_unspecified() || source.is_link_local_v6())
        && !matches!(transport, Transport::Tcp(_))
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

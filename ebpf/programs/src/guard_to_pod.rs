//! The guard on the host side of a pod's interface, on what goes to the pod: it learns what may be
//! answered, and keeps out datagrams that the pod may not have.

use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use mesh_ebpf_abi::{
    Address, Counter, FlowKey, Packet, PodFlags, Remains, TcpFlags, TcpSegment, Transport, protocol,
};

use crate::maps::{FLOWS, REMAINS, is_own};
use crate::skb::{Guarded, NEXT, guarded, parse, shoot};

#[classifier]
pub fn guard_to_pod(ctx: TcContext) -> i32 {
    let Guarded::Pod { cookie, pod } = guarded(&ctx) else { return NEXT };
    // What is not understood cannot be answered either, so it may arrive.
    let Ok(Packet::Ip { source, target, transport }) = parse(&ctx) else { return NEXT };
    let flags = PodFlags(pod.flags);
    match transport {
        Transport::Tcp(segment) if is_own(cookie, &target) => learn(&source, &target, &segment),
        Transport::Udp { source_port, target_port } if flags.has(PodFlags::DENY_UDP) => {
            let key = FlowKey::new(protocol::UDP, (target, target_port), (source, source_port));
            // SAFETY: only the presence is looked at.
            if unsafe { FLOWS.get(key) }.is_none() {
                return shoot(Counter::GuardUdp);
            }
        }
        Transport::Icmp(message) if flags.has(PodFlags::DENY_ICMP) && !message.is_essential() => {
            return shoot(Counter::GuardIcmp);
        }
        Transport::Fragment if flags.has(PodFlags::DENY_UDP) => return shoot(Counter::GuardUdp),
        Transport::Fragment if flags.has(PodFlags::DENY_ICMP) => return shoot(Counter::GuardIcmp),
        Transport::Tcp(_) | Transport::Udp { .. } | Transport::Icmp(_) | Transport::Fragment => {}
    }
    NEXT
}

/// The kernel may answer a SYN with SYN-ACK or RST, and a segment for which it has no socket (a
/// predecessor's connection to a reused address) with RST. Once accepted, `sock_ops` registers the
/// connection.
#[inline(always)]
fn learn(source: &Address, target: &Address, segment: &TcpSegment) {
    let key = FlowKey::new(
        protocol::TCP,
        (*target, segment.target_port),
        (*source, segment.source_port),
    );
    let opens = segment.flags.has(TcpFlags::SYN) && !segment.flags.has(TcpFlags::ACK);
    // SAFETY: only the presence is looked at.
    if !opens && unsafe { FLOWS.get(key) }.is_some() {
        return;
    }
    let mode = if opens { BPF_ANY } else { BPF_NOEXIST };
    // It exists already, or the kernel has no memory, in which case the answer is dropped.
    REMAINS.insert(key, Remains::Arrived as u8, u64::from(mode)).ok();
}

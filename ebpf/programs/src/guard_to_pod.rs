//! The guard on the host side of a pod's interface, on what goes to the pod: it learns what may be
//! answered, and keeps out datagrams that the pod may not have.

use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use mesh_ebpf_abi::{Counter, FlowKey, Packet, PodFlags, Remains, TcpFlags, Transport, protocol};

use crate::maps::{FLOWS, REMAINS, is_own};
use crate::skb::{Guarded, NEXT, guarded, parse, shoot};

#[classifier]
pub fn guard_to_pod(ctx: TcContext) -> i32 {
    let (mut cookie, mut flags) = (0, PodFlags(0));
    if guarded(&ctx, &mut cookie, &mut flags) != Guarded::Active {
        return NEXT;
    }
    let mut packet = Packet::ARP;
    if parse(&ctx, &mut packet).is_err() {
        // What is not understood cannot be answered either, so it may arrive.
        return NEXT;
    }
    match packet.transport {
        Transport::Tcp if is_own(cookie, &packet.target) => learn(&packet),
        Transport::Udp if flags.has(PodFlags::DENY_UDP) => {
            // SAFETY: only the presence is looked at.
            if unsafe { FLOWS.get(answer_key(protocol::UDP, &packet)) }.is_none() {
                return shoot(Counter::GuardUdp);
            }
        }
        Transport::Icmp | Transport::IcmpV6
            if flags.has(PodFlags::DENY_ICMP) && !packet.is_essential_icmp() =>
        {
            return shoot(Counter::GuardIcmp);
        }
        Transport::Fragment if flags.has(PodFlags::DENY_UDP) => return shoot(Counter::GuardUdp),
        Transport::Fragment if flags.has(PodFlags::DENY_ICMP) => return shoot(Counter::GuardIcmp),
        Transport::Arp
        | Transport::Tcp
        | Transport::Udp
        | Transport::Icmp
        | Transport::IcmpV6
        | Transport::Fragment => {}
    }
    NEXT
}

/// The kernel may answer a SYN with SYN-ACK or RST, and a segment for which it has no socket (a
/// predecessor's connection to a reused address) with RST. Once accepted, `sock_ops` registers the
/// connection.
#[inline(always)]
fn learn(packet: &Packet) {
    let key = answer_key(protocol::TCP, packet);
    let opens = packet.flags.has(TcpFlags::SYN) && !packet.flags.has(TcpFlags::ACK);
    // SAFETY: only the presence is looked at.
    if !opens && unsafe { FLOWS.get(key) }.is_some() {
        return;
    }
    let mode = if opens { BPF_ANY } else { BPF_NOEXIST };
    // It exists already, or the kernel has no memory, in which case the answer is dropped.
    REMAINS.insert(key, Remains::Arrived as u8, u64::from(mode)).ok();
}

/// The flow of an answer, as the pod sees it.
#[inline(always)]
fn answer_key(transport: u8, packet: &Packet) -> FlowKey {
    FlowKey::new(
        transport,
        (packet.target, packet.target_port),
        (packet.source, packet.source_port),
    )
}

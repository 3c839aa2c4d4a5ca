//! The guard on the host side of a pod's interface, on what goes to the pod: it learns what may be
//! answered, and keeps out datagrams that the pod may not have and the payload of connections that
//! the pod led past the agent.

use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use mesh_ebpf_abi::{
    Counter, FlowKey, Packet, PodFlags, Remains, TcpFlags, Transport, admits_payload, protocol,
};

use crate::maps::{FLOWS, REMAINS, is_own, pod};
use crate::rules::selects_inbound;
use crate::skb::{Guarded, NEXT, guarded, parse, shoot};

#[classifier]
pub fn guard_to_pod(ctx: TcContext) -> i32 {
    let (mut cookie, mut flags) = (0, PodFlags(0));
    if guarded(&ctx, &mut cookie, &mut flags) != Guarded::Active {
        return NEXT;
    }
    let mut packet = Packet::ARP;
    if parse(&ctx, &mut packet).is_err() {
        // It cannot be answered either, and a pod that takes off a tunnel header or puts together
        // fragments would see segments that were not looked at here.
        return shoot(Counter::GuardInbound);
    }
    match packet.transport {
        Transport::Tcp if is_own(cookie, &packet.target) => return receive(cookie, &packet),
        Transport::Tcp => return shoot(Counter::GuardForeignTarget),
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
        | Transport::Udp
        | Transport::Icmp
        | Transport::IcmpV6
        | Transport::Fragment => {}
    }
    NEXT
}

/// The kernel may answer a SYN with SYN-ACK or RST, and a segment for which it has no socket (a
/// predecessor's connection to a reused address) with RST. `steer_inbound` admits the SYN when it
/// finds it where it should go; what the pod redirected or rewrote it does not find. Once accepted,
/// `track_sockets` registers the connection.
#[inline(always)]
fn receive(cookie: u64, packet: &Packet) -> i32 {
    let key = answer_key(protocol::TCP, packet);
    // SAFETY: the value is one byte, copied at once.
    let remains = unsafe { REMAINS.get(key) }.copied().unwrap_or(0);
    if packet.flags.has(TcpFlags::SYN) && !packet.flags.has(TcpFlags::ACK) {
        if !packet.empty && is_captured(cookie, packet) {
            // TCP Fast Open: nobody has judged the sender yet. It asks again without payload.
            return shoot(Counter::GuardUnadmitted);
        }
        // Of a retransmission nobody is asked again.
        if !Remains::is_admitted(remains) {
            note(&key, Remains::Arrived, BPF_ANY);
        }
        return NEXT;
    }
    // SAFETY: only the presence is looked at.
    if unsafe { FLOWS.get(key) }.is_some() {
        return NEXT;
    }
    if remains == 0 {
        note(&key, Remains::Stray, BPF_NOEXIST);
    } else if !packet.empty && !admits_payload(remains) {
        return shoot(Counter::GuardUnadmitted);
    }
    NEXT
}

#[inline(always)]
fn note(key: &FlowKey, remains: Remains, mode: u32) {
    // It exists already, or the kernel has no memory, in which case the answer is dropped.
    REMAINS.insert(key, remains as u8, u64::from(mode)).ok();
}

#[inline(always)]
fn is_captured(cookie: u64, packet: &Packet) -> bool {
    pod(cookie).is_some_and(|pod| {
        PodFlags(pod.flags).has(PodFlags::INBOUND)
            && selects_inbound(pod, &packet.source, packet.target_port)
    })
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

//! cgroup/sendmsg4 and sendmsg6: datagrams of unconnected sockets, DNS to the agent's resolver.

use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use mesh_ebpf_abi::{ClientKey, Counter, Endpoint, PodFlags, Port, Verdict, port};

use crate::connect::{address_of_family, refuse_family, stays_inside};
use crate::flows::register_datagrams;
use crate::maps::{RESOLVERS, count, pod};
use crate::sock_addr::{Call, Family, PROCEED, REFUSE};

#[cgroup_sock_addr(sendmsg4)]
pub fn sendmsg4(ctx: SockAddrContext) -> i32 {
    sendmsg(&Call::new(&ctx, Family::V4))
}

#[cgroup_sock_addr(sendmsg6)]
pub fn sendmsg6(ctx: SockAddrContext) -> i32 {
    sendmsg(&Call::new(&ctx, Family::V6))
}

#[inline(always)]
fn sendmsg(call: &Call<'_>) -> i32 {
    let cookie = call.netns_cookie();
    let Some(pod) = pod(cookie) else { return PROCEED };
    let flags = PodFlags(pod.flags);
    let target = call.read();
    if flags.has(PodFlags::OBSERVE) || stays_inside(cookie, &target.address) {
        return PROCEED;
    }
    let is_query = target.port.get() == port::DNS && flags.has(PodFlags::DNS);
    if !is_query && !flags.has(PodFlags::DENY_UDP) {
        return PROCEED;
    }
    if call.is_labelled() {
        register_datagrams(call, cookie, flags, target);
        return PROCEED;
    }
    if !is_query {
        count(Counter::UdpRefused);
        return REFUSE;
    }
    let Some(agent) = address_of_family(pod, &target.address) else {
        return refuse_family();
    };
    if !call.annotate(Verdict::Captured, target) {
        count(Counter::OutboundNoMemory);
        return REFUSE;
    }
    let from = call.source();
    let address = if from.address.is_unspecified() { agent } else { from.address };
    let client = ClientKey::new(cookie, (address, from.port), Port::new(port::RESOLVER));
    if RESOLVERS.insert(client, target, 0).is_err() {
        count(Counter::OrigDstLost);
    }
    call.write(&Endpoint::new(agent, Port::new(port::RESOLVER)));
    count(Counter::DnsCaptured);
    PROCEED
}

//! cgroup/recvmsg4 and recvmsg6: an answer of the agent's resolver comes from whom the socket
//! asked. A socket that asked several sees the one it asked last.

use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use mesh_ebpf_abi::port;

use crate::maps::is_own;
use crate::sock_addr::{Family, PROCEED, captured_target, netns_cookie, read, write};

#[cgroup_sock_addr(recvmsg4)]
pub fn recvmsg4(ctx: SockAddrContext) -> i32 {
    recvmsg(&ctx, Family::V4)
}

/// Also runs for IPv4 answers on an IPv6 socket, with a mapped address.
#[cgroup_sock_addr(recvmsg6)]
pub fn recvmsg6(ctx: SockAddrContext) -> i32 {
    recvmsg(&ctx, Family::V6)
}

#[inline(always)]
fn recvmsg(ctx: &SockAddrContext, family: Family) -> i32 {
    let from = read(ctx, family);
    if from.port.get() == port::RESOLVER
        && is_own(netns_cookie(ctx), &from.address)
        && let Some(asked) = captured_target(ctx)
        && asked.address.is_v4() == from.address.is_v4()
    {
        write(ctx, family, &asked);
    }
    PROCEED
}

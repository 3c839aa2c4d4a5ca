//! cgroup/recvmsg4 and recvmsg6: an answer of the agent's resolver comes from whom the socket
//! asked. A socket that asked several sees the one it asked last.

use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use mesh_ebpf_abi::port;

use crate::maps::is_own;
use crate::sock_addr::{Call, Family, PROCEED};

#[cgroup_sock_addr(recvmsg4)]
pub fn recvmsg4(ctx: SockAddrContext) -> i32 {
    recvmsg(&Call::new(&ctx, Family::V4))
}

/// Also runs for IPv4 answers on an IPv6 socket, with a mapped address.
#[cgroup_sock_addr(recvmsg6)]
pub fn recvmsg6(ctx: SockAddrContext) -> i32 {
    recvmsg(&Call::new(&ctx, Family::V6))
}

#[inline(always)]
fn recvmsg(call: &Call<'_>) -> i32 {
    let from = call.read();
    if from.port.get() == port::RESOLVER
        && is_own(call.netns_cookie(), &from.address)
        && let Some(asked) = call.captured_target()
        && asked.address.is_v4() == from.address.is_v4()
    {
        call.write(asked);
    }
    PROCEED
}

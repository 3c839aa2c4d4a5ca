//! cgroup/bind4 and bind6: the agent's ports inside a pod are the agent's alone.
//!
//! A process of the pod that listened there, beside the agent or while it is away, would take connections that no
//! policy has judged.

use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use mesh_ebpf_abi::{Counter, port};

use crate::maps::{count, pod};
use crate::sock_addr::{Call, Family, PROCEED, REFUSE};

#[cgroup_sock_addr(bind4)]
pub fn bind4(ctx: SockAddrContext) -> i32 {
    bind(&Call::new(&ctx, Family::V4))
}

#[cgroup_sock_addr(bind6)]
pub fn bind6(ctx: SockAddrContext) -> i32 {
    bind(&Call::new(&ctx, Family::V6))
}

#[inline(always)]
fn bind(call: &Call<'_>) -> i32 {
    if pod(call.netns_cookie()).is_none() {
        return PROCEED;
    }
    let wanted = call.read().port.get();
    if !port::is_agents(wanted) || call.is_labelled() {
        return PROCEED;
    }
    count(Counter::BindRefused);
    REFUSE
}

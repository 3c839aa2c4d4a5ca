//! The kernel side of capture, one file per hook.
//!
//! | file | hooks | job |
//! |---|---|---|
//! | bind.rs | cgroup/bind4, bind6 | keep the agent's ports in the pod for the agent |
//! | connect.rs | cgroup/connect4, connect6 | send outbound TCP and DNS to the agent |
//! | direct.rs | connect, sk_lookup, sock_ops | two pods of the node that may talk without the agent |
//! | sendmsg.rs | cgroup/sendmsg4, sendmsg6 | the same for unconnected DNS sockets |
//! | recvmsg.rs | cgroup/recvmsg4, recvmsg6 | DNS answers come from whom was asked |
//! | getpeername.rs | cgroup/getpeername4, getpeername6 | so does everything else |
//! | sock_ops.rs | sock_ops | original destinations and permitted flows, by source address |
//! | sk_lookup.rs | sk_lookup | send inbound TCP to the agent |
//! | guard_from_pod.rs | tc, host side, from the pod | nothing leaves that was not permitted |
//! | guard_to_pod.rs | tc, host side, towards the pod | answers to what arrives are permitted |
//!
//! A pod without entry in `PODS` is left alone by all of them. One object loads on Linux 6.1 and
//! later: no helper is used that any supported kernel lacks (no netns cookie in tc and sk_lookup).
#![no_std]
#![no_main]

mod bind;
mod connect;
mod direct;
mod flows;
mod getpeername;
mod guard_from_pod;
mod guard_to_pod;
mod maps;
mod recvmsg;
mod rules;
mod sendmsg;
mod sk_lookup;
mod skb;
mod sock_addr;
mod sock_ops;

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // No panic survives into the object: the verifier refuses a loop without end.
    loop {}
}

/// The kernel lends some helpers only to programs under a GPL-compatible licence; these are
/// available under either of the two.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

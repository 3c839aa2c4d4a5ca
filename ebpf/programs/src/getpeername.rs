//! cgroup/getpeername4 and getpeername6: the peer of a captured socket is who it connected to, and so is
//! that of a direct one, which may have dialled a service.
//!
//! The pod's settings are not looked at: a connection that was captured stays so after its pod was
//! unenrolled.

use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use mesh_ebpf_abi::{ClientKey, Endpoint, FlowKey, port, protocol};

use crate::maps::{DIALLED, ORIGINALS, is_own};
use crate::sock_addr::{Call, Family, PROCEED};

#[cgroup_sock_addr(getpeername4)]
pub fn getpeername4(ctx: SockAddrContext) -> i32 {
    getpeername(&Call::new(&ctx, Family::V4))
}

#[cgroup_sock_addr(getpeername6)]
pub fn getpeername6(ctx: SockAddrContext) -> i32 {
    getpeername(&Call::new(&ctx, Family::V6))
}

#[inline(always)]
fn getpeername(call: &Call<'_>) -> i32 {
    let peer = call.read();
    let port = peer.port.get();
    if port != port::OUTBOUND && port != port::RESOLVER {
        direct(call, &peer);
        return PROCEED;
    }
    if let Some(target) = call.captured_target() {
        call.write(target);
        return PROCEED;
    }
    // An MPTCP socket carries no note, its first subflow does; both have the same source address.
    let cookie = call.netns_cookie();
    if !is_own(cookie, &peer.address) {
        return PROCEED;
    }
    let client = call.source();
    let key = ClientKey::new(cookie, (client.address, client.port), peer.port);
    // SAFETY: an entry that is replaced meanwhile is another connection's only if this one is
    // closed.
    if let Some(target) = unsafe { ORIGINALS.get(key) } {
        call.write(target);
    }
    PROCEED
}

/// The peer of a connection that goes straight to another pod of the node.
#[inline(always)]
fn direct(call: &Call<'_>, peer: &Endpoint) {
    if let Some(target) = call.direct_target() {
        call.write(target);
        return;
    }
    if call.protocol() != IPPROTO_MPTCP {
        return;
    }
    // As above: its first subflow carries the note.
    let client = call.source();
    let flow =
        FlowKey::new(protocol::TCP, (client.address, client.port), (peer.address, peer.port));
    // SAFETY: as above.
    if let Some(dialled) = unsafe { DIALLED.get(flow) } {
        call.write(&dialled.vip);
    }
}

const IPPROTO_MPTCP: u32 = 262;

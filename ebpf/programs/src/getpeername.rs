//! cgroup/getpeername4 and getpeername6: the peer of a captured socket is who it connected to.
//!
//! The pod's settings are not looked at: a connection that was captured stays so after its pod was
//! unenrolled.

use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use mesh_ebpf_abi::{ClientKey, port};

use crate::maps::{ORIGINALS, is_own};
use crate::sock_addr::{Family, PROCEED, captured_target, netns_cookie, read, source, write};

#[cgroup_sock_addr(getpeername4)]
pub fn getpeername4(ctx: SockAddrContext) -> i32 {
    getpeername(&ctx, Family::V4)
}

#[cgroup_sock_addr(getpeername6)]
pub fn getpeername6(ctx: SockAddrContext) -> i32 {
    getpeername(&ctx, Family::V6)
}

#[inline(always)]
fn getpeername(ctx: &SockAddrContext, family: Family) -> i32 {
    let peer = read(ctx, family);
    let port = peer.port.get();
    if port != port::OUTBOUND && port != port::RESOLVER {
        return PROCEED;
    }
    if let Some(target) = captured_target(ctx) {
        write(ctx, family, &target);
        return PROCEED;
    }
    // An MPTCP socket carries no note, its first subflow does; both have the same source address.
    let cookie = netns_cookie(ctx);
    if !is_own(cookie, &peer.address) {
        return PROCEED;
    }
    let client = source(ctx, family);
    let key = ClientKey::new(cookie, client.address, client.port);
    // SAFETY: a copy is taken at once; an entry that is replaced meanwhile is another connection's
    // only if this one is closed.
    if let Some(target) = unsafe { ORIGINALS.get(key) }.copied() {
        write(ctx, family, &target);
    }
    PROCEED
}

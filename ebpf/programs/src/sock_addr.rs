//! Reading and writing the socket address of a cgroup hook, alike for both families.
//!
//! Fields of the context are read one by one and volatile: merged loads, or loads at a computed
//! offset, are refused by the verifier.

use core::ptr::{addr_of, addr_of_mut, read_volatile, write_volatile};

use aya_ebpf::EbpfContext;
use aya_ebpf::helpers::generated::bpf_get_netns_cookie;
use aya_ebpf::programs::SockAddrContext;
use mesh_ebpf_abi::{Address, Endpoint, Port, SocketNote, Verdict};

use crate::maps::{LABELS, NOTES};

/// Lets the system call go on.
pub const PROCEED: i32 = 1;
/// Fails the system call, with `EPERM` unless another error was set.
pub const REFUSE: i32 = 0;

/// Which hook runs.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Family {
    V4,
    V6,
}

/// The network namespace of the socket.
#[inline(always)]
pub fn netns_cookie(ctx: &SockAddrContext) -> u64 {
    // SAFETY: the context is the one the kernel passed.
    unsafe { bpf_get_netns_cookie(ctx.as_ptr()) }
}

/// The socket's protocol.
#[inline(always)]
pub fn socket_protocol(ctx: &SockAddrContext) -> u32 {
    // SAFETY: the context is the one the kernel passed; the verifier checks offset and width.
    unsafe { read_volatile(addr_of!((*ctx.sock_addr).protocol)) }
}

/// The address of the call: the destination, or the peer that is about to be reported.
#[inline(always)]
pub fn read(ctx: &SockAddrContext, family: Family) -> Endpoint {
    let raw = ctx.sock_addr;
    // SAFETY: as in `socket_protocol`. The IPv4 hooks may not read `user_ip6` and vice versa;
    // `family` is a constant at each call.
    unsafe {
        let port = Port::from_network_word(read_volatile(addr_of!((*raw).user_port)));
        let address = match family {
            Family::V4 => Address::from_word(read_volatile(addr_of!((*raw).user_ip4))),
            Family::V6 => Address::from_words([
                read_volatile(addr_of!((*raw).user_ip6[0])),
                read_volatile(addr_of!((*raw).user_ip6[1])),
                read_volatile(addr_of!((*raw).user_ip6[2])),
                read_volatile(addr_of!((*raw).user_ip6[3])),
            ]),
        };
        Endpoint::new(address, port)
    }
}

/// Changes the address of the call.
#[inline(always)]
pub fn write(ctx: &SockAddrContext, family: Family, endpoint: &Endpoint) {
    let raw = ctx.sock_addr;
    let words = endpoint.address.words();
    // SAFETY: as in `read`.
    unsafe {
        match family {
            Family::V4 => write_volatile(addr_of_mut!((*raw).user_ip4), words[3]),
            Family::V6 => {
                write_volatile(addr_of_mut!((*raw).user_ip6[0]), words[0]);
                write_volatile(addr_of_mut!((*raw).user_ip6[1]), words[1]);
                write_volatile(addr_of_mut!((*raw).user_ip6[2]), words[2]);
                write_volatile(addr_of_mut!((*raw).user_ip6[3]), words[3]);
            }
        }
        write_volatile(addr_of_mut!((*raw).user_port), endpoint.port.network_word());
    }
}

/// The source address of the socket; unspecified parts are 0.
#[inline(always)]
pub fn source(ctx: &SockAddrContext, family: Family) -> Endpoint {
    // SAFETY: `sk` of a socket address context is never null; fields as in `read`.
    unsafe {
        let socket = (*ctx.sock_addr).__bindgen_anon_1.sk;
        #[expect(clippy::cast_possible_truncation, reason = "a port, in host order")]
        let port = Port::new(read_volatile(addr_of!((*socket).src_port)) as u16);
        let address = match family {
            Family::V4 => Address::from_word(read_volatile(addr_of!((*socket).src_ip4))),
            Family::V6 => Address::from_words([
                read_volatile(addr_of!((*socket).src_ip6[0])),
                read_volatile(addr_of!((*socket).src_ip6[1])),
                read_volatile(addr_of!((*socket).src_ip6[2])),
                read_volatile(addr_of!((*socket).src_ip6[3])),
            ]),
        };
        Endpoint::new(address, port)
    }
}

/// Whether the socket is the agent's. Only user space with access to the map can label a socket;
/// a mark could be set by any pod with `CAP_NET_RAW`.
#[inline(always)]
pub fn is_labelled(ctx: &SockAddrContext) -> bool {
    // SAFETY: the pointer is only compared.
    !unsafe { LABELS.get_ptr_mut(ctx) }.is_null()
}

/// Where the socket was going, if it was sent to the agent.
#[inline(always)]
pub fn captured_target(ctx: &SockAddrContext) -> Option<Endpoint> {
    // SAFETY: storage lives as long as the socket, which the kernel holds during the call.
    let note = unsafe { NOTES.get_ptr_mut(ctx).as_ref() }?;
    note.captured().then_some(note.target)
}

/// Writes the note of a socket; `false` when the kernel has no memory for it.
#[inline(always)]
pub fn annotate(ctx: &SockAddrContext, verdict: Verdict, target: Endpoint) -> bool {
    let mut note = SocketNote::new(verdict, target);
    // SAFETY: as in `captured_target`; the kernel copies the initial value.
    let stored = unsafe { NOTES.get_or_insert_ptr_mut(ctx, Some(&mut note)) };
    if stored.is_null() {
        return false;
    }
    // SAFETY: not null, and only the call that holds the socket writes it.
    unsafe { *stored = note }
    true
}

/// Takes back the note of an earlier connect of the same socket.
#[inline(always)]
pub fn forget(ctx: &SockAddrContext) {
    // SAFETY: as in `captured_target`.
    if let Some(note) = unsafe { NOTES.get_ptr_mut(ctx).as_mut() } {
        note.verdict = Verdict::None as u8;
    }
}

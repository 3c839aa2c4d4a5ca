//! Reading and writing the socket address of a cgroup hook, alike for both families.
//!
//! Fields of the context are read one by one and volatile: merged loads, or loads at a computed
//! offset, are refused by the verifier.

use core::ptr::{addr_of, addr_of_mut, null_mut, read_volatile, write_volatile};

use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::{BPF_SK_STORAGE_GET_F_CREATE, bpf_sock, bpf_sock_addr};
use aya_ebpf::helpers::generated::{bpf_get_netns_cookie, bpf_sk_storage_get};
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

/// A call that a hook judges.
pub struct Call<'a> {
    ctx: &'a SockAddrContext,
    family: Family,
    /// Read once: two reads in different branches would be merged into one at a computed offset.
    socket: *mut bpf_sock,
}

impl<'a> Call<'a> {
    #[inline(always)]
    pub fn new(ctx: &'a SockAddrContext, family: Family) -> Self {
        // SAFETY: the context is the one the kernel passed; the verifier checks offset and width.
        let socket = unsafe { read_volatile(addr_of!((*ctx.sock_addr).__bindgen_anon_1.sk)) };
        Self { ctx, family, socket }
    }

    /// Which hook runs.
    #[inline(always)]
    pub fn family(&self) -> Family {
        self.family
    }

    /// The context, for helpers.
    #[inline(always)]
    pub fn raw(&self) -> *mut bpf_sock_addr {
        self.ctx.sock_addr
    }

    /// The network namespace of the socket.
    #[inline(always)]
    pub fn netns_cookie(&self) -> u64 {
        // SAFETY: the context is the one the kernel passed.
        unsafe { bpf_get_netns_cookie(self.ctx.as_ptr()) }
    }

    /// The socket's protocol.
    #[inline(always)]
    pub fn protocol(&self) -> u32 {
        // SAFETY: as in `new`.
        unsafe { read_volatile(addr_of!((*self.ctx.sock_addr).protocol)) }
    }

    /// The address of the call: the destination, or the peer that is about to be reported.
    #[inline(always)]
    pub fn read(&self) -> Endpoint {
        let raw = self.ctx.sock_addr;
        // SAFETY: as in `new`. The IPv4 hooks may not read `user_ip6` and vice versa; the family is
        // a constant of each program.
        unsafe {
            let port = Port::from_network_word(read_volatile(addr_of!((*raw).user_port)));
            let address = match self.family {
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
    pub fn write(&self, endpoint: &Endpoint) {
        let raw = self.ctx.sock_addr;
        let words = endpoint.address.words();
        // SAFETY: as in `read`.
        unsafe {
            match self.family {
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
    pub fn source(&self) -> Endpoint {
        let socket = self.socket;
        // SAFETY: the socket of an address context is never null; fields as in `read`.
        unsafe {
            #[expect(clippy::cast_possible_truncation, reason = "a port, in host order")]
            let port = Port::new(read_volatile(addr_of!((*socket).src_port)) as u16);
            let address = match self.family {
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

    /// Whether the socket is the agent's. Only user space with access to the map can label a
    /// socket; a mark could be set by any pod with `CAP_NET_RAW`.
    #[inline(always)]
    pub fn is_labelled(&self) -> bool {
        is_labelled(self.socket)
    }

    /// Where the socket was going, if it was sent to the agent.
    #[inline(always)]
    pub fn captured_target(&self) -> Option<&Endpoint> {
        note(self.socket).filter(|note| note.captured()).map(|note| &note.target)
    }

    /// Whom the socket dialled, if it goes straight to another pod of the node.
    #[inline(always)]
    pub fn direct_target(&self) -> Option<&Endpoint> {
        note(self.socket).filter(|note| note.direct()).map(|note| &note.target)
    }

    /// Writes the note of the socket; `false` when the kernel has no memory for it.
    #[inline(always)]
    pub fn annotate(&self, verdict: Verdict, target: Endpoint) -> bool {
        let mut initial = SocketNote::new(verdict, target);
        // SAFETY: storage lives as long as the socket, which the kernel holds during the call, and
        // only this call writes it.
        unsafe {
            let stored = bpf_sk_storage_get(
                (&raw const NOTES).cast_mut().cast(),
                self.socket.cast(),
                (&raw mut initial).cast(),
                BPF_SK_STORAGE_GET_F_CREATE.into(),
            )
            .cast::<SocketNote>();
            if stored.is_null() {
                return false;
            }
            *stored = initial;
        }
        true
    }

    /// Takes back the note of an earlier connect of the same socket.
    #[inline(always)]
    pub fn forget(&self) {
        let note = stored_note(self.socket);
        if !note.is_null() {
            // SAFETY: as in `annotate`.
            unsafe { (*note).verdict = Verdict::None as u32 }
        }
    }
}

/// Whether a socket is the agent's.
#[inline(always)]
pub fn is_labelled(socket: *mut bpf_sock) -> bool {
    // SAFETY: `socket` is not null; the result is only compared.
    unsafe {
        !bpf_sk_storage_get((&raw const LABELS).cast_mut().cast(), socket.cast(), null_mut(), 0)
            .is_null()
    }
}

/// The note of a socket. A reference, since a copy of an absent one would be uninitialised words,
/// which the verifier does not let pass even where nobody reads them.
#[inline(always)]
pub fn note<'a>(socket: *mut bpf_sock) -> Option<&'a SocketNote> {
    // SAFETY: storage lives as long as the socket, which the kernel holds.
    unsafe { stored_note(socket).as_ref() }
}

#[inline(always)]
fn stored_note(socket: *mut bpf_sock) -> *mut SocketNote {
    // SAFETY: `socket` is not null.
    unsafe {
        bpf_sk_storage_get((&raw const NOTES).cast_mut().cast(), socket.cast(), null_mut(), 0)
            .cast()
    }
}

//! sock_ops: what is known at connect moves to where it is needed, now that the source address is
//! chosen and no packet has left: the original destination to the agent, the permitted flow to the
//! guard. At close both go.

use core::ptr::{addr_of, read_volatile};

use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::{
    BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG,
    BPF_SOCK_OPS_TCP_CONNECT_CB, bpf_sock, bpf_sock_ops,
};
use aya_ebpf::helpers::generated::bpf_get_netns_cookie;
use aya_ebpf::macros::sock_ops;
use aya_ebpf::programs::SockOpsContext;
use mesh_ebpf_abi::{
    Address, ClientKey, Counter, DELIVERY_MARK, DirectEventKind, FlowKey, FlowOrigin, PodFlags,
    Port, Remains, SocketNote, payload_acknowledged, protocol, tcp_state,
};

use crate::connect::stays_inside;
use crate::direct;
use crate::flows::register;
use crate::maps::{FLOWS, ORIGINALS, REMAINS, count, is_own, pod};
use crate::sock_addr::{is_labelled, note};

const AF_INET: u32 = 2;
/// The only value a sock_ops program may return here.
const DONE: u32 = 1;

/// Named unlike its section, which the linker takes for a symbol too.
#[sock_ops]
pub fn track_sockets(ctx: SockOpsContext) -> u32 {
    let event = ctx.op();
    if event != BPF_SOCK_OPS_TCP_CONNECT_CB
        && event != BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB
        && event != BPF_SOCK_OPS_STATE_CB
    {
        return DONE;
    }
    // SAFETY: the context is the one the kernel passed.
    let cookie = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    let Some(pod) = pod(cookie) else { return DONE };
    let flags = PodFlags(pod.flags);
    let key = flow_key(ctx.ops);
    // SAFETY: as above. It is null for a request socket.
    let socket = unsafe { (*ctx.ops).__bindgen_anon_2.sk };
    if socket.is_null() {
        return DONE;
    }
    if event == BPF_SOCK_OPS_TCP_CONNECT_CB {
        connecting(&ctx, cookie, &key, socket);
    } else if event == BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB {
        accepted(&ctx, cookie, flags, &key, socket);
    } else if ctx.arg(1) == tcp_state::CLOSE {
        closed(&ctx, cookie, &key, socket);
    } else if ctx.arg(1) == tcp_state::ESTABLISHED && note(socket).is_some_and(SocketNote::direct) {
        direct::report(&key, DirectEventKind::Opened, 0, false);
    }
    DONE
}

#[inline(always)]
fn connecting(ctx: &SockOpsContext, cookie: u64, key: &FlowKey, socket: *mut bpf_sock) {
    let client = ClientKey::new(cookie, (key.local, key.local_port), key.remote_port);
    let labelled = is_labelled(socket);
    let note = note(socket);
    if let Some(note) = note
        && note.captured()
        && !labelled
    {
        if ORIGINALS.insert(client, note.target, 0).is_err() {
            count(Counter::OrigDstLost);
        }
        watch_state(ctx);
        return;
    }
    if let Some(note) = note
        && note.direct()
        && !labelled
    {
        if direct::is_granted(key) {
            direct::note_dialled(key, &note.target);
            register(cookie, key, FlowOrigin::Direct);
            watch_state(ctx);
        } else {
            count(Counter::DirectRevoked);
        }
        return;
    }
    if stays_inside(cookie, &key.remote) {
        // It may be for the agent's listener: an earlier connection's entry must not be taken for its own.
        ORIGINALS.remove(client).ok();
        if labelled && !stays_inside(cookie, &key.local) {
            register(cookie, key, FlowOrigin::Delivery);
            watch_state(ctx);
        }
        return;
    }
    if labelled {
        register(cookie, key, FlowOrigin::Agent);
        watch_state(ctx);
    } else if note.is_some_and(SocketNote::passed) {
        register(cookie, key, FlowOrigin::Excluded);
        watch_state(ctx);
    }
}

/// Permits the answers to a connection that came in over the pod's interface and went where it
/// should. Everything the pod can make up itself lacks the first: a connection from a foreign
/// address over its loopback, one whose addresses it rewrote.
#[inline(always)]
fn accepted(
    ctx: &SockOpsContext,
    cookie: u64,
    flags: PodFlags,
    key: &FlowKey,
    socket: *mut bpf_sock,
) {
    // SAFETY: `socket` is not null; the verifier checks offset and width.
    let mark = unsafe { read_volatile(addr_of!((*socket).mark)) };
    if stays_inside(cookie, &key.remote) || mark == DELIVERY_MARK {
        return;
    }
    // SAFETY: the value is one byte, copied at once.
    let remains = unsafe { REMAINS.get(key) }.copied().unwrap_or(0);
    // While the pod is observed its guard does not see what arrives.
    if !flags.has(PodFlags::OBSERVE) && !Remains::is_admitted(remains) {
        count(Counter::InboundUnadmitted);
        return;
    }
    if remains == Remains::Direct as u8 {
        register(cookie, key, FlowOrigin::DirectAccepted);
        direct::mark_accepted(socket);
    } else {
        register(cookie, key, FlowOrigin::Inbound);
    }
    watch_state(ctx);
}

#[inline(always)]
fn closed(ctx: &SockOpsContext, cookie: u64, key: &FlowKey, socket: *mut bpf_sock) {
    let note = note(socket);
    if note.is_some_and(SocketNote::captured) {
        let client = ClientKey::new(cookie, (key.local, key.local_port), key.remote_port);
        ORIGINALS.remove(client).ok();
    } else if note.is_some_and(SocketNote::direct) {
        direct_closed(ctx, key, true);
    } else if note.is_some_and(SocketNote::direct_accepted) {
        direct_closed(ctx, key, false);
    }
    let delivered = !is_own(cookie, &key.local);
    if FLOWS.remove(key).is_ok() && !delivered {
        // In an LRU map an insertion fails only under memory pressure, and then the peer's last
        // segments go unanswered.
        REMAINS.insert(key, Remains::Closed as u8, 0).ok();
    }
}

/// Tells the agent how a direct connection ended at this side.
#[inline(always)]
fn direct_closed(ctx: &SockOpsContext, key: &FlowKey, is_client: bool) {
    // SAFETY: the context is the one the kernel passed; the verifier checks offset and width.
    let (acknowledged, all) = unsafe {
        let next = read_volatile(addr_of!((*ctx.ops).snd_nxt));
        let open = read_volatile(addr_of!((*ctx.ops).snd_una));
        (read_volatile(addr_of!((*ctx.ops).bytes_acked)), next == open)
    };
    let (sent, orderly) = payload_acknowledged(is_client, ctx.arg(0), all, acknowledged);
    if is_client {
        direct::report(key, DirectEventKind::ClientClosed, sent, orderly);
    } else {
        let of_client =
            FlowKey::new(protocol::TCP, (key.remote, key.remote_port), (key.local, key.local_port));
        direct::report(&of_client, DirectEventKind::ServerClosed, sent, orderly);
    }
}

/// Asks for a call when the socket's state changes; what others asked for stays.
#[inline(always)]
fn watch_state(ctx: &SockOpsContext) {
    #[expect(clippy::cast_possible_wrap, reason = "a bit set below 2^31")]
    let flags = (ctx.cb_flags() | BPF_SOCK_OPS_STATE_CB_FLAG) as i32;
    ctx.set_cb_flags(flags).ok();
}

/// All fields are read first and selected afterwards: reads inside the branches would be merged
/// into one at a computed offset, which the verifier refuses.
#[inline(always)]
fn flow_key(ops: *mut bpf_sock_ops) -> FlowKey {
    // SAFETY: the context is the one the kernel passed; the verifier checks offset and width.
    unsafe {
        let family = read_volatile(addr_of!((*ops).family));
        let (local4, remote4) =
            (read_volatile(addr_of!((*ops).local_ip4)), read_volatile(addr_of!((*ops).remote_ip4)));
        let local6 = [
            read_volatile(addr_of!((*ops).local_ip6[0])),
            read_volatile(addr_of!((*ops).local_ip6[1])),
            read_volatile(addr_of!((*ops).local_ip6[2])),
            read_volatile(addr_of!((*ops).local_ip6[3])),
        ];
        let remote6 = [
            read_volatile(addr_of!((*ops).remote_ip6[0])),
            read_volatile(addr_of!((*ops).remote_ip6[1])),
            read_volatile(addr_of!((*ops).remote_ip6[2])),
            read_volatile(addr_of!((*ops).remote_ip6[3])),
        ];
        let local_port = read_volatile(addr_of!((*ops).local_port));
        let remote_port = read_volatile(addr_of!((*ops).remote_port));
        let (local, remote) = if family == AF_INET {
            (Address::from_word(local4), Address::from_word(remote4))
        } else {
            (Address::from_words(local6), Address::from_words(remote6))
        };
        #[expect(clippy::cast_possible_truncation, reason = "ports, one in host order")]
        let (local_port, remote_port) =
            (Port::new(local_port as u16), Port::new(u32::from_be(remote_port) as u16));
        FlowKey::new(protocol::TCP, (local, local_port), (remote, remote_port))
    }
}

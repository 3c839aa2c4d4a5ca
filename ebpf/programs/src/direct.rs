//! The direct path: two pods of this node that may talk without the agent, as it decided for this
//! pair before. The verdict is looked up where the client connects, when its SYN is about to leave,
//! and where the server's side finds its listener; each time by who owns the addresses now.

use core::ptr::{addr_of, read_volatile};

use aya_ebpf::bindings::{BPF_SK_STORAGE_GET_F_CREATE, bpf_sock};
use aya_ebpf::helpers::generated::{bpf_get_prandom_u32, bpf_ktime_get_ns, bpf_sk_storage_get};
use mesh_ebpf_abi::{
    Address, Counter, DialledVip, DirectEvent, DirectEventKind, DirectKey, Endpoint, FlowKey,
    FlowOrigin, PodFlags, Port, SocketNote, Verdict, VipKey, port, protocol,
};

use crate::maps::{
    DIALLED, DIRECT, DIRECT_EVENTS, DIRECT_LEASE, FLOWS, NOTES, VIPS, VIPS_LEASE, count, owner, pod,
};
use crate::sock_addr::Call;

/// Whether a pod's socket may connect straight to another pod. `own` is the pod's address of that
/// family, the only one that verdicts are taken for.
#[inline(always)]
pub fn may_dial(call: &Call<'_>, cookie: u64, own: &Address, target: &Endpoint) -> bool {
    // First, since it is all there is to do on a node without direct path.
    if !is_in_force() {
        return false;
    }
    let bound = call.source();
    if !bound.address.is_unspecified() && !bound.address.same(own) {
        return false;
    }
    let from = (*own, Port::new(0));
    let flow = FlowKey::new(protocol::TCP, from, (target.address, target.port));
    owner(own).is_some_and(|owner| owner == cookie) && is_granted(&flow)
}

/// Where a pod that dials `target` may try to connect to without the agent: to an endpoint, picked at
/// random, where `target` is a service's virtual address of which the agent has listed all; else there.
/// No more than a proposal: see [`may_dial`].
#[inline(always)]
pub fn destination(cookie: u64, target: &Endpoint) -> Endpoint {
    // SAFETY: a call without arguments.
    let (now, random) = unsafe { (bpf_ktime_get_ns(), bpf_get_prandom_u32()) };
    if !VIPS_LEASE.get(0).is_some_and(|until| now < *until) {
        return *target;
    }
    let key = VipKey::new(cookie, *target);
    // SAFETY: values are replaced, never written into; one that is used again for another key is
    // recognised below.
    let Some(listed) = (unsafe { VIPS.get(key) }) else { return *target };
    // SAFETY: both are inside the element. Volatile: the order is the point.
    let (picked, of) =
        unsafe { (read_volatile(listed.pick(random)), read_volatile(addr_of!(listed.key))) };
    let same_family = picked.address.is_v4() == target.address.is_v4();
    if of.same(&key) && same_family { picked } else { *target }
}

/// Notes by which virtual address a direct connection was dialled, if by one, for the agent's records.
#[inline(always)]
pub fn note_dialled(flow: &FlowKey, dialled: &Endpoint) {
    if dialled.address.same(&flow.remote) {
        // What an earlier connection by the same ports may have left.
        DIALLED.remove(flow).ok();
        return;
    }
    // SAFETY: a call without arguments.
    let since_ns = unsafe { bpf_ktime_get_ns() };
    if DIALLED.insert(flow, DialledVip { vip: *dialled, since_ns }, 0).is_err() {
        count(Counter::DialledLost);
    }
}

/// Whether a connection that arrived at the server comes from the socket of a pod that was let
/// through at its end: its guard has registered it before the SYN left. An address alone proves
/// nothing, it may have been forged elsewhere.
#[inline(always)]
pub fn may_enter(flow: &FlowKey) -> bool {
    if !is_in_force() {
        return false;
    }
    let Some(client) = owner(&flow.local) else { return false };
    // SAFETY: two aligned words of an element that is replaced, never written into.
    let registered = unsafe { FLOWS.get(flow) }.is_some_and(|registered| {
        registered.origin == FlowOrigin::Direct as u32 && registered.netns_cookie == client
    });
    registered && is_granted(flow)
}

/// Whether the agent's verdict for this connection, as its client sees it, is there and in force.
#[inline(always)]
pub fn is_granted(flow: &FlowKey) -> bool {
    if port::is_agents(flow.remote_port.get()) {
        return false;
    }
    let (Some(client), Some(server)) = (owner(&flow.local), owner(&flow.remote)) else {
        return false;
    };
    // A pod that is not captured, or not yet, takes no part.
    let captured = |cookie, direction| {
        pod(cookie).is_some_and(|pod| {
            let flags = PodFlags(pod.flags);
            flags.has(direction) && !flags.has(PodFlags::OBSERVE)
        })
    };
    if client == server
        || !captured(client, PodFlags::OUTBOUND)
        || !captured(server, PodFlags::INBOUND)
    {
        return false;
    }
    let key = DirectKey::new((client, flow.local), (server, flow.remote), flow.remote_port);
    // SAFETY: only the presence is looked at.
    unsafe { DIRECT.get(key) }.is_some() && is_in_force()
}

/// Verdicts end soon after the agent that would take them back.
#[inline(always)]
fn is_in_force() -> bool {
    // SAFETY: a call without arguments.
    let now = unsafe { bpf_ktime_get_ns() };
    DIRECT_LEASE.get(0).is_some_and(|until| now < *until)
}

/// Remembers on an accepted socket that it came by the direct path, so that its end is told.
#[inline(always)]
pub fn mark_accepted(socket: *mut bpf_sock) {
    let nowhere = Endpoint::new(Address::NONE, Port::new(0));
    let mut note = SocketNote::new(Verdict::DirectAccepted, nowhere);
    // SAFETY: `socket` is not null; the kernel copies the note.
    let stored = unsafe {
        bpf_sk_storage_get(
            (&raw const NOTES).cast_mut().cast(),
            socket.cast(),
            (&raw mut note).cast(),
            BPF_SK_STORAGE_GET_F_CREATE.into(),
        )
    };
    if stored.is_null() {
        count(Counter::DirectEventsLost);
    }
}

/// Puts an event into the agent's queue.
#[inline(always)]
pub fn report(flow: &FlowKey, kind: DirectEventKind, sent_octets: u64, orderly: bool) {
    let event = DirectEvent {
        flow: *flow,
        client_cookie: owner(&flow.local).unwrap_or(0),
        server_cookie: owner(&flow.remote).unwrap_or(0),
        // SAFETY: a call without arguments.
        at_ns: unsafe { bpf_ktime_get_ns() },
        sent_octets,
        kind: kind as u32,
        orderly: u32::from(orderly),
    };
    if DIRECT_EVENTS.push(&event, 0).is_err() {
        count(Counter::DirectEventsLost);
    }
}

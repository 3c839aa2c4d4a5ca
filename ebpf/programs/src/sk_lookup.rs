//! sk_lookup: every new inbound TCP connection of a pod goes to the agent, except the node's probes
//! and what the settings exclude. Attached per network namespace; established sockets never come
//! here.
//!
//! The interface is not looked at: a pod with `CAP_NET_ADMIN` can move what arrives to its loopback.
//! What comes from the pod itself has an address of the pod, or is the agent's own connection to the
//! application, which `track_sockets` registered.

use core::ptr::{addr_of, read_volatile};

use aya_ebpf::bindings::{BPF_EXIST, BPF_SK_LOOKUP_F_NO_REUSEPORT, bpf_sk_lookup};
use aya_ebpf::macros::sk_lookup;
use aya_ebpf::programs::SkLookupContext;
use mesh_ebpf_abi::{
    Address, Counter, FlowKey, FlowOrigin, ListenerKey, Pod, PodFlags, Port, Remains, RuleList,
    port, protocol,
};

use crate::direct;
use crate::maps::{FLOWS, LISTENERS, NODE_ADDRESSES, REMAINS, count, is_own, owner, pod};
use crate::rules::{has_port, selects_inbound};

const PASS: u32 = 1;
/// The client sees a reset.
const DROP: u32 = 0;
const AF_INET: u32 = 2;

#[sk_lookup]
pub fn steer_inbound(ctx: SkLookupContext) -> u32 {
    let lookup = Lookup::read(ctx.lookup);
    if lookup.transport != u32::from(protocol::TCP) {
        return PASS;
    }
    let Some(cookie) = owner(&lookup.local) else {
        // An address that the pod gave itself, or its loopback.
        if lookup.local.same(&lookup.remote)
            || (lookup.local.is_loopback()
                && (lookup.remote.is_loopback() || owner(&lookup.remote).is_some()))
        {
            return PASS;
        }
        count(Counter::InboundUnknownAddress);
        return DROP;
    };
    // Not yet or no longer enrolled: the link goes up before the entry and down after it.
    let Some(pod) = pod(cookie) else {
        admit_unseen(&lookup);
        return PASS;
    };
    let flags = PodFlags(pod.flags);
    if flags.has(PodFlags::OBSERVE) {
        admit_unseen(&lookup);
        return PASS;
    }
    let number = lookup.port.get();
    if lookup.remote.is_loopback() || is_own(cookie, &lookup.remote) {
        return if port::is_agents(number) {
            steer(&ctx, cookie, pod, &lookup, lookup.port)
        } else {
            PASS
        };
    }
    if is_delivery(cookie, &lookup) {
        return PASS;
    }
    judge(&ctx, cookie, pod, &lookup)
}

/// A connection from elsewhere.
#[inline(always)]
fn judge(ctx: &SkLookupContext, cookie: u64, pod: &Pod, lookup: &Lookup) -> u32 {
    let number = lookup.port.get();
    let listener = if number == port::TUNNEL {
        lookup.port
    } else if has_port(pod, RuleList::ProbePorts, lookup.port)
        // SAFETY: only the presence is looked at.
        && unsafe { NODE_ADDRESSES.get(lookup.remote) }.is_some()
    {
        count(Counter::InboundProbe);
        admit(lookup, Remains::Admitted);
        return PASS;
    } else if PodFlags(pod.flags).has(PodFlags::INBOUND)
        && selects_inbound(pod, &lookup.remote, lookup.port)
    {
        if direct::may_enter(&lookup.client_flow()) {
            admit(lookup, Remains::Direct);
            count(Counter::DirectAdmitted);
            return PASS;
        }
        Port::new(port::INBOUND)
    } else if port::is_agents(number) {
        count(Counter::InboundAgentPort);
        return DROP;
    } else {
        count(Counter::InboundExcluded);
        admit(lookup, Remains::Admitted);
        return PASS;
    };
    let verdict = steer(ctx, cookie, pod, lookup, listener);
    if verdict == PASS {
        if number != port::TUNNEL {
            count(Counter::InboundCaptured);
        }
        admit(lookup, Remains::Admitted);
    }
    verdict
}

/// Hands the connection to one of the agent's own sockets, and to no other that shares their port: a
/// process of the pod may have bound it before the pod was enrolled.
#[inline(always)]
fn steer(ctx: &SkLookupContext, cookie: u64, pod: &Pod, lookup: &Lookup, listener: Port) -> u32 {
    let slot = slot_of(lookup, pod.slots);
    if assign(ctx, &ListenerKey::new(cookie, listener, slot))
        // The agent is opening or closing its ports; number 0 is the first to be there.
        || (slot != 0 && assign(ctx, &ListenerKey::new(cookie, listener, 0)))
    {
        return PASS;
    }
    count(Counter::InboundNoListener);
    DROP
}

#[inline(always)]
fn assign(ctx: &SkLookupContext, listener: &ListenerKey) -> bool {
    LISTENERS.redirect_sk_lookup(ctx, listener, u64::from(BPF_SK_LOOKUP_F_NO_REUSEPORT)).is_ok()
}

/// Spreads connections by their client, evenly over ports that follow each other.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "a remainder of a count below 65,536")]
fn slot_of(lookup: &Lookup, slots: u32) -> u16 {
    let client = lookup.remote.word() ^ u32::from(lookup.remote_port.get());
    (client.wrapping_mul(0x9e37_79b1) >> 16).checked_rem(slots).unwrap_or(0) as u16
}

/// Lets the connection be answered once it is accepted, while the guard does not look yet.
#[inline(always)]
fn admit_unseen(lookup: &Lookup) {
    REMAINS.insert(lookup.flow(), Remains::Admitted as u8, 0).ok();
}

/// Lets the connection be answered once it is accepted, provided that its SYN was seen by the guard:
/// a pod can make up a SYN over its loopback, but not on its interface's other side.
#[inline(always)]
fn admit(lookup: &Lookup, admitted: Remains) {
    let key = lookup.flow();
    // SAFETY: the value is one byte, copied at once.
    let found = unsafe { REMAINS.get(key) }.copied().unwrap_or(0);
    // What was admitted before and never accepted may go elsewhere now.
    if found == Remains::Arrived as u8
        || found == Remains::Stray as u8
        || (Remains::is_admitted(found) && found != admitted as u8)
    {
        // It was evicted meanwhile, and the client's next SYN comes here again.
        REMAINS.insert(key, admitted as u8, u64::from(BPF_EXIST)).ok();
    }
}

/// Whether it is the agent's connection to the application, under its client's address.
#[inline(always)]
fn is_delivery(cookie: u64, lookup: &Lookup) -> bool {
    let key = lookup.client_flow();
    // SAFETY: two aligned words of an element that is replaced, never written into.
    unsafe { FLOWS.get(key) }.is_some_and(|flow| {
        flow.origin == FlowOrigin::Delivery as u32 && flow.netns_cookie == cookie
    })
}

struct Lookup {
    transport: u32,
    local: Address,
    remote: Address,
    port: Port,
    remote_port: Port,
}

impl Lookup {
    /// Reads all fields before selecting, see `sock_ops::flow_key`.
    #[inline(always)]
    fn read(raw: *mut bpf_sk_lookup) -> Self {
        // SAFETY: the context is the one the kernel passed; the verifier checks offset and width.
        unsafe {
            let family = read_volatile(addr_of!((*raw).family));
            let transport = read_volatile(addr_of!((*raw).protocol));
            let local_port = read_volatile(addr_of!((*raw).local_port));
            let remote_port = read_volatile(addr_of!((*raw).remote_port));
            let (local4, remote4) = (
                read_volatile(addr_of!((*raw).local_ip4)),
                read_volatile(addr_of!((*raw).remote_ip4)),
            );
            let local6 = [
                read_volatile(addr_of!((*raw).local_ip6[0])),
                read_volatile(addr_of!((*raw).local_ip6[1])),
                read_volatile(addr_of!((*raw).local_ip6[2])),
                read_volatile(addr_of!((*raw).local_ip6[3])),
            ];
            let remote6 = [
                read_volatile(addr_of!((*raw).remote_ip6[0])),
                read_volatile(addr_of!((*raw).remote_ip6[1])),
                read_volatile(addr_of!((*raw).remote_ip6[2])),
                read_volatile(addr_of!((*raw).remote_ip6[3])),
            ];
            let (local, remote) = if family == AF_INET {
                (Address::from_word(local4), Address::from_word(remote4))
            } else {
                (Address::from_words(local6), Address::from_words(remote6))
            };
            #[expect(clippy::cast_possible_truncation, reason = "a port, in host order")]
            let port = Port::new(local_port as u16);
            let remote_port = Port::from_octets(remote_port.to_ne_bytes());
            Self { transport, local, remote, port, remote_port }
        }
    }

    /// As the guard and `track_sockets` know it.
    #[inline(always)]
    fn flow(&self) -> FlowKey {
        FlowKey::new(protocol::TCP, (self.local, self.port), (self.remote, self.remote_port))
    }

    /// As the client knows it.
    #[inline(always)]
    fn client_flow(&self) -> FlowKey {
        FlowKey::new(protocol::TCP, (self.remote, self.remote_port), (self.local, self.port))
    }
}

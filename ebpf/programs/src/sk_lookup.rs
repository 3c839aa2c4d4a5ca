//! sk_lookup: every new inbound TCP connection of a pod goes to the agent, except tunnels, the
//! node's probes and what the settings exclude. Attached per network namespace; established
//! sockets never come here.

use core::ptr::{addr_of, read_volatile};

use aya_ebpf::bindings::bpf_sk_lookup;
use aya_ebpf::macros::sk_lookup;
use aya_ebpf::programs::SkLookupContext;
use mesh_ebpf_abi::{Address, Counter, PodFlags, Port, RuleList, port, protocol};

use crate::maps::{ADDRESSES, LISTENERS, NODE_ADDRESSES, count, is_own, pod};
use crate::rules::{has_port, selects_inbound};

const PASS: u32 = 1;
/// The client sees a reset.
const DROP: u32 = 0;
const AF_INET: u32 = 2;
/// `lo` has this index in every network namespace.
const LOOPBACK_INTERFACE: u32 = 1;

#[sk_lookup]
pub fn steer_inbound(ctx: SkLookupContext) -> u32 {
    let lookup = Lookup::read(ctx.lookup);
    if lookup.transport != u32::from(protocol::TCP)
        || lookup.interface == LOOPBACK_INTERFACE
        || lookup.port.get() == port::TUNNEL
        || lookup.local.same(&lookup.remote)
    {
        return PASS;
    }
    // SAFETY: the value is one aligned word, copied at once.
    let Some(cookie) = unsafe { ADDRESSES.get(lookup.local) }.copied() else {
        count(Counter::InboundUnknownAddress);
        return DROP;
    };
    // Not yet or no longer enrolled: the link goes up before the entry and down after it.
    let Some(pod) = pod(cookie) else { return PASS };
    let flags = PodFlags(pod.flags);
    if flags.has(PodFlags::OBSERVE) || is_own(cookie, &lookup.remote) {
        return PASS;
    }
    if has_port(pod, RuleList::ProbePorts, lookup.port)
        // SAFETY: only the presence is looked at.
        && unsafe { NODE_ADDRESSES.get(lookup.remote) }.is_some()
    {
        count(Counter::InboundProbe);
        return PASS;
    }
    if !flags.has(PodFlags::INBOUND) || !selects_inbound(pod, &lookup.remote, lookup.port) {
        count(Counter::InboundExcluded);
        return PASS;
    }
    if LISTENERS.redirect_sk_lookup(ctx, cookie, 0).is_ok() {
        count(Counter::InboundCaptured);
        PASS
    } else {
        count(Counter::InboundNoListener);
        DROP
    }
}

struct Lookup {
    transport: u32,
    interface: u32,
    local: Address,
    remote: Address,
    port: Port,
}

impl Lookup {
    /// Reads all fields before selecting, see `sock_ops::flow_key`.
    #[inline(always)]
    fn read(raw: *mut bpf_sk_lookup) -> Self {
        // SAFETY: the context is the one the kernel passed; the verifier checks offset and width.
        unsafe {
            let family = read_volatile(addr_of!((*raw).family));
            let transport = read_volatile(addr_of!((*raw).protocol));
            let interface = read_volatile(addr_of!((*raw).ingress_ifindex));
            let local_port = read_volatile(addr_of!((*raw).local_port));
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
            Self { transport, interface, local, remote, port }
        }
    }
}

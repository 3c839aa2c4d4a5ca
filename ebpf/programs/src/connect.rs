//! cgroup/connect4 and connect6: outbound TCP of a pod goes to the agent, DNS to its resolver.

use aya_ebpf::bindings::sockaddr;
use aya_ebpf::helpers::generated::{bpf_bind, bpf_get_prandom_u32, bpf_set_retval};
use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use mesh_ebpf_abi::{
    Address, ClientKey, Counter, Endpoint, Pod, PodFlags, Port, Verdict, port, protocol,
};

use crate::direct;
use crate::flows::register_datagrams;
use crate::maps::{RESOLVERS, count, is_own, pod};
use crate::rules::selects_outbound;
use crate::sock_addr::{Call, Family, PROCEED, REFUSE};

const ENETUNREACH: i32 = 101;
const AF_INET: u16 = 2;
const AF_INET6: u16 = 10;

#[cgroup_sock_addr(connect4)]
pub fn connect4(ctx: SockAddrContext) -> i32 {
    connect(&Call::new(&ctx, Family::V4))
}

#[cgroup_sock_addr(connect6)]
pub fn connect6(ctx: SockAddrContext) -> i32 {
    connect(&Call::new(&ctx, Family::V6))
}

#[inline(always)]
fn connect(call: &Call<'_>) -> i32 {
    let cookie = call.netns_cookie();
    let Some(pod) = pod(cookie) else {
        // That of a connect by the same socket while its pod was enrolled.
        call.forget();
        return PROCEED;
    };
    let target = call.read();
    let transport = call.protocol();
    if transport == u32::from(protocol::TCP) {
        connect_tcp(call, cookie, pod, target)
    } else if transport == u32::from(protocol::UDP) {
        connect_udp(call, cookie, pod, target)
    } else {
        PROCEED
    }
}

#[inline(always)]
fn connect_tcp(call: &Call<'_>, cookie: u64, pod: &Pod, target: Endpoint) -> i32 {
    if stays_inside(cookie, &target.address) {
        call.forget();
        return PROCEED;
    }
    if call.is_labelled() {
        return PROCEED;
    }
    let flags = PodFlags(pod.flags);
    let listener = if flags.has(PodFlags::OBSERVE) {
        None
    } else if flags.has(PodFlags::DNS) && target.port.get() == port::DNS {
        Some(port::RESOLVER)
    } else if flags.has(PodFlags::OUTBOUND) && selects_outbound(pod, &target.address, target.port) {
        Some(port::OUTBOUND)
    } else {
        None
    };
    let Some(listener) = listener else {
        if !call.annotate(Verdict::Passed, target) {
            count(Counter::OutboundNoMemory);
            return REFUSE;
        }
        count(Counter::OutboundExcluded);
        return PROCEED;
    };
    let Some(agent) = address_of_family(pod, &target.address) else {
        return refuse_family();
    };
    if listener == port::OUTBOUND {
        let destination = direct::destination(cookie, &target);
        if direct::may_dial(call, cookie, &agent, &destination)
            && call.annotate(Verdict::Direct, target)
        {
            count(Counter::DirectDialled);
            if !destination.same(&target) {
                call.write(&destination);
                count(Counter::DirectVip);
            }
            return PROCEED;
        }
    }
    if !call.annotate(Verdict::Captured, target) {
        count(Counter::OutboundNoMemory);
        return REFUSE;
    }
    call.write(&Endpoint::new(agent, Port::new(listener)));
    count(Counter::OutboundCaptured);
    PROCEED
}

#[inline(always)]
fn connect_udp(call: &Call<'_>, cookie: u64, pod: &Pod, target: Endpoint) -> i32 {
    let flags = PodFlags(pod.flags);
    if stays_inside(cookie, &target.address) {
        call.forget();
        return PROCEED;
    }
    if call.is_labelled() {
        register_datagrams(call, cookie, flags, target);
        return PROCEED;
    }
    if target.port.get() != port::DNS || !flags.has(PodFlags::DNS) || flags.has(PodFlags::OBSERVE) {
        call.forget();
        return PROCEED;
    }
    let Some(agent) = address_of_family(pod, &target.address) else {
        return refuse_family();
    };
    if !call.annotate(Verdict::Captured, target) {
        count(Counter::OutboundNoMemory);
        return REFUSE;
    }
    remember_resolver(call, cookie, agent, target);
    call.write(&Endpoint::new(agent, Port::new(port::RESOLVER)));
    count(Counter::DnsCaptured);
    PROCEED
}

/// Whether a connection to this address never leaves the pod.
#[inline(always)]
pub fn stays_inside(cookie: u64, address: &Address) -> bool {
    address.is_loopback() || address.is_unspecified() || is_own(cookie, address)
}

/// The pod's address of the same family as `target`.
#[inline(always)]
pub fn address_of_family(pod: &Pod, target: &Address) -> Option<Address> {
    let own = if target.is_v4() { pod.ipv4 } else { pod.ipv6 };
    (!own.same(&Address::NONE)).then_some(own)
}

/// A pod without address of a family cannot reach that family: the error is the one it would see
/// without a mesh.
#[inline(always)]
pub fn refuse_family() -> i32 {
    count(Counter::OutboundNoFamily);
    // SAFETY: a call with one number; the kernel refuses what is no error number.
    unsafe { bpf_set_retval(-ENETUNREACH) };
    REFUSE
}

/// Tells the agent which resolver a connected socket asks, by its source address. The kernel would
/// choose the port only after this hook, and there is no later one, so it is chosen here.
#[inline(always)]
fn remember_resolver(call: &Call<'_>, cookie: u64, agent: Address, target: Endpoint) {
    let bound = call.source();
    let chosen = if bound.port.get() != 0 {
        Some(bound.port)
    } else if bound.address.is_unspecified() {
        bind_somewhere(call, &agent)
    } else {
        None
    };
    let address = if bound.address.is_unspecified() { agent } else { bound.address };
    let stored = chosen.is_some_and(|chosen| {
        let client = ClientKey::new(cookie, (address, chosen), Port::new(port::RESOLVER));
        RESOLVERS.insert(client, target, 0).is_ok()
    });
    if !stored {
        count(Counter::OrigDstLost);
    }
}

/// Attempts to find a free port. With a thousand UDP sockets in the pod, all eight fail once in
/// 10^11 calls.
const BIND_ATTEMPTS: usize = 8;

/// Binds the socket to the pod's address and a port of the usual ephemeral range.
#[inline(always)]
fn bind_somewhere(call: &Call<'_>, agent: &Address) -> Option<Port> {
    const FIRST: u32 = 32_768;
    const COUNT: u32 = 28_232;
    for _ in 0..BIND_ATTEMPTS {
        // SAFETY: a call without arguments.
        let random = unsafe { bpf_get_prandom_u32() };
        #[expect(clippy::cast_possible_truncation, reason = "below 61,000")]
        let port = Port::new((FIRST + random % COUNT) as u16);
        if bind(call, agent, port) {
            return Some(port);
        }
    }
    None
}

/// `struct sockaddr_in`
#[repr(C)]
struct NameV4 {
    family: u16,
    port: Port,
    address: u32,
    zero: [u32; 2],
}

/// `struct sockaddr_in6`
#[repr(C)]
struct NameV6 {
    family: u16,
    port: Port,
    flow: u32,
    address: [u32; 4],
    scope: u32,
}

#[inline(always)]
fn bind(call: &Call<'_>, address: &Address, port: Port) -> bool {
    let words = address.words();
    // SAFETY: the kernel reads as many bytes as the length says, from a live value of that size.
    let result = unsafe {
        match call.family() {
            Family::V4 => {
                let mut name = NameV4 { family: AF_INET, port, address: words[3], zero: [0; 2] };
                bpf_bind(call.raw(), (&raw mut name).cast::<sockaddr>(), 16)
            }
            Family::V6 => {
                let mut name = NameV6 { family: AF_INET6, port, flow: 0, address: words, scope: 0 };
                bpf_bind(call.raw(), (&raw mut name).cast::<sockaddr>(), 28)
            }
        }
    };
    result == 0
}

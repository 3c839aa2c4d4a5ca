//! Registering flows with the guard.

use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use mesh_ebpf_abi::{Counter, Endpoint, FlowKey, FlowOrigin, FlowState, PodFlags, Port, protocol};

use crate::maps::{FLOWS, count};
use crate::sock_addr::Call;

/// Permits a flow until its socket closes.
#[inline(always)]
pub fn register(cookie: u64, key: &FlowKey, origin: FlowOrigin) {
    // SAFETY: a call without arguments.
    let now = unsafe { bpf_ktime_get_ns() };
    if FLOWS.insert(key, FlowState::new(cookie, now, origin), 0).is_err() {
        count(Counter::FlowTableFull);
    }
}

/// Permits the datagrams of an agent's socket in a pod that may send none itself. Only a bound
/// socket has a flow yet; that is what the agent makes.
#[inline(always)]
pub fn register_datagrams(call: &Call<'_>, cookie: u64, flags: PodFlags, target: Endpoint) {
    if !flags.has(PodFlags::DENY_UDP) {
        return;
    }
    let from = call.source();
    if from.address.is_unspecified() || from.port == Port::new(0) {
        return;
    }
    let key = FlowKey::new(protocol::UDP, (from.address, from.port), (target.address, target.port));
    register(cookie, &key, FlowOrigin::Agent);
}

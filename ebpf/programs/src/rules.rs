//! The pod's lists of ports and networks.

use aya_ebpf::maps::lpm_trie::Key;
use mesh_ebpf_abi::{Address, NetworkRule, Pod, PodFlags, Port, PortKey, RuleList};

use crate::maps::{NETWORK_RULES, PORT_RULES};

/// Whether an outbound connection is captured, by its destination.
#[inline(always)]
pub fn selects_outbound(pod: &Pod, address: &Address, port: Port) -> bool {
    if has_port(pod, RuleList::OutboundExcludePorts, port)
        || has_network(pod, RuleList::OutboundExcludeNetworks, address)
    {
        return false;
    }
    let inclusive = PodFlags::list(RuleList::OutboundIncludePorts)
        | PodFlags::list(RuleList::OutboundIncludeNetworks);
    pod.flags & inclusive == 0
        || has_port(pod, RuleList::OutboundIncludePorts, port)
        || has_network(pod, RuleList::OutboundIncludeNetworks, address)
}

/// Whether an inbound connection is captured, by its local port and its client.
#[inline(always)]
pub fn selects_inbound(pod: &Pod, client: &Address, port: Port) -> bool {
    if has_port(pod, RuleList::InboundExcludePorts, port)
        || has_network(pod, RuleList::InboundExcludeNetworks, client)
    {
        return false;
    }
    let inclusive = PodFlags::list(RuleList::InboundIncludePorts)
        | PodFlags::list(RuleList::InboundIncludeNetworks);
    pod.flags & inclusive == 0
        || has_port(pod, RuleList::InboundIncludePorts, port)
        || has_network(pod, RuleList::InboundIncludeNetworks, client)
}

/// Whether a port is in one of the pod's lists.
#[inline(always)]
pub fn has_port(pod: &Pod, list: RuleList, port: Port) -> bool {
    pod.flags & PodFlags::list(list) != 0
        // SAFETY: only the presence is looked at.
        && unsafe { PORT_RULES.get(PortKey::new(pod.rule_set, list, port)) }.is_some()
}

#[inline(always)]
fn has_network(pod: &Pod, list: RuleList, address: &Address) -> bool {
    pod.flags & PodFlags::list(list) != 0
        && NETWORK_RULES
            .get(Key::new(NetworkRule::LOOKUP_BITS, NetworkRule::new(pod.rule_set, list, *address)))
            .is_some()
}

//! What the kernel side counts.

macro_rules! counters {
    ($($(#[doc = $doc:literal])+ $variant:ident = $name:literal,)+) => {
        /// Index into the counter map; each counts events since it was loaded.
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Counter { $($(#[doc = $doc])+ $variant,)+ }

        impl Counter {
            /// All of them, in index order.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)+];

            /// Its name in metrics.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)+ }
            }
        }
    };
}

counters! {
    /// Outbound TCP connections sent to the agent.
    OutboundCaptured = "outbound_captured",
    /// Outbound TCP connections let through by the pod's settings.
    OutboundExcluded = "outbound_excluded",
    /// Connections refused because the pod has no address of the destination's family.
    OutboundNoFamily = "outbound_refused_no_family",
    /// Connections refused because the socket could not be annotated (kernel memory).
    OutboundNoMemory = "outbound_refused_no_memory",
    /// Original destinations that could not be stored; the agent refuses these connections.
    OrigDstLost = "orig_dst_lost",
    /// DNS queries and DNS sockets sent to the agent's resolver.
    DnsCaptured = "dns_captured",
    /// Attempts of a pod's process to bind one of the agent's ports.
    BindRefused = "bind_refused",
    /// UDP sends refused by the pod's settings.
    UdpRefused = "udp_refused",
    /// Inbound TCP connections sent to the agent.
    InboundCaptured = "inbound_captured",
    /// Inbound TCP connections let through by the pod's settings.
    InboundExcluded = "inbound_excluded",
    /// Inbound probes from the node let through.
    InboundProbe = "inbound_probe",
    /// Inbound connections to one of the agent's ports refused because the settings exclude them.
    InboundAgentPort = "inbound_refused_agent_port",
    /// Inbound connections refused because the agent has no listener.
    InboundNoListener = "inbound_refused_no_listener",
    /// Inbound connections refused because the local address is not one the pod was enrolled with.
    InboundUnknownAddress = "inbound_refused_unknown_address",
    /// Accepted connections that may not be answered: nothing outside asked for them, or they went
    /// past the agent.
    InboundUnadmitted = "inbound_not_admitted",
    /// Flows that could not be registered because the table is full; the guard drops them.
    FlowTableFull = "flow_table_full",
    /// Dropped by the guard: VLAN tag.
    GuardVlan = "guard_dropped_vlan",
    /// Dropped by the guard: neither ARP, IPv4 nor IPv6.
    GuardEtherType = "guard_dropped_ethertype",
    /// Dropped by the guard: truncated or contradictory header.
    GuardMalformed = "guard_dropped_malformed",
    /// Dropped by the guard: neither TCP, UDP nor ICMP.
    GuardProtocol = "guard_dropped_protocol",
    /// Dropped by the guard: fragmented TCP.
    GuardFragment = "guard_dropped_fragment",
    /// Dropped by the guard: TCP behind extension headers, or a chain that is not allowed.
    GuardExtension = "guard_dropped_extension_header",
    /// Dropped by the guard: the source address is not the pod's.
    GuardSpoofed = "guard_dropped_spoofed_source",
    /// Dropped by the guard: TCP of no permitted flow.
    GuardNoFlow = "guard_dropped_no_flow",
    /// Dropped by the guard on its way in: payload of a connection that went past the agent.
    GuardUnadmitted = "guard_dropped_unadmitted",
    /// Dropped by the guard on its way in: TCP to an address that is not the pod's.
    GuardForeignTarget = "guard_dropped_foreign_target",
    /// Dropped by the guard on its way in: what a pod could not answer either (fragmented TCP,
    /// tunnels, VLAN tags).
    GuardInbound = "guard_dropped_inbound_unknown",
    /// Dropped by the guard: UDP of a pod that may not send any.
    GuardUdp = "guard_dropped_udp",
    /// Dropped by the guard: ICMP of a pod that may not send any.
    GuardIcmp = "guard_dropped_icmp",
    /// Dropped by the guard: an interface that no pod is registered for.
    GuardInterface = "guard_dropped_unknown_interface",
    /// Outbound TCP connections that went straight to another pod of the node.
    DirectDialled = "direct_dialled",
    /// Those of them that the other pod's side let in.
    DirectAdmitted = "direct_admitted",
    /// Direct connections whose verdict was taken back before their SYN left; the guard drops it.
    DirectRevoked = "direct_refused_revoked",
    /// Events of direct connections that found no room in the queue for the agent.
    DirectEventsLost = "direct_events_lost",
    /// Outbound TCP connections to a service's virtual address that went straight to an endpoint of it.
    DirectVip = "direct_service_dialled",
    /// Direct connections whose virtual address found no room in the table for the agent.
    DialledLost = "direct_service_lost",
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn names_are_distinct_and_indices_dense() {
        let names: BTreeSet<_> = Counter::ALL.iter().map(|counter| counter.name()).collect();
        assert_eq!(names.len(), Counter::ALL.len());
        for (index, counter) in Counter::ALL.iter().enumerate() {
            assert_eq!(index, *counter as usize);
        }
    }
}

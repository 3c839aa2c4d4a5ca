//! The cluster's address plan. It is the same for every cluster: each has network namespaces of its
//! own, so that clusters never see each other.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Most nodes a cluster may have; the plan has room for more, a machine has not.
pub(super) const MAX_NODES: u8 = 16;

/// Where the API server listens, in front of every node.
pub(super) const API_SERVER: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
/// The same over IPv6.
pub(super) const API_SERVER_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0, 0, 0, 0, 0, 1);
/// The service `kubernetes`.
pub(super) const API_SERVICE: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 1);
/// The same over IPv6.
pub(super) const API_SERVICE_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 1);
/// The service `kube-dns`.
pub(super) const DNS_SERVICE: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);

/// Which address families a cluster speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Families {
    /// IPv4 alone.
    V4,
    /// IPv4 first, and IPv6.
    Dual,
}

/// What a node's interface, pods and routes are called.
#[derive(Debug, Clone, Copy)]
pub(super) struct Plan {
    families: Families,
}

impl Plan {
    pub(super) const fn new(families: Families) -> Self {
        Self { families }
    }

    /// Everything that is said once per family is said through this.
    fn both(self, v4: String, v6: String) -> Vec<String> {
        match self.families {
            Families::V4 => vec![v4],
            Families::Dual => vec![v4, v6],
        }
    }

    pub(super) const fn dual(self) -> bool {
        matches!(self.families, Families::Dual)
    }

    /// `--service-cluster-ip-range`.
    pub(super) fn service_ranges(self) -> String {
        self.both("10.96.0.0/16".to_owned(), "fd00:10:96::/112".to_owned()).join(",")
    }

    /// Every pod of every node.
    pub(super) fn pod_ranges(self) -> String {
        self.both("10.244.0.0/16".to_owned(), "fd00:10:244::/48".to_owned()).join(",")
    }

    /// The pods of one node.
    pub(super) fn node_pods(self, node: u8) -> Vec<String> {
        self.both(format!("10.244.{node}.0/24"), format!("fd00:10:244:{node:x}::/64"))
    }

    /// The node's own addresses, between the nodes.
    pub(super) fn node(self, node: u8) -> Vec<IpAddr> {
        let [.., last] = API_SERVER.octets();
        let v4 = Ipv4Addr::new(10, 0, 0, last + 9 + node);
        let v6 = Ipv6Addr::new(0xfd00, 0x10, 0, 0, 0, 0, 0, 0x10 + u16::from(node));
        match self.families {
            Families::V4 => vec![v4.into()],
            Families::Dual => vec![v4.into(), v6.into()],
        }
    }

    /// The gateways of nodes: the control plane's bridge.
    pub(super) fn gateways(self) -> Vec<IpAddr> {
        match self.families {
            Families::V4 => vec![API_SERVER.into()],
            Families::Dual => vec![API_SERVER.into(), API_SERVER_V6.into()],
        }
    }

    /// How `resident` (a node, or the control plane for 0) reaches the pods of all other nodes:
    /// (destination, next hop).
    pub(super) fn pod_routes(self, nodes: u8, resident: u8) -> Vec<(String, IpAddr)> {
        (1..=nodes)
            .filter(|node| *node != resident)
            .flat_map(|node| self.node_pods(node).into_iter().zip(self.node(node)))
            .collect()
    }

    /// What the API server's certificate is for.
    pub(super) fn api_server_names() -> Vec<String> {
        let names = ["kubernetes", "kubernetes.default", "kubernetes.default.svc"];
        let mut all: Vec<String> = names.iter().map(|name| format!("DNS:{name}")).collect();
        all.push("DNS:kubernetes.default.svc.cluster.local".to_owned());
        all.push("DNS:localhost".to_owned());
        let addresses: [IpAddr; 5] = [
            API_SERVER.into(),
            API_SERVER_V6.into(),
            API_SERVICE.into(),
            API_SERVICE_V6.into(),
            Ipv4Addr::LOCALHOST.into(),
        ];
        all.extend(addresses.map(|address| format!("IP:{address}")));
        all
    }
}

/// How `ip address add` wants an address of the net between the nodes.
pub(super) fn with_prefix(address: IpAddr) -> String {
    match address {
        IpAddr::V4(address) => format!("{address}/24"),
        IpAddr::V6(address) => format!("{address}/64"),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn no_two_nodes_share_an_address_or_a_range() {
        let plan = Plan::new(Families::Dual);
        let mut seen: BTreeSet<String> =
            [API_SERVER.to_string(), API_SERVER_V6.to_string()].into_iter().collect();
        for node in 1..=MAX_NODES {
            for address in plan.node(node) {
                assert!(seen.insert(address.to_string()), "{address} is taken twice");
            }
            for range in plan.node_pods(node) {
                assert!(seen.insert(range.clone()), "{range} is taken twice");
            }
        }
    }

    #[test]
    fn a_node_has_routes_to_all_pods_but_its_own() {
        let routes = |families, resident| {
            Plan::new(families)
                .pod_routes(2, resident)
                .into_iter()
                .map(|(range, hop)| format!("{range} via {hop}"))
                .collect::<Vec<_>>()
        };
        assert_eq!(routes(Families::V4, 1), ["10.244.2.0/24 via 10.0.0.12"]);
        assert_eq!(
            routes(Families::Dual, 2),
            ["10.244.1.0/24 via 10.0.0.11", "fd00:10:244:1::/64 via fd00:10::11"]
        );
        assert_eq!(routes(Families::V4, 0).len(), 2, "the control plane knows both");
    }
}

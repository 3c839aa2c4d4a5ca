//! A pod's settings as map entries.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use mesh_ebpf_abi::{Address, NetworkKey, NetworkRule, PodFlags, Port, PortKey, RuleList};

use crate::config::{MAX_ADDRESSES, MAX_NETWORKS, MAX_PORTS};
use crate::{CaptureError, PodCapture, PodSettings};

/// Bits in front of an IPv4 prefix in the 16-byte form.
const MAPPED_BITS: u8 = 96;

/// The lists of a pod, checked against their bounds.
#[derive(Debug)]
pub(crate) struct Rules<'a> {
    ports: [(RuleList, &'a BTreeSet<u16>); 5],
    networks: [(RuleList, &'a [IpNet]); 4],
    settings: &'a PodSettings,
}

impl<'a> Rules<'a> {
    pub(crate) fn new(settings: &'a PodSettings) -> Result<Self, CaptureError> {
        let (outbound, inbound) = (&settings.outbound, &settings.inbound);
        let rules = Self {
            ports: [
                (RuleList::OutboundIncludePorts, &outbound.include_ports),
                (RuleList::OutboundExcludePorts, &outbound.exclude_ports),
                (RuleList::InboundIncludePorts, &inbound.include_ports),
                (RuleList::InboundExcludePorts, &inbound.exclude_ports),
                (RuleList::ProbePorts, &settings.probe_ports),
            ],
            networks: [
                (RuleList::OutboundIncludeNetworks, &outbound.include_networks),
                (RuleList::OutboundExcludeNetworks, &outbound.exclude_networks),
                (RuleList::InboundIncludeNetworks, &inbound.include_networks),
                (RuleList::InboundExcludeNetworks, &inbound.exclude_networks),
            ],
            settings,
        };
        for (list, ports) in rules.ports {
            check_bound(list, ports.len(), MAX_PORTS)?;
        }
        for (list, networks) in rules.networks {
            check_bound(list, networks.len(), MAX_NETWORKS)?;
        }
        Ok(rules)
    }

    /// The flags of the pod.
    pub(crate) fn flags(&self) -> u32 {
        let settings = self.settings;
        let switches = [
            (settings.capture_outbound, PodFlags::OUTBOUND),
            (settings.capture_inbound, PodFlags::INBOUND),
            (settings.dns_capture, PodFlags::DNS),
            (settings.deny_udp, PodFlags::DENY_UDP),
            (settings.deny_icmp, PodFlags::DENY_ICMP),
        ];
        let ports = self.ports.map(|(list, ports)| (!ports.is_empty(), PodFlags::list(list)));
        let networks =
            self.networks.map(|(list, networks)| (!networks.is_empty(), PodFlags::list(list)));
        switches
            .into_iter()
            .chain(ports)
            .chain(networks)
            .filter(|(set, _)| *set)
            .fold(0, |flags, (_, flag)| flags | flag)
    }

    pub(crate) fn port_keys(&self, rule_set: u32) -> impl Iterator<Item = PortKey> {
        self.ports.into_iter().flat_map(move |(list, ports)| {
            ports.iter().map(move |port| PortKey::new(rule_set, list, Port::new(*port)))
        })
    }

    pub(crate) fn network_keys(&self, rule_set: u32) -> impl Iterator<Item = NetworkKey> {
        self.networks.into_iter().flat_map(move |(list, networks)| {
            networks.iter().map(move |network| {
                let rule = NetworkRule::new(rule_set, list, Address::from(network.network()));
                let length = match network {
                    IpNet::V4(network) => MAPPED_BITS + network.prefix_len(),
                    IpNet::V6(network) => network.prefix_len(),
                };
                NetworkKey::new(rule, length)
            })
        })
    }
}

fn check_bound(list: RuleList, count: usize, bound: usize) -> Result<(), CaptureError> {
    let list = match list {
        RuleList::OutboundIncludePorts => "included outbound ports",
        RuleList::OutboundExcludePorts => "excluded outbound ports",
        RuleList::InboundIncludePorts => "included inbound ports",
        RuleList::InboundExcludePorts => "excluded inbound ports",
        RuleList::ProbePorts => "probe ports",
        RuleList::OutboundIncludeNetworks => "included outbound networks",
        RuleList::OutboundExcludeNetworks => "excluded outbound networks",
        RuleList::InboundIncludeNetworks => "included inbound networks",
        RuleList::InboundExcludeNetworks => "excluded inbound networks",
    };
    if count > bound { Err(CaptureError::TooMany { list, count, bound }) } else { Ok(()) }
}

/// The pod's addresses in the maps' form, without repetition.
pub(crate) fn addresses(pod: &PodCapture) -> Result<Vec<Address>, CaptureError> {
    let invalid = || CaptureError::Addresses(pod.addresses.clone());
    let is_unicast = |ip: &IpAddr| {
        let ip = ip.to_canonical();
        !(ip.is_unspecified() || ip.is_loopback() || ip.is_multicast())
    };
    if pod.addresses.is_empty()
        || pod.addresses.len() > MAX_ADDRESSES
        || !pod.addresses.iter().all(is_unicast)
    {
        return Err(invalid());
    }
    let mut addresses = Vec::new();
    for ip in &pod.addresses {
        let address = Address::from(*ip);
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    Ok(addresses)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_become_flags_and_keys() {
        let mut settings = PodSettings { deny_udp: true, ..PodSettings::default() };
        settings.outbound.exclude_ports = BTreeSet::from([22, 6379]);
        settings.outbound.exclude_networks =
            vec!["10.9.8.7/8".parse().unwrap(), "fd00::/9".parse().unwrap()];
        settings.probe_ports = BTreeSet::from([8080]);
        let rules = Rules::new(&settings).unwrap();
        assert_eq!(
            rules.flags(),
            PodFlags::OUTBOUND
                | PodFlags::INBOUND
                | PodFlags::DNS
                | PodFlags::DENY_UDP
                | PodFlags::list(RuleList::OutboundExcludePorts)
                | PodFlags::list(RuleList::OutboundExcludeNetworks)
                | PodFlags::list(RuleList::ProbePorts)
        );
        assert_eq!(rules.port_keys(7).count(), 3);
        let networks: Vec<_> = rules.network_keys(7).collect();
        let rule = |text: &str| {
            let address: IpAddr = text.parse().unwrap();
            NetworkRule::new(7, RuleList::OutboundExcludeNetworks, Address::from(address))
        };
        assert_eq!(
            networks,
            [NetworkKey::new(rule("10.0.0.0"), 104), NetworkKey::new(rule("fd00::"), 9)]
        );
        settings.probe_ports = (1..=300).collect();
        assert!(matches!(
            Rules::new(&settings),
            Err(CaptureError::TooMany { list: "probe ports", count: 300, bound: 256 })
        ));
    }

    #[test]
    fn a_pod_has_unicast_addresses() {
        let check = |texts: &[&str], expected: Option<usize>| {
            let pod = PodCapture {
                netns: "/nowhere".into(),
                addresses: texts.iter().map(|text| text.parse().unwrap()).collect(),
                settings: PodSettings::default(),
            };
            assert_eq!(addresses(&pod).ok().map(|found| found.len()), expected, "{texts:?}");
        };
        check(&["10.0.0.1", "fd00::1"], Some(2));
        check(&["10.0.0.1", "::ffff:10.0.0.1"], Some(1));
        check(&[], None);
        check(&["127.0.0.1"], None);
        check(&["::ffff:127.0.0.1"], None);
        check(&["0.0.0.0"], None);
        check(&["ff02::1"], None);
    }
}

//! What the controller wants of this node's pods.

use std::collections::BTreeMap;

use mesh_ebpf::{MAX_NETWORKS, MAX_PORTS, PodSettings, Selection};
use mesh_enroll::PodName;
use mesh_model::IpPrefix;
use mesh_wire::{PodConfig, PodMode, TrafficFilter};

use crate::enrolment::enroller::{SaidAddresses, WantedPod};

/// The controller's wishes, by pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct WantedPods {
    /// True once the controller has spoken, in this life of the agent or in an earlier one.
    pub(crate) known: bool,
    /// Every pod of this node that the controller knows.
    pub(crate) pods: BTreeMap<PodName, WantedPod>,
}

/// A pod's settings that cannot be applied; the control plane's fault.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum InvalidPodConfig {
    /// Namespace or name.
    #[error("invalid pod")]
    Name(#[source] mesh_enroll::InvalidName),
    /// More entries than the kernel's maps hold.
    #[error("{field}: {count} entries, at most {bound} are allowed")]
    TooMany {
        /// Where.
        field: &'static str,
        /// How many.
        count: usize,
        /// The bound.
        bound: usize,
    },
}

/// What enrolled pods may not send at all, by the node's settings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Denied {
    /// UDP other than DNS to the agent.
    pub(crate) udp: bool,
    /// ICMP.
    pub(crate) icmp: bool,
}

/// A resource in enrolment's terms.
///
/// # Errors
/// When it names no pod or holds more than the kernel's maps do; nothing of it is applied then.
pub(crate) fn wanted(
    config: &PodConfig,
    denied: Denied,
) -> Result<(PodName, WantedPod), InvalidPodConfig> {
    let name = PodName::new(&config.namespace, &config.name).map_err(InvalidPodConfig::Name)?;
    let captured = match config.mode {
        PodMode::Ambient => true,
        PodMode::None => false,
    };
    bounded("probe_ports", config.probe_ports.len(), MAX_PORTS)?;
    let settings = PodSettings {
        capture_outbound: true,
        capture_inbound: !config.bypass_inbound,
        dns_capture: config.dns_capture,
        deny_udp: denied.udp,
        deny_icmp: denied.icmp,
        outbound: selection(&config.outbound, &OUTBOUND)?,
        inbound: selection(&config.inbound, &INBOUND)?,
        probe_ports: config.probe_ports.clone(),
        tunnel_same_node: config.tunnel_same_node,
    };
    let service_account = config.service_account.to_string();
    let uid = config.pod_uid.to_string();
    let said = SaidAddresses::default();
    Ok((name, WantedPod { captured, uid, service_account, settings, said }))
}

/// The names of a filter's fields, for errors: ports included and excluded, CIDRs included and excluded.
type FilterFields = [&'static str; 4];

const OUTBOUND: FilterFields = [
    "outbound.include_ports",
    "outbound.exclude_ports",
    "outbound.include_cidrs",
    "outbound.exclude_cidrs",
];
const INBOUND: FilterFields = [
    "inbound.include_ports",
    "inbound.exclude_ports",
    "inbound.include_cidrs",
    "inbound.exclude_cidrs",
];

fn selection(filter: &TrafficFilter, fields: &FilterFields) -> Result<Selection, InvalidPodConfig> {
    let [include_ports, exclude_ports, include_cidrs, exclude_cidrs] = *fields;
    bounded(include_ports, filter.include_ports.len(), MAX_PORTS)?;
    bounded(exclude_ports, filter.exclude_ports.len(), MAX_PORTS)?;
    bounded(include_cidrs, filter.include_cidrs.len(), MAX_NETWORKS)?;
    bounded(exclude_cidrs, filter.exclude_cidrs.len(), MAX_NETWORKS)?;
    Ok(Selection {
        include_ports: filter.include_ports.clone(),
        exclude_ports: filter.exclude_ports.clone(),
        include_networks: networks(&filter.include_cidrs),
        exclude_networks: networks(&filter.exclude_cidrs),
    })
}

fn networks(prefixes: &[IpPrefix]) -> Vec<ipnet::IpNet> {
    prefixes
        .iter()
        .map(|prefix| ipnet::IpNet::new_assert(prefix.network(), prefix.length()))
        .collect()
}

fn bounded(field: &'static str, count: usize, bound: usize) -> Result<(), InvalidPodConfig> {
    if count > bound {
        return Err(InvalidPodConfig::TooMany { field, count, bound });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use mesh_model::WorkloadUid;

    use super::*;

    fn config() -> PodConfig {
        PodConfig {
            uid: WorkloadUid::new("Kubernetes//Pod/shop/cart-0"),
            namespace: "shop".into(),
            name: "cart-0".into(),
            service_account: "cart".into(),
            pod_uid: "".into(),
            mode: PodMode::Ambient,
            probe_ports: BTreeSet::from([8080]),
            dns_capture: true,
            outbound: TrafficFilter {
                exclude_ports: BTreeSet::from([3306]),
                include_cidrs: vec!["10.1.2.3/8".parse().unwrap(), "fd00::1".parse().unwrap()],
                ..TrafficFilter::default()
            },
            inbound: TrafficFilter::default(),
            bypass_inbound: true,
            tunnel_same_node: true,
        }
    }

    #[test]
    fn a_resource_becomes_settings() {
        let (name, wanted) = wanted(&config(), Denied::default()).unwrap();
        assert_eq!(name.to_string(), "shop/cart-0");
        assert!(wanted.captured && !wanted.settings.capture_inbound);
        assert!(wanted.settings.tunnel_same_node);
        assert_eq!(wanted.settings.probe_ports, BTreeSet::from([8080]));
        let networks: Vec<String> =
            wanted.settings.outbound.include_networks.iter().map(ToString::to_string).collect();
        assert_eq!(networks, ["10.0.0.0/8", "fd00::1/128"]);
    }

    #[test]
    fn what_cannot_be_applied_is_named() {
        let mut odd = config();
        odd.name = "a/b".into();
        assert!(wanted(&odd, Denied::default()).unwrap_err().to_string().contains("invalid pod"));
        let mut many = config();
        many.probe_ports = (1..=257).collect();
        let error = wanted(&many, Denied::default()).unwrap_err().to_string();
        assert_eq!(error, "probe_ports: 257 entries, at most 256 are allowed");
    }
}

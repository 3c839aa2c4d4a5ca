//! Culvert's own resources: settings of the mesh and of each pod.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use mesh_authorize::UnknownEgress;
use mesh_model::{IpPrefix, WorkloadUid};

use crate::address::port;
use crate::error::{InvalidResource, Problem, each, known, required};
use crate::pb::mesh as pb;
use crate::workload::text;

/// Name of the one [`MeshConfig`].
pub const MESH_CONFIG_NAME: &str = "mesh";
/// DNS domain of a cluster that names none.
const DEFAULT_CLUSTER_DOMAIN: &str = "cluster.local";

/// Settings of the whole mesh.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MeshConfig {
    /// The mesh's trust domain.
    pub trust_domain: Arc<str>,
    /// Roots of the trust domain, PEM; several while one replaces another.
    pub root_pem: Arc<str>,
    /// Revocation lists, PEM; may be empty.
    pub crl_pem: Arc<str>,
    /// What pods of a namespace may dial outside the mesh.
    pub unknown_egress: BTreeMap<Arc<str>, UnknownEgress>,
    /// The same for namespaces that are not listed.
    pub default_unknown_egress: UnknownEgress,
    /// DNS domain of the cluster.
    pub cluster_domain: Arc<str>,
    /// Networks of the cluster's own pods: an address in them that no workload has is not outside the mesh.
    pub pod_networks: Vec<IpPrefix>,
}

/// Whether a pod is part of the mesh.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PodMode {
    /// Left alone.
    #[default]
    None,
    /// Captured.
    Ambient,
}

/// Which connections of one direction are captured. Empty include lists mean all; exclusion wins.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TrafficFilter {
    /// Only these destination ports.
    pub include_ports: BTreeSet<u16>,
    /// Not these destination ports.
    pub exclude_ports: BTreeSet<u16>,
    /// Only these far addresses.
    pub include_cidrs: Vec<IpPrefix>,
    /// Not these far addresses.
    pub exclude_cidrs: Vec<IpPrefix>,
}

/// How one pod of the asking node is captured; it exists before the pod has an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodConfig {
    /// The pod's workload, and the resource's name.
    pub uid: WorkloadUid,
    /// Namespace.
    pub namespace: Arc<str>,
    /// Name.
    pub name: Arc<str>,
    /// Service account.
    pub service_account: Arc<str>,
    /// Kubernetes' own uid of the pod; empty when the source has none.
    pub pod_uid: Arc<str>,
    /// Part of the mesh or not.
    pub mode: PodMode,
    /// Ports the node may dial in the clear for its health checks.
    pub probe_ports: BTreeSet<u16>,
    /// False: the pod's DNS is left alone.
    pub dns_capture: bool,
    /// What of its outbound connections is captured.
    pub outbound: TrafficFilter,
    /// What of its inbound connections is captured.
    pub inbound: TrafficFilter,
    /// True: inbound connections are not captured at all.
    pub bypass_inbound: bool,
    /// True: connections with pods of the same node are tunnelled too, also where the agent is set to the direct path.
    pub tunnel_same_node: bool,
}

impl TryFrom<&pb::MeshConfig> for MeshConfig {
    type Error = InvalidResource;

    fn try_from(wire: &pb::MeshConfig) -> Result<Self, InvalidResource> {
        let unknown_egress = wire
            .unknown_egress
            .iter()
            .map(|(namespace, egress)| {
                required("unknown_egress", namespace)?;
                let field = format!("unknown_egress[{namespace}]");
                Ok((namespace.as_str().into(), egress_from_wire(&field, *egress)?))
            })
            .collect::<Result<_, InvalidResource>>()?;
        let cluster_domain = match wire.cluster_domain.as_str() {
            "" => DEFAULT_CLUSTER_DOMAIN,
            domain => domain,
        };
        Ok(Self {
            trust_domain: required("trust_domain", &wire.trust_domain)?.into(),
            root_pem: required("root_pem", &wire.root_pem)?.into(),
            crl_pem: wire.crl_pem.as_str().into(),
            unknown_egress,
            default_unknown_egress: egress_from_wire(
                "default_unknown_egress",
                wire.default_unknown_egress,
            )?,
            cluster_domain: cluster_domain.into(),
            pod_networks: each("pod_networks", &wire.pod_networks, |text| cidr(text))?,
        })
    }
}

impl From<&MeshConfig> for pb::MeshConfig {
    fn from(config: &MeshConfig) -> Self {
        Self {
            trust_domain: text(&config.trust_domain),
            root_pem: text(&config.root_pem),
            crl_pem: text(&config.crl_pem),
            unknown_egress: config
                .unknown_egress
                .iter()
                .map(|(namespace, egress)| (text(namespace), egress_to_wire(*egress).into()))
                .collect(),
            default_unknown_egress: egress_to_wire(config.default_unknown_egress).into(),
            cluster_domain: text(&config.cluster_domain),
            pod_networks: config.pod_networks.iter().map(ToString::to_string).collect(),
        }
    }
}

fn egress_from_wire(field: &str, wire: i32) -> Result<UnknownEgress, InvalidResource> {
    Ok(match known(field, wire)? {
        pb::UnknownEgress::Allow => UnknownEgress::Allow,
        pb::UnknownEgress::Deny => UnknownEgress::Deny,
    })
}

const fn egress_to_wire(egress: UnknownEgress) -> pb::UnknownEgress {
    match egress {
        UnknownEgress::Allow => pb::UnknownEgress::Allow,
        UnknownEgress::Deny => pb::UnknownEgress::Deny,
    }
}

impl TryFrom<&pb::PodConfig> for PodConfig {
    type Error = InvalidResource;

    fn try_from(wire: &pb::PodConfig) -> Result<Self, InvalidResource> {
        Ok(Self {
            uid: WorkloadUid::new(required("uid", &wire.uid)?),
            namespace: required("namespace", &wire.namespace)?.into(),
            name: required("name", &wire.name)?.into(),
            service_account: required("service_account", &wire.service_account)?.into(),
            pod_uid: wire.pod_uid.as_str().into(),
            mode: match known("mode", wire.mode)? {
                pb::PodMode::None => PodMode::None,
                pb::PodMode::Ambient => PodMode::Ambient,
            },
            probe_ports: ports("probe_ports", &wire.probe_ports)?,
            dns_capture: wire.dns_capture,
            outbound: filter("outbound", wire.outbound.as_ref())?,
            inbound: filter("inbound", wire.inbound.as_ref())?,
            bypass_inbound: wire.bypass_inbound,
            tunnel_same_node: wire.tunnel_same_node,
        })
    }
}

fn ports(field: &str, wire: &[u32]) -> Result<BTreeSet<u16>, InvalidResource> {
    Ok(each(field, wire, |value| port("", *value))?.into_iter().collect())
}

fn filter(field: &str, wire: Option<&pb::TrafficFilter>) -> Result<TrafficFilter, InvalidResource> {
    let Some(wire) = wire else { return Ok(TrafficFilter::default()) };
    let convert = || {
        Ok(TrafficFilter {
            include_ports: ports("include_ports", &wire.include_ports)?,
            exclude_ports: ports("exclude_ports", &wire.exclude_ports)?,
            include_cidrs: each("include_cidrs", &wire.include_cidrs, |text| cidr(text))?,
            exclude_cidrs: each("exclude_cidrs", &wire.exclude_cidrs, |text| cidr(text))?,
        })
    };
    convert().map_err(|error: InvalidResource| error.within(field))
}

fn cidr(text: &str) -> Result<IpPrefix, InvalidResource> {
    text.parse()
        .map_err(|_invalid| InvalidResource::new("", Problem::Prefix { text: text.to_owned() }))
}

impl From<&PodConfig> for pb::PodConfig {
    fn from(config: &PodConfig) -> Self {
        Self {
            uid: config.uid.as_str().to_owned(),
            namespace: text(&config.namespace),
            name: text(&config.name),
            service_account: text(&config.service_account),
            mode: match config.mode {
                PodMode::None => pb::PodMode::None,
                PodMode::Ambient => pb::PodMode::Ambient,
            }
            .into(),
            probe_ports: config.probe_ports.iter().copied().map(u32::from).collect(),
            dns_capture: config.dns_capture,
            outbound: filter_to_wire(&config.outbound),
            inbound: filter_to_wire(&config.inbound),
            bypass_inbound: config.bypass_inbound,
            tunnel_same_node: config.tunnel_same_node,
            pod_uid: text(&config.pod_uid),
        }
    }
}

fn filter_to_wire(filter: &TrafficFilter) -> Option<pb::TrafficFilter> {
    let cidrs = |list: &[IpPrefix]| list.iter().map(ToString::to_string).collect();
    (*filter != TrafficFilter::default()).then(|| pb::TrafficFilter {
        include_ports: filter.include_ports.iter().copied().map(u32::from).collect(),
        exclude_ports: filter.exclude_ports.iter().copied().map(u32::from).collect(),
        include_cidrs: cidrs(&filter.include_cidrs),
        exclude_cidrs: cidrs(&filter.exclude_cidrs),
    })
}

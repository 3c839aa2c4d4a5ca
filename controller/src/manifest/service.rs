//! Service and EndpointSlice.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use mesh_model::{IpFamilies, Visibility};
use serde::Deserialize;

use super::metadata::{InvalidField, Metadata, NameRule, Selector, check_name, ip, port};
use super::pod::PortRef;

/// Where a service port leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetPort {
    /// To this port.
    Number(u16),
    /// To the container port of this name.
    Name(String),
}

/// A TCP port of a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// Its name; empty when it has none.
    pub name: String,
    /// Its number.
    pub number: u16,
    /// Where it leads.
    pub target: TargetPort,
    /// What is spoken there, if it says so.
    pub app_protocol: Option<Arc<str>>,
}

/// Which endpoints are preferred.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Distribution {
    /// Same zone, then region.
    SameZone,
    /// Same node, then zone, then region.
    SameNode,
    /// None (`Any`, or a value this version does not know).
    Any,
}

impl Distribution {
    /// Reads `trafficDistribution` or the annotation of the same meaning.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        match text.to_ascii_lowercase().as_str() {
            "preferclose" | "prefersamezone" => Self::SameZone,
            "prefersamenode" => Self::SameNode,
            _ => Self::Any,
        }
    }
}

/// Annotation with the same meaning as `spec.trafficDistribution`; also on a namespace.
pub const TRAFFIC_DISTRIBUTION: &str = "networking.istio.io/traffic-distribution";

/// A service, trimmed to what the mesh reads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Metadata.
    pub meta: Metadata,
    /// Type `ExternalName`: only a DNS alias.
    pub external_name: bool,
    /// Cluster addresses; empty for a headless service.
    pub cluster_ips: Vec<IpAddr>,
    /// Its TCP ports.
    pub ports: Vec<Port>,
    /// Pods it selects; `None` without a selector.
    pub selector: Option<Selector>,
    /// `internalTrafficPolicy: Local`.
    pub internal_local: bool,
    /// `trafficDistribution`, or its annotation.
    pub distribution: Option<Distribution>,
    /// Endpoints that are not ready take part.
    pub publish_not_ready: bool,
    /// Address families.
    pub ip_families: IpFamilies,
    /// Who sees it (annotation `networking.istio.io/exportTo`).
    pub visibility: Visibility,
}

#[derive(Debug, Default, Deserialize)]
pub(super) struct RawService {
    #[serde(default)]
    spec: RawSpec,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawSpec {
    #[serde(rename = "type")]
    kind: Option<String>,
    #[serde(rename = "clusterIP")]
    cluster_ip: Option<String>,
    #[serde(rename = "clusterIPs")]
    cluster_ips: Option<Vec<String>>,
    ports: Option<Vec<RawPort>>,
    selector: Option<BTreeMap<String, String>>,
    internal_traffic_policy: Option<String>,
    traffic_distribution: Option<String>,
    publish_not_ready_addresses: Option<bool>,
    ip_families: Option<Vec<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawPort {
    name: Option<String>,
    protocol: Option<String>,
    port: i64,
    target_port: Option<PortRef>,
    app_protocol: Option<String>,
}

impl RawService {
    pub(super) fn parse(self, meta: Metadata) -> Result<Service, InvalidField> {
        let spec = self.spec;
        check_name("metadata.name", &meta.name, NameRule::Label)?;
        let listed = match spec.cluster_ips {
            Some(listed) if !listed.is_empty() => listed,
            Some(_) | None => spec.cluster_ip.into_iter().collect(),
        };
        let mut cluster_ips = Vec::new();
        for (index, text) in
            listed.iter().enumerate().filter(|(_, text)| !matches!(text.as_str(), "" | "None"))
        {
            cluster_ips.push(ip(&format!("spec.clusterIPs[{index}]"), text)?);
        }
        let mut ports = Vec::new();
        for (index, raw) in spec.ports.unwrap_or_default().into_iter().enumerate() {
            let number = port(&format!("spec.ports[{index}].port"), raw.port)?;
            if raw.protocol.is_some_and(|protocol| protocol != "TCP") {
                continue;
            }
            let target = match raw.target_port {
                None | Some(PortRef::Number(0)) => TargetPort::Number(number),
                Some(PortRef::Number(target)) => {
                    TargetPort::Number(port(&format!("spec.ports[{index}].targetPort"), target)?)
                }
                Some(PortRef::Name(name)) => TargetPort::Name(name),
            };
            ports.push(Port {
                name: raw.name.unwrap_or_default(),
                number,
                target,
                app_protocol: raw.app_protocol.map(Into::into),
            });
        }
        let v6 = |text: &str| text == "IPv6";
        let ip_families = match spec.ip_families.unwrap_or_default().as_slice() {
            [] => IpFamilies::Automatic,
            [one] if v6(one) => IpFamilies::Ipv6Only,
            [_] => IpFamilies::Ipv4Only,
            [..] => IpFamilies::Dual,
        };
        let distribution = spec
            .traffic_distribution
            .as_deref()
            .or_else(|| meta.annotation(TRAFFIC_DISTRIBUTION))
            .map(Distribution::parse);
        let export: Vec<String> = meta
            .annotation("networking.istio.io/exportTo")
            .map(|list| list.split(',').map(|entry| entry.trim().to_owned()).collect())
            .unwrap_or_default();
        Ok(Service {
            external_name: spec.kind.as_deref() == Some("ExternalName"),
            cluster_ips,
            ports,
            selector: spec.selector.filter(|labels| !labels.is_empty()).map(Selector),
            internal_local: spec.internal_traffic_policy.as_deref() == Some("Local"),
            distribution,
            publish_not_ready: spec.publish_not_ready_addresses.unwrap_or(false),
            ip_families,
            visibility: visibility(&export),
            meta,
        })
    }
}

/// What `exportTo` says. Names of other namespaces cannot be expressed and are treated as namespace-local: narrower, never wider.
pub(super) fn visibility(export_to: &[String]) -> Visibility {
    if export_to.is_empty() || export_to.iter().any(|entry| entry == "*") {
        Visibility::Public
    } else {
        Visibility::Namespace
    }
}

/// One endpoint of a slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Its addresses; empty in an FQDN slice.
    pub ips: Vec<IpAddr>,
    /// The pod it is, by name in the slice's namespace.
    pub pod: Option<Arc<str>>,
    /// Condition `ready`; unset means ready.
    pub ready: bool,
    /// Node it runs on; empty when unknown.
    pub node: Arc<str>,
    /// Zone; empty when unknown.
    pub zone: Arc<str>,
}

/// A part of a service's endpoints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointSlice {
    /// Metadata.
    pub meta: Metadata,
    /// Name of the service, in the slice's namespace; empty when the label is missing.
    pub service: Arc<str>,
    /// Port names and numbers, TCP only.
    pub ports: Vec<(String, u16)>,
    /// Its endpoints.
    pub endpoints: Vec<Endpoint>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct RawEndpointSlice {
    address_type: Option<String>,
    endpoints: Option<Vec<RawEndpoint>>,
    ports: Option<Vec<RawSlicePort>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawEndpoint {
    addresses: Option<Vec<String>>,
    conditions: Option<RawConditions>,
    target_ref: Option<RawTargetRef>,
    node_name: Option<String>,
    zone: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
struct RawConditions {
    ready: Option<bool>,
}

#[derive(Debug, Deserialize)]
struct RawTargetRef {
    kind: Option<String>,
    name: Option<String>,
}

#[derive(Debug, Deserialize)]
struct RawSlicePort {
    name: Option<String>,
    protocol: Option<String>,
    port: Option<i64>,
}

impl RawEndpointSlice {
    pub(super) fn parse(self, meta: Metadata) -> Result<EndpointSlice, InvalidField> {
        let fqdn = self.address_type.as_deref() == Some("FQDN");
        let mut endpoints = Vec::new();
        for (index, raw) in self.endpoints.unwrap_or_default().into_iter().enumerate() {
            let mut ips = Vec::new();
            for (at, text) in raw.addresses.unwrap_or_default().iter().enumerate().filter(|_| !fqdn)
            {
                ips.push(ip(&format!("endpoints[{index}].addresses[{at}]"), text)?);
            }
            let pod = raw
                .target_ref
                .filter(|target| target.kind.as_deref() == Some("Pod"))
                .and_then(|target| target.name)
                .map(Into::into);
            endpoints.push(Endpoint {
                ips,
                pod,
                ready: raw.conditions.unwrap_or_default().ready.unwrap_or(true),
                node: raw.node_name.unwrap_or_default().into(),
                zone: raw.zone.unwrap_or_default().into(),
            });
        }
        let mut ports = Vec::new();
        for (index, raw) in self.ports.unwrap_or_default().into_iter().enumerate() {
            let tcp = raw.protocol.is_none_or(|protocol| protocol == "TCP");
            if let (true, Some(number)) = (tcp, raw.port) {
                ports.push((
                    raw.name.unwrap_or_default(),
                    port(&format!("ports[{index}].port"), number)?,
                ));
            }
        }
        let service = meta.label("kubernetes.io/service-name").unwrap_or_default().into();
        Ok(EndpointSlice { service, ports, endpoints, meta })
    }
}

//! ServiceEntry and WorkloadEntry.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use mesh_model::{IpPrefix, Locality, Visibility};
use serde::Deserialize;

use super::capture::CaptureSettings;
use super::metadata::{InvalidField, Metadata, NameRule, Selector, check_name, ip, port};
use super::service::{Port, TargetPort, visibility};

/// How a ServiceEntry's hosts become endpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resolution {
    /// The dialled address itself.
    None,
    /// The listed or selected endpoints.
    Static,
    /// The endpoints' names, or the host itself, through DNS.
    Dns,
    /// Any name under a wildcard, through DNS; needs a waypoint.
    DynamicDns,
}

/// Where an endpoint is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum EndpointAddress {
    /// At an address.
    Ip(IpAddr),
    /// At a DNS name.
    Name(Arc<str>),
}

/// A WorkloadEntry's body, also written inline as a ServiceEntry's endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EntryEndpoint {
    /// Where; `None` for an entry of another network that only its gateway reaches.
    pub address: Option<EndpointAddress>,
    /// Ports by service port name.
    pub ports: BTreeMap<String, u16>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Network; empty for the mesh's own.
    pub network: Arc<str>,
    /// Locality.
    pub locality: Locality,
    /// Share of new connections; 1 when not given.
    pub weight: u32,
    /// Service account of its identity.
    pub service_account: Arc<str>,
}

/// A workload that is no pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkloadEntry {
    /// Metadata.
    pub meta: Metadata,
    /// Its body. Labels of the metadata are merged in.
    pub endpoint: EntryEndpoint,
    /// Node whose agent captures it (label or annotation `culvert.dev/node`); empty when none does.
    pub node: Arc<str>,
    /// Its capture annotations.
    pub capture: CaptureSettings,
}

/// Services outside Kubernetes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceEntry {
    /// Metadata.
    pub meta: Metadata,
    /// Host names; may start with `*.`.
    pub hosts: Vec<Arc<str>>,
    /// Virtual addresses.
    pub addresses: Vec<IpAddr>,
    /// Virtual ranges.
    pub cidrs: Vec<IpPrefix>,
    /// TCP ports.
    pub ports: Vec<Port>,
    /// How endpoints are found.
    pub resolution: Resolution,
    /// Inline endpoints.
    pub endpoints: Vec<EntryEndpoint>,
    /// Pods and WorkloadEntries it selects.
    pub selector: Option<Selector>,
    /// Who sees it.
    pub visibility: Visibility,
    /// `exportTo` names other namespaces, which `visibility` cannot say.
    pub visibility_narrowed: bool,
    /// Further identities of its endpoints.
    pub subject_alt_names: Vec<Arc<str>>,
    /// Gets virtual addresses of its own when it has none.
    pub allocate: bool,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct RawEndpoint {
    address: Option<String>,
    ports: Option<BTreeMap<String, i64>>,
    labels: Option<BTreeMap<String, String>>,
    network: Option<String>,
    locality: Option<String>,
    weight: Option<u32>,
    service_account: Option<String>,
}

#[derive(Debug, Deserialize)]
pub(super) struct RawWorkloadEntry {
    spec: RawEndpoint,
}

#[derive(Debug, Deserialize)]
pub(super) struct RawServiceEntry {
    spec: RawSpec,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawSpec {
    hosts: Option<Vec<String>>,
    addresses: Option<Vec<String>>,
    ports: Option<Vec<RawPort>>,
    resolution: Option<String>,
    endpoints: Option<Vec<RawEndpoint>>,
    workload_selector: Option<RawSelector>,
    export_to: Option<Vec<String>>,
    subject_alt_names: Option<Vec<String>>,
}

#[derive(Debug, Deserialize)]
struct RawSelector {
    labels: Option<BTreeMap<String, String>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawPort {
    number: i64,
    name: Option<String>,
    protocol: Option<String>,
    target_port: Option<i64>,
}

impl RawEndpoint {
    fn parse(self, at: &str) -> Result<EntryEndpoint, InvalidField> {
        let address = match self.address.filter(|text| !text.is_empty()) {
            None => None,
            Some(text) if text.starts_with("unix:") => {
                return Err(InvalidField::new(
                    &format!("{at}.address"),
                    "Unix sockets cannot be endpoints of the mesh",
                    "give an IP address or a DNS name",
                ));
            }
            Some(text) => Some(match text.parse::<IpAddr>() {
                Ok(ip) => EndpointAddress::Ip(mesh_model::canonical_ip(ip)),
                Err(_) => {
                    check_name(&format!("{at}.address"), &text, NameRule::Subdomain)?;
                    EndpointAddress::Name(text.into())
                }
            }),
        };
        let mut ports = BTreeMap::new();
        for (name, number) in self.ports.unwrap_or_default() {
            let number = port(&format!("{at}.ports.{name}"), number)?;
            ports.insert(name, number);
        }
        let account = self
            .service_account
            .filter(|name| !name.is_empty())
            .unwrap_or_else(|| "default".into());
        check_name(&format!("{at}.serviceAccount"), &account, NameRule::Subdomain)?;
        let locality = self.locality.unwrap_or_default();
        let mut parts = locality.splitn(3, '/').map(Arc::from);
        Ok(EntryEndpoint {
            address,
            ports,
            labels: self.labels.unwrap_or_default(),
            network: self.network.unwrap_or_default().into(),
            locality: Locality {
                region: parts.next().unwrap_or_default(),
                zone: parts.next().unwrap_or_default(),
                subzone: parts.next().unwrap_or_default(),
            },
            weight: self.weight.unwrap_or(1),
            service_account: account.into(),
        })
    }
}

impl RawWorkloadEntry {
    pub(super) fn parse(self, meta: Metadata) -> Result<WorkloadEntry, InvalidField> {
        let mut endpoint = self.spec.parse("spec")?;
        if endpoint.address.is_none() && endpoint.network.is_empty() {
            return Err(InvalidField::new(
                "spec.address",
                "missing",
                "give an IP address, a DNS name or a network",
            ));
        }
        for (key, value) in &meta.labels {
            endpoint.labels.entry(key.clone()).or_insert_with(|| value.clone());
        }
        let node = meta.setting("culvert.dev/node").unwrap_or_default();
        if !node.is_empty() {
            check_name("metadata.annotations", node, NameRule::Subdomain)?;
        }
        let node = node.into();
        Ok(WorkloadEntry { node, endpoint, capture: CaptureSettings::parse(&meta)?, meta })
    }
}

impl RawServiceEntry {
    pub(super) fn parse(self, meta: Metadata) -> Result<ServiceEntry, InvalidField> {
        let spec = self.spec;
        let hosts = hosts(spec.hosts.unwrap_or_default())?;
        let resolution = resolution(spec.resolution.as_deref())?;
        let (mut addresses, mut cidrs) = (Vec::new(), Vec::new());
        for (index, text) in spec.addresses.unwrap_or_default().iter().enumerate() {
            let path = format!("spec.addresses[{index}]");
            match text.parse::<IpPrefix>() {
                Ok(_) if !text.contains('/') => addresses.push(ip(&path, text)?),
                Ok(prefix) => cidrs.push(prefix),
                Err(_) => {
                    return Err(InvalidField::new(
                        &path,
                        format!("{text:?} is neither an IP address nor a CIDR"),
                        "write an address such as 10.0.0.1 or a range such as 10.0.0.0/8",
                    ));
                }
            }
        }
        let ports = ports(spec.ports.unwrap_or_default())?;
        let selector = spec.workload_selector.and_then(|selector| selector.labels).map(Selector);
        let mut endpoints = Vec::new();
        for (index, raw) in spec.endpoints.unwrap_or_default().into_iter().enumerate() {
            endpoints.push(raw.parse(&format!("spec.endpoints[{index}]"))?);
        }
        if selector.is_some() && !endpoints.is_empty() {
            return Err(InvalidField::new(
                "spec.workloadSelector",
                "given together with endpoints",
                "use one of workloadSelector and endpoints",
            ));
        }
        if resolution == Resolution::None && !endpoints.is_empty() {
            return Err(InvalidField::new(
                "spec.endpoints",
                "resolution NONE has no endpoints",
                "remove the endpoints or use resolution STATIC or DNS",
            ));
        }
        if let (Resolution::Static, Some(index)) = (
            resolution,
            endpoints
                .iter()
                .position(|endpoint| matches!(endpoint.address, Some(EndpointAddress::Name(_)))),
        ) {
            return Err(InvalidField::new(
                &format!("spec.endpoints[{index}].address"),
                "a DNS name under resolution STATIC",
                "give an IP address or use resolution DNS",
            ));
        }
        let export = spec.export_to.unwrap_or_default();
        let known = ["*", ".", "~", &meta.namespace];
        Ok(ServiceEntry {
            hosts,
            addresses,
            cidrs,
            ports,
            resolution,
            endpoints,
            selector,
            visibility: visibility(&export),
            visibility_narrowed: visibility(&export) == Visibility::Namespace
                && export.iter().any(|entry| !known.contains(&entry.as_str())),
            subject_alt_names: spec
                .subject_alt_names
                .unwrap_or_default()
                .into_iter()
                .map(Into::into)
                .collect(),
            allocate: resolution != Resolution::None
                && meta.setting("networking.istio.io/enable-autoallocate-ip") != Some("false"),
            meta,
        })
    }
}

fn hosts(listed: Vec<String>) -> Result<Vec<Arc<str>>, InvalidField> {
    if listed.is_empty() {
        return Err(InvalidField::new("spec.hosts", "no host is given", "name at least one host"));
    }
    let mut hosts: Vec<Arc<str>> = Vec::new();
    for (index, host) in listed.into_iter().enumerate() {
        let path = format!("spec.hosts[{index}]");
        let host = host.to_ascii_lowercase();
        if host == "*" {
            return Err(InvalidField::new(
                &path,
                "\"*\" would stand for every name",
                "use a name or *.domain",
            ));
        }
        check_name(&path, host.strip_prefix("*.").unwrap_or(&host), NameRule::Subdomain)?;
        if hosts.iter().any(|known| **known == *host) {
            return Err(InvalidField::new(
                &path,
                format!("{host} is listed twice"),
                "list each host once",
            ));
        }
        hosts.push(host.into());
    }
    Ok(hosts)
}

fn resolution(text: Option<&str>) -> Result<Resolution, InvalidField> {
    match text {
        None | Some("NONE") => Ok(Resolution::None),
        Some("STATIC") => Ok(Resolution::Static),
        Some("DNS" | "DNS_ROUND_ROBIN") => Ok(Resolution::Dns),
        Some("DYNAMIC_DNS") => Ok(Resolution::DynamicDns),
        Some(other) => Err(InvalidField::new(
            "spec.resolution",
            format!("{other:?} is not known"),
            "use NONE, STATIC, DNS, DNS_ROUND_ROBIN or DYNAMIC_DNS",
        )),
    }
}

fn ports(listed: Vec<RawPort>) -> Result<Vec<Port>, InvalidField> {
    let mut ports = Vec::new();
    for (index, raw) in listed.into_iter().enumerate() {
        let path = format!("spec.ports[{index}]");
        let number = port(&format!("{path}.number"), raw.number)?;
        let app_protocol: Option<Arc<str>> = raw.protocol.map(Into::into);
        if app_protocol.as_ref().is_some_and(|protocol| protocol.eq_ignore_ascii_case("UDP")) {
            continue;
        }
        let target = match raw.target_port.filter(|target| *target != 0) {
            None => number,
            Some(target) => port(&format!("{path}.targetPort"), target)?,
        };
        ports.push(Port {
            name: raw.name.unwrap_or_default(),
            number,
            target: TargetPort::Number(target),
            app_protocol,
        });
    }
    Ok(ports)
}

//! Pod.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use serde::Deserialize;

use super::capture::CaptureSettings;
use super::metadata::{InvalidField, Metadata, NameRule, check_name, ip, port};

/// A pod, trimmed to what the mesh reads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// Metadata.
    pub meta: Metadata,
    /// Node it is bound to; empty while it is not scheduled.
    pub node: Arc<str>,
    /// Service account of its identity.
    pub service_account: Arc<str>,
    /// `hostname` and `subdomain`: its name under the headless service of the latter's name, where both are set.
    pub host: Option<(Arc<str>, Arc<str>)>,
    /// It uses the node's own network namespace.
    pub host_network: bool,
    /// Phase `Succeeded` or `Failed`: it will not run again and its addresses may be somebody else's.
    pub terminal: bool,
    /// Condition `Ready` is true.
    pub ready: bool,
    /// Its addresses, canonical.
    pub ips: Vec<IpAddr>,
    /// Named TCP ports of its containers.
    pub named_ports: BTreeMap<String, u16>,
    /// Ports that its probes dial.
    pub probe_ports: BTreeSet<u16>,
    /// Its capture annotations.
    pub capture: CaptureSettings,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct RawPod {
    #[serde(default)]
    spec: RawSpec,
    #[serde(default)]
    status: RawStatus,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawSpec {
    node_name: Option<String>,
    service_account_name: Option<String>,
    service_account: Option<String>,
    host_network: Option<bool>,
    hostname: Option<String>,
    subdomain: Option<String>,
    containers: Option<Vec<RawContainer>>,
    init_containers: Option<Vec<RawContainer>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawContainer {
    ports: Option<Vec<RawPort>>,
    liveness_probe: Option<RawProbe>,
    readiness_probe: Option<RawProbe>,
    startup_probe: Option<RawProbe>,
    lifecycle: Option<RawLifecycle>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawLifecycle {
    post_start: Option<RawProbe>,
    pre_stop: Option<RawProbe>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawPort {
    name: Option<String>,
    container_port: i64,
    protocol: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawProbe {
    http_get: Option<RawTarget>,
    tcp_socket: Option<RawTarget>,
    grpc: Option<RawTarget>,
}

#[derive(Debug, Deserialize)]
struct RawTarget {
    port: PortRef,
    host: Option<String>,
}

/// A port by number or by name.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub(super) enum PortRef {
    Number(i64),
    Name(String),
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawStatus {
    phase: Option<String>,
    #[serde(rename = "podIP")]
    pod_ip: Option<String>,
    #[serde(rename = "podIPs")]
    pod_ips: Option<Vec<RawIp>>,
    conditions: Option<Vec<RawCondition>>,
}

#[derive(Debug, Deserialize)]
struct RawIp {
    ip: Option<String>,
}

#[derive(Debug, Deserialize)]
struct RawCondition {
    #[serde(rename = "type")]
    kind: String,
    status: String,
}

impl RawPod {
    pub(super) fn parse(self, meta: Metadata) -> Result<Pod, InvalidField> {
        let Self { spec, status } = self;
        let node = spec.node_name.unwrap_or_default();
        if !node.is_empty() {
            check_name("spec.nodeName", &node, NameRule::Subdomain)?;
        }
        let account = [spec.service_account_name, spec.service_account]
            .into_iter()
            .flatten()
            .find(|name| !name.is_empty())
            .unwrap_or_else(|| "default".to_owned());
        check_name("spec.serviceAccountName", &account, NameRule::Subdomain)?;
        let host = match (spec.hostname.unwrap_or_default(), spec.subdomain.unwrap_or_default()) {
            (hostname, subdomain) if hostname.is_empty() || subdomain.is_empty() => None,
            (hostname, subdomain) => {
                check_name("spec.hostname", &hostname, NameRule::Label)?;
                check_name("spec.subdomain", &subdomain, NameRule::Label)?;
                Some((hostname.into(), subdomain.into()))
            }
        };
        let containers: Vec<RawContainer> = spec
            .containers
            .into_iter()
            .flatten()
            .chain(spec.init_containers.into_iter().flatten())
            .collect();
        let named_ports = named_ports(&containers)?;
        let probe_ports = probe_ports(&containers, &named_ports)?;
        let capture = CaptureSettings::parse(&meta)?;
        let listed = status.pod_ips.unwrap_or_default().into_iter().filter_map(|entry| entry.ip);
        let mut ips = Vec::new();
        for (index, text) in listed.enumerate() {
            let address = ip(&format!("status.podIPs[{index}]"), &text)?;
            if !ips.contains(&address) {
                ips.push(address);
            }
        }
        if let (true, Some(text)) = (ips.is_empty(), status.pod_ip.filter(|text| !text.is_empty()))
        {
            ips.push(ip("status.podIP", &text)?);
        }
        let phase = status.phase.unwrap_or_default();
        // A manifest written by hand has no status: a pod with addresses counts as running and ready then.
        let ready = match status.conditions {
            None => matches!(phase.as_str(), "" | "Running"),
            Some(conditions) => conditions
                .iter()
                .any(|condition| condition.kind == "Ready" && condition.status == "True"),
        };
        Ok(Pod {
            node: node.into(),
            service_account: account.into(),
            host,
            host_network: spec.host_network.unwrap_or(false),
            terminal: matches!(phase.as_str(), "Succeeded" | "Failed"),
            ready,
            ips,
            named_ports,
            probe_ports,
            capture,
            meta,
        })
    }
}

fn named_ports(containers: &[RawContainer]) -> Result<BTreeMap<String, u16>, InvalidField> {
    let mut named = BTreeMap::new();
    for (index, container) in containers.iter().enumerate() {
        for (at, entry) in container.ports.iter().flatten().enumerate() {
            let path = format!("spec.containers[{index}].ports[{at}].containerPort");
            let number = port(&path, entry.container_port)?;
            let tcp = entry.protocol.as_deref().is_none_or(|protocol| protocol == "TCP");
            if let (true, Some(name)) = (tcp, &entry.name) {
                named.entry(name.clone()).or_insert(number);
            }
        }
    }
    Ok(named)
}

/// Probes and lifecycle hooks that dial the pod itself. Source: kubelet's prober, which dials `host` or the pod's address.
fn probe_ports(
    containers: &[RawContainer],
    named: &BTreeMap<String, u16>,
) -> Result<BTreeSet<u16>, InvalidField> {
    let mut ports = BTreeSet::new();
    for (index, container) in containers.iter().enumerate() {
        let hooks = container.lifecycle.as_ref();
        let probes = [
            ("livenessProbe", container.liveness_probe.as_ref()),
            ("readinessProbe", container.readiness_probe.as_ref()),
            ("startupProbe", container.startup_probe.as_ref()),
            ("lifecycle.postStart", hooks.and_then(|hooks| hooks.post_start.as_ref())),
            ("lifecycle.preStop", hooks.and_then(|hooks| hooks.pre_stop.as_ref())),
        ];
        for (field, probe) in
            probes.iter().filter_map(|(field, probe)| probe.map(|probe| (field, probe)))
        {
            for (action, target) in [
                ("httpGet", &probe.http_get),
                ("tcpSocket", &probe.tcp_socket),
                ("grpc", &probe.grpc),
            ] {
                let Some(target) = target
                    .as_ref()
                    .filter(|target| target.host.as_deref().is_none_or(str::is_empty))
                else {
                    continue;
                };
                let path = format!("spec.containers[{index}].{field}.{action}.port");
                let number = match &target.port {
                    PortRef::Number(number) => port(&path, *number)?,
                    // An integer in quotes is a number to the kubelet too.
                    PortRef::Name(name) => match (named.get(name), name.parse::<i64>()) {
                        (Some(number), _) => *number,
                        (None, Ok(number)) => port(&path, number)?,
                        (None, Err(_)) => {
                            return Err(InvalidField::new(
                                &path,
                                format!("no container port is named {name:?}"),
                                "name the port in spec.containers[].ports or write its number",
                            ));
                        }
                    },
                };
                ports.insert(number);
            }
        }
    }
    Ok(ports)
}

//! Workloads in their wire form.

use std::collections::BTreeMap;
use std::sync::Arc;

use mesh_model::{
    ApplicationTunnel, ApplicationTunnelProtocol, HealthStatus, Locality, NetworkId, NetworkMode,
    TunnelProtocol, Workload, WorkloadKind, WorkloadUid,
};

use crate::address::{
    gateway, gateway_to_wire, ip, ip_bytes, namespaced_hostname, port_or_unset, service_port,
    service_port_to_wire, two_parts,
};
use crate::error::{InvalidResource, Problem, each, known, required};
use crate::pb::workload as pb;

/// Trust domain of a workload that names none.
const DEFAULT_TRUST_DOMAIN: &str = "cluster.local";
/// Service account of a workload that names none.
const DEFAULT_SERVICE_ACCOUNT: &str = "default";
/// Cluster of a workload that names none.
const DEFAULT_CLUSTER_ID: &str = "Kubernetes";

fn or_default(text: &str, default: &str) -> Arc<str> {
    if text.is_empty() { default } else { text }.into()
}

impl TryFrom<&pb::Workload> for Workload {
    type Error = InvalidResource;

    fn try_from(wire: &pb::Workload) -> Result<Self, InvalidResource> {
        let workload = Self {
            uid: WorkloadUid::new(required("uid", &wire.uid)?),
            name: wire.name.as_str().into(),
            namespace: wire.namespace.as_str().into(),
            trust_domain: or_default(&wire.trust_domain, DEFAULT_TRUST_DOMAIN),
            service_account: or_default(&wire.service_account, DEFAULT_SERVICE_ACCOUNT),
            addresses: each("addresses", &wire.addresses, |bytes| ip("", bytes))?,
            hostname: wire.hostname.as_str().into(),
            network: NetworkId::new(&wire.network),
            tunnel_protocol: tunnel_protocol(wire.tunnel_protocol)?,
            network_mode: match known("network_mode", wire.network_mode)? {
                pb::NetworkMode::Standard => NetworkMode::Standard,
                pb::NetworkMode::HostNetwork => NetworkMode::HostNetwork,
            },
            network_gateway: optional_gateway("network_gateway", wire.network_gateway.as_ref())?,
            waypoint: optional_gateway("waypoint", wire.waypoint.as_ref())?,
            node: wire.node.as_str().into(),
            canonical_name: wire.canonical_name.as_str().into(),
            canonical_revision: wire.canonical_revision.as_str().into(),
            kind: match known("workload_type", wire.workload_type)? {
                pb::WorkloadType::Deployment => WorkloadKind::Deployment,
                pb::WorkloadType::Cronjob => WorkloadKind::CronJob,
                pb::WorkloadType::Pod => WorkloadKind::Pod,
                pb::WorkloadType::Job => WorkloadKind::Job,
            },
            workload_name: wire.workload_name.as_str().into(),
            native_tunnel: wire.native_tunnel,
            application_tunnel: wire
                .application_tunnel
                .as_ref()
                .map(application_tunnel)
                .transpose()?,
            services: services(&wire.services)?,
            authorization_policies: each(
                "authorization_policies",
                &wire.authorization_policies,
                |name| match two_parts(name) {
                    Some(_) => Ok(name.as_str().into()),
                    None => Err(InvalidResource::new("", Problem::Name { text: name.clone() })),
                },
            )?,
            status: match known("status", wire.status)? {
                pb::WorkloadStatus::Healthy => HealthStatus::Healthy,
                pb::WorkloadStatus::Unhealthy => HealthStatus::Unhealthy,
            },
            cluster_id: or_default(&wire.cluster_id, DEFAULT_CLUSTER_ID),
            locality: wire.locality.as_ref().map(locality).unwrap_or_default(),
            capacity: wire.capacity.unwrap_or(1),
        };
        // Only a tunnel proves who a workload is; an external endpoint may have names that are no identity.
        if workload.tunnel_protocol == TunnelProtocol::Hbone && workload.identity().is_err() {
            return Err(InvalidResource::new("service_account", Problem::Identity));
        }
        Ok(workload)
    }
}

fn tunnel_protocol(wire: i32) -> Result<TunnelProtocol, InvalidResource> {
    match known("tunnel_protocol", wire)? {
        pb::TunnelProtocol::None => Ok(TunnelProtocol::None),
        pb::TunnelProtocol::Hbone => Ok(TunnelProtocol::Hbone),
        pb::TunnelProtocol::LegacyIstioMtls => Err(InvalidResource::new(
            "tunnel_protocol",
            Problem::Unsupported { value: "LEGACY_ISTIO_MTLS" },
        )),
    }
}

pub(crate) fn optional_gateway(
    field: &str,
    wire: Option<&pb::GatewayAddress>,
) -> Result<Option<mesh_model::GatewayAddress>, InvalidResource> {
    wire.map(gateway).transpose().map_err(|error| error.within(field))
}

fn application_tunnel(wire: &pb::ApplicationTunnel) -> Result<ApplicationTunnel, InvalidResource> {
    use pb::application_tunnel::Protocol;
    let port = port_or_unset("application_tunnel.port", wire.port)?;
    Ok(ApplicationTunnel {
        protocol: match known("application_tunnel.protocol", wire.protocol)? {
            Protocol::None => ApplicationTunnelProtocol::None,
            Protocol::Proxy => ApplicationTunnelProtocol::Proxy,
        },
        port: (port != 0).then_some(port),
    })
}

fn services(
    wire: &BTreeMap<String, pb::PortList>,
) -> Result<BTreeMap<mesh_model::NamespacedHostname, Vec<mesh_model::ServicePort>>, InvalidResource>
{
    wire.iter()
        .map(|(key, list)| {
            let service = namespaced_hostname("services", key)?;
            let ports = each("ports", &list.ports, service_port)
                .map_err(|error| error.within(format_args!("services[{key}]")))?;
            Ok((service, ports))
        })
        .collect()
}

fn locality(wire: &pb::Locality) -> Locality {
    Locality {
        region: wire.region.as_str().into(),
        zone: wire.zone.as_str().into(),
        subzone: wire.subzone.as_str().into(),
    }
}

impl From<&Workload> for pb::Workload {
    fn from(workload: &Workload) -> Self {
        Self {
            uid: workload.uid.as_str().to_owned(),
            name: text(&workload.name),
            namespace: text(&workload.namespace),
            addresses: workload.addresses.iter().map(|ip| ip_bytes(*ip)).collect(),
            network: workload.network.as_str().to_owned(),
            tunnel_protocol: match workload.tunnel_protocol {
                TunnelProtocol::None => pb::TunnelProtocol::None,
                TunnelProtocol::Hbone => pb::TunnelProtocol::Hbone,
            }
            .into(),
            trust_domain: if *workload.trust_domain == *DEFAULT_TRUST_DOMAIN {
                String::new()
            } else {
                text(&workload.trust_domain)
            },
            service_account: text(&workload.service_account),
            waypoint: workload.waypoint.as_ref().map(gateway_to_wire),
            node: text(&workload.node),
            canonical_name: text(&workload.canonical_name),
            canonical_revision: text(&workload.canonical_revision),
            workload_type: match workload.kind {
                WorkloadKind::Deployment => pb::WorkloadType::Deployment,
                WorkloadKind::CronJob => pb::WorkloadType::Cronjob,
                WorkloadKind::Pod => pb::WorkloadType::Pod,
                WorkloadKind::Job => pb::WorkloadType::Job,
            }
            .into(),
            workload_name: text(&workload.workload_name),
            native_tunnel: workload.native_tunnel,
            authorization_policies: workload.authorization_policies.iter().map(text).collect(),
            status: match workload.status {
                HealthStatus::Healthy => pb::WorkloadStatus::Healthy,
                HealthStatus::Unhealthy => pb::WorkloadStatus::Unhealthy,
            }
            .into(),
            cluster_id: text(&workload.cluster_id),
            network_gateway: workload.network_gateway.as_ref().map(gateway_to_wire),
            hostname: text(&workload.hostname),
            services: workload
                .services
                .iter()
                .map(|(key, ports)| {
                    let ports = ports.iter().map(service_port_to_wire).collect();
                    (key.to_string(), pb::PortList { ports })
                })
                .collect(),
            application_tunnel: workload.application_tunnel.map(application_tunnel_to_wire),
            locality: (workload.locality != Locality::default()).then(|| pb::Locality {
                region: text(&workload.locality.region),
                zone: text(&workload.locality.zone),
                subzone: text(&workload.locality.subzone),
            }),
            network_mode: match workload.network_mode {
                NetworkMode::Standard => pb::NetworkMode::Standard,
                NetworkMode::HostNetwork => pb::NetworkMode::HostNetwork,
            }
            .into(),
            extensions: Vec::new(),
            capacity: (workload.capacity != 1).then_some(workload.capacity),
        }
    }
}

fn application_tunnel_to_wire(tunnel: ApplicationTunnel) -> pb::ApplicationTunnel {
    use pb::application_tunnel::Protocol;
    pb::ApplicationTunnel {
        protocol: match tunnel.protocol {
            ApplicationTunnelProtocol::None => Protocol::None,
            ApplicationTunnelProtocol::Proxy => Protocol::Proxy,
        }
        .into(),
        port: tunnel.port.unwrap_or(0).into(),
    }
}

pub(crate) fn text(text: &Arc<str>) -> String {
    text.as_ref().to_owned()
}

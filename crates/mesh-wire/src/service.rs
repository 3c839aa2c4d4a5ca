//! Services in their wire form.

use mesh_model::{
    HealthPolicy, IpFamilies, LoadBalancing, LoadBalancingMode, NamespacedHostname, NetworkId,
    Scope, Service, Visibility, WeightedWaypoint,
};

use crate::address::{
    gateway, gateway_to_wire, network_address, network_address_to_wire, prefix, service_port,
    service_port_to_wire,
};
use crate::error::{InvalidResource, Problem, each, known, required};
use crate::pb::workload as pb;
use crate::workload::{optional_gateway, text};

impl TryFrom<&pb::Service> for Service {
    type Error = InvalidResource;

    fn try_from(wire: &pb::Service) -> Result<Self, InvalidResource> {
        let mut vips = Vec::new();
        let mut cidr_vips = Vec::new();
        for (index, address) in wire.addresses.iter().enumerate() {
            let at = |error: InvalidResource| error.within(format_args!("addresses[{index}]"));
            match address.length {
                None => vips.push(network_address(address).map_err(at)?),
                Some(length) => {
                    let range = prefix("address", &address.address, length).map_err(at)?;
                    cidr_vips.push((NetworkId::new(&address.network), range));
                }
            }
        }
        let namespace = required("namespace", &wire.namespace)?;
        let hostname = required("hostname", &wire.hostname)?;
        if namespace.contains('/') || hostname.contains('/') {
            let text = format!("{namespace}/{hostname}");
            return Err(InvalidResource::new("hostname", Problem::Name { text }));
        }
        Ok(Self {
            name: wire.name.as_str().into(),
            key: NamespacedHostname::new(namespace, hostname),
            vips,
            cidr_vips,
            ports: each("ports", &wire.ports, service_port)?,
            subject_alt_names: wire.subject_alt_names.iter().map(|n| n.as_str().into()).collect(),
            waypoint: optional_gateway("waypoint", wire.waypoint.as_ref())?,
            weighted_waypoints: each(
                "weighted_waypoints",
                &wire.weighted_waypoints,
                weighted_waypoint,
            )?,
            load_balancing: wire
                .load_balancing
                .as_ref()
                .map(load_balancing)
                .transpose()
                .map_err(|error| error.within("load_balancing"))?
                .unwrap_or_default(),
            ip_families: match known("ip_families", wire.ip_families)? {
                pb::IpFamilies::Automatic => IpFamilies::Automatic,
                pb::IpFamilies::Ipv4Only => IpFamilies::Ipv4Only,
                pb::IpFamilies::Ipv6Only => IpFamilies::Ipv6Only,
                pb::IpFamilies::Dual => IpFamilies::Dual,
            },
            canonical: wire.canonical,
            // Stricter than ztunnel, to which an unknown visibility is a public one.
            visibility: match known("visibility", wire.visibility)? {
                pb::Visibility::Public => Visibility::Public,
                pb::Visibility::Namespace => Visibility::Namespace,
            },
        })
    }
}

fn weighted_waypoint(wire: &pb::WeightedWaypoint) -> Result<WeightedWaypoint, InvalidResource> {
    let destination = wire
        .destination
        .as_ref()
        .ok_or_else(|| InvalidResource::new("destination", Problem::Missing))?;
    Ok(WeightedWaypoint {
        destination: gateway(destination).map_err(|error| error.within("destination"))?,
        weight: wire.weight,
    })
}

fn load_balancing(wire: &pb::LoadBalancing) -> Result<LoadBalancing, InvalidResource> {
    use pb::load_balancing as lb;
    Ok(LoadBalancing {
        routing_preference: each("routing_preference", &wire.routing_preference, |scope| {
            match known("", *scope)? {
                lb::Scope::UnspecifiedScope => Err(InvalidResource::new("", Problem::Missing)),
                lb::Scope::Region => Ok(Scope::Region),
                lb::Scope::Zone => Ok(Scope::Zone),
                lb::Scope::Subzone => Ok(Scope::Subzone),
                lb::Scope::Node => Ok(Scope::Node),
                lb::Scope::Cluster => Ok(Scope::Cluster),
                lb::Scope::Network => Ok(Scope::Network),
            }
        })?,
        mode: match known("mode", wire.mode)? {
            lb::Mode::UnspecifiedMode => LoadBalancingMode::Standard,
            lb::Mode::Strict => LoadBalancingMode::Strict,
            lb::Mode::Failover => LoadBalancingMode::Failover,
            lb::Mode::Passthrough => LoadBalancingMode::Passthrough,
        },
        health_policy: match known("health_policy", wire.health_policy)? {
            lb::HealthPolicy::OnlyHealthy => HealthPolicy::OnlyHealthy,
            lb::HealthPolicy::AllowAll => HealthPolicy::AllowAll,
        },
    })
}

impl From<&Service> for pb::Service {
    fn from(service: &Service) -> Self {
        let vips =
            service.vips.iter().map(|vip| network_address_to_wire(&vip.network, vip.ip, None));
        let ranges = service.cidr_vips.iter().map(|(network, range)| {
            network_address_to_wire(network, range.network(), Some(range.length()))
        });
        Self {
            name: text(&service.name),
            namespace: text(&service.key.namespace),
            hostname: text(&service.key.hostname),
            addresses: vips.chain(ranges).collect(),
            ports: service.ports.iter().map(service_port_to_wire).collect(),
            subject_alt_names: service.subject_alt_names.iter().map(text).collect(),
            waypoint: service.waypoint.as_ref().map(gateway_to_wire),
            load_balancing: (service.load_balancing != LoadBalancing::default())
                .then(|| load_balancing_to_wire(&service.load_balancing)),
            ip_families: match service.ip_families {
                IpFamilies::Automatic => pb::IpFamilies::Automatic,
                IpFamilies::Ipv4Only => pb::IpFamilies::Ipv4Only,
                IpFamilies::Ipv6Only => pb::IpFamilies::Ipv6Only,
                IpFamilies::Dual => pb::IpFamilies::Dual,
            }
            .into(),
            extensions: Vec::new(),
            canonical: service.canonical,
            ingress_use_waypoint: false,
            weighted_waypoints: service
                .weighted_waypoints
                .iter()
                .map(|waypoint| pb::WeightedWaypoint {
                    destination: Some(gateway_to_wire(&waypoint.destination)),
                    weight: waypoint.weight,
                })
                .collect(),
            visibility: match service.visibility {
                Visibility::Public => pb::Visibility::Public,
                Visibility::Namespace => pb::Visibility::Namespace,
            }
            .into(),
        }
    }
}

fn load_balancing_to_wire(balancing: &LoadBalancing) -> pb::LoadBalancing {
    use pb::load_balancing as lb;
    pb::LoadBalancing {
        routing_preference: balancing
            .routing_preference
            .iter()
            .map(|scope| {
                match scope {
                    Scope::Region => lb::Scope::Region,
                    Scope::Zone => lb::Scope::Zone,
                    Scope::Subzone => lb::Scope::Subzone,
                    Scope::Node => lb::Scope::Node,
                    Scope::Cluster => lb::Scope::Cluster,
                    Scope::Network => lb::Scope::Network,
                }
                .into()
            })
            .collect(),
        mode: match balancing.mode {
            LoadBalancingMode::Standard => lb::Mode::UnspecifiedMode,
            LoadBalancingMode::Strict => lb::Mode::Strict,
            LoadBalancingMode::Failover => lb::Mode::Failover,
            LoadBalancingMode::Passthrough => lb::Mode::Passthrough,
        }
        .into(),
        health_policy: match balancing.health_policy {
            HealthPolicy::OnlyHealthy => lb::HealthPolicy::OnlyHealthy,
            HealthPolicy::AllowAll => lb::HealthPolicy::AllowAll,
        }
        .into(),
    }
}

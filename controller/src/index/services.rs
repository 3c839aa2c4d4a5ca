//! Service and ServiceEntry to [`Service`], and which of several definitions of a host wins.

use std::collections::BTreeMap;
use std::sync::Arc;

use mesh_model::{
    GatewayAddress, GatewayDestination, HealthPolicy, LoadBalancing, LoadBalancingMode,
    NamespacedHostname, NetworkAddress, NetworkId, Scope, Service, ServicePort,
};

use super::IndexSettings;
use super::objects::{Key, Objects};
use super::vip::Vips;
use crate::manifest::metadata::Metadata;
use crate::manifest::service::{Distribution, Port, TRAFFIC_DISTRIBUTION, TargetPort};
use crate::manifest::service_entry::Resolution;

/// The object a service comes from. Order is precedence between equally old ones.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum ServiceSource {
    Service(Key),
    ServiceEntry(Key),
}

/// Host name of a Kubernetes service.
pub(super) fn kubernetes_hostname(key: &Key, settings: &IndexSettings) -> NamespacedHostname {
    let hostname = format!("{}.{}.svc.{}", key.name, key.namespace, settings.cluster_domain);
    NamespacedHostname { namespace: key.namespace.clone(), hostname: hostname.into() }
}

/// The services one object defines.
pub(super) fn services_of(
    source: &ServiceSource,
    objects: &Objects,
    vips: &BTreeMap<NamespacedHostname, Vips>,
    settings: &IndexSettings,
) -> Vec<Service> {
    match source {
        ServiceSource::Service(key) => objects
            .services
            .get(key)
            .and_then(|_| kubernetes_service(key, objects, settings))
            .into_iter()
            .collect(),
        ServiceSource::ServiceEntry(key) => service_entry(key, objects, vips, settings),
    }
}

fn kubernetes_service(key: &Key, objects: &Objects, settings: &IndexSettings) -> Option<Service> {
    let object = objects.services.get(key).filter(|object| !object.external_name)?;
    let host = kubernetes_hostname(key, settings);
    let mut service = Service::named(&host.namespace, &host.hostname, &key.name);
    let network = NetworkId::new(&settings.network);
    service.vips =
        object.cluster_ips.iter().map(|ip| NetworkAddress::new(network.clone(), *ip)).collect();
    service.ports = ports(&object.ports);
    service.waypoint = waypoint(&object.meta, key, objects, settings);
    service.ip_families = object.ip_families;
    service.visibility = object.visibility;
    service.load_balancing = if object.internal_local {
        LoadBalancing {
            routing_preference: vec![Scope::Node],
            mode: LoadBalancingMode::Strict,
            health_policy: HealthPolicy::OnlyHealthy,
        }
    } else {
        preference(object.distribution.or_else(|| namespace_distribution(objects, &key.namespace)))
    };
    if object.publish_not_ready {
        service.load_balancing.health_policy = HealthPolicy::AllowAll;
    }
    Some(service)
}

fn namespace_distribution(objects: &Objects, namespace: &str) -> Option<Distribution> {
    objects
        .namespaces
        .get(namespace)?
        .meta
        .annotation(TRAFFIC_DISTRIBUTION)
        .map(Distribution::parse)
}

fn preference(distribution: Option<Distribution>) -> LoadBalancing {
    let routing_preference = match distribution {
        None | Some(Distribution::Any) => return LoadBalancing::default(),
        Some(Distribution::SameZone) => vec![Scope::Network, Scope::Region, Scope::Zone],
        Some(Distribution::SameNode) => {
            vec![Scope::Network, Scope::Region, Scope::Zone, Scope::Subzone, Scope::Node]
        }
    };
    LoadBalancing {
        routing_preference,
        mode: LoadBalancingMode::Failover,
        health_policy: HealthPolicy::OnlyHealthy,
    }
}

fn service_entry(
    key: &Key,
    objects: &Objects,
    vips: &BTreeMap<NamespacedHostname, Vips>,
    settings: &IndexSettings,
) -> Vec<Service> {
    let Some(object) = objects.service_entries.get(key) else { return Vec::new() };
    let network = NetworkId::new(&settings.network);
    object
        .hosts
        .iter()
        .map(|host| {
            let mut service = Service::named(&key.namespace, host, &key.name);
            service.vips = object
                .addresses
                .iter()
                .chain(vips.get(&service.key).into_iter().flatten())
                .map(|ip| NetworkAddress::new(network.clone(), *ip))
                .collect();
            service.cidr_vips = object.cidrs.iter().map(|cidr| (network.clone(), *cidr)).collect();
            service.ports = ports(&object.ports);
            service.subject_alt_names = object.subject_alt_names.clone();
            service.visibility = object.visibility;
            service.waypoint = waypoint(&object.meta, key, objects, settings);
            // A wildcard's names can only be told apart by a waypoint; without one the dialled address is kept.
            let passthrough = object.resolution == Resolution::None
                || (object.resolution == Resolution::DynamicDns && host.starts_with("*."));
            service.load_balancing = if passthrough {
                LoadBalancing { mode: LoadBalancingMode::Passthrough, ..LoadBalancing::default() }
            } else {
                let own = object.meta.annotation(TRAFFIC_DISTRIBUTION).map(Distribution::parse);
                preference(own.or_else(|| namespace_distribution(objects, &key.namespace)))
            };
            service
        })
        .collect()
}

fn ports(ports: &[Port]) -> Vec<ServicePort> {
    ports
        .iter()
        .map(|port| ServicePort {
            service_port: port.number,
            target_port: match port.target {
                TargetPort::Number(number) => number,
                TargetPort::Name(_) => 0,
            },
        })
        .collect()
}

/// The hosts of ServiceEntries that need addresses of their own, the oldest first.
pub(super) fn hosts_to_allocate(objects: &Objects) -> Vec<NamespacedHostname> {
    let needing = objects.service_entries.iter().filter(|(_, object)| {
        object.allocate && object.addresses.is_empty() && object.cidrs.is_empty()
    });
    let mut ages: BTreeMap<NamespacedHostname, i64> = BTreeMap::new();
    for (key, object) in needing {
        for host in object.hosts.iter().filter(|host| !host.starts_with("*.")) {
            let host =
                NamespacedHostname { namespace: key.namespace.clone(), hostname: host.clone() };
            let age = ages.entry(host).or_insert(object.meta.created);
            *age = object.meta.created.min(*age);
        }
    }
    let mut hosts: Vec<_> = ages.into_iter().map(|(host, created)| (created, host)).collect();
    hosts.sort();
    hosts.into_iter().map(|(_, host)| host).collect()
}

/// The waypoint an object is bound to: by its own label, else by its namespace's; `none` binds it to nothing.
///
/// A bound waypoint is required, so it is named even when nothing answers there.
pub(super) fn waypoint(
    meta: &Metadata,
    key: &Key,
    objects: &Objects,
    settings: &IndexSettings,
) -> Option<GatewayAddress> {
    let namespace = objects.namespaces.get(&key.namespace).map(|namespace| &namespace.meta);
    let (carrier, name) = [Some(meta), namespace]
        .into_iter()
        .flatten()
        .find_map(|meta| settings.mesh_label(meta, "use-waypoint").map(|name| (meta, name)))?;
    if name == "none" || name.is_empty() {
        return None;
    }
    let gateway = Key::new(
        settings.mesh_label(carrier, "use-waypoint-namespace").unwrap_or(&key.namespace),
        name,
    );
    // A waypoint does not stand behind itself.
    if gateway == *key {
        return None;
    }
    let host = kubernetes_hostname(&gateway, settings);
    Some(GatewayAddress {
        destination: GatewayDestination::Hostname(host),
        hbone_port: mesh_model::ports::HBONE,
    })
}

/// All definitions of one host name.
#[derive(Clone, Debug, Default)]
pub(super) struct HostDefinitions {
    /// By namespace, then by precedence: Kubernetes services first, then the oldest.
    candidates: BTreeMap<(Arc<str>, Rank), Service>,
}

/// Precedence; the smallest wins.
pub(super) type Rank = (bool, (i64, Arc<str>, Arc<str>), ServiceSource);

/// The precedence of a definition.
pub(super) fn rank(source: &ServiceSource, objects: &Objects) -> Option<Rank> {
    let (is_entry, meta) = match source {
        ServiceSource::Service(key) => (false, &objects.services.get(key)?.meta),
        ServiceSource::ServiceEntry(key) => (true, &objects.service_entries.get(key)?.meta),
    };
    Some((is_entry, meta.age(), source.clone()))
}

impl HostDefinitions {
    /// Takes out everything `source` defined.
    pub(super) fn remove(&mut self, source: &ServiceSource) {
        self.candidates.retain(|(_, rank), _| rank.2 != *source);
    }

    /// Adds a definition.
    pub(super) fn insert(&mut self, rank: Rank, service: Service) {
        self.candidates.insert((service.key.namespace.clone(), rank), service);
    }

    /// True when nothing defines the host.
    pub(super) fn is_empty(&self) -> bool {
        self.candidates.is_empty()
    }

    /// The winner of each namespace; the overall winner is canonical, and so is every Kubernetes service.
    pub(super) fn winners(&self) -> Vec<Service> {
        let best = self.candidates.keys().map(|(_, rank)| rank).min();
        let mut winners: Vec<Service> = Vec::new();
        for ((namespace, rank), service) in &self.candidates {
            if winners.last().is_some_and(|last| last.key.namespace == *namespace) {
                continue;
            }
            let canonical = !rank.0 || Some(rank) == best;
            winners.push(Service { canonical, ..service.clone() });
        }
        winners
    }
}

//! Pod, WorkloadEntry, EndpointSlice and ServiceEntry endpoints to [`Workload`].

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use mesh_model::{
    GatewayAddress, GatewayDestination, HealthStatus, Locality, NamespacedHostname, NetworkId,
    NetworkMode, ServicePort, TunnelProtocol, Workload, WorkloadUid, ports,
};

use super::objects::{Key, Objects, in_namespace, slice_service};
use super::services::{kubernetes_hostname, waypoint};
use super::{IndexSettings, policies};
use crate::manifest::metadata::Metadata;
use crate::manifest::service::{Port, TargetPort};
use crate::manifest::service_entry::{EndpointAddress, EntryEndpoint, Resolution, ServiceEntry};
use crate::manifest::{EndpointSlice, Pod, Service};

/// The object a workload comes from.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum WorkloadSource {
    Pod(Key),
    WorkloadEntry(Key),
    Slice(Key),
    ServiceEntry(Key),
}

impl WorkloadSource {
    /// The key of what an agent can capture: a pod or a WorkloadEntry.
    pub(super) const fn key(&self) -> Option<&Key> {
        match self {
            Self::Pod(key) | Self::WorkloadEntry(key) => Some(key),
            Self::Slice(_) | Self::ServiceEntry(_) => None,
        }
    }
}

/// Everything the mappings look at.
#[derive(Clone, Copy)]
pub(super) struct View<'v> {
    pub(super) objects: &'v Objects,
    pub(super) settings: &'v IndexSettings,
}

/// Primary key of a pod's workload.
pub(super) fn pod_uid(key: &Key, settings: &IndexSettings) -> WorkloadUid {
    WorkloadUid::new(&format!("{}//Pod/{key}", settings.cluster_id))
}

/// Primary key of a WorkloadEntry's workload.
pub(super) fn entry_uid(key: &Key, settings: &IndexSettings) -> WorkloadUid {
    WorkloadUid::new(&format!("{}/networking.istio.io/WorkloadEntry/{key}", settings.cluster_id))
}

/// A pod's workload; `hbone` is decided by the enrolment. None for a pod that has ended or has no address yet.
pub(super) fn of_pod(view: View<'_>, key: &Key, pod: &Pod, hbone: bool) -> Option<Workload> {
    let View { objects, settings } = view;
    if pod.terminal || pod.ips.is_empty() {
        return None;
    }
    let mut workload = view.named(&pod_uid(key, settings), key);
    let owner = owner_name(pod);
    let label = |keys: &[&str]| keys.iter().find_map(|key| pod.meta.label(key));
    workload.service_account = pod.service_account.clone();
    workload.addresses = pod.ips.clone();
    if let Some((hostname, subdomain)) = &pod.host {
        let service = kubernetes_hostname(&Key::new(&key.namespace, subdomain), settings);
        workload.hostname = format!("{hostname}.{}", service.hostname).into();
    }
    if let Some(network) = pod.meta.label("topology.istio.io/network") {
        workload.network = NetworkId::new(network);
    }
    workload.tunnel_protocol = if hbone { TunnelProtocol::Hbone } else { TunnelProtocol::None };
    if pod.host_network {
        workload.network_mode = NetworkMode::HostNetwork;
    }
    workload.waypoint = own_waypoint(&pod.meta, key, view);
    workload.node = pod.node.clone();
    workload.canonical_name =
        label(&["service.istio.io/canonical-name", "app.kubernetes.io/name", "app"])
            .map_or_else(|| owner.clone(), Into::into);
    workload.canonical_revision =
        label(&["service.istio.io/canonical-revision", "app.kubernetes.io/version", "version"])
            .unwrap_or("latest")
            .into();
    workload.workload_name = owner;
    let services = services_of_pod(view, key, pod);
    workload.services = services.ports;
    workload.status = if pod.ready && !pod.meta.deleting {
        HealthStatus::Healthy
    } else {
        HealthStatus::Unhealthy
    };
    workload.locality =
        objects.nodes.get(&pod.node).map(|node| node.locality.clone()).unwrap_or_default();
    workload.authorization_policies =
        policies::of_workload(view, &key.namespace, &pod.meta.labels, &services.sources);
    Some(workload)
}

impl View<'_> {
    fn named(&self, uid: &WorkloadUid, key: &Key) -> Workload {
        let mut workload = Workload::named(uid.as_str(), &key.namespace, &key.name);
        workload.trust_domain = self.settings.trust_domain.clone();
        workload.cluster_id = self.settings.cluster_id.clone();
        workload.network = NetworkId::new(&self.settings.network);
        workload
    }
}

/// The waypoint of a workload itself: only by its own label, because a namespace's binds its services.
fn own_waypoint(meta: &Metadata, key: &Key, view: View<'_>) -> Option<GatewayAddress> {
    view.settings.mesh_label(meta, "use-waypoint")?;
    waypoint(meta, key, view.objects, view.settings)
}

/// The network that a Service is the gateway of, by Istio's label. Its port 15008 is the gateway's HBONE port.
pub(super) fn gateway_network(service: &Service) -> Option<&str> {
    service.meta.label("topology.istio.io/network")
}

/// The gateway of a workload's network, for clients on others; of several the first by name.
pub(super) fn network_gateway(view: View<'_>, workload: &Workload) -> Option<GatewayAddress> {
    let service = view.objects.gateways.get(workload.network.as_str())?.first()?;
    Some(GatewayAddress {
        destination: GatewayDestination::Hostname(kubernetes_hostname(service, view.settings)),
        hbone_port: ports::HBONE,
    })
}

/// The name people know the pod's owner by: a Deployment rather than its ReplicaSet, a CronJob rather than its Job.
fn owner_name(pod: &Pod) -> Arc<str> {
    if let Some(name) = pod.meta.label("service.istio.io/workload-name") {
        return name.into();
    }
    let Some(owner) = &pod.meta.owner else { return pod.meta.name.clone() };
    let stripped = match &*owner.kind {
        "ReplicaSet" => pod
            .meta
            .label("pod-template-hash")
            .and_then(|hash| owner.name.strip_suffix(hash)?.strip_suffix('-')),
        // A CronJob names its Jobs after the scheduled minute. Source: kube-controller-manager, getJobName.
        "Job" => owner
            .name
            .rsplit_once('-')
            .filter(|(_, minute)| minute.len() >= 8 && minute.bytes().all(|b| b.is_ascii_digit()))
            .map(|(name, _)| name),
        _ => None,
    };
    stripped.map_or_else(|| owner.name.clone(), Into::into)
}

/// What a workload is an endpoint of.
#[derive(Default)]
struct Membership {
    ports: BTreeMap<NamespacedHostname, Vec<ServicePort>>,
    sources: BTreeSet<policies::Target>,
}

impl Membership {
    fn add(
        &mut self,
        hosts: impl IntoIterator<Item = NamespacedHostname>,
        ports: &[ServicePort],
        target: policies::Target,
    ) {
        self.sources.insert(target);
        if ports.is_empty() {
            return;
        }
        for host in hosts {
            let listed = self.ports.entry(host).or_default();
            for port in ports {
                if !listed.contains(port) {
                    listed.push(*port);
                }
            }
            listed.sort_by_key(|port| (port.service_port, port.target_port));
        }
    }
}

fn services_of_pod(view: View<'_>, key: &Key, pod: &Pod) -> Membership {
    let View { objects, settings } = view;
    let mut membership = Membership::default();
    for slice in objects
        .slices_by_pod
        .get(key)
        .into_iter()
        .flatten()
        .filter_map(|slice| objects.slices.get(slice))
    {
        let service_key = slice_service(slice);
        let Some(service) =
            objects.services.get(&service_key).filter(|service| !service.external_name)
        else {
            continue;
        };
        let ready = slice.endpoints.iter().any(|endpoint| {
            endpoint.pod.as_deref() == Some(&*key.name)
                && (endpoint.ready || service.publish_not_ready)
        });
        let ports = if ready { slice_ports(service, slice) } else { Vec::new() };
        let target = policies::Target::Service(service_key.clone());
        membership.add([kubernetes_hostname(&service_key, settings)], &ports, target);
    }
    for (service_key, service) in in_namespace(&objects.services, &key.namespace) {
        if objects.has_slices(service_key) || !selects(service, &pod.meta.labels) {
            continue;
        }
        let ports = pod_ports(&service.ports, &pod.named_ports);
        let target = policies::Target::Service(service_key.clone());
        membership.add([kubernetes_hostname(service_key, settings)], &ports, target);
    }
    for (entry_key, entry) in selecting_entries(objects, &key.namespace, &pod.meta.labels) {
        // A port that the pod has by that name is meant, whatever number the entry gives. Source: Istio's ambient index.
        let ports = entry_ports(&entry.ports, |name| pod.named_ports.get(name).copied());
        membership.add(
            entry_hosts(entry_key, entry),
            &ports,
            policies::Target::ServiceEntry(entry_key.clone()),
        );
    }
    membership
}

/// True when a service's selector picks these labels.
pub(super) fn selects(service: &Service, labels: &BTreeMap<String, String>) -> bool {
    !service.external_name
        && service.selector.as_ref().is_some_and(|selector| selector.matches(labels))
}

fn selecting_entries<'o>(
    objects: &'o Objects,
    namespace: &'o str,
    labels: &'o BTreeMap<String, String>,
) -> impl Iterator<Item = (&'o Key, &'o Arc<ServiceEntry>)> {
    in_namespace(&objects.service_entries, namespace).filter(|(_, entry)| {
        entry.selector.as_ref().is_some_and(|selector| selector.matches(labels))
    })
}

fn entry_hosts(key: &Key, entry: &ServiceEntry) -> impl Iterator<Item = NamespacedHostname> {
    let namespace = key.namespace.clone();
    entry.hosts.iter().map(move |host| NamespacedHostname {
        namespace: namespace.clone(),
        hostname: host.clone(),
    })
}

/// Port mapping of a slice: its ports carry the names of the service's.
fn slice_ports(service: &Service, slice: &EndpointSlice) -> Vec<ServicePort> {
    service
        .ports
        .iter()
        .filter_map(|port| {
            let found = slice.ports.iter().find(|(name, _)| *name == port.name)?;
            Some(ServicePort { service_port: port.number, target_port: found.1 })
        })
        .collect()
}

/// Port mapping of a pod; a port whose name the pod does not have is left out.
fn pod_ports(ports: &[Port], named: &BTreeMap<String, u16>) -> Vec<ServicePort> {
    ports
        .iter()
        .filter_map(|port| {
            let target_port = match &port.target {
                TargetPort::Number(number) => *number,
                TargetPort::Name(name) => *named.get(name)?,
            };
            Some(ServicePort { service_port: port.number, target_port })
        })
        .collect()
}

fn entry_ports(ports: &[Port], by_name: impl Fn(&str) -> Option<u16>) -> Vec<ServicePort> {
    ports
        .iter()
        .map(|port| {
            let own = match port.target {
                TargetPort::Number(number) => number,
                TargetPort::Name(_) => port.number,
            };
            let target_port = by_name(&port.name).unwrap_or(own);
            ServicePort { service_port: port.number, target_port }
        })
        .collect()
}

/// The ports on which a pod serves a service.
pub(super) fn target_ports_on(pod: &Pod, ports: &[Port]) -> impl Iterator<Item = u16> {
    pod_ports(ports, &pod.named_ports).into_iter().map(|port| port.target_port)
}

/// The ports that a service's slices name.
pub(super) fn target_ports_in(
    service: &Service,
    slice: &EndpointSlice,
) -> impl Iterator<Item = u16> {
    slice_ports(service, slice).into_iter().map(|port| port.target_port)
}

/// The workload of a WorkloadEntry.
pub(super) fn of_workload_entry(view: View<'_>, key: &Key, hbone: bool) -> Option<Workload> {
    let View { objects, settings } = view;
    let entry = objects.workload_entries.get(key)?;
    let labels = &entry.endpoint.labels;
    let mut workload = of_endpoint(view, &entry_uid(key, settings), key, &entry.endpoint);
    workload.node = entry.node.clone();
    workload.tunnel_protocol = if hbone { TunnelProtocol::Hbone } else { TunnelProtocol::None };
    workload.waypoint = own_waypoint(&entry.meta, key, view);
    let mut membership = Membership::default();
    for (service_key, service) in in_namespace(&objects.services, &key.namespace) {
        if selects(service, labels) {
            let named = |port: &Port| entry.endpoint.ports.get(&port.name).copied();
            let ports: Vec<_> = service
                .ports
                .iter()
                .filter_map(|port| {
                    let target = match &port.target {
                        TargetPort::Number(number) => named(port).unwrap_or(*number),
                        TargetPort::Name(name) => {
                            entry.endpoint.ports.get(name).copied().or_else(|| named(port))?
                        }
                    };
                    Some(ServicePort { service_port: port.number, target_port: target })
                })
                .collect();
            let target = policies::Target::Service(service_key.clone());
            membership.add([kubernetes_hostname(service_key, settings)], &ports, target);
        }
    }
    for (entry_key, service_entry) in selecting_entries(objects, &key.namespace, labels) {
        let ports =
            entry_ports(&service_entry.ports, |name| entry.endpoint.ports.get(name).copied());
        membership.add(
            entry_hosts(entry_key, service_entry),
            &ports,
            policies::Target::ServiceEntry(entry_key.clone()),
        );
    }
    workload.services = membership.ports;
    workload.status =
        if entry.meta.deleting { HealthStatus::Unhealthy } else { HealthStatus::Healthy };
    workload.authorization_policies =
        policies::of_workload(view, &key.namespace, labels, &membership.sources);
    Some(workload)
}

fn of_endpoint(view: View<'_>, uid: &WorkloadUid, key: &Key, endpoint: &EntryEndpoint) -> Workload {
    let mut workload = view.named(uid, key);
    match &endpoint.address {
        Some(EndpointAddress::Ip(ip)) => workload.addresses = vec![*ip],
        Some(EndpointAddress::Name(name)) => workload.hostname = name.clone(),
        None => {}
    }
    if !endpoint.network.is_empty() {
        workload.network = NetworkId::new(&endpoint.network);
    }
    let label =
        |keys: &[&str]| keys.iter().find_map(|key| endpoint.labels.get(*key)).map(String::as_str);
    workload.canonical_name =
        label(&["service.istio.io/canonical-name", "app.kubernetes.io/name", "app"])
            .map_or_else(|| key.name.clone(), Into::into);
    workload.canonical_revision =
        label(&["service.istio.io/canonical-revision", "app.kubernetes.io/version", "version"])
            .unwrap_or("latest")
            .into();
    workload.workload_name = key.name.clone();
    workload.service_account = endpoint.service_account.clone();
    workload.locality = endpoint.locality.clone();
    workload.capacity = endpoint.weight;
    workload
}

/// The inline endpoints of a ServiceEntry, or the implied one: its host, through DNS.
pub(super) fn of_service_entry(view: View<'_>, key: &Key) -> Vec<Workload> {
    let Some(entry) = view.objects.service_entries.get(key) else { return Vec::new() };
    let prefix = format!("{}/networking.istio.io/ServiceEntry/{key}", view.settings.cluster_id);
    let mut workloads: Vec<Workload> = Vec::new();
    let mut add = |address: &str,
                   endpoint: &EntryEndpoint,
                   hosts: &mut dyn Iterator<Item = NamespacedHostname>| {
        let twins = workloads
            .iter()
            .filter(|one| one.uid.as_str().starts_with(&format!("{prefix}/{address}")))
            .count();
        // Two endpoints at one address differ in their ports only.
        let suffix = if twins == 0 { String::new() } else { format!("/{twins}") };
        let uid = WorkloadUid::new(&format!("{prefix}/{address}{suffix}"));
        let mut workload = of_endpoint(view, &uid, key, endpoint);
        let ports = entry_ports(&entry.ports, |name| endpoint.ports.get(name).copied());
        workload.services = hosts.map(|host| (host, ports.clone())).collect();
        workloads.push(workload);
    };
    for endpoint in &entry.endpoints {
        let address = match &endpoint.address {
            Some(EndpointAddress::Ip(ip)) => ip.to_string(),
            Some(EndpointAddress::Name(name)) => name.to_string(),
            None => format!("network-{}", endpoint.network),
        };
        add(&address, endpoint, &mut entry_hosts(key, entry));
    }
    let by_name = matches!(entry.resolution, Resolution::Dns | Resolution::DynamicDns);
    if by_name && entry.endpoints.is_empty() && entry.selector.is_none() {
        for host in entry_hosts(key, entry).filter(|host| !host.hostname.starts_with("*.")) {
            let endpoint = EntryEndpoint {
                address: Some(EndpointAddress::Name(host.hostname.clone())),
                ports: BTreeMap::new(),
                labels: BTreeMap::new(),
                network: "".into(),
                locality: Locality::default(),
                weight: 1,
                service_account: "default".into(),
            };
            let address = host.hostname.to_string();
            add(&address, &endpoint, &mut std::iter::once(host));
        }
    }
    workloads
}

/// The endpoints of a slice that are no pods, such as the API server's. They share their address with the node they run on,
/// or with something outside.
pub(super) fn of_slice(view: View<'_>, key: &Key) -> Vec<Workload> {
    let View { objects, settings } = view;
    let Some(slice) = objects.slices.get(key) else { return Vec::new() };
    let service_key = slice_service(slice);
    let Some(service) = objects.services.get(&service_key).filter(|service| !service.external_name)
    else {
        return Vec::new();
    };
    let host = kubernetes_hostname(&service_key, settings);
    let ports = slice_ports(service, slice);
    let mut seen: BTreeSet<IpAddr> = BTreeSet::new();
    let mut workloads = Vec::new();
    for endpoint in slice.endpoints.iter().filter(|endpoint| endpoint.pod.is_none()) {
        for ip in endpoint.ips.iter().filter(|ip| seen.insert(**ip)) {
            let uid = format!("{}/discovery.k8s.io/EndpointSlice/{key}/{ip}", settings.cluster_id);
            let mut workload = view.named(&WorkloadUid::new(&uid), key);
            workload.addresses = vec![*ip];
            workload.network_mode = NetworkMode::HostNetwork;
            workload.canonical_name = service_key.name.clone();
            workload.canonical_revision = "latest".into();
            workload.workload_name = service_key.name.clone();
            workload.node = endpoint.node.clone();
            workload.locality = objects.nodes.get(&endpoint.node).map_or_else(
                || Locality { zone: endpoint.zone.clone(), ..Locality::default() },
                |node| node.locality.clone(),
            );
            workload.status =
                if endpoint.ready { HealthStatus::Healthy } else { HealthStatus::Unhealthy };
            workload.services = [(host.clone(), ports.clone())].into();
            workloads.push(workload);
        }
    }
    workloads
}

//! Which names the mesh owns, as one client sees them.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use mesh_model::{
    HealthPolicy, HealthStatus, IpFamilies, NetworkId, Service, ServicePort, Workload,
};
use mesh_resolve::WorkloadIndex;

/// Who asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DnsClient {
    /// Namespace of the pod: short names are its namespace's, and it sees that namespace's private services.
    pub namespace: Arc<str>,
    /// Network of the pod: addresses of other networks are of no use to it.
    pub network: NetworkId,
    /// Search domains of the pod's `resolv.conf`, in lower case and without trailing dot, at most
    /// [`MAX_SEARCH_DOMAINS`] are looked at.
    pub search: Vec<Arc<str>>,
    /// The cluster's domain, e.g. `cluster.local`.
    pub cluster_domain: Arc<str>,
}

/// Most search domains. Source: resolv.conf(5), glibc before 2.26 allowed 6, Kubernetes allows 32.
pub const MAX_SEARCH_DOMAINS: usize = 32;

/// Ranges of automatic addresses of ServiceEntries: nobody else can answer for them.
const AUTOMATIC_V4: [u8; 2] = [240, 240];
const AUTOMATIC_V6: [u16; 3] = [0x2001, 2, 0];

/// What a name stands for.
#[derive(Clone, Debug)]
pub(crate) enum Owned {
    /// A service.
    Service(Arc<Service>),
    /// One endpoint of a service without a virtual address.
    Endpoint(Arc<Service>, Arc<Workload>),
    /// A pod, by the address that its name spells.
    Pod(IpAddr),
}

/// An owned name.
#[derive(Clone, Debug)]
pub(crate) struct Owner {
    /// What it stands for.
    pub(crate) owned: Owned,
    /// The name without the client's search domain, when one had to be taken off: the answer is an alias then.
    pub(crate) alias_of: Option<String>,
    /// True under the cluster's domain, where nobody else knows better about types that are not addresses.
    pub(crate) authoritative: bool,
}

impl DnsClient {
    /// Who owns `name`, given in lower case without trailing dot. `None`: forward.
    pub(crate) fn owner(&self, index: &WorkloadIndex, name: &str) -> Option<Owner> {
        if let Some(owned) = self.find(index, name) {
            return Some(self.owner_of(owned, None));
        }
        self.search.iter().take(MAX_SEARCH_DOMAINS).find_map(|domain| {
            let stripped = name.strip_suffix(&**domain)?.strip_suffix('.')?;
            // One label is the pod's own namespace's name, found before under its full name or not at all.
            if stripped.is_empty() || !stripped.contains('.') {
                return None;
            }
            let owned = self.find(index, stripped)?;
            Some(self.owner_of(owned, Some(stripped.to_owned())))
        })
    }

    fn owner_of(&self, owned: Owned, alias_of: Option<String>) -> Owner {
        let authoritative = match &owned {
            Owned::Service(service) | Owned::Endpoint(service, _) => {
                self.is_cluster_name(&service.key.hostname)
            }
            Owned::Pod(_) => true,
        };
        Owner { owned, alias_of, authoritative }
    }

    /// The service an address belongs to, where nobody but the mesh can say so.
    pub(crate) fn owner_of_address(
        &self,
        index: &WorkloadIndex,
        ip: IpAddr,
    ) -> Option<Arc<Service>> {
        let service = index.find_service_by_vip(&self.network, ip, &self.namespace)?;
        let automatic = match ip {
            IpAddr::V4(ip) => ip.octets().starts_with(&AUTOMATIC_V4),
            IpAddr::V6(ip) => ip.segments().starts_with(&AUTOMATIC_V6),
        };
        let named = !service.key.hostname.starts_with('*');
        (named && (automatic || self.is_cluster_name(&service.key.hostname))).then_some(service)
    }

    fn find(&self, index: &WorkloadIndex, name: &str) -> Option<Owned> {
        let full = self.full_names(name);
        full.iter().find_map(|name| self.exact(index, name)).or_else(|| {
            let suffixes = name.match_indices('.').map(|(at, _)| &name[at..]);
            suffixes.take(MAX_WILDCARD_SUFFIXES).find_map(|suffix| {
                let service =
                    index.find_service_by_hostname(&format!("*{suffix}"), &self.namespace)?;
                self.can_answer(&service).then_some(Owned::Service(service))
            })
        })
    }

    /// `name` and, where it may be a short one, what it is short for.
    fn full_names(&self, name: &str) -> Vec<String> {
        let mut names = vec![name.to_owned()];
        let domain = &self.cluster_domain;
        let labels: Vec<&str> = name.split('.').collect();
        match labels.as_slice() {
            [_service] => names.push(format!("{name}.{}.svc.{domain}", self.namespace)),
            [_service, _namespace] => names.push(format!("{name}.svc.{domain}")),
            [_service, _namespace, "svc" | "pod"] => names.push(format!("{name}.{domain}")),
            [_service, _namespace, "svc", first, ..] => {
                // `cart.shop.svc.cluster`, where the client's last search domain was `local`.
                if let Some((head, rest)) = domain.split_once('.')
                    && labels.len() == 4
                    && *first == head
                {
                    names.push(format!("{name}.{rest}"));
                }
            }
            _ => {}
        }
        names
    }

    fn exact(&self, index: &WorkloadIndex, name: &str) -> Option<Owned> {
        if let Some(service) = index.find_service_by_hostname(name, &self.namespace) {
            return self.can_answer(&service).then_some(Owned::Service(service));
        }
        let (first, rest) = name.split_once('.')?;
        if !self.is_cluster_name(rest) {
            return self.pod(index, first, rest);
        }
        let service = index.find_service_by_hostname(rest, &self.namespace)?;
        if !is_headless(&service) {
            return None;
        }
        let endpoint = index
            .endpoints(&service.key)
            .filter(|workload| takes_part(&service, workload) && workload.network == self.network)
            .find(|workload| is_named(workload, first, name))?;
        Some(Owned::Endpoint(service, Arc::clone(endpoint)))
    }

    /// `10-1-0-2.shop.pod.cluster.local`, where a pod of that namespace has the address.
    ///
    /// Source: Kubernetes DNS specification 1.0.1 §2.3.3; CoreDNS, plugin `kubernetes`, `pods verified`.
    fn pod(&self, index: &WorkloadIndex, dashed: &str, rest: &str) -> Option<Owned> {
        let namespace = rest.strip_suffix(&*self.cluster_domain)?.strip_suffix(".pod.")?;
        let spelled = |separator: &str| dashed.replace('-', separator).parse::<IpAddr>().ok();
        let ip = spelled(".").or_else(|| spelled(":"))?;
        let pod = index.workload_by_ip(&self.network, ip)?;
        (*pod.namespace == *namespace).then_some(Owned::Pod(ip))
    }

    /// A service without any virtual address is answered by its endpoints, but only under the cluster's domain: the
    /// host of a ServiceEntry without addresses is somebody else's name.
    fn can_answer(&self, service: &Service) -> bool {
        !service.vips.is_empty() || self.is_cluster_name(&service.key.hostname)
    }

    fn is_cluster_name(&self, hostname: &str) -> bool {
        hostname.strip_suffix(&*self.cluster_domain).is_some_and(|rest| rest.ends_with(".svc."))
    }

    /// The addresses of what a name stands for that are of use to this client, without repeats, in stable order.
    pub(crate) fn addresses(&self, index: &WorkloadIndex, owned: &Owned) -> Vec<IpAddr> {
        let addresses: BTreeSet<IpAddr> = match owned {
            Owned::Service(service) if is_headless(service) => index
                .endpoints(&service.key)
                .filter(|workload| takes_part(service, workload))
                .filter(|workload| workload.network == self.network)
                .flat_map(|workload| workload.addresses.iter().copied())
                .filter(|ip| is_of_family(service.ip_families, *ip))
                .take(MAX_ADDRESSES)
                .collect(),
            Owned::Service(service) => service
                .vips
                .iter()
                .filter(|vip| vip.network == self.network)
                .map(|vip| vip.ip)
                .collect(),
            Owned::Endpoint(_, workload) => workload.addresses.iter().copied().collect(),
            Owned::Pod(ip) => BTreeSet::from([*ip]),
        };
        addresses.into_iter().collect()
    }

    /// For SRV: what listens, under which first label of the service's name (none: the name itself), on which ports.
    pub(crate) fn targets(&self, index: &WorkloadIndex, owned: &Owned) -> Vec<Target> {
        match owned {
            Owned::Service(service) if is_headless(service) => index
                .endpoints(&service.key)
                .filter(|workload| takes_part(service, workload))
                .filter(|workload| workload.network == self.network)
                .take(MAX_TARGETS)
                .map(|workload| Target::of(service, workload))
                .collect(),
            Owned::Service(service) => {
                let ports = service.ports.iter().map(|port| port.service_port).collect();
                vec![Target { label: None, ports, addresses: Vec::new() }]
            }
            Owned::Endpoint(service, workload) => {
                let target = Target::of(service, workload);
                vec![Target { label: None, ..target }]
            }
            Owned::Pod(_) => Vec::new(),
        }
    }
}

/// What an SRV record leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) label: Option<String>,
    pub(crate) ports: Vec<u16>,
    pub(crate) addresses: Vec<IpAddr>,
}

impl Target {
    fn of(service: &Service, workload: &Workload) -> Self {
        let own = workload.services.get(&service.key).map(Vec::as_slice).unwrap_or_default();
        Self {
            label: Some(endpoint_label(service, workload)),
            ports: service.ports.iter().map(|port| target_port(*port, own)).collect(),
            addresses: workload.addresses.clone(),
        }
    }
}

/// The port an endpoint listens on: its own mapping where it has one.
fn target_port(port: ServicePort, own: &[ServicePort]) -> u16 {
    let mapped = own.iter().find(|own| own.service_port == port.service_port);
    [mapped.map_or(0, |own| own.target_port), port.target_port, port.service_port]
        .into_iter()
        .find(|port| *port != 0)
        .unwrap_or(0)
}

/// Labels a wildcard may stand for.
const MAX_WILDCARD_SUFFIXES: usize = 16;
/// Addresses of a headless service that are looked at; those of more would not fit a message.
const MAX_ADDRESSES: usize = 4096;
/// Endpoints in an SRV answer.
const MAX_TARGETS: usize = 512;

fn is_headless(service: &Service) -> bool {
    service.vips.is_empty() && service.cidr_vips.is_empty()
}

fn is_of_family(families: IpFamilies, ip: IpAddr) -> bool {
    match families {
        IpFamilies::Automatic | IpFamilies::Dual => true,
        IpFamilies::Ipv4Only => ip.is_ipv4(),
        IpFamilies::Ipv6Only => ip.is_ipv6(),
    }
}

fn takes_part(service: &Service, workload: &Workload) -> bool {
    match service.load_balancing.health_policy {
        HealthPolicy::AllowAll => true,
        HealthPolicy::OnlyHealthy => workload.status == HealthStatus::Healthy,
    }
}

/// Pods go by the host name they are given, those of a StatefulSet by their names, and every endpoint by its dashed
/// address. Source: Kubernetes DNS specification 1.1.0 §2.4.1.
fn is_named(workload: &Workload, label: &str, full: &str) -> bool {
    *workload.name == *label
        || *workload.hostname == *full
        || workload.addresses.iter().any(|ip| dashed(*ip) == label)
}

fn endpoint_label(service: &Service, workload: &Workload) -> String {
    let own = workload.hostname.strip_suffix(&*service.key.hostname);
    if let Some(label) = own.and_then(|own| own.strip_suffix('.')) {
        return label.to_owned();
    }
    let name = &workload.name;
    let is_label = (1..=63).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    match workload.addresses.first() {
        Some(ip) if !is_label => dashed(*ip),
        _ => name.to_string(),
    }
}

fn dashed(ip: IpAddr) -> String {
    ip.to_string().replace(['.', ':'], "-")
}

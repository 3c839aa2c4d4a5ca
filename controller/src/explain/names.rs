//! What the ends of a question are called.

use std::net::IpAddr;
use std::sync::Arc;

use mesh_model::{Service, Workload};
use mesh_resolve::WorkloadIndex;

/// Suffixes of a name that are looked up as wildcards. Source: a host name has at most 127 labels.
const MAX_SUFFIXES: usize = 127;

pub(super) fn find_workload(index: &WorkloadIndex, name: &str) -> Option<Arc<Workload>> {
    if let Some(found) = index.workload(&mesh_model::WorkloadUid::new(name)) {
        return Some(Arc::clone(found));
    }
    if let Ok(ip) = name.parse::<IpAddr>() {
        let ip = ip.to_canonical();
        let found = index.workloads().find(|workload| workload.addresses.contains(&ip));
        return Some(found.map_or_else(|| outsider(ip), Arc::clone));
    }
    let (namespace, name) = name.split_once('/')?;
    index.workload_by_name(namespace, name).cloned()
}

/// A client that the mesh knows nothing of but its address: it has no identity, and nothing is captured there.
fn outsider(ip: IpAddr) -> Arc<Workload> {
    let name = ip.to_string();
    Arc::new(Workload { addresses: vec![ip], ..Workload::named(&name, "outside", &name) })
}

/// The address that a client of the source's namespace would dial for a name.
pub(super) fn find_address(index: &WorkloadIndex, source: &Workload, name: &str) -> Option<IpAddr> {
    if let Ok(ip) = name.parse::<IpAddr>() {
        return Some(ip.to_canonical());
    }
    if let Some((namespace, pod)) = name.split_once('/') {
        if let Some(found) = index.workload_by_name(namespace, pod) {
            return found.addresses.first().copied();
        }
        return named(index, source, pod, namespace);
    }
    let mut host = name.to_ascii_lowercase();
    if host.ends_with('.') {
        host.pop();
    }
    named(index, source, &host, &source.namespace).or_else(|| wildcard(index, source, &host))
}

/// As the search domains of a pod in `namespace` would find it.
fn named(index: &WorkloadIndex, source: &Workload, name: &str, namespace: &str) -> Option<IpAddr> {
    let full = index.services().find(|service| {
        let host = &*service.key.hostname;
        let labels: Vec<&str> = host.split('.').collect();
        let is_kubernetes = labels.get(2) == Some(&"svc");
        host == name
            || (is_kubernetes
                && host
                    .strip_prefix(name)
                    .is_some_and(|rest| rest.starts_with('.') && name.contains('.')))
            || (is_kubernetes
                && labels.first() == Some(&name)
                && *service.key.namespace == *namespace)
    })?;
    let own = index.find_service_by_hostname(&full.key.hostname, &source.namespace)?;
    virtual_address(&own, source).or_else(|| {
        let mut endpoints = index.endpoints(&own.key);
        endpoints.find_map(|endpoint| endpoint.addresses.first().copied())
    })
}

/// As the agents' DNS proxy answers it: by the longest wildcard host that has an address.
fn wildcard(index: &WorkloadIndex, source: &Workload, name: &str) -> Option<IpAddr> {
    let suffixes = name.match_indices('.').filter_map(|(at, _)| name.get(at..));
    suffixes.take(MAX_SUFFIXES).find_map(|suffix| {
        let host = format!("*{suffix}");
        let service = index.find_service_by_hostname(&host, &source.namespace)?;
        virtual_address(&service, source)
    })
}

fn virtual_address(service: &Service, source: &Workload) -> Option<IpAddr> {
    let own = service.vips.iter().find(|vip| vip.network == source.network);
    own.or_else(|| service.vips.first()).map(|vip| vip.ip)
}

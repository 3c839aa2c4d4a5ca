//! The picture of the mesh: workloads, services, and what points at them.

use std::cmp::Reverse;
use std::net::IpAddr;
use std::sync::Arc;

use equivalent::Comparable;
use imbl::{OrdMap, OrdSet};
use mesh_model::{
    IpPrefix, NamespacedHostname, NetworkAddress, NetworkId, NetworkMode, Revision, Service,
    TunnelProtocol, Workload, WorkloadUid, canonical_ip,
};
use serde::{Deserialize, Serialize};

use crate::grouped::{Named, Start, entries, members};

/// A change of a [`WorkloadIndex`]. Removals come first, so that an object removed and given is there afterwards.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IndexDelta {
    /// Workloads that are new or changed, whole.
    pub workloads: Vec<Workload>,
    /// Workloads that are gone.
    pub removed_workloads: Vec<WorkloadUid>,
    /// Services that are new or changed, whole.
    pub services: Vec<Service>,
    /// Services that are gone.
    pub removed_services: Vec<NamespacedHostname>,
}

/// What the mesh looks like. A clone is a snapshot and costs O(1); an update costs O(log n) per object and address.
///
/// A workload may name services that are not known yet, and the other way round. Memory is bounded by the objects that
/// are there: nothing is kept of what was removed. All iteration is in the order of keys.
#[derive(Clone, Debug, Default)]
pub struct WorkloadIndex {
    revision: Revision,
    workloads: OrdMap<WorkloadUid, Indexed>,
    services: OrdMap<NamespacedHostname, Arc<Service>>,
    /// Never holds `HOST_NETWORK` workloads: they share the node's address.
    by_address: OrdSet<(NetworkAddress, Claim)>,
    /// (namespace, pod name).
    by_name: OrdSet<(NamespacedHostname, Claim)>,
    /// (namespace, host name) of workloads that have one.
    by_hostname: OrdSet<(NamespacedHostname, Claim)>,
    by_node: OrdSet<(Arc<str>, WorkloadUid)>,
    /// Endpoints by service, whether or not the service is known; their health is judged when they are chosen.
    endpoints: OrdMap<(NamespacedHostname, WorkloadUid), Arc<Workload>>,
    vips: OrdSet<(NetworkAddress, NamespacedHostname)>,
    cidr_vips: OrdSet<((NetworkId, IpPrefix), NamespacedHostname)>,
    /// How many `cidr_vips` have a length, longest first: the only lengths worth searching for.
    cidr_lengths: OrdMap<(NetworkId, bool, Reverse<u8>), usize>,
    service_namespaces: OrdSet<(Arc<str>, Arc<str>)>,
}

#[derive(Clone, Debug)]
struct Indexed {
    workload: Arc<Workload>,
    /// When the workload got its present addresses.
    since: Revision,
}

/// A workload's claim to an address or name; the least one holds.
///
/// Pods before other objects, tunnelled before plain ones (source: ztunnel's rule for overlapping addresses), then the
/// newest: while an address changes hands both pods may be listed, and the later one is the one that has it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Claim {
    preference: Reverse<u8>,
    since: Reverse<Revision>,
    uid: WorkloadUid,
}

impl Claim {
    fn of(indexed: &Indexed) -> Self {
        let workload = &indexed.workload;
        let pod = if workload.uid.as_str().contains("//Pod/") { 2 } else { 0 };
        let tunnel = match workload.tunnel_protocol {
            TunnelProtocol::Hbone => 1,
            TunnelProtocol::None => 0,
        };
        Self {
            preference: Reverse(pod + tunnel),
            since: Reverse(indexed.since),
            uid: workload.uid.clone(),
        }
    }
}

impl WorkloadIndex {
    /// The stamp of the last change.
    #[must_use]
    pub const fn revision(&self) -> Revision {
        self.revision
    }

    /// Takes a change over and returns the new stamp. A delta that changes nothing leaves the stamp as it is.
    pub fn apply(&mut self, delta: IndexDelta) -> Revision {
        let revision = self.revision.next();
        let mut changed = false;
        for uid in &delta.removed_workloads {
            changed |= self.remove_workload(uid);
        }
        for key in &delta.removed_services {
            changed |= self.remove_service(key);
        }
        for workload in delta.workloads {
            changed |= self.insert_workload(workload, revision);
        }
        for service in delta.services {
            changed |= self.insert_service(service);
        }
        if changed {
            self.revision = revision;
        }
        self.revision
    }

    /// A workload by its key.
    #[must_use]
    pub fn workload(&self, uid: &WorkloadUid) -> Option<&Arc<Workload>> {
        self.workloads.get(uid).map(|indexed| &indexed.workload)
    }

    /// The workload that has an address; never one on the host's network.
    #[must_use]
    pub fn workload_by_ip(&self, network: &NetworkId, ip: IpAddr) -> Option<&Arc<Workload>> {
        self.claimed(&self.by_address, &NetworkAddress::new(network.clone(), ip))
    }

    /// The workload with a pod name, preferring pods to other objects of that name.
    #[must_use]
    pub fn workload_by_name(&self, namespace: &str, name: &str) -> Option<&Arc<Workload>> {
        self.claimed(&self.by_name, &Named(namespace, name))
    }

    /// The workload with a host name.
    #[must_use]
    pub fn workload_by_hostname(&self, key: &NamespacedHostname) -> Option<&Arc<Workload>> {
        self.claimed(&self.by_hostname, key)
    }

    /// All workloads, in the order of their keys.
    pub fn workloads(&self) -> impl ExactSizeIterator<Item = &Arc<Workload>> {
        self.workloads.values().map(|indexed| &indexed.workload)
    }

    /// The workloads of a node, in the order of their keys. Those of unknown node are on none.
    pub fn workloads_on_node(&self, node: &Arc<str>) -> impl Iterator<Item = &Arc<Workload>> {
        members(&self.by_node, node).filter_map(|uid| self.workload(uid))
    }

    /// A service by its key.
    #[must_use]
    pub fn service(&self, key: &NamespacedHostname) -> Option<&Arc<Service>> {
        self.services.get(key)
    }

    /// All services, in the order of their keys.
    pub fn services(&self) -> impl ExactSizeIterator<Item = &Arc<Service>> {
        self.services.values()
    }

    /// The services with exactly this virtual address, whoever may see them; in the order of their keys.
    pub fn services_by_vip(
        &self,
        network: &NetworkId,
        ip: IpAddr,
    ) -> impl Iterator<Item = &Arc<Service>> {
        let address = NetworkAddress::new(network.clone(), ip);
        // The iterator borrows its key, so the keys are collected; several services at one address are rare.
        let keys: Vec<_> = members(&self.vips, &address).collect();
        keys.into_iter().filter_map(|key| self.services.get(key))
    }

    /// The services with an address range that holds `ip`, whoever may see them; longest prefix first.
    pub fn services_by_cidr(
        &self,
        network: &NetworkId,
        ip: IpAddr,
    ) -> impl Iterator<Item = (u8, &Arc<Service>)> {
        let ip = canonical_ip(ip);
        let mut found = Vec::new();
        let lengths = self
            .cidr_lengths
            .range((network.clone(), ip.is_ipv6(), Reverse(u8::MAX))..)
            .take_while(|((of, v6, _), _)| of == network && *v6 == ip.is_ipv6());
        for ((_, _, Reverse(length)), _) in lengths {
            if let Ok(prefix) = IpPrefix::new(ip, *length) {
                let range = (network.clone(), prefix);
                found.extend(members(&self.cidr_vips, &range).map(|key| (*length, key)));
            }
        }
        found
            .into_iter()
            .filter_map(|(length, key)| self.services.get(key).map(|service| (length, service)))
    }

    /// The services with a host name, in the order of their namespaces.
    pub fn services_by_hostname(&self, hostname: &Arc<str>) -> impl Iterator<Item = &Arc<Service>> {
        members(&self.service_namespaces, hostname)
            .filter_map(|namespace| self.services.get(&Named(namespace, hostname)))
    }

    /// The workloads that name a service, ready or not, in the order of their keys.
    pub fn endpoints(&self, service: &NamespacedHostname) -> impl Iterator<Item = &Arc<Workload>> {
        entries(&self.endpoints, service)
    }

    /// True when `uid` names the service.
    #[must_use]
    pub fn is_endpoint(&self, service: &NamespacedHostname, uid: &WorkloadUid) -> bool {
        self.workload(uid).is_some_and(|workload| workload.services.contains_key(service))
    }

    fn claimed<G, Q>(&self, claims: &OrdSet<(G, Claim)>, group: &Q) -> Option<&Arc<Workload>>
    where
        G: Ord,
        Q: Comparable<G> + ?Sized,
    {
        let (found, claim) = claims.range(Start(group)..).next()?;
        if group.compare(found).is_eq() { self.workload(&claim.uid) } else { None }
    }

    fn insert_workload(&mut self, workload: Workload, revision: Revision) -> bool {
        let mut workload = workload;
        for ip in &mut workload.addresses {
            *ip = canonical_ip(*ip);
        }
        let since = match self.workloads.get(&workload.uid) {
            Some(old) if *old.workload == workload => return false,
            Some(old)
                if old.workload.addresses == workload.addresses
                    && old.workload.network == workload.network =>
            {
                old.since
            }
            Some(_) | None => revision,
        };
        self.remove_workload(&workload.uid);
        let indexed = Indexed { workload: Arc::new(workload), since };
        let claim = Claim::of(&indexed);
        let workload = &indexed.workload;
        for address in addresses(workload) {
            self.by_address.insert((address, claim.clone()));
        }
        if !workload.hostname.is_empty() {
            self.by_hostname.insert((hostname(workload), claim.clone()));
        }
        if !workload.node.is_empty() {
            self.by_node.insert((workload.node.clone(), workload.uid.clone()));
        }
        self.by_name.insert((pod_name(workload), claim));
        for service in workload.services.keys() {
            self.endpoints.insert((service.clone(), workload.uid.clone()), Arc::clone(workload));
        }
        self.workloads.insert(workload.uid.clone(), indexed);
        true
    }

    fn remove_workload(&mut self, uid: &WorkloadUid) -> bool {
        let Some(indexed) = self.workloads.remove(uid) else { return false };
        let claim = Claim::of(&indexed);
        let workload = &indexed.workload;
        for address in addresses(workload) {
            self.by_address.remove(&(address, claim.clone()));
        }
        if !workload.hostname.is_empty() {
            self.by_hostname.remove(&(hostname(workload), claim.clone()));
        }
        if !workload.node.is_empty() {
            self.by_node.remove(&(workload.node.clone(), workload.uid.clone()));
        }
        self.by_name.remove(&(pod_name(workload), claim));
        for service in workload.services.keys() {
            self.endpoints.remove(&(service.clone(), workload.uid.clone()));
        }
        true
    }

    fn insert_service(&mut self, service: Service) -> bool {
        if self.services.get(&service.key).is_some_and(|old| **old == service) {
            return false;
        }
        self.remove_service(&service.key);
        for vip in &service.vips {
            let vip = NetworkAddress::new(vip.network.clone(), vip.ip);
            self.vips.insert((vip, service.key.clone()));
        }
        for (network, prefix) in &service.cidr_vips {
            if self.cidr_vips.insert(((network.clone(), *prefix), service.key.clone())).is_none() {
                *self.cidr_lengths.entry(length_key(network, prefix)).or_default() += 1;
            }
        }
        self.service_namespaces
            .insert((service.key.hostname.clone(), service.key.namespace.clone()));
        self.services.insert(service.key.clone(), Arc::new(service));
        true
    }

    fn remove_service(&mut self, key: &NamespacedHostname) -> bool {
        let Some(service) = self.services.remove(key) else { return false };
        for vip in &service.vips {
            let vip = NetworkAddress::new(vip.network.clone(), vip.ip);
            self.vips.remove(&(vip, key.clone()));
        }
        for (network, prefix) in &service.cidr_vips {
            if self.cidr_vips.remove(&((network.clone(), *prefix), key.clone())).is_some() {
                self.forget_length(length_key(network, prefix));
            }
        }
        self.service_namespaces.remove(&(key.hostname.clone(), key.namespace.clone()));
        true
    }

    fn forget_length(&mut self, key: (NetworkId, bool, Reverse<u8>)) {
        match self.cidr_lengths.get_mut(&key) {
            Some(count) if *count > 1 => *count -= 1,
            Some(_) | None => {
                self.cidr_lengths.remove(&key);
            }
        }
    }
}

/// The addresses that name a workload.
fn addresses(workload: &Workload) -> impl Iterator<Item = NetworkAddress> + '_ {
    let own = match workload.network_mode {
        NetworkMode::Standard => workload.addresses.as_slice(),
        NetworkMode::HostNetwork => &[],
    };
    own.iter().map(|ip| NetworkAddress::new(workload.network.clone(), *ip))
}

fn hostname(workload: &Workload) -> NamespacedHostname {
    NamespacedHostname {
        namespace: workload.namespace.clone(),
        hostname: workload.hostname.clone(),
    }
}

fn pod_name(workload: &Workload) -> NamespacedHostname {
    NamespacedHostname { namespace: workload.namespace.clone(), hostname: workload.name.clone() }
}

fn length_key(network: &NetworkId, prefix: &IpPrefix) -> (NetworkId, bool, Reverse<u8>) {
    (network.clone(), prefix.network().is_ipv6(), Reverse(prefix.length()))
}

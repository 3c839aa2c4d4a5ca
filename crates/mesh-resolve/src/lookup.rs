//! "What is this address" and "which of several services is meant".

use std::cmp::Reverse;
use std::net::IpAddr;
use std::sync::Arc;

use mesh_model::{NamespacedHostname, NetworkId, Service, Visibility, Workload};

use crate::index::WorkloadIndex;

/// What an address or host name stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Addressed {
    /// One workload.
    Workload(Arc<Workload>),
    /// A service.
    Service(Arc<Service>),
}

impl WorkloadIndex {
    /// What an address is, seen by a client of `namespace`: a workload first, then a service.
    ///
    /// Source: the order is ztunnel's `find_address`.
    #[must_use]
    pub fn find_address(
        &self,
        network: &NetworkId,
        ip: IpAddr,
        namespace: &str,
    ) -> Option<Addressed> {
        self.workload_by_ip(network, ip)
            .map(|workload| Addressed::Workload(Arc::clone(workload)))
            .or_else(|| self.find_service(network, ip, namespace).map(Addressed::Service))
    }

    /// The service that a client of `namespace` means by a virtual address: one with exactly this address, else one with a
    /// range around it.
    #[must_use]
    pub fn find_service(
        &self,
        network: &NetworkId,
        ip: IpAddr,
        namespace: &str,
    ) -> Option<Arc<Service>> {
        self.find_service_by_vip(network, ip, namespace).or_else(|| {
            self.services_by_cidr(network, ip)
                .filter(|(_, service)| is_visible(service, namespace))
                .min_by_key(|(length, service)| {
                    (*service.key.namespace != *namespace, Reverse(*length), !service.canonical)
                })
                .map(|(_, service)| Arc::clone(service))
        })
    }

    /// The service that a client of `namespace` means by exactly this virtual address.
    #[must_use]
    pub fn find_service_by_vip(
        &self,
        network: &NetworkId,
        ip: IpAddr,
        namespace: &str,
    ) -> Option<Arc<Service>> {
        preferred(self.services_by_vip(network, ip), namespace)
    }

    /// What a host name of a namespace is: a service first, then a workload. The namespace is part of the name here, for
    /// references such as a waypoint's.
    #[must_use]
    pub fn find_hostname(&self, key: &NamespacedHostname) -> Option<Addressed> {
        self.service(key).map(|service| Addressed::Service(Arc::clone(service))).or_else(|| {
            self.workload_by_hostname(key).map(|workload| Addressed::Workload(Arc::clone(workload)))
        })
    }

    /// The service that a client of `namespace` means by a host name.
    #[must_use]
    pub fn find_service_by_hostname(
        &self,
        hostname: &str,
        namespace: &str,
    ) -> Option<Arc<Service>> {
        preferred(self.services_by_hostname(&hostname.into()), namespace)
    }
}

/// The visible one in the client's namespace, else the canonical one, else the first.
fn preferred<'s>(
    services: impl Iterator<Item = &'s Arc<Service>>,
    namespace: &str,
) -> Option<Arc<Service>> {
    services
        .filter(|service| is_visible(service, namespace))
        .min_by_key(|service| (*service.key.namespace != *namespace, !service.canonical))
        .map(Arc::clone)
}

fn is_visible(service: &Service, namespace: &str) -> bool {
    match service.visibility {
        Visibility::Public => true,
        Visibility::Namespace => *service.key.namespace == *namespace,
    }
}

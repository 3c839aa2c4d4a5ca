//! What a waypoint is asked for: something that it stands in front of, or nothing.

use std::sync::Arc;

use mesh_model::{Service, ServicePort, Workload};

use crate::authority::Authority;
use crate::index::WorkloadIndex;
use crate::lookup::Addressed;
use crate::unroutable::Unroutable;
use crate::waypoint;

/// What `local`, a workload of a waypoint, is asked for by a CONNECT: a service or workload that is bound to it.
///
/// # Errors
/// [`Unroutable::NotOurs`] for anything else, the waypoint's own address among it: a waypoint is nobody's open proxy.
pub fn resolve_fronted(
    index: &WorkloadIndex,
    local: &Arc<Workload>,
    authority: &Authority,
) -> Result<Addressed, Unroutable> {
    let is_ours = |service: &Service| is_fronted(index, local, service);
    let found = match authority {
        Authority::Address(address) => {
            match index.find_address(&local.network, address.ip(), &local.namespace) {
                Some(Addressed::Workload(workload)) => workload
                    .waypoint
                    .as_ref()
                    .is_some_and(|gateway| waypoint::is_part_of(index, gateway, local))
                    .then_some(Addressed::Workload(workload)),
                Some(Addressed::Service(service)) => {
                    is_ours(&service).then_some(Addressed::Service(service))
                }
                None => None,
            }
        }
        Authority::Hostname { host, .. } => index
            .services_by_hostname(host)
            .filter(|service| is_ours(service))
            .min_by_key(|service| (service.key.namespace != local.namespace, !service.canonical))
            .map(|service| Addressed::Service(Arc::clone(service))),
    };
    found.ok_or_else(|| Unroutable::NotOurs {
        authority: authority.clone(),
        local: local.uid.clone(),
    })
}

/// True when `local` is a workload of a waypoint of the service.
#[must_use]
pub fn is_fronted(index: &WorkloadIndex, local: &Workload, service: &Service) -> bool {
    waypoint::bound_to(service).any(|gateway| waypoint::is_part_of(index, gateway, local))
}

impl WorkloadIndex {
    /// The endpoints' port behind a port of a service: what conditions of policies on ports are about. Where endpoints have
    /// different ones (a named port), that of the first which has any.
    #[must_use]
    pub fn target_port(&self, service: &Service, port: u16) -> Option<u16> {
        let target = |ports: &[ServicePort]| {
            let found = ports.iter().find(|one| one.service_port == port && one.target_port != 0);
            found.map(|one| one.target_port)
        };
        target(&service.ports).or_else(|| {
            let mut endpoints = self.endpoints(&service.key);
            endpoints.find_map(|endpoint| target(endpoint.services.get(&service.key)?))
        })
    }
}

#[cfg(test)]
mod tests {
    use mesh_model::{
        GatewayAddress, GatewayDestination, NamespacedHostname, NetworkAddress, NetworkId,
    };

    use super::*;
    use crate::index::IndexDelta;

    fn index() -> WorkloadIndex {
        let waypoint = NamespacedHostname::new("shop", "w.shop.svc");
        let gateway = GatewayAddress {
            destination: GatewayDestination::Hostname(waypoint.clone()),
            hbone_port: 15008,
        };
        let service = |name: &str, ip: [u8; 4], bound: bool| {
            let mut service = Service::named("shop", &format!("{name}.shop.svc"), name);
            service.vips = vec![NetworkAddress::new(NetworkId::default(), ip.into())];
            service.ports = vec![
                ServicePort { service_port: 80, target_port: 8080 },
                ServicePort { service_port: 81, target_port: 0 },
            ];
            service.waypoint = bound.then(|| gateway.clone());
            service
        };
        let workload = |name: &str, ip: [u8; 4], of: &NamespacedHostname| {
            let mut workload = Workload::named(&format!("K//Pod/shop/{name}"), "shop", name);
            workload.addresses = vec![ip.into()];
            let port = ServicePort { service_port: 81, target_port: 9090 };
            workload.services.insert(of.clone(), vec![port]);
            workload
        };
        let cart = NamespacedHostname::new("shop", "cart.shop.svc");
        let mut bound = workload("bound", [10, 0, 0, 3], &cart);
        bound.waypoint = Some(gateway.clone());
        let mut index = WorkloadIndex::default();
        index.apply(IndexDelta {
            services: vec![
                service("w", [10, 96, 0, 1], false),
                service("cart", [10, 96, 0, 2], true),
                service("free", [10, 96, 0, 3], false),
            ],
            workloads: vec![
                workload("w", [10, 0, 0, 1], &waypoint),
                workload("cart", [10, 0, 0, 2], &cart),
                bound,
            ],
            ..IndexDelta::default()
        });
        index
    }

    #[test]
    fn a_waypoint_is_asked_for_what_is_bound_to_it_and_nothing_else() {
        let index = index();
        let own = index.workload_by_name("shop", "w").expect("the waypoint");
        for (asked, ours) in [
            ("10.96.0.2:80", true),
            ("cart.shop.svc:80", true),
            ("10.0.0.3:8080", true),
            ("10.96.0.1:15008", false),
            ("10.96.0.3:80", false),
            ("free.shop.svc:80", false),
            ("10.0.0.1:80", false),
            ("10.0.0.2:80", false),
            ("192.0.2.1:80", false),
            ("example.org:80", false),
        ] {
            let found = resolve_fronted(&index, own, &asked.parse().expect("an authority"));
            assert_eq!(found.is_ok(), ours, "{asked} {found:?}");
        }
        let cart = index.workload_by_name("shop", "cart").expect("another workload");
        assert!(resolve_fronted(&index, cart, &"10.96.0.2:80".parse().unwrap()).is_err());
    }

    #[test]
    fn ports_lead_to_those_of_the_endpoints() {
        let index = index();
        let cart = index.service(&NamespacedHostname::new("shop", "cart.shop.svc")).unwrap();
        for (port, target) in [(80, Some(8080)), (81, Some(9090)), (82, None)] {
            assert_eq!(index.target_port(cart, port), target, "{port}");
        }
    }
}

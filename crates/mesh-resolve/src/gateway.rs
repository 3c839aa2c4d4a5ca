//! Gateways of other networks: where they are, and who must be at the end of a tunnel through one.
//!
//! A gateway ends the outer tunnel only and hands the inner one on to an endpoint that it chooses itself. So the inner
//! tunnel's far end is any endpoint of the service on that network, and nobody else.

use std::collections::BTreeSet;
use std::sync::Arc;

use mesh_model::{GatewayAddress, GatewayDestination, Service, ServicePort, SpiffeId, Workload};

use crate::balance::{Choice, Purpose, Wanted, address, choose};
use crate::index::WorkloadIndex;
use crate::lookup::Addressed;
use crate::trace::Trace;
use crate::waypoint::alternative_names;

/// What a gateway's address stands for, on whatever network. A service first: a gateway is given by its service as a rule.
pub(crate) fn destination(index: &WorkloadIndex, gateway: &GatewayAddress) -> Option<Addressed> {
    match &gateway.destination {
        GatewayDestination::Hostname(key) => index.find_hostname(key),
        GatewayDestination::Address(at) => index
            .services_by_vip(&at.network, at.ip)
            .next()
            .map(|service| Addressed::Service(Arc::clone(service)))
            .or_else(|| {
                index
                    .workload_by_ip(&at.network, at.ip)
                    .map(|workload| Addressed::Workload(Arc::clone(workload)))
            }),
    }
}

/// A gateway's workload, chosen, and the service it was chosen of. Its address is always known; none when no gateway is
/// known or ready.
pub(crate) fn find(
    index: &WorkloadIndex,
    gateway: &GatewayAddress,
    wanted: &Wanted<'_>,
    trace: &mut Trace,
) -> Option<(Choice, Option<Arc<Service>>)> {
    let wanted = Wanted { port: gateway.hbone_port, purpose: Purpose::Gateway, ..*wanted };
    let (choice, service) = match destination(index, gateway)? {
        Addressed::Service(service) => {
            (choose(index, &service, &wanted, trace).ok()?, Some(service))
        }
        Addressed::Workload(workload) => {
            let address = address(&workload, mesh_model::IpFamilies::Automatic, wanted.dialled);
            let port = ServicePort { service_port: wanted.port, target_port: wanted.port };
            (Choice { workload, port, address }, None)
        }
    };
    choice.address.is_some().then_some((choice, service))
}

/// Who may be at the far end of a tunnel through the gateway of `remote`'s network: the service's alternative names, and its
/// endpoints there. An endpoint without any address stands for others (WDS calls it a split horizon): its identity is
/// nobody's.
pub(crate) fn expected(
    index: &WorkloadIndex,
    service: &Service,
    remote: &Workload,
) -> BTreeSet<SpiffeId> {
    let there = index.endpoints(&service.key).filter(|one| {
        one.network == remote.network && !(one.addresses.is_empty() && one.hostname.is_empty())
    });
    there
        .filter_map(|workload| workload.identity().ok())
        .chain(alternative_names(service))
        .collect()
}

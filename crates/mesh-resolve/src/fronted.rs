//! What a waypoint is asked for: something that it stands in front of, or nothing.

use std::sync::Arc;

use mesh_model::{Service, Workload};

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
    let is_ours = |service: &Service| {
        waypoint::bound_to(service).any(|gateway| waypoint::is_part_of(index, gateway, local))
    };
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

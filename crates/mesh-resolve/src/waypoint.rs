//! Waypoints: which are bound, where they are, and by which identities they are known.

use std::collections::BTreeSet;
use std::sync::Arc;

use mesh_model::{
    GatewayAddress, GatewayDestination, IpFamilies, NetworkId, Service, ServicePort, SpiffeId,
    Workload,
};

use crate::balance::{Choice, Dice, NoChoice, Purpose, Wanted, address, choose};
use crate::gateway::destination;
use crate::index::WorkloadIndex;
use crate::lookup::Addressed;
use crate::trace::Trace;

/// A waypoint's workload, chosen.
pub(crate) struct Found {
    pub(crate) choice: Choice,
    pub(crate) service: Option<Arc<Service>>,
    pub(crate) families: IpFamilies,
}

/// Why a waypoint cannot be used.
pub(crate) enum NotFound {
    Unavailable,
    OtherNetwork(NetworkId),
}

/// A waypoint's name in messages: `namespace/hostname` or `network/address`.
pub(crate) fn name(gateway: &GatewayAddress) -> Arc<str> {
    match &gateway.destination {
        GatewayDestination::Hostname(key) => key.to_string().into(),
        GatewayDestination::Address(address) => address.to_string().into(),
    }
}

/// The waypoints of a service, in the order in which to try them: one drawn by weight, the other weighted ones, the plain one.
pub(crate) fn of_service(service: &Service, dice: Dice) -> Vec<&GatewayAddress> {
    let weighted = &service.weighted_waypoints;
    let drawn = dice.weighted(Purpose::Waypoint, weighted.iter().map(|one| one.weight));
    let first = drawn.into_iter();
    let others = (0..weighted.len()).filter(|index| {
        drawn.is_some_and(|drawn| drawn != *index)
            && weighted.get(*index).is_some_and(|one| one.weight > 0)
    });
    let mut gateways: Vec<_> = first
        .chain(others)
        .filter_map(|index| weighted.get(index))
        .map(|one| &one.destination)
        .collect();
    gateways.extend(&service.waypoint);
    gateways
}

/// All waypoints bound to a service.
pub(crate) fn bound_to(service: &Service) -> impl Iterator<Item = &GatewayAddress> {
    let weighted = service.weighted_waypoints.iter().filter(|one| one.weight > 0);
    weighted.map(|one| &one.destination).chain(&service.waypoint)
}

/// What a waypoint's address stands for, as long as it is on the workload's own network.
fn look_up(
    index: &WorkloadIndex,
    gateway: &GatewayAddress,
    network: &NetworkId,
) -> Result<Addressed, NotFound> {
    match &gateway.destination {
        GatewayDestination::Address(at) if at.network != *network => {
            Err(NotFound::OtherNetwork(at.network.clone()))
        }
        GatewayDestination::Address(_) | GatewayDestination::Hostname(_) => {
            destination(index, gateway).ok_or(NotFound::Unavailable)
        }
    }
}

/// Chooses a workload of a waypoint.
pub(crate) fn find(
    index: &WorkloadIndex,
    gateway: &GatewayAddress,
    wanted: &Wanted<'_>,
    trace: &mut Trace,
) -> Result<Found, NotFound> {
    let wanted = Wanted { port: gateway.hbone_port, purpose: Purpose::WaypointEndpoint, ..*wanted };
    match look_up(index, gateway, &wanted.source.network)? {
        Addressed::Service(service) => match choose(index, &service, &wanted, trace) {
            Ok(choice) => {
                let families = service.ip_families;
                Ok(Found { choice, service: Some(service), families })
            }
            Err(NoChoice::OtherNetwork(network)) => Err(NotFound::OtherNetwork(network)),
            Err(NoChoice::NoSuchPort | NoChoice::NoEndpoint) => Err(NotFound::Unavailable),
        },
        Addressed::Workload(workload) if workload.network != wanted.source.network => {
            Err(NotFound::OtherNetwork(workload.network.clone()))
        }
        Addressed::Workload(workload) => {
            let families = IpFamilies::Automatic;
            let address = address(&workload, families, wanted.dialled);
            if address.is_none() && workload.hostname.is_empty() {
                return Err(NotFound::Unavailable);
            }
            let port = ServicePort { service_port: wanted.port, target_port: wanted.port };
            Ok(Found { choice: Choice { workload, port, address }, service: None, families })
        }
    }
}

/// True when a workload is one of the waypoint's.
pub(crate) fn is_part_of(
    index: &WorkloadIndex,
    gateway: &GatewayAddress,
    workload: &Workload,
) -> bool {
    match look_up(index, gateway, &workload.network) {
        Ok(Addressed::Service(service)) => index.is_endpoint(&service.key, &workload.uid),
        Ok(Addressed::Workload(found)) => found.uid == workload.uid,
        Err(NotFound::Unavailable | NotFound::OtherNetwork(_)) => false,
    }
}

/// Adds the identities that a waypoint may prove to `identities`.
pub(crate) fn collect_identities(
    index: &WorkloadIndex,
    gateway: &GatewayAddress,
    network: &NetworkId,
    identities: &mut BTreeSet<SpiffeId>,
) {
    match look_up(index, gateway, network) {
        Ok(Addressed::Service(service)) => {
            identities.extend(alternative_names(&service));
            identities.extend(
                index.endpoints(&service.key).filter_map(|workload| workload.identity().ok()),
            );
        }
        Ok(Addressed::Workload(workload)) => identities.extend(workload.identity().ok()),
        Err(NotFound::Unavailable | NotFound::OtherNetwork(_)) => {}
    }
}

/// Further identities that the endpoints of a service may prove; names of other shapes are nobody's here.
pub(crate) fn alternative_names(service: &Service) -> impl Iterator<Item = SpiffeId> + '_ {
    service.subject_alt_names.iter().filter_map(|name| name.parse().ok())
}

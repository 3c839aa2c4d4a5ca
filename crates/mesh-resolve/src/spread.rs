//! All endpoints among which a service's connections are spread.

use std::fmt;
use std::sync::Arc;

use mesh_model::{Flow, Service, Workload};

use crate::index::WorkloadIndex;
use crate::outbound;
use crate::route::ResolvedFlow;
use crate::settings::ResolveSettings;

/// A service that was dialled, and every endpoint that a connection may get, each with the same chance.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Spread {
    /// The service.
    pub service: Arc<Service>,
    /// What [`resolve`](crate::resolve) may answer, once each, in the order of the endpoints' keys; never empty.
    pub endpoints: Vec<ResolvedFlow>,
}

/// Why a connection is not spread evenly over endpoints that are known.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NotSpread {
    /// The destination is no service's virtual address.
    NoService,
    /// A waypoint is bound to the service.
    Waypoint,
    /// The service keeps the address that was dialled.
    KeepsDestination,
    /// There is no endpoint, or some have more capacity than others.
    NoEqualEndpoints,
    /// An endpoint is on another network.
    OtherNetwork,
    /// One of the endpoints could not be reached, or is known by a host name only.
    Unroutable(Box<str>),
}

impl fmt::Display for NotSpread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoService => f.write_str("the destination is no service's virtual address"),
            Self::Waypoint => f.write_str("a waypoint is bound to the service"),
            Self::KeepsDestination => f.write_str("the service keeps the dialled address"),
            Self::NoEqualEndpoints => {
                f.write_str("the service has no endpoints, or some with more capacity than others")
            }
            Self::OtherNetwork => f.write_str("an endpoint is on another network"),
            Self::Unroutable(because) => write!(f, "an endpoint of the service: {because}"),
        }
    }
}

/// All that [`resolve`](crate::resolve) answers for a connection that `source` opened to a service's virtual address,
/// whatever its entropy, where each answer is as likely as the others and no waypoint is on the way.
///
/// # Errors
/// Why there is no such list: then each connection has to be resolved by itself.
pub fn resolve_spread(
    index: &WorkloadIndex,
    settings: &ResolveSettings,
    flow: &Flow,
    source: &Arc<Workload>,
) -> Result<Spread, NotSpread> {
    outbound::spread(index, settings, flow, source)
}

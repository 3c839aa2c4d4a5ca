//! Which endpoint of a service a connection gets.
//!
//! Source: the candidates, modes and scopes are ztunnel's, so that a mixed mesh spreads load alike. An endpoint on another
//! network takes part when a gateway leads there and it speaks HBONE; waypoints on other networks are passed over.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use mesh_model::{
    HealthPolicy, HealthStatus, IpFamilies, LoadBalancingMode, NetworkId, NetworkMode, Scope,
    Service, ServicePort, TunnelProtocol, Workload, splitmix,
};

use crate::index::WorkloadIndex;
use crate::trace::{PassedOver, Step, Trace};

/// One number of entropy, spent on several choices that must not depend on each other.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Dice(u64);

/// What a choice is for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Purpose {
    Endpoint,
    WaypointEndpoint,
    Waypoint,
    Address,
    /// A gateway of another network.
    Gateway,
}

impl Dice {
    pub(crate) const fn new(entropy: u64) -> Self {
        Self(entropy)
    }

    /// A number below `bound`, evenly; 0 when `bound` is 0.
    ///
    /// A number of its own for each purpose, then the high half of a product.
    pub(crate) fn below(self, purpose: Purpose, bound: u64) -> u64 {
        let salt = match purpose {
            Purpose::Endpoint => 1,
            Purpose::WaypointEndpoint => 2,
            Purpose::Waypoint => 3,
            Purpose::Address => 4,
            Purpose::Gateway => 5,
        };
        let product = u128::from(splitmix::nth(self.0, salt)) * u128::from(bound);
        u64::try_from(product >> 64).unwrap_or(0)
    }

    /// One of `items`, evenly.
    pub(crate) fn pick<T>(self, purpose: Purpose, items: &[T]) -> Option<&T> {
        let index = self.below(purpose, u64::try_from(items.len()).unwrap_or(u64::MAX));
        items.get(usize::try_from(index).unwrap_or(0))
    }

    /// The index of one of `weights`, in proportion; none when all are 0.
    pub(crate) fn weighted(
        self,
        purpose: Purpose,
        weights: impl Iterator<Item = u32> + Clone,
    ) -> Option<usize> {
        let total = weights.clone().map(u64::from).sum();
        let mut left = self.below(purpose, total);
        for (index, weight) in weights.map(u64::from).enumerate() {
            if left < weight {
                return Some(index);
            }
            left -= weight;
        }
        None
    }
}

/// Who asks for an endpoint, and for what.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted<'a> {
    pub(crate) source: &'a Workload,
    /// The address dialled: an endpoint that has it is dialled there, others by the same family if possible.
    pub(crate) dialled: IpAddr,
    /// Port of the service.
    pub(crate) port: u16,
    pub(crate) purpose: Purpose,
    pub(crate) dice: Dice,
}

/// An endpoint chosen.
#[derive(Clone, Debug)]
pub(crate) struct Choice {
    pub(crate) workload: Arc<Workload>,
    pub(crate) port: ServicePort,
    /// None: its host name is to be resolved, or it is reached through the gateway of its network.
    pub(crate) address: Option<IpAddr>,
}

/// Why no endpoint was chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum NoChoice {
    NoSuchPort,
    NoEndpoint,
    /// There are some, all on other networks that no gateway leads to; one of those.
    OtherNetwork(NetworkId),
}

struct Candidate<'i> {
    workload: &'i Arc<Workload>,
    port: ServicePort,
    address: Option<IpAddr>,
    rank: (bool, usize),
}

impl Candidate<'_> {
    fn choice(&self) -> Choice {
        let Self { workload, port, address, .. } = self;
        Choice { workload: Arc::clone(workload), port: *port, address: *address }
    }
}

/// The endpoints of a service that are equally near, and what is known of the others.
struct Best<'i> {
    candidates: Vec<Candidate<'i>>,
    other_network: Option<NetworkId>,
    port_known: bool,
}

/// The endpoints of `service` among which one is chosen: the nearest usable ones, in the order of their keys.
fn best<'i>(
    index: &'i WorkloadIndex,
    service: &Service,
    wanted: &Wanted<'_>,
    trace: &mut Trace,
) -> Best<'i> {
    let mut best: Vec<Candidate<'_>> = Vec::new();
    let mut other_network = None;
    let mut port_known = service.ports.iter().any(|port| port.service_port == wanted.port);
    for workload in index.endpoints(&service.key) {
        match candidate(service, workload, wanted) {
            Ok(candidate) => {
                let rank = best.first().map(|one| one.rank);
                if rank.is_none_or(|rank| candidate.rank > rank) {
                    best.clear();
                }
                if rank.is_none_or(|rank| candidate.rank >= rank) {
                    best.push(candidate);
                }
            }
            Err(because) => {
                trace.record(|| Step::EndpointPassedOver {
                    workload: workload.uid.clone(),
                    because,
                });
                if because == PassedOver::OtherNetwork && other_network.is_none() {
                    other_network = Some(workload.network.clone());
                }
                port_known |= because != PassedOver::NoSuchPort
                    && target_port(service, workload, wanted.port).is_some();
            }
        }
    }
    Best { candidates: best, other_network, port_known }
}

/// Chooses an endpoint of `service`, at random among the best by capacity.
pub(crate) fn choose(
    index: &WorkloadIndex,
    service: &Service,
    wanted: &Wanted<'_>,
    trace: &mut Trace,
) -> Result<Choice, NoChoice> {
    let Best { candidates: best, other_network, port_known } = best(index, service, wanted, trace);
    let weights = best.iter().map(|candidate| candidate.workload.capacity);
    let chosen = wanted.dice.weighted(wanted.purpose, weights).and_then(|index| best.get(index));
    match (chosen, other_network) {
        (Some(chosen), _) => {
            trace.record(|| Step::EndpointChosen {
                workload: chosen.workload.uid.clone(),
                among: best.len(),
                port: chosen.port,
                address: chosen.address,
            });
            Ok(chosen.choice())
        }
        (None, Some(network)) => Err(NoChoice::OtherNetwork(network)),
        (None, None) if !port_known => Err(NoChoice::NoSuchPort),
        (None, None) => Err(NoChoice::NoEndpoint),
    }
}

/// All that [`choose`] may give, each with the same chance; none when the chances differ, or when there is none.
pub(crate) fn equal_choices(
    index: &WorkloadIndex,
    service: &Service,
    wanted: &Wanted<'_>,
) -> Option<Vec<Choice>> {
    let Best { candidates, .. } = best(index, service, wanted, &mut Trace::off());
    let capacity = candidates.first()?.workload.capacity;
    let are_equal = candidates.iter().all(|one| one.workload.capacity == capacity);
    are_equal.then(|| candidates.iter().map(Candidate::choice).collect())
}

/// Where somebody who dials a service without the mesh may be led: its ready endpoints on the client's network, in the
/// order of their keys, and the address of each.
#[must_use]
pub fn endpoints_at(
    index: &WorkloadIndex,
    service: &Service,
    source: &Workload,
    dialled: SocketAddr,
) -> Vec<(Arc<Workload>, SocketAddr)> {
    let at = |workload: &Arc<Workload>| {
        let near = workload.network == source.network && rank(service, workload, source).is_some();
        let ip = address(workload, service.ip_families, dialled.ip()).filter(|_| near)?;
        let port = target_port(service, workload, dialled.port())?;
        Some((Arc::clone(workload), SocketAddr::new(ip, port)))
    };
    index.endpoints(&service.key).filter(|one| is_usable(service, one)).filter_map(at).collect()
}

fn is_usable(service: &Service, workload: &Workload) -> bool {
    match (workload.status, service.load_balancing.health_policy) {
        (HealthStatus::Healthy, _) | (_, HealthPolicy::AllowAll) => true,
        (HealthStatus::Unhealthy, HealthPolicy::OnlyHealthy) => false,
    }
}

fn candidate<'i>(
    service: &Service,
    workload: &'i Arc<Workload>,
    wanted: &Wanted<'_>,
) -> Result<Candidate<'i>, PassedOver> {
    if !is_usable(service, workload) {
        return Err(PassedOver::Unhealthy);
    }
    if workload.capacity == 0 {
        return Err(PassedOver::NoCapacity);
    }
    let target_port = target_port(service, workload, wanted.port).ok_or(PassedOver::NoSuchPort)?;
    let remote = workload.network != wanted.source.network;
    let address = match wanted.purpose {
        Purpose::Endpoint if remote => {
            if workload.network_gateway.is_none() || !speaks_hbone(workload) {
                return Err(PassedOver::OtherNetwork);
            }
            None
        }
        Purpose::WaypointEndpoint | Purpose::Waypoint | Purpose::Address if remote => {
            return Err(PassedOver::OtherNetwork);
        }
        // A gateway's address is one that other networks reach.
        Purpose::Endpoint
        | Purpose::WaypointEndpoint
        | Purpose::Waypoint
        | Purpose::Address
        | Purpose::Gateway => {
            let address = address(workload, service.ip_families, wanted.dialled);
            if address.is_none() && workload.hostname.is_empty() {
                return Err(PassedOver::NoAddress);
            }
            address
        }
    };
    let rank = rank(service, workload, wanted.source).ok_or(PassedOver::OutOfScope)?;
    let port = ServicePort { service_port: wanted.port, target_port };
    Ok(Candidate { workload, port, address, rank })
}

/// The endpoint's port for a port of the service: the endpoint's own mapping, else the service's, else the port itself for
/// an endpoint whose application tunnel has a port of its own.
pub(crate) fn target_port(service: &Service, workload: &Workload, port: u16) -> Option<u16> {
    let mapped = |ports: &[ServicePort]| {
        ports
            .iter()
            .find(|one| one.service_port == port && one.target_port != 0)
            .map(|one| one.target_port)
    };
    let own = workload.services.get(&service.key);
    own.and_then(|ports| mapped(ports)).or_else(|| mapped(&service.ports)).or_else(|| {
        let tunnel = workload.application_tunnel.as_ref()?;
        tunnel.port.map(|_| port)
    })
}

/// The address to dial a workload at: the one dialled if it is the workload's, else one of the family dialled, else of the
/// other, as far as `families` allow.
pub(crate) fn address(
    workload: &Workload,
    families: IpFamilies,
    dialled: IpAddr,
) -> Option<IpAddr> {
    let usable = || workload.addresses.iter().copied().filter(|ip| allows(families, *ip));
    usable()
        .find(|ip| *ip == dialled)
        .or_else(|| usable().find(|ip| ip.is_ipv4() == dialled.is_ipv4()))
        .or_else(|| usable().next())
}

/// True when a service of these families may be reached at `ip`.
pub(crate) const fn allows(families: IpFamilies, ip: IpAddr) -> bool {
    match families {
        IpFamilies::Automatic | IpFamilies::Dual => true,
        IpFamilies::Ipv4Only => ip.is_ipv4(),
        IpFamilies::Ipv6Only => ip.is_ipv6(),
    }
}

/// A workload on the host's network is never tunnelled to, since port 15008 of a node is nobody's, unless it says that it
/// listens there itself.
pub(crate) fn speaks_hbone(workload: &Workload) -> bool {
    match (workload.tunnel_protocol, workload.network_mode) {
        (TunnelProtocol::Hbone, NetworkMode::Standard) => true,
        (TunnelProtocol::Hbone, NetworkMode::HostNetwork) => workload.native_tunnel,
        (TunnelProtocol::None, _) => false,
    }
}

/// How near an endpoint is; higher is nearer. None: too far.
fn rank(service: &Service, workload: &Workload, source: &Workload) -> Option<(bool, usize)> {
    let scopes = service.load_balancing.routing_preference.as_slice();
    let matches = |scope: &Scope| shares(*scope, workload, source);
    match service.load_balancing.mode {
        LoadBalancingMode::Standard | LoadBalancingMode::Passthrough => Some((false, 0)),
        LoadBalancingMode::Strict => scopes.iter().all(matches).then_some((false, 0)),
        // Being on the same network outranks all that follows it, and failing it does not end the comparison.
        LoadBalancingMode::Failover => Some(match scopes.split_first() {
            Some((Scope::Network, rest)) => {
                (matches(&Scope::Network), rest.iter().take_while(|scope| matches(scope)).count())
            }
            Some(_) | None => (false, scopes.iter().take_while(|scope| matches(scope)).count()),
        }),
    }
}

fn shares(scope: Scope, one: &Workload, other: &Workload) -> bool {
    match scope {
        Scope::Network => one.network == other.network,
        Scope::Region => one.locality.region == other.locality.region,
        Scope::Zone => one.locality.zone == other.locality.zone,
        Scope::Subzone => one.locality.subzone == other.locality.subzone,
        // Two workloads of unknown node are not on one node.
        Scope::Node => one.node == other.node && !one.node.is_empty(),
        Scope::Cluster => one.cluster_id == other.cluster_id,
    }
}

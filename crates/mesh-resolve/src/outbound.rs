//! Where a connection that the pod opens goes.
//!
//! ```text
//! dialled address ─┬─ this pod's own ──────────────────────────────► passthrough
//!                  ├─ service ─┬─ waypoint bound ──────────────────► waypoint
//!                  │           ├─ keeps the destination ───────────► passthrough
//!                  │           └─ endpoint ─────┐
//!                  ├─ workload ─┬─ endpoint of a service at the same address ─┐
//!                  │            ├─ waypoint bound ─────────────────► waypoint │◄──┘
//!                  │            └─────────────► other network? ─┬─► tunnel in the tunnel to its gateway
//!                  │                          speaks HBONE? ─┬───► tunnel
//!                  │                                           └───► passthrough, known
//!                  └─ nothing ─────────────────────────────────────► passthrough, unknown; IPv6 link-local: refused
//! ```
//! Source: ztunnel's `build_request`, with these differences. A bound waypoint is required unless settings say otherwise;
//! a waypoint never goes through itself for services either; an unavailable weighted waypoint is replaced by another; a
//! service that keeps the destination does not hide a workload with that very address; nor does a service's range.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use mesh_model::{
    Flow, GatewayAddress, IpFamilies, LoadBalancingMode, Revision, Service, ServicePort, Workload,
    ports,
};

use crate::authority::Authority;
use crate::balance::{
    Choice, Dice, NoChoice, Purpose, Wanted, choose, equal_choices, speaks_hbone,
};
use crate::gateway;
use crate::index::WorkloadIndex;
use crate::lookup::Addressed;
use crate::pending::PendingDns;
use crate::route::{ResolvedFlow, Route, TunnelRoute};
use crate::settings::{ResolveSettings, WaypointEnforcement};
use crate::spread::{NotSpread, Spread};
use crate::trace::{Step, Trace};
use crate::unroutable::Unroutable;
use crate::waypoint::{self, Found, NotFound, alternative_names};

/// Where a connection that `source` opened goes. `entropy` decides between equally good endpoints and waypoints.
///
/// # Errors
/// Why it goes nowhere. [`Unroutable::NeedsDns`] asks for a lookup and goes on from there.
pub fn resolve(
    index: &WorkloadIndex,
    settings: &ResolveSettings,
    flow: &Flow,
    source: &Arc<Workload>,
    entropy: u64,
) -> Result<ResolvedFlow, Unroutable> {
    resolve_traced(index, settings, flow, source, entropy, &mut Trace::off())
}

/// As [`resolve`], with its steps.
///
/// # Errors
/// As [`resolve`].
pub fn resolve_traced(
    index: &WorkloadIndex,
    settings: &ResolveSettings,
    flow: &Flow,
    source: &Arc<Workload>,
    entropy: u64,
    trace: &mut Trace,
) -> Result<ResolvedFlow, Unroutable> {
    let outcome = Outbound { index, settings, flow, source, entropy, trace }.route();
    if let Err(unroutable) = &outcome {
        trace.record(|| Step::Refused {
            reason: unroutable.close_reason(),
            because: unroutable.to_string().into(),
        });
    }
    outcome
}

/// As [`resolve_spread`](crate::resolve_spread).
pub(crate) fn spread(
    index: &WorkloadIndex,
    settings: &ResolveSettings,
    flow: &Flow,
    source: &Arc<Workload>,
) -> Result<Spread, NotSpread> {
    // Nothing is drawn: what depends on entropy is no spread.
    let entropy = 0;
    Outbound { index, settings, flow, source, entropy, trace: &mut Trace::off() }.spread()
}

struct Outbound<'a> {
    index: &'a WorkloadIndex,
    settings: &'a ResolveSettings,
    flow: &'a Flow,
    source: &'a Arc<Workload>,
    entropy: u64,
    trace: &'a mut Trace,
}

impl<'a> Outbound<'a> {
    fn route(mut self) -> Result<ResolvedFlow, Unroutable> {
        let dialled = self.flow.orig_dst.addr();
        let source = self.source;
        self.trace.record(|| Step::Dialled { source: source.uid.clone(), destination: dialled });
        let here = is_this_host(dialled.ip());
        if here || source.addresses.contains(&dialled.ip()) {
            self.trace.record(|| Step::IsSelf);
            if ports::is_agent_port(dialled.port()) {
                return Err(Unroutable::AgentPort { destination: dialled });
            }
        }
        if here {
            return Ok(self.passthrough(true, None));
        }
        match self.index.find_address(&source.network, dialled.ip(), &source.namespace) {
            Some(Addressed::Service(service)) => self.service(&service),
            Some(Addressed::Workload(workload)) => self.workload(workload),
            None => {
                self.trace.record(|| Step::IsUnknown);
                if is_link_local_v6(dialled.ip()) {
                    return Err(Unroutable::LinkLocal { destination: dialled });
                }
                Ok(self.passthrough(false, None))
            }
        }
    }

    /// Takes the way of [`route`](Self::route) to a service and all of its endpoints at once.
    fn spread(mut self) -> Result<Spread, NotSpread> {
        let dialled = self.flow.orig_dst.addr();
        let source = self.source;
        if is_this_host(dialled.ip()) || source.addresses.contains(&dialled.ip()) {
            return Err(NotSpread::NoService);
        }
        let found = self.index.find_address(&source.network, dialled.ip(), &source.namespace);
        let Some(Addressed::Service(service)) = found else { return Err(NotSpread::NoService) };
        if waypoint::bound_to(&service).next().is_some() {
            return Err(NotSpread::Waypoint);
        }
        if keeps_destination(&service) {
            return Err(NotSpread::KeepsDestination);
        }
        let wanted = self.wanted(dialled.port());
        let choices =
            equal_choices(self.index, &service, &wanted).ok_or(NotSpread::NoEqualEndpoints)?;
        let endpoints = choices.into_iter().map(|choice| {
            if choice.workload.network != source.network {
                return Err(NotSpread::OtherNetwork);
            }
            let leg = Leg { choice, families: service.ip_families, hop: Hop::Endpoint };
            self.walk(leg, Some(&service))
                .map_err(|unroutable| NotSpread::Unroutable(unroutable.to_string().into()))
        });
        let endpoints = endpoints.collect::<Result<_, _>>()?;
        Ok(Spread { service, endpoints })
    }

    fn service(&mut self, service: &Arc<Service>) -> Result<ResolvedFlow, Unroutable> {
        self.trace.record(|| Step::IsService { service: service.key.clone() });
        let gateways = waypoint::of_service(service, Dice::new(self.entropy));
        if let Some(leg) = self.through_waypoint(&gateways, &service.key.to_string())? {
            return self.walk(leg, Some(service));
        }
        if keeps_destination(service) {
            self.trace.record(|| Step::KeepsDestination { service: service.key.clone() });
            let port = self.flow.orig_dst.port();
            let declared = service.ports.is_empty()
                || service.ports.iter().any(|one| one.service_port == port);
            return Ok(self.passthrough(declared, Some(Arc::clone(service))));
        }
        let choice = self.choose(service)?;
        self.walk(Leg { choice, families: service.ip_families, hop: Hop::Endpoint }, Some(service))
    }

    /// Traffic to a workload's own address. A service of its namespace may have that address too (a ServiceEntry whose address
    /// is its endpoint's); then the endpoint is chosen, and the waypoint that counts is the workload's. One of another
    /// namespace would lead traffic away from a workload it has no say in.
    fn workload(&mut self, workload: Arc<Workload>) -> Result<ResolvedFlow, Unroutable> {
        self.trace.record(|| Step::IsWorkload { workload: workload.uid.clone() });
        let dialled = self.flow.orig_dst.addr();
        let source = self.source;
        let service = self
            .index
            .find_service_by_vip(&source.network, dialled.ip(), &source.namespace)
            .filter(|service| service.key.namespace == workload.namespace)
            .filter(|service| !keeps_destination(service));
        let (choice, families) = match &service {
            Some(service) => {
                self.trace.record(|| Step::IsService { service: service.key.clone() });
                (self.choose(service)?, service.ip_families)
            }
            None => {
                let port =
                    ServicePort { service_port: dialled.port(), target_port: dialled.port() };
                (Choice { workload, port, address: Some(dialled.ip()) }, IpFamilies::Automatic)
            }
        };
        let gateways: Vec<_> = choice.workload.waypoint.iter().collect();
        let leg = self
            .through_waypoint(&gateways, choice.workload.uid.as_str())?
            .unwrap_or_else(|| Leg { choice: choice.clone(), families, hop: Hop::Endpoint });
        self.walk(leg, service.as_ref())
    }

    /// The first of `gateways` that can be used. None: none is bound, or the flow goes on without.
    fn through_waypoint(
        &mut self,
        gateways: &[&GatewayAddress],
        bound_to: &str,
    ) -> Result<Option<Leg>, Unroutable> {
        let preferred = match self.settings.waypoints {
            WaypointEnforcement::Required => false,
            WaypointEnforcement::Preferred => true,
        };
        let mut failure = None;
        for gateway in gateways {
            let name = waypoint::name(gateway);
            self.trace.record(|| Step::WaypointBound {
                waypoint: Arc::clone(&name),
                bound_to: bound_to.into(),
            });
            if waypoint::is_part_of(self.index, gateway, self.source) {
                self.trace.record(|| Step::SourceIsWaypoint);
                return Ok(None);
            }
            let wanted = self.wanted(gateway.hbone_port);
            let not_found = match waypoint::find(self.index, gateway, &wanted, self.trace) {
                Ok(Found { choice, service, families }) => {
                    return Ok(Some(Leg {
                        choice,
                        families,
                        hop: Hop::Waypoint { name, service },
                    }));
                }
                Err(not_found) => not_found,
            };
            self.trace
                .record(|| Step::WaypointUnavailable { waypoint: Arc::clone(&name), preferred });
            failure.get_or_insert_with(|| match not_found {
                NotFound::OtherNetwork(network) => {
                    Unroutable::OtherNetwork { destination: name, network }
                }
                NotFound::Unavailable => {
                    Unroutable::WaypointUnavailable { waypoint: name, bound_to: bound_to.into() }
                }
            });
        }
        match failure {
            Some(failure) if !preferred => Err(failure),
            Some(_) | None => Ok(None),
        }
    }

    fn choose(&mut self, service: &Service) -> Result<Choice, Unroutable> {
        let port = self.flow.orig_dst.port();
        let wanted = self.wanted(port);
        choose(self.index, service, &wanted, self.trace).map_err(|no_choice| {
            let service = service.key.clone();
            match no_choice {
                NoChoice::NoSuchPort => Unroutable::NoSuchPort { service, port },
                NoChoice::NoEndpoint => Unroutable::NoEndpoint { service },
                NoChoice::OtherNetwork(network) => {
                    Unroutable::OtherNetwork { destination: service.to_string().into(), network }
                }
            }
        })
    }

    fn wanted(&self, port: u16) -> Wanted<'a> {
        Wanted {
            source: self.source,
            dialled: self.flow.orig_dst.ip(),
            port,
            purpose: Purpose::Endpoint,
            dice: Dice::new(self.entropy),
        }
    }

    fn passthrough(&mut self, known: bool, service: Option<Arc<Service>>) -> ResolvedFlow {
        let target = self.flow.orig_dst.addr();
        self.trace.record(|| Step::ToPassthrough { target, known });
        ResolvedFlow {
            flow: self.flow.clone(),
            local: Arc::clone(self.source),
            peer: None,
            service,
            route: Route::Passthrough { target, known },
            revision: self.index.revision(),
        }
    }

    fn walk(
        &mut self,
        leg: Leg,
        service: Option<&Arc<Service>>,
    ) -> Result<ResolvedFlow, Unroutable> {
        if leg.choice.workload.network != self.source.network {
            return self.through_gateway(leg.choice.workload, service);
        }
        let ending = Ending {
            flow: self.flow.clone(),
            source: Arc::clone(self.source),
            workload: leg.choice.workload,
            target_port: leg.choice.port.target_port,
            hop: leg.hop,
            service: service.cloned(),
            revision: self.index.revision(),
        };
        match leg.choice.address {
            Some(ip) => ending.at(ip, self.trace),
            None => Err(Unroutable::NeedsDns(Box::new(PendingDns {
                ending,
                families: leg.families,
                entropy: self.entropy,
            }))),
        }
    }
}

impl Outbound<'_> {
    /// An endpoint on another network: a tunnel to any endpoint of the service there, inside the tunnel to its gateway.
    ///
    /// Both CONNECTs ask for the service by name, since addresses mean nothing across networks. Source: wire.md §1.10.
    fn through_gateway(
        &mut self,
        workload: Arc<Workload>,
        service: Option<&Arc<Service>>,
    ) -> Result<ResolvedFlow, Unroutable> {
        let destination =
            service.map_or_else(|| workload.uid.to_string(), |service| service.key.to_string());
        let unavailable = || Unroutable::OtherNetwork {
            destination: destination.as_str().into(),
            network: workload.network.clone(),
        };
        let port = self.flow.orig_dst.port();
        let service = service.ok_or_else(unavailable)?;
        // A wildcard name is nothing that can be asked for.
        let authority: Authority =
            format!("{}:{port}", service.key.hostname).parse().map_err(|_invalid| unavailable())?;
        let address = workload.network_gateway.as_ref().ok_or_else(unavailable)?;
        let wanted = self.wanted(port);
        let (choice, gateway_service) =
            gateway::find(self.index, address, &wanted, self.trace).ok_or_else(unavailable)?;
        let ip = choice.address.ok_or_else(unavailable)?;
        let next_hop = SocketAddr::new(ip, choice.port.target_port);
        let identity = |workload: &Workload| {
            let uid = workload.uid.clone();
            workload.identity().map_err(|source| Unroutable::InvalidIdentity { uid, source })
        };
        let mut gateways: BTreeSet<_> =
            gateway_service.iter().flat_map(|service| alternative_names(service)).collect();
        gateways.insert(identity(&choice.workload)?);
        let outer = TunnelRoute {
            next_hop,
            authority: authority.clone(),
            expected: gateways.into_iter().collect(),
            target_uid: choice.workload.uid.clone(),
            gateway: None,
        };
        let expected: Vec<_> =
            gateway::expected(self.index, service, &workload).into_iter().collect();
        if expected.is_empty() {
            return Err(Unroutable::NobodyExpected { service: service.key.clone() });
        }
        self.trace.record(|| Step::ThroughGateway {
            network: workload.network.clone(),
            next_hop,
            expected: outer.expected.iter().map(|id| id.as_str().into()).collect(),
        });
        let route = Route::Tunnel(TunnelRoute {
            next_hop,
            authority,
            expected,
            target_uid: workload.uid.clone(),
            gateway: Some(Box::new(outer)),
        });
        self.trace.record(|| step(&route));
        Ok(ResolvedFlow {
            flow: self.flow.clone(),
            local: Arc::clone(self.source),
            peer: Some(workload),
            service: Some(Arc::clone(service)),
            route,
            revision: self.index.revision(),
        })
    }
}

/// A workload to go to, and as what.
struct Leg {
    choice: Choice,
    families: IpFamilies,
    hop: Hop,
}

/// As what a workload is gone to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Hop {
    /// As the destination.
    Endpoint,
    /// As a waypoint, of this name and service.
    Waypoint { name: Arc<str>, service: Option<Arc<Service>> },
}

/// All of an outbound decision but the next hop's address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Ending {
    pub(crate) flow: Flow,
    pub(crate) source: Arc<Workload>,
    pub(crate) workload: Arc<Workload>,
    pub(crate) target_port: u16,
    pub(crate) hop: Hop,
    pub(crate) service: Option<Arc<Service>>,
    pub(crate) revision: Revision,
}

impl Ending {
    pub(crate) fn at(self, ip: IpAddr, trace: &mut Trace) -> Result<ResolvedFlow, Unroutable> {
        let target = SocketAddr::new(ip, self.target_port);
        let route = match &self.hop {
            Hop::Waypoint { name, service } => {
                let authority = Authority::Address(self.flow.orig_dst.addr());
                let tunnel = self.tunnel(target, authority, service.as_deref())?;
                Route::ViaWaypoint { tunnel, waypoint: Arc::clone(name) }
            }
            Hop::Endpoint if !speaks_hbone(&self.workload) => {
                Route::Passthrough { target, known: true }
            }
            // It speaks HBONE itself, under its own identity.
            Hop::Endpoint if target.port() == ports::HBONE && self.source.native_tunnel => {
                Route::Passthrough { target, known: true }
            }
            Hop::Endpoint if ports::is_agent_port(target.port()) => {
                return Err(Unroutable::AgentPort { destination: target });
            }
            Hop::Endpoint => {
                let next_hop = SocketAddr::new(ip, ports::HBONE);
                let authority = Authority::Address(target);
                Route::Tunnel(self.tunnel(next_hop, authority, self.service.as_deref())?)
            }
        };
        trace.record(|| step(&route));
        Ok(ResolvedFlow {
            flow: self.flow,
            local: self.source,
            peer: Some(self.workload),
            service: self.service,
            route,
            revision: self.revision,
        })
    }

    fn tunnel(
        &self,
        next_hop: SocketAddr,
        authority: Authority,
        service: Option<&Service>,
    ) -> Result<TunnelRoute, Unroutable> {
        let uid = &self.workload.uid;
        let own = self
            .workload
            .identity()
            .map_err(|source| Unroutable::InvalidIdentity { uid: uid.clone(), source })?;
        let mut expected: BTreeSet<_> = service.into_iter().flat_map(alternative_names).collect();
        expected.insert(own);
        Ok(TunnelRoute {
            next_hop,
            authority,
            expected: expected.into_iter().collect(),
            target_uid: uid.clone(),
            gateway: None,
        })
    }
}

fn step(route: &Route) -> Step {
    let texts = |tunnel: &TunnelRoute| {
        let expected = tunnel.expected.iter().map(|id| id.as_str().into()).collect();
        (tunnel.next_hop, tunnel.authority.to_string().into(), expected)
    };
    match route {
        Route::Tunnel(tunnel) => {
            let (next_hop, authority, expected) = texts(tunnel);
            Step::ToTunnel { next_hop, authority, expected }
        }
        Route::ViaWaypoint { tunnel, waypoint } => {
            let (next_hop, authority, expected) = texts(tunnel);
            Step::ToWaypoint { waypoint: Arc::clone(waypoint), next_hop, authority, expected }
        }
        Route::Passthrough { target, known } => {
            Step::ToPassthrough { target: *target, known: *known }
        }
        Route::Deliver { target, .. } => Step::ToApplication { target: *target },
    }
}

fn keeps_destination(service: &Service) -> bool {
    match service.load_balancing.mode {
        LoadBalancingMode::Passthrough => true,
        LoadBalancingMode::Standard | LoadBalancingMode::Strict | LoadBalancingMode::Failover => {
            false
        }
    }
}

/// Connecting to the unspecified address reaches the host itself on Linux.
const fn is_link_local_v6(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(_) => false,
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    }
}

fn is_this_host(ip: IpAddr) -> bool {
    ip.is_loopback() || ip.is_unspecified()
}

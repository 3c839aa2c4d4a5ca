//! Where a connection that reaches the pod goes: to the pod's own application, or nowhere.
//!
//! Source: ztunnel's inbound checks, with these differences. A host name must be a service of which the pod is an
//! endpoint, an authority with another address must be something that the pod is a waypoint of (also by weight), even for
//! an application tunnel, and a waypoint bound to what is reached is required unless settings say otherwise.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use mesh_model::{ApplicationTunnelProtocol, Flow, Service, Workload, ports};

use crate::authority::Authority;
use crate::balance::target_port;
use crate::index::WorkloadIndex;
use crate::lookup::Addressed;
use crate::route::{RequiredWaypoint, ResolvedFlow, Route};
use crate::settings::{ResolveSettings, WaypointEnforcement};
use crate::trace::{Step, Trace};
use crate::unroutable::Unroutable;
use crate::waypoint;

/// Where a connection that reached `local` goes. `authority` is what the CONNECT asked for; none for plaintext.
///
/// The route is always [`Route::Deliver`], at the address where the pod was reached (`flow.orig_dst`), whatever the
/// authority says; only the port comes from there.
///
/// # Errors
/// Why it goes nowhere: an agent port, a service without that port, or somebody else's address or service.
pub fn resolve_inbound(
    index: &WorkloadIndex,
    settings: &ResolveSettings,
    flow: &Flow,
    local: &Arc<Workload>,
    authority: Option<&Authority>,
) -> Result<ResolvedFlow, Unroutable> {
    resolve_inbound_traced(index, settings, flow, local, authority, &mut Trace::off())
}

/// As [`resolve_inbound`], with its steps.
///
/// # Errors
/// As [`resolve_inbound`].
pub fn resolve_inbound_traced(
    index: &WorkloadIndex,
    settings: &ResolveSettings,
    flow: &Flow,
    local: &Arc<Workload>,
    authority: Option<&Authority>,
    trace: &mut Trace,
) -> Result<ResolvedFlow, Unroutable> {
    let outcome = Inbound { index, settings, flow, local, trace }.route(authority);
    if let Err(unroutable) = &outcome {
        trace.record(|| Step::Refused {
            reason: unroutable.close_reason(),
            because: unroutable.to_string().into(),
        });
    }
    outcome
}

struct Inbound<'a> {
    index: &'a WorkloadIndex,
    settings: &'a ResolveSettings,
    flow: &'a Flow,
    local: &'a Arc<Workload>,
    trace: &'a mut Trace,
}

/// What a CONNECT asked for, found to be ours.
struct Asked {
    /// The port of the pod.
    port: u16,
    /// The service asked for by name.
    service: Option<Arc<Service>>,
    /// What a PROXY header says was asked for.
    destination: SocketAddr,
}

impl Inbound<'_> {
    fn route(mut self, authority: Option<&Authority>) -> Result<ResolvedFlow, Unroutable> {
        let reached = self.flow.orig_dst.addr();
        let asked = match authority {
            Some(authority) => self.asked(authority)?,
            None => Asked { port: reached.port(), service: None, destination: reached },
        };
        self.refuse_agent_port(asked.port)?;
        let tunnel = match authority {
            Some(_) => self.local.application_tunnel.as_ref(),
            None => None,
        };
        let port = tunnel.and_then(|tunnel| tunnel.port).unwrap_or(asked.port);
        self.refuse_agent_port(port)?;
        let target = SocketAddr::new(reached.ip(), port);
        let dial = match tunnel {
            Some(_) if self.settings.localhost_application_tunnel => loopback(target),
            Some(_) | None => target,
        };
        let proxy_header = match tunnel.map(|tunnel| tunnel.protocol) {
            Some(ApplicationTunnelProtocol::Proxy) => Some(asked.destination),
            Some(ApplicationTunnelProtocol::None) | None => None,
        };
        if tunnel.is_some() {
            let proxy_header = proxy_header.is_some();
            self.trace.record(|| Step::ApplicationTunnel { dial, proxy_header });
        }
        let waypoint = self.required_waypoint(asked.port);
        self.trace.record(|| Step::ToApplication { target });
        let client = self.index.workload_by_ip(&self.local.network, self.flow.client.ip());
        Ok(ResolvedFlow {
            flow: self.flow.clone(),
            local: Arc::clone(self.local),
            peer: client.cloned(),
            service: asked.service.or_else(|| self.only_service(port)),
            route: Route::Deliver { target, dial, proxy_header, waypoint },
            revision: self.index.revision(),
        })
    }

    fn asked(&mut self, authority: &Authority) -> Result<Asked, Unroutable> {
        let local = self.local;
        self.trace.record(|| Step::Asked {
            authority: authority.to_string().into(),
            local: local.uid.clone(),
        });
        match authority {
            Authority::Address(address) => {
                if address.ip() != self.flow.orig_dst.ip() && !self.is_foreign_accepted() {
                    let through =
                        self.fronted(address.ip()).ok_or_else(|| self.not_ours(authority))?;
                    self.trace.record(|| Step::IsOurs { through });
                } else {
                    self.trace.record(|| Step::IsOurs { through: None });
                }
                Ok(Asked { port: address.port(), service: None, destination: *address })
            }
            Authority::Hostname { host, port } => {
                let service = self.own_service(host).ok_or_else(|| self.not_ours(authority))?;
                self.trace.record(|| Step::IsOurs { through: Some(service.key.clone()) });
                let target = target_port(&service, local, *port).ok_or_else(|| {
                    Unroutable::NoSuchPort { service: service.key.clone(), port: *port }
                })?;
                let destination = SocketAddr::new(self.virtual_address(&service), *port);
                Ok(Asked { port: target, service: Some(service), destination })
            }
        }
    }

    fn refuse_agent_port(&self, port: u16) -> Result<(), Unroutable> {
        if ports::is_agent_port(port) {
            let destination = SocketAddr::new(self.flow.orig_dst.ip(), port);
            return Err(Unroutable::AgentPort { destination });
        }
        Ok(())
    }

    fn not_ours(&self, authority: &Authority) -> Unroutable {
        Unroutable::NotOurs { authority: authority.clone(), local: self.local.uid.clone() }
    }

    fn is_foreign_accepted(&self) -> bool {
        self.settings.accept_foreign_authority && self.local.application_tunnel.is_some()
    }

    /// The service of this name that `local` is an endpoint of, one of its own namespace before others.
    fn own_service(&self, host: &Arc<str>) -> Option<Arc<Service>> {
        let namespace = &self.local.namespace;
        self.index
            .services_by_hostname(host)
            .filter(|service| {
                self.settings.accept_foreign_authority
                    || self.local.services.contains_key(&service.key)
            })
            .min_by_key(|service| (service.key.namespace != *namespace, !service.canonical))
            .cloned()
    }

    /// How `ip` is something that `local` is the waypoint of. Some(None): by the workload's own waypoint.
    fn fronted(&self, ip: IpAddr) -> Option<Option<mesh_model::NamespacedHostname>> {
        let local = self.local;
        match self.index.find_address(&local.network, ip, &local.namespace)? {
            Addressed::Service(service) => waypoint::bound_to(&service)
                .any(|gateway| waypoint::is_part_of(self.index, gateway, local))
                .then(|| Some(service.key.clone())),
            Addressed::Workload(workload) => workload
                .waypoint
                .as_ref()
                .is_some_and(|gateway| waypoint::is_part_of(self.index, gateway, local))
                .then_some(None),
        }
    }

    /// A virtual address of the service on the workload's network, IPv4 first; the address reached when it has none.
    fn virtual_address(&self, service: &Service) -> IpAddr {
        let own = service.vips.iter().filter(|vip| vip.network == self.local.network);
        own.map(|vip| vip.ip).min_by_key(IpAddr::is_ipv6).unwrap_or_else(|| self.flow.orig_dst.ip())
    }

    /// The services that lead to `port` of the workload.
    fn services_to(&self, port: u16) -> impl Iterator<Item = &Arc<Service>> {
        let local = self.local;
        local.services.iter().filter_map(move |(key, own)| {
            let service = self.index.service(key)?;
            let leads = |service_port| target_port(service, local, service_port) == Some(port);
            let candidates = own.iter().chain(&service.ports);
            candidates.map(|one| one.service_port).any(leads).then_some(service)
        })
    }

    /// The services that the workload is an endpoint of and of which nothing else is known: they may lead to any port.
    fn unknown_services(&self) -> impl Iterator<Item = Arc<str>> {
        let unknown = self.local.services.keys().filter(|key| self.index.service(key).is_none());
        unknown.map(|key| format!("that of service {key}").into())
    }

    /// The service that leads to `port`, if there is exactly one.
    fn only_service(&self, port: u16) -> Option<Arc<Service>> {
        let mut services = self.services_to(port);
        let only = services.next()?;
        services.next().is_none().then(|| Arc::clone(only))
    }

    /// The waypoint that every legitimate way to `port` of the workload leads through.
    ///
    /// A service without a waypoint is a way past the others: traffic to a service never takes the workload's own waypoint,
    /// and at this end both look alike. A port that services lead to, all of them through waypoints, may not be reached by the
    /// pod's address either: that is how a waypoint would be bypassed. A service of which nothing is known yet may have one.
    fn required_waypoint(&mut self, port: u16) -> Option<Arc<RequiredWaypoint>> {
        match self.settings.waypoints {
            WaypointEnforcement::Preferred => return None,
            WaypointEnforcement::Required => {}
        }
        let mut gateways: Vec<_> = self.local.waypoint.iter().collect();
        for service in self.services_to(port) {
            let before = gateways.len();
            gateways.extend(waypoint::bound_to(service));
            if gateways.len() == before {
                return None;
            }
        }
        if gateways.iter().any(|gateway| waypoint::is_part_of(self.index, gateway, self.local)) {
            return None;
        }
        let known = gateways.iter().map(|gateway| waypoint::name(gateway));
        let names: BTreeSet<_> = known.chain(self.unknown_services()).collect();
        if names.is_empty() {
            return None;
        }
        let mut identities = BTreeSet::new();
        for gateway in gateways {
            waypoint::collect_identities(self.index, gateway, &self.local.network, &mut identities);
        }
        let names: Vec<_> = names.into_iter().collect();
        self.trace.record(|| Step::WaypointRequired { waypoints: names.clone() });
        Some(Arc::new(RequiredWaypoint { names, identities: identities.into_iter().collect() }))
    }
}

fn loopback(target: SocketAddr) -> SocketAddr {
    let ip = match target.ip() {
        IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::LOCALHOST),
    };
    SocketAddr::new(ip, target.port())
}

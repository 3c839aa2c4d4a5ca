//! Routing over an index of any structure.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use arbitrary::{Result, Unstructured};
use mesh_authorize::{PolicySet, authorize_egress};
use mesh_model::{
    ApplicationTunnel, ApplicationTunnelProtocol, ClientAddr, Direction, Flow, FlowId,
    GatewayAddress, GatewayDestination, HealthPolicy, HealthStatus, IpFamilies, LoadBalancingMode,
    NamespacedHostname, NetworkAddress, NetworkId, NetworkMode, OrigDst, PodUid, Scope, Service,
    ServicePort, TunnelProtocol, Visibility, WeightedWaypoint, Workload, WorkloadUid, ports,
};
use mesh_resolve::{
    Authority, IndexDelta, ResolveSettings, ResolvedFlow, Route, Trace, Unroutable,
    WaypointEnforcement, WorkloadIndex, resolve_inbound, resolve_inbound_traced, resolve_spread,
    resolve_traced,
};

const HOSTS: [&str; 4] = ["cart.a.svc", "web.b.svc", "*.example.com", "db.a.svc"];
const PORTS: [u16; 6] = [80, 8080, 15008, 15001, 0, 443];

fn network(u: &mut Unstructured<'_>) -> Result<NetworkId> {
    Ok(NetworkId::new(u.choose(&["", "", "n2"])?))
}

fn ip(u: &mut Unstructured<'_>) -> Result<IpAddr> {
    let last = u.int_in_range(0..=5_u8)?;
    Ok(match u.int_in_range(0..=4)? {
        0..=2 => [10, 0, 0, last].into(),
        3 => [0xfd00, 0, 0, 0, 0, 0, 0, u16::from(last)].into(),
        _ => [0, 0, 0, 0, 0, 0xffff, 0x0a00, u16::from(last)].into(),
    })
}

fn key(u: &mut Unstructured<'_>) -> Result<NamespacedHostname> {
    Ok(NamespacedHostname::new(u.choose(&["a", "b"])?, u.choose(&HOSTS)?))
}

fn list<T>(
    u: &mut Unstructured<'_>,
    most: usize,
    mut one: impl FnMut(&mut Unstructured<'_>) -> Result<T>,
) -> Result<Vec<T>> {
    let count = u.int_in_range(0..=most)?;
    (0..count).map(|_| one(u)).collect()
}

fn optional<T>(
    u: &mut Unstructured<'_>,
    one: impl FnOnce(&mut Unstructured<'_>) -> Result<T>,
) -> Result<Option<T>> {
    if u.ratio(1, 4)? { one(u).map(Some) } else { Ok(None) }
}

fn gateway(u: &mut Unstructured<'_>) -> Result<GatewayAddress> {
    let destination = if u.arbitrary()? {
        GatewayDestination::Hostname(key(u)?)
    } else {
        GatewayDestination::Address(NetworkAddress::new(network(u)?, ip(u)?))
    };
    Ok(GatewayAddress { destination, hbone_port: *u.choose(&[15008, 80, 0])? })
}

fn service_ports(u: &mut Unstructured<'_>) -> Result<Vec<ServicePort>> {
    list(u, 3, |u| {
        Ok(ServicePort { service_port: *u.choose(&PORTS)?, target_port: *u.choose(&PORTS)? })
    })
}

fn workload(u: &mut Unstructured<'_>) -> Result<Workload> {
    let uid = format!("w{}", u.int_in_range(0..=5)?);
    let mut one = Workload::named(&uid, u.choose(&["a", "b"])?, &uid);
    one.addresses = list(u, 2, |u| Ok(ip(u)?.to_canonical()))?;
    one.hostname = (*u.choose(&["", "x.example.org"])?).into();
    one.network = network(u)?;
    one.service_account = (*u.choose(&["default", "x", "", "not/valid"])?).into();
    one.tunnel_protocol = *u.choose(&[TunnelProtocol::Hbone, TunnelProtocol::None])?;
    one.network_mode =
        *u.choose(&[NetworkMode::Standard, NetworkMode::Standard, NetworkMode::HostNetwork])?;
    one.network_gateway = optional(u, gateway)?;
    one.waypoint = optional(u, gateway)?;
    one.node = (*u.choose(&["", "node-a", "node-b"])?).into();
    one.native_tunnel = u.ratio(1, 8)?;
    one.application_tunnel = optional(u, |u| {
        let protocol =
            *u.choose(&[ApplicationTunnelProtocol::Proxy, ApplicationTunnelProtocol::None])?;
        Ok(ApplicationTunnel { protocol, port: optional(u, |u| u.choose(&PORTS).copied())? })
    })?;
    for _ in 0..u.int_in_range(0..=3)? {
        one.services.insert(key(u)?, service_ports(u)?);
    }
    one.status =
        *u.choose(&[HealthStatus::Healthy, HealthStatus::Healthy, HealthStatus::Unhealthy])?;
    one.capacity = *u.choose(&[1, 0, 7, u32::MAX])?;
    one.locality.region = (*u.choose(&["", "r1", "r2"])?).into();
    Ok(one)
}

fn service(u: &mut Unstructured<'_>) -> Result<Service> {
    let key = key(u)?;
    let mut one = Service::named(&key.namespace, &key.hostname, "s");
    one.vips = list(u, 2, |u| Ok(NetworkAddress::new(network(u)?, ip(u)?)))?;
    one.cidr_vips = list(u, 1, |u| {
        let prefix = u.choose(&["10.0.0.0/30", "0.0.0.0/0", "fd00::/120"])?;
        Ok((network(u)?, prefix.parse().expect("a prefix")))
    })?;
    one.ports = service_ports(u)?;
    one.waypoint = optional(u, gateway)?;
    one.weighted_waypoints = list(u, 2, |u| {
        Ok(WeightedWaypoint { destination: gateway(u)?, weight: *u.choose(&[0, 1, u32::MAX])? })
    })?;
    let scopes =
        [Scope::Network, Scope::Region, Scope::Zone, Scope::Subzone, Scope::Node, Scope::Cluster];
    one.load_balancing.routing_preference = list(u, 3, |u| u.choose(&scopes).copied())?;
    one.load_balancing.mode = *u.choose(&[
        LoadBalancingMode::Standard,
        LoadBalancingMode::Strict,
        LoadBalancingMode::Failover,
        LoadBalancingMode::Passthrough,
    ])?;
    one.load_balancing.health_policy =
        *u.choose(&[HealthPolicy::OnlyHealthy, HealthPolicy::AllowAll])?;
    one.ip_families = *u.choose(&[
        IpFamilies::Automatic,
        IpFamilies::Ipv4Only,
        IpFamilies::Ipv6Only,
        IpFamilies::Dual,
    ])?;
    one.canonical = u.arbitrary()?;
    one.visibility = *u.choose(&[Visibility::Public, Visibility::Public, Visibility::Namespace])?;
    one.subject_alt_names = list(u, 2, |u| {
        Ok((*u.choose(&["spiffe://cluster.local/ns/z/sa/z", "not an identity"])?).into())
    })?;
    Ok(one)
}

/// Where a flow goes is one answer: the same with a trace, never back into the agent, never to somebody else's address.
pub fn resolve(data: &[u8]) {
    let outcome = run(&mut Unstructured::new(data));
    assert!(
        outcome.is_ok() || data.len() < 1 << 16,
        "only an input that ends early is not used up"
    );
}

fn run(u: &mut Unstructured<'_>) -> Result<()> {
    let mut index = WorkloadIndex::default();
    let mut before = index.revision();
    for _ in 0..=u.int_in_range(0..=3)? {
        let removed =
            list(u, 2, |u| Ok(WorkloadUid::new(&format!("w{}", u.int_in_range(0..=5)?))))?;
        let delta = IndexDelta {
            workloads: list(u, 4, workload)?,
            removed_workloads: removed,
            services: list(u, 3, service)?,
            removed_services: list(u, 1, key)?,
        };
        let after = index.apply(delta);
        assert!(after >= before, "the revision went back");
        before = after;
    }
    let settings = ResolveSettings {
        waypoints: *u.choose(&[WaypointEnforcement::Required, WaypointEnforcement::Preferred])?,
        localhost_application_tunnel: u.arbitrary()?,
        accept_foreign_authority: u.ratio(1, 4)?,
    };
    let Some(local) = index.workloads().next().map(Arc::clone) else { return Ok(()) };
    for _ in 0..=u.int_in_range(0..=3)? {
        outbound(u, &index, &settings, &local)?;
        inbound(u, &index, &settings, &local)?;
    }
    clear(index);
    Ok(())
}

fn flow(u: &mut Unstructured<'_>, direction: Direction) -> Result<Flow> {
    thread_local! {
        static START: Instant = Instant::now();
    }
    Ok(Flow {
        id: FlowId(1),
        direction,
        client: ClientAddr::new((ip(u)?, 4000).into()),
        orig_dst: OrigDst::new((ip(u)?, *u.choose(&PORTS)?).into()),
        pod: PodUid::new("p"),
        accepted_at: START.with(|start| *start),
    })
}

fn outbound(
    u: &mut Unstructured<'_>,
    index: &WorkloadIndex,
    settings: &ResolveSettings,
    local: &Arc<Workload>,
) -> Result<()> {
    let flow = flow(u, Direction::Outbound)?;
    let entropy = u.arbitrary()?;
    let found = mesh_resolve::resolve(index, settings, &flow, local, entropy);
    let mut trace = Trace::on();
    assert_eq!(found, resolve_traced(index, settings, &flow, local, entropy, &mut trace));
    assert!(!trace.steps().is_empty(), "nothing to explain");
    if let Ok(spread) = resolve_spread(index, settings, &flow, local) {
        let answer = found.as_ref().ok();
        assert!(
            answer.is_some_and(|one| spread.endpoints.contains(one)),
            "an endpoint is left out"
        );
    }
    let found = match found {
        Err(Unroutable::NeedsDns(pending)) => {
            let addresses = list(u, 2, ip)?;
            let completed = pending.complete(&addresses);
            assert!(!matches!(completed, Err(Unroutable::NeedsDns(_))), "a lookup without end");
            completed
        }
        found => found,
    };
    match &found {
        Ok(resolved) => {
            check_outbound(resolved);
            drop(authorize_egress(&PolicySet::default(), resolved));
        }
        Err(unroutable) => drop(unroutable.close_reason()),
    }
    Ok(())
}

fn check_outbound(resolved: &ResolvedFlow) {
    match &resolved.route {
        Route::Tunnel(tunnel) | Route::ViaWaypoint { tunnel, .. } => {
            assert!(!tunnel.expected.is_empty(), "a tunnel to anybody");
            assert!(tunnel.expected.is_sorted_by(|one, next| one < next));
            assert_eq!(tunnel.next_hop.ip().to_canonical(), tunnel.next_hop.ip());
            if tunnel.authority.port() != 0 {
                let text = tunnel.authority.to_string();
                let parsed: std::result::Result<Authority, _> = text.parse();
                if let Authority::Address(_) = tunnel.authority {
                    assert_eq!(parsed, Ok(tunnel.authority.clone()));
                }
            }
        }
        Route::Passthrough { target, .. } => {
            assert_eq!(target.ip().to_canonical(), target.ip());
        }
        Route::Deliver { .. } => panic!("an outbound flow was delivered"),
    }
}

fn inbound(
    u: &mut Unstructured<'_>,
    index: &WorkloadIndex,
    settings: &ResolveSettings,
    local: &Arc<Workload>,
) -> Result<()> {
    let direction = *u.choose(&[Direction::InboundTunnel, Direction::InboundPlaintext])?;
    let flow = flow(u, direction)?;
    let authority = if direction == Direction::InboundPlaintext {
        None
    } else if u.arbitrary()? {
        Some(Authority::address((ip(u)?, *u.choose(&PORTS)?).into()))
    } else {
        Some(Authority::Hostname { host: (*u.choose(&HOSTS)?).into(), port: *u.choose(&PORTS)? })
    };
    let found = resolve_inbound(index, settings, &flow, local, authority.as_ref());
    let mut trace = Trace::on();
    let traced =
        resolve_inbound_traced(index, settings, &flow, local, authority.as_ref(), &mut trace);
    assert_eq!(found, traced);
    match found {
        Ok(resolved) => {
            let Route::Deliver { target, dial, .. } = resolved.route else {
                panic!("an inbound flow was not delivered");
            };
            assert_eq!(target.ip(), flow.orig_dst.ip(), "another pod's address");
            assert!(dial.ip() == target.ip() || dial.ip().is_loopback());
            assert!(!ports::is_agent_port(dial.port()), "back into the agent: {dial}");
        }
        Err(Unroutable::NeedsDns(_)) => panic!("an inbound flow asks for a name"),
        Err(unroutable) => drop(unroutable.close_reason()),
    }
    Ok(())
}

/// What is taken away leaves nothing.
fn clear(mut index: WorkloadIndex) {
    index.apply(IndexDelta {
        removed_workloads: index.workloads().map(|one| one.uid.clone()).collect(),
        removed_services: index.services().map(|one| one.key.clone()).collect(),
        ..IndexDelta::default()
    });
    assert_eq!((index.workloads().len(), index.services().len()), (0, 0));
    for last in 0..=5 {
        let network = NetworkId::default();
        assert!(index.workload_by_ip(&network, [10, 0, 0, last].into()).is_none());
    }
    for namespace in ["a", "b"] {
        for host in HOSTS {
            let key = NamespacedHostname::new(namespace, host);
            assert_eq!(index.endpoints(&key).count(), 0, "an endpoint outlived its workload");
        }
    }
}

pub(crate) fn resolve_seeds() -> Vec<Vec<u8>> {
    (11..=16).map(|seed| crate::policy::noise(seed, 1200)).collect()
}

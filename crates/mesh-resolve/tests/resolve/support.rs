//! Small meshes to decide in.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use mesh_model::{
    ClientAddr, Direction, Flow, FlowId, GatewayAddress, GatewayDestination, NamespacedHostname,
    NetworkAddress, NetworkId, OrigDst, PodUid, Service, ServicePort, TunnelProtocol, Workload,
    WorkloadUid,
};
use mesh_resolve::{
    IndexDelta, ResolveSettings, ResolvedFlow, Route, Unroutable, WorkloadIndex, resolve,
};

pub(crate) fn pod(name: &str, address: &str) -> Workload {
    let mut pod = Workload::named(&format!("K//Pod/shop/{name}"), "shop", name);
    pod.addresses = if address.is_empty() {
        Vec::new()
    } else {
        address.split(',').map(|ip| ip.parse().unwrap()).collect()
    };
    pod.service_account = name.into();
    pod.node = "node-a".into();
    pod
}

pub(crate) fn hbone(workload: Workload) -> Workload {
    Workload { tunnel_protocol: TunnelProtocol::Hbone, ..workload }
}

pub(crate) fn key(name: &str) -> NamespacedHostname {
    NamespacedHostname::new("shop", &format!("{name}.shop.svc.cluster.local"))
}

/// An endpoint of the named service, with `service_port:target_port` pairs of its own.
pub(crate) fn of(mut workload: Workload, service: &str, ports: &[(u16, u16)]) -> Workload {
    workload.services.insert(key(service), service_ports(ports));
    workload
}

fn service_ports(ports: &[(u16, u16)]) -> Vec<ServicePort> {
    let port = |(service_port, target_port): &(u16, u16)| ServicePort {
        service_port: *service_port,
        target_port: *target_port,
    };
    ports.iter().map(port).collect()
}

pub(crate) fn service(name: &str, vips: &str, ports: &[(u16, u16)]) -> Service {
    let mut service = Service::named("shop", &key(name).hostname, name);
    let vips = vips.split(',').filter(|vip| !vip.is_empty());
    service.vips = vips.map(vip).collect();
    service.ports = service_ports(ports);
    service
}

pub(crate) fn vip(ip: &str) -> NetworkAddress {
    NetworkAddress::new(NetworkId::default(), ip.parse().unwrap())
}

pub(crate) fn gateway(service: &str) -> GatewayAddress {
    GatewayAddress { destination: GatewayDestination::Hostname(key(service)), hbone_port: 15008 }
}

pub(crate) fn index(workloads: Vec<Workload>, services: Vec<Service>) -> WorkloadIndex {
    let mut index = WorkloadIndex::default();
    index.apply(IndexDelta { workloads, services, ..IndexDelta::default() });
    index
}

pub(crate) fn local(index: &WorkloadIndex, name: &str) -> Arc<Workload> {
    let uid = WorkloadUid::new(&format!("K//Pod/shop/{name}"));
    Arc::clone(index.workload(&uid).unwrap())
}

pub(crate) fn flow(direction: Direction, destination: &str) -> Flow {
    let destination: SocketAddr = destination.parse().unwrap();
    Flow {
        id: FlowId(1),
        direction,
        client: ClientAddr::new("10.0.0.1:4000".parse().unwrap()),
        orig_dst: OrigDst::new(destination),
        pod: PodUid::new("p"),
        #[expect(clippy::disallowed_methods, reason = "a stamp nothing looks at")]
        accepted_at: Instant::now(),
    }
}

pub(crate) fn dial_as(
    index: &WorkloadIndex,
    settings: &ResolveSettings,
    destination: &str,
    entropy: u64,
) -> Result<ResolvedFlow, Unroutable> {
    let flow = flow(Direction::Outbound, destination);
    resolve(index, settings, &flow, &local(index, "client"), entropy)
}

pub(crate) fn dial(index: &WorkloadIndex, destination: &str) -> String {
    show(&dial_as(index, &ResolveSettings::default(), destination, 7))
}

/// A decision in one line.
pub(crate) fn show(outcome: &Result<ResolvedFlow, Unroutable>) -> String {
    let resolved = match outcome {
        Ok(resolved) => resolved,
        Err(unroutable) => return unroutable.close_reason().to_string(),
    };
    match &resolved.route {
        Route::Tunnel(tunnel) => format!("tunnel {} {}", tunnel.next_hop, tunnel.authority),
        Route::ViaWaypoint { tunnel, .. } => {
            format!("waypoint {} {}", tunnel.next_hop, tunnel.authority)
        }
        Route::Passthrough { target, known: true } => format!("known {target}"),
        Route::Passthrough { target, known: false } => format!("unknown {target}"),
        Route::Deliver { target, dial, proxy_header, waypoint } => {
            let mut text = format!("deliver {target}");
            if dial != target {
                text += &format!(" at {dial}");
            }
            if let Some(header) = proxy_header {
                text += &format!(" as {header}");
            }
            if let Some(waypoint) = waypoint {
                text += &format!(" via {}", waypoint.names.join("+"));
            }
            text
        }
    }
}

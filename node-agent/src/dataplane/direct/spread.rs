//! Services on the direct path: the endpoints among which the kernel's side may choose in the agent's place, and the name
//! of the service in the records of what was dialled by its virtual address.

#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use mesh_authorize::{Decision, authorize_egress};
use mesh_direct::{Pair, Vip};
use mesh_ebpf::VIP_ENDPOINTS;
use mesh_model::{Direction, Workload};
use mesh_resolve::{Addressed, Authority, ResolvedFlow, Route, TunnelRoute, resolve_spread};
use mesh_telemetry::ServiceLabels;

use super::judge::{DNS, Ground, LocalPod, Sides, flow};

/// The pairs of all endpoints of a virtual address, or why the agent has to choose. That each pair may talk directly is
/// judged apart.
pub(super) type Spreading = Result<Vec<Pair>, Cow<'static, str>>;

/// Lists the endpoints among which the agent would choose for a client's connections to a virtual address.
pub(super) fn spread(ground: &Ground<'_>, vip: &Vip) -> Spreading {
    let snapshot = ground.snapshot;
    if !snapshot.synced {
        return Err("the controller has not said everything yet".into());
    }
    let client = ground.pods.get(vip.client).ok_or("a pod is not captured here")?;
    let alike = |address: &&IpAddr| address.is_ipv4() == vip.address.is_ipv4();
    let client_address = client.sockets.addresses.iter().copied().find(|own| alike(&own));
    let client_address = client_address.ok_or("the client has no address of that family")?;
    let source = client.sockets.workload(snapshot).ok_or("a pod's workload is not known")?;
    is_captured(client, vip.address)?;
    let flow = flow(client_address, vip.address, Direction::Outbound, client);
    let spread = resolve_spread(&snapshot.index, &snapshot.settings, &flow, &source)
        .map_err(|not_spread| not_spread.to_string())?;
    if spread.endpoints.len() > VIP_ENDPOINTS {
        return Err(format!("the service has more than {VIP_ENDPOINTS} endpoints").into());
    }
    let pair = |resolved| pair(ground, vip, client_address, resolved);
    spread.endpoints.iter().map(pair).collect()
}

/// The client's settings leave the virtual address to the agent's listener.
fn is_captured(client: &LocalPod, vip: SocketAddr) -> Result<(), Cow<'static, str>> {
    let settings = client.settings.as_ref().ok_or("a pod is being taken over")?;
    if settings.dns_capture && vip.port() == DNS {
        return Err("the agent's resolver answers it".into());
    }
    if !settings.capture_outbound || !settings.outbound.selects(vip.ip(), vip.port()) {
        return Err("the client's settings exclude it from capture".into());
    }
    Ok(())
}

/// The pair of one endpoint, when it is a pod of this node that the agent would reach by a tunnel, unseen by any policy that
/// wants to see each connection.
fn pair(
    ground: &Ground<'_>,
    vip: &Vip,
    client_address: IpAddr,
    resolved: &ResolvedFlow,
) -> Result<Pair, Cow<'static, str>> {
    let Route::Tunnel(TunnelRoute {
        authority: Authority::Address(target),
        gateway: None,
        target_uid,
        ..
    }) = &resolved.route
    else {
        return Err("the agent reaches an endpoint without a tunnel, or by a gateway".into());
    };
    if target.is_ipv4() != vip.address.is_ipv4() {
        return Err("an endpoint has no address of the family that is dialled".into());
    }
    let not_here = "an endpoint is not captured on this node";
    let server = ground.pods.owner(target.ip()).ok_or(not_here)?;
    let pod = ground.pods.get(server).ok_or(not_here)?;
    if pod.sockets.workload(ground.snapshot).is_none_or(|workload| workload.uid != *target_uid) {
        return Err(not_here.into());
    }
    if server == vip.client {
        return Err("the client is an endpoint itself".into());
    }
    let verdict = authorize_egress(&ground.snapshot.policies, resolved);
    match verdict.decision {
        Decision::Allow(_) if verdict.notes.is_empty() => {}
        Decision::Allow(_) => {
            return Err("a policy in audit mode or dry run wants to see each connection".into());
        }
        Decision::Deny(denial) => return Err(denial.to_string().into()),
    }
    Ok(Pair { client: vip.client, client_address, server, target: *target })
}

/// Whether a pod of this node is an endpoint of the service that has the virtual address.
pub(super) fn has_endpoint_here(ground: &Ground<'_>, vip: &Vip) -> bool {
    let index = &ground.snapshot.index;
    let client = ground.pods.get(vip.client);
    let Some(source) = client.and_then(|pod| pod.sockets.workload(ground.snapshot)) else {
        return false;
    };
    let found = index.find_address(&source.network, vip.address.ip(), &source.namespace);
    let Some(Addressed::Service(service)) = found else { return false };
    let is_here = |ip: &IpAddr| ground.pods.owner(*ip).is_some();
    index.endpoints(&service.key).any(|one| one.addresses.iter().any(is_here))
}

/// What both reporters say of a pair's connections, and the service by whose virtual address they were dialled: as through
/// a tunnel, where the client's agent names the host that it meant.
pub(super) fn by_service(
    ground: &Ground<'_>,
    pair: &Pair,
    vip: SocketAddr,
    sides: &Arc<Sides>,
) -> Arc<Sides> {
    let index = &ground.snapshot.index;
    let workload =
        |pod| -> Option<Arc<Workload>> { ground.pods.get(pod)?.sockets.workload(ground.snapshot) };
    let Some(source) = workload(pair.client) else { return Arc::clone(sides) };
    let found = index.find_address(&source.network, vip.ip(), &source.namespace);
    let Some(Addressed::Service(service)) = found else { return Arc::clone(sides) };
    let labels = ServiceLabels::from(&*service);
    let mut named = (**sides).clone();
    if named.destination.service.is_none()
        && workload(pair.server).is_some_and(|server| index.is_endpoint(&service.key, &server.uid))
    {
        Arc::make_mut(&mut named.destination).service = Some(labels.clone());
    }
    Arc::make_mut(&mut named.source).service = Some(labels);
    Arc::new(named)
}

//! The direct path between pods of this node, as the agent drives it: verdicts, what became of the
//! connections made by them, and their end by force.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::BorrowedFd;
use std::time::Duration;

use mesh_ebpf_abi::{
    DirectEvent as RawEvent, DirectEventKind, DirectKey, Endpoint, FlowKey, FlowOrigin, Port,
    VIP_ENDPOINTS, VipEndpoints, VipKey, protocol,
};

use crate::capture::NetnsCookie;
use crate::maps::Maps;
use crate::{CaptureError, destroy, established, netns};

/// Two pods of the node that may talk without the agent, at one port of the second.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DirectPair {
    /// The client's namespace.
    pub client: NetnsCookie,
    /// The server's namespace.
    pub server: NetnsCookie,
    /// The client's address.
    pub client_address: IpAddr,
    /// The server's address and port.
    pub target: SocketAddr,
}

/// A virtual address of a service, as a pod of the node dials it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DirectVip {
    /// The client's namespace.
    pub client: NetnsCookie,
    /// The virtual address and port.
    pub vip: SocketAddr,
}

/// A direct connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DirectFlow {
    /// The client's address and port.
    pub client: SocketAddr,
    /// The server's address and port.
    pub target: SocketAddr,
}

/// One end of a direct connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DirectEnd {
    /// Who connected.
    Client,
    /// Who accepted.
    Server,
}

/// What happened to a direct connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DirectOutcome {
    /// The client's handshake is done.
    Opened,
    /// The client's socket closed; without `Opened` before it the server refused.
    ClientClosed(DirectClose),
    /// The server's socket closed.
    ServerClosed(DirectClose),
}

/// How one side's socket closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirectClose {
    /// Octets of payload that this side sent and the other one acknowledged.
    pub sent_octets: u64,
    /// The other side had acknowledged this one's end; `false` after a reset.
    pub orderly: bool,
}

/// One event of a direct connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirectEvent {
    /// Which.
    pub flow: DirectFlow,
    /// Who the client's address belonged to; none when to nobody any more.
    pub client: Option<NetnsCookie>,
    /// Who the server's address belonged to; none when to nobody any more.
    pub server: Option<NetnsCookie>,
    /// When, by [`monotonic_now`](crate::monotonic_now).
    pub at: Duration,
    /// What.
    pub outcome: DirectOutcome,
}

pub(crate) fn permit(maps: &Maps, pair: &DirectPair, revision: u64) -> Result<(), CaptureError> {
    maps.direct.insert(&key(pair), &revision)
}

pub(crate) fn revoke(maps: &Maps, pair: &DirectPair) -> Result<bool, CaptureError> {
    maps.direct.remove(&key(pair))
}

pub(crate) fn pairs(maps: &Maps) -> Result<Vec<(DirectPair, u64)>, CaptureError> {
    let elements = maps.direct.elements()?;
    Ok(elements.into_iter().map(|(key, revision)| (pair(&key), revision)).collect())
}

pub(crate) fn keep_until(maps: &Maps, until: Duration) -> Result<(), CaptureError> {
    let until = u64::try_from(until.as_nanos()).unwrap_or(u64::MAX);
    maps.direct_lease.insert(&0, &until)?;
    maps.vips_lease.insert(&0, &until)
}

pub(crate) fn spread(
    maps: &Maps,
    vip: &DirectVip,
    endpoints: &[SocketAddr],
) -> Result<(), CaptureError> {
    let key = vip_key(vip);
    let endpoints: Vec<Endpoint> = endpoints.iter().copied().map(Endpoint::from).collect();
    let listed = VipEndpoints::new(key, &endpoints).ok_or(CaptureError::TooMany {
        list: "endpoints of a virtual address",
        count: endpoints.len(),
        bound: VIP_ENDPOINTS,
    })?;
    maps.vips.insert(&key, &listed)
}

pub(crate) fn gather(maps: &Maps, vip: &DirectVip) -> Result<bool, CaptureError> {
    maps.vips.remove(&vip_key(vip))
}

pub(crate) fn vips(maps: &Maps) -> Result<Vec<(DirectVip, Vec<SocketAddr>)>, CaptureError> {
    let vip = |key: &VipKey| DirectVip {
        client: NetnsCookie(key.client_cookie),
        vip: key.vip.socket_addr(),
    };
    let endpoints =
        |listed: &VipEndpoints| listed.endpoints().iter().map(Endpoint::socket_addr).collect();
    let elements = maps.vips.elements()?;
    Ok(elements.iter().map(|(key, listed)| (vip(key), endpoints(listed))).collect())
}

/// The virtual address by which a connection was dialled, and since when.
pub(crate) fn dialled(
    maps: &Maps,
    flow: &DirectFlow,
) -> Result<Option<(SocketAddr, Duration)>, CaptureError> {
    let dialled = maps.dialled.get(&flow_key(flow.client, flow.target))?;
    Ok(dialled.map(|one| (one.vip.socket_addr(), Duration::from_nanos(one.since_ns))))
}

/// Forgets what was dialled no later than `until`.
pub(crate) fn forget_dialled(
    maps: &Maps,
    flow: &DirectFlow,
    until: Duration,
) -> Result<(), CaptureError> {
    if dialled(maps, flow)?.is_some_and(|(_, since)| since <= until) {
        maps.dialled.remove(&flow_key(flow.client, flow.target))?;
    }
    Ok(())
}

/// The connections of which a virtual address is noted, also those that are over.
pub(crate) fn all_dialled(maps: &Maps) -> Result<Vec<DirectFlow>, CaptureError> {
    Ok(maps.dialled.keys()?.iter().map(flow).collect())
}

/// At most `limit` events, oldest first.
pub(crate) fn events(maps: &Maps, limit: usize) -> Result<Vec<DirectEvent>, CaptureError> {
    let mut events = Vec::new();
    while events.len() < limit {
        let Some(raw) = maps.next_direct_event()? else { break };
        events.extend(event(&raw));
    }
    Ok(events)
}

/// The connections that are open, as their clients' guards know them.
pub(crate) fn flows(maps: &Maps) -> Result<Vec<(DirectFlow, NetnsCookie)>, CaptureError> {
    let flows = maps.flows.elements()?.into_iter();
    Ok(flows
        .filter(|(_, state)| state.origin == FlowOrigin::Direct as u32)
        .map(|(key, state)| (flow(&key), NetnsCookie(state.netns_cookie)))
        .collect())
}

/// The ends of direct connections that are open.
pub(crate) fn ends(maps: &Maps) -> Result<Vec<(DirectFlow, DirectEnd)>, CaptureError> {
    let flows = maps.flows.elements()?.into_iter();
    Ok(flows
        .filter_map(|(key, state)| {
            if state.origin == FlowOrigin::Direct as u32 {
                Some((flow(&key), DirectEnd::Client))
            } else if state.origin == FlowOrigin::DirectAccepted as u32 {
                let DirectFlow { client, target } = flow(&key);
                Some((DirectFlow { client: target, target: client }, DirectEnd::Server))
            } else {
                None
            }
        })
        .collect())
}

/// The open sockets of the namespace that have a peer, as (own, peer); what only waits for stray segments is not open.
pub(crate) fn sockets(
    namespace: BorrowedFd<'_>,
) -> Result<Vec<(SocketAddr, SocketAddr)>, CaptureError> {
    let connections = netns::inside(namespace, established::list)
        .and_then(|listed| listed)
        .map_err(CaptureError::kernel("listing the sockets of a pod"))?;
    let open = connections.into_iter().filter(|connection| !connection.in_time_wait);
    Ok(open
        .map(|connection| {
            let DirectFlow { client: own, target: peer } = flow(&connection.flow);
            (own, peer)
        })
        .collect())
}

/// Takes both guards' entries away, then ends the sockets.
pub(crate) fn cut(
    maps: &Maps,
    flow: &DirectFlow,
    client: Option<BorrowedFd<'_>>,
    server: Option<BorrowedFd<'_>>,
) -> Result<(), CaptureError> {
    let ends = [flow_key(flow.client, flow.target), flow_key(flow.target, flow.client)];
    for end in &ends {
        maps.flows.remove(end)?;
    }
    for (end, namespace) in ends.iter().zip([client, server]) {
        let Some(namespace) = namespace else { continue };
        netns::inside(namespace, || destroy::destroy(end))
            .and_then(|destroyed| destroyed)
            .map_err(CaptureError::kernel("ending a socket of a pod"))?;
    }
    Ok(())
}

fn key(pair: &DirectPair) -> DirectKey {
    DirectKey::new(
        (pair.client.0, pair.client_address.into()),
        (pair.server.0, pair.target.ip().into()),
        Port::new(pair.target.port()),
    )
}

fn vip_key(vip: &DirectVip) -> VipKey {
    VipKey::new(vip.client.0, vip.vip.into())
}

const fn pair(key: &DirectKey) -> DirectPair {
    DirectPair {
        client: NetnsCookie(key.client_cookie),
        server: NetnsCookie(key.server_cookie),
        client_address: key.client.ip(),
        target: SocketAddr::new(key.server.ip(), key.port.get()),
    }
}

fn flow_key(local: SocketAddr, remote: SocketAddr) -> FlowKey {
    let end = |end: SocketAddr| (end.ip().into(), Port::new(end.port()));
    FlowKey::new(protocol::TCP, end(local), end(remote))
}

const fn flow(key: &FlowKey) -> DirectFlow {
    DirectFlow {
        client: SocketAddr::new(key.local.ip(), key.local_port.get()),
        target: SocketAddr::new(key.remote.ip(), key.remote_port.get()),
    }
}

/// None for an event of a kind that this build does not know.
fn event(raw: &RawEvent) -> Option<DirectEvent> {
    let close = DirectClose { sent_octets: raw.sent_octets, orderly: raw.orderly != 0 };
    let outcome = if raw.kind == DirectEventKind::Opened as u32 {
        DirectOutcome::Opened
    } else if raw.kind == DirectEventKind::ClientClosed as u32 {
        DirectOutcome::ClientClosed(close)
    } else if raw.kind == DirectEventKind::ServerClosed as u32 {
        DirectOutcome::ServerClosed(close)
    } else {
        return None;
    };
    let known = |cookie| (cookie != 0).then_some(NetnsCookie(cookie));
    Some(DirectEvent {
        flow: flow(&raw.flow),
        client: known(raw.client_cookie),
        server: known(raw.server_cookie),
        at: Duration::from_nanos(raw.at_ns),
        outcome,
    })
}

//! Where a flow goes.

use std::net::SocketAddr;
use std::sync::Arc;

use mesh_model::{Direction, Flow, Revision, Service, SpiffeId, Workload, WorkloadUid};
use serde::{Deserialize, Serialize};

use crate::authority::Authority;

/// A flow of which the index said where it goes; proof that it was resolved.
///
/// Made by [`resolve`](crate::resolve), [`resolve_inbound`](crate::resolve_inbound),
/// [`PendingDns::complete`](crate::PendingDns::complete) and, for flows of a predecessor, [`handed_over`](Self::handed_over).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ResolvedFlow {
    /// The flow as captured.
    pub flow: Flow,
    /// The enrolled pod's workload.
    pub local: Arc<Workload>,
    /// Outbound: the endpoint or waypoint chosen. Inbound: the source, when its address is known.
    pub peer: Option<Arc<Workload>>,
    /// The service addressed, when one was. For inbound flows addressed to the pod: the only service that leads to the port.
    pub service: Option<Arc<Service>>,
    /// Where it goes.
    pub route: Route,
    /// The index's revision that was looked at.
    pub revision: Revision,
}

impl ResolvedFlow {
    /// A flow that this agent's predecessor resolved and opened. It opens nothing: a live flow is only judged again.
    #[must_use]
    pub const fn handed_over(
        flow: Flow,
        local: Arc<Workload>,
        peer: Option<Arc<Workload>>,
        service: Option<Arc<Service>>,
        route: Route,
    ) -> Self {
        Self { flow, local, peer, service, route, revision: Revision(0) }
    }

    /// Who dialled, as far as known.
    #[must_use]
    pub fn source(&self) -> Option<&Arc<Workload>> {
        match self.flow.direction {
            Direction::Outbound => Some(&self.local),
            Direction::InboundTunnel | Direction::InboundPlaintext => self.peer.as_ref(),
        }
    }

    /// Who is dialled, as far as known; the waypoint when one is on the way.
    #[must_use]
    pub fn destination(&self) -> Option<&Arc<Workload>> {
        match self.flow.direction {
            Direction::Outbound => self.peer.as_ref(),
            Direction::InboundTunnel | Direction::InboundPlaintext => Some(&self.local),
        }
    }
}

/// Where a flow goes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Route {
    /// Outbound, to the endpoint's agent.
    Tunnel(TunnelRoute),
    /// Outbound, to the waypoint of the destination.
    ViaWaypoint {
        /// The tunnel to it.
        tunnel: TunnelRoute,
        /// Its name: `namespace/hostname` or `network/address`.
        waypoint: Arc<str>,
    },
    /// Outbound, in plaintext.
    Passthrough {
        /// Where to connect.
        target: SocketAddr,
        /// True when the mesh knows the destination: a workload, a declared service, or the pod itself.
        known: bool,
    },
    /// Inbound, to the application.
    Deliver {
        /// The pod's address and the application's port; what policy judges.
        target: SocketAddr,
        /// Where to connect inside the pod; differs from `target` for an application tunnel on loopback.
        dial: SocketAddr,
        /// Put a PROXY v2 header with this destination in front of the bytes.
        proxy_header: Option<SocketAddr>,
        /// The waypoint that the flow must have come through.
        waypoint: Option<Arc<RequiredWaypoint>>,
    },
}

impl Route {
    /// The tunnel to open, if any.
    #[must_use]
    pub const fn tunnel(&self) -> Option<&TunnelRoute> {
        match self {
            Self::Tunnel(tunnel) | Self::ViaWaypoint { tunnel, .. } => Some(tunnel),
            Self::Passthrough { .. } | Self::Deliver { .. } => None,
        }
    }

    /// Where the agent connects to.
    #[must_use]
    pub const fn next_hop(&self) -> SocketAddr {
        match self {
            Self::Tunnel(tunnel) | Self::ViaWaypoint { tunnel, .. } => tunnel.next_hop,
            Self::Passthrough { target, .. } => *target,
            Self::Deliver { dial, .. } => *dial,
        }
    }
}

/// A stream in a tunnel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunnelRoute {
    /// The tunnel's far end, its HBONE port.
    pub next_hop: SocketAddr,
    /// What CONNECT asks for.
    pub authority: Authority,
    /// Identities of which the far end must prove one; sorted, without repeats, never empty.
    pub expected: Vec<SpiffeId>,
    /// The workload at the far end; part of the tunnel's key, so that a reused address is another tunnel.
    pub target_uid: WorkloadUid,
    /// The tunnel to the gateway of the destination's network, inside of which this one goes; `next_hop` is the gateway's
    /// then. Never a gateway's own tunnel: those do not nest further.
    pub gateway: Option<Box<Self>>,
}

/// The waypoint that an inbound flow must have come through.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RequiredWaypoint {
    /// Names of the waypoints bound, `namespace/hostname` or `network/address`; sorted, never empty.
    pub names: Vec<Arc<str>>,
    /// Identities of which the tunnel's peer must have proved one; sorted. Empty while the waypoint is unknown: then
    /// nobody may pass.
    pub identities: Vec<SpiffeId>,
}

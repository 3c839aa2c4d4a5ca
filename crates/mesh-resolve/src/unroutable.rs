//! Why a flow goes nowhere.

use std::net::SocketAddr;
use std::sync::Arc;

use mesh_model::{CloseReason, InvalidSpiffeId, NamespacedHostname, NetworkId, WorkloadUid};

use crate::authority::Authority;
use crate::pending::PendingDns;

/// Why a flow goes nowhere. None may be retried before the index changes, except [`NeedsDns`](Self::NeedsDns).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unroutable {
    /// The client dials a port of the agent, which would lead back here.
    #[error("{destination} is a port of the mesh agent")]
    AgentPort {
        /// What was dialled.
        destination: SocketAddr,
    },
    /// An IPv6 link-local address means something on one interface only, and which one the client meant is not known here.
    #[error("{destination} is link-local, which is not carried: use an address of another scope")]
    LinkLocal {
        /// What was dialled.
        destination: SocketAddr,
    },
    /// The service has no such port.
    #[error("service {service} has no port {port}")]
    NoSuchPort {
        /// The service.
        service: NamespacedHostname,
        /// The port dialled.
        port: u16,
    },
    /// The service has no endpoint that may be chosen. Never a passthrough to its virtual address.
    #[error("service {service} has no endpoint to send to")]
    NoEndpoint {
        /// The service.
        service: NamespacedHostname,
    },
    /// A waypoint is bound and required, and it is unknown or has no ready endpoint.
    #[error("waypoint {waypoint} bound to {bound_to} is unknown or not ready")]
    WaypointUnavailable {
        /// The waypoint, `namespace/hostname` or `network/address`.
        waypoint: Arc<str>,
        /// The service or workload it is bound to.
        bound_to: Arc<str>,
    },
    /// The destination is on another network, and no gateway that leads there is known and ready; or it is a waypoint, or
    /// nothing that can be asked for by the name of a service, which no gateway leads to.
    #[error("{destination} is on network {network:?}, and no gateway leads there")]
    OtherNetwork {
        /// The service, workload or waypoint.
        destination: Arc<str>,
        /// Its network.
        network: NetworkId,
    },
    /// The CONNECT asks for an address or service that is not this workload's.
    #[error("{authority} is not of workload {local}")]
    NotOurs {
        /// What was asked for.
        authority: Authority,
        /// This workload.
        local: WorkloadUid,
    },
    /// The controller described an endpoint by names that make no identity, so nobody could prove it.
    #[error("workload {uid} has no valid identity")]
    InvalidIdentity {
        /// The endpoint.
        uid: WorkloadUid,
        /// What is wrong with it.
        #[source]
        source: InvalidSpiffeId,
    },
    /// The service is on another network, and neither names of its own nor endpoints there say who may answer for it.
    #[error("nobody on the other network is known to answer for {service}")]
    NobodyExpected {
        /// The service.
        service: NamespacedHostname,
    },
    /// The endpoint has a host name and no address: resolve it and go on with [`PendingDns::complete`].
    #[error("address of {} is to be resolved", .0.hostname())]
    NeedsDns(Box<PendingDns>),
    /// The endpoint's host name has no address of a family that the service allows.
    #[error("{hostname} has no usable address")]
    NoDnsAnswer {
        /// The host name.
        hostname: Arc<str>,
    },
}

impl Unroutable {
    /// The outcome that is logged and counted.
    #[must_use]
    pub const fn close_reason(&self) -> CloseReason {
        match self {
            Self::AgentPort { .. } => CloseReason::LoopRefused,
            Self::NoSuchPort { .. } => CloseReason::NoSuchPort,
            Self::NoEndpoint { .. } => CloseReason::NoHealthyUpstream,
            Self::WaypointUnavailable { .. } => CloseReason::WaypointUnavailable,
            Self::OtherNetwork { .. } => CloseReason::GatewayUnavailable,
            Self::NotOurs { .. } => CloseReason::WrongDestination,
            Self::InvalidIdentity { .. } | Self::NobodyExpected { .. } => {
                CloseReason::WrongIdentity
            }
            Self::LinkLocal { .. } | Self::NeedsDns(_) | Self::NoDnsAnswer { .. } => {
                CloseReason::ConnectFailed
            }
        }
    }
}

//! The nouns of the mesh, shared by every stage.
//!
//! No I/O, no serde wire formats, no policy: identities ([`SpiffeId`]), what runs where ([`Workload`],
//! [`Service`]), one connection ([`Flow`]) and how it ended ([`CloseReason`]).

#![forbid(unsafe_code)]

pub mod address;
pub mod close;
pub mod error;
pub mod flow;
pub mod identity;
pub mod request_path;
pub mod service;
pub mod splitmix;
pub mod workload;

pub use address::{
    ClientAddr, InvalidPrefix, IpPrefix, NetworkAddress, NetworkId, OrigDst, canonical_ip,
};
pub use close::{CloseReason, Fault};
pub use error::error_chain;
pub use flow::{Direction, Flow, FlowId, PodUid, Reporter, Revision};
pub use identity::{InvalidSpiffeId, SpiffeId};
pub use request_path::{
    EmptySegments, EncodedSlashes, InvalidPath, MAX_PATH_BYTES, PathNormalization, PathParameters,
    RequestPath, path_text,
};
pub use service::{
    GatewayAddress, GatewayDestination, HealthPolicy, IpFamilies, LoadBalancing, LoadBalancingMode,
    NamespacedHostname, Scope, Service, ServicePort, Visibility, WeightedWaypoint,
};
pub use workload::{
    ApplicationTunnel, ApplicationTunnelProtocol, HealthStatus, Locality, NetworkMode,
    TunnelProtocol, Workload, WorkloadKind, WorkloadUid,
};

/// Namespaces whose pods are never the mesh's unless an operator says otherwise: what a cluster and the mesh itself need to
/// start. The controller, the agent and the CNI plugin have to agree, or a pod would be held out by one and awaited by another.
pub const EXCLUDED_NAMESPACES: [&str; 2] = ["kube-system", "culvert-system"];

/// Ports the agent takes inside every enrolled pod's network namespace.
///
/// Source: HBONE as Istio ambient speaks it; the numbers are constants there as well.
pub mod ports {
    /// Captured outbound TCP arrives here.
    pub const OUTBOUND: u16 = 15001;
    /// Captured plaintext inbound TCP arrives here.
    pub const INBOUND_PLAINTEXT: u16 = 15006;
    /// HBONE: TLS 1.3 with HTTP/2 CONNECT.
    pub const HBONE: u16 = 15008;
    /// DNS over UDP and TCP.
    pub const DNS: u16 = 15053;

    /// True for a port that is never forwarded to: a connection there would loop into the agent.
    #[must_use]
    pub const fn is_agent_port(port: u16) -> bool {
        matches!(port, OUTBOUND | INBOUND_PLAINTEXT | HBONE | DNS)
    }
}

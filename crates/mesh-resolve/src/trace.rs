//! The steps of a decision, as data, for `culvert explain`.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use mesh_model::{CloseReason, NamespacedHostname, NetworkId, ServicePort, WorkloadUid};
use serde::{Deserialize, Serialize};

/// Collects the [`Step`]s of one decision; costs nothing while off.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trace {
    steps: Option<Vec<Step>>,
}

/// Steps kept per decision; a service with thousands of endpoints must not make its explanation unreadable.
const MAX_STEPS: usize = 256;

impl Trace {
    /// A trace that drops every step.
    #[must_use]
    pub const fn off() -> Self {
        Self { steps: None }
    }

    /// A trace that keeps the first 256 steps and the last.
    #[must_use]
    pub const fn on() -> Self {
        Self { steps: Some(Vec::new()) }
    }

    /// What was recorded, in order.
    #[must_use]
    pub fn steps(&self) -> &[Step] {
        self.steps.as_deref().unwrap_or(&[])
    }

    /// What was recorded, in order.
    #[must_use]
    pub fn into_steps(self) -> Vec<Step> {
        self.steps.unwrap_or_default()
    }

    pub(crate) fn record(&mut self, step: impl FnOnce() -> Step) {
        if let Some(steps) = &mut self.steps {
            if steps.len() > MAX_STEPS {
                steps.pop();
            }
            steps.push(step());
        }
    }
}

/// One step of [`resolve_traced`](crate::resolve_traced) or [`resolve_inbound_traced`](crate::resolve_inbound_traced).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "step", rename_all = "snake_case")]
pub enum Step {
    /// The pod dialled.
    Dialled {
        /// The pod's workload.
        source: WorkloadUid,
        /// What it dialled.
        destination: SocketAddr,
    },
    /// The destination is the dialling pod itself.
    IsSelf,
    /// The destination is a workload's address.
    IsWorkload {
        /// The workload.
        workload: WorkloadUid,
    },
    /// The destination is a service's virtual address.
    IsService {
        /// The service.
        service: NamespacedHostname,
    },
    /// Nothing in the index has the destination's address.
    IsUnknown,
    /// The service says: the dialled address itself (resolution NONE).
    KeepsDestination {
        /// The service.
        service: NamespacedHostname,
    },
    /// A waypoint is bound to the destination.
    WaypointBound {
        /// The waypoint.
        waypoint: Arc<str>,
        /// What it is bound to.
        bound_to: Arc<str>,
    },
    /// The waypoint is not used because the source is one of its own workloads.
    SourceIsWaypoint,
    /// The waypoint is unknown or has no ready endpoint.
    WaypointUnavailable {
        /// The waypoint.
        waypoint: Arc<str>,
        /// True when the flow goes on without it.
        preferred: bool,
    },
    /// An endpoint was not considered.
    EndpointPassedOver {
        /// The endpoint.
        workload: WorkloadUid,
        /// Why.
        because: PassedOver,
    },
    /// An endpoint was chosen.
    EndpointChosen {
        /// The endpoint.
        workload: WorkloadUid,
        /// Among how many that were equally good.
        among: usize,
        /// The port of the service and of the endpoint.
        port: ServicePort,
        /// Its address; none when its host name is to be resolved.
        address: Option<IpAddr>,
    },
    /// A tunnel asks for this.
    Asked {
        /// The authority.
        authority: Box<str>,
        /// The workload that is asked.
        local: WorkloadUid,
    },
    /// The authority is the workload's own, or one that it is the waypoint of.
    IsOurs {
        /// The service through which it is.
        through: Option<NamespacedHostname>,
    },
    /// The workload wants its streams elsewhere.
    ApplicationTunnel {
        /// Where.
        dial: SocketAddr,
        /// Behind a PROXY header.
        proxy_header: bool,
    },
    /// Who connects here must have come through a waypoint.
    WaypointRequired {
        /// The waypoints.
        waypoints: Vec<Arc<str>>,
    },
    /// Through a tunnel to the endpoint.
    ToTunnel {
        /// The far end.
        next_hop: SocketAddr,
        /// What is asked for there.
        authority: Box<str>,
        /// Identities of which one must be proved there.
        expected: Vec<Box<str>>,
    },
    /// Inside a tunnel to the gateway of another network.
    ThroughGateway {
        /// The network.
        network: NetworkId,
        /// The gateway's address.
        next_hop: SocketAddr,
        /// Identities of which one must be proved by the gateway.
        expected: Vec<Box<str>>,
    },
    /// Through a tunnel to the waypoint.
    ToWaypoint {
        /// The waypoint.
        waypoint: Arc<str>,
        /// Its address.
        next_hop: SocketAddr,
        /// What is asked for there.
        authority: Box<str>,
        /// Identities of which one must be proved there.
        expected: Vec<Box<str>>,
    },
    /// In plaintext.
    ToPassthrough {
        /// Where.
        target: SocketAddr,
        /// Whether the mesh knows it.
        known: bool,
    },
    /// To the application.
    ToApplication {
        /// Where.
        target: SocketAddr,
    },
    /// Nowhere.
    Refused {
        /// The outcome.
        reason: CloseReason,
        /// Why, in words.
        because: Box<str>,
    },
}

/// Why an endpoint was not considered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PassedOver {
    /// Not ready.
    Unhealthy,
    /// Its capacity is 0.
    NoCapacity,
    /// On another network, and not reachable through a gateway of it.
    OtherNetwork,
    /// It has no such port.
    NoSuchPort,
    /// It has neither an address of an allowed family nor a host name.
    NoAddress,
    /// Outside the scope that the service insists on.
    OutOfScope,
}

impl fmt::Display for PassedOver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unhealthy => "not ready",
            Self::NoCapacity => "its capacity is 0",
            Self::OtherNetwork => "on another network that no gateway leads to",
            Self::NoSuchPort => "it has no such port",
            Self::NoAddress => "it has no usable address",
            Self::OutOfScope => "outside the required scope",
        })
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dialled { source, destination } => write!(f, "{source} dials {destination}"),
            Self::IsSelf => f.write_str("the destination is the pod itself"),
            Self::IsWorkload { workload } => write!(f, "the destination is workload {workload}"),
            Self::IsService { service } => write!(f, "the destination is service {service}"),
            Self::IsUnknown => f.write_str("the destination is not part of the mesh"),
            Self::KeepsDestination { service } => {
                write!(f, "service {service} keeps the dialled address")
            }
            Self::WaypointBound { waypoint, bound_to } => {
                write!(f, "waypoint {waypoint} is bound to {bound_to}")
            }
            Self::SourceIsWaypoint => f.write_str("the source is that waypoint; it is not used"),
            Self::WaypointUnavailable { waypoint, preferred: true } => {
                write!(f, "waypoint {waypoint} is unavailable; going on without it")
            }
            Self::WaypointUnavailable { waypoint, preferred: false } => {
                write!(f, "waypoint {waypoint} is unavailable")
            }
            Self::EndpointPassedOver { workload, because } => {
                write!(f, "endpoint {workload} is passed over: {because}")
            }
            Self::EndpointChosen { workload, among, port, address } => {
                write!(f, "endpoint {workload} is chosen among {among}, port ")?;
                write!(f, "{} -> {}, address ", port.service_port, port.target_port)?;
                match address {
                    Some(address) => address.fmt(f),
                    None => f.write_str("by DNS"),
                }
            }
            Self::Asked { authority, local } => write!(f, "{local} is asked for {authority}"),
            Self::IsOurs { through: Some(service) } => {
                write!(f, "that is this workload's by service {service}")
            }
            Self::IsOurs { through: None } => f.write_str("that is this workload's own address"),
            Self::ApplicationTunnel { dial, proxy_header } => {
                let header = if *proxy_header { " behind a PROXY header" } else { "" };
                write!(f, "the workload wants its streams at {dial}{header}")
            }
            Self::WaypointRequired { waypoints } => {
                write!(f, "the connection must come through waypoint {}", waypoints.join(" or "))
            }
            Self::ToTunnel { next_hop, authority, expected } => {
                let expected = expected.join(" or ");
                write!(f, "tunnel to {next_hop} for {authority}, expecting {expected}")
            }
            Self::ThroughGateway { network, next_hop, expected } => {
                let expected = expected.join(" or ");
                write!(f, "through the gateway of network {network} at {next_hop}, ")?;
                write!(f, "expecting {expected} there")
            }
            Self::ToWaypoint { waypoint, next_hop, authority, expected } => {
                let expected = expected.join(" or ");
                write!(f, "tunnel to waypoint {waypoint} at {next_hop} for {authority}, ")?;
                write!(f, "expecting {expected}")
            }
            Self::ToPassthrough { target, known: true } => {
                write!(f, "plaintext to {target}, which takes no tunnel")
            }
            Self::ToPassthrough { target, known: false } => {
                write!(f, "plaintext to {target}, unknown to the mesh")
            }
            Self::ToApplication { target } => write!(f, "to the application at {target}"),
            Self::Refused { reason, because } => write!(f, "refused ({reason}): {because}"),
        }
    }
}

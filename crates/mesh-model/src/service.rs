//! Services, their ports, load balancing and waypoints.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::address::{IpPrefix, NetworkAddress, NetworkId};

/// A service's key: namespace and fully qualified host name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct NamespacedHostname {
    /// Namespace.
    pub namespace: Arc<str>,
    /// Host name, e.g. `cart.shop.svc.cluster.local`; may start with `*.`.
    pub hostname: Arc<str>,
}

impl NamespacedHostname {
    /// A key from its parts.
    #[must_use]
    pub fn new(namespace: &str, hostname: &str) -> Self {
        Self { namespace: namespace.into(), hostname: hostname.into() }
    }
}

impl fmt::Display for NamespacedHostname {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.hostname)
    }
}

/// A service port and where it leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ServicePort {
    /// Port of the service.
    pub service_port: u16,
    /// Port of the endpoint; 0 when each endpoint supplies its own (a named port).
    pub target_port: u16,
}

/// Where a waypoint or gateway is.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum GatewayDestination {
    /// By service or workload host name.
    Hostname(NamespacedHostname),
    /// By address.
    Address(NetworkAddress),
}

/// A waypoint or gateway.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct GatewayAddress {
    /// Where.
    pub destination: GatewayDestination,
    /// Its HBONE port, 15008 by convention. A service port when the destination is a service.
    pub hbone_port: u16,
}

/// One of several waypoints that share a service's connections.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct WeightedWaypoint {
    /// The waypoint.
    pub destination: GatewayAddress,
    /// Its share, relative to the sum.
    pub weight: u32,
}

/// What an endpoint must share with the client to be preferred.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Scope {
    /// Same network.
    Network,
    /// Same region.
    Region,
    /// Same zone.
    Zone,
    /// Same subzone.
    Subzone,
    /// Same node.
    Node,
    /// Same cluster.
    Cluster,
}

/// How [`Scope`]s are used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum LoadBalancingMode {
    /// All endpoints, by capacity.
    #[default]
    Standard,
    /// Only endpoints that share every scope.
    Strict,
    /// The endpoints that share most leading scopes.
    Failover,
    /// The dialled address itself (ServiceEntry resolution NONE).
    Passthrough,
}

/// Whether endpoints that are not ready may be chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum HealthPolicy {
    /// Ready endpoints only.
    #[default]
    OnlyHealthy,
    /// All endpoints (`publishNotReadyAddresses`).
    AllowAll,
}

/// Load balancing of a service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct LoadBalancing {
    /// Scopes in order of importance.
    pub routing_preference: Vec<Scope>,
    /// How they are used.
    pub mode: LoadBalancingMode,
    /// Which endpoints take part.
    pub health_policy: HealthPolicy,
}

/// Address families of a service.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum IpFamilies {
    /// As its addresses say.
    #[default]
    Automatic,
    /// IPv4 only.
    Ipv4Only,
    /// IPv6 only.
    Ipv6Only,
    /// Both.
    Dual,
}

/// Who may see a service.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Visibility {
    /// Everybody.
    #[default]
    Public,
    /// Clients of its own namespace.
    Namespace,
}

/// One service, as the controller describes it.
///
/// Source: WDS `istio.workload.Service`. Endpoints are not listed here, workloads name their services.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    /// Object name, telemetry.
    pub name: Arc<str>,
    /// Namespace and host name, the key.
    pub key: NamespacedHostname,
    /// Virtual addresses.
    pub vips: Vec<NetworkAddress>,
    /// Virtual address ranges (ServiceEntry with CIDR addresses).
    pub cidr_vips: Vec<(NetworkId, IpPrefix)>,
    /// Ports.
    pub ports: Vec<ServicePort>,
    /// Further identities an endpoint may prove.
    pub subject_alt_names: Vec<Arc<str>>,
    /// Waypoint of the service.
    pub waypoint: Option<GatewayAddress>,
    /// Waypoints that share its connections; takes precedence over `waypoint` when a weight is positive.
    pub weighted_waypoints: Vec<WeightedWaypoint>,
    /// Load balancing.
    pub load_balancing: LoadBalancing,
    /// Address families.
    pub ip_families: IpFamilies,
    /// True for the definition that wins when several share a host name.
    pub canonical: bool,
    /// Who sees it.
    pub visibility: Visibility,
}

impl Service {
    /// A service with nothing but its key and name; for building others from.
    #[must_use]
    pub fn named(namespace: &str, hostname: &str, name: &str) -> Self {
        Self {
            name: name.into(),
            key: NamespacedHostname::new(namespace, hostname),
            vips: Vec::new(),
            cidr_vips: Vec::new(),
            ports: Vec::new(),
            subject_alt_names: Vec::new(),
            waypoint: None,
            weighted_waypoints: Vec::new(),
            load_balancing: LoadBalancing::default(),
            ip_families: IpFamilies::Automatic,
            canonical: false,
            visibility: Visibility::Public,
        }
    }
}

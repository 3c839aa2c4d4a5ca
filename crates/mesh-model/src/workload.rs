//! Workloads: pods, virtual machines and external endpoints.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::address::NetworkId;
use crate::identity::{InvalidSpiffeId, SpiffeId};
use crate::service::{GatewayAddress, NamespacedHostname, ServicePort};

/// The index's primary key of a workload, e.g. `Kubernetes//Pod/shop/cart-0`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct WorkloadUid(Arc<str>);

impl WorkloadUid {
    /// A uid as the controller names it.
    #[must_use]
    pub fn new(uid: &str) -> Self {
        Self(uid.into())
    }

    /// The text of it.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for WorkloadUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// How a workload is reached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum TunnelProtocol {
    /// Plain TCP.
    #[default]
    None,
    /// HBONE on port 15008.
    Hbone,
}

/// Whether a workload has addresses of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum NetworkMode {
    /// Its addresses are its own.
    #[default]
    Standard,
    /// It shares the node's address, so an address alone never names it.
    HostNetwork,
}

/// Whether a workload may be chosen as an endpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum HealthStatus {
    /// Ready.
    #[default]
    Healthy,
    /// Not ready, or going away.
    Unhealthy,
}

/// What owns the workload; only a label of telemetry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum WorkloadKind {
    /// A Deployment's pod.
    Deployment,
    /// A CronJob's pod.
    CronJob,
    /// A pod.
    #[default]
    Pod,
    /// A Job's pod.
    Job,
}

impl WorkloadKind {
    /// The word used in the `baggage` key `k8s.<type>.name`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Deployment => "deployment",
            Self::CronJob => "cronjob",
            Self::Pod => "pod",
            Self::Job => "job",
        }
    }
}

/// Region, zone and subzone; empty where unknown.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Locality {
    /// Region.
    pub region: Arc<str>,
    /// Zone.
    pub zone: Arc<str>,
    /// Subzone.
    pub subzone: Arc<str>,
}

/// What speaks inside an application tunnel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ApplicationTunnelProtocol {
    /// The raw bytes.
    #[default]
    None,
    /// PROXY protocol version 2 in front of the raw bytes.
    Proxy,
}

/// A workload that wants its inbound streams on another port or behind a PROXY header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ApplicationTunnel {
    /// What is put in front of the bytes.
    pub protocol: ApplicationTunnelProtocol,
    /// Port to deliver to instead of the dialled one.
    pub port: Option<u16>,
}

/// One workload, as the controller describes it.
///
/// Source: WDS `istio.workload.Workload`; defaults applied (trust domain `cluster.local`, account `default`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Workload {
    /// Primary key.
    pub uid: WorkloadUid,
    /// Pod name.
    pub name: Arc<str>,
    /// Namespace.
    pub namespace: Arc<str>,
    /// Trust domain of its identity.
    pub trust_domain: Arc<str>,
    /// Service account of its identity.
    pub service_account: Arc<str>,
    /// Canonical addresses, at most one per family in practice; may be empty (then `hostname` is resolved).
    pub addresses: Vec<IpAddr>,
    /// DNS name of a workload without addresses. Of a pod with addresses the one that its `hostname` and `subdomain`
    /// give it under a headless service; empty otherwise.
    pub hostname: Arc<str>,
    /// The network its addresses belong to.
    pub network: NetworkId,
    /// How to reach it.
    pub tunnel_protocol: TunnelProtocol,
    /// Whether its addresses name it.
    pub network_mode: NetworkMode,
    /// Gateway of its network, for clients elsewhere.
    pub network_gateway: Option<GatewayAddress>,
    /// Waypoint for traffic addressed to the workload itself.
    pub waypoint: Option<GatewayAddress>,
    /// Node it runs on; empty when unknown.
    pub node: Arc<str>,
    /// Canonical service name, telemetry.
    pub canonical_name: Arc<str>,
    /// Canonical revision, telemetry.
    pub canonical_revision: Arc<str>,
    /// Owner kind, telemetry.
    pub kind: WorkloadKind,
    /// Owner name, telemetry.
    pub workload_name: Arc<str>,
    /// True when it speaks HBONE itself.
    pub native_tunnel: bool,
    /// Delivery override.
    pub application_tunnel: Option<ApplicationTunnel>,
    /// The services it is an endpoint of, with the port mapping of each.
    #[serde(with = "services_by_name")]
    pub services: BTreeMap<NamespacedHostname, Vec<ServicePort>>,
    /// Names `namespace/name` of selector policies that apply to it.
    pub authorization_policies: Vec<Arc<str>>,
    /// Readiness.
    pub status: HealthStatus,
    /// Cluster id; `Kubernetes` by default.
    pub cluster_id: Arc<str>,
    /// Where it runs.
    pub locality: Locality,
    /// Weight in load balancing, 1 by default; 0 takes no new connections.
    pub capacity: u32,
}

impl Workload {
    /// The identity it proves itself by.
    ///
    /// # Errors
    /// When the controller sent names that make no SPIFFE path.
    pub fn identity(&self) -> Result<SpiffeId, InvalidSpiffeId> {
        SpiffeId::new(&self.trust_domain, &self.namespace, &self.service_account)
    }

    /// A workload with nothing but its key, name and namespace; for building others from.
    #[must_use]
    pub fn named(uid: &str, namespace: &str, name: &str) -> Self {
        Self {
            uid: WorkloadUid::new(uid),
            name: name.into(),
            namespace: namespace.into(),
            trust_domain: "cluster.local".into(),
            service_account: "default".into(),
            addresses: Vec::new(),
            hostname: "".into(),
            network: NetworkId::default(),
            tunnel_protocol: TunnelProtocol::None,
            network_mode: NetworkMode::Standard,
            network_gateway: None,
            waypoint: None,
            node: "".into(),
            canonical_name: "".into(),
            canonical_revision: "".into(),
            kind: WorkloadKind::Pod,
            workload_name: "".into(),
            native_tunnel: false,
            application_tunnel: None,
            services: BTreeMap::new(),
            authorization_policies: Vec::new(),
            status: HealthStatus::Healthy,
            cluster_id: "Kubernetes".into(),
            locality: Locality::default(),
            capacity: 1,
        }
    }
}

/// A map of services with `namespace/host` for its keys: JSON has no others than text.
mod services_by_name {
    use std::collections::BTreeMap;

    use serde::de::Error as _;
    use serde::{Deserialize as _, Deserializer, Serializer};

    use super::{NamespacedHostname, ServicePort};

    type Services = BTreeMap<NamespacedHostname, Vec<ServicePort>>;

    pub(super) fn serialize<S: Serializer>(
        services: &Services,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_map(services.iter().map(|(key, ports)| (key.to_string(), ports)))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Services, D::Error> {
        let by_name: BTreeMap<String, Vec<ServicePort>> = BTreeMap::deserialize(deserializer)?;
        let keyed = by_name.into_iter().map(|(name, ports)| match name.split_once('/') {
            Some((namespace, host)) => Ok((NamespacedHostname::new(namespace, host), ports)),
            None => Err(D::Error::custom(format_args!("not of the form namespace/host: {name}"))),
        });
        keyed.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_workload_with_services_goes_through_json() {
        let mut workload = Workload::named("Kubernetes//Pod/shop/cart-0", "shop", "cart-0");
        let key = NamespacedHostname::new("shop", "cart.shop.svc.cluster.local");
        let ports = vec![ServicePort { service_port: 80, target_port: 8080 }];
        workload.services.insert(key, ports);
        let json = serde_json::to_value(&workload).expect("every workload can be shown");
        assert!(json["services"]["shop/cart.shop.svc.cluster.local"].is_array());
        assert_eq!(serde_json::from_value::<Workload>(json).expect("its own JSON"), workload);
    }

    #[test]
    fn a_service_without_its_namespace_is_refused() {
        let workload = Workload::named("Kubernetes//Pod/shop/cart-0", "shop", "cart-0");
        let mut json = serde_json::to_value(workload).expect("every workload can be shown");
        json["services"] = serde_json::json!({ "cart": [] });
        let error = serde_json::from_value::<Workload>(json).unwrap_err();
        assert!(error.to_string().contains("namespace/host: cart"), "{error}");
    }
}

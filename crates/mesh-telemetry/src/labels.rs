//! The label set of traffic metrics.

use std::hash::{Hash, Hasher};
use std::sync::Arc;

use mesh_model::{Reporter, Service, SpiffeId, Workload};
use serde::{Deserialize, Serialize};

use crate::baggage::Baggage;

/// The value of a label about which nothing is known.
pub const UNKNOWN: &str = "unknown";

/// A label's value: shared with the index where it comes from, never copied per flow.
#[derive(Clone, Debug)]
pub enum LabelValue {
    /// A constant.
    Static(&'static str),
    /// A name from the index or from a peer.
    Shared(Arc<str>),
}

impl LabelValue {
    /// The text of it.
    #[must_use]
    pub fn as_str(&self) -> &str {
        match self {
            Self::Static(text) => text,
            Self::Shared(text) => text,
        }
    }

    /// `text`, or [`UNKNOWN`] when it is empty.
    fn or_unknown(text: &Arc<str>) -> Self {
        if text.is_empty() { Self::Static(UNKNOWN) } else { Self::Shared(Arc::clone(text)) }
    }
}

impl PartialEq for LabelValue {
    fn eq(&self, other: &Self) -> bool {
        self.as_str() == other.as_str()
    }
}

impl Eq for LabelValue {}

impl Hash for LabelValue {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.as_str().hash(state);
    }
}

/// Labels in their order; a key of one time series together with the metric's name.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct LabelSet(Vec<(&'static str, LabelValue)>);

impl LabelSet {
    /// A set of `labels`, in that order.
    #[must_use]
    pub fn new(labels: impl IntoIterator<Item = (&'static str, LabelValue)>) -> Self {
        Self(labels.into_iter().collect())
    }

    /// Names and values, in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&'static str, &LabelValue)> {
        self.0.iter().map(|(name, value)| (*name, value))
    }

    /// The value of `name`.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(known, _)| *known == name).map(|(_, value)| value.as_str())
    }
}

/// What metrics and logs say about one workload. Empty text where something is unknown.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct WorkloadLabels {
    /// Pod name, for the access log.
    pub pod: Arc<str>,
    /// Owner's name.
    pub workload: Arc<str>,
    /// Namespace.
    pub namespace: Arc<str>,
    /// Canonical service.
    pub canonical_service: Arc<str>,
    /// Canonical revision.
    pub canonical_revision: Arc<str>,
    /// Application: the canonical service, or the workload's name when a peer described itself.
    pub app: Arc<str>,
    /// Cluster id.
    pub cluster: Arc<str>,
    /// Region.
    pub region: Arc<str>,
    /// Zone.
    pub zone: Arc<str>,
}

/// What [`LabelValue::or_unknown`] makes the same is made the same.
fn shown(text: &Arc<str>) -> Arc<str> {
    if **text == *UNKNOWN { Arc::default() } else { Arc::clone(text) }
}

impl WorkloadLabels {
    /// Without what no label shows; none when nothing is left.
    fn shown(&self) -> Option<Self> {
        let shown = Self {
            pod: Arc::default(),
            workload: shown(&self.workload),
            namespace: shown(&self.namespace),
            canonical_service: shown(&self.canonical_service),
            canonical_revision: shown(&self.canonical_revision),
            app: shown(&self.app),
            cluster: shown(&self.cluster),
            region: shown(&self.region),
            zone: shown(&self.zone),
        };
        (shown != Self::default()).then_some(shown)
    }
}

impl From<&Workload> for WorkloadLabels {
    fn from(workload: &Workload) -> Self {
        Self {
            pod: Arc::clone(&workload.name),
            workload: Arc::clone(&workload.workload_name),
            namespace: Arc::clone(&workload.namespace),
            canonical_service: Arc::clone(&workload.canonical_name),
            canonical_revision: Arc::clone(&workload.canonical_revision),
            app: Arc::clone(&workload.canonical_name),
            cluster: Arc::clone(&workload.cluster_id),
            region: Arc::clone(&workload.locality.region),
            zone: Arc::clone(&workload.locality.zone),
        }
    }
}

impl From<&Baggage> for WorkloadLabels {
    fn from(baggage: &Baggage) -> Self {
        Self {
            pod: Arc::default(),
            workload: Arc::clone(&baggage.workload),
            namespace: Arc::clone(&baggage.namespace),
            canonical_service: Arc::clone(&baggage.service),
            canonical_revision: Arc::clone(&baggage.revision),
            app: Arc::clone(&baggage.workload),
            cluster: Arc::clone(&baggage.cluster),
            region: Arc::clone(&baggage.region),
            zone: Arc::clone(&baggage.zone),
        }
    }
}

/// What metrics and logs say about the service that was meant.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ServiceLabels {
    /// Host name.
    pub hostname: Arc<str>,
    /// Namespace.
    pub namespace: Arc<str>,
    /// Object name.
    pub name: Arc<str>,
}

impl ServiceLabels {
    /// Without what no label shows; none when nothing is left.
    fn shown(&self) -> Option<Self> {
        let shown = Self {
            hostname: shown(&self.hostname),
            namespace: shown(&self.namespace),
            name: shown(&self.name),
        };
        (shown != Self::default()).then_some(shown)
    }
}

impl From<&Service> for ServiceLabels {
    fn from(service: &Service) -> Self {
        Self {
            hostname: Arc::clone(&service.key.hostname),
            namespace: Arc::clone(&service.key.namespace),
            name: Arc::clone(&service.name),
        }
    }
}

/// Who talked to whom: everything the traffic labels are made of.
///
/// What the index knows about the source goes before its baggage; a waypoint takes the destination workload's place on
/// the source side, while the service stays the one that was meant.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct FlowFacts {
    /// The side that reports.
    pub reporter: Reporter,
    /// The client.
    pub source: Option<WorkloadLabels>,
    /// The client's identity, only where mutual TLS (or, on the direct path, the node) proved it.
    pub source_principal: Option<SpiffeId>,
    /// The server.
    pub destination: Option<WorkloadLabels>,
    /// The server's identity, under the same rule.
    pub destination_principal: Option<SpiffeId>,
    /// The service that was meant.
    pub service: Option<ServiceLabels>,
    /// True when both identities were proven by mutual TLS.
    pub mutual_tls: bool,
}

impl FlowFacts {
    /// Facts of a flow about which nothing is known but who reports it.
    #[must_use]
    pub const fn unknown(reporter: Reporter) -> Self {
        Self {
            reporter,
            source: None,
            source_principal: None,
            destination: None,
            destination_principal: None,
            service: None,
            mutual_tls: false,
        }
    }

    /// The same facts without what a peer may have made up: for counting on when there are too many time series.
    #[must_use]
    pub fn without_source(&self) -> Self {
        Self { source: None, source_principal: None, ..self.clone() }
    }

    /// The same facts without what no label shows: flows that are equal in this are one time series.
    ///
    /// Pods of one owner count together, and what a peer calls `unknown` is what nothing is known about.
    #[must_use]
    pub fn series(&self) -> Self {
        let shown =
            |labels: &Option<WorkloadLabels>| labels.as_ref().and_then(WorkloadLabels::shown);
        Self {
            source: shown(&self.source),
            destination: shown(&self.destination),
            service: self.service.as_ref().and_then(ServiceLabels::shown),
            ..self.clone()
        }
    }

    /// The traffic labels, with `response_flags` as given: `-`, or
    /// [`CloseReason::response_flags`](mesh_model::CloseReason::response_flags) once the flow has ended.
    ///
    /// Source: istio/ztunnel `src/proxy/metrics.rs` (labels and their order).
    #[must_use]
    pub fn labels(&self, response_flags: &'static str) -> LabelSet {
        use LabelValue::Static;
        let absent = WorkloadLabels::default();
        let no_service = ServiceLabels::default();
        let source = self.source.as_ref().unwrap_or(&absent);
        let destination = self.destination.as_ref().unwrap_or(&absent);
        let service = self.service.as_ref().unwrap_or(&no_service);
        let or_unknown = LabelValue::or_unknown;

        let mut labels = Vec::with_capacity(29);
        labels.extend([
            ("reporter", Static(self.reporter.as_str())),
            ("source_workload", or_unknown(&source.workload)),
            ("source_canonical_service", or_unknown(&source.canonical_service)),
            ("source_canonical_revision", or_unknown(&source.canonical_revision)),
            ("source_workload_namespace", or_unknown(&source.namespace)),
            ("source_principal", principal(self.source_principal.as_ref())),
            ("source_app", or_unknown(&source.app)),
            ("source_version", or_unknown(&source.canonical_revision)),
            ("source_cluster", or_unknown(&source.cluster)),
            ("destination_service", or_unknown(&service.hostname)),
            ("destination_service_namespace", or_unknown(&service.namespace)),
            ("destination_service_name", or_unknown(&service.name)),
            ("destination_workload", or_unknown(&destination.workload)),
            ("destination_canonical_service", or_unknown(&destination.canonical_service)),
            ("destination_canonical_revision", or_unknown(&destination.canonical_revision)),
            ("destination_workload_namespace", or_unknown(&destination.namespace)),
            ("destination_principal", principal(self.destination_principal.as_ref())),
            ("destination_app", or_unknown(&destination.app)),
            ("destination_version", or_unknown(&destination.canonical_revision)),
            ("destination_cluster", or_unknown(&destination.cluster)),
            ("request_protocol", Static("tcp")),
            ("response_flags", Static(response_flags)),
            (
                "connection_security_policy",
                Static(if self.mutual_tls { "mutual_tls" } else { UNKNOWN }),
            ),
        ]);
        if self.source.is_some() || self.destination.is_some() {
            labels.extend([
                ("source_region", or_unknown(&source.region)),
                ("source_zone", or_unknown(&source.zone)),
                ("destination_region", or_unknown(&destination.region)),
                ("destination_zone", or_unknown(&destination.zone)),
            ]);
        }
        LabelSet(labels)
    }
}

fn principal(id: Option<&SpiffeId>) -> LabelValue {
    id.map_or(LabelValue::Static(UNKNOWN), |id| LabelValue::Shared(id.as_str().into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_model::CloseReason;

    /// The order of wire.md §6.1, written down once more by hand.
    const ORDER: [&str; 27] = [
        "reporter",
        "source_workload",
        "source_canonical_service",
        "source_canonical_revision",
        "source_workload_namespace",
        "source_principal",
        "source_app",
        "source_version",
        "source_cluster",
        "destination_service",
        "destination_service_namespace",
        "destination_service_name",
        "destination_workload",
        "destination_canonical_service",
        "destination_canonical_revision",
        "destination_workload_namespace",
        "destination_principal",
        "destination_app",
        "destination_version",
        "destination_cluster",
        "request_protocol",
        "response_flags",
        "connection_security_policy",
        "source_region",
        "source_zone",
        "destination_region",
        "destination_zone",
    ];

    fn cart() -> Workload {
        let mut cart = Workload::named("Kubernetes//Pod/shop/cart-0", "shop", "cart-0");
        cart.workload_name = "cart".into();
        cart.canonical_name = "cart-service".into();
        cart.canonical_revision = "v2".into();
        cart.locality.region = "eu".into();
        cart
    }

    #[test]
    fn labels_come_in_istios_order() {
        let mut facts = FlowFacts::unknown(Reporter::Source);
        let names =
            |facts: &FlowFacts| facts.labels("-").iter().map(|(name, _)| name).collect::<Vec<_>>();
        assert_eq!(names(&facts), &ORDER[..23], "no localities while neither side is known");
        facts.destination = Some(WorkloadLabels::from(&cart()));
        assert_eq!(names(&facts), ORDER);
    }

    #[test]
    fn what_is_not_known_reads_unknown() {
        let facts = FlowFacts::unknown(Reporter::Destination);
        let labels = facts.labels("-");
        assert_eq!(labels.get("source_workload"), Some("unknown"));
        assert_eq!(labels.get("destination_principal"), Some("unknown"));
        assert_eq!(labels.get("connection_security_policy"), Some("unknown"));
        assert_eq!(labels.get("reporter"), Some("destination"));
        assert!(labels.iter().all(|(_, value)| !value.as_str().is_empty()));
    }

    #[test]
    fn a_known_workload_fills_its_labels() {
        let cart = cart();
        let mut facts = FlowFacts::unknown(Reporter::Source);
        facts.destination = Some(WorkloadLabels::from(&cart));
        facts.destination_principal = cart.identity().ok();
        facts.service = Some(ServiceLabels::from(&Service::named(
            "shop",
            "cart.shop.svc.cluster.local",
            "cart",
        )));
        facts.mutual_tls = true;
        let labels = facts.labels(CloseReason::PolicyDenied.response_flags());
        let expected = [
            ("destination_workload", "cart"),
            ("destination_app", "cart-service"),
            ("destination_version", "v2"),
            ("destination_cluster", "Kubernetes"),
            ("destination_principal", "spiffe://cluster.local/ns/shop/sa/default"),
            ("destination_service", "cart.shop.svc.cluster.local"),
            ("destination_service_name", "cart"),
            ("destination_region", "eu"),
            ("destination_zone", "unknown"),
            ("response_flags", "DENY"),
            ("connection_security_policy", "mutual_tls"),
        ];
        for (name, value) in expected {
            assert_eq!(labels.get(name), Some(value), "{name}");
        }
    }

    #[test]
    fn what_no_label_shows_makes_no_series() {
        let of_pod = |pod: &str| {
            let mut facts = FlowFacts::unknown(Reporter::Source);
            facts.destination = Some(WorkloadLabels { pod: pod.into(), ..(&cart()).into() });
            facts
        };
        assert_ne!(of_pod("cart-0"), of_pod("cart-1"));
        assert_eq!(of_pod("cart-0").series(), of_pod("cart-1").series());
        assert_eq!(of_pod("cart-0").series().labels("-"), of_pod("cart-0").labels("-"));

        let nothing = FlowFacts::unknown(Reporter::Destination);
        let made_up = WorkloadLabels { workload: UNKNOWN.into(), ..WorkloadLabels::default() };
        for source in [WorkloadLabels::default(), made_up] {
            let facts = FlowFacts { source: Some(source), ..nothing.clone() };
            assert_eq!(facts.series(), nothing);
        }
    }

    #[test]
    fn a_source_known_by_baggage_is_its_own_app() {
        let baggage = Baggage { workload: "edge".into(), ..Baggage::default() };
        assert_eq!(&*WorkloadLabels::from(&baggage).app, "edge");
    }
}

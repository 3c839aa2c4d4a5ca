//! Istio's DNS metrics: who asked what, and how resolvers did.
//!
//! Source: istio/ztunnel `src/dns/metrics.rs` (names and labels).

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use mesh_dns::{Transport, query_type_label};
use mesh_model::{Reporter, Workload};
use mesh_telemetry::labels::UNKNOWN;
use mesh_telemetry::metric::{self, DNS_LABELS};
use mesh_telemetry::{FlowFacts, WorkloadLabels};
use metrics::{Label, counter, histogram};

/// Sources that have time series of their own; further ones, of the pods that come and go, are counted as unknown.
const MAX_SOURCES: usize = 2048;

/// Counts queries.
#[derive(Debug, Default)]
pub(super) struct DnsMeter {
    sources: Mutex<BTreeSet<String>>,
}

/// One query, as it is counted.
#[derive(Clone, Debug)]
pub(super) struct CountedQuery {
    labels: Vec<Label>,
}

impl DnsMeter {
    /// Counts a query of a pod, whose workload may not be known.
    pub(super) fn asked(
        &self,
        source: Option<&Workload>,
        query: &[u8],
        transport: Transport,
    ) -> CountedQuery {
        let (service, revision) = match source {
            Some(source) => (&*source.canonical_name, &*source.canonical_revision),
            None => ("", ""),
        };
        let known = self.admit(format!("{service}/{revision}"));
        let named = |text: &str| {
            if known && !text.is_empty() { text.to_owned() } else { UNKNOWN.to_owned() }
        };
        let protocol = match transport {
            Transport::Udp => "udp",
            Transport::Tcp => "tcp",
        };
        let values = [
            query_type_label(query).to_owned(),
            protocol.to_owned(),
            named(service),
            named(revision),
        ];
        let labels =
            DNS_LABELS.iter().zip(values).map(|(name, value)| Label::new(*name, value)).collect();
        let query = CountedQuery { labels };
        counter!(metric::DNS_REQUESTS.name, query.labels.clone()).increment(1);
        query
    }

    /// Counts a workload's host name that was looked up for a connection of a pod.
    pub(super) fn on_demand(&self, source: Option<&Workload>, hostname: &str) {
        let mut facts = FlowFacts::unknown(Reporter::Source);
        facts.source = source.map(WorkloadLabels::from);
        facts.source_principal = source.and_then(|source| source.identity().ok());
        let of_source = |name: &str| {
            name.starts_with("source_") && !name.ends_with("_region") && !name.ends_with("_zone")
        };
        let all = facts.labels("-");
        let mut labels: Vec<Label> = all
            .iter()
            .filter(|(name, _)| of_source(name))
            .map(|(name, value)| Label::new(name, value.as_str().to_owned()))
            .collect();
        let workload = source.map_or("", |source| source.uid.as_str());
        let known = self.admit(format!("{workload} {hostname}"));
        labels.push(Label::new("hostname", if known { hostname } else { UNKNOWN }.to_owned()));
        counter!(metric::ON_DEMAND_DNS.name, labels).increment(1);
    }

    fn admit(&self, source: String) -> bool {
        let mut sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
        if sources.len() < MAX_SOURCES {
            sources.insert(source);
            return true;
        }
        sources.contains(&source)
    }
}

impl CountedQuery {
    /// It is handed on to a resolver.
    pub(super) fn forwarded(&self) {
        counter!(metric::DNS_UPSTREAM_REQUESTS.name, self.labels.clone()).increment(1);
    }

    /// The resolver answered.
    pub(super) fn answered(&self, took: Duration) {
        histogram!(metric::DNS_UPSTREAM_SECONDS.name, self.labels.clone())
            .record(took.as_secs_f64());
    }

    /// The resolver did not.
    pub(super) fn failed(&self) {
        counter!(metric::DNS_UPSTREAM_FAILURES.name, self.labels.clone()).increment(1);
    }
}

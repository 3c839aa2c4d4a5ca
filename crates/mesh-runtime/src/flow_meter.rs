//! Istio's TCP metrics and ours, per pair of workloads.
//!
//! They have 27 labels each and live as long as their pods, so they are kept here rather than in the recorder: one
//! entry per pair holds all five counters, an open flow counts through a pointer, and what nobody uses expires.

mod named;

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use mesh_telemetry::metric::{self, Metric};
use mesh_telemetry::{
    EarlyDenial, FlowBytes, FlowFacts, FlowPath, FlowRecord, LabelSet, PolicyRef,
};
use metrics::{counter, gauge};
use serde::{Deserialize, Serialize};

use named::{NamedCounts, NamedSeries};

pub use named::WrittenNamed;

/// Bounds of the traffic counters.
#[derive(Clone, Copy, Debug)]
pub struct FlowMeterConfig {
    /// How long a series without open flows is kept after its last change. Default 15 minutes: three of Prometheus'
    /// five-minute windows.
    pub idle: Duration,
    /// Most pairs of workloads, all pods of an owner being one; flows of further ones are counted without their source,
    /// which a peer may make up. Also most policies and rules that are counted by name. Default 10,000.
    pub max_series: usize,
}

impl Default for FlowMeterConfig {
    fn default() -> Self {
        Self { idle: Duration::from_secs(15 * 60), max_series: 10_000 }
    }
}

/// The counters of one pair.
#[derive(Debug, Default)]
struct Series {
    opened: AtomicU64,
    received: AtomicU64,
    sent: AtomicU64,
    /// By `response_flags`, of which there are eight.
    closed: Mutex<BTreeMap<&'static str, u64>>,
}

#[derive(Debug)]
struct Kept {
    series: Arc<Series>,
    used: Instant,
}

/// Counts flows. Shared by every thread of the data plane.
#[derive(Debug)]
pub struct FlowMeter {
    config: FlowMeterConfig,
    /// By what their labels show.
    series: Mutex<HashMap<FlowFacts, Kept>>,
    named: Mutex<NamedCounts>,
}

/// The counters of one pair, on their way to a successor process.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct WrittenSeries {
    facts: FlowFacts,
    opened: u64,
    received: u64,
    sent: u64,
    closed: BTreeMap<String, u64>,
}

/// A flow that is counted as open until [`FlowMeter::closed`] takes it back.
#[derive(Debug)]
#[must_use = "hand it back to `FlowMeter::closed`, or the flow counts as open for ever"]
pub struct OpenFlow {
    /// The key of its series.
    facts: FlowFacts,
    path: FlowPath,
    series: Arc<Series>,
    counted: FlowBytes,
}

impl OpenFlow {
    /// Counts bytes while the flow is open; `total` is what it has moved since its beginning. No lock, no allocation.
    pub fn moved(&mut self, total: FlowBytes) {
        let added = total.since(self.counted);
        self.counted = total;
        self.series.received.fetch_add(added.client_to_server, Ordering::Relaxed);
        self.series.sent.fetch_add(added.server_to_client, Ordering::Relaxed);
    }
}

impl FlowMeter {
    /// No flows yet.
    #[must_use]
    pub fn new(config: FlowMeterConfig) -> Self {
        Self { config, series: Mutex::default(), named: Mutex::default() }
    }

    /// Counts a flow as opened.
    pub fn opened(&self, facts: FlowFacts, path: FlowPath) -> OpenFlow {
        let (facts, series) = self.series_of(&facts);
        series.opened.fetch_add(1, Ordering::Relaxed);
        gauge!(metric::TCP_SOCKETS_OPEN.name, "reporter" => facts.reporter.as_str()).increment(1.0);
        gauge!(metric::FLOWS_OPEN.name, "path" => path.as_str()).increment(1.0);
        OpenFlow { facts, path, series, counted: FlowBytes::default() }
    }

    /// Counts a flow as open that a predecessor has counted as opened, and `counted` of its bytes.
    pub fn taken_over(&self, facts: FlowFacts, path: FlowPath, counted: FlowBytes) -> OpenFlow {
        let (facts, series) = self.series_of(&facts);
        gauge!(metric::TCP_SOCKETS_OPEN.name, "reporter" => facts.reporter.as_str()).increment(1.0);
        gauge!(metric::FLOWS_OPEN.name, "path" => path.as_str()).increment(1.0);
        OpenFlow { facts, path, series, counted }
    }

    /// The counters by name of a policy, for a successor.
    #[must_use]
    pub fn written_named(&self) -> Vec<WrittenNamed> {
        lock(&self.named).written()
    }

    /// Goes on counting by name where a predecessor stopped.
    pub fn take_over_named(&self, written: Vec<WrittenNamed>) {
        lock(&self.named).take_over(&self.config, written);
    }

    /// All series of traffic, for a successor.
    #[must_use]
    pub fn written(&self) -> Vec<WrittenSeries> {
        let write = |(facts, kept): (&FlowFacts, &Kept)| WrittenSeries {
            facts: facts.clone(),
            opened: kept.series.opened.load(Ordering::Relaxed),
            received: kept.series.received.load(Ordering::Relaxed),
            sent: kept.series.sent.load(Ordering::Relaxed),
            closed: lock(&kept.series.closed)
                .iter()
                .map(|(flags, count)| ((*flags).to_owned(), *count))
                .collect(),
        };
        lock(&self.series).iter().map(write).collect()
    }

    /// Goes on counting where a predecessor stopped. `known` gives the response flags that there are; closed flows with
    /// others are left out.
    pub fn take_over(
        &self,
        written: Vec<WrittenSeries>,
        known: impl Fn(&str) -> Option<&'static str>,
    ) {
        for WrittenSeries { facts, opened, received, sent, closed } in written {
            let (_key, series) = self.series_of(&facts);
            series.opened.fetch_add(opened, Ordering::Relaxed);
            series.received.fetch_add(received, Ordering::Relaxed);
            series.sent.fetch_add(sent, Ordering::Relaxed);
            let mut counts = lock(&series.closed);
            for (flags, count) in closed {
                if let Some(flags) = known(&flags) {
                    *counts.entry(flags).or_default() += count;
                }
            }
        }
    }

    /// Counts a flow as closed, and as failed and denied where its reason says so.
    pub fn closed(&self, mut flow: OpenFlow, record: &FlowRecord) {
        flow.moved(record.bytes);
        let flags = record.reason.response_flags();
        *lock(&flow.series.closed).entry(flags).or_default() += 1;
        if let Some(kept) = lock(&self.series).get_mut(&flow.facts) {
            kept.used = Instant::now();
        }
        let reporter = flow.facts.reporter.as_str();
        gauge!(metric::TCP_SOCKETS_OPEN.name, "reporter" => reporter).decrement(1.0);
        gauge!(metric::FLOWS_OPEN.name, "path" => flow.path.as_str()).decrement(1.0);
        let reason = record.reason.as_str();
        counter!(
            metric::FLOWS_CLOSED.name,
            "reporter" => reporter, "path" => record.path.as_str(), "reason" => reason
        )
        .increment(1);
        if flags == "DENY" {
            let policy = record.policy.as_ref();
            let denial = NamedSeries::denial(reporter, reason, policy);
            lock(&self.named).add(&self.config, denial, 1);
        }
        if flags == REVOKED {
            counter!(metric::CRL_REJECTIONS.name, "reporter" => reporter).increment(1);
        }
    }

    /// Counts a flow that was refused before anything moved: opened, closed and failed at once.
    pub fn refused(&self, record: &FlowRecord) {
        let flow = self.opened(record.facts.clone(), record.path);
        self.closed(flow, record);
    }

    /// Counts a connection that did not become a flow.
    pub fn early_denial(&self, denial: &EarlyDenial) {
        counter!(
            metric::EARLY_DENIALS.name,
            "direction" => denial.direction.reporter().as_str(), "reason" => denial.reason.as_str()
        )
        .increment(1);
        if denial.reason.response_flags() == REVOKED {
            let reporter = denial.direction.reporter().as_str();
            counter!(metric::CRL_REJECTIONS.name, "reporter" => reporter).increment(1);
        }
    }

    /// Counts a match of an AUDIT policy (`audit`) or of a policy that is tried out (`dry_run`).
    pub fn policy_note(&self, note: &str, policy: &PolicyRef) {
        lock(&self.named).add(&self.config, NamedSeries::note(note, policy), 1);
    }

    /// The series of flows with these facts, and its key.
    fn series_of(&self, facts: &FlowFacts) -> (FlowFacts, Arc<Series>) {
        let now = Instant::now();
        let mut key = facts.series();
        let mut all = lock(&self.series);
        if !all.contains_key(&key) && all.len() >= self.config.max_series {
            self.expire(&mut all, now);
            if all.len() >= self.config.max_series {
                counter!(metric::SERIES_FOLDED.name).increment(1);
                key = key.without_source();
            }
        }
        let fresh = || Kept { series: Arc::default(), used: now };
        let kept = all.entry(key.clone()).or_insert_with(fresh);
        kept.used = now;
        let series = Arc::clone(&kept.series);
        (key, series)
    }

    fn expire(&self, all: &mut HashMap<FlowFacts, Kept>, now: Instant) {
        all.retain(|_, kept| {
            let open = Arc::strong_count(&kept.series) > 1;
            open || now.saturating_duration_since(kept.used) < self.config.idle
        });
    }

    /// All of this as Prometheus text, series in stable order; what has expired at `now` is forgotten.
    #[must_use]
    pub fn render(&self, now: Instant) -> String {
        let mut all = lock(&self.series);
        self.expire(&mut all, now);
        let series: Vec<(FlowFacts, Arc<Series>)> =
            all.iter().map(|(facts, kept)| (facts.clone(), Arc::clone(&kept.series))).collect();
        drop(all);

        let mut opened = Vec::with_capacity(series.len());
        let mut received = Vec::with_capacity(series.len());
        let mut sent = Vec::with_capacity(series.len());
        let mut closed = Vec::with_capacity(series.len());
        let mut failed = Vec::new();
        for (facts, series) in series {
            let labels = label_text(&facts.labels("-"));
            opened.push((labels.clone(), series.opened.load(Ordering::Relaxed)));
            received.push((labels.clone(), series.received.load(Ordering::Relaxed)));
            sent.push((labels, series.sent.load(Ordering::Relaxed)));
            for (flags, count) in lock(&series.closed).iter() {
                let labels = label_text(&facts.labels(flags));
                if *flags != "-" {
                    failed.push((labels.clone(), *count));
                }
                closed.push((labels, *count));
            }
        }
        let mut text = String::new();
        for (metric, lines) in [
            (&metric::TCP_CONNECTIONS_OPENED, opened),
            (&metric::TCP_CONNECTIONS_CLOSED, closed),
            (&metric::TCP_CONNECTIONS_FAILED, failed),
            (&metric::TCP_RECEIVED_BYTES, received),
            (&metric::TCP_SENT_BYTES, sent),
        ] {
            render_metric(&mut text, metric, lines);
        }
        let mut named = lock(&self.named);
        named.expire(&self.config, now);
        for metric in [&metric::DENIALS, &metric::POLICY_NOTES] {
            let series = named.series_of(metric);
            let lines = series.map(|(labels, count)| (label_text(&labels), count));
            render_metric(&mut text, metric, lines.collect());
        }
        text
    }
}

/// What a flow's end is flagged with when its peer's certificate is revoked. Source: Istio's `response_flags`.
const REVOKED: &str = "CERT_REVOKED";

fn render_metric(text: &mut String, metric: &Metric, mut lines: Vec<(String, u64)>) {
    if lines.is_empty() {
        return;
    }
    lines.sort();
    writeln!(text, "# HELP {} {}\n# TYPE {} counter", metric.name, metric.help, metric.name)
        .expect("a String takes everything");
    for (labels, value) in lines {
        writeln!(text, "{}{{{labels}}} {value}", metric.name).expect("a String takes everything");
    }
    text.push('\n');
}

/// Source: Prometheus text exposition format: `\`, `"` and newline are escaped.
fn label_text(labels: &LabelSet) -> String {
    let mut text = String::with_capacity(1024);
    for (position, (name, value)) in labels.iter().enumerate() {
        if position > 0 {
            text.push(',');
        }
        text.push_str(name);
        text.push_str("=\"");
        for character in value.as_str().chars() {
            match character {
                '\\' => text.push_str("\\\\"),
                '"' => text.push_str("\\\""),
                '\n' => text.push_str("\\n"),
                other => text.push(other),
            }
        }
        text.push('"');
    }
    text
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use mesh_telemetry::WorkloadLabels;

    /// A record to end flows with, taken from the log's own tests in spirit: only what counting looks at matters.
    pub(crate) fn record(facts: &FlowFacts, reason: &str, bytes: FlowBytes) -> FlowRecord {
        FlowRecord {
            id: serde_json::from_str("1").unwrap(),
            pod: serde_json::from_str("\"p\"").unwrap(),
            direction: serde_json::from_str("\"Outbound\"").unwrap(),
            source: "10.0.0.1:1".parse().unwrap(),
            destination: "10.0.0.2:15008".parse().unwrap(),
            authority: None,
            facts: facts.clone(),
            path: FlowPath::Tunnel,
            bytes,
            duration: Duration::ZERO,
            reason: serde_json::from_str(&format!("\"{reason}\"")).unwrap(),
            policy: None,
            detail: None,
            trace: None,
        }
    }

    /// Facts of a flow from `pod`, one of several of the owner `workload`.
    fn facts_of_pod(pod: &str, workload: &str) -> FlowFacts {
        let mut facts = facts(workload);
        facts.source.as_mut().unwrap().pod = pod.into();
        facts
    }

    pub(crate) fn facts(source: &str) -> FlowFacts {
        let mut facts = FlowFacts::unknown(serde_json::from_str("\"Source\"").unwrap());
        facts.source =
            Some(WorkloadLabels { workload: source.into(), ..WorkloadLabels::default() });
        facts
    }

    fn value(text: &str, name: &str, needle: &str) -> Option<u64> {
        let line = text
            .lines()
            .find(|line| line.starts_with(&format!("{name}{{")) && line.contains(needle))?;
        line.rsplit(' ').next()?.parse().ok()
    }

    #[test]
    fn a_flow_is_counted_from_open_to_close() {
        let meter = FlowMeter::new(FlowMeterConfig::default());
        let facts = facts("web \"x\"");
        let mut flow = meter.opened(facts.clone(), FlowPath::Tunnel);
        flow.moved(FlowBytes { client_to_server: 5, server_to_client: 7 });
        let text = meter.render(Instant::now());
        assert!(text.contains("source_workload=\"web \\\"x\\\"\""), "{text}");
        assert_eq!(value(&text, "istio_tcp_received_bytes_total", "web"), Some(5));
        assert_eq!(value(&text, "istio_tcp_sent_bytes_total", "web"), Some(7));
        assert_eq!(value(&text, "istio_tcp_connections_opened_total", "web"), Some(1));
        assert!(!text.contains("closed_total"), "{text}");

        let total = FlowBytes { client_to_server: 10, server_to_client: 7 };
        meter.closed(flow, &record(&facts, "complete", total));
        meter.refused(&record(&facts, "policy_denied", FlowBytes::default()));
        let text = meter.render(Instant::now());
        assert_eq!(value(&text, "istio_tcp_received_bytes_total", "web"), Some(10));
        assert_eq!(value(&text, "istio_tcp_connections_opened_total", "web"), Some(2));
        let closed = "istio_tcp_connections_closed_total";
        assert_eq!(value(&text, closed, "response_flags=\"-\""), Some(1));
        assert_eq!(value(&text, closed, "response_flags=\"DENY\""), Some(1));
        let failed = "istio_tcp_connections_failed_total";
        assert_eq!(value(&text, failed, "response_flags=\"DENY\""), Some(1));
        assert_eq!(value(&text, failed, "response_flags=\"-\""), None);
    }

    #[test]
    fn pods_of_one_owner_are_one_series() {
        let config = FlowMeterConfig { max_series: 1, ..FlowMeterConfig::default() };
        let meter = FlowMeter::new(config);
        let total = FlowBytes { client_to_server: 3, server_to_client: 4 };
        for pod in ["web-0", "web-1"] {
            let facts = facts_of_pod(pod, "web");
            let flow = meter.opened(facts.clone(), FlowPath::Tunnel);
            meter.closed(flow, &record(&facts, "complete", total));
        }
        let text = meter.render(Instant::now());
        let mut names: Vec<_> =
            text.lines().filter_map(|line| line.rsplit_once(' ')).map(|(name, _)| name).collect();
        let all = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), all, "a series comes twice:\n{text}");
        for (name, expected) in [
            ("istio_tcp_connections_opened_total", 2),
            ("istio_tcp_connections_closed_total", 2),
            ("istio_tcp_received_bytes_total", 6),
            ("istio_tcp_sent_bytes_total", 8),
        ] {
            assert_eq!(value(&text, name, "source_workload=\"web\""), Some(expected), "{name}");
        }
    }

    #[test]
    fn policies_are_counted_by_name_and_expire() {
        let meter = FlowMeter::new(FlowMeterConfig { max_series: 2, ..FlowMeterConfig::default() });
        let policy = |name: &str, problem: &str| PolicyRef {
            policy: format!("AuthorizationPolicy shop/{name}").into(),
            problem: Some(problem.into()),
            rule: Some(1),
        };
        for problem in ["a", "b"] {
            let mut record = record(&facts("web"), "policy_missing", FlowBytes::default());
            record.policy = Some(policy("torn", problem));
            meter.refused(&record);
            meter.policy_note("audit", &policy("seen", problem));
        }
        meter.policy_note("audit", &policy("one-too-many", ""));
        let text = meter.render(Instant::now());
        for line in [
            "culvert_denials_total{reporter=\"source\",reason=\"policy_missing\",\
             policy=\"AuthorizationPolicy shop/torn\",rule=\"1\"} 2",
            "culvert_policy_notes_total{note=\"audit\",policy=\"AuthorizationPolicy shop/seen\",rule=\"1\"} 2",
            "culvert_policy_notes_total{note=\"audit\",policy=\"\",rule=\"\"} 1",
            "# TYPE culvert_denials_total counter",
        ] {
            assert!(text.lines().any(|have| have == line), "{line} is not in\n{text}");
        }
        let successor = FlowMeter::new(FlowMeterConfig::default());
        let written = serde_json::to_string(&meter.written_named()).unwrap();
        successor.take_over_named(serde_json::from_str(&written).unwrap());
        let carried = successor.render(Instant::now());
        assert!(
            carried.contains("policy=\"AuthorizationPolicy shop/torn\",rule=\"1\"} 2"),
            "{carried}"
        );
        assert_eq!(meter.render(Instant::now() + FlowMeterConfig::default().idle), "");
    }

    #[test]
    fn series_without_flows_expire_and_open_ones_do_not() {
        let meter = FlowMeter::new(FlowMeterConfig::default());
        let (gone, live) = (facts("gone"), facts("live"));
        meter.refused(&record(&gone, "complete", FlowBytes::default()));
        let flow = meter.opened(live, FlowPath::Tunnel);
        let later = Instant::now() + FlowMeterConfig::default().idle;
        let text = meter.render(later);
        assert!(text.contains("live") && !text.contains("gone"), "{text}");
        drop(flow);
        assert_eq!(meter.render(later), "");
    }

    #[test]
    fn too_many_sources_share_a_series() {
        let config = FlowMeterConfig { max_series: 3, ..FlowMeterConfig::default() };
        let meter = FlowMeter::new(config);
        for number in 0..100 {
            let facts = facts(&format!("made-up-{number}"));
            meter.refused(&record(&facts, "complete", FlowBytes::default()));
        }
        let text = meter.render(Instant::now());
        let opened: Vec<_> = text
            .lines()
            .filter(|line| line.starts_with("istio_tcp_connections_opened_total{"))
            .collect();
        assert_eq!(opened.len(), 4, "{opened:#?}");
        assert_eq!(
            value(&text, "istio_tcp_connections_opened_total", "source_workload=\"unknown\""),
            Some(97)
        );
    }
}

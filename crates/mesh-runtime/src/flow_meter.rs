//! Istio's TCP metrics and ours, per pair of workloads.
//!
//! They have 27 labels each and live as long as their pods, so they are kept here rather than in the recorder: one
//! entry per pair holds all five counters, an open flow counts through a pointer, and what nobody uses expires.

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

/// Bounds of the traffic counters.
#[derive(Clone, Copy, Debug)]
pub struct FlowMeterConfig {
    /// How long a series without open flows is kept after its last change. Default 15 minutes: three of Prometheus'
    /// five-minute windows.
    pub idle: Duration,
    /// Most pairs of workloads; flows of further ones are counted without their source, which a peer may make up.
    /// Default 10,000.
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
    series: Mutex<HashMap<FlowFacts, Kept>>,
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
        Self { config, series: Mutex::new(HashMap::new()) }
    }

    /// Counts a flow as opened.
    pub fn opened(&self, facts: FlowFacts, path: FlowPath) -> OpenFlow {
        let series = self.series_of(&facts);
        series.opened.fetch_add(1, Ordering::Relaxed);
        gauge!(metric::TCP_SOCKETS_OPEN.name, "reporter" => facts.reporter.as_str()).increment(1.0);
        gauge!(metric::FLOWS_OPEN.name, "path" => path.as_str()).increment(1.0);
        OpenFlow { facts, path, series, counted: FlowBytes::default() }
    }

    /// Counts a flow as open that a predecessor has counted as opened, and `counted` of its bytes.
    pub fn taken_over(&self, facts: FlowFacts, path: FlowPath, counted: FlowBytes) -> OpenFlow {
        let series = self.series_of(&facts);
        gauge!(metric::TCP_SOCKETS_OPEN.name, "reporter" => facts.reporter.as_str()).increment(1.0);
        gauge!(metric::FLOWS_OPEN.name, "path" => path.as_str()).increment(1.0);
        OpenFlow { facts, path, series, counted }
    }

    /// All series, for a successor.
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
            let series = self.series_of(&facts);
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
            let (policy, rule) = policy_labels(record.policy.as_ref());
            counter!(
                metric::DENIALS.name,
                "reporter" => reporter, "reason" => reason, "policy" => policy, "rule" => rule
            )
            .increment(1);
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
    }

    /// Counts a match of an AUDIT policy (`audit`) or of a policy that is tried out (`dry_run`).
    pub fn policy_note(&self, note: &'static str, policy: &PolicyRef) {
        let (policy, rule) = policy_labels(Some(policy));
        counter!(metric::POLICY_NOTES.name, "note" => note, "policy" => policy, "rule" => rule)
            .increment(1);
    }

    fn series_of(&self, facts: &FlowFacts) -> Arc<Series> {
        let now = Instant::now();
        let mut all = lock(&self.series);
        if let Some(kept) = all.get_mut(facts) {
            kept.used = now;
            return Arc::clone(&kept.series);
        }
        if all.len() < self.config.max_series {
            return new_series(&mut all, facts.clone(), now);
        }
        self.expire(&mut all, now);
        if all.len() < self.config.max_series {
            return new_series(&mut all, facts.clone(), now);
        }
        counter!(metric::SERIES_FOLDED.name).increment(1);
        new_series(&mut all, facts.without_source(), now)
    }

    fn expire(&self, all: &mut HashMap<FlowFacts, Kept>, now: Instant) {
        all.retain(|_, kept| {
            let open = Arc::strong_count(&kept.series) > 1;
            open || now.saturating_duration_since(kept.used) < self.config.idle
        });
    }

    /// The traffic metrics as Prometheus text, series in stable order; what has expired at `now` is forgotten.
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
        text
    }
}

fn new_series(all: &mut HashMap<FlowFacts, Kept>, facts: FlowFacts, used: Instant) -> Arc<Series> {
    let kept = all.entry(facts).or_insert_with(|| Kept { series: Arc::default(), used });
    kept.used = used;
    Arc::clone(&kept.series)
}

fn policy_labels(policy: Option<&PolicyRef>) -> (String, String) {
    let rule =
        policy.and_then(|policy| policy.rule).map_or_else(String::new, |rule| rule.to_string());
    (policy.map_or_else(String::new, |policy| policy.policy.to_string()), rule)
}

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
mod tests {
    use super::*;
    use mesh_telemetry::WorkloadLabels;

    /// A record to end flows with, taken from the log's own tests in spirit: only what counting looks at matters.
    fn record(facts: &FlowFacts, reason: &str, bytes: FlowBytes) -> FlowRecord {
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

    fn facts(source: &str) -> FlowFacts {
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

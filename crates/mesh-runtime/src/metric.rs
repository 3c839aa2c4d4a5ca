//! Metrics: the process's recorder, the traffic counters, one rendering of both.

mod carried;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use mesh_telemetry::metric::{self, MetricKind};
use metrics::{SetRecorderError, counter, gauge};
use metrics_exporter_prometheus::{
    BuildError, Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder,
};
use serde::{Deserialize, Serialize};

use crate::flow_meter::{FlowMeter, FlowMeterConfig, WrittenNamed, WrittenSeries};
use crate::log::LogHandle;
use crate::process;
use carried::Carried;

/// Content type of a rendering. Source: Prometheus text exposition format 0.0.4.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Metrics that cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum MetricsError {
    /// The buckets of a histogram are wrong.
    #[error("cannot describe a histogram")]
    Buckets(#[source] BuildError),
    /// Another recorder is installed.
    #[error("metrics are set up already")]
    Installed(#[source] SetRecorderError<PrometheusRecorder>),
}

/// The metrics of this process; cheap to clone.
#[derive(Clone, Debug)]
pub struct Metrics {
    prometheus: PrometheusHandle,
    flows: Arc<FlowMeter>,
    log: Option<LogHandle>,
    carried: Arc<Mutex<Carried>>,
}

/// Counters on their way to a successor process.
#[derive(Debug, Serialize, Deserialize)]
pub struct WrittenMetrics {
    traffic: Vec<WrittenSeries>,
    /// Absent from a predecessor that counted them among the others.
    #[serde(default)]
    named: Vec<WrittenNamed>,
    /// Prometheus text.
    others: String,
}

impl Metrics {
    /// Installs the recorder behind `metrics::counter!` and its like, and describes every metric.
    ///
    /// `component` and `version` become the labels of `istio_build`; `log` supplies its count of dropped lines.
    ///
    /// # Errors
    /// [`MetricsError::Installed`] on a second call.
    pub fn install(
        component: &'static str,
        version: &'static str,
        flows: FlowMeterConfig,
        log: Option<LogHandle>,
    ) -> Result<Self, MetricsError> {
        let dns = Matcher::Full(metric::DNS_UPSTREAM_SECONDS.name.to_owned());
        let mut builder = PrometheusBuilder::new()
            .set_buckets_for_metric(dns, &metric::DNS_SECONDS_BUCKETS)
            .map_err(MetricsError::Buckets)?;
        for of in [metric::REQUEST_DURATION, metric::REQUEST_BYTES, metric::RESPONSE_BYTES] {
            builder = builder
                .set_buckets_for_metric(Matcher::Full(of.name.to_owned()), &metric::REQUEST_BUCKETS)
                .map_err(MetricsError::Buckets)?;
        }
        let recorder = builder.build_recorder();
        let prometheus = recorder.handle();
        metrics::set_global_recorder(recorder).map_err(MetricsError::Installed)?;
        for metric in metric::ALL {
            match metric.kind {
                MetricKind::Counter => metrics::describe_counter!(metric.name, metric.help),
                MetricKind::Gauge => metrics::describe_gauge!(metric.name, metric.help),
                MetricKind::Histogram => metrics::describe_histogram!(metric.name, metric.help),
            }
        }
        gauge!(metric::BUILD.name, "component" => component, "tag" => version).set(1.0);
        let flows = Arc::new(FlowMeter::new(flows));
        Ok(Self { prometheus, flows, log, carried: Arc::default() })
    }

    /// The counters of traffic.
    #[must_use]
    pub const fn flows(&self) -> &Arc<FlowMeter> {
        &self.flows
    }

    /// All metrics as text of [`CONTENT_TYPE`].
    #[must_use]
    pub fn render(&self) -> String {
        let mut text = self.flows.render(Instant::now());
        text.push_str(&process::render());
        text.push_str(&self.render_recorder());
        text
    }

    /// All counters, for a successor; what is counted afterwards is lost.
    #[must_use]
    pub fn written(&self) -> WrittenMetrics {
        WrittenMetrics {
            traffic: self.flows.written(),
            named: self.flows.written_named(),
            others: self.render_recorder(),
        }
    }

    /// Goes on counting where a predecessor stopped. `flags` gives the response flags that there are; counters for which
    /// `elsewhere` is true are kept by somebody else over the processes' lives.
    pub fn take_over(
        &self,
        written: WrittenMetrics,
        flags: impl Fn(&str) -> Option<&'static str>,
        elsewhere: impl Fn(&str) -> bool,
    ) {
        self.flows.take_over(written.traffic, flags);
        self.flows.take_over_named(written.named);
        *self.carried() = Carried::parse(&written.others, elsewhere);
    }

    fn render_recorder(&self) -> String {
        if let Some(log) = &self.log {
            counter!(metric::LOG_LINES_DROPPED.name).absolute(log.dropped_lines());
        }
        self.prometheus.run_upkeep();
        self.carried().add_to(&self.prometheus.render())
    }

    fn carried(&self) -> MutexGuard<'_, Carried> {
        self.carried.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use metrics::histogram;

    /// The recorder is one per process, so one test tells its whole story.
    #[test]
    fn everything_is_in_one_rendering() {
        let metrics = Metrics::install("agent", "1.2.3", FlowMeterConfig::default(), None).unwrap();
        counter!(metric::DNS_QUERIES.name, "outcome" => "answered").increment(3);
        histogram!(metric::DNS_UPSTREAM_SECONDS.name).record(0.002);
        let text = metrics.render();
        for line in [
            "# TYPE culvert_dns_queries_total counter",
            "culvert_dns_queries_total{outcome=\"answered\"} 3",
            "istio_build{component=\"agent\",tag=\"1.2.3\"} 1",
            "istio_dns_upstream_request_duration_seconds_bucket{le=\"0.01\"} 1",
            "process_open_fds ",
            "process_resident_memory_bytes ",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
        assert!(matches!(
            Metrics::install("agent", "1.2.3", FlowMeterConfig::default(), None),
            Err(MetricsError::Installed(_))
        ));
    }
}

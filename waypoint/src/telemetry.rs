//! What is counted and logged of a request: once, when its answer has ended.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use http::HeaderMap;
use mesh_runtime::AccessLog;
use mesh_telemetry::{RequestFacts, RequestRecord, metric};
use metrics::{Counter, Histogram, Label};

/// A request's record on its way to its end. Dropping it without [`finish`](Self::finish) counts it as cut off.
pub(crate) struct Report {
    record: Option<Box<RequestRecord>>,
    started: Instant,
    request_bytes: Arc<AtomicU64>,
    access: AccessLog,
}

impl Report {
    pub(crate) const fn new(
        record: Box<RequestRecord>,
        started: Instant,
        request_bytes: Arc<AtomicU64>,
        access: AccessLog,
    ) -> Self {
        Self { record: Some(record), started, request_bytes, access }
    }

    /// Notes the gRPC status among trailers or headers.
    pub(crate) fn saw(&mut self, headers: &HeaderMap) {
        if let Some(record) = &mut self.record {
            record.grpc_status = grpc_status(headers).or(record.grpc_status);
        }
    }

    /// Counts bytes of the answer.
    pub(crate) fn sent(&mut self, bytes: usize) {
        if let Some(record) = &mut self.record {
            record.response_bytes += bytes as u64;
        }
    }

    /// The answer ended badly.
    pub(crate) fn failed(&mut self, reason: &'static str, flags: &'static str) {
        if let Some(record) = &mut self.record {
            record.reason = Some(reason);
            record.flags = flags;
        }
        self.finish();
    }

    /// The answer has ended.
    pub(crate) fn finish(&mut self) {
        let Some(mut record) = self.record.take() else { return };
        record.duration = self.started.elapsed();
        record.request_bytes = self.request_bytes.load(Ordering::Relaxed);
        count(&record);
        self.access.request(&record);
    }
}

impl Drop for Report {
    fn drop(&mut self) {
        if self.record.is_some() {
            // The client went away before the end.
            self.failed("client_reset", "DC");
        }
    }
}

/// The gRPC status in headers or trailers.
pub(crate) fn grpc_status(headers: &HeaderMap) -> Option<u16> {
    // UNKNOWN for what is none: these become labels. Source: grpc/doc/statuscodes.md.
    let status: u16 = headers.get("grpc-status")?.to_str().ok()?.parse().ok()?;
    Some(if status <= 16 { status } else { 2 })
}

/// One time series of each metric of requests.
#[derive(Clone)]
struct Series {
    requests: Counter,
    duration: Histogram,
    request_bytes: Histogram,
    response_bytes: Histogram,
}

impl Series {
    fn of(record: &RequestRecord) -> Self {
        let labels: Vec<Label> = record
            .facts
            .labels(record.status, record.grpc_status, record.flags)
            .into_iter()
            .map(|(name, value)| Label::new(name, value.as_str().to_owned()))
            .collect();
        Self {
            requests: metrics::counter!(metric::REQUESTS.name, labels.clone()),
            duration: metrics::histogram!(metric::REQUEST_DURATION.name, labels.clone()),
            request_bytes: metrics::histogram!(metric::REQUEST_BYTES.name, labels.clone()),
            response_bytes: metrics::histogram!(metric::RESPONSE_BYTES.name, labels),
        }
    }
}

/// Everything by which series differ.
type SeriesKey = (RequestFacts, u16, Option<u16>, &'static str);

/// Series that a thread remembers; beyond, it begins anew.
const MAX_SERIES: usize = 4_096;

thread_local! {
    static SERIES: RefCell<HashMap<SeriesKey, Series>> = RefCell::default();
}

#[expect(clippy::cast_precision_loss, reason = "a distribution over coarse buckets")]
fn count(record: &RequestRecord) {
    let key = (record.facts.clone(), record.status, record.grpc_status, record.flags);
    let series = SERIES.with_borrow_mut(|known| {
        if known.len() >= MAX_SERIES {
            known.clear();
        }
        known.entry(key).or_insert_with(|| Series::of(record)).clone()
    });
    series.requests.increment(1);
    series.duration.record(record.duration.as_secs_f64() * 1e3);
    series.request_bytes.record(record.request_bytes as f64);
    series.response_bytes.record(record.response_bytes as f64);
    if let Some(reason) = record.reason {
        let rule = record.policy.as_ref().map(ToString::to_string).unwrap_or_default();
        metrics::counter!(metric::WAYPOINT_REFUSED.name, "reason" => reason, "rule" => rule)
            .increment(1);
    }
}

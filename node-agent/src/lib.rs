//! The node's agent, as a library: `culvert-agent` and the tests are built on it.

mod admin;
pub mod agent;
mod allocator;
mod capture;
mod cni;
pub mod config;
mod control;
pub mod dataplane;
mod dns;
mod enrolment;
mod entropy;
mod error;
mod handover;
mod health;
mod identity;
mod kept_keys;
mod memory;
mod picture;
pub mod probe;
mod program_pages;
pub mod retired;
mod telemetry;
mod tend;
mod upgrade;
mod vital;

pub(crate) use mesh_control::state_file;

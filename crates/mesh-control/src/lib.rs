//! What agents and waypoints share on their side of the controller: joining it, coming back to it, files that survive.

#![forbid(unsafe_code)]

pub mod backoff;
pub mod session;
pub mod state_file;

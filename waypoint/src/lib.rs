//! The waypoint: every request to what is bound to it comes through here, is judged, routed and sent on.
//!
//! ```text
//! worker: tunnel (mTLS, HTTP/2) ─► CONNECT ─► stream: what is spoken? ─┬─► request: check ─► judge ─► route ─► upstream
//!                                                                       └─► bytes passed on, under L4 policy
//! control: delta xDS and certificate ─► picture (snapshot, swapped whole)
//! keys: issuers' key sets ─► the same picture's rules, by which requests are authenticated before they are judged
//! ```
//! One thread per core, each with its own listener, tunnels and connections to servers; nothing is shared on a request's way
//! but the picture.
//!
//! **Invariants.** Nothing goes on without a verdict on it. What is judged is what is routed and what is sent on: a path has one
//! form. A frontend or policy that is not known refuses.

#![forbid(unsafe_code)]

mod admin;
mod body;
pub mod config;
mod control;
pub mod detect;
mod keys;
mod picture;
mod refusal;
mod request;
pub mod run;
mod stream;
pub mod strict;
mod telemetry;
mod upstream;
mod worker;

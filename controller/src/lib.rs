//! The controller: sources, index, xDS and the certificate authority.
//!
//! ```text
//! source (objects) ─► index (pure) ─► mesh ─► publish (delta xDS per agent)
//!                        ▲              └───► explain, config_dump, status (admin)
//!   ca: enrolment ───────┘ (node reports)
//! ```
//!
//! **Invariants.** `index` has no clock, file or socket. An agent is told nothing before the source has been read once.
//! A node is given what concerns it and identities of its own pods, never more.

#![forbid(unsafe_code)]

pub mod admin;
pub mod ca;
pub mod cli;
pub mod cluster;
pub mod door;
pub mod explain;
pub mod index;
pub mod manifest;
pub mod mesh;
pub mod publish;
pub mod run;
pub mod source;
pub mod state_dir;

//! The controller: sources, index, xDS and the certificate authority.
//!
//! ```text
//! source (objects) ─► index (pure) ─► picture ─► publish (delta xDS per agent)
//!                        ▲                └────► explain, config_dump, status
//!   ca: enrolment ───────┘ (node reports)
//! ```

#![forbid(unsafe_code)]
// The admin page and tests name these; the binary only wires them.
pub mod cli;
pub mod index;
pub mod manifest;
pub mod source;
